"""``mean`` and ``sum`` end to end: real coordinator, real mutual TLS, NumPy in and out."""

from __future__ import annotations

import builtins
import importlib
import sys
import threading
from typing import Any

import numpy as np
import pytest

import client_sdk
from client_sdk.session import Session
from secagg.config import Clip, Protection
from secagg.errors import ConfigError, InputError, NotFound, SessionEnded

from .federation import LOSS, SILOS, Federation, make_sum, make_task, rank, refused


def tensors(k: int) -> dict[str, np.ndarray[Any, Any]]:
    generator = np.random.default_rng(k)
    return {
        "w": generator.uniform(-8, 8, (3, 2)),
        "b": generator.uniform(-8, 8, 5).astype(np.float32),
        "scalar": np.array(float(k)),
        "empty": np.zeros((0, 4)),
    }


@pytest.mark.parametrize("protection", Protection)
def test_mean_is_the_weighted_mean_in_float64(
    federation: Federation, protection: Protection
) -> None:
    federation.allow(protection)
    name = federation.create(make_task(metrics=LOSS), protection=protection)
    near = 1e-6 if protection.seals else 1e-9

    def program(session: Session) -> Any:
        k = rank(session)
        outcome = session.aggregate(
            "training", tensors(k), weight=10.0 * k, metrics={"loss": float(k)}
        )
        assert session.rounds_done == 1
        return outcome

    outcomes = federation.play(name, program)
    weights = np.array([10.0, 20.0, 30.0, 40.0])
    for outcome in outcomes.values():
        for key, array in outcome.tensors.items():
            stacked = np.stack([tensors(k)[key].astype(np.float64) for k in range(1, 5)])
            expected = np.tensordot(weights, stacked, axes=1) / weights.sum()
            assert array.dtype == np.float64
            assert array.shape == expected.shape
            np.testing.assert_allclose(array, expected, rtol=0, atol=1e-6)
        assert outcome.weight == pytest.approx(100.0, abs=near)
        assert outcome.metrics == {"loss": pytest.approx(3.0, abs=near)}
        assert (outcome.survivors, outcome.dropouts) == (SILOS, ())
        assert outcome.included
        assert (outcome.round, outcome.clipped) == (1, pytest.approx(0.0, abs=near))
    first = outcomes["a"].tensors
    for outcome in outcomes.values():  # not nearly alike: the very same bits
        assert all(outcome.tensors[key].tobytes() == first[key].tobytes() for key in first)


@pytest.mark.parametrize("ring_bits", [16, 32])
def test_short_words_are_as_exact_as_they_say(federation: Federation, ring_bits: Any) -> None:
    name = federation.create(make_task(ring_bits=ring_bits, bound=1.0, weight_cap=1.0, rounds=1))
    means = federation.play(name, lambda s: s.mean({"x": np.full(4, rank(s) / 8)}))
    unit = 2.0 ** -(ring_bits - 4)
    for mean in means.values():
        np.testing.assert_allclose(mean["x"], 10 / 32, rtol=0, atol=4 * unit)


@pytest.mark.parametrize("protection", Protection)
def test_sum_and_several_tasks_and_every_round(
    federation: Federation, protection: Protection
) -> None:
    federation.allow(protection)
    name = federation.create(
        make_sum(rounds=2),
        make_task(name="one"),
        make_task(name="two", rounds=1),
        protection=protection,
    )

    def program(session: Session) -> list[float]:
        k = rank(session)
        found = [session.sum({"x": np.array([float(k), -1.0])})["x"]]
        found += [session.mean({"y": np.array([float(k)])}, weight=k, task="one")["y"]]
        found += [session.sum({"x": np.array([k * 10.0, 0.5])})["x"]]
        found += [session.mean({"z": np.array([1.0])}, task="two")["z"]]
        with refused(SessionEnded, "task-done"):
            session.sum({"x": np.zeros(2)})
        with refused(ConfigError, "task-choice"):
            session.mean({"y": np.zeros(1)})
        with refused(ConfigError, "task-choice"):
            session.sum({"y": np.zeros(1)}, task="one")
        with refused(ConfigError, "task-choice"):
            session.mean({"x": np.zeros(2)}, task="statistics")
        with refused(ConfigError, "task-unknown"):
            session.sum({"x": np.zeros(2)}, task="three")
        assert session.rounds_done == 4
        assert session.task_rounds("statistics") == 2
        return [float(value) for array in found for value in array]

    for found in federation.play(name, program).values():
        assert found == pytest.approx([10.0, -4.0, 3.0, 100.0, 2.0, 1.0], abs=1e-6)


def test_a_session_that_is_over_says_so_and_still_replays(federation: Federation) -> None:
    name = federation.create(make_sum(rounds=1))
    federation.play(name, lambda s: s.sum({"x": np.ones(1)}))
    assert federation.show(name).summary.state == "done"
    with client_sdk.join(name, profile=federation.silo("a")) as session:
        assert session.sum({"x": np.zeros(1)})["x"] == pytest.approx(4.0)
        with refused(SessionEnded, "task-done"):
            session.sum({"x": np.zeros(1)})
    session.close()  # twice is once


def test_another_tasks_round_may_come_first(federation: Federation) -> None:
    """One silo waits with another task than the rest: it takes their result and goes on."""
    name = federation.create(
        make_sum(rounds=1), make_sum(name="other", rounds=1), train_deadline=1.5
    )
    ready = threading.Event()

    def most(session: Session) -> tuple[float, float]:
        federation.await_state(name, "d", "ready")
        ready.set()
        first = session.sum({"x": np.ones(2)}, task="statistics")["x"]
        return float(first[0]), float(session.sum({"y": np.ones(2)}, task="other")["y"][0])

    def one(session: Session) -> tuple[float, float]:
        other = session.sum({"y": np.ones(2)}, task="other")["y"]
        assert ready.is_set()
        return float(session.sum({"x": np.ones(2)}, task="statistics")["x"][0]), float(other[0])

    found = federation.play(name, most, d=one)
    assert all(pair == pytest.approx((3.0, 4.0)) for pair in found.values())


WRONG = [
    ("weight", {"x": np.zeros(2)}, 101.0, {"loss": 1.0}),
    ("weight", {"x": np.zeros(2)}, 0.0, {"loss": 1.0}),
    ("weight", {"x": np.zeros(2)}, float("nan"), {"loss": 1.0}),
    ("tensor-finite", {"x": np.array([0.0, np.nan])}, 1.0, {"loss": 1.0}),
    ("tensor-finite", {"x": np.array([0.0, -np.inf])}, 1.0, {"loss": 1.0}),
    ("tensor-bound", {"x": np.array([0.0, 8.01])}, 1.0, {"loss": 1.0}),
    ("tensor-dtype", {"x": np.array([1, 2])}, 1.0, {"loss": 1.0}),
    ("tensor-dtype", {"x": [1.0, 2.0]}, 1.0, {"loss": 1.0}),
    ("task-schema", {"x": np.zeros(3)}, 1.0, {"loss": 1.0}),
    ("task-schema", {"y": np.zeros(2)}, 1.0, {"loss": 1.0}),
    ("schema-order", {}, 1.0, {"loss": 1.0}),
    ("metric-names", {"x": np.zeros(2)}, 1.0, {}),
    ("metric-names", {"x": np.zeros(2)}, 1.0, {"loss": 1.0, "more": 1.0}),
    ("metric-bound", {"x": np.zeros(2)}, 1.0, {"loss": 10.5}),
    ("metric-bound", {"x": np.zeros(2)}, 1.0, {"loss": float("nan")}),
]


def test_what_cannot_be_encoded_is_named_and_the_round_stays_usable(
    federation: Federation,
) -> None:
    name = federation.create(make_task(metrics=LOSS, rounds=1))

    def clumsy(session: Session) -> float:
        with refused(InputError, "tensor-bound") as caught:
            session.mean({"x": np.array([0.0, 9.0])}, metrics={"loss": 0.0})
        assert "'x'" in str(caught.value)
        for code, values, weight, metrics in WRONG:
            with refused(InputError, code):
                session.mean(values, weight, metrics=metrics)  # type: ignore[arg-type]
        assert federation.state(name, "d") == "training"  # nothing was sent
        return float(session.mean({"x": np.full(2, 4.0)}, 1.0, metrics={"loss": 1.0})["x"][0])

    found = federation.play(
        name,
        lambda s: float(s.mean({"x": np.zeros(2)}, 1.0, metrics={"loss": 1.0})["x"][0]),
        d=clumsy,
    )
    assert found == {silo: pytest.approx(1.0) for silo in SILOS}


@pytest.mark.parametrize("clip", [Clip.ELEMENT, Clip.L2])
def test_clipping_is_counted(federation: Federation, clip: Clip) -> None:
    name = federation.create(make_task(bound=1.0, clip=clip, rounds=1))

    def program(session: Session) -> Any:
        value = np.array([3.0, 0.0]) if session.silo == "a" else np.zeros(2)
        return session.aggregate("training", {"x": value}, weight=1.0, metrics={})

    for outcome in federation.play(name, program).values():
        np.testing.assert_allclose(outcome.tensors["x"], [0.25, 0.0], atol=1e-9)
        assert outcome.clipped == pytest.approx(1.0 if clip is Clip.ELEMENT else 2.0)


def test_vectors_of_many_chunks(federation: Federation) -> None:
    name = federation.create(make_sum(rounds=1), chunk_bytes=1024)
    found = federation.play(name, lambda s: s.sum({"x": np.linspace(-1, 1, 3001) * rank(s)}))
    np.testing.assert_allclose(found["a"]["x"], np.linspace(-1, 1, 3001) * 10, atol=1e-9)


def test_there_is_no_such_session(federation: Federation) -> None:
    with refused(NotFound, "session-unknown"):
        client_sdk.join("nowhere", profile=federation.silo("a"))
    with pytest.raises(NotFound):  # and the refused join left no ledger locked
        client_sdk.join("nowhere", profile=federation.silo("a"))


def test_without_torch_sums_work_and_rounds_say_what_to_install(
    federation: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.__import__

    def without_torch(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.partition(".")[0] == "torch" or name == "safetensors.torch":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    kept = {n: m for n, m in sys.modules.items() if n.startswith("client_sdk")}
    for module in kept:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setattr(builtins, "__import__", without_torch)
    fresh = importlib.import_module("client_sdk")
    assert fresh is not client_sdk
    name = federation.create(make_sum(rounds=1), make_task(rounds=1))

    def program(silo: str) -> tuple[float, float]:
        with fresh.join(name, profile=federation.silo(silo)) as session:
            total = session.sum({"x": np.ones(1)})["x"][0]
            mean = session.mean({"x": np.ones(1)})["x"][0]
            if silo == "a":
                with refused(ConfigError, "extra-missing") as caught:
                    next(iter(session.rounds(None)))
                assert "pip install" in str(caught.value)
            return float(total), float(mean)

    found = federation.together(name, {s: lambda s=s: program(s) for s in SILOS})  # type: ignore[misc]
    assert all(pair == pytest.approx((4.0, 1.0)) for pair in found.values())
    assert "client_sdk.tensors" not in sys.modules
    for module in [m for m in sys.modules if m.startswith("client_sdk")]:
        del sys.modules[module]
    sys.modules.update(kept)
