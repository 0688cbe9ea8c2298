"""Shamir's sharing by the size of the cohort, beside the products alone in Python's integers.

Splitting for n holders with threshold t takes n · (t − 1) products with a point by Horner's rule;
combining takes t products of elements; the Lagrange basis, made once a round, 2 · t · (t − 1)
products with a point.
"""

from __future__ import annotations

import os

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.cases import sweep
from benchmarks.floors import small_products, wide_products
from benchmarks.measure import measure
from secagg.crypto.secret import Secret
from secagg.crypto.shamir import basis, split

SECRETS = 50
sizes = sweep("n", [4, 16, 64], [256])


def secrets() -> list[Secret]:
    return [Secret(os.urandom(32)) for _ in range(SECRETS)]


def threshold(n: int) -> int:
    return 2 * n // 3 + 1


@pytest.mark.benchmark(group="shamir")
@sizes
def test_split(benchmark: BenchmarkFixture, n: int) -> None:
    t, given = threshold(n), secrets()

    def work() -> list[list[Secret]]:
        return [split(one, threshold=t, holders=n, entropy=os.urandom) for one in given]

    shares = measure(benchmark, work, small_products(SECRETS * n * (t - 1)), elements=SECRETS)
    points = range(n - t + 1, n + 1)
    for secret, dealt in zip(given, shares, strict=True):
        assert basis(tuple(points)).combine({p: dealt[p - 1] for p in points}) == secret


@pytest.mark.benchmark(group="shamir")
@sizes
def test_combine(benchmark: BenchmarkFixture, n: int) -> None:
    t, given = threshold(n), secrets()
    dealt = [split(one, threshold=t, holders=n, entropy=os.urandom) for one in given]
    points = range(1, t + 1)
    held = [{p: shares[p - 1] for p in points} for shares in dealt]
    at_zero = basis(tuple(points))
    rebuilt = measure(
        benchmark,
        lambda: [at_zero.combine(shares) for shares in held],
        wide_products(SECRETS * t),
        elements=SECRETS,
    )
    assert rebuilt == given


@pytest.mark.benchmark(group="shamir")
@sizes
def test_basis(benchmark: BenchmarkFixture, n: int) -> None:
    t, secret = threshold(n), Secret(os.urandom(32))
    shares = split(secret, threshold=t, holders=n, entropy=os.urandom)
    points = tuple(range(1, t + 1))
    made = measure(
        benchmark,
        lambda: basis(points),
        small_products(2 * t * (t - 1)),
        elements=t,
        fresh=basis.cache_clear,
    )
    assert made.combine({p: shares[p - 1] for p in points}) == secret
