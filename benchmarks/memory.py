"""A process's resident memory, as the kernel counts it."""

from __future__ import annotations

from pathlib import Path


def resident(what: str, pid: int | str = "self") -> int:
    """A process's resident memory in bytes: ``VmRSS`` now, ``VmHWM`` at its peak.

    Not ``ru_maxrss``: a child's begins at the peak of the process that spawned it.
    """
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    line = next(line for line in lines if line.startswith(what))
    return int(line.split()[1]) * 1024
