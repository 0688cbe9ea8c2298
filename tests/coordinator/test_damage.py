"""One flipped bit, anywhere in the state directory: refused by name, or outside of what is live."""

from __future__ import annotations

import random
import shutil
from collections import Counter
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from secagg.coordinator.journal import Journal
from secagg.coordinator.sessions import Sessions
from secagg.coordinator.sqlite import SqliteJournal
from secagg.coordinator.standing import Means
from secagg.disk import LocalDisk
from secagg.errors import StorageDamaged

from .play import World
from .test_restart import open_with_weights, picture, read_all

PLACES = 200


def on_disk(world: World, directory: Path, journal: Journal) -> Means:
    """The same coordinator on another state directory."""
    return replace(world.means, disk=LocalDisk(directory), journal=journal)


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> tuple[World, Path, dict[str, object]]:
    """A coordinator that died with weights, a sum and a round's vectors on its disk."""
    root = tmp_path_factory.mktemp("damage")
    with closing(SqliteJournal(root / "state")) as journal:
        world = World(root / "state", journal=journal)
        open_with_weights(world)
        world.release()
        world.ready()
        world.tick()
        world.phases(3)
        copy = shutil.copytree(root / "state", root / "killed")  # the log is still open
        return world, copy, picture(world.session)


def restored(world: World, directory: Path) -> dict[str, object]:
    with closing(SqliteJournal(directory)) as journal:
        sessions = Sessions(on_disk(world, directory, journal))
        sessions.restore(world.now)
        (session,) = sessions.all()
        read_all(session)
        assert {p.name for p in (directory / session.folder / "spool").iterdir()} == {
            f"2-1-{silo}" for silo in "abcd"
        }
        return picture(session)


def refused(world: World, directory: Path, before: dict[str, object]) -> str | None:
    """Why the coordinator does not start there; None if it stands where it stood."""
    try:
        assert restored(world, directory) == before
    except StorageDamaged as error:
        return error.observed
    return None


def test_undamaged(killed: tuple[World, Path, dict[str, object]], tmp_path: Path) -> None:
    world, state, before = killed
    assert restored(world, shutil.copytree(state, tmp_path / "copy")) == before


def test_bits_flipped_anywhere(
    killed: tuple[World, Path, dict[str, object]], tmp_path: Path
) -> None:
    world, state, before = killed
    generator = random.Random(20261122)
    files = sorted(p for p in state.rglob("*") if p.is_file() and not p.name.endswith("-shm"))
    kinds, harmless = Counter[str](), Counter[str]()
    for place in range(PLACES):
        kind = ("spool", "sums", "weights", "journal")[place % 4]
        there = [p for p in files if kind in p.relative_to(state).as_posix() and p.stat().st_size]
        file = generator.choice(there)
        bit = generator.randrange(8 * file.stat().st_size)
        copy = shutil.copytree(state, tmp_path / "copy")
        damaged = copy / file.relative_to(state)
        data = bytearray(damaged.read_bytes())
        data[bit // 8] ^= 1 << bit % 8
        damaged.write_bytes(data)
        kinds[file.name if kind == "journal" else kind] += 1
        refusal = refused(world, copy, before)
        if refusal is None:
            harmless[file.name] += 1
        else:
            named = file.name.partition(".")[0] if kind == "journal" else file.name
            assert named in refusal, (file.name, bit, refusal)
        shutil.rmtree(copy)
    assert not any(name for name in harmless if not name.startswith("journal")), harmless
    assert min(kinds["spool"], kinds["sums"], kinds["weights"]) >= 40
    assert sum(kinds.values()) - sum(harmless.values()) >= 150  # most of it is live
