"""The arithmetic of sealing and opening, on rows of residues.

A row's slots become a polynomial of integers m (``slots``), fresh noise e is added, and SEAL
transforms the sum (``engine``). The half that is uploaded is c0 = m + e − c1·s, where c1 is the
expansion of a public seed: uniform mod q by ``apply_masks``, as masks are. (c0, c1) is a symmetric
RLWE encryption of m under s, distributed as SEAL's own, and c1 costs 32 bytes. In the NTT domain
the product is taken word by word.

c1's keystream is AES-128 in counter mode under a key that everybody knows, so that AES is a
pseudorandom function says nothing of it. The argument is the one that FrodoKEM makes for its public
matrix A: with AES as an ideal cipher, the blocks under a fresh key are uniform but that none
repeats, and who knows the key learns no more than c1 itself, which is public in any case. The noise
and s come from keys that nobody else knows: there AES need only be pseudorandom.

Opening adds Σ c1, from the survivors' seeds, times s to Σ c0. Nobody supplies a c1: an opened c0
with a crafted c1 would be the key.

Source: Lyubashevsky, Peikert and Regev, EUROCRYPT 2010 (ePrint 2012/230); Cheon et al. 2017,
section 3.4; Alkim et al., FrodoKEM, specification (2020), "Deterministic generation of A".
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from threading import Lock
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from secagg.ckks.engine import Engine
from secagg.ckks.slots import Embedding
from secagg.config import MaskPrg
from secagg.crypto.kdf import derive
from secagg.crypto.labels import CKKS_C1, CKKS_SECRET
from secagg.crypto.prg import key_bytes, read
from secagg.crypto.secret import Entropy, Secret
from secagg.encoding.layout import Reals
from secagg.ring.expand import Mask, apply_masks
from secagg.ring.vectors import PrimeRing, Vector
from secagg.suite import Suite

PRG: Final = MaskPrg.AES_128_CTR
_TOGETHER: Final = 4
"""Rows that are multiplied together: they stay in the cache."""
_COINS: Final = 21
_HALF: Final = np.uint64(2**_COINS - 1)


class Work(IntEnum):
    """What is to be done to rows."""

    SEAL = 0
    OPEN = 1


@dataclass(frozen=True, slots=True)
class Job:
    """Rows to seal or to open.

    Args:
        work: which.
        seeds: one to seal, one per upload in the sum to open.
        first: index of the first row's ciphertext in its vector.
        rows: shape (rows, N): float64 slots to seal (``slots.packed``), uint64 residues to open.
        out: for the result, contiguous, of the same shape: uint64 residues if sealed, float64 slots
            if opened, noise included: to be rounded before they leave (``slots.released``).
    """

    work: Work
    seeds: tuple[bytes, ...]
    first: int
    rows: npt.NDArray[Any]
    out: npt.NDArray[Any]


class Kernel:
    """Seals and opens rows under one key, for one thread at a time: others wait.

    Args:
        suite: the parameters.
        material: 32 bytes that the key is derived from.
    """

    def __init__(self, suite: Suite, material: Secret) -> None:
        self._suite = suite
        self._ring = PrimeRing(suite.parameters.modulus)
        self._engine = Engine(suite)
        self._embedding = Embedding(suite.parameters.degree, suite.parameters.scale)
        secret = self._engine.encoded_secret(ternary(suite, material))
        self._product = _Product(self._ring, secret)
        self._lock = Lock()

    def do(self, job: Job) -> None:
        """Do a job; its ``out`` is written.

        Raises:
            OutOfOrder: ``forked``.
        """
        self._engine.home.check()  # CHECK: forked-kernel
        with self._lock:
            self._do(job)

    def _do(self, job: Job) -> None:
        c1 = self._c1(job.seeds, job.first, job.rows.shape)
        if job.work is Work.SEAL:
            self._encode(job.rows, job.out)
            self._product.subtract_from(job.out, c1)
        else:
            total = job.rows.copy()
            self._product.add_to(total, c1)
            for residues, row in zip(total, job.out, strict=True):
                self._engine.decode(residues, row)

    def _encode(self, rows: Reals, out: Vector) -> None:
        """Write m + e in the NTT domain, two rows at a time; an odd one goes with itself."""
        for at in range(0, len(rows), 2):
            coefficients = self._embedding.coefficients(rows[at : at + 2])
            coefficients += centred_binomial(coefficients.size, os.urandom).reshape(
                coefficients.shape
            )
            coefficients += (coefficients >> 63) & self._ring.modulus
            pair = np.resize(coefficients.view(np.uint64), (2, rows.shape[1]))
            out[at : at + 2] = self._engine.transform(pair)[: len(coefficients)]

    def _c1(self, seeds: Sequence[bytes], first: int, shape: tuple[int, ...]) -> Vector:
        masks = [Mask(_c1_key(self._suite, seed), add=True) for seed in seeds]
        flat = self._ring.zeros(shape[0] * shape[1])
        apply_masks(self._ring, flat, masks, PRG, start=first * shape[1], threads=1)
        return flat.reshape(shape)


def ternary(suite: Suite, material: Secret) -> npt.NDArray[np.int8]:
    """Derive s: N coefficients, each of −1, 0 and 1 exactly as likely as the others.

    Bytes of a keystream mod 3, without the byte 255: 255 = 3 · 85. Of 2N bytes fewer than N are
    left with a chance far below 2^-10000.
    """
    degree = suite.parameters.degree
    key = derive(material, salt=b"", label=CKKS_SECRET, parties=(suite,), size=16)
    stream = np.frombuffer(read(PRG, key, 2 * degree), np.uint8)
    trits: npt.NDArray[np.int8] = (stream[stream != 255][:degree] % 3).astype(np.int8)
    return np.subtract(trits, 1, dtype=np.int8)


def centred_binomial(count: int, entropy: Entropy) -> npt.NDArray[np.int8]:
    """Draw fresh error coefficients, distributed as SEAL's.

    Each is the difference of the weights of 21 and another 21 uniform bits: variance 10.5, standard
    deviation 3.24, at least the 3.19 of the homomorphic encryption standard. It is exact and has no
    secret-dependent branch or table, unlike a rounded Gaussian.

    Args:
        count: how many.
        entropy: source of the key of one keystream, of which each takes a word.

    Returns:
        ``count`` integers in [−21, 21].

    Source: Alkim, Ducas, Pöppelmann and Schwabe, USENIX Security 2016 (ePrint 2015/1092), section
        4.1 (why a binomial does); Albrecht et al. (ePrint 2019/939), section 2.1.5.
    """
    stream = read(PRG, Secret(entropy(key_bytes(PRG))), 8 * count)
    words = np.frombuffer(stream, "<u8")
    ups = np.bitwise_count(words & _HALF).view(np.int8)
    downs = np.bitwise_count((words >> np.uint64(_COINS)) & _HALF).view(np.int8)
    difference: npt.NDArray[np.int8] = ups - downs
    return difference


def _c1_key(suite: Suite, seed: bytes) -> Secret:
    return derive(Secret(seed), salt=b"", label=CKKS_C1, parties=(suite,), size=16)


class _Product:
    """Adds and subtracts c·s mod q, exactly, without words of 128 bits.

    c·s − k·q is small where k is near c·s/q, so its low 64 bits are all of it, and words of 64 bits
    wrap to them. k comes from float64: rint(c · (s/q)). Five roundings make the estimate (c, s and
    q to float64, the division, the product), each a factor within 1 ± 2^-53, so it is within
    6 · 2^-53 of c·s/q, relatively; that is below q < 2^54, so it is off by less than 12, and k by
    less than 12.5. So c·s − k·q is within ±12.5q, and with 13q and one more residue it is positive
    and below 27q < 2^59, which ``PrimeRing.reduce`` takes to a residue.

    Args:
        ring: Z_q.
        secret: s, shape (N,), residues.
    """

    def __init__(self, ring: PrimeRing, secret: Vector) -> None:
        self._ring = ring
        self._secret = secret
        self._ratio = secret.astype(np.float64) / float(ring.modulus)

    def add_to(self, total: Vector, factor: Vector) -> None:
        """total += factor · s mod q; both of shape (rows, N), residues, total contiguous."""
        self._apply(total, factor, np.add, np.subtract)

    def subtract_from(self, total: Vector, factor: Vector) -> None:
        """total −= factor · s mod q; both of shape (rows, N), residues, total contiguous."""
        self._apply(total, factor, np.subtract, np.add)

    def _apply(self, total: Vector, factor: Vector, plus: np.ufunc, minus: np.ufunc) -> None:
        modulus, lift = np.uint64(self._ring.modulus), np.uint64(13 * self._ring.modulus)
        for at in range(0, len(total), _TOGETHER):
            part, c = total[at : at + _TOGETHER], factor[at : at + _TOGETHER]
            estimate = c * self._ratio
            np.rint(estimate, out=estimate)
            words = estimate.astype(np.uint64)
            np.multiply(words, modulus, out=words)
            minus(part, words, out=part)
            np.multiply(c, self._secret, out=words)
            plus(part, words, out=part)
            np.add(part, lift, out=part)
            self._ring.reduce(part.reshape(-1))
