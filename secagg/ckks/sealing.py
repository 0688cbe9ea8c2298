"""Sealing vectors of reals, and opening sums of what was sealed.

A sealed vector is one residue mod q per coefficient, N for N − 1 values. Sealed vectors under one
key are added word by word mod q, by anybody; masks in the same ring can be put on and taken off.
Only who has the key, and the seeds of exactly the uploads that were added, can open the sum.

What is guaranteed: a sealed vector and its seed tell nothing to who has no key (RLWE, 128-bit
security, for at most one vector per seed). What is not: anything against who has the key, hence the
masks; that a sum is what was sealed: who adds to a sealed vector shifts what it opens to.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Final

import numpy as np

from secagg.ckks.kernel import Job, Kernel, Work
from secagg.ckks.slots import packed, released
from secagg.ckks.workers import CHUNK, SEED_BYTES, Crew
from secagg.crypto.secret import Secret
from secagg.encoding.layout import Reals
from secagg.errors import MalformedMessage
from secagg.ring.vectors import PrimeRing, Vector
from secagg.suite import Suite

WORTH: Final = 512
"""Ciphertexts (two million values) for which workers are started: 0.2 s of work for one core, which
is what a worker takes to start, once."""
_MOST: Final = 8
"""Workers at most, unless more are asked for: some 80 million values a second in 240 MB."""


class Sealer:
    """Seals and opens under one key, on as many cores as this process may use.

    Worker processes start with the first vector that is worth it and stay until ``close``. Each has
    30 MB of its own, and 60 MB with what it shares with others; beside them and the vectors there
    are a few MiB here per worker. Threads may share a sealer. A process that was forked may not use
    its parent's: it would send the same noise.

    Args:
        suite: the parameters.
        material: 32 uniform bytes, the same at every silo.
        workers: processes to use; None takes the processors that this process may use, up to 8.
            With one, everything is done in this process.

    Raises:
        ConfigError: TenSEAL is missing or cannot be used.
    """

    def __init__(self, suite: Suite, material: Secret, *, workers: int | None = None) -> None:
        self._suite = suite
        self._ring = PrimeRing(suite.parameters.modulus)
        self._kernel = Kernel(suite, material)
        self._crew = Crew(suite, material, workers or min(len(os.sched_getaffinity(0)), _MOST))

    def seal(self, values: Iterable[Reals], count: int, limit: int, seed: bytes) -> Vector:
        """Seal a vector.

        Args:
            values: float64 fractions in [−1, 1], in pieces of any length; rounded to multiples of
                2^-24 / B.
            count: how many there are in all, at least 1.
            limit: B, what a value of 1 becomes in a slot; see ``Parameters.slot_limit``.
            seed: 32 fresh uniform bytes, public from then on. Never one that was used before:
                the difference of two vectors under one seed is that of their messages.

        Returns:
            N words for each N − 1 values begun: residues mod q.

        Raises:
            ValueError: the values are more or fewer, one is beyond [−1, 1], or B is beyond a slot.
            OutOfOrder: ``forked``.
        """
        numbers = self._suite.parameters
        # CHECK: sealed-arguments
        if len(seed) != SEED_BYTES or count < 1 or limit > numbers.slot_limit(1):
            raise ValueError("a seed has 32 bytes, values are one or more, and slots hold them")
        sealed = np.empty((numbers.ciphertexts(count), numbers.degree), self._ring.dtype)
        for _ in self._do(self._sealing(values, count, limit, seed, sealed), len(sealed)):
            pass
        return sealed.reshape(-1)

    def open(
        self, words: Vector, seeds: Sequence[bytes], count: int, limit: int
    ) -> Iterator[Reals]:
        """Open a sum of sealed vectors.

        Args:
            words: the sum mod q.
            seeds: of exactly the vectors in it, 32 bytes each, in any order.
            count: how many values were sealed.
            limit: B, as they were sealed.

        Returns:
            The sums of the fractions in order, in pieces: multiples of 2^-24 / B. Where it raises,
            the pieces before are worth nothing: they are not to be used before the iterator has
            ended, as ``Layout.aggregate`` holds it.

        Raises:
            MalformedMessage: ``vector-length``, ``residue-range``, ``seed-size`` or
                ``seed-duplicate`` at once; ``reserved-slot`` and ``off-grid`` from the iterator:
                not this key, or not a sum of these seeds' vectors.
            OutOfOrder: ``forked``, from the iterator.
        """
        numbers = self._suite.parameters
        shape = (numbers.ciphertexts(count), numbers.degree)
        self._check(words, seeds, shape[0] * shape[1])  # CHECK: opened-sum
        jobs = self._opening(words.reshape(shape), tuple(seeds))
        return self._values(self._do(jobs, shape[0]), len(seeds), count, limit)

    def close(self) -> None:
        """End the workers, whatever they do. A closed sealer can still be used, on one core."""
        self._crew.close()

    def __repr__(self) -> str:
        return f"Sealer({self._suite!r})"

    def _check(self, words: Vector, seeds: Sequence[bytes], length: int) -> None:
        if words.shape != (length,) or words.dtype != self._ring.dtype:  # CHECK: opened-length
            raise MalformedMessage(
                "vector-length", f"A sum has {words.size} words of {words.dtype}, not {length}."
            )
        if not self._ring.holds(words):  # CHECK: opened-residues
            raise MalformedMessage("residue-range", "A word of the sum is no residue.")
        if not seeds or any(len(seed) != SEED_BYTES for seed in seeds):  # CHECK: opened-seeds
            raise MalformedMessage("seed-size", "There is no seed, or one has not 32 bytes.")
        if len(set(seeds)) != len(seeds):  # CHECK: opened-distinct-seeds
            raise MalformedMessage("seed-duplicate", "Two silos sealed under the same seed.")

    def _sealing(
        self, values: Iterable[Reals], count: int, limit: int, seed: bytes, sealed: Vector
    ) -> Iterator[Job]:
        at = 0
        for rows in packed(values, count, limit, self._suite.parameters.degree, CHUNK):
            yield Job(Work.SEAL, (seed,), at, rows, sealed[at : at + len(rows)])
            at += len(rows)

    def _opening(self, words: Vector, seeds: tuple[bytes, ...]) -> Iterator[Job]:
        for at in range(0, len(words), CHUNK):
            rows = words[at : at + CHUNK]
            yield Job(Work.OPEN, seeds, at, rows, np.empty(rows.shape))

    def _values(self, opened: Iterator[Job], silos: int, count: int, limit: int) -> Iterator[Reals]:
        for job in opened:
            values = released(job.out, silos, limit)[:count]
            count -= len(values)
            yield values

    def _do(self, jobs: Iterator[Job], ciphertexts: int) -> Iterator[Job]:
        if ciphertexts >= WORTH:
            return self._crew.each(jobs, self._inline)
        return map(self._inline, jobs)

    def _inline(self, job: Job) -> Job:
        self._kernel.do(job)
        return job
