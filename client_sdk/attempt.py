"""One attempt, driven: ask what comes next, take the protocol's step, send what it gives.

The shell of ``secagg.masking.client``. It stores nothing but the ledger's entries, re-sends only
what was computed, and falls silent for the rest of the attempt as soon as a step refuses.

A coordinator that is killed comes back with all it was sent but uploads that were not committed and
the revealed shares, which it never stores: it refuses the one and asks for the other again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Final, TypeAlias, TypeVar

from client_sdk.channel import POLL_SECONDS, Channel, CoordinatorRefused
from client_sdk.progress import Progress, log
from client_sdk.transfer import upload
from secagg.ckks.keyring import HeldKey
from secagg.config import Phase
from secagg.crypto.secret import Entropy
from secagg.errors import (
    FaultyServer,
    MalformedMessage,
    PolicyRefused,
    RoundAborted,
    SecaggError,
    SessionEnded,
    TooLate,
)
from secagg.masking import client
from secagg.masking.ledger import Ledger
from secagg.masking.messages import (
    Dealt,
    Descriptor,
    Result,
    Roster,
    Signatures,
    Survivors,
    Unmasking,
)
from secagg.masking.server import ClientMessage
from secagg.ring.expand import Encoded
from secagg.ring.vectors import Vector, ring_of
from secagg.wire import attempt as wire
from secagg.wire import session as wire_session
from secagg.wire._pb import service_pb2 as api
from secagg.wire.attempt import key_to_wire

S = TypeVar("S")
UPLOADS: Final = 5
"""How often one vector is uploaded to a coordinator that keeps losing it."""
Event: TypeAlias = (
    Descriptor | Roster | Dealt | Survivors | Signatures | Result | RoundAborted | None
)


@dataclass
class Concluded:
    """How a round went for this silo.

    Args:
        result: the signed result.
        state: what this silo signed in the attempt, if it came that far.
    """

    result: Result
    state: client.Watched | None


@dataclass
class Submission:
    """One update on its way through as many attempts as it takes.

    Args:
        channel: to the coordinator.
        member: gives who this silo is, with the newest manifest, for each attempt.
        expected: task, round and base that the update was made for.
        ledger: the silo's.
        key: gives the key for each attempt, where the session seals.
        encode: gives the encoded update, freshly rounded or sealed, for each attempt, and the seed
            of its c1 if it is sealed.
        entropy: source of keys and seeds.
        progress: where to say what happens.
    """

    channel: Channel
    member: Callable[[], client.Member]
    expected: client.Expected
    ledger: Ledger
    key: Callable[[], HeldKey | None]
    encode: Callable[[HeldKey | None], tuple[Encoded, bytes]]
    entropy: Entropy
    progress: Progress
    refusal: SecaggError | None = field(default=None, init=False)
    abort: RoundAborted | None = field(default=None, init=False)

    def run(self, max_attempts: int) -> Concluded:
        """Take part in attempts until the round has its result.

        Raises:
            RoundAborted: ``max_attempts`` attempts ended without one.
            FaultyServer, PolicyRefused: this silo refused the last of them, for this reason.
            SessionEnded: the session is over.
            StaleModel: the update's base is not the session's.
            StaleKey: the update's key is not the session's newest.
        """
        for _ in range(max_attempts):
            concluded = self._attempt()
            if concluded is not None:
                return concluded
            log.warning("attempt failed: %s", self.refusal or self.abort)
        raise self.refusal or self.abort or TooLate("attempts", "No attempt was completed.")

    def _attempt(self) -> Concluded | None:
        member = self.member()
        key = self.key()  # fit for the members as they are now
        self.expected = replace(self.expected, key=None if key is None else key.name)
        ready = api.ReadyRequest(
            session_id=member.session_id,
            task=self.expected.task,
            base=self.expected.base,
            key=key_to_wire(self.expected.key),
        )
        self.progress.say("ready, waiting for the cohort")
        joined = self._joined(member)
        while True:  # said again after an empty poll: an attempt may have come and gone unseen
            self.channel.call("Ready", ready, api.Ack)
            event = self._next(member, joined, api.STEP_LEFT)
            if isinstance(event, Result):
                return Concluded(event, None)
            if isinstance(event, Descriptor):
                return _Attempt(self, member, key, event).run()
            if event is not None:  # CHECK: event-before-descriptor
                raise FaultyServer("event-order", "The coordinator sent a broadcast out of turn.")

    def _joined(self, member: client.Member) -> int:
        round_number, attempt = self.ledger.last_attempt(member.session_id)
        return attempt if round_number == self.expected.round else 0

    def _next(self, member: client.Member, attempt: int, seen: api.Step) -> Event:
        request = api.NextRequest(
            session_id=member.session_id,
            round=self.expected.round,
            attempt=attempt,
            seen=seen,
            key=key_to_wire(self.expected.key),
        )
        reply = self.channel.call("Next", request, api.NextReply, seconds=POLL_SECONDS)
        try:
            return _event(reply)
        except MalformedMessage as error:
            raise FaultyServer(error.code, error.observed) from None  # CHECK: event-malformed


class _Attempt:
    """This silo in one attempt."""

    def __init__(
        self,
        submission: Submission,
        member: client.Member,
        key: HeldKey | None,
        descriptor: Descriptor,
    ) -> None:
        self._submission = submission
        self._member = member
        self._key = key
        self._descriptor = descriptor
        self._state: object | None = None
        self._unmasking: Unmasking | None = None

    def run(self) -> Concluded | None:
        """Take the steps in order; None if the attempt ended without a result for this silo."""
        submission = self._submission
        seen: api.Step = api.STEP_UNSPECIFIED
        following: Event = self._descriptor
        while True:
            match following:
                case Result():
                    state = self._state if isinstance(self._state, _WATCHED) else None
                    if self._member.name not in following.survivors:
                        state = None  # another attempt's, which this silo's ended unseen before
                    return Concluded(following, state)
                case RoundAborted():
                    submission.abort = following
                    return None
                case Descriptor() if following is not self._descriptor:
                    return None
                case None:
                    pass
                case _:
                    seen = _SEEN[type(following)]
                    if not self._take(following):
                        return None
            attempt = self._descriptor.attempt
            following = submission._next(self._member, attempt, seen)

    def _take(self, event: Event) -> bool:
        """Answer one broadcast; False if this silo is out of the attempt."""
        try:
            self._send(*self._step(event))
        except (FaultyServer, PolicyRefused) as refusal:
            self._submission.refusal = refusal
            return False
        except (TooLate, SessionEnded):  # it goes on without us, or is over: the next event says
            return True
        self._submission.refusal = None
        return True

    def _step(self, event: Event) -> tuple[ClientMessage, Vector | None]:
        submission, ledger = self._submission, self._submission.ledger
        message: ClientMessage
        vector: Vector | None = None
        match event:
            case Descriptor():
                admitted = client.admit(event, self._member, submission.expected, ledger)
                recorded = ledger.record(admitted.entry)
                self._state, message = client.advertise_keys(
                    admitted, recorded, entropy=submission.entropy
                )
                phase = Phase.ADVERTISE_KEYS
            case Roster() if self._member.session.protection.masks:
                state = self._in(client.KeysAdvertised)
                self._state, message = client.share_keys(state, event, entropy=submission.entropy)
                phase = Phase.SHARE_KEYS
            case Roster():
                state = self._in(client.KeysAdvertised)
                encoded, seed = submission.encode(self._key)
                vector = encoded((), self._member.session.mask_prg)
                self._state, message = client.seal_input(state, event, vector, seed)
                phase = Phase.MASKED_INPUT
            case Dealt():
                state1 = self._in(client.KeysShared)
                encoded, seed = submission.encode(self._key)
                self._state, message, vector = client.mask_input(state1, event, encoded, seed)
                phase = Phase.MASKED_INPUT
            case Survivors():
                state2 = self._in(client.InputMasked)
                self._state, message = client.check_survivors(state2, event, ledger)
                phase = Phase.CONSISTENCY
            case Signatures():
                message = self._reveal(event)
                phase = Phase.UNMASKING
            case _:
                raise FaultyServer("event-order", "The coordinator sent a broadcast out of turn.")
        submission.progress.say(str(phase))
        return message, vector

    def _reveal(self, event: Signatures) -> Unmasking:
        """Reveal this silo's shares; asked again, the very same message and never another."""
        if self._unmasking is None or not isinstance(self._state, client.SharesRevealed):
            checked = client.check_consistency(self._in(client.SurvivorsSigned), event)
            recorded = self._submission.ledger.record(checked.entry)
            self._state, self._unmasking = client.reveal_shares(checked, recorded)
        return self._unmasking

    def _in(self, kind: type[S]) -> S:
        if not isinstance(self._state, kind):  # CHECK: event-order
            raise FaultyServer("event-order", "The coordinator sent a broadcast out of turn.")
        return self._state

    def _send(self, message: ClientMessage, vector: Vector | None) -> None:
        descriptor = self._descriptor
        request = wire.client_message_to_wire(
            message,
            session_id=self._member.session_id,
            round_number=descriptor.round,
            attempt=descriptor.attempt,
        )
        if vector is None:
            self._submission.channel.call("Send", request, api.Ack)
        else:
            self._send_with(vector, request)

    def _send_with(self, vector: Vector, request: api.SendRequest) -> None:
        """Upload a vector, then send the message that commits to it, until both have arrived."""
        for left in reversed(range(UPLOADS)):
            try:
                self._upload(vector)
                self._submission.channel.call("Send", request, api.Ack)
            except CoordinatorRefused as refusal:
                if refusal.code != "chunk-gap" or not left:
                    raise
                log.info("the coordinator lost the vector; it is sent again")
            else:
                return

    def _upload(self, vector: Vector) -> None:
        session, descriptor = self._member.session, self._descriptor
        data = ring_of(session, descriptor.task).pack(vector)
        where = api.Blob.Vector(round=descriptor.round, attempt=descriptor.attempt)
        upload(self._submission.channel, self._member, api.Blob(vector=where), data)


_WATCHED = (client.SurvivorsSigned, client.ConsistentSurvivors, client.SharesRevealed)
_SEEN = {
    Descriptor: api.STEP_DESCRIPTOR,
    Roster: api.STEP_ROSTER,
    Dealt: api.STEP_DEALT,
    Survivors: api.STEP_SURVIVORS,
    Signatures: api.STEP_SIGNATURES,
}


def _event(reply: api.NextReply) -> Event:  # noqa: PLR0911 - one line an event
    match reply.WhichOneof("event"):
        case "descriptor":
            return wire.descriptor_from_wire(reply.descriptor)
        case "roster":
            return wire.roster_from_wire(reply.roster)
        case "dealt":
            return wire.dealt_from_wire(reply.dealt)
        case "survivors":
            return wire.survivors_from_wire(reply.survivors)
        case "signatures":
            return wire.signatures_from_wire(reply.signatures)
        case "result":
            return wire.result_from_wire(reply.result)
        case "aborted":
            return wire_session.aborted_from_wire(reply.aborted)
        case "ended":
            raise SessionEnded("session-over", reply.ended)
        case _:
            return None
