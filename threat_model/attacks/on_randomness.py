"""Key space and key use: what a brute force reaches, and masks that come off twice.

NIST SP 800-57 part 1, section 5.6, on key lengths; Ristenpart and Yilek, When Good Randomness Goes
Bad (NDSS 2010), on machines that are set back; Bonawitz et al. 2017, section 4, on why an update
has a mask of its own beside those of its pairs.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from secagg.config import silo_id
from secagg.crypto.secret import Secret
from secagg.masking.masks import pair_mask, self_mask
from secagg.ring.vectors import Vector
from threat_model.attacks.attack import Scene, attack
from threat_model.attacks.attempt import Attempt
from threat_model.attacks.evil_coordinator import (
    LENGTH,
    EvilCoordinator,
    make_session,
    secret_values,
)
from threat_model.attacks.sight import KEY, SEED
from threat_model.attacks.weak import Function, replaced

A, B, C = (silo_id(name) for name in "abc")
KEY_BITS = 16


def short_keys(real: Function) -> Function:
    """``masking.masks.derive`` with keys of 16 bits: seeds of a small generator."""

    def derive(*given: Any, size: int, **named: Any) -> Secret:
        key = real(*given, size=size, **named).reveal()
        return Secret(key[: KEY_BITS // 8] + bytes(size - KEY_BITS // 8))

    return derive


def brute_force(masked: Vector, place: int, known: int) -> Vector | None:
    """Take the mask off whose key has 16 bits, by trying them all.

    Args:
        masked: words with one mask, which was subtracted.
        place: of a word that is known.
        known: that word.
    """
    for guess in range(2**KEY_BITS):
        key = guess.to_bytes(KEY_BITS // 8, "big") + bytes(16 - KEY_BITS // 8)
        words = stream(key, place + 1)
        if (int(masked[place]) + int.from_bytes(words[-4:], "little") - known) % 2**32 == 0:
            return masked + np.frombuffer(stream(key, len(masked)), "<u4")
    return None


def stream(key: bytes, words: int) -> bytes:
    """So many words of a mask."""
    return Cipher(algorithms.AES128(key), modes.CTR(bytes(16))).encryptor().update(bytes(4 * words))


def nothing_but_weight(evil: EvilCoordinator) -> Vector:
    """An update of zeros; its weight of 1 comes after the tensor."""
    zeros = {"x": np.zeros(LENGTH)}
    words: Vector = evil.codec.encode(zeros, weight=1.0, metrics={}, entropy=os.urandom)
    return words


@attack(
    threat="short-seed",
    reason="key-space",
    weakening=replaced("secagg.masking.masks:derive", short_keys),
)
def short_seed(scene: Scene) -> bool:
    """a, b and a colluder c: when the sum is open, the mask of a and b is all that covers a's
    update; the coordinator tries all keys of 16 bits.
    """
    with scene.alike(), EvilCoordinator(scene, make_session("abc"), colluders="c") as evil:
        evil.start()
        attempt = Attempt(evil)
        attempt.advertise()
        pair = attempt.colluders[C].state.mask_key
        attempt.share()
        attempt.mask()
        attempt.open(A, B, C)
        prg, tau1 = evil.session.mask_prg, attempt.tau1
        known = [
            self_mask(attempt.secret(A, SEED), A, tau1, prg).inverse(),
            pair_mask(pair, C, A, attempt.adverts[A].mask_key, tau1, prg),
        ]
        masked, weight = attempt.strip(attempt.uploads[A], known), nothing_but_weight(evil)
        found = brute_force(masked, LENGTH, int(weight[LENGTH]))
        if found is None or not evil.reads(found, A):
            raise scene.refuse("key-space", A, "no key of 16 bits")
        return True


def fixed_salt(real: Function) -> Function:
    """``masking.masks.derive`` that knows nothing of the attempt."""
    return lambda secret, *, salt, **named: real(secret, salt=bytes(32), **named)


@attack(
    threat="mask-reuse",
    reason="fresh-masks",
    weakening=replaced("secagg.masking.masks:derive", fixed_salt),
)
def keys_of_two_rounds(scene: Scene) -> bool:
    """All machines are set back between two rounds, and draw the same keys again: the masks cancel
    out, and the difference of a's two updates is read.
    """
    with scene.alike(), EvilCoordinator(scene, make_session("abc")) as evil:
        draws = {name: [os.urandom(32) for _ in range(3)] for name in (A, B, C)}
        for name, drawn in draws.items():
            evil.start_one(name, draws=drawn)
        first = Attempt(evil).to_masked()
        first.conclude(A, B, C)
        for name in draws:
            evil.answer(name)
        before, later = evil.values[A], secret_values()
        for name, drawn in draws.items():
            updates = [evil.values[name], later if name == A else evil.values[name]]
            evil.start_one(name, again=True, values=updates, draws=drawn)
        second = Attempt(evil).to_masked()
        assert second.adverts[A].mask_key == first.adverts[A].mask_key
        apart = second.uploads[A] - first.uploads[A]
        evil.values[A] = later - before
        if evil.reads(apart + nothing_but_weight(evil), A):
            return True
        raise scene.refuse("fresh-masks", A, "the attempt is in every mask's key")


def pairs_alone(real: Function) -> Function:
    """``masking.client._masks`` without the silo's own mask, which comes first."""
    return lambda *given: real(*given)[1:]


@attack(
    threat="late-vector-read",
    reason="self-mask",
    weakening=replaced("secagg.masking.client:_masks", pairs_alone),
)
def late_input_read(scene: Scene) -> bool:
    """a is slow: its mask key is rebuilt with the others' help, then its vector comes, and the
    masks of its pairs come off.
    """
    with EvilCoordinator(scene, colluders="d") as evil:
        evil.start()
        attempt = Attempt(evil).to_masked(silent=[A])
        attempt.open(*"bcd")
        attempt.tell(A, attempt.dealt(A))
        masks = attempt.pair_masks(A, attempt.secret(A, KEY))
        if evil.reads(attempt.strip(attempt.uploads[A], masks), A):
            return True
        raise scene.refuse("self-mask", A, "nobody gives a share of its seed")
