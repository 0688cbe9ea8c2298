"""The server: state, port, limits, health, sessions, graceful stop.

Crash-only: what must not be lost is in the journal before anybody hears of it, so a start after a
stop and a start after a kill are the same start, and where the disk fails the process just ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import signal
import sys
import time
from collections.abc import Awaitable, Callable
from contextlib import closing
from datetime import UTC, datetime
from typing import Any, Final, NoReturn

import grpc
import structlog
from grpc_health.v1 import health_pb2
from grpc_health.v1._async import HealthServicer

from secagg.config import MAX_CHUNK_BYTES
from secagg.coordinator.limits import Limits
from secagg.coordinator.manifests import Manifests
from secagg.coordinator.places import Context
from secagg.coordinator.servicer import Servicer
from secagg.coordinator.sessions import Sessions
from secagg.coordinator.settings import Settings
from secagg.coordinator.sqlite import SqliteJournal
from secagg.coordinator.standing import Means
from secagg.coordinator.tls import ServerCertificate
from secagg.crypto.sign import IdentityKey
from secagg.disk import LocalDisk
from secagg.errors import EXIT_CODES, ConfigError, SecaggError
from secagg.pki.credentials import load_credentials
from secagg.pki.names import Role

MAX_REQUEST_BYTES: Final = MAX_CHUNK_BYTES + 64 * 1024
FORCE_SECONDS: Final = 5.0
LOOK_SECONDS: Final = 2.0
"""How often the manifest is looked at when nobody calls."""


def configure_logging(settings: Settings) -> None:
    """Structured logs on standard error."""
    renderer: structlog.typing.Processor = (
        structlog.processors.JSONRenderer()
        if settings.log_format == "json"
        else structlog.dev.ConsoleRenderer()
    )
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(
            getattr(logging, settings.log_level.upper())
        ),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )


async def serve(settings: Settings, announce: Callable[[int], None]) -> bool:
    """Serve until SIGTERM or SIGINT, then let calls in flight end.

    Args:
        settings: checked configuration.
        announce: called with the bound port once calls are served.

    Returns:
        Whether everything ended within the grace; if not, the process has to be left by force.

    Raises:
        CredentialError: the coordinator's credentials cannot be used.
        ConfigError: the port cannot be bound.
        StorageInUse: another coordinator works in the state directory.
        StorageDamaged: what lies there is not what was written.
    """
    credentials = load_credentials(
        settings.credentials, now=datetime.now(UTC), role=Role.COORDINATOR
    )
    assert credentials.identity_key is not None  # admins alone have none
    manifests = Manifests(credentials)
    disk = LocalDisk(settings.state)
    with disk.lock(), closing(SqliteJournal(settings.state)) as journal:
        sessions = _sessions(settings, manifests, credentials.identity_key, disk, journal)
        servicer = Servicer(sessions, manifests, _die, settings.limits)
        health = _Health(servicer.begin)
        server = _server(settings.limits, servicer, health)
        port = _bind(server, settings, ServerCertificate(credentials))
        stop = _stop_signal()  # before anybody can know that calls are served
        await server.start()
        await health.set("", health_pb2.HealthCheckResponse.SERVING)
        log = structlog.get_logger()
        log.info("serving", port=port, consortium=credentials.identity.consortium)
        announce(port)
        await _follow_manifest(manifests, servicer, stop)
        log.info("stopping", grace=settings.grace)
        try:
            async with asyncio.timeout(settings.grace + FORCE_SECONDS):
                await health.enter_graceful_shutdown()
                await servicer.stop()
                await server.stop(settings.grace)
        except TimeoutError:  # seen once in many stops: gRPC waits for a connection that is gone
            log.warning("stop-forced")
            return False
    return True


def _sessions(
    settings: Settings,
    manifests: Manifests,
    identity: IdentityKey,
    disk: LocalDisk,
    journal: SqliteJournal,
) -> Sessions:
    means = Means(
        manifest=manifests,
        signed_manifest=lambda: manifests.signed.to_json(),  # noqa: PLW0108 - the newest
        identity=identity,
        disk=disk,
        journal=journal,
        entropy=secrets.token_bytes,
        limits=settings.limits,
    )
    sessions = Sessions(means)
    began = time.monotonic()
    sessions.restore(began)
    structlog.get_logger().info(
        "restored", sessions=len(sessions.all()), seconds=round(time.monotonic() - began, 3)
    )
    return sessions


def _die(error: SecaggError) -> NoReturn:
    """End the process at once: what the disk did not take, or changed, must not be seen."""
    structlog.get_logger().error("dying", code=error.code, observed=error.observed)
    print(error, file=sys.stderr, flush=True)  # noqa: T201 - nobody is left to print it
    os._exit(EXIT_CODES[type(error)])


async def _follow_manifest(manifests: Manifests, servicer: Servicer, stop: asyncio.Event) -> None:
    """Until the stop: wake the sessions when the authority's list of members has changed."""
    while not stop.is_set():
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(stop.wait(), LOOK_SECONDS)
        if manifests.poll():
            servicer.wake()


class _Health(HealthServicer):  # type: ignore[misc]
    """grpc.health.v1 without its stream, which a caller would never end.

    Args:
        begin: counts a call and takes its request in, or refuses it.
    """

    def __init__(self, begin: Callable[[Context, str, Any], Awaitable[Any]]) -> None:
        super().__init__()
        self._begin = begin

    async def check(self, _: Any, context: Context) -> bytes:
        """Say how the server is, to any member."""
        request = await self._begin(context, "Check", health_pb2.HealthCheckRequest)
        reply = await self.Check(request, context)
        return bytes(reply.SerializeToString())


def transport(limits: Limits) -> list[tuple[str, int]]:
    """gRPC's options: what bounds a connection that no handler of ours sees."""

    def milliseconds(seconds: float) -> int:
        return max(1, round(1000 * seconds))

    return [
        ("grpc.max_receive_message_length", MAX_REQUEST_BYTES),
        ("grpc.max_send_message_length", -1),
        ("grpc.max_metadata_size", limits.max_metadata_bytes),
        ("grpc.absolute_max_metadata_size", limits.max_metadata_bytes),
        ("grpc.so_reuseport", 0),
        ("grpc.keepalive_time_ms", 60_000),
        ("grpc.keepalive_timeout_ms", 10_000),  # and how long a peer may leave data unacknowledged
        ("grpc.http2.max_ping_strikes", 5),
        ("grpc.http2.settings_timeout", milliseconds(limits.handshake_seconds)),
        ("grpc.max_allowed_incoming_connections", limits.max_connections),
        ("grpc.server_handshake_timeout_ms", milliseconds(limits.handshake_seconds)),
        ("grpc.http2.bdp_probe", 0),  # else 4 MiB of a call that nobody reads yet are taken in
        ("grpc.max_concurrent_streams", limits.streams_per_connection),
        ("grpc.max_connection_idle_ms", milliseconds(limits.idle_seconds)),
        ("grpc.max_connection_age_ms", milliseconds(limits.connection_seconds)),
        ("grpc.max_connection_age_grace_ms", milliseconds(limits.connection_grace_seconds)),
    ]


def _server(limits: Limits, servicer: Servicer, health: HealthServicer) -> grpc.aio.Server:
    server = grpc.aio.server(
        maximum_concurrent_rpcs=limits.max_concurrent_calls, options=transport(limits)
    )
    check = grpc.stream_unary_rpc_method_handler(health.check)
    add = server.add_registered_method_handlers  # type: ignore[attr-defined]  # newer than stubs
    add("grpc.health.v1.Health", {"Check": check})
    servicer.register(server)
    return server


def _bind(server: grpc.aio.Server, settings: Settings, certificate: ServerCertificate) -> int:
    try:
        return server.add_secure_port(settings.listen, certificate.credentials())
    except RuntimeError:
        raise ConfigError(
            "listen", f"{settings.listen} cannot be bound.", "Is another server running there?"
        ) from None


def _stop_signal() -> asyncio.Event:
    """An event that SIGTERM and SIGINT set."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    return stop
