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
nobody look at the session again. ``retrace`` takes the same steps from what was written. What the
silos reveal in Unmasking is not written; after a restart they are asked for it again.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Final, cast

from secagg.ckks.custody import KeyBox, KeyRequest
from secagg.config import Phase, SessionConfig, SiloId
from secagg.coordinator import records
from secagg.coordinator.bridges import Bridges, Wish
from secagg.coordinator.keys import KeyDesk
from secagg.coordinator.spool import Blob, Holding, Spooled, Stored, Upload, check_room
from secagg.coordinator.standing import Means, Standing
from secagg.coordinator.state import (
    PROPOSAL_SECONDS,
    STEPS,
    Attempt,
    Ended,
    Event,
    Proposal,
    State,
    Step,
)
from secagg.crypto.labels import SIGN_KEY_REQUEST
from secagg.crypto.sign import verify
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
    StorageFailed,
    TooLate,
)
from secagg.masking import transcript
from secagg.masking.messages import MaskedInput, Result, Unmasking
from secagg.masking.server import ClientMessage, describe
from secagg.ring.vectors import Vector
from secagg.suite import KeyName
from secagg.wire._pb import journal_pb2 as pb
from secagg.wire.custody import SignedCheckpoint
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


@contextmanager
def _signed_by(silo: SiloId) -> Iterator[None]:
    """Where a silo's signature is verified: if it does not hold, the silo is blamed."""
    try:
        yield
    except MalformedMessage as error:
        raise FaultyClient(silo, "message-signature", error.observed) from None


class Session(Standing):
    """One session; made by ``create``, or by ``retrace.restore``."""

    def __init__(
        self,
        config: SessionConfig,
        session_id: bytes,
        means: Means,
        key: bytes = b"",
        creator: str = "",
    ) -> None:
        super().__init__(config, session_id, means, key, creator)
        self.last_call: dict[SiloId, float] = {}
        self._opening_transcript = transcript.opening_transcript(self.session_hash, session_id)
        self._proposals: dict[str, Proposal] = {}
        folder, chunk = f"{self.folder}/bridges", config.chunk_bytes
        self._bridges = Bridges(means.disk, folder, chunk, means.entropy, means.erase)
        self._changes = Counter[SiloId]()

    @classmethod
    def create(
        cls,
        config: SessionConfig,
        session_id: bytes,
        means: Means,
        key: bytes = b"",
        creator: str = "",
    ) -> Session:
        """Begin a session, durably."""
        session = cls(config, session_id, means, key, creator)
        session._log(lambda: records.created(session_id, config, key, creator), lasting=True)
        return session

    def signed_manifest(self) -> bytes:
        """The newest manifest, as the authority signed it."""
        return self.means.signed_manifest()

    # What silos say.

    def check_member(self, silo: SiloId, now: float) -> None:
        """Return if a silo takes part in this session, and note that it called.

        Raises:
            RoleRefused: it is not one of the session's silos, or no longer in the manifest.
        """
        if (
            silo not in self.config.silos or silo not in self.means.manifest().silos
        ):  # CHECK: coordinator-session-member
            raise RoleRefused("session-member", f"{silo} is no silo of session {self.config.name}.")
        self.last_call[silo] = now

    def open_task(self, silo: SiloId, task: str, now: float) -> SignedOpening | bool:
        """Return a task's opening, True if this silo is to propose it, False if another is.

        Raises:
            NotFound: the session has no such task.
            SessionEnded: the task is not open, and the session is over.
        """
        self._check_task(task)  # CHECK: open-task-known
        if task in self.tasks:
            return self.tasks[task].signed
        self._check_active()  # CHECK: open-task-active
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
        self._check_task(name)  # CHECK: proposed-task-known
        if name in self.tasks:
            if self.tasks[name].signed != signed:  # CHECK: task-open-conflict
                raise Conflict(silo, "task-open", f"Task {name} is open already.")
            return
        self._check_active()  # CHECK: propose-active
        proposal = self._proposals.get(name)
        if (
            proposal is None or proposal.proposer != silo or signed.proposer != silo
        ):  # CHECK: task-proposer
            raise FaultyClient(silo, "task-proposer", f"{silo} was not asked to open task {name}.")
        with _signed_by(silo):
            signed.verify(self._key_of(silo), self._opening_transcript)  # CHECK: proposal-signature
        if bool(signed.sealed_digest) != self._weights_are_sealed(signed):  # CHECK: weights-sealed
            raise FaultyClient(
                silo, "weights-sealed", "Initial weights are sealed where the session seals."
            )
        self.vector_length(signed)  # what the task cannot hold is refused before anything
        weights = self._take_weights(silo, signed, proposal)
        self.note_task(signed, weights)
        del self._proposals[name]
        self._log(lambda: records.task_opened(signed, weights), lasting=True)

    def _weights_are_sealed(self, signed: SignedOpening) -> bool:
        has_weights = signed.opening.weights_digest != transcript.NO_WEIGHTS
        return has_weights and self.config.protection.seals

    def _key_of(self, silo: SiloId) -> bytes:
        key = self.means.manifest().silos.get(silo)
        if key is None:  # CHECK: proposer-in-manifest
            raise RoleRefused("session-member", f"{silo} is no longer in the manifest.")
        return key

    def _take_weights(
        self, silo: SiloId, signed: SignedOpening, proposal: Proposal
    ) -> Stored | None:
        if signed.opening.weights_digest == transcript.NO_WEIGHTS:
            proposal.discard()
            return None
        upload = proposal.upload
        if upload is None or upload.total != signed.weights_bytes:  # CHECK: weights-uploaded
            raise FaultyClient(silo, "weights-missing", "The initial weights are not complete.")
        with upload.committing() as stored:
            if stored is None:  # CHECK: weights-complete
                raise FaultyClient(silo, "weights-missing", "The initial weights are not complete.")
            if stored.digest != signed.uploaded_digest:  # CHECK: coordinator-weights-digest
                raise FaultyClient(
                    silo, "weights-digest", "The initial weights are not those signed."
                )
        return stored

    def weights_upload(self, silo: SiloId, task: str, total: int, now: float) -> Upload:
        """Return where the proposer's weights go.

        Raises:
            FaultyClient: another silo was asked for them.
            QuotaExceeded: they are larger than this coordinator takes, or ``check_room``.
            SessionEnded: the session is over.
        """
        self._check_active()  # CHECK: weights-active
        self._check_task(task)  # CHECK: weights-task-known
        proposal = self._proposals.get(task)
        if proposal is None or proposal.proposer != silo:  # CHECK: weights-proposer
            raise FaultyClient(silo, "task-proposer", f"{silo} was not asked to open task {task}.")
        if not 0 < total <= self.means.limits.max_weights_bytes:  # CHECK: weights-size
            raise QuotaExceeded("weights-size", f"Initial weights of {total} bytes are too large.")
        proposal.deadline = now + PROPOSAL_SECONDS  # it is at work
        if proposal.upload is None or proposal.upload.total != total:
            self._check_room(silo, total)  # CHECK: weights-room
            proposal.upload = self._upload(self.weights_name(task), total, proposal.upload)
        return proposal.upload

    # What silos say of the session's key, where it seals.

    def ask_key(self, silo: SiloId, request: KeyRequest, now: float) -> KeyBox | int | bool:
        """Answer a silo that wants the session's key (``KeyDesk.ask``).

        Raises:
            FaultyClient: the request is not signed by it: nobody would answer.
        """
        desk, tau = self._desk(silo), self._opening_transcript
        if not desk.knows(request):
            with _signed_by(silo):
                key = self._key_of(silo)
                # CHECK: coordinator-key-request-signature
                verify(key, SIGN_KEY_REQUEST, tau, request.body(), request.signature)
        return desk.ask(request, now)

    def announce_key(self, silo: SiloId, key: KeyName, members: tuple[SiloId, ...]) -> None:
        """Note that a silo has made the key that it was asked for.

        Raises:
            As ``KeyDesk.check_announcement``.
        """
        present = self._members()
        if self._desk(silo).check_announcement(silo, key, members, present):
            self.note_key(key.epoch, key, present)
            self._log(lambda: records.key_announced(key, present), lasting=True)

    def key_requests(self, silo: SiloId, key: KeyName) -> list[KeyRequest]:
        """Who waits for a key that this silo has (``KeyDesk.requests``)."""
        return self._desk(silo).requests(silo, key)

    def send_key_box(self, silo: SiloId, box: KeyBox) -> None:
        """Leave a key for another silo (``KeyDesk.put``)."""
        self._desk(silo).put(box)

    def end_key(self, silo: SiloId, key: KeyName, round_number: int) -> None:
        """Note that a sum did not open under a key: its epoch ends when two silos say so."""
        under = [result.round for result in self.results if result.key == key]
        if self._desk(silo).fails(silo, key, round_number, under):
            self._next_epoch()

    # Checkpoints for silos that cannot open past sums.

    def ask_checkpoint(
        self,
        silo: SiloId,
        task: str,
        results: int,
        need: int,
        refused: Collection[str],
        now: float,
    ) -> list[SignedCheckpoint]:
        """Return others' checkpoints of a task, or none while there are not enough.

        Args:
            silo: who asks.
            task: which.
            results: how many it can do without help.
            need: so many silos' it wants, after the same results, which are more.
            refused: silos whose checkpoints are no use to it.
            now: by the driver's clock; the wish lives for a minute from it.

        Raises:
            NotFound: the session has no such task.
            FaultyClient: nobody could ever give that.
        """
        self._desk(silo)
        self._check_task(task)  # CHECK: wish-task-known
        silos = set(self.config.silos)
        possible = 0 <= results < self.released(task) and 1 <= need < len(silos)
        if not (possible and silos >= set(refused)):  # CHECK: checkpoint-wish
            raise FaultyClient(silo, "checkpoint-wish", "There can be no such checkpoints.")
        names = frozenset(SiloId(name) for name in refused)
        return self._bridges.ask(silo, task, Wish(results, need, names), now)

    def checkpoints_wanted(self, silo: SiloId, now: float) -> list[tuple[str, int]]:
        """Which checkpoints others wait for: each is told once in ``SHOW_SECONDS``."""
        return self._bridges.wanted(silo, now)

    def checkpoint_upload(
        self, silo: SiloId, task: str, digest: bytes, total: int, now: float
    ) -> Upload:
        """Return where a silo's checkpoint for others goes.

        Raises:
            TooLate: nobody waits for one.
            QuotaExceeded: it is larger than this coordinator takes, enough are on their way, or
                ``check_room``.
        """
        self._desk(silo)
        self._check_task(task)  # CHECK: upload-task-known
        if not 0 < total <= self.means.limits.max_weights_bytes:  # CHECK: offered-size
            raise QuotaExceeded("checkpoint-size", f"A checkpoint of {total} bytes is too large.")
        if self._bridges.begins(silo, task, digest, total):
            self._check_room(silo, total)  # CHECK: checkpoint-room
        return self._bridges.upload(silo, task, digest, total, now)

    def offer_checkpoint(self, silo: SiloId, checkpoint: SignedCheckpoint) -> None:
        """Take a silo's uploaded checkpoint for those who wait for it.

        Raises:
            TooLate: nobody waits for one any more, or for one after so few results.
            FaultyClient: not signed by it, after more results than there are, or not complete.
        """
        self._desk(silo)
        self._check_task(checkpoint.task)  # CHECK: offer-task-known
        with _signed_by(silo):
            # CHECK: coordinator-checkpoint-signature
            checkpoint.verify(self._key_of(silo), self._opening_transcript)
        if checkpoint.results > self.released(checkpoint.task):  # CHECK: offered-results
            raise FaultyClient(silo, "checkpoint-results", "There are not so many results.")
        self._bridges.put(silo, checkpoint)

    def checkpoint_blob(
        self, silo: SiloId, task: str, sender: str, digest: bytes, now: float
    ) -> Blob:
        """A sealed checkpoint, by the digest that its sender signed.

        Raises:
            NotFound: it is not there any more.
        """
        offer = self._bridges.fetch(silo, task, SiloId(sender), digest, now)
        return self.blob(offer.name, offer.stored)

    def _desk(self, silo: SiloId) -> KeyDesk:
        self._check_active()  # CHECK: keys-active
        if self.keys is None:  # CHECK: session-seals
            raise FaultyClient(silo, "key-unused", "This session's updates are not sealed.")
        return self.keys

    def _members(self) -> dict[SiloId, bytes]:
        """Identity keys of the session's silos that are in the manifest."""
        known = self.means.manifest().silos
        return {silo: known[silo] for silo in self.config.silos if silo in known}

    def _mind_keys(self, now: float) -> bool:
        """End an epoch that is over; return whether silos have something new to see."""
        if self.keys is None:
            return False
        if self.keys.worn(self._members(), now):
            self._next_epoch()
            return True
        self._bridges.expire(now, self._members())
        return self.keys.heard() | self._bridges.heard()

    def _next_epoch(self) -> None:
        assert self.keys is not None
        epoch = self.keys.following
        self.note_key(epoch, None)
        self._log(lambda: records.epoch_begun(epoch), lasting=True)

    def ready(
        self, silo: SiloId, task: str, base: bytes, now: float, key: KeyName | None = None
    ) -> None:
        """Note that a silo has an update for a task on a base.

        Raises:
            StaleModel: the base is not the session's: the silo has to catch up first.
            StaleKey: it would be sealed under another key than the session's newest one.
            SessionEnded: the task has released all its results, or the session is over.
            NotFound: the task is not open.
        """
        self._check_active()  # CHECK: ready-active
        if task not in self.tasks:  # CHECK: ready-task-open
            raise NotFound("task-closed", f"Task {task} has not been opened.")
        if self.released(task) >= self.config.task(task).rounds:  # CHECK: ready-task-done
            raise SessionEnded("task-done", f"Task {task} has released all its results.")
        if base != self.base(task):  # CHECK: ready-base
            raise StaleModel(
                "base-stale",
                f"The update for {task} is not on the session's current base.",
                "Fetch the signed results that are missing, apply them and train again.",
            )
        self._check_key(key)  # CHECK: ready-key
        if self.ready_for.get(silo) != task:
            self._count_change(silo)
            self.note_ready(silo, task, now)
            self._log(lambda: records.said_ready(silo, task))

    def _check_key(self, key: KeyName | None) -> None:
        if self.keys is not None:
            self.keys.check(key)  # CHECK: session-key

    def _count_change(self, silo: SiloId) -> None:
        """Bound what one silo can write into the journal of one attempt."""
        if self._changes[silo] >= MAX_CHANGES:  # CHECK: ready-changes
            raise QuotaExceeded("ready-changes", f"{silo} was ready too often without an attempt.")
        self._changes[silo] += 1

    def leave(self, silo: SiloId) -> None:
        """Take back a silo's Ready; the attempt that runs does not wait for it any more."""
        live = self.attempt
        waited_for = live is not None and silo in set(live.server.expected) - live.left
        if self.state is State.ACTIVE and (silo in self.ready_for or waited_for):
            self.note_left(silo)
            self._log(lambda: records.took_back(silo))

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
        # CHECK: vector-uploaded
        if upload is None:  # never sent, or received by a process that is gone
            raise FaultyClient(message.sender, "chunk-gap", "The chunk at 0 is missing.")
        with upload.committing() as stored:  # what is summed is what was hashed
            if stored is None:  # CHECK: coordinator-vector-complete
                raise FaultyClient(
                    message.sender, "chunk-gap", f"The chunk at {upload.missing} is missing."
                )
            blob = self.blob(upload.name, stored)
            try:
                live.server.accept(message, Spooled.open(blob, self.ring(live).dtype))
            except FaultyClient as fault:
                # To find such a word all of the vector was read: another look costs another one.
                if fault.code == "residue-range":
                    del live.uploads[message.sender]
                    upload.discard()
                raise
        del live.uploads[message.sender]
        self._log(lambda: records.accepted(message, self.session_id, live.descriptor, stored))
        return True

    def vector_upload(self, silo: SiloId, round_number: int, attempt: int, total: int) -> Upload:
        """Return where a silo's masked vector goes.

        Raises:
            TooLate: the phase has closed, or the vector was committed already.
            FaultyClient: not this silo's turn, or not the size of the task's vectors.
            QuotaExceeded: ``check_room``.
        """
        live = self._attempt(silo, round_number, attempt)
        server = live.server
        if server.phase is not Phase.MASKED_INPUT:  # CHECK: vector-phase
            early = server.phase in (Phase.ADVERTISE_KEYS, Phase.SHARE_KEYS)
            if early:
                raise FaultyClient(silo, "phase-early", "Vectors are not being collected yet.")
            raise TooLate("phase-closed", "The vectors of this attempt are collected.")
        if silo not in server.expected:  # CHECK: vector-sender
            raise FaultyClient(silo, "sender-unexpected", f"{silo} shared no keys.")
        if silo in server.arrived:  # CHECK: vector-once
            raise TooLate("vector-committed", "This silo's vector is committed already.")
        if total != server.opening.length * self.ring(live).word_bytes:  # CHECK: vector-length
            raise FaultyClient(
                silo, "vector-length", f"A vector of {total} bytes is not the task's."
            )
        if silo not in live.uploads:
            self._check_room(silo, total)  # CHECK: vector-room
            live.uploads[silo] = self._upload(self.vector_name(live, silo), total)
        return live.uploads[silo]

    def _upload(self, name: str, total: int, instead: Upload | None = None) -> Upload:
        chunk, erase = self.config.chunk_bytes, self.means.erase
        return Upload(self.means.disk, name, total, chunk, instead, erase)

    def _check_room(self, silo: SiloId, total: int) -> None:
        means = self.means
        check_room(means.limits, means.holdings(), silo, total, means.free)

    def holdings(self) -> Iterator[Holding]:
        """What this session keeps on disk; callable while another thread has the session."""
        over = self.state is not State.ACTIVE  # all is nobody's then, and goes when room is needed
        if kept := self.kept_bytes if over else self.sum_bytes:
            yield Holding(None, kept)
        if over:
            return
        for task in list(self.tasks.values()):
            if task.weights is not None:
                yield Holding(SiloId(task.signed.proposer), task.weights.size)
        for proposal in list(self._proposals.values()):
            upload = proposal.upload
            if upload is not None:
                yield Holding(proposal.proposer, upload.held, True)
        live = self.attempt
        if live is not None:
            for silo, upload in list(live.uploads.items()):
                yield Holding(silo, upload.total, True)
            size = live.server.opening.length * self.ring(live).word_bytes
            for silo in live.server.committed:
                yield Holding(silo, size)
        yield from self._bridges.holdings()

    def abort(self) -> None:
        """End the session on its admin's word."""
        if self.state is State.ACTIVE:
            self._log(lambda: records.ended(State.ABORTED), lasting=True, clear=True)
            self._drop_attempt()
            for proposal in self._proposals.values():
                proposal.discard()
            self._proposals.clear()
            self._bridges.clear()
            self.state = State.ABORTED  # last: from now on it may be forgotten at any time

    # What silos ask.

    def next(
        self,
        silo: SiloId,
        round_number: int,
        attempt: int,
        seen: int,
        key: KeyName | None = None,
    ) -> Event | None:
        """What comes after what a silo has seen; None if nothing has yet.

        Args:
            silo: who asks.
            round_number: the round that it stands at.
            attempt: the newest attempt of that round that it joined; 0 for none.
            seen: the newest broadcast of it; ``Step.LEFT`` if it takes no more part in it.
            key: what it would seal with; None if it only looks on.

        Raises:
            MalformedMessage: ``seen`` is no ``Step``.
            StaleKey: it waits for an attempt under a key that is not the newest any more.
        """
        if seen not in STEPS:  # CHECK: next-step
            raise MalformedMessage("step-unknown", f"There is no step {seen}.")
        if round_number > self.round:  # CHECK: next-round
            raise FaultyClient(silo, "round-unknown", f"There is no round {round_number} yet.")
        if 0 < round_number < self.round:
            return self.results[round_number - 1]
        if self.state is not State.ACTIVE:
            return Ended(f"Session {self.config.name} is {self.state}.")
        if round_number == self.round and attempt in self.aborts and seen != Step.LEFT:
            return self.aborts[attempt]
        live = self.attempt
        if round_number == self.round and attempt > self.attempts and seen != Step.LEFT:
            return RoundAborted(
                Phase.ADVERTISE_KEYS,
                0,
                self.config.min_cohort,
                because="The coordinator was set back: it knows of no such attempt.",
            )
        event = None
        if live is not None and round_number == self.round:
            if live.number > attempt:
                event = live.event(silo, Step.NOTHING)
            elif seen != Step.LEFT:
                return live.event(silo, seen)
        if event is None and key is not None:
            self._check_key(key)  # CHECK: next-key
        return event

    def sum_blob(self, round_number: int) -> Blob:
        """A round's sum.

        Raises:
            NotFound: the round has no result.
        """
        if not 0 < round_number < self.round:  # CHECK: sum-round
            raise NotFound("round-unknown", f"Round {round_number} has no result.")
        return self.blob(self.sum_name(round_number), self.sums[round_number - 1])

    def weights_blob(self, task: str) -> Blob:
        """A task's initial weights.

        Raises:
            NotFound: it has none, or is not open.
        """
        weights = self.tasks[task].weights if task in self.tasks else None
        if weights is None:  # CHECK: weights-known
            raise NotFound("weights-unknown", f"Task {task} has no initial weights.")
        return self.blob(self.weights_name(task), weights)

    def doing(self, silo: SiloId) -> str:
        """What a silo was last seen doing, in one word of the protocol's."""
        live = self.attempt
        if live is not None and silo in live.descriptor.cohort:
            if silo not in live.server.expected:
                return "dropped"
            phase = live.server.phase or Phase.UNMASKING
            return f"{phase} sent" if silo in live.server.arrived else str(phase)
        if silo in self.ready_for:
            return "ready"
        return "training" if silo in self.last_call else "away"

    # What time does.

    def tick(self, now: float) -> bool:
        """Close what is due and open what can be; return whether anything changed."""
        if self.state is not State.ACTIVE:
            return False
        if self._expire_proposals(now) or self._mind_keys(now):
            return True
        live = self.attempt
        if live is None:
            return self._open_attempt(now)
        if not live.complete(self.means.manifest().silos.keys()) and now < live.deadline:
            return False
        self._close_phase(live, now)
        return True

    def due(self) -> float:
        """When ``tick`` has something to do at the latest, by the driver's clock."""
        if self.state is not State.ACTIVE:
            return math.inf
        proposals = min((p.deadline for p in self._proposals.values()), default=math.inf)
        if self.keys is not None:
            proposals = min(proposals, self.keys.due(), self._bridges.due())
        if self.attempt is not None:
            return min(self.attempt.deadline, proposals)
        floor = len(self._largest_group()[1]) >= self.config.min_cohort
        train = self.ready_since + self.config.train_deadline if floor else math.inf
        return min(train, proposals)

    def _expire_proposals(self, now: float) -> bool:
        """Let somebody else propose what its proposer has not."""
        late = [task for task, proposal in self._proposals.items() if now >= proposal.deadline]
        for task in late:
            self._proposals.pop(task).discard()
        return bool(late)

    def _open_attempt(self, now: float) -> bool:
        present = self._present()
        everybody = bool(present) and present <= self.ready_for.keys()
        if not everybody and now < self.ready_since + self.config.train_deadline:
            return False
        task, cohort = self._largest_group()
        if len(cohort) < self.config.min_cohort:
            return False
        self._start(task, cohort, now)
        return self.attempt is not None

    def _present(self) -> set[SiloId]:
        """Who could be in the next attempt."""
        return set(self.config.silos) & self.means.manifest().silos.keys() - self.excluded

    def _largest_group(self) -> tuple[str, tuple[SiloId, ...]]:
        ready = {silo: self.ready_for[silo] for silo in self._present() & self.ready_for.keys()}
        tasks = sorted(set(ready.values()))
        groups = {task: tuple(sorted(s for s in ready if ready[s] == task)) for task in tasks}
        return max(groups.items(), key=lambda item: len(item[1]), default=("", ()))

    def _start(self, task: str, cohort: tuple[SiloId, ...], now: float) -> None:
        manifest = self.means.manifest()
        if not set(cohort) <= manifest.silos.keys():
            return  # somebody was revoked just now: the next look forms a cohort without it
        key = None if self.keys is None else self.keys.key
        opening = self.opening(task, self.attempts + 1, cohort, manifest, key)
        descriptor = describe(opening, self.means.identity, self.means.entropy)
        self.note_attempt(opening, descriptor, now)
        self._log(lambda: records.attempt_opened(descriptor, manifest))

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
        self.note_broadcast(live, broadcast, now)
        self._log(lambda: records.phase_closed(phase))

    def _abort_attempt(self, live: Attempt, error: RoundAborted) -> None:
        self.last_abort = (self.round, live.number, error)
        self.aborts[live.number] = error
        self._exclude(live, error)
        self._log(
            lambda: records.attempt_aborted(self.round, self.aborts, self.ready_for, self.excluded),
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
        self.excluded |= out
        if len(self._present()) < self.config.min_cohort:
            self.excluded.clear()

    def _release(self, live: Attempt, result: Result) -> None:
        total = self.ring(live).pack(cast(Vector, live.server.total))
        stored = Stored(len(total), live.server.total_digests)
        with _border():
            self.means.disk.replace(self.sum_name(result.round), total)
        self.note_result(result, stored)
        self._log(lambda: records.released(result, stored), lasting=True, clear=True)
        self._drop_attempt()
        self.end_if_done()
        if self.state is not State.ACTIVE:
            self._bridges.clear()

    def _drop_attempt(self) -> None:
        """Forget the attempt and its vectors; after the record that makes them superfluous."""
        if self.attempt is not None:
            self.attempt.close()
        self.attempt = None
        self.means.disk.remove(f"{self.folder}/spool")

    # What was written down.

    def _log(
        self, make: Callable[[], pb.Record], *, lasting: bool = False, clear: bool = False
    ) -> None:
        """Write a step down. If that fails in whatever way, memory is ahead: nobody may go on."""
        with _border():
            data = make().SerializeToString(deterministic=True)
            self.means.journal.append(self.session_id, data, lasting=lasting, clear=clear)
        if clear:
            self._changes.clear()

    def _attempt(self, silo: SiloId, round_number: int, attempt: int) -> Attempt:
        self._check_active()  # CHECK: attempt-active
        if round_number < self.round:  # CHECK: attempt-round-over
            raise TooLate("round-over", f"Round {round_number} has its result.")
        if round_number == self.round and attempt in self.aborts:  # CHECK: attempt-aborted
            raise _again(self.aborts[attempt])
        live = self.attempt
        if live is None or (round_number, attempt) != (
            self.round,
            live.number,
        ):  # CHECK: attempt-known
            raise FaultyClient(silo, "attempt-unknown", "There is no such attempt.")
        return live

    def _check_task(self, task: str) -> None:
        if task not in {known.name for known in self.config.tasks}:  # CHECK: session-task
            raise NotFound("task-unknown", f"Session {self.config.name} has no task {task!r}.")

    def _check_active(self) -> None:
        if self.state is not State.ACTIVE:  # CHECK: session-active
            raise SessionEnded("session-over", f"Session {self.config.name} is {self.state}.")


def _again(error: RoundAborted) -> RoundAborted:
    """The same to raise once more: a stored exception would gather the frames of all callers."""
    return RoundAborted(
        error.phase, error.have, error.need, blamed=error.blamed, because=error.because
    )
