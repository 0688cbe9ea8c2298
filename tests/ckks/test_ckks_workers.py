"""Worker processes: the same results as without them, and right ones when they die."""

from __future__ import annotations

import ctypes
import gc
import io
import logging
import os
import resource
import runpy
import select
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from secagg.ckks import sealing, worker, workers
from secagg.ckks.kernel import Job, Kernel, Work
from secagg.ckks.sealing import Sealer
from secagg.ckks.workers import (
    CHUNK,
    GREETING,
    JOB,
    READY,
    Arena,
    Crew,
    Worker,
    WorkerLostError,
)
from secagg.crypto.secret import Secret
from secagg.errors import OutOfOrder
from secagg.suite import Suite

SUITE = Suite.CKKS_54
N = SUITE.parameters.degree
KEY = Secret(b"an unusual key of 32 bytes here!")
SEED = bytes(32)
JOBS = 6
COUNT = (JOBS - 1) * CHUNK * (N - 1) + 7
LIMIT = 1024
VALUES = np.random.default_rng(5).uniform(-1, 1, COUNT)
STILL = 2.0**-24 / LIMIT
ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _always_worth_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sealing, "WORTH", 1)


@pytest.fixture
def two() -> Iterator[Sealer]:
    made = Sealer(SUITE, KEY, workers=2)
    yield made
    made.close()


def job(work: Work, rows: np.ndarray) -> Job:
    out = np.empty(rows.shape, "<u8" if work is Work.SEAL else "<f8")
    return Job(work, (SEED,), 3, rows, out)


def opens(sealer: Sealer, words: np.ndarray) -> bool:
    opened = np.concatenate(list(sealer.open(words, [SEED], COUNT, LIMIT)))
    return bool(opened.shape == (COUNT,) and np.abs(opened - VALUES).max() < STILL)


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> Counter[int]:
    """How many jobs each worker was given, by its process."""
    real, given = Worker.run, Counter[int]()

    def run(self: Worker, job: Job) -> None:
        given[self.pid] += 1
        real(self, job)

    monkeypatch.setattr(Worker, "run", run)
    return given


def ends(pid: int) -> bool:
    """Whether a process ends within a few seconds."""
    try:
        handle = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([handle], [], [], 15)[0])
    finally:
        os.close(handle)


@contextmanager
def stopped(pid: int) -> Iterator[None]:
    """While a process hangs."""
    os.kill(pid, signal.SIGSTOP)
    os.waitid(os.P_PID, pid, os.WSTOPPED)
    yield


@pytest.mark.process
def test_workers_and_none_open_what_the_other_sealed(two: Sealer, runs: Counter[int]) -> None:
    alone = Sealer(SUITE, KEY, workers=1)
    words = two.seal([VALUES], COUNT, LIMIT, SEED)
    pids = {worker.pid for worker in two._crew._workers}
    assert len(pids) == 2
    assert (set(runs), runs.total()) == (pids, JOBS)  # all of it there, and at each of them
    assert opens(alone, words)
    assert runs.total() == JOBS
    assert opens(two, words)
    assert runs.total() == 2 * JOBS
    assert opens(two, alone.seal([VALUES], COUNT, LIMIT, SEED))
    assert not alone._crew._workers


@pytest.mark.process
def test_the_key_is_in_no_argument_and_no_environment(two: Sealer) -> None:
    two.seal([VALUES], COUNT, LIMIT, SEED)
    for process in two._crew._workers:
        for name in ("cmdline", "environ"):
            said = Path(f"/proc/{process.pid}/{name}").read_bytes()
            assert KEY.reveal() not in said
            assert KEY.reveal().hex().encode() not in said
        assert os.getpgid(process.pid) == process.pid  # no interrupt of the terminal's


@pytest.mark.process
def test_a_killed_worker_s_work_is_done(
    two: Sealer, runs: Counter[int], caplog: pytest.LogCaptureFixture
) -> None:
    words = two.seal([VALUES], COUNT, LIMIT, SEED)
    first, second = (worker.pid for worker in two._crew._workers)
    assert not caplog.records
    os.kill(first, signal.SIGKILL)
    runs.clear()
    assert opens(two, words)
    assert opens(two, two.seal([VALUES], COUNT, LIMIT, SEED))  # by the one that is left, and here
    assert runs[first] == 1
    os.kill(second, signal.SIGKILL)
    assert opens(two, two.seal([VALUES], COUNT, LIMIT, SEED))
    assert (runs[first], len(caplog.records)) == (1, 1)
    assert caplog.records[0].levelno == logging.WARNING
    assert "a worker process of 2 could not be started or was lost" in caplog.text


@pytest.mark.process
def test_a_worker_that_hangs_is_lost_and_its_work_done(
    two: Sealer, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = two.seal([VALUES], COUNT, LIMIT, SEED)
    hung = two._crew._workers[0].pid
    monkeypatch.setattr(workers, "PATIENCE", 0.2)
    with stopped(hung):
        assert opens(two, words)
    assert not Path(f"/proc/{hung}").exists()


@pytest.mark.process
def test_a_worker_that_nobody_refers_to_ends() -> None:
    """Even one that hangs, and would not see that its pipe is closed."""
    worker = Worker(SUITE, KEY)
    pid = worker.pid
    with stopped(pid):
        del worker
        gc.collect()
        assert ends(pid)


@pytest.mark.process
def test_a_worker_is_stopped_while_it_works(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its pipes are closed when nobody reads them any more, and its job is lost."""
    worker, waiting, go_on = Worker(SUITE, KEY), threading.Event(), threading.Event()
    real, lost = worker._await, []

    def wait() -> None:
        waiting.set()
        go_on.wait()
        real()

    def run() -> None:
        try:
            worker.run(job(Work.SEAL, np.zeros((1, N))))
        except WorkerLostError:
            lost.append(True)

    monkeypatch.setattr(worker, "_await", wait)
    threads = [threading.Thread(target=run), threading.Thread(target=worker.stop)]
    threads[0].start()
    waiting.wait()
    threads[1].start()
    threads[1].join(0.2)
    assert not worker._process.stdout.closed
    go_on.set()
    for thread in threads:
        thread.join()
    assert lost == [True]
    assert worker._process.stdout.closed


@pytest.mark.parametrize("written", [0, 1, 48])
def test_a_frame_that_is_not_written_whole_is_a_lost_worker(
    monkeypatch: pytest.MonkeyPatch, written: int
) -> None:
    made: list[SimpleNamespace] = []

    def start(_: int) -> SimpleNamespace:
        pipe = SimpleNamespace(write=lambda frame: min(written, len(frame)), close=lambda: None)
        made.append(
            SimpleNamespace(
                stdin=pipe, stdout=pipe, kill=lambda: None, wait=lambda: made.append("ended")
            )
        )
        return made[0]

    monkeypatch.setattr(workers, "_start", start)
    if written < GREETING.size:
        with pytest.raises(WorkerLostError):
            Worker(SUITE, KEY)
    else:
        worker = Worker(SUITE, KEY)
        worker._greeted = True
        with pytest.raises(WorkerLostError):
            worker.run(Job(Work.SEAL, (SEED, SEED), 0, np.zeros((1, N)), np.empty((1, N))))
    assert made[1:] == ["ended"]


@pytest.mark.process
def test_closing_ends_the_processes_and_not_the_sealer() -> None:
    sealer = Sealer(SUITE, KEY, workers=2)
    words = sealer.seal([VALUES], COUNT, LIMIT, SEED)
    pids = [process.pid for process in sealer._crew._workers]
    threads = list(sealer._crew._threads._threads)
    sealer.close()
    assert not [pid for pid in pids if Path(f"/proc/{pid}").exists()]
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()
    assert opens(sealer, words)
    assert not sealer._crew._workers
    sealer.close()


@pytest.mark.process
def test_closing_between_any_two_pieces(two: Sealer, caplog: pytest.LogCaptureFixture) -> None:
    """Before the first, and after it: what was asked for is done here, and nobody is warned."""
    words = two.seal([VALUES], COUNT, LIMIT, SEED)
    before, after = (two.open(words, [SEED], COUNT, LIMIT) for _ in range(2))
    first = next(after)
    two.close()
    for pieces in ([*before], [first, *after]):
        opened = np.concatenate(pieces)
        assert np.abs(opened - VALUES).max() < STILL
    assert not caplog.records


@pytest.mark.process
def test_two_threads_close_while_others_seal_and_open() -> None:
    for wait in range(3):
        sealer, results = Sealer(SUITE, KEY, workers=2), []
        words = sealer.seal([VALUES], COUNT, LIMIT, SEED)

        def use() -> None:
            results.append(opens(sealer, words))  # noqa: B023
            results.append(opens(sealer, sealer.seal([VALUES], COUNT, LIMIT, SEED)))  # noqa: B023

        users = [threading.Thread(target=use) for _ in range(2)]
        closers = [threading.Thread(target=sealer.close) for _ in range(2)]
        for thread in users:
            thread.start()
        users[0].join(wait * 0.02)
        for thread in closers:
            thread.start()
        for thread in users + closers:
            thread.join()
        assert results == [True] * 4
        assert not sealer._crew._workers


FORK = """
import os, signal, sys
from tests.ckks.test_ckks_workers import *
sealing.WORTH = 1
many, alone = Sealer(SUITE, KEY, workers=2), Sealer(SUITE, KEY, workers=1)
words = many.seal([VALUES], COUNT, LIMIT, SEED)
pieces = many.open(words, [SEED], COUNT, LIMIT)
first = next(pieces)
locks = many._crew._lock, many._kernel._lock, alone._kernel._lock
for lock in locks:
    lock.acquire()
child = os.fork()
if not child:
    signal.alarm(30)
    for use in (
        lambda: many.seal([VALUES], COUNT, LIMIT, SEED),
        lambda: alone.seal([VALUES[:9]], 9, LIMIT, SEED),
        lambda: list(many.open(words, [SEED], COUNT, LIMIT)),
        lambda: list(alone.open(words, [SEED], COUNT, LIMIT)),
        lambda: next(pieces),
    ):
        try:
            use()
        except OutOfOrder as refusal:
            print(refusal.code, flush=True)
    many.close()
    alone.close()
    del pieces, many, alone
    gc.collect()
    sys.exit(7)
for lock in locks:
    lock.release()
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
real, runs = Worker.run, []
Worker.run = lambda self, job: (runs.append(self.pid), real(self, job))[1]
print(np.abs(np.concatenate([first, *pieces]) - VALUES).max() < STILL)
print(opens(many, many.seal([VALUES], COUNT, LIMIT, SEED)), len(runs) >= 2 * JOBS, len(set(runs)))
"""


@pytest.mark.process
def test_a_forked_process_is_refused_and_does_not_hang() -> None:
    """Whatever a thread held at the fork; the parent's workers go on as if nothing had been."""
    command = [sys.executable, "-W", "ignore", "-c", FORK]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["forked"] * 5 + ["7", "True", "True", "True", "2"], done.stderr
    assert not done.stderr


@pytest.mark.parametrize("jobs", [3, 9])
def test_a_fork_submits_nothing_and_ends_nothing(
    monkeypatch: pytest.MonkeyPatch, jobs: int
) -> None:
    """Test twin of the real one: here, what the process thinks of its id, whether or not all jobs
    were submitted before.
    """
    ended: list[str] = []
    end = SimpleNamespace(
        kill=lambda: ended.append("kill"),
        wait=lambda: ended.append("wait"),
        stdin=io.BytesIO(),
        stdout=io.BytesIO(),
    )
    team, home = Crew(SUITE, KEY, 2), workers.Home()
    monkeypatch.setattr(Crew, "_start", lambda self: setattr(self, "_threads", Pool()))

    class Pool:
        def submit(self, *_: object) -> Any:
            ended.append("submitted")
            return SimpleNamespace(result=lambda: None, cancel=lambda: None)

    pieces = team.each(iter(range(jobs)), lambda late: late)  # type: ignore[arg-type]
    next(pieces)
    before, real = list(ended), os.getpid()
    monkeypatch.setattr(os, "getpid", lambda: real + 1)
    team._lock.acquire()
    for use in (lambda: next(pieces), lambda: next(team.each(iter([]), lambda late: late))):
        with pytest.raises(OutOfOrder):
            use()
    team.close()
    workers._end(end, home)
    assert ended == before
    assert end.stdin.closed
    assert end.stdout.closed


ORPHANS = """
import os, signal
from tests.ckks.test_ckks_workers import *
sealing.WORTH = 1
sealer = Sealer(SUITE, KEY, workers=2)
sealer.seal([VALUES], COUNT, LIMIT, SEED)
child = os.fork()
if not child:
    signal.alarm(60)
    signal.pause()
print(child, *(worker.pid for worker in sealer._crew._workers), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.process
def test_workers_end_with_a_parent_that_was_killed() -> None:
    """Though a process that the parent forked, as data loaders are, holds their pipes."""
    with subprocess.Popen(
        [sys.executable, "-c", ORPHANS], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as parent:
        child, *pids = map(int, parent.stdout.readline().split())
        assert parent.wait() == -signal.SIGKILL
        try:
            assert len(pids) == 2
            assert all(ends(pid) for pid in pids)
            os.kill(child, 0)  # it still holds them
        finally:
            os.kill(child, signal.SIGKILL)


@pytest.mark.process
def test_nothing_stays_where_another_process_could_open_it(two: Sealer) -> None:
    """Neither key nor rows, in any of the memory files of this process and the workers."""
    words = two.seal([VALUES], COUNT, LIMIT, SEED)
    assert opens(two, words)
    alone = Sealer(SUITE, KEY, workers=1)
    assert opens(alone, alone.seal([VALUES], COUNT, LIMIT, SEED))
    looked = Counter[str]()
    for pid in [os.getpid(), *(process.pid for process in two._crew._workers)]:
        for name, entry in _files(pid):
            looked[name] += 1
            with entry.open("rb") as file:
                assert not any(file.read()), (pid, name)
    assert looked["/memfd:secagg-ckks (deleted)"] >= 2
    assert looked["/memfd:secagg-ckks-rows (deleted)"] >= 2


def _files(pid: int) -> Iterator[tuple[str, Path]]:
    try:
        entries = list(Path(f"/proc/{pid}/fd").iterdir())
    except PermissionError:  # a worker, unless this is root
        assert pid != os.getpid()
        return
    for entry in entries:
        with suppress(FileNotFoundError):  # what the directory was listed with
            if "secagg-ckks" in (name := os.readlink(entry)):
                yield name, entry


@pytest.mark.process
def test_a_worker_leaves_no_core(two: Sealer) -> None:
    two.seal([VALUES], COUNT, LIMIT, SEED)
    for process in two._crew._workers:
        (line,) = (
            line
            for line in Path(f"/proc/{process.pid}/limits").read_text().splitlines()
            if line.startswith("Max core file size")
        )
        assert line.split()[4:6] == ["0", "0"]
    script = (
        "import ctypes, os; from secagg.ckks.worker import harden; harden();"
        "print(ctypes.CDLL(None).prctl(3, 0, 0, 0, 0));"  # PR_GET_DUMPABLE
        "file = os.memfd_create('own'); open(f'/proc/self/fd/{file}', 'rb').close()"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout == "0\n"


@pytest.mark.parametrize(("cores", "size"), [(1, 1), (3, 3), (64, 8)])
def test_workers_are_as_many_as_cores_up_to_eight(
    monkeypatch: pytest.MonkeyPatch, cores: int, size: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
    assert Sealer(SUITE, KEY)._crew._size == size
    assert Sealer(SUITE, KEY, workers=16)._crew._size == 16


@pytest.mark.process
def test_a_failing_source_leaves_the_workers_usable(two: Sealer) -> None:
    def broken() -> Iterator[np.ndarray]:
        yield VALUES[: COUNT // 2]
        raise RuntimeError("the caller's own")

    with pytest.raises(RuntimeError, match="the caller's own"):
        two.seal(broken(), COUNT, LIMIT, SEED)
    assert opens(two, two.seal([VALUES], COUNT, LIMIT, SEED))


@pytest.mark.process
def test_an_abandoned_iterator_leaves_nothing_under_way(
    two: Sealer, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = two.seal([VALUES], COUNT, LIMIT, SEED)
    real, begun, over = Worker.run, count(), count()

    def run(self: Worker, job: Job) -> None:
        next(begun)
        real(self, job)
        next(over)

    monkeypatch.setattr(Worker, "run", run)
    pieces = two.open(words, [SEED], COUNT, LIMIT)
    next(pieces)
    del pieces
    started = next(begun)
    assert started == next(over)
    two._crew._threads.submit(int).result()
    assert next(begun) == started + 1  # nor does anything begin later
    assert opens(two, words)


@pytest.mark.process
def test_a_worker_that_fails_at_a_job_is_lost() -> None:
    lost = Worker(SUITE, KEY)
    with pytest.raises(WorkerLostError):  # SEAL refuses to load it, in the worker
        lost.run(job(Work.SEAL, np.full((1, N), 1e300)))
    with pytest.raises(WorkerLostError):
        lost.run(job(Work.SEAL, np.zeros((1, N))))


@pytest.mark.process
def test_a_worker_that_ended_between_jobs_is_lost() -> None:
    lost = Worker(SUITE, KEY)
    lost.run(job(Work.SEAL, np.zeros((1, N))))
    os.kill(lost.pid, signal.SIGKILL)
    lost._process.wait()
    with pytest.raises(WorkerLostError):
        lost.run(job(Work.SEAL, np.zeros((1, N))))


@pytest.mark.parametrize("program", ["/nonexistent", "/bin/true", "/bin/echo", "", None])
def test_without_an_interpreter_everything_is_done_here(
    monkeypatch: pytest.MonkeyPatch,
    two: Sealer,
    caplog: pytest.LogCaptureFixture,
    program: str | None,
) -> None:
    monkeypatch.setattr(sys, "executable", program)
    assert opens(two, two.seal([VALUES], COUNT, LIMIT, SEED))
    assert len(caplog.records) == 1


def test_where_no_worker_starts_none_is_tried_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tried: list[object] = []

    def none(*_: object) -> None:
        tried.append(True)
        raise WorkerLostError

    monkeypatch.setattr(workers, "Worker", none)
    team = Crew(SUITE, KEY, 3)
    for _ in range(2):
        assert list(team.each(iter([1, 2]), lambda late: late)) == [1, 2]  # type: ignore[arg-type]
    assert (len(tried), len(caplog.records)) == (1, 1)


def test_what_an_abandoned_iterator_had_not_begun_is_not_done(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    begun: list[object] = []
    release = threading.Event()

    def run(_: object) -> None:
        begun.append(True)
        if len(begun) > 1:
            release.wait()

    worker_like = SimpleNamespace(run=run, stop=lambda: None)
    monkeypatch.setattr(workers, "Worker", lambda *_: worker_like)
    pieces = Crew(SUITE, KEY, 2).each(iter(range(9)), lambda late: late)  # type: ignore[arg-type]
    next(pieces)
    timer = threading.Timer(0.2, release.set)
    timer.start()
    pieces.close()  # type: ignore[attr-defined]
    timer.join()
    assert len(begun) <= 3  # the first, and what two workers were at


def test_a_frozen_program_has_no_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would start itself."""
    monkeypatch.setattr(sys, "frozen", True, raising=False)
    with pytest.raises(WorkerLostError):
        Worker(SUITE, KEY)


def test_some_workers_are_better_than_none(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    made: list[str] = []

    class Few:
        def __init__(self, *_: object) -> None:
            if made:
                raise WorkerLostError
            made.append("one")

        def run(self, _: Job) -> None:
            made.append("job")

        def stop(self) -> None:
            made.append("stopped")

    monkeypatch.setattr(workers, "Worker", Few)
    team = Crew(SUITE, KEY, 3)
    jobs = [job(Work.OPEN, np.zeros((1, N), "<u8")) for _ in range(9)]
    inline: list[Job] = []
    done = list(team.each(iter(jobs), lambda late: inline.append(late) or late))
    assert [id(item) for item in done] == [id(item) for item in jobs]
    assert (made.count("job"), len(inline), len(caplog.records)) == (9, 0, 1)
    team.close()
    assert made[-1] == "stopped"
    assert len(list(team.each(iter(jobs), lambda late: inline.append(late) or late))) == 9
    assert (made.count("job"), len(inline), len(caplog.records)) == (9, 9, 1)


def test_one_worker_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "Worker", None)
    team = Crew(SUITE, KEY, 1)
    jobs = [job(Work.OPEN, np.zeros((1, N), "<u8"))]
    assert list(team.each(iter(jobs), lambda late: late)) == jobs
    team.close()


# ---- the worker's own side, in this process


def requests(*frames: bytes) -> io.BytesIO:
    return io.BytesIO(GREETING.pack(b"ckks-54", KEY.reveal()) + b"".join(frames))


@pytest.fixture
def file() -> Iterator[int]:
    handle = os.memfd_create("arena")
    os.ftruncate(handle, Arena.size(N))
    yield handle
    os.close(handle)


def test_serves_jobs_until_the_requests_end(file: int) -> None:
    arena, rows = Arena(file, N), np.zeros((2, N))
    rows[:, 0], rows[:, 1:] = 1, np.random.default_rng(6).uniform(-9, 9, (2, N - 1))
    arena.rows(Work.SEAL, 2)[:] = rows
    replies = io.BytesIO()
    worker.serve(requests(JOB.pack(Work.SEAL, 1, 2, 3), SEED), replies, file)
    assert replies.getvalue() == READY * 2
    sealed = arena.result(Work.SEAL, 2).copy()
    opened = job(Work.OPEN, sealed)
    Kernel(SUITE, KEY).do(opened)
    assert np.abs(opened.out - rows).max() < 1e-8
    arena.rows(Work.OPEN, 2)[:] = sealed
    worker.serve(requests(JOB.pack(Work.OPEN, 1, 2, 3), SEED), replies, file)
    assert replies.getvalue() == READY * 4
    assert np.array_equal(arena.result(Work.OPEN, 2), opened.out)


@pytest.mark.parametrize(
    "sent",
    [
        io.BytesIO(),
        io.BytesIO(b"x" * (GREETING.size - 1)),
        requests(JOB.pack(Work.SEAL, 2, 1, 0), SEED, SEED[:-1]),
        requests(JOB.pack(Work.SEAL, 1, 1, 0)[:-1]),
    ],
)
def test_a_frame_that_ends_early_is_no_job(file: int, sent: io.BytesIO) -> None:
    with pytest.raises(ValueError, match="inside a frame"):
        worker.serve(sent, io.BytesIO(), file)


def test_replies_go_where_no_print_does(monkeypatch: pytest.MonkeyPatch, file: int) -> None:
    served: list[object] = []

    def serve(stdin: object, replies: io.FileIO, handle: int) -> None:
        os.write(1, b"said by a library\n")
        replies.write(READY)
        served.append((stdin, handle))

    out, err = os.dup(1), os.dup(2)
    reader, writer = os.pipe()
    standard_error = os.memfd_create("stderr")
    try:
        os.dup2(writer, 1)
        os.dup2(standard_error, 2)
        monkeypatch.setattr(worker, "serve", serve)
        monkeypatch.setattr(sys, "argv", ["worker", str(file), "1234"])
        monkeypatch.setattr(threading, "Thread", _thread(served))
        _hardening(monkeypatch, served)
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(stdin := io.BytesIO()))
        worker.main()
        with pytest.raises(ValueError, match="inside a frame"):
            runpy.run_path(worker.__file__, run_name="__main__")
    finally:
        os.dup2(out, 1)
        os.dup2(err, 2)
    assert os.read(reader, 99) == READY
    assert os.pread(standard_error, 99, 0) == b"said by a library\n"
    hardened = [(resource.RLIMIT_CORE, (0, 0)), (4, 0, 0, 0, 0)]  # PR_SET_DUMPABLE
    follower = (True, (1234,), "started")
    assert served == [*hardened, follower, (stdin, file), *hardened, follower]
    for handle in (out, err, reader, writer, standard_error):
        os.close(handle)


def _thread(seen: list[object]) -> object:
    def thread(*, target: object, args: tuple[int], daemon: bool) -> object:
        assert target.__name__ == "follow"  # type: ignore[attr-defined]
        return SimpleNamespace(start=lambda: seen.append((daemon, args, "started")))

    return thread


def _hardening(monkeypatch: pytest.MonkeyPatch, seen: list[object]) -> None:
    """What would harden this process, which could not be undone."""
    monkeypatch.setattr(resource, "setrlimit", lambda *limit: seen.append(limit))
    library = SimpleNamespace(prctl=lambda *numbers: seen.append(numbers))
    monkeypatch.setattr(ctypes, "CDLL", lambda _: library)


def test_a_worker_follows_its_parent(monkeypatch: pytest.MonkeyPatch) -> None:
    parents = iter([5, 5, 1])
    ended: list[int] = []
    monkeypatch.setattr(worker, "_SECONDS", 0)
    monkeypatch.setattr(os, "getppid", lambda: next(parents))
    monkeypatch.setattr(os, "_exit", ended.append)
    worker.follow(5)
    assert ended == [1]
    assert not list(parents)


def test_a_worker_imports_what_its_parent_would(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, str]] = []

    def start(command: list[str], *, env: dict[str, str], **__: object) -> None:
        assert command[1] == "-P"  # and nothing from where it happens to be started
        asked.append(env)
        raise OSError

    monkeypatch.setattr(workers.subprocess, "Popen", start)
    monkeypatch.setattr(sys, "path", ["", "/somewhere"])
    with pytest.raises(WorkerLostError):
        Worker(SUITE, KEY)
    assert asked[0]["PYTHONPATH"] == f"{Path.cwd()}:/somewhere"
