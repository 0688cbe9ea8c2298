"""Chunks on the wire without a copy beside the message itself.

Protobuf's parser copies a chunk out of its message and its encoder copies it several times as its
buffer grows; for messages that are a few bytes of head and a chunk, that costs more than the
transport. Fields may come in any order, and encoders put ``data`` last, as its number is the
greatest: so a message is the head as protobuf encodes it, then a tag, a length and the chunk. What
does not end in exactly that is left to protobuf, so every message means what protobuf says it does.

Source: https://protobuf.dev/programming-guides/encoding/
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from secagg.wire._pb import service_pb2 as api

_VARINT: Final = 0
_BYTES: Final = 2
_FIELDS: Final = 16
"""More than a message has; one of very many fields is no work for a loop in Python."""


@dataclass(frozen=True, slots=True)
class PutChunkRequest:
    """A ``PutChunkRequest`` whose data lie elsewhere: in a vector, or in the message received.

    Args:
        head: all of it but ``data``.
        data: the chunk.
    """

    head: api.PutChunkRequest
    data: memoryview

    @classmethod
    def FromString(cls, message: bytes) -> PutChunkRequest:  # noqa: N802 - as protobuf calls it
        """Parse a message; ``data`` views its bytes.

        Raises:
            DecodeError: it is none.
        """
        split = _split(message, api.PutChunkRequest.DATA_FIELD_NUMBER)
        if split is None:
            whole = api.PutChunkRequest.FromString(message)
            data = memoryview(whole.data)
            whole.ClearField("data")
            return cls(whole, data)
        head, data = split
        return cls(api.PutChunkRequest.FromString(head), data)

    def SerializeToString(self) -> bytes:  # noqa: N802
        """The message, in one copy of the data."""
        head = self.head.SerializeToString()
        return _joined(head, api.PutChunkRequest.DATA_FIELD_NUMBER, self.data)

    def ByteSize(self) -> int:  # noqa: N802
        """Bytes of the message."""
        size = self.data.nbytes
        return self.head.ByteSize() + 1 + len(_varint(size)) + size

    @property
    def session_id(self) -> bytes:
        """Which session."""
        return self.head.session_id

    @property
    def blob(self) -> api.Blob:
        """Which blob of it."""
        return self.head.blob

    @property
    def offset(self) -> int:
        """Where the chunk begins in it."""
        return self.head.offset

    @property
    def total(self) -> int:
        """Bytes of the whole blob."""
        return self.head.total


@dataclass(frozen=True, slots=True)
class GetChunkReply:
    """A ``GetChunkReply`` whose data lie elsewhere."""

    data: memoryview

    def SerializeToString(self) -> bytes:  # noqa: N802
        """The message, in one copy of the data."""
        return _joined(b"", api.GetChunkReply.DATA_FIELD_NUMBER, self.data)


def _joined(head: bytes, field: int, data: memoryview) -> bytes:
    return b"".join((head, bytes((field << 3 | _BYTES,)), _varint(data.nbytes), data))


def _varint(value: int) -> bytes:
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


def _split(message: bytes, field: int) -> tuple[bytes, memoryview] | None:
    """What comes before the last field, and that field; None if there is anything unusual."""
    at = 0
    for _ in range(_FIELDS):
        if at >= len(message):
            break
        tag, wire_type = message[at] >> 3, message[at] & 7
        value, after = _read_varint(message, at + 1)
        if message[at] > 0x7F or value is None or wire_type not in (_VARINT, _BYTES):
            return None
        end = after if wire_type == _VARINT else after + value
        if tag == field:
            last = wire_type == _BYTES and end == len(message)
            return (message[:at], memoryview(message)[after:]) if last else None
        at = end
    return None


def _read_varint(message: bytes, at: int) -> tuple[int | None, int]:
    """A number and where it ends; None if it does not, or is longer than any length."""
    value = 0
    for shift, byte in enumerate(message[at : at + 9]):
        value |= (byte & 0x7F) << 7 * shift
        if byte < 0x80:
            return value, at + shift + 1
    return None, at
