"""The newest manifest that the authority signed, as it lies in the coordinator's directory.

Looked at again when the file changes; an older or badly signed file is refused and the newest good
one stays in force. What was refused is read again after a while: it may have been half written.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import structlog

from secagg.errors import CredentialError
from secagg.masking.manifest import Manifest
from secagg.pki.credentials import MANIFEST, Credentials
from secagg.pki.manifest import SignedManifest, accept
from secagg.pki.renewal import FileWatch


class Manifests:
    """Follows ``manifest.json``; safe to call from any thread.

    Args:
        credentials: the coordinator's, whose manifest is verified already.
        monotonic: seconds, for the time between two readings of what was refused.
    """

    def __init__(
        self, credentials: Credentials, *, monotonic: Callable[[], float] = time.monotonic
    ) -> None:
        self._signed = credentials.manifest
        self._polled = self._signed.manifest.version
        self._authority_pem = credentials.authority_pem
        self._path = credentials.directory / MANIFEST
        self._lock = threading.Lock()
        self._file = FileWatch(self._path, self._signed.to_json(), monotonic=monotonic)

    def __call__(self) -> Manifest:
        """The membership in force."""
        with self._lock:
            self._follow()
            return self._signed.manifest

    @property
    def signed(self) -> SignedManifest:
        """The membership in force as it was last looked at, with its signature, for members."""
        return self._signed

    def poll(self) -> bool:
        """Whether a newer manifest came into force since the last poll, whoever noticed it first.

        The first poll tells of what came since this object was made. For one poller: what is told
        to one is not told to another.
        """
        with self._lock:
            self._follow()
            version = self._signed.manifest.version
            newer, self._polled = version > self._polled, version
            return newer

    def _follow(self) -> None:
        if not self._file.due():
            return
        log = structlog.get_logger()
        try:
            offered = SignedManifest.from_json(self._path.read_bytes())
            self._signed = accept(self._signed, offered, self._authority_pem)
        except (OSError, CredentialError) as error:
            if self._file.refused():
                log.error("manifest-refused", reason=getattr(error, "code", "file"))
            return
        self._file.taken()
        log.info("manifest-loaded", version=self._signed.manifest.version)
