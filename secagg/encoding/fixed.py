"""Fixed point with stochastic rounding, driven by a cryptographic stream.

A real x in [−1, 1] becomes ⌊x · 2^f + u⌋ for u uniform in [0, 1): an integer in [−2^f, 2^f] whose
expectation is x · 2^f, so rounding errors average out over rounds. u has 32 bits, which bounds the
bias by 2^-32 of a unit. The bits come from the masks' generator under a fresh key: a statistical
generator could be rewound from published results and would then reveal the rounding. Number i of a
vector takes word i of the stream, so any range of it can be encoded alone.

Source: Gupta et al., Deep Learning with Limited Numerical Precision, ICML 2015, section 3.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from secagg.config import MaskPrg
from secagg.crypto.prg import key_bytes, read
from secagg.crypto.secret import Entropy, Secret
from secagg.ring import native


class Rounding:
    """The rounding bits of one vector.

    Args:
        prg: the generator.
        entropy: source of its key.
    """

    def __init__(self, prg: MaskPrg, entropy: Entropy) -> None:
        self.prg = prg
        self.key = Secret(entropy(key_bytes(prg)))

    def uniform(self, start: int, stop: int) -> npt.NDArray[np.uint32]:
        """u · 2^32 of the numbers start … stop − 1."""
        return np.frombuffer(read(self.prg, self.key, 4 * (stop - start), 4 * start), "<u4")

    def to_integers(
        self, scaled: npt.NDArray[np.float64], limit: int, start: int = 0
    ) -> npt.NDArray[np.int64]:
        """Round x · 2^f to integers without bias.

        Args:
            scaled: float64 values, |x| ≤ limit but for a float's last place.
            limit: 2^f; no result is beyond it.
            start: the first one's place in the vector.
        """
        words = np.empty(len(scaled), np.uint64)
        uniform = self.uniform(start, start + len(scaled))
        native.to_words(scaled, words, uniform, clip=np.inf, factor=1.0, limit=limit)
        return words.view(np.int64)
