"""The real server process over mutual TLS: who gets in, who is who, and what a refusal says."""

from __future__ import annotations

import json
import os
import socket
import ssl
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import timedelta
from typing import Any

import grpc
import numpy as np
import pytest
from cryptography import x509

from secagg.crypto.digest import vector_digest
from secagg.masking.messages import Result
from secagg.pki.names import Role
from secagg.wire import attempt as wire
from secagg.wire import session as wire_session
from secagg.wire._pb import service_pb2 as api

from .play import CHUNK, LENGTH, SUMS, TASK, exact_sum, make_config
from .serving import SERVER, Consortium, Pair, Server, Study, refused, serving, uri

pytestmark = pytest.mark.process
Status = grpc.StatusCode
BYTES = 4 * LENGTH
ANYBODY = "secagg://hospitals/silo/d"


@pytest.fixture(scope="module")
def consortium(tmp_path_factory: pytest.TempPathFactory) -> Consortium:
    return Consortium(tmp_path_factory.mktemp("pki"))


@pytest.fixture(scope="module")
def server(consortium: Consortium, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(
        consortium, tmp_path_factory.mktemp("server"), max_sessions=1000, sessions_per_admin=1000
    ) as running:
        yield running


@pytest.fixture
def study(server: Server) -> Study:
    """A session of its own for each test."""
    return server.create(f"study-{os.urandom(6).hex()}")


# TLS.


def test_tls_1_3(server: Server, consortium: Consortium) -> None:
    pair = consortium.pair(Role.SILO, "a")
    with server.handshake(pair, ssl.TLSVersion.TLSv1_3) as connection:
        assert connection.version() == "TLSv1.3"
        assert connection.selected_alpn_protocol() == "h2"


def test_no_tls_1_2(server: Server, consortium: Consortium) -> None:
    with pytest.raises((ssl.SSLError, ConnectionError)):
        server.handshake(consortium.pair(Role.SILO, "a"), ssl.TLSVersion.TLSv1_2)


def test_no_plaintext(server: Server) -> None:
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection:
        connection.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(3) + b"\x04" + bytes(5))
        answer = b""
        try:
            while data := connection.recv(4096):
                answer += data
        except ConnectionError:
            pass
    assert answer[3:4] != b"\x04"  # no SETTINGS of HTTP/2: at most a TLS alert
    assert answer[:1] in (b"", b"\x15")
    with grpc.insecure_channel(server.address) as channel:
        call = channel.unary_unary("/secagg.v1.Aggregation/JoinSession")
        with refused(Status.UNAVAILABLE, None):
            call(b"", timeout=30)


STRANGERS: dict[str, Callable[[Consortium, Consortium], Pair | None]] = {
    "no certificate": lambda us, them: None,
    "another consortium's": lambda us, them: them.pair(Role.SILO, "d"),
    "another authority's of our name": lambda us, them: them.odd(uri(ANYBODY)),
    "self-signed": lambda us, them: us.odd(uri(ANYBODY), self_signed=True),
    "expired": lambda us, them: us.odd(
        uri(ANYBODY), begin=timedelta(days=-2), end=timedelta(seconds=-2)
    ),
    "not yet valid": lambda us, them: us.odd(
        uri(ANYBODY), begin=timedelta(minutes=2), end=timedelta(days=1)
    ),
    "the coordinator's": lambda us, them: us.pair(Role.COORDINATOR, "main"),
    "a server's": lambda us, them: us.odd(uri(ANYBODY), usages=SERVER),
}


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> Consortium:
    return Consortium(tmp_path_factory.mktemp("others"), "banks")


@pytest.mark.parametrize("case", STRANGERS)
def test_the_handshake_fails_and_no_handler_runs(
    server: Server, study: Study, consortium: Consortium, others: Consortium, case: str
) -> None:
    before, seen = study.snapshot(), calls(server)
    stub = server.connect(STRANGERS[case](consortium, others))
    for service, method, request in (
        ("Aggregation", "JoinSession", api.JoinSessionRequest(session=study.name)),
        ("Admin", "AbortSession", api.AbortSessionRequest(name=study.name)),
        ("Admin", "AbortSession", b"\xff"),
    ):
        with refused(Status.UNAVAILABLE, None):
            stub(method, request, service)
    assert study.snapshot() == before
    assert calls(server) == seen
    assert server.silo("a")("JoinSession", api.JoinSessionRequest(session=study.name))


def calls(server: Server) -> int:
    """How many refused or failed calls the log tells of."""
    return server.log.count(b'"method"')


# Identity.

IMPOSTORS: dict[str, tuple[Callable[[Consortium], Pair], Status, str]] = {
    "no SAN": (lambda us: us.odd(), Status.UNAUTHENTICATED, "identity-no-san"),
    "a DNS name": (
        lambda us: us.odd(x509.DNSName("d.hospitals")),
        Status.UNAUTHENTICATED,
        "identity-no-san",
    ),
    "two URIs": (
        lambda us: us.odd(uri(ANYBODY), uri("secagg://hospitals/silo/a")),
        Status.UNAUTHENTICATED,
        "identity-two-sans",
    ),
    "the same URI twice": (
        lambda us: us.odd(uri(ANYBODY), uri(ANYBODY)),
        Status.UNAUTHENTICATED,
        "identity-two-sans",
    ),
    "a URI and a DNS name": (
        lambda us: us.odd(uri(ANYBODY), x509.DNSName("d")),
        Status.UNAUTHENTICATED,
        "identity-two-sans",
    ),
    "another trust domain": (
        lambda us: us.odd(uri("secagg://banks/silo/d")),
        Status.PERMISSION_DENIED,
        "identity-consortium",
    ),
    "no such role": (
        lambda us: us.odd(uri("secagg://hospitals/root/d")),
        Status.UNAUTHENTICATED,
        "identity-uri",
    ),
    "another scheme": (
        lambda us: us.odd(uri("spiffe://hospitals/silo/d")),
        Status.UNAUTHENTICATED,
        "identity-uri",
    ),
    "another spelling": (
        lambda us: us.odd(uri("secagg://hospitals/silo/%64")),
        Status.UNAUTHENTICATED,
        "identity-uri",
    ),
    "capitals": (
        lambda us: us.odd(uri("secagg://hospitals/silo/D")),
        Status.UNAUTHENTICATED,
        "identity-uri",
    ),
    "a path": (
        lambda us: us.odd(uri("secagg://hospitals/silo/d/")),
        Status.UNAUTHENTICATED,
        "identity-uri",
    ),
    "the coordinator as a client": (
        lambda us: us.odd(
            uri("secagg://hospitals/coordinator/main"),
            x509.DNSName("coordinator.hospitals.secagg.internal"),
        ),
        Status.UNAUTHENTICATED,
        "identity-usage",
    ),
    "both usages": (
        lambda us: us.odd(uri(ANYBODY), usages=(*SERVER, x509.ExtendedKeyUsageOID.CLIENT_AUTH)),
        Status.UNAUTHENTICATED,
        "identity-usage",
    ),
    "no usage": (
        lambda us: us.odd(uri(ANYBODY), usages=()),
        Status.UNAUTHENTICATED,
        "identity-usage",
    ),
    "nobody of the manifest": (
        lambda us: us.odd(uri("secagg://hospitals/silo/e")),
        Status.PERMISSION_DENIED,
        "session-member",
    ),
}


@pytest.mark.parametrize("case", IMPOSTORS)
def test_identity_comes_from_one_san_uri(
    server: Server, study: Study, consortium: Consortium, case: str
) -> None:
    make, status, code = IMPOSTORS[case]
    study.open()
    before = study.snapshot()
    stub = server.connect(make(consortium))
    mine = {"session_id": study.session_id}
    with refused(status, code):
        stub("JoinSession", api.JoinSessionRequest(session=study.name))
    with refused(status, code):
        stub("Ready", api.ReadyRequest(task=TASK, base=study.base(), **mine))
    if code != "session-member":
        with refused(status, code):
            stub.admin("AbortSession", api.AbortSessionRequest(name=study.name))
    assert study.snapshot() == before


def test_the_name_of_a_certificate_is_not_its_subject(
    server: Server, study: Study, consortium: Consortium
) -> None:
    pair = consortium.odd(uri(ANYBODY), common_name="a")
    reply = server.connect(pair)("JoinSession", api.JoinSessionRequest(session=study.name))
    assert reply.session_id == study.session_id
    ages = {silo.name: silo.last_call_age for silo in study.show().silos}
    assert (ages["a"], ages["d"] >= 0) == (-1, True)


# Roles and ownership.

AGGREGATION = sorted(api.DESCRIPTOR.services_by_name["Aggregation"].methods_by_name)
ADMIN = sorted(api.DESCRIPTOR.services_by_name["Admin"].methods_by_name)


def request_of(service: str, method: str, **fields: Any) -> Any:
    descriptor = api.DESCRIPTOR.services_by_name[service].methods_by_name[method]
    return getattr(api, descriptor.input_type.name)(**fields)


@pytest.mark.parametrize("method", AGGREGATION)
def test_an_admin_is_no_silo(server: Server, study: Study, method: str) -> None:
    before = study.snapshot()
    with refused(Status.PERMISSION_DENIED, "identity-role"):
        server.boss(method, request_of("Aggregation", method))
    assert study.snapshot() == before


@pytest.mark.parametrize("method", ADMIN)
def test_a_silo_is_no_admin(server: Server, study: Study, method: str) -> None:
    before = study.snapshot()
    request = request_of("Admin", method)
    if method in ("AbortSession", "ShowSession"):
        request.name = study.name
    with refused(Status.PERMISSION_DENIED, "identity-role"):
        server.silo("a").admin(method, request)
    assert study.snapshot() == before


@pytest.mark.parametrize("method", [name for name in AGGREGATION if name != "JoinSession"])
def test_a_session_s_calls_are_for_its_silos(server: Server, method: str) -> None:
    study = server.create(f"few-{os.urandom(6).hex()}", silos="abc")
    before = study.snapshot()
    request = request_of("Aggregation", method)
    request.session_id = study.session_id
    with refused(Status.PERMISSION_DENIED, "session-member"):
        server.silo("d")(method, request)
    with refused(Status.PERMISSION_DENIED, "session-member"):
        server.silo("d")("JoinSession", api.JoinSessionRequest(session=study.name))
    assert study.snapshot() == before


@pytest.mark.parametrize("session_id", [b"", bytes(32), b"x"])
@pytest.mark.parametrize("method", [name for name in AGGREGATION if name != "JoinSession"])
def test_no_such_session(server: Server, method: str, session_id: bytes) -> None:
    request = request_of("Aggregation", method)
    request.session_id = session_id
    with refused(Status.NOT_FOUND, "session-unknown"):
        server.silo("a")(method, request)


@pytest.mark.parametrize("name", ["", "nope", "x" * 100_000, "ä" * 30_000, "\n\0"])
def test_no_session_of_that_name(server: Server, name: str) -> None:
    with refused(Status.NOT_FOUND, "session-unknown"):
        server.silo("a")("JoinSession", api.JoinSessionRequest(session=name))
    with refused(Status.NOT_FOUND, "session-unknown"):
        server.boss.admin("ShowSession", api.ShowSessionRequest(name=name))
    with refused(Status.NOT_FOUND, "session-unknown"):
        server.boss.admin("AbortSession", api.AbortSessionRequest(name=name))


def test_a_body_that_names_another_silo(study: Study) -> None:
    players = study.start()
    for name in "ab":
        players[name].step(send=False)
    before = study.snapshot()
    request = wire.client_message_to_wire(
        players["b"].sent[-1], session_id=study.session_id, round_number=1, attempt=1
    )
    with refused(Status.PERMISSION_DENIED, "sender-identity"):
        study.server.silo("a")("Send", request)
    request.advertise_keys.sender = "a"  # its own name over another's signature
    with refused(Status.INVALID_ARGUMENT, "message-signature"):
        study.server.silo("a")("Send", request)
    assert study.snapshot() == before
    players["b"].send(players["b"].sent[-1])


def test_an_opening_that_names_another_silo(study: Study) -> None:
    study.call("a", "OpenTask", api.OpenTaskRequest, task=TASK)
    with refused(Status.PERMISSION_DENIED, "sender-identity"):
        study.call("b", "ProposeTask", api.ProposeTaskRequest, opening=study.opening("a"))
    with refused(Status.FAILED_PRECONDITION, "task-proposer"):
        study.call("b", "ProposeTask", api.ProposeTaskRequest, opening=study.opening("b"))
    study.call("a", "ProposeTask", api.ProposeTaskRequest, opening=study.opening("a"))


# The table of status codes.


@pytest.mark.parametrize("method", AGGREGATION)
def test_bytes_that_are_no_message(server: Server, consortium: Consortium, method: str) -> None:
    for data in (b"\xff\xff\xff", b"\x0a\x05a", b"\x0a\xff\xff\xff\xff\x0f"):
        with refused(Status.INVALID_ARGUMENT, "message-encoding"):
            server.silo("a")(method, data)
    with refused(Status.PERMISSION_DENIED, "identity-role"):
        server.boss(method, b"\xff\xff\xff")


def malformed(study: Study) -> Iterator[tuple[str, str, Any]]:
    mine = {"session_id": study.session_id}
    yield "message-missing", "Send", api.SendRequest(round=1, attempt=1, **mine)
    bad = api.SendRequest(round=1, attempt=1, **mine)
    bad.consistency.sender = "a"
    yield "message-size", "Send", bad
    bad = api.SendRequest(round=1, attempt=1, **mine)
    bad.consistency.sender = "A"
    yield "message-name", "Send", bad
    yield "opening-size", "ProposeTask", api.ProposeTaskRequest(**mine)
    yield "blob-kind", "PutChunk", api.PutChunkRequest(data=b"x", total=1, **mine)
    yield "blob-kind", "PutChunk", api.PutChunkRequest(blob=api.Blob(sum=1), **mine)
    yield "blob-kind", "GetChunk", api.GetChunkRequest(**mine)
    for method in ("AnnounceKey", "AwaitKeyRequests", "EndKey"):
        yield "key-name", method, request_of("Aggregation", method, **mine)
        for key in ({"epoch": 1}, {"key_id": bytes(32)}, {"epoch": 1, "key_id": bytes(31)}):
            yield "key-name", method, request_of("Aggregation", method, key=key, **mine)
    yield "message-number", "AskKey", api.AskKeyRequest(**mine)
    yield "message-number", "SendKeyBox", api.SendKeyBoxRequest(**mine)
    vector = api.Blob(vector=api.Blob.Vector(round=1, attempt=1))
    yield "blob-kind", "GetChunk", api.GetChunkRequest(blob=vector, **mine)
    for seen in (-1, 7):
        raw = api.NextRequest(round=1, **mine).SerializeToString()
        yield "step-unknown", "Next", raw + b"\x20" + varint(seen)


def varint(value: int) -> bytes:
    value %= 2**64
    out = b""
    while value >= 128:
        out, value = out + bytes([value % 128 | 128]), value >> 7
    return out + bytes([value])


def test_malformed_requests(study: Study) -> None:
    study.open()
    before = study.snapshot()
    for code, method, request in malformed(study):
        with refused(Status.INVALID_ARGUMENT, code):
            study.server.silo("a")(method, request)
    assert study.snapshot() == before


def test_bad_configurations(server: Server) -> None:
    good = wire_session.config_to_wire(make_config(name="bad-one"))
    changes: dict[str, tuple[Callable[[Any], Any], str]] = {
        "name": (lambda m: setattr(m, "name", "A"), "name"),
        "protection": (lambda m: setattr(m, "protection", "none"), "config-file"),
        "floor": (lambda m: setattr(m, "min_cohort", 2), "min-cohort"),
        "threshold": (lambda m: setattr(m, "threshold", "1/3"), "threshold"),
        "consortium": (lambda m: setattr(m, "consortium", "banks"), "session-consortium"),
        "unknown silos": (lambda m: m.silos.append("zz"), "session-silos"),
        "deadline": (lambda m: setattr(m, "phase_deadline", float("nan")), "number"),
        "tasks": (lambda m: m.ClearField("tasks"), "tasks"),
    }
    for change, code in changes.values():
        bad = api.CreateSessionRequest(config=good)
        change(bad.config)
        with refused(Status.INVALID_ARGUMENT, code):
            server.boss.admin("CreateSession", bad)
    with refused(Status.NOT_FOUND, "session-unknown"):
        server.boss.admin("ShowSession", api.ShowSessionRequest(name="bad-one"))


def test_signatures_of_messages_and_openings(study: Study) -> None:
    opening = study.opening()
    opening.signature = bytes(64)
    study.call("a", "OpenTask", api.OpenTaskRequest, task=TASK)
    with refused(Status.INVALID_ARGUMENT, "message-signature"):
        study.call("a", "ProposeTask", api.ProposeTaskRequest, opening=opening)
    study.call("a", "ProposeTask", api.ProposeTaskRequest, opening=study.opening())
    study.ready()
    player = study.player("a")
    player.step(send=False)
    message = player.sent[-1]
    with refused(Status.INVALID_ARGUMENT, "message-signature"):
        player.send(replace(message, signature=bytes(64)))
    player.send(message)


def test_wrong_phase_round_and_resends(study: Study) -> None:
    players = study.start()
    a = players["a"]
    a.step()
    advert = a.sent[-1]
    a.send(advert)  # again: acknowledged
    with refused(Status.ALREADY_EXISTS, "message-conflict"):
        a.send(replace(advert, self_seed_hash=bytes(32)))
    early = api.SendRequest(session_id=study.session_id, round=1, attempt=1)
    early.consistency.sender, early.consistency.signature = "b", bytes(64)
    with refused(Status.FAILED_PRECONDITION, "phase-early"):
        study.server.silo("b")("Send", early)
    vector = api.Blob(vector=api.Blob.Vector(round=1, attempt=1))
    put = {"blob": vector, "total": BYTES, "data": bytes(CHUNK)}
    with refused(Status.FAILED_PRECONDITION, "phase-early"):
        study.call("b", "PutChunk", api.PutChunkRequest, **put)
    for round_number, attempt, code in (
        (1, 2, "attempt-unknown"),
        (2, 1, "attempt-unknown"),
        (0, 1, "round-over"),
    ):
        early.round, early.attempt = round_number, attempt
        with refused(Status.FAILED_PRECONDITION, code):
            study.server.silo("b")("Send", early)
    with refused(Status.FAILED_PRECONDITION, "base-stale"):
        study.ready("a", base=bytes(32))


def test_chunks_of_a_vector(study: Study) -> None:
    players = study.start()
    for phase in range(3):
        for player in players.values():
            player.step(send=phase < 2)
    vector = api.Blob(vector=api.Blob.Vector(round=1, attempt=1))

    def put(**fields: Any) -> None:
        given = {"blob": vector, "total": BYTES, "data": bytes(CHUNK), "offset": 0} | fields
        study.call("a", "PutChunk", api.PutChunkRequest, **given)

    put()
    with refused(Status.FAILED_PRECONDITION, "chunk-gap"):
        study.server.silo("a")(
            "Send",
            wire.client_message_to_wire(
                players["a"].sent[-1], session_id=study.session_id, round_number=1, attempt=1
            ),
        )
    for fields, code in (
        ({"offset": 1}, "chunk-offset"),
        ({"offset": 2**64 - CHUNK}, "chunk-offset"),
        ({"offset": 2**63}, "chunk-offset"),
        ({"data": bytes(CHUNK + 1)}, "chunk-length"),
        ({"data": b""}, "chunk-length"),
        ({"total": BYTES + 4}, "vector-length"),
        ({"total": 2**64 - 1}, "vector-length"),
    ):
        with refused(Status.INVALID_ARGUMENT, code):
            put(**fields)
    with refused(Status.FAILED_PRECONDITION, "chunk-gap"):
        study.server.silo("b")(
            "Send",
            wire.client_message_to_wire(
                players["b"].sent[-1], session_id=study.session_id, round_number=1, attempt=1
            ),
        )
    players["a"].send(players["a"].sent[-1])
    players["a"].port.send(players["a"].sent[-1], 1, 1)  # again: acknowledged
    with refused(Status.FAILED_PRECONDITION, "vector-committed"):
        put()


def test_a_dead_round_and_a_dead_session(server: Server) -> None:
    study = server.create(f"dead-{os.urandom(6).hex()}", phase_deadline=0.2)
    players = study.start()
    a = players["a"]
    descriptor = a.look()
    a.answer(descriptor)
    aborted = a.look()
    assert aborted is not None
    assert (aborted.phase, aborted.have, aborted.need) == ("advertise_keys", 0, 3)
    with refused(Status.ABORTED, "round-aborted"):
        a.send(a.sent[-1])
    shown = study.show().last_abort
    assert (shown.round, shown.attempt, shown.phase) == (1, 1, "advertise_keys")
    server.boss.admin("AbortSession", api.AbortSessionRequest(name=study.name))
    with refused(Status.ABORTED, "session-over"):
        study.ready("a")
    with refused(Status.ABORTED, "session-over"):
        a.send(a.sent[-1])
    reply = study.call("a", "Next", api.NextRequest, round=1)
    assert "aborted" in reply.ended


def test_unknown_things(study: Study) -> None:
    with refused(Status.NOT_FOUND, "task-unknown"):
        study.call("a", "OpenTask", api.OpenTaskRequest, task="nope")
    with refused(Status.NOT_FOUND, "task-closed"):
        study.call("a", "Ready", api.ReadyRequest, task=TASK, base=bytes(32))
    with refused(Status.NOT_FOUND, "round-unknown"):
        study.call("a", "GetChunk", api.GetChunkRequest, blob=api.Blob(sum=1))
    for task in (TASK, "nope", "../../../../etc/passwd"):
        with refused(Status.NOT_FOUND, "weights-unknown"):
            study.call("a", "GetChunk", api.GetChunkRequest, blob=api.Blob(weights=task))


def test_weights_up_and_down(study: Study) -> None:
    weights = os.urandom(CHUNK + 10)
    where = api.Blob(weights=TASK)
    put = {"blob": where, "total": len(weights)}
    with refused(Status.FAILED_PRECONDITION, "task-proposer"):
        study.call("a", "PutChunk", api.PutChunkRequest, data=weights[:CHUNK], **put)
    study.call("a", "OpenTask", api.OpenTaskRequest, task=TASK)
    with refused(Status.RESOURCE_EXHAUSTED, "weights-size"):
        study.call("a", "PutChunk", api.PutChunkRequest, blob=where, total=1001, data=bytes(CHUNK))
    opening = study.opening(weights=weights)
    with refused(Status.INVALID_ARGUMENT, "weights-missing"):
        study.call("a", "ProposeTask", api.ProposeTaskRequest, opening=opening)
    for data in (bytes(len(weights)), weights):
        for at in (0, CHUNK):
            chunk = {"offset": at, "data": data[at : at + CHUNK]}
            study.call("a", "PutChunk", api.PutChunkRequest, **chunk, **put)
        if data != weights:
            with refused(Status.INVALID_ARGUMENT, "weights-digest"):
                study.call("a", "ProposeTask", api.ProposeTaskRequest, opening=opening)
    study.call("a", "ProposeTask", api.ProposeTaskRequest, opening=opening)
    got = b"".join(
        study.call("b", "GetChunk", api.GetChunkRequest, blob=where, offset=at).data
        for at in (0, CHUNK)
    )
    assert got == weights
    assert vector_digest(got, CHUNK) == opening.weights_digest
    for at in (1, 2 * CHUNK, 2**63, 2**64 - CHUNK):
        with refused(Status.NOT_FOUND, "chunk-offset"):
            study.call("b", "GetChunk", api.GetChunkRequest, blob=where, offset=at)
    with refused(Status.ALREADY_EXISTS, "task-open"):
        study.call("a", "ProposeTask", api.ProposeTaskRequest, opening=study.opening())
    assert study.call("c", "OpenTask", api.OpenTaskRequest, task=TASK).opening == opening


# Admins.


def test_admin_service(server: Server) -> None:
    name = f"admin-{os.urandom(6).hex()}"
    study = server.create(name)
    listed = server.boss.admin("ListSessions", api.ListSessionsRequest()).sessions
    assert [(s.state, s.silos, s.results) for s in listed if s.name == name] == [("active", 4, 0)]
    shown = study.show()
    assert wire_session.config_from_wire(shown.config) == study.config
    assert [(silo.name, silo.state) for silo in shown.silos] == [(s, "away") for s in "abcd"]
    assert (shown.round, shown.attempt, shown.phase) == (1, 0, "")
    assert not shown.HasField("last_abort")
    with refused(Status.ALREADY_EXISTS, "session-name"):
        server.create(name)
    server.boss.admin("AbortSession", api.AbortSessionRequest(name=name))
    server.boss.admin("AbortSession", api.AbortSessionRequest(name=name))
    assert study.show().summary.state == "aborted"
    again = server.create(name)  # a name is free again once its session is over
    assert again.session_id != study.session_id
    assert again.show().summary.state == "active"
    reply = server.silo("a")("JoinSession", api.JoinSessionRequest(session=name))
    assert reply.session_id == again.session_id


def test_all_of_the_manifest(server: Server) -> None:
    config = wire_session.config_to_wire(make_config(name=f"all-{os.urandom(6).hex()}"))
    del config.silos[:]
    server.boss.admin("CreateSession", api.CreateSessionRequest(config=config))
    shown = server.boss.admin("ShowSession", api.ShowSessionRequest(name=config.name))
    assert list(shown.config.silos) == ["a", "b", "c", "d"]


# Sizes.


def test_a_message_that_is_too_large(server: Server, study: Study) -> None:
    before = study.snapshot()
    data = bytes(4 * 2**20 + 65 * 1024)
    with refused(Status.RESOURCE_EXHAUSTED, None):
        study.call("a", "PutChunk", api.PutChunkRequest, data=data)
    assert study.snapshot() == before
    with refused(Status.INVALID_ARGUMENT, "blob-kind"):  # the largest chunk passes
        study.call("a", "PutChunk", api.PutChunkRequest, data=bytes(4 * 2**20))


def test_metadata_that_are_too_large(server: Server, study: Study) -> None:
    request = api.JoinSessionRequest(session=study.name)
    silo = server.silo("a")
    with refused(Status.RESOURCE_EXHAUSTED, None):
        silo("JoinSession", request, metadata=[("x-padding", "x" * 40_000)])
    assert silo("JoinSession", request, metadata=[("x-padding", "x" * 1000)])


# A whole round, and what the log tells of it.


def secrets_of(study: Study, players: dict[str, Any]) -> set[bytes]:
    """Every protocol value that silos made, sent or got, of 16 bytes or more."""
    found: set[bytes] = {study.base(), study.session_id}
    for player in players.values():
        for message in player.port.seen:
            collect(message, found)
        assert player.masked is not None
        for vector in (player.vector, player.masked):
            data = vector.tobytes()
            found |= {data[at : at + 16] for at in range(0, len(data), 16)}
        advertised, *_ = player.states
        found |= {
            advertised.channel.private.reveal(),
            advertised.mask_key.private.reveal(),
            advertised.self_seed.reveal(),
            player.member.identity.private.reveal(),
        }
    return {value for value in found if len(value) >= 16}


def collect(message: Any, found: set[bytes]) -> None:
    for field, value in message.ListFields():
        for item in value if field.is_repeated else [value]:
            if field.type == field.TYPE_MESSAGE:
                collect(item, found)
            elif field.type == field.TYPE_BYTES:
                found.add(item)


def spellings(value: bytes) -> Iterator[bytes]:
    """Ways in which bytes get into a log."""
    import base64

    yield value
    yield value.hex().encode()
    yield value.hex().upper().encode()
    for at in range(3):  # base64 of a larger value that holds this one at any place
        inner = base64.b64encode(value[at : at + (len(value) - at) // 3 * 3])
        yield inner
        yield inner.replace(b"+", b"-").replace(b"/", b"_")
    yield repr(value)[2:-1].encode()
    yield json.dumps(repr(value)[2:-1])[1:-1].encode()
    yield str(list(value))[1:-1].encode()


def test_a_round_and_its_log(server: Server, study: Study) -> None:
    players = study.start()
    for _ in range(5):
        for player in players.values():
            player.step()
    results = [player.look() for player in players.values()]
    assert all(isinstance(result, Result) for result in results)
    result = results[0]
    assert isinstance(result, Result)
    assert all(other == result for other in results)
    assert result.survivors == ("a", "b", "c", "d")
    data = players["a"].port.sum("a", 1, BYTES)
    np.testing.assert_array_equal(np.frombuffer(data, "<u4"), exact_sum(players.values()))
    assert vector_digest(data, CHUNK) == result.vector_digest
    listed = study.call("a", "ListResults", api.ListResultsRequest).results
    assert [wire.result_from_wire(message) for message in listed] == [result]
    assert not study.call("a", "ListResults", api.ListResultsRequest, after=1).results
    assert not study.call("a", "ListResults", api.ListResultsRequest, after=2**32 - 1).results
    late = players["a"].sent[-1]
    with refused(Status.FAILED_PRECONDITION, "round-over"):
        players["a"].send(late)
    with refused(Status.ABORTED, "session-over"):
        server.boss.admin("AbortSession", api.AbortSessionRequest(name=study.name))
        study.ready("a")
    log = server.log
    assert log.count(f'"session": "{study.name}"'.encode()) >= 6  # the round is in there
    values = secrets_of(study, players)
    assert len(values) > 100
    leaked = [value.hex() for value in values if any(s in log for s in spellings(value))]
    assert leaked == []


def test_the_log_is_one_json_object_a_line(server: Server, study: Study) -> None:
    with refused(Status.NOT_FOUND, "task-unknown"):
        study.call("a", "OpenTask", api.OpenTaskRequest, task="not\na task\x1b[31m")
    lines = [line for line in server.log.splitlines() if line.startswith(b"{")]
    events = [json.loads(line) for line in lines]
    assert {"timestamp", "level", "event"} <= set(events[-1])
    refusals = [event for event in events if event["event"] == "refused"]
    assert refusals[-1] | {"timestamp": ""} == {
        "timestamp": "",
        "level": "info",
        "event": "refused",
        "method": "OpenTask",
        "peer": "a",
        "code": "task-unknown",
        "status": "NOT_FOUND",
    }


def test_no_call_ended_in_an_error_of_ours(server: Server, study: Study) -> None:
    study.open(SUMS)
    assert b'"internal"' not in server.log
    assert b'"session-failed"' not in server.log
    assert b"Traceback" not in server.log
