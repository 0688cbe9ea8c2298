"""Honest silos that aggregate without end, and the sums that they must get.

A silo's update is a function of its name and the round, of multiples of 1/8 that the fixed point
holds exactly, so the sum of a round's survivors can be computed from the result's names alone, in
Python's integers, and must be the very same bits at every silo.
"""

from __future__ import annotations

import hashlib
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import numpy.typing as npt

import client_sdk
from client_sdk.session import Outcome, Session
from secagg.errors import SecaggError, SessionEnded

LENGTH = 40
TASK = "statistics"


def eighths(silo: str, round_number: int) -> list[int]:
    """A silo's update for a round, in units of 1/8."""
    stream = hashlib.shake_128(f"{silo}/{round_number}".encode()).digest(2 * LENGTH)
    return [int.from_bytes(stream[at : at + 2], "big") % 4096 - 2048 for at in range(0, 80, 2)]


def update(silo: str, round_number: int) -> dict[str, npt.NDArray[np.float64]]:
    """A silo's update for a round."""
    return {"x": np.array(eighths(silo, round_number)) / 8}


def exact(outcome: Outcome) -> list[float]:
    """The sum of a round's survivors."""
    columns = zip(*(eighths(silo, outcome.round) for silo in outcome.survivors), strict=True)
    return [sum(column) / 8 for column in columns]


class Rounds:
    """Silos in threads that aggregate in one session until it is over.

    Args:
        session: its name.
        silos: their profiles, by name.
        count: how many rounds; None for as many as there are.
        stubborn: join again after any refusal: somebody else calls under the same certificate.
    """

    def __init__(
        self,
        session: str,
        silos: dict[str, Path],
        count: int | None = None,
        *,
        stubborn: bool = False,
    ) -> None:
        self._session, self._count, self._stubborn = session, count, stubborn
        self._changed = threading.Condition()
        self._sums: dict[int, bytes] = {}
        self._pool = ThreadPoolExecutor(len(silos), "honest")
        self._work = [self._pool.submit(self._one, *silo) for silo in silos.items()]

    @property
    def exact(self) -> int:
        """How many rounds gave their exact sum so far."""
        return len(self._sums)

    def check(self) -> None:
        """Return if no silo has failed so far."""
        for work in self._work:
            if work.done():
                work.result()

    def reach(self, count: int, seconds: float) -> None:
        """Wait until so many rounds gave their exact sum.

        Raises:
            TimeoutError: they do not come, or a silo's own error.
        """
        end = time.monotonic() + seconds
        while self.exact < count:
            self.check()
            if time.monotonic() > end:
                raise TimeoutError(f"{self.exact} of {count} rounds after {seconds} s")
            with self._changed:
                self._changed.wait(0.5)

    def join(self, seconds: float) -> int:
        """Wait for all silos; returns how many rounds gave their exact sum."""
        for work in self._work:
            work.result(seconds)
        self._pool.shutdown()
        return self.exact

    def _one(self, silo: str, profile: Path) -> None:
        while True:
            try:
                return self._stay(silo, profile)
            except SessionEnded:
                if self._count is None:
                    return None
                raise
            except SecaggError:
                if not self._stubborn:
                    raise

    def _stay(self, silo: str, profile: Path) -> None:
        with client_sdk.join(self._session, profile=profile) as session:
            while self._count is None or session.rounds_done < self._count:
                self._round(silo, session)

    def _round(self, silo: str, session: Session) -> None:
        mine = update(silo, session.rounds_done + 1)
        self._take(session.aggregate(TASK, mine, weight=1.0, metrics={}))

    def _take(self, outcome: Outcome) -> None:
        found = outcome.tensors["x"]
        assert found.tolist() == exact(outcome), (outcome.round, outcome.survivors)
        with self._changed:
            assert self._sums.setdefault(outcome.round, found.tobytes()) == found.tobytes()
            self._changed.notify_all()
