"""Server credentials that follow the files on disk.

Mutual TLS: a client certificate of the consortium's authority is demanded in the handshake, so no
handler runs for anybody else. TLS 1.3 only: grpcio has no switch for the version, but with an ECDSA
server certificate and only one cipher suite of TLS 1.2 offered that needs an RSA key, no TLS 1.2
handshake can succeed (``launch`` sets it before grpc is first imported; a test checks by
handshake).

The fetcher returns None unless the file changed: grpcio segfaults when it is handed new objects on
every handshake under load (grpc/grpc#36693). A file that was refused is looked at again after a
while, because it may have been one of several that were still being written.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import datetime

import grpc
import structlog

from secagg.errors import CredentialError
from secagg.pki.credentials import Credentials
from secagg.pki.renewal import Reminder, RenewalWatch, utc_now


class ServerCertificate:
    """The coordinator's certificate, reloaded when its file changes.

    Logs a warning when its end is near: at the start, after a reload and then once a day, as
    members connect.

    Args:
        credentials: what the process starts with.
        now: aware, UTC.
        monotonic: seconds, for the time between two looks at what was refused.
    """

    def __init__(
        self,
        credentials: Credentials,
        *,
        now: Callable[[], datetime] = utc_now,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._current = credentials
        self._now = now
        self._watch = RenewalWatch(credentials, now=now, monotonic=monotonic)
        self._reminder = Reminder()
        self._remind()

    def credentials(self) -> grpc.ServerCredentials:
        """Credentials for a secure port."""
        return grpc.dynamic_ssl_server_credentials(
            _configuration(self._current),
            self._fetch,  # type: ignore[arg-type]  # None means unchanged
            require_client_authentication=True,
        )

    def _fetch(self) -> grpc.ServerCertificateConfiguration | None:
        found = self._watch.poll()
        log = structlog.get_logger()
        if isinstance(found, CredentialError):
            log.error("certificate-refused", code=found.code)
        elif found is not None:
            self._current, self._reminder = found, Reminder()
            log.info("certificate-reloaded", not_after=found.not_after.isoformat())
        self._remind()
        return _configuration(found) if isinstance(found, Credentials) else None

    def _remind(self) -> None:
        now, current = self._now(), self._current
        if self._reminder.due(current, now):
            structlog.get_logger().warning(
                "certificate-ends-soon",
                days=current.days_left(now),
                not_after=current.not_after.isoformat(),
                remedy=current.how_to_renew,
            )


def _configuration(credentials: Credentials) -> grpc.ServerCertificateConfiguration:
    pair = (credentials.tls_key_pem.reveal(), credentials.certificate_pem)
    return grpc.ssl_server_certificate_configuration([pair], credentials.authority_pem)
