"""The authority's log of every certificate that it ever issued, and what that log rules out."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from datetime import datetime
from typing import ClassVar, Final, Literal

from cryptography import x509
from pydantic import ConfigDict

from secagg.errors import CredentialError
from secagg.pki.documents import STRICT, decode, encode
from secagg.pki.keys import key_digest
from secagg.pki.names import Role, serial_hex
from secagg.pki.request import Request

FORMAT: Final = "secagg/1/issued"


@dataclass(frozen=True, slots=True)
class Issued:
    """One certificate.

    Args:
        role: of its holder.
        name: of its holder.
        serial: lower-case hex.
        tls_key: SHA-256 of its public key, hex.
        identity_key: the Ed25519 key listed with it; None for an admin.
        not_before: begin of its validity.
        not_after: end of it.
    """

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    role: Role
    name: str
    serial: str
    tls_key: str
    identity_key: bytes | None
    not_before: datetime
    not_after: datetime

    @classmethod
    def of(cls, request: Request, certificate: x509.Certificate) -> Issued:
        """The record of the certificate that answers a request."""
        return cls(
            role=request.role,
            name=request.name,
            serial=serial_hex(certificate),
            tls_key=key_digest(request.public_key),
            identity_key=request.identity_key,
            not_before=certificate.not_valid_before_utc,
            not_after=certificate.not_valid_after_utc,
        )

    def is_of(self, role: Role, name: str) -> bool:
        """Whether it was issued to that member."""
        return (self.role, self.name) == (role, name)


@dataclass(frozen=True, slots=True)
class LogFile:
    """The log as JSON."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    format: Literal["secagg/1/issued"]
    entries: tuple[Issued, ...]


@dataclass(frozen=True, slots=True)
class Log:
    """Every certificate ever issued, oldest first; nothing is ever taken out."""

    entries: tuple[Issued, ...]

    def serials(self, role: Role, name: str) -> tuple[str, ...]:
        """The serial numbers of all certificates of one member."""
        return tuple(entry.serial for entry in self.entries if entry.is_of(role, name))

    def replaced_by(self, new: Issued) -> tuple[str, ...]:
        """The serial numbers of that member's certificates for other keys than the new one's."""
        return tuple(
            entry.serial
            for entry in self.entries
            if entry.is_of(new.role, new.name) and entry.tls_key != new.tls_key
        )

    def check_keys(self, request: Request, revoked: Collection[str]) -> None:
        """Return if a request's keys are both new, or both this member's and never revoked.

        Raises:
            CredentialError: ``request-key``.
        """
        pair = (key_digest(request.public_key), request.identity_key)
        for entry in self.entries:
            same_identity_key = entry.identity_key is not None and entry.identity_key == pair[1]
            if entry.tls_key != pair[0] and not same_identity_key:
                continue
            whole = (entry.tls_key, entry.identity_key) == pair
            own = entry.is_of(request.role, request.name)
            if not (whole and own) or entry.serial in revoked:  # CHECK: request-key
                raise CredentialError(
                    "request-key",
                    f"A key in the request of {request.role} {request.name} was revoked, replaced "
                    "or belongs to another member.",
                    "Have the request made again in a new directory, with new keys.",
                )

    def with_entry(self, entry: Issued) -> Log:
        """The log with one more certificate."""
        return Log((*self.entries, entry))

    def to_json(self) -> bytes:
        """The file's bytes."""
        return encode(LogFile(format=FORMAT, entries=self.entries))

    @classmethod
    def from_json(cls, data: bytes) -> Log:
        """Read the file.

        Raises:
            CredentialError: ``log-malformed``.
        """
        return cls(decode(LogFile, data, code="log-malformed", what="log of an authority").entries)
