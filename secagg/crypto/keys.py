"""X25519 key agreement with one accepted encoding per public key.

RFC 7748 section 5 has receivers mask the top bit and accept u ≥ p, so one key has several
encodings; a coordinator could use an alias to pass one key off as two. Here a public key is
canonical or no key, and the low-order points, which give every peer an all-zero shared secret, are
none either (section 6.1 has receivers refuse the secret; refusing the key names the sender).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey

from secagg.crypto.secret import Entropy, Secret
from secagg.errors import MalformedMessage

KEY_BYTES: Final = 32
_FIELD: Final = 2**255 - 19
_LOW_ORDER: Final = frozenset(
    {
        0,
        1,
        325606250916557431795983626356110631294008115727848805560023387167927233504,
        39382357235489614581723060781553021112529911719440698176882885853963445705823,
        _FIELD - 1,
    }
)  # Cheng's list in its canonical part: u of order 1, 2, 4 and 8 on the curve and its twist


def parse_public_key(data: bytes) -> bytes:
    """Return ``data`` if it is the canonical encoding of an X25519 public key.

    Raises:
        MalformedMessage: wrong length, top bit set, u ≥ 2^255 − 19, or a low-order point.
    """
    u = int.from_bytes(data, "little")
    if len(data) != KEY_BYTES or u >= _FIELD:  # CHECK: public-key-canonical
        raise MalformedMessage("public-key-encoding", "An X25519 public key is not canonical.")
    if u in _LOW_ORDER:  # CHECK: public-key-low-order
        # CHECK: agreed-zero
        raise MalformedMessage("public-key-low-order", "An X25519 key is a low-order point.")
    return bytes(data)


@dataclass(frozen=True, slots=True)
class KeyPair:
    """An X25519 key pair; ``public`` is canonical by construction.

    OpenSSL's handle is kept: making one multiplies the base point, and takes as long as agreeing.
    """

    private: Secret
    public: bytes
    _handle: X25519PrivateKey = field(repr=False, compare=False)

    @classmethod
    def generate(cls, entropy: Entropy) -> KeyPair:
        """Draw a fresh pair from 32 bytes of entropy."""
        return cls.from_private(Secret(entropy(KEY_BYTES)))

    @classmethod
    def from_private(cls, private: Secret) -> KeyPair:
        """Rebuild the pair from its 32-byte private half."""
        key = X25519PrivateKey.from_private_bytes(private.reveal())
        return cls(private, key.public_key().public_bytes_raw(), key)

    def agree(self, peer: bytes) -> Secret:
        """Return the 32-byte shared secret with a canonical public key.

        Raises:
            MalformedMessage: the peer's key is a low-order point.
        """
        try:
            return Secret(self._handle.exchange(X25519PublicKey.from_public_bytes(peer)))
        except ValueError:  # OpenSSL refuses the all-zero secret
            raise MalformedMessage(
                "public-key-low-order", "An X25519 public key is a low-order point."
            ) from None
