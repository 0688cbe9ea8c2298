"""An honest silo: the real SDK, one round of a session for the probes, then rounds without end.

Every sum is held against the one that the survivors' contributions have.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import client_sdk
from tests.crash.silo import TASK, exact_sum, take_part, vector

from . import helper


def work(spec: dict[str, Any], ready: Callable[[], None], stop: threading.Event) -> dict[str, Any]:
    """Take part until the session is over."""
    profile = Path(spec["profile"])
    with client_sdk.join(spec["still"], profile=profile) as session:
        still = session.aggregate(TASK, {"x": vector(session.silo, 1)}, weight=1.0, metrics={})
    assert (still.tensors["x"] == exact_sum(still.survivors, 1)).all()
    ready()
    rounds: list[dict[str, Any]] = []

    def report(record: dict[str, Any]) -> None:
        rounds.append(_judged(record))
        stop.wait(spec["pause"])

    take_part(profile, spec["busy"], report)
    end = rounds.pop()
    return {"rounds": rounds, "end": end}


def _judged(record: dict[str, Any]) -> dict[str, Any]:
    if "error" in record:
        return record
    expected = exact_sum(record["survivors"], record["call"])
    return {
        "at": time.monotonic(),
        "round": record["round"],
        "survivors": record["survivors"],
        "exact": record["total"] == expected.tolist(),
    }


if __name__ == "__main__":
    helper.main(work)
