"""Encoding and masking in one pass: what two passes give, to the bit, or an error and nothing."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from secagg.config import Clip, MaskPrg, Metric, TaskConfig
from secagg.crypto.prg import key_bytes
from secagg.crypto.secret import Entropy, Secret
from secagg.encoding import codec as module
from secagg.encoding.codec import Codec
from secagg.encoding.schema import Schema
from secagg.errors import InputError
from secagg.ring import native
from secagg.ring.expand import Mask, apply_masks
from secagg.ring.native import Path
from secagg.ring.vectors import Vector

Keyed = Callable[[int], Entropy]
Task = Callable[..., TaskConfig]
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
FORMATS = (np.dtype(np.float16), np.dtype(np.float32), np.dtype(np.float64), BFLOAT16)
PATHS = native.available()
SIZES = {"a": 13, "b": 0, "c": 1, "d": 64, "e": 7, "f": 130}


def masks_of(prg: MaskPrg, count: int) -> list[Mask]:
    return [Mask(Secret(bytes([i + 1]) * key_bytes(prg)), add=i % 2 == 0) for i in range(count)]


def tensors_of(dtypes: Sequence[np.dtype[Any]] = FORMATS) -> dict[str, np.ndarray]:
    """Odd sizes and several formats, some beyond the bound."""
    out = {}
    for number, (name, size) in enumerate(SIZES.items()):
        values = 1.3 * np.sin(np.arange(size) * 0.7 + number)
        out[name] = values.astype(dtypes[number % len(dtypes)])
    return out


def on(patch: pytest.MonkeyPatch, path: Path) -> None:
    patch.setattr(native, "_available", (path,))


@settings(deadline=None, max_examples=30)
@given(
    bits=st.sampled_from((16, 32, 64)),
    clip=st.sampled_from((Clip.ELEMENT, Clip.L2)),
    prg=st.sampled_from(MaskPrg),
    count=st.integers(0, 4),
    threads=st.sampled_from((1, 2, 3, 7, None)),
    part=st.sampled_from((1, 8, 31, 64, 1000)),
    seed=st.integers(0, 2**32),
)
def test_one_pass_is_two_passes(
    bits: int,
    clip: Clip,
    prg: MaskPrg,
    count: int,
    threads: int | None,
    part: int,
    seed: int,
    task: Task,
    keyed: Keyed,
) -> None:
    """On every path, over any number of threads, wherever parts end."""
    tensors = tensors_of()
    config = task(ring_bits=bits, clip=clip, metrics=(Metric("loss", 2.0),), weight_cap=4.0)
    codec = Codec(config, Schema.of(tensors), 5)
    masks = masks_of(prg, count)
    update: dict[str, Any] = {"weight": 3.0, "metrics": {"loss": -0.3}}
    with pytest.MonkeyPatch.context() as patch:
        on(patch, Path.OPENSSL)
        expected = codec.encode(tensors, **update, entropy=keyed(seed), prg=prg, threads=1)
        apply_masks(codec.ring, expected, masks, prg, path=Path.OPENSSL, threads=1)
        patch.setattr(module, "_PART", part)
        for path in PATHS:
            on(patch, path)
            encoded = codec.encoded(tensors, **update, entropy=keyed(seed))
            np.testing.assert_array_equal(encoded(masks, prg), expected, path)
            got = codec.encode(
                tensors, **update, entropy=keyed(seed), masks=masks, prg=prg, threads=threads
            )
            np.testing.assert_array_equal(got, expected, path)


@pytest.mark.parametrize("path", PATHS)
def test_real_parts(path: Path, task: Task, keyed: Keyed, monkeypatch: pytest.MonkeyPatch) -> None:
    """Enough elements for threads that nobody asked for."""
    on(monkeypatch, path)
    size = 2**18 + 3
    tensors = {"x": np.sin(np.arange(size)).astype(np.float32), "y": np.ones(5)}
    codec = Codec(task(), Schema.of(tensors), 4)
    masks = masks_of(MaskPrg.AES_128_CTR, 2)
    update: dict[str, Any] = {"tensors": tensors, "weight": 1.0, "metrics": {}}
    expected = codec.encode(**update, entropy=keyed(1), threads=1)
    apply_masks(codec.ring, expected, masks, MaskPrg.AES_128_CTR)
    got = codec.encode(**update, entropy=keyed(1), masks=masks)
    np.testing.assert_array_equal(got, expected)


def test_the_rounding_key_is_drawn_once_each_time_and_is_no_mask_s(task: Task) -> None:
    """An update that is put off has none yet: two rounds of it share no rounding."""
    drawn: list[bytes] = []

    def entropy(size: int) -> bytes:
        drawn.append(bytes([len(drawn) + 65]) * size)
        return drawn[-1]

    codec = Codec(task(), Schema.of({"x": np.zeros(64)}), 4)
    encoded = codec.encoded({"x": np.full(64, 1 / 3)}, weight=1, metrics={}, entropy=entropy)
    assert drawn == []
    for prg in MaskPrg:
        one, other = encoded((), prg), encoded((), prg)
        assert [len(key) for key in drawn[-2:]] == [key_bytes(prg)] * 2
        assert len(set(drawn)) == len(drawn)
        assert one.tolist() != other.tolist()
        assert int(np.abs(codec.ring.centred(one - other)).max()) == 1
        mask = masks_of(prg, 1)
        masked = encoded(mask, prg)
        apply_masks(codec.ring, masked, [mask[0].inverse()], prg)
        assert int(np.abs(codec.ring.centred(masked - one)).max()) <= 1
    assert len(drawn) == 6


def refusal(
    codec: Codec, tensors: dict[str, np.ndarray], threads: int | None, keyed: Keyed
) -> InputError:
    masks = masks_of(MaskPrg.AES_128_CTR, 1)
    with pytest.raises(InputError) as caught:
        codec.encode(tensors, weight=1, metrics={}, entropy=keyed(0), masks=masks, threads=threads)
    return caught.value


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("clip", Clip)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("at", [0, 9, 50, 63])
def test_one_bad_number_in_any_part(
    path: Path,
    clip: Clip,
    bad: float,
    at: int,
    task: Task,
    keyed: Keyed,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The parts before it and after it are good, and one thread or another comes last."""
    on(monkeypatch, path)
    monkeypatch.setattr(module, "_PART", 8)
    for dtype in FORMATS:
        values = np.linspace(-1, 1, 64).astype(dtype)
        values[at] = bad
        tensors = {"a": np.ones(3), "b": values, "c": np.ones(9)}
        codec = Codec(task(clip=clip), Schema.of(tensors), 4)
        for threads in (1, 3, None):
            error = refusal(codec, tensors, threads, keyed)
            assert (error.code, "'b'" in str(error)) == ("tensor-finite", True)
        with pytest.raises(InputError):
            codec.check(tensors, weight=1, metrics={})


@pytest.mark.parametrize("path", PATHS)
def test_a_number_beyond_the_bound_in_any_part(
    path: Path, task: Task, keyed: Keyed, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where it is so great that no word is left of it; the first such tensor is named."""
    on(monkeypatch, path)
    monkeypatch.setattr(module, "_PART", 8)
    for value in (1.0000001, 1e5, 1e300, -1.7e308):
        for at in (0, 20, 39):
            values = np.zeros(40)
            values[at] = value
            tensors = {"a": np.ones(3), "b": values, "c": values}
            codec = Codec(task(), Schema.of(tensors), 4)
            error = refusal(codec, tensors, 2, keyed)
            assert (error.code, f"'b' reaches {abs(value):.9g}" in str(error)) == (
                "tensor-bound",
                True,
            )


def test_nothing_is_drawn_or_made_of_what_is_refused_at_once(task: Task) -> None:
    def entropy(size: int) -> bytes:
        raise AssertionError("nothing to draw a key for")

    codec = Codec(task(), Schema.of({"x": np.zeros(4)}), 4)
    for tensors, weight, code in (
        ({"x": np.zeros(4)}, 2.0, "weight"),
        ({"x": np.zeros(3)}, 1.0, "tensor-shape"),
        ({}, 1.0, "tensor-names"),
    ):
        encoded = codec.encoded(tensors, weight=weight, metrics={}, entropy=entropy)
        with pytest.raises(InputError) as caught:
            encoded((), MaskPrg.AES_128_CTR)
        assert caught.value.code == code


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("clip", Clip)
@pytest.mark.parametrize("bits", [16, 32, 64])
def test_bfloat16_is_what_it_is_in_single_precision(
    path: Path,
    clip: Clip,
    bits: int,
    task: Task,
    keyed: Keyed,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    on(monkeypatch, path)
    values = (0.99 * np.sin(np.arange(600))).astype(BFLOAT16).reshape(20, 30)
    codec = Codec(task(clip=clip, ring_bits=bits), Schema.of({"x": values}), 4)

    def encode(array: np.ndarray) -> Vector:
        return codec.encode({"x": array}, weight=1, metrics={}, entropy=keyed(3))

    expected = encode(values.astype(np.float32))
    for array in (
        values,
        np.asfortranarray(values),
        np.repeat(values, 2, axis=1)[:, ::2],
        values.astype(values.dtype.newbyteorder(">")),
    ):
        np.testing.assert_array_equal(encode(array), expected)


@pytest.mark.parametrize(
    "dtype", ["float8_e4m3fn", "float8_e5m2", "int4", "float4_e2m1fn", "float8_e8m0fnu"]
)
def test_other_small_formats_are_refused_by_name(dtype: str, task: Task, keyed: Keyed) -> None:
    tensors = {"x": np.ones(4).astype(getattr(ml_dtypes, dtype))}
    codec = Codec(task(), Schema.of(tensors), 4)
    error = refusal(codec, tensors, None, keyed)
    assert error.code == "tensor-dtype"
    assert dtype in str(error)
    assert "bfloat16" in str(error)


@pytest.mark.parametrize("bits", [16, 32, 64])
def test_l2_clipping_is_exact_to_a_unit(bits: int, task: Task, keyed: Keyed) -> None:
    """One product for the clip and the scale: no second rounding shows."""
    values = np.linspace(-3, 5, 200)
    codec = Codec(task(clip=Clip.L2, bound=0.3, ring_bits=bits), Schema.of({"x": values}), 4)
    vector = codec.encode({"x": values}, weight=1, metrics={}, entropy=keyed(5))
    exact = values / math.sqrt(float(values @ values)) * 2.0**codec.bits
    words = codec.ring.centred(vector)[:200].astype(np.float64)
    assert float(np.abs(words - exact).max()) < 1 + 2.0 ** (codec.bits - 50)
