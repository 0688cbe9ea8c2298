"""Decoders are total: any bytes give a value or ``MalformedMessage``, nothing else.

Bytes that protobuf itself refuses (``DecodeError``: bad lengths, bad UTF-8) never reach a decoder.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
from google.protobuf.message import DecodeError
from hypothesis import given, settings
from hypothesis import strategies as st

from secagg.ckks.custody import MAX_SEALED_BYTES
from secagg.errors import MalformedMessage
from secagg.wire import attempt, custody, session
from secagg.wire._pb import masking_pb2 as pb
from secagg.wire._pb import service_pb2 as api

from . import strategies as make
from .test_wire_round_trip import BROADCASTS

DECODERS: dict[str, tuple[Any, Callable[[Any], Any]]] = {
    "descriptor": (pb.Descriptor, attempt.descriptor_from_wire),
    "roster": (pb.Roster, attempt.roster_from_wire),
    "dealt": (pb.Dealt, attempt.dealt_from_wire),
    "survivors": (pb.Survivors, attempt.survivors_from_wire),
    "signatures": (pb.Signatures, attempt.signatures_from_wire),
    "result": (pb.Result, attempt.result_from_wire),
    "client-message": (api.SendRequest, attempt.client_message_from_wire),
    "opening": (api.TaskOpening, session.opening_from_wire),
    "config": (api.SessionConfig, session.config_from_wire),
    "key-request": (api.KeyRequest, custody.request_from_wire),
    "key-box": (api.KeyBox, custody.box_from_wire),
    "aborted": (api.Aborted, session.aborted_from_wire),
}
ANY_NAMES = st.sampled_from(["", "a", "A", "é", "a/b", "x" * 64, "\0", "aes-128-ctr", "2/3", "0/0"])
ANY_BYTES = st.sampled_from([0, 1, 31, 32, 33, 64, 146, 147]).flatmap(
    lambda size: st.sampled_from([bytes(size), b"\xff" * size, b"\x09" + bytes(max(size - 1, 0))])
)
ANY_FLOATS = st.sampled_from([0.0, -0.0, -1.0, 1.0, 1e300, 5e-324, float("inf"), float("nan")])
UINT32 = st.sampled_from([0, 1, 2, 16, 64, 2**31, 2**32 - 1])
UINT64 = st.sampled_from([0, 1, 2**31, 2**40, 2**63, 2**64 - 1])


def check(name: str, data: bytes) -> None:
    kind, decode = DECODERS[name]
    with suppress(DecodeError, MalformedMessage):
        decode(kind.FromString(data))


@pytest.mark.parametrize("name", DECODERS)
def test_random_bytes(name: str) -> None:
    @settings(max_examples=50, deadline=None)
    @given(st.binary(max_size=300))
    def run(data: bytes) -> None:
        check(name, data)

    run()


def valid(name: str) -> st.SearchStrategy[bytes]:
    if name == "client-message":
        return make.client_messages.map(
            lambda message: attempt.client_message_to_wire(
                message, session_id=bytes(32), round_number=1, attempt=1
            ).SerializeToString()
        )
    if name == "aborted":
        return make.aborts.map(lambda e: session.aborted_to_wire(e, 1, 1).SerializeToString())
    strategy, to_wire, _ = BROADCASTS[name]
    return strategy.map(lambda value: to_wire(value).SerializeToString())


@pytest.mark.parametrize("name", DECODERS)
def test_damaged_messages(name: str) -> None:
    """One byte changed, a piece cut out, or a piece said twice."""

    @settings(max_examples=50, deadline=None)
    @given(valid(name), st.integers(0, 10**6), st.integers(0, 255), st.integers(0, 80), st.data())
    def run(data: bytes, at: int, byte: int, length: int, draw: st.DataObject) -> None:
        at %= len(data) + 1
        how = draw.draw(st.sampled_from(["set", "cut", "twice"]))
        if how == "set":
            data = data[:at] + bytes([byte]) + data[at + 1 :]
        elif how == "cut":
            data = data[:at] + data[at + length :]
        else:
            data = data[: at + length] + data[at:]
        check(name, data)

    run()


def shaken(draw: st.DrawFn, message: Any, depth: int = 0) -> None:
    """Fill a message's fields with values that are right for protobuf and odd for us."""
    for field in message.DESCRIPTOR.fields:
        if not draw(st.integers(0, 3)):
            continue
        if field.type == field.TYPE_MESSAGE:
            if depth > 3:
                continue
            if field.is_repeated:
                for _ in range(draw(st.integers(0, 3))):
                    shaken(draw, getattr(message, field.name).add(), depth + 1)
            else:
                getattr(message, field.name).SetInParent()
                shaken(draw, getattr(message, field.name), depth + 1)
            continue
        values: st.SearchStrategy[Any] = {
            field.TYPE_STRING: ANY_NAMES,
            field.TYPE_BYTES: ANY_BYTES,
            field.TYPE_DOUBLE: ANY_FLOATS,
            field.TYPE_UINT32: UINT32,
            field.TYPE_UINT64: UINT64,
        }[field.type]
        if field.is_repeated:
            getattr(message, field.name).extend(draw(st.lists(values, max_size=18)))
        else:
            setattr(message, field.name, draw(values))


@pytest.mark.parametrize("name", DECODERS)
def test_odd_fields(name: str) -> None:
    kind, _ = DECODERS[name]

    @st.composite
    def odd(draw: st.DrawFn) -> bytes:
        message = kind()
        shaken(draw, message)
        return bytes(message.SerializeToString())

    @settings(max_examples=50, deadline=None)
    @given(odd())
    def run(data: bytes) -> None:
        check(name, data)

    run()


def test_bad_utf8_stops_at_protobuf() -> None:
    with pytest.raises(DecodeError):
        pb.Consistency.FromString(b"\x0a\x02\xff\xfe")


def test_an_unknown_field_changes_nothing() -> None:
    message = pb.Consistency(sender="a", signature=bytes(64))
    request = api.SendRequest.FromString(
        api.SendRequest(consistency=message).SerializeToString() + b"\xfa\x3f\x01x"
    )
    assert attempt.client_message_from_wire(request).sender == "a"


def test_a_request_without_a_message() -> None:
    with pytest.raises(MalformedMessage) as caught:
        attempt.client_message_from_wire(api.SendRequest())
    assert caught.value.code == "message-missing"


def test_a_revealed_share_that_is_none() -> None:
    request = api.SendRequest()
    request.unmasking.sender = "a"
    request.unmasking.shares.add(owner="b", salt=bytes(32))
    with pytest.raises(MalformedMessage) as caught:
        attempt.client_message_from_wire(request)
    assert caught.value.code == "share-missing"


def sealed_result() -> pb.Result:
    message = pb.Result(task="a", round=1, survivors=["a", "b"], signature=bytes(64))
    message.base = message.survivors_transcript = message.vector_digest = bytes(32)
    message.key.epoch, message.key.key_id = 1, bytes(32)
    message.seeds.extend([b"1" * 32, b"2" * 32])
    return message


BAD_RESULTS: dict[str, tuple[str, Callable[[pb.Result], Any]]] = {
    "no key": ("result-seeds", lambda m: m.ClearField("key")),
    "no seeds": ("result-seeds", lambda m: m.ClearField("seeds")),
    "one seed": ("result-seeds", lambda m: m.seeds.pop()),
    "three seeds": ("result-seeds", lambda m: m.seeds.append(bytes(32))),
    "short seed": ("message-size", lambda m: m.seeds.__setitem__(1, bytes(31))),
    "empty seed": ("message-size", lambda m: m.seeds.__setitem__(1, b"")),
    "epoch 0": ("key-name", lambda m: setattr(m.key, "epoch", 0)),
    "short id": ("key-name", lambda m: setattr(m.key, "key_id", bytes(31))),
    "long id": ("key-name", lambda m: setattr(m.key, "key_id", bytes(33))),
}


@pytest.mark.parametrize(("code", "change"), BAD_RESULTS.values(), ids=BAD_RESULTS.keys())
def test_a_sealed_sum_that_nobody_could_open(code: str, change: Callable[[pb.Result], Any]) -> None:
    message = sealed_result()
    assert len(attempt.result_from_wire(message).seeds) == 2
    change(message)
    with pytest.raises(MalformedMessage) as caught:
        attempt.result_from_wire(message)
    assert caught.value.code == code


def key_box() -> api.KeyBox:
    point = b"\x09" + bytes(31)
    return api.KeyBox(
        epoch=1,
        sender="a",
        recipient="b",
        sender_ephemeral=point,
        recipient_ephemeral=point,
        key_id=bytes(32),
        sealed=bytes(16),
        signature=bytes(64),
    )


BAD_BOXES: dict[str, tuple[str, dict[str, Any]]] = {
    "epoch": ("message-number", {"epoch": 0}),
    "sender": ("message-name", {"sender": "A"}),
    "recipient": ("message-name", {"recipient": ""}),
    "our half": ("public-key-encoding", {"sender_ephemeral": bytes(31)}),
    "their half": ("public-key-low-order", {"recipient_ephemeral": bytes(32)}),
    "key id": ("message-size", {"key_id": bytes(31)}),
    "nothing sealed": ("message-size", {"sealed": bytes(15)}),
    "too much sealed": ("message-size", {"sealed": bytes(MAX_SEALED_BYTES + 1)}),
    "signature": ("message-size", {"signature": bytes(63)}),
}


@pytest.mark.parametrize(("code", "changes"), BAD_BOXES.values(), ids=BAD_BOXES.keys())
def test_a_key_box_that_is_none(code: str, changes: dict[str, Any]) -> None:
    message = key_box()
    assert custody.box_from_wire(message).sender == "a"
    for field, value in changes.items():
        setattr(message, field, value)
    with pytest.raises(MalformedMessage) as caught:
        custody.box_from_wire(message)
    assert caught.value.code == code


BAD_REQUESTS: dict[str, tuple[str, dict[str, Any]]] = {
    "epoch": ("message-number", {"epoch": 0}),
    "silo": ("message-name", {"silo": "a/b"}),
    "half": ("public-key-low-order", {"ephemeral": bytes(32)}),
    "no half": ("public-key-encoding", {"ephemeral": b""}),
    "signature": ("message-size", {"signature": b""}),
}


@pytest.mark.parametrize(("code", "changes"), BAD_REQUESTS.values(), ids=BAD_REQUESTS.keys())
def test_a_key_request_that_is_none(code: str, changes: dict[str, Any]) -> None:
    message = api.KeyRequest(
        epoch=2**32 - 1, silo="a", ephemeral=b"\x09" + bytes(31), signature=bytes(64)
    )
    assert custody.request_from_wire(message).epoch == 2**32 - 1
    for field, value in changes.items():
        setattr(message, field, value)
    with pytest.raises(MalformedMessage) as caught:
        custody.request_from_wire(message)
    assert caught.value.code == code


@pytest.mark.parametrize(
    ("field", "value"), [("digest", bytes(31)), ("signature", b""), ("results", 0), ("size", 0)]
)
def test_a_checkpoint_that_is_none(field: str, value: Any) -> None:
    message = api.Checkpoint(
        task="t", results=1, sender="a", size=1, digest=bytes(32), signature=bytes(64)
    )
    assert custody.checkpoint_from_wire(message).size == 1
    setattr(message, field, value)
    with pytest.raises(MalformedMessage) as caught:
        custody.checkpoint_from_wire(message)
    assert caught.value.code == "checkpoint-size"
