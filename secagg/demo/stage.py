"""The demo's consortium on disk: an authority, members with their own keys, a session's numbers."""

from __future__ import annotations

import os
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from secagg.config import (
    Clip,
    MaskPrg,
    Metric,
    Protection,
    SessionConfig,
    TaskConfig,
    ThresholdRule,
    Weighting,
    silo_id,
)
from secagg.demo.data import STATISTICS_BOUND
from secagg.demo.training import DELTA_BOUND, METRIC_BOUNDS, ROUNDS, WEIGHT_CAP
from secagg.pki.authority import Authority
from secagg.pki.enrolment import create_request, install_bundle
from secagg.pki.names import Role
from secagg.pki.profile import write_policy, write_profile
from secagg.suite import Suite

CONSORTIUM: Final = "demo"
SESSION: Final = "demo"
COORDINATOR: Final = "coordinator"
ADMIN: Final = "admin"
TRAIN_SECONDS: Final = 60.0
PHASE_SECONDS: Final = 5.0


def enrol(root: Path, silos: Sequence[str], protection: str) -> None:
    """Make the authority and every member's directory, each with its own keys, under ``root``.

    Every silo's policy allows the protection, and no other.
    """
    now = datetime.now(UTC)
    authority = Authority.create(root / "authority", CONSORTIUM, now=now)
    members = [(Role.COORDINATOR, COORDINATOR), (Role.ADMIN, ADMIN)]
    members += [(Role.SILO, name) for name in silos]
    bundles = {}
    for role, name in members:
        request = create_request(root / name, role, name, CONSORTIUM, os.urandom)
        bundles[name] = authority.approve(request, now=now)
    newest = bundles[silos[-1]].manifest
    for _, name in members:
        install_bundle(root / name, bundles[name], fingerprint=authority.fingerprint, now=now)
    (root / COORDINATOR / "manifest.json").write_bytes(newest.to_json())
    for name in silos:
        write_policy(root / name, [protection])
    keep_port(root, 0)


def keep_port(root: Path, port: int) -> None:
    """Have the coordinator listen there when it is started next; 0 for any free port."""
    (root / "coordinator.toml").write_text(
        f'listen = "127.0.0.1:{port}"\ncredentials = "{COORDINATOR}"\nstate = "state"\n'
    )


def point_to(root: Path, names: Sequence[str], port: int) -> None:
    """Tell members where the coordinator listens."""
    for name in names:
        write_profile(root / name, f"127.0.0.1:{port}")


def session_config(silos: Sequence[str], protection: str) -> SessionConfig:
    """The demo's session: a secure sum for the statistics, then rounds of training."""
    how = Protection(protection)
    statistics = TaskConfig(
        name="statistics",
        weighting=Weighting.SUM,
        rounds=1,
        ring_bits=None if how.seals else 64,
        bound=STATISTICS_BOUND,
        clip=Clip.NONE,
        weight_cap=1.0,
    )
    training = TaskConfig(
        name="training",
        weighting=Weighting.MEAN,
        rounds=ROUNDS,
        ring_bits=None if how.seals else 32,
        bound=DELTA_BOUND,
        clip=Clip.NONE,
        weight_cap=float(WEIGHT_CAP),
        metrics=tuple(Metric(name, bound) for name, bound in METRIC_BOUNDS.items()),
    )
    return SessionConfig(
        name=SESSION,
        consortium=CONSORTIUM,
        silos=tuple(sorted(silo_id(name) for name in silos)),
        protection=how,
        suite=Suite.CKKS_54 if how.seals else None,
        colluders=1,
        threshold=ThresholdRule(2, 3),
        min_cohort=3,
        mask_prg=MaskPrg.AES_128_CTR,
        tasks=(statistics, training),
        train_deadline=TRAIN_SECONDS,
        phase_deadline=PHASE_SECONDS,
    )
