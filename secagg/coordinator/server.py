"""The server: port, limits, health, sessions, graceful stop."""

from __future__ import annotations

import asyncio
import logging
import shutil
import signal
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, Final

import grpc
import structlog
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1._async import HealthServicer

from secagg.config import MAX_CHUNK_BYTES
from secagg.coordinator.manifests import Manifests
from secagg.coordinator.servicer import Sessions, fresh, handlers
from secagg.coordinator.settings import Settings
from secagg.coordinator.tls import ServerCertificate
from secagg.errors import ConfigError, CredentialError
from secagg.pki.credentials import load_credentials
from secagg.pki.names import Role

MAX_REQUEST_BYTES: Final = MAX_CHUNK_BYTES + 64 * 1024
FORCE_SECONDS: Final = 5.0


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
    """
    credentials = load_credentials(
        settings.credentials, now=datetime.now(UTC), role=Role.COORDINATOR
    )
    if credentials.identity_key is None:
        raise CredentialError("key-malformed", "The coordinator has no identity key.")
    settings.state.mkdir(parents=True, exist_ok=True, mode=0o700)
    shutil.rmtree(settings.state / "sessions", ignore_errors=True)  # of a process that is gone
    (settings.state / "sessions").mkdir(mode=0o700)
    sessions = Sessions(settings, Manifests(credentials), credentials.identity_key, fresh)
    health = _Health()
    server = _server(settings, sessions, health)
    port = _bind(server, settings, ServerCertificate(credentials))
    stop = _stop_signal()  # before anybody can know that calls are served
    await server.start()
    await health.set("", health_pb2.HealthCheckResponse.SERVING)
    structlog.get_logger().info("serving", port=port, consortium=credentials.identity.consortium)
    announce(port)
    await stop.wait()
    structlog.get_logger().info("stopping", grace=settings.grace)
    try:
        async with asyncio.timeout(settings.grace + FORCE_SECONDS):
            await health.enter_graceful_shutdown()
            await sessions.stop()
            await server.stop(settings.grace)
    except TimeoutError:  # seen once in many stops: gRPC waits for a connection that is gone
        structlog.get_logger().warning("stop-forced")
        return False
    return True


class _Health(HealthServicer):  # type: ignore[misc]
    """grpc.health.v1 without its stream: every call of this server is unary."""

    async def Watch(  # noqa: N802 - the contract's name
        self, request: health_pb2.HealthCheckRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> None:
        """Refuse: a stream a caller would never end."""
        await context.abort(grpc.StatusCode.UNIMPLEMENTED, "call Check")


def _server(settings: Settings, sessions: Sessions, health: HealthServicer) -> grpc.aio.Server:
    server = grpc.aio.server(
        maximum_concurrent_rpcs=settings.max_concurrent_calls,
        options=[
            ("grpc.max_receive_message_length", MAX_REQUEST_BYTES),
            ("grpc.max_send_message_length", -1),
            ("grpc.max_metadata_size", settings.max_metadata_bytes),
            ("grpc.absolute_max_metadata_size", settings.max_metadata_bytes),
            ("grpc.so_reuseport", 0),
            ("grpc.keepalive_time_ms", 60_000),
            ("grpc.http2.max_ping_strikes", 5),
        ],
    )
    server.add_generic_rpc_handlers(tuple(handlers(sessions)))
    health_pb2_grpc.add_HealthServicer_to_server(health, server)
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
