from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from .federation import Consortium, Federation


@pytest.fixture(scope="session")
def consortium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Consortium]:
    made = Consortium(tmp_path_factory.mktemp("consortium"))
    yield made
    made.close()


@pytest.fixture
def federation(consortium: Consortium, tmp_path: Path) -> Federation:
    return Federation(consortium, tmp_path)
