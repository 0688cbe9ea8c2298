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

from .oracle import chance, exact_sum, vector

STEPS = (
    "advertise_keys",
    "share_keys",
    "mask_input",
    "check_survivors",
    "check_consistency",
    "reveal_shares",
)
KILLED_SHARE = 0.2
"""Of the drops, how many are a death; the rest leave, which costs the others no deadline."""
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
    """

    root: str
    silo: str
    key: str
    drop: float

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
                if (self._root / "closed").exists():
                    return
                number = max(number, int((self._root / "oldest").read_text()))
                time.sleep(PAUSE_SECONDS)
            except SessionEnded:
                if (self._root / "closed").exists():
                    return
                raise
            else:
                number += 1

    def _play(self, number: int) -> None:
        name = session_name(number)
        with client_sdk.join(name, profile=self._root / self._orders.silo) as session:
            for call in range(1, session.task_rounds(name) + 1):
                began = time.monotonic()
                outcome = self._aggregate(session, call)
                self._note(number, outcome, time.monotonic() - began)

    def _aggregate(self, session: Session, call: int) -> Outcome:
        own = vector(self._key, self._orders.silo, session.name, call).astype(np.float64)
        for _ in range(TRIES):
            try:
                return session.aggregate(session.name, {"x": own}, weight=1.0, metrics={})
            except (RoundAborted, PolicyRefused, TooLate) as error:  # as an operator would
                self._write({"refused": type(error).__name__, "text": str(error)})
        raise AssertionError(f"{session.name}, round {call} has failed {TRIES} times")

    def _note(self, number: int, outcome: Outcome, seconds: float) -> None:
        """Judge a result, each time that it is given; write it down once, or if it is wrong."""
        expected = exact_sum(self._key, outcome.survivors, session_name(number), outcome.round)
        total = outcome.tensors["x"]
        right = bool(np.array_equal(total, expected)) and len(outcome.survivors) >= 3
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
        dies = chance(self._key, "dies", *self._place) < KILLED_SHARE
        self._write({"drop": step, "dies": dies})
        if dies:
            os.kill(os.getpid(), signal.SIGKILL)
        raise Dropped


def main() -> None:
    hurry()
    Silo(Orders.read(Path(sys.argv[1]))).play()


if __name__ == "__main__":
    main()
