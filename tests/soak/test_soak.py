"""A soak of seconds: everything is killed and drops out, and every sum is right at every silo."""

from __future__ import annotations

from pathlib import Path

import pytest

from . import gauge
from .gauge import Sample
from .oracle import chance, exact_sum, vector
from .soak import Plan, Seen, Soak

KEY = bytes(16)


@pytest.mark.process
def test_all_sums_are_right_whoever_is_killed(tmp_path: Path) -> None:
    plan = Plan(minutes=0.1, silos=4, drop=0.15, kill_seconds=1.5, stretch=0.0, kills=4, rounds=10)
    report = Soak(tmp_path, plan).run()
    assert report["failures"] == []
    assert report["kills"] == {"coordinator": 2, "silo": 2}
    assert report["sums_checked"] >= report["rounds"] >= 4


def test_the_oracle_tells_silos_sessions_and_rounds_apart() -> None:
    places = [("a", "s", 1), ("b", "s", 1), ("a", "t", 1), ("a", "s", 2)]
    assert len({vector(KEY, *place).tobytes() for place in places}) == len(places)
    assert (
        exact_sum(KEY, "ab", "s", 1) == vector(KEY, "a", "s", 1) + vector(KEY, "b", "s", 1)
    ).all()
    assert sum(chance(KEY, "drop", n) < 0.05 for n in range(2000)) == pytest.approx(100, abs=40)


def record(**changes: object) -> dict[str, object]:
    values: dict[str, object] = {"session": 1, "round": 1, "survivors": ["a", "b", "c"]}
    return values | {"digest": "00", "right": True, "at": 0.0} | changes


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


def samples(pid: int, level: int, kib_a_round: float, fds: float = 0.0) -> list[Sample]:
    """A life of 100 warm rounds."""
    age = gauge.WARM_ROUNDS
    return [
        Sample(pid, age + n, 100 * pid + n, int(level + kib_a_round * n), int(20 + fds * n))
        for n in range(100)
    ]


def test_growth_is_measured_within_lives() -> None:
    steady = samples(1, 50_000, 0) + samples(2, 90_000, 0)
    assert gauge.slope(steady) == pytest.approx(0.0)
    growing = samples(1, 90_000, 2.048) + samples(2, 50_000, 2.048)
    assert gauge.slope(growing) == pytest.approx(2.0, rel=0.01)
    assert gauge.slope(samples(1, 50_000, 1)[:3]) is None
    assert gauge.descriptors(steady)["grown"] == 0
    assert gauge.descriptors(samples(1, 50_000, 0, fds=0.5))["grown"] == pytest.approx(34, abs=2)
