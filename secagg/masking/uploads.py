"""A vector as the server takes it: its words, and the digest of exactly these words.

What is summed must be what its silo signed. So the server compares the signed digest with one that
was taken of the very words that it adds; it hashes nothing itself, since a vector of gigabytes is
hashed as it arrives. Whoever makes an ``Uploaded`` answers for the rest: from the moment when its
digest was taken to the end of ``ServerRound.accept``, nobody changes the words.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from secagg.crypto.digest import vector_digest
from secagg.ring.words import Held, Words


class Uploaded(Words, Protocol):
    """Words and their digest."""

    def digest(self) -> bytes:
        """The digest of exactly these words (``crypto.digest``)."""
        ...


@dataclass(frozen=True, slots=True)
class InMemory(Held):
    """A vector in memory; hashed when the server asks, which then adds it before it returns.

    Args:
        chunk_bytes: the session's.
    """

    chunk_bytes: int

    def digest(self) -> bytes:
        """Hash the words as they are now."""
        return vector_digest(np.ascontiguousarray(self.vector).data.cast("B"), self.chunk_bytes)
