"""3,000 seeds, each twice; the same in another process; and bugs that must not go unseen."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from client_sdk import attempt
from client_sdk import session as sdk_session
from client_sdk.ledger import FileLedger
from secagg.coordinator.session import Session
from secagg.coordinator.spool import Stored, Upload
from secagg.errors import RoundAborted, SecaggError
from secagg.masking import client, ledger, server
from secagg.wire._pb import masking_pb2 as pb
from secagg.wire._pb import service_pb2 as api

from .__main__ import LIVENESS, play, summarise
from .disk import SimDisk
from .witness import Trace, Witness
from .world import simulate

pytestmark = pytest.mark.no_cover  # a tracer would double the time, and sees nothing new here
BLOCK, BLOCKS = 50, 60
ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("first", range(0, BLOCK * BLOCKS, BLOCK), ids="seeds-{}".format)
def test_nothing_is_violated_and_everything_replays(first: int) -> None:
    summary = summarise(play(seed, replay=True) for seed in range(first, first + BLOCK))
    assert summary["violations"] == {}
    # One run in a block of fifty is far more than the share that may stand still.
    assert (summary["not_live"], summary["liveness"] >= LIVENESS) == ([], True)


def test_another_process_plays_the_same() -> None:
    seeds = range(7)
    program = (
        "import json, sys\n"
        "from tests.faults.world import simulate\n"
        f"print(json.dumps([simulate(seed).as_dict() for seed in {list(seeds)}]))\n"
    )
    for salt in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": salt}
        done = subprocess.run(
            [sys.executable, "-c", program],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            check=True,
            timeout=120,
        )
        assert json.loads(done.stdout) == [simulate(seed).as_dict() for seed in seeds]


def test_both_secrets_of_a_silo_are_seen() -> None:
    """No bug of one line opens both, so the witness is told of messages that do."""
    witness = Witness(Trace(), lambda *about: np.zeros(1), {}, mean=False)
    for holder, field in (("a", "self_seed"), ("b", "mask_key"), ("b", "self_seed")):
        share = pb.RevealedShare(owner="c", **{field: bytes(33)})
        message = pb.Unmasking(sender=holder, shares=[share])
        request = api.SendRequest(round=1, attempt=1, unmasking=message)
        witness.arrives(holder, "Send", request, request.SerializeToString() + field.encode())
    assert "both secrets of c are open in attempt 1" in witness.violations
    assert any(text.startswith("b revealed both shares") for text in witness.violations)


# Bugs that must not go unseen.

Patch = Callable[[pytest.MonkeyPatch], None]


def no_masked_input_in_the_journal(patch: pytest.MonkeyPatch) -> None:
    log = Session._log

    def forgets(self: Session, make: Any, **how: bool) -> None:
        record = make()
        message = record.accepted.message
        if record.WhichOneof("record") != "accepted" or not message.HasField("masked_input"):
            log(self, lambda: record, **how)

    patch.setattr(Session, "_log", forgets)


def late(kinds: set[str]) -> Patch:
    """Records of some kinds are written down only when the next record is."""

    def apply(patch: pytest.MonkeyPatch) -> None:
        log = Session._log

        def later(self: Session, make: Any, **how: bool) -> None:
            for old, old_how in self.__dict__.pop("_put_off", ()):
                log(self, lambda: old, **old_how)  # noqa: B023 - called at once
            record = make()
            if record.WhichOneof("record") in kinds:
                self.__dict__["_put_off"] = [(record, how)]
            else:
                log(self, lambda: record, **how)

        patch.setattr(Session, "_log", later)

    return apply


def revealed_shares_in_the_journal(patch: pytest.MonkeyPatch) -> None:
    send = Session.send

    def tells(self: Session, message: Any, round_number: int, attempt: int) -> bool:
        new = send(self, message, round_number, attempt)
        if new and hasattr(message, "shares"):
            for share in message.shares:
                self.means.disk.replace(f"{self.folder}/notes", share.share.reveal())
        return new

    patch.setattr(Session, "send", tells)


def no_sync_of_uploads(patch: pytest.MonkeyPatch) -> None:
    def forgets(self: Upload) -> None:
        self._synced = True

    patch.setattr(Upload, "_sync", forgets)


def no_sync_of_ledgers(patch: pytest.MonkeyPatch) -> None:
    def loose(self: SimDisk, name: str, data: bytes) -> None:
        old = self.read(name) or b""
        self.allocate(name, len(old) + len(data))
        self.write(name, 0, old + data)

    record = FileLedger.record

    def forgets(self: FileLedger, entry: Any) -> Any:
        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(SimDisk, "append", loose)
            return record(self, entry)

    patch.setattr(FileLedger, "record", forgets)


def reveals_are_not_recorded(patch: pytest.MonkeyPatch) -> None:
    record = FileLedger.record

    def forgets(self: FileLedger, entry: Any) -> Any:
        if isinstance(entry, ledger.Revealed):
            return ledger.Recorded(entry)
        return record(self, entry)

    patch.setattr(FileLedger, "record", forgets)


def constant_entropy(patch: pytest.MonkeyPatch) -> None:
    real = sdk_session.Session.__init__

    def draws_nothing(self: Any, *args: Any, **kwargs: Any) -> None:
        real(self, *args, **kwargs | {"entropy": lambda size: bytes(range(1, 256))[:size]})

    patch.setattr(sdk_session.Session, "__init__", draws_nothing)


def no_check_of_differencing(patch: pytest.MonkeyPatch) -> None:
    for module in (ledger, client):
        patch.setattr(module, "check_differencing", lambda past, survivors: None)


def no_check_of_updates(patch: pytest.MonkeyPatch) -> None:
    for module in (ledger, client):
        patch.setattr(module, "check_update", lambda past, update: None)
    patch.setattr(sdk_session.Session, "_sealed_update", lambda self, task, own: own)


def masked_inputs_are_added_twice(patch: pytest.MonkeyPatch) -> None:
    accept = server.ServerRound.accept

    def twice(self: Any, message: Any, vector: Any = None) -> bool:
        new = accept(self, message, vector)
        if new and vector is not None and message.sender == "b":
            self._sum.fold(vector)
        return new

    patch.setattr(server.ServerRound, "accept", twice)


def sends_after_an_abort(patch: pytest.MonkeyPatch) -> None:
    ask = attempt.Submission._next

    def goes_on(self: Any, member: Any, number: int, seen: Any) -> Any:
        event = ask(self, member, number, seen)
        if isinstance(event, RoundAborted):
            late = api.SendRequest(
                session_id=member.session_id, round=self.expected.round, attempt=number
            )
            with contextlib.suppress(SecaggError):
                self.channel.call("Send", late, api.Ack)
        return event

    patch.setattr(attempt.Submission, "_next", goes_on)


def damage_is_not_looked_for(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Stored, "check", lambda self, chunk, name, offset, chunk_bytes: None)


def ready_is_said_once(patch: pytest.MonkeyPatch) -> None:
    take_part = attempt.Submission._attempt

    class Once:
        """A channel that lets one Ready an attempt through."""

        def __init__(self, channel: Any) -> None:
            self.__dict__.update(channel=channel, said=False)

        def __getattr__(self, name: str) -> Any:
            return getattr(self.channel, name)

        def call(self, method: str, request: Any, kind: Any, **how: Any) -> Any:
            if method == "Ready":
                if self.__dict__["said"]:
                    return kind()
                self.__dict__["said"] = True
            return self.channel.call(method, request, kind, **how)

    def once(self: Any) -> Any:
        real, self.channel = self.channel, Once(self.channel)
        try:
            return take_part(self)
        finally:
            self.channel = real

    patch.setattr(attempt.Submission, "_attempt", once)


MUTANTS: dict[str, tuple[Patch, str]] = {
    "masked-input-not-journalled": (no_masked_input_in_the_journal, "restart"),
    "acknowledged-before-journalled": (late({"accepted"}), "restart"),
    "published-before-journalled": (late({"phase_closed", "attempt_opened"}), "restart"),
    "released-before-journalled": (late({"released"}), "damage"),
    "ready-before-journalled": (late({"said_ready"}), "restart"),
    "uploads-not-synced": (no_sync_of_uploads, "damage"),
    "shares-on-disk": (revealed_shares_in_the_journal, "share was written"),
    "ledger-not-synced": (no_sync_of_ledgers, "repeated"),
    "reveals-not-recorded": (reveals_are_not_recorded, "two survivor sets"),
    "constant-entropy": (constant_entropy, "drawn before"),
    "differencing-unchecked": (no_check_of_differencing, "two survivor sets"),
    "updates-unchecked": (no_check_of_updates, "updates"),
    "counted-twice": (masked_inputs_are_added_twice, "Poisoned"),
    "sent-after-abort": (sends_after_an_abort, "goes on sending"),
    "damage-unseen": (damage_is_not_looked_for, "damage was not seen"),
    "ready-said-once": (ready_is_said_once, "stuck"),
}
ENOUGH = 150


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_bug_is_seen(mutant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    patch, telling = MUTANTS[mutant]
    patch(monkeypatch)
    for seed in range(ENOUGH):
        report = simulate(seed)
        broken = list(report.violations)
        if not (report.live or report.held_back):
            broken.append("stuck")
        if any(telling in what for what in broken):
            return
    pytest.fail(f"{ENOUGH} runs saw nothing of it")
