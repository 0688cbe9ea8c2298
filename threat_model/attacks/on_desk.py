"""The key's desk: silos that would keep a session from its key.

The coordinator has no key; it says whose turn it is to make one, and when one is over. What one
silo says must not decide either.

Source: our own analysis of the desk.
"""

from __future__ import annotations

import os
from typing import Any, Final

from secagg.suite import KeyName
from secagg.wire import attempt as wire
from secagg.wire._pb import service_pb2 as api
from threat_model.attacks.attack import Scene, attack
from threat_model.attacks.sealed import SealedStudy
from threat_model.attacks.weak import Function, believing, replaced

ANNOUNCED: Final = replaced("secagg.coordinator.keys:KeyDesk.check_announcement", believing)
"""A desk at which any announcement is the epoch's key."""


def is_announced(study: SealedStudy, silo: str, members: str) -> bool:
    """Whether everybody's updates are to be sealed under a key that this silo says it has made."""
    study.key = KeyName(1, os.urandom(32))
    fields = {"key": wire.key_to_wire(study.key), "members": list(members)}
    study.call(silo, "AnnounceKey", api.AnnounceKeyRequest, **fields)
    study.open_task()
    study.ready("b")
    return True


@attack(threat="stalled-keys", reason="key-maker", weakening=ANNOUNCED)
def key_by_one_who_was_not_asked(scene: Scene) -> bool:
    """Silo d announces a key while a makes one; nobody has d's, and nobody can use a's."""
    with scene.stage.serving(scene.weakening) as server, SealedStudy(scene, server) as study:
        study.call("a", "AskKey", api.AskKeyRequest, request=study.wish("a"))
        return is_announced(study, "d", "abcd")


@attack(threat="stalled-keys", reason="key-members", weakening=ANNOUNCED)
def key_for_some_only(scene: Scene) -> bool:
    """Silo a makes the key for a, b and c: d is shut out of a session that it belongs to."""
    with scene.stage.serving(scene.weakening) as server, SealedStudy(scene, server) as study:
        study.call("a", "AskKey", api.AskKeyRequest, request=study.wish("a"))
        return is_announced(study, "a", "abc")


def one_voice(_real: Function) -> Function:
    """A desk at which any silo's word ends an epoch."""

    def fails(self: Any, silo: Any, key: Any, round_number: int, results: Any) -> bool:
        return bool(key == self.key and round_number in results)

    return fails


@attack(
    threat="stalled-keys",
    reason="key-stands",
    weakening=replaced("secagg.coordinator.keys:KeyDesk.fails", one_voice),
)
def epoch_ended_by_one_voice(scene: Scene) -> bool:
    """Silo d says again and again that a sum did not open, so that everybody needs a new key.

    Ours takes the report and goes on under the key: two silos have to say so.
    """
    with scene.stage.serving(scene.weakening) as server, SealedStudy(scene, server) as study:
        study.begin()
        study.outcome()
        key = wire.key_to_wire(study.key)
        for _ in range(3):
            study.call("d", "EndKey", api.EndKeyRequest, key=key, round=1)
        reply = study.call("a", "AskKey", api.AskKeyRequest, request=study.wish("a", epoch=2))
        if reply.epoch == 1:
            scene.refuse("key-stands")
        return bool(reply.epoch != 1)
