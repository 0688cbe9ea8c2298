"""X25519 as wrapped: published vectors, one encoding per key, no low-order points."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from secagg.crypto import keys
from secagg.crypto.keys import KEY_BYTES, KeyPair, parse_public_key
from secagg.crypto.secret import Secret
from secagg.errors import MalformedMessage

P = 2**255 - 19
KEY = st.binary(min_size=32, max_size=32)
LOW_ORDER = [  # every u of order 1, 2, 4 or 8 on the curve and its twist, below p
    0,
    1,
    325606250916557431795983626356110631294008115727848805560023387167927233504,
    39382357235489614581723060781553021112529911719440698176882885853963445705823,
    P - 1,
]


def ladder(scalar: bytes, u: int) -> int:
    """A slow X25519, written from RFC 7748 section 5 alone."""
    k = (int.from_bytes(scalar, "little") & ~7 & (2**255 - 1)) | 2**254
    x1, x2, z2, x3, z3 = u, 1, 0, u, 1
    for bit in range(254, -1, -1):
        swap = k >> bit & 1
        if swap:
            x2, z2, x3, z3 = x3, z3, x2, z2
        a, b, c, d = x2 + z2, x2 - z2, x3 + z3, x3 - z3
        da, cb = d * a % P, c * b % P
        e = a * a - b * b
        x3, z3 = (da + cb) ** 2 % P, x1 * (da - cb) ** 2 % P
        x2, z2 = a * a * b * b % P, e * (a * a + 121665 * e) % P
        if swap:
            x2, z2, x3, z3 = x3, z3, x2, z2
    return x2 * pow(z2, P - 2, P) % P


def test_rfc_7748_section_5_2(vectors: Any) -> None:
    aliases = 0
    for record in vectors.nist("asymmetric/X25519/rfc7748.txt"):
        scalar, u, out = vectors.hexes(record, "input_scalar", "input_u", "output_u")
        if u[31] & 0x80:  # the RFC masks this bit, we refuse it
            with pytest.raises(MalformedMessage, match="public-key-encoding"):
                parse_public_key(u)
            u = u[:31] + bytes([u[31] & 0x7F])
            aliases += 1
        assert KeyPair.from_private(Secret(scalar)).agree(parse_public_key(u)) == Secret(out)
    assert aliases == 1


def test_rfc_7748_section_5_2_iterated() -> None:
    k = u = (9).to_bytes(32, "little")
    for _ in range(1000):
        k, u = KeyPair.from_private(Secret(k)).agree(parse_public_key(u)).reveal(), k
    assert k.hex() == "684cf59ba83309552800ef566f2f4d3c1c3887c49360e3875f2eb94d99532c51"


def test_rfc_7748_section_6_1() -> None:
    alice = KeyPair.from_private(
        Secret(bytes.fromhex("77076d0a7318a57d3c16c17251b26645df4c2f87ebc0992ab177fba51db92c2a"))
    )
    bob = bytes.fromhex("de9edb7d7b7dc1b4d35b61c2ece435373f8343c85b78674dadfc7e146f882b4f")
    assert alice.public.hex() == "8520f0098930a754748b7ddcb43ef75a0dbf3a0d26381af4eba4a98eaa9b4e6a"
    assert (
        alice.agree(parse_public_key(bob)).reveal().hex()
        == "4a5d9d5ba4ce2de1728e3bf480350f25e07e21c947d19e3376f09b3c1e161742"
    )


def test_wycheproof(vectors: Any) -> None:
    seen = {"refused encoding": 0, "refused low order": 0, "equal": 0}
    for _, test in vectors.wycheproof("Protocol/wycheproof/x25519_test.json"):
        public, private, shared = vectors.hexes(test, "public", "private", "shared")
        pair = KeyPair.from_private(Secret(private))
        if int.from_bytes(public, "little") >= P or "NonCanonicalPublic" in test["flags"]:
            with pytest.raises(MalformedMessage, match="public-key-encoding"):
                parse_public_key(public)
            seen["refused encoding"] += 1
        elif "ZeroSharedSecret" in test["flags"]:
            with pytest.raises(MalformedMessage, match="public-key-low-order"):
                pair.agree(parse_public_key(public))
            seen["refused low order"] += 1
        else:
            assert pair.agree(parse_public_key(public)) == Secret(shared), test["tcId"]
            seen["equal"] += 1
    assert sum(seen.values()) == 518
    assert min(seen.values()) >= 10


@given(KEY, KEY)
@settings(deadline=None, max_examples=25)
def test_agreement_equals_the_slow_ladder_and_is_symmetric(a: bytes, b: bytes) -> None:
    ours, theirs = KeyPair.from_private(Secret(a)), KeyPair.from_private(Secret(b))
    assert int.from_bytes(ours.public, "little") == ladder(a, 9)
    assert parse_public_key(ours.public) == ours.public
    u = int.from_bytes(theirs.public, "little")
    assert int.from_bytes(ours.agree(theirs.public).reveal(), "little") == ladder(a, u)
    assert ours.agree(theirs.public) == theirs.agree(ours.public)


@given(st.one_of(KEY, st.integers(P - 20, P + 20).map(lambda u: u.to_bytes(32, "little"))))
@settings(deadline=None)
def test_exactly_the_canonical_strings_are_keys(data: bytes) -> None:
    if int.from_bytes(data, "little") in LOW_ORDER:
        with pytest.raises(MalformedMessage, match="public-key-low-order"):
            parse_public_key(data)
    elif int.from_bytes(data, "little") < P:
        assert parse_public_key(data) == data
        assert type(parse_public_key(bytearray(data))) is bytes
    else:
        with pytest.raises(MalformedMessage, match="public-key-encoding"):
            parse_public_key(data)


@pytest.mark.parametrize("u", range(2, 19))
def test_no_small_key_has_a_second_encoding(u: int) -> None:
    assert parse_public_key(u.to_bytes(32, "little"))
    for alias in (u + P, u + 2**255):
        with pytest.raises(MalformedMessage, match="public-key-encoding"):
            parse_public_key(alias.to_bytes(32, "little"))


@pytest.mark.parametrize("size", [0, 1, 31, 33, 64])
def test_a_key_of_another_length_is_no_key(size: int) -> None:
    with pytest.raises(MalformedMessage, match="public-key-encoding"):
        parse_public_key(bytes(size))


@pytest.mark.parametrize("u", LOW_ORDER)
def test_every_low_order_point_is_refused(u: int) -> None:
    peer = u.to_bytes(32, "little")
    assert ladder(bytes([7] * 32), u) == 0
    with pytest.raises(MalformedMessage, match="public-key-low-order"):
        parse_public_key(peer)
    for private in (bytes([7] * 32), bytes(range(32))):
        with pytest.raises(MalformedMessage, match="public-key-low-order"):
            KeyPair.from_private(Secret(private)).agree(peer)


def test_a_fresh_pair_takes_32_bytes_once_and_never_prints_them() -> None:
    asked: list[int] = []

    def entropy(size: int) -> bytes:
        asked.append(size)
        return bytes(range(100, 100 + size))

    pair = KeyPair.generate(entropy)
    assert asked == [KEY_BYTES]
    assert pair == KeyPair.from_private(Secret(bytes(range(100, 132))))
    assert repr(pair) == f"KeyPair(private=Secret(<32 bytes>), public={pair.public!r})"


def test_a_private_key_is_taken_in_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """To take it in multiplies the base point, as costly as agreeing with a peer."""
    taken: list[bytes] = []

    class Counted:
        @staticmethod
        def from_private_bytes(data: bytes) -> X25519PrivateKey:
            taken.append(data)
            return X25519PrivateKey.from_private_bytes(data)

    monkeypatch.setattr(keys, "X25519PrivateKey", Counted)
    pair = KeyPair.from_private(Secret(bytes([7] * 32)))
    for n in range(20):
        peer = KeyPair.from_private(Secret(bytes([n] * 32)))
        assert pair.agree(peer.public) == peer.agree(pair.public)
        assert pair.agree(peer.public) == pair.agree(peer.public)
    assert taken.count(bytes([7] * 32)) == 2  # once for the peer that it is itself
    assert len(taken) == 21


def test_a_pair_is_not_written_down() -> None:
    pair = KeyPair.from_private(Secret(bytes([7] * 32)))
    with pytest.raises(TypeError):
        pickle.dumps(pair)
    assert bytes([7] * 32).hex() not in repr(pair)
    assert "handle" not in repr(pair)
