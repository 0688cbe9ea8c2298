"""A membership that moves under a coordinator: manifests, certificates, open connections."""

from __future__ import annotations

import os
import queue
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
import structlog
from structlog.testing import capture_logs

from secagg.coordinator.identity import caller
from secagg.coordinator.manifests import Manifests
from secagg.coordinator.tls import ServerCertificate
from secagg.errors import IdentityRefused, RoleRefused
from secagg.pki.credentials import RENEW_DAYS, save_manifest
from secagg.pki.enrolment import install_bundle, renewal_request
from secagg.pki.names import Role
from secagg.pki.renewal import RETRY_SECONDS
from secagg.wire._pb import service_pb2 as api

from .serving import Consortium, Pair, Server, refused, serving, uri

Status = grpc.StatusCode


class Clock:
    """A monotonic clock and a calendar that tests move."""

    def __init__(self) -> None:
        self.seconds, self.date = 0.0, datetime.now(UTC)

    def monotonic(self) -> float:
        return self.seconds

    def now(self) -> datetime:
        return self.date


@pytest.fixture(autouse=True)
def _plain_logs() -> Iterator[None]:
    structlog.reset_defaults()
    yield
    structlog.reset_defaults()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def consortium(tmp_path: Path) -> Consortium:
    return Consortium(tmp_path / "pki")


@pytest.fixture
def home(consortium: Consortium) -> Path:
    return consortium.path(Role.COORDINATOR, "main")


def events(logs: list[Any]) -> list[str]:
    return [log["event"] for log in logs]


# The manifest.


@pytest.fixture
def manifests(consortium: Consortium, clock: Clock) -> Manifests:
    credentials = consortium.credentials(Role.COORDINATOR, "main")
    return Manifests(credentials, monotonic=clock.monotonic)


def publish(consortium: Consortium, home: Path) -> None:
    """As the admin installs the authority's newest manifest at the coordinator."""
    save_manifest(home, consortium.authority.signed_manifest)


def test_a_poll_tells_of_each_newer_manifest_once(
    consortium: Consortium, home: Path, manifests: Manifests
) -> None:
    assert not manifests.poll()
    for silo in "dc":
        consortium.authority.revoke(Role.SILO, silo, now=consortium.now)
        assert not manifests.poll()  # not here yet
        publish(consortium, home)
        assert [manifests.poll() for _ in range(3)] == [True, False, False]
        assert silo not in manifests().silos


def test_a_poll_tells_of_what_a_call_has_seen_first(
    consortium: Consortium, home: Path, manifests: Manifests
) -> None:
    consortium.authority.revoke(Role.SILO, "d", now=consortium.now)
    publish(consortium, home)
    assert set(manifests().silos) == set("abc")
    assert [manifests.poll() for _ in range(2)] == [True, False]


def test_a_touched_or_refused_file_is_nothing_newer(home: Path, manifests: Manifests) -> None:
    file = home / "manifest.json"
    os.utime(file, ns=(1, 1))
    assert not manifests.poll()
    file.write_bytes(b"{}")
    assert not manifests.poll()
    file.unlink()
    assert not manifests.poll()


def test_a_half_written_manifest_is_taken_up_when_it_is_whole(
    consortium: Consortium, home: Path, manifests: Manifests, clock: Clock
) -> None:
    """Even where its stamp stays: a copy that keeps times, in place, of the same size."""
    consortium.authority.revoke(Role.SILO, "d", now=consortium.now)
    file = home / "manifest.json"
    whole = consortium.authority.signed_manifest.to_json()
    file.write_bytes(whole[:-9] + bytes(9))
    os.utime(file, ns=(1, 1))
    with capture_logs() as logs:
        assert not manifests.poll()
        clock.seconds += RETRY_SECONDS
        assert not manifests.poll()
        file.write_bytes(whole)
        os.utime(file, ns=(1, 1))
        assert not manifests.poll()  # not before its time
        clock.seconds += RETRY_SECONDS
        assert manifests.poll()
        assert not manifests.poll()
    assert events(logs) == ["manifest-refused", "manifest-loaded"]


def test_a_manifest_that_came_between_loading_and_following(
    consortium: Consortium, home: Path
) -> None:
    credentials = consortium.credentials(Role.COORDINATOR, "main")
    consortium.authority.revoke(Role.SILO, "d", now=consortium.now)
    publish(consortium, home)
    manifests = Manifests(credentials)
    assert manifests.poll()
    assert set(manifests().silos) == set("abc")


def test_manifests_for_many_threads(
    consortium: Consortium, home: Path, manifests: Manifests
) -> None:
    """Nobody sees an older one after a newer, and of all polls one tells of each."""
    first, rounds, done = manifests().version, 6, threading.Event()

    def look() -> tuple[list[int], int]:
        seen, told = [manifests().version], 0
        while not done.is_set():
            seen.append(manifests().version)
            assert manifests.signed.manifest.version >= seen[-1]
            told += manifests.poll()
        return seen, told

    with ThreadPoolExecutor(8) as pool:
        looking = [pool.submit(look) for _ in range(8)]
        with capture_logs() as logs:
            for number in range(rounds):
                consortium.enrol(Role.SILO, f"new{number}")
                publish(consortium, home)
                deadline = time.monotonic() + 30
                while manifests.signed != consortium.authority.signed_manifest:
                    assert time.monotonic() < deadline
        done.set()
        found = [future.result(30) for future in looking]
    assert all(seen == sorted(seen) for seen, _ in found)
    told = sum(count for _, count in found)
    assert 1 <= told <= rounds
    assert manifests().version == first + rounds
    assert events(logs) == ["manifest-loaded"] * rounds


# The coordinator's own certificate.


@pytest.fixture
def certificate(consortium: Consortium, clock: Clock) -> ServerCertificate:
    credentials = consortium.credentials(Role.COORDINATOR, "main")
    return ServerCertificate(credentials, now=clock.now, monotonic=clock.monotonic)


def renew(consortium: Consortium, role: Role, name: str, *, days: int, now: datetime) -> None:
    path = consortium.path(role, name)
    made = renewal_request(path, role, name, consortium.name)
    bundle = consortium.authority.approve(made, now=now, days=days)
    install_bundle(path, bundle, fingerprint=None, now=now)


def test_a_renewal_that_lay_there_in_parts_is_loaded(
    consortium: Consortium, home: Path, certificate: ServerCertificate, clock: Clock
) -> None:
    """The certificate first, and its key still half: as a copying operator may leave it."""
    renew(consortium, Role.COORDINATOR, "main", days=300, now=clock.date)
    key = (home / "tls.key").read_bytes()
    (home / "tls.key").write_bytes(key[:50])
    with capture_logs() as logs:
        assert certificate._fetch() is None
        clock.seconds += RETRY_SECONDS
        assert certificate._fetch() is None
        (home / "tls.key").write_bytes(key)
        assert certificate._fetch() is None  # not at every handshake
        clock.seconds += RETRY_SECONDS
        assert certificate._fetch() is not None
        for _ in range(5):  # grpcio crashes on new objects at every handshake
            clock.seconds += RETRY_SECONDS
            assert certificate._fetch() is None
    assert events(logs) == ["certificate-refused", "certificate-reloaded"]


def test_a_certificate_without_end_in_sight_is_no_news(
    consortium: Consortium, clock: Clock
) -> None:
    with capture_logs() as logs:
        made = ServerCertificate(consortium.credentials(Role.COORDINATOR, "main"), now=clock.now)
        assert made._fetch() is None
    assert logs == []


def test_a_certificate_near_its_end_is_told_of(
    consortium: Consortium, certificate: ServerCertificate, clock: Clock
) -> None:
    """At the start, once a day, and after a reload that brought too little."""
    renew(consortium, Role.COORDINATOR, "main", days=RENEW_DAYS - 4, now=clock.date)
    with capture_logs() as logs:
        started = ServerCertificate(consortium.credentials(Role.COORDINATOR, "main"), now=clock.now)
        assert events(logs) == ["certificate-ends-soon"]
        assert (logs[0]["days"], logs[0]["log_level"]) == (RENEW_DAYS - 5, "warning")
        assert "--role coordinator" in logs[0]["remedy"]
        for _ in range(8):
            clock.date += timedelta(hours=6)
            started._fetch()
        assert events(logs) == ["certificate-ends-soon"] * 3
    for follower in (certificate, started):  # the second has told of the one before
        renew(consortium, Role.COORDINATOR, "main", days=RENEW_DAYS - 4, now=clock.date)
        with capture_logs() as logs:
            assert follower._fetch() is not None
        assert events(logs) == ["certificate-reloaded", "certificate-ends-soon"]
    renew(consortium, Role.COORDINATOR, "main", days=300, now=clock.date)
    clock.date += timedelta(days=3)
    with capture_logs() as logs:
        assert certificate._fetch() is not None
        assert certificate._fetch() is None
    assert events(logs) == ["certificate-reloaded"]


# Callers.


def context_of(pair: Pair) -> Any:
    return SimpleNamespace(auth_context=lambda: {"x509_pem_cert": [pair.certificate]})


def test_a_caller_is_looked_at_by_the_calendar_and_the_manifest_of_the_call(
    consortium: Consortium, home: Path, manifests: Manifests, clock: Clock
) -> None:
    """Over one connection the certificate stays the same and all else moves on."""
    context = context_of(consortium.pair(Role.SILO, "d"))

    def ask() -> str:
        return caller(context, manifests, now=clock.now).name

    assert ask() == "d"
    end = consortium.credentials(Role.SILO, "d").not_after
    clock.date = end
    assert ask() == "d"
    clock.date = end + timedelta(seconds=1)
    with pytest.raises(IdentityRefused, match="identity-expired"):
        ask()
    clock.date = consortium.now
    assert ask() == "d"
    consortium.authority.revoke(Role.SILO, "d", now=consortium.now)
    publish(consortium, home)
    with pytest.raises(RoleRefused, match="identity-revoked"):
        ask()


# Over the network.


def states_of(stub: Any) -> queue.SimpleQueue[grpc.ChannelConnectivity]:
    """What becomes of a connection, from the moment when it stands."""
    states: queue.SimpleQueue[grpc.ChannelConnectivity] = queue.SimpleQueue()
    stub.channel.subscribe(states.put, try_to_connect=True)
    while states.get(timeout=30) is not grpc.ChannelConnectivity.READY:
        pass
    return states


@pytest.fixture
def server(consortium: Consortium, tmp_path: Path) -> Iterator[Server]:
    with serving(consortium, tmp_path / "server") as running:
        yield running


@pytest.mark.process
def test_revocation_takes_effect_over_an_open_connection(
    consortium: Consortium, home: Path, server: Server
) -> None:
    """For that silo alone, from its next call on."""
    study = server.create("study")
    study.open()
    states = states_of(server.silo("d"))
    join = api.JoinSessionRequest(session="study")
    waiting = (
        server.silo("d")
        .method("Next")
        .future(api.NextRequest(session_id=study.session_id, round=1), timeout=60)
    )
    assert server.silo("d")("JoinSession", join)
    consortium.authority.revoke(Role.SILO, "d", now=consortium.now)
    publish(consortium, home)
    for _ in range(2):
        with refused(Status.PERMISSION_DENIED, "identity-revoked"):
            server.silo("d")("JoinSession", join)
    with refused(Status.PERMISSION_DENIED, "identity-revoked"):
        study.call("d", "Ready", api.ReadyRequest, task="training", base=study.base())
    assert states.empty()  # one connection all the time
    for silo in "abc":
        assert server.silo(silo)("JoinSession", join)
    waiting.cancel()


@pytest.mark.process
def test_a_certificate_that_ends_ends_its_calls_over_an_open_connection(
    consortium: Consortium, server: Server
) -> None:
    server.create("study")
    join = api.JoinSessionRequest(session="study")
    seconds = 8.0  # enough to connect in
    pair = consortium.odd(uri(f"secagg://{consortium.name}/silo/d"), end=timedelta(seconds=seconds))
    stub = server.connect(pair)
    states = states_of(stub)
    assert stub("JoinSession", join)

    def over() -> grpc.RpcError | None:
        try:
            stub("JoinSession", join)
        except grpc.RpcError as error:
            return error
        return None

    error = until(over, seconds + 30)
    assert error.code() is Status.UNAUTHENTICATED
    with refused(Status.UNAUTHENTICATED, "identity-expired"):
        stub("JoinSession", join)
    assert states.empty()
    assert server.silo("d")("JoinSession", join)  # d's other certificate is good


def until(look: Callable[[], Any], seconds: float) -> Any:
    """Look until there is something, for a bounded time."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if (found := look()) is not None:
            return found
        threading.Event().wait(0.05)
    raise AssertionError(f"nothing within {seconds} s")
