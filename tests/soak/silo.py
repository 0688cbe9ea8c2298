"""One silo of the soak: ``python -m tests.soak.silo ORDERS.json``.

It takes part in session after session with the real SDK, holds every result against the oracle, and
writes down what it saw. In one attempt out of ``1 / drop`` it drops out at a phase that chance
picks: its process dies at once, or it leaves in the middle and joins again.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

import client_sdk
from client_sdk.session import Outcome, Session
from secagg.errors import NotFound, PolicyRefused, RoundAborted, SessionEnded, TooLate
from secagg.masking import client as protocol
from tests.crash.silo import hurry

from .oracle import TOLERANCE, chance, exact_sum, protection, vector

STEPS = (
    "advertise_keys",
    "share_keys",
    "mask_input",
    "check_survivors",
    "check_consistency",
    "reveal_shares",
)
PAUSE_SECONDS = 0.05
TRIES = 30
"""How often a silo goes on after a round that was aborted."""


@dataclass(frozen=True)
class Orders:
    """What a silo is to do.

    Args:
        root: the soak's directory; ``root/silo`` is the profile.
        silo: its name.
        key: of the oracle and of chance, hex.
        drop: chance of dropping out of an attempt.
        dies: chance that it does so by its death; else it leaves, which costs no deadline.
        sealed_every: of so many sessions, one is sealed.
    """

    root: str
    silo: str
    key: str
    drop: float
    dies: float
    sealed_every: int

    def write(self) -> Path:
        path = Path(self.root) / f"{self.silo}.json"
        path.write_text(json.dumps(asdict(self)))
        return path

    @classmethod
    def read(cls, path: Path) -> Orders:
        return cls(**json.loads(path.read_text()))


class Dropped(Exception):
    """This silo leaves the attempt that it is in."""


def session_name(number: int) -> str:
    """Of a session and of its task: two with all parameters alike would start from one base."""
    return f"soak-{number}"


class Silo:
    """Plays until the soak's ``closed`` mark stands and its session has ended."""

    def __init__(self, orders: Orders) -> None:
        self._orders = orders
        self._root = Path(orders.root)
        self._key = bytes.fromhex(orders.key)
        self._path = self._root / f"{orders.silo}.jsonl"
        self._seen = self._before()
        self._file = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        self._fate = ""
        self._place: tuple[Any, ...] = ()
        self._watch_steps()

    def _before(self) -> set[tuple[int, int]]:
        """What earlier processes of this silo wrote down, but for a line that a kill cut short."""
        if not self._path.exists():
            return set()
        whole, _, torn = self._path.read_bytes().rpartition(b"\n")
        if torn:
            os.truncate(self._path, len(whole) + 1 if whole else 0)
        lines = [json.loads(line) for line in whole.split(b"\n") if line]
        return {(line["session"], line["round"]) for line in lines if "digest" in line}

    def play(self) -> None:
        number = max((session for session, _ in self._seen), default=1)
        while True:
            try:
                self._play(number)
            except Dropped:
                continue
            except NotFound:  # not created yet, or forgotten: this silo was away for long
                number = self._caught_up(number)
                if (self._root / "closed").exists():
                    return
                time.sleep(PAUSE_SECONDS)
            except SessionEnded:
                if (self._root / "closed").exists():
                    return
                if not self._locked_out(number):
                    raise
                number += 1
            else:
                number += 1

    def _caught_up(self, number: int) -> int:
        """The session to go on with, after one that is not there; what is left out is told."""
        oldest = int((self._root / "oldest").read_text())
        if oldest > number:
            self._write({"skipped": list(range(number, oldest))})
        return max(number, oldest)

    def _locked_out(self, number: int) -> bool:
        """Whether this silo may have lost a sealed session's key before its end; that is told.

        Nobody is asked for a key after the last sum. Who left, died or lagged shortly before, and
        keeps no keys on disk, cannot open what it missed.
        """
        if not (self._keyless and self._how.seals):
            return False
        self._write({"locked_out": number})
        return True

    def _play(self, number: int) -> None:
        name = session_name(number)
        self._keyless = True  # until a result shows that it has the session's key
        self._how = protection(number, self._orders.sealed_every)
        with client_sdk.join(name, profile=self._root / self._orders.silo) as session:
            for call in range(1, session.task_rounds(name) + 1):
                began = time.monotonic()
                outcome = self._aggregate(session, call)
                self._note(number, outcome, time.monotonic() - began)

    def _aggregate(self, session: Session, call: int) -> Outcome:
        values = vector(self._key, self._orders.silo, session.name, call, self._how)
        own = values.astype(np.float64)
        for _ in range(TRIES):
            try:
                return session.aggregate(session.name, {"x": own}, weight=1.0, metrics={})
            except (RoundAborted, PolicyRefused, TooLate) as error:  # as an operator would
                self._write({"refused": type(error).__name__, "text": str(error)})
        raise AssertionError(f"{session.name}, round {call} has failed {TRIES} times")

    def _note(self, number: int, outcome: Outcome, seconds: float) -> None:
        """Judge a result, each time that it is given; write it down once, or if it is wrong."""
        self._keyless = False
        name, total = session_name(number), outcome.tensors["x"]
        expected = exact_sum(self._key, outcome.survivors, name, outcome.round, self._how)
        off = float(np.max(np.abs(total - expected)))
        right = off <= TOLERANCE[self._how] and len(outcome.survivors) >= 3
        if right and (number, outcome.round) in self._seen:
            return
        self._seen.add((number, outcome.round))
        self._write(
            {
                "session": number,
                "round": outcome.round,
                "survivors": list(outcome.survivors),
                "digest": hashlib.sha256(total.tobytes()).hexdigest(),
                "right": right,
                "sealed": self._how.seals,
                "seconds": seconds,
                "at": time.monotonic(),
            }
        )

    def _write(self, record: dict[str, Any]) -> None:
        os.write(self._file, json.dumps(record).encode() + b"\n")

    # Dropping out.

    def _watch_steps(self) -> None:
        admit = protocol.admit

        def admitted(descriptor: Any, member: Any, *args: Any) -> Any:
            place = (descriptor.session_id, descriptor.round, descriptor.attempt)
            self._place = (self._orders.silo, *place)
            self._fate = self._draw()
            return admit(descriptor, member, *args)

        protocol.admit = admitted
        for step in STEPS:
            self._watch(step, getattr(protocol, step))

    def _draw(self) -> str:
        if chance(self._key, "drop", *self._place) >= self._orders.drop:
            return ""
        return STEPS[int(chance(self._key, "step", *self._place) * len(STEPS))]

    def _watch(self, step: str, take: Callable[..., Any]) -> None:
        def taken(*args: Any, **kwargs: Any) -> Any:
            """Take the step, and drop out before its message is sent."""
            answer = take(*args, **kwargs)
            if self._fate == step:
                self._drop(step)
            return answer

        setattr(protocol, step, taken)

    def _drop(self, step: str) -> NoReturn:
        self._fate = ""
        dies = chance(self._key, "dies", *self._place) < self._orders.dies
        self._write({"drop": step, "dies": dies})
        if dies:
            os.kill(os.getpid(), signal.SIGKILL)
        raise Dropped


def main() -> None:
    hurry()
    Silo(Orders.read(Path(sys.argv[1]))).play()


if __name__ == "__main__":
    main()
