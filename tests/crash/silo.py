"""What every silo of the matrix does, in a thread of the harness or as a process of its own.

A silo adds its own power of eight times a small pattern, so each word of a sum says in octal
digits how often every silo is in it: a silo counted twice, or a sum that lacks one, is seen.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import numpy.typing as npt
import tenacity

import client_sdk
from client_sdk import channel as sdk_channel
from client_sdk.session import Session
from secagg.errors import PolicyRefused, RoundAborted, SecaggError, TooLate

SILOS = ("a", "b", "c", "d")
WORDS = 1000
BOUND = 4096.0
TASK = "statistics"
TRIES = 3
_hurried = False
Report = Callable[[dict[str, Any]], None]


def hurry() -> None:
    """Look for a coordinator that is gone more often than the SDK's patience would.

    Only the pauses between tries are shorter: a run takes two seconds instead of eight, and a
    coordinator that is just starting is called sooner.
    """
    global _hurried  # noqa: PLW0603 - once a process
    if _hurried:
        return
    _hurried = True
    dial = grpc.secure_channel
    quick = [("grpc.initial_reconnect_backoff_ms", 100), ("grpc.min_reconnect_backoff_ms", 100)]
    quick += [("grpc.max_reconnect_backoff_ms", 200)]

    def secure_channel(target: str, credentials: Any, options: Any = (), **more: Any) -> Any:
        return dial(target, credentials, options=[*options, *quick], **more)

    grpc.secure_channel = secure_channel
    sdk_channel._backoff = tenacity.wait_random_exponential(multiplier=0.05, max=0.2)


def vector(silo: str, call: int) -> npt.NDArray[np.float64]:
    """A silo's contribution to the task's ``call``-th round."""
    pattern = 1 + (np.arange(WORDS) + call) % 3
    return (8 ** SILOS.index(silo) * pattern).astype(np.float64)


def exact_sum(silos: Iterable[str], call: int) -> npt.NDArray[np.float64]:
    """The sum over these silos, each once."""
    return np.sum([vector(silo, call) for silo in silos], axis=0)


def digits(total: npt.NDArray[np.float64], call: int) -> dict[str, list[float]]:
    """How often each silo is in a sum, by word; for the text of a failure."""
    pattern = 1 + (np.arange(WORDS) + call) % 3
    rest, found = total / pattern, {}
    for silo in SILOS:
        found[silo] = sorted(set((rest % 8).tolist()))[:4]
        rest = rest // 8
    return found


def take_part(profile: Path, session: str, report: Report) -> None:
    """Take part in all rounds; every outcome, and the error that ended it, is reported."""
    try:
        with client_sdk.join(session, profile=profile) as joined:
            for call in range(1, joined.task_rounds(TASK) + 1):
                report(_outcome(joined, call))
    except SecaggError as error:
        report({"error": type(error).__name__, "code": error.code, "text": str(error)})
    except BaseException as error:
        report({"error": type(error).__name__, "code": "?", "text": repr(error)})
        raise


def _outcome(session: Session, call: int) -> dict[str, Any]:
    outcome = _aggregate(session, call)
    return {
        "call": call,
        "round": outcome.round,
        "survivors": list(outcome.survivors),
        "total": outcome.tensors["x"].tolist(),
    }


def _aggregate(session: Session, call: int) -> Any:
    """As an operator would: a round that was aborted is tried again, a few times."""
    tensors = {"x": vector(session.silo, call)}
    for _ in range(TRIES - 1):
        try:
            return session.aggregate(TASK, tensors, weight=1.0, metrics={})
        except (RoundAborted, PolicyRefused, TooLate):
            continue
    return session.aggregate(TASK, tensors, weight=1.0, metrics={})


def main() -> None:
    """A process: ``silo.py PROFILE SILO WITNESS RESULTS``, the session's name on stdin."""
    from tests.crash import witness

    hurry()
    profile, silo, seen, results = sys.argv[1:]
    witness.watch(Path(profile), silo, Path(seen))
    out = os.open(results, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)

    def report(record: dict[str, Any]) -> None:
        os.write(out, json.dumps(record).encode() + b"\n")

    session = sys.stdin.readline().strip()
    report({"started": os.getpid()})
    if session:
        take_part(Path(profile), session, report)


if __name__ == "__main__":
    main()
