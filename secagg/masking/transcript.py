"""The transcript: what everybody must have seen alike, hashed step by step.

    history_0     = H("history", session hash)
    history_{r+1} = H("history", history_r, τ4_r)
    base          = H("base", history, task hash)
    τ0 = H("round", descriptor)      τ1 = H("roster", τ0, adverts)    τ2 = H("dealt", τ1, dealings)
    τ3 = H("survivors", τ2, commits) τ4 = H("result", τ3, digest of the sum)

τ1 salts every derived key and τ0 holds the base, so silos that were led to different models, tasks
or rosters derive unrelated masks, and what they send adds up to noise instead of an update.

The design gives a session one hash over all tasks' schemas and weights. Here a task's schema and
initial weights have a hash of their own, which enters the base of its rounds: tasks can be opened
when they are first used, no silo needs to know all shapes up front, and every key still depends on
every shape and weight that matters to its round.

Weights after the first round are never hashed, since floats may differ by an ulp between machines:
silos apply the same signed sums to the same initial weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from secagg.config import SessionConfig, SiloId
from secagg.crypto.labels import (
    BASE,
    DEALT,
    HISTORY,
    RESULT,
    ROSTER,
    ROUND,
    SESSION,
    SURVIVORS,
    TASK,
    digest,
    enc,
    u64,
)
from secagg.encoding.schema import Schema
from secagg.masking.messages import (
    AdvertiseKeys,
    Descriptor,
    MaskedInput,
    descriptor_items,
)

NO_WEIGHTS: Final = bytes(32)
"""Digest of the initial weights of a task that has none (a secure sum of statistics)."""


def session_hash(session: SessionConfig) -> bytes:
    """Hash of everything in a session that changes what a silo reveals.

    Name and deadlines are left out: the same training under another name has the same bases, so
    that the silo's ledger recognises a second sum over the same updates.
    """
    tasks = (
        enc(
            task.name.encode(),
            task.weighting.encode(),
            u64(task.rounds),
            u64(task.ring_bits or 0),
            _number(task.bound),
            task.clip.encode(),
            _number(task.weight_cap),
            enc(*(enc(m.name.encode(), _number(m.bound)) for m in task.metrics)),
        )
        for task in session.tasks
    )
    return digest(
        SESSION,
        session.consortium.encode(),
        enc(*(name.encode() for name in session.silos)),
        session.protection.encode(),
        u64(session.colluders),
        u64(session.threshold.numerator),
        u64(session.threshold.denominator),
        u64(session.min_cohort),
        session.mask_prg.encode(),
        u64(session.chunk_bytes),
        enc(*tasks),
        *([session.suite.encode()] if session.suite else []),
    )


def _number(value: float) -> bytes:
    return float(value).hex().encode()


@dataclass(frozen=True, slots=True)
class TaskOpening:
    """What the first silo proposes for a task, and every silo compares with its own.

    Args:
        task: the task's name.
        schema: names and shapes.
        step: how results change the model (optimiser and its numbers), in words; "" for none.
        weights_digest: vector digest of the initial weights' file, or ``NO_WEIGHTS``.
    """

    task: str
    schema: Schema
    step: str
    weights_digest: bytes

    def digest(self, session: bytes) -> bytes:
        """Hash of the task within a session."""
        return digest(
            TASK,
            session,
            self.task.encode(),
            self.schema.encode(),
            self.step.encode(),
            self.weights_digest,
        )


def opening_transcript(session: bytes, session_id: bytes) -> bytes:
    """What a proposer signs an opening over: this session, and no other of like parameters."""
    return digest(SESSION, session, session_id)


def first_history(session: bytes) -> bytes:
    """History of a session before its first result."""
    return digest(HISTORY, session)


def next_history(history: bytes, result: bytes) -> bytes:
    """History after a result with transcript τ4."""
    return digest(HISTORY, history, result)


def base_of(history: bytes, task: bytes) -> bytes:
    """What a round of a task starts from."""
    return digest(BASE, history, task)


def position_of(task: bytes, results: Iterable[bytes]) -> bytes:
    """Which result of a task comes next: its hash and the τ4 of its own results so far.

    Other tasks' results do not move it. The base, which they do move, would let a coordinator that
    opened a sum and denied it release a made-up result of another task, and have the same update
    on a new base, with other survivors.
    """
    position = digest(HISTORY, task)
    for result in results:
        position = next_history(position, result)
    return position


def round_transcript(descriptor: Descriptor) -> bytes:
    """τ0."""
    return digest(ROUND, *descriptor_items(descriptor))


def roster_transcript(tau0: bytes, adverts: Sequence[AdvertiseKeys]) -> bytes:
    """τ1."""
    return digest(ROSTER, tau0, *(enc(advert.body(), advert.signature) for advert in adverts))


def dealt_transcript(tau1: bytes, dealt: Mapping[SiloId, bytes]) -> bytes:
    """τ2, from each dealer's signed body (its name and the digests of its two lists)."""
    return digest(DEALT, tau1, *(dealt[name] for name in sorted(dealt)))


def survivors_transcript(tau2: bytes, commits: Sequence[MaskedInput]) -> bytes:
    """τ3."""
    return digest(SURVIVORS, tau2, *(enc(c.sender.encode(), c.digest()) for c in commits))


def result_transcript(tau3: bytes, vector_digest: bytes) -> bytes:
    """τ4."""
    return digest(RESULT, tau3, vector_digest)
