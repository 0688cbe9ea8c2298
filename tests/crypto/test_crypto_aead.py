"""AES-256-GCM as wrapped: published vectors, a zero nonce, and nothing altered opens."""

from __future__ import annotations

from typing import Any

import pytest
from Crypto.Cipher import AES
from hypothesis import given, settings
from hypothesis import strategies as st

from secagg.crypto import aead
from secagg.crypto.aead import KEY_BYTES, TAG_BYTES, open_once, seal_once
from secagg.crypto.secret import Secret
from secagg.errors import MalformedMessage

KEY = Secret(bytes(range(KEY_BYTES)))


def refused(key: Secret, box: bytes, associated: bytes) -> bool:
    with pytest.raises(MalformedMessage) as error:
        open_once(key, box, associated)
    return error.value.code == "box-authentication"


def test_nist_cavs_encrypt(monkeypatch: pytest.MonkeyPatch, vectors: Any) -> None:
    """Every vector with our key, nonce and tag sizes; none has the zero nonce."""
    count = 0
    for record in vectors.nist("ciphers/AES/GCM/gcmEncryptExtIV256.rsp"):
        if (record["ivlen"], record["taglen"]) != ("96", "128"):
            continue
        key, iv, plain, aad, cipher, tag = vectors.hexes(
            record, "key", "iv", "pt", "aad", "ct", "tag"
        )
        monkeypatch.setattr(aead, "_ONCE", iv)
        assert seal_once(Secret(key), plain, aad) == cipher + tag
        assert open_once(Secret(key), cipher + tag, aad) == plain
        count += 1
    assert count == 375


def test_nist_cavs_decrypt(monkeypatch: pytest.MonkeyPatch, vectors: Any) -> None:
    seen = {"opens": 0, "refused": 0}
    for record in vectors.nist("ciphers/AES/GCM/gcmDecrypt256.rsp"):
        if (record["ivlen"], record["taglen"]) != ("96", "128"):
            continue
        key, iv, aad, cipher, tag = vectors.hexes(record, "key", "iv", "aad", "ct", "tag")
        monkeypatch.setattr(aead, "_ONCE", iv)
        if "fail" in record:
            assert refused(Secret(key), cipher + tag, aad)
            seen["refused"] += 1
        else:
            assert open_once(Secret(key), cipher + tag, aad) == bytes.fromhex(record["pt"])
            seen["opens"] += 1
    assert sum(seen.values()) == 375
    assert min(seen.values()) > 100


def test_wycheproof(monkeypatch: pytest.MonkeyPatch, vectors: Any) -> None:
    seen = {"valid": 0, "invalid": 0, "zero nonce": 0}
    for group, test in vectors.wycheproof("Cipher/wycheproof/aes_gcm_test.json"):
        if (group["keySize"], group["ivSize"], group["tagSize"]) != (256, 96, 128):
            continue
        key, iv, aad, plain, cipher, tag = vectors.hexes(
            test, "key", "iv", "aad", "msg", "ct", "tag"
        )
        with monkeypatch.context() as patch:
            if iv == bytes(12):
                seen["zero nonce"] += 1  # the wrapper itself, nothing patched
            else:
                patch.setattr(aead, "_ONCE", iv)
            if test["result"] == "valid":
                assert seal_once(Secret(key), plain, aad) == cipher + tag, test["tcId"]
                assert open_once(Secret(key), cipher + tag, aad) == plain
            else:
                assert refused(Secret(key), cipher + tag, aad)
        seen[test["result"]] += 1
    assert seen == {"valid": 39, "invalid": 27, "zero nonce": 1}


@given(st.binary(min_size=32, max_size=32), st.binary(max_size=200), st.binary(max_size=50))
@settings(deadline=None)
def test_a_box_is_gcm_under_the_zero_nonce(key: bytes, plain: bytes, aad: bytes) -> None:
    theirs = AES.new(key, AES.MODE_GCM, nonce=bytes(12))
    theirs.update(aad)
    cipher, tag = theirs.encrypt_and_digest(plain)
    box = seal_once(Secret(key), plain, aad)
    assert box == cipher + tag
    assert len(box) == len(plain) + TAG_BYTES
    assert open_once(Secret(key), box, aad) == plain


@given(st.binary(max_size=40), st.data())
@settings(deadline=None)
def test_nothing_altered_opens(plain: bytes, data: st.DataObject) -> None:
    box = seal_once(KEY, plain, b"a to b")
    altered = bytearray(box)
    altered[data.draw(st.integers(0, len(box) - 1))] ^= data.draw(st.integers(1, 255))
    assert refused(KEY, bytes(altered), b"a to b")
    assert refused(KEY, box[:-1], b"a to b")
    assert refused(KEY, box + b"\0", b"a to b")
    assert refused(KEY, box, b"b to a")
    assert refused(KEY, box, b"")
    assert refused(Secret(bytes(KEY_BYTES)), box, b"a to b")


@given(st.binary(max_size=40))
@settings(deadline=None)
def test_any_bytes_are_refused_and_never_another_error(box: bytes) -> None:
    assert refused(KEY, box, b"")
