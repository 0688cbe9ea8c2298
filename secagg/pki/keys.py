"""P-256 keys, and how a person compares one.

A fingerprint is SHA-256, shown whole in groups of four hex digits. It is compared whole too: a
shortened one can be met by trying keys.
"""

from __future__ import annotations

import hashlib
import re

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from secagg.crypto.secret import Secret
from secagg.errors import CredentialError


def generate_key() -> Secret:
    """Make a P-256 key from OpenSSL's generator, as unencrypted PKCS #8 PEM."""
    return Secret(
        ec.generate_private_key(ec.SECP256R1()).private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )


def load_key(pem: Secret) -> ec.EllipticCurvePrivateKey:
    """Read a P-256 key.

    Raises:
        CredentialError: ``key-malformed``.
    """
    try:
        key = serialization.load_pem_private_key(pem.reveal(), password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        key = None
    # CHECK: tls-key-p256
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not _is_p256(key.public_key()):
        raise CredentialError(
            "key-malformed",
            "A TLS key file holds no unencrypted P-256 key.",
            "Restore it, or enrol again in a new directory.",
        )
    return key


def p256_public(
    holder: x509.Certificate | x509.CertificateSigningRequest,
) -> ec.EllipticCurvePublicKey:
    """Return the key of a certificate or request if it is a P-256 public key.

    Raises:
        CredentialError: ``key-malformed``.
    """
    try:
        key = holder.public_key()
    except (ValueError, UnsupportedAlgorithm):
        key = None
    # CHECK: public-key-p256
    if not isinstance(key, ec.EllipticCurvePublicKey) or not _is_p256(key):
        raise CredentialError("key-malformed", "The key isn't one of curve P-256.")
    return key


def public_der(key: ec.EllipticCurvePublicKey) -> bytes:
    """The SubjectPublicKeyInfo of a key: the same bytes for the same key."""
    return key.public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )


def grouped(value: bytes) -> str:
    """Hex in groups of four digits."""
    return " ".join(re.findall("..?.?.?", value.hex()))


def check_fingerprint(actual: str, expected: str, code: str) -> None:
    """Return if a fingerprint that somebody typed is the one computed here, all 64 digits of it.

    Args:
        actual: what ``grouped`` gave.
        expected: in any case, with or without spaces, colons and hyphens.
        code: slug of the error.

    Raises:
        CredentialError: under ``code``.
    """
    if re.sub(r"[\s:-]", "", expected).lower() != actual.replace(" ", ""):  # CHECK: fingerprint
        raise CredentialError(
            code,
            "The fingerprint is not the expected one.",
            "Compare all 64 digits with the other side over the phone; do not go on otherwise.",
        )


def key_digest(key: ec.EllipticCurvePublicKey) -> str:
    """SHA-256 of a public key, hex, as the authority's log keeps it."""
    return hashlib.sha256(public_der(key)).hexdigest()


def _is_p256(key: ec.EllipticCurvePublicKey) -> bool:
    return isinstance(key.curve, ec.SECP256R1)
