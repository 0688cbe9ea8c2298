"""Updates in a ring Z_{2^w}: fixed point with stochastic rounding.

Every number of the layout takes a word, but for the scalars, which take a high and a low word of f
bits each, so that weights are exact to 2^-2f even in words of 16 bits.

Every word is an integer in [−2^f, 2^f], and f is the greatest with n · 2^f ≤ 2^(w−1) − 1 for the
session's n silos: no sum can wrap, whatever honest silos hold.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from threading import Lock
from typing import Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt

from secagg.config import MaskPrg, RingBits, fraction_bits
from secagg.crypto.secret import Entropy
from secagg.encoding.fixed import Rounding
from secagg.encoding.layout import Aggregate, Layout, Scaling, Tensors
from secagg.errors import ConfigError
from secagg.parallel import in_ranges
from secagg.ring import native
from secagg.ring.expand import Encoded, Mask, apply_masks, masker, signs_of
from secagg.ring.native import Numbers, Path
from secagg.ring.vectors import PowerRing, Vector

_PART: Final = 2**18
_Encoder: TypeAlias = Callable[[Numbers, Vector, int], tuple[float, int]]


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
    def limit(self) -> int:
        """2^f."""
        return 1 << self.bits

    @property
    def resolution(self) -> float:
        """2^-2f."""
        return 2.0 ** (-2 * self.bits)

    @property
    def length(self) -> int:
        """Words of a vector."""
        return self.schema.size + 2 * self.scalars

    def encode(
        self,
        tensors: Tensors,
        *,
        weight: float,
        metrics: Mapping[str, float],
        entropy: Entropy,
        masks: Sequence[Mask] = (),
        prg: MaskPrg = MaskPrg.AES_128_CTR,
        threads: int | None = None,
    ) -> Vector:
        """Encode one silo's update and mask it, in one pass over memory.

        Args:
            tensors: float arrays as the schema says.
            weight: 0 < weight ≤ the task's cap.
            metrics: exactly the task's metrics, each within its bound.
            entropy: source of the rounding bits' key.
            masks: to put on.
            prg: their generator; it also makes the rounding bits.
            threads: as for ``apply_masks``.

        Returns:
            A fresh vector of ``length`` words.

        Raises:
            InputError: what cannot be encoded, by name; nothing was changed.
        """
        scaling = self.scaling(tensors, weight=weight, metrics=metrics)
        work = _Work(self, scaling, list(self.flat(tensors)), Rounding(prg, entropy), masks)
        in_ranges(self.schema.size, _PART, work.encode, threads)
        for (name, _), greatest in zip(work.flats, work.greatest, strict=True):
            self.check_magnitude(name, greatest)
        self.write_scalars(work.vector, scaling, work.clipped, work.rounding, masks)
        return work.vector

    def write_scalars(
        self,
        vector: Vector,
        scaling: Scaling,
        clipped: int,
        rounding: Rounding,
        masks: Sequence[Mask],
    ) -> None:
        """Write what follows the elements, masked; they have been counted by then.

        Args:
            vector: of ``length`` words.
            scaling: the update's.
            clipped: how many of its elements were clipped.
            rounding: the vector's.
            masks: to put on.
        """
        size = self.schema.size
        scaled = self.scalars_of(scaling, clipped) * self.limit
        high = np.floor(scaled)
        low = rounding.to_integers((scaled - high) * self.limit, self.limit, size)
        limbs = np.stack([high.astype(np.int64), low], axis=1).reshape(-1)
        vector[size:] = self.ring.wrap(limbs)
        apply_masks(self.ring, vector[size:], masks, rounding.prg, start=size)

    def encoded(
        self, tensors: Tensors, *, weight: float, metrics: Mapping[str, float], entropy: Entropy
    ) -> Encoded:
        """``encode``, put off until the masks are known; what it raises, it raises then."""
        return lambda masks, prg: self.encode(
            tensors, weight=weight, metrics=metrics, entropy=entropy, masks=masks, prg=prg
        )

    def decode(self, total: Vector) -> Aggregate:
        """Decode the sum of the survivors' vectors.

        Raises:
            MalformedMessage: see ``Layout.aggregate``.
        """
        unit, size = 2.0**-self.bits, self.schema.size
        words = self.ring.centred(total)
        high, low = words[size:].reshape(-1, 2).T.astype(np.float64)
        scalars = (high + low * unit) * unit
        factor = self.tensor_factor(scalars) * unit
        flats = [np.empty(tensor.size) for tensor in self.schema.tensors]

        def decode(start: int, stop: int) -> None:
            for part in self.schema.parts(start, stop, stop):
                np.multiply(words[part.whole], factor, out=flats[part.tensor][part.within])

        in_ranges(size, _PART, decode)
        return self.aggregate_of(flats, scalars)


class _Work:
    """One update on its way into its vector.

    Args:
        codec: of the task.
        scaling: what becomes of the elements.
        flats: the tensors by name, in order.
        rounding: the vector's.
        masks: to put on.
    """

    def __init__(
        self,
        codec: Codec,
        scaling: Scaling,
        flats: Sequence[tuple[str, npt.NDArray[Any]]],
        rounding: Rounding,
        masks: Sequence[Mask],
    ) -> None:
        self.vector = np.empty(codec.length, codec.ring.dtype)
        self.flats = flats
        self.greatest = [0.0] * len(flats)
        self._codec = codec
        self._scaling = scaling
        self.rounding = rounding
        self._encode = self._encoder(masks)
        self.clipped = 0
        self._lock = Lock()

    def _encoder(self, masks: Sequence[Mask]) -> _Encoder:
        """What writes and masks a part of the vector: the kernel in one go, or step by step."""
        path, limit, clip = native.chosen(), self._codec.limit, self._scaling.clip
        factor = self._scaling.factor * limit
        if self.rounding.prg is MaskPrg.AES_128_CTR and path is not Path.OPENSSL:
            rounding = native.ReadyKeys([self.rounding.key])
            keys, signs = native.ReadyKeys([mask.key for mask in masks]), signs_of(masks)
            return lambda values, out, start: native.encode(
                path,
                values,
                out,
                rounding,
                keys,
                signs,
                start=start,
                clip=clip,
                factor=factor,
                limit=limit,
            )

        mask = masker(self._codec.ring, masks, self.rounding.prg)

        def encode(values: Numbers, out: Vector, start: int) -> tuple[float, int]:
            uniform = self.rounding.uniform(start, start + len(out))
            seen = native.to_words(values, out, uniform, clip=clip, factor=factor, limit=limit)
            mask(out, start)
            return seen

        return encode

    def encode(self, start: int, stop: int) -> None:
        """Write elements start … stop − 1, in parts that stay in a cache if they are copied."""
        for part in self._codec.schema.parts(start, stop, _PART):
            values = self.flats[part.tensor][1][part.within]
            greatest, clipped = self._encode(values, self.vector[part.whole], part.whole.start)
            with self._lock:
                self.clipped += clipped
                known = self.greatest[part.tensor]
                if math.isfinite(known) and not greatest <= known:  # what is no number stays
                    self.greatest[part.tensor] = greatest
