"""Phases 3 to 5: silos that are shown different sets, so that they open what none of them would.

With 2t > n + n_c two views alone never give both secrets of one silo; what a round without the
consistency check still gives away is a sum over fewer than t silos: ``thin_sum`` mixes six views of
four survivors into the sum of two honest silos (Bonawitz et al. 2017, section 6.2).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from secagg.config import SiloId, ThresholdRule, silo_id
from secagg.crypto.digest import vector_digest
from secagg.crypto.keys import KeyPair
from secagg.masking import client
from secagg.masking.messages import Consistency, MaskedInput, Signatures, Unmasking
from threat_model.attacks.attack import Scene, attack
from threat_model.attacks.attempt import Attempt
from threat_model.attacks.evil_coordinator import EvilCoordinator, make_session
from threat_model.attacks.sight import KEY
from threat_model.attacks.weak import Function, replaced, without

VIEWS: Mapping[str, str] = {"a": "abef", "b": "abdf", "c": "abcf", "d": "abdf", "e": "abef"}
"""n = 6, t = 4, f a colluder: c, d and e are each missing from at least three honest views."""
SHIFT = 2**24
Choose = Callable[[SiloId, Mapping[SiloId, Consistency], Attempt], Signatures]


@contextmanager
def six(scene: Scene) -> Iterator[tuple[EvilCoordinator, Attempt]]:
    """Five honest silos and f have sent their vectors; t is 4."""
    session = make_session("abcdef", threshold=ThresholdRule(1, 2))
    with EvilCoordinator(scene, session, colluders="f") as evil:
        evil.start()
        attempt = Attempt(evil).to_masked()
        assert attempt.descriptor.threshold == 4
        yield evil, attempt


@contextmanager
def four(scene: Scene, **changes: Any) -> Iterator[tuple[EvilCoordinator, Attempt]]:
    """Three honest silos and d have sent their vectors; t is 3."""
    with EvilCoordinator(scene, make_session(**changes), colluders="d") as evil:
        evil.start()
        yield evil, Attempt(evil).to_masked()


def thin_sum(scene: Scene, choose: Choose) -> bool:
    """Open the sum of a and b (and the colluder's own vector) where t is 4."""
    with six(scene) as (evil, attempt):
        views = {silo_id(name): attempt.survivors(*view) for name, view in VIEWS.items()}
        signed = {name: attempt.tell(name, view) for name, view in views.items()}
        for name in views:
            attempt.tell(name, choose(name, signed, attempt))
        return evil.reads(attempt.total("abf"), "a", "b", "f")


@attack(
    threat="split-survivors",
    reason="consistency-signature",
    weakening=without("consistency-signature"),
)
def split_survivors(scene: Scene) -> bool:
    """Each silo is shown signatures of its survivors, over what those were shown."""

    def choose(name: SiloId, signed: Mapping[SiloId, Consistency], attempt: Attempt) -> Signatures:
        view = attempt.survivors(*VIEWS[name])
        others = {**signed, silo_id("f"): attempt.forge("f", view)}
        return Signatures(tuple(others[silo_id(signer)] for signer in VIEWS[name]))

    return thin_sum(scene, choose)


@attack(
    threat="split-survivors",
    reason="consistency-duplicate",
    weakening=without("consistency-duplicate"),
)
def copied_signature(scene: Scene) -> bool:
    """Each silo is shown t copies of its own signature, as if t silos had seen what it saw."""

    def choose(name: SiloId, signed: Mapping[SiloId, Consistency], attempt: Attempt) -> Signatures:
        return Signatures((signed[name],) * attempt.descriptor.threshold)

    return thin_sum(scene, choose)


@attack(
    threat="split-survivors",
    reason="consistency-threshold",
    weakening=without("consistency-threshold"),
)
def few_signatures(scene: Scene) -> bool:
    """Each silo is shown its own signature and the colluder's: two, where t is 4."""

    def choose(name: SiloId, signed: Mapping[SiloId, Consistency], attempt: Attempt) -> Signatures:
        view = attempt.survivors(*VIEWS[name])
        return Signatures((signed[name], attempt.forge("f", view)))

    return thin_sum(scene, choose)


@attack(
    threat="split-survivors",
    reason="consistency-threshold",
    weakening=without("consistency-threshold"),
)
def one_signature_short(scene: Scene) -> bool:
    """The colluder's signature and one silo's open that silo's shares: t − 1, and nobody else has
    seen these survivors.
    """
    with four(scene) as (_, attempt):
        survivors = attempt.survivors(*"abcd")
        signed = attempt.tell("a", survivors)
        shown = Signatures((signed, attempt.forge("d", survivors)))
        assert len(shown.signed) == attempt.descriptor.threshold - 1
        return isinstance(attempt.tell("a", shown), Unmasking)


@attack(
    threat="split-survivors", reason="consistency-signer", weakening=without("consistency-signer")
)
def signer_who_is_no_survivor(scene: Scene) -> bool:
    """The colluder is not in the sum, and makes up the number of those who signed it."""
    with EvilCoordinator(scene, make_session("abcde"), colluders="e") as evil:
        evil.start()
        attempt = Attempt(evil).to_masked()
        assert attempt.descriptor.threshold == 4
        survivors = attempt.survivors(*"abcd")
        signed = [attempt.tell(name, survivors) for name in "abc"]
        shown = Signatures((*signed, attempt.forge("e", survivors)))
        return isinstance(attempt.tell("a", shown), Unmasking)


@attack(
    threat="signature-replay",
    reason="consistency-signature",
    weakening=without("consistency-signature"),
)
def replayed_signatures(scene: Scene) -> bool:
    """In a second attempt only a is shown survivors, and signatures of the first attempt's."""
    with four(scene, max_attempts=2) as (evil, attempt):
        survivors = attempt.survivors(*"abcd")
        signed = Signatures(tuple(attempt.tell(name, survivors) for name in "abcd"))
        evil.abort(*"abc")
        second = Attempt(evil, number=2).to_masked()
        second.tell("a", second.survivors(*"abcd"))
        return isinstance(second.tell("a", signed), Unmasking)


def going_back(real: Function) -> Function:
    """``client_sdk.attempt._Attempt._in`` of a silo that can be asked for any step again."""

    def enter(self: Any, kind: type) -> Any:
        kept = self.__dict__.setdefault("kept", {})
        kept[type(self._state)] = self._state
        return replace(kept[kind], _once=client._Once()) if kind in kept else real(self, kind)

    return enter


@attack(
    threat="second-survivor-set",
    reason="event-order",
    weakening=replaced("client_sdk.attempt:_Attempt._in", going_back),
)
def second_survivor_set(scene: Scene) -> bool:
    """Each silo is asked to sign every view that it is in, so that each view has its t signatures;
    then each reveals for one of them, and the sum of two silos opens.
    """
    with six(scene) as (evil, attempt):
        signed: dict[str, dict[str, Consistency]] = {view: {} for view in VIEWS.values()}
        for name, own in VIEWS.items():
            for view in sorted(signed, key=lambda view: view == own):
                if name in view:
                    signed[view][name] = attempt.tell(name, attempt.survivors(*view))
        for name, own in VIEWS.items():
            colluder = attempt.forge("f", attempt.survivors(*own))
            attempt.tell(name, Signatures((*signed[own].values(), colluder)))
        return evil.reads(attempt.total("abf"), "a", "b", "f")


def another_chance(real: Function) -> Function:
    """``client_sdk.attempt._Attempt._take`` of a silo that stays in the attempt it refused."""

    def take(self: Any, event: Any) -> bool:
        before = self._state
        if not real(self, event) and before is not None:
            self._state = replace(before, _once=client._Once())
        return True

    return take


@attack(
    threat="second-survivor-set",
    reason="consistency-threshold",
    weakening=replaced("client_sdk.attempt:_Attempt._take", another_chance),
)
def signatures_after_a_refusal(scene: Scene) -> bool:
    """A coordinator that was refused tries other signatures, and others, until some are good."""
    with four(scene) as (evil, attempt):
        survivors = attempt.survivors(*"abcd")
        signed = Signatures(tuple(attempt.tell(name, survivors) for name in "abcd"))
        evil.put_event(silo_id("a"), Signatures(()))
        return isinstance(attempt.tell("a", signed), Unmasking)


@attack(
    threat="few-survivors",
    reason="survivors-threshold",
    weakening=without(
        "survivors-threshold", "survivors-floor", "survivors-own", "consistency-threshold"
    ),
)
def few_survivors(scene: Scene) -> bool:
    """The survivors are a and the colluder, whose vector is taken from the sum: a is read."""
    with four(scene) as (evil, attempt):
        survivors = attempt.survivors("a", "d")
        signed = {name: attempt.tell(name, survivors) for name in "abc"}
        for name in "abc":
            attempt.tell(name, Signatures((signed["a"], attempt.forge("d", survivors))))
        return evil.reads(attempt.total("ad"), "a", "d")


@attack(
    threat="few-survivors",
    reason="survivors-own",
    weakening=without("survivors-own", "masked-input-signature"),
)
def replaced_commit(scene: Scene) -> bool:
    """Another vector stands under a's name, and all silos open a sum that has it."""
    with four(scene) as (evil, attempt):
        a, delta = silo_id("a"), attempt.ring.zeros(evil.codec.length)
        delta[0] = SHIFT
        attempt.ring.add(attempt.uploads[a], delta)
        words = attempt.ring.pack(attempt.uploads[a])
        commit = attempt.commits[a]
        digest = vector_digest(words, evil.session.chunk_bytes)
        attempt.commits[a] = MaskedInput(a, digest, (), commit.signature)
        total = attempt.open(*"abcd")
        return not evil.reads(total, *"abcd") and evil.reads(total - delta, *"abcd")


def by_signers(real: Function) -> Function:
    """``masking.client.check_consistency`` of a silo that takes who signed for who survived."""

    def check(state: Any, signatures: Signatures) -> Any:
        signers = tuple(sorted(signed.sender for signed in signatures.signed))
        return replace(real(state, signatures), survivors=signers)

    return check


@attack(
    threat="all-keys-rebuilt",
    reason="only-self-seeds",
    weakening=replaced("secagg.masking.client:check_consistency", by_signers),
)
def key_of_a_survivor(scene: Scene) -> bool:
    """The coordinator leaves a's signature out, and asks for a's mask key as for a dropout's."""
    with four(scene) as (_, attempt):
        survivors = attempt.survivors(*"abcd")
        signed = {name: attempt.tell(name, survivors) for name in "abcd"}
        shown = Signatures(tuple(signed[name] for name in "bcd"))
        for name in "abc":
            attempt.tell(name, shown)
        a = silo_id("a")
        if attempt.shares(a, KEY).keys() == attempt.colluders.keys():
            raise scene.refuse("only-self-seeds", "a", "nobody honest gave a share of its key")
        rebuilt = KeyPair.from_private(attempt.secret("a", KEY))
        return rebuilt.public == attempt.adverts[a].mask_key
