"""Over a gap in the past: peers' checkpoints, where nobody has the key of past sums any more.

The weights are in no hash, so a silo that took one peer's word for them could be led to a model of
that peer's choice, and its next update, made on it, tells more than it may (the model-inconsistency
attack: Pasquini et al., Eluding Secure Aggregation in Federated Learning via Model Inconsistency,
CCS 2022, arXiv 2111.07380). So nothing is taken of fewer than n_c + 1 silos: each signed its
checkpoint, all are after the same results of this silo's own history, and they agree
(``tensors.GlobalWeights.agree``). One of them at least is honest and, by induction, has the weights
that the session's sums led to; what is taken is within the tolerance of those.

Source of n_c: the greater one of the session's and this silo's policy's.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final, Generic, Protocol, TypeVar

from client_sdk.channel import POLL_SECONDS, Channel, CoordinatorRefused
from client_sdk.checkpoint import Checkpoints, Found
from client_sdk.keys import Keys
from client_sdk.membership import Membership
from client_sdk.past import Past
from client_sdk.progress import log
from client_sdk.transfer import download, parsed, upload
from secagg.crypto.digest import vector_digest
from secagg.crypto.labels import BRIDGE
from secagg.errors import (
    ConfigError,
    FaultyClient,
    FaultyClientOrServer,
    FaultyServer,
    MalformedMessage,
    NotFound,
    SecaggError,
    TooLate,
)
from secagg.wire._pb import service_pb2 as api
from secagg.wire.custody import SignedCheckpoint, checkpoint_from_wire, checkpoint_to_wire

M = TypeVar("M")
ASKS: Final = 24
"""Long polls that this silo waits for checkpoints, some ten minutes in all."""
MAX_ABOUT_BYTES: Final = 16 * 2**20
MAX_NESTING: Final = 64
_LENGTH_BYTES: Final = 8
_FIELDS: Final = ("results", "round", "history", "optimizer")


class Judge(Protocol[M]):
    """What a silo knows of the model that checkpoints are to be of."""

    @property
    def max_bytes(self) -> int:
        """More than an honest peer's checkpoint has."""
        ...

    def read(self, data: bytes, optimizer: Any) -> M:
        """Parse a checkpoint, applying nothing.

        Raises:
            InputError: it is not of this model and optimiser.
        """
        ...

    def agree(self, a: M, b: M) -> bool:
        """Whether two are the same, but for how machines round."""
        ...


@dataclass(frozen=True, slots=True)
class Bridged(Generic[M]):
    """Where a silo goes on from.

    Args:
        results: how many results of the task are behind it.
        model: as the judge read it.
    """

    results: int
    model: M


class Bridge:
    """This silo's checkpoints for others, and others' for this one.

    Args:
        keys: seals and opens them.
        membership: who this silo is.
        channel: to the coordinator.
        checkpoints: this silo's own.
        past: what the session has released.
    """

    def __init__(
        self,
        keys: Keys,
        membership: Membership,
        channel: Channel,
        checkpoints: Checkpoints,
        past: Past,
    ) -> None:
        self._keys = keys
        self._membership = membership
        self._channel = channel
        self._checkpoints = checkpoints
        self._past = past

    def offer(self, task: str, results: int, offered: set[tuple[str, int]]) -> bool:
        """Upload this silo's checkpoint of a task, if it goes beyond these results.

        The coordinator asks for it where it has none of this silo's (any more): an offer that was
        refused, or lost with the coordinator's process, is made again.

        Args:
            task: which.
            results: how many the silo that asks can do without.
            offered: what the coordinator has accepted before; grows.

        Returns:
            Whether one was accepted that was not before.
        """
        found = self._checkpoints.find_global(task)
        if found is None or found.about["results"] <= results:
            return False
        has = int(found.about["results"])
        try:
            self._upload(task, has, _packed(found))
        except (CoordinatorRefused, TooLate) as refusal:
            log.info("the checkpoint of task %s is not needed just now: %s", task, refusal)
            return False
        log.info("gave a checkpoint of task %s after %d results to who asked", task, has)
        new = (task, has) not in offered
        offered.add((task, has))
        return new

    def _upload(self, task: str, results: int, data: bytes) -> None:
        member = self._membership.member
        blob = memoryview(self._keys.seal_blob(BRIDGE, (task,), data))
        signed = SignedCheckpoint.sign(
            task,
            results,
            member.name,
            len(blob),
            vector_digest(blob, member.session.chunk_bytes),
            member.identity,
            self._membership.opening_transcript,
        )
        upload(self._channel, member, _blob(signed), blob)
        request = api.OfferCheckpointRequest(
            session_id=member.session_id, checkpoint=checkpoint_to_wire(signed)
        )
        self._channel.call("OfferCheckpoint", request, api.Ack)

    def fetch(self, task: str, results: int, judge: Judge[M]) -> Bridged[M]:
        """Return what n_c + 1 peers agree on, of a task after more results than these.

        Waits for some ten minutes. Peers whose checkpoints are no use are left out; where those
        that came do not agree, one more is waited for.

        Raises:
            ConfigError: ``key-gone``: too few silos offered one.
            FaultyClient: too few are left without this one, who signed what cannot be.
            FaultyClientOrServer: ``checkpoint-past``, as before, but perhaps it is the coordinator
                that shows two pasts; ``checkpoint-disagrees``: the silos that are named are after
                the same results and no n_c + 1 of them agree.
            FaultyServer: what the coordinator sent are no such checkpoints.
        """
        return _Crossing(self, task, results, judge).cross()

    # What a crossing needs.

    def prepare(self, task: str) -> int:
        """Be able to open what comes; return how many results the task has."""
        self._past.sync()
        self._keys.newest({})
        return len(self._past.of(task))

    @property
    def enough(self) -> int:
        """n_c + 1."""
        member = self._membership.member
        return max(member.session.colluders, member.policy.colluders) + 1

    def others(self) -> set[str]:
        """The session's silos that are in the manifest, without this one."""
        member = self._membership.member
        return {str(name) for name in member.session.silos if name in member.manifest.silos} - {
            str(member.name)
        }

    def ask(self, wish: api.CheckpointWish, refused: Iterable[str]) -> list[SignedCheckpoint]:
        """Ask once, for 25 s; return what is signed by whom it names and goes beyond the wish.

        Raises:
            FaultyServer: something does not, or one silo has two.
        """
        request = api.AskCheckpointRequest(
            session_id=self._membership.member.session_id, wish=wish, refused=sorted(refused)
        )
        reply = self._channel.call(
            "AskCheckpoint", request, api.AskCheckpointReply, seconds=POLL_SECONDS
        )
        if not reply.checkpoints:
            return []
        self._membership.refresh()  # who offered one may be in a newer manifest
        self._past.sync()  # and it may be after results that were released meanwhile
        found = [parsed(functools.partial(checkpoint_from_wire, m)) for m in reply.checkpoints]
        if len({signed.sender for signed in found}) < len(found):  # CHECK: checkpoint-one-a-silo
            raise FaultyServer("checkpoint-origin", "Two checkpoints are of one silo.")
        for signed in found:
            self._check_origin(signed, wish)  # CHECK: checkpoint-origin
        return [signed for signed in found if signed.sender in self.others()]

    def _check_origin(self, signed: SignedCheckpoint, wish: api.CheckpointWish) -> None:
        member = self._membership.member
        right = signed.task == wish.task and signed.results > wish.results
        # CHECK: checkpoint-asked-for
        if not right or signed.sender not in set(member.session.silos) - {member.name}:
            raise FaultyServer("checkpoint-origin", "A checkpoint is not what was asked for.")
        key = next((k for n, k in member.manifest.silos.items() if n == signed.sender), None)
        if key is None:
            return  # it left the consortium just now, and does not count any more
        try:
            signed.verify(key, self._membership.opening_transcript)  # CHECK: checkpoint-signature
        except MalformedMessage:
            raise FaultyServer(
                "checkpoint-signature", f"A checkpoint is not signed by {signed.sender}."
            ) from None

    def take(self, signed: SignedCheckpoint, judge: Judge[M]) -> M:
        """Fetch a peer's checkpoint and read it, applying nothing.

        Raises:
            FaultyClient, FaultyClientOrServer: it is no use.
            NotFound: ``checkpoint-unknown``: it is not there any more.
            FaultyServer: the bytes are not those that its sender signed.
        """
        if signed.size > judge.max_bytes:  # CHECK: checkpoint-size
            raise _useless(signed, "is larger than the model can be")
        member = self._membership.member
        data = download(self._channel, member, _blob(signed), signed.size, signed.digest)
        try:
            opened = self._keys.open_blob(BRIDGE, (signed.task,), data)
        except ConfigError as error:
            raise _useless(signed, f"does not open ({error.code})") from None
        return self._read(signed, opened, judge)

    def _read(self, signed: SignedCheckpoint, data: bytearray, judge: Judge[M]) -> M:
        try:
            about, tensors = _unpacked(data)
        except (ValueError, RecursionError):
            raise _useless(signed, "is none") from None
        self._check_place(signed, about)  # CHECK: checkpoint-place
        try:
            return judge.read(tensors, about["optimizer"])
        except SecaggError as error:
            raise _useless(signed, f"is not of this model: {error.observed}") from None

    def _check_place(self, signed: SignedCheckpoint, about: dict[str, Any]) -> None:
        """Return if it is after exactly these results of this silo's own history."""
        known = self._past.of(signed.task)
        if signed.results > len(known):  # CHECK: checkpoint-results
            raise _useless(signed, "is after results that there are not")
        number = known[signed.results - 1].round
        place = (signed.results, number, self._past.histories[number].hex())
        said = (about["results"], about["round"], about["history"])
        # CHECK: checkpoint-past
        if said != place or [type(item) for item in said] != [int, int, str]:
            raise FaultyClientOrServer(
                signed.sender,
                "checkpoint-past",
                f"The checkpoint of {signed.sender} is not of the results that this silo knows.",
                "Nothing of it was applied. If others say the same of theirs, compare the silos' "
                "results: the coordinator may show two pasts.",
            )


class _Crossing(Generic[M]):
    """One silo's way over a gap: who was asked, what they gave, who is refused."""

    def __init__(self, bridge: Bridge, task: str, results: int, judge: Judge[M]) -> None:
        self._bridge = bridge
        self._task = task
        self._results = results
        self._judge = judge
        self._need = bridge.enough
        self._read: dict[SignedCheckpoint, M] = {}
        self._refusals: dict[str, SecaggError] = {}
        self._disagreeing: list[str] = []

    def cross(self) -> Bridged[M]:
        """Ask until enough peers agree."""
        if self._bridge.prepare(self._task) <= self._results:
            raise self._gone("and no result came after it that a checkpoint could be of")
        for _ in range(ASKS):
            if len(self._bridge.others() - self._refusals.keys()) < self._need:
                break
            wish = api.CheckpointWish(task=self._task, results=self._results, need=self._need)
            offers = self._bridge.ask(wish, self._refusals)
            if not offers:
                log.info("waiting for silos that have a checkpoint of task %s", self._task)
            self._read = {o: model for o, model in self._read.items() if o in offers}
            for after in sorted({offer.results for offer in offers}, reverse=True):
                same = [offer for offer in offers if offer.results == after]
                found = self._agreed(sorted(same, key=lambda offer: offer.sender))
                if found is not None:
                    return Bridged(after, found)
        raise self._refusal()

    def _agreed(self, offers: list[SignedCheckpoint]) -> M | None:
        """What enough of these senders agree on; as few as possible are fetched."""
        fetched: list[tuple[SignedCheckpoint, M]] = []
        for offer in offers:
            if len(fetched) < self._need and (model := self._fetched(offer)) is not None:
                fetched.append((offer, model))
        for _, model in fetched:
            alike = [o.sender for o, other in fetched if self._judge.agree(model, other)]
            if len(alike) >= self._bridge.enough:
                self._tell(offers[0].results, alike, {o.sender for o, _ in fetched} - {*alike})
                return model
        if len(fetched) >= self._need:
            self._disagreeing = [offer.sender for offer, _ in fetched]
            self._need = len(fetched) + 1
        return None

    def _fetched(self, offer: SignedCheckpoint) -> M | None:
        if offer.sender in self._refusals:
            return None
        if offer not in self._read:
            try:
                self._read[offer] = self._bridge.take(offer, self._judge)
            except NotFound as error:
                if error.code != "checkpoint-unknown":
                    raise
                return None  # the next ask says what is there instead
            except (FaultyClient, FaultyClientOrServer) as refusal:
                log.warning("%s", refusal)
                self._refusals[offer.sender] = refusal
                return None
        return self._read[offer]

    def _tell(self, results: int, alike: list[str], others: set[str]) -> None:
        log.warning(
            "task %s goes on from the checkpoint after %d results that %s agree on, since nobody "
            "has the key of those before it",
            self._task,
            results,
            ", ".join(alike),
        )
        if others:
            log.warning("%s gave another one", ", ".join(sorted(others)))

    def _refusal(self) -> SecaggError:
        """Why nothing was taken."""
        if self._disagreeing:
            names = ", ".join(self._disagreeing)
            return FaultyClientOrServer(
                names,
                "checkpoint-disagrees",
                f"The checkpoints of {names} are after the same results of task {self._task} and "
                "do not agree: one of these silos at least gave another than the sums led to.",
                "Nothing was applied. Find out which, and start more silos that have one.",
            )
        for refusal in self._refusals.values():
            return refusal
        return self._gone(f"and fewer than {self._bridge.enough} offered a checkpoint after them")

    def _gone(self, why: str) -> ConfigError:
        return ConfigError(
            "key-gone",
            f"Past sums of task {self._task} were sealed under a key that no silo has any more, "
            f"{why}.",
            f"Start {self._bridge.enough} silos that took part in them, with their state "
            "directories, or one that kept its keys (key_directory in policy.toml).",
        )


def _blob(signed: SignedCheckpoint) -> api.Blob:
    name = api.Blob.Checkpoint(task=signed.task, sender=signed.sender, digest=signed.digest)
    return api.Blob(checkpoint=name)


def _packed(found: Found) -> bytes:
    """u64le(length) ‖ where it stands, as JSON ‖ the safetensors file."""
    about = json.dumps({name: found.about[name] for name in _FIELDS}, sort_keys=True).encode()
    return b"".join((len(about).to_bytes(_LENGTH_BYTES, "little"), about, found.data))


def _unpacked(data: bytearray) -> tuple[dict[str, Any], bytes]:
    """Decode what ``_packed`` gave.

    Raises:
        ValueError: it is something else.
    """
    size = int.from_bytes(data[:_LENGTH_BYTES], "little")
    text = data[_LENGTH_BYTES : _LENGTH_BYTES + min(size, MAX_ABOUT_BYTES + 1)]
    if len(text) != size or size > MAX_ABOUT_BYTES:  # CHECK: checkpoint-about-size
        raise ValueError("a wrong size")
    about = json.loads(text.decode())
    if type(about) is not dict or about.keys() != set(_FIELDS):  # CHECK: checkpoint-about-fields
        raise ValueError("other fields")
    _check_nesting(about)  # CHECK: checkpoint-nesting
    return about, bytes(memoryview(data)[_LENGTH_BYTES + size :])


def _check_nesting(value: Any) -> None:
    """Refuse what is nested so deep that comparing it would end this process's stack."""
    level = [value]
    for _ in range(MAX_NESTING):
        lists = [item.values() if isinstance(item, dict) else item for item in level]
        level = [inner for items in lists for inner in items if isinstance(inner, dict | list)]
        if not level:
            return
    raise ValueError("nested too deep")


def _useless(signed: SignedCheckpoint, what: str) -> FaultyClient:
    return FaultyClient(
        signed.sender,
        "checkpoint-content",
        f"The checkpoint that {signed.sender} signed {what}.",
        "Nothing of it was applied.",
    )
