"""Which plans a matrix has, and running them in several worker processes.

Kill points are numbers of calls, chosen from one undisturbed run: every kind of call on every kind
of file at least once, the rest spread evenly. Threads race, so the same number may be a
neighbouring call in the next run; each verdict says which call it really was.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import queue
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from .harness import LIMIT_SECONDS, ROOT, Plan, Template, Verdict, run_plan
from .shim import SYNCS, Call
from .witness import Record

TARGETS = ("coordinator", "silo", "recovery")
GIVE_UP_SECONDS = LIMIT_SECONDS + 60
TORN_SHARE = 5


def choose(calls: Sequence[Call], number: int) -> list[Call]:
    """Kill points: each pattern's first call, the last call, and an even spread over the rest."""
    if not calls or number <= 0:
        return []
    chosen = {calls[-1].index: calls[-1]}
    for pattern in dict.fromkeys(call.pattern for call in calls):
        first = next(call for call in calls if call.pattern == pattern)
        chosen.setdefault(first.index, first)
    rest = [call for call in calls if call.index not in chosen]
    wanted = min(max(number - len(chosen), 0), len(rest))
    for place in range(wanted):
        call = rest[place * len(rest) // wanted]
        chosen[call.index] = call
    return [chosen[index] for index in sorted(chosen)]


def plans_at(target: str, points: Iterable[Call]) -> list[Plan]:
    """Before and after each point, and some of the writes torn."""
    points = list(points)
    plans = [Plan(target, side, c.index) for c in points for side in ("before", "after")]
    writes = [call for call in points if "write" in call.op and call.size > 1]
    step = max(1, len(writes) * TORN_SHARE // max(len(points), 1))
    return plans + [Plan(target, "torn", call.index) for call in writes[::step]]


def random_plans(number: int, seed: int, spans: dict[str, float]) -> list[Plan]:
    """Kills at random moments of a session; a coordinator's more often than a silo's."""
    chance = random.Random(seed)
    plans = []
    for _ in range(number):
        target = "coordinator" if chance.random() < 0.65 else "silo"
        plans.append(Plan(target, "at", round(chance.uniform(0, 1.2 * spans[target]), 1)))
    return plans


def window(calls: Iterable[Call], records: Sequence[Record], first: str, then: str) -> list[Call]:
    """The syncs of round 1 between the first message of one kind and the first of another."""

    def begins(kind: str) -> int:
        return min(r["nanoseconds"] for r in records if (r["kind"], r["round"]) == (kind, 1))

    end = max(r["nanoseconds"] for r in records) + 1
    stop = (
        begins(then)
        if then
        else min((r["nanoseconds"] for r in records if r["round"] == 2), default=end)
    )
    return [c for c in calls if c.op in SYNCS and begins(first) <= c.nanoseconds < stop]


class Pool:
    """Workers that run plans, one each at a time.

    Args:
        template: the consortium.
        runs: directory for the runs.
        jobs: how many workers.
    """

    def __init__(self, template: Template, runs: Path, jobs: int) -> None:
        self.template, self.runs, self.jobs = template, runs, jobs

    def run(
        self, plans: Sequence[Plan], tell: Callable[[Verdict], None] = lambda verdict: None
    ) -> list[Verdict]:
        """Run all plans; verdicts in their order."""
        waiting: queue.SimpleQueue[tuple[int, Plan]] = queue.SimpleQueue()
        for item in enumerate(plans):
            waiting.put(item)
        verdicts: dict[int, Verdict] = {}

        def work() -> None:
            with _Worker(self.template, self.runs) as worker:
                while True:
                    try:
                        number, plan = waiting.get_nowait()
                    except queue.Empty:
                        return
                    verdicts[number] = worker.run(plan)
                    tell(verdicts[number])

        threads = [threading.Thread(target=work, daemon=True) for _ in range(self.jobs)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return [verdicts[number] for number in range(len(plans))]

    def count(self, targets: Sequence[str] = TARGETS) -> dict[str, Verdict]:
        """One undisturbed run each, with its calls.

        Raises:
            AssertionError: not even that went well.
        """
        verdicts = self.run([Plan(target, "count") for target in targets])
        for verdict in verdicts:
            assert not verdict.failures, f"{verdict.plan}: {verdict.failures}"
        return dict(zip(targets, verdicts, strict=True))


class _Worker:
    """A process that runs plans from its standard input, in a process group of its own."""

    def __init__(self, template: Template, runs: Path) -> None:
        self._command = [sys.executable, "-m", "tests.crash", "--worker"]
        self._command += [str(template.root), str(runs)]
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> _Worker:
        return self

    def __exit__(self, *error: object) -> None:
        self._end()

    def _begin(self) -> subprocess.Popen[str]:
        return subprocess.Popen(
            self._command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=ROOT,
            env=dict(os.environ) | {"PYTHONPATH": str(ROOT), "GRPC_VERBOSITY": "NONE"},
            text=True,
            start_new_session=True,
        )

    def _end(self) -> None:
        """End the worker and, with its group, what it left running."""
        process, self._process = self._process, None
        if process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    pipe.close()

    def run(self, plan: Plan) -> Verdict:
        """Run one plan; a worker that says nothing for too long is a failure, too."""
        if self._process is None:
            self._process = self._begin()
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        watchdog = threading.Timer(GIVE_UP_SECONDS, process.kill)
        watchdog.daemon = True
        watchdog.start()
        try:
            process.stdin.write(f"{plan}\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except BrokenPipeError:
            line = ""
        finally:
            watchdog.cancel()
        if not line:
            self._end()
            return Verdict(str(plan), ["the harness's worker died or hung"])
        return _verdict(json.loads(line))


def serve(template: Path, runs: Path) -> None:
    """What a worker does: a plan a line in, a verdict a line out."""
    out = os.dup(1)
    os.dup2(2, 1)  # whatever prints must not get between the verdicts
    for line in sys.stdin:
        plan = Plan.parse(line.strip())
        place = runs / f"{str(plan).replace(':', '-')}-{os.getpid()}-{time.monotonic_ns()}"
        verdict = run_plan(Template(template), place, plan)
        if verdict.failures:
            verdict.failures.append(f"its files are in {place}")
        os.write(out, json.dumps(_table(verdict)).encode() + b"\n")


def _table(verdict: Verdict) -> dict[str, Any]:
    table = dataclasses.asdict(verdict)
    if Plan.parse(verdict.plan).side != "count":
        table["calls"], table["records"] = [], []
    return table


def _verdict(table: dict[str, Any]) -> Verdict:
    table["calls"] = [Call(**call) for call in table["calls"]]
    return Verdict(**table)
