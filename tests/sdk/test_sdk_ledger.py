"""The ledger on disk: locked, durable before it counts, torn and damaged lines, rules kept."""

from __future__ import annotations

import contextlib
import errno
import json
import stat
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import client_sdk
from client_sdk.channel import Channel
from client_sdk.ledger import FileLedger
from client_sdk.session import Session
from secagg import disk as disk_module
from secagg.config import silo_id
from secagg.crypto.labels import LEDGER, digest
from secagg.disk import LocalDisk
from secagg.encoding.schema import Schema
from secagg.errors import ConfigError, CredentialError, FaultyServer, PolicyRefused, StorageFailed
from secagg.masking.ledger import Joined, Opened, Revealed

from .fakes import FakeChannel, MemoryDisk, join_fake
from .federation import SILOS, Federation, make_session, make_sum, refused

ID, BASE, TAU = b"\x01" * 32, b"\x02" * 32, b"\x03" * 32
ABC = tuple(silo_id(name) for name in "abc")
JOINED = Joined("study", ID, 2, 3, BASE, TAU)
REVEALED = Revealed(BASE, TAU, ABC, b"\x04" * 32)
OPENED = Opened(ID, "training", TAU)
ENTRIES = (OPENED, JOINED, REVEALED)


@pytest.fixture
def disk(tmp_path: Path) -> LocalDisk:
    return LocalDisk(tmp_path / "state")


@pytest.fixture
def path(disk: LocalDisk) -> Path:
    return disk.root / "ledger.jsonl"


def written(disk: LocalDisk) -> bytes:
    """A ledger of three entries."""
    ledger = FileLedger(disk)
    for entry in ENTRIES:
        ledger.record(entry)
    return (disk.root / "ledger.jsonl").read_bytes()


def knows(ledger: FileLedger) -> tuple[bool, bool, bool]:
    """Which of the three entries a ledger has."""
    return (
        "training" in ledger.openings(ID),
        ledger.last_attempt(ID) == (2, 3),
        ledger.revealed(BASE) == REVEALED,
    )


def test_what_was_recorded_is_known_after_a_restart(disk: LocalDisk, path: Path) -> None:
    ledger = FileLedger(disk)
    assert ledger.last_attempt(ID) == (0, 0)
    for entry in ENTRIES:
        assert ledger.record(entry).entry == entry
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    again = FileLedger(disk)
    for known in (ledger, again):
        assert knows(known) == (True, True, True)
        assert known.session_ids("study") == {ID}
        assert known.revealed(TAU) is None
    for entry in (JOINED, Joined("study", ID, 1, 9, BASE, TAU)):
        with refused(FaultyServer, "descriptor-replay"):
            again.record(entry)
    with refused(PolicyRefused, "differencing"):
        again.record(Revealed(BASE, TAU, ABC[:2]))
    with refused(FaultyServer, "task-replaced"):
        again.record(Opened(ID, "training", BASE))
    again.record(REVEALED)
    again.record(OPENED)
    assert len(path.read_text().splitlines()) == 5  # what was refused was not written
    assert knows(FileLedger(disk)) == (True, True, True)


def test_a_second_session_of_the_silo_is_refused(
    federation: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_session(make_sum())
    with join_fake(monkeypatch, federation, FakeChannel(federation, config)):
        second = FakeChannel(federation, config)
        with refused(ConfigError, "ledger-locked"):
            join_fake(monkeypatch, federation, second)
        assert second.closed
    join_fake(monkeypatch, federation, FakeChannel(federation, config)).close()


def test_a_torn_last_line_is_cut_off_wherever_it_is_torn(disk: LocalDisk, path: Path) -> None:
    whole = written(disk)
    before = whole[: whole[:-1].rindex(b"\n") + 1]
    for size in range(len(before), len(whole) - 1):
        path.write_bytes(whole[:size])
        again = FileLedger(disk)
        assert path.read_bytes() == before
        assert knows(again) == (True, True, False)
    again.record(REVEALED)
    assert path.read_bytes() == whole


def test_a_last_line_without_its_end_counts(disk: LocalDisk, path: Path) -> None:
    """It may have been written whole; to remember it only forbids more."""
    whole = written(disk)
    path.write_bytes(whole[:-1])
    assert knows(FileLedger(disk)) == (True, True, True)
    assert path.read_bytes() == whole


def test_every_flipped_bit_is_noticed(disk: LocalDisk) -> None:
    """Also in the last line's end, which then looks torn and was acted upon."""
    whole, copy = written(disk), MemoryDisk()
    for bit in range(8 * len(whole)):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        copy.replace("ledger.jsonl", damaged)
        with refused(ConfigError, "ledger-damaged"):
            FileLedger(copy)  # type: ignore[arg-type]
        assert copy.files["ledger.jsonl"] == damaged


def test_a_flipped_bit_of_a_torn_ledger_is_noticed_or_was_not_acted_upon(
    disk: LocalDisk, path: Path
) -> None:
    whole, generator = written(disk), np.random.default_rng(1)
    last = whole[:-1].rindex(b"\n") + 1
    for _ in range(300):
        damaged = bytearray(whole[: generator.integers(last + 1, len(whole))])
        bit = int(generator.integers(8 * len(damaged)))
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        if bit // 8 < last:
            with refused(ConfigError, "ledger-damaged"):
                FileLedger(disk)
            continue
        with contextlib.suppress(ConfigError):  # a bit became a line's end
            assert knows(FileLedger(disk)) == (True, True, False)


@pytest.mark.parametrize("order", [(1, 2), (0, 2), (0, 2, 1), (0, 1, 1, 2), (2,), (1,)])
def test_lines_removed_moved_or_doubled_are_noticed(
    disk: LocalDisk, path: Path, order: tuple[int, ...]
) -> None:
    lines = written(disk).splitlines(keepends=True)
    path.write_bytes(b"".join(lines[number] for number in order))
    with refused(ConfigError, "ledger-damaged"):
        FileLedger(disk)


def joined(**changes: Any) -> str:
    table: dict[str, Any] = {
        "kind": "joined",
        "session": "study",
        "session_id": ID.hex(),
        "round": 2,
        "attempt": 3,
        "base": BASE.hex(),
        "transcript": TAU.hex(),
    }
    return json.dumps(table | changes)


def chained(*texts: str) -> bytes:
    """Lines whose hashes are right, whatever they hold."""
    chain, data = bytes(32), b""
    for text in texts:
        body = text.encode(errors="surrogatepass").removesuffix(b"}")
        chain = digest(LEDGER, chain, body)
        data += body + b', "hash": "' + chain.hex().encode() + b'"}\n'
    return data


DAMAGED = [
    "",
    "{",
    "[]",
    "null",
    "7",
    '"joined"',
    "{}",
    '{"kind": "other"}',
    '{"kind": "joined"}',
    '{"kind": ["joined"]}',
    joined(more=1),
    joined(base="xy"),
    joined(base=5),
    joined(round="2"),
    joined(),  # once more: an attempt is joined once
    "[" * 100_000,
    "\x00" * 16,
    "\ud800",
]


@pytest.mark.parametrize("line", DAMAGED)
@pytest.mark.parametrize("hashed", [False, True])
def test_a_damaged_line_is_named(disk: LocalDisk, path: Path, line: str, hashed: bool) -> None:
    if hashed:
        path.write_bytes(chained(joined(), line, joined(round=9)))
    else:
        bad = line.encode(errors="surrogatepass") + b"\n"
        path.write_bytes(chained(joined()) + bad + chained(joined(round=9)))
    before = path.read_bytes()
    with refused(ConfigError, "ledger-damaged") as caught:
        FileLedger(disk)
    assert "Line 2 " in str(caught.value)
    assert path.read_bytes() == before
    path.write_bytes(chained(joined()))
    assert FileLedger(disk).last_attempt(ID) == (2, 3)


def test_a_full_disk_leaves_the_ledger_as_it_was(
    disk: LocalDisk, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No evidence is handed out, and what is recorded later follows on what is there."""
    ledger = FileLedger(disk)
    ledger.record(OPENED)
    before = path.read_bytes()

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(disk_module.os, "fsync", full)
        with refused(StorageFailed, "storage-failed"):
            ledger.record(JOINED)
    assert path.read_bytes() == before
    assert ledger.last_attempt(ID) == (0, 0)
    ledger.record(JOINED)
    assert FileLedger(disk).last_attempt(ID) == (2, 3)


def test_every_guarded_message_leaves_after_its_entry_is_durable(
    federation: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In order: opening and update before Ready, attempt before a key, reveal before a share."""
    name = federation.create(make_sum(rounds=1))
    order: dict[int, list[str]] = {}
    real_call, real_append, real_replace = Channel.call, LocalDisk.append, LocalDisk.replace

    def note(what: str) -> None:
        order.setdefault(threading.get_ident(), []).append(what)

    def call(self: Channel, method: str, request: Any, kind: Any, **options: Any) -> Any:
        note(request.WhichOneof("message") if method == "Send" else method)
        return real_call(self, method, request, kind, **options)

    def append(self: LocalDisk, file: str, data: bytes) -> None:
        real_append(self, file, data)
        note(json.loads(data)["kind"])

    def replace(self: LocalDisk, file: str, *parts: Any) -> None:
        real_replace(self, file, *parts)
        note(file.rpartition("/")[2].partition("-")[0])

    monkeypatch.setattr(Channel, "call", call)
    monkeypatch.setattr(LocalDisk, "append", append)
    monkeypatch.setattr(LocalDisk, "replace", replace)
    threads = federation.play(name, lambda s: (threading.get_ident(), s.sum({"x": np.ones(1)}))[0])
    for silo in SILOS:
        events = [e for e in order[threads[silo]] if e not in ("Next", "PutChunk", "GetChunk")]
        assert events[events.index("opened") :] == [
            *("opened", "ListResults", "update", "JoinSession", "Ready"),
            *("joined", "advertise_keys", "share_keys", "masked_input", "consistency"),
            *("revealed", "unmasking"),
        ]


def test_a_full_disk_keeps_the_silo_silent(
    federation: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = FakeChannel(federation, make_session(make_sum()))
    with join_fake(monkeypatch, federation, fake) as session:

        def full(_: int) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        def last_moment() -> Any:
            monkeypatch.setattr(disk_module.os, "fsync", full)
            return fake.descriptor("statistics")

        fake.events = [last_moment]
        with refused(StorageFailed, "storage-failed"):
            session.sum({"x": np.ones(1)})
    assert "Send" not in fake.methods
    assert fake.methods[-1] == "Leave"


def test_no_second_sum_on_a_base_after_a_restart(
    federation: Federation,
) -> None:
    """A coordinator forgets the result and brings other survivors: the silo remembers.

    The twin session has the same parameters under another name, hence the same bases.
    """
    parameters: dict[str, Any] = {"train_deadline": 0.5, "phase_deadline": 1.0, "max_attempts": 1}
    first = federation.create(make_sum(rounds=1), **parameters)
    twin = federation.create(make_sum(rounds=1), **parameters)

    def program(session: Session) -> Any:
        session.open_task("statistics", Schema.of({"x": np.zeros(1)}))
        return session.sum({"x": np.full(1, 2.0)})["x"]

    assert federation.play(first, program)["a"] == pytest.approx(8.0)

    def again(session: Session) -> None:
        with refused(PolicyRefused, "differencing"):
            program(session)

    federation.play(twin, again, SILOS[:3])
    with client_sdk.join(twin, profile=federation.silo("a")) as session:
        assert session.rounds_done == 0
    assert federation.show(twin).summary.results == 0
    assert federation.play(twin, program)["a"] == pytest.approx(8.0)  # the same four may


def test_a_refused_profile_leaves_no_ledger_locked(
    federation: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A notebook holds a profile until its certificate ends, renews it and joins again."""
    name = federation.create(make_sum(rounds=1))
    profile = client_sdk.load_profile(federation.silo("a"))
    ended = CredentialError("certificate-expired", "It ended.")

    def expired(*_: Any) -> None:
        raise ended

    with monkeypatch.context() as patch:
        patch.setattr(type(profile.credentials), "check_validity", expired)
        with refused(CredentialError, "certificate-expired"):
            client_sdk.join(name, profile=profile)
    client_sdk.join(name, profile=profile).close()


@pytest.mark.parametrize("written", [0, 10, None])
def test_an_interrupted_write_is_looked_up(tmp_path: Path, written: int | None) -> None:
    """Ctrl-C in a notebook: the file alone knows how much of the entry is there."""
    disk = LocalDisk(tmp_path)
    ledger = FileLedger(disk)
    ledger.record(JOINED)
    append = disk.append

    def interrupted(name: str, data: bytes) -> None:
        append(name, data[:written])
        raise KeyboardInterrupt

    disk.append = interrupted  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        ledger.record(replace(JOINED, round=3))
    disk.append = append  # type: ignore[method-assign]
    ledger.record(replace(JOINED, round=4))
    assert FileLedger(disk).last_attempt(ID) == (4, 3)
