"""The codec against an oracle of fractions, its borders, and every refusal."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from secagg.config import Clip, Metric, TaskConfig, Weighting
from secagg.crypto.secret import Entropy
from secagg.encoding import codec as module
from secagg.encoding.codec import Codec
from secagg.encoding.layout import Aggregate
from secagg.encoding.schema import Schema
from secagg.errors import InputError, MalformedMessage
from secagg.ring.vectors import RunningSum

Keyed = Callable[[int], Entropy]
Task = Callable[..., TaskConfig]
Extreme = Callable[[pytest.MonkeyPatch, int], None]
Arrays = dict[str, np.ndarray]
BITS = (16, 32, 64)
FLOATS = (np.float16, np.float32, np.float64)
SHAPES: dict[str, tuple[int, ...]] = {"a.scalar": (), "b.none": (2, 0), "c": (2, 3), "d": (4,)}
SLACK = Fraction(1, 2**44)
"""Room for float64's own rounding in an expression of a few operations."""


@dataclass(frozen=True)
class Update:
    """What one silo holds."""

    tensors: Arrays
    weight: float
    metrics: dict[str, float]


@dataclass(frozen=True)
class Oracle:
    """The exact aggregate."""

    tensors: dict[str, list[Fraction]]
    weight: Fraction
    metrics: dict[str, Fraction]
    clipped: int


def clip_exactly(task: TaskConfig, values: list[Fraction]) -> tuple[list[Fraction], int]:
    bound = Fraction(task.bound)
    if task.clip is Clip.ELEMENT:
        clipped = [max(-bound, min(bound, value)) for value in values]
        return clipped, sum(value != kept for value, kept in zip(values, clipped, strict=True))
    square = sum((value * value for value in values), Fraction(0))
    if task.clip is Clip.L2 and square > bound * bound:
        norm = Fraction(math.isqrt(square.numerator * 2**200 // square.denominator), 2**100)
        return [value * bound / norm for value in values], len(values)
    return values, 0


def aggregate_exactly(task: TaskConfig, updates: Sequence[Update]) -> Oracle:
    names = sorted(updates[0].tensors)
    sizes = [updates[0].tensors[name].size for name in names]
    sums, clipped = [Fraction(0)] * sum(sizes), 0
    for update in updates:
        flat = [Fraction(float(x)) for name in names for x in update.tensors[name].reshape(-1)]
        kept, count = clip_exactly(task, flat)
        clipped += count
        weight = Fraction(update.weight)
        sums = [total + weight * value for total, value in zip(sums, kept, strict=True)]
    weight = sum((Fraction(update.weight) for update in updates), Fraction(0))
    divisor = weight if task.weighting is Weighting.MEAN else Fraction(1)
    tensors, at = {}, 0
    for name, size in zip(names, sizes, strict=True):
        tensors[name] = [total / divisor for total in sums[at : at + size]]
        at += size
    metrics = {
        m.name: sum(
            (Fraction(u.weight) * Fraction(u.metrics[m.name]) for u in updates), Fraction(0)
        )
        / weight
        for m in task.metrics
    }
    return Oracle(tensors, weight, metrics, clipped)


def total_of(codec: Codec, updates: Sequence[Update], keyed: Keyed) -> np.ndarray:
    running = RunningSum(codec.ring, codec.length)
    for position, update in enumerate(updates):
        running.add(
            codec.encode(
                update.tensors,
                weight=update.weight,
                metrics=update.metrics,
                entropy=keyed(position),
            )
        )
    return running.total


def assert_close(
    codec: Codec, updates: Sequence[Update], got: Aggregate, shapes: Mapping[str, tuple[int, ...]]
) -> None:
    task, n, unit = codec.task, len(updates), Fraction(1, 2**codec.bits)
    oracle, cap = aggregate_exactly(task, updates), Fraction(task.weight_cap)
    shares = oracle.weight / cap
    divisor = shares if task.weighting is Weighting.MEAN else Fraction(1)
    bound = Fraction(task.bound)
    fine = n * unit * unit + SLACK
    tolerance = bound * (n * unit + n * fine) / divisor
    assert {name: array.shape for name, array in got.tensors.items()} == shapes
    for name, array in got.tensors.items():
        assert array.dtype == np.float64
        for value, exact in zip(array.reshape(-1).tolist(), oracle.tensors[name], strict=True):
            assert abs(Fraction(value) - exact) <= tolerance
    assert abs(Fraction(got.weight) - oracle.weight) <= cap * fine * n
    assert got.metrics.keys() == oracle.metrics.keys()
    for metric in task.metrics:
        error = abs(Fraction(got.metrics[metric.name]) - oracle.metrics[metric.name])
        assert error <= Fraction(metric.bound) * 2 * n * fine / shares
    assert abs(Fraction(got.clipped) - oracle.clipped) <= codec.schema.size * n * fine


@st.composite
def rounds(draw: st.DrawFn) -> tuple[dict[str, Any], int, list[Update]]:
    """A task's numbers, the session's size, and the updates of a cohort."""
    weighting, clip = draw(st.sampled_from(Weighting)), draw(st.sampled_from(Clip))
    bound = draw(st.sampled_from((0.01, 1.0, 3.7, 100.0)))
    cap = 1.0 if weighting is Weighting.SUM else draw(st.sampled_from((1.0, 3.0, 1000.0)))
    metrics = draw(st.sampled_from(((), (Metric("loss", 2.5),), (Metric("f1", 1), Metric("a", 9)))))
    numbers = {
        "weighting": weighting,
        "clip": clip,
        "bound": bound,
        "weight_cap": cap,
        "metrics": metrics,
        "ring_bits": draw(st.sampled_from(BITS)),
    }
    reach = 0.99 if clip is Clip.NONE else draw(st.sampled_from((0.3, 3.0)))
    unit = st.floats(-1, 1)
    updates = []
    for _ in range(draw(st.integers(1, 4))):
        dtype = draw(st.sampled_from(FLOATS))
        tensors = {
            name: np.array(
                draw(st.lists(unit, min_size=math.prod(shape), max_size=math.prod(shape)))
            )
            .astype(dtype)
            .reshape(shape)
            * dtype(bound * reach)
            for name, shape in SHAPES.items()
        }
        tensors = {name: np.asarray(array, dtype) for name, array in tensors.items()}
        weight = cap * draw(st.sampled_from((1.0, 0.5)) | st.floats(0.01, 1))
        updates.append(Update(tensors, weight, {m.name: draw(unit) * m.bound for m in metrics}))
    return numbers, draw(st.integers(max(3, len(updates)), 40)), updates


@settings(deadline=None, max_examples=300)
@given(case=rounds())
def test_decodes_to_the_oracle(
    case: tuple[dict[str, Any], int, list[Update]], task: Task, keyed: Keyed
) -> None:
    numbers, silos, updates = case
    codec = Codec(task(**numbers), Schema.of(updates[0].tensors), silos)
    if codec.task.clip is Clip.L2:  # at the border itself float64 may fall on either side
        for update in updates:
            norm = math.hypot(*(float(x) for a in update.tensors.values() for x in a.reshape(-1)))
            assume(abs(norm / codec.task.bound - 1) > 1e-9)
    assert_close(codec, updates, codec.decode(total_of(codec, updates, keyed)), SHAPES)


@settings(deadline=None)
@given(
    bits=st.sampled_from(BITS),
    silos=st.integers(3, 1024),
    dtype=st.sampled_from(FLOATS),
    values=st.lists(st.floats(-1, 1) | st.sampled_from((1.0, -1.0, 0.0, -0.0)), min_size=1),
    exponent=st.integers(-20, 20),
    seed=st.integers(0, 2**32),
)
def test_every_word_is_its_value_rounded_down_or_up(
    bits: int,
    silos: int,
    dtype: type,
    values: list[float],
    exponent: int,
    seed: int,
    task: Task,
    keyed: Keyed,
) -> None:
    """A multiple of the unit is exactly its word, in every ring and float."""
    bound = 2.0 ** (exponent if dtype is not np.float16 else exponent / 4 // 1)
    array = (np.array(values).astype(dtype) * dtype(bound)).astype(dtype)
    codec = Codec(task(ring_bits=bits, bound=bound), Schema.of({"x": array}), silos)
    vector = codec.encode({"x": array}, weight=1, metrics={}, entropy=keyed(seed))
    for value, word in zip(array.tolist(), codec.ring.centred(vector).tolist(), strict=False):
        exact = Fraction(value) / Fraction(bound) * 2**codec.bits
        assert word in (math.floor(exact), math.ceil(exact))


@settings(deadline=None)
@given(
    bits=st.sampled_from(BITS),
    weighting=st.sampled_from(Weighting),
    rows=st.lists(
        st.lists(st.integers(-(2**20), 2**20), min_size=3, max_size=3), min_size=4, max_size=4
    ),
    exponent=st.integers(-8, 8),
)
def test_multiples_of_the_unit_decode_exactly(
    bits: int,
    weighting: Weighting,
    rows: list[list[int]],
    exponent: int,
    task: Task,
    keyed: Keyed,
) -> None:
    """Four silos at the cap: their sum, and their mean, without any error at all."""
    bound = 2.0**exponent
    codec = Codec(
        task(ring_bits=bits, bound=bound, weighting=weighting),
        Schema.of({"x": np.zeros(3)}),
        4,
    )
    shift = 2.0 ** (20 - min(20, codec.bits))
    unit = 2.0 ** -min(20, codec.bits) * bound
    values = [[float(round(k / shift)) * unit for k in row] for row in rows]
    updates = [Update({"x": np.array(row)}, 1.0, {}) for row in values]
    got = codec.decode(total_of(codec, updates, keyed))
    sums = [sum(map(Fraction, column)) for column in zip(*values, strict=True)]
    divisor = 4 if weighting is Weighting.MEAN else 1
    assert [Fraction(x) for x in got.tensors["x"].tolist()] == [s / divisor for s in sums]
    assert (got.weight, got.clipped, got.metrics) == (4, 0, {})


@settings(deadline=None)
@given(
    bits=st.sampled_from(BITS),
    silos=st.integers(3, 200),
    weights=st.lists(st.floats(1e-3, 1), min_size=1, max_size=3),
    cap=st.sampled_from((1.0, 7.0, 1e5)),
)
def test_weights_are_exact_to_two_words(
    bits: int, silos: int, weights: list[float], cap: float, task: Task, keyed: Keyed
) -> None:
    codec = Codec(task(ring_bits=bits, weight_cap=cap), Schema.of({"x": np.zeros(1)}), silos)
    updates = [Update({"x": np.zeros(1)}, weight * cap, {}) for weight in weights]
    got = codec.decode(total_of(codec, updates, keyed))
    exact = sum((Fraction(update.weight) for update in updates), Fraction(0))
    limit = len(weights) * (Fraction(1, 2 ** (2 * codec.bits)) + Fraction(1, 2**49))
    assert abs(Fraction(got.weight) - exact) <= Fraction(cap) * limit


def test_layout(task: Task, keyed: Keyed) -> None:
    """Tensors by name, then weight, clip count and metrics in two words each."""
    metrics = (Metric("loss", 4.0), Metric("acc", 1.0))
    codec = Codec(
        task(weight_cap=8.0, bound=2.0, clip=Clip.ELEMENT, metrics=metrics),
        Schema.of({"b": np.zeros((2, 1)), "a": np.zeros(())}),
        4,
    )
    one = 2**28
    assert (codec.bits, codec.length) == (28, 3 + 2 * 4)
    vector = codec.encode(
        {"b": np.array([[1.0], [-3.0]]), "a": np.array(0.5)},
        weight=4,
        metrics={"acc": 0.25, "loss": -3.0},
        entropy=keyed(0),
    )
    third = divmod(Fraction(1 / 3) * one * one, one)  # a float, hence whole in two words
    words = codec.ring.centred(vector).tolist()
    assert words[:5] == [one // 8, one // 4, -one // 2, one // 2, 0]
    assert words[5:7] == list(third)
    assert words[7:] == [-3 * one // 8, 0, one // 8, 0]


@pytest.mark.parametrize("clip", Clip)
@pytest.mark.parametrize("chunk", [1, 3, 4, 5, 6, 7, 64])
def test_parts_do_not_show(
    clip: Clip, chunk: int, task: Task, keyed: Keyed, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = np.arange(-8, 12).reshape(4, 5) / 16
    tensors = {"x": rows, "empty": np.zeros((0, 3)), "y": rows[:2, :3].T, "z": np.array(0.375)}
    codec = Codec(task(clip=clip, ring_bits=16), Schema.of(tensors), 5)

    def encode() -> list[int]:
        return codec.encode(tensors, weight=0.7, metrics={}, entropy=keyed(4)).tolist()

    whole = encode()
    monkeypatch.setattr(module, "_PART", chunk)
    assert encode() == whole


def test_a_real_part_s_border(task: Task, keyed: Keyed) -> None:
    size = module._PART + 3
    values = np.random.default_rng(5).integers(-(2**20), 2**20, size)
    codec = Codec(task(), Schema.of({"x": np.zeros(size)}), 4)
    vector = codec.encode({"x": values / 2**20}, weight=1, metrics={}, entropy=keyed(0))
    np.testing.assert_array_equal(codec.ring.centred(vector)[:size], values * 2**8)


def test_the_order_of_the_mapping_does_not_matter(task: Task, keyed: Keyed) -> None:
    tensors = {"b": np.array([0.1, 0.2]), "a": np.array([0.3])}
    codec = Codec(task(), Schema.of(tensors), 4)
    one, other = (
        codec.encode(arrays, weight=1, metrics={}, entropy=keyed(1)).tolist()
        for arrays in (tensors, dict(reversed(tensors.items())))
    )
    assert one == other


@pytest.mark.parametrize(
    "array",
    [
        np.arange(6, dtype=">f8").reshape(2, 3) / 8,
        np.asfortranarray(np.arange(6.0).reshape(2, 3) / 8),
        np.arange(12.0).reshape(2, 6)[:, ::2] / 16,
        (np.arange(6.0).reshape(2, 3) / 8).view(np.matrix),
        np.ma.MaskedArray(np.arange(6.0).reshape(2, 3) / 8, mask=[[0, 1, 0], [0, 0, 1]]),
    ],
    ids=["big-endian", "fortran", "strided", "matrix", "masked"],
)
def test_any_array_in_row_order(array: np.ndarray, task: Task, keyed: Keyed) -> None:
    codec = Codec(task(), Schema.of({"x": array}), 4)
    vector = codec.encode({"x": array}, weight=1, metrics={}, entropy=keyed(0))
    expected = [k * 2**25 for k in range(6)]
    assert codec.ring.centred(vector)[:6].tolist() == expected


def test_what_a_masked_array_hides_is_checked(task: Task, keyed: Keyed) -> None:
    """NumPy's reductions pass over hidden elements; the words would not."""
    for hidden, code in ((math.nan, "tensor-finite"), (1e9, "tensor-bound")):
        array = np.ma.MaskedArray([0.5, hidden], mask=[0, 1])
        codec = Codec(task(), Schema.of({"x": array}), 4)
        with pytest.raises(InputError) as error:
            codec.encode({"x": array}, weight=1, metrics={}, entropy=keyed(0))
        assert error.value.code == code


def test_a_fresh_vector_each_time(task: Task, keyed: Keyed) -> None:
    codec = Codec(task(), Schema.of({"x": np.zeros(3)}), 4)
    one, other = (
        codec.encode({"x": np.ones(3)}, weight=1, metrics={}, entropy=keyed(0)) for _ in range(2)
    )
    assert not np.shares_memory(one, other)
    assert one.flags.writeable


CLIPPED = np.array([0.5, -2.0, 1.0, 3.0, -1.0, 0.0])


def test_element_clipping_counts(task: Task, keyed: Keyed) -> None:
    codec = Codec(task(clip=Clip.ELEMENT), Schema.of({"x": CLIPPED}), 4)
    updates = [Update({"x": CLIPPED}, 1.0, {}), Update({"x": CLIPPED / 4}, 1.0, {})]
    got = codec.decode(total_of(codec, updates, keyed))
    expected = (np.clip(CLIPPED, -1, 1) + CLIPPED / 4) / 2
    np.testing.assert_allclose(got.tensors["x"], expected, rtol=0, atol=2.0**-26)
    assert got.clipped == pytest.approx(2, abs=1e-9)


def test_l2_clipping_is_over_all_tensors_and_counts_all(task: Task, keyed: Keyed) -> None:
    """3-4-5 across two tensors: neither is beyond the bound alone."""
    tensors = {"x": np.array([3.0, 0.0]), "y": np.array([[4.0]])}
    for bound, factor, count in ((2.5, 0.5, 3), (5.0, 1.0, 0), (8.0, 1.0, 0)):
        codec = Codec(task(clip=Clip.L2, bound=bound), Schema.of(tensors), 4)
        got = codec.decode(total_of(codec, [Update(tensors, 1.0, {})], keyed))
        for name, array in tensors.items():
            np.testing.assert_allclose(got.tensors[name], array * factor, atol=bound * 2.0**-27)
        assert got.clipped == pytest.approx(count, abs=1e-9)


def test_float16_s_norm_does_not_overflow(task: Task, keyed: Keyed) -> None:
    array = np.full(400, 60_000, np.float16)
    codec = Codec(task(clip=Clip.L2, bound=100.0), Schema.of({"x": array}), 4)
    got = codec.decode(total_of(codec, [Update({"x": array}, 1.0, {})], keyed))
    np.testing.assert_allclose(got.tensors["x"], 5.0, atol=1e-5)


@pytest.mark.parametrize("scale", [1e-200, 1e-320, 1e200])
@pytest.mark.parametrize("bound", [1.0, 1e-99, 1e99])
def test_the_norm_of_tiny_or_huge_values(
    scale: float, bound: float, task: Task, keyed: Keyed
) -> None:
    """Their squares are no float64, nor is the bound's share of the norm always."""
    tensors = {"x": np.array([3.0, 0.0]) * scale, "y": np.array([4.0, 0.0]) * scale}
    codec = Codec(task(clip=Clip.L2, bound=bound), Schema.of(tensors), 4)
    got = codec.decode(total_of(codec, [Update(tensors, 1.0, {})], keyed))
    one = 1.0 if scale > 1 else 0.0
    for name, part in (("x", 0.6), ("y", 0.8)):
        fractions = (got.tensors[name] / bound).tolist()
        assert fractions == pytest.approx([part * one, 0], abs=2.0**-27)
    assert got.clipped == pytest.approx(4 * one, abs=1e-9)


def test_a_sum_is_not_divided(task: Task, keyed: Keyed) -> None:
    codec = Codec(
        task(weighting=Weighting.SUM, bound=4.0, metrics=(Metric("loss", 2),)),
        Schema.of({"x": np.zeros(2)}),
        4,
    )
    updates = [
        Update({"x": np.array([1.5, -2.0])}, 1.0, {"loss": 1.0}),
        Update({"x": np.array([2.0, -4.0])}, 1.0, {"loss": 2.0}),
        Update({"x": np.array([3.5, 0.0])}, 0.5, {"loss": 0.0}),
    ]
    got = codec.decode(total_of(codec, updates, keyed))
    assert got.tensors["x"].tolist() == [5.25, -6.0]
    assert got.weight == 2.5
    assert got.metrics["loss"] == pytest.approx(3 / 2.5, abs=1e-12)


def codec_for_errors(task: Task, **changes: Any) -> tuple[Codec, Arrays, dict[str, float]]:
    numbers = {"weight_cap": 10.0, "bound": 2.0, "metrics": (Metric("loss", 3.0),)} | changes
    tensors = {"a": np.array([1.0, -2.0]), "b": np.array([[0.5]], np.float32)}
    return Codec(task(**numbers), Schema.of(tensors), 4), tensors, {"loss": 1.0}


def refused(
    codec: Codec, tensors: Mapping[str, Any], weight: float, metrics: Mapping[str, float]
) -> InputError:
    """The refusal, after which no array has changed."""
    before = {name: np.array(array).tobytes() for name, array in tensors.items()}
    with pytest.raises(InputError) as error:
        codec.encode(tensors, weight=weight, metrics=metrics, entropy=bytes)
    assert {name: np.array(array).tobytes() for name, array in tensors.items()} == before
    return error.value


@pytest.mark.parametrize("clip", Clip)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", FLOATS)
def test_not_finite(clip: Clip, bad: float, dtype: type, task: Task) -> None:
    codec, tensors, metrics = codec_for_errors(task, clip=clip)
    tensors["b"] = np.array([[bad]], dtype)
    error = refused(codec, tensors, 1, metrics)
    assert (error.code, "'b'" in str(error)) == ("tensor-finite", True)


@pytest.mark.parametrize("value", [2.0000000000000004, -2.0000000000000004, 1e300])
def test_beyond_the_bound(value: float, task: Task) -> None:
    codec, tensors, metrics = codec_for_errors(task)
    tensors["a"] = np.array([0.0, value])
    error = refused(codec, tensors, 1, metrics)
    assert (error.code, "'a'" in str(error)) == ("tensor-bound", True)


def test_beyond_the_bound_in_a_later_part(task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_PART", 2)
    codec = Codec(task(), Schema.of({"x": np.zeros(5)}), 4)
    error = refused(codec, {"x": np.array([0, 0, 0, 0, 1.5])}, 1, {})
    assert (error.code, "1.5" in str(error)) == ("tensor-bound", True)


@pytest.mark.parametrize(
    ("code", "changes"),
    [
        ("tensor-names", {"c": np.zeros(1)}),
        ("tensor-shape", {"a": np.zeros((2, 1))}),
        ("tensor-dtype", {"a": np.zeros(2, np.int64)}),
        ("tensor-dtype", {"a": [1.0, 2.0]}),
    ],
)
def test_not_of_the_schema(code: str, changes: dict[str, Any], task: Task) -> None:
    codec, tensors, metrics = codec_for_errors(task)
    assert refused(codec, tensors | changes, 1, metrics).code == code
    assert refused(codec, {"a": tensors["a"]}, 1, metrics).code == "tensor-names"


@pytest.mark.parametrize(
    "weight", [0, -1, 10.000000000000002, math.nan, math.inf, -math.inf, 9.9 * 2.0**-56, 5e-324]
)
def test_weight(weight: float, task: Task) -> None:
    codec, tensors, metrics = codec_for_errors(task)
    assert refused(codec, tensors, weight, metrics).code == "weight"


@pytest.mark.parametrize(
    ("code", "name", "metrics"),
    [
        ("metric-names", "loss", {}),
        ("metric-names", "acc", {"loss": 1.0, "acc": 0.5}),
        ("metric-names", "Loss", {"Loss": 1.0}),
        ("metric-bound", "loss", {"loss": 3.0000000000000004}),
        ("metric-bound", "loss", {"loss": -3.1}),
        ("metric-bound", "loss", {"loss": math.nan}),
        ("metric-bound", "loss", {"loss": -math.inf}),
    ],
)
def test_metrics(code: str, name: str, metrics: dict[str, float], task: Task) -> None:
    codec, tensors, _ = codec_for_errors(task)
    error = refused(codec, tensors, 1, metrics)
    assert (error.code, repr(name) in str(error)) == (code, True)


def test_the_borders_themselves_are_allowed(task: Task, keyed: Keyed) -> None:
    codec, tensors, _ = codec_for_errors(task)
    tensors["a"] = np.array([2.0, -2.0])
    for loss in (3.0, -3.0, 0.0):
        update = Update(tensors, 10.0, {"loss": loss})
        assert codec.decode(total_of(codec, [update], keyed)).metrics["loss"] == loss


@pytest.mark.parametrize("weighting", Weighting)
@pytest.mark.parametrize(
    "words", [(0, 0), (-1, 0), (0, -1), (2**29 + 3, 0), (2**30 - 1, 0), (-(2**31), 5)]
)
def test_an_impossible_weight_is_no_aggregate(
    weighting: Weighting, words: tuple[int, int], task: Task
) -> None:
    codec = Codec(task(weighting=weighting), Schema.of({"x": np.zeros(2)}), 3)
    total = codec.ring.wrap(np.array([5, 6, *words, 0, 0]) * np.array([1, 1, 3, 1, 1, 1]))
    with pytest.raises(MalformedMessage) as error:
        codec.decode(total)
    assert error.value.code == "result-weight"


@pytest.mark.parametrize("byte", [0x00, 0xFF])
@pytest.mark.parametrize("bits", BITS)
def test_the_least_weight_is_not_lost(
    byte: int,
    bits: int,
    task: Task,
    rounding_down_or_up: Extreme,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One silo's least weight alone decodes, whichever way it was rounded."""
    rounding_down_or_up(monkeypatch, byte)
    codec = Codec(task(ring_bits=bits, weight_cap=10.0), Schema.of({"x": np.zeros(1)}), 4)
    for factor in (1.0, 1.5):
        least = 10.0 * 2.0 ** (-2 * codec.bits)
        vector = codec.encode({"x": np.zeros(1)}, weight=factor * least, metrics={}, entropy=bytes)
        words = 2 if (factor, byte) == (1.5, 0xFF) else 1
        assert codec.decode(vector).weight == words * least


def test_the_greatest_weight_is_possible(task: Task, keyed: Keyed) -> None:
    """Also where every rounding went up."""
    codec = Codec(task(ring_bits=16, weight_cap=3), Schema.of({"x": np.zeros(1)}), 5)
    updates = [Update({"x": np.ones(1)}, math.nextafter(3, 0), {})] * 5
    assert codec.decode(total_of(codec, updates, keyed)).weight == pytest.approx(15)


def test_decode_changes_nothing(task: Task, keyed: Keyed) -> None:
    codec = Codec(task(), Schema.of({"x": np.zeros((2, 2))}), 3)
    total = total_of(codec, [Update({"x": np.full((2, 2), 0.25)}, 1.0, {})], keyed)
    total.flags.writeable = False
    before = total.tobytes()
    assert codec.decode(total).tensors["x"].tolist() == [[0.25, 0.25]] * 2
    assert total.tobytes() == before


def test_the_updates_stay(task: Task, keyed: Keyed) -> None:
    for clip in Clip:
        array = np.array([0.75, -0.75, 0.5])
        codec = Codec(task(clip=clip), Schema.of({"x": array}), 3)
        codec.encode({"x": array}, weight=0.5, metrics={}, entropy=keyed(0))
        assert array.tolist() == [0.75, -0.75, 0.5]


@pytest.mark.parametrize("byte", [0x00, 0xFF])
@pytest.mark.parametrize("bits", BITS)
def test_at_the_bound_whatever_u_is(
    byte: int,
    bits: int,
    task: Task,
    rounding_down_or_up: Extreme,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """u → 1 lifts no word beyond 2^f and no exact multiple off itself."""
    rounding_down_or_up(monkeypatch, byte)
    array = np.array([1.0, -1.0, 1 - 2**-53, 2**-53 - 1, 0.5, -0.25])
    metric = Metric("loss", 1.0)
    codec = Codec(task(ring_bits=bits, metrics=(metric,)), Schema.of({"x": array}), 4)
    for loss in (1.0, -1.0):
        vector = codec.encode({"x": array}, weight=1, metrics={"loss": loss}, entropy=bytes)
        words = codec.ring.centred(vector).tolist()
        one = 2**codec.bits
        assert max(map(abs, words)) <= one
        assert (words[:2], words[4:6]) == ([one, -one], [one // 2, -one // 4])
        assert words[6:] == [one, 0, 0, 0, int(loss) * one, 0]
