"""One attempt as a malicious coordinator runs it: it keeps what it sees, and says what it likes.

Honest silos are processes with the SDK; ``tell`` sends one a broadcast and returns its answer.
Colluding silos are the product's own functions, run here, with their states in the adversary's
hands. The adversary's arithmetic is ``sight``'s.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from secagg.config import SiloId, silo_id
from secagg.crypto.digest import vector_digest
from secagg.crypto.secret import Secret
from secagg.crypto.sign import IdentityKey
from secagg.masking import client, transcript
from secagg.masking.ledger import MemoryLedger
from secagg.masking.messages import (
    Dealt,
    Descriptor,
    MaskedInput,
    Result,
    Roster,
    ShareKind,
    Signatures,
    Survivors,
    Unmasking,
)
from secagg.masking.server import Opening, describe
from secagg.masking.shares import HeldShares
from secagg.ring.expand import masked
from secagg.ring.vectors import Vector
from secagg.suite import KeyName
from threat_model.attacks.evil_coordinator import TASK, EvilCoordinator
from threat_model.attacks.sight import Sight
from threat_model.attacks.weak import nothing, replaced

_COMPLAISANT = replaced("secagg.masking.client:_refuse", nothing)
"""Colluders refuse nothing."""


class Colluder:
    """A silo in the adversary's hands: it does what the protocol says unless told otherwise."""

    def __init__(
        self, evil: EvilCoordinator, name: SiloId, identity: IdentityKey | None = None
    ) -> None:
        identity = identity or evil.consortium.credentials(name).identity_key
        assert identity is not None
        self.member = client.Member(
            name,
            identity,
            evil.manifest.manifest,
            evil.policy(name),
            evil.session,
            evil.session_id,
        )
        self.ledger = MemoryLedger()
        self.values = evil.values[name]
        self.codec = evil.codec
        self.state: Any = None
        self.upload: Vector | None = None

    def answer(self, told: Any, expected: client.Expected) -> Any:
        """What the SDK would answer."""
        reply: Any
        match told:
            case Descriptor():
                admitted = client.admit(told, self.member, expected, self.ledger)
                recorded = self.ledger.record(admitted.entry)
                self.state, reply = client.advertise_keys(admitted, recorded, entropy=os.urandom)
            case Roster():
                self.state, reply = client.share_keys(self.state, told, entropy=os.urandom)
            case Dealt():
                words = self.codec.encode(
                    {"x": self.values}, weight=1.0, metrics={}, entropy=os.urandom
                )
                encoded = masked(self.codec.ring, words)
                self.state, reply, self.upload = client.mask_input(self.state, told, encoded)
            case Survivors():
                self.state, reply = client.check_survivors(self.state, told, self.ledger)
            case _:
                checked = client.check_consistency(self.state, told)
                recorded = self.ledger.record(checked.entry)
                self.state, reply = client.reveal_shares(checked, recorded)
        return reply


class Attempt(Sight):
    """One attempt at a round of an evil coordinator's session.

    Args:
        evil: the coordinator; its silos have been started.
        cohort: the descriptor's; everybody if None.
        number: of the attempt.
        colluders: those of an earlier attempt, with their ledgers; fresh ones if None.
        key: of the round, where the session seals.
        changes: to the descriptor, before it is signed.
    """

    def __init__(
        self,
        evil: EvilCoordinator,
        cohort: Sequence[str] | None = None,
        *,
        number: int = 1,
        colluders: dict[SiloId, Colluder] | None = None,
        key: KeyName | None = None,
        **changes: Any,
    ) -> None:
        super().__init__(evil.session, TASK, evil.identity)
        self.evil = evil
        self.names = tuple(silo_id(name) for name in cohort or evil.session.silos)
        self.colluders = colluders or {n: Colluder(evil, n) for n in sorted(evil.colluders)}
        self.round = len(evil.results) + 1
        self.expected = client.Expected(TASK, self.round, evil.base, key=key)
        opening = Opening(
            evil.session,
            evil.session_id,
            evil.manifest.manifest,
            TASK,
            self.round,
            number,
            evil.base,
            self.names,
            evil.codec.length,
            key,
        )
        self.descriptor = self.signed(describe(opening, evil.identity, os.urandom), **changes)

    def identity_of(self, colluder: SiloId) -> IdentityKey:
        """A colluder's signing key."""
        return self.colluders[colluder].member.identity

    def held_by(self, colluder: SiloId) -> Mapping[SiloId, HeldShares]:
        """What a colluder holds, if it came so far."""
        held: Mapping[SiloId, HeldShares] = getattr(self.colluders[colluder].state, "held", {})
        return held

    def shares(
        self, owner: str, kind: ShareKind, colluders: Iterable[SiloId] = ()
    ) -> dict[SiloId, Secret]:
        """As ``Sight.shares``, with those of all colluders."""
        return super().shares(owner, kind, colluders or self.colluders)

    # What silos do.

    def tell(self, silo: str, told: Any) -> Any:
        """Let a silo answer what it is told.

        Raises:
            Refused: it does not.
        """
        self.say(silo, told)
        return self.hear(silo)

    def say(self, silo: str, told: Any) -> None:
        """Tell a silo something; ``hear`` has its answer."""
        name = silo_id(silo)
        if name in self.colluders:
            with _COMPLAISANT.applied():
                self._answer = self.colluders[name].answer(told, self.expected)
        else:
            self.evil.put_event(name, told)

    def hear(self, silo: str) -> Any:
        """A silo's answer to what it was told."""
        name = silo_id(silo)
        if name in self.colluders:
            reply, upload = self._answer, self.colluders[name].upload
        else:
            reply, upload = self.evil.hear(name), self.evil.uploads.get(name)
        if isinstance(reply, MaskedInput):
            assert upload is not None
            self.uploads[name] = upload.copy()
        if isinstance(reply, Unmasking):
            self.reveals.append(reply)
        return reply

    def _tell_all(self, names: Iterable[SiloId], told: Any) -> dict[SiloId, Any]:
        """Tell honest silos at once, so that they work side by side; ``told`` by silo."""
        chosen = list(names)
        found = {n: self.tell(n, told(n)) for n in chosen if n in self.colluders}
        honest = [n for n in chosen if n not in self.colluders]
        for name in honest:
            self.say(name, told(name))
        found |= {name: self.hear(name) for name in honest}
        return dict(sorted(found.items()))

    def advertise(self, *, without: Iterable[str] = ()) -> None:
        """Phase 1."""
        names = [n for n in self.names if n not in without]
        self.evil.await_ready(*(n for n in names if n not in self.colluders))
        self.adverts = self._tell_all(names, lambda _: self.descriptor)

    def share(self) -> None:
        """Phase 2."""
        self.dealings = self._tell_all(self.adverts, lambda _: self.roster)

    def mask(self, *, without: Iterable[str] = ()) -> None:
        """Phase 3."""
        names = [n for n in self.dealings if n not in without]
        self.commits = self._tell_all(names, self.dealt)

    def to_masked(self, *, silent: Iterable[str] = ()) -> Attempt:
        """Phases 1 to 3, honestly, but for these silos that send no vector."""
        self.advertise()
        self.share()
        self.mask(without=silent)
        return self

    def open(self, *names: str) -> Vector:
        """Phases 4 and 5, honestly, over these survivors: their sum."""
        self.unmask(*names)
        return self.total(names)

    def sign(self, *names: str) -> Signatures:
        """Phase 4, honestly: who signed that these are the survivors."""
        survivors = self.survivors(*names)
        signed = self._tell_all(map(silo_id, names), lambda _: survivors)
        return Signatures(tuple(signed.values()))

    def unmask(self, *names: str) -> None:
        """Phases 4 and 5, honestly: what these survivors reveal is kept."""
        signatures = self.sign(*names)
        self._tell_all(map(silo_id, names), lambda _: signatures)

    def conclude(self, *names: str) -> Result:
        """The whole round over these survivors, honestly: everybody in it has its result."""
        total = self.open(*names)
        result = self.result(total, *names)
        for name in names:
            if name not in self.colluders:
                self.evil.release(silo_id(name), result, total)
        self.evil.move_on(result)
        return result

    # What the coordinator can say.

    def result(self, total: Vector, *names: str) -> Result:
        """A signed result: that this is the sum of these silos."""
        chosen = self.survivors(*names)
        words = vector_digest(self.ring.pack(total), self.evil.session.chunk_bytes)
        unsigned = Result(
            TASK,
            self.descriptor.round,
            self.descriptor.base,
            self.descriptor.cohort,
            tuple(commit.sender for commit in chosen.commits),
            transcript.survivors_transcript(self.tau2, chosen.commits),
            words,
            bytes(64),
            self.descriptor.key,
            tuple(commit.seed for commit in chosen.commits if commit.seed),
        )
        return self.evil.sign_result(unsigned)
