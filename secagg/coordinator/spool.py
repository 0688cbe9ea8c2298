"""Blobs on disk: chunks by offset, idempotent, in any order; digests as they come.

An upload's size is fixed before its first chunk, so a caller cannot fill the disk beyond what the
protocol asks of it. A chunk may be replaced until the blob is committed: a silo whose bytes were
damaged on the way can send the right ones. When the last chunk is in, the file is synced, still
outside the session's lock; what was received before is gone if the coordinator dies first, and the
silo, told of the gap, sends it again.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from secagg.config import SiloId
from secagg.coordinator.limits import Limits
from secagg.coordinator.quotas import TryLater
from secagg.crypto.digest import chunk_digest, root_digest
from secagg.disk import Disk, let_go
from secagg.errors import (
    MalformedMessage,
    NotFound,
    QuotaExceeded,
    StorageDamaged,
    StorageFailed,
    TooLate,
)
from secagg.ring.vectors import Vector
from secagg.ring.words import PIECE_BYTES

FULL_SECONDS: Final = 5.0
"""When to try again where the disk is full: rounds end in minutes."""


@dataclass(frozen=True, slots=True)
class Stored:
    """What is known of a blob that is durable.

    Args:
        size: in bytes.
        chunk_digests: BLAKE3 of each chunk of the session's size, in order.
    """

    size: int
    chunk_digests: tuple[bytes, ...]

    @property
    def digest(self) -> bytes:
        """The whole blob's (``crypto.digest``)."""
        return root_digest(self.chunk_digests)

    def open(self, disk: Disk, name: str) -> memoryview:
        """Map the blob if it is there, whatever it holds.

        Raises:
            StorageDamaged: it is gone, or of another size.
        """
        data = disk.view(name)
        if data is None or len(data) != self.size:  # CHECK: stored-size
            seen = "is gone" if data is None else f"has {len(data)} bytes, not {self.size}"
            raise damaged(f"{name} {seen}")
        return data

    def check(self, chunk: memoryview, name: str, offset: int, chunk_bytes: int) -> None:
        """Return if a chunk's bytes are those that were stored; else StorageDamaged."""
        if (
            chunk_digest(chunk) != self.chunk_digests[offset // chunk_bytes]
        ):  # CHECK: stored-chunk-digest
            raise damaged(f"the chunk at {offset} of {name} was changed")


@dataclass(frozen=True, slots=True)
class Blob:
    """A stored blob and where it lies, to be read when its session has been let go.

    Args:
        disk: the state directory.
        name: its file.
        stored: what it has to be.
        chunk_bytes: the session's size of a chunk.
    """

    disk: Disk
    name: str
    stored: Stored
    chunk_bytes: int

    def chunk(self, offset: int) -> memoryview:
        """Map one chunk, if it is what was stored.

        Raises:
            NotFound: the offset is not inside the blob, or not a chunk's; or it was forgotten.
            StorageDamaged: the bytes were changed; says where.
        """
        if offset % self.chunk_bytes or not 0 <= offset < self.stored.size:  # CHECK: blob-offset
            raise NotFound("chunk-offset", f"No chunk of this blob begins at offset {offset}.")
        chunk = self.disk.view(self.name, offset, self.chunk_bytes)
        if chunk is None:  # CHECK: blob-there
            raise NotFound("session-unknown", "The session has been forgotten meanwhile.")
        self.stored.check(chunk, self.name, offset, self.chunk_bytes)  # CHECK: blob-chunk-digest
        return chunk


@dataclass(frozen=True, slots=True)
class Spooled:
    """A committed vector as the sum takes it: what is summed is what was signed.

    A chunk is held against its digest right before its words are added, while it is in the cache:
    between its arrival and this it was in nobody's hands but the disk's, and after a restart for
    longer. Nobody writes to the file any more: ``Upload.committing`` holds off chunks until the sum
    has it, and receives none afterwards.

    The file is mapped once, before anything changes, so that to add it, or to take it off again,
    nothing has to be opened. Pages go when their chunk is done, so memory does not grow with them.

    Args:
        blob: where it lies.
        dtype: of its words.
        data: the mapped file.
    """

    blob: Blob
    dtype: np.dtype[np.unsignedinteger[Any]]
    data: memoryview

    @classmethod
    def open(cls, blob: Blob, dtype: np.dtype[np.unsignedinteger[Any]]) -> Spooled:
        """Map a vector.

        Raises:
            StorageDamaged: it is gone, or of another size.
            StorageBusy: no more files can be opened.
        """
        return cls(blob, dtype, blob.stored.open(blob.disk, blob.name))

    @property
    def length(self) -> int:
        """How many words, a part of one counted as one."""
        return -(-self.blob.stored.size // self.dtype.itemsize)

    @property
    def grain(self) -> int:
        """Words of a chunk."""
        return self.blob.chunk_bytes // self.dtype.itemsize

    def digest(self) -> bytes:
        """The root of the chunks' digests."""
        return self.blob.stored.digest

    def pieces(self, start: int, stop: int) -> Iterator[Vector]:
        """Check chunk by chunk and give its words.

        Raises:
            StorageDamaged: a chunk is not what was stored; says which.
        """
        blob, word = self.blob, self.dtype.itemsize
        for offset in range(start * word, stop * word, blob.chunk_bytes):
            chunk = self.data[offset : offset + blob.chunk_bytes]
            # CHECK: spooled-chunk-digest
            blob.stored.check(chunk, blob.name, offset, blob.chunk_bytes)
            for at in range(0, min(len(chunk), stop * word - offset), PIECE_BYTES):
                end = min(at + PIECE_BYTES, stop * word - offset)
                yield np.frombuffer(chunk[at:end], self.dtype)
            let_go(self.data, offset, len(chunk))


@dataclass(frozen=True, slots=True)
class Holding:
    """A blob on disk, or one that is being received.

    Args:
        silo: whose quota it takes; None for a sum, and for all of a session that is over.
        size: in bytes, of the whole.
        open: whether it is not complete yet.
    """

    silo: SiloId | None
    size: int
    open: bool = False


def nothing_goes(_: int) -> bool:
    """Free no room: where nothing is kept that could be spared."""
    return False


def check_room(
    limits: Limits,
    held: Iterable[Holding],
    silo: SiloId,
    size: int,
    free: Callable[[int], bool] = nothing_goes,
) -> None:
    """Return if a silo may begin another upload beside what there is.

    It is reckoned anew each time, from what sessions know of their files: no count can drift away
    from them, nor be lost in a restart. Where all is full, sessions that are over have to go. Sums
    and initial weights of active ones stay, but rounds that end leave less than they took, so
    whoever finds no room may try again; a silo that holds too much itself is told so for good.

    Args:
        limits: in force.
        held: all there is, with what the upload will take the place of.
        silo: who asks.
        size: of the upload, in bytes.
        free: has so many bytes of what is held go, or says that it cannot.

    Raises:
        QuotaExceeded: ``quota-uploads``, ``quota-spool-silo``.
        TryLater: ``quota-spool``.
    """
    there = list(held)
    own = [holding for holding in there if holding.silo == silo]
    if sum(holding.open for holding in own) >= limits.uploads_at_once:  # CHECK: quota-uploads
        raise QuotaExceeded(
            "quota-uploads",
            f"{silo} has begun {limits.uploads_at_once} uploads and not completed them.",
            "End them, or raise uploads_at_once.",
        )
    taken = sum(holding.size for holding in own)
    if taken + size > limits.spool_bytes_per_silo:  # CHECK: quota-spool-silo
        raise QuotaExceeded(
            "quota-spool-silo",
            f"{silo} holds {taken} bytes on the coordinator's disk and wants {size} more.",
            f"It may hold {limits.spool_bytes_per_silo} (spool_bytes_per_silo).",
        )
    taken = sum(holding.size for holding in there)
    lacking = taken + size - limits.max_spool_bytes
    if lacking > 0 and not free(lacking):  # CHECK: quota-spool
        raise TryLater(
            "quota-spool",
            f"The coordinator's disk holds {taken} bytes, and {size} more are too many.",
            f"It may hold {limits.max_spool_bytes} (max_spool_bytes). Rounds that end make room, "
            "but sums of active sessions stay: end a session, or raise max_spool_bytes.",
            FULL_SECONDS,
        )


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
        instead: another one of this name, which goes when this one begins. If it has not begun
            itself, the one before it does: nobody makes a chain of them.
        before: called right before it takes its room on the disk.
    """

    def __init__(
        self,
        disk: Disk,
        name: str,
        total: int,
        chunk_bytes: int,
        instead: Upload | None = None,
        before: Callable[[], None] = lambda: None,
    ) -> None:
        self.name = name
        self.total = total
        self._disk = disk
        self._chunk_bytes = chunk_bytes
        self._lock = threading.RLock()
        self._instead = instead._begun_one() if instead is not None else None
        self._before = before
        self._open = True
        self._begun = False
        self._synced = False
        self._digests: list[bytes | None] = [None] * -(-total // chunk_bytes)
        self._left = len(self._digests)

    def put(self, offset: int, data: bytes | memoryview) -> None:
        """Store one chunk; with the last one that was missing, sync the blob.

        Raises:
            MalformedMessage: offset or length is not a chunk's.
            TooLate: the blob was committed or dropped meanwhile.
            StorageBusy: the disk has no space for the blob.
            StorageFailed: the disk refuses; nothing more is received.
        """
        index, rest = divmod(offset, self._chunk_bytes)
        if rest or not 0 <= offset < self.total:  # CHECK: upload-offset
            raise MalformedMessage("chunk-offset", f"No chunk begins at offset {offset}.")
        if len(data) != min(self._chunk_bytes, self.total - offset):  # CHECK: upload-chunk-length
            raise MalformedMessage(
                "chunk-length", f"The chunk at {offset} has {len(data)} bytes, not its length."
            )
        digest = chunk_digest(data)
        with self._lock:
            if not self._open:  # CHECK: upload-open
                raise TooLate("phase-closed", "This blob is no longer being received.")
            if self._digests[index] == digest:
                return
            self._begin()
            self._write(index, data, digest)

    @property
    def held(self) -> int:
        """Bytes that it takes on disk, or will."""
        return self.total + (self._instead.total if self._instead is not None else 0)

    def _begun_one(self) -> Upload | None:
        return self if self._begun else self._instead

    def _begin(self) -> None:
        if not self._begun:
            self._before()
            if self._instead is not None:
                self._instead.discard()
            self._instead = None
            self._disk.allocate(self.name, self.total)
            self._begun = True

    def _write(self, index: int, data: bytes | memoryview, digest: bytes) -> None:
        new = self._digests[index] is None
        if not new:
            self._digests[index], self._left = None, self._left + 1  # while it is half-written
        with self._once():
            self._disk.write(self.name, index * self._chunk_bytes, data)
        self._digests[index], self._left, self._synced = digest, self._left - 1, False
        if new and not self._left:
            self._sync()

    @property
    def missing(self) -> int | None:
        """Offset of the first chunk that has not come; None if all have."""
        return self._digests.index(None) * self._chunk_bytes if self._left else None

    @contextmanager
    def committing(self) -> Iterator[Stored | None]:
        """Hold off chunks while what came is checked and used; if that goes well, take no more.

        So nothing changes between a check of the bytes and their use, nor ever after.

        Gives:
            What is known of the blob, which is durable now; None if a chunk is missing.
        """
        with self._lock:
            yield None if self._left else self.stored()
            self._open = False

    def stored(self) -> Stored:
        """Describe the complete blob, durable now. Call it while ``committing``."""
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
        with self._lock:
            self._open = False
            if self._instead is not None:
                self._instead.discard()
            if self._begun:
                self._disk.remove(self.name)
            self._instead, self._begun = None, False

    def _sync(self) -> None:
        with self._once():
            self._disk.sync(self.name)
        self._synced = True

    @contextmanager
    def _once(self) -> Iterator[None]:
        """Receive nothing more after a failure: a failed sync is not told a second time."""
        try:
            yield
        except StorageFailed:
            self._open = False
            raise
