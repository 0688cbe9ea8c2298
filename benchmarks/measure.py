"""A benchmark and its floor in turn, and what is kept of them.

The floor runs right before every round of the work, outside the timed part: both see the same
machine. Ratios take the least time of either, since what else the machine does only adds.

Memory is the process's resident peak (VmHWM, reset before) above what was resident before the work:
its results and scratch with all threads, without its arguments and without child processes. Where
the kernel lets nobody reset the peak, it is left out.
"""

from __future__ import annotations

import ctypes
import gc
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.floors import Floor
from benchmarks.memory import resident

T = TypeVar("T")
SECONDS = 0.3


def measure(
    benchmark: BenchmarkFixture,
    work: Callable[[], T],
    floor: Floor,
    *,
    elements: int,
    rounds: int | None = None,
    fresh: Callable[[], object] | None = None,
    headline: str | None = None,
) -> T:
    """Run the work and its floor in turn and record both.

    Args:
        benchmark: the fixture.
        work: does it once; what the last round returned is returned, for the check.
        floor: runs before every round.
        elements: how many elements (words, parameters, secrets) one run handles.
        rounds: timed runs, without a first that does not count; None takes as many as fit into
            ``SECONDS``, after such a first.
        fresh: called before every round, untimed, to set the stage.
        headline: what the README's table calls it, where it has a row.
    """
    times: list[float] = []

    def before() -> None:
        if fresh is not None:
            fresh()
        times.append(seconds_of(floor.run))

    with PeakMemory() as peak:
        if rounds is None:
            turn = seconds_of(before) + seconds_of(work)
            rounds = min(max(int(SECONDS / turn), 3), 100)
        result: T = benchmark.pedantic(work, setup=before, rounds=rounds)
    record(
        benchmark,
        floor=floor.name,
        floor_seconds=min(times),
        elements=elements,
        peak_bytes=peak.bytes,
        headline=headline,
    )
    return result


def seconds_of(work: Callable[[], object]) -> float:
    """How long one run takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def record(
    benchmark: BenchmarkFixture,
    *,
    floor: str,
    floor_seconds: float,
    elements: int,
    seconds: float | None = None,
    peak_bytes: int | None = None,
    headline: str | None = None,
    **more: Any,
) -> None:
    """Put a floor that was measured beside a benchmark into the benchmark's ``extra_info``.

    Args:
        benchmark: the fixture, after it ran.
        floor: the floor's name.
        floor_seconds: its least time.
        elements: how many elements one run handles.
        seconds: least time of the work, where what the fixture timed holds more than that.
        peak_bytes: peak of memory, where it was measured.
        headline: what the README's table calls it.
        more: whatever else belongs to the result, JSON values by name.
    """
    if headline is not None:
        more["headline"] = headline
    benchmark.extra_info |= more
    if benchmark.stats is None:  # --benchmark-disable
        return
    if seconds is None:
        seconds = benchmark.stats.stats.min
    benchmark.extra_info |= {
        "seconds": seconds,
        "floor": floor,
        "floor_seconds": floor_seconds,
        "ratio_to_floor": seconds / floor_seconds,
        "elements": elements,
        "ns_per_element": seconds / elements * 1e9,
        "peak_bytes": peak_bytes,
    }


class PeakMemory:
    """How far a process's resident memory rises above what it was; ``bytes`` after the block."""

    bytes: int | None = None

    def __enter__(self) -> PeakMemory:
        gc.collect()
        with suppress(OSError, AttributeError):  # freed pages back to the system, as far as glibc
            ctypes.CDLL(None).malloc_trim(0)
        self._can_reset = _reset_peak()
        self._before = resident("VmRSS")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._can_reset:
            self.bytes = max(0, resident("VmHWM") - self._before)


def _reset_peak() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True
