"""Keyed entropy, extreme rounding streams, tasks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from Crypto.Cipher import AES

from secagg.config import Clip, TaskConfig, Weighting
from secagg.crypto.secret import Entropy
from secagg.encoding import fixed


def _keyed(seed: int) -> Entropy:
    stream = AES.new(seed.to_bytes(16, "big"), AES.MODE_CTR, nonce=b"", initial_value=0)
    return lambda size: stream.encrypt(bytes(size))


def _task(**changes: Any) -> TaskConfig:
    numbers: dict[str, Any] = {
        "name": "task",
        "weighting": Weighting.MEAN,
        "rounds": 1,
        "ring_bits": 32,
        "bound": 1.0,
        "clip": Clip.NONE,
        "weight_cap": 1.0,
    }
    return TaskConfig(**(numbers | changes))


class _Constant:
    """A stream of one byte: u as small or as great as it gets."""

    def __init__(self, byte: int) -> None:
        self.byte = bytes([byte])

    def update_into(self, zeros: memoryview, out: memoryview, /) -> int:
        assert not any(zeros[:64])
        out[: len(zeros)] = self.byte * len(zeros)
        return len(zeros)


@pytest.fixture(scope="session")
def keyed() -> Callable[[int], Entropy]:
    """A deterministic source of uniform bytes, by seed."""
    return _keyed


@pytest.fixture(scope="session")
def task() -> Callable[..., TaskConfig]:
    """A task, by what differs from an unclipped mean in words of 32 bits."""
    return _task


@pytest.fixture(scope="session")
def rounding_down_or_up() -> Callable[[pytest.MonkeyPatch, int], None]:
    """Make every rounding bit the bits of one byte: 0x00 (u = 0) or 0xff (u → 1)."""

    def patch(monkeypatch: pytest.MonkeyPatch, byte: int) -> None:
        monkeypatch.setattr(fixed, "open_stream", lambda *_: _Constant(byte))

    return patch
