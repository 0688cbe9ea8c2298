"""Runs sessions by the monotonic clock and wakes those who wait.

One lock a session: the state machine is only entered by one call at a time, in a worker thread, so
that hashing and adding vectors does not hold up other calls. Waiting calls sleep on the session's
condition and look again when anything has changed.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import math
import time
from collections.abc import Callable
from typing import Final, ParamSpec, TypeVar

import structlog

from secagg.coordinator.session import Session
from secagg.coordinator.state import State
from secagg.errors import RoundAborted, SecaggError, StorageDamaged, StorageFailed

P = ParamSpec("P")
T = TypeVar("T")
LONG_POLL_SECONDS: Final = 25.0


class Stopping(SecaggError):
    """Nobody gets in any more; the coordinator that is started next answers."""


class Driver:
    """Drives one session until it ends or the server stops.

    Args:
        session: which.
        fail: called once if the session could not be written down, or its files are not what was
            written. What it holds then was never acknowledged and must not be seen, so nobody gets
            in any more; the process has to end.
    """

    def __init__(self, session: Session, fail: Callable[[SecaggError], None]) -> None:
        self.session = session
        self._fail = fail
        self._changed = asyncio.Condition()
        self._wake = asyncio.Event()
        self._nudged = False
        self._stopped = False
        self._log = structlog.get_logger().bind(session=session.config.name)
        self._reported: RoundAborted | None = None
        self._released = len(session.results)
        self._task = asyncio.create_task(self._run())

    async def call(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Enter the session: run ``work`` alone, then let everybody look again.

        A caller that hangs up cannot stop its work's thread, so the work keeps the lock to its end:
        the same message, sent again meanwhile, must not be folded in beside it.
        """
        return await asyncio.shield(self._alone(functools.partial(work, *args, **kwargs)))

    async def look(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Look at the session while nobody else changes it; for what is quick."""
        async with self._changed:
            self._check_open()  # CHECK: driver-look
            return work(*args, **kwargs)

    def wake(self) -> None:
        """Let everybody look again: what the session depends on has changed."""
        self._nudged = True
        self._wake.set()

    async def wait(self, look: Callable[[], T | None]) -> T | None:
        """Return what ``look`` finds, at once or on a change; None after 25 s or as it stops."""
        # CHECK: driver-wait
        self._check_open()  # who asks again is told to try later, not at once
        self._wake.set()  # a first look may have set a new deadline
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LONG_POLL_SECONDS), self._changed:
                while not self._stopped and (found := look()) is None:
                    await self._changed.wait()
                return None if self._stopped else found
        return None

    async def stop(self) -> None:
        """Stop driving, and let those who wait go."""
        self._stopped = True
        self._wake.set()
        await self._task  # what it is in the middle of is written down, or not begun
        async with self._changed:
            self._changed.notify_all()

    async def _alone(self, work: Callable[[], T]) -> T:
        async with self._changed:
            self._check_open()  # CHECK: driver-call
            try:
                return await asyncio.to_thread(work)
            except (StorageDamaged, StorageFailed) as error:
                self._give_up(error)
                raise
            finally:
                self._changed.notify_all()
                self._wake.set()

    def _check_open(self) -> None:
        if self._stopped:  # CHECK: driver-open
            raise Stopping("coordinator-stopping", "The coordinator is stopping.", "Try again.")

    def _give_up(self, error: SecaggError) -> None:
        self._stopped = True
        self._fail(error)

    async def _run(self) -> None:
        try:
            while self.session.state is State.ACTIVE and not self._stopped:
                await self._advance()
        except (StorageDamaged, StorageFailed) as error:
            self._give_up(error)
        except Exception as error:  # noqa: BLE001 - fail-stop: no sum rather than a wrong one
            self._log.error("session-failed", kind=type(error).__name__)
            await self._abort()
        async with self._changed:
            self._changed.notify_all()
        self._log.info("session-ended", state=str(self.session.state))

    async def _abort(self) -> None:
        with contextlib.suppress(StorageFailed, Stopping):  # that has given up already
            await self.call(self.session.abort)

    async def _advance(self) -> None:
        """Do what is due, then sleep until something may be."""
        self._wake.clear()
        async with self._changed:
            if self._nudged:
                self._nudged = False
                self._changed.notify_all()
            while not self._stopped and await asyncio.to_thread(
                self.session.tick, time.monotonic()
            ):
                self._changed.notify_all()
                self._report()
        due = self.session.due() - time.monotonic()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._wake.wait(), None if math.isinf(due) else max(due, 0.0))

    def _report(self) -> None:
        """Log where the session stands: names, phases and counts, never a protocol value."""
        session, live = self.session, self.session.attempt
        if live is not None:
            self._log.info(
                "phase",
                round=session.round,
                attempt=live.number,
                phase=str(live.server.phase),
                expected=len(live.server.expected),
                cohort=len(live.descriptor.cohort),
            )
        elif session.last_abort is not None and session.last_abort[2] is not self._reported:
            round_number, attempt, self._reported = session.last_abort
            error = self._reported
            self._log.warning(
                "attempt-aborted",
                round=round_number,
                attempt=attempt,
                phase=str(error.phase),
                have=error.have,
                need=error.need,
                blamed=list(error.blamed),
            )
        elif len(session.results) > self._released:
            self._released = len(session.results)
            self._log.info(
                "round-released",
                round=len(session.results),
                task=session.results[-1].task,
                survivors=len(session.results[-1].survivors),
                state=str(session.state),
            )
