"""Uploads of whole chunks, a few bytes at a time."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from typing import Any

from hyperframe.frame import GoAwayFrame, HeadersFrame, RstStreamFrame

from secagg.wire._pb import service_pb2 as api

from . import frames
from .line import AGGREGATION, Crowd, Ready, Spec, again, answer, connect, tls, until

UPLOAD_BYTES = 4 * 2**20
TRICKLE_BYTES, TRICKLE_SECONDS = 4, 0.5


def slow(spec: Spec, ready: Ready, stop: threading.Event) -> dict[str, Any]:
    """Upload whole chunks, a few bytes at a time."""
    context, seen, crowd = tls(spec), Counter[str](), Crowd()
    chunk = api.PutChunkRequest(
        session_id=bytes.fromhex(spec["session"]),
        blob=api.Blob(vector=api.Blob.Vector(round=1, attempt=1)),
        total=UPLOAD_BYTES,
        data=bytes(UPLOAD_BYTES),
    )
    body = frames.prefixed(chunk.SerializeToString())
    block = frames.headers(f"{AGGREGATION}PutChunk")

    async def watch(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        incoming = frames.Incoming()
        while received := await reader.read(65536):
            for frame in incoming.feed(received):
                answer(frame, writer, seen)
                if isinstance(frame, HeadersFrame) and (status := incoming.status(frame)):
                    seen[f"status {status}"] += 1
                    return
                if isinstance(frame, GoAwayFrame | RstStreamFrame):
                    return
        seen["closed by the server"] += 1

    async def trickle(writer: asyncio.StreamWriter, watching: asyncio.Task[None]) -> None:
        for at in range(0, len(body), TRICKLE_BYTES):
            writer.write(frames.data(1, body[at : at + TRICKLE_BYTES]))
            done, _ = await asyncio.wait([watching], timeout=TRICKLE_SECONDS)
            if done:
                watching.result()
                return

    async def upload() -> None:
        reader, writer = await connect(spec, context)
        seen["opened"] += 1
        watching = asyncio.create_task(watch(reader, writer))
        try:
            writer.write(frames.PREFACE + frames.opening(1, block))
            with crowd:
                await trickle(writer, watching)
        finally:
            watching.cancel()
            writer.close()

    async def work() -> None:
        tasks = [asyncio.create_task(again(seen, upload)) for _ in range(spec["slow"])]
        await until(stop, tasks)

    ready()
    asyncio.run(work())
    return {"most": crowd.most, "seen": seen}
