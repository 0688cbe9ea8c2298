"""What each silo adds, and what a sum must be: from nothing but names, by a keyed hash.

Values are integers far below 2^53 and the task's bound is a power of two, so fixed point holds them
exactly and a sum is right to the bit or wrong.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

WORDS = 64
BOUND = 2.0**31


def vector(key: bytes, silo: str, session: str, number: int) -> npt.NDArray[np.int64]:
    """A silo's contribution to a session's round: int32 values."""
    named = hashlib.blake2b(f"{silo}/{session}/{number}".encode(), key=key).digest()
    drawn = hashlib.shake_256(named).digest(4 * WORDS)
    return np.frombuffer(drawn, "<i4").astype(np.int64)


def exact_sum(key: bytes, silos: Iterable[str], session: str, number: int) -> npt.NDArray[np.int64]:
    """The sum over these silos, each once."""
    total = np.zeros(WORDS, np.int64)
    for silo in silos:
        total += vector(key, silo, session, number)
    return total


def chance(key: bytes, *place: Any) -> float:
    """A number in [0, 1) that belongs to a place, the same in every process."""
    named = hashlib.blake2b(repr(place).encode(), key=key, digest_size=8).digest()
    return int.from_bytes(named, "big") / 2**64
