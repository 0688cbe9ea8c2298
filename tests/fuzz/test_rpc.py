"""A short profile of ``make fuzz-rpc``."""

from __future__ import annotations

from pathlib import Path

import pytest

from secagg.coordinator.calls import METHODS

from .rpc import fuzz

pytestmark = pytest.mark.process


def test_mutated_calls_leave_the_coordinator_and_the_sums_whole(tmp_path: Path) -> None:
    report = fuzz(1, 600, tmp_path)
    assert report.passed, report.text()
    assert report.calls == sum(report.statuses.values()) == 600
    assert report.methods.keys() == METHODS.keys()
    assert min(report.statuses["OK"], report.statuses["INVALID_ARGUMENT"]) > 50
