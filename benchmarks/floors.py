"""Floors: the least that any implementation of a piece of work has to do on this machine.

A floor allocates what it needs when it is made and nothing when it runs, so that it does not count
towards the memory of the work beside it.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.ciphers import Cipher, CipherContext, algorithms, modes

from secagg.config import MaskPrg
from secagg.crypto.prg import PADDING, key_bytes
from secagg.crypto.shamir import PRIME
from secagg.ring.vectors import Ring

PIECE = 256 * 1024


@dataclass(frozen=True, slots=True)
class Floor:
    """Work to compare with.

    Args:
        name: what it does, for the tables.
        run: does it once.
    """

    name: str
    run: Callable[[], object]


def keystream(prg: MaskPrg, size: int, streams: int = 1) -> Floor:
    """OpenSSL's keystream through ``cryptography``, in pieces that stay in the cache.

    Args:
        prg: AES-128-CTR or ChaCha20.
        size: bytes of one stream.
        streams: how many, each under a key of its own.
    """
    zeros, out = memoryview(bytes(PIECE)), bytearray(PIECE + PADDING)
    keys = [os.urandom(key_bytes(prg)) for _ in range(streams)]

    def run() -> None:
        for key in keys:
            stream = _open(prg, key)
            for at in range(0, size, PIECE):
                stream.update_into(zeros[: size - at], out)

    return Floor(f"OpenSSL {prg}", run)


def _open(prg: MaskPrg, key: bytes) -> CipherContext:
    if prg is MaskPrg.AES_128_CTR:
        return Cipher(algorithms.AES128(key), modes.CTR(bytes(16))).encryptor()
    return Cipher(algorithms.ChaCha20(key, bytes(16)), None).encryptor()


def addition(ring: Ring, length: int, times: int = 1) -> Floor:
    """NumPy's addition in place of as many vectors of the ring."""
    total, one = np.ones(length, ring.dtype), np.ones(length, ring.dtype)

    def run() -> None:
        for _ in range(times):
            np.add(total, one, out=total)

    return Floor("in-place add", run)


def copy(size: int, times: int = 1) -> Floor:
    """memcpy of so many bytes, between two places that were touched before."""
    source, target = np.ones(size, np.uint8), np.ones(size, np.uint8)

    def run() -> None:
        for _ in range(times):
            np.copyto(target, source)

    return Floor("memcpy", run)


def small_products(count: int) -> Floor:
    """Products of a field element of Shamir's shares and a small point, reduced."""

    def run() -> int:
        value = PRIME // 3
        for _ in range(count):
            value = value * 7 % PRIME
        return value

    return Floor("small products mod p", run)


def wide_products(count: int) -> Floor:
    """Products of two field elements, added up without reduction."""
    left, right = PRIME // 3, PRIME // 5

    def run() -> int:
        total = 0
        for _ in range(count):
            total += left * right
        return total

    return Floor("products of elements", run)


def verifications(count: int) -> Floor:
    """Checks of an Ed25519 signature by OpenSSL."""
    key, message = Ed25519PrivateKey.generate(), bytes(64)
    public, signature = key.public_key(), key.sign(message)

    def run() -> None:
        for _ in range(count):
            public.verify(signature, message)

    return Floor("Ed25519", run)


def together(*floors: Floor) -> Floor:
    """All of them, one after the other."""

    def run() -> None:
        for floor in floors:
            floor.run()

    return Floor(" + ".join(floor.name for floor in floors), run)
