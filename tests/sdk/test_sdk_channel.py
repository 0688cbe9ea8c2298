"""Dialling: what is checked before, what is given up at once, what is tried again."""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import numpy as np
import pytest

import client_sdk
from client_sdk import channel as module
from client_sdk.channel import Channel, ChannelClosed, CoordinatorRefused, CoordinatorUnreachable
from client_sdk.keys import Keeper
from client_sdk.profile import Profile
from client_sdk.session import Session
from client_sdk.transfer import upload
from secagg.errors import CredentialError, FaultyServer, NotFound, TooLate
from secagg.pki.authority import Authority
from secagg.pki.names import Role
from secagg.wire._pb import service_pb2 as api
from secagg.wire.chunks import PutChunkRequest

from .federation import CONSORTIUM, Consortium, Federation, enrol, make_sum, refused, settle


class Fault(grpc.RpcError):
    """What grpc raises."""

    def __init__(
        self,
        code: grpc.StatusCode,
        details: str | None = "",
        secagg_code: str | None = None,
        retry_after: str | None = None,
    ) -> None:
        self._code, self._details, self._secagg = code, details, secagg_code
        self._retry_after = retry_after

    def code(self) -> grpc.StatusCode:
        return self._code

    def details(self) -> str | None:
        return self._details

    def trailing_metadata(self) -> Any:
        told = {"secagg-code": self._secagg, "secagg-retry-after-ms": self._retry_after}
        entries = {key: value for key, value in told.items() if value is not None}
        if not entries:
            return None
        entries = {"other": "x", **entries}
        return [SimpleNamespace(key=key, value=value) for key, value in entries.items()]


@contextmanager
def listener() -> Iterator[socket.socket]:
    """A port that nobody may dial."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        yield server
        with pytest.raises(BlockingIOError):
            server.accept()


def address(server: socket.socket) -> str:
    return f"127.0.0.1:{server.getsockname()[1]}"


@pytest.mark.parametrize(
    ("code", "begins", "days"),
    [("certificate-expired", -20, 1), ("certificate-not-yet-valid", 5, 30)],
)
def test_a_certificate_out_of_its_time_is_named_before_dialling(
    consortium: Consortium, tmp_path: Path, code: str, begins: int, days: int
) -> None:
    authority = Authority.create(
        tmp_path / "authority", CONSORTIUM, now=datetime.now(UTC) - timedelta(days=30)
    )
    now = datetime.now(UTC) + timedelta(days=begins)
    enrol(authority, tmp_path / "coordinator", "coordinator", Role.COORDINATOR)
    place = enrol(authority, tmp_path / "a", "a", now=now, days=days)
    with listener() as server:
        settle(place, address(server))
        with refused(CredentialError, code) as caught:
            client_sdk.join("study", profile=place)
        assert "clock" in str(caught.value) or "Renew" in str(caught.value)


def test_a_certificate_that_ends_while_its_profile_is_held(federation: Federation) -> None:
    """The channel looks again: a profile may have been loaded long ago."""
    loaded = client_sdk.load_profile(federation.silo("a"))
    past = datetime.now(UTC) - timedelta(seconds=1)
    with listener() as server:
        old = replace(
            loaded,
            coordinator=address(server),
            credentials=replace(loaded.credentials, not_after=past),
        )
        with refused(CredentialError, "certificate-expired"):
            client_sdk.join("study", profile=old)


def test_a_chain_that_is_not_the_authoritys_is_named_before_dialling(
    federation: Federation, tmp_path: Path
) -> None:
    other = Authority.create(tmp_path / "authority", CONSORTIUM, now=datetime.now(UTC))
    place = federation.silo("a")
    (place / "authority.pem").write_bytes(other.certificate_pem)
    with listener() as server:
        (place / "profile.toml").unlink()
        settle(place, address(server))
        with refused(CredentialError, "certificate-chain"):
            client_sdk.join("study", profile=place)


def test_an_unreachable_coordinator_is_given_up(
    federation: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CONNECT_SECONDS", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as server:
        closed = address(server)
    place = federation.silo("a")
    (place / "profile.toml").unlink()
    settle(place, closed)
    start = time.monotonic()
    with refused(CoordinatorUnreachable, "coordinator-unreachable") as caught:
        client_sdk.join("study", profile=place)
    assert time.monotonic() - start < 10
    assert closed in str(caught.value)


@contextmanager
def impostor(
    key: bytes, certificate: bytes, roots: bytes, *handlers: grpc.GenericRpcHandler
) -> Iterator[str]:
    """A server with somebody else's certificate."""
    server = grpc.server(ThreadPoolExecutor(1), handlers=handlers)
    credentials = grpc.ssl_server_credentials(
        [(key, certificate)], root_certificates=roots, require_client_auth=True
    )
    port = server.add_secure_port("127.0.0.1:0", credentials)
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.stop(0).wait()


def keys(place: Path) -> tuple[bytes, bytes]:
    return (place / "tls.key").read_bytes(), (place / "certificate.pem").read_bytes()


@pytest.mark.parametrize("who", ["silo", "admin", "other-authority", "other-consortium"])
def test_an_impostor_is_reported_at_once(
    consortium: Consortium,
    federation: Federation,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    who: str,
) -> None:
    """Not retried: one attempt, no waiting for ``CONNECT_SECONDS``."""
    monkeypatch.setattr(module, "CONNECT_SECONDS", 600.0)
    roots = consortium.authority.certificate_pem
    if who in ("silo", "admin"):
        place = consortium.root / ("b" if who == "silo" else "admin")
    else:
        name = CONSORTIUM if who == "other-authority" else "elsewhere"
        other = Authority.create(tmp_path / "authority", name, now=datetime.now(UTC))
        place = enrol(other, tmp_path / "other", "coordinator", Role.COORDINATOR)
    tries: list[str] = []
    real = Channel._stub

    def stub(self: Channel, method: str) -> Any:
        tries.append(method)
        return real(self, method)

    monkeypatch.setattr(Channel, "_stub", stub)
    with impostor(*keys(place), roots) as where:
        silo = federation.silo("a")
        (silo / "profile.toml").unlink()
        settle(silo, where)
        start = time.monotonic()
        with refused(CredentialError, "coordinator-certificate"):
            client_sdk.join("study", profile=silo)
        assert time.monotonic() - start < 10
    assert tries == ["JoinSession"]


def test_a_silo_of_another_authority_is_told_what_may_be_wrong(
    consortium: Consortium, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It cannot verify the coordinator either, and that is what it reports."""
    monkeypatch.setattr(module, "CONNECT_SECONDS", 5.0)
    other = Authority.create(tmp_path / "authority", CONSORTIUM, now=datetime.now(UTC))
    enrol(other, tmp_path / "coordinator", "coordinator", Role.COORDINATOR)
    place = settle(enrol(other, tmp_path / "a", "a"), consortium.coordinator.address)
    with refused(CredentialError, "coordinator-certificate"):
        client_sdk.join("study", profile=place)


@pytest.fixture
def flaky(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Fault]]:
    """Faults that the next calls meet, first to last."""
    faults: list[Fault] = []
    real = Channel._stub

    class Stub:
        def __init__(self, stub: Any) -> None:
            self._stub = stub

        def __call__(self, request: Any, timeout: float) -> Any:
            if faults:
                raise faults.pop(0)
            return self._stub(request, timeout=timeout)

        def future(self, request: Any, timeout: float) -> Any:
            if faults:
                return Failed(faults.pop(0))
            return self._stub.future(request, timeout=timeout)

    class Failed:
        def __init__(self, fault: Fault) -> None:
            self._fault = fault

        def result(self) -> Any:
            raise self._fault

        def cancel(self) -> None:
            return

    monkeypatch.setattr(Channel, "_stub", lambda self, method: Stub(real(self, method)))
    yield faults
    assert not faults


UNAVAILABLE, DEADLINE = grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED


@pytest.fixture
def session(federation: Federation) -> Iterator[Session]:
    name = federation.create(make_sum(rounds=1))
    with client_sdk.join(name, profile=federation.silo("a")) as joined:
        yield joined


def test_transient_faults_are_retried(federation: Federation, flaky: list[Fault]) -> None:
    name = federation.create(make_sum(rounds=1))
    flaky += [Fault(UNAVAILABLE, "connection reset"), Fault(DEADLINE, None)]
    client_sdk.join(name, profile=federation.silo("a")).close()


def test_a_busy_coordinator_is_asked_again(session: Session, flaky: list[Fault]) -> None:
    flaky += [Fault(grpc.StatusCode.RESOURCE_EXHAUSTED, "Concurrent RPC limit exceeded!")]
    session._past.sync()


def test_a_call_that_a_flooded_coordinator_drops_is_made_again(
    session: Session, flaky: list[Fault]
) -> None:
    flaky += [Fault(grpc.StatusCode.CANCELLED, "CANCELLED")]
    session._past.sync()


def quota(retry_after: str | None = "5", code: str = "quota-calls") -> Fault:
    return Fault(grpc.StatusCode.RESOURCE_EXHAUSTED, "too often", code, retry_after)


def test_a_quota_that_time_heals_is_waited_out(session: Session, flaky: list[Fault]) -> None:
    flaky += [quota(), quota("1", "quota-spool"), quota("soon")]
    session._past.sync()
    assert not flaky


def test_a_quota_is_not_waited_for_without_end(
    session: Session, flaky: list[Fault], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "RETRY_SECONDS", 0.0)
    flaky.append(quota())
    with refused(CoordinatorRefused, "quota-calls"):
        session._past.sync()


LIMIT = "Concurrent RPC limit exceeded!"
BUSY = {
    "quota": quota("5"),
    "a pause and no code": Fault(grpc.StatusCode.RESOURCE_EXHAUSTED, "", None, "5"),
    "grpc's limit": Fault(grpc.StatusCode.RESOURCE_EXHAUSTED, LIMIT),
    "storage": Fault(UNAVAILABLE, "", "storage-busy"),
}


@pytest.mark.parametrize("fault", BUSY.values(), ids=BUSY)
def test_a_coordinator_that_is_busy_at_first_is_there(
    federation: Federation, flaky: list[Fault], monkeypatch: pytest.MonkeyPatch, fault: Fault
) -> None:
    """What it says itself proves that it was reached, however long the pause that it asks for."""
    monkeypatch.setattr(module, "CONNECT_SECONDS", 0.0)
    name = federation.create(make_sum(rounds=1))
    flaky += [fault] * 2
    client_sdk.join(name, profile=federation.silo("a")).close()


@pytest.mark.parametrize(
    "fault", [Fault(UNAVAILABLE, LIMIT), Fault(grpc.StatusCode.CANCELLED, "CANCELLED")]
)
def test_a_fault_on_the_way_is_no_word_of_the_coordinators(
    federation: Federation, flaky: list[Fault], monkeypatch: pytest.MonkeyPatch, fault: Fault
) -> None:
    monkeypatch.setattr(module, "CONNECT_SECONDS", 0.0)
    flaky.append(fault)
    with refused(CoordinatorUnreachable, "coordinator-unreachable"):
        client_sdk.join("study", profile=federation.silo("a"))


@pytest.mark.parametrize(
    ("told", "least"), [("1500", 1.5), ("0", 0), ("999999999", 30), ("-1", 0), ("1e9", 0), ("", 0)]
)
def test_the_pause_that_a_quota_asks_for(told: str, least: float) -> None:
    """Not shorter, and never so long that a coordinator could put a silo to sleep."""
    outcome = SimpleNamespace(exception=lambda: quota(told))
    state: Any = SimpleNamespace(outcome=outcome, attempt_number=1)
    assert least <= module._pause(state) <= least + 5


def test_chunks_in_flight_are_waited_for_before_they_are_sent_again(
    session: Session, flaky: list[Fault], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A refusal in flight is the first attempt: the next one comes after its pause."""
    pauses: list[int] = []

    def pause(state: Any) -> float:
        pauses.append(len(flaky))
        return 0.0

    monkeypatch.setattr(module, "_pause", pause)
    flaky += [quota()] * 3
    request = api.ListResultsRequest(session_id=session._membership.member.session_id)
    replies = session._channel.each("ListResults", [request] * 2, api.ListResultsReply)
    assert len(list(replies)) == 2
    assert pauses == [1, 0, 0]
    flaky.append(Fault(grpc.StatusCode.INVALID_ARGUMENT, "", "chunk-length"))
    with refused(CoordinatorRefused, "chunk-length"):
        list(session._channel.each("ListResults", [request], api.ListResultsReply))
    assert len(pauses) == 3


@pytest.mark.parametrize(
    ("limits", "code"),
    [
        ("calls_per_second = 15\ncalls_burst = 1", b"quota-calls"),
        ("bytes_per_second = 10000\nbytes_burst = 1000", b"quota-bytes"),
    ],
)
def test_a_throttled_round_is_exact(tmp_path: Path, limits: str, code: bytes) -> None:
    own = Consortium(tmp_path / "consortium", limits=limits)
    try:
        federation = Federation(own, tmp_path)
        name = federation.create(make_sum(rounds=1), chunk_bytes=1024)
        found = federation.play(name, lambda s: s.sum({"x": np.linspace(0, 1, 400)}))
        for total in found.values():
            np.testing.assert_allclose(total["x"], 4 * np.linspace(0, 1, 400), atol=1e-9)
        assert code in own.coordinator.log.read_bytes()
    finally:
        own.close()


def test_faults_in_every_call_of_a_round(
    federation: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each message of a silo is lost once on its way back: it is sent again, the same bytes."""
    name = federation.create(make_sum(rounds=1), chunk_bytes=1024)
    real = Channel._stub
    seen: set[tuple[int, str, bytes]] = set()

    def stub(self: Channel, method: str) -> Any:
        inner = real(self, method)

        def lossy(request: Any, timeout: float) -> Any:
            reply = inner(request, timeout=timeout)
            key = (id(self), method, request.SerializeToString())
            if method != "Leave" and key not in seen:
                seen.add(key)
                raise Fault(UNAVAILABLE, "lost on its way back")
            return reply

        lossy.future = lambda request, timeout: SimpleNamespace(  # type: ignore[attr-defined]
            result=lambda: lossy(request, timeout), cancel=lambda: None
        )
        return lossy

    monkeypatch.setattr(Channel, "_stub", stub)
    found = federation.play(name, lambda s: s.sum({"x": np.linspace(0, 1, 400)}))
    for total in found.values():
        np.testing.assert_allclose(total["x"], 4 * np.linspace(0, 1, 400), atol=1e-9)


REFUSALS: list[tuple[type[Any], str, Fault]] = [
    (CoordinatorRefused, "invalid_argument", Fault(grpc.StatusCode.INVALID_ARGUMENT)),
    (CoordinatorRefused, "internal", Fault(grpc.StatusCode.INTERNAL, None)),
    (CoordinatorRefused, "resource_exhausted", Fault(grpc.StatusCode.RESOURCE_EXHAUSTED, "quota")),
    (
        CoordinatorRefused,
        "quota-uploads",
        Fault(grpc.StatusCode.RESOURCE_EXHAUSTED, "no", "quota-uploads"),
    ),
    (
        CoordinatorRefused,
        "message-conflict",
        Fault(grpc.StatusCode.ALREADY_EXISTS, "", "message-conflict"),
    ),
    (NotFound, "session-unknown", Fault(grpc.StatusCode.NOT_FOUND, "no", "session-unknown")),
    (
        CredentialError,
        "session-member",
        Fault(grpc.StatusCode.PERMISSION_DENIED, "no", "session-member"),
    ),
    (CredentialError, "unauthenticated", Fault(grpc.StatusCode.UNAUTHENTICATED)),
    (TooLate, "phase-closed", Fault(grpc.StatusCode.FAILED_PRECONDITION, "", "phase-closed")),
]


@pytest.mark.parametrize(("kind", "code", "fault"), REFUSALS, ids=[code for _, code, _ in REFUSALS])
def test_refusals_are_not_retried(
    session: Session, flaky: list[Fault], kind: type[Any], code: str, fault: Fault
) -> None:
    flaky.append(fault)
    with refused(kind, code):
        session._past.sync()


def test_a_coordinator_that_goes_away_for_good(
    session: Session, flaky: list[Fault], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "RETRY_SECONDS", 0.0)
    flaky.append(Fault(UNAVAILABLE, "gone"))
    with refused(CoordinatorUnreachable, "coordinator-unreachable"):
        session._past.sync()


def test_leaving_a_coordinator_that_is_gone(session: Session, flaky: list[Fault]) -> None:
    flaky.append(Fault(UNAVAILABLE, "gone"))
    session.close()


# A channel that is closed.


REQUEST = api.ListResultsRequest()


def by_call(channel: Channel) -> None:
    channel.call("ListResults", REQUEST, api.ListResultsReply)


def by_each(channel: Channel) -> None:
    list(channel.each("ListResults", [REQUEST] * 2, api.ListResultsReply))


WAYS = pytest.mark.parametrize("ask", [by_call, by_each])


@WAYS
def test_no_call_over_a_closed_channel(
    session: Session, monkeypatch: pytest.MonkeyPatch, ask: Callable[[Channel], None]
) -> None:
    """gRPC is not even asked."""
    tries: list[str] = []
    session._channel.close()
    monkeypatch.setattr(Channel, "_stub", lambda self, method: tries.append(method))
    with refused(ChannelClosed, "channel-closed"):
        ask(session._channel)
    assert tries == []


@WAYS
def test_a_channel_that_is_closed_as_a_call_begins(
    session: Session, monkeypatch: pytest.MonkeyPatch, ask: Callable[[Channel], None]
) -> None:
    pick_up = Channel._pick_up

    def closing(self: Channel, method: str) -> Any:
        found = pick_up(self, method)
        self.close()
        return found

    monkeypatch.setattr(Channel, "_pick_up", closing)
    with refused(ChannelClosed, "channel-closed"):
        ask(session._channel)


@WAYS
def test_a_call_in_flight_ends_with_its_channel(
    session: Session, monkeypatch: pytest.MonkeyPatch, ask: Callable[[Channel], None]
) -> None:
    """It is not made again, and neither is it the coordinator's refusal."""
    tries: list[str] = []

    def stub(self: Channel, method: str) -> Any:
        def cancelled(request: Any = None, timeout: float = 0.0) -> Any:
            tries.append(method)
            self.close()
            raise Fault(grpc.StatusCode.CANCELLED, "Channel closed!")

        cancelled.future = lambda *_, **__: SimpleNamespace(  # type: ignore[attr-defined]
            result=cancelled, cancel=lambda: None
        )
        return cancelled

    monkeypatch.setattr(Channel, "_stub", stub)
    with refused(ChannelClosed, "channel-closed"):
        ask(session._channel)
    assert tries == ["ListResults"]


def test_another_value_error_is_left_as_it_is(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stub(*_: Any, **__: Any) -> Any:
        raise ValueError("not of a closed channel")

    with monkeypatch.context() as patch:
        patch.setattr(Channel, "_stub", lambda *_: stub)
        with pytest.raises(ValueError, match="not of a closed channel"):
            by_call(session._channel)


def test_leaving_over_a_closed_channel(session: Session) -> None:
    session._channel.close()
    session.close()


@pytest.fixture
def pausing(monkeypatch: pytest.MonkeyPatch, flaky: list[Fault]) -> threading.Event:
    """Set once a call has a pause of a minute before it."""
    reached = threading.Event()

    def pause(state: Any) -> float:
        reached.set()
        return 60.0

    monkeypatch.setattr(module, "_pause", pause)
    flaky.append(quota())
    return reached


def test_closing_ends_a_pause(session: Session, pausing: threading.Event) -> None:
    with ThreadPoolExecutor(1) as pool:
        asleep = pool.submit(by_call, session._channel)
        assert pausing.wait(30)
        session.close()
        with refused(ChannelClosed, "channel-closed"):
            asleep.result(30)


@pytest.mark.parametrize("told", [True, False], ids=["told", "untold"])
def test_a_keeper_that_pauses_ends_with_its_channel(
    session: Session, pausing: threading.Event, caplog: pytest.LogCaptureFixture, told: bool
) -> None:
    """Before whoever closes the session gives up the lock of the silo's state; quietly."""
    keys: Any = SimpleNamespace(
        arrived=threading.Event(), serve=lambda answered: by_call(session._channel)
    )
    with caplog.at_level(logging.WARNING, "client_sdk"):
        keeper = Keeper(keys, lambda *_: False)
        assert pausing.wait(30)
        if told:
            keeper.close()
        session._channel.close()
        keeper._thread.join(30)
    assert not keeper._thread.is_alive()
    assert not keys.kept
    assert caplog.text == ""


# Connections.


class Peers(grpc.GenericRpcHandler):
    """Answers anything, and notes from which port it was asked."""

    def __init__(self) -> None:
        self.ports: list[str] = []

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[Any, Any]:
        return grpc.unary_unary_rpc_method_handler(self._serve)

    def _serve(self, data: bytes, context: grpc.ServicerContext) -> bytes:
        self.ports.append(context.peer())
        return b""


@pytest.fixture
def peers() -> Peers:
    return Peers()


@pytest.fixture
def profile(tmp_path: Path, peers: Peers) -> Iterator[Profile]:
    """A silo's, with ``peers`` for its coordinator."""
    authority = Authority.create(tmp_path / "authority", CONSORTIUM, now=datetime.now(UTC))
    hub = enrol(authority, tmp_path / "hub", "hub", Role.COORDINATOR)
    with impostor(*keys(hub), authority.certificate_pem, peers) as where:
        yield client_sdk.load_profile(settle(enrol(authority, tmp_path / "a", "a"), where))


def test_each_session_has_a_connection_of_its_own(profile: Profile, peers: Peers) -> None:
    """The streams of a connection are limited, and a silo's calls are long."""
    with closing(Channel(profile)) as one, closing(Channel(profile)) as other:
        for channel in (one, other, one):
            by_call(channel)
    first, second, third = peers.ports
    assert first == third != second


def test_an_idle_connection_is_hung_up_and_dialled_again(
    profile: Profile, peers: Peers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_IDLE_MS", 100)
    idle, states = threading.Event(), []

    def watch(state: grpc.ChannelConnectivity) -> None:
        states.append(state)
        if state is grpc.ChannelConnectivity.IDLE and grpc.ChannelConnectivity.READY in states:
            idle.set()

    with closing(Channel(profile)) as channel:
        channel._line.channel.subscribe(watch)
        by_call(channel)
        assert idle.wait(30)
        channel._line.channel.unsubscribe(watch)
        by_call(channel)
    first, second = peers.ports
    assert first != second


def test_a_reply_of_another_kind(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Channel, "_stub", lambda *_: lambda *_, **__: api.Ack())
    with refused(FaultyServer, "reply-type"):
        session._channel.call("ListResults", api.ListResultsRequest(), api.ListResultsReply)


def test_replies_come_in_the_order_of_their_requests(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More requests than may be in flight, and faults that are tried again among them."""
    channel = session._channel
    answered = 0
    pick_up = Channel._pick_up

    def answering(self: Channel, method: str) -> Any:
        line, _ = pick_up(self, method)

        def future(request: Any, timeout: float) -> Any:
            def result() -> api.GetChunkReply:
                nonlocal answered
                answered += 1
                if answered % 3 == 0:
                    raise Fault(grpc.StatusCode.UNAVAILABLE)
                return answer(request, timeout)

            return SimpleNamespace(result=result, cancel=lambda: None)

        def answer(request: Any, timeout: float) -> api.GetChunkReply:
            return api.GetChunkReply(data=str(request.offset).encode())

        answer.future = future  # type: ignore[attr-defined]
        return line, answer

    with monkeypatch.context() as patch:
        patch.setattr(Channel, "_pick_up", answering)
        requests = (api.GetChunkRequest(offset=at) for at in range(20))
        replies = channel.each("GetChunk", requests, api.GetChunkReply)
        assert [int(reply.data) for reply in replies] == list(range(20))
        with pytest.raises(FaultyServer, match="another message"):
            list(channel.each("GetChunk", [api.GetChunkRequest()], api.Ack))
    assert not channel._line.calls


def test_who_stops_early_leaves_no_call(session: Session) -> None:
    channel = session._channel
    request = api.ListResultsRequest(session_id=session._membership.member.session_id)
    asked = 0

    def requests() -> Iterator[api.ListResultsRequest]:
        nonlocal asked
        for _ in range(50):
            asked += 1
            yield request

    replies = channel.each("ListResults", requests(), api.ListResultsReply)
    assert next(replies) == api.ListResultsReply()
    replies.close()
    assert asked == module.CALLS_IN_FLIGHT
    assert not channel._line.calls


def test_an_upload_covers_its_blob_once(session: Session) -> None:
    sent: list[PutChunkRequest] = []
    member = session._membership.member
    member = replace(member, session=replace(member.session, chunk_bytes=64))
    data = os.urandom(200)

    class Wire:
        def call_many(self, method: str, requests: Any, kind: Any) -> None:
            sent.extend(requests)

    upload(Wire(), member, api.Blob(weights="x"), memoryview(data))  # type: ignore[arg-type]
    assert [request.offset for request in sent] == [0, 64, 128, 192]
    assert b"".join(request.data for request in sent) == data
    assert {request.total for request in sent} == {200}
    assert all(request.data.obj is data for request in sent), "views, no copies"
