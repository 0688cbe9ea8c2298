"""A consortium on disk, and a session of it played to where its silos have masked vectors."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from secagg.config import (
    Clip,
    MaskPrg,
    Policy,
    Protection,
    SessionConfig,
    SiloId,
    TaskConfig,
    ThresholdRule,
    Weighting,
)
from secagg.coordinator.journal import Journal
from secagg.coordinator.session import Session
from secagg.coordinator.standing import Means
from secagg.coordinator.state import Step
from secagg.crypto.sign import IdentityKey
from secagg.disk import LocalDisk
from secagg.encoding.schema import Schema, TensorSpec
from secagg.masking import client
from secagg.masking.ledger import MemoryLedger
from secagg.masking.messages import Dealt, Descriptor, MaskedInput, Roster
from secagg.masking.transcript import NO_WEIGHTS, TaskOpening, opening_transcript
from secagg.pki.authority import Authority
from secagg.pki.credentials import load_credentials
from secagg.pki.enrolment import create_request, install_bundle
from secagg.pki.names import Role
from secagg.ring.expand import Encoded
from secagg.ring.vectors import Vector
from secagg.wire.session import SignedOpening

NAME, TASK, COORDINATOR = "bench", "training", "main"


def enrol(root: Path, silos: Sequence[SiloId]) -> None:
    """Make an authority, silos and a coordinator, each in a directory under ``root``."""
    now = datetime.now(UTC)
    authority = Authority.create(root / "authority", NAME, now=now)
    for role, name in [*((Role.SILO, n) for n in silos), (Role.COORDINATOR, COORDINATOR)]:
        request = create_request(root / name, role, name, NAME, os.urandom)
        bundle = authority.approve(request, now=now)
        install_bundle(root / name, bundle, fingerprint=authority.fingerprint, now=now)


def configure(root: Path, state: str, file: str) -> None:
    """Write a ``coordinator.toml`` with a state directory."""
    text = f'listen = "127.0.0.1:0"\ncredentials = "{COORDINATOR}"\nstate = "{state}"\n'
    (root / file).write_text(text)


def make_config(silos: tuple[SiloId, ...], **changes: Any) -> SessionConfig:
    """One task of sums in words of 32 bits; t is two thirds."""
    values: dict[str, Any] = {
        "name": NAME,
        "consortium": NAME,
        "silos": silos,
        "protection": Protection.MASKED,
        "colluders": 1,
        "threshold": ThresholdRule(2, 3),
        "min_cohort": 3,
        "mask_prg": MaskPrg.AES_128_CTR,
        "tasks": (TaskConfig(TASK, Weighting.SUM, 1, 1.0, Clip.NONE, 1.0, 32),),
    }
    return SessionConfig(**values | changes)


def begin(root: Path, config: SessionConfig, journal: Journal, parameters: int) -> Session:
    """A session in ``root/state`` whose first attempt is described to all silos."""
    coordinator = load_credentials(root / COORDINATOR, now=datetime.now(UTC), role=Role.COORDINATOR)
    manifest, identity = coordinator.manifest.manifest, coordinator.identity_key
    assert identity is not None
    disk = LocalDisk(root / "state")
    means = Means(lambda: manifest, lambda: b"", identity, disk, journal, secrets.token_bytes)
    session = Session.create(config, secrets.token_bytes(32), means)
    proposer = config.silos[0]
    opening = TaskOpening(TASK, Schema((TensorSpec("w", (parameters,)),)), "", NO_WEIGHTS)
    tau = opening_transcript(session.session_hash, session.session_id)
    session.open_task(proposer, TASK, 0.0)
    signed = SignedOpening.sign(opening, 0, proposer, _key(root, proposer), tau)
    session.propose_task(proposer, signed)
    for name in config.silos:
        session.ready(name, TASK, session.base(TASK), 0.0)
    assert session.tick(0.0)
    return session


def masked_inputs(
    root: Path, session: Session, encoded: Callable[[int], Encoded]
) -> Iterator[tuple[SiloId, MaskedInput, Vector]]:
    """Play a session's silos through phases 1 and 2; give what each has in phase 3, not yet sent.

    Args:
        root: where they are enrolled.
        session: from ``begin``.
        encoded: gives a silo's update, for a number of words.
    """
    config, manifest = session.config, session.means.manifest()
    keys = {name: _key(root, name) for name in config.silos}
    length, states = session.tasks[TASK].length, dict[SiloId, Any]()
    expected = client.Expected(TASK, 1, session.base(TASK))
    policy = Policy(1, 3, 3, (Protection.MASKED,), (32,), tuple(Clip), 1.0)
    for step in range(3):
        for name in config.silos:
            member = client.Member(name, keys[name], manifest, policy, config, session.session_id)
            event = session.next(name, 1, min(step, 1), Step(step))
            match event:
                case Descriptor():
                    ledger = MemoryLedger()
                    admitted = client.admit(event, member, expected, ledger)
                    entry = ledger.record(admitted.entry)
                    states[name], sent = client.advertise_keys(admitted, entry, entropy=os.urandom)
                    session.send(sent, 1, 1)
                case Roster():
                    states[name], shares = client.share_keys(
                        states[name], event, entropy=os.urandom
                    )
                    session.send(shares, 1, 1)
                case Dealt():
                    _, commit, vector = client.mask_input(states.pop(name), event, encoded(length))
                    yield name, commit, vector
        if step < 2:
            assert session.tick(0.0)


def _key(root: Path, silo: SiloId) -> IdentityKey:
    key = load_credentials(root / silo, now=datetime.now(UTC), role=Role.SILO).identity_key
    assert key is not None
    return key
