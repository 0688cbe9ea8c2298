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

DIGEST_BYTES: Final = 32


def chunk_digest(chunk: bytes | memoryview) -> bytes:
    """Digest of one chunk."""
    return blake3(chunk).digest()


def root_digest(chunk_digests: Iterable[bytes]) -> bytes:
    """Digest of a vector from the digests of its chunks, in order."""
    return blake3(b"".join(chunk_digests), derive_key_context=VECTOR).digest()


def vector_digest(data: bytes | memoryview, chunk_bytes: int) -> bytes:
    """Digest of a whole vector cut at ``chunk_bytes``."""
    view = memoryview(data).cast("B")
    return root_digest(
        chunk_digest(view[at : at + chunk_bytes]) for at in range(0, len(view), chunk_bytes)
    )
