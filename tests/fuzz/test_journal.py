"""Journals that are nearly right: the session comes back, or the damage is named.

The database's hashes stop what was changed beneath them (``tests/coordinator/test_damage.py``);
this is what stands behind them, were the records themselves written wrong.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest

from secagg.config import Protection
from secagg.coordinator.journal import MemoryJournal
from secagg.coordinator.retrace import restore
from secagg.disk import LocalDisk
from secagg.errors import ConfigError, StorageDamaged
from secagg.wire._pb import journal_pb2 as pb
from tests.coordinator.play import World

from .mutations import Pool, edit

JOURNALS = 400


class KeepsAll(LocalDisk):
    """So that every journal finds the same files."""

    def remove(self, name: str) -> None:
        """Leave it."""


def changed(rows: list[bytes], pool: Pool, random: Random) -> list[bytes]:
    """Records of which one is changed, gone, there twice, or in another's place."""
    records = [pb.Record.FromString(row) for row in rows]
    at, other = random.randrange(len(rows)), random.randrange(len(rows))
    match random.randrange(6):
        case 0:
            del records[at]
        case 1:
            records.insert(at, records[other])
        case 2:
            records[at], records[other] = records[other], records[at]
        case _:
            edit(records[at], pool, random)
    return [record.SerializeToString() for record in records]


@pytest.mark.parametrize("protection", [Protection.MASKED, Protection.CKKS_MASKED])
def test_a_changed_journal_is_restored_or_refused(tmp_path: Path, protection: Protection) -> None:
    world = World(tmp_path, protection=protection)
    if protection.seals:
        world.make_key()
    world.release()
    world.ready()
    world.tick()
    world.phases(3)
    rows, pool = world.journal.load()[world.session_id], Pool()
    for row in rows:
        pool.add_bytes(pb.Record, row)
    means = replace(world.means, disk=KeepsAll(tmp_path), journal=MemoryJournal())
    seen: Counter[str] = Counter()
    for seed in range(JOURNALS):
        try:
            restore(changed(rows, pool, Random(seed)), means, 0.0)
            seen["restored"] += 1
        except (StorageDamaged, ConfigError) as error:
            seen[type(error).__name__] += 1
    assert seen["restored"] > 50
    assert seen["StorageDamaged"] > 100
