"""What a storm's processes saw, put together, and whether what must hold did."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from typing import Any

from tests.crash.silo import SILOS

from . import figures

MEMORY_BYTES = 512 * 2**20
DESCRIPTORS = 16
"""By how many it may have more open after the storm than before: connections come and go."""
RATE = 0.9
"""The least share of the new connections a second that were planned."""
FACTOR, SLACK_MS = 2.0, 250.0
"""How far above its quiet value the p99 may be: the greater of both."""


def calls(report: dict[str, Any]) -> dict[str, Any]:
    """A probe's calls, all and by method."""
    samples = report["samples"]
    names = sorted({sample[0] for sample in samples})
    by_call = {n: figures.latencies(s for s in samples if s[0] == n) for n in names}
    return figures.latencies(samples) | {"by_call": by_call, "statuses": report["statuses"]}


def during(attack: dict[str, Any], samples: Sequence[figures.Sample]) -> dict[str, Any]:
    """The calls that were due while an attack went on."""
    return figures.latencies(s for s in samples if attack["began"] <= s[1] <= attack["ended"])


def rounds(reports: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What the honest silos saw: every silo of every round."""
    seen = [record for report in reports.values() for record in report["rounds"]]
    return {
        "released": max((record["round"] for record in seen), default=0),
        "seen": len(seen),
        "exact": sum(record["exact"] for record in seen),
        "of_all_silos": sum(len(record["survivors"]) == len(SILOS) for record in seen),
        "ends": Counter(_end(report["end"]) for report in reports.values()),
    }


def _end(record: dict[str, Any]) -> str:
    code, text = record.get("code", "?"), record.get("text", "")
    return code if code == "session-over" else f"{code}: {text}"


def log(log: bytes) -> dict[str, int]:
    """How often the coordinator logged what; the hits of each limit are among it."""
    told: Counter[str] = Counter()
    for line in log.splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            told["not JSON"] += 1
            continue
        what = " ".join(str(entry[key]) for key in ("event", "code") if key in entry)
        told[what] += entry.get("count", 1)
    return dict(told)


def blown(plan: dict[str, Any], attacks: dict[str, Any]) -> dict[str, float]:
    """What each of the planned attacks delivered, as a share of its plan; nothing where it is not.

    Connections that stood at once, streams reset, and connections that were begun a second: one
    that the server refuses has reached it, too.
    """
    delivered = {
        "half-open": lambda seen: seen["most"] / plan["half_open"],
        "resets": lambda seen: seen["seen"].get("resets", 0) / plan["resets"],
        "slow": lambda seen: seen["most"] / plan["slow"],
        "connections": lambda seen: seen["per_second"] / plan["connections"],
    }
    return {
        part: round(delivered[part](attacks[part]), 3) if part in attacks else 0.0
        for part in plan["parts"]
    }


def verdict(result: dict[str, Any]) -> dict[str, bool]:
    """What must hold."""
    here, seen = result["coordinator"], result["rounds"]
    quiet, storm = here["quiet"]["p99_ms"], here["storm"]["p99_ms"]
    shares = dict(here["blown"])
    rate = shares.pop("connections", 1.0)
    fds = here["descriptors"]
    return {
        "blown": rate > 0 and all(share >= 1 for share in shares.values()),
        "rate": rate >= RATE,
        "alive": result["alive"] and result["went_on"],
        "answered": "failed" not in here["storm"]["by_call"],
        "p99": storm <= max(FACTOR * quiet, quiet + SLACK_MS),
        "memory": here["peak_mib"] * 2**20 <= MEMORY_BYTES,
        "descriptors": fds["afterwards"] <= fds["before"] + DESCRIPTORS,
        "exact": seen["exact"] == seen["seen"] > 0 and set(seen["ends"]) == {"session-over"},
        "reload": all(here["reload"].values()),
    }
