"""A consortium on disk, its coordinator as a real process, and silos in threads.

Every test plays its own session with its own copies of the silos' directories, so that no test
finds another one's ledger; the coordinator's process is shared.
"""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, TypeVar

import pytest

import client_sdk
from client_sdk.channel import Channel
from client_sdk.session import Session
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
from secagg.errors import SecaggError
from secagg.pki.authority import LEAF_DAYS, Authority
from secagg.pki.enrolment import create_request, install_bundle
from secagg.pki.names import Role
from secagg.pki.profile import write_policy, write_profile
from secagg.suite import Suite
from secagg.wire._pb import service_pb2 as api
from secagg.wire.session import config_to_wire

T = TypeVar("T")
CONSORTIUM = "hospitals"
SILOS = ("a", "b", "c", "d")
BOUND_SECONDS = 60.0
_numbers = itertools.count(1)


@contextmanager
def refused(kind: type[SecaggError], code: str) -> Iterator[pytest.ExceptionInfo[SecaggError]]:
    """Expect an error of exactly this class and code."""
    with pytest.raises(kind) as caught:
        yield caught
    assert (type(caught.value), caught.value.code) == (kind, code)


def bounded(what: str, look: Callable[[], T | None]) -> T:
    """Look until there is something, for a bounded time."""
    end = time.monotonic() + BOUND_SECONDS
    while time.monotonic() < end:
        if (found := look()) is not None:
            return found
        threading.Event().wait(0.02)
    raise AssertionError(f"no {what} within {BOUND_SECONDS} s")


def enrol(
    authority: Authority,
    directory: Path,
    name: str,
    role: Role = Role.SILO,
    *,
    now: datetime | None = None,
    days: int = LEAF_DAYS,
) -> Path:
    """Enrol a member as its operator and the admin would."""
    now = now or datetime.now(UTC)
    request = create_request(directory, role, name, authority.consortium, os.urandom)
    bundle = authority.approve(request, now=now, days=days)
    install_bundle(directory, bundle, fingerprint=authority.fingerprint, now=now)
    return directory


def settle(directory: Path, address: str, *, silo: bool = True) -> Path:
    """Write the files that an operator edits."""
    write_profile(directory, address)
    if silo:
        write_policy(directory)
    return directory


GENEROUS = "max_sessions = 1000\nsessions_per_admin = 1000"


class Coordinator:
    """``secagg serve`` in a process of its own.

    Args:
        credentials: the coordinator's directory.
        directory: for its state, its log and its configuration; made here.
        prelude: Python that its process runs first.
        limits: its table of limits.
    """

    def __init__(
        self, credentials: Path, directory: Path, prelude: str = "", limits: str = GENEROUS
    ) -> None:
        directory.mkdir()
        config = directory / "coordinator.toml"
        config.write_text(
            f'listen = "127.0.0.1:0"\ncredentials = "{credentials}"\nstate = "state"\n'
            f"grace = 0.1\n[limits]\n{limits}\n"
        )
        port_file = directory / "port"
        program = f"{prelude}\nfrom secagg.cli import main; main()"
        command = [sys.executable, "-c", program, "serve"]
        command += ["--config", str(config), "--port-file", str(port_file)]
        self.log = directory / "log"
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log)

        def bound() -> int | None:
            assert self._process.poll() is None, self.log.read_text()
            return int(port_file.read_text()) if port_file.exists() else None

        self.address = f"127.0.0.1:{bounded('port', bound)}"

    def stop(self) -> None:
        self._process.terminate()
        self._process.wait(20)


class Consortium:
    """An authority thirty days old, and everybody enrolled with it."""

    def __init__(
        self,
        root: Path,
        silos: Sequence[str] = SILOS,
        prelude: str = "",
        limits: str = GENEROUS,
    ) -> None:
        self.root = root
        now = datetime.now(UTC) - timedelta(days=30)
        self.authority = Authority.create(root / "authority", CONSORTIUM, now=now)
        for name in silos:
            enrol(self.authority, root / name, name)
        enrol(self.authority, root / "coordinator", "coordinator", Role.COORDINATOR)
        enrol(self.authority, root / "admin", "admin", Role.ADMIN)
        self.install_manifest("coordinator", *silos)
        self.coordinator = Coordinator(root / "coordinator", root / "serve", prelude, limits)
        for name in silos:
            settle(root / name, self.coordinator.address)
        settle(root / "admin", self.coordinator.address, silo=False)
        profile = client_sdk.load_profile(root / "admin", role=Role.ADMIN)
        self.admin = Channel(profile, "Admin")

    def install_manifest(self, *names: str) -> None:
        """Give members the authority's newest manifest."""
        from secagg.pki.credentials import save_manifest

        for name in names:
            save_manifest(self.root / name, self.authority.signed_manifest)

    def close(self) -> None:
        self.admin.close()
        self.coordinator.stop()


def make_task(**changes: Any) -> TaskConfig:
    """A task of means."""
    values: dict[str, Any] = {
        "name": "training",
        "weighting": Weighting.MEAN,
        "rounds": 3,
        "ring_bits": 64,
        "bound": 8.0,
        "clip": Clip.NONE,
        "weight_cap": 100.0,
        "metrics": (),
    }
    return TaskConfig(**values | changes)


def make_sum(**changes: Any) -> TaskConfig:
    """A task of sums."""
    values: dict[str, Any] = {
        "name": "statistics",
        "weighting": Weighting.SUM,
        "weight_cap": 1.0,
        "bound": 1000.0,
    }
    return make_task(**values | changes)


LOSS = (Metric("loss", 10.0),)


def make_session(*tasks: TaskConfig, silos: Sequence[str] = SILOS, **changes: Any) -> SessionConfig:
    """A session; four silos give t = 3, so one may drop out of any phase.

    Where the protection seals, tasks bring no word size of their own.
    """
    protection = changes.get("protection", Protection.MASKED)
    if protection.seals:
        tasks = tuple(replace(task, ring_bits=None) for task in tasks or (make_task(),))
    values: dict[str, Any] = {
        "name": f"study-{next(_numbers)}",
        "consortium": CONSORTIUM,
        "silos": tuple(silo_id(name) for name in silos),
        "protection": protection,
        "suite": Suite.CKKS_54 if protection.seals else None,
        "colluders": 1,
        "threshold": ThresholdRule(2, 3),
        "min_cohort": 3,
        "mask_prg": MaskPrg.AES_128_CTR,
        "tasks": tasks or (make_task(),),
        "train_deadline": 40.0,
        "phase_deadline": 20.0,
    }
    return SessionConfig(**values | changes)


class Federation:
    """One test's sessions and silos."""

    def __init__(self, consortium: Consortium, tmp_path: Path) -> None:
        self.consortium = consortium
        self._place = tmp_path
        self._lock = threading.Lock()

    def silo(self, name: str) -> Path:
        """This test's own copy of a silo's directory."""
        place = self._place / "silos" / name
        with self._lock:
            if not place.exists():
                shutil.copytree(self.consortium.root / name, place)
        return place

    def amend(self, name: str, old: str, new: str) -> None:
        """Edit a silo's policy, as its operator would."""
        policy = self.silo(name) / "policy.toml"
        text = policy.read_text()
        assert old in text
        policy.write_text(text.replace(old, new))

    def allow(self, protection: Protection) -> None:
        """Have all silos' policies name a protection that is not among the defaults."""
        if protection is Protection.CKKS:
            for name in SILOS:
                self.amend(name, 'protections = ["masked", ', 'protections = ["ckks", ')

    def create(self, *tasks: TaskConfig, **changes: Any) -> str:
        """Create a session as an admin; returns its name."""
        config = make_session(*tasks, **changes)
        self.consortium.admin.call(
            "CreateSession",
            api.CreateSessionRequest(config=config_to_wire(config)),
            api.CreateSessionReply,
        )
        return config.name

    def show(self, name: str) -> api.ShowSessionReply:
        """What an admin sees of a session."""
        request = api.ShowSessionRequest(name=name)
        return self.consortium.admin.call("ShowSession", request, api.ShowSessionReply)

    def state(self, name: str, silo: str) -> str:
        """What the coordinator last saw a silo doing."""
        return next(s.state for s in self.show(name).silos if s.name == silo)

    def await_state(self, name: str, silo: str, state: str) -> None:
        """Look until the coordinator sees a silo doing this."""
        bounded(
            f"{silo} in state {state}", lambda: True if self.state(name, silo) == state else None
        )

    def abort(self, name: str) -> None:
        """End a session."""
        request = api.AbortSessionRequest(name=name)
        self.consortium.admin.call("AbortSession", request, api.Ack)

    def play(
        self,
        name: str,
        program: Callable[[Session], T],
        silos: Sequence[str] = SILOS,
        **others: Callable[[Session], T],
    ) -> dict[str, T]:
        """Run a program at each silo of a session; ``others`` names those with one of their own."""

        def one(silo: str) -> T:
            with client_sdk.join(name, profile=self.silo(silo)) as session:
                return others.get(silo, program)(session)

        return self.together(name, {s: lambda s=s: one(s) for s in silos})  # type: ignore[misc]

    def together(self, name: str, work: dict[str, Callable[[], T]]) -> dict[str, T]:
        """Run functions in threads; the first that fails ends the session for the others."""
        with ThreadPoolExecutor(len(work)) as pool:
            futures = {key: pool.submit(function) for key, function in work.items()}
            done, left = wait(futures.values(), BOUND_SECONDS, FIRST_EXCEPTION)
            if left:
                self.abort(name)
            failed = next((error for f in done if (error := f.exception()) is not None), None)
            if failed is not None:
                raise failed
            return {key: future.result(BOUND_SECONDS) for key, future in futures.items()}


def rank(session: Session) -> int:
    """1 for silo a, 2 for b, …"""
    return ord(session.silo) - ord("a") + 1
