"""What crosses the channel: blobs in chunks, and replies that are believed once they parse."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from client_sdk.channel import Channel
from secagg.crypto.digest import vector_digest
from secagg.errors import FaultyServer, MalformedMessage
from secagg.masking.client import Member
from secagg.wire._pb import service_pb2 as api

P = TypeVar("P")


def upload(channel: Channel, member: Member, blob: api.Blob, data: memoryview) -> None:
    """Send a blob, chunk by chunk; nothing for an empty one.

    Raises:
        As ``Channel.call``.
    """
    size = member.session.chunk_bytes
    requests = (
        api.PutChunkRequest(
            session_id=member.session_id,
            blob=blob,
            offset=offset,
            total=len(data),
            data=bytes(data[offset : offset + size]),
        )
        for offset in range(0, len(data), size)
    )
    channel.call_many("PutChunk", requests, api.Ack)


def download(
    channel: Channel, member: Member, blob: api.Blob, size: int, digest: bytes
) -> bytearray:
    """Fetch a blob of a known size and signed digest.

    Raises:
        FaultyServer: a chunk of a wrong size, or data that are not those signed.
    """
    chunk_bytes = member.session.chunk_bytes
    data = bytearray(size)
    for offset in range(0, size, chunk_bytes):
        request = api.GetChunkRequest(session_id=member.session_id, blob=blob, offset=offset)
        chunk = channel.call("GetChunk", request, api.GetChunkReply).data
        if len(chunk) != min(chunk_bytes, size - offset):
            raise FaultyServer("chunk-length", "The coordinator sent a chunk of a wrong size.")
        data[offset : offset + len(chunk)] = chunk
    if vector_digest(memoryview(data), chunk_bytes) != digest:
        raise FaultyServer(
            "result-digest",
            "The coordinator's data are not those that were signed.",
            "Nothing was applied.",
        )
    return data


def parsed(parse: Callable[[], P]) -> P:
    """Parse what the coordinator sent.

    Raises:
        FaultyServer: it does not parse.
    """
    try:
        return parse()
    except MalformedMessage as error:
        raise FaultyServer(error.code, error.observed, error.remedy) from None
