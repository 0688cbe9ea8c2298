"""A consortium in a temporary directory, and certificates that no authority of ours would make."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID, ObjectIdentifier

from secagg.errors import SecaggError
from secagg.pki.authority import Authority
from secagg.pki.credentials import Credentials
from secagg.pki.enrolment import Bundle, Request, create_request, install_bundle
from secagg.pki.names import Role

CONSORTIUM = "hospitals"
NOW = datetime(2026, 3, 1, 12, 0, tzinfo=UTC)
CLIENT = ExtendedKeyUsageOID.CLIENT_AUTH
SERVER = ExtendedKeyUsageOID.SERVER_AUTH


@contextmanager
def refused(code: str) -> Iterator[None]:
    """Expect a ``SecaggError`` with this code, which also says what was observed."""
    with pytest.raises(SecaggError) as caught:
        yield
    assert caught.value.code == code
    assert caught.value.observed


def request(directory: Path, name: str, role: Role = Role.SILO) -> Request:
    return create_request(directory, role, name, CONSORTIUM, os.urandom)


def enrol(
    authority: Authority, directory: Path, name: str, role: Role = Role.SILO
) -> tuple[Bundle, Credentials]:
    bundle = authority.approve(request(directory, name, role), now=NOW)
    return bundle, install_bundle(directory, bundle, fingerprint=authority.fingerprint, now=NOW)


def uri(text: str) -> x509.GeneralName:
    # Past the constructor's check for ASCII: a certificate may hold any bytes.
    return x509.UniformResourceIdentifier._init_without_validation(text)


def certificate(
    *names: x509.GeneralName,
    usages: tuple[ObjectIdentifier, ...] = (CLIENT,),
    ca: bool | None = False,
    digital_signature: bool = True,
    key_cert_sign: bool = False,
    begin: datetime = NOW - timedelta(minutes=5),
    end: datetime = NOW + timedelta(days=1),
    common_name: str = "somebody",
    serial: int = 0xAB12,
    key: ec.EllipticCurvePrivateKey | None = None,
    extra: tuple[x509.ExtensionType, ...] = (),
) -> bytes:
    """A self-signed certificate with exactly these properties; PEM."""
    key = key or ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])
    builder = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(serial)
        .not_valid_before(begin)
        .not_valid_after(end)
        .add_extension(
            x509.KeyUsage(
                digital_signature=digital_signature,
                key_cert_sign=key_cert_sign,
                content_commitment=False,
                key_encipherment=False,
                data_encipherment=False,
                key_agreement=False,
                crl_sign=False,
                encipher_only=False,
                decipher_only=False,
            ),
            critical=True,
        )
    )
    if ca is not None:
        builder = builder.add_extension(x509.BasicConstraints(ca, None), critical=True)
    if usages:
        builder = builder.add_extension(x509.ExtendedKeyUsage(usages), critical=False)
    if names:
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    for extension in extra:
        builder = builder.add_extension(extension, critical=False)
    return builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)
