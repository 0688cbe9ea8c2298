"""Updates on a GPU, without one: which path is taken, and that all give the same words."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from subprocess import SubprocessError
from typing import Any

import numpy as np
import pytest
import torch

from client_sdk import device
from client_sdk.checkpoint import Update
from client_sdk.tensors import GlobalWeights, to_arrays
from secagg.config import Clip, MaskPrg, TaskConfig, Weighting
from secagg.crypto.prg import read
from secagg.crypto.secret import Secret
from secagg.encoding.codec import Codec
from secagg.encoding.schema import Schema
from secagg.ring import native
from secagg.ring.expand import Mask, apply_masks
from secagg.ring.gpu import launch
from secagg.ring.gpu.launch import DeviceFailed
from secagg.ring.vectors import Vector

CHACHA = MaskPrg.CHACHA20
MASKS = [Mask(Secret(bytes([i]) * 32), add=i % 2 == 0) for i in range(3)]
TENSORS = {"b": torch.linspace(-2, 2, 7), "a": torch.linspace(-0.5, 1.5, 12).reshape(3, 4)}
ARRAYS = to_arrays(TENSORS)


def codec(clip: Clip = Clip.ELEMENT) -> Codec:
    task = TaskConfig("training", Weighting.MEAN, 1, 1.0, clip, 100.0, 32)
    return Codec(task, Schema.of(ARRAYS), 4)


def entropy(size: int) -> bytes:
    return bytes(range(size))


def on_host(clip: Clip) -> list[int]:
    made = codec(clip).encode(
        ARRAYS, weight=50.0, metrics={}, entropy=entropy, masks=MASKS, prg=CHACHA
    )
    return made.tolist()


def stand_in(pieces: Sequence[torch.Tensor], **given: Any) -> tuple[Vector, int]:
    """What the device does, by the slow path of the host."""
    values = np.concatenate([piece.numpy().reshape(-1) for piece in pieces])
    vector = given["ring"].zeros(given["length"])
    uniform = np.frombuffer(read(CHACHA, given["rounding_key"], 4 * len(values)), "<u4")
    to = {name: given[name] for name in ("clip", "factor", "limit")}
    _, clipped = native.to_words(values, vector[: len(values)], uniform, **to)
    apply_masks(given["ring"], vector[: len(values)], given["masks"], CHACHA)
    return vector, clipped


def encoded(clip: Clip) -> list[int]:
    update = Update(ARRAYS, 50.0, {}, TENSORS)
    return device.encoded(codec(clip), update, TENSORS, entropy)(MASKS, CHACHA).tolist()


@pytest.mark.parametrize("clip", [Clip.ELEMENT, Clip.L2])
def test_words_are_those_of_the_host(clip: Clip, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors in the layout's order, the scalars behind them, all with the masks on."""
    monkeypatch.setattr(device, "obstacle", lambda *_: None)
    monkeypatch.setattr(device, "encode_and_mask", stand_in)
    assert encoded(clip) == on_host(clip)


def test_a_device_that_fails_is_said_and_the_host_takes_over(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise DeviceFailed("gpu-memory", "The GPU has no memory left for the update.")

    monkeypatch.setattr(device, "obstacle", lambda *_: None)
    monkeypatch.setattr(device, "encode_and_mask", fail)
    with caplog.at_level(logging.WARNING):
        assert encoded(Clip.ELEMENT) == on_host(Clip.ELEMENT)
    assert "this round is masked on the host" in caplog.text


class CompilationError(Exception):
    """Triton's own; not a RuntimeError."""


@pytest.mark.parametrize(
    ("failure", "code"),
    [
        (torch.cuda.OutOfMemoryError("of the device"), "gpu-memory"),
        (RuntimeError("of the device"), "gpu-failed"),
        (AssertionError("of the device"), "gpu-failed"),
        (ImportError("of the device"), "gpu-failed"),
        (CompilationError("of the device"), "gpu-failed"),
        (OSError("of the device"), "gpu-failed"),
        (SubprocessError("of the device"), "gpu-failed"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_however_a_device_fails_the_host_takes_over(
    failure: Exception, code: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A compiler that is not there, a driver of another version, a bare assert: no round is lost.

    What is said quotes no exception: its text may hold whatever a compiler was given.
    """

    def fail(*_: Any, **__: Any) -> Any:
        raise failure

    monkeypatch.setattr(device, "obstacle", lambda *_: None)
    monkeypatch.setattr(launch, "_launch", fail)
    with caplog.at_level(logging.WARNING):
        assert encoded(Clip.ELEMENT) == on_host(Clip.ELEMENT)
    assert f"this round is masked on the host: [{code}]" in caplog.text
    assert "of the device" not in caplog.text


def test_a_kernel_that_cannot_be_imported(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Triton's folder is there, and what it needs is not."""
    monkeypatch.setattr(device, "obstacle", lambda *_: None)
    monkeypatch.setitem(sys.modules, "secagg.ring.gpu.kernels", None)
    with caplog.at_level(logging.WARNING):
        assert encoded(Clip.ELEMENT) == on_host(Clip.ELEMENT)
    assert "ModuleNotFoundError" in caplog.text


@pytest.mark.parametrize(
    "failure", [ValueError("ours"), OverflowError("ours"), KeyboardInterrupt()]
)
def test_what_is_not_the_device_s_is_not_hidden(
    failure: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise failure

    monkeypatch.setattr(device, "obstacle", lambda *_: None)
    monkeypatch.setattr(launch, "_launch", fail)
    with pytest.raises(type(failure)):
        encoded(Clip.ELEMENT)


@pytest.mark.parametrize(
    "other",
    [
        {"a": TENSORS["a"].T, "b": TENSORS["b"]},
        {"a": TENSORS["a"].reshape(-1), "b": TENSORS["b"]},
        {"a": TENSORS["b"], "b": TENSORS["a"]},
        {"a": TENSORS["a"][:2], "b": TENSORS["b"]},
        {"a": TENSORS["a"].double(), "b": torch.zeros(7, 1)},
    ],
    ids=["turned", "flat", "exchanged", "cut", "deeper"],
)
def test_tensors_of_other_shapes_are_not_the_update(
    other: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many numbers in another order would be summed with the others' unnoticed."""
    monkeypatch.setattr(device, "obstacle", lambda *_: None)
    monkeypatch.setattr(device, "encode_and_mask", None)
    with pytest.raises(ValueError, match="not the update's"):
        device.encoded(codec(), Update(ARRAYS, 50.0, {}, other), other, entropy)


def test_what_lies_on_no_gpu_is_masked_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "encode_and_mask", None)
    assert encoded(Clip.ELEMENT) == on_host(Clip.ELEMENT)


def test_no_memory_for_the_difference_on_the_gpu(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    weights = GlobalWeights(TENSORS, None)
    really, places = weights._delta, []

    def delta(tensors: Any, *, on_gpu: bool) -> Any:
        places.append(on_gpu)
        if on_gpu:
            raise torch.cuda.OutOfMemoryError
        return really(tensors, on_gpu=False)

    monkeypatch.setattr(weights, "_delta", delta)
    moved = {name: tensor + 0.25 for name, tensor in TENSORS.items()}
    with caplog.at_level(logging.WARNING):
        found = weights.delta(moved)
    assert places == [True, False]
    assert all(torch.equal(found[name], moved[name] - TENSORS[name]) for name in TENSORS)
    assert "no memory left" in caplog.text
