"""The instrument itself: the shim sees every call, dies where it is told to, and disturbs nothing.

A kill point that the shim cannot see would be a hole in the matrix that nobody notices, so what it
counts in a whole session is compared with what the kernel was asked, by strace.
"""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from . import witness
from .harness import Plan, Run, Template, stored_shares
from .matrix import choose, plans_at, random_plans
from .shim import Call, armed, read_log
from .silo import SILOS, digits, exact_sum, vector

pytestmark = [
    pytest.mark.process,
    pytest.mark.skipif(shutil.which("gcc") is None, reason="the shim needs gcc"),
]

WRITER = """
import os, sys, threading
root = sys.argv[1]
file = os.open(root + "/a", os.O_WRONLY | os.O_CREAT)
os.write(file, b"x" * 100)
os.fsync(file)
os.rename(root + "/a", root + "/b")
os.write(1, b"not below the root")
os.unlink(root + "/b")
threads = [threading.Thread(target=os.mkdir, args=(f"{root}/{n}",)) for n in range(20)]
[t.start() for t in threads], [t.join() for t in threads]
"""
TRACED = (
    "write,pwrite64,writev,pwritev,pwritev2,fsync,fdatasync,sync_file_range,ftruncate,truncate,"
    "fallocate,rename,renameat,renameat2,unlink,unlinkat,rmdir,mkdir,mkdirat,open,openat,openat2,"
    "creat,copy_file_range,sendfile,link,linkat,symlink,symlinkat"
)
OPS = {
    "pwrite64": "pwrite",
    "renameat": "rename",
    "renameat2": "rename",
    "unlinkat": "unlink",
    "mkdirat": "mkdir",
    "openat": "open",
}


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Template:
    return Template.make(tmp_path_factory.mktemp("template").resolve())


def play_writer(template: Template, place: Path, at: str | None) -> tuple[int, Path, list[Call]]:
    """Run the little writer under the shim: its exit code, its root, what was logged."""
    root = place.resolve() / "root"
    root.mkdir()
    environment = armed(template.library, root, place / "log", at)
    command = [sys.executable, "-c", WRITER, str(root)]
    done = subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, check=False)
    return done.returncode, root, read_log(place / "log")


def test_counts_what_is_below_the_root_and_nothing_else(template: Template, tmp_path: Path) -> None:
    code, _, calls = play_writer(template, tmp_path, None)
    assert code == 0
    expected = [
        ("open", "a", 0),
        ("write", "a", 100),
        ("fsync", "a", 0),
        ("rename", "b", 0),
        ("unlink", "b", 0),
    ]
    assert [(c.op, c.path, c.size) for c in calls[:5]] == expected
    assert sorted(c.path for c in calls[5:]) == sorted(str(n) for n in range(20))
    assert [c.index for c in calls] == list(range(1, 26))


@pytest.mark.parametrize(
    ("at", "left"),
    [
        ("before:1", {}),
        ("after:1", {"a": 0}),
        ("before:2", {"a": 0}),
        ("torn:2", {"a": 50}),
        ("after:2", {"a": 100}),
        ("before:4", {"a": 100}),
        ("after:4", {"b": 100}),
        ("after:5", {}),
    ],
)
def test_dies_exactly_where_it_is_told_to(
    template: Template, tmp_path: Path, at: str, left: dict[str, int]
) -> None:
    code, root, calls = play_writer(template, tmp_path, at)
    assert code == -signal.SIGKILL
    assert {path.name: path.stat().st_size for path in root.iterdir()} == left
    assert calls[-1].index == int(at.split(":")[1])


def traced_calls(trace: Path, root: Path) -> Counter[tuple[str, str]]:
    """What strace saw below the root, named as the shim names it."""
    found: Counter[tuple[str, str]] = Counter()
    for line in trace.read_text().splitlines():
        match = re.match(r"(?:\d+ +)?(\w+)\((.*)", line)
        if match is None:
            continue
        name, rest = match.groups()
        if "open" in name and not re.search(r"O_CREAT|O_TRUNC", rest):
            continue
        path = _traced_path(name, rest)
        if (path == str(root) or path.startswith(f"{root}/")) and not path.endswith("-shm"):
            op = "rmdir" if "AT_REMOVEDIR" in rest else OPS.get(name, name)
            found[op, path[len(str(root)) + 1 :] or "."] += 1
    return found


def _traced_path(name: str, rest: str) -> str:
    """The file that a traced call is about; of a rename, its new name."""
    if not re.match(r"open|creat|rename|unlink|rmdir|mkdir|.*link", name):
        files = re.findall(r"\d<([^>]*)>", rest)
        return files[-1] if files else ""
    named = re.findall(r'"([^"]*)"', rest)
    folders = re.findall(r"(?:AT_FDCWD|\d+)<([^>]*)>", rest.split(" = ", maxsplit=1)[0])
    if not named or named[-1].startswith("/") or not folders:
        return named[-1] if named else ""
    return f"{folders[-1]}/{named[-1]}"


def await_end(trace: Path) -> None:
    """The tracer runs beside its tracee, and may write its last lines after that has ended."""
    for _ in range(250):
        if trace.read_text().endswith("+++ exited with 0 +++\n"):
            return
        time.sleep(0.02)
    raise AssertionError("the tracer does not end")


@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not here")
@pytest.mark.parametrize("target", ["coordinator", "silo"])
def test_sees_every_call_that_the_kernel_sees(
    template: Template, tmp_path: Path, target: str
) -> None:
    place, trace = tmp_path.resolve() / "run", tmp_path / "trace"
    tracer = ["strace", "-D", "-f", "-y", "-s0", f"-etrace={TRACED}", "-o", str(trace)]
    place.mkdir()
    verdict = Run(template, place, Plan(target, "count"), tracer).play()
    assert verdict.failures == []
    await_end(trace)
    root = place / ("d" if target == "silo" else "state")
    assert len(verdict.calls) > 10
    assert Counter((c.op, c.path) for c in verdict.calls) == traced_calls(trace, root)


# The judges, on cases that must not pass.


def message(**changes: object) -> witness.Record:
    record: witness.Record = {
        "silo": "a",
        "session": "00",
        "round": 1,
        "attempt": 1,
        "kind": "consistency",
        "digest": "0",
    }
    return record | changes


def test_the_witness_takes_resent_messages_and_new_attempts() -> None:
    advert = {"kind": "advertise_keys", "keys": ["k"]}
    reveal = {"kind": "unmasking", "survivors": ["a", "b", "c"]}
    records = [message(), message(), message(attempt=2, digest="1")]
    records += [message(**advert), message(**advert), message(**reveal)]
    records += [message(**reveal, attempt=2, digest="2")]
    assert witness.faults(records) == []


@pytest.mark.parametrize(
    "second",
    [
        message(digest="1"),
        message(kind="advertise_keys", keys=["k"], attempt=2),
        message(kind="advertise_keys", keys=["k"], silo="b"),
        message(kind="unmasking", digest="3", survivors=["a", "b", "c"]),
        message(kind="unmasking", digest="3", attempt=2, survivors=["a", "b", "d"]),
    ],
)
def test_the_witness_finds_what_a_silo_must_not_do(second: witness.Record) -> None:
    first = [
        message(),
        message(kind="advertise_keys", keys=["k"]),
        message(kind="unmasking", survivors=["a", "b", "c"]),
    ]
    assert witness.faults(first) == []
    assert len(witness.faults([*first, second])) == 1


def test_a_stored_share_is_found(tmp_path: Path) -> None:
    share = bytes(range(100, 133))
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "journal").write_bytes(b"before" + share[:-1])
    assert stored_shares(tmp_path, [share]) == []
    (tmp_path / "deep" / "journal").write_bytes(b"before" + share + b"after")
    (tmp_path / "log").write_text(share.hex().upper())
    assert len(stored_shares(tmp_path, [share])) == 2


def test_a_sum_says_how_often_each_silo_is_in_it() -> None:
    twice = exact_sum(SILOS, 2) + vector("b", 2) - vector("d", 2)
    assert digits(twice, 2) == {"a": [1.0], "b": [2.0], "c": [1.0], "d": [0.0]}


def test_kill_points_cover_every_pattern() -> None:
    calls = [Call(n, "fsync" if n % 10 else "rename", f"f{n % 3}", 8, n) for n in range(1, 101)]
    chosen = choose(calls, 20)
    assert len(chosen) == 20
    assert {c.pattern for c in chosen} == {c.pattern for c in calls}
    assert {p.side for p in plans_at("silo", [Call(1, "write", "f", 8, 1)])} == {
        "before",
        "after",
        "torn",
    }


def test_random_plans_are_the_same_for_a_seed_and_can_be_written_down() -> None:
    spans = {"coordinator": 300.0, "silo": 500.0}
    plans = random_plans(20, 7, spans)
    assert plans == random_plans(20, 7, spans) == [Plan.parse(str(plan)) for plan in plans]
    assert {plan.target for plan in plans} == {"coordinator", "silo"}
