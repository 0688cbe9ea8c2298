"""A coordinator that is killed between any two of its steps goes on where it stood."""

from __future__ import annotations

import asyncio
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from secagg.coordinator import session as machine
from secagg.coordinator.driver import Driver, Stopping
from secagg.coordinator.limits import Limits
from secagg.coordinator.records import parse
from secagg.coordinator.retrace import restore
from secagg.coordinator.session import Session
from secagg.coordinator.sessions import Sessions
from secagg.coordinator.spool import Stored
from secagg.coordinator.standing import Means
from secagg.coordinator.state import State, Step
from secagg.crypto.digest import vector_digest
from secagg.crypto.sign import IdentityKey
from secagg.errors import (
    ConfigError,
    FaultyClient,
    QuotaExceeded,
    RoundAborted,
    StorageDamaged,
    StorageFailed,
)
from secagg.masking.messages import Signatures
from secagg.wire import session as wire_session
from secagg.wire.session import SignedOpening

from .play import CHUNK, SUMS, TASK, World, exact_sum, sign_opening

A, B = "a", "b"


def picture(session: Session) -> dict[str, object]:
    """All that a session remembers and anybody could notice."""
    live = session.attempt
    return {
        "state": session.state,
        "results": list(session.results),
        "bases": {task: session.base(task) for task in sorted(session.tasks)},
        "ready": dict(session.ready_for),
        "attempts": session.attempts,
        "aborts": {n: (e.phase, e.have, e.need, e.blamed) for n, e in session.aborts.items()},
        "excluded": set(session.excluded),
        "descriptor": live and live.descriptor,
        "phase": live and live.server.phase,
        "arrived": live and live.server.phase != "unmasking" and live.server.arrived,
        "broadcasts": live and list(live.broadcasts),
        "left": live and set(live.left),
        "sum": live and live.server._sum.total.tobytes(),
    }


def restarted(world: World) -> None:
    """Restart, and see that nothing has changed but what is never written down."""
    before = picture(world.session)
    world.restart()
    assert picture(world.session) == before


def test_a_restart_after_every_call_changes_nothing(world: World) -> None:
    world.open()
    world.open(SUMS)
    restarted(world)
    for _ in range(2):
        for name in world.players:
            world.ready(name)
            restarted(world)
        assert world.session.tick(world.now)
        restarted(world)
        for _phase in range(4):
            for player in world.players.values():
                player.step()
                restarted(world)
            assert world.session.tick(world.now)
            restarted(world)
        for player in world.players.values():
            player.step()
        assert world.session.tick(world.now)
        restarted(world)
        result = world.session.results[-1]
        total = world.sum(result.round)
        np.testing.assert_array_equal(total, exact_sum(world.players.values()))
        assert vector_digest(total.tobytes(), CHUNK) == result.vector_digest


def test_what_was_revealed_is_asked_for_again(world: World) -> None:
    """Not written down, so gone; the silos give the very same bytes once more."""
    world.start()
    world.phases(4)
    for player in world.players.values():
        player.step()
    first = {name: player.sent[-1] for name, player in world.players.items()}
    assert world.players[A].look() is None  # answered: nothing to ask
    world.restart()
    for name, player in world.players.items():
        again = player.look()
        assert isinstance(again, Signatures)
        player.send(first[name])
        assert player.look() is None or world.session.results
    world.tick()
    np.testing.assert_array_equal(world.sum(1), exact_sum(world.players.values()))


def test_a_half_received_vector_is_sent_again(world: World) -> None:
    world.start()
    world.phases(2)
    player = world.players[A]
    message = player.answer(player.look())
    upload = world.session.vector_upload(player.name, 1, 1, len(player.ring.pack(player.masked)))
    upload.put(0, bytes(player.ring.pack(player.masked)[:CHUNK]))
    world.restart()
    with pytest.raises(FaultyClient) as refusal:
        world.session.send(message, 1, 1)
    assert refusal.value.code == "chunk-gap"
    assert not (world.directory / "spool").exists() or not list(world.directory.glob("spool/*"))
    player.send(message)
    world.step(*"bcd")
    world.tick()
    world.phases(2)
    np.testing.assert_array_equal(world.sum(1), exact_sum(world.players.values()))


def test_an_aborted_attempt_stays_aborted(world: World) -> None:
    world.start()
    world.phases(1)
    world.step(A, B)
    world.now += world.config.phase_deadline
    world.tick()
    assert isinstance(world.session.next(world.players[A].name, 1, 1, 1), RoundAborted)
    restarted(world)
    assert isinstance(world.session.next(world.players[A].name, 1, 1, 1), RoundAborted)
    for player in world.players.values():
        player.again()
    world.ready(fresh=False)
    restarted(world)
    world.tick()
    assert world.session.attempt.number == 2
    world.phases(5)
    np.testing.assert_array_equal(world.sum(1), exact_sum(world.players.values()))


def test_the_vectors_go_when_the_round_ends(world: World) -> None:
    world.start()
    world.phases(3)
    assert len(list(world.directory.glob("spool/*"))) == 4
    world.phases(2)
    assert not list(world.directory.glob("spool/*"))
    rows = [parse(row).WhichOneof("record") for row in world.journal.load()[world.session_id]]
    assert rows == ["created", "task_opened", "released"]


def test_an_ended_session_stays_ended(world: World) -> None:
    world.start()
    world.session.abort()
    world.restart()
    assert world.session.state is State.ABORTED
    assert world.session.attempt is None


def open_with_weights(world: World) -> tuple[bytes, SignedOpening]:
    """Open the training task with initial weights."""
    weights = os.urandom(150)
    session = world.session
    signed = sign_opening(world.config, world.session_id, A, world.keys[A], weights=weights)
    assert session.open_task(world.players[A].name, TASK, 0.0) is True
    upload = session.weights_upload(world.players[A].name, TASK, len(weights), 1.0)
    for at in range(0, len(weights), CHUNK):
        upload.put(at, weights[at : at + CHUNK])
    session.propose_task(world.players[A].name, signed)
    return weights, signed


def test_weights_survive(world: World) -> None:
    weights, signed = open_with_weights(world)
    restarted(world)
    assert world.session.open_task(world.players[B].name, TASK, 0.0) == signed
    assert world.path(world.session.weights_blob(TASK).name).read_bytes() == weights


def test_a_half_made_proposal_is_asked_for_again(world: World) -> None:
    world.session.open_task(world.players[A].name, TASK, 0.0)
    upload = world.session.weights_upload(world.players[A].name, TASK, 100, 1.0)
    upload.put(0, bytes(CHUNK))
    world.restart()
    with pytest.raises(FaultyClient) as refusal:
        world.session.weights_upload(world.players[A].name, TASK, 100, 1.0)
    assert refusal.value.code == "task-proposer"
    assert world.session.open_task(world.players[A].name, TASK, 0.0) is True
    assert not list(world.directory.glob("weights/*"))


def read_all(session: Session) -> None:
    """Hand out every sum and all initial weights."""
    blobs = [session.sum_blob(number) for number in range(1, session.round)]
    blobs += [session.weights_blob(name) for name, task in session.tasks.items() if task.weights]
    for blob in blobs:
        for offset in range(0, blob.stored.size, CHUNK):
            blob.chunk(offset)


def restart_and_read(world: World) -> None:
    """What enters a sum is read whole at the start, the rest when it is asked for."""
    world.restart()
    read_all(world.session)


@pytest.mark.parametrize("blob", ["spool/1-1-b", "sums/1", "weights/training.safetensors"])
@pytest.mark.parametrize("damage", ["flip", "cut", "gone"])
def test_a_damaged_blob_is_named(world: World, blob: str, damage: str) -> None:
    if blob.startswith("weights"):
        open_with_weights(world)
    else:
        world.start()
        world.phases(5 if blob.startswith("sums") else 3)
    path = world.directory / blob
    data = bytearray(path.read_bytes())
    if damage == "gone":
        path.unlink()
    else:
        data[CHUNK + 1] ^= 4
        path.write_bytes(data if damage == "flip" else data[:-1])
    with pytest.raises(StorageDamaged) as caught:
        restart_and_read(world)
    assert blob in caught.value.observed
    assert (f"chunk at {CHUNK} " in caught.value.observed) == (damage == "flip")


def test_records_that_contradict_each_other_are_refused(world: World) -> None:
    world.start()
    world.phases(2)
    rows = world.journal.load()[world.session_id]
    last_phase = max(i for i, row in enumerate(rows[:-1]) if parse(row).HasField("phase_closed"))
    for left_out in range(1, last_phase + 1):
        remaining = rows[:left_out] + rows[left_out + 1 :]
        kind = parse(rows[left_out]).WhichOneof("record")
        if kind in ("said_ready", "took_back"):  # as if it had not been said
            restore(remaining, world.means, world.now)
        else:
            with pytest.raises(StorageDamaged, match="session study"):
                restore(remaining, world.means, world.now)


def test_all_sessions_come_back_and_strangers_go(world: World, tmp_path: Path) -> None:
    sessions = Sessions(world.means)
    sessions.restore(0.0)
    assert [s.session_id for s in sessions.all()] == [world.session_id]
    message = wire_session.config_to_wire(world.config)
    message.name = "another"
    made = sessions.create(message, b"k" * 32)
    assert sessions.create(message, b"k" * 32) is made  # the same call again
    stray = world.path("sessions/" + "ab" * 32 + "/sums/1")
    stray.parent.mkdir(parents=True)
    stray.write_bytes(b"x")
    again = Sessions(world.means)
    again.restore(0.0)
    assert [s.config.name for s in again.all()] == ["study", "another"]
    assert again.create(message, b"k" * 32).session_id == made.session_id
    assert not stray.exists()


def single(world: World) -> Means:
    """The world's means, for one session at a time."""
    return replace(world.means, limits=Limits(max_sessions=1))


def test_a_session_that_made_room_does_not_come_back(world: World) -> None:
    sessions = Sessions(single(world))
    sessions.restore(0.0)
    sessions.by_name("study").abort()
    message = wire_session.config_to_wire(world.config)
    message.name = "another"
    sessions.create(message)
    again = Sessions(single(world))
    again.restore(0.0)
    assert [s.config.name for s in again.all()] == ["another"]


def test_a_silo_taken_out_of_the_manifest_is_not_waited_for(world: World) -> None:
    world.start()
    world.phases(1)
    world.step(*"abc")
    assert not world.session.tick(world.now)
    silos = {name: key for name, key in world.manifest.silos.items() if name != "d"}
    world.manifest = type(world.manifest)(
        world.manifest.consortium, 2, silos, world.manifest.coordinator
    )
    assert world.session.tick(world.now)
    restarted(world)  # under the manifest that the attempt opened with
    assert world.session.next(world.players[A].name, 1, 1, Step.ROSTER) is not None


def test_a_late_proposer_makes_room(world: World) -> None:
    session, late = world.session, world.players[A].name
    session.open_task(late, TASK, 0.0)
    assert session.open_task(world.players[B].name, TASK, 1.0) is False
    assert not session.tick(session.due() - 1)
    assert session.tick(session.due())
    assert session.open_task(world.players[B].name, TASK, 200.0) is True


# Each promise, on a variant that does not keep it.


def files(world: World) -> list[bytes]:
    """All that lies on the coordinator's disk."""
    blobs = [path.read_bytes() for path in world.directory.rglob("*") if path.is_file()]
    return blobs + [row for rows in world.journal.load().values() for row in rows]


def test_a_journal_of_every_message_gives_updates_to_who_takes_the_disk(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Masked vectors and enough shares in one place are the updates in that place."""
    shares = reveal(world)
    assert not [share for share in shares if any(share in data for data in files(world))]
    with monkeypatch.context() as weakened:
        weakened.setattr(machine, "Unmasking", type(None))
        world.restart()
        shares = reveal(world, again=True)
    assert all(any(share in data for data in files(world)) for share in shares)


def reveal(world: World, *, again: bool = False) -> list[bytes]:
    """Play until the silos have revealed; returns the shares."""
    if not again:
        world.start()
        world.phases(4)
    for player in world.players.values():
        if again:
            player.send(player.sent[-1])
        else:
            player.step()
    sent = [player.sent[-1] for player in world.players.values()]
    return [share.share.reveal() for message in sent for share in message.shares]


def test_a_changed_vector_would_be_summed(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.start()
    world.phases(3)
    path = world.directory / "spool" / "1-1-b"
    path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:])
    with pytest.raises(StorageDamaged):
        world.restart()
    with monkeypatch.context() as weakened:
        weakened.setattr(Stored, "check", lambda *_: None)
        world.restart()
    world.phases(2)
    assert world.sum(1)[0] != exact_sum(world.players.values())[0]


def test_an_acknowledged_vector_would_be_lost(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A silo that was told its vector is there is in the sum, whatever happens to the process."""
    world.start()
    world.phases(2)
    with monkeypatch.context() as weakened:
        weakened.setattr(Session, "_log", lambda *_, **__: None)
        world.step("a")
    world.restart()
    assert "a" not in world.session.attempt.server.arrived
    player = world.players["a"]
    player.send(player.sent[-1])
    world.restart()
    assert "a" in world.session.attempt.server.arrived


def test_other_survivors_would_be_shown_after_a_restart(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was shown once is what is shown for ever: else two sets are out for one attempt."""
    world.start()
    world.phases(2)
    world.step("a", "b", "c")
    world.now += world.config.phase_deadline
    with monkeypatch.context() as weakened:
        weakened.setattr(Session, "_log", lambda *_, **__: None)
        assert world.session.tick(world.now)
    first = world.players["a"].look()
    world.restart()
    world.step("d")
    world.tick()
    second = world.players["a"].look()
    assert len(first.commits) == 3
    assert len(second.commits) == 4  # the weakened coordinator has shown both
    restarted(world)
    assert world.players["a"].look() == second


def test_what_was_not_written_is_seen_by_nobody(world: World) -> None:
    """The disk is full: the caller hears an error, and the driver lets nobody in any more."""

    def full(*_: object, **__: object) -> None:
        raise StorageFailed("storage-failed", "The disk is full.")

    async def play() -> list[StorageFailed]:
        failures: list[StorageFailed] = []
        driver = Driver(world.session, failures.append)
        poll = asyncio.create_task(driver.wait(lambda: world.session.attempt))
        await asyncio.sleep(0)
        world.journal.append = full  # type: ignore[method-assign]
        with pytest.raises(StorageFailed):
            await driver.call(world.session.ready, world.players["d"].name, TASK, base, 0.0)
        assert await poll is None
        with pytest.raises(Stopping):
            await driver.look(lambda: world.session.attempt)
        await driver.stop()
        return failures

    world.open()
    base = world.session.base(TASK)
    world.ready("a", "b")  # too few for an attempt
    assert len(asyncio.run(play())) == 1


@pytest.mark.parametrize("error", [MemoryError(), ValueError("no record"), OSError(5, "I/O")])
def test_a_step_that_cannot_be_written_is_the_disks_refusal(
    world: World, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """Of whatever kind: memory is ahead of the disk, and nobody may go on with it."""

    def fail(*_: object, **__: object) -> None:
        raise error

    world.open()
    monkeypatch.setattr(machine.records, "said_ready", fail)
    with pytest.raises(StorageFailed, match=type(error).__name__):
        world.ready("a")


def test_a_session_is_over_when_all_is_written_and_gone(world: World) -> None:
    """From that moment on it may be forgotten by another thread."""
    seen: list[State] = []
    append, remove = world.journal.append, world.means.disk.remove
    world.start()
    world.phases(3)

    def watched_append(*args: object, **kwargs: object) -> None:
        seen.append(world.session.state)
        append(*args, **kwargs)  # type: ignore[arg-type]

    def watched_remove(name: str) -> None:
        seen.append(world.session.state)
        remove(name)

    world.journal.append = watched_append  # type: ignore[method-assign]
    world.means.disk.remove = watched_remove  # type: ignore[method-assign]
    world.session.abort()
    assert seen == [State.ACTIVE, State.ACTIVE]
    assert world.session.state is State.ABORTED


def test_a_disk_that_cannot_be_read_is_not_called_damaged(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ill(name: str) -> None:
        raise StorageFailed("storage-failed", "I/O error.")

    world.start()
    world.phases(3)
    monkeypatch.setattr(world.means.disk, "view", ill)
    with pytest.raises(StorageFailed):
        world.restart()


@pytest.mark.parametrize("phases", [1, 5])
def test_the_state_of_a_coordinator_with_another_key(world: World, phases: int) -> None:
    world.start()
    world.phases(phases)
    world.means = replace(world.means, identity=IdentityKey.generate(os.urandom))
    with pytest.raises(ConfigError, match="state-of-another"):
        world.restart()


def test_a_silo_cannot_fill_the_journal(world: World) -> None:
    world.open()
    base, silo = world.session.base(TASK), world.players["a"].name
    for _ in range(machine.MAX_CHANGES):
        world.session.ready(silo, TASK, base, 0.0)
        world.session.leave(silo)
    with pytest.raises(QuotaExceeded):
        world.session.ready(silo, TASK, base, 0.0)
    assert len(world.journal.load()[world.session_id]) <= 2 * machine.MAX_CHANGES + 2
    world.session.ready(world.players["b"].name, TASK, base, 0.0)


def test_weights_without_an_opening_that_wants_them_go(world: World) -> None:
    silo = world.players["a"].name
    world.session.open_task(silo, TASK, 0.0)
    upload = world.session.weights_upload(silo, TASK, 64, 0.0)
    upload.put(0, bytes(64))
    world.session.propose_task(silo, world.signed("a"))
    assert not world.path(upload.name).exists()


def test_who_dropped_out_before_a_reveal_sits_the_round_out(world: World) -> None:
    """Silos that revealed sign no other survivors; a cohort with more of them is in vain."""
    world.start()
    world.phases(2)
    world.step("a", "b", "c")
    world.now += world.config.phase_deadline
    world.tick()
    world.step("a", "b", "c")
    world.tick()
    world.step("a", "b")  # c is gone: too few have revealed
    world.now += world.config.phase_deadline
    world.tick()
    assert world.session.last_abort[2].phase == "unmasking"
    for player in world.players.values():
        player.again()
    world.ready(fresh=False)
    restarted(world)
    world.tick()
    assert world.session.attempt.descriptor.cohort == ("a", "b", "c")
    world.phases(5, "a", "b", "c")
    survivors = [world.players[name] for name in "abc"]
    np.testing.assert_array_equal(world.sum(1), exact_sum(survivors))
