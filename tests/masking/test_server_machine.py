"""Hypothesis drives ``ServerRound``: honest and lying clients, any order, resends, early and late.

Whatever comes, the result is the exact sum of the survivors, or ``RoundAborted``; a refusal changes
nothing; nobody honest is ever named; no honest client finds fault with the server.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import Phase as HypothesisPhase
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from secagg.config import Phase, Protection, SiloId, ThresholdRule
from secagg.crypto.digest import vector_digest
from secagg.crypto.secret import Secret
from secagg.errors import (
    Conflict,
    FaultyClient,
    FaultyServer,
    RoundAborted,
    SecaggError,
    TooLate,
)
from secagg.masking import server as server_module
from secagg.masking.messages import (
    AdvertiseKeys,
    Consistency,
    MaskedInput,
    Result,
    ShareKeys,
    Unmasking,
)
from secagg.masking.server import ServerRound
from secagg.ring.vectors import PrimeRing

from .conftest import EXAMPLES
from .harness import (
    Play,
    flip,
    make_sealed_session,
    make_session,
    make_task,
    server_snapshot,
    signed,
    swap,
)

PHASES = list(Phase)
WHO = st.integers(0, 5)
HOW = st.integers(0, 3)
RINGS = (16, 32, 64, Protection.CKKS, Protection.CKKS_MASKED)


class Server(RuleBasedStateMachine):
    """One attempt with up to six silos, masked or sealed or both."""

    rings: tuple[int | Protection, ...] = RINGS

    def __init__(self) -> None:
        super().__init__()
        self.play = Play()
        self.guilty: set[SiloId] = set()
        self.accused: set[SiloId] = set()
        self.dead: set[SiloId] = set()
        self.held: list[Any] = []
        self.over = False

    @initialize(n=st.integers(3, 6), kind=st.integers(0, 29), half=st.booleans(), seed=HOW)
    def open(self, n: int, kind: int, half: bool, seed: int) -> None:
        rule_ = ThresholdRule(1, 2) if half else ThresholdRule(2, 3)
        ring = self.rings[kind % len(self.rings)]
        if isinstance(ring, Protection):
            session = make_sealed_session(n, ring, threshold=rule_)
        else:
            task = make_task(ring_bits=ring)
            session = make_session(n, threshold=rule_, tasks=(task,))
        self.play = Play(session, length=3, entropy=f"machine-{seed}")

    def someone(self, who: int) -> SiloId:
        names = self.play.session.silos
        return names[who % len(names)]

    def can_send(self, name: SiloId) -> bool:
        server = self.play.server
        return (
            server.phase is not None
            and name in server.expected
            and name not in self.dead
            and (name, server.phase) not in self.play.sent
        )

    def deliver(self, message: Any, vector: Any = None) -> None:
        """Give a message to the server; a refusal changes nothing and names nobody honest."""
        play, sender = self.play, message.sender
        if vector is None and isinstance(message, MaskedInput):
            vector = play.vectors[sender]
        before = server_snapshot(play.server)
        refusal: SecaggError | None = None
        taken = False
        try:
            taken = play.give(message, vector)
        except (FaultyClient, TooLate) as error:
            refusal = error
        if not taken:
            assert server_snapshot(play.server) == before
        if isinstance(refusal, FaultyClient):
            assert refusal.client == sender
            assert sender in self.guilty, f"{refusal} blames an honest silo"

    @rule(who=WHO, late=st.sampled_from([False, False, False, True]))
    def send(self, who: int, late: bool) -> None:
        """An honest message, at once or held back."""
        name = self.someone(who)
        if self.can_send(name):
            message = self.play.step(name)
            if late:
                self.held.append(message)
            else:
                self.deliver(message)

    @rule(leave=st.integers(0, 7))
    def all_send(self, leave: int) -> None:
        """Everybody sends who has not, but perhaps one."""
        for i, name in enumerate(self.play.session.silos):
            if i != leave and self.can_send(name):
                self.deliver(self.play.step(name))

    @rule(who=WHO, how=HOW, whom=WHO)
    def send_lie(self, who: int, how: int, whom: int) -> None:
        """A message that is wrong in some way."""
        name, victim = self.someone(who), self.someone(whom)
        if not self.can_send(name):
            return
        self.guilty.add(name)
        honest = self.play.step(name)
        lie, vector = self.altered(honest, how, victim)
        self.play.sent[name, self.play.server.phase or Phase.UNMASKING] = lie
        self.deliver(lie, vector)
        if isinstance(honest, AdvertiseKeys | ShareKeys | MaskedInput):
            accepted = self.play.server._accepted[PHASES[PHASES.index(self.phase_of(lie))]]
            if accepted.get(name) != lie:
                self.deliver(honest)  # it can still follow the protocol
                self.play.sent[name, self.phase_of(honest)] = honest

    def phase_of(self, message: Any) -> Phase:
        kinds = [AdvertiseKeys, ShareKeys, MaskedInput, Consistency, Unmasking]
        return PHASES[kinds.index(type(message))]

    def altered(self, message: Any, how: int, victim: SiloId) -> tuple[Any, Any]:
        play, name, tau = self.play, message.sender, self.play.taus[-1]
        if how == 0:
            return replace(message, signature=flip(message.signature)), None
        match message:
            case AdvertiseKeys():
                return signed(message, name, tau, mask_key=message.channel_key), None
            case ShareKeys():
                return self.misdealt(message, how), None
            case MaskedInput() if how == 1:
                return self.poisoned(message)
            case MaskedInput() if how == 2 and victim != name and play.session.protection.masks:
                self.accused.add(victim)
                done = signed(message, name, tau, bad_dealers=(victim,))
                state = play.states[name]
                held = {o: s for o, s in state.held.items() if o != victim}
                play.states[name] = replace(state, held=held, commit=done)
                return done, None
            case MaskedInput() if how == 2 and message.seed:
                return self.copied_seed(message, victim), None
            case MaskedInput() if how == 3 and message.seed:
                return self.no_residue(message)
            case MaskedInput():
                return message, play.vectors[name][:-1]
            case Unmasking():
                return self.lying(message, how), None
            case _:
                return signed(message, name, bytes(32)), None

    def misdealt(self, message: ShareKeys, how: int) -> ShareKeys:
        """Boxes that do not open, one fewer, or other commitments."""
        play, name = self.play, message.sender
        box = message.boxes[0]
        boxes: tuple[Any, ...] = swap(
            message.boxes, replace(box, sealed=flip(box.sealed)), "recipient"
        )
        if how == 2:
            boxes = message.boxes[1:]
        done = signed(message, name, play.taus[1], boxes=boxes)
        if how != 2:
            play.states[name] = replace(play.states[name], sent=done)
        assert isinstance(done, ShareKeys)
        return done

    def poisoned(self, message: MaskedInput) -> tuple[Any, Any]:
        """Another input than before, well committed to: it counts as this silo's."""
        play, name = self.play, message.sender
        play.vectors[name] += play.ring.dtype.type(3)
        play.inputs[name] = play.inputs[name] + play.ring.dtype.type(3)
        words = vector_digest(play.ring.pack(play.vectors[name]), play.session.chunk_bytes)
        done = signed(message, name, play.taus[-1], vector_digest=words)
        play.states[name] = replace(play.states[name], commit=done)
        return done, None

    def copied_seed(self, message: MaskedInput, victim: SiloId) -> Any:
        """Another silo's seed where it has sent one, and none at all else."""
        accepted = self.play.server._accepted[Phase.MASKED_INPUT].get(victim)
        seed = accepted.seed if isinstance(accepted, MaskedInput) else b""
        return signed(message, message.sender, self.play.taus[-1], seed=seed)

    def no_residue(self, message: MaskedInput) -> tuple[Any, Any]:
        """The same sum mod q or another, in a word that no ring holds; well committed to."""
        vector = self.play.vectors[message.sender].copy()
        vector[0] = 2**64 - 1
        words = vector_digest(self.play.ring.pack(vector), self.play.session.chunk_bytes)
        done = signed(message, message.sender, self.play.taus[-1], vector_digest=words)
        return done, vector

    def lying(self, message: Unmasking, how: int) -> Any:
        """One share too few, one that is wrong, or all."""
        if how == 1:
            return signed(message, message.sender, self.play.taus[3], shares=message.shares[1:])
        kept = message.shares[:-1] if how == 2 else ()
        shares = tuple(
            share if share in kept else replace(share, share=Secret(flip(share.share.reveal())))
            for share in message.shares
        )
        return signed(message, message.sender, self.play.taus[3], shares=shares)

    @rule(who=WHO, phase=st.sampled_from(PHASES))
    def resend(self, who: int, phase: Phase) -> None:
        """The very same message again."""
        name = self.someone(who)
        if (name, phase) in self.play.sent:
            self.deliver(self.play.sent[name, phase])

    @rule(who=WHO, phase=st.sampled_from(PHASES))
    def conflict(self, who: int, phase: Phase) -> None:
        """A second, different message after an accepted one."""
        name = self.someone(who)
        accepted = self.play.server._accepted[phase].get(name)
        if accepted is None:
            return
        before = server_snapshot(self.play.server)
        second = replace(accepted, signature=flip(accepted.signature))
        with pytest.raises(Conflict) as caught:
            self.play.accept(second)
        assert caught.value.client == name
        assert server_snapshot(self.play.server) == before

    @rule(who=WHO)
    def early(self, who: int) -> None:
        """A message of a later phase."""
        name, server = self.someone(who), self.play.server
        if server.phase in PHASES[:3]:
            self.guilty.add(name)
            self.deliver(signed(Consistency(name, bytes(64)), name, self.play.taus[-1]))

    @precondition(lambda self: self.held)
    @rule()
    def arrive(self) -> None:
        """A message that was held back."""
        self.deliver(self.held.pop(0))

    @rule(who=WHO)
    def die(self, who: int) -> None:
        """A silo falls silent for good."""
        if len(self.dead) < 2:
            self.dead.add(self.someone(who))

    @precondition(lambda self: not self.over)
    @rule()
    def go_on(self) -> None:
        """Everybody sends, and the phase closes."""
        self.close(True)

    @precondition(lambda self: not self.over)
    @rule()
    def go_on_twice(self) -> None:
        """Everybody sends, in two phases."""
        self.close(True)
        self.close(True)

    @rule(patient=st.sampled_from([True, True, True, False]))
    def close(self, patient: bool) -> None:
        """The phase's deadline falls; mostly after the others had their chance."""
        play = self.play
        if patient:
            self.all_send(7)
        phase = play.server.phase
        ended: SecaggError | None = None
        try:
            play.close()
        except (RoundAborted, TooLate) as error:
            ended = error
        assert isinstance(ended, TooLate) == (phase is None)
        self.over |= phase is None
        if isinstance(ended, RoundAborted):
            assert ended.phase == phase
            assert ended.have < ended.need
            assert set(ended.blamed) <= self.guilty | self.accused
            assert play.server.total is None
            self.over = True
        if isinstance(play.broadcast, Result):
            self.over = True

    @invariant()
    def exact_or_nothing(self) -> None:
        """A total is the survivors' exact sum, and there is one only with a result."""
        play, server = self.play, self.play.server
        assert server.liars <= self.guilty
        assert (server.total is not None) == isinstance(play.broadcast, Result)
        if server.total is not None:
            np.testing.assert_array_equal(server.total, play.total(server.survivors))
            assert len(server.survivors) >= max(server.threshold, play.session.min_cohort)

    def teardown(self) -> None:
        """Let the attempt come to its end."""
        try:
            while not self.over:
                self.close(True)
                self.exact_or_nothing()
        except SecaggError as error:  # an honest client refused, or the server misbehaved
            raise AssertionError(f"an honest silo met {error}") from error


class MaskedServer(Server):
    """Masked attempts."""

    rings = RINGS[:3]


class SealedServer(Server):
    """Attempts with updates that are sealed, and masked by nothing."""

    rings = (Protection.CKKS,)


def drive(examples: int, machine: type[Server] = Server, **options: Any) -> None:
    """Play so many attempts."""
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=examples,
            stateful_step_count=25,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            **options,
        ),
    )


def test_server_gives_the_exact_sum_or_aborts() -> None:
    drive(max(EXAMPLES // 5, 20))


def after_the_fact(patch: pytest.MonkeyPatch) -> None:
    """The message is kept before it is checked."""
    check = ServerRound._check_content

    def keep_first(self: ServerRound, message: Any, vector: Any) -> None:
        self._accepted[self.phase or Phase.UNMASKING][message.sender] = message
        check(self, message, vector)

    patch.setattr(ServerRound, "_check_content", keep_first)


MUTANTS: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "shares-not-checked": lambda p: p.setattr(ServerRound, "_is_committed", lambda *_: True),
    "signatures-not-checked": lambda p: p.setattr(ServerRound, "_check_signature", nothing),
    "phases-not-checked": lambda p: p.setattr(ServerRound, "_check_phase", nothing),
    "content-not-checked": lambda p: p.setattr(ServerRound, "_check_content", nothing),
    "kept-before-checked": after_the_fact,
    "orphans-forgotten": lambda p: p.setattr(server_module, "orphan_masks", lambda *_: []),
}


def nothing(*_: Any) -> None:
    """A check that is gone."""


SEALED_MUTANTS: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "seeds-not-checked": lambda p: p.setattr(ServerRound, "_check_seed", nothing),
    "residues-not-checked": lambda p: p.setattr(PrimeRing, "holds", lambda *_: True),
}
WEAKENED = [
    *(pytest.param(MaskedServer, weaken, id=name) for name, weaken in MUTANTS.items()),
    *(pytest.param(SealedServer, weaken, id=name) for name, weaken in SEALED_MUTANTS.items()),
]


@pytest.mark.parametrize(("machine", "weaken"), WEAKENED)
def test_server_machine_has_power(
    machine: type[Server], weaken: Callable[[pytest.MonkeyPatch], None]
) -> None:
    """The machine finds what one missing check does."""
    with pytest.MonkeyPatch.context() as patch:
        weaken(patch)
        with pytest.raises((AssertionError, ValueError, KeyError, FaultyServer, ExceptionGroup)):
            drive(
                2_000,
                machine,
                database=None,
                derandomize=True,
                report_multiple_bugs=False,
                phases=[HypothesisPhase.generate],
            )
