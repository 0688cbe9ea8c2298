"""No sum of as many vectors as a session has silos can wrap: exact integers, extreme values."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from secagg.config import Clip, Metric, TaskConfig, fraction_bits
from secagg.crypto.secret import Entropy
from secagg.encoding.codec import Codec
from secagg.encoding.schema import Schema
from secagg.ring.vectors import RunningSum

Keyed = Callable[[int], Entropy]
Extreme = Callable[[pytest.MonkeyPatch, int], None]
BITS = (16, 32, 64)


@pytest.mark.parametrize("bits", BITS)
def test_the_scale_is_the_greatest_that_cannot_wrap(bits: int) -> None:
    greatest = 2 ** (bits - 1) - 1
    for silos in range(3, 1025):
        f = fraction_bits(bits, silos)
        assert silos * 2**f <= greatest < silos * 2 ** (f + 1)


EXTREMES = st.sampled_from((1.0, -1.0, 1 - 2**-53, 2**-53 - 1, 0.0, 5e-324, -5e-324))
VALUE = EXTREMES | st.floats(-1, 1)


@st.composite
def silos_of_one_kind(draw: st.DrawFn) -> tuple[list[float], float, float]:
    values = draw(st.lists(VALUE, min_size=3, max_size=3))
    weight = draw(st.sampled_from((1.0, 1 - 2**-53, 0.0)) | st.floats(1e-9, 1))
    return values, weight, draw(VALUE)


@settings(deadline=None, max_examples=200)
@given(
    bits=st.sampled_from(BITS),
    silos=st.integers(3, 1024),
    kinds=st.lists(silos_of_one_kind(), min_size=1, max_size=3),
    bound=st.sampled_from((1.0, 3.7, 1e-3, 1e30)),
    cap=st.sampled_from((1.0, 3.0, 1e6)),
    clip=st.sampled_from(Clip),
    source=st.sampled_from((0x00, 0xFF, None)),
    data=st.data(),
)
def test_the_worst_sum_does_not_wrap(
    bits: int,
    silos: int,
    kinds: list[tuple[list[float], float, float]],
    bound: float,
    cap: float,
    clip: Clip,
    source: int | None,
    data: st.DataObject,
    task: Callable[..., TaskConfig],
    keyed: Keyed,
    rounding_down_or_up: Extreme,
) -> None:
    """Every word is within ±2^f, and the ring's sum over all silos is the integers' sum."""
    metric = Metric("loss", bound)
    config = task(ring_bits=bits, bound=bound, weight_cap=cap, clip=clip, metrics=(metric,))
    codec = Codec(config, Schema.of({"a": np.zeros(3)}), silos)
    running = RunningSum(codec.ring, codec.length)
    exact = [0] * codec.length
    left = silos
    for position, (values, weight, loss) in enumerate(kinds):
        beyond = 1.0 if clip is Clip.NONE else data.draw(st.sampled_from((1.0, 1e3)))
        with pytest.MonkeyPatch.context() as patch:
            if source is not None:
                rounding_down_or_up(patch, source)
            vector = codec.encode(
                {"a": np.array(values) * bound * beyond},
                weight=max(weight * cap, cap * 2.0 ** (-2 * codec.bits)),
                metrics={"loss": loss * bound},
                entropy=keyed(position),
            )
        integers = codec.ring.centred(vector).tolist()
        assert max(map(abs, integers)) <= 2**codec.bits
        count = left if position == len(kinds) - 1 else data.draw(st.integers(0, left))
        left -= count
        for _ in range(count):
            running.add(vector)
        exact = [total + count * word for total, word in zip(exact, integers, strict=True)]
    assert codec.ring.centred(running.total).tolist() == exact


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("silos", [3, 7, 1023, 1024])
@pytest.mark.parametrize("sign", [1, -1])
def test_all_at_the_bound(
    bits: int, silos: int, sign: int, task: Callable[..., TaskConfig], keyed: Keyed
) -> None:
    codec = Codec(task(ring_bits=bits), Schema.of({"a": np.zeros(2)}), silos)
    vector = codec.encode({"a": np.full(2, float(sign))}, weight=1, metrics={}, entropy=keyed(0))
    one = 2**codec.bits
    assert codec.ring.centred(vector).tolist() == [sign * one] * 2 + [one, 0, 0, 0]
    running = RunningSum(codec.ring, codec.length)
    for _ in range(silos):
        running.add(vector)
    aggregate = codec.decode(running.total)
    assert aggregate.tensors["a"].tolist() == [sign, sign]
    assert (aggregate.weight, aggregate.clipped) == (silos, 0)
    assert math.log2(one) == fraction_bits(bits, silos)
