from __future__ import annotations

import os

import pytest
from hypothesis import settings

from .harness import Play

EXAMPLES = int(os.environ.get("SECAGG_EXAMPLES", "500"))
settings.register_profile("secagg-masking", max_examples=EXAMPLES, deadline=None)


@pytest.fixture
def play() -> Play:
    """A fresh attempt of four silos (t = 3, n_c = 1), nothing said yet."""
    return Play()
