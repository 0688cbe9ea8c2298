"""Checkpoints that silos leave for each other: who waits, whose are taken, and what goes when."""

from __future__ import annotations

import math
import os
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from secagg.config import Protection, SiloId
from secagg.coordinator import calls
from secagg.coordinator.bridges import SHOW_SECONDS, STALL_SECONDS, WISH_SECONDS
from secagg.crypto.digest import vector_digest
from secagg.errors import (
    FaultyClient,
    MalformedMessage,
    NotFound,
    QuotaExceeded,
    RoleRefused,
    SecaggError,
    SessionEnded,
    TooLate,
)
from secagg.masking.transcript import opening_transcript
from secagg.wire._pb import service_pb2 as api
from secagg.wire.custody import SignedCheckpoint, checkpoint_from_wire, checkpoint_to_wire

from .play import TASK, World

A, B, C, D, E = (SiloId(name) for name in "abcde")
SIZE = 200
CHUNK = 64


@pytest.fixture
def world(tmp_path: Path) -> World:
    """Five silos after two results, under a key that all have."""
    world = World(
        tmp_path / "session", "abcde", protection=Protection.CKKS, chunk_bytes=CHUNK, max_attempts=9
    )
    world.make_key()
    for _ in range(2):
        world.release()
    return world


def refused(kind: type[SecaggError], code: str) -> AbstractContextManager[Any]:
    return pytest.raises(kind, check=lambda e: type(e) is kind and e.code == code)


def ask(
    world: World, name: str = "d", results: int = 0, need: int = 2, without: str = ""
) -> list[tuple[str, int]]:
    """A silo asks; whose checkpoints it gets, and after how many results."""
    found = world.session.ask_checkpoint(SiloId(name), TASK, results, need, without, world.now)
    return [(checkpoint.sender, checkpoint.results) for checkpoint in found]


def wanted(world: World, name: str) -> list[tuple[str, int]]:
    return world.session.checkpoints_wanted(SiloId(name), world.now)


def signed(world: World, name: str, data: bytes, results: int, **changes: Any) -> SignedCheckpoint:
    values: dict[str, Any] = {
        "task": TASK,
        "results": results,
        "sender": name,
        "size": len(data),
        "digest": vector_digest(data, CHUNK),
        "identity": world.keys[name],
        "transcript": opening_transcript(world.session.session_hash, world.session_id),
    }
    return SignedCheckpoint.sign(**values | changes)


def put(world: World, name: str, data: bytes, chunks: range | None = None) -> None:
    """A silo uploads its checkpoint, or some chunks of it."""
    digest = vector_digest(data, CHUNK)
    for number in chunks or range(-(-len(data) // CHUNK)):
        upload = world.session.checkpoint_upload(SiloId(name), TASK, digest, len(data), world.now)
        upload.put(number * CHUNK, data[number * CHUNK : (number + 1) * CHUNK])


def offer(world: World, name: str, results: int = 2, data: bytes | None = None) -> SignedCheckpoint:
    """A silo uploads a checkpoint and signs it."""
    data = data or os.urandom(SIZE)
    put(world, name, data)
    checkpoint = signed(world, name, data, results)
    world.session.offer_checkpoint(SiloId(name), checkpoint)
    return checkpoint


def blob(world: World, checkpoint: SignedCheckpoint, silo: str = "d") -> bytes:
    """A silo fetches a checkpoint."""
    stored = world.session.checkpoint_blob(
        SiloId(silo), TASK, checkpoint.sender, checkpoint.digest, world.now
    )
    return b"".join(stored.chunk(at) for at in range(0, checkpoint.size, CHUNK))


def files(world: World) -> list[str]:
    return world.means.disk.names(f"{world.session.folder}/bridges")


# Wishes and offers.


def test_a_silo_gets_all_offers_once_enough_are_alike(world: World) -> None:
    assert ask(world) == []
    data = os.urandom(SIZE)
    first = offer(world, "a", 1, data)
    assert ask(world) == []
    offer(world, "b", 2)
    assert ask(world) == []  # two, but not after the same results
    offer(world, "c", 1)
    assert ask(world) == [("a", 1), ("c", 1), ("b", 2)]
    assert blob(world, first) == data
    assert ask(world, results=1) == []
    offer(world, "a", 2)
    assert ask(world, results=1) == [("a", 2), ("b", 2)]


@pytest.mark.parametrize(
    ("results", "need", "without"), [(2, 2, ""), (9, 2, ""), (0, 0, ""), (0, 5, ""), (0, 2, "z")]
)
def test_a_wish_that_nobody_could_serve(
    world: World, results: int, need: int, without: str
) -> None:
    with refused(FaultyClient, "checkpoint-wish"):
        ask(world, "d", results, need, without)


def test_a_wish_for_no_task_of_the_session(world: World) -> None:
    with refused(NotFound, "task-unknown"):
        world.session.ask_checkpoint(D, "tasks", 0, 2, (), world.now)


def test_a_session_that_does_not_seal_needs_no_bridge(tmp_path: Path) -> None:
    world = World(tmp_path / "session")
    with refused(FaultyClient, "key-unused"):
        ask(world)


def test_others_are_told_of_a_wish_who_can_still_serve_it(world: World) -> None:
    ask(world)
    assert (wanted(world, "a"), wanted(world, "d")) == ([(TASK, 0)], [])
    offer(world, "a")
    world.now += SHOW_SECONDS
    assert (wanted(world, "a"), wanted(world, "b")) == ([], [(TASK, 0)])
    offer(world, "b")
    world.now += SHOW_SECONDS - 1
    assert [wanted(world, name) for name in "abce"] == [[]] * 4
    ask(world, without="b")  # its was no use
    assert [wanted(world, name) for name in "abce"] == [[], [], [(TASK, 0)], [(TASK, 0)]]
    ask(world, without="bc")
    assert [wanted(world, name) for name in "abce"] == [[], [], [], [(TASK, 0)]]


def test_several_wishes_are_told_as_one(world: World) -> None:
    ask(world, "d", 1)
    ask(world, "e", 0)
    assert wanted(world, "a") == [(TASK, 0)]
    assert wanted(world, "e") == [(TASK, 1)]


def test_who_has_offered_is_asked_again_where_others_went_on(world: World) -> None:
    """Else two silos would wait side by side, each with one checkpoint after other results."""
    ask(world)
    offer(world, "a", 1)
    world.now += SHOW_SECONDS
    assert wanted(world, "a") == []
    offer(world, "b", 2)
    assert wanted(world, "a") == [(TASK, 1)]
    offer(world, "a", 2)
    assert ask(world) == [("a", 2), ("b", 2)]


def test_a_wish_is_told_once_and_again_after_a_while(world: World) -> None:
    """Who cannot help is not kept from waiting for other requests by it."""
    request = api.AwaitKeyRequestsRequest(session_id=world.session_id)
    assert world.key is not None
    request.key.epoch, request.key.key_id = world.key.epoch, world.key.key_id

    def waiting() -> int:
        reply: Any = calls.METHODS["AwaitKeyRequests"].handle(world.session, request, A, world.now)
        return 0 if reply is None else len(reply.checkpoints)

    ask(world)
    assert [waiting() for _ in range(3)] == [1, 0, 0]
    told = []
    for _ in range(4):
        ask(world)
        ask(world, without="b")  # back and forth is no news, nor keeps it anybody busy
        told.append((waiting(), world.tick()))
    assert told == [(1, 1), (0, 0), (0, 0), (0, 0)]
    world.now += SHOW_SECONDS
    ask(world)
    assert [waiting() for _ in range(3)] == [1, 0, 0]


def test_who_waits_looks_again_when_somebody_asks(world: World) -> None:
    ask(world)
    assert (world.tick(), world.tick()) == (1, 0)
    ask(world)
    assert world.tick() == 0
    ask(world, need=3)
    assert world.tick() == 1
    ask(world, need=2)
    assert world.tick() == 0


# What an offer has to be.


def test_an_offer_that_goes_beyond_nobody_s_wish(world: World) -> None:
    with refused(TooLate, "checkpoint-unwanted"):
        put(world, "a", os.urandom(SIZE))
    ask(world, results=1)
    with refused(TooLate, "checkpoint-unwanted"):
        put(world, "d", os.urandom(SIZE))  # its own wish
    with refused(TooLate, "checkpoint-unwanted"):
        offer(world, "a", 1)
    offer(world, "a", 2)
    with refused(TooLate, "checkpoint-unwanted"):
        offer(world, "a", 2)  # a second time: the first one stays
    with refused(TooLate, "checkpoint-unwanted"):
        world.session.offer_checkpoint(B, signed(world, "b", bytes(9), 1))
    with refused(FaultyClient, "checkpoint-results"):
        offer(world, "b", 3)


def test_an_offer_that_is_not_what_was_uploaded(world: World) -> None:
    ask(world)
    data = os.urandom(SIZE)
    session = world.session
    with refused(FaultyClient, "chunk-gap"):
        session.offer_checkpoint(A, signed(world, "a", data, 2))
    put(world, "a", data, range(2))
    with refused(FaultyClient, "chunk-gap"):
        session.offer_checkpoint(A, signed(world, "a", data, 2))
    put(world, "a", data)
    with refused(FaultyClient, "chunk-gap"):
        session.offer_checkpoint(A, signed(world, "a", data, 2, size=SIZE + 1))
    with refused(FaultyClient, "checkpoint-digest"):
        session.offer_checkpoint(A, signed(world, "a", data, 2, digest=bytes(32)))
    with refused(FaultyClient, "message-signature"):
        session.offer_checkpoint(A, signed(world, "a", data, 2, identity=world.keys["b"]))
    with refused(NotFound, "task-unknown"):
        session.offer_checkpoint(A, signed(world, "a", data, 2, task="tasks"))
    session.offer_checkpoint(A, signed(world, "a", data, 2))


def test_a_checkpoint_larger_than_is_taken(world: World) -> None:
    ask(world)
    for size in (0, world.means.limits.max_weights_bytes + 1):
        with refused(QuotaExceeded, "checkpoint-size"):
            world.session.checkpoint_upload(A, TASK, bytes(32), size, world.now)


# Files.


def test_an_upload_never_touches_what_can_be_served(world: World) -> None:
    """One name for two uploads let a silo damage an offer, and end the coordinator's process."""
    ask(world)
    data = os.urandom(SIZE)
    first = offer(world, "a", 1, data)
    offer(world, "b", 2)
    put(world, "a", os.urandom(SIZE), range(1))  # same silo, same task, same size
    assert blob(world, first) == data
    assert len(files(world)) == 3
    put(world, "a", other := os.urandom(SIZE))
    assert (blob(world, first), len(files(world))) == (data, 3)
    stored = world.session.checkpoint_blob(D, TASK, "a", first.digest, world.now)
    second = signed(world, "a", other, 2)
    world.session.offer_checkpoint(A, second)
    with refused(NotFound, "checkpoint-unknown"):
        blob(world, first)  # replaced: unknown, and neither damaged nor another one's bytes
    with refused(NotFound, "session-unknown"):
        stored.chunk(0)
    with refused(NotFound, "checkpoint-unknown"):
        calls._get_offer(stored, 0)
    with refused(NotFound, "chunk-offset"):
        calls._get_offer(stored, 1)
    assert blob(world, second) == other
    assert len(files(world)) == 2


def test_a_silo_that_begins_anew(world: World) -> None:
    """Its process was started again and has sealed its checkpoint once more."""
    ask(world)
    put(world, "a", os.urandom(SIZE))
    data = os.urandom(SIZE)
    checkpoint = offer(world, "a", 2, data)
    assert (blob(world, checkpoint), len(files(world))) == (data, 1)


def test_uploads_of_silos_that_lost_go(world: World) -> None:
    ask(world)
    put(world, "c", data := os.urandom(SIZE), range(3))
    late = world.session.checkpoint_upload(C, TASK, vector_digest(data, CHUNK), SIZE, world.now)
    put(world, "e", os.urandom(SIZE), range(1))
    offer(world, "a")
    assert len(files(world)) == 3
    offer(world, "b")
    assert len(files(world)) == 2
    with refused(TooLate, "phase-closed"):
        late.put(3 * CHUNK, data[3 * CHUNK :])
    with refused(TooLate, "checkpoint-unwanted"):
        put(world, "c", data)


def test_so_many_uploads_at_once_and_who_stalls_makes_room(tmp_path: Path) -> None:
    world = World(tmp_path / "s", "abcdef", protection=Protection.CKKS, chunk_bytes=CHUNK)
    world.make_key()
    world.release()
    ask(world, "f", need=1)
    for name in "ab":
        put(world, name, os.urandom(SIZE), range(1))
    with refused(QuotaExceeded, "checkpoint-uploads"):
        put(world, "c", os.urandom(SIZE))
    put(world, "a", os.urandom(SIZE), range(1))  # one's own place
    half = os.urandom(SIZE)
    put(world, "b", half, range(1))
    for _ in range(4):
        world.now += STALL_SECONDS / 4
        ask(world, "f", need=1)
        put(world, "b", half, range(1))
        world.tick()
    assert len(files(world)) == 1  # a has stalled, b has not
    offer(world, "c", 1)
    assert ask(world, "f", need=1) == [("c", 1)]


# Time.


def test_a_wish_that_is_not_renewed_goes_with_all_that_was_for_it(world: World) -> None:
    """And who fetches what it was told still waits."""
    ask(world)
    first = offer(world, "a")
    offer(world, "b")
    for _ in range(3):
        world.now += WISH_SECONDS - 1
        world.tick()
        assert len(blob(world, first)) == SIZE
    assert world.session.due() == world.now + WISH_SECONDS
    world.now += WISH_SECONDS
    world.tick()
    assert files(world) == []
    assert math.isinf(world.session.due())
    with refused(NotFound, "checkpoint-unknown"):
        blob(world, first)
    assert wanted(world, "a") == []


def test_offers_stay_for_the_others_who_wait(world: World) -> None:
    ask(world, "d")
    ask(world, "e")
    first = offer(world, "a")
    world.now += WISH_SECONDS / 2
    ask(world, "e")
    world.now += WISH_SECONDS / 2
    world.tick()
    assert len(blob(world, first, "e")) == SIZE
    assert len(blob(world, first, "c")) == SIZE  # who waits for nothing renews nothing
    assert world.session.due() == world.now + WISH_SECONDS


def test_a_silo_that_left_the_consortium(world: World) -> None:
    ask(world, "d")
    ask(world, "e")
    offer(world, "a")
    put(world, "b", os.urandom(SIZE), range(1))
    world.without("a", "b", "e")
    world.tick()  # the epoch ends first
    world.tick()
    assert files(world) == []
    assert wanted(world, "d") == []
    assert ask(world, "d") == []


def test_after_a_restart_whoever_waits_asks_again(world: World) -> None:
    ask(world)
    first = offer(world, "a")
    put(world, "b", os.urandom(SIZE), range(1))
    rows = len(world.journal.load()[world.session_id])
    world.restart()
    assert files(world) == []
    assert len(world.journal.load()[world.session_id]) == rows
    with refused(NotFound, "checkpoint-unknown"):
        blob(world, first)
    assert wanted(world, "a") == []
    assert ask(world) == []
    assert wanted(world, "a") == [(TASK, 0)]  # though it was told before
    offer(world, "a")
    offer(world, "b")
    assert ask(world) == [("a", 2), ("b", 2)]


@pytest.mark.parametrize("how", ["abort", "done"])
def test_the_end_of_the_session_removes_everything(world: World, how: str) -> None:
    ask(world)
    checkpoint = offer(world, "a")
    put(world, "b", os.urandom(SIZE), range(1))
    if how == "abort":
        world.session.abort()
    else:
        world.release()
        world.open("statistics")
        for _ in range(2):
            assert len(files(world)) == 2
            world.now = 1000.0
            world.release(task="statistics")
    assert files(world) == []
    assert math.isinf(world.session.due())
    with refused(NotFound, "checkpoint-unknown"):
        blob(world, checkpoint)
    with refused(SessionEnded, "session-over"):
        ask(world)
    with refused(SessionEnded, "session-over"):
        put(world, "c", os.urandom(SIZE))
    with refused(SessionEnded, "session-over"):
        world.session.offer_checkpoint(C, signed(world, "c", bytes(9), 2))


# The contract.


def call(world: World, method: str, request: Any, silo: str) -> Any:
    """Call a method as the servicer does."""
    reply = calls.METHODS[method].handle(world.session, request, SiloId(silo), world.now)
    return reply() if callable(reply) else reply


def test_a_checkpoint_over_the_wire(world: World) -> None:
    wish = api.CheckpointWish(task=TASK, results=0, need=2)
    request = api.AskCheckpointRequest(session_id=world.session_id, wish=wish, refused=["e"])
    assert call(world, "AskCheckpoint", request, "d") is None
    blobs = {}
    for name in "ab":
        data = os.urandom(SIZE)
        checkpoint = signed(world, name, data, 2)
        place = api.Blob.Checkpoint(task=TASK, sender=name, digest=checkpoint.digest)
        for at in range(0, SIZE, CHUNK):
            chunk = api.PutChunkRequest(
                blob=api.Blob(checkpoint=place), offset=at, total=SIZE, data=data[at : at + CHUNK]
            )
            with refused(RoleRefused, "sender-identity"):
                call(world, "PutChunk", chunk, "c")
            call(world, "PutChunk", chunk, name)
        offered = api.OfferCheckpointRequest(checkpoint=checkpoint_to_wire(checkpoint))
        with refused(RoleRefused, "sender-identity"):
            call(world, "OfferCheckpoint", offered, "c")
        call(world, "OfferCheckpoint", offered, name)
        blobs[name] = (place, data)
    reply = call(world, "AskCheckpoint", request, "d")
    assert [checkpoint_from_wire(m).sender for m in reply.checkpoints] == ["a", "b"]
    for place, data in blobs.values():
        got = [
            call(
                world,
                "GetChunk",
                api.GetChunkRequest(blob=api.Blob(checkpoint=place), offset=at),
                "d",
            ).data
            for at in range(0, SIZE, CHUNK)
        ]
        assert b"".join(got) == data
    place.digest = bytes(32)
    with refused(NotFound, "checkpoint-unknown"):
        call(world, "GetChunk", api.GetChunkRequest(blob=api.Blob(checkpoint=place)), "d")
    with refused(MalformedMessage, "checkpoint-size"):
        call(world, "OfferCheckpoint", api.OfferCheckpointRequest(), "a")
