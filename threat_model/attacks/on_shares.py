"""Shares: dealers and holders that lie to the coordinator and to each other.

What the adversary is after is a round that is opened for nothing (its silos have revealed, and may
reveal for no other survivors on this base), a sum that is noise, or an honest silo that is blamed.

Source: Feldman, A practical scheme for non-interactive verifiable secret sharing (FOCS 1987), whose
price the commitments under a signature avoid; Bell et al., ACORN (ePrint 2022/1461).
"""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

from secagg.config import Phase, silo_id
from secagg.crypto.labels import SIGN_MASKED_INPUT, SIGN_SHARE_KEYS, SIGN_UNMASKING
from secagg.crypto.secret import Secret
from secagg.errors import RoundAborted
from secagg.masking import client
from secagg.masking.masks import self_mask
from secagg.masking.messages import (
    Box,
    Dealt,
    Result,
    RevealedShare,
    Roster,
    ShareKeys,
    ShareKind,
    Signatures,
    Unmasking,
)
from secagg.masking.shares import deal
from secagg.ring.expand import Mask
from secagg.wire._pb import service_pb2 as api
from threat_model.attacks.attack import Scene, attack
from threat_model.attacks.evil_silo import Study
from threat_model.attacks.weak import Function, believing, nothing, replaced

A, B, C = (silo_id(name) for name in "abc")
OTHERS = ("a", "b", "d")


def deal_badly(study: Study, commitments: Any, boxes: Any) -> None:
    """Have c deal something else than it should, under its own signature."""
    state = study.silos[C].state
    unsigned = ShareKeys(C, commitments, boxes, bytes(64))
    message = study.sign("c", SIGN_SHARE_KEYS, state.tau1, unsigned)
    study.silos[C].state = replace(study.silos[C].state, sent=message)
    study.send("c", message)


def is_opened_in_vain(scene: Scene, ended: Result | RoundAborted, *blamed: str) -> bool:
    """Whether silos have revealed what there is no sum for; else these dealers are blamed."""
    assert isinstance(ended, RoundAborted)
    if (ended.phase, ended.blamed) == (Phase.MASKED_INPUT, blamed):
        scene.refuse("aborted-before-reveal", observed=ended.because)
    return ended.phase == Phase.UNMASKING


@attack(
    threat="unopenable-shares",
    reason="aborted-before-reveal",
    weakening=replaced("secagg.masking.server:ServerRound._check_dealers", nothing),
)
def dealer_of_garbage(scene: Scene) -> bool:
    """Silo c's boxes open to nobody, so that the others reveal in vain."""
    with scene.stage.serving(scene.weakening) as server, Study(scene, server) as study:
        study.begin()
        study.to(Roster)
        study.step(*OTHERS)
        message: Any = study.answer("c", study.next("c"))
        boxes = tuple(Box(box.recipient, os.urandom(len(box.sealed))) for box in message.boxes)
        deal_badly(study, message.commitments, boxes)
        return is_opened_in_vain(scene, study.outcome(), "c")


@attack(
    threat="unopenable-shares",
    reason="share-lists",
    weakening=replaced("secagg.masking.server:ServerRound._check_share_keys", nothing),
)
def dealer_of_too_few_shares(scene: Scene) -> bool:
    """Silo c deals nothing to a, who can neither complain of a box nor reveal what was in it."""
    with scene.stage.serving(scene.weakening) as server, Study(scene, server) as study:
        study.begin()
        study.to(Roster)
        study.step(*OTHERS)
        message: Any = study.answer("c", study.next("c"))
        boxes = tuple(box for box in message.boxes if box.recipient != A)
        deal_badly(study, message.commitments, boxes)
        dealt = study.next("a")
        return any(dealing.dealer == C and dealing.sealed is None for dealing in dealt.dealings)


def unpinned(_real: Function) -> Function:
    """The mask of whatever seed was rebuilt."""

    def mask(advert: Any, seed: Secret, tau1: bytes, prg: Any) -> Mask:
        return self_mask(seed, advert.sender, tau1, prg).inverse()

    return mask


@attack(
    threat="wrong-secret",
    reason="dealer-blamed",
    weakening=replaced("secagg.masking.server:survivor_mask", unpinned),
)
def dealer_of_another_secret(scene: Scene) -> bool:
    """Silo c's shares match its commitments and are of another seed: the sum is noise."""
    with scene.stage.serving(scene.weakening) as server, Study(scene, server) as study:
        study.begin()
        study.to(Roster)
        study.step(*OTHERS)
        study.answer("c", study.next("c"))
        state, names = study.silos[C].state, study.session.silos
        threshold = state.attempt.descriptor.threshold
        shares = deal(
            C,
            state.mask_key.private,
            Secret(os.urandom(32)),
            names,
            threshold=threshold,
            entropy=os.urandom,
        )
        study.silos[C].state = replace(state, own=shares[C])
        boxes = client._seal_boxes(state, state.adverts, shares, state.tau1)
        deal_badly(study, tuple(shares[n].commitment(n, state.tau1) for n in names), boxes)
        ended = study.outcome()
        if isinstance(ended, RoundAborted) and ended.blamed == ("c",):
            raise scene.refuse("dealer-blamed", observed=ended.because)
        return isinstance(ended, Result) and not study.is_sum_of(names)


def reveal_badly(study: Study, *instead: RevealedShare) -> Result | RoundAborted:
    """Have b reveal these shares among its own, and the attempt end."""
    reveal: Any = study.answer("b", study.next("b"))
    shares = {share.owner: share for share in (*reveal.shares, *instead)}
    unsigned = Unmasking(B, tuple(shares[name] for name in sorted(shares)), bytes(64))
    message = study.sign("b", SIGN_UNMASKING, study.silos[B].state.tau3, unsigned)
    study.send("b", message)
    study.step("a", "c", "d")
    return study.outcome("a")


@attack(
    threat="bad-share",
    reason="sum-exact",
    weakening=replaced("secagg.masking.server:ServerRound._is_committed", believing),
)
def corrupted_share(scene: Scene) -> bool:
    """Silo b reveals a wrong share of a's seed, so that a is blamed for what comes of it.

    Ours refuses nothing: it leaves the share out, and the others' give the exact sum.
    """
    with scene.stage.serving(scene.weakening) as server, Study(scene, server) as study:
        study.begin()
        study.to(Signatures)
        own = study.silos[B].state.held[A].reveal(ShareKind.SELF_SEED)
        ended = reveal_badly(study, replace(own, share=Secret(bytes(33))))
        if isinstance(ended, Result) and study.is_sum_of("abcd"):
            scene.refuse("sum-exact")
        return isinstance(ended, RoundAborted) and "a" in ended.blamed


@attack(
    threat="bad-share",
    reason="reveal-list",
    weakening=replaced("secagg.masking.server:ServerRound._check_unmasking", nothing),
)
def share_of_another_kind(scene: Scene) -> bool:
    """Silo b reveals its share of a's mask key where one of a's self seed is due: a is blamed."""
    with scene.stage.serving(scene.weakening) as server, Study(scene, server) as study:
        study.begin()
        study.to(Signatures)
        ended = reveal_badly(study, study.silos[B].state.held[A].reveal(ShareKind.MASK_KEY))
        return isinstance(ended, RoundAborted) and "a" in ended.blamed


@attack(
    threat="framed-dealer",
    reason="aborted-before-reveal",
    weakening=replaced("secagg.masking.server:ServerRound._check_dealers", nothing),
)
def framed_dealer(scene: Scene) -> bool:
    """Silo d is away, so all others are needed, and b complains of a's good shares.

    Whoever goes on regardless has everybody reveal for a sum that cannot be opened.
    """
    with scene.stage.serving(scene.weakening) as server, Study(scene, server) as study:
        study.begin()
        study.to(Dealt)
        study.call("d", "Leave", api.LeaveRequest)
        study.step("a", "c")
        commit: Any = study.answer("b", study.next("b"))
        state = study.silos[B].state
        complaint = replace(commit, bad_dealers=(A,))
        message = study.sign("b", SIGN_MASKED_INPUT, state.tau2, complaint)
        held = {owner: shares for owner, shares in state.held.items() if owner != A}
        study.silos[B].state = replace(state, commit=message, held=held)
        study.send("b", message)
        return is_opened_in_vain(scene, study.outcome("a", "b", "c"), "a")
