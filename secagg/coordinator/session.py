"""One session as a state machine: who is ready, which attempt runs, what was summed.

A fold over what silos say and over the time that the driver passes in: no sockets, no clocks, no
threads in here. A silo says Ready when it has an update; the session opens an attempt when all its
silos are ready, or when ``train_deadline`` has passed since the first and the floor is reached. The
cohort is everybody ready on the session's one base; a silo on another base is told ``StaleModel``
at once, since the signed sums say which base is right.

    ready ─▶ attempt: describe ─▶ ServerRound phase by phase ─▶ result ─▶ next round
                         ▲                     │
                         └── silos ready again ◀── RoundAborted

Every step is taken, then written to the journal, and only then seen by anybody: who calls holds the
session to itself until the call returns. When the journal cannot take it, the caller must let
nobody look at the session again. ``restore`` takes the same steps from what was written. What the
silos reveal in Unmasking is not written; after a restart they are asked for it again.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final, cast

from secagg.config import Phase, SessionConfig, SiloId
from secagg.coordinator import records
from secagg.coordinator.journal import Journal
from secagg.coordinator.spool import Blob, Stored, Upload, damaged
from secagg.coordinator.state import (
    PROPOSAL_SECONDS,
    STEPS,
    Attempt,
    Ended,
    Event,
    Proposal,
    State,
    Step,
    Task,
)
from secagg.crypto.digest import root_digest
from secagg.crypto.labels import SIGN_DESCRIPTOR, SIGN_RESULT
from secagg.crypto.secret import Entropy
from secagg.crypto.sign import IdentityKey, verify
from secagg.disk import Disk
from secagg.encoding.codec import Codec
from secagg.errors import (
    ConfigError,
    Conflict,
    FaultyClient,
    MalformedMessage,
    NotFound,
    QuotaExceeded,
    RoleRefused,
    RoundAborted,
    SecaggError,
    SessionEnded,
    StaleModel,
    StorageDamaged,
    StorageFailed,
    TooLate,
)
from secagg.masking import transcript
from secagg.masking.manifest import Manifest
from secagg.masking.messages import Descriptor, MaskedInput, Result, Unmasking
from secagg.masking.server import Broadcast, ClientMessage, Opening, ServerRound, describe
from secagg.ring.vectors import Ring, Vector
from secagg.wire import attempt as wire
from secagg.wire import session as wire_session
from secagg.wire._pb import journal_pb2 as pb
from secagg.wire.session import SignedOpening

MAX_CHANGES: Final = 1000
"""How often a silo may say Ready or take it back without an attempt's end in between."""


@contextmanager
def _border() -> Iterator[None]:
    """Where a step becomes durable: whatever goes wrong here is the disk's refusal."""
    try:
        yield
    except StorageFailed:
        raise
    except Exception as error:  # noqa: BLE001 - of any kind: memory is ahead of the disk
        kind = type(error).__name__
        raise StorageFailed(
            "storage-failed",
            f"A step of a session could not be written down ({kind}: {error}).",
            "What it led to was seen by nobody. Start the coordinator again.",
        ) from None


@dataclass(frozen=True, slots=True)
class Means:
    """What every session of a coordinator works with.

    Args:
        manifest: gives the newest verified manifest.
        signed_manifest: the same as the authority signed it, for silos.
        identity: the coordinator's signing key.
        disk: the state directory.
        journal: of the same directory.
        entropy: source of nonces.
        max_weights_bytes: greatest size of initial weights.
    """

    manifest: Callable[[], Manifest]
    signed_manifest: Callable[[], bytes]
    identity: IdentityKey
    disk: Disk
    journal: Journal
    entropy: Entropy
    max_weights_bytes: int


class Session:
    """One session; made by ``create`` or ``restore``.

    Args:
        config: as the admin created it.
        session_id: 32 fresh bytes.
        means: what it works with.
        key: of the call that created it.
    """

    def __init__(
        self, config: SessionConfig, session_id: bytes, means: Means, key: bytes = b""
    ) -> None:
        self.config = config
        self.session_id = session_id
        self.session_hash = transcript.session_hash(config)
        self.key = key
        self.state = State.ACTIVE
        self.results: list[Result] = []
        self.attempt: Attempt | None = None
        self.last_abort: tuple[int, int, RoundAborted] | None = None
        self.last_call: dict[SiloId, float] = {}
        self.folder = f"sessions/{session_id.hex()}"
        self._means = means
        self._history = transcript.first_history(self.session_hash)
        self._opening_transcript = transcript.opening_transcript(self.session_hash, session_id)
        self._tasks: dict[str, Task] = {}
        self._proposals: dict[str, Proposal] = {}
        self._ready: dict[SiloId, str] = {}
        self._ready_since = math.inf
        self._attempts = 0
        self._aborts: dict[int, RoundAborted] = {}
        self._excluded: set[SiloId] = set()
        self._changes = Counter[SiloId]()
        self._sums: list[Stored] = []

    @classmethod
    def create(
        cls, config: SessionConfig, session_id: bytes, means: Means, key: bytes = b""
    ) -> Session:
        """Begin a session, durably."""
        session = cls(config, session_id, means, key)
        session._log(lambda: records.created(session_id, config, key), lasting=True)
        return session

    @classmethod
    def restore(cls, rows: Iterable[bytes], means: Means, now: float) -> Session:
        """Bring a session back to where its records say it stood; its deadlines start anew.

        Raises:
            StorageDamaged: records or blobs are not what was stored.
            ConfigError: they are another version's, or another coordinator's.
        """
        first, *others = map(records.parse, rows)
        made = first.created
        try:
            config = wire_session.config_from_wire(made.config)
        except MalformedMessage as error:
            raise ConfigError(
                "session-version",
                f"This version of secagg would not create session {made.config.name}, which is in "
                f"the state directory ({error.observed})",
                "Start the version that wrote it, or move the directory away and begin anew.",
            ) from None
        try:
            session = cls(config, made.session_id, means, made.key)
            for record in others:
                session._retrace(record, now)
        except (ConfigError, StorageDamaged, StorageFailed):
            raise
        except (SecaggError, LookupError, ValueError) as error:
            raise damaged(
                f"the records of session {made.config.name} contradict each other ({error})"
            ) from None
        session._tidy()
        return session

    def signed_manifest(self) -> bytes:
        """The newest manifest, as the authority signed it."""
        return self._means.signed_manifest()

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
        if silo not in self.config.silos or silo not in self._means.manifest().silos:
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
        if task not in self._proposals:  # ``tick`` takes it from a proposer that is late
            self._proposals[task] = Proposal(silo, now + PROPOSAL_SECONDS)
        return self._proposals[task].proposer == silo

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
            signed.verify(self._key_of(silo), self._opening_transcript)
        except MalformedMessage as error:
            raise FaultyClient(silo, "message-signature", error.observed) from None
        self._codec(signed)  # a schema that the task cannot hold is refused before anything
        weights = self._take_weights(silo, signed, proposal)
        self._open(signed, weights)
        del self._proposals[name]
        self._log(lambda: records.task_opened(signed, weights), lasting=True)

    def _key_of(self, silo: SiloId) -> bytes:
        key = self._means.manifest().silos.get(silo)
        if key is None:
            raise RoleRefused("session-member", f"{silo} is no longer in the manifest.")
        return key

    def _codec(self, signed: SignedOpening) -> Codec:
        opening = signed.opening
        return Codec(self.config.task(opening.task), opening.schema, len(self.config.silos))

    def _open(self, signed: SignedOpening, weights: Stored | None) -> None:
        opening, length = signed.opening, self._codec(signed).length
        self._tasks[opening.task] = Task(signed, opening.digest(self.session_hash), length, weights)

    def _weights_name(self, task: str) -> str:
        return f"{self.folder}/weights/{task}.safetensors"

    def _take_weights(
        self, silo: SiloId, signed: SignedOpening, proposal: Proposal
    ) -> Stored | None:
        if signed.opening.weights_digest == transcript.NO_WEIGHTS:
            proposal.discard()
            return None
        upload = proposal.upload
        if upload is None or upload.total != signed.weights_bytes:
            raise FaultyClient(silo, "weights-missing", "The initial weights are not complete.")
        with upload.frozen():
            if upload.missing is not None:
                raise FaultyClient(silo, "weights-missing", "The initial weights are not complete.")
            stored = upload.stored()
            if root_digest(stored.chunk_digests) != signed.opening.weights_digest:
                raise FaultyClient(
                    silo, "weights-digest", "The initial weights are not those signed."
                )
            upload.close()
            return stored

    def weights_upload(self, silo: SiloId, task: str, total: int, now: float) -> Upload:
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
        if not 0 < total <= self._means.max_weights_bytes:
            raise QuotaExceeded("weights-size", f"Initial weights of {total} bytes are too large.")
        proposal.deadline = now + PROPOSAL_SECONDS  # it is at work
        if proposal.upload is None or proposal.upload.total != total:
            proposal.upload = self._upload(self._weights_name(task), total, proposal.upload)
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
        if self._ready.get(silo) != task:
            self._count_change(silo)
            self._note_ready(silo, task, now)
            self._log(lambda: records.said_ready(silo, task))

    def _count_change(self, silo: SiloId) -> None:
        """Bound what one silo can write into the journal of one attempt."""
        if self._changes[silo] >= MAX_CHANGES:
            raise QuotaExceeded("ready-changes", f"{silo} was ready too often without an attempt.")
        self._changes[silo] += 1

    def _note_ready(self, silo: SiloId, task: str, now: float) -> None:
        if not self._ready:
            self._ready_since = now
        self._ready[silo] = task

    def leave(self, silo: SiloId) -> None:
        """Take back a silo's Ready; the attempt that runs does not wait for it any more."""
        live = self.attempt
        waited_for = live is not None and silo in set(live.server.expected) - live.left
        if self.state is State.ACTIVE and (silo in self._ready or waited_for):
            self._note_left(silo)
            self._log(lambda: records.took_back(silo))

    def _note_left(self, silo: SiloId) -> None:
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
        if isinstance(message, MaskedInput) and self._awaits_vector(live, message.sender):
            return self._commit(live, message)
        new = live.server.accept(message)
        if new and not isinstance(message, Unmasking):  # what opens a sum is never written down
            self._log(lambda: records.accepted(message, self.session_id, live.descriptor, None))
        return new

    def _awaits_vector(self, live: Attempt, silo: SiloId) -> bool:
        server = live.server
        waiting = server.phase is Phase.MASKED_INPUT and silo not in server.arrived
        return waiting and silo in server.expected

    def _commit(self, live: Attempt, message: MaskedInput) -> bool:
        """Accept a silo's masked input with the vector that it uploaded."""
        upload = live.uploads.get(message.sender)
        if upload is None:  # never sent, or received by a process that is gone
            raise FaultyClient(message.sender, "chunk-gap", "The chunk at 0 is missing.")
        with upload.frozen():  # what is summed is what was hashed
            if upload.missing is not None:
                raise FaultyClient(
                    message.sender, "chunk-gap", f"The chunk at {upload.missing} is missing."
                )
            stored = upload.stored()
            if root_digest(stored.chunk_digests) != message.vector_digest:
                raise FaultyClient(
                    message.sender, "vector-digest", "The vector is not the one committed to."
                )
            live.server.accept(message, self._vector(live, upload.view()))
            upload.close()
        del live.uploads[message.sender]
        self._log(lambda: records.accepted(message, self.session_id, live.descriptor, stored))
        return True

    def _vector(self, live: Attempt, data: memoryview) -> Vector:
        return self._ring(live).unpack(data, live.server.opening.length)

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
            live.uploads[silo] = self._upload(self._vector_name(live, silo), total)
        return live.uploads[silo]

    def _vector_name(self, live: Attempt, silo: SiloId) -> str:
        return f"{self.folder}/spool/{live.descriptor.round}-{live.number}-{silo}"

    def _upload(self, name: str, total: int, instead: Upload | None = None) -> Upload:
        return Upload(self._means.disk, name, total, self.config.chunk_bytes, instead)

    def abort(self) -> None:
        """End the session on its admin's word."""
        if self.state is State.ACTIVE:
            self._log(lambda: records.ended(State.ABORTED), lasting=True, clear=True)
            self._drop_attempt()
            for proposal in self._proposals.values():
                proposal.discard()
            self._proposals.clear()
            self.state = State.ABORTED  # last: from now on it may be forgotten at any time

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
        if seen not in STEPS:
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

    def sum_blob(self, round_number: int) -> Blob:
        """A round's sum.

        Raises:
            NotFound: the round has no result.
        """
        if not 0 < round_number < self.round:
            raise NotFound("round-unknown", f"Round {round_number} has no result.")
        return self._blob(self._sum_name(round_number), self._sums[round_number - 1])

    def weights_blob(self, task: str) -> Blob:
        """A task's initial weights.

        Raises:
            NotFound: it has none, or is not open.
        """
        weights = self._tasks[task].weights if task in self._tasks else None
        if weights is None:
            raise NotFound("weights-unknown", f"Task {task} has no initial weights.")
        return self._blob(self._weights_name(task), weights)

    def _blob(self, name: str, stored: Stored) -> Blob:
        return Blob(self._means.disk, name, stored, self.config.chunk_bytes)

    def _sum_name(self, round_number: int) -> str:
        return f"{self.folder}/sums/{round_number}"

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
        if self._expire_proposals(now):
            return True
        live = self.attempt
        if live is None:
            return self._open_attempt(now)
        if not live.complete(self._means.manifest().silos.keys()) and now < live.deadline:
            return False
        self._close_phase(live, now)
        return True

    def due(self) -> float:
        """When ``tick`` has something to do at the latest, by the driver's clock."""
        if self.state is not State.ACTIVE:
            return math.inf
        proposals = min((p.deadline for p in self._proposals.values()), default=math.inf)
        if self.attempt is not None:
            return min(self.attempt.deadline, proposals)
        floor = len(self._largest_group()[1]) >= self.config.min_cohort
        train = self._ready_since + self.config.train_deadline if floor else math.inf
        return min(train, proposals)

    def _expire_proposals(self, now: float) -> bool:
        """Let somebody else propose what its proposer has not."""
        late = [task for task, proposal in self._proposals.items() if now >= proposal.deadline]
        for task in late:
            self._proposals.pop(task).discard()
        return bool(late)

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
        return set(self.config.silos) & self._means.manifest().silos.keys() - self._excluded

    def _largest_group(self) -> tuple[str, tuple[SiloId, ...]]:
        ready = {silo: self._ready[silo] for silo in self._present() & self._ready.keys()}
        tasks = sorted(set(ready.values()))
        groups = {task: tuple(sorted(s for s in ready if ready[s] == task)) for task in tasks}
        return max(groups.items(), key=lambda item: len(item[1]), default=("", ()))

    def _start(self, task: str, cohort: tuple[SiloId, ...], now: float) -> None:
        manifest = self._means.manifest()
        if not set(cohort) <= manifest.silos.keys():
            return  # somebody was revoked just now: the next look forms a cohort without it
        opening = self._opening(task, self._attempts + 1, cohort, manifest)
        descriptor = describe(opening, self._means.identity, self._means.entropy)
        self._begin(opening, descriptor, now)
        self._log(lambda: records.attempt_opened(descriptor, manifest))

    def _opening(
        self, task: str, attempt: int, cohort: tuple[SiloId, ...], manifest: Manifest
    ) -> Opening:
        return Opening(
            session=self.config,
            session_id=self.session_id,
            manifest=manifest,
            task=task,
            round=self.round,
            attempt=attempt,
            base=self.base(task),
            cohort=cohort,
            length=self._tasks[task].length,
        )

    def _begin(self, opening: Opening, descriptor: Descriptor, now: float) -> None:
        server = ServerRound(opening, descriptor, self._means.identity)
        self._attempts = opening.attempt
        self.attempt = Attempt(opening.attempt, server, descriptor, self._phase_end(now))
        for silo in opening.cohort:
            self._ready.pop(silo, None)
        self._ready_since = now if self._ready else math.inf

    def _phase_end(self, now: float) -> float:
        return now + self.config.phase_deadline

    def _close_phase(self, live: Attempt, now: float) -> None:
        phase = str(live.server.phase)
        try:
            broadcast = live.server.close_phase()
        except RoundAborted as error:
            # Its frames hold shares and rebuilt secrets, and it outlives the attempt.
            error.__traceback__ = error.__context__ = None
            self._abort_attempt(live, error)
            return
        if isinstance(broadcast, Result):
            self._release(live, broadcast)
            return
        self._publish(live, broadcast, now)
        self._log(lambda: records.phase_closed(phase))

    def _publish(self, live: Attempt, broadcast: Broadcast, now: float) -> None:
        live.broadcasts.append(broadcast)
        live.members.append(live.server.expected)
        live.deadline = self._phase_end(now)

    def _abort_attempt(self, live: Attempt, error: RoundAborted) -> None:
        self.last_abort = (self.round, live.number, error)
        self._aborts[live.number] = error
        self._exclude(live, error)
        self._log(
            lambda: records.attempt_aborted(self.round, self._aborts, self._ready, self._excluded),
            clear=True,
        )
        self._drop_attempt()

    def _exclude(self, live: Attempt, error: RoundAborted) -> None:
        """Leave the blamed out of the round's next attempts, unless too few would be left.

        Complaints cannot be told from lies, so a liar could have silos excluded one by one; when
        the floor is near, everybody gets another chance. In Unmasking silos have revealed for these
        survivors and sign no others on this base: all survivors stay in, blamed or not, and whoever
        had dropped out sits the round out.
        """
        out = {SiloId(name) for name in error.blamed}
        if error.phase == Phase.UNMASKING:
            out = set(self.config.silos) - set(live.server.survivors)
        self._excluded |= out
        if len(self._present()) < self.config.min_cohort:
            self._excluded.clear()

    def _release(self, live: Attempt, result: Result) -> None:
        total = self._ring(live).pack(cast(Vector, live.server.total))
        stored = Stored.of(total, self.config.chunk_bytes)
        with _border():
            self._means.disk.replace(self._sum_name(result.round), total)
        self._conclude(result, stored)
        self._log(lambda: records.released(result, stored), lasting=True, clear=True)
        self._drop_attempt()
        self._end_if_done()

    def _conclude(self, result: Result, total: Stored) -> None:
        """Count a result, and begin the next round."""
        self.results.append(result)
        self._sums.append(total)
        tau4 = transcript.result_transcript(result.survivors_transcript, result.vector_digest)
        self._history = transcript.next_history(self._history, tau4)
        self._ready.clear()
        self._ready_since = math.inf
        self._attempts, self._aborts, self._excluded = 0, {}, set()

    def _end_if_done(self) -> None:
        if all(self._released(task.name) >= task.rounds for task in self.config.tasks):
            self.state = State.DONE  # from now on it may be forgotten at any time

    def _drop_attempt(self) -> None:
        """Forget the attempt and its vectors; after the record that makes them superfluous."""
        if self.attempt is not None:
            self.attempt.close()
        self.attempt = None
        self._means.disk.remove(f"{self.folder}/spool")

    # What was written down.

    def _log(
        self, make: Callable[[], pb.Record], *, lasting: bool = False, clear: bool = False
    ) -> None:
        """Write a step down. If that fails in whatever way, memory is ahead: nobody may go on."""
        with _border():
            data = make().SerializeToString(deterministic=True)
            self._means.journal.append(self.session_id, data, lasting=lasting, clear=clear)
        if clear:
            self._changes.clear()

    def _retrace(self, record: pb.Record, now: float) -> None:
        """Take one step again."""
        match record.WhichOneof("record"):
            case "task_opened":
                self._retrace_task(record.task_opened)
            case "said_ready":
                self._note_ready(SiloId(record.said_ready.silo), record.said_ready.task, now)
            case "took_back":
                self._note_left(SiloId(record.took_back.silo))
            case "attempt_opened":
                self._retrace_opening(record.attempt_opened, now)
            case "accepted":
                self._retrace_message(record.accepted)
            case "phase_closed":
                self._retrace_closing(record.phase_closed, now)
            case "attempt_aborted":
                self._retrace_abort(record.attempt_aborted, now)
            case "released":
                self._retrace_result(record.released)
            case "ended":
                self.state = State(record.ended.state)
            case _:
                raise damaged(f"session {self.config.name} was created twice")

    def _retrace_task(self, opened: pb.TaskOpened) -> None:
        signed = wire_session.opening_from_wire(opened.opening)
        weights = records.stored_of(opened.weights) if signed.weights_bytes else None
        if weights is not None:
            weights.open(self._means.disk, self._weights_name(signed.opening.task))
        self._open(signed, weights)

    def _retrace_opening(self, opened: pb.AttemptOpened, now: float) -> None:
        descriptor = wire.descriptor_from_wire(opened.descriptor)
        manifest = records.manifest_of(opened.members)
        if manifest.digest() != descriptor.manifest_digest:
            raise damaged(f"an attempt of session {self.config.name} has another manifest")
        opening = self._opening(descriptor.task, descriptor.attempt, descriptor.cohort, manifest)
        expected = (self.session_id, self.session_hash, self.round, opening.base)
        found = (descriptor.session_id, descriptor.session_hash, descriptor.round, descriptor.base)
        self._check_origin(
            found == expected,
            SIGN_DESCRIPTOR,
            transcript.round_transcript(descriptor),
            b"",
            descriptor.signature,
        )
        self._begin(opening, descriptor, now)

    def _retrace_closing(self, closed: pb.PhaseClosed, now: float) -> None:
        live = self._live()
        if str(live.server.phase) != closed.phase:
            raise damaged(f"session {self.config.name} closes a phase that is not open")
        self._publish(live, live.server.close_phase(), now)

    def _check_origin(
        self, same: bool, kind: str, tau: bytes, body: bytes, signature: bytes
    ) -> None:
        """Return if a signed record is of this very coordinator and of this version's making."""
        try:
            verify(self._means.identity.public, kind, tau, body, signature)
        except MalformedMessage:
            same = False
        if not same:
            raise ConfigError(
                "state-of-another",
                f"Session {self.config.name} in the state directory was signed with another "
                "identity key than this coordinator's, or hashed by another version of secagg.",
                "Start with the key and the version that wrote it, or with an empty directory.",
            )

    def _retrace_message(self, accepted: pb.Accepted) -> None:
        live = self._live()
        message = wire.client_message_from_wire(accepted.message)
        vector = None
        if isinstance(message, MaskedInput):
            name = self._vector_name(live, message.sender)
            stored = records.stored_of(accepted.vector)
            data = stored.read(self._means.disk, name, self.config.chunk_bytes)
            vector = self._vector(live, data)
        live.server.accept(message, vector)

    def _retrace_abort(self, aborted: pb.AttemptAborted, now: float) -> None:
        for message in aborted.aborted:
            error = wire_session.aborted_from_wire(message)
            self._attempts, self._aborts[message.attempt] = message.attempt, error
            self.last_abort = (message.round, message.attempt, error)
        for ready in aborted.ready:
            self._note_ready(SiloId(ready.silo), ready.task, now)
        self._excluded = {SiloId(name) for name in aborted.excluded}

    def _retrace_result(self, released: pb.Released) -> None:
        result = wire.result_from_wire(released.result)
        stored = records.stored_of(released.sum)
        stored.open(self._means.disk, self._sum_name(result.round))
        tau4 = transcript.result_transcript(result.survivors_transcript, result.vector_digest)
        same = (result.round, result.base) == (self.round, self.base(result.task))
        self._check_origin(same, SIGN_RESULT, tau4, result.body(), result.signature)
        self._conclude(result, stored)
        self._end_if_done()

    def _live(self) -> Attempt:
        if self.attempt is None:
            raise damaged(f"session {self.config.name} has a message of no attempt")
        return self.attempt

    def _tidy(self) -> None:
        """Remove what no record speaks of: uploads that were never committed."""
        known = {self._sum_name(number) for number in range(1, self.round)}
        known |= {self._weights_name(name) for name, task in self._tasks.items() if task.weights}
        live = self.attempt
        if live is not None:
            known |= {self._vector_name(live, silo) for silo in live.server.committed}
        for name in self._means.disk.names(self.folder):
            if name not in known:
                self._means.disk.remove(name)

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
