"""Chunks without copies mean what protobuf says they mean."""

from __future__ import annotations

from typing import Any

import pytest
from google.protobuf.message import DecodeError
from hypothesis import given, settings
from hypothesis import strategies as st

from secagg.wire import chunks
from secagg.wire._pb import service_pb2 as api
from secagg.wire.chunks import GetChunkReply, PutChunkRequest

SIZES = st.sampled_from([0, 1, 127, 128, 129, 2**14 - 1, 2**14, 2**20 + 1])
BLOBS = st.builds(
    api.Blob, vector=st.builds(api.Blob.Vector, round=st.integers(0, 2**32 - 1))
) | st.builds(api.Blob, weights=st.text(max_size=5))
HEADS = st.builds(
    api.PutChunkRequest,
    session_id=st.binary(max_size=32),
    blob=BLOBS,
    offset=st.integers(0, 2**64 - 1),
    total=st.integers(0, 2**64 - 1),
)


def both(message: bytes) -> tuple[Any, Any]:
    """What protobuf reads and what we read, or that it is nothing."""
    found: list[Any] = []
    for kind in (api.PutChunkRequest, PutChunkRequest):
        try:
            read = kind.FromString(message)  # type: ignore[attr-defined]
        except DecodeError:
            found.append(None)
        else:
            found.append((read.session_id, read.blob, read.offset, read.total, bytes(read.data)))
    return found[0], found[1]


@settings(max_examples=100, deadline=None)
@given(HEADS, SIZES)
def test_a_request_is_protobufs(head: api.PutChunkRequest, size: int) -> None:
    data = bytes(range(256)) * (size // 256 + 1)
    message = PutChunkRequest(head, memoryview(data)[:size]).SerializeToString()
    whole = api.PutChunkRequest()
    whole.CopyFrom(head)
    whole.data = data[:size]
    assert api.PutChunkRequest.FromString(message) == whole
    theirs, ours = both(whole.SerializeToString())
    assert theirs == ours
    assert PutChunkRequest(head, memoryview(data)[:size]).ByteSize() == len(message)
    assert both(message)[0] == both(message)[1]


@settings(max_examples=60, deadline=None)
@given(SIZES)
def test_a_reply_is_protobufs(size: int) -> None:
    data = bytes(size)
    message = GetChunkReply(memoryview(data)).SerializeToString()
    assert api.GetChunkReply.FromString(message).data == data


@settings(max_examples=300, deadline=None)
@given(st.data(), HEADS, st.binary(max_size=200))
def test_whatever_bytes_come(data: st.DataObject, head: api.PutChunkRequest, chunk: bytes) -> None:
    """Damaged, cut, twice, in another order, with unknown fields: both read the same."""
    message = bytearray(PutChunkRequest(head, memoryview(chunk)).SerializeToString())
    how = data.draw(st.sampled_from(["damage", "cut", "twice", "turned", "unknown", "noise"]))
    match how:
        case "damage":
            at = data.draw(st.integers(0, len(message) - 1))
            message[at] = data.draw(st.integers(0, 255))
        case "cut":
            del message[data.draw(st.integers(0, len(message))) :]
        case "twice":
            message = message + message
        case "turned":
            message = bytearray(b"\x2a\x01x") + head.SerializeToString()
        case "unknown":
            tail = data.draw(st.sampled_from([b"\x32\x01x", b"\x38\x05", b"\x3d1234", b"\x3b\x3c"]))
            message = bytearray(tail) + message + data.draw(st.sampled_from([b"", tail]))
        case "noise":
            message = bytearray(data.draw(st.binary(max_size=40)))
    theirs, ours = both(bytes(message))
    assert theirs == ours


@pytest.mark.parametrize(
    "message",
    [
        b"\x28\x05",  # data, as a number
        b"\x2a\x05abc",  # cut
        b"\x2a\x83\x80\x80\x80\x80\x80\x00abc",  # a length that is longer than it needs to be
        b"\xaa\x00\x03abc",  # so is a tag
        b"\x2a" + b"\xff" * 10,
        b"\x20" + b"\x80" * 12,
        b"\x20",
        b"\x00\x01\x2a\x01x",
        b"",
    ],
)
def test_odd_messages(message: bytes) -> None:
    theirs, ours = both(message)
    assert theirs == ours


def test_what_our_silos_send_is_not_copied() -> None:
    head = api.PutChunkRequest(session_id=bytes(32), blob=api.Blob(weights="t"), total=5)
    for message in (
        PutChunkRequest(head, memoryview(b"hello")).SerializeToString(),
        api.PutChunkRequest(session_id=bytes(32), total=5, data=b"hello").SerializeToString(),
    ):
        assert PutChunkRequest.FromString(message).data.obj is message
    assert chunks._split(b"\x2a\x01x\x20\x05", 5) is None


@pytest.mark.parametrize("data", [b"", b"\x2a\x03abc"])
@pytest.mark.parametrize("count", [0, 1, 14, 15, 16, 17, 18, 40, 300_000])
@pytest.mark.parametrize("field", [b"\x20\x05", b"\x0a\x01s", b"\x30\x05"])
def test_a_message_of_very_many_fields(
    data: bytes, count: int, field: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Protobuf reads it, in C: whoever sends one holds up nobody else for long."""
    steps, read = 0, chunks._read_varint

    def counted(message: bytes, at: int) -> tuple[int | None, int]:
        nonlocal steps
        steps += 1
        return read(message, at)

    monkeypatch.setattr(chunks, "_read_varint", counted)
    theirs, ours = both(field * count + data)
    assert theirs == ours
    assert theirs is not None
    assert steps <= 16


def test_what_protobuf_had_to_parse_has_its_data_once() -> None:
    message = b"\x2a\x03abc\x20\x05"
    read = PutChunkRequest.FromString(message)
    assert read.data == b"abc"
    assert read.head == api.PutChunkRequest(total=5)
    assert PutChunkRequest.FromString(read.SerializeToString()) == read
    assert read.ByteSize() == len(message)
