"""Following a member's files while its process runs: a renewal is taken up without a restart.

A file is looked at by its stamp, which costs one ``stat``, and read when that changed. What was
refused is read again after a while, though its stamp stays: it may have been half of a trio being
copied, or a mode that ``chmod`` has put right since.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final, TypeAlias

from secagg.errors import CredentialError
from secagg.pki.certificates import certificate_fingerprint
from secagg.pki.credentials import CERTIFICATE, Credentials, load_credentials

RETRY_SECONDS: Final = 5.0
"""How long what was refused is left alone, unless its stamp changes."""

REMIND_EVERY: Final = timedelta(days=1)

Stamp: TypeAlias = tuple[int, int, int]


def utc_now() -> datetime:
    """This machine's clock."""
    return datetime.now(UTC)


def stamp_of(path: Path) -> Stamp:
    """Modification time, inode and size; zeros for a file that isn't there."""
    try:
        found = path.stat()
    except OSError:
        return (0, 0, 0)
    return (found.st_mtime_ns, found.st_ino, found.st_size)


class FileWatch:
    """Says when a file is to be read again. Its owner serialises the calls.

    Args:
        path: the file.
        content: what its owner already has of it; a file that holds anything else is due at once.
        monotonic: seconds, for the time between two readings of what was refused.
    """

    def __init__(
        self, path: Path, content: bytes, *, monotonic: Callable[[], float] = time.monotonic
    ) -> None:
        self._path = path
        self._monotonic = monotonic
        self._again: float | None = None
        stamp = stamp_of(path)  # before reading: a change in between shows as another stamp
        self._stamp = stamp if _bytes_of(path) == content else None

    def due(self) -> bool:
        """Whether to read the file now, and then to call ``taken`` or ``refused``."""
        stamp = stamp_of(self._path)
        if stamp != self._stamp:
            self._stamp, self._again = stamp, None
            return True
        return self._again is not None and self._monotonic() >= self._again

    def taken(self) -> None:
        """What was read is good: nothing is due before the next change."""
        self._again = None

    def refused(self) -> bool:
        """What was read is bad: look again later. True the first time for this stamp."""
        first = self._again is None
        self._again = self._monotonic() + RETRY_SECONDS
        return first


class RenewalWatch:
    """Follows a running member's certificate; safe to share between threads.

    Args:
        credentials: what the process runs with.
        now: aware, UTC.
        monotonic: as in ``FileWatch``.
    """

    def __init__(
        self,
        credentials: Credentials,
        *,
        now: Callable[[], datetime] = utc_now,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._first = credentials
        self._now = now
        self._lock = threading.Lock()
        self._file = FileWatch(
            credentials.directory / CERTIFICATE, credentials.certificate_pem, monotonic=monotonic
        )

    def poll(self) -> Credentials | CredentialError | None:
        """Return fully checked credentials if the file changed and they are good.

        Returns:
            The credentials; or why they are refused, once for each stamp; or None: nothing to do.
        """
        with self._lock:
            if not self._file.due():
                return None
            try:
                found = self._load()
            except CredentialError as refusal:
                return refusal if self._file.refused() else None
            self._file.taken()
            return found

    def _load(self) -> Credentials:
        first = self._first
        try:
            found = load_credentials(first.directory, now=self._now(), role=first.identity.role)
        except OSError as error:  # a disk or a network file system that fails for a moment
            raise CredentialError(
                "file-read",
                f"A file in {first.directory} cannot be read ({error.strerror}).",
                "See that its disk is there.",
            ) from None
        _check_same_member(first, found)  # CHECK: renewal-member
        return found


class Reminder:
    """Says that a certificate is near its end, at most once a day; safe between threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._said: datetime | None = None

    def due(self, credentials: Credentials, now: datetime) -> bool:
        """Whether to say it now; then it counts as said."""
        with self._lock:
            recently = self._said is not None and abs(now - self._said) < REMIND_EVERY
            if recently or not credentials.ends_soon(now):
                return False
            self._said = now
            return True


def _check_same_member(first: Credentials, found: Credentials) -> None:
    """A renewal brings a certificate; whoever changes more has to start the process again."""
    if found.identity != first.identity:  # CHECK: renewal-identity
        raise CredentialError(
            "renewal-identity",
            f"{first.directory} now holds the certificate of {found.identity.uri}; this process "
            f"runs as {first.identity.uri}.",
            "Put that member's certificate back, or start the process again to run as the other.",
        )
    if _identity_public(found) != _identity_public(first):  # CHECK: renewal-key
        raise CredentialError(
            "renewal-key",
            f"The identity key in {first.directory} is not the one this process runs with.",
            "A renewal keeps the keys. If the member was enrolled anew, start the process again.",
        )
    # CHECK: renewal-authority
    if certificate_fingerprint(found.authority_pem) != certificate_fingerprint(first.authority_pem):
        raise CredentialError(
            "renewal-authority",
            f"{first.directory} now trusts another authority than this process does.",
            "The trust anchor never changes in a directory: enrol in a new one.",
        )


def _identity_public(credentials: Credentials) -> bytes | None:
    return None if credentials.identity_key is None else credentials.identity_key.public


def _bytes_of(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except OSError:
        return None
