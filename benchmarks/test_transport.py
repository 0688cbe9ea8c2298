"""A silo's upload into the coordinator's spool, over mutual TLS between two processes.

Two floors, taken in the same run with the same bytes. One is gRPC alone: unary calls with requests
of a chunk's size and empty replies, as many in flight, to a server that does nothing. The other is
the disk alone: writing and syncing. An upload does both, and hashes beside, so the slower of the
two is what it is held against. Every turn writes files of its own and all are kept: the pages that
a file gives back are the next one's, and in a virtual machine they cost less than fresh ones.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.measure import record
from benchmarks.stage import NAME, begin, configure, enrol, make_config, masked_inputs
from client_sdk import channel as sdk
from client_sdk.channel import Channel
from client_sdk.profile import load_profile
from client_sdk.transfer import upload
from secagg.config import (
    SessionConfig,
    SiloId,
)
from secagg.coordinator.sqlite import SqliteJournal
from secagg.coordinator.tls import ServerCertificate
from secagg.pki.credentials import Credentials, load_credentials
from secagg.pki.names import Role
from secagg.pki.profile import write_policy, write_profile
from secagg.ring.expand import Encoded
from secagg.ring.vectors import PowerRing
from secagg.wire import attempt as wire
from secagg.wire._pb import service_pb2 as api

TURNS, PARAMETERS, CHUNK_BYTES = 8, 16 * 10**6, 2**20
RING = PowerRing(32)
REPOSITORY = Path(__file__).parent.parent
_REST = 100
"""Bytes of a request beside its chunk, about."""


@dataclass
class Place:
    """A consortium whose silos all have a masked vector to upload, and a coordinator that waits."""

    root: Path
    config: SessionConfig
    session_id: bytes = b""
    silos: dict[SiloId, tuple[memoryview, api.SendRequest]] = field(default_factory=dict)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    root = tmp_path_factory.mktemp("transport")
    names = tuple(SiloId(f"silo-{n}") for n in range(TURNS))
    enrol(root, names)
    found = Place(root, make_config(names, chunk_bytes=CHUNK_BYTES, phase_deadline=600.0))
    with closing(SqliteJournal(root / "state")) as journal:
        session = begin(root, found.config, journal, PARAMETERS)
        found.session_id = session.session_id
        for name, message, vector in masked_inputs(root, session, _noise):
            request = wire.client_message_to_wire(
                message, session_id=session.session_id, round_number=1, attempt=1
            )
            found.silos[name] = (RING.pack(vector), request)
    configure(root, "state", "serve.toml")
    return found


def _noise(length: int) -> Encoded:
    words = RING.unpack(os.urandom(4 * length), length)  # nobody unmasks them
    return lambda masks, prg: words


def _credentials(place: Place, name: str, role: Role) -> Credentials:
    return load_credentials(place.root / name, now=datetime.now(UTC), role=role)


@contextmanager
def process(root: Path, *arguments: str) -> Iterator[int]:
    """A server in a process of its own; gives its port."""
    port = root / "port"
    port.unlink(missing_ok=True)
    child = subprocess.Popen([sys.executable, *arguments, str(port)], cwd=REPOSITORY)
    try:
        while not port.exists():
            assert child.poll() is None
            time.sleep(0.005)
        yield int(port.read_text())
    finally:
        child.terminate()
        child.wait()


SERVE = ("-c", "from secagg.cli import main; main()", "serve")


@pytest.mark.timeout(900)
@pytest.mark.benchmark(group="chunked upload")
def test_upload_of_64_mb(benchmark: BenchmarkFixture, all_cores: int, place: Place) -> None:
    floors: dict[str, list[float]] = {"gRPC alone": [], "write and sync": []}
    commits: list[float] = []
    with (
        process(place.root, "-m", __name__, str(place.root / "main")) as bare,
        process(
            place.root, *SERVE, "--config", str(place.root / "serve.toml"), "--port-file"
        ) as port,
        closing(_line(place, bare)) as line,
    ):
        names = iter(place.silos)

        def before() -> tuple[tuple[Channel, SiloId], dict[str, Any]]:
            """Both floors, then the next silo shakes hands."""
            name = next(names)
            vector, _ = place.silos[name]
            floors["gRPC alone"].append(_timed(lambda: _call(line, len(vector), CHUNK_BYTES)))
            path = place.root / f"floor-{name}"
            floors["write and sync"].append(_timed(lambda: _write(path, vector)))
            write_profile(place.root / name, f"127.0.0.1:{port}")
            write_policy(place.root / name)
            channel = Channel(load_profile(place.root / name))
            join = api.JoinSessionRequest(session=NAME)
            channel.call("JoinSession", join, api.JoinSessionReply)
            return (channel, name), {}

        def work(channel: Channel, name: SiloId) -> None:
            member = SimpleNamespace(session=place.config, session_id=place.session_id)
            where = api.Blob(vector=api.Blob.Vector(round=1, attempt=1))
            upload(channel, member, where, place.silos[name][0])  # type: ignore[arg-type]

        def after(channel: Channel, name: SiloId) -> None:
            """It commits, so the coordinator sums it, and what it sent is what lies there."""
            vector, request = place.silos[name]
            spool = place.root / "state/sessions" / place.session_id.hex() / "spool"
            assert (spool / f"1-1-{name}").read_bytes() == vector
            commits.append(_timed(lambda: channel.call("Send", request, api.Ack)))
            channel.close()

        benchmark.pedantic(work, setup=before, teardown=after, rounds=len(place.silos))
    size = len(next(iter(place.silos.values()))[0])
    least = {what: min(taken) for what, taken in floors.items()}
    slower = max(least, key=least.__getitem__)
    record(
        benchmark,
        floor=slower,
        floor_seconds=least[slower],
        elements=size // RING.word_bytes,
        headline="a silo's upload, over mutual TLS and onto the disk",
        floors={what: round(size / taken / 1e6) for what, taken in least.items()},
        upload_mb_per_second=round(size / benchmark.stats.stats.min / 1e6),
        commit_ns_per_element=round(min(commits) / size * RING.word_bytes * 1e9, 2),
        cores=all_cores,
    )
    print(benchmark.extra_info)


def _line(place: Place, port: int) -> grpc.Channel:
    return sdk._dial(f"127.0.0.1:{port}", _credentials(place, place.config.silos[0], Role.SILO))


def _timed(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def _call(line: grpc.Channel, total: int, size: int) -> None:
    """As many requests of a chunk's size as the blob has chunks, as many in flight."""
    stub, request = line.unary_unary("/bare/Call"), bytes(size + _REST)
    flying: list[Any] = []
    for _ in range(0, total, size):
        flying.append(stub.future(request))
        if len(flying) >= sdk.CALLS_IN_FLIGHT:
            flying.pop(0).result()
    for future in flying:
        future.result()


def _write(path: Path, data: memoryview) -> None:
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
    for offset in range(0, len(data), CHUNK_BYTES):
        os.write(file, data[offset : offset + CHUNK_BYTES])
    os.fsync(file)
    os.close(file)


async def _serve_bare(place: Path, port: Path) -> None:
    """The floor's server: takes bytes and answers with none."""

    async def answer(request: bytes, context: object) -> bytes:
        return b""

    server = grpc.aio.server(options=[("grpc.max_receive_message_length", 8 * 2**20)])
    method = grpc.unary_unary_rpc_method_handler(answer)
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler("bare", {"Call": method}),)
    )
    credentials = load_credentials(place, now=datetime.now(UTC), role=Role.COORDINATOR)
    bound = server.add_secure_port("127.0.0.1:0", ServerCertificate(credentials).credentials())
    await server.start()
    port.with_suffix(".tmp").write_text(f"{bound}\n")
    port.with_suffix(".tmp").replace(port)
    await server.wait_for_termination()


if __name__ == "__main__":
    asyncio.run(_serve_bare(Path(sys.argv[1]), Path(sys.argv[2])))
