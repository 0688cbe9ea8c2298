"""Private files: nobody else reads them, and a crash leaves the old content or the new.

A file is written under a fresh name, fsynced, renamed over the old one, and the directory is
fsynced. Reading is strict: a key that others could have read is treated as lost, not as usable.
The checks look at the opened descriptor, so nothing can be swapped between check and use.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from secagg.errors import CredentialError

MAX_FILE_BYTES: Final = 16 * 2**20
_PRIVATE_FILE: Final = 0o600
_PUBLIC_FILE: Final = 0o644
_PRIVATE_DIR: Final = 0o700
_ANY_BY_OTHERS: Final = 0o077
_WRITE_BY_OTHERS: Final = 0o022


def write_private(path: Path, data: bytes) -> None:
    """Write a file that only this user reads (0600), atomically and durably.

    Raises:
        CredentialError: ``file-write``: it could not be written; whatever is there is whole.
    """
    _write(path, data, _PRIVATE_FILE)


def write_public(path: Path, data: bytes) -> None:
    """Write a file that others may read (0644), atomically and durably.

    Raises:
        CredentialError: ``file-write``.
    """
    _write(path, data, _PUBLIC_FILE)


def make_private_dir(path: Path) -> None:
    """Create a directory for this user alone (0700), or check the one that is there.

    Raises:
        CredentialError: ``file-permissions``: what is there isn't a directory of this user alone.
            Its permissions are left as they are: others may rely on them.
    """
    try:
        path.mkdir(mode=_PRIVATE_DIR, parents=True)
        path.chmod(_PRIVATE_DIR)
    except FileExistsError:
        pass
    except OSError as error:
        raise _refused(path, f"cannot be made ({error.strerror})", "Name another --dir.") from None
    _check_directory(path)  # CHECK: made-directory


def read_private(path: Path) -> bytes:
    """Read a secret.

    Args:
        path: a regular file, 0600 or stricter, of this user, in a directory of this user alone.

    Raises:
        CredentialError: ``file-missing``; ``file-permissions``: others could have read or changed
            it, it is a symbolic link, or it or its directory belongs to someone else.
    """
    return _read(path, _ANY_BY_OTHERS, "600")


def read_public(path: Path) -> bytes:
    """Read a file that need not be secret but that nobody else may change.

    Raises:
        CredentialError: as ``read_private``, where others being able to read it is fine.
    """
    return _read(path, _WRITE_BY_OTHERS, "644")


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Hold the directory's advisory lock: one writer at a time. Not reentrant."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _write(path: Path, data: bytes, mode: int) -> None:
    temporary = path.parent / f".{path.name}.{secrets.token_hex(8)}"
    try:
        _write_new(temporary, data, mode)
        temporary.replace(path)
        _sync_directory(path.parent)
    except OSError as error:
        raise CredentialError(
            "file-write",
            f"{path} cannot be written ({error.strerror}).",
            "See that its directory exists, belongs to you and has space left.",
        ) from None
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def _write_new(path: Path, data: bytes, mode: int) -> None:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    with os.fdopen(os.open(path, flags, mode), "wb") as file:
        os.fchmod(file.fileno(), mode)
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _read(path: Path, forbidden: int, mode: str) -> bytes:
    # O_NONBLOCK: a FIFO in the place of a key must not hang the reader.
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
    try:
        if path.is_symlink():  # CHECK: file-symlink
            raise _refused(path, "is a symbolic link", "Put the file itself there.")
        _check_directory(path.parent)  # CHECK: file-directory
        descriptor = os.open(path, flags)
    except FileNotFoundError:
        raise CredentialError(
            "file-missing",
            f"{path} does not exist.",
            "Enrol with `secagg silo request` and `secagg silo install`, or name another --dir.",
        ) from None
    except OSError as error:
        raise _refused(path, f"cannot be opened ({error.strerror})", "See who owns it.") from None
    try:
        _check_file(path, os.fstat(descriptor), forbidden, mode)  # CHECK: file-status
        with os.fdopen(descriptor, "rb", closefd=False) as file:
            data = file.read(MAX_FILE_BYTES + 1)
    finally:
        os.close(descriptor)
    if len(data) > MAX_FILE_BYTES:  # CHECK: file-size
        raise CredentialError("file-size", f"{path} is larger than any file of this product.")
    return data


def _check_file(path: Path, status: os.stat_result, forbidden: int, mode: str) -> None:
    if not stat.S_ISREG(status.st_mode):  # CHECK: file-regular
        raise _refused(path, "is not a regular file", "Put a regular file there.")
    _check_owner(path, status)  # CHECK: file-owner
    if status.st_mode & forbidden:  # CHECK: file-mode
        seen = f"has mode {stat.S_IMODE(status.st_mode):o}, open to other users"
        raise _refused(path, seen, f"Run `chmod {mode} {path}`; replace a key others had.")


def _check_directory(path: Path) -> None:
    status = path.stat()
    if not stat.S_ISDIR(status.st_mode):  # CHECK: directory-kind
        raise _refused(path, "is not a directory", "Name a directory.")
    _check_owner(path, status)  # CHECK: directory-owner
    if status.st_mode & _ANY_BY_OTHERS:  # CHECK: directory-mode
        seen = f"has mode {stat.S_IMODE(status.st_mode):o}, open to other users"
        raise _refused(path, seen, f"Run `chmod 700 {path}`, or name another --dir.")


def _check_owner(path: Path, status: os.stat_result) -> None:
    if status.st_uid != os.geteuid():  # CHECK: owner
        seen = f"belongs to uid {status.st_uid}; this process runs as uid {os.geteuid()}"
        raise _refused(path, seen, f"Run `chown {os.geteuid()} {path}`, then `chmod go= {path}`.")


def _refused(path: Path, observed: str, remedy: str) -> CredentialError:
    return CredentialError("file-permissions", f"{path} {observed}.", remedy)
