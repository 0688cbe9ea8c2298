"""A silo of the scan: plays its rounds with the real SDK, and dies or waits where it is told.

Run by ``prelude``: ``python -P prelude.py … threat_model.scan.silo:main ORDERS.json``.
"""

from __future__ import annotations

import json
import logging
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from safetensors.numpy import save

import client_sdk
from client_sdk.session import Session
from secagg.errors import RoundAborted, TooLate
from secagg.masking import client as protocol

TASK: Final = "means"
LOSS: Final = "loss"
HEAVIEST: Final = 4.0
WORDS: Final = 96
WAIT_SECONDS: Final = 60.0
TRIES: Final = 5


@dataclass(frozen=True)
class Orders:
    """What a silo is to do.

    Args:
        profile: its directory.
        session: the session's name.
        dies: (round, step of the client) before which its process is killed, in the round's first
            attempt; (0, "") for none.
        waits: the same, before which it waits until ``mark`` is gone.
        mark: a file that it makes to say that it waits.
    """

    profile: str
    session: str
    dies: tuple[int, str] = (0, "")
    waits: tuple[int, str] = (0, "")
    mark: str = ""

    def write(self, path: Path) -> Path:
        """Write the orders where the process reads them."""
        path.write_text(json.dumps(asdict(self)))
        return path

    @classmethod
    def read(cls, path: Path) -> Orders:
        """Read the orders."""
        table = json.loads(path.read_text())
        return cls(**table | {"dies": tuple(table["dies"]), "waits": tuple(table["waits"])})


@dataclass(frozen=True)
class Update:
    """What a silo gives in a round: every number has all its bits."""

    tensors: dict[str, np.ndarray[Any, np.dtype[np.float64]]]
    weight: float
    metrics: dict[str, float]


def update(profile: Path, round_number: int) -> Update:
    """A silo's update of a round, the same after a restart."""
    drawn = random.Random(f"{profile.name}/{round_number}")
    tensor = np.array([drawn.uniform(-1, 1) for _ in range(WORDS)])
    return Update({"x": tensor}, drawn.uniform(1, HEAVIEST), {LOSS: drawn.uniform(1, 2)})


def _before(round_number: int, step: str, act: Callable[[], None]) -> None:
    if not step:
        return
    take: Callable[..., Any] = getattr(protocol, step)

    def taken(state: Any, *args: Any, **kwargs: Any) -> Any:
        descriptor = state.attempt.descriptor
        if (descriptor.round, descriptor.attempt) == (round_number, 1):
            act()
        return take(state, *args, **kwargs)

    setattr(protocol, step, taken)


def _wait(mark: Path) -> None:
    mark.touch()
    end = time.monotonic() + WAIT_SECONDS
    while mark.exists() and time.monotonic() < end:
        time.sleep(0.01)


def main() -> None:
    """Play all rounds of the session."""
    logging.basicConfig(level=logging.DEBUG)
    orders = Orders.read(Path(sys.argv[1]))
    _before(*orders.dies, lambda: os.kill(os.getpid(), signal.SIGKILL))
    _before(*orders.waits, lambda: _wait(Path(orders.mark)))
    profile = Path(orders.profile)
    with client_sdk.join(orders.session, profile=profile) as session:
        for number in range(1, session.task_rounds(TASK) + 1):
            own = update(profile, number)
            if number > 1:  # the task is open
                _keep(session, own)
            _take_part(session, own)


def _keep(session: Session, own: Update) -> None:
    """As training does before an epoch is over: what there is, for a restart."""
    model = {name: 3 * tensor for name, tensor in own.tensors.items()}
    session.keep_local(TASK, {"epoch": 1}, lambda metadata: save(model, metadata))


def _take_part(session: Session, own: Update) -> None:
    """As an operator would: an aborted round is tried again."""
    for _ in range(TRIES - 1):
        with suppress(RoundAborted, TooLate):
            session.mean(own.tensors, own.weight, metrics=own.metrics, task=TASK)
            return
    session.mean(own.tensors, own.weight, metrics=own.metrics, task=TASK)


if __name__ == "__main__":
    main()
