"""Updates in a ring Z_{2^w}: fixed point with stochastic rounding.

Every number of the layout takes a word, but for the scalars, which take a high and a low word of f
bits each, so that weights are exact to 2^-2f even in words of 16 bits.

Every word is an integer in [−2^f, 2^f], and f is the greatest with n · 2^f ≤ 2^(w−1) − 1 for the
session's n silos: no sum can wrap, whatever honest silos hold.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from secagg.config import RingBits, fraction_bits
from secagg.crypto.secret import Entropy
from secagg.encoding.fixed import Rounding
from secagg.encoding.layout import Aggregate, Layout, Reals, Tensors
from secagg.errors import ConfigError
from secagg.ring.vectors import PowerRing, Vector

_CHUNK: Final = 2**18


@dataclass(frozen=True, slots=True)
class Codec(Layout):
    """Encodes and decodes the vectors of one task; the scale follows from the number of silos."""

    @property
    def word_bits(self) -> RingBits:
        """w."""
        if self.task.ring_bits is None:
            raise ConfigError("ring", f"Task {self.task.name} has no words of its own.")
        return self.task.ring_bits

    @property
    def ring(self) -> PowerRing:
        """The ring of the task's vectors."""
        return PowerRing(self.word_bits)

    @property
    def bits(self) -> int:
        """f."""
        return fraction_bits(self.word_bits, self.silos)

    @property
    def resolution(self) -> float:
        """2^-2f."""
        return 2.0 ** (-2 * self.bits)

    @property
    def length(self) -> int:
        """Words of a vector."""
        return self.schema.size + 2 * self.scalars

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
        limit = 2**self.bits
        rounding = Rounding(entropy)
        vector = self.ring.zeros(self.length)
        at = 0
        for values in self.fractions(tensors, weight=weight, metrics=metrics):
            if at < self.schema.size:
                values *= limit
                integers = rounding.to_integers(values, limit)
            else:
                integers = _split_limbs(values, limit, rounding)
            vector[at : at + len(integers)] = self.ring.wrap(integers)
            at += len(integers)
        return vector

    def decode(self, total: Vector) -> Aggregate:
        """Decode the sum of the survivors' vectors.

        Raises:
            MalformedMessage: see ``Layout.aggregate``.
        """
        return self.aggregate(self._sums(self.ring.centred(total)))

    def _sums(self, words: npt.NDArray[np.signedinteger[Any]]) -> Iterator[Reals]:
        unit = 2.0**-self.bits
        for at in range(0, self.schema.size, _CHUNK):
            part = words[at : min(at + _CHUNK, self.schema.size)].astype(np.float64)
            part *= unit
            yield part
        high, low = words[self.schema.size :].reshape(-1, 2).T.astype(np.float64)
        yield (high + low * unit) * unit


def _split_limbs(
    scalars: npt.NDArray[np.float64], limit: int, rounding: Rounding
) -> npt.NDArray[np.int64]:
    scaled = scalars * limit
    high = np.floor(scaled)
    low = rounding.to_integers((scaled - high) * limit, limit)
    return np.stack([high.astype(np.int64), low], axis=1).reshape(-1)
