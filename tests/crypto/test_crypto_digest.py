"""The digest of a vector, recomputed from BLAKE3 alone."""

from __future__ import annotations

import os
from array import array

import pytest
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st

from secagg.crypto import digest
from secagg.crypto import digest as module
from secagg.crypto.digest import (
    DIGEST_BYTES,
    chunk_digest,
    chunk_digests,
    root_digest,
    vector_digest,
)

DATA = st.binary(max_size=600)
CHUNK = st.integers(1, 200)


def slow(data: bytes, chunk_bytes: int) -> bytes:
    root = blake3(derive_key_context="secagg/1/vector")
    while data:
        root.update(blake3(data[:chunk_bytes]).digest())
        data = data[chunk_bytes:]
    return root.digest()


def test_blake3_s_published_vectors(monkeypatch: pytest.MonkeyPatch) -> None:
    """test_vectors.json of the BLAKE3 team, input lengths 0 and 1 (0x00), hash and derive_key."""
    assert (
        chunk_digest(b"").hex()
        == "af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262"
    )
    assert (
        chunk_digest(b"\0").hex()
        == "2d3adedff11b61f14c886e35afa036736dcd87a74d27b5c1510225d0f592e213"
    )
    monkeypatch.setattr(digest, "VECTOR", "BLAKE3 2019-12-27 16:29:52 test vectors context")
    assert (
        root_digest([]).hex() == "2cc39783c223154fea8dfb7c1b1660f2ac2dcbd1c1de8277b0b0dd39b7e50d7d"
    )
    assert (
        root_digest([b"\0"]).hex()
        == "b3e2e340a117a499c6cf2398a19ee0d29cca2bb7404c73063382693bf66cb06c"
    )


@given(DATA, CHUNK)
@settings(deadline=None)
def test_equals_the_slow_twin(data: bytes, chunk_bytes: int) -> None:
    got = vector_digest(data, chunk_bytes)
    assert got == slow(data, chunk_bytes)
    assert len(got) == DIGEST_BYTES
    assert vector_digest(memoryview(data), chunk_bytes) == got


@pytest.mark.parametrize(
    ("size", "chunks"), [(0, 0), (1, 1), (63, 1), (64, 1), (65, 2), (128, 2), (129, 3)]
)
def test_chunks_at_their_boundaries(size: int, chunks: int) -> None:
    data = bytes(range(size))
    leaves = [chunk_digest(data[64 * i : 64 * i + 64]) for i in range(chunks)]
    assert b"".join(data[64 * i : 64 * i + 64] for i in range(chunks)) == data
    assert vector_digest(data, 64) == root_digest(leaves) == root_digest(iter(leaves))


@given(DATA)
@settings(deadline=None)
def test_a_root_is_never_a_leaf(data: bytes) -> None:
    """Not of its one chunk, nor of the leaves' bytes passed off as a chunk."""
    assert vector_digest(data, 1000) != chunk_digest(data)
    leaf = chunk_digest(data)
    assert root_digest([leaf]) != leaf
    assert root_digest([leaf]) != chunk_digest(leaf)
    assert root_digest([leaf, leaf]) != chunk_digest(leaf + leaf)


@given(st.binary(min_size=1, max_size=600), CHUNK, st.data())
@settings(deadline=None)
def test_every_byte_counts(data: bytes, chunk_bytes: int, pick: st.DataObject) -> None:
    altered = bytearray(data)
    altered[pick.draw(st.integers(0, len(data) - 1))] ^= pick.draw(st.integers(1, 255))
    whole = vector_digest(data, chunk_bytes)
    assert vector_digest(bytes(altered), chunk_bytes) != whole
    assert vector_digest(data + b"\0", chunk_bytes) != whole
    assert vector_digest(data[:-1], chunk_bytes) != whole


def test_the_order_of_chunks_and_their_size_count() -> None:
    a, b = chunk_digest(b"a"), chunk_digest(b"b")
    assert root_digest([a, b]) != root_digest([b, a])
    assert root_digest([a]) != root_digest([a, a])
    assert vector_digest(bytes(128), 64) != vector_digest(bytes(128), 128)


def test_words_are_hashed_as_their_bytes() -> None:
    words = array("I", range(100))
    assert vector_digest(memoryview(words), 64) == slow(words.tobytes(), 64)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2000), st.integers(1, 5), st.integers(1, 40))
def test_chunks_over_many_threads(size: int, cores: int, chunk_bytes: int) -> None:
    data = bytes(n % 251 for n in range(size))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_THREAD_BYTES", 100)
        patch.setattr(os, "sched_getaffinity", lambda pid: set(range(cores)))
        got = chunk_digests(data, chunk_bytes)
    assert got == tuple(
        chunk_digest(data[at : at + chunk_bytes]) for at in range(0, len(data), chunk_bytes)
    )
