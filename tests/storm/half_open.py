"""Handshakes that are begun and not gone on with."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import itertools
import ssl
import threading
from collections import Counter
from typing import Any

from .line import Crowd, Ready, Spec, again, connect, tls, until


def client_hello(spec: Spec) -> bytes:
    """The first flight of a handshake."""
    outgoing = ssl.MemoryBIO()
    talk = tls(spec).wrap_bio(ssl.MemoryBIO(), outgoing, server_hostname=spec["server_name"])
    with contextlib.suppress(ssl.SSLWantReadError):
        talk.do_handshake()
    return outgoing.read()


def half_open(spec: Spec, ready: Ready, stop: threading.Event) -> dict[str, Any]:
    """Hold connections whose handshake does not go on: after nothing, a half, or all of a hello."""
    hello, seen, crowd = client_hello(spec), Counter[str](), Crowd()
    beginnings = itertools.cycle([b"", hello[:5], hello[: len(hello) // 2], hello])

    async def hold(beginning: bytes) -> None:
        reader, writer = await connect(spec, None)
        seen["opened"] += 1
        try:
            with crowd, contextlib.suppress(OSError):
                writer.write(beginning)
                while await reader.read(4096):
                    pass
            seen["closed by the server"] += 1
        finally:
            writer.close()

    async def work() -> None:
        some = itertools.islice(beginnings, spec["half_open"])
        tasks = [asyncio.create_task(again(seen, functools.partial(hold, b))) for b in some]
        await until(stop, tasks)

    ready()
    asyncio.run(work())
    return {"most": crowd.most, "seen": seen}
