"""Who is to blame, and how sure we are.

Every failure that a person or another program meets is one of these classes. The class says who
caused it and with what certainty; ``code`` is stable and may be matched by programs; the text says
what was observed and what to do about it. Decoders raise ``MalformedMessage`` without blame, and
whoever knows the sender turns it into ``FaultyClient`` or ``FaultyServer``.

Texts never hold a protocol value: no key, share, seed, digest or word of a vector.
"""

from __future__ import annotations

from typing import Final


class SecaggError(Exception):
    """Base of all errors of this product.

    Args:
        code: stable slug, for programs and for the documentation.
        observed: what was seen, in words, without any protocol value.
        remedy: what the reader can do about it.
    """

    def __init__(self, code: str, observed: str, remedy: str = "") -> None:
        self.code = code
        self.observed = observed
        self.remedy = remedy
        super().__init__(code, observed, remedy)

    def __str__(self) -> str:
        return f"[{self.code}] {self.observed}" + (f" {self.remedy}" if self.remedy else "")


class ConfigError(SecaggError):
    """A configuration, policy or profile that cannot be right; nothing was started."""


class InputError(SecaggError):
    """The caller's tensors, weight or metrics break the task's bounds; nothing was sent."""


class CredentialError(SecaggError):
    """A key, certificate, bundle or manifest on this machine cannot be used."""


class PolicyRefused(SecaggError):
    """A silo declines a session or round below its own floors, before it sends a key."""


class OutOfOrder(SecaggError):
    """Our caller used a state or message twice or in the wrong phase: a bug on this side."""


class MalformedMessage(SecaggError):
    """Bytes that are no message. The reader that knows the sender turns this into blame."""


class FaultyClient(SecaggError):
    """One client broke the protocol, certain: it sent or signed the evidence.

    Args:
        client: the name in the peer certificate or under the verified signature.
    """

    def __init__(self, client: str, code: str, observed: str, remedy: str = "") -> None:
        super().__init__(code, observed, remedy)
        self.client = client


class Conflict(FaultyClient):
    """A second message where a different one was already accepted; the first one stands."""


class FaultyServer(SecaggError):
    """The coordinator broke the protocol; raised by a client, certain. The attempt is over."""


class FaultyClientOrServer(SecaggError):
    """One named client or the server in between broke the protocol; which cannot be told.

    Args:
        client: the client that the evidence points at.
    """

    def __init__(self, client: str, code: str, observed: str, remedy: str = "") -> None:
        super().__init__(code, observed, remedy)
        self.client = client


class TooLate(SecaggError):
    """The phase closed before this message came. Nobody's fault; it is never added."""


class RoundAborted(SecaggError):
    """An attempt ended without a sum and without anything being revealed that should not be.

    Args:
        phase: the phase in which it ended (a value of ``secagg.config.Phase``).
        have: how many usable contributions that phase had.
        need: how many it needed.
        blamed: clients that the next attempt leaves out, if any.
    """

    def __init__(
        self, phase: str, have: int, need: int, *, blamed: tuple[str, ...] = (), because: str = ""
    ) -> None:
        self.phase = phase
        self.have = have
        self.need = need
        self.blamed = blamed
        self.because = because
        super().__init__(
            "round-aborted",
            f"The attempt ended in {phase}: {have} of {need} needed."
            + (f" {because}" if because else ""),
            "The next attempt starts clean; check the silos that fell silent.",
        )


class PoisonedResult(SecaggError):
    """A released sum is no sum of encoded updates: a silo or the coordinator added something else.

    All silos see the same sum and come to the same end: nothing is applied, and the task goes on
    with its next round.
    """


class StaleModel(SecaggError):
    """This silo's base is not the one the cohort agreed on; it must replay the missed sums."""


class StaleKey(SecaggError):
    """This silo's key is not the session's newest one; it must ask for that."""


class SessionEnded(SecaggError):
    """The session was aborted by its admin or has done all its rounds."""


class IdentityRefused(SecaggError):
    """The peer certificate does not say, in the one accepted form, who is calling."""


class RoleRefused(SecaggError):
    """The caller is known, and this is not for it."""


class NotFound(SecaggError):
    """There is no such session, task, round or blob."""


class QuotaExceeded(SecaggError):
    """The caller asks for more than it may use."""


class StorageFailed(SecaggError):
    """This machine's disk did not take or give bytes: whoever needed them stops, nothing counts."""


class StorageBusy(SecaggError):
    """This machine has no space or descriptor left for something new; later it may have."""


class StorageDamaged(SecaggError):
    """Stored bytes are not those that were written; the text names the place."""


class StorageInUse(SecaggError):
    """Another process works in this directory."""


EXIT_CODES: Final[dict[type[SecaggError], int]] = {
    StorageFailed: 74,  # EX_IOERR
    StorageInUse: 75,  # EX_TEMPFAIL: it may go away
    StorageDamaged: 76,
}
"""Exit status of a command that ended with one of these; 1 for all others."""
