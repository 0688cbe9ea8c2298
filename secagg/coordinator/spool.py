"""Blobs on disk: chunks by offset, idempotent, in any order; whole blobs as mapped memory.

An upload's size is fixed before its first chunk, so a caller cannot fill the disk beyond what the
protocol asks of it. A chunk may be replaced until the blob is committed: a silo whose bytes were
damaged on the way can send the right ones.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import numpy.typing as npt

from secagg.errors import MalformedMessage, NotFound, TooLate


class Upload:
    """A blob that is being received.

    Args:
        path: where its bytes go.
        total: its size in bytes, at least 1.
        chunk_bytes: every chunk has this size, but for the last.
    """

    def __init__(self, path: Path, total: int, chunk_bytes: int) -> None:
        self.path = path
        self.total = total
        self._chunk_bytes = chunk_bytes
        self._lock = threading.RLock()  # a chunk must not be written to a descriptor reused since
        self._open = True
        self._received = bytearray(-(-total // chunk_bytes))
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        os.ftruncate(self._file, total)

    def put(self, offset: int, data: bytes) -> None:
        """Store one chunk.

        Raises:
            MalformedMessage: offset or length is not a chunk's.
            TooLate: the blob was committed or dropped meanwhile.
        """
        index, rest = divmod(offset, self._chunk_bytes)
        if rest or not 0 <= offset < self.total:
            raise MalformedMessage("chunk-offset", f"No chunk begins at offset {offset}.")
        if len(data) != min(self._chunk_bytes, self.total - offset):
            raise MalformedMessage(
                "chunk-length", f"The chunk at {offset} has {len(data)} bytes, not its length."
            )
        with self._lock:
            if not self._open:
                raise TooLate("phase-closed", "This blob is no longer being received.")
            self._write(offset, data)
            self._received[index] = 1

    def _write(self, offset: int, data: bytes) -> None:
        view = memoryview(data)
        while view:
            written = os.pwrite(self._file, view, offset)
            view, offset = view[written:], offset + written

    @property
    def missing(self) -> int | None:
        """Offset of the first chunk that has not come; None if all have."""
        index = self._received.find(0)
        return None if index < 0 else index * self._chunk_bytes

    def read(self) -> npt.NDArray[np.uint8]:
        """Map the whole blob, read-only."""
        return np.memmap(self.path, np.uint8, "r", shape=(self.total,))

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Hold off chunks: nothing changes between a check of the bytes and their use."""
        with self._lock:
            yield

    def keep(self) -> Path:
        """Stop receiving; the file stays."""
        self._close()
        return self.path

    def discard(self) -> None:
        """Stop receiving and remove the file."""
        self._close()
        self.path.unlink(missing_ok=True)

    def _close(self) -> None:
        with self._lock:
            if self._open:
                os.close(self._file)
            self._open = False


def read_chunk(path: Path, offset: int, chunk_bytes: int) -> bytes:
    """Read one chunk of a stored blob.

    Raises:
        NotFound: the offset is not inside it, or not a chunk's.
    """
    if offset % chunk_bytes:
        raise NotFound("chunk-offset", f"No chunk begins at offset {offset}.")
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size  # an offset may be more than pread can take
        data = os.pread(file.fileno(), chunk_bytes, offset) if offset < size else b""
    if not data:
        raise NotFound("chunk-offset", f"The blob ends before offset {offset}.")
    return data
