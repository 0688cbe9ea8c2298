"""Sealed updates: what opened sums, crafted halves and key holders give away, and what spoils sums.

``Observer`` has SEAL and whatever is public, and no key. What it computes with is what the
coordinator holds (uploads, sums of c0), what commits say (seeds) and what a consortium publishes
(means). Keys, seeds and updates come from a fixed stream; the noise is the system's, fresh at every
run, with a standard deviation of 2^-31.8 in a slot of four silos' sum.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from itertools import count
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from secagg.ckks import keyring, sealing, slots
from secagg.ckks.codec import SealedCodec, codec_of
from secagg.ckks.kernel import Kernel, _Product
from secagg.ckks.keyring import Keyring, make_key
from secagg.ckks.sealing import Sealer
from secagg.config import Phase, Protection, SiloId
from secagg.crypto.secret import Entropy, Secret
from secagg.encoding.schema import Schema
from secagg.errors import FaultyClient, MalformedMessage, PolicyRefused
from secagg.masking import client
from secagg.masking.server import ServerRound
from secagg.ring.expand import masked
from secagg.ring.vectors import PowerRing, PrimeRing, Vector
from secagg.simulation import TASK, Federation, Lie, RoundResult, Script
from secagg.suite import SUMS_PER_KEY, KeyName, Parameters, Suite
from threat_model.attacks import sight

from .harness import FOUR, A, Attempt, B, C, D, nothing, refused, weakened, without

SUITE = Suite.CKKS_54
Q, N = SUITE.parameters.modulus, SUITE.parameters.degree
SIZE = N - 1  # what the first ciphertext carries: all of it is of the tensor
REST = (A, B, C)
Reals = npt.NDArray[np.float64]
Updates = Mapping[SiloId, Mapping[str, Reals]]


def stream(seed: str) -> Entropy:
    """Bytes that are the same at every run."""
    calls = count()
    return lambda size: hashlib.shake_256(f"{seed}/{next(calls)}".encode()).digest(size)


def consortium(protection: str = "ckks", seed: str = "ckks", **options: Any) -> Federation:
    return Federation(FOUR, protection, entropy=stream(seed), **options)


def updates(seed: int = 1, size: int = SIZE) -> dict[SiloId, dict[str, Reals]]:
    """Small updates, as those of a model that is nearly trained."""
    draw = np.random.default_rng(seed)
    return {name: {"x": draw.normal(0, 2**-8, size)} for name in FOUR}


def mean_of(held: Updates, names: Sequence[SiloId] = FOUR) -> Reals:
    return np.mean([held[name]["x"] for name in names], axis=0)


class Sealed:
    """One attempt in the hands of the coordinator, over sealed updates."""

    def __init__(self, federation: Federation, held: Updates | None = None, **changes: Any) -> None:
        self.federation, self.held = federation, held or updates()
        codec = codec_of(federation.session, TASK, Schema.of(self.held[A]))
        assert isinstance(codec, SealedCodec)
        self.codec = codec
        self.seeds = {name: federation.entropy(32) for name in FOUR} | changes.pop("seeds", {})
        vectors = {name: self.seal(name, federation.sealer) for name in FOUR}
        self.attempt = Attempt(federation, vectors=vectors, seeds=self.seeds, **changes)

    def seal(self, name: SiloId, sealer: Sealer) -> Vector:
        tensors, seed = self.held[name], self.seeds[name]
        return self.codec.encode(tensors, weight=1000.0, metrics={}, sealer=sealer, seed=seed)

    def open(self, words: Vector, *names: SiloId) -> Reals:
        """What a silo that has the key makes of words, as a sum of these silos' updates."""
        seeds = [self.seeds[name] for name in names]
        return self.codec.decode(words, self.federation.sealer, seeds).tensors["x"]


class Observer:
    """Who has SEAL, and any key but the session's."""

    def __init__(self) -> None:
        self.kernel = Kernel(SUITE, Secret(bytes(range(32))))
        self.ring = PrimeRing(Q)

    def encode(self, row: Reals, scale: float = SUITE.parameters.scale) -> Vector:
        """Residues of a row of slots, without noise."""
        whole = slots.Embedding(N, scale).coefficients(row.reshape(1, N)) % Q
        pair = np.concatenate([whole, whole]).astype(np.uint64)
        return self.kernel._engine.transform(pair)[0].copy()

    def decode(self, words: Vector) -> Reals:
        """The slots of a polynomial."""
        row = np.empty(N)
        self.kernel._engine.decode(words, row)
        return row

    def c1(self, seeds: Sequence[bytes]) -> Vector:
        """Σ c1 of a first ciphertext, from public seeds."""
        return self.kernel._c1(seeds, 0, (1, N))[0]

    def solve(self, message: Vector, c0: Vector, c1: Vector) -> Vector:
        """S = (m − c0) / c1, word by word in the NTT domain."""
        found = [
            (int(m) - int(a)) * pow(int(b), -1, Q) % Q
            for m, a, b in zip(message, c0, c1, strict=True)
        ]
        return np.array(found, np.uint64)

    def read(self, upload: Vector, seed: bytes, secret: Vector) -> Reals:
        """The slots of an upload's first ciphertext, with a secret key: [reserved, values …]."""
        total = upload[:N].reshape(1, N).copy()
        _Product(self.ring, secret).add_to(total, self.c1([seed]).reshape(1, N))
        return self.decode(total)


@cache
def observer() -> Observer:
    return Observer()


def secret_of(federation: Federation) -> Vector:
    """The session's secret key in the NTT domain: what an attacker would have."""
    return federation.sealer._kernel._product._secret


def unrounded(rows: Reals, silos: int, limit: int) -> Reals:
    """Opened values as they are, noise and all."""
    return (rows[:, 1:] / limit).reshape(-1)


@contextmanager
def believing(*, reserved: bool = False) -> Iterator[None]:
    """Openers that release whatever a sum opens to: off the grid, or under any number of silos."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(slots, "_OFF", np.inf)
        if not reserved:
            patch.setattr(slots, "RESERVED_TOLERANCE", np.inf)
        yield


def on_the_grid(held: Updates, names: Sequence[SiloId] = FOUR) -> Reals:
    """The mean of what these silos seal: integers of 2^-24 / B, summed as integers."""
    grain = 2.0**-24 / SUITE.parameters.slot_limit(len(FOUR))
    steps = sum(np.rint(held[name]["x"] / grain).astype(np.int64) for name in names)
    mean: Reals = steps * grain / len(names)
    return mean


# What opened values tell.


def solved(federation: Federation) -> tuple[Vector, Reals]:
    """From a round's public sum, seeds and mean: what should be s, and m − (c0 + c1·s)."""
    result, watching = federation.run_round(updates()), observer()
    limit = SUITE.parameters.slot_limit(len(FOUR))
    row = np.concatenate([[len(FOUR)], result.mean["x"] * len(FOUR) * limit])
    message, c0 = watching.encode(row), result.total[:N]
    c1 = watching.c1([federation.silo(name).seed for name in FOUR])
    opened = c0.reshape(1, N).copy()
    _Product(watching.ring, secret_of(federation)).add_to(opened, c1.reshape(1, N))
    noise = watching.decode((message + np.uint64(Q) - opened[0]) % np.uint64(Q))
    return watching.solve(message, c0, c1), noise


def test_key_from_a_released_sum() -> None:
    """The mean, times n and encoded again, is m + e to the bit: then s = (m + e − c0) / c1."""
    with weakened(sealing, "released", unrounded):
        federation = consortium()
        found, noise = solved(federation)
        assert np.array_equal(found, secret_of(federation))
        assert np.abs(noise).max() < 2**-38
        # With it the observer reads one silo's next upload, alone.
        later = Sealed(federation, updates(2), round_number=2)
        later.attempt.to_masked()
        read = observer().read(later.attempt.uploads[A], later.seeds[A], found)
        assert np.allclose(read[1:] / later.codec.limit, later.held[A]["x"], rtol=0, atol=1e-9)
    federation = consortium()
    found, noise = solved(federation)
    assert np.count_nonzero(found == secret_of(federation)) < 3
    # What is left is what encryption leaves who knows the message: RLWE, with all of its noise.
    assert 2**-31.9 < noise.std() < 2**-31.7
    # The message is all that was released: other noise, the same mean, to the bit.
    means = [consortium(seed=seed).run_round(updates()).mean["x"] for seed in ("one", "two")]
    assert means[0].tobytes() == means[1].tobytes() == on_the_grid(updates()).tobytes()


def test_key_from_shifted_sums() -> None:
    """Where values are known (here, zeros), rounding tells on which side of its border each fell,
    and the coordinator can move them all there. Sixteen openings of one sum, moved for each, whose
    values are published, give the key; four do not. Ours refuses the first.
    """

    def attack(openings: int) -> bool:
        federation, watching = consortium(), observer()
        one = Sealed(federation, {name: {"x": np.zeros(SIZE)} for name in FOUR})
        total = one.attempt.to_masked().total(FOUR)
        low, high = np.full(SIZE, -(2.0**-28)), np.full(SIZE, 2.0**-28)
        for _ in range(openings):
            moved = watching.encode(np.concatenate([[0], 2.0**-25 - (low + high) / 2]))
            border = 2.0**-25 - watching.decode(moved)[1:]
            above = one.open(shifted(total, moved), *FOUR) > 0
            low = np.where(above, np.maximum(low, border), low)
            high = np.where(above, high, np.minimum(high, border))
        c1 = watching.c1([one.seeds[name] for name in FOUR])
        for unseen in (0, 1, -1, 2, -2, 3, -3, 4, -4):  # the reserved slot's noise, of 2^-31.8
            row = np.concatenate([[len(FOUR) + unseen * 2.0**-32], (low + high) / 2])
            found = watching.solve(watching.encode(row), total[:N], c1)
            if np.array_equal(found, secret_of(federation)):
                return True
        return False

    with believing(reserved=True):
        assert attack(16)
        assert not attack(4)
    with refused("off-grid", MalformedMessage):
        attack(16)


def shifted(total: Vector, moved: Vector) -> Vector:
    """A sum with another polynomial in its first ciphertext."""
    words = total.copy()
    words[:N] = (words[:N] + moved) % np.uint64(Q)
    return words


def test_shifted_sum_opens_or_does_not() -> None:
    """Believed, each of 4095 known values tells on which side of a border its noise is. Of ours,
    one of them does: moved by three eighths of a step, it opens or it ends the epoch. Whole steps
    move it unseen.
    """
    federation, watching = consortium(), observer()
    one = Sealed(federation, {name: {"x": np.zeros(SIZE)} for name in FOUR})
    total = one.attempt.to_masked().total(FOUR)
    opened = total[:N].reshape(1, N).copy()
    c1 = watching.c1([one.seeds[name] for name in FOUR]).reshape(1, N)
    _Product(watching.ring, secret_of(federation)).add_to(opened, c1)
    noise = watching.decode(opened[0])[1:]

    def attack(row: Reals) -> Reals:
        return one.open(shifted(total, watching.encode(np.concatenate([[0], row]))), *FOUR)

    everywhere = np.full(SIZE, 2.0**-25)
    with believing(reserved=True):
        told = attack(everywhere) > 0
    moved = watching.decode(watching.encode(np.concatenate([[0], everywhere])))[1:]
    beyond = noise + moved - 2.0**-25
    clear = np.abs(beyond) > 1e-13  # but for what float64 leaves
    assert np.count_nonzero(clear) > 0.99 * SIZE
    assert np.array_equal(told[clear], beyond[clear] > 0)
    with refused("off-grid", MalformedMessage):
        attack(everywhere)
    for at in np.argmax(noise), np.argmin(noise):
        alone = np.zeros(SIZE)
        alone[at] = 3 * 2.0**-27
        if noise[at] > 0:
            with refused("off-grid", MalformedMessage):
                attack(alone)
        else:
            assert not attack(alone).any()
        grain = 2.0**-24
        assert attack(alone / 3 * 8)[at] * len(FOUR) * one.codec.limit == grain


# What a coordinator gets where it has a say in c1, or a friend with the key.


def test_key_from_a_supplied_c1() -> None:
    """Nothing but the reserved slot in the first ciphertext, and 2^23 for its c1: a silo opens it
    to 2^23 · s, which no rounding hides. Its values are off the grid, too.
    """
    factor, watching, real = 2**23, observer(), Kernel._c1

    def attack() -> Vector:
        one = Sealed(consortium())
        crafted = one.attempt.to_masked().total(FOUR)
        crafted[:N] = watching.encode(np.array([len(FOUR)] + [0.0] * SIZE))
        opened = one.open(crafted, *FOUR) * len(FOUR) * one.codec.limit
        row = np.concatenate([[0], opened]) * SUITE.parameters.scale / factor
        return watching.encode(row, 1.0)

    def supplied(kernel: Kernel, seeds: Any, first: int, shape: tuple[int, ...]) -> Vector:
        """Openers that take c1 from the coordinator."""
        c1 = real(kernel, seeds, first, shape)
        c1[:1] = factor
        return c1

    with weakened(Kernel, "_c1", supplied):
        with believing(reserved=True):
            found = attack()
        assert np.array_equal(found, secret_of(consortium()))
        with refused("off-grid", MalformedMessage):
            attack()
    with refused("reserved-slot", MalformedMessage):  # under Σ c1 of the seeds it is noise
        attack()


def test_result_with_other_seeds() -> None:
    """Seeds that were not committed to are no survivor's; a silo that signed τ3 refuses them."""
    other = bytes(32)

    def tell(silo: SiloId, message: Any) -> Any:
        if type(message).__name__ != "Result":
            return message
        return coordinator(replace(message, seeds=(other, *message.seeds[1:])))

    federation = consortium("ckks+masked")

    def coordinator(message: Any) -> Any:
        tau4 = client.transcript.result_transcript(
            message.survivors_transcript, message.vector_digest
        )
        signature = federation.identity.sign(client.SIGN_RESULT, tau4, message.body())
        return replace(message, signature=signature)

    with without("result-survivors"):
        federation.run_round(updates(), script=Script(tamper=tell))
    assert federation.silo(A).refusals == []
    federation = consortium("ckks+masked")
    federation.run_round(updates(), script=Script(tamper=tell))
    assert [refusal.code for refusal in federation.silo(A).refusals] == ["result-survivors"]


def test_silo_and_coordinator_open_one_upload() -> None:
    """Under ckks whoever has the key and the uploads reads each; under ckks+masked it is noise."""
    one = Sealed(consortium("ckks"))
    one.attempt.to_masked()
    read = one.open(one.attempt.uploads[A], A)
    assert np.allclose(read, one.held[A]["x"], rtol=0, atol=1e-6)
    one = Sealed(consortium("ckks+masked"))
    one.attempt.to_masked()
    with refused("reserved-slot", MalformedMessage):
        one.open(one.attempt.uploads[A], A)
    secret = secret_of(one.federation)
    noise = observer().read(one.attempt.uploads[A], one.seeds[A], secret)[1:]
    assert noise.std() > 1e5  # as uniform residues: q / √12 / 2^40 · √(N/2)
    told = np.corrcoef(noise, one.held[A]["x"])[0, 1]
    assert abs(told) < 0.06
    # The sum opens for who has the key, once it is unmasked, and not before.
    total = one.attempt.open(*FOUR)
    assert np.allclose(one.open(total, *FOUR), mean_of(one.held), rtol=0, atol=1e-6)


def test_plain_ckks_needs_the_operators_word() -> None:
    """A silo whose policy does not name ckks shows no key of an attempt."""
    member = consortium("ckks").silo(A).member
    policy = replace(member.policy, protections=(Protection.CKKS_MASKED,))

    def attack() -> Attempt:
        one = Sealed(consortium("ckks")).attempt
        one.members[A] = replace(one.members[A], policy=policy)
        one.advertise()
        return one

    with weakened(type(policy), "check_session", nothing):
        assert A in attack().adverts
    with refused("policy-protection", PolicyRefused):
        attack()


def test_carries_of_masks() -> None:
    """Two honest silos; the others, the coordinator and the key are the attacker's.

    Masks mod 2^64 leave the sum of two residues unreduced: whether it carried beyond q tells
    whether the one residue is above their sum mod q, 0.72 bit a word (∫ h(u) du = 1/(2 ln 2)).
    """

    def attack() -> tuple[Attempt, Vector, Vector]:
        one = Sealed(consortium("ckks+masked")).attempt.to_masked()
        return one, one.open(*FOUR), (one.vectors[A] + one.vectors[B]) % np.uint64(Q)

    with (
        weakened(client, "ring_of", lambda *_: PowerRing(64)),
        weakened(sight, "ring_of", lambda *_: PowerRing(64)),
    ):
        one, total, reduced = attack()
    above = one.vectors[A] > reduced
    carried = total - one.vectors[C] - one.vectors[D] >= Q
    assert np.array_equal(carried, above)  # a comparison of A's residue, every time
    share = reduced / Q
    told = -np.mean(share * np.log2(share) + (1 - share) * np.log2(1 - share))
    assert 0.70 < told < 0.74
    one, total, reduced = attack()
    assert total.max() < Q  # what is opened follows from the sum mod q
    above = one.vectors[A] > reduced
    carried = one.uploads[A] + one.uploads[B] >= Q
    assert abs(np.corrcoef(carried, above)[0, 1]) < 0.05


# Sums that are not what was sealed.


def under_another_key() -> Any:
    """D seals its tensor under a key that nobody has, whatever the round's descriptor says."""
    real, other = Federation._encode, Sealer(SUITE, Secret(bytes(32)))

    def encode(self: Federation, codec: Any, held: Any, *rest: Any) -> None:
        real(self, codec, held, *rest)
        silo = self.silo(D)
        foreign = codec.encode(held[D], weight=1e3, metrics={}, sealer=other, seed=silo.seed)
        own = silo.encoded((), self.session.mask_prg)
        joined = np.concatenate([foreign[:N], own[N:]])  # the weight stays plausible
        silo.encoded = masked(codec.ring, joined)

    return encode


def test_contribution_under_another_key() -> None:
    """D's part opens to noise: believed, the noise is applied; ours discards the sum."""

    def attack(protection: str) -> RoundResult:
        with weakened(Federation, "_encode", under_another_key()):
            return consortium(protection).run_round(updates())

    with believing():
        result = attack("ckks+masked")
        assert result.survivors == [*FOUR]
        assert np.abs(result.mean["x"]).max() > 1  # beyond every silo's bound
    for protection in ("ckks", "ckks+masked"):
        with refused("reserved-slot", MalformedMessage):
            attack(protection)


def lying(phase: Phase, name: SiloId, lie: Lie) -> Script:
    return Script(lies={(name, str(phase)): lie})


def test_words_that_are_no_residues() -> None:
    """B adds multiples of q to its words: the same residues, but a sum of them wraps mod 2^64."""

    def attack() -> tuple[Federation, Any]:
        federation = consortium("ckks")

        def lie(message: Any, vector: Vector | None) -> tuple[Any, Vector | None]:
            assert vector is not None
            wide = vector + np.uint64(1023 * Q)
            words = client.vector_digest(wide.data.cast("B"), federation.session.chunk_bytes)
            unsigned = replace(message, vector_digest=words)
            state = federation.silo(B).state
            federation.silo(B).state = replace(state, commit=unsigned)
            key = federation.silo(B).member.identity
            signature = key.sign(client.SIGN_MASKED_INPUT, state.tau2, unsigned.body())
            signed = replace(unsigned, signature=signature)
            federation.silo(B).state = replace(state, commit=signed)
            return signed, wide

        return federation, lying(Phase.MASKED_INPUT, B, lie)

    with weakened(PrimeRing, "holds", lambda *_: True):
        federation, script = attack()
        with refused("reserved-slot", MalformedMessage):  # the round is lost, and nobody named
            federation.run_round(updates(), script=script)
        assert federation.silo(B).refusals == []
    federation, script = attack()
    held = updates()
    result = federation.run_round(held, script=script)
    assert result.survivors == [A, C, D]
    assert np.allclose(result.mean["x"], mean_of(held, (A, C, D)), rtol=0, atol=1e-6)
    refusal = federation.silo(B).refusals[0]
    assert (type(refusal), refusal.code) == (FaultyClient, "residue-range")


def test_sums_that_wrap() -> None:
    """B three times as large: updates at their bound, in a pattern that the reserved slot does not
    see (X^(N/2) is imaginary in slot 0), give a mean of −1/3 where it is 1. The grid sees it, since
    q is no multiple of its steps: nobody proves that it always does, as the capacity is proven.
    """
    position = np.arange(SIZE - 2)
    sign = np.where(position // 2 % 2 == 0, 1.0, -1.0)
    at_bound = np.where(position % 2 == 0, sign, 0.0)
    real = Parameters.slot_limit

    def attack() -> Reals:
        return (
            consortium("ckks+masked").run_round({name: {"x": at_bound} for name in FOUR}).mean["x"]
        )

    with weakened(Parameters, "slot_limit", lambda *given: 3 * real(*given)):
        with believing(reserved=True):
            wrapped = attack()
        with refused("off-grid", MalformedMessage):
            attack()
    assert np.allclose(wrapped, -at_bound / 3, rtol=0, atol=1e-6)
    assert np.array_equal(attack(), at_bound)


# Seeds and keys that are used again.


def test_two_updates_under_one_seed() -> None:
    """C draws what A drew: the coordinator, without any key, reads the difference of the two."""

    def attack(protection: str) -> tuple[Sealed, Reals]:
        federation = consortium(protection)
        repeated = federation.entropy(32)
        one = Sealed(federation, seeds={A: repeated, C: repeated})
        one.attempt.to_masked()
        left = (one.attempt.uploads[A] + np.uint64(Q) - one.attempt.uploads[C]) % np.uint64(Q)
        return one, observer().decode(left[:N])[1:] / one.codec.limit

    def accepted(one: Sealed) -> None:
        """What an honest coordinator and an honest silo make of it."""
        attempt = one.attempt
        for name in FOUR:
            attempt.tell(name, attempt.survivors(*FOUR))

    one, read = attack("ckks")
    difference = one.held[A]["x"] - one.held[C]["x"]
    assert np.allclose(read, difference, rtol=0, atol=1e-9)
    with without("survivors-seeds"):
        accepted(one)
    one, _ = attack("ckks")
    with refused("survivors-seeds"):
        accepted(one)
    one, read = attack("ckks+masked")
    assert abs(np.corrcoef(read, difference)[0, 1]) < 0.06  # masks are of this attempt alone
    with refused("survivors-seeds"):
        accepted(one)


def test_seed_that_was_taken() -> None:
    """An honest coordinator names the second silo that comes with a seed, and goes on without."""

    def attack() -> tuple[Federation, RoundResult]:
        federation = consortium("ckks")
        with weakened(Federation, "_encode", repeating()):
            return federation, federation.run_round(updates())

    def repeating() -> Any:
        real = Federation._encode

        def encode(self: Federation, codec: Any, held: Any, *rest: Any) -> None:
            real(self, codec, held, *rest)
            seed = self.silo(A).seed
            silo = self.silo(C)
            silo.seed = seed
            vector = codec.encode(held[C], weight=1e3, metrics={}, sealer=self.sealer, seed=seed)
            silo.encoded = masked(codec.ring, vector)

        return encode

    with (
        weakened(ServerRound, "_check_seed", nothing),
        without("survivors-seeds"),
        refused("seed-duplicate", MalformedMessage),  # whoever opens refuses as well
    ):
        attack()
    federation, result = attack()
    assert result.survivors == [A, B, D]
    assert federation.silo(C).refusals[0].code == "seed-repeated"


def expecting(federation: Federation, key: KeyName | None) -> Attempt:
    """An attempt under the federation's key, before silos whose newest key is another."""
    one = Sealed(federation).attempt
    for name in FOUR:
        one.expected[name] = replace(one.expected[name], key=key)
    return one


def test_round_under_another_key() -> None:
    """The descriptor names an older key, or none, than the silo has: it advertises nothing."""
    federation = consortium("ckks+masked")
    newer = make_key(bytes(32), 2, federation.manifest.silos, stream("newer")).name
    with without("descriptor-key"):
        assert A in expecting(federation, newer).to_masked().adverts
    for held in (newer, None):
        with refused("descriptor-key"):
            expecting(federation, held).advertise()


def test_round_under_a_revoked_silos_key() -> None:
    """D left and kept the key: with the coordinator it opens whatever is sealed under it."""
    federation = consortium("ckks")
    key = federation.key
    assert key is not None
    ring = Keyring(key.session_id, None, (key,))
    members = {name: federation.manifest.silos[name] for name in REST}

    def attack() -> Reals:
        held = ring.check(key.name, members, 0)  # what a silo does before it seals
        one = Sealed(federation)
        upload = one.seal(A, Sealer(SUITE, held.material))
        return one.open(upload, A) - one.held[A]["x"]

    with weakened(Keyring, "check", lambda self, *_: self.newest):
        assert np.abs(attack()).max() < 1e-6
    with refused("descriptor-key-revoked"):
        attack()
    with refused("descriptor-key-revoked"):  # back under another identity: it is another silo
        ring.check(key.name, {**federation.manifest.silos, D: bytes(32)}, 0)


def test_round_under_a_worn_key() -> None:
    """The coordinator goes on with one key, for more sums than the margin was taken for."""
    federation = consortium("ckks")
    key = federation.key
    assert key is not None
    ring = Keyring(key.session_id, None, (key,))

    def attack() -> object:
        return ring.check(key.name, federation.manifest.silos, SUMS_PER_KEY)

    with weakened(keyring, "SUMS_PER_KEY", np.inf):
        assert attack() is key
    with refused("descriptor-key-worn"):
        attack()
