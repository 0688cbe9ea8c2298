"""The rings: their words, their vectors at a border, their running sum.

A ring vector is a one-dimensional NumPy array of little-endian words: the same bytes in memory, on
disk and on the wire. Words of a prime ring are added lazily: a word holds up to ``terms`` residues
before it has to be reduced.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt

from secagg.config import RingBits, SessionConfig
from secagg.errors import ConfigError, MalformedMessage, StorageFailed
from secagg.parallel import in_ranges
from secagg.ring.words import Held, Words, fold

Vector: TypeAlias = npt.NDArray[np.unsignedinteger[Any]]

PRIME_BITS: Final = 54
_MASK: Final = np.uint64(2**PRIME_BITS - 1)
_SHIFT: Final = np.uint64(PRIME_BITS)
_PIECE: Final = 2**15


class Ring(ABC):
    """Z_m: what the kernels, the running sum and the borders need to know of it."""

    __slots__ = ()

    @property
    @abstractmethod
    def word_bytes(self) -> int:
        """Bytes of a word; also the cost of a word on the wire."""

    @property
    @abstractmethod
    def terms(self) -> int:
        """How many residues a word holds before ``reduce`` must have been called."""

    @abstractmethod
    def holds(self, vector: Vector) -> bool:
        """Whether every word is a residue."""

    @abstractmethod
    def reduce(self, vector: Vector) -> None:
        """Bring words that hold up to ``terms`` residues back to residues, in place."""

    @abstractmethod
    def uniform(self, words: Vector) -> npt.NDArray[np.intp] | None:
        """Make uniform residues of uniform words, in place.

        Returns:
            Where another uniform word must be drawn, if anywhere.
        """

    @abstractmethod
    def add(self, vector: Vector, residues: Vector) -> None:
        """Add residues in place: one more term in each word."""

    @abstractmethod
    def subtract(self, vector: Vector, residues: Vector) -> None:
        """Subtract residues in place: one more term in each word."""

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
        if memoryview(data).nbytes != length * self.word_bytes:  # CHECK: unpacked-length
            raise MalformedMessage(
                "vector-length",
                f"A vector has {memoryview(data).nbytes} bytes, not {length * self.word_bytes}.",
            )
        return np.frombuffer(data, self.dtype)

    def pack(self, vector: Vector) -> memoryview:
        """View a vector as raw bytes, without copying where it is contiguous."""
        return np.ascontiguousarray(vector, self.dtype).data.cast("B")


@dataclass(frozen=True, slots=True)
class PowerRing(Ring):
    """Z_{2^w}: addition wraps, which is the ring's own."""

    bits: RingBits

    @property
    def word_bytes(self) -> int:
        """Bytes of a word."""
        return self.bits // 8

    @property
    def terms(self) -> int:
        """No end."""
        return 2**63

    def holds(self, vector: Vector) -> bool:
        """Every word is a residue."""
        return True

    def reduce(self, vector: Vector) -> None:
        """Words wrapped as they were added."""

    def uniform(self, words: Vector) -> None:
        """Uniform words are uniform residues."""

    def add(self, vector: Vector, residues: Vector) -> None:
        """Words wrap."""
        np.add(vector, residues, out=vector)

    def subtract(self, vector: Vector, residues: Vector) -> None:
        """Words wrap."""
        np.subtract(vector, residues, out=vector)

    def centred(self, vector: Vector) -> npt.NDArray[np.signedinteger[Any]]:
        """View words as the representatives in [−2^(w−1), 2^(w−1))."""
        return vector.view(np.dtype(f"<i{self.word_bytes}"))

    def wrap(self, integers: npt.NDArray[np.int64]) -> Vector:
        """Reduce signed 64-bit integers mod 2^w."""
        return integers.astype(self.dtype)


@dataclass(frozen=True, slots=True)
class PrimeRing(Ring):
    """Z_q for a prime q just below 2^54, in words of 64 bits.

    2^54 − q < 2^20 makes reduction a shift, a product and one comparison.
    """

    modulus: int

    def __post_init__(self) -> None:
        if not 0 < 2**PRIME_BITS - self.modulus < 2**20:  # CHECK: prime-ring
            raise ConfigError("ring", f"q = {self.modulus} is not just below 2^{PRIME_BITS}.")

    @property
    def word_bytes(self) -> int:
        """Bytes of a word."""
        return 8

    @property
    def terms(self) -> int:
        """2^10: as many residues of 54 bits fit a word."""
        return 1 << (64 - PRIME_BITS)

    def holds(self, vector: Vector) -> bool:
        """Whether every word is below q."""
        return not len(vector) or int(vector.max()) < self.modulus

    def reduce(self, vector: Vector) -> None:
        """x − ⌊x / 2^54⌋·q = (x mod 2^54) + ⌊x / 2^54⌋·(2^54 − q) < 2q, then once more by q.

        Source: Crandall's reduction; Menezes, van Oorschot and Vanstone, Handbook of Applied
        Cryptography, section 14.3.4.
        """
        excess, modulus = np.uint64(2**PRIME_BITS - self.modulus), np.uint64(self.modulus)
        quotient = np.empty(min(len(vector), _PIECE), np.uint64)
        for at in range(0, len(vector), _PIECE):  # pieces stay in the cache through all steps
            part = vector[at : at + _PIECE]
            rest = quotient[: len(part)]
            np.right_shift(part, _SHIFT, out=rest)
            np.multiply(rest, excess, out=rest)
            np.bitwise_and(part, _MASK, out=part)
            np.add(part, rest, out=part)
            np.subtract(part, modulus, out=rest)  # wraps to something huge where part < q
            np.minimum(part, rest, out=part)

    def uniform(self, words: Vector) -> npt.NDArray[np.intp] | None:
        """The upper 54 bits of a word, unless they are q or more (a chance of 2^-37)."""
        np.right_shift(words, np.uint64(64 - PRIME_BITS), out=words)
        if self.holds(words):
            return None
        return np.flatnonzero(words >= np.uint64(self.modulus))

    def add(self, vector: Vector, residues: Vector) -> None:
        """Lazily."""
        np.add(vector, residues, out=vector)

    def subtract(self, vector: Vector, residues: Vector) -> None:
        """As q − residue, at most q."""
        np.add(vector, np.uint64(self.modulus), out=vector)
        np.subtract(vector, residues, out=vector)


def ring_of(session: SessionConfig, task: str) -> Ring:
    """The ring of a task's vectors."""
    if session.suite is not None:
        return PrimeRing(session.suite.parameters.modulus)
    bits = session.task(task).ring_bits
    assert bits is not None  # SessionConfig holds it for every task that has no suite
    return PowerRing(bits)


class RunningSum:
    """Σ of vectors in O(d) memory, however many there are."""

    def __init__(self, ring: Ring, length: int) -> None:
        self.ring = ring
        self._total: Vector = ring.zeros(length)
        self._terms = 1
        self._whole = True

    def add(self, vector: Vector) -> None:
        """Add one vector that is in memory (``fold``)."""
        self.fold(Held(vector))

    def fold(self, words: Words) -> None:
        """Add one vector of the same ring and length; nothing changes when it raises.

        Raises:
            MalformedMessage: a word is no residue.
            StorageFailed: words could be read once and not a second time, to be taken off: there is
                no sum any more.
        """
        # CHECK: folded-length
        if words.dtype != self.ring.dtype or words.length != len(self._total):
            raise ValueError("a vector of another ring or length")
        if self._terms + 1 > self.ring.terms:
            self._settle()
        self._check_whole()
        self._whole = False
        try:
            fold(self.ring, self._total, words)
        except StorageFailed:
            raise
        except BaseException:
            self._whole = True  # all that was added is off again
            raise
        self._whole = True
        self._terms += 1

    @property
    def total(self) -> Vector:
        """The sum so far, reduced; the very array that later vectors are added to."""
        self._check_whole()
        self._settle()
        return self._total

    def _check_whole(self) -> None:
        if not self._whole:  # CHECK: sum-whole
            raise RuntimeError("a vector is in the sum in part")

    def _settle(self) -> None:
        if self._terms > 1:
            total = self._total
            in_ranges(len(total), 1, lambda start, stop: self.ring.reduce(total[start:stop]))
        self._terms = 1
