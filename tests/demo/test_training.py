"""Training is repeatable and bounded, and federated learning beats learning alone."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from secagg.config import is_name
from secagg.demo import training
from secagg.demo.data import STATISTICS_BOUND, Dataset, load, standardiser, statistics
from secagg.errors import ConfigError, InputError

BESIDE = Path(__file__).parents[3] / "shared" / "data" / "heart"
HEART = Path(os.environ.get("SECAGG_HEART_DATA", BESIDE))
needs_heart = pytest.mark.skipif(
    not (HEART / "processed.va.data").is_file(),
    reason="UCI Heart Disease is not here; name its directory in SECAGG_HEART_DATA",
)
BOTH = ["breast-cancer", pytest.param("heart", marks=needs_heart)]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def loaded(name: str, seed: int = 0) -> Dataset:
    return load(name, seed=seed, data_dir=HEART if name == "heart" else None)


def line(rows: int = 40) -> tuple[np.ndarray, np.ndarray]:
    """Rows that one threshold on the first of two features separates."""
    x = np.random.default_rng(0).normal(size=(rows, 2))
    return x, (x[:, 0] > 0).astype(np.float64)


def trained(seed: int, epochs: int = 20) -> tuple[torch.nn.Linear, dict[str, float]]:
    model = training.make_model(2, seed=1)
    metrics = training.train_local(model, *line(), epochs=epochs, lr=0.5, batch=16, seed=seed)
    return model, metrics


def test_a_model_is_decided_by_its_seed() -> None:
    torch.manual_seed(1)
    one = training.make_model(13, seed=5)
    torch.manual_seed(2)
    two, other = training.make_model(13, seed=5), training.make_model(13, seed=6)
    assert torch.equal(one.weight, two.weight)
    assert not torch.equal(one.weight, other.weight)
    assert one.bias.item() == 0.0
    assert {value.dtype for value in one.parameters()} == {torch.float32}


def test_training_is_repeatable_and_its_order_is_the_seeds() -> None:
    (one, first), (two, second), (other, _) = trained(3), trained(3), trained(4)
    assert torch.equal(one.weight, two.weight)
    assert first == second
    assert not torch.equal(one.weight, other.weight)


def test_training_learns_and_reports_bounded_metrics() -> None:
    _, before = trained(0, epochs=0)
    model, after = trained(0)
    assert before["train-loss"] == pytest.approx(np.log(2), abs=0.05)
    assert after["train-loss"] < 0.3
    assert after["train-accuracy"] >= 0.95
    assert after["train-accuracy"] == training.accuracy(model, *line())
    assert set(after) == set(training.METRIC_BOUNDS)
    assert all(map(is_name, after))


def test_a_loss_is_cut_at_its_bound() -> None:
    model = training.make_model(2, seed=0)
    with torch.no_grad():
        model.bias.fill_(1e6)
    metrics = training.train_local(model, *line(), epochs=0, lr=1.0, batch=1, seed=0)
    assert metrics["train-loss"] == training.METRIC_BOUNDS["train-loss"]


def test_accuracy_counts_predicted_labels() -> None:
    model = training.make_model(1, seed=0)
    with torch.no_grad():
        model.weight.fill_(1.0)
    x = np.array([[-2.0], [-1.0], [1.0], [2.0]])
    assert training.accuracy(model, x, np.array([0.0, 1.0, 1.0, 1.0])) == 0.75


def test_local_seeds_differ_by_run_round_and_silo() -> None:
    seeds = {training.local_seed(s, r, p) for s in range(5) for r in range(5) for p in range(5)}
    assert len(seeds) == 125


@pytest.mark.parametrize("name", BOTH)
def test_weights_are_within_their_cap(name: str) -> None:
    assert max(len(silo.y_train) for silo in loaded(name).silos) <= training.WEIGHT_CAP


@needs_heart
def test_a_round_is_the_mean_of_the_deltas_weighted_by_rows() -> None:
    dataset = loaded("heart")
    parts = [statistics(silo.x_train) for silo in dataset.silos]
    mean, deviation = standardiser({k: sum(p[k] for p in parts) for k in parts[0]})
    total, rows = torch.zeros(1, 13), 0
    bias = torch.zeros(1)
    for position, silo in enumerate(dataset.silos):
        if silo.name == "va":
            continue
        model = training.make_model(13, 0)
        x = training.standardise(silo.x_train, mean, deviation)
        training.train_local(
            model,
            x,
            silo.y_train,
            epochs=training.EPOCHS,
            lr=training.LEARNING_RATE,
            batch=training.BATCH,
            seed=training.local_seed(0, 1, position),
        )
        total += len(x) * model.weight.detach()
        bias += len(x) * model.bias.detach()
        rows += len(x)
    with torch.no_grad():
        model.weight.copy_(total / rows)
        model.bias.copy_(bias / rows)
    x_test, y_test = dataset.union_test()
    expected = training.accuracy(model, training.standardise(x_test, mean, deviation), y_test)
    assert training.simulate_federated(dataset, 0, rounds=1, absent={1: "va"}) == expected


def test_a_delta_beyond_its_bound_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "DELTA_BOUND", 0.1)
    with pytest.raises(InputError) as refused:
        training.simulate_federated(loaded("breast-cancer"), 0)
    assert refused.value.code == "delta-bound"


@pytest.mark.parametrize("name", BOTH)
def test_a_delta_has_a_margin_to_its_bound(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "DELTA_BOUND", training.DELTA_BOUND / 4)
    training.simulate_federated(loaded(name), 0)


@pytest.mark.parametrize("name", BOTH)
def test_statistics_of_34_bits_give_the_same_accuracy(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    resolution = STATISTICS_BOUND * 2.0**-34  # about what CKKS keeps

    def rounded(features: np.ndarray) -> dict[str, np.ndarray]:
        parts = statistics(features)
        return {key: np.round(part / resolution) * resolution for key, part in parts.items()}

    datasets = [loaded(name, seed) for seed in range(4)]
    exact = [training.simulate_federated(dataset, 0) for dataset in datasets]
    monkeypatch.setattr(training, "statistics", rounded)
    assert [training.simulate_federated(dataset, 0) for dataset in datasets] == exact


@needs_heart
def test_heart_reaches_its_target_with_and_without_dropouts() -> None:
    federated, dropped, pooled, alone = [], [], [], []
    for seed in range(4):
        dataset = loaded("heart", seed)
        absent = dataset.names[seed]
        federated.append(training.simulate_federated(dataset, seed))
        dropped.append(training.simulate_federated(dataset, seed, absent={2: absent, 4: absent}))
        pooled.append(training.pooled(dataset, seed))
        alone.append(training.local_mean(dataset, seed))
    for accuracies in (federated, dropped):
        assert np.mean(accuracies) >= 0.78
        assert abs(np.mean(accuracies) - np.mean(pooled)) <= 0.02
        assert np.mean(accuracies) > np.mean(alone)


def test_breast_cancer_beats_learning_alone_with_and_without_dropouts() -> None:
    for seed in range(4):
        dataset = loaded("breast-cancer", seed)
        absent = dataset.names[seed]
        alone = training.local_mean(dataset, seed)
        assert training.simulate_federated(dataset, seed) > alone
        assert training.simulate_federated(dataset, seed, absent={2: absent, 4: absent}) > alone


def test_a_missing_torch_asks_for_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ConfigError, match=r"pip install 'secagg\[demo\]'") as refused:
        importlib.reload(training)
    assert refused.value.code == "extra-missing"
