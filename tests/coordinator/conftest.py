from __future__ import annotations

from pathlib import Path

import pytest

from .play import World


@pytest.fixture
def world(tmp_path: Path) -> World:
    """A session of four silos (t = 3) with nothing said yet."""
    return World(tmp_path / "session")
