"""Runs of the suite: once whole, with the checks watched, then a little of it for each mutant.

Most mutants die in a fork of a process that has collected all tests (``rush``). What is left has a
process of its own, in which the check is missing from the first import on (``judge``).
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.mutants.forks import KILLERS, PLAN
from tests.mutants.hook import Order
from tests.mutants.marks import Mark
from tests.mutants.outcomes import OPTION

_A_FEW = 8
"""Tests that a mutant meets in a fork: nearly always one of them kills it."""
_WHOLE_SUITE_S = 3600.0
_CONTROL_S = 300.0


@dataclass(frozen=True, slots=True)
class Suite:
    """What is tested, and by which tests.

    Args:
        root: the folder to run in, which has a pyproject.toml.
        packages: whose marks count.
        tests: paths below the root.
    """

    root: Path
    packages: tuple[str, ...]
    tests: tuple[str, ...]


class BaselineFailed(Exception):
    """The suite does not pass as it is, so a failing test would say nothing about a mutant."""


class Fate(StrEnum):
    """What became of a mutant. Only the first two are good."""

    KILLED = "killed"
    CRASHED = "crashed"
    """Killed, but its mark is a lone ``raise``: a test got there, and hardly needed to look."""
    SURVIVED = "survived"
    BROKEN = "broken"
    """The tests could not be run, or the one that failed fails with all checks in place, too."""
    HUNG = "hung"
    """The tests did not come to an end: perhaps noticed, perhaps not."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """A mutant's fate, and why: the test that failed, or what was tried in vain."""

    mark: Mark
    fate: Fate
    why: str

    @classmethod
    def killed(cls, mark: Mark, killer: str) -> Verdict:
        """The verdict on a mutant that a sound test has killed."""
        return cls(mark, Fate.CRASHED if mark.lone else Fate.KILLED, killer)

    @property
    def good(self) -> bool:
        """Whether a test notices."""
        return self.fate in (Fate.KILLED, Fate.CRASHED)


@dataclass(frozen=True, slots=True)
class _Run:
    code: int | None
    seconds: dict[str, float]
    failed: list[str]
    output: str


def refusals(suite: Suite, jobs: int) -> dict[str, list[str]]:
    """Run the suite with all checks watched.

    Returns:
        For each check that refused something, the tests in which it did, quickest first; if it was
        in a process that a test had started, the others of its module after them.

    Raises:
        BaselineFailed: a test failed.
    """
    with TemporaryDirectory() as folder:
        log = Path(folder) / "refusals"
        log.touch()
        split = ["-n", str(jobs), "--dist", "worksteal"] if jobs > 1 else []
        order = Order(suite.packages, log=str(log))
        run = _pytest(suite, order, split, suite.tests, _WHOLE_SUITE_S)
        if run.code != 0:
            raise BaselineFailed("\n".join(run.failed) or run.output)
        lines = {tuple(line.split("\t")) for line in log.read_text().splitlines()}
    return _noticing(lines, run.seconds)


def _noticing(
    lines: Iterable[tuple[str, ...]], seconds: Mapping[str, float]
) -> dict[str, list[str]]:
    """Return each check's tests: those in which it refused, then others that it may have served."""
    near, far = defaultdict(set), defaultdict(set)
    for name, test, where in lines:
        if test in seconds:
            near[name].add(test)
        if where == "elsewhere":
            module = test.partition("::")[0] + "::"
            far[name] |= {other for other in seconds if other.startswith(module)}
    by_time = seconds.__getitem__
    return {
        name: sorted(near[name], key=by_time) + sorted(far[name] - near[name], key=by_time)
        for name in near.keys() | far.keys()
    }


def rush(suite: Suite, tests: Mapping[str, Sequence[str]], jobs: int) -> dict[str, str]:
    """Run a few tests of each mutant in forks.

    Args:
        suite: what is tested.
        tests: of each check, quickest first.
        jobs: processes at a time.

    Returns:
        For each mutant that a test has killed, the test; it passes where nothing is left out.
    """
    names = sorted(tests)
    plans = [{name: tests[name][:_A_FEW] for name in names[job::jobs]} for job in range(jobs)]
    with ThreadPoolExecutor(jobs) as pool:
        found = list(pool.map(lambda plan: _forked(suite, plan), filter(None, plans)))
    return {name: killer for killers in found for name, killer in killers.items()}


def _forked(suite: Suite, plan: Mapping[str, Sequence[str]]) -> dict[str, str]:
    files = sorted({test.partition("::")[0] for tests in plan.values() for test in tests})
    with TemporaryDirectory() as folder:
        wanted, killers = Path(folder) / "plan", Path(folder) / "killers"
        wanted.write_text(json.dumps(plan))
        options = ["-p", "tests.mutants.forks", PLAN, str(wanted), KILLERS, str(killers)]
        run = _pytest(suite, Order(suite.packages), options, files, _WHOLE_SUITE_S)
        if run.code != 0:
            raise BaselineFailed(run.output)
        found: dict[str, str] = json.loads(killers.read_text())
    return found


def judge(suite: Suite, mark: Mark, tests: Sequence[str]) -> Verdict:
    """Run all of a mutant's tests until one fails, in a new process."""
    if not tests:
        return Verdict(mark, Fate.SURVIVED, "it refuses nothing in any test")
    order = Order(suite.packages, without=mark.name)
    run = _pytest(suite, order, ["-x"], tests, 120.0 + 20 * len(tests))
    if run.code is None:
        return Verdict(mark, Fate.HUNG, f"among {', '.join(tests)}")
    if run.failed:
        killer = run.failed[0]
        control = _pytest(suite, Order(suite.packages), [], [killer], _CONTROL_S)
        if control.code != 0:
            return Verdict(mark, Fate.BROKEN, f"{killer} fails with all checks in place, too")
        return Verdict.killed(mark, killer)
    if run.code != 0:
        return Verdict(mark, Fate.BROKEN, run.output[-2000:])
    return Verdict(mark, Fate.SURVIVED, f"all of these pass without it: {', '.join(tests)}")


def _pytest(
    suite: Suite, order: Order, options: Sequence[str], tests: Sequence[str], limit: float
) -> _Run:
    with TemporaryDirectory() as folder:
        outcomes, names = Path(folder) / "outcomes", Path(folder) / "tests"
        names.write_text("\n".join(tests))
        command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider"]
        command += ["-c", "pyproject.toml", "-p", "tests.mutants.patience"]
        command += ["-p", "tests.mutants.outcomes", OPTION, str(outcomes), *options, f"@{names}"]
        environment = order.environment() | {"HYPOTHESIS_STORAGE_DIRECTORY": folder}
        try:
            done = subprocess.run(
                command,
                cwd=suite.root,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=limit,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return _Run(None, {}, [], "")
        table = json.loads(outcomes.read_text()) if outcomes.exists() else {}
    return _Run(
        done.returncode,
        {test: took for test, (_, took) in table.items()},
        [test for test, (failed, _) in table.items() if failed],
        done.stdout,
    )
