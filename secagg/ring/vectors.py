"""The ring Z_{2^w}: its words, its vectors at a border, its running sum."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from secagg.config import RingBits
from secagg.errors import MalformedMessage

Vector: TypeAlias = npt.NDArray[np.unsignedinteger[Any]]


@dataclass(frozen=True, slots=True)
class Ring:
    """Z_{2^w}. ``word_bytes`` is also the cost of a parameter on the wire."""

    bits: RingBits

    @property
    def word_bytes(self) -> int:
        """Bytes of a word."""
        return self.bits // 8

    @property
    def dtype(self) -> np.dtype[np.unsignedinteger[Any]]:
        """Little-endian unsigned words."""
        return np.dtype(f"<u{self.word_bytes}")

    def zeros(self, length: int) -> Vector:
        """A vector of zeros."""
        return np.zeros(length, self.dtype)

    def unpack(self, data: bytes | bytearray | memoryview, length: int) -> Vector:
        """View raw bytes as a vector, without copying.

        Raises:
            MalformedMessage: not exactly ``length`` words.
        """
        if memoryview(data).nbytes != length * self.word_bytes:
            raise MalformedMessage(
                "vector-length",
                f"A vector has {memoryview(data).nbytes} bytes, not {length * self.word_bytes}.",
            )
        return np.frombuffer(data, self.dtype)

    def pack(self, vector: Vector) -> memoryview:
        """View a vector as raw bytes, without copying where it is contiguous."""
        return np.ascontiguousarray(vector, self.dtype).data.cast("B")

    def centred(self, vector: Vector) -> npt.NDArray[np.signedinteger[Any]]:
        """View words as the representatives in [−2^(w−1), 2^(w−1))."""
        return vector.view(np.dtype(f"<i{self.word_bytes}"))

    def wrap(self, integers: npt.NDArray[np.int64]) -> Vector:
        """Reduce signed 64-bit integers mod 2^w."""
        return integers.astype(self.dtype)


class RunningSum:
    """Σ of vectors in O(d) memory, however many there are."""

    def __init__(self, ring: Ring, length: int) -> None:
        self.ring = ring
        self.total: Vector = ring.zeros(length)

    def add(self, vector: Vector) -> None:
        """Add one vector of the same ring and length."""
        if vector.dtype != self.ring.dtype or vector.shape != self.total.shape:
            raise ValueError("a vector of another ring or length")
        np.add(self.total, vector, out=self.total)
