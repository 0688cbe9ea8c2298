"""Sealing sessions end to end: who gets the key and when, what a restart costs, epochs."""

from __future__ import annotations

import logging
import subprocess
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import client_sdk
from client_sdk.channel import Channel
from client_sdk.session import Outcome, Session
from secagg.ckks import keyring
from secagg.ckks.sealing import Sealer
from secagg.config import Protection
from secagg.crypto.labels import SIGN_RESULT
from secagg.crypto.secret import Secret
from secagg.errors import (
    ConfigError,
    CredentialError,
    FaultyServer,
    PoisonedResult,
    PolicyRefused,
    SessionEnded,
)
from secagg.masking import client, transcript
from secagg.masking.messages import SEED_BYTES, Result
from secagg.pki.credentials import read_keys
from secagg.pki.names import Role
from secagg.ring.expand import masked
from secagg.suite import Suite
from secagg.wire import attempt as wire
from secagg.wire._pb import service_pb2 as api

from .federation import (
    SILOS,
    Consortium,
    Coordinator,
    Federation,
    bounded,
    make_sum,
    make_task,
    rank,
    refused,
)

ABC = ("a", "b", "c")
SEALING = [Protection.CKKS_MASKED, Protection.CKKS]
MASKED = Protection.CKKS_MASKED
WAIT = 40.0


def add(session: Session) -> float:
    """1 + 2 + 3 + 4, or without those that are missing."""
    return float(session.sum({"x": np.array([float(rank(session))])})["x"][0])


def near(*values: float) -> Any:
    return pytest.approx(list(values), abs=1e-6)


def epochs(federation: Federation, name: str) -> list[int]:
    """Under which epoch's key each round was sealed, as everybody can see."""
    results = [wire.result_from_wire(message) for message in federation.show(name).results]
    assert all(result.key is not None for result in results)
    return [result.key.epoch for result in results if result.key is not None]


def material(session: Session) -> bytes:
    """The newest key of a silo."""
    assert session._keys is not None
    held = session._keys.held
    assert held is not None
    return held.material.reveal()


def places(root: Path, secret: bytes) -> list[str]:
    """Files under a directory that hold a secret, raw or in hexadecimal."""
    spelt = (secret, secret.hex().encode())
    files = (path for path in root.rglob("*") if path.is_file())
    return [str(p.relative_to(root)) for p in files if any(s in p.read_bytes() for s in spelt)]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Methods that silos called."""
    made: list[str] = []
    real = Channel.call

    def call(self: Channel, method: str, request: Any, kind: Any, **options: Any) -> Any:
        made.append(method)
        return real(self, method, request, kind, **options)

    monkeypatch.setattr(Channel, "call", call)
    return made


def keepers() -> list[threading.Thread]:
    """The threads that serve the key, of all sessions of this process."""
    return [thread for thread in threading.enumerate() if thread.name == "secagg-keeper"]


# Who gets the key.


@pytest.mark.parametrize("protection", SEALING)
def test_a_late_joiner_gets_the_key_from_silos_that_are_training(
    federation: Federation, protection: Protection, calls: list[str]
) -> None:
    """Nobody is inside a call but the keepers, and the past opens all the same."""
    federation.allow(protection)
    name = federation.create(make_sum(rounds=2), protection=protection, train_deadline=0.3)
    training, joined = threading.Barrier(4), threading.Event()

    def program(session: Session) -> list[float]:
        first = add(session)
        training.wait(WAIT)  # local training, for as long as it takes
        assert joined.wait(WAIT)
        return [first, add(session)]

    def late() -> list[float]:
        training.wait(WAIT)
        with client_sdk.join(name, profile=federation.silo("d")) as session:
            first = add(session)
            joined.set()
            return [first, add(session)]

    def early(silo: str) -> list[float]:
        with client_sdk.join(name, profile=federation.silo(silo)) as session:
            return program(session)

    work: dict[str, Any] = {s: lambda s=s: early(s) for s in ABC}
    found = federation.together(name, {**work, "d": late})
    assert all(sums[0] == pytest.approx(6.0, abs=1e-6) for sums in found.values())
    assert len({tuple(sums) for sums in found.values()}) == 1  # to the bit
    assert calls.count("AnnounceKey") == 1
    assert set(epochs(federation, name)) == {1}


def test_keepers_end_with_their_sessions(federation: Federation) -> None:
    """In a wait for requests, and before there is any key."""
    before = set(keepers())
    name = federation.create(make_sum(rounds=1), protection=MASKED)
    idle = client_sdk.join(name, profile=federation.silo("a"))
    assert len(set(keepers()) - before) == 1
    idle.close()
    federation.play(name, add)
    bounded("end of the keepers", lambda: None if set(keepers()) - before else True)


def test_nothing_on_disk_or_at_the_coordinator_has_the_key(federation: Federation) -> None:
    name = federation.create(make_sum(rounds=1), protection=MASKED)

    def program(session: Session) -> bytes:
        add(session)
        return material(session)

    (secret,) = set(federation.play(name, program).values())
    root = federation.consortium.root
    assert places(root, secret) == []
    for silo in SILOS:
        assert places(federation.silo(silo), secret) == []
        assert list(federation.silo(silo).rglob("*.keys")) == []


def test_a_key_directory_spares_the_peers(federation: Federation, calls: list[str]) -> None:
    """A silo that keeps its keys comes back alone; they lie there, its user's alone."""
    federation.amend("d", '# key_directory = "keys"', 'key_directory = "keys"')
    name = federation.create(make_sum(rounds=2), protection=MASKED)
    made = threading.Event()

    def program(session: Session) -> bytes:
        assert session._keys is not None
        if session.silo == "a":
            session._keys.newest({})
            made.set()
        assert made.wait(WAIT)
        add(session)
        return material(session)

    (secret,) = set(federation.play(name, program).values())
    place = federation.silo("d")
    (file,) = places(place, secret)
    assert Path(file).parent == Path("keys")
    assert (place / file).stat().st_mode & 0o777 == 0o600
    assert (place / "keys").stat().st_mode & 0o777 == 0o700
    calls.clear()
    with client_sdk.join(name, profile=place) as session:  # nobody else is there
        assert add(session) == pytest.approx(10.0, abs=1e-6)
    assert "AskKey" not in calls
    calls.clear()
    assert set(federation.play(name, two).values()) == {(10.0, 10.0)}
    assert "AnnounceKey" not in calls
    assert set(epochs(federation, name)) == {1}


def two(session: Session) -> tuple[float, float]:
    return round(add(session), 6), round(add(session), 6)


def test_a_damaged_key_file_is_named(federation: Federation) -> None:
    federation.amend("d", '# key_directory = "keys"', 'key_directory = "keys"')
    name = federation.create(make_sum(rounds=1), protection=MASKED)
    federation.play(name, add)
    (file,) = (federation.silo("d") / "keys").iterdir()
    file.write_bytes(file.read_bytes()[:-1])
    with refused(ConfigError, "keyring-file") as caught:
        client_sdk.join(name, profile=federation.silo("d"))
    assert "Remove the file" in str(caught.value)
    file.unlink()
    client_sdk.join(name, profile=federation.silo("d")).close()


# What a silo's operator has to say.


def test_plain_ckks_has_to_be_allowed_by_name(
    federation: Federation, calls: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    name = federation.create(make_sum(rounds=1), protection=Protection.CKKS)
    calls.clear()
    with refused(PolicyRefused, "policy-protection"):
        client_sdk.join(name, profile=federation.silo("a"))
    assert calls == ["JoinSession"]
    federation.allow(Protection.CKKS)
    with (
        caplog.at_level(logging.WARNING, "client_sdk"),
        client_sdk.join(name, profile=federation.silo("a")),
    ):
        assert "any silo that works with the coordinator reads every update" in caplog.text
    caplog.clear()
    masked = federation.create(make_sum(rounds=1), protection=Protection.CKKS_MASKED)
    federation.amend("b", '"ckks", ', "")
    with client_sdk.join(masked, profile=federation.silo("b")):
        assert "reads every update" not in caplog.text


# Epochs.


def test_past_sums_without_any_key_are_said_to_be_gone(federation: Federation) -> None:
    """All silos start again without keys: nobody answers, a new epoch begins, and that is said."""
    name = federation.create(make_sum(rounds=2), protection=MASKED, phase_deadline=1.0)
    federation.play(name, add)
    known = threading.Barrier(4)

    def program(session: Session) -> None:
        with refused(ConfigError, "key-gone") as caught:
            add(session)
        assert "key_directory" in str(caught.value)
        known.wait(WAIT)

    federation.play(name, program)


class Trainer:
    """Trains at a few silos, some of which spoil a round by sealing under another key.

    Args:
        spoilt: the round, from 1.
        by: the silo.
    """

    def __init__(self, spoilt: int = 0, by: str = "d") -> None:
        self.spoilt, self.by = spoilt, by

    def __call__(self, session: Session, rounds: int = 1000) -> dict[str, Any]:
        model, moved, poisoned = nn.Linear(1, 1, bias=False), [], []
        nn.init.zeros_(model.weight)
        for current in session.rounds(model):
            before = float(model.weight.detach())
            with torch.no_grad():
                model.weight.add_(rank(session))
            if (session.silo, current.number) == (self.by, self.spoilt):
                self._spoil(session)
            try:
                current.submit(model, weight=1)
            except PoisonedResult as error:
                poisoned.append((current.number, error.code))
            moved.append(before)
            if len(moved) == rounds:
                break
        return {"began": moved, "poisoned": poisoned, "weight": float(model.weight.detach())}

    def _spoil(self, session: Session) -> None:
        real, other = session._encode, Sealer(Suite.CKKS_54, Secret(b"\x07" * 32), workers=1)

        def encode(codec: Any, update: Any, key: Any) -> Any:
            session._encode = real  # type: ignore[method-assign]
            seed = b"\x08" * SEED_BYTES
            arguments = {"weight": update.weight, "metrics": update.metrics}
            vector = codec.encode(update.tensors, **arguments, sealer=other, seed=seed)
            return masked(codec.ring, vector), seed

        session._encode = encode  # type: ignore[method-assign]


@pytest.mark.parametrize("protection", SEALING)
def test_a_sum_that_does_not_open_is_not_applied_and_ends_the_epoch(
    federation: Federation, calls: list[str], protection: Protection
) -> None:
    federation.allow(protection)
    name = federation.create(make_task(rounds=3), protection=protection)
    for found in federation.play(name, Trainer(spoilt=2)).values():
        assert found["poisoned"] == [(2, "reserved-slot")]
        assert found["began"] == near(0.0, 2.5, 2.5)
        assert found["weight"] == pytest.approx(5.0, abs=1e-6)
    assert calls.count("EndKey") == len(SILOS)
    assert epochs(federation, name) == [1, 1, 2]


def test_the_last_sum_may_be_the_one_that_does_not_open(federation: Federation) -> None:
    """The session is over, nobody ends an epoch any more: the round is reported all the same."""
    name = federation.create(make_task(rounds=2), protection=MASKED)
    for found in federation.play(name, Trainer(spoilt=2)).values():
        assert found["poisoned"] == [(2, "reserved-slot")]
        assert found["weight"] == pytest.approx(2.5, abs=1e-6)


def test_all_silos_start_again_without_keys(federation: Federation, calls: list[str]) -> None:
    """Training goes on from the silos' own checkpoints, under a new epoch's key."""
    name = federation.create(make_task(rounds=2), protection=MASKED, phase_deadline=1.0)
    first = federation.play(name, lambda session: Trainer()(session, rounds=1))
    assert all(found["began"] == near(0.0) for found in first.values())
    calls.clear()
    for found in federation.play(name, Trainer()).values():
        assert found["began"] == near(2.5)
        assert found["weight"] == pytest.approx(5.0, abs=1e-6)
    old, new = epochs(federation, name)
    assert old < new


@pytest.fixture(scope="module")
def wearing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Consortium]:
    """A coordinator for which a key is worn after two sums; e is there to be revoked."""
    prelude = "import secagg.coordinator.keys as keys; keys.SUMS_PER_KEY = 2"
    made = Consortium(tmp_path_factory.mktemp("wearing"), (*SILOS, "e"), prelude)
    yield made
    made.close()


@pytest.fixture
def worn(wearing: Consortium, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Federation:
    monkeypatch.setattr(keyring, "SUMS_PER_KEY", 2)
    return Federation(wearing, tmp_path)


def silos_of(
    federation: Federation, name: str, program: Callable[[Session], Any], silos: Any
) -> dict[str, Callable[[], Any]]:
    """What each silo does, for ``Federation.together``."""

    def one(silo: str) -> Any:
        with client_sdk.join(name, profile=federation.silo(silo)) as session:
            return program(session)

    return {silo: lambda silo=silo: one(silo) for silo in silos}  # type: ignore[misc]


def test_a_key_wears_out_and_its_sums_open_for_who_joins_later(worn: Federation) -> None:
    name = worn.create(make_sum(rounds=6), protection=MASKED, train_deadline=0.3)
    done, replayed = threading.Barrier(4), threading.Event()

    def early(session: Session) -> list[float]:
        sums = [add(session) for _ in range(5)]
        done.wait(WAIT)
        assert replayed.wait(WAIT)
        return [*sums, add(session)]

    def late(session: Session) -> list[float]:
        done.wait(WAIT)
        sums = [add(session) for _ in range(5)]
        replayed.set()
        return [*sums, add(session)]

    work = silos_of(worn, name, early, ABC) | silos_of(worn, name, late, "d")
    sums = set(map(tuple, worn.together(name, work).values()))
    assert len(sums) == 1
    assert list(sums.pop())[:5] == near(*[6.0] * 5)
    assert epochs(worn, name) == [1, 1, 2, 2, 3, 3]


def test_who_is_revoked_does_not_get_the_next_key(worn: Federation) -> None:
    """The others make a new one by themselves; the member that left is not told it."""
    name = worn.create(make_sum(rounds=3), protection=MASKED, silos=("b", "c", "d", "e"))
    revoked = threading.Barrier(4)
    own = worn.consortium
    outcomes: dict[str, list[float]] = {}

    def program(session: Session) -> bytes:
        outcomes[session.silo] = [add(session)]
        old = material(session)
        if revoked.wait(WAIT) == 0:
            own.authority.revoke(Role.SILO, "e", now=datetime.now(UTC))
            own.install_manifest("coordinator")
        revoked.wait(WAIT)
        if session.silo == "e":
            with pytest.raises(CredentialError):
                add(session)
            assert material(session) == old
            return old
        outcomes[session.silo] += [add(session), add(session)]
        assert session._keys is not None
        held = session._keys.held
        assert held is not None
        assert list(held.members) == ["b", "c", "d"]
        return held.material.reveal()

    found = worn.play(name, program, ("b", "c", "d", "e"))
    assert len({found[silo] for silo in "bcd"}) == 1
    assert found["b"] != found["e"]
    assert all(outcomes[silo] == near(14.0, 9.0, 9.0) for silo in "bcd")
    assert epochs(worn, name)[:2] == [1, 2]


def restart(coordinator: Coordinator, directory: Path) -> None:
    """Kill a coordinator, and start it again where it was."""
    coordinator._process.kill()
    coordinator._process.wait(20)
    config = directory / "coordinator.toml"
    config.write_text(config.read_text().replace("127.0.0.1:0", coordinator.address))
    with coordinator.log.open("ab") as log:
        coordinator._process = subprocess.Popen(coordinator._process.args, stdout=log, stderr=log)


@pytest.mark.process
def test_a_coordinator_that_is_killed_keeps_epoch_and_key(
    worn: Federation, monkeypatch: pytest.MonkeyPatch, calls: list[str]
) -> None:
    """And silos that come back after it get the key from those that stayed."""
    name = worn.create(make_sum(rounds=2), protection=MASKED)
    played = threading.Barrier(4)

    def stays(session: Session) -> list[float]:
        first = add(session)
        if played.wait(WAIT) == 0:
            restart(worn.consortium.coordinator, worn.consortium.root / "serve")
        played.wait(WAIT)
        return [first, add(session)]

    def leaves() -> list[float]:
        for work in silos_of(worn, name, add, "d").values():
            work()
        played.wait(WAIT)
        played.wait(WAIT)
        for again in silos_of(worn, name, lambda s: [add(s), add(s)], "d").values():
            return again()  # type: ignore[no-any-return]
        raise AssertionError

    work = silos_of(worn, name, stays, ABC)
    found = worn.together(name, {**work, "d": leaves})
    assert all(sums == near(10.0, 10.0) for sums in found.values())
    assert calls.count("AnnounceKey") == 1
    assert epochs(worn, name) == [1, 1]


def test_a_silo_that_comes_when_all_is_over(federation: Federation) -> None:
    """Who kept no key can open nothing then; who did needs nobody."""
    federation.amend("c", '# key_directory = "keys"', 'key_directory = "keys"')
    name = federation.create(make_sum(rounds=1), protection=MASKED)
    federation.play(name, add)
    with client_sdk.join(name, profile=federation.silo("c")) as session:
        assert add(session) == pytest.approx(10.0, abs=1e-6)
    with (
        client_sdk.join(name, profile=federation.silo("d")) as session,
        refused(SessionEnded, "session-over"),
    ):
        add(session)


def test_an_update_is_submitted_again_under_a_fresh_seed(
    federation: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A silo that dies after it submitted seals the very same update anew, never under one c1."""
    name = federation.create(make_task(rounds=1), protection=MASKED, phase_deadline=1.5)
    real, lock, seen = client.mask_input, threading.Lock(), []

    class Died(Exception):
        """Its process is gone."""

    def mask_input(state: Any, event: Any, encoded: Any, seed: bytes) -> Any:
        with lock:
            seen.append((state.attempt.me, seed))
            dies = [me for me, _ in seen].count("d") == 1 and state.attempt.me == "d"
            dies |= state.attempt.me == "c" and [me for me, _ in seen].count("c") == 1
        if dies:
            raise Died
        return real(state, event, encoded, seed)

    monkeypatch.setattr(client, "mask_input", mask_input)

    def program(session: Session) -> Outcome:
        given = {"x": np.full(3, float(rank(session)))}
        return session.aggregate("training", given, weight=1.0, metrics={})

    def mortal(silo: str) -> Outcome:
        (work,) = silos_of(federation, name, program, silo).values()
        with pytest.raises(Died):
            work()
        return work()  # type: ignore[no-any-return]

    work: dict[str, Any] = silos_of(federation, name, program, "ab")
    work |= {s: lambda s=s: mortal(s) for s in "cd"}
    for outcome in federation.together(name, work).values():
        np.testing.assert_allclose(outcome.tensors["x"], 2.5, rtol=0, atol=1e-6)
        assert outcome.survivors == SILOS
    assert len({seed for _, seed in seen}) == len(seen) >= 8


def test_whoever_kept_the_key_gives_it_again_to_all_who_lost_it(federation: Federation) -> None:
    """Silo d made it and gave it to everybody; they start again, and the past opens for them."""
    federation.amend("d", '# key_directory = "keys"', 'key_directory = "keys"')
    name = federation.create(make_sum(rounds=2), protection=MASKED, phase_deadline=3.0)
    made = threading.Event()

    def program(session: Session) -> float:
        assert session._keys is not None
        if session.silo == "d":
            session._keys.newest({})
            made.set()
        assert made.wait(WAIT)
        return add(session)

    federation.play(name, program)
    assert set(federation.play(name, two).values()) == {(10.0, 10.0)}


@pytest.mark.parametrize("protection", SEALING)
def test_a_result_with_other_seeds_than_were_signed(
    federation: Federation, protection: Protection
) -> None:
    """Even the same ones in another order, under the coordinator's own signature."""
    federation.allow(protection)
    identity = read_keys(federation.consortium.root / "coordinator", Role.COORDINATOR).identity
    assert identity is not None

    def changed(result: Result) -> Result:
        lie = replace(result, seeds=result.seeds[::-1])
        tau4 = transcript.result_transcript(result.survivors_transcript, result.vector_digest)
        return replace(lie, signature=identity.sign(SIGN_RESULT, tau4, lie.body()))

    def lied_to(session: Session) -> None:
        real = session._channel.call

        def call(method: str, request: Any, kind: Any, **options: Any) -> Any:
            reply = real(method, request, kind, **options)
            if method == "Next" and reply.WhichOneof("event") == "result":
                result = changed(wire.result_from_wire(reply.result))
                reply = api.NextReply(result=wire.result_to_wire(result))
            return reply

        session._channel.call = call  # type: ignore[method-assign]
        with refused(FaultyServer, "result-survivors"):
            add(session)

    name = federation.create(make_sum(rounds=1), protection=protection)
    federation.play(name, add, a=lied_to)
