"""Mask expansion by word, number of masks, size and path, beside the keystream alone.

The floor of k masks on d words is OpenSSL's keystream of k · d words and nothing else; ours adds
each to the vector as well. Every result is checked against a keystream taken from OpenSSL by hand
at both ends of the vector, and taken off again by the path that needs no kernel.
"""

from __future__ import annotations

import os
from collections import defaultdict

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.cases import sweep
from benchmarks.floors import Floor, keystream
from benchmarks.measure import measure
from secagg.config import MaskPrg
from secagg.crypto.prg import key_bytes
from secagg.crypto.secret import Secret
from secagg.ring.expand import Mask, apply_masks
from secagg.ring.native import Path, available, chosen
from secagg.ring.vectors import PowerRing, PrimeRing, Ring, Vector
from secagg.suite import Suite

AES = MaskPrg.AES_128_CTR
PRIME = PrimeRing(Suite.CKKS_54.parameters.modulus)
by_path = pytest.mark.parametrize("path", available(), ids=str)


def masks_of(k: int, prg: MaskPrg = AES) -> list[Mask]:
    return [Mask(Secret(os.urandom(key_bytes(prg))), add=i % 2 == 0) for i in range(k)]


def by_hand(ring: PowerRing, masks: list[Mask], start: int, count: int) -> Vector:
    """Σ ± keystream at coordinates start …, a multiple of 8."""
    total = ring.zeros(count)
    counter = (start * ring.word_bytes // 16).to_bytes(16, "big")
    for mask in masks:
        stream = Cipher(algorithms.AES128(mask.key.reveal()), modes.CTR(counter)).encryptor()
        words = np.frombuffer(stream.update(bytes(count * ring.word_bytes)), ring.dtype)
        (ring.add if mask.add else ring.subtract)(total, words)
    return total


def check(ring: Ring, vector: Vector, masks: list[Mask], prg: MaskPrg) -> None:
    """The masks, once, are what the vector holds: a fast wrong mask fails."""
    if prg is AES and isinstance(ring, PowerRing):
        for start in (0, len(vector) // 2 // 8 * 8, (len(vector) - 1000) // 8 * 8):
            end = min(start + 1000, len(vector))
            assert np.array_equal(vector[start:end], by_hand(ring, masks, start, end - start))
    inverses = [mask.inverse() for mask in masks]
    apply_masks(ring, vector, inverses, prg, threads=1, path=Path.OPENSSL)
    assert not np.any(vector)


def expand(
    benchmark: BenchmarkFixture,
    ring: Ring,
    d: int,
    k: int,
    *,
    prg: MaskPrg = AES,
    path: Path | None = None,
    threads: int = 1,
    floor: Floor | None = None,
    rounds: int | None = None,
    headline: str | None = None,
) -> None:
    """Measure k masks onto d zeros; elements are masks · words."""
    masks, vector = masks_of(k, prg), ring.zeros(d)
    vector.fill(1)  # else its pages would count as the work's
    measure(
        benchmark,
        lambda: apply_masks(ring, vector, masks, prg, threads=threads, path=path),
        floor or keystream(prg, d * ring.word_bytes, k),
        elements=k * d,
        rounds=rounds,
        fresh=lambda: vector.fill(0),
        headline=headline,
    )
    check(ring, vector, masks, prg)


@pytest.mark.benchmark(group="masks")
@by_path
def test_sixteen_on_ten_million(benchmark: BenchmarkFixture, path: Path) -> None:
    """The figure that other figures of masks are read from."""
    headline = f"16 masks onto 10⁷ words of 32 bits, one core, {path}"
    expand(benchmark, PowerRing(32), 10**7, 16, path=path, headline=headline)


@pytest.mark.benchmark(group="masks")
@by_path
@sweep("k", [1, 16], [4, 64])
@sweep("w", [16, 32, 64])
def test_by_word(benchmark: BenchmarkFixture, w: int, k: int, path: Path) -> None:
    expand(benchmark, PowerRing(w), 10**6, k, path=path)  # type: ignore[arg-type]


@pytest.mark.benchmark(group="masks")
def test_residues_of_ckks(benchmark: BenchmarkFixture) -> None:
    expand(benchmark, PRIME, 10**6, 16)


@pytest.mark.benchmark(group="masks")
def test_chacha20(benchmark: BenchmarkFixture) -> None:
    expand(benchmark, PowerRing(32), 10**6, 16, prg=MaskPrg.CHACHA20)


@pytest.mark.benchmark(group="masks-threads")
def test_all_cores(benchmark: BenchmarkFixture, all_cores: int) -> None:
    """The floor is the same work on one thread."""
    ring, masks, other = PowerRing(32), masks_of(16), np.ones(10**7, np.uint32)
    alone = Floor("one thread", lambda: apply_masks(ring, other, masks, AES, threads=1))
    headline = f"16 masks onto 10⁷ words of 32 bits, {all_cores} threads, {chosen()}"
    expand(benchmark, ring, 10**7, 16, threads=all_cores, floor=alone, headline=headline)


_COST: dict[int, list[float]] = defaultdict(list)


@pytest.mark.benchmark(group="masks-linear")
@sweep("d", [10**5, 10**6, 10**7], [10**8])
@sweep("k", [1, 4, 16, 64])
def test_linear(benchmark: BenchmarkFixture, k: int, d: int) -> None:
    """Cost per word and mask is one number whatever d; its spread over the sizes is recorded."""
    expand(benchmark, PowerRing(32), d, k, rounds=None if d * k < 10**9 else 2)
    most = spread(benchmark, _COST[k])
    if (k, d) == (16, 10**8):
        words = f"16 masks onto 10⁸ words; a word costs the same within {most:.2f}× from 10⁵ on"
        benchmark.extra_info["headline"] = words


def spread(benchmark: BenchmarkFixture, costs: list[float]) -> float:
    """Record how far the cost per element has moved over the cases so far: most over least."""
    costs.append(benchmark.extra_info["ns_per_element"])
    most = max(costs) / min(costs)
    benchmark.extra_info["spread"] = most
    return most
