"""Fused mask expansion: all keystreams added to a vector in one pass over memory.

The vector is cut into tiles that stay in a cache; within a tile every stream is expanded and added
before the next tile is touched, so the vector crosses the memory bus once however many masks there
are. Tiles are independent, since a stream can be opened at any coordinate: threads take contiguous
ranges of them. In a prime ring residues pile up in a tile's words and are reduced once, at its end
(or after ``terms`` of them).

AES-128-CTR streams are made by our kernel where it runs (``native``), else by OpenSSL into one
scratch tile, which NumPy adds; ChaCha20 streams are OpenSSL's. All give the same words. Measured on
one core of a 2-core Xeon with VAES, per 32-bit word and stream: 0.145 ns, 0.29 without VAES, 0.55
on the OpenSSL path; OpenSSL's keystream alone takes 0.39, and eight AES rounds of the ten at one
512-bit instruction a cycle 0.137. ``benchmarks/`` reports the ratios.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, TypeAlias

import numpy as np

from secagg.config import MaskPrg
from secagg.crypto.prg import PADDING, Stream, block_bytes, key_bytes, open_stream
from secagg.crypto.secret import Secret
from secagg.parallel import in_ranges
from secagg.ring import native
from secagg.ring.native import Path
from secagg.ring.vectors import PrimeRing, Ring, Vector

TILE_BYTES: Final = 256 * 1024
_ZEROS: Final = bytes(TILE_BYTES)


@dataclass(frozen=True, slots=True)
class Mask:
    """One keystream and whether it is added or subtracted."""

    key: Secret
    add: bool

    def inverse(self) -> Mask:
        """The mask that undoes this one."""
        return Mask(self.key, not self.add)


Encoded: TypeAlias = Callable[[Sequence[Mask], MaskPrg], Vector]
"""A vector that is made with these masks on it; nobody need ever hold it without. Called once."""


def masked(ring: Ring, vector: Vector) -> Encoded:
    """A vector that exists already, masked in place."""

    def mask(masks: Sequence[Mask], prg: MaskPrg) -> Vector:
        apply_masks(ring, vector, masks, prg)
        return vector

    return mask


def apply_masks(
    ring: Ring,
    vector: Vector,
    masks: Sequence[Mask],
    prg: MaskPrg,
    *,
    start: int = 0,
    threads: int | None = None,
    path: Path | None = None,
) -> None:
    """Add the masks to a vector in place.

    Args:
        ring: the vector's ring.
        vector: residues, contiguous and writable; coordinates start … start + len − 1 of a longer
            vector.
        masks: keys of ``key_bytes(prg)`` bytes, each for one stream.
        prg: the generator.
        start: the vector's first coordinate, so that any range can be masked alone.
        threads: how many ranges to expand at once; None takes the processors this process may use.
        path: how to make AES's streams; None takes the fastest.

    Raises:
        ValueError: a vector that is not as said, or keys of another generator.
    """
    flat = vector.ndim == 1 and vector.flags.c_contiguous and vector.flags.writeable
    if not flat or vector.dtype != ring.dtype:  # rows of a matrix would share one keystream
        raise ValueError("masks go onto a contiguous, writable vector of the ring")
    if any(len(mask.key) != key_bytes(prg) for mask in masks):
        raise ValueError("a mask's key is of another generator")
    apply = masker(ring, masks, prg, path)
    in_ranges(
        len(vector),
        TILE_BYTES // ring.word_bytes,
        lambda first, stop: apply(vector[first:stop], start + first),
        threads,
    )


def masker(
    ring: Ring, masks: Sequence[Mask], prg: MaskPrg, path: Path | None = None
) -> Callable[[Vector, int], None]:
    """Make the masks ready for many ranges: gives what puts them on one, with its start."""
    path = native.chosen() if path is None else path
    if prg is not MaskPrg.AES_128_CTR or path is Path.OPENSSL:
        return lambda part, start: _apply_range(ring, part, masks, prg, start)
    keys, signs = native.ReadyKeys([mask.key for mask in masks]), signs_of(masks)
    modulus = ring.modulus if isinstance(ring, PrimeRing) else 0
    return lambda part, start: native.expand(path, part, keys, signs, modulus=modulus, start=start)


def signs_of(masks: Sequence[Mask]) -> bytes:
    """1 for a mask that is added, 0 for one that is subtracted."""
    return bytes(mask.add for mask in masks)


def _apply_range(
    ring: Ring, vector: Vector, masks: Sequence[Mask], prg: MaskPrg, start: int
) -> None:
    tile = TILE_BYTES // ring.word_bytes
    scratch = bytearray(TILE_BYTES + PADDING)
    words = np.frombuffer(scratch, ring.dtype, tile)
    streams = [_open_at(ring, mask.key, prg, start, scratch) for mask in masks]
    for at in range(0, len(vector), tile):
        part = vector[at : at + tile]
        zeros, residues = memoryview(_ZEROS)[: part.nbytes], words[: len(part)]
        terms = 1
        for mask, stream in zip(masks, streams, strict=True):
            stream.update_into(zeros, memoryview(scratch))
            again = ring.uniform(residues)
            if again is not None:
                for i in again:
                    residues[i] = _redraw(ring, mask.key, prg, start + at + int(i))
            if terms == ring.terms:
                ring.reduce(part)
                terms = 1
            (ring.add if mask.add else ring.subtract)(part, residues)
            terms += 1
        ring.reduce(part)


def _open_at(
    ring: Ring, key: Secret, prg: MaskPrg, start: int, scratch: bytearray, stream: int = 0
) -> Stream:
    block, skip = divmod(start * ring.word_bytes, block_bytes(prg))
    opened = open_stream(prg, key, block, stream)
    opened.update_into(memoryview(_ZEROS)[:skip], memoryview(scratch))
    return opened


def _redraw(ring: Ring, key: Secret, prg: MaskPrg, coordinate: int) -> int:
    """The residue at a coordinate whose word in the first stream is none: from the next streams.

    Words that are no residue are thrown away, so residues are exactly uniform.
    """
    scratch = bytearray(ring.word_bytes + PADDING + block_bytes(prg))
    word = np.frombuffer(scratch, ring.dtype, 1)
    zeros = memoryview(_ZEROS)[: ring.word_bytes]
    number = 0
    while True:
        number += 1
        stream = _open_at(ring, key, prg, coordinate, scratch, number)
        stream.update_into(zeros, memoryview(scratch))
        if ring.uniform(word) is None:
            return int(word[0])
