"""HKDF-SHA-256 as wrapped: published vectors, and what exactly stands in the info."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from secagg.crypto import kdf
from secagg.crypto.kdf import derive
from secagg.crypto.secret import Secret


@pytest.fixture
def info(monkeypatch: pytest.MonkeyPatch) -> Callable[[bytes], None]:
    """Make the next derivation use exactly this info."""

    def use(value: bytes) -> None:
        monkeypatch.setattr(kdf, "enc", lambda *_: value)

    return use


def okm(ikm: bytes, salt: bytes, size: int) -> bytes:
    return derive(Secret(ikm), salt=salt, label="", parties=(), size=size).reveal()


@pytest.mark.parametrize(
    ("name", "count"), [("KDF/rfc-5869-HKDF-SHA256.txt", 3), ("KDF/hkdf-generated.txt", 1)]
)
def test_rfc_5869_appendix_a(
    info: Callable[[bytes], None], name: str, count: int, vectors: Any
) -> None:
    records = list(vectors.nist(name))
    assert len(records) == count
    for record in records:
        assert record["hash"] == "SHA-256"
        ikm, salt, context, expected = vectors.hexes(record, "ikm", "salt", "info", "okm")
        info(context)
        assert okm(ikm, salt, int(record["l"])) == expected


def test_wycheproof(info: Callable[[bytes], None], vectors: Any) -> None:
    seen = {"valid": 0, "invalid": 0}
    for _, test in vectors.wycheproof("Protocol/wycheproof/hkdf_sha256_test.json"):
        ikm, salt, context, expected = vectors.hexes(test, "ikm", "salt", "info", "okm")
        info(context)
        if test["result"] == "valid":
            assert okm(ikm, salt, test["size"]) == expected, test["tcId"]
        else:
            with pytest.raises(ValueError, match="larger than 8160"):
                okm(ikm, salt, test["size"])
        seen[test["result"]] += 1
    assert seen == {"valid": 83, "invalid": 3}


def slow_hkdf(ikm: bytes, salt: bytes, context: bytes, size: int) -> bytes:
    """RFC 5869 sections 2.2 and 2.3."""
    prk = hmac.new(salt, ikm, hashlib.sha256).digest()
    out, block = b"", b""
    for i in range(1, -(-size // 32) + 1):
        block = hmac.new(prk, block + context + bytes([i]), hashlib.sha256).digest()
        out += block
    return out[:size]


NAME = st.text(st.characters(codec="utf-8"), max_size=8)


@given(
    st.binary(min_size=1, max_size=64),
    st.binary(min_size=1, max_size=64),
    NAME,
    st.lists(NAME, max_size=3).map(tuple),
    st.integers(1, 100),
)
@settings(deadline=None)
def test_the_info_is_the_framed_label_and_parties(
    ikm: bytes, salt: bytes, label: str, parties: tuple[str, ...], size: int
) -> None:
    items = [label.encode(), *(party.encode() for party in parties)]
    framed = len(items).to_bytes(4, "big")
    for item in items:
        framed += len(item).to_bytes(8, "big") + item
    key = derive(Secret(ikm), salt=salt, label=label, parties=parties, size=size)
    assert isinstance(key, Secret)
    assert key.reveal() == slow_hkdf(ikm, salt, framed, size)


def test_every_input_changes_the_key() -> None:
    def key(secret: bytes = b"s", salt: bytes = b"t", label: str = "pair", *parties: str) -> bytes:
        return derive(
            Secret(secret), salt=salt, label=label, parties=parties or ("a", "b"), size=32
        ).reveal()

    keys = [
        key(),
        key(b"S"),
        key(b"s", b"T"),
        key(b"s", b"t", "channel"),
        key(b"s", b"t", "pair", "b", "a"),
        key(b"s", b"t", "pair", "ab"),
        key(b"s", b"t", "pair", "a", "b", ""),
        key(b"s", b"t", "pair", "", "ab"),
    ]
    assert len(set(keys)) == len(keys)


@pytest.mark.parametrize("size", [1, 8160])
def test_the_documented_sizes(size: int) -> None:
    assert len(derive(Secret(b"s"), salt=b"t", label="l", parties=(), size=size)) == size


@pytest.mark.parametrize("size", [8161, 2**20])
def test_bad_sizes(size: int) -> None:
    with pytest.raises(ValueError, match="larger than 8160"):
        derive(Secret(b"s"), salt=b"t", label="l", parties=(), size=size)
