"""Which masks a vector carries: the one formula that client and server share.

    y_i = x_i + PRG(self_i) + Σ_{j<i} PRG(pair ij) − Σ_{j>i} PRG(pair ij)

The lower id subtracts and the higher adds, so a pair's masks cancel in the sum.
Source: Bonawitz et al. 2017, section 4.0.1 and Fig. 4, round 2.
"""

from __future__ import annotations

from secagg.config import MaskPrg, SiloId
from secagg.crypto.kdf import derive
from secagg.crypto.keys import KeyPair
from secagg.crypto.labels import PAIR_STREAM, SELF_STREAM
from secagg.crypto.prg import key_bytes
from secagg.crypto.secret import Secret
from secagg.ring.expand import Mask


def self_mask(seed: Secret, owner: SiloId, tau1: bytes, prg: MaskPrg) -> Mask:
    """The mask that a silo adds from its self seed."""
    key = derive(seed, salt=tau1, label=SELF_STREAM, parties=(owner,), size=key_bytes(prg))
    return Mask(key, add=True)


def pair_mask(
    mask_key: KeyPair, owner: SiloId, peer: SiloId, peer_key: bytes, tau1: bytes, prg: MaskPrg
) -> Mask:
    """The mask that ``owner`` puts on for its pair with ``peer``.

    Raises:
        MalformedMessage: the peer's key is a low-order point.
    """
    lower, higher = sorted((owner, peer))
    key = derive(
        mask_key.agree(peer_key),
        salt=tau1,
        label=PAIR_STREAM,
        parties=(lower, higher),
        size=key_bytes(prg),
    )
    return Mask(key, add=peer < owner)
