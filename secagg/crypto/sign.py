"""Ed25519 identity keys that sign a type, a transcript and a body, never bare bytes.

A signature for one message type, attempt or session is worthless for any other, since all three
are under it. OpenSSL's verification refuses s ≥ L, so a signature cannot be altered into a second
valid one (RFC 8032 section 5.1.7).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from secagg.crypto.labels import BODY, PREFIX, digest, enc
from secagg.crypto.secret import Entropy, Secret
from secagg.errors import MalformedMessage

KEY_BYTES: Final = 32
SIGNATURE_BYTES: Final = 64


def _signed_bytes(kind: str, transcript: bytes, body: bytes) -> bytes:
    return enc(PREFIX + b"sig/" + kind.encode(), transcript, digest(BODY, body))


@dataclass(frozen=True, slots=True)
class IdentityKey:
    """A long-lived Ed25519 signing key; it never leaves the machine that made it."""

    private: Secret
    public: bytes

    @classmethod
    def generate(cls, entropy: Entropy) -> IdentityKey:
        """Draw a fresh key from 32 bytes of entropy."""
        return cls.from_private(Secret(entropy(KEY_BYTES)))

    @classmethod
    def from_private(cls, private: Secret) -> IdentityKey:
        """Load a key from its 32-byte seed."""
        key = Ed25519PrivateKey.from_private_bytes(private.reveal())
        return cls(private, key.public_key().public_bytes_raw())

    def sign(self, kind: str, transcript: bytes, body: bytes) -> bytes:
        """Sign (type, transcript, body); 64 bytes."""
        key = Ed25519PrivateKey.from_private_bytes(self.private.reveal())
        return key.sign(_signed_bytes(kind, transcript, body))


def verify(public: bytes, kind: str, transcript: bytes, body: bytes, signature: bytes) -> None:
    """Return if ``signature`` is ``public``'s on (type, transcript, body).

    Raises:
        MalformedMessage: it is not. The caller knows whose message it was.
    """
    try:
        key = Ed25519PublicKey.from_public_bytes(public)
        key.verify(signature, _signed_bytes(kind, transcript, body))  # CHECK: signature
    except (InvalidSignature, ValueError):
        raise MalformedMessage("signature", f"A {kind} signature does not verify.") from None
