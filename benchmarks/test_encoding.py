"""Encoding and decoding by word and size, beside what the bytes alone cost.

Stochastic rounding takes 32 fresh bits of keystream an element, so that is encoding's floor; with k
masks of 32-bit words in the same pass, k + 1 of them. Decoding writes a float64 per element: its
floor is the copy of as many bytes.
"""

from __future__ import annotations

import os

import numpy as np
import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.cases import sweep
from benchmarks.floors import copy, keystream
from benchmarks.measure import measure
from benchmarks.test_masks import masks_of, spread
from secagg.config import Clip, MaskPrg, RingBits, TaskConfig, Weighting
from secagg.encoding.codec import Codec
from secagg.encoding.schema import Schema
from secagg.ring.expand import Mask, apply_masks
from secagg.ring.vectors import Vector

AES = MaskPrg.AES_128_CTR
SILOS = 4
CAP = 1000.0


def update(d: int) -> dict[str, np.ndarray]:
    return {"w": np.random.default_rng(d).uniform(-1, 1, d).astype(np.float32)}


def codec_of(tensors: dict[str, np.ndarray], w: RingBits = 32) -> Codec:
    task = TaskConfig("training", Weighting.MEAN, 1, 1.0, Clip.NONE, CAP, w)
    return Codec(task, Schema.of(tensors), SILOS)


def encode(
    benchmark: BenchmarkFixture,
    d: int,
    *,
    w: RingBits = 32,
    masks: tuple[Mask, ...] = (),
    headline: str | None = None,
) -> None:
    """Measure one thread's encoding, with masks in the same pass, and decode what came out."""
    tensors = update(d)
    codec = codec_of(tensors, w)

    def work() -> Vector:
        return codec.encode(
            tensors, weight=CAP, metrics={}, entropy=os.urandom, masks=masks, threads=1
        )

    vector = measure(
        benchmark,
        work,
        keystream(AES, 4 * d, 1 + len(masks)),
        elements=d,
        rounds=None if d < 10**8 else 2,
        headline=headline,
    )
    apply_masks(codec.ring, vector, [mask.inverse() for mask in masks], AES)
    check(codec, vector, tensors)


def check(codec: Codec, vector: Vector, tensors: dict[str, np.ndarray]) -> None:
    """Nothing is further off than a unit of the last place, and nothing leans one way."""
    unit = 2.0**-codec.bits
    error = codec.decode(vector).tensors["w"] - tensors["w"]
    assert np.abs(error).max() <= unit
    assert abs(error.mean()) <= 5 * unit / len(error) ** 0.5


@pytest.mark.benchmark(group="encode")
@sweep("w", [16, 32, 64])
def test_encode(benchmark: BenchmarkFixture, w: RingBits) -> None:
    headline = "encoding 10⁶ parameters, one core" if w == 32 else None
    encode(benchmark, 10**6, w=w, headline=headline)


@pytest.mark.benchmark(group="encode")
@sweep("k", [1, 16], [4, 64])
def test_encode_and_mask(benchmark: BenchmarkFixture, k: int) -> None:
    headline = "encoding 10⁶ parameters and adding 16 masks in one pass" if k == 16 else None
    encode(benchmark, 10**6, masks=tuple(masks_of(k)), headline=headline)


_COST: list[float] = []


@pytest.mark.benchmark(group="encode-linear")
@sweep("d", [10**5, 10**6, 10**7], [10**8])
def test_encode_linear(benchmark: BenchmarkFixture, d: int) -> None:
    encode(benchmark, d)
    most = spread(benchmark, _COST)
    if d == 10**8:
        words = f"encoding 10⁸ parameters; one costs the same within {most:.2f}× from 10⁵ on"
        benchmark.extra_info["headline"] = words


@pytest.mark.benchmark(group="decode")
@sweep("d", [10**5, 10**6], [10**7])
@sweep("w", [16, 32, 64])
def test_decode(benchmark: BenchmarkFixture, w: RingBits, d: int) -> None:
    tensors = update(d)
    codec = codec_of(tensors, w)
    vector = codec.encode(tensors, weight=CAP, metrics={}, entropy=os.urandom)
    headline = "decoding 10⁶ parameters, one core" if (w, d) == (32, 10**6) else None
    measure(benchmark, lambda: codec.decode(vector), copy(8 * d), elements=d, headline=headline)
    check(codec, vector, tensors)
