"""The session as a state machine: no sockets, no threads, and time is a number."""

from __future__ import annotations

import math
import os
import threading
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from secagg.config import SiloId
from secagg.coordinator.spool import Spooled, Stored
from secagg.coordinator.state import PROPOSAL_SECONDS, Ended, State, Step
from secagg.crypto.digest import root_digest, vector_digest
from secagg.crypto.secret import Secret
from secagg.disk import LocalDisk
from secagg.errors import (
    Conflict,
    FaultyClient,
    MalformedMessage,
    NotFound,
    QuotaExceeded,
    RoleRefused,
    RoundAborted,
    SecaggError,
    SessionEnded,
    StaleModel,
    StorageBusy,
    StorageDamaged,
    TooLate,
)
from secagg.masking import transcript
from secagg.masking.messages import (
    Consistency,
    Dealt,
    Descriptor,
    MaskedInput,
    Roster,
    Signatures,
    Survivors,
    Unmasking,
)
from secagg.ring.vectors import PowerRing

from .play import CHUNK, LENGTH, SUMS, TASK, World, exact_sum, why

A, B, C, D = (SiloId(name) for name in "abcd")
BYTES = 4 * LENGTH


def refused(kind: type[SecaggError], code: str) -> AbstractContextManager[Any]:
    return pytest.raises(kind, check=lambda e: type(e) is kind and e.code == code)


# Membership.


def test_a_stranger_takes_no_part(world: World) -> None:
    with refused(RoleRefused, "session-member"):
        world.session.check_member(SiloId("e"), 1.0)
    assert world.session.last_call == {}


def test_a_silo_that_left_the_manifest_takes_no_part(world: World) -> None:
    world.session.check_member(D, 1.0)
    world.without("d")
    with refused(RoleRefused, "session-member"):
        world.session.check_member(D, 2.0)
    assert world.session.last_call == {D: 1.0}


# Proposals.


def test_the_first_to_ask_proposes(world: World) -> None:
    assert world.session.open_task(B, TASK, 0.0) is True
    assert world.session.open_task(A, TASK, 0.0) is False
    assert world.session.open_task(B, TASK, 1.0) is True


def test_a_proposal_expires_when_another_asks(world: World) -> None:
    session = world.session
    session.open_task(B, TASK, 0.0)
    assert session.open_task(A, TASK, PROPOSAL_SECONDS - 0.1) is False
    assert not session.tick(PROPOSAL_SECONDS - 0.1)
    assert session.due() == PROPOSAL_SECONDS
    assert session.tick(PROPOSAL_SECONDS)
    assert session.open_task(A, TASK, PROPOSAL_SECONDS + 1) is True
    assert session.open_task(B, TASK, PROPOSAL_SECONDS + 1) is False
    with refused(FaultyClient, "task-proposer"):
        session.propose_task(B, world.signed("b"))
    session.propose_task(A, world.signed("a"))
    assert session.open_task(B, TASK, PROPOSAL_SECONDS + 2) == world.signed("a")


def test_an_expired_proposal_s_upload_goes(world: World) -> None:
    session = world.session
    session.open_task(B, TASK, 0.0)
    upload = session.weights_upload(B, TASK, 100, 1.0)
    upload.put(0, bytes(64))
    assert world.path(upload.name).exists()
    assert session.tick(PROPOSAL_SECONDS + 1.0)
    assert not world.path(upload.name).exists()
    with refused(TooLate, "phase-closed"):
        upload.put(0, bytes(64))


def test_nobody_was_asked(world: World) -> None:
    with refused(FaultyClient, "task-proposer"):
        world.session.propose_task(A, world.signed("a"))
    with refused(FaultyClient, "task-proposer"):
        world.session.weights_upload(A, TASK, 10, 1.0)


def test_another_silo_proposes(world: World) -> None:
    world.session.open_task(A, TASK, 0.0)
    for signed in (world.signed("b"), world.signed("a")):
        with refused(FaultyClient, "task-proposer"):
            world.session.propose_task(B, signed)
    with refused(FaultyClient, "task-proposer"):
        world.session.propose_task(A, world.signed("b"))
    with refused(FaultyClient, "task-proposer"):
        world.session.weights_upload(B, TASK, 10, 1.0)


def test_a_forged_opening(world: World) -> None:
    world.session.open_task(A, TASK, 0.0)
    with refused(FaultyClient, "message-signature"):
        world.session.propose_task(A, replace(world.signed("a"), signature=bytes(64)))
    with refused(FaultyClient, "message-signature"):
        world.session.propose_task(A, replace(world.signed("b"), proposer="a"))
    with pytest.raises(NotFound):
        world.session.ready(A, TASK, bytes(32), 0.0)


def test_an_opening_of_another_session(world: World, tmp_path: Path) -> None:
    other = World(tmp_path / "other")
    other.keys = world.keys
    world.session.open_task(A, TASK, 0.0)
    with refused(FaultyClient, "message-signature"):
        world.session.propose_task(A, other.signed("a"))


def test_an_opening_stands(world: World) -> None:
    world.open()
    signed = world.signed("a")
    world.session.propose_task(A, signed)  # again: acknowledged
    world.session.propose_task(B, signed)  # harmless: the same opening
    with refused(Conflict, "task-open"):
        world.session.propose_task(A, world.signed("a", step="adam"))
    assert world.session.open_task(C, TASK, 0.0) == signed


def test_unknown_tasks(world: World) -> None:
    calls: list[Any] = [
        lambda: world.session.open_task(A, "nope", 0.0),
        lambda: world.session.weights_upload(A, "nope", 10, 1.0),
        lambda: world.session.propose_task(A, world.signed("a", task="nope")),
    ]
    for call in calls:
        with refused(NotFound, "task-unknown"):
            call()
    with refused(NotFound, "task-closed"):
        world.session.ready(A, TASK, bytes(32), 0.0)
    with refused(NotFound, "weights-unknown"):
        world.session.weights_blob(TASK)
    with refused(NotFound, "weights-unknown"):
        world.session.weights_blob("../../etc/passwd")


WEIGHTS = os.urandom(150)


def upload_weights(world: World, data: bytes = WEIGHTS, skip: int | None = None) -> None:
    world.session.open_task(A, TASK, 0.0)
    upload = world.session.weights_upload(A, TASK, len(data), 1.0)
    for offset in range(0, len(data), CHUNK):
        if offset != skip:
            upload.put(offset, data[offset : offset + CHUNK])


def test_weights_are_taken_and_served(world: World) -> None:
    upload_weights(world)
    world.session.propose_task(A, world.signed("a", weights=WEIGHTS))
    assert world.path(world.session.weights_blob(TASK).name).read_bytes() == WEIGHTS


def test_weights_that_are_not_there(world: World) -> None:
    world.session.open_task(A, TASK, 0.0)
    signed = world.signed("a", weights=WEIGHTS)
    with refused(FaultyClient, "weights-missing"):
        world.session.propose_task(A, signed)
    upload_weights(world, skip=64)
    with refused(FaultyClient, "weights-missing"):
        world.session.propose_task(A, signed)
    upload_weights(world)
    world.session.propose_task(A, signed)


def test_weights_of_another_size(world: World) -> None:
    upload_weights(world)
    with refused(FaultyClient, "weights-missing"):
        world.session.propose_task(A, world.signed("a", weights=WEIGHTS, weights_bytes=149))


def test_weights_of_another_digest(world: World) -> None:
    upload_weights(world, bytes(150))
    signed = world.signed("a", weights=WEIGHTS)
    with refused(FaultyClient, "weights-digest"):
        world.session.propose_task(A, signed)
    upload_weights(world)  # the right bytes may follow
    world.session.propose_task(A, signed)
    assert world.path(world.session.weights_blob(TASK).name).read_bytes() == WEIGHTS


def test_another_size_begins_anew(world: World) -> None:
    upload_weights(world, bytes(200))
    upload_weights(world)
    world.session.propose_task(A, world.signed("a", weights=WEIGHTS))
    assert world.path(world.session.weights_blob(TASK).name).read_bytes() == WEIGHTS


@pytest.mark.parametrize("total", [0, 1001, 2**64 - 1])
def test_weights_quota(world: World, total: int) -> None:
    world.session.open_task(A, TASK, 0.0)
    with refused(QuotaExceeded, "weights-size"):
        world.session.weights_upload(A, TASK, total, 1.0)
    assert not world.directory.exists()


def test_weights_cannot_change_under_their_check(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload_weights(world)
    upload = world.session.weights_upload(A, TASK, len(WEIGHTS), 1.0)
    refusals: list[str] = []

    def late() -> None:
        try:
            upload.put(0, bytes(64))
        except TooLate as error:
            refusals.append(error.code)

    thread = threading.Thread(target=late)

    def digest_then_put(stored: Stored) -> bytes:
        found = root_digest(stored.chunk_digests)
        thread.start()
        thread.join(0.1)
        return found

    monkeypatch.setattr(Stored, "digest", property(digest_then_put))
    world.session.propose_task(A, world.signed("a", weights=WEIGHTS))
    thread.join()
    assert refusals == ["phase-closed"]
    assert world.path(world.session.weights_blob(TASK).name).read_bytes() == WEIGHTS


# Readiness.


def test_all_ready_opens_at_once(world: World) -> None:
    world.open()
    world.ready("a", "b", "c")
    assert not world.tick()
    world.ready("d")
    assert world.tick() == 1
    assert world.session.attempt is not None
    descriptor = world.session.attempt.descriptor
    assert descriptor.cohort == (A, B, C, D)
    assert (descriptor.round, descriptor.attempt, descriptor.threshold) == (1, 1, 3)
    assert descriptor.base == world.session.base(TASK)


def test_train_deadline_from_the_first_ready(world: World) -> None:
    world.open()
    assert world.session.due() == math.inf
    world.ready("c")
    world.now += 60
    world.ready("a", "b")
    assert world.session.due() == 1100.0
    world.now = 1099.9
    assert not world.tick()
    world.now = 1100.0
    assert world.tick() == 1
    assert world.session.attempt is not None
    assert world.session.attempt.descriptor.cohort == (A, B, C)


def test_the_floor(world: World) -> None:
    world.open()
    world.ready("a", "b")
    world.now += 1e6
    assert not world.tick()
    assert world.session.due() == math.inf
    world.ready("c")
    assert world.session.due() < world.now
    assert world.tick() == 1


def test_a_silo_takes_its_ready_back(world: World) -> None:
    world.open()
    world.ready()
    world.session.leave(D)
    world.session.leave(D)
    assert not world.tick()
    world.session.leave(C)
    world.session.leave(B)
    world.session.leave(A)
    assert world.session.due() == math.inf
    world.now += 500
    world.ready("a", "b", "c")
    assert not world.tick()
    assert world.session.due() == world.now + 100


def test_the_largest_group_opens(tmp_path: Path) -> None:
    world = World(tmp_path / "w", "abcdefg")
    world.open()
    world.open(SUMS)
    world.ready("a", "b", "c", task=SUMS)
    world.ready("d", "e", "f", "g")
    assert world.tick() == 1
    assert world.session.attempt is not None
    assert world.session.attempt.descriptor.cohort == tuple("defg")
    assert world.session.attempt.descriptor.task == TASK
    assert [world.session.doing(SiloId(name)) for name in "ad"] == ["ready", "advertise_keys"]


def test_groups_below_the_floor_wait_without_spinning(world: World) -> None:
    """The driver sleeps until ``due``: a time in the past with nothing to do would spin it."""
    world.open()
    world.open(SUMS)
    world.ready("a", "b")
    world.ready("c", "d", task=SUMS)
    world.now += 1e6
    assert not world.tick()
    assert world.session.due() == math.inf
    world.ready("c")
    assert world.tick() == 1


def test_a_revoked_silo_is_not_waited_for(world: World) -> None:
    world.open()
    world.ready("a", "b", "c")
    assert not world.tick()
    world.without("d")
    assert world.tick() == 1


def test_a_revoked_silo_that_is_ready_stays_out(world: World) -> None:
    world.open()
    world.ready()
    world.without("d")
    assert world.tick() == 1
    assert world.session.attempt is not None
    assert world.session.attempt.descriptor.cohort == (A, B, C)


def test_revocations_below_the_floor(world: World) -> None:
    world.open()
    world.ready()
    world.without("c", "d")
    world.now += 1e6
    assert not world.tick()
    assert world.session.due() == math.inf


@pytest.mark.parametrize("base", [bytes(32), b"", b"\xff" * 33])
def test_a_stale_base(world: World, base: bytes) -> None:
    world.open()
    with refused(StaleModel, "base-stale"):
        world.session.ready(A, TASK, base, world.now)
    assert world.session.doing(A) == "away"


def test_last_round_s_base_is_stale(world: World) -> None:
    world.start()
    old = world.session.base(TASK)
    world.phases(5)
    assert world.session.base(TASK) != old
    with refused(StaleModel, "base-stale"):
        world.session.ready(A, TASK, old, world.now)


def test_the_base_of_another_task_is_stale(world: World) -> None:
    world.open()
    world.open(SUMS)
    with refused(StaleModel, "base-stale"):
        world.session.ready(A, TASK, world.session.base(SUMS), world.now)


def test_ready_is_forgotten_with_the_round(world: World) -> None:
    """What was ready on the old base is stale, whichever task it was for."""
    world.open()
    world.open(SUMS)
    world.ready("d", task=SUMS)
    world.ready("a", "b", "c")
    world.now += 100
    assert world.tick() == 1
    world.phases(5, "a", "b", "c")
    assert len(world.session.results) == 1
    assert world.session.due() == math.inf
    assert world.session.doing(D) == "away"
    world.now += 1e6
    assert not world.tick()


# A whole round.


def test_a_round_gives_the_exact_sum(world: World) -> None:
    result = world.release()
    assert result.survivors == result.cohort == (A, B, C, D)
    np.testing.assert_array_equal(world.sum(1), exact_sum(world.players.values()))
    assert (world.session.attempt, world.session.round) == (None, 2)
    assert not (world.directory / "spool").exists()


def test_words_of_64_bits(world: World) -> None:
    world.release(task=SUMS)
    np.testing.assert_array_equal(world.sum(1), exact_sum(world.players.values()))


def test_a_dropout_is_not_in_the_sum(world: World) -> None:
    world.start()
    world.phases(2)
    world.phases(3, "a", "b", "d")
    assert world.session.results[0].survivors == (A, B, D)
    expected = exact_sum(world.players[name] for name in "abd")
    np.testing.assert_array_equal(world.sum(1), expected)


def test_an_upload_without_a_commit_is_not_in_the_sum(world: World) -> None:
    world.start()
    world.phases(2)
    world.players["c"].step(send=False)
    world.players["c"].put()
    world.phases(3, "a", "b", "d")
    expected = exact_sum(world.players[name] for name in "abd")
    np.testing.assert_array_equal(world.sum(1), expected)


def test_an_aborted_attempt_and_another(world: World) -> None:
    world.start()
    world.phases(2)
    world.step("a", "b")
    world.now += world.config.phase_deadline
    assert world.tick() == 1
    error = why(world)
    assert (error.phase, error.have, error.need) == ("masked_input", 2, 3)
    assert not (world.directory / "spool").exists()
    assert (world.session.attempt, world.session.round) == (None, 1)
    for name, player in world.players.items():
        event = player.step()
        assert isinstance(event, RoundAborted), name
    world.ready(fresh=False)
    assert world.tick() == 1
    assert world.session.attempt is not None
    assert world.session.attempt.number == 2
    for player in world.players.values():
        player.again()
    world.phases(5)
    np.testing.assert_array_equal(world.sum(1), exact_sum(world.players.values()))
    assert world.session.results[0].round == 1


def test_three_rounds_then_done(world: World) -> None:
    for number in (1, 2, 3):
        world.release()
        np.testing.assert_array_equal(world.sum(number), exact_sum(world.players.values()))
    with refused(SessionEnded, "task-done"):
        world.session.ready(A, TASK, world.session.base(TASK), world.now)
    assert world.session.state is State.ACTIVE
    for number in (4, 5):
        world.release(task=SUMS)
        np.testing.assert_array_equal(world.sum(number), exact_sum(world.players.values()))
    assert world.session.state is State.DONE
    assert [result.task for result in world.session.results] == [TASK] * 3 + [SUMS] * 2


def test_the_history_moves_with_every_result(world: World) -> None:
    history = transcript.first_history(world.session.session_hash)
    task_hash = world.signed("a").opening.digest(world.session.session_hash)
    for _ in range(3):
        result = world.release()
        assert result.base == transcript.base_of(history, task_hash)
        tau4 = transcript.result_transcript(result.survivors_transcript, result.vector_digest)
        history = transcript.next_history(history, tau4)
    assert world.session.base(TASK) == transcript.base_of(history, task_hash)


@settings(max_examples=15, deadline=None)
@given(
    drops=st.lists(st.tuples(st.sampled_from("abcde"), st.integers(0, 4)), max_size=2),
    order=st.randoms(use_true_random=False),
)
def test_any_dropouts_give_the_exact_sum_or_nothing(
    tmp_path_factory: pytest.TempPathFactory, drops: list[tuple[str, int]], order: Any
) -> None:
    world = World(tmp_path_factory.mktemp("session"), "abcde")
    world.start()
    gone: set[str] = set()
    for phase in range(5):
        gone |= {name for name, when in drops if when == phase}
        names = [name for name in world.players if name not in gone]
        order.shuffle(names)
        world.step(*names)
        world.now += world.config.phase_deadline
        world.tick()
        if world.session.attempt is None:
            break
    assert world.session.attempt is None
    if not world.session.results:
        assert why(world).have < why(world).need
        return
    survivors = world.session.results[0].survivors
    expected = exact_sum(world.players[name] for name in survivors)
    np.testing.assert_array_equal(world.sum(1), expected)


# Uploads.


@pytest.fixture
def uploading(world: World) -> World:
    """Everybody knows its masked vector; nobody has sent it."""
    world.start()
    world.phases(2)
    for player in world.players.values():
        player.step(send=False)
    return world


def commit(world: World, name: str) -> MaskedInput:
    message = world.players[name].sent[-1]
    assert isinstance(message, MaskedInput)
    return message


def finish(world: World, *names: str) -> None:
    """Play on to the result."""
    for name in names or world.players:
        if not world.session.attempt.server.arrived & {name}:  # type: ignore[union-attr]
            world.players[name].send(commit(world, name))
    if not world.tick():
        world.now += world.config.phase_deadline
        world.tick()
    world.phases(2, *names)


def test_a_commit_before_its_vector(uploading: World) -> None:
    with refused(FaultyClient, "chunk-gap"):
        uploading.session.send(commit(uploading, "a"), 1, 1)
    finish(uploading)
    np.testing.assert_array_equal(uploading.sum(1), exact_sum(uploading.players.values()))


@pytest.mark.parametrize("gap", [0, 64, 256])
def test_a_gap(uploading: World, gap: int) -> None:
    player = uploading.players["a"]
    assert player.masked is not None
    data = player.masked.tobytes()
    upload = uploading.session.vector_upload(A, 1, 1, BYTES)
    for offset in reversed(range(0, BYTES, CHUNK)):
        if offset != gap:
            upload.put(offset, data[offset : offset + CHUNK])
    with pytest.raises(FaultyClient, match=f"at {gap} is missing") as caught:
        uploading.session.send(commit(uploading, "a"), 1, 1)
    assert caught.value.code == "chunk-gap"
    upload.put(gap, data[gap : gap + CHUNK])
    assert uploading.session.send(commit(uploading, "a"), 1, 1)


@pytest.mark.parametrize(
    ("offset", "size", "code"),
    [
        (1, 64, "chunk-offset"),
        (32, 64, "chunk-offset"),
        (63, 64, "chunk-offset"),
        (-64, 64, "chunk-offset"),
        (BYTES, 1, "chunk-offset"),
        (2**63, 64, "chunk-offset"),
        (2**64 - 64, 64, "chunk-offset"),
        (0, 63, "chunk-length"),
        (0, 65, "chunk-length"),
        (0, 128, "chunk-length"),
        (0, 0, "chunk-length"),
        (BYTES // 64 * 64, 64, "chunk-length"),
    ],
)
def test_chunks_that_overlap_or_do_not_fit(
    uploading: World, offset: int, size: int, code: str
) -> None:
    uploading.players["a"].put()
    upload = uploading.session.vector_upload(A, 1, 1, BYTES)
    with refused(MalformedMessage, code):
        upload.put(offset, bytes(size))
    assert uploading.session.send(commit(uploading, "a"), 1, 1)


@pytest.mark.parametrize("total", [0, 1, BYTES - 4, BYTES + 4, 2 * BYTES, 2**64 - 1])
def test_another_total(uploading: World, total: int) -> None:
    with refused(FaultyClient, "vector-length"):
        uploading.session.vector_upload(A, 1, 1, total)
    assert not (uploading.directory / "spool").exists()


def test_a_chunk_may_be_sent_twice(uploading: World) -> None:
    for _ in range(2):
        uploading.players["a"].put()
    finish(uploading)
    np.testing.assert_array_equal(uploading.sum(1), exact_sum(uploading.players.values()))


def test_a_damaged_chunk_may_be_replaced_before_the_commit(uploading: World) -> None:
    uploading.players["a"].put()
    upload = uploading.session.vector_upload(A, 1, 1, BYTES)
    upload.put(64, bytes(64))
    with refused(FaultyClient, "vector-digest"):
        uploading.session.send(commit(uploading, "a"), 1, 1)
    uploading.players["a"].put()
    finish(uploading)
    np.testing.assert_array_equal(uploading.sum(1), exact_sum(uploading.players.values()))


def test_after_the_commit_nothing_is_uploaded(uploading: World) -> None:
    uploading.players["a"].put()
    upload = uploading.session.vector_upload(A, 1, 1, BYTES)
    assert uploading.session.send(commit(uploading, "a"), 1, 1)
    with refused(TooLate, "vector-committed"):
        uploading.session.vector_upload(A, 1, 1, BYTES)
    with refused(TooLate, "phase-closed"):
        upload.put(0, bytes(64))
    assert uploading.path(upload.name).exists()  # until the round has ended: a restart needs it
    finish(uploading)
    assert not uploading.path(upload.name).exists()


def test_a_vector_is_summed_once(uploading: World) -> None:
    message = commit(uploading, "a")
    uploading.players["a"].put()
    assert uploading.session.send(message, 1, 1) is True
    for _ in range(3):
        assert uploading.session.send(message, 1, 1) is False
    finish(uploading)
    np.testing.assert_array_equal(uploading.sum(1), exact_sum(uploading.players.values()))


def test_a_second_different_commit(uploading: World) -> None:
    uploading.players["a"].send(commit(uploading, "a"))
    other = replace(commit(uploading, "a"), vector_digest=bytes(32))
    with refused(Conflict, "message-conflict"):
        uploading.session.send(other, 1, 1)
    finish(uploading)
    np.testing.assert_array_equal(uploading.sum(1), exact_sum(uploading.players.values()))


def test_after_the_phase_nothing_is_uploaded(uploading: World) -> None:
    late = uploading.session.vector_upload(D, 1, 1, BYTES)
    for name in "abc":
        uploading.players[name].send(commit(uploading, name))
    uploading.now += uploading.config.phase_deadline
    assert uploading.tick() == 1
    with refused(TooLate, "phase-closed"):
        uploading.session.vector_upload(D, 1, 1, BYTES)
    with refused(TooLate, "phase-closed"):
        uploading.session.send(commit(uploading, "d"), 1, 1)
    late.put(0, bytes(64))  # harmless: it is never summed
    uploading.phases(2, "a", "b", "c")
    expected = exact_sum(uploading.players[name] for name in "abc")
    np.testing.assert_array_equal(uploading.sum(1), expected)
    with refused(TooLate, "phase-closed"):
        late.put(0, bytes(64))
    with refused(TooLate, "round-over"):
        uploading.session.vector_upload(D, 1, 1, BYTES)


def test_before_the_phase_nothing_is_uploaded(world: World) -> None:
    world.start()
    for _ in range(2):
        with refused(FaultyClient, "phase-early"):
            world.session.vector_upload(A, 1, 1, BYTES)
        world.phases(1)


def test_a_silo_that_dealt_nothing_uploads_nothing(world: World) -> None:
    world.start()
    world.phases(1)
    world.phases(1, "a", "b", "c")
    with refused(FaultyClient, "sender-unexpected"):
        world.session.vector_upload(D, 1, 1, BYTES)


def test_a_vector_cannot_change_under_its_check(
    uploading: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A chunk that comes between the digest and the sum is held off, then refused."""
    uploading.players["a"].put()
    upload = uploading.session.vector_upload(A, 1, 1, BYTES)
    refusals: list[str] = []

    def late() -> None:
        try:
            upload.put(0, b"\xff" * 64)
        except TooLate as error:
            refusals.append(error.code)

    thread = threading.Thread(target=late)

    def digest_then_put(vector: Spooled) -> bytes:
        found = vector.blob.stored.digest
        thread.start()
        thread.join(0.1)
        return found

    with monkeypatch.context() as patch:
        patch.setattr(Spooled, "digest", digest_then_put)
        assert uploading.session.send(commit(uploading, "a"), 1, 1)
    thread.join()
    finish(uploading)
    np.testing.assert_array_equal(uploading.sum(1), exact_sum(uploading.players.values()))


@pytest.mark.parametrize("place", [0, CHUNK, BYTES - 1])
def test_a_vector_that_changed_on_the_disk_is_not_summed(uploading: World, place: int) -> None:
    """Between its arrival and its commit it was in nobody's hands but the disk's."""
    uploading.players["b"].send(commit(uploading, "b"))
    uploading.players["a"].put()
    name = uploading.session.vector_upload(A, 1, 1, BYTES).name
    path = uploading.path(name)
    right = path.read_bytes()
    path.write_bytes(right[:place] + bytes([right[place] ^ 1]) + right[place + 1 :])
    with pytest.raises(StorageDamaged, match=f"the chunk at {place // CHUNK * CHUNK} of {name}"):
        uploading.session.send(commit(uploading, "a"), 1, 1)
    path.write_bytes(right)  # the coordinator ends; that nothing was added is seen like this
    finish(uploading)
    np.testing.assert_array_equal(uploading.sum(1), exact_sum(uploading.players.values()))


def test_a_commit_that_finds_no_descriptor_may_come_again(
    uploading: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Too many open files, say: nothing has changed, and the very same message is taken later."""
    uploading.players["b"].send(commit(uploading, "b"))
    uploading.players["a"].put()
    rows = len(uploading.journal.load()[uploading.session_id])
    with monkeypatch.context() as patch:

        def busy(*_: object) -> None:
            patch.undo()
            raise StorageBusy("storage-busy", "Too many open files.")

        patch.setattr(LocalDisk, "view", busy)
        with pytest.raises(StorageBusy):
            uploading.session.send(commit(uploading, "a"), 1, 1)
    assert uploading.session.attempt is not None
    assert uploading.session.attempt.server.arrived == {"b"}
    assert len(uploading.journal.load()[uploading.session_id]) == rows
    assert uploading.session.send(commit(uploading, "a"), 1, 1) is True
    assert uploading.session.send(commit(uploading, "a"), 1, 1) is False
    finish(uploading)
    np.testing.assert_array_equal(uploading.sum(1), exact_sum(uploading.players.values()))


# Messages in the wrong place.


@pytest.mark.parametrize(
    ("round_number", "attempt", "kind", "code"),
    [
        (0, 1, TooLate, "round-over"),
        (1, 0, FaultyClient, "attempt-unknown"),
        (1, 2, FaultyClient, "attempt-unknown"),
        (2, 1, FaultyClient, "attempt-unknown"),
    ],
)
def test_another_round_or_attempt(
    world: World, round_number: int, attempt: int, kind: type[SecaggError], code: str
) -> None:
    world.start()
    world.players["a"].step(send=False)
    message = world.players["a"].sent[-1]
    with refused(kind, code):
        world.session.send(message, round_number, attempt)
    with refused(kind, code):
        world.session.vector_upload(A, round_number, attempt, BYTES)
    assert world.session.send(message, 1, 1)


def test_no_attempt_at_all(world: World) -> None:
    message = Consistency(A, bytes(64))
    with refused(FaultyClient, "attempt-unknown"):
        world.session.send(message, 1, 1)


def test_the_wrong_phase(world: World) -> None:
    world.start()
    world.players["d"].step(send=False)
    late = world.players["d"].sent[-1]
    with refused(FaultyClient, "phase-early"):
        world.session.send(Consistency(A, bytes(64)), 1, 1)
    world.phases(1, "a", "b", "c")
    with refused(FaultyClient, "phase-early"):
        world.session.send(Consistency(A, bytes(64)), 1, 1)
    for _ in range(3):
        world.phases(1, "a", "b", "c")
        with refused(TooLate, "phase-closed"):
            world.session.send(late, 1, 1)


def test_resent_and_changed_messages_of_every_phase(world: World) -> None:
    world.start()
    for _ in range(5):
        world.step("a", "b", "c")
        for message in world.players["a"].sent:
            assert world.session.send(message, 1, 1) is False
            with refused(Conflict, "message-conflict"):
                world.session.send(replace(message, signature=bytes(64)), 1, 1)
        world.step("d")
        assert world.session.tick(world.now)
    for message in world.players["a"].sent:
        with refused(TooLate, "round-over"):
            world.session.send(message, 1, 1)
    np.testing.assert_array_equal(world.sum(1), exact_sum(world.players.values()))


def test_a_late_message_of_a_dropped_silo(world: World) -> None:
    world.start()
    world.players["d"].step(send=False)
    late = world.players["d"].sent[-1]
    world.phases(1, "a", "b", "c")
    with refused(TooLate, "phase-closed"):
        world.session.send(late, 1, 1)
    world.phases(4, "a", "b", "c")
    expected = exact_sum(world.players[name] for name in "abc")
    np.testing.assert_array_equal(world.sum(1), expected)


def test_an_outsider_of_the_cohort(world: World) -> None:
    world.start("a", "b", "c")
    world.players["a"].step(send=False)
    with refused(FaultyClient, "sender-unexpected"):
        world.session.send(replace(world.players["a"].sent[-1], sender=D), 1, 1)


def test_a_bad_signature_changes_nothing(world: World) -> None:
    world.start()
    world.players["a"].step(send=False)
    good = world.players["a"].sent[-1]
    with refused(FaultyClient, "message-signature"):
        world.session.send(replace(good, signature=bytes(64)), 1, 1)
    assert world.session.attempt is not None
    assert world.session.attempt.server.arrived == frozenset()
    assert world.session.send(good, 1, 1)


# Aborts.


@pytest.mark.parametrize("phase", range(5))
def test_silence_aborts_each_phase(world: World, phase: int) -> None:
    world.start()
    world.phases(phase)
    names = ["advertise_keys", "share_keys", "masked_input", "consistency", "unmasking"]
    assert world.session.due() == world.now + 10
    world.now += 9.9
    assert not world.tick()
    world.now += 0.1
    assert world.tick() == 1
    error = why(world)
    assert (error.phase, error.have) == (names[phase], 0)
    assert world.session.attempt is None
    assert world.session.last_abort == (1, 1, error)
    for name in world.config.silos:
        assert world.session.next(name, 1, 1, phase) is error
    assert world.session.due() == math.inf


def test_a_dead_attempt_refuses_what_comes_late(world: World) -> None:
    world.start()
    world.players["a"].step(send=False)
    late = world.players["a"].sent[-1]
    world.now += 10
    world.tick()
    for _ in range(3):
        with pytest.raises(RoundAborted) as caught:
            world.session.send(late, 1, 1)
        assert caught.value.phase == "advertise_keys"
        assert caught.value is not why(world)
        with pytest.raises(RoundAborted):
            world.session.vector_upload(A, 1, 1, BYTES)
    assert why(world).__traceback__ is None


def test_an_abort_keeps_no_frames(world: World) -> None:
    """Frames hold shares and rebuilt secrets; the abort is kept for as long as the session."""
    world.start()
    world.phases(4)
    for name in "abcd":
        world.players[name].step(send=False)
    for name in "ab":
        world.players[name].send(world.players[name].sent[-1])
    world.now += 10
    world.tick()
    error = why(world)
    assert (error.phase, error.have, error.need) == ("unmasking", 2, 3)
    assert (error.__traceback__, error.__context__, error.__cause__) == (None, None, None)


def test_complaints_exclude_the_dealer(tmp_path: Path) -> None:
    world = World(tmp_path / "w", "abcde")
    world.start()
    world.phases(2)
    for name in world.players:
        complain(world, name, "e")
    assert world.tick() == 1
    assert why(world).blamed == ("e",)
    world.ready(fresh=False)
    for player in world.players.values():
        player.again()
    assert world.tick() == 1  # all that count are ready
    assert world.session.attempt is not None
    assert world.session.attempt.descriptor.cohort == (A, B, C, D)
    assert world.players["e"].look() is None
    world.phases(5, "a", "b", "c", "d")
    expected = exact_sum(world.players[name] for name in "abcd")
    np.testing.assert_array_equal(world.sum(1), expected)
    world.ready()
    assert world.tick() == 1  # the next round is with everybody again
    assert world.session.attempt is not None
    assert len(world.session.attempt.descriptor.cohort) == 5


def complain(world: World, name: str, about: str) -> None:
    """Send a commit that complains about a dealer, signed as the silo itself would."""
    from secagg.crypto.labels import SIGN_MASKED_INPUT

    player = world.players[name]
    player.step(send=False)
    message = commit(world, name)
    if name != about:
        message = replace(message, bad_dealers=(SiloId(about),))
    assert world.session.attempt is not None
    tau2 = world.session.attempt.server._taus[2]
    signature = world.keys[name].sign(SIGN_MASKED_INPUT, tau2, message.body())
    player.send(replace(message, signature=signature))


def test_an_excluded_silo_is_not_waited_for_without_spinning(tmp_path: Path) -> None:
    world = World(tmp_path / "w", "abcde")
    world.start()
    world.phases(2)
    for name in world.players:
        complain(world, name, "e")
    world.tick()
    world.ready("a", "b", "e", fresh=False)
    world.now += 1e6
    assert not world.tick()
    assert world.session.due() == math.inf


def test_exclusion_ends_when_too_few_are_left(world: World) -> None:
    def accuse(about: str, *names: str) -> None:
        for player in world.players.values():
            player.again()
        world.phases(2, *names)
        for name in names:
            complain(world, name, about)
        world.tick()
        assert why(world).blamed == (about,)

    world.start()
    accuse("d", "a", "b", "c", "d")
    world.ready("a", "b", "c", fresh=False)
    assert world.tick() == 1
    accuse("c", "a", "b", "c")  # a liar, perhaps: only two would be left
    world.ready("a", "b", "c", fresh=False)
    assert not world.tick()  # d counts again
    world.ready("d", fresh=False)
    assert world.tick() == 1
    assert world.session.attempt is not None
    assert world.session.attempt.descriptor.cohort == (A, B, C, D)


def test_who_is_blamed_in_unmasking_stays_in(world: World) -> None:
    """Silos have revealed for these survivors by then, and sign no others on this base."""
    from secagg.crypto.labels import SIGN_UNMASKING

    world.start()
    world.phases(4)
    assert world.session.attempt is not None
    tau3 = world.session.attempt.server._taus[3]
    for name, player in world.players.items():
        player.step(send=False)
        message = player.sent[-1]
        assert isinstance(message, Unmasking)
        if name in "ab":  # shares that open no commitment
            shares = tuple(replace(s, salt=Secret(bytes(32))) for s in message.shares)
            message = replace(message, shares=shares)
            signature = world.keys[name].sign(SIGN_UNMASKING, tau3, message.body())
            message = replace(message, signature=signature)
        player.send(message)
    assert world.tick() == 1
    assert (why(world).phase, why(world).blamed) == ("unmasking", ("a", "b"))
    world.ready(fresh=False)
    for player in world.players.values():
        player.again()
    world.tick()
    assert world.session.attempt is not None
    assert world.session.attempt.descriptor.cohort == (A, B, C, D)
    world.phases(5)
    np.testing.assert_array_equal(world.sum(1), exact_sum(world.players.values()))


# Next.


@pytest.mark.parametrize("seen", [-1, -(2**31), 7, 2**31 - 1])
def test_no_such_step(world: World, seen: int) -> None:
    world.start()
    for _ in range(3):
        with refused(MalformedMessage, "step-unknown"):
            world.session.next(A, 1, 1, seen)
        world.phases(1)


def test_each_broadcast_in_turn(world: World) -> None:
    world.start()
    kinds = [Descriptor, Roster, Dealt, Survivors, Signatures]
    for count, kind in enumerate(kinds):
        for seen in range(6):
            event = world.session.next(A, 1, 1 if seen else 0, seen)
            if seen <= count:
                assert isinstance(event, kinds[seen])
            elif seen == count + 1 == 5:  # not answered yet: asked again
                assert isinstance(event, Signatures)
            else:
                assert event is None
        assert isinstance(world.session.next(A, 1, 1, count), kind)
        world.phases(1)
    assert world.session.next(A, 1, 1, 5) == world.session.results[0]


def test_each_silo_gets_its_own_boxes(world: World) -> None:
    world.start()
    world.phases(2)
    for name in world.players:
        dealt = world.session.next(SiloId(name), 1, 1, Step.ROSTER)
        assert isinstance(dealt, Dealt)
        assert [d.dealer for d in dealt.dealings if d.sealed is None] == [name]


def test_a_silo_outside_the_cohort_waits(world: World) -> None:
    world.start("a", "b", "c")
    for attempt, seen in ((0, 0), (0, Step.LEFT), (1, 0), (1, Step.LEFT), (1, 3), (2**32 - 1, 6)):
        assert world.session.next(D, 1, attempt, seen) is None
    world.phases(5, "a", "b", "c")
    assert world.session.next(D, 1, 0, Step.LEFT) == world.session.results[0]
    assert world.session.next(D, 2, 2**32 - 1, Step.LEFT) is None


def test_a_dropped_silo_sees_no_more_of_the_attempt(world: World) -> None:
    world.start()
    world.phases(1)
    world.phases(1, "a", "b", "c")  # d was too late with its shares
    assert isinstance(world.session.next(D, 1, 1, Step.DESCRIPTOR), Roster)
    for seen in (Step.ROSTER, Step.DEALT, Step.SURVIVORS, Step.SIGNATURES):
        assert world.session.next(D, 1, 1, seen) is None
    world.phases(1, "a", "b", "c")
    assert world.session.next(D, 1, 1, Step.DEALT) is None
    world.phases(2, "a", "b", "c")
    assert world.session.next(D, 1, 1, Step.ROSTER) == world.session.results[0]


def test_a_silo_that_left_the_attempt_waits_for_the_next(world: World) -> None:
    world.start()
    world.phases(1)
    assert world.session.next(B, 1, 1, Step.LEFT) is None
    world.now += 10
    world.tick()
    assert world.session.next(B, 1, 1, Step.LEFT) is None  # it knows already
    assert isinstance(world.session.next(B, 1, 1, Step.ROSTER), RoundAborted)
    assert isinstance(world.session.next(B, 1, 1, Step.NOTHING), RoundAborted)
    assert world.session.next(B, 1, 0, Step.LEFT) is None
    assert world.session.next(B, 1, 0, Step.NOTHING) is None
    world.ready(fresh=False)
    world.tick()
    for attempt in (0, 1):
        event = world.session.next(B, 1, attempt, Step.LEFT)
        assert isinstance(event, Descriptor)
        assert event.attempt == 2
    assert isinstance(world.session.next(B, 1, 1, Step.ROSTER), RoundAborted)
    assert world.session.next(B, 1, 2, Step.LEFT) is None


@pytest.mark.parametrize("round_number", [2, 7, 2**32 - 1])
def test_a_round_that_is_not_yet(world: World, round_number: int) -> None:
    """Only a coordinator that was set back meets one: said aloud, or silos would wait for ever."""
    world.start()
    for attempt, seen in ((0, Step.NOTHING), (1, Step.DESCRIPTOR), (9, Step.LEFT)):
        with refused(FaultyClient, "round-unknown"):
            world.session.next(A, round_number, attempt, seen)


def test_no_round(world: World) -> None:
    world.start()
    assert world.session.next(A, 0, 0, Step.NOTHING) is None
    assert world.session.next(A, 0, 1, Step.DESCRIPTOR) is None


def test_an_attempt_that_is_not_yet(world: World) -> None:
    world.start()
    aborted = world.session.next(A, 1, 2, Step.DESCRIPTOR)
    assert isinstance(aborted, RoundAborted)
    assert "set back" in aborted.because
    assert world.session.next(A, 1, 2, Step.LEFT) is None


def test_a_silo_that_was_away_gets_the_results(world: World) -> None:
    first, second = world.release(), world.release()
    for attempt, seen in ((0, 0), (1, Step.ROSTER), (9, Step.LEFT)):
        assert world.session.next(D, 1, attempt, seen) == first
        assert world.session.next(D, 2, attempt, seen) == second
    assert world.session.next(D, 3, 0, Step.NOTHING) is None
    assert world.session.next(D, 3, 9, Step.LEFT) is None


def test_sums_by_round(world: World) -> None:
    world.release()
    assert world.path(world.session.sum_blob(1).name).stat().st_size == BYTES
    digest = vector_digest(world.path(world.session.sum_blob(1).name).read_bytes(), CHUNK)
    assert digest == world.session.results[0].vector_digest
    for number in (0, 2, -1):
        with refused(NotFound, "round-unknown"):
            world.session.sum_blob(number)


def test_what_silos_are_doing(world: World) -> None:
    session = world.session
    assert session.doing(A) == "away"
    session.check_member(A, 1.0)
    assert session.doing(A) == "training"
    world.open()
    world.ready("a", "b", "c", "d")
    assert session.doing(A) == "ready"
    world.tick()
    assert session.doing(A) == "advertise_keys"
    world.step("a", "b", "c")
    assert session.doing(A) == "advertise_keys sent"
    world.now += 10
    world.tick()
    assert session.doing(D) == "dropped"


# The end.


def test_an_aborted_session(world: World) -> None:
    world.start()
    world.phases(2)
    for player in world.players.values():
        player.step()
        player.masked = None
    world.session.abort()
    world.session.abort()
    assert world.session.state is State.ABORTED
    assert (world.session.attempt, world.session.due()) == (None, math.inf)
    assert not (world.directory / "spool").exists()
    assert not world.session.tick(world.now + 1e9)
    calls: list[Any] = [
        lambda: world.session.ready(A, TASK, world.session.base(TASK), world.now),
        lambda: world.session.send(world.players["a"].sent[-1], 1, 1),
        lambda: world.session.vector_upload(A, 1, 1, BYTES),
        lambda: world.session.open_task(A, SUMS, world.now),
        lambda: world.session.weights_upload(A, SUMS, 10, 1.0),
        lambda: world.session.propose_task(A, world.signed("a", task=SUMS)),
    ]
    for call in calls:
        with refused(SessionEnded, "session-over"):
            call()
    for seen in Step:
        assert isinstance(world.session.next(A, 1, 1, seen), Ended)
    assert world.session.open_task(A, TASK, world.now) == world.signed("a")
    world.session.leave(A)


def test_results_outlive_the_session(world: World) -> None:
    result = world.release()
    world.session.abort()
    assert world.session.next(A, 1, 0, Step.NOTHING) == result
    assert world.path(world.session.sum_blob(1).name).exists()
    event = world.session.next(A, 2, 0, Step.NOTHING)
    assert event == Ended("Session study is aborted.")


def test_an_abort_drops_weights_that_were_on_their_way(world: World) -> None:
    upload_weights(world)
    world.session.abort()
    assert not [path for path in world.directory.rglob("*") if path.is_file()]


def test_a_session_that_is_done(tmp_path: Path) -> None:
    config = World(tmp_path / "x").config
    world = World(tmp_path / "w", tasks=(replace(config.tasks[0], rounds=1),))
    result = world.release()
    assert world.session.state is State.DONE
    assert world.session.due() == math.inf
    assert world.session.next(A, 1, 0, Step.NOTHING) == result
    assert isinstance(world.session.next(A, 2, 0, Step.NOTHING), Ended)
    world.session.abort()
    assert world.session.state is State.DONE
    with refused(SessionEnded, "session-over"):
        world.session.ready(A, TASK, world.session.base(TASK), world.now)


def test_the_ring_of_each_task(world: World) -> None:
    """A vector's size is its task's: words of 4 and of 8 bytes."""
    world.start(task=SUMS)
    world.phases(2)
    length = world.players["a"].length
    with refused(FaultyClient, "vector-length"):
        world.session.vector_upload(A, 1, 1, length * PowerRing(32).word_bytes)
    assert world.session.vector_upload(A, 1, 1, length * PowerRing(64).word_bytes)
    assert isinstance(world.players["a"].look(), Dealt)
    assert not isinstance(world.players["a"].look(), Signatures | Survivors)
