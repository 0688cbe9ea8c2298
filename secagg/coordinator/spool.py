"""Blobs on disk: chunks by offset, idempotent, in any order; digests as they come; one fsync.

An upload's size is fixed before its first chunk, so a caller cannot fill the disk beyond what the
protocol asks of it. A chunk may be replaced until the blob is committed: a silo whose bytes were
damaged on the way can send the right ones. When the last chunk is in, the file is synced, still
outside the session's lock; what was received before is gone if the coordinator dies first, and the
silo, told of the gap, sends it again.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from secagg.crypto.digest import chunk_digest
from secagg.disk import Disk
from secagg.errors import MalformedMessage, NotFound, StorageDamaged, TooLate


@dataclass(frozen=True, slots=True)
class Stored:
    """What is known of a blob that is durable.

    Args:
        size: in bytes.
        chunk_digests: BLAKE3 of each chunk of the session's size, in order.
    """

    size: int
    chunk_digests: tuple[bytes, ...]

    @classmethod
    def of(cls, data: memoryview, chunk_bytes: int) -> Stored:
        """Describe a blob that is in memory."""
        starts = range(0, len(data), chunk_bytes)
        return cls(len(data), tuple(chunk_digest(data[at : at + chunk_bytes]) for at in starts))

    def read(self, disk: Disk, name: str, chunk_bytes: int) -> memoryview:
        """Map the blob if every chunk of it is what was stored.

        Raises:
            StorageDamaged: it is gone, of another size, or a chunk differs; says which.
        """
        data = disk.view(name)
        if data is None or len(data) != self.size:
            seen = "is gone" if data is None else f"has {len(data)} bytes, not {self.size}"
            raise damaged(f"{name} {seen}")
        found = Stored.of(data, chunk_bytes).chunk_digests
        for index, (was, is_now) in enumerate(zip(self.chunk_digests, found, strict=True)):
            if was != is_now:
                raise damaged(f"the chunk at {index * chunk_bytes} of {name} was changed")
        return data


def damaged(what: str) -> StorageDamaged:
    """Stored bytes are not what they were."""
    return StorageDamaged(
        "storage-damaged",
        f"In the state directory, {what}.",
        "Nothing is served from damaged state. Restore the directory from a backup of this very "
        "moment, or start with an empty one: sessions begin anew, silos lose no model.",
    )


class Upload:
    """A blob that is being received.

    Args:
        disk: where its bytes go.
        name: its file.
        total: its size in bytes, at least 1.
        chunk_bytes: every chunk has this size, but for the last.
    """

    def __init__(self, disk: Disk, name: str, total: int, chunk_bytes: int) -> None:
        self.name = name
        self.total = total
        self._disk = disk
        self._chunk_bytes = chunk_bytes
        self._lock = threading.RLock()
        self._open = True
        self._synced = False
        self._digests: list[bytes | None] = [None] * -(-total // chunk_bytes)
        disk.allocate(name, total)

    def put(self, offset: int, data: bytes) -> None:
        """Store one chunk; with the last one that was missing, sync the blob.

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
        digest = chunk_digest(data)
        with self._lock:
            if not self._open:
                raise TooLate("phase-closed", "This blob is no longer being received.")
            if self._digests[index] == digest:
                return
            self._digests[index] = None  # while it is half-written it is missing
            self._disk.write(self.name, offset, data)
            self._digests[index], self._synced = digest, False
            if self.missing is None:
                self._sync()

    @property
    def missing(self) -> int | None:
        """Offset of the first chunk that has not come; None if all have."""
        return next((i * self._chunk_bytes for i, d in enumerate(self._digests) if d is None), None)

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Hold off chunks: nothing changes between a check of the bytes and their use."""
        with self._lock:
            yield

    def stored(self) -> Stored:
        """Describe the complete blob, durable now. Call it ``frozen``."""
        if not self._synced:
            self._sync()
        return Stored(self.total, tuple(digest for digest in self._digests if digest is not None))

    def view(self) -> memoryview:
        """Map the whole blob, read-only."""
        data = self._disk.view(self.name)
        if data is None:
            raise damaged(f"{self.name} is gone")
        return data

    def close(self) -> None:
        """Stop receiving; the file stays."""
        with self._lock:
            self._open = False

    def discard(self) -> None:
        """Stop receiving and remove the file."""
        self.close()
        self._disk.remove(self.name)

    def _sync(self) -> None:
        self._disk.sync(self.name)
        self._synced = True


def read_chunk(disk: Disk, name: str, offset: int, chunk_bytes: int) -> bytes:
    """Read one chunk of a stored blob.

    Raises:
        NotFound: the offset is not inside it, or not a chunk's.
    """
    if offset % chunk_bytes:
        raise NotFound("chunk-offset", f"No chunk begins at offset {offset}.")
    blob = disk.view(name)
    if blob is None or offset >= len(blob):
        raise NotFound("chunk-offset", f"The blob ends before offset {offset}.")
    return bytes(blob[offset : offset + chunk_bytes])
