"""Models that differ between silos, and results that are not what was opened.

Source: Pasquini, Francati and Ateniese, Eluding Secure Aggregation in Federated Learning via Model
Inconsistency, CCS 2022 (arXiv 2111.07380): with a model of dead units the others' updates are zero,
and the sum is the victim's.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np

from secagg.config import SiloId, silo_id
from secagg.crypto.digest import vector_digest
from secagg.crypto.labels import SIGN_RESULT
from secagg.encoding.schema import Schema
from secagg.masking import transcript
from secagg.masking.ledger import Opened
from secagg.masking.messages import AdvertiseKeys, Result
from secagg.ring.vectors import Vector
from secagg.wire import session as wire_session
from secagg.wire._pb import service_pb2 as api
from threat_model.attacks.attack import Scene, attack
from threat_model.attacks.attempt import Attempt
from threat_model.attacks.evil_coordinator import (
    LENGTH,
    TASK,
    EvilCoordinator,
    secret_values,
)
from threat_model.attacks.weak import Function, nothing, replaced, without

SHIFT = 2**24
OTHERS = "bcd"
ALL = "abcd"


def shifted(total: Vector) -> Vector:
    """Another sum, which decodes as well."""
    words = total.copy()
    words[:1] += words.dtype.type(SHIFT)
    return words


@contextmanager
def misled(scene: Scene) -> Iterator[tuple[EvilCoordinator, dict[SiloId, bytes]]]:
    """Two signed results of round 1, one for a, another one for its peers: their bases by silo. In
    round 2 the peers' updates are zero, and a's is a secret.
    """
    with EvilCoordinator(scene, calls=2) as evil:
        first = dict(evil.values)
        evil.values = dict.fromkeys(evil.values, np.zeros(LENGTH))
        evil.values[silo_id("a")] = secret_values()
        for name, update in first.items():
            evil.start_one(name, values=[update, evil.values[name]])
        attempt = Attempt(evil).to_masked()
        total = attempt.open(*ALL)
        past, bases = evil.history, {}
        for names, words in (("a", total), (OTHERS, shifted(total))):
            result = attempt.result(words, *ALL)
            for name in names:
                evil.release(silo_id(name), result, words)
            evil.history = past
            evil.move_on(result)
            bases |= dict.fromkeys(map(silo_id, names), evil.base)
        del evil.results[1:]
        yield evil, bases


def without_base(real: Function) -> Function:
    """``transcript.descriptor_items`` of keys that know nothing of the model: the base is last."""
    return lambda descriptor: real(descriptor)[:-1]


@attack(
    threat="model-inconsistency",
    reason="advertise-keys-signature",
    weakening=replaced("secagg.masking.transcript:descriptor_items", without_base),
)
def models_that_differ(scene: Scene) -> bool:
    """Each silo is told the base that its model has, and all else alike."""
    with scene.alike(), misled(scene) as (evil, bases):
        attempt = Attempt(evil)
        evil.await_ready(*bases)
        for name, base in bases.items():
            attempt.adverts[name] = attempt.tell(
                name, attempt.signed(attempt.descriptor, base=base)
            )
        attempt.share()
        attempt.mask()
        return evil.reads(attempt.open(*ALL), "a")


@attack(threat="other-weights", reason="descriptor-base", weakening=without("descriptor-base"))
def another_base(scene: Scene) -> bool:
    """a is told the base of the others, whose model it has not got."""
    with misled(scene) as (evil, bases):
        attempt = Attempt(evil, base=bases[silo_id("b")]).to_masked()
        return evil.reads(attempt.open(*ALL), "a")


@contextmanager
def opened_round(scene: Scene) -> Iterator[tuple[EvilCoordinator, Attempt, Vector]]:
    """a has opened the sum of all four, and waits for the result."""
    with EvilCoordinator(scene, colluders=OTHERS) as evil:
        evil.start()
        attempt = Attempt(evil).to_masked()
        yield evil, attempt, attempt.open(*ALL)


def applied(evil: EvilCoordinator, result: Result, words: Vector) -> bool:
    """Whether a takes the result, and this sum for it."""
    evil.release(silo_id("a"), result, words)
    wanted = evil.codec.decode(words).tensors["x"]
    return bool(np.allclose(evil.answer("a")[0], wanted, atol=1e-6))


@attack(threat="forged-result", reason="result-signature", weakening=without("result-signature"))
def forged_result(scene: Scene) -> bool:
    """A sum of somebody's choice, under the signature of a silo."""
    with opened_round(scene) as (evil, attempt, total):
        words = shifted(total)
        result = attempt.result(words, *ALL)
        tau4 = transcript.result_transcript(result.survivors_transcript, result.vector_digest)
        key = attempt.colluders[silo_id("b")].member.identity
        forged = replace(result, signature=key.sign(SIGN_RESULT, tau4, result.body()))
        return applied(evil, forged, words)


@attack(threat="forged-result", reason="result-survivors", weakening=without("result-survivors"))
def other_survivors(scene: Scene) -> bool:
    """a signed that four silos are in the sum; the result says three."""
    with opened_round(scene) as (evil, attempt, total):
        words = total.copy()
        return applied(evil, attempt.result(words, *"abc"), words)


@attack(
    threat="forked-past",
    reason="history-fork",
    weakening=replaced("client_sdk.past:Past._check_past", nothing),
)
def forked_past(scene: Scene) -> bool:
    """a comes back, and another sum is shown to it for the round that it has lived through."""
    with EvilCoordinator(scene, colluders=OTHERS, calls=2) as evil:
        evil.start()
        attempt = Attempt(evil).to_masked()
        total, history = attempt.open(*ALL), evil.history
        true = attempt.result(total, *ALL)
        evil.release(silo_id("a"), true, total)
        evil.move_on(true)
        later = Attempt(evil)
        later.tell("a", later.descriptor)
        evil.end("a")
        words = shifted(total)
        made_up = attempt.result(words, *ALL)
        evil.results, evil.history = [], history
        evil.keep(silo_id("a"), made_up, words)
        evil.move_on(made_up)
        evil.start_one(silo_id("a"), again=True)
        evil.await_ready(silo_id("a"))
        wanted = evil.codec.decode(words).tensors["x"]
        return bool(np.allclose(evil.end("a")[0]["results"][0], wanted, atol=1e-6))


def proposal(
    evil: EvilCoordinator, silo: str, step: str = "", model: bytes = b"", task: str = TASK
) -> api.TaskOpening:
    """What a colluder says that all silos start from."""
    weights = vector_digest(model, evil.session.chunk_bytes) if model else transcript.NO_WEIGHTS
    opening = transcript.TaskOpening(task, Schema.of({"x": np.zeros(LENGTH)}), step, weights)
    identity = evil.consortium.credentials(silo).identity_key
    assert identity is not None
    bound = transcript.opening_transcript(evil.session_hash, evil.session_id)
    signed = wire_session.SignedOpening.sign(opening, len(model), silo, identity, bound)
    return wire_session.opening_to_wire(signed)


def any_opening(real: Function) -> Function:
    """``MemoryLedger.check`` that compares openings with nothing."""

    def check(self: object, entry: object) -> None:
        if not isinstance(entry, Opened):
            real(self, entry)

    return check


@attack(
    threat="task-replaced",
    reason="task-replaced",
    weakening=replaced("secagg.masking.ledger:MemoryLedger.check", any_opening),
)
def replaced_task(scene: Scene) -> bool:
    """a restarts, and is handed another opening of the task that it had agreed on: a takes part
    with what a colluder says that all start from.
    """
    with EvilCoordinator(scene, colluders=OTHERS) as evil:
        evil.start()
        agreed = Attempt(evil).descriptor.base
        evil.await_ready(silo_id("a"))
        evil.end("a")
        evil.opening = proposal(evil, "b", "another")
        evil.start_one(silo_id("a"), again=True)
        evil.await_ready(silo_id("a"))
        attempt = Attempt(evil)
        assert attempt.descriptor.base != agreed
        return isinstance(attempt.tell("a", attempt.descriptor), AdvertiseKeys)


def no_openings(_real: Function) -> Function:
    """``MemoryLedger.openings`` of a silo that does not remember which it took."""
    return lambda *_: {}


@attack(
    threat="weights-asked-again",
    reason="task-propose-again",
    weakening=replaced("secagg.masking.ledger:MemoryLedger.openings", no_openings),
)
def weights_asked_again(scene: Scene) -> bool:
    """a has trained for a while when it restarts; the coordinator asks it to propose the task's
    initial weights, and reads what a's model has become.
    """
    place, first, trained = api.Blob(weights=TASK), b"initial weights", os.urandom(64)
    with EvilCoordinator(scene, colluders=OTHERS) as evil:
        evil.opening = proposal(evil, "b", model=first)
        evil.blobs[str(place)] = bytearray(first)
        evil.start_one(silo_id("a"), model=first)
        evil.await_ready(silo_id("a"))
        evil.end("a")
        evil.opening = None
        evil.start_one(silo_id("a"), again=True, model=trained)
        evil.await_opening()
        return bytes(evil.blobs[str(place)]) == trained


@attack(
    threat="sealed-weights",
    reason="task-signature",
    weakening=replaced("secagg.wire.session:SignedOpening.verify", nothing),
)
def planted_weights(scene: Scene) -> bool:
    """a proposed its initial weights; b is given the coordinator's under a's name."""
    place, planted = api.Blob(weights=TASK), os.urandom(64)
    with EvilCoordinator(scene, colluders="cd") as evil:
        evil.start_one(silo_id("a"), model=b"initial weights")
        evil.await_opening()
        forged = proposal(evil, "c", model=planted)
        forged.proposer = "a"
        evil.opening = forged
        evil.blobs[str(place)] = bytearray(planted)
        evil.start_one(silo_id("b"), model=b"initial weights")
        evil.await_ready(silo_id("b"))
        return bytes.fromhex(evil.end("b")[0]["model"]) == planted
