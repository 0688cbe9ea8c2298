"""Each check at each call that makes it: another call's, or a later one's, is no excuse."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from secagg.config import Phase, Protection, SiloId
from secagg.coordinator.calls import METHODS
from secagg.coordinator.identity import IdentityRefused, caller
from secagg.coordinator.limits import Limits
from secagg.coordinator.records import parse
from secagg.coordinator.retrace import restore
from secagg.coordinator.sessions import Sessions
from secagg.crypto.digest import vector_digest
from secagg.errors import (
    FaultyClient,
    MalformedMessage,
    NotFound,
    QuotaExceeded,
    RoleRefused,
    SecaggError,
    SessionEnded,
    StaleKey,
    StorageDamaged,
)
from secagg.masking.transcript import opening_transcript
from secagg.suite import KeyName
from secagg.wire import attempt as wire
from secagg.wire import custody as wire_custody
from secagg.wire import session as wire_session
from secagg.wire._pb import service_pb2 as api
from secagg.wire.custody import SignedCheckpoint

from .play import SEALED_LENGTH, SUMS, TASK, World
from .test_keys import box

A, B = SiloId("a"), SiloId("b")
SIZE = 100
VECTOR = 8 * SEALED_LENGTH
NOWHERE = "nowhere"


@pytest.fixture
def world(tmp_path: Path) -> World:
    """A sealed session with a key and one result, in which d waits for a checkpoint."""
    world = World(tmp_path / "session", protection=Protection.CKKS_MASKED)
    world.make_key()
    world.release()
    world.session.ask_checkpoint(SiloId("d"), TASK, 0, 1, (), world.now)
    return world


def refused(kind: type[SecaggError], code: str) -> AbstractContextManager[Any]:
    return pytest.raises(kind, check=lambda e: type(e) is kind and e.code == code)


def checkpoint(world: World, sender: str = "a", task: str = TASK) -> SignedCheckpoint:
    digest = vector_digest(bytes(SIZE), world.config.chunk_bytes)
    tau = opening_transcript(world.session.session_hash, world.session_id)
    return SignedCheckpoint.sign(task, 1, sender, SIZE, digest, world.keys[sender], tau)


# Whoever calls speaks for itself.


def opening_of_b(world: World) -> Any:
    return api.ProposeTaskRequest(opening=wire_session.opening_to_wire(world.signed("b")))


def key_request_of_b(world: World) -> Any:
    return api.AskKeyRequest(request=wire_custody.request_to_wire(world.wish("b")))


def key_box_of_b(world: World) -> Any:
    assert world.key is not None
    made = box("b", world.wish("d"), world.key)
    return api.SendKeyBoxRequest(box=wire_custody.box_to_wire(made))


def checkpoint_of_b(world: World) -> Any:
    return api.OfferCheckpointRequest(
        checkpoint=wire_custody.checkpoint_to_wire(checkpoint(world, "b"))
    )


def chunk_of_b(world: World) -> Any:
    place = api.Blob.Checkpoint(task=TASK, sender="b", digest=bytes(32))
    return api.PutChunkRequest(blob=api.Blob(checkpoint=place), total=SIZE, data=bytes(SIZE))


def message_of_b(world: World) -> Any:
    world.start()
    player = world.players["b"]
    message = player.answer(player.look())
    return wire.client_message_to_wire(
        message, session_id=world.session_id, round_number=world.session.round, attempt=1
    )


@pytest.mark.parametrize(
    ("method", "make"),
    [
        ("ProposeTask", opening_of_b),
        ("AskKey", key_request_of_b),
        ("SendKeyBox", key_box_of_b),
        ("OfferCheckpoint", checkpoint_of_b),
        ("PutChunk", chunk_of_b),
        ("Send", message_of_b),
    ],
)
def test_nobody_speaks_for_another(world: World, method: str, make: Callable[[World], Any]) -> None:
    with refused(RoleRefused, "sender-identity"):
        METHODS[method].handle(world.session, make(world), A, world.now)


@pytest.mark.parametrize(
    ("method", "request_"),
    [
        ("PutChunk", api.PutChunkRequest(blob=api.Blob(sum=1), total=SIZE, data=bytes(SIZE))),
        ("GetChunk", api.GetChunkRequest(blob=api.Blob(vector=api.Blob.Vector(round=1)))),
    ],
)
def test_a_blob_goes_one_way(world: World, method: str, request_: Any) -> None:
    with refused(MalformedMessage, "blob-kind"):
        METHODS[method].handle(world.session, request_, A, world.now)


# A session that is over, and a task that it does not have.


@pytest.mark.parametrize(
    "call",
    [
        lambda world: world.session.open_task(A, SUMS, world.now),
        lambda world: world.session.propose_task(A, world.signed(task=SUMS)),
        lambda world: world.session.weights_upload(A, SUMS, SIZE, world.now),
        lambda world: world.session.ask_key(A, world.wish("a", 1), world.now),
        lambda world: world.session.ready(A, TASK, world.session.base(TASK), world.now, world.key),
        lambda world: world.session.vector_upload(A, 2, 1, VECTOR),
    ],
)
def test_a_session_that_is_over_takes_nothing(world: World, call: Callable[[World], Any]) -> None:
    world.session.abort()
    with refused(SessionEnded, "session-over"):
        call(world)


@pytest.mark.parametrize(
    "call",
    [
        lambda world: world.session.open_task(A, NOWHERE, world.now),
        lambda world: world.session.propose_task(A, world.signed(task=NOWHERE)),
        lambda world: world.session.weights_upload(A, NOWHERE, SIZE, world.now),
        lambda world: world.session.ask_checkpoint(A, NOWHERE, 0, 1, (), world.now),
        lambda world: world.session.checkpoint_upload(A, NOWHERE, bytes(32), SIZE, world.now),
        lambda world: world.session.offer_checkpoint(A, checkpoint(world, task=NOWHERE)),
    ],
)
def test_a_task_that_the_session_does_not_have(world: World, call: Callable[[World], Any]) -> None:
    with refused(NotFound, "task-unknown"):
        call(world)


# Signatures, keys, room.


@pytest.mark.parametrize(
    "call",
    [
        lambda world: (
            world.session.open_task(A, SUMS, world.now),
            world.session.propose_task(A, replace(world.signed(task=SUMS), signature=bytes(64))),
        ),
        lambda world: world.session.ask_key(
            B, replace(world.wish("b"), signature=bytes(64)), world.now
        ),
        lambda world: world.session.offer_checkpoint(
            A, replace(checkpoint(world), signature=bytes(64))
        ),
    ],
)
def test_a_signature_that_does_not_hold(world: World, call: Callable[[World], Any]) -> None:
    with refused(FaultyClient, "message-signature"):
        call(world)


@pytest.mark.parametrize(
    "call",
    [
        lambda world, key: world.ready_with(key),
        lambda world, key: world.session.next(A, 2, 0, 0, key),
        lambda world, key: world.session.key_requests(A, key),
        lambda world, key: world.session.send_key_box(B, box("b", world.wish("d"), key)),
    ],
)
def test_a_key_that_is_not_the_newest(world: World, call: Callable[[World, KeyName], Any]) -> None:
    with refused(StaleKey, "key-stale"):
        call(world, KeyName(1, os.urandom(32)))


def proposed(world: World) -> None:
    world.session.open_task(A, SUMS, world.now)
    world.session.weights_upload(A, SUMS, SIZE, world.now)


def offered(world: World) -> None:
    world.session.checkpoint_upload(A, TASK, bytes(32), SIZE, world.now)


def sent(world: World) -> None:
    world.start()
    world.phases(2)
    world.session.vector_upload(A, 2, 1, VECTOR)


@pytest.mark.parametrize("upload", [proposed, offered, sent])
def test_every_upload_needs_room(world: World, upload: Callable[[World], Any]) -> None:
    limits = Limits(max_weights_bytes=1000, spool_bytes_per_silo=SIZE - 1)
    world.session.means = replace(world.means, limits=limits)
    with refused(QuotaExceeded, "quota-spool-silo"):
        upload(world)


# What was written down.


def created_again(rows: list[bytes]) -> list[bytes]:
    return [*rows, rows[0]]


def of_no_kind(rows: list[bytes]) -> list[bytes]:
    return [*rows, b""]


def under_another_manifest(rows: list[bytes]) -> list[bytes]:
    records = [parse(row) for row in rows]
    for record in records:
        if record.HasField("attempt_opened"):
            record.attempt_opened.members.version += 1
    return [record.SerializeToString() for record in records]


def of_another_phase(rows: list[bytes]) -> list[bytes]:
    records = [parse(row) for row in rows]
    for record in records:
        if record.HasField("phase_closed"):
            record.phase_closed.phase = Phase.UNMASKING
    return [record.SerializeToString() for record in records]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (created_again, "was created twice"),
        (of_no_kind, "of no kind that this version knows"),
        (under_another_manifest, "has another manifest"),
        (of_another_phase, "closes a phase that is not open"),
    ],
)
def test_records_that_make_no_session(
    tmp_path: Path, change: Callable[[list[bytes]], list[bytes]], says: str
) -> None:
    world = World(tmp_path / "session")
    world.start()
    world.phases(2)
    rows = world.journal.load()[world.session_id]
    with pytest.raises(StorageDamaged, match=says):
        restore(change(rows), world.means, world.now)


def test_a_session_begins_with_its_creation(tmp_path: Path) -> None:
    world = World(tmp_path / "session")
    rows = world.journal.load()[world.session_id]
    another = os.urandom(32)
    world.journal.append(another, rows[0], lasting=True)
    with pytest.raises(StorageDamaged, match="has no beginning"):
        Sessions(world.means).restore(world.now)


@pytest.mark.parametrize("pems", [(), (b"one", b"another")])
def test_a_caller_has_one_certificate(pems: tuple[bytes, ...]) -> None:
    context = SimpleNamespace(auth_context=lambda: {"x509_pem_cert": list(pems)})
    with refused(IdentityRefused, "identity-no-certificate"):
        caller(cast(Any, context), lambda: pytest.fail("looked further"))
