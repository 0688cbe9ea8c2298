"""SEAL's serialised polynomials, to and from words of 64 bits.

TenSEAL gives no buffer of a polynomial, only SEAL's own files. A file is a header of 16 bytes and
a body, here compressed by Zstandard (what SEAL saves) or not at all (what we write, and SEAL loads
as well):

    header      magic 0xA15E u16, header bytes u8, version major u8, minor u8, compression u8,
                reserved u16, size of the whole file u64
    fields      of a plaintext in the NTT domain: parms id 4 × u64, coefficients u64, scale f64
                of a ciphertext: parms id 4 × u64, whether in the NTT domain u8, polynomials u64,
                N u64, primes u64, scale f64, correction factor u64
    header      of the inner array, never compressed
    words       their number u64, then each u64, polynomial by polynomial

Plaintexts are only written: SEAL decodes them. Ciphertexts are pairs of polynomials, written as
coefficients and read when SEAL has transformed them. All of it is little-endian. The files come
from a library in this process, not from a peer; every field is checked all the same, since a
library that wrote something else would make wrong sums.

Source: Microsoft SEAL 4, manual section "Serialization", and the bytes that it writes (pinned in
the tests).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

import numpy as np

from secagg.errors import MalformedMessage
from secagg.ring.vectors import Vector

if TYPE_CHECKING:
    from zstandard import ZstdDecompressor

VERSION: Final = (4, 3)
"""The SEAL whose files these are."""
_HEADER: Final = struct.Struct("<HBBBBHQ")
_PLAINTEXT: Final = struct.Struct("<4QQd")
_PAIR: Final = struct.Struct("<4QB3QdQ")
_COUNT: Final = struct.Struct("<Q")
_MAGIC: Final = 0xA15E
_NONE: Final = 0
_ZSTD: Final = 2


def _decompressor() -> ZstdDecompressor:
    import zstandard

    return zstandard.ZstdDecompressor()


def before_plaintext(degree: int, parms_id: tuple[int, ...], scale: float) -> bytes:
    """What a file of a plaintext in the NTT domain holds before its N words, which end it.

    Args:
        degree: N.
        parms_id: SEAL's hash of the parameters, four words.
        scale: what values were multiplied by.
    """
    return _before(_PLAINTEXT.pack(*parms_id, degree, scale), degree)


@dataclass(frozen=True, slots=True)
class PairFormat:
    """Files of two polynomials, written as coefficients, read in the NTT domain.

    Args:
        degree: N.
        modulus: q, below 2^64.
        parms_id: SEAL's hash of the parameters, four words.
        scale: what values were multiplied by.
        decompressor: kept, since making one costs more than its use; not for two threads at once.
    """

    degree: int
    modulus: int
    parms_id: tuple[int, ...]
    scale: float
    decompressor: ZstdDecompressor = field(default_factory=_decompressor, repr=False, compare=False)

    @property
    def words(self) -> int:
        """Words of a file."""
        return 2 * self.degree

    @property
    def body_size(self) -> int:
        """Bytes after the outer header, uncompressed."""
        return _PAIR.size + _inner_size(self.words)

    def before_words(self) -> bytes:
        """What an uncompressed file of coefficients holds before its words, which end it."""
        fields = _PAIR.pack(*self.parms_id, False, 2, self.degree, 1, self.scale, 1)
        return _before(fields, self.words)

    def read(self, data: bytes) -> Vector:
        """Return the residues of a file.

        Args:
            data: the whole file.

        Returns:
            All words, read-only, each below q.

        Raises:
            MalformedMessage: the first field that is not as it must be: ``seal-header``,
                ``seal-version``, ``seal-compression``, ``seal-length``, ``seal-parameters``,
                ``seal-domain``, ``seal-degree``, ``seal-scale`` or ``seal-residue``.
        """
        body = self._uncompressed(data)
        self._check_fields(body)
        inner = body[_PAIR.size :]
        # CHECK: seal-inner-compression
        _check(_read_header(inner) == _NONE, "seal-compression", "a compressed inner array")
        (count,) = _COUNT.unpack_from(inner, _HEADER.size)
        _check(count == self.words, "seal-degree", "another number of words")  # CHECK: seal-words
        words = np.frombuffer(inner, "<u8", offset=_HEADER.size + _COUNT.size)
        # CHECK: seal-residue
        _check(int(words.max()) < self.modulus, "seal-residue", "a word that is no residue")
        return words

    def _uncompressed(self, data: bytes) -> memoryview:
        compression = _read_header(data)
        # CHECK: seal-compression
        _check(compression in (_NONE, _ZSTD), "seal-compression", "an unknown compression")
        body = memoryview(data)[_HEADER.size :]
        if compression == _ZSTD:
            body = memoryview(self._unzip(body))
        # CHECK: seal-body-length
        _check(len(body) == self.body_size, "seal-length", "another length")
        return body

    def _unzip(self, data: memoryview) -> bytes:
        """Decompress one frame that says how much it holds, so that no more can be allocated."""
        import zstandard

        try:
            size = zstandard.frame_content_size(data)
            # CHECK: seal-unzipped-length
            _check(size == self.body_size, "seal-length", "another length")
            return self.decompressor.decompress(data, allow_extra_data=False)
        except zstandard.ZstdError:
            raise MalformedMessage(
                "seal-compression", "A file of SEAL cannot be unzipped."
            ) from None

    def _check_fields(self, body: memoryview) -> None:
        *parms_id, domain, polynomials, degree, primes, scale, factor = _PAIR.unpack_from(body)
        # CHECK: seal-parameters
        _check(tuple(parms_id) == self.parms_id, "seal-parameters", "other parameters")
        # CHECK: seal-domain
        _check(domain == 1, "seal-domain", "coefficients where residues of the NTT must be")
        right = (polynomials, degree, primes) == (2, self.degree, 1)
        # CHECK: seal-degree
        _check(right, "seal-degree", "another number of polynomials, coefficients or primes")
        # CHECK: seal-scale
        _check((scale, factor) == (self.scale, 1), "seal-scale", "another scale")


def _before(fields: bytes, words: int) -> bytes:
    inner = _inner_size(words)
    outer = _header(_HEADER.size + len(fields) + inner)
    return outer + fields + _header(inner) + _COUNT.pack(words)


def _inner_size(words: int) -> int:
    return _HEADER.size + _COUNT.size + 8 * words


def _header(size: int) -> bytes:
    return _HEADER.pack(_MAGIC, _HEADER.size, *VERSION, _NONE, 0, size)


def _read_header(data: bytes | memoryview) -> int:
    """Check a header against the bytes that it begins, and return the compression."""
    _check(len(data) >= _HEADER.size, "seal-length", "no whole header")  # CHECK: seal-header-length
    magic, header, major, minor, compression, reserved, size = _HEADER.unpack_from(data)
    right = (magic, header, reserved) == (_MAGIC, _HEADER.size, 0)
    _check(right, "seal-header", "no header of SEAL")  # CHECK: seal-header
    # CHECK: seal-version
    _check((major, minor) == VERSION, "seal-version", f"version {major}.{minor} of SEAL")
    _check(size == len(data), "seal-length", "another length than it says")  # CHECK: seal-length
    return int(compression)


def _check(right: bool, code: str, what: str) -> None:
    if not right:
        raise MalformedMessage(code, f"A file of SEAL has {what}.")
