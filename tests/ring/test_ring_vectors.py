"""Words at a border, signs, sums: against Python integers."""

from __future__ import annotations

import struct
from typing import get_args

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from secagg.config import RingBits
from secagg.errors import MalformedMessage
from secagg.ring.vectors import PowerRing, RunningSum

BITS = get_args(RingBits)
FORMAT = {16: "H", 32: "I", 64: "Q"}
rings = st.sampled_from(BITS).map(PowerRing)


def words(ring: PowerRing) -> st.SearchStrategy[list[int]]:
    top = 2**ring.bits - 1
    edge = st.sampled_from((0, 1, top // 2, top // 2 + 1, top))
    return st.lists(edge | st.integers(0, top), min_size=1, max_size=20)


@pytest.mark.parametrize("bits", BITS)
def test_zeros(bits: RingBits) -> None:
    ring = PowerRing(bits)
    vector = ring.zeros(5)
    assert (vector.tolist(), vector.nbytes, ring.word_bytes) == ([0] * 5, 5 * bits // 8, bits // 8)
    assert vector.dtype == ring.dtype
    assert ring.dtype.str == f"<u{bits // 8}"


@given(data=st.data(), ring=rings, kind=st.sampled_from((bytes, bytearray, memoryview)))
def test_bytes_are_little_endian_words(data: st.DataObject, ring: PowerRing, kind: type) -> None:
    values = data.draw(words(ring))
    packed = struct.pack(f"<{len(values)}{FORMAT[ring.bits]}", *values)
    vector = ring.unpack(kind(packed), len(values))
    assert vector.tolist() == values
    assert vector.dtype == ring.dtype
    view = ring.pack(vector)
    assert (view.format, view.nbytes, bytes(view)) == ("B", len(packed), packed)


def test_unpack_views_and_does_not_copy() -> None:
    data = bytearray(8)
    vector = PowerRing(32).unpack(data, 2)
    data[4] = 9
    assert vector.tolist() == [0, 9]
    vector[0] = 1
    assert data[0] == 1
    assert not PowerRing(32).unpack(bytes(8), 2).flags.writeable


def test_unpack_counts_the_bytes_of_a_view_with_wide_items() -> None:
    view = memoryview(np.arange(3, dtype="<u8"))
    assert len(PowerRing(32).unpack(view, 6)) == 6
    with pytest.raises(MalformedMessage):
        PowerRing(32).unpack(view, 3)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("off", [-1, 1, "word", "less"])
def test_unpack_refuses_another_length(bits: RingBits, off: int | str) -> None:
    size = bits // 8
    extra = {"word": size, "less": -size}.get(off, off)
    assert isinstance(extra, int)
    with pytest.raises(MalformedMessage) as error:
        PowerRing(bits).unpack(bytes(4 * size + extra), 4)
    assert error.value.code == "vector-length"


def test_pack_views_where_it_can_and_copies_where_it_must() -> None:
    vector = np.arange(8, dtype="<u4")
    view = PowerRing(32).pack(vector)
    vector[0] = 7
    assert view[0] == 7
    assert bytes(PowerRing(32).pack(vector[::2])) == struct.pack("<4I", 7, 2, 4, 6)


def test_nothing_packs_to_nothing() -> None:
    assert bytes(PowerRing(32).pack(PowerRing(32).unpack(b"", 0))) == b""


@given(data=st.data(), ring=rings)
def test_centred(data: st.DataObject, ring: PowerRing) -> None:
    values = data.draw(words(ring))
    half = 2 ** (ring.bits - 1)
    vector = np.array(values, ring.dtype)
    signed = ring.centred(vector)
    assert signed.tolist() == [(value + half) % 2**ring.bits - half for value in values]
    assert np.shares_memory(signed, vector)


@given(
    ring=rings,
    values=st.lists(
        st.integers(-(2**63), 2**63 - 1)
        | st.sampled_from((-(2**63), 2**63 - 1, -1, 2**31, -(2**31) - 1, 2**15, -(2**15) - 1)),
        max_size=20,
    ),
)
def test_wrap(ring: PowerRing, values: list[int]) -> None:
    vector = ring.wrap(np.array(values, np.int64))
    assert vector.tolist() == [value % 2**ring.bits for value in values]
    assert vector.dtype == ring.dtype


@given(data=st.data(), ring=rings, count=st.integers(0, 6))
def test_running_sum_is_the_sum_mod_2_w(data: st.DataObject, ring: PowerRing, count: int) -> None:
    length = data.draw(st.integers(1, 5))
    top = 2**ring.bits - 1
    row = st.lists(st.integers(0, top), min_size=length, max_size=length)
    rows = data.draw(st.lists(row, min_size=count, max_size=count))
    running = RunningSum(ring, length)
    for values in rows:
        vector = np.array(values, ring.dtype)
        running.add(vector)
        assert vector.tolist() == values
    expected = [sum(column) % 2**ring.bits for column in zip(*rows, strict=True)] or [0] * length
    assert running.total.tolist() == expected


@pytest.mark.parametrize(
    "other",
    [
        np.ones(3, "<u4"),
        np.ones(5, "<u4"),
        np.ones(4, "<u8"),
        np.ones(4, "<u2"),
        np.ones(4, "<i4"),
        np.ones(4, ">u4"),
        np.ones((1, 4), "<u4"),
        np.ones((), "<u4"),
        np.ones(1, "<u4"),
    ],
    ids=["short", "long", "wide", "narrow", "signed", "big-endian", "matrix", "scalar", "one"],
)
def test_running_sum_refuses_what_is_no_such_vector(other: np.ndarray) -> None:
    running = RunningSum(PowerRing(32), 4)
    with pytest.raises(ValueError, match="another ring or length"):
        running.add(other)
    assert not running.total.any()
