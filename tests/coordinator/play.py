"""Silos that take the protocol's real steps, against a session in memory or over the wire.

A ``Player`` asks what comes next, answers it with the client core, and sends. What it talks to is a
``Port``: the state machine itself, or the stubs of a running server.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from secagg.ckks import custody
from secagg.ckks.custody import Custodian, KeyBox, KeyRequest
from secagg.config import (
    Clip,
    MaskPrg,
    Metric,
    Policy,
    Protection,
    RingBits,
    SessionConfig,
    SiloId,
    TaskConfig,
    ThresholdRule,
    Weighting,
)
from secagg.coordinator.journal import Journal, MemoryJournal
from secagg.coordinator.limits import Limits
from secagg.coordinator.retrace import restore
from secagg.coordinator.session import Session
from secagg.coordinator.standing import Means
from secagg.coordinator.state import Event, State, Step
from secagg.crypto.digest import vector_digest
from secagg.crypto.secret import Entropy
from secagg.crypto.sign import IdentityKey
from secagg.disk import LocalDisk
from secagg.encoding.schema import Schema, TensorSpec
from secagg.errors import RoundAborted
from secagg.masking import client
from secagg.masking.ledger import MemoryLedger
from secagg.masking.manifest import Manifest
from secagg.masking.messages import (
    Dealt,
    Descriptor,
    MaskedInput,
    Result,
    Roster,
    Signatures,
    Survivors,
)
from secagg.masking.server import ClientMessage
from secagg.masking.transcript import NO_WEIGHTS, TaskOpening, opening_transcript
from secagg.ring.expand import masked
from secagg.ring.vectors import PowerRing, PrimeRing, Ring, Vector, ring_of
from secagg.suite import KeyName, Suite
from secagg.wire.session import SignedOpening

TASK, SUMS = "training", "statistics"
CONSORTIUM = "hospitals"
SCHEMA = Schema((TensorSpec("bias", (5,)), TensorSpec("weight", (8, 7))))
LENGTH = SCHEMA.size + 2 * (2 + 1)  # a task with one metric
SUMS_LENGTH = SCHEMA.size + 2 * 2
SEALED_LENGTH = 4096  # one ciphertext
CHUNK, SEALED_CHUNK = 64, 8192
SEEN = {
    Descriptor: Step.DESCRIPTOR,
    Roster: Step.ROSTER,
    Dealt: Step.DEALT,
    Survivors: Step.SURVIVORS,
    Signatures: Step.SIGNATURES,
}
POLICY = Policy(
    colluders=1,
    min_cohort=3,
    min_threshold=3,
    protections=tuple(Protection),
    ring_bits=(16, 32, 64),
    clips=tuple(Clip),
    max_weight_cap=1000.0,
)


def make_config(silos: Iterable[str] = "abcd", **changes: Any) -> SessionConfig:
    """Two tasks: a mean in 32-bit words with a metric, a sum in 64-bit words; or both sealed."""
    seals = changes.get("protection", Protection.MASKED).seals
    if seals:
        changes = {"suite": Suite.CKKS_54, "chunk_bytes": SEALED_CHUNK} | changes
    training = TaskConfig(
        TASK,
        Weighting.MEAN,
        3,
        4.0,
        Clip.NONE,
        100.0,
        None if seals else 32,
        (Metric("loss", 8.0),),
    )
    bits: RingBits | None = None if seals else 64
    values: dict[str, Any] = {
        "name": "study",
        "consortium": CONSORTIUM,
        "silos": tuple(SiloId(name) for name in silos),
        "protection": Protection.MASKED,
        "colluders": 1,
        "threshold": ThresholdRule(2, 3),
        "min_cohort": 3,
        "mask_prg": MaskPrg.AES_128_CTR,
        "tasks": (training, TaskConfig(SUMS, Weighting.SUM, 2, 1e6, Clip.NONE, 1.0, bits)),
        "chunk_bytes": CHUNK,
        "train_deadline": 100.0,
        "phase_deadline": 10.0,
    }
    return SessionConfig(**values | changes)


def make_manifest(keys: dict[str, IdentityKey], coordinator: IdentityKey) -> Manifest:
    silos = {SiloId(name): key.public for name, key in sorted(keys.items())}
    return Manifest(CONSORTIUM, 1, silos, coordinator.public)


def sign_opening(
    session: SessionConfig,
    session_id: bytes,
    proposer: str,
    identity: IdentityKey,
    *,
    task: str = TASK,
    weights: bytes = b"",
    **changes: Any,
) -> SignedOpening:
    """An opening as its proposer signs it."""
    from secagg.masking.transcript import session_hash

    sealed_digest = changes.pop("sealed_digest", b"")
    digest = vector_digest(weights, session.chunk_bytes) if weights else NO_WEIGHTS
    size = changes.pop("weights_bytes", len(weights))
    opening = replace(TaskOpening(task, SCHEMA, "", digest), **changes)
    transcript = opening_transcript(session_hash(session), session_id)
    return SignedOpening.sign(opening, size, proposer, identity, transcript, sealed_digest)


class Port(Protocol):
    """What a player talks to."""

    def next(self, silo: SiloId, round_number: int, attempt: int, seen: int) -> Event | None: ...

    def put(self, silo: SiloId, round_number: int, attempt: int, data: memoryview) -> None: ...

    def send(self, message: ClientMessage, round_number: int, attempt: int) -> None: ...


@dataclass
class SessionPort:
    """The state machine, called directly."""

    session: Session

    def next(self, silo: SiloId, round_number: int, attempt: int, seen: int) -> Event | None:
        return self.session.next(silo, round_number, attempt, seen)

    def put(self, silo: SiloId, round_number: int, attempt: int, data: memoryview) -> None:
        upload = self.session.vector_upload(silo, round_number, attempt, len(data))
        chunk = self.session.config.chunk_bytes
        for offset in range(0, len(data), chunk):
            upload.put(offset, bytes(data[offset : offset + chunk]))

    def send(self, message: ClientMessage, round_number: int, attempt: int) -> None:
        self.session.send(message, round_number, attempt)


@dataclass
class Player:
    """One silo in one session."""

    member: client.Member
    port: Port
    ring: Ring = field(default_factory=lambda: PowerRing(32))
    length: int = LENGTH
    ledger: MemoryLedger = field(default_factory=MemoryLedger)
    entropy: Entropy = os.urandom
    state: Any = None
    seen: int = Step.LEFT
    attempt: int = 0
    sent: list[ClientMessage] = field(default_factory=list)
    states: list[Any] = field(default_factory=list)
    vector: Vector | None = None
    masked: Vector | None = None
    seed: bytes = b""
    last: Event | None = None

    @property
    def name(self) -> SiloId:
        return self.member.name

    def expect(self, task: str, round_number: int, base: bytes, key: KeyName | None = None) -> None:
        """Have an update for this round, sealed under a key where the session seals."""
        self.expected = client.Expected(task, round_number, base, key=key)
        self.ring = ring_of(self.member.session, task)
        if key is None:
            words = os.urandom(self.length * self.ring.word_bytes)
            self.vector = self.ring.unpack(words, self.length)
        else:
            self.vector, self.seed = residues(self.length), os.urandom(32)
        self.attempt = 0
        self.again()

    def again(self) -> None:
        """Be ready for another attempt."""
        self.seen, self.state = Step.LEFT, None

    def look(self) -> Event | None:
        """Ask what comes next."""
        return self.port.next(self.name, self.expected.round, self.attempt, self.seen)

    def step(self, *, send: bool = True) -> Event | None:
        """Ask what comes next, answer it, and send the answer."""
        event = self.last = self.look()
        if isinstance(event, Descriptor):
            self.again()
        if type(event) in SEEN:
            message = self.answer(event)
            if send:
                self.send(message)
        return event

    def answer(self, event: Any) -> ClientMessage:
        """The message that answers a broadcast."""
        member, ledger = self.member, self.ledger
        reply: ClientMessage
        match event:
            case Descriptor():
                admitted = client.admit(event, member, self.expected, ledger)
                recorded = ledger.record(admitted.entry)
                self.attempt = event.attempt
                self.state, reply = client.advertise_keys(admitted, recorded, entropy=self.entropy)
            case Roster() if not member.session.protection.masks:
                assert self.vector is not None
                self.masked = self.vector
                self.state, reply = client.seal_input(self.state, event, self.masked, self.seed)
            case Roster():
                self.state, reply = client.share_keys(self.state, event, entropy=self.entropy)
            case Dealt():
                assert self.vector is not None
                encoded = masked(self.ring, self.vector.copy())
                self.state, reply, self.masked = client.mask_input(
                    self.state, event, encoded, self.seed
                )
            case Survivors():
                self.state, reply = client.check_survivors(self.state, event, ledger)
            case Signatures():
                checked = client.check_consistency(self.state, event)
                self.state, reply = client.reveal_shares(checked, ledger.record(checked.entry))
        self.seen = SEEN[type(event)]
        self.states.append(self.state)
        self.sent.append(reply)
        return reply

    def send(self, message: ClientMessage) -> None:
        """Send a message, after the vector that it commits to."""
        if isinstance(message, MaskedInput):
            self.put()
        self.port.send(message, self.expected.round, self.attempt)

    def put(self) -> None:
        """Upload the masked vector."""
        assert self.masked is not None
        self.port.put(self.name, self.expected.round, self.attempt, self.ring.pack(self.masked))


def residues(length: int) -> Vector:
    """What a sealed update looks like to who has no key."""
    words = np.frombuffer(bytearray(os.urandom(8 * length)), np.uint64)
    return words % np.uint64(Suite.CKKS_54.parameters.modulus)


def exact_sum(players: Iterable[Player]) -> Vector:
    """The slow twin: element by element in Python's integers."""
    chosen = list(players)
    ring = chosen[0].ring
    modulus = ring.modulus if isinstance(ring, PrimeRing) else 2 ** (8 * ring.word_bytes)
    vectors = [player.vector for player in chosen]
    words = [sum(int(v[i]) for v in vectors) % modulus for i in range(len(vectors[0]))]
    return np.array(words, chosen[0].ring.dtype)


class World:
    """A session with fake time, its silos, and its coordinator."""

    def __init__(
        self,
        directory: Path,
        silos: Iterable[str] = "abcd",
        journal: Journal | None = None,
        **changes: Any,
    ) -> None:
        self.config = make_config(silos, **changes)
        self.keys = {str(name): IdentityKey.generate(os.urandom) for name in self.config.silos}
        self.coordinator = IdentityKey.generate(os.urandom)
        self.manifest = make_manifest(self.keys, self.coordinator)
        self.session_id = os.urandom(32)
        self.now = 1000.0
        self.journal = journal or MemoryJournal()
        self.means = Means(
            manifest=lambda: self.manifest,
            signed_manifest=lambda: b"",
            identity=self.coordinator,
            disk=LocalDisk(directory),
            journal=self.journal,
            entropy=os.urandom,
            limits=Limits(max_weights_bytes=1000),
        )
        self.session = Session.create(self.config, self.session_id, self.means)
        self.directory = directory / self.session.folder
        self.port = SessionPort(self.session)
        self.players = {name: self.player(name) for name in self.keys}

    def restart(self) -> None:
        """The coordinator's process dies and is started again; the silos notice nothing."""
        rows = self.journal.load()[self.session_id]
        self.session = self.port.session = restore(rows, self.means, self.now)

    def path(self, name: str) -> Path:
        """Where a blob of the coordinator's disk lies."""
        return self.directory.parents[1] / name

    def player(self, name: str) -> Player:
        member = client.Member(
            SiloId(name), self.keys[name], self.manifest, POLICY, self.config, self.session_id
        )
        return Player(member, self.port)

    def without(self, *names: str) -> None:
        """The authority takes silos out of the manifest."""
        silos = {name: key for name, key in self.manifest.silos.items() if name not in names}
        self.manifest = replace(self.manifest, version=self.manifest.version + 1, silos=silos)
        for player in self.players.values():
            player.member = replace(player.member, manifest=self.manifest)

    def signed(self, proposer: str = "a", **changes: Any) -> SignedOpening:
        return sign_opening(self.config, self.session_id, proposer, self.keys[proposer], **changes)

    def open(self, task: str = TASK) -> None:
        """Open a task by its first silo, without weights."""
        first = self.config.silos[0]
        assert self.session.open_task(first, task, self.now) is True
        self.session.propose_task(first, self.signed(first, task=task))

    @property
    def key(self) -> KeyName | None:
        """The session's newest key, where it seals; every silo has it at once."""
        return None if self.session.keys is None else self.session.keys.key

    def custodian(self, name: str) -> Custodian:
        """A silo, as it asks for the session's key."""
        config, known = self.config, self.manifest.silos
        members = {silo: known[silo] for silo in config.silos if silo in known}
        transcript = opening_transcript(self.session.session_hash, self.session_id)
        return Custodian(SiloId(name), self.keys[name], members, self.session_id, transcript)

    def wish(self, name: str, epoch: int | None = None) -> KeyRequest:
        """A fresh, signed request for a key, of the session's epoch if none is given."""
        if epoch is None:
            assert self.session.keys is not None
            epoch = self.session.keys.epoch
        return custody.ask(self.custodian(name), epoch, os.urandom)[1]

    def ask(self, name: str, request: KeyRequest | None = None) -> KeyBox | int | bool:
        """A silo asks for the session's key."""
        request = request or self.wish(name)
        return self.session.ask_key(SiloId(name), request, self.now)

    def make_key(self, maker: str = "a") -> KeyName:
        """A silo makes the epoch's key."""
        assert self.ask(maker) is True
        assert self.session.keys is not None
        key = KeyName(self.session.keys.epoch, os.urandom(32))
        self.session.announce_key(SiloId(maker), key, tuple(self.custodian(maker).members))
        return key

    def ready(self, *names: str, task: str = TASK, fresh: bool = True) -> None:
        """Silos have an update and say so."""
        for name in names or self.players:
            player, session = self.players[name], self.session
            if fresh:
                player.length = LENGTH if task == TASK else SUMS_LENGTH
                if self.key is not None:
                    player.length = SEALED_LENGTH
                player.expect(task, session.round, session.base(task), self.key)
            session.ready(SiloId(name), task, session.base(task), self.now, self.key)

    def ready_with(self, key: KeyName) -> None:
        """A silo says that it is ready with this key."""
        first = self.config.silos[0]
        self.session.ready(first, TASK, self.session.base(TASK), self.now, key)

    def tick(self) -> int:
        """Let time's work be done; returns how often it did something."""
        count = 0
        while self.session.tick(self.now):
            count += 1
        return count

    def step(self, *names: str) -> None:
        """Silos answer what there is."""
        for name in names or self.players:
            self.players[name].step()

    def phases(self, count: int, *names: str) -> None:
        """Play this many phases; who says nothing is waited for until the deadline."""
        for _ in range(count):
            self.step(*names)
            if not self.session.tick(self.now):
                self.now += self.config.phase_deadline
                assert self.session.tick(self.now)

    def start(self, *names: str, task: str = TASK) -> None:
        """Open the task and an attempt at its first round."""
        if task not in self.session.tasks:
            self.open(task)
        self.ready(*names, task=task)
        if not self.tick():
            self.now += self.config.train_deadline
            assert self.tick()

    def release(self, *names: str, task: str = TASK) -> Result:
        """Play a round to its result."""
        self.start(*names, task=task)
        self.phases(len(self.config.protection.phases), *names)
        return self.session.results[-1]

    def sum(self, round_number: int) -> Vector:
        result = self.session.results[round_number - 1]
        ring = ring_of(self.config, result.task)
        return np.fromfile(self.path(self.session.sum_blob(round_number).name), ring.dtype)


def why(world: World) -> RoundAborted:
    """Why the last attempt ended."""
    assert world.session.last_abort is not None
    assert world.session.state is State.ACTIVE
    return world.session.last_abort[2]
