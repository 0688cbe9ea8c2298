"""Worker processes: SEAL on every core, since TenSEAL holds the interpreter's lock.

A worker is a fresh interpreter (no fork: a trainer has threads of its own; no multiprocessing: its
script has no main guard), in a process group of its own, so that a terminal's interrupt ends the
trainer alone. The key and the jobs reach it through a pipe, never through arguments or environment,
which other processes can read; rows pass through memory that the two share, and are wiped from it
after each job, since other processes of the user can open it. It ends with its parent: when the
pipe does, or, where a process that the parent forked holds the pipe, within a second.

    parent → worker   greeting: suite 16 bytes, key material 32 bytes; then jobs:
                      work u8, number of seeds u16, rows u32, first ciphertext u64, seeds 32 bytes
                      each
    worker → parent   one byte READY after the greeting and after each job
    shared memory     rows of a job, then rows of its result, each of CHUNK rows

A worker that fails, however it does, or is silent for PATIENCE, is lost: it is ended, and its job
is done by the caller, where an error has its name. The result of a lost worker is never used. A
program that is no interpreter (frozen, embedded) has none.

Workers are their maker's: a process that is forked from it is refused (``engine.Home``).
"""

from __future__ import annotations

import contextlib
import logging
import mmap
import os
import select
import struct
import subprocess
import sys
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from queue import Empty, SimpleQueue
from threading import Lock, RLock
from typing import IO, Any, Final, NoReturn

import numpy as np
import numpy.typing as npt

from secagg.ckks.engine import Home
from secagg.ckks.kernel import Job, Work
from secagg.crypto.secret import Secret
from secagg.suite import Suite

CHUNK: Final = 32
"""Rows of a job: 1 MiB, some 10 ms."""
GREETING: Final = struct.Struct("<16s32s")
JOB: Final = struct.Struct("<BHIQ")
SEED_BYTES: Final = 32
READY: Final = b"\x06"
PATIENCE: Final = 120
"""Seconds that a worker may take to start, or for a job: a thousand times what it takes."""
log = logging.getLogger("secagg.ckks")


class WorkerLostError(Exception):
    """A worker ended or said something that it never says."""


class Arena:
    """A worker's shared memory: the rows of a job and those of its result.

    Args:
        file: of ``Arena.size(degree)`` bytes.
        degree: N.
    """

    def __init__(self, file: int, degree: int) -> None:
        self._memory = mmap.mmap(file, self.size(degree))
        self._degree = degree

    @staticmethod
    def size(degree: int) -> int:
        """Bytes of an arena."""
        return 2 * CHUNK * degree * 8

    def rows(self, work: Work, rows: int) -> npt.NDArray[Any]:
        """The job's rows."""
        return self._view(np.dtype("<f8" if work is Work.SEAL else "<u8"), rows, 0)

    def result(self, work: Work, rows: int) -> npt.NDArray[Any]:
        """The result's rows."""
        return self._view(np.dtype("<u8" if work is Work.SEAL else "<f8"), rows, CHUNK)

    def wipe(self, rows: int) -> None:
        """Overwrite a job's rows and its result."""
        for skip in (0, CHUNK):
            self._view(np.dtype("<u8"), rows, skip)[:] = 0

    def _view(self, dtype: np.dtype[Any], rows: int, skip: int) -> npt.NDArray[Any]:
        offset = skip * self._degree * 8
        flat = np.frombuffer(self._memory, dtype, rows * self._degree, offset)
        return flat.reshape(rows, self._degree)


class Worker:
    """One worker process, greeted: it starts while its maker goes on.

    Args:
        suite: the parameters.
        material: what the key is derived from.

    Raises:
        WorkerLostError: no process could be started.
    """

    def __init__(self, suite: Suite, material: Secret) -> None:
        degree = suite.parameters.degree
        file = os.memfd_create("secagg-ckks-rows")
        try:
            os.ftruncate(file, Arena.size(degree))
            self._arena = Arena(file, degree)
            self._process = _start(file)
        except OSError as error:
            raise WorkerLostError from error
        finally:
            os.close(file)
        self._end = weakref.finalize(self, _end, self._process, Home())
        self._lock = RLock()
        self._greeted = False
        self._send(GREETING.pack(suite.encode(), material.reveal()))

    @property
    def pid(self) -> int:
        """The process's id."""
        return self._process.pid

    def run(self, job: Job) -> None:
        """Do a job.

        Raises:
            WorkerLostError: it is not done, ``job.out`` may hold anything, and the worker has
                ended.
        """
        with self._lock:
            if not self._end.alive:
                raise WorkerLostError
            if not self._greeted:
                self._await()
                self._greeted = True
            rows = len(job.rows)
            try:
                self._arena.rows(job.work, rows)[:] = job.rows
                head = JOB.pack(job.work, len(job.seeds), rows, job.first)
                self._send(b"".join((head, *job.seeds)))
                self._await()
                job.out[:] = self._arena.result(job.work, rows)
            finally:
                self._arena.wipe(rows)

    def stop(self) -> None:
        """End the process, which holds nothing to put away; a job in another thread is lost."""
        self._process.kill()
        with self._lock:  # pipes are closed once nobody reads them
            self._end()

    def _send(self, frame: bytes) -> None:
        try:
            sent = _pipe(self._process.stdin).write(frame)  # it fits the pipe, which is empty
        except OSError as error:
            self.stop()
            raise WorkerLostError from error
        if sent != len(frame):
            self._lose()

    def _await(self) -> None:
        replies = _pipe(self._process.stdout)
        waiting = select.poll()  # unlike select, for any descriptor
        waiting.register(replies, select.POLLIN)
        if not waiting.poll(1000 * PATIENCE) or replies.read(1) != READY:
            self._lose()

    def _lose(self) -> NoReturn:
        self.stop()
        raise WorkerLostError


class Crew:
    """Up to ``size`` workers, each with a thread of this process that waits for it.

    Args:
        suite: the parameters.
        material: what the key is derived from.
        size: how many workers; 1 is none, since this process can do as much.
    """

    def __init__(self, suite: Suite, material: Secret, size: int) -> None:
        self._suite = suite
        self._material = material
        self._size = size
        self._home = Home()
        self._idle: SimpleQueue[Worker] = SimpleQueue()
        self._workers: list[Worker] = []
        self._threads: ThreadPoolExecutor | None = None
        self._closed = size == 1
        self._warned = False
        self._lock = Lock()

    def each(self, jobs: Iterator[Job], inline: Callable[[Job], Job]) -> Iterator[Job]:
        """Do jobs, and yield them in order; a few are under way at a time.

        The workers start with the first call. Where there are none, or no more, or they were
        closed, all is done in this process.

        Args:
            jobs: made one after the other, here, while others are being done.
            inline: does a job in this process, from any thread.

        Raises:
            OutOfOrder: ``forked``.
        """
        threads = self._started()  # they end when nobody refers to them any more
        if threads is None:
            yield from map(inline, jobs)
            return
        pending: deque[Future[Job]] = deque()
        try:
            for job in jobs:
                self._home.check()
                pending.append(threads.submit(self._do, job, inline))
                if len(pending) > 2 * self._size:
                    yield pending.popleft().result()
            while pending:
                self._home.check()
                yield pending.popleft().result()
        finally:
            if not self._home.left:  # nobody uses rows or results once the caller goes on
                for future in pending:
                    future.cancel()
                wait(pending)

    def close(self) -> None:
        """End the workers; what they have under way is done by this process."""
        if self._home.left:  # they are not this process's, nor is the lock
            return
        with self._lock:
            self._closed = True
            self._threads = None
            while self._workers:
                self._workers.pop().stop()

    def _started(self) -> ThreadPoolExecutor | None:
        self._home.check()
        with self._lock:
            if self._threads is None and not self._closed:
                self._start()
            return self._threads

    def _start(self) -> None:
        with contextlib.suppress(WorkerLostError):
            while len(self._workers) < self._size:
                self._workers.append(Worker(self._suite, self._material))
        for worker in self._workers:
            self._idle.put(worker)
        if self._workers:
            self._threads = ThreadPoolExecutor(len(self._workers))
        else:
            self._closed = True
        if len(self._workers) < self._size:
            self._warn()

    def _do(self, job: Job, inline: Callable[[Job], Job]) -> Job:
        """In a thread: there are as many as workers, so one is idle, or one was lost."""
        try:
            worker = self._idle.get_nowait()
            worker.run(job)
        except Empty:
            return inline(job)
        except WorkerLostError:  # not put back
            with self._lock:
                if not self._closed:
                    self._warn()
            return inline(job)
        self._idle.put(worker)
        return job

    def _warn(self) -> None:
        """Say it once that sealing is slower than it could be; the lock is held."""
        if not self._warned:
            self._warned = True
            log.warning(
                "a worker process of %d could not be started or was lost: "
                "sealing and opening go on, on fewer cores",
                self._size,
            )


def _start(file: int) -> subprocess.Popen[bytes]:
    """Start a worker that imports what this process would.

    Raises:
        OSError: there is no interpreter, or no process.
    """
    if not sys.executable or getattr(sys, "frozen", False):
        raise FileNotFoundError("this program is no interpreter that could be started again")
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(os.path.abspath(place) for place in sys.path),
        "OPENBLAS_NUM_THREADS": "1",
    }
    return subprocess.Popen(  # noqa: S603 - this interpreter, this package
        [sys.executable, "-P", "-m", "secagg.ckks.worker", str(file), str(os.getpid())],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        bufsize=0,
        pass_fds=(file,),
        process_group=0,
        env=environment,
    )


def _end(process: subprocess.Popen[bytes], home: Home) -> None:
    if not home.left:
        process.kill()
        process.wait()
    _pipe(process.stdin).close()
    _pipe(process.stdout).close()


def _pipe(stream: IO[bytes] | None) -> IO[bytes]:
    assert stream is not None  # both were asked for
    return stream
