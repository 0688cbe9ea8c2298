"""Work on ranges, over all processors: for loops that let go of the interpreter's lock."""

from __future__ import annotations

import os
from collections.abc import Callable
from threading import Thread
from typing import Final

_WORTH: Final = 2**17
"""Words or bytes of work; to start a thread for less costs more than it saves."""


def in_ranges(
    length: int,
    grain: int,
    work: Callable[[int, int], None],
    threads: int | None = None,
    *,
    worth: int = _WORTH,
) -> None:
    """Run work on contiguous ranges that make up all of a length, at once.

    The caller's thread takes the first range, and any that no thread can be started for.

    Args:
        length: of all ranges together.
        grain: every range begins at a multiple of it.
        work: (start, stop).
        threads: how many ranges; None takes as many as there are processors, or as are worth it.
        worth: the least length that is worth a thread.

    Raises:
        What work raised on a range, when work on all of them has ended.
    """
    workers = threads or min(len(os.sched_getaffinity(0)), length // worth)
    share = max(-(-length // max(workers, 1)), 1)
    share += -share % grain
    failures: list[BaseException] = []

    def run(start: int) -> None:
        try:
            work(start, min(start + share, length))
        except BaseException as error:  # noqa: BLE001 - raised below, in the caller's thread
            failures.append(error)

    others = [Thread(target=run, args=(start,)) for start in range(share, length, share)]
    here, started = [0], []
    for number, thread in enumerate(others, start=1):
        try:
            thread.start()
        except RuntimeError:  # the system gives no more
            here.append(number * share)
        else:
            started.append(thread)
    for start in here:
        run(start)
    while started:
        try:
            started[-1].join()
            started.pop()
        except KeyboardInterrupt as interrupt:  # what is shared is still being written
            failures.insert(0, interrupt)
    try:
        if failures:
            raise failures[0]
    finally:
        failures.clear()  # else this frame would keep itself, and what it was at, alive
