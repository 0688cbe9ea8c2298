from __future__ import annotations

import os
import stat
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID

from secagg.config import SiloId
from secagg.pki.authority import Authority
from secagg.pki.certificates import authority_certificate, load_authority
from secagg.pki.enrolment import create_request, renewal_request
from secagg.pki.keys import generate_key
from secagg.pki.manifest import SignedManifest
from secagg.pki.names import Role, load_certificate, peer_identity, serial_hex, server_dns_name

from .builders import CONSORTIUM, NOW, certificate, enrol, refused, request, uri


def test_create(authority: Authority) -> None:
    directory = authority.directory
    modes = {p.name: stat.S_IMODE(p.stat().st_mode) for p in directory.iterdir()}
    assert modes == {
        "authority.key": 0o600,
        "authority.pem": 0o644,
        "issued.json": 0o600,
        "manifest.json": 0o644,
    }
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    manifest = authority.manifest
    assert (manifest.version, manifest.silos, manifest.coordinator) == (1, {}, None)
    assert Authority.load(directory) == authority
    assert "PRIVATE" not in repr(authority)


def test_authority_certificate(authority: Authority) -> None:
    anchor = load_authority(authority.certificate_pem)
    constraints = anchor.extensions.get_extension_for_class(x509.BasicConstraints)
    assert constraints.critical
    assert constraints.value == x509.BasicConstraints(ca=True, path_length=0)
    usage = anchor.extensions.get_extension_for_class(x509.KeyUsage).value
    assert usage.key_cert_sign
    assert not usage.digital_signature
    assert authority.fingerprint.replace(" ", "") == anchor.fingerprint(hashes.SHA256()).hex()
    assert [len(group) for group in authority.fingerprint.split()] == [4] * 16


def test_create_never_overwrites(authority: Authority) -> None:
    with refused("authority-exists"):
        Authority.create(authority.directory, CONSORTIUM, now=NOW)
    assert Authority.load(authority.directory) == authority


def test_bad_consortium(tmp_path: Path) -> None:
    with refused("name"):
        Authority.create(tmp_path / "a", "Hospitals", now=NOW)
    assert not (tmp_path / "a").exists()


def test_load_refuses_parts_that_do_not_fit(authority: Authority, tmp_path: Path) -> None:
    other = Authority.create(tmp_path / "other", "banks", now=NOW)
    for file, code in {
        "authority.key": "authority-key",
        "authority.pem": "authority-key",
        "manifest.json": "manifest-signature",
    }.items():
        path = authority.directory / file
        own = path.read_bytes()
        path.write_bytes((other.directory / file).read_bytes())
        with refused(code):
            Authority.load(authority.directory)
        path.unlink()
        with refused("file-missing"):
            Authority.load(authority.directory)
        path.write_bytes(own)
        path.chmod(0o600)
    (authority.directory / "authority.key").write_bytes(b"x")
    with refused("key-malformed"):
        Authority.load(authority.directory)


def test_a_manifest_that_was_changed_on_disk_is_not_built_upon(
    authority: Authority, tmp_path: Path
) -> None:
    rival = Authority.create(tmp_path / "rival", CONSORTIUM, now=NOW)
    forged = (rival.directory / "manifest.json").read_bytes()
    (authority.directory / "manifest.json").write_bytes(forged)
    with refused("manifest-signature"):
        authority.approve(request(tmp_path / "m", "north"), now=NOW)
    assert (authority.directory / "manifest.json").read_bytes() == forged


def test_load_refuses_a_manifest_of_another_consortium(authority: Authority) -> None:
    pem = authority_certificate("banks", authority.key_pem, now=NOW)
    (authority.directory / "authority.pem").write_bytes(pem)
    with refused("authority-consortium"):
        Authority.load(authority.directory)


def test_load_refuses_an_open_key(authority: Authority) -> None:
    (authority.directory / "authority.key").chmod(0o640)
    with refused("file-permissions"):
        Authority.load(authority.directory)


def test_damaged_log(authority: Authority, tmp_path: Path) -> None:
    (authority.directory / "issued.json").write_bytes(b"{}")
    with refused("log-malformed"):
        authority.approve(request(tmp_path / "m", "north"), now=NOW)


def test_manifest_grows(authority: Authority, tmp_path: Path) -> None:
    names = ["north", "east", "south"]
    keys = {}
    for version, name in enumerate(names, start=2):
        made = request(tmp_path / name, name)
        keys[name] = made.identity_key
        assert authority.approve(made, now=NOW).manifest.manifest.version == version
    hub = request(tmp_path / "hub", "hub", Role.COORDINATOR)
    authority.approve(hub, now=NOW)
    admin = authority.approve(request(tmp_path / "ann", "ann", Role.ADMIN), now=NOW)
    manifest = authority.manifest
    assert list(manifest.silos) == sorted(names)
    assert manifest.silos == keys
    assert manifest.coordinator == hub.identity_key
    assert (manifest.version, manifest.revoked) == (5, ())
    assert admin.manifest == authority.signed_manifest
    assert [entry.name for entry in authority.issued] == [*names, "hub", "ann"]
    assert Authority.load(authority.directory).manifest == manifest


@pytest.mark.parametrize("role", list(Role))
def test_leaf(authority: Authority, tmp_path: Path, role: Role) -> None:
    bundle, credentials = enrol(authority, tmp_path / "m", "north", role)
    leaf = load_certificate(bundle.certificate_pem)
    get = leaf.extensions.get_extension_for_class
    assert get(x509.BasicConstraints).value == x509.BasicConstraints(False, None)
    names = get(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.UniformResourceIdentifier) == [credentials.identity.uri]
    server = role is Role.COORDINATOR
    dns = [server_dns_name(CONSORTIUM)] if server else []
    assert names.get_values_for_type(x509.DNSName) == dns
    assert len(names) == 1 + len(dns)
    oid = ExtendedKeyUsageOID.SERVER_AUTH if server else ExtendedKeyUsageOID.CLIENT_AUTH
    assert list(get(x509.ExtendedKeyUsage).value) == [oid]
    anchor = load_authority(authority.certificate_pem)
    issuer = anchor.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    assert get(x509.AuthorityKeyIdentifier).value.key_identifier == issuer.digest
    assert get(x509.SubjectKeyIdentifier).value
    assert leaf.not_valid_before_utc == NOW - timedelta(minutes=5)
    assert leaf.not_valid_after_utc == NOW + timedelta(days=397)
    assert leaf.serial_number.bit_length() <= 128
    peer = peer_identity(bundle.certificate_pem, consortium=CONSORTIUM, revoked=(), now=NOW)
    assert peer == credentials.identity


def test_longest_names(tmp_path: Path) -> None:
    long = "a" * 63
    authority = Authority.create(tmp_path / "authority", long, now=NOW)
    made = create_request(tmp_path / "m", Role.COORDINATOR, long, long, os.urandom)
    bundle = authority.approve(made, now=NOW)
    assert peer_identity(bundle.certificate_pem, consortium=long, revoked=(), now=NOW)


def test_csr_decides_no_name(authority: Authority, tmp_path: Path) -> None:
    """A certificate takes the key from its request and everything else from the authority."""
    bundle = authority.approve(request(tmp_path / "m", "north"), now=NOW)
    leaf = load_certificate(bundle.certificate_pem)
    assert {a.value for a in leaf.subject} == {CONSORTIUM, "silo", "north"}


@pytest.mark.parametrize("days", [0, -1, 3654, 10**6])
def test_days(authority: Authority, tmp_path: Path, days: int) -> None:
    with refused("days"):
        authority.approve(request(tmp_path / "m", "north"), now=NOW, days=days)
    assert authority.issued == ()


def test_authority_s_own_validity(authority: Authority, tmp_path: Path) -> None:
    made = request(tmp_path / "m", "north")
    with refused("authority-expired"):
        authority.approve(made, now=NOW + timedelta(days=3654))
    with refused("authority-not-yet-valid"):
        authority.approve(made, now=NOW - timedelta(hours=1))
    with refused("authority-expired"):
        authority.revoke(Role.SILO, "north", now=NOW + timedelta(days=3654))


def test_request_of_another_consortium(authority: Authority, tmp_path: Path) -> None:
    made = create_request(tmp_path / "m", Role.SILO, "north", "banks", os.urandom)
    with refused("request-consortium"):
        authority.approve(made, now=NOW)


def test_renewal_with_the_same_keys(authority: Authority, tmp_path: Path) -> None:
    first, _ = enrol(authority, tmp_path / "m", "north")
    again = renewal_request(tmp_path / "m", Role.SILO, "north", CONSORTIUM)
    second = authority.approve(again, now=NOW + timedelta(days=300))
    assert second.manifest == first.manifest
    assert second.certificate_pem != first.certificate_pem
    assert authority.manifest.revoked == ()


@pytest.mark.parametrize("role", list(Role))
def test_renewal_with_new_keys(authority: Authority, tmp_path: Path, role: Role) -> None:
    old_request = request(tmp_path / "old", "north", role)
    old = [authority.approve(old_request, now=NOW) for _ in range(2)]
    serials = {serial_hex(load_certificate(bundle.certificate_pem)) for bundle in old}
    version = authority.manifest.version
    new_request = request(tmp_path / "new", "north", role)
    new = authority.approve(new_request, now=NOW)
    manifest = new.manifest.manifest
    assert manifest.version == version + 1
    assert set(manifest.revoked) == serials
    if role is Role.SILO:
        assert manifest.silos == {SiloId("north"): new_request.identity_key}
    for bundle in old:
        with refused("identity-revoked"):
            peer_identity(
                bundle.certificate_pem, consortium=CONSORTIUM, revoked=manifest.revoked, now=NOW
            )
    # Replaying the old request undoes nothing.
    with refused("request-key"):
        authority.approve(old_request, now=NOW)
    assert authority.manifest == manifest


def test_second_coordinator(authority: Authority, tmp_path: Path) -> None:
    enrol(authority, tmp_path / "hub", "hub", Role.COORDINATOR)
    other = request(tmp_path / "hub2", "hub2", Role.COORDINATOR)
    with refused("coordinator-exists"):
        authority.approve(other, now=NOW)
    assert authority.revoke(Role.COORDINATOR, "hub", now=NOW).coordinator is None
    bundle = authority.approve(other, now=NOW)
    assert bundle.manifest.manifest.coordinator == other.identity_key


def test_key_of_another_member(authority: Authority, tmp_path: Path) -> None:
    enrol(authority, tmp_path / "m", "north")
    with refused("request-key"):
        authority.approve(renewal_request(tmp_path / "m", Role.SILO, "south", CONSORTIUM), now=NOW)
    with refused("request-key"):
        authority.approve(renewal_request(tmp_path / "m", Role.ADMIN, "north", CONSORTIUM), now=NOW)


@pytest.mark.parametrize("file", ["tls.key", "identity.key"])
def test_half_new_keys(authority: Authority, tmp_path: Path, file: str) -> None:
    enrol(authority, tmp_path / "m", "north")
    request(tmp_path / "new", "north")
    (tmp_path / "m" / file).write_bytes((tmp_path / "new" / file).read_bytes())
    half = renewal_request(tmp_path / "m", Role.SILO, "north", CONSORTIUM)
    with refused("request-key"):
        authority.approve(half, now=NOW)


def test_admins_share_no_missing_identity_key(authority: Authority, tmp_path: Path) -> None:
    enrol(authority, tmp_path / "ann", "ann", Role.ADMIN)
    enrol(authority, tmp_path / "bob", "bob", Role.ADMIN)


def test_revoke(authority: Authority, tmp_path: Path) -> None:
    made = request(tmp_path / "m", "north")
    bundles = [authority.approve(made, now=NOW) for _ in range(2)]
    enrol(authority, tmp_path / "south", "south")
    version = authority.manifest.version
    manifest = authority.revoke(Role.SILO, "north", now=NOW)
    assert manifest == authority.manifest
    assert manifest.version == version + 1
    assert list(manifest.silos) == ["south"]
    assert list(manifest.revoked) == sorted(
        serial_hex(load_certificate(bundle.certificate_pem)) for bundle in bundles
    )
    with refused("request-key"):
        authority.approve(made, now=NOW)
    with refused("member-unknown"):
        authority.revoke(Role.SILO, "north", now=NOW)
    # The name is free for new keys.
    enrol(authority, tmp_path / "again", "north")
    assert "north" in authority.manifest.silos


def test_revoke_admin(authority: Authority, tmp_path: Path) -> None:
    enrol(authority, tmp_path / "ann", "ann", Role.ADMIN)
    version = authority.manifest.version
    manifest = authority.revoke(Role.ADMIN, "ann", now=NOW)
    assert (manifest.version, len(manifest.revoked)) == (version + 1, 1)


@pytest.mark.parametrize(
    ("role", "name"), [(Role.SILO, "south"), (Role.ADMIN, "north"), (Role.SILO, "../x")]
)
def test_revoke_nobody(authority: Authority, tmp_path: Path, role: Role, name: str) -> None:
    enrol(authority, tmp_path / "m", "north")
    with refused("member-unknown"):
        authority.revoke(role, name, now=NOW)


def test_crash_between_log_and_manifest(
    authority: Authority, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    enrol(authority, tmp_path / "old", "north")
    made = request(tmp_path / "new", "north")
    with monkeypatch.context() as patch:
        patch.setattr(SignedManifest, "sign", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            authority.approve(made, now=NOW)
    assert len(authority.issued) == 2
    manifest = authority.approve(made, now=NOW).manifest.manifest
    assert manifest.silos == {SiloId("north"): made.identity_key}
    assert manifest.revoked == (authority.issued[0].serial,)


def test_what_is_no_anchor(authority: Authority, tmp_path: Path) -> None:
    bundle = authority.approve(request(tmp_path / "m", "north"), now=NOW)
    leaf_as_ca = certificate(uri("secagg://a/silo/b"), key_cert_sign=True)
    deep = certificate(ca=True, key_cert_sign=True)
    for pem in (bundle.certificate_pem, leaf_as_ca, deep, certificate(ca=None), b"", b"x"):
        with refused("authority-malformed"):
            load_authority(pem)
    assert generate_key() != generate_key()


def test_an_anchor_has_a_key_of_p_256() -> None:
    path = x509.BasicConstraints(ca=True, path_length=0)
    for curve, code in ((ec.SECP256R1(), None), (ec.SECP384R1(), "authority-malformed")):
        key = ec.generate_private_key(curve)
        pem = certificate(ca=None, key_cert_sign=True, key=key, extra=(path,))
        with refused(code) if code else nullcontext():
            load_authority(pem)
