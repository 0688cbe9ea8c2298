"""Who says what: a member that speaks under another's name.

Every message that names its sender is held against the certificate of the connection; what the
sender signed is verified besides, where the coordinator has something to verify. Here the adversary
has what another silo signed (a relay, a backup, a log), or names another and signs itself.

Source: CWE-290.
"""

from __future__ import annotations

import os
from typing import Final

from secagg.config import silo_id
from secagg.crypto.digest import vector_digest
from secagg.crypto.keys import KeyPair
from secagg.masking.messages import Dealt, MaskedInput, Result, Roster, Signatures, Survivors
from secagg.wire import custody as wire_custody
from secagg.wire._pb import service_pb2 as api
from threat_model.attacks.attack import Refused, Scene, attack
from threat_model.attacks.evil_coordinator import TASK
from threat_model.attacks.evil_silo import Study
from threat_model.attacks.sealed import SealedStudy
from threat_model.attacks.weak import nothing, replaced

BELIEVING: Final = replaced("secagg.coordinator.calls:_check_sender", nothing)
"""A coordinator that takes the name in a message for its sender's."""


@attack(
    threat="anothers-name",
    reason="sender-identity",
    weakening=BELIEVING,
)
def anothers_name(scene: Scene) -> bool:
    """Silo d sends what silo c signed for later, over its own connection."""
    with scene.stage.serving(scene.weakening) as server, Study(scene, server) as study:
        study.begin()
        study.to(Roster)
        for silo in "abd":
            study.step(silo)
        message = study.answer("c", study.next("c"))
        study.send("d", message)
        return study.next("a") is not None


@attack(threat="anothers-name", reason="sender-identity", weakening=BELIEVING)
def anothers_name_in_every_phase(scene: Scene) -> bool:
    """Silo d sends c's message of each of the five phases, before c does."""
    with scene.stage.serving(scene.weakening) as server, Study(scene, server) as study:
        study.begin()
        served = 0
        for _ in (Roster, Dealt, Survivors, Signatures, Result):
            message = study.answer("c", study.next("c"))
            if isinstance(message, MaskedInput):
                study.put("c", study.ring.pack(study.silos[silo_id("c")].upload))
            try:
                study.say("d", message)
                served += 1
            except Refused:
                study.send("c", message)
            study.step("a", "b", "d")
        return served == 5 if scene.weakened else bool(served)


@attack(threat="anothers-name", reason="sender-identity", weakening=BELIEVING)
def key_asked_in_anothers_name(scene: Scene) -> bool:
    """Silo d has c be asked to make the session's key, which c knows nothing of: nobody has one."""
    with scene.stage.serving(scene.weakening) as server, SealedStudy(scene, server) as study:
        wish = study.wish("d", named="c")
        return bool(study.call("d", "AskKey", api.AskKeyRequest, request=wish).make)


@attack(threat="anothers-name", reason="sender-identity", weakening=BELIEVING)
def key_box_in_anothers_name(scene: Scene) -> bool:
    """Silo d leaves garbage for b in c's name: b blames c."""
    with scene.stage.serving(scene.weakening) as server, SealedStudy(scene, server) as study:
        study.announce()
        wish = study.wish("b")
        waiting = study.later("b", "AskKey", api.AskKeyRequest, request=wish)
        study.await_wishes("a")
        box = api.KeyBox(
            epoch=1,
            sender="c",
            recipient="b",
            sender_ephemeral=KeyPair.generate(os.urandom).public,
            recipient_ephemeral=wish.ephemeral,
            key_id=study.key.key_id,
            sealed=os.urandom(48),
            signature=os.urandom(64),
        )
        study.call("d", "SendKeyBox", api.SendKeyBoxRequest, box=box)
        return bool(waiting.result().box.sender == "c")


@attack(threat="anothers-name", reason="sender-identity", weakening=BELIEVING)
def checkpoints_bytes_in_anothers_name(scene: Scene) -> bool:
    """Silo d uploads a checkpoint as c's, so that c is to account for it."""
    with scene.stage.serving(scene.weakening) as server, SealedStudy(scene, server) as study:
        study.begin()
        study.outcome()
        wish = api.CheckpointWish(task=TASK, results=0, need=1)
        study.later("a", "AskCheckpoint", api.AskCheckpointRequest, wish=wish)
        study.await_wishes("b")
        data = os.urandom(64)
        digest = vector_digest(data, study.session.chunk_bytes)
        blob = api.Blob(checkpoint=api.Blob.Checkpoint(task=TASK, sender="c", digest=digest))
        study.call("d", "PutChunk", api.PutChunkRequest, blob=blob, total=len(data), data=data)
        held = server.directory / "state" / "sessions" / study.session_id.hex()
        return any(file.read_bytes() == data for file in held.rglob("*") if file.is_file())


@attack(threat="anothers-name", reason="sender-identity", weakening=BELIEVING)
def checkpoint_in_anothers_name(scene: Scene) -> bool:
    """Silo d offers a checkpoint as c's to a, who has lost the key of past sums: a blames c."""
    with scene.stage.serving(scene.weakening) as server, SealedStudy(scene, server) as study:
        study.begin()
        study.outcome()
        wish = api.CheckpointWish(task=TASK, results=0, need=1)
        waiting = study.later("a", "AskCheckpoint", api.AskCheckpointRequest, wish=wish)
        study.await_wishes("b")
        data = os.urandom(64)
        digest = vector_digest(data, study.session.chunk_bytes)
        key = study.silos[silo_id("d")].member.identity
        offer = wire_custody.SignedCheckpoint.sign(
            TASK, 1, "c", len(data), digest, key, study.opening_transcript
        )
        blob = api.Blob(checkpoint=api.Blob.Checkpoint(task=TASK, sender="c", digest=digest))
        study.call("d", "PutChunk", api.PutChunkRequest, blob=blob, total=len(data), data=data)
        checkpoint = wire_custody.checkpoint_to_wire(offer)
        study.call("d", "OfferCheckpoint", api.OfferCheckpointRequest, checkpoint=checkpoint)
        return any(found.sender == "c" for found in waiting.result().checkpoints)
