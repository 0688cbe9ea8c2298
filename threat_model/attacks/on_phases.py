"""Phases: silos that play the protocol at the wrong time, twice, or with keys that are none.

The coordinator's checks keep one silo from spoiling the round for the others, or their trust in
each other: every message in its phase, once, under its sender's signature over this attempt.

Source: Bonawitz et al. 2017 (ePrint 2017/281), figure 4; RFC 7748, section 6.1, for points of small
order.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import suppress
from typing import Any, Final

from secagg.config import Phase, silo_id
from secagg.coordinator.spool import Spooled
from secagg.crypto.keys import KeyPair
from secagg.crypto.labels import SIGN_ADVERTISE_KEYS, SIGN_CONSISTENCY, enc
from secagg.masking import transcript
from secagg.masking.messages import (
    AdvertiseKeys,
    Consistency,
    Dealt,
    Descriptor,
    MaskedInput,
    Result,
    Roster,
    Signatures,
    Survivors,
    Unmasking,
)
from secagg.masking.server import ACCEPTED_IN, SIGNED_AS, ClientMessage
from secagg.wire._pb import service_pb2 as api
from threat_model.attacks.attack import Refused, Scene, attack
from threat_model.attacks.evil_coordinator import TASK, make_session
from threat_model.attacks.evil_silo import Study
from threat_model.attacks.weak import Function, as_is, nothing, replaced

C = silo_id("c")


def advert(study: Study, silo: str, descriptor: Descriptor) -> AdvertiseKeys:
    """Fresh keys of a silo's, signed for an attempt."""
    channel, mask = KeyPair.generate(os.urandom), KeyPair.generate(os.urandom)
    unsigned = AdvertiseKeys(silo_id(silo), channel.public, mask.public, os.urandom(32), bytes(64))
    tau0 = transcript.round_transcript(descriptor)
    return study.sign(silo, SIGN_ADVERTISE_KEYS, tau0, unsigned)


def roster(study: Study, *silos: str) -> dict[str, AdvertiseKeys]:
    """Have silos send their adverts; those that are broadcast."""
    study.step(*silos)
    event = study.next(silos[0])
    assert isinstance(event, Roster)
    return {advert.sender: advert for advert in event.adverts}


# At the wrong time.


@attack(
    threat="out-of-phase",
    reason="phase-early",
    weakening=replaced("secagg.masking.server:ServerRound._check_phase", nothing),
)
def signature_before_the_survivors(scene: Scene) -> bool:
    """Silo c signs before there are survivors, so that its signature over them is never right."""
    with scene.stage.serving(scene.weakening) as server, Study(scene, server) as study:
        study.begin()
        tau0 = transcript.round_transcript(study.next("a"))
        study.next("c")
        early = study.sign("c", SIGN_CONSISTENCY, tau0, Consistency(C, bytes(64)))
        study.say("c", early)
        study.restart("a", "c")
        study.to(Survivors)
        study.step("a", "b", "d")
        event = study.next("a")
        return isinstance(event, Signatures) and early in event.signed


def rehearsed(study: Study) -> list[ClientMessage]:
    """Silo c's messages of a round that it plays honestly."""
    study.begin()
    found = []
    for _ in ACCEPTED_IN:
        message = study.answer("c", study.next("c"))
        study.send("c", message)
        study.step("a", "b", "d")
        found.append(message)
    return found


@attack(
    threat="out-of-phase",
    reason="phase-early",
    weakening=replaced("secagg.masking.server:ServerRound._check_phase", nothing),
)
def every_message_in_every_phase(scene: Scene) -> bool:
    """In each phase silo c signs and sends all four messages that belong to the others.

    But for one cell of the matrix: what it signs last of all is what it signed in phase 4.
    """
    codes: list[str] = []
    with scene.stage.serving(scene.weakening) as server:
        with Study(scene, server) as study:
            messages = rehearsed(study)
        with Study(scene, server) as study:
            study.begin()
            for right in messages:
                event = study.next("c")
                own = study.answer("c", event)
                assert type(own) is type(right)
                if isinstance(own, MaskedInput):
                    study.put("c", study.ring.pack(study.silos[C].upload))
                tau = newest_transcript(study, event)
                for message in messages:
                    if type(message) is not type(right):
                        wrong = study.sign("c", SIGNED_AS[type(message)], tau, message)
                        codes.append(outcome_of(study, wrong))
                if "accepted" in codes and not isinstance(own, Unmasking):
                    return True
                study.say("c", own)
                study.step("a", "b", "d")
    assert len(codes) == len(messages) * (len(messages) - 1)
    return codes.count("accepted") > 1


def newest_transcript(study: Study, event: Any) -> bytes:
    """What is signed in the phase that this broadcast begins."""
    if isinstance(event, Descriptor):
        return transcript.round_transcript(event)
    state = study.silos[C].state
    taus = {Roster: "tau1", Dealt: "tau2", Survivors: "tau3", Signatures: "tau3"}
    return bytes(getattr(state, taus[type(event)]))


def outcome_of(study: Study, message: ClientMessage) -> str:
    """The code that a message of c's is refused with, or "accepted"."""
    try:
        study.say("c", message)
    except Refused as refusal:
        return refusal.code
    return "accepted"


def adding_late(real: Function) -> Function:
    """A session that adds a vector whenever its commit comes."""

    def send(self: Any, message: ClientMessage, round_number: int, attempt: int) -> bool:
        live = self.attempt
        if not isinstance(message, MaskedInput) or live.server.phase is Phase.MASKED_INPUT:
            return bool(real(self, message, round_number, attempt))
        upload = live.uploads[message.sender]
        blob = self.blob(upload.name, upload.stored())
        live.server._sum.fold(Spooled.open(blob, self.ring(live).dtype))
        return True

    return send


LATE: Final = replaced("secagg.coordinator.session:Session.send", adding_late)


def is_added_late(study: Study, *, leaves: bool) -> bool:
    """Whether c's commit spoils the sum of the others, which are fixed when it comes."""
    study.begin()
    study.to(Dealt)
    message = study.answer("c", study.next("c"))
    study.put("c", study.ring.pack(study.silos[C].upload))
    if leaves:
        study.call("c", "Leave", api.LeaveRequest)
    study.step("a", "b", "d")
    survivors = study.next("a")
    with suppress(Refused):
        study.say("c", message)
    study.send("a", study.answer("a", survivors))
    study.step("b", "d")
    ended = study.outcome("a", "b", "d")
    return isinstance(ended, Result) and not study.is_sum_of("abd")


@attack(threat="late-vector-added", reason="phase-closed", weakening=LATE)
def late_vector(scene: Scene) -> bool:
    """Silo c takes its part back and commits all the same, when nobody waits for it any more."""
    with scene.stage.serving(scene.weakening) as server, Study(scene, server) as study:
        return is_added_late(study, leaves=True)


@attack(threat="late-vector-added", reason="phase-closed", weakening=LATE)
def vector_after_the_deadline(scene: Scene) -> bool:
    """Silo c commits to its vector after the phase's deadline, when the survivors are fixed."""
    session = make_session(phase_deadline=3.0)
    with scene.stage.serving(scene.weakening) as server, Study(scene, server, session) as study:
        return is_added_late(study, leaves=False)


def newest_counts(real: Function) -> Function:
    """A round in which a silo's newest message of a phase counts."""

    def accept(self: Any, message: ClientMessage, vector: Any = None) -> bool:
        self._accepted[ACCEPTED_IN[type(message)]].pop(message.sender, None)
        return bool(real(self, message, vector))

    return accept


@attack(
    threat="message-conflict",
    reason="message-conflict",
    weakening=replaced("secagg.masking.server:ServerRound.accept", newest_counts),
)
def second_advert(scene: Scene) -> bool:
    """Silo c advertises other keys when it has seen who else is in."""
    with scene.stage.serving(scene.weakening) as server, Study(scene, server) as study:
        study.begin()
        descriptor = study.next("c")
        study.send("c", study.answer("c", descriptor))
        second = advert(study, "c", descriptor)
        study.say("c", second)
        return second == roster(study, "a", "b", "d")["c"]


UNSIGNED: Final = replaced("secagg.masking.server:ServerRound._check_signature", nothing)
"""A coordinator that relies on TLS alone."""


@attack(threat="attempt-replay", reason="message-signature", weakening=UNSIGNED)
def advert_of_an_earlier_attempt(scene: Scene) -> bool:
    """Silo d's keys of an attempt that failed, whose secrets others may hold, are used again."""
    with scene.stage.serving(scene.weakening) as server, Study(scene, server) as study:
        study.begin()
        old = study.answer("d", study.next("d"))
        for silo in "abc":
            study.next(silo)
            study.call(silo, "Leave", api.LeaveRequest)
        study.say("d", old)
        for silo in "abcd":
            study.next(silo)
        study.ready()
        study.next("d")
        study.say("d", old)
        return old == roster(study, "a", "b", "c")["d"]


@attack(threat="unsigned-message", reason="message-signature", weakening=UNSIGNED)
def deniable_advert(scene: Scene) -> bool:
    """Silo c's keys are signed by a key that is nobody's: c can deny them, and nobody believes."""
    with scene.stage.serving(scene.weakening) as server, Study(scene, server) as study:
        study.begin()
        unsigned = advert(study, "c", study.next("c"))
        forged = AdvertiseKeys(
            C, unsigned.channel_key, unsigned.mask_key, unsigned.self_seed_hash, os.urandom(64)
        )
        study.say("c", forged)
        return forged == roster(study, "a", "b", "d")["c"]


@attack(
    threat="outsider",
    reason="sender-unexpected",
    weakening=replaced("secagg.masking.server:ServerRound._check_phase", nothing),
)
def sender_outside_the_cohort(scene: Scene) -> bool:
    """Silo d of the session, which was not ready in time, joins an attempt that is without it."""
    session = make_session(train_deadline=0.05)
    with scene.stage.serving(scene.weakening) as server, Study(scene, server, session) as study:
        study.open_task()
        study.ready("a", "b", "c")
        descriptor = study.next("a")
        assert "d" not in descriptor.cohort
        study.say("d", advert(study, "d", descriptor))
        study.restart("a")
        return "d" in roster(study, "a", "b", "c")


def on_any_base(real: Function) -> Function:
    """A session that takes an update on whatever base it was made."""

    def ready(self: Any, silo: Any, task: str, base: bytes, *more: Any) -> None:
        real(self, silo, task, self.base(task), *more)

    return ready


@attack(
    threat="stale-update",
    reason="base-stale",
    weakening=replaced("secagg.coordinator.session:Session.ready", on_any_base),
)
def ready_on_another_base(scene: Scene) -> bool:
    """Silo d's update of another model is to be in the sum."""
    with scene.stage.serving(scene.weakening) as server, Study(scene, server) as study:
        study.open_task()
        study.ready("a", "b", "c")
        base = os.urandom(32)
        study.call("d", "Ready", api.ReadyRequest, task=TASK, base=base)
        return "d" in study.next("a").cohort


# Keys that are none.


def advertise_raw(study: Study, mask_key: bytes, pinned: bytes) -> api.SendRequest:
    """Silo c's advert with any bytes for its mask key and its seed's hash, properly signed."""
    tau0 = transcript.round_transcript(study.next("c"))
    channel_key = KeyPair.generate(os.urandom).public
    body = enc(b"c", channel_key, mask_key, pinned)
    key = study.silos[C].member.identity
    request = api.SendRequest(session_id=study.session_id, round=1, attempt=study.attempt)
    request.advertise_keys.sender = "c"
    request.advertise_keys.channel_key = channel_key
    request.advertise_keys.mask_key = mask_key
    request.advertise_keys.self_seed_hash = pinned
    request.advertise_keys.signature = key.sign(SIGN_ADVERTISE_KEYS, tau0, body)
    return request


def is_broadcast(study: Study, mask_key: bytes) -> bool:
    """Whether silos are shown this as c's mask key."""
    study.step("a", "b", "d")
    reply = study.call("a", "Next", api.NextRequest, round=1, attempt=1, seen=api.STEP_DESCRIPTOR)
    return any(a.sender == "c" and a.mask_key == mask_key for a in reply.roster.adverts)


def raw_key(scene: Scene, mask_key: bytes) -> bool:
    """Whether c gets any bytes broadcast as its mask key."""
    with scene.stage.serving(scene.weakening) as server, Study(scene, server) as study:
        study.begin()
        study.member("c")("Send", advertise_raw(study, mask_key, os.urandom(32)))
        return is_broadcast(study, mask_key)


def raw_keys(scene: Scene, points: Iterable[int]) -> bool:
    """Whether c gets all of these broadcast, one in each session; on ours, any of them."""
    gained = []
    for point in points:
        try:
            gained.append(raw_key(scene, point.to_bytes(32, "little")))
        except Refused:
            gained.append(False)
    return all(gained) if scene.weakened else any(gained)


P: Final = 2**255 - 19
OF_ORDER_8: Final = (
    325606250916557431795983626356110631294008115727848805560023387167927233504,
    39382357235489614581723060781553021112529911719440698176882885853963445705823,
)
"""Cremers and Jackson, Prime, Order Please! (CSF 2019), table 1."""
ANY_POINT: Final = replaced("secagg.masking.messages:parse_public_key", as_is)


@attack(threat="low-order-key", reason="public-key-low-order", weakening=ANY_POINT)
def points_of_small_order(scene: Scene) -> bool:
    """Silo c's key is 0, 1, −1, or one of the two points of order 8: whatever others agree on with
    it is zero, and no round gets further.
    """
    return raw_keys(scene, (0, 1, P - 1, *OF_ORDER_8))


@attack(threat="aliased-key", reason="public-key-encoding", weakening=ANY_POINT)
def points_of_another_encoding(scene: Scene) -> bool:
    """Silo c's key is p or p + 1, which are 0 and 1, or 9 + p: the same point as 9 in other bytes,
    for who compares bytes.
    """
    return raw_keys(scene, (P, P + 1, P + 9))


@attack(
    threat="malformed-message",
    reason="message-size",
    weakening=replaced("secagg.masking.messages:_check_size", nothing),
)
def seed_hash_of_no_bytes(scene: Scene) -> bool:
    """Silo c pins an empty hash of its self seed, which is no seed's: the round ends in vain."""
    with scene.stage.serving(scene.weakening) as server, Study(scene, server) as study:
        study.begin()
        mask_key = KeyPair.generate(os.urandom).public
        study.member("c")("Send", advertise_raw(study, mask_key, b""))
        return is_broadcast(study, mask_key)


@attack(
    threat="duplicated-key",
    reason="advert-keys",
    weakening=replaced("secagg.masking.server:ServerRound._check_advert", nothing),
)
def anothers_key(scene: Scene) -> bool:
    """Silo c advertises a's mask key as its own: all refuse the roster, which has one key twice."""
    with scene.stage.serving(scene.weakening) as server, Study(scene, server) as study:
        study.begin()
        own: Any = study.answer("a", study.next("a"))
        study.send("a", own)
        study.member("c")("Send", advertise_raw(study, own.mask_key, os.urandom(32)))
        study.step("b", "d")
        event = study.next("a")
        return isinstance(event, Roster) and len({a.mask_key for a in event.adverts}) == 3
