"""Whole rounds in memory, n silos of d parameters: every silo's and the coordinator's work on one
core, a dropout among them.

The floor is what OpenSSL takes for the keystreams of all masks and for the signatures that silos
check of each other. Masks: n at each of the n − 1 silos that stay (one a neighbour, and its own),
and at the coordinator one for each of these and for each of their pairs with the dropout.
Signatures: every silo's on its keys, shares, vector and survivors, at every other silo.
"""

from __future__ import annotations

import numpy as np
import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.cases import label
from benchmarks.floors import keystream, together, verifications
from benchmarks.measure import measure
from secagg.config import MaskPrg
from secagg.simulation import Federation

DISTINCT = 4  # different updates: the silos share them, so that 64 of 10^7 fit the memory
HEADLINE = {
    (16, 10**6): "a round in memory, all roles: 16 silos × 10⁶, a dropout",
    (64, 10**7): "a round in memory, all roles: 64 silos × 10⁷, a dropout",
}


def play(benchmark: BenchmarkFixture, n: int, d: int) -> None:
    federation = Federation(silos=n)
    generator = np.random.default_rng(n)
    made = [generator.random(d, np.float32) for _ in range(DISTINCT)]
    updates = {silo: {"w": made[i % DISTINCT]} for i, silo in enumerate(federation.silos)}
    gone = federation.silos[1]
    result = measure(
        benchmark,
        lambda: federation.run_round(updates, drops={gone: "masked_input"}),
        together(
            keystream(MaskPrg.AES_128_CTR, 4 * d, n * (n - 1) + 2 * (n - 1)),
            verifications(4 * n * (n - 1)),
        ),
        elements=n * d,
        rounds=(1 if n * d > 10**8 else 2) if n == 64 else None,  # seconds each
        headline=HEADLINE.get((n, d)),
    )
    assert result.dropouts == [gone]
    plain = np.zeros(d)
    for silo in result.survivors:
        plain += updates[silo]["w"]
    plain /= n - 1
    assert np.abs(result.mean["w"] - plain).max() <= 1e-6


def case(n: int, d: int, *marks: pytest.MarkDecorator) -> object:
    return pytest.param(n, d, id=f"n={n}-d={label(d)}", marks=marks)


@pytest.mark.benchmark(group="round")
@pytest.mark.parametrize(
    ("n", "d"),
    [
        case(4, 10**5),
        case(16, 10**5),
        case(64, 10**5),
        case(4, 10**6),
        case(16, 10**6),
        case(64, 10**6, pytest.mark.full),
        case(4, 10**7, pytest.mark.full),
        case(16, 10**7, pytest.mark.full),
        case(64, 10**7, pytest.mark.full),
    ],
)
def test_round(benchmark: BenchmarkFixture, n: int, d: int) -> None:
    play(benchmark, n, d)
