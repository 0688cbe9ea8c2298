"""Virtual time and threads that take turns: what runs when is a function of the seed alone.

Silos are blocking programs, so each runs in a thread of its own; but one thread at a time, and
which one is next is said by a heap of events. Whoever has to wait works the heap off itself until
it meets its own turn or somebody else's, which saves half of the hand-overs.
"""

from __future__ import annotations

import heapq
import threading
from collections.abc import Callable


class Crashed(BaseException):
    """This simulated process is dead: nothing it does has an effect any more."""


class Process:
    """One incarnation of a silo or of the coordinator.

    Args:
        actor: whose.
        number: from 1.
        strikes: after how many of its disk's calls it dies; None for never.
        on_death: told once, when it dies.
    """

    def __init__(
        self, actor: str, number: int, strikes: int | None, on_death: Callable[[str], None]
    ) -> None:
        self.actor = actor
        self.number = number
        self.dead = False
        self.fiber: Fiber | None = None
        self._strikes = strikes
        self._on_death = on_death

    def check(self) -> None:
        """Raise if it is dead."""
        if self.dead:
            raise Crashed

    def strike(self) -> bool:
        """Count one call of its disk; whether it dies at this one."""
        self.check()
        if self._strikes is None:
            return False
        self._strikes -= 1
        return self._strikes < 0

    def spare(self) -> None:
        """Let it live: its disk kills it no more."""
        self._strikes = None

    def die(self, why: str) -> None:
        """Die; twice is once."""
        if not self.dead:
            self.dead = True
            self._on_death(why)


class Fiber:
    """A thread that runs when it is told to."""

    def __init__(self, clock: Clock, process: Process, work: Callable[[], None]) -> None:
        self.process = process
        self.turn = threading.Lock()
        self.turn.acquire()
        self.done = False
        self._clock = clock
        self._work = work
        self._thread = threading.Thread(target=self._main, name=process.actor, daemon=True)
        self._thread.start()

    @property
    def ident(self) -> int | None:
        """Its thread's."""
        return self._thread.ident

    def _main(self) -> None:
        self.turn.acquire()
        self._clock.enter()
        try:
            self._work()
        except Crashed:
            pass
        except BaseException as error:  # noqa: BLE001 - the main thread raises it
            self._clock.fail(error)
        self.done = True
        self._clock.main.release()


class Clock:
    """The heap of what is to happen, and whose turn it is."""

    def __init__(self) -> None:
        self.now = 0.0
        self.main = threading.Lock()
        self.main.acquire()
        self.over = False
        self.threads: set[int] = set()
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._count = 0
        self._next: Fiber | None = None
        self._fibers: list[Fiber] = []
        self._failure: BaseException | None = None

    def enter(self) -> None:
        """Note that the calling thread is of the simulation."""
        self.threads.add(threading.get_ident())

    def fail(self, error: BaseException) -> None:
        """End the run: the simulation itself is broken."""
        self._failure = self._failure or error
        self.over = True

    def after(self, delay: float, work: Callable[[], None]) -> None:
        """Have something done after a while; what is due at one time is done in this order."""
        self._count += 1
        heapq.heappush(self._heap, (self.now + delay, self._count, work))

    def spawn(self, process: Process, work: Callable[[], None]) -> None:
        """Start a process' program; its first turn comes with the next event."""
        fiber = process.fiber = Fiber(self, process, work)
        self._fibers.append(fiber)
        self.after(0.0, lambda: self.resume(fiber))

    def resume(self, fiber: Fiber) -> None:
        """Give a waiting thread its turn, when this event is done."""
        if not fiber.done:
            assert self._next is None
            self._next = fiber

    def wait(self, process: Process) -> None:
        """Let others run until this process' thread is resumed."""
        process.check()
        assert process.fiber is not None
        self._pump(process.fiber)
        process.check()

    def sleep(self, process: Process, seconds: float) -> None:
        """Let virtual time pass for a process."""
        fiber = process.fiber
        assert fiber is not None
        slept = [False]

        def wake() -> None:
            if not process.dead:
                slept[0] = True
                self.resume(fiber)

        self.after(seconds, wake)
        while not slept[0]:
            self.wait(process)

    def run(self) -> None:
        """Work everything off, from the main thread, and end all other threads."""
        self.enter()
        self._pump(None)
        for fiber in self._fibers:
            if not fiber.done:
                fiber.process.dead = True
                fiber.turn.release()
                self.main.acquire()
        if self._failure is not None:
            raise self._failure

    def _pump(self, me: Fiber | None) -> None:
        while True:
            if self.over or not self._heap:
                if me is None:
                    return
                self.over = True
                self.main.release()
                me.turn.acquire()
                return
            self.now, _, work = heapq.heappop(self._heap)
            try:
                work()
            except BaseException as error:  # noqa: BLE001 - never into a silo's program
                self.fail(error)
                continue
            chosen, self._next = self._next, None
            if chosen is None:
                continue
            if chosen is me:
                return
            chosen.turn.release()
            if me is None:
                self.main.acquire()
            else:
                me.turn.acquire()
                return
