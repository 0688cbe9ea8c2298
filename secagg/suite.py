"""The parameters of homomorphic encryption: named sets, rebuilt from their name everywhere.

A suite is agreed by its name in the session's configuration; no context, parameter or modulus is
ever taken from the wire. Everything that a coordinator needs of a suite is here, so that it can add
what it cannot open without a library for homomorphic encryption.

``ckks-54``: N = 4096, one 54-bit prime q, scale 2^40. Nothing is ever multiplied, so there is no
key-switching prime, no relinearisation and no Galois key. At N = 4096 the HomomorphicEncryption.org
standard allows 109 bits of modulus for 128-bit security with a ternary secret; 54 are used.

Source: Cheon, Kim, Kim and Song, Homomorphic Encryption for Arithmetic of Approximate Numbers,
ASIACRYPT 2017 (ePrint 2016/421); Albrecht et al., Homomorphic Encryption Standard (ePrint
2019/939), table 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from secagg.errors import ConfigError, MalformedMessage

RESERVED: Final = 1.0
"""What every silo puts into the reserved slot of each ciphertext."""
RESERVED_TOLERANCE: Final = 1e-3
"""How far the reserved slots of a sum may be from the number of its survivors."""
RELEASE_BITS: Final = 24
"""Sealed and opened values are multiples of 2^-24: what is below is noise that tells of the key."""
SUMS_PER_KEY: Final = 1000
"""Sums that may be opened with one key."""
_MIN_LIMIT: Final = 16
_NOISE: Final = 2.0**36
"""Far more than the noise of a sum can be, in units of a coefficient. That of a fresh ciphertext is
a centred binomial of 42 bits, never beyond 21, a half of rounding, and what float64 leaves of the
embedding, a few units: 362 of them stay below 2^14."""


@dataclass(frozen=True, slots=True, order=True)
class KeyName:
    """Which key: what everybody may know of it.

    Args:
        epoch: of the session, from 1; every key of it has its own.
        key_id: a commitment to the key, 32 bytes.
    """

    epoch: int
    key_id: bytes

    def __post_init__(self) -> None:
        if not 1 <= self.epoch < 2**32 or len(self.key_id) != 32:  # CHECK: key-name-range
            raise MalformedMessage("key-name", "A key is named by an epoch and 32 bytes.")


class Suite(StrEnum):
    """A named set of parameters."""

    CKKS_54 = "ckks-54"

    @property
    def parameters(self) -> Parameters:
        """The numbers behind the name."""
        return _PARAMETERS[self]


@dataclass(frozen=True, slots=True)
class Parameters:
    """The numbers of a suite.

    Args:
        degree: N, coefficients of a polynomial; a ciphertext carries N − 1 values.
        modulus: q, prime, q ≡ 1 mod 2N.
        scale_bits: values are integers of 2^-scale_bits in a polynomial.
    """

    degree: int
    modulus: int
    scale_bits: int

    @property
    def values(self) -> int:
        """Values of a ciphertext: two a slot, but for the reserved real part of slot 0."""
        return self.degree - 1

    @property
    def scale(self) -> float:
        """2^scale_bits."""
        return 2.0**self.scale_bits

    def ciphertexts(self, values: int) -> int:
        """How many ciphertexts carry so many values."""
        return -(-values // self.values)

    def slot_limit(self, cohort: int) -> int:
        """Return B: values in [−B, B], summed over a cohort, open to what was added.

        Two reals share a slot, so a slot reaches √2·B, and no coefficient exceeds the greatest
        slot; coefficients are signed. B is the greatest power of two with
        √2 · n · B · scale + noise < q / 2.

        Raises:
            ConfigError: less than 16 would be left, with the numbers.
        """
        room = (self.modulus / 2 - _NOISE) / (math.sqrt(2) * self.scale * cohort)
        if room < _MIN_LIMIT:
            raise ConfigError(
                "ckks-capacity",
                f"{cohort} silos leave values within ±{room:.4g} of a slot's "
                f"±{self.modulus / 2 / self.scale:.4g} (at least ±{_MIN_LIMIT}): "
                "a sum could wrap.",
                "Use fewer silos in a session.",
            )
        return 1 << (math.floor(room).bit_length() - 1)


_PARAMETERS: Final = {
    Suite.CKKS_54: Parameters(degree=4096, modulus=18_014_398_509_309_953, scale_bits=40),
}
