"""SEAL's files: what SEAL writes we read, what we write SEAL loads, and nothing else passes."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable

import numpy as np
import pytest
import tenseal.sealapi as seal
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from secagg.ckks.formats import PairFormat, before_plaintext
from secagg.errors import MalformedMessage
from secagg.suite import Suite

Q, N = 18_014_398_509_309_953, 4096
PARMS_ID = (
    8841731590570946129,
    7162192807470847657,
    17938424202721690778,
    13076419276104356229,
)
PAIR = PairFormat(N, Q, PARMS_ID, 2.0**40)
WORDS = np.random.default_rng(1).integers(0, Q, N, dtype="<u8")
TWO = np.concatenate([WORDS, WORDS[::-1]])
BODY = 65_633
"""Bytes of an uncompressed body: 32 + 1 + 24 + 8 + 8, the inner header of 16, 8, and 8 · 8192."""


def file(words: np.ndarray = TWO, shape: PairFormat = PAIR) -> bytes:
    """A pair as SEAL writes it, in the NTT domain."""
    whole = bytearray(shape.before_words() + words.tobytes())
    whole[48] = 1
    return bytes(whole)


def zipped(body: bytes, **options: bool) -> bytes:
    frame = zstandard.ZstdCompressor(**options).compress(body)
    return struct.pack("<HBBBBHQ", 0xA15E, 16, 4, 3, 2, 0, 16 + len(frame)) + frame


def poked(offset: int, data: bytes) -> bytes:
    whole = bytearray(file())
    whole[offset : offset + len(data)] = data
    return bytes(whole)


@pytest.fixture(scope="module")
def context() -> seal.SEALContext:
    parameters = seal.EncryptionParameters(seal.SCHEME_TYPE.CKKS)
    parameters.set_poly_modulus_degree(N)
    parameters.set_coeff_modulus(seal.CoeffModulus.Create(N, [54]))
    return seal.SEALContext(parameters, True, seal.SEC_LEVEL_TYPE.TC128)


def saved(item: object) -> bytes:
    handle = os.memfd_create("saved")
    try:
        item.save(f"/proc/self/fd/{handle}")  # type: ignore[attr-defined]
        return os.pread(handle, 2**20, 0)
    finally:
        os.close(handle)


def test_the_parameters_are_those_that_seal_makes(context: seal.SEALContext) -> None:
    numbers = Suite.CKKS_54.parameters
    assert (numbers.degree, numbers.modulus, numbers.scale) == (N, Q, 2.0**40)
    assert [prime.value() for prime in seal.CoeffModulus.Create(N, [54])] == [Q]
    assert tuple(context.first_parms_id()) == PARMS_ID == tuple(context.key_parms_id())
    assert context.parameters_set()


def test_a_plaintext_s_bytes() -> None:
    assert before_plaintext(N, PARMS_ID, 2.0**40).hex() == (
        "5ea1100403000000" "5880000000000000"  # magic, 16, 4.3, NONE; 32,856 bytes
        "51ae543f0924b47a" "a956285669386563" "9a047f41c515f2f8" "855145be0cc678b5"  # parms id
        "0010000000000000" "0000000000007042"  # 4096 coefficients, scale 2^40
        "5ea1100403000000" "1880000000000000" "0010000000000000"  # inner header, 4096 words
    )  # fmt: skip


def test_a_pair_s_bytes() -> None:
    assert PAIR.before_words().hex() == (
        "5ea1100403000000" "7100010000000000"  # 65,649 bytes
        "51ae543f0924b47a" "a956285669386563" "9a047f41c515f2f8" "855145be0cc678b5"  # parms id
        "00" "0200000000000000" "0010000000000000" "0100000000000000"  # coefficients, 2, N, 1
        "0000000000007042" "0100000000000000"  # scale 2^40, correction factor 1
        "5ea1100403000000" "1800010000000000" "0020000000000000"  # inner header, 8192 words
    )  # fmt: skip
    assert (PAIR.words, PAIR.body_size, len(file())) == (2 * N, BODY, 16 + BODY)


def test_reads_files_zipped_or_not() -> None:
    assert PAIR.read(file()).tolist() == TWO.tolist()
    assert PAIR.read(zipped(file()[16:])).tolist() == TWO.tolist()
    edges = np.array([0, 1, Q - 1] + [7] * (2 * N - 3), "<u8")
    assert PAIR.read(file(edges)).tolist() == edges.tolist()


def test_seal_loads_a_plaintext_that_was_written(context: seal.SEALContext) -> None:
    handle = os.memfd_create("written")
    try:
        os.pwrite(handle, before_plaintext(N, PARMS_ID, 2.0**40) + WORDS.tobytes(), 0)
        plaintext = seal.Plaintext()
        plaintext.load(context, f"/proc/self/fd/{handle}")
    finally:
        os.close(handle)
    assert (plaintext.scale, plaintext.coeff_count()) == (2.0**40, N)
    assert [plaintext.data(i) for i in range(0, N, 97)] == WORDS[::97].tolist()


def test_seal_transforms_a_written_pair(context: seal.SEALContext) -> None:
    """A constant polynomial is the same everywhere; X at root r is r: all distinct."""
    coefficients = np.zeros((2, N), "<u8")
    coefficients[0, 0] = 12345
    coefficients[1, 1] = 1
    handle = os.memfd_create("pair")
    try:
        os.pwrite(handle, PAIR.before_words() + coefficients.tobytes(), 0)
        pair = seal.Ciphertext()
        pair.load(context, f"/proc/self/fd/{handle}")
    finally:
        os.close(handle)
    seal.Evaluator(context).transform_to_ntt_inplace(pair)
    constant, powers = PAIR.read(saved(pair)).reshape(2, N).tolist()
    assert set(constant) == {12345}
    assert len(set(powers)) == N
    assert all(pow(root, N, Q) == Q - 1 for root in powers[::64])


OTHER_SCALE = PairFormat(N, Q, PARMS_ID, 1.0)


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (b"", "seal-length"),
        (file()[:15], "seal-length"),
        (file()[:-1], "seal-length"),
        (file()[:-8], "seal-length"),
        (file() + b"\0", "seal-length"),
        (before_plaintext(N, PARMS_ID, 2.0**40) + WORDS.tobytes(), "seal-length"),
        (poked(0, b"\x5f"), "seal-header"),
        (poked(2, b"\x11"), "seal-header"),
        (poked(6, b"\1"), "seal-header"),
        (poked(3, b"\5"), "seal-version"),
        (poked(4, b"\4"), "seal-version"),
        (poked(5, b"\1"), "seal-compression"),
        (poked(5, b"\2"), "seal-compression"),
        (poked(8, b"\x59"), "seal-length"),
        (poked(16, b"\0"), "seal-parameters"),
        (poked(16, bytes(32)), "seal-parameters"),
        (poked(48, b"\0"), "seal-domain"),
        (poked(48, b"\2"), "seal-domain"),
        (poked(49, b"\3"), "seal-degree"),
        (poked(57, b"\1"), "seal-degree"),
        (poked(65, b"\2"), "seal-degree"),
        (poked(73, b"\1"), "seal-scale"),
        (poked(73, struct.pack("<d", float("nan"))), "seal-scale"),
        (poked(81, b"\2"), "seal-scale"),
        (poked(89, b"\0"), "seal-header"),
        (poked(93, b"\0"), "seal-version"),
        (poked(94, b"\2"), "seal-compression"),
        (poked(97, b"\0"), "seal-length"),
        (poked(105, b"\1"), "seal-degree"),
        (poked(113, Q.to_bytes(8, "little")), "seal-residue"),
        (poked(BODY + 8, b"\xff" * 8), "seal-residue"),
        (zipped(b""), "seal-length"),
        (zipped(file()[16:-8]), "seal-length"),
        (zipped(bytes(2**26)), "seal-length"),
        (zipped(file()[16:], write_content_size=False), "seal-length"),
        (zipped(file(shape=OTHER_SCALE)[16:]), "seal-scale"),
    ],
)
def test_refuses_by_name(data: bytes, code: str) -> None:
    with pytest.raises(MalformedMessage) as caught:
        PAIR.read(data)
    assert caught.value.code == code


def test_refuses_a_shorter_body_that_is_not_zipped() -> None:
    short = bytearray(file()[:-8])
    short[8:16] = len(short).to_bytes(8, "little")
    with pytest.raises(MalformedMessage, match="seal-length"):
        PAIR.read(bytes(short))


@pytest.mark.parametrize(
    "damage", [lambda frame: frame[:-9], lambda frame: frame + b"more", lambda frame: frame[:7]]
)
def test_refuses_a_damaged_frame(damage: Callable[[bytes], bytes]) -> None:
    frame = damage(zipped(file()[16:])[16:])
    head = struct.pack("<HBBBBHQ", 0xA15E, 16, 4, 3, 2, 0, 16 + len(frame))
    with pytest.raises(MalformedMessage, match="seal-compression"):
        PAIR.read(head + frame)


@given(st.binary(max_size=200))
def test_any_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(MalformedMessage):
        PAIR.read(data)


@given(st.integers(0, 112), st.integers(1, 255))
def test_any_changed_byte_before_the_words_is_refused(offset: int, change: int) -> None:
    with pytest.raises(MalformedMessage):
        PAIR.read(poked(offset, bytes([file()[offset] ^ change])))
