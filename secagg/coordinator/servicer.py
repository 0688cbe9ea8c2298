"""The contract over gRPC: parse, say who is calling, run the method, translate the refusal."""

from __future__ import annotations

import asyncio
import functools
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from typing import Any, Final

import grpc
import structlog
from google.protobuf.message import DecodeError, Message

from secagg.config import SiloId
from secagg.coordinator.calls import METHODS, How, Method, Sent, find
from secagg.coordinator.driver import Driver, Stopping
from secagg.coordinator.identity import caller, check_role
from secagg.coordinator.limits import Limits
from secagg.coordinator.places import Context, Places
from secagg.coordinator.quotas import Quotas, TooSlow, TryLater
from secagg.coordinator.session import Session
from secagg.coordinator.sessions import Sessions
from secagg.coordinator.status import CODE_KEY, RETRY_KEY, status_of
from secagg.errors import (
    MalformedMessage,
    QuotaExceeded,
    SecaggError,
    StorageDamaged,
    StorageFailed,
)
from secagg.masking.manifest import Manifest
from secagg.pki.names import Identity, Role
from secagg.wire._pb import service_pb2 as api
from secagg.wire.chunks import PutChunkRequest

CHUNKS: Final = frozenset({"PutChunk", "GetChunk"})
CHUNK_THREADS: Final = 16
MAX_QUESTION_BYTES: Final = 64 * 1024
"""Of a request that may wait for an event: it is kept meanwhile."""
MAX_DETAILS: Final = 500
"""Characters of a refusal's text: it may quote the caller, and clients bound what they read."""


class Servicer:
    """Serves the contract's methods and drives the sessions.

    Args:
        sessions: all of them, restored.
        manifest: gives the newest verified manifest.
        fail: called when something could not be written down, or is not what was written: the
            process has to end.
        limits: what each member may ask for.
    """

    def __init__(
        self,
        sessions: Sessions,
        manifest: Callable[[], Manifest],
        fail: Callable[[SecaggError], None],
        limits: Limits,
    ) -> None:
        self._sessions = sessions
        self._manifest = manifest
        self._fail = fail
        self._limits = limits
        self._quotas = Quotas(limits)
        self._slots = defaultdict[tuple[Identity, bool], asyncio.Semaphore](
            lambda: asyncio.Semaphore(limits.messages_at_once)
        )
        self._drivers: dict[bytes, Driver] = {}
        # Chunks of one upload wait for each other and for the disk: not where sessions advance.
        self._chunks = ThreadPoolExecutor(CHUNK_THREADS, "chunks")
        self._drive()

    def wake(self) -> None:
        """Let all sessions look at what has changed around them."""
        for driver in self._drivers.values():
            driver.wake()

    async def stop(self) -> None:
        """Stop driving."""
        for driver in self._drivers.values():
            await driver.stop()

    def register(self, server: grpc.aio.Server) -> None:
        """Have a server call the contract's methods here, and all that there are not.

        Methods are registered one by one, so each has a queue of its own for calls that gRPC has
        not handed over yet: a flood of one of them, or of none that there is, crowds out no other.
        """
        for service in api.DESCRIPTOR.services_by_name.values():
            add = server.add_registered_method_handlers  # type: ignore[attr-defined]  # newer than stubs
            add(service.full_name, self._methods(service))
        server.add_generic_rpc_handlers((_Others(self.begin),))

    async def begin(self, context: Context, method: str = "?", asked: Any = None) -> Any:
        """Count a call of a method that is not the contract's by its caller, or refuse it.

        Args:
            context: the call's.
            method: for the log.
            asked: what parses its request; None if that is not to be taken in.

        Returns:
            The request.
        """
        who = None
        try:
            who = caller(context, self._manifest)
            places = Places(context)
            self._enter_quota(who, places, context)
            if asked is not None:
                return await self._receive(method, asked, who, places, context)
        except SecaggError as error:
            await self._refuse(method, who, error, context)
        return None

    def _methods(self, service: Any) -> dict[str, grpc.RpcMethodHandler[Any, Any]]:
        # A unary call looks the same on the wire, but a handler of streams is called before the
        # message has come: who may not call never has a byte of it received.
        return {
            method.name: grpc.stream_unary_rpc_method_handler(
                functools.partial(
                    self._serve,
                    method.name,
                    _request(method.input_type.name),
                    getattr(api, method.output_type.name),
                )
            )
            for method in service.methods
        }

    async def _serve(
        self,
        name: str,
        asked: Any,
        told: Callable[[], Message],
        _: Any,
        context: Context,
    ) -> bytes | None:
        who, log, places = None, structlog.get_logger(), Places(context)
        method = METHODS[name]
        try:
            who = caller(context, self._manifest)
            self._enter_quota(who, places, context)  # CHECK: quota-entered
            check_role(who, method.role)  # CHECK: method-role
            request = await self._receive(name, asked, who, places, context)
            # A message may outlast its sender's membership.
            caller(context, self._manifest)  # CHECK: caller-again
            reply = await self._run(method, request, SiloId(who.name), places) or told()
            data = reply.SerializeToString()
            self._quotas.charge(who, len(data))
        except Stopping as error:
            await context.abort(grpc.StatusCode.UNAVAILABLE, error.observed)
        except (StorageDamaged, StorageFailed) as error:
            self._fail(error)
        except SecaggError as error:
            await self._refuse(name, who, error, context)
        except Exception as error:  # noqa: BLE001 - the border: told and logged as internal
            log.error("internal", method=name, peer=_name(who), kind=type(error).__name__)
            await context.abort(grpc.StatusCode.INTERNAL, "internal error")
        else:
            if method.role is Role.ADMIN and method.how is How.WORKS:
                log.info("admin", method=name, admin=who.name)
            return data
        return None

    async def _refuse(
        self, name: str, who: Identity | None, error: SecaggError, context: Context
    ) -> None:
        status, trailing = status_of(error), [(CODE_KEY, error.code)]
        count = 1
        if isinstance(error, TryLater):
            trailing.append((RETRY_KEY, str(error.milliseconds)))
        if isinstance(error, TryLater) or who is None:  # no quota bounds how often: the log does
            count = self._quotas.refusals(who, time.monotonic())
        if count:
            more = {"count": count} if count > 1 else {}
            structlog.get_logger().info(
                "refused",
                method=name,
                peer=_name(who),
                code=error.code,
                status=status.name,
                **more,
            )
        context.set_trailing_metadata(tuple(trailing))
        text = " ".join(part for part in (error.observed, error.remedy) if part)
        await context.abort(status, text[:MAX_DETAILS])

    def _enter_quota(self, who: Identity, places: Places, context: Context) -> None:
        self._quotas.enter(who, time.monotonic())
        places.hold(lambda: self._quotas.leave(who))
        _check_headers(context, self._limits.max_metadata_bytes)

    async def _receive(
        self, name: str, asked: Any, who: Identity, places: Places, context: Context
    ) -> Any:
        """Wait for a call's turn, and only then take its request in.

        A slot is kept while a large message may be in memory: to the end of the call, when its
        reply has been read; but one who waits for an event has sent little and frees it meanwhile.
        """
        slots = self._slots[who, name in CHUNKS]
        await slots.acquire()
        if name not in METHODS or METHODS[name].how is How.WAITS:
            try:
                data = await self._message(who, context)
            finally:
                slots.release()
            if len(data) > MAX_QUESTION_BYTES:  # CHECK: question-size
                raise MalformedMessage("message-size", "No request of this kind is so long.")
        else:
            places.hold(slots.release)
            data = await self._message(who, context)
        return _parse(asked, data)

    async def _message(self, who: Identity, context: Context) -> bytes:
        try:
            async with asyncio.timeout(self._limits.message_seconds):
                data = await context.read()
        except TimeoutError:
            raise TooSlow(
                "message-slow", "The request did not arrive in time.", "Try again."
            ) from None
        if not isinstance(data, bytes):  # CHECK: message-none
            raise MalformedMessage("message-encoding", "The call came without a request.")
        self._quotas.charge(who, len(data))
        return data

    async def _run(self, method: Method, request: Any, peer: SiloId, places: Places) -> Sent | None:
        now = time.monotonic()
        session = find(method, self._sessions, request, peer, now)
        if session is None:
            work = functools.partial(method.handle, self._sessions, request, peer, now)
            reply = await places.work(self._apart(work))
            self._drive()
        else:
            reply = await self._enter(session, method, request, peer, places)
        return await places.work(self._apart(reply, self._chunks)) if callable(reply) else reply

    async def _apart(self, work: Callable[[], Any], pool: Executor | None = None) -> Any:
        """Run in a worker thread; a failed disk is heard of though the caller has hung up."""
        try:
            return await asyncio.get_running_loop().run_in_executor(pool, work)
        except (StorageDamaged, StorageFailed) as error:
            self._fail(error)
            raise

    async def _enter(
        self, session: Session, method: Method, request: Any, peer: SiloId, places: Places
    ) -> Any:
        driver = self._driver(session)
        handle = functools.partial(method.handle, session, request, peer)
        match method.how:
            case How.LOOKS:
                return await driver.look(handle, time.monotonic())
            case How.WORKS:
                return await places.work(driver.call(handle, time.monotonic()))
            case How.WAITS:
                return await driver.wait(functools.partial(self._look, method, request, peer))

    def _look(self, method: Method, request: Any, peer: SiloId) -> Any:
        """Look once more for one who waits, if it is still somebody who may."""
        now = time.monotonic()
        session = find(method, self._sessions, request, peer, now)
        return method.handle(session, request, peer, now)

    def _drive(self) -> None:
        """Have a driver for each session that there is, and for no other."""
        there = self._sessions.all()
        known = {session.session_id for session in there}
        self._drivers = {name: d for name, d in self._drivers.items() if name in known}
        for session in there:
            self._driver(session)

    def _driver(self, session: Session) -> Driver:
        if session.session_id not in self._drivers:
            self._drivers[session.session_id] = Driver(session, self._fail)
        return self._drivers[session.session_id]


class _Others(grpc.GenericRpcHandler):  # type: ignore[type-arg]  # generic in the stubs alone
    """Methods that there are not: who calls them is counted nevertheless.

    Args:
        begin: counts a call, or refuses it.
    """

    def __init__(self, begin: Callable[[Context], Awaitable[None]]) -> None:
        self._begin = begin

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[Any, Any]:
        """Handle all there are."""
        return grpc.stream_unary_rpc_method_handler(self._refuse)

    async def _refuse(self, _: Any, context: Context) -> None:
        await self._begin(context)
        await context.abort(grpc.StatusCode.UNIMPLEMENTED, "There is no such method.")


def _check_headers(context: Context, most: int) -> None:
    """Return if a call's headers are no larger than they may be.

    gRPC itself refuses larger ones, but only once its peer has acknowledged to have heard of the
    limit: before that, it takes in 16 MiB.
    """
    size = sum(len(key) + len(value) for key, value in context.invocation_metadata() or ())
    if size > most:  # CHECK: metadata-size
        raise QuotaExceeded("metadata-size", f"The call's headers have {size} bytes.")


def _request(name: str) -> Any:
    """What parses a request; a chunk's data are left where they are."""
    return PutChunkRequest if name == PutChunkRequest.__name__ else getattr(api, name)


def _parse(kind: Any, data: bytes) -> Any:
    try:
        return kind.FromString(data)
    except DecodeError:
        raise MalformedMessage("message-encoding", "The bytes are no such request.") from None


def _name(who: Identity | None) -> str:
    return who.name if who else "?"
