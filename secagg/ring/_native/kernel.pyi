"""What ``kernel.c`` gives: see ``native``, which alone calls it. All buffers are contiguous.

``path`` is AES-NI (0), VAES-256 (1) or VAES-512 (2), ``kind`` an index into ``native.KINDS``; a
start is a coordinate, of ``fill`` a byte. ``loops`` is 0 for the best that run here, 1 for the
next, until ``ValueError`` says that there are no more.
"""

from typing import Any

import numpy.typing as npt

Buffer = bytes | bytearray | memoryview | npt.NDArray[Any]
KEY_BYTES: int
INTERFACE: int
LOOPS: int

def supported(path: int, /) -> bool: ...
def faults(path: int, loops: int, on_purpose: bool, /) -> bool: ...
def make_ready(out: Buffer, keys: Buffer, /) -> None: ...
def expand(
    path: int,
    out: Buffer,
    word_bytes: int,
    modulus: int,
    start: int,
    keys: Buffer,
    signs: Buffer,
    /,
) -> None: ...
def fill(path: int, out: Buffer, start: int, key: Buffer, /) -> None: ...
def encode(
    path: int,
    loops: int,
    out: Buffer,
    word_bytes: int,
    start: int,
    values: Buffer,
    kind: int,
    clip: float,
    factor: float,
    limit: float,
    rounding_key: Buffer,
    keys: Buffer,
    signs: Buffer,
    /,
) -> tuple[int, int]: ...
def to_words(
    loops: int,
    out: Buffer,
    word_bytes: int,
    values: Buffer,
    kind: int,
    clip: float,
    factor: float,
    limit: float,
    rounding: Buffer,
    /,
) -> tuple[int, int]: ...
def greatest(loops: int, values: Buffer, kind: int, /) -> int: ...
