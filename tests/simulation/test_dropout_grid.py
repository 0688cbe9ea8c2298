"""Every pattern of drops ends in the survivors' exact integer sum, or in the abort that an oracle
names which knows nothing of the code: only t = ⌊2n/3⌋ + 1 and who was still there.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pytest

from secagg.config import RingBits
from secagg.crypto.secret import Entropy
from secagg.errors import RoundAborted
from secagg.simulation import Federation, RoundResult

pytestmark = pytest.mark.usefixtures("signatures_once")

Keyed = Callable[[int], Entropy]
PHASES = ("advertise_keys", "share_keys", "masked_input", "consistency", "unmasking")
STAYS = len(PHASES)
RINGS: tuple[RingBits, ...] = (16, 32, 64)
PRGS = ("aes-128-ctr", "chacha20")
LENGTH = 3


@dataclass(frozen=True)
class Aborted:
    """What the oracle says of a round that cannot end in a sum."""

    phase: str
    have: int
    need: int


def oracle(pattern: Sequence[int]) -> frozenset[int] | Aborted:
    """The positions of the survivors, or the abort.

    Args:
        pattern: by silo, the phase from which it is silent; 5 if it stays to the end.
    """
    need = 2 * len(pattern) // 3 + 1
    for phase, name in enumerate(PHASES):
        have = sum(silent_from > phase for silent_from in pattern)
        if have < need:
            return Aborted(name, have, need)
    return frozenset(i for i, silent_from in enumerate(pattern) if silent_from > 2)


def scale(bits: int, silos: int) -> int:
    """2^f, the greatest power of two of which ``silos`` fit into half the ring."""
    one = 1
    while silos * one * 2 <= 2 ** (bits - 1) - 1:
        one *= 2
    return one


class Grid:
    """One federation, played pattern after pattern: no round may leave a trace in the next."""

    def __init__(self, silos: int, seed: int, keyed: Keyed) -> None:
        self.bits, prg = RINGS[seed % 3], PRGS[seed % 2]
        self.federation = Federation(silos, ring_bits=self.bits, mask_prg=prg, entropy=keyed(seed))
        self.one = scale(self.bits, silos)
        self.random = random.Random(seed)
        self.sums = 0
        self.aborts = 0

    def words(self) -> list[int]:
        """What a silo holds, in units: the ring's values and their extremes."""
        top = min(self.one, 2**52)  # a float64 holds these exactly
        step = self.one // top
        extremes = (self.one, -self.one, 0, step)
        return [
            self.random.choice((*extremes, step * self.random.randint(-top, top)))
            for _ in range(LENGTH)
        ]

    def play(self, cohort: Sequence[str], pattern: Sequence[int]) -> None:
        held = {name: self.words() for name in cohort}
        updates = {
            name: {"b": np.array(words[1:]) / self.one, "a": np.array(words[0] / self.one)}
            for name, words in held.items()
        }
        drops = {n: PHASES[p] for n, p in zip(cohort, pattern, strict=True) if p != STAYS}
        expected = oracle(pattern)
        result = self.outcome(updates, drops)
        if isinstance(result, Aborted):
            assert result == expected, pattern
            self.aborts += 1
        else:
            assert not isinstance(expected, Aborted), pattern
            self.check_sum(result, [cohort[i] for i in sorted(expected)], held)
            self.sums += 1
        assert not any(self.federation.silo(name).refusals for name in cohort)

    def outcome(
        self, updates: dict[str, dict[str, np.ndarray]], drops: dict[str, str]
    ) -> RoundResult | Aborted:
        try:
            return self.federation.run_round(updates, drops=drops)
        except RoundAborted as abort:
            blames_nobody = (abort.blamed, abort.because) == ((), "")
            return Aborted(abort.phase, abort.have, abort.need if blames_nobody else -1)

    def check_sum(
        self, result: RoundResult, survivors: list[str], held: dict[str, list[int]]
    ) -> None:
        assert result.survivors == survivors
        assert result.dropouts == sorted(held.keys() - set(survivors))
        assert result.liars == []
        exact = [sum(held[name][i] for name in survivors) for i in range(LENGTH)]
        weight = [len(survivors) * self.one, 0, 0, 0]
        assert result.total.tolist() == [word % 2**self.bits for word in exact + weight]
        assert result.weight == len(survivors) * 1000.0
        means = [result.mean["a"].item(), *result.mean["b"].tolist()]
        wanted = [total / self.one / len(survivors) for total in exact]
        assert means == pytest.approx(wanted, rel=1e-12, abs=1e-15)


def chunk_of(n: int, chunk: int, chunks: int) -> Iterator[tuple[int, ...]]:
    return itertools.islice(itertools.product(range(STAYS + 1), repeat=n), chunk, None, chunks)


CHUNKS = {3: 1, 4: 5, 5: 25}


@pytest.mark.parametrize(
    ("n", "chunk"), [(n, chunk) for n, chunks in CHUNKS.items() for chunk in range(chunks)]
)
def test_every_pattern(n: int, chunk: int, keyed: Keyed) -> None:
    grid = Grid(n, seed=100 * n + chunk, keyed=keyed)
    for pattern in chunk_of(n, chunk, CHUNKS[n]):
        grid.play(grid.federation.silos, pattern)
    grid.play(grid.federation.silos, [STAYS] * n)
    assert grid.aborts
    assert grid.sums


def test_the_chunks_are_every_pattern() -> None:
    for n, chunks in CHUNKS.items():
        patterns = [p for chunk in range(chunks) for p in chunk_of(n, chunk, chunks)]
        assert len(patterns) == len(set(patterns)) == 6**n


def sample(source: random.Random) -> tuple[int, list[int]]:
    """A cohort's size, mostly small since time grows with its square, and a pattern."""
    n = source.choice(
        (*range(3, 10), *range(3, 10), *range(3, 10), *range(3, 13), source.randint(13, 32))
    )
    rate = source.choice((0.0, 0.05, 0.1, 0.2, 0.35))
    return n, [source.randrange(STAYS) if source.random() < rate else STAYS for _ in range(n)]


SAMPLED, SAMPLES = 20, 50


@pytest.mark.parametrize("chunk", range(SAMPLED))
def test_sampled_patterns(chunk: int, keyed: Keyed) -> None:
    """Cohorts of 3 to 32 out of a session of 32: the scale is the session's, t the cohort's."""
    grid, source = Grid(32, seed=chunk, keyed=keyed), random.Random(1000 + chunk)
    for _ in range(SAMPLES):
        n, pattern = sample(source)
        grid.play(sorted(source.sample(grid.federation.silos, n)), pattern)
    assert grid.aborts
    assert grid.sums


@pytest.mark.parametrize(("n", "bits"), [(31, 64), (32, 16)])
def test_the_greatest_cohorts_at_the_threshold(n: int, bits: int, keyed: Keyed) -> None:
    """As many drop as may, in every phase; one more and there is no sum."""
    grid = Grid(32, seed=RINGS.index(bits), keyed=keyed)
    assert grid.bits == bits
    cohort = grid.federation.silos[:n]
    may_drop = n - (2 * n // 3 + 1)
    pattern = [i % STAYS if i < may_drop else STAYS for i in range(n)]
    grid.play(cohort, pattern)
    assert (grid.sums, grid.aborts) == (1, 0)
    pattern[may_drop] = STAYS - 1
    grid.play(cohort, pattern)
    assert (grid.sums, grid.aborts) == (1, 1)


def test_the_oracle() -> None:
    """By hand: n = 4, so t = 3."""
    assert oracle((5, 5, 5, 5)) == {0, 1, 2, 3}
    assert oracle((5, 2, 5, 5)) == {0, 2, 3}
    assert oracle((5, 3, 5, 5)) == {0, 1, 2, 3}
    assert oracle((0, 0, 5, 5)) == Aborted("advertise_keys", 2, 3)
    assert oracle((0, 1, 2, 5)) == Aborted("share_keys", 2, 3)
    assert oracle((4, 4, 5, 5)) == Aborted("unmasking", 2, 3)
    assert oracle((5, 5, 3)) == Aborted("consistency", 2, 3)
