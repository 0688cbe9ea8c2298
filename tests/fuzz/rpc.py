"""Mutated calls over real mutual TLS, while honest silos aggregate: ``python -m tests.fuzz.rpc``.

A real ``secagg serve`` process; silos ``a``, ``b`` and ``c`` with the SDK, who aggregate without
end in one session; and ``d``, a silo of the same session, under whose certificate mutated requests
are fired at every method of both services, as they are under an admin's. Requests are recorded from
honest silos, in a masked and in a sealed session, and go on being recorded meanwhile: ``d``
aggregates, too, with its real keys, so that there are mutations of what it says in the very phase
that an attempt is in. They are of fields, of bytes, or of the method. What ``d`` itself says in an
attempt is changed before it is signed, too, and so comes to what lies behind the signature's check
(``insider``).

What must hold: the process lives and logs no internal error; every call ends with a reply or with
a status that the product documents, and with its stable code; no lie is believed; its memory stops
growing; and every round of the honest silos gives the exact sum of its survivors. What shows that
all this was tried: rounds kept pace with the calls, every method was served, and there were
refusals from behind the signature.

One thing is never sent, since it is the admin's right and would end the test: an ``AbortSession``
that names one of the two honest sessions.
"""

from __future__ import annotations

import argparse
import json
import logging
import re
import shutil
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import linear_regression
from typing import Any

import grpc

from benchmarks.memory import resident
from secagg.config import Protection
from secagg.coordinator.calls import METHODS, How
from secagg.pki.names import Role
from secagg.wire._pb import service_pb2 as api
from secagg.wire.session import config_to_wire
from tests.coordinator.serving import Consortium, Server, code_of, serving
from tests.sdk.federation import bounded, make_session, make_sum, settle

from .honest import Rounds
from .insider import CODES, Insider
from .requests import Call, Mutator, Recorder

HONEST, MALLORY = ("a", "b", "c"), "d"
DOCUMENTED = frozenset(
    {
        grpc.StatusCode.UNAUTHENTICATED,
        grpc.StatusCode.PERMISSION_DENIED,
        grpc.StatusCode.ALREADY_EXISTS,
        grpc.StatusCode.INVALID_ARGUMENT,
        grpc.StatusCode.FAILED_PRECONDITION,
        grpc.StatusCode.ABORTED,
        grpc.StatusCode.NOT_FOUND,
        grpc.StatusCode.RESOURCE_EXHAUSTED,
    }
)
"""Of secagg.coordinator.status, but UNAVAILABLE: nothing is stopping and the disk has space."""
IN_FLIGHT = 48
WAIT_SECONDS, CALL_SECONDS = 0.25, 60.0
WARM_UP = 2
"""Tenths of the calls before memory is compared with."""
GROWTH_MEBIBYTES = 64
LEAK_BYTES = 512
"""Of memory that a call may keep, by the slope over the calls: results and sessions stay, too."""
MANY_CALLS = 10_000
"""Fewer say nothing of a slope, nor do they come to every method's replies."""
CALLS_A_ROUND = 250
"""Calls wait for the honest silos' rounds, so that they meet all phases of many attempts."""
UNSERVED = frozenset({"AskCheckpoint", "OfferCheckpoint", "AwaitKeyRequests"})
"""Methods that have nothing to give here, where no silo comes back without its keys."""
_BAD = re.compile(r'"(error|critical)"|Traceback')
SETTINGS: dict[str, Any] = {
    "log_level": "warning",
    "max_sessions": 24,
    "max_weights_bytes": 2**20,
    "calls_per_second": 1e6,
    "calls_burst": 10**7,
    "calls_at_once": 5000,
    "streams_per_connection": 5000,
}
"""Quotas of calls are out of the way: what is tested lies behind them."""


@dataclass
class Report:
    """What became of the calls.

    Args:
        statuses: how many calls ended with each.
        codes: and with each stable code.
        undocumented: calls that ended as no call may, the first few.
        served: how many calls of each method got a reply.
        behind: codes that properly signed messages ended with.
        believed: lies that were accepted.
        rss_mebibytes: the server's memory, after every tenth of the calls.
    """

    seed: int
    calls: int = 0
    seconds: float = 0.0
    statuses: Counter[str] = field(default_factory=Counter)
    codes: Counter[str] = field(default_factory=Counter)
    methods: Counter[str] = field(default_factory=Counter)
    undocumented: list[str] = field(default_factory=list)
    served: Counter[str] = field(default_factory=Counter)
    behind: Counter[str] = field(default_factory=Counter)
    believed: list[str] = field(default_factory=list)
    fired: int = 0
    rounds_exact: int = 0
    rss_mebibytes: list[float] = field(default_factory=list)
    log_errors: list[str] = field(default_factory=list)
    lives: bool = False

    @property
    def growth(self) -> float:
        """MiB that the server's memory grew by after the warm-up."""
        return self.rss_mebibytes[-1] - self.rss_mebibytes[WARM_UP]

    @property
    def leak(self) -> float | None:
        """Bytes of memory a call after the warm-up, by least squares; None: too few calls."""
        if self.fired < MANY_CALLS:
            return None
        points = self.rss_mebibytes[WARM_UP:]
        slope = linear_regression(range(len(points)), points).slope
        return slope * 2**20 / (self.fired / 10)

    @property
    def failures(self) -> list[str]:
        """What did not hold, or was not tried."""
        wrong = {
            "the coordinator died": not self.lives,
            "undocumented": bool(self.undocumented),
            "log": bool(self.log_errors),
            "believed": bool(self.believed),
            "rounds": self.rounds_exact < max(1, self.fired // CALLS_A_ROUND),
            "growth": self.growth >= GROWTH_MEBIBYTES,
            "leak": self.leak is not None and self.leak >= LEAK_BYTES,
            "nothing signed was taken": not self.behind["OK"],
        }
        unserved = METHODS.keys() - self.served.keys() - UNSERVED
        unseen = CODES - self.behind.keys()
        return [
            *(what for what, is_so in wrong.items() if is_so),
            *(f"never served: {name}" for name in sorted(unserved) if self.fired >= MANY_CALLS),
            *(f"never refused: {code}" for code in sorted(unseen)),
        ]

    @property
    def passed(self) -> bool:
        """Whether all held that must."""
        return not self.failures

    def text(self) -> str:
        """The report as JSON."""
        found = {
            "passed": self.passed,
            "failures": self.failures,
            "growth_mebibytes": round(self.growth, 1),
            "leak_bytes_a_call": self.leak,
        }
        return json.dumps(found | vars(self), indent=1)


class Fire:
    """Sends calls, several at once, and judges how they end."""

    def __init__(self, server: Server, report: Report) -> None:
        self._report = report
        self._slots = threading.Semaphore(IN_FLIGHT)
        self._lock = threading.Lock()
        members = {Role.SILO: server.silo(MALLORY), Role.ADMIN: server.boss}
        services = {name: method.role for name, method in METHODS.items()}
        self._stubs = {
            (role, name): stub.method(
                name, "Admin" if services[name] is Role.ADMIN else "Aggregation"
            )
            for role, stub in members.items()
            for name in METHODS
        }

    def send(self, role: Role, call: Call) -> Any:
        """Send a call as soon as few enough are in flight; returns its future."""
        self._slots.acquire()
        seconds = WAIT_SECONDS if METHODS[call.method].how is How.WAITS else CALL_SECONDS
        future = self._stubs[role, call.method].future(call.data, timeout=seconds)
        future.add_done_callback(lambda done: self._landed(role, call, done))
        return future

    def say(self, call: Call) -> str:
        """Send a silo's call and wait for its end; returns its code, or OK."""
        refusal = self.send(Role.SILO, call).exception()
        return "OK" if refusal is None else code_of(refusal) or refusal.code().name

    def drain(self) -> None:
        """Wait until no call is in flight."""
        for _ in range(IN_FLIGHT):
            self._slots.acquire()
        self._slots.release(IN_FLIGHT)

    def _landed(self, role: Role, call: Call, done: Any) -> None:
        try:
            with self._lock:
                self._note(role, call, done)
        finally:
            self._slots.release()

    def _note(self, role: Role, call: Call, done: Any) -> None:
        status, code = done.code(), None
        report = self._report
        if status is grpc.StatusCode.OK:
            report.served[call.method] += 1
        else:
            code = code_of(done)
        report.calls += 1
        report.statuses[status.name] += 1
        report.methods[call.method] += 1
        report.codes[code or "none"] += 1
        if not _allowed(call, status, code) and len(report.undocumented) < 20:
            text = f"{role} {call.method} {status.name} {code} {done.details()}: {call.data.hex()}"
            report.undocumented.append(text[:3000])


def _allowed(call: Call, status: grpc.StatusCode, code: str | None) -> bool:
    """A reply; a refusal with its code; or the end of our own patience with a call that waits."""
    if status is grpc.StatusCode.OK:
        return True
    waits = METHODS[call.method].how is How.WAITS
    if status is grpc.StatusCode.DEADLINE_EXCEEDED and code is None:
        return waits
    return status in DOCUMENTED and code is not None


def mebibytes(server: Server) -> float:
    """What the server's process has in memory."""
    return round(resident("VmRSS", server.process.pid) / 2**20, 1)


def profiles(consortium: Consortium, server: Server) -> dict[str, Path]:
    """The silos' profiles, complete with the coordinator's address."""
    return {
        silo: settle(consortium.path(Role.SILO, silo), server.address)
        for silo in (*HONEST, MALLORY)
    }


def create(server: Server, protection: Protection) -> str:
    """An honest admin's session of all silos; its deadlines are short, as one silo misbehaves."""
    config = make_session(
        make_sum(bound=1024.0, rounds=10**6),
        protection=protection,
        max_attempts=10**6,
        train_deadline=0.3,
        phase_deadline=2.0,
    )
    request = api.CreateSessionRequest(config=config_to_wire(config))
    server.boss.admin("CreateSession", request)
    return config.name


def play(
    server: Server, silos: dict[str, Path], names: list[str], recorder: Recorder, place: Path
) -> list[Rounds]:
    """Two honest rounds of every session; returns the meddled silo's, which go on without end.

    It joins first, and so proposes the task: there is an honest proposal in its name.
    """
    meddled = []
    for name in names:
        own = place / f"{MALLORY}-{name}"  # a process has one session at a time in a directory
        shutil.copytree(silos[MALLORY], own)
        proposals = len(recorder.first["ProposeTask"])
        meddled.append(Rounds(name, {MALLORY: own}, stubborn=True))
        bounded("proposal", lambda n=proposals: len(recorder.first["ProposeTask"]) > n or None)
        Rounds(name, {silo: silos[silo] for silo in HONEST}, count=2).join(CALL_SECONDS)
    _ask_as_admin(server, names, recorder.first)
    return meddled


def _ask_as_admin(server: Server, names: list[str], first: dict[str, list[bytes]]) -> None:
    """An honest admin's requests."""
    first["AbortSession"].append(api.AbortSessionRequest(name="other").SerializeToString())
    first["ListSessions"].append(b"")
    for name in names:
        request = _show(name)
        first["ShowSession"].append(request.SerializeToString())
        config = server.boss.admin("ShowSession", request).config
        for number in range(4):
            config.name = f"other-{number}"
            create = api.CreateSessionRequest(config=config, key=bytes((number,)))
            first["CreateSession"].append(create.SerializeToString())


def fuzz(seed: int, calls: int, place: Path, say: Callable[[str], None] = lambda _: None) -> Report:
    """Fire calls at a new coordinator in a folder while honest silos aggregate there."""
    consortium, report, recorder = Consortium(place), Report(seed), Recorder()
    with serving(consortium, place / "serve", **SETTINGS) as server:
        silos, fire = profiles(consortium, server), Fire(server, report)
        names = [create(server, kind) for kind in (Protection.MASKED, Protection.CKKS_MASKED)]
        insider = Insider(MALLORY, seed, fire.say)
        with recorder.listening(), insider.at_work():
            meddled: list[Rounds] = []
            try:
                meddled = play(server, silos, names, recorder, place)
                rounds = Rounds(names[0], {silo: silos[silo] for silo in HONEST})
                ids = [server.boss.admin("ShowSession", _show(name)).session_id for name in names]
                mutator = Mutator(seed, recorder, MALLORY, set(names), ids)
                _fire(server, fire, mutator, rounds, report, calls, say)
            finally:  # nobody goes on without the sessions
                for name in names:
                    server.boss.admin("AbortSession", api.AbortSessionRequest(name=name))
            report.rounds_exact = rounds.join(CALL_SECONDS)
            for each in meddled:
                each.join(CALL_SECONDS)
        report.behind, report.believed = insider.codes, insider.believed
    log = server.log.decode().splitlines()
    report.log_errors = [line for line in log if _BAD.search(line)][:20]
    return report


def _show(name: str) -> api.ShowSessionRequest:
    return api.ShowSessionRequest(name=name)


def _fire(
    server: Server,
    fire: Fire,
    mutator: Mutator,
    rounds: Rounds,
    report: Report,
    calls: int,
    say: Callable[[str], None],
) -> None:
    began = time.monotonic()
    for number in range(calls):
        fire.send(*mutator.next())
        report.fired += 1
        rounds.reach(report.fired // CALLS_A_ROUND, CALL_SECONDS)
        if number % max(1, calls // 10) == 0:
            report.rss_mebibytes.append(mebibytes(server))
            say(f"{number} calls, {rounds.exact} rounds, {report.rss_mebibytes[-1]} MiB")
    fire.drain()
    report.seconds = round(time.monotonic() - began, 1)
    report.rss_mebibytes.append(mebibytes(server))
    report.lives = server.process.poll() is None


def main() -> int:
    """Fire as many calls as are asked for; 1 if something did not hold."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.rpc")
    parser.add_argument("--calls", type=int, default=50_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path, help="where to write the report")
    arguments = parser.parse_args()
    logging.disable()
    with tempfile.TemporaryDirectory(prefix="secagg-fuzz-") as folder:
        report = fuzz(arguments.seed, arguments.calls, Path(folder), print)
    text = report.text()
    if arguments.json:
        arguments.json.write_text(text + "\n")
    print(text)
    return 0 if report.passed else 1


if __name__ == "__main__":
    sys.exit(main())
