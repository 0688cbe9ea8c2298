"""What crosses the channel: blobs in chunks, and replies that are believed once they parse."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from typing import TypeVar

from client_sdk.channel import Channel
from secagg.crypto.digest import chunk_digest, root_digest
from secagg.errors import FaultyServer, MalformedMessage
from secagg.masking.client import Member
from secagg.wire._pb import service_pb2 as api
from secagg.wire.chunks import PutChunkRequest

P = TypeVar("P")


def upload(channel: Channel, member: Member, blob: api.Blob, data: memoryview) -> None:
    """Send a blob, chunk by chunk; nothing for an empty one.

    Raises:
        As ``Channel.call``.
    """
    size, total = member.session.chunk_bytes, len(data)

    def request(offset: int) -> PutChunkRequest:
        head = api.PutChunkRequest(
            session_id=member.session_id, blob=blob, offset=offset, total=total
        )
        return PutChunkRequest(head, data[offset : offset + size])

    channel.call_many("PutChunk", map(request, range(0, total, size)), api.Ack)


def download(
    channel: Channel, member: Member, blob: api.Blob, size: int, digest: bytes
) -> bytearray:
    """Fetch a blob of a known size and signed digest.

    Raises:
        FaultyServer: a chunk of a wrong size, or data that are not those signed.
    """
    chunk_bytes = member.session.chunk_bytes
    data, digests = bytearray(size), []
    offsets = range(0, size, chunk_bytes)
    requests = (
        api.GetChunkRequest(session_id=member.session_id, blob=blob, offset=offset)
        for offset in offsets
    )
    with closing(channel.each("GetChunk", requests, api.GetChunkReply)) as replies:
        for offset, reply in zip(offsets, replies, strict=True):
            chunk = reply.data
            if len(chunk) != min(chunk_bytes, size - offset):  # CHECK: chunk-length
                raise FaultyServer("chunk-length", "The coordinator sent a chunk of a wrong size.")
            digests.append(chunk_digest(chunk))  # while the next ones are on their way
            data[offset : offset + len(chunk)] = chunk
    if root_digest(digests) != digest:  # CHECK: downloaded-digest
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
        # CHECK: reply-malformed
        raise FaultyServer(error.code, error.observed, error.remedy) from None
