"""The newest manifest that the authority signed, as it lies in the coordinator's directory.

Looked at again when the file changes; an older or badly signed file is refused and the newest good
one stays in force.
"""

from __future__ import annotations

import os

import structlog

from secagg.errors import CredentialError
from secagg.masking.manifest import Manifest
from secagg.pki.credentials import MANIFEST, Credentials
from secagg.pki.manifest import SignedManifest, accept


class Manifests:
    """Follows ``manifest.json``.

    Args:
        credentials: the coordinator's, whose manifest is verified already.
    """

    def __init__(self, credentials: Credentials) -> None:
        self.signed = credentials.manifest
        self._authority_pem = credentials.authority_pem
        self._path = credentials.directory / MANIFEST
        self._stamp = self._read_stamp()

    def __call__(self) -> Manifest:
        """The membership in force."""
        stamp = self._read_stamp()
        if stamp != self._stamp:
            self._stamp = stamp
            self._reload()
        return self.signed.manifest

    def _read_stamp(self) -> tuple[int, int, int]:
        try:
            found = os.stat(self._path)
        except OSError:
            return (0, 0, 0)
        return (found.st_mtime_ns, found.st_ino, found.st_size)

    def _reload(self) -> None:
        log = structlog.get_logger()
        try:
            offered = SignedManifest.from_json(self._path.read_bytes())
            self.signed = accept(self.signed, offered, self._authority_pem)
        except (OSError, CredentialError) as error:
            log.error("manifest-refused", reason=getattr(error, "code", "file"))
            return
        log.info("manifest-loaded", version=self.signed.manifest.version)
