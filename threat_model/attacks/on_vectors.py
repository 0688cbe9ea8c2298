"""Vectors: what is summed is what was signed, all of it, and in the ring.

A vector is the sender's to choose (poisoning is not defended); not its to deny, to leave holes in,
to change when it is summed, or to make wrap.

Source: our own analysis; CWE-130 (lengths that do not agree), CWE-367 (checked, then changed).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

import numpy as np

from secagg.config import silo_id
from secagg.coordinator.spool import Stored, Upload
from secagg.crypto.digest import chunk_digests, vector_digest
from secagg.crypto.labels import SIGN_MASKED_INPUT
from secagg.masking.messages import Dealt, MaskedInput, Result, Survivors
from secagg.wire._pb import service_pb2 as api
from threat_model.attacks.attack import Scene, attack
from threat_model.attacks.evil_coordinator import make_session
from threat_model.attacks.evil_silo import Study
from threat_model.attacks.sealed import SealedStudy
from threat_model.attacks.weak import Function, believing, nothing, replaced

C = silo_id("c")


def commit_to(study: Study, data: bytes | memoryview, seed: bytes = b"") -> MaskedInput:
    """Silo c's signed commit to these bytes."""
    digest = vector_digest(data, study.session.chunk_bytes)
    unsigned = MaskedInput(C, digest, (), bytes(64), seed)
    return study.sign("c", SIGN_MASKED_INPUT, study.silos[C].state.tau2, unsigned)


def ends_with_c(study: Study) -> bool:
    """Whether all others go on to a result that has c's vector in it."""
    study.step("a", "b", "d")
    study.call("c", "Leave", api.LeaveRequest)  # t are left
    ended = study.outcome("a", "b", "d")
    return isinstance(ended, Result) and "c" in ended.survivors


@attack(
    threat="uncommitted-vector",
    reason="vector-digest",
    weakening=replaced("secagg.masking.server:ServerRound._check_masked_input", nothing),
)
def uncommitted_vector(scene: Scene) -> bool:
    """Silo c uploads another vector than it signed, and can deny what it did to the sum."""
    with scene.stage.serving(scene.weakening) as server, Study(scene, server) as study:
        study.begin()
        study.to(Dealt)
        message = study.answer("c", study.next("c"))
        own = study.silos[C].upload
        assert own is not None
        study.send("c", message, vector=own + np.uint32(2**28))
        return ends_with_c(study) and not study.is_sum_of("abcd")  # which is what all signed


def still_open(_real: Function) -> Function:
    """Uploads that are received whenever they come."""

    def upload(self: Any, silo: Any, round_number: int, attempt: int, total: int) -> Upload:
        live = self._attempt(silo, round_number, attempt)
        if silo not in live.uploads:
            name = self.vector_name(live, silo)
            live.uploads[silo] = Upload(self.means.disk, name, total, self.config.chunk_bytes)
        found: Upload = live.uploads[silo]
        return found

    return upload


@attack(
    threat="uncommitted-vector",
    reason="vector-committed",
    weakening=replaced("secagg.coordinator.session:Session.vector_upload", still_open),
)
def vector_changed_after_its_commit(scene: Scene) -> bool:
    """Silo c overwrites what it committed to: what lies there is not what was signed and summed."""
    with scene.stage.serving(scene.weakening) as server, Study(scene, server) as study:
        study.begin()
        study.to(Dealt)
        study.step("c")
        own = study.silos[C].upload
        assert own is not None
        study.put("c", study.ring.pack(~own))
        spool = server.directory / "state" / "sessions" / study.session_id.hex() / "spool"
        return (spool / "1-1-c").read_bytes() == bytes(study.ring.pack(~own))


def holes_are_zeros(_real: Function) -> Function:
    """Uploads that are complete when their sender says so."""

    @contextmanager
    def committing(self: Upload) -> Iterator[Stored | None]:
        with self._lock:
            data = self._disk.view(self.name)
            assert data is not None
            yield Stored(self.total, chunk_digests(data, self._chunk_bytes))
            self._open = False

    return committing


@attack(
    threat="short-vector",
    reason="chunk-gap",
    weakening=replaced("secagg.coordinator.spool:Upload.committing", holes_are_zeros),
)
def vector_with_a_gap(scene: Scene) -> bool:
    """Silo c leaves out its vector's last chunk: the coordinator sums bytes that nobody sent."""
    session = make_session(chunk_bytes=64)
    with scene.stage.serving(scene.weakening) as server, Study(scene, server, session) as study:
        study.begin()
        study.to(Dealt)
        study.answer("c", study.next("c"))
        data = bytearray(study.ring.pack(study.silos[C].upload))
        assert len(data) > 64
        data[64:] = bytes(len(data) - 64)
        blob = api.Blob(vector=api.Blob.Vector(round=1, attempt=1))
        fields = {"blob": blob, "total": len(data), "data": bytes(data[:64])}
        study.call("c", "PutChunk", api.PutChunkRequest, **fields)  # and no other: c has a gap
        study.say("c", commit_to(study, data))
        return ends_with_c(study)


def any_size(real: Function) -> Function:
    """Uploads of whatever size their sender says."""

    def upload(self: Any, silo: Any, round_number: int, attempt: int, total: int) -> Upload:
        live = self._attempt(silo, round_number, attempt)
        own = live.server.opening.length * self.ring(live).word_bytes
        found: Upload = real(self, silo, round_number, attempt, own)
        found.total = total
        found._digests = [None] * -(-total // self.config.chunk_bytes)
        found._left = len(found._digests)
        return found

    return upload


@attack(
    threat="short-vector",
    reason="vector-length",
    weakening=replaced("secagg.coordinator.session:Session.vector_upload", any_size),
)
def vector_of_another_size(scene: Scene) -> bool:
    """Silo c uploads a vector of four chunks where the task's has one: the disk is its own."""
    with scene.stage.serving(scene.weakening) as server, Study(scene, server) as study:
        study.begin()
        study.to(Dealt)
        study.next("c")
        size = study.session.chunk_bytes
        blob = api.Blob(vector=api.Blob.Vector(round=1, attempt=1))
        fields = {"blob": blob, "total": 4 * size, "data": bytes(size)}
        study.call("c", "PutChunk", api.PutChunkRequest, **fields)
        spool = server.directory / "state" / "sessions" / study.session_id.hex() / "spool"
        return (spool / "1-1-c").stat().st_size == 4 * size


@attack(
    threat="no-residue",
    reason="residue-range",
    weakening=replaced("secagg.ring.vectors:PrimeRing.holds", believing),
)
def words_that_are_no_residues(scene: Scene) -> bool:
    """Silo c's words are residues plus the most multiples of q: the sum of all wraps at 2^64."""
    with scene.stage.serving(scene.weakening) as server, SealedStudy(scene, server) as study:
        study.begin()
        study.to(Dealt)
        message: Any = study.answer("c", study.next("c"))
        own, q = study.silos[C].upload, study.session.suite.parameters.modulus
        words = own + np.uint64(q) * ((np.uint64(2**64 - 1) - own) // np.uint64(q))
        data = study.ring.pack(words)
        study.put("c", data)
        study.say("c", commit_to(study, data, message.seed))
        study.step("a", "b", "d")
        study.call("c", "Leave", api.LeaveRequest)
        ended = study.outcome("a", "b", "d")
        return isinstance(ended, Result) and bool(study.sum().any())


SEEDS: Final = replaced("secagg.masking.server:ServerRound._check_seed", nothing)


@attack(threat="seed-repeated", reason="seed-repeated", weakening=SEEDS)
def anothers_seed(scene: Scene) -> bool:
    """Silo c seals under a's seed of c1: the survivors, who see it, open no sum."""
    with scene.stage.serving(scene.weakening) as server, SealedStudy(scene, server) as study:
        study.begin()
        study.to(Dealt)
        study.seeds = dict.fromkeys((silo_id("a"), C), os.urandom(32))
        study.step()
        event = study.next("b")
        seeds = [commit.seed for commit in event.commits]
        return len(set(seeds)) < len(seeds)


@attack(threat="seed-repeated", reason="seed-missing", weakening=SEEDS)
def seed_where_none_belongs(scene: Scene) -> bool:
    """Silo c's commit of a masked vector has a seed, with which no result can be signed."""
    with scene.stage.serving(scene.weakening) as server, Study(scene, server) as study:
        study.begin()
        study.to(Dealt)
        study.answer("c", study.next("c"))
        data = study.ring.pack(study.silos[C].upload)
        study.put("c", data)
        study.say("c", commit_to(study, data, os.urandom(32)))
        study.step("a", "b", "d")
        event = study.next("a")
        return isinstance(event, Survivors) and any(commit.seed for commit in event.commits)
