"""From kill -9 to serving, with a round's vectors in the spool.

The floor is the same start with an empty state directory: what Python, gRPC and the certificates
cost. What is beyond it reads the spool once and hashes each chunk as it adds it up; the peak of
memory is the whole coordinator's. Writing and syncing each vector is measured apart, beside the
bare write.
"""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
import time
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.floors import Floor
from benchmarks.measure import measure
from benchmarks.memory import resident
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
from secagg.coordinator.session import Session
from secagg.coordinator.spool import Stored, Upload
from secagg.coordinator.sqlite import SqliteJournal
from secagg.coordinator.standing import Means
from secagg.coordinator.state import Step
from secagg.crypto.digest import chunk_digest
from secagg.crypto.sign import IdentityKey
from secagg.disk import LocalDisk
from secagg.encoding.schema import Schema, TensorSpec
from secagg.masking import client
from secagg.masking.ledger import MemoryLedger
from secagg.masking.messages import Dealt, Descriptor, Roster
from secagg.masking.transcript import NO_WEIGHTS, TaskOpening, opening_transcript
from secagg.pki.authority import Authority
from secagg.pki.credentials import load_credentials
from secagg.pki.enrolment import create_request, install_bundle
from secagg.pki.names import Role
from secagg.ring.expand import masked
from secagg.ring.vectors import PowerRing
from secagg.wire.session import SignedOpening

SILOS, PARAMETERS = 32, 10**6
RING = PowerRing(32)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A consortium of 32 silos, and a coordinator that died in MaskedInput with all vectors in."""
    root = tmp_path_factory.mktemp("restart")
    now = datetime.now(UTC)
    authority = Authority.create(root / "authority", "bench", now=now)
    members = [(Role.SILO, f"silo-{n:02}") for n in range(SILOS)] + [(Role.COORDINATOR, "main")]
    for role, name in members:
        bundle = authority.approve(
            create_request(root / name, role, name, "bench", os.urandom), now=now
        )
        install_bundle(root / name, bundle, fingerprint=authority.fingerprint, now=now)
    with closing(SqliteJournal(root / "state")) as journal:
        _spool_a_round(root, journal)
    for state in ("state", "empty"):
        (root / f"{state}.toml").write_text(
            f'listen = "127.0.0.1:0"\ncredentials = "main"\nstate = "{state}"\n'
        )
    return root


def _spool_a_round(root: Path, journal: SqliteJournal) -> None:
    """Play 32 silos up to their masked inputs."""
    now = datetime.now(UTC)
    coordinator = load_credentials(root / "main", now=now, role=Role.COORDINATOR)
    manifest = coordinator.manifest.manifest
    identity = coordinator.identity_key
    assert identity is not None
    names = tuple(sorted(manifest.silos))
    task = TaskConfig("training", Weighting.SUM, 1, 1.0, Clip.NONE, 1.0, 32)
    config = SessionConfig(
        "bench",
        "bench",
        names,
        Protection.MASKED,
        1,
        ThresholdRule(2, 3),
        3,
        MaskPrg.AES_128_CTR,
        (task,),
    )
    disk = LocalDisk(root / "state")
    means = Means(lambda: manifest, lambda: b"", identity, disk, journal, secrets.token_bytes)
    session = Session.create(config, secrets.token_bytes(32), means)
    keys = {
        name: load_credentials(root / name, now=now, role=Role.SILO).identity_key for name in names
    }
    _open(session, names[0], keys[names[0]])
    length = PARAMETERS + 4
    for name in names:
        session.ready(name, "training", session.base("training"), 0.0)
    assert session.tick(0.0)
    states: dict[SiloId, object] = {}
    expected = client.Expected("training", 1, session.base("training"))
    policy = Policy(1, 3, 3, (Protection.MASKED,), (32,), tuple(Clip), 1.0)
    for step in range(3):
        for name in names:
            key = keys[name]
            assert key is not None
            member = client.Member(name, key, manifest, policy, config, session.session_id)
            event = session.next(name, 1, min(step, 1), Step(step))
            match event:
                case Descriptor():
                    ledger = MemoryLedger()
                    admitted = client.admit(event, member, expected, ledger)
                    recorded = ledger.record(admitted.entry)
                    states[name], message = client.advertise_keys(
                        admitted, recorded, entropy=os.urandom
                    )
                case Roster():
                    states[name], message = client.share_keys(
                        states[name], event, entropy=os.urandom
                    )
                case Dealt():
                    update = masked(RING, np.zeros(length, RING.dtype))
                    states[name], message, vector = client.mask_input(states[name], event, update)
                    _upload(session, name, RING.pack(vector))
            session.send(message, 1, 1)
        if step < 2:
            assert session.tick(0.0)


def _open(session: Session, silo: SiloId, key: IdentityKey | None) -> None:
    assert key is not None
    opening = TaskOpening("training", Schema((TensorSpec("w", (PARAMETERS,)),)), "", NO_WEIGHTS)
    transcript = opening_transcript(session.session_hash, session.session_id)
    session.open_task(silo, "training", 0.0)
    session.propose_task(silo, SignedOpening.sign(opening, 0, silo, key, transcript))


def _upload(session: Session, silo: SiloId, data: memoryview) -> None:
    upload = session.vector_upload(silo, 1, 1, len(data))
    size = session.config.chunk_bytes
    for offset in range(0, len(data), size):
        upload.put(offset, bytes(data[offset : offset + size]))


def start_and_kill(root: Path, state: str) -> int:
    """Start the coordinator, wait until it serves, kill it; return its peak of memory."""
    port = root / "port"
    port.unlink(missing_ok=True)
    command = [sys.executable, "-c", "from secagg.cli import main; main()", "serve"]
    command += ["--config", str(root / f"{state}.toml")]
    child = subprocess.Popen([*command, "--port-file", str(port)], stderr=subprocess.DEVNULL)
    try:
        while not port.exists():
            assert child.poll() is None
            time.sleep(0.005)
        return resident("VmHWM", child.pid)
    finally:
        child.kill()
        child.wait()


@pytest.mark.benchmark(group="restart")
def test_kill_to_serving(benchmark: BenchmarkFixture, place: Path) -> None:
    spooled = list((place / "state").rglob("spool/*"))
    assert len(spooled) == SILOS
    assert sum(path.stat().st_size for path in spooled) >= SILOS * PARAMETERS * 4
    peak = measure(
        benchmark,
        lambda: start_and_kill(place, "state"),
        Floor("nothing to restore", lambda: start_and_kill(place, "empty")),
        elements=SILOS * PARAMETERS,
        rounds=3,
        headline=f"kill -9 to serving, {SILOS} silos × 10⁶ parameters spooled",
    )
    benchmark.extra_info["peak_bytes"] = peak


@pytest.mark.benchmark(group="spool")
def test_upload_to_the_spool(benchmark: BenchmarkFixture, tmp_path: Path) -> None:
    data, disk = os.urandom(4 * PARAMETERS), LocalDisk(tmp_path)

    def write() -> None:
        file = os.open(tmp_path / "bare", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.write(file, data)
        os.fsync(file)
        os.close(file)

    def spool() -> Stored:
        upload = Upload(disk, "blob", len(data), 2**20)
        for offset in range(0, len(data), 2**20):
            upload.put(offset, data[offset : offset + 2**20])
        return upload.stored()

    stored = measure(benchmark, spool, Floor("write and fsync", write), elements=PARAMETERS)
    chunks = [data[offset : offset + 2**20] for offset in range(0, len(data), 2**20)]
    assert list(stored.chunk_digests) == [chunk_digest(chunk) for chunk in chunks]
