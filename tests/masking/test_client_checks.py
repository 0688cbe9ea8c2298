"""Every reason for which a client refuses: its class, its code, and the silence after it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest

from secagg.config import Clip, MaskPrg, Phase, Policy, Protection, ThresholdRule
from secagg.crypto import keys
from secagg.crypto.digest import vector_digest
from secagg.crypto.secret import Secret
from secagg.crypto.shamir import PRIME
from secagg.errors import (
    FaultyServer,
    InputError,
    MalformedMessage,
    OutOfOrder,
    PolicyRefused,
    SecaggError,
)
from secagg.masking import client, transcript
from secagg.masking.ledger import Joined, MemoryLedger, Recorded, Revealed
from secagg.masking.messages import (
    BOX_BYTES,
    AdvertiseKeys,
    Dealing,
    Dealt,
    Descriptor,
    MaskedInput,
    Roster,
    ShareKind,
    Signatures,
    Survivors,
    Unmasking,
)
from secagg.masking.shares import HeldShares, seal_shares
from secagg.ring.expand import Mask
from secagg.ring.vectors import Vector

from .harness import (
    BASE,
    COLLUDER,
    KEY,
    LOW_ORDER,
    ME,
    SESSION_ID,
    TASK,
    A,
    Alter,
    B,
    C,
    D,
    E,
    Play,
    check_refused,
    dealing_to,
    flip,
    identity,
    make_manifest,
    make_policy,
    make_sealed_session,
    make_session,
    make_task,
    of,
    republished,
    resigned,
    signed,
    silos,
    swap,
    without,
)


def cases(*rows: tuple[str, str, Alter]) -> pytest.MarkDecorator:
    """Parametrise by (code, name, alteration)."""
    return pytest.mark.parametrize(
        ("code", "alter"),
        [pytest.param(code, alter, id=f"bad_{name}") for code, name, alter in rows],
    )


# Phase 0: the descriptor.


DESCRIPTOR = cases(
    ("descriptor-signature", "signature_bit", lambda p, m: replace(m, signature=flip(m.signature))),
    (
        "descriptor-signature",
        "signed_by_a_silo",
        lambda p, m: signed(m, COLLUDER, p.taus[0]),
    ),
    (
        "descriptor-signature",
        "signed_over_another_attempt",
        lambda p, m: signed(m, "coordinator", p.again().taus[0]),
    ),
    (
        "descriptor-signature",
        "signed_as_another_type",
        lambda p, m: replace(m, signature=identity("coordinator").sign("result", p.taus[0], b"")),
    ),
    ("descriptor-manifest", "older_manifest", lambda p, m: resigned(m, manifest_version=6)),
    ("descriptor-manifest", "newer_manifest", lambda p, m: resigned(m, manifest_version=8)),
    (
        "descriptor-manifest",
        "other_manifest_of_that_version",
        lambda p, m: resigned(m, manifest_digest=flip(m.manifest_digest)),
    ),
    ("descriptor-session", "other_session", lambda p, m: resigned(m, session_id=bytes(32))),
    (
        "descriptor-session",
        "other_parameters",
        lambda p, m: resigned(m, session_hash=transcript.session_hash(make_session(min_cohort=4))),
    ),
    ("descriptor-round", "round_ahead", lambda p, m: resigned(m, round=m.round + 1)),
    ("descriptor-round", "other_task", lambda p, m: resigned(m, task="statistics")),
    ("descriptor-base", "other_base", lambda p, m: resigned(m, base=flip(m.base))),
    (
        "descriptor-cohort",
        "unknown_member",
        lambda p, m: resigned(m, cohort=(*m.cohort, "silo-z")),
    ),
    ("descriptor-cohort", "without_me", lambda p, m: resigned(m, cohort=(A, C, D))),
    ("descriptor-threshold", "threshold_high", lambda p, m: resigned(m, threshold=4)),
)


@DESCRIPTOR
def test_descriptor_refused(play: Play, code: str, alter: Alter) -> None:
    check_refused(play, alter(play, play.descriptor), code, FaultyServer)
    assert play.ledgers[ME].last_attempt(SESSION_ID) == (0, 0)


@pytest.mark.parametrize(
    "changes",
    [
        {"session_id": bytes(32)},
        {"session_hash": bytes(32)},
        {"manifest_version": 8},
        {"manifest_digest": bytes(32)},
        {"task": "statistics"},
        {"round": 2},
        {"attempt": 2},
        {"nonce": bytes(32)},
        {"cohort": (A, B, C)},
        {"threshold": 4},
        {"base": bytes(32)},
        {"key": KEY},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_every_field_of_a_descriptor_is_signed(play: Play, changes: dict[str, Any]) -> None:
    told = replace(play.descriptor, **changes)
    check_refused(play, told, "descriptor-signature", FaultyServer)


def test_the_fields_above_are_all(play: Play) -> None:
    assert {f.name for f in fields(Descriptor)} - {"signature"} == {
        "session_id",
        "session_hash",
        "manifest_version",
        "manifest_digest",
        "task",
        "round",
        "attempt",
        "nonce",
        "cohort",
        "threshold",
        "base",
        "key",
    }


def test_descriptor_of_a_past_round() -> None:
    play = Play(round_number=2)
    check_refused(play, resigned(play.descriptor, round=1), "descriptor-round", FaultyServer)


def test_descriptor_of_a_session_of_another_consortium(play: Play) -> None:
    manifest = make_manifest(play.session.silos, consortium="insurers")
    play.members[ME] = replace(play.members[ME], manifest=manifest)
    told = resigned(play.descriptor, manifest_digest=manifest.digest())
    check_refused(play, told, "descriptor-session", FaultyServer)


def test_descriptor_names_a_consortium_member_outside_the_session() -> None:
    play = Play(outsiders=(E,))
    told = resigned(play.descriptor, cohort=(A, B, C, D, E))
    check_refused(play, told, "descriptor-cohort", FaultyServer)


def test_descriptor_names_a_session_silo_that_left_the_consortium(play: Play) -> None:
    manifest = make_manifest((A, B, C))
    play.members[ME] = replace(play.members[ME], manifest=manifest)
    told = resigned(play.descriptor, manifest_digest=manifest.digest())
    check_refused(play, told, "descriptor-cohort", FaultyServer)


def test_descriptor_where_the_manifest_names_no_coordinator(play: Play) -> None:
    play.members[ME] = replace(
        play.members[ME], manifest=make_manifest(play.session.silos, coordinator=None)
    )
    check_refused(play, play.descriptor, "descriptor-coordinator", FaultyServer)


def test_descriptor_below_the_sessions_floor() -> None:
    play = Play(make_session(min_cohort=4))
    told = resigned(play.descriptor, cohort=(A, B, C))
    check_refused(play, told, "descriptor-cohort", FaultyServer)


@pytest.mark.parametrize("attempt", [1, 2])
def test_descriptor_of_an_attempt_not_newer_than_one_joined(attempt: int) -> None:
    joined = Play(attempt=2)
    joined.step(ME)
    older = joined.again(attempt=attempt)
    check_refused(older, older.descriptor, "descriptor-replay", FaultyServer)
    newer = joined.again(attempt=3)
    newer.step(ME)


def test_descriptor_of_an_older_round(play: Play) -> None:
    later = Play(round_number=3, ledgers=play.ledgers)
    later.step(ME)
    older = Play(round_number=2, attempt=9, ledgers=play.ledgers)
    check_refused(older, older.descriptor, "descriptor-replay", FaultyServer)


def test_joining_is_recorded_before_keys_exist(play: Play) -> None:
    admitted = client.admit(play.descriptor, play.members[ME], play.expected, play.ledgers[ME])
    assert admitted.entry == Joined("study", SESSION_ID, 1, 1, BASE, play.taus[0], BASE)
    other = replace(admitted.entry, attempt=2)
    with pytest.raises(OutOfOrder) as caught:
        client.advertise_keys(admitted, Recorded(other), entropy=play.entropy)
    assert caught.value.code == "ledger-entry"
    with pytest.raises(OutOfOrder) as spent:
        client.advertise_keys(admitted, Recorded(admitted.entry), entropy=play.entropy)
    assert spent.value.code == "state-spent"


def test_second_session_of_a_name_needs_consent(play: Play) -> None:
    first = Joined("study", bytes(32), 1, 1, BASE, bytes(32))
    play.ledgers[ME].record(first)
    check_refused(play, play.descriptor, "policy-session-name", PolicyRefused)
    member = play.members[ME]
    play.members[ME] = replace(member, policy=make_policy(repeat_sessions=("study-2",)))
    check_refused(play, play.descriptor, "policy-session-name", PolicyRefused)
    play.members[ME] = replace(member, policy=make_policy(repeat_sessions=("study",)))
    assert isinstance(play.step(ME), AdvertiseKeys)


def test_session_of_another_name_needs_no_consent(play: Play) -> None:
    play.ledgers[ME].record(Joined("study-2", bytes(32), 9, 9, BASE, bytes(32)))
    assert isinstance(play.step(ME), AdvertiseKeys)


@pytest.mark.parametrize(
    ("code", "session", "policy"),
    [
        ("policy-protection", {}, {"protections": ()}),
        ("policy-protection", {}, {"protections": (Protection.CKKS, Protection.CKKS_MASKED)}),
        ("policy-colluders", {"min_cohort": 4}, {"colluders": 2, "min_threshold": 4}),
        ("policy-min-cohort", {}, {"min_cohort": 4}),
        ("policy-ring", {}, {"ring_bits": (16, 64)}),
        ("policy-clip", {}, {"clips": (Clip.NONE,)}),
        ("policy-weight-cap", {}, {"max_weight_cap": 99.0}),
        ("policy-threshold", {}, {"min_threshold": 4}),
    ],
)
def test_descriptor_below_the_silos_own_floor(
    code: str, session: dict[str, Any], policy: dict[str, Any]
) -> None:
    play = Play(make_session(**session), policy=make_policy(**policy))
    check_refused(play, play.descriptor, code, PolicyRefused)


@pytest.mark.parametrize("index", [0, 1])
def test_every_task_of_the_session_is_held_against_the_policy(index: int) -> None:
    tasks = [make_task(), make_task(name="statistics")]
    tasks[index] = replace(tasks[index], weight_cap=101.0)
    play = Play(make_session(tasks=tuple(tasks)))
    check_refused(play, play.descriptor, "policy-weight-cap", PolicyRefused)


def test_descriptor_with_a_cohort_below_the_policy() -> None:
    play = Play(make_session(min_cohort=4), policy=make_policy(min_cohort=4))
    told = resigned(play.descriptor, cohort=(A, B, C))
    check_refused(play, told, "policy-cohort", PolicyRefused)


@pytest.mark.parametrize(("n", "threshold"), [(4, 2), (5, 3), (5, 1)])
def test_descriptor_with_a_threshold_that_cannot_hold(n: int, threshold: int) -> None:
    play = Play(make_session(n), policy=make_policy())
    told = resigned(play.descriptor, threshold=threshold)
    check_refused(play, told, "policy-threshold", PolicyRefused)


def test_a_session_or_policy_of_no_protection_cannot_be_written() -> None:
    assert tuple(Protection) == (Protection.MASKED, Protection.CKKS, Protection.CKKS_MASKED)
    assert all(protection.masks or protection.seals for protection in Protection)
    with pytest.raises(SecaggError):
        Policy(0, 3, 3, (), (), (), 1.0)


# Phase 2: the roster.


def readvertised(play: Play, roster: Roster, name: str, **changes: Any) -> Roster:
    """The roster with one advert that its silo signed anew with these changes."""
    advert = of(roster.adverts, name)  # type: ignore[arg-type]
    return Roster(swap(roster.adverts, signed(advert, name, play.taus[0], **changes)))


def own(roster: Roster) -> AdvertiseKeys:
    """My advert."""
    advert = of(roster.adverts, ME)
    assert isinstance(advert, AdvertiseKeys)
    return advert


def foreign_advert(play: Play, name: Any) -> AdvertiseKeys:
    """What a silo advertised in another attempt."""
    other = play.again()
    advert = other.answer(name, other.descriptor)
    assert isinstance(advert, AdvertiseKeys)
    return advert


ROSTER = cases(
    ("roster-threshold", "too_few", lambda p, m: Roster(without(m.adverts, A, C))),
    ("roster-own-advert", "without_me", lambda p, m: Roster(without(m.adverts, ME))),
    (
        "roster-own-advert",
        "own_signature_altered",
        lambda p, m: Roster(swap(m.adverts, replace(own(m), signature=flip(own(m).signature)))),
    ),
    (
        "roster-own-advert",
        "own_keys_swapped",
        lambda p, m: readvertised(
            p, m, ME, channel_key=own(m).mask_key, mask_key=own(m).channel_key
        ),
    ),
    (
        "roster-own-advert",
        "own_seed_replaced",
        lambda p, m: readvertised(p, m, ME, self_seed_hash=bytes(32)),
    ),
    (
        "roster-own-advert",
        "own_advert_of_another_attempt",
        lambda p, m: Roster(swap(m.adverts, foreign_advert(p, ME))),
    ),
    (
        "advertise-keys-signature",
        "foreign_attempts_signature",
        lambda p, m: Roster(swap(m.adverts, foreign_advert(p, C))),
    ),
    (
        "advertise-keys-signature",
        "key_replaced_by_the_coordinator",
        lambda p, m: Roster(
            swap(m.adverts, replace(of(m.adverts, C), mask_key=b"\x09" + bytes(31)))
        ),
    ),
    (
        "advertise-keys-signature",
        "signed_by_a_colluder",
        lambda p, m: Roster(swap(m.adverts, signed(of(m.adverts, C), COLLUDER, p.taus[0]))),
    ),
    (
        "advertise-keys-signature",
        "signed_by_the_coordinator",
        lambda p, m: Roster(swap(m.adverts, signed(of(m.adverts, C), "coordinator", p.taus[0]))),
    ),
    (
        "advertise-keys-signature",
        "renamed",
        lambda p, m: Roster(swap(m.adverts, replace(of(m.adverts, D), sender=C))),
    ),
    (
        "roster-keys",
        "my_channel_key_reflected",
        lambda p, m: readvertised(p, m, COLLUDER, channel_key=own(m).channel_key),
    ),
    (
        "roster-keys",
        "my_mask_key_reflected",
        lambda p, m: readvertised(p, m, COLLUDER, mask_key=own(m).mask_key),
    ),
    (
        "roster-keys",
        "my_mask_key_as_channel_key",
        lambda p, m: readvertised(p, m, COLLUDER, channel_key=own(m).mask_key),
    ),
    (
        "roster-keys",
        "key_of_another_duplicated",
        lambda p, m: readvertised(p, m, COLLUDER, mask_key=of(m.adverts, A).mask_key),
    ),
    (
        "roster-keys",
        "one_key_for_both_uses",
        lambda p, m: readvertised(p, m, COLLUDER, mask_key=of(m.adverts, D).channel_key),
    ),
)


@ROSTER
def test_roster_refused(play: Play, code: str, alter: Alter) -> None:
    play.advance(Phase.SHARE_KEYS)
    check_refused(play, alter(play, play.broadcast), code, FaultyServer)


@ROSTER
def test_roster_refused_where_nothing_is_masked(code: str, alter: Alter) -> None:
    """The silo finds the same, and has not committed to its sealed vector."""
    play = Play(make_sealed_session()).advance(Phase.MASKED_INPUT)
    check_refused(play, alter(play, play.broadcast), code, FaultyServer)


def test_roster_with_somebody_outside_the_cohort() -> None:
    play = Play(make_session(5), cohort=(A, B, C, D)).advance(Phase.SHARE_KEYS)
    advert = replace(of(play.broadcast.adverts, D), sender=E, channel_key=b"\x09" + bytes(31))
    told = Roster((*play.broadcast.adverts, signed(advert, E, play.taus[0])))
    check_refused(play, told, "roster-cohort", FaultyServer)


def test_a_dropout_is_no_reason_to_refuse_a_roster(play: Play) -> None:
    play.advance(Phase.SHARE_KEYS, silent={Phase.ADVERTISE_KEYS: [D]})
    assert play.step(ME).sender == ME


# Phase 3: the dealings.


def redealt(play: Play, dealt: Dealt, name: str, by: str | None = None, **changes: Any) -> Dealt:
    """The dealings with one that somebody (its dealer) signed anew with these changes."""
    dealing = of(dealt.dealings, name, "dealer")  # type: ignore[arg-type]
    new = signed(dealing, by or name, play.taus[1], **changes)
    return Dealt(swap(dealt.dealings, new, "dealer"))


def dealing_of(dealt: Dealt, name: Any) -> Dealing:
    """One dealing."""
    dealing = of(dealt.dealings, name, "dealer")
    assert isinstance(dealing, Dealing)
    return dealing


def foreign_dealing(play: Play, name: Any) -> Dealing:
    """What a silo dealt in another attempt."""
    return dealing_of(play.again().advance(Phase.MASKED_INPUT).told(ME), name)


DEALT = cases(
    ("dealt-threshold", "too_few", lambda p, m: Dealt(without(m.dealings, A, C, key="dealer"))),
    ("dealt-own", "without_me", lambda p, m: Dealt(without(m.dealings, ME, key="dealer"))),
    (
        "dealt-own",
        "own_boxes_altered",
        lambda p, m: redealt(p, m, ME, boxes_digest=bytes(32)),
    ),
    (
        "dealt-own",
        "own_commitments_altered",
        lambda p, m: redealt(p, m, ME, commitments=dealing_of(m, A).commitments),
    ),
    (
        "dealt-own",
        "own_dealing_of_another_attempt",
        lambda p, m: Dealt(swap(m.dealings, foreign_dealing(p, ME), "dealer")),
    ),
    (
        "share-keys-signature",
        "own_signature_altered",
        lambda p, m: Dealt(
            swap(
                m.dealings,
                replace(dealing_of(m, ME), signature=flip(dealing_of(m, ME).signature)),
                "dealer",
            )
        ),
    ),
    (
        "share-keys-signature",
        "foreign_attempts_signature",
        lambda p, m: Dealt(swap(m.dealings, foreign_dealing(p, C), "dealer")),
    ),
    (
        "share-keys-signature",
        "signed_by_a_colluder",
        lambda p, m: redealt(p, m, C, COLLUDER),
    ),
    (
        "share-keys-signature",
        "boxes_digest_altered",
        lambda p, m: Dealt(
            swap(m.dealings, replace(dealing_of(m, C), boxes_digest=bytes(32)), "dealer")
        ),
    ),
    (
        "share-keys-signature",
        "commitments_of_another",
        lambda p, m: Dealt(
            swap(
                m.dealings,
                replace(dealing_of(m, C), commitments=dealing_of(m, A).commitments),
                "dealer",
            )
        ),
    ),
    (
        "dealt-commitments",
        "commitment_to_me_missing",
        lambda p, m: redealt(
            p,
            m,
            COLLUDER,
            commitments=without(dealing_of(m, COLLUDER).commitments, ME, key="holder"),
        ),
    ),
    (
        "dealt-commitments",
        "own_commitment_missing",
        lambda p, m: redealt(
            p,
            m,
            COLLUDER,
            commitments=without(dealing_of(m, COLLUDER).commitments, COLLUDER, key="holder"),
        ),
    ),
    (
        "dealt-commitments",
        "commitment_to_an_outsider",
        lambda p, m: redealt(
            p,
            m,
            COLLUDER,
            commitments=(
                *dealing_of(m, COLLUDER).commitments,
                replace(dealing_of(m, COLLUDER).commitments[0], holder=E),
            ),
        ),
    ),
    ("dealt-commitments", "no_commitments", lambda p, m: redealt(p, m, COLLUDER, commitments=())),
)


@DEALT
def test_dealt_refused(play: Play, code: str, alter: Alter) -> None:
    play.advance(Phase.MASKED_INPUT)
    check_refused(play, alter(play, play.told(ME)), code, FaultyServer)


def test_dealt_by_somebody_outside_the_roster(play: Play) -> None:
    play.advance(Phase.MASKED_INPUT, silent={Phase.ADVERTISE_KEYS: [D]})
    told = play.told(ME)
    dealing = signed(dealing_of(told, C), D, play.taus[1], dealer=D)
    told = Dealt((*told.dealings, dealing))
    check_refused(play, told, "dealt-roster", FaultyServer)


@pytest.fixture
def lax_parser(monkeypatch: pytest.MonkeyPatch) -> None:
    """A parser that lets low-order keys pass: the client's own line of defence is behind it."""
    monkeypatch.setattr(keys, "_LOW_ORDER", frozenset())


@pytest.mark.parametrize("point", LOW_ORDER, ids=range(len(LOW_ORDER)))
def test_low_order_key_is_no_advert(play: Play, point: bytes) -> None:
    advert = play.step(COLLUDER)
    for use in ("channel_key", "mask_key"):
        with pytest.raises(MalformedMessage) as caught:
            replace(advert, **{use: point})
        assert caught.value.code == "public-key-low-order"


@pytest.mark.usefixtures("lax_parser")
@pytest.mark.parametrize("point", LOW_ORDER, ids=range(len(LOW_ORDER)))
def test_low_order_channel_key_is_refused_by_the_client(play: Play, point: bytes) -> None:
    play.advance(Phase.SHARE_KEYS)
    told = readvertised(play, play.broadcast, COLLUDER, channel_key=point)
    check_refused(play, told, "roster-keys", FaultyServer)


@pytest.mark.usefixtures("lax_parser")
@pytest.mark.parametrize("point", LOW_ORDER, ids=range(len(LOW_ORDER)))
def test_low_order_mask_key_is_refused_before_the_vector_is_masked(
    play: Play, point: bytes
) -> None:
    play.advance(Phase.SHARE_KEYS)
    roster = readvertised(play, play.broadcast, COLLUDER, mask_key=point)
    play.states[COLLUDER] = replace(play.states[COLLUDER], advert=of(roster.adverts, COLLUDER))
    shared = [play.answer(name, roster) for name in (A, B, C, D)]
    play.broadcast = Dealt(tuple(dealing_to(ME, message) for message in shared))
    check_refused(play, play.broadcast, "roster-keys", FaultyServer)


# Boxes that do not open: a complaint, not an abort.


def reboxed(play: Play, change: Callable[[HeldShares], HeldShares]) -> Dealt:
    """What I am told where the colluder sealed something else than it committed to."""
    state = play.states[COLLUDER]
    channel = state.channel
    honest = state.own
    box = seal_shares(
        change(replace(honest, owner=COLLUDER)),
        channel,
        ME,
        of(play.states[ME].adverts.values(), ME).channel_key,
        play.taus[1],
    )
    dealing = replace(dealing_of(play.told(ME), COLLUDER), sealed=box)
    return Dealt(swap(play.told(ME).dealings, dealing, "dealer"))


def sealed(box: bytes | None) -> Alter:
    """An alteration: the colluder's box to me is this."""

    def alter(play: Play, told: Dealt) -> Dealt:
        dealing = replace(dealing_of(told, COLLUDER), sealed=box)
        return Dealt(swap(told.dealings, dealing, "dealer"))

    return alter


BAD_BOXES: dict[str, Alter] = {
    "bad_no_box": sealed(None),
    "bad_garbage": sealed(bytes(BOX_BYTES)),
    "bad_box_for_another": lambda p, m: sealed(dealing_of(p.told(A), COLLUDER).sealed)(p, m),
    "bad_box_of_another_dealer": lambda p, m: sealed(dealing_of(p.told(ME), C).sealed)(p, m),
    "bad_box_of_another_attempt": lambda p, m: sealed(foreign_dealing(p, COLLUDER).sealed)(p, m),
    "bad_my_own_box_reflected": lambda p, m: sealed(
        of(p.sent[ME, Phase.SHARE_KEYS].boxes, COLLUDER, "recipient").sealed
    )(p, m),
    "bad_other_shares_than_committed": lambda p, m: reboxed(p, lambda shares: shares),
    "bad_share_beyond_the_field": lambda p, m: reboxed(
        p, lambda shares: replace(shares, mask_key=Secret(PRIME.to_bytes(33, "big")))
    ),
    "bad_commitment": lambda p, m: redealt(
        p,
        m,
        COLLUDER,
        commitments=swap(
            dealing_of(m, COLLUDER).commitments,
            replace(of(dealing_of(m, COLLUDER).commitments, ME, "holder"), self_seed=bytes(32)),
            "holder",
        ),
    ),
}


@pytest.mark.parametrize("alter", BAD_BOXES.values(), ids=BAD_BOXES.keys())
def test_box_that_does_not_open_is_a_complaint(play: Play, alter: Alter) -> None:
    play.advance(Phase.MASKED_INPUT)
    told = alter(play, play.told(ME))
    commit = play.answer(ME, told)
    assert commit.bad_dealers == (COLLUDER,)
    state = play.states[ME]
    assert set(state.held) == {A, B, C}


def test_who_complained_reveals_no_share_of_that_dealer() -> None:
    play = Play(make_session(6, threshold=ThresholdRule(1, 2))).advance(Phase.MASKED_INPUT)
    play.broadcast = {**play.broadcast, ME: sealed(None)(play, play.told(ME))}
    play.gather()
    play.close()
    play.advance(Phase.UNMASKING)
    reveal = play.step(ME)
    assert [share.owner for share in reveal.shares] == [A, B, C, E, silos(6)[5]]
    play.accept(reveal)
    play.gather(without=[ME])
    play.close()
    np.testing.assert_array_equal(play.server.total, play.total(silos(6)))


# Phase 4: the survivors.


def recommitted(
    play: Play, survivors: Survivors, name: str, by: str | None = None, **changes: Any
) -> Survivors:
    """The survivors with one commit that somebody (its silo) signed anew with these changes."""
    commit = of(survivors.commits, name)  # type: ignore[arg-type]
    return Survivors(swap(survivors.commits, signed(commit, by or name, play.taus[-2], **changes)))


def foreign_commit(play: Play, name: Any) -> MaskedInput:
    """What a silo committed to in another attempt."""
    return of(play.again().advance(Phase.CONSISTENCY).broadcast.commits, name)  # type: ignore[no-any-return]


SURVIVORS = cases(
    ("survivors-threshold", "too_few", lambda p, m: Survivors(without(m.commits, A, C))),
    ("survivors-threshold", "me_alone", lambda p, m: Survivors(without(m.commits, A, C, D))),
    ("survivors-threshold", "nobody", lambda p, m: Survivors(())),
    ("survivors-own", "without_me", lambda p, m: Survivors(without(m.commits, ME))),
    (
        "survivors-own",
        "own_digest_altered",
        lambda p, m: recommitted(p, m, ME, vector_digest=bytes(32)),
    ),
    (
        "survivors-own",
        "own_complaints_altered",
        lambda p, m: recommitted(p, m, ME, bad_dealers=(COLLUDER,)),
    ),
    (
        "survivors-own",
        "own_signature_altered",
        lambda p, m: Survivors(
            swap(
                m.commits,
                replace(of(m.commits, ME), signature=flip(of(m.commits, ME).signature)),
            )
        ),
    ),
    (
        "survivors-own",
        "own_commit_of_another_attempt",
        lambda p, m: Survivors(swap(m.commits, foreign_commit(p, ME))),
    ),
    (
        "masked-input-signature",
        "forged_by_a_colluder",
        lambda p, m: recommitted(p, m, C, COLLUDER),
    ),
    (
        "masked-input-signature",
        "digest_replaced",
        lambda p, m: Survivors(swap(m.commits, replace(of(m.commits, C), vector_digest=bytes(32)))),
    ),
    (
        "masked-input-signature",
        "foreign_attempts_commit",
        lambda p, m: Survivors(swap(m.commits, foreign_commit(p, C))),
    ),
    (
        "masked-input-signature",
        "renamed",
        lambda p, m: Survivors(swap(m.commits, replace(of(m.commits, D), sender=C))),
    ),
)


@SURVIVORS
def test_survivors_refused(play: Play, code: str, alter: Alter) -> None:
    play.advance(Phase.CONSISTENCY)
    check_refused(play, alter(play, play.broadcast), code, FaultyServer)


@SURVIVORS
def test_survivors_refused_where_nothing_is_masked(code: str, alter: Alter) -> None:
    play = Play(make_sealed_session()).advance(Phase.CONSISTENCY)
    check_refused(play, alter(play, play.broadcast), code, FaultyServer)


def test_survivor_that_dealt_no_shares(play: Play) -> None:
    play.advance(Phase.CONSISTENCY, silent={Phase.SHARE_KEYS: [D]})
    commit = signed(of(play.broadcast.commits, C), D, play.taus[2], sender=D)
    told = Survivors((*play.broadcast.commits, commit))
    check_refused(play, told, "survivors-dealt", FaultyServer)


def test_survivors_below_the_sessions_floor() -> None:
    play = Play(make_session(min_cohort=4)).advance(Phase.CONSISTENCY)
    told = Survivors(without(play.broadcast.commits, D))
    check_refused(play, told, "survivors-floor", FaultyServer)


def test_survivors_below_the_silos_floor(play: Play) -> None:
    play.advance(Phase.CONSISTENCY)
    state = play.states[ME]
    member = replace(state.attempt.member, policy=make_policy(min_cohort=4))
    play.states[ME] = replace(state, attempt=replace(state.attempt, member=member))
    told = Survivors(without(play.broadcast.commits, D))
    check_refused(play, told, "survivors-floor", FaultyServer)


def test_survivors_that_would_difference_a_revealed_sum(play: Play) -> None:
    play.advance(None)
    second = play.again().advance(Phase.CONSISTENCY, silent={Phase.MASKED_INPUT: [D]})
    check_refused(second, second.broadcast, "differencing", PolicyRefused)


def test_an_update_that_is_not_the_one_in_a_revealed_sum(play: Play) -> None:
    play.advance(Phase.CONSISTENCY)
    survivors = tuple(commit.sender for commit in play.broadcast.commits)
    play.ledgers[ME].record(Revealed(BASE, bytes(32), survivors, b"another update"))
    check_refused(play, play.broadcast, "differencing-update", PolicyRefused)


def test_the_same_survivors_may_be_summed_again(play: Play) -> None:
    play.advance(None)
    second = play.again().advance(None)
    np.testing.assert_array_equal(second.server.total, play.server.total)


def test_a_signature_without_a_reveal_binds_nobody(play: Play) -> None:
    play.advance(Phase.UNMASKING)
    play.again().advance(None, silent={Phase.MASKED_INPUT: [D]})


def test_an_attempt_left_open_does_not_difference_a_newer_one(play: Play) -> None:
    """Both attempts sign before either reveals; the second reveal sees the first."""
    play.advance(Phase.UNMASKING)
    second = play.again().advance(Phase.UNMASKING, silent={Phase.MASKED_INPUT: [D]})
    assert isinstance(second.step(ME), Unmasking)
    check_refused(play, play.broadcast, "differencing", PolicyRefused)


# Phase 5: the signatures.


def foreign_signatures(play: Play) -> Signatures:
    """The signatures of another attempt."""
    told = play.again().advance(Phase.UNMASKING).broadcast
    assert isinstance(told, Signatures)
    return told


SIGNATURES = cases(
    ("consistency-threshold", "nobody", lambda p, m: Signatures(())),
    ("consistency-threshold", "one_too_few", lambda p, m: Signatures(m.signed[:2])),
    ("consistency-duplicate", "copies_of_one", lambda p, m: Signatures(m.signed[:1] * 3)),
    (
        "consistency-duplicate",
        "one_doubled_for_the_threshold",
        lambda p, m: Signatures((*m.signed[:2], m.signed[0])),
    ),
    (
        "consistency-duplicate",
        "one_doubled_beyond_the_threshold",
        lambda p, m: Signatures((*m.signed, m.signed[0])),
    ),
    ("consistency-signature", "foreign_attempts", lambda p, m: foreign_signatures(p)),
    (
        "consistency-signature",
        "one_foreign_attempts",
        lambda p, m: Signatures(swap(m.signed, of(foreign_signatures(p).signed, C))),
    ),
    (
        "consistency-signature",
        "forged_by_a_colluder",
        lambda p, m: Signatures(swap(m.signed, signed(of(m.signed, C), COLLUDER, p.taus[3]))),
    ),
    (
        "consistency-signature",
        "other_survivors_signed",
        lambda p, m: Signatures(
            swap(
                m.signed,
                signed(
                    of(m.signed, C),
                    C,
                    transcript.survivors_transcript(
                        p.taus[2],
                        p.sent_survivors.commits[:3],  # type: ignore[attr-defined]
                    ),
                ),
            )
        ),
    ),
    (
        "consistency-signature",
        "signature_of_another_phase",
        lambda p, m: Signatures(
            swap(
                m.signed,
                replace(
                    of(m.signed, C),
                    signature=identity(C).sign("unmasking", p.taus[3], C.encode()),
                ),
            )
        ),
    ),
    (
        "consistency-signature",
        "renamed",
        lambda p, m: Signatures(swap(m.signed, replace(of(m.signed, D), sender=C))),
    ),
)


@SIGNATURES
def test_signatures_refused(play: Play, code: str, alter: Alter) -> None:
    play.advance(Phase.CONSISTENCY)
    play.sent_survivors = play.broadcast  # type: ignore[attr-defined]
    play.advance(Phase.UNMASKING)
    check_refused(play, alter(play, play.broadcast), code, FaultyServer)
    assert play.ledgers[ME].revealed(BASE) is None


@pytest.mark.parametrize("silent", [Phase.SHARE_KEYS, Phase.MASKED_INPUT])
def test_signature_of_no_survivor(play: Play, silent: Phase) -> None:
    play.advance(Phase.UNMASKING, silent={silent: [D]})
    signature = signed(play.broadcast.signed[0], D, play.taus[3], sender=D)
    for told in (
        Signatures((*play.broadcast.signed, signature)),
        Signatures((*play.broadcast.signed[:2], signature)),
    ):
        copy = Play().advance(Phase.UNMASKING, silent={silent: [D]})
        assert copy.taus == play.taus
        check_refused(copy, told, "consistency-signer", FaultyServer)


def test_exactly_t_signatures_in_any_order_are_enough(play: Play) -> None:
    play.advance(Phase.UNMASKING)
    reveal = play.answer(ME, Signatures(play.broadcast.signed[3:0:-1]))
    assert [share.kind for share in reveal.shares] == [ShareKind.SELF_SEED] * 4


def test_what_is_revealed_follows_from_the_survivors(play: Play) -> None:
    silent = {Phase.MASKED_INPUT: [D]}
    reveal = play.advance(Phase.UNMASKING, silent=silent).step(ME)
    assert {share.owner: share.kind for share in reveal.shares} == {
        A: ShareKind.SELF_SEED,
        B: ShareKind.SELF_SEED,
        C: ShareKind.SELF_SEED,
        D: ShareKind.MASK_KEY,
    }
    entry = Revealed(BASE, play.taus[3], (A, B, C))
    assert play.ledgers[ME].revealed(BASE) == entry


def test_nothing_is_revealed_of_who_dealt_nothing(play: Play) -> None:
    reveal = play.advance(Phase.UNMASKING, silent={Phase.SHARE_KEYS: [D]}).step(ME)
    assert [share.owner for share in reveal.shares] == [A, B, C]


def test_reveal_demands_its_own_ledger_entry(play: Play) -> None:
    play.advance(Phase.UNMASKING)
    checked = client.check_consistency(play.states[ME], play.broadcast)
    other = replace(checked.entry, survivors=(A, B, C))
    with pytest.raises(OutOfOrder) as caught:
        client.reveal_shares(checked, Recorded(other))
    assert caught.value.code == "ledger-entry"
    with pytest.raises(OutOfOrder) as spent:
        client.reveal_shares(checked, Recorded(checked.entry))
    assert spent.value.code == "state-spent"


@pytest.mark.parametrize("phase", list(Phase)[1:])
def test_a_state_is_used_once(play: Play, phase: Phase) -> None:
    play.advance(phase)
    state = play.states[ME]
    play.step(ME)
    play.states[ME] = state
    with pytest.raises(OutOfOrder) as caught:
        play.step(ME)
    assert caught.value.code == "state-spent"


# Phase 6: the result.


RESULT = cases(
    ("result-signature", "signature_bit", lambda p, m: replace(m, signature=flip(m.signature))),
    ("result-signature", "signed_by_a_silo", lambda p, m: republished(p, COLLUDER)),
    ("result-signature", "digest_altered", lambda p, m: replace(m, vector_digest=bytes(32))),
    (
        "result-signature",
        "transcript_altered",
        lambda p, m: replace(m, survivors_transcript=bytes(32)),
    ),
    ("result-signature", "survivors_altered", lambda p, m: replace(m, survivors=(A, B, C))),
    ("result-signature", "cohort_altered", lambda p, m: replace(m, cohort=(A, B, C))),
    ("result-round", "other_round", lambda p, m: republished(p, round=2)),
    ("result-round", "other_task", lambda p, m: republished(p, task="statistics")),
    ("result-base", "other_base", lambda p, m: republished(p, base=bytes(32))),
    ("result-survivors", "other_cohort", lambda p, m: republished(p, cohort=(A, B, C))),
    ("result-survivors", "other_survivors", lambda p, m: republished(p, survivors=(A, B, C))),
    (
        "result-survivors",
        "other_survivors_transcript",
        lambda p, m: republished(p, survivors_transcript=bytes(32)),
    ),
)


@RESULT
def test_result_refused(play: Play, code: str, alter: Alter) -> None:
    play.advance(None)
    check_refused(play, alter(play, play.broadcast), code, FaultyServer)
    if code != "result-survivors":  # a silo that was away cannot know the survivors
        del play.states[ME]
        check_refused(play, alter(play, play.broadcast), code, FaultyServer)


@pytest.mark.parametrize("last", [Phase.UNMASKING, None])
def test_result_is_held_against_what_was_signed_even_without_a_reveal(
    play: Play, last: Phase | None
) -> None:
    play.advance(Phase.UNMASKING)
    play.gather(without=[ME])
    signed_only = play.states[ME]
    if last is None:
        play.states[ME] = client.check_consistency(signed_only, play.broadcast)
    play.close()
    assert len(play.answer(ME, play.broadcast)) == 32
    check_refused(play, republished(play, survivors=(A, B, C)), "result-survivors", FaultyServer)


def test_result_accepted_by_survivors_and_by_who_was_away(play: Play) -> None:
    play.advance(None, silent={Phase.ADVERTISE_KEYS: [D]})
    tau4 = transcript.result_transcript(play.taus[3], play.broadcast.vector_digest)
    assert [play.answer(name, play.broadcast) for name in silos(4)] == [tau4] * 4


def test_result_where_the_manifest_names_no_coordinator(play: Play) -> None:
    play.advance(None)
    manifest = make_manifest(play.session.silos, coordinator=None)
    play.members[ME] = replace(play.members[ME], manifest=manifest)
    check_refused(play, play.broadcast, "result-signature", FaultyServer)


# Across phases.


def test_the_update_is_made_once_and_committed_to_as_it_was_returned(play: Play) -> None:
    """With a mask of its own and one for each peer, after all checks."""
    play.advance(Phase.MASKED_INPUT)
    assert play.encodings == []
    asked: list[int] = []
    vector = np.arange(play.opening.length, dtype=play.ring.dtype)

    def encoded(masks: Sequence[Mask], prg: MaskPrg) -> Vector:
        asked.append(len({mask.key.reveal() for mask in masks}))
        assert prg is play.session.mask_prg
        return vector

    _, commit, returned = client.mask_input(play.states[ME], play.told(ME), encoded)
    assert asked == [len(play.session.silos)]
    assert returned is vector
    words = vector_digest(play.ring.pack(vector), play.session.chunk_bytes)
    assert commit.vector_digest == words


def test_an_update_that_cannot_be_made_is_not_made_twice(play: Play) -> None:
    """Masks go onto one vector: whoever fails with them begins another attempt."""
    play.advance(Phase.MASKED_INPUT)

    def encoded(masks: Sequence[Mask], prg: MaskPrg) -> Vector:
        raise InputError("tensor-finite", "A tensor holds NaN.")

    with pytest.raises(InputError):
        client.mask_input(play.states[ME], play.told(ME), encoded)
    with pytest.raises(OutOfOrder) as spent:
        play.step(ME)
    assert spent.value.code == "state-spent"
    assert play.encodings == []


def test_states_and_messages_show_no_secret(play: Play) -> None:
    for phase in Phase:
        play.advance(phase)
        play.step(ME)
        shown = repr(play.states[ME]) + repr(play.sent[ME, phase])
        assert "Secret(<" in shown or phase is Phase.CONSISTENCY
        play.accept(play.sent[ME, phase])
        play.gather(without=[ME])
        play.close()


def test_keys_are_fresh_in_every_attempt(play: Play) -> None:
    first, second = play.step(ME), play.again().step(ME)
    keys = {first.channel_key, first.mask_key, second.channel_key, second.mask_key}
    assert len(keys) == 4
    assert first.self_seed_hash != second.self_seed_hash


def test_differencing_asks_the_ledger_of_this_base(play: Play) -> None:
    ledger = play.ledgers[ME]
    assert isinstance(ledger, MemoryLedger)
    ledger.record(Revealed(flip(BASE), bytes(32), (A, B, C)))
    play.advance(None)
    assert play.opening.task == TASK
    assert ledger.revealed(BASE) == Revealed(BASE, play.taus[3], play.server.survivors)
