"""Rebuilding what the survivors' shares allow, and no more: the server's side of unmasking.

For a survivor the self seed is rebuilt and checked against the hash in its advert; for an orphan
(shared its keys, did not survive) the mask key, checked against its advertised public key. Shares
that all match their commitments and still rebuild a wrong secret convict the dealer, which
committed to them.
"""

from __future__ import annotations

from collections.abc import Mapping

from secagg.config import MaskPrg, SiloId
from secagg.crypto.keys import KeyPair
from secagg.crypto.labels import SELF_SEED, digest
from secagg.crypto.secret import Secret
from secagg.crypto.shamir import basis
from secagg.errors import MalformedMessage
from secagg.masking.graph import holders, neighbours
from secagg.masking.masks import pair_mask, self_mask
from secagg.masking.messages import AdvertiseKeys
from secagg.ring.expand import Mask


def rebuild(
    owner: SiloId, shares: Mapping[SiloId, Secret], roster: tuple[SiloId, ...], threshold: int
) -> Secret:
    """Rebuild one secret of ``owner`` from shares by holder.

    Args:
        owner: whose secret.
        shares: at least ``threshold`` shares that opened their commitments.
        roster: U1, sorted; gives each holder its point.
        threshold: t.

    Raises:
        MalformedMessage: the shares are of no one secret.
    """
    points = {holder: rank for rank, holder in enumerate(holders(roster, owner), start=1)}
    chosen = sorted(shares, key=points.__getitem__)[:threshold]
    at = {points[holder]: shares[holder] for holder in chosen}
    return basis(tuple(at)).combine(at)


def survivor_mask(advert: AdvertiseKeys, seed: Secret, tau1: bytes, prg: MaskPrg) -> Mask:
    """The mask to take off for a survivor.

    Raises:
        MalformedMessage: the seed is not the one that the advert pinned.
    """
    if digest(SELF_SEED, seed.reveal()) != advert.self_seed_hash:  # CHECK: rebuilt-seed
        raise MalformedMessage("rebuilt-seed", "A rebuilt self seed is not the advertised one.")
    return self_mask(seed, advert.sender, tau1, prg).inverse()


def orphan_masks(
    advert: AdvertiseKeys,
    key: Secret,
    adverts: Mapping[SiloId, AdvertiseKeys],
    survivors: tuple[SiloId, ...],
    tau1: bytes,
    prg: MaskPrg,
) -> list[Mask]:
    """The masks that an orphan's missing vector would have cancelled.

    Raises:
        MalformedMessage: the key is not the advertised one's private half.
    """
    pair = KeyPair.from_private(key)
    if pair.public != advert.mask_key:  # CHECK: rebuilt-key
        raise MalformedMessage("rebuilt-key", "A rebuilt mask key is not the advertised one.")
    shared = set(neighbours(tuple(adverts), advert.sender)) & set(survivors)
    return [
        pair_mask(pair, advert.sender, peer, adverts[peer].mask_key, tau1, prg)
        for peer in sorted(shared)
    ]
