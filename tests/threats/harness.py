"""A coordinator that does as it likes, real silos in front of it, and weakened variants of ours.

``Attempt`` is one attempt as a malicious coordinator runs it: it keeps whatever it sees, and a test
chooses what each silo is told. The silos are the product's own functions, driven as their contract
says. The coordinator's arithmetic (``total``, ``read``) uses only what was sent to it, and what a
test hands it as a colluder's.

A weakened variant is ours with one check out: ``without`` forgives the refusals of these codes,
``weakened`` puts another function in a place. Each test shows the attack there, then its end here.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from secagg.config import SiloId, silo_id
from secagg.crypto.keys import KeyPair
from secagg.crypto.labels import SIGN_CONSISTENCY, SIGN_DESCRIPTOR
from secagg.crypto.secret import Secret
from secagg.errors import FaultyServer, SecaggError
from secagg.masking import client, ledger, transcript
from secagg.masking.graph import neighbours
from secagg.masking.ledger import Ledger
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
    Signatures,
    Survivors,
    Unmasking,
)
from secagg.masking.server import Opening, describe
from secagg.masking.unmask import orphan_masks, rebuild, survivor_mask
from secagg.ring.expand import Mask, apply_masks, masked
from secagg.ring.vectors import PowerRing, RunningSum, Vector, ring_of
from secagg.simulation import TASK, Federation

A, B, C, D, E, F = (silo_id(letter) for letter in "abcdef")
FOUR = (A, B, C, D)
FIVE = (A, B, C, D, E)
SIX = (A, B, C, D, E, F)
LENGTH = 16
RING = PowerRing(32)
BASE = bytes(range(32))
SEED, KEY = ShareKind.SELF_SEED, ShareKind.MASK_KEY


def small_vector(length: int = LENGTH) -> Vector:
    """A secret update: 20-bit signed words, as an encoded one that uses little of its range."""
    words = np.frombuffer(os.urandom(4 * length), "<u4") >> 12
    return words.astype("<u4") - np.uint32(2**19)


def small_vectors(names: Iterable[SiloId]) -> dict[SiloId, Vector]:
    """A secret update of each silo."""
    return {name: small_vector() for name in names}


@contextmanager
def without(*codes: str) -> Iterator[None]:
    """The client without the checks that refuse with these codes."""
    real = client._refuse

    def refuse(code: str, observed: str) -> None:
        if code not in codes:
            real(code, observed)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(client, "_refuse", refuse)
        yield


@contextmanager
def weakened(owner: Any, name: str, value: Any) -> Iterator[None]:
    """One function of ours replaced where it is used."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, value)
        yield


@contextmanager
def without_differencing(*places: Any) -> Iterator[None]:
    """Silos that do not mind other survivors on a base that they opened."""
    with pytest.MonkeyPatch.context() as patch:
        for place in places or (client, ledger):
            patch.setattr(place, "check_differencing", nothing)
        yield


def nothing(*_: object, **__: object) -> None:
    """A check that checks nothing."""


@contextmanager
def refused(code: str, kind: type[SecaggError] = FaultyServer) -> Iterator[None]:
    """Ours: refused by this class and this code."""
    with pytest.raises(kind) as caught:
        yield
    assert (type(caught.value), caught.value.code) == (kind, code)


class Attempt:
    """One attempt, in the hands of the coordinator."""

    def __init__(
        self,
        federation: Federation,
        cohort: Sequence[SiloId] | None = None,
        *,
        number: int = 1,
        round_number: int = 1,
        base: bytes = BASE,
        vectors: Mapping[SiloId, Vector] | None = None,
        seeds: Mapping[SiloId, bytes] | None = None,
        ledgers: Mapping[SiloId, Ledger] | None = None,
        **changes: Any,
    ) -> None:
        names = tuple(cohort or (silo_id(name) for name in federation.silos))
        self.federation = federation
        self.session = federation.session
        self.members = {name: federation.silo(name).member for name in names}
        self.ledgers = ledgers or {name: federation.silo(name).ledger for name in names}
        key = None if federation.key is None else federation.key.name
        self.expected = {name: client.Expected(TASK, round_number, base, key=key) for name in names}
        self.entropy = dict.fromkeys(names, os.urandom)
        self.vectors = vectors or small_vectors(names)
        self.seeds = seeds or dict.fromkeys(names, b"")
        self.ring = ring_of(self.session, TASK)
        self.states: dict[SiloId, Any] = {}
        self.adverts: dict[SiloId, AdvertiseKeys] = {}
        self.dealings: dict[SiloId, ShareKeys] = {}
        self.commits: dict[SiloId, MaskedInput] = {}
        self.uploads: dict[SiloId, Vector] = {}
        self.reveals: list[Unmasking] = []
        opening = Opening(
            self.session,
            self.members[names[0]].session_id,
            federation.manifest,
            TASK,
            round_number,
            number,
            base,
            names,
            len(self.vectors[names[0]]),
            key,
        )
        self.descriptor = self.signed(describe(opening, federation.identity, os.urandom), **changes)

    def signed(self, descriptor: Descriptor, **changes: Any) -> Descriptor:
        """A descriptor with these changes, signed by the coordinator."""
        changed = replace(descriptor, **changes)
        tau0 = transcript.round_transcript(changed)
        return replace(changed, signature=self.federation.identity.sign(SIGN_DESCRIPTOR, tau0, b""))

    def with_cohort(self, cohort: tuple[SiloId, ...]) -> Attempt:
        """The same with another cohort in its signed descriptor."""
        threshold = self.session.threshold_for(len(cohort))
        self.descriptor = self.signed(self.descriptor, cohort=cohort, threshold=threshold)
        return self

    # What silos do.

    def tell(self, name: SiloId, told: Any) -> Any:
        """Let a silo answer what it is told."""
        member, memory, state = self.members[name], self.ledgers[name], self.states.get(name)
        entropy = self.entropy[name]
        reply: Any
        match told:
            case Descriptor():
                admitted = client.admit(told, member, self.expected[name], memory)
                recorded = memory.record(admitted.entry)
                state, reply = client.advertise_keys(admitted, recorded, entropy=entropy)
            case Roster() if self.session.protection.masks:
                state, reply = client.share_keys(state, told, entropy=entropy)
            case Roster():
                self.uploads[name] = self.vectors[name].copy()
                seed = self.seeds[name]
                state, reply = client.seal_input(state, told, self.uploads[name], seed)
            case Dealt():
                encoded = masked(self.ring, self.vectors[name].copy())
                state, reply, self.uploads[name] = client.mask_input(
                    state, told, encoded, self.seeds[name]
                )
            case Survivors():
                state, reply = client.check_survivors(state, told, memory)
            case _:
                checked = client.check_consistency(state, told)
                state, reply = client.reveal_shares(checked, memory.record(checked.entry))
                self.reveals.append(reply)
        self.states[name] = state
        return reply

    def advertise(self, *, without: Iterable[SiloId] = ()) -> None:
        """Phase 1."""
        for name in self.members:
            if name not in without:
                self.adverts[name] = self.tell(name, self.descriptor)

    def share(self) -> None:
        """Phase 2."""
        for name in self.adverts:
            self.dealings[name] = self.tell(name, self.roster)

    def mask(self, *, without: Iterable[SiloId] = ()) -> None:
        """Phase 3."""
        masks = self.session.protection.masks
        for name in self.dealings if masks else self.adverts:
            if name not in without:
                told = self.dealt(name) if masks else self.roster
                self.commits[name] = self.tell(name, told)

    def to_masked(self, *, silent: Iterable[SiloId] = ()) -> Attempt:
        """Phases 1 to 3, honestly, but for these silos that send no vector."""
        self.advertise()
        if self.session.protection.masks:
            self.share()
        self.mask(without=silent)
        return self

    def open(self, *names: SiloId) -> Vector:
        """Phases 4 and 5, honestly, over these survivors: their sum."""
        survivors = self.survivors(*names)
        signed = Signatures(tuple(self.tell(name, survivors) for name in names))
        for name in names:
            self.tell(name, signed)
        return self.total(names)

    # What the coordinator can say.

    @property
    def roster(self) -> Roster:
        """Every advert, as it was signed."""
        return Roster(tuple(self.adverts.values()))

    def dealt(self, holder: SiloId, dealers: Iterable[SiloId] | None = None) -> Dealt:
        """What one holder gets of these dealers' shares (of everybody's)."""
        return Dealt(
            tuple(
                Dealing(
                    name,
                    self.dealings[name].commitments,
                    self.dealings[name].boxes_digest(),
                    self.box(name, holder),
                    self.dealings[name].signature,
                )
                for name in sorted(dealers or self.dealings)
            )
        )

    def box(self, dealer: SiloId, holder: SiloId) -> bytes | None:
        """A dealer's box for a holder."""
        boxes = {box.recipient: box.sealed for box in self.dealings[dealer].boxes}
        return boxes.get(holder)

    def survivors(self, *names: SiloId) -> Survivors:
        """These silos' commits, as they were signed."""
        return Survivors(tuple(self.commits[name] for name in sorted(names)))

    def forge(self, colluder: SiloId, survivors: Survivors) -> Consistency:
        """A colluder's signature over any survivors."""
        body = Consistency(colluder, bytes(64)).body()
        tau3 = transcript.survivors_transcript(self.tau2, survivors.commits)
        key = self.members[colluder].identity
        return Consistency(colluder, key.sign(SIGN_CONSISTENCY, tau3, body))

    # What the coordinator can compute.

    @property
    def tau1(self) -> bytes:
        """τ1."""
        tau0 = transcript.round_transcript(self.descriptor)
        return transcript.roster_transcript(tau0, self.roster.adverts)

    @property
    def tau2(self) -> bytes:
        """τ2."""
        bodies = {name: message.body() for name, message in self.dealings.items()}
        return transcript.dealt_transcript(self.tau1, bodies)

    def shares(
        self, owner: SiloId, kind: ShareKind, colluders: Iterable[SiloId] = ()
    ) -> dict[SiloId, Secret]:
        """The shares of one kind that were revealed, and those that colluders hold."""
        found = {
            message.sender: share.share
            for message in self.reveals
            for share in message.shares
            if (share.owner, share.kind) == (owner, kind)
        }
        for name in colluders:
            found[name] = self.states[name].held[owner].reveal(kind).share
        return found

    def secret(self, owner: SiloId, kind: ShareKind, colluders: Iterable[SiloId] = ()) -> Secret:
        """A secret from the shares of its kind; needs t of them."""
        shares = self.shares(owner, kind, colluders)
        assert len(shares) >= self.descriptor.threshold
        return rebuild(owner, shares, tuple(self.adverts), self.descriptor.threshold)

    def total(self, survivors: Iterable[SiloId], colluders: Iterable[SiloId] = ()) -> Vector:
        """The sum of these uploads without their masks; everybody else in U2 is an orphan."""
        names, prg, tau1 = tuple(sorted(survivors)), self.session.mask_prg, self.tau1
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

    def read(self, victim: SiloId, seed: Secret, key: Secret) -> Vector:
        """One silo's upload without its masks, from both of its secrets."""
        pair, prg, tau1 = KeyPair.from_private(key), self.session.mask_prg, self.tau1
        masks = [self_mask(seed, victim, tau1, prg).inverse()]
        masks += [
            pair_mask(pair, victim, peer, self.adverts[peer].mask_key, tau1, prg).inverse()
            for peer in neighbours(tuple(self.dealings), victim)
        ]
        return self.strip(self.uploads[victim], masks)

    def strip(self, words: Vector, masks: Sequence[Mask]) -> Vector:
        """The words with masks applied."""
        bare = words.copy()
        apply_masks(self.ring, bare, masks, self.session.mask_prg)
        return bare

    @property
    def revealed(self) -> bool:
        """Whether any silo's ledger has a reveal on this attempt's base."""
        return any(memory.revealed(self.descriptor.base) for memory in self.ledgers.values())


def summed(vectors: Iterable[Vector]) -> Vector:
    """The exact sum in the ring."""
    total = RING.zeros(LENGTH)
    for vector in vectors:
        np.add(total, vector, out=total)
    return total


def same(left: Vector, right: Vector) -> bool:
    """Whether two vectors are equal, word by word."""
    return left.dtype == right.dtype and np.array_equal(left, right)
