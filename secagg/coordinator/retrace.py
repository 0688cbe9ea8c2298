"""Bringing a session back: every record of the journal leads where it led when it was written.

Signatures and digests are checked again on the way, so that what is summed after a restart is what
was accepted before it.
"""

from __future__ import annotations

from collections.abc import Iterable

from secagg.config import SiloId
from secagg.coordinator import records
from secagg.coordinator.session import Session
from secagg.coordinator.spool import Spooled, damaged
from secagg.coordinator.standing import Means
from secagg.coordinator.state import Attempt, State
from secagg.crypto.labels import SIGN_DESCRIPTOR, SIGN_RESULT
from secagg.crypto.sign import verify
from secagg.errors import (
    ConfigError,
    MalformedMessage,
    SecaggError,
    StorageBusy,
    StorageDamaged,
    StorageFailed,
)
from secagg.masking import transcript
from secagg.masking.messages import MaskedInput
from secagg.suite import KeyName
from secagg.wire import attempt as wire
from secagg.wire import session as wire_session
from secagg.wire._pb import journal_pb2 as pb


def restore(rows: Iterable[bytes], means: Means, now: float) -> Session:
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
        session = Session(config, made.session_id, means, made.key, made.creator)
        steps = _Retrace(session)
        for record in others:
            steps.take(record, now)
    except (ConfigError, StorageBusy, StorageDamaged, StorageFailed):
        raise
    except (SecaggError, LookupError, ValueError) as error:
        raise damaged(
            f"the records of session {made.config.name} contradict each other ({error})"
        ) from None
    _tidy(session)
    return session


class _Retrace:
    """Takes a session's steps again."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def take(self, record: pb.Record, now: float) -> None:
        """Take one step again."""
        match record.WhichOneof("record"):
            case "task_opened":
                self._task(record.task_opened)
            case "keyed":
                self._key(record.keyed)
            case "said_ready":
                self._session.note_ready(
                    SiloId(record.said_ready.silo), record.said_ready.task, now
                )
            case "took_back":
                self._session.note_left(SiloId(record.took_back.silo))
            case "attempt_opened":
                self._opening(record.attempt_opened, now)
            case "accepted":
                self._message(record.accepted)
            case "phase_closed":
                self._closing(record.phase_closed, now)
            case "attempt_aborted":
                self._abort(record.attempt_aborted, now)
            case "released":
                self._result(record.released)
            case "ended":
                self._session.state = State(record.ended.state)
            case _:
                # CHECK: retrace-created-once
                raise damaged(f"session {self._session.config.name} was created twice")

    def _task(self, opened: pb.TaskOpened) -> None:
        signed = wire_session.opening_from_wire(opened.opening)
        weights = records.stored_of(opened.weights) if signed.weights_bytes else None
        if weights is not None:
            weights.open(self._session.means.disk, self._session.weights_name(signed.opening.task))
        self._session.note_task(signed, weights)

    def _opening(self, opened: pb.AttemptOpened, now: float) -> None:
        descriptor = wire.descriptor_from_wire(opened.descriptor)
        manifest = records.manifest_of(opened.members)
        if manifest.digest() != descriptor.manifest_digest:  # CHECK: retrace-manifest
            raise damaged(f"an attempt of session {self._session.config.name} has another manifest")
        opening = self._session.opening(
            descriptor.task, descriptor.attempt, descriptor.cohort, manifest, descriptor.key
        )
        expected = (
            self._session.session_id,
            self._session.session_hash,
            self._session.round,
            opening.base,
        )
        found = (descriptor.session_id, descriptor.session_hash, descriptor.round, descriptor.base)
        keys = self._session.keys
        if descriptor.key != (keys.key if keys else None):  # CHECK: retrace-descriptor-key
            raise damaged(f"an attempt of session {self._session.config.name} has another key")
        self._check_origin(  # CHECK: retrace-descriptor-origin
            found == expected,
            SIGN_DESCRIPTOR,
            transcript.round_transcript(descriptor),
            b"",
            descriptor.signature,
        )
        self._session.note_attempt(opening, descriptor, now)

    def _key(self, keyed: pb.Keyed) -> None:
        desk, name = self._session.keys, self._session.config.name
        if desk is None:  # CHECK: retrace-key-unused
            raise damaged(f"session {name} has a key and seals nothing")
        key = KeyName(keyed.epoch, keyed.key_id) if keyed.key_id else None
        follows = keyed.epoch > desk.epoch if key is None else keyed.epoch == desk.epoch
        if not follows or (key is not None and desk.key is not None):  # CHECK: retrace-epochs
            raise damaged(f"the epochs of session {name}'s keys do not follow each other")
        members = {SiloId(member.name): member.key for member in keyed.members}
        self._session.note_key(keyed.epoch, key, members)

    def _closing(self, closed: pb.PhaseClosed, now: float) -> None:
        live = self._live()
        if str(live.server.phase) != closed.phase:  # CHECK: retrace-phase
            raise damaged(f"session {self._session.config.name} closes a phase that is not open")
        self._session.note_broadcast(live, live.server.close_phase(), now)

    def _check_origin(
        self, same: bool, kind: str, tau: bytes, body: bytes, signature: bytes
    ) -> None:
        """Return if a signed record is of this very coordinator and of this version's making."""
        try:
            # CHECK: retrace-signature
            verify(self._session.means.identity.public, kind, tau, body, signature)
        except MalformedMessage:
            same = False
        if not same:  # CHECK: retrace-origin
            raise ConfigError(
                "state-of-another",
                f"Session {self._session.config.name} in the state directory was signed with "
                "another identity key than this coordinator's, or hashed by another version of "
                "secagg.",
                "Start with the key and the version that wrote it, or with an empty directory.",
            )

    def _message(self, accepted: pb.Accepted) -> None:
        live = self._live()
        message = wire.client_message_from_wire(accepted.message)
        vector = None
        if isinstance(message, MaskedInput):
            name = self._session.vector_name(live, message.sender)
            stored = records.stored_of(accepted.vector)
            blob, dtype = self._session.blob(name, stored), self._session.ring(live).dtype
            vector = Spooled.open(blob, dtype)
        live.server.accept(message, vector)

    def _abort(self, aborted: pb.AttemptAborted, now: float) -> None:
        for message in aborted.aborted:
            error = wire_session.aborted_from_wire(message)
            self._session.attempts, self._session.aborts[message.attempt] = message.attempt, error
            self._session.last_abort = (message.round, message.attempt, error)
        for ready in aborted.ready:
            self._session.note_ready(SiloId(ready.silo), ready.task, now)
        self._session.excluded = {SiloId(name) for name in aborted.excluded}

    def _result(self, released: pb.Released) -> None:
        result = wire.result_from_wire(released.result)
        stored = records.stored_of(released.sum)
        stored.open(self._session.means.disk, self._session.sum_name(result.round))
        tau4 = transcript.result_transcript(result.survivors_transcript, result.vector_digest)
        same = (result.round, result.base) == (self._session.round, self._session.base(result.task))
        # CHECK: retrace-result-origin
        self._check_origin(same, SIGN_RESULT, tau4, result.body(), result.signature)
        self._session.note_result(result, stored)
        self._session.end_if_done()

    def _live(self) -> Attempt:
        if self._session.attempt is None:  # CHECK: retrace-attempt
            raise damaged(f"session {self._session.config.name} has a message of no attempt")
        return self._session.attempt


def _tidy(session: Session) -> None:
    """Remove what no record speaks of: uploads that were never committed."""
    known = {session.sum_name(number) for number in range(1, session.round)}
    known |= {session.weights_name(name) for name, task in session.tasks.items() if task.weights}
    live = session.attempt
    if live is not None:
        known |= {session.vector_name(live, silo) for silo in live.server.committed}
    for name in session.means.disk.names(session.folder):
        if name not in known:
            session.means.disk.remove(name)
