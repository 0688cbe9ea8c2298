"""Phase 0: a coordinator, or whoever poses as one, opens an attempt that no silo should join.

Bonawitz et al. 2017 (ePrint 2017/281), section 6.2, has the bounds on cohort and threshold, and why
membership needs a PKI; the rest is replay and rollback in general.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from secagg.config import (
    Clip,
    Policy,
    SessionConfig,
    SiloId,
    TaskConfig,
    ThresholdRule,
    Weighting,
    silo_id,
)
from secagg.crypto.labels import SIGN_ADVERTISE_KEYS, SIGN_DESCRIPTOR
from secagg.crypto.secret import Secret
from secagg.crypto.sign import IdentityKey, verify
from secagg.masking import transcript
from secagg.masking.messages import Signatures
from secagg.pki.manifest import SignedManifest
from secagg.wire import session as wire_session
from secagg.wire._pb import service_pb2 as api
from threat_model.attacks.attack import Scene, attack
from threat_model.attacks.attempt import Attempt, Colluder
from threat_model.attacks.evil_coordinator import (
    BOUND,
    TASK,
    EvilCoordinator,
    make_session,
    secret_values,
)
from threat_model.attacks.sight import KEY, SEED
from threat_model.attacks.weak import Function, nothing, replaced, without

GHOSTS = ("ghost-1", "ghost-2", "ghost-3")


def opens(attempt: Attempt, *names: str) -> bool:
    """Whether the coordinator reads the sum over these silos, who do all that they are asked."""
    return attempt.evil.reads(attempt.to_masked().open(*names), *names)


@contextmanager
def started(scene: Scene, session: SessionConfig, colluders: str = "") -> Iterator[EvilCoordinator]:
    """A session whose honest silos have joined."""
    with EvilCoordinator(scene, session, colluders=colluders) as evil:
        evil.start()
        yield evil


def halves(attempt: Attempt, victim: str, first: str, second: str) -> bool:
    """Half of the silos open a sum with the victim, the others one without: it is read."""
    attempt.to_masked()
    everybody = attempt.names
    for half, view in ((first, everybody), (second, [n for n in everybody if n != victim])):
        survivors = attempt.survivors(*view)
        signed = [attempt.tell(name, survivors) for name in half]
        forged = [attempt.forge(name, survivors) for name in attempt.colluders]
        for name in half:
            attempt.tell(name, Signatures((*signed, *forged)))
    read = attempt.read(victim, attempt.secret(victim, SEED), attempt.secret(victim, KEY))
    return attempt.evil.reads(read, victim)


@attack(
    threat="low-threshold",
    reason="policy-threshold",
    weakening=replaced("secagg.masking.client:_check_cohort", nothing),
)
def low_threshold(scene: Scene) -> bool:
    """t = 2 of four: each half of the cohort opens another sum, and both give a's two secrets."""
    with started(scene, make_session()) as evil:
        return halves(Attempt(evil, threshold=2), "a", "ab", "cd")


@attack(
    threat="no-clipping",
    reason="policy-clip",
    weakening=replaced("secagg.config:Policy.check_session", nothing),
)
def no_clipping(scene: Scene) -> bool:
    """Updates go into the sum as they are, where the operators let none in that is not clipped."""
    with EvilCoordinator(scene, colluders="d") as evil:
        evil.floors = {"clips": '["l2"]'}
        evil.start()
        return opens(Attempt(evil), *"abcd")


@attack(
    threat="endless-weight",
    reason="policy-weight-cap",
    weakening=replaced("secagg.config:Policy.check_session", nothing),
)
def endless_weight(scene: Scene) -> bool:
    """a has a million times the records of the others, and the cap lets it say so: the mean that
    the coordinator opens is a's update.
    """
    heavy = 1e6
    task = TaskConfig(TASK, Weighting.MEAN, 10, BOUND, Clip.NONE, heavy, 32)
    with EvilCoordinator(scene, make_session(tasks=(task,))) as evil:
        for name in "abcd":
            evil.start_one(silo_id(name), weight=heavy if name == "a" else 1.0)
        return evil.reads(Attempt(evil).to_masked().open(*"abcd"), "a")


def without_floors(real: Function) -> Function:
    """``client_sdk.profile.parse_toml`` of a silo that leaves sizes and numbers to the session."""

    def parse(kind: type, text: str, name: str) -> Any:
        found = real(kind, text, name)
        if kind is not Policy:
            return found
        return replace(found, colluders=1, min_cohort=3, min_threshold=3)

    return parse


@attack(
    threat="more-colluders",
    reason="policy-colluders",
    weakening=replaced("client_sdk.profile:parse_toml", without_floors),
)
def more_colluders(scene: Scene) -> bool:
    """A session made for one colluder, and there are two, as the silos' operators had feared."""
    session = make_session("abcdef", threshold=ThresholdRule(1, 2))
    with EvilCoordinator(scene, session, colluders="ef") as evil:
        evil.floors = {"colluders": "2", "min_threshold": "4"}
        evil.start()
        return halves(Attempt(evil), "a", "ab", "cd")


@attack(
    threat="weak-protection",
    reason="policy-protection",
    weakening=replaced("secagg.config:Policy.check_session", nothing),
)
def weak_protection(scene: Scene) -> bool:
    """Masks alone where the operators want the sum sealed, too: the coordinator reads it."""
    with EvilCoordinator(scene, colluders="d") as evil:
        evil.floors = {"protections": '["ckks+masked"]'}
        evil.start()
        return opens(Attempt(evil), *"abcd")


@attack(
    threat="small-cohort",
    reason="policy-min-cohort",
    weakening=replaced("client_sdk.profile:parse_toml", without_floors),
)
def small_cohort(scene: Scene) -> bool:
    """Three silos, two of them colluders, where a's operator wants four: a's update is what is left
    of the sum.
    """
    with EvilCoordinator(scene, make_session("abc"), colluders="bc") as evil:
        evil.floors = {"min_cohort": "4"}
        evil.start()
        return opens(Attempt(evil), *"abc")


@attack(
    threat="small-cohort",
    reason="descriptor-cohort",
    weakening=without("descriptor-cohort", "survivors-floor"),
)
def shrunken_cohort(scene: Scene) -> bool:
    """A session of four silos at least, and an attempt of three, with two colluders."""
    with started(scene, make_session(min_cohort=4), "cd") as evil:
        return opens(Attempt(evil, "acd"), *"acd")


def unsigned(_real: Function) -> Function:
    """``SignedManifest.verify`` that takes membership as it is told."""
    return lambda self, _authority: self.manifest


@attack(
    threat="sybils",
    reason="manifest-signature",
    weakening=replaced("secagg.pki.manifest:SignedManifest.verify", unsigned),
)
def sybils(scene: Scene) -> bool:
    """The coordinator enrols three silos of its own making: a is alone with them."""
    names = [silo_id(name) for name in GHOSTS]
    session = make_session(["a", *names])
    with EvilCoordinator(scene, session, colluders=names) as evil:
        made_up = {name: IdentityKey.generate(os.urandom) for name in names}
        real = evil.manifest.manifest
        silos = {"a": real.silos[silo_id("a")]} | {n: key.public for n, key in made_up.items()}
        evil.manifest = sign_manifest(
            replace(real, version=real.version + 1, silos={silo_id(n): k for n, k in silos.items()})
        )
        evil.start()
        ghosts = {name: Colluder(evil, name, key) for name, key in made_up.items()}
        return opens(Attempt(evil, colluders=ghosts), "a", *names)


def sign_manifest(manifest: Any) -> SignedManifest:
    """A manifest under a key that is no authority's."""
    key = ec.generate_private_key(ec.SECP256R1()).private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    return SignedManifest.sign(manifest, Secret(key))


def latest_offered(_real: Function) -> Function:
    """``secagg.pki.manifest.accept`` that takes whatever manifest the authority ever signed."""

    def accept(_current: Any, offered: SignedManifest, authority: bytes) -> SignedManifest:
        offered.verify(authority)
        return offered

    return accept


@attack(
    threat="old-manifest",
    reason="manifest-older",
    weakening=replaced("secagg.pki.credentials:accept", latest_offered),
)
def old_manifest(scene: Scene) -> bool:
    """a has heard that d was revoked; the coordinator goes back to the manifest from before, and d,
    which colludes, is in the sum.
    """
    with EvilCoordinator(scene, colluders="d") as evil:
        real, key = evil.manifest.manifest, evil.consortium.authority.key_pem
        left = {name: public for name, public in real.silos.items() if name != "d"}
        newer = SignedManifest.sign(
            replace(real, version=real.version + 1, silos=left, revoked=("1f",)), key
        )
        joined = list[SiloId]()

        def join(silo: SiloId, _request: Any) -> api.JoinSessionReply | None:
            joined.append(silo)
            return joined_reply(evil, newer) if joined.count(silo_id("a")) == 1 else None

        evil.lies["JoinSession"] = join
        evil.start("a")
        evil.await_opening()
        evil.start("b", "c")
        return opens(Attempt(evil), *"abcd")


def joined_reply(
    evil: EvilCoordinator,
    manifest: SignedManifest | None = None,
    session: SessionConfig | None = None,
) -> api.JoinSessionReply:
    """What is said of the session."""
    return api.JoinSessionReply(
        session_id=evil.session_id,
        config=wire_session.config_to_wire(session or evil.session),
        manifest=(manifest or evil.manifest).to_json(),
    )


def following(_real: Function) -> Function:
    """``Membership._refresh`` that goes on with whatever the session is by now."""

    def refresh(self: Any) -> Any:
        self.member = self._ask()
        return self.member

    return refresh


@attack(
    threat="session-changed",
    reason="session-changed",
    weakening=replaced("client_sdk.membership:Membership._refresh", following),
)
def changed_session(scene: Scene) -> bool:
    """a joined a session of four silos at least; when its update is made, it is one of three, with
    two colluders.
    """
    loose = make_session()
    strict = replace(loose, min_cohort=4)
    with EvilCoordinator(scene, loose, colluders="cd") as evil:
        evil.session_hash = transcript.session_hash(strict)
        evil.history = transcript.first_history(evil.session_hash)
        joined = list[SiloId]()

        def join(silo: SiloId, _request: Any) -> api.JoinSessionReply:
            joined.append(silo)
            return joined_reply(evil, session=strict if joined.count(silo) == 1 else loose)

        evil.lies["JoinSession"] = join
        evil.start("a")
        return opens(Attempt(evil, "acd"), *"acd")


def posed(scene: Scene, key: Any) -> bool:
    """Open a sum in an attempt that this key signed."""
    with started(scene, make_session(), "d") as evil:
        attempt = Attempt(evil)
        tau0 = transcript.round_transcript(attempt.descriptor)
        signature = key(evil).sign(SIGN_DESCRIPTOR, tau0, b"")
        attempt.descriptor = replace(attempt.descriptor, signature=signature)
        return opens(attempt, *"abcd")


@attack(
    threat="stranger-as-coordinator",
    reason="descriptor-signature",
    weakening=without("descriptor-signature"),
)
def stranger_opens_an_attempt(scene: Scene) -> bool:
    """Somebody without a key of the consortium opens an attempt, and the sum."""
    return posed(scene, lambda _: IdentityKey.generate(os.urandom))


@attack(
    threat="stranger-as-coordinator",
    reason="descriptor-signature",
    weakening=without("descriptor-signature"),
)
def silo_opens_an_attempt(scene: Scene) -> bool:
    """A silo opens an attempt in the coordinator's place, under its own good key."""
    return posed(scene, lambda evil: evil.consortium.credentials("d").identity_key)


def no_attempt(_real: Function) -> Function:
    """``MemoryLedger.last_attempt`` of a silo that does not remember what it joined."""
    return lambda *_: (0, 0)


@attack(
    threat="descriptor-replay",
    reason="descriptor-replay",
    weakening=replaced("secagg.masking.ledger:MemoryLedger.last_attempt", no_attempt),
)
def replayed_descriptor(scene: Scene) -> bool:
    """The same attempt twice: a signs two sets of keys over one transcript, to be mixed at will."""
    with EvilCoordinator(scene, make_session(max_attempts=2), colluders="bcd") as evil:
        evil.start()
        attempt, a = Attempt(evil), silo_id("a")
        first = attempt.tell(a, attempt.descriptor)
        evil.abort(a)
        second = attempt.tell(a, attempt.descriptor)
        tau0, public = transcript.round_transcript(attempt.descriptor), evil.manifest.manifest.silos
        for advert in (first, second):
            verify(public[a], SIGN_ADVERTISE_KEYS, tau0, advert.body(), advert.signature)
        return first.mask_key != second.mask_key


@attack(threat="old-round", reason="descriptor-round", weakening=without("descriptor-round"))
def released_round(scene: Scene) -> bool:
    """Silos give their updates for round 2 to an attempt that says that it is one of round 1."""
    with EvilCoordinator(scene, make_session(), colluders="d", calls=2) as evil:
        later = {name: secret_values() for name in evil.values}
        for name in map(silo_id, "abc"):
            evil.start_one(name, values=[evil.values[name], later[name]])
        Attempt(evil).to_masked().conclude(*"abcd")
        evil.values = later
        return opens(Attempt(evil, number=2, round=1), *"abcd")
