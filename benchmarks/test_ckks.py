"""Sealing beside TenSEAL as NVFlare 2.9 uses it, in the same run, on one core, round for round.

The other side: one ``CKKSVector`` per layer, N = 8192 with moduli of [60, 40, 40] bits, scale 2^40,
a symmetric context, serialised with ``serialize``; the server loads and adds them. Read the ratios,
not the times: machines are shared and drift. Every result is checked.

The floors are what the words alone cost: the keystream of c1 to seal, its keystreams of all silos
to open, the addition in place to fold.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.floors import addition, copy, keystream
from benchmarks.measure import measure, record, seconds_of
from benchmarks.memory import resident
from secagg.ckks.codec import SealedCodec
from secagg.ckks.sealing import Sealer
from secagg.config import Clip, MaskPrg, TaskConfig, Weighting
from secagg.crypto.digest import DIGEST_BYTES
from secagg.crypto.secret import Secret
from secagg.encoding.schema import Schema
from secagg.masking.uploads import InMemory
from secagg.ring.vectors import RunningSum, Vector
from secagg.suite import Suite

tenseal = pytest.importorskip("tenseal", reason="the extra ckks is not installed")

ROOT = Path(__file__).parent.parent
SIZE = 10**6
SILOS = 8
HUGE = 10**8
CHUNK_BYTES = 2**20
SUITE = Suite.CKKS_54
KEY = Secret(bytes(range(32)))
TASK = TaskConfig(
    name="model", weighting=Weighting.MEAN, rounds=1, bound=8.0, clip=Clip.NONE, weight_cap=1.0
)
PEAK = 2 * 2**30
PEER = "TenSEAL as NVFlare 2.9 uses it"


def update(silo: int, size: int = SIZE) -> np.ndarray:
    return np.random.default_rng(silo).standard_normal(size, np.float32).clip(-8, 8)


def codec_of(tensors: dict[str, np.ndarray], silos: int = SILOS) -> SealedCodec:
    return SealedCodec(TASK, Schema.of(tensors), silos, SUITE)


@cache
def sealer() -> Sealer:
    return Sealer(SUITE, KEY, workers=1)


def sealed(tensors: dict[str, np.ndarray], seed: bytes = bytes(32)) -> Vector:
    return codec_of(tensors).encode(tensors, weight=1, metrics={}, sealer=sealer(), seed=seed)


@cache
def context() -> Any:
    made = tenseal.context(
        tenseal.SCHEME_TYPE.CKKS,
        8192,
        coeff_mod_bit_sizes=[60, 40, 40],
        encryption_type=tenseal.ENCRYPTION_TYPE.SYMMETRIC,
        n_threads=1,
    )
    made.global_scale = 2**40
    return made


def theirs(values: np.ndarray) -> bytes:
    data: bytes = tenseal.ckks_vector(context(), values).serialize()
    return data


def beside(benchmark: BenchmarkFixture, other: Callable[[], object], per: int = SIZE) -> None:
    """Record the other side's least time of a few runs, after a first."""
    other()
    their = min(seconds_of(other) for _ in range(2))
    benchmark.extra_info |= {
        "peer": PEER,
        "peer_seconds": their,
        "peer_ns_per_element": their / per * 1e9,
        "speedup": their / benchmark.stats.stats.min,
    }


@pytest.mark.benchmark(group="ckks-seal")
def test_seal(benchmark: BenchmarkFixture) -> None:
    tensors = {"w": update(0)}
    vector = measure(
        benchmark,
        lambda: sealed(tensors),
        keystream(MaskPrg.AES_128_CTR, 8 * SIZE),
        elements=SIZE,
        headline="CKKS: sealing 10⁶ parameters, one core",
    )
    opened = codec_of(tensors).decode(vector, sealer(), [bytes(32)])
    np.testing.assert_allclose(opened.tensors["w"], tensors["w"], rtol=0, atol=1e-8)
    beside(benchmark, lambda: theirs(tensors["w"]))


@pytest.mark.benchmark(group="ckks-open")
def test_open(benchmark: BenchmarkFixture) -> None:
    updates = [{"w": update(silo)} for silo in range(SILOS)]
    seeds = [bytes([silo]) * 32 for silo in range(SILOS)]
    codec = codec_of(updates[0])
    total = RunningSum(codec.ring, codec.length)
    for tensors, seed in zip(updates, seeds, strict=True):
        total.add(sealed(tensors, seed))
    opened = measure(
        benchmark,
        lambda: codec.decode(total.total, sealer(), seeds),
        keystream(MaskPrg.AES_128_CTR, 8 * SIZE, SILOS),
        elements=SIZE,
        headline=f"CKKS: opening the sum of {SILOS}",
    )
    exact = np.mean([tensors["w"].astype(float) for tensors in updates], axis=0)
    np.testing.assert_allclose(opened.tensors["w"], exact, rtol=0, atol=1e-8)
    vector = tenseal.ckks_vector(context(), updates[0]["w"])
    beside(benchmark, lambda: np.array(vector.decrypt()))


@pytest.mark.benchmark(group="ckks-fold")
def test_fold(benchmark: BenchmarkFixture) -> None:
    """Everything that the coordinator does to one upload's words: check, digest, add."""
    codec = codec_of({"w": update(0)})
    uploads = [sealed({"w": update(silo)}, bytes([silo]) * 32) for silo in range(SILOS)]

    def fold() -> Vector:
        total = RunningSum(codec.ring, codec.length)
        for upload in uploads:
            words = InMemory(upload, CHUNK_BYTES)
            assert len(words.digest()) == DIGEST_BYTES
            total.fold(words)
        return total.total

    total = measure(
        benchmark,
        fold,
        addition(codec.ring, codec.length, SILOS),
        elements=SIZE * SILOS,
        headline="CKKS: the coordinator checks, hashes and adds, a parameter and silo",
    )
    lazy = np.sum(uploads, axis=0)  # eight residues of 54 bits fit a word
    assert np.array_equal(total, lazy % np.uint64(codec.ring.modulus))
    data = [theirs(update(silo)) for silo in range(SILOS)]

    def their_fold() -> Any:
        vectors = [tenseal.ckks_vector_from(context(), one) for one in data]
        for vector in vectors[1:]:
            vectors[0].add_(vector)
        return vectors[0]

    exact = np.sum([update(silo).astype(float) for silo in range(SILOS)], axis=0)
    np.testing.assert_allclose(their_fold().decrypt(), exact, rtol=0, atol=1e-5)
    beside(benchmark, their_fold, per=SIZE * SILOS)


@pytest.mark.benchmark(group="ckks-bytes")
@pytest.mark.parametrize("tensors", [1, 60])
def test_bytes(benchmark: BenchmarkFixture, tensors: int) -> None:
    layers = {f"layer-{i:02}": part for i, part in enumerate(np.array_split(update(0), tensors))}
    words = measure(
        benchmark,
        lambda: sealed(layers),
        copy(8 * SIZE),
        elements=SIZE,
        rounds=1,
    )
    theirs_bytes = sum(len(theirs(layer)) for layer in layers.values())
    benchmark.extra_info |= {
        "bytes_per_element": round(words.nbytes / SIZE, 3),
        "peer": PEER,
        "peer_bytes_per_element": round(theirs_bytes / SIZE, 2),
    }
    assert words.nbytes / SIZE <= 8.5


# ---- 10^8 parameters, each step in a process of its own, on all cores


def huge_step(step: str, folder: str) -> None:
    """One step of a round of 10^8 parameters: what a silo or a coordinator does in memory."""
    os.sched_setaffinity(0, range(os.cpu_count() or 1))
    codec = SealedCodec(TASK, Schema.of({"w": np.empty(HUGE, np.float32)}), 3, SUITE)
    start = time.perf_counter()
    if step == "fold":
        total = RunningSum(codec.ring, codec.length)
        for silo in range(3):
            upload = np.load(f"{folder}/{silo}.npy", mmap_mode="r")
            words = InMemory(upload, CHUNK_BYTES)
            assert len(words.digest()) == DIGEST_BYTES
            total.fold(words)
        result = total.total
        elapsed = time.perf_counter() - start
        np.save(f"{folder}/total.npy", result)
    elif step == "open":
        machine = Sealer(SUITE, KEY)
        words = np.load(f"{folder}/total.npy", mmap_mode="r")
        opened = codec.decode(words, machine, [bytes([silo]) * 32 for silo in range(3)])
        elapsed = time.perf_counter() - start
        for at in range(0, HUGE, HUGE // 10):  # all parts, a little of each
            exact = np.mean([_huge(silo, at, 10**5).astype(float) for silo in range(3)], axis=0)
            error = np.abs(opened.tensors["w"][at : at + 10**5] - exact).max()
            assert error < 1e-7, error
        machine.close()
    else:
        tensors = {"w": np.concatenate([_huge(int(step), at) for at in _places()])}
        machine = Sealer(SUITE, KEY)
        start = time.perf_counter()
        words = codec.encode(
            tensors, weight=1, metrics={}, sealer=machine, seed=bytes([int(step)]) * 32
        )
        elapsed = time.perf_counter() - start
        machine.close()
        np.save(f"{folder}/{step}.npy", words)
    print(json.dumps({"seconds": round(elapsed, 2), "peak": resident("VmHWM")}))


def _places() -> range:
    return range(0, HUGE, HUGE // 100)


def _huge(silo: int, at: int, size: int = HUGE // 100) -> np.ndarray:
    return np.random.default_rng([silo, at]).standard_normal(size, np.float32).clip(-8, 8)


@pytest.mark.full
@pytest.mark.benchmark(group="ckks-huge")
def test_a_hundred_million_parameters(benchmark: BenchmarkFixture, tmp_path: Path) -> None:
    """Seal at three silos, fold, open: each process within 2 GiB, on all cores."""

    def play() -> dict[str, dict[str, float]]:
        return {step: _run(step, str(tmp_path)) for step in ("0", "1", "2", "fold", "open")}

    floor = keystream(MaskPrg.AES_128_CTR, 8 * HUGE, 6)
    floor_seconds = seconds_of(floor.run)
    steps = benchmark.pedantic(play, rounds=1)
    peak = int(max(numbers["peak"] for numbers in steps.values()))
    record(
        benchmark,
        floor=floor.name,
        floor_seconds=floor_seconds,
        elements=3 * HUGE,
        peak_bytes=peak,
        steps=steps,
    )
    assert peak <= PEAK


def _run(step: str, folder: str) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.test_ckks", step, folder]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    numbers: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return numbers


if __name__ == "__main__":
    huge_step(sys.argv[1], sys.argv[2])
