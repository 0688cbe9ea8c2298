"""The stage: a consortium on disk, and the product's processes, shipped and weakened.

Silos a to f and their coordinator are enrolled by a real authority. Whoever plays an adversary
takes the directories of those who are in its hands; the honest run in processes of their own.
Processes are started when they are first wanted and used again: those that play ours are never
weakened, and the others are weakened for one attack at a time.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final

from secagg.pki.authority import LEAF_DAYS, Authority
from secagg.pki.credentials import Credentials, load_credentials, save_manifest
from secagg.pki.enrolment import create_request, install_bundle
from secagg.pki.manifest import SignedManifest
from secagg.pki.names import Role
from secagg.pki.profile import write_policy, write_profile
from threat_model.attacks.attack import Weakening

CONSORTIUM: Final = "hospitals"
SILOS: Final = tuple("abcdef")
COORDINATOR: Final = "coordinator"
ADMIN: Final = "admin"
START_SECONDS: Final = 60.0
ANSWER_SECONDS: Final = 30.0
_ROOT: Final = Path(__file__).resolve().parents[2]


class Consortium:
    """An authority thirty days old, and everybody enrolled with it.

    Args:
        root: directory, made here; each member's is named after it.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.authority = Authority.create(
            root / "authority", CONSORTIUM, now=datetime.now(UTC) - timedelta(days=30)
        )
        members = [(Role.COORDINATOR, COORDINATOR), (Role.ADMIN, ADMIN)]
        for role, name in [*members, *((Role.SILO, silo) for silo in SILOS)]:
            self.enrol(name, role)
        for name in (COORDINATOR, *SILOS):
            save_manifest(root / name, self.authority.signed_manifest)
        for name in SILOS:
            write_policy(root / name, ["masked", "ckks+masked", "ckks"])

    def enrol(
        self, name: str, role: Role, *, now: datetime | None = None, days: int = LEAF_DAYS
    ) -> Path:
        """Enrol a member as its operator and the authority would."""
        now = now or datetime.now(UTC)
        directory = self.root / name
        request = create_request(directory, role, name, CONSORTIUM, os.urandom)
        bundle = self.authority.approve(request, now=now, days=days)
        install_bundle(directory, bundle, fingerprint=self.authority.fingerprint, now=now)
        return directory

    def credentials(self, name: str, role: Role = Role.SILO) -> Credentials:
        """A member's keys, for who has its directory."""
        return load_credentials(self.root / name, now=datetime.now(UTC), role=role)


class Silo:
    """A process with the SDK; see ``player``.

    Args:
        name: of its log.
        directory: for its log.
    """

    def __init__(self, name: str, directory: Path) -> None:
        self._path = directory / f"{name}.log"
        self._log = self._path.open("ab")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "threat_model.attacks.player"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            cwd=_ROOT,
            text=True,
        )
        self._reader = ThreadPoolExecutor(1)
        self._started = self._reader.submit(self._line)

    def play(self, order: dict[str, Any]) -> Future[dict[str, Any]]:
        """Give an order once it has started; the future has the answer."""
        self._started.result(START_SECONDS)
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        return self._reader.submit(self._answer)

    def _line(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline()

    def _answer(self) -> dict[str, Any]:
        line = self._line()
        return json.loads(line) if line else {"results": [], "error": "process-ended"}

    @property
    def log(self) -> str:
        """What it has logged."""
        return self._path.read_text(errors="replace")

    @property
    def alive(self) -> bool:
        """Whether it runs."""
        return self._process.poll() is None

    def kill(self) -> None:
        """End it."""
        with self._process:
            self._process.kill()
            self._reader.shutdown()
        self._log.close()


@dataclass
class Serving:
    """A ``secagg serve`` process; see ``server``."""

    process: subprocess.Popen[str]
    directory: Path
    port: int

    @property
    def address(self) -> str:
        """Where it listens."""
        return f"127.0.0.1:{self.port}"

    @property
    def log(self) -> str:
        """What it has logged."""
        return (self.directory / "log").read_text(errors="replace")

    @property
    def authority(self) -> Authority:
        """The authority of a coordinator that has its own."""
        return Authority.load(self.directory / "authority")

    def publish(self) -> SignedManifest:
        """Lay the manifest of its own authority beside its keys."""
        return save_manifest(self.directory / COORDINATOR, self.authority.signed_manifest)

    def say(self, word: dict[str, Any] | None) -> None:
        """Weaken it, or undo that."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(word) + "\n")
        self.process.stdin.flush()
        assert self.process.stdout.readline().strip() == "done"

    def kill(self) -> None:
        """End it."""
        with self.process:
            self.process.kill()


class Stage:
    """All that attacks play on; a context manager, which ends its processes.

    Attributes:
        consortium: everybody's directories.
        numbers: for names that are used once.
    """

    def __init__(self) -> None:
        self._held = ExitStack()
        self.numbers = itertools.count(1)
        self._silos: dict[tuple[str, bool], Silo] = {}
        self._servers: dict[tuple[tuple[str, ...], Weakening | bool, bool], Serving] = {}

    def __enter__(self) -> Stage:
        self.root = Path(self._held.enter_context(tempfile.TemporaryDirectory(prefix="attacks-")))
        self.consortium = Consortium(self.root / "consortium")
        return self

    def __exit__(self, *_: object) -> None:
        self.end()
        self._held.close()

    def end(self) -> None:
        """End all processes; who wants one gets a new one."""
        for held in (self._silos, self._servers):
            while held:
                held.popitem()[1].kill()  # type: ignore[attr-defined]

    def new_directory(self) -> Path:
        """A fresh directory."""
        path = self.root / f"scene-{next(self.numbers)}"
        path.mkdir()
        return path

    def profile(self, silo: str, address: str, place: Path) -> Path:
        """A copy of a silo's directory, so that its ledger is a scene's own."""
        path = place / silo
        shutil.copytree(self.consortium.root / silo, path)
        write_profile(path, address)
        return path

    def silo(self, name: str, *, weakened: bool) -> Silo:
        """A silo's process."""
        key = (name, weakened)
        if key not in self._silos or not self._silos[key].alive:
            self._silos[key] = Silo(f"{name}-{'weak' if weakened else 'ours'}", self.root)
        return self._silos[key]

    def drop_silo(self, name: str, *, weakened: bool) -> None:
        """End a process that does not answer; the next who wants it gets a new one."""
        if (name, weakened) in self._silos:
            self._silos.pop((name, weakened)).kill()

    @contextmanager
    def serving(
        self,
        weakening: Weakening | None,
        *,
        settings: Sequence[str] = (),
        from_start: bool = False,
        own: bool = False,
    ) -> Iterator[Serving]:
        """A coordinator's process, kept for the scenes to come.

        Args:
            weakening: in force meanwhile.
            settings: as for ``serve``.
            from_start: the weakening is in force before the process starts, and until it ends.
            own: with an authority and keys of its own (``Serving.authority``): copies, in which an
                attack may change who is a member.
        """
        apart = weakening if weakening is not None and from_start else weakening is not None
        key = (tuple(settings), apart, own)
        if key not in self._servers or self._servers[key].process.poll() is not None:
            before = weakening if from_start else None
            self._servers[key] = self.serve(before, settings=settings, own=own)
        server = self._servers[key]
        if weakening is None or from_start:
            yield server
            return
        server.say(weakening.to_json())
        try:
            yield server
        finally:
            if server.process.poll() is None:
                server.say(None)

    def serve(
        self,
        weakening: Weakening | None = None,
        *,
        credentials: Path | None = None,
        directory: Path | None = None,
        settings: Sequence[str] = (),
        own: bool = False,
    ) -> Serving:
        """Start a coordinator's process; who asks ends it.

        Args:
            weakening: in force before it starts.
            credentials: the coordinator's directory.
            directory: of its state; a new one if None.
            settings: more lines of ``coordinator.toml``.
            own: with an authority and keys of its own.
        """
        directory = directory or self.new_directory()
        if own:
            shutil.copytree(self.consortium.authority.directory, directory / "authority")
            credentials = directory / COORDINATOR
            shutil.copytree(self.consortium.root / COORDINATOR, credentials)
        config, port_file = directory / "coordinator.toml", directory / "port"
        port_file.unlink(missing_ok=True)
        lines = [
            'listen = "127.0.0.1:0"',
            f'credentials = "{credentials or self.consortium.root / COORDINATOR}"',
            'state = "state"',
            'log_level = "debug"',
            "grace = 0.1",
            *settings,
        ]
        config.write_text("\n".join(lines) + "\n")
        words = [] if weakening is None else [json.dumps(weakening.to_json())]
        with (directory / "log").open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "threat_model.attacks.server", config, port_file, *words],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                cwd=_ROOT,
                text=True,
            )
        end = time.monotonic() + START_SECONDS
        while not port_file.exists():
            if process.poll() is not None or time.monotonic() > end:
                process.kill()
                raise RuntimeError(f"no coordinator: {(directory / 'log').read_text()[-2000:]}")
            time.sleep(0.01)
        return Serving(process, directory, int(port_file.read_text()))
