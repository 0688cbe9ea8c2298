"""Disks that forget what was not synced, tear what was being written, and fill up.

A ``Platter`` outlives crashes. What a crash leaves of the calls since a file's last sync is drawn:
changes of names come back in order up to some point, and every write after the last of them is
kept, lost or torn on its own.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field

from secagg.errors import StorageBusy, StorageFailed

from .clock import Crashed, Process

_TEXT = "The simulated disk is full."


def _full() -> StorageFailed:
    return StorageFailed("storage-failed", _TEXT)


@dataclass
class _File:
    """One name: what is durable under it, what is there now, and what lies in between.

    A change is ("allocate", 0, bytes), ("remove", 0, b"") or ("write", offset, bytes).
    """

    durable: bytes | None = None
    now: bytearray | None = None
    changes: list[tuple[str, int, bytes]] = field(default_factory=list)

    def settle(self) -> None:
        """All that is there now is durable."""
        self.durable = None if self.now is None else bytes(self.now)
        self.changes.clear()

    def crash(self, rng: random.Random) -> None:
        """Draw what is left."""
        if self.changes:
            left = self._survive(rng)
            self.now = None if left is None else bytearray(left)
            self.settle()
        elif self.now is not None:
            self.now = bytearray(self.now)  # nobody's map of it sees what comes

    def _survive(self, rng: random.Random) -> bytearray | None:
        names = [at for at, (kind, _, _) in enumerate(self.changes) if kind != "write"]
        kept = rng.randint(0, len(names))
        left = None if self.durable is None else bytearray(self.durable)
        start = 0
        if kept:
            kind, _, data = self.changes[names[kept - 1]]
            left = None if kind == "remove" else bytearray(data[: _torn(rng, len(data))])
            start = names[kept - 1] + 1
        end = names[kept] if kept < len(names) else len(self.changes)
        for _, offset, data in self.changes[start:end]:
            if left is not None:
                part = data[: _torn(rng, len(data))]
                if part:
                    left.extend(bytes(max(0, offset + len(part) - len(left))))
                    left[offset : offset + len(part)] = part
        return left


def _torn(rng: random.Random, size: int) -> int:
    """How much of a write is left: all, nothing, or some."""
    return rng.choice((size, 0, rng.randint(0, size)))


class Platter:
    """One machine's files and rows, which no crash of a process removes.

    Args:
        rng: draws what crashes leave.
        full: whether the disk refuses to write now.
        seen: told all bytes that are ever written.
    """

    def __init__(
        self,
        rng: random.Random,
        full: Callable[[], bool],
        seen: Callable[[bytes], None] = lambda data: None,
    ) -> None:
        self.rng = rng
        self.full = full
        self.seen = seen
        self.files: dict[str, _File] = {}
        self.rows: dict[bytes, list[tuple[bytes, bool]]] = {}

    def crash(self) -> None:
        """Lose what was not durable."""
        for name in sorted(self.files):
            self.files[name].crash(self.rng)
        self.files = {name: file for name, file in self.files.items() if file.now is not None}

    def rot(self, folder: str) -> tuple[str, bytes] | None:
        """Flip a bit of some file in folders of this name; returns its name and what it held."""
        names = [n for n in sorted(self.files) if f"/{folder}/" in n and self.content(n)]
        if not names:
            return None
        name = self.rng.choice(names)
        held = self.content(name)
        place = self.rng.randrange(8 * len(held))
        changed = bytearray(held)
        changed[place // 8] ^= 1 << place % 8
        self.put(name, bytes(changed))
        return name, held

    def put(self, name: str, data: bytes) -> None:
        """Have a file hold this, from a backup for example."""
        self.files[name] = _File(data, bytearray(data))

    def content(self, name: str) -> bytes:
        """What is under a name now; nothing where there is none."""
        file = self.files.get(name)
        return b"" if file is None or file.now is None else bytes(file.now)


class SimDisk:
    """A ``Disk`` of one incarnation of a process."""

    def __init__(self, platter: Platter, process: Process) -> None:
        self._platter = platter
        self._process = process
        self._rng = platter.rng

    # What only looks can be killed, too, but leaves nothing behind.

    def read(self, name: str) -> bytes | None:
        """Return a whole file; None if there is none."""
        self._look()
        file = self._platter.files.get(name)
        return None if file is None or file.now is None else bytes(file.now)

    def view(self, name: str, start: int = 0, size: int | None = None) -> memoryview | None:
        """Map a file read-only, or a range of it; None if there is none."""
        self._look()
        file = self._platter.files.get(name)
        if file is None or file.now is None:
            return None
        stop = None if size is None else start + size
        return memoryview(file.now).toreadonly()[start:stop]

    def names(self, folder: str = "") -> list[str]:
        """Return all files under a folder, by full name, sorted."""
        self._look()
        files = self._platter.files.items()
        start = f"{folder}/" if folder else ""
        return sorted(n for n, f in files if f.now is not None and n.startswith(start))

    # What is durable when it returns.

    def append(self, name: str, data: bytes) -> None:
        """Add to a file's end, durably; on failure the file is as it was."""
        file = self._file(name)
        self._change(file, data, lambda part: bytes(file.now or b"") + part)

    def replace(self, name: str, *parts: bytes | memoryview) -> None:
        """Give a file this content, durably: a crash leaves the old content or the new."""
        file, new = self._file(name), b"".join(parts)
        self._change(file, new, lambda part: new if len(part) == len(new) else file.durable)

    def truncate(self, name: str, size: int) -> None:
        """Cut a file's end off, durably."""
        file = self._file(name)
        cut = bytes((file.now or b"")[:size])
        self._change(file, b"", lambda part: self._rng.choice((cut, file.durable)), cut)

    # What is durable after ``sync``.

    def allocate(self, name: str, size: int) -> None:
        """Make a file of this size; not durable. Where there is no space, the same call may go well
        later."""
        file = self._file(name)
        if self._platter.full():
            raise StorageBusy("storage-busy", _TEXT)
        self._loose(file, ("allocate", 0, bytes(size)), bytearray(size))

    def write(self, name: str, offset: int, data: bytes | memoryview) -> None:
        """Write inside a file; not durable before ``sync``."""
        file, new = self._file(name), bytes(data)
        assert file.now is not None
        assert offset + len(new) <= len(file.now)
        self._platter.seen(new)
        self._loose(file, ("write", offset, new), None)
        file.now[offset : offset + len(new)] = new

    def remove(self, name: str) -> None:
        """Remove a file or a folder with all in it; not durable."""
        dies = self._process.strike()
        if dies and self._rng.random() < 0.5:
            self._die("before remove")
        for known in sorted(self._platter.files):
            file = self._platter.files[known]
            if file.now is not None and (known == name or known.startswith(f"{name}/")):
                file.changes.append(("remove", 0, b""))
                file.now = None
        if dies:
            self._die("after remove")

    def sync(self, name: str) -> None:
        """Make a file and its name durable."""
        file = self._file(name)
        dies = self._process.strike()
        if dies and self._rng.random() < 0.5:
            self._die("before sync")
        self._check_space()
        file.settle()
        if dies:
            self._die("after sync")

    # How they die.

    def _file(self, name: str) -> _File:
        return self._platter.files.setdefault(name, _File())

    def _look(self) -> None:
        if self._process.strike():
            self._die("at a read")

    def _die(self, why: str) -> None:
        self._process.die(f"killed {why}")
        raise Crashed

    def _check_space(self) -> None:
        if self._platter.full():
            raise _full()

    def _change(
        self,
        file: _File,
        data: bytes,
        result: Callable[[bytes], bytes | None],
        whole: bytes | None = None,
    ) -> None:
        """Do what is durable at once: all of it, or as much as a crash in the midst leaves."""
        dies = self._process.strike()
        where = self._rng.choice(("before", "amid", "after")) if dies else ""
        if where == "before":
            self._die("before a durable write")
        self._check_space()
        self._platter.seen(data)
        left = whole if whole is not None else result(data)
        if where == "amid":
            left = result(data[: _torn(self._rng, len(data))])
        file.now = None if left is None else bytearray(left)
        file.settle()
        if dies:
            self._die(f"{where} a durable write")

    def _loose(self, file: _File, change: tuple[str, int, bytes], new: bytearray | None) -> None:
        dies = self._process.strike()
        if dies and self._rng.random() < 0.5:
            self._die(f"before {change[0]}")
        self._check_space()
        file.changes.append(change)
        if new is not None:
            file.now = new
        if dies:
            self._die(f"after {change[0]}")


class SimJournal:
    """A ``Journal`` of one incarnation of the coordinator."""

    def __init__(self, platter: Platter, process: Process) -> None:
        self._platter = platter
        self._process = process

    def append(
        self, session_id: bytes, record: bytes, *, lasting: bool = False, clear: bool = False
    ) -> None:
        """Store a record durably, or die or fail: then it may be there or not."""

        def store() -> None:
            self._platter.seen(record)
            rows = self._platter.rows.setdefault(session_id, [])
            if clear:
                rows[:] = [row for row in rows if row[1]]
            rows.append((record, lasting))

        self._commit(store)

    def load(self) -> dict[bytes, list[bytes]]:
        """Return all records."""
        if self._process.strike():
            self._die("as it loads")
        return {name: [row for row, _ in rows] for name, rows in self._platter.rows.items()}

    def forget(self, session_id: bytes) -> None:
        """Drop a session's records."""
        self._commit(lambda: self._platter.rows.pop(session_id, None) and None)

    def _commit(self, store: Callable[[], None]) -> None:
        rng = self._platter.rng
        dies = self._process.strike()
        if dies and rng.random() < 0.5:
            self._die("before a commit")
        if self._platter.full():
            if rng.random() < 0.3:
                store()
            raise _full()
        store()
        if dies:
            self._die("after a commit")

    def _die(self, why: str) -> None:
        self._process.die(f"killed {why}")
        raise Crashed
