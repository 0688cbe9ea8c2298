"""Keyed entropy, extreme rounding streams, tasks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from Crypto.Cipher import AES

from secagg.config import Clip, TaskConfig, Weighting
from secagg.crypto.secret import Entropy
from secagg.encoding import fixed
from secagg.ring import native
from secagg.ring.native import Path


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
    """Make every rounding bit the bits of one byte: 0x00 (u = 0) or 0xff (u → 1).

    The kernel's own streams cannot be told to: vectors are made on the path that reads ours.
    """

    def patch(monkeypatch: pytest.MonkeyPatch, byte: int) -> None:
        monkeypatch.setattr(native, "_available", (Path.OPENSSL,))
        monkeypatch.setattr(fixed, "read", lambda _prg, _key, size, _start: bytes([byte]) * size)

    return patch
