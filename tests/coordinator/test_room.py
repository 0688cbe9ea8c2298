"""Room on the coordinator's disk: sessions that are over make it, active ones keep their own."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import pytest

from secagg.config import Protection, SiloId
from secagg.coordinator.journal import MemoryJournal
from secagg.coordinator.quotas import TryLater
from secagg.coordinator.session import Session
from secagg.coordinator.sessions import Sessions
from secagg.coordinator.spool import Upload
from secagg.coordinator.state import State
from secagg.crypto.digest import vector_digest
from secagg.errors import NotFound, StorageFailed
from secagg.wire import session as wire_session
from secagg.wire._pb import service_pb2 as api

from .play import CHUNK, LENGTH, TASK, World
from .serving import Consortium, Study, refused, serving
from .test_limits import all_of, held, refusal, upload_weights
from .test_restart import open_with_weights

A, B = SiloId("a"), SiloId("b")
SUM = 4 * LENGTH


def named(world: World, name: str) -> api.SessionConfig:
    """The world's session under another name."""
    message = wire_session.config_to_wire(world.config)
    message.name = name
    return message


def another(sessions: Sessions, world: World, name: str) -> Session:
    """A session beside the world's, with silo a asked to open its task."""
    session = sessions.create(named(world, name))
    assert session.open_task(A, TASK, world.now) is True
    return session


def over(sessions: Sessions, world: World, name: str, size: int) -> Session:
    """A session that has ended with sums of this size."""
    session = another(sessions, world, name)
    session.sum_bytes = size
    session.abort()
    return session


def names(sessions: Sessions) -> list[str]:
    return [session.config.name for session in sessions.all()]


def full(work: Callable[[], Any]) -> str:
    """What a refusal for lack of room says; whoever hears it tries again."""
    error = refusal("quota-spool", work)
    assert isinstance(error, TryLater)
    return error.remedy


def test_a_session_that_is_over_makes_room_for_vectors(world: World) -> None:
    """Where a round just fits, the next session's rounds do, too, again and again."""
    sessions = all_of(world, max_spool_bytes=4 * SUM)
    for number in range(4):
        world.release()
        assert held(sessions) == [(None, SUM, False)]
        if number % 2:  # also as it is after a restart
            sessions = all_of(world)
        world.session.abort()
        session = sessions.create(named(world, f"study-{number}"))
        world.config, world.session_id = session.config, session.session_id
        world.session = world.port.session = session
        world.players = {name: world.player(name) for name in world.keys}


def test_it_is_kept_until_then_and_gone_before_anything_takes_its_place(world: World) -> None:
    sessions, done = all_of(world, max_spool_bytes=4 * SUM), world.session
    world.release()
    done.abort()
    first, second = (another(sessions, world, name) for name in ("first", "second"))
    first.weights_upload(A, TASK, 3 * SUM, world.now)
    late = sessions.by_id(done.session_id).sum_blob(1)
    assert len(late.chunk(0)) == CHUNK
    full(lambda: second.weights_upload(A, TASK, 2 * SUM, world.now))  # all of it would not do
    assert sessions.by_id(done.session_id) is done
    upload = second.weights_upload(A, TASK, SUM, world.now)
    with pytest.raises(NotFound, match="session-unknown"):
        sessions.by_id(done.session_id)
    assert sum(size for _, size, _ in held(sessions)) == 4 * SUM
    upload.put(0, bytes(CHUNK))
    assert done.session_id not in world.journal.load()
    assert not world.path(done.folder).exists()
    with pytest.raises(NotFound, match="session-unknown"):
        late.chunk(0)


def test_a_restart_in_between_brings_it_back(world: World) -> None:
    name = world.config.name
    world.release()
    world.session.abort()
    sessions = all_of(world, max_spool_bytes=SUM)
    another(sessions, world, "next").weights_upload(A, TASK, SUM, world.now)
    assert names(sessions) == ["next"]
    assert names(all_of(world)) == [name, "next"]


def test_the_oldest_go_and_no_more_of_them_than_must(world: World) -> None:
    sessions = all_of(world, max_spool_bytes=1000)
    for name, size in (("empty", 0), ("one", 300), ("two", 300), ("three", 300)):
        over(sessions, world, name, size)
    another(sessions, world, "small").weights_upload(A, TASK, 100, world.now)
    everybody = [world.config.name, "empty", "one", "two", "three", "small"]
    assert names(sessions) == everybody
    another(sessions, world, "large").weights_upload(A, TASK, 500, world.now)
    assert names(sessions) == [world.config.name, "empty", "three", "small", "large"]


def test_active_sessions_keep_their_sums(world: World) -> None:
    sessions = all_of(world, max_spool_bytes=1000)
    world.session.sum_bytes = 900
    ended = over(sessions, world, "over", 50)
    other = another(sessions, world, "next")
    remedy = full(lambda: other.weights_upload(A, TASK, 101, world.now))
    assert "sums of active sessions stay" in remedy
    assert sessions.by_id(ended.session_id) is ended
    world.session.abort()
    other.weights_upload(A, TASK, 101, world.now)
    assert names(sessions) == ["over", "next"]


def test_initial_weights_of_a_session_that_is_over_are_nobodys(world: World) -> None:
    sessions, done = all_of(world, spool_bytes_per_silo=200), world.session
    weights, _ = open_with_weights(world)
    size = len(weights)
    other = another(sessions, world, "next")
    refusal("quota-spool-silo", lambda: other.weights_upload(A, TASK, 200, world.now))
    done.abort()
    assert held(sessions) == held(all_of(world)) == [(None, size, False)]
    other.weights_upload(A, TASK, 200, world.now)
    assert len(done.weights_blob(TASK).chunk(0)) == CHUNK
    assert sessions._means.free(size)
    assert names(sessions) == ["next"]
    another(sessions, world, "last")
    assert not world.path(done.folder).exists()  # nothing of it outlives the next creation


def test_any_number_of_sums_is_reckoned_at_once(world: World) -> None:
    sessions = all_of(world)
    for number in range(1, 4):
        world.release()
        assert world.session.sum_bytes == sum(stored.size for stored in world.session.sums)
        assert held(sessions) == held(all_of(world)) == [(None, number * SUM, False)]
        sessions = all_of(world)


def test_a_checkpoint_takes_its_place_only_once_it_is_free(tmp_path: Path) -> None:
    world = World(tmp_path, protection=Protection.CKKS)
    sessions = all_of(world)
    world.make_key()
    world.release()
    ended, data = over(sessions, world, "over", 100), os.urandom(CHUNK)
    world.session.ask_checkpoint(B, TASK, 0, 2, (), world.now)
    assert sessions._means.free(100)
    digest = vector_digest(data, CHUNK)
    world.session.checkpoint_upload(A, TASK, digest, CHUNK, world.now).put(0, data)
    assert ended.session_id not in world.journal.load()


class Refusing(MemoryJournal):
    """A journal that forgets nothing."""

    def forget(self, session_id: bytes) -> None:
        raise StorageFailed("storage-failed", "no")


def test_what_cannot_be_erased_is_told_and_nothing_takes_its_place(tmp_path: Path) -> None:
    world = World(tmp_path, journal=Refusing())
    sessions = all_of(world, max_spool_bytes=100)
    ended = over(sessions, world, "over", 100)
    upload = another(sessions, world, "next").weights_upload(A, TASK, 50, world.now)
    with pytest.raises(StorageFailed):
        upload.put(0, bytes(50))
    assert not world.path(upload.name).exists()
    assert ended.session_id in world.journal.load()


def test_an_upload_is_told_of_once(world: World) -> None:
    calls: list[bool] = []
    path = world.path("blob")
    upload = Upload(
        world.means.disk, "blob", 2 * CHUNK, CHUNK, before=lambda: calls.append(path.exists())
    )
    assert calls == []
    for at in (0, CHUNK):
        upload.put(at, bytes(CHUNK))
    assert calls == [False]


# Over the wire.


def propose(study: Study, weights: bytes) -> None:
    """Silo a opens the task with these weights."""
    assert study.call("a", "OpenTask", api.OpenTaskRequest, task=TASK).propose
    for at in range(0, len(weights), CHUNK):
        study.call(
            "a",
            "PutChunk",
            api.PutChunkRequest,
            blob=api.Blob(weights=TASK),
            total=len(weights),
            offset=at,
            data=weights[at : at + CHUNK],
        )
    study.call("a", "ProposeTask", api.ProposeTaskRequest, opening=study.opening(weights=weights))


@pytest.mark.process
def test_studies_follow_each_other_on_a_full_disk(tmp_path: Path) -> None:
    """Nobody frees anything by hand, and the silos of what is over hear that it is gone."""
    weights = os.urandom(900)
    fetch = {"blob": api.Blob(weights=TASK)}
    with serving(Consortium(tmp_path / "pki"), tmp_path / "server", max_spool_bytes=1000) as server:
        before = server.create("study-0")
        propose(before, weights)
        with refused(grpc.StatusCode.RESOURCE_EXHAUSTED, "quota-spool"):
            upload_weights(server.create("too-early"), "a", 500)
        for number in range(1, 4):
            server.boss.admin("AbortSession", api.AbortSessionRequest(name=before.name))
            study = server.create(f"study-{number}")
            assert (
                before.call("b", "GetChunk", api.GetChunkRequest, **fetch).data == weights[:CHUNK]
            )
            propose(study, weights)
            for call, kind, fields in (
                ("GetChunk", api.GetChunkRequest, fetch),
                ("Next", api.NextRequest, {"round": 1}),
            ):
                with refused(grpc.StatusCode.NOT_FOUND, "session-unknown"):
                    before.call("b", call, kind, **fields)
            before = study
        there = server.boss.admin("ListSessions", api.ListSessionsRequest()).sessions
        assert [(one.name, one.state) for one in there] == [
            ("too-early", State.ACTIVE),
            ("study-3", State.ACTIVE),
        ]
        folders = {path.name for path in (tmp_path / "server/state/sessions").iterdir()}
        assert before.session_id.hex() in folders
        assert len(folders) <= 2
        assert b"Traceback" not in server.log
