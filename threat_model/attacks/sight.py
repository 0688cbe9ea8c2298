"""What a coordinator has seen of an attempt, what it can say, and what it can compute from that.

The adversary's arithmetic: it uses only what was sent, and what colluders hold. Whoever plays an
attempt fills it in: over the wire (``attempt``), or with functions in one process (tests/threats).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from secagg.config import SessionConfig, SiloId, silo_id
from secagg.crypto.keys import KeyPair
from secagg.crypto.labels import SIGN_CONSISTENCY, SIGN_DESCRIPTOR
from secagg.crypto.secret import Secret
from secagg.crypto.sign import IdentityKey
from secagg.masking import transcript
from secagg.masking.graph import neighbours
from secagg.masking.masks import pair_mask, self_mask
from secagg.masking.messages import (
    AdvertiseKeys,
    Consistency,
    Dealing,
    Dealt,
    Descriptor,
    MaskedInput,
    Roster,
    ShareKeys,
    ShareKind,
    Survivors,
    Unmasking,
)
from secagg.masking.shares import HeldShares
from secagg.masking.unmask import orphan_masks, rebuild, survivor_mask
from secagg.ring.expand import Mask, apply_masks
from secagg.ring.vectors import RunningSum, Vector, ring_of

SEED, KEY = ShareKind.SELF_SEED, ShareKind.MASK_KEY


class Sight(ABC):
    """One attempt as the coordinator knows it.

    Args:
        session: its configuration.
        task: the attempt's.
        coordinator: its signing key.

    Attributes:
        descriptor: signed, once there is one.
        adverts, dealings, commits: as silos sent them.
        uploads: masked vectors.
        reveals: what was revealed.
    """

    descriptor: Descriptor

    def __init__(self, session: SessionConfig, task: str, coordinator: IdentityKey) -> None:
        self.session = session
        self.ring = ring_of(session, task)
        self._coordinator = coordinator
        self.adverts: dict[SiloId, AdvertiseKeys] = {}
        self.dealings: dict[SiloId, ShareKeys] = {}
        self.commits: dict[SiloId, MaskedInput] = {}
        self.uploads: dict[SiloId, Vector] = {}
        self.reveals: list[Unmasking] = []

    @abstractmethod
    def identity_of(self, colluder: SiloId) -> IdentityKey:
        """A colluder's signing key."""

    @abstractmethod
    def held_by(self, colluder: SiloId) -> Mapping[SiloId, HeldShares]:
        """The shares that a colluder holds, by owner."""

    # What it can say.

    def signed(self, descriptor: Descriptor, **changes: object) -> Descriptor:
        """A descriptor with these changes, signed by the coordinator."""
        changed = replace(descriptor, **changes)  # type: ignore[arg-type]
        tau0 = transcript.round_transcript(changed)
        return replace(changed, signature=self._coordinator.sign(SIGN_DESCRIPTOR, tau0, b""))

    @property
    def roster(self) -> Roster:
        """Every advert, as it was signed."""
        return Roster(tuple(self.adverts[name] for name in sorted(self.adverts)))

    def dealt(self, holder: SiloId, dealers: Iterable[str] | None = None) -> Dealt:
        """What one holder gets of these dealers' shares (of everybody's)."""
        names = [silo_id(name) for name in sorted(dealers or self.dealings)]
        return Dealt(
            tuple(
                Dealing(
                    name,
                    self.dealings[name].commitments,
                    self.dealings[name].boxes_digest(),
                    self.box(name, holder),
                    self.dealings[name].signature,
                )
                for name in names
            )
        )

    def box(self, dealer: SiloId, holder: SiloId) -> bytes | None:
        """A dealer's box for a holder."""
        boxes = {box.recipient: box.sealed for box in self.dealings[dealer].boxes}
        return boxes.get(holder)

    def survivors(self, *names: str) -> Survivors:
        """These silos' commits, as they were signed."""
        return Survivors(tuple(self.commits[silo_id(name)] for name in sorted(names)))

    def forge(self, colluder: str, survivors: Survivors) -> Consistency:
        """A colluder's signature over any survivors."""
        name = silo_id(colluder)
        body = Consistency(name, bytes(64)).body()
        tau3 = transcript.survivors_transcript(self.tau2, survivors.commits)
        return Consistency(name, self.identity_of(name).sign(SIGN_CONSISTENCY, tau3, body))

    # What it can compute.

    @property
    def tau1(self) -> bytes:
        """τ1."""
        tau0 = transcript.round_transcript(self.descriptor)
        return transcript.roster_transcript(tau0, self.roster.adverts)

    @property
    def tau2(self) -> bytes:
        """τ2."""
        bodies = {name: message.body() for name, message in sorted(self.dealings.items())}
        return transcript.dealt_transcript(self.tau1, bodies)

    def shares(
        self, owner: str, kind: ShareKind, colluders: Iterable[SiloId] = ()
    ) -> dict[SiloId, Secret]:
        """The shares of one kind that were revealed, and those that colluders hold."""
        found = {
            message.sender: share.share
            for message in self.reveals
            for share in message.shares
            if (share.owner, share.kind) == (owner, kind)
        }
        for name in colluders:
            held = self.held_by(name)
            if silo_id(owner) in held:
                found[name] = held[silo_id(owner)].reveal(kind).share
        return found

    def secret(self, owner: str, kind: ShareKind, colluders: Iterable[SiloId] = ()) -> Secret:
        """A secret from the shares of its kind; needs t of them."""
        name, threshold = silo_id(owner), self.descriptor.threshold
        shares = self.shares(name, kind, colluders)
        assert len(shares) >= threshold, f"{len(shares)} shares of {name}"
        return rebuild(name, shares, tuple(sorted(self.adverts)), threshold)

    def total(self, survivors: Iterable[str], colluders: Iterable[SiloId] = ()) -> Vector:
        """The sum of these uploads without their masks; everybody else in U2 is an orphan."""
        names = tuple(silo_id(name) for name in sorted(survivors))
        prg, tau1 = self.session.mask_prg, self.tau1
        masks: list[Mask] = []
        for owner in self.dealings:
            if owner in names:
                seed = self.secret(owner, SEED, colluders)
                masks.append(survivor_mask(self.adverts[owner], seed, tau1, prg))
            else:
                key = self.secret(owner, KEY, colluders)
                masks += orphan_masks(self.adverts[owner], key, self.adverts, names, tau1, prg)
        total = RunningSum(self.ring, len(self.uploads[names[0]]))
        for name in names:
            total.add(self.uploads[name])
        return self.strip(total.total, masks)

    def read(self, victim: str, seed: Secret, key: Secret) -> Vector:
        """One silo's upload without its masks, from both of its secrets."""
        name = silo_id(victim)
        own = self_mask(seed, name, self.tau1, self.session.mask_prg)
        return self.strip(self.uploads[name], [own.inverse(), *self.pair_masks(victim, key)])

    def pair_masks(self, victim: str, key: Secret) -> list[Mask]:
        """What takes the masks of a silo's pairs off, from its mask key."""
        name, pair = silo_id(victim), KeyPair.from_private(key)
        prg, tau1 = self.session.mask_prg, self.tau1
        return [
            pair_mask(pair, name, peer, self.adverts[peer].mask_key, tau1, prg).inverse()
            for peer in neighbours(tuple(sorted(self.dealings)), name)
        ]

    def strip(self, words: Vector, masks: Sequence[Mask]) -> Vector:
        """The words with masks applied."""
        bare = words.copy()
        apply_masks(self.ring, bare, masks, self.session.mask_prg)
        return bare
