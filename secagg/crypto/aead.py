"""AES-256-GCM for keys that seal exactly one message.

The nonce is fixed at zero. That is right here, and only here, because every key comes from HKDF
under the roster's transcript for one direction of one pair, and seals one box; GCM's requirement
is that no (key, nonce) pair is used twice (NIST SP 800-38D, section 8).
"""

from __future__ import annotations

from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from secagg.crypto.secret import Secret
from secagg.errors import MalformedMessage

KEY_BYTES: Final = 32
TAG_BYTES: Final = 16
_ONCE: Final = bytes(12)


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
        raise MalformedMessage("box-authentication", "A sealed box does not open.") from None
