"""Reals in slots, and out again: packing, the reserved slot, the rounding before release.

A row is what one ciphertext carries: N float64, the real and imaginary parts of N/2 complex slots
in turn. The first is reserved: 1 at each silo, hence the number of survivors in their sum, which a
contribution under another key or another c1 turns into noise. The other N − 1 are values, scaled to
[−B, B].

An opened row is m + e, and e tells of the key: one released sum of unrounded values gives it away.
So values are rounded to a grid, multiples of 2^-24, before they are sealed as well as after: a sum
of what honest silos sealed lies on the grid but for the noise (a standard deviation below 2^-28.8
for 256 silos), and rounding takes away all of that. A sum that is further off the grid than noise
can be was shifted, so that the rounding would tell of the noise where it falls near a border; it is
refused. What is left to who shifts a sum is whether it opens at all.

Source: Cheon et al. 2017 (ePrint 2016/421), section 3.1 (the canonical embedding); Li and
Micciancio, EUROCRYPT 2021 (ePrint 2020/1533), section 3 (why decryptions are not released as they
are); Li, Micciancio, Schultz and Sorrell, CRYPTO 2022 (ePrint 2022/816).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Final

import numpy as np
import numpy.typing as npt

from secagg.encoding.layout import Reals
from secagg.errors import MalformedMessage
from secagg.suite import RELEASE_BITS, RESERVED, RESERVED_TOLERANCE

_GENERATOR: Final = 3
_GRID: Final = 2.0**RELEASE_BITS
_OFF: Final = 0.375
"""How far off the grid noise can be, in its steps: 10.4 standard deviations for 256 silos, which
are exceeded in one sum of 10^8 values with a chance of 2 · 10^-17."""
_SLACK: Final = 1 + 2.0**-40
"""A fraction computed in float64 may be a few units beyond 1."""


class Embedding:
    """Slots to coefficients: the polynomial of real coefficients with these values.

    With ζ = exp(iπ/N), slot j is the value at ζ^(3^j). Exactly one of that root and its conjugate
    is a power ζ^(4k+1), where X^(N/2) is i. So with w = m_0 … m_(N/2−1) + i · (m_(N/2) … m_(N−1)),
    the values there are those of w, a polynomial of half the degree: one FFT of N/2 points gives w
    from them.

    Args:
        degree: N.
        scale: what coefficients are multiplied by.
    """

    def __init__(self, degree: int, scale: float) -> None:
        powers = np.array([pow(_GENERATOR, j, 2 * degree) for j in range(degree // 2)])
        itself = powers % 4 == 1
        self._from = np.argsort(np.where(itself, powers, 2 * degree - powers))
        self._sign = np.where(itself, 1.0, -1.0)[self._from]
        roots = np.exp(-1j * np.pi * np.arange(degree // 2) / degree)
        self._untwist = roots * (scale / (degree // 2))

    def coefficients(self, rows: Reals) -> npt.NDArray[np.int64]:
        """Return the coefficients, rounded to integers.

        Args:
            rows: shape (rows, N): the real and imaginary parts of slots in turn.

        Returns:
            Shape (rows, N), contiguous; none exceeds the greatest slot times the scale.
        """
        values = np.take(rows.view(np.complex128), self._from, axis=1)
        values.imag *= self._sign
        halves = np.fft.fft(values, axis=1)
        halves *= self._untwist
        whole = np.empty(rows.shape)
        np.rint(halves.real, out=whole[:, : rows.shape[1] // 2])
        np.rint(halves.imag, out=whole[:, rows.shape[1] // 2 :])
        return whole.astype(np.int64)


def packed(
    values: Iterable[Reals], count: int, limit: int, degree: int, chunk: int
) -> Iterator[Reals]:
    """Yield rows in chunks: reserved slots, values times ``limit`` on the grid, zeros at the end.

    Args:
        values: fractions in [−1, 1], in pieces of any length.
        count: how many there are in all, at least 1.
        limit: B.
        degree: N.
        chunk: rows of a chunk, but for the last.

    Yields:
        Fresh float64 arrays of shape (rows, N).

    Raises:
        ValueError: there are more or fewer values, or one is beyond [−1, 1]: a sum could wrap.
    """
    source = _Source(values, limit)
    for at in range(0, count, chunk * (degree - 1)):
        rest = min(count - at, chunk * (degree - 1))
        rows = np.empty((-(-rest // (degree - 1)), degree))
        rows[:, 0] = RESERVED
        for row in rows:
            here = min(rest, degree - 1)
            source.read_into(row[1 : 1 + here])
            row[1 + here :] = 0
            rest -= here
        yield rows
    source.close()


class _Source:
    """Reads scaled values from pieces, whatever their borders."""

    def __init__(self, values: Iterable[Reals], limit: int) -> None:
        self._pieces = iter(values)
        self._piece: Reals = np.empty(0)
        self._limit = float(limit)

    def read_into(self, out: Reals) -> None:
        at = 0
        while at < len(out):
            if not len(self._piece):
                self._piece = self._next()
            part = self._piece[: len(out) - at]
            here = out[at : at + len(part)]
            np.multiply(part, self._limit * _GRID, out=here)
            np.rint(here, out=here)
            np.multiply(here, 1 / _GRID, out=here)
            at, self._piece = at + len(part), self._piece[len(part) :]

    def close(self) -> None:
        if len(self._piece) or any(map(len, self._pieces)):
            raise ValueError("more values than were announced")

    def _next(self) -> Reals:
        try:
            piece = next(self._pieces)
        except StopIteration:
            raise ValueError("fewer values than were announced") from None
        # CHECK: sealed-fraction
        if not (piece.min(initial=0) >= -_SLACK and piece.max(initial=0) <= _SLACK):
            raise ValueError("a value is no fraction of its bound")
        return piece


def released(rows: Reals, silos: int, limit: int) -> Reals:
    """Check the reserved slots of opened rows and round their values, which then may be published.

    Args:
        rows: shape (rows, N), changed in place.
        silos: how many uploads were added.
        limit: B.

    Returns:
        Shape (rows · (N − 1),): sums of fractions, multiples of 2^-24 / B.

    Raises:
        MalformedMessage: ``reserved-slot``, it is not the number of silos: an upload or its seed is
            another than the survivors committed to, or was made under another key; ``off-grid``,
            a value is no sum of values that were sealed.
    """
    distance = np.abs(rows[:, 0] - silos * RESERVED)
    # CHECK: reserved-slot
    if not (distance <= RESERVED_TOLERANCE).all():  # False also for NaN
        raise MalformedMessage(
            "reserved-slot",
            "The sum does not open under this key.",
            "A silo sealed under another key, or the coordinator changed the sum.",
        )
    np.multiply(rows, _GRID, out=rows)
    steps = np.rint(rows)
    np.subtract(rows, steps, out=rows)
    if not (np.abs(rows, out=rows).max(initial=0) <= _OFF):  # CHECK: off-grid
        raise MalformedMessage(
            "off-grid",
            "The sum opens to values that no silos have sealed.",
            "The coordinator changed the sum, or a silo sealed something else than an update.",
        )
    np.multiply(steps, 1 / (_GRID * limit), out=rows)
    return rows[:, 1:].reshape(-1)
