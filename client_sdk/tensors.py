"""Between a torch model and NumPy: the only import of torch.

Shared tensors travel as float32 or float64 arrays; bfloat16, which NumPy does not know, as float32,
which holds it exactly.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt

from client_sdk.progress import log
from secagg.errors import ConfigError, InputError

try:
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load, save, save_model
except ImportError:
    raise ConfigError(
        "extra-missing",
        "torch is not installed; session.rounds(model) needs it.",
        "Run: pip install 'secagg[torch]'. session.mean and session.sum take NumPy arrays.",
    ) from None

Shared: TypeAlias = Callable[[str, torch.Tensor], bool]
_MODEL: Final = "model/"
_EXTRA: Final = "extra/"
_WEIGHT: Final = "weight/"
_OPTIMIZER: Final = "optimizer/"


def shared_tensors(model: torch.nn.Module, shared: Shared | None) -> dict[str, torch.Tensor]:
    """Return the tensors of a model that are shared, by name, sorted.

    Args:
        model: any module.
        shared: predicate over the state's names and tensors; by default the parameters that
            require grad, so that frozen layers and buffers stay home.

    Raises:
        InputError: none is shared, or one is not of floats.
    """
    if shared is None:
        chosen = {n: p.data for n, p in model.named_parameters() if p.requires_grad}
    else:
        state = {**dict(model.named_buffers()), **dict(model.named_parameters())}
        chosen = {name: t.data for name, t in state.items() if shared(name, t)}
    if not chosen:
        raise InputError("shared-none", "No tensor of the model is shared.")
    for name, tensor in chosen.items():
        if not tensor.is_floating_point():
            raise InputError(
                "tensor-dtype",
                f"Tensor {name!r} is {tensor.dtype}; only floats are shared.",
                "Leave it out with shared=.",
            )
    return dict(sorted(chosen.items()))


def to_arrays(tensors: Mapping[str, torch.Tensor]) -> dict[str, npt.NDArray[Any]]:
    """Copy tensors to NumPy, float64 as it is and everything shorter as float32."""
    return {
        name: (t if t.dtype == torch.float64 else t.to(torch.float32)).cpu().numpy().copy()
        for name, t in ((name, t.detach()) for name, t in tensors.items())
    }


def to_file(tensors: Mapping[str, torch.Tensor], metadata: dict[str, str] | None = None) -> bytes:
    """Serialise tensors as safetensors."""
    plain = {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}
    return save(plain, metadata)


def from_file(data: bytes) -> dict[str, torch.Tensor]:
    """Parse safetensors.

    Raises:
        InputError: the bytes are none.
    """
    try:
        return load(data)
    except (SafetensorError, KeyError) as error:  # KeyError: a type that torch has not
        raise InputError(
            "weights-file", f"The agreed initial weights are no safetensors file: {error}"
        ) from None


def export_model(model: torch.nn.Module, path: Path) -> None:
    """Write a whole model as safetensors, tied weights once."""
    save_model(model, str(path))


def model_file(
    model: torch.nn.Module, extra: Mapping[str, torch.Tensor], metadata: dict[str, str]
) -> bytes:
    """Serialise a model's whole state, shared or not, and a trainer's own tensors.

    Raises:
        InputError: something of them is no tensor that a file can hold.
    """
    held = {f"{_MODEL}{name}": value for name, value in model.state_dict().items()}
    held |= {f"{_EXTRA}{name}": value for name, value in extra.items()}
    for name, value in held.items():
        if not isinstance(value, torch.Tensor):
            raise InputError(
                "checkpoint-tensor",
                f"{name} is {type(value).__name__}; only tensors are kept.",
                "Make it a tensor, or keep it elsewhere.",
            )
    try:
        return to_file(held, metadata)
    except KeyError as error:
        raise InputError(
            "checkpoint-tensor", f"A tensor of {error.args[0]} has no place in safetensors."
        ) from None


def load_model(model: torch.nn.Module, data: bytes) -> dict[str, torch.Tensor]:
    """Put a model into the state that ``model_file`` kept; return the trainer's own tensors.

    Raises:
        InputError: it is another model's; this one is as it was.
    """
    held = load(data)
    kept = {n.removeprefix(_MODEL): t for n, t in held.items() if n.startswith(_MODEL)}
    if _kinds(kept) != _kinds(model.state_dict()):
        raise InputError("checkpoint-model", "The checkpoint is of a model with other tensors.")
    model.load_state_dict(kept)
    return {n.removeprefix(_EXTRA): t for n, t in held.items() if n.startswith(_EXTRA)}


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What ``GlobalWeights.file`` keeps, as it is read back.

    Args:
        weights: by name.
        optimizer: what the optimiser remembers, as JSON.
        held: the tensors that it names.
    """

    weights: Mapping[str, torch.Tensor]
    optimizer: Any
    held: Mapping[str, torch.Tensor]

    @classmethod
    def of(cls, data: bytes, optimizer: Any) -> Snapshot:
        """Parse a file, whatever it holds."""
        tensors = load(data)
        held = {name: t for name, t in tensors.items() if name.startswith(_OPTIMIZER)}
        weights = {n.removeprefix(_WEIGHT): t for n, t in tensors.items() if n not in held}
        return cls(weights, optimizer, held)


class GlobalWeights:
    """The agreed weights, and the optimiser that steps them with each mean delta.

    The delta is a pseudo-gradient: grad = −mean(local − global), so SGD with lr 1 is FedAvg.
    Source: Reddi et al., Adaptive Federated Optimization, ICLR 2021, Algorithm 1.
    """

    def __init__(
        self,
        tensors: Mapping[str, torch.Tensor],
        optimizer: Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer] | None,
    ) -> None:
        self._parameters = {
            name: torch.nn.Parameter(t.detach().to("cpu", _wide(t), copy=True))
            for name, t in tensors.items()
        }
        self._make = optimizer or (lambda parameters: torch.optim.SGD(parameters, lr=1.0))
        self._optimizer = self._make(list(self._parameters.values()))

    @property
    def step_name(self) -> str:
        """The optimiser and its numbers, in words that all silos compare."""
        kind = type(self._optimizer)
        groups = []
        for group in self._optimizer.param_groups:
            numbers = sorted((key, value) for key, value in group.items() if key != "params")
            groups.append(", ".join(f"{key}={value}" for key, value in numbers))
        return f"{kind.__module__.split('.')[0]}.{kind.__qualname__}({' | '.join(groups)})"

    @torch.no_grad()
    def set(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Take over the agreed initial weights.

        Raises:
            InputError: they are not of the names and shapes that were agreed.
        """
        self._check(tensors)
        for name, parameter in self._parameters.items():
            parameter.copy_(tensors[name])

    @torch.no_grad()
    def step(self, mean_delta: Mapping[str, npt.NDArray[np.float64]]) -> None:
        """Apply a round's mean delta."""
        for name, parameter in self._parameters.items():
            delta = torch.from_numpy(np.ascontiguousarray(mean_delta[name]))
            parameter.grad = -delta.to(parameter.dtype).reshape(parameter.shape)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)

    def optimizer_state(self) -> tuple[Any, dict[str, torch.Tensor]]:
        """Return what the optimiser remembers: as JSON, and the tensors that it names.

        Raises:
            TypeError: it remembers something that is neither number, text nor tensor.
        """
        held: dict[str, torch.Tensor] = {}
        return _flatten(self._optimizer.state_dict(), held), held

    def file(self, held: Mapping[str, torch.Tensor], metadata: dict[str, str]) -> bytes:
        """Serialise the weights and the optimiser's tensors."""
        weights = {f"{_WEIGHT}{name}": p for name, p in self._parameters.items()}
        return to_file({**weights, **held}, metadata)

    def restore(self, data: bytes, optimizer: Any) -> bool:
        """Take over weights and optimiser as ``file`` kept them, to the bit.

        Args:
            data: the file.
            optimizer: what the optimiser remembers, as JSON.

        Returns:
            Whether they could be. If not, the optimiser starts afresh and the weights are to be
            set.
        """
        return self._restore(Snapshot.of(data, optimizer))

    def _restore(self, kept: Snapshot) -> bool:
        optimizer, held = kept.optimizer, kept.held
        try:
            self.set(kept.weights)
            self._optimizer.load_state_dict(_unflatten(optimizer, held))
            if not self._remembers(optimizer, held):
                self._put_state(_unflatten(optimizer, held)["state"])
            if self._remembers(optimizer, held):
                return True
        except (InputError, ValueError, KeyError, TypeError):
            pass
        self._optimizer = self._make(list(self._parameters.values()))
        return False

    # A peer's, who may send anything.

    @property
    def max_bytes(self) -> int:
        """More than a peer's file has: an optimiser remembers a few tensors of each weight's size.

        Four of them, in Adam's widest form; twice that, and room for names.
        """
        own = sum(p.numel() * p.element_size() for p in self._parameters.values())
        return 8 * own + 2**25

    def read(self, data: bytes, optimizer: Any) -> Snapshot:
        """Parse a peer's file, applying nothing.

        Raises:
            InputError: it is not of this model and optimiser, or a weight is not finite.
        """
        try:
            kept = Snapshot.of(data, optimizer)
            same = _groups(optimizer) == _groups(self.optimizer_state()[0])
        except Exception as error:  # noqa: BLE001 - whatever its bytes do, they are its sender's
            raise InputError("checkpoint-model", f"it cannot be read ({error!r:.100})") from None
        if _kinds(kept.weights) != _kinds(self._parameters):  # CHECK: checkpoint-tensors
            raise InputError("checkpoint-model", "its tensors are others.")
        # CHECK: checkpoint-finite
        if not all(bool(t.isfinite().all()) for t in (*kept.weights.values(), *kept.held.values())):
            raise InputError("checkpoint-model", "it has numbers that are not finite.")
        if not same:  # CHECK: checkpoint-optimiser
            raise InputError("checkpoint-model", "its optimiser has other settings.")
        return kept

    def agree(self, a: Snapshot, b: Snapshot) -> bool:
        """Whether two peers' files are the same, but for how machines round.

        Weights may differ by 1e-5·(1 + |a|): sums are opened alike everywhere, and a step of the
        optimiser then rounds once or twice an element. What an optimiser remembers is held closer
        where it is small, since steps divide by it: a tensor without a negative element (a mean of
        squares, a count) by 1e-3 of each element, any other one by 1e-5 of its greatest; a zero is
        a zero at both.
        """
        return (
            _kinds(a.held) == _kinds(b.held)
            and _alike(a.optimizer, b.optimizer)
            and all(_close(t, b.weights[name], 1e-5, 1e-5) for name, t in a.weights.items())
            and all(_near(t, b.held[name]) for name, t in a.held.items())
        )

    def adopt(self, kept: Snapshot) -> None:
        """Take over a peer's weights and optimiser, whole or not at all.

        Raises:
            InputError: this model's optimiser does not take them.
        """
        twin = GlobalWeights(self._parameters, self._make)
        try:
            taken = twin._restore(kept)
        except Exception:  # noqa: BLE001 - of an optimiser that we do not know
            taken = False
        if not taken:  # CHECK: checkpoint-taken
            raise InputError(
                "checkpoint-model",
                "The silos' checkpoints are not of this model and optimiser.",
                "Give all silos the same ones.",
            )
        self._parameters, self._optimizer = twin._parameters, twin._optimizer

    def _put_state(self, state: Mapping[int, Any]) -> None:
        """Undo what ``load_state_dict`` converts: all of a parameter's state to its dtype."""
        groups = self._optimizer.param_groups
        for number, parameter in enumerate(p for group in groups for p in group["params"]):
            if number in state:
                self._optimizer.state[parameter] = state[number]

    def _remembers(self, optimizer: Any, held: Mapping[str, torch.Tensor]) -> bool:
        """Whether the optimiser is as it was kept."""
        now, tensors = self.optimizer_state()
        return (
            now == optimizer
            and tensors.keys() == held.keys()
            and all(_same(tensors[name], held[name]) for name in held)
        )

    @torch.no_grad()
    def load_into(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Copy the agreed weights into a model's tensors.

        Raises:
            InputError: other tensors are shared than at the start.
        """
        self._check(tensors)
        for name, parameter in self._parameters.items():
            tensors[name].copy_(parameter)

    @torch.no_grad()
    def delta(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Local minus global, by name, on the GPU where the local ones lie there.

        Raises:
            InputError: other tensors are shared than at the start.
        """
        self._check(tensors)
        try:
            return self._delta(tensors, on_gpu=True)
        except torch.cuda.OutOfMemoryError:
            log.warning("the GPU has no memory left: this update is made on the host")
            return self._delta(tensors, on_gpu=False)

    def _delta(
        self, tensors: Mapping[str, torch.Tensor], *, on_gpu: bool
    ) -> dict[str, torch.Tensor]:
        delta = {}
        for name, parameter in self._parameters.items():
            tensor = tensors[name].detach()
            device = tensor.device if on_gpu and tensor.is_cuda else torch.device("cpu")
            delta[name] = tensor.to(device, parameter.dtype) - parameter.to(device)
        return delta

    def _check(self, tensors: Mapping[str, torch.Tensor]) -> None:
        ours = {(name, tuple(p.shape)) for name, p in self._parameters.items()}
        theirs = {(name, tuple(t.shape)) for name, t in tensors.items()}
        if ours != theirs:
            name, shape = min(ours ^ theirs)
            raise InputError(
                "tensor-names",
                f"Tensor {name!r} of shape {shape} is not alike in the model and in the task.",
                "Share the same tensors in all rounds; shared= says which, whatever is frozen.",
            )


def _wide(tensor: torch.Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _kinds(tensors: Mapping[str, Any]) -> dict[str, tuple[object, object]]:
    return {
        name: (getattr(t, "dtype", None), getattr(t, "shape", None)) for name, t in tensors.items()
    }


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors are alike to the bit."""
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    first, second = (t.detach().cpu().reshape(-1).view(torch.uint8) for t in (a, b))
    return torch.equal(first, second)


def _groups(optimizer: Any) -> str:
    """The settings in an optimiser's state, as text that tells 1 from 1.0 and from true."""
    return json.dumps(dict(optimizer["dict"])["param_groups"], sort_keys=True)


def _alike(a: Any, b: Any) -> bool:
    """Whether two optimisers remember the same, as JSON, but for how floats round."""
    if type(a) is not type(b):
        return False
    match a:
        case float():
            return a == b or math.isclose(a, b, rel_tol=1e-5)
        case dict():
            return a.keys() == b.keys() and all(_alike(a[key], b[key]) for key in a)
        case list():
            return len(a) == len(b) and all(map(_alike, a, b))
        case _:
            return bool(a == b)


def _close(a: torch.Tensor, b: torch.Tensor, relative: float, absolute: float) -> bool:
    """Whether |a − b| ≤ relative·|a| + absolute everywhere; integers have to be the same."""
    if not a.is_floating_point():
        return torch.equal(a, b)
    wide, other = a.double(), b.double()
    return bool(((wide - other).abs() <= relative * wide.abs() + absolute).all())


def _near(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors of an optimiser's are the same (see ``GlobalWeights.agree``)."""
    signed = a.is_floating_point() and bool((a < 0).any() and (b < 0).any())
    if not signed:
        return _close(a, b, 1e-3, 0.0)
    greatest = float(a.abs().max())
    return bool(((a == 0) == (b == 0)).all()) and _close(a, b, 0.0, 1e-5 * greatest)


def _flatten(value: Any, held: dict[str, torch.Tensor]) -> Any:
    """Return a structure as JSON that ``_unflatten`` reverses, its tensors by name in ``held``."""
    match value:
        case torch.Tensor():
            name = f"{_OPTIMIZER}{len(held)}"
            held[name] = value
            return {"tensor": name}
        case dict():
            return {"dict": [[_flatten(k, held), _flatten(v, held)] for k, v in value.items()]}
        case tuple():
            return {"tuple": [_flatten(item, held) for item in value]}
        case list():
            return [_flatten(item, held) for item in value]
        case None | bool() | int() | float() | str():
            return value
        case _:
            raise TypeError(f"the optimiser holds a {type(value).__name__}")


def _unflatten(value: Any, held: Mapping[str, torch.Tensor]) -> Any:
    match value:
        case {"tensor": name}:
            return held[name].clone()
        case {"dict": items}:
            return {_unflatten(k, held): _unflatten(v, held) for k, v in items}
        case {"tuple": items}:
            return tuple(_unflatten(item, held) for item in items)
        case list():
            return [_unflatten(item, held) for item in value]
        case _:
            return value
