"""Mask expansion beside its floor: OpenSSL's keystream alone, in the same run.

Read the ratio of a group's rows, not the times: machines are shared and drift. The floor of k masks
is k keystreams and nothing else; ours adds each to the vector as well.
"""

from __future__ import annotations

import os

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from pytest_benchmark.fixture import BenchmarkFixture

from secagg.config import MaskPrg
from secagg.crypto.prg import key_bytes
from secagg.crypto.secret import Secret
from secagg.ring.expand import TILE_BYTES, Mask, apply_masks
from secagg.ring.vectors import PowerRing

LENGTH = 2**22
MASKS = 8


@pytest.mark.benchmark(group="masks")
def test_floor_openssl_keystream(benchmark: BenchmarkFixture) -> None:
    zeros, out = bytes(TILE_BYTES), bytearray(TILE_BYTES + 16)

    def keystreams() -> None:
        for _ in range(MASKS):
            stream = Cipher(algorithms.AES128(os.urandom(16)), modes.CTR(bytes(16))).encryptor()
            for _ in range(LENGTH * 4 // TILE_BYTES):
                stream.update_into(zeros, out)

    benchmark(keystreams)


@pytest.mark.benchmark(group="masks")
@pytest.mark.parametrize("prg", list(MaskPrg))
@pytest.mark.parametrize("bits", [16, 32, 64])
def test_apply_masks(benchmark: BenchmarkFixture, prg: MaskPrg, bits: int) -> None:
    ring = PowerRing(bits)  # type: ignore[arg-type]
    length = LENGTH * 32 // bits  # as many bytes of keystream for every word size
    masks = [Mask(Secret(os.urandom(key_bytes(prg))), add=i % 2 == 0) for i in range(MASKS)]
    vector = ring.zeros(length)
    benchmark(apply_masks, ring, vector, masks, prg, threads=1)
    vector[:] = 0
    apply_masks(ring, vector, masks, prg, threads=1)
    apply_masks(ring, vector, [mask.inverse() for mask in masks], prg, threads=1)
    assert not np.any(vector)  # a fast wrong mask fails
