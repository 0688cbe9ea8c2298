"""The wire contract's methods: parse, say who is calling, pass on, translate the refusal."""

from __future__ import annotations

import asyncio
import functools
import secrets
import shutil
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Final, TypeAlias, TypeVar

import grpc
import structlog
from google.protobuf.message import DecodeError

from secagg.config import SessionConfig, SiloId
from secagg.coordinator.driver import Driver
from secagg.coordinator.identity import caller
from secagg.coordinator.manifests import Manifests
from secagg.coordinator.session import Ended, Event, Session, State
from secagg.coordinator.settings import Settings
from secagg.coordinator.spool import read_chunk
from secagg.coordinator.status import CODE_KEY, status_of
from secagg.crypto.secret import Entropy
from secagg.crypto.sign import IdentityKey
from secagg.errors import (
    Conflict,
    MalformedMessage,
    NotFound,
    QuotaExceeded,
    RoleRefused,
    RoundAborted,
    SecaggError,
)
from secagg.masking import messages as core
from secagg.pki.names import Role
from secagg.wire import attempt as wire
from secagg.wire import session as wire_session
from secagg.wire._pb import service_pb2 as api

Context: TypeAlias = grpc.aio.ServicerContext[Any, Any]
R = TypeVar("R")
RESULTS_A_PAGE: Final = 100
MAX_DETAILS: Final = 500
"""Characters of a refusal's text: it may quote the caller, and clients bound what they read."""


class Sessions:
    """All sessions of this coordinator, by id and by name."""

    def __init__(
        self, settings: Settings, manifests: Manifests, identity: IdentityKey, entropy: Entropy
    ) -> None:
        self.manifests = manifests
        self._settings = settings
        self._identity = identity
        self._entropy = entropy
        self._drivers: dict[bytes, Driver] = {}

    def create(self, message: api.SessionConfig) -> Session:
        """Create a session and start driving it.

        Raises:
            MalformedMessage: the configuration cannot be a session.
            Conflict: an active session has that name.
            QuotaExceeded: too many are active.
        """
        if not message.silos:
            message.silos.extend(sorted(self.manifests().silos))
        config = wire_session.config_from_wire(message)
        self._check(config)
        session_id = self._entropy(32)
        session = Session(
            config,
            session_id,
            self.manifests,
            self._identity,
            self._settings.state / "sessions" / session_id.hex(),
            entropy=self._entropy,
            max_weights_bytes=self._settings.max_weights_bytes,
        )
        self._drivers[session_id] = Driver(session)
        return session

    def _check(self, config: SessionConfig) -> None:
        manifest = self.manifests()
        if config.consortium != manifest.consortium:
            raise MalformedMessage(
                "session-consortium", f"This coordinator serves consortium {manifest.consortium}."
            )
        if unknown := set(config.silos) - manifest.silos.keys():
            raise MalformedMessage("session-silos", f"No such silos: {sorted(unknown)}.")
        for driver in self._drivers.values():
            if driver.session.config.name == config.name and driver.session.state is State.ACTIVE:
                raise Conflict("admin", "session-name", f"Session {config.name} is active.")
        if len(self._drivers) >= self._settings.max_sessions:
            self._forget_oldest()

    def _forget_oldest(self) -> None:
        """Make room: the oldest session that is over goes, with its sums."""
        for session_id, driver in self._drivers.items():
            if driver.session.state is not State.ACTIVE:
                del self._drivers[session_id]
                shutil.rmtree(driver.session.directory, ignore_errors=True)
                return
        raise QuotaExceeded("session-count", "This coordinator drives no more sessions at once.")

    def by_id(self, session_id: bytes) -> Driver:
        """Return a session's driver.

        Raises:
            NotFound: there is no such session.
        """
        if session_id not in self._drivers:
            raise NotFound("session-unknown", "There is no such session at this coordinator.")
        return self._drivers[session_id]

    def by_name(self, name: str) -> Driver:
        """Return the newest session of a name.

        Raises:
            NotFound: there is none.
        """
        for driver in reversed(self._drivers.values()):
            if driver.session.config.name == name:
                return driver
        raise NotFound(
            "session-unknown",
            f"There is no session named {name!r} at this coordinator.",
            "An admin creates it with `secagg session create`.",
        )

    def all(self) -> list[Session]:
        """All sessions, oldest first."""
        return [driver.session for driver in self._drivers.values()]

    async def stop(self) -> None:
        """Stop driving."""
        for driver in self._drivers.values():
            await driver.stop()


def _method(
    role: Role,
) -> Callable[
    [Callable[[Any, Any, SiloId], Awaitable[R]]], Callable[[Any, Any, Context], Awaitable[R]]
]:
    """Wrap a method: who is calling, and what a refusal looks like on the wire."""

    def wrap(
        method: Callable[[Any, Any, SiloId], Awaitable[R]],
    ) -> Callable[[Any, Any, Context], Awaitable[R]]:
        @functools.wraps(method)
        async def serve(self: Any, request: Any, context: Context) -> R:
            name = "?"
            try:
                identity = caller(context, self.sessions.manifests, role)
                name = identity.name
                if request is None:
                    raise MalformedMessage("message-encoding", "The bytes are no such request.")
                return await method(self, request, SiloId(name))
            except SecaggError as error:
                status = status_of(error)
                structlog.get_logger().info(
                    "refused",
                    method=method.__name__,
                    peer=name,
                    code=error.code,
                    status=status.name,
                )
                context.set_trailing_metadata(((CODE_KEY, error.code),))
                text = " ".join(part for part in (error.observed, error.remedy) if part)
                await context.abort(status, text[:MAX_DETAILS])
            except Exception as error:  # noqa: BLE001 - the border: told and logged as internal
                structlog.get_logger().error(
                    "internal", method=method.__name__, peer=name, kind=type(error).__name__
                )
                await context.abort(grpc.StatusCode.INTERNAL, "internal error")

        return serve

    return wrap


class Aggregation:
    """The service for silos."""

    def __init__(self, sessions: Sessions) -> None:
        self.sessions = sessions

    def _enter(self, session_id: bytes, silo: SiloId) -> Driver:
        driver = self.sessions.by_id(session_id)
        driver.session.check_member(silo, time.monotonic())
        return driver

    @_method(Role.SILO)
    async def JoinSession(  # noqa: N802 - the contract's names
        self, request: api.JoinSessionRequest, silo: SiloId
    ) -> api.JoinSessionReply:
        """What the session is."""
        session = self.sessions.by_name(request.session).session
        session.check_member(silo, time.monotonic())
        return api.JoinSessionReply(
            session_id=session.session_id,
            config=wire_session.config_to_wire(session.config),
            manifest=self.sessions.manifests.signed.to_json(),
        )

    @_method(Role.SILO)
    async def OpenTask(  # noqa: N802
        self, request: api.OpenTaskRequest, silo: SiloId
    ) -> api.OpenTaskReply:
        """A task's opening, or a request to propose it."""
        driver = self._enter(request.session_id, silo)

        def look() -> api.OpenTaskReply | None:
            found = driver.session.open_task(silo, request.task, time.monotonic())
            if isinstance(found, wire_session.SignedOpening):
                return api.OpenTaskReply(opening=wire_session.opening_to_wire(found))
            return api.OpenTaskReply(propose=True) if found else None

        return await driver.wait(look) or api.OpenTaskReply()

    @_method(Role.SILO)
    async def ProposeTask(  # noqa: N802
        self, request: api.ProposeTaskRequest, silo: SiloId
    ) -> api.Ack:
        """A task's opening, from the silo that was asked."""
        driver = self._enter(request.session_id, silo)
        signed = wire_session.opening_from_wire(request.opening)
        _check_sender(signed.proposer, silo)
        await driver.call(driver.session.propose_task, silo, signed)
        return api.Ack()

    @_method(Role.SILO)
    async def Ready(self, request: api.ReadyRequest, silo: SiloId) -> api.Ack:  # noqa: N802
        """An update exists."""
        driver = self._enter(request.session_id, silo)
        await driver.call(driver.session.ready, silo, request.task, request.base, time.monotonic())
        return api.Ack()

    @_method(Role.SILO)
    async def Leave(self, request: api.LeaveRequest, silo: SiloId) -> api.Ack:  # noqa: N802
        """No update exists any more."""
        driver = self._enter(request.session_id, silo)
        await driver.call(driver.session.leave, silo)
        return api.Ack()

    @_method(Role.SILO)
    async def Next(self, request: api.NextRequest, silo: SiloId) -> api.NextReply:  # noqa: N802
        """What comes after what the silo has seen."""
        driver = self._enter(request.session_id, silo)
        session = driver.session

        def look() -> tuple[Event, int] | None:
            event = session.next(silo, request.round, request.attempt, request.seen)
            return None if event is None else (event, request.attempt)

        found = await driver.wait(look)
        return api.NextReply() if found is None else _reply(*found, request.round)

    @_method(Role.SILO)
    async def Send(self, request: api.SendRequest, silo: SiloId) -> api.Ack:  # noqa: N802
        """One message of an attempt."""
        driver = self._enter(request.session_id, silo)
        message = wire.client_message_from_wire(request)
        _check_sender(message.sender, silo)
        await driver.call(driver.session.send, message, request.round, request.attempt)
        return api.Ack()

    @_method(Role.SILO)
    async def PutChunk(self, request: api.PutChunkRequest, silo: SiloId) -> api.Ack:  # noqa: N802
        """One chunk of a vector or of initial weights."""
        driver = self._enter(request.session_id, silo)
        blob, total = request.blob, request.total
        match blob.WhichOneof("of"):
            case "vector":
                upload = await driver.look(
                    driver.session.vector_upload,
                    silo,
                    blob.vector.round,
                    blob.vector.attempt,
                    total,
                )
            case "weights":
                upload = await driver.look(driver.session.weights_upload, silo, blob.weights, total)
            case _:
                raise MalformedMessage("blob-kind", "Only vectors and weights are uploaded.")
        await asyncio.to_thread(upload.put, request.offset, request.data)
        return api.Ack()

    @_method(Role.SILO)
    async def GetChunk(  # noqa: N802
        self, request: api.GetChunkRequest, silo: SiloId
    ) -> api.GetChunkReply:
        """One chunk of a sum or of initial weights."""
        session = self._enter(request.session_id, silo).session
        path: Path
        match request.blob.WhichOneof("of"):
            case "sum":
                path = session.sum_path(request.blob.sum)
            case "weights":
                path = session.weights_path(request.blob.weights)
            case _:
                raise MalformedMessage("blob-kind", "Only sums and weights are downloaded.")
        chunk = session.config.chunk_bytes
        return api.GetChunkReply(
            data=await asyncio.to_thread(read_chunk, path, request.offset, chunk)
        )

    @_method(Role.SILO)
    async def ListResults(  # noqa: N802
        self, request: api.ListResultsRequest, silo: SiloId
    ) -> api.ListResultsReply:
        """Signed results after a round."""
        session = self._enter(request.session_id, silo).session
        page = session.results[request.after : request.after + RESULTS_A_PAGE]
        return api.ListResultsReply(results=[wire.result_to_wire(result) for result in page])


class Admin:
    """The service for admins."""

    def __init__(self, sessions: Sessions) -> None:
        self.sessions = sessions

    @_method(Role.ADMIN)
    async def CreateSession(  # noqa: N802
        self, request: api.CreateSessionRequest, admin: SiloId
    ) -> api.CreateSessionReply:
        """Create a session."""
        session = self.sessions.create(request.config)
        structlog.get_logger().info("session-created", session=session.config.name, admin=admin)
        return api.CreateSessionReply(session_id=session.session_id)

    @_method(Role.ADMIN)
    async def ListSessions(  # noqa: N802
        self, request: api.ListSessionsRequest, admin: SiloId
    ) -> api.ListSessionsReply:
        """All sessions."""
        return api.ListSessionsReply(sessions=[_summary(s) for s in self.sessions.all()])

    @_method(Role.ADMIN)
    async def ShowSession(  # noqa: N802
        self, request: api.ShowSessionRequest, admin: SiloId
    ) -> api.ShowSessionReply:
        """One session: its configuration, its silos, its results."""
        driver = self.sessions.by_name(request.name)
        return await driver.look(_shown, driver.session)

    @_method(Role.ADMIN)
    async def AbortSession(  # noqa: N802
        self, request: api.AbortSessionRequest, admin: SiloId
    ) -> api.Ack:
        """End a session."""
        driver = self.sessions.by_name(request.name)
        await driver.call(driver.session.abort)
        structlog.get_logger().info("session-aborted", session=request.name, admin=admin)
        return api.Ack()


def _reply(  # noqa: PLR0911 - one line an event
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
    if named != silo:
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


def _shown(session: Session) -> api.ShowSessionReply:
    live = session.attempt
    reply = api.ShowSessionReply(
        summary=_summary(session),
        config=wire_session.config_to_wire(session.config),
        session_id=session.session_id,
        round=session.round,
        attempt=live.number if live else 0,
        phase=str(live.server.phase) if live and live.server.phase else "",
        silos=[_silo_state(session, silo) for silo in session.config.silos],
        results=[wire.result_to_wire(result) for result in session.results],
    )
    if session.last_abort is not None:
        round_number, attempt, error = session.last_abort
        reply.last_abort.CopyFrom(wire_session.aborted_to_wire(error, round_number, attempt))
    return reply


def _silo_state(session: Session, silo: SiloId) -> api.SiloState:
    last = session.last_call.get(silo)
    age = -1.0 if last is None else time.monotonic() - last
    return api.SiloState(name=silo, state=session.doing(silo), last_call_age=age)


def handlers(sessions: Sessions) -> list[grpc.GenericRpcHandler[Any, Any]]:
    """The contract's services as gRPC handlers."""
    descriptor = api.DESCRIPTOR.services_by_name
    return [
        _handler(descriptor["Aggregation"], Aggregation(sessions)),
        _handler(descriptor["Admin"], Admin(sessions)),
    ]


def _handler(service: Any, servicer: object) -> grpc.GenericRpcHandler[Any, Any]:
    methods = {
        method.name: grpc.unary_unary_rpc_method_handler(
            getattr(servicer, method.name),
            request_deserializer=functools.partial(_parse, getattr(api, method.input_type.name)),
            response_serializer=getattr(api, method.output_type.name).SerializeToString,
        )
        for method in service.methods
    }
    return grpc.method_handlers_generic_handler(service.full_name, methods)


def _parse(kind: Any, data: bytes) -> Any:
    """A request, or None: its sender is told so once it is known who that is."""
    try:
        return kind.FromString(data)
    except DecodeError:
        return None


def fresh(size: int) -> bytes:
    """The coordinator's entropy."""
    return secrets.token_bytes(size)
