"""A silo's process in the hands of its honest operator: the shipped SDK, told what to submit.

Says that it has started, then reads one order a line from standard input and answers each with a
line on standard output. An order may carry a weakening, which is in force for that order alone;
processes that play ours never get one.

    python -m threat_model.attacks.player
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Iterable
from contextlib import nullcontext
from typing import Any

import numpy as np

from client_sdk.profile import load_profile
from client_sdk.session import Session
from secagg.crypto.secret import Entropy
from secagg.encoding.schema import Schema
from secagg.errors import SecaggError
from threat_model.attacks.attack import Weakening


def play(order: dict[str, Any]) -> dict[str, Any]:
    """Take part in a session with these values, one call for each.

    Returns:
        What the calls returned, the initial weights that they started from, if it has a model, and
        the error that ended them, if one did.
    """
    results: list[list[float]] = []
    told: dict[str, Any] = {"results": results}
    try:
        profile, entropy = load_profile(order["profile"]), drawing(order.get("draws", ()))
        with Session(order["session"], profile, entropy=entropy) as session:
            if order.get("model") is not None:
                told["model"] = _start(session, order).hex()
            for value in order["values"]:
                results.append(_submit(session, order, value))  # noqa: PERF401 - kept on error
    except SecaggError as error:
        kind = type(error).__name__
        return {**told, "error": error.code, "kind": kind, "observed": error.observed}
    return {**told, "error": None}


def drawing(draws: Iterable[str | None]) -> Entropy:
    """The machine's generator, or one that gives these for the first draws of 32 bytes."""
    left = list(draws)

    def entropy(size: int) -> bytes:
        found = left.pop(0) if size == 32 and left else None
        return os.urandom(size) if found is None else bytes.fromhex(found)

    return entropy if left else os.urandom


def _start(session: Session, order: dict[str, Any]) -> bytes:
    """Agree on initial weights, of which this silo has some."""
    schema = Schema.of({"x": np.array(order["values"][0])})
    session.open_task(order["task"], schema, weights=bytes.fromhex(order["model"]))
    return bytes(session.initial_weights(order["task"]))


def _submit(session: Session, order: dict[str, Any], value: list[float]) -> list[float]:
    tensors, weight = {"x": np.array(value)}, order.get("weight", 1.0)
    outcome = session.aggregate(order["task"], tensors, weight=weight, metrics={})
    return outcome.tensors["x"].tolist()


def main() -> None:
    """Serve orders until standard input ends."""
    logging.basicConfig(level=logging.DEBUG, stream=sys.stderr)
    print("started", flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        weakening = order.get("weakening")
        with Weakening.from_json(weakening).applied() if weakening else nullcontext():
            answer = play(order)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
