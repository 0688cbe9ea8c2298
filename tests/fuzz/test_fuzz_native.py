"""A short profile of ``make fuzz-native``, on the kernel that is installed."""

from __future__ import annotations

import pytest

from secagg.ring import native

from .native import fuzz

pytestmark = pytest.mark.skipif(len(native.available()) == 1, reason="no path of ours runs here")


def test_random_calls() -> None:
    outcomes = fuzz(0, calls=600)
    assert outcomes.total() == 600
    for function in ("expand", "encode", "to_words", "fill", "make_ready", "greatest"):
        assert outcomes[function] > 10
        assert outcomes[f"{function} refused"] > 5
