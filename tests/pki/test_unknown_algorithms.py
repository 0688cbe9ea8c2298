"""Keys and signatures of algorithms that the library does not know are refused like any other."""

from __future__ import annotations

import base64
import os
import textwrap
from dataclasses import replace
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from secagg.crypto.secret import Secret
from secagg.pki.authority import Authority
from secagg.pki.certificates import check_issued, load_authority
from secagg.pki.enrolment import Bundle, create_request
from secagg.pki.keys import generate_key, load_key
from secagg.pki.names import Role

from .builders import CONSORTIUM, NOW, refused

EC_KEY = bytes.fromhex("06072a8648ce3d0201")
ECDSA_SHA256 = bytes.fromhex("06082a8648ce3d040302")


def unknown(pem: bytes, oid: bytes) -> bytes:
    """The same PEM with an algorithm that there is not."""
    label = pem.split(b"-----")[1].removeprefix(b"BEGIN ")
    der = base64.b64decode(b"".join(pem.splitlines()[1:-1]))
    assert oid in der
    body = base64.b64encode(der.replace(oid, oid[:-1] + b"\x7f")).decode()
    lines = "\n".join(textwrap.wrap(body, 64)).encode()
    return b"-----BEGIN %b-----\n%b\n-----END %b-----\n" % (label, lines, label)


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority.create(tmp_path / "authority", CONSORTIUM, now=NOW)


def test_a_private_key() -> None:
    with refused("key-malformed"):
        load_key(Secret(unknown(generate_key().reveal(), EC_KEY)))


@pytest.mark.parametrize("oid", [EC_KEY, ECDSA_SHA256], ids=["key", "signature"])
def test_a_trust_anchor(authority: Authority, oid: bytes) -> None:
    with refused("authority-malformed"):
        load_authority(unknown(authority.certificate_pem, oid))


def test_a_certificate_that_is_to_be_of_the_authority(authority: Authority) -> None:
    odd = x509.load_pem_x509_certificate(unknown(authority.certificate_pem, ECDSA_SHA256))
    with refused("certificate-chain"):
        check_issued(odd, authority.certificate_pem, now=NOW)


@pytest.mark.parametrize(
    ("oid", "code"),
    [(EC_KEY, "request-malformed"), (ECDSA_SHA256, "request-signature")],
    ids=["key", "signature"],
)
def test_a_request(tmp_path: Path, oid: bytes, code: str) -> None:
    sound = create_request(tmp_path / "a", Role.SILO, "a", CONSORTIUM, os.urandom)
    csr = x509.load_pem_x509_csr(sound.csr_pem).public_bytes(Encoding.PEM)
    with refused(code):
        replace(sound, csr_pem=unknown(csr, oid))


def test_text_around_a_certificate_is_written_as_it_was_read(
    authority: Authority, tmp_path: Path
) -> None:
    request = create_request(tmp_path / "a", Role.SILO, "a", CONSORTIUM, os.urandom)
    bundle = authority.approve(request, now=NOW)
    with_a_note = replace(bundle, certificate_pem="für a\n".encode() + bundle.certificate_pem)
    assert Bundle.from_json(with_a_note.to_json()) == with_a_note
