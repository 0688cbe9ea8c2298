"""What a call holds is free when it is over and its work is done, and not before."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from secagg.coordinator.places import Places


class Call:
    """A call that ends when a test says so; duck-typed for a servicer context."""

    def __init__(self) -> None:
        self.ends: list[Callable[[Any], None]] = []

    def add_done_callback(self, end: Callable[[Any], None]) -> None:
        self.ends.append(end)

    def end(self) -> None:
        for end in self.ends:
            end(self)


def held() -> tuple[Call, Places, list[str]]:
    call = Call()
    places, freed = Places(call), list[str]()  # type: ignore[arg-type]
    places.hold(lambda: freed.append("slot"))
    places.hold(lambda: freed.append("account"))
    return call, places, freed


def test_a_call_without_work_frees_at_its_end() -> None:
    call, _, freed = held()
    assert freed == []
    call.end()
    assert freed == ["slot", "account"]


async def test_work_that_is_done_first_frees_nothing() -> None:
    call, places, freed = held()
    assert await places.work(asyncio.sleep(0, "done")) == "done"
    await asyncio.sleep(0)
    assert freed == []
    call.end()
    assert freed == ["slot", "account"]


@pytest.mark.parametrize("fails", [False, True])
async def test_work_goes_on_though_its_caller_hung_up(fails: bool) -> None:
    call, places, freed = held()
    release, finished = asyncio.Event(), asyncio.Event()

    async def work() -> None:
        await release.wait()
        finished.set()
        if fails:
            raise ValueError

    caller = asyncio.create_task(places.work(work()))
    await asyncio.sleep(0)
    caller.cancel()
    with pytest.raises(asyncio.CancelledError):
        await caller
    call.end()
    assert freed == []
    release.set()
    await finished.wait()
    await asyncio.sleep(0)
    assert freed == ["slot", "account"]
