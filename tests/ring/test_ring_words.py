"""Adding vectors that are read in pieces: over all cores, exactly, and all of one or none of it."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from secagg.errors import MalformedMessage, StorageFailed
from secagg.ring import words as module
from secagg.ring.vectors import PowerRing, PrimeRing, Ring, RunningSum, Vector
from secagg.ring.words import Held, fold
from secagg.suite import Suite

Q = Suite.CKKS_54.parameters.modulus
RINGS: list[Ring] = [PowerRing(16), PowerRing(32), PowerRing(64), PrimeRing(Q)]
MODULI = {ring: Q if isinstance(ring, PrimeRing) else 2 ** (8 * ring.word_bytes) for ring in RINGS}


@dataclass
class Scattered:
    """A vector somewhere else, whose pieces are cut anyhow.

    Args:
        vector: its words.
        grain: ranges begin at multiples of it.
        step: words of a piece.
        short: words that are not there.
        reads: so many ranges can be read.
        failure: raised by the next one.
    """

    vector: Vector
    grain: int = 1
    step: int = 3
    short: int = 0
    reads: int = 10**9
    failure: type[BaseException] = OSError
    ranges: list[tuple[int, int]] = field(default_factory=list)

    @property
    def length(self) -> int:
        return len(self.vector)

    @property
    def dtype(self) -> Any:
        return self.vector.dtype

    def pieces(self, start: int, stop: int) -> Iterator[Vector]:
        assert start % self.grain == 0
        self.ranges.append((start, stop))
        if len(self.ranges) > self.reads:
            raise self.failure("cannot be read")
        scratch = np.empty(self.step, self.vector.dtype)
        stop = min(stop, self.length - self.short)
        for at in range(start, stop, self.step):
            piece = scratch[: min(self.step, stop - at)]
            piece[:] = self.vector[at : at + len(piece)]
            yield piece
            piece[:] = 1  # a piece is gone when the next one is asked for


@st.composite
def sums(draw: st.DrawFn) -> tuple[Ring, list[Vector], int, int, int]:
    ring = draw(st.sampled_from(RINGS))
    length = draw(st.integers(0, 50))
    residues = st.integers(0, MODULI[ring] - 1) | st.sampled_from([0, MODULI[ring] - 1])
    vectors = draw(
        st.lists(
            st.lists(residues, min_size=length, max_size=length).map(
                lambda words: np.array(words, ring.dtype)
            ),
            min_size=1,
            max_size=6,
        )
    )
    return (
        ring,
        vectors,
        draw(st.integers(1, 9)),
        draw(st.integers(1, 9)),
        draw(st.integers(1, 5)),
    )


@settings(max_examples=150, deadline=None)
@given(sums())
def test_the_integers_sum(case: tuple[Ring, list[Vector], int, int, int]) -> None:
    """Whatever the ranges and pieces, the sum is that of Python's integers."""
    ring, vectors, grain, step, threads = case
    total = ring.zeros(len(vectors[0]))
    for vector in vectors:
        source = Scattered(vector, grain, step)
        fold(ring, total, source, threads)
        assert len(source.ranges) <= threads
        ends = [0, *(stop for _, stop in sorted(source.ranges))]
        assert ends == [*(start for start, _ in sorted(source.ranges)), len(vector)]
    ring.reduce(total)
    exact = [sum(map(int, column)) % MODULI[ring] for column in zip(*vectors, strict=True)]
    assert total.tolist() == exact


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 60), st.integers(1, 7), st.integers(1, 5), st.data())
def test_a_word_that_is_no_residue_leaves_nothing(
    length: int, step: int, threads: int, data: st.DataObject
) -> None:
    ring = PrimeRing(Q)
    anything = st.lists(st.integers(0, 2**64 - 1), min_size=length, max_size=length)
    before = np.array(data.draw(anything), "<u8")
    words = np.full(length, Q - 1, "<u8")
    words[data.draw(st.integers(0, length - 1))] = data.draw(st.integers(Q, 2**64 - 1))
    total = before.copy()
    with pytest.raises(MalformedMessage) as raised:
        fold(ring, total, Scattered(words, 1, step), threads)
    assert raised.value.code == "residue-range"
    np.testing.assert_array_equal(total, before)


def test_nothing_changes_in_a_sum_that_raises() -> None:
    running = RunningSum(PrimeRing(Q), 4)
    good, bad = np.array([1, 2, 3, Q - 1], "<u8"), np.array([1, 2, 3, Q], "<u8")
    running.add(good)
    for _ in range(2):
        with pytest.raises(MalformedMessage, match="no residue"):
            running.fold(Scattered(bad, step=1))
        with pytest.raises(MalformedMessage, match="no residue"):
            running.add(bad)
    running.fold(Scattered(good))
    assert running.total.tolist() == [2, 4, 6, Q - 2]


@pytest.mark.parametrize("threads", [None, 3])
def test_words_that_are_missing(threads: int | None) -> None:
    ring, total = PowerRing(32), np.arange(10, dtype="<u4")
    with pytest.raises(ValueError, match="missing"):
        fold(ring, total, Scattered(np.ones(10, "<u4"), short=2), threads)
    np.testing.assert_array_equal(total, np.arange(10))


@pytest.mark.parametrize("failure", [OSError, MemoryError, KeyboardInterrupt])
def test_a_sum_that_cannot_be_undone_is_none(failure: type[BaseException]) -> None:
    """Read once and not again: a part of the vector stays, and nobody gets to see it."""
    running = RunningSum(PowerRing(32), 10)
    running.add(np.ones(10, "<u4"))
    with pytest.raises(StorageFailed, match=failure.__name__) as raised:
        running.fold(Scattered(np.ones(10, "<u4"), short=2, reads=1, failure=failure))
    assert raised.value.code == "sum-spoilt"
    for _ in range(2):
        with pytest.raises(RuntimeError, match="in part"):
            _ = running.total
        with pytest.raises(RuntimeError, match="in part"):
            running.add(np.ones(10, "<u4"))


@pytest.mark.parametrize("reads", [10**9, 1])
@pytest.mark.parametrize("threads", [1, 3])
def test_a_refused_vector_is_not_kept(reads: int, threads: int) -> None:
    """Nor the total, which may be of gigabytes: nothing waits for the garbage collector."""

    def refused() -> list[weakref.ref[Any]]:
        total, words = np.arange(10, dtype="<u4"), Scattered(np.ones(10, "<u4"), short=2)
        words.reads = reads
        with pytest.raises((ValueError, StorageFailed)):
            fold(PowerRing(32), total, words, threads)
        return [weakref.ref(total), weakref.ref(words.vector)]

    gc.disable()
    try:
        assert [held() is None for held in refused()] == [True, True]
    finally:
        gc.enable()


def test_a_source_that_cannot_be_read_leaves_the_sum() -> None:
    running = RunningSum(PowerRing(32), 10)
    with pytest.raises(OSError, match="cannot be read"):
        running.fold(Scattered(np.ones(10, "<u4"), reads=0))
    running.add(np.ones(10, "<u4"))
    assert running.total.tolist() == [1] * 10


@pytest.mark.parametrize(
    "vector", [np.zeros(3, "<u4"), np.zeros(4, "<u8"), np.zeros((4, 1), "<u4"), np.zeros(4, "<i4")]
)
def test_another_shape_or_ring(vector: Any) -> None:
    with pytest.raises(ValueError, match="another ring or length"):
        RunningSum(PowerRing(32), 4).add(vector)


def test_a_held_vector_is_not_copied() -> None:
    vector = np.arange(2 * module.PIECE_BYTES, dtype="<u2")
    pieces = list(Held(vector).pieces(0, len(vector)))
    assert len(pieces) == 4
    assert all(np.shares_memory(piece, vector) for piece in pieces)
    np.testing.assert_array_equal(np.concatenate(pieces), vector)
