"""One run: a consortium, a session, faults for a while, then quiet, and what is demanded of it."""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import os
import random
import secrets
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import tenacity
from blake3 import blake3

from client_sdk import attempt as sdk_attempt
from client_sdk import membership as sdk_membership
from secagg.config import (
    Clip,
    MaskPrg,
    Protection,
    SessionConfig,
    TaskConfig,
    ThresholdRule,
    Weighting,
    silo_id,
)
from secagg.masking import client as core_client
from secagg.masking import server as core_server
from secagg.pki.credentials import save_manifest
from secagg.pki.manifest import SignedManifest
from secagg.pki.names import Role
from secagg.wire._pb import service_pb2 as api
from secagg.wire.session import config_to_wire

from .clock import Clock, Process
from .consortium import CONSORTIUM, SILOS, consortium
from .faults import Faults
from .network import Call, Network, Reply, Status
from .nodes import NAME, TASK, Coordinator, Place, Silo
from .witness import BASE, Trace, Witness

PATIENCE = 4000.0
"""Virtual seconds after the last fault, until a session that stands still counts as stuck."""
ATTEMPTS = 3
"""So many attempts may a further round take once all is well."""


@dataclass
class Report:
    """What a run was like.

    Args:
        seed: which run.
        hash: fingerprint of all that happened in it.
        rounds: results released.
        attempts: attempts opened.
        aborts: attempts that ended without a result.
        crashes: of silos and of the coordinator.
        faults: how often what happened, errors that silos saw included.
        held_back: the round after the faults waited, or waits, for the silos of a sum that was
            opened before, as the ledger demands.
        finished_within: attempts that the round after the faults took; None if it never ended.
        virtual_seconds: how long it took, by its own clock.
        violations: broken promises.
        trace: the run in words, where asked for.
    """

    seed: int
    hash: str
    rounds: int
    attempts: int
    aborts: int
    crashes: int
    faults: dict[str, int]
    held_back: bool
    finished_within: int | None
    virtual_seconds: float
    violations: list[str] = field(default_factory=list)
    trace: list[str] = field(default_factory=list)

    @property
    def live(self) -> bool:
        """Whether the round after the faults ended soon enough."""
        return self.finished_within is not None and self.finished_within <= ATTEMPTS

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def simulate(seed: int, *, trace: bool = False) -> Report:
    """Play a seed."""
    consortium()
    world = World(seed, trace=trace)
    with _isolated(world):
        world.play()
    return world.report()


class World:
    """One run's nodes, and the plan of its faults."""

    def __init__(self, seed: int, *, trace: bool = False) -> None:
        self.seed = seed
        self.rng = random.Random(seed)
        self.clock = Clock()
        self.trace = Trace([] if trace else None)
        self.faults = Faults.draw(self.rng)
        self.config = self._configure()
        mean = self.config.tasks[0].weighting is Weighting.MEAN
        weights = self._draw_weights(mean=mean)
        self.witness = Witness(self.trace, self._update, weights, mean=mean)
        place = Place(
            seed, self.clock, self.rng, self.faults, self.trace, self.witness, consortium()
        )
        self.network = Network(self.clock, self.rng, self.faults, self.trace)
        self.coordinator = Coordinator(place)
        self.network.arrive = self.coordinator.arrive
        self.silos = [Silo(name, place, self.network, self) for name in self.config.silos]
        self.quiet_at: float | None = None
        self._end = self.rng.uniform(60.0, 400.0)
        self._before_quiet: set[tuple[int, int]] = set()
        self._goal = 0
        self._finished: int | None = None
        self._results = 0

    def _configure(self) -> SessionConfig:
        rng = self.rng
        mean = rng.random() < 0.5
        self.words = rng.randint(4, 30)
        self.troubled_rounds = rng.choice((1, 1, 2))
        self.has_weights = rng.random() < 0.3
        task = TaskConfig(
            name=TASK,
            weighting=Weighting.MEAN if mean else Weighting.SUM,
            rounds=self.troubled_rounds + 1,
            ring_bits=rng.choice((32, 64)),
            bound=2.0**26,
            clip=Clip.NONE,
            weight_cap=2.0 if mean else 1.0,
        )
        return SessionConfig(
            name=NAME,
            consortium=CONSORTIUM,
            silos=tuple(silo_id(name) for name in SILOS[: rng.choice((3, 4, 4, 5))]),
            protection=Protection.MASKED,
            colluders=1,
            threshold=ThresholdRule(2, 3),
            min_cohort=3,
            mask_prg=rng.choice((MaskPrg.AES_128_CTR, MaskPrg.CHACHA20)),
            tasks=(task,),
            chunk_bytes=rng.choice((64, 128)),
            train_deadline=rng.choice((30.0, 90.0, 200.0)),
            phase_deadline=rng.choice((5.0, 20.0, 45.0)),
        )

    def _draw_weights(self, *, mean: bool) -> dict[str, float]:
        return {name: float(self.rng.choice((1, 2))) if mean else 1.0 for name in self.config.silos}

    def _update(self, silo: str, number: int, version: int) -> np.ndarray[Any, Any]:
        """Whole numbers whose sum over any subset tells which it is."""
        data = blake3(f"{self.seed}/{silo}/{number}/{version}".encode()).digest(length=self.words)
        update = np.frombuffer(data, np.uint8).astype(np.int64)
        update[0] = version * BASE ** self.config.silos.index(silo_id(silo))
        return update

    # The plan.

    def play(self) -> None:
        """Run it to its end."""
        clock, rng = self.clock, self.rng
        clock.after(0.0, self.coordinator.start)
        clock.after(0.1, self._create)
        for silo in self.silos:
            clock.after(rng.uniform(0.2, 10.0), silo.start)
        self._plan(self._end)
        clock.after(self._end, self._become_quiet)
        clock.run()
        self._judge()

    def _plan(self, end: float) -> None:
        faults, rng = self.faults, self.rng
        plan: list[tuple[int, Callable[[], None]]] = [
            (faults.cuts, self._cut),
            (faults.kills, lambda: self.coordinator.kill("killed between calls")),
            (faults.silo_kills, lambda: rng.choice(self.silos).kill("killed as it waits")),
            (faults.full, self._fill),
        ]
        for count, fault in plan:
            for _ in range(count):
                when = end * rng.random() ** 2  # more of it while the first rounds run
                self.clock.after(when, functools.partial(self._if_on, fault))

    def _if_on(self, fault: Callable[[], None]) -> None:
        if self.faults.on:
            fault()

    def _cut(self) -> None:
        silo = self.rng.choice(self.silos).name
        self.network.cut_until[silo] = self.clock.now + self.rng.expovariate(1 / 30)
        self.trace.event(self.clock.now, silo, "is cut off")

    def _fill(self) -> None:
        machine: Silo | Coordinator = self.rng.choice([self.coordinator, *self.silos])
        machine.full_until = self.clock.now + self.rng.expovariate(1 / 20)
        self.faults.count("full disk")
        self.trace.event(self.clock.now, "a disk", "is full")

    def _create(self) -> None:
        """The admin creates the session, with one key however often it takes."""
        request = api.CreateSessionRequest(config=config_to_wire(self.config), key=b"created")

        def answer(reply: Reply) -> None:
            if reply.status is not Status.OK:
                self.clock.after(3.0, self._create)

        data = request.SerializeToString()
        self.coordinator.arrive(Call("admin", Role.ADMIN, "CreateSession", data, answer))

    # The quiet after the faults.

    def seconds_until(self, number: int) -> float:
        """When a silo may begin its call of this number: one round is left for quiet times."""
        if number <= self.troubled_rounds:
            return 0.0
        return max(0.0, self._end + 0.1 - self.clock.now)

    def _become_quiet(self) -> None:
        self.faults.stop()
        self.network.cut_until.clear()
        self.trace.event(self.clock.now, "world", "all faults stop")
        machines: list[Silo | Coordinator] = [self.coordinator, *self.silos]
        for machine in machines:
            machine.full_until = 0.0
            if machine.process is None:
                machine.start()
            elif isinstance(machine.process, Process):
                machine.process.spare()
        self.quiet_at = self.clock.now
        self._before_quiet = set(self.witness.attempts)
        self._goal = self._released() + 1
        self._look()

    def _released(self) -> int:
        session = self.coordinator.session
        if session is not None:
            self._results = len(session.results)
        return self._results

    def _look(self) -> None:
        """See whether the round after the faults has its result, and everybody has that."""
        assert self.quiet_at is not None
        new = self.witness.attempts - self._before_quiet
        if self._finished is None and self._released() >= self._goal:
            self._finished = len({a for a in new if a[0] <= self._goal})
        everybody = all(self._goal in self.witness.got[silo.name] for silo in self.silos)
        patience = PATIENCE if self._finished is None else 2 * PATIENCE
        late = self.clock.now > self.quiet_at + patience
        late |= self._finished is None and len(new) > 12
        if (self._finished is not None and everybody) or late:
            self.clock.over = True
        else:
            self.clock.after(1.0, self._look)

    def _judge(self) -> None:
        for silo in self.silos:
            self.witness.read_ledger(silo.name, silo.platter.content("ledger.jsonl"))
        self.witness.finish()
        missing = [s.name for s in self.silos if self._goal not in self.witness.got[s.name]]
        if self._finished is not None and missing:
            self.witness.fail(f"round {self._goal} was released and never reached {missing}")

    def _held_back(self) -> bool:
        """Whether silos refused in quiet times, so that the round was not over soon."""
        soon = self._finished is not None and self._finished <= ATTEMPTS
        quiet = self.quiet_at if self.quiet_at is not None else math.inf
        return not soon and any(silo.refused_at >= quiet for silo in self.silos)

    def report(self) -> Report:
        """Say what it was like."""
        faults = self.faults.counts
        return Report(
            seed=self.seed,
            hash=self.trace.digest(),
            rounds=self._released(),
            attempts=len(self.witness.attempts),
            aborts=len(self.witness.aborts),
            crashes=faults["silo crash"] + faults["coordinator crash"],
            faults=dict(sorted(faults.items())),
            held_back=self._held_back(),
            finished_within=self._finished,
            virtual_seconds=round(self.clock.now, 3),
            violations=self.witness.violations,
            trace=self.trace.lines or [],
        )


# What a run must not touch, and what it may remember.


class _Time:
    """The run's clock in the place of the ``time`` module."""

    def __init__(self, world: World) -> None:
        self._world = world

    def monotonic(self) -> float:
        return self._world.clock.now

    def sleep(self, seconds: float) -> None:
        ident = threading.get_ident()
        for silo in self._world.silos:
            process = silo.process
            if process is not None and process.fiber is not None and process.fiber.ident == ident:
                self._world.clock.sleep(process, seconds)
                return
        raise AssertionError("nobody sleeps here")


def _forbidden(world: World, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
    def guard(*args: Any, **kwargs: Any) -> Any:
        if threading.get_ident() in world.clock.threads:
            raise AssertionError(f"{name} was used in a simulation")
        return real(*args, **kwargs)

    return guard


FORBIDDEN: tuple[tuple[Any, str], ...] = (
    (os, "urandom"),
    (secrets, "token_bytes"),
    (secrets, "token_hex"),
    (secrets, "randbits"),
    (random, "random"),
    (random, "uniform"),
    (time, "time"),
    (time, "monotonic"),
    (time, "sleep"),
    (uuid, "uuid4"),
)


class _Manifests:
    """In ``SignedManifest``'s place for silos: what was parsed once is not parsed again."""

    from_json = staticmethod(functools.lru_cache(SignedManifest.from_json))


@functools.lru_cache
def _saved(directory: Path, signed: bytes) -> SignedManifest:
    return save_manifest(directory, _Manifests.from_json(signed))


def _save(directory: Path, signed: SignedManifest) -> SignedManifest:
    assert signed is _Manifests.from_json(consortium().signed)
    return _saved(directory, consortium().signed)


@functools.lru_cache(maxsize=20_000)
def _verified(check: Callable[..., None], *args: Any) -> None:
    check(*args)


@contextlib.contextmanager
def _isolated(world: World) -> Iterator[None]:
    """Take real time and chance away, give retries the run's, check no signature twice."""
    real_take = sdk_attempt._Attempt._take

    def take(attempt: Any, event: Any) -> bool:
        went_on = real_take(attempt, event)
        if not went_on:
            process = attempt._submission.channel.process
            world.witness.out(process, attempt._descriptor.round, attempt._descriptor.attempt)
        return went_on

    verify = functools.partial(_verified, core_client.verify)
    changes: list[tuple[Any, str, Any]] = [
        (owner, name, _forbidden(world, name, getattr(owner, name))) for owner, name in FORBIDDEN
    ]
    changes += [
        (tenacity, "time", _Time(world)),
        (tenacity.nap, "time", _Time(world)),
        (tenacity.wait, "random", world.rng),
        (sdk_attempt._Attempt, "_take", take),
        (sdk_membership, "SignedManifest", _Manifests),
        (sdk_membership, "save_manifest", _save),
        (core_client, "verify", verify),
        (core_server, "verify", verify),
        (logging.getLogger("client_sdk"), "disabled", True),
    ]
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in changes]
    try:
        for owner, name, value in changes:
            setattr(owner, name, value)
        yield
    finally:
        for owner, name, value in before:
            setattr(owner, name, value)
