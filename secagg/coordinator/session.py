"""One session as a state machine: who is ready, which attempt runs, what was summed.

A fold over what silos say and over the time that the driver passes in: no sockets, no clocks, no
threads in here. A silo says Ready when it has an update; the session opens an attempt when all its
silos are ready, or when ``train_deadline`` has passed since the first and the floor is reached. The
cohort is everybody ready on the session's one base; a silo on another base is told ``StaleModel``
at once, since the signed sums say which base is right.

    ready ─▶ attempt: describe ─▶ ServerRound phase by phase ─▶ result ─▶ next round
                         ▲                     │
                         └── silos ready again ◀── RoundAborted
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import IntEnum, StrEnum
from pathlib import Path
from typing import Final, TypeAlias, cast

from secagg.config import Phase, SessionConfig, SiloId
from secagg.coordinator.spool import Upload
from secagg.crypto.digest import vector_digest
from secagg.crypto.secret import Entropy
from secagg.crypto.sign import IdentityKey
from secagg.encoding.codec import Codec
from secagg.errors import (
    Conflict,
    FaultyClient,
    MalformedMessage,
    NotFound,
    QuotaExceeded,
    RoleRefused,
    RoundAborted,
    SessionEnded,
    StaleModel,
    TooLate,
)
from secagg.masking import transcript
from secagg.masking.manifest import Manifest
from secagg.masking.messages import (
    Dealt,
    Descriptor,
    MaskedInput,
    Result,
    Roster,
    Signatures,
    Survivors,
)
from secagg.masking.server import Broadcast, ClientMessage, Opening, ServerRound, describe
from secagg.ring.vectors import Ring, Vector
from secagg.wire.session import SignedOpening

PROPOSAL_SECONDS: Final = 120.0
"""How long a silo that was asked to propose a task may take before the next one is asked."""


class State(StrEnum):
    """Where a session stands."""

    ACTIVE = "active"
    DONE = "done"
    ABORTED = "aborted"


class Step(IntEnum):
    """Broadcasts of an attempt that a silo has seen, as on the wire."""

    NOTHING = 0
    DESCRIPTOR = 1
    ROSTER = 2
    DEALT = 3
    SURVIVORS = 4
    SIGNATURES = 5
    LEFT = 6


_STEPS: Final = frozenset(Step)


@dataclass(frozen=True, slots=True)
class Ended:
    """The session is over."""

    why: str


Event: TypeAlias = (
    Descriptor | Roster | Dealt | Survivors | Signatures | Result | RoundAborted | Ended
)


@dataclass
class Task:
    """A task once its opening is agreed.

    Args:
        signed: the proposer's opening.
        hash: the task's hash within the session.
        length: words of a vector.
        weights: file of the initial weights, if it has any.
    """

    signed: SignedOpening
    hash: bytes
    length: int
    weights: Path | None


@dataclass
class Proposal:
    """A task that somebody was asked to propose."""

    proposer: SiloId
    deadline: float
    upload: Upload | None = None

    def discard(self) -> None:
        """Drop what was uploaded."""
        if self.upload is not None:
            self.upload.discard()


@dataclass
class Attempt:
    """One attempt: the core's round, and what the shell keeps beside it."""

    number: int
    server: ServerRound
    descriptor: Descriptor
    deadline: float
    broadcasts: list[Broadcast] = field(default_factory=list)
    members: list[tuple[SiloId, ...]] = field(default_factory=list)
    uploads: dict[SiloId, Upload] = field(default_factory=dict)
    left: set[SiloId] = field(default_factory=set)

    @property
    def complete(self) -> bool:
        """Whether there is nobody left to wait for in the current phase."""
        return set(self.server.expected) <= self.server.arrived | self.left

    def event(self, silo: SiloId, seen: int) -> Event | None:
        """What this silo gets to see after ``seen`` broadcasts."""
        if seen == Step.NOTHING:
            return self.descriptor if silo in self.descriptor.cohort else None
        if seen > len(self.broadcasts) or silo not in self.members[seen - 1]:
            return None
        broadcast = self.broadcasts[seen - 1]
        event = broadcast[silo] if isinstance(broadcast, Mapping) else broadcast
        return cast(Event, event)

    def discard(self) -> None:
        """Drop what was uploaded."""
        for upload in self.uploads.values():
            upload.discard()
        self.uploads.clear()


class Session:
    """One session.

    Args:
        config: as the admin created it.
        session_id: 32 fresh bytes.
        manifest: gives the newest verified manifest.
        identity: the coordinator's signing key.
        directory: for uploads, weights and sums.
        entropy: source of nonces.
        max_weights_bytes: greatest size of initial weights.
    """

    def __init__(
        self,
        config: SessionConfig,
        session_id: bytes,
        manifest: Callable[[], Manifest],
        identity: IdentityKey,
        directory: Path,
        *,
        entropy: Entropy,
        max_weights_bytes: int,
    ) -> None:
        self.config = config
        self.session_id = session_id
        self.session_hash = transcript.session_hash(config)
        self.state = State.ACTIVE
        self.results: list[Result] = []
        self.attempt: Attempt | None = None
        self.last_abort: tuple[int, int, RoundAborted] | None = None
        self.last_call: dict[SiloId, float] = {}
        self._manifest = manifest
        self._identity = identity
        self.directory = directory
        self._entropy = entropy
        self._max_weights = max_weights_bytes
        self._history = transcript.first_history(self.session_hash)
        self._opening_transcript = transcript.opening_transcript(self.session_hash, session_id)
        self._tasks: dict[str, Task] = {}
        self._proposals: dict[str, Proposal] = {}
        self._ready: dict[SiloId, str] = {}
        self._ready_since = math.inf
        self._attempts = 0
        self._aborts: dict[int, RoundAborted] = {}
        self._excluded: set[SiloId] = set()

    # What silos say.

    @property
    def round(self) -> int:
        """Number of the current round."""
        return len(self.results) + 1

    def check_member(self, silo: SiloId, now: float) -> None:
        """Return if a silo takes part in this session, and note that it called.

        Raises:
            RoleRefused: it is not one of the session's silos, or no longer in the manifest.
        """
        if silo not in self.config.silos or silo not in self._manifest().silos:
            raise RoleRefused("session-member", f"{silo} is no silo of session {self.config.name}.")
        self.last_call[silo] = now

    def open_task(self, silo: SiloId, task: str, now: float) -> SignedOpening | bool:
        """Return a task's opening, True if this silo is to propose it, False if another is.

        Raises:
            NotFound: the session has no such task.
            SessionEnded: the task is not open, and the session is over.
        """
        self._check_task(task)
        if task in self._tasks:
            return self._tasks[task].signed
        self._check_active()
        proposal = self._proposals.get(task)
        if proposal is None or (proposal.proposer != silo and now >= proposal.deadline):
            if proposal is not None:
                proposal.discard()
            self._proposals[task] = proposal = Proposal(silo, now + PROPOSAL_SECONDS)
        return proposal.proposer == silo

    def propose_task(self, silo: SiloId, signed: SignedOpening) -> None:
        """Accept a task's opening from the silo that was asked for it.

        Raises:
            FaultyClient: another silo was asked, the signature is wrong, or the weights are not
                all there or not those of the digest.
            Conflict: another opening stands.
            SessionEnded: the session is over.
        """
        name = signed.opening.task
        self._check_task(name)
        if name in self._tasks:
            if self._tasks[name].signed != signed:
                raise Conflict(silo, "task-open", f"Task {name} is open already.")
            return
        self._check_active()
        proposal = self._proposals.get(name)
        if proposal is None or proposal.proposer != silo or signed.proposer != silo:
            raise FaultyClient(silo, "task-proposer", f"{silo} was not asked to open task {name}.")
        try:
            signed.verify(self._manifest().silos[silo], self._opening_transcript)
        except MalformedMessage as error:
            raise FaultyClient(silo, "message-signature", error.observed) from None
        codec = Codec(self.config.task(name), signed.opening.schema, len(self.config.silos))
        weights = self._take_weights(silo, signed, proposal)
        self._tasks[name] = Task(
            signed, signed.opening.digest(self.session_hash), codec.length, weights
        )
        del self._proposals[name]

    def _take_weights(self, silo: SiloId, signed: SignedOpening, proposal: Proposal) -> Path | None:
        if signed.opening.weights_digest == transcript.NO_WEIGHTS:
            return None
        upload = proposal.upload
        if upload is None or upload.total != signed.weights_bytes:
            raise FaultyClient(silo, "weights-missing", "The initial weights are not complete.")
        with upload.frozen():
            if upload.missing is not None:
                raise FaultyClient(silo, "weights-missing", "The initial weights are not complete.")
            digest = vector_digest(upload.read().data, self.config.chunk_bytes)
            if digest != signed.opening.weights_digest:
                raise FaultyClient(
                    silo, "weights-digest", "The initial weights are not those signed."
                )
            return upload.keep()

    def weights_upload(self, silo: SiloId, task: str, total: int) -> Upload:
        """Return where the proposer's weights go.

        Raises:
            FaultyClient: another silo was asked for them.
            QuotaExceeded: they are larger than this coordinator takes.
            SessionEnded: the session is over.
        """
        self._check_active()
        self._check_task(task)
        proposal = self._proposals.get(task)
        if proposal is None or proposal.proposer != silo:
            raise FaultyClient(silo, "task-proposer", f"{silo} was not asked to open task {task}.")
        if not 0 < total <= self._max_weights:
            raise QuotaExceeded("weights-size", f"Initial weights of {total} bytes are too large.")
        called = self.last_call.get(silo, proposal.deadline - PROPOSAL_SECONDS)
        proposal.deadline = max(proposal.deadline, called + PROPOSAL_SECONDS)  # it is at work
        if proposal.upload is None or proposal.upload.total != total:
            proposal.discard()
            path = self.directory / "weights" / f"{task}.safetensors"
            proposal.upload = Upload(path, total, self.config.chunk_bytes)
        return proposal.upload

    def ready(self, silo: SiloId, task: str, base: bytes, now: float) -> None:
        """Note that a silo has an update for a task on a base.

        Raises:
            StaleModel: the base is not the session's: the silo has to catch up first.
            SessionEnded: the task has released all its results, or the session is over.
            NotFound: the task is not open.
        """
        self._check_active()
        if task not in self._tasks:
            raise NotFound("task-closed", f"Task {task} has not been opened.")
        if self._released(task) >= self.config.task(task).rounds:
            raise SessionEnded("task-done", f"Task {task} has released all its results.")
        if base != self.base(task):
            raise StaleModel(
                "base-stale",
                f"The update for {task} is not on the session's current base.",
                "Fetch the signed results that are missing, apply them and train again.",
            )
        if not self._ready:
            self._ready_since = now
        self._ready[silo] = task

    def leave(self, silo: SiloId) -> None:
        """Take back a silo's Ready; the attempt that runs does not wait for it any more."""
        self._ready.pop(silo, None)
        if self.attempt is not None:
            self.attempt.left.add(silo)

    def send(self, message: ClientMessage, round_number: int, attempt: int) -> bool:
        """Pass a message to the attempt that it names.

        Returns:
            True if it is new, False if it was accepted before.

        Raises:
            TooLate: the round has its result already, or the message's phase has closed.
            RoundAborted: the attempt has ended.
            FaultyClient: the message is wrong, or of no attempt that there was.
        """
        live = self._attempt(message.sender, round_number, attempt)
        if not isinstance(message, MaskedInput):
            return live.server.accept(message)
        upload = live.uploads.get(message.sender)
        if upload is None or live.server.phase is not Phase.MASKED_INPUT:
            return live.server.accept(message)
        with upload.frozen():  # what is summed is what was hashed
            if upload.missing is not None:
                raise FaultyClient(
                    message.sender, "chunk-gap", f"The chunk at {upload.missing} is missing."
                )
            vector = self._ring(live).unpack(upload.read().data, live.server.opening.length)
            new = live.server.accept(message, vector)
        live.uploads.pop(message.sender).discard()
        return new

    def vector_upload(self, silo: SiloId, round_number: int, attempt: int, total: int) -> Upload:
        """Return where a silo's masked vector goes.

        Raises:
            TooLate: the phase has closed, or the vector was committed already.
            FaultyClient: not this silo's turn, or not the size of the task's vectors.
        """
        live = self._attempt(silo, round_number, attempt)
        server = live.server
        if server.phase is not Phase.MASKED_INPUT:
            early = server.phase in (Phase.ADVERTISE_KEYS, Phase.SHARE_KEYS)
            if early:
                raise FaultyClient(silo, "phase-early", "Vectors are not being collected yet.")
            raise TooLate("phase-closed", "The vectors of this attempt are collected.")
        if silo not in server.expected:
            raise FaultyClient(silo, "sender-unexpected", f"{silo} shared no keys.")
        if silo in server.arrived:
            raise TooLate("vector-committed", "This silo's vector is committed already.")
        if total != server.opening.length * self._ring(live).word_bytes:
            raise FaultyClient(
                silo, "vector-length", f"A vector of {total} bytes is not the task's."
            )
        if silo not in live.uploads:
            path = self.directory / "spool" / f"{round_number}-{attempt}-{silo}"
            live.uploads[silo] = Upload(path, total, self.config.chunk_bytes)
        return live.uploads[silo]

    def abort(self) -> None:
        """End the session on its admin's word."""
        if self.state is State.ACTIVE:
            self.state = State.ABORTED
            self._drop_attempt()
            for proposal in self._proposals.values():
                proposal.discard()
            self._proposals.clear()

    # What silos ask.

    def next(self, silo: SiloId, round_number: int, attempt: int, seen: int) -> Event | None:
        """What comes after what a silo has seen; None if nothing has yet.

        Args:
            silo: who asks.
            round_number: the round that it stands at.
            attempt: the newest attempt of that round that it joined; 0 for none.
            seen: how many broadcasts of it; ``Step.LEFT`` if it takes no more part in it.

        Raises:
            MalformedMessage: ``seen`` is no ``Step``.
        """
        if seen not in _STEPS:
            raise MalformedMessage("step-unknown", f"There is no step {seen}.")
        if 0 < round_number < self.round:
            return self.results[round_number - 1]
        if self.state is not State.ACTIVE:
            return Ended(f"Session {self.config.name} is {self.state}.")
        if round_number == self.round and attempt in self._aborts and seen != Step.LEFT:
            return self._aborts[attempt]
        live = self.attempt
        if live is None or round_number != self.round:
            return None
        if live.number > attempt:
            return live.event(silo, Step.NOTHING)
        return live.event(silo, seen) if seen != Step.LEFT else None

    def sum_path(self, round_number: int) -> Path:
        """File of a round's sum.

        Raises:
            NotFound: the round has no result.
        """
        if not 0 < round_number < self.round:
            raise NotFound("round-unknown", f"Round {round_number} has no result.")
        return self.directory / "sums" / str(round_number)

    def weights_path(self, task: str) -> Path:
        """File of a task's initial weights.

        Raises:
            NotFound: it has none, or is not open.
        """
        weights = self._tasks[task].weights if task in self._tasks else None
        if weights is None:
            raise NotFound("weights-unknown", f"Task {task} has no initial weights.")
        return weights

    def base(self, task: str) -> bytes:
        """What the next round of an open task starts from."""
        return transcript.base_of(self._history, self._tasks[task].hash)

    def doing(self, silo: SiloId) -> str:
        """What a silo was last seen doing, in one word of the protocol's."""
        live = self.attempt
        if live is not None and silo in live.descriptor.cohort:
            if silo not in live.server.expected:
                return "dropped"
            phase = live.server.phase or Phase.UNMASKING
            return f"{phase} sent" if silo in live.server.arrived else str(phase)
        if silo in self._ready:
            return "ready"
        return "training" if silo in self.last_call else "away"

    # What time does.

    def tick(self, now: float) -> bool:
        """Close what is due and open what can be; return whether anything changed."""
        if self.state is not State.ACTIVE:
            return False
        live = self.attempt
        if live is None:
            return self._open_attempt(now)
        if not live.complete and now < live.deadline:
            return False
        self._close_phase(live, now)
        return True

    def due(self) -> float:
        """When ``tick`` has something to do at the latest, by the driver's clock."""
        if self.state is not State.ACTIVE:
            return math.inf
        if self.attempt is not None:
            return self.attempt.deadline
        floor = len(self._largest_group()[1]) >= self.config.min_cohort
        return self._ready_since + self.config.train_deadline if floor else math.inf

    def _open_attempt(self, now: float) -> bool:
        present = self._present()
        everybody = bool(present) and present <= self._ready.keys()
        if not everybody and now < self._ready_since + self.config.train_deadline:
            return False
        task, cohort = self._largest_group()
        if len(cohort) < self.config.min_cohort:
            return False
        self._start(task, cohort, now)
        return self.attempt is not None

    def _present(self) -> set[SiloId]:
        """Who could be in the next attempt."""
        return set(self.config.silos) & self._manifest().silos.keys() - self._excluded

    def _largest_group(self) -> tuple[str, tuple[SiloId, ...]]:
        ready = {silo: self._ready[silo] for silo in self._present() & self._ready.keys()}
        tasks = sorted(set(ready.values()))
        groups = {task: tuple(sorted(s for s in ready if ready[s] == task)) for task in tasks}
        return max(groups.items(), key=lambda item: len(item[1]), default=("", ()))

    def _start(self, task: str, cohort: tuple[SiloId, ...], now: float) -> None:
        manifest = self._manifest()
        if not set(cohort) <= manifest.silos.keys():
            return  # somebody was revoked just now: the next look forms a cohort without it
        self._attempts += 1
        opening = Opening(
            session=self.config,
            session_id=self.session_id,
            manifest=manifest,
            task=task,
            round=self.round,
            attempt=self._attempts,
            base=self.base(task),
            cohort=cohort,
            length=self._tasks[task].length,
        )
        descriptor = describe(opening, self._identity, self._entropy)
        server = ServerRound(opening, descriptor, self._identity)
        self.attempt = Attempt(self._attempts, server, descriptor, now + self.config.phase_deadline)
        for silo in cohort:
            del self._ready[silo]
        self._ready_since = now if self._ready else math.inf

    def _close_phase(self, live: Attempt, now: float) -> None:
        try:
            broadcast = live.server.close_phase()
        except RoundAborted as error:
            # Its frames hold shares and rebuilt secrets, and it outlives the attempt.
            error.__traceback__ = error.__context__ = None
            self.last_abort = (self.round, live.number, error)
            self._aborts[live.number] = error
            self._exclude(error)
            self._drop_attempt()
            return
        if isinstance(broadcast, Result):
            self._release(live, broadcast)
            return
        live.broadcasts.append(broadcast)
        live.members.append(live.server.expected)
        live.deadline = now + self.config.phase_deadline

    def _exclude(self, error: RoundAborted) -> None:
        """Leave the blamed out of the round's next attempts, unless too few would be left.

        Complaints cannot be told from lies, so a liar could have silos excluded one by one; when
        the floor is near, everybody gets another chance. Whoever is blamed in Unmasking stays in:
        silos have revealed for these survivors by then and sign no others on this base.
        """
        if error.phase == Phase.UNMASKING:
            return
        self._excluded |= {SiloId(name) for name in error.blamed}
        if len(self._present()) < self.config.min_cohort:
            self._excluded.clear()

    def _release(self, live: Attempt, result: Result) -> None:
        total = cast(Vector, live.server.total)
        path = self.directory / "sums" / str(result.round)
        path.parent.mkdir(parents=True, exist_ok=True)
        total.tofile(path)
        self.results.append(result)
        tau4 = transcript.result_transcript(result.survivors_transcript, result.vector_digest)
        self._history = transcript.next_history(self._history, tau4)
        self._ready.clear()
        self._ready_since = math.inf
        self._attempts, self._aborts, self._excluded = 0, {}, set()
        self._drop_attempt()
        if all(self._released(task.name) >= task.rounds for task in self.config.tasks):
            self.state = State.DONE

    def _drop_attempt(self) -> None:
        if self.attempt is not None:
            self.attempt.discard()
        self.attempt = None
        shutil.rmtree(self.directory / "spool", ignore_errors=True)

    def _released(self, task: str) -> int:
        return sum(result.task == task for result in self.results)

    def _attempt(self, silo: SiloId, round_number: int, attempt: int) -> Attempt:
        self._check_active()
        if round_number < self.round:
            raise TooLate("round-over", f"Round {round_number} has its result.")
        if round_number == self.round and attempt in self._aborts:
            raise _again(self._aborts[attempt])
        live = self.attempt
        if live is None or (round_number, attempt) != (self.round, live.number):
            raise FaultyClient(silo, "attempt-unknown", "There is no such attempt.")
        return live

    def _ring(self, live: Attempt) -> Ring:
        return Ring(self.config.task(live.server.opening.task).ring_bits)

    def _check_task(self, task: str) -> None:
        if task not in {known.name for known in self.config.tasks}:
            raise NotFound("task-unknown", f"Session {self.config.name} has no task {task!r}.")

    def _check_active(self) -> None:
        if self.state is not State.ACTIVE:
            raise SessionEnded("session-over", f"Session {self.config.name} is {self.state}.")


def _again(error: RoundAborted) -> RoundAborted:
    """The same to raise once more: a stored exception would gather the frames of all callers."""
    return RoundAborted(
        error.phase, error.have, error.need, blamed=error.blamed, because=error.because
    )
