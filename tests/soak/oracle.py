"""What each silo adds, and what a sum must be: from nothing but names, by a keyed hash.

Values are integers far below 2^53 and the task's bound is a power of two, so fixed point holds them
exactly and a sum is right to the bit or wrong. Sealed sums have noise, and ciphertexts less room:
their values are small integers, and a sum is right within far less than one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

from secagg.config import Protection

WORDS = 64
BITS = {Protection.MASKED: 32, Protection.CKKS_MASKED: 9}
"""Of a value, with its sign."""
TOLERANCE = {Protection.MASKED: 0.0, Protection.CKKS_MASKED: 2.0**-10}


def protection(number: int, sealed_every: int) -> Protection:
    """Of a session by its number: the second is sealed, so that a short soak has one."""
    return Protection.CKKS_MASKED if number % sealed_every == 2 else Protection.MASKED


def bound(how: Protection) -> float:
    """No value of a session is greater."""
    return 2.0 ** (BITS[how] - 1)


def vector(
    key: bytes, silo: str, session: str, number: int, how: Protection = Protection.MASKED
) -> npt.NDArray[np.int64]:
    """A silo's contribution to a session's round: signed values of so many bits."""
    named = hashlib.blake2b(f"{silo}/{session}/{number}".encode(), key=key).digest()
    drawn = hashlib.shake_256(named).digest(4 * WORDS)
    return np.frombuffer(drawn, "<i4").astype(np.int64) >> (32 - BITS[how])


def exact_sum(
    key: bytes,
    silos: Iterable[str],
    session: str,
    number: int,
    how: Protection = Protection.MASKED,
) -> npt.NDArray[np.int64]:
    """The sum over these silos, each once."""
    total = np.zeros(WORDS, np.int64)
    for silo in silos:
        total += vector(key, silo, session, number, how)
    return total


def chance(key: bytes, *place: Any) -> float:
    """A number in [0, 1) that belongs to a place, the same in every process."""
    named = hashlib.blake2b(repr(place).encode(), key=key, digest_size=8).digest()
    return int.from_bytes(named, "big") / 2**64
