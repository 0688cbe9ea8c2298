"""An honest silo's small calls at a steady rate, each timed from when it was due.

How late this process itself was to make a call is told, too: so much of the time is the machine's.
A call that is refused for a transient reason is made again until it is answered, as the SDK does,
and its time runs on: an answer is what a silo waits for.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc

from secagg.wire._pb import service_pb2 as api

from . import figures, helper
from .line import AGGREGATION, HEALTH

CALLS_PER_SECOND = 40
CALL_SECONDS = 30.0
WARM_UP = 20
AGAIN_SECONDS = 0.1
TRANSIENT = (
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.CANCELLED,
)


def small_calls(spec: dict[str, Any]) -> dict[str, bytes]:
    """Paths and requests."""
    session = bytes.fromhex(spec["session"])
    chunk = api.GetChunkRequest(session_id=session, blob=api.Blob(sum=1))
    return {
        f"{AGGREGATION}JoinSession": api.JoinSessionRequest(
            session=spec["session_name"]
        ).SerializeToString(),
        f"{AGGREGATION}ListResults": api.ListResultsRequest(session_id=session).SerializeToString(),
        f"{AGGREGATION}GetChunk": chunk.SerializeToString(),
        HEALTH: b"",
    }


def dial(spec: dict[str, Any]) -> grpc.aio.Channel:
    """A connection as the SDK makes it."""
    pem = Path(spec["pem"]).read_bytes()
    credentials = grpc.ssl_channel_credentials(Path(spec["root"]).read_bytes(), pem, pem)
    return grpc.aio.secure_channel(
        f"127.0.0.1:{spec['port']}",
        credentials,
        options=[
            ("grpc.ssl_target_name_override", spec["server_name"]),
            ("grpc.enable_retries", 0),
        ],
    )


async def probe(spec: dict[str, Any], ready: Callable[[], None], stop: threading.Event) -> Any:
    """Call until told; each call as a ``Sample``."""
    samples: list[figures.Sample] = []
    statuses: Counter[str] = Counter()
    async with dial(spec) as channel:
        stubs = [
            (path.rsplit("/", 1)[1], channel.unary_unary(path), request)
            for path, request in small_calls(spec).items()
        ]

        async def call(number: int, due: float) -> None:
            name, stub, request = stubs[number % len(stubs)]
            late = time.monotonic() - due
            status = await answered(stub, request, name, statuses)
            samples.append((name if status else "failed", due, time.monotonic() - due, late))

        for number in range(WARM_UP):
            await call(number, time.monotonic())
        samples.clear()
        statuses.clear()
        ready()
        began, number, flying = time.monotonic(), 0, set()
        while not stop.is_set():
            due = began + number / CALLS_PER_SECOND
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            flying.add(task := asyncio.create_task(call(number, due)))
            task.add_done_callback(flying.discard)
            number += 1
        await asyncio.gather(*flying)
    return {"samples": samples, "statuses": statuses}


async def answered(stub: Any, request: bytes, name: str, statuses: Counter[str]) -> bool:
    """Call until there is an answer that stays."""
    end = time.monotonic() + CALL_SECONDS
    while True:
        try:
            await stub(request, timeout=max(0.01, end - time.monotonic()))
        except grpc.aio.AioRpcError as error:
            statuses[f"{name} {error.code().name} {(error.details() or '')[:100]}"] += 1
            if error.code() not in TRANSIENT or time.monotonic() > end:
                return False
            await asyncio.sleep(AGAIN_SECONDS)
        else:
            statuses[f"{name} OK"] += 1
            return True


if __name__ == "__main__":
    helper.main(lambda spec, ready, stop: asyncio.run(probe(spec, ready, stop)))
