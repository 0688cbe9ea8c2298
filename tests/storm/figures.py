"""What is measured: quantiles of latencies, and what the kernel says of a process."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Sample = tuple[str, float, float, float]
"""What was called, when it was due (monotonic seconds), how long it took from then, and how late
the caller itself was (seconds)."""


def quantile(values: Sequence[float], q: float) -> float:
    """The smallest value that at least a share ``q`` of all is no greater than."""
    return sorted(values)[math.ceil(q * len(values)) - 1]


def latencies(samples: Iterable[Sample]) -> dict[str, Any]:
    """Count; in milliseconds the median, the p99 and the greatest, and the caller's own p99."""
    seen = list(samples)
    if not seen:
        return {"calls": 0}
    times, late = [sample[2] for sample in seen], [sample[3] for sample in seen]
    named = {
        "p50_ms": quantile(times, 0.5),
        "p99_ms": quantile(times, 0.99),
        "max_ms": max(times),
        "late_p99_ms": quantile(late, 0.99),
    }
    rounded = {name: round(1000 * seconds, 1) for name, seconds in named.items()}
    return {"calls": len(seen)} | rounded


@dataclass(frozen=True, slots=True)
class Work:
    """How processes fared on the machine's cores.

    Args:
        cpu: seconds that their threads ran.
        waited: seconds that their threads could have run and had no core.
    """

    cpu: float
    waited: float

    @classmethod
    def of(cls, *pids: int) -> Work:
        """What it comes to so far."""
        tasks = (task for pid in pids for task in Path(f"/proc/{pid}/task").glob("*/schedstat"))
        spent = [[int(field) / 1e9 for field in task.read_text().split()[:2]] for task in tasks]
        return cls(*map(sum, zip(*spent, strict=True)))

    def since(self, before: Work) -> Work:
        """What was added."""
        return Work(self.cpu - before.cpu, self.waited - before.waited)


def busy_seconds() -> float:
    """What all the machine's cores have worked so far, whoever for."""
    user, nice, system, _, _, irq, softirq = map(
        int, Path("/proc/stat").read_text().splitlines()[0].split()[1:8]
    )
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")


class Machine:
    """Who works on the machine's cores, from now on.

    Args:
        server: the process under attack.
        others: the storm's other processes.
    """

    def __init__(self, server: int, others: Sequence[int]) -> None:
        self._server, self._ours = server, (server, *others)
        self._began, self._before = time.monotonic(), self._look()

    def _look(self) -> tuple[Work, Work, float]:
        return Work.of(self._server), Work.of(*self._ours), busy_seconds()

    def measured(self) -> dict[str, float]:
        """Seconds so far; of CPU but for those that the server's threads waited for a core."""
        server, ours, busy = self._look()
        server, ours = server.since(self._before[0]), ours.since(self._before[1])
        found = {
            "seconds": time.monotonic() - self._began,
            "server_cpu": server.cpu,
            "server_waited": server.waited,
            "ours_cpu": ours.cpu,
            "others_cpu": busy - self._before[2] - ours.cpu,
        }
        return {name: round(value, 1) for name, value in found.items()}


def descriptors(pid: int) -> int:
    """How many files and sockets a process has open."""
    return len(os.listdir(f"/proc/{pid}/fd"))
