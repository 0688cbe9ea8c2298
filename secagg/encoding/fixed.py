"""Fixed point with stochastic rounding, driven by a cryptographic stream.

A real x in [−1, 1] becomes ⌊x · 2^f + u⌋ for u uniform in [0, 1): an integer in [−2^f, 2^f] whose
expectation is x · 2^f, so rounding errors average out over rounds. u has 32 bits, which bounds the
bias by 2^-32 of a unit; it is added to the fraction of x · 2^f alone, since a float64 as large as
2^29 has no room for it and would round an exact integer up. The bits come from AES-128-CTR under a
fresh key: a statistical generator could be rewound from published results and would then reveal the
rounding.

Source: Gupta et al., Deep Learning with Limited Numerical Precision, ICML 2015, section 3.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from secagg.config import MaskPrg
from secagg.crypto.prg import PADDING, key_bytes, open_stream
from secagg.crypto.secret import Entropy, Secret


class Rounding:
    """A stream of rounding bits for one vector."""

    def __init__(self, entropy: Entropy) -> None:
        prg = MaskPrg.AES_128_CTR
        self._stream = open_stream(prg, Secret(entropy(key_bytes(prg))))

    def to_integers(self, scaled: npt.NDArray[np.float64], limit: int) -> npt.NDArray[np.int64]:
        """Round x · 2^f to integers without bias.

        Args:
            scaled: float64 values, |x| ≤ limit but for a float's last place.
            limit: 2^f; no result is beyond it.
        """
        size = scaled.size * 4
        out = bytearray(size + PADDING)
        self._stream.update_into(memoryview(bytes(size)), memoryview(out))
        uniform = np.frombuffer(out, "<u4", scaled.size).astype(np.float64)
        uniform *= 2.0**-32
        whole = np.floor(scaled)
        uniform += scaled - whole
        np.floor(uniform, out=uniform)
        uniform += whole
        np.clip(uniform, -limit, limit, out=uniform)
        return uniform.astype(np.int64)
