"""Openings of tasks, initial weights, and names that become files.

Who opens a task chooses its tensors and the weights that everybody starts from; the coordinator
has it be one silo, once, under its signature. What silos and admins name (tasks, above all) names
files in the coordinator's state directory.

Source: Esser, MySQL and SQL Column Truncation Vulnerabilities (2008), and CWE-22, for names that
mean something else further down; our own analysis of who may open a task.
"""

from __future__ import annotations

import os
from contextlib import suppress
from typing import Any, Final

import numpy as np

from secagg.config import silo_id
from secagg.coordinator.spool import Blob, Stored, Upload
from secagg.coordinator.state import PROPOSAL_SECONDS, Proposal
from secagg.crypto.digest import chunk_digests, vector_digest
from secagg.encoding.schema import Schema
from secagg.masking import transcript
from secagg.wire import session as wire_session
from secagg.wire._pb import service_pb2 as api
from threat_model.attacks.attack import Refused, Scene, attack
from threat_model.attacks.evil_coordinator import LENGTH, TASK, make_session
from threat_model.attacks.evil_silo import Study
from threat_model.attacks.on_certificates import await_call
from threat_model.attacks.weak import Function, nothing, replaced

CHUNK: Final = 64
WEIGHTS: Final = bytes(range(CHUNK + 8))


def opening(
    study: Study, proposer: str, *, step: str = "", weights: bytes = b""
) -> api.TaskOpening:
    """A task's opening, signed by a silo."""
    chunk = study.session.chunk_bytes
    digest = vector_digest(weights, chunk) if weights else transcript.NO_WEIGHTS
    taken = transcript.TaskOpening(TASK, Schema.of({"x": np.zeros(LENGTH)}), step, digest)
    identity = study.silos[silo_id(proposer)].member.identity
    tau = transcript.opening_transcript(study.session_hash, study.session_id)
    signed = wire_session.SignedOpening.sign(taken, len(weights), proposer, identity, tau)
    return wire_session.opening_to_wire(signed)


def ask(study: Study, silo: str) -> Any:
    """Ask for the task's opening."""
    return study.call(silo, "OpenTask", api.OpenTaskRequest, task=TASK)


def propose(study: Study, silo: str, proposed: api.TaskOpening) -> None:
    """Propose an opening."""
    study.call(silo, "ProposeTask", api.ProposeTaskRequest, opening=proposed)


def put(study: Study, silo: str, offset: int, data: bytes, total: int, task: str = TASK) -> None:
    """Upload a chunk of initial weights."""
    fields = {"blob": api.Blob(weights=task), "offset": offset, "data": data, "total": total}
    study.call(silo, "PutChunk", api.PutChunkRequest, **fields)


def bring(study: Study, silo: str) -> None:
    """Have a silo be asked for the task, and upload its initial weights."""
    ask(study, silo)
    for offset in range(0, len(WEIGHTS), CHUNK):
        put(study, silo, offset, WEIGHTS[offset : offset + CHUNK], len(WEIGHTS))


# Whose opening it is.


def last_to_ask(real: Function) -> Function:
    """A session in which whoever asks last is to propose."""

    def open_task(self: Any, silo: Any, task: str, now: float) -> Any:
        if task not in self.tasks:
            self._proposals[task] = Proposal(silo, now + PROPOSAL_SECONDS)
        return real(self, silo, task, now)

    return open_task


@attack(
    threat="task-taken-over",
    reason="task-proposer",
    weakening=replaced("secagg.coordinator.session:Session.open_task", last_to_ask),
)
def task_opened_by_one_who_was_not_asked(scene: Scene) -> bool:
    """Silo a is asked to open the task, and b opens it before a does, as b likes it."""
    with scene.stage.serving(scene.weakening) as server, Study(scene, server) as study:
        ask(study, "a")
        study.later("b", "OpenTask", api.OpenTaskRequest, task=TASK)
        await_call(study, "b")
        propose(study, "b", opening(study, "b"))
        return bool(ask(study, "c").opening.proposer == "b")


def reopening(real: Function) -> Function:
    """A session in which the newest opening counts."""

    def propose_task(self: Any, silo: Any, signed: Any) -> None:
        if self.tasks.pop(signed.opening.task, None):
            self._proposals[signed.opening.task] = Proposal(silo, PROPOSAL_SECONDS)
        real(self, silo, signed)

    return propose_task


@attack(
    threat="task-taken-over",
    reason="task-open",
    weakening=replaced("secagg.coordinator.session:Session.propose_task", reopening),
)
def another_opening_of_an_open_task(scene: Scene) -> bool:
    """Silo a opens the task again, otherwise, when some have adopted it: the session is split."""
    with scene.stage.serving(scene.weakening) as server, Study(scene, server) as study:
        ask(study, "a")
        propose(study, "a", opening(study, "a", step="one"))
        first = ask(study, "b").opening.step
        propose(study, "a", opening(study, "a", step="two"))
        return bool(ask(study, "c").opening.step != first)


@attack(
    threat="task-taken-over",
    reason="message-signature",
    weakening=replaced("secagg.wire.session:SignedOpening.verify", nothing),
)
def opening_without_a_signature(scene: Scene) -> bool:
    """Silo d's opening is signed by nobody: all refuse it, and no other one can take its place."""
    with scene.stage.serving(scene.weakening) as server, Study(scene, server) as study:
        ask(study, "d")
        proposed = opening(study, "d")
        proposed.signature = os.urandom(64)
        propose(study, "d", proposed)
        return bool(ask(study, "a").opening.signature == proposed.signature)


def anybodys(real: Function) -> Function:
    """Weights that whoever likes brings for the one that was asked."""

    def upload(self: Any, silo: Any, task: str, total: int, now: float) -> Upload:
        found: Upload = real(self, self._proposals[task].proposer, task, total, now)
        return found

    return upload


@attack(
    threat="task-taken-over",
    reason="task-proposer",
    weakening=replaced("secagg.coordinator.session:Session.weights_upload", anybodys),
)
def chunk_of_anothers_weights(scene: Scene) -> bool:
    """Silo d overwrites a chunk of the weights that a brings: a is blamed for what it signed."""
    session = make_session(chunk_bytes=CHUNK)
    with scene.stage.serving(scene.weakening) as server, Study(scene, server, session) as study:
        bring(study, "a")
        with suppress(Refused):
            put(study, "d", 0, bytes(CHUNK), len(WEIGHTS))
        try:
            propose(study, "a", opening(study, "a", weights=WEIGHTS))
        except Refused as refusal:
            return refusal.code == "weights-digest"
        return False


# Names that become files.

UP: Final = "../../../.."


@attack(
    threat="path-in-a-name",
    reason="task-unknown",
    weakening=replaced("secagg.coordinator.session:Session._check_task", nothing),
)
def path_in_a_blobs_task(scene: Scene) -> bool:
    """Silo d uploads the weights of a task whose name leads out of the state directory."""
    with scene.stage.serving(scene.weakening) as server, Study(scene, server) as study:
        name = f"blob-{os.urandom(4).hex()}"
        task = f"{UP}/{name}"
        with suppress(Refused):
            study.call("d", "OpenTask", api.OpenTaskRequest, task=task)
        with suppress(Refused):
            put(study, "d", 0, b"*/1 * * * * root", 16, task)
        return (server.directory / f"{name}.safetensors").exists()


@attack(
    threat="path-in-a-name",
    reason="name",
    weakening=replaced("secagg.config:_check_name", nothing),
)
def path_in_a_sessions_task(scene: Scene) -> bool:
    """An admin's session has such a task, and its proposer's weights are laid where it likes."""
    with scene.stage.serving(scene.weakening) as server, Study(scene, server) as study:
        name = f"task-{os.urandom(4).hex()}"
        task = f"{UP}/{name}"
        config = wire_session.config_to_wire(make_session())
        config.tasks[0].name = task
        request = api.CreateSessionRequest(config=config)
        study.session_id = study.admin("CreateSession", request, "Admin").session_id
        study.call("d", "OpenTask", api.OpenTaskRequest, task=task)
        put(study, "d", 0, b"*/1 * * * * root", 16, task)
        laid = (server.directory / f"{name}.safetensors").exists()
        study.admin("AbortSession", api.AbortSessionRequest(name=config.name), "Admin")
        return laid


def whatever_lies_there(_real: Function) -> Function:
    """Weights by the name of their file."""

    def blob(self: Any, task: str) -> Blob:
        name = self.weights_name(task)
        data = self.means.disk.read(name)
        chunk = self.config.chunk_bytes
        found: Blob = self.blob(name, Stored(len(data), chunk_digests(data, chunk)))
        return found

    return blob


@attack(
    threat="path-in-a-name",
    reason="weights-unknown",
    weakening=replaced("secagg.coordinator.session:Session.weights_blob", whatever_lies_there),
)
def path_to_another_sessions_weights(scene: Scene) -> bool:
    """Silo d downloads, in a session of its own, the initial weights of one that it is not in."""
    with (
        scene.stage.serving(scene.weakening) as server,
        Study(scene, server, make_session("abe", chunk_bytes=CHUNK)) as others,
        Study(scene, server, make_session("abd", chunk_bytes=CHUNK)) as study,
    ):
        bring(others, "a")
        propose(others, "a", opening(others, "a", weights=WEIGHTS))
        bring(study, "a")
        path = f"../../{others.session_id.hex()}/weights/{TASK}"
        reply = study.call("d", "GetChunk", api.GetChunkRequest, blob=api.Blob(weights=path))
        return bool(reply.data == WEIGHTS[:CHUNK])
