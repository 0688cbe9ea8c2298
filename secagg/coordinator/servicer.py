"""The contract over gRPC: parse, say who is calling, run the method, translate the refusal."""

from __future__ import annotations

import asyncio
import functools
import operator
import time
from collections.abc import Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from typing import Any, Final, TypeAlias

import grpc
import structlog
from google.protobuf.message import DecodeError, Message

from secagg.config import SiloId
from secagg.coordinator.calls import METHODS, How, Method, Sent, find
from secagg.coordinator.driver import Driver, Stopping
from secagg.coordinator.identity import caller
from secagg.coordinator.session import Session
from secagg.coordinator.sessions import Sessions
from secagg.coordinator.status import CODE_KEY, status_of
from secagg.errors import MalformedMessage, SecaggError, StorageDamaged, StorageFailed
from secagg.masking.manifest import Manifest
from secagg.pki.names import Role
from secagg.wire._pb import service_pb2 as api
from secagg.wire.chunks import PutChunkRequest

Context: TypeAlias = grpc.aio.ServicerContext[Any, Any]
CHUNK_THREADS: Final = 16
MAX_DETAILS: Final = 500
"""Characters of a refusal's text: it may quote the caller, and clients bound what they read."""


class Servicer:
    """Serves the contract's methods and drives the sessions.

    Args:
        sessions: all of them, restored.
        manifest: gives the newest verified manifest.
        fail: called when something could not be written down, or is not what was written: the
            process has to end.
    """

    def __init__(
        self,
        sessions: Sessions,
        manifest: Callable[[], Manifest],
        fail: Callable[[SecaggError], None],
    ) -> None:
        self._sessions = sessions
        self._manifest = manifest
        self._fail = fail
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

    def handlers(self) -> list[grpc.GenericRpcHandler[Any, Any]]:
        """The contract's services as gRPC handlers."""
        return [self._handler(service) for service in api.DESCRIPTOR.services_by_name.values()]

    def _handler(self, service: Any) -> grpc.GenericRpcHandler[Any, Any]:
        methods = {
            method.name: grpc.unary_unary_rpc_method_handler(
                functools.partial(self._serve, method.name, getattr(api, method.output_type.name)),
                request_deserializer=functools.partial(_parse, _request(method.input_type.name)),
                response_serializer=operator.methodcaller("SerializeToString"),
            )
            for method in service.methods
        }
        return grpc.method_handlers_generic_handler(service.full_name, methods)

    async def _serve(
        self, name: str, kind: Callable[[], Message], request: Any, context: Context
    ) -> Sent | None:
        peer, log = "?", structlog.get_logger()
        method = METHODS[name]
        try:
            peer = caller(context, self._manifest, method.role).name
            if request is None:
                raise MalformedMessage("message-encoding", "The bytes are no such request.")
            reply = await self._run(method, request, SiloId(peer))
        except Stopping as error:
            await context.abort(grpc.StatusCode.UNAVAILABLE, error.observed)
        except (StorageDamaged, StorageFailed) as error:
            self._fail(error)
        except SecaggError as error:
            status = status_of(error)
            log.info("refused", method=name, peer=peer, code=error.code, status=status.name)
            context.set_trailing_metadata(((CODE_KEY, error.code),))
            text = " ".join(part for part in (error.observed, error.remedy) if part)
            await context.abort(status, text[:MAX_DETAILS])
        except Exception as error:  # noqa: BLE001 - the border: told and logged as internal
            log.error("internal", method=name, peer=peer, kind=type(error).__name__)
            await context.abort(grpc.StatusCode.INTERNAL, "internal error")
        else:
            if method.role is Role.ADMIN and method.how is How.WORKS:
                log.info("admin", method=name, admin=peer)
            return reply or kind()
        return None

    async def _run(self, method: Method, request: Any, peer: SiloId) -> Sent | None:
        now = time.monotonic()
        session = find(method, self._sessions, request, peer, now)
        if session is None:
            work = functools.partial(method.handle, self._sessions, request, peer, now)
            reply = await asyncio.shield(self._apart(work))
            self._drive()
        else:
            reply = await self._enter(session, method, request, peer)
        return await asyncio.shield(self._apart(reply, self._chunks)) if callable(reply) else reply

    async def _apart(self, work: Callable[[], Any], pool: Executor | None = None) -> Any:
        """Run in a worker thread; a failed disk is heard of though the caller has hung up."""
        try:
            return await asyncio.get_running_loop().run_in_executor(pool, work)
        except (StorageDamaged, StorageFailed) as error:
            self._fail(error)
            raise

    async def _enter(self, session: Session, method: Method, request: Any, peer: SiloId) -> Any:
        driver = self._driver(session)
        handle = functools.partial(method.handle, session, request, peer)
        match method.how:
            case How.LOOKS:
                return await driver.look(handle, time.monotonic())
            case How.WORKS:
                return await driver.call(handle, time.monotonic())
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


def _request(name: str) -> Any:
    """What parses a request; a chunk's data are left where they are."""
    return PutChunkRequest if name == PutChunkRequest.__name__ else getattr(api, name)


def _parse(kind: Any, data: bytes) -> Any:
    """A request, or None: its sender is told so once it is known who that is."""
    try:
        return kind.FromString(data)
    except DecodeError:
        return None
