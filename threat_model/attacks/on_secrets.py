"""Secrets where they do not belong: on disks, in logs, in messages, in files that others read.

The adversary knows afterwards which secrets there were, since the shares that silos reveal give
their self seeds, and searches for them with the engine of ``make scan`` (``scan``) in all that was
written before. A self seed that leaks undoes double masking: of a silo that drops out late, the
mask key is rebuilt, and its update is read.

Source: CWE-312, CWE-319, CWE-532, CWE-732; Bonawitz et al. 2017, section 4.
"""

from __future__ import annotations

import logging
import stat
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import structlog

from secagg.ckks.keyring import unpack_keys
from secagg.config import Protection
from secagg.crypto.aead import TAG_BYTES
from secagg.crypto.labels import SELF_SEED
from secagg.errors import MalformedMessage
from secagg.masking.messages import Roster, Signatures, Unmasking
from threat_model.attacks.attack import Scene, attack
from threat_model.attacks.attempt import Attempt
from threat_model.attacks.evil_coordinator import EvilCoordinator, make_session
from threat_model.attacks.evil_silo import Study
from threat_model.attacks.sight import SEED
from threat_model.attacks.weak import Function, nothing, replaced
from threat_model.scan.engine import scan

NOWHERE: Final = "found-nowhere"


def leaks(scene: Scene, secrets: Mapping[str, bytes], places: Mapping[str, bytes | Path]) -> bool:
    """Whether every one of these secrets is in one of these places."""
    assert secrets
    found = scan({name: [value] for name, value in secrets.items()}, places)
    if not found:
        scene.refuse(NOWHERE, "silo", f"{len(secrets)} secrets, {len(places)} places")
    return {finding.secret for finding in found} == set(secrets)


def seeds(evil: EvilCoordinator) -> dict[str, bytes]:
    """Play a round until all have revealed: every silo's self seed."""
    evil.start()
    attempt = Attempt(evil).to_masked()
    survivors = attempt.survivors(*attempt.names)
    signed = Signatures(tuple(attempt.tell(name, survivors) for name in attempt.names))
    for name in attempt.names:
        attempt.tell(name, signed)
    return {name: attempt.secret(name, SEED).reveal() for name in attempt.names}


def talkative(real: Function) -> Function:
    """``self_mask`` that logs what it works with."""

    def self_mask(seed: Any, *args: Any) -> Any:
        logging.getLogger("secagg").debug("self mask of %s", seed.reveal().hex())
        return real(seed, *args)

    return self_mask


@attack(
    threat="secrets-in-logs",
    reason=NOWHERE,
    weakening=replaced("secagg.masking.client:self_mask", talkative),
)
def seeds_in_silos_logs(scene: Scene) -> bool:
    """Reads the logs of the silos' processes, at DEBUG, in search of their seeds."""
    with EvilCoordinator(scene) as evil:
        found = seeds(evil)
        return leaks(scene, found, {name: evil.log(name).encode() for name in found})


def keeping(real: Function) -> Function:
    """``_Attempt._step`` that keeps the attempt's state, to go on from it after a restart."""

    def step(self: Any, event: Any) -> Any:
        answer = real(self, event)
        seed = getattr(self._state, "self_seed", None)
        if seed is not None:
            self._submission.ledger._disk.append("attempt.state", seed.reveal())
        return answer

    return step


@attack(
    threat="secrets-on-silo-disk",
    reason=NOWHERE,
    weakening=replaced("client_sdk.attempt:_Attempt._step", keeping),
)
def seeds_on_silos_disks(scene: Scene) -> bool:
    """Reads the silos' disks after a round: ledgers, checkpoints, whatever there is."""
    with EvilCoordinator(scene) as evil:
        found = seeds(evil)
        return leaks(scene, found, {name: evil.place(name) for name in found})


def transparent(real: Function) -> Function:
    """``digest`` that commits to a self seed by showing it."""
    return lambda label, *values: values[0] if label == SELF_SEED else real(label, *values)


@attack(
    threat="secrets-on-the-wire",
    reason=NOWHERE,
    weakening=replaced("secagg.masking.client:digest", transparent),
)
def seeds_on_the_wire(scene: Scene) -> bool:
    """Reads every request of a round, as it is inside TLS."""
    with EvilCoordinator(scene) as evil:
        found = seeds(evil)
        said = b"".join(request.SerializeToString() for _, _, request in evil.seen)
        return leaks(scene, found, {"requests": said})


def unsealed(_real: Function) -> Function:
    """``seal_once`` that seals nothing."""
    return lambda _key, plaintext, _associated: plaintext + bytes(TAG_BYTES)


@attack(
    threat="key-leak",
    reason="box-sealed",
    weakening=replaced("secagg.ckks.custody:seal_once", unsealed),
)
def key_in_its_box(scene: Scene) -> bool:
    """Opens the boxes in which silos hand each other the session's key; its name says if it is."""
    with EvilCoordinator(scene, make_session(protection=Protection.CKKS_MASKED)) as evil:
        evil.start()
        boxes: list[Any] = []
        while not boxes:
            time.sleep(0.01)
            boxes = [request.box for _, method, request in evil.seen if method == "SendKeyBox"]
        assert evil.desk is not None
        try:
            keys = [unpack_keys(evil.session_id, box.sealed[:-TAG_BYTES])[-1] for box in boxes]
        except MalformedMessage:
            raise scene.refuse("box-sealed", "silo", f"{len(boxes)} boxes") from None
        return all(key.name == evil.desk.key for key in keys)


# At the coordinator.


def reveal(study: Study) -> dict[str, bytes]:
    """Play until three of four silos have revealed: their shares."""
    study.begin()
    study.to(Signatures)
    found = {}
    for silo in study.session.silos[:3]:
        message = study.answer(silo, study.next(silo))
        study.send(silo, message)
        assert isinstance(message, Unmasking)
        found |= {f"{s.owner} of {silo}": s.share.reveal() for s in message.shares}
    return found


def keeping_all(real: Function) -> Function:
    """``Session.send`` that writes every message down, revealed shares included."""

    def send(self: Any, message: Any, *args: Any) -> Any:
        from secagg.coordinator import records

        live, new = self.attempt, real(self, message, *args)
        if new and isinstance(message, Unmasking):
            row = records.accepted(message, self.session_id, live.descriptor, None)
            self._log(lambda: row)
        return new

    return send


@attack(
    threat="shares-at-rest",
    reason=NOWHERE,
    weakening=replaced("secagg.coordinator.session:Session.send", keeping_all),
)
def shares_in_the_journal(scene: Scene) -> bool:
    """Takes the coordinator's disk while a round is being opened: masked vectors, and shares?"""
    with scene.stage.serving(scene.weakening) as server, Study(scene, server) as study:
        return leaks(scene, reveal(study), {"state": server.directory / "state"})


def telling(real: Function) -> Function:
    """``rebuild`` that logs what it found."""

    def rebuild(owner: str, *args: Any) -> Any:
        secret = real(owner, *args)
        structlog.get_logger().debug("rebuilt", owner=owner, secret=secret.reveal().hex())
        return secret

    return rebuild


@attack(
    threat="secrets-in-logs",
    reason=NOWHERE,
    weakening=replaced("secagg.masking.server:rebuild", telling),
)
def seeds_in_the_coordinators_log(scene: Scene) -> bool:
    """Reads the coordinator's log, at DEBUG, after a round was opened."""
    with scene.stage.serving(scene.weakening) as server, Study(scene, server) as study:
        study.begin()
        study.to(Roster)
        found = {name: silo.state.self_seed.reveal() for name, silo in study.silos.items()}
        for _ in range(4):
            study.step()
        study.result("a")
        return leaks(scene, found, {"log": server.log.encode()})


@attack(
    threat="open-key-files",
    reason="file-permissions",
    weakening=replaced("secagg.pki.files:_check_file", nothing),
)
def keys_that_others_read(scene: Scene) -> bool:
    """Copies silo a's identity key, which a restored backup left open; the silo goes on with it."""
    with EvilCoordinator(scene) as evil:
        path = scene.stage.profile("a", "nowhere:1", evil.place("a").parent) / "identity.key"
        path.chmod(0o644)
        evil.start_one("a", again=True)
        evil.await_ready("a")
        is_open = path.stat().st_mode & stat.S_IROTH
        in_use = scene.stage.consortium.root / "a" / "identity.key"
        return bool(is_open) and path.read_bytes() == in_use.read_bytes()
