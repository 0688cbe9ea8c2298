"""What a worker process runs: ``python -m secagg.ckks.worker FILE PARENT``; see ``workers``."""

from __future__ import annotations

import ctypes
import os
import resource
import sys
import threading
from typing import BinaryIO, Final

from secagg.ckks.kernel import Job, Kernel, Work
from secagg.ckks.workers import GREETING, JOB, READY, SEED_BYTES, Arena
from secagg.crypto.secret import Secret
from secagg.suite import Suite

_PR_SET_DUMPABLE: Final = 4
_SECONDS: Final = 1.0


def serve(requests: BinaryIO, replies: BinaryIO, file: int) -> None:
    """Take the greeting, then do jobs until the requests end.

    Args:
        requests: what the parent sends.
        replies: unbuffered.
        file: the shared memory.

    Raises:
        ValueError: the requests end inside a frame.
    """
    name, material = GREETING.unpack(_read(requests, GREETING.size))
    suite = Suite(name.rstrip(b"\0").decode())
    arena = Arena(file, suite.parameters.degree)
    kernel = Kernel(suite, Secret(material))
    replies.write(READY)
    while head := requests.read(JOB.size):
        number, count, rows, first = JOB.unpack(_whole(head, JOB.size))
        work = Work(number)
        seeds = tuple(_read(requests, SEED_BYTES) for _ in range(count))
        kernel.do(Job(work, seeds, first, arena.rows(work, rows), arena.result(work, rows)))
        replies.write(READY)


def _read(requests: BinaryIO, size: int) -> bytes:
    return _whole(requests.read(size), size)


def _whole(data: bytes, size: int) -> bytes:
    if len(data) != size:
        raise ValueError("the parent ended inside a frame")
    return data


def harden() -> None:
    """Leave no core file, and let no other process of the user look at memory and descriptors."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    ctypes.CDLL(None).prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)


def follow(parent: int) -> None:
    """End soon after the parent, though a process that it forked may hold the pipe.

    Not by PR_SET_PDEATHSIG, which comes when the thread ends that started this process.
    """
    pause = threading.Event()
    while os.getppid() == parent:
        pause.wait(_SECONDS)
    os._exit(1)


def main() -> None:
    """Serve standard input, with replies where nothing that a library prints can get."""
    harden()
    file, parent = map(int, sys.argv[1:])
    threading.Thread(target=follow, args=(parent,), daemon=True).start()
    with os.fdopen(os.dup(1), "wb", buffering=0) as replies:
        os.dup2(2, 1)
        serve(sys.stdin.buffer, replies, file)


if __name__ == "__main__":
    main()
