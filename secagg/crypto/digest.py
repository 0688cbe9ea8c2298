"""Digest of a vector: BLAKE3 over the list of its chunks' BLAKE3 digests.

One chunk can be checked alone, and hashing keeps pace with the masks (SHA-256 would cost more than
making them). The chunk size is part of the session hash, so both ends cut alike. The root uses
BLAKE3's derive-key mode, so a root is never a leaf.

Source: BLAKE3 specification, section 2.3 (modes).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from blake3 import blake3

from secagg.crypto.labels import VECTOR
from secagg.parallel import in_ranges

DIGEST_BYTES: Final = 32
_THREAD_BYTES: Final = 2**20
"""To start a thread for less costs more than to hash it."""


def chunk_digest(chunk: bytes | memoryview) -> bytes:
    """Digest of one chunk."""
    return blake3(chunk).digest()


def root_digest(chunk_digests: Iterable[bytes]) -> bytes:
    """Digest of a vector from the digests of its chunks, in order."""
    return blake3(b"".join(chunk_digests), derive_key_context=VECTOR).digest()


def chunk_digests(data: bytes | memoryview, chunk_bytes: int) -> tuple[bytes, ...]:
    """Digests of a vector's chunks, in order, over all cores: chunks are independent."""
    view = memoryview(data).cast("B")
    digests = [b""] * -(-len(view) // chunk_bytes)

    def hash_range(start: int, stop: int) -> None:
        for at in range(start, stop, chunk_bytes):
            digests[at // chunk_bytes] = chunk_digest(view[at : min(at + chunk_bytes, stop)])

    in_ranges(len(view), chunk_bytes, hash_range, worth=_THREAD_BYTES)
    return tuple(digests)


def vector_digest(data: bytes | memoryview, chunk_bytes: int) -> bytes:
    """Digest of a whole vector cut at ``chunk_bytes``."""
    return root_digest(chunk_digests(data, chunk_bytes))
