"""Ed25519 as wrapped: published vectors, and what exactly is under a signature."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import cryptography_vectors
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from secagg.crypto import labels, sign
from secagg.crypto.secret import Secret
from secagg.crypto.sign import KEY_BYTES, SIGNATURE_BYTES, IdentityKey, verify
from secagg.errors import MalformedMessage

L = 2**252 + 27742317777372353535851937790883648493
KEY = IdentityKey.from_private(Secret(bytes(range(32))))


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> Callable[[bytes], None]:
    """Make the next signature one over exactly these bytes."""

    def under(message: bytes) -> None:
        monkeypatch.setattr(sign, "_signed_bytes", lambda *_: message)

    return under


def test_rfc_8032_and_the_reference_implementation_s_vectors(
    bare: Callable[[bytes], None],
) -> None:
    with cryptography_vectors.open_vector_file("asymmetric/Ed25519/sign.input", "r") as file:
        lines = file.read().splitlines()
    assert len(lines) == 1024
    for line in lines:  # seed ‖ public : public : message : signature ‖ message
        both, public, message, signed, _ = (bytes.fromhex(part) for part in line.split(":"))
        bare(message)
        key = IdentityKey.from_private(Secret(both[:32]))
        assert key.public == public == both[32:]
        assert key.sign("", b"", b"") == signed[:64]
        verify(public, "", b"", b"", signed[:64])


def test_rfc_8032_section_7_1_is_among_them(bare: Callable[[bytes], None]) -> None:
    bare(b"\x72")  # TEST 2
    key = IdentityKey.from_private(
        Secret(bytes.fromhex("4ccd089b28ff96da9db6c346ec114e0f5b8a319f35aba624da8cf6ed4fb8a6fb"))
    )
    assert key.sign("", b"", b"").hex() == (
        "92a009a9f0d4cab8720e820b5f642540a2b27b5416503f8fb3762223ebdb69da"
        "085ac1e43e15996e458f3613d0f11d8c387b2eaeb4302aeeb00d291612bb0c00"
    )


def test_wycheproof(bare: Callable[[bytes], None], vectors: Any) -> None:
    """Valid ones verify, invalid ones don't; "acceptable" ones (keys with torsion) may do either.

    Identity keys are certified by the consortium's authority, so a key with torsion harms none but
    the member that enrolled it.
    """
    seen = {"valid": 0, "invalid": 0, "acceptable": 0}
    for group, test in vectors.wycheproof("Signature/wycheproof/ed25519_test.json"):
        public, signature = bytes.fromhex(group["publicKey"]["pk"]), bytes.fromhex(test["sig"])
        bare(bytes.fromhex(test["msg"]))
        try:
            verify(public, "", b"", b"", signature)
            verdict = "valid"
        except MalformedMessage:
            verdict = "invalid"
        assert test["result"] in (verdict, "acceptable"), test["tcId"]
        seen[test["result"]] += 1
    assert seen == {"valid": 117, "invalid": 64, "acceptable": 29}


@given(st.sampled_from(["consistency", "share-keys", ""]), st.binary(), st.binary())
@settings(deadline=None)
def test_what_is_signed_is_the_type_the_transcript_and_the_body_s_hash(
    kind: str, transcript: bytes, body: bytes
) -> None:
    def framed(*items: bytes) -> bytes:
        return len(items).to_bytes(4, "big") + b"".join(
            len(item).to_bytes(8, "big") + item for item in items
        )

    inner = hashlib.sha256(framed(b"secagg/1/body", body)).digest()
    expected = framed(b"secagg/1/sig/" + kind.encode(), transcript, inner)
    assert sign._signed_bytes(kind, transcript, body) == expected
    signature = KEY.sign(kind, transcript, body)
    assert len(signature) == SIGNATURE_BYTES
    verify(KEY.public, kind, transcript, body, signature)


SIGNED = KEY.sign("consistency", b"t", b"b")


def _next(signature: bytes, by: int) -> bytes:
    s = int.from_bytes(signature[32:], "little") + by
    return signature[:32] + s.to_bytes(32, "little")


@pytest.mark.parametrize(
    ("public", "kind", "transcript", "body", "signature"),
    [
        pytest.param(KEY.public, "unmasking", b"t", b"b", SIGNED, id="other type"),
        pytest.param(KEY.public, "consistency", b"u", b"b", SIGNED, id="other transcript"),
        pytest.param(KEY.public, "consistency", b"t", b"c", SIGNED, id="other body"),
        pytest.param(KEY.public, "consistency", b"tb", b"", SIGNED, id="moved boundary"),
        pytest.param(KEY.public, "consistency", b"t", b"b", SIGNED[:63], id="short"),
        pytest.param(KEY.public, "consistency", b"t", b"b", SIGNED + b"\0", id="long"),
        pytest.param(KEY.public, "consistency", b"t", b"b", b"", id="empty"),
        pytest.param(KEY.public, "consistency", b"t", b"b", _next(SIGNED, L), id="s + L"),
        pytest.param(KEY.public, "consistency", b"t", b"b", _next(SIGNED, 1), id="s + 1"),
        pytest.param(KEY.public[:31], "consistency", b"t", b"b", SIGNED, id="short key"),
        pytest.param(b"", "consistency", b"t", b"b", SIGNED, id="no key"),
        pytest.param(bytes([2]) + bytes(31), "consistency", b"t", b"b", SIGNED, id="not a point"),
        pytest.param(
            IdentityKey.from_private(Secret(bytes(32))).public,
            "consistency",
            b"t",
            b"b",
            SIGNED,
            id="other key",
        ),
    ],
)
def test_bad_signatures(
    public: bytes, kind: str, transcript: bytes, body: bytes, signature: bytes
) -> None:
    verify(KEY.public, "consistency", b"t", b"b", SIGNED)
    with pytest.raises(MalformedMessage) as refused:
        verify(public, kind, transcript, body, signature)
    assert refused.value.code == "signature"
    assert kind in refused.value.observed


@given(st.integers(0, 8 * SIGNATURE_BYTES - 1))
@settings(deadline=None)
def test_no_bit_of_a_signature_can_change(bit: int) -> None:
    altered = bytearray(SIGNED)
    altered[bit // 8] ^= 1 << bit % 8
    with pytest.raises(MalformedMessage):
        verify(KEY.public, "consistency", b"t", b"b", bytes(altered))


def test_a_signature_is_never_good_for_another_type() -> None:
    kinds = [value for name, value in vars(labels).items() if name.startswith("SIGN_")]
    for kind in kinds:
        signature = KEY.sign(kind, b"t", b"b")
        for other in kinds:
            if other == kind:
                verify(KEY.public, other, b"t", b"b", signature)
            else:
                with pytest.raises(MalformedMessage):
                    verify(KEY.public, other, b"t", b"b", signature)


def test_a_fresh_key_takes_32_bytes_once_and_never_prints_them() -> None:
    asked: list[int] = []

    def entropy(size: int) -> bytes:
        asked.append(size)
        return bytes(range(size))

    key = IdentityKey.generate(entropy)
    assert asked == [KEY_BYTES]
    assert key == KEY
    assert repr(key) == f"IdentityKey(private=Secret(<32 bytes>), public={key.public!r})"
