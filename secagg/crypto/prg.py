"""Seekable keystreams: AES-128-CTR (the default) and ChaCha20.

Each key comes from HKDF and drives its own streams, told apart by a number, so every counter starts
at zero. A stream can be opened at any block, so any coordinate range of a mask can be expanded
alone.

Both go through ``cryptography``. Measured on a 2-core Xeon with VAES, one core, 256 KiB tiles, per
32-bit word: OpenSSL AES-128-CTR 0.40–0.50 ns, PyCryptodome's 0.83–1.18 ns; OpenSSL ChaCha20 0.67
ns, PyCryptodome's 3.3 ns. ``update_into`` releases the GIL in the versions we accept (two threads
did twice the work in 1.2 times the time), which was PyCryptodome's advantage before. So
PyCryptodome is not needed at run time; the tests use it as the independent second implementation.

Source: NIST SP 800-38A section 6.5 (CTR); RFC 8439 section 2.4 (ChaCha20).
"""

from __future__ import annotations

from typing import Final, Protocol

from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from secagg.config import MaskPrg
from secagg.crypto.secret import Secret

PADDING: Final = 16
"""Bytes that an output buffer must have beyond what is asked for (OpenSSL's contract)."""


class Stream(Protocol):
    """A running keystream: each call gives the next ``len(zeros)`` bytes."""

    def update_into(self, zeros: memoryview, out: memoryview, /) -> int:
        """Write the keystream for a buffer of zeros into ``out``; return the byte count."""
        ...


def key_bytes(prg: MaskPrg) -> int:
    """Key size of a generator: 16 for AES-128, 32 for ChaCha20."""
    return 16 if prg is MaskPrg.AES_128_CTR else 32


def block_bytes(prg: MaskPrg) -> int:
    """Block size of a generator, hence the grain at which it can be opened."""
    return 16 if prg is MaskPrg.AES_128_CTR else 64


def open_stream(prg: MaskPrg, key: Secret, block: int = 0, stream: int = 0) -> Stream:
    """Open a keystream of a single-use key at a block.

    Args:
        prg: the generator.
        key: ``key_bytes(prg)`` bytes.
        block: index of the first block, below 2^32 for ChaCha20 (256 GiB of stream).
        stream: which of the key's streams, below 2^64: the upper half of AES's counter, which the
            lower never reaches, or ChaCha20's nonce.
    """
    if prg is MaskPrg.AES_128_CTR:
        counter = modes.CTR((stream << 64 | block).to_bytes(16, "big"))
        return Cipher(algorithms.AES128(key.reveal()), counter).encryptor()
    nonce = block.to_bytes(4, "little") + stream.to_bytes(12, "little")
    return Cipher(algorithms.ChaCha20(key.reveal(), nonce), None).encryptor()


def read(prg: MaskPrg, key: Secret, size: int, start: int = 0) -> bytes:
    """Return ``size`` bytes of a keystream, from the one at ``start`` on."""
    block, skip = divmod(start, block_bytes(prg))
    out = bytearray(skip + size + PADDING)
    open_stream(prg, key, block).update_into(memoryview(bytes(skip + size)), memoryview(out))
    return bytes(out[skip : skip + size])
