"""What a soak must show. In a long one, what was not measured or not done fails, too."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from .gauge import MEASURED_ROUNDS, WARM_ROUNDS

LONG_MINUTES = 10.0
"""From here on everything must have been measured; shorter ones show sums alone."""
ROUNDS_A_MINUTE = 30
"""At least so many, whatever is killed; a machine that does nothing else plays far more."""
DELIVERED = 0.8
"""The least share of the kills that were due; of the drops, a half of this: some have no effect."""
MAX_SLOPE = 1.0
"""MiB of the coordinator's memory per 1,000 rounds."""
SILO_SLOPE = 4.0
"""MiB of a silo's memory per 1,000 rounds: it has its ledger there, some 2 KiB an attempt."""
MAX_GROWN = 8
"""Descriptors by which a life may end above where it began: connections come and go."""
MAX_STATE = 32 * 2**20
"""Bytes of the coordinator's state: its log of 4 MiB, and what a few small sessions hold."""
SILO_STATE, SILO_ATTEMPT = 256 * 2**10, 2 * 2**10
"""Bytes of a silo's state, and for each attempt: its ledger forgets nothing, or a seed would serve
twice."""


def failures(report: dict[str, Any]) -> list[str]:
    """What must not be so, in words."""
    found = [*_not_played(report), *_grown(report)]
    if report["plan"]["minutes"] >= LONG_MINUTES:
        found += [*_not_done(report), *_not_measured(report)]
    return found


def _not_played(report: dict[str, Any]) -> Iterator[str]:
    least = max(1, math.floor(ROUNDS_A_MINUTE * report["plan"]["minutes"]))
    if report["rounds"] < least:
        yield f"{report['rounds']} rounds are too few: {least} at least"
    for place in report["missing"]:
        yield f"{place}: it is among the survivors and has no result"
    kills, deaths = report["kills"], report["deaths"]
    if deaths["coordinator"] != kills.get("coordinator", 0):
        yield f"the coordinator died {deaths['coordinator']} times, and was killed {kills}"
    if deaths["silo"] < kills.get("silo", 0):
        yield f"silos died {deaths['silo']} times, and were killed {kills}"


def _grown(report: dict[str, Any]) -> Iterator[str]:
    for name, slope in _slopes(report).items():
        most = MAX_SLOPE if name == "coordinator" else SILO_SLOPE
        if slope is not None and slope >= most:
            yield f"{name}: memory grows by {slope:.2f} MiB per 1,000 rounds"
    for name, grown in _descriptors(report).items():
        if grown is not None and grown > MAX_GROWN:
            yield f"{name}: {grown} descriptors more at a life's end"
    attempts = report["rounds"] + report["drops"]["total"]
    for name, state in report["state_bytes"].items():
        most = MAX_STATE if name == "coordinator" else SILO_STATE + attempts * SILO_ATTEMPT
        if state["max"] > most:
            yield f"{name}: {state['max']} bytes of state, {most} at most"


def _not_done(report: dict[str, Any]) -> Iterator[str]:
    plan, kills, drops = report["plan"], sum(report["kills"].values()), report["drops"]["total"]
    due = DELIVERED * 60 * plan["minutes"] / plan["kill_seconds"]
    if kills < math.floor(due):
        yield f"{kills} kills are too few: {math.floor(due)} at least"
    chances = plan["drop"] * plan["silos"] * report["rounds"]
    if drops < math.floor(DELIVERED / 2 * chances):
        yield f"{drops} drops are too few for {report['rounds']} rounds"
    if not report["sealed_rounds"]:
        yield "no sealed round was played"
    for place in report["skipped"]:
        yield f"{place}: it was away from the beginning to the end"


def _not_measured(report: dict[str, Any]) -> Iterator[str]:
    slopes, steady = _slopes(report), report["steady"]
    for name in ("coordinator", steady):
        if slopes[name] is None:
            rounds = WARM_ROUNDS + MEASURED_ROUNDS
            yield f"{name}: memory is not measured, for no life of it had {rounds} rounds"
    for name in ("coordinator", steady):
        if _descriptors(report)[name] is None:
            yield f"{name}: descriptors are not measured; the coordinator's are shown to root alone"


def _slopes(report: dict[str, Any]) -> dict[str, float | None]:
    held = {"coordinator": report["last_life"], **report["silo"]}
    return {name: process["slope_mib_per_1000_rounds"] for name, process in held.items()}


def _descriptors(report: dict[str, Any]) -> dict[str, float | None]:
    held = {"coordinator": report["coordinator"], **report["silo"]}
    return {name: process["fds"]["grown"] for name, process in held.items()}
