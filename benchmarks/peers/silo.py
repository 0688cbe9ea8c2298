"""A silo's process: takes part in rounds as it is told on its standard input.

``masked`` is the product: ``client_sdk.join``, ``session.mean``. ``plain`` moves the same vector,
as float32, over the same channel (``client_sdk.channel``, with its chunks and as many in flight, by
``client_sdk.transfer``, its digests left out) to ``benchmarks.peers.averager``.

    python -m benchmarks.peers.silo masked|plain PROFILE RANK SILOS PARAMETERS

It says ``ready``; for each line ``go`` it plays a round and says ``done``; for each ``check`` it
says how far its last mean is from the exact one.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np

import client_sdk
from client_sdk import transfer
from client_sdk.channel import Channel
from client_sdk.profile import load_profile
from secagg.wire._pb import service_pb2 as api

SESSION = "bench"
CHUNK_BYTES = 2**20
_PART = 10**6


@contextmanager
def masked(profile: Path) -> Iterator[Callable[[np.ndarray], np.ndarray]]:
    """The product's mean."""
    with client_sdk.join(SESSION, profile=profile) as session:
        yield lambda update: session.mean({"w": update})["w"]


@contextmanager
def plain(profile: Path) -> Iterator[Callable[[np.ndarray], np.ndarray]]:
    """The mean by way of somebody who sees every update."""
    rounds = itertools.count(1)
    with closing(Channel(load_profile(profile))) as channel:

        def mean(update: np.ndarray) -> np.ndarray:
            data, number = memoryview(update).cast("B"), next(rounds)
            member: Any = SimpleNamespace(
                session=SimpleNamespace(chunk_bytes=CHUNK_BYTES), session_id=profile.name.encode()
            )
            up = api.Blob(vector=api.Blob.Vector(round=number, attempt=1))
            transfer.upload(channel, member, up, data)
            with (
                patch.object(transfer, "chunk_digest", lambda _: b""),
                patch.object(transfer, "root_digest", lambda _: b""),
            ):
                sum_ = transfer.download(channel, member, api.Blob(sum=number), len(data), b"")
            return np.frombuffer(sum_, np.float32)

        yield mean


def windows(silos: int, size: int) -> list[np.ndarray]:
    """All silos' float32 updates in [−1, 1]: windows of one array."""
    base = np.random.default_rng(3).random(size + silos, np.float32)
    base *= 2
    base -= 1
    return [base[rank : rank + size] for rank in range(silos)]


def error(mean: np.ndarray, updates: list[np.ndarray]) -> float:
    """The greatest distance from the exact mean."""
    greatest = 0.0
    for at in range(0, len(mean), _PART):
        exact = np.mean([u[at : at + _PART].astype(np.float64) for u in updates], axis=0)
        greatest = max(greatest, float(np.abs(exact - mean[at : at + _PART]).max()))
    return greatest


def main() -> None:
    """Play."""
    how, profile, rank, silos, size = sys.argv[1:]
    updates = windows(int(silos), int(size))
    with (masked if how == "masked" else plain)(Path(profile)) as mean:
        print("ready", flush=True)
        result = updates[int(rank)]
        for line in sys.stdin:
            if line.strip() == "go":
                result = mean(updates[int(rank)])
                print("done", flush=True)
            else:
                print(error(result, updates), flush=True)


if __name__ == "__main__":
    main()
