"""The wire contract's methods, without a wire: a request of a known caller in, a reply out.

Every method runs with its session to itself. What it returns is the reply; None if there is nothing
to say yet, where the method may wait; or a function that gives the reply, to be run after the
session has been let go, since it is slow and needs nothing but files. Refusals are our own errors.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any, Final, TypeAlias

from google.protobuf.message import Message

from secagg.ckks.custody import KeyBox
from secagg.config import SiloId
from secagg.coordinator.bridges import gone
from secagg.coordinator.session import Session
from secagg.coordinator.sessions import Sessions
from secagg.coordinator.spool import Blob, Upload
from secagg.coordinator.state import Ended, Event
from secagg.errors import MalformedMessage, NotFound, RoleRefused, RoundAborted
from secagg.masking import messages as core
from secagg.pki.names import Role
from secagg.suite import KeyName
from secagg.wire import attempt as wire
from secagg.wire import custody as wire_custody
from secagg.wire import session as wire_session
from secagg.wire._pb import service_pb2 as api
from secagg.wire.chunks import GetChunkReply, PutChunkRequest

RESULTS_A_PAGE: Final = 100
Sent: TypeAlias = Message | GetChunkReply
Reply: TypeAlias = Sent | Callable[[], Sent] | None


class How(Enum):
    """How a method uses its session."""

    LOOKS = "quick"
    WORKS = "hashes, adds, or writes to disk"
    WAITS = "quick, and asked again on every change until it has a reply"


@dataclass(frozen=True, slots=True)
class Method:
    """One method of the contract.

    Args:
        role: whose certificates may call it.
        how: it uses its session.
        session: finds the session that a request is about; None where it is about all.
        handle: (session, request, caller, now) to the reply; ``Sessions`` for one about all.
    """

    role: Role
    how: How
    session: Callable[[Sessions, Any], Session] | None
    handle: Callable[[Any, Any, SiloId, float], Reply]


METHODS: Final[dict[str, Method]] = {}
"""By name, as in the contract."""


def find(
    method: Method, sessions: Sessions, request: Any, caller: SiloId, now: float
) -> Session | None:
    """Return the session that a request is about, if the caller may call about it.

    Raises:
        NotFound: there is no such session.
        RoleRefused: the caller takes no part in it.
    """
    if method.session is None:
        return None
    session = method.session(sessions, request)
    if method.role is Role.SILO:
        session.check_member(caller, now)  # CHECK: call-member
    return session


def _by_id(sessions: Sessions, request: Any) -> Session:
    return sessions.by_id(request.session_id)


def _by_name(sessions: Sessions, request: Any) -> Session:
    return sessions.by_name(request.name)


def _joined(sessions: Sessions, request: api.JoinSessionRequest) -> Session:
    return sessions.by_name(request.session)


def _method(
    role: Role, how: How, session: Callable[[Sessions, Any], Session] | None = _by_id
) -> Callable[[Callable[[Any, Any, SiloId, float], Reply]], None]:
    def register(handle: Callable[[Any, Any, SiloId, float], Reply]) -> None:
        METHODS[handle.__name__] = Method(role, how, session, handle)

    return register


# For silos. Their names are the contract's.


@_method(Role.SILO, How.LOOKS, _joined)
def JoinSession(  # noqa: N802
    session: Session, request: api.JoinSessionRequest, silo: SiloId, now: float
) -> Reply:
    """What the session is, and the newest manifest."""
    return api.JoinSessionReply(
        session_id=session.session_id,
        config=wire_session.config_to_wire(session.config),
        manifest=session.signed_manifest(),
    )


@_method(Role.SILO, How.WAITS)
def OpenTask(  # noqa: N802
    session: Session, request: api.OpenTaskRequest, silo: SiloId, now: float
) -> Reply:
    """A task's opening, or a request to propose it."""
    found = session.open_task(silo, request.task, now)
    if isinstance(found, wire_session.SignedOpening):
        return api.OpenTaskReply(opening=wire_session.opening_to_wire(found))
    return api.OpenTaskReply(propose=True) if found else None


@_method(Role.SILO, How.WORKS)
def ProposeTask(  # noqa: N802
    session: Session, request: api.ProposeTaskRequest, silo: SiloId, now: float
) -> Reply:
    """A task's opening, from the silo that was asked."""
    signed = wire_session.opening_from_wire(request.opening)
    _check_sender(signed.proposer, silo)  # CHECK: opening-sender
    session.propose_task(silo, signed)
    return api.Ack()


@_method(Role.SILO, How.WORKS)
def Ready(session: Session, request: api.ReadyRequest, silo: SiloId, now: float) -> Reply:  # noqa: N802
    """An update exists."""
    session.ready(silo, request.task, request.base, now, wire.key_from_wire(request))
    return api.Ack()


@_method(Role.SILO, How.WAITS)
def AskKey(session: Session, request: api.AskKeyRequest, silo: SiloId, now: float) -> Reply:  # noqa: N802
    """The session's key: a box with it, or a request to make it."""
    asked = wire_custody.request_from_wire(request.request)
    _check_sender(asked.silo, silo)  # CHECK: key-request-sender
    answer = session.ask_key(silo, asked, now)
    match answer:
        case KeyBox():
            return api.AskKeyReply(box=wire_custody.box_to_wire(answer))
        case bool():
            return api.AskKeyReply(make=True) if answer else None
        case _:
            return api.AskKeyReply(epoch=answer)


@_method(Role.SILO, How.WORKS)
def AnnounceKey(  # noqa: N802
    session: Session, request: api.AnnounceKeyRequest, silo: SiloId, now: float
) -> Reply:
    """The key of an epoch is made."""
    session.announce_key(silo, _key(request), tuple(SiloId(name) for name in request.members))
    return api.Ack()


@_method(Role.SILO, How.WAITS)
def AwaitKeyRequests(  # noqa: N802
    session: Session, request: api.AwaitKeyRequestsRequest, silo: SiloId, now: float
) -> Reply:
    """Who asks for the key."""
    waiting = session.key_requests(silo, _key(request))
    wanted = session.checkpoints_wanted(silo, now)
    if not waiting and not wanted:
        return None
    return api.AwaitKeyRequestsReply(
        requests=[wire_custody.request_to_wire(r) for r in waiting],
        checkpoints=[api.CheckpointWish(task=task, results=n) for task, n in wanted],
    )


@_method(Role.SILO, How.WORKS)
def SendKeyBox(session: Session, request: api.SendKeyBoxRequest, silo: SiloId, now: float) -> Reply:  # noqa: N802
    """The key, for one silo that asked."""
    box = wire_custody.box_from_wire(request.box)
    _check_sender(box.sender, silo)  # CHECK: key-box-sender
    session.send_key_box(silo, box)
    return api.Ack()


@_method(Role.SILO, How.WORKS)
def EndKey(session: Session, request: api.EndKeyRequest, silo: SiloId, now: float) -> Reply:  # noqa: N802
    """A sum did not open."""
    session.end_key(silo, _key(request), request.round)
    return api.Ack()


@_method(Role.SILO, How.WAITS)
def AskCheckpoint(  # noqa: N802
    session: Session, request: api.AskCheckpointRequest, silo: SiloId, now: float
) -> Reply:
    """Other silos' checkpoints, once there are enough."""
    wish = request.wish
    found = session.ask_checkpoint(silo, wish.task, wish.results, wish.need, request.refused, now)
    if not found:
        return None
    return api.AskCheckpointReply(
        checkpoints=[wire_custody.checkpoint_to_wire(checkpoint) for checkpoint in found]
    )


@_method(Role.SILO, How.WORKS)
def OfferCheckpoint(  # noqa: N802
    session: Session, request: api.OfferCheckpointRequest, silo: SiloId, now: float
) -> Reply:
    """A checkpoint for others."""
    checkpoint = wire_custody.checkpoint_from_wire(request.checkpoint)
    _check_sender(checkpoint.sender, silo)  # CHECK: checkpoint-offer-sender
    session.offer_checkpoint(silo, checkpoint)
    return api.Ack()


def _key(request: Any) -> KeyName:
    key = wire.key_from_wire(request)
    if key is None:  # CHECK: key-name
        raise MalformedMessage("key-name", "A message about a key names none.")
    return key


@_method(Role.SILO, How.WORKS)
def Leave(session: Session, request: api.LeaveRequest, silo: SiloId, now: float) -> Reply:  # noqa: N802
    """No update exists any more."""
    session.leave(silo)
    return api.Ack()


@_method(Role.SILO, How.WAITS)
def Next(session: Session, request: api.NextRequest, silo: SiloId, now: float) -> Reply:  # noqa: N802
    """What comes after what the silo has seen."""
    key = wire.key_from_wire(request)
    event = session.next(silo, request.round, request.attempt, request.seen, key)
    return None if event is None else _told(event, request.attempt, request.round)


@_method(Role.SILO, How.WORKS)
def Send(session: Session, request: api.SendRequest, silo: SiloId, now: float) -> Reply:  # noqa: N802
    """One message of an attempt."""
    message = wire.client_message_from_wire(request)
    _check_sender(message.sender, silo)  # CHECK: message-sender
    session.send(message, request.round, request.attempt)
    return api.Ack()


@_method(Role.SILO, How.LOOKS)
def PutChunk(  # noqa: N802
    session: Session, request: PutChunkRequest, silo: SiloId, now: float
) -> Reply:
    """One chunk of a vector, of initial weights or of a checkpoint."""
    blob, total = request.blob, request.total
    match blob.WhichOneof("of"):
        case "vector":
            where = blob.vector
            upload = session.vector_upload(silo, where.round, where.attempt, total)
        case "weights":
            upload = session.weights_upload(silo, blob.weights, total, now)
        case "checkpoint":
            offered = blob.checkpoint
            _check_sender(offered.sender, silo)  # CHECK: checkpoint-upload-sender
            upload = session.checkpoint_upload(silo, offered.task, offered.digest, total, now)
        case _:
            raise MalformedMessage("blob-kind", "Sums are not uploaded.")  # CHECK: upload-kind
    return functools.partial(_put, upload, request.offset, request.data)


def _put(upload: Upload, offset: int, data: memoryview) -> Sent:
    upload.put(offset, data)
    return api.Ack()


@_method(Role.SILO, How.LOOKS)
def GetChunk(  # noqa: N802
    session: Session, request: api.GetChunkRequest, silo: SiloId, now: float
) -> Reply:
    """One chunk of a sum, of initial weights or of a checkpoint."""
    match request.blob.WhichOneof("of"):
        case "sum":
            stored = session.sum_blob(request.blob.sum)
        case "weights":
            stored = session.weights_blob(request.blob.weights)
        case "checkpoint":
            wanted = request.blob.checkpoint
            offer = session.checkpoint_blob(silo, wanted.task, wanted.sender, wanted.digest, now)
            return functools.partial(_get_offer, offer, request.offset)
        case _:
            # CHECK: download-kind
            raise MalformedMessage("blob-kind", "Vectors are not downloaded.")
    return functools.partial(_get, stored, request.offset)


def _get(stored: Blob, offset: int) -> Sent:
    return GetChunkReply(stored.chunk(offset))


def _get_offer(stored: Blob, offset: int) -> Sent:
    try:
        return _get(stored, offset)
    except NotFound as error:  # its file may go at any time
        raise (gone() if error.code == "session-unknown" else error) from None


@_method(Role.SILO, How.LOOKS)
def ListResults(  # noqa: N802
    session: Session, request: api.ListResultsRequest, silo: SiloId, now: float
) -> Reply:
    """Signed results after a round."""
    page = session.results[request.after : request.after + RESULTS_A_PAGE]
    return api.ListResultsReply(results=[wire.result_to_wire(result) for result in page])


# For admins.


@_method(Role.ADMIN, How.WORKS, None)
def CreateSession(  # noqa: N802
    sessions: Sessions, request: api.CreateSessionRequest, admin: SiloId, now: float
) -> Reply:
    """Create a session."""
    session = sessions.create(request.config, request.key, admin)
    return api.CreateSessionReply(session_id=session.session_id)


@_method(Role.ADMIN, How.LOOKS, None)
def ListSessions(  # noqa: N802
    sessions: Sessions, request: api.ListSessionsRequest, admin: SiloId, now: float
) -> Reply:
    """All sessions."""
    return api.ListSessionsReply(sessions=[_summary(s) for s in sessions.all()])


@_method(Role.ADMIN, How.LOOKS, _by_name)
def ShowSession(  # noqa: N802
    session: Session, request: api.ShowSessionRequest, admin: SiloId, now: float
) -> Reply:
    """One session: its configuration, its silos, its results."""
    live = session.attempt
    reply = api.ShowSessionReply(
        summary=_summary(session),
        config=wire_session.config_to_wire(session.config),
        session_id=session.session_id,
        round=session.round,
        attempt=live.number if live else 0,
        phase=str(live.server.phase) if live and live.server.phase else "",
        silos=[_silo_state(session, silo, now) for silo in session.config.silos],
        results=[wire.result_to_wire(result) for result in session.results],
    )
    if session.last_abort is not None:
        round_number, attempt, error = session.last_abort
        reply.last_abort.CopyFrom(wire_session.aborted_to_wire(error, round_number, attempt))
    return reply


@_method(Role.ADMIN, How.WORKS, _by_name)
def AbortSession(  # noqa: N802
    session: Session, request: api.AbortSessionRequest, admin: SiloId, now: float
) -> Reply:
    """End a session."""
    session.abort()
    return api.Ack()


def _told(  # noqa: PLR0911 - one line an event
    event: Event, attempt: int, round_number: int
) -> api.NextReply:
    match event:
        case core.Descriptor():
            return api.NextReply(descriptor=wire.descriptor_to_wire(event))
        case core.Roster():
            return api.NextReply(roster=wire.roster_to_wire(event))
        case core.Dealt():
            return api.NextReply(dealt=wire.dealt_to_wire(event))
        case core.Survivors():
            return api.NextReply(survivors=wire.survivors_to_wire(event))
        case core.Signatures():
            return api.NextReply(signatures=wire.signatures_to_wire(event))
        case core.Result():
            return api.NextReply(result=wire.result_to_wire(event))
        case RoundAborted():
            aborted = wire_session.aborted_to_wire(event, round_number, attempt)
            return api.NextReply(aborted=aborted)
        case Ended():
            return api.NextReply(ended=event.why)


def _check_sender(named: str, silo: SiloId) -> None:
    if named != silo:  # CHECK: sender-identity
        raise RoleRefused(
            "sender-identity", "A message names another silo than the certificate does."
        )


def _summary(session: Session) -> api.SessionSummary:
    return api.SessionSummary(
        name=session.config.name,
        state=session.state,
        protection=session.config.protection,
        silos=len(session.config.silos),
        results=len(session.results),
    )


def _silo_state(session: Session, silo: SiloId, now: float) -> api.SiloState:
    last = session.last_call.get(silo)
    age = -1.0 if last is None else now - last
    return api.SiloState(name=silo, state=session.doing(silo), last_call_age=age)
