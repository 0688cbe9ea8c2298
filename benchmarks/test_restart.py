"""From kill -9 to serving, with a round's vectors in the spool.

The floor is the same start with an empty state directory: what Python, gRPC and the certificates
cost. What is beyond it reads the spool once and hashes each chunk as it adds it up; the peak of
memory is the whole coordinator's. Writing and syncing each vector is measured apart, beside the
bare write.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.floors import Floor
from benchmarks.measure import measure
from benchmarks.memory import resident
from benchmarks.stage import begin, configure, enrol, make_config, masked_inputs
from secagg.config import SiloId
from secagg.coordinator.session import Session
from secagg.coordinator.spool import Stored, Upload
from secagg.coordinator.sqlite import SqliteJournal
from secagg.crypto.digest import chunk_digest
from secagg.disk import LocalDisk
from secagg.ring.expand import Encoded, masked
from secagg.ring.vectors import PowerRing

SILOS, PARAMETERS = 32, 10**6
RING = PowerRing(32)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A consortium of 32 silos, and a coordinator that died in MaskedInput with all vectors in."""
    root = tmp_path_factory.mktemp("restart")
    names = tuple(SiloId(f"silo-{n:02}") for n in range(SILOS))
    enrol(root, names)
    with closing(SqliteJournal(root / "state")) as journal:
        session = begin(root, make_config(names), journal, PARAMETERS)
        for name, message, vector in masked_inputs(root, session, _zeros):
            _upload(session, name, RING.pack(vector))
            session.send(message, 1, 1)
    for state in ("state", "empty"):
        configure(root, state, f"{state}.toml")
    return root


def _zeros(length: int) -> Encoded:
    return masked(RING, np.zeros(length, RING.dtype))


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
