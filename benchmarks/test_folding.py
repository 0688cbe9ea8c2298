"""The coordinator's part: folding uploads into the running sum, and taking the masks off it.

Folding's floor is the addition in place. Unmasking's is OpenSSL's keystream of as many masks as the
dropouts leave: one for every survivor, and one for every pair of a survivor and a dropout.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cache

import numpy as np
import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.cases import sweep
from benchmarks.floors import addition, keystream
from benchmarks.measure import measure
from secagg.config import MaskPrg, SiloId, silo_id
from secagg.crypto import shamir
from secagg.crypto.digest import DIGEST_BYTES
from secagg.crypto.keys import KeyPair
from secagg.crypto.labels import SELF_SEED, digest
from secagg.crypto.secret import Secret
from secagg.masking.masks import pair_mask, self_mask
from secagg.masking.messages import AdvertiseKeys
from secagg.masking.unmask import orphan_masks, rebuild, survivor_mask
from secagg.masking.uploads import InMemory
from secagg.ring.expand import Mask, apply_masks
from secagg.ring.vectors import PowerRing, PrimeRing, Ring, RunningSum, Vector
from secagg.suite import Suite

AES = MaskPrg.AES_128_CTR
RINGS = {
    "16": PowerRing(16),
    "32": PowerRing(32),
    "64": PowerRing(64),
    "ckks": PrimeRing(Suite.CKKS_54.parameters.modulus),
}
UPLOADS = 16
CHUNK_BYTES = 2**20
TAU = bytes(32)


def uploads(ring: Ring, d: int) -> list[Vector]:
    generator = np.random.default_rng(d)
    top = ring.modulus if isinstance(ring, PrimeRing) else 2 ** (8 * ring.word_bytes)
    return [
        generator.integers(0, top - 1, d, np.uint64, endpoint=True).astype(ring.dtype)
        for _ in range(UPLOADS)
    ]


def exact(ring: Ring, vectors: list[Vector], count: int = 1000) -> list[int]:
    """The sum of the first coordinates in Python's integers."""
    top = ring.modulus if isinstance(ring, PrimeRing) else 2 ** (8 * ring.word_bytes)
    return [sum(int(v[i]) for v in vectors) % top for i in range(count)]


@pytest.mark.benchmark(group="fold")
@sweep("d", [10**6], [10**5, 10**7])
@sweep("w", list(RINGS))
def test_fold(benchmark: BenchmarkFixture, w: str, d: int) -> None:
    ring = RINGS[w]
    vectors = uploads(ring, d)

    def fold() -> Vector:
        total = RunningSum(ring, d)
        for vector in vectors:
            total.add(vector)
        return total.total

    total = measure(benchmark, fold, addition(ring, d, UPLOADS), elements=d * UPLOADS)
    assert total[:1000].tolist() == exact(ring, vectors)


@pytest.mark.benchmark(group="fold")
@sweep("w", list(RINGS))
def test_hash_and_fold(benchmark: BenchmarkFixture, w: str) -> None:
    """All that the coordinator does to an upload's words; folding checks them, too."""
    ring, d = RINGS[w], 10**6
    vectors = uploads(ring, d)

    def fold() -> Vector:
        total = RunningSum(ring, d)
        for vector in vectors:
            upload = InMemory(vector, CHUNK_BYTES)
            assert len(upload.digest()) == DIGEST_BYTES
            total.fold(upload)
        return total.total

    headline = "checking, hashing and adding an upload of 10⁶ words" if w == "32" else None
    total = measure(
        benchmark, fold, addition(ring, d, UPLOADS), elements=d * UPLOADS, headline=headline
    )
    assert total[:1000].tolist() == exact(ring, vectors)


@dataclass(frozen=True)
class Dealt:
    """A cohort that has shared its secrets: what the coordinator holds when it unmasks."""

    threshold: int
    keys: dict[SiloId, KeyPair]
    seeds: dict[SiloId, Secret]
    adverts: dict[SiloId, AdvertiseKeys]
    seed_shares: dict[SiloId, dict[SiloId, Secret]]
    key_shares: dict[SiloId, dict[SiloId, Secret]]


@cache
def dealt(n: int) -> Dealt:
    names = tuple(silo_id(f"silo-{i:03}") for i in range(n))
    t = 2 * n // 3 + 1
    keys = {name: KeyPair.generate(os.urandom) for name in names}
    seeds = {name: Secret(os.urandom(32)) for name in names}
    channel = {name: KeyPair.generate(os.urandom).public for name in names}

    def shares(secret: Secret) -> dict[SiloId, Secret]:
        split = shamir.split(secret, threshold=t, holders=n, entropy=os.urandom)
        return dict(zip(names, split, strict=True))

    return Dealt(
        t,
        keys,
        seeds,
        {
            name: AdvertiseKeys(
                name,
                channel[name],
                keys[name].public,
                digest(SELF_SEED, seeds[name].reveal()),
                bytes(64),
            )
            for name in names
        },
        {name: shares(seeds[name]) for name in names},
        {name: shares(keys[name].private) for name in names},
    )


def left_over(cohort: Dealt, survivors: list[SiloId]) -> list[Mask]:
    """The masks on the survivors' sum, from the survivors' side: own, and with every dropout."""
    dropouts = cohort.keys.keys() - set(survivors)
    return [self_mask(cohort.seeds[name], name, TAU, AES) for name in survivors] + [
        pair_mask(cohort.keys[name], name, gone, cohort.keys[gone].public, TAU, AES)
        for name in survivors
        for gone in sorted(dropouts)
    ]


@pytest.mark.benchmark(group="unmask")
@sweep("dropouts", [0, 10, 30])
@sweep("n", [16], [64])
def test_unmask(benchmark: BenchmarkFixture, n: int, dropouts: int) -> None:
    """Rebuild every secret from t shares, then take the masks off 10^6 words.

    ``dropouts`` is in per cent of the cohort, after they shared their keys.
    """
    ring, d = PowerRing(32), 10**6
    cohort = dealt(n)
    roster = tuple(cohort.keys)
    survivors = list(roster[: n - n * dropouts // 100])
    plain = np.arange(d, dtype=ring.dtype)
    masked = plain.copy()
    on = left_over(cohort, survivors)
    apply_masks(ring, masked, on, AES)
    total = masked.copy()

    def of(shares: dict[SiloId, Secret]) -> dict[SiloId, Secret]:
        return {holder: shares[holder] for holder in survivors}

    def unmask() -> None:
        off = []
        for owner in roster:
            advert = cohort.adverts[owner]
            if owner in survivors:
                secret = rebuild(owner, of(cohort.seed_shares[owner]), roster, cohort.threshold)
                off.append(survivor_mask(advert, secret, TAU, AES))
            else:
                secret = rebuild(owner, of(cohort.key_shares[owner]), roster, cohort.threshold)
                off += orphan_masks(advert, secret, cohort.adverts, tuple(survivors), TAU, AES)
        apply_masks(ring, total, off, AES)

    measure(
        benchmark,
        unmask,
        keystream(AES, d * ring.word_bytes, len(on)),
        elements=d * len(on),
        fresh=lambda: np.copyto(total, masked),
        headline=f"unmasking 10⁶ words, {n} silos, {dropouts} % dropouts" if n == 64 else None,
    )
    assert np.array_equal(total, plain)
