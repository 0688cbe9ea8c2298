"""Phases 1 to 3: keys and shares that are not their owner's, not of this attempt, or no keys."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace

from secagg.crypto.keys import KeyPair, parse_public_key
from secagg.crypto.labels import SIGN_ADVERTISE_KEYS
from secagg.crypto.secret import Entropy, Secret
from secagg.errors import MalformedMessage
from secagg.masking import client, messages, transcript
from secagg.masking.masks import pair_mask
from secagg.masking.messages import (
    AdvertiseKeys,
    Box,
    Commitment,
    Dealing,
    Dealt,
    Roster,
    ShareKeys,
)
from secagg.masking.shares import HeldShares, deal, open_shares, seal_shares
from secagg.masking.unmask import rebuild
from secagg.simulation import Federation
from threat_model.attacks.sight import KEY, SEED

from .harness import BASE, FOUR, A, Attempt, B, C, D, nothing, refused, same, weakened, without

FIELD = 2**255 - 19
OTHERS = (B, C, D)


class Impostor:
    """The coordinator in the place of all of a victim's peers, with keys of its own."""

    def __init__(self, attempt: Attempt, victim: client.SiloId) -> None:
        self.attempt, self.victim = attempt, victim
        self.channels = {name: KeyPair.generate(os.urandom) for name in OTHERS}
        self.masks = {name: KeyPair.generate(os.urandom) for name in OTHERS}

    def roster(self) -> Roster:
        """The victim's advert among adverts of the coordinator's making."""
        forged = [
            replace(
                self.attempt.adverts[name],
                channel_key=self.channels[name].public,
                mask_key=self.masks[name].public,
            )
            for name in OTHERS
        ]
        own = self.attempt.adverts[self.victim]
        return Roster(tuple(sorted((own, *forged), key=lambda advert: advert.sender)))

    def dealt(self, sent: ShareKeys) -> Dealt:
        """The victim's dealing among dealings of the coordinator's making, that all open."""
        tau1 = self.tau1()
        names = (self.victim, *OTHERS)
        dealings = [
            Dealing(self.victim, sent.commitments, sent.boxes_digest(), None, sent.signature)
        ]
        for name in OTHERS:
            shares = deal(
                name,
                self.masks[name].private,
                Secret(bytes(32)),
                names,
                threshold=3,
                entropy=os.urandom,
            )
            commitments = tuple(shares[holder].commitment(holder, tau1) for holder in names)
            victim_key = self.attempt.adverts[self.victim].channel_key
            held = shares[self.victim]
            sealed = seal_shares(held, self.channels[name], self.victim, victim_key, tau1)
            dealings.append(Dealing(name, commitments, bytes(32), sealed, bytes(64)))
        return Dealt(tuple(sorted(dealings, key=lambda dealing: dealing.dealer)))

    def tau1(self) -> bytes:
        tau0 = transcript.round_transcript(self.attempt.descriptor)
        return transcript.roster_transcript(tau0, self.roster().adverts)

    def self_seed(self, sent: ShareKeys) -> Secret:
        """The victim's self seed, from the boxes that it sealed for its peers."""
        found = {}
        for box in sent.boxes:
            commitment = next(c for c in sent.commitments if c.holder == box.recipient)
            found[box.recipient] = open_shares(
                box.sealed,
                commitment,
                channel=self.channels[box.recipient],
                dealer=self.victim,
                dealer_key=self.attempt.adverts[self.victim].channel_key,
                tau1=self.tau1(),
            ).self_seed
        return rebuild(self.victim, found, FOUR, 3)


def test_swapped_keys() -> None:
    """The coordinator puts its own keys in the place of everybody else's and reads the victim."""

    def attack() -> None:
        attempt = Attempt(Federation(FOUR))
        attempt.advertise()
        impostor = Impostor(attempt, A)
        sent = attempt.tell(A, impostor.roster())
        seed = impostor.self_seed(sent)
        attempt.tell(A, impostor.dealt(sent))
        prg, tau1 = attempt.session.mask_prg, impostor.tau1()
        victim_key = attempt.adverts[A].mask_key
        masks = [client.self_mask(seed, A, tau1, prg).inverse()]
        # The pair's two ends carry the same mask with opposite signs.
        masks += [pair_mask(impostor.masks[n], n, A, victim_key, tau1, prg) for n in OTHERS]
        assert same(attempt.strip(attempt.uploads[A], masks), attempt.vectors[A])

    with weakened(client, "verify", nothing):
        attack()
    with refused("advertise-keys-signature"):
        attack()


def check_roster(make: Callable[[], tuple[Attempt, Roster]], code: str) -> None:
    """Accepted, with shares dealt over it, without the check; refused by it otherwise."""
    with without(code):
        attempt, roster = make()
        assert isinstance(attempt.tell(A, roster), ShareKeys)
    attempt, roster = make()
    with refused(code):
        attempt.tell(A, roster)


def advertised(attempt: Attempt) -> Attempt:
    attempt.advertise()
    return attempt


def readvertise(attempt: Attempt, **keys: bytes) -> Roster:
    """D, a colluder, signs an advert of these keys."""
    forged = replace(attempt.adverts[D], **keys)
    tau0 = transcript.round_transcript(attempt.descriptor)
    signature = attempt.members[D].identity.sign(SIGN_ADVERTISE_KEYS, tau0, forged.body())
    attempt.adverts[D] = replace(forged, signature=signature)
    return attempt.roster


def same_mask_key() -> tuple[Entropy, Entropy]:
    """Two silos whose machines were cloned: of their three draws, the mask key's is the same."""
    shared, calls = os.urandom(32), {B: 0, D: 0}

    def source(name: client.SiloId) -> Entropy:
        def entropy(size: int) -> bytes:
            calls[name] += 1
            return shared if calls[name] == 2 else os.urandom(size)

        return entropy

    return source(B), source(D)


def test_duplicated_key() -> None:
    """B and D draw one mask key; B falls out, its key is rebuilt, and so is the survivor D's."""

    def attack() -> None:
        attempt = Attempt(Federation(FOUR))
        attempt.entropy[B], attempt.entropy[D] = same_mask_key()
        attempt.to_masked(silent=(B,)).open(A, C, D)
        read = attempt.read(D, attempt.secret(D, SEED), attempt.secret(B, KEY))
        assert same(read, attempt.vectors[D])

    with without("roster-keys"):
        attack()
    with refused("roster-keys"):
        attack()


def test_reflected_key() -> None:
    """A colluder advertises the victim's own key: the victim agrees on a key with itself."""

    def make() -> tuple[Attempt, Roster]:
        attempt = advertised(Attempt(Federation(FOUR)))
        return attempt, readvertise(attempt, channel_key=attempt.adverts[A].channel_key)

    check_roster(make, "roster-keys")


def test_own_advert_altered() -> None:
    """The coordinator's channel key stands in A's advert: it reads what is sealed for A."""
    key = KeyPair.generate(os.urandom)

    def attack() -> None:
        attempt = advertised(Attempt(Federation(FOUR)))
        attempt.adverts[A] = replace(attempt.adverts[A], channel_key=key.public)
        attempt.share()
        commitment = next(c for c in attempt.dealings[B].commitments if c.holder == A)
        opened = open_shares(
            attempt.box(B, A) or b"",
            commitment,
            channel=key,
            dealer=B,
            dealer_key=attempt.adverts[B].channel_key,
            tau1=attempt.tau1,
        )
        assert isinstance(opened, HeldShares)

    with without("roster-own-advert", "advertise-keys-signature"):
        attack()
    with without("advertise-keys-signature"), refused("roster-own-advert"):
        attack()
    with without("roster-own-advert"), refused("advertise-keys-signature"):
        attack()


def test_advert_of_another_attempt() -> None:
    """B's mask key was rebuilt in an attempt that it left; its old advert would be used again."""

    def attack() -> None:
        federation = Federation(FOUR)
        first = Attempt(federation).to_masked(silent=(B,))
        first.open(A, C, D)
        known = KeyPair.from_private(first.secret(B, KEY))
        second = Attempt(federation, number=2, base=bytes(32))
        second.advertise(without=(B,))
        second.adverts = dict(sorted({**second.adverts, B: first.adverts[B]}.items()))
        second.tell(A, second.roster)
        args = (second.tau1, second.session.mask_prg)
        ours = pair_mask(second.states[A].mask_key, A, B, second.adverts[B].mask_key, *args)
        theirs = pair_mask(known, B, A, second.adverts[A].mask_key, *args)
        assert ours.key == theirs.key

    with without("advertise-keys-signature"):
        attack()
    with refused("advertise-keys-signature"):
        attack()


def test_shares_of_another_attempt() -> None:
    """B's dealing of an earlier attempt is shown as this one's."""

    def attack() -> Attempt:
        federation = Federation(FOUR)
        first = Attempt(federation).to_masked()
        second = advertised(Attempt(federation, number=2))
        second.share()
        second.dealings[B] = first.dealings[B]
        second.tell(A, second.dealt(A))
        return second

    with without("share-keys-signature"):
        attempt = attack()
        assert attempt.states[A].commit.bad_dealers == (B,)  # sealed under another transcript
    with refused("share-keys-signature"):
        attack()


def low_order_points() -> list[bytes]:
    e8 = 325606250916557431795983626356110631294008115727848805560023387167927233504
    f8 = 39382357235489614581723060781553021112529911719440698176882885853963445705823
    return [u.to_bytes(32, "little") for u in (0, 1, e8, f8, FIELD - 1)]


def test_low_order_key() -> None:
    """A key of small order: the pair's secret is all zeros, and anybody can make its mask."""
    real = KeyPair.agree

    def careless(pair: KeyPair, peer: bytes) -> Secret:
        try:
            return real(pair, peer)
        except MalformedMessage:
            return Secret(bytes(32))

    def attack(point: bytes) -> None:
        attempt = advertised(Attempt(Federation(FOUR)))
        attempt.tell(A, readvertise(attempt, mask_key=point))
        args = (attempt.tau1, attempt.session.mask_prg)
        nobody = KeyPair.generate(os.urandom)
        ours = pair_mask(attempt.states[A].mask_key, A, D, point, *args)
        assert pair_mask(nobody, A, D, point, *args).key == ours.key

    for point in low_order_points():
        with (
            weakened(messages, "parse_public_key", lambda key: key),
            weakened(KeyPair, "agree", careless),
        ):
            attack(point)
        with refused("public-key-low-order", MalformedMessage):
            attack(point)
        with (  # and were it let in, it would give no secret
            weakened(messages, "parse_public_key", lambda key: key),
            refused("public-key-low-order", MalformedMessage),
        ):
            attack(point)


def test_aliased_key() -> None:
    """B's key with its top bit set is another byte string and the same key: a duplicate, unseen."""

    def attack() -> None:
        attempt = advertised(Attempt(Federation(FOUR)))
        key = attempt.adverts[B].mask_key
        alias = key[:31] + bytes([key[31] | 0x80])
        attempt.tell(A, readvertise(attempt, mask_key=alias))
        pair = attempt.states[A].mask_key
        assert pair.agree(alias) == pair.agree(key)

    with weakened(messages, "parse_public_key", lambda key: key):
        attack()
    with refused("public-key-encoding", MalformedMessage):
        attack()
    for u in (FIELD, FIELD + 1, 2**255 - 1, 2**256 - 1):
        with refused("public-key-encoding", MalformedMessage):
            parse_public_key(u.to_bytes(32, "little"))


def test_public_key_that_gives_the_secret_away() -> None:
    """Secrets that follow from public keys: every box opens, and A's vector is read."""

    def public_agree(pair: KeyPair, peer: bytes) -> Secret:
        """The shared secret as of keys whose private half is the public one."""
        low, high = sorted((pair.public, peer))
        return Secret(bytes(x ^ y for x, y in zip(low, high, strict=True)))

    def attack() -> bool:
        attempt = Attempt(Federation(FOUR)).to_masked()
        keys = {name: advert.channel_key for name, advert in attempt.adverts.items()}
        held = {}
        for holder in OTHERS:
            commitment = next(c for c in attempt.dealings[A].commitments if c.holder == holder)
            held[holder] = open_shares(
                attempt.box(A, holder) or b"",
                Commitment(holder, commitment.mask_key, commitment.self_seed),
                channel=replace(KeyPair.from_private(Secret(bytes(32))), public=keys[holder]),
                dealer=A,
                dealer_key=keys[A],
                tau1=attempt.tau1,
            )
        seed, key = (
            rebuild(A, {n: getattr(shares, what) for n, shares in held.items()}, FOUR, 3)
            for what in ("self_seed", "mask_key")
        )
        return same(attempt.read(A, seed, key), attempt.vectors[A])

    with weakened(KeyPair, "agree", public_agree):
        assert attack()
    with refused("box-authentication", MalformedMessage):
        attack()
    pair = KeyPair.generate(os.urandom)
    assert pair.private.reveal() != pair.public


def test_share_that_is_the_secret() -> None:
    """Shares of threshold one: a single colluder holds every key and reads A."""
    real = client.deal

    def thin(*args: object, threshold: int, entropy: Entropy) -> object:
        return real(*args, threshold=1, entropy=entropy)  # type: ignore[arg-type]

    def attack() -> Attempt:
        attempt = Attempt(Federation(FOUR)).to_masked()
        held = attempt.states[D].held[A]
        seed, key = (Secret(s.reveal()[1:]) for s in (held.self_seed, held.mask_key))
        read = attempt.read(A, seed, key)
        attempt.vectors[D] = read
        return attempt

    with weakened(client, "deal", thin):
        attempt = attack()
        assert same(attempt.vectors[D], attempt.vectors[A])
    attempt = attack()
    assert not same(attempt.vectors[D], attempt.vectors[A])
    shares = attempt.shares(A, KEY, colluders=(D,))
    assert len(shares) < attempt.descriptor.threshold


def test_box_of_another_holder() -> None:
    """The coordinator gives A the box that B sealed for C: it opens to nobody else."""

    def attack() -> tuple[client.SiloId, ...]:
        attempt = advertised(Attempt(Federation(FOUR)))
        attempt.share()
        boxes = {box.recipient: box for box in attempt.dealings[B].boxes}
        swapped = Box(A, boxes[C].sealed)
        honest = attempt.dealt(A)
        dealings = tuple(
            replace(d, sealed=swapped.sealed) if d.dealer == B else d for d in honest.dealings
        )
        attempt.tell(A, Dealt(dealings))
        bad: tuple[client.SiloId, ...] = attempt.states[A].commit.bad_dealers
        return bad

    def accept(sealed: bytes, commitment: Commitment, **_: object) -> HeldShares:
        filler = Secret(sealed[:32])
        share = Secret(bytes(1) + sealed[:32])
        return HeldShares(B, share, filler, share, filler)

    with weakened(client, "open_shares", accept):
        assert attack() == ()  # garbage is held, and would be revealed as a share
    assert attack() == (B,)


def test_advert_fields_are_all_signed() -> None:
    """Whatever the coordinator changes in an advert, its signature is no longer good."""
    for change in ({"mask_key": bytes([9]) + bytes(31)}, {"self_seed_hash": BASE}):

        def make(change: dict[str, bytes] = change) -> tuple[Attempt, Roster]:
            attempt = advertised(Attempt(Federation(FOUR)))
            forged: AdvertiseKeys = replace(attempt.adverts[C], **change)
            attempt.adverts[C] = forged
            return attempt, attempt.roster

        check_roster(make, "advertise-keys-signature")
