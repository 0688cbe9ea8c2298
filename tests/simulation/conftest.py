"""Replayable entropy, and a memory of signatures that were already checked."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache

import pytest
from Crypto.Cipher import AES

from secagg.crypto.secret import Entropy
from secagg.crypto.sign import verify
from secagg.masking import client, server


def _keyed(seed: int) -> Entropy:
    stream = AES.new(seed.to_bytes(16, "big"), AES.MODE_CTR, nonce=b"", initial_value=0)
    return lambda size: stream.encrypt(bytes(size))


@pytest.fixture(scope="session")
def keyed() -> Callable[[int], Entropy]:
    """A deterministic source of uniform bytes, by seed."""
    return _keyed


@pytest.fixture
def signatures_once() -> Iterator[None]:
    """Check each signature once instead of once per silo: ``verify`` is a pure function.

    A refusal is an exception and is never remembered.
    """
    remembered = lru_cache(maxsize=4096)(verify)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(client, "verify", remembered)
        patch.setattr(server, "verify", remembered)
        yield
