"""Server processes of their own: limits, health, stop, revocation and renewal while they run."""

from __future__ import annotations

import queue
import signal
import ssl
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography import x509
from grpc_health.v1 import health_pb2, health_pb2_grpc

from secagg.pki.names import Role
from secagg.wire._pb import service_pb2 as api

from .serving import Consortium, Server, refused, serving

pytestmark = pytest.mark.process
Status = grpc.StatusCode
Start = Callable[..., AbstractContextManager[Server]]

SERVE = [sys.executable, "-c", "from secagg.cli import main; main()", "serve", "--config"]


@pytest.fixture(scope="module")
def consortium(tmp_path_factory: pytest.TempPathFactory) -> Consortium:
    """For servers that leave the consortium as it is."""
    return Consortium(tmp_path_factory.mktemp("pki"))


@pytest.fixture
def small(consortium: Consortium, tmp_path: Path) -> Iterator[Server]:
    """A server with low limits."""
    with serving(consortium, tmp_path, max_concurrent_calls=3, max_sessions=2) as running:
        yield running


def watched(stub: Any) -> queue.SimpleQueue[grpc.ChannelConnectivity]:
    states: queue.SimpleQueue[grpc.ChannelConnectivity] = queue.SimpleQueue()
    stub.channel.subscribe(states.put, try_to_connect=True)
    while states.get(timeout=30) is not grpc.ChannelConnectivity.READY:
        pass
    return states


def test_limits(small: Server) -> None:
    first = small.create("first")
    second = small.create("second")
    with refused(Status.RESOURCE_EXHAUSTED, "session-count"):
        small.create("third")
    small.boss.admin("AbortSession", api.AbortSessionRequest(name="first"))
    small.create("third")  # one that is over makes room
    with refused(Status.NOT_FOUND, "session-unknown"):
        first.call("a", "Next", api.NextRequest, round=1)
    # Five long polls where three calls may run: two are refused, at once.
    done: queue.SimpleQueue[Any] = queue.SimpleQueue()
    request = api.NextRequest(session_id=second.session_id, round=1)
    calls = [small.silo("a").method("Next").future(request, timeout=60) for _ in range(5)]
    for call in calls:
        call.add_done_callback(done.put)
    for _ in range(2):
        assert done.get(timeout=30).code() is Status.RESOURCE_EXHAUSTED
    assert done.empty()
    small.silo("a").channel.close()
    for _ in range(3):
        assert done.get(timeout=30).code() is Status.CANCELLED


def check_health(server: Server) -> int:
    stub = health_pb2_grpc.HealthStub(server.silo("a").channel)
    status: int = stub.Check(health_pb2.HealthCheckRequest(), timeout=30).status
    return status


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_health_then_a_graceful_stop(
    consortium: Consortium, tmp_path: Path, number: signal.Signals
) -> None:
    with serving(consortium, tmp_path, grace=30) as server:
        assert check_health(server) == health_pb2.HealthCheckResponse.SERVING
        study = server.create("study")
        study.open()
        polls = [
            server.silo(silo)
            .method("Next")
            .future(api.NextRequest(session_id=study.session_id, round=1), timeout=60)
            for silo in "abc"
        ]
        study.ready("a", "b", "c")  # over the same connections: so the polls have come
        server.process.send_signal(number)
        for poll in polls:  # they end at once, not when their time or the grace is over
            assert poll.result(timeout=15) == api.NextReply()
        assert server.stop(number) == 0
        assert b'"stopping"' in server.log
        assert b"Traceback" not in server.log
        left = {p.name for p in (tmp_path / "state").rglob("*") if p.is_file()}
        assert left == {"journal.sqlite", "journal.head", "lock"}


def test_a_port_in_use(consortium: Consortium, tmp_path: Path) -> None:
    with serving(consortium, tmp_path / "one") as server:
        with pytest.raises(pytest.fail.Exception, match=r"cannot be bound"):
            serving(consortium, tmp_path / "two", listen=server.address).__enter__()
        assert check_health(server) == health_pb2.HealthCheckResponse.SERVING


def test_revocation_while_a_connection_is_open(tmp_path: Path) -> None:
    consortium = Consortium(tmp_path / "pki")
    with serving(consortium, tmp_path / "server") as server:
        study = server.create("study")
        join = api.JoinSessionRequest(session="study")
        states = watched(server.silo("d"))
        server.silo("d")("JoinSession", join)
        ages = {silo.name: silo.last_call_age for silo in study.show().silos}
        consortium.authority.revoke(Role.SILO, "d", now=consortium.now)
        manifest = consortium.path(Role.COORDINATOR, "main") / "manifest.json"
        manifest.write_bytes(consortium.authority.signed_manifest.to_json())
        with refused(Status.PERMISSION_DENIED, "identity-revoked"):
            server.silo("d")("JoinSession", join)
        with refused(Status.PERMISSION_DENIED, "identity-revoked"):
            study.call("d", "OpenTask", api.OpenTaskRequest, task="training")
        assert states.empty()  # on the connection that was open before
        with refused(Status.PERMISSION_DENIED, "identity-revoked"):
            server.connect(consortium.pair_as_it_lies(Role.SILO, "d"))("JoinSession", join)
        assert ages["d"] >= 0
        assert server.silo("a")("JoinSession", join).manifest == manifest.read_bytes()
        # An admin is in no manifest: its serial number alone keeps it out.
        consortium.authority.revoke(Role.ADMIN, "boss", now=consortium.now)
        manifest.write_bytes(consortium.authority.signed_manifest.to_json())
        with refused(Status.PERMISSION_DENIED, "identity-revoked"):
            server.boss.admin("AbortSession", api.AbortSessionRequest(name="study"))
        study.call("a", "Leave", api.LeaveRequest)


def test_an_older_or_forged_manifest_changes_nothing(tmp_path: Path) -> None:
    consortium = Consortium(tmp_path / "pki")
    manifest = consortium.path(Role.COORDINATOR, "main") / "manifest.json"
    old = manifest.read_bytes()
    with serving(consortium, tmp_path / "server") as server:
        server.create("study")
        join = api.JoinSessionRequest(session="study")
        consortium.authority.revoke(Role.SILO, "d", now=consortium.now)
        new = consortium.authority.signed_manifest.to_json()
        for data in (new, old, b"{", new.replace(b'"version":', b'"version": 9'), b""):
            manifest.write_bytes(data)
            with refused(Status.PERMISSION_DENIED, "identity-revoked"):
                server.silo("d")("JoinSession", join)
            assert server.silo("a")("JoinSession", join).manifest == new
        manifest.unlink()
        with refused(Status.PERMISSION_DENIED, "identity-revoked"):
            server.silo("d")("JoinSession", join)
        assert server.log.count(b'"manifest-refused"') == 5
        assert server.log.count(b'"manifest-loaded"') == 1


def serial(server: Server) -> int:
    """Serial number of the certificate that a new handshake shows."""
    pair = server.consortium.pair_as_it_lies(Role.SILO, "a")
    with server.handshake(pair, ssl.TLSVersion.TLSv1_3) as connection:
        der = connection.getpeercert(binary_form=True)
    assert der is not None
    return x509.load_der_x509_certificate(der).serial_number


def test_a_renewed_certificate_without_a_restart(tmp_path: Path) -> None:
    consortium = Consortium(tmp_path / "pki")
    path = consortium.path(Role.COORDINATOR, "main") / "certificate.pem"

    def on_disk() -> int:
        return x509.load_pem_x509_certificate(path.read_bytes()).serial_number

    with serving(consortium, tmp_path / "server") as server:
        server.create("study")
        join = api.JoinSessionRequest(session="study")
        states = watched(server.silo("a"))
        first = on_disk()
        assert serial(server) == serial(server) == first
        consortium.renew(Role.COORDINATOR, "main")
        second = on_disk()
        assert second != first
        assert serial(server) == serial(server) == second
        server.connect(consortium.pair(Role.SILO, "b"))("JoinSession", join)
        path.write_bytes(b"no certificate")
        assert serial(server) == second
        assert server.silo("a")("JoinSession", join).session_id
        assert states.empty()  # the old connection is the one that was opened first
        consortium.renew(Role.COORDINATOR, "main")
        assert serial(server) == on_disk() != second
        assert server.log.count(b'"certificate-reloaded"') == 2
        assert server.log.count(b'"certificate-refused"') == 1


def test_credentials_that_cannot_serve(consortium: Consortium, tmp_path: Path) -> None:
    for role, name in ((Role.SILO, "a"), (Role.ADMIN, "boss")):
        with pytest.raises(pytest.fail.Exception, match="certificate-role"):
            serving(
                consortium, tmp_path / name, credentials=str(consortium.path(role, name))
            ).__enter__()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_no_core_file_and_all_descriptors(consortium: Consortium, tmp_path: Path) -> None:
    """A core would hold revealed shares; a thousand idle connections must not starve the disk."""
    with serving(consortium, tmp_path) as server:
        limits = Path(f"/proc/{server.process.pid}/limits").read_text().splitlines()
    rows = {line[:25].strip(): line[25:].split() for line in limits}
    assert rows["Max core file size"][:2] == ["0", "0"]
    soft, hard = rows["Max open files"][:2]
    assert soft == hard


def start_again(directory: Path) -> subprocess.CompletedProcess[str]:
    """Start a coordinator, in vain, on the state of the one that was served there."""
    command = [*SERVE, str(directory / "c.toml")]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_a_second_coordinator_on_one_directory(consortium: Consortium, tmp_path: Path) -> None:
    with serving(consortium, tmp_path):
        second = start_again(tmp_path)
    assert second.returncode == 75
    assert "[storage-in-use]" in second.stderr
    assert "Traceback" not in second.stderr


def test_damaged_state_is_refused_by_name(consortium: Consortium, tmp_path: Path) -> None:
    with serving(consortium, tmp_path) as server:
        server.create("study")
    anchor = tmp_path / "state" / "journal.head"
    anchor.write_bytes(bytes(anchor.stat().st_size))
    refused = start_again(tmp_path)
    assert refused.returncode == 76
    assert "journal.head" in refused.stderr
    assert "Traceback" not in refused.stderr
