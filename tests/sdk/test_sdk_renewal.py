"""A silo's certificate is renewed, ends or is revoked while its training runs."""

from __future__ import annotations

import logging
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from click.testing import CliRunner
from cryptography import x509

import client_sdk
from client_sdk import channel as module
from client_sdk.channel import Channel, CoordinatorUnreachable
from client_sdk.profile import load_profile
from client_sdk.session import Session
from secagg.cli.doctor import doctor
from secagg.errors import CredentialError, SecaggError
from secagg.pki.authority import LEAF_DAYS, Authority
from secagg.pki.credentials import RENEW_DAYS
from secagg.pki.enrolment import install_bundle, renewal_request
from secagg.pki.names import Role, serial_hex
from secagg.pki.renewal import RETRY_SECONDS, RenewalWatch, utc_now
from secagg.wire._pb import service_pb2 as api

from .federation import (
    CONSORTIUM,
    SILOS,
    Consortium,
    Federation,
    bounded,
    enrol,
    make_sum,
    rank,
    refused,
    settle,
)

DAY = timedelta(days=1)


def renew(authority: Authority, place: Path, name: str = "a", *, days: int = LEAF_DAYS) -> str:
    """Renew a silo's certificate as its operator and the admin do; returns its serial number."""
    now = datetime.now(UTC)
    request = renewal_request(place, Role.SILO, name, authority.consortium)
    bundle = authority.approve(request, now=now, days=days)
    install_bundle(place, bundle, fingerprint=None, now=now)
    return serial_of(bundle.certificate_pem)


def serial_of(pem: bytes) -> str:
    return serial_hex(x509.load_pem_x509_certificate(pem))


class Clock:
    """A calendar that tests move."""

    def __init__(self) -> None:
        self.date = datetime.now(UTC)

    def now(self) -> datetime:
        return self.date


class Hub(grpc.GenericRpcHandler):
    """A server in the coordinator's place that answers anything and notes who called.

    Args:
        place: the coordinator's credentials.
        authority: whose members may call.
    """

    def __init__(self, place: Path, authority: Authority) -> None:
        self.serials: list[str] = []
        self.answer: Callable[[bytes, grpc.ServicerContext], None] = lambda data, context: None
        self._server = grpc.server(ThreadPoolExecutor(8), handlers=[self])
        credentials = grpc.ssl_server_credentials(
            [((place / "tls.key").read_bytes(), (place / "certificate.pem").read_bytes())],
            root_certificates=authority.certificate_pem,
            require_client_auth=True,
        )
        self.address = f"127.0.0.1:{self._server.add_secure_port('127.0.0.1:0', credentials)}"
        self._server.start()

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[Any, Any]:
        return grpc.unary_unary_rpc_method_handler(self._serve)

    def _serve(self, data: bytes, context: grpc.ServicerContext) -> bytes:
        self.serials.append(serial_of(context.auth_context()["x509_pem_cert"][0]))
        self.answer(data, context)
        return b""

    def stop(self) -> None:
        self._server.stop(0).wait()


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority.create(tmp_path / "authority", CONSORTIUM, now=datetime.now(UTC) - 60 * DAY)


@pytest.fixture
def hub(authority: Authority, tmp_path: Path) -> Iterator[Hub]:
    made = Hub(enrol(authority, tmp_path / "hub", "hub", Role.COORDINATOR), authority)
    yield made
    made.stop()


@pytest.fixture
def place(authority: Authority, hub: Hub, tmp_path: Path) -> Path:
    """Silo a's directory, with a certificate of thirty days."""
    return settle(enrol(authority, tmp_path / "a", "a", days=30), hub.address)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def channel(place: Path, clock: Clock) -> Iterator[Channel]:
    made = Channel(load_profile(place), now=clock.now)
    yield made
    made.close()


def ask(channel: Channel) -> None:
    channel.call("Leave", api.LeaveRequest(), api.Ack)


def own_serial(place: Path) -> str:
    return serial_of((place / "certificate.pem").read_bytes())


# The channel.


def test_a_renewal_takes_over_with_the_next_call(
    authority: Authority,
    hub: Hub,
    place: Path,
    channel: Channel,
    caplog: pytest.LogCaptureFixture,
) -> None:
    old = own_serial(place)
    ask(channel)
    with caplog.at_level(logging.INFO, "client_sdk"):
        new = renew(authority, place)
        ask(channel)
        ask(channel)
    assert hub.serials == [old, new, new]
    assert len(channel._lines) == 1
    assert len(caplog.records) == 1
    assert "goes on under its renewed certificate" in caplog.text


def test_a_touched_or_reinstalled_certificate_keeps_the_connection(
    place: Path, channel: Channel
) -> None:
    line = channel._line
    ask(channel)
    os.utime(place / "certificate.pem", ns=(1, 1))
    ask(channel)
    data = (place / "certificate.pem").read_bytes()
    (place / "certificate.pem").unlink()
    (place / "certificate.pem").write_bytes(data)
    ask(channel)
    assert channel._line is line


def test_an_unchanged_certificate_is_not_read(
    place: Path, channel: Channel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(*_: object, **__: object) -> None:
        raise AssertionError("read")

    monkeypatch.setattr("secagg.pki.renewal.load_credentials", read)
    for _ in range(3):
        ask(channel)


def test_a_call_in_flight_ends_over_the_connection_it_began_on(
    authority: Authority, hub: Hub, place: Path, channel: Channel
) -> None:
    arrived, go_on = threading.Event(), threading.Event()
    old = own_serial(place)

    def wait(data: bytes, context: grpc.ServicerContext) -> None:
        if hub.serials == [old]:
            arrived.set()
            assert go_on.wait(30)

    hub.answer = wait
    with ThreadPoolExecutor(1) as pool:
        flying = pool.submit(ask, channel)
        assert arrived.wait(30)
        first = channel._line
        new = renew(authority, place)
        ask(channel)
        assert channel._line is not first
        assert channel._lines == [first, channel._line]  # still open
        assert not flying.done()
        go_on.set()
        flying.result(30)
    assert hub.serials == [old, new]
    assert channel._lines == [channel._line]
    with pytest.raises(ValueError, match="closed channel"):
        first.channel.unary_unary("/x/y")(b"")


def test_an_upload_is_not_cut_by_a_renewal(
    authority: Authority, hub: Hub, place: Path, channel: Channel
) -> None:
    """The first chunk is in flight when the certificate changes."""
    second, old, new = threading.Event(), own_serial(place), ""

    def answer(data: bytes, context: grpc.ServicerContext) -> None:
        if len(hub.serials) == 1:
            assert second.wait(30)
        second.set()

    def chunks() -> Iterator[api.PutChunkRequest]:
        nonlocal new
        yield api.PutChunkRequest(offset=0)
        bounded("first chunk", lambda: hub.serials or None)
        new = renew(authority, place)
        for number in range(1, 4):
            yield api.PutChunkRequest(offset=number)

    hub.answer = answer
    channel.call_many("PutChunk", chunks(), api.Ack)
    assert hub.serials == [old, new, new, new]  # none was sent twice
    assert channel._lines == [channel._line]


def test_closing_hangs_up_all_connections(
    authority: Authority, hub: Hub, place: Path, channel: Channel
) -> None:
    arrived, go_on = threading.Event(), threading.Event()

    def wait(data: bytes, context: grpc.ServicerContext) -> None:
        arrived.set()
        go_on.wait(30)

    hub.answer = wait
    request = api.PutChunkRequest()
    line, stub = channel._pick_up("PutChunk")
    future = stub.future(request, timeout=60)
    assert arrived.wait(30)
    renew(authority, place)
    channel._take_up_renewal()
    assert channel._lines == [line, channel._line]
    channel.close()
    channel.close()
    with pytest.raises(grpc.RpcError):
        future.result(30)
    go_on.set()
    channel._put_down(line)
    renew(authority, place)
    channel._take_up_renewal()  # nothing is dialled any more
    assert channel._lines == []


BAD: dict[str, tuple[Callable[[Path, Path], object], str]] = {
    "rubbish": (lambda a, b: (a / "certificate.pem").write_bytes(b"x"), "identity-certificate"),
    "gone": (lambda a, b: (a / "certificate.pem").unlink(), "file-missing"),
    "another key's": (
        lambda a, b: shutil.copy(b / "certificate.pem", a / "certificate.pem"),
        "certificate-key",
    ),
    "another silo's directory": (
        lambda a, b: shutil.copytree(b, a, dirs_exist_ok=True),
        "renewal-identity",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_certificate_on_disk_is_left_and_told_once(
    authority: Authority,
    hub: Hub,
    place: Path,
    channel: Channel,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    case: str,
) -> None:
    spoil, code = BAD[case]
    good = place.parent / "good"
    shutil.copytree(place, good)
    other = enrol(authority, tmp_path / "b", "b")
    old = own_serial(place)
    ask(channel)
    spoil(place, other)
    for _ in range(3):
        ask(channel)
    assert hub.serials == [old] * 4
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert code in record.getMessage()
    assert "stays in use" in record.getMessage()
    shutil.copytree(good, place, dirs_exist_ok=True)
    new = renew(authority, place)
    ask(channel)
    assert hub.serials[-1] == new
    assert len(caplog.records) == 1


def test_a_renewal_that_lay_there_in_parts_is_taken_up(
    authority: Authority, hub: Hub, place: Path, channel: Channel, clock: Clock
) -> None:
    seconds = [0.0]
    profile = load_profile(place)
    channel._watch = RenewalWatch(profile.credentials, now=clock.now, monotonic=lambda: seconds[0])
    (place / "tls.key").chmod(0o644)
    new = renewed_apart(authority, place)
    ask(channel)
    (place / "tls.key").chmod(0o600)
    ask(channel)
    assert new not in hub.serials
    seconds[0] = RETRY_SECONDS
    ask(channel)
    assert hub.serials[-1] == new


def renewed_apart(authority: Authority, place: Path) -> str:
    """A renewal put there by hand, past the checks of an installation."""
    (place / "tls.key").chmod(0o600)
    request = renewal_request(place, Role.SILO, "a", authority.consortium)
    (place / "tls.key").chmod(0o644)
    pem = authority.approve(request, now=datetime.now(UTC)).certificate_pem
    (place / "certificate.pem").write_bytes(pem)
    return serial_of(pem)


def test_a_renewal_heals_a_retry_that_runs(
    authority: Authority, hub: Hub, place: Path, channel: Channel
) -> None:
    """The coordinator refuses the old certificate, say by a clock of its own."""
    old, renewed = own_serial(place), []

    def answer(data: bytes, context: grpc.ServicerContext) -> None:
        if hub.serials[-1] == old:
            if len(hub.serials) == 3:
                renewed.append(renew(authority, place))
            context.abort(grpc.StatusCode.UNAVAILABLE, "not you")

    hub.answer = answer
    ask(channel)
    assert hub.serials == [old, old, old, *renewed]


def test_a_certificate_that_ends_in_a_retry_ends_it(
    hub: Hub, place: Path, channel: Channel, clock: Clock
) -> None:
    def answer(data: bytes, context: grpc.ServicerContext) -> None:
        if len(hub.serials) == 3:
            clock.date += 40 * DAY
        context.abort(grpc.StatusCode.UNAVAILABLE, "away")

    hub.answer = answer
    with refused(CredentialError, "certificate-expired"):
        ask(channel)
    assert len(hub.serials) == 3


def test_an_ended_certificate_stops_calls_until_it_is_renewed(
    authority: Authority, hub: Hub, place: Path, channel: Channel, clock: Clock
) -> None:
    ask(channel)
    clock.date += 31 * DAY
    for _ in range(2):
        with refused(CredentialError, "certificate-expired") as caught:
            ask(channel)
    assert f"--renew --dir {place}" in str(caught.value)
    with refused(CredentialError, "certificate-expired"):
        channel.call_many("PutChunk", [api.PutChunkRequest()], api.Ack)
    assert len(hub.serials) == 1  # nothing was sent
    channel.once("Leave", api.LeaveRequest(), seconds=10)  # a courtesy never fails
    new = renew(authority, place)
    ask(channel)
    assert hub.serials[-1] == new


def test_an_ended_profile_whose_directory_was_renewed_is_used(
    authority: Authority, hub: Hub, place: Path, clock: Clock
) -> None:
    profile = load_profile(place)
    new = renew(authority, place)
    clock.date += 40 * DAY
    made = Channel(profile, now=clock.now)
    ask(made)
    made.close()
    assert hub.serials == [new]


def test_an_ended_profile_is_refused_before_dialling(place: Path, clock: Clock) -> None:
    profile = replace(load_profile(place), coordinator="127.0.0.1:1")
    clock.date += 40 * DAY
    with refused(CredentialError, "certificate-expired"):
        Channel(profile, now=clock.now)


def test_a_coordinator_that_is_away_stays_unreachable(
    hub: Hub, place: Path, channel: Channel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Looking at the certificate makes no other fault out of it."""
    monkeypatch.setattr(module, "CONNECT_SECONDS", 0.3)
    hub.stop()
    with refused(CoordinatorUnreachable, "coordinator-unreachable"):
        ask(channel)


# The warning ahead.


def test_the_end_is_told_of_from_two_weeks_on_once_a_day(
    authority: Authority, place: Path, caplog: pytest.LogCaptureFixture
) -> None:
    clock = Clock()
    profile = load_profile(place)
    clock.date = profile.credentials.not_after - RENEW_DAYS * DAY - timedelta(hours=10)
    channel = Channel(profile, now=clock.now)
    told = []
    for hour in range(0, 96, 3):
        ask(channel)
        told += [(hour, record.getMessage()) for record in caplog.records]
        caplog.clear()
        clock.date += timedelta(hours=3)
    assert [hour for hour, _ in told] == [12, 36, 60, 84]
    assert "ends in 13 days" in told[0][1]
    assert "ends in 10 days" in told[-1][1]
    assert f"secagg silo request a --consortium {CONSORTIUM} --renew --dir {place}" in told[0][1]
    assert f"secagg silo install a.bundle.json --dir {place}" in told[0][1]
    clock.date += DAY
    renew(authority, place)
    ask(channel)
    channel.close()
    assert caplog.records == []


def test_joining_warns_at_once(
    federation: Federation, authority_of_all: Authority, caplog: pytest.LogCaptureFixture
) -> None:
    name, place = federation.create(make_sum(rounds=1)), federation.silo("a")
    with caplog.at_level(logging.WARNING, "client_sdk"):
        client_sdk.join(name, profile=place).close()
        assert caplog.records == []
        renew(authority_of_all, place, days=9)
        with client_sdk.join(name, profile=place) as session:
            session._past.sync()
    (record,) = caplog.records
    assert (record.name, record.levelno) == ("client_sdk", logging.WARNING)
    assert "secagg://hospitals/silo/a ends in 8 days" in record.getMessage()


def test_the_doctor_tells_how_long_the_certificate_is_good_for(
    authority: Authority, place: Path
) -> None:
    def look() -> str:
        found = CliRunner().invoke(doctor, ["--profile", str(place)], catch_exceptions=False)
        assert found.exit_code == 0
        return found.output

    assert "certificate good for 29 days" in look()
    assert "!!" not in look()
    renew(authority, place, days=5)
    assert "certificate good for 4 days" in look()
    assert "!!  The certificate of secagg://hospitals/silo/a ends in 4 days" in look()
    assert "--renew" in look()


# A federation at a real coordinator.


@pytest.fixture
def authority_of_all(consortium: Consortium) -> Authority:
    return consortium.authority


def contents(*roots: Path) -> dict[Path, bytes]:
    """All files but those of running sessions."""
    return {
        path: path.read_bytes()
        for root in roots
        for path in root.rglob("*")
        if path.is_file() and "state" not in path.parts
    }


def expected_sum(session: Session) -> np.ndarray[Any, Any]:
    return np.full(3, sum(range(1, 1 + len(SILOS))))


def one_round(session: Session) -> None:
    total = session.sum({"x": np.full(3, float(rank(session)))})
    np.testing.assert_allclose(total["x"], expected_sum(session), atol=1e-6)


def test_a_renewal_in_a_running_session_is_the_silo_s_own_affair(
    federation: Federation, authority_of_all: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Silo b renews between two rounds: nobody else's file changes, nobody joins again."""
    consortium = federation.consortium
    name = federation.create(make_sum(rounds=2))
    places = {silo: federation.silo(silo) for silo in SILOS}
    others = (*(places[s] for s in SILOS if s != "b"), consortium.root / "coordinator")
    between = threading.Barrier(len(SILOS), timeout=60)
    log_length = len(consortium.coordinator.log.read_bytes())
    made: list[Session] = []
    real = Session.__init__

    def counted(self: Session, *args: Any) -> None:
        made.append(self)
        real(self, *args)

    monkeypatch.setattr(Session, "__init__", counted)
    lines: dict[str, list[Any]] = {}

    def plain(session: Session) -> None:
        lines[session.silo] = [session._channel._line]
        one_round(session)
        between.wait()  # b renews
        between.wait()
        one_round(session)
        lines[session.silo].append(session._channel._line)

    def renewing(session: Session) -> None:
        lines["b"] = [session._channel._line]
        old = session._channel._credentials
        one_round(session)
        between.wait()
        before, manifest = contents(*others), authority_of_all.signed_manifest
        renew(authority_of_all, places["b"], "b")
        assert contents(*others) == before
        assert authority_of_all.signed_manifest == manifest
        between.wait()
        one_round(session)
        assert contents(*others) == before
        assert session._channel._credentials.not_after > old.not_after
        assert session._channel._credentials.manifest == manifest
        lines["b"].append(session._channel._line)

    federation.play(name, plain, b=renewing)
    assert len(made) == len(SILOS)
    rebuilt = {silo: first is not last for silo, (first, last) in lines.items()}
    assert rebuilt == {"a": False, "b": True, "c": False, "d": False}
    log = consortium.coordinator.log.read_bytes()[log_length:]
    assert b"manifest-loaded" not in log
    assert b"certificate-reloaded" not in log


def test_a_session_outlives_its_certificate(
    federation: Federation, authority_of_all: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Silo b's certificate ends between two rounds; it is told so at once and goes on renewed."""
    name, clock = federation.create(make_sum(rounds=2)), Clock()
    place = federation.silo("b")
    renew(authority_of_all, place, "b", days=30)

    def dial(profile: Any) -> Channel:
        is_b = profile.credentials.identity.name == "b"
        return Channel(profile, now=clock.now if is_b else utc_now)

    monkeypatch.setattr("client_sdk.session.Channel", dial)

    def twice(session: Session) -> None:
        one_round(session)
        one_round(session)

    def expiring(session: Session) -> None:
        one_round(session)
        clock.date += 31 * DAY
        begin = time.monotonic()
        for _ in range(2):
            with refused(CredentialError, "certificate-expired"):
                one_round(session)
        assert time.monotonic() - begin < 10
        renew(authority_of_all, place, "b")
        one_round(session)

    federation.play(name, twice, b=expiring)


def test_the_coordinator_s_clock_counts_too(
    federation: Federation, authority_of_all: Authority
) -> None:
    """A certificate that really ends, over a connection that is open; then a renewed one."""
    name, place = federation.create(make_sum(rounds=1)), federation.silo("b")
    seconds = timedelta(seconds=8)
    then = datetime.now(UTC) - DAY + seconds
    request = renewal_request(place, Role.SILO, "b", authority_of_all.consortium)
    bundle = authority_of_all.approve(request, now=then, days=1)
    install_bundle(place, bundle, fingerprint=None, now=datetime.now(UTC))
    with client_sdk.join(name, profile=place) as session:
        late = datetime.now(UTC)
        session._channel._now = lambda: late  # this silo's own clock stands still

        def refusal() -> SecaggError | None:
            try:
                session._past.sync()
            except SecaggError as error:
                return error
            return None

        found = bounded("refusal", refusal)
        assert (type(found), found.code) == (CredentialError, "identity-expired")
        session._channel._now = utc_now
        with refused(CredentialError, "certificate-expired"):
            session._past.sync()
        renew(authority_of_all, place, "b")
        session._past.sync()


def test_a_revoked_silo_is_out_with_its_next_call(tmp_path: Path) -> None:
    own = Consortium(tmp_path / "consortium")
    try:
        federation = Federation(own, tmp_path)
        name = federation.create(make_sum(rounds=1))
        sessions = {s: client_sdk.join(name, profile=federation.silo(s)) for s in SILOS}
        own.authority.revoke(Role.SILO, "d", now=datetime.now(UTC))
        own.install_manifest("coordinator")
        begin = time.monotonic()
        with refused(CredentialError, "identity-revoked"):
            sessions["d"]._past.sync()
        assert time.monotonic() - begin < 10
        for silo in "abc":
            sessions[silo]._past.sync()
        for session in sessions.values():
            session.close()
    finally:
        own.close()
