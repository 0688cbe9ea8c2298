"""Who a certificate speaks for: one URI, read strictly.

A member is ``secagg://<consortium>/<role>/<name>`` in the certificate's subject alternative name,
and nothing else in a certificate says who somebody is: the subject's common name is for people.
Names are DNS labels of the configuration's rule, so there is one spelling of every identity and it
is compared as bytes: no percent-encoding, case folding, Unicode, user part, query or empty part.

grpcio clients can check a server's name only against a DNS entry. So coordinator certificates,
and they alone, carry the DNS name of ``server_dns_name`` and the extended key usage serverAuth;
silo and admin certificates have exactly one entry, the URI, and clientAuth. A silo's certificate
therefore cannot pose as the coordinator: it lacks both the name and the usage that clients ask for.
"""

from __future__ import annotations

import functools
from collections.abc import Collection
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Final

from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID

from secagg.config import is_name
from secagg.errors import ConfigError, CredentialError

_SCHEME: Final = "secagg://"
_REISSUE: Final = "Have the consortium's authority issue a certificate for this member."


class Role(StrEnum):
    """What a member may do."""

    SILO = "silo"
    COORDINATOR = "coordinator"
    ADMIN = "admin"


@dataclass(frozen=True, slots=True)
class Identity:
    """A member of one consortium.

    Raises:
        ConfigError: ``name``: the consortium or the name isn't a DNS label.
    """

    consortium: str
    role: Role
    name: str

    def __post_init__(self) -> None:
        check_name("consortium", self.consortium)  # CHECK: identity-consortium-name
        check_name(self.role, self.name)  # CHECK: identity-name

    @property
    def uri(self) -> str:
        """The one spelling of this identity."""
        return f"{_SCHEME}{self.consortium}/{self.role}/{self.name}"


def check_name(what: str, text: str) -> None:
    """Return if ``text`` can name a ``what``.

    Raises:
        ConfigError: ``name``.
    """
    if not is_name(text):  # CHECK: pki-name
        raise ConfigError(
            "name",
            f"{text!r} cannot name a {what}.",
            "Use 1 to 63 lower-case letters, digits and inner hyphens.",
        )


def parse_uri(text: str) -> Identity:
    """Read an identity.

    Raises:
        CredentialError: ``identity-uri``: not byte for byte the URI of an identity.
    """
    parts = text.removeprefix(_SCHEME).split("/")
    if len(parts) != 3:  # CHECK: uri-parts
        raise _bad_uri(text)
    consortium, role, name = parts
    try:
        identity = Identity(consortium, Role(role), name)
    except (ConfigError, ValueError):
        raise _bad_uri(text) from None
    if identity.uri.encode() != text.encode():  # CHECK: uri-canonical
        raise _bad_uri(text)
    return identity


def server_dns_name(consortium: str) -> str:
    """The name that clients ask the coordinator's certificate for; no resolver ever sees it."""
    check_name("consortium", consortium)  # CHECK: dns-name
    return f"coordinator.{consortium}.secagg.internal"


def serial_hex(certificate: x509.Certificate) -> str:
    """A serial number as manifests and logs write it: lower-case hex, no leading zeros."""
    return f"{certificate.serial_number:x}"


def peer_identity(
    certificate_pem: bytes, *, consortium: str, revoked: Collection[str], now: datetime
) -> Identity:
    """Read who is at the other end of a TLS connection.

    Args:
        certificate_pem: the peer's certificate, whose chain to the authority and whose proof of
            possession the TLS handshake has already checked.
        consortium: the only consortium whose members may be here.
        revoked: serial numbers of the newest manifest.
        now: aware, UTC.

    Raises:
        CredentialError: the peer is at fault, certain: ``identity-certificate``,
            ``identity-no-san``, ``identity-two-sans``, ``identity-uri``, ``identity-consortium``,
            ``identity-usage``, ``identity-not-yet-valid``, ``identity-expired`` or
            ``identity-revoked``.
    """
    certificate, identity = _read_peer(certificate_pem)
    if identity.consortium != consortium:  # CHECK: peer-consortium
        raise CredentialError(
            "identity-consortium",
            f"The certificate is of consortium {identity.consortium}, not of {consortium}.",
            "Use the credentials of this consortium.",
        )
    if now < certificate.not_valid_before_utc:  # CHECK: peer-not-yet-valid
        raise CredentialError(
            "identity-not-yet-valid",
            f"The certificate of {identity.uri} is not valid yet.",
            "Compare the clocks of both machines.",
        )
    if now > certificate.not_valid_after_utc:  # CHECK: peer-expired
        raise CredentialError(
            "identity-expired", f"The certificate of {identity.uri} has expired.", _REISSUE
        )
    if serial_hex(certificate) in revoked:  # CHECK: peer-revoked
        raise CredentialError(
            "identity-revoked",
            f"The certificate of {identity.uri} is revoked.",
            "Use the newest certificate, or have the authority issue one.",
        )
    return identity


@functools.lru_cache(maxsize=1024)
def _read_peer(pem: bytes) -> tuple[x509.Certificate, Identity]:
    """What never changes of a peer's certificate; it comes with every call, so it is read once."""
    certificate = load_certificate(pem)
    return certificate, certificate_identity(certificate)


def load_certificate(pem: bytes) -> x509.Certificate:
    """Read exactly one certificate.

    Raises:
        CredentialError: ``identity-certificate``.
    """
    try:
        certificates = x509.load_pem_x509_certificates(pem)
    except (ValueError, x509.InvalidVersion):
        certificates = []
    if len(certificates) != 1:  # CHECK: one-certificate
        raise CredentialError("identity-certificate", "This is not one PEM certificate.", _REISSUE)
    return certificates[0]


def certificate_identity(certificate: x509.Certificate) -> Identity:
    """Read whom a certificate names, and check that it may be used for that role and no other.

    Neither its time, its chain nor its revocation is looked at.

    Raises:
        CredentialError: ``identity-no-san``, ``identity-two-sans``, ``identity-uri``,
            ``identity-usage`` or ``identity-certificate``.
    """
    try:
        extensions = certificate.extensions
    except x509.DuplicateExtension:
        raise CredentialError(
            "identity-two-sans", "The certificate repeats an extension.", _REISSUE
        ) from None
    except (ValueError, x509.UnsupportedGeneralNameType):
        raise CredentialError(
            "identity-uri", "The certificate's extensions cannot be read.", _REISSUE
        ) from None
    names = _alternative_names(extensions)
    uris = [name.value for name in names if isinstance(name, x509.UniformResourceIdentifier)]
    if not uris:  # CHECK: san-missing
        raise CredentialError("identity-no-san", "The certificate holds no SAN URI.", _REISSUE)
    if len(uris) > 1:  # CHECK: san-two
        raise CredentialError("identity-two-sans", "The certificate names two members.", _REISSUE)
    identity = parse_uri(uris[0])
    if len(names) > (2 if identity.role is Role.COORDINATOR else 1):  # CHECK: san-others
        raise CredentialError(
            "identity-two-sans", f"The certificate of {identity.uri} has other names.", _REISSUE
        )
    # CHECK: certificate-usage
    if names != expected_names(identity) or not _is_leaf_for(identity.role, extensions):
        raise CredentialError(
            "identity-usage", f"The certificate isn't one for a {identity.role}.", _REISSUE
        )
    return identity


def expected_names(identity: Identity) -> list[x509.GeneralName]:
    """Every alternative name that a member's certificate has, in order."""
    names: list[x509.GeneralName] = [x509.UniformResourceIdentifier(identity.uri)]
    if identity.role is Role.COORDINATOR:
        names.append(x509.DNSName(server_dns_name(identity.consortium)))
    return names


def extended_usage(role: Role) -> x509.ExtendedKeyUsage:
    """The one side of TLS that a role takes."""
    server = role is Role.COORDINATOR
    oid = ExtendedKeyUsageOID.SERVER_AUTH if server else ExtendedKeyUsageOID.CLIENT_AUTH
    return x509.ExtendedKeyUsage([oid])


def _alternative_names(extensions: x509.Extensions) -> list[x509.GeneralName]:
    try:
        return list(extensions.get_extension_for_class(x509.SubjectAlternativeName).value)
    except x509.ExtensionNotFound:
        return []


def _is_leaf_for(role: Role, extensions: x509.Extensions) -> bool:
    try:
        constraints = extensions.get_extension_for_class(x509.BasicConstraints).value
        usage = extensions.get_extension_for_class(x509.KeyUsage).value
        extended = extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    except x509.ExtensionNotFound:
        return False
    signs_only = usage.digital_signature and not usage.key_cert_sign
    return not constraints.ca and signs_only and extended == extended_usage(role)


def _bad_uri(text: str) -> CredentialError:
    return CredentialError("identity-uri", f"{text[:200]!r} is no member's identity.", _REISSUE)
