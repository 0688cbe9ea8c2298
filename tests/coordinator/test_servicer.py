"""What the servicer adds to the state machine: which thread does what."""

from __future__ import annotations

import asyncio
import threading
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from secagg.config import SiloId
from secagg.coordinator import calls
from secagg.coordinator import driver as driver_module
from secagg.coordinator import servicer as servicer_module
from secagg.coordinator.calls import METHODS
from secagg.coordinator.places import Places
from secagg.coordinator.servicer import CHUNK_THREADS, Servicer
from secagg.coordinator.sessions import Sessions
from secagg.coordinator.spool import Upload
from secagg.errors import SecaggError, StorageDamaged, StorageFailed
from secagg.wire._pb import service_pb2 as api
from secagg.wire.chunks import PutChunkRequest

from .play import LENGTH, World, exact_sum

A = SiloId("a")
CHUNK = METHODS["PutChunk"]


def serving(world: World) -> tuple[Servicer, list[SecaggError]]:
    """A servicer of the world's session, and what it could not live with."""
    sessions, failures = Sessions(world.means), []
    sessions._sessions[world.session_id] = world.session
    return Servicer(sessions, lambda: world.manifest, failures.append, world.means.limits), failures


def putting(world: World) -> PutChunkRequest:
    """The first chunk of a silo's vector."""
    masked = world.players["a"].masked
    assert masked is not None
    vector = api.Blob.Vector(round=1, attempt=1)
    head = api.PutChunkRequest(
        session_id=world.session_id, blob=api.Blob(vector=vector), total=4 * LENGTH
    )
    return PutChunkRequest(head, memoryview(masked.tobytes())[: world.config.chunk_bytes])


@pytest.fixture
def uploading(world: World, monkeypatch: pytest.MonkeyPatch) -> World:
    """Everybody knows its masked vector; nobody has sent it; time stands still."""
    clock = SimpleNamespace(monotonic=lambda: world.now)
    for module in (driver_module, servicer_module):
        monkeypatch.setattr(module, "time", clock)
    world.start()
    world.phases(2)
    for player in world.players.values():
        player.step(send=False)
    return world


def nobodys() -> Places:
    """Places of a call that never ends."""
    return Places(SimpleNamespace(add_done_callback=lambda _: None))  # type: ignore[arg-type]


async def test_chunks_hold_up_no_session(uploading: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as may be written at once wait for the disk, and a vector is summed meanwhile."""
    release, waiting = threading.Event(), threading.Semaphore(0)
    names: set[str] = set()

    def slow(self: Upload, offset: int, data: memoryview) -> None:
        names.add(threading.current_thread().name.partition("_")[0])
        waiting.release()
        assert release.wait(60)

    servicer, failures = serving(uploading)
    driver = servicer._driver(uploading.session)
    player = uploading.players["b"]
    player.put()
    with monkeypatch.context() as patch:
        patch.setattr(Upload, "put", slow)
        request = putting(uploading)
        puts = [asyncio.create_task(servicer._run(CHUNK, request, A, nobodys())) for _ in range(40)]
        try:
            async with asyncio.timeout(60):
                for _ in range(CHUNK_THREADS):
                    while not waiting.acquire(blocking=False):
                        await asyncio.sleep(0.01)
                message = player.sent[-1]
                assert await driver.call(uploading.session.send, message, 1, 1) is True
            assert not any(put.done() for put in puts)
        finally:
            release.set()
            await asyncio.gather(*puts)
    assert names == {"chunks"}
    for other in "acd":
        silo = uploading.players[other]
        silo.put()
        await driver.call(uploading.session.send, silo.sent[-1], 1, 1)
    await servicer.stop()
    assert not failures
    uploading.tick()
    uploading.phases(2)
    np.testing.assert_array_equal(uploading.sum(1), exact_sum(uploading.players.values()))


@pytest.mark.parametrize("kind", [StorageDamaged, StorageFailed])
async def test_a_chunk_that_the_disk_refuses_is_heard_of(
    uploading: World, kind: type[SecaggError], monkeypatch: pytest.MonkeyPatch
) -> None:
    def ill(*_: Any) -> None:
        raise kind("storage", "The disk is ill.")

    monkeypatch.setattr(calls, "_put", ill)
    servicer, failures = serving(uploading)
    with pytest.raises(kind):
        await servicer._run(CHUNK, putting(uploading), A, nobodys())
    assert [type(error) for error in failures] == [kind]
    await servicer.stop()
