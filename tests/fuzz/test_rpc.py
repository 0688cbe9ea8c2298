"""A short profile of ``make fuzz-rpc``, and its verdict: what was not tried is not passed."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from secagg.coordinator.calls import METHODS

from .insider import CODES
from .rpc import CALLS_A_ROUND, MANY_CALLS, Report, fuzz


@pytest.mark.process
def test_mutated_calls_leave_the_coordinator_and_the_sums_whole(tmp_path: Path) -> None:
    report = fuzz(1, 600, tmp_path)
    assert report.passed, report.text()
    assert report.fired == 600 < report.calls == sum(report.statuses.values())
    assert report.methods.keys() == METHODS.keys()
    assert min(report.statuses["OK"], report.statuses["INVALID_ARGUMENT"]) > 50


def made(**changes: Any) -> Report:
    """A report with which all is well."""
    values: dict[str, Any] = {
        "fired": MANY_CALLS,
        "rounds_exact": MANY_CALLS // CALLS_A_ROUND,
        "served": Counter(METHODS.keys()),
        "behind": Counter([*CODES, "OK"]),
        "rss_mebibytes": [100.0, 110.0, *([120.0] * 9)],
        "lives": True,
    }
    return Report(1, **values | changes)


def test_a_good_report_passes() -> None:
    assert made().failures == []


@pytest.mark.parametrize(
    ("failure", "changes"),
    [
        ("the coordinator died", {"lives": False}),
        ("undocumented", {"undocumented": ["silo Send INTERNAL"]}),
        ("log", {"log_errors": ["Traceback"]}),
        ("believed", {"believed": ["masked_input"]}),
        ("rounds", {"rounds_exact": MANY_CALLS // CALLS_A_ROUND - 1}),
        ("growth", {"rss_mebibytes": [*([100.0] * 10), 164.0]}),
        ("leak", {"rss_mebibytes": [100.0 + tenth for tenth in range(11)]}),
        ("nothing signed was taken", {"behind": Counter(CODES)}),
        ("never served: Send", {"served": Counter(METHODS.keys() - {"Send"})}),
        ("never refused: vector-digest", {"behind": Counter([*CODES - {"vector-digest"}, "OK"])}),
    ],
)
def test_what_did_not_hold_or_was_not_tried_is_a_failure(
    failure: str, changes: dict[str, Any]
) -> None:
    assert failure in made(**changes).failures
