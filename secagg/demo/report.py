"""What the demo shows at the end: measured from what the processes left behind."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file

from secagg.config import SessionConfig
from secagg.demo.data import Dataset, standardiser
from secagg.demo.training import (
    METRIC_BOUNDS,
    accuracy,
    local_mean,
    make_model,
    pooled,
    standardise,
)
from secagg.ring.vectors import PRIME_BITS


@dataclass(frozen=True, slots=True)
class Record:
    """One silo's record of one round."""

    facts: dict[str, Any]
    arrays: Mapping[str, npt.NDArray[Any]]


class Records:
    """What the silos' processes wrote down."""

    def __init__(self, root: Path, silos: Sequence[str]) -> None:
        self._root = root
        self._silos = silos

    def of(self, silo: str, number: int) -> Record | None:
        """One silo's record of a round; None if it has none (it was killed in it)."""
        facts = self._root / "records" / silo / f"{number}.json"
        if not facts.exists():
            return None
        with np.load(facts.with_suffix(".npz")) as arrays:
            return Record(json.loads(facts.read_text()), dict(arrays))

    def round(self, number: int) -> dict[str, Record]:
        """All records of a round whose silo's update is in it."""
        found = {silo: self.of(silo, number) for silo in self._silos}
        return {s: r for s, r in found.items() if r is not None and r.facts["included"]}

    def weight(self, silo: str) -> int:
        """A silo's weight."""
        return int(json.loads((self._root / "records" / silo / "weight.json").read_text()))


def report(
    root: Path, config: SessionConfig, dataset: Dataset, seed: int, tapped: str
) -> dict[str, Any]:
    """Measure everything and return the demo's JSON object."""
    records = Records(root, config.silos)
    numbers = range(config.task("training").rounds + 1)
    return {
        "protection": str(config.protection),
        "silos": list(config.silos),
        "rounds": [_round(records.round(number), config, number) for number in numbers],
        "accuracy": _accuracy(root, records, dataset, seed),
        "max_abs_error": max(_error(records, number) for number in numbers if number),
        "coordinator_view": _view(root, records, tapped, numbers),
    }


def _round(records: Mapping[str, Record], config: SessionConfig, number: int) -> dict[str, Any]:
    facts = [record.facts for record in records.values()]
    survivors = sorted(facts[0]["survivors"])
    return {
        "round": number,
        "survivors": survivors,
        "dropouts": sorted(set(config.silos) - set(survivors)),
        "seconds": round(max(fact["seconds"] for fact in facts), 3),
        "bytes_up_per_silo": max(fact["bytes_up"] for fact in facts),
        "metrics": facts[0]["metrics"],
    }


def _error(records: Records, number: int) -> float:
    """Greatest difference of the secure mean to the plain float64 mean of the same updates."""
    of = records.round(number)
    first = next(iter(of.values()))
    if set(of) != set(first.facts["survivors"]):
        raise RuntimeError("a survivor left no record")
    weights = {silo: records.weight(silo) for silo in of}
    worst = 0.0
    for key in (key for key in first.arrays if key.startswith("update/")):
        plain = sum(
            weights[silo] * record.arrays[key].astype(np.float64) for silo, record in of.items()
        ) / sum(weights.values())
        secure = first.arrays[key.replace("update/", "result/")]
        worst = max(worst, float(np.abs(plain - secure).max()))
    return worst


def _accuracy(root: Path, records: Records, dataset: Dataset, seed: int) -> dict[str, float]:
    silo = dataset.names[0]
    first = next(iter(records.round(0).values()))
    sums = {k.removeprefix("result/"): v for k, v in first.arrays.items() if "result/" in k}
    mean, deviation = standardiser(sums)
    x, y = dataset.union_test()
    model = make_model(dataset.features, seed)
    model.load_state_dict(load_file(root / "records" / silo / "model.safetensors"))
    return {
        "federated": accuracy(model, standardise(x, mean, deviation), y),
        "local_mean": local_mean(dataset, seed),
        "pooled": pooled(dataset, seed),
    }


def _view(root: Path, records: Records, silo: str, numbers: Sequence[int]) -> dict[str, Any]:
    """Correlate what the coordinator received of one silo with its true vectors, word by word.

    Where updates are sealed, their vectors are the numbers that were sealed, and there are a few
    more words than numbers.
    """
    seen, true = [], []
    for number in numbers:
        record = records.of(silo, number)
        if record is None or not record.facts["included"]:
            continue
        own = record.arrays["encoded"]
        path = next((root / "tap").glob(f"{record.facts['session_round']}-*-{silo}"))
        if own.dtype == np.float64:
            seen.append(np.fromfile(path, "<u8")[: len(own)] * 2.0**-PRIME_BITS - 0.5)
            true.append(own)
        else:
            seen.append(_centred(np.fromfile(path, own.dtype)))
            true.append(_centred(own))
    x, y = np.concatenate(true), np.concatenate(seen)
    return {"correlation": float(np.corrcoef(x, y)[0, 1]), "words": len(x)}


def _centred(words: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """Words as fractions in [−1/2, 1/2) of the ring, so that rings of different sizes compare."""
    bits = 8 * words.dtype.itemsize
    return words.view(np.dtype(f"<i{words.dtype.itemsize}")).astype(np.float64) * 2.0**-bits


def show(console: Console, measured: Mapping[str, Any], tapped: str) -> None:
    """Print the report for a person."""
    names = list(METRIC_BOUNDS)
    rounds = Table("round", "survivors", "dropouts", "seconds", "bytes up", *names)
    for row in measured["rounds"]:
        rounds.add_row(
            str(row["round"]) + ("" if row["round"] else " (statistics)"),
            str(len(row["survivors"])),
            " ".join(row["dropouts"]),
            f"{row['seconds']:.2f}",
            str(row["bytes_up_per_silo"]),
            *(f"{row['metrics'][name]:.3f}" if row["metrics"] else "" for name in names),
        )
    console.print(rounds)
    result = measured["accuracy"]
    view = measured["coordinator_view"]
    limit = 4.5 / view["words"] ** 0.5
    console.print(
        f"accuracy on all silos' test rows: federated [bold]{result['federated']:.3f}[/], "
        f"local only {result['local_mean']:.3f}, pooled {result['pooled']:.3f}\n"
        f"secure mean against the plain mean: at most {measured['max_abs_error']:.1e} apart\n"
        f"what the coordinator saw of {tapped} against its true vectors: correlation "
        f"{view['correlation']:+.3f} over {view['words']} words (noise stays within ±{limit:.3f})"
    )
