"""Key space: what a brute force reaches, and whether keys are ever used twice."""

from __future__ import annotations

import os

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from secagg.config import MaskPrg
from secagg.crypto.kdf import derive
from secagg.crypto.keys import KeyPair
from secagg.crypto.prg import key_bytes
from secagg.crypto.secret import Secret
from secagg.masking import masks
from secagg.masking.masks import pair_mask
from secagg.ring.vectors import Vector
from secagg.simulation import Federation
from threat_model.attacks.sight import SEED

from .harness import RING, A, Attempt, B, C, same, weakened

BITS = 16
WORDS = 4


def short_key(secret: Secret, *, size: int, **context: object) -> Secret:
    """A mask key of 16 bits, padded to its size: a seed from a small generator."""
    key = derive(secret, size=size, **context).reveal()  # type: ignore[arg-type]
    return Secret(key[: BITS // 8] + bytes(size - BITS // 8))


def brute_force(masked: Vector) -> list[int]:
    """Every 16-bit key under which the first words look like an update: 20-bit numbers."""
    target = masked[:WORDS].astype("<u4")
    zeros, found = bytes(4 * WORDS), []
    for guess in range(2**BITS):
        key = guess.to_bytes(2, "big") + bytes(14)
        stream = Cipher(algorithms.AES128(key), modes.CTR(bytes(16))).encryptor().update(zeros)
        words = target + np.frombuffer(stream, "<u4")  # the lower name subtracts
        if (words + np.uint32(2**19) < 2**20).all():
            found.append(guess)
    return found


def test_seed_of_few_bits() -> None:
    """A, B and a colluder C. After the sum only the pair mask of A and B covers A's vector."""

    def attack() -> bool:
        attempt = Attempt(Federation([A, B, C]))
        colluder = KeyPair.generate(os.urandom)
        draws = iter([os.urandom(32), colluder.private.reveal()])
        attempt.entropy[C] = lambda size: next(draws, b"") or os.urandom(size)
        attempt.to_masked().open(A, B, C)
        prg, tau1 = attempt.session.mask_prg, attempt.tau1
        victim = attempt.adverts[A].mask_key
        known = [
            masks.self_mask(attempt.secret(A, SEED), A, tau1, prg).inverse(),
            pair_mask(colluder, C, A, victim, tau1, prg),
        ]
        masked = attempt.strip(attempt.uploads[A], known)
        for guess in brute_force(masked):
            key = Secret(guess.to_bytes(2, "big") + bytes(14))
            if same(attempt.strip(masked, [masks.Mask(key, add=True)]), attempt.vectors[A]):
                return True
        return False

    with weakened(masks, "derive", short_key):
        assert attack()
    assert not attack()
    assert {prg: key_bytes(prg) for prg in MaskPrg} == {
        MaskPrg.AES_128_CTR: 16,
        MaskPrg.CHACHA20: 32,
    }


def test_masks_of_two_attempts() -> None:
    """One keystream on two vectors: their difference is read. Every attempt's keys are fresh."""

    def fixed_salt(secret: Secret, *, salt: bytes, **context: object) -> Secret:
        return derive(secret, salt=bytes(32), **context)  # type: ignore[arg-type]

    def attack() -> bool:
        federation = Federation([A, B, C])
        draws = {name: [os.urandom(32) for _ in range(3)] for name in (A, B, C)}
        plays = []
        for number in (1, 2):
            attempt = Attempt(federation, number=number)
            for name, values in draws.items():  # a generator that is rewound by a restart
                again = iter(values)
                attempt.entropy[name] = lambda size, i=again: next(i, b"") or os.urandom(size)
            plays.append(attempt.to_masked())
        one, two = plays
        difference = one.vectors[A] - two.vectors[A]
        return same(one.uploads[A] - two.uploads[A], difference)

    with weakened(masks, "derive", fixed_salt):
        assert attack()
    assert not attack()  # the descriptor's nonce is in every derived key
    assert RING.bits == 32
