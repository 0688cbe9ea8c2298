"""Files as both shells use them: what is durable when, said once.

A ``Disk`` is one directory tree, addressed by relative names. ``append`` and ``replace`` are whole
and durable when they return; ``write`` is only once ``sync`` has returned. Everything that must
outlive a crash, but for the coordinator's journal, goes through here, so that one simulated disk
(lost unsynced writes, torn writes, a crash at any call) can stand in for all of it.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final, Protocol

from secagg.errors import StorageBusy, StorageFailed, StorageInUse

_PRIVATE_FILE: Final = 0o600
_PRIVATE_DIR: Final = 0o700
_TEMPORARY: Final = ".tmp-"
_WRITE: Final = 2
"""``SYNC_FILE_RANGE_WRITE``: begin to write, and don't wait."""
_WORTH_STARTING: Final = 2**18
_sync_file_range: Final = getattr(ctypes.CDLL(None, use_errno=True), "sync_file_range", None)


class Disk(Protocol):
    """One directory tree. Names are relative, with ``/`` between folders.

    Every method raises ``StorageFailed`` where the machine's disk refuses, and ``StorageBusy``
    where it may not refuse the next time: too many files are open, or there is no space for a new
    file of a known size.
    """

    def read(self, name: str) -> bytes | None:
        """Return a whole file; None if there is none."""
        ...

    def view(self, name: str, start: int = 0, size: int | None = None) -> memoryview | None:
        """Map a file read-only; None if there is none.

        Args:
            name: which file.
            start: of a range to map instead of all of it.
            size: of that range; shorter where the file ends before.
        """
        ...

    def append(self, name: str, data: bytes) -> None:
        """Add to a file's end, durably; on failure the file is as it was."""
        ...

    def replace(self, name: str, *parts: bytes | memoryview) -> None:
        """Give a file this content, durably: a crash leaves the old content or the new."""
        ...

    def allocate(self, name: str, size: int) -> None:
        """Make a file of this size, empty of what was there before; not durable.

        Raises:
            StorageBusy: there is no space for it.
        """
        ...

    def write(self, name: str, offset: int, data: bytes | memoryview) -> None:
        """Write inside a file; not durable before ``sync``."""
        ...

    def sync(self, name: str) -> None:
        """Make a file and its name durable."""
        ...

    def truncate(self, name: str, size: int) -> None:
        """Cut a file's end off, durably."""
        ...

    def remove(self, name: str) -> None:
        """Remove a file or a folder with all in it; nothing if there is none. Not durable."""
        ...

    def names(self, folder: str = "") -> list[str]:
        """Return all files under a folder, by full name, sorted."""
        ...


class LocalDisk:
    """A directory of this machine, readable by this user alone.

    Args:
        root: made with mode 0700 if there is none.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._named: set[Path] = set()
        with _translated(root):
            _make_directory(root)
            for folder, _, _ in os.walk(root):  # a crash may have come between a name and its sync
                _sync_directory(Path(folder))

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the directory for this process alone.

        Raises:
            StorageInUse: another process holds it.
        """
        path = self.root / "lock"
        with _translated(path):
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, _PRIVATE_FILE)
        try:
            _lock(descriptor, self.root)
            yield
        finally:
            os.close(descriptor)

    def read(self, name: str) -> bytes | None:
        """Return a whole file; None if there is none."""
        path = self.root / name
        with _translated(path):
            try:
                return path.read_bytes()
            except FileNotFoundError:
                return None

    def view(self, name: str, start: int = 0, size: int | None = None) -> memoryview | None:
        """Map a file read-only, or a range of it; None if there is none."""
        path = self.root / name
        with _translated(path):
            try:
                file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError:
                return None
            try:
                end = os.fstat(file).st_size
                stop = end if size is None else min(end, start + size)
                skip = start % mmap.ALLOCATIONGRANULARITY
                if stop <= start:
                    return memoryview(b"")
                return memoryview(_mapped(file, start - skip, stop))[skip:]
            finally:
                os.close(file)

    def append(self, name: str, data: bytes) -> None:
        """Add to a file's end, durably; on failure the file is as it was."""
        path = self.root / name
        with _translated(path):
            with _opened(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT) as file:
                size = os.fstat(file).st_size
                try:
                    _write_all(file, data)
                    os.fsync(file)
                except OSError:
                    with contextlib.suppress(OSError):
                        os.ftruncate(file, size)
                    raise
            if path not in self._named:
                _sync_directory(path.parent)
                self._named.add(path)

    def replace(self, name: str, *parts: bytes | memoryview) -> None:
        """Give a file this content, durably: a crash leaves the old content or the new."""
        path = self.root / name
        temporary = path.parent / f"{_TEMPORARY}{path.name}-{secrets.token_hex(4)}"
        with _translated(path):
            try:
                with _opened(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL) as file:
                    for part in parts:
                        _write_all(file, part)
                    os.fsync(file)
                temporary.replace(path)
            except OSError:
                temporary.unlink(missing_ok=True)
                raise
            _sync_directory(path.parent)

    def allocate(self, name: str, size: int) -> None:
        """Make a file of this size, empty of what was there before; not durable."""
        path = self.root / name
        with (
            _translated(path, busy=(errno.ENOSPC, errno.EDQUOT)),
            _opened(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC) as file,
        ):
            try:
                os.posix_fallocate(file, 0, size)
            except OSError:
                os.ftruncate(file, 0)
                raise

    def write(self, name: str, offset: int, data: bytes | memoryview) -> None:
        """Write inside a file; not durable before ``sync``."""
        path = self.root / name
        with _translated(path):
            file = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
            try:
                _write_all(file, data, offset)
                _start_writing(file, offset, memoryview(data).nbytes)
            finally:
                os.close(file)

    def sync(self, name: str) -> None:
        """Make a file and its name durable."""
        path = self.root / name
        with _translated(path):
            file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                os.fsync(file)
            finally:
                os.close(file)
            _sync_directory(path.parent)

    def truncate(self, name: str, size: int) -> None:
        """Cut a file's end off, durably."""
        path = self.root / name
        with _translated(path), _opened(path, os.O_WRONLY) as file:
            os.ftruncate(file, size)
            os.fsync(file)

    def remove(self, name: str) -> None:
        """Remove a file or a folder with all in it; nothing if there is none. Not durable."""
        path = self.root / name
        with _translated(path):
            _remove(path)

    def names(self, folder: str = "") -> list[str]:
        """Return all files under a folder, by full name, sorted; temporary ones go."""
        found = []
        with _translated(self.root / folder):
            for path in (self.root / folder).rglob("*"):
                if path.is_file():
                    if path.name.startswith(_TEMPORARY):
                        path.unlink()  # of a replace that a crash cut short
                    else:
                        found.append(path.relative_to(self.root).as_posix())
        return sorted(found)


def let_go(data: memoryview, start: int, size: int) -> None:
    """Drop a range of a file mapped by ``view`` from memory; who reads it again gets it again."""
    mapped = data.obj
    if isinstance(mapped, mmap.mmap):
        skip = start % mmap.PAGESIZE
        mapped.madvise(mmap.MADV_DONTNEED, start - skip, size + skip)


@contextmanager
def _translated(path: Path, busy: tuple[int, ...] = ()) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        kind = StorageBusy if error.errno in (errno.EMFILE, errno.ENFILE, *busy) else StorageFailed
        raise kind(
            "storage-busy" if kind is StorageBusy else "storage-failed",
            f"{path} cannot be read or written: {error.strerror or error}.",
            "See that the disk has space left and no errors, and that this user owns the folder.",
        ) from None


def _lock(descriptor: int, root: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise StorageInUse(
            "storage-in-use",
            f"Another process works in {root}.",
            "Stop it first, or give this one a directory of its own.",
        ) from None


@contextmanager
def _opened(path: Path, flags: int) -> Iterator[int]:
    _make_directory(path.parent)
    file = os.open(path, flags | os.O_CLOEXEC, _PRIVATE_FILE)
    try:
        yield file
    finally:
        os.close(file)


def _write_all(file: int, data: bytes | memoryview, offset: int | None = None) -> None:
    view = memoryview(data).cast("B")
    while view:
        if offset is None:
            written = os.write(file, view)
        else:
            written = os.pwrite(file, view, offset)
            offset += written
        view = view[written:]


def _mapped(file: int, start: int, stop: int) -> mmap.mmap:
    try:
        return mmap.mmap(file, stop - start, prot=mmap.PROT_READ, offset=start)
    except ValueError:  # it has shrunk since it was looked at
        raise OSError(errno.EIO, "the file has lost its end") from None


def _start_writing(file: int, offset: int, size: int) -> None:
    """Have the kernel bring a range to the disk meanwhile, so that a later sync has little to do.

    It promises nothing: what makes a file durable is the ``fsync`` that follows. Only Linux has it,
    and not for every file system; but where the disk refuses, that counts.
    """
    if _sync_file_range is None or size < _WORTH_STARTING:
        return
    if _sync_file_range(file, ctypes.c_int64(offset), ctypes.c_int64(size), _WRITE) != 0:
        number = ctypes.get_errno()
        if number in (errno.EIO, errno.ENOSPC, errno.EDQUOT):
            raise OSError(number, os.strerror(number))


def _make_directory(path: Path) -> None:
    """Make a folder and those above it, each one's name durable."""
    if path.is_dir():
        return
    _make_directory(path.parent)
    path.mkdir(mode=_PRIVATE_DIR, exist_ok=True)
    _sync_directory(path.parent)


def _remove(path: Path) -> None:
    """Remove what is there; what somebody else removes meanwhile is removed, too."""
    with contextlib.suppress(FileNotFoundError):
        if path.is_dir() and not path.is_symlink():
            for child in path.iterdir():
                _remove(child)
            path.rmdir()
        else:
            path.unlink()


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
