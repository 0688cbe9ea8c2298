"""Keystreams as wrapped: published vectors, a second implementation, seeking."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from Crypto.Cipher import AES, ChaCha20
from cryptography.hazmat.primitives.ciphers import algorithms
from hypothesis import given, settings
from hypothesis import strategies as st

from secagg.config import MaskPrg
from secagg.crypto import prg as module
from secagg.crypto.prg import PADDING, Stream, block_bytes, key_bytes, open_stream, read
from secagg.crypto.secret import Secret

AES_CTR, CHACHA = MaskPrg.AES_128_CTR, MaskPrg.CHACHA20


def take(stream: Stream, size: int) -> bytes:
    out = bytearray(size + PADDING)
    assert stream.update_into(memoryview(bytes(size)), memoryview(out)) == size
    return bytes(out[:size])


def xor(a: bytes, b: bytes) -> bytes:
    return bytes(x ^ y for x, y in zip(a, b, strict=True))


def theirs(prg: MaskPrg, key: bytes, block: int, size: int) -> bytes:
    """The keystream from PyCryptodome."""
    if prg is AES_CTR:
        return AES.new(key, AES.MODE_CTR, nonce=b"", initial_value=block).encrypt(bytes(size))
    cipher = ChaCha20.new(key=key, nonce=bytes(12))
    cipher.seek(64 * block)
    return cipher.encrypt(bytes(size))


@st.composite
def streams(draw: st.DrawFn) -> tuple[MaskPrg, bytes]:
    prg = draw(st.sampled_from(MaskPrg))
    return prg, draw(st.binary(min_size=key_bytes(prg), max_size=key_bytes(prg)))


def test_sizes() -> None:
    assert {prg: (key_bytes(prg), block_bytes(prg)) for prg in MaskPrg} == {
        AES_CTR: (16, 16),
        CHACHA: (32, 64),
    }


def test_nist_sp_800_38a_section_f_5_1() -> None:
    """Not shipped as a file, so inline: CTR-AES128.Encrypt."""
    key = Secret(bytes.fromhex("2b7e151628aed2a6abf7158809cf4f3c"))
    counter = int("f0f1f2f3f4f5f6f7f8f9fafbfcfdfeff", 16)
    plain = bytes.fromhex(
        "6bc1bee22e409f96e93d7e117393172aae2d8a571e03ac9c9eb76fac45af8e51"
        "30c81c46a35ce411e5fbc1191a0a52eff69f2445df4f9b17ad2b417be66c3710"
    )
    stream = take(open_stream(AES_CTR, key, block=counter), 64)
    assert xor(plain, stream).hex() == (
        "874d6191b620e3261bef6864990db6ce9806f66b7970fdff8617187bb9fffdff"
        "5ae4df3edbd5d35e5b4f09020db03eab1e031dda2fbe03d1792170a0f3009cee"
    )


def test_rfc_3686_section_6(vectors: Any) -> None:
    records = list(vectors.nist("ciphers/AES/CTR/aes-128-ctr.txt"))
    assert len(records) == 3
    for record in records:
        key, counter, plain, cipher = vectors.hexes(record, "key", "iv", "plaintext", "ciphertext")
        stream = open_stream(AES_CTR, Secret(key), block=int.from_bytes(counter, "big"))
        assert xor(plain, take(stream, len(plain))) == cipher


def test_rfc_8439_appendix_a_2(monkeypatch: pytest.MonkeyPatch, vectors: Any) -> None:
    """The shipped file (RFC 7539, same vectors): number 0 has the wrapper's zero nonce and passes
    unpatched; 1 and 2 have another, put in at the one call into ``cryptography``."""
    records = list(vectors.nist("ciphers/ChaCha20/rfc7539.txt"))
    assert [int(record["nonce"], 16) for record in records] == [0, 2, 2]
    for record in records:
        key, nonce, plain, cipher = vectors.hexes(record, "key", "nonce", "plaintext", "ciphertext")
        with monkeypatch.context() as patch:
            if any(nonce):
                shim = _with_nonce(nonce)
                patch.setattr(module, "algorithms", shim)
            stream = open_stream(CHACHA, Secret(key), block=int(record["initial_block_counter"]))
        assert xor(plain, take(stream, len(plain))) == cipher


def _with_nonce(nonce: bytes) -> SimpleNamespace:
    def chacha20(key: bytes, counter_and_nonce: bytes) -> algorithms.ChaCha20:
        assert counter_and_nonce[4:] == bytes(12)
        return algorithms.ChaCha20(key, counter_and_nonce[:4] + nonce)

    return SimpleNamespace(ChaCha20=chacha20)


@pytest.mark.parametrize(
    ("key", "block", "stream"),
    [
        pytest.param(
            bytes(32),
            0,
            "76b8e0ada0f13d90405d6ae55386bd28bdd219b8a08ded1aa836efcc8b770dc7"
            "da41597c5157488d7724e03fb8d84a376a43b8f41518a11cc387b669b2ee6586",
            id="1",
        ),
        pytest.param(
            bytes(32),
            1,
            "9f07e7be5551387a98ba977c732d080dcb0f29a048e3656912c6533e32ee7aed"
            "29b721769ce64e43d57133b074d839d531ed1f28510afb45ace10a1f4b794d6f",
            id="2",
        ),
        pytest.param(
            bytes(31) + b"\x01",
            1,
            "3aeb5224ecf849929b9d828db1ced4dd832025e8018b8160b82284f3c949aa5a"
            "8eca00bbb4a73bdad192b5c42f73f2fd4e273644c8b36125a64addeb006c13a0",
            id="3",
        ),
        pytest.param(
            b"\x00\xff" + bytes(30),
            2,
            "72d54dfbf12ec44b362692df94137f328fea8da73990265ec1bbbea1ae9af0ca"
            "13b25aa26cb4a648cb9b9d1be65b2c0924a66c54d545ec1b7374f4872e99f096",
            id="4",
        ),
    ],
)
def test_rfc_8439_appendix_a_1(key: bytes, block: int, stream: str) -> None:
    """Test vectors 1 to 4, all with the zero nonce; not shipped, so inline. (5 has a nonce.)"""
    assert take(open_stream(CHACHA, Secret(key), block), 64).hex() == stream


def test_wycheproof_counters_of_chacha20(vectors: Any) -> None:
    """All 14 with the zero nonce, by counter: the last two blocks pass, the wrap is refused."""
    seen = {"valid": 0, "invalid": 0}
    for group, test in vectors.wycheproof("Cipher/wycheproof/chacha20_counter_test.json"):
        if group["algorithm"] != "ChaCha20-IETF":
            continue
        key, iv, message = vectors.hexes(test, "key", "iv", "msg")
        assert iv == bytes(12)
        block = int.from_bytes(bytes.fromhex(test["initialCounter"]), "little")
        stream = open_stream(CHACHA, Secret(key), block)
        if test["result"] == "valid":
            assert xor(message, take(stream, len(message))).hex() == test["ct"]
        else:
            with pytest.raises(ValueError, match="overflow"):
                take(stream, len(message))
        seen[test["result"]] += 1
    assert seen == {"valid": 11, "invalid": 3}


@given(streams(), st.integers(0, 2**32 - 100), st.integers(0, 5000))
@settings(deadline=None)
def test_equals_pycryptodome(stream: tuple[MaskPrg, bytes], block: int, size: int) -> None:
    prg, key = stream
    assert take(open_stream(prg, Secret(key), block), size) == theirs(prg, key, block, size)
    assert read(prg, Secret(key), size) == theirs(prg, key, 0, size)


@given(st.binary(min_size=16, max_size=16), st.integers(0, 2**128 - 100), st.integers(0, 1000))
@settings(deadline=None)
def test_aes_ctr_counts_in_128_bits(key: bytes, block: int, size: int) -> None:
    assert take(open_stream(AES_CTR, Secret(key), block), size) == theirs(AES_CTR, key, block, size)


@given(streams(), st.integers(0, 100), st.integers(0, 2000))
@settings(deadline=None)
def test_a_stream_from_a_block_is_the_tail_of_the_stream_from_0(
    stream: tuple[MaskPrg, bytes], block: int, size: int
) -> None:
    prg, key = stream
    skipped = block * block_bytes(prg)
    whole = read(prg, Secret(key), skipped + size)
    assert take(open_stream(prg, Secret(key), block), size) == whole[skipped:]


@pytest.mark.parametrize("prg", MaskPrg)
@pytest.mark.parametrize("start", [0, 1, 15, 16, 17, 63, 64, 65, 1000, 2**33 + 5])
@pytest.mark.parametrize("size", [0, 1, 16, 100])
def test_read_from_any_byte_on(prg: MaskPrg, start: int, size: int) -> None:
    key = bytes(range(key_bytes(prg)))
    block = start // block_bytes(prg) * block_bytes(prg)
    expected = take(open_stream(prg, Secret(key), block // block_bytes(prg)), start - block + size)
    assert read(prg, Secret(key), size, start) == expected[start - block :]


@given(streams(), st.lists(st.integers(0, 300), max_size=6))
@settings(deadline=None)
def test_pieces_of_any_sizes_are_one_stream(
    stream: tuple[MaskPrg, bytes], sizes: list[int]
) -> None:
    prg, key = stream
    running = open_stream(prg, Secret(key))
    assert b"".join(take(running, size) for size in sizes) == read(prg, Secret(key), sum(sizes))


@pytest.mark.parametrize("prg", MaskPrg)
def test_keys_and_generators_are_told_apart(prg: MaskPrg) -> None:
    one, two = Secret(bytes(key_bytes(prg))), Secret(b"\1" * key_bytes(prg))
    assert read(prg, one, 64) != read(prg, two, 64)
    assert read(prg, one, 64) == read(prg, one, 64)


@pytest.mark.parametrize("size", [0, 15, 17, 24, 31, 33])
@pytest.mark.parametrize("prg", MaskPrg)
def test_bad_key_sizes(prg: MaskPrg, size: int) -> None:
    with pytest.raises(ValueError, match="key"):
        open_stream(prg, Secret(bytes(size)))


@pytest.mark.parametrize(("prg", "size"), [(AES_CTR, 32), (CHACHA, 16)])
def test_one_generator_s_key_is_not_the_other_s(prg: MaskPrg, size: int) -> None:
    with pytest.raises(ValueError, match="key"):
        open_stream(prg, Secret(bytes(size)))


@pytest.mark.parametrize(
    ("prg", "block"), [(CHACHA, 2**32), (CHACHA, -1), (AES_CTR, 2**128), (AES_CTR, -1)]
)
def test_a_block_beyond_the_stream_is_no_other_block(prg: MaskPrg, block: int) -> None:
    with pytest.raises(OverflowError):
        open_stream(prg, Secret(bytes(key_bytes(prg))), block)


# Streams of one key.


def their_stream(prg: MaskPrg, key: bytes, block: int, number: int, size: int) -> bytes:
    """A numbered stream from PyCryptodome, its halves and its nonce written out."""
    if prg is AES_CTR:
        counter = number.to_bytes(8, "big") + block.to_bytes(8, "big")
        return AES.new(key, AES.MODE_CTR, nonce=b"", initial_value=counter).encrypt(bytes(size))
    cipher = ChaCha20.new(key=key, nonce=number.to_bytes(12, "little"))
    cipher.seek(64 * block)
    return cipher.encrypt(bytes(size))


@given(
    streams(),
    st.integers(0, 2**32 - 100),
    st.integers(0, 2**64 - 1) | st.sampled_from((0, 1, 2**32, 2**63, 2**64 - 1)),
    st.integers(0, 2000),
)
@settings(deadline=None)
def test_numbered_streams_equal_pycryptodome_s(
    stream: tuple[MaskPrg, bytes], block: int, number: int, size: int
) -> None:
    prg, key = stream
    ours = take(open_stream(prg, Secret(key), block, number), size)
    assert ours == their_stream(prg, key, block, number, size)


@pytest.mark.parametrize("prg", MaskPrg)
def test_stream_0_is_the_stream_that_masks_had_before_there_were_numbers(prg: MaskPrg) -> None:
    key = bytes(range(key_bytes(prg)))
    assert take(open_stream(prg, Secret(key), 3, 0), 200) == theirs(prg, key, 3, 200)
    assert read(prg, Secret(key), 200) == take(open_stream(prg, Secret(key), stream=0), 200)


def test_an_aes_stream_s_number_is_the_upper_half_of_its_counter() -> None:
    """Block b of stream s is the cipher's of s·2^64 + b, one by one."""
    key = bytes(range(16))
    for number in (0, 1, 2, 2**63, 2**64 - 1):
        for block in (0, 1, 2**32 - 1, 2**32, 2**64 - 1):
            counter = (number * 2**64 + block).to_bytes(16, "big")
            expected = AES.new(key, AES.MODE_ECB).encrypt(counter)
            assert take(open_stream(AES_CTR, Secret(key), block, number), 16) == expected


@pytest.mark.parametrize("number", [1, 2])
def test_rfc_8439_streams_with_a_nonce(number: int, vectors: Any) -> None:
    """The shipped file's records 1 and 2 have nonce 2, in its last byte: ours are little-endian."""
    record = list(vectors.nist("ciphers/ChaCha20/rfc7539.txt"))[number]
    key, nonce, plain, cipher = vectors.hexes(record, "key", "nonce", "plaintext", "ciphertext")
    stream = int.from_bytes(nonce, "little")
    assert stream == 2 << 88
    block = int(record["initial_block_counter"])
    ours = take(open_stream(CHACHA, Secret(key), block, stream), len(plain))
    assert xor(plain, ours) == cipher


@pytest.mark.parametrize("prg", MaskPrg)
def test_streams_and_blocks_of_one_key_never_meet(prg: MaskPrg) -> None:
    """No block of 40 streams, at either end, is a block of another, or elsewhere in its own."""
    key = Secret(bytes(range(key_bytes(prg))))
    size, last = block_bytes(prg), 2**32 - 8
    seen: set[bytes] = set()
    for number in (*range(36), 2**32, 2**63, 2**64 - 2, 2**64 - 1):
        for block in (0, last):
            data = take(open_stream(prg, key, block, number), 8 * size)
            seen |= {data[at : at + size] for at in range(0, len(data), size)}
    assert len(seen) == 40 * 2 * 8


@given(st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1), st.data())
def test_aes_counters_of_streams_are_disjoint_while_both_halves_hold(
    one: int, other: int, data: st.DataObject
) -> None:
    """A mask of 2^36 elements has 2^35 blocks, far below the lower half's 2^64."""
    seen: list[int] = []

    class Counter:
        @staticmethod
        def CTR(initial: bytes) -> Any:
            seen.append(int.from_bytes(initial, "big"))
            return real.CTR(initial)

    real = module.modes
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "modes", Counter)
        for number in (one, other):
            open_stream(AES_CTR, Secret(bytes(16)), data.draw(st.integers(0, 2**36)), number)
    first, second = seen
    assert (first >> 64, second >> 64) == (one, other)
    assert one == other or abs(first - second) > 2**64 - 2**37


@pytest.mark.parametrize(
    ("prg", "number"), [(AES_CTR, 2**64), (AES_CTR, -1), (CHACHA, 2**96), (CHACHA, -1)]
)
def test_a_number_beyond_the_streams_is_no_other_stream(prg: MaskPrg, number: int) -> None:
    with pytest.raises(OverflowError):
        open_stream(prg, Secret(bytes(key_bytes(prg))), 0, number)
