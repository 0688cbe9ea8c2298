"""The soak itself: start everybody, kill one of them a minute, look at all of them each second."""

from __future__ import annotations

import json
import os
import random
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
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
from secagg.pki.profile import POLICY, write_policy
from secagg.suite import Suite
from secagg.wire._pb import service_pb2 as api
from secagg.wire.session import config_to_wire
from tests.crash.harness import ROOT, Coordinator, Process, free_port

from . import gauge, verdict
from .oracle import bound, protection
from .silo import Orders, session_name

LOOK_SECONDS = 1.0
END_SECONDS = 90.0
KEPT_SESSIONS = 4
KILLED_SHARE = 0.2
"""Of the drops, how many are a death; the rest leave, which costs the others no deadline."""
PATIENCE = 3.0
"""How many times as long as planned a soak goes on at most, for a life that is long enough."""


@dataclass(frozen=True)
class Plan:
    """What to play.

    Args:
        minutes: how long.
        silos: how many, at least 4.
        drop: chance that a silo drops out of an attempt.
        kill_seconds: time between kills, if there was a result in between; every other one takes
            the coordinator.
        stretch: the last share of the time, in which the coordinator and the first silo, which
            never dies of itself, are let live.
        kills: at least so many, however long it takes.
        life: least rounds of these two's last lives, in a soak that is long enough to judge
            memory; it goes on until then.
        rounds: of each session; a sealed one has fewer.
        sealed_every: of so many sessions, at least 3, one is sealed: ckks+masked.
        seed: of whom to kill, of drops and of the silos' values.
    """

    minutes: float
    silos: int = 5
    drop: float = 0.05
    kill_seconds: float = 60.0
    stretch: float = 0.6
    kills: int = 0
    life: int = gauge.WARM_ROUNDS + gauge.MEASURED_ROUNDS + 100
    rounds: int = 100
    sealed_every: int = 5
    seed: int = 1

    @property
    def names(self) -> list[str]:
        return [f"silo-{number}" for number in range(1, self.silos + 1)]

    @property
    def key(self) -> bytes:
        return self.seed.to_bytes(16, "big")

    @property
    def steady(self) -> str:
        """The silo that is let live in the last stretch."""
        return self.names[0]

    @property
    def judges_memory(self) -> bool:
        return self.minutes >= verdict.LONG_MINUTES

    def protection(self, number: int) -> Protection:
        return protection(number, self.sealed_every)

    def rounds_of(self, number: int) -> int:
        """Of a session by its number."""
        return max(1, self.rounds // 5) if self.protection(number).seals else self.rounds

    def orders(self, root: Path, name: str) -> Orders:
        """What a silo is told."""
        dies = 0.0 if name == self.steady else KILLED_SHARE
        return Orders(str(root), name, self.key.hex(), self.drop, dies, self.sealed_every)


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
        holders: (session, round) to who has written its result down.
        skipped: silo and session that it was away from, so that it is not there any more.
        locked_out: silo and sealed session that was over before it had the key again.
        times: when a result was first in a silo's hands, in order.
        failures: what must not have happened, in words.
    """

    results: dict[tuple[int, int], tuple[tuple[str, ...], str]] = field(default_factory=dict)
    holders: dict[tuple[int, int], set[str]] = field(default_factory=dict)
    skipped: set[tuple[str, int]] = field(default_factory=set)
    locked_out: set[tuple[str, int]] = field(default_factory=set)
    times: list[float] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    checked: int = 0
    wrong: int = 0
    sealed: int = 0
    drops: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)

    def take(self, silo: str, record: dict[str, Any]) -> None:
        if "drop" in record:
            self.drops[f"{record['drop']} {'killed' if record['dies'] else 'left'}"] += 1
        elif "refused" in record:
            self.refused[record["refused"]] += 1
        elif "skipped" in record:
            self.skipped |= {(silo, session) for session in record["skipped"]}
        elif "locked_out" in record:
            self.locked_out.add((silo, record["locked_out"]))
        else:
            self._check(silo, record)

    def _check(self, silo: str, record: dict[str, Any]) -> None:
        self.checked += 1
        place = (record["session"], record["round"])
        result = (tuple(record["survivors"]), record["digest"])
        self.holders.setdefault(place, set()).add(silo)
        if not record["right"]:
            self.wrong += 1
            self.failures.append(f"{silo} got a wrong sum over {result[0]} in {place}")
        if place not in self.results:
            self.results[place] = result
            self.times.append(record["at"])
            self.sealed += record["sealed"]
        elif self.results[place] != result:
            self.failures.append(f"{silo} got {result} in {place}, another {self.results[place]}")

    def missing(self, before: int) -> Iterator[str]:
        """Survivors without their result, in sessions with smaller numbers."""
        excused = self.skipped | self.locked_out
        for (session, number), (survivors, _) in self.results.items():
            for silo in sorted(set(survivors) - self.holders[session, number]):
                if session < before and (silo, session) not in excused:
                    yield f"{silo} in session {session}, round {number}"

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
        enrol(root, plan.names, Protection.MASKED)
        for name in plan.names:
            (root / name / POLICY).unlink()
            write_policy(root / name)  # which allows sealed sessions, too
        port = free_port()
        point_to(root, [ADMIN, *plan.names], port)
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "GRPC_VERBOSITY": "NONE"}
        self._coordinator = _Coordinator(root, port, environment)
        self._silos = {name: _Silo(plan.orders(root, name), environment) for name in plan.names}

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
            lived = self._lived() or now >= began + PATIENCE * (end - began)
            if now >= end and lived and self._kills.total() >= self.plan.kills:
                return
            self._read()
            self._open_sessions()
            self._look()
            if now >= killing and len(self.seen.results) > results:
                killing, results = now + self.plan.kill_seconds, len(self.seen.results)
                stretched = end - self.plan.stretch * (end - began) < now
                self._kill(spare=stretched and self.plan.stretch > 0)
            if now >= telling:
                telling += 60.0
                self.tell(self._line(now - began))
            time.sleep(min(LOOK_SECONDS, self.plan.kill_seconds / 10))

    def _lived(self) -> bool:
        """Whether there are lives long enough to judge their memory, if that is judged."""
        if not self.plan.judges_memory:
            return True
        lives = [self._last_life(name) for name in ("coordinator", self.plan.steady)]
        return all(life and life[-1].age >= self.plan.life for life in lives)

    def _last_life(self, name: str) -> list[gauge.Sample]:
        samples = self._samples.get(name, [])
        return [s for s in samples if s.pid == samples[-1].pid]

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
        if self._sessions >= 1 and (
            self._sessions > number or 2 * done < self.plan.rounds_of(number)
        ):
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
        how = self.plan.protection(number)
        task = TaskConfig(
            name=session_name(number),
            weighting=Weighting.SUM,
            rounds=self.plan.rounds_of(number),
            ring_bits=None if how.seals else 64,
            bound=bound(how),
            clip=Clip.NONE,
            weight_cap=1.0,
        )
        return SessionConfig(
            name=session_name(number),
            consortium=CONSORTIUM,
            silos=tuple(silo_id(name) for name in self.plan.names),
            protection=how,
            suite=Suite.CKKS_54 if how.seals else None,
            colluders=1,
            threshold=ThresholdRule(2, 3),
            min_cohort=3,
            mask_prg=MaskPrg.AES_128_CTR,
            tasks=(task,),
            chunk_bytes=2**16 if how.seals else 256,
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
        """The coordinator and a silo in turn; in the last stretch, silos but the first alone."""
        turn = self._kills["coordinator"] <= self._kills["silo"] and not spare
        name = "coordinator" if turn else self._chance.choice(self.plan.names[spare:])
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
        report = self._counted() | self._held() | {"minutes": round(seconds / 60, 2)}
        return report | {"failures": self._failures() + verdict.failures(report)}

    def _counted(self) -> dict[str, Any]:
        """What was played, and what befell it."""
        return {
            "plan": asdict(self.plan),
            "steady": self.plan.steady,
            "rounds": len(self.seen.results),
            "sealed_rounds": self.seen.sealed,
            "sessions": self._sessions,
            "sums_checked": self.seen.checked,
            "wrong_sums": self.seen.wrong,
            "missing": list(self.seen.missing(self._sessions - 1)),
            "skipped": [f"{silo} in session {n}" for silo, n in sorted(self.seen.skipped)],
            "locked_out": [f"{silo} in session {n}" for silo, n in sorted(self.seen.locked_out)],
            "kills": dict(self._kills),
            "deaths": {
                "coordinator": self._coordinator.deaths,
                "silo": sum(silo.deaths for silo in self._silos.values()),
            },
            "drops": {"total": self.seen.drops.total(), **sorted_counts(self.seen.drops)},
            "without_a_silo": sum(
                len(survivors) < self.plan.silos for survivors, _ in self.seen.results.values()
            ),
            "refused": sorted_counts(self.seen.refused),
            "round_seconds": self.seen.round_seconds(),
        }

    def _held(self) -> dict[str, Any]:
        """What the processes held meanwhile."""
        samples, last = self._samples["coordinator"], self._last_life("coordinator")
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


def sorted_counts(counts: Counter[str]) -> dict[str, int]:
    return dict(sorted(counts.items()))
