"""A client's attempt: one frozen state a phase, one function a step, every check first.

    admit → advertise_keys → share_keys → mask_input → check_survivors
          → check_consistency → reveal_shares → (check_result)

Where nothing is masked (protection ``ckks``), nothing is shared and nothing revealed:

    admit → advertise_keys → seal_input → check_survivors → (check_result)

A state is spent by the step that takes it, also when the step refuses: a client that saw a reason
to refuse stays silent for the rest of the attempt, and a shell that retries re-sends stored
messages instead of computing them again. All secrets of an attempt live in its states and nowhere
else.

What each step guards against is said beside its check. Source: Bonawitz et al. 2017 (ePrint
2017/281), Fig. 4, malicious variant; hardened as the design's threat model asks.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Final, NoReturn, TypeAlias, TypeVar

from secagg.config import Policy, SessionConfig, SiloId
from secagg.crypto.digest import vector_digest
from secagg.crypto.keys import KeyPair
from secagg.crypto.labels import (
    SELF_SEED,
    SIGN_ADVERTISE_KEYS,
    SIGN_CONSISTENCY,
    SIGN_DESCRIPTOR,
    SIGN_MASKED_INPUT,
    SIGN_RESULT,
    SIGN_SHARE_KEYS,
    SIGN_UNMASKING,
    digest,
)
from secagg.crypto.secret import Entropy, Secret
from secagg.crypto.sign import SIGNATURE_BYTES, IdentityKey, verify
from secagg.errors import FaultyServer, MalformedMessage, OutOfOrder, PolicyRefused
from secagg.masking import transcript
from secagg.masking.graph import holders, neighbours
from secagg.masking.ledger import (
    Joined,
    Ledger,
    Recorded,
    Revealed,
    check_differencing,
    check_update,
)
from secagg.masking.manifest import Manifest
from secagg.masking.masks import pair_mask, self_mask
from secagg.masking.messages import (
    AdvertiseKeys,
    Box,
    Commitment,
    Commitments,
    Consistency,
    Dealing,
    Dealt,
    Descriptor,
    MaskedInput,
    Result,
    Roster,
    ShareKeys,
    ShareKind,
    Signatures,
    Survivors,
    Unmasking,
)
from secagg.masking.shares import HeldShares, deal, open_shares, seal_shares
from secagg.ring.expand import Encoded, Mask
from secagg.ring.vectors import Ring, Vector, ring_of
from secagg.suite import KeyName

M = TypeVar("M", AdvertiseKeys, ShareKeys, MaskedInput, Consistency, Unmasking)
_UNSIGNED: Final = bytes(SIGNATURE_BYTES)


@dataclass(frozen=True, slots=True)
class Member:
    """Who this client is, for as long as its session lasts.

    Args:
        name: its name in the manifest.
        identity: its signing key.
        manifest: the newest verified membership.
        policy: its own floors.
        session: the configuration, already checked against the policy at joining.
        session_id: which session of that name, as the coordinator named it.
    """

    name: SiloId
    identity: IdentityKey
    manifest: Manifest
    policy: Policy
    session: SessionConfig
    session_id: bytes


@dataclass(frozen=True, slots=True)
class Expected:
    """Where this client stands: it takes part in nothing else.

    Args:
        task: the task it has an update for.
        round: the session's round.
        base: what the round starts from, over all tasks' results; part of every key.
        position: which result of this task the update is for, whatever other tasks release
            meanwhile (``transcript.position_of``): what the ledger remembers reveals by. Empty
            where the session has one task: then it is the base.
        update: keyed digest of the update, so that one position never opens two of them; empty
            where the caller cannot hold two.
        key: what the update is sealed under, where the session seals; the newest that this silo
            holds, and fit for use.
    """

    task: str
    round: int
    base: bytes
    position: bytes = b""
    update: bytes = b""
    key: KeyName | None = None


@dataclass(slots=True)
class _Once:
    """Lets a state be used by one step."""

    token: list[None] = field(default_factory=lambda: [None])

    def spend(self) -> None:
        try:
            self.token.pop()  # atomic: two threads cannot both have it
        except IndexError:
            raise OutOfOrder(  # CHECK: state-spent
                "state-spent", "A protocol state was used twice.", "Re-send instead."
            ) from None


@dataclass(frozen=True, slots=True)
class _Attempt:
    """What all states of one attempt have in common."""

    member: Member
    descriptor: Descriptor
    tau0: bytes
    expected: Expected

    @property
    def position(self) -> bytes:
        return self.expected.position or self.expected.base

    @property
    def me(self) -> SiloId:
        return self.member.name

    @property
    def ring(self) -> Ring:
        return ring_of(self.member.session, self.descriptor.task)

    def sign(self, kind: str, tau: bytes, unsigned: M) -> M:
        """Return a message, made with an empty signature, with this silo's."""
        signature = self.member.identity.sign(kind, tau, unsigned.body())
        return replace(unsigned, signature=signature)

    def verify(self, kind: str, tau: bytes, sender: SiloId, body: bytes, signature: bytes) -> None:
        try:
            # CHECK: peer-signature
            verify(self.member.manifest.silos[sender], kind, tau, body, signature)
        except MalformedMessage:
            _refuse(f"{kind}-signature", f"The {kind} message of {sender} is not signed by it.")


def _refuse(code: str, observed: str) -> NoReturn:
    raise FaultyServer(code, observed, "This silo stays silent for the rest of the attempt.")


@dataclass(frozen=True, slots=True)
class Admitted:
    """The descriptor is acceptable. ``entry`` goes to the ledger before any key is sent."""

    attempt: _Attempt
    entry: Joined
    _once: _Once = field(default_factory=_Once, repr=False)


def admit(descriptor: Descriptor, member: Member, expected: Expected, ledger: Ledger) -> Admitted:
    """Check a descriptor against this silo's manifest, policy, base and memory.

    Raises:
        FaultyServer: wrong signature, session, manifest, round, base, cohort or threshold.
        PolicyRefused: below the silo's own floors, or a second session of this name.
    """
    _check_origin(descriptor, member)
    _check_place(descriptor, member, expected, ledger)
    _check_cohort(descriptor, member)
    tau0 = transcript.round_transcript(descriptor)
    entry = Joined(
        member.session.name,
        member.session_id,
        descriptor.round,
        descriptor.attempt,
        descriptor.base,
        tau0,
        expected.position or expected.base,
        expected.update,
    )
    return Admitted(_Attempt(member, descriptor, tau0, expected), entry)


def _check_origin(descriptor: Descriptor, member: Member) -> None:
    key = member.manifest.coordinator
    tau0 = transcript.round_transcript(descriptor)
    if key is None:  # CHECK: descriptor-coordinator
        _refuse("descriptor-coordinator", "The manifest names no coordinator.")
    try:
        verify(key, SIGN_DESCRIPTOR, tau0, b"", descriptor.signature)  # CHECK: descriptor-signature
    except MalformedMessage:
        _refuse("descriptor-signature", "The round is not signed by the consortium's coordinator.")
    manifest = (member.manifest.version, member.manifest.digest())
    # CHECK: descriptor-manifest
    if (descriptor.manifest_version, descriptor.manifest_digest) != manifest:
        _refuse("descriptor-manifest", "The round uses another manifest than this silo holds.")


def _check_place(
    descriptor: Descriptor, member: Member, expected: Expected, ledger: Ledger
) -> None:
    if member.session.consortium != member.manifest.consortium:  # CHECK: descriptor-consortium
        _refuse("descriptor-session", "The session is of another consortium.")
    if descriptor.session_id != member.session_id:  # CHECK: descriptor-session-id
        _refuse("descriptor-session", "The round belongs to another session.")
    # CHECK: descriptor-session-hash
    if descriptor.session_hash != transcript.session_hash(member.session):
        _refuse("descriptor-session", "The round's session has other parameters than agreed.")
    # CHECK: descriptor-round
    if descriptor.task != expected.task or descriptor.round != expected.round:
        _refuse("descriptor-round", "The round is not the one that this silo is ready for.")
    if descriptor.base != expected.base:  # CHECK: descriptor-base
        _refuse("descriptor-base", "The round starts from another model or task than this silo's.")
    if (  # CHECK: descriptor-key
        descriptor.key != expected.key
        or (descriptor.key is None) == member.session.protection.seals
    ):
        _refuse("descriptor-key", "The round uses another key than this silo's newest one.")
    # CHECK: descriptor-replay
    if (descriptor.round, descriptor.attempt) <= ledger.last_attempt(member.session_id):
        _refuse("descriptor-replay", "The attempt is not newer than one already joined.")
    # CHECK: descriptor-session-name
    check_session_name(member.session.name, member.session_id, member.policy, ledger)


def check_session_name(name: str, session_id: bytes, policy: Policy, ledger: Ledger) -> None:
    """Return if this silo may take part in this session of a name.

    Raises:
        PolicyRefused: it took part in another one, and its operator does not consent to a second.
    """
    # CHECK: session-name-repeat
    if ledger.session_ids(name) - {session_id} and name not in policy.repeat_sessions:
        raise PolicyRefused(
            "policy-session-name",
            f"This silo already took part in another session named {name}.",
            "If that is meant, its operator adds the name to repeat_sessions in policy.toml.",
        )


def _check_cohort(descriptor: Descriptor, member: Member) -> None:
    cohort, session = descriptor.cohort, member.session
    # CHECK: cohort-members
    if not set(cohort) <= (member.manifest.silos.keys() & set(session.silos)):
        _refuse("descriptor-cohort", "The cohort has somebody who is no member of the session.")
    if member.name not in cohort:  # CHECK: cohort-self
        _refuse("descriptor-cohort", "The cohort is without this silo.")
    member.policy.check_session(session)  # CHECK: cohort-policy-session
    member.policy.check_cohort(len(cohort), descriptor.threshold)  # CHECK: cohort-policy
    if len(cohort) < session.min_cohort:  # CHECK: cohort-floor
        _refuse("descriptor-cohort", f"A cohort of {len(cohort)} is below the session's floor.")
    if descriptor.threshold != session.threshold_for(len(cohort)):  # CHECK: cohort-threshold
        _refuse("descriptor-threshold", "The threshold is not the session's for this cohort.")


@dataclass(frozen=True, slots=True)
class KeysAdvertised:
    """After phase 1: fresh secrets of this attempt."""

    attempt: _Attempt
    channel: KeyPair
    mask_key: KeyPair
    self_seed: Secret
    advert: AdvertiseKeys
    _once: _Once = field(default_factory=_Once, repr=False)


def advertise_keys(
    state: Admitted, recorded: Recorded[Joined], *, entropy: Entropy
) -> tuple[KeysAdvertised, AdvertiseKeys]:
    """Phase 1: draw this attempt's keys and sign their public halves over τ0.

    Args:
        state: from ``admit``.
        recorded: evidence that its entry is durable, so no restart can join this attempt again.
        entropy: source of the keys.
    """
    state._once.spend()
    if recorded.entry != state.entry:  # CHECK: joined-recorded
        raise OutOfOrder("ledger-entry", "Another attempt was recorded than is being joined.")
    attempt = state.attempt
    channel, mask_key = KeyPair.generate(entropy), KeyPair.generate(entropy)
    self_seed = Secret(entropy(32))
    unsigned = AdvertiseKeys(
        attempt.me,
        channel.public,
        mask_key.public,
        digest(SELF_SEED, self_seed.reveal()),
        _UNSIGNED,
    )
    advert = attempt.sign(SIGN_ADVERTISE_KEYS, attempt.tau0, unsigned)
    return KeysAdvertised(attempt, channel, mask_key, self_seed, advert), advert


@dataclass(frozen=True, slots=True)
class KeysShared:
    """After phase 2: the roster is fixed, the secrets are shared."""

    attempt: _Attempt
    tau1: bytes
    adverts: Mapping[SiloId, AdvertiseKeys]
    channel: KeyPair
    mask_key: KeyPair
    self_seed: Secret
    own: HeldShares
    sent: ShareKeys
    _once: _Once = field(default_factory=_Once, repr=False)


def share_keys(
    state: KeysAdvertised, roster: Roster, *, entropy: Entropy
) -> tuple[KeysShared, ShareKeys]:
    """Phase 2: check everybody's keys, then share both secrets among the holders.

    Raises:
        FaultyServer: fewer than t adverts, own advert altered, somebody outside the cohort, a bad
            signature, or a key that stands twice.
    """
    state._once.spend()
    attempt = state.attempt
    adverts = _check_roster(state, roster)
    tau1 = transcript.roster_transcript(attempt.tau0, roster.adverts)
    mine = holders(tuple(adverts), attempt.me)
    shares = deal(
        attempt.me,
        state.mask_key.private,
        state.self_seed,
        mine,
        threshold=attempt.descriptor.threshold,
        entropy=entropy,
    )
    boxes = _seal_boxes(state, adverts, shares, tau1)
    commitments = Commitments(shares[holder].commitment(holder, tau1) for holder in mine)
    unsigned = ShareKeys(attempt.me, commitments, boxes, _UNSIGNED)
    sent = attempt.sign(SIGN_SHARE_KEYS, tau1, unsigned)
    shared = KeysShared(
        attempt,
        tau1,
        adverts,
        state.channel,
        state.mask_key,
        state.self_seed,
        shares[attempt.me],
        sent,
    )
    return shared, sent


def _check_roster(state: KeysAdvertised, roster: Roster) -> dict[SiloId, AdvertiseKeys]:
    attempt = state.attempt
    adverts = {advert.sender: advert for advert in roster.adverts}
    if not adverts.keys() <= set(attempt.descriptor.cohort):  # CHECK: roster-cohort
        _refuse("roster-cohort", "The roster has somebody who is not in the cohort.")
    if len(adverts) < attempt.descriptor.threshold:  # CHECK: roster-threshold
        _refuse("roster-threshold", "The roster has fewer silos than the threshold.")
    if adverts.get(attempt.me) != state.advert:  # CHECK: roster-own-advert
        _refuse("roster-own-advert", "The roster does not carry this silo's advert as it was sent.")
    for sender, advert in adverts.items():
        # CHECK: roster-signatures
        attempt.verify(SIGN_ADVERTISE_KEYS, attempt.tau0, sender, advert.body(), advert.signature)
    keys = [key for advert in adverts.values() for key in (advert.channel_key, advert.mask_key)]
    if len(set(keys)) != len(keys):  # CHECK: roster-distinct-keys
        _refuse("roster-keys", "A public key stands twice in the roster.")
    return adverts


def _seal_boxes(
    state: KeysAdvertised,
    adverts: Mapping[SiloId, AdvertiseKeys],
    shares: Mapping[SiloId, HeldShares],
    tau1: bytes,
) -> tuple[Box, ...]:
    try:
        return tuple(
            Box(
                peer,
                seal_shares(shares[peer], state.channel, peer, adverts[peer].channel_key, tau1),
            )
            for peer in neighbours(tuple(adverts), state.attempt.me)
        )
    except MalformedMessage:
        # CHECK: roster-channel-low-order
        _refuse("roster-keys", "A channel key in the roster is a low-order point.")


@dataclass(frozen=True, slots=True)
class InputMasked:
    """After phase 3: the vector is masked; the secrets that masked it are gone from the state.

    ``dealers`` are U2: who may survive. Where nothing is masked they are U1, and τ2 is τ1.
    """

    attempt: _Attempt
    tau2: bytes
    dealers: tuple[SiloId, ...]
    held: Mapping[SiloId, HeldShares]
    commit: MaskedInput
    _once: _Once = field(default_factory=_Once, repr=False)


def seal_input(
    state: KeysAdvertised, roster: Roster, vector: Vector, seed: bytes
) -> tuple[InputMasked, MaskedInput]:
    """Phase 3 where nothing is masked: check everybody's adverts, then commit to a sealed vector.

    Args:
        state: from ``advertise_keys``.
        roster: what the coordinator relayed of U1's adverts.
        vector: a sealed update.
        seed: of its c1.

    Raises:
        OutOfOrder: the session masks, or there is no seed.
        FaultyServer: as ``share_keys``.
    """
    state._once.spend()
    attempt = state.attempt
    if attempt.member.session.protection.masks:  # CHECK: unmasked-upload
        raise OutOfOrder("mask-missing", "A vector of this session is masked before it is sent.")
    _check_sealed(attempt, seed)
    adverts = _check_roster(state, roster)
    tau1 = transcript.roster_transcript(attempt.tau0, roster.adverts)
    commit = _commit(attempt, tau1, vector, (), seed)
    return InputMasked(attempt, tau1, tuple(adverts), {}, commit), commit


def mask_input(
    state: KeysShared, dealt: Dealt, encoded: Encoded, seed: bytes = b""
) -> tuple[InputMasked, MaskedInput, Vector]:
    """Phase 3: check the dealings, then have the update made with the masks on, and commit to it.

    Args:
        state: from ``share_keys``.
        dealt: what the coordinator relayed of U2's dealings.
        encoded: the update in the task's ring; called once, when all checks have passed.
        seed: of c1, where the vector is a sealed one.

    Returns:
        The next state, the commitment, and the masked vector to upload.

    Raises:
        OutOfOrder: a seed is missing, or has no place in this session.
        FaultyServer: U2 is not within U1, below t or without this silo; own dealing altered; a
            dealer's signature or commitment list is not right.
    """
    state._once.spend()
    attempt = state.attempt
    _check_sealed(attempt, seed)
    dealings = _check_dealings(state, dealt)
    held, bad = _open_boxes(state, dealings)
    tau2 = transcript.dealt_transcript(
        state.tau1, {dealing.dealer: dealing.body() for dealing in dealings}
    )
    dealers = tuple(dealing.dealer for dealing in dealings)
    vector = encoded(_masks(state, dealers), attempt.member.session.mask_prg)
    commit = _commit(attempt, tau2, vector, bad, seed)
    return InputMasked(attempt, tau2, dealers, held, commit), commit, vector


def _check_sealed(attempt: _Attempt, seed: bytes) -> None:
    if bool(seed) != attempt.member.session.protection.seals:  # CHECK: sealed-upload
        raise OutOfOrder("seal-missing", "A vector is sealed where its session seals, and there.")


def _commit(
    attempt: _Attempt, tau2: bytes, vector: Vector, bad: tuple[SiloId, ...], seed: bytes
) -> MaskedInput:
    words = vector_digest(attempt.ring.pack(vector), attempt.member.session.chunk_bytes)
    unsigned = MaskedInput(attempt.me, words, bad, _UNSIGNED, seed)
    return attempt.sign(SIGN_MASKED_INPUT, tau2, unsigned)


def _check_dealings(state: KeysShared, dealt: Dealt) -> tuple[Dealing, ...]:
    attempt, dealings = state.attempt, dealt.dealings
    dealers = {dealing.dealer: dealing for dealing in dealings}
    if not dealers.keys() <= state.adverts.keys():  # CHECK: dealt-roster
        _refuse("dealt-roster", "Shares come from somebody who is not in the roster.")
    if len(dealers) < attempt.descriptor.threshold:  # CHECK: dealt-threshold
        _refuse("dealt-threshold", "Fewer silos shared their keys than the threshold.")
    own = dealers.get(attempt.me)
    if own is None or own.body() != state.sent.body():  # CHECK: dealt-own
        _refuse("dealt-own", "This silo's own shares are not relayed as they were sent.")
    for dealing in dealings:
        attempt.verify(  # CHECK: dealt-signatures
            SIGN_SHARE_KEYS, state.tau1, dealing.dealer, dealing.body(), dealing.signature
        )
        listed = tuple(dealing.commitments.of)
        if listed != holders(tuple(state.adverts), dealing.dealer):  # CHECK: dealt-commitments
            _refuse("dealt-commitments", f"{dealing.dealer} did not commit to every share.")
    return dealings


def _open_boxes(
    state: KeysShared, dealings: Iterable[Dealing]
) -> tuple[dict[SiloId, HeldShares], tuple[SiloId, ...]]:
    me = state.attempt.me
    held = {me: state.own}
    bad = []
    for dealing in dealings:
        if dealing.dealer == me:
            continue
        try:
            held[dealing.dealer] = _open_box(state, dealing)
        except MalformedMessage:  # the dealer or the coordinator; the commit names the dealer
            bad.append(dealing.dealer)
    return held, tuple(bad)


def _open_box(state: KeysShared, dealing: Dealing) -> HeldShares:
    me = state.attempt.me
    commitment = dealing.commitments.of[me]
    return open_shares(
        dealing.sealed or b"",
        Commitment(me, commitment.mask_key, commitment.self_seed),
        channel=state.channel,
        dealer=dealing.dealer,
        dealer_key=state.adverts[dealing.dealer].channel_key,
        tau1=state.tau1,
    )


def _masks(state: KeysShared, dealers: tuple[SiloId, ...]) -> list[Mask]:
    attempt = state.attempt
    prg = attempt.member.session.mask_prg
    try:
        pairs = [
            pair_mask(
                state.mask_key, attempt.me, peer, state.adverts[peer].mask_key, state.tau1, prg
            )
            for peer in neighbours(dealers, attempt.me)
        ]
    except MalformedMessage:
        # CHECK: roster-mask-low-order
        _refuse("roster-keys", "A mask key in the roster is a low-order point.")
    return [self_mask(state.self_seed, attempt.me, state.tau1, prg), *pairs]


@dataclass(frozen=True, slots=True)
class SurvivorsSigned:
    """After phase 4: the one survivor set that this client signs in this attempt."""

    attempt: _Attempt
    tau3: bytes
    dealers: tuple[SiloId, ...]
    survivors: tuple[SiloId, ...]
    seeds: tuple[bytes, ...]
    held: Mapping[SiloId, HeldShares]
    _once: _Once = field(default_factory=_Once, repr=False)


def check_survivors(
    state: InputMasked, survivors: Survivors, ledger: Ledger
) -> tuple[SurvivorsSigned, Consistency]:
    """Phase 4: check who is in the sum, and sign it.

    Raises:
        FaultyServer: U3 is not within U2, below t or the floor, without this silo's own commit, or
            holds a commit that its silo did not sign.
        PolicyRefused: a sum over these survivors would difference one already opened on this base.
    """
    state._once.spend()
    attempt = state.attempt
    names = _check_commits(state, survivors)
    past = ledger.revealed(attempt.position)
    check_differencing(past, names)  # CHECK: survivors-differencing
    check_update(past.update if past else None, attempt.expected.update)  # CHECK: survivors-update
    seeds = _check_seeds(attempt, survivors)
    tau3 = transcript.survivors_transcript(state.tau2, survivors.commits)
    signed = attempt.sign(SIGN_CONSISTENCY, tau3, Consistency(attempt.me, _UNSIGNED))
    return SurvivorsSigned(attempt, tau3, state.dealers, names, seeds, state.held), signed


def _check_seeds(attempt: _Attempt, survivors: Survivors) -> tuple[bytes, ...]:
    """Return the seeds of c1: two updates under one would show their difference."""
    seeds = tuple(commit.seed for commit in survivors.commits if commit.seed)
    # CHECK: survivors-seeds
    if len(seeds) != (len(survivors.commits) if attempt.member.session.protection.seals else 0):
        _refuse("survivors-seeds", "A commit has no seed, or one that has no place there.")
    if len(set(seeds)) != len(seeds):  # CHECK: survivors-distinct-seeds
        _refuse("survivors-seeds", "A seed stands twice among the survivors' commits.")
    return seeds


def _check_commits(state: InputMasked, survivors: Survivors) -> tuple[SiloId, ...]:
    attempt = state.attempt
    commits = {commit.sender: commit for commit in survivors.commits}
    member = attempt.member
    if not commits.keys() <= set(state.dealers):  # CHECK: survivors-dealt
        _refuse("survivors-dealt", "A survivor did not share its keys.")
    if len(commits) < attempt.descriptor.threshold:  # CHECK: survivors-threshold
        _refuse("survivors-threshold", "There are fewer survivors than the threshold.")
    # CHECK: survivors-floor
    if len(commits) < max(member.policy.min_cohort, member.session.min_cohort):
        _refuse("survivors-floor", "There are fewer survivors than the floor.")
    if commits.get(attempt.me) != state.commit:  # CHECK: survivors-own
        _refuse("survivors-own", "This silo's own commit is not among the survivors'.")
    for sender, commit in commits.items():
        # CHECK: survivors-signatures
        attempt.verify(SIGN_MASKED_INPUT, state.tau2, sender, commit.body(), commit.signature)
    return tuple(commits)


@dataclass(frozen=True, slots=True)
class ConsistentSurvivors:
    """Evidence that t silos signed this τ3: what a reveal demands. ``entry`` is recorded first."""

    attempt: _Attempt
    tau3: bytes
    dealers: tuple[SiloId, ...]
    survivors: tuple[SiloId, ...]
    seeds: tuple[bytes, ...]
    held: Mapping[SiloId, HeldShares]
    entry: Revealed
    _once: _Once = field(default_factory=_Once, repr=False)


def check_consistency(state: SurvivorsSigned, signatures: Signatures) -> ConsistentSurvivors:
    """Phase 5, first half: at least t distinct survivors signed the same τ3.

    Raises:
        FaultyServer: a signer stands twice or is no survivor, a signature is not over this τ3, or
            there are fewer than t.
    """
    state._once.spend()
    attempt = state.attempt
    signers = [signed.sender for signed in signatures.signed]
    if len(set(signers)) != len(signers):  # CHECK: consistency-distinct
        _refuse("consistency-duplicate", "A signature over the survivors stands twice.")
    if not set(signers) <= set(state.survivors):  # CHECK: consistency-signers
        _refuse("consistency-signer", "Somebody who is no survivor signed the survivors.")
    for signed in signatures.signed:
        # CHECK: consistency-signatures
        attempt.verify(SIGN_CONSISTENCY, state.tau3, signed.sender, signed.body(), signed.signature)
    if len(signers) < attempt.descriptor.threshold:  # CHECK: consistency-threshold
        _refuse("consistency-threshold", "Fewer silos signed the survivors than the threshold.")
    entry = Revealed(attempt.position, state.tau3, state.survivors, attempt.expected.update)
    return ConsistentSurvivors(
        attempt, state.tau3, state.dealers, state.survivors, state.seeds, state.held, entry
    )


@dataclass(frozen=True, slots=True)
class SharesRevealed:
    """After phase 5: no secret is left."""

    attempt: _Attempt
    tau3: bytes
    survivors: tuple[SiloId, ...]
    seeds: tuple[bytes, ...]


def reveal_shares(
    state: ConsistentSurvivors, recorded: Recorded[Revealed]
) -> tuple[SharesRevealed, Unmasking]:
    """Phase 5, second half: one share per silo of U2, of the kind that τ2 and τ3 dictate.

    A survivor's self seed, or the mask key of a silo that shared but did not survive; the
    coordinator has no say in which.

    Args:
        state: from ``check_consistency``.
        recorded: evidence that the reveal is in the ledger.
    """
    state._once.spend()
    if recorded.entry != state.entry:  # CHECK: revealed-recorded
        raise OutOfOrder("ledger-entry", "Another reveal was recorded than is being made.")
    attempt = state.attempt
    shares = tuple(
        state.held[owner].reveal(
            ShareKind.SELF_SEED if owner in state.survivors else ShareKind.MASK_KEY
        )
        for owner in state.dealers
        if owner in state.held
    )
    unsigned = Unmasking(attempt.me, shares, _UNSIGNED)
    revealed = SharesRevealed(attempt, state.tau3, state.survivors, state.seeds)
    return revealed, attempt.sign(SIGN_UNMASKING, state.tau3, unsigned)


Watched: TypeAlias = SurvivorsSigned | ConsistentSurvivors | SharesRevealed
"""States of a client that knows which survivors it signed."""


def check_result(
    result: Result, member: Member, expected: Expected, state: Watched | None
) -> bytes:
    """Phase 6: check a signed result, as a survivor or as a silo that was away.

    The sum itself is checked by the caller against ``result.vector_digest`` as it arrives.

    Args:
        result: what the coordinator published.
        member: this silo.
        expected: the round and base that this silo stands at.
        state: what this silo signed in the attempt, if it came that far.

    Returns:
        τ4, which moves the session's history on.

    Raises:
        FaultyServer: wrong signature, round or base, or not the survivors that this silo signed.
    """
    key = member.manifest.coordinator or b""
    tau4 = transcript.result_transcript(result.survivors_transcript, result.vector_digest)
    try:
        verify(key, SIGN_RESULT, tau4, result.body(), result.signature)  # CHECK: result-signature
    except MalformedMessage:
        _refuse("result-signature", "The result is not signed by the consortium's coordinator.")
    if (result.round, result.task) != (expected.round, expected.task):  # CHECK: result-round
        _refuse("result-round", "The result is of another round or task.")
    if result.base != expected.base:  # CHECK: result-base
        _refuse("result-base", "The result starts from another model or task than this silo's.")
    if (result.key is None) == member.session.protection.seals:  # CHECK: result-key
        _refuse("result-key", "The result names a key where there is none, or none.")
    if state is not None and _signed_of(state) != (  # CHECK: result-survivors
        result.survivors_transcript,
        result.survivors,
        result.seeds,
        result.cohort,
        result.key,
    ):
        _refuse("result-survivors", "The result is over other survivors than were signed.")
    return tau4


def _signed_of(state: Watched) -> tuple[object, ...]:
    """What a result of the attempt has to say."""
    descriptor = state.attempt.descriptor
    return (state.tau3, state.survivors, state.seeds, descriptor.cohort, descriptor.key)
