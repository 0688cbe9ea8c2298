"""What a process holds, read from /proc, and whether that grows with the rounds it served.

Memory is compared within a life: one slope is fitted to all lives together, each with a level of
its own (least squares with fixed effects). In its first rounds a life fills caches, its threads'
arenas and the sessions that it keeps: measured without drops, resident memory rises by 3 MB in the
first 600 rounds and by 0.1 MB in the next 400. So those rounds are left out, and a coordinator that
is killed every other minute tells nothing of leaks: hence the soak's last stretch.
"""

from __future__ import annotations

import contextlib
import os
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

WARM_ROUNDS = 600
MEASURED_ROUNDS = 400
"""A life that is shorter after its first rounds tells nothing of its slope."""
CONNECTED_ROUNDS = 20


@dataclass(frozen=True)
class Sample:
    """One look at a process.

    Args:
        pid: which life of it.
        age: rounds since that life was first seen.
        rounds: results released so far, in all lives.
        rss: resident memory, KiB.
        fds: open descriptors; None where this user may not count them.
    """

    pid: int
    age: int
    rounds: int
    rss: int
    fds: int | None


def look(pid: int, age: int, rounds: int) -> Sample | None:
    """Read a process; None if it is gone."""
    fds: int | None = None
    try:
        status = Path(f"/proc/{pid}/status").read_text()
        with contextlib.suppress(PermissionError):  # the coordinator keeps all tracers but root out
            fds = len(os.listdir(f"/proc/{pid}/fd"))
    except (FileNotFoundError, ProcessLookupError):
        return None
    found = [line.split()[1] for line in status.splitlines() if line.startswith("VmRSS:")]
    return Sample(pid, age, rounds, int(found[0]), fds) if found else None


def lives(samples: Iterable[Sample], warm: int) -> list[list[Sample]]:
    """Samples of each life after so many rounds."""
    found: dict[int, list[Sample]] = defaultdict(list)
    for sample in samples:
        if sample.age >= warm:
            found[sample.pid].append(sample)
    return [life for life in found.values() if len(life) >= 5]


def slope(samples: Iterable[Sample]) -> float | None:
    """MiB of resident memory per 1,000 rounds; None where there is too little to tell."""
    across = along = 0.0
    for life in lives(samples, WARM_ROUNDS):
        if life[-1].rounds - life[0].rounds < MEASURED_ROUNDS:
            continue
        rounds = statistics.fmean(sample.rounds for sample in life)
        rss = statistics.fmean(sample.rss for sample in life)
        across += sum((s.rounds - rounds) * (s.rss - rss) for s in life)
        along += sum((s.rounds - rounds) ** 2 for s in life)
    return across / along / 1024 * 1000 if along else None


def descriptors(samples: Sequence[Sample]) -> dict[str, Any]:
    """Open descriptors: medians of the first and the last third of each life, and the most."""
    counted = [s for s in samples if s.fds is not None]
    ends = [
        (_median(life[: len(life) // 3]), _median(life[-(len(life) // 3) :]))
        for life in lives(counted, CONNECTED_ROUNDS)
        if len(life) >= 9
    ]
    return {
        "first": ends[0][0] if ends else None,
        "last": ends[-1][1] if ends else None,
        "max": max((s.fds for s in counted if s.fds is not None), default=None),
        "grown": max((last - first for first, last in ends), default=None),
    }


def _median(life: Sequence[Sample]) -> float:
    return statistics.median(sample.fds for sample in life if sample.fds is not None)


def held(samples: Sequence[Sample]) -> dict[str, Any]:
    """All of it, for the report."""
    rss = [s.rss / 1024 for s in samples]
    return {
        "lives": len({s.pid for s in samples}),
        "rss_mib": {"first": rss[0], "last": rss[-1], "max": max(rss)} if rss else None,
        "slope_mib_per_1000_rounds": slope(samples),
        "fds": descriptors(samples),
    }


def stored(directory: Path) -> tuple[int, int]:
    """Bytes and files below a directory; what goes while we look is not counted."""
    size = files = 0
    for folder, _, names in os.walk(directory):
        for name in names:
            try:
                size += os.stat(os.path.join(folder, name)).st_size
                files += 1
            except FileNotFoundError:
                continue
    return size, files
