"""Phases 1 to 3: keys and shares that are not their owner's, not of this attempt, or no keys.

Bonawitz et al. 2017 (ePrint 2017/281), section 6.2: an active adversary is why there is a PKI; RFC
7748 for encodings and points; Heninger et al., Mining Your Ps and Qs (USENIX Security 2012), for
machines that draw alike.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from secagg.config import SiloId, silo_id
from secagg.crypto.keys import KeyPair
from secagg.crypto.labels import SIGN_ADVERTISE_KEYS
from secagg.crypto.secret import Entropy, Secret
from secagg.errors import MalformedMessage
from secagg.masking import transcript
from secagg.masking.masks import pair_mask, self_mask
from secagg.masking.messages import (
    AdvertiseKeys,
    Commitment,
    Dealing,
    Dealt,
    Roster,
    ShareKeys,
    Signatures,
)
from secagg.masking.shares import HeldShares, deal, open_shares, seal_shares, share_commitment
from secagg.masking.unmask import rebuild
from threat_model.attacks.attack import Scene, attack
from threat_model.attacks.attempt import Attempt
from threat_model.attacks.evil_coordinator import EvilCoordinator, make_session
from threat_model.attacks.sight import KEY, SEED
from threat_model.attacks.weak import Function, as_is, nothing, replaced, without

A, B, C, D, E = (silo_id(name) for name in "abcde")
OTHERS = (B, C, D)
ALL = (A, *OTHERS)


class ManInTheMiddle:
    """The coordinator in the place of all of a's peers, with keys of its own.

    Args:
        attempt: that a has advertised its keys for.
        mine: a's advert.
    """

    def __init__(self, attempt: Attempt, mine: AdvertiseKeys) -> None:
        self.attempt, self.victim = attempt, mine
        self.channels = {name: KeyPair.generate(os.urandom) for name in OTHERS}
        self.masks = {name: KeyPair.generate(os.urandom) for name in OTHERS}
        forged = (
            AdvertiseKeys(
                name, self.channels[name].public, self.masks[name].public, bytes(32), bytes(64)
            )
            for name in OTHERS
        )
        self.roster = Roster((mine, *forged))
        tau0 = transcript.round_transcript(attempt.descriptor)
        self.tau1 = transcript.roster_transcript(tau0, self.roster.adverts)

    def dealt(self, sent: ShareKeys) -> Dealt:
        """a's dealing among dealings of the coordinator's making, which all open."""
        own = Dealing(A, sent.commitments, sent.boxes_digest(), None, sent.signature)
        return Dealt((own, *(self._dealing(name, sent) for name in OTHERS)))

    def _dealing(self, name: SiloId, sent: ShareKeys) -> Dealing:
        private, seed = self.masks[name].private, Secret(bytes(32))
        shares = deal(name, private, seed, ALL, threshold=3, entropy=os.urandom)
        commitments = type(sent.commitments)(
            shares[holder].commitment(holder, self.tau1) for holder in ALL
        )
        sealed = seal_shares(shares[A], self.channels[name], A, self.victim.channel_key, self.tau1)
        return Dealing(name, commitments, bytes(32), sealed, bytes(64))

    def self_seed(self, sent: ShareKeys) -> Secret:
        """a's self seed, from the boxes that it sealed for its peers."""
        found = {}
        for box in sent.boxes:
            channel = self.channels[box.recipient]
            opened = open_for(sent, box.recipient, channel, self.victim.channel_key, self.tau1)
            found[box.recipient] = opened.self_seed
        return rebuild(A, found, ALL, 3)

    def masks_of(self, seed: Secret) -> list[Any]:
        """What takes a's masks off: a pair's two ends carry one mask with opposite signs."""
        prg, key = self.attempt.evil.session.mask_prg, self.victim.mask_key
        pairs = [pair_mask(self.masks[n], n, A, key, self.tau1, prg) for n in OTHERS]
        return [self_mask(seed, A, self.tau1, prg).inverse(), *pairs]


def open_for(
    sent: ShareKeys, holder: SiloId, channel: KeyPair, dealer_key: bytes, tau1: bytes
) -> HeldShares:
    """What a dealer sealed for a holder, for who has the holder's channel key."""
    commitment = sent.commitments.of[holder]
    return open_shares(
        next(box.sealed for box in sent.boxes if box.recipient == holder),
        Commitment(holder, commitment.mask_key, commitment.self_seed),
        channel=channel,
        dealer=sent.sender,
        dealer_key=dealer_key,
        tau1=tau1,
    )


@attack(
    threat="swapped-keys",
    reason="advertise-keys-signature",
    weakening=replaced("secagg.masking.client:verify", nothing),
)
def swapped_keys(scene: Scene) -> bool:
    """The coordinator puts its own keys in the place of everybody else's, and reads a's update."""
    with EvilCoordinator(scene) as evil:
        evil.start("a")
        attempt = Attempt(evil)
        evil.await_ready(A)
        impostor = ManInTheMiddle(attempt, attempt.tell(A, attempt.descriptor))
        sent = attempt.tell(A, impostor.roster)
        seed = impostor.self_seed(sent)
        attempt.tell(A, impostor.dealt(sent))
        masks = impostor.masks_of(seed)
        return evil.reads(attempt.strip(attempt.uploads[A], masks), A)


@attack(threat="duplicated-key", reason="roster-keys", weakening=without("roster-keys"))
def duplicated_key(scene: Scene) -> bool:
    """b and d are clones, and draw one mask key. b's vector is not taken, its key is rebuilt, and
    with it d, which is in the sum, is read.
    """
    with EvilCoordinator(scene) as evil:
        drawn = os.urandom(32)
        for name in ALL:
            evil.start_one(name, draws=[None, drawn] if name in (B, D) else [])
        attempt = Attempt(evil).to_masked(silent=[B])
        attempt.open(A, C, D)
        return evil.reads(attempt.read(D, attempt.secret(D, SEED), attempt.secret(B, KEY)), D)


@attack(
    threat="own-advert-altered",
    reason="roster-own-advert",
    weakening=without("roster-own-advert", "advertise-keys-signature"),
)
def altered_advert(scene: Scene) -> bool:
    """The coordinator's channel key stands in a's advert: it opens b's shares that are a's to hold,
    and they are what b committed to.
    """
    with EvilCoordinator(scene, colluders="cd") as evil:
        evil.start()
        attempt, key = Attempt(evil), KeyPair.generate(os.urandom)
        attempt.advertise()
        attempt.adverts[A] = replace(attempt.adverts[A], channel_key=key.public)
        attempt.share()
        dealer = attempt.adverts[B].channel_key
        held = open_for(attempt.dealings[B], A, key, dealer, attempt.tau1)
        committed = attempt.dealings[B].commitments.of[A].self_seed
        return share_commitment(held.reveal(SEED), A, attempt.tau1) == committed


@attack(threat="reflected-key", reason="roster-keys", weakening=without("roster-keys"))
def reflected_key(scene: Scene) -> bool:
    """d's channel key is a's own: a seals d's shares for itself. d then signs, and can be proven
    wrong by nobody, that a dealt badly.
    """
    with EvilCoordinator(scene, colluders="bcd") as evil:
        evil.start()
        attempt = Attempt(evil)
        attempt.advertise()
        readvertised(attempt, channel_key=attempt.adverts[A].channel_key)
        attempt.share()
        return A in attempt.tell(D, attempt.dealt(D)).bad_dealers


def readvertised(attempt: Attempt, **keys: bytes) -> None:
    """d signs an advert of these keys, which need not be any."""
    forged = replace(attempt.adverts[D])
    for name, key in keys.items():
        object.__setattr__(forged, name, key)
    tau0 = transcript.round_transcript(attempt.descriptor)
    identity = attempt.colluders[D].member.identity
    object.__setattr__(forged, "signature", identity.sign(SIGN_ADVERTISE_KEYS, tau0, forged.body()))
    attempt.adverts[D] = forged


@attack(
    threat="aliased-key",
    reason="public-key-encoding",
    weakening=replaced("secagg.masking.messages:parse_public_key", as_is),
)
def aliased_key(scene: Scene) -> bool:
    """d's mask key is b's with its top bit set: other bytes, the same key. a deals to both."""
    with EvilCoordinator(scene, colluders="bcd") as evil:
        evil.start()
        attempt, mine = Attempt(evil), KeyPair.generate(os.urandom)
        attempt.advertise()
        key = attempt.adverts[B].mask_key
        alias = key[:31] + bytes([key[31] | 0x80])
        readvertised(attempt, mask_key=alias)
        sent = attempt.tell(A, attempt.roster)
        return mine.agree(alias) == mine.agree(key) and D in sent.commitments.of


class Reused(Attempt):
    """An attempt in which a key that was rebuilt before is known.

    Args:
        known: the mask key of b.
        given: as for ``Attempt``.
    """

    def __init__(self, known: Secret, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        self._known = known

    def secret(self, owner: str, kind: Any, colluders: Iterable[SiloId] = ()) -> Secret:
        """What was rebuilt in this attempt, or before."""
        if (owner, kind) == (B, KEY):
            return self._known
        return super().secret(owner, kind, colluders)


@attack(
    threat="advert-replay",
    reason="advertise-keys-signature",
    weakening=without("advertise-keys-signature", "share-keys-signature"),
)
def replayed_advert(scene: Scene) -> bool:
    """b's mask key was rebuilt in an attempt that it fell out of. Its advert is shown again: all
    mask for a key that the coordinator has, and nobody reveals a share of it.
    """
    with EvilCoordinator(scene, make_session(max_attempts=2), colluders="d") as evil:
        evil.start()
        first = Attempt(evil).to_masked(silent=[B])
        first.open(A, C, D)
        evil.abort(A, C)
        second = Reused(first.secret(B, KEY), evil, number=2)
        second.advertise(without=[B])
        second.adverts = dict(sorted({**second.adverts, B: first.adverts[B]}.items()))
        own = [name for name in ALL if name != B]
        second.dealings = {name: second.tell(name, second.roster) for name in own}
        second.dealings = dict(sorted({**second.dealings, B: first.dealings[B]}.items()))
        second.mask(without=[B])
        total = second.open(A, C, D)
        return second.shares(B, KEY) == {} and evil.reads(total, A, C, D)


@attack(
    threat="dealing-replay",
    reason="share-keys-signature",
    weakening=without("share-keys-signature"),
)
def replayed_dealing(scene: Scene) -> bool:
    """b's shares of an earlier attempt are shown as this one's. They open to nobody, and a signs
    that b, which did all right, has dealt badly: the coordinator has a reason to leave it out.
    """
    with EvilCoordinator(scene, make_session(max_attempts=2), colluders="bcd") as evil:
        evil.start()
        first = Attempt(evil).to_masked()
        evil.abort(A)
        second = Attempt(evil, number=2)
        second.advertise()
        second.share()
        second.dealings[B] = first.dealings[B]
        return bool(second.tell(A, second.dealt(A)).bad_dealers == (B,))


def unopened(_real: Function) -> Function:
    """``masking.client.open_shares`` that holds whatever is in a box, whoever it is for."""

    def accept(sealed: bytes, _commitment: Any, *, dealer: SiloId, **_: Any) -> HeldShares:
        salt, share = Secret(sealed[:32]), Secret(bytes(1) + sealed[:32])
        return HeldShares(dealer, share, salt, share, salt)

    return accept


@attack(
    threat="misdelivered-box",
    reason="complained",
    weakening=replaced("secagg.masking.client:open_shares", unopened),
)
def misdelivered_box(scene: Scene) -> bool:
    """a is given the box that b sealed for c, and reveals what it finds there as its share of b's
    secret: it is convicted of lying.
    """
    with EvilCoordinator(scene, colluders="bcd") as evil:
        evil.start()
        attempt = Attempt(evil)
        attempt.advertise()
        attempt.share()
        sealed = attempt.box(B, C)
        swapped = tuple(
            replace(d, sealed=sealed) if d.dealer == B else d for d in attempt.dealt(A).dealings
        )
        told = {A: Dealt(swapped)}
        attempt.commits = {n: attempt.tell(n, told.get(n) or attempt.dealt(n)) for n in ALL}
        if attempt.commits[A].bad_dealers == (B,):
            raise scene.refuse("complained", A, "a says so, and holds nothing of b")
        attempt.unmask(*ALL)
        revealed = {s.owner: s for m in attempt.reveals if m.sender == A for s in m.shares}
        committed = attempt.dealings[B].commitments.of[A].self_seed
        return share_commitment(revealed[B], A, attempt.tau1) != committed


@attack(
    threat="split-dealers",
    reason="masked-input-signature",
    weakening=without("masked-input-signature"),
)
def split_dealers(scene: Scene) -> bool:
    """a masks for dealers without e, the others with e: they open a sum that is noise, but for e,
    which knows the mask that stays on.
    """
    with EvilCoordinator(scene, make_session("abcde"), colluders="de") as evil:
        evil.start()
        attempt = Attempt(evil)
        attempt.advertise()
        attempt.share()
        pair = attempt.colluders[E].state.mask_key
        for name in attempt.names:
            dealers = ALL if name == A else attempt.names
            attempt.commits[name] = attempt.tell(name, attempt.dealt(name, dealers))
        survivors = attempt.survivors(*attempt.names)
        signed = [attempt.tell(name, survivors) for name in "bc"]
        shown = Signatures((*signed, *(attempt.forge(name, survivors) for name in "de")))
        for name in "bc":
            attempt.tell(name, shown)
        total, key = attempt.total(attempt.names), attempt.adverts[A].mask_key
        mask = pair_mask(pair, E, A, key, attempt.tau1, evil.session.mask_prg)
        bare = attempt.strip(total, [mask.inverse()])
        return evil.reads(bare, *attempt.names) and not evil.reads(total, *attempt.names)


@attack(
    threat="few-dealers",
    reason="dealt-threshold",
    weakening=without(
        "dealt-threshold", "survivors-threshold", "survivors-floor", "consistency-threshold"
    ),
)
def few_dealers(scene: Scene) -> bool:
    """a and b mask for each other alone; with the shares that d holds, their sum opens where t is
    three.
    """
    with EvilCoordinator(scene, colluders="d") as evil:
        evil.start("a", "b")
        attempt = Attempt(evil)
        attempt.advertise(without=[C])
        attempt.share()
        attempt.tell(D, attempt.dealt(D))
        del attempt.dealings[D]
        attempt.mask()
        return evil.reads(attempt.open(A, B), A, B)


def public_agree(_real: Function) -> Function:
    """``KeyPair.agree`` as of keys whose private half is the public one."""

    def agree(pair: KeyPair, peer: bytes) -> Secret:
        low, high = sorted((pair.public, peer))
        return Secret(bytes(x ^ y for x, y in zip(low, high, strict=True)))

    return agree


@attack(
    threat="public-secret",
    reason="box-authentication",
    weakening=replaced("secagg.crypto.keys:KeyPair.agree", public_agree),
)
def public_secret(scene: Scene) -> bool:
    """The coordinator makes shared secrets of public keys: every box opens, and a is read."""
    with scene.alike(), EvilCoordinator(scene) as evil:
        evil.start()
        attempt = Attempt(evil).to_masked()
        keys = {name: advert.channel_key for name, advert in attempt.adverts.items()}
        nobody = KeyPair.from_private(Secret(bytes(32)))
        try:
            held = {
                holder: open_for(
                    attempt.dealings[A],
                    holder,
                    replace(nobody, public=keys[holder]),
                    keys[A],
                    attempt.tau1,
                )
                for holder in OTHERS
            }
        except MalformedMessage as error:
            raise scene.refuse(error.code, A, "its boxes do not open") from None
        seed = rebuild(A, {n: shares.self_seed for n, shares in held.items()}, ALL, 3)
        key = rebuild(A, {n: shares.mask_key for n, shares in held.items()}, ALL, 3)
        return evil.reads(attempt.read(A, seed, key), A)


def shared_by_one(real: Function) -> Function:
    """``masking.client.deal`` that forgets the threshold: each share is the secret."""

    def thin(*given: Any, threshold: int, entropy: Entropy) -> Any:
        return real(*given, threshold=1, entropy=entropy)

    return thin


@attack(
    threat="share-is-the-secret",
    reason="one-share-is-none",
    weakening=replaced("secagg.masking.client:deal", shared_by_one),
)
def share_that_is_the_secret(scene: Scene) -> bool:
    """The colluder takes its shares of a's secrets for the secrets, and reads a."""
    with EvilCoordinator(scene, colluders="d") as evil:
        evil.start()
        attempt = Attempt(evil).to_masked()
        held = attempt.colluders[D].state.held[A]
        seed, key = (Secret(share.reveal()[1:]) for share in (held.self_seed, held.mask_key))
        if evil.reads(attempt.read(A, seed, key), A):
            return True
        assert KeyPair.from_private(key).public != attempt.adverts[A].mask_key
        raise scene.refuse("one-share-is-none", A, "one share says nothing")
