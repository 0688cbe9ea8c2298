"""Stochastic rounding: between floor and ceiling, within ±2^f, without bias."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
from Crypto.Cipher import AES, ChaCha20
from hypothesis import given, settings
from hypothesis import strategies as st

from secagg.config import MaskPrg
from secagg.crypto.prg import key_bytes
from secagg.crypto.secret import Entropy
from secagg.encoding.fixed import Rounding

Keyed = Callable[[int], Entropy]
Extreme = Callable[[pytest.MonkeyPatch, int], None]
AES_CTR = MaskPrg.AES_128_CTR
BITS = st.sampled_from((4, 9, 13, 24, 29, 52, 53, 61))


@st.composite
def scaled_values(draw: st.DrawFn) -> tuple[int, list[float]]:
    """Values up to the limit: integers and their float neighbours, halves, anything."""
    limit = 2 ** draw(BITS)
    whole = st.integers(-limit, limit).map(float) | st.sampled_from((limit, -limit, 0)).map(float)
    near = st.builds(math.nextafter, whole, st.sampled_from((-math.inf, math.inf)))
    half = whole.map(lambda x: x + 0.5)
    tiny = st.sampled_from((5e-324, -5e-324, -1e-20, 2.0**-40, -(2.0**-40), -(2.0**-54)))
    value = whole | near | half | tiny | st.floats(-limit, limit)
    values = draw(st.lists(value, min_size=1, max_size=40))
    return limit, [max(-float(limit), min(float(limit), value)) for value in values]


def stream_of(choice: int, keyed: Keyed, extreme: Extreme, patch: pytest.MonkeyPatch) -> Entropy:
    if choice < 0:
        extreme(patch, -choice - 1)
        return bytes
    return keyed(choice)


@settings(deadline=None, max_examples=300)
@given(case=scaled_values(), source=st.sampled_from((-1, -256)) | st.integers(0, 2**64))
def test_every_result_is_floor_or_ceiling_and_an_integer_is_itself(
    case: tuple[int, list[float]], source: int, keyed: Keyed, rounding_down_or_up: Extreme
) -> None:
    """Also with u → 1 beside numbers that leave a float64 no room for a fraction."""
    limit, values = case
    with pytest.MonkeyPatch.context() as patch:
        entropy = stream_of(source, keyed, rounding_down_or_up, patch)
        results = Rounding(AES_CTR, entropy).to_integers(np.array(values), limit).tolist()
        drawn = Rounding(AES_CTR, stream_of(source, keyed, rounding_down_or_up, patch))
        uniform = drawn.uniform(0, len(values)).tolist()
    for value, u, result in zip(values, uniform, results, strict=True):
        exact = Fraction(value)
        assert result == math.floor(exact + Fraction(u, 2**32))
        assert result in (math.floor(exact), math.ceil(exact))
        assert -limit <= result <= limit


@pytest.mark.parametrize("byte", [0x00, 0xFF])
def test_never_beyond_the_limit(
    byte: int, rounding_down_or_up: Extreme, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A float's last place beyond ±2^f, whatever u is."""
    rounding_down_or_up(monkeypatch, byte)
    for bits in (4, 13, 29, 61):
        limit = 2**bits
        over = [s * math.nextafter(limit, to) for s in (1, -1) for to in (0, math.inf)]
        got = Rounding(AES_CTR, bytes).to_integers(
            np.array([*over, limit, -limit, limit * 1.001]), limit
        )
        assert max(got.tolist()) <= limit
        assert min(got.tolist()) >= -limit


def keystream(prg: MaskPrg, key: bytes, size: int) -> bytes:
    if prg is MaskPrg.AES_128_CTR:
        return AES.new(key, AES.MODE_CTR, nonce=b"", initial_value=0).encrypt(bytes(size))
    return ChaCha20.new(key=key, nonce=bytes(12)).encrypt(bytes(size))


@pytest.mark.parametrize("prg", MaskPrg)
@pytest.mark.parametrize("order", [1, -1])
def test_u_is_the_keystream(prg: MaskPrg, order: int, keyed: Keyed) -> None:
    """⌊x + u⌋ with u the little-endian word of the number's place, whichever is rounded first."""
    key = keyed(3)(key_bytes(prg))
    stream = keystream(prg, key, 4 * 30)
    u = [Fraction(int.from_bytes(stream[at : at + 4], "little"), 2**32) for at in range(0, 120, 4)]
    values = np.linspace(-3, 3, 30)
    rounding, got = Rounding(prg, keyed(3)), np.zeros(30, np.int64)
    for start, stop in [(0, 7), (7, 16), (16, 30)][::order]:
        got[start:stop] = rounding.to_integers(values[start:stop], 16, start)
        np.testing.assert_array_equal(
            rounding.uniform(start, stop), np.frombuffer(stream, "<u4")[start:stop]
        )
    assert got.tolist() == [
        math.floor(Fraction(float(x)) + y) for x, y in zip(values, u, strict=True)
    ]


@pytest.mark.parametrize("fraction", [0.0, 2.0**-10, 0.125, 0.25, 0.5, 0.75, 0.875])
@pytest.mark.parametrize("whole", [0, -1, 5, -(2**13), 2**28 - 1, -(2**28), 2**41, -(2**41)])
def test_unbiased(fraction: float, whole: int, keyed: Keyed) -> None:
    """The mean of many roundings is the value, also where its float has few bits left."""
    draws = 100_000
    values = np.full(draws, whole + fraction)
    got = Rounding(AES_CTR, keyed(11)).to_integers(values, 2**42)
    ups = int(np.count_nonzero(got == whole + 1))
    assert ups + int(np.count_nonzero(got == whole)) == draws
    deviation = math.sqrt(fraction * (1 - fraction) / draws)
    assert abs(ups / draws - fraction) <= 6 * deviation


def test_unbiased_at_the_end_of_a_float(keyed: Keyed) -> None:
    """2^51 + 1/2 is the last place where a float64 has a half."""
    got = Rounding(AES_CTR, keyed(12)).to_integers(np.full(100_000, 2.0**51 + 0.5), 2**61)
    assert abs(int((got - 2**51).sum()) / 100_000 - 0.5) < 0.01


def test_independent_of_its_neighbours(keyed: Keyed) -> None:
    """Elements do not share rounding bits."""
    got = Rounding(AES_CTR, keyed(13)).to_integers(np.full(100_000, 0.5), 16)
    for distance in (1, 2, 4, 16, 50_000):
        agree = float(np.mean(got[distance:] == got[:-distance]))
        assert abs(agree - 0.5) < 0.02


def test_the_key_is_fresh_and_of_the_entropy() -> None:
    sizes: list[int] = []

    def entropy(size: int) -> bytes:
        sizes.append(size)
        return bytes([len(sizes)]) * size

    values = np.full(256, 0.5)
    for prg in MaskPrg:
        first, second = (Rounding(prg, entropy).to_integers(values, 16).tolist() for _ in range(2))
        assert sizes[-2:] == [key_bytes(prg)] * 2
        assert first != second


def test_its_input_stays(keyed: Keyed) -> None:
    values = np.array([0.25, -1.5, 3.0])
    Rounding(AES_CTR, keyed(1)).to_integers(values, 16)
    assert values.tolist() == [0.25, -1.5, 3.0]
