"""The play: processes started, killed and started again; a table of who does what."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

from rich.console import Console
from rich.live import Live
from rich.table import Table

from client_sdk.channel import Channel
from client_sdk.profile import load_profile
from secagg.config import Phase, SessionConfig
from secagg.demo.silo import Orders
from secagg.demo.stage import ADMIN, SESSION, keep_port, point_to
from secagg.errors import SecaggError
from secagg.pki.names import Role
from secagg.wire._pb import service_pb2 as api
from secagg.wire.session import config_to_wire

START_SECONDS: Final = 60.0
PLAY_SECONDS: Final = 600.0
_LOOK_SECONDS: Final = 0.1


class DemoFailed(SecaggError):
    """A process of the demo ended as it should not."""


@dataclass
class Process:
    """One process, its log, and how to start it."""

    arguments: list[str]
    log: Path
    child: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it, or start it again; the log goes on."""
        with self.log.open("ab") as log:
            self.child = subprocess.Popen(  # noqa: S603 - our own modules
                [sys.executable, "-m", *self.arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    @property
    def running(self) -> bool:
        """Whether it runs."""
        return self.child is not None and self.child.poll() is None

    @property
    def done(self) -> bool:
        """Whether it has ended well."""
        return self.child is not None and self.child.poll() == 0

    def kill(self) -> None:
        """kill -9."""
        if self.child is not None:
            self.child.kill()
            self.child.wait()

    def check(self) -> None:
        """Return if it runs or has ended well.

        Raises:
            DemoFailed: it has ended otherwise; the error carries the log's end.
        """
        if not self.running and not self.done:
            tail = self.log.read_text(errors="replace")[-2000:]
            raise DemoFailed("demo-process", f"{' '.join(self.arguments[:1])} failed:\n{tail}")


@dataclass
class Play:
    """The demo on its stage.

    Args:
        root: the demo's directory, enrolled already.
        orders: each silo's.
        tapped: the silo whose vectors the coordinator keeps a copy of.
        config: the session.
        console: where the table goes; quiet off a terminal.
        restarts_at: the silo at whose hold the coordinator is killed instead of it; "" for none.
    """

    root: Path
    orders: Sequence[Orders]
    tapped: str
    config: SessionConfig
    console: Console
    restarts_at: str = ""
    killed: dict[str, int] = field(default_factory=dict)
    restarts: list[dict[str, float]] = field(default_factory=list)

    def run(self) -> None:
        """Play to the end.

        Raises:
            DemoFailed: a process failed, or it took too long.
        """
        with self._coordinator() as (coordinator, channel):
            silos = {orders.silo: self._silo(orders) for orders in self.orders}
            try:
                self._watch(channel, coordinator, silos)
            finally:
                for process in silos.values():
                    process.kill()

    @contextmanager
    def _coordinator(self) -> Iterator[tuple[Process, Channel]]:
        port_file = self.root / "port"
        (self.root / "tap").mkdir()
        process = Process(
            [
                "secagg.demo.coordinator",
                str(self.root / "coordinator.toml"),
                str(port_file),
                str(self.root / "tap"),
                self.tapped,
            ],
            self.root / "coordinator.log",
        )
        process.start()
        try:
            port = self._await_port(process, port_file)
            keep_port(self.root, port)
            point_to(self.root, [ADMIN, *(orders.silo for orders in self.orders)], port)
            channel = Channel(load_profile(self.root / ADMIN, role=Role.ADMIN), "Admin")
            request = api.CreateSessionRequest(config=config_to_wire(self.config))
            channel.call("CreateSession", request, api.CreateSessionReply)
            yield process, channel
            channel.close()
        finally:
            process.kill()

    def _await_port(self, process: Process, port_file: Path) -> int:
        deadline = time.monotonic() + START_SECONDS
        while not port_file.exists():
            process.check()
            if time.monotonic() > deadline:
                raise DemoFailed("demo-start", "The coordinator did not start.")
            time.sleep(_LOOK_SECONDS)
        return int(port_file.read_text())

    def _silo(self, orders: Orders) -> Process:
        path = self.root / f"{orders.silo}.json"
        orders.write(path)
        log = self.root / f"{orders.silo}.log"
        process = Process(["secagg.demo.silo", str(path)], log)
        process.start()
        return process

    def _watch(self, channel: Channel, coordinator: Process, silos: Mapping[str, Process]) -> None:
        deadline = time.monotonic() + PLAY_SECONDS
        with Live(console=self.console, refresh_per_second=8, transient=True) as live:
            while not all(process.done for process in silos.values()):
                if time.monotonic() > deadline:
                    raise DemoFailed("demo-time", "The demo did not end in time.")
                for process in silos.values():
                    process.check()
                self._kill_who_holds(coordinator, silos)
                shown = channel.call(
                    "ShowSession", api.ShowSessionRequest(name=SESSION), api.ShowSessionReply
                )
                live.update(phase_table(shown, self.killed))
                time.sleep(_LOOK_SECONDS)

    def _kill_who_holds(self, coordinator: Process, silos: Mapping[str, Process]) -> None:
        for orders in self.orders:
            mark = self.root / "records" / orders.silo / "held"
            if orders.silo == self.restarts_at and mark.exists():
                self._restart(coordinator, orders.hold[0] - 1)
                mark.unlink()
            elif orders.hold[1] and mark.exists():
                silos[orders.silo].kill()
                mark.unlink()
                round_number = orders.hold[0] - 1
                self.killed[orders.silo] = round_number
                self.console.print(
                    f"kill -9 {orders.silo} in round {round_number}, "
                    f"before its {orders.hold[1].replace('_', ' ')}; starting it again"
                )
                replace(orders, hold=(0, "")).write(self.root / f"{orders.silo}.json")
                silos[orders.silo].start()

    def _restart(self, coordinator: Process, round_number: int) -> None:
        """Kill the coordinator in the middle of a round, and start it on what its disk kept."""
        (self.root / "port").unlink()
        coordinator.kill()
        began = time.monotonic()
        coordinator.start()
        self._await_port(coordinator, self.root / "port")
        seconds = time.monotonic() - began
        self.restarts.append({"round": round_number, "seconds": seconds})
        self.console.print(
            f"kill -9 coordinator in round {round_number}, all vectors sent and nothing summed; "
            f"it serves again after {seconds:.1f} s"
        )


def phase_table(shown: api.ShowSessionReply, killed: Mapping[str, int]) -> Table:
    """Silo × phase, as the coordinator sees it now."""
    title = f"round {shown.round - 1}" + (f", {shown.phase}" if shown.phase else ", training")
    table = Table("silo", *(phase.replace("_", " ") for phase in Phase), "", title=title)
    phases = [str(phase) for phase in Phase]
    for silo in shown.silos:
        state, _, sent = silo.state.partition(" ")
        reached = phases.index(state) if state in phases else -1
        marks = ["✓" if i < reached or (i == reached and sent) else "·" for i in range(len(phases))]
        note = "" if state in phases else silo.state
        if silo.name in killed:
            note += f" (killed in round {killed[silo.name]})"
        table.add_row(silo.name, *marks, note.strip())
    return table
