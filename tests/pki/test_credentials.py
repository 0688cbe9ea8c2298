from __future__ import annotations

import copy
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from secagg.crypto.secret import Secret
from secagg.pki.authority import Authority
from secagg.pki.certificates import authority_certificate
from secagg.pki.credentials import Credentials, installed_role, load_credentials, save_manifest
from secagg.pki.enrolment import install_bundle, renewal_request
from secagg.pki.keys import load_key
from secagg.pki.manifest import SignedManifest
from secagg.pki.names import Role

from .builders import CONSORTIUM, NOW, certificate, enrol, refused, request, uri


@pytest.fixture
def directory(authority: Authority, tmp_path: Path) -> Path:
    enrol(authority, tmp_path / "m", "north")
    return tmp_path / "m"


def load(directory: Path, role: Role = Role.SILO) -> Credentials:
    return load_credentials(directory, now=NOW, role=role)


def test_load(authority: Authority, directory: Path) -> None:
    credentials = load(directory)
    assert credentials.identity.uri == f"secagg://{CONSORTIUM}/silo/north"
    assert credentials.identity_key is not None
    assert credentials.authority_pem == authority.certificate_pem
    assert credentials.not_after == NOW + timedelta(days=397)
    assert credentials.directory == directory
    assert installed_role(directory) is Role.SILO
    load_key(credentials.tls_key_pem)


def test_secrets_stay_out_of_sight(directory: Path) -> None:
    credentials = load(directory)
    assert isinstance(credentials.tls_key_pem, Secret)
    assert "PRIVATE" not in repr(credentials)
    with pytest.raises(TypeError):
        copy.deepcopy(credentials)


def test_admin_has_no_identity_key(authority: Authority, tmp_path: Path) -> None:
    enrol(authority, tmp_path / "ann", "ann", Role.ADMIN)
    assert load(tmp_path / "ann", Role.ADMIN).identity_key is None


@pytest.mark.parametrize("role", [Role.COORDINATOR, Role.ADMIN])
def test_wrong_role(directory: Path, role: Role) -> None:
    with refused("certificate-role"):
        load(directory, role)


@pytest.mark.parametrize("file", ["tls.key", "identity.key"])
def test_keys_open_to_others(directory: Path, file: str) -> None:
    (directory / file).chmod(0o644)
    with refused("file-permissions"):
        load(directory)


@pytest.mark.parametrize(
    "file", ["tls.key", "identity.key", "authority.pem", "certificate.pem", "manifest.json"]
)
def test_missing_linked_or_writable_file(directory: Path, tmp_path: Path, file: str) -> None:
    path = directory / file
    path.chmod(0o620)
    with refused("file-permissions"):
        load(directory)
    path.chmod(0o600)
    path.rename(tmp_path / "moved")
    path.symlink_to(tmp_path / "moved")
    with refused("file-permissions"):
        load(directory)
    path.unlink()
    with refused("file-missing"):
        load(directory)


def test_open_directory(directory: Path) -> None:
    directory.chmod(0o755)
    with refused("file-permissions"):
        load(directory)


def test_expiry_and_clock_skew(directory: Path) -> None:
    late, early = NOW + timedelta(days=398), NOW - timedelta(minutes=6)
    credentials = load(directory)
    credentials.check_validity(NOW)
    for now, code in ((late, "certificate-expired"), (early, "certificate-not-yet-valid")):
        with refused(code):
            load_credentials(directory, now=now, role=Role.SILO)
        with refused(code):
            credentials.check_validity(now)
    with pytest.raises(Exception, match="clock skew"):
        credentials.check_validity(early)


def test_end_of_the_authority(authority: Authority, tmp_path: Path) -> None:
    bundle, _ = enrol(authority, tmp_path / "m", "north")
    short = authority_certificate(
        CONSORTIUM, authority.key_pem, now=NOW - timedelta(days=3653 - 10)
    )
    (tmp_path / "m" / "authority.pem").write_bytes(short)
    assert load(tmp_path / "m")
    with refused("authority-expired"):
        load_credentials(tmp_path / "m", now=NOW + timedelta(days=11), role=Role.SILO)
    future = authority_certificate(CONSORTIUM, authority.key_pem, now=NOW + timedelta(days=1))
    (tmp_path / "m" / "authority.pem").write_bytes(future)
    with refused("authority-not-yet-valid"):
        load(tmp_path / "m")
    assert bundle


def test_certificate_of_another_chain(
    authority: Authority, directory: Path, tmp_path: Path
) -> None:
    tls = load_key(Secret((directory / "tls.key").read_bytes()))
    own = f"secagg://{CONSORTIUM}/silo/north"
    (directory / "certificate.pem").write_bytes(certificate(uri(own), key=tls))
    with refused("certificate-chain"):
        load(directory)
    rival = Authority.create(tmp_path / "rival", CONSORTIUM, now=NOW)
    made = renewal_request(directory, Role.SILO, "north", CONSORTIUM)
    (directory / "certificate.pem").write_bytes(rival.approve(made, now=NOW).certificate_pem)
    with refused("certificate-chain"):
        load(directory)
    (directory / "authority.pem").write_bytes(rival.certificate_pem)
    with refused("manifest-signature"):
        load(directory)
    assert authority


def test_certificate_as_authority(directory: Path) -> None:
    leaf = (directory / "certificate.pem").read_bytes()
    (directory / "authority.pem").write_bytes(leaf)
    with refused("authority-malformed"):
        load(directory)


def test_key_of_another_certificate(authority: Authority, directory: Path, tmp_path: Path) -> None:
    enrol(authority, tmp_path / "south", "south")
    (directory / "tls.key").write_bytes((tmp_path / "south" / "tls.key").read_bytes())
    with refused("certificate-key"):
        load(directory)


def _pem(key: ec.EllipticCurvePrivateKey, password: bytes | None) -> bytes:
    encryption = serialization.BestAvailableEncryption(password) if password else None
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        encryption or serialization.NoEncryption(),
    )


@pytest.mark.parametrize(
    "pem",
    [
        b"",
        b"-----BEGIN PRIVATE KEY-----",
        _pem(ec.generate_private_key(ec.SECP384R1()), None),
        _pem(ec.generate_private_key(ec.SECP256R1()), b"password"),
    ],
)
def test_malformed_tls_key(directory: Path, pem: bytes) -> None:
    (directory / "tls.key").write_bytes(pem)
    with refused("key-malformed"):
        load(directory)


@pytest.mark.parametrize("size", [0, 31, 33])
def test_malformed_identity_key(directory: Path, size: int) -> None:
    (directory / "identity.key").write_bytes(bytes(size))
    with refused("key-malformed"):
        load(directory)


def test_identity_key_that_is_not_listed(directory: Path) -> None:
    (directory / "identity.key").write_bytes(bytes(32))
    with refused("manifest-not-member"):
        load(directory)


def test_manifest_is_kept_and_never_goes_back(authority: Authority, directory: Path) -> None:
    old = authority.signed_manifest
    enrol(authority, directory.parent / "south", "south")
    new = authority.signed_manifest
    assert save_manifest(directory, new) == new
    assert load(directory).manifest == new
    assert save_manifest(directory, new) == new
    with refused("manifest-older"):
        save_manifest(directory, old)
    fork = SignedManifest.sign(replace(new.manifest, revoked=("1",)), authority.key_pem)
    with refused("manifest-conflict"):
        save_manifest(directory, fork)
    forged = replace(new, manifest=replace(new.manifest, version=99))
    with refused("manifest-signature"):
        save_manifest(directory, forged)
    assert load(directory).manifest == new


def test_manifest_on_disk_that_was_changed(directory: Path, authority: Authority) -> None:
    path = directory / "manifest.json"
    path.write_bytes(path.read_bytes().replace(b'"version": 2', b'"version": 1'))
    with refused("manifest-signature"):
        load(directory)
    with refused("manifest-signature"):
        save_manifest(directory, authority.signed_manifest)


def test_revoked_member(authority: Authority, directory: Path) -> None:
    authority.revoke(Role.SILO, "north", now=NOW)
    save_manifest(directory, authority.signed_manifest)
    with refused("manifest-not-member"):
        load(directory)


def test_revoked_admin(authority: Authority, tmp_path: Path) -> None:
    enrol(authority, tmp_path / "ann", "ann", Role.ADMIN)
    authority.revoke(Role.ADMIN, "ann", now=NOW)
    save_manifest(tmp_path / "ann", authority.signed_manifest)
    with refused("certificate-revoked"):
        load(tmp_path / "ann", Role.ADMIN)


def test_renewal_is_seen_by_the_next_load(authority: Authority, directory: Path) -> None:
    before = load(directory)
    later = NOW + timedelta(days=390)
    made = renewal_request(directory, Role.SILO, "north", CONSORTIUM)
    install_bundle(directory, authority.approve(made, now=later), fingerprint=None, now=later)
    after = load_credentials(directory, now=later, role=Role.SILO)
    assert after.not_after > before.not_after
    assert after.identity_key == before.identity_key
    assert after.tls_key_pem == before.tls_key_pem


def test_new_keys_in_a_new_directory(authority: Authority, directory: Path) -> None:
    made = request(directory.parent / "new", "north")
    bundle = authority.approve(made, now=NOW)
    with refused("certificate-key"):
        install_bundle(directory, bundle, fingerprint=None, now=NOW)
    install_bundle(directory.parent / "new", bundle, fingerprint=None, now=NOW)
    assert load(directory.parent / "new")
    save_manifest(directory, bundle.manifest)
    with refused("manifest-not-member"):
        load(directory)
