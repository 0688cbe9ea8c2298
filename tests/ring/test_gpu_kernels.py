"""The GPU's ChaCha20 against RFC 8439 and PyCryptodome."""

from __future__ import annotations

import math
import os
from fractions import Fraction

import numpy as np
import pytest

torch = pytest.importorskip("torch")
triton = pytest.importorskip("triton")

from Crypto.Cipher import ChaCha20  # noqa: E402

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if not (INTERPRETED or torch.cuda.is_available()):
    pytest.skip("needs a GPU, or Triton's interpreter: make test-gpu", allow_module_level=True)

import triton.language as tl  # noqa: E402

from secagg.ring.gpu.kernels import _encode, block  # noqa: E402

DEVICE = "cpu" if INTERPRETED else "cuda"
KEY = bytes(range(32))
SUNSCREEN = (
    b"Ladies and Gentlemen of the class of '99: If I could offer you only one tip for the future, "
    b"sunscreen would be it."
)


@triton.jit
def write_blocks(out, key, counters, nonce, count: tl.constexpr):
    each = tl.arange(0, count)
    counter = tl.load(counters + each).to(tl.uint32)
    n0, n1, n2 = tl.load(nonce), tl.load(nonce + 1), tl.load(nonce + 2)
    x0, x1, x2, x3, x4, x5, x6, x7, x8, x9, x10, x11, x12, x13, x14, x15 = block(
        key, counter, n0.to(tl.uint32), n1.to(tl.uint32), n2.to(tl.uint32)
    )
    tl.store(out + 16 * each, x0.to(tl.int32))
    tl.store(out + 16 * each + 1, x1.to(tl.int32))
    tl.store(out + 16 * each + 2, x2.to(tl.int32))
    tl.store(out + 16 * each + 3, x3.to(tl.int32))
    tl.store(out + 16 * each + 4, x4.to(tl.int32))
    tl.store(out + 16 * each + 5, x5.to(tl.int32))
    tl.store(out + 16 * each + 6, x6.to(tl.int32))
    tl.store(out + 16 * each + 7, x7.to(tl.int32))
    tl.store(out + 16 * each + 8, x8.to(tl.int32))
    tl.store(out + 16 * each + 9, x9.to(tl.int32))
    tl.store(out + 16 * each + 10, x10.to(tl.int32))
    tl.store(out + 16 * each + 11, x11.to(tl.int32))
    tl.store(out + 16 * each + 12, x12.to(tl.int32))
    tl.store(out + 16 * each + 13, x13.to(tl.int32))
    tl.store(out + 16 * each + 14, x14.to(tl.int32))
    tl.store(out + 16 * each + 15, x15.to(tl.int32))


def words(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.int32).to(DEVICE)


def blocks(key: bytes, nonce: bytes, counters: list[int]) -> bytes:
    """Blocks of a keystream, a power of two of them."""
    out = torch.zeros(16 * len(counters), dtype=torch.int32, device=DEVICE)
    numbers = words(b"".join(counter.to_bytes(4, "little") for counter in counters))
    write_blocks[(1,)](out, words(key), numbers, words(nonce), count=len(counters))
    return out.cpu().numpy().tobytes()


def test_rfc_8439_section_2_3_2() -> None:
    block_1 = blocks(KEY, bytes.fromhex("000000090000004a00000000"), [1])
    assert block_1 == bytes.fromhex(
        "10f1e7e4d13b5915500fdd1fa32071c4c7d1f4c733c068030422aa9ac3d46c4e"
        "d2826446079faa0914c2d705d98b02a2b5129cd1de164eb9cbd083e8a2503c4e"
    )


def test_rfc_8439_section_2_4_2() -> None:
    stream = blocks(KEY, bytes.fromhex("000000000000004a00000000"), [1, 2])
    assert bytes(a ^ b for a, b in zip(SUNSCREEN, stream, strict=False)) == bytes.fromhex(
        "6e2e359a2568f98041ba0728dd0d6981e97e7aec1d4360c20a27afccfd9fae0b"
        "f91b65c5524733ab8f593dabcd62b3571639d624e65152ab8f530c359f0861d8"
        "07ca0dbf500d6a6156a38e088a22b65e52bc514d16ccf806818ce91ab7793736"
        "5af90bbf74a35be6b40b8eedf2785e42874d"
    )


def test_counters_near_and_far() -> None:
    counters = [0, 1, 2, 2**31 - 1, 2**31, 2**32 - 2, 2**32 - 1, 7]
    nonce = bytes(range(100, 112))
    cipher = ChaCha20.new(key=KEY, nonce=nonce)
    expected = b""
    for counter in counters:
        cipher.seek(64 * counter)
        expected += cipher.encrypt(bytes(64))
    assert blocks(KEY, nonce, counters) == expected


NO_UNIFORM = (3580843413, 7515567874)
"""The first words of the key's stream that are zero: a chance of 2^-32 each, looked for."""
SIZE = 64
"""Words of a tile."""


@triton.jit
def write_encoded(out, x, key, factor, limit, tile, size: tl.constexpr):
    each = tl.arange(0, size)
    words = _encode(tl.load(x + each), key, tl.load(factor), tl.load(limit), tile, size)
    tl.store(out + each, words)


@pytest.mark.parametrize("coordinate", NO_UNIFORM)
@pytest.mark.parametrize("factor", [1.0, 2.0**28 / 3])
def test_a_tiny_negative_number_is_rounded_down_where_u_is_zero(
    coordinate: int, factor: float
) -> None:
    """One less 2^-60 is one in a float64: the fraction is cut before anything is taken off it."""
    cipher = ChaCha20.new(key=KEY, nonce=bytes(12))
    cipher.seek(4 * (coordinate // SIZE * SIZE))
    uniform = np.frombuffer(cipher.encrypt(bytes(4 * SIZE)), "<u4")
    assert uniform[coordinate % SIZE] == 0
    for tiny in (-1e-20, -(2.0**-60), -5e-324, -0.0, 2.0**-60, -1.0 - 2.0**-50, -(2.0**-33)):
        out = torch.zeros(SIZE, dtype=torch.int64, device=DEVICE)
        x, *numbers = (
            torch.full((size,), value, dtype=torch.float64, device=DEVICE)
            for size, value in ((SIZE, tiny), (1, factor), (1, 2.0**30))
        )
        write_encoded[(1,)](
            out, x, words(KEY), *numbers, coordinate // SIZE, size=SIZE, enable_fp_fusion=False
        )
        fine = math.floor(Fraction(tiny * (factor * 2.0**32)))
        exact = [(fine + int(u)) >> 32 for u in uniform]
        assert out.tolist() == exact
        assert exact[coordinate % SIZE] == fine >> 32
