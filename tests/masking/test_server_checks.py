"""Every reason for which the server refuses, whom it blames, and that nothing changes when it does.

The sum is held against a slow twin over Python's integers.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from secagg.config import Phase, SiloId, ThresholdRule
from secagg.crypto.secret import Secret
from secagg.crypto.shamir import PRIME, split
from secagg.errors import ConfigError, Conflict, FaultyClient, RoundAborted, SecaggError, TooLate
from secagg.masking.messages import (
    AdvertiseKeys,
    Box,
    Commitment,
    Commitments,
    MaskedInput,
    RevealedShare,
    ShareKind,
    Unmasking,
)
from secagg.masking.server import describe
from secagg.masking.shares import HeldShares, seal_shares, share_commitment

from .harness import (
    BASE,
    ME,
    A,
    B,
    C,
    D,
    E,
    Keyed,
    Play,
    flip,
    identity,
    make_session,
    of,
    server_snapshot,
    signed,
    silos,
    swap,
    without,
)

PHASES = list(Phase)


def check_rejected(
    play: Play,
    message: Any,
    code: str,
    error: type[SecaggError] = FaultyClient,
    vector: Any = "own",
) -> None:
    """Refused by class, code and name; the server is as it was."""
    if isinstance(vector, str):
        vector = play.vectors[message.sender] if isinstance(message, MaskedInput) else None
    before = server_snapshot(play.server)
    with pytest.raises(error) as caught:
        play.give(message, vector)
    assert (type(caught.value), caught.value.code) == (error, code)
    assert getattr(caught.value, "client", message.sender) == message.sender
    assert server_snapshot(play.server) == before


def check_aborted(
    play: Play, phase: Phase, have: int, need: int, blamed: tuple[str, ...] = ()
) -> None:
    """Closing aborts the attempt, for good."""
    with pytest.raises(RoundAborted) as caught:
        play.close()
    found = caught.value
    assert (found.phase, found.have, found.need, found.blamed) == (phase, have, need, blamed)
    assert (play.server.phase, play.server.total) == (None, None)
    assert (play.server.arrived, play.complete) == (frozenset(), False)
    with pytest.raises(TooLate) as over:
        play.close()
    assert over.value.code == "attempt-over"
    for (name, sent_in), message in play.sent.items():
        if name not in play.server._accepted[sent_in]:
            check_rejected(play, message, "phase-closed", TooLate)


def phase_of(message: Any) -> Phase:
    """The phase of a message."""
    return PHASES[
        ["AdvertiseKeys", "ShareKeys", "MaskedInput", "Consistency", "Unmasking"].index(
            type(message).__name__
        )
    ]


# The sum.


@pytest.mark.parametrize("bits", [16, 32, 64])
@pytest.mark.parametrize("n", [3, 4, 6])
def test_everybody_stays(n: int, bits: int) -> None:
    session = make_session(n)
    session = replace(session, tasks=(replace(session.tasks[0], ring_bits=bits),))
    play = Play(session, length=9).advance(None)
    np.testing.assert_array_equal(play.server.total, play.total(silos(n)))
    assert play.server.survivors == silos(n)


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("lost", silos(4))
def test_one_dropout_in_any_phase(phase: Phase, lost: SiloId) -> None:
    play = Play().advance(None, silent={p: [lost] for p in PHASES[PHASES.index(phase) :]})
    before = phase in PHASES[:3]
    survivors = tuple(name for name in silos(4) if not (before and name == lost))
    assert play.server.survivors == play.broadcast.survivors == survivors
    np.testing.assert_array_equal(play.server.total, play.total(survivors))


@pytest.mark.parametrize("phase", PHASES)
def test_too_few_are_left(play: Play, phase: Phase) -> None:
    play.advance(phase)
    play.gather(without=[A, C])
    check_aborted(play, phase, 2, 3)


def test_who_falls_silent_before_the_reveal_gave_no_bad_share(play: Play) -> None:
    play.advance(Phase.UNMASKING)
    play.gather(without=[A, C])
    with pytest.raises(RoundAborted) as caught:
        play.close()
    assert (caught.value.have, caught.value.because, caught.value.blamed) == (2, "", ())


def test_survivors_below_the_floor_but_not_below_t() -> None:
    play = Play(make_session(min_cohort=4)).advance(Phase.MASKED_INPUT)
    play.gather(without=[A])
    check_aborted(play, Phase.MASKED_INPUT, 3, 4)


def test_dropouts_of_different_phases() -> None:
    play = Play(make_session(7, threshold=ThresholdRule(1, 2)))  # t = 5
    a, b, c, d, e, f, g = silos(7)
    silent = {
        Phase.SHARE_KEYS: [a],
        Phase.MASKED_INPUT: [b],
    }
    play.advance(None, silent=silent)
    np.testing.assert_array_equal(play.server.total, play.total((c, d, e, f, g)))
    assert play.server.liars == set()


def test_progress_is_visible(play: Play) -> None:
    for phase in PHASES:
        assert (play.server.phase, play.server.arrived) == (phase, frozenset())
        assert (play.server.expected, play.complete) == (silos(4), False)
        play.accept(play.step(C))
        assert play.server.arrived == {C}
        play.gather(without=[C])
        assert play.complete
        play.close()
    assert (play.server.phase, play.complete) == (None, False)
    assert play.server.threshold == 3


@pytest.mark.parametrize("stranger", [E, SiloId("silo-z")])
def test_a_cohort_is_of_members(stranger: SiloId) -> None:
    """One is of the consortium and not of the session, one of neither."""
    play = Play(outsiders=(E,))
    opening = replace(play.opening, cohort=(A, B, C, stranger))
    with pytest.raises(ConfigError) as caught:
        describe(opening, identity("coordinator"), play.entropy)
    assert caught.value.code == "cohort"


# Refusals by phase.


@pytest.mark.parametrize("early", PHASES[1:])
def test_message_of_a_later_phase(early: Phase) -> None:
    ahead = Play().advance(early)
    message = ahead.step(ME)
    for phase in PHASES[: PHASES.index(early)]:
        check_rejected(Play().advance(phase), message, "phase-early")


@pytest.mark.parametrize("late", PHASES)
def test_message_of_a_closed_phase(late: Phase) -> None:
    play = Play().advance(late)
    message = play.step(D)
    play.gather(without=[D])
    play.close()
    check_rejected(play, message, "phase-closed", TooLate)
    assert D not in play.server.survivors or late in PHASES[3:]


@pytest.mark.parametrize("phase", PHASES)
def test_message_from_outside_the_cohort(phase: Phase) -> None:
    play = Play(make_session(5), cohort=silos(4)).advance(phase)
    message = signed(play.step(A), E, play.taus[-1], sender=E)
    check_rejected(play, message, "sender-unexpected", vector=play.vectors[A])


@pytest.mark.parametrize("phase", PHASES[1:])
def test_message_of_a_silo_that_dropped_out_before(phase: Phase) -> None:
    play = Play().advance(phase, silent={PHASES[PHASES.index(phase) - 1]: [D]})
    message = signed(play.step(A), D, play.taus[-1], sender=D)
    check_rejected(play, message, "silo-dropped", TooLate, vector=play.vectors[A])


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("how", ["bit", "colluder", "transcript"])
def test_message_that_its_sender_did_not_sign(phase: Phase, how: str) -> None:
    play = Play().advance(phase)
    message = play.step(ME)
    altered = {
        "bit": replace(message, signature=flip(message.signature)),
        "colluder": signed(message, D, play.taus[-1]),
        "transcript": signed(message, ME, bytes(32)),
    }[how]
    check_rejected(play, altered, "message-signature")
    assert play.accept(message)


@pytest.mark.parametrize("phase", PHASES)
def test_identical_resend_changes_nothing_ever(phase: Phase) -> None:
    play = Play().advance(phase)
    message = play.step(ME)
    assert play.accept(message) is True
    for _ in range(2):
        before = server_snapshot(play.server)
        assert play.accept(message) is False
        assert server_snapshot(play.server) == before
    if phase is not Phase.UNMASKING:  # a closed Unmasking keeps no share to compare with
        play.gather(without=[ME])
        play.close()
        before = server_snapshot(play.server)
        assert play.accept(message) is False
        assert server_snapshot(play.server) == before


def another(play: Play, message: Any) -> Any:
    """A second, different message of the same silo and phase, well signed."""
    changes: dict[Phase, Callable[[], dict[str, Any]]] = {
        Phase.ADVERTISE_KEYS: lambda: {"self_seed_hash": bytes(32)},
        Phase.SHARE_KEYS: lambda: {"boxes": ()},
        Phase.MASKED_INPUT: lambda: {"vector_digest": bytes(32)},
        Phase.CONSISTENCY: dict,
        Phase.UNMASKING: lambda: {"shares": message.shares[1:]},
    }
    phase = phase_of(message)
    if phase is Phase.CONSISTENCY:
        return replace(message, signature=flip(message.signature))
    return signed(message, message.sender, play.taus[-1], **changes[phase]())


@pytest.mark.parametrize("phase", PHASES)
def test_second_different_message(phase: Phase) -> None:
    play = Play().advance(phase)
    message = play.step(ME)
    play.accept(message)
    second = another(play, message)
    check_rejected(play, second, "message-conflict", Conflict)
    if phase is not Phase.UNMASKING:
        play.gather(without=[ME])
        play.close()
        check_rejected(play, second, "message-conflict", Conflict)


# Contents.


@pytest.mark.parametrize("use", ["channel_key", "mask_key"])
@pytest.mark.parametrize("taken", ["channel_key", "mask_key"])
def test_key_that_another_advertised(play: Play, use: str, taken: str) -> None:
    first = play.step(A)
    play.accept(first)
    copy = signed(play.step(D), D, play.taus[0], **{use: getattr(first, taken)})
    check_rejected(play, copy, "advert-keys")
    assert play.accept(play.sent[D, Phase.ADVERTISE_KEYS])


def test_one_key_for_both_uses(play: Play) -> None:
    advert = play.step(D)
    assert isinstance(advert, AdvertiseKeys)
    twice = signed(advert, D, play.taus[0], mask_key=advert.channel_key)
    check_rejected(play, twice, "advert-keys")


@pytest.mark.parametrize(
    "change",
    [
        lambda m: {"boxes": m.boxes[1:]},
        lambda m: {"boxes": ()},
        lambda m: {"boxes": swap(m.boxes, replace(m.boxes[0], recipient=D), "recipient")},
        lambda m: {"boxes": swap(m.boxes, replace(m.boxes[0], recipient=E), "recipient")},
        lambda m: {"commitments": m.commitments[1:]},
        lambda m: {"commitments": without(m.commitments, D, key="holder")},
        lambda m: {
            "commitments": swap(m.commitments, replace(m.commitments[0], holder=E), "holder")
        },
    ],
    ids=[
        "box_missing",
        "no_boxes",
        "box_to_oneself",
        "box_to_an_outsider",
        "commitment_missing",
        "own_commitment_missing",
        "commitment_to_an_outsider",
    ],
)
def test_share_lists(play: Play, change: Callable[[Any], dict[str, Any]]) -> None:
    play.advance(Phase.SHARE_KEYS)
    message = play.step(D)
    check_rejected(play, signed(message, D, play.taus[1], **change(message)), "share-lists")


@pytest.mark.parametrize(
    "vector",
    [
        None,
        np.zeros(4, np.uint32),
        np.zeros(6, np.uint32),
        np.zeros(5, np.uint64),
        np.zeros(5, np.int32),
    ],
    ids=["none", "short", "long", "words_of_64_bits", "signed"],
)
def test_vector_of_another_shape_or_ring(play: Play, vector: Any) -> None:
    play.advance(Phase.MASKED_INPUT)
    check_rejected(play, play.step(D), "vector-length", vector=vector)
    assert play.accept(play.sent[D, Phase.MASKED_INPUT])


def test_vector_that_is_not_the_one_committed_to(play: Play) -> None:
    play.advance(Phase.MASKED_INPUT)
    message = play.step(D)
    other = play.vectors[D].copy()
    other[0] += 1
    check_rejected(play, message, "vector-digest", vector=other)


@pytest.mark.parametrize("bad", [(D,), (E,), (A, D), (SiloId("silo-z"),)])
def test_complaint_about_oneself_or_about_nobody(play: Play, bad: tuple[SiloId, ...]) -> None:
    play.advance(Phase.MASKED_INPUT)
    message = signed(play.step(D), D, play.taus[2], bad_dealers=bad)
    check_rejected(play, message, "bad-dealers")


def test_complaint_about_who_shared_nothing() -> None:
    play = Play().advance(Phase.MASKED_INPUT, silent={Phase.SHARE_KEYS: [D]})
    message = signed(play.step(A), A, play.taus[2], bad_dealers=(D,))
    check_rejected(play, message, "bad-dealers")


def other_share(share: RevealedShare) -> RevealedShare:
    """The same bytes as a share of the other secret."""
    kinds = set(ShareKind) - {share.kind}
    return replace(share, kind=kinds.pop())


@pytest.mark.parametrize(
    "change",
    [
        lambda shares: shares[1:],
        lambda shares: (),
        lambda shares: (other_share(shares[0]), *shares[1:]),
        lambda shares: (*shares[:-1], other_share(shares[-1])),
        lambda shares: (*shares, replace(shares[0], owner=E)),
    ],
    ids=["one_missing", "none", "mask_key_of_a_survivor", "self_seed_of_an_orphan", "outsider"],
)
def test_reveal_of_others_than_the_survivors_dictate(
    play: Play, change: Callable[[tuple[RevealedShare, ...]], tuple[RevealedShare, ...]]
) -> None:
    play.advance(Phase.UNMASKING, silent={Phase.MASKED_INPUT: [D]})
    message = play.step(A)
    altered = signed(message, A, play.taus[3], shares=change(message.shares))
    check_rejected(play, altered, "reveal-list")


# Liars.


def lie(play: Play, name: SiloId, owners: Iterable[SiloId], bad: Secret | None = None) -> Unmasking:
    """A reveal with wrong shares of some owners."""
    message = play.step(name)
    shares = message.shares
    for owner in owners:
        share = of(shares, owner, "owner")
        wrong = bad or Secret(flip(share.share.reveal()))
        shares = swap(shares, replace(share, share=wrong), "owner")
    done = signed(message, name, play.taus[3], shares=shares)
    assert isinstance(done, Unmasking)
    return done


BEYOND = Secret(PRIME.to_bytes(33, "big"))


@pytest.mark.parametrize("owner", silos(4))
@pytest.mark.parametrize("bad", [None, BEYOND], ids=["wrong", "beyond_the_field"])
def test_a_liar_is_named_and_ignored(play: Play, owner: SiloId, bad: Secret | None) -> None:
    play.advance(Phase.UNMASKING)
    assert play.accept(lie(play, D, [owner], bad))
    assert play.server.liars == {D}
    play.gather(without=[D])
    play.close()
    assert play.server.liars == {D}
    np.testing.assert_array_equal(play.server.total, play.total(silos(4)))


def test_a_share_beyond_the_field_is_a_lie_though_its_dealer_committed_to_it(play: Play) -> None:
    play.advance(Phase.UNMASKING)
    message = lie(play, D, [A], BEYOND)
    digest = share_commitment(of(message.shares, A, "owner"), D, play.taus[1])
    dealing = play.server._dealings[A]
    changed = replace(dealing.commitments.of[D], self_seed=digest)
    commitments = Commitments(swap(tuple(dealing.commitments), changed, "holder"))
    play.server._dealings[A] = replace(dealing, commitments=commitments)
    assert play.accept(message)
    assert play.server.liars == {D}


def test_a_liar_about_an_orphan_is_named_and_ignored() -> None:
    play = Play(make_session(6, threshold=ThresholdRule(1, 2)))  # t = 4
    play.advance(Phase.UNMASKING, silent={Phase.MASKED_INPUT: [A]})
    play.accept(lie(play, D, [A]))
    play.gather(without=[D])
    play.close()
    assert play.server.liars == {D}
    np.testing.assert_array_equal(play.server.total, play.total(silos(6)[1:]))


def test_a_wrong_salt_is_a_lie(play: Play) -> None:
    play.advance(Phase.UNMASKING)
    message = play.step(D)
    shares = (replace(message.shares[0], salt=Secret(bytes(32))), *message.shares[1:])
    play.accept(signed(message, D, play.taus[3], shares=shares))
    assert play.server.liars == {D}


def test_too_many_liars_abort(play: Play) -> None:
    play.advance(Phase.UNMASKING)
    for name in (A, D):
        play.accept(lie(play, name, [C]))
    play.gather(without=[A, D])
    check_aborted(play, Phase.UNMASKING, 2, 3, (A, D))


# Dealers.


def complain(play: Play, name: SiloId, *dealers: SiloId) -> None:
    """A commit with complaints."""
    message = signed(play.step(name), name, play.taus[2], bad_dealers=dealers)
    play.accept(message)


@pytest.mark.parametrize("complainers", [(A, B), (A, B, C)])
def test_dealer_whose_boxes_do_not_open_is_blamed_before_consistency(
    play: Play, complainers: tuple[SiloId, ...]
) -> None:
    play.advance(Phase.MASKED_INPUT)
    for name in complainers:
        complain(play, name, D)
    play.gather(without=complainers)
    check_aborted(play, Phase.MASKED_INPUT, 4 - len(complainers), 3, (D,))
    assert play.server.survivors == ()


def test_dealer_that_dropped_out_is_blamed_for_its_boxes() -> None:
    play = Play().advance(Phase.MASKED_INPUT)
    complain(play, A, D)
    play.gather(without=[A, D])
    check_aborted(play, Phase.MASKED_INPUT, 2, 3, (D,))


def hold_nothing_of(play: Play, name: SiloId, dealer: SiloId) -> None:
    """A silo goes on as if the dealer's box had not opened."""
    complain(play, name, dealer)
    state = play.states[name]
    held = {owner: shares for owner, shares in state.held.items() if owner != dealer}
    commit = play.server._accepted[Phase.MASKED_INPUT][name]
    play.states[name] = replace(state, held=held, commit=commit)


@pytest.mark.parametrize("stays", [True, False])
def test_with_t_holders_the_dealer_itself_is_needed(play: Play, stays: bool) -> None:
    play.advance(Phase.MASKED_INPUT)
    hold_nothing_of(play, A, D)
    play.gather(without=[A])
    play.close()
    play.advance(Phase.UNMASKING)
    play.gather(without=[] if stays else [D])
    if stays:
        play.close()
        np.testing.assert_array_equal(play.server.total, play.total(silos(4)))
    else:
        check_aborted(play, Phase.UNMASKING, 2, 3)


def test_with_more_than_t_holders_it_is_not() -> None:
    play = Play(make_session(6, threshold=ThresholdRule(1, 2)))  # t = 4
    play.advance(Phase.MASKED_INPUT)
    hold_nothing_of(play, A, D)
    play.gather(without=[A])
    play.close()
    play.advance(None, silent={Phase.UNMASKING: [D]})
    np.testing.assert_array_equal(play.server.total, play.total(silos(6)))


def misdeal(play: Play, dealer: SiloId, secret: Secret | None, kind: ShareKind) -> None:
    """The dealer shares another secret than it advertised (None: of no 32-byte secret at all)."""
    play.advance(Phase.SHARE_KEYS)
    honest = play.step(dealer)
    state, tau1 = play.states[dealer], play.taus[1]
    entropy = Keyed("misdeal")
    holders = play.server.expected
    wrong = split(secret or Secret(bytes(32)), threshold=3, holders=len(holders), entropy=entropy)
    if secret is None:
        wrong = [Secret((2**256 + 7).to_bytes(33, "big"))] * len(holders)
    right = split(state.mask_key.private, threshold=3, holders=len(holders), entropy=entropy)
    seeds = split(state.self_seed, threshold=3, holders=len(holders), entropy=entropy)
    if kind is ShareKind.MASK_KEY:
        right = wrong
    else:
        seeds = wrong
    salt = Secret(entropy(32))
    shares = {
        holder: HeldShares(dealer, key, salt, seed, salt)
        for holder, key, seed in zip(holders, right, seeds, strict=True)
    }
    boxes = tuple(
        Box(h, seal_shares(shares[h], state.channel, h, state.adverts[h].channel_key, tau1))
        for h in holders
        if h != dealer
    )
    commitments: tuple[Commitment, ...] = tuple(shares[h].commitment(h, tau1) for h in holders)
    sent = signed(honest, dealer, tau1, boxes=boxes, commitments=commitments)
    play.states[dealer] = replace(state, own=shares[dealer], sent=sent)
    play.accept(sent)
    play.gather(without=[dealer])
    play.close()


@pytest.mark.parametrize("secret", [Secret(bytes(32)), None], ids=["wrong", "none"])
def test_dealer_that_committed_to_a_wrong_self_seed(play: Play, secret: Secret | None) -> None:
    misdeal(play, D, secret, ShareKind.SELF_SEED)
    play.advance(Phase.UNMASKING)
    play.gather()
    assert play.server.liars == set()
    check_aborted(play, Phase.UNMASKING, 0, 3, (D,))


@pytest.mark.parametrize("secret", [Secret(bytes(32)), None], ids=["wrong", "none"])
def test_dealer_that_committed_to_a_wrong_mask_key(play: Play, secret: Secret | None) -> None:
    misdeal(play, D, secret, ShareKind.MASK_KEY)
    play.advance(Phase.UNMASKING, silent={Phase.MASKED_INPUT: [D]})
    play.gather()
    assert play.server.liars == set()
    check_aborted(play, Phase.UNMASKING, 0, 3, (D,))


def test_a_wrong_mask_key_is_nobodys_loss_while_its_dealer_stays(play: Play) -> None:
    misdeal(play, D, Secret(bytes(32)), ShareKind.MASK_KEY)
    play.advance(None)
    np.testing.assert_array_equal(play.server.total, play.total(silos(4)))


def test_no_share_outlives_the_attempt(play: Play) -> None:
    play.advance(None)
    assert play.server._shares == {}
    assert play.server._accepted[Phase.UNMASKING] == {}


# Determinism.


def test_order_of_arrival_does_not_matter() -> None:
    told = []
    for order in itertools.islice(itertools.permutations(silos(4)), 0, 24, 5):
        play = Play(base=BASE)
        broadcasts = []
        while play.server.phase is not None:
            messages = {name: play.step(name) for name in silos(4) if name in play.server.expected}
            for name in order:
                if not (name == A and play.server.phase is Phase.UNMASKING):
                    play.accept(messages[name])
            broadcasts.append(play.close())
        assert play.server.total is not None
        told.append((broadcasts, list(play.taus), play.server.total.tobytes()))
    assert all(found == told[0] for found in told)


def test_result_is_signed_by_the_coordinator(play: Play) -> None:
    play.advance(None)
    result = play.broadcast
    assert (result.task, result.round, result.base) == ("training", 1, BASE)
    assert (result.cohort, result.survivors) == (silos(4), silos(4))
    assert result.survivors_transcript == play.taus[3]
    assert identity("coordinator").public == play.manifest.coordinator
    assert len(play.answer(B, result)) == 32
    assert play.answer(C, result) == play.answer(D, result)
