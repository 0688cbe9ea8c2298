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
from hypothesis import Phase, settings

from tests.mutants.hook import leave_out

PLAN, KILLERS = "--plan", "--killers"
_SECONDS = 120.0


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(PLAN, type=Path, required=True, help="JSON: the tests of each mutant")
    parser.addoption(KILLERS, type=Path, required=True, help="the file for each mutant's killer")


def pytest_configure() -> None:
    """Have hypothesis stop at its first counterexample: nobody reads the smallest one."""
    settings.register_profile("mutants", phases=[Phase.explicit, Phase.generate], database=None)
    settings.load_profile("mutants")


def pytest_runtestloop(session: pytest.Session) -> bool:
    """Run all plans; write down, as JSON, the first test that fails without each check."""
    plan: Mapping[str, Sequence[str]] = json.loads(session.config.getoption(PLAN).read_text())
    items = {item.nodeid: item for item in session.items}
    killers = {name: _killer(name, [items[test] for test in tests]) for name, tests in plan.items()}
    session.config.getoption(KILLERS).write_text(json.dumps(killers))
    return True


def _killer(name: str, items: Sequence[pytest.Item]) -> str | None:
    """The first test that fails without a check; None if there is none, or no end of them."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.setpgid(0, 0)
            leave_out(name)
            os.write(write, _first_failure(items).encode())
        finally:
            os._exit(0)
    os.close(write)
    with open(read) as answer:
        told, _, _ = select.select([answer], [], [], _SECONDS)
        if not told:
            os.killpg(child, signal.SIGKILL)
        killer = answer.read()
    os.waitpid(child, 0)
    return killer or None


def _first_failure(items: Iterable[pytest.Item]) -> str:
    for item in items:
        if any(report.failed for report in runtestprotocol(item, nextitem=None, log=False)):
            return item.nodeid
    return ""
