"""How much one member can take: calls, bytes, uploads, disk, sessions, connections, memory.

Every attack plays against a coordinator whose limits are small, so that the attack is quick; what
it shows does not depend on the numbers. It succeeds if the adversary really gets beyond the limit:
the disk holds more, the calls were served, or somebody else is not served any more.

Source: RFC 9113 (HTTP/2), section 10.5, refusal of service; CWE-770, allocation of resources
without limits; CVE-2019-9512 to 9518.
"""

from __future__ import annotations

import functools
import socket
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from typing import Any, Final

import grpc

from benchmarks.memory import resident
from secagg.config import TaskConfig
from secagg.coordinator.sqlite import DATABASE
from secagg.coordinator.state import State
from secagg.wire._pb import service_pb2 as api
from threat_model.attacks.attack import Refused, Scene, Weakening, attack
from threat_model.attacks.evil_coordinator import TASK, make_session
from threat_model.attacks.evil_silo import Study, code_of
from threat_model.attacks.raw import Raw, frame
from threat_model.attacks.stage import Serving
from threat_model.attacks.weak import Function, nothing, replaced

RATE: Final = 5.0
BURST: Final = 60
BYTES: Final = 4 * 2**20
SLOTS: Final = 12
AT_ONCE: Final = 4
UPLOADS: Final = 3
SESSIONS: Final = 3
ONE_SILO: Final = 2**20
ALL_SILOS: Final = 2 * 2**20
WEIGHTS: Final = 900_000
SECONDS: Final = 1.5
QUOTAS: Final = (
    "[limits]",
    f"calls_per_second = {RATE}",
    f"calls_burst = {BURST}",
    "bytes_per_second = 1048576.0",
    f"bytes_burst = {BYTES}",
    f"calls_at_once = {AT_ONCE}",
    f"max_concurrent_calls = {SLOTS}",
    f"uploads_at_once = {UPLOADS}",
    f"sessions_per_admin = {SESSIONS}",
    f"spool_bytes_per_silo = {ONE_SILO}",
    f"max_spool_bytes = {ALL_SILOS}",
    f"max_weights_bytes = {WEIGHTS}",
    f"message_seconds = {SECONDS}",
)
CONNECTIONS: Final = 16
STREAMS: Final = 10
TRANSPORT: Final = (
    "[limits]",
    f"max_connections = {CONNECTIONS}",
    f"streams_per_connection = {STREAMS}",
    f"handshake_seconds = {SECONDS}",
)
CHANGES: Final = 1000
CHUNK: Final = 65536
BOMB: Final = 24 * 2**20
MISSES: Final = 5
STATUS: Final = {str(status.value[0]): status.name for status in grpc.StatusCode}
NOBODYS: Final = bytes(32)
"""A session that there is not: a call about it costs what calls cost, and is then refused."""
NOTHING: Final = frame(api.ListResultsRequest(session_id=NOBODYS).SerializeToString())


def unmetered(real: Function, quota: str) -> Function:
    """``Quotas.enter`` without one of its three quotas."""

    def enter(self: Any, member: Any, now: float) -> None:
        account = self._account(member, now)
        flying = account.flying
        if quota == "flying":
            account.flying = 0
        else:
            bucket = getattr(account, quota)
            bucket.level = bucket.size
        try:
            real(self, member, now)
        finally:
            account.flying += flying if quota == "flying" else 0

    return enter


def without_quota(quota: str) -> Weakening:
    """A coordinator without this quota: "calls", "traffic", or "flying" for calls at once."""
    return replaced("secagg.coordinator.quotas:Quotas.enter", unmetered, quota)


@contextmanager
def studying(scene: Scene, **changes: Any) -> Iterator[Study]:
    """A session at the coordinator of small quotas."""
    with scene.stage.serving(scene.weakening, settings=QUOTAS) as server:
        session = make_session("abcdef", chunk_bytes=CHUNK, **changes)
        with Study(scene, server, session) as study:
            yield study


def tried(scene: Scene, call: Callable[[], Any]) -> str:
    """The code with which a call is refused; nothing if it is not."""
    try:
        call()
    except Refused as refusal:
        return refusal.code
    except grpc.RpcError as error:
        return scene.refuse(code_of(error)).code
    return ""


# Calls and bytes.


@attack(threat="call-flood", reason="quota-calls", weakening=without_quota("calls"))
def calls_without_end(scene: Scene) -> bool:
    """Silo e calls far more often than it may, and is served."""
    with studying(scene) as study:
        stub, began = study.member("e").stub("ListResults"), time.monotonic()
        request = api.ListResultsRequest(session_id=study.session_id)
        codes = [tried(scene, lambda: stub(request, timeout=30.0)) for _ in range(2 * BURST)]
        allowed = BURST + RATE * (time.monotonic() - began) + 1
        return codes.count("") > allowed


@attack(threat="call-flood", reason="quota-bytes", weakening=without_quota("traffic"))
def bytes_without_end(scene: Scene) -> bool:
    """Silo f has the coordinator take in megabytes that it has no use for."""
    with studying(scene) as study:
        blob, chunk = api.Blob(sum=1), bytes(2**20)
        request = api.PutChunkRequest(session_id=NOBODYS, blob=blob, total=2**20, data=chunk)
        stub, began = study.member("f").stub("PutChunk"), time.monotonic()
        codes = [tried(scene, lambda: stub(request, timeout=30.0)) for _ in range(16)]
        allowed = BYTES + 2**20 * (time.monotonic() - began) + 2**20
        return codes.count("session-unknown") * 2**20 > allowed


@attack(threat="waiting-calls", reason="quota-calls-at-once", weakening=without_quota("flying"))
def waiting_calls_fill_the_coordinator(scene: Scene) -> bool:
    """Silo d waits in as many calls as the coordinator serves; then there is no room for silo a."""
    with studying(scene) as study, ExitStack() as held:
        request = api.ListResultsRequest(session_id=study.session_id)
        heard = functools.partial(study.member("a").stub("ListResults"), request, timeout=30.0)
        heard()
        held.callback(served_again, scene, heard)
        stub = study.member("d").stub("Next")
        request = api.NextRequest(session_id=study.session_id, seen=api.STEP_LEFT)

        def wait() -> Any:
            call = stub.future(request, timeout=30.0)
            held.callback(call.cancel)
            return call

        return starved(scene, heard, wait)


def starved(scene: Scene, heard: Callable[[], Any], wait: Callable[[], Any]) -> bool:
    """Whether silo a is refused for as long as the other's calls wait.

    Whenever silo a is served there was a place left: the other takes it.
    """
    misses, waiting = 0, [wait() for _ in range(SLOTS)]
    while misses < MISSES:
        over = [call for call in waiting if call.done()]
        if len(over) >= SLOTS - AT_ONCE:
            for call in over:
                tried(scene, call.result)
            return False
        if tried(scene, heard) == "RESOURCE_EXHAUSTED":
            misses += 1
        else:
            misses = 0
            waiting.append(wait())
        time.sleep(0.05)  # others' refusals may still be on their way
    return True


def served_again(scene: Scene, heard: Callable[[], Any]) -> None:
    """Wait until calls that were cancelled are over."""
    while tried(scene, heard):
        time.sleep(0.01)


def patient(_real: Function) -> Function:
    """``Servicer._message`` that waits for as long as it takes."""

    async def message(_self: Any, _who: Any, context: Any) -> Any:
        return await context.read()

    return message


@attack(
    threat="slow-senders",
    reason="message-slow",
    weakening=replaced("secagg.coordinator.servicer:Servicer._message", patient),
)
def request_byte_by_byte(scene: Scene) -> bool:
    """Silo b begins a request and ends it when it likes: a call and its memory are held for it."""
    with studying(scene) as study, connect(study, "b") as raw:
        stream = raw.call("ListResults")
        raw.send(stream, NOTHING[:20])
        if raw.answer(stream, 2 * SECONDS) is None:
            raw.send(stream, NOTHING[20:], last=True)
        return answered(scene, raw, stream)


def connect(study: Study, silo: str, *, deaf: bool = False) -> Raw:
    """A silo's connection, made by hand."""
    root = study.consortium.authority.certificate_pem
    return Raw(study.server.port, study.pair(silo), root, deaf=deaf)


def answered(scene: Scene, raw: Raw, stream: int) -> bool:
    """Whether a call about nobody's session came as far as to be refused as such."""
    answer = raw.answer(stream) or {"grpc-status": str(grpc.StatusCode.UNAVAILABLE.value[0])}
    code = answer.get("secagg-code") or STATUS.get(answer.get("grpc-status", ""), "reset")
    scene.refuse(code, observed=answer.get("grpc-message", ""))
    return code == "session-unknown"


# Disk, and what is kept.


def upload(study: Study, silo: str, task: str, total: int) -> None:
    """Begin to upload a task's initial weights, as the silo that was asked for them."""
    study.call(silo, "OpenTask", api.OpenTaskRequest, task=task)
    chunk = {"blob": api.Blob(weights=task), "total": total, "data": bytes(CHUNK)}
    study.call(silo, "PutChunk", api.PutChunkRequest, **chunk)


def tasks(count: int) -> tuple[TaskConfig, ...]:
    """So many tasks."""
    (first,) = make_session().tasks
    return (first, *(replace(first, name=f"{TASK}-{i}") for i in range(1, count)))


def on_disk(server: Serving) -> int:
    """Bytes of the sessions' files."""
    files = (server.directory / "state" / "sessions").rglob("*")
    return sum(file.stat().st_size for file in files if file.is_file())


ROOMY: Final = replaced("secagg.coordinator.session:check_room", nothing)


@attack(threat="uploads-begun", reason="quota-uploads", weakening=ROOMY)
def uploads_that_never_end(scene: Scene) -> bool:
    """Silo a begins upload after upload and ends none."""
    with studying(scene, tasks=tasks(UPLOADS + 1)) as study:
        for task in study.session.tasks:
            upload(study, "a", task.name, 2 * CHUNK)
        held = study.server.directory / "state" / "sessions" / study.session_id.hex()
        return sum(file.stat().st_size == 2 * CHUNK for file in held.rglob("*")) > UPLOADS


@attack(threat="full-disk", reason="quota-spool-silo", weakening=ROOMY)
def disk_of_one_silo(scene: Scene) -> bool:
    """Silo b has the coordinator keep more for it than one silo may."""
    with studying(scene, tasks=tasks(2)) as study:
        for task in study.session.tasks:
            tried(scene, lambda task=task: upload(study, "b", task.name, WEIGHTS))
        return on_disk(study.server) > ONE_SILO


@attack(threat="full-disk", reason="quota-spool", weakening=ROOMY)
def disk_of_all_silos(scene: Scene) -> bool:
    """Three silos, each within what is its own, fill the coordinator's disk together."""
    with studying(scene, tasks=tasks(3)) as study:
        for silo, task in zip("abc", study.session.tasks, strict=True):
            tried(scene, lambda s=silo, t=task: upload(study, s, t.name, WEIGHTS))
        return on_disk(study.server) > ALL_SILOS


def of_any_size(_real: Function) -> Function:
    """``Session.weights_upload`` for weights of any size."""

    def weights_upload(self: Any, silo: str, task: str, total: int, now: float) -> Any:
        proposal = self._proposals[task]
        proposal.upload = self._upload(self.weights_name(task), total, proposal.upload)
        return proposal.upload

    return weights_upload


@attack(
    threat="huge-weights",
    reason="weights-size",
    weakening=replaced("secagg.coordinator.session:Session.weights_upload", of_any_size),
)
def huge_initial_weights(scene: Scene) -> bool:
    """The silo that is asked for a task's initial weights declares more than any model has."""
    with studying(scene) as study:
        tried(scene, lambda: upload(study, "a", TASK, 4 * WEIGHTS))
        return on_disk(study.server) >= 4 * WEIGHTS


@attack(
    threat="sessions-without-end",
    reason="quota-sessions",
    weakening=replaced("secagg.coordinator.sessions:Sessions._check_quota", nothing),
)
def sessions_without_end(scene: Scene) -> bool:
    """An admin creates session after session and ends none."""
    with ExitStack() as held:
        studies = [held.enter_context(studying(scene)) for _ in range(SESSIONS + 1)]
        listed = studies[0].admin("ListSessions", api.ListSessionsRequest(), "Admin").sessions
        alive = {
            session.name for session in listed if session.state not in (State.ABORTED, State.DONE)
        }
        return {study.session.name for study in studies} <= alive


@attack(
    threat="journal-growth",
    reason="ready-changes",
    weakening=replaced("secagg.coordinator.session:Session._count_change", nothing),
)
def journal_without_end(scene: Scene) -> bool:
    """Silo a changes its mind about what it is ready for, and each time a line is written."""
    with (
        scene.stage.serving(scene.weakening) as server,
        Study(scene, server, make_session(tasks=tasks(2))) as study,
    ):
        bases = {}
        for task in study.session.tasks:
            study.open_task(task=task.name)
            bases[task.name] = study.base
        before = journalled(server)
        for _ in range(CHANGES // 2 + 1):
            for task, base in bases.items():
                study.call("a", "Ready", api.ReadyRequest, task=task, base=base)
        return journalled(server) - before > CHANGES


def journalled(server: Serving) -> int:
    """Rows of the coordinator's journal."""
    file = server.directory / "state" / DATABASE
    with closing(sqlite3.connect(f"file:{file}?mode=ro", uri=True)) as journal:
        (count,) = journal.execute("SELECT count(*) FROM records").fetchone()
    return int(count)


# Connections, before any handler of ours is called.


def unbounded(real: Function, option: str, value: int) -> Function:
    """gRPC's options with one of them so high that it bounds nothing."""

    def transport(limits: Any) -> list[tuple[str, int]]:
        return [*(given for given in real(limits) if given[0] != option), (option, value)]

    return transport


def without_bound(option: str, value: int = 2**31 - 2) -> Weakening:
    """A coordinator that does not set this option of gRPC's."""
    return replaced("secagg.coordinator.server:transport", unbounded, option, value)


ANY_LENGTH: Final = without_bound("grpc.max_receive_message_length", -1)


@contextmanager
def connecting(scene: Scene) -> Iterator[Study]:
    """A study at the coordinator of small transport limits; no session is created."""
    with scene.stage.serving(scene.weakening, settings=TRANSPORT, from_start=True) as server:
        yield Study(scene, server)


@attack(
    threat="metadata-flood",
    reason="metadata-size",
    weakening=replaced("secagg.coordinator.servicer:_check_headers", nothing),
)
def headers_without_end(scene: Scene) -> bool:
    """Silo a sends large headers over a connection that never acknowledged gRPC's own limit."""
    with studying(scene) as study, connect(study, "a", deaf=True) as raw:
        stream = raw.call("ListResults", {"x-more": "x" * 2**16})
        raw.send(stream, NOTHING, last=True)
        return answered(scene, raw, stream)


@attack(threat="length-bomb", reason="RESOURCE_EXHAUSTED", weakening=ANY_LENGTH)
def message_of_two_gigabytes(scene: Scene) -> bool:
    """Silo b declares a message of 2 GiB, and has the coordinator hold all of it that has come."""
    with connecting(scene) as study, connect(study, "b") as raw:
        before, sent = resident("VmRSS", study.server.process.pid), bytes(BOMB)
        stream = raw.call("PutChunk")
        taken = raw.send(stream, frame(sent, declared=2**31 - 1))
        if stream in raw.ended:
            answered(scene, raw, stream)
        return taken > BOMB and resident("VmRSS", study.server.process.pid) - before > BOMB // 2


@attack(threat="length-bomb", reason="RESOURCE_EXHAUSTED", weakening=ANY_LENGTH)
def message_beyond_a_chunk(scene: Scene) -> bool:
    """Silo c sends one whole message that is larger than any that the contract has."""
    with connecting(scene) as study:
        request = api.PutChunkRequest(session_id=NOBODYS, total=1, data=bytes(BOMB))
        stub = study.member("c").stub("PutChunk")
        return tried(scene, lambda: stub(request, timeout=30.0)) == "session-unknown"


@attack(
    threat="half-open-handshakes",
    reason="handshake-closed",
    weakening=without_bound("grpc.server_handshake_timeout_ms"),
)
def handshakes_that_never_end(scene: Scene) -> bool:
    """Somebody on the network connects, says nothing, and holds descriptors for good."""
    with connecting(scene) as study, ExitStack() as held:
        address = ("127.0.0.1", study.server.port)
        silent = [socket.create_connection(address) for _ in range(CONNECTIONS // 2)]
        for one in silent:
            held.callback(one.close)
            one.settimeout(0.1)
        end = time.monotonic() + 2 * SECONDS
        while time.monotonic() < end and (silent := [one for one in silent if not _closed(one)]):
            pass
        if not silent:
            scene.refuse("handshake-closed")
        return len(silent) == CONNECTIONS // 2


def _closed(connection: socket.socket) -> bool:
    try:
        return not connection.recv(1)
    except TimeoutError:
        return False
    except OSError:
        return True


@attack(
    threat="connection-storm",
    reason="connection-closed",
    weakening=without_bound("grpc.max_allowed_incoming_connections"),
)
def connections_without_end(scene: Scene) -> bool:
    """Silo d opens connection after connection, each with its handshake, and keeps them all."""
    with connecting(scene) as study, ExitStack() as held:
        for count in range(2 * CONNECTIONS):
            try:
                held.enter_context(connect(study, "d"))
            except OSError as error:
                code = "connection-closed" if count == CONNECTIONS else f"closed-after-{count}"
                raise scene.refuse(code, observed=str(error)) from None
        return True  # all of them shook hands and have the server's settings


@attack(
    threat="stream-flood",
    reason="reset",
    weakening=without_bound("grpc.max_concurrent_streams"),
)
def streams_without_end(scene: Scene) -> bool:
    """Silo e begins calls over one connection without regard to how many it was allowed."""
    with connecting(scene) as study, connect(study, "e") as raw:
        raw.forget_limits()
        streams = [raw.call("ListResults") for _ in range(4 * STREAMS)]
        for stream in streams:
            raw.send(stream, NOTHING, last=True)
        return [answered(scene, raw, stream) for stream in streams].count(True) > STREAMS
