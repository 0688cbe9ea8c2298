"""A TLS connection with HTTP/2 made by hand, for what no gRPC library would send."""

from __future__ import annotations

import select
import socket
import ssl
import struct
import time
from collections.abc import Mapping
from pathlib import Path
from tempfile import NamedTemporaryFile
from types import TracebackType
from typing import Final, Self

from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.events import (
    DataReceived,
    Event,
    RemoteSettingsChanged,
    ResponseReceived,
    StreamEnded,
    StreamReset,
    TrailersReceived,
    WindowUpdated,
)
from h2.exceptions import ProtocolError
from h2.settings import SettingCodes

from secagg.pki.names import server_dns_name
from threat_model.attacks.evil_silo import Pair
from threat_model.attacks.stage import CONSORTIUM

SOCKET_SECONDS: Final = 30.0
_BITS: Final = 2**31 - 1


def frame(message: bytes, *, declared: int | None = None) -> bytes:
    """A message as gRPC frames it, of a length that may be a lie."""
    return struct.pack(">BI", 0, len(message) if declared is None else declared) + message


class Raw:
    """One connection; a context manager.

    Args:
        port: the coordinator's, on this machine.
        pair: who it is.
        root: the authority, PEM.
        deaf: acknowledge nothing that it is told, so that nobody can insist on it.

    Attributes:
        ended: by stream, its headers and trailers, once it has ended; "reset" if it was cut off.
        alive: whether the other side has not closed it.
    """

    def __init__(self, port: int, pair: Pair, root: bytes, *, deaf: bool = False) -> None:
        context = ssl.create_default_context(cadata=root.decode())
        with NamedTemporaryFile() as file:
            Path(file.name).write_bytes(pair.certificate + pair.key)
            context.load_cert_chain(file.name)
        context.set_alpn_protocols(["h2"])
        plain = socket.create_connection(("127.0.0.1", port), SOCKET_SECONDS)
        self._socket = context.wrap_socket(plain, server_hostname=server_dns_name(CONSORTIUM))
        self._http = H2Connection(H2Configuration(header_encoding="utf-8"))
        self._deaf = deaf
        self._told: dict[int, dict[str, str]] = {}
        self.ended: dict[int, Mapping[str, str]] = {}
        self.alive = True
        self._http.initiate_connection()
        self._http.increment_flow_control_window(2**30)
        self.flush()
        self._settled = False
        self.wait(lambda: self._settled)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._socket.close()

    def forget_limits(self) -> None:
        """Do not keep to what the other side allows."""
        self._http.remote_settings[SettingCodes.MAX_CONCURRENT_STREAMS] = _BITS
        self._http.remote_settings.acknowledge()

    def flush(self) -> None:
        """Send what is to be sent."""
        try:
            self._socket.sendall(self._http.data_to_send())
        except OSError:
            self.alive = False

    def call(self, method: str, headers: Mapping[str, str] | None = None) -> int:
        """Begin a call; returns its stream."""
        stream = self._http.get_next_available_stream_id()
        fixed = {
            ":method": "POST",
            ":scheme": "https",
            ":path": f"/secagg.v1.Aggregation/{method}",
            ":authority": server_dns_name(CONSORTIUM),
            "te": "trailers",
            "content-type": "application/grpc",
        }
        self._http.send_headers(stream, [*fixed.items(), *(headers or {}).items()])
        self._told[stream] = {}
        self.flush()
        return stream

    def send(self, stream: int, data: bytes, *, last: bool = False, seconds: float = 5.0) -> int:
        """Send data as far as the other side takes it; returns how many bytes it took."""
        at, end = 0, time.monotonic() + seconds
        while at < len(data) and self.alive and stream not in self.ended:
            window = self._http.local_flow_control_window(stream)
            size = min(window, self._http.max_outbound_frame_size, len(data) - at)
            if not size:
                if time.monotonic() > end:
                    break
                self.read(0.1)
                continue
            self._http.send_data(stream, data[at : at + size])
            at += size
            self.flush()
            self.read(0.0)
        if last and at == len(data) and stream not in self.ended:
            self._http.end_stream(stream)
            self.flush()
        return at

    def reset(self, stream: int) -> None:
        """Cut a call off."""
        self._http.reset_stream(stream, 8)
        self.flush()

    def wait(self, until, seconds: float = SOCKET_SECONDS) -> bool:  # type: ignore[no-untyped-def]
        """Read until something holds; False if it does not in that time."""
        end = time.monotonic() + seconds
        while not until():
            left = end - time.monotonic()
            if left <= 0 or not self.alive:
                return False
            self.read(left)
        return True

    def answer(self, stream: int, seconds: float = SOCKET_SECONDS) -> Mapping[str, str] | None:
        """A call's headers and trailers, when it has ended; None if it does not."""
        self.wait(lambda: stream in self.ended, seconds)
        return self.ended.get(stream)

    def read(self, seconds: float) -> None:
        """Take in what comes within this time."""
        if not self._socket.pending() and not select.select([self._socket], [], [], seconds)[0]:
            return
        try:
            data = self._socket.recv(65536)
            events = self._http.receive_data(data) if data else []
        except (OSError, ProtocolError):
            data, events = b"", []
        if not data:
            self.alive = False
        for event in events:
            self._take(event)
        if self._deaf:
            self._http.data_to_send()
        self.flush()

    def _take(self, event: Event) -> None:
        match event:
            case RemoteSettingsChanged():
                self._settled = True
            case ResponseReceived() | TrailersReceived():
                assert event.stream_id is not None
                self._told[event.stream_id] |= dict(event.headers or ())  # type: ignore[arg-type]
            case DataReceived():
                assert event.stream_id is not None
                self._http.acknowledge_received_data(
                    event.flow_controlled_length or 0, event.stream_id
                )
            case StreamEnded():
                assert event.stream_id is not None
                self.ended[event.stream_id] = self._told[event.stream_id]
            case StreamReset():
                assert event.stream_id is not None
                told = self._told.get(event.stream_id, {})
                self.ended.setdefault(event.stream_id, told or {"reset": str(event.error_code)})
            case WindowUpdated() | _:
                pass
