"""Hypothesis plays a malicious coordinator, with n_c colluders, against one honest client.

The client is the product's, driven as its contract says; every other silo is a puppet. A puppet
that is not the colluder signs once per attempt and phase, whatever it is shown, which is more than
an honest silo would sign; as the colluder the coordinator signs what it likes. The coordinator's
moves are read from a tape of bytes (zeros are honest), so that Hypothesis can shorten a violation
to its core, and every run prints its moves when it fails.

``Audit`` sees all that leaves the client and asks, with hashes and signatures of its own, whether
it ever said what an honest client must not: both shares of one silo, a share before t survivors
signed the very τ3 that it signed, two τ3 or two masked inputs in an attempt, other survivors on a
base than were revealed there, an old key, or anything after a refusal. ``test_audit_has_power``
weakens the client, one check at a time, and demands that the machine finds the hole.

The pure functions that dominate the time (signatures, key agreement) are memoised.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache, lru_cache
from typing import Any, TypeVar

import numpy as np
import pytest
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from hypothesis import HealthCheck, given, note, settings
from hypothesis import Phase as HypothesisPhase
from hypothesis import strategies as st

from secagg.config import MaskPrg, Policy, SiloId
from secagg.crypto import sign as sign_module
from secagg.crypto.keys import KeyPair
from secagg.crypto.secret import Secret
from secagg.crypto.shamir import SHARE_BYTES
from secagg.crypto.sign import IdentityKey
from secagg.errors import FaultyServer, MalformedMessage, OutOfOrder, PolicyRefused
from secagg.masking import client, ledger, transcript
from secagg.masking.ledger import Joined, MemoryLedger, Recorded, Revealed
from secagg.masking.messages import (
    BOX_BYTES,
    AdvertiseKeys,
    Commitment,
    Consistency,
    Dealing,
    Dealt,
    Descriptor,
    MaskedInput,
    Result,
    RevealedShare,
    Roster,
    ShareKeys,
    ShareKind,
    Signatures,
    Survivors,
    Unmasking,
)
from secagg.masking.shares import HeldShares, seal_shares
from secagg.ring.expand import Mask, masked
from secagg.ring.vectors import PowerRing, Vector

from .conftest import EXAMPLES
from .harness import (
    BASE,
    COLLUDER,
    ME,
    TASK,
    Keyed,
    flip,
    identity,
    make_manifest,
    make_policy,
    make_session,
    signed,
    silos,
    swap,
    without,
)

N_C = 1
TAPE_BYTES = 80
SILOS = silos(6)
A, B, C, D, E, F = SILOS
COHORTS = ((A, B, C, D), (A, B, C, D), (A, B, C), (B, D, E), SILOS, (B, D, F))
SESSION = make_session(6)
SESSIONS = (SESSION, replace(SESSION, name="study-2"), SESSION)
SESSION_IDS = (b"\x51" * 32, b"\x52" * 32, b"\x53" * 32)
"""The second has another name, the third a used one, to which the operator consented."""
MANIFEST = make_manifest(SILOS)
POLICY: Policy = make_policy(repeat_sessions=("study",))
SESSION_HASH = transcript.session_hash(SESSION)
RING = PowerRing(SESSION.task(TASK).ring_bits)
T = TypeVar("T")


# What is pure is computed once.


@contextmanager
def memoised() -> Iterator[None]:
    """Remember signatures, verdicts and key agreements by their arguments."""
    agree, sign, from_private = KeyPair.agree, IdentityKey.sign, KeyPair.from_private
    verify = sign_module.verify

    @lru_cache(2**17)
    def agreed(private: bytes, public: bytes, peer: bytes) -> Secret | None:
        try:
            return agree(KeyPair.from_private(Secret(private)), peer)
        except MalformedMessage:
            return None

    def fast_agree(self: KeyPair, peer: bytes) -> Secret:
        found = agreed(self.private.reveal(), self.public, peer)
        if found is None:
            raise MalformedMessage("public-key-low-order", "")
        return found

    @lru_cache(2**17)
    def made(private: bytes, public: bytes, kind: str, tau: bytes, body: bytes) -> bytes:
        return sign(IdentityKey(Secret(private), public), kind, tau, body)

    def fast_sign(self: IdentityKey, kind: str, tau: bytes, body: bytes) -> bytes:
        return made(self.private.reveal(), self.public, kind, tau, body)

    @lru_cache(2**17)
    def verdict(*arguments: Any) -> bool:
        try:
            verify(*arguments)
        except MalformedMessage:
            return False
        return True

    def fast_verify(*arguments: Any) -> None:
        if not verdict(*arguments):
            raise MalformedMessage("signature", "")

    pairs = lru_cache(2**17)(lambda private: from_private(Secret(private)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(KeyPair, "agree", fast_agree)
        patch.setattr(KeyPair, "from_private", lambda private: pairs(private.reveal()))
        patch.setattr(IdentityKey, "sign", fast_sign)
        patch.setattr(client, "verify", fast_verify)
        yield


# The auditor: hashes and signatures of its own.


class Unmakeable(LookupError):
    """The adversary lacks what its move needs: it makes no message."""


class Known(dict[type, Any]):
    """What the adversary knows of an attempt, by message type."""

    def __missing__(self, kind: type) -> Any:
        raise Unmakeable(kind.__name__)


class Violation(AssertionError):
    """The client said what an honest client must not."""


def require(holds: bool, what: str) -> None:
    """Raise unless the invariant holds."""
    if not holds:
        raise Violation(what)


def own_enc(*items: bytes) -> bytes:
    """The design's ``enc``, written again."""
    return len(items).to_bytes(4, "big") + b"".join(
        len(item).to_bytes(8, "big") + item for item in items
    )


def own_hash(label: str, *items: bytes) -> bytes:
    """The design's ``H``, written again."""
    return hashlib.sha256(own_enc(b"secagg/1/" + label.encode(), *items)).digest()


@lru_cache(2**17)
def own_verdict(name: str, kind: str, tau: bytes, body: bytes, signature: bytes) -> bool:
    """Whether a silo signed this, by a verification written again."""
    public = identity(name).public
    data = own_enc(b"secagg/1/sig/" + kind.encode(), tau, own_hash("body", body))
    try:
        Ed25519PublicKey.from_public_bytes(public).verify(signature, data)
    except InvalidSignature:
        return False
    return True


def own_threshold(n: int) -> int:
    """t for a cohort of n: 2/3 of it and one more, 2t > n + n_c and t ≥ n_c + 2."""
    return max(2 * n // 3 + 1, (n + N_C) // 2 + 1, N_C + 2)


@dataclass
class Said:
    """What the client said in one attempt."""

    descriptor: Descriptor
    advert: AdvertiseKeys | None = None
    roster: Roster | None = None
    shared: ShareKeys | None = None
    dealt: Dealt | None = None
    commit: MaskedInput | None = None
    survivors: Survivors | None = None
    signature: Consistency | None = None
    reveals: list[Unmasking] = field(default_factory=list)
    refused: bool = False


class Audit:
    """All that the client ever said, across attempts, sessions and restarts."""

    def __init__(self) -> None:
        self.said: dict[bytes, Said] = {}
        self.public: set[bytes] = set()
        self.revealed: dict[bytes, frozenset[str]] = {}
        self.reveals = 0

    def refusal(self, tau0: bytes) -> None:
        """The client refused in this attempt: it must be silent in it from now on."""
        if tau0 in self.said:
            self.said[tau0].refused = True

    def sends(self, attempt: Attempt, told: Any, message: Any) -> None:
        """A message leaves the client, in answer to what it was told."""
        tau0 = attempt.tau0
        said = self.said.setdefault(tau0, Said(attempt.descriptor))
        require(not said.refused, "A message after a refusal in the attempt.")
        require(message.sender == ME, "A message in somebody else's name.")
        match message:
            case AdvertiseKeys():
                self._advertises(said, message)
            case ShareKeys():
                require(said.shared is None, "Secrets were shared twice in an attempt.")
                said.shared, said.roster = message, told
                boxed = [box.recipient for box in message.boxes]
                require(boxed == [a.sender for a in told.adverts if a.sender != ME], "Boxes.")
            case MaskedInput():
                require(said.commit is None, "A second masked input in an attempt.")
                said.commit, said.dealt = message, told
            case Consistency():
                self._signs(said, told, message, tau0)
            case Unmasking():
                self._reveals(said, attempt, told, message)

    def _advertises(self, said: Said, message: AdvertiseKeys) -> None:
        fresh = {message.channel_key, message.mask_key, message.self_seed_hash}
        require(said.advert is None, "Two adverts in an attempt.")
        require(len(fresh) == 3 and not fresh & self.public, "A public key was used before.")
        self.public |= fresh
        said.advert = message

    def tau3(self, said: Said, tau0: bytes) -> bytes:
        """What the client must have signed, from what it was told."""
        assert said.roster is not None
        assert said.dealt is not None
        assert said.survivors is not None
        tau1 = own_hash(
            "roster",
            tau0,
            *(
                own_enc(
                    own_enc(a.sender.encode(), a.channel_key, a.mask_key, a.self_seed_hash),
                    a.signature,
                )
                for a in said.roster.adverts
            ),
        )
        tau2 = own_hash("dealt", tau1, *(dealing.body() for dealing in said.dealt.dealings))
        commits = (
            own_enc(
                c.sender.encode(),
                own_hash(
                    "commit",
                    own_enc(
                        c.sender.encode(),
                        c.vector_digest,
                        own_enc(*(name.encode() for name in c.bad_dealers)),
                    ),
                ),
            )
            for c in said.survivors.commits
        )
        return own_hash("survivors", tau2, *commits)

    def _signs(self, said: Said, told: Survivors, message: Consistency, tau0: bytes) -> None:
        require(said.signature is None, "Two τ3 were signed in an attempt.")
        said.signature, said.survivors = message, told
        names = frozenset(commit.sender for commit in told.commits)
        tau3 = self.tau3(said, tau0)
        valid = own_verdict(ME, "consistency", tau3, ME.encode(), message.signature)
        require(valid, "The signature is over another τ3 than was shown.")
        own = [commit for commit in told.commits if commit.sender == ME]
        require(own == [said.commit], "Signed without its own commit.")
        require(len(names) >= own_threshold(len(said.descriptor.cohort)), "Signed fewer than t.")
        self._check_base(said.descriptor.base, names, "Signed")

    def _check_base(self, base: bytes, names: frozenset[str], what: str) -> None:
        old = self.revealed.get(base, names)
        require(names == old, f"{what} {len(names ^ old)} silos away from what was revealed.")

    def _reveals(self, said: Said, attempt: Attempt, told: Signatures, message: Unmasking) -> None:
        require(said.signature is not None, "A reveal before a signature.")
        assert said.survivors is not None
        assert said.dealt is not None
        tau3 = self.tau3(said, attempt.tau0)
        names = frozenset(commit.sender for commit in said.survivors.commits)
        signers = {
            signed.sender
            for signed in told.signed
            if signed.sender in names
            and own_verdict(
                signed.sender, "consistency", tau3, signed.sender.encode(), signed.signature
            )
        }
        need = own_threshold(len(said.descriptor.cohort))
        require(len(signers) >= need, f"A reveal with {len(signers)} of {need} signatures.")
        said.reveals.append(message)
        self._check_kinds(said, attempt, names)
        base = said.descriptor.base
        self._check_base(base, names, "Revealed")
        self.revealed[base] = names
        self.reveals += 1

    def _check_kinds(self, said: Said, attempt: Attempt, names: frozenset[str]) -> None:
        assert said.dealt is not None
        out: dict[str, set[bytes]] = {}
        for share in (share for reveal in said.reveals for share in reveal.shares):
            out.setdefault(share.owner, set()).add(share.kind.encode())
            survived = share.owner in names
            kind = ShareKind.SELF_SEED if survived else ShareKind.MASK_KEY
            require(share.kind is kind, "A share of the wrong kind.")
            if share.owner != ME:
                dealt = held(share.owner, attempt.index, ME)
                right = (dealt.self_seed, dealt.self_seed_salt)
                if not survived:
                    right = (dealt.mask_key, dealt.mask_key_salt)
                require((share.share, share.salt) == right, "Not the share that was dealt.")
        require(all(len(kinds) == 1 for kinds in out.values()), "Both shares of one silo.")
        require(out.keys() <= {dealing.dealer for dealing in said.dealt.dealings}, "Outsiders.")


# The honest client and its shell.


@dataclass
class Attempt:
    """One attempt as the coordinator knows it, and the client's states of it."""

    index: int
    descriptor: Descriptor
    tau0: bytes
    session: int
    states: dict[type, Any] = field(default_factory=dict)
    used: dict[type, Any] = field(default_factory=dict)
    alive: bool = True
    sent: Known = field(default_factory=Known)
    told: Known = field(default_factory=Known)
    voted: dict[tuple[str, type], Any] = field(default_factory=dict)

    @property
    def threshold(self) -> int:
        return self.descriptor.threshold

    @property
    def tau1(self) -> bytes:
        return transcript.roster_transcript(self.tau0, self.told[Roster].adverts)

    @property
    def tau2(self) -> bytes:
        dealings = self.told[Dealt].dealings
        return transcript.dealt_transcript(self.tau1, {d.dealer: d.body() for d in dealings})

    @property
    def tau3(self) -> bytes:
        return transcript.survivors_transcript(self.tau2, self.told[Survivors].commits)

    @property
    def next(self) -> type | None:
        """What the client has not been told yet."""
        for kind in (Roster, Dealt, Survivors, Signatures):
            if kind not in self.told:
                return kind
        return None


class HonestClient:
    """The shell's contract, and nothing more: check, record, step, send."""

    def __init__(self, audit: Audit) -> None:
        self.audit = audit
        self.ledger = MemoryLedger()
        self.entropy = Keyed("honest client")
        self.expected = client.Expected(TASK, 1, BASE)
        self.results: dict[bytes, bytes] = {}
        self.members = [
            client.Member(ME, identity(ME), MANIFEST, POLICY, session, session_id)
            for session, session_id in zip(SESSIONS, SESSION_IDS, strict=True)
        ]

    def join(self, attempt: Attempt) -> bool:
        """Answer a descriptor."""
        member = self.members[attempt.session]
        try:
            admitted = client.admit(attempt.descriptor, member, self.expected, self.ledger)
        except (FaultyServer, PolicyRefused) as refusal:
            note(f"  refused: {refusal.code}")
            return False
        recorded = self.ledger.record(admitted.entry)
        state, advert = client.advertise_keys(admitted, recorded, entropy=self.entropy)
        self._send(attempt, attempt.descriptor, state, advert)
        return True

    def tell(self, attempt: Attempt, told: Any) -> None:
        """Answer anything else with the state that it is for, spent or not."""
        state = attempt.states.get(type(told)) or attempt.used.get(type(told))
        if state is None:
            return
        attempt.used[type(told)] = state
        attempt.told.setdefault(type(told), told)
        try:
            new, message = self._answer(state, told)
        except (FaultyServer, PolicyRefused) as refusal:
            note(f"  refused: {refusal.code}")
            attempt.alive = False
            self.audit.refusal(attempt.tau0)
            return
        except OutOfOrder as ours:
            note(f"  out of order: {ours.code}")
            return
        attempt.told[type(told)] = told
        self._send(attempt, told, new, message)

    def _answer(self, state: Any, told: Any) -> tuple[Any, Any]:
        match told:
            case Roster():
                return client.share_keys(state, told, entropy=self.entropy)
            case Dealt():
                return client.mask_input(state, told, self._encode)[:2]
            case Survivors():
                return client.check_survivors(state, told, self.ledger)
            case _:
                checked = client.check_consistency(state, told)
                return client.reveal_shares(checked, self.ledger.record(checked.entry))

    @staticmethod
    def _encode(masks: Sequence[Mask], prg: MaskPrg) -> Vector:
        return masked(RING, np.arange(3, dtype=RING.dtype))(masks, prg)

    def _send(self, attempt: Attempt, told: Any, state: Any, message: Any) -> None:
        note(f"  sends {type(message).__name__}")
        attempt.states[AFTER[type(told)]] = state
        attempt.sent[type(message)] = message
        self.audit.sends(attempt, told, message)

    def finish(self, attempt: Attempt, result: Result) -> bool:
        """Take a result; the client moves on."""
        state = attempt.states.get(Result)
        try:
            tau4 = client.check_result(result, self.members[attempt.session], self.expected, state)
        except FaultyServer as refusal:
            note(f"  refused: {refusal.code}")
            return False
        require(result.base == self.expected.base, "A result of another base.")
        require(result.base not in self.results, "A second result on one base.")
        self.results[result.base] = tau4
        history = transcript.next_history(self.expected.base, tau4)
        base = transcript.base_of(history, bytes(32))
        self.expected = client.Expected(TASK, self.expected.round + 1, base)
        return True


AFTER: dict[type, type] = {
    Descriptor: Roster,
    Roster: Dealt,
    Dealt: Survivors,
    Survivors: Signatures,
    Signatures: Result,
}


# The puppets' material, made once.


@cache
def keys_of(name: str, index: int) -> tuple[KeyPair, KeyPair]:
    """A puppet's channel and mask keys of an attempt."""
    entropy = Keyed("puppet keys", name, index)
    return KeyPair.generate(entropy), KeyPair.generate(entropy)


@cache
def held(owner: SiloId, index: int, holder: SiloId) -> HeldShares:
    """The shares that a puppet deals to one holder in an attempt."""
    entropy = Keyed("puppet shares", owner, index, holder)

    def share() -> Secret:
        return Secret(b"\0" + entropy(SHARE_BYTES - 1))

    return HeldShares(owner, share(), Secret(entropy(32)), share(), Secret(entropy(32)))


def find(messages: Sequence[Any], name: SiloId, key: str = "sender") -> Any:
    """The entry of a name."""
    for message in messages:
        if getattr(message, key) == name:
            return message
    raise Unmakeable(name)


class Tape:
    """The adversary's choices; zeros once it has run out."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    @property
    def ended(self) -> bool:
        return self._at >= len(self._data)

    def pick(self, options: Sequence[T]) -> T:
        """Choose one."""
        if not options:
            raise Unmakeable("nothing to choose from")
        byte = 0 if self.ended else self._data[self._at]
        self._at += 1
        return options[byte % len(options)]


class Coordinator:
    """The adversary: all keys of the coordinator and the colluder, one signature of the others."""

    def __init__(self, tape: Tape) -> None:
        self.tape = tape
        self.audit = Audit()
        self.client = HonestClient(self.audit)
        self.attempts: list[Attempt] = []
        self.opened = 0

    # Signing as somebody.

    def sign(self, attempt: Attempt, message: Any, tau: bytes) -> Any:
        """A puppet's signature: as often as it likes for the colluder, once for the others."""
        name = getattr(message, "sender", None) or message.dealer
        if name == COLLUDER:
            return signed(message, name, tau)
        assert name != ME
        return attempt.voted.setdefault((name, type(message)), signed(message, name, tau))

    def forge(self, message: Any, tau: bytes) -> Any:
        """Somebody else's message, signed by who can be made to."""
        return signed(message, self.tape.pick((COLLUDER, "coordinator")), tau)

    def other(self, names: Sequence[SiloId]) -> SiloId:
        """A silo that is not the client's."""
        return self.tape.pick([name for name in names if name != ME] or [A])

    def drop(self, names: Sequence[SiloId]) -> tuple[SiloId, ...]:
        """Mostly everybody; sometimes without one or two."""
        leave = self.tape.pick((0, 0, 0, 1, 1, 2))
        gone = {self.other(names) for _ in range(leave)}
        return tuple(name for name in names if name not in gone)

    def earlier(self, attempt: Attempt, kind: type) -> Any:
        """What the client was told in another attempt."""
        told = [a.told[kind] for a in self.attempts if a is not attempt and kind in a.told]
        return self.tape.pick(told) if told else None

    # Moves.

    def play(self) -> None:
        """Make moves until the tape ends."""
        self.open()
        while not self.tape.ended:
            self.tape.pick(MOVES)(self)

    def step(self) -> None:
        """Go on with the newest attempt, or open another."""
        newest = self.attempts[-1] if self.attempts else None
        if newest is None or not newest.alive or newest.next is None:
            self.open()
        else:
            self.tell(newest, newest.next)

    def step_older(self) -> None:
        """Go on with any attempt."""
        waiting = [a for a in self.attempts if a.alive and a.next is not None]
        attempt = self.tape.pick(waiting) if waiting else None
        if attempt is not None and attempt.next is not None:
            self.tell(attempt, attempt.next)

    def again(self) -> None:
        """Ask a phase that was answered or refused before."""
        asked = [(a, kind) for a in reversed(self.attempts) for kind in a.used]
        if asked:
            self.tell(*self.tape.pick(asked))

    def restart(self) -> None:
        """The client's process dies: its states are lost, its ledger is not."""
        note("restart")
        for attempt in self.attempts:
            attempt.states.clear()
            attempt.used.clear()
            attempt.alive = False

    def tell(self, attempt: Attempt, kind: type) -> None:
        """Make a message and tell it to the client."""
        maker = {
            Roster: self.roster,
            Dealt: self.dealt,
            Survivors: self.survivors,
            Signatures: self.signatures,
        }[kind]
        note(f"attempt {attempt.index}: {kind.__name__}")
        try:
            told = maker(attempt)
        except (MalformedMessage, Unmakeable) as error:  # not to be written down, or not known
            note(f"  no message: {error!r}")
            return
        self.client.tell(attempt, told)

    def open(self) -> None:
        """Open an attempt: newer, replayed, on another base or of another session."""
        session = self.tape.pick((0, 0, 0, 1, 2))
        bad = self.tape.pick((*[None] * 24, "replay", "older", "base", "forged", "threshold", "me"))
        cohort = self.tape.pick(COHORTS)
        note(f"open {session} {bad} {cohort}")
        if bad == "replay" and self.attempts:
            old = self.tape.pick(self.attempts)
            self.attempts.append(Attempt(old.index, old.descriptor, old.tau0, old.session))
            if not self.client.join(self.attempts[-1]):
                self.attempts.pop()
            return
        self.opened += 1
        descriptor = Descriptor(
            session_id=SESSION_IDS[session],
            session_hash=SESSION_HASH,
            manifest_version=MANIFEST.version,
            manifest_digest=MANIFEST_DIGEST,
            task=TASK,
            round=self.client.expected.round,
            attempt=1 if bad == "older" else self.opened,
            nonce=self.opened.to_bytes(32, "big"),
            cohort=tuple(n for n in cohort if n != ME) if bad == "me" else cohort,
            threshold=own_threshold(len(cohort)) - (bad == "threshold"),
            base=flip(BASE) if bad == "base" else self.client.expected.base,
            signature=bytes(64),
        )
        tau0 = transcript.round_transcript(descriptor)
        by = COLLUDER if bad == "forged" else "coordinator"
        attempt = Attempt(self.opened, signed(descriptor, by, tau0), tau0, session)
        if self.client.join(attempt):
            self.attempts.append(attempt)

    def advert(self, attempt: Attempt, name: SiloId) -> AdvertiseKeys:
        """A puppet's advert, or the client's own."""
        if name == ME:
            own = attempt.sent[AdvertiseKeys]
            assert isinstance(own, AdvertiseKeys)
            return own
        channel, mask_key = keys_of(name, attempt.index)
        unsigned = AdvertiseKeys(name, channel.public, mask_key.public, bytes(32), bytes(64))
        return self.sign(attempt, unsigned, attempt.tau0)  # type: ignore[no-any-return]

    def roster(self, attempt: Attempt) -> Roster:
        """A roster, mostly a good one."""
        names = self.drop(attempt.descriptor.cohort)
        adverts = tuple(self.advert(attempt, name) for name in names)
        how = self.tape.pick((*[None] * 40, *ROSTERS))
        if how is None:
            return Roster(adverts)
        note(f"  {how}")
        own, colluder = attempt.sent[AdvertiseKeys], self.advert(attempt, COLLUDER)
        match how:
            case "without me":
                return Roster(without(adverts, ME))
            case "few":
                return Roster(adverts[-attempt.threshold + 1 :])
            case "earlier":
                return self.earlier(attempt, Roster) or Roster(())
            case "earlier advert":
                old = self.earlier(attempt, Roster)
                return Roster(swap(adverts, self.tape.pick(old.adverts)) if old else ())
            case "reflected":
                key = self.tape.pick((own.channel_key, own.mask_key))
                use = self.tape.pick(("channel_key", "mask_key"))
                changed = signed(colluder, COLLUDER, attempt.tau0, **{use: key})
                return Roster(swap(adverts, changed))
            case "forged":
                victim = self.other(names)
                changed = replace(colluder, sender=victim)
                return Roster(swap(adverts, self.forge(changed, attempt.tau0)))
            case "low order":
                changed = signed(colluder, COLLUDER, attempt.tau0, channel_key=bytes(32))
                return Roster(swap(adverts, changed))
            case _:
                outsider = self.tape.pick([n for n in SILOS if n not in names] or [A])
                return Roster(swap(adverts, self.advert(attempt, outsider)))

    def dealing(self, attempt: Attempt, name: SiloId) -> Dealing:
        """A puppet's dealing to the client, or the client's own."""
        names = tuple(advert.sender for advert in attempt.told[Roster].adverts)
        if name == ME:
            own = attempt.sent[ShareKeys]
            return Dealing(ME, own.commitments, own.boxes_digest(), None, own.signature)
        tau1 = attempt.tau1
        shares = held(name, attempt.index, ME)
        commitments = tuple(
            shares.commitment(ME, tau1)
            if holder == ME
            else Commitment(holder, bytes(32), bytes(32))
            for holder in sorted({*names, name})
        )
        box = seal_shares(
            shares,
            keys_of(name, attempt.index)[0],
            ME,
            attempt.sent[AdvertiseKeys].channel_key,
            tau1,
        )
        unsigned = Dealing(name, commitments, bytes(32), box, bytes(64))
        done = self.sign(attempt, unsigned, tau1)
        assert isinstance(done, Dealing)
        return done

    def dealt(self, attempt: Attempt) -> Dealt:
        """Dealings, mostly good ones."""
        names = self.drop(tuple(advert.sender for advert in attempt.told[Roster].adverts))
        dealings = tuple(self.dealing(attempt, name) for name in names)
        how = self.tape.pick((*[None] * 40, *DEALINGS))
        if how is None:
            return Dealt(dealings)
        note(f"  {how}")
        match how:
            case "without me":
                return Dealt(without(dealings, ME, key="dealer"))
            case "few":
                return Dealt(dealings[-attempt.threshold + 1 :])
            case "earlier":
                return self.earlier(attempt, Dealt) or Dealt(())
            case "garbage" | "no box":
                victim = find(dealings, self.other(names), "dealer")
                box = None if how == "no box" else bytes(BOX_BYTES)
                return Dealt(swap(dealings, replace(victim, sealed=box), "dealer"))
            case "mine altered":
                changed = replace(self.dealing(attempt, ME), boxes_digest=bytes(32))
                return Dealt(swap(dealings, changed, "dealer"))
            case "forged":
                victim = find(dealings, self.other(names), "dealer")
                victim = replace(victim, boxes_digest=b"f" * 32)
                return Dealt(swap(dealings, self.forge(victim, attempt.tau1), "dealer"))
            case "short list":
                colluder = self.dealing(attempt, COLLUDER)
                commitments = without(colluder.commitments, A, key="holder")
                changed = signed(colluder, COLLUDER, attempt.tau1, commitments=commitments)
                return Dealt(swap(dealings, changed, "dealer"))
            case _:
                outsider = self.tape.pick([n for n in SILOS if n not in names] or [A])
                return Dealt(swap(dealings, self.dealing(attempt, outsider), "dealer"))

    def commit(self, attempt: Attempt, name: SiloId) -> MaskedInput:
        """A puppet's commit, or the client's own."""
        if name == ME:
            own = attempt.sent[MaskedInput]
            assert isinstance(own, MaskedInput)
            return own
        unsigned = MaskedInput(name, bytes(32), (), bytes(64))
        return self.sign(attempt, unsigned, attempt.tau2)  # type: ignore[no-any-return]

    def survivors(self, attempt: Attempt) -> Survivors:
        """Survivors, mostly good ones."""
        names = self.drop(tuple(dealing.dealer for dealing in attempt.told[Dealt].dealings))
        commits = tuple(self.commit(attempt, name) for name in names)
        how = self.tape.pick((*[None] * 40, *SURVIVING))
        if how is None:
            return Survivors(commits)
        note(f"  {how}")
        match how:
            case "without me":
                return Survivors(without(commits, ME))
            case "few":
                return Survivors(commits[: attempt.threshold - 1])
            case "earlier":
                return self.earlier(attempt, Survivors) or Survivors(())
            case "my earlier":
                old = self.earlier(attempt, Survivors)
                mine = find(old.commits, ME) if old else self.commit(attempt, ME)
                return Survivors(swap(commits, mine))
            case "mine altered":
                changed = replace(self.commit(attempt, ME), vector_digest=b"f" * 32)
                return Survivors(swap(commits, self.forge(changed, attempt.tau2)))
            case "forged":
                changed = replace(self.commit(attempt, self.other(names)), vector_digest=b"f" * 32)
                return Survivors(swap(commits, self.forge(changed, attempt.tau2)))
            case _:
                outsider = self.tape.pick([n for n in SILOS if n not in names] or [A])
                return Survivors(swap(commits, self.commit(attempt, outsider)))

    def vote(self, attempt: Attempt, name: SiloId, tau3: bytes) -> Consistency:
        """A puppet's signature over a τ3, or the client's own over its own."""
        if name == ME:
            own = attempt.sent[Consistency]
            assert isinstance(own, Consistency)
            return own
        return self.sign(attempt, Consistency(name, bytes(64)), tau3)  # type: ignore[no-any-return]

    def other_view(self, attempt: Attempt) -> bytes:
        """A τ3 that the client was not shown."""
        commits = attempt.told[Survivors].commits
        return transcript.survivors_transcript(attempt.tau2, without(commits, self.other(SILOS)))

    def signatures(self, attempt: Attempt) -> Signatures:
        """Signatures, mostly good ones."""
        tau3 = attempt.tau3
        how = self.tape.pick((*[None] * 40, *SIGNING))
        survivors = tuple(commit.sender for commit in attempt.told[Survivors].commits)
        if how in ("other view", "one other view"):
            names = survivors if how == "other view" else (self.other(survivors),)
            for name in names:
                if name != ME:
                    self.vote(attempt, name, self.other_view(attempt))
        signed_ = tuple(self.vote(attempt, name, tau3) for name in survivors)
        if how is None:
            return Signatures(signed_)
        note(f"  {how}")
        few = signed_[-attempt.threshold + 1 :]
        match how:
            case "few":
                return Signatures(few)
            case "copies":
                return Signatures((self.tape.pick(signed_),) * attempt.threshold)
            case "one doubled":
                return Signatures((*few, self.tape.pick(few)))
            case "earlier":
                return self.earlier(attempt, Signatures) or Signatures(())
            case "earlier one":
                old = self.earlier(attempt, Signatures)
                return Signatures(swap(few, self.tape.pick(old.signed)) if old else few)
            case "forged":
                victim = self.tape.pick([n for n in survivors if n not in (ME, COLLUDER)] or [A])
                kept = without(signed_, victim)[: attempt.threshold - 1]
                return Signatures((*kept, self.forge(Consistency(victim, bytes(64)), tau3)))
            case "no survivor":
                outsider = self.tape.pick([n for n in SILOS if n not in survivors] or [A])
                return Signatures((*few, self.vote(attempt, outsider, tau3)))
            case "nobody":
                return Signatures(())
            case _:  # another view, or another order
                return Signatures(signed_[::-1])

    def publish(self) -> None:
        """A result: true, of other survivors, replayed, or by the colluder."""
        ready = [attempt for attempt in self.attempts if Survivors in attempt.told]
        if not ready:
            return
        attempt = self.tape.pick(ready[::-1])
        how = self.tape.pick((None, None, None, "survivors", "forged", "base", "vector"))
        note(f"attempt {attempt.index}: Result {how}")
        try:
            tau3 = attempt.tau3
        except Unmakeable:
            return
        commits = attempt.told[Survivors].commits
        result = Result(
            task=TASK,
            round=attempt.descriptor.round,
            base=flip(BASE) if how == "base" else attempt.descriptor.base,
            cohort=attempt.descriptor.cohort,
            survivors=tuple(c.sender for c in (commits[1:] if how == "survivors" else commits)),
            survivors_transcript=tau3,
            vector_digest=b"v" * 32 if how == "vector" else bytes(32),
            signature=bytes(64),
        )
        tau4 = transcript.result_transcript(tau3, result.vector_digest)
        by = COLLUDER if how == "forged" else "coordinator"
        state = attempt.states.get(Result)
        taken = self.client.finish(attempt, signed(result, by, tau4))
        require(not (taken and how in ("forged", "base")), "A result that nobody signed.")
        require(not (taken and state and how == "survivors"), "Other survivors were taken.")


ROSTERS = (
    "without me",
    "few",
    "earlier",
    "earlier advert",
    "reflected",
    "forged",
    "low order",
    "outsider",
)
DEALINGS = (
    "without me",
    "few",
    "earlier",
    "garbage",
    "no box",
    "mine altered",
    "forged",
    "short list",
    "outsider",
)
SURVIVING = (
    "without me",
    "few",
    "earlier",
    "my earlier",
    "mine altered",
    "forged",
    "outsider",
)
SIGNING = (
    "few",
    "copies",
    "one doubled",
    "earlier",
    "earlier one",
    "forged",
    "no survivor",
    "nobody",
    "other view",
    "one other view",
    "another order",
)
MOVES: tuple[Callable[[Coordinator], None], ...] = (
    *[Coordinator.step] * 12,
    *[Coordinator.step_older] * 4,
    *[Coordinator.again] * 2,
    *[Coordinator.open] * 2,
    Coordinator.publish,
    Coordinator.restart,
)
MANIFEST_DIGEST = MANIFEST.digest()
TAPES = st.binary(min_size=TAPE_BYTES, max_size=TAPE_BYTES)


def run(tape: bytes) -> Audit:
    """Play one tape against the client."""
    coordinator = Coordinator(Tape(tape))
    coordinator.play()
    return coordinator.audit


def test_honest_client_gives_a_malicious_coordinator_nothing() -> None:
    reveals = []

    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(tape=TAPES)
    def drive(tape: bytes) -> None:
        reveals.append(run(tape).reveals)

    with memoised():
        drive()
    assert sum(map(bool, reveals)) > len(reveals) // 4, "too few attempts reach a reveal"


def test_honest_coordinator_gets_the_reveal() -> None:
    @settings(max_examples=1, database=None, deadline=None)
    @given(tape=st.just(bytes(TAPE_BYTES)))
    def drive(tape: bytes) -> None:
        assert run(tape).reveals >= 2

    with memoised():
        drive()


def no_check(*arguments: Any, **options: Any) -> None:
    """A check that is gone."""


def lenient(code: str) -> Callable[[pytest.MonkeyPatch], None]:
    """A client that does not mind one reason to refuse."""
    refuse = client._refuse

    def forgiving(found: str, observed: str) -> None:
        if found != code:
            refuse(found, observed)

    return lambda patch: patch.setattr(client, "_refuse", forgiving)


def reveals(change: Callable[[HeldShares, ShareKind], RevealedShare]) -> Any:
    """A client that reveals something else."""
    return lambda patch: patch.setattr(HeldShares, "reveal", change)


def other_kind(held_: HeldShares, kind: ShareKind) -> RevealedShare:
    """The share of the other secret."""
    if kind is ShareKind.MASK_KEY:
        return RevealedShare(
            held_.owner, ShareKind.SELF_SEED, held_.self_seed, held_.self_seed_salt
        )
    return RevealedShare(held_.owner, ShareKind.MASK_KEY, held_.mask_key, held_.mask_key_salt)


def mislabelled(held_: HeldShares, kind: ShareKind) -> RevealedShare:
    """The share of the other secret, under the name of the one."""
    return replace(other_kind(held_, kind), kind=kind)


def forgets(kind: type) -> Callable[[pytest.MonkeyPatch], None]:
    """A ledger that loses one kind of entry."""
    record = MemoryLedger.record

    def lossy(self: MemoryLedger, entry: Any) -> Any:
        return Recorded(entry) if isinstance(entry, kind) else record(self, entry)

    return lambda patch: patch.setattr(MemoryLedger, "record", lossy)


def stale_keys(patch: pytest.MonkeyPatch) -> None:
    """Every attempt draws the same keys."""
    step = client.advertise_keys
    patch.setattr(
        client,
        "advertise_keys",
        lambda state, recorded, entropy: step(state, recorded, entropy=Keyed("stale")),
    )


MUTANTS: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "differencing-when-signing": lambda p: p.setattr(client, "check_differencing", no_check),
    "differencing-when-revealing": lambda p: p.setattr(ledger, "check_differencing", no_check),
    "reveals-forgotten": forgets(Revealed),
    "attempts-forgotten": forgets(Joined),
    "states-used-twice": lambda patch: patch.setattr(client._Once, "spend", no_check),
    "survivors-threshold": lenient("survivors-threshold"),
    "survivors-own": lenient("survivors-own"),
    "consistency-threshold": lenient("consistency-threshold"),
    "consistency-duplicate": lenient("consistency-duplicate"),
    "consistency-signer": lenient("consistency-signer"),
    "consistency-signature": lenient("consistency-signature"),
    "result-signature": lenient("result-signature"),
    "result-survivors": lenient("result-survivors"),
    "result-base": lenient("result-base"),
    "share-of-the-other-kind": reveals(other_kind),
    "share-mislabelled": reveals(mislabelled),
    "keys-not-fresh": stale_keys,
}


@pytest.mark.parametrize("weaken", MUTANTS.values(), ids=MUTANTS.keys())
def test_audit_has_power(weaken: Callable[[pytest.MonkeyPatch], None]) -> None:
    """The machine finds the hole that one missing check makes."""
    played = []

    @settings(
        max_examples=20_000,
        deadline=None,
        database=None,
        derandomize=True,
        report_multiple_bugs=False,
        phases=[HypothesisPhase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(tape=TAPES)
    def drive(tape: bytes) -> None:
        played.append(tape)
        run(tape)

    with memoised(), pytest.MonkeyPatch.context() as patch:
        weaken(patch)
        with pytest.raises(Violation):
            drive()
