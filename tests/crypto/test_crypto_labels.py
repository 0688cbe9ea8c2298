"""The transcript's encoding is injective, its labels are distinct, its hashes are known."""

from __future__ import annotations

import hashlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from secagg.crypto import labels
from secagg.crypto.labels import digest, enc, u32, u64

ITEMS = st.lists(st.binary(max_size=20), max_size=6)
CONSTANTS = {
    name: text for name, text in vars(labels).items() if name.isupper() and isinstance(text, str)
}
SIGNED = {name for name in CONSTANTS if name.startswith("SIGN_")}
KEYS = {"CHANNEL_KEY", "PAIR_STREAM", "SELF_STREAM"}
CONTEXTS = {"VECTOR"}
HASHED = set(CONSTANTS) - SIGNED - KEYS - CONTEXTS


def decode(data: bytes) -> list[bytes]:
    """Read a list back, by the rule u32be(n) ‖ Σ u64be(len) ‖ item, to the last byte."""
    count, at, items = int.from_bytes(data[:4], "big"), 4, []
    for _ in range(count):
        size = int.from_bytes(data[at : at + 8], "big")
        items.append(data[at + 8 : at + 8 + size])
        assert len(items[-1]) == size
        at += 8 + size
    assert at == len(data)
    return items


@given(ITEMS)
@settings(deadline=None)
def test_a_list_is_read_back_from_its_encoding(items: list[bytes]) -> None:
    """A left inverse exists, so the encoding is injective."""
    assert decode(enc(*items)) == items


@given(ITEMS, ITEMS)
@settings(deadline=None)
def test_two_lists_never_encode_alike(a: list[bytes], b: list[bytes]) -> None:
    assert (enc(*a) == enc(*b)) == (a == b)


@given(ITEMS, st.data())
@settings(deadline=None)
def test_moving_a_boundary_changes_the_encoding(items: list[bytes], data: st.DataObject) -> None:
    """The attack on plain concatenation: same bytes, cut elsewhere."""
    whole = b"".join(items)
    cut = data.draw(st.integers(0, len(whole)))
    other = [whole[:cut], whole[cut:]]
    assert (enc(*other) == enc(*items)) == (other == items)
    assert enc(*items, b"") != enc(*items)
    assert enc(enc(*items)) != enc(*items)


@given(ITEMS, ITEMS)
@settings(deadline=None)
def test_no_encoding_is_a_prefix_of_another(a: list[bytes], b: list[bytes]) -> None:
    assert a == b or not enc(*b).startswith(enc(*a))


def test_the_encoding_byte_for_byte() -> None:
    assert enc() == bytes(4)
    assert enc(b"") == bytes.fromhex("00000001 0000000000000000")
    assert enc(b"ab", b"c") == bytes.fromhex("00000002 0000000000000002 6162 0000000000000001 63")


@pytest.mark.parametrize("use", [SIGNED, KEYS, CONTEXTS, HASHED], ids=["sign", "hkdf", "b3", "h"])
def test_labels_are_distinct_within_their_use(use: set[str]) -> None:
    assert use
    texts = [CONSTANTS[name] for name in use]
    assert len(set(texts)) == len(texts)
    assert all(text and text.isascii() for text in texts)


def test_no_use_s_label_can_be_read_as_another_s() -> None:
    """Signatures and hashes share a prefix: no hash label starts as a signature's does."""
    assert not any(CONSTANTS[name].startswith("sig/") for name in HASHED)
    assert CONSTANTS["VECTOR"] == "secagg/1/vector"
    assert labels.PREFIX == b"secagg/1/"


@pytest.mark.parametrize("name", sorted(HASHED))
def test_digest_of_every_label(name: str) -> None:
    label = b"secagg/1/" + CONSTANTS[name].encode()
    framed = b"".join(
        [
            (3).to_bytes(4, "big"),
            len(label).to_bytes(8, "big") + label,
            (2).to_bytes(8, "big") + b"xy",
            (0).to_bytes(8, "big"),
        ]
    )
    assert digest(CONSTANTS[name], b"xy", b"") == hashlib.sha256(framed).digest()


def test_one_digest_is_pinned() -> None:
    """So that a change of the framing or prefix is seen, even if made in both places."""
    by_hand = bytes.fromhex(
        "00000002"  # two items
        "000000000000000d" + b"secagg/1/body".hex() + "0000000000000003" + b"abc".hex()
    )
    assert digest(labels.BODY, b"abc") == hashlib.sha256(by_hand).digest()
    assert (
        digest(labels.BODY, b"abc").hex()
        == "3de0039245ba34899144c5804ea544a782c13e3602788b17f35785c29366f084"
    )


@given(st.integers(0, 2**32 - 1), st.integers(0, 2**64 - 1))
@settings(deadline=None)
def test_numbers_are_fixed_width_and_big_endian(a: int, b: int) -> None:
    assert u32(a).hex() == f"{a:08x}"
    assert u64(b).hex() == f"{b:016x}"


def test_bad_numbers_never_wrap() -> None:
    for number, width in ((u32, 32), (u64, 64)):
        for value in (-1, 2**width):
            with pytest.raises(OverflowError):
                number(value)
