"""A whole federation in one process, without a network: the protocol core, played for real.

``Federation`` holds n silos with their own keys, policies and ledgers, and a coordinator; every
message, signature, mask and share is the product's own. Faults are scripted per round: silos that
fall silent, messages that come late or twice, clients that lie, a coordinator that tampers. Used by
tests, benchmarks and researchers; ``run_round`` is the protocol in one page.

One call of ``run_round`` is one attempt on a fresh base: what a caller passes in after an abort is
a new update. ``same_base=True`` plays another attempt at the same round instead, which the silos'
ledgers guard.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Protocol, TypeAlias, TypeVar, cast

import numpy as np
import numpy.typing as npt

from secagg.ckks.codec import SealedCodec, codec_of
from secagg.ckks.engine import require
from secagg.ckks.keyring import HeldKey, make_key
from secagg.ckks.sealing import Sealer
from secagg.config import (
    Clip,
    MaskPrg,
    Metric,
    Phase,
    Policy,
    Protection,
    RingBits,
    SessionConfig,
    SiloId,
    TaskConfig,
    ThresholdRule,
    Weighting,
    silo_id,
)
from secagg.crypto.secret import Entropy
from secagg.crypto.sign import IdentityKey
from secagg.encoding.codec import Codec
from secagg.encoding.layout import Aggregate
from secagg.encoding.schema import Schema
from secagg.errors import (
    ConfigError,
    FaultyServer,
    PolicyRefused,
    SecaggError,
    TooLate,
)
from secagg.masking import client, transcript
from secagg.masking.ledger import Ledger, MemoryLedger
from secagg.masking.manifest import Manifest
from secagg.masking.messages import (
    SEED_BYTES,
    Dealt,
    Descriptor,
    Result,
    Roster,
    ShareKeys,
    Signatures,
    Survivors,
)
from secagg.masking.server import ClientMessage, Opening, ServerRound, describe
from secagg.masking.uploads import InMemory
from secagg.ring.expand import Encoded, masked
from secagg.ring.vectors import Vector, ring_of
from secagg.suite import Suite

TASK = "training"
Updates: TypeAlias = Mapping[str, Mapping[str, npt.NDArray[Any]]]
Message: TypeAlias = Descriptor | Roster | Dealt | Survivors | Signatures | Result
_M = TypeVar("_M", bound=Message)


class Arrival(StrEnum):
    """How a client's message reaches the coordinator."""

    DELAYED = "delayed"
    DUPLICATED = "duplicated"


Lie: TypeAlias = Callable[[ClientMessage, Vector | None], tuple[ClientMessage, Vector | None]]
"""Replaces a client's message (and its vector, with a MaskedInput)."""


class Tamper(Protocol):
    """A coordinator that does as it likes with what it tells a silo."""

    def __call__(self, silo: SiloId, message: _M, /) -> _M:
        """Return what the silo gets to see."""
        ...


@dataclass(frozen=True, slots=True)
class RoundResult:
    """What a round gave.

    Args:
        mean: float64 arrays by tensor name: the survivors' mean by weight.
        survivors: who is in the sum, sorted.
        dropouts: the cohort without the survivors, sorted.
        bytes_up: bytes of the ring vector and the messages that each silo sent, by silo.
        weight: sum of the survivors' weights.
        metrics: mean by weight.
        total: the unmasked ring vector.
        liars: silos whose shares did not open their commitments.
    """

    mean: dict[str, npt.NDArray[np.float64]]
    survivors: list[str]
    dropouts: list[str]
    bytes_up: dict[str, int]
    weight: float
    metrics: dict[str, float]
    total: Vector
    liars: list[str]


@dataclass
class Silo:
    """One simulated silo: what it is across rounds, and where it stands in the current one."""

    member: client.Member
    ledger: Ledger
    state: Any = None
    encoded: Encoded | None = None
    seed: bytes = b""
    refusals: list[SecaggError] = field(default_factory=list)
    sent: int = 0

    @property
    def name(self) -> SiloId:
        """Its name."""
        return self.member.name


@dataclass
class Script:
    """What goes wrong in one round.

    Args:
        drops: the phase in which a silo falls silent.
        arrivals: how a silo's message of a phase arrives, if not once and in time.
        lies: replaces a silo's message of a phase.
        tamper: what the coordinator does to what it tells a silo.
    """

    drops: Mapping[str, str] = field(default_factory=dict)
    arrivals: Mapping[tuple[str, str], Arrival] = field(default_factory=dict)
    lies: Mapping[tuple[str, str], Lie] = field(default_factory=dict)
    tamper: Tamper | None = None


class Federation:
    """n silos and a coordinator in memory.

    Args:
        silos: how many, or their names.
        protection: "masked", "ckks" or "ckks+masked"; the latter two need the extra ``ckks``.
        ring_bits: w, the word size: 16, 32 or 64; 32 where nothing is given, and none where the
            protection brings its own ring.
        bound: greatest magnitude of an element (of the L2 norm with clip="l2").
        clip: "none", "element" or "l2".
        weight_cap: greatest weight.
        threshold: rule for t as a fraction of the cohort: t = ⌊n · fraction⌋ + 1.
        colluders: n_c.
        mask_prg: "aes-128-ctr" or "chacha20".
        metrics: bound by metric name.
        entropy: source of every key, seed and rounding bit; os.urandom unless a run is to replay.
            The noise of sealing is always the system's.

    Raises:
        ConfigError: the numbers do not make a session (fewer than 3 silos, for example).
    """

    def __init__(
        self,
        silos: int | Sequence[str] = 4,
        protection: str = "masked",
        *,
        ring_bits: RingBits | None = None,
        bound: float = 1.0,
        clip: str = "none",
        weight_cap: float = 1000.0,
        threshold: str = "2/3",
        colluders: int = 1,
        mask_prg: str = "aes-128-ctr",
        metrics: Mapping[str, float] | None = None,
        entropy: Entropy = os.urandom,
    ) -> None:
        names = _names(silos)
        how = _parse(Protection, protection)
        if ring_bits is None and not how.seals:
            ring_bits = 32
        task = TaskConfig(
            name=TASK,
            weighting=Weighting.MEAN,
            rounds=2**31 - 1,
            ring_bits=ring_bits,
            bound=bound,
            clip=_parse(Clip, clip),
            weight_cap=weight_cap,
            metrics=tuple(Metric(name, limit) for name, limit in (metrics or {}).items()),
        )
        self.session = SessionConfig(
            name="simulation",
            consortium="simulation",
            silos=names,
            protection=how,
            suite=Suite.CKKS_54 if how.seals else None,
            colluders=colluders,
            threshold=ThresholdRule.parse(threshold),
            min_cohort=max(3, colluders + 2),
            mask_prg=_parse(MaskPrg, mask_prg),
            tasks=(task,),
        )
        self.entropy = entropy
        self.identity = IdentityKey.generate(entropy)
        self.history = transcript.first_history(transcript.session_hash(self.session))
        self.round = 1
        self.attempt = 0
        self._session_id = entropy(32)
        self._silos = self._enrol(names)
        self.key = self._make_key()

    @property
    def silos(self) -> list[str]:
        """The silos' names, sorted."""
        return list(self._silos)

    def silo(self, name: str) -> Silo:
        """One silo, to look at its state, ledger and refusals."""
        return self._silos[silo_id(name)]

    def run_round(
        self,
        updates: Updates,
        weights: Mapping[str, float] | None = None,
        drops: Mapping[str, str] | None = None,
        *,
        metrics: Mapping[str, Mapping[str, float]] | None = None,
        script: Script | None = None,
        same_base: bool = False,
    ) -> RoundResult:
        """Play one attempt at a round.

        Args:
            updates: float arrays by tensor name, by silo; the silos named are the cohort.
            weights: weight by silo; all at the cap where none are given.
            drops: phase in which a silo falls silent, by silo: it sends nothing from then on.
            metrics: metrics by silo, where the federation has any.
            script: other faults (its own drops are overruled by ``drops``).
            same_base: another attempt at the round that was aborted last.

        Returns:
            The mean of the survivors and who they were.

        Raises:
            RoundAborted: too few silos were left; the next round starts clean.
            InputError: an update cannot be encoded.
            ConfigError: an unknown silo or phase.
        """
        script = script or Script()
        if drops is not None:
            script = Script(drops, script.arrivals, script.lies, script.tamper)
        weights, metrics = weights or {}, metrics or {}
        self._check_names(updates, weights, metrics, script)
        schema = Schema.of(next(iter(updates.values())))
        codec = codec_of(self.session, TASK, schema)
        self._encode(codec, updates, weights, metrics)
        if not same_base and self.attempt:
            self._abandon_base()
        play = _Play(self, codec, [self._silos[silo_id(name)] for name in sorted(updates)], script)
        self.attempt += 1
        result = play.run()
        return self._accept(play, codec, result)

    def _make_key(self) -> HeldKey | None:
        """The key that all silos have, as custody would have brought it to them."""
        if self.session.suite is None:
            return None
        require()
        key = make_key(self._session_id, 1, self.manifest.silos, self.entropy)
        self.sealer = Sealer(self.session.suite, key.material)
        return key

    def _encode(
        self,
        codec: Codec | SealedCodec,
        updates: Updates,
        weights: Mapping[str, float],
        metrics: Mapping[str, Mapping[str, float]],
    ) -> None:
        for name, tensors in updates.items():
            silo = self._silos[silo_id(name)]
            weight, own = weights.get(name, codec.task.weight_cap), metrics.get(name, {})
            codec.check(tensors, weight=weight, metrics=own)
            if isinstance(codec, SealedCodec):
                silo.seed = self.entropy(SEED_BYTES)
                vector = codec.encode(
                    tensors, weight=weight, metrics=own, sealer=self.sealer, seed=silo.seed
                )
                silo.encoded = masked(codec.ring, vector)
            else:
                silo.encoded = codec.encoded(
                    tensors, weight=weight, metrics=own, entropy=self.entropy
                )

    def _decode(self, codec: Codec | SealedCodec, total: Vector, result: Result) -> Aggregate:
        if isinstance(codec, SealedCodec):
            return codec.decode(total, self.sealer, result.seeds)
        return codec.decode(total)

    def _accept(self, play: _Play, codec: Codec | SealedCodec, result: Result) -> RoundResult:
        assert play.server.total is not None
        tau4 = transcript.result_transcript(result.survivors_transcript, result.vector_digest)
        self.history = transcript.next_history(self.history, tau4)
        self.round, self.attempt = self.round + 1, 0
        aggregate = self._decode(codec, play.server.total, result)
        return RoundResult(
            mean=aggregate.tensors,
            survivors=list(result.survivors),
            dropouts=sorted(set(result.cohort) - set(result.survivors)),
            bytes_up={silo.name: silo.sent for silo in play.cohort},
            weight=aggregate.weight,
            metrics=aggregate.metrics,
            total=play.server.total,
            liars=sorted(play.server.liars),
        )

    def _abandon_base(self) -> None:
        """After an abort, new updates are of a new base; the round's number stays."""
        self.history = transcript.next_history(self.history, self.entropy(32))

    def _enrol(self, names: tuple[SiloId, ...]) -> dict[SiloId, Silo]:
        keys = {name: IdentityKey.generate(self.entropy) for name in names}
        self.manifest = Manifest(
            consortium=self.session.consortium,
            version=1,
            silos={name: key.public for name, key in keys.items()},
            coordinator=self.identity.public,
        )
        policy = Policy(
            colluders=self.session.colluders,
            min_cohort=self.session.min_cohort,
            min_threshold=self.session.colluders + 2,
            protections=(self.session.protection,),
            ring_bits=(16, 32, 64),
            clips=tuple(Clip),
            max_weight_cap=self.session.tasks[0].weight_cap,
        )
        return {
            name: Silo(
                client.Member(name, key, self.manifest, policy, self.session, self._session_id),
                MemoryLedger(),
            )
            for name, key in keys.items()
        }

    def _check_names(
        self,
        updates: Updates,
        weights: Mapping[str, float],
        metrics: Mapping[str, Mapping[str, float]],
        script: Script,
    ) -> None:
        unknown = set(updates) - set(self.silos)
        unknown |= set(script.drops) - set(updates)
        unknown |= {name for name, _ in (*script.arrivals, *script.lies)} - set(updates)
        unknown |= {*weights, *metrics} - set(updates)
        if unknown or not updates:
            raise ConfigError("silo-unknown", f"No such silos in this round: {sorted(unknown)}.")
        phases = [*script.drops.values()]
        phases += [phase for _, phase in (*script.arrivals, *script.lies)]
        for phase in phases:
            if _parse(Phase, phase) not in self.session.protection.phases:
                raise ConfigError("option", f"There is no {phase} under {self.session.protection}.")


class _Play:
    """One attempt: every phase is tell, answer, deliver, close."""

    def __init__(
        self,
        federation: Federation,
        codec: Codec | SealedCodec,
        cohort: list[Silo],
        script: Script,
    ) -> None:
        self.cohort = cohort
        self._federation = federation
        self._script = script
        opening = transcript.TaskOpening(TASK, codec.schema, "", transcript.NO_WEIGHTS)
        task_hash = opening.digest(transcript.session_hash(federation.session))
        base = transcript.base_of(federation.history, task_hash)
        key = None if federation.key is None else federation.key.name
        self._expected = client.Expected(TASK, federation.round, base, key=key)
        self._ring = ring_of(federation.session, TASK)
        self._late: list[tuple[Silo, ClientMessage, Vector | None]] = []
        self._opening = Opening(
            federation.session,
            cohort[0].member.session_id,
            federation.manifest,
            TASK,
            federation.round,
            federation.attempt + 1,
            base,
            tuple(silo.name for silo in cohort),
            codec.length,
            key,
        )

    def run(self) -> Result:
        """Play all phases.

        Raises:
            RoundAborted: too few are left.
        """
        federation = self._federation
        descriptor = describe(self._opening, federation.identity, federation.entropy)
        self.server = ServerRound(self._opening, descriptor, federation.identity)
        for silo in self.cohort:
            silo.state, silo.sent, silo.refusals = None, 0, []
            self._step(silo, Phase.ADVERTISE_KEYS, descriptor)
        for phase in federation.session.protection.phases[1:]:
            broadcast = self._close()
            for silo in self.cohort:
                message = broadcast.get(silo.name) if isinstance(broadcast, Mapping) else broadcast
                if message is None:  # its last message was not accepted
                    silo.state = None
                elif silo.state is not None:
                    self._step(silo, phase, cast(Message, message))
        result = cast(Result, self._close())
        for silo in self.cohort:
            self._conclude(silo, result)
        return result

    def _close(self) -> Any:
        broadcast = self.server.close_phase()
        for silo, message, vector in self._late:
            self._deliver(silo, message, vector)
        self._late.clear()
        return broadcast

    def _step(self, silo: Silo, phase: Phase, told: Message) -> None:
        """Let a silo answer what it is told, unless it is scripted to be silent."""
        if self._script.drops.get(silo.name) == phase:
            silo.state = None
            return
        if self._script.tamper is not None:
            told = self._script.tamper(silo.name, told)
        try:
            message, vector = self._answer(silo, told)
        except (FaultyServer, PolicyRefused) as refusal:
            silo.state = None
            silo.refusals.append(refusal)
            return
        if (lie := self._script.lies.get((silo.name, phase))) is not None:
            message, vector = lie(message, vector)
        self._send(silo, phase, message, vector)

    def _answer(self, silo: Silo, told: Message) -> tuple[ClientMessage, Vector | None]:
        entropy, ledger = self._federation.entropy, silo.ledger
        reply: ClientMessage
        vector: Vector | None = None
        match told:
            case Descriptor():
                admitted = client.admit(told, silo.member, self._expected, ledger)
                recorded = ledger.record(admitted.entry)
                silo.state, reply = client.advertise_keys(admitted, recorded, entropy=entropy)
            case Roster() if silo.member.session.protection.masks:
                silo.state, reply = client.share_keys(silo.state, told, entropy=entropy)
            case Roster():
                assert silo.encoded is not None
                vector = silo.encoded((), self._federation.session.mask_prg)
                silo.state, reply = client.seal_input(silo.state, told, vector, silo.seed)
            case Dealt():
                assert silo.encoded is not None
                silo.state, reply, vector = client.mask_input(
                    silo.state, told, silo.encoded, silo.seed
                )
            case Survivors():
                silo.state, reply = client.check_survivors(silo.state, told, ledger)
            case _:
                checked = client.check_consistency(silo.state, cast(Signatures, told))
                entry = ledger.record(checked.entry)
                silo.state, reply = client.reveal_shares(checked, entry)
        return reply, vector

    def _send(
        self, silo: Silo, phase: Phase, message: ClientMessage, vector: Vector | None
    ) -> None:
        silo.sent += _size(message) + (vector.nbytes if vector is not None else 0)
        arrival = self._script.arrivals.get((silo.name, phase))
        if arrival is Arrival.DELAYED:
            self._late.append((silo, message, vector))
            return
        for _ in range(2 if arrival is Arrival.DUPLICATED else 1):
            self._deliver(silo, message, vector)

    def _deliver(self, silo: Silo, message: ClientMessage, vector: Vector | None) -> None:
        try:
            chunk_bytes = self._federation.session.chunk_bytes
            uploaded = None if vector is None else InMemory(vector, chunk_bytes)
            self.server.accept(message, uploaded)
        except SecaggError as refusal:  # told to the sender, which is scripted or late
            silo.refusals.append(refusal)
            if isinstance(refusal, TooLate):  # it leaves the attempt, and blames nobody
                silo.state = None

    def _conclude(self, silo: Silo, result: Result) -> None:
        told = result
        if self._script.tamper is not None:
            told = self._script.tamper(silo.name, result)
        done = (client.SharesRevealed, client.SurvivorsSigned)
        state = silo.state if isinstance(silo.state, done) else None
        try:
            client.check_result(told, silo.member, self._expected, state)
        except FaultyServer as refusal:
            silo.refusals.append(refusal)


def _names(silos: int | Sequence[str]) -> tuple[SiloId, ...]:
    if isinstance(silos, int):
        width = len(str(max(silos - 1, 0)))
        silos = [f"silo-{index:0{width}d}" for index in range(silos)]
    return tuple(sorted(silo_id(name) for name in silos))


_E = TypeVar("_E", bound=StrEnum)


def _parse(kind: type[_E], text: str) -> _E:
    try:
        return kind(text)
    except ValueError:
        known = ", ".join(kind)
        raise ConfigError("option", f"{text!r} is none of: {known}.") from None


def _size(message: ClientMessage) -> int:
    """Bytes of a message's content; the wire's framing adds a few per cent."""
    size = len(message.body()) + len(message.signature)
    if isinstance(message, ShareKeys):
        size += sum(len(box.sealed) for box in message.boxes) + 64 * len(message.commitments)
    return size
