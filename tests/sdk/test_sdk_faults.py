"""Silos that are late, die, are interrupted or come back."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import client_sdk
from client_sdk import attempt
from client_sdk.channel import Channel
from client_sdk.session import Outcome, Session
from secagg.config import Protection
from secagg.encoding.schema import Schema
from secagg.errors import ConfigError, FaultyServer, PolicyRefused, RoundAborted, SessionEnded
from secagg.pki.manifest import SignedManifest

from .federation import SILOS, Consortium, Federation, enrol, make_sum, rank, refused

ABC = ("a", "b", "c")


class Died(Exception):
    """A silo's process is gone."""


def add(session: Session) -> Outcome:
    value = {"x": np.array([float(rank(session))])}
    return session.aggregate("statistics", value, weight=1.0, metrics={})


def totals(outcomes: list[Outcome]) -> list[float]:
    return [float(outcome.tensors["x"][0]) for outcome in outcomes]


def test_a_silo_that_never_shows_up(federation: Federation) -> None:
    name = federation.create(make_sum(rounds=1), train_deadline=0.3)
    for outcome in federation.play(name, add, ABC).values():
        assert totals([outcome]) == pytest.approx([6.0])
        assert (outcome.survivors, outcome.dropouts) == (ABC, ())
    assert federation.state(name, "d") == "away"


STEPS = ["advertise_keys", "share_keys", "mask_input", "check_survivors", "reveal_shares"]
MOMENTS = [(Protection.MASKED, step) for step in STEPS]
MOMENTS += [(Protection.CKKS_MASKED, "mask_input"), (Protection.CKKS, "seal_input")]


@pytest.mark.parametrize(("protection", "step"), MOMENTS)
def test_a_silo_that_dies_between_phases_comes_back(
    federation: Federation, monkeypatch: pytest.MonkeyPatch, protection: Protection, step: str
) -> None:
    """It restarts, replays the round that went on without it, and is in the next one."""
    federation.allow(protection)
    name = federation.create(make_sum(rounds=2), phase_deadline=1.5, protection=protection)
    real, died = getattr(attempt.client, step), threading.Event()

    def dying(state: Any, *args: Any, **kwargs: Any) -> Any:
        if state.attempt.me == "d" and not died.is_set():
            died.set()
            raise Died
        return real(state, *args, **kwargs)

    monkeypatch.setattr(attempt.client, step, dying)

    def silo(name_of: str) -> list[Outcome]:
        with client_sdk.join(name, profile=federation.silo(name_of)) as session:
            return [add(session), add(session)]

    def mortal() -> list[Outcome]:
        with pytest.raises(Died):
            silo("d")
        return silo("d")

    work: dict[str, Any] = {s: lambda s=s: silo(s) for s in ABC}
    found = federation.together(name, {**work, "d": mortal})
    included = step == "reveal_shares"  # its vector was in before it died
    if step == "check_survivors":
        included = True
    for outcomes in found.values():
        first, second = outcomes
        assert totals(outcomes) == pytest.approx([10.0 if included else 6.0, 10.0], abs=1e-6)
        assert first.dropouts == (() if included else ("d",))
        assert (second.survivors, second.dropouts) == (SILOS, ())
    assert [o.included for o in found["d"]] == [included, True]


@contextmanager
def process(code: str, *args: str) -> Iterator[subprocess.Popen[str]]:
    """A silo in a process of its own, which says on its standard output how far it is."""
    silo = subprocess.Popen(
        [sys.executable, "-c", code, *args],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield silo
    finally:
        silo.kill()
        silo.communicate(timeout=20)


KILLED = """
import signal, sys, numpy, client_sdk
from client_sdk.channel import Channel
real = Channel.call
def call(self, method, request, kind, **options):
    reply = real(self, method, request, kind, **options)
    if method == "Send" and request.WhichOneof("message") == "share_keys":
        print("shared", flush=True)
        signal.pause()
    return reply
Channel.call = call
with client_sdk.join(sys.argv[1], profile=sys.argv[2]) as session:
    session.sum({"x": numpy.array([4.0])})
"""


@pytest.mark.process
def test_kill_9_after_share_keys(federation: Federation) -> None:
    """Its pair masks are undone by the others; the restarted process is in the next round."""
    name = federation.create(make_sum(rounds=2), phase_deadline=1.5)
    place = federation.silo("d")

    def mortal() -> list[Outcome]:
        with process(KILLED, name, str(place)) as silo:
            assert silo.stdout is not None
            assert silo.stdout.readline() == "shared\n"
            with refused(ConfigError, "ledger-locked"):
                client_sdk.join(name, profile=place)
            silo.send_signal(signal.SIGKILL)
            assert silo.wait(20) == -signal.SIGKILL
        return two("d")

    def two(silo: str) -> list[Outcome]:
        with client_sdk.join(name, profile=federation.silo(silo)) as session:
            return [add(session), add(session)]

    work: dict[str, Any] = {s: lambda s=s: two(s) for s in ABC}
    for outcomes in federation.together(name, {**work, "d": mortal}).values():
        assert totals(outcomes) == pytest.approx([6.0, 10.0])
        assert outcomes[0].dropouts == ("d",)
        assert outcomes[1].survivors == SILOS


INTERRUPTED = """
import signal, sys, numpy, client_sdk
signal.signal(signal.SIGINT, signal.default_int_handler)  # jobs in the background start without
with client_sdk.join(sys.argv[1], profile=sys.argv[2]) as session:
    print("joined", flush=True)
    session.sum({"x": numpy.array([4.0])})
"""


@pytest.mark.process
def test_ctrl_c_leaves_the_round(federation: Federation) -> None:
    name = federation.create(make_sum(rounds=1))
    with process(INTERRUPTED, name, str(federation.silo("d"))) as silo:
        federation.await_state(name, "d", "ready")
        silo.send_signal(signal.SIGINT)
        _, errors = silo.communicate(timeout=20)
        assert silo.returncode in (1, -signal.SIGINT, 130)
        assert "KeyboardInterrupt" in errors
    assert federation.state(name, "d") == "training"


def test_an_interrupt_that_is_caught_leaves_the_round_but_not_the_session(
    federation: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = federation.create(make_sum(rounds=1))
    real = Channel.call
    interrupted = threading.Event()

    def call(self: Channel, method: str, request: Any, kind: Any, **options: Any) -> Any:
        if method == "Next" and not interrupted.is_set():
            assert federation.state(name, "d") == "ready"
            interrupted.set()
            raise KeyboardInterrupt
        return real(self, method, request, kind, **options)

    with client_sdk.join(name, profile=federation.silo("d")) as session:
        monkeypatch.setattr(Channel, "call", call)
        with pytest.raises(KeyboardInterrupt):
            add(session)
        assert federation.state(name, "d") == "training"
        work: dict[str, Any] = {s: lambda s=s: alone(s) for s in ABC}

        def alone(silo: str) -> Outcome:
            with client_sdk.join(name, profile=federation.silo(silo)) as other:
                return add(other)

        found = federation.together(name, {**work, "d": lambda: add(session)})  # the cell, again
    assert all(outcome.survivors == SILOS for outcome in found.values())


def test_attempts_run_out_and_the_round_is_submitted_again(
    federation: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three silos and t = 3: one that falls silent aborts every attempt."""
    name = federation.create(
        make_sum(rounds=1), silos=ABC, phase_deadline=0.8, max_attempts=2, train_deadline=20.0
    )
    silent = [2]
    lock = threading.Lock()
    real = attempt.client.share_keys

    def share_keys(state: Any, *args: Any, **kwargs: Any) -> Any:
        with lock:
            if state.attempt.me == "c" and silent[0]:
                silent[0] -= 1
                raise FaultyServer("tested", "This silo was told to fall silent.")
        return real(state, *args, **kwargs)

    monkeypatch.setattr(attempt.client, "share_keys", share_keys)

    def program(session: Session) -> Outcome:
        if session.silo == "c":
            with refused(FaultyServer, "tested"):
                add(session)
        else:
            with refused(RoundAborted, "round-aborted") as caught:
                add(session)
            assert isinstance(caught.value, RoundAborted)
            assert (caught.value.phase, caught.value.have, caught.value.need) == (
                "share_keys",
                2,
                3,
            )
        return add(session)

    for outcome in federation.play(name, program, ABC).values():
        assert totals([outcome]) == pytest.approx([6.0])
    shown = federation.show(name)
    assert (shown.last_abort.attempt, shown.last_abort.phase) == (2, "share_keys")


def test_a_silo_that_refuses_gets_the_last_round_that_went_on_without_it(
    federation: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The session is done when it says Ready again; the result is its call's all the same."""
    name = federation.create(make_sum(rounds=1), phase_deadline=0.8)
    real, done = attempt.client.share_keys, threading.Event()

    def share_keys(state: Any, *args: Any, **kwargs: Any) -> Any:
        if state.attempt.me == "d":
            assert done.wait(30)
            raise FaultyServer("tested", "This silo was told to refuse.")
        return real(state, *args, **kwargs)

    monkeypatch.setattr(attempt.client, "share_keys", share_keys)

    def program(session: Session) -> Outcome:
        outcome = add(session)
        done.set()
        return outcome

    found = federation.play(name, program, d=add)
    assert {silo: outcome.included for silo, outcome in found.items()} == {
        "a": True,
        "b": True,
        "c": True,
        "d": False,
    }
    assert totals([found["d"]]) == pytest.approx([6.0])


def test_an_aborted_session_ends_those_who_wait(federation: Federation) -> None:
    name = federation.create(make_sum(rounds=1))
    asked = threading.Event()

    def waiting() -> None:
        with (
            client_sdk.join(name, profile=federation.silo("a")) as session,
            refused(SessionEnded, "session-over"),
        ):
            add(session)

    def sitting_out() -> None:
        with client_sdk.join(name, profile=federation.silo("b")) as session:
            session.open_task("statistics", Schema.of({"x": np.zeros(1)}))
            real = session._channel.call

            def call(method: str, request: Any, kind: Any, **options: Any) -> Any:
                if method == "Next":
                    asked.set()
                return real(method, request, kind, **options)

            session._channel.call = call  # type: ignore[method-assign]
            with refused(SessionEnded, "session-over"):
                session.await_result("statistics")

    def admin() -> None:
        federation.await_state(name, "a", "ready")
        assert asked.wait(30)
        federation.abort(name)

    federation.together(name, {"a": waiting, "b": sitting_out, "admin": admin})


def test_another_session_of_the_name_is_told_apart(federation: Federation) -> None:
    """A silo that still holds the old one is told; a used name needs its operator's consent."""
    name = federation.create(make_sum(rounds=3))

    def old(session: Session) -> None:
        add(session)
        together.wait(30)
        if session.silo == "a":
            federation.abort(name)
            federation.create(make_sum(rounds=2), name=name)
        together.wait(30)
        with refused(FaultyServer, "session-replaced"):
            add(session)

    together = threading.Barrier(4)
    federation.play(name, old)
    with refused(PolicyRefused, "policy-session-name"):
        client_sdk.join(name, profile=federation.silo("a"))


def test_a_used_name_needs_consent(federation: Federation) -> None:
    name = federation.create(make_sum(rounds=2))
    federation.play(name, add)
    federation.abort(name)
    federation.create(make_sum(rounds=1), name=name, train_deadline=0.3, phase_deadline=1.0)
    for silo in ABC:
        policy = federation.silo(silo) / "policy.toml"
        text = policy.read_text()
        policy.write_text(text.replace("repeat_sessions = []", f'repeat_sessions = ["{name}"]'))
    with refused(PolicyRefused, "policy-session-name"):  # before anything is sent
        client_sdk.join(name, profile=federation.silo("d"))
    work: dict[str, Any] = {s: lambda s=s: alone(s) for s in ABC}

    def alone(silo: str) -> Outcome:
        with client_sdk.join(name, profile=federation.silo(silo)) as session:
            return add(session)

    found = federation.together(name, work)
    assert totals([found["a"]]) == pytest.approx([6.0])


def test_a_newer_manifest_is_relayed(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    consortium = Consortium(tmp_path_factory.mktemp("changing"))
    federation = Federation(consortium, tmp_path)
    try:
        name = federation.create(make_sum(rounds=2))
        old = consortium.authority.signed_manifest
        between = threading.Barrier(4)

        def program(session: Session) -> list[float]:
            first = add(session)
            if between.wait(30) == 0:
                enrol(consortium.authority, tmp_path / "newcomer", "newcomer")
                consortium.install_manifest("coordinator")
            between.wait(30)
            return totals([first, add(session)])

        for found in federation.play(name, program).values():
            assert found == pytest.approx([10.0, 10.0])
        for silo in SILOS:
            held = SignedManifest.from_json((federation.silo(silo) / "manifest.json").read_bytes())
            assert held.manifest.version == old.manifest.version + 1
            assert "newcomer" in held.manifest.silos
    finally:
        consortium.close()
