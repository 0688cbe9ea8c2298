"""Certificates that no authority of ours would issue, under its key or another one."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID, ObjectIdentifier

from secagg.crypto.secret import Secret
from secagg.pki.authority import Authority
from secagg.pki.enrolment import renewal_request
from secagg.pki.keys import load_key
from secagg.pki.names import Role
from threat_model.attacks.attack import Scene
from threat_model.attacks.evil_silo import Pair
from threat_model.attacks.stage import CONSORTIUM, Consortium

CLIENT: Final = (ExtendedKeyUsageOID.CLIENT_AUTH,)
BOTH: Final = (ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH)


@dataclass(frozen=True)
class Maker:
    """Whoever signs certificates.

    Args:
        name: of the issuer.
        key: its own.
    """

    name: x509.Name
    key: ec.EllipticCurvePrivateKey

    @classmethod
    def of(cls, pair: Pair) -> Maker:
        """Who has this key and certificate."""
        key = serialization.load_pem_private_key(pair.key, None)
        assert isinstance(key, ec.EllipticCurvePrivateKey)
        return cls(x509.load_pem_x509_certificate(pair.certificate).subject, key)

    @classmethod
    def authority(cls, consortium: Consortium) -> Maker:
        """The consortium's authority, which was talked into something."""
        made = consortium.authority
        return cls.of(Pair(made.key_pem.reveal(), made.certificate_pem))


def uri(text: str) -> x509.GeneralName:
    """A URI, past the constructor's check for ASCII: a certificate may hold any bytes."""
    return x509.UniformResourceIdentifier._init_without_validation(text)


def odd(
    maker: Maker | None,
    *names: x509.GeneralName,
    usages: Sequence[ObjectIdentifier] = CLIENT,
    common_name: str = "d",
    lasts: timedelta = timedelta(days=1),
    empty_san: bool = False,
) -> Pair:
    """A fresh key, and a certificate with exactly these properties; self-signed without a maker."""
    now, key = datetime.now(UTC), ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])
    maker = maker or Maker(subject, key)
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(maker.name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(minutes=5))
        .not_valid_after(now + lasts)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.KeyUsage(True, *(False,) * 8), critical=True)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(maker.key.public_key()),
            critical=False,
        )
    )
    if usages:
        builder = builder.add_extension(x509.ExtendedKeyUsage(usages), critical=False)
    if names or empty_san:
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    certificate = builder.sign(maker.key, hashes.SHA256())
    return Pair(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        ),
        certificate.public_bytes(serialization.Encoding.PEM),
    )


def under(pair: Pair, issuer: Pair) -> Pair:
    """The same with its issuer's certificate sent along."""
    return replace(pair, certificate=pair.certificate + issuer.certificate)


def issued(scene: Scene, name: str, *, now: datetime, days: int, role: Role = Role.SILO) -> Pair:
    """A member's key under a certificate of the authority's, which may be the weakened one."""
    consortium, place = scene.stage.consortium, scene.stage.new_directory() / "authority"
    shutil.copytree(consortium.authority.directory, place)
    request = renewal_request(consortium.root / name, role, name, CONSORTIUM)
    with scene.weakening.applied() if scene.weakening else nullcontext():
        bundle = Authority.load(place).approve(request, now=now, days=days)
    key = consortium.credentials(name, role).tls_key_pem.reveal()
    return Pair(key, bundle.certificate_pem)


def reissued(made: x509.Certificate, key: Secret, *instead: x509.ExtensionType) -> x509.Certificate:
    """The same certificate with these extensions in the place of its own."""
    kept = [e for e in made.extensions if e.oid not in {other.oid for other in instead}]
    builder = (
        x509.CertificateBuilder()
        .subject_name(made.subject)
        .issuer_name(made.issuer)
        .public_key(made.public_key())
        .serial_number(made.serial_number)
        .not_valid_before(made.not_valid_before_utc)
        .not_valid_after(made.not_valid_after_utc)
    )
    for extension in kept:
        builder = builder.add_extension(extension.value, critical=extension.critical)
    for value in instead:
        builder = builder.add_extension(value, critical=False)
    return builder.sign(load_key(key), hashes.SHA256())
