"""Mask expansion against a slow, dumb twin: Python integers over PyCryptodome's keystreams."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from threading import Thread
from typing import get_args

import numpy as np
import pytest
from Crypto.Cipher import AES, ChaCha20
from hypothesis import given, settings
from hypothesis import strategies as st

from secagg import parallel
from secagg.config import MaskPrg, RingBits
from secagg.crypto.prg import key_bytes
from secagg.crypto.secret import Secret
from secagg.parallel import in_ranges
from secagg.ring import expand, native
from secagg.ring.expand import Mask, apply_masks, masked, masker
from secagg.ring.native import Path
from secagg.ring.vectors import PowerRing, Vector

BITS = get_args(RingBits)
AES_CTR, CHACHA = MaskPrg.AES_128_CTR, MaskPrg.CHACHA20
SMALL_TILE = 64
PATHS = native.available()
paths = pytest.mark.parametrize("path", PATHS)


def keystream(prg: MaskPrg, key: bytes, size: int) -> bytes:
    """The first bytes of a stream; the twin never seeks."""
    if prg is AES_CTR:
        return AES.new(key, AES.MODE_CTR, nonce=b"", initial_value=0).encrypt(bytes(size))
    return ChaCha20.new(key=key, nonce=bytes(12)).encrypt(bytes(size))


def far_keystream(prg: MaskPrg, key: bytes, offset: int, size: int) -> bytes:
    """Bytes from a block's start far into a stream."""
    if prg is AES_CTR:
        cipher = AES.new(key, AES.MODE_CTR, nonce=b"", initial_value=offset // 16)
        return cipher.encrypt(bytes(size))
    chacha = ChaCha20.new(key=key, nonce=bytes(12))
    chacha.seek(offset)
    return chacha.encrypt(bytes(size))


def words_of(stream: bytes, bits: int) -> list[int]:
    size = bits // 8
    return [int.from_bytes(stream[at : at + size], "little") for at in range(0, len(stream), size)]


def twin(bits: int, words: list[int], masks: Sequence[Mask], prg: MaskPrg, start: int) -> list[int]:
    out = list(words)
    for mask in masks:
        stream = keystream(prg, mask.key.reveal(), (start + len(words)) * bits // 8)
        for index, word in enumerate(words_of(stream, bits)[start:]):
            out[index] = (out[index] + (word if mask.add else -word)) % 2**bits
    return out


def array(bits: int, words: list[int]) -> Vector:
    return np.array(words, dtype=f"<u{bits // 8}")


@contextmanager
def tiles_of(size: int) -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(expand, "TILE_BYTES", size)
        patch.setattr(expand, "_ZEROS", bytes(size))
        yield patch


@st.composite
def cases(draw: st.DrawFn) -> tuple[int, MaskPrg, list[int], list[Mask], int]:
    bits, prg = draw(st.sampled_from(BITS)), draw(st.sampled_from(MaskPrg))
    tile = SMALL_TILE * 8 // bits
    border = st.builds(lambda k, d: max(0, k * tile + d), st.integers(0, 7), st.integers(-1, 1))
    length = draw(border | st.integers(0, 8 * tile))
    words = draw(st.randoms(use_true_random=False))
    values = [words.choice((0, 1, 2**bits - 1, words.getrandbits(bits))) for _ in range(length)]
    key = st.binary(min_size=key_bytes(prg), max_size=key_bytes(prg)).map(Secret)
    masks = draw(st.lists(st.builds(Mask, key, st.booleans()), max_size=4))
    return bits, prg, values, masks, draw(border | st.integers(0, 600))


@settings(deadline=None, max_examples=150)
@given(case=cases(), threads=st.sampled_from((1, 2, 3, 50)))
def test_every_path_equals_the_twin(
    case: tuple[int, MaskPrg, list[int], list[Mask], int], threads: int
) -> None:
    bits, prg, words, masks, start = case
    expected = twin(bits, words, masks, prg, start)
    for path in PATHS:
        vector = array(bits, words)
        with tiles_of(SMALL_TILE):
            apply_masks(
                PowerRing(bits), vector, masks, prg, start=start, threads=threads, path=path
            )
        assert vector.tolist() == expected, path


@settings(deadline=None, max_examples=60)
@given(case=cases(), path=st.sampled_from(PATHS), data=st.data())
def test_range_by_range_equals_the_whole(
    case: tuple[int, MaskPrg, list[int], list[Mask], int], path: Path, data: st.DataObject
) -> None:
    bits, prg, words, masks, start = case
    whole, parts = array(bits, words), array(bits, words)
    cuts = data.draw(st.lists(st.integers(0, len(words)), max_size=4).map(sorted))
    with tiles_of(SMALL_TILE):
        apply_masks(PowerRing(bits), whole, masks, prg, start=start, threads=1, path=path)
        put_on = masker(PowerRing(bits), masks, prg, path)
        for low, high in zip([0, *cuts], [*cuts, len(words)], strict=True):
            put_on(parts[low:high], start + low)
    assert parts.tolist() == whole.tolist()


@settings(deadline=None, max_examples=60)
@given(case=cases(), on=st.sampled_from(PATHS), off=st.sampled_from(PATHS))
def test_the_inverse_takes_a_mask_off(
    case: tuple[int, MaskPrg, list[int], list[Mask], int], on: Path, off: Path
) -> None:
    """Whatever path either was made on."""
    bits, prg, words, masks, start = case
    vector = array(bits, words)
    with tiles_of(SMALL_TILE):
        for mask in masks:
            apply_masks(PowerRing(bits), vector, [mask], prg, start=start, threads=1, path=on)
        inverse = [mask.inverse() for mask in masks]
        apply_masks(PowerRing(bits), vector, inverse, prg, start=start, threads=3, path=off)
    assert vector.tolist() == words


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("prg", MaskPrg)
@pytest.mark.parametrize("threads", [1, 2, 3, None])
@paths
def test_real_tiles(bits: RingBits, prg: MaskPrg, threads: int | None, path: Path) -> None:
    """Three tiles and a word of the size that ships, against NumPy over PyCryptodome's stream."""
    ring = PowerRing(bits)
    length = 3 * expand.TILE_BYTES // ring.word_bytes + 1
    masks = [Mask(Secret(bytes([i]) * key_bytes(prg)), add=i != 1) for i in range(3)]
    start = 5
    expected = ring.zeros(length)
    for mask in masks:
        stream = keystream(prg, mask.key.reveal(), (start + length) * ring.word_bytes)
        words = np.frombuffer(stream, ring.dtype)[start:]
        expected = expected + words if mask.add else expected - words
    vector = ring.zeros(length)
    apply_masks(ring, vector, masks, prg, start=start, threads=threads, path=path)
    np.testing.assert_array_equal(vector, expected)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(
    ("prg", "offset"),
    [(AES_CTR, 2**36), (AES_CTR, 16 * (2**32 - 1)), (CHACHA, 64 * (2**32 - 3))],
)
@paths
def test_far_ranges(bits: RingBits, prg: MaskPrg, offset: int, path: Path) -> None:
    """A range of a vector that nobody could hold whole; AES's counter carries past 32 bits."""
    ring, key = PowerRing(bits), bytes(range(key_bytes(prg)))
    skip, length = 3, 60 // ring.word_bytes
    stream = far_keystream(prg, key, offset, (skip + length) * ring.word_bytes)
    vector = ring.zeros(length)
    start = offset // ring.word_bytes + skip
    apply_masks(ring, vector, [Mask(Secret(key), add=True)], prg, start=start, path=path)
    assert vector.tolist() == words_of(stream, bits)[skip:]


def test_chacha_ends_where_its_counter_does() -> None:
    vector = PowerRing(32).zeros(4)
    with pytest.raises(OverflowError):
        apply_masks(PowerRing(32), vector, [Mask(Secret(bytes(32)), True)], CHACHA, start=2**36)
    assert not vector.any()


@paths
def test_nothing_to_mask(path: Path) -> None:
    vector = array(32, [7, 8])
    apply_masks(PowerRing(32), vector, [], AES_CTR, path=path)
    apply_masks(PowerRing(32), vector[:0], [Mask(Secret(bytes(16)), True)], AES_CTR, path=path)
    assert vector.tolist() == [7, 8]


@pytest.mark.parametrize(
    ("threads", "processors", "tiles", "workers"),
    [
        *((None, 3, 9, 3), (None, 1, 9, 1), (None, 9, 3, 1), (None, 9, 4, 2)),
        *((2, 3, 9, 2), (8, 1, 3, 3), (4, 4, 1, 1)),
    ],
)
def test_workers(threads: int | None, processors: int, tiles: int, workers: int) -> None:
    """As many threads as asked for or as there are processors, never more than tiles.

    Nobody who asks for none gets more than are worth it. One of them is the caller's.
    """
    started: list[Thread] = []

    class Counted(Thread):
        def start(self) -> None:
            started.append(self)
            super().start()

    ranges = partial(in_ranges, worth=2 * 8)
    with tiles_of(SMALL_TILE) as patch:
        patch.setattr(parallel, "Thread", Counted)
        patch.setattr(expand, "in_ranges", ranges)
        patch.setattr(os, "sched_getaffinity", lambda _: set(range(processors)))
        apply_masks(PowerRing(64), PowerRing(64).zeros(tiles * 8), [], AES_CTR, threads=threads)
    assert len(started) == workers - 1


def test_a_worker_s_failure_is_raised() -> None:
    mask, vector = Mask(Secret(bytes(32)), True), PowerRing(64).zeros(64)
    with tiles_of(SMALL_TILE), pytest.raises(ValueError, match="ChaCha20"):
        apply_masks(PowerRing(64), vector, [mask], CHACHA, start=2**35 - 33, threads=2)


@paths
@pytest.mark.parametrize("prg", MaskPrg)
@pytest.mark.parametrize("size", [0, 5, 15, 16, 17, 31, 32, 33])
def test_a_key_of_another_generator(prg: MaskPrg, size: int, path: Path) -> None:
    """The kernel takes keys in one piece: two of 8 bytes would be one of 16 to it."""
    if size == key_bytes(prg):
        return
    good = Mask(Secret(bytes(key_bytes(prg))), True)
    for bad in ([Mask(Secret(bytes(size)), True)] * 2, [good, Mask(Secret(bytes(size)), False)]):
        vector = PowerRing(64).zeros(64)
        with pytest.raises(ValueError, match="key"):
            apply_masks(PowerRing(64), vector, bad, prg, path=path)
        assert not vector.any()


def test_a_vector_that_exists_is_masked_in_place() -> None:
    vector, masks = array(32, [7, 8]), [Mask(Secret(bytes(16)), True)]
    expected = vector.copy()
    apply_masks(PowerRing(32), expected, masks, AES_CTR)
    assert masked(PowerRing(32), vector)(masks, AES_CTR) is vector
    assert vector.tolist() == expected.tolist()


def read_only() -> Vector:
    return np.frombuffer(bytes(32), "<u4")


@pytest.mark.parametrize(
    "vector",
    [
        read_only(),
        np.zeros(16, "<u4")[::2],
        np.zeros(8, "<u4")[::-1],
        np.zeros(8, "<i4"),
        np.zeros(8, "<u8"),
        np.zeros(8, ">u4"),
        np.zeros(8, "<f4"),
        np.zeros((3, 3), "<u4"),
        np.zeros((), "<u4"),
    ],
    ids=["read-only", "strided", "reversed", "signed", "wide", "big", "float", "matrix", "scalar"],
)
@paths
def test_refuses_what_is_no_vector_of_the_ring(vector: Vector, path: Path) -> None:
    """A matrix's rows would otherwise share one keystream, hence cancel it."""
    before = vector.tobytes()
    with pytest.raises(ValueError, match="contiguous, writable vector of the ring"):
        apply_masks(PowerRing(32), vector, [Mask(Secret(bytes(16)), True)], AES_CTR, path=path)
    assert vector.tobytes() == before


def test_a_mask_does_not_print_its_key() -> None:
    assert "07" not in repr(Mask(Secret(b"\x07" * 16), True))
