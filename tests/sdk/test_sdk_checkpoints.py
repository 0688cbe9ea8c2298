"""Silos and coordinators that come back: checkpoints, kept updates, and what is said again."""

from __future__ import annotations

import contextlib
import logging
import stat
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from google.protobuf.message import Message
from safetensors.numpy import load
from torch import nn

import client_sdk
from client_sdk import attempt as attempt_module
from client_sdk import session as session_module
from client_sdk import tasks as tasks_module
from client_sdk.channel import Channel, CoordinatorRefused
from client_sdk.checkpoint import Checkpoints, Update
from client_sdk.session import Outcome, Session
from client_sdk.tensors import GlobalWeights, load_model, model_file
from secagg.config import silo_id
from secagg.crypto.digest import vector_digest
from secagg.crypto.secret import Secret
from secagg.disk import LocalDisk
from secagg.errors import (
    ConfigError,
    FaultyServer,
    InputError,
    OutOfOrder,
    PoisonedResult,
    PolicyRefused,
    RoundAborted,
    SessionEnded,
    StorageBusy,
    StorageFailed,
)
from secagg.masking import transcript
from secagg.masking.ledger import Joined
from secagg.wire import attempt as wire
from secagg.wire import session as wire_session
from secagg.wire._pb import service_pb2 as api

from .fakes import SESSION_ID, FakeChannel, MemoryDisk
from .federation import (
    SILOS,
    Consortium,
    Coordinator,
    Federation,
    make_session,
    make_sum,
    make_task,
    rank,
    refused,
)

ROUNDS, EPOCHS = 3, 2
FOLDER = f"sessions/{SESSION_ID.hex()}"
POISONED = 2
ALL = tuple(silo_id(name) for name in SILOS)


class Died(Exception):
    """The silo's process is gone."""


class Fate:
    """When a process dies: before or after the call of this number, to network or disk."""

    def __init__(self, at: float = float("inf"), *, after: bool = False) -> None:
        self.left = at
        self.after = after
        self.dead = False

    def __call__(self, call: Callable[[], Any]) -> Any:
        if self.dead:
            raise Died
        self.left -= 1
        self.dead = self.left < 0
        if not self.dead or self.after:
            done = call()
        if self.dead:
            raise Died
        return done


class Mortal:
    """A channel or a disk of a process that dies."""

    def __init__(self, real: Any, fate: Fate) -> None:
        self._real = real
        self._fate = fate

    def close(self) -> None:
        """The coordinator outlives the process."""

    def __getattr__(self, name: str) -> Any:
        real = getattr(self._real, name)
        return lambda *args, **kwargs: self._fate(lambda: real(*args, **kwargs))


def model_of(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 1))


def adam(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=0.05, eps=1e-3, amsgrad=True)


def momentum(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.7, momentum=0.9, nesterov=True)


def train(model: nn.Module) -> None:
    """One epoch, with the luck of this process."""
    for tensor in model.parameters():
        tensor.data.add_(torch.randn(tensor.shape) * 0.1)
    model(torch.randn(4, 2))  # moves the buffers that stay home


class World:
    """A silo's state, and a session that goes on by itself with results of the other silos."""

    def __init__(self, federation: Federation, place: Path | MemoryDisk, **changes: Any) -> None:
        tasks = changes.pop("tasks", (make_task(rounds=ROUNDS),))
        self.fake = FakeChannel(federation, make_session(*tasks, **changes))
        self.fake.lies["Next"] = self.next
        self.fake.lies["Ready"] = self.ready
        self.profile = client_sdk.load_profile(federation.silo("a"))
        self.disk: Any = place if isinstance(place, MemoryDisk) else LocalDisk(place)
        self.ready_with: list[tuple[int, bytes]] = []
        self.update = b""
        self.poison = False

    def ready(self, request: api.ReadyRequest) -> Message:
        self.ready_with.append((len(self.fake.results), self.update))
        return api.Ack()

    def next(self, request: api.NextRequest) -> Message:
        if len(self.fake.results) < request.round:
            self.release()
        result = self.fake.results[request.round - 1]
        return api.NextReply(result=wire.result_to_wire(result))

    def release(self) -> None:
        """Release the next result of the training."""
        number = len(self.fake.results) + 1
        schema = wire_session.opening_from_wire(self.fake.openings["training"]).opening.schema
        generator = np.random.default_rng(number)
        values = {spec.name: generator.uniform(-1, 1, spec.shape) for spec in schema.tensors}
        if self.poison and number == POISONED:
            data = bytearray(8 * (schema.size + 4))
            digest = vector_digest(memoryview(data), self.fake.config.chunk_bytes)
            self.fake.release("training", values, vector_digest=digest)
            self.fake.blobs[str(api.Blob(sum=number))] = data
        else:
            self.fake.release("training", values)

    def join(self, fate: Fate | None = None, disk: Any = None) -> Session:
        fate = fate or Fate()
        channel: Any = Mortal(self.fake, fate)
        own: Any = Mortal(disk or self.disk, fate)
        return Session(self.fake.config.name, self.profile, channel=channel, disk=own)

    def names(self) -> list[str]:
        return self.disk.names(f"{FOLDER}/training")

    def sums_fetched(self) -> list[int]:
        return [
            request.blob.sum
            for method, request in self.fake.calls
            if method == "GetChunk" and request.blob.WhichOneof("of") == "sum"
        ]


@pytest.fixture
def world(federation: Federation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    made = World(federation, tmp_path / "kept")
    watch(monkeypatch, made)
    return made


def watch(monkeypatch: pytest.MonkeyPatch, world: World) -> None:
    """Note which update each Ready is for."""
    real = session_module.Submission

    def submission(*args: Any) -> Any:
        world.update = args[2].update
        return real(*args)

    monkeypatch.setattr(session_module, "Submission", submission)


def play(session: Session, yields: list[int] | None = None, **options: Any) -> dict[str, bytes]:
    """Train to the end; returns the shared weights, bit by bit."""
    model = model_of(1)
    for current in session.rounds(model, **options):
        if yields is not None:
            yields.append(current.number)
        for epoch in range(current.epoch, EPOCHS):
            train(model)
            current.checkpoint(model, epoch + 1, {"luck": torch.get_rng_state()})
        try:
            current.submit(model, weight=1)
        except PoisonedResult:
            continue
    return {name: p.detach().numpy().tobytes() for name, p in model.named_parameters()}


@pytest.mark.parametrize(
    ("make", "poison", "stride"),
    [(None, False, 9), (adam, False, 4), (momentum, True, 9)],
    ids=["fedavg", "fedadam", "momentum-poisoned"],
)
def test_a_restart_at_every_point_changes_nothing(
    federation: Federation, monkeypatch: pytest.MonkeyPatch, make: Any, poison: bool, stride: int
) -> None:
    """Global weights to the bit, and one update a position once the coordinator heard of it."""
    for after in (False, True):
        at, died = 0, True
        while died:
            world = World(federation, MemoryDisk())
            world.poison = poison
            with monkeypatch.context() as patch:
                watch(patch, world)
                fate = Fate(at, after=after)
                with contextlib.suppress(Died):
                    play(world.join(fate), optimizer=make)
                found = play(world.join(), optimizer=make)
                assert found == play(world.join(disk=MemoryDisk()), optimizer=make)
            assert len(set(world.ready_with)) == len({place for place, _ in world.ready_with})
            assert world.names() == [f"{FOLDER}/training/global.safetensors"]
            at, died = at + stride, fate.dead
        assert at > 40


def test_a_restart_fetches_the_sums_after_its_checkpoint_alone(world: World) -> None:
    session = world.join()
    model = model_of(1)
    rounds = session.rounds(model, optimizer=adam)
    next(rounds).submit(model, weight=1)
    world.release()
    world.fake.calls.clear()
    yields: list[int] = []
    play(world.join(), yields, optimizer=adam)
    assert yields == [3]
    assert world.sums_fetched() == [2, 3]
    lists = [r.after for m, r in world.fake.calls if m == "ListResults"]
    assert lists[0] == 0
    weights = [r for m, r in world.fake.calls if m == "GetChunk" and r.blob.weights]
    assert not weights


def test_local_training_goes_on_where_it_was(world: World) -> None:
    model = model_of(1)
    current = next(iter(world.join().rounds(model)))
    assert (current.epoch, current.extra) == (0, {})
    train(model)
    extra = {"step": torch.tensor(7), "bf16": torch.ones(2, dtype=torch.bfloat16)}
    current.checkpoint(model, 1, extra)
    kept = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    train(model)  # lost
    again = model_of(2)
    current = next(iter(world.join().rounds(again)))
    assert (current.number, current.epoch) == (1, 1)
    assert current.extra.keys() == extra.keys()
    for name, tensor in extra.items():
        assert torch.equal(current.extra[name], tensor)
        assert current.extra[name].dtype == tensor.dtype
    for name, tensor in again.state_dict().items():  # shared and unshared, moved since the start
        assert torch.equal(tensor, kept[name])
    current.submit(again, weight=1)
    with refused(OutOfOrder, "round-submitted"):
        current.checkpoint(again, 2)
    assert world.names() == [f"{FOLDER}/training/global.safetensors"]
    current = next(iter(world.join().rounds(again)))
    assert (current.number, current.epoch, current.extra) == (2, 0, {})


def test_a_model_in_training_is_of_one_position(world: World) -> None:
    """A round that went on without this silo is over: its local training is dropped."""
    model = model_of(1)
    current = next(iter(world.join().rounds(model)))
    current.checkpoint(model, 1)
    assert len(world.names()) == 1
    world.release()
    session = world.join()
    current = next(iter(session.rounds(model)))
    assert (current.number, current.epoch) == (2, 0)
    assert world.names() == [f"{FOLDER}/training/global.safetensors"]
    world.release()
    session.replay("training")  # this silo's own other call sees the result before the trainer
    session._tasks["training"].calls -= 1
    current.checkpoint(model, 1)
    assert next(iter(world.join().rounds(model))).epoch == 0


def test_a_model_of_other_tensors_is_trained_from_the_start(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    class Wider(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = model_of(1)
            self.register_buffer("more", torch.ones(1))

        def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[Any]:
            return self.layers.named_parameters()

    model = model_of(1)
    current = next(iter(world.join().rounds(model)))
    train(model)
    current.checkpoint(model, 1)
    before = {name: tensor.clone() for name, tensor in model_of(1).state_dict().items()}
    wider = Wider()
    current = next(iter(world.join().rounds(wider)))
    assert (current.epoch, current.extra) == (0, {})
    assert "[checkpoint-model]" in caplog.text
    for name, tensor in wider.layers.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_what_cannot_be_kept_is_named(world: World) -> None:
    model = model_of(1)
    current = next(iter(world.join().rounds(model)))
    with refused(InputError, "checkpoint-tensor") as caught:
        current.checkpoint(model, 1, {"lr": 0.5})  # type: ignore[dict-item]
    assert "lr is float" in str(caught.value)
    with refused(InputError, "checkpoint-tensor"):
        current.checkpoint(model, 1, {"z": torch.zeros(1, dtype=torch.complex128)})
    assert world.names() == []


@contextmanager
def failing(
    monkeypatch: pytest.MonkeyPatch, world: World, method: str, word: str
) -> Iterator[None]:
    """A disk that refuses for files with a word in their name."""
    real = getattr(LocalDisk, method)

    def refuse(self: LocalDisk, name: str, *rest: Any) -> Any:
        if word in name:
            raise StorageFailed("storage-failed", "The disk refuses.")
        return real(self, name, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(LocalDisk, method, refuse)
        yield


def test_a_disk_that_refuses(
    world: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It costs a later restart time; an update that is not kept is not submitted."""
    model = model_of(1)
    session = world.join()
    rounds = session.rounds(model)
    current = next(rounds)
    with failing(monkeypatch, world, "replace", "local"), refused(StorageFailed, "storage-failed"):
        current.checkpoint(model, 1)
    with failing(monkeypatch, world, "replace", "update"), refused(StorageFailed, "storage-failed"):
        current.submit(model, weight=1)
    assert "Ready" not in world.fake.methods
    with (
        failing(monkeypatch, world, "replace", "global"),
        failing(monkeypatch, world, "names", "training"),
    ):
        current.submit(model, weight=1)
    assert caplog.text.count("could not be kept") == 1
    assert "could not be removed" in caplog.text
    with failing(monkeypatch, world, "read", "global"):
        assert next(world.join().rounds(model)).number == 2
    assert "could not be read" in caplog.text
    with (  # it may be there, and no other may take its place
        failing(monkeypatch, world, "read", "update"),
        refused(StorageFailed, "storage-failed"),
    ):
        next(world.join().rounds(model))


KINDS = ["global", "local", "update"]


def half_done(world: World) -> dict[str, Path]:
    """A silo that died in its second round with all three kinds of checkpoints."""
    session = world.join()
    model = model_of(1)
    rounds = session.rounds(model, optimizer=adam)
    next(rounds).submit(model, weight=1)
    current = next(rounds)
    train(model)
    current.checkpoint(model, 1)

    def die(_: Any) -> Any:
        raise Died

    lie = world.fake.lies.pop("Next")
    world.fake.lies["Next"] = die
    with pytest.raises(Died):
        current.submit(model, weight=2)
    world.fake.lies["Next"] = lie
    found = {
        name.split("/")[-1].partition("-")[0].partition(".")[0]: name for name in world.names()
    }
    assert sorted(found) == KINDS
    return {kind: world.disk.root / name for kind, name in found.items()}


def test_an_update_is_submitted_again_and_not_trained_again(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "client_sdk")
    places = half_done(world)
    for place in places.values():
        assert stat.S_IMODE(place.stat().st_mode) == 0o600
        assert stat.S_IMODE(place.parent.stat().st_mode) == 0o700
    model, numbers = model_of(3), []
    kept = {n: t for n, t in load(places["local"].read_bytes()).items() if "running" in n}
    rounds = world.join().rounds(model, optimizer=adam)
    for current in rounds:
        numbers.append(current.number)
        for name, array in kept.items():  # what is not shared went on, too
            assert np.array_equal(model.state_dict()[name.removeprefix("model/")].numpy(), array)
        break
    assert numbers == [3]
    assert "is submitted again" in caplog.text
    readies = [update for place, update in world.ready_with if place == 1]
    assert len(readies) == 2
    assert len(set(readies)) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_checkpoint_costs_time_alone(
    world: World, tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    """Flipped bits anywhere, cut files, and files that are none: noticed, told, not used."""
    place = half_done(world)[kind]
    whole = place.read_bytes()
    generator = np.random.default_rng(5)
    damages = [b"", b"\0" * 7, b"\xff" * 100, whole[:-1], whole + b"\0", whole[: len(whole) // 2]]
    for bit in generator.integers(8 * len(whole), size=200):
        damages.append(bytearray(whole))
        damages[-1][bit // 8] ^= 1 << bit % 8
    session = world.join()
    session.open_task(
        "training", wire_session.opening_from_wire(world.fake.openings["training"]).opening.schema
    )
    session._past.sync()
    task = session._tasks["training"]
    task.calls = 1
    position = session._past.position("training")
    find = {
        "global": lambda: session._checkpoints.find_global("training"),
        "local": lambda: session._checkpoints.find_local("training", position),
        "update": lambda: session._checkpoints.find_update("training", position),
    }[kind]
    assert find() is not None
    for number, damage in enumerate(damages, start=1):
        place.write_bytes(damage)
        assert find() is None
        assert caplog.text.count("is no checkpoint of this silo") == number
    yields: list[int] = []
    found = play(world.join(), yields, optimizer=adam)
    assert yields == ([2, 3] if kind == "update" else [3])
    assert found == play(world.join(disk=LocalDisk(tmp_path / "new")), optimizer=adam)


def test_another_silos_and_another_places_checkpoints_are_not_used(tmp_path: Path) -> None:
    disk = LocalDisk(tmp_path)
    here, there = b"\1" * 32, b"\2" * 32
    own = Checkpoints(disk, SESSION_ID, Secret(bytes(32)))
    update = Update({"x": np.ones(2)}, 1.0, {})
    own.keep_update("training", here, update)
    assert own.find_update("training", here) is not None
    assert own.find_update("training", there) is None
    assert Checkpoints(disk, SESSION_ID, Secret(b"\1" * 32)).find_update("training", here) is None
    (name,) = disk.names()
    data = disk.read(name)
    assert data is not None
    disk.replace(name.replace(here.hex(), there.hex()), data)
    disk.replace(name.replace("training", "statistics"), data)
    assert own.find_update("training", there) is None
    assert own.find_update("statistics", here) is None
    assert Checkpoints(disk, b"\3" * 32, Secret(bytes(32))).find_update("training", here) is None
    own.move_on("training", here)
    assert len(disk.names(f"{FOLDER}/training")) == 1
    own.move_on("training", bytes(32))
    assert disk.names(f"{FOLDER}/training") == []


ODD = {
    "__metadata__": np.array(1.5),
    'a"secagg":"' + "0" * 64: np.zeros((0, 3), "<f4"),
    "half": np.arange(6, dtype="<f2").reshape(2, 3).T,
    "big": np.array([1.1, -0.0, 5e-324], ">f8"),
    "bigger": np.array([[1.1, 2.2]], ">f4")[:, ::-1],
    "ü/🎲": np.float32(2.5).reshape(()),
}


def test_an_update_comes_back_to_the_bit(world: World) -> None:
    session = world.join()
    update = Update(ODD, np.float32(0.1), {"loss": 1 / 3, "acc": np.float64(1e-300)})
    session._checkpoints.keep_update("training", bytes(32), update)
    kept = session._checkpoints.find_update("training", bytes(32))
    assert kept is not None
    assert session._digest_of(kept) == session._digest_of(update)
    assert kept.tensors.keys() == ODD.keys()
    for name, array in ODD.items():
        assert kept.tensors[name].dtype.str == array.dtype.str
        assert kept.tensors[name].shape == array.shape
        assert kept.tensors[name].tobytes() == array.tobytes()
    (name,) = world.disk.names(FOLDER)
    first = world.disk.read(name)
    session._checkpoints.keep_update("training", bytes(32), update)
    assert world.disk.read(name) == first  # nothing in it is left to chance


def summing(federation: Federation, place: Path, rounds: int = 2, **changes: Any) -> World:
    """A world of sums, whose first round gets no result yet."""
    world = World(federation, place, **{"tasks": (make_sum(rounds=rounds),)} | changes)

    def die(_: Any) -> Any:
        raise Died

    world.fake.lies["Next"] = die
    return world


def bind(session: Session, update: bytes, task: str = "statistics") -> None:
    """As if an attempt had been joined with this update."""
    member = session._membership.member
    base, position = session._past.base(task), session._past.position(task)
    session._ledger.record(
        Joined(session.name, member.session_id, 1, 1, base, bytes(32), position, update)
    )


@pytest.mark.parametrize("joined", [False, True])
def test_an_attempt_that_was_joined_wants_its_own_update_again(
    federation: Federation,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    joined: bool,
) -> None:
    """Also where this silo revealed nothing: t others can open a sum that its update is in."""
    world = summing(federation, tmp_path / "kept")
    watch(monkeypatch, world)
    session = world.join()
    with pytest.raises(Died):
        session.sum({"x": np.ones(2)})
    first = world.update
    if joined:
        bind(session, first)
    for value, known in ((2.0, joined), (1.0, True), (3.0, joined)):
        with pytest.raises(Died):
            world.join().sum({"x": np.full(2, value)})
        assert (world.update == first) == known
    assert caplog.text.count("the tensors given now are not used") == (2 if joined else 0)


@pytest.mark.parametrize("joined", [False, True])
def test_an_update_in_bfloat16_survives_a_restart(
    federation: Federation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, joined: bool
) -> None:
    """No file of NumPy's holds such numbers, and no dtype's name tells them: they are widened."""
    world = summing(federation, tmp_path / "kept", tasks=(make_task(),))
    watch(monkeypatch, world)
    values = np.array([1.5, -0.0, 2.0**-130, 3.140625, -7.0])
    tensors = {
        "x": values.astype(ml_dtypes.bfloat16),
        "y": np.ones((2, 3), ml_dtypes.bfloat16).T,
        "z": np.float32([[0.1]]),
    }
    assert tensors["x"].tolist() == values.tolist()
    session = world.join()
    with pytest.raises(Died):
        session.mean(tensors, 2.0)
    first = world.update
    if joined:
        bind(session, first, "training")
    again = world.join()
    kept = again._checkpoints.find_update("training", session._past.position("training"))
    assert kept is not None
    assert again._digest_of(kept) == first
    assert {array.dtype for array in kept.tensors.values()} == {np.dtype("<f4")}
    for name, array in tensors.items():
        np.testing.assert_array_equal(kept.tensors[name], array.astype(np.float32), strict=True)
    with pytest.raises(Died):
        again.mean(tensors, 2.0)  # the same numbers, so the same update
    assert world.update == first
    with pytest.raises(Died):
        world.join().mean(tensors | {"z": np.zeros((1, 1))}, 2.0)
    assert (world.update == first) == joined


def test_an_attempt_whose_update_is_lost_is_not_joined_with_another(
    federation: Federation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = summing(federation, tmp_path / "kept")
    watch(monkeypatch, world)
    session = world.join()
    with pytest.raises(Died):
        session.sum({"x": np.ones(2)})
    first = world.update
    bind(session, world.update)
    world.disk.remove("sessions")
    with refused(PolicyRefused, "differencing-update"):
        world.join().sum({"x": np.full(2, 2.0)})
    with pytest.raises(Died):  # the same one again
        world.join().sum({"x": np.ones(2)})
    assert world.update == first


def test_sums_leave_nothing_behind(federation: Federation, tmp_path: Path) -> None:
    world = summing(federation, tmp_path / "kept")
    with pytest.raises(Died):
        world.join().sum({"x": np.ones(2)})
    assert len(world.disk.names(FOLDER)) == 1
    world.fake.release("statistics", {"x": np.ones(2)})
    session = world.join()
    assert session.sum({"x": np.ones(2)})["x"] == pytest.approx(3.0)
    assert world.disk.names(FOLDER) == []
    world.fake.release("statistics", {"x": np.ones(2)})
    assert session.sum({"x": np.ones(2)})["x"] == pytest.approx(3.0)
    assert world.disk.names(FOLDER) == []


def test_replaying_keeps_the_update_of_a_later_call(federation: Federation, tmp_path: Path) -> None:
    world = summing(federation, tmp_path / "kept")
    session = world.join()
    session.open_task("statistics", session_module._schema_of({"x": np.ones(2)}))
    with pytest.raises(Died):
        session.sum({"x": np.ones(2)})
    world.fake.release("statistics", {"x": np.ones(2)})
    session.sum({"x": np.ones(2)})
    with pytest.raises(Died):
        session.sum({"x": np.ones(2)})
    again = world.join()
    again.sum({"x": np.ones(2)})  # the first call's result, replayed
    assert len(world.disk.names(FOLDER)) == 1


# What the optimiser remembers.


class Odd(torch.optim.SGD):
    """Remembers something that no file can hold."""

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "odd": object()}


class Doubling(torch.optim.SGD):
    """Shows another state than it has."""

    def state_dict(self) -> dict[str, Any]:
        shown = super().state_dict()
        for entry in shown["state"].values():
            entry["momentum_buffer"] = entry["momentum_buffer"] * 2
        return shown


class Stubborn(torch.optim.SGD):
    """Loads nothing."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        raise ValueError("no")


@pytest.mark.parametrize("kind", [Odd, Doubling, Stubborn])
def test_an_optimizer_that_cannot_be_kept_is_replayed(
    world: World, tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: Any
) -> None:
    def make(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        return kind(parameters, lr=0.7, momentum=0.9)  # type: ignore[no-any-return]

    model = model_of(1)
    rounds = world.join().rounds(model, optimizer=make)
    next(rounds).submit(model, weight=1)
    next(rounds).submit(model, weight=1)
    found = play(world.join(), optimizer=make)
    assert found == play(world.join(disk=LocalDisk(tmp_path / "new")), optimizer=make)
    assert ("no checkpoint" if kind is Odd else "cannot be taken up") in caplog.text


def test_weights_of_every_kind_come_back_to_the_bit() -> None:
    start = {"w": torch.randn(3), "wide": torch.randn(2, 2, dtype=torch.float64)}
    for kind in (torch.optim.NAdam, torch.optim.Adagrad, torch.optim.RMSprop, torch.optim.AdamW):

        def make(parameters: list[nn.Parameter], kind: Any = kind) -> torch.optim.Optimizer:
            return kind(parameters, lr=0.1)  # type: ignore[no-any-return]

        one, two = GlobalWeights(start, make), GlobalWeights(start, make)
        one.step({"w": np.ones(3), "wide": np.full((2, 2), 1 / 3)})
        about, held = one.optimizer_state()
        assert two.restore(one.file(held, {}), about)
        for weights in (one, two):
            weights.step({"w": np.full(3, 0.1), "wide": np.full((2, 2), -1 / 7)})
        first, second = ({n: t.clone() for n, t in start.items()} for _ in range(2))
        one.load_into(first)
        two.load_into(second)
        assert all(torch.equal(first[name], second[name]) for name in start)
        other = GlobalWeights({"w": torch.zeros(4)}, make)
        assert not other.restore(one.file(held, {}), about)


def test_a_model_file_holds_tied_and_odd_tensors() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.BatchNorm1d(2))
    model[1].weight = model[0].weight
    model.register_buffer("flags", torch.tensor([True, False]))
    data = model_file(model, {"flags": torch.zeros(0)}, {})
    other = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.BatchNorm1d(2))
    with refused(InputError, "checkpoint-model"):
        load_model(other, data)
    other.register_buffer("flags", torch.tensor([False, False]))
    assert load_model(other, data)["flags"].shape == (0,)
    assert all(torch.equal(t, other.state_dict()[n]) for n, t in model.state_dict().items())


# Another past.


def test_a_forked_history_is_refused(world: World) -> None:
    model = model_of(1)
    rounds = world.join().rounds(model)
    next(rounds).submit(model, weight=1)
    next(rounds).submit(model, weight=1)
    lived = list(world.fake.results)
    world.fake.results.pop()  # it has forgotten the second
    with refused(FaultyServer, "history-fork"):
        world.join().rounds(model)
    world.fake.results.clear()
    world.fake.history = transcript.first_history(world.fake.session_hash)
    for _ in range(2):
        world.release()  # the same sums, over another attempt
    sent = len(world.ready_with)
    with refused(FaultyServer, "history-fork"):
        world.join().rounds(model)
    assert len(world.ready_with) == sent
    world.fake.results[:] = lived
    assert next(world.join().rounds(model)).number == 3


def test_a_made_up_past_is_refused_without_a_checkpoint(
    federation: Federation, tmp_path: Path
) -> None:
    """Else a position that was opened would get a fresh name, and be opened again."""
    world = World(federation, tmp_path / "kept", tasks=(make_sum(rounds=3),))
    world.fake.lies["Next"] = lambda _: api.NextReply(ended="The test is over.")
    with world.join() as session:
        session.open_task("statistics", session_module._schema_of({"x": np.ones(2)}))
        world.fake.release("statistics", {"x": np.ones(2)})
        session.sum({"x": np.ones(2)})
        member = session._membership.member
        base, position = session._past.base("statistics"), session._past.position("statistics")
        session._ledger.record(
            Joined(session.name, member.session_id, 2, 1, base, bytes(32), position, b"u")
        )
    world.fake.results.clear()
    world.fake.history = transcript.first_history(world.fake.session_hash)
    with world.join() as session, refused(FaultyServer, "history-fork"):  # shorter
        session.sum({"x": np.ones(2)})
    world.fake.release("statistics", {"x": np.ones(2)})  # the same sum, of another attempt
    with world.join() as session, refused(FaultyServer, "history-fork"):
        session.sum({"x": np.ones(2)})
    assert "Ready" not in world.fake.methods


@pytest.mark.parametrize("where", ["step", "give-out"])
def test_a_result_that_was_not_applied_stops_the_training(
    world: World, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """Ctrl-C at the wrong moment: the model is not taken for one with all results in it."""

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    model = model_of(1)
    session = world.join()
    rounds = session.rounds(model)
    current = next(rounds)
    with monkeypatch.context() as patch:
        if where == "step":
            patch.setattr(GlobalWeights, "step", interrupt)
        else:
            patch.setattr(session_module.Session, "_outcome", interrupt)
        with pytest.raises(KeyboardInterrupt):
            current.submit(model, weight=1)
    if where == "step":
        with refused(OutOfOrder, "round-submitted"):
            current.submit(model, weight=1)
        with refused(OutOfOrder, "round-lost"):
            next(rounds)
    else:
        current.submit(model, weight=1)  # nothing was given out: the same result again
    done = play(session)
    world.disk.remove("sessions")
    assert play(world.join()) == done  # a clean replay


def test_a_round_kept_after_its_time_is_not_submitted(world: World) -> None:
    model = model_of(1)
    rounds = world.join().rounds(model)
    first = next(rounds)
    first.submit(model, weight=1)
    late = next(rounds)
    next(rounds)  # sat out
    with refused(OutOfOrder, "round-lost"):
        late.submit(model, weight=1)


def test_a_busy_disk_costs_no_result(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def busy(*_: Any) -> Any:
        raise StorageBusy("storage-busy", "Too many open files.")

    model = model_of(1)
    rounds = world.join().rounds(model)
    current = next(rounds)
    with monkeypatch.context() as patch:
        patch.setattr(LocalDisk, "names", busy)
        patch.setattr(Checkpoints, "_write", lambda self, name, *rest: None)
        current.submit(model, weight=1)
    assert next(rounds).number == 2


def test_an_opening_taken_before_needs_no_proposer(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The silo that proposed it may be revoked by now; a silo that knows it comes back."""

    def revoked(*_: Any) -> None:
        raise FaultyServer("task-proposer", "A task was opened by nobody of the session.")

    world.join().rounds(model_of(1))
    monkeypatch.setattr(tasks_module.Tasks, "_check_proposer", revoked)
    world.join().rounds(model_of(1))
    world.disk.remove("ledger.jsonl")
    with refused(FaultyServer, "task-proposer"):
        world.join().rounds(model_of(1))


def consenting(world: World) -> None:
    policy = world.profile.directory / "policy.toml"
    text, name = policy.read_text(), world.fake.config.name
    policy.write_text(text.replace("repeat_sessions = []", f'repeat_sessions = ["{name}"]'))
    world.profile = client_sdk.load_profile(world.profile.directory)


def test_a_ledger_older_than_the_session_is_refused_without_consent(
    federation: Federation, tmp_path: Path
) -> None:
    """Its silo stands among a round's survivors, and it has never heard of the round."""
    world = World(federation, tmp_path / "kept", tasks=(make_sum(rounds=3),))
    with world.join() as session:
        session.open_task("statistics", session_module._schema_of({"x": np.ones(2)}))
        world.fake.release("statistics", {"x": np.ones(2)})  # over the others: nothing to know
        assert session.sum({"x": np.ones(2)})["x"] == pytest.approx(3.0)
        world.fake.release("statistics", {"x": np.ones(2)}, survivors=ALL)
        for _ in range(2):
            with refused(ConfigError, "ledger-rolled-back") as caught:
                session.sum({"x": np.ones(2)})
        assert "repeat_sessions" in str(caught.value)
    assert "Ready" not in world.fake.methods
    consenting(world)
    replies: list[Any] = [
        lambda: world.fake.descriptor("statistics"),
        lambda: api.NextReply(ended="The test is over."),
    ]
    world.fake.lies["Next"] = lambda _: replies.pop(0)()
    with world.join() as session:
        session.sum({"x": np.ones(2)})
        session.sum({"x": np.ones(2)})
        with refused(SessionEnded, "session-over"):
            session.sum({"x": np.ones(2)})
    (sent,) = [request for method, request in world.fake.calls if method == "Send"]
    assert sent.WhichOneof("message") == "advertise_keys"


# The seams that a simulation uses.


def test_an_injected_disk_is_all_that_is_touched(world: World) -> None:
    play(world.join())
    assert not world.profile.state.exists()
    assert "ledger.jsonl" in world.disk.names()


def test_keys_come_from_the_given_source(federation: Federation, tmp_path: Path) -> None:
    def run(place: str) -> list[bytes]:
        world = World(federation, tmp_path / place, tasks=(make_sum(),), name="study-seeded")
        replies: list[Any] = [
            lambda: world.fake.descriptor("statistics", nonce=bytes(32)),
            lambda: api.NextReply(ended="The test is over."),
        ]
        world.fake.lies["Next"] = lambda _: replies.pop(0)()
        generator = np.random.default_rng(7)
        disk: Any = world.disk
        channel: Any = world.fake
        with (
            Session(
                world.fake.config.name,
                world.profile,
                channel=channel,
                disk=disk,
                entropy=generator.bytes,
            ) as session,
            refused(SessionEnded, "session-over"),
        ):
            session.sum({"x": np.ones(2)})
        return [r.SerializeToString() for m, r in world.fake.calls if m == "Send"]

    first = run("one")
    assert len(first) == 1
    assert run("two") == first


# A coordinator that was killed and came back.


def test_export_after_a_restart_needs_no_round(world: World, tmp_path: Path) -> None:
    model = model_of(1)
    session = world.join()
    next(session.rounds(model)).submit(model, weight=1)
    session.export(tmp_path / "before")
    world.fake.calls.clear()
    again = world.join()
    with refused(ConfigError, "export"):
        again.export(tmp_path / "after")
    other = model_of(9)
    for name, buffer in model.named_buffers():
        other.get_buffer(name).copy_(buffer)
    again.rounds(other)
    again.export(tmp_path / "after")
    assert (tmp_path / "after").read_bytes() == (tmp_path / "before").read_bytes()
    assert "GetChunk" not in world.fake.methods


@pytest.mark.parametrize("code", ["task-proposer", "weights-missing", "chunk-gap", "task-open"])
@pytest.mark.parametrize("method", ["PutChunk", "ProposeTask"])
def test_a_proposal_that_the_coordinator_forgot_is_made_again(
    world: World, monkeypatch: pytest.MonkeyPatch, code: str, method: str
) -> None:
    real = getattr(world.fake, f"_{method}")
    left = [tasks_module.PROPOSALS - 1]

    def forgetful(request: Any) -> Message:
        left[0] -= 1
        if left[0] >= 0:
            raise CoordinatorRefused(code, "It was restarted.")
        return real(request)  # type: ignore[no-any-return]

    world.fake.lies[method] = forgetful
    assert next(world.join().rounds(model_of(1))).number == 1
    assert world.fake.methods.count("OpenTask") == tasks_module.PROPOSALS + 1
    world.fake.openings.clear()
    left[0] = 1000
    with refused(CoordinatorRefused, code):
        world.join(disk=LocalDisk(world.disk.root / "other")).rounds(model_of(1))
    assert left[0] == 1000 - tasks_module.PROPOSALS
    world.fake.lies[method] = lambda _: refuse("quota")
    with refused(CoordinatorRefused, "quota"):
        world.join(disk=LocalDisk(world.disk.root / "third")).rounds(model_of(1))


def refuse(code: str) -> Message:
    raise CoordinatorRefused(code, "It says no.")


def add(session: Session) -> Outcome:
    value = {"x": np.array([float(rank(session))])}
    return session.aggregate("statistics", value, weight=1.0, metrics={})


class Meddled:
    """Silo a's calls, with a coordinator's restarts played into them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.sent: dict[str, list[bytes]] = {}
        self.chunks = 0
        self.signatures: list[api.NextReply] = []
        self.gaps: dict[str, int] = {}
        self.forgets_reveals = 0
        self._real, real_many = Channel.call, Channel.call_many
        meddled = self

        def call(self: Channel, method: str, request: Any, kind: Any, **options: Any) -> Any:
            if not meddled.of_a(self):
                return meddled._real(self, method, request, kind, **options)
            return meddled.call(self, method, request, kind, **options)

        def call_many(self: Channel, method: str, requests: Any, kind: Any) -> None:
            requests = list(requests)
            if meddled.of_a(self) and requests and requests[0].blob.WhichOneof("of") == "vector":
                meddled.chunks += 1
                if meddled.lose("PutChunk"):
                    raise CoordinatorRefused("chunk-gap", "It was restarted.")
            real_many(self, method, requests, kind)

        monkeypatch.setattr(Channel, "call", call)
        monkeypatch.setattr(Channel, "call_many", call_many)

    @staticmethod
    def of_a(channel: Channel) -> bool:
        return channel._credentials.identity.name == "a"

    def lose(self, what: str) -> bool:
        self.gaps[what] = self.gaps.get(what, 0) - 1
        return self.gaps[what] >= 0

    def call(self, channel: Channel, method: str, request: Any, kind: Any, **options: Any) -> Any:
        if method == "Next" and self.signatures and self.forgets_reveals:
            self.forgets_reveals -= 1
            return self.signatures[0]
        if method == "Send":
            what = request.WhichOneof("message")
            self.sent.setdefault(what, []).append(request.SerializeToString(deterministic=True))
            if what == "masked_input" and self.lose("Send"):
                raise CoordinatorRefused("chunk-gap", "It was restarted.")
        reply = self._real(channel, method, request, kind, **options)
        if method == "Next" and reply.WhichOneof("event") == "signatures":
            self.signatures.append(reply)
        return reply


def test_a_reveal_is_sent_again_byte_for_byte(
    federation: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    meddled = Meddled(monkeypatch)
    meddled.forgets_reveals = 2
    name = federation.create(make_sum(rounds=1))
    for outcome in federation.play(name, add).values():
        assert outcome.tensors["x"] == pytest.approx(10.0)
        assert outcome.survivors == SILOS
    reveals = meddled.sent["unmasking"]
    assert len(reveals) == 3
    assert len(set(reveals)) == 1
    assert {what: len(sent) for what, sent in meddled.sent.items() if what != "unmasking"} == {
        "advertise_keys": 1,
        "share_keys": 1,
        "masked_input": 1,
        "consistency": 1,
    }


@pytest.mark.parametrize("what", ["Send", "PutChunk"])
def test_a_vector_that_the_coordinator_lost_is_uploaded_again(
    federation: Federation, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    meddled = Meddled(monkeypatch)
    meddled.gaps[what] = attempt_module.UPLOADS - 1
    name = federation.create(make_sum(rounds=1))
    for outcome in federation.play(name, add).values():
        assert outcome.tensors["x"] == pytest.approx(10.0)
    assert meddled.chunks == attempt_module.UPLOADS
    assert len(set(meddled.sent["masked_input"])) == 1


def test_a_vector_is_not_uploaded_for_ever(
    federation: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    meddled = Meddled(monkeypatch)
    meddled.gaps["Send"] = 1000
    name = federation.create(make_sum(rounds=1), phase_deadline=1.0)

    def unlucky(session: Session) -> Any:
        with refused(CoordinatorRefused, "chunk-gap"):
            add(session)
        return None

    found = federation.play(name, add, a=unlucky)
    assert found["b"].survivors == ("b", "c", "d")
    assert meddled.chunks == len(meddled.sent["masked_input"]) == attempt_module.UPLOADS


# Against the real coordinator.


def test_silos_that_restart_after_every_round_train_the_same_model(
    federation: Federation, tmp_path: Path
) -> None:
    name = federation.create(make_task(rounds=ROUNDS))

    def steady(session: Session) -> bytes:
        return one(session, ROUNDS)

    def one(session: Session, count: int) -> bytes:
        model = nn.Linear(2, 1)
        for current in session.rounds(model, optimizer=adam):
            with torch.no_grad():
                model.weight.add_(0.1 * rank(session))
            current.submit(model, weight=rank(session))
            count -= 1
            if not count:
                break
        session.export(tmp_path / session.silo)
        return (tmp_path / session.silo).read_bytes()

    def silo(of: str, restarts: bool) -> bytes:
        found = b""
        for _ in range(ROUNDS if restarts else 1):
            with client_sdk.join(name, profile=federation.silo(of)) as session:
                found = one(session, 1 if restarts else ROUNDS)
        return found

    work: dict[str, Any] = {s: lambda s=s: silo(s, s in "cd") for s in SILOS}
    assert len(set(federation.together(name, work).values())) == 1
    kept = LocalDisk(federation.silo("d") / "state").names("sessions")
    assert [file.rpartition("/")[2] for file in kept] == ["global.safetensors"]


def test_an_opened_sum_is_finished_after_a_restart(
    federation: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three of three silos: one reveals, dies, trains something else, and comes back."""
    real, died = attempt_module.client.reveal_shares, []

    def dying(state: Any, *args: Any, **kwargs: Any) -> Any:
        if state.attempt.me == "c" and not died:
            died.append(True)
            raise Died
        return real(state, *args, **kwargs)

    monkeypatch.setattr(attempt_module.client, "reveal_shares", dying)
    name = federation.create(
        make_sum(rounds=1), silos="abc", phase_deadline=1.0, max_attempts=5, train_deadline=20.0
    )

    def silo(of: str) -> float:
        value = float(ord(of) - ord("a") + 1)
        for tried in range(3):
            try:
                with client_sdk.join(name, profile=federation.silo(of)) as session:
                    found = session.sum({"x": np.array([value + (tried if of == "c" else 0)])})
                    return float(found["x"][0])
            except (Died, RoundAborted):
                continue
        raise AssertionError

    work: dict[str, Any] = {s: lambda s=s: silo(s) for s in "abc"}
    for found in federation.together(name, work).values():
        assert found == pytest.approx(6.0)


def restart(coordinator: Coordinator, directory: Path) -> None:
    """Kill a coordinator, and start it again where it was."""
    coordinator._process.kill()
    coordinator._process.wait(20)
    config = directory / "coordinator.toml"
    config.write_text(config.read_text().replace("127.0.0.1:0", coordinator.address))
    with coordinator.log.open("ab") as log:
        coordinator._process = subprocess.Popen(coordinator._process.args, stdout=log, stderr=log)


@pytest.mark.process
@pytest.mark.parametrize("moment", ["masked_input", "unmasking", "ProposeTask"])
def test_kill_9_of_the_coordinator(
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
    moment: str,
) -> None:
    """Killed with a vector uploaded and not committed, a share revealed, or weights uploaded."""
    place = tmp_path_factory.mktemp("killed")
    consortium = Consortium(place)
    federation = Federation(consortium, tmp_path)
    real, lock, killed = Channel.call, threading.Lock(), []

    def kill() -> None:
        with lock:
            if not killed:
                killed.append(moment)
                restart(consortium.coordinator, place / "serve")

    def call(self: Channel, method: str, request: Any, kind: Any, **options: Any) -> Any:
        what = request.WhichOneof("message") if method == "Send" else method
        if what == moment != "unmasking":
            kill()
        reply = real(self, method, request, kind, **options)
        if what == moment == "unmasking":
            kill()
        return reply

    monkeypatch.setattr(Channel, "call", call)
    try:
        name = federation.create(make_task(rounds=2), max_attempts=6)

        def program(session: Session) -> bytes:
            model = nn.Linear(2, 1)
            for current in session.rounds(model):
                with torch.no_grad():
                    model.weight.add_(0.1 * rank(session))
                assert current.submit(model, weight=1).survivors == SILOS
            session.export(tmp_path / session.silo)
            return (tmp_path / session.silo).read_bytes()

        assert len(set(federation.play(name, program).values())) == 1
        assert killed == [moment]
    finally:
        consortium.close()
