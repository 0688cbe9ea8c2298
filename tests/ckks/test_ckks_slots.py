"""Packing, the release's rounding and the embedding, against slow twins."""

from __future__ import annotations

import cmath
import math
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from secagg.ckks.slots import Embedding, packed, released
from secagg.errors import MalformedMessage
from secagg.suite import Suite

from .twins import slots_of

N = 8
LIMIT = 4
PARTS = 2**15
"""Of a step of the grid: with 37 bits before them they are exact in float64."""


@given(st.lists(st.integers(-9, 9), min_size=16, max_size=16))
def test_slots_are_the_values_at_powers_of_a_root(coefficients: list[int]) -> None:
    """Horner's rule at ζ^(3^j), ζ = exp(iπ/16)."""
    slots = slots_of(np.array(coefficients, np.int8))
    for j, slot in enumerate(slots):
        root, value = cmath.exp(1j * math.pi * (3**j % 32) / 16), 0j
        for coefficient in reversed(coefficients):
            value = value * root + coefficient
        assert abs(value - slot) < 1e-11


@given(st.lists(st.lists(st.integers(-(2**49), 2**49), min_size=16, max_size=16), min_size=1))
def test_the_embedding_inverts_the_evaluation(polynomials: list[list[int]]) -> None:
    """Coefficients up to 2^49, as float64 carries them through two transforms."""
    embedding = Embedding(16, 2.0**40)
    rows = np.array([slots_of(np.array(one)) / 2.0**40 for one in polynomials])
    found = embedding.coefficients(rows.view(np.float64))
    assert (found.dtype, found.flags.c_contiguous) == (np.int64, True)
    assert np.abs(found - np.array(polynomials)).max() <= 4


@given(st.lists(st.floats(-1000, 1000), min_size=32, max_size=32))
def test_no_coefficient_exceeds_the_greatest_slot(values: list[float]) -> None:
    rows = np.array(values).reshape(1, 32)
    greatest = np.abs(rows.view(np.complex128)).max() * 2.0**40
    assert np.abs(Embedding(32, 2.0**40).coefficients(rows)).max() <= greatest * (1 + 1e-12) + 1


@settings(deadline=None)
@given(
    values=st.lists(st.floats(-1, 1), min_size=1, max_size=60),
    cuts=st.lists(st.integers(0, 60), max_size=5),
    chunk=st.integers(1, 4),
)
def test_rows_hold_the_values_in_order(values: list[float], cuts: list[int], chunk: int) -> None:
    borders = [0, *sorted(min(cut, len(values)) for cut in cuts), len(values)]
    pieces = [np.array(values[a:b]) for a, b in pairwise(borders)]
    chunks = list(packed(pieces, len(values), LIMIT, N, chunk))
    assert all(len(rows) == chunk for rows in chunks[:-1])
    rows = np.concatenate(chunks)
    assert rows.shape == (-(-len(values) // (N - 1)), N)
    assert rows[:, 0].tolist() == [1.0] * len(rows)
    flat = rows[:, 1:].reshape(-1)
    steps = [round(Fraction(value) * LIMIT * 2**24) for value in values]
    assert flat[: len(values)].tolist() == [step / 2**24 for step in steps]
    assert not flat[len(values) :].any()


@pytest.mark.parametrize(
    ("sizes", "count"),
    [((3,), 4), ((), 1), ((7, 0, 6), 14), ((5,), 4), ((4, 0, 1), 4), ((15,), 14)],
)
def test_refuses_another_number_of_values(sizes: tuple[int, ...], count: int) -> None:
    with pytest.raises(ValueError, match="values than were announced"):
        list(packed(map(np.zeros, sizes), count, LIMIT, N, 1))


@pytest.mark.parametrize("value", [1 + 2**-39, -1 - 2**-39, 1.0001, math.inf, -math.inf, math.nan])
def test_refuses_what_is_no_fraction(value: float) -> None:
    with pytest.raises(ValueError, match="no fraction"):
        list(packed([np.array([0.5, value])], 2, LIMIT, N, 1))


@pytest.mark.parametrize("value", [1 + 2**-41, -1 - 2**-41])
def test_float64_may_leave_a_fraction_a_few_units_beyond_1(value: float) -> None:
    (rows,) = packed([np.array([value])], 1, LIMIT, N, 1)
    assert rows[0, :3].tolist() == [1, math.copysign(LIMIT, value), 0]


def off_the_grid(steps: list[int], parts: list[int]) -> np.ndarray:
    """Rows whose values are so many steps, and so many parts of one, away from zero."""
    rows: np.ndarray = (np.array(steps) + np.array(parts) / PARTS).reshape(-1, N) / 2**24
    rows[:, 0] = 3
    return rows


STEPS = st.lists(st.integers(-(2**36), 2**36), min_size=2 * N, max_size=2 * N)
BORDER = PARTS * 3 // 8
NEAR = st.integers(-BORDER, BORDER)


@given(
    steps=STEPS,
    parts=st.lists(NEAR, min_size=2 * N, max_size=2 * N),
    off=st.floats(-1e-3, 1e-3).map(lambda x: x * (1 - 1e-9)),
)
def test_releases_multiples_alone(steps: list[int], parts: list[int], off: float) -> None:
    """Whatever noise takes values off the grid, up to three eighths of a step, is gone, exactly."""
    rows = off_the_grid(steps, parts)
    rows[:, 0] = 3 + round(off * 2**24) / 2**24
    sums = released(rows, 3, LIMIT)
    sealed = np.array(steps).reshape(2, N)[:, 1:].reshape(-1)
    assert [Fraction(float(x)) * LIMIT * 2**24 for x in sums] == sealed.tolist()


@given(
    steps=STEPS,
    parts=st.lists(NEAR, min_size=2 * N, max_size=2 * N),
    at=st.integers(0, 2 * N - 1).filter(lambda at: at % N),
    beyond=st.integers(BORDER + 1, PARTS // 2),
    sign=st.sampled_from([-1, 1]),
)
def test_refuses_what_is_off_the_grid(
    steps: list[int], parts: list[int], at: int, beyond: int, sign: int
) -> None:
    """Any one value by any part of a step beyond three eighths."""
    parts[at] = sign * beyond
    with pytest.raises(MalformedMessage) as caught:
        released(off_the_grid(steps, parts), 3, LIMIT)
    assert caught.value.code == "off-grid"


@pytest.mark.parametrize("off", [0.375 + 2**-30, -0.375 - 2**-30, 0.5, math.nan])
def test_three_eighths_of_a_step_are_the_border(off: float) -> None:
    rows = np.zeros((3, N))
    rows[:, 0] = 3
    rows[2, N - 1] = math.copysign(0.375, off) / 2**24
    assert not released(rows.copy(), 3, LIMIT).any()
    rows[2, N - 1] = off / 2**24
    with pytest.raises(MalformedMessage) as caught:
        released(rows, 3, LIMIT)
    assert caught.value.code == "off-grid"


@pytest.mark.parametrize("slot", [2.0, 4.0, 3.0011, 2.9989, math.nan, math.inf])
def test_refuses_another_reserved_slot(slot: float) -> None:
    rows = np.zeros((3, N))
    rows[:, 0] = 3
    rows[1, 0] = slot
    with pytest.raises(MalformedMessage) as caught:
        released(rows, 3, LIMIT)
    assert caught.value.code == "reserved-slot"
    assert str(slot) not in str(caught.value)


def test_a_sum_at_the_limit_does_not_wrap() -> None:
    """√2 · n · B · scale stays below q/2 for every cohort that a session may have."""
    numbers = Suite.CKKS_54.parameters
    for silos in range(3, 257):
        limit = numbers.slot_limit(silos)
        assert math.sqrt(2) * silos * limit * numbers.scale + 2**36 < numbers.modulus / 2
        assert limit & (limit - 1) == 0
