"""How much the coordinator gives: to all together, to one member, to one connection.

A member is a certificate's name and role: however many connections it opens, and whatever
certificate it renews to, its quotas are the same ones. Every default lets an honest silo work at
full speed with many sessions at once; a coordinator of few and small sessions may set all of them
far lower.

What is refused because of a rate or of too much at once is told with the time after which to try
again, and the SDK does. Other refusals are final.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import ClassVar

from pydantic import ConfigDict

from secagg.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Limits:
    """The table ``[limits]`` of ``coordinator.toml``; every one is greater than zero.

    Args:
        max_concurrent_calls: calls served at once, of all members; more are refused. A silo has a
            call that waits in every session, two where the session seals.
        max_metadata_bytes: request headers larger than this are refused.
        max_weights_bytes: greatest size of a task's initial weights, and of a checkpoint.
        max_sessions: sessions kept at once; the oldest that is over makes room for a new one.
        max_spool_bytes: disk for uploads, weights, checkpoints and sums of all sessions together.
            For a new upload that would go beyond, the oldest sessions that are over are forgotten;
            if that is not enough, it is refused until a round or a session ends. Sums of active
            sessions stay, and are always written: a round frees more than its sum takes.
        max_connections: connections and handshakes at once; more are closed as they come. A silo
            has one in every session, so let it exceed sessions times silos. It bounds file
            descriptors and the memory of idle connections, about 75 KiB each.
        calls_per_second: calls that one member may begin, on average.
        calls_burst: how many it may begin at once after a pause.
        bytes_per_second: bytes of messages that one member may send and be sent, on average.
        bytes_burst: how many after a pause; whoever has used them up waits for its debt to pass.
        calls_at_once: calls of one member in flight, those included that wait for an event.
        messages_at_once: of one member's messages in memory, from their first byte until the work
            on them is done and the reply is read; chunks and others each. More wait for their turn,
            unread. So slow senders and readers hold at most this many chunks of 4 MiB, and as many
            other messages of 4 MiB; and for every call beyond that what gRPC reads ahead, about 100
            KiB, or the reply to a call that waited, of about that size.
        uploads_at_once: vectors, weights and checkpoints that one silo has begun and not completed,
            in all sessions.
        sessions_per_admin: active sessions that one admin has created.
        spool_bytes_per_silo: disk for one silo's uploads, weights and checkpoints, in all sessions.
        streams_per_connection: calls in flight over one connection; a client holds more back.
        handshake_seconds: how long a connection may take to become one: TLS and HTTP/2 settings.
        message_seconds: how long one request may take to arrive; at least the SDK's 60 s.
        idle_seconds: how long a connection may stay without a call; clients come back unasked.
        connection_seconds: how old a connection may get, give or take a tenth: then its client is
            told to open another one. So whoever does not read, or does not end, ends with it.
        connection_grace_seconds: how long its calls may then still take; at least the SDK's 60 s.

    Raises:
        ConfigError: ``limits``: one is not greater than zero.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", strict=True)

    max_concurrent_calls: int = 8192
    max_metadata_bytes: int = 16 * 1024
    max_weights_bytes: int = 16 * 2**30
    max_sessions: int = 64
    max_spool_bytes: int = 2**40
    max_connections: int = 4096
    calls_per_second: float = 2000.0
    calls_burst: int = 10_000
    bytes_per_second: float = 2.0 * 2**30
    bytes_burst: int = 4 * 2**30
    calls_at_once: int = 256
    messages_at_once: int = 16
    uploads_at_once: int = 256
    sessions_per_admin: int = 48
    spool_bytes_per_silo: int = 128 * 2**30
    streams_per_connection: int = 32
    handshake_seconds: float = 10.0
    message_seconds: float = 60.0
    idle_seconds: float = 60.0
    connection_seconds: float = 600.0
    connection_grace_seconds: float = 90.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not 0 < value < math.inf:  # CHECK: limits-positive
                raise ConfigError("limits", f"{field.name} = {value} is not greater than zero.")
