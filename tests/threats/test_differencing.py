"""Two sums over one base whose survivors differ by little: subtraction reads what is between them.

Decision record 0001 has the argument; ``test_three_cohorts`` is the attack on the weaker rule.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from client_sdk.ledger import FileLedger
from secagg.config import SiloId
from secagg.disk import LocalDisk
from secagg.errors import PolicyRefused
from secagg.masking import client, ledger, transcript
from secagg.masking.ledger import Ledger, MemoryLedger, Revealed
from secagg.masking.messages import Signatures
from secagg.ring.vectors import Vector
from secagg.simulation import Federation

from .harness import (
    FIVE,
    A,
    Attempt,
    B,
    C,
    D,
    E,
    refused,
    same,
    small_vectors,
    weakened,
    without_differencing,
)

REST = (B, C, D, E)
COLLUDERS = 1


def two_sums(
    *, first: tuple[SiloId, ...] = FIVE, second: tuple[SiloId, ...] = REST
) -> tuple[Vector, Vector]:
    """The coordinator opens a sum, says that the round failed, and opens another one.

    Returns:
        The difference of the two sums, and A's vector.
    """
    federation, vectors = Federation(FIVE), small_vectors(FIVE)
    one = Attempt(federation, first, vectors=vectors).to_masked().open(*first)
    two = Attempt(federation, second, number=2, vectors=vectors).to_masked().open(*second)
    return one - two, vectors[A]


def test_retry_with_one_silo_fewer() -> None:
    """The first sum minus the second is A's vector."""
    with without_differencing():
        assert same(*two_sums())
    with refused("differencing", PolicyRefused):
        two_sums()
    difference, _ = two_sums(second=FIVE)  # the same survivors again give nothing new
    assert not difference.any()


def test_retry_with_one_silo_fewer_after_a_restart(tmp_path: Path) -> None:
    """The silos' memory of what they opened outlives their processes."""

    def restarted(place: Path) -> Mapping[SiloId, Ledger]:
        return {name: FileLedger(LocalDisk(place), f"{name}.jsonl") for name in FIVE}

    def attack(before: Path, after: Path) -> tuple[Vector, Vector]:
        federation, vectors = Federation(FIVE), small_vectors(FIVE)
        memory = restarted(before)
        first = Attempt(federation, vectors=vectors, ledgers=memory).to_masked().open(*FIVE)
        memory = restarted(after)
        second = Attempt(federation, REST, number=2, vectors=vectors, ledgers=memory)
        return first - second.to_masked().open(*REST), vectors[A]

    assert same(*attack(tmp_path / "kept", tmp_path / "lost"))  # a ledger that was not kept
    with refused("differencing", PolicyRefused):
        attack(tmp_path / "ours", tmp_path / "ours")


def test_changed_update_of_a_silo_that_never_revealed() -> None:
    """t others open a sum that A is in; what A remembers of its own reveals forbids it nothing."""

    def attack() -> tuple[Vector, Vector]:
        federation, before = Federation(FIVE), small_vectors(FIVE)
        after = {**before, A: small_vectors((A,))[A]}
        sums = []
        for number, vectors in ((1, before), (2, after)):
            attempt = Attempt(federation, number=number, vectors=vectors)
            update = number.to_bytes()
            attempt.expected[A] = replace(attempt.expected[A], update=update)
            attempt.to_masked()
            survivors = attempt.survivors(*FIVE)
            signed = Signatures(tuple(attempt.tell(name, survivors) for name in FIVE))
            for name in REST:
                attempt.tell(name, signed)
            sums.append(attempt.total(FIVE))
        return sums[1] - sums[0], after[A] - before[A]

    with weakened(MemoryLedger, "update_at", lambda *_: None):  # bound by its own reveal alone
        assert same(*attack())
    with refused("differencing-update", PolicyRefused):
        attack()


def test_three_cohorts() -> None:
    """S1 + S2 − S3 = 2·a, though the cohorts differ pairwise by at least n_c + 2 silos."""
    cohorts = ((A, B, C), (A, D, E), (B, C, D, E))

    def by_distance(past: Revealed | None, survivors: tuple[SiloId, ...]) -> None:
        if past is not None and past.survivors != survivors:
            assert len(set(past.survivors) ^ set(survivors)) >= COLLUDERS + 2

    def attack() -> None:
        federation, vectors = Federation(FIVE), small_vectors(FIVE)
        one, two, three = (
            Attempt(federation, names, number=i, vectors=vectors).to_masked().open(*names)
            for i, names in enumerate(cohorts, start=1)
        )
        twice = (one + two - three).view("<i4")
        assert np.array_equal(twice // 2, vectors[A].view("<i4"))

    with (
        weakened(client, "check_differencing", by_distance),
        weakened(ledger, "check_differencing", by_distance),
    ):
        attack()
    with refused("differencing", PolicyRefused):
        attack()


def test_two_attempts_signed_before_either_reveals() -> None:
    """Both survivor sets are checked while nothing is opened yet: the record decides, not them."""

    def attack() -> tuple[Vector, Vector]:
        federation, vectors = Federation(FIVE), small_vectors(FIVE)
        sums = []
        plays = []
        for number, names in enumerate((FIVE, REST), start=1):
            attempt = Attempt(federation, names, number=number, vectors=vectors).to_masked()
            survivors = attempt.survivors(*names)
            plays.append((attempt, Signatures(tuple(attempt.tell(n, survivors) for n in names))))
        for attempt, signed in plays:
            for name in attempt.members:
                attempt.tell(name, signed)
            sums.append(attempt.total(attempt.members))
        return sums[0] - sums[1], vectors[A]

    with without_differencing(ledger):  # the check beside the signature stays, and is too early
        assert same(*attack())
    with refused("differencing", PolicyRefused):
        attack()


def test_another_session_on_the_same_base() -> None:
    """Another session of the same parameters is the same base, whatever it is called."""

    def attack() -> tuple[Vector, Vector]:
        federation, vectors = Federation(FIVE), small_vectors(FIVE)
        base = transcript.base_of(
            transcript.first_history(transcript.session_hash(federation.session)), bytes(32)
        )
        first = Attempt(federation, base=base, vectors=vectors).to_masked().open(*FIVE)
        other = replace(federation.session, name="another")
        base = transcript.base_of(
            transcript.first_history(transcript.session_hash(other)), bytes(32)
        )
        second = Attempt(federation, REST, base=base, vectors=vectors)
        for name, member in second.members.items():
            second.members[name] = replace(member, session=other, session_id=b"\x02" * 32)
        second.descriptor = second.signed(second.descriptor, session_id=b"\x02" * 32)
        return first - second.to_masked().open(*REST), vectors[A]

    with weakened(transcript, "first_history", lambda session: bytes(32)), without_differencing():
        assert same(*attack())
    with refused("differencing", PolicyRefused):
        attack()


def test_other_survivors_are_refused_for_ever(tmp_path: Path) -> None:
    """Asked again after restarts, a silo opens the same set or none."""
    opened = Revealed(bytes(32), bytes(32), FIVE)
    for number in range(3):
        book = FileLedger(LocalDisk(tmp_path))
        book.record(replace(opened, transcript=bytes([number]) * 32))
        with refused("differencing", PolicyRefused):
            book.record(replace(opened, survivors=REST))
        with without_differencing(ledger):
            book._memory.check(replace(opened, survivors=REST))
