from __future__ import annotations

import json
import os
import stat
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519

from secagg.crypto.sign import IdentityKey
from secagg.pki import documents
from secagg.pki import request as pki_request
from secagg.pki.authority import Authority
from secagg.pki.credentials import load_credentials
from secagg.pki.enrolment import (
    Bundle,
    Request,
    create_request,
    install_bundle,
    renewal_request,
)
from secagg.pki.names import Identity, Role

from .builders import CONSORTIUM, NOW, enrol, refused, request, uri


def csr(*names: x509.GeneralName, key: Any = None) -> str:
    builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
    if names:
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    key = key or ec.generate_private_key(ec.SECP256R1())
    digest = None if isinstance(key, ed25519.Ed25519PrivateKey) else hashes.SHA256()
    return builder.sign(key, digest).public_bytes(serialization.Encoding.PEM).decode()


def altered(made: Request, **changes: Any) -> bytes:
    return json.dumps({**json.loads(made.to_json()), **changes}).encode()


@pytest.mark.parametrize("role", list(Role))
def test_request_round_trip(tmp_path: Path, role: Role) -> None:
    made = request(tmp_path / "m", "north", role)
    assert Request.from_json(made.to_json()) == made
    assert made.identity == Identity(CONSORTIUM, role, "north")
    files = {"tls.key"} if role is Role.ADMIN else {"tls.key", "identity.key"}
    assert set(os.listdir(tmp_path / "m")) == files
    for file in files:
        assert stat.S_IMODE((tmp_path / "m" / file).stat().st_mode) == 0o600
    assert stat.S_IMODE((tmp_path / "m").stat().st_mode) == 0o700


def test_identity_key_comes_from_the_entropy(tmp_path: Path) -> None:
    made = create_request(tmp_path / "m", Role.SILO, "north", CONSORTIUM, lambda n: b"\x07" * n)
    assert made.identity_key == IdentityKey.generate(lambda n: b"\x07" * n).public
    assert (tmp_path / "m" / "identity.key").read_bytes() == b"\x07" * 32


def test_keys_are_never_overwritten(tmp_path: Path) -> None:
    request(tmp_path / "m", "north")
    before = {path: path.read_bytes() for path in (tmp_path / "m").iterdir()}
    for role in Role:
        with refused("keys-exist"):
            request(tmp_path / "m", "north", role)
    assert {path: path.read_bytes() for path in (tmp_path / "m").iterdir()} == before


def test_a_dangling_link_counts_as_a_key(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir(mode=0o700)
    (tmp_path / "m" / "identity.key").symlink_to(tmp_path / "nowhere")
    with refused("keys-exist"):
        request(tmp_path / "m", "north")


def test_bad_names_make_no_keys(tmp_path: Path) -> None:
    with refused("name"):
        request(tmp_path / "m", "North")
    assert not (tmp_path / "m").exists()


def test_renewal_has_the_same_fingerprint(tmp_path: Path) -> None:
    first = request(tmp_path / "m", "north")
    again = renewal_request(tmp_path / "m", Role.SILO, "north", CONSORTIUM)
    assert again.csr_pem != first.csr_pem
    assert again.fingerprint == first.fingerprint
    assert request(tmp_path / "n", "north").fingerprint != first.fingerprint


@pytest.mark.parametrize(
    "change",
    [
        {"name": "South"},
        {"name": "south"},
        {"name": ""},
        {"consortium": "banks"},
        {"consortium": "."},
        {"role": "coordinator"},
        {"csr": csr(uri(f"secagg://{CONSORTIUM}/silo/North"))},
        {"csr": csr(uri(f"secagg://{CONSORTIUM}/silo/south"))},
    ],
    ids="-".join,
)
def test_request_name(tmp_path: Path, change: dict[str, Any]) -> None:
    with refused("request-name"):
        Request.from_json(altered(request(tmp_path / "m", "north"), **change))


GOOD = uri(f"secagg://{CONSORTIUM}/silo/north")


@pytest.mark.parametrize(
    "change",
    [
        {"csr": ""},
        {"csr": "-----BEGIN CERTIFICATE REQUEST-----"},
        {"csr": csr()},
        {"csr": csr(GOOD, GOOD)},
        {"csr": csr(GOOD, x509.DNSName("coordinator"))},
        {"csr": csr(x509.DNSName("north"))},
        {"csr": csr(GOOD, key=ec.generate_private_key(ec.SECP384R1()))},
        {"csr": csr(GOOD, key=ed25519.Ed25519PrivateKey.generate())},
        {"role": "authority"},
        {"format": "secagg/1/bundle"},
        {"identity_key": None},
        {"signature": None},
        {"identity_key": None, "signature": None},
        {"identity_key": "00" * 31},
        {"identity_key": "xx"},
        {"more": 1},
        {"name": 1},
    ],
    ids=lambda change: repr(change)[:40],
)
def test_request_malformed(tmp_path: Path, change: dict[str, Any]) -> None:
    with refused("request-malformed"):
        Request.from_json(altered(request(tmp_path / "m", "north"), **change))


def test_admin_has_no_identity_key(tmp_path: Path) -> None:
    made = request(tmp_path / "m", "ann", Role.ADMIN)
    for change in ({"identity_key": "00" * 32, "signature": "00" * 64}, {"signature": "00" * 64}):
        with refused("request-malformed"):
            Request.from_json(altered(made, **change))


def test_possession_of_both_keys(tmp_path: Path) -> None:
    made = request(tmp_path / "m", "north")
    other = request(tmp_path / "n", "north")
    key = IdentityKey.generate(os.urandom)
    assert other.identity_key is not None
    assert other.signature is not None
    for change in (
        {"identity_key": key.public.hex()},
        {"identity_key": other.identity_key.hex(), "signature": other.signature.hex()},
        {"csr": other.csr_pem.decode()},
        {"signature": "00" * 64},
        {"signature": ""},
        # The same body under another transcript: without the name and the key.
        {
            "signature": key.sign("enrolment", b"", made.csr_pem).hex(),
            "identity_key": key.public.hex(),
        },
    ):
        with refused("request-signature"):
            Request.from_json(altered(made, **change))


def test_order_8() -> None:
    """x² = −y² on −x² + y² = 1 + dx²y²: doubling such a point gives y = 0, which has order 4."""
    p, y = pki_request._P, pki_request._Y_OF_ORDER_8
    d = -121665 * pow(121666, -1, p)
    assert (d * y**4 + 2 * y**2 - 1) % p == 0


@pytest.mark.parametrize("y", sorted(pki_request._LOW_ORDER))
def test_identity_key_of_low_order(tmp_path: Path, y: int) -> None:
    """Under such a key, a signature that somebody guessed verifies for every few messages."""
    made = request(tmp_path / "m", "north")
    for sign_bit in (0, 1 << 255):
        key = (y | sign_bit).to_bytes(32, "little")
        for point in (0, 1, y):
            signature = point.to_bytes(32, "little") + bytes(32)
            with refused("request-signature"):
                Request.from_json(altered(made, identity_key=key.hex(), signature=signature.hex()))


@pytest.mark.parametrize("role", [Role.SILO, Role.ADMIN])
def test_csr_that_is_not_signed_by_its_key(tmp_path: Path, role: Role) -> None:
    made = request(tmp_path / "m", "north", role)
    der = bytearray(x509.load_pem_x509_csr(made.csr_pem).public_bytes(serialization.Encoding.DER))
    der[-1] ^= 1
    pem = x509.load_der_x509_csr(bytes(der)).public_bytes(serialization.Encoding.PEM)
    with refused("request-signature"):
        Request.from_json(altered(made, csr=pem.decode()))


def test_giant_file(authority: Authority, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = request(tmp_path / "m", "north")
    bundle = authority.approve(made, now=NOW)
    for value, code in ((made, "request-malformed"), (bundle, "bundle-malformed")):
        data = value.to_json()
        monkeypatch.setattr(documents, "MAX_FILE_BYTES", len(data))
        assert type(value).from_json(data) == value
        monkeypatch.setattr(documents, "MAX_FILE_BYTES", len(data) - 1)
        with refused(code):
            type(value).from_json(data)


def test_bundle_round_trip(authority: Authority, tmp_path: Path) -> None:
    bundle = authority.approve(request(tmp_path / "m", "north"), now=NOW)
    assert Bundle.from_json(bundle.to_json()) == bundle
    value = json.loads(bundle.to_json())
    for change in ({"extra": 1}, {"role": "x"}, {"manifest": None}, {"certificate": 1}):
        with refused("bundle-malformed"):
            Bundle.from_json(json.dumps({**value, **change}).encode())
    value["manifest"]["version"] = 0
    with refused("manifest-malformed"):
        Bundle.from_json(json.dumps(value).encode())


@pytest.mark.parametrize("role", list(Role))
def test_install(authority: Authority, tmp_path: Path, role: Role) -> None:
    bundle, credentials = enrol(authority, tmp_path / "m", "north", role)
    assert credentials.identity == Identity(CONSORTIUM, role, "north")
    assert load_credentials(tmp_path / "m", now=NOW, role=role) == credentials
    assert credentials.manifest == bundle.manifest
    modes = {p.name: stat.S_IMODE(p.stat().st_mode) for p in (tmp_path / "m").iterdir()}
    for name in ("authority.pem", "certificate.pem", "manifest.json"):
        assert modes[name] == 0o644


@pytest.mark.parametrize("spelling", [str, str.upper, lambda f: f.replace(" ", ":")])
def test_fingerprint_in_any_spelling(authority: Authority, tmp_path: Path, spelling: Any) -> None:
    bundle = authority.approve(request(tmp_path / "m", "north"), now=NOW)
    fingerprint = spelling(authority.fingerprint)
    install_bundle(tmp_path / "m", bundle, fingerprint=fingerprint, now=NOW)


def test_wrong_or_short_fingerprint(authority: Authority, tmp_path: Path) -> None:
    bundle = authority.approve(request(tmp_path / "m", "north"), now=NOW)
    good = authority.fingerprint
    for bad in ("", good[:-1], good[:9], good + "0", "0" * 64):
        with refused("authority-fingerprint"):
            install_bundle(tmp_path / "m", bundle, fingerprint=bad, now=NOW)
    assert set(os.listdir(tmp_path / "m")) == {"tls.key", "identity.key"}


def test_refused_bundles_write_nothing(authority: Authority, tmp_path: Path) -> None:
    bundle = authority.approve(request(tmp_path / "m", "north"), now=NOW)
    south, _ = enrol(authority, tmp_path / "south", "south")
    rival = Authority.create(tmp_path / "rival", CONSORTIUM, now=NOW)
    banks = Authority.create(tmp_path / "banks", "banks", now=NOW)
    older = authority.manifest
    without = replace(older, version=9, silos={})
    signed = type(bundle.manifest).sign
    cases = {
        "certificate-key": replace(bundle, certificate_pem=south.certificate_pem),
        "bundle-name": replace(bundle, name="south"),
        "certificate-chain": replace(bundle, authority_pem=rival.certificate_pem),
        "authority-consortium": replace(bundle, authority_pem=banks.certificate_pem),
        "authority-malformed": replace(bundle, authority_pem=bundle.certificate_pem),
        "manifest-signature": replace(bundle, manifest=signed(older, rival.key_pem)),
        "manifest-not-member": replace(bundle, manifest=signed(without, authority.key_pem)),
        "manifest-consortium": replace(
            bundle, manifest=signed(replace(older, consortium="banks"), authority.key_pem)
        ),
        "identity-certificate": replace(bundle, certificate_pem=b""),
    }
    for code, bad in cases.items():
        with refused(code):
            install_bundle(tmp_path / "m", bad, fingerprint=None, now=NOW)
    with refused("bundle-name"):
        install_bundle(
            tmp_path / "m", replace(bundle, consortium="banks"), fingerprint=None, now=NOW
        )
    with refused("certificate-expired"):
        install_bundle(tmp_path / "m", bundle, fingerprint=None, now=NOW + timedelta(days=398))
    assert set(os.listdir(tmp_path / "m")) == {"tls.key", "identity.key"}
    install_bundle(tmp_path / "m", bundle, fingerprint=None, now=NOW)


def test_bundle_without_keys(authority: Authority, tmp_path: Path) -> None:
    bundle = authority.approve(request(tmp_path / "m", "north"), now=NOW)
    with refused("file-missing"):
        install_bundle(tmp_path / "elsewhere", bundle, fingerprint=None, now=NOW)


def test_identity_key_of_another_silo(authority: Authority, tmp_path: Path) -> None:
    bundle = authority.approve(request(tmp_path / "m", "north"), now=NOW)
    path = tmp_path / "m" / "identity.key"
    path.write_bytes(b"\x01" * 32)
    with refused("manifest-not-member"):
        install_bundle(tmp_path / "m", bundle, fingerprint=None, now=NOW)


def test_installed_authority_never_changes(authority: Authority, tmp_path: Path) -> None:
    made = request(tmp_path / "m", "north")
    bundle = authority.approve(made, now=NOW)
    install_bundle(tmp_path / "m", bundle, fingerprint=None, now=NOW)
    rival = Authority.create(tmp_path / "rival", CONSORTIUM, now=NOW)
    with refused("authority-changed"):
        install_bundle(
            tmp_path / "m",
            rival.approve(made, now=NOW),
            fingerprint=rival.fingerprint,
            now=NOW,
        )
    assert load_credentials(tmp_path / "m", now=NOW, role=Role.SILO)


def test_older_bundle_keeps_the_newer_manifest(authority: Authority, tmp_path: Path) -> None:
    made = request(tmp_path / "m", "north")
    old = authority.approve(made, now=NOW)
    enrol(authority, tmp_path / "south", "south")
    new = authority.approve(made, now=NOW)
    install_bundle(tmp_path / "m", new, fingerprint=None, now=NOW)
    credentials = install_bundle(tmp_path / "m", old, fingerprint=None, now=NOW)
    assert credentials.manifest == new.manifest
    assert load_credentials(tmp_path / "m", now=NOW, role=Role.SILO) == credentials


def test_a_manifest_that_was_changed_on_disk_is_not_replaced_in_silence(
    authority: Authority, tmp_path: Path
) -> None:
    bundle, _ = enrol(authority, tmp_path / "m", "north")
    rival = Authority.create(tmp_path / "rival", CONSORTIUM, now=NOW)
    assert rival.manifest.version < bundle.manifest.manifest.version
    (tmp_path / "m" / "manifest.json").write_bytes(rival.signed_manifest.to_json())
    with refused("manifest-signature"):
        install_bundle(tmp_path / "m", bundle, fingerprint=None, now=NOW)


def test_bundle_with_a_forked_manifest(authority: Authority, tmp_path: Path) -> None:
    bundle, _ = enrol(authority, tmp_path / "m", "north")
    fork = replace(bundle.manifest.manifest, revoked=("1",))
    forked = replace(bundle, manifest=type(bundle.manifest).sign(fork, authority.key_pem))
    with refused("manifest-conflict"):
        install_bundle(tmp_path / "m", forked, fingerprint=None, now=NOW)


def test_installation_interrupted_before_the_manifest(authority: Authority, tmp_path: Path) -> None:
    bundle, _ = enrol(authority, tmp_path / "m", "north")
    (tmp_path / "m" / "manifest.json").unlink()
    (tmp_path / "m" / "certificate.pem").unlink()
    install_bundle(tmp_path / "m", bundle, fingerprint=None, now=NOW)
    assert load_credentials(tmp_path / "m", now=NOW, role=Role.SILO)
