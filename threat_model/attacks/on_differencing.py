"""Two sums of the same updates whose survivors differ by little: subtraction reads what is between.

Source: So et al., Securing Secure Aggregation (arXiv 2106.03328); decision record 0001.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from secagg.config import MaskPrg, silo_id
from secagg.masking import transcript
from secagg.masking.ledger import MemoryLedger
from secagg.masking.messages import Result, Signatures
from secagg.ring.vectors import Vector
from secagg.wire import session as wire_session
from secagg.wire._pb import service_pb2 as api
from threat_model.attacks.attack import Scene, attack
from threat_model.attacks.attempt import Attempt
from threat_model.attacks.evil_coordinator import EvilCoordinator, make_session, secret_values
from threat_model.attacks.on_models import proposal
from threat_model.attacks.weak import Function, replaced

HONEST = "abcd"
REST = "bcde"


def without_memory(_real: Function) -> Function:
    """A ledger's question that nothing is ever known of."""
    return lambda *_: None


def a_fewer(evil: EvilCoordinator, between: Callable[[], Any]) -> bool:
    """Open a sum, and then one without a: whether the difference is a's update."""
    first = Attempt(evil).to_masked().open(*HONEST, "e")
    between()
    second = Attempt(evil, REST, number=2).to_masked().open(*REST)
    return evil.reads(first - second, "a")


@attack(
    threat="retry-differencing",
    reason="differencing",
    weakening=replaced("secagg.masking.ledger:MemoryLedger.revealed", without_memory),
)
def retried_without_a(scene: Scene) -> bool:
    """The coordinator has the sum, says that the attempt failed, and has another one without a."""
    session = make_session("abcde", max_attempts=2)
    with EvilCoordinator(scene, session, colluders="e") as evil:
        evil.start()
        return a_fewer(evil, lambda: evil.abort(*HONEST))


def forgetful(_real: Function) -> Function:
    """``client_sdk.ledger.FileLedger._load`` that finds nothing: memory ends with the process."""

    def load(self: Any) -> None:
        self._memory, self._sound = MemoryLedger(), True

    return load


@attack(
    threat="retry-differencing",
    reason="differencing",
    weakening=replaced("client_sdk.ledger:FileLedger._load", forgetful),
)
def retried_after_a_restart(scene: Scene) -> bool:
    """As retried-without-a, and all silos restart in between."""
    with EvilCoordinator(scene, make_session("abcde"), colluders="e") as evil:
        evil.start()

        def restart() -> None:
            evil.end(*HONEST)
            for name in "bcd":
                evil.start_one(silo_id(name), again=True)

        return a_fewer(evil, restart)


def two_sessions(scene: Scene, **changes: Any) -> bool:
    """Open a sum in one session, and one without a in another, of the same updates."""
    session = make_session("abcde")
    with EvilCoordinator(scene, session, colluders="e") as evil:
        evil.start()
        first = Attempt(evil).to_masked().open(*HONEST, "e")
    other = replace(session, **changes)
    with EvilCoordinator(scene, other, colluders="e", after=evil) as evil:
        for name in "bcd":
            evil.start_one(silo_id(name), again=True)
        second = Attempt(evil, REST).to_masked().open(*REST)
        return evil.reads(first - second, "a")


@attack(
    threat="same-base-other-session",
    reason="differencing",
    weakening=replaced("secagg.masking.ledger:MemoryLedger.revealed", without_memory),
)
def another_name(scene: Scene) -> bool:
    """The same training under another name, in which a is missing."""
    return two_sessions(scene, name=f"{make_session().name}-again")


def by_base(_real: Function) -> Function:
    """``client_sdk.past.Past.position`` that every result moves, whatever task it is of."""
    return lambda self, task, *_: self.base(task)


@attack(
    threat="denied-result",
    reason="differencing",
    weakening=replaced("client_sdk.past:Past.position", by_base),
)
def denied_result(scene: Scene) -> bool:
    """The coordinator has the sum and denies it. A made-up result of another task moves the base,
    and on the new one it has the same updates summed again, without a.
    """
    plain = make_session("abcde")
    other = replace(plain.tasks[0], name="other")
    session = replace(plain, tasks=(other, *plain.tasks))
    with EvilCoordinator(scene, session, colluders="e") as evil:
        opening = proposal(evil, "e", task=other.name)
        reply = api.OpenTaskReply(opening=opening)
        evil.lies["OpenTask"] = lambda _, asked: reply if asked.task == other.name else None
        evil.start()
        first = Attempt(evil).to_masked().open(*HONEST, "e")
        task = wire_session.opening_from_wire(opening).opening.digest(evil.session_hash)
        silos, base = (silo_id("e"),), transcript.base_of(evil.history, task)
        made_up = evil.sign_result(
            Result(other.name, 1, base, silos, silos, bytes(32), bytes(32), bytes(64))
        )
        for name in HONEST:
            evil.put_event(silo_id(name), made_up)
        evil.move_on(made_up)
        second = Attempt(evil, REST).to_masked().open(*REST)
        return evil.reads(first - second, "a")


def nothing_joined(_real: Function) -> Function:
    """``MemoryLedger.session_ids`` of a silo that does not remember sessions by their names."""
    return lambda *_: frozenset()


@attack(
    threat="session-replaced",
    reason="policy-session-name",
    weakening=replaced("secagg.masking.ledger:MemoryLedger.session_ids", nothing_joined),
)
def replaced_session(scene: Scene) -> bool:
    """A session of other parameters, hence of another base, under the name that silos restart with:
    it has the same updates summed again, without a.
    """
    return two_sessions(scene, mask_prg=MaskPrg.CHACHA20)


@attack(
    threat="changed-update",
    reason="differencing-update",
    weakening=replaced("secagg.masking.ledger:MemoryLedger.update_at", without_memory),
)
def changed_update(scene: Scene) -> bool:
    """The others open a sum that a is in; a, which revealed nothing and has lost what it submitted,
    comes back with another update, and the same survivors are summed again.
    """
    a, sums = silo_id("a"), list[Vector]()
    with EvilCoordinator(scene, make_session("abcde", max_attempts=2), colluders="e") as evil:
        evil.start()
        before = evil.values[a]
        for number in (1, 2):
            attempt = Attempt(evil, number=number).to_masked()
            survivors = attempt.survivors(*HONEST, "e")
            signed = [attempt.tell(name, survivors) for name in (*HONEST, "e")]
            for name in REST:
                attempt.tell(name, Signatures(tuple(signed)))
            sums.append(attempt.total((*HONEST, "e")))
            if number == 1:
                evil.end("a")
                for kept in evil.place("a").rglob("update-*"):
                    kept.unlink()
                evil.values[a] = secret_values()
                evil.start_one(a, again=True)
                evil.abort(*"bcd")
        one, two = (evil.codec.decode(total).tensors["x"] for total in sums)
        return bool(np.allclose(two - one, evil.values[a] - before, atol=0.01))
