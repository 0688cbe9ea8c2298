"""A short profile of the matrix; ``python -m tests.crash`` runs the long one.

Its kill points are found by meaning in one undisturbed run: the syncs that make an accepted
MaskedInput, the end of the collection and the released result durable, and the ledger's.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence

import pytest

from .harness import KILLED, Template, Verdict
from .matrix import Pool, plans_at, random_plans, window
from .shim import SYNCS, Call

pytestmark = [
    pytest.mark.process,
    pytest.mark.skipif(shutil.which("gcc") is None, reason="the shim needs gcc"),
]
RESTART_SECONDS = 10.0


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Pool:
    root = tmp_path_factory.mktemp("crash").resolve()
    return Pool(Template.make(root / "template"), root / "runs", jobs=2)


@pytest.fixture(scope="module")
def counted(pool: Pool) -> dict[str, Verdict]:
    return pool.count(("coordinator", "silo"))


def spread(calls: Sequence[Call], number: int) -> list[Call]:
    """Points from the first to the last."""
    return [calls[place * (len(calls) - 1) // (number - 1)] for place in range(number)]


def judge(verdicts: list[Verdict]) -> None:
    assert [(v.plan, v.death, v.failures) for v in verdicts if v.failures] == []
    assert max((r for v in verdicts for r in v.restarts), default=0.0) < RESTART_SECONDS


def named_points(counted: Verdict) -> list[Call]:
    """An accepted MaskedInput, the close of MaskedInput, the released result: their syncs."""
    calls, records = counted.calls, counted.records
    commits = [c for c in calls if c.op in SYNCS and c.path.endswith("-wal")]
    collected = window(commits, records, "masked_input", "consistency")
    sum_stored = next(c.index for c in calls if c.op == "rename" and "/sums/" in c.path)
    released = next(c for c in commits if c.index > sum_stored)
    return [collected[0], collected[-1], released]


def test_the_coordinator_goes_on_from_any_write(pool: Pool, counted: dict[str, Verdict]) -> None:
    points = {c.index: c for c in named_points(counted["coordinator"])}
    for call in spread(counted["coordinator"].calls, 6):
        if len(points) < 6:
            points.setdefault(call.index, call)
    verdicts = pool.run([p for p in plans_at("coordinator", points.values()) if p.side != "torn"])
    assert any(verdict.died for verdict in verdicts)
    judge(verdicts)


def test_a_silo_goes_on_from_any_write(pool: Pool, counted: dict[str, Verdict]) -> None:
    calls, records = counted["silo"].calls, counted["silo"].records
    ledger = [c for c in calls if c.op in SYNCS and "ledger" in c.path]
    own = [record for record in records if record["silo"] == KILLED]
    revealed = window(ledger, own, "consistency", "unmasking")
    points = {c.index: c for c in (*spread(ledger, 3), revealed[-1])}
    verdicts = pool.run(plans_at("silo", points.values()))
    assert all(verdict.died for verdict in verdicts)
    judge(verdicts)


def test_anybody_goes_on_from_any_moment(pool: Pool, counted: dict[str, Verdict]) -> None:
    spans = {target: verdict.play_ms for target, verdict in counted.items()}
    judge(pool.run(random_plans(6, 20261122, spans)))
