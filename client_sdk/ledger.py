"""The silo's ledger on disk: one JSON object a line, durable before it counts.

It guards what a silo sends (see ``secagg.masking.ledger``). Each line ends with a hash over the
previous line's hash and its own text, so a line that was changed, removed or put in is noticed,
down to a bit. What the file cannot tell is that its newest lines are gone: the session's results
tell that (``Session``, ``ledger-rolled-back``).

What a crash explains is a last line that stops short. It was not acted upon, since the message that
it guards goes out only after the write is durable, so it is cut off; if nothing but its line end is
missing, it is kept, which costs nothing: an entry more only forbids more. Anything else is damage,
also a last line that has its hash and no line end but something in its place: that one may have
been acted upon. The silo then refuses to go on.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, Final

from secagg.config import SiloId
from secagg.crypto.labels import LEDGER, digest
from secagg.disk import Disk
from secagg.errors import ConfigError, SecaggError
from secagg.masking.ledger import (
    E,
    Entry,
    Joined,
    Keyed,
    MemoryLedger,
    Opened,
    Recorded,
    Revealed,
)
from secagg.suite import KeyName

_KINDS: Final[dict[str, type[Entry]]] = {
    "joined": Joined,
    "revealed": Revealed,
    "opened": Opened,
    "keyed": Keyed,
}
_HASH: Final = re.compile(rb', "hash": "([0-9a-f]{64})"}')
_HASH_BYTES: Final = len(', "hash": ""}') + 64
_UNCHAINED: Final = bytes(32)


class FileLedger:
    """A durable ledger.

    Args:
        disk: the silo's state, which nobody else writes to meanwhile.
        name: the ledger's file.

    Raises:
        ConfigError: a line is damaged.
        StorageFailed: the file cannot be read.
    """

    def __init__(self, disk: Disk, name: str = "ledger.jsonl") -> None:
        self._disk = disk
        self._name = name
        self._memory = MemoryLedger()
        self._chain = _UNCHAINED
        self._sound = False
        self._writing = threading.Lock()
        self._load()

    def record(self, entry: E) -> Recorded[E]:
        """Check an entry, store it durably, return the evidence (see ``Ledger.record``).

        Raises:
            StorageFailed: it could not be stored; nothing was recorded.
        """
        with self._writing:  # the trainer's thread and the key's keeper
            return self._record(entry)

    def _record(self, entry: E) -> Recorded[E]:
        if not self._sound:  # Ctrl-C in an earlier write: only the file knows how far it came
            self._load()
        self._memory.check(entry)  # CHECK: kept-ledger-entry
        self._sound = False
        table = {"kind": _name(entry), **asdict(entry)}
        text = json.dumps(table, default=bytes.hex).encode().removesuffix(b"}")
        chain = digest(LEDGER, self._chain, text)
        self._disk.append(self._name, b'%b, "hash": "%b"}\n' % (text, chain.hex().encode()))
        self._chain = chain
        recorded = self._memory.record(entry)
        self._sound = True
        return recorded

    def last_attempt(self, session_id: bytes) -> tuple[int, int]:
        """Return the highest (round, attempt) joined in a session; (0, 0) for none."""
        return self._memory.last_attempt(session_id)

    def session_ids(self, name: str) -> frozenset[bytes]:
        """Return the sessions of this name in which an attempt was joined."""
        return self._memory.session_ids(name)

    def revealed(self, base: bytes) -> Revealed | None:
        """Return the reveal on a base, if there was one."""
        return self._memory.revealed(base)

    def last_joined(self, session_id: bytes) -> Joined | None:
        """Return the newest attempt joined in a session, if there was one."""
        return self._memory.last_joined(session_id)

    def update_at(self, position: bytes) -> bytes | None:
        """Return the update that this silo is bound to at a position of a task, if it is."""
        return self._memory.update_at(position)

    def openings(self, session_id: bytes) -> Mapping[str, bytes]:
        """Return the hashes of the openings that were taken in a session, by task."""
        return self._memory.openings(session_id)

    def newest_key(self, session_id: bytes) -> KeyName | None:
        """Return the newest key that was taken in a session, if there was one."""
        return self._memory.newest_key(session_id)

    def _load(self) -> None:
        self._memory = MemoryLedger()
        self._chain = _UNCHAINED
        data = self._disk.read(self._name) or b""
        *lines, tail = data.split(b"\n")
        for number, line in enumerate(lines, start=1):
            self._take(number, line)
        if tail and _is_torn(tail):
            self._disk.truncate(self._name, len(data) - len(tail))
        elif tail:
            self._take(len(lines) + 1, tail)
            self._disk.append(self._name, b"\n")
        self._sound = True

    def _take(self, number: int, line: bytes) -> None:
        try:
            text, end = line[:-_HASH_BYTES], line[-_HASH_BYTES:]
            chain = digest(LEDGER, self._chain, text)
            if end != b', "hash": "%b"}' % chain.hex().encode():  # CHECK: kept-ledger-chain
                raise ValueError
            self._memory.record(_entry(json.loads(text + b"}")))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError, SecaggError):
            raise ConfigError(
                "ledger-damaged",
                f"Line {number} of {self._name} in this silo's state directory is no entry that "
                "follows on the one before.",
                "Restore the file from a backup of this silo; without it the silo cannot know "
                "which sums it has opened.",
            ) from None
        self._chain = chain


def _is_torn(tail: bytes) -> bool:
    """Whether a line without an end stops before its hash does, as a write cut short leaves it."""
    return _HASH.search(tail) is None


def _name(entry: Entry) -> str:
    return next(name for name, kind in _KINDS.items() if isinstance(entry, kind))


def _entry(table: dict[str, Any]) -> Any:
    kind = _KINDS[table.pop("kind")]
    for field in ("session_id", "base", "transcript", "task_hash", "position", "update", "key_id"):
        if field in table:
            table[field] = bytes.fromhex(table[field])
    if kind is Revealed:
        table["survivors"] = tuple(SiloId(name) for name in table["survivors"])
    return kind(**table)
