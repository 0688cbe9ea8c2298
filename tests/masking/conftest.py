from __future__ import annotations

import os

import pytest

from .harness import Play

EXAMPLES = int(os.environ.get("SECAGG_EXAMPLES", "500"))
"""Attempts that Hypothesis plays: 500 by default, 20,000 for the done-criterion."""


@pytest.fixture
def play() -> Play:
    """A fresh attempt of four silos (t = 3, n_c = 1), nothing said yet."""
    return Play()
