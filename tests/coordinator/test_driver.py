"""The driver: one caller at a time, those who wait are woken, and time closes phases."""

from __future__ import annotations

import asyncio
import math
import threading
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import structlog

from secagg.config import SiloId
from secagg.coordinator import driver as module
from secagg.coordinator.driver import Driver, Stopping
from secagg.coordinator.spool import Spooled
from secagg.coordinator.state import Ended, State, Step
from secagg.errors import (
    FaultyClient,
    RoundAborted,
    SecaggError,
    StorageDamaged,
    StorageFailed,
)
from secagg.masking.messages import Descriptor, Result

from .play import World, exact_sum

A = SiloId("a")


@asynccontextmanager
async def driving(world: World) -> AsyncIterator[Driver]:
    driver = Driver(world.session, pytest.fail)
    try:
        yield driver
    finally:
        await driver.stop()


class Clock:
    """Monotonic time that a test moves by hand."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: self.now))


async def soon(awaitable: Awaitable[Any]) -> Any:
    """The answer, or a failure of the test instead of a hang."""
    return await asyncio.wait_for(awaitable, 30)


def following(world: World, round_number: int = 1, attempt: int = 0, seen: int = 0) -> Any:
    return lambda: world.session.next(A, round_number, attempt, seen)


async def test_what_is_there_is_found_at_once(world: World) -> None:
    async with driving(world) as driver:
        assert await soon(driver.wait(lambda: 7)) == 7


async def test_a_release_is_told_once(world: World) -> None:
    with structlog.testing.capture_logs() as told:
        async with driving(world) as driver:
            world.session.results.append(SimpleNamespace(task="training", survivors=("a", "b")))
            driver._report()
            driver._report()  # something else has changed
            world.session.results.pop()
    assert [line["event"] for line in told].count("round-released") == 1


async def test_a_long_poll_ends_by_itself(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LONG_POLL_SECONDS", 0.05)
    async with driving(world) as driver:
        assert await soon(driver.wait(lambda: None)) is None
        await soon(driver.call(lambda: None))  # and leaves the session usable


async def test_a_long_poll_is_bounded_while_others_come_and_go(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LONG_POLL_SECONDS", 0.1)
    async with driving(world) as driver:
        poll = asyncio.create_task(driver.wait(lambda: None))
        count = 0
        while not poll.done():
            await soon(driver.call(lambda: None))
            count += 1
        assert await poll is None
        assert count > 1


async def test_a_change_wakes_those_who_wait(world: World) -> None:
    world.open()
    async with driving(world) as driver:
        polls = [asyncio.create_task(driver.wait(following(world))) for _ in range(5)]
        for name in world.players:
            await soon(driver.call(world.ready, name))
        for poll in polls:
            assert isinstance(await soon(poll), Descriptor)


async def test_a_cancelled_poll_disturbs_nobody(world: World) -> None:
    async with driving(world) as driver:
        gone = asyncio.create_task(driver.wait(lambda: None))
        kept = asyncio.create_task(driver.wait(following(world)))
        await soon(driver.call(lambda: None))
        gone.cancel()
        with pytest.raises(asyncio.CancelledError):
            await gone
        await soon(driver.call(world.session.abort))
        assert isinstance(await soon(kept), Ended)


async def test_an_error_is_its_caller_s_alone(world: World) -> None:
    def fail() -> None:
        raise FaultyClient("a", "test", "Refused.")

    async with driving(world) as driver:
        with pytest.raises(FaultyClient):
            await soon(driver.call(fail))
        assert await soon(driver.call(lambda: 5)) == 5
        with pytest.raises(FaultyClient):
            await soon(driver.look(fail))
        assert await soon(driver.look(lambda number: number, 6)) == 6


async def test_one_at_a_time(world: World) -> None:
    inside: list[int] = []
    most = 0
    lock = threading.Lock()

    def work() -> None:
        nonlocal most
        with lock:
            inside.append(1)
            most = max(most, len(inside))
        sum(range(20_000))  # long enough for the threads to be switched
        with lock:
            inside.pop()

    async with driving(world) as driver:
        await soon(asyncio.gather(*(driver.call(work) for _ in range(30))))
    assert most == 1


async def test_work_whose_caller_hung_up_is_still_alone(world: World) -> None:
    """A call that timed out at the client is cancelled here, but its thread goes on."""
    entered, release = threading.Event(), threading.Event()
    order: list[str] = []

    def slow() -> None:
        entered.set()
        assert release.wait(30)
        order.append("slow")

    async with driving(world) as driver:
        first = asyncio.create_task(driver.call(slow))
        await asyncio.to_thread(entered.wait, 30)
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        second = asyncio.create_task(driver.call(order.append, "second"))
        looked = asyncio.create_task(driver.look(order.append, "look"))
        done, _ = await asyncio.wait({second, looked}, timeout=0.1)
        assert not done
        release.set()
        await soon(second)
        await soon(looked)
    assert order[0] == "slow"
    assert sorted(order[1:]) == ["look", "second"]


async def test_a_commit_sent_again_after_a_hang_up_is_summed_once(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.start()
    world.phases(2)
    player = world.players["a"]
    player.step(send=False)
    player.put()
    message = player.sent[-1]
    entered, release = threading.Event(), threading.Event()

    def slow(vector: Spooled) -> bytes:
        entered.set()
        assert release.wait(30)
        return vector.blob.stored.digest

    clock = Clock(monkeypatch)
    clock.now = world.now
    async with driving(world) as driver:
        with monkeypatch.context() as patch:
            patch.setattr(Spooled, "digest", slow)
            first = asyncio.create_task(driver.call(world.session.send, message, 1, 1))
            await asyncio.to_thread(entered.wait, 30)
            first.cancel()
            with pytest.raises(asyncio.CancelledError):
                await first
            second = asyncio.create_task(driver.call(world.session.send, message, 1, 1))
            release.set()
            assert await soon(second) is False
        for name in "bcd":
            world.players[name].step()
        await soon(driver.call(lambda: None))
        for _ in range(2):
            for other in world.players.values():
                await soon(driver.wait(other.look))
                await soon(driver.call(other.step))
        assert isinstance(await soon(driver.wait(following(world, 1, 1, 5))), Result)
    np.testing.assert_array_equal(world.sum(1), exact_sum(world.players.values()))


async def test_a_whole_round(world: World) -> None:
    """Four silos at once, each in its own task, and nobody calls ``tick``."""
    world.open()
    for name, player in world.players.items():
        player.expect("training", 1, world.session.base("training"))
        assert name == player.name

    async def play(driver: Driver, name: str) -> Any:
        player = world.players[name]
        await driver.call(world.ready, name, fresh=False)
        while not isinstance(event := await soon(driver.wait(player.look)), Result):
            message = player.answer(event)
            await driver.call(player.send, message)
        return event

    async with driving(world) as driver:
        results = await asyncio.gather(*(play(driver, name) for name in world.players))
    assert results == world.session.results * 4
    np.testing.assert_array_equal(world.sum(1), exact_sum(world.players.values()))


async def test_a_deadline_closes_a_phase(tmp_path: Path) -> None:
    world = World(tmp_path / "w", phase_deadline=0.05)
    world.open()
    async with driving(world) as driver:
        for name in world.players:
            world.now = asyncio.get_running_loop().time()
            await soon(driver.call(world.ready, name))
        event = await soon(driver.wait(following(world, 1, 1, Step.DESCRIPTOR)))
        assert isinstance(event, RoundAborted)
        assert (event.phase, event.have, event.need) == ("advertise_keys", 0, 3)


async def test_time_decides_by_the_monotonic_clock(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(monkeypatch)
    world.open()
    async with driving(world) as driver:
        for name in "abc":
            await soon(driver.call(world.ready, name))
        clock.now += world.config.train_deadline - 0.01
        await soon(driver.call(lambda: None))
        assert await soon(driver.look(lambda: world.session.attempt)) is None
        clock.now += 0.01
        await soon(driver.call(lambda: None))
        event = await soon(driver.wait(following(world)))
        assert isinstance(event, Descriptor)
        assert event.cohort == ("a", "b", "c")


async def test_the_driver_sleeps_when_nothing_is_due(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(monkeypatch)
    world.open()
    world.open("statistics")
    ticks = 0
    tick = world.session.tick

    def counted(now: float) -> bool:
        nonlocal ticks
        ticks += 1
        return tick(now)

    monkeypatch.setattr(world.session, "tick", counted)
    async with driving(world) as driver:
        for name, task in (("a", "training"), ("b", "training")):
            await soon(driver.call(world.ready, name, task=task))
        for name in "cd":
            await soon(driver.call(world.ready, name, task="statistics"))
        clock.now += 1e6  # past every deadline, and no group is large enough
        for _ in range(20):
            await soon(driver.call(lambda: None))
        assert world.session.due() == math.inf
        before = ticks
        for _ in range(200):  # turns of the loop in which a spinning driver would tick
            await asyncio.sleep(0)
        await asyncio.to_thread(lambda: None)
        assert ticks <= before + 1


async def test_an_aborted_session_ends_the_driver(world: World) -> None:
    async with driving(world) as driver:
        poll = asyncio.create_task(driver.wait(following(world)))
        await soon(driver.call(world.session.abort))
        assert isinstance(await soon(poll), Ended)
        await soon(driver._task)


async def test_an_error_of_ours_ends_the_session(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk, say: whoever waits is told, and nothing wrong is released."""

    def fail(now: float) -> bool:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(world.session, "tick", fail)
    async with driving(world) as driver:
        event = await soon(driver.wait(following(world)))
        assert event == Ended("Session study is aborted.")
        await soon(driver._task)
    assert world.session.state is State.ABORTED


@pytest.mark.parametrize("kind", [StorageDamaged, StorageFailed])
@pytest.mark.parametrize("ticking", [False, True])
async def test_a_disk_that_fails_or_lies_ends_it_all(
    world: World, kind: type[SecaggError], ticking: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody sees what may rest on it; the session is not aborted: the next process goes on."""
    failures: list[SecaggError] = []

    def fail(*_: object) -> bool:
        raise kind("storage", "The disk is ill.")

    driver = Driver(world.session, failures.append)
    if ticking:
        monkeypatch.setattr(world.session, "tick", fail)
        driver.wake()
        await soon(driver._task)
    else:
        with pytest.raises(kind):
            await soon(driver.call(fail))
    assert [type(error) for error in failures] == [kind]
    for call in (driver.call(lambda: 1), driver.look(lambda: 1), driver.wait(lambda: 1)):
        with pytest.raises(Stopping):
            await soon(call)
    await soon(driver.stop())
    assert world.session.state is State.ACTIVE


async def test_a_stop_lets_those_who_wait_go(world: World) -> None:
    driver = Driver(world.session, pytest.fail)
    polls = [asyncio.create_task(driver.wait(lambda: None)) for _ in range(3)]
    await soon(driver.call(lambda: None))
    await soon(driver.stop())
    assert await soon(asyncio.gather(*polls)) == [None] * 3
    with pytest.raises(Stopping):
        await soon(driver.wait(lambda: 1))
    await soon(driver.stop())
