"""The coordinator's journal: what it accepted, in order, written down before it answers.

Sessions are a fold over their records (``secagg.coordinator.session``), so the journal is all that
a coordinator which was killed needs, with the blobs that lie beside it on the ``Disk``. A session's
*lasting* records (its configuration, its tasks, its results) stay until it is forgotten; the others
belong to the round in progress and go when it has moved on.

Two implementations: ``SqliteJournal`` and, for simulation and tests, ``MemoryJournal``.
"""

from __future__ import annotations

from typing import Protocol


class Journal(Protocol):
    """Durable, ordered records of sessions."""

    def append(
        self, session_id: bytes, record: bytes, *, lasting: bool = False, clear: bool = False
    ) -> None:
        """Store a record durably: it is there when this returns.

        Args:
            session_id: 32 bytes.
            record: a serialised ``journal.proto`` Record.
            lasting: it stays until the session is forgotten; else it is the round's.
            clear: in the same transaction and before it, drop the session's records of the round.

        Raises:
            StorageFailed: it could not be stored; whoever appended must not go on.
        """
        ...

    def load(self) -> dict[bytes, list[bytes]]:
        """Return all records, by session in order of creation, each session's in order.

        Raises:
            StorageDamaged: a record is not what was stored, or is gone; the text names the place.
        """
        ...

    def forget(self, session_id: bytes) -> None:
        """Drop a session's records.

        Raises:
            StorageFailed: as ``append``.
        """
        ...


class MemoryJournal:
    """A journal that lasts as long as its object: outlives a simulated crash, not a process."""

    def __init__(self) -> None:
        self._rows: dict[bytes, list[tuple[bytes, bool]]] = {}

    def append(
        self, session_id: bytes, record: bytes, *, lasting: bool = False, clear: bool = False
    ) -> None:
        """Store a record."""
        rows = self._rows.setdefault(session_id, [])
        if clear:
            rows[:] = [row for row in rows if row[1]]
        rows.append((record, lasting))

    def load(self) -> dict[bytes, list[bytes]]:
        """Return all records."""
        return {name: [record for record, _ in rows] for name, rows in self._rows.items()}

    def forget(self, session_id: bytes) -> None:
        """Drop a session's records."""
        self._rows.pop(session_id, None)
