"""Whole rounds of sealed vectors: what each silo is shown, what is refused, what a restart keeps.

To a coordinator a sealed vector is residues mod q and a seed; so it is here.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from secagg.config import Phase, Protection, SiloId
from secagg.coordinator import records
from secagg.coordinator.limits import Limits
from secagg.coordinator.records import parse
from secagg.coordinator.retrace import restore
from secagg.coordinator.session import Session
from secagg.coordinator.sqlite import SqliteJournal
from secagg.coordinator.standing import Standing
from secagg.coordinator.state import Step
from secagg.crypto.digest import vector_digest
from secagg.crypto.labels import SIGN_MASKED_INPUT
from secagg.errors import ConfigError, FaultyClient, SecaggError, StaleKey, StorageDamaged
from secagg.masking.messages import Descriptor, MaskedInput, Result, Roster, Survivors
from secagg.suite import KeyName, Suite
from secagg.wire._pb import journal_pb2 as pb

from .play import (
    SEALED_CHUNK,
    SEALED_LENGTH,
    SUMS,
    TASK,
    World,
    exact_sum,
    residues,
    sign_opening,
    why,
)
from .test_restart import picture

A, B, C, D = (SiloId(name) for name in "abcd")
Q = Suite.CKKS_54.parameters.modulus
SEALED = [Protection.CKKS, Protection.CKKS_MASKED]


def refused(kind: type[SecaggError], code: str) -> AbstractContextManager[Any]:
    return pytest.raises(kind, check=lambda e: type(e) is kind and e.code == code)


@pytest.fixture(params=SEALED, ids=str)
def world(request: pytest.FixtureRequest, tmp_path: Path) -> World:
    """A session of four silos that seal, with a key."""
    world = World(tmp_path / "session", protection=request.param)
    world.make_key()
    return world


@pytest.fixture
def plain(tmp_path: Path) -> World:
    """The same without masks."""
    world = World(tmp_path / "session", protection=Protection.CKKS)
    world.make_key()
    return world


def view(world: World) -> dict[str, object]:
    """All that a session remembers of what was written down."""
    desk = world.session.keys
    assert desk is not None
    known = {"epoch": desk.epoch, "key": desk.key, "members": dict(desk.members)}
    return picture(world.session) | known | {"opened": desk.opened}


def restarted(world: World) -> None:
    """Restart, and see that nothing has changed but what is never written down."""
    before = view(world)
    world.restart()
    assert view(world) == before


def check_sum(world: World, *survivors: str) -> Result:
    """The last sum is the survivors', word by word; its result names the key and their seeds."""
    result = world.session.results[-1]
    players = [world.players[name] for name in survivors or world.players]
    total = world.sum(result.round)
    np.testing.assert_array_equal(total, exact_sum(players))
    assert vector_digest(total.tobytes(), SEALED_CHUNK) == result.vector_digest
    assert result.survivors == tuple(player.name for player in players)
    assert result.seeds == tuple(player.seed for player in players)
    return result


# Rounds.


def test_a_round_and_its_sum(world: World) -> None:
    key = world.key
    assert world.release().key == key
    check_sum(world)
    assert len(world.sum(1)) == SEALED_LENGTH
    world.release(task=SUMS)
    check_sum(world)
    assert world.session.keys.opened == 2


def test_a_round_without_those_who_dropped_out(world: World) -> None:
    world.start()
    world.phases(len(world.config.protection.phases) - 2)  # d is there until vectors are due
    world.phases(2, "a", "b", "c")
    if world.config.protection.masks:
        check_sum(world)  # d's vector was there
    else:
        check_sum(world, "a", "b", "c")


def test_a_round_without_a_vector(world: World) -> None:
    world.start()
    before = world.config.protection.phases.index(Phase.MASKED_INPUT)
    world.phases(before)
    world.phases(len(world.config.protection.phases) - before, "a", "b", "c")
    check_sum(world, "a", "b", "c")


def test_the_phases_of_plain_ckks(plain: World) -> None:
    """No shares are dealt, and none revealed: the sum is there once its survivors are signed."""
    plain.start()
    player, seen = plain.players["a"], []
    while plain.session.attempt is not None:
        phase = plain.session.attempt.server.phase
        assert plain.session.doing(A) == phase
        plain.step()
        seen.append((phase, type(player.last)))
        assert player.look() is None
        assert plain.session.doing(A) == f"{phase} sent"
        assert plain.session.tick(plain.now)
    assert seen == [
        (Phase.ADVERTISE_KEYS, Descriptor),
        (Phase.MASKED_INPUT, Roster),
        (Phase.CONSISTENCY, Survivors),
    ]
    assert player.look() == plain.session.results[0]
    check_sum(plain)


@pytest.mark.parametrize("seen", [s for s in Step if s is not Step.LEFT])
def test_what_next_shows_under_plain_ckks_whatever_was_seen(plain: World, seen: Step) -> None:
    """A step that this protection does not have is passed over, and shows nothing twice."""
    plain.start()
    session, phases = plain.session, plain.config.protection.phases
    found = []
    for _ in phases:
        found.append(session.next(A, 1, 1, seen))
        plain.step()
        session.tick(plain.now)
    found.append(session.next(A, 1, 1, seen))
    descriptor = plain.players["a"].states[0].attempt.descriptor
    expected = {
        Step.NOTHING: [Descriptor] * 3,
        Step.DESCRIPTOR: [type(None), Roster, Roster],
        Step.ROSTER: [type(None), type(None), Survivors],
        Step.DEALT: [type(None), type(None), Survivors],
        Step.SURVIVORS: [type(None)] * 3,
        Step.SIGNATURES: [type(None)] * 3,
    }
    assert [type(event) for event in found[:-1]] == expected[seen]
    assert found[0] in (None, descriptor)
    assert found[-1] == session.results[0]


def test_a_vector_is_due_after_the_roster_under_plain_ckks(plain: World) -> None:
    plain.start()
    with refused(FaultyClient, "phase-early"):
        plain.session.vector_upload(A, 1, 1, 8 * SEALED_LENGTH)
    plain.phases(1)
    for size in (4 * SEALED_LENGTH, 8 * SEALED_LENGTH - 8, 8 * SEALED_LENGTH + 8, 0):
        with refused(FaultyClient, "vector-length"):
            plain.session.vector_upload(A, 1, 1, size)
    assert plain.session.vector_upload(A, 1, 1, 8 * SEALED_LENGTH)


def test_too_few_survivors(world: World) -> None:
    world.start()
    before = world.config.protection.phases.index(Phase.MASKED_INPUT)
    world.phases(before)
    world.step("a", "b")
    world.now += world.config.phase_deadline
    world.tick()
    assert (why(world).phase, why(world).have) == (Phase.MASKED_INPUT, 2)
    assert world.session.keys.opened == 0
    restarted(world)
    for player in world.players.values():
        player.again()
    world.ready()
    world.tick()
    world.phases(len(world.config.protection.phases))
    check_sum(world)


def committed(world: World, vector: Any, seed: bytes | None = None) -> tuple[Any, MaskedInput]:
    """Player a commits to another vector than an honest client would, with a good signature."""
    player = world.players["a"]
    message = player.answer(player.look())
    assert isinstance(message, MaskedInput)
    words = vector_digest(player.ring.pack(vector), SEALED_CHUNK)
    seed = message.seed if seed is None else seed
    unsigned = replace(message, vector_digest=words, seed=seed, signature=bytes(64))
    tau2 = player.states[-1].tau2
    signature = world.keys["a"].sign(SIGN_MASKED_INPUT, tau2, unsigned.body())
    return message, replace(unsigned, signature=signature)


@pytest.mark.parametrize("word", [Q, Q + 1, 2**54, 2**64 - 1])
@pytest.mark.parametrize("place", [0, SEALED_LENGTH - 1])
def test_a_word_that_is_no_residue_is_refused_at_its_commit(
    world: World, word: int, place: int
) -> None:
    world.start()
    world.phases(world.config.protection.phases.index(Phase.MASKED_INPUT))
    player = world.players["a"]
    vector = residues(SEALED_LENGTH)
    vector[place] = word
    honest, crafted = committed(world, vector)
    right, player.masked = player.masked, vector
    player.put()
    before = view(world)
    with refused(FaultyClient, "residue-range"):
        world.session.send(crafted, 1, 1)
    assert view(world) == before
    assert not (world.directory / "spool/1-1-a").exists()
    with refused(FaultyClient, "chunk-gap"):  # to have it all read again costs another upload
        world.session.send(crafted, 1, 1)
    assert view(world) == before
    player.masked = right  # the right one may follow
    player.send(honest)
    world.step("b", "c", "d")
    world.tick()
    while world.session.attempt is not None:
        world.phases(1)
    check_sum(world)


def test_the_largest_residue_is_one(world: World) -> None:
    world.open()
    world.ready()
    world.players["a"].vector[:] = Q - 1
    world.players["b"].vector[:] = 1
    world.tick()
    world.phases(len(world.config.protection.phases))
    check_sum(world)


def test_a_vector_without_a_seed_or_with_another_s(world: World) -> None:
    world.start()
    world.phases(world.config.protection.phases.index(Phase.MASKED_INPUT))
    world.step("b")
    player = world.players["a"]
    message = player.answer(player.look())
    player.put()
    for seed, code in ((b"", "seed-missing"), (world.players["b"].seed, "seed-repeated")):
        unsigned = replace(message, seed=seed, signature=bytes(64))
        signature = world.keys["a"].sign(SIGN_MASKED_INPUT, player.states[-1].tau2, unsigned.body())
        with refused(FaultyClient, code):
            world.session.send(replace(unsigned, signature=signature), 1, 1)
    player.send(message)


# Initial weights.

WEIGHTS, BOXED = os.urandom(100), os.urandom(SEALED_CHUNK + 900)


def open_with(world: World, data: bytes, **signed: Any) -> None:
    """Propose an opening after its weights, as they are uploaded."""
    assert world.session.open_task(A, TASK, world.now) is True
    upload = world.session.weights_upload(A, TASK, len(data), world.now)
    for at in range(0, len(data), world.config.chunk_bytes):
        upload.put(at, data[at : at + world.config.chunk_bytes])
    opening = sign_opening(world.config, world.session_id, "a", world.keys["a"], **signed)
    world.session.propose_task(A, opening)


@pytest.fixture
def roomy(world: World) -> World:
    world.means = replace(world.means, limits=Limits(max_weights_bytes=10**6))
    world.session.means = world.means
    return world


def sealed_digest(data: bytes) -> bytes:
    return vector_digest(data, SEALED_CHUNK)


def test_sealed_weights_are_taken_and_served(roomy: World) -> None:
    """The digest of what they are is the silos' to check; that of their sealing is ours."""
    digest = sealed_digest(BOXED)
    open_with(roomy, BOXED, weights=WEIGHTS, weights_bytes=len(BOXED), sealed_digest=digest)
    restarted(roomy)
    blob = roomy.session.weights_blob(TASK)
    assert b"".join(blob.chunk(at) for at in range(0, len(BOXED), SEALED_CHUNK)) == BOXED
    signed = roomy.session.open_task(B, TASK, roomy.now)
    assert signed.sealed_digest == digest
    assert signed.opening.weights_digest == sealed_digest(WEIGHTS)
    roomy.release()
    check_sum(roomy)


def test_weights_that_are_not_those_of_the_sealed_digest(roomy: World) -> None:
    for digest in (sealed_digest(WEIGHTS), bytes(32)):
        with refused(FaultyClient, "weights-digest"):
            open_with(roomy, BOXED, weights=WEIGHTS, weights_bytes=len(BOXED), sealed_digest=digest)
    with refused(FaultyClient, "weights-missing"):
        open_with(roomy, BOXED, weights=WEIGHTS, sealed_digest=sealed_digest(BOXED))
    assert TASK not in roomy.session.tasks


def test_weights_in_the_open_are_refused_where_the_session_seals(roomy: World) -> None:
    with refused(FaultyClient, "weights-sealed"):
        open_with(roomy, WEIGHTS, weights=WEIGHTS)
    with refused(FaultyClient, "weights-sealed"):  # of weights that there are none of
        open_with(roomy, WEIGHTS, sealed_digest=sealed_digest(WEIGHTS))
    roomy.open()


def test_sealed_weights_are_refused_where_the_session_does_not(tmp_path: Path) -> None:
    world = World(tmp_path / "masked")
    with refused(FaultyClient, "weights-sealed"):
        open_with(
            world,
            BOXED[:200],
            weights=WEIGHTS,
            weights_bytes=200,
            sealed_digest=vector_digest(BOXED[:200], world.config.chunk_bytes),
        )


# Restarts.


def test_a_restart_after_every_call_changes_nothing(world: World) -> None:
    world.open()
    restarted(world)
    for _ in range(2):
        for name in world.players:
            world.ready(name)
            restarted(world)
        assert world.session.tick(world.now)
        restarted(world)
        for phase in world.config.protection.phases:
            for player in world.players.values():
                player.step()
                if phase is not Phase.UNMASKING:  # what is revealed is not written down
                    restarted(world)
            assert world.session.tick(world.now)
            restarted(world)
        check_sum(world)
    assert world.session.keys.opened == 2


def test_the_epoch_survives_the_cut_at_the_end_of_an_attempt(world: World) -> None:
    first = world.key
    world.release()
    world.ready()
    world.tick()
    world.phases(1)
    for silo in (A, B):  # in the middle of an attempt
        world.session.end_key(silo, first, 1)
    restarted(world)
    second = world.make_key("b")
    restarted(world)
    world.phases(len(world.config.protection.phases) - 1)
    restarted(world)
    assert (world.key, world.session.keys.opened) == (second, 0)
    world.release()
    restarted(world)
    assert [r.key for r in world.session.results] == [first, first, second]
    assert world.session.keys.opened == 1
    rows = [parse(row).WhichOneof("record") for row in world.journal.load()[world.session_id]]
    assert rows == [
        *("created", "keyed", "task_opened", "released"),
        *("keyed", "keyed", "released", "released"),
    ]
    keyed = [parse(row).keyed for row in world.journal.load()[world.session_id]]
    assert [(k.epoch, k.key_id, len(k.members)) for k in keyed if k.epoch] == [
        (1, first.key_id, 4),
        (2, b"", 0),
        (2, second.key_id, 4),
    ]


def test_the_epoch_survives_on_a_disk(tmp_path: Path) -> None:
    """Lasting rows keep their order among the round's, in the database as in memory."""
    with closing(SqliteJournal(tmp_path / "state")) as journal:
        world = World(tmp_path / "state", journal=journal, protection=Protection.CKKS)
        first = world.make_key()
        world.release()
        world.ready()
        world.tick()
        for silo in (A, B):
            world.session.end_key(silo, first, 1)
        second = world.make_key("b")
        world.phases(2)
        before = view(world)
        restarted(world)
    with closing(SqliteJournal(tmp_path / "state")) as journal:
        world.means = replace(world.means, journal=journal)
        world.journal = journal
        world.restart()
        assert view(world) == before
        world.phases(1)
        world.release()
        assert [r.key for r in world.session.results] == [first, first, second]
        restarted(world)


def test_the_epoch_survives_an_attempt_that_failed(world: World) -> None:
    world.start()
    world.without("d")
    world.tick()
    world.now += world.config.phase_deadline
    world.tick()
    assert world.session.last_abort is not None
    restarted(world)
    assert (world.session.keys.epoch, world.key) == (2, None)
    world.make_key("c")
    restarted(world)
    assert set(world.session.keys.members) == {A, B, C}
    assert world.tick() == 0


def test_members_that_moved_while_the_coordinator_was_down_end_the_epoch(world: World) -> None:
    world.restart()
    assert world.tick() == 0
    world.without("d")
    world.restart()
    assert world.tick() == 1
    assert world.session.keys.epoch == 2


def test_requests_and_boxes_do_not_survive(world: World) -> None:
    """Whoever waits asks again, as it does after every long poll."""
    request = world.wish("b")
    world.ask("b", request)
    rows = len(world.journal.load()[world.session_id])
    world.restart()
    assert world.session.key_requests(A, world.key) == []
    assert world.ask("b", request) is False
    assert world.session.key_requests(A, world.key) == [request]
    assert len(world.journal.load()[world.session_id]) == rows


def test_who_was_to_make_the_key_is_asked_again(tmp_path: Path) -> None:
    world = World(tmp_path / "session", protection=Protection.CKKS)
    assert world.ask("a") is True
    world.restart()
    with refused(FaultyClient, "key-maker"):
        world.session.announce_key(A, KeyName(1, bytes(32)), (A, B, C, D))
    assert world.ask("b") is True
    assert world.ask("a") is False


def test_a_key_that_was_not_written_down_is_known_to_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weakened: after a restart another silo makes a second key of the same epoch."""
    world = World(tmp_path / "session", protection=Protection.CKKS)
    with monkeypatch.context() as weakened:
        weakened.setattr(Session, "_log", lambda *_, **__: None)
        first = world.make_key()
    world.restart()
    assert world.ask("b") is True
    second = world.make_key("b")
    assert (first.epoch, first == second) == (second.epoch, False)
    world.restart()
    assert (world.key, world.ask("c")) == (second, False)


# Damage.


def keyed(epoch: int, key: bytes = b"") -> bytes:
    return pb.Record(keyed=pb.Keyed(epoch=epoch, key_id=key)).SerializeToString()


K = os.urandom(32)
HISTORIES: dict[str, tuple[list[bytes], bool]] = {
    "nothing": ([], True),
    "a key": ([keyed(1, K)], True),
    "a key, an epoch, a key": ([keyed(1, K), keyed(2), keyed(2, K)], True),
    "an epoch without a key": ([keyed(2), keyed(3), keyed(3, K)], True),
    "two keys": ([keyed(1, K), keyed(1, K)], False),
    "a key of the next epoch": ([keyed(2, K)], False),
    "a key of an older one": ([keyed(2), keyed(1, K)], False),
    "an epoch again": ([keyed(1)], False),
    "an epoch left out": ([keyed(3), keyed(3, K)], True),  # silos were ahead
    "no epoch": ([keyed(0, K)], False),
    "a short key": ([keyed(1, K[1:])], False),
}


@pytest.mark.parametrize("case", HISTORIES)
def test_histories_of_keys(tmp_path: Path, case: str) -> None:
    history, right = HISTORIES[case]
    world = World(tmp_path / "session", protection=Protection.CKKS)
    rows = world.journal.load()[world.session_id] + history
    if right:
        restore(rows, world.means, world.now)
        return
    with pytest.raises(StorageDamaged, match="session study"):
        restore(rows, world.means, world.now)


def test_a_key_in_a_session_that_seals_nothing(tmp_path: Path) -> None:
    world = World(tmp_path / "session")
    rows = [*world.journal.load()[world.session_id], keyed(1, K)]
    with pytest.raises(StorageDamaged, match="study has a key and seals nothing"):
        restore(rows, world.means, world.now)


def test_records_that_are_left_out_are_missed(world: World) -> None:
    """But for those that leave the session as if they had not happened."""
    world.release()
    for silo in (A, B):
        world.session.end_key(silo, world.key, 1)
    world.make_key("b")
    world.ready()
    world.tick()
    world.phases(2)
    rows = world.journal.load()[world.session_id]
    kinds = [parse(row).WhichOneof("record") for row in rows]
    last_phase = max(i for i, kind in enumerate(kinds[:-1]) if kind == "phase_closed")
    harmless = {"said_ready"}
    for left_out in range(1, last_phase + 1):
        remaining = rows[:left_out] + rows[left_out + 1 :]
        first_key = left_out == kinds.index("keyed")  # its only sum was signed with its name
        if kinds[left_out] in harmless or first_key:
            restore(remaining, world.means, world.now)
        else:
            with pytest.raises((StorageDamaged, ConfigError), match="ession study"):
                restore(remaining, world.means, world.now)


def test_an_attempt_under_another_key_than_the_epoch_s(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.open()
    world.ready()
    opening = Standing.opening

    def other(self: Any, *args: Any) -> Any:
        return replace(opening(self, *args), key=KeyName(1, bytes(32)))

    with monkeypatch.context() as weakened:
        weakened.setattr(Standing, "opening", other)
        world.tick()
    with pytest.raises(StorageDamaged, match="another key"):
        world.restart()


def test_a_vector_on_disk_that_is_no_residue(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is summed after a restart is checked as what is summed before it."""
    world.start()
    world.phases(world.config.protection.phases.index(Phase.MASKED_INPUT))
    player = world.players["a"]
    vector = np.full(SEALED_LENGTH, 2**64 - 1, np.uint64)
    _, crafted = committed(world, vector)
    player.masked = vector
    with monkeypatch.context() as weakened:
        weakened.setattr(type(player.ring), "holds", lambda *_: True)
        player.send(crafted)
    with pytest.raises(StorageDamaged, match="residue"):
        world.restart()


# What did not change.


def test_a_masked_session_writes_down_what_it_always_did(tmp_path: Path) -> None:
    """No field that sealed sessions brought is set in any record, at any time."""
    world = World(tmp_path / "session")
    seen: dict[str, pb.Record] = {}
    append = world.journal.append

    def watched(session_id: bytes, data: bytes, **kinds: bool) -> None:
        record = parse(data)
        seen[str(record.WhichOneof("record"))] = record
        check_fields(record)
        append(session_id, data, **kinds)

    world.journal.append = watched  # type: ignore[method-assign]
    world.release()
    world.start()
    world.session.leave(A)
    world.now += world.config.phase_deadline
    world.tick()
    world.session.abort()
    assert seen.keys() == {
        *("task_opened", "said_ready", "attempt_opened", "accepted", "phase_closed"),
        *("released", "took_back", "attempt_aborted", "ended"),
    }
    check_fields(records.created(bytes(32), world.config, b"", ""))


NEW = {"suite", "sealed_digest", "seed", "seeds", "keyed"}


def check_fields(message: Any) -> None:
    for field, value in message.ListFields():
        assert field.name not in NEW
        assert not (field.name == "key" and field.message_type)
        values = value if field.is_repeated else [value]
        for inner in values if field.message_type else ():
            check_fields(inner)


def test_a_silo_that_waits_with_an_old_key_is_told(world: World) -> None:
    calls: list[Callable[[], object]] = []
    old = world.key
    world.release()
    for silo in (A, B):
        world.session.end_key(silo, old, 1)
    calls.append(lambda: world.session.next(A, 2, 0, Step.LEFT, old))
    calls.append(lambda: world.session.ready(A, TASK, world.session.base(TASK), world.now, old))
    for call in calls:
        with refused(StaleKey, "key-stale"):
            call()
    world.restart()
    for call in calls:
        with refused(StaleKey, "key-stale"):
            call()
