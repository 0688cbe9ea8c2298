"""What one member, one connection, and all together may take; and that others go on meanwhile."""

from __future__ import annotations

import queue
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import grpc
import h2.errors
import h2.events
import h2.settings
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from hypothesis import given
from hypothesis import strategies as st

from secagg.config import SiloId
from secagg.coordinator.limits import Limits
from secagg.coordinator.quotas import TELL_SECONDS, Bucket, Quotas, TryLater
from secagg.coordinator.records import created, parse
from secagg.coordinator.session import Session
from secagg.coordinator.sessions import Sessions
from secagg.coordinator.spool import Holding, Upload, check_room
from secagg.coordinator.status import RETRY_KEY
from secagg.errors import ConfigError, QuotaExceeded, SecaggError
from secagg.pki.names import Identity, Role
from secagg.wire import session as wire_session
from secagg.wire._pb import journal_pb2 as pb
from secagg.wire._pb import service_pb2 as api

from .play import CHUNK, CONSORTIUM, LENGTH, TASK, World
from .raw import Connection, frame, path
from .serving import Consortium, Server, Study, code_of, refused, serving

Status = grpc.StatusCode
A, B = SiloId("a"), SiloId("b")
WEIGHTS = 1000
HIGHEST = ssl.TLSVersion.TLSv1_3

# A member's quotas.


def member(name: str = "a", role: Role = Role.SILO) -> Identity:
    return Identity(CONSORTIUM, role, name)


def refusal(code: str, work: Callable[[], Any]) -> SecaggError:
    with pytest.raises(QuotaExceeded) as caught:
        work()
    assert caught.value.code == code
    return caught.value


def wait(code: str, work: Callable[[], Any]) -> float:
    """Seconds that a refusal asks for."""
    error = refusal(code, work)
    assert isinstance(error, TryLater)
    assert error.seconds <= error.milliseconds / 1000 < error.seconds + 0.0011
    return error.seconds


pauses = st.lists(st.floats(0, 3), max_size=60)


@given(pauses, st.floats(0.1, 50), st.integers(1, 20))
def test_no_more_calls_than_the_rate_and_one_burst(
    waits: list[float], rate: float, burst: int
) -> None:
    quotas = Quotas(Limits(calls_per_second=rate, calls_burst=burst, calls_at_once=10**6))
    now, served = 5.0, 0
    for pause in waits:
        now += pause
        try:
            quotas.enter(member(), now)
        except TryLater as error:  # who waits for as long as it is told gets in
            now += error.seconds * (1 + 1e-9) + 1e-9
            quotas.enter(member(), now)
        served += 1
    assert served <= burst + rate * (now - 5.0) + 1e-3


@given(st.lists(st.tuples(st.floats(0, 3), st.integers(0, 500)), max_size=60), st.floats(1, 500))
def test_debt_passes_with_time_and_nothing_is_begun_before(
    steps: list[tuple[float, int]], rate: float
) -> None:
    bucket = Bucket(rate, 100.0, 100.0, 0.0)
    now = taken = 0.0
    for pause, size in steps:
        now += pause + bucket.lacking(0, now + pause)
        assert bucket.lacking(0, now + 1e-6) == pytest.approx(0, abs=1e-9)
        bucket.take(size)
        taken += size
    assert taken <= 100 + rate * now + 500 + 1e-3


def test_calls_in_flight() -> None:
    quotas = Quotas(Limits(calls_at_once=2))
    quotas.enter(member(), 0)
    quotas.enter(member(), 0)
    assert wait("quota-calls-at-once", lambda: quotas.enter(member(), 0)) == 0.5
    quotas.leave(member())
    quotas.enter(member(), 0)


def test_what_is_refused_is_not_taken_off() -> None:
    quotas = Quotas(Limits(calls_at_once=1, calls_burst=2, calls_per_second=1e-9))
    quotas.enter(member(), 0)
    for _ in range(5):
        refusal("quota-calls-at-once", lambda: quotas.enter(member(), 0))
    quotas.leave(member())
    quotas.enter(member(), 0)
    quotas.leave(member())
    assert wait("quota-calls", lambda: quotas.enter(member(), 0)) == pytest.approx(1e9)


def test_bytes_either_way() -> None:
    quotas = Quotas(Limits(bytes_per_second=10, bytes_burst=100))
    quotas.enter(member(), 0)
    quotas.charge(member(), 60)
    quotas.enter(member(), 0)
    quotas.charge(member(), 60)
    assert wait("quota-bytes", lambda: quotas.enter(member(), 0)) == 2
    assert wait("quota-bytes", lambda: quotas.enter(member(), 1)) == 1
    quotas.enter(member(), 2)


@pytest.mark.parametrize("other", [member("b"), member("a", Role.ADMIN)])
def test_a_member_pays_for_itself_alone(other: Identity) -> None:
    quotas = Quotas(Limits(calls_burst=1, calls_per_second=1e-9))
    quotas.enter(member(), 0)
    refusal("quota-calls", lambda: quotas.enter(member(), 0))
    quotas.enter(other, 0)


def test_the_log_is_told_of_many_refusals_once() -> None:
    quotas = Quotas(Limits())
    assert quotas.refusals(member(), 10) == 1
    assert [quotas.refusals(member(), 10) for _ in range(5)] == [0] * 5
    assert quotas.refusals(member("b"), 10) == 1
    assert quotas.refusals(member(), 10 + TELL_SECONDS) == 6


@pytest.mark.parametrize("name", [field.name for field in fields(Limits)])
def test_no_limit_is_zero(name: str) -> None:
    for value in (0, -1, float("nan"), float("inf")):
        with pytest.raises(ConfigError, match=name):
            replace(Limits(), **{name: value})


# Room on the disk.


def test_uploads_that_are_not_complete() -> None:
    limits = Limits(uploads_at_once=2)
    held = [Holding(A, 1, True), Holding(A, 1), Holding(B, 1, True), Holding(B, 1, True)]
    check_room(limits, held, A, 1)
    refusal("quota-uploads", lambda: check_room(limits, [*held, Holding(A, 1, True)], A, 1))


def test_room_of_one_silo_and_of_all() -> None:
    limits = Limits(spool_bytes_per_silo=100, max_spool_bytes=250)
    held = [Holding(A, 60), Holding(B, 100, True), Holding(None, 40)]
    check_room(limits, held, A, 40)
    assert not isinstance(
        refusal("quota-spool-silo", lambda: check_room(limits, held, A, 41)), TryLater
    )
    full = [*held, Holding(None, 11)]
    check_room(limits, full, A, 39)
    wait("quota-spool", lambda: check_room(limits, full, A, 40))


def held(sessions: Sessions) -> list[tuple[str | None, int, bool]]:
    found = [(h.silo, h.size, h.open) for h in sessions._holdings()]
    return sorted(found, key=str)


def all_of(world: World, **limits: int) -> Sessions:
    """The world's session among a coordinator's, as they are after a start."""
    world.means = replace(world.means, limits=replace(world.means.limits, **limits))
    sessions = Sessions(world.means)
    sessions.restore(world.now)
    world.session = world.port.session = sessions.all()[0]
    return sessions


def test_what_a_session_holds_through_a_round(world: World) -> None:
    sessions, size = all_of(world), 4 * LENGTH
    assert world.session.open_task(A, TASK, world.now) is True
    world.session.weights_upload(A, TASK, 200, world.now)
    assert held(sessions) == [("a", 200, True)]
    world.session.weights_upload(A, TASK, 100, world.now).put(0, bytes(CHUNK))
    world.session.weights_upload(A, TASK, 300, world.now)  # beside the one that has begun
    assert held(sessions) == [("a", 400, True)]
    world.session.propose_task(A, world.signed("a"))
    assert held(sessions) == []
    world.start()
    world.phases(2)
    for name, player in world.players.items():
        player.step(send=False)
        if name in "ab":
            player.put()
    assert held(sessions) == [("a", size, True), ("b", size, True)]
    world.session.send(world.players["b"].sent[-1], 1, 1)
    assert held(sessions) == [("a", size, True), ("b", size, False)]
    assert held(all_of(world)) == [("b", size, False)]  # what was never committed is gone
    for name in "acd":
        world.players[name].put()
        world.session.send(world.players[name].sent[-1], 1, 1)
    world.tick()
    world.phases(2)
    assert held(all_of(world)) == [(None, size, False)]


def test_a_vector_needs_room(world: World) -> None:
    size = 4 * LENGTH
    all_of(world, spool_bytes_per_silo=size, max_spool_bytes=3 * size)
    world.start()
    world.phases(2)
    for name in "abc":
        world.session.vector_upload(SiloId(name), 1, 1, size)
    again = world.session.vector_upload(A, 1, 1, size)  # the same one: no new room
    assert again is world.session.vector_upload(A, 1, 1, size)
    wait("quota-spool", lambda: world.session.vector_upload(SiloId("d"), 1, 1, size))
    all_of(world, spool_bytes_per_silo=size - 1)
    refusal("quota-spool-silo", lambda: world.session.vector_upload(A, 1, 1, size))


def test_uploads_count_in_all_sessions(world: World) -> None:
    sessions = all_of(world, uploads_at_once=1)
    message = wire_session.config_to_wire(world.config)
    message.name = "another"
    other = sessions.create(message)
    for session in (world.session, other):
        assert session.open_task(A, TASK, world.now) is True
    world.session.weights_upload(A, TASK, 10, world.now)
    refusal("quota-uploads", lambda: other.weights_upload(A, TASK, 10, world.now))
    world.session.abort()
    other.weights_upload(A, TASK, 10, world.now)


def test_an_upload_that_is_begun_anew_drags_no_chain_along(world: World) -> None:
    """A silo that names another size with each call would make the coordinator remember all."""
    assert world.session.open_task(A, TASK, world.now) is True
    first = world.session.weights_upload(A, TASK, 500, world.now)
    first.put(0, bytes(CHUNK))
    for size in range(1, 400):
        upload = world.session.weights_upload(A, TASK, size, world.now)
    assert upload._instead is first
    assert upload.held == 399 + 500
    upload.discard()
    assert not world.path(first.name).exists()


def test_an_upload_that_never_began_is_not_remembered(world: World) -> None:
    disk = world.means.disk
    first = Upload(disk, "one", 100, CHUNK)
    assert Upload(disk, "one", 50, CHUNK, first)._instead is None


# Sessions.


def test_sessions_of_one_admin(world: World) -> None:
    sessions = all_of(world, sessions_per_admin=2)
    message = wire_session.config_to_wire(world.config)

    def create(name: str, admin: str) -> Session:
        message.name = name
        return sessions.create(message, name.encode() * 16, admin)

    create("one", "boss")
    two = create("two", "boss")
    refusal("quota-sessions", lambda: create("three", "boss"))
    assert create("two", "boss") is two  # the same call again
    create("three", "chief")
    again = all_of(world)
    assert [session.creator for session in again.all()] == ["", "boss", "boss", "chief"]
    message.name = "four"
    refusal("quota-sessions", lambda: again.create(message, b"", "boss"))
    again.by_name("one").abort()
    again.create(message, b"", "boss")


def test_a_journal_from_before_creators_were_noted(world: World) -> None:
    """Its first record has no such field, and is written the same way today."""
    (first, *_) = world.journal.load()[world.session_id]
    assert parse(first).created.creator == ""
    old = pb.Record(
        created=pb.Created(
            session_id=world.session_id, config=wire_session.config_to_wire(world.config)
        )
    )
    assert first == old.SerializeToString(deterministic=True)
    assert created(world.session_id, world.config, b"", "boss") != old
    sessions = all_of(world, sessions_per_admin=1)
    message = wire_session.config_to_wire(world.config)
    message.name = "another"
    sessions.create(message, b"", "boss")  # the old one is nobody's


# Over the wire: a member that asks for too much, and one that does not.


@pytest.fixture(scope="module")
def consortium(tmp_path_factory: pytest.TempPathFactory) -> Consortium:
    return Consortium(tmp_path_factory.mktemp("pki"))


@pytest.fixture(scope="module")
def mean(consortium: Consortium, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with so low quotas that each silo can use up one without waiting."""
    with serving(
        consortium,
        tmp_path_factory.mktemp("mean"),
        calls_per_second=0.001,
        calls_burst=150,
        bytes_per_second=1,
        bytes_burst=1_000_000,
        calls_at_once=6,
        sessions_per_admin=9,
        spool_bytes_per_silo=WEIGHTS + 500,
        max_spool_bytes=2 * WEIGHTS + 500,
        uploads_at_once=3,
    ) as running:
        yield running


def retry_after(error: grpc.RpcError) -> int | None:
    found = [entry.value for entry in error.trailing_metadata() or () if entry.key == RETRY_KEY]
    return int(found[0]) if found else None


def until_refused(work: Callable[[], Any], most: int) -> grpc.RpcError:
    """Do something until a quota refuses it."""
    for _ in range(most):
        try:
            work()
        except grpc.RpcError as error:
            if (code_of(error) or "").startswith("quota"):
                return error
    raise AssertionError("it was never refused")


JOIN = api.JoinSessionRequest(session="nobody")


def still_served(server: Server, name: str) -> None:
    with refused(Status.NOT_FOUND, "session-unknown"):
        server.silo(name)("JoinSession", JOIN)


@pytest.mark.process
def test_calls_are_counted_whatever_they_are(mean: Server) -> None:
    """Methods that there are not and health checks, too."""
    channel = mean.silo("d").channel
    health = health_pb2_grpc.HealthStub(channel)
    unknown = channel.unary_unary("/secagg.v1.Aggregation/Nothing")
    for _ in range(50):
        health.Check(health_pb2.HealthCheckRequest())
        with refused(Status.UNIMPLEMENTED, None):
            unknown(b"")
    error = until_refused(lambda: mean.silo("d")("JoinSession", JOIN), 51)
    assert (error.code(), code_of(error)) == (Status.RESOURCE_EXHAUSTED, "quota-calls")
    assert (retry_after(error) or 0) > 10_000
    for call in (lambda: unknown(b""), lambda: health.Check(health_pb2.HealthCheckRequest())):
        with refused(Status.RESOURCE_EXHAUSTED, "quota-calls"):
            call()
    with refused(Status.RESOURCE_EXHAUSTED, "quota-calls"):  # another connection is no way out
        mean.connect(mean.consortium.pair(Role.SILO, "d"))("JoinSession", JOIN)
    still_served(mean, "a")
    before = mean.log.count(b'"quota-calls"')
    for _ in range(20):
        until_refused(lambda: mean.silo("d")("JoinSession", JOIN), 1)
    assert mean.log.count(b'"quota-calls"') - before < 20  # not a line for each


@pytest.mark.process
def test_bytes_are_counted_though_they_are_nonsense(mean: Server) -> None:
    error = until_refused(lambda: mean.silo("c")("PutChunk", b"\xff" * 600_000), 3)
    assert code_of(error) == "quota-bytes"
    assert (retry_after(error) or 0) > 10_000
    with refused(Status.RESOURCE_EXHAUSTED, "quota-bytes"):
        mean.silo("c")("JoinSession", JOIN)
    still_served(mean, "a")


@pytest.mark.process
def test_calls_that_wait_are_in_flight(mean: Server) -> None:
    study = mean.create("waiting")
    request = api.NextRequest(session_id=study.session_id, round=1)
    done: queue.SimpleQueue[Any] = queue.SimpleQueue()
    polls = [mean.silo("b").method("Next").future(request, timeout=60) for _ in range(7)]
    for poll in polls:
        poll.add_done_callback(done.put)
    error = done.get(timeout=30).exception()
    assert (code_of(error), retry_after(error)) == ("quota-calls-at-once", 500)
    assert done.empty()
    assert study.call("a", "Leave", api.LeaveRequest) == api.Ack()
    mean.boss.admin("AbortSession", api.AbortSessionRequest(name="waiting"))
    for _ in range(6):
        assert done.get(timeout=30).result().ended
    still_served(mean, "b")


@pytest.mark.process
def test_a_health_check_that_is_never_sent_is_in_flight(mean: Server) -> None:
    over, done = threading.Event(), queue.SimpleQueue[Any]()

    def never() -> Iterator[bytes]:
        over.wait(60)
        yield from ()

    stub = mean.connect(mean.consortium.pair(Role.ADMIN, "boss"))
    check = stub.channel.stream_unary("/grpc.health.v1.Health/Check")
    calls = [check.future(never(), timeout=60) for _ in range(7)]
    for call in calls:
        call.add_done_callback(done.put)
    assert code_of(done.get(timeout=30).exception()) == "quota-calls-at-once"
    assert done.empty()
    over.set()
    for call in calls:
        call.cancel()
    still_served(mean, "a")


@pytest.mark.process
def test_the_health_stream_is_a_method_that_there_is_not(mean: Server) -> None:
    watch = mean.silo("a").channel.unary_stream("/grpc.health.v1.Health/Watch")
    with refused(Status.UNIMPLEMENTED, None):
        list(watch(b"", timeout=30))


def upload_weights(study: Study, silo: str, size: int = WEIGHTS) -> None:
    assert study.call(silo, "OpenTask", api.OpenTaskRequest, task=TASK).propose
    where = api.Blob(weights=TASK)
    data = bytes(min(CHUNK, size))
    study.call(silo, "PutChunk", api.PutChunkRequest, blob=where, total=size, data=data)


@pytest.mark.process
def test_uploads_and_the_room_that_they_take(mean: Server) -> None:
    studies = [mean.create(f"room-{number}") for number in range(8)]
    upload_weights(studies[0], "a")
    with refused(Status.RESOURCE_EXHAUSTED, "quota-spool-silo"):
        upload_weights(studies[1], "a")
    upload_weights(studies[2], "b")  # whom that does not concern
    for number in (3, 4):
        upload_weights(studies[number], "a", 10)
    with refused(Status.RESOURCE_EXHAUSTED, "quota-uploads"):
        upload_weights(studies[5], "a", 10)
    with pytest.raises(grpc.RpcError) as caught:
        upload_weights(studies[6], "b", 490)
    assert code_of(caught.value) == "quota-spool"
    assert retry_after(caught.value) == 5000
    mean.create("room-8")
    with refused(Status.RESOURCE_EXHAUSTED, "quota-sessions"):
        mean.create("room-9")
    for study in studies:
        mean.boss.admin("AbortSession", api.AbortSessionRequest(name=study.name))
    upload_weights(mean.create("room-9"), "a")


# Messages and connections that no client of ours would make.


@pytest.fixture(scope="module")
def server(consortium: Consortium, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(
        consortium,
        tmp_path_factory.mktemp("server"),
        messages_at_once=1,
        streams_per_connection=3,
        max_connections=40,
    ) as running:
        running.create("study")
        yield running


@pytest.fixture
def wire(server: Server) -> Iterator[Connection]:
    with closing(Connection(server, Role.SILO, "a")) as connection:
        yield connection


@pytest.mark.process
def test_who_may_not_call_is_refused_before_its_message(wire: Connection) -> None:
    stream = wire.begin(path("CreateSession", "Admin"))
    found = wire.trailers(stream)
    assert (found["secagg-code"], found["grpc-status"]) == ("identity-role", "7")


@pytest.mark.process
def test_a_length_that_is_only_declared(server: Server, wire: Connection) -> None:
    stream = wire.begin(path("PutChunk"))
    wire.send(stream, frame(b"", 2**31 - 1))
    found = wire.trailers(stream)
    assert found["grpc-status"] == "8"
    assert "larger than max" in found["grpc-message"]
    still_served(server, "a")
    still_served(server, "b")
    assert b"Traceback" not in server.log


@pytest.mark.process
def test_a_call_without_a_message(server: Server, wire: Connection) -> None:
    stream = wire.begin(path("PutChunk"))
    wire.send(stream, b"", end=True)
    found = wire.trailers(stream)
    assert found["secagg-code"] == "message-encoding"
    assert b"Traceback" not in server.log


@pytest.mark.process
@pytest.mark.parametrize("acknowledged", [False, True])
def test_headers_that_are_too_large(server: Server, wire: Connection, acknowledged: bool) -> None:
    """Also of a client that has not heard of the limit, as it says."""
    if acknowledged:
        wire.settled()
    stream = wire.begin(path("JoinSession"), ("x-padding", "x" * 40_000))
    wire.send(stream, frame(b""), end=True)
    assert wire.trailers(stream)["grpc-status"] == "8"
    still_served(server, "b")


@pytest.mark.process
def test_a_question_that_is_too_long(server: Server) -> None:
    padded = api.NextRequest(round=1).SerializeToString() + b"\x9a\x06\x80\x80\x04" + bytes(65536)
    api.NextRequest.FromString(padded)
    with refused(Status.INVALID_ARGUMENT, "message-size"):
        server.silo("a")("Next", padded)


@pytest.mark.process
def test_more_streams_than_there_may_be(server: Server, wire: Connection) -> None:
    wire.settled()
    assert wire.h2.remote_settings.max_concurrent_streams == 3
    wire.h2.remote_settings[h2.settings.SettingCodes.MAX_CONCURRENT_STREAMS] = 100
    wire.h2.remote_settings.acknowledge()
    streams = [wire.begin(path("PutChunk")) for _ in range(5)]
    for stream in streams[3:]:
        reset = wire.until(h2.events.StreamReset, stream_id=stream)
        assert reset.error_code == h2.errors.ErrorCodes.REFUSED_STREAM
    still_served(server, "a")


@pytest.mark.process
def test_what_nobody_reads_yet_is_not_taken_in(server: Server, wire: Connection) -> None:
    """Two slow uploads where one may be in memory; the same silo's small calls pass meanwhile."""
    size = 4 * 2**20
    first, second = (wire.begin(path("PutChunk")) for _ in range(2))
    for stream in (first, second):
        wire.send(stream, frame(b"", size))
    wire.fill(first, size - 1)
    taken = 0
    while room := wire.room(second):
        wire.fill(second, room)
        taken += room
        assert taken < 200_000
        wire.settled()
    still_served(server, "a")
    wire.reset(first)
    wire.fill(second, size - taken - 1)  # now it is its turn
    wire.reset(second)


@pytest.mark.process
def test_a_reply_that_nobody_reads_keeps_its_place(server: Server) -> None:
    """As many as may be in memory; the same silo's next chunk waits for it to go."""
    study = server.create("slow-reader")
    weights = bytes(WEIGHTS)
    for at in range(0, WEIGHTS, CHUNK):
        if not at:
            assert study.call("a", "OpenTask", api.OpenTaskRequest, task=TASK).propose
        study.call(
            "a",
            "PutChunk",
            api.PutChunkRequest,
            blob=api.Blob(weights=TASK),
            total=WEIGHTS,
            offset=at,
            data=weights[at : at + CHUNK],
        )
    study.call("a", "ProposeTask", api.ProposeTaskRequest, opening=study.opening(weights=weights))
    request = api.GetChunkRequest(session_id=study.session_id, blob=api.Blob(weights=TASK))
    with closing(Connection(server, Role.SILO, "b", reads=False)) as wire:
        stream = wire.begin(path("GetChunk"))
        wire.send(stream, frame(request.SerializeToString()), end=True)
        wire.until(h2.events.ResponseReceived, stream_id=stream)
        other = server.silo("b").method("GetChunk").future(request, timeout=60)
        still_served(server, "b")  # over the same connection: so the other has come
        assert not other.done()
        assert server.silo("c")("GetChunk", request).data == weights[:CHUNK]
        assert not other.done()
        wire.reset(stream)
        assert other.result(timeout=30).data == weights[:CHUNK]


@pytest.fixture(scope="module")
def brisk(consortium: Consortium, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that waits for nobody."""
    with serving(
        consortium,
        tmp_path_factory.mktemp("brisk"),
        handshake_seconds=0.5,
        idle_seconds=0.5,
        connection_seconds=0.6,
        connection_grace_seconds=0.3,
    ) as running:
        yield running


def ended(connection: socket.socket) -> bool:
    """Whether the other end hangs up."""
    connection.settimeout(20)
    try:
        while connection.recv(4096):
            pass
    except ConnectionResetError:
        pass
    return True


@pytest.mark.process
def test_half_a_handshake(brisk: Server) -> None:
    hello = b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc"
    with (
        socket.create_connection(("127.0.0.1", brisk.port)) as silent,
        socket.create_connection(("127.0.0.1", brisk.port)) as begun,
        brisk.handshake(brisk.consortium.pair(Role.SILO, "a"), HIGHEST) as mute,
    ):
        begun.sendall(hello)
        still_served(brisk, "b")
        assert ended(silent)
        assert ended(begun)
        assert ended(mute)  # TLS is done, and nothing of HTTP/2 comes


@pytest.mark.process
def test_a_message_that_trickles_in(consortium: Consortium, tmp_path: Path) -> None:
    with (
        serving(consortium, tmp_path, message_seconds=0.3) as server,
        closing(Connection(server, Role.SILO, "a")) as wire,
    ):
        stream = wire.begin(path("PutChunk"))
        wire.send(stream, frame(b"x", 2**20))
        found = wire.trailers(stream)
        assert (found["secagg-code"], found["grpc-status"]) == ("message-slow", "4")
        assert b"Traceback" not in server.log


@pytest.mark.process
@pytest.mark.parametrize("where", [None, path("PutChunk")])
def test_a_connection_ends(brisk: Server, where: str | None) -> None:
    """Idle, or with a call that reads nothing of what it is told."""
    with closing(Connection(brisk, Role.SILO, "a", reads=False)) as wire:
        if where is not None:
            wire.begin(where)
        assert wire.drained(20)
        still_served(brisk, "b")


def connected(server: Server) -> Connection:
    """A connection, once there is a place for it."""
    for _ in range(10_000):
        try:
            return Connection(server, Role.SILO, "b")
        except (ssl.SSLError, ConnectionError):
            pass
    raise AssertionError("there is never a place")


@pytest.mark.process
def test_more_connections_than_there_may_be(consortium: Consortium, tmp_path: Path) -> None:
    with serving(consortium, tmp_path, max_connections=4) as small:
        still_served(small, "a")
        crowd = [socket.create_connection(("127.0.0.1", small.port)) for _ in range(5)]
        assert ended(crowd[3])
        assert ended(crowd[4])
        still_served(small, "a")
        for connection in crowd:
            connection.close()
        with closing(connected(small)) as wire:  # the server hears of their end by and by
            wire.settled()


@pytest.mark.process
def test_a_message_that_outlasts_its_senders_membership(tmp_path: Path) -> None:
    consortium = Consortium(tmp_path / "pki")
    with serving(consortium, tmp_path / "server") as server:
        server.create("study")
        with closing(Connection(server, Role.SILO, "d")) as wire:
            stream = wire.begin(path("JoinSession"))
            wire.settled()
            still_served(server, "d")
            consortium.authority.revoke(Role.SILO, "d", now=consortium.now)
            manifest = consortium.path(Role.COORDINATOR, "main") / "manifest.json"
            manifest.write_bytes(consortium.authority.signed_manifest.to_json())
            message = api.JoinSessionRequest(session="study").SerializeToString()
            wire.send(stream, frame(message), end=True)
            assert wire.trailers(stream)["secagg-code"] == "identity-revoked"
