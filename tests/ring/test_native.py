"""The kernel in C: every path against OpenSSL's and against slow, dumb twins, bit for bit.

The oracles are PyCryptodome's keystreams with Python's integers for masks, and exact fractions for
rounding. What only another machine could choose is chosen by hand here.
"""

from __future__ import annotations

import importlib.util
import math
import re
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path as PathOnDisk
from typing import Any

import cryptography_vectors
import ml_dtypes
import numpy as np
import pytest
from Crypto.Cipher import AES
from hypothesis import given, settings
from hypothesis import strategies as st

from secagg.config import MaskPrg
from secagg.crypto.secret import Secret
from secagg.ring import _native, native
from secagg.ring.expand import Mask, apply_masks, signs_of
from secagg.ring.native import KINDS, Path, ReadyKeys, kernel
from secagg.ring.vectors import PowerRing, PrimeRing, Ring, Vector
from secagg.suite import Suite

AES_CTR = MaskPrg.AES_128_CTR
Q = Suite.CKKS_54.parameters.modulus
LEAST = 2**54 - 2**20 + 1
RINGS: tuple[Ring, ...] = (PowerRing(16), PowerRing(32), PowerRing(64), PrimeRing(Q))
PATHS = native.available()
OURS = PATHS[:-1]
STRIDE, GROUP, TILE, STREAM = 512, 256 * 16, 2**14, 2**44
"""Bytes: of the widest path's loop, of counters that differ in one byte, of a tile, of a stream."""

pytestmark = pytest.mark.skipif(native.kernel is None, reason="the kernel is not installed")
paths = pytest.mark.parametrize("path", PATHS)
ours = pytest.mark.parametrize("path", OURS)
needs_aes = pytest.mark.skipif(not OURS, reason="no path of the kernel runs here")
rings = pytest.mark.parametrize("ring", RINGS, ids=["16", "32", "64", "q"])


def stream(key: bytes, offset: int, size: int, number: int = 0) -> bytes:
    """Bytes of one of a key's streams from any byte on."""
    block, skip = divmod(offset, 16)
    first = (number << 64 | block).to_bytes(16, "big")
    cipher = AES.new(key, AES.MODE_CTR, nonce=b"", initial_value=first)
    return cipher.encrypt(bytes(skip + size))[skip:]


def drawn(ring: Ring, key: bytes, coordinate: int) -> int:
    """The residue at a coordinate, by hand."""
    size, number = ring.word_bytes, 0
    while True:
        word = int.from_bytes(stream(key, coordinate * size, size, number), "little")
        if not isinstance(ring, PrimeRing):
            return word
        if word >> 10 < ring.modulus:
            return word >> 10
        number += 1


def modulus_of(ring: Ring) -> int:
    return ring.modulus if isinstance(ring, PrimeRing) else 2 ** (8 * ring.word_bytes)


def twin(ring: Ring, words: Vector, masks: Sequence[Mask], start: int) -> list[int]:
    """Python's integers, over the streams as NumPy cuts them into words; none is redrawn here."""
    out, modulus = [int(word) for word in words], modulus_of(ring)
    for mask in masks:
        data = stream(mask.key.reveal(), start * ring.word_bytes, words.nbytes)
        for index, word in enumerate(np.frombuffer(data, ring.dtype).tolist()):
            residue = word >> 10 if isinstance(ring, PrimeRing) else word
            assert residue < modulus
            out[index] = (out[index] + (residue if mask.add else -residue)) % modulus
    return out


def some_masks(count: int) -> list[Mask]:
    return [Mask(Secret(bytes([i % 251, i // 251]) * 8), add=i % 3 != 1) for i in range(count)]


def some_words(ring: Ring, length: int) -> Vector:
    """Words at the edges of a ring, and between."""
    modulus = modulus_of(ring)
    edges = [0, 1, modulus - 1, modulus // 2, modulus - 2]
    return np.array([edges[i % 5] if i % 7 else i * i % modulus for i in range(length)], ring.dtype)


def odd(vector: np.ndarray, by: int = 1) -> np.ndarray:
    """The same words at an address that no word begins at."""
    memory = np.zeros(vector.nbytes + 64, np.uint8)
    at = -memory.ctypes.data % 64 + by
    view = memory[at : at + vector.nbytes].view(vector.dtype)
    view[:] = vector
    return view


# Masks.


@rings
@pytest.mark.parametrize("count", [0, 1, 3, 16])
def test_every_path_equals_the_twin(ring: Ring, count: int) -> None:
    """Starts and lengths about a stride, a group of counters and a tile; odd ones, too."""
    masks, per = some_masks(count), ring.word_bytes
    starts = [0, 1, 7, STRIDE // per - 1, GROUP // per, GROUP // per + 1, TILE // per - 3]
    lengths = [0, 1, 2, 31, STRIDE // per - 1, STRIDE // per, STRIDE // per + 1]
    cases = [(start, length) for start in starts for length in lengths]
    cases += [(start, TILE // per + d) for start in starts[::3] for d in (-1, 0, 1)]
    for start, length in cases[:: 1 if count == 3 else 4]:
        words = some_words(ring, length)
        expected = twin(ring, words, masks, start)
        for path in PATHS:
            vector = words.copy()
            apply_masks(ring, vector, masks, AES_CTR, start=start, path=path, threads=1)
            assert vector.tolist() == expected, (path, start, length)


@rings
@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_every_path_equals_the_twin_anywhere(ring: Ring, data: st.DataObject) -> None:
    """At any place of the 16 TiB of a stream, in any memory."""
    border = st.sampled_from((STRIDE, GROUP, TILE, 16 * 2**32, 2**40, STREAM - TILE))
    near = st.builds(lambda at, d: max(0, at // ring.word_bytes + d), border, st.integers(-70, 70))
    start = data.draw(near | st.integers(0, (STREAM - TILE) // ring.word_bytes))
    length = data.draw(st.integers(0, 600))
    keys = st.binary(min_size=16, max_size=16).map(Secret)
    masks = data.draw(st.lists(st.builds(Mask, keys, st.booleans()), max_size=3))
    words = some_words(ring, length)
    expected = twin(ring, words, masks, start)
    by = data.draw(st.integers(0, 15))
    for path in PATHS:
        vector = odd(words, by)
        apply_masks(ring, vector, masks, AES_CTR, start=start, path=path, threads=1)
        assert vector.tolist() == expected, path


@ours
@pytest.mark.parametrize("count", [1022, 1023, 1024, 1025, 2047])
@pytest.mark.parametrize("add", [True, False])
def test_a_word_s_lazy_terms(path: Path, count: int, add: bool) -> None:
    """Many different keys on the greatest residues, over more than a stride."""
    masks = [Mask(mask.key, add) for mask in some_masks(count)]
    vector = np.full(75, Q - 1, "<u8")
    other = vector.copy()
    apply_masks(PrimeRing(Q), vector, masks, AES_CTR, start=3, path=path, threads=1)
    apply_masks(PrimeRing(Q), other, masks, AES_CTR, start=3, path=Path.OPENSSL, threads=1)
    np.testing.assert_array_equal(vector, other)
    total = sum(drawn(PrimeRing(Q), mask.key.reveal(), 77) for mask in masks)
    assert int(vector[-1]) == (Q - 1 + (total if add else -total)) % Q


@ours
@pytest.mark.parametrize("count", [1022, 1023, 1024, 1025, 2046, 2047])
@pytest.mark.parametrize("add", [True, False])
def test_no_word_runs_over(path: Path, count: int, add: bool) -> None:
    """One mask many times where its residue is next to the greatest, or to none if it comes off."""
    key = bytes(16)
    words = np.frombuffer(stream(key, 0, 2**21), "<u8")
    at = int(words.argmax() if add else words.argmin())
    residue = drawn(PrimeRing(Q), key, at)
    assert min(residue, Q - residue) < Q / 4096, "1,025 of them are beyond 2^64"
    vector = np.full(130, Q - 1, "<u8")
    masks = [Mask(Secret(key), add)] * count
    apply_masks(PrimeRing(Q), vector, masks, AES_CTR, start=at - 64, path=path, threads=1)
    assert int(vector[64]) == (Q - 1 + (residue if add else -residue) * count) % Q


REDRAWN = 799522341729
"""The first coordinate of the zero key's stream whose word is no residue mod Q."""
REDRAWN_LEAST = (8579263752, 17897450346)
"""The first ones mod the least modulus that the kernel takes."""


@pytest.mark.parametrize(
    ("modulus", "coordinate"), [(Q, REDRAWN), *((LEAST, at) for at in REDRAWN_LEAST)]
)
@pytest.mark.parametrize("before", [0, 1, 64, 127, 200, 2048])
@pytest.mark.parametrize("after", [1, 3, 64, 400, 4000])
def test_a_word_that_is_no_residue_is_drawn_again(
    modulus: int, coordinate: int, before: int, after: int
) -> None:
    """A chance of 2^-36.6 that was looked for: in whole strides, and in what is left of one."""
    ring, key = PrimeRing(modulus), bytes(16)
    start, length = coordinate - before, before + after
    word = int.from_bytes(stream(key, 8 * coordinate, 8), "little") >> 10
    residue = drawn(ring, key, coordinate)
    assert residue < modulus <= word
    for add in (True, False):
        mask = [Mask(Secret(key), add)]
        expected = np.full(length, 5, "<u8")
        apply_masks(ring, expected, mask, AES_CTR, start=start, path=Path.OPENSSL, threads=1)
        assert int(expected[before]) == (5 + (residue if add else -residue)) % modulus
        for path in OURS:
            vector = np.full(length, 5, "<u8")
            apply_masks(ring, vector, mask, AES_CTR, start=start, path=path, threads=1)
            np.testing.assert_array_equal(vector, expected, str(path))


@ours
@pytest.mark.parametrize("excess", [1, 171, 2**20 - 1])
def test_moduli_that_the_kernel_takes(path: Path, excess: int) -> None:
    ring = PrimeRing(2**54 - excess)
    words, masks = some_words(ring, 200), some_masks(5)
    vector = words.copy()
    apply_masks(ring, vector, masks, AES_CTR, path=path, threads=1)
    assert vector.tolist() == twin(ring, words, masks, 0)


@ours
@pytest.mark.parametrize("modulus", [1, 2**53, 2**54 - 2**20, 2**54, 2**63, 2**64 - 1])
def test_moduli_that_the_kernel_does_not_take(path: Path, modulus: int) -> None:
    """Its comparison and its reduction are right just below 2^54."""
    vector = np.zeros(4, "<u8")
    keys = ReadyKeys([Secret(bytes(16))])
    with pytest.raises(ValueError, match="arguments of expand"):
        native.expand(path, vector, keys, b"\1", modulus=modulus, start=0)
    assert not vector.any()


@ours
@rings
def test_the_end_of_a_stream(path: Path, ring: Ring) -> None:
    """Byte 10 of a counter stays zero up to 2^44 bytes; beyond, the kernel would be wrong."""
    end, mask = STREAM // ring.word_bytes, [Mask(Secret(bytes(16)), True)]
    for length in (1, 7, STRIDE // ring.word_bytes + 3):
        vector = ring.zeros(length)
        apply_masks(ring, vector, mask, AES_CTR, start=end - length, path=path)
        assert vector.tolist() == twin(ring, ring.zeros(length), mask, end - length)
    for start, length in ((end, 1), (end - 1, 2), (end + 1, 0), (2**63 // ring.word_bytes, 1)):
        vector = ring.zeros(length)
        with pytest.raises(ValueError, match="arguments of expand"):
            apply_masks(ring, vector, mask, AES_CTR, start=start, path=path)
        assert not vector.any()
    apply_masks(ring, ring.zeros(0), mask, AES_CTR, start=end, path=path)


# AES itself. SP 800-38A's counters begin with other bytes than zeros, which no stream here does.


@needs_aes
@pytest.mark.parametrize("file", ["ECBVarKey128", "ECBKeySbox128"])
def test_aes_of_nist_s_vectors(file: str) -> None:
    """Those of the zero block: the first of a key's stream."""
    with cryptography_vectors.open_vector_file(f"ciphers/AES/ECB/{file}.rsp", "r") as lines:
        text = lines.read().split("[DECRYPT]")[0]
    found = re.findall(r"KEY = (\w+)\s+PLAINTEXT = 0{32}\s+CIPHERTEXT = (\w+)", text)
    assert len(found) >= 21
    for key, expected in found:
        ready = ReadyKeys([Secret(bytes.fromhex(key))])
        for path in OURS:
            out = bytearray(16)
            kernel.fill(native._INDEX[path], out, 0, ready)
            assert out.hex() == expected, path


@needs_aes
def test_the_key_schedule_of_fips_197() -> None:
    """Appendix A.1."""
    ready = ReadyKeys([Secret(bytes.fromhex("2b7e151628aed2a6abf7158809cf4f3c"))])
    rounds = [bytes(ready[16 * r : 16 * r + 16]).hex() for r in range(11)]
    assert {r: rounds[r] for r in (0, 1, 2, 9, 10)} == {
        0: "2b7e151628aed2a6abf7158809cf4f3c",
        1: "a0fafe1788542cb123a339392a6c7605",
        2: "f2c295f27a96b9435935807a7359f67f",
        9: "ac7766f319fadc2128d12941575c006e",
        10: "d014f9a8c9ee2589e13f0cc8b6630ca6",
    }


@ours
@settings(deadline=None, max_examples=40)
@given(
    key=st.binary(min_size=16, max_size=16),
    start=st.integers(0, 40) | st.integers(0, STREAM - 5000),
    size=st.integers(0, 5000),
)
def test_any_bytes_of_a_stream(path: Path, key: bytes, start: int, size: int) -> None:
    out = np.zeros(size, np.uint8)
    kernel.fill(native._INDEX[path], out, start, ReadyKeys([Secret(key)]))
    assert out.tobytes() == stream(key, start, size)


@needs_aes
def test_keys_made_ready() -> None:
    keys = [mask.key for mask in some_masks(3)]
    ready = ReadyKeys(keys)
    assert len(ready) == 3 * kernel.KEY_BYTES
    assert ready == b"".join(ReadyKeys([key]) for key in keys)
    assert ReadyKeys([]) == b""
    for sizes in ([5], [8, 9], [32, 1]):
        with pytest.raises(ValueError, match="arguments of ready"):
            ReadyKeys([Secret(bytes(size)) for size in sizes])


@needs_aes
def test_keys_are_zeroed_when_nobody_holds_them() -> None:
    """The memory that they lay in is looked at while another array still keeps it."""
    ready = ReadyKeys([mask.key for mask in some_masks(2)])
    assert any(ready)
    memory = np.frombuffer(ready, np.uint8)
    ready.__del__()
    assert len(memory) == 2 * kernel.KEY_BYTES
    assert not memory.any()


@needs_aes
def test_no_copy_of_the_keys_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """What they were gathered in is zeroed, too."""
    seen: list[bytearray] = []

    def make_ready(out: Any, keys: Any) -> None:
        assert bytes(keys) == bytes(range(16)) * 2
        seen.append(keys)
        kernel.make_ready(out, keys)

    monkeypatch.setattr(native, "kernel", Changed(make_ready=make_ready))
    ReadyKeys([Secret(bytes(range(16)))] * 2)
    assert seen == [bytearray(32)]


# What is no vector for the kernel: it looks at addresses and lengths itself.

READY = bytes(ReadyKeys([Secret(bytes(16))])) if OURS else b""


def expanding(**changes: Any) -> None:
    values: dict[str, Any] = {
        "path": 0,
        "out": np.zeros(4, "<u4"),
        "word_bytes": 4,
        "modulus": 0,
        "start": 0,
        "keys": READY,
        "signs": b"\1",
    }
    kernel.expand(*(values | changes).values())


def encoding(**changes: Any) -> None:
    values: dict[str, Any] = {
        "path": 0,
        "loops": 0,
        "out": np.zeros(4, "<u4"),
        "word_bytes": 4,
        "start": 0,
        "values": bytes(16),
        "kind": 1,
        "clip": math.inf,
        "factor": 1.0,
        "limit": 8.0,
        "rounding": READY,
        "keys": READY,
        "signs": b"\1",
    }
    kernel.encode(*(values | changes).values())


def converting(**changes: Any) -> None:
    values: dict[str, Any] = {
        "loops": 0,
        "out": np.zeros(4, "<u4"),
        "word_bytes": 4,
        "values": bytes(16),
        "kind": 1,
        "clip": math.inf,
        "factor": 1.0,
        "limit": 8.0,
        "rounding": bytes(16),
    }
    kernel.to_words(*(values | changes).values())


NO_MASKS: list[dict[str, Any]] = [
    {"path": -1},
    {"path": 3},
    {"word_bytes": 0},
    {"word_bytes": 3},
    {"word_bytes": 16},
    {"word_bytes": -4},
    {"out": np.zeros(5, np.uint8)},
    {"start": 2**42 - 3},
    {"start": 2**63},
    {"start": 2**64 - 1},
    {"keys": READY[:-1]},
    {"keys": READY * 2},
    {"keys": b""},
    {"signs": b""},
    {"signs": b"\1\1"},
]
NO_NUMBERS: list[dict[str, Any]] = [
    {"loops": -1},
    {"loops": kernel.LOOPS if kernel else 0},
    {"loops": 3},
    {"kind": -1},
    {"kind": 4},
    {"kind": 0},
    {"word_bytes": 3},
    {"word_bytes": 8},
    {"values": bytes(15)},
    {"values": b""},
    {"clip": -1.0},
    {"clip": math.nan},
    {"limit": -1.0},
    {"limit": 2.0**31},
    {"limit": math.inf},
    {"limit": math.nan},
    {"out": np.zeros(2, "<u8"), "values": bytes(8), "word_bytes": 8, "limit": 2.0**62},
]
CALLS = {
    expanding: [*NO_MASKS, {"modulus": Q}, {"modulus": 5, "word_bytes": 8}],
    encoding: [*NO_MASKS, *NO_NUMBERS, {"rounding": READY[1:]}, {"rounding": b""}],
    converting: [
        *NO_NUMBERS,
        {"rounding": bytes(15)},
        {"rounding": b""},
        {"word_bytes": 0},
    ],
}


@needs_aes
@pytest.mark.parametrize(
    ("call", "changes"), [(call, changes) for call, rows in CALLS.items() for changes in rows]
)
def test_what_the_kernel_refuses(call: Callable[..., None], changes: dict[str, Any]) -> None:
    call()
    with pytest.raises(ValueError, match="arguments of"):
        call(**changes)


@needs_aes
def test_more_that_the_kernel_refuses() -> None:
    for call in (
        lambda: kernel.fill(0, bytearray(4), STREAM - 3, READY),
        lambda: kernel.fill(0, bytearray(4), 0, READY[1:]),
        lambda: kernel.fill(3, bytearray(4), 0, READY),
        lambda: kernel.fill(-1, bytearray(4), 0, READY),
        lambda: kernel.greatest(0, bytes(5), 1),
        lambda: kernel.greatest(0, bytes(4), 4),
        lambda: kernel.greatest(0, bytes(4), -1),
        lambda: kernel.greatest(-1, bytes(4), 1),
        lambda: kernel.greatest(3, bytes(4), 1),
        lambda: kernel.make_ready(bytearray(len(READY) + 1), bytes(16)),
        lambda: kernel.make_ready(bytearray(len(READY)), bytes(17)),
        lambda: kernel.make_ready(bytearray(0), bytes(16)),
    ):
        with pytest.raises(ValueError, match="arguments of"):
            call()
    for path, loops in ((3, 0), (-1, 0), (0, -1), (0, kernel.LOOPS), (0, 3)):
        with pytest.raises(ValueError, match="no such path"):
            kernel.faults(path, loops, False)
    assert [kernel.supported(path) for path in (-1, 3, 2**31 - 1)] == [False] * 3


@needs_aes
@pytest.mark.parametrize("call", [expanding, encoding, converting])
@pytest.mark.parametrize(
    "out", [bytes(16), np.zeros(8, "<u4")[::2], np.frombuffer(bytes(16), "<u4"), 5, None]
)
def test_buffers_that_the_kernel_cannot_write(call: Callable[..., None], out: Any) -> None:
    with pytest.raises((TypeError, ValueError, BufferError)):
        call(out=out)


# Numbers to words.

FORMATS = {
    "float16": np.dtype(np.float16),
    "float32": np.dtype(np.float32),
    "float64": np.dtype(np.float64),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}
WORDS = ("<u2", "<u4", "<u8")


LOOPS = tuple(range(kernel.LOOPS)) if kernel else ()
"""Sets for AVX-512, AVX2 and anything, as far as they run here."""
SHIFTS = (0, 1, 2, 4)
"""Bytes by which memory is off: what is not aligned is read and written by way of a copy."""


def test_every_set_of_loops_is_tried() -> None:
    flags = PathOnDisk("/proc/cpuinfo").read_text().split()
    wide = {"avx2", "f16c"} <= {*flags}
    widest = wide and {"avx512f", "avx512bw", "avx512dq", "avx512vl"} <= {*flags}
    assert 1 + wide + widest == kernel.LOOPS


def exactly(
    values: np.ndarray, uniform: np.ndarray, clip: float, factor: float, limit: int
) -> list[int]:
    """⌊x + u⌋ in fractions, of the product as float64 has it in units of 2^-32."""
    out = []
    for value, u in zip(values.astype(np.float64).tolist(), uniform.tolist(), strict=True):
        product = max(-clip, min(clip, value)) * (factor * 2**32)
        rounded = math.floor((Fraction(product) + u) / 2**32)
        out.append(max(-limit, min(limit, rounded)))
    return out


def by_kernel(
    loops: int,
    values: np.ndarray,
    word: str,
    uniform: np.ndarray,
    to: tuple[float, float, int],
    shifts: tuple[int, int, int] = (0, 0, 0),
) -> tuple[Vector, int, int]:
    """A set of loops on memory that is off by so many bytes: the words, the values, the bits."""
    out = odd(np.full(len(values), 0xABAB, word), shifts[0])
    kind = KINDS.index(values.dtype.name)
    data, bits = odd(values, shifts[1]).view(np.uint8), odd(uniform, shifts[2])
    seen = kernel.to_words(loops, out, out.itemsize, data, kind, *to, bits)
    return out, *seen


def check_words(
    values: np.ndarray, word: str, uniform: np.ndarray, clip: float, factor: float, limit: int
) -> None:
    """Every way to the same words, to the bit, and the same report."""
    expected = np.array(exactly(values, uniform, clip, factor, limit), np.int64).astype(word)
    magnitudes = np.abs(values.astype(np.float64))
    report = (float(magnitudes.max(initial=0.0)), int(np.count_nonzero(magnitudes > clip)))
    out = np.zeros(len(values), word)
    assert native._to_words(values, out, uniform, clip, factor, limit) == report
    np.testing.assert_array_equal(out, expected)
    for given_values in (values, values.astype(values.dtype.newbyteorder(">")), odd(values)):
        out = odd(np.zeros(len(values), word))
        got = native.to_words(
            given_values, out, odd(uniform, 3), clip=clip, factor=factor, limit=limit
        )
        assert got == report
        np.testing.assert_array_equal(out, expected)
    kind = KINDS.index(values.dtype.name)
    for loops in LOOPS:
        for shifts in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (2, 4, 2), (4, 2, 3)):
            to = (clip, factor, limit)
            out, most, clipped = by_kernel(loops, values, word, uniform, to, shifts)
            assert (native._magnitude(most, kind), clipped) == report, (loops, shifts)
            np.testing.assert_array_equal(out, expected, f"{loops} {shifts}")


def special(dtype: np.dtype[Any], reach: float) -> np.ndarray:
    """Zeros, subnormals, borders, halves, and their neighbours."""
    info = ml_dtypes.finfo(dtype)
    least = float(info.smallest_subnormal)
    values = [0.0, -0.0, least, 3 * least, float(info.tiny), 2.0**-20, 2.0**-33, 1e-7]
    values += [reach, reach / 2, reach / 3, 1.5, 2.5, 0.5, 0.25, 1.0, 100.0, 8191.5]
    array = np.array([sign * x for x in values if x <= reach for sign in (1, -1)]).astype(dtype)
    one, top = array.dtype.type(1), array.dtype.type(reach)
    near = [np.nextafter(x, y) for x in (one, top) for y in (-x, x + x)]
    near = [x for x in near if abs(float(x)) <= reach]
    return np.concatenate([array, np.array(near, dtype), -np.array(near, dtype)])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("word", WORDS)
@pytest.mark.parametrize("clip", [math.inf, 1.0, 0.3, 0.0])
def test_numbers_to_words_exactly(kind: str, word: str, clip: float) -> None:
    """Over all edges, each with u = 0, u → 1 and others; factors that are no power of two, too."""
    limits = {"<u2": 2**13, "<u4": 2**29, "<u8": 2**61}
    limit, values = limits[word], special(FORMATS[kind], 8192.0)
    edges = np.array([0, 1, 2**31, 2**31 - 1, 2**32 - 2, 2**32 - 1], np.uint32)
    uniform = np.repeat(edges, len(values))
    values = np.tile(values, len(edges))
    for factor in (1.0, 0.75, limit / 8192, -1.0, limit / 8192 / 3, 2.0**-40, 0.0):
        check_words(values, word, uniform, clip, factor, limit)


@settings(deadline=None, max_examples=80)
@given(
    kind=st.sampled_from(KINDS),
    word=st.sampled_from(WORDS),
    length=st.sampled_from((0, 1, 7, 8, 9, 15, 16, 17, 511, 512, 513, 519, 520, 521, 1031)),
    clip=st.sampled_from((math.inf, 1.0, 2.0**-7)),
    seed=st.integers(0, 2**32),
)
def test_numbers_of_any_length(kind: str, word: str, length: int, clip: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    bits = {"<u2": 12, "<u4": 28, "<u8": 50}[word]
    values = rng.uniform(-2, 2, length) * 2.0 ** -rng.integers(0, 60, length)
    array = np.where(rng.random(length) < 0.2, np.round(values, 1), values).astype(FORMATS[kind])
    uniform = rng.integers(0, 2**32, length, dtype=np.uint32)
    uniform[rng.random(length) < 0.3] = 0
    check_words(array, word, uniform, clip, 2.0 ** (bits - 1) * rng.choice((1, 1 / 3)), 2**bits)


def test_a_tiny_negative_number_is_rounded_down_where_u_is_zero() -> None:
    """One less 2^-60 is one in a float64: found by comparing these loops."""
    values = np.array([-1e-20, -(2.0**-32) - 2.0**-55, -5e-324] * 8)
    for u in (0, 1, 2**32 - 1):
        uniform = np.full(24, u, np.uint32)
        for word in WORDS:
            check_words(values, word, uniform, math.inf, 1.0, 16)


@pytest.mark.parametrize("kind", KINDS)
def test_the_greatest_magnitude(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    dtype = FORMATS[kind]
    index = KINDS.index(kind)
    for length in (1, 7, 8, 9, 100, 513):
        for top in (0.5, -3.0, math.inf, -math.inf, math.nan, -math.nan, -0.0):
            for at in {0, length // 2, length - 1}:
                values = (np.arange(length) % 5 / 16).astype(dtype)
                values[at] = top
                expected = float(np.abs(values.astype(np.float64)).max())
                found = [
                    native.greatest(given_values)
                    for given_values in (
                        *(values, values.astype(dtype.newbyteorder(">")), odd(values)),
                        *(np.repeat(values, 2)[::2], values[::-1]),
                    )
                ]
                found += [
                    native._magnitude(
                        kernel.greatest(loops, odd(values, by).view(np.uint8), index), index
                    )
                    for loops in LOOPS
                    for by in SHIFTS
                ]
                with monkeypatch.context() as patch:
                    patch.setattr(native, "kernel", None)
                    found.append(native.greatest(values))
                for magnitude in found:
                    np.testing.assert_equal(magnitude, expected)
    assert native.greatest(np.zeros(0, dtype)) == 0.0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_none_are_told(
    kind: str, bad: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = np.ones(20, FORMATS[kind])
    values[13] = bad
    to: dict[str, Any] = {"clip": 2.0, "factor": 1.0, "limit": 8}
    for known in (native.kernel, None):
        monkeypatch.setattr(native, "kernel", known)
        for word in WORDS:
            most, _ = native.to_words(values, np.zeros(20, word), np.zeros(20, np.uint32), **to)
            np.testing.assert_equal(most, abs(bad))


def test_strided_numbers() -> None:
    values, uniform = np.linspace(-3, 3, 50).astype(np.float32), np.arange(25, dtype=np.uint32)
    for view in (values[::2], values[::-2]):
        out = np.zeros(25, "<u4")
        native.to_words(view, out, uniform, clip=2.0, factor=64.0, limit=256)
        assert out.view("<i4").tolist() == exactly(view, uniform, 2.0, 64.0, 256)


@ours
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("word", WORDS)
@pytest.mark.parametrize("loops", LOOPS)
def test_encoding_and_masking_in_one_go(
    path: Path, kind: str, word: str, loops: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same as rounding with the stream of the rounding key, then masking."""
    monkeypatch.setattr(native, "_loops", loops)
    ring = PowerRing(8 * np.dtype(word).itemsize)  # type: ignore[arg-type]
    limit = 2 ** (8 * ring.word_bytes - 4)
    own, masks = Secret(b"r" * 16), some_masks(3)
    rounding, keys = ReadyKeys([own]), ReadyKeys([mask.key for mask in masks])
    to: dict[str, Any] = {"clip": 1.0, "factor": limit / 3, "limit": limit}
    for start, length in ((0, 0), (0, 1), (5, 700), (2047, 2), (2048, 2049), (2**40 + 1, 5000)):
        values = np.sin(np.arange(length) * 1.7).astype(FORMATS[kind]) * FORMATS[kind].type(1.5)
        uniform = np.frombuffer(stream(own.reveal(), 4 * start, 4 * length), "<u4")
        expected = np.zeros(length, word)
        report = native._to_words(values, expected, uniform, *to.values())
        apply_masks(ring, expected, masks, AES_CTR, start=start, path=Path.OPENSSL)
        for shifts in ((0, 0), (1, 1), (0, 1), (1, 0)):
            got, given_values = odd(np.zeros(length, word), shifts[0]), odd(values, shifts[1])
            seen = native.encode(
                path, given_values, got, rounding, keys, signs_of(masks), start=start, **to
            )
            assert seen == report, shifts
            np.testing.assert_array_equal(got, expected, str(shifts))


# Paths and loops that do not work here.


@contextmanager
def found_again(**changes: Any) -> Iterator[pytest.MonkeyPatch]:
    """Paths and loops looked for once more, in a world that differs."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in changes.items():
            patch.setattr(native, name, value)
        patch.setattr(native, "_available", native._find())
        patch.setattr(native, "_loops", native._find_loops())
        yield patch


class Changed:
    """The kernel, but for some of what it has."""

    def __init__(self, **changes: Any) -> None:
        vars(self).update(changes)

    def __getattr__(self, name: str) -> Any:
        return getattr(kernel, name)


def imported_again() -> Any:
    """The module as it is imported in the world as it is now."""
    spec = importlib.util.spec_from_file_location("native_again", native.__file__)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_what_is_found_here() -> None:
    assert native._find() == PATHS
    assert native._find_loops() == native._loops == 0
    assert native.chosen() is PATHS[0]
    supported = {path for path, index in native._INDEX.items() if kernel.supported(index)}
    assert set(OURS) == supported
    if OURS:
        assert native.reason() == (
            f"The fastest of the paths that work on this processor ({', '.join(PATHS)})."
        )


def test_the_paths_are_those_that_the_system_reports() -> None:
    """The kernel asks CPUID itself; Linux does, too."""
    flags = {*PathOnDisk("/proc/cpuinfo").read_text().split()}
    wide = {"aes", "vaes", "avx2"} <= flags
    expected = {
        Path.AES_NI: {"aes", "ssse3", "sse4_1"} <= flags,
        Path.VAES_256: wide,
        Path.VAES_512: wide and {"avx512f", "avx512bw", "avx512dq", "avx512vl"} <= flags,
    }
    assert {path: kernel.supported(index) for path, index in native._INDEX.items()} == expected


def test_without_a_kernel() -> None:
    """Nothing was compiled: the same words, by way of OpenSSL and NumPy."""
    ring, masks = PowerRing(32), some_masks(3)
    values = np.linspace(-2, 2, 70, dtype=np.float32)
    uniform = np.arange(70, dtype=np.uint32) << np.uint32(25)
    to: dict[str, Any] = {"clip": 1.0, "factor": 7.3, "limit": 2**20}
    with_it, without = some_words(ring, 70), some_words(ring, 70)
    apply_masks(ring, with_it, masks, AES_CTR, start=9)
    words, other = np.zeros(70, "<u4"), np.zeros(70, "<u4")
    report = native.to_words(values, words, uniform, **to)
    with found_again(kernel=None, _missing="no such module"):
        assert native.available() == (Path.OPENSSL,)
        assert native.chosen() is Path.OPENSSL
        assert native.reason() == (
            "The kernel in C is not installed (no such module); with a compiler, reinstall secagg."
        )
        apply_masks(ring, without, masks, AES_CTR, start=9)
        assert native.to_words(values, other, uniform, **to) == report
        assert native.greatest(values) == 2.0
    np.testing.assert_array_equal(with_it, without)
    np.testing.assert_array_equal(words, other)


def check_without(without: Any, why: str) -> None:
    """A module that uses no kernel, says why, and gives the right words."""
    assert without.kernel is None
    assert without.available() == ("openssl",)
    assert f"is not installed ({why}" in without.reason()
    values, out = np.array([0.75, -0.25, -3.0], np.float16), np.zeros(3, "<u2")
    to: dict[str, Any] = {"clip": 1.0, "factor": 4.0, "limit": 8}
    assert without.to_words(values, out, np.zeros(3, np.uint32), **to) == (3.0, 1)
    assert out.view("<i2").tolist() == [3, -1, -4]


def test_an_installation_without_a_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """The module as it is imported where nothing was compiled."""
    monkeypatch.delattr(_native, "kernel")
    monkeypatch.setitem(sys.modules, f"{_native.__name__}.kernel", None)
    check_without(imported_again(), "import of secagg.ring._native.kernel halted")


def test_a_kernel_of_another_version(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that was built from other sources and left: its functions take other arguments."""
    monkeypatch.setattr(_native, "kernel", Changed(INTERFACE=kernel.INTERFACE + 1))
    check_without(imported_again(), "it is of another version")


def test_a_kernel_on_a_big_endian_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Words of a ring are little-endian, and those of the kernel the machine's."""
    monkeypatch.setattr(sys, "byteorder", "big")
    check_without(imported_again(), "it is of another version, or this machine is big-endian")


def test_a_processor_without_aes() -> None:
    with found_again(kernel=Changed(supported=lambda _: False)):
        assert native.available() == (Path.OPENSSL,)
        assert native.reason() == (
            "The kernel found no AES instructions that work on this processor."
        )
        assert native._loops == 0


@ours
def test_an_illegal_instruction_is_survived(path: Path) -> None:
    """What a hypervisor reports and does not run: the signal is caught, the path passed over."""
    before = signal.getsignal(signal.SIGILL)
    with pytest.warns(RuntimeWarning, match=f"{path}.*dies of an illegal instruction"):
        assert not native._works(path, on_purpose=True)
    assert signal.getsignal(signal.SIGILL) is before
    assert native._works(path)

    def faults(index: int, loops: int, on_purpose: bool) -> bool:
        plain = loops == kernel.LOOPS - 1  # a path is tried beside the loops that run anywhere
        return kernel.faults(index, loops, on_purpose or (plain and index == native._INDEX[path]))

    with (
        pytest.warns(RuntimeWarning, match=f"{path}.*dies of an illegal instruction"),
        found_again(kernel=Changed(faults=faults)),
    ):
        assert native.available() == tuple(other for other in PATHS if other is not path)


trials = pytest.mark.parametrize("bad", range(max(len(LOOPS) - 1, 0)))


@trials
def test_loops_that_die_are_passed_over(bad: int) -> None:
    with pytest.warns(RuntimeWarning, match=f"loops {bad}.*dies of an illegal instruction"):
        assert not native._counts(bad, on_purpose=True)
    assert native._counts(bad)

    def faults(index: int, loops: int, on_purpose: bool) -> bool:
        return kernel.faults(index, loops, on_purpose or loops <= bad)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with found_again(kernel=Changed(faults=faults)):
            assert native._loops == bad + 1
            assert native.available() == PATHS  # which are tried beside plain C
    assert [f"loops {loops}," in str(w.message) for loops, w in enumerate(caught)] == [True] * (
        bad + 1
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("word_bytes", [2, 4, 8])
@pytest.mark.parametrize("clips", [False, True])
@trials
def test_loops_of_wrong_words_are_passed_over(
    bad: int, kind: str, word_bytes: int, clips: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one format, to one kind of word, with or without clipping: one bit of the last word."""

    def to_words(loops: int, out: Vector, size: int, data: Any, *rest: Any) -> Any:
        seen = kernel.to_words(loops, out, size, data, *rest)
        asked = (KINDS[rest[0]], size, math.isfinite(rest[1]))
        if loops == bad and asked == (kind, word_bytes, clips):
            out[-1] ^= out.dtype.type(1)
        return seen

    monkeypatch.setattr(native, "kernel", Changed(to_words=to_words))
    with pytest.warns(RuntimeWarning, match=f"loops {bad}.*gives wrong words"):
        assert not native._counts(bad)


@pytest.mark.parametrize("kind", range(len(KINDS)))
@trials
def test_loops_of_wrong_magnitudes_are_passed_over(
    bad: int, kind: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def greatest(loops: int, data: Any, asked: int) -> int:
        return kernel.greatest(loops, data, asked) - (loops == bad and kind == asked)

    monkeypatch.setattr(native, "kernel", Changed(greatest=greatest))
    with pytest.warns(RuntimeWarning, match=f"loops {bad}.*gives wrong words"):
        assert not native._counts(bad)


@pytest.mark.parametrize(
    ("size", "modulus", "sign"),
    [(size, q, sign) for size, q in ((2, 0), (4, 0), (8, 0), (8, Q)) for sign in (b"\0", b"\1")],
)
@ours
def test_a_path_of_wrong_words_is_passed_over(
    path: Path, size: int, modulus: int, sign: bytes
) -> None:
    """In one of all that it does: one bit of the last word that is tried."""

    def expand(index: int, out: Vector, *rest: Any) -> None:
        kernel.expand(index, out, *rest)
        asked = (rest[0], bool(rest[1]), rest[-1])
        if index == native._INDEX[path] and asked == (size, bool(modulus), sign):
            out[-1] ^= out.dtype.type(2 ** (8 * size - 11))

    with (
        pytest.warns(RuntimeWarning, match=f"{path}.*gives wrong words"),
        found_again(kernel=Changed(expand=expand)),
    ):
        assert native.available() == tuple(other for other in PATHS if other is not path)


@ours
def test_a_path_that_fills_wrongly_is_passed_over(path: Path) -> None:
    """The bits that round come like this."""

    def fill(index: int, out: bytearray, *rest: Any) -> None:
        kernel.fill(index, out, *rest)
        if index == native._INDEX[path]:
            out[-1] ^= 128

    with (
        pytest.warns(RuntimeWarning, match=f"{path}.*gives wrong words"),
        found_again(kernel=Changed(fill=fill)),
    ):
        assert native.available() == tuple(other for other in PATHS if other is not path)


def test_no_path_is_right() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        with found_again(_agrees=lambda _: False):
            assert native.available() == (Path.OPENSSL,)
            vector = np.zeros(3, "<u4")
            apply_masks(PowerRing(32), vector, some_masks(1), AES_CTR)
    assert vector.tobytes() == stream(bytes(16), 0, 12)


@needs_aes
def test_an_import_where_warnings_are_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who runs with ``-W error`` gets a slower path, not an import that fails."""
    monkeypatch.setattr(_native, "kernel", Changed(faults=lambda *_: True))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        module = imported_again()
    assert module.available() == ("openssl",)
    assert module._loops == kernel.LOOPS - 1
