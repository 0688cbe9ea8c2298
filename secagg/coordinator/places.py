"""What a call holds, and for how long: to its own end and to its work's, whichever is later.

A caller that hangs up ends its call at once, but not the thread that works for it: its message is
still in memory and its work in the queue. If its place were free by then, calls that are sent and
given up one after another would fill both.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, TypeAlias, TypeVar

import grpc

Context: TypeAlias = grpc.aio.ServicerContext[Any, Any]
T = TypeVar("T")


class Places:
    """The places of one call.

    Args:
        context: of the call; its reply sent and read, or its caller gone, is its end.
    """

    def __init__(self, context: Context) -> None:
        self._held: list[Callable[[], None]] = []
        self._open = 1
        context.add_done_callback(lambda _: self._end())  # type: ignore[arg-type]  # in stubs alone

    def hold(self, free: Callable[[], None]) -> None:
        """Have this called at the end."""
        self._held.append(free)

    async def work(self, work: Awaitable[T]) -> T:
        """Have work done to its end, though the caller hangs up meanwhile."""
        task = asyncio.ensure_future(work)
        self._open += 1
        task.add_done_callback(self._done)
        return await asyncio.shield(task)

    def _done(self, task: asyncio.Future[Any]) -> None:
        if not task.cancelled():
            task.exception()  # heard of, though nobody may be left to tell
        self._end()

    def _end(self) -> None:
        self._open -= 1
        if not self._open:
            for free in self._held:
                free()
