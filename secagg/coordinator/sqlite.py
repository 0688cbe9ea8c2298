"""The journal in an SQLite database: durable at every commit, and proof against silent damage.

SQLite notices neither a flipped bit in a value nor, after a crash, the loss of the end of its
write-ahead log. So every record carries a hash over all before it in its chain (a session has two
chains: its lasting records and its round's), every chain has a *head* with its length and last
hash, and a *seal* over the number of commits and all heads is stored twice: in the database, and
beside it in the *anchor*, a small file written after every commit. The anchor needs no sync of its
own: after a power loss it may be behind the database, never ahead of it. It has two slots, written
in turn, so that a write which is cut short leaves the one before.

    genesis = H("journal/genesis", session_id, kind)
    hash    = H("journal/row", hash before, session_id, seq, kind, record)
    seal    = H("journal/seal", commits, Σ H("journal/head", session_id, kind, born, rows, hash))

A record's ``seq`` is the number of its commit, so none is ever used again.
"""

from __future__ import annotations

import os
import sqlite3
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, NamedTuple

import sqlalchemy as sa
from sqlalchemy.dialects.sqlite import insert as upsert
from sqlalchemy.exc import DBAPIError
from sqlalchemy.pool import StaticPool

from secagg.crypto import labels
from secagg.crypto.labels import digest
from secagg.disk import LocalDisk
from secagg.errors import ConfigError, StorageDamaged, StorageFailed

DATABASE: Final = "journal.sqlite"
ANCHOR: Final = "journal.head"
REVISION: Final = 1  # of the schema; the last one in secagg.coordinator.migrations

_MAGIC: Final = b"secagg-J"
_SLOT_BYTES: Final = 512  # a sector
_SUMS: Final = 2**256
_MACHINE: Final = {  # what SQLite says when the machine is at fault, not the bytes
    sqlite3.SQLITE_BUSY,
    sqlite3.SQLITE_CANTOPEN,
    sqlite3.SQLITE_FULL,
    sqlite3.SQLITE_IOERR,
    sqlite3.SQLITE_LOCKED,
    sqlite3.SQLITE_NOMEM,
    sqlite3.SQLITE_PERM,
    sqlite3.SQLITE_READONLY,
}
_RESTORE: Final = (
    "Check the disk. Then restore the whole folder as it was at one moment, or move it away and"
    " begin anew: its sessions are lost."
)

METADATA: Final = sa.MetaData()
JOURNAL: Final = sa.Table(
    "journal",
    METADATA,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("commits", sa.Integer, nullable=False),
    sa.Column("hash", sa.LargeBinary, nullable=False),
)
HEADS: Final = sa.Table(
    "heads",
    METADATA,
    sa.Column("session_id", sa.LargeBinary, primary_key=True),
    sa.Column("lasting", sa.Integer, primary_key=True),
    sa.Column("born", sa.Integer, nullable=False),
    sa.Column("rows", sa.Integer, nullable=False),
    sa.Column("hash", sa.LargeBinary, nullable=False),
    sqlite_with_rowid=False,
)
RECORDS: Final = sa.Table(
    "records",
    METADATA,
    sa.Column("seq", sa.Integer, primary_key=True),
    sa.Column("session_id", sa.LargeBinary, nullable=False),
    sa.Column("lasting", sa.Integer, nullable=False),
    sa.Column("hash", sa.LargeBinary, nullable=False),
    sa.Column("record", sa.LargeBinary, nullable=False),
    sa.ForeignKeyConstraint(["session_id", "lasting"], ["heads.session_id", "heads.lasting"]),
    sa.Index("records_of", "session_id", "lasting"),
)


def _stored_as(column: sa.Column[Any]) -> sa.ColumnElement[Any]:
    """Read a column in its type, whatever damage made of the value's."""
    empty = b"" if isinstance(column.type, sa.LargeBinary) else 0
    return sa.func.coalesce(sa.cast(column, column.type), empty).label(column.name)


_GET_SEAL: Final = sa.select(*map(_stored_as, JOURNAL.c)).limit(2)
_GET_HEADS: Final = sa.select(*map(_stored_as, HEADS.c)).order_by(HEADS.c.born, HEADS.c.lasting)
_GET_RECORDS: Final = sa.select(*map(_stored_as, RECORDS.c)).order_by(RECORDS.c.seq)
_PUT_SEAL: Final = sa.update(JOURNAL)
_PUT_HEAD: Final = upsert(HEADS).on_conflict_do_update(
    index_elements=["session_id", "lasting"],
    set_={name: upsert(HEADS).excluded[name] for name in ("rows", "hash")},
)
_ADD: Final = sa.insert(RECORDS)
_FORGET: Final = tuple(
    sa.delete(table).where(table.c.session_id == sa.bindparam("session"))
    for table in (RECORDS, HEADS)
)
_CLEAR: Final = _FORGET[0].where(RECORDS.c.lasting == 0)


class _Head(NamedTuple):
    """The end of a chain; ``born`` is the number of the commit that began the session."""

    session_id: bytes
    lasting: int
    born: int
    rows: int
    hash: bytes

    @staticmethod
    def first(session_id: bytes, lasting: int, born: int) -> _Head:
        """Begin a chain."""
        genesis = digest(labels.JOURNAL_GENESIS, session_id, _i64(lasting))
        return _Head(session_id, lasting, born, 0, genesis)

    def emptied(self) -> _Head:
        """Begin the chain again."""
        return _Head.first(self.session_id, self.lasting, self.born)

    def after(self, seq: int, record: bytes) -> _Head:
        """Add a record."""
        place = (self.session_id, _i64(seq), _i64(self.lasting))
        link = digest(labels.JOURNAL_ROW, self.hash, *place, record)
        return self._replace(rows=self.rows + 1, hash=link)

    def number(self) -> int:
        """Return its hash, as a term of the sum in the seal."""
        ends = (_i64(self.lasting), _i64(self.born), _i64(self.rows), self.hash)
        return int.from_bytes(digest(labels.JOURNAL_HEAD, self.session_id, *ends), "big")


_Heads = tuple[_Head, _Head]  # of a session: its round's and its lasting one


class _Seal(NamedTuple):
    """What stands for the whole journal: two with one number of commits differ in their hash."""

    commits: int
    total: int  # the sum of all heads' numbers

    def after(self, gone: Iterable[_Head], come: Iterable[_Head]) -> _Seal:
        """Commit once more, with these heads in the place of those."""
        change = sum(head.number() for head in come) - sum(head.number() for head in gone)
        return _Seal(self.commits + 1, (self.total + change) % _SUMS)

    @property
    def hash(self) -> bytes:
        return digest(labels.JOURNAL_SEAL, _i64(self.commits), self.total.to_bytes(32, "big"))

    def slot(self) -> bytes:
        """What the anchor says of it."""
        body = _MAGIC + _i64(self.commits) + self.hash
        return (body + digest(labels.JOURNAL_ANCHOR, body)).ljust(_SLOT_BYTES, b"\0")


class SqliteJournal:
    """The coordinator's journal on this machine's disk. May be called from any thread.

    Opening brings the database to this version's schema. A journal that failed to store a record
    takes no more: what is on the disk is then known only after opening it again.

    Args:
        directory: made with mode 0700 if there is none; ``LocalDisk.lock`` keeps others out of it.

    Raises:
        StorageDamaged: the database, its log or the anchor is not what was written.
        StorageFailed: the machine's disk refuses.
        ConfigError: the journal was written by a newer version.
    """

    def __init__(self, directory: Path) -> None:
        self._disk = LocalDisk(directory)
        self._path = directory / DATABASE
        self._lock = threading.Lock()
        self._usable = True
        self._examine()
        if not _size(self._path):
            self._disk.append(DATABASE, b"")  # made here, so that it is private
        self._engine = _engine(sa.URL.create("sqlite", database=str(self._path)))
        self._reading = self._engine.execution_options(begin="BEGIN")
        self._writing = self._engine.execution_options(begin="BEGIN IMMEDIATE")
        try:
            with self._translated():
                self._configure()
                self._seal, self._heads = self._opened()
            if self._anchor() != (self._seal.commits, self._seal.hash):
                self._disk.replace(ANCHOR, 2 * self._seal.slot())
            self._anchor_file = os.open(directory / ANCHOR, os.O_WRONLY | os.O_CLOEXEC)
        except BaseException:
            self._engine.dispose()
            raise

    def append(
        self, session_id: bytes, record: bytes, *, lasting: bool = False, clear: bool = False
    ) -> None:
        """Store a record durably."""
        with self._changing():
            seq = self._seal.commits + 1
            begun = (_Head.first(session_id, 0, seq), _Head.first(session_id, 1, seq))
            ends = list(self._heads.get(session_id, begun))
            if clear:
                ends[0] = ends[0].emptied()
            ends[lasting] = ends[lasting].after(seq, record)
            with self._transaction(session_id, (ends[0], ends[1])) as connection:
                if clear:
                    connection.execute(_CLEAR, {"session": session_id})
                connection.execute(_PUT_HEAD, [head._asdict() for head in ends])
                place = {"seq": seq, "session_id": session_id, "lasting": int(lasting)}
                connection.execute(_ADD, place | {"hash": ends[lasting].hash, "record": record})

    def load(self) -> dict[bytes, list[bytes]]:
        """Return all records, by session in order of creation, each session's in order."""
        with self._lock:
            self._check_usable()  # CHECK: journal-usable-load
            with self._translated(), self._reading.begin() as connection:
                found = connection.exec_driver_sql("PRAGMA integrity_check").scalars().all()
                if found != ["ok"]:  # CHECK: journal-integrity
                    raise self._damaged(f"SQLite finds in it: {'; '.join(map(str, found[:3]))}")
                # CHECK: journal-since-opened
                if self._stored(connection) != (self._seal, self._heads):
                    raise self._damaged("its chains do not end as they did when it was opened")
                return self._verified(connection.execute(_GET_RECORDS))

    def forget(self, session_id: bytes) -> None:
        """Drop a session's records."""
        with self._changing():
            if session_id not in self._heads:
                return
            with self._transaction(session_id, None) as connection:
                for statement in _FORGET:
                    connection.execute(statement, {"session": session_id})

    def close(self) -> None:
        """Let go of the files; what is in the log moves to the database."""
        with self._lock:
            self._usable = False
            self._engine.dispose()
            if self._anchor_file >= 0:
                os.close(self._anchor_file)
            self._anchor_file = -1

    def _examine(self) -> None:
        """Check what can be checked before anything may be written: damage stays as it was found.

        A connection that may write would, at its end, drop the part of the log it did not believe;
        and any connection drops the log of an empty database.
        """
        if self._disk.read(ANCHOR) is None:
            return  # the first start, which may have been cut short: there is work to undo
        if not _size(self._path):
            self._compare(_Seal(0, 0))
            return
        query = {"uri": "true", "mode": "ro"}
        engine = _engine(
            sa.URL.create("sqlite", database=self._path.resolve().as_uri(), query=query)
        )
        try:
            with self._translated(), engine.connect() as connection:
                self._checked(connection)
        finally:
            engine.dispose()

    def _configure(self) -> None:
        with self._engine.connect() as connection:
            mode = connection.exec_driver_sql("PRAGMA journal_mode=WAL").scalar()
            if mode != "wal":
                raise StorageFailed(
                    "storage-failed",
                    f"{self._path} cannot have a write-ahead log (its mode stays {mode}).",
                    "Put the folder on a local file system.",
                )
            connection.exec_driver_sql("PRAGMA synchronous=FULL")
            connection.exec_driver_sql("PRAGMA foreign_keys=ON")

    def _opened(self) -> tuple[_Seal, dict[bytes, _Heads]]:
        with self._reading.begin() as connection:
            revision = self._checked(connection)
        if revision != REVISION:
            self._upgrade(new=not revision)
        with self._reading.begin() as connection:
            return self._stored(connection)

    def _checked(self, connection: sa.Connection) -> int:
        """Return the schema's revision, after comparing what is there with the anchor."""
        revision = self._revision(connection)
        self._compare(self._stored(connection)[0] if revision else _Seal(0, 0))
        return revision

    def _compare(self, seal: _Seal) -> None:
        anchor = self._anchor()
        if anchor is None:
            if seal.commits:  # CHECK: journal-anchor-there
                raise self._damaged(f"{ANCHOR} beside it is gone")
        elif anchor[0] > seal.commits:
            raise self._damaged(  # CHECK: journal-anchor-behind
                f"it ends after {seal.commits} commits, and {ANCHOR} beside it counts {anchor[0]}"
            )
        elif anchor[0] == seal.commits and anchor[1] != seal.hash:  # CHECK: journal-anchor-same
            raise self._damaged(f"it is not the one that {ANCHOR} beside it belongs to")

    def _revision(self, connection: sa.Connection) -> int:
        """Return the schema's revision; 0 if there is no schema.

        It is kept twice, so that damage to it does not pass for a newer version.
        """
        if not connection.exec_driver_sql("SELECT count(*) FROM sqlite_master").scalar():
            return 0
        number = int(connection.exec_driver_sql("PRAGMA user_version").scalar_one())
        names = connection.exec_driver_sql("SELECT version_num FROM alembic_version")
        if number < 1 or names.scalars().all() != [_name(number)]:  # CHECK: journal-revision
            raise self._damaged("the revision of its schema cannot be told")
        if number > REVISION:  # CHECK: journal-revision-known
            raise ConfigError(
                "journal-version",
                f"{self._path} has revision {number} of the schema; this version of secagg knows"
                f" {REVISION}.",
                "Start the version that wrote it, or a newer one.",
            )
        return number

    def _upgrade(self, *, new: bool) -> None:
        from alembic import command  # slow to import, and seldom needed
        from alembic.config import Config

        config = Config()
        config.set_main_option("script_location", "secagg.coordinator:migrations")
        with self._writing.begin() as connection:
            config.attributes["connection"] = connection
            command.upgrade(config, _name(REVISION))
            connection.exec_driver_sql(f"PRAGMA user_version={REVISION}")
            if new:
                seal = {"commits": 0, "hash": _Seal(0, 0).hash}
                connection.execute(sa.insert(JOURNAL), {"id": 1} | seal)

    def _anchor(self) -> tuple[int, bytes] | None:
        """Return the anchor's number of commits and hash; None if there is no anchor."""
        data = self._disk.read(ANCHOR)
        if data is None:
            return None
        slots = [data[at : at + _SLOT_BYTES] for at in (0, _SLOT_BYTES)]
        whole = [found for slot in slots if (found := _read_slot(slot)) is not None]
        if len(data) != 2 * _SLOT_BYTES or not whole:  # CHECK: journal-anchor-whole
            raise self._damaged(f"{ANCHOR} beside it is not what was written")
        return max(whole)

    def _stored(self, connection: sa.Connection) -> tuple[_Seal, dict[bytes, _Heads]]:
        rows = [_Head(*row) for row in connection.execute(_GET_HEADS)]
        heads: dict[bytes, list[_Head]] = {}
        for head in rows:
            heads.setdefault(head.session_id, []).append(head)
        seals = connection.execute(_GET_SEAL).all()
        seal = _Seal(seals[0].commits if seals else 0, sum(head.number() for head in rows) % _SUMS)
        if len(seals) != 1 or seals[0].hash != seal.hash:  # CHECK: journal-seal
            raise self._damaged("its chains do not end with what was written")
        return seal, {name: (both[0], both[1]) for name, both in heads.items()}

    def _verified(self, rows: Iterable[Any]) -> dict[bytes, list[bytes]]:
        ends = {name: [head.emptied() for head in both] for name, both in self._heads.items()}
        last = {name: both[0].born for name, both in self._heads.items()}
        records: dict[bytes, list[bytes]] = {name: [] for name in self._heads}
        for seq, name, lasting, link, record in rows:
            if name not in ends or lasting not in (0, 1):  # CHECK: journal-record-session
                raise self._damaged(f"its record {seq} belongs to no session", name)
            ends[name][lasting] = ends[name][lasting].after(seq, record)
            if ends[name][lasting].hash != link:  # CHECK: journal-record-link
                raise self._damaged(
                    f"its record {seq} is not what was written, or not after what it followed", name
                )
            records[name].append(record)
            last[name] = seq
        for name, both in self._heads.items():
            if tuple(ends[name]) != both:  # CHECK: journal-record-last
                raise self._damaged(f"a record is gone; the last one there is {last[name]}", name)
        return records

    @contextmanager
    def _transaction(self, session_id: bytes, ends: _Heads | None) -> Iterator[sa.Connection]:
        """Commit what is done here with the new seal; without ``ends`` the session is gone."""
        seal = self._seal.after(self._heads.get(session_id, ()), ends or ())
        with self._writing.begin() as connection:
            yield connection
            connection.execute(_PUT_SEAL, {"commits": seal.commits, "hash": seal.hash})
        self._seal = seal
        if ends:
            self._heads[session_id] = ends
        else:
            del self._heads[session_id]
        os.pwrite(self._anchor_file, seal.slot(), seal.commits % 2 * _SLOT_BYTES)

    @contextmanager
    def _changing(self) -> Iterator[None]:
        """Hold the journal; unless all goes well, it takes no more."""
        with self._lock:
            self._check_usable()  # CHECK: journal-usable-change
            self._usable = False
            try:
                yield
            except (DBAPIError, OSError, UnicodeDecodeError) as error:
                raise self._failed(error) from None
            self._usable = True

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except DBAPIError as error:
            code = getattr(error.orig, "sqlite_errorcode", sqlite3.SQLITE_CORRUPT)
            if code & 0xFF in _MACHINE:
                raise self._failed(error) from None
            raise self._damaged(f"SQLite says: {error.orig}") from None  # CHECK: journal-sqlite
        except UnicodeDecodeError:  # SQLite quotes the damage
            raise self._damaged("SQLite cannot say how") from None  # CHECK: journal-sqlite-text

    def _check_usable(self) -> None:
        if not self._usable:  # CHECK: journal-usable
            raise StorageFailed(
                "storage-failed",
                f"{self._path} was closed, or an earlier write to it failed.",
                "Start the coordinator again once the disk is well.",
            )

    def _failed(self, error: DBAPIError | OSError | UnicodeDecodeError) -> StorageFailed:
        why: object = "it is damaged"
        if not isinstance(error, UnicodeDecodeError):
            why = error.orig if isinstance(error, DBAPIError) else error.strerror
        return StorageFailed(
            "storage-failed",
            f"{self._path} cannot be read or written: {why}.",
            "See that the disk has space left and no errors, and that this user owns the folder.",
        )

    def _damaged(self, what: str, session_id: bytes | None = None) -> StorageDamaged:
        whose = f" (session {session_id[:8].hex()}…)" if session_id is not None else ""
        return StorageDamaged(
            "journal-damaged", f"{self._path} is damaged: {what}{whose}.", _RESTORE
        )


def _engine(url: sa.URL) -> sa.Engine:
    """One connection, whose transactions begin as their engine's options say, and only there."""
    engine = sa.create_engine(
        url,
        poolclass=StaticPool,
        connect_args={"check_same_thread": False, "isolation_level": None},
        hide_parameters=True,
    )

    @sa.event.listens_for(engine, "begin")
    def begin(connection: sa.Connection) -> None:
        if statement := connection.get_execution_options().get("begin"):
            connection.exec_driver_sql(statement)

    return engine


def _read_slot(slot: bytes) -> tuple[int, bytes] | None:
    """Number of commits and hash, if the slot is whole."""
    body, check, rest = slot[:48], slot[48:80], slot[80:]
    whole = body[:8] == _MAGIC and check == digest(labels.JOURNAL_ANCHOR, body) and not any(rest)
    return (int.from_bytes(body[8:16], "big"), body[16:]) if whole else None


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _name(revision: int) -> str:
    return f"{revision:04}"


def _i64(value: int) -> bytes:
    """A number as SQLite can hold it: as ``u64``, and what damage made negative has one too."""
    return value.to_bytes(8, "big", signed=True)
