"""Real sessions, searched for every secret that was drawn in them.

Four silos and a coordinator play three rounds of a mean, with weights, metrics and models kept in
training, all logging what they can. In round 2 silo d is killed after it has shared its keys, so
its mask key is rebuilt. In round 3 the coordinator is killed while silos reveal their shares, and
started again on what its disk kept. Everybody's disk is copied at these moments and at the end.
``prelude`` writes down what each process drew; then all is searched: the copies, the logs, every
message in the clear as the coordinator's handlers saw it, and the bytes that a proxy on the line
recorded. ``rules`` says what may be where.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import click
from rich.console import Console

from client_sdk.channel import Channel
from client_sdk.profile import load_profile
from secagg.config import (
    Clip,
    MaskPrg,
    Metric,
    Protection,
    SessionConfig,
    TaskConfig,
    ThresholdRule,
    Weighting,
    silo_id,
)
from secagg.coordinator.launch import CIPHER_SUITES
from secagg.demo.stage import ADMIN, CONSORTIUM, COORDINATOR, enrol, point_to
from secagg.pki.names import Role
from secagg.suite import Suite
from secagg.wire._pb import service_pb2 as api
from secagg.wire.session import config_to_wire
from threat_model.scan.engine import Finding, scan
from threat_model.scan.rules import (
    COORDINATOR_KILLED,
    END,
    PUBLIC,
    SILO_KILLED,
    Drawn,
    by_design,
)
from threat_model.scan.silo import HEAVIEST, LOSS, TASK, Orders
from threat_model.scan.tap import Line

SILOS: Final = ("a", "b", "c", "d")
DIES: Final = "d"
WAITS: Final = "c"
ROUNDS: Final = 3
PLAY_SECONDS: Final = 120.0
_ROOT: Final = Path(__file__).resolve().parents[2]
_PRELUDE: Final = Path(__file__).with_name("prelude.py")
_LOUD: Final = {
    "GRPC_VERBOSITY": "DEBUG",
    # Not secure_endpoint: it prints what TLS is given, and so every message, by design.
    "GRPC_TRACE": "http,call,channel,connectivity_state,tcp",
}


@dataclass(frozen=True)
class Targets:
    """What the processes run, after the prelude: a weakened one stands in another's place."""

    coordinator: str = "secagg.cli:main"
    silo: str = "threat_model.scan.silo:main"


OURS: Final = Targets()


@dataclass
class Report:
    """What was searched and found.

    Args:
        findings: secrets where they must not be.
        allowed: how many were where they are by design, by place.
        kinds: how many values of each kind were looked for.
        public: how many were not, since they are public.
        searched: bytes.
    """

    findings: list[Finding]
    allowed: Counter[str]
    kinds: Counter[str]
    public: int
    searched: int

    def to_json(self) -> dict[str, Any]:
        """For a file."""
        return {
            "findings": [str(finding) for finding in self.findings],
            "allowed": dict(self.allowed),
            "secrets": dict(sorted(self.kinds.items())),
            "public": self.public,
            "searched_bytes": self.searched,
        }


class Run:
    """One session in a directory of its own.

    Args:
        root: an empty directory.
        protection: of the session.
        targets: what the processes run.
        rounds: of the session; where there are fewer than three, nobody is killed.
    """

    def __init__(
        self,
        root: Path,
        protection: Protection,
        targets: Targets = OURS,
        rounds: int = ROUNDS,
    ) -> None:
        self._root, self._protection, self._targets = root, protection, targets
        self._rounds = rounds
        self._stage, self._records = root / "stage", root / "records"
        for directory in (self._stage, self._records, root / "logs", root / "disk"):
            directory.mkdir()
        enrol(self._stage, SILOS, protection)
        self._keep_keys()
        self._port = _free_port()
        self._line = Line(self._port, root / "tcp")
        point_to(self._stage, [ADMIN, *SILOS], self._line.port)
        (self._stage / "coordinator.toml").write_text(
            f'listen = "127.0.0.1:{self._port}"\ncredentials = "{COORDINATOR}"\nstate = "state"\n'
            'log_level = "debug"\ngrace = 0.1\n'
        )
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._mark = root / "mark"

    def _keep_keys(self) -> None:
        """Silo a keeps the key of homomorphic encryption on its disk, as a policy can say."""
        with (self._stage / "a" / "policy.toml").open("a") as policy:
            policy.write('key_directory = "keys"\n')

    def play(self) -> None:
        """Play the session.

        Raises:
            RuntimeError: it did not go as it should; nothing can be said of it.
        """
        with ExitStack() as held:
            held.callback(self._line.close)
            held.callback(self._kill_all)
            self._serve()
            self._create()
            for name in SILOS:
                self._start_silo(self._orders(name))
            if self._rounds >= ROUNDS:
                self._kill_two()
            self._await("end", lambda: all(self._processes[n].poll() == 0 for n in SILOS))
            self._kill(COORDINATOR)  # a stop would fold the journal's log into its database
            self._copy(END)

    # The play.

    def _orders(self, name: str) -> Orders:
        masks = self._protection.masks
        orders = Orders(str(self._stage / name), self._session.name)
        if self._rounds < ROUNDS:
            return orders
        if name == DIES:
            return replace(orders, dies=(2, "mask_input" if masks else "seal_input"))
        if name == WAITS:
            step = "reveal_shares" if masks else "check_survivors"
            return replace(orders, waits=(3, step), mark=str(self._mark))
        return orders

    @property
    def _session(self) -> SessionConfig:
        seals = self._protection.seals
        task = TaskConfig(
            name=TASK,
            weighting=Weighting.MEAN,
            rounds=self._rounds,
            ring_bits=None if seals else 64,
            bound=2.0,
            clip=Clip.NONE,
            weight_cap=HEAVIEST,
            metrics=(Metric(LOSS, 2.0),),
        )
        return SessionConfig(
            name="scanned",
            consortium=CONSORTIUM,
            silos=tuple(silo_id(name) for name in SILOS),
            protection=self._protection,
            suite=Suite.CKKS_54 if seals else None,
            colluders=1,
            threshold=ThresholdRule(2, 3),
            min_cohort=3,
            mask_prg=MaskPrg.AES_128_CTR,
            tasks=(task,),
            chunk_bytes=4096,
            train_deadline=60.0,
            phase_deadline=5.0,
        )

    def _start(self, name: str, target: str, *arguments: str) -> None:
        command = [sys.executable, "-P", str(_PRELUDE), str(self._records), name, target]
        environment = {**os.environ, **_LOUD, "PYTHONPATH": str(_ROOT)}
        if name == COORDINATOR:  # the prelude imports grpc before ``launch`` can say it
            environment["GRPC_SSL_CIPHER_SUITES"] = CIPHER_SUITES
        with (self._root / "logs" / name).open("ab") as log:
            self._processes[name] = subprocess.Popen(
                [*command, *arguments], env=environment, cwd=_ROOT, stdout=log, stderr=log
            )

    def _serve(self) -> None:
        port_file = self._root / "port"
        port_file.unlink(missing_ok=True)
        config = str(self._stage / "coordinator.toml")
        arguments = ("serve", "--config", config, "--port-file", str(port_file))
        self._start(COORDINATOR, self._targets.coordinator, *arguments)
        self._await("a coordinator", port_file.exists)

    def _start_silo(self, orders: Orders) -> None:
        name = Path(orders.profile).name
        path = orders.write(self._root / f"{name}.json")
        self._start(name, self._targets.silo, str(path))

    def _create(self) -> None:
        channel = Channel(load_profile(self._stage / ADMIN, role=Role.ADMIN), "Admin")
        request = api.CreateSessionRequest(config=config_to_wire(self._session))
        channel.call("CreateSession", request, api.CreateSessionReply)
        channel.close()

    def _kill_two(self) -> None:
        """See silo d killed and kill the coordinator; both are started again."""
        self._await("kill of a silo", lambda: self._processes[DIES].poll() == -signal.SIGKILL)
        self._copy(SILO_KILLED)
        self._start_silo(replace(self._orders(DIES), dies=(0, "")))
        self._await("silo that waits", self._mark.exists)
        kind = "unmasking" if self._protection.masks else "masked_input"
        self._await(f"{kind} message", lambda: self._has_come(kind))
        self._kill(COORDINATOR)
        self._copy(COORDINATOR_KILLED)
        self._serve()
        self._mark.unlink()

    def _has_come(self, kind: str) -> bool:
        """Whether two messages of a kind have come in round 3."""
        found = (self._records / "wire").glob(f"request.Send.{kind}.*-3-*")
        return len(list(found)) >= 2

    def _await(self, what: str, there: Callable[[], bool]) -> None:
        end = time.monotonic() + PLAY_SECONDS
        while not there():
            dead = [n for n, p in self._processes.items() if p.poll() not in (None, 0)]
            lost = [n for n in dead if (n, self._processes[n].poll()) != (DIES, -signal.SIGKILL)]
            if lost or time.monotonic() > end:
                logs = [(self._root / "logs" / n).read_text()[-2000:] for n in lost]
                raise RuntimeError(f"no {what}; ended: {lost} {''.join(logs)}")
            time.sleep(0.02)

    def _kill(self, name: str) -> None:
        self._processes[name].kill()
        self._processes[name].wait()

    def _kill_all(self) -> None:
        for name in self._processes:
            self._kill(name)

    def _copy(self, moment: str) -> None:
        shutil.copytree(self._stage, self._root / "disk" / moment)

    # The search.

    @property
    def places(self) -> dict[str, Path]:
        """What is searched."""
        return {
            "disk": self._root / "disk",
            "logs": self._root / "logs",
            "wire": self._records / "wire",
            "tcp": self._root / "tcp",
        }

    @property
    def drawn(self) -> Drawn:
        """What the processes drew."""
        return Drawn.read(self._records)

    @property
    def public(self) -> set[str]:
        """Kinds that are not looked for."""
        bare = set() if self._protection.masks else {"sealed-update"}  # ckks uploads what is sealed
        return PUBLIC.keys() | bare

    def search(self) -> Report:
        """Look for what was drawn in all that is left of the play."""
        drawn = self.drawn
        entries = drawn.secrets(self.public)
        values = {value.hex(): [value] for value in entries}
        found = scan(values, self.places)
        report = Report([], Counter(), Counter(), len(drawn.entries) - len(entries), 0)
        for finding in found:
            entry = entries[bytes.fromhex(finding.secret)]
            if by_design(finding, entry, drawn):
                report.allowed[_general(finding.place)] += 1
            else:
                report.findings.append(replace(finding, secret=str(entry)))
        for entry in entries.values():
            report.kinds[min(entry.kinds)] += 1
        report.searched = sum(_size(place) for place in self.places.values())
        return report


def _general(place: str) -> str:
    """A place without what is different in each run."""
    if place.startswith("wire"):
        return place.replace("request.Send.", "").split(".")[0]
    where, _, name, path = (*place.split("/", 3), "", "", "")[:4]
    return f"{where}/{name}/{Path(path).name.split('-')[0]}"


def _size(place: Path) -> int:
    return sum(path.stat().st_size for path in place.rglob("*") if path.is_file())


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
        return port


def run(protections: Sequence[Protection], root: Path) -> dict[str, Report]:
    """Play a session of each protection below ``root``, and search it."""
    reports = {}
    for protection in protections:
        place = root / protection.replace("+", "-")
        place.mkdir()
        one = Run(place, protection)
        one.play()
        reports[str(protection)] = one.search()
    return reports


@click.command()
@click.argument("protections", nargs=-1, type=click.Choice([str(p) for p in Protection]))
@click.option("--json", "as_json", is_flag=True, help="Print the reports as JSON.")
def command(protections: tuple[str, ...], as_json: bool) -> None:
    """Play sessions, and look for every secret drawn in what they leave and send.

    Exit status 1 if one is found where it is not by design.
    """
    chosen = [Protection(name) for name in protections] or list(Protection)
    say = Console(stderr=True, soft_wrap=True, highlight=False)
    with tempfile.TemporaryDirectory(prefix="secagg-scan-") as root:
        reports = run(chosen, Path(root).resolve())
    for name, report in reports.items():
        say.print(
            f"{name}: {report.kinds.total()} secrets of {len(report.kinds)} kinds in "
            f"{report.searched / 1e6:.1f} MB: {len(report.findings)} found, "
            f"{report.allowed.total()} where they are by design"
        )
        for finding in report.findings[:20]:
            say.print(f"   {finding}", markup=False)
    if as_json:
        click.echo(json.dumps({name: r.to_json() for name, r in reports.items()}, indent=2))
    sys.exit(any(report.findings for report in reports.values()))
