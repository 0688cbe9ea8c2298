"""The silo's ledger on disk: one JSON object a line, appended and fsynced before it counts.

It guards what a silo sends (see ``secagg.masking.ledger``). A line that is torn at the end was not
acted upon, since the message that it guards goes out only after the fsync, so it is cut off; a
damaged line anywhere else is not explained by a crash, and the silo refuses to go on.
"""

from __future__ import annotations

import fcntl
import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from secagg.config import SiloId
from secagg.errors import ConfigError, SecaggError
from secagg.masking.ledger import E, Entry, Joined, MemoryLedger, Opened, Recorded, Revealed

_KINDS: Final[dict[str, type[Entry]]] = {"joined": Joined, "revealed": Revealed, "opened": Opened}


class FileLedger:
    """A durable ledger.

    Args:
        path: its file; made with mode 0600 if there is none.

    Raises:
        ConfigError: another process of this silo uses it, or a line is damaged.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        new = not path.exists()
        self._path = path
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        self._memory = MemoryLedger()
        try:
            self._lock()
            self._load()
        except ConfigError:
            os.close(self._file)
            raise
        if new:
            _sync_directory(path.parent)

    def record(self, entry: E) -> Recorded[E]:
        """Check an entry, store it durably, return the evidence (see ``Ledger.record``)."""
        self._memory.check(entry)
        line = json.dumps({"kind": _name(entry), **asdict(entry)}, default=bytes.hex)
        self._append(line.encode() + b"\n")
        return self._memory.record(entry)

    def _append(self, line: bytes) -> None:
        """Write and sync a whole line, or leave the file as it was."""
        size = os.fstat(self._file).st_size
        try:
            while line:
                line = line[os.write(self._file, line) :]
            os.fsync(self._file)
        except OSError:
            os.ftruncate(self._file, size)
            raise

    def last_attempt(self, session_id: bytes) -> tuple[int, int]:
        """Return the highest (round, attempt) joined in a session; (0, 0) for none."""
        return self._memory.last_attempt(session_id)

    def session_ids(self, name: str) -> frozenset[bytes]:
        """Return the sessions of this name in which an attempt was joined."""
        return self._memory.session_ids(name)

    def revealed(self, base: bytes) -> Revealed | None:
        """Return the reveal on a base, if there was one."""
        return self._memory.revealed(base)

    def opened(self, session_id: bytes, task: str) -> bool:
        """Return whether an opening of a session's task was taken before."""
        return self._memory.opened(session_id, task)

    def close(self) -> None:
        """Let another process use it."""
        os.close(self._file)

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                "ledger-locked",
                f"{self._path} is in use by another process of this silo.",
                "Run one trainer a silo; stop the other one first.",
            ) from None

    def _load(self) -> None:
        data = self._path.read_bytes()
        whole = data.rfind(b"\n") + 1
        for number, line in enumerate(data[:whole].splitlines(), start=1):
            try:
                self._memory.record(_entry(json.loads(line)))
            except (ValueError, KeyError, TypeError, AttributeError, SecaggError):
                raise ConfigError(
                    "ledger-damaged",
                    f"{self._path}, line {number} is no ledger entry.",
                    "Restore the file from a backup of this silo; without it the silo cannot "
                    "know which sums it has opened.",
                ) from None
        if whole < len(data):
            os.ftruncate(self._file, whole)


def _name(entry: Entry) -> str:
    return next(name for name, kind in _KINDS.items() if isinstance(entry, kind))


def _entry(table: dict[str, Any]) -> Any:
    kind = _KINDS[table.pop("kind")]
    for field in ("session_id", "base", "transcript", "task_hash", "update"):
        if field in table:
            table[field] = bytes.fromhex(table[field])
    if kind is Revealed:
        table["survivors"] = tuple(SiloId(name) for name in table["survivors"])
    return kind(**table)


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
