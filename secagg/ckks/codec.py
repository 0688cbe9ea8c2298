"""Updates in ciphertexts: every number of the layout is a value in a slot, in float64.

Each is rounded to the grid of 2^-24 / B before it is sealed, and a sum opens to multiples of it:
exactly the sum of what was rounded, at every silo. Everything but ``encode`` and ``decode`` works
without a library for homomorphic encryption, as a coordinator does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from secagg.ckks.sealing import Sealer
from secagg.config import SessionConfig
from secagg.encoding.codec import Codec
from secagg.encoding.layout import Aggregate, Layout, Tensors
from secagg.encoding.schema import Schema
from secagg.ring.vectors import PrimeRing, Vector
from secagg.suite import RELEASE_BITS, Suite


@dataclass(frozen=True, slots=True)
class SealedCodec(Layout):
    """Encodes, seals, opens and decodes the vectors of one task.

    Args:
        suite: the session's.
    """

    suite: Suite

    @property
    def ring(self) -> PrimeRing:
        """The ring of the task's vectors."""
        return PrimeRing(self.suite.parameters.modulus)

    @property
    def limit(self) -> int:
        """B: what a fraction of 1 becomes in a slot."""
        return self.suite.parameters.slot_limit(self.silos)

    @property
    def resolution(self) -> float:
        """2^-24 / B: opened sums are multiples of it."""
        return 2.0**-RELEASE_BITS / self.limit

    @property
    def length(self) -> int:
        """Words of a vector."""
        return self.suite.parameters.degree * self.suite.parameters.ciphertexts(self.size)

    def encode(
        self,
        tensors: Tensors,
        *,
        weight: float,
        metrics: Mapping[str, float],
        sealer: Sealer,
        seed: bytes,
    ) -> Vector:
        """Encode and seal one silo's update.

        Args:
            tensors: float arrays as the schema says.
            weight: 0 < weight ≤ the task's cap.
            metrics: exactly the task's metrics, each within its bound.
            sealer: of the session's key.
            seed: 32 fresh bytes, which go with the vector.

        Returns:
            A fresh vector of ``length`` words, still unmasked.

        Raises:
            InputError: what cannot be encoded, by name; nothing was changed.
        """
        fractions = self.fractions(tensors, weight=weight, metrics=metrics)
        return sealer.seal(fractions, self.size, self.limit, seed)

    def decode(self, total: Vector, sealer: Sealer, seeds: Sequence[bytes]) -> Aggregate:
        """Open and decode the sum of the survivors' vectors.

        Args:
            total: without masks.
            sealer: of the key that they were sealed under.
            seeds: the survivors', as they committed to them.

        Raises:
            MalformedMessage: see ``Sealer.open`` and ``Layout.aggregate``.
        """
        return self.aggregate(sealer.open(total, seeds, self.size, self.limit))


def codec_of(session: SessionConfig, task: str, schema: Schema) -> Codec | SealedCodec:
    """What encodes the vectors of a task.

    Raises:
        ConfigError: the session has no such task.
    """
    config, silos = session.task(task), len(session.silos)
    if session.suite is None:
        return Codec(config, schema, silos)
    return SealedCodec(config, schema, silos, session.suite)
