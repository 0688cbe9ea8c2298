"""The layout alone, as a codec that needs no ring uses it: reals out, sums of reals in."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from secagg.config import Clip, Metric, TaskConfig, Weighting
from secagg.encoding import layout as module
from secagg.encoding.codec import Codec
from secagg.encoding.layout import Layout
from secagg.encoding.schema import Schema
from secagg.errors import ConfigError, InputError, MalformedMessage

Task = Callable[..., TaskConfig]
METRICS = (Metric("loss", 5.0), Metric("auc", 1.0))
SHAPES: dict[str, tuple[int, ...]] = {"a": (), "b": (2, 0), "c": (2, 3), "d": (5,)}
SIZE = 12
FINE = 2.0**-40


@dataclass(frozen=True, slots=True)
class Plain(Layout):
    """A layout whose numbers stay what they are."""

    @property
    def resolution(self) -> float:
        """2^-40."""
        return FINE


def plain(task: TaskConfig, silos: int = 4) -> Plain:
    return Plain(task, Schema.of({name: np.zeros(shape) for name, shape in SHAPES.items()}), silos)


def tensors_of(values: Sequence[float]) -> dict[str, np.ndarray]:
    """These values in the order of the layout."""
    flat, at, out = np.array(values, np.float64), 0, {}
    for name, shape in SHAPES.items():
        size = math.prod(shape)
        out[name] = flat[at : at + size].reshape(shape)
        at += size
    return out


def numbers(
    layout: Layout, values: Sequence[float], weight: float, **metrics: float
) -> list[float]:
    """All numbers of an update, whatever the pieces were."""
    pieces = list(layout.fractions(tensors_of(values), weight=weight, metrics=metrics))
    assert all(piece.dtype == np.float64 and piece.ndim == 1 for piece in pieces)
    assert len(pieces[-1]) == layout.scalars
    return [float(value) for piece in pieces for value in piece]


def pieces_of(values: Sequence[float], cuts: Sequence[int]) -> Iterator[np.ndarray]:
    """The values, cut anywhere, empty pieces included."""
    whole = np.array(values, np.float64)
    borders = [0, *sorted(min(cut, len(whole)) for cut in cuts), len(whole)]
    for low, high in pairwise(borders):
        yield whole[low:high].copy()


VALUES = st.lists(st.floats(-1, 1), min_size=SIZE, max_size=SIZE)
CUTS = st.lists(st.integers(0, SIZE + 4), max_size=8)


@settings(deadline=None)
@given(
    values=VALUES,
    share=st.floats(1e-6, 1),
    loss=st.floats(-5, 5),
    auc=st.floats(-1, 1),
    bound=st.sampled_from((1.0, 0.01, 300.0)),
    chunk=st.sampled_from((1, 2, 5, 2**18)),
)
def test_an_update_s_numbers_are_weighted_fractions_of_their_bounds(
    values: list[float],
    share: float,
    loss: float,
    auc: float,
    bound: float,
    chunk: int,
    task: Task,
) -> None:
    layout = plain(task(bound=bound, weight_cap=8.0, metrics=METRICS))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_CHUNK", chunk)
        scaled = [value * bound for value in values]
        got = numbers(layout, scaled, 8.0 * share, loss=loss, auc=auc)
    assert len(got) == layout.size == SIZE + 4
    exact = [Fraction(value) * Fraction(share) / Fraction(bound) for value in scaled]
    exact += [Fraction(share), Fraction(0)]
    exact += [Fraction(loss) / 5 * Fraction(share), Fraction(auc) * Fraction(share)]
    for found, right in zip(got, exact, strict=True):
        assert abs(Fraction(found) - right) <= Fraction(1, 2**50)
        assert abs(found) <= 1


@settings(deadline=None)
@given(
    updates=st.lists(
        st.tuples(VALUES, st.floats(0.01, 1), st.floats(-5, 5)), min_size=1, max_size=4
    ),
    weighting=st.sampled_from(Weighting),
    cuts=CUTS,
)
def test_sums_in_pieces_of_any_borders_give_the_mean(
    updates: list[tuple[list[float], float, float]],
    weighting: Weighting,
    cuts: list[int],
    task: Task,
) -> None:
    """Borders inside tensors, on them, in the scalars, empty pieces: the result is the same."""
    cap = 1.0 if weighting is Weighting.SUM else 20.0
    layout = plain(task(weighting=weighting, weight_cap=cap, bound=2.0, metrics=METRICS))
    total = np.zeros(layout.size)
    for values, share, loss in updates:
        doubled = [2 * value for value in values]
        total += numbers(layout, doubled, cap * share, loss=loss, auc=1.0)
    got = layout.aggregate(pieces_of(total.tolist(), cuts))
    whole = layout.aggregate([total])
    shares = sum(share for _, share, _ in updates)
    divisor = shares if weighting is Weighting.MEAN else 1.0
    flat = [float(x) for array in got.tensors.values() for x in array.reshape(-1)]
    for at, found in enumerate(flat):
        exact = sum(2 * values[at] * share for values, share, _ in updates) / divisor
        assert found == pytest.approx(exact, abs=1e-12)
    assert {name: array.shape for name, array in got.tensors.items()} == SHAPES
    assert all(array.dtype == np.float64 for array in got.tensors.values())
    assert got.weight == pytest.approx(cap * shares, rel=1e-12)
    loss = sum(share * loss for _, share, loss in updates) / shares
    assert got.metrics == pytest.approx({"loss": loss, "auc": 1.0}, abs=1e-12)
    assert (got.weight, got.metrics, got.clipped) == (whole.weight, whole.metrics, whole.clipped)
    for name, array in whole.tensors.items():
        assert array.tolist() == got.tensors[name].tolist()


def test_every_border_one_by_one(task: Task) -> None:
    layout = plain(task(metrics=METRICS))
    total = [i / 32 for i in range(SIZE)] + [1.0, 0.25, 0.5, 0.125]
    whole = layout.aggregate([np.array(total)])
    for cut in range(len(total) + 1):
        got = layout.aggregate(pieces_of(total, [cut]))
        assert got.tensors["d"].tolist() == whole.tensors["d"].tolist() == total[7:12]
        assert (got.metrics, got.clipped) == ({"loss": 2.5, "auc": 0.125}, 0.25 * SIZE)
    singles = layout.aggregate(pieces_of(total, range(len(total))))
    assert singles.tensors["c"].tolist() == [total[1:4], total[4:7]]


def test_a_result_is_the_caller_s_own(task: Task) -> None:
    """Neither the pieces nor a later result share its memory."""
    layout = plain(task())
    total = np.concatenate([np.ones(SIZE), [1.0, 0.0]])
    first, second = layout.aggregate([total]), layout.aggregate([total])
    first.tensors["d"][:] = 9.0
    assert total[:SIZE].tolist() == [1.0] * SIZE
    assert second.tensors["d"].tolist() == [1.0] * 5


def test_fractions_are_fresh_arrays(task: Task) -> None:
    held = tensors_of([0.5] * SIZE)
    for clip in Clip:
        for piece in plain(task(clip=clip)).fractions(held, weight=1.0, metrics={}):
            piece[:] = 7.0
    assert all((array == 0.5).all() for array in held.values())


@pytest.mark.parametrize("share", [0.0, -0.0, -1e-9, -1.0, math.nan, -math.inf])
def test_a_sum_without_weight_is_refused(share: float, task: Task) -> None:
    layout = plain(task())
    with pytest.raises(MalformedMessage) as caught:
        layout.aggregate([np.zeros(SIZE), np.array([share, 0.0])])
    assert caught.value.code == "result-weight"


def test_a_sum_weighs_no_more_than_all_silos(task: Task) -> None:
    layout = plain(task(), silos=4)
    most = 4 * (1 + FINE)
    assert layout.aggregate([np.zeros(SIZE), np.array([most, 0.0])]).weight == most
    for share in (math.nextafter(most, 5), 5.0, 1e300, math.inf):
        with pytest.raises(MalformedMessage) as caught:
            layout.aggregate([np.zeros(SIZE), np.array([share, 0.0])])
        assert caught.value.code == "result-weight"


def bad(**changes: Any) -> dict[str, Any]:
    values = {"tensors": tensors_of([0.5] * SIZE), "weight": 4.0, "metrics": {"loss": 1, "auc": 1}}
    return values | changes


REFUSED: dict[str, tuple[str, dict[str, Any]]] = {
    "missing tensor": ("tensor-names", bad(tensors={"a": np.zeros(())})),
    "shape": ("tensor-shape", bad(tensors={**tensors_of([0.5] * SIZE), "d": np.zeros(4)})),
    "integers": ("tensor-dtype", bad(tensors={**tensors_of([0.5] * SIZE), "d": np.zeros(5, int)})),
    "bound": ("tensor-bound", bad(tensors=tensors_of([0.5] * 11 + [1.01]))),
    "nan": ("tensor-finite", bad(tensors=tensors_of([0.5] * 11 + [math.nan]))),
    "infinity": ("tensor-finite", bad(tensors=tensors_of([-math.inf] + [0.5] * 11))),
    "no weight": ("weight", bad(weight=0.0)),
    "less than the resolution": ("weight", bad(weight=8.0 * FINE * 0.999)),
    "beyond the cap": ("weight", bad(weight=8.001)),
    "weight nan": ("weight", bad(weight=math.nan)),
    "metric missing": ("metric-names", bad(metrics={"loss": 1.0})),
    "metric unknown": ("metric-names", bad(metrics={"loss": 1, "auc": 1, "f1": 1})),
    "metric beyond": ("metric-bound", bad(metrics={"loss": 5.01, "auc": 1})),
    "metric nan": ("metric-bound", bad(metrics={"loss": 1.0, "auc": math.nan})),
}


@pytest.mark.parametrize(("code", "update"), REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_be_encoded_is_refused_before_the_first_number(
    code: str, update: dict[str, Any], task: Task
) -> None:
    """By the check alone, and by the iterator before it yields anything."""
    layout = plain(task(weight_cap=8.0, metrics=METRICS))
    tensors, rest = update["tensors"], {k: update[k] for k in ("weight", "metrics")}
    with pytest.raises(InputError) as caught:
        layout.check(tensors, **rest)
    assert caught.value.code == code
    with pytest.raises(InputError) as again:
        next(layout.fractions(tensors, **rest))
    assert (again.value.code, again.value.observed) == (code, caught.value.observed)


def test_a_check_takes_what_can_be_encoded_and_changes_nothing(task: Task) -> None:
    for clip in Clip:
        layout = plain(task(weight_cap=8.0, clip=clip, metrics=METRICS))
        update = bad(tensors=tensors_of([1.0, -1.0] * 6))
        assert layout.check(update.pop("tensors"), **update) is None  # type: ignore[func-returns-value]
    layout = plain(task(weight_cap=8.0, metrics=METRICS))
    update = bad(weight=8.0 * FINE)
    layout.check(update.pop("tensors"), **update)


@pytest.mark.parametrize(("clip", "count"), [(Clip.ELEMENT, 2), (Clip.L2, 12)])
def test_clipped_elements_are_counted_whatever_the_weight(
    clip: Clip, count: int, task: Task
) -> None:
    values = [3.0, -3.0] + [0.5] * 10
    layout = plain(task(clip=clip, weight_cap=8.0))
    got = layout.aggregate([np.array(numbers(layout, values, 2.0))])
    assert got.clipped == pytest.approx(count)
    flat = [float(x) for array in got.tensors.values() for x in array.reshape(-1)]
    norm = math.sqrt(sum(value * value for value in values))
    scale = (
        [1 / 3 if abs(v) > 1 else 1 for v in values] if clip is Clip.ELEMENT else [1 / norm] * 12
    )
    assert flat == pytest.approx([v * s for v, s in zip(values, scale, strict=True)], rel=1e-12)


def test_a_codec_of_words_needs_words(task: Task) -> None:
    """A sealed session's task has none; what would ask for them is told so."""
    codec = Codec(task(ring_bits=None), Schema.of({"x": np.zeros(2)}), 4)
    assert (codec.size, codec.scalars) == (4, 2)
    for ask in (
        lambda: codec.word_bits,
        lambda: codec.ring,
        lambda: codec.bits,
        lambda: codec.resolution,
    ):
        with pytest.raises(ConfigError) as caught:
            ask()
        assert caught.value.code == "ring"
