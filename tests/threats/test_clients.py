"""Clients that lie, come late or hold nonsense: the sum is the survivors', the liar is named."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from secagg.config import Phase, SiloId
from secagg.crypto.keys import KeyPair
from secagg.crypto.labels import SIGN_MASKED_INPUT, SIGN_SHARE_KEYS, SIGN_UNMASKING
from secagg.crypto.secret import Secret
from secagg.encoding.codec import Codec
from secagg.encoding.schema import Schema
from secagg.errors import InputError, MalformedMessage, RoundAborted, TooLate
from secagg.masking import client, server
from secagg.masking.masks import pair_mask, self_mask
from secagg.masking.messages import Box, MaskedInput, ShareKeys, Unmasking
from secagg.masking.server import ServerRound
from secagg.masking.shares import deal
from secagg.masking.uploads import Uploaded
from secagg.ring.expand import Mask
from secagg.ring.vectors import Vector
from secagg.simulation import TASK, Arrival, Federation, Lie, RoundResult, Script
from threat_model.attacks.sight import KEY

from .harness import FIVE, FOUR, A, Attempt, B, C, D, E, nothing, refused, same, weakened

REST = (A, B, C, E)
HELD = {name: {"x": np.full(4, (i + 1) / 16)} for i, name in enumerate(FIVE)}


def play(federation: Federation, names: tuple[SiloId, ...] = FIVE, **options: Any) -> RoundResult:
    return federation.run_round({name: HELD[name] for name in names}, **options)


def is_sum(result: RoundResult, names: tuple[SiloId, ...]) -> bool:
    mean = np.mean([HELD[name]["x"] for name in names], axis=0)
    return np.allclose(result.mean["x"], mean, rtol=0, atol=1e-6)


def spoilt(federation: Federation, names: tuple[SiloId, ...], script: Script) -> bool:
    """Whether a round gave something else than the sum of these silos."""
    try:
        return not is_sum(play(federation, script=script), names)
    except MalformedMessage as error:
        return error.code == "result-weight"  # noise that is no sum of encoded vectors


def opened(federation: Federation) -> bool:
    """Whether any honest silo revealed a share."""
    return any(federation.silo(name).ledger._revealed for name in REST)


# Dealers.


def sealing_garbage(federation: Federation) -> Lie:
    """D's boxes open to nobody; its signature over them is right."""

    def lie(message: Any, vector: Vector | None) -> tuple[Any, Vector | None]:
        state = federation.silo(D).state
        boxes = tuple(Box(box.recipient, bytes(len(box.sealed))) for box in message.boxes)
        return sign_shares(federation, state, message.commitments, boxes), vector

    return lie


def sharing_another_seed(federation: Federation) -> Lie:
    """D's shares open and match its commitments, but are of another self seed than advertised."""

    def lie(message: Any, vector: Vector | None) -> tuple[Any, Vector | None]:
        state = federation.silo(D).state
        names = tuple(state.adverts)
        shares = deal(
            D,
            state.mask_key.private,
            Secret(bytes(32)),
            names,
            threshold=state.attempt.descriptor.threshold,
            entropy=os.urandom,
        )
        boxes = client._seal_boxes(state, state.adverts, shares, state.tau1)
        commitments = tuple(shares[name].commitment(name, state.tau1) for name in names)
        federation.silo(D).state = replace(state, own=shares[D])
        return sign_shares(federation, federation.silo(D).state, commitments, boxes), vector

    return lie


def sign_shares(federation: Federation, state: Any, commitments: Any, boxes: Any) -> ShareKeys:
    unsigned = ShareKeys(D, commitments, boxes, bytes(64))
    key = federation.silo(D).member.identity
    message = replace(unsigned, signature=key.sign(SIGN_SHARE_KEYS, state.tau1, unsigned.body()))
    federation.silo(D).state = replace(state, sent=message)
    return message


def lying(phase: Phase, name: SiloId, lie: Lie) -> Script:
    return Script(lies={(name, str(phase)): lie})


def test_dealer_whose_shares_do_not_open() -> None:
    """Found before anything is revealed; the next attempt on the base goes without it."""

    def attack() -> tuple[Federation, RoundAborted]:
        federation = Federation(FIVE)
        script = lying(Phase.SHARE_KEYS, D, sealing_garbage(federation))
        with pytest.raises(RoundAborted) as caught:
            play(federation, script=script)
        return federation, caught.value

    with weakened(ServerRound, "_check_dealers", nothing):
        federation, abort = attack()
        assert (abort.phase, opened(federation)) == (Phase.UNMASKING, True)
        with pytest.raises(RoundAborted):  # opened for nothing: the base waits for D
            play(federation, REST, same_base=True)
        assert federation.silo(A).refusals[0].code == "differencing"
    federation, abort = attack()
    assert (abort.phase, abort.blamed, opened(federation)) == (Phase.MASKED_INPUT, (D,), False)
    assert is_sum(play(federation, REST, same_base=True), REST)


def test_dealer_whose_shares_are_of_another_secret() -> None:
    """Without the check of what was rebuilt the sum is noise; with it the dealer is convicted."""

    def careless(advert: Any, seed: Secret, tau1: bytes, prg: Any) -> Any:
        return self_mask(seed, advert.sender, tau1, prg).inverse()

    with weakened(server, "survivor_mask", careless):
        federation = Federation(FIVE)
        script = lying(Phase.SHARE_KEYS, D, sharing_another_seed(federation))
        assert spoilt(federation, FIVE, script)
    federation = Federation(FIVE)
    script = lying(Phase.SHARE_KEYS, D, sharing_another_seed(federation))
    with pytest.raises(RoundAborted) as caught:
        play(federation, script=script)
    assert (caught.value.phase, caught.value.blamed) == (Phase.UNMASKING, (D,))
    # The residual: the base is opened, so it waits until the very same silos come back.
    with pytest.raises(RoundAborted):
        play(federation, REST, same_base=True)
    assert federation.silo(A).refusals[0].code == "differencing"
    assert is_sum(play(federation, same_base=True), FIVE)


def test_bad_share_is_named_and_ignored() -> None:
    """B reveals a wrong share of A's seed. Believed, it convicts A; ours names B, and goes on."""

    def attack() -> tuple[Federation, Script]:
        federation = Federation(FIVE)

        def lie(message: Any, vector: Vector | None) -> tuple[Any, Vector | None]:
            state = federation.silo(B).state
            wrong = replace(message.shares[0], share=Secret(bytes(33)))
            unsigned = Unmasking(B, (wrong, *message.shares[1:]), bytes(64))
            key = federation.silo(B).member.identity
            signature = key.sign(SIGN_UNMASKING, state.tau3, unsigned.body())
            return replace(unsigned, signature=signature), vector

        return federation, lying(Phase.UNMASKING, B, lie)

    with weakened(ServerRound, "_is_committed", lambda *_: True):
        federation, script = attack()
        with pytest.raises(RoundAborted) as caught:
            play(federation, script=script)
        assert caught.value.blamed == (A,)
    federation, script = attack()
    result = play(federation, script=script)
    assert result.liars == [B]
    assert is_sum(result, FIVE)


def test_complaint_that_frames_a_dealer() -> None:
    """E is away, so all others are needed, and B complains of A's good shares: an attempt is lost
    and A named. Nobody but B saw the box. Believing no complaint would open a round that fails.
    """

    def complain(federation: Federation) -> Lie:
        def lie(message: Any, vector: Vector | None) -> tuple[Any, Vector | None]:
            state = federation.silo(B).state
            unsigned = MaskedInput(B, message.vector_digest, (A,), bytes(64))
            key = federation.silo(B).member.identity
            signature = key.sign(SIGN_MASKED_INPUT, state.tau2, unsigned.body())
            commit = replace(unsigned, signature=signature)
            held = {owner: shares for owner, shares in state.held.items() if owner != A}
            federation.silo(B).state = replace(state, commit=commit, held=held)
            return commit, vector

        return lie

    def attack() -> tuple[Federation, RoundAborted]:
        federation = Federation(FIVE)
        phase = str(Phase.MASKED_INPUT)
        script = Script(drops={E: phase}, lies={(B, phase): complain(federation)})
        with pytest.raises(RoundAborted) as caught:
            play(federation, script=script)
        return federation, caught.value

    with weakened(ServerRound, "_check_dealers", nothing):
        assert opened(attack()[0])  # shares are out, and there is no sum
    federation, abort = attack()
    assert (abort.blamed, opened(federation)) == ((A,), False)
    assert is_sum(play(federation, (B, C, D, E), same_base=True), (B, C, D, E))


# Late, and twice.


def test_late_vector_is_never_added() -> None:
    """A's vector comes when the survivors are fixed: added, it would spoil the sum."""
    late = Script(arrivals={(A, str(Phase.MASKED_INPUT)): Arrival.DELAYED})
    with (
        weakened(ServerRound, "_check_phase", nothing),
        weakened(ServerRound, "_check_signature", nothing),  # over τ2, and the server is at τ3
    ):
        assert spoilt(Federation(FIVE), (B, C, D, E), late)
    federation = Federation(FIVE)
    assert is_sum(play(federation, script=late), (B, C, D, E))
    refusal = federation.silo(A).refusals[0]
    assert isinstance(refusal, TooLate)
    assert refusal.code == "phase-closed"


def test_late_vector_is_not_read() -> None:
    """A's mask key was rebuilt for the others' sum, and A's vector comes after all."""

    def pair_masks_only(state: Any, dealers: Any) -> list[Mask]:
        prg = state.attempt.member.session.mask_prg
        keys = {peer: state.adverts[peer].mask_key for peer in dealers if peer != A}
        me = state.attempt.me
        masks = [
            pair_mask(state.mask_key, me, peer, state.adverts[peer].mask_key, state.tau1, prg)
            for peer in dealers
            if peer != me
        ]
        assert keys
        return masks

    def attack() -> bool:
        attempt = Attempt(Federation(FOUR)).to_masked()  # the coordinator keeps A's upload back
        survivors = attempt.survivors(B, C, D)
        signed = client.Signatures(tuple(attempt.tell(name, survivors) for name in (B, C, D)))
        for name in (B, C, D):
            attempt.tell(name, signed)
        pair = KeyPair.from_private(attempt.secret(A, KEY))
        prg, tau1 = attempt.session.mask_prg, attempt.tau1
        masks = [
            pair_mask(pair, A, peer, attempt.adverts[peer].mask_key, tau1, prg).inverse()
            for peer in (B, C, D)
        ]
        return same(attempt.strip(attempt.uploads[A], masks), attempt.vectors[A])

    with weakened(client, "_masks", pair_masks_only):
        assert attack()
    assert not attack()  # the self mask is still on, and no share of its seed is revealed


def test_vector_that_was_not_committed_to() -> None:
    """The vector that arrives is not the one under B's signature: its sender could deny it."""

    def swap(message: Any, vector: Vector | None) -> tuple[Any, Vector | None]:
        assert vector is not None
        other = vector.copy()
        other[0] += np.uint32(1)
        return message, other

    script = lying(Phase.MASKED_INPUT, B, swap)
    committed: list[bytes] = []

    def believing(self: ServerRound, message: MaskedInput, vector: Uploaded | None) -> None:
        assert vector is not None
        words = vector.digest()
        committed.append(b"" if words == message.vector_digest else words)

    with weakened(ServerRound, "_check_masked_input", believing):
        assert play(Federation(FIVE), script=script).survivors == [*FIVE]
        assert any(committed)
    federation = Federation(FIVE)
    assert play(federation, script=script).survivors == [A, C, D, E]
    assert federation.silo(B).refusals[0].code == "vector-digest"


# What a silo would encode.


def encode(values: list[float], weight: float = 1.0) -> Vector:
    federation = Federation(FIVE)
    tensors = {"x": np.array(values)}
    codec = Codec(federation.session.task(TASK), Schema.of(tensors), 5)
    with np.errstate(invalid="ignore"):
        return codec.encode(tensors, weight=weight, metrics={}, entropy=os.urandom)


def check_input(values: list[float], code: str) -> None:
    with weakened(Codec, "check_magnitude", lambda *_: None):
        assert encode(values).size  # something else than the silo's values would be summed
    with refused(code, InputError):
        encode(values)


def test_nan_and_infinity() -> None:
    """A diverged model would be summed as if it were numbers."""
    for value in (np.nan, np.inf, -np.inf):
        check_input([0.5, value], "tensor-finite")


def test_values_beyond_the_bound() -> None:
    """A value beyond the bound would be cut without a word, and the mean be wrong."""
    check_input([0.5, 1.0000001], "tensor-bound")
    check_input([0.5, -2.0], "tensor-bound")


def test_weight_beyond_the_cap() -> None:
    """A silo that weighs five times the cap: with another one like it the sum of weights wraps."""
    heavy = 5e3
    with weakened(Codec, "_weight_fraction", lambda codec, weight: weight / codec.task.weight_cap):
        weight = int(encode([1.0], heavy)[1])
        assert weight == 5 * 2**28
        assert 2 * weight >= 2**31
    for weight in (heavy, 0.0, -1.0, np.nan, np.inf):
        with refused("weight", InputError):
            encode([1.0], weight)
