"""Dealing, sealing and opening shares.

A dealer commits to every share under its signature, and the salt travels inside the box, so a
holder knows on opening whether it holds what the dealer signed, and the server knows on unmasking
whether it gets what the holder was dealt: a liar is named with certainty, by one hash.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from secagg.config import SiloId
from secagg.crypto.aead import KEY_BYTES, open_once, seal_once
from secagg.crypto.kdf import derive
from secagg.crypto.keys import KeyPair
from secagg.crypto.labels import CHANNEL_KEY, SHARE, digest, enc
from secagg.crypto.secret import Entropy, Secret
from secagg.crypto.shamir import SHARE_BYTES, parse_share, split
from secagg.errors import MalformedMessage
from secagg.masking.messages import SALT_BYTES, Commitment, RevealedShare, ShareKind


@dataclass(frozen=True, slots=True)
class HeldShares:
    """Both shares that one holder has of one owner's secrets. They never leave together."""

    owner: SiloId
    mask_key: Secret
    mask_key_salt: Secret
    self_seed: Secret
    self_seed_salt: Secret

    def reveal(self, kind: ShareKind) -> RevealedShare:
        """The one share that this attempt asks for."""
        if kind is ShareKind.SELF_SEED:
            return RevealedShare(self.owner, kind, self.self_seed, self.self_seed_salt)
        return RevealedShare(self.owner, kind, self.mask_key, self.mask_key_salt)

    def commitment(self, holder: SiloId, tau1: bytes) -> Commitment:
        """The dealer's commitment to these two shares."""
        return Commitment(
            holder,
            *(
                share_commitment(self.reveal(kind), holder, tau1)
                for kind in (ShareKind.MASK_KEY, ShareKind.SELF_SEED)
            ),
        )

    def pack(self) -> bytes:
        """The plaintext of a box."""
        parts = (self.mask_key, self.mask_key_salt, self.self_seed, self.self_seed_salt)
        return b"".join(part.reveal() for part in parts)

    @classmethod
    def unpack(cls, owner: SiloId, data: bytes) -> HeldShares:
        """Read the plaintext of a box.

        Raises:
            MalformedMessage: a share is no field element.
        """
        half = SHARE_BYTES + SALT_BYTES
        return cls(
            owner,
            parse_share(data[:SHARE_BYTES]),
            Secret(data[SHARE_BYTES:half]),
            parse_share(data[half : half + SHARE_BYTES]),
            Secret(data[half + SHARE_BYTES :]),
        )


def share_commitment(share: RevealedShare, holder: SiloId, tau1: bytes) -> bytes:
    """H("share", τ1, dealer, holder, kind, salt, share)."""
    names = (share.owner.encode(), holder.encode(), share.kind.encode())
    return digest(SHARE, tau1, *names, share.salt.reveal(), share.share.reveal())


def deal(
    owner: SiloId,
    mask_key: Secret,
    self_seed: Secret,
    holders: Sequence[SiloId],
    *,
    threshold: int,
    entropy: Entropy,
) -> dict[SiloId, HeldShares]:
    """Share both secrets among the holders, the owner included."""
    keys = split(mask_key, threshold=threshold, holders=len(holders), entropy=entropy)
    seeds = split(self_seed, threshold=threshold, holders=len(holders), entropy=entropy)
    return {
        holder: HeldShares(
            owner, key, Secret(entropy(SALT_BYTES)), seed, Secret(entropy(SALT_BYTES))
        )
        for holder, key, seed in zip(holders, keys, seeds, strict=True)
    }


def seal_shares(
    shares: HeldShares, channel: KeyPair, holder: SiloId, holder_key: bytes, tau1: bytes
) -> bytes:
    """Seal a holder's shares under the dealer's direction of their channel.

    Raises:
        MalformedMessage: the holder's channel key is a low-order point.
    """
    key = _box_key(channel, holder_key, shares.owner, holder, tau1)
    return seal_once(key, shares.pack(), enc(tau1, shares.owner.encode(), holder.encode()))


def open_shares(
    sealed: bytes,
    commitment: Commitment,
    *,
    channel: KeyPair,
    dealer: SiloId,
    dealer_key: bytes,
    tau1: bytes,
) -> HeldShares:
    """Open a dealer's box and hold what is in it against the dealer's commitment.

    Raises:
        MalformedMessage: the box does not open, or not to what the dealer committed to.
    """
    holder = commitment.holder
    key = _box_key(channel, dealer_key, dealer, holder, tau1)
    plaintext = open_once(key, sealed, enc(tau1, dealer.encode(), holder.encode()))
    shares = HeldShares.unpack(dealer, plaintext)
    if shares.commitment(holder, tau1) != commitment:  # CHECK: share-commitment
        raise MalformedMessage("share-commitment", "A share is not the one committed to.")
    return shares


def _box_key(
    channel: KeyPair, peer_key: bytes, sender: SiloId, recipient: SiloId, tau1: bytes
) -> Secret:
    return derive(
        channel.agree(peer_key),
        salt=tau1,
        label=CHANNEL_KEY,
        parties=(sender, recipient),
        size=KEY_BYTES,
    )
