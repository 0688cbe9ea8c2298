"""One storm: a coordinator, honest silos and their probe, quiet first and then under attack.

The same attack then meets a bare gRPC server (``echo``) while the same rounds go on: what its probe
sees is what the transport costs, and what the coordinator's sees meanwhile, beside the storm, is
what the machine's lack of cores does. What is beyond both, the coordinator adds.
"""

from __future__ import annotations

import hashlib
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from benchmarks.memory import resident
from secagg.pki.names import Role, server_dns_name
from secagg.wire import session as wire_session
from secagg.wire._pb import service_pb2 as api
from tests.coordinator.serving import Consortium, Pair, Server, serving
from tests.crash.silo import BOUND, SILOS
from tests.sdk.federation import make_session, make_sum, settle

from . import figures, report
from .attack import PARTS
from .helper import Helper, started

ATTACKER = "mallory"
ENDLESS = 10**6
SETTLE_SECONDS, LOOK_SECONDS = 60.0, 0.1
AFTERWARDS = 2
"""Rounds that must be completed once the storm is over."""


@dataclass(frozen=True, slots=True)
class Plan:
    """How hard it blows.

    Args:
        parts: which attacks, all at once.
        quiet: seconds of measuring before.
        seconds: least time under attack; it goes on until the resets are done.
        half_open: connections held.
        resets: streams reset, as fast as the server reads them.
        reset_connections: over which they are.
        slow: uploads that trickle.
        connections: new ones a second.
        pause: seconds between a silo's rounds.
        floor: whether the bare server is measured, too.
    """

    parts: Sequence[str] = tuple(PARTS)
    quiet: float = 20.0
    seconds: float = 30.0
    half_open: int = 200
    resets: int = 40_000
    reset_connections: int = 4
    slow: int = 50
    connections: int = 500
    pause: float = 0.5
    floor: bool = True


def run(plan: Plan, root: Path) -> dict[str, Any]:
    """Play a storm in an empty directory; what was measured."""
    consortium = Consortium(root / "members")
    consortium.enrol(Role.SILO, ATTACKER)
    consortium.renew(Role.COORDINATOR, "main")  # its manifest lists the attacker only now
    with serving(consortium, root / "serve", log_level="info") as server:
        return Storm(plan, server, root).run()


class Storm:
    """A coordinator with three sessions.

    Of ``still`` the silos play one round, for the probe to ask about; in ``busy`` they play on and
    on; ``theirs`` is the attacker's, so that its calls are about something, too.
    """

    def __init__(self, plan: Plan, server: Server, root: Path) -> None:
        self._plan, self._server, self._root = plan, server, root
        self._pid = server.process.pid
        self._still, self._busy, self._theirs = (
            self._create(name, silos)
            for name, silos in (("still", SILOS), ("busy", SILOS), ("theirs", ("a", "b", ATTACKER)))
        )
        (root / "root.pem").write_bytes(server.consortium.authority.certificate_pem)

    def _create(self, name: str, silos: Sequence[str]) -> bytes:
        task = make_sum(bound=BOUND, rounds=ENDLESS)
        config = make_session(task, name=name, silos=silos)
        request = api.CreateSessionRequest(config=wire_session.config_to_wire(config))
        return bytes(self._server.boss.admin("CreateSession", request).session_id)

    def run(self) -> dict[str, Any]:
        """Everything, in its order."""
        with self._silos() as self._honest:
            before = figures.descriptors(self._pid)
            coordinator = self._measured(self._server.port, self._storm_here)
            coordinator["peak_mib"] = round(resident("VmHWM", self._pid) / 2**20, 1)
            floor = self._floor() if self._plan.floor else None
            went_on = self._play_on()
            coordinator["descriptors"] = {"before": before, "afterwards": self._calmed(before)}
            self._server.boss.admin("AbortSession", api.AbortSessionRequest(name="busy"))
            reports = {name: silo.wait() for name, silo in self._honest.items()}
        result: dict[str, Any] = {
            "plan": asdict(self._plan),
            "coordinator": coordinator,
            "floor": floor,
            "rounds": report.rounds(reports),
            "log": report.log(self._server.log),
            "alive": self._server.process.poll() is None,
            "went_on": went_on,
        }
        return result | {"verdict": report.verdict(result)}

    # Honest silos.

    @contextmanager
    def _silos(self) -> Iterator[dict[str, Helper]]:
        with ExitStack() as stack:
            silos = {}
            for name in SILOS:
                path = self._server.consortium.path(Role.SILO, name)
                spec = {"profile": str(settle(path, self._server.address)), "still": "still"}
                spec |= {"busy": "busy", "pause": self._plan.pause}  # type: ignore[dict-item]
                silos[name] = stack.enter_context(Helper("silo", **spec))
            started(*silos.values())
            while self._results() < 1:
                _pass(LOOK_SECONDS)
            yield silos

    def _results(self) -> int:
        shown = self._server.boss.admin("ShowSession", api.ShowSessionRequest(name="busy"))
        return int(shown.summary.results)

    def _play_on(self) -> bool:
        """Wait for rounds that began after the storm; whether there were any."""
        wanted, end = self._results() + AFTERWARDS, time.monotonic() + SETTLE_SECONDS
        while self._results() < wanted and time.monotonic() < end:
            _pass(LOOK_SECONDS)
        return self._results() >= wanted

    def _calmed(self, before: int) -> int:
        """The descriptors that it keeps, once it has seen that its attackers are gone."""
        end = time.monotonic() + SETTLE_SECONDS
        while (now := figures.descriptors(self._pid)) > before + report.DESCRIPTORS:
            if time.monotonic() > end:
                break
            _pass(LOOK_SECONDS)
        return now

    # Quiet and storm, at any server.

    def _measured(self, port: int, storm: Callable[[int], dict[str, Any]]) -> dict[str, Any]:
        with self._probe(port) as probe:
            started(probe)
            _pass(self._plan.quiet)
            quiet = probe.finish()
        return {"quiet": report.calls(quiet)} | storm(port)

    def _probe(self, port: int) -> Helper:
        spec = self._spec(port, "a", self._still) | {"session_name": "still"}
        return Helper("probe", **spec)

    def _spec(self, port: int, silo: str, session: bytes) -> dict[str, Any]:
        pair, pem = self._server.consortium.pair(Role.SILO, silo), self._root / f"{silo}.pem"
        pem.write_bytes(pair.certificate + pair.key)
        return {
            "port": port,
            "pem": str(pem),
            "root": str(self._root / "root.pem"),
            "server_name": server_dns_name(self._server.consortium.name),
            "session": session.hex(),
        }

    def _attacks(self, port: int) -> dict[str, Helper]:
        plan, spec = self._plan, self._spec(port, ATTACKER, self._theirs)
        force = {
            "half_open": plan.half_open,
            "resets": plan.resets,
            "reset_connections": plan.reset_connections,
            "slow": plan.slow,
            "connections": plan.connections,
        }
        return {part: Helper("attack", part=part, **spec, **force) for part in plan.parts}

    def _storm(self, port: int, pid: int, midst: Callable[[], None]) -> dict[str, Any]:
        """Attack one server; probe it and, if that is another one, the coordinator beside it."""
        with ExitStack() as stack:
            attacks = {n: stack.enter_context(h) for n, h in self._attacks(port).items()}
            ports = {self._server.port: "beside"} | {port: "storm"}
            probes = {name: stack.enter_context(self._probe(p)) for p, name in ports.items()}
            helpers = (*attacks.values(), *probes.values())
            machine = figures.Machine(pid, [h.pid for h in (*helpers, *self._honest.values())])
            started(*helpers)
            _pass(self._plan.seconds / 2)
            midst()
            _pass(self._plan.seconds / 2)
            result: dict[str, Any] = {"machine": machine.measured()}
            reports = {"resets": attacks.pop("resets").finish()} if "resets" in attacks else {}
            probed = {name: probe.finish() for name, probe in probes.items()}
            reports |= {part: attack.finish() for part, attack in attacks.items()}
        if "resets" in reports:
            result["during_resets"] = report.during(reports["resets"], probed["storm"]["samples"])
        return result | {n: report.calls(p) for n, p in probed.items()} | {"attacks": reports}

    def _storm_here(self, port: int) -> dict[str, Any]:
        result = self._storm(port, self._pid, self._renew)
        attacks = result["attacks"]
        return result | {
            "blown": report.blown(asdict(self._plan), attacks),
            "reload": self._reload_seen(attacks.get("connections")),
        }

    # The certificate, renewed while it blows.

    def _renew(self) -> None:
        consortium = self._server.consortium
        self._old = _fingerprint(consortium.pair(Role.COORDINATOR, "main"))
        consortium.renew(Role.COORDINATOR, "main")
        self._new = _fingerprint(consortium.pair(Role.COORDINATOR, "main"))

    def _reload_seen(self, connections: dict[str, Any] | None) -> dict[str, bool]:
        pair = self._server.consortium.pair(Role.SILO, "b")
        with self._server.handshake(pair, ssl.TLSVersion.TLSv1_3) as line:
            seen = hashlib.sha256(line.getpeercert(True) or b"").hexdigest()
        result = {"afterwards": seen == self._new}
        if connections is not None:
            certificates = connections["certificates"]
            result["in_the_midst"] = self._new in certificates
            result["no_other"] = set(certificates) <= {self._old, self._new}
        return result

    # The floor.

    def _floor(self) -> dict[str, Any]:
        pair = self._server.consortium.pair(Role.COORDINATOR, "main")
        files = {"key": pair.key, "pem": pair.certificate}
        for name, content in files.items():
            (self._root / f"echo-{name}").write_bytes(content)
        spec = {name: str(self._root / f"echo-{name}") for name in files}
        spec |= {"root": str(self._root / "root.pem"), "port_file": str(self._root / "echo-port")}
        with Helper("echo", **spec) as echo:
            started(echo)
            port = int((self._root / "echo-port").read_text())
            result = self._measured(port, lambda port: self._storm(port, echo.pid, lambda: None))
            result["peak_mib"] = round(echo.finish()["peak_bytes"] / 2**20, 1)
        return result


def _pass(seconds: float) -> None:
    threading.Event().wait(seconds)


def _fingerprint(pair: Pair) -> str:
    der = x509.load_pem_x509_certificate(pair.certificate).public_bytes(Encoding.DER)
    return hashlib.sha256(der).hexdigest()
