"""What masks are made with on this machine: our kernel in C, or OpenSSL where it does not run.

The kernel (``_native/``) makes AES-128-CTR keystreams with the widest AES instructions that the
processor has and adds them to a vector as they are made; it also turns numbers into words. It is
believed only after it was tried: at import all that it can be asked for runs once, under a handler
for illegal instructions (a hypervisor may report what it does not run), and what it gives is held
against OpenSSL and NumPy. What fails is passed over with a warning.

Without AES instructions in the kernel (another architecture, no compiler at the installation) the
keystream is OpenSSL's, added in NumPy: it has AES of its own for most machines, in constant time,
and a second one of ours, in tables or bit slices, would be slower or leak.
"""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Callable, Sequence
from enum import StrEnum
from typing import Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt

from secagg.config import MaskPrg
from secagg.crypto.prg import read
from secagg.crypto.secret import Secret

_missing = ""
try:
    from secagg.ring._native import kernel

    if sys.byteorder != "little" or kernel.INTERFACE != 1:
        raise ImportError("it is of another version, or this machine is big-endian")
except ImportError as error:  # it is optional
    kernel = None  # type: ignore[assignment]
    _missing = str(error)

Numbers: TypeAlias = npt.NDArray[Any]
KINDS: Final = ("float16", "float32", "float64", "bfloat16")
"""Names of the formats that an update may have, in the kernel's order."""


class Path(StrEnum):
    """How AES-128-CTR masks are made."""

    VAES_512 = "vaes-512"
    VAES_256 = "vaes-256"
    AES_NI = "aes-ni"
    OPENSSL = "openssl"


_INDEX: Final = {Path.AES_NI: 0, Path.VAES_256: 1, Path.VAES_512: 2}
_MODULUS: Final = 2**54 - 172031
_TRIED: Final = 4096 + 24
"""Bytes: more than a group of counters, from the midst of a block on."""


def available() -> tuple[Path, ...]:
    """The paths that run here, the fastest first; the last is always OpenSSL."""
    return _available


def chosen() -> Path:
    """The path that is taken."""
    return _available[0]


def reason() -> str:
    """Why it is, in a sentence."""
    if kernel is None:
        return f"The kernel in C is not installed ({_missing}); with a compiler, reinstall secagg."
    if chosen() is Path.OPENSSL:
        return "The kernel found no AES instructions that work on this processor."
    return f"The fastest of the paths that work on this processor ({', '.join(_available)})."


class ReadyKeys(bytearray):
    """What the kernel wants of AES-128 keys, 4 KiB each; zeroed when nobody holds it any more."""

    def __init__(self, keys: Sequence[Secret]) -> None:
        super().__init__(kernel.KEY_BYTES * len(keys))
        raw = bytearray().join(key.reveal() for key in keys)
        kernel.make_ready(self, raw)
        raw[:] = bytes(len(raw))

    def __del__(self) -> None:
        self[:] = bytes(len(self))


def expand(
    path: Path, vector: Numbers, keys: ReadyKeys, signs: bytes, *, modulus: int, start: int
) -> None:
    """Add and subtract AES-128-CTR keystreams.

    Args:
        path: one of ``available``, not OpenSSL.
        vector: words, contiguous and writable.
        keys: made ready.
        signs: one byte for each: 1 adds, 0 subtracts.
        modulus: q of a prime ring; 0 where words wrap.
        start: coordinate of the first word; the stream is 16 TiB long.
    """
    kernel.expand(_INDEX[path], vector, vector.itemsize, modulus, start, keys, signs)


def encode(
    path: Path,
    values: Numbers,
    out: Numbers,
    rounding: ReadyKeys,
    keys: ReadyKeys,
    signs: bytes,
    *,
    start: int,
    clip: float,
    factor: float,
    limit: int,
) -> tuple[float, int]:
    """``to_words`` with the rounding key's stream, then ``expand``, while a tile is in the cache.

    Args and Returns:
        As there.
    """
    plain = _plain(values)
    kind = _kind(plain)
    most, clipped = kernel.encode(
        _INDEX[path],
        _loops,
        out,
        out.itemsize,
        start,
        _bytes(plain),
        kind,
        clip,
        factor,
        limit,
        rounding,
        keys,
        signs,
    )
    return _magnitude(most, kind), clipped


def greatest(values: Numbers) -> float:
    """The greatest magnitude; infinity or NaN if a number is; 0 of none."""
    if kernel is None:
        return float(np.abs(_doubles(values)).max(initial=0.0))
    plain = _plain(values)
    return _magnitude(kernel.greatest(_loops, _bytes(plain), _kind(plain)), _kind(plain))


def to_words(
    values: Numbers,
    out: npt.NDArray[Any],
    uniform: npt.NDArray[np.uint32],
    *,
    clip: float,
    factor: float,
    limit: int,
) -> tuple[float, int]:
    """Clip, multiply, round at random and wrap: ⌊clip(x)·factor + u⌋ for u in [0, 1).

    Args:
        values: one-dimensional, of a kind in ``KINDS``, of any byte order.
        out: as many words of 16, 32 or 64 bits, contiguous.
        uniform: as many words of 32 bits: u · 2^32.
        clip: magnitude that values are cut to; infinity for none.
        factor: what they are multiplied by, in float64.
        limit: no result is beyond ±limit; below 2^31, or 2^62 for words of 64 bits.

    Returns:
        The greatest magnitude of the values as in ``greatest``, and how many were cut. Where it is
        not finite, or a product is 2^31 or more (2^62 for words of 64 bits), words mean nothing.
    """
    if kernel is None:
        return _to_words(values, out, uniform, clip, factor, limit)
    plain = _plain(values)
    kind = _kind(plain)
    most, clipped = kernel.to_words(
        _loops, out, out.itemsize, _bytes(plain), kind, clip, factor, limit, uniform
    )
    return _magnitude(most, kind), clipped


def _to_words(
    values: Numbers,
    out: npt.NDArray[Any],
    uniform: npt.NDArray[np.uint32],
    clip: float,
    factor: float,
    limit: int,
) -> tuple[float, int]:
    """The same in NumPy, to the bit. Every step on float64 is exact but the product.

    u is added to the fraction as an integer: a float64 as large as 2^29 has no room for it, nor one
    beside 1 for what a tiny negative number leaves.
    """
    scaled = _doubles(values)
    most = float(np.abs(scaled).max(initial=0.0))
    if not np.isfinite(most):
        return most, 0
    clipped = int(np.count_nonzero(np.abs(scaled) > clip))
    np.clip(scaled, -clip, clip, out=scaled)
    with np.errstate(over="ignore"):  # then it is cut
        scaled *= factor * 2.0**32
    np.clip(scaled, -limit * 2.0**32, limit * 2.0**32, out=scaled)
    np.floor(scaled, out=scaled)
    whole = np.floor(scaled * 2.0**-32)
    scaled -= whole * 2.0**32
    carries = (scaled.astype(np.uint64) + uniform) >> np.uint64(32)
    whole += carries
    out[:] = whole.astype(np.int64).astype(out.dtype)
    return most, clipped


def _doubles(values: Numbers) -> npt.NDArray[np.float64]:
    with np.errstate(invalid="ignore"):  # of a signalling NaN, which is found like any other
        return values.astype(np.float64)


def _plain(values: Numbers) -> Numbers:
    """The same numbers, contiguous and in this machine's byte order; a copy only where need be."""
    return np.ascontiguousarray(values, values.dtype.newbyteorder("="))


def _bytes(values: Numbers) -> memoryview:
    return values.view(np.uint8).data  # bfloat16 is no format that a buffer can tell


def _kind(values: Numbers) -> int:
    return KINDS.index(values.dtype.name)


def _magnitude(bits: int, kind: int) -> float:
    if KINDS[kind] == "bfloat16":
        return float(np.array(bits << 16, np.uint32).view(np.float32))
    name = KINDS[kind]
    return float(np.array(bits, f"u{np.dtype(name).itemsize}").view(name))


def _works(path: Path, on_purpose: bool = False) -> bool:
    """Whether a path runs here and gives the right words."""
    index = _INDEX[path]
    return kernel.supported(index) and _stands(
        str(path), kernel.faults(index, kernel.LOOPS - 1, on_purpose), lambda: _agrees(path)
    )


def _counts(loops: int, on_purpose: bool = False) -> bool:
    """Whether a set of loops over numbers runs here and gives NumPy's words."""
    return _stands(
        f"loops {loops}", kernel.faults(0, loops, on_purpose), lambda: _loops_agree(loops)
    )


def _stands(what: str, faults: bool, agrees: Callable[[], bool]) -> bool:
    if not faults and agrees():
        return True
    complaint = "dies of an illegal instruction" if faults else "gives wrong words"
    with contextlib.suppress(RuntimeWarning):  # where warnings are errors, too, this one is none
        warnings.warn(
            f"secagg: this processor reports the instructions of {what}, but our kernel "
            f"{complaint} there. Vectors are made more slowly, and right. Tell whoever runs the "
            "hypervisor.",
            RuntimeWarning,
            stacklevel=2,
        )
    return False


def _agrees(path: Path) -> bool:
    """Compare all that is done with a keystream with OpenSSL's, and with its own inverse."""
    key = Secret(bytes(range(16)))
    ready, stream = ReadyKeys([key]), read(MaskPrg.AES_128_CTR, key, 16 + _TRIED)[16:]
    residues = (np.frombuffer(stream, "<u8") >> np.uint64(10)).tobytes()  # none is drawn again
    filled = bytearray(_TRIED)
    kernel.fill(_INDEX[path], filled, 16, ready)
    right = filled == stream
    for kind, modulus, expected in (
        ("<u2", 0, stream),
        ("<u4", 0, stream),
        ("<u8", 0, stream),
        ("<u8", _MODULUS, residues),
    ):
        words = np.zeros(_TRIED // np.dtype(kind).itemsize, kind)
        start = 16 // words.itemsize
        expand(path, words, ready, b"\1", modulus=modulus, start=start)
        right &= words.tobytes() == expected
        expand(path, words, ready, b"\0", modulus=modulus, start=start)
        right &= not words.any()
    return right


def _loops_agree(loops: int) -> bool:
    """Compare a set of loops with NumPy, in all formats, with and without clipping."""
    singles = np.linspace(-1.5, 1.5, 70, dtype=np.float32)
    uniform = np.arange(70, dtype=np.uint32) * np.uint32(61356675)
    brains = singles.view(np.uint32) & np.uint32(0xFFFF0000)
    plain = (singles.astype(np.float16), singles, singles.astype(np.float64))
    given = [(values.view(np.uint8).data, values) for values in plain]
    halves = (brains >> np.uint32(16)).astype(np.uint16)
    given.append((halves.view(np.uint8).data, brains.view(np.float32)))
    right = True
    for kind, (data, values) in enumerate(given):
        right &= _magnitude(kernel.greatest(loops, data, kind), kind) == np.abs(values).max()
        for word, limit in (("<u2", 2**13), ("<u4", 2**29), ("<u8", 2**60)):
            for clip in (np.inf, 1.0):
                out, expected = np.zeros(70, word), np.zeros(70, word)
                factor = limit / 2
                kernel.to_words(loops, out, out.itemsize, data, kind, clip, factor, limit, uniform)
                _to_words(values, expected, uniform, clip, factor, limit)
                right &= np.array_equal(out, expected)
    return right


def _find() -> tuple[Path, ...]:
    found = [] if kernel is None else [path for path in Path if path in _INDEX and _works(path)]
    return (*found, Path.OPENSSL)


def _find_loops() -> int:
    """The best set of loops that can be trusted; the last is plain C."""
    last = 0 if kernel is None else kernel.LOOPS - 1
    return next((loops for loops in range(last) if _counts(loops)), last)


_available: Final = _find()
_loops: Final = _find_loops()
