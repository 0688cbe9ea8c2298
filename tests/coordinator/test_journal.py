"""The journal: two implementations that agree, and no damage that passes for what was written."""

from __future__ import annotations

import os
import random
import shutil
import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from hypothesis import given, settings
from hypothesis import strategies as st

from secagg.coordinator.journal import Journal, MemoryJournal
from secagg.coordinator.sqlite import ANCHOR, DATABASE, METADATA, REVISION, SqliteJournal
from secagg.errors import ConfigError, StorageDamaged, StorageFailed

Records = dict[bytes, list[bytes]]
Operation = Callable[[Journal], None]
SESSIONS = [bytes([number]) * 32 for number in range(1, 6)]


def appending(session: bytes, record: bytes, lasting: bool, clear: bool) -> Operation:
    return lambda journal: journal.append(session, record, lasting=lasting, clear=clear)


def forgetting(session: bytes) -> Operation:
    return lambda journal: journal.forget(session)


OPERATIONS = st.one_of(
    st.builds(
        appending,
        st.sampled_from(SESSIONS[:3]),
        st.binary(max_size=40),
        st.booleans(),
        st.sampled_from([False, False, True]),
    ),
    st.builds(forgetting, st.sampled_from(SESSIONS[:3])),
)


def operations(rng: random.Random, count: int) -> Iterator[Operation]:
    """What a coordinator with a few sessions does: records from a few bytes to several pages."""
    for _ in range(count):
        session = rng.choice(SESSIONS)
        if rng.random() < 0.06:
            yield forgetting(session)
        else:
            record = rng.randbytes(rng.choice([0, 20, 300, 3000, 9000]))
            yield appending(session, record, rng.random() < 0.3, rng.random() < 0.15)


@contextmanager
def opened(directory: Path) -> Iterator[SqliteJournal]:
    with closing(SqliteJournal(directory)) as journal:
        yield journal


def stored(directory: Path) -> Records:
    with opened(directory) as journal:
        unsynced(journal)
        return journal.load()


def unsynced(journal: SqliteJournal) -> None:
    """No power is lost in these tests, and a slow disk would make them slow."""
    with journal._engine.connect() as connection:
        connection.exec_driver_sql("PRAGMA synchronous=OFF")


def copied(directory: Path, target: Path) -> Path:
    """What a kill would leave behind of a journal that is open."""
    shutil.rmtree(target, ignore_errors=True)
    return shutil.copytree(directory, target)


@pytest.fixture(scope="module")
def empty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A journal without records: copying it is faster than making one."""
    directory = tmp_path_factory.mktemp("empty") / "journal"
    assert stored(directory) == {}
    return directory


@settings(max_examples=60, deadline=None)
@given(operations=st.lists(OPERATIONS | st.none(), max_size=15))
def test_both_journals_agree(
    empty: Path,
    tmp_path_factory: pytest.TempPathFactory,
    operations: list[Operation | None],
) -> None:
    directory = shutil.copytree(empty, tmp_path_factory.mktemp("agree") / "journal")
    model, journal = MemoryJournal(), SqliteJournal(directory)
    unsynced(journal)
    try:
        for operation in operations:
            if operation is None:
                journal.close()
                journal = SqliteJournal(directory)
                unsynced(journal)
                continue
            operation(model)
            operation(journal)
        assert list(journal.load().items()) == list(model.load().items())
    finally:
        journal.close()
    assert list(stored(directory).items()) == list(model.load().items())


@pytest.mark.parametrize("seed", [1, 2])
def test_a_kill_after_any_append_loses_nothing(tmp_path: Path, seed: int) -> None:
    model, rng = MemoryJournal(), random.Random(seed)
    with opened(tmp_path / "live") as journal:
        unsynced(journal)
        for operation in operations(rng, 60):
            operation(model)
            operation(journal)
            assert stored(copied(tmp_path / "live", tmp_path / "copy")) == model.load()
    assert stored(tmp_path / "live") == model.load()


def test_a_kill_between_the_commit_and_the_anchor_loses_nothing(tmp_path: Path) -> None:
    with opened(tmp_path / "live") as journal:
        journal.append(SESSIONS[0], b"one")
        anchor = (tmp_path / "live" / ANCHOR).read_bytes()
        journal.append(SESSIONS[0], b"two")
        copy = copied(tmp_path / "live", tmp_path / "copy")
        after = (copy / ANCHOR).read_bytes()
    (copy / ANCHOR).write_bytes(anchor)
    assert stored(copy) == {SESSIONS[0]: [b"one", b"two"]}
    assert (copy / ANCHOR).read_bytes()[:512] == after[:512]  # the second commit's slot


class Killed(BaseException):
    """Stands for the end of the process."""


@pytest.mark.parametrize("when", ["before", "inside", "after"])
def test_a_kill_at_the_first_start_leaves_no_trace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    upgrade = command.upgrade

    def interrupted(*args: Any) -> None:
        if when == "inside":
            upgrade(*args)
        raise Killed

    with monkeypatch.context() as patch:
        if when == "after":
            patch.setattr("secagg.disk.LocalDisk.replace", interrupted)
        else:
            patch.setattr(command, "upgrade", interrupted)
        with pytest.raises(Killed):
            SqliteJournal(tmp_path)
    assert not (tmp_path / ANCHOR).exists()
    with closing(sqlite3.connect(tmp_path / DATABASE)) as database:
        tables = database.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
    assert bool(tables) == (when == "after")
    with opened(tmp_path) as journal:
        assert journal.load() == {}
        journal.append(SESSIONS[0], b"record")
    assert stored(tmp_path) == {SESSIONS[0]: [b"record"]}


def test_the_anchor_of_an_empty_journal_may_outlive_its_database(
    empty: Path, tmp_path: Path
) -> None:
    copy = copied(empty, tmp_path / "copy")
    (copy / DATABASE).unlink()
    assert stored(copy) == {}


def realistic(directory: Path, rng: random.Random) -> tuple[dict[str, Path], Records]:
    """One journal as different ends of its process leave it, and what is in it.

    Closed: without a log. Killed: with a log that the database does not hold yet. Moved: with a log
    that it does hold. Torn: killed while the log was being moved there.
    """
    model, live = MemoryJournal(), directory / "closed"
    for count in (70, 25):
        before = (live / DATABASE).read_bytes() if live.exists() else b""
        with opened(live) as journal:
            unsynced(journal)
            for operation in operations(rng, count):
                operation(model)
                operation(journal)
            killed = copied(live, directory / "killed")
            with journal._engine.connect() as connection:
                connection.exec_driver_sql("PRAGMA wal_checkpoint(PASSIVE)")
            moved = copied(live, directory / "moved")
    torn, after = copied(killed, directory / "torn"), (moved / DATABASE).read_bytes()
    pages = [
        rng.choice([before.ljust(len(after), b"\0"), after])[at : at + 4096]
        for at in range(0, len(after), 4096)
    ]
    (torn / DATABASE).write_bytes(b"".join(pages))
    assert (killed / f"{DATABASE}-wal").stat().st_size > 50_000
    assert not (live / f"{DATABASE}-wal").exists()
    return {path.name: path for path in (live, killed, moved, torn)}, model.load()


def places(directory: Path, rng: random.Random) -> Iterator[tuple[str, int]]:
    """Bits of all files: of headers, of first pages, and of everything."""
    for path in sorted(directory.iterdir()):
        size = path.stat().st_size
        some = 10 if path.name.endswith("-shm") else 35
        for byte in rng.sample(range(min(size, 100)), some):
            yield path.name, 8 * byte + rng.randrange(8)
        if path.name != ANCHOR:
            yield from ((path.name, rng.randrange(8 * 4096)) for _ in range(some // 2))
            yield from ((path.name, rng.randrange(8 * size)) for _ in range(some))


def test_no_flipped_bit_passes_for_what_was_written(tmp_path: Path) -> None:
    rng = random.Random(3)
    directories, expected = realistic(tmp_path, rng)
    outcomes = {True: 0, False: 0}
    for directory in directories.values():
        assert sound(copied(directory, tmp_path / "copy"), expected, (directory.name, 0))
        for name, bit in places(directory, rng):
            copy = copied(directory, tmp_path / "copy")
            flip(copy / name, bit)
            outcomes[sound(copy, expected, (f"{directory.name}/{name}", bit))] += 1
    assert sum(outcomes.values()) > 700
    assert min(outcomes.values()) > 200


def flip(path: Path, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


def sound(directory: Path, expected: Records, place: tuple[str, int]) -> bool:
    """Open a journal that may be damaged; False: it says so, and again when opened again."""
    try:
        found = stored(directory)
    except StorageDamaged:
        with pytest.raises(StorageDamaged, match=f"journal-damaged.*{directory}"):
            stored(directory)
        return False
    assert found == expected, place
    return True


def edited(directory: Path, *statements: str) -> None:
    with closing(sqlite3.connect(directory / DATABASE)) as database:
        for statement in statements:
            assert database.execute(statement).rowcount != 0, statement
        database.commit()


@pytest.mark.parametrize(
    ("statement", "says"),
    [
        ("DELETE FROM records WHERE seq = 4", "last one there is 3 (session 0101010101010101…)"),
        ("DELETE FROM records WHERE seq = 1", "record 3 is not .* (session 0101010101010101…)"),
        ("UPDATE records SET record = x'00' WHERE seq = 2", "record 2 is .* (session 0202"),
        ("UPDATE records SET record = 'one' WHERE seq = 1", ""),
        ("UPDATE records SET record = 5 WHERE seq = 1", "record 1 is not"),
        ("UPDATE records SET lasting = 0 WHERE seq = 2", "record 2 is not"),
        ("UPDATE records SET lasting = 7 WHERE seq = 2", "record 2 belongs to no session"),
        ("UPDATE records SET seq = 9 WHERE seq = 4", "record 9 is not"),
        ("UPDATE records SET seq = -9 WHERE seq = 4", "record -9 is not"),
        ("UPDATE records SET session_id = x'0a' WHERE seq = 2", "belongs to no session"),
        ("INSERT INTO records SELECT 9, session_id, 1, hash, x'' FROM heads LIMIT 1", "record 9"),
        ("DELETE FROM heads WHERE rows = 0", "do not end"),
        ("UPDATE heads SET born = -3 WHERE rows = 1", "do not end"),
        ("UPDATE heads SET hash = 17", "do not end"),
        ("INSERT INTO heads VALUES (x'0a', 0, 5, 0, x'00')", "do not end"),
        ("DELETE FROM journal", "do not end"),
        ("INSERT INTO journal VALUES (2, 0, x'00')", "do not end"),
        ("UPDATE journal SET commits = 9", "do not end"),
        ("UPDATE journal SET commits = 'many'", "do not end"),
        ("DELETE FROM alembic_version", "revision of its schema"),
        ("UPDATE alembic_version SET version_num = '0002'", "revision of its schema"),
        ("UPDATE alembic_version SET version_num = CAST(x'ff' AS TEXT)", ""),
        ("PRAGMA user_version = 2", "revision of its schema"),
        ("DROP TABLE alembic_version", "no such table"),
        ("DROP TABLE journal", "no such table"),
        ("DROP INDEX records_of", ""),
    ],
)
def test_what_is_missing_or_changed_is_named(
    empty: Path, tmp_path: Path, statement: str, says: str
) -> None:
    copy, expected = copied(empty, tmp_path / "copy"), MemoryJournal()
    with opened(copy) as journal:
        for both in (journal, expected):
            both.append(SESSIONS[0], b"one")
            both.append(SESSIONS[1], b"two", lasting=True)
            both.append(SESSIONS[0], b"three")
            both.append(SESSIONS[0], b"four")
    edited(copy, statement)
    if not says:
        sound(copy, expected.load(), (DATABASE, 0))
        return
    with pytest.raises(StorageDamaged, match=says.replace("(", r"\(").replace(")", r"\)")):
        stored(copy)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("sql = 'CREATE INDEX records_of ON records (hash)'", r"SQLite finds in it: .*records_of"),
        ("sql = '', name = CAST(x'ff' AS TEXT)", "SQLite cannot say how"),
    ],
)
def test_an_index_of_something_else_is_noticed(
    empty: Path, tmp_path: Path, change: str, says: str
) -> None:
    copy = copied(empty, tmp_path / "copy")
    with opened(copy) as journal:
        journal.append(SESSIONS[0], b"one")
    statement = f"UPDATE sqlite_master SET {change} WHERE name = 'records_of'"
    edited(copy, "PRAGMA writable_schema = ON", statement)
    with pytest.raises(StorageDamaged, match=says):
        stored(copy)


def test_what_another_has_written_since_it_was_opened_is_noticed(
    empty: Path, tmp_path: Path
) -> None:
    copy = copied(empty, tmp_path / "copy")
    with opened(copy) as journal:
        with opened(copy) as another:
            another.append(SESSIONS[0], b"one")
        with pytest.raises(StorageDamaged, match="as they did when it was opened"):
            journal.load()


def contents(directory: Path) -> dict[str, bytes]:
    files = (DATABASE, f"{DATABASE}-wal", ANCHOR)
    return {name: (directory / name).read_bytes() for name in files}


def test_a_lost_end_of_the_log_is_noticed_and_left_alone(empty: Path, tmp_path: Path) -> None:
    with opened(copied(empty, tmp_path / "live")) as journal:
        for number in range(3):
            journal.append(SESSIONS[0], bytes([number]))
        copy = copied(tmp_path / "live", tmp_path / "copy")
    log = copy / f"{DATABASE}-wal"
    os.truncate(log, log.stat().st_size - 100)
    before = contents(copy)
    with pytest.raises(StorageDamaged, match=f"after 2 commits, and {ANCHOR} beside it counts 3"):
        SqliteJournal(copy)
    assert contents(copy) == before


@pytest.mark.parametrize("name", [DATABASE, ANCHOR])
def test_a_lost_file_is_noticed(empty: Path, tmp_path: Path, name: str) -> None:
    copy = copied(empty, tmp_path / "copy")
    with opened(copy) as journal:
        journal.append(SESSIONS[0], b"record")
    (copy / name).unlink()
    for _ in range(2):
        with pytest.raises(StorageDamaged, match=ANCHOR):
            SqliteJournal(copy)


@pytest.mark.parametrize("older", [1, 2])
def test_an_older_database_under_the_anchor_is_noticed(
    empty: Path, tmp_path: Path, older: int
) -> None:
    """Restored by hand, or, with as many commits, of another journal."""
    copy = copied(empty, tmp_path / "copy")
    with opened(copy) as journal:
        journal.append(SESSIONS[0], b"one")
        journal.append(SESSIONS[0], b"two")
    other = copied(empty, tmp_path / "other")
    with opened(other) as journal:
        for _ in range(older):
            journal.append(SESSIONS[0], b"one")
    shutil.copy(other / DATABASE, copy / DATABASE)
    with pytest.raises(StorageDamaged, match=ANCHOR):
        SqliteJournal(copy)


@pytest.mark.parametrize("content", [b"", b"x", bytes(80), bytes(4096)])
def test_a_damaged_anchor_is_noticed(empty: Path, tmp_path: Path, content: bytes) -> None:
    copy = copied(empty, tmp_path / "copy")
    (copy / ANCHOR).write_bytes(content)
    with pytest.raises(StorageDamaged, match=ANCHOR):
        SqliteJournal(copy)


@pytest.mark.parametrize("content", [b"no database " * 1000, bytes(8192)])
def test_no_database_at_all(tmp_path: Path, content: bytes) -> None:
    (tmp_path / DATABASE).write_bytes(content)
    with pytest.raises(StorageDamaged, match=DATABASE):
        SqliteJournal(tmp_path)


@pytest.mark.parametrize("gone", [False, True])
def test_the_log_of_an_emptied_database_is_left_alone(
    empty: Path, tmp_path: Path, gone: bool
) -> None:
    """SQLite would remove it, and all may be in it."""
    with opened(copied(empty, tmp_path / "live")) as journal:
        journal.append(SESSIONS[0], b"record")
        copy = copied(tmp_path / "live", tmp_path / "copy")
    (copy / DATABASE).unlink()
    if not gone:
        (copy / DATABASE).touch()
    log = (copy / f"{DATABASE}-wal").read_bytes()
    with pytest.raises(StorageDamaged, match="after 0 commits"):
        SqliteJournal(copy)
    assert (copy / f"{DATABASE}-wal").read_bytes() == log


def test_a_newer_journal_is_refused_and_left_alone(empty: Path, tmp_path: Path) -> None:
    copy = copied(empty, tmp_path / "copy")
    newer = REVISION + 1
    edited(
        copy,
        f"PRAGMA user_version = {newer}",
        f"UPDATE alembic_version SET version_num = '{newer:04}'",
    )
    before = (copy / DATABASE).read_bytes()
    (copy / ANCHOR).write_bytes(b"in a newer form")
    with pytest.raises(ConfigError, match="or a newer one") as caught:
        SqliteJournal(copy)
    assert caught.value.code == "journal-version"
    assert (copy / DATABASE).read_bytes() == before


def test_the_migrations_make_the_schema_that_is_used(empty: Path) -> None:
    config = Config()
    config.set_main_option("script_location", "secagg.coordinator:migrations")
    assert ScriptDirectory.from_config(config).get_current_head() == f"{REVISION:04}"
    with opened(empty) as journal, journal._engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), METADATA) == []


def test_every_commit_is_synced(empty: Path) -> None:
    """As far as it can be seen from here: SQLite syncs the log at every commit with these."""
    with opened(empty) as journal, journal._engine.connect() as connection:
        wanted = {"journal_mode": "wal", "synchronous": 2, "foreign_keys": 1}
        for name, value in wanted.items():
            assert connection.exec_driver_sql(f"PRAGMA {name}").scalar() == value


def test_a_transaction_begins_with_the_write_lock(empty: Path, tmp_path: Path) -> None:
    copy = copied(empty, tmp_path / "copy")
    statements: list[str] = []
    with opened(copy) as journal:
        with journal._engine.connect() as connection:
            raw = connection.connection.dbapi_connection
            assert isinstance(raw, sqlite3.Connection)
        raw.set_trace_callback(statements.append)
        journal.append(SESSIONS[0], b"record", clear=True)
        raw.set_trace_callback(None)
        assert not raw.in_transaction
    assert statements[0] == "BEGIN IMMEDIATE"
    assert statements[-1] == "COMMIT"
    assert sum(word in "BEGIN IMMEDIATE COMMIT" for word in statements) == 2


def test_nobody_else_reads_it(tmp_path: Path) -> None:
    with opened(tmp_path / "journal") as journal:
        journal.append(SESSIONS[0], b"record")
        modes = {path.name: path.stat().st_mode & 0o777 for path in journal._path.parent.iterdir()}
    files = (DATABASE, f"{DATABASE}-wal", f"{DATABASE}-shm", ANCHOR)
    assert modes == dict.fromkeys(files, 0o600)
    assert (tmp_path / "journal").stat().st_mode & 0o777 == 0o700


def test_a_clean_close_empties_the_log(tmp_path: Path) -> None:
    with opened(tmp_path) as journal:
        journal.append(SESSIONS[0], b"record")
    assert sorted(path.name for path in tmp_path.iterdir()) == [ANCHOR, DATABASE]
    journal.close()
    with pytest.raises(StorageFailed, match="closed"):
        journal.append(SESSIONS[0], b"record")
    with pytest.raises(StorageFailed, match="closed"):
        journal.load()


def test_a_full_disk_stops_it(empty: Path, tmp_path: Path) -> None:
    copy = copied(empty, tmp_path / "copy")
    with opened(copy) as journal:
        journal.append(SESSIONS[0], b"one")
        with journal._engine.connect() as connection:
            connection.exec_driver_sql("PRAGMA max_page_count=20")
        with pytest.raises(StorageFailed, match="disk is full") as caught:
            journal.append(SESSIONS[0], b"\xaa" * 100_000)
        assert caught.value.code == "storage-failed"
        assert "\\xaa" not in str(caught.value)
        for operation in (appending(SESSIONS[0], b"two", False, False), forgetting(bytes(32))):
            with pytest.raises(StorageFailed, match="earlier write to it failed"):
                operation(journal)
    assert stored(copy) == {SESSIONS[0]: [b"one"]}


def test_a_read_only_database_stops_it(empty: Path, tmp_path: Path) -> None:
    with opened(copied(empty, tmp_path / "copy")) as journal:
        journal.append(SESSIONS[0], b"one")
        with journal._engine.connect() as connection:
            connection.exec_driver_sql("PRAGMA query_only=ON")
        with pytest.raises(StorageFailed, match="readonly"):
            journal.forget(SESSIONS[0])
        with pytest.raises(StorageFailed, match="earlier"):
            journal.append(SESSIONS[0], b"two")


def test_an_anchor_that_cannot_be_written_stops_it(empty: Path, tmp_path: Path) -> None:
    """The record is there, as after a kill at that moment: nobody was told so."""
    copy = copied(empty, tmp_path / "copy")
    with opened(copy) as journal:
        os.close(journal._anchor_file)
        journal._anchor_file = os.open(copy / ANCHOR, os.O_RDONLY)
        with pytest.raises(StorageFailed, match="Bad file descriptor"):
            journal.append(SESSIONS[0], b"one")
        with pytest.raises(StorageFailed, match="earlier"):
            journal.append(SESSIONS[0], b"two")
    assert stored(copy) == {SESSIONS[0]: [b"one"]}


def test_many_threads_append(empty: Path, tmp_path: Path) -> None:
    with opened(copied(empty, tmp_path / "copy")) as journal:

        def work(session: bytes) -> None:
            for number in range(10):
                journal.append(session, bytes([number]), lasting=number % 2 == 0)

        threads = [threading.Thread(target=work, args=(session,)) for session in SESSIONS]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert journal.load() == {name: [bytes([n]) for n in range(10)] for name in journal.load()}
    assert set(stored(tmp_path / "copy")) == set(SESSIONS)


@pytest.mark.parametrize("whole", [0, 1, 40, 80, 511])
def test_a_torn_anchor_is_the_one_before(tmp_path: Path, whole: int) -> None:
    with opened(tmp_path / "live") as journal:
        journal.append(SESSIONS[0], b"one")
        before = (tmp_path / "live" / ANCHOR).read_bytes()
        journal.append(SESSIONS[0], b"two")
        copy = copied(tmp_path / "live", tmp_path / "copy")
    after = (copy / ANCHOR).read_bytes()
    (slot,) = [at for at in (0, 512) if before[at : at + 512] != after[at : at + 512]]
    torn = before[:slot] + after[slot : slot + whole] + before[slot + whole :]
    (copy / ANCHOR).write_bytes(torn)
    assert stored(copy) == {SESSIONS[0]: [b"one", b"two"]}
