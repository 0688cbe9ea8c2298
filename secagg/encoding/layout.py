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
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt

from secagg.config import Clip, TaskConfig, Weighting
from secagg.encoding.schema import Schema
from secagg.errors import InputError, MalformedMessage
from secagg.ring import native

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

    def _checked(self, tensors: Tensors, weight: float, metrics: Mapping[str, float]) -> Scaling:
        scaling = self.scaling(tensors, weight=weight, metrics=metrics)
        for name, flat in self.flat(tensors):
            self.check_magnitude(name, _greatest(flat))
        return scaling

    def scaling(self, tensors: Tensors, *, weight: float, metrics: Mapping[str, float]) -> Scaling:
        """What turns this update's elements into fractions; their magnitudes are not checked yet.

        Raises:
            InputError: a tensor, the weight or a metric that is not as agreed; where the norm is
                clipped, a tensor that is not finite.
        """
        self.schema.check(tensors)
        share = self._weight_fraction(weight)
        reported = self._metric_fractions(metrics)
        factor = share / self.task.bound
        if self.task.clip is Clip.ELEMENT:
            return Scaling(share, reported, factor, clip=self.task.bound)
        norm = self._norm(tensors) if self.task.clip is Clip.L2 else 0.0
        if norm > self.task.bound:
            return Scaling(share, reported, share / norm, all_clipped=True)
        return Scaling(share, reported, factor)

    def check_magnitude(self, name: str, greatest: float) -> None:
        """Return if elements of this magnitude can be encoded.

        Raises:
            InputError: not finite, or beyond the bound of a task that does not clip.
        """
        if not math.isfinite(greatest):  # CHECK: tensor-finite
            raise InputError("tensor-finite", f"Tensor {name!r} holds NaN or infinity.")
        if self.task.clip is Clip.NONE and greatest > self.task.bound:  # CHECK: tensor-bound
            raise InputError(
                "tensor-bound",
                f"Tensor {name!r} reaches {greatest:.9g}; the task's bound is {self.task.bound}.",
                "Lower the learning rate, or have the session's admin set clip or raise bound.",
            )

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
        scaling = self._checked(tensors, weight, metrics)
        clipped = 0
        for _, flat in self.flat(tensors):
            for at in range(0, len(flat), _CHUNK):
                values = flat[at : at + _CHUNK].astype(np.float64)
                clipped += int(np.count_nonzero(np.abs(values) > scaling.clip))
                np.clip(values, -scaling.clip, scaling.clip, out=values)
                values *= scaling.factor
                yield values
        yield self.scalars_of(scaling, clipped)

    def flat(self, tensors: Tensors) -> Iterator[tuple[str, npt.NDArray[Any]]]:
        """The tensors in order, each in one dimension: no matrix, no masked array."""
        for spec in self.schema.tensors:
            yield spec.name, np.asarray(tensors[spec.name]).reshape(-1)

    def scalars_of(self, scaling: Scaling, clipped: int) -> Reals:
        """The numbers that follow the tensors."""
        count = self.schema.size if scaling.all_clipped else clipped
        shares = (metric * scaling.share for metric in scaling.metrics)
        return np.array([scaling.share, count / self.schema.size, *shares])

    def aggregate(self, sums: Iterable[Reals]) -> Aggregate:
        """Make sense of the sum of the survivors' updates.

        Args:
            sums: all its ``size`` numbers in order, in pieces of any length.

        Raises:
            MalformedMessage: the sum of weights is not positive or beyond what the session's silos
                can weigh: a silo or the coordinator added something that is no encoded update.
        """
        flats = [np.empty(tensor.size) for tensor in self.schema.tensors]
        scalars = np.empty(self.scalars)
        _fill([*flats, scalars], sums)
        factor = self.tensor_factor(scalars)
        for values in flats:
            values *= factor
        return self.aggregate_of(flats, scalars)

    def tensor_factor(self, scalars: Reals) -> float:
        """What makes the sum of all silos' fractions of an element the result.

        Raises:
            MalformedMessage: see ``aggregate``.
        """
        share = float(scalars[0])
        if not 0 < share <= self.silos * (1 + self.resolution):  # CHECK: result-weight
            raise MalformedMessage(
                "result-weight", "The sum's total weight is impossible for this session."
            )
        return self.task.bound / (share if self.task.weighting is Weighting.MEAN else 1.0)

    def aggregate_of(self, flats: Sequence[Reals], scalars: Reals) -> Aggregate:
        """Put a result together from its tensors, flattened, and the sums of the scalars."""
        share = float(scalars[0])
        return Aggregate(
            tensors={
                spec.name: flat.reshape(spec.shape)
                for spec, flat in zip(self.schema.tensors, flats, strict=True)
            },
            weight=share * self.task.weight_cap,
            metrics={
                metric.name: float(value) / share * metric.bound
                for metric, value in zip(self.task.metrics, scalars[2:], strict=True)
            },
            clipped=float(scalars[1]) * self.schema.size,
        )

    def _weight_fraction(self, weight: float) -> float:
        least = self.task.weight_cap * self.resolution
        # CHECK: weight-range
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
            # CHECK: metric-range
            if not (math.isfinite(metrics[name]) and abs(metrics[name]) <= bound):
                raise InputError(
                    "metric-bound", f"Metric {name!r} is {metrics[name]}; its bound is {bound}."
                )
        return [metrics[name] / bound for name, bound in declared.items()]

    def _norm(self, tensors: Tensors) -> float:
        """The L2 norm of all elements."""
        norm = 0.0
        for name, flat in self.flat(tensors):
            self.check_magnitude(name, _greatest(flat))
            for at in range(0, len(flat), _CHUNK):
                norm = math.hypot(norm, _norm(flat[at : at + _CHUNK].astype(np.float64)))
        return norm


@dataclass(frozen=True, slots=True)
class Scaling:
    """What becomes of one update's elements: clipped, then multiplied, in float64.

    Args:
        share: the weight as a fraction of its cap.
        metrics: each as a fraction of its bound.
        factor: what makes an element a fraction of its bound, weighted.
        clip: magnitude that elements are cut to; infinity for none.
        all_clipped: whether the factor cuts all of them, since their norm is beyond the bound.
    """

    share: float
    metrics: Sequence[float]
    factor: float
    clip: float = math.inf
    all_clipped: bool = False


def _greatest(flat: npt.NDArray[Any]) -> float:
    """The greatest magnitude, in pieces, as some have to be copied."""
    found = 0.0
    for at in range(0, len(flat), _CHUNK):
        greatest = native.greatest(flat[at : at + _CHUNK])
        found = found if found > greatest else greatest
        if not math.isfinite(greatest):
            return greatest
    return found


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
