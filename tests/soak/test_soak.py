"""A soak of seconds: everything is killed and drops out, and every sum is right at every silo."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from secagg.config import Protection

from . import gauge, verdict
from .gauge import Sample
from .oracle import bound, chance, exact_sum, protection, vector
from .soak import Plan, Seen, Soak

KEY = bytes(16)


@pytest.mark.process
def test_all_sums_are_right_whoever_is_killed(tmp_path: Path) -> None:
    plan = Plan(minutes=0.1, silos=4, drop=0.15, kill_seconds=1.5, stretch=0.0, kills=4, rounds=3)
    report = Soak(tmp_path, plan).run()
    assert report["failures"] == []
    assert report["kills"] == {"coordinator": 2, "silo": 2}
    assert report["sums_checked"] >= report["rounds"] >= 4
    assert report["sessions"] >= 3, "no session has ended, of which every survivor must have all"
    assert report["sealed_rounds"] >= 1


def test_the_oracle_tells_silos_sessions_and_rounds_apart() -> None:
    places = [("a", "s", 1), ("b", "s", 1), ("a", "t", 1), ("a", "s", 2)]
    assert len({vector(KEY, *place).tobytes() for place in places}) == len(places)
    assert (
        exact_sum(KEY, "ab", "s", 1) == vector(KEY, "a", "s", 1) + vector(KEY, "b", "s", 1)
    ).all()
    assert sum(chance(KEY, "drop", n) < 0.05 for n in range(2000)) == pytest.approx(100, abs=40)


def test_values_fit_their_sessions() -> None:
    assert [protection(n, 5).seals for n in range(1, 8)] == [False, True] + 4 * [False] + [True]
    for how in (Protection.MASKED, Protection.CKKS_MASKED):
        values = vector(KEY, "a", "s", 1, how)
        assert bound(how) / 2 < abs(values).max() <= bound(how)


def record(**changes: object) -> dict[str, object]:
    values: dict[str, object] = {"session": 1, "round": 1, "survivors": ["a", "b", "c"]}
    return values | {"digest": "00", "right": True, "sealed": False, "at": 0.0} | changes


def test_a_wrong_sum_and_two_that_differ_are_told() -> None:
    seen = Seen()
    seen.take("a", record())
    seen.take("b", record())
    assert not seen.failures
    seen.take("c", record(right=False))
    assert (seen.wrong, len(seen.failures)) == (1, 1)
    seen.take("d", record(digest="01"))
    seen.take("d", record(survivors=["a", "b", "d"]))
    assert len(seen.failures) == 3


def test_a_survivor_without_its_result_is_told() -> None:
    seen = Seen()
    for silo in "ab":
        seen.take(silo, record())
        seen.take(silo, record(session=2))
    assert list(seen.missing(before=2)) == ["c in session 1, round 1"]
    assert len(list(seen.missing(before=3))) == 2
    seen.take("c", {"skipped": [1]})
    assert list(seen.missing(before=2)) == []
    seen.skipped.clear()
    seen.take("c", {"locked_out": 1})
    assert list(seen.missing(before=2)) == []
    seen.take("c", record(session=2))
    assert list(seen.missing(before=3)) == []


def samples(pid: int, level: int, kib_a_round: float, fds: float | None = 0.0) -> list[Sample]:
    """A life of 500 warm rounds, of which every fifth is seen."""
    age = gauge.WARM_ROUNDS
    return [
        Sample(
            pid,
            age + n,
            500 * pid + n,
            int(level + kib_a_round * n),
            None if fds is None else int(20 + fds * n),
        )
        for n in range(0, 500, 5)
    ]


def test_growth_is_measured_within_lives() -> None:
    steady = samples(1, 50_000, 0) + samples(2, 90_000, 0)
    assert gauge.slope(steady) == pytest.approx(0.0)
    growing = samples(1, 90_000, 2.048) + samples(2, 50_000, 2.048)
    assert gauge.slope(growing) == pytest.approx(2.0, rel=0.01)
    assert gauge.descriptors(steady)["grown"] == 0
    assert gauge.descriptors(samples(1, 50_000, 0, fds=0.1))["grown"] == pytest.approx(34, abs=2)


def test_what_is_too_little_to_tell_is_not_measured() -> None:
    short = [s for s in samples(1, 50_000, 1) if s.age < gauge.WARM_ROUNDS + gauge.MEASURED_ROUNDS]
    assert gauge.slope(short) is None
    assert gauge.descriptors(samples(1, 50_000, 0, fds=None)) == {
        "first": None,
        "last": None,
        "max": None,
        "grown": None,
    }


def held(slope: float | None, grown: float | None) -> dict[str, Any]:
    return {"slope_mib_per_1000_rounds": slope, "fds": {"grown": grown}}


def good() -> dict[str, Any]:
    """A soak of 10 minutes that shows all, at every bound."""
    most = verdict.SILO_STATE + 329 * verdict.SILO_ATTEMPT
    return {
        "plan": {"minutes": 10.0, "silos": 5, "drop": 0.05, "kill_seconds": 60.0},
        "steady": "silo-1",
        "rounds": 300,
        "sealed_rounds": 1,
        "missing": [],
        "skipped": [],
        "kills": {"coordinator": 2, "silo": 6},
        "deaths": {"coordinator": 2, "silo": 6},
        "drops": {"total": 30},
        "last_life": held(0.99, None),
        "coordinator": held(None, 8),
        "silo": {"silo-1": held(0.99, 8), "silo-2": held(None, None)},
        "state_bytes": {"coordinator": {"max": verdict.MAX_STATE}, "silo-1": {"max": most}},
    }


def changed(path: tuple[str, ...], value: Any) -> dict[str, Any]:
    report = place = good()
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return report


SLOPE, GROWN = "slope_mib_per_1000_rounds", ("fds", "grown")
ALWAYS: list[tuple[tuple[str, ...], Any, str]] = [
    (("missing",), ["c in session 1, round 1"], "c in session 1, round 1"),
    (("deaths", "coordinator"), 1, "the coordinator died 1 times"),
    (("deaths", "silo"), 5, "silos died 5 times"),
    (("last_life", SLOPE), 1.0, "coordinator: memory grows"),
    (("silo", "silo-2", SLOPE), 4.0, "silo-2: memory grows"),
    (("coordinator", *GROWN), 9, "coordinator: 9 descriptors"),
    (("silo", "silo-2", *GROWN), 9, "silo-2: 9 descriptors"),
    (("state_bytes", "coordinator", "max"), verdict.MAX_STATE + 1, "coordinator: 33554433 bytes"),
    (("state_bytes", "silo-1", "max"), 937_985, "silo-1: 937985 bytes"),
]
IF_LONG: list[tuple[tuple[str, ...], Any, str]] = [
    (("kills",), {"coordinator": 2, "silo": 5}, "7 kills are too few"),
    (("drops", "total"), 29, "29 drops are too few"),
    (("sealed_rounds",), 0, "no sealed round"),
    (("skipped",), ["b in session 1"], "b in session 1"),
    (("last_life", SLOPE), None, "coordinator: memory is not measured"),
    (("silo", "silo-1", SLOPE), None, "silo-1: memory is not measured"),
    (("coordinator", *GROWN), None, "coordinator: descriptors are not measured"),
    (("silo", "silo-1", *GROWN), None, "silo-1: descriptors are not measured"),
]


def test_what_shows_all_has_no_failure() -> None:
    assert verdict.failures(good()) == []


@pytest.mark.parametrize(("path", "value", "text"), ALWAYS + IF_LONG)
def test_what_is_wrong_is_named(path: tuple[str, ...], value: Any, text: str) -> None:
    [failure] = verdict.failures(changed(path, value))
    assert failure.startswith(text)


@pytest.mark.parametrize(("path", "value", "text"), IF_LONG)
def test_a_short_soak_need_not_measure(path: tuple[str, ...], value: Any, text: str) -> None:
    report = changed(path, value)
    report["plan"]["minutes"] = 0.1
    assert verdict.failures(report) == []


def test_a_soak_in_which_nothing_happens_fails() -> None:
    report = good() | {"rounds": 0, "drops": {"total": 0}, "state_bytes": {}}
    assert verdict.failures(report) == ["0 rounds are too few: 300 at least"]
