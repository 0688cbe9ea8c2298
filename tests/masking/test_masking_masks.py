"""Masks cancel in pairs, shares open to whom they were dealt, secrets come back whole."""

from __future__ import annotations

import itertools
from contextlib import suppress

import numpy as np
import pytest

from secagg.config import MaskPrg, SiloId
from secagg.crypto.keys import KeyPair
from secagg.crypto.labels import SELF_SEED, digest
from secagg.crypto.secret import Secret
from secagg.errors import MalformedMessage
from secagg.masking.graph import holders, neighbours
from secagg.masking.masks import pair_mask, self_mask
from secagg.masking.messages import AdvertiseKeys, ShareKind
from secagg.masking.shares import HeldShares, deal, open_shares, seal_shares
from secagg.masking.unmask import orphan_masks, rebuild, survivor_mask
from secagg.ring.expand import Mask, apply_masks
from secagg.ring.vectors import PowerRing

from .harness import A, B, C, D, Keyed, silos

TAU1 = b"1" * 32
NAMES = silos(4)
PAIRS = {name: KeyPair.generate(Keyed("pair", name)) for name in NAMES}
SEEDS = {name: Secret(Keyed("seed", name)(32)) for name in NAMES}
ADVERTS = {
    name: AdvertiseKeys(
        name,
        KeyPair.generate(Keyed("channel", name)).public,
        PAIRS[name].public,
        digest(SELF_SEED, SEEDS[name].reveal()),
        bytes(64),
    )
    for name in NAMES
}


def between(i: SiloId, j: SiloId, prg: MaskPrg = MaskPrg.AES_128_CTR, tau1: bytes = TAU1) -> Mask:
    return pair_mask(PAIRS[i], i, j, PAIRS[j].public, tau1, prg)


def test_graph_is_complete_and_sorted() -> None:
    assert neighbours(NAMES, B) == (A, C, D)
    assert holders(NAMES, C) == NAMES
    assert holders((A, B), D) == (A, B, D)


@pytest.mark.parametrize("prg", MaskPrg)
@pytest.mark.parametrize("bits", [16, 32, 64])
def test_pair_masks_cancel(prg: MaskPrg, bits: int) -> None:
    ring = PowerRing(bits)  # type: ignore[arg-type]
    total = ring.zeros(100)
    for name in NAMES:
        apply_masks(ring, total, [between(name, o, prg) for o in neighbours(NAMES, name)], prg)
    np.testing.assert_array_equal(total, ring.zeros(100))


def test_higher_adds_and_lower_subtracts() -> None:
    for i, j in itertools.permutations(NAMES, 2):
        assert between(i, j).add == (j < i)
        assert between(i, j).key == between(j, i).key


def test_every_mask_has_its_own_key() -> None:
    masks = [between(i, j) for i, j in itertools.combinations(NAMES, 2)]
    masks += [self_mask(SEEDS[name], name, TAU1, MaskPrg.AES_128_CTR) for name in NAMES]
    masks += [self_mask(SEEDS[A], B, TAU1, MaskPrg.AES_128_CTR)]
    masks += [self_mask(SEEDS[A], A, bytes(32), MaskPrg.AES_128_CTR), between(A, B, tau1=bytes(32))]
    assert len({mask.key.reveal() for mask in masks}) == len(masks)
    assert all(mask.add for mask in masks[6:11])


# Shares.


def dealt() -> dict[SiloId, HeldShares]:
    return deal(A, PAIRS[A].private, SEEDS[A], NAMES, threshold=3, entropy=Keyed("deal"))


def test_any_t_holders_rebuild() -> None:
    shares = dealt()
    for chosen in itertools.combinations(NAMES, 3):
        keys = {name: shares[name].mask_key for name in chosen}
        seeds = {name: shares[name].self_seed for name in chosen}
        assert rebuild(A, keys, NAMES, 3) == PAIRS[A].private
        assert rebuild(A, seeds, NAMES, 3) == SEEDS[A]
        mixed = {**keys, chosen[0]: seeds[chosen[0]]}
        with suppress(MalformedMessage):  # or a value that is no 32-byte string
            assert rebuild(A, mixed, NAMES, 3) != PAIRS[A].private


def test_more_than_t_shares_rebuild_the_same() -> None:
    shares = dealt()
    everybody = {name: shares[name].mask_key for name in NAMES}
    assert rebuild(A, everybody, NAMES, 3) == PAIRS[A].private


def test_a_share_is_of_one_kind() -> None:
    held = dealt()[B]
    seed, key = held.reveal(ShareKind.SELF_SEED), held.reveal(ShareKind.MASK_KEY)
    assert (seed.kind, seed.share, seed.salt) == (
        ShareKind.SELF_SEED,
        held.self_seed,
        held.self_seed_salt,
    )
    assert (key.kind, key.share, key.salt) == (
        ShareKind.MASK_KEY,
        held.mask_key,
        held.mask_key_salt,
    )
    assert HeldShares.unpack(A, held.pack()) == held


def test_salts_are_all_different() -> None:
    salts = [s.reveal() for h in dealt().values() for s in (h.mask_key_salt, h.self_seed_salt)]
    assert len(set(salts)) == 8


@pytest.mark.parametrize("what", ["nothing", "dealer", "holder", "transcript", "key", "box"])
def test_box_opens_to_its_holder_only(what: str) -> None:
    ours, theirs, third = (KeyPair.generate(Keyed("channel", i)) for i in range(3))
    held = dealt()[B]
    commitment = held.commitment(B, TAU1)
    sealed = seal_shares(held, ours, B, theirs.public, TAU1)
    options = {
        "channel": third if what == "holder" else theirs,
        "dealer": C if what == "dealer" else A,
        "dealer_key": third.public if what == "key" else ours.public,
        "tau1": bytes(32) if what == "transcript" else TAU1,
    }
    box = sealed[:-1] + bytes([sealed[-1] ^ 1]) if what == "box" else sealed
    if what == "nothing":
        assert open_shares(box, commitment, **options) == held  # type: ignore[arg-type]
        other = dealt()[C].commitment(B, TAU1)
        with pytest.raises(MalformedMessage) as caught:
            open_shares(box, other, **options)  # type: ignore[arg-type]
        assert caught.value.code == "share-commitment"
    else:
        with pytest.raises(MalformedMessage) as caught:
            open_shares(box, commitment, **options)  # type: ignore[arg-type]
        assert caught.value.code == "box-authentication"


# Unmasking.


def test_survivors_mask_comes_off() -> None:
    prg = MaskPrg.AES_128_CTR
    off = survivor_mask(ADVERTS[A], SEEDS[A], TAU1, prg)
    assert off == self_mask(SEEDS[A], A, TAU1, prg).inverse()
    with pytest.raises(MalformedMessage) as caught:
        survivor_mask(ADVERTS[A], SEEDS[B], TAU1, prg)
    assert caught.value.code == "rebuilt-seed"


def test_orphans_masks_are_those_with_the_survivors() -> None:
    prg = MaskPrg.AES_128_CTR
    masks = orphan_masks(ADVERTS[B], PAIRS[B].private, ADVERTS, (A, C), TAU1, prg)
    assert masks == [between(B, A), between(B, C)]
    with pytest.raises(MalformedMessage) as caught:
        orphan_masks(ADVERTS[B], PAIRS[A].private, ADVERTS, (A, C), TAU1, prg)
    assert caught.value.code == "rebuilt-key"
