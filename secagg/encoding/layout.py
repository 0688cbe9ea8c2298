"""What an update is made of, and in which order: real numbers, before any ring.

The tensors flattened by name, then scalars: the weight as a fraction of its cap, the number of
clipped elements as a fraction of all, every metric times the weight as a fraction of its bound.
Everything is a fraction of its bound and weighted, hence within [−1, 1] at every silo, and a sum of
updates gives the mean by one division, after it was opened.

Clipping bounds what one silo can add by accident. It is self-enforced: a malicious silo can add any
vector (threat_model/ says so).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt

from secagg.config import Clip, TaskConfig, Weighting
from secagg.encoding.schema import Schema
from secagg.errors import InputError, MalformedMessage

Tensors: TypeAlias = Mapping[str, npt.NDArray[Any]]
Reals: TypeAlias = npt.NDArray[np.float64]
_CHUNK: Final = 2**18


@dataclass(frozen=True, slots=True)
class Aggregate:
    """What a round gives back.

    Args:
        tensors: float64 arrays by name: the weighted mean, or the sum where the task is a sum.
        weight: Σ of the survivors' weights.
        metrics: mean by weight.
        clipped: how many elements were clipped, over all survivors.
    """

    tensors: dict[str, npt.NDArray[np.float64]]
    weight: float
    metrics: dict[str, float]
    clipped: float


@dataclass(frozen=True, slots=True)
class Layout(ABC):
    """The numbers of one task's updates.

    Args:
        task: its bounds, weight cap and metrics.
        schema: its tensors.
        silos: the largest possible cohort.
    """

    task: TaskConfig
    schema: Schema
    silos: int

    @property
    @abstractmethod
    def resolution(self) -> float:
        """What a scalar is exact to; no weight is below this fraction of its cap."""

    @property
    def scalars(self) -> int:
        """Numbers beside the tensors."""
        return 2 + len(self.task.metrics)

    @property
    def size(self) -> int:
        """Numbers of an update."""
        return self.schema.size + self.scalars

    def check(self, tensors: Tensors, *, weight: float, metrics: Mapping[str, float]) -> None:
        """Return if an update can be encoded.

        Raises:
            InputError: what cannot, by name.
        """
        self._checked(tensors, weight, metrics)

    def _checked(
        self, tensors: Tensors, weight: float, metrics: Mapping[str, float]
    ) -> tuple[float, list[float], _Clipper]:
        self.schema.check(tensors)
        share = self._weight_fraction(weight)
        reported = self._metric_fractions(metrics)
        return share, reported, self._clipper(tensors)

    def fractions(
        self, tensors: Tensors, *, weight: float, metrics: Mapping[str, float]
    ) -> Iterator[Reals]:
        """Yield an update's numbers in order, in fresh arrays; the last one holds the scalars.

        Args:
            tensors: float arrays as the schema says.
            weight: 0 < weight ≤ the task's cap.
            metrics: exactly the task's metrics, each within its bound.

        Raises:
            InputError: what cannot be encoded, by name, before anything is yielded.
        """
        share, reported, clip = self._checked(tensors, weight, metrics)
        clipped = 0
        for _, chunk in self._chunks(tensors):
            values, count = clip(chunk)
            clipped += count
            values *= share / self.task.bound
            yield values
        yield np.array([share, clipped / self.schema.size, *(value * share for value in reported)])

    def aggregate(self, sums: Iterable[Reals]) -> Aggregate:
        """Make sense of the sum of the survivors' updates.

        Args:
            sums: all its ``size`` numbers in order, in pieces of any length.

        Raises:
            MalformedMessage: the sum of weights is not positive or beyond what the session's silos
                can weigh: a silo or the coordinator added something that is no encoded update.
        """
        tensors = {spec.name: np.empty(spec.size) for spec in self.schema.tensors}
        scalars = np.empty(self.scalars)
        _fill([*tensors.values(), scalars], sums)
        share = float(scalars[0])
        if not 0 < share <= self.silos * (1 + self.resolution):
            raise MalformedMessage(
                "result-weight", "The sum's total weight is impossible for this session."
            )
        divisor = share if self.task.weighting is Weighting.MEAN else 1.0
        for values in tensors.values():
            values *= self.task.bound / divisor
        return Aggregate(
            tensors={
                spec.name: tensors[spec.name].reshape(spec.shape) for spec in self.schema.tensors
            },
            weight=share * self.task.weight_cap,
            metrics={
                metric.name: float(value) / share * metric.bound
                for metric, value in zip(self.task.metrics, scalars[2:], strict=True)
            },
            clipped=float(scalars[1]) * self.schema.size,
        )

    def _chunks(self, tensors: Tensors) -> Iterator[tuple[str, npt.NDArray[Any]]]:
        for spec in self.schema.tensors:
            flat = np.asarray(tensors[spec.name]).reshape(-1)  # no matrix, no masked array
            for at in range(0, spec.size, _CHUNK):
                yield spec.name, flat[at : at + _CHUNK]

    def _weight_fraction(self, weight: float) -> float:
        least = self.task.weight_cap * self.resolution
        if not (math.isfinite(weight) and least <= weight <= self.task.weight_cap):
            raise InputError(
                "weight",
                f"Weight {weight} is not in [{least:.3g}, {self.task.weight_cap}].",
                "The session's weight_cap bounds one silo's lead over another.",
            )
        return weight / self.task.weight_cap

    def _metric_fractions(self, metrics: Mapping[str, float]) -> list[float]:
        declared = {metric.name: metric.bound for metric in self.task.metrics}
        for name in sorted(declared.keys() ^ metrics.keys()):
            state = "missing" if name in declared else "not declared by the session"
            raise InputError("metric-names", f"Metric {name!r} is {state}.")
        for name, bound in declared.items():
            if not (math.isfinite(metrics[name]) and abs(metrics[name]) <= bound):
                raise InputError(
                    "metric-bound", f"Metric {name!r} is {metrics[name]}; its bound is {bound}."
                )
        return [metrics[name] / bound for name, bound in declared.items()]

    def _clipper(self, tensors: Tensors) -> _Clipper:
        norm = 0.0
        for name, chunk in self._chunks(tensors):
            if not np.isfinite(chunk).all():
                raise InputError("tensor-finite", f"Tensor {name!r} holds NaN or infinity.")
            if self.task.clip is Clip.L2:
                norm = math.hypot(norm, _norm(chunk.astype(np.float64)))
            elif self.task.clip is Clip.NONE and chunk.size:
                self._check_bound(name, float(np.abs(chunk).max()))
        return _Clipper(self.task.clip, self.task.bound, norm)

    def _check_bound(self, name: str, greatest: float) -> None:
        if greatest > self.task.bound:
            raise InputError(
                "tensor-bound",
                f"Tensor {name!r} reaches {greatest:.9g}; the task's bound is {self.task.bound}.",
                "Lower the learning rate, or have the session's admin set clip or raise bound.",
            )


@dataclass(frozen=True, slots=True)
class _Clipper:
    clip: Clip
    bound: float
    norm: float

    def __call__(self, chunk: npt.NDArray[Any]) -> tuple[npt.NDArray[np.float64], int]:
        values = chunk.astype(np.float64)
        clipped = 0
        if self.clip is Clip.L2 and self.norm > self.bound:
            values *= self.bound / self.norm
            clipped = len(values)
        elif self.clip is Clip.ELEMENT:
            clipped = int(np.count_nonzero(np.abs(values) > self.bound))
            np.clip(values, -self.bound, self.bound, out=values)
        return values, clipped


def _norm(values: npt.NDArray[np.float64]) -> float:
    """L2 norm without overflow: scaled by the greatest magnitude first."""
    greatest = float(np.abs(values).max(initial=0.0))
    if greatest == 0.0:
        return 0.0
    scaled = values / greatest
    return greatest * math.sqrt(float(scaled @ scaled))


def _fill(arrays: Iterable[Reals], pieces: Iterable[Reals]) -> None:
    """Copy pieces into arrays, one after the other, whatever their borders."""
    source = iter(pieces)
    piece = np.empty(0)
    for array in arrays:
        at = 0
        while at < len(array):
            if not len(piece):
                piece = next(source)
            part = piece[: len(array) - at]
            array[at : at + len(part)] = part
            at, piece = at + len(part), piece[len(part) :]
