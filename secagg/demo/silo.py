"""One silo's process in the demo: the five lines of the README, and a recorder beside them.

The recorder writes down what this silo alone knows (its true vectors, updates and weight) and what
it sent, for the comparison at the end. It can also hold the process at a phase, so that the demo
can kill it, or the coordinator, there.

    python -m secagg.demo.silo ORDERS.json
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

import client_sdk
from client_sdk.channel import Channel
from secagg.ckks.codec import SealedCodec
from secagg.demo.data import load, standardiser, statistics
from secagg.demo.stage import SESSION
from secagg.demo.training import (
    BATCH,
    EPOCHS,
    LEARNING_RATE,
    local_seed,
    make_model,
    standardise,
    train_local,
)
from secagg.encoding.codec import Codec
from secagg.masking import client as protocol
from secagg.ring.expand import apply_masks

HOLD_SECONDS: Final = 600.0


@dataclass(frozen=True, slots=True)
class Orders:
    """What a silo's process is to do.

    Args:
        root: the demo's directory.
        silo: this silo's name; its profile is in ``root/silo``.
        data: data set.
        data_dir: where its files are; "" to fetch them.
        seed: of splits and training.
        hold: (session round, step of the client) at which to wait until the mark is taken away, or
            to be killed; (0, "") for none.
    """

    root: str
    silo: str
    data: str
    data_dir: str
    seed: int
    hold: tuple[int, str] = (0, "")

    def write(self, path: Path) -> None:
        """Write the orders where the process reads them."""
        path.write_text(json.dumps(asdict(self)))

    @classmethod
    def read(cls, path: Path) -> Orders:
        """Read the orders."""
        table = json.loads(path.read_text())
        return cls(**{**table, "hold": tuple(table["hold"])})


class Recorder:
    """Writes down what goes through this process; changes nothing of it."""

    def __init__(self, orders: Orders) -> None:
        self._orders = orders
        self._folder = Path(orders.root) / "records" / orders.silo
        self._folder.mkdir(parents=True, exist_ok=True)
        self._sent = 0
        self._began = 0.0
        self._encoded: Any = None
        self._watch_encoding()
        self._watch_channel()
        self._watch_steps()

    def _watch_encoding(self) -> None:
        encode, fractions = Codec.encode, SealedCodec.fractions

        def watched(codec: Codec, *args: Any, **kwargs: Any) -> Any:
            vector = encode(codec, *args, **kwargs)
            bare = vector.copy()  # it was made with the masks on: what is true is without them
            off = [mask.inverse() for mask in kwargs["masks"]]
            apply_masks(codec.ring, bare, off, kwargs["prg"])
            self._encoded = bare
            return vector

        def watched_fractions(codec: SealedCodec, *args: Any, **kwargs: Any) -> Any:
            pieces = [piece.copy() for piece in fractions(codec, *args, **kwargs)]
            self._encoded = np.concatenate(pieces)
            return iter(pieces)

        Codec.encode = watched  # type: ignore[method-assign,assignment]
        SealedCodec.fractions = watched_fractions  # type: ignore[method-assign,assignment]

    def _watch_channel(self) -> None:
        call, call_many = Channel.call, Channel.call_many

        def counted(request: Any) -> Any:
            self._sent += request.ByteSize()
            return request

        def watched(channel: Channel, method: str, request: Any, *args: Any, **kwargs: Any) -> Any:
            return call(channel, method, counted(request), *args, **kwargs)

        def watched_many(channel: Channel, method: str, requests: Any, *args: Any) -> Any:
            return call_many(channel, method, (counted(r) for r in requests), *args)

        Channel.call = watched  # type: ignore[method-assign,assignment]
        Channel.call_many = watched_many  # type: ignore[method-assign,assignment]

    def _watch_steps(self) -> None:
        admit = protocol.admit

        def watched(descriptor: Any, *args: Any) -> Any:
            self._began, self._sent = time.monotonic(), 0
            return admit(descriptor, *args)

        protocol.admit = watched  # type: ignore[assignment]
        round_number, step = self._orders.hold
        if step:
            self._hold_at(round_number, step)

    def _hold_at(self, round_number: int, step: str) -> None:
        take: Callable[..., Any] = getattr(protocol, step)

        def held(state: Any, *args: Any, **kwargs: Any) -> Any:
            if state.attempt.descriptor.round == round_number:
                self._wait()
            return take(state, *args, **kwargs)

        setattr(protocol, step, held)

    def _wait(self) -> None:
        mark = self._folder / "held"
        mark.touch()
        deadline = time.monotonic() + HOLD_SECONDS
        while mark.exists() and time.monotonic() < deadline:
            time.sleep(0.02)

    def round(self, number: int, update: dict[str, Any], outcome: client_sdk.Outcome) -> None:
        """Keep a finished round; a restarted process that replays one leaves its record alone."""
        if (self._folder / f"{number}.json").exists():
            return
        seconds = time.monotonic() - self._began
        arrays = {f"update/{name}": array for name, array in update.items()}
        arrays |= {f"result/{name}": array for name, array in outcome.tensors.items()}
        temporary = self._folder / "writing.npz"
        np.savez(temporary, encoded=self._encoded, **arrays)
        temporary.rename(self._folder / f"{number}.npz")
        facts = {
            "survivors": outcome.survivors,
            "dropouts": outcome.dropouts,
            "metrics": outcome.metrics,
            "included": outcome.included,
            "session_round": outcome.round,
            "seconds": seconds,
            "bytes_up": self._sent,
        }
        (self._folder / f"{number}.json").write_text(json.dumps(facts))

    def weight(self, rows: int) -> None:
        """Keep this silo's weight."""
        (self._folder / "weight.json").write_text(json.dumps(rows))


def run(orders: Orders) -> None:
    """Train in the federation."""
    torch.set_num_threads(1)
    recorder = Recorder(orders)
    root = Path(orders.root)
    data_dir = Path(orders.data_dir) if orders.data_dir else None
    dataset = load(orders.data, seed=orders.seed, data_dir=data_dir)
    own = dataset.silo(orders.silo)
    position = dataset.names.index(orders.silo)
    recorder.weight(len(own.x_train))
    with client_sdk.join(SESSION, profile=root / orders.silo) as session:
        local = statistics(own.x_train)
        outcome = session.aggregate("statistics", local, weight=1.0, metrics={})
        recorder.round(0, local, outcome)
        mean, deviation = standardiser(outcome.tensors)
        x = standardise(own.x_train, mean, deviation)
        model = make_model(dataset.features, orders.seed)
        for round in session.rounds(model):  # noqa: A001 - as in the README
            before = {name: p.detach().clone() for name, p in model.named_parameters()}
            metrics = train_local(
                model,
                x,
                own.y_train,
                epochs=EPOCHS,
                lr=LEARNING_RATE,
                batch=BATCH,
                seed=local_seed(orders.seed, round.number, position),
            )
            update = {
                name: (p.detach() - before[name]).numpy() for name, p in model.named_parameters()
            }
            outcome = round.submit(model, weight=len(x), metrics=metrics)
            recorder.round(round.number, update, outcome)
        session.export(root / "records" / orders.silo / "model.safetensors")


if __name__ == "__main__":
    run(Orders.read(Path(sys.argv[1])))
