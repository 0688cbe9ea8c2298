"""``killpoint.c`` from Python: compile it, arm it, read what it logged."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

SOURCE = Path(__file__).with_name("killpoint.c")
SYNCS = ("fsync", "fdatasync")
_SILO = re.compile(r"-[a-d]$")
_NUMBERED = re.compile(r"[0-9a-f]{8,}|\d+")


@dataclass(frozen=True)
class Call:
    """One call that changed durable state.

    Args:
        index: its number in its process, from 1.
        op: write, pwrite, fsync, fdatasync, ftruncate, rename, unlink, mkdir, open, …
        path: below the root.
        size: bytes, where it has any.
        nanoseconds: of CLOCK_MONOTONIC, which ``time.monotonic_ns`` reads, too.
    """

    index: int
    op: str
    path: str
    size: int
    nanoseconds: int

    @property
    def pattern(self) -> str:
        """What kind of call on what kind of file: numbers, silos and random names are all alike."""
        return f"{self.op} {_SILO.sub('-S', _NUMBERED.sub('N', self.path))}"


def build(directory: Path) -> Path:
    """Compile the shim; a machine's gcc takes a moment, so once a test run."""
    library = directory / "killpoint.so"
    command = ["gcc", "-shared", "-fPIC", "-O2", "-Wall", "-Wextra", "-Werror"]
    subprocess.run([*command, "-o", str(library), str(SOURCE)], check=True)
    return library


def armed(
    library: Path,
    root: Path,
    log: Path | None,
    at: str | None = None,
    base: Mapping[str, str] = os.environ,
) -> dict[str, str]:
    """The environment of a process under the shim."""
    environment = dict(base) | {"LD_PRELOAD": str(library), "SECAGG_CRASH_ROOT": str(root)}
    if log is not None:
        environment["SECAGG_CRASH_LOG"] = str(log)
    if at is not None:
        environment["SECAGG_CRASH_AT"] = at
    return environment


def read_log(path: Path) -> list[Call]:
    """The calls of a process by number; threads may have logged them a little out of order."""
    if not path.exists():
        return []
    calls = []
    for line in path.read_text().splitlines():
        index, op, rest = line.split(" ", 2)
        name, size, nanoseconds = rest.rsplit(" ", 2)
        calls.append(Call(int(index), op, name, int(size), int(nanoseconds)))
    return sorted(calls, key=lambda call: call.index)
