"""Work on ranges: all of it is done once, at once, and whatever goes wrong is told at the end."""

from __future__ import annotations

import gc
import os
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Thread

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from secagg import parallel as module
from secagg.parallel import in_ranges

Work = Callable[[int, int], None]


@contextmanager
def threads_that(start: Callable[[Thread], None]) -> Iterator[None]:
    """Threads whose start is another one."""
    kind = type("Changed", (Thread,), {"start": start})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "Thread", kind)
        yield


def ranges_of(
    length: int, grain: int, threads: int | None = None, worth: int = 2**17
) -> list[tuple[int, int]]:
    found: list[tuple[int, int]] = []
    in_ranges(length, grain, lambda start, stop: found.append((start, stop)), threads, worth=worth)
    return sorted(found)


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 100), st.integers(1, 12), st.none() | st.integers(1, 9), st.integers(1, 40))
def test_ranges_are_all_of_a_length(
    length: int, grain: int, threads: int | None, worth: int
) -> None:
    ranges = ranges_of(length, grain, threads, worth)
    assert [start for start, _ in ranges] == [0, *(stop for _, stop in ranges[:-1])]
    assert ranges[-1][1] == length
    assert all(start % grain == 0 for start, _ in ranges)
    assert len(ranges) <= (threads or max(1, length // worth))


@pytest.mark.parametrize(
    ("length", "count"), [(0, 1), (9, 1), (19, 1), (29, 2), (30, 3), (1000, 3)]
)
def test_how_many_threads(length: int, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One a processor, and none for what is not worth it."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2})
    assert len(ranges_of(length, 1, worth=10)) == count


def test_ranges_run_at_once_and_one_of_them_here() -> None:
    """Each waits for the others."""
    together, inside = threading.Barrier(3), {}

    def work(start: int, stop: int) -> None:
        together.wait(30)
        inside[start] = threading.current_thread()

    in_ranges(9, 3, work, threads=3)
    assert inside[0] is threading.current_thread()
    assert len(set(inside.values())) == 3


@pytest.mark.parametrize("granted", [0, 1, 2])
def test_what_no_thread_can_be_started_for_is_done_here(granted: int) -> None:
    """The system's limit on threads is a matter of time, not of results."""
    done: dict[int, bool] = {}
    started: list[Thread] = []

    def start(thread: Thread) -> None:
        if len(started) == granted:
            raise RuntimeError("can't start new thread")
        started.append(thread)
        Thread.start(thread)

    def work(first: int, stop: int) -> None:
        assert stop == first + 3
        done[first] = threading.current_thread() is threading.main_thread()

    with threads_that(start):
        in_ranges(12, 3, work, threads=4)
    assert sorted(done) == [0, 3, 6, 9]
    assert sum(done.values()) == 4 - granted


@pytest.mark.parametrize("failing", [0, 3, 6])
@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt, SystemExit])
def test_a_failure_is_raised_when_all_have_ended(failing: int, kind: type[BaseException]) -> None:
    """Else who undoes it would do so beside others that still do."""
    failed, ended = threading.Event(), []

    def work(start: int, stop: int) -> None:
        if start == failing:
            failed.set()
            raise kind("no")
        assert failed.wait(30)
        ended.append(start)

    with pytest.raises(kind, match="no"):
        in_ranges(9, 3, work, threads=3)
    assert sorted(ended) == sorted({0, 3, 6} - {failing})


def test_a_range_that_is_done_here_waits_for_the_failure_of_none() -> None:
    """Ranges that no thread was started for are all tried, whatever becomes of the first."""
    tried: list[int] = []

    def start(thread: Thread) -> None:
        raise RuntimeError("can't start new thread")

    def work(first: int, stop: int) -> None:
        tried.append(first)
        raise ValueError(str(first))

    with threads_that(start), pytest.raises(ValueError, match="0"):
        in_ranges(9, 3, work, threads=3)
    assert tried == [0, 3, 6]


def test_an_interrupt_waits_for_the_others() -> None:
    """What is shared is still being written when somebody presses Ctrl-C."""
    release, ended = threading.Event(), []

    def work(start: int, stop: int) -> None:
        if start:
            assert release.wait(30)
            ended.append(start)

    class Interrupted(Thread):
        interrupts = 2

        def join(self, timeout: float | None = None) -> None:
            if Interrupted.interrupts:
                Interrupted.interrupts -= 1
                raise KeyboardInterrupt
            release.set()
            super().join(timeout)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "Thread", Interrupted)
        with pytest.raises(KeyboardInterrupt):
            in_ranges(9, 3, work, threads=3)
    assert sorted(ended) == [3, 6]


class Held:
    """Something large."""


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("failing", [None, 0, 6])
@pytest.mark.parametrize("refuses", [False, True])
def test_nothing_that_work_held_is_kept(threads: int, failing: int | None, refuses: bool) -> None:
    """Vectors of gigabytes do not wait for the garbage collector."""

    def start(thread: Thread) -> None:
        if refuses:
            raise RuntimeError("can't start new thread")
        Thread.start(thread)

    def run() -> weakref.ref[Held]:
        held = Held()

        def work(first: int, stop: int) -> None:
            assert held
            if failing is not None and first <= failing < stop:
                raise ValueError("no")

        try:
            in_ranges(9, 3, work, threads)
        except ValueError:
            assert failing is not None
        else:
            assert failing is None
        return weakref.ref(held)

    gc.disable()
    try:
        with threads_that(start):
            assert run()() is None
    finally:
        gc.enable()
