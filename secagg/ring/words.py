"""Words of a vector wherever they lie, and adding them to a total over all cores.

A vector that is to be added need not be in memory: it is read in pieces that fit a core's cache, so
that a piece is checked and added before it leaves. Threads take contiguous ranges of coordinates,
and nothing but the total is ever whole.

All of a vector is added or none of it: a word is known to be no residue only when it is read, after
others have been added, and these are read a second time then and come off again. In wrapping words
that is exact, whatever a word of the total held.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Protocol

import numpy as np

from secagg.errors import MalformedMessage, StorageFailed
from secagg.parallel import in_ranges

if TYPE_CHECKING:
    from secagg.ring.vectors import Ring, Vector

PIECE_BYTES: Final = 2**19


class Words(Protocol):
    """A vector that can be read more than once and is the same each time.

    Attributes:
        length: how many words.
        dtype: of a word.
        grain: ranges begin at multiples of so many words.
    """

    @property
    def length(self) -> int: ...
    @property
    def dtype(self) -> np.dtype[np.unsignedinteger[Any]]: ...
    @property
    def grain(self) -> int: ...

    def pieces(self, start: int, stop: int) -> Iterator[Vector]:
        """Read coordinates start … stop − 1 in order; a piece may be gone when the next is asked.

        Args:
            start: a multiple of ``grain``.
            stop: where another range begins or a piece ended, or ``length``.
        """
        ...


@dataclass(frozen=True, slots=True)
class Held:
    """A vector in memory, which nobody changes while it is read."""

    vector: Vector

    def __post_init__(self) -> None:
        if self.vector.ndim != 1:
            raise ValueError("a vector of another ring or length")

    @property
    def length(self) -> int:
        """How many words."""
        return len(self.vector)

    @property
    def dtype(self) -> np.dtype[np.unsignedinteger[Any]]:
        """Of a word."""
        return self.vector.dtype

    @property
    def grain(self) -> int:
        """Ranges begin anywhere."""
        return 1

    def pieces(self, start: int, stop: int) -> Iterator[Vector]:
        """Views of the vector."""
        step = PIECE_BYTES // self.vector.itemsize
        for at in range(start, stop, step):
            yield self.vector[at : min(at + step, stop)]


def fold(ring: Ring, total: Vector, words: Words, threads: int | None = None) -> None:
    """Add a vector to a total in place: all of it, or none.

    Args:
        ring: of both.
        total: words with room for one more term each.
        words: as many.
        threads: as for ``in_ranges``.

    Raises:
        MalformedMessage: a word is no residue; or what reading raised. Nothing was added then.
        StorageFailed: what was added could not be read again, to be taken off: the total is spoilt.
    """
    ends: dict[int, int] = {}

    def add(start: int, stop: int) -> None:
        for at, piece in _placed(words, start, stop):
            if not ring.holds(piece):  # CHECK: residue-range
                raise MalformedMessage("residue-range", "A word is no residue of the ring.")
            ring.add(total[at : at + len(piece)], piece)
            ends[start] = at + len(piece)

    def take_off(start: int, stop: int) -> None:
        for at, piece in _placed(words, start, stop):
            part = total[at : at + len(piece)]
            np.subtract(part, piece, out=part)

    try:
        in_ranges(words.length, words.grain, add, threads)
    except BaseException:
        try:
            for start, end in ends.items():
                take_off(start, end)
        except BaseException as error:  # noqa: BLE001 - in part, for whatever reason
            raise StorageFailed(
                "sum-spoilt",
                f"A vector is in a sum in part ({type(error).__name__} as it was taken off).",
                "Start the coordinator again: it adds up what was committed.",
            ) from None
        raise


def _placed(words: Words, start: int, stop: int) -> Iterator[tuple[int, Vector]]:
    """Pieces and where they begin."""
    for piece in words.pieces(start, stop):
        yield start, piece
        start += len(piece)
    if start != stop:  # CHECK: words-complete
        raise ValueError("words are missing")
