"""The messages of an attempt: parsed, not yet believed.

A value of these types has the right sizes, names and order; whether its signature, its transcript
and its place in the protocol are right is for ``client`` and ``server`` to say. ``body()`` gives
the bytes that a signature covers, ``digest()`` what a transcript holds of a message.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from typing import Final

from secagg.config import MAX_COHORT, SiloId, is_name
from secagg.crypto.aead import TAG_BYTES
from secagg.crypto.keys import parse_public_key
from secagg.crypto.labels import BOXES, COMMIT, COMMITMENTS, digest, enc, u32, u64
from secagg.crypto.secret import Secret
from secagg.crypto.shamir import SHARE_BYTES
from secagg.crypto.sign import SIGNATURE_BYTES
from secagg.errors import MalformedMessage
from secagg.suite import KeyName

HASH_BYTES: Final = 32
SALT_BYTES: Final = 32
SEED_BYTES: Final = 32
BOX_BYTES: Final = 2 * (SHARE_BYTES + SALT_BYTES) + TAG_BYTES


def _check_size(what: str, data: bytes, size: int) -> None:
    if len(data) != size:  # CHECK: message-size
        raise MalformedMessage("message-size", f"A {what} has {len(data)} bytes, not {size}.")


def _check_id(name: str) -> None:
    if not is_name(name):  # CHECK: message-name
        raise MalformedMessage("message-name", "A message names nobody who could be a member.")


def _check_order(what: str, names: Sequence[str]) -> None:
    if len(names) > MAX_COHORT or list(names) != sorted(set(names)):  # CHECK: message-order
        raise MalformedMessage("message-order", f"A list of {what} is not sorted and distinct.")
    for name in names:
        _check_id(name)  # CHECK: message-order-names


def _check_number(what: str, value: int, least: int = 1) -> None:
    if not least <= value < 2**32:  # CHECK: message-number
        raise MalformedMessage("message-number", f"{what} = {value} is out of range.")


@dataclass(frozen=True, slots=True)
class Descriptor:
    """Phase 0, coordinator to cohort: what this attempt is.

    ``key`` names the key that updates are sealed under, in a session that seals them.
    """

    session_id: bytes
    session_hash: bytes
    manifest_version: int
    manifest_digest: bytes
    task: str
    round: int
    attempt: int
    nonce: bytes
    cohort: tuple[SiloId, ...]
    threshold: int
    base: bytes
    signature: bytes
    key: KeyName | None = None

    def __post_init__(self) -> None:
        for what, value in (
            ("session id", self.session_id),
            ("session hash", self.session_hash),
            ("manifest digest", self.manifest_digest),
            ("nonce", self.nonce),
            ("base", self.base),
        ):
            _check_size(what, value, HASH_BYTES)  # CHECK: descriptor-hash-sizes
        # CHECK: descriptor-signature-size
        _check_size("signature", self.signature, SIGNATURE_BYTES)
        _check_id(self.task)  # CHECK: descriptor-task-name
        _check_order("cohort members", self.cohort)  # CHECK: descriptor-cohort-order
        _check_number("round", self.round)  # CHECK: descriptor-round-number
        _check_number("attempt", self.attempt)  # CHECK: descriptor-attempt-number
        _check_number("threshold", self.threshold)  # CHECK: descriptor-threshold-number
        # CHECK: descriptor-manifest-number
        _check_number("manifest version", self.manifest_version)


@dataclass(frozen=True, slots=True)
class AdvertiseKeys:
    """Phase 1, over τ0: fresh public keys, and a hash that pins the self seed."""

    sender: SiloId
    channel_key: bytes
    mask_key: bytes
    self_seed_hash: bytes
    signature: bytes

    def __post_init__(self) -> None:
        _check_id(self.sender)  # CHECK: advert-sender
        parse_public_key(self.channel_key)  # CHECK: advert-channel-key
        parse_public_key(self.mask_key)  # CHECK: advert-mask-key
        # CHECK: advert-seed-hash-size
        _check_size("self seed hash", self.self_seed_hash, HASH_BYTES)
        _check_size("signature", self.signature, SIGNATURE_BYTES)  # CHECK: advert-signature-size

    def body(self) -> bytes:
        """What the signature covers."""
        return enc(self.sender.encode(), self.channel_key, self.mask_key, self.self_seed_hash)


@dataclass(frozen=True, slots=True)
class Roster:
    """Coordinator to U1: every advert as it was signed."""

    adverts: tuple[AdvertiseKeys, ...]

    def __post_init__(self) -> None:
        _check_order("adverts", [advert.sender for advert in self.adverts])  # CHECK: roster-order


@dataclass(frozen=True, slots=True)
class Commitment:
    """A dealer's commitments to one holder's two shares."""

    holder: SiloId
    mask_key: bytes
    self_seed: bytes

    def __post_init__(self) -> None:
        _check_id(self.holder)  # CHECK: commitment-holder
        # CHECK: commitment-mask-key-size
        _check_size("share commitment", self.mask_key, HASH_BYTES)
        # CHECK: commitment-self-seed-size
        _check_size("share commitment", self.self_seed, HASH_BYTES)


@dataclass(frozen=True, slots=True)
class Box:
    """Shares sealed for one holder."""

    recipient: SiloId
    sealed: bytes

    def __post_init__(self) -> None:
        _check_id(self.recipient)  # CHECK: box-recipient
        _check_size("box", self.sealed, BOX_BYTES)  # CHECK: box-size


class Commitments(tuple[Commitment, ...]):
    """A dealer's commitments, by holder: in order, checked and hashed once.

    Every holder is told every dealer's, so a server has n² uses of each list.
    """

    def __new__(cls, commitments: Iterable[Commitment]) -> Commitments:
        if isinstance(commitments, cls):
            return commitments
        made = super().__new__(cls, commitments)
        # CHECK: commitments-order
        _check_order("commitments", [commitment.holder for commitment in made])
        return made

    @cached_property
    def of(self) -> Mapping[SiloId, Commitment]:
        """Each holder's."""
        return {commitment.holder: commitment for commitment in self}

    @cached_property
    def digest(self) -> bytes:
        """Digest of the list."""
        return digest(COMMITMENTS, *(enc(c.holder.encode(), c.mask_key, c.self_seed) for c in self))


def share_keys_body(dealer: SiloId, commitments: bytes, boxes: bytes) -> bytes:
    """What a dealer's signature covers, from the digests of its lists."""
    return enc(dealer.encode(), commitments, boxes)


@dataclass(frozen=True, slots=True)
class ShareKeys:
    """Phase 2, over τ1: sealed shares, and commitments to all, the dealer's own included."""

    sender: SiloId
    commitments: Commitments
    boxes: tuple[Box, ...]
    signature: bytes

    def __post_init__(self) -> None:
        _check_id(self.sender)  # CHECK: dealer-sender
        object.__setattr__(self, "commitments", Commitments(self.commitments))
        _check_order("boxes", [box.recipient for box in self.boxes])  # CHECK: boxes-order
        # CHECK: share-keys-signature-size
        _check_size("signature", self.signature, SIGNATURE_BYTES)

    def boxes_digest(self) -> bytes:
        """Digest of all boxes."""
        return digest(BOXES, *(enc(box.recipient.encode(), box.sealed) for box in self.boxes))

    def body(self) -> bytes:
        """What the signature covers."""
        return share_keys_body(self.sender, self.commitments.digest, self.boxes_digest())


@dataclass(frozen=True, slots=True)
class Dealing:
    """One dealer's ShareKeys as one holder sees it: its own box, and a digest of all of them."""

    dealer: SiloId
    commitments: Commitments
    boxes_digest: bytes
    sealed: bytes | None
    signature: bytes

    def __post_init__(self) -> None:
        _check_id(self.dealer)  # CHECK: dealing-dealer
        object.__setattr__(self, "commitments", Commitments(self.commitments))
        _check_size("boxes digest", self.boxes_digest, HASH_BYTES)  # CHECK: dealing-digest-size
        if self.sealed is not None:
            _check_size("box", self.sealed, BOX_BYTES)  # CHECK: dealing-box-size
        _check_size("signature", self.signature, SIGNATURE_BYTES)  # CHECK: dealing-signature-size

    def body(self) -> bytes:
        """What the dealer's signature covers."""
        return share_keys_body(self.dealer, self.commitments.digest, self.boxes_digest)


@dataclass(frozen=True, slots=True)
class Dealt:
    """Coordinator to one member of U2: the dealings of all of U2."""

    dealings: tuple[Dealing, ...]

    def __post_init__(self) -> None:
        # CHECK: dealings-order
        _check_order("dealings", [dealing.dealer for dealing in self.dealings])


@dataclass(frozen=True, slots=True)
class MaskedInput:
    """Phase 3, over τ2: the commit to an uploaded vector, and complaints about dealers.

    ``seed`` is the public seed of c1, where the vector is a sealed one; empty elsewhere.
    """

    sender: SiloId
    vector_digest: bytes
    bad_dealers: tuple[SiloId, ...]
    signature: bytes
    seed: bytes = b""

    def __post_init__(self) -> None:
        _check_id(self.sender)  # CHECK: commit-sender
        _check_size("vector digest", self.vector_digest, HASH_BYTES)  # CHECK: commit-digest-size
        _check_order("bad dealers", self.bad_dealers)  # CHECK: complaint-order
        _check_size("signature", self.signature, SIGNATURE_BYTES)  # CHECK: commit-signature-size
        if self.seed:
            _check_size("seed", self.seed, SEED_BYTES)  # CHECK: commit-seed-size

    def body(self) -> bytes:
        """What the signature covers."""
        bad = enc(*(name.encode() for name in self.bad_dealers))
        seed = [self.seed] if self.seed else []
        return enc(self.sender.encode(), self.vector_digest, bad, *seed)

    def digest(self) -> bytes:
        """What τ3 holds of this commit."""
        return digest(COMMIT, self.body())


@dataclass(frozen=True, slots=True)
class Survivors:
    """Coordinator to U3: the signed commits that are in the sum."""

    commits: tuple[MaskedInput, ...]

    def __post_init__(self) -> None:
        # CHECK: survivors-order
        _check_order("survivors", [commit.sender for commit in self.commits])


@dataclass(frozen=True, slots=True)
class Consistency:
    """Phase 4: a signature over τ3 alone."""

    sender: SiloId
    signature: bytes

    def __post_init__(self) -> None:
        _check_id(self.sender)  # CHECK: consistency-sender
        # CHECK: consistency-signature-size
        _check_size("signature", self.signature, SIGNATURE_BYTES)

    def body(self) -> bytes:
        """What the signature covers, beside τ3."""
        return self.sender.encode()


@dataclass(frozen=True, slots=True)
class Signatures:
    """Coordinator to U4: the signatures over τ3."""

    signed: tuple[Consistency, ...]

    def __post_init__(self) -> None:
        if len(self.signed) > MAX_COHORT:  # CHECK: signatures-length
            raise MalformedMessage("message-order", "A list of signatures is too long.")


class ShareKind(StrEnum):
    """Which secret a share is of. A reveal holds one kind per owner and cannot hold both."""

    SELF_SEED = "self-seed"
    MASK_KEY = "mask-key"


@dataclass(frozen=True, slots=True)
class RevealedShare:
    """One share, with the salt that opens its commitment."""

    owner: SiloId
    kind: ShareKind
    share: Secret
    salt: Secret

    def __post_init__(self) -> None:
        _check_id(self.owner)  # CHECK: revealed-owner
        _check_size("share", self.share.reveal(), SHARE_BYTES)  # CHECK: revealed-share-size
        _check_size("salt", self.salt.reveal(), SALT_BYTES)  # CHECK: revealed-salt-size


@dataclass(frozen=True, slots=True)
class Unmasking:
    """Phase 5, over τ3: per owner a share of its self seed *or* of its mask key.

    Sorted by owner and distinct, so there is no way to write down both shares of one silo.
    """

    sender: SiloId
    shares: tuple[RevealedShare, ...]
    signature: bytes

    def __post_init__(self) -> None:
        _check_id(self.sender)  # CHECK: unmasking-sender
        # CHECK: revealed-order
        _check_order("revealed shares", [share.owner for share in self.shares])
        _check_size("signature", self.signature, SIGNATURE_BYTES)  # CHECK: unmasking-signature-size

    def body(self) -> bytes:
        """What the signature covers."""
        return enc(
            self.sender.encode(),
            *(
                enc(s.owner.encode(), s.kind.encode(), s.share.reveal(), s.salt.reveal())
                for s in self.shares
            ),
        )


@dataclass(frozen=True, slots=True)
class Result:
    """Phase 6, coordinator to everybody, over τ4: whose sum it is, and its digest.

    A sum of sealed updates says what opens it: the key's name, and the survivors' seeds of c1 in
    the order of their names.
    """

    task: str
    round: int
    base: bytes
    cohort: tuple[SiloId, ...]
    survivors: tuple[SiloId, ...]
    survivors_transcript: bytes
    vector_digest: bytes
    signature: bytes
    key: KeyName | None = None
    seeds: tuple[bytes, ...] = ()

    def __post_init__(self) -> None:
        _check_id(self.task)  # CHECK: result-task-name
        _check_number("round", self.round)  # CHECK: result-round-number
        _check_size("base", self.base, HASH_BYTES)  # CHECK: result-base-size
        _check_order("cohort members", self.cohort)  # CHECK: result-cohort-order
        _check_order("survivors", self.survivors)  # CHECK: result-survivors-order
        # CHECK: result-transcript-size
        _check_size("transcript", self.survivors_transcript, HASH_BYTES)
        _check_size("vector digest", self.vector_digest, HASH_BYTES)  # CHECK: result-digest-size
        _check_size("signature", self.signature, SIGNATURE_BYTES)  # CHECK: result-signature-size
        # CHECK: result-seeds
        if len(self.seeds) != (0 if self.key is None else len(self.survivors)):
            raise MalformedMessage("result-seeds", "A sealed sum has one seed for each survivor.")
        for seed in self.seeds:
            _check_size("seed", seed, SEED_BYTES)  # CHECK: result-seed-size

    def body(self) -> bytes:
        """What the signature covers, beside τ4."""
        return enc(
            self.task.encode(),
            u64(self.round),
            self.base,
            enc(*(name.encode() for name in self.cohort)),
            enc(*(name.encode() for name in self.survivors)),
            *key_items(self.key),
            *self.seeds,
        )


def key_items(key: KeyName | None) -> tuple[bytes, ...]:
    """What is hashed of a key's name: nothing where there is none."""
    return () if key is None else (u64(key.epoch), key.key_id)


def descriptor_items(descriptor: Descriptor) -> tuple[bytes, ...]:
    """What τ0 holds, in order."""
    return (
        descriptor.session_id,
        descriptor.session_hash,
        u64(descriptor.manifest_version),
        descriptor.manifest_digest,
        descriptor.task.encode(),
        u64(descriptor.round),
        u64(descriptor.attempt),
        descriptor.nonce,
        enc(*(name.encode() for name in descriptor.cohort)),
        u32(descriptor.threshold),
        descriptor.base,
        *key_items(descriptor.key),
    )
