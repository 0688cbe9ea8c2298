"""X.509 as this product makes it: one self-signed authority, leaves directly below it.

Keys are ECDSA P-256. The authority may sign certificates and nothing below it may (path length 0).
A leaf takes only the public key from its request; every name and usage in it is the authority's.
Serial numbers are 128 uniform bits, so they tell nothing and never repeat. A leaf is valid from
five minutes before it was issued, so that a clock that runs slightly late still accepts it.
"""

from __future__ import annotations

import secrets
from datetime import datetime, timedelta
from typing import Final

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from secagg.crypto.secret import Secret
from secagg.errors import CredentialError
from secagg.pki.keys import grouped, load_key, p256_public
from secagg.pki.names import Identity, expected_names, extended_usage, load_certificate

AUTHORITY_DAYS: Final = 3653
CLOCK_SKEW: Final = timedelta(minutes=5)
_COMMON_NAME: Final = "secagg authority"


def authority_certificate(consortium: str, key_pem: Secret, *, now: datetime) -> bytes:
    """Make the self-signed certificate that anchors a consortium; PEM."""
    key = load_key(key_pem)
    subject = _authority_name(consortium)
    builder = (
        _builder(subject, subject, key.public_key(), now, now + timedelta(days=AUTHORITY_DAYS))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(signs_certificates=True), critical=True)
    )
    return builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


def member_certificate(
    identity: Identity,
    public: ec.EllipticCurvePublicKey,
    authority_pem: bytes,
    authority_key: Secret,
    *,
    now: datetime,
    not_after: datetime,
) -> x509.Certificate:
    """Certify a member's TLS key.

    Args:
        identity: who holds the key; it alone decides every name and usage.
        public: the key out of the request.
        authority_pem: the issuer.
        authority_key: the issuer's key.
        now: aware, UTC.
        not_after: end of validity, no later than the authority's own.
    """
    authority = load_authority(authority_pem)
    key = load_key(authority_key)
    subject = x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, identity.consortium),
            x509.NameAttribute(NameOID.ORGANIZATIONAL_UNIT_NAME, identity.role),
            x509.NameAttribute(NameOID.COMMON_NAME, identity.name),
        ]
    )
    issuer_key = x509.AuthorityKeyIdentifier.from_issuer_public_key(key.public_key())
    builder = (
        _builder(subject, authority.subject, public, now, not_after)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage(signs_certificates=False), critical=True)
        .add_extension(extended_usage(identity.role), critical=False)
        .add_extension(x509.SubjectAlternativeName(expected_names(identity)), critical=False)
        .add_extension(issuer_key, critical=False)
    )
    return builder.sign(key, hashes.SHA256())


def load_authority(pem: bytes) -> x509.Certificate:
    """Read a trust anchor: one self-signed P-256 certificate that may sign leaves and no more.

    Raises:
        CredentialError: ``authority-malformed``.
    """
    try:
        certificate = load_certificate(pem)
        p256_public(certificate)  # CHECK: authority-p256
        certificate.verify_directly_issued_by(certificate)  # CHECK: authority-self-signed
        constraints = certificate.extensions.get_extension_for_class(x509.BasicConstraints).value
        usage = certificate.extensions.get_extension_for_class(x509.KeyUsage).value
        sound = constraints.ca and constraints.path_length == 0 and usage.key_cert_sign
    except (
        CredentialError,
        InvalidSignature,
        ValueError,
        TypeError,
        x509.ExtensionNotFound,
        x509.DuplicateExtension,
        x509.UnsupportedGeneralNameType,
    ):
        sound = False
    if not sound:  # CHECK: authority-malformed
        raise CredentialError(
            "authority-malformed",
            "The authority's certificate isn't one of a consortium's authority.",
            "Ask the admin for the bundle again.",
        )
    return certificate


def authority_key(pem: bytes) -> ec.EllipticCurvePublicKey:
    """The public key of a trust anchor (see ``load_authority``)."""
    return p256_public(load_authority(pem))


def check_authority_consortium(pem: bytes, consortium: str) -> None:
    """Return if a trust anchor is the consortium's.

    Raises:
        CredentialError: ``authority-consortium``.
    """
    if load_authority(pem).subject != _authority_name(consortium):  # CHECK: authority-consortium
        raise CredentialError(
            "authority-consortium",
            f"The authority's certificate isn't one of consortium {consortium}.",
            "Use the bundle of this consortium's admin.",
        )


def check_issued(certificate: x509.Certificate, authority_pem: bytes, *, now: datetime) -> None:
    """Return if a trust anchor signed a certificate directly, and is itself valid now.

    Raises:
        CredentialError: ``certificate-chain``, ``authority-expired`` or
            ``authority-not-yet-valid``.
    """
    authority = load_authority(authority_pem)
    try:
        certificate.verify_directly_issued_by(authority)  # CHECK: certificate-chain
    except (ValueError, TypeError, InvalidSignature):
        raise CredentialError(
            "certificate-chain",
            "The certificate was not issued by the consortium's authority.",
            "Ask the admin for the bundle again and compare the fingerprints.",
        ) from None
    check_authority_validity(authority, now=now)  # CHECK: issued-authority-validity


def check_authority_validity(authority: x509.Certificate, *, now: datetime) -> None:
    """Return if a trust anchor is valid now.

    Raises:
        CredentialError: ``authority-expired`` or ``authority-not-yet-valid``.
    """
    if now > authority.not_valid_after_utc:  # CHECK: authority-expired
        raise CredentialError(
            "authority-expired",
            f"The authority's certificate ended on {authority.not_valid_after_utc:%Y-%m-%d}.",
            "Create a new authority and enrol every member again.",
        )
    if now < authority.not_valid_before_utc:  # CHECK: authority-not-yet-valid
        raise CredentialError(
            "authority-not-yet-valid",
            f"The authority's certificate begins on {authority.not_valid_before_utc:%Y-%m-%d}.",
            "This machine's clock is late (clock skew): set it.",
        )


def certificate_fingerprint(pem: bytes) -> str:
    """SHA-256 of a trust anchor's DER, in groups of four hex digits, to be read out loud."""
    return grouped(load_authority(pem).fingerprint(hashes.SHA256()))


def _authority_name(consortium: str) -> x509.Name:
    return x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, consortium),
            x509.NameAttribute(NameOID.COMMON_NAME, _COMMON_NAME),
        ]
    )


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    public: ec.EllipticCurvePublicKey,
    now: datetime,
    not_after: datetime,
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public)
        .serial_number(secrets.randbits(128))
        .not_valid_before(now - CLOCK_SKEW)
        .not_valid_after(not_after)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
    )


def _key_usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        crl_sign=False,
        encipher_only=False,
        decipher_only=False,
    )
