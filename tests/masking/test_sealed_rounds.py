"""Rounds of sealed updates: what client and server refuse there, and whom they blame.

The core never opens a sealed vector, so any residues stand for one here; the sum is held against
Python's integers mod q.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from secagg.config import MaskPrg, Phase, Protection, SiloId
from secagg.crypto.digest import vector_digest
from secagg.errors import (
    FaultyServer,
    MalformedMessage,
    OutOfOrder,
    PolicyRefused,
    RoundAborted,
    TooLate,
)
from secagg.masking import client, transcript
from secagg.masking.messages import MaskedInput, Result, Signatures, Survivors
from secagg.masking.server import ServerRound
from secagg.suite import KeyName, Suite

from .harness import (
    BASE,
    COLLUDER,
    KEY,
    ME,
    SESSION_ID,
    A,
    B,
    C,
    D,
    E,
    Play,
    check_refused,
    flip,
    identity,
    make_policy,
    make_sealed_session,
    make_session,
    of,
    republished,
    resigned,
    server_snapshot,
    signed,
    silos,
    swap,
)
from .test_server_checks import check_aborted, check_rejected

PLAIN, BOTH, MASKED = Protection.CKKS, Protection.CKKS_MASKED, Protection.MASKED
SEALS = [PLAIN, BOTH]
Q = Suite.CKKS_54.parameters.modulus
SHORT = PLAIN.phases
SEED = b"\x5e" * 32


def sealed(protection: Protection, n: int = 4, **options: Any) -> Play:
    """An attempt at a round of sealed updates."""
    return Play(make_sealed_session(n, protection), **options)


def play_of(protection: Protection) -> Play:
    """An attempt under any protection."""
    return Play() if protection is MASKED else sealed(protection)


# The phases and the sum.


def test_the_phases_of_each_protection() -> None:
    assert MASKED.phases == BOTH.phases == tuple(Phase)
    assert PLAIN.phases == (Phase.ADVERTISE_KEYS, Phase.MASKED_INPUT, Phase.CONSISTENCY)


@pytest.mark.parametrize("prg", MaskPrg)
@pytest.mark.parametrize("protection", SEALS)
@pytest.mark.parametrize("n", [3, 4, 6])
def test_everybody_stays(n: int, protection: Protection, prg: MaskPrg) -> None:
    session = make_sealed_session(n, protection, mask_prg=prg)
    play = Play(session, length=9).advance(None)
    np.testing.assert_array_equal(play.server.total, play.total(silos(n)))
    assert play.server.total.max() < Q
    assert play.broadcast.key == KEY
    assert play.broadcast.seeds == tuple(play.seeds[name] for name in silos(n))
    tau4 = transcript.result_transcript(play.taus[-1], play.broadcast.vector_digest)
    assert [play.answer(name, play.broadcast) for name in silos(n)] == [tau4] * n


@pytest.mark.parametrize("protection", SEALS)
def test_the_greatest_residues_do_not_carry(protection: Protection) -> None:
    """Sums mod 2^64 would show, in their carries, what masks should hide."""
    play = sealed(protection, 6)
    for name in silos(6):
        play.inputs[name][:] = play.vectors[name][:] = Q - 1
    play.advance(None)
    assert play.server.total.tolist() == [(6 * (Q - 1)) % Q] * 5


@pytest.mark.parametrize(
    ("protection", "phase"), [(how, phase) for how in SEALS for phase in how.phases]
)
@pytest.mark.parametrize("lost", silos(4))
def test_one_dropout_in_any_phase(protection: Protection, phase: Phase, lost: SiloId) -> None:
    later = protection.phases[protection.phases.index(phase) :]
    play = sealed(protection).advance(None, silent={p: [lost] for p in later})
    before = phase in tuple(Phase)[:3]
    survivors = tuple(name for name in silos(4) if not (before and name == lost))
    assert play.server.survivors == play.broadcast.survivors == survivors
    assert play.broadcast.seeds == tuple(play.seeds[name] for name in survivors)
    np.testing.assert_array_equal(play.server.total, play.total(survivors))
    play.states.pop(lost, None)  # it signed nothing, and takes the result as one that was away
    assert len({play.answer(name, play.broadcast) for name in silos(4)}) == 1


@pytest.mark.parametrize(
    ("protection", "phase"), [(how, phase) for how in SEALS for phase in how.phases]
)
def test_too_few_are_left(protection: Protection, phase: Phase) -> None:
    play = sealed(protection).advance(phase)
    play.gather(without=[A, C])
    check_aborted(play, phase, 2, 3)


def test_survivors_below_the_floor_but_not_below_t() -> None:
    play = Play(make_sealed_session(min_cohort=4)).advance(Phase.MASKED_INPUT)
    play.gather(without=[A])
    check_aborted(play, Phase.MASKED_INPUT, 3, 4)


def test_one_masked_upload_alone_is_not_its_sealed_vector() -> None:
    play = sealed(BOTH).advance(Phase.CONSISTENCY)
    for name in silos(4):
        assert not np.any(play.vectors[name] == play.inputs[name])
    plain = sealed(PLAIN).advance(Phase.CONSISTENCY)
    assert all((plain.vectors[name] == plain.inputs[name]).all() for name in silos(4))


def test_a_plain_attempt_goes_through_its_phases_and_ends() -> None:
    play, seen = sealed(PLAIN), []
    while play.server.phase is not None:
        seen.append(play.server.phase)
        assert play.server.expected == silos(4)
        play.gather()
        assert play.complete
        play.close()
    assert tuple(seen) == SHORT
    assert isinstance(play.broadcast, Result)
    with pytest.raises(TooLate) as over:
        play.close()
    assert over.value.code == "attempt-over"


@pytest.mark.parametrize("late", SHORT)
def test_message_of_a_closed_phase(late: Phase) -> None:
    play = sealed(PLAIN).advance(late)
    message = play.step(D)
    play.gather(without=[D])
    play.close()
    check_rejected(play, message, "phase-closed", TooLate)


@pytest.mark.parametrize("early", SHORT[1:])
def test_message_of_a_later_phase(early: Phase) -> None:
    message = sealed(PLAIN).advance(early).step(ME)
    for phase in SHORT[: SHORT.index(early)]:
        check_rejected(sealed(PLAIN).advance(phase), message, "phase-early")


@pytest.mark.parametrize(
    ("phase", "code", "error"),
    [
        (Phase.ADVERTISE_KEYS, "phase-early", None),
        (Phase.MASKED_INPUT, "phase-closed", TooLate),
        (Phase.CONSISTENCY, "phase-closed", TooLate),
        (None, "phase-closed", TooLate),
    ],
)
def test_shares_have_no_phase_where_nothing_is_masked(
    phase: Phase | None, code: str, error: Any
) -> None:
    """Signed well over what would be its transcript."""
    donor = sealed(BOTH).advance(Phase.SHARE_KEYS)
    play = sealed(PLAIN).advance(phase)
    message = signed(donor.step(ME), ME, play.taus[min(1, len(play.taus) - 1)])
    check_rejected(play, message, code, *([error] if error else []))


@pytest.mark.parametrize(
    ("phase", "code", "error"),
    [*((phase, "phase-early", None) for phase in SHORT), (None, "phase-closed", TooLate)],
)
def test_reveals_have_no_phase_where_nothing_is_masked(
    phase: Phase | None, code: str, error: Any
) -> None:
    donor = sealed(BOTH).advance(Phase.UNMASKING)
    play = sealed(PLAIN).advance(phase)
    message = signed(donor.step(ME), ME, play.taus[-1])
    check_rejected(play, message, code, *([error] if error else []))


def test_a_silo_that_is_told_to_reveal_has_nothing_to_reveal() -> None:
    play = sealed(PLAIN).advance(None)
    votes = tuple(play.sent[name, Phase.CONSISTENCY] for name in silos(4))
    assert play.answer(ME, Signatures(votes)).shares == ()


@pytest.mark.parametrize("protection", SEALS)
def test_the_same_messages_give_the_same_result(protection: Protection) -> None:
    """A journal restores a round; that of a plain one holds everything."""
    play = sealed(protection).advance(None, silent={Phase.MASKED_INPUT: [D]})
    again = ServerRound(play.opening, play.descriptor, identity("coordinator"))
    for phase in protection.phases:
        for name in reversed(silos(4)):
            message = play.sent.get((name, phase))
            if message is not None:
                vector = play.uploaded(play.vectors[name])
                again.accept(message, vector if phase is Phase.MASKED_INPUT else None)
        result = again.close_phase()
    assert result == play.broadcast
    np.testing.assert_array_equal(again.total, play.server.total)


# Phase 0: which key.


@pytest.mark.parametrize("protection", SEALS)
@pytest.mark.parametrize(
    "key",
    [None, KeyName(2, KEY.key_id), KeyName(1, flip(KEY.key_id)), KeyName(2**32 - 1, bytes(32))],
    ids=["none", "later epoch", "other key", "other epoch and key"],
)
def test_a_descriptor_with_another_key_than_the_silo_s(
    protection: Protection, key: KeyName | None
) -> None:
    play = sealed(protection)
    check_refused(play, resigned(play.descriptor, key=key), "descriptor-key", FaultyServer)
    assert play.ledgers[ME].last_attempt(SESSION_ID) == (0, 0)


@pytest.mark.parametrize("protection", SEALS)
def test_a_descriptor_of_an_older_epoch_than_the_silo_s(protection: Protection) -> None:
    play = sealed(protection)
    play.expected = replace(play.expected, key=KeyName(2, KEY.key_id))
    check_refused(play, play.descriptor, "descriptor-key", FaultyServer)


def test_a_masked_round_has_no_key(play: Play) -> None:
    told = resigned(play.descriptor, key=KEY)
    check_refused(play, told, "descriptor-key", FaultyServer)
    play.expected = replace(play.expected, key=KEY)
    check_refused(play, told, "descriptor-key", FaultyServer)
    check_refused(play, play.descriptor, "descriptor-key", FaultyServer)


@pytest.mark.parametrize("protection", SEALS)
def test_a_silo_without_a_key_joins_no_sealed_round(protection: Protection) -> None:
    play = sealed(protection)
    play.expected = replace(play.expected, key=None)
    check_refused(play, play.descriptor, "descriptor-key", FaultyServer)
    check_refused(play, resigned(play.descriptor, key=None), "descriptor-key", FaultyServer)


def test_a_masked_session_is_no_sealed_one_and_neither_the_other(play: Play) -> None:
    """The session hash tells protections apart, whatever else is alike."""
    other = transcript.session_hash(make_sealed_session())
    told = resigned(play.descriptor, session_hash=other)
    check_refused(play, told, "descriptor-session", FaultyServer)
    plain = sealed(PLAIN)
    told = resigned(plain.descriptor, session_hash=transcript.session_hash(make_session()))
    check_refused(plain, told, "descriptor-session", FaultyServer)


@pytest.mark.parametrize("allowed", [(), (MASKED,), (BOTH,), (MASKED, BOTH)])
def test_plain_ckks_needs_the_silo_s_own_consent(allowed: tuple[Protection, ...]) -> None:
    """No key is sent: any silo that works with the coordinator would read the update."""
    play = sealed(PLAIN, policy=make_policy(protections=allowed))
    check_refused(play, play.descriptor, "policy-protection", PolicyRefused)
    assert play.ledgers[ME].last_attempt(SESSION_ID) == (0, 0)
    sealed(PLAIN, policy=make_policy(protections=(*allowed, PLAIN))).advance(None)


# Phase 3: committing to a sealed vector.


@pytest.mark.parametrize("protection", [MASKED, BOTH])
def test_a_vector_that_must_be_masked_is_not_sent_without(protection: Protection) -> None:
    play = play_of(protection).advance(Phase.SHARE_KEYS)
    before = play.vectors[ME].copy()
    with pytest.raises(OutOfOrder) as caught:
        client.seal_input(play.states[ME], play.broadcast, play.vectors[ME], play.seeds[ME])
    assert caught.value.code == "mask-missing"
    np.testing.assert_array_equal(play.vectors[ME], before)
    with pytest.raises(OutOfOrder) as spent:
        play.step(ME)
    assert spent.value.code == "state-spent"


@pytest.mark.parametrize(("protection", "seed"), [(MASKED, SEED), (BOTH, b""), (PLAIN, b"")])
def test_a_seed_belongs_to_a_sealed_vector_and_to_no_other(
    protection: Protection, seed: bytes
) -> None:
    """Found before the update is made: a masked one could not be used again."""
    play = play_of(protection).advance(Phase.MASKED_INPUT)
    play.seeds[ME] = seed
    before = play.vectors[ME].copy()
    with pytest.raises(OutOfOrder) as caught:
        play.step(ME)
    assert caught.value.code == "seal-missing"
    assert not play.encodings
    np.testing.assert_array_equal(play.vectors[ME], before)
    with pytest.raises(OutOfOrder) as spent:
        play.step(ME)
    assert spent.value.code == "state-spent"


@pytest.mark.parametrize("protection", SEALS)
def test_the_seed_is_in_the_signed_commit(protection: Protection) -> None:
    play = sealed(protection).advance(Phase.MASKED_INPUT)
    commit = play.step(ME)
    assert (commit.seed, commit.bad_dealers) == (play.seeds[ME], ())
    check_rejected(play, replace(commit, seed=SEED), "message-signature")
    check_rejected(play, replace(commit, seed=b""), "message-signature")
    assert play.accept(commit)


def test_where_nothing_is_masked_all_of_the_roster_may_survive() -> None:
    play = sealed(PLAIN).advance(Phase.MASKED_INPUT, silent={Phase.ADVERTISE_KEYS: [A]})
    play.step(ME)
    state = play.states[ME]
    assert (state.dealers, dict(state.held), state.tau2) == ((B, C, D), {}, play.taus[1])


def test_a_survivor_that_advertised_nothing() -> None:
    play = sealed(PLAIN).advance(Phase.CONSISTENCY, silent={Phase.ADVERTISE_KEYS: [D]})
    commit = signed(of(play.broadcast.commits, C), D, play.taus[1], sender=D, seed=SEED)
    told = Survivors((*play.broadcast.commits, commit))
    check_refused(play, told, "survivors-dealt", FaultyServer)


# Phase 4: the survivors' seeds.


def recommitted(play: Play, name: SiloId, **changes: Any) -> Survivors:
    """The survivors with one commit that its silo signed anew, as a colluder would."""
    commit = of(play.broadcast.commits, name)
    return Survivors(swap(play.broadcast.commits, signed(commit, name, play.taus[-2], **changes)))


@pytest.mark.parametrize("protection", SEALS)
@pytest.mark.parametrize("whose", [None, ME, A], ids=["none", "mine", "another silo's"])
def test_a_colluder_s_commit_without_a_seed_of_its_own(
    protection: Protection, whose: SiloId | None
) -> None:
    """Two updates under one c1 would show their difference to who has the key."""
    play = sealed(protection).advance(Phase.CONSISTENCY)
    told = recommitted(play, COLLUDER, seed=play.seeds[whose] if whose else b"")
    check_refused(play, told, "survivors-seeds", FaultyServer)


def test_a_seed_in_a_masked_round(play: Play) -> None:
    play.advance(Phase.CONSISTENCY)
    told = recommitted(play, COLLUDER, seed=SEED)
    check_refused(play, told, "survivors-seeds", FaultyServer)


@pytest.mark.parametrize("protection", SEALS)
@pytest.mark.parametrize("seed", [b"", SEED])
def test_a_seed_that_the_coordinator_changed(protection: Protection, seed: bytes) -> None:
    """It never supplies a c1: the seed is under its silo's signature."""
    play = sealed(protection).advance(Phase.CONSISTENCY)
    for name, code in ((C, "masked-input-signature"), (ME, "survivors-own")):
        commit = replace(of(play.broadcast.commits, name), seed=seed)
        told = Survivors(swap(play.broadcast.commits, commit))
        copy = sealed(protection).advance(Phase.CONSISTENCY)
        check_refused(copy, told, code, FaultyServer)


@pytest.mark.parametrize("protection", SEALS)
def test_another_seed_of_a_colluder_s_is_another_transcript(protection: Protection) -> None:
    """Signed by it and told to one silo: nobody else's signature fits."""
    play = sealed(protection).advance(Phase.CONSISTENCY)
    told = recommitted(play, COLLUDER, seed=SEED)
    vote = play.answer(ME, told)
    check_rejected(play, vote, "message-signature")


def test_differencing_holds_for_sealed_sums_too() -> None:
    play = sealed(BOTH).advance(None)
    second = play.again().advance(Phase.CONSISTENCY, silent={Phase.MASKED_INPUT: [D]})
    check_refused(second, second.broadcast, "differencing", PolicyRefused)


# Phase 6: what opens the sum.


@pytest.mark.parametrize("protection", SEALS)
def test_a_result_without_a_key(protection: Protection) -> None:
    play = sealed(protection).advance(None)
    told = republished(play, key=None, seeds=())
    check_refused(play, told, "result-key", FaultyServer)
    del play.states[ME]  # one that was away sees it too
    check_refused(play, told, "result-key", FaultyServer)


def test_a_masked_result_with_a_key(play: Play) -> None:
    play.advance(None)
    told = republished(play, key=KEY, seeds=tuple(bytes([i]) * 32 for i in range(4)))
    check_refused(play, told, "result-key", FaultyServer)
    del play.states[ME]
    check_refused(play, told, "result-key", FaultyServer)


CHANGES: dict[str, Callable[[Result], dict[str, Any]]] = {
    "one seed": lambda r: {"seeds": (*r.seeds[:3], SEED)},
    "order of seeds": lambda r: {"seeds": r.seeds[::-1]},
    "all seeds": lambda r: {"seeds": tuple(bytes([i]) * 32 for i in range(4))},
    "other epoch": lambda r: {"key": KeyName(2, KEY.key_id)},
    "other key": lambda r: {"key": KeyName(1, flip(KEY.key_id))},
    "one survivor less": lambda r: {"survivors": r.survivors[1:], "seeds": r.seeds[1:]},
    "other cohort": lambda r: {"cohort": r.cohort[1:]},
    "other transcript": lambda r: {"survivors_transcript": bytes(32)},
}


@pytest.mark.parametrize("protection", SEALS)
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_a_result_with_other_seeds_or_another_key_than_signed(
    protection: Protection, change: Callable[[Result], dict[str, Any]]
) -> None:
    play = sealed(protection).advance(None)
    changes = change(play.broadcast)
    check_refused(play, replace(play.broadcast, **changes), "result-signature", FaultyServer)
    check_refused(play, republished(play, **changes), "result-survivors", FaultyServer)


@pytest.mark.parametrize("protection", SEALS)
def test_who_was_away_learns_the_key_and_seeds_from_the_result(protection: Protection) -> None:
    play = sealed(protection).advance(None, silent={Phase.ADVERTISE_KEYS: [D]})
    assert len({play.answer(name, play.broadcast) for name in silos(4)}) == 1
    assert (play.broadcast.key, len(play.broadcast.seeds)) == (KEY, 3)


def test_a_round_opened_without_a_key_gives_no_result() -> None:
    """A coordinator's own bug: what the silos would refuse cannot even be written down."""
    play = sealed(PLAIN).advance(Phase.CONSISTENCY)
    play.gather()
    play.server.opening = replace(play.opening, key=None)
    with pytest.raises(MalformedMessage) as caught:
        play.close()
    assert caught.value.code == "result-seeds"


# The server: residues and seeds.


def committed(play: Play, name: SiloId, vector: Any, **changes: Any) -> MaskedInput:
    """A commit to this vector, well signed."""
    words = vector_digest(play.ring.pack(vector), play.session.chunk_bytes)
    message = play.sent.get((name, Phase.MASKED_INPUT)) or play.step(name)
    done = signed(message, name, play.taus[-1], vector_digest=words, **changes)
    assert isinstance(done, MaskedInput)
    return done


@pytest.mark.parametrize("protection", SEALS)
@pytest.mark.parametrize("word", [Q, Q + 1, 2**54 - 1, 2**54, 2**63, 2**64 - 1])
@pytest.mark.parametrize("at", [0, 2, 4])
def test_a_word_that_is_no_residue(protection: Protection, word: int, at: int) -> None:
    """Committed to and signed; added lazily, it could push others' sums over the word's end."""
    play = sealed(protection).advance(Phase.MASKED_INPUT)
    play.step(D)
    vector = play.vectors[D].copy()
    vector[at] = word
    check_rejected(play, committed(play, D, vector), "residue-range", vector=vector)
    vector[at] = Q - 1
    assert play.give(committed(play, D, vector), vector)


@pytest.mark.parametrize("protection", SEALS)
@pytest.mark.parametrize(
    "vector",
    [None, np.zeros(4, np.uint64), np.zeros(5, np.uint32)],
    ids=["none", "short", "narrow"],
)
def test_vector_of_another_shape_or_ring(protection: Protection, vector: Any) -> None:
    play = sealed(protection).advance(Phase.MASKED_INPUT)
    check_rejected(play, play.step(D), "vector-length", vector=vector)


@pytest.mark.parametrize(("protection", "seed"), [(PLAIN, b""), (BOTH, b""), (MASKED, SEED)])
def test_a_seed_that_is_missing_or_has_no_place(protection: Protection, seed: bytes) -> None:
    play = play_of(protection).advance(Phase.MASKED_INPUT)
    play.step(D)
    message = committed(play, D, play.vectors[D], seed=seed)
    check_rejected(play, message, "seed-missing")
    assert play.accept(play.sent[D, Phase.MASKED_INPUT])


@pytest.mark.parametrize("protection", SEALS)
def test_a_seed_that_another_silo_has(protection: Protection) -> None:
    play = sealed(protection).advance(Phase.MASKED_INPUT)
    play.accept(play.step(A))
    play.step(D)
    message = committed(play, D, play.vectors[D], seed=play.seeds[A])
    check_rejected(play, message, "seed-repeated")
    assert play.accept(play.sent[A, Phase.MASKED_INPUT]) is False, "the very same is no repeat"
    assert play.accept(play.sent[D, Phase.MASKED_INPUT])


@pytest.mark.parametrize("about", [A, E])
def test_there_is_nobody_to_complain_about_where_nothing_is_dealt(about: SiloId) -> None:
    play = sealed(PLAIN).advance(Phase.MASKED_INPUT)
    play.step(D)
    message = committed(play, D, play.vectors[D], bad_dealers=(about,))
    check_rejected(play, message, "bad-dealers")


def test_the_vector_is_the_one_committed_to() -> None:
    play = sealed(PLAIN).advance(Phase.MASKED_INPUT)
    message = play.step(D)
    vector = play.vectors[D].copy()
    vector[0] ^= np.uint64(1)
    check_rejected(play, message, "vector-digest", vector=vector)


def test_a_refused_vector_leaves_no_trace_in_the_sum() -> None:
    play = sealed(PLAIN).advance(Phase.MASKED_INPUT)
    assert play.server.committed == frozenset()
    play.accept(play.step(A))
    assert play.server.committed == {A}
    before = server_snapshot(play.server)
    play.step(D)
    vector = np.full(5, 2**64 - 1, np.uint64)
    check_rejected(play, committed(play, D, vector), "residue-range", vector=vector)
    assert server_snapshot(play.server) == before
    assert play.server.committed == {A}
    play.gather(without=[A, D])
    play.close()
    play.advance(None)
    np.testing.assert_array_equal(play.server.total, play.total((A, B, C)))


def test_an_aborted_plain_attempt_may_be_tried_again() -> None:
    play = sealed(PLAIN).advance(Phase.CONSISTENCY)
    play.gather(without=[A, B])
    with pytest.raises(RoundAborted):
        play.close()
    again = play.again().advance(None)
    np.testing.assert_array_equal(again.server.total, again.total(silos(4)))
    assert again.ledgers[ME].revealed(BASE) is None
