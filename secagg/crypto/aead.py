"""AES-256-GCM for keys that seal exactly one message.

The nonce of a short message is fixed at zero. That is right here, and only here, because every key
comes from HKDF for one purpose under a transcript or salt of its own, and seals one message; GCM's
requirement is that no (key, nonce) pair is used twice (NIST SP 800-38D, section 8).

A long message, of any size, is sealed in segments by the STREAM construction, with nonce =
counter ‖ whether it is the last. The counter fixes each segment's place and the flag the message's
end, so segments cannot be dropped, repeated, swapped or added. The paper's nonce prefix is empty,
since the key is fresh.

Source: Hoang, Reyhanitabar, Rogaway and Vizár, Online Authenticated-Encryption and its Nonce-Reuse
Misuse-Resistance, CRYPTO 2015 (ePrint 2015/189), section 7.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, TypeAlias

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from secagg.crypto.secret import Secret
from secagg.errors import MalformedMessage

KEY_BYTES: Final = 32
TAG_BYTES: Final = 16
SEGMENT_BYTES: Final = 2**20
_ONCE: Final = bytes(12)

Buffer: TypeAlias = bytes | bytearray | memoryview


def seal_once(key: Secret, plaintext: bytes, associated: bytes) -> bytes:
    """Seal the one message of this key; the result is 16 bytes longer."""
    return AESGCM(key.reveal()).encrypt(_ONCE, plaintext, associated)


def open_once(key: Secret, box: bytes, associated: bytes) -> bytes:
    """Open the one message of this key.

    Raises:
        MalformedMessage: wrong key, altered box or other associated data.
    """
    try:
        return AESGCM(key.reveal()).decrypt(_ONCE, box, associated)
    except InvalidTag:
        # CHECK: box-authentication
        raise MalformedMessage("box-authentication", "A sealed box does not open.") from None


def seal_long(key: Secret, plaintext: Buffer, associated: bytes) -> bytearray:
    """Seal the one message of this key, however long.

    Args:
        key: 32 bytes, for this message and no other, short or long.
        plaintext: contiguous.
        associated: bound to every segment.

    Returns:
        16 bytes more for each started MiB of plaintext, at least 16.
    """
    cipher, sealed = AESGCM(key.reveal()), bytearray()
    for nonce, segment in _segments(plaintext, SEGMENT_BYTES):
        sealed += cipher.encrypt(nonce, segment, associated)
    return sealed


def open_long(key: Secret, box: Buffer, associated: bytes) -> bytearray:
    """Open the one long message of this key; nothing of it is returned unless all of it opens.

    Raises:
        MalformedMessage: wrong key or other associated data; a segment is altered, missing, added
            or in another place.
    """
    cipher, opened = AESGCM(key.reveal()), bytearray()
    try:
        for nonce, segment in _segments(box, SEGMENT_BYTES + TAG_BYTES):
            opened += cipher.decrypt(nonce, segment, associated)
    except InvalidTag:
        # CHECK: long-box-authentication
        raise MalformedMessage("box-authentication", "A long sealed box does not open.") from None
    return opened


def _segments(data: Buffer, size: int) -> Iterator[tuple[bytes, memoryview]]:
    """Cut data, with the nonce of each segment; empty data is one empty segment."""
    view = memoryview(data).cast("B")
    count = max(1, -(-len(view) // size))
    for number in range(1, count + 1):  # from 1: no segment has the zero nonce
        last = number == count
        yield number.to_bytes(11, "big") + bytes([last]), view[(number - 1) * size : number * size]
