"""An attempt stepped by hand: real members, a real ``ServerRound``, keyed entropy, no shell.

``Play.advance(phase)`` plays honestly until ``phase`` is open and its broadcast lies in
``broadcast``; from there a test tells one member something else, or gives the server something
else. Nothing here decides what is right: that is for the tests.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest

from secagg.config import (
    Clip,
    MaskPrg,
    Metric,
    Phase,
    Policy,
    Protection,
    SessionConfig,
    SiloId,
    TaskConfig,
    ThresholdRule,
    Weighting,
)
from secagg.crypto.labels import (
    SIGN_ADVERTISE_KEYS,
    SIGN_CONSISTENCY,
    SIGN_DESCRIPTOR,
    SIGN_MASKED_INPUT,
    SIGN_RESULT,
    SIGN_SHARE_KEYS,
    SIGN_UNMASKING,
)
from secagg.crypto.secret import Secret
from secagg.crypto.sign import IdentityKey
from secagg.errors import OutOfOrder, SecaggError
from secagg.masking import client, transcript
from secagg.masking.ledger import Ledger, MemoryLedger
from secagg.masking.manifest import Manifest
from secagg.masking.messages import (
    AdvertiseKeys,
    Consistency,
    Dealing,
    Dealt,
    Descriptor,
    MaskedInput,
    Result,
    Roster,
    ShareKeys,
    Signatures,
    Survivors,
    Unmasking,
)
from secagg.masking.server import Opening, ServerRound, describe
from secagg.masking.uploads import InMemory
from secagg.ring.expand import Encoded, Mask, masked
from secagg.ring.vectors import PowerRing, PrimeRing, Ring, Vector, ring_of
from secagg.suite import KeyName, Suite

A, B, C, D, E = (SiloId(f"silo-{letter}") for letter in "abcde")
ME = B
COLLUDER = D
TASK = "training"
BASE = bytes(range(32))
SESSION_ID = b"\x51" * 32
LENGTH = 5
KEY = KeyName(1, bytes(range(32, 64)))
SIGNED_AS: Mapping[type, str] = {
    Descriptor: SIGN_DESCRIPTOR,
    AdvertiseKeys: SIGN_ADVERTISE_KEYS,
    ShareKeys: SIGN_SHARE_KEYS,
    Dealing: SIGN_SHARE_KEYS,
    MaskedInput: SIGN_MASKED_INPUT,
    Consistency: SIGN_CONSISTENCY,
    Unmasking: SIGN_UNMASKING,
    Result: SIGN_RESULT,
}
LOW_ORDER = tuple(
    u.to_bytes(32, "little")
    for u in (
        0,
        1,
        325606250916557431795983626356110631294008115727848805560023387167927233504,
        39382357235489614581723060781553021112529911719440698176882885853963445705823,
        2**255 - 20,
    )
)
"""The canonical encodings of X25519's points of order 1, 2, 4 and 8 on the curve and its twist."""


class Keyed:
    """Uniform bytes that a seed determines."""

    def __init__(self, *seed: object) -> None:
        self._seed = repr(seed).encode()
        self._calls = 0

    def __call__(self, size: int) -> bytes:
        self._calls += 1
        return hashlib.shake_256(self._seed + self._calls.to_bytes(8, "big")).digest(size)


@cache
def identity(name: str) -> IdentityKey:
    """The signing key of a name, the same in every test."""
    return IdentityKey.generate(Keyed("identity", name))


def silos(n: int) -> tuple[SiloId, ...]:
    """silo-a, silo-b, …"""
    return tuple(SiloId(f"silo-{chr(ord('a') + i)}") for i in range(n))


def make_task(**changes: Any) -> TaskConfig:
    """A task."""
    values: dict[str, Any] = {
        "name": TASK,
        "weighting": Weighting.MEAN,
        "rounds": 10,
        "ring_bits": 32,
        "bound": 4.0,
        "clip": Clip.L2,
        "weight_cap": 100.0,
        "metrics": (Metric("loss", 8.0), Metric("accuracy", 1.0)),
    }
    return TaskConfig(**values | changes)


def make_session(n: int = 4, **changes: Any) -> SessionConfig:
    """A session of n silos; n = 4 gives t = 3 with n_c = 1."""
    values: dict[str, Any] = {
        "name": "study",
        "consortium": "hospitals",
        "silos": silos(n),
        "protection": Protection.MASKED,
        "colluders": 1,
        "threshold": ThresholdRule(2, 3),
        "min_cohort": 3,
        "mask_prg": MaskPrg.AES_128_CTR,
        "tasks": (make_task(),),
    }
    return SessionConfig(**values | changes)


def make_sealed_session(
    n: int = 4, protection: Protection = Protection.CKKS, **changes: Any
) -> SessionConfig:
    """The same for sealed updates."""
    values: dict[str, Any] = {
        "protection": protection,
        "suite": Suite.CKKS_54,
        "tasks": (make_task(ring_bits=None),),
    }
    return make_session(n, **values | changes)


def make_policy(**changes: Any) -> Policy:
    """A policy that takes part in ``make_session()``."""
    values: dict[str, Any] = {
        "colluders": 1,
        "min_cohort": 3,
        "min_threshold": 3,
        "protections": (Protection.MASKED,),
        "ring_bits": (16, 32, 64),
        "clips": tuple(Clip),
        "max_weight_cap": 100.0,
    }
    return Policy(**values | changes)


def make_manifest(names: Iterable[SiloId], **changes: Any) -> Manifest:
    """A manifest of these silos and one coordinator."""
    values: dict[str, Any] = {
        "consortium": "hospitals",
        "version": 7,
        "silos": {name: identity(name).public for name in names},
        "coordinator": identity("coordinator").public,
    }
    return Manifest(**values | changes)


def signed(message: Any, by: str, tau: bytes, **changes: Any) -> Any:
    """The message with these changes, signed by somebody over τ."""
    message = replace(message, **changes)
    body = b"" if isinstance(message, Descriptor) else message.body()
    signature = identity(by).sign(SIGNED_AS[type(message)], tau, body)
    return replace(message, signature=signature)


def modulus_of(ring: Ring) -> int:
    """m of Z_m."""
    if isinstance(ring, PrimeRing):
        return ring.modulus
    assert isinstance(ring, PowerRing)
    return 1 << ring.bits


def resigned(descriptor: Descriptor, **changes: Any) -> Descriptor:
    """The descriptor that the true coordinator signed with these changes."""
    changed = replace(descriptor, **changes)
    done = signed(changed, "coordinator", transcript.round_transcript(changed))
    assert isinstance(done, Descriptor)
    return done


class Play:
    """One attempt: members, ledgers, a server, and what was said so far.

    In a session that seals, ``key`` and ``seeds`` are what a silo's sealing would have brought, and
    the inputs are any residues: the core never looks into a sealed vector.
    """

    @property
    def complete(self) -> bool:
        """Whether everybody who may send in the current phase has."""
        return self.server.arrived == frozenset(self.server.expected)

    def __init__(
        self,
        session: SessionConfig | None = None,
        *,
        policy: Policy | None = None,
        cohort: tuple[SiloId, ...] | None = None,
        attempt: int = 1,
        round_number: int = 1,
        base: bytes = BASE,
        length: int = LENGTH,
        ledgers: Mapping[SiloId, Ledger] | None = None,
        outsiders: tuple[SiloId, ...] = (),
        entropy: str = "play",
        key: KeyName = KEY,
    ) -> None:
        self.session = session or make_session()
        seals = self.session.protection.seals
        names = self.session.silos
        self.manifest = make_manifest((*names, *outsiders))
        self.members = {
            name: client.Member(
                name,
                identity(name),
                self.manifest,
                policy or make_policy(protections=(self.session.protection,)),
                self.session,
                SESSION_ID,
            )
            for name in names
        }
        self.ledgers: Mapping[SiloId, Ledger] = ledgers or {name: MemoryLedger() for name in names}
        self.expected = client.Expected(TASK, round_number, base, key=key if seals else None)
        self.entropy = Keyed(entropy, round_number, attempt)
        self.opening = Opening(
            self.session,
            SESSION_ID,
            self.manifest,
            TASK,
            round_number,
            attempt,
            base,
            cohort or names,
            length,
            self.expected.key,
        )
        self.descriptor = describe(self.opening, identity("coordinator"), self.entropy)
        self.server = ServerRound(self.opening, self.descriptor, identity("coordinator"))
        self.broadcast: Any = self.descriptor
        self.states: dict[SiloId, Any] = {}
        self.sent: dict[tuple[SiloId, Phase], Any] = {}
        self.ring = ring_of(self.session, TASK)
        words = Keyed("inputs", entropy, length)
        self.inputs: dict[SiloId, Vector] = {
            name: self.ring.unpack(words(length * self.ring.word_bytes), length).copy()
            for name in names
        }
        for vector in self.inputs.values():
            self.ring.reduce(vector)
        drawn = Keyed("seeds", entropy, round_number, attempt)
        self.seeds = {name: drawn(32) if seals else b"" for name in names}
        self.vectors = {name: vector.copy() for name, vector in self.inputs.items()}
        self.encodings: list[SiloId] = []

    def again(self, **changes: Any) -> Play:
        """Another attempt by the same members with the same ledgers."""
        options = {"attempt": self.opening.attempt + 1, "cohort": self.opening.cohort} | changes
        return Play(self.session, ledgers=self.ledgers, **options)

    @property
    def taus(self) -> list[bytes]:
        """τ0 … as far as the server is."""
        return self.server._taus

    def told(self, name: SiloId) -> Any:
        """What the server has for a member now."""
        return self.broadcast[name] if isinstance(self.broadcast, Mapping) else self.broadcast

    def answer(self, name: SiloId, told: Any) -> Any:
        """Let a member do its step; returns its message (τ4 for a result)."""
        member, ledger = self.members[name], self.ledgers[name]
        state = self.states.get(name)
        reply: Any
        match told:
            case Descriptor():
                admitted = client.admit(told, member, self.expected, ledger)
                recorded = ledger.record(admitted.entry)
                state, reply = client.advertise_keys(admitted, recorded, entropy=self.entropy)
            case Roster() if self.session.protection.masks:
                state, reply = client.share_keys(state, told, entropy=self.entropy)
            case Roster():
                vector, seed = self.vectors[name], self.seeds[name]
                state, reply = client.seal_input(state, told, vector, seed)
            case Dealt():
                encoded, seed = self.encoded(name), self.seeds[name]
                state, reply, self.vectors[name] = client.mask_input(state, told, encoded, seed)
            case Survivors():
                state, reply = client.check_survivors(state, told, ledger)
            case Signatures():
                checked = client.check_consistency(state, told)
                state, reply = client.reveal_shares(checked, ledger.record(checked.entry))
            case _:
                return client.check_result(told, member, self.expected, state)
        self.states[name] = state
        return reply

    def encoded(self, name: SiloId) -> Encoded:
        """A member's input, made when it is asked for; ``encodings`` says who was asked."""

        def encode(masks: Sequence[Mask], prg: MaskPrg) -> Vector:
            self.encodings.append(name)
            return masked(self.ring, self.vectors[name])(masks, prg)

        return encode

    def step(self, name: SiloId) -> Any:
        """Let a member answer the server's broadcast and keep what it says."""
        phase = self.server.phase
        assert phase is not None
        self.sent[name, phase] = self.answer(name, self.told(name))
        return self.sent[name, phase]

    def accept(self, message: Any) -> bool:
        """Give the server a message, with the sender's vector where one belongs to it."""
        vector = self.vectors[message.sender] if isinstance(message, MaskedInput) else None
        return self.give(message, vector)

    def give(self, message: Any, vector: Vector | None) -> bool:
        """Give the server a message and a vector."""
        return self.server.accept(message, None if vector is None else self.uploaded(vector))

    def uploaded(self, vector: Vector) -> InMemory:
        """A vector as the server takes it."""
        return InMemory(vector, self.session.chunk_bytes)

    def gather(self, *, without: Iterable[SiloId] = ()) -> None:
        """Let everybody who is expected answer, and give it to the server."""
        for name in self.server.expected:
            if name not in without:
                self.accept(self.step(name))

    def close(self) -> Any:
        """Close the phase."""
        self.broadcast = self.server.close_phase()
        return self.broadcast

    def advance(self, phase: Phase | None, *, silent: Mapping[Phase, Iterable[SiloId]] = {}) -> Any:
        """Play honestly until ``phase`` is open (None: until the result)."""
        while self.server.phase is not phase:
            assert self.server.phase is not None
            self.gather(without=silent.get(self.server.phase, ()))
            self.close()
        return self

    def total(self, names: Iterable[SiloId]) -> Vector:
        """The slow twin: the exact sum of these inputs."""
        modulus = modulus_of(self.ring)
        sums = [
            sum(int(self.inputs[name][i]) for name in names) % modulus
            for i in range(self.opening.length)
        ]
        return np.array(sums, self.ring.dtype)


def republished(play: Play, by: str = "coordinator", **changes: Any) -> Any:
    """The result, signed anew by somebody with these changes."""
    result = replace(play.broadcast, **changes)
    tau4 = transcript.result_transcript(result.survivors_transcript, result.vector_digest)
    return signed(result, by, tau4)


def ledger_snapshot(ledger: Ledger) -> Any:
    """All that a memory ledger holds."""
    assert isinstance(ledger, MemoryLedger)
    return (
        dict(ledger._joined),
        dict(ledger._sessions),
        dict(ledger._revealed),
        {k: dict(v) for k, v in ledger._openings.items()},
        dict(ledger._keys),
    )


def server_snapshot(server: ServerRound) -> Any:
    """All that a server holds, by value."""
    return (
        server.phase,
        set(server.liars),
        None if server.total is None else server.total.tobytes(),
        server._sum.total.tobytes(),
        list(server._taus),
        list(server._members),
        {phase: dict(messages) for phase, messages in server._accepted.items()},
        dict(server._adverts),
        dict(server._dealings),
        dict(server._commits),
        {owner: dict(shares) for owner, shares in server._shares.items()},
        server.expected,
        server.arrived,
        server.survivors,
    )


def dealing_to(holder: SiloId, message: ShareKeys) -> Dealing:
    """A dealer's ShareKeys as one holder sees it."""
    boxes = {box.recipient: box.sealed for box in message.boxes}
    return Dealing(
        message.sender,
        message.commitments,
        message.boxes_digest(),
        boxes.get(holder),
        message.signature,
    )


Alter = Callable[[Play, Any], Any]
"""Makes what a member is told from the attempt and the honest message."""


def check_refused(
    play: Play, told: Any, code: str, error: type[SecaggError], name: SiloId = ME
) -> None:
    """Tell a member something bad: refused by class and code, nothing recorded, state spent.

    No update was made for it, either.
    """
    before, states = ledger_snapshot(play.ledgers[name]), dict(play.states)
    vector, encodings = play.vectors[name].copy(), list(play.encodings)
    with pytest.raises(error) as caught:
        play.answer(name, told)
    assert (type(caught.value), caught.value.code) == (error, code)
    assert play.states == states
    assert ledger_snapshot(play.ledgers[name]) == before
    np.testing.assert_array_equal(play.vectors[name], vector)
    assert play.encodings == encodings
    if not isinstance(told, Descriptor | Result):
        with pytest.raises(OutOfOrder) as spent:
            play.answer(name, play.told(name))
        assert spent.value.code == "state-spent"


def flip(data: bytes, at: int = -1) -> bytes:
    """The bytes with one bit changed."""
    changed = bytearray(data)
    changed[at] ^= 1
    return bytes(changed)


def swap(messages: tuple[Any, ...], new: Any, key: str = "sender") -> tuple[Any, ...]:
    """The sorted list with the entry of the same name replaced, or added."""
    name = getattr(new, key)
    rest = [message for message in messages if getattr(message, key) != name]
    return tuple(sorted([*rest, new], key=lambda message: getattr(message, key)))


def without(messages: tuple[Any, ...], *names: SiloId, key: str = "sender") -> tuple[Any, ...]:
    """The list without these names' entries."""
    return tuple(message for message in messages if getattr(message, key) not in names)


def of(messages: Iterable[Any], name: SiloId, key: str = "sender") -> Any:
    """The entry of a name."""
    return next(message for message in messages if getattr(message, key) == name)


def secret(data: bytes) -> Secret:
    """Bytes as a ``Secret``."""
    return Secret(data)
