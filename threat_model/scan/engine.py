"""Searching bytes for secrets, in every form that a leak is likely to take.

``scan`` finds a secret in a file, its name, a log or a message as it is, reversed, in hex, in
base64 at any alignment, as a number, listed, and escaped as Python, JSON and protobuf print bytes.
It knows nothing of what may be where: whoever calls it judges its findings.
"""

from __future__ import annotations

import base64
import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
from google.protobuf import text_encoding

MIN_BYTES: Final = 8
"""Fewer are found by chance: 8 random bytes are in 100 MB with a chance of 5e-12."""
MAX_WHOLE: Final = 64
PIECE: Final = 32
STRIDE: Final = 256
_TABLE_BITS: Final = 24
_SPREAD: Final = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / the golden ratio, odd


@dataclass(frozen=True, order=True)
class Finding:
    """A secret where it was found.

    Args:
        secret: its name among those that were looked for.
        place: where; below a directory, with the file's path.
        form: how it was written there.
        offset: of its first byte, or of a piece's, in the place.
    """

    secret: str
    place: str
    form: str
    offset: int


def scan(
    secrets: Mapping[str, Iterable[bytes]], places: Mapping[str, bytes | Path]
) -> list[Finding]:
    """Look for secrets in places.

    Args:
        secrets: values by name, each of at least 8 bytes. Of more than 64 bytes a piece of 32 is
            looked for every 256, so a leak of any 288 bytes of it is found.
        places: bytes, a file or a directory, by name.

    Returns:
        Each secret at most once per place and form, sorted.

    Raises:
        ValueError: a secret is too short to be told from chance.
    """
    index = _Index(secrets)
    found: dict[tuple[str, str, str], int] = {}
    for place, data in _opened(places):
        for offset, pattern in index.search(data):
            for name, form in index.known[pattern]:
                found.setdefault((name, place, form), offset)
    return sorted(Finding(*key, offset) for key, offset in found.items())


def _opened(places: Mapping[str, bytes | Path]) -> Iterator[tuple[str, bytes]]:
    for name, where in places.items():
        if isinstance(where, bytes):
            yield name, where
        elif where.is_dir():
            paths = sorted(where.rglob("*"))
            yield f"{name} (names)", "\n".join(str(p.relative_to(where)) for p in paths).encode()
            for path in paths:
                if path.is_file():
                    yield f"{name}/{path.relative_to(where)}", path.read_bytes()
        else:
            yield name, where.read_bytes()


class _Index:
    """Patterns by their first eight bytes: a table of bits for all windows, then a dictionary."""

    def __init__(self, secrets: Mapping[str, Iterable[bytes]]) -> None:
        self.known: dict[bytes, set[tuple[str, str]]] = defaultdict(set)
        for name, values in secrets.items():
            for value in set(values):
                for piece in _pieces(name, value):
                    for form, pattern in forms(piece):
                        self.known[pattern].add((name, form))
        self._by_start: dict[bytes, list[bytes]] = defaultdict(list)
        for pattern in self.known:
            self._by_start[pattern[:MIN_BYTES]].append(pattern)
        self._table = np.zeros(2**_TABLE_BITS, np.bool_)
        self._table[_hash(np.frombuffer(b"".join(self._by_start), "<u8"))] = True

    def search(self, data: bytes) -> Iterator[tuple[int, bytes]]:
        """Give each place of each pattern."""
        for shift in range(min(MIN_BYTES, max(0, len(data) - MIN_BYTES + 1))):
            windows = np.frombuffer(data, "<u8", (len(data) - shift) // MIN_BYTES, shift)
            for window in np.flatnonzero(self._table[_hash(windows)]).tolist():
                at = shift + MIN_BYTES * window
                for pattern in self._by_start.get(data[at : at + MIN_BYTES], ()):
                    if data.startswith(pattern, at):
                        yield at, pattern


def _hash(windows: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    hashed: npt.NDArray[np.uint64] = (windows * _SPREAD) >> np.uint64(64 - _TABLE_BITS)
    return hashed


def _pieces(name: str, value: bytes) -> Iterator[bytes]:
    if len(value) < MIN_BYTES:
        raise ValueError(f"{name} has {len(value)} bytes: too few to be told from chance")
    if len(value) <= MAX_WHOLE:
        yield value
        return
    for start in (*range(0, len(value) - PIECE, STRIDE), len(value) - PIECE):
        piece = value[start : start + PIECE]
        if len(set(piece)) > 2:  # runs of zeros are everywhere
            yield _bare(piece)


def _bare(piece: bytes) -> bytes:
    """A piece without the zeros around it, which would be looked at in every place; 8 bytes left.

    It is more general, too: what is around a number differs from place to place.
    """
    bare = piece.strip(b"\0")
    start = min(piece.index(bare), len(piece) - MIN_BYTES)
    return piece[start:][: max(MIN_BYTES, len(bare))]


def forms(value: bytes) -> Iterator[tuple[str, bytes]]:
    """Give what a value looks like where it leaks: the name of each form and its bytes."""
    backwards = value[::-1]
    yield "raw", value
    yield "reversed", backwards
    for order, data in (("", value), (" reversed", backwards)):
        yield f"hex{order}", data.hex().encode()
        yield f"HEX{order}", data.hex().upper().encode()
        yield f"decimal{order}", str(int.from_bytes(data, "big")).encode().ljust(MIN_BYTES)
    for shift in range(3):
        coded = _base64(value, shift)
        yield f"base64+{shift}", coded
        yield f"base64url+{shift}", coded.translate(bytes.maketrans(b"+/", b"-_"))
    yield "list", ", ".join(map(str, value)).encode()
    yield "compact list", ",".join(map(str, value)).encode()
    printed, *_ = str(np.frombuffer(value, np.uint8)).strip("[]").split("\n")
    yield "numpy", printed.encode()  # as far as it is one line
    yield "JSON", json.dumps(value.decode("latin-1"))[1:-1].encode()
    escaped = text_encoding.CEscape(value, as_utf8=False)
    for form, text in (("Python", repr(value)[2:-1]), ("protobuf", escaped)):
        yield form, text.encode()
        yield f"{form} in JSON", json.dumps(text)[1:-1].encode()


def _base64(value: bytes, shift: int) -> bytes:
    """What is this value's alone in base64 of more, ``shift`` bytes after a multiple of three."""
    text = base64.b64encode(bytes(shift) + value + bytes(2))
    return text[-(-8 * shift // 6) : 8 * (shift + len(value)) // 6]
