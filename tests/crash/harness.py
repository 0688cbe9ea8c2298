"""One run of the crash matrix: real processes, one of which dies at a chosen point; the verdict.

A run is named by its ``Plan``, for example ``coordinator:before:17``: in a coordinator's run the
silos are threads with the real SDK over real mTLS, and the coordinator is a process under the
shim, started again at once when it dies; in a silo's run silo d is such a process. ``recovery``
plans kill the coordinator in the middle of a round and then once more while it recovers.

What must hold afterwards is in ``_judge``: every round is the exact sum over its survivors and the
same at every silo, or it ended with an error that says why; nothing hangs; and the witness (what
the silos really sent) shows no key, message or opening that a crash made them do twice.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
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
from secagg.pki.authority import Authority
from secagg.pki.credentials import save_manifest
from secagg.pki.enrolment import create_request, install_bundle
from secagg.pki.names import Role
from secagg.pki.profile import write_policy, write_profile
from secagg.wire._pb import service_pb2 as api
from secagg.wire.session import config_to_wire

from . import witness
from .shim import Call, armed, build, read_log
from .silo import BOUND, SILOS, TASK, digits, exact_sum, hurry, take_part

ROOT = Path(__file__).absolute().parents[2]
LIMIT_SECONDS = 90.0
PATIENCE_SECONDS = 25.0
KILLED = "d"
ROUNDS = {"coordinator": 2, "recovery": 2, "silo": 7}
SIDES = ("before", "after", "torn", "at", "count")
TRIGGERS = ("masked_input", "consistency", "unmasking", "share_keys")
CLEAN = ("RoundAborted", "PolicyRefused", "TooLate", "SessionEnded", "StaleModel")


@dataclass(frozen=True)
class Plan:
    """Which process dies where.

    Args:
        target: coordinator, silo, or recovery (the coordinator, for the second time).
        side: before or after a call, torn inside it, at a time, or count for nobody at all.
        number: of the call; for ``at``, milliseconds after the session was created.
    """

    target: str
    side: str
    number: float = 0

    @classmethod
    def parse(cls, text: str) -> Plan:
        target, side, number = text.split(":")
        if target not in ("coordinator", "silo", "recovery") or side not in SIDES:
            raise ValueError(f"{text!r} is no plan")
        return cls(target, side, float(number))

    def __str__(self) -> str:
        return f"{self.target}:{self.side}:{self.number:g}"

    @property
    def at(self) -> str | None:
        """The shim's order."""
        return None if self.side in ("at", "count") else f"{self.side}:{self.number:g}"


@dataclass
class Verdict:
    """How a run went.

    Args:
        failures: what must not have happened.
        aborts: errors that a silo ended with and that are allowed.
        death: the call at which the process died, and what the silos had sent last.
        died: whether anything was killed at all.
        restarts: seconds from starting a killed coordinator to serving, each.
    """

    plan: str
    failures: list[str] = field(default_factory=list)
    aborts: list[str] = field(default_factory=list)
    death: str = ""
    died: bool = False
    restarts: list[float] = field(default_factory=list)
    seconds: float = 0.0
    play_ms: float = 0.0
    calls: list[Call] = field(default_factory=list)
    records: list[witness.Record] = field(default_factory=list)


class Template:
    """The consortium's directories, made once a test run and copied for each run."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.library = root / "killpoint.so"

    @classmethod
    def make(cls, root: Path) -> Template:
        """Enrol everybody, thirty days ago, and compile the shim."""
        now = datetime.now(UTC) - timedelta(days=30)
        authority = Authority.create(root / "authority", "hospitals", now=now)
        roles = dict.fromkeys(SILOS, Role.SILO)
        roles |= {"coordinator": Role.COORDINATOR, "admin": Role.ADMIN}
        for name, role in roles.items():
            request = create_request(root / name, role, name, authority.consortium, os.urandom)
            now = datetime.now(UTC)
            bundle = authority.approve(request, now=now)
            install_bundle(root / name, bundle, fingerprint=authority.fingerprint, now=now)
        for name in ("coordinator", *SILOS):
            save_manifest(root / name, authority.signed_manifest)
        build(root)
        return cls(root)

    def settle(self, place: Path, address: str) -> None:
        """Copy everybody's directory and write the files that an operator edits."""
        for name in (*SILOS, "coordinator", "admin"):
            shutil.copytree(self.root / name, place / name)
            if name != "coordinator":
                write_profile(place / name, address)
        for name in SILOS:
            write_policy(place / name)


def free_port() -> int:
    """A port below the ephemeral ones, so that no client can take it while a server is down."""
    for _ in range(200):
        port = random.randrange(10_000, 32_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise AssertionError("no free port")


class Process(ABC):
    """A process that is started again at once when it is killed.

    Args:
        command: what to run.
        environments: of its incarnations; the last one's is everybody's after that.
        log: gets what it prints.
    """

    def __init__(self, command: list[str], environments: list[dict[str, str]], log: Path) -> None:
        self.command, self.environments, self.log = command, environments, log
        self.deaths = 0
        self.died_at = 0
        self.failure = ""
        self.restarts: list[float] = []
        self.on_death: Callable[[], None] = lambda: None
        self._stopping = False
        self._stopped = threading.Event()
        self._process: subprocess.Popen[bytes] | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def kill(self) -> None:
        """Kill it now, as the machine's power would."""
        process = self._process
        if process is not None and process.poll() is None:
            process.send_signal(signal.SIGKILL)

    def ended(self, seconds: float) -> bool:
        """Wait until it has ended by itself."""
        return self._stopped.wait(seconds)

    def give_up(self) -> None:
        """End it by force, and start it no more."""
        self._stopping = True
        self.kill()
        self._stopped.wait(5)

    def _run(self) -> None:
        try:
            while self._live_once() and not self._stopping:
                self.deaths += 1
                self.died_at = time.monotonic_ns()
                self.on_death()
                if len(self.environments) > 1:
                    self.environments.pop(0)
        except Exception:  # noqa: BLE001 - told in the verdict
            self.failure = traceback.format_exc()
        finally:
            self._stopped.set()

    def _live_once(self) -> bool:
        """Run it to its end; whether it was killed."""
        with self.log.open("ab") as log:
            began = time.monotonic()
            self._process = subprocess.Popen(
                self.command,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                env=self.environments[0],
                cwd=ROOT,
            )
        self._begun(self._process, began)
        code = self._process.wait()
        if self._process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.close()
        if code not in (0, -signal.SIGKILL):
            self.failure = f"exit {code}: {self.log.read_text()[-1500:]}"
        return code == -signal.SIGKILL

    @abstractmethod
    def _begun(self, process: subprocess.Popen[bytes], began: float) -> None:
        """Wait until it is at work, or gone."""


class Coordinator(Process):
    """``secagg serve`` on a fixed port."""

    def __init__(self, place: Path, port: int, environments: list[dict[str, str]]) -> None:
        config = place / "coordinator.toml"
        config.write_text(
            f'listen = "127.0.0.1:{port}"\ncredentials = "{place / "coordinator"}"\n'
            'state = "state"\ngrace = 0.1\n'
        )
        self.state = place / "state"
        self.state.mkdir(mode=0o700)
        self._port_file = place / "port"
        command = [sys.executable, "-c", "from secagg.cli import main; main()", "serve"]
        command += ["--config", str(config), "--port-file", str(self._port_file)]
        super().__init__(command, environments, place / "coordinator.log")
        self._serving = threading.Event()

    def _begun(self, process: subprocess.Popen[bytes], began: float) -> None:
        while process.poll() is None:
            if self._port_file.exists():
                if self.deaths:
                    self.restarts.append(time.monotonic() - began)
                self._port_file.unlink()
                self._serving.set()
                return
            time.sleep(0.005)

    def _live_once(self) -> bool:
        self._serving.clear()
        self._port_file.unlink(missing_ok=True)
        return super()._live_once()

    def await_serving(self) -> None:
        """Return once it serves.

        Raises:
            AssertionError: it does not within 30 s.
        """
        end = time.monotonic() + 30
        while not self._serving.wait(0.05):
            if self._stopped.is_set() or time.monotonic() > end:
                raise AssertionError(f"the coordinator does not serve: {self.failure}")

    def stop(self) -> None:
        """Stop it. If the stop itself was the kill point, its next incarnation is left serving."""
        deaths = self.deaths
        if self._process is not None:
            self._process.terminate()
        end = time.monotonic() + 15
        while not self._stopped.wait(0.01) and self.deaths == deaths:
            if time.monotonic() > end:
                self.failure = self.failure or "SIGTERM did not stop it within 15 s"
                self.give_up()
                return
        if not self._stopped.is_set():
            self.await_serving()

    @property
    def running(self) -> bool:
        return not self._stopped.is_set()


class SiloProcess(Process):
    """Silo d as a process; gets the session's name on standard input once there is one."""

    def __init__(self, place: Path, environments: list[dict[str, str]]) -> None:
        self.results = place / "results-d"
        command = [sys.executable, "-m", "tests.crash.silo", str(place / KILLED), KILLED]
        command += [str(place / f"witness-{KILLED}"), str(self.results)]
        super().__init__(command, environments, place / "silo.log")
        self._session = ""
        self._named = threading.Event()

    def tell(self, session: str) -> None:
        self._session = session
        self._named.set()

    def _begun(self, process: subprocess.Popen[bytes], began: float) -> None:
        assert process.stdin is not None
        while not self._named.wait(0.02):
            if process.poll() is not None:
                return
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(f"{self._session}\n".encode())
            process.stdin.close()

    def reports(self) -> list[dict[str, Any]]:
        """What its incarnations reported; a line that a kill cut short was not."""
        if not self.results.exists():
            return []
        return [json.loads(line) for line in self.results.read_bytes().split(b"\n")[:-1]]


class Run:
    """One run in a directory of its own."""

    def __init__(
        self, template: Template, place: Path, plan: Plan, tracer: Sequence[str] = ()
    ) -> None:
        self.plan, self.place = plan, place
        self.verdict = Verdict(str(plan))
        self._rounds = ROUNDS[plan.target]
        self._port = free_port()
        template.settle(place, f"127.0.0.1:{self._port}")
        self._library = template.library
        self._log = place / "calls"
        self._end = time.monotonic() + LIMIT_SECONDS
        self._reports: dict[str, list[dict[str, Any]]] = {silo: [] for silo in SILOS}
        self._plain = {k: v for k, v in os.environ.items() if k != "LD_PRELOAD"}
        self._plain["PYTHONPATH"] = str(ROOT)
        self.coordinator = Coordinator(place, self._port, self._coordinator_environments())
        self.coordinator.on_death = self._scan
        self.silo: SiloProcess | None = None
        if plan.target == "silo":
            shim = self._armed(place / KILLED)
            self.silo = SiloProcess(place, [shim, self._plain])
        self._victim: Process = self.silo or self.coordinator
        if tracer:
            self._trace(tracer)

    def _armed(self, root: Path) -> dict[str, str]:
        return armed(self._library, root, self._log, self.plan.at, self._plain)

    def _coordinator_environments(self) -> list[dict[str, str]]:
        shim = self._armed(self.place / "state")
        match self.plan.target:
            case "coordinator":
                return [shim, dict(self._plain)]
            case "recovery":
                return [dict(self._plain), shim, dict(self._plain)]
            case _:
                return [dict(self._plain)]

    def _trace(self, tracer: Sequence[str]) -> None:
        """Start the victim by a tracer, which is not to be under the shim itself."""
        shim = self._victim.environments[0]
        ours = [f"-E{k}={v}" for k, v in shim.items() if k not in self._plain]
        self._victim.command = [*tracer, *ours, *self._victim.command]
        self._victim.environments = [dict(self._plain)]

    def play(self) -> Verdict:
        """Run it, and judge."""
        hurry()
        began = time.monotonic()
        threads_silos = [s for s in SILOS if self.silo is None or s != KILLED]
        for silo in threads_silos:
            witness.watch(self.place / silo, silo, self._witness(silo))
        try:
            self._play(threads_silos)
        except Exception:  # noqa: BLE001 - a verdict is what a run is for
            self.verdict.failures.append(traceback.format_exc())
        finally:
            for process in (self.silo, self.coordinator):
                if process is not None:
                    process.give_up()
            for silo in threads_silos:
                witness.forget(self.place / silo)
        self._judge()
        self.verdict.seconds = time.monotonic() - began
        return self.verdict

    def _witness(self, silo: str) -> Path:
        return self.place / f"witness-{silo}"

    def _play(self, threads_silos: list[str]) -> None:
        self.coordinator.start()
        if self.silo is not None:
            self.silo.start()
        self.coordinator.await_serving()
        admin = Channel(load_profile(self.place / "admin", role=Role.ADMIN), "Admin")
        try:
            name = self._create(admin)
            began = time.monotonic()
            if self.plan.side == "at":
                timer = threading.Timer(self.plan.number / 1000, self._victim.kill)
                timer.daemon = True
                timer.start()
            if self.plan.target == "recovery":
                threading.Thread(target=self._pull_trigger, daemon=True).start()
            self._play_session(name, threads_silos, admin)
            self.verdict.play_ms = 1000 * (time.monotonic() - began)
        finally:
            admin.close()
        self._finish(name)

    def _create(self, admin: Channel) -> str:
        """Create the session; the same call again after a crash must not make a second one."""
        config = SessionConfig(
            name="study",
            consortium="hospitals",
            silos=tuple(silo_id(name) for name in SILOS),
            protection=Protection.MASKED,
            colluders=1,
            threshold=ThresholdRule(2, 3),
            min_cohort=3,
            mask_prg=MaskPrg.AES_128_CTR,
            tasks=(_task(self._rounds),),
            chunk_bytes=4096,
            train_deadline=6.0,
            phase_deadline=1.5 if self.silo else 8.0,
        )
        request = api.CreateSessionRequest(config=config_to_wire(config))
        if "key" in api.CreateSessionRequest.DESCRIPTOR.fields_by_name:
            request.key = os.urandom(16)
        self._while_served(lambda: admin.call("CreateSession", request, api.CreateSessionReply))
        return config.name

    def _while_served(self, work: Callable[[], Any]) -> Any:
        """Do what calls the coordinator, unless that is gone for good.

        Raises:
            AssertionError: it is; why is in its own failure.
        """
        with_result: list[Any] = []
        thread = threading.Thread(target=lambda: with_result.append(work()), daemon=True)
        thread.start()
        while thread.is_alive() and self.coordinator.running and time.monotonic() < self._end:
            thread.join(0.02)
        assert with_result, "the coordinator does not answer"
        return with_result[0]

    def _pull_trigger(self) -> None:
        """Kill the coordinator in the middle of round 1: as the second message of a kind goes."""
        kind = TRIGGERS[int(self.plan.number) % len(TRIGGERS)]
        while time.monotonic() < self._end:
            if sum(r["kind"] == kind for r in self._records()) >= 2:
                self.coordinator.kill()
                return
            time.sleep(0.002)

    def _play_session(self, name: str, threads_silos: list[str], admin: Channel) -> None:
        threads = [
            threading.Thread(
                target=take_part,
                args=(self.place / silo, name, self._reports[silo].append),
                daemon=True,
                name=f"silo-{silo}",
            )
            for silo in threads_silos
        ]
        for thread in threads:
            thread.start()
        if self.silo is not None:
            self.silo.tell(name)
        self._await_silos(name, threads, admin)

    def _await_silos(self, name: str, threads: list[threading.Thread], admin: Channel) -> None:
        """Wait for all; where one gave up, the others may wait for it, so its admin ends it."""
        patience, aborted = self._end, False
        while True:
            alive = [t for t in threads if t.is_alive()]
            if not alive and (self.silo is None or self.silo.ended(0)):
                return
            now = time.monotonic()
            if not self.coordinator.running:
                self.verdict.failures.append("the coordinator is gone while silos wait for it")
                return
            if self._errors():
                patience = min(patience, now + PATIENCE_SECONDS)
            if now > self._end:
                self._report_hang(alive, admin, name)
                return
            if now > patience and not aborted:
                aborted = True
                self._abort(name, admin)
            (alive[0].join if alive else self.silo.ended)(0.02)  # type: ignore[union-attr]

    def _abort(self, name: str, admin: Channel) -> None:
        request = api.AbortSessionRequest(name=name)
        self._while_served(lambda: admin.call("AbortSession", request, api.Ack))

    def _errors(self) -> list[tuple[str, dict[str, Any]]]:
        reports = dict(self._reports)
        if self.silo is not None:
            reports[KILLED] = self.silo.reports()
        return [(silo, r) for silo, found in reports.items() for r in found if "error" in r]

    def _report_hang(self, alive: list[threading.Thread], admin: Channel, name: str) -> None:
        frames = sys._current_frames()
        stacks = "".join(
            f"\n{t.name}: " + "".join(traceback.format_stack(frames[t.ident])[-6:])
            for t in alive
            if t.ident in frames
        )
        shown: list[Any] = []
        request = api.ShowSessionRequest(name=name)
        show = threading.Thread(
            target=lambda: shown.append(admin.call("ShowSession", request, api.ShowSessionReply)),
            daemon=True,
        )
        show.start()
        show.join(5)
        for reply in shown:
            reply.ClearField("config")
            reply.ClearField("results")
        self.verdict.failures.append(f"hangs after {LIMIT_SECONDS:.0f} s; {shown}{stacks}")

    def _finish(self, name: str) -> None:
        """See that what the coordinator said is still there, and again if its stop is a kill."""
        if self.verdict.failures:
            return
        if not self._errors():
            self._replay(name)
        while self.coordinator.running:
            deaths = self.coordinator.deaths
            self.coordinator.stop()
            if self.coordinator.deaths > deaths and not self._errors():
                self._replay(name)

    def _replay(self, name: str) -> None:
        self.coordinator.await_serving()
        take_part(self.place / "a", name, self._reports["a"].append)

    # The verdict.

    def _records(self) -> list[witness.Record]:
        found = [r for silo in SILOS for r in witness.read(self._witness(silo))]
        return sorted(found, key=lambda r: r["nanoseconds"])

    def _scan(self) -> None:
        """After a kill: no revealed share lies in the coordinator's state."""
        shares = witness.shares(self._records())
        self.verdict.failures += stored_shares(self.coordinator.state, shares)

    def _judge(self) -> None:
        verdict, victim = self.verdict, self._victim
        verdict.restarts = self.coordinator.restarts
        verdict.records = self._records()
        verdict.calls = read_log(self._log)
        verdict.died = victim.deaths > (self.plan.target == "recovery")
        verdict.death = self._death()
        if self.silo is not None:
            self._reports[KILLED] = self.silo.reports()
        for process in (self.silo, self.coordinator):
            if process is not None and process.failure:
                verdict.failures.append(f"{type(process).__name__}: {process.failure}")
        verdict.failures += witness.faults(verdict.records)
        self._scan()
        self._judge_outcomes()
        self._judge_log()

    def _judge_outcomes(self) -> None:
        verdict = self.verdict
        agreed: dict[int, tuple[int, tuple[str, ...]]] = {}
        for silo, reports in self._reports.items():
            for report in reports:
                if "error" in report:
                    self._judge_error(silo, report)
                elif "call" in report:
                    verdict.failures += self._judge_sum(silo, report)
                    outcome = (report["round"], tuple(report["survivors"]))
                    if agreed.setdefault(report["call"], outcome) != outcome:
                        verdict.failures.append(f"{silo} got {outcome}, another silo {agreed}")
        if verdict.failures or self._errors():
            return
        calls = set(range(1, self._rounds + 1))
        short = [s for s, r in self._reports.items() if not calls <= {o.get("call") for o in r}]
        if short:
            verdict.failures.append(f"neither sums nor an error at {short}")

    def _judge_error(self, silo: str, report: dict[str, Any]) -> None:
        text = f"{silo}: {report['error']} {report['text']}"
        clean = report["error"] in CLEAN
        (self.verdict.aborts if clean else self.verdict.failures).append(text)

    @staticmethod
    def _judge_sum(silo: str, report: dict[str, Any]) -> list[str]:
        import numpy as np

        total, call = np.array(report["total"]), report["call"]
        if len(report["survivors"]) < 3:
            return [f"{silo}: only {report['survivors']} survived round {report['round']}"]
        if not np.array_equal(total, exact_sum(report["survivors"], call)):
            counted = digits(total, call)
            return [f"{silo}: sum {call} over {report['survivors']} counts each silo {counted}"]
        return []

    def _judge_log(self) -> None:
        """An honest run gives the coordinator nothing to call an error."""
        if not self.coordinator.log.exists():
            return
        for line in self.coordinator.log.read_text().splitlines():
            if '"level": "error"' in line or "Traceback" in line:
                self.verdict.failures.append(f"the coordinator's log: {line[:400]}")

    def _death(self) -> str:
        """Where the process died: the call, and what the silos had sent last by then."""
        verdict = self.verdict
        if not verdict.died or not verdict.calls:
            return ""
        last = max(verdict.calls, key=lambda call: call.nanoseconds)
        if self.plan.side == "at":
            moment = stage(verdict.records, self._victim.died_at)
            return f"some time after {last.pattern} ({moment})"
        call = next((c for c in verdict.calls if c.index == int(self.plan.number)), last)
        return f"{call.pattern} {call.size} ({stage(verdict.records, call.nanoseconds)})"


def stored_shares(directory: Path, shares: Iterable[bytes]) -> list[str]:
    """Files in which a revealed share lies, raw or as hex, in words."""
    failures = []
    for path in directory.rglob("*"):
        if path.is_file():
            data = path.read_bytes()
            lower = data.lower()
            found = sum(s in data or s.hex().encode() in lower for s in shares)
            failures += [f"{found} revealed shares lie in {path.name}"] if found else []
    return failures


def stage(records: list[witness.Record], nanoseconds: int) -> str:
    """How far the session was at a moment, by what the silos had sent."""
    sent = [r for r in records if r["nanoseconds"] <= nanoseconds]
    if not sent:
        return "before the first message"
    last = sent[-1]
    same = sum(all(r[f] == last[f] for f in ("round", "attempt", "kind")) for r in sent)
    return f"round {last['round']}.{last['attempt']}, {last['kind']} {same}"


def _task(rounds: int) -> TaskConfig:
    return TaskConfig(
        name=TASK,
        weighting=Weighting.SUM,
        rounds=rounds,
        ring_bits=64,
        bound=BOUND,
        clip=Clip.NONE,
        weight_cap=1.0,
        metrics=(),
    )


def run_plan(template: Template, place: Path, plan: Plan) -> Verdict:
    """Run one plan in ``place``; its directory is kept only where it failed."""
    place.mkdir(parents=True)
    verdict = Run(template, place, plan).play()
    if not verdict.failures:
        shutil.rmtree(place, ignore_errors=True)
    return verdict
