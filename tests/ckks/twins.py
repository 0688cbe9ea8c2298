"""Slow or independent twins of what the package does fast, shared by its tests."""

from __future__ import annotations

import struct

import numpy as np
from Crypto.Cipher import AES

from secagg.crypto.kdf import derive
from secagg.crypto.secret import Secret
from secagg.ring.vectors import Vector
from secagg.suite import Suite

Q, N = Suite.CKKS_54.parameters.modulus, Suite.CKKS_54.parameters.degree


def slots_of(polynomial: np.ndarray) -> np.ndarray:
    """Evaluate a polynomial at the N/2 roots of SEAL's slots.

    With ζ = exp(iπ/N), slot j is the value at ζ^(3^j mod 2N). The values at all odd powers
    ζ^(2k+1) are one inverse FFT of the coefficients times ζ^i.
    """
    degree = len(polynomial)
    twisted = polynomial * np.exp(1j * np.pi * np.arange(degree) / degree)
    at_odd_powers = np.fft.ifft(twisted) * degree
    powers = [pow(3, j, 2 * degree) for j in range(degree // 2)]
    slots: np.ndarray = at_odd_powers[(np.array(powers) - 1) // 2]
    return slots


def keystream(key: bytes, size: int) -> bytes:
    """AES-128-CTR by PyCryptodome."""
    return AES.new(key, AES.MODE_CTR, nonce=b"", initial_value=0).encrypt(bytes(size))


def c1_of(seed: bytes, rows: int) -> Vector:
    """The residues of a seed: the upper 54 bits of PyCryptodome's keystream, read as words."""
    key = derive(Secret(seed), salt=b"", label="ckks-c1", parties=("ckks-54",), size=16).reveal()
    stream = keystream(key, 8 * rows * N)
    found = np.array([word >> 10 for (word,) in struct.iter_unpack("<Q", stream)], "<u8")
    assert int(found.max()) < Q  # a chance of 2^-37 a word, and these seeds are fixed
    return found.reshape(rows, N)
