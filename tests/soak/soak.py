"""The soak itself: start everybody, kill one of them a minute, look at all of them each second."""

from __future__ import annotations

import json
import os
import random
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from client_sdk.channel import Channel
from client_sdk.profile import load_profile
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
from secagg.demo.stage import ADMIN, CONSORTIUM, enrol, point_to
from secagg.pki.names import Role
from secagg.wire._pb import service_pb2 as api
from secagg.wire.session import config_to_wire
from tests.crash.harness import ROOT, Coordinator, Process, free_port

from . import gauge
from .oracle import BOUND
from .silo import Orders, session_name

LOOK_SECONDS = 1.0
END_SECONDS = 90.0
KEPT_SESSIONS = 4
MAX_SLOPE = 1.0
"""MiB of a coordinator's memory per 1,000 rounds."""
MAX_GROWN = 8
"""Descriptors by which a life may end above where it began: connections come and go."""
MAX_STATE = 32 * 2**20
"""Bytes of the coordinator's state: its log of 4 MiB, and what a few small sessions hold."""


@dataclass(frozen=True)
class Plan:
    """What to play.

    Args:
        minutes: how long.
        silos: how many, at least 4.
        drop: chance that a silo drops out of an attempt.
        kill_seconds: time between kills, if there was a result in between; every other one takes
            the coordinator.
        stretch: the last share of the time, in which the coordinator is let live.
        kills: at least so many, however long it takes.
        rounds: of each session.
        seed: of whom to kill, of drops and of the silos' values.
    """

    minutes: float
    silos: int = 5
    drop: float = 0.05
    kill_seconds: float = 60.0
    stretch: float = 0.5
    kills: int = 0
    rounds: int = 100
    seed: int = 1

    @property
    def names(self) -> list[str]:
        return [f"silo-{number}" for number in range(1, self.silos + 1)]

    @property
    def key(self) -> bytes:
        return self.seed.to_bytes(16, "big")


class _Coordinator(Coordinator):
    """Keeps few sessions, so that what it may hold is bounded and soon reached."""

    def __init__(self, place: Path, port: int, environment: dict[str, str]) -> None:
        super().__init__(place, port, [environment])
        with (place / "coordinator.toml").open("a") as config:
            config.write(f"[limits]\nmax_sessions = {KEPT_SESSIONS}\n")

    @property
    def pid(self) -> int | None:
        return None if self._process is None else self._process.pid


class _Silo(Process):
    """Started again at once when it was killed, by us or by itself."""

    def __init__(self, orders: Orders, environment: dict[str, str]) -> None:
        command = [sys.executable, "-m", "tests.soak.silo", str(orders.write())]
        super().__init__(command, [environment], Path(orders.root) / f"{orders.silo}.log")

    @property
    def pid(self) -> int | None:
        return None if self._process is None else self._process.pid

    def _begun(self, process: Any, began: float) -> None:
        """It is at work when it says so to the coordinator."""


@dataclass
class Seen:
    """What the silos wrote down, checked as it comes in.

    Args:
        results: (session, round) to (survivors, digest of the sum).
        times: when a result was first in a silo's hands, in order.
        failures: what must not have happened, in words.
    """

    results: dict[tuple[int, int], tuple[tuple[str, ...], str]] = field(default_factory=dict)
    times: list[float] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    checked: int = 0
    wrong: int = 0
    drops: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)

    def take(self, silo: str, record: dict[str, Any]) -> None:
        if "drop" in record:
            self.drops[f"{record['drop']} {'killed' if record['dies'] else 'left'}"] += 1
        elif "refused" in record:
            self.refused[record["refused"]] += 1
        else:
            self._check(silo, record)

    def _check(self, silo: str, record: dict[str, Any]) -> None:
        self.checked += 1
        place = (record["session"], record["round"])
        result = (tuple(record["survivors"]), record["digest"])
        if not record["right"]:
            self.wrong += 1
            self.failures.append(f"{silo} got a wrong sum over {result[0]} in {place}")
        if place not in self.results:
            self.results[place] = result
            self.times.append(record["at"])
        elif self.results[place] != result:
            self.failures.append(f"{silo} got {result} in {place}, another {self.results[place]}")

    def newest(self) -> tuple[int, int]:
        return max(self.results, default=(0, 0))

    def round_seconds(self) -> dict[str, float]:
        """From one result to the next, whatever was killed in between."""
        times = sorted(self.times)
        gaps = [after - before for before, after in pairwise(times)]
        if len(gaps) < 2:
            return {}
        cuts = statistics.quantiles(gaps, n=100, method="inclusive")
        return {"p50": cuts[49], "p99": cuts[98], "max": max(gaps)}


class Soak:
    """One soak in a directory of its own, which must be empty."""

    def __init__(self, root: Path, plan: Plan, tell: Callable[[str], None] = lambda line: None):
        self.root, self.plan, self.tell = root, plan, tell
        self.seen = Seen()
        self._chance = random.Random(plan.seed)
        self._offsets = dict.fromkeys(plan.names, 0)
        self._born: dict[int, int] = {}
        self._samples: dict[str, list[gauge.Sample]] = {}
        self._stored: list[dict[str, int]] = []
        self._kills: Counter[str] = Counter()
        self._sessions = 0
        self._deaths_at_stretch = -1
        enrol(root, plan.names, Protection.MASKED)
        port = free_port()
        point_to(root, [ADMIN, *plan.names], port)
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "GRPC_VERBOSITY": "NONE"}
        self._coordinator = _Coordinator(root, port, environment)
        self._silos = {
            name: _Silo(Orders(str(root), name, plan.key.hex(), plan.drop), environment)
            for name in plan.names
        }

    @property
    def _processes(self) -> dict[str, _Coordinator | _Silo]:
        return {"coordinator": self._coordinator, **self._silos}

    def run(self) -> dict[str, Any]:
        """Play, and return the report; its ``failures`` are empty if all went well."""
        began = time.monotonic()
        try:
            self._play(began)
        finally:
            for process in self._processes.values():
                process.give_up()
        self._read()
        return self._report(time.monotonic() - began)

    def _play(self, began: float) -> None:
        self._coordinator.start()
        self._coordinator.await_serving()
        self._admin = Channel(load_profile(self.root / ADMIN, role=Role.ADMIN), "Admin")
        try:
            self._open_sessions()
            for silo in self._silos.values():
                silo.start()
            self._watch(began, began + 60 * self.plan.minutes)
            self._end()
        finally:
            self._admin.close()

    def _watch(self, began: float, end: float) -> None:
        killing, telling = began + self.plan.kill_seconds, began
        results = 0
        while not self._failures():
            now = time.monotonic()
            if now >= end and self._kills.total() >= self.plan.kills:
                return
            self._read()
            self._open_sessions()
            self._look()
            if now >= killing and len(self.seen.results) > results:
                killing, results = now + self.plan.kill_seconds, len(self.seen.results)
                self._kill(spare=end - self.plan.stretch * (end - began) < now < end)
            if now >= telling:
                telling += 60.0
                self.tell(self._line(now - began))
            time.sleep(min(LOOK_SECONDS, self.plan.kill_seconds / 10))

    def _line(self, seconds: float) -> str:
        rounds, kills = len(self.seen.results), dict(self._kills)
        return (
            f"{seconds / 60:5.1f} min: {rounds} rounds, {self.seen.checked} sums checked, "
            f"{self.seen.wrong} wrong, drops {self.seen.drops.total()}, kills {kills}"
        )

    def _failures(self) -> list[str]:
        found = [f"{name}: {p.failure}" for name, p in self._processes.items() if p.failure]
        return self.seen.failures + found

    def _read(self) -> None:
        """Take what the silos have written down since the last time."""
        for name, offset in self._offsets.items():
            path = self.root / f"{name}.jsonl"
            if not path.exists():
                continue
            with path.open("rb") as file:
                file.seek(offset)
                whole, end, _ = file.read().rpartition(b"\n")
            self._offsets[name] += len(whole) + len(end)
            for line in whole.splitlines():
                self.seen.take(name, json.loads(line))

    def _open_sessions(self) -> None:
        """Have a session waiting while the newest is played."""
        number, done = self.seen.newest()
        if self._sessions >= 1 and (self._sessions > number or 2 * done < self.plan.rounds):
            return
        self._sessions += 1
        request = api.CreateSessionRequest(
            config=config_to_wire(self._config(self._sessions)), key=os.urandom(16)
        )
        self._admin.call("CreateSession", request, api.CreateSessionReply)
        self._mark("oldest", str(max(1, self._sessions - 1)))

    def _mark(self, name: str, text: str = "") -> None:
        temporary = self.root / f"{name}.new"
        temporary.write_text(text)
        temporary.rename(self.root / name)

    def _config(self, number: int) -> SessionConfig:
        task = TaskConfig(
            name=session_name(number),
            weighting=Weighting.SUM,
            rounds=self.plan.rounds,
            ring_bits=64,
            bound=BOUND,
            clip=Clip.NONE,
            weight_cap=1.0,
        )
        return SessionConfig(
            name=session_name(number),
            consortium=CONSORTIUM,
            silos=tuple(silo_id(name) for name in self.plan.names),
            protection=Protection.MASKED,
            colluders=1,
            threshold=ThresholdRule(2, 3),
            min_cohort=3,
            mask_prg=MaskPrg.AES_128_CTR,
            tasks=(task,),
            chunk_bytes=256,
            train_deadline=0.5,
            phase_deadline=1.0,
        )

    def _look(self) -> None:
        for name, process in self._processes.items():
            if process.pid is None:
                continue
            rounds = len(self.seen.results)
            age = rounds - self._born.setdefault(process.pid, rounds)
            sample = gauge.look(process.pid, age, rounds)
            if sample is not None:
                self._samples.setdefault(name, []).append(sample)
        places = {"coordinator": self._coordinator.state}
        places |= {name: self.root / name / "state" for name in self.plan.names}
        self._stored.append({name: gauge.stored(place)[0] for name, place in places.items()})

    def _kill(self, *, spare: bool) -> None:
        """The coordinator and a silo in turn; in the last stretch, silos alone."""
        turn = self._kills["coordinator"] <= self._kills["silo"] and not spare
        name = "coordinator" if turn else self._chance.choice(self.plan.names)
        self._kills["coordinator" if turn else "silo"] += 1
        self._processes[name].kill()

    def _end(self) -> None:
        """Have the silos stop by ending what they take part in; everybody must end well."""
        self._mark("closed")
        for number in {self._sessions - 1, self._sessions} - {0}:
            request = api.AbortSessionRequest(name=session_name(number))
            self._admin.call("AbortSession", request, api.Ack)
        end = time.monotonic() + END_SECONDS
        for name, silo in self._silos.items():
            if not silo.ended(max(0.0, end - time.monotonic())):
                self.seen.failures.append(f"{name} does not end")
        self._look()
        self._coordinator.stop()

    # The report.

    def _report(self, seconds: float) -> dict[str, Any]:
        judged = self._judged()
        return {
            "minutes": round(seconds / 60, 2),
            "silos": self.plan.silos,
            "rounds": len(self.seen.results),
            "sessions": self._sessions,
            "sums_checked": self.seen.checked,
            "wrong_sums": self.seen.wrong,
            "kills": dict(self._kills),
            "drops": {"total": self.seen.drops.total(), **sorted_counts(self.seen.drops)},
            "without_a_silo": sum(
                len(survivors) < self.plan.silos for survivors, _ in self.seen.results.values()
            ),
            "refused": sorted_counts(self.seen.refused),
            "round_seconds": self.seen.round_seconds(),
            **judged,
            "failures": self._failures() + _grown(judged),
        }

    def _judged(self) -> dict[str, Any]:
        samples = self._samples["coordinator"]
        last = [s for s in samples if s.pid == samples[-1].pid]
        return {
            "coordinator": gauge.held(samples),
            "last_life": gauge.held(last) | {"rounds": last[-1].rounds - last[0].rounds},
            "each_minute": [
                {"rounds": s.rounds, "rss_kib": s.rss, "fds": s.fds} for s in samples[::60]
            ],
            "silo": {name: gauge.held(self._samples.get(name, [])) for name in self.plan.names},
            "state_bytes": {
                name: {"first": sizes[0], "last": sizes[-1], "max": max(sizes)}
                for name in ("coordinator", *self.plan.names)
                if (sizes := [look[name] for look in self._stored])
            },
        }


def _grown(judged: dict[str, Any]) -> list[str]:
    """What grew with the rounds and must not."""
    slope = judged["last_life"]["slope_mib_per_1000_rounds"]
    failures = []
    if slope is not None and slope >= MAX_SLOPE:
        failures.append(f"coordinator: memory grows by {slope:.2f} MiB per 1,000 rounds")
    for name, held in {"coordinator": judged["coordinator"], **judged["silo"]}.items():
        grown = held["fds"]["grown"]
        if grown is not None and grown > MAX_GROWN:
            failures.append(f"{name}: {grown} descriptors more at a life's end")
    state = judged["state_bytes"]["coordinator"]
    if state["max"] > MAX_STATE:
        failures.append(f"coordinator: {state['max']} bytes of state")
    return failures


def sorted_counts(counts: Counter[str]) -> dict[str, int]:
    return dict(sorted(counts.items()))
