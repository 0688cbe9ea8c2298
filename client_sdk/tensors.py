"""Between a torch model and NumPy: the only import of torch.

Shared tensors travel as float32 or float64 arrays; bfloat16, which NumPy does not know, as float32,
which holds it exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

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


def to_file(tensors: Mapping[str, torch.Tensor]) -> bytes:
    """Serialise tensors as safetensors."""
    return save({name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()})


def from_file(data: bytes) -> dict[str, torch.Tensor]:
    """Parse safetensors.

    Raises:
        InputError: the bytes are none.
    """
    try:
        return load(data)
    except SafetensorError as error:
        raise InputError(
            "weights-file", f"The agreed initial weights are no safetensors file: {error}"
        ) from None


def export_model(model: torch.nn.Module, path: Path) -> None:
    """Write a whole model as safetensors, tied weights once."""
    save_model(model, str(path))


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
        make = optimizer or (lambda parameters: torch.optim.SGD(parameters, lr=1.0))
        self._optimizer = make(list(self._parameters.values()))

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
    def delta(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, npt.NDArray[Any]]:
        """Local minus global, by name.

        Raises:
            InputError: other tensors are shared than at the start.
        """
        self._check(tensors)
        wide = {
            name: tensors[name].to("cpu", parameter.dtype) - parameter
            for name, parameter in self._parameters.items()
        }
        return to_arrays(wide)

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
