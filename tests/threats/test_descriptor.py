"""Phase 0: a coordinator, or whoever poses as one, proposes an attempt that no silo should join."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from secagg.config import Clip, Policy, silo_id
from secagg.crypto.labels import SIGN_DESCRIPTOR
from secagg.crypto.sign import IdentityKey
from secagg.errors import PolicyRefused
from secagg.masking import transcript
from secagg.masking.ledger import MemoryLedger
from secagg.masking.messages import AdvertiseKeys, Descriptor, Signatures
from secagg.simulation import Federation, Script, Silo
from threat_model.attacks.sight import KEY, SEED

from .harness import (
    FIVE,
    FOUR,
    A,
    Attempt,
    B,
    C,
    D,
    E,
    nothing,
    refused,
    same,
    summed,
    weakened,
    without,
)


def with_policy(attempt: Attempt, **floors: Any) -> Attempt:
    """Silos whose operators ask for more than the simulation's."""
    for name, member in attempt.members.items():
        attempt.members[name] = replace(member, policy=replace(member.policy, **floors))
    return attempt


def joins(attempt: Attempt) -> bool:
    """Whether the victim's keys leave it."""
    return isinstance(attempt.tell(A, attempt.descriptor), AdvertiseKeys)


def check_session_floor(make: Callable[[], Attempt], code: str) -> None:
    with weakened(Policy, "check_session", nothing):
        assert joins(make())
    attempt = make()
    with refused(code, PolicyRefused):
        joins(attempt)
    assert attempt.ledgers[A].last_attempt(attempt.descriptor.session_id) == (0, 0)


def test_cohort_below_the_silos_floor() -> None:
    """Two colluders in a cohort of three take their vectors from the sum: the third is read."""

    def attack() -> Attempt:
        return with_policy(Attempt(Federation(FIVE), (A, B, C)), min_cohort=4)

    with (
        weakened(Policy, "check_cohort", nothing),
        weakened(Policy, "check_session", nothing),
        without("survivors-floor"),
    ):
        attempt = attack().to_masked()
        colluders = summed([attempt.vectors[B], attempt.vectors[C]])
        assert same(attempt.open(A, B, C) - colluders, attempt.vectors[A])
    with weakened(Policy, "check_session", nothing), refused("policy-cohort", PolicyRefused):
        joins(attack())
    with refused("policy-min-cohort", PolicyRefused):  # the session says it already
        joins(attack())


def test_threshold_below_the_silos_floor() -> None:
    """t = 2 of 4: each half of the cohort opens another survivor set, and both say a's secrets."""

    def attack() -> Attempt:
        return Attempt(Federation(FOUR), threshold=2)

    with weakened(Policy, "check_cohort", nothing), without("descriptor-threshold"):
        attempt = attack().to_masked()
        for half, view in (((A, B), (A, B, C)), ((C, D), (B, C, D))):
            survivors = attempt.survivors(*view)
            signed = Signatures(tuple(attempt.tell(name, survivors) for name in half))
            for name in half:
                attempt.tell(name, signed)
        read = attempt.read(A, attempt.secret(A, SEED), attempt.secret(A, KEY))
        assert same(read, attempt.vectors[A])
    with refused("policy-threshold", PolicyRefused):
        joins(attack())
    with weakened(Policy, "check_cohort", nothing), refused("descriptor-threshold"):
        joins(attack())


def test_more_colluders_than_assumed() -> None:
    """n_c = 1 and two colluders: a's secrets are both rebuilt. A silo that assumes two is safe."""

    def attack(assumed: int) -> Attempt:
        federation = Federation(FOUR)
        return with_policy(Attempt(federation), colluders=assumed, min_threshold=assumed + 2)

    attempt = attack(1).to_masked()
    for victim, view in ((A, FOUR), (B, (B, C, D))):
        survivors = attempt.survivors(*view)
        own = attempt.tell(victim, survivors)
        forged = (attempt.forge(C, survivors), attempt.forge(D, survivors))
        attempt.tell(victim, Signatures((own, *forged)))
    secrets = (attempt.secret(A, kind, colluders=(C, D)) for kind in (SEED, KEY))
    assert same(attempt.read(A, *secrets), attempt.vectors[A])
    with refused("policy-colluders", PolicyRefused):
        joins(attack(2))


def test_protection_below_the_silos_floor() -> None:
    """Keys leave under a protection that the silo's operator did not allow."""
    check_session_floor(
        lambda: with_policy(Attempt(Federation(FOUR)), protections=()), "policy-protection"
    )


def test_clip_below_the_silos_floor() -> None:
    """Keys leave in a session without the clipping that the silo's operator demands."""
    check_session_floor(
        lambda: with_policy(Attempt(Federation(FOUR, clip="none")), clips=(Clip.L2,)),
        "policy-clip",
    )


def test_weight_cap_above_the_silos_ceiling() -> None:
    """With an endless weight cap the mean is the heaviest silo's update."""
    federation = Federation(FOUR, weight_cap=1e6)
    for name in FOUR:
        silo = federation.silo(name)
        policy = replace(silo.member.policy, max_weight_cap=100.0)
        silo.member = replace(silo.member, policy=policy)
    updates = {name: {"x": np.full(4, (i + 1) / 8)} for i, name in enumerate(FOUR)}
    weights = {A: 1e6, B: 1.0, C: 1.0, D: 1.0}
    with weakened(Policy, "check_session", nothing):
        result = federation.run_round(updates, weights)
        np.testing.assert_allclose(result.mean["x"], updates[A]["x"], atol=1e-5)
    with refused("policy-weight-cap", PolicyRefused):
        joins(Attempt(federation, number=2, round_number=2))


def test_descriptor_not_signed_by_the_coordinator() -> None:
    """Somebody on the network opens an attempt."""
    stranger = IdentityKey.generate(bytes)

    def attack() -> Attempt:
        attempt = Attempt(Federation(FOUR))
        tau0 = transcript.round_transcript(attempt.descriptor)
        signature = stranger.sign(SIGN_DESCRIPTOR, tau0, b"")
        attempt.descriptor = replace(attempt.descriptor, signature=signature)
        return attempt

    with without("descriptor-signature"):
        assert joins(attack())
    with refused("descriptor-signature"):
        joins(attack())


def test_cohort_with_somebody_unknown() -> None:
    """The coordinator fills a cohort with silos that it made up."""

    def attack() -> Attempt:
        sybils = tuple(silo_id(f"sybil-{i}") for i in range(3))
        return Attempt(Federation(FOUR), cohort=(A, B, C, D)).with_cohort((A, *sybils))

    with without("descriptor-cohort"):
        assert joins(attack())
    with refused("descriptor-cohort"):
        joins(attack())


def test_descriptor_of_an_older_round() -> None:
    """The coordinator opens a round that the silo's model has left behind."""

    def attack() -> Attempt:
        attempt = Attempt(Federation(FOUR), round_number=3)
        attempt.descriptor = attempt.signed(attempt.descriptor, round=2)
        return attempt

    with without("descriptor-round"):
        assert joins(attack())
    with refused("descriptor-round"):
        joins(attack())


def test_descriptor_of_an_older_manifest() -> None:
    """The coordinator goes back to a manifest in which a revoked key is still good."""

    def attack() -> Attempt:
        attempt = Attempt(Federation(FOUR))
        newer = replace(attempt.federation.manifest, version=2, revoked=("1f",))
        member = attempt.members[A]
        attempt.members[A] = replace(member, manifest=newer)
        return attempt

    with without("descriptor-manifest"):
        assert joins(attack())
    with refused("descriptor-manifest"):
        joins(attack())


def test_descriptor_replayed() -> None:
    """The same attempt twice: two sets of signed keys over one τ0, to be mixed at will."""
    attempt = Attempt(Federation(FOUR))
    with weakened(MemoryLedger, "check", nothing), without("descriptor-replay"):
        first, second = (attempt.tell(A, attempt.descriptor) for _ in range(2))
        assert first.mask_key != second.mask_key
    with refused("descriptor-replay"):
        joins(attempt)
    admitted = Attempt(Federation(FOUR))
    with without("descriptor-replay"), refused("descriptor-replay"):  # the ledger's own check
        for _ in range(2):
            joins(admitted)


def test_second_session_under_a_used_name() -> None:
    """The coordinator replaces a session, and the silo starts over without its operator's word."""

    def attack(*consent: str) -> Attempt:
        first = Attempt(Federation(FOUR)).to_masked()
        again = with_policy(Attempt(first.federation), repeat_sessions=consent)
        member = again.members[A]
        again.members[A] = replace(member, session_id=b"\x02" * 32)
        again.descriptor = again.signed(again.descriptor, session_id=b"\x02" * 32)
        return again

    with weakened(MemoryLedger, "session_ids", lambda *_: frozenset()):
        assert joins(attack())
    with refused("policy-session-name", PolicyRefused):
        joins(attack())
    assert joins(attack("simulation"))


def test_tampered_descriptor_in_a_round() -> None:
    """One silo of a round is told another attempt than was signed: keys of its own leave it."""
    updates = {name: {"x": np.ones(3) / 4} for name in FIVE}

    def tamper(silo: str, message: Any) -> Any:
        if silo == E and isinstance(message, Descriptor):
            return replace(message, nonce=bytes(32))
        return message

    def attack() -> Silo:
        federation = Federation(FIVE)
        result = federation.run_round(updates, script=Script(tamper=tamper))
        assert result.survivors == [*FOUR]
        return federation.silo(E)

    with without("descriptor-signature"):
        assert attack().sent > 0
    silo = attack()
    assert silo.sent == 0
    assert [refusal.code for refusal in silo.refusals] == ["descriptor-signature"]
