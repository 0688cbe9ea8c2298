from __future__ import annotations

from pathlib import Path

import pytest

from secagg.pki.authority import Authority

from .builders import CONSORTIUM, NOW


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority.create(tmp_path / "authority", CONSORTIUM, now=NOW)
