"""``rounds``: agreed weights, mean deltas, and the same global step at every silo."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save
from torch import nn

import client_sdk
from client_sdk import tensors as sdk_tensors
from client_sdk.session import Session
from secagg.config import Protection
from secagg.errors import ConfigError, InputError, OutOfOrder

from .federation import LOSS, SILOS, Federation, make_sum, make_task, rank, refused

Optimizer = Callable[[list[nn.Parameter]], torch.optim.Optimizer]
ROUNDS = 3


def linear(seed: int) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.uniform_(-0.5, 0.5, generator=generator)
    return model


def train(model: nn.Module, k: int) -> float:
    """Two steps of SGD on a silo's own data."""
    generator = torch.Generator().manual_seed(1000 + k)
    x, y = torch.randn(16, 3, generator=generator), torch.randn(16, 1, generator=generator)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
    return float(loss.detach())


def oracle(start: nn.Module, make: Optimizer | None) -> tuple[nn.Module, list[float]]:
    """The same training in one process, in floats, with plain means."""
    model, losses = copy.deepcopy(start), []
    optimizer = make(list(model.parameters())) if make else None
    for _ in range(ROUNDS):
        locals_ = {k: copy.deepcopy(model) for k in range(1, 5)}
        total = sum(10.0 * k for k in locals_)
        losses.append(sum(10.0 * k * train(m, k) for k, m in locals_.items()) / total)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                moved = sum(10.0 * k * m.get_parameter(name) for k, m in locals_.items()) / total
                assert isinstance(moved, torch.Tensor)
                if optimizer is None:
                    parameter.copy_(moved)
                else:
                    parameter.grad = parameter - moved
            if optimizer is not None:
                optimizer.step()
    return model, losses


def adam(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=0.05, eps=1e-3)


@pytest.mark.parametrize("protection", Protection)
@pytest.mark.parametrize("make", [None, adam], ids=["fedavg", "fedadam"])
def test_training_is_the_oracles(
    federation: Federation, tmp_path: Path, make: Optimizer | None, protection: Protection
) -> None:
    """Whatever stands between the updates and the coordinator, the trainer's code is this."""
    federation.allow(protection)
    name = federation.create(make_task(metrics=LOSS, rounds=ROUNDS), protection=protection)
    initial = [linear(seed) for seed in range(1, 5)]
    models = [copy.deepcopy(model) for model in initial]
    started: dict[str, bytes] = {}

    def program(session: Session) -> list[float]:
        k, losses = rank(session), []
        model = models[k - 1]
        for current in session.rounds(model, optimizer=make):
            started.setdefault(session.silo, save(model.state_dict()))
            assert current.number == len(losses) + 1
            outcome = current.submit(model, weight=10 * k, metrics={"loss": train(model, k)})
            assert outcome is current.outcome
            losses.append(outcome.metrics["loss"])
        session.export(tmp_path / f"{session.silo}.safetensors")
        return losses

    losses = federation.play(name, program)
    files = {(tmp_path / f"{silo}.safetensors").read_bytes() for silo in SILOS}
    assert len(files) == 1  # bit for bit
    assert len(set(started.values())) == 1
    start = next(m for m in initial if save(m.state_dict()) == started["a"])  # somebody's own
    expected, expected_losses = oracle(start, make)
    exported = load_file(tmp_path / "a.safetensors")
    for key, tensor in expected.state_dict().items():
        torch.testing.assert_close(exported[key], tensor, rtol=0, atol=2e-5)
        assert all(torch.equal(m.state_dict()[key], exported[key]) for m in models)
    for found in losses.values():
        assert found == pytest.approx(expected_losses, abs=1e-4)


class Frozen(nn.Module):
    """A frozen body, a shared head, a personal layer, and buffers of floats and integers."""

    def __init__(self, k: int) -> None:
        super().__init__()
        self.body, self.head, self.personal = nn.Linear(2, 2), nn.Linear(2, 1), nn.Linear(2, 1)
        self.norm = nn.BatchNorm1d(2)
        self.body.requires_grad_(False)
        with torch.no_grad():
            for tensor in self.state_dict().values():
                tensor.fill_(k)


def bump(model: nn.Module, by: float) -> None:
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            tensor.add_(int(by) if not tensor.is_floating_point() else by)


def test_frozen_layers_and_buffers_stay_home(federation: Federation) -> None:
    name = federation.create(make_task(rounds=2))

    def program(session: Session) -> dict[str, torch.Tensor]:
        model = Frozen(rank(session))
        for current in session.rounds(model):
            bump(model, rank(session))
            current.submit(model, weight=1)
        return dict(model.state_dict())

    found = federation.play(name, program)
    for k, silo in enumerate(SILOS, start=1):
        for key, tensor in found[silo].items():
            if key.startswith(("body", "norm.running", "norm.num")):
                assert (tensor == 3 * k).all(), key  # its own start, bumped twice
            else:
                assert torch.equal(tensor, found["a"][key]), key
    start = found["a"]["head.weight"][0, 0] - 2 * 2.5
    assert start == pytest.approx(round(float(start)), abs=1e-5)


def test_shared_says_what_is_shared(federation: Federation) -> None:
    """A personal layer stays home, a buffer and a frozen layer travel."""
    name = federation.create(make_task(rounds=1))

    def shared(key: str, tensor: torch.Tensor) -> bool:
        return tensor.is_floating_point() and not key.startswith("personal")

    def program(session: Session) -> dict[str, torch.Tensor]:
        model = Frozen(rank(session))
        for current in session.rounds(model, shared=shared):
            bump(model, rank(session))
            current.submit(model, weight=1)
        return dict(model.state_dict())

    found = federation.play(name, program)
    for k, silo in enumerate(SILOS, start=1):
        assert (found[silo]["personal.weight"] == 2 * k).all()
        assert (found[silo]["norm.num_batches_tracked"] == 2 * k).all()
        for key in ("norm.running_mean", "norm.running_var", "body.weight", "head.bias"):
            assert torch.equal(found[silo][key], found["a"][key])


class Lora(nn.Module):
    """A frozen base with a trained update of low rank, and tied weights."""

    def __init__(self, k: int) -> None:
        super().__init__()
        self.base = nn.Linear(6, 6, bias=False)
        self.base.requires_grad_(False)
        self.down, self.up = nn.Linear(6, 2, bias=False), nn.Linear(2, 6, bias=False)
        self.tied = nn.Linear(6, 2, bias=False)
        self.tied.weight = self.down.weight
        nn.init.constant_(self.base.weight, 7.0)
        nn.init.constant_(self.down.weight, 0.1 * k)
        nn.init.zeros_(self.up.weight)


def test_lora_shares_its_adapters_alone(federation: Federation, tmp_path: Path) -> None:
    name = federation.create(make_task(rounds=1))
    sent: set[str] = set()

    def program(session: Session) -> Lora:
        model = Lora(rank(session))
        for current in session.rounds(model):
            bump(model, 0.0)
            with torch.no_grad():
                model.up.weight.add_(rank(session))
            sent.update(current.submit(model, weight=1).tensors)
        session.export(tmp_path / f"{session.silo}.safetensors")
        return model

    found = federation.play(name, program)
    assert sent == {"down.weight", "up.weight"}
    for model in found.values():
        assert (model.base.weight == 7.0).all()
        torch.testing.assert_close(model.up.weight, torch.full((6, 2), 2.5), rtol=0, atol=1e-6)
        assert model.tied.weight is model.down.weight
    assert len({(tmp_path / f"{silo}.safetensors").read_bytes() for silo in SILOS}) == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_models_of_other_floats(federation: Federation, tmp_path: Path, dtype: torch.dtype) -> None:
    name = federation.create(make_task(rounds=2))

    def program(session: Session) -> nn.Module:
        model = nn.Linear(3, 2).to(dtype)
        nn.init.constant_(model.weight, 1.0)
        nn.init.constant_(model.bias, 0.0)
        for current in session.rounds(model):
            assert model.weight.dtype == dtype
            with torch.no_grad():
                model.weight.add_(0.5 * rank(session))
            current.submit(model, weight=1)
        session.export(tmp_path / f"{session.silo}.safetensors")
        return model

    for model in federation.play(name, program).values():
        expected = torch.full((2, 3), 1.0 + 2 * 1.25)
        torch.testing.assert_close(model.weight.float(), expected, rtol=0, atol=1e-2)  # type: ignore[operator]
    assert len({(tmp_path / f"{silo}.safetensors").read_bytes() for silo in SILOS}) == 1
    assert load_file(tmp_path / "a.safetensors")["weight"].dtype == dtype


def test_global_weights_live_on_the_cpu_wherever_the_model_is() -> None:
    """Deltas come from NumPy: on the model's device, the first step would fail."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        agreed = sdk_tensors.GlobalWeights({"w": torch.empty(3, device="cuda")}, None)
        assert all(parameter.device.type == "cpu" for parameter in agreed._parameters.values())


def test_a_round_that_is_sat_out(federation: Federation) -> None:
    """A silo that does not submit gets the others' result all the same."""
    name = federation.create(make_task(rounds=2), train_deadline=1.5)
    barrier = threading.Barrier(4)

    def program(session: Session) -> Any:
        model, outcomes = linear(1), []
        for current in session.rounds(model):
            if (session.silo, current.number) == ("d", 1):
                continue
            if current.number == 2:
                barrier.wait(30)
            bump(model, 0.25 * rank(session))
            outcomes.append(current.submit(model, weight=1))
            with refused(OutOfOrder, "round-submitted"):
                current.submit(model, weight=1)
        return outcomes, model

    found = federation.play(name, program)
    assert [o.survivors for o in found["a"][0]] == [("a", "b", "c"), SILOS]
    assert len(found["d"][0]) == 1
    bits = {save(model.state_dict()) for _, model in found.values()}
    assert len(bits) == 1


def test_models_and_steps_that_are_not_the_sessions_are_named(federation: Federation) -> None:
    name = federation.create(make_task(rounds=1), make_sum(rounds=1))

    def refuse(session: Session, code: str, word: str, model: nn.Module, **options: Any) -> None:
        with refused(InputError, code) as caught:
            next(iter(session.rounds(model, **options)))
        assert word in str(caught.value)

    with client_sdk.join(name, profile=federation.silo("a")) as session:
        next(iter(session.rounds(linear(1), optimizer=adam)))
        with refused(ConfigError, "task-choice"):
            session.rounds(linear(1), task="statistics")
    with client_sdk.join(name, profile=federation.silo("b")) as session:
        refuse(session, "task-schema", "'0.bias'", nn.Sequential(nn.Linear(3, 5)), optimizer=adam)
        refuse(session, "task-step", "SGD", linear(1))

        def slower(p: list[nn.Parameter]) -> torch.optim.Optimizer:
            return torch.optim.Adam(p, lr=0.04, eps=1e-3)

        def split(p: list[nn.Parameter]) -> torch.optim.Optimizer:
            groups = [{"params": p[:1], "lr": 0.5}, {"params": p[1:]}]
            return torch.optim.Adam(groups, lr=0.05, eps=1e-3)

        refuse(session, "task-step", "lr=0.04", linear(1), optimizer=slower)
        refuse(session, "task-step", "lr=0.5", linear(1), optimizer=split)
        refuse(session, "shared-none", "", linear(1), shared=lambda *_: False)
        refuse(session, "tensor-dtype", "num_batches", Frozen(1), shared=lambda *_: True)
        with refused(ConfigError, "export"):
            session.export("nowhere")


def test_a_model_that_changes_between_rounds_is_named_and_can_be_put_right(
    federation: Federation,
) -> None:
    name = federation.create(make_task(metrics=LOSS, rounds=1, bound=1.0))

    def clumsy(session: Session) -> float:
        model = linear(1)
        for current in session.rounds(model):
            next(model.parameters()).requires_grad_(False)
            with refused(InputError, "tensor-names") as caught:
                current.submit(model, weight=1, metrics={"loss": 1.0})
            assert "'0.weight'" in str(caught.value)
            next(model.parameters()).requires_grad_(True)
            with refused(InputError, "tensor-names"):
                current.submit(nn.Linear(2, 2), weight=1, metrics={"loss": 1.0})
            with refused(InputError, "weight"):
                current.submit(model, weight=1000, metrics={"loss": 1.0})
            with refused(InputError, "metric-names"):
                current.submit(model, weight=1)
            bump(model, 2.0)
            with refused(InputError, "tensor-bound") as caught:
                current.submit(model, weight=1, metrics={"loss": 1.0})
            assert "'0.bias'" in str(caught.value)
            bump(model, float("nan"))
            with refused(InputError, "tensor-finite"):
                current.submit(model, weight=1, metrics={"loss": 1.0})
            good = copy.deepcopy(linear(1))
            return current.submit(good, weight=1, metrics={"loss": 1.0}).metrics["loss"]
        raise AssertionError

    def program(session: Session) -> float:
        model = linear(1)
        for current in session.rounds(model):
            return current.submit(model, weight=1, metrics={"loss": 1.0}).metrics["loss"]
        raise AssertionError

    assert set(federation.play(name, program, d=clumsy)) == set(SILOS)


def test_stopping_early_exports_the_newest_weights_and_rounds_begin_again_at_the_top(
    federation: Federation, tmp_path: Path
) -> None:
    name = federation.create(make_task(rounds=2))
    barrier = threading.Barrier(4)

    def program(session: Session) -> tuple[bytes, bytes]:
        model, k = linear(1), rank(session)
        for current in session.rounds(model):
            bump(model, 0.25 * k)
            current.submit(model, weight=1)
            break
        one = tmp_path / f"{session.silo}-1"
        session.export(one)
        expected = linear(1)
        bump(expected, 0.625)
        for key, tensor in load_file(one).items():
            torch.testing.assert_close(tensor, expected.state_dict()[key], rtol=0, atol=1e-6)
        barrier.wait(30)
        again = linear(5)
        numbers = []
        for current in session.rounds(again):  # a notebook's cell, run twice
            numbers.append(current.number)
            torch.testing.assert_close(again.state_dict(), load_file(one), rtol=0, atol=0)
            bump(again, 0.25 * k)
            current.submit(again, weight=1)
        assert numbers == [2]
        session.export(two := tmp_path / f"{session.silo}-2")
        return one.read_bytes(), two.read_bytes()

    found = federation.play(name, program)
    assert len(set(found.values())) == 1
    assert found["a"][0] != found["a"][1]


def test_a_silo_that_was_away_ends_with_the_same_bits(
    federation: Federation, tmp_path: Path
) -> None:
    """Adam's moments, too, are replayed."""
    name = federation.create(make_task(rounds=2), train_deadline=1.5)
    started, barrier = threading.Event(), threading.Barrier(4)
    numbers: dict[str, list[tuple[int, bool]]] = {}

    def program(session: Session) -> bytes:
        model = linear(rank(session))
        for current in session.rounds(model, optimizer=adam):
            if current.number == 2:
                started.set()
                barrier.wait(30)
            train(model, rank(session))
            included = current.submit(model, weight=rank(session)).included
            numbers.setdefault(session.silo, []).append((current.number, included))
        session.export(tmp_path / session.silo)
        return (tmp_path / session.silo).read_bytes()

    def away(session: Session) -> bytes:
        assert started.wait(30)
        return program(session)

    assert len(set(federation.play(name, program, d=away).values())) == 1
    assert numbers["d"] == [(2, True)]
    assert numbers["a"] == [(1, True), (2, True)]


def test_weights_that_are_not_of_the_agreed_tensors_are_refused() -> None:
    agreed = sdk_tensors.GlobalWeights({"w": torch.zeros(3)}, None)
    for wrong in ({}, {"w": torch.zeros(1)}, {"w": torch.zeros(3), "v": torch.zeros(1)}):
        with refused(InputError, "tensor-names"):
            agreed.set(wrong)
    with refused(InputError, "weights-file"):
        sdk_tensors.from_file(b"not safetensors")
    header = b'{"w":{"dtype":"F8_E8M0","shape":[1],"data_offsets":[0,1]}}'
    with refused(InputError, "weights-file"):  # a proposer's, of a type that torch has not
        sdk_tensors.from_file(len(header).to_bytes(8, "little") + header + b"\0")
    agreed.step({"w": np.arange(3.0)})
    model = {"w": torch.zeros(3)}
    agreed.load_into(model)
    assert model["w"].tolist() == [0.0, 1.0, 2.0]
