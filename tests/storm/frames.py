"""HTTP/2 as an attacker writes it: bytes that are made once and sent often."""

from __future__ import annotations

import struct
from collections.abc import Iterator

from hpack import Decoder, Encoder, NeverIndexedHeaderTuple
from hyperframe.frame import DataFrame, Frame, HeadersFrame, RstStreamFrame, SettingsFrame

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + SettingsFrame(0).serialize()
SETTINGS = SettingsFrame(0).serialize()
SETTINGS_ACK = SettingsFrame(0, flags=["ACK"]).serialize()
CANCEL = 8


def headers(path: str) -> bytes:
    """A request's header block, good for every stream of every connection."""
    fields = {
        ":method": "POST",
        ":scheme": "https",
        ":path": path,
        ":authority": "coordinator",
        "te": "trailers",
        "content-type": "application/grpc",
    }
    return bytes(Encoder().encode([NeverIndexedHeaderTuple(*field) for field in fields.items()]))


def prefixed(message: bytes) -> bytes:
    """A message as gRPC puts it into DATA frames."""
    return struct.pack(">BI", 0, len(message)) + message


def opening(stream: int, block: bytes) -> bytes:
    """The beginning of a request."""
    return bytes(HeadersFrame(stream, block, flags=["END_HEADERS"]).serialize())


def data(stream: int, content: bytes, *, last: bool = False) -> bytes:
    """A piece of a request's body."""
    return bytes(DataFrame(stream, content, flags=["END_STREAM"] if last else []).serialize())


def request(stream: int, block: bytes, message: bytes) -> bytes:
    """A whole request."""
    return opening(stream, block) + data(stream, prefixed(message), last=True)


def reset(stream: int) -> bytes:
    """The end of a request that its sender no longer wants."""
    return bytes(RstStreamFrame(stream, CANCEL).serialize())


class Incoming:
    """Frames out of a connection's bytes; header blocks are decoded in their order."""

    def __init__(self) -> None:
        self._rest = bytearray()
        self._decoder = Decoder()

    def feed(self, received: bytes) -> Iterator[Frame]:
        """Give the frames that are complete now."""
        self._rest += received
        while len(self._rest) >= 9:
            frame, length = Frame.parse_frame_header(memoryview(bytes(self._rest[:9])))
            if len(self._rest) < 9 + length:
                return
            frame.parse_body(memoryview(bytes(self._rest[9 : 9 + length])))
            del self._rest[: 9 + length]
            yield frame

    def status(self, frame: HeadersFrame) -> str | None:
        """The call's status, if these headers are its end."""
        fields = self._decoder.decode(frame.data)
        return next((str(value) for name, value in fields if name == "grpc-status"), None)
