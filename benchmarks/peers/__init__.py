"""Other implementations of secure aggregation, driven from outside, and ours beside them.

What is called here is what is installed (``make bench-peers``); nothing of theirs is copied.

Both sides are timed by the processor time of this process, which is kept on one core: for work
without a network or a disk that is what a clock shows on an idle machine, and a busy one, which
stretches a round of minutes more than one of seconds, would spoil the ratio.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from time import process_time
from typing import TypeVar

import numpy as np
import pytest
from pytest_benchmark.fixture import BenchmarkFixture

T = TypeVar("T")
clock = process_time
group = partial(pytest.mark.benchmark, timer=clock)


def updates(names: list[str], size: int) -> dict[str, np.ndarray]:
    """One float32 update in [−1, 1] a party: windows of one array, so that they cost no memory."""
    base = np.random.default_rng(7).uniform(-1, 1, size + len(names)).astype(np.float32)
    return {name: base[at : at + size] for at, name in enumerate(names)}


def check_mean(mean: np.ndarray, arrays: list[np.ndarray], error: float) -> None:
    """A fast wrong sum fails."""
    exact = np.zeros(len(mean))
    for array in arrays:
        exact += array
    exact /= len(arrays)
    exact -= mean
    assert np.abs(exact, out=exact).max() <= error


def timed(function: Callable[[], T]) -> tuple[float, T]:
    """Seconds of one call, and what it returned."""
    began = clock()
    result = function()
    return clock() - began, result


def report(
    benchmark: BenchmarkFixture,
    peer: str,
    peer_seconds: float,
    elements: int,
    target: float,
    seconds: float | None = None,
    **facts: object,
) -> None:
    """Put a comparison into the benchmark's row and on the screen, beside its target.

    Args:
        benchmark: has run ours.
        peer: name and version.
        peer_seconds: best of theirs.
        elements: parameters of a vector, to give ns per element.
        target: least speed-up.
        seconds: of ours; the benchmark's best where nothing is given.
        facts: further figures.
    """
    ours = benchmark.stats.stats.min if seconds is None else seconds
    speedup = peer_seconds / ours
    benchmark.extra_info |= {
        "peer": peer,
        "peer_seconds": round(peer_seconds, 4),
        "seconds": round(ours, 4),
        "peer_ns_per_element": round(peer_seconds / elements * 1e9, 2),
        "ns_per_element": round(ours / elements * 1e9, 2),
        "speedup": round(speedup, 1),
        "target": target,
        **facts,
    }
    show(benchmark)


def show(benchmark: BenchmarkFixture) -> None:
    """Print a row's figures: pytest-benchmark's table leaves them out."""
    figures = ", ".join(f"{name} {value}" for name, value in benchmark.extra_info.items())
    print(f"\n{benchmark.name}: {figures}")
