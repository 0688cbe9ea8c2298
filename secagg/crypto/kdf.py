"""HKDF-SHA-256 with a transcript as salt and a label in the info."""

from __future__ import annotations

from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from secagg.crypto.labels import enc
from secagg.crypto.secret import Secret


def derive(
    secret: Secret, *, salt: bytes, label: str, parties: tuple[str, ...], size: int
) -> Secret:
    """Derive a key for one purpose and one ordered list of parties.

    Args:
        secret: the input keying material.
        salt: the transcript that the key belongs to; another transcript gives another key.
        label: the purpose, from ``secagg.crypto.labels``.
        parties: names, in the order that the purpose gives them.
        size: bytes of output, 1 to 8160.

    Source: RFC 5869; binding the key to its context in ``info`` as its section 3.2 advises.
    """
    info = enc(label.encode(), *(p.encode() for p in parties))
    return Secret(HKDF(SHA256(), size, salt, info).derive(secret.reveal()))
