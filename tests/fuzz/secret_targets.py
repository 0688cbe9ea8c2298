"""Keys, shares, sealed boxes, ciphertexts and vectors."""

from __future__ import annotations

import numpy as np

from secagg.ckks import formats, keyring, slots
from secagg.config import SiloId
from secagg.crypto import aead, keys, shamir, sign
from secagg.crypto.labels import CKKS_KEY, SIGN_TASK, WEIGHTS, digest
from secagg.errors import MalformedMessage
from secagg.masking.shares import HeldShares
from secagg.ring.vectors import PowerRing, PrimeRing, RunningSum
from secagg.suite import Suite

from . import fixed
from .target import Target

MALFORMED = (MalformedMessage,)
PAIR = formats.PairFormat(16, Suite.CKKS_54.parameters.modulus, (1, 2, 3, 4), 2.0**40)


def pair_bytes(value: bytes) -> bytes:
    """As SEAL would write it, but for the compression: in the NTT domain."""
    whole = bytearray(PAIR.before_words() + value)
    whole[48] = 1
    return bytes(whole)


def _keyring(data: bytes) -> keyring.Keyring:
    return keyring.Keyring.unpack(data + digest(CKKS_KEY, data), fixed.SESSION_ID)


def _rows(data: bytes) -> bytes:
    rows = np.frombuffer(data[: len(data) // 128 * 128], "<f8").reshape(-1, 16).copy()
    with np.errstate(all="ignore"):
        values = slots.released(rows, 3, 64)
    assert np.isfinite(values).all()
    return values.tobytes()


def _signature(data: bytes) -> None:
    sign.verify(data[:32], SIGN_TASK, bytes(32), b"body", data[32:])


def _blob(data: bytes) -> bytes:
    return bytes(keyring.open_blob(fixed.HELD, WEIGHTS, ("training",), data))


def _blob_bytes(value: bytes) -> bytes:
    return bytes(keyring.seal_blob(fixed.HELD, WEIGHTS, ("training",), value, bytes))


RINGS = (PowerRing(16), PowerRing(32), PowerRing(64), PrimeRing(Suite.CKKS_54.parameters.modulus))


def _vector(data: bytes) -> tuple[int, int, bytes]:
    """Which ring, how many words, the words: what a coordinator adds."""
    if len(data) < 2:
        raise MalformedMessage("vector-length", "No ring.")
    number, length = data[0] % len(RINGS), data[1]
    ring = RINGS[number]
    vector = ring.unpack(data[2:], length)
    total = RunningSum(ring, length)
    total.add(vector)
    assert bytes(ring.pack(total.total)) == data[2:]
    return number, length, data[2:]


SECRETS = {
    "seal-pair": Target(
        lambda data: PAIR.read(data).tobytes(), pair_bytes, MALFORMED, (formats.PairFormat.read,)
    ),
    "keys": Target(
        lambda data: keyring.unpack_keys(fixed.SESSION_ID, data),
        keyring.pack_keys,
        MALFORMED,
        (keyring.unpack_keys,),
    ),
    "keyring": Target(
        _keyring, lambda ring: ring.pack()[:-32], MALFORMED, (keyring.Keyring.unpack,)
    ),
    "opened-rows": Target(_rows, None, MALFORMED, (slots.released,)),
    "public-key": Target(keys.parse_public_key, bytes, MALFORMED, (keys.parse_public_key,)),
    "signature": Target(_signature, None, MALFORMED, (sign.verify,)),
    "share": Target(
        shamir.parse_share, lambda share: share.reveal(), MALFORMED, (shamir.parse_share,)
    ),
    "held-shares": Target(
        lambda data: HeldShares.unpack(SiloId("a"), data),
        lambda shares: shares.pack(),
        MALFORMED,
        (HeldShares.unpack,),
    ),
    "box": Target(
        lambda data: aead.open_once(fixed.KEY, data, b"for"),
        lambda plain: aead.seal_once(fixed.KEY, plain, b"for"),
        MALFORMED,
        (aead.open_once,),
    ),
    "long-box": Target(
        lambda data: bytes(aead.open_long(fixed.KEY, data, b"for")),
        lambda plain: bytes(aead.seal_long(fixed.KEY, plain, b"for")),
        MALFORMED,
        (aead.open_long,),
    ),
    "blob": Target(_blob, _blob_bytes, MALFORMED, (keyring.open_blob,)),
    "vector": Target(
        _vector,
        lambda value: bytes(value[:2]) + value[2],
        MALFORMED,
        (PowerRing.unpack,),
    ),
}
