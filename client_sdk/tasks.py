"""Agreeing on a task: the first silo proposes its tensors and weights, every other one compares.

An opening counts once its proposer's signature verifies under the manifest, and the ledger keeps
which one was taken: a coordinator cannot start a task over under the silo's feet.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

from client_sdk.channel import POLL_SECONDS, Channel, CoordinatorRefused
from client_sdk.membership import Membership
from client_sdk.progress import log
from client_sdk.transfer import download, parsed, upload
from secagg.crypto.digest import vector_digest
from secagg.encoding.codec import Codec
from secagg.encoding.schema import Schema
from secagg.errors import FaultyServer, InputError, MalformedMessage
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
    codec: Codec
    hash: bytes
    calls: int = 0
    released: list[bytes] = field(default_factory=list)


class Tasks:
    """The tasks of a session that this silo knows."""

    def __init__(self, membership: Membership, channel: Channel, ledger: Ledger) -> None:
        self._membership = membership
        self._channel = channel
        self._ledger = ledger
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
            session = self._membership.member.session
            Codec(session.task(own.task), own.schema, len(session.silos))
            self._take(own.task, self._agree(own, weights))
        known = self._known[own.task]
        _compare(known.signed.opening, own, judge_step=judge_step)
        return known

    def meet(self, name: str) -> Task:
        """Return a task that others opened: some result is of it."""
        if name not in self._known:
            reply = self._ask(name)
            if reply.WhichOneof("answer") != "opening":
                raise FaultyServer("task-opening", "A task with results has no opening.")
            self._take(name, parsed(lambda: opening_from_wire(reply.opening)))
        return self._known[name]

    def initial_weights(self, name: str) -> bytearray:
        """Download the agreed initial weights of a task."""
        signed = self._known[name].signed
        digest = signed.opening.weights_digest
        member, blob = self._membership.member, api.Blob(weights=name)
        return download(self._channel, member, blob, signed.weights_bytes, digest)

    def _ask(self, name: str) -> api.OpenTaskReply:
        request = api.OpenTaskRequest(session_id=self._membership.member.session_id, task=name)
        return self._channel.call("OpenTask", request, api.OpenTaskReply, seconds=POLL_SECONDS)

    def _agree(self, own: transcript.TaskOpening, weights: bytes | None) -> SignedOpening:
        left = PROPOSALS
        while True:
            reply = self._ask(own.task)
            match reply.WhichOneof("answer"):
                case "opening":
                    return parsed(lambda: opening_from_wire(reply.opening))  # noqa: B023
                case "propose":
                    left -= 1
                    if left < 0:
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
        """Propose an opening: its weights, which the coordinator can read, as a session begins.

        Never twice: what a silo holds after it took an opening is trained on its own data.
        """
        membership, member = self._membership, self._membership.member
        if own.task in self._ledger.openings(member.session_id):
            raise FaultyServer(
                "task-propose-again",
                f"The coordinator asked for initial weights of task {own.task} a second time.",
                "Nothing was sent: the model may be trained by now.",
            )
        upload(self._channel, member, api.Blob(weights=own.task), memoryview(weights))
        signed = SignedOpening.sign(
            own, len(weights), member.name, member.identity, membership.opening_transcript
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
        if opening.task != name:
            raise FaultyServer("task-opening", "The coordinator answered with another task.")
        task_hash = opening.digest(membership.session_hash)
        if self._ledger.openings(member.session_id).get(name) != task_hash:
            self._check_proposer(name, signed)
        codec = Codec(member.session.task(name), opening.schema, len(member.session.silos))
        self._ledger.record(Opened(member.session_id, name, task_hash))
        self._known[name] = Task(signed, codec, task_hash)

    def _check_proposer(self, name: str, signed: SignedOpening) -> None:
        """Check an opening that was not taken before: its proposer may be revoked since."""
        membership, member = self._membership, self._membership.member
        key = next((k for n, k in member.manifest.silos.items() if n == signed.proposer), None)
        if key is None or signed.proposer not in member.session.silos:
            raise FaultyServer("task-proposer", "A task was opened by nobody of the session.")
        try:
            signed.verify(key, membership.opening_transcript)
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
    if ours != theirs:
        first = min(ours ^ theirs, key=lambda spec: spec.name)
        raise InputError(
            "task-schema",
            f"Tensor {first.name!r} of shape {first.shape} is not alike here and in task "
            f"{agreed.task} as it was opened.",
            "All silos train the same model; compare versions, or share fewer tensors.",
        )
    if judge_step and own.step != agreed.step:
        raise InputError(
            "task-step",
            f"This silo's global step is {own.step!r}; task {agreed.task} was opened with "
            f"{agreed.step!r}.",
            "Give all silos the same optimiser.",
        )
