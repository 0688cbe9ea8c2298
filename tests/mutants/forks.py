"""A plugin of pytest that collects once, then runs each mutant's tests in a fork of its own.

What a mutant leaves behind, in caches or fixtures, ends with its fork; the parent runs no test.
"""

from __future__ import annotations

import json
import os
import select
import signal
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import pytest
from _pytest.runner import runtestprotocol

from tests.mutants.hook import leave_out

PLAN, KILLERS = "--plan", "--killers"
_SECONDS = 120.0
_END = "\n"
"""What a fork says last: one that says nothing has crashed, and proves nothing."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(PLAN, type=Path, required=True, help="JSON: the tests of each mutant")
    parser.addoption(KILLERS, type=Path, required=True, help="the file for each mutant's killer")


def pytest_runtestloop(session: pytest.Session) -> bool:
    """Run all plans; write down, as JSON, the first test that fails without each check."""
    plan: Mapping[str, Sequence[str]] = json.loads(session.config.getoption(PLAN).read_text())
    items = {item.nodeid: item for item in session.items}
    found = {name: _forked([items[test] for test in tests], name) for name, tests in plan.items()}
    killers = {name: killer for name, killer in found.items() if killer}
    sound = {killer: _forked([items[killer]]) == "" for killer in set(killers.values())}
    told = {name: killer for name, killer in killers.items() if sound[killer]}
    session.config.getoption(KILLERS).write_text(json.dumps(told))
    return True


def _forked(items: Sequence[pytest.Item], without: str | None = None) -> str | None:
    """Run tests in a fork until one fails, and name it; None if they come to no end.

    Without any check left out this is the control: a test that fails then, too, kills nobody.
    """
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.setpgid(0, 0)
            if without is not None:
                leave_out(without)
            os.write(write, (_first_failure(items) + _END).encode())
        finally:
            os._exit(0)
    os.close(write)
    with open(read) as answer:
        told, _, _ = select.select([answer], [], [], _SECONDS)
        if not told:
            os.killpg(child, signal.SIGKILL)
        found = answer.read()
    os.waitpid(child, 0)
    return found.removesuffix(_END) if found.endswith(_END) else None


def _first_failure(items: Iterable[pytest.Item]) -> str:
    for item in items:
        if any(report.failed for report in runtestprotocol(item, nextitem=None, log=False)):
            return item.nodeid
    return ""
