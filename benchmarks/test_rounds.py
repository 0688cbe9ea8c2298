"""Encoding, and whole rounds in memory: every silo's and the coordinator's work together."""

from __future__ import annotations

import os

import numpy as np
import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from secagg.config import Clip, TaskConfig, Weighting
from secagg.encoding.codec import Codec
from secagg.encoding.schema import Schema
from secagg.simulation import Federation


@pytest.mark.benchmark(group="encoding")
def test_encode_a_million(benchmark: BenchmarkFixture) -> None:
    task = TaskConfig("training", Weighting.MEAN, 1, 1.0, Clip.NONE, 1000.0, 32)
    tensors = {"w": np.random.default_rng(0).uniform(-1, 1, 10**6).astype(np.float32)}
    codec = Codec(task, Schema.of(tensors), 4)
    vector = benchmark(codec.encode, tensors, weight=1000.0, metrics={}, entropy=os.urandom)
    decoded = codec.decode(vector).tensors["w"]
    assert np.abs(decoded - tensors["w"]).max() <= 2.0**-codec.bits


@pytest.mark.benchmark(group="round in memory")
@pytest.mark.parametrize("elements", [10**4, 10**6])
@pytest.mark.parametrize("silos", [4, 16])
def test_round(benchmark: BenchmarkFixture, silos: int, elements: int) -> None:
    federation = Federation(silos=silos)
    generator = np.random.default_rng(0)
    updates = {s: {"w": generator.uniform(-1, 1, elements)} for s in federation.silos}
    gone = federation.silos[1]
    result = benchmark.pedantic(
        federation.run_round, (updates,), {"drops": {gone: "masked_input"}}, rounds=3
    )
    plain = np.mean([updates[s]["w"] for s in result.survivors], axis=0)
    assert np.abs(result.mean["w"] - plain).max() <= 1e-6
