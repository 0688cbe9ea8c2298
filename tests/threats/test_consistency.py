"""Phases 3 to 5: a coordinator that shows silos different sets, so that they open what none would.

With 2t > n + n_c two views alone can never give both secrets of one silo (that needs 2t reveals
from n − n_c honest silos and n_c that reveal twice; test_descriptor shows it where t is too small).
What a round without the consistency check still gives away is a sum over fewer than t silos:
``thin_sum`` mixes six views of four survivors into the sum of two honest silos.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from secagg.config import SiloId
from secagg.crypto.secret import Secret
from secagg.errors import MalformedMessage, OutOfOrder, PolicyRefused
from secagg.masking import client, messages
from secagg.masking.messages import Consistency, RevealedShare, ShareKind, Signatures, Unmasking
from secagg.masking.shares import HeldShares
from secagg.masking.unmask import rebuild
from secagg.simulation import Federation
from threat_model.attacks.sight import KEY, SEED

from .harness import (
    FIVE,
    FOUR,
    SIX,
    A,
    Attempt,
    B,
    C,
    D,
    E,
    F,
    nothing,
    refused,
    same,
    summed,
    weakened,
    without,
    without_differencing,
)

VIEWS: Mapping[SiloId, tuple[SiloId, ...]] = {
    A: (A, B, E, F),
    B: (A, B, D, F),
    C: (A, B, C, F),
    D: (A, B, D, F),
    E: (A, B, E, F),
}
"""n = 6, t = 4, F a colluder: C, D and E are each missing from at least three honest views."""

Choose = Callable[[SiloId, Mapping[SiloId, Consistency], Attempt], Signatures]


def thin_sum(choose: Choose) -> None:
    """Open the sum of A and B (and the colluder's own vector) where t is 4."""
    attempt = Attempt(Federation(SIX, threshold="1/2")).to_masked()
    assert attempt.descriptor.threshold == 4
    views = {name: attempt.survivors(*view) for name, view in VIEWS.items()}
    signed = {name: attempt.tell(name, view) for name, view in views.items()}
    for name in VIEWS:
        attempt.tell(name, choose(name, signed, attempt))
    total = attempt.total((A, B, F), colluders=(F,))
    read = total - attempt.vectors[F]
    assert same(read, summed([attempt.vectors[A], attempt.vectors[B]]))


def check_thin_sum(choose: Choose, code: str) -> None:
    with without(code):
        thin_sum(choose)
    with refused(code):
        thin_sum(choose)


def test_split_views_with_others_signatures() -> None:
    """Each silo is shown signatures of its survivors, over the survivors that those were shown."""

    def choose(name: SiloId, signed: Mapping[SiloId, Consistency], attempt: Attempt) -> Signatures:
        view = attempt.survivors(*VIEWS[name])
        others = {**signed, F: attempt.forge(F, view)}
        return Signatures(tuple(others[signer] for signer in VIEWS[name]))

    check_thin_sum(choose, "consistency-signature")


def test_split_views_with_copies_of_one_signature() -> None:
    """Each silo is shown t copies of its own signature."""

    def choose(name: SiloId, signed: Mapping[SiloId, Consistency], attempt: Attempt) -> Signatures:
        return Signatures((signed[name],) * attempt.descriptor.threshold)

    check_thin_sum(choose, "consistency-duplicate")


def test_split_views_with_too_few_signatures() -> None:
    """Each silo is shown its own signature and the colluder's: two, where t is 4."""

    def choose(name: SiloId, signed: Mapping[SiloId, Consistency], attempt: Attempt) -> Signatures:
        view = attempt.survivors(*VIEWS[name])
        return Signatures((signed[name], attempt.forge(F, view)))

    check_thin_sum(choose, "consistency-threshold")


def test_one_signature_short() -> None:
    """t − 1 signatures open nothing."""

    def attack() -> bool:
        attempt = Attempt(Federation(FOUR)).to_masked()
        survivors = attempt.survivors(*FOUR)
        signed = [attempt.tell(name, survivors) for name in FOUR]
        attempt.tell(A, Signatures(tuple(signed[: attempt.descriptor.threshold - 1])))
        return attempt.revealed

    with without("consistency-threshold"):
        assert attack()
    with refused("consistency-threshold"):
        attack()


def test_signer_who_is_no_survivor() -> None:
    """Colluders outside U3 would make up the number: one honest survivor signs alone."""

    def attack() -> bool:
        attempt = Attempt(Federation(FIVE)).to_masked()
        survivors = attempt.survivors(A, B, C, D)
        own = [attempt.tell(name, survivors) for name in (A, B, C)]
        attempt.tell(A, Signatures((*own, attempt.forge(E, survivors))))
        return attempt.revealed

    with without("consistency-signer"):
        assert attack()
    with refused("consistency-signer"):
        attack()


def test_signatures_of_another_attempt() -> None:
    """The same survivors signed an earlier attempt; their signatures are shown in this one."""

    def attack() -> bool:
        federation = Federation(FOUR)
        first = Attempt(federation).to_masked()
        signed = [first.tell(name, first.survivors(*FOUR)) for name in FOUR]
        second = Attempt(federation, number=2).to_masked()
        second.tell(A, second.survivors(*FOUR))
        second.tell(A, Signatures(tuple(signed)))
        return second.revealed

    with without("consistency-signature"):
        assert attack()
    with refused("consistency-signature"):
        attack()


def test_second_survivor_set_in_one_attempt() -> None:
    """All sign with A and again without A: both of A's secrets are rebuilt, and A is read."""

    def attack() -> None:
        attempt = Attempt(Federation(FOUR)).to_masked()
        ready = dict(attempt.states)
        states = []
        for view in (FOUR, (B, C, D)):
            attempt.states = dict(ready)
            survivors = attempt.survivors(*view)
            signed = Signatures(tuple(attempt.tell(name, survivors) for name in view))
            states.append((view, signed, attempt.states))
        for view, signed, after in states:
            attempt.states = after
            for name in view:
                attempt.tell(name, signed)
        read = attempt.read(A, attempt.secret(A, SEED), attempt.secret(A, KEY))
        assert same(read, attempt.vectors[A])

    with weakened(client._Once, "spend", nothing), without_differencing():
        attack()
    with refused("state-spent", OutOfOrder):
        attack()
    with weakened(client._Once, "spend", nothing), refused("differencing", PolicyRefused):
        attack()  # the ledger's record is the second line


def test_two_silos_shown_different_dealers() -> None:
    """A masks for U2 without E, the others with E: they would sign commits that do not add up."""

    def attack() -> Consistency:
        attempt = Attempt(Federation(FIVE))
        attempt.advertise()
        attempt.share()
        for name in FIVE:
            dealers = FOUR if name == A else FIVE
            attempt.commits[name] = attempt.tell(name, attempt.dealt(name, dealers))
        signed: Consistency = attempt.tell(B, attempt.survivors(*FIVE))
        return signed

    with without("masked-input-signature"):
        assert attack().sender == B
    with refused("masked-input-signature"):
        attack()


def test_dealers_below_the_threshold() -> None:
    """A is shown a U2 of itself and two others: its masks would be known to fewer than t."""

    def attack() -> client.MaskedInput:
        attempt = Attempt(Federation(FIVE))
        attempt.advertise()
        attempt.share()
        commit: client.MaskedInput = attempt.tell(A, attempt.dealt(A, (A, B, C)))
        return commit

    with without("dealt-threshold"):
        assert attack().sender == A
    with refused("dealt-threshold"):
        attack()


def test_own_dealing_altered() -> None:
    """A's shares are left out of U2: nobody could take A's self mask off, or they are not A's."""

    def attack() -> client.MaskedInput:
        attempt = Attempt(Federation(FIVE))
        attempt.advertise()
        attempt.share()
        commit: client.MaskedInput = attempt.tell(A, attempt.dealt(A, (B, C, D, E)))
        return commit

    with without("dealt-own"):
        assert attack().sender == A
    with refused("dealt-own"):
        attack()


def test_survivors_below_the_threshold() -> None:
    """U3 is A and a colluder: the sum less the colluder's vector is A's."""

    def attack() -> None:
        attempt = Attempt(Federation(FOUR)).to_masked()
        survivors = attempt.survivors(A, D)
        signed = {name: attempt.tell(name, survivors) for name in (A, B, C)}
        for name in (A, B, C):
            attempt.tell(name, Signatures((signed[A], attempt.forge(D, survivors))))
        total = attempt.total((A, D), colluders=(D,))
        assert same(total - attempt.vectors[D], attempt.vectors[A])

    layers = ("survivors-threshold", "survivors-floor", "survivors-own", "consistency-threshold")
    with without(*layers):
        attack()
    for code in layers[:2]:  # A itself sees too few survivors
        with without(*set(layers) - {code}), refused(code):
            attack()
    with without(*layers[:2]), refused("survivors-own"):  # B is asked to open a sum without it
        attack()
    with without(*layers[:3]), refused("consistency-threshold"):
        attack()


def test_own_commit_replaced() -> None:
    """A is asked to open a sum in which another vector stands under its name."""

    def attack() -> Consistency:
        attempt = Attempt(Federation(FOUR)).to_masked()
        commit = attempt.commits[A]
        attempt.commits[A] = messages.MaskedInput(A, bytes(32), (), commit.signature)
        signed: Consistency = attempt.tell(A, attempt.survivors(*FOUR))
        return signed

    with without("survivors-own", "masked-input-signature"):
        assert attack().sender == A
    with refused("survivors-own"):
        attack()


def test_aggregator_that_rebuilds_every_key() -> None:
    """Were all shares revealed, A would be read; here t good shares give one kind, ever."""
    real = HeldShares.reveal
    leaked: list[Secret] = []

    def both(held: HeldShares, kind: ShareKind) -> RevealedShare:
        if held.owner == A:
            leaked.append(held.mask_key)
        return real(held, kind)

    attempt = Attempt(Federation(FOUR)).to_masked()
    with weakened(HeldShares, "reveal", both):
        attempt.open(*FOUR)
    key = rebuild(A, dict(zip(FOUR, leaked, strict=True)), FOUR, attempt.descriptor.threshold)
    assert same(attempt.read(A, attempt.secret(A, SEED), key), attempt.vectors[A])
    attempt = Attempt(Federation(FOUR)).to_masked(silent=(D,))
    attempt.open(A, B, C)
    for owner, kind, other in ((A, SEED, KEY), (B, SEED, KEY), (C, SEED, KEY), (D, KEY, SEED)):
        assert len(attempt.shares(owner, kind)) >= attempt.descriptor.threshold
        assert attempt.shares(owner, other) == {}


def test_both_shares_in_one_reveal() -> None:
    """No message can spell both shares of one owner."""
    attempt = Attempt(Federation(FOUR)).to_masked()
    held = attempt.states[B].held[A]
    pair = (held.reveal(SEED), held.reveal(KEY))
    with weakened(messages, "_check_order", nothing):
        assert Unmasking(B, pair, bytes(64)).shares == pair
    with refused("message-order", MalformedMessage):
        Unmasking(B, pair, bytes(64))


def test_orphans_give_only_mask_keys() -> None:
    """The coordinator cannot ask for a survivor's mask key: the lists follow from τ2 and τ3."""
    real = client.reveal_shares

    def obedient(state: client.ConsistentSurvivors, recorded: object) -> object:
        """A client that lets the coordinator say who fell out: here, A."""
        fewer = client.ConsistentSurvivors(
            state.attempt,
            state.tau3,
            state.dealers,
            tuple(name for name in state.survivors if name != A),
            state.seeds,
            state.held,
            state.entry,
        )
        return real(fewer, recorded)  # type: ignore[arg-type]

    def attack() -> Attempt:
        attempt = Attempt(Federation(FOUR)).to_masked()
        survivors = attempt.survivors(*FOUR)
        signed = Signatures(tuple(attempt.tell(name, survivors) for name in FOUR))
        for name in FOUR:
            attempt.tell(name, signed)
        return attempt

    with weakened(client, "reveal_shares", obedient):
        attempt = attack()
        assert len(attempt.shares(A, KEY)) >= attempt.descriptor.threshold
    attempt = attack()
    assert attempt.shares(A, KEY) == {}
    assert len(attempt.shares(A, SEED)) == 4


def test_signatures_again_after_a_refusal() -> None:
    """A refusal ends the attempt for a silo: also the right list, sent after it, opens nothing."""

    def attack() -> bool:
        attempt = Attempt(Federation(FOUR)).to_masked()
        survivors = attempt.survivors(*FOUR)
        signed = Signatures(tuple(attempt.tell(name, survivors) for name in FOUR))
        with refused("consistency-threshold"):
            attempt.tell(A, Signatures(()))
        attempt.tell(A, signed)
        return attempt.revealed

    with weakened(client._Once, "spend", nothing):
        assert attack()
    with refused("state-spent", OutOfOrder):
        attack()
