"""HTTP/2 frame by frame, over a member's TLS connection: for clients that gRPC would never be."""

from __future__ import annotations

import os
import select
import socket
import ssl
from typing import Any

import h2.connection
import h2.events
import h2.exceptions
import h2.settings

from secagg.pki.names import Role

from .serving import Server

METADATA = [
    (":method", "POST"),
    (":scheme", "https"),
    (":authority", "coordinator"),
    ("content-type", "application/grpc"),
    ("te", "trailers"),
]


def path(method: str, service: str = "Aggregation") -> str:
    return f"/secagg.v1.{service}/{method}"


def frame(message: bytes, declared: int | None = None) -> bytes:
    """A gRPC message with its head, which may declare another length than it has."""
    length = len(message) if declared is None else declared
    return b"\0" + length.to_bytes(4, "big") + message


class Connection:
    """One HTTP/2 connection of a member's.

    Args:
        reads: whether it lets the server send any part of a reply.
    """

    def __init__(self, server: Server, role: Role, name: str, *, reads: bool = True) -> None:
        self.socket = server.handshake(server.consortium.pair(role, name), ssl.TLSVersion.TLSv1_3)
        self.h2 = h2.connection.H2Connection()
        self.events: list[h2.events.Event] = []
        self.closed = False
        self.h2.initiate_connection()
        if not reads:
            self.h2.update_settings({h2.settings.SettingCodes.INITIAL_WINDOW_SIZE: 0})
        self.flush()

    def flush(self) -> None:
        data = self.h2.data_to_send()
        if data:
            self.socket.sendall(data)

    def begin(self, where: str, *more: tuple[str, str]) -> int:
        """Send a call's headers; returns its stream."""
        stream: int = self.h2.get_next_available_stream_id()
        self.h2.send_headers(stream, [*METADATA[:3], (":path", where), *METADATA[3:], *more])
        self.flush()
        return stream

    def send(self, stream: int, data: bytes, end: bool = False) -> None:
        self.h2.send_data(stream, data, end_stream=end)
        self.flush()

    def take(self, seconds: float) -> bool:
        """Take in what has come, or comes in this time; whether there was anything."""
        if self.closed or not (self.socket.pending() or _readable(self.socket, seconds)):
            return False
        try:
            data = self.socket.recv(65536)
        except (ConnectionError, ssl.SSLError):
            data = b""
        if not data:
            self.closed = True
            return False
        try:
            self.events += self.h2.receive_data(data)
            self.flush()
        except h2.exceptions.ProtocolError:  # it takes nothing after a GOAWAY
            pass
        return True

    def until(self, kind: type[Any], seconds: float = 10.0, **fields: Any) -> Any:
        """The first event of a kind; fails if the connection ends or time passes before."""
        while True:
            for event in self.events:
                if isinstance(event, kind) and all(
                    getattr(event, key) == value for key, value in fields.items()
                ):
                    return event
            assert self.take(seconds), (kind, fields, self.closed, self.events)

    def trailers(self, stream: int, seconds: float = 10.0) -> dict[str, str]:
        """How a call ended."""
        self.until(h2.events.StreamEnded, seconds, stream_id=stream)
        found: dict[str, str] = {}
        for event in self.events:
            if (
                isinstance(event, h2.events.ResponseReceived | h2.events.TrailersReceived)
                and event.stream_id == stream
            ):
                found |= {_text(key): _text(value) for key, value in event.headers}
        return found

    def settled(self) -> None:
        """Return when the server has read all that was sent, and we all that it sent before."""
        before = sum(isinstance(event, h2.events.PingAckReceived) for event in self.events)
        self.h2.ping(os.urandom(8))
        self.flush()
        while sum(isinstance(e, h2.events.PingAckReceived) for e in self.events) == before:
            assert self.take(10.0)

    def reset(self, stream: int) -> None:
        self.h2.reset_stream(stream)
        self.flush()

    def room(self, stream: int) -> int:
        """How much the server takes of a call."""
        return int(self.h2.local_flow_control_window(stream))

    def fill(self, stream: int, size: int) -> None:
        """Send so much of a message, as soon as the server takes it."""
        while size:
            part = min(self.room(stream), self.h2.max_outbound_frame_size, size)
            if part:
                self.send(stream, bytes(part))
                size -= part
            else:
                assert self.take(10.0)

    def drained(self, seconds: float) -> bool:
        """Read to the end; whether there is one within this time of silence."""
        while self.take(seconds):
            pass
        return self.closed

    def close(self) -> None:
        self.socket.close()


def _readable(sock: socket.socket, seconds: float) -> bool:
    return bool(select.select([sock], [], [], seconds)[0])


def _text(value: bytes | str) -> str:
    return value.decode() if isinstance(value, bytes) else value
