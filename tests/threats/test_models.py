"""Silos led to different models: whoever's peers add nothing stands alone in the sum.

Source: Pasquini, Francati and Ateniese, Eluding Secure Aggregation in Federated Learning via Model
Inconsistency, CCS 2022 (arXiv 2111.07380): with a model of dead units the others' updates are zero.
"""

from __future__ import annotations

from pathlib import Path

from client_sdk.ledger import FileLedger
from secagg.disk import LocalDisk
from secagg.encoding.schema import Schema, TensorSpec
from secagg.errors import FaultyServer
from secagg.masking import client, transcript
from secagg.masking.ledger import MemoryLedger, Opened
from secagg.masking.masks import self_mask
from secagg.masking.messages import Descriptor, Signatures, descriptor_items
from secagg.ring.vectors import Vector
from secagg.simulation import TASK, Federation

from .harness import (
    BASE,
    FOUR,
    LENGTH,
    RING,
    A,
    Attempt,
    B,
    C,
    D,
    nothing,
    refused,
    same,
    small_vector,
    summed,
    weakened,
    without,
)

OTHER = bytes(32)
OTHERS = (B, C, D)


def misled() -> Attempt:
    """A stands on one base; the others on another, where their updates are zero."""
    vectors: dict[client.SiloId, Vector] = dict.fromkeys(OTHERS, RING.zeros(LENGTH))
    attempt = Attempt(Federation(FOUR), vectors={**vectors, A: small_vector()})
    attempt.expected = {
        name: client.Expected(TASK, 1, BASE if name == A else OTHER) for name in FOUR
    }
    return attempt


def descriptors(attempt: Attempt) -> dict[client.SiloId, Descriptor]:
    """To each its base, signed by the coordinator."""
    return {
        name: attempt.signed(attempt.descriptor, base=attempt.expected[name].base) for name in FOUR
    }


def test_models_that_differ() -> None:
    """Keys that know nothing of the model: the sum is A's update."""

    def attack() -> None:
        attempt = misled()
        for name, descriptor in descriptors(attempt).items():
            attempt.adverts[name] = attempt.tell(name, descriptor)
        attempt.share()
        attempt.mask()
        assert same(attempt.open(*FOUR), attempt.vectors[A])

    with weakened(transcript, "descriptor_items", lambda found: descriptor_items(found)[:-1]):
        attack()
    with refused("advertise-keys-signature"):
        attack()


def test_models_that_differ_give_noise() -> None:
    """Without a single signature checked, and with all self masks given away, it is still noise."""

    def attack() -> bool:
        attempt = misled()
        tau0 = {}
        for name, descriptor in descriptors(attempt).items():
            tau0[name] = transcript.round_transcript(descriptor)
            attempt.adverts[name] = attempt.tell(name, descriptor)
        attempt.share()
        seeds = {name: attempt.states[name].self_seed for name in FOUR}
        attempt.mask()
        prg, masks = attempt.session.mask_prg, []
        for name, seed in seeds.items():
            tau1 = transcript.roster_transcript(tau0[name], attempt.roster.adverts)
            masks.append(self_mask(seed, name, tau1, prg).inverse())
        bare = attempt.strip(summed(attempt.uploads[name] for name in FOUR), masks)
        return same(bare, attempt.vectors[A])

    with weakened(client, "verify", nothing):
        with weakened(transcript, "descriptor_items", lambda found: descriptor_items(found)[:-1]):
            assert attack()
        assert not attack()


def check_base(base: bytes, other: bytes) -> None:
    """A is on one base, the coordinator's attempt on the other: A's vector is all the sum has."""
    assert base != other

    def attack() -> None:
        vectors: dict[client.SiloId, Vector] = dict.fromkeys(OTHERS, RING.zeros(LENGTH))
        attempt = Attempt(Federation(FOUR), base=other, vectors={**vectors, A: small_vector()})
        attempt.expected[A] = client.Expected(TASK, 1, base)
        assert same(attempt.to_masked().open(*FOUR), attempt.vectors[A])

    with without("descriptor-base"):
        attack()
    with refused("descriptor-base"):
        attack()


def opening(weights: bytes, *, name: str = "w", step: str = "SGD") -> bytes:
    """A task's hash."""
    schema = Schema((TensorSpec(name, (4,)),))
    return transcript.TaskOpening(TASK, schema, step, weights).digest(bytes(32))


def test_initial_weights_of_another_bit() -> None:
    """One bit of the initial weights, one word of the step or one name, and it is another base."""
    history = transcript.first_history(bytes(32))
    ours = transcript.base_of(history, opening(BASE))
    for theirs in (
        opening(bytes([BASE[0] ^ 1]) + BASE[1:]),
        opening(BASE, step="Adam"),
        opening(BASE, name="v"),
    ):
        check_base(ours, transcript.base_of(history, theirs))


def test_another_sum_was_applied() -> None:
    """A was given another sum in the round before: its history and its base are others."""
    history, task = transcript.first_history(bytes(32)), opening(BASE)
    ours, theirs = (
        transcript.base_of(
            transcript.next_history(history, transcript.result_transcript(bytes(32), words)), task
        )
        for words in (bytes(32), BASE)
    )
    check_base(ours, theirs)


def test_task_opened_again(tmp_path: Path) -> None:
    """The coordinator hands a restarted silo other tensors or weights for the same task."""
    first, second = (Opened(bytes(32), TASK, opening(bytes([i]) * 32)) for i in (1, 2))
    with weakened(MemoryLedger, "check", nothing):
        memory = MemoryLedger()
        assert memory.record(first).entry != memory.record(second).entry
    book = FileLedger(LocalDisk(tmp_path))
    book.record(first)
    book = FileLedger(LocalDisk(tmp_path))
    with refused("task-replaced"):
        book.record(second)
    assert book.record(first).entry == first


def test_result_that_nobody_signed() -> None:
    """A result without the coordinator's signature, or over other survivors than were signed."""
    federation = Federation(FOUR)
    attempt = Attempt(federation).to_masked()
    survivors = attempt.survivors(*FOUR)
    signed = Signatures(tuple(attempt.tell(name, survivors) for name in FOUR))
    attempt.tell(A, signed)
    other = transcript.survivors_transcript(attempt.tau2, attempt.survivors(B, C, D).commits)
    for key, names, tau3, code in (
        (attempt.members[B].identity, FOUR, attempt.states[A].tau3, "result-signature"),
        (federation.identity, (B, C, D), other, "result-survivors"),
    ):
        result = client.Result(TASK, 1, BASE, FOUR, names, tau3, bytes(32), bytes(64))
        tau4 = transcript.result_transcript(tau3, bytes(32))
        signature = key.sign(client.SIGN_RESULT, tau4, result.body())
        forged = client.Result(TASK, 1, BASE, FOUR, names, tau3, bytes(32), signature)
        args = (forged, attempt.members[A], attempt.expected[A], attempt.states[A])
        with without(code):
            assert client.check_result(*args) == tau4
        with refused(code, FaultyServer):
            client.check_result(*args)
