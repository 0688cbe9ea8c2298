"""The suite's numbers: pinned, and the capacity that they leave, by exact inequalities."""

from __future__ import annotations

import dataclasses
import math
import re
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from secagg.config import MAX_COHORT
from secagg.errors import ConfigError
from secagg.suite import Parameters, Suite

SUITE = Suite.CKKS_54.parameters
MOST = 362
"""The largest cohort that the suite has room for."""
NOISE = 2**36
FRESH_NOISE = 32
"""Of one ciphertext: 21, a half of rounding, and a few units of float64."""


def fits(n: int, limit: int | Fraction, numbers: Parameters = SUITE, noise: int = NOISE) -> bool:
    """√2 · n · B · scale + noise < q / 2, squared so that nothing is rounded."""
    room = Fraction(numbers.modulus, 2) - noise
    reach = n * Fraction(limit) * 2**numbers.scale_bits
    return room > 0 and 2 * reach**2 < room**2


def is_prime(n: int) -> bool:
    """Miller and Rabin with the bases that decide every n < 3.3 · 10^24."""
    odd, twos = n - 1, 0
    while odd % 2 == 0:
        odd, twos = odd // 2, twos + 1
    for base in (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41):
        x = pow(base, odd, n)
        if x not in (1, n - 1) and all((x := x * x % n) != n - 1 for _ in range(twos - 1)):
            return False
    return True


def test_the_suites_are_pinned() -> None:
    assert [suite.value for suite in Suite] == ["ckks-54"]
    assert dataclasses.astuple(SUITE) == (4096, 18014398509309953, 40)
    assert (SUITE.values, SUITE.scale) == (4095, 2.0**40)
    with pytest.raises(dataclasses.FrozenInstanceError):
        SUITE.modulus = 3  # type: ignore[misc]


def test_the_modulus_is_a_prime_just_below_2_54_with_roots_for_the_transform() -> None:
    q = SUITE.modulus
    assert is_prime(q)
    assert 0 < 2**54 - q < 2**20
    assert q % (2 * SUITE.degree) == 1
    assert q.bit_length() <= 109, "the standard's bound for N = 4096 and 128 bits"


@pytest.mark.parametrize(
    ("values", "ciphertexts"),
    [(0, 0), (1, 1), (4094, 1), (4095, 1), (4096, 2), (8190, 2), (8191, 3), (10**8, 24421)],
)
def test_a_ciphertext_carries_one_value_less_than_coefficients(
    values: int, ciphertexts: int
) -> None:
    assert SUITE.ciphertexts(values) == ciphertexts


def test_the_limit_is_the_greatest_power_of_two_that_cannot_wrap() -> None:
    for n in range(1, MOST + 1):
        limit = SUITE.slot_limit(n)
        assert limit >= 16
        assert limit & (limit - 1) == 0
        assert fits(n, limit)
        assert n * FRESH_NOISE < 2**14 < NOISE
        assert not fits(n, 2 * limit)


def test_the_largest_cohort_is_the_last_that_fits() -> None:
    assert fits(MOST, 16)
    assert not fits(MOST + 1, 16)
    assert MAX_COHORT <= MOST
    assert SUITE.slot_limit(MAX_COHORT) == 16


@pytest.mark.parametrize(
    ("n", "limit"),
    [(1, 4096), (2, 2048), (3, 1024), (5, 1024), (6, 512), (11, 512), (12, 256), (362, 16)],
)
def test_limits_at_known_points(n: int, limit: int) -> None:
    """n · B ≤ 5,792, the design's figure."""
    assert SUITE.slot_limit(n) == limit
    assert n * limit <= 5792


def test_noise_takes_its_part_of_the_capacity() -> None:
    """With less than 2^36 below q / 2, nothing is left for values, whatever their scale."""
    assert Parameters(4096, 2**38, 20).slot_limit(1) == 2**15  # (2^37 − 2^36) / (√2 · 2^20)
    with pytest.raises(ConfigError, match="ckks-capacity"):
        Parameters(4096, 2**37, 20).slot_limit(1)


@pytest.mark.parametrize("n", [363, 400, 1024, 10**6, 2**62])
def test_more_silos_are_refused_with_the_numbers(n: int) -> None:
    with pytest.raises(ConfigError) as caught:
        SUITE.slot_limit(n)
    error = caught.value
    assert error.code == "ckks-capacity"
    assert error.remedy
    found = re.fullmatch(
        r"(\d+) silos leave values within ±(\S+) of a slot's ±(\S+) \(at least ±16\): .*",
        error.observed,
    )
    assert found is not None
    assert int(found[1]) == n
    assert float(found[2]) < 16
    assert float(found[2]) == pytest.approx(SUITE.modulus / 2**41 / math.sqrt(2) / n, rel=1e-3)
    assert float(found[3]) == pytest.approx(SUITE.modulus / 2**41, rel=1e-3)


@given(
    bits=st.integers(45, 60),
    below=st.integers(1, 2**20),
    scale_bits=st.integers(20, 50),
    n=st.integers(1, 2000),
)
@settings(deadline=None)
def test_the_limit_of_any_parameters(bits: int, below: int, scale_bits: int, n: int) -> None:
    numbers = Parameters(4096, 2**bits - below, scale_bits)
    try:
        limit = numbers.slot_limit(n)
    except ConfigError:
        assert not fits(n, 16 + Fraction(1, 2**20), numbers)
    else:
        assert limit >= 16
        assert fits(n, Fraction(limit) * (1 - Fraction(1, 2**40)), numbers)
        assert not fits(n, 2 * limit * (1 + Fraction(1, 2**40)), numbers)
