"""Updates through ciphertexts: weighted means, what a coordinator needs, and the refusals."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from secagg.ckks.codec import SealedCodec, codec_of
from secagg.ckks.sealing import Sealer
from secagg.config import (
    Clip,
    MaskPrg,
    Metric,
    Protection,
    SessionConfig,
    SiloId,
    TaskConfig,
    ThresholdRule,
    Weighting,
)
from secagg.crypto.secret import Secret
from secagg.encoding.codec import Codec
from secagg.encoding.schema import Schema
from secagg.errors import InputError, MalformedMessage
from secagg.ring.vectors import PrimeRing, RunningSum, Vector
from secagg.suite import Suite

SUITE = Suite.CKKS_54
SHAPES: dict[str, tuple[int, ...]] = {"a.scalar": (), "b.none": (2, 0), "c": (70, 61), "d": (4,)}
SILOS = 4
SEALER = Sealer(SUITE, Secret(bytes(32)), workers=1)


def task(**changes: Any) -> TaskConfig:
    numbers: dict[str, Any] = {
        "name": "task",
        "weighting": Weighting.MEAN,
        "rounds": 1,
        "bound": 2.0,
        "clip": Clip.NONE,
        "weight_cap": 1000.0,
        "metrics": (Metric("loss", 10.0),),
    }
    return TaskConfig(**(numbers | changes))


def arrays(seed: int, bound: float = 2.0) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(seed)
    return {
        name: generator.uniform(-bound, bound, shape).astype(np.float32)
        for name, shape in SHAPES.items()
    }


def sealed_codec(config: TaskConfig) -> SealedCodec:
    return SealedCodec(config, Schema.of(arrays(0)), SILOS, SUITE)


def added(codec: SealedCodec, vectors: list[Vector]) -> Vector:
    total = RunningSum(codec.ring, codec.length)
    for vector in vectors:
        total.add(vector)
    return total.total


@settings(deadline=None, max_examples=15)
@given(
    weights=st.lists(st.floats(0.5, 1000), min_size=1, max_size=SILOS),
    seed=st.integers(0, 1000),
    weighting=st.sampled_from(Weighting),
)
def test_equals_numpy_s_mean_or_sum(weights: list[float], seed: int, weighting: Weighting) -> None:
    if weighting is Weighting.SUM:
        weights = [1.0] * len(weights)
    codec = sealed_codec(task(weighting=weighting, weight_cap=max(weights)))
    updates = [arrays(seed + i) for i in range(len(weights))]
    losses = [float(i - 1) for i in range(len(weights))]
    seeds = [bytes([i]) * 32 for i in range(len(weights))]
    vectors = [
        codec.encode(update, weight=weight, metrics={"loss": loss}, sealer=SEALER, seed=fresh)
        for update, weight, loss, fresh in zip(updates, weights, losses, seeds, strict=True)
    ]
    opened = codec.decode(added(codec, vectors), SEALER, seeds)
    divisor = sum(weights) if weighting is Weighting.MEAN else 1.0
    for name, tensor in opened.tensors.items():
        exact = sum(w * u[name].astype(float) for w, u in zip(weights, updates, strict=True))
        assert (tensor.dtype, tensor.shape) == (np.float64, SHAPES[name])
        # both the sums and the divisor were rounded to multiples of 2^-34 of their bounds
        slack = 4 * codec.resolution * max(weights) * 2 * SILOS / divisor
        np.testing.assert_allclose(tensor, exact / divisor, rtol=0, atol=max(slack, 1e-9))
    assert opened.weight == pytest.approx(sum(weights), abs=1e-6)
    mean = sum(w * loss for w, loss in zip(weights, losses, strict=True)) / sum(weights)
    assert opened.metrics["loss"] == pytest.approx(mean, abs=1e-5)
    assert opened.clipped == 0


def test_its_numbers() -> None:
    codec = sealed_codec(task())
    assert codec.size == 1 + 70 * 61 + 4 + 3
    assert codec.length == 2 * 4096
    assert codec.ring == PrimeRing(18_014_398_509_309_953)
    assert codec.limit == 1024
    assert codec.resolution == 2.0**-34


@pytest.mark.parametrize(("elements", "ciphertexts"), [(1, 1), (4092, 1), (4093, 2), (8187, 2)])
def test_a_ciphertext_carries_4095_values(elements: int, ciphertexts: int) -> None:
    schema = Schema.of({"w": np.zeros(elements)})
    codec = SealedCodec(task(), schema, SILOS, SUITE)
    assert codec.length == 4096 * ciphertexts


@pytest.mark.parametrize("suite", [None, SUITE])
def test_a_session_s_suite_says_which_codec(suite: Suite | None) -> None:
    config = task(ring_bits=None if suite else 32)
    session = SessionConfig(
        name="s",
        consortium="c",
        silos=tuple(SiloId(name) for name in "abcd"),
        protection=Protection.CKKS_MASKED if suite else Protection.MASKED,
        colluders=1,
        threshold=ThresholdRule(2, 3),
        min_cohort=3,
        mask_prg=MaskPrg.AES_128_CTR,
        tasks=(config,),
        suite=suite,
    )
    schema = Schema.of(arrays(0))
    expected = SealedCodec(config, schema, 4, suite) if suite else Codec(config, schema, 4)
    assert codec_of(session, "task", schema) == expected


def test_clipped_elements_are_counted() -> None:
    codec = sealed_codec(task(clip=Clip.ELEMENT, bound=0.5))
    update, metrics = arrays(1), {"loss": 0.0}
    vector = codec.encode(update, weight=7, metrics=metrics, sealer=SEALER, seed=bytes(32))
    opened = codec.decode(vector, SEALER, [bytes(32)])
    beyond = sum(int((np.abs(tensor) > 0.5).sum()) for tensor in update.values())
    assert opened.clipped == pytest.approx(beyond, abs=1e-3)
    np.testing.assert_allclose(opened.tensors["c"], update["c"].clip(-0.5, 0.5), atol=1e-7)


@pytest.mark.parametrize(("silos", "limit"), [(3, 1024), (5, 1024), (12, 256), (256, 16)])
def test_the_limit_is_the_cohort_s(silos: int, limit: int) -> None:
    codec = SealedCodec(task(), Schema.of(arrays(0)), silos, SUITE)
    assert (codec.limit, codec.resolution) == (limit, 2.0**-24 / limit)


def test_256_silos_at_their_bounds() -> None:
    """All of them at the same end of every value's range: what would wrap if anything did."""
    signs = np.where(np.arange(4000) % 3, 1.0, -1.0)
    codec = SealedCodec(task(), Schema.of({"w": signs}), 256, SUITE)
    seeds = [i.to_bytes(32, "little") for i in range(256)]
    metrics = {"loss": -10.0}
    total = added(
        codec,
        [
            codec.encode({"w": 2 * signs}, weight=1000, metrics=metrics, sealer=SEALER, seed=seed)
            for seed in seeds
        ],
    )
    opened = codec.decode(total, SEALER, seeds)
    assert np.array_equal(opened.tensors["w"], 2 * signs)
    assert (opened.weight, opened.metrics, opened.clipped) == (256_000, metrics, 0)


def test_nothing_of_a_sum_is_given_where_a_part_does_not_open() -> None:
    """The last of 33 ciphertexts is another's; 32 open before it, in an earlier piece."""
    update = {"w": np.ones(32 * 4095)}
    codec = SealedCodec(task(metrics=()), Schema.of(update), SILOS, SUITE)
    total = codec.encode(update, weight=1, metrics={}, sealer=SEALER, seed=bytes(32))
    pieces = SEALER.open(total, [bytes(32)], codec.size, codec.limit)
    assert len(next(pieces)) == 32 * 4095
    total[-4096:] = codec.ring.zeros(4096)
    with pytest.raises(MalformedMessage, match="reserved-slot"):
        codec.decode(total, SEALER, [bytes(32)])


def test_what_cannot_be_encoded_is_named() -> None:
    codec, update = sealed_codec(task()), arrays(1)
    with pytest.raises(InputError, match="tensor-bound"):
        codec.encode(
            update | {"d": np.full(4, 2.5)},
            weight=1,
            metrics={"loss": 0.0},
            sealer=SEALER,
            seed=bytes(32),
        )
    least = 1000 * codec.resolution
    with pytest.raises(InputError, match="weight"):
        codec.encode(update, weight=least / 2, metrics={"loss": 0.0}, sealer=SEALER, seed=bytes(32))


def test_what_does_not_open_is_named() -> None:
    codec, update = sealed_codec(task()), arrays(1)
    vector = codec.encode(update, weight=1, metrics={"loss": 0.0}, sealer=SEALER, seed=bytes(32))
    with pytest.raises(MalformedMessage, match="reserved-slot"):
        codec.decode(vector, SEALER, [b"\1" * 32])
    with pytest.raises(MalformedMessage, match="vector-length"):
        codec.decode(vector[:-1], SEALER, [bytes(32)])
