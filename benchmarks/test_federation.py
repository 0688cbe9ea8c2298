"""A masked round through real processes over mTLS, beside the same vectors moved in the clear.

One coordinator and n silos, each a process with its own keys. Masked: ``secagg serve`` and the
client SDK's ``session.mean``. Plain: the same silos' processes send the same float32 vectors over
the same kind of channel, with the same chunks and as many in flight, to a harness that averages
them and serves the mean back; it neither writes nor hashes (``benchmarks.peers.averager``). A round
is timed from a barrier to the last silo that has its mean; the first does not count. Masked and
plain rounds take turns, all cores work, and every silo's mean is checked in every round. What all
processes together had of the processors is beside it: on a machine that others use, it says more.

A masked round is durable: the coordinator syncs every vector and its journal, a silo its ledger and
its update. What that takes is shown by the same rounds on a directory in memory.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.memory import resident
from benchmarks.peers import show
from benchmarks.peers.silo import CHUNK_BYTES, SESSION
from client_sdk.channel import Channel
from client_sdk.profile import load_profile
from secagg.config import (
    Clip,
    MaskPrg,
    Protection,
    SessionConfig,
    TaskConfig,
    ThresholdRule,
    Weighting,
    silo_id,
)
from secagg.demo.stage import ADMIN, CONSORTIUM, COORDINATOR, enrol, keep_port, point_to
from secagg.pki.names import Role
from secagg.wire._pb import service_pb2 as api
from secagg.wire.session import config_to_wire

REPOSITORY = Path(__file__).parent.parent
MEMORY = Path("/dev/shm")
TARGET = 1.5
GIB = 2**30
START_SECONDS = 120.0
ERROR = 1e-6


class Processes:
    """A coordinator and its silos.

    Args:
        how: "masked" or "plain".
        root: where everybody's keys and state are.
        silos: their names.
        size: parameters of a vector.
    """

    def __init__(self, how: str, root: Path, silos: list[str], size: int) -> None:
        self._how, self._root, self._silos, self._size = how, root, silos, size
        self.coordinator: subprocess.Popen[str] | None = None
        self._children: list[subprocess.Popen[str]] = []
        self.processor_seconds: list[float] = []

    def start(self) -> None:
        """Start all, and wait until every silo is ready."""
        enrol(self._root, self._silos, "masked")
        keep_port(self._root, 0)
        port_file = self._root / "port"
        if self._how == "masked":
            serve = ["-c", "from secagg.cli import main; main()", "serve"]
            serve += ["--config", str(self._root / "coordinator.toml")]
            serve += ["--port-file", str(port_file)]
        else:
            serve = ["-m", "benchmarks.peers.averager", str(self._root / COORDINATOR)]
            serve += [str(len(self._silos)), str(port_file)]
        self.coordinator = self._spawn("coordinator", serve)
        deadline = time.monotonic() + START_SECONDS
        while not port_file.exists():
            assert self.coordinator.poll() is None, self._log("coordinator")
            assert time.monotonic() < deadline
            time.sleep(0.02)
        point_to(self._root, [ADMIN, *self._silos], int(port_file.read_text()))
        if self._how == "masked":
            self._create_session()
        for rank, name in enumerate(self._silos):
            command = ["-m", "benchmarks.peers.silo", self._how, str(self._root / name)]
            command += [str(rank), str(len(self._silos)), str(self._size)]
            self._children.append(self._spawn(name, command))
        assert set(self._hear()) == {"ready"}

    def stop(self) -> None:
        """End all."""
        for child in [*self._children, *([self.coordinator] if self.coordinator else [])]:
            child.kill()
            child.communicate()

    def round(self) -> None:
        """From the barrier to the last silo's mean."""
        before = self._processor_seconds()
        self._tell("go")
        assert set(self._hear()) == {"done"}
        self.processor_seconds.append(self._processor_seconds() - before)

    def _processor_seconds(self) -> float:
        assert self.coordinator is not None
        everybody = [self.coordinator, *self._children]
        return sum(processor_seconds(child.pid) for child in everybody)

    def check(self) -> None:
        """Every silo's mean is the exact one."""
        self._tell("check")
        assert max(float(line) for line in self._hear()) <= ERROR

    def _spawn(self, name: str, command: list[str]) -> subprocess.Popen[str]:
        with (self._root / f"{name}.log").open("wb") as log:
            return subprocess.Popen(
                [sys.executable, *command],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                cwd=REPOSITORY,
                text=True,
            )

    def _create_session(self) -> None:
        task = TaskConfig("mean", Weighting.MEAN, 1000, 1.0, Clip.NONE, 1.0, 32)
        config = SessionConfig(
            SESSION,
            CONSORTIUM,
            tuple(silo_id(name) for name in self._silos),
            Protection.MASKED,
            1,
            ThresholdRule(2, 3),
            3,
            MaskPrg.AES_128_CTR,
            (task,),
            chunk_bytes=CHUNK_BYTES,
            phase_deadline=600.0,
        )
        admin = Channel(load_profile(self._root / ADMIN, role=Role.ADMIN), "Admin")
        request = api.CreateSessionRequest(config=config_to_wire(config))
        admin.call("CreateSession", request, api.CreateSessionReply)
        admin.close()

    def _tell(self, line: str) -> None:
        for child in self._children:
            assert child.stdin is not None
            child.stdin.write(f"{line}\n")
            child.stdin.flush()

    def _hear(self) -> list[str]:
        both = zip(self._children, self._silos, strict=True)
        return [self._line(child, name) for child, name in both]

    def _line(self, child: subprocess.Popen[str], name: str) -> str:
        assert child.stdout is not None
        line = child.stdout.readline().strip()
        assert line, self._log(name)
        return line

    def _log(self, name: str) -> str:
        return (self._root / f"{name}.log").read_text(errors="replace")[-2000:]


def processor_seconds(pid: int) -> float:
    """What a process has had of all processors so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@contextmanager
def running(how: str, root: Path, silos: int, size: int) -> Iterator[Processes]:
    """Processes, warmed up by a round."""
    root.mkdir(parents=True)
    processes = Processes(how, root, [f"silo-{rank:02}" for rank in range(silos)], size)
    try:
        processes.start()
        processes.round()
        processes.check()
        processes.processor_seconds.clear()
        yield processes
    finally:
        processes.stop()


def seconds_of(processes: Processes) -> float:
    began = time.perf_counter()
    processes.round()
    took = time.perf_counter() - began
    processes.check()
    return took


@pytest.mark.full
@pytest.mark.benchmark(group="federation")
def test_masked_beside_plain(benchmark: BenchmarkFixture, all_cores: int, tmp_path: Path) -> None:
    """Eight silos of 10^7 parameters."""
    silos, size, rounds = 8, 10**7, 5
    plain_seconds: list[float] = []
    with ExitStack() as stack:
        masked = stack.enter_context(running("masked", tmp_path / "masked", silos, size))
        plain = stack.enter_context(running("plain", tmp_path / "plain", silos, size))
        benchmark.pedantic(
            masked.round,
            setup=lambda: plain_seconds.append(seconds_of(plain)),
            teardown=masked.check,
            rounds=rounds,
        )
        assert masked.coordinator is not None
        peak = resident("VmHWM", masked.coordinator.pid)
    ours, theirs = benchmark.stats.stats.min, min(plain_seconds)
    benchmark.extra_info |= {
        "headline": "a round of processes over mTLS: 8 silos × 10⁷",
        "peer": "the same processes, unmasked",
        "peer_seconds": round(theirs, 3),
        "seconds": round(ours, 3),
        "seconds_without_disk": without_disk(silos, size, rounds),
        "ratio": round(ours / theirs, 2),
        "peer_processor_seconds": round(min(plain.processor_seconds), 2),
        "processor_seconds": round(min(masked.processor_seconds), 2),
        "target": TARGET,
        "peak_bytes": peak,
        "cores": all_cores,
    }
    show(benchmark)


def without_disk(silos: int, size: int, rounds: int) -> float | None:
    """The least time of masked rounds whose files are all in memory, where there is a place."""
    if not os.access(MEMORY, os.W_OK):
        return None
    with (
        tempfile.TemporaryDirectory(dir=MEMORY) as folder,
        running("masked", Path(folder, "root"), silos, size) as masked,
    ):
        return round(min(seconds_of(masked) for _ in range(rounds)), 3)


@pytest.mark.full
@pytest.mark.benchmark(group="federation")
def test_a_hundred_million(benchmark: BenchmarkFixture, all_cores: int, tmp_path: Path) -> None:
    """Four silos of 10^8 parameters: the coordinator stays below 1 GiB."""
    with running("masked", tmp_path / "masked", 4, 10**8) as masked:
        benchmark.pedantic(masked.round, teardown=masked.check, rounds=1)
        assert masked.coordinator is not None
        peak = resident("VmHWM", masked.coordinator.pid)
    benchmark.extra_info |= {"peak_bytes": peak, "target_bytes": GIB}
    show(benchmark)
    assert peak < GIB
