"""A coordinator that does as it likes, real silos in front of it, and weakened variants of ours.

``Attempt`` is one attempt as a malicious coordinator runs it: it keeps whatever it sees, and a test
chooses what each silo is told. The silos are the product's own functions, driven as their contract
says. The coordinator's arithmetic is ``Sight``'s: from what was sent to it, and what a test hands
it as a colluder's.

A weakened variant is ours with one check out: ``without`` forgives the refusals of these codes,
``weakened`` puts another function in a place. Each test shows the attack there, then its end here.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

from secagg.config import SiloId, silo_id
from secagg.crypto.sign import IdentityKey
from secagg.errors import FaultyServer, SecaggError
from secagg.masking import client, ledger
from secagg.masking.ledger import Ledger
from secagg.masking.messages import (
    Dealt,
    Descriptor,
    Roster,
    Signatures,
    Survivors,
)
from secagg.masking.server import Opening, describe
from secagg.masking.shares import HeldShares
from secagg.ring.expand import masked
from secagg.ring.vectors import PowerRing, Vector
from secagg.simulation import TASK, Federation
from threat_model.attacks.sight import Sight

A, B, C, D, E, F = (silo_id(letter) for letter in "abcdef")
FOUR = (A, B, C, D)
FIVE = (A, B, C, D, E)
SIX = (A, B, C, D, E, F)
LENGTH = 16
RING = PowerRing(32)
BASE = bytes(range(32))


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


class Attempt(Sight):
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
        super().__init__(federation.session, TASK, federation.identity)
        self.federation = federation
        self.members = {name: federation.silo(name).member for name in names}
        self.ledgers = ledgers or {name: federation.silo(name).ledger for name in names}
        key = None if federation.key is None else federation.key.name
        self.expected = {name: client.Expected(TASK, round_number, base, key=key) for name in names}
        self.entropy = dict.fromkeys(names, os.urandom)
        self.vectors = vectors or small_vectors(names)
        self.seeds = seeds or dict.fromkeys(names, b"")
        self.states: dict[SiloId, Any] = {}
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

    def identity_of(self, colluder: SiloId) -> IdentityKey:
        """A colluder's signing key."""
        return self.members[colluder].identity

    def held_by(self, colluder: SiloId) -> Mapping[SiloId, HeldShares]:
        """What a colluder holds."""
        held: Mapping[SiloId, HeldShares] = self.states[colluder].held
        return held

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
