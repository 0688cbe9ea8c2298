"""Messages on the wire and records of the journal."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from google.protobuf.message import DecodeError

from secagg.coordinator import records
from secagg.errors import MalformedMessage, RoundAborted, StorageDamaged
from secagg.wire import attempt, chunks, custody, session
from secagg.wire._pb import journal_pb2 as journal
from secagg.wire._pb import masking_pb2 as pb
from secagg.wire._pb import service_pb2 as api

from . import fixed
from .target import Decoder, Target


def _wire(kind: type[Any], read: Decoder, write: Callable[[Any], Any]) -> Target:
    return Target(
        lambda data: read(kind.FromString(data)),
        lambda value: write(value).SerializeToString(),
        (DecodeError, MalformedMessage),
        (read,),
        kind,
    )


def _sent(message: Any) -> Any:
    return attempt.client_message_to_wire(
        message, session_id=fixed.SESSION_ID, round_number=1, attempt=1
    )


def _key_name(value: Any) -> Any:
    return api.ReadyRequest(key=attempt.key_to_wire(value))


def _aborted(message: api.Aborted) -> tuple[Any, ...]:
    error = session.aborted_from_wire(message)
    return error.phase, error.have, error.need, error.blamed, error.because


def _aborted_to_wire(value: tuple[Any, ...]) -> api.Aborted:
    phase, have, need, blamed, because = value
    error = RoundAborted(phase, have, need, blamed=blamed, because=because)
    return session.aborted_to_wire(error, 1, 1)


ABORTED = Target(
    lambda data: _aborted(api.Aborted.FromString(data)),
    lambda value: _aborted_to_wire(value).SerializeToString(),
    (DecodeError, MalformedMessage),
    (session.aborted_from_wire,),
    api.Aborted,
)


def _put_chunk(data: bytes) -> tuple[bytes, bytes]:
    """The head and the chunk; protobuf's parser is the twin, which copies."""
    try:
        twin = api.PutChunkRequest.FromString(data)
    except DecodeError:
        twin = None
    try:
        read = chunks.PutChunkRequest.FromString(data)
    except DecodeError:
        assert twin is None
        raise
    assert twin is not None
    assert bytes(read.data) == twin.data
    twin.ClearField("data")
    head = read.head.SerializeToString(deterministic=True)
    assert head == twin.SerializeToString(deterministic=True)
    assert not read.head.data
    return head, bytes(read.data)


def _put_chunk_bytes(value: tuple[bytes, bytes]) -> bytes:
    head, data = value
    request = chunks.PutChunkRequest(api.PutChunkRequest.FromString(head), memoryview(data))
    written = request.SerializeToString()
    assert request.ByteSize() == len(written)
    return written


def _got_chunk_bytes(value: bytes) -> bytes:
    return chunks.GetChunkReply(memoryview(value)).SerializeToString()


def _record(data: bytes) -> bytes:
    """A row of the journal, with all that is read out of one before a session sees it."""
    record = records.parse(data)
    match record.WhichOneof("record"):
        case "attempt_opened":
            records.manifest_of(record.attempt_opened.members).digest()
        case "released":
            records.stored_of(record.released.sum).digest  # noqa: B018
    return record.SerializeToString(deterministic=True)


WIRE = {
    "descriptor": _wire(pb.Descriptor, attempt.descriptor_from_wire, attempt.descriptor_to_wire),
    "roster": _wire(pb.Roster, attempt.roster_from_wire, attempt.roster_to_wire),
    "dealt": _wire(pb.Dealt, attempt.dealt_from_wire, attempt.dealt_to_wire),
    "survivors": _wire(pb.Survivors, attempt.survivors_from_wire, attempt.survivors_to_wire),
    "signatures": _wire(pb.Signatures, attempt.signatures_from_wire, attempt.signatures_to_wire),
    "result": _wire(pb.Result, attempt.result_from_wire, attempt.result_to_wire),
    "client-message": _wire(api.SendRequest, attempt.client_message_from_wire, _sent),
    "key-name": _wire(api.ReadyRequest, attempt.key_from_wire, _key_name),
    "session": _wire(api.SessionConfig, session.config_from_wire, session.config_to_wire),
    "opening": _wire(api.TaskOpening, session.opening_from_wire, session.opening_to_wire),
    "aborted": ABORTED,
    "key-request": _wire(api.KeyRequest, custody.request_from_wire, custody.request_to_wire),
    "key-box": _wire(api.KeyBox, custody.box_from_wire, custody.box_to_wire),
    "checkpoint-offer": _wire(
        api.Checkpoint, custody.checkpoint_from_wire, custody.checkpoint_to_wire
    ),
    "put-chunk": Target(
        _put_chunk,
        _put_chunk_bytes,
        (DecodeError,),
        (chunks.PutChunkRequest.FromString,),
        api.PutChunkRequest,
    ),
    "got-chunk": Target(
        lambda data: api.GetChunkReply.FromString(data).data,
        _got_chunk_bytes,
        (DecodeError,),
        (),
        api.GetChunkReply,
    ),
    "record": Target(
        _record,
        bytes,
        (StorageDamaged,),
        (records.parse, records.manifest_of, records.stored_of),
        journal.Record,
    ),
}
