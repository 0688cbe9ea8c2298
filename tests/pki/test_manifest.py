from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec

from secagg.config import SiloId
from secagg.crypto.labels import enc
from secagg.masking.manifest import Manifest
from secagg.pki.authority import Authority
from secagg.pki.certificates import authority_certificate
from secagg.pki.keys import generate_key, load_key
from secagg.pki.manifest import SignedManifest, accept

from .builders import CONSORTIUM, NOW, certificate, refused, uri

MANIFEST = Manifest(
    CONSORTIUM, 7, {SiloId("a"): b"A" * 32, SiloId("b"): b"B" * 32}, b"C" * 32, ("1f", "ab")
)


def sign(authority: Authority, **changes: Any) -> SignedManifest:
    return SignedManifest.sign(replace(MANIFEST, **changes), authority.key_pem)


def test_round_trip(authority: Authority) -> None:
    for coordinator in (None, b"C" * 32):
        signed = sign(authority, coordinator=coordinator)
        again = SignedManifest.from_json(signed.to_json())
        assert again == signed
        assert again.verify(authority.certificate_pem) == signed.manifest


def test_what_is_signed(authority: Authority) -> None:
    key = load_key(authority.key_pem).public_key()
    data = enc(b"secagg/1/sig/manifest", MANIFEST.encode())
    key.verify(sign(authority).signature, data, ec.ECDSA(hashes.SHA256()))


@pytest.mark.parametrize(
    "change",
    [
        {"version": 8},
        {"consortium": "banks"},
        {"silos": {SiloId("a"): b"A" * 32}},
        {"silos": {SiloId("a"): b"A" * 32, SiloId("c"): b"B" * 32}},
        {"silos": {SiloId("a"): b"B" * 32, SiloId("b"): b"A" * 32}},
        {"coordinator": None},
        {"revoked": ("1f",)},
        {"revoked": ()},
    ],
)
def test_signature_covers_everything(authority: Authority, change: dict[str, Any]) -> None:
    signed = sign(authority)
    changed = replace(signed, manifest=replace(signed.manifest, **change))
    with refused("manifest-signature"):
        changed.verify(authority.certificate_pem)


def test_other_authority_of_the_same_name(authority: Authority) -> None:
    other = authority_certificate(CONSORTIUM, generate_key(), now=NOW)
    with refused("manifest-signature"):
        sign(authority).verify(other)


@pytest.mark.parametrize("signature", [b"", b"x" * 70, bytes(70)])
def test_no_signature(authority: Authority, signature: bytes) -> None:
    with refused("manifest-signature"):
        SignedManifest(MANIFEST, signature).verify(authority.certificate_pem)


def test_anchor_must_be_an_authority(authority: Authority) -> None:
    leaf = certificate(uri(f"secagg://{CONSORTIUM}/silo/a"), key=load_key(authority.key_pem))
    for pem in (leaf, b"", authority.certificate_pem * 2):
        with refused("authority-malformed"):
            sign(authority).verify(pem)


def test_newer_is_taken_and_equal_is_kept(authority: Authority) -> None:
    current, anchor = sign(authority), authority.certificate_pem
    newer = sign(authority, version=9)
    assert accept(current, newer, anchor) is newer
    # ECDSA signs with a fresh nonce, so the same manifest has many good signatures.
    assert accept(current, sign(authority), anchor) is current


def test_rollback(authority: Authority) -> None:
    with refused("manifest-older"):
        accept(sign(authority), sign(authority, version=6), authority.certificate_pem)


def test_fork(authority: Authority) -> None:
    with refused("manifest-conflict"):
        accept(sign(authority), sign(authority, revoked=()), authority.certificate_pem)


def test_consortium(authority: Authority) -> None:
    offered = sign(authority, consortium="banks", version=8)
    with refused("manifest-consortium"):
        accept(sign(authority), offered, authority.certificate_pem)


def test_unsigned_offer(authority: Authority) -> None:
    offered = replace(sign(authority), manifest=replace(MANIFEST, version=8))
    with refused("manifest-signature"):
        accept(sign(authority), offered, authority.certificate_pem)


KEY = "41" * 32
BAD_FIELDS: list[dict[str, Any]] = [
    {"version": 0},
    {"version": -1},
    {"version": 2**63},
    {"version": "7"},
    {"version": 7.0},
    {"version": True},
    {"consortium": "Hospitals"},
    {"consortium": None},
    {"silos": {"A": KEY}},
    {"silos": {"a": KEY[:-2]}},
    {"silos": {"a": "zz" * 32}},
    {"silos": {"a": KEY, "b": KEY}},
    {"silos": {"a": None}},
    {"silos": [KEY]},
    {"coordinator": "41" * 32},
    {"coordinator": ""},
    {"revoked": ["ab", "1f"]},
    {"revoked": ["1f", "1f"]},
    {"revoked": ["AB"]},
    {"revoked": ["0ab"]},
    {"revoked": [""]},
    {"revoked": ["ab\n"]},
    {"revoked": [171]},
    {"format": "secagg/2/manifest"},
    {"extra": 1},
    {"signature": "no hex"},
]


@pytest.mark.parametrize("change", BAD_FIELDS, ids=repr)
def test_bad_field(authority: Authority, change: dict[str, Any]) -> None:
    value = json.loads(sign(authority).to_json())
    with refused("manifest-malformed"):
        SignedManifest.from_json(json.dumps({**value, **change}).encode())


def test_missing_field(authority: Authority) -> None:
    value = json.loads(sign(authority).to_json())
    for key in value:
        rest = {k: v for k, v in value.items() if k != key}
        with refused("manifest-malformed"):
            SignedManifest.from_json(json.dumps(rest).encode())


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"null", b"\xff", b"1" * 10, b"[" * 10000])
def test_no_json(data: bytes) -> None:
    with refused("manifest-malformed"):
        SignedManifest.from_json(data)
