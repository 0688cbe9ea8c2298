"""One vector per silo: its tensors, weight, metrics and clip count, in fixed point.

Layout: the tensors flattened by name, then scalars, each in two words: the weight as a fraction of
its cap, the number of clipped elements as a fraction of all, every metric times the weight as a
fraction of its bound. A scalar takes a high and a low word of f bits each, so that weights are
exact to 2^-2f even in words of 16 bits.

Every word is an integer in [−2^f, 2^f], and f is the greatest with n · 2^f ≤ 2^(w−1) − 1 for the
session's n silos: no sum can wrap, whatever honest silos hold.

Clipping bounds what one silo can add by accident. It is self-enforced: a malicious silo can add any
vector (threat_model/ says so).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt

from secagg.config import Clip, TaskConfig, Weighting, fraction_bits
from secagg.crypto.secret import Entropy
from secagg.encoding.fixed import Rounding
from secagg.encoding.schema import Schema
from secagg.errors import InputError, MalformedMessage
from secagg.ring.vectors import Ring, Vector

Tensors: TypeAlias = Mapping[str, npt.NDArray[Any]]
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
class Codec:
    """Encodes and decodes the vectors of one task.

    Args:
        task: its bounds, weight cap, metrics and word size.
        schema: its tensors.
        silos: the largest possible cohort, from which the scale is derived.
    """

    task: TaskConfig
    schema: Schema
    silos: int

    @property
    def ring(self) -> Ring:
        """The ring of the task's vectors."""
        return Ring(self.task.ring_bits)

    @property
    def bits(self) -> int:
        """f."""
        return fraction_bits(self.task.ring_bits, self.silos)

    @property
    def length(self) -> int:
        """Words of a vector."""
        return self.schema.size + 2 * (2 + len(self.task.metrics))

    def encode(
        self, tensors: Tensors, *, weight: float, metrics: Mapping[str, float], entropy: Entropy
    ) -> Vector:
        """Encode one silo's update.

        Args:
            tensors: float arrays as the schema says.
            weight: 0 < weight ≤ the task's cap.
            metrics: exactly the task's metrics, each within its bound.
            entropy: source of the rounding bits' key.

        Returns:
            A fresh vector of ``length`` words, still unmasked.

        Raises:
            InputError: what cannot be encoded, by name; nothing was changed.
        """
        self.schema.check(tensors)
        share = self._weight_fraction(weight)
        clip = self._clipper(tensors)
        limit = 2**self.bits
        rounding = Rounding(entropy)
        vector = self.ring.zeros(self.length)
        at, clipped = 0, 0
        for _, chunk in self._chunks(tensors):
            values, count = clip(chunk)
            clipped += count
            values *= share / self.task.bound * limit
            vector[at : at + len(values)] = self.ring.wrap(rounding.to_integers(values, limit))
            at += len(values)
        scalars = [share, clipped / self.schema.size]
        scalars += [value * share for value in self._metric_fractions(metrics)]
        vector[at:] = self.ring.wrap(_split_limbs(np.array(scalars), limit, rounding))
        return vector

    def decode(self, total: Vector) -> Aggregate:
        """Decode the sum of the survivors' vectors.

        Raises:
            MalformedMessage: the sum of weights is not positive or beyond what the session's silos
                can weigh: a silo or the coordinator added something that is no encoded update.
        """
        unit = 2.0**-self.bits
        words = self.ring.centred(total)
        values = words[: self.schema.size]
        high, low = words[self.schema.size :].reshape(-1, 2).T.astype(np.float64)
        scalars = (high + low * unit) * unit
        share = float(scalars[0])
        if not 0 < share <= self.silos * (1 + unit):
            raise MalformedMessage(
                "result-weight", "The sum's total weight is impossible for this session."
            )
        divisor = share if self.task.weighting is Weighting.MEAN else 1.0
        scale = self.task.bound / divisor * unit
        return Aggregate(
            tensors=self._unflatten(values, scale),
            weight=share * self.task.weight_cap,
            metrics={
                metric.name: float(value) / share * metric.bound
                for metric, value in zip(self.task.metrics, scalars[2:], strict=True)
            },
            clipped=float(scalars[1]) * self.schema.size,
        )

    def _unflatten(
        self, values: npt.NDArray[Any], scale: float
    ) -> dict[str, npt.NDArray[np.float64]]:
        tensors, at = {}, 0
        for spec in self.schema.tensors:
            part = values[at : at + spec.size].astype(np.float64)
            part *= scale
            tensors[spec.name] = part.reshape(spec.shape)
            at += spec.size
        return tensors

    def _chunks(self, tensors: Tensors) -> Iterator[tuple[str, npt.NDArray[Any]]]:
        for spec in self.schema.tensors:
            flat = np.asarray(tensors[spec.name]).reshape(-1)  # no matrix, no masked array
            for at in range(0, spec.size, _CHUNK):
                yield spec.name, flat[at : at + _CHUNK]

    def _weight_fraction(self, weight: float) -> float:
        least = self.task.weight_cap * 2.0 ** (-2 * self.bits)
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


def _split_limbs(
    scalars: npt.NDArray[np.float64], limit: int, rounding: Rounding
) -> npt.NDArray[np.int64]:
    scaled = scalars * limit
    high = np.floor(scaled)
    low = rounding.to_integers((scaled - high) * limit, limit)
    return np.stack([high.astype(np.int64), low], axis=1).reshape(-1)
