"""Agreeing on a task: the first silo proposes its tensors and weights, every other one compares.

An opening counts once its proposer's signature verifies under the manifest, and the ledger keeps
which one was taken: a coordinator cannot start a task over under the silo's feet.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from typing import Final

from client_sdk.channel import POLL_SECONDS, Channel, CoordinatorRefused
from client_sdk.keys import Keys
from client_sdk.membership import Membership
from client_sdk.progress import log
from client_sdk.transfer import download, parsed, upload
from secagg.ckks.codec import SealedCodec, codec_of
from secagg.crypto.digest import vector_digest
from secagg.crypto.labels import WEIGHTS
from secagg.disk import Disk
from secagg.encoding.codec import Codec
from secagg.encoding.schema import Schema
from secagg.errors import (
    FaultyClientOrServer,
    FaultyServer,
    InputError,
    MalformedMessage,
    StorageBusy,
    StorageFailed,
)
from secagg.masking import transcript
from secagg.masking.ledger import Ledger, Opened
from secagg.wire._pb import service_pb2 as api
from secagg.wire.session import SignedOpening, opening_from_wire, opening_to_wire

PROPOSALS: Final = 5
"""How often a task is proposed to a coordinator that keeps losing it."""
_FORGOTTEN: Final = frozenset({"task-proposer", "weights-missing", "chunk-gap", "task-open"})
"""Refusals of a coordinator that was killed since it asked: proposals half-done are not stored, and
another silo may have been quicker after it."""


@dataclass
class Task:
    """A task that this silo has taken.

    Args:
        signed: its opening.
        codec: encodes and decodes its vectors.
        hash: the task's hash within the session.
        calls: how many of its results this process has been given.
        released: τ4 of its results so far.
    """

    signed: SignedOpening
    codec: Codec | SealedCodec
    hash: bytes
    calls: int = 0
    released: list[bytes] = field(default_factory=list)


class Tasks:
    """The tasks of a session that this silo knows.

    Args:
        membership: who this silo is.
        channel: to the coordinator.
        ledger: the silo's.
        keys: for initial weights, where the session seals.
        disk: where they are kept then, opened, since their key may be gone one day.
    """

    def __init__(
        self,
        membership: Membership,
        channel: Channel,
        ledger: Ledger,
        keys: Keys | None,
        disk: Disk,
    ) -> None:
        self._membership = membership
        self._channel = channel
        self._ledger = ledger
        self._keys = keys
        self._disk = disk
        self._known: dict[str, Task] = {}

    def __getitem__(self, name: str) -> Task:
        """Return a task that was opened or met before."""
        return self._known[name]

    def open(self, own: transcript.TaskOpening, weights: bytes | None, *, judge_step: bool) -> Task:
        """Agree on a task: propose this silo's opening if asked, else compare with it.

        Args:
            own: this silo's tensors, step and weights.
            weights: its initial weights, as a file.
            judge_step: whether this silo has a step to compare.

        Raises:
            InputError: this silo's tensors or step are not the session's.
            FaultyServer: the opening is not one of this session's silos'.
        """
        if own.task not in self._known:
            self._take(own.task, self._agree(own, weights))
        known = self._known[own.task]
        _compare(known.signed.opening, own, judge_step=judge_step)
        return known

    def meet(self, name: str) -> Task:
        """Return a task that others opened: some result is of it."""
        if name not in self._known:
            reply = self._ask(name)
            if reply.WhichOneof("answer") != "opening":  # CHECK: opening-answered
                raise FaultyServer("task-opening", "A task with results has no opening.")
            self._take(name, parsed(lambda: opening_from_wire(reply.opening)))
        return self._known[name]

    def initial_weights(self, name: str) -> bytearray:
        """Download the agreed initial weights of a task.

        Raises:
            FaultyServer: they are not those that were signed.
            FaultyClientOrServer: they open to others than the proposer says.
            ConfigError: ``key-gone``: nobody that answered has the key that they were sealed under.
        """
        if (kept := self._kept_weights(name)) is not None:
            return kept
        signed = self._known[name].signed
        member, blob = self._membership.member, api.Blob(weights=name)
        data = download(self._channel, member, blob, signed.weights_bytes, signed.uploaded_digest)
        if self._keys is None:
            return data
        opened = self._keys.open_blob(WEIGHTS, (name,), data)
        if not self._are_agreed(name, opened):  # CHECK: weights-digest
            raise FaultyClientOrServer(
                signed.proposer,
                "weights-digest",
                f"The initial weights of task {name} are not those that {signed.proposer} signed.",
                "Nothing was applied.",
            )
        self._keep_weights(name, opened)
        return opened

    def _kept_weights(self, name: str) -> bytearray | None:
        """The agreed initial weights as this silo opened or proposed them before."""
        if self._keys is None:
            return None
        with contextlib.suppress(StorageBusy, StorageFailed):
            data = self._disk.read(self._weights_name(name))
            if data is not None and self._are_agreed(name, data):
                return bytearray(data)
        return None

    def _keep_weights(self, name: str, weights: bytes | bytearray) -> None:
        with contextlib.suppress(StorageBusy, StorageFailed):
            self._disk.replace(self._weights_name(name), memoryview(weights))

    def _are_agreed(self, name: str, weights: bytes | bytearray) -> bool:
        chunk_bytes = self._membership.member.session.chunk_bytes
        digest = vector_digest(memoryview(weights), chunk_bytes)
        return digest == self._known[name].signed.opening.weights_digest

    def _weights_name(self, name: str) -> str:
        return f"weights/{self._membership.member.session_id.hex()}/{name}.safetensors"

    def _ask(self, name: str) -> api.OpenTaskReply:
        request = api.OpenTaskRequest(session_id=self._membership.member.session_id, task=name)
        return self._channel.call("OpenTask", request, api.OpenTaskReply, seconds=POLL_SECONDS)

    def _agree(self, own: transcript.TaskOpening, weights: bytes | None) -> SignedOpening:
        left = PROPOSALS
        if self._keys is not None and weights:
            self._keys.newest({})  # the proposer waits until its weights are not its alone to open
        while True:
            reply = self._ask(own.task)
            match reply.WhichOneof("answer"):
                case "opening":
                    return parsed(lambda: opening_from_wire(reply.opening))  # noqa: B023
                case "propose":
                    left -= 1
                    if left < 0:  # CHECK: proposals-bounded
                        raise FaultyServer(
                            "task-propose-again",
                            f"The coordinator asks for task {own.task} again and again.",
                            "Nothing was agreed; ask its operator.",
                        )
                    try:
                        self._propose(own, weights or b"")
                    except CoordinatorRefused as refusal:
                        if refusal.code not in _FORGOTTEN or left <= 0:
                            raise
                        log.info("the coordinator lost the proposal of task %s", own.task)

    def _propose(self, own: transcript.TaskOpening, weights: bytes) -> None:
        """Propose an opening with its weights, which the coordinator can read unless sealed.

        Never twice: what a silo holds after it took an opening is trained on its own data.
        """
        membership, member = self._membership, self._membership.member
        if own.task in self._ledger.openings(member.session_id):  # CHECK: proposed-once
            raise FaultyServer(
                "task-propose-again",
                f"The coordinator asked for initial weights of task {own.task} a second time.",
                "Nothing was sent: the model may be trained by now.",
            )
        sealed_digest, blob = b"", memoryview(weights)
        if self._keys is not None and weights:
            self._keys.await_company()
            self._keep_weights(own.task, weights)
            blob = memoryview(self._keys.seal_blob(WEIGHTS, (own.task,), weights))
            sealed_digest = vector_digest(blob, member.session.chunk_bytes)
        upload(self._channel, member, api.Blob(weights=own.task), blob)
        signed = SignedOpening.sign(
            own,
            len(blob),
            member.name,
            member.identity,
            membership.opening_transcript,
            sealed_digest,
        )
        log.info("proposing task %s", own.task)
        proposal = api.ProposeTaskRequest(
            session_id=member.session_id, opening=opening_to_wire(signed)
        )
        self._channel.call("ProposeTask", proposal, api.Ack)

    def _take(self, name: str, signed: SignedOpening) -> None:
        """Check a proposer's signature under the manifest, and take the opening as the task's."""
        membership, member = self._membership, self._membership.member
        opening = signed.opening
        if opening.task != name:  # CHECK: opening-task
            raise FaultyServer("task-opening", "The coordinator answered with another task.")
        task_hash = opening.digest(membership.session_hash)
        if self._ledger.openings(member.session_id).get(name) != task_hash:
            self._check_proposer(name, signed)  # CHECK: opening-proposer
        # CHECK: opening-sealed
        if bool(signed.sealed_digest) != (self._keys is not None and signed.weights_bytes > 0):
            raise FaultyServer("task-sealed", f"The opening of task {name} is not its session's.")
        codec = codec_of(member.session, name, opening.schema)
        self._ledger.record(Opened(member.session_id, name, task_hash))
        self._known[name] = Task(signed, codec, task_hash)

    def _check_proposer(self, name: str, signed: SignedOpening) -> None:
        """Check an opening that was not taken before: its proposer may be revoked since."""
        membership, member = self._membership, self._membership.member
        key = next((k for n, k in member.manifest.silos.items() if n == signed.proposer), None)
        if key is None or signed.proposer not in member.session.silos:  # CHECK: proposer-member
            raise FaultyServer("task-proposer", "A task was opened by nobody of the session.")
        try:
            signed.verify(key, membership.opening_transcript)  # CHECK: opening-signature
        except MalformedMessage:
            raise FaultyServer(
                "task-signature", f"The opening of task {name} is not its proposer's."
            ) from None


def own_opening(
    name: str, schema: Schema, step: str, weights: bytes | None, chunk_bytes: int
) -> transcript.TaskOpening:
    """What this silo would propose for a task."""
    digest = transcript.NO_WEIGHTS if weights is None else vector_digest(weights, chunk_bytes)
    return transcript.TaskOpening(name, schema, step, digest)


def _compare(
    agreed: transcript.TaskOpening, own: transcript.TaskOpening, *, judge_step: bool
) -> None:
    ours, theirs = set(own.schema.tensors), set(agreed.schema.tensors)
    if ours != theirs:  # CHECK: opening-schema
        first = min(ours ^ theirs, key=lambda spec: spec.name)
        raise InputError(
            "task-schema",
            f"Tensor {first.name!r} of shape {first.shape} is not alike here and in task "
            f"{agreed.task} as it was opened.",
            "All silos train the same model; compare versions, or share fewer tensors.",
        )
    if judge_step and own.step != agreed.step:  # CHECK: opening-step
        raise InputError(
            "task-step",
            f"This silo's global step is {own.step!r}; task {agreed.task} was opened with "
            f"{agreed.step!r}.",
            "Give all silos the same optimiser.",
        )
