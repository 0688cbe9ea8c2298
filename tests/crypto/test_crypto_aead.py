"""AES-256-GCM as wrapped: published vectors, a zero nonce, and nothing altered opens.

Long messages are cut into segments of eight bytes here, but for one test of the real size.
"""

from __future__ import annotations

from typing import Any

import pytest
from Crypto.Cipher import AES
from hypothesis import given, settings
from hypothesis import strategies as st

from secagg.crypto import aead
from secagg.crypto.aead import (
    KEY_BYTES,
    SEGMENT_BYTES,
    TAG_BYTES,
    open_long,
    open_once,
    seal_long,
    seal_once,
)
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


@pytest.fixture
def short_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aead, "SEGMENT_BYTES", 8)


def refused_long(key: Secret, box: bytes | bytearray, associated: bytes) -> bool:
    with pytest.raises(MalformedMessage) as error:
        open_long(key, box, associated)
    return error.value.code == "box-authentication"


def segments(box: bytes | bytearray) -> list[bytes]:
    return [bytes(box[at : at + 8 + TAG_BYTES]) for at in range(0, len(box), 8 + TAG_BYTES)]


def slow_twin(key: bytes, plain: bytes, aad: bytes) -> bytes:
    """STREAM, spelt out segment by segment with another library."""
    cut = [plain[at : at + 8] for at in range(0, len(plain), 8)] or [b""]
    box = b""
    for number, segment in enumerate(cut, 1):
        flag = b"\1" if number == len(cut) else b"\0"
        theirs = AES.new(key, AES.MODE_GCM, nonce=bytes(3) + number.to_bytes(8, "big") + flag)
        theirs.update(aad)
        box += b"".join(theirs.encrypt_and_digest(segment))
    return box


@given(st.binary(min_size=32, max_size=32), st.binary(max_size=50), st.binary(max_size=20))
@settings(deadline=None)
def test_a_long_box_is_stream(key: bytes, plain: bytes, aad: bytes) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(aead, "SEGMENT_BYTES", 8)
        box = seal_long(Secret(key), plain, aad)
        assert box == slow_twin(key, plain, aad)
        assert len(box) == len(plain) + TAG_BYTES * max(1, -(-len(plain) // 8))
        for given_as in (bytes(box), box, memoryview(box)):
            assert open_long(Secret(key), given_as, aad) == plain


@pytest.mark.parametrize("size", [0, SEGMENT_BYTES - 1, SEGMENT_BYTES, SEGMENT_BYTES + 1])
def test_segments_are_of_one_mebibyte(size: int) -> None:
    plain = bytes(range(256)) * (size // 256) + bytes(size % 256)
    box = seal_long(KEY, plain, b"a")
    assert SEGMENT_BYTES == 2**20
    assert len(box) == size + TAG_BYTES * (2 if size > SEGMENT_BYTES else 1)
    assert open_long(KEY, box, b"a") == plain


@pytest.mark.usefixtures("short_segments")
def test_segments_cannot_be_dropped_swapped_repeated_or_added() -> None:
    one, two, three = segments(seal_long(KEY, b"segment1segment2end", b"a"))
    assert open_long(KEY, one + two + three, b"a") == b"segment1segment2end"
    other = segments(seal_long(KEY, b"segment1segment2segment3end", b"a"))
    alone = seal_long(KEY, b"segment1", b"a")
    for box in (
        b"",
        one,
        one + two,
        one + two + three[:-1],
        two + three,
        three,
        one + three,
        two + one + three,
        one + one + three,
        one + two + two + three,
        one + two + three + b"\0",
        one + two + three + three,
        one + two + three + bytes(TAG_BYTES),
        one + two + other[2] + three,
        bytes(alone) + two + three,
        bytes(alone) + bytes(alone),
    ):
        assert refused_long(KEY, box, b"a")


@pytest.mark.usefixtures("short_segments")
def test_a_long_message_cut_at_a_segment_does_not_open() -> None:
    box = seal_long(KEY, b"segment1segment2", b"a")
    assert refused_long(KEY, box[: 8 + TAG_BYTES], b"a")
    # Nor does a last segment of nothing end it: the real one says that it is the last.
    assert refused_long(KEY, box + seal_long(KEY, b"", b"a"), b"a")


@pytest.mark.usefixtures("short_segments")
def test_no_segment_has_the_nonce_of_a_short_message() -> None:
    first = segments(seal_long(KEY, b"segment1end", b""))[0]
    assert first != seal_once(KEY, b"segment1", b"")
    assert bytes(seal_long(KEY, b"segment1", b"")) != seal_once(KEY, b"segment1", b"")


@given(st.binary(max_size=40), st.data())
@settings(deadline=None)
def test_nothing_altered_opens_in_a_long_box(plain: bytes, data: st.DataObject) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(aead, "SEGMENT_BYTES", 8)
        box = seal_long(KEY, plain, b"a")
        altered = bytearray(box)
        altered[data.draw(st.integers(0, len(box) - 1))] ^= data.draw(st.integers(1, 255))
        assert refused_long(KEY, altered, b"a")
        assert refused_long(KEY, box, b"b")
        assert refused_long(Secret(bytes(KEY_BYTES)), box, b"a")


@given(st.binary(max_size=100))
@settings(deadline=None)
def test_any_long_bytes_are_refused_and_never_another_error(box: bytes) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(aead, "SEGMENT_BYTES", 8)
        assert refused_long(KEY, box, b"")
