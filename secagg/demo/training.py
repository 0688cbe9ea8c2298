"""The demo's model, its local training, and what its accuracy is compared with.

The model is logistic regression: on 490 (heart) and about 375 (breast-cancer) training rows over
four silos, a hidden layer of 8 or 16 measured within 0.01 of it, and so does not earn its weights.
A round is FedAvg ([McMahan+17]): each silo trains a copy of the global model for a few epochs and
submits the delta, local minus global; the mean weighted by training rows is added to the global
model (server: SGD, learning rate 1).

Two baselines frame the result, with as many epochs as the federated model gets altogether:
``pooled`` trains on all rows in one place, which the silos may not do; ``local_mean`` is what a
silo gets alone. All accuracies are measured on the union of the silos' test rows.

``simulate_federated`` is the federation without secure aggregation, in floats and in one process:
the figure that the real one must reproduce. Callers set ``torch.set_num_threads``.

Raises on import: ConfigError ``extra-missing`` where torch is not installed.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

import numpy as np

from secagg.demo.data import Dataset, FloatArray, SiloData, standardiser, statistics
from secagg.errors import ConfigError, InputError

try:
    import torch
except ModuleNotFoundError as missing:
    raise ConfigError(
        "extra-missing", "torch is not installed.", "pip install 'secagg[demo]'"
    ) from missing

ROUNDS: Final = 5
EPOCHS: Final = 5
"""Epochs of local training in one round."""
LEARNING_RATE: Final = 0.05
BATCH: Final = 16

WEIGHT_CAP: Final = 1000
"""Greatest weight of a silo; a silo's weight is its number of training rows."""
DELTA_BOUND: Final = 4.0
"""Bound on the magnitude of a delta's elements; the greatest one measured is below 1."""
METRIC_BOUNDS: Final[Mapping[str, float]] = MappingProxyType(
    {"train-loss": 16.0, "train-accuracy": 1.0}
)
"""The metrics of ``train_local`` and the bound on each one's magnitude."""

_INITIAL_DEVIATION: Final = 0.01


def make_model(features: int, seed: int) -> torch.nn.Linear:
    """Logistic regression, float32, from ``features`` inputs to one logit.

    Args:
        features: number d of inputs, at least 1.
        seed: draws the small initial weights; every silo gives the same one.
    """
    model = torch.nn.Linear(features, 1)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        model.weight.normal_(0.0, _INITIAL_DEVIATION, generator=generator)
        model.bias.zero_()
    return model


def train_local(
    model: torch.nn.Module,
    x: FloatArray,
    y: FloatArray,
    *,
    epochs: int,
    lr: float,
    batch: int,
    seed: int,
) -> dict[str, float]:
    """Train ``model`` in place by plain SGD on the cross-entropy.

    Args:
        model: gives one logit a row.
        x: (rows, d), standardised; at least one row.
        y: (rows,), labels 0 or 1.
        epochs: passes over the rows, at least 0.
        lr: learning rate.
        batch: rows of a step, at least 1; the last step of an epoch may have fewer.
        seed: orders the rows; the same arguments give the same weights.

    Returns:
        Over the training rows, after training: ``train-loss`` (mean, in nats, cut at its bound)
        and ``train-accuracy`` (0 to 1).
    """
    inputs, labels = _tensor(x), _tensor(y)
    generator = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.SGD(model.parameters(), lr=lr)
    for _ in range(epochs):
        order = torch.randperm(len(labels), generator=generator)
        for start in range(0, len(labels), batch):
            rows = order[start : start + batch]
            optimiser.zero_grad()
            torch.autograd.backward(_loss(model, inputs[rows], labels[rows]))
            optimiser.step()
    with torch.no_grad():
        loss = float(_loss(model, inputs, labels))
    return {
        "train-loss": min(loss, METRIC_BOUNDS["train-loss"]),
        "train-accuracy": accuracy(model, x, y),
    }


def accuracy(model: torch.nn.Module, x: FloatArray, y: FloatArray) -> float:
    """Share (0 to 1) of the rows of ``x`` (rows, d), standardised, whose label is predicted."""
    with torch.no_grad():
        positive = model(_tensor(x))[:, 0] > 0
    return float(np.mean(positive.numpy() == (y > 0.5)))


def standardise(x: FloatArray, mean: FloatArray, deviation: FloatArray) -> FloatArray:
    """``x`` (rows, d) in deviations from the mean; ``mean`` and ``deviation`` are (d,)."""
    return (x - mean) / deviation


def local_seed(seed: int, round_number: int, position: int) -> int:
    """The seed of one silo's training in one round.

    Args:
        seed: the run's, not negative.
        round_number: from 1.
        position: of the silo in ``Dataset.names``, from 0.
    """
    return int(np.random.SeedSequence([seed, round_number, position]).generate_state(1)[0])


def pooled(dataset: Dataset, seed: int, rounds: int = ROUNDS) -> float:
    """Accuracy of one model trained on all silos' rows, standardised by their own statistics."""
    return _alone(dataset, *dataset.union_train(), seed, rounds)


def local_mean(dataset: Dataset, seed: int, rounds: int = ROUNDS) -> float:
    """Mean over the silos of the accuracy that each reaches with its own rows and statistics."""
    alone = [_alone(dataset, silo.x_train, silo.y_train, seed, rounds) for silo in dataset.silos]
    return float(np.mean(alone))


def simulate_federated(
    dataset: Dataset,
    seed: int,
    rounds: int = ROUNDS,
    absent: Mapping[int, str] = MappingProxyType({}),
) -> float:
    """Accuracy of FedAvg in floats, after a first sum of all silos' statistics.

    Args:
        dataset: the silos.
        seed: of the initial model and, by ``local_seed``, of every local training.
        rounds: of FedAvg, at least 0.
        absent: round (from 1) to the silo whose delta is missing from it.

    Raises:
        InputError: a delta left ``DELTA_BOUND``, which the real federation would not send.
    """
    mean, deviation = standardiser(_total(dataset))
    model = make_model(dataset.features, seed)
    for number in range(1, rounds + 1):
        deltas, weights = [], []
        for position, silo in enumerate(dataset.silos):
            if absent.get(number) != silo.name:
                x = standardise(silo.x_train, mean, deviation)
                deltas.append(_delta(model, x, silo, local_seed(seed, number, position)))
                weights.append(min(len(x), WEIGHT_CAP))
        _step(model, np.average(deltas, axis=0, weights=weights))
    x_test, y_test = dataset.union_test()
    return accuracy(model, standardise(x_test, mean, deviation), y_test)


def _total(dataset: Dataset) -> dict[str, FloatArray]:
    parts = [statistics(silo.x_train) for silo in dataset.silos]
    return {name: np.sum([part[name] for part in parts], axis=0) for name in parts[0]}


def _alone(dataset: Dataset, x: FloatArray, y: FloatArray, seed: int, rounds: int) -> float:
    mean, deviation = standardiser(statistics(x))
    model = make_model(dataset.features, seed)
    train_local(
        model,
        standardise(x, mean, deviation),
        y,
        epochs=EPOCHS * rounds,
        lr=LEARNING_RATE,
        batch=BATCH,
        seed=seed,
    )
    x_test, y_test = dataset.union_test()
    return accuracy(model, standardise(x_test, mean, deviation), y_test)


def _delta(model: torch.nn.Module, x: FloatArray, silo: SiloData, seed: int) -> FloatArray:
    """Flat delta of one silo's round, float64, within ``DELTA_BOUND``."""
    local = copy.deepcopy(model)
    train_local(local, x, silo.y_train, epochs=EPOCHS, lr=LEARNING_RATE, batch=BATCH, seed=seed)
    delta = _flat(local) - _flat(model)
    if not float(np.max(np.abs(delta))) <= DELTA_BOUND:
        raise InputError("delta-bound", f"A delta of {silo.name} leaves its bound {DELTA_BOUND}.")
    return delta


def _flat(model: torch.nn.Module) -> FloatArray:
    parts = [value.detach().numpy().ravel() for value in model.parameters()]
    return np.concatenate(parts).astype(np.float64)


def _step(model: torch.nn.Module, update: FloatArray) -> None:
    """Add the flat ``update`` to the model's parameters, in their order."""
    start = 0
    with torch.no_grad():
        for value in model.parameters():
            value.add_(_tensor(update[start : start + value.numel()]).reshape(value.shape))
            start += value.numel()


def _loss(model: torch.nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.binary_cross_entropy_with_logits(model(x)[:, 0], y)


def _tensor(values: FloatArray) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32)
