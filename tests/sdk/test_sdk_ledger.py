"""The ledger on disk: locked, durable before it counts, torn and damaged lines, rules kept."""

from __future__ import annotations

import errno
import json
import os
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import client_sdk
from client_sdk import ledger as module
from client_sdk.channel import Channel
from client_sdk.ledger import FileLedger
from client_sdk.session import Session
from secagg.config import silo_id
from secagg.encoding.schema import Schema
from secagg.errors import ConfigError, CredentialError, FaultyServer, PolicyRefused
from secagg.masking.ledger import Joined, Opened, Revealed

from .fakes import FakeChannel, join_fake
from .federation import SILOS, Federation, make_session, make_sum, refused

ID, BASE, TAU = b"\x01" * 32, b"\x02" * 32, b"\x03" * 32
ABC = tuple(silo_id(name) for name in "abc")
JOINED = Joined("study", ID, 2, 3, BASE, TAU)
REVEALED = Revealed(BASE, TAU, ABC)
OPENED = Opened(ID, "training", TAU)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state" / "ledger.jsonl"


@pytest.fixture
def ledger(path: Path) -> Iterator[FileLedger]:
    opened = FileLedger(path)
    yield opened
    opened.close()


def reopened(ledger: FileLedger, path: Path) -> FileLedger:
    ledger.close()
    ledger._file = os.open(path, os.O_RDONLY)  # for the fixture to close
    return FileLedger(path)


def test_what_was_recorded_is_known_after_a_restart(ledger: FileLedger, path: Path) -> None:
    assert ledger.last_attempt(ID) == (0, 0)
    assert ledger.record(JOINED).entry == JOINED
    assert ledger.record(REVEALED).entry == REVEALED
    assert ledger.record(OPENED).entry == OPENED
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    again = reopened(ledger, path)
    for known in (ledger, again):
        assert known.last_attempt(ID) == (2, 3)
        assert known.session_ids("study") == {ID}
        assert known.revealed(BASE) == REVEALED
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
    again.close()


def test_a_second_process_of_the_silo_is_refused(ledger: FileLedger, path: Path) -> None:
    code = (
        "import pathlib, sys\nfrom client_sdk.ledger import FileLedger\n"
        "FileLedger(pathlib.Path(sys.argv[1]))"
    )
    command = [sys.executable, "-c", code, str(path)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)
    assert "[ledger-locked]" in done.stderr
    with refused(ConfigError, "ledger-locked"):
        FileLedger(path)
    again = reopened(ledger, path)
    again.close()


@pytest.mark.parametrize("cut", [1, 2, 40])
def test_a_torn_last_line_is_cut_off(ledger: FileLedger, path: Path, cut: int) -> None:
    ledger.record(OPENED)
    whole = path.read_bytes()
    ledger.record(JOINED)
    path.write_bytes(path.read_bytes()[:-cut])
    again = reopened(ledger, path)
    assert path.read_bytes() == whole
    assert again.last_attempt(ID) == (0, 0)
    again.record(JOINED)
    again.close()
    third = FileLedger(path)
    assert third.last_attempt(ID) == (2, 3)
    third.close()


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
    "\x00" * 16,
    "\ud800",
]


@pytest.mark.parametrize("line", DAMAGED)
def test_a_damaged_line_is_named_and_frees_the_lock(path: Path, line: str) -> None:
    path.parent.mkdir()
    bad = line.encode(errors="surrogatepass")
    path.write_bytes(joined().encode() + b"\n" + bad + b"\n" + joined(round=9).encode() + b"\n")
    before = path.read_bytes()
    with refused(ConfigError, "ledger-damaged") as caught:
        FileLedger(path)
    assert "line 2" in str(caught.value)
    assert path.read_bytes() == before
    path.write_text(joined() + "\n")
    FileLedger(path).close()


def test_a_write_that_the_disk_cuts_short_is_finished(
    ledger: FileLedger, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.write
    monkeypatch.setattr(module.os, "write", lambda file, data: real(file, data[:7]))
    ledger.record(JOINED)
    assert json.loads(path.read_text())["attempt"] == 3


@pytest.mark.parametrize("fails", ["write", "fsync"])
def test_a_full_disk_leaves_the_ledger_as_it_was(
    ledger: FileLedger, path: Path, monkeypatch: pytest.MonkeyPatch, fails: str
) -> None:
    """No evidence is handed out, and no half line is left for later ones to be appended to."""
    ledger.record(OPENED)
    before, real = path.read_bytes(), os.write

    def full(file: int, data: bytes = b"") -> int:
        if fails == "write":
            real(file, data[:7])
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(module.os, fails, full)
        with pytest.raises(OSError, match="No space"):
            ledger.record(JOINED)
    assert path.read_bytes() == before
    assert ledger.last_attempt(ID) == (0, 0)
    ledger.record(JOINED)
    again = reopened(ledger, path)
    assert again.last_attempt(ID) == (2, 3)
    again.close()


def test_a_new_ledger_is_in_its_directory_for_good(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[bool] = []
    real = os.fsync

    def fsync(file: int) -> None:
        synced.append(stat.S_ISDIR(os.fstat(file).st_mode))
        real(file)

    monkeypatch.setattr(module.os, "fsync", fsync)
    FileLedger(path).close()
    assert synced == [True]


def test_every_guarded_message_leaves_after_its_entry_is_synced(
    federation: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In order: the opening before Ready, the attempt before a key, the reveal before a share."""
    name = federation.create(make_sum(rounds=1))
    order: dict[int, list[str]] = {}
    real_call, real_sync, real_write = Channel.call, os.fsync, os.write

    def note(what: str) -> None:
        order.setdefault(threading.get_ident(), []).append(what)

    def call(self: Channel, method: str, request: Any, kind: Any, **options: Any) -> Any:
        note(request.WhichOneof("message") if method == "Send" else method)
        return real_call(self, method, request, kind, **options)

    def fsync(file: int) -> None:
        real_sync(file)
        note("synced")

    def write(file: int, data: bytes) -> int:
        if data.startswith(b'{"kind"'):
            note(json.loads(data)["kind"])
        return real_write(file, data)

    monkeypatch.setattr(Channel, "call", call)
    monkeypatch.setattr(module.os, "fsync", fsync)
    monkeypatch.setattr(module.os, "write", write)
    threads = federation.play(name, lambda s: (threading.get_ident(), s.sum({"x": np.ones(1)}))[0])
    for silo in SILOS:
        events = [e for e in order[threads[silo]] if e not in ("Next", "PutChunk", "GetChunk")]
        start = events.index("opened")
        assert events[start : start + 2] == ["opened", "synced"]
        assert events[events.index("Ready") + 1 :] == [
            *("joined", "synced", "advertise_keys", "share_keys", "masked_input", "consistency"),
            *("revealed", "synced", "unmasking"),
        ]
        assert start < events.index("Ready")


def test_a_full_disk_keeps_the_silo_silent(
    federation: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = FakeChannel(federation, make_session(make_sum()))
    with join_fake(monkeypatch, federation, fake) as session:

        def full(_: int) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        def last_moment() -> Any:
            monkeypatch.setattr(module.os, "fsync", full)
            return fake.descriptor("statistics")

        fake.events = [last_moment]
        with pytest.raises(OSError, match="No space"):
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
