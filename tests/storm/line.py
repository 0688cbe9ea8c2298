"""What the attacks share: a connection under the attacker's certificate, again and again.

What they send is made before they start, and they verify nothing, because they share the machine
with their victim: what they burn would otherwise be put down to it.
"""

from __future__ import annotations

import asyncio
import ssl
import threading
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable
from typing import Any

from hyperframe.frame import GoAwayFrame, RstStreamFrame, SettingsFrame

from . import frames

Spec = dict[str, Any]
Ready = Callable[[], None]
AGGREGATION = "/secagg.v1.Aggregation/"
HEALTH = "/grpc.health.v1.Health/Check"
RECONNECT_SECONDS = 0.05


def tls(spec: Spec) -> ssl.SSLContext:
    """The attacker's side of a handshake; sessions are never resumed."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.options |= ssl.OP_NO_TICKET
    context.load_cert_chain(spec["pem"])
    context.set_alpn_protocols(["h2"])
    return context


class Crowd:
    """How many of an attack's connections stand at once, and the most that ever did."""

    def __init__(self) -> None:
        self.now = self.most = 0

    def __enter__(self) -> None:
        self.now += 1
        self.most = max(self.most, self.now)

    def __exit__(self, *_: object) -> None:
        self.now -= 1


async def connect(spec: Spec, context: ssl.SSLContext | None) -> Any:
    """A reader and a writer; with a context, after the handshake."""
    name = spec["server_name"] if context else None
    return await asyncio.open_connection(
        "127.0.0.1", spec["port"], ssl=context, server_hostname=name
    )


async def attempted(seen: Counter[str], attempt: Callable[[], Awaitable[None]]) -> None:
    """Attack once; the server may end it."""
    try:
        await attempt()
    except (OSError, EOFError) as error:
        seen[f"closed: {type(error).__name__}"] += 1
    await asyncio.sleep(RECONNECT_SECONDS)


async def again(seen: Counter[str], attempt: Callable[[], Awaitable[None]]) -> None:
    """Attack for ever: anew whenever the server has ended it."""
    while True:
        await attempted(seen, attempt)


async def until(stop: threading.Event, tasks: Iterable[asyncio.Task[None]]) -> None:
    """Let attacks go on until the parent says so, or until one of them fails of itself."""
    stopped = asyncio.create_task(asyncio.to_thread(stop.wait))
    done, _ = await asyncio.wait([stopped, *tasks], return_when=asyncio.FIRST_COMPLETED)
    for task in tasks:
        task.cancel()
    for ended in done:
        ended.result()


def answer(frame: Any, writer: asyncio.StreamWriter, seen: Counter[str]) -> None:
    """Acknowledge the server's settings, and count what it objects to."""
    if isinstance(frame, SettingsFrame) and "ACK" not in frame.flags:
        writer.write(frames.SETTINGS_ACK)
    elif isinstance(frame, GoAwayFrame):
        text = frame.additional_data.decode(errors="replace")
        seen[f"goaway {frame.error_code} {text}"] += 1
    elif isinstance(frame, RstStreamFrame):
        seen[f"reset {frame.error_code}"] += 1
