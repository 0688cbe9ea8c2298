"""A short storm, without a word on time; and what the long one's verdict is made of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from . import figures
from .attack import PARTS
from .harness import Plan, run
from .report import blown, verdict

SHORT = Plan(
    quiet=0.5,
    seconds=2.0,
    half_open=40,
    resets=4_000,
    slow=10,
    connections=40,
    pause=0.1,
    floor=False,
)


@pytest.mark.process
def test_the_coordinator_outlives_a_short_storm(tmp_path: Path) -> None:
    result = run(SHORT, tmp_path)
    held = result["verdict"]
    del held["p99"], held["rate"]
    assert all(held.values()), result
    attacks = result["coordinator"]["attacks"]
    assert set(attacks) == set(result["coordinator"]["blown"]) == set(PARTS)
    assert attacks["connections"]["seen"]["made"] > 0


def test_quantiles_are_values_that_were_seen() -> None:
    values = [float(n) for n in range(100, 0, -1)]
    assert [figures.quantile(values, q) for q in (0.01, 0.5, 0.99, 1.0)] == [1, 50, 99, 100]
    assert figures.quantile([7.0], 0.99) == 7.0


def good() -> dict[str, Any]:
    """A result that holds, at every bound."""
    return {
        "coordinator": {
            "quiet": {"p99_ms": 10.0},
            "storm": {"p99_ms": 260.0, "by_call": {"GetChunk": {}}},
            "peak_mib": 512.0,
            "descriptors": {"before": 40, "afterwards": 56},
            "blown": {"half-open": 1.0, "resets": 1.0, "slow": 1.0, "connections": 0.9},
            "reload": {"afterwards": True, "in_the_midst": True},
        },
        "rounds": {"seen": 8, "exact": 8, "ends": {"session-over": 4}},
        "alive": True,
        "went_on": True,
    }


def test_what_holds_at_every_bound_holds() -> None:
    assert set(verdict(good()).values()) == {True}
    slow = good()
    slow["coordinator"]["quiet"]["p99_ms"], slow["coordinator"]["storm"]["p99_ms"] = 400.0, 800.0
    assert verdict(slow)["p99"]


@pytest.mark.parametrize(
    ("name", "path", "value"),
    [
        ("alive", ("alive",), False),
        ("alive", ("went_on",), False),
        ("answered", ("coordinator", "storm", "by_call", "failed"), {}),
        ("p99", ("coordinator", "storm", "p99_ms"), 260.1),
        ("memory", ("coordinator", "peak_mib"), 512.1),
        ("descriptors", ("coordinator", "descriptors", "afterwards"), 57),
        ("blown", ("coordinator", "blown", "half-open"), 0.995),
        ("blown", ("coordinator", "blown", "resets"), 0.0),
        ("blown", ("coordinator", "blown", "slow"), 0.98),
        ("rate", ("coordinator", "blown", "connections"), 0.89),
        ("exact", ("rounds", "exact"), 7),
        ("exact", ("rounds", "ends", "cancelled: [cancelled] CANCELLED"), 1),
        ("reload", ("coordinator", "reload", "in_the_midst"), False),
    ],
)
def test_what_does_not_hold_is_named(name: str, path: tuple[str, ...], value: Any) -> None:
    result = good()
    *way, last = path
    place = result
    for key in way:
        place = place[key]
    place[last] = value
    assert [key for key, holds in verdict(result).items() if not holds] == [name]


def test_what_was_delivered_is_a_share_of_the_plan() -> None:
    plan = {"parts": list(PARTS), "half_open": 200, "resets": 40_000, "slow": 50}
    plan["connections"] = 500
    attacks = {
        "half-open": {"most": 200},
        "resets": {"seen": {"resets": 10_000}},
        "connections": {"per_second": 450.0},
    }
    shares = {"half-open": 1.0, "resets": 0.25, "slow": 0.0, "connections": 0.9}
    assert blown(plan, attacks) == shares
    assert blown(plan | {"parts": ["resets"]}, attacks) == {"resets": 0.25}


def test_no_rounds_are_no_exact_rounds() -> None:
    assert not verdict(good() | {"rounds": {"seen": 0, "exact": 0, "ends": {}}})["exact"]
