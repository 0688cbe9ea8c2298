"""Server credentials that follow the files on disk.

Mutual TLS: a client certificate of the consortium's authority is demanded in the handshake, so no
handler runs for anybody else. TLS 1.3 only: grpcio has no switch for the version, but with an ECDSA
server certificate and only one cipher suite of TLS 1.2 offered that needs an RSA key, no TLS 1.2
handshake can succeed (``launch`` sets it before grpc is first imported; a test checks by
handshake).

The fetcher returns None unless the file changed: grpcio segfaults when it is handed new objects on
every handshake under load (grpc/grpc#36693).
"""

from __future__ import annotations

import os
from datetime import UTC, datetime
from pathlib import Path

import grpc
import structlog

from secagg.errors import CredentialError
from secagg.pki.credentials import CERTIFICATE, Credentials, load_credentials
from secagg.pki.names import Role


class ServerCertificate:
    """The coordinator's certificate, reloaded when its file changes."""

    def __init__(self, credentials: Credentials) -> None:
        self._directory = credentials.directory
        self._initial = _configuration(credentials)
        self._stamp = _stamp(self._directory)

    def credentials(self) -> grpc.ServerCredentials:
        """Credentials for a secure port."""
        return grpc.dynamic_ssl_server_credentials(
            self._initial,
            self._fetch,  # type: ignore[arg-type]  # None means unchanged
            require_client_authentication=True,
        )

    def _fetch(self) -> grpc.ServerCertificateConfiguration | None:
        stamp = _stamp(self._directory)
        if stamp == self._stamp:
            return None
        self._stamp = stamp
        log = structlog.get_logger()
        try:
            renewed = load_credentials(
                self._directory, now=datetime.now(UTC), role=Role.COORDINATOR
            )
        except CredentialError as error:
            log.error("certificate-refused", code=error.code)
            return None
        log.info("certificate-reloaded", not_after=renewed.not_after.isoformat())
        return _configuration(renewed)


def _configuration(credentials: Credentials) -> grpc.ServerCertificateConfiguration:
    pair = (credentials.tls_key_pem.reveal(), credentials.certificate_pem)
    return grpc.ssl_server_certificate_configuration([pair], credentials.authority_pem)


def _stamp(directory: Path) -> tuple[int, int]:
    try:
        found = os.stat(directory / CERTIFICATE)
    except OSError:
        return (0, 0)
    return (found.st_mtime_ns, found.st_ino)
