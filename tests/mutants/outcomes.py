"""A plugin of pytest that writes down each test's outcome and seconds as JSON."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

OPTION = "--outcomes"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(OPTION, type=Path, required=True, help="the file to write")


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):  # of xdist: its controller sees all reports
        config.pluginmanager.register(_Outcomes(config.getoption(OPTION)))


class _Outcomes:
    def __init__(self, file: Path) -> None:
        self._file = file
        self._seconds: dict[str, float] = {}
        self._bad: set[str] = set()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        before = self._seconds.get(report.nodeid, 0.0)
        self._seconds[report.nodeid] = before + report.duration
        if report.failed:
            self._bad.add(report.nodeid)

    def pytest_sessionfinish(self) -> None:
        table = {test: (test in self._bad, took) for test, took in self._seconds.items()}
        self._file.write_text(json.dumps(table))
