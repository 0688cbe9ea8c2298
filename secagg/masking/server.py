"""The server's attempt: a deterministic fold over accepted messages.

``accept`` takes messages of the current phase in any order, ``close_phase`` fixes who is in and
gives the next broadcast, or raises ``RoundAborted``. The shell decides *when* a phase closes (all
are in, or its deadline fell) and nothing else. The same messages in the same order give the same
state, so a journal of accepted messages restores a round; Unmasking messages are the exception and
are asked for again.

| phase         | accepts       | from   | closes with | need                 |
|---------------|---------------|--------|-------------|----------------------|
| AdvertiseKeys | AdvertiseKeys | cohort | Roster      | t                    |
| ShareKeys     | ShareKeys     | U1     | Dealt       | t                    |
| MaskedInput   | MaskedInput   | U2     | Survivors   | t and the floor      |
| Consistency   | Consistency   | U3     | Signatures  | t                    |
| Unmasking     | Unmasking     | U4     | Result      | t shares per secret  |

Where nothing is masked (protection ``ckks``), nothing is shared: U2 is U1, there are neither
ShareKeys nor Unmasking, and Consistency closes with the Result.

The server's own honesty is not assumed by anybody; these checks keep one faulty client from
spoiling the sum for the others, and name it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final, TypeAlias, TypeVar

from secagg.config import Phase, SessionConfig, SiloId
from secagg.crypto.digest import chunk_digests, root_digest
from secagg.crypto.labels import (
    SIGN_ADVERTISE_KEYS,
    SIGN_CONSISTENCY,
    SIGN_DESCRIPTOR,
    SIGN_MASKED_INPUT,
    SIGN_RESULT,
    SIGN_SHARE_KEYS,
    SIGN_UNMASKING,
)
from secagg.crypto.secret import Entropy, Secret
from secagg.crypto.shamir import parse_share
from secagg.crypto.sign import IdentityKey, verify
from secagg.errors import (
    ConfigError,
    Conflict,
    FaultyClient,
    FaultyClientOrServer,
    MalformedMessage,
    RoundAborted,
    TooLate,
)
from secagg.masking import transcript
from secagg.masking.graph import holders, neighbours
from secagg.masking.manifest import Manifest
from secagg.masking.messages import (
    AdvertiseKeys,
    Commitment,
    Consistency,
    Dealing,
    Dealt,
    Descriptor,
    MaskedInput,
    Result,
    RevealedShare,
    Roster,
    ShareKeys,
    ShareKind,
    Signatures,
    Survivors,
    Unmasking,
)
from secagg.masking.shares import share_commitment
from secagg.masking.unmask import orphan_masks, rebuild, survivor_mask
from secagg.masking.uploads import Uploaded
from secagg.ring.expand import Mask, apply_masks
from secagg.ring.vectors import RunningSum, Vector, ring_of
from secagg.suite import KeyName

ClientMessage: TypeAlias = AdvertiseKeys | ShareKeys | MaskedInput | Consistency | Unmasking
Broadcast: TypeAlias = Roster | Mapping[SiloId, Dealt] | Survivors | Signatures | Result

SIGNED_AS: Final[Mapping[type[ClientMessage], str]] = {
    AdvertiseKeys: SIGN_ADVERTISE_KEYS,
    ShareKeys: SIGN_SHARE_KEYS,
    MaskedInput: SIGN_MASKED_INPUT,
    Consistency: SIGN_CONSISTENCY,
    Unmasking: SIGN_UNMASKING,
}
ACCEPTED_IN: Final[Mapping[type[ClientMessage], Phase]] = {
    AdvertiseKeys: Phase.ADVERTISE_KEYS,
    ShareKeys: Phase.SHARE_KEYS,
    MaskedInput: Phase.MASKED_INPUT,
    Consistency: Phase.CONSISTENCY,
    Unmasking: Phase.UNMASKING,
}
ORDER: Final = tuple(Phase)
M = TypeVar("M")


@dataclass(frozen=True, slots=True)
class Opening:
    """What the coordinator fixes when it opens an attempt."""

    session: SessionConfig
    session_id: bytes
    manifest: Manifest
    task: str
    round: int
    attempt: int
    base: bytes
    cohort: tuple[SiloId, ...]
    length: int
    key: KeyName | None = None


def describe(opening: Opening, identity: IdentityKey, entropy: Entropy) -> Descriptor:
    """Phase 0: draw the nonce and sign the descriptor of an attempt.

    Raises:
        ConfigError: the session's rule gives no threshold for this cohort, or somebody in it is no
            member.
    """
    members = opening.manifest.silos.keys() & set(opening.session.silos)
    if not set(opening.cohort) <= members:  # CHECK: opening-cohort
        raise ConfigError("cohort", "The cohort has somebody who is no member of the session.")
    unsigned = Descriptor(
        session_id=opening.session_id,
        session_hash=transcript.session_hash(opening.session),
        manifest_version=opening.manifest.version,
        manifest_digest=opening.manifest.digest(),
        task=opening.task,
        round=opening.round,
        attempt=opening.attempt,
        nonce=entropy(32),
        cohort=opening.cohort,
        threshold=opening.session.threshold_for(len(opening.cohort)),
        base=opening.base,
        signature=bytes(64),
        key=opening.key,
    )
    tau0 = transcript.round_transcript(unsigned)
    return replace(unsigned, signature=identity.sign(SIGN_DESCRIPTOR, tau0, b""))


class ServerRound:
    """One attempt at one round.

    Args:
        opening: what was fixed when it opened.
        descriptor: made from it by ``describe``.
        identity: the coordinator's signing key, for the result.

    Attributes:
        phase: the current one; None when the attempt is over.
        liars: who revealed shares that were never committed to.
        total: the sum, once there is a Result.
        total_digests: of its chunks, in order; what the Result signs is made of them.
    """

    def __init__(self, opening: Opening, descriptor: Descriptor, identity: IdentityKey) -> None:
        self.opening = opening
        self.descriptor = descriptor
        self.phase: Phase | None = Phase.ADVERTISE_KEYS
        self.liars: set[SiloId] = set()
        self.total: Vector | None = None
        self.total_digests: tuple[bytes, ...] = ()
        self._identity = identity
        self._ring = ring_of(opening.session, opening.task)
        self._sum = RunningSum(self._ring, opening.length)
        self._taus = [transcript.round_transcript(descriptor)]
        self._members: list[tuple[SiloId, ...]] = [descriptor.cohort]
        self._phases = opening.session.protection.phases
        self._accepted: dict[Phase, dict[SiloId, ClientMessage]] = {phase: {} for phase in ORDER}
        self._adverts: dict[SiloId, AdvertiseKeys] = {}
        self._dealings: dict[SiloId, ShareKeys] = {}
        self._commits: dict[SiloId, MaskedInput] = {}
        self._shares: dict[SiloId, dict[SiloId, Secret]] = {}

    @property
    def threshold(self) -> int:
        """t."""
        return self.descriptor.threshold

    @property
    def expected(self) -> tuple[SiloId, ...]:
        """Who may send in the current phase: the set that the phase before fixed."""
        return self._members[-1]

    @property
    def arrived(self) -> frozenset[SiloId]:
        """Who has sent in the current phase."""
        return frozenset(self._accepted[self.phase]) if self.phase else frozenset()

    @property
    def committed(self) -> frozenset[SiloId]:
        """Whose vectors are in the sum so far."""
        return frozenset(self._accepted[Phase.MASKED_INPUT])

    @property
    def survivors(self) -> tuple[SiloId, ...]:
        """U3, once MaskedInput has closed."""
        return tuple(sorted(self._commits))

    def accept(self, message: ClientMessage, vector: Uploaded | None = None) -> bool:
        """Check one message, then fold it in. Nothing changes when it raises.

        Args:
            message: from the silo that it names; the shell has compared that with the certificate.
            vector: with a MaskedInput, the uploaded words with their digest. They are hashed by who
                received them and not here once more, so nobody may change them until this returns.

        Returns:
            True if it is new, False if the very same message was accepted before.

        Raises:
            TooLate: its phase has closed.
            Conflict: another message of this silo was accepted in this phase.
            FaultyClient: wrong phase, not one of the expected senders, or malformed in content.
        """
        phase, sender = ACCEPTED_IN[type(message)], message.sender
        before = self._accepted[phase].get(sender)
        if before is not None:
            if before == message:
                return False
            raise Conflict(  # CHECK: message-conflict
                sender, "message-conflict", f"{sender} sent a second, different {phase} message."
            )
        self._check_phase(phase, sender)  # CHECK: server-phase
        self._check_signature(message)
        self._check_content(message, vector)
        if isinstance(message, MaskedInput) and vector is not None:
            self._fold(message, vector)
        self._accepted[phase][sender] = message
        if isinstance(message, Unmasking):
            self._collect(message)
        return True

    def _check_phase(self, phase: Phase, sender: SiloId) -> None:
        # CHECK: phase-closed
        if self.phase is None or ORDER.index(phase) < ORDER.index(self.phase):
            raise TooLate("phase-closed", f"The phase {phase} of this attempt has closed.")
        if phase is not self.phase:  # CHECK: phase-early
            raise FaultyClient(
                sender, "phase-early", f"A {phase} message came while the phase is {self.phase}."
            )
        if sender not in self.expected and sender in self.descriptor.cohort:  # CHECK: silo-dropped
            raise TooLate("silo-dropped", "This silo's message of an earlier phase came too late.")
        if sender not in self.expected:  # CHECK: sender-unexpected
            raise FaultyClient(
                sender, "sender-unexpected", f"{sender} takes no part in {phase} of this attempt."
            )

    def _check_signature(self, message: ClientMessage) -> None:
        kind = SIGNED_AS[type(message)]
        key = self.opening.manifest.silos[message.sender]
        try:
            # CHECK: message-signature
            verify(key, kind, self._taus[-1], message.body(), message.signature)
        except MalformedMessage as error:
            raise FaultyClient(message.sender, "message-signature", error.observed) from None

    def _check_content(self, message: ClientMessage, vector: Uploaded | None) -> None:
        if isinstance(message, AdvertiseKeys):
            self._check_advert(message)
        elif isinstance(message, ShareKeys):
            self._check_share_keys(message)
        elif isinstance(message, MaskedInput):
            self._check_masked_input(message, vector)
        elif isinstance(message, Unmasking):
            self._check_unmasking(message)

    def _check_advert(self, message: AdvertiseKeys) -> None:
        taken = {
            key
            for other in self._accepted[Phase.ADVERTISE_KEYS].values()
            if isinstance(other, AdvertiseKeys)
            for key in (other.channel_key, other.mask_key)
        }
        keys = {message.channel_key, message.mask_key}
        if len(keys) != 2 or keys & taken:  # CHECK: advert-distinct-keys
            raise FaultyClient(
                message.sender, "advert-keys", "A public key is used twice in this attempt."
            )

    def _check_share_keys(self, message: ShareKeys) -> None:
        roster = self.expected
        recipients = tuple(box.recipient for box in message.boxes)
        listed = tuple(message.commitments.of)
        right = (neighbours(roster, message.sender), holders(roster, message.sender))
        if (recipients, listed) != right:  # CHECK: share-lists
            raise FaultyClient(
                message.sender, "share-lists", "Boxes or commitments are not one for each holder."
            )

    def _check_masked_input(self, message: MaskedInput, vector: Uploaded | None) -> None:
        if (  # CHECK: vector-complete
            vector is None
            or vector.length != self.opening.length
            or vector.dtype != self._ring.dtype
        ):
            raise FaultyClient(message.sender, "vector-length", "The vector is not complete.")
        self._check_seed(message)
        # CHECK: complaint-dealers
        if not set(message.bad_dealers) <= set(self._dealings) - {message.sender}:
            raise FaultyClient(
                message.sender, "bad-dealers", "A complaint names somebody who dealt no shares."
            )
        if vector.digest() != message.vector_digest:  # CHECK: vector-committed
            raise FaultyClient(
                message.sender, "vector-digest", "The vector is not the one committed to."
            )

    def _fold(self, message: MaskedInput, vector: Uploaded) -> None:
        """Add the vector if all its words are residues: the one check that has to read them all."""
        try:
            self._sum.fold(vector)
        except MalformedMessage as error:
            # CHECK: vector-residues
            raise FaultyClient(message.sender, error.code, error.observed) from None

    def _check_seed(self, message: MaskedInput) -> None:
        taken = _of(MaskedInput, self._accepted[Phase.MASKED_INPUT]).values()
        if bool(message.seed) != self.opening.session.protection.seals:  # CHECK: seed-missing
            raise FaultyClient(message.sender, "seed-missing", "A sealed vector has a seed.")
        if message.seed and message.seed in {other.seed for other in taken}:  # CHECK: seed-repeated
            raise FaultyClient(message.sender, "seed-repeated", "Two vectors have the same seed.")

    def _check_unmasking(self, message: Unmasking) -> None:
        complaints = set(self._commits[message.sender].bad_dealers)
        wanted = {
            owner: ShareKind.SELF_SEED if owner in self._commits else ShareKind.MASK_KEY
            for owner in self._dealings
            if owner not in complaints
        }
        if {share.owner: share.kind for share in message.shares} != wanted:  # CHECK: reveal-list
            raise FaultyClient(
                message.sender,
                "reveal-list",
                "The shares are not those that the survivors dictate.",
            )

    def _collect(self, message: Unmasking) -> None:
        """Keep the shares that open their commitments; a holder of any other is a liar."""
        for share in message.shares:
            if self._is_committed(share, message.sender):
                self._shares.setdefault(share.owner, {})[message.sender] = share.share
            else:
                self.liars.add(message.sender)

    def _is_committed(self, share: RevealedShare, holder: SiloId) -> bool:
        commitment = self._dealings[share.owner].commitments.of[holder]
        try:
            parse_share(share.share.reveal())
        except MalformedMessage:
            return False  # CHECK: revealed-share-encoding
        return share_commitment(share, holder, self._taus[1]) == _committed(commitment, share.kind)

    def close_phase(self) -> Broadcast:
        """Fix who is in, move on, and return what to tell them.

        Raises:
            RoundAborted: too few are left, or a dealer is blamed; the attempt is over.
        """
        if self.phase is None:  # CHECK: attempt-over
            raise TooLate("attempt-over", "The attempt is over.")
        phase, self.phase = self.phase, None  # an attempt that raises below stays over
        broadcast = _CLOSERS[phase](self)
        position = self._phases.index(phase) + 1
        self.phase = self._phases[position] if position < len(self._phases) else None
        return broadcast

    def _require(self, phase: Phase, have: int, need: int) -> None:
        if have < need:  # CHECK: quorum
            raise RoundAborted(phase, have, need)

    def _close_advertise_keys(self) -> Roster:
        adverts = _of(AdvertiseKeys, self._accepted[Phase.ADVERTISE_KEYS])
        self._require(Phase.ADVERTISE_KEYS, len(adverts), self.threshold)  # CHECK: quorum-adverts
        self._adverts = adverts
        self._members.append(tuple(adverts))
        roster = Roster(tuple(adverts.values()))
        self._taus.append(transcript.roster_transcript(self._taus[0], roster.adverts))
        return roster

    def _close_share_keys(self) -> Mapping[SiloId, Dealt]:
        dealings = _of(ShareKeys, self._accepted[Phase.SHARE_KEYS])
        self._require(Phase.SHARE_KEYS, len(dealings), self.threshold)  # CHECK: quorum-dealings
        self._dealings = dealings
        self._members.append(tuple(dealings))
        bodies = {name: message.body() for name, message in dealings.items()}
        self._taus.append(transcript.dealt_transcript(self._taus[1], bodies))
        return _dealt(dealings)

    def _close_masked_input(self) -> Survivors:
        commits = _of(MaskedInput, self._accepted[Phase.MASKED_INPUT])
        need = max(self.threshold, self.opening.session.min_cohort)
        self._require(Phase.MASKED_INPUT, len(commits), need)  # CHECK: quorum-survivors
        self._check_dealers(commits)
        self._commits = commits
        self._members.append(tuple(commits))
        survivors = Survivors(tuple(commits.values()))
        self._taus.append(transcript.survivors_transcript(self._taus[-1], survivors.commits))
        return survivors

    def _check_dealers(self, commits: Mapping[SiloId, MaskedInput]) -> None:
        for dealer in self._dealings:
            good = sum(dealer not in commit.bad_dealers for commit in commits.values())
            if good < self.threshold:  # CHECK: quorum-openable
                fault = FaultyClientOrServer(
                    dealer,
                    "shares-unopened",
                    f"Too few silos could open the shares of {dealer} "
                    "(it or the coordinator is at fault).",
                )
                raise RoundAborted(
                    Phase.MASKED_INPUT,
                    good,
                    self.threshold,
                    blamed=(dealer,),
                    because=fault.observed,
                ) from fault

    def _close_consistency(self) -> Signatures | Result:
        signed = _of(Consistency, self._accepted[Phase.CONSISTENCY])
        self._require(Phase.CONSISTENCY, len(signed), self.threshold)  # CHECK: quorum-signatures
        self._members.append(tuple(signed))
        if not self.opening.session.protection.masks:
            return self._release([])
        return Signatures(tuple(signed.values()))

    def _close_unmasking(self) -> Result:
        revealed = len(self._accepted[Phase.UNMASKING])
        self._require(Phase.UNMASKING, revealed, self.threshold)  # CHECK: quorum-reveals
        try:
            masks = self._unmasking()
        finally:  # shares and rebuilt secrets live no longer than they must
            self._shares.clear()
            self._accepted[Phase.UNMASKING].clear()
        return self._release(masks)

    def _unmasking(self) -> list[Mask]:
        prg, tau1, roster = self.opening.session.mask_prg, self._taus[1], tuple(self._adverts)
        masks = []
        for owner in self._dealings:
            advert, shares = self._adverts[owner], self._shares.get(owner, {})
            self._require_shares(shares)
            try:
                secret = rebuild(owner, shares, roster, self.threshold)
                if owner in self._commits:
                    masks.append(survivor_mask(advert, secret, tau1, prg))
                else:
                    masks += orphan_masks(advert, secret, self._adverts, self.survivors, tau1, prg)
            except MalformedMessage as error:  # every share matched what the dealer signed
                raise RoundAborted(  # CHECK: rebuilt-secret
                    Phase.UNMASKING,
                    0,
                    self.threshold,
                    blamed=(owner,),
                    because=f"The shares that {owner} committed to are of no secret of its own: "
                    f"{error.observed}",
                ) from None
        return masks

    def _require_shares(self, shares: Mapping[SiloId, Secret]) -> None:
        if len(shares) < self.threshold:  # CHECK: quorum-shares
            raise RoundAborted(
                Phase.UNMASKING,
                len(shares),
                self.threshold,
                blamed=tuple(sorted(self.liars)),
                because="Too few good shares of one silo are left.",
            )

    def _release(self, masks: Sequence[Mask]) -> Result:
        self.total = self._sum.total
        apply_masks(self._ring, self.total, masks, self.opening.session.mask_prg)
        packed = self._ring.pack(self.total)
        self.total_digests = chunk_digests(packed, self.opening.session.chunk_bytes)
        words = root_digest(self.total_digests)
        unsigned = Result(
            task=self.opening.task,
            round=self.opening.round,
            base=self.opening.base,
            cohort=self.descriptor.cohort,
            survivors=self.survivors,
            survivors_transcript=self._taus[-1],
            vector_digest=words,
            signature=bytes(64),
            key=self.opening.key,
            seeds=tuple(commit.seed for commit in self._commits.values() if commit.seed),
        )
        tau4 = transcript.result_transcript(unsigned.survivors_transcript, words)
        signature = self._identity.sign(SIGN_RESULT, tau4, unsigned.body())
        return replace(unsigned, signature=signature)


_CLOSERS: Final[Mapping[Phase, Callable[[ServerRound], Broadcast]]] = {
    Phase.ADVERTISE_KEYS: ServerRound._close_advertise_keys,
    Phase.SHARE_KEYS: ServerRound._close_share_keys,
    Phase.MASKED_INPUT: ServerRound._close_masked_input,
    Phase.CONSISTENCY: ServerRound._close_consistency,
    Phase.UNMASKING: ServerRound._close_unmasking,
}


def _of(kind: type[M], messages: Mapping[SiloId, ClientMessage]) -> dict[SiloId, M]:
    return {name: m for name, m in sorted(messages.items()) if isinstance(m, kind)}


def _dealt(dealings: Mapping[SiloId, ShareKeys]) -> dict[SiloId, Dealt]:
    boxes = {name: {b.recipient: b.sealed for b in m.boxes} for name, m in dealings.items()}
    digests = {name: message.boxes_digest() for name, message in dealings.items()}
    return {
        holder: Dealt(
            tuple(
                Dealing(name, m.commitments, digests[name], boxes[name].get(holder), m.signature)
                for name, m in dealings.items()
            )
        )
        for holder in dealings
    }


def _committed(commitment: Commitment, kind: ShareKind) -> bytes:
    return commitment.self_seed if kind is ShareKind.SELF_SEED else commitment.mask_key
