"""The names and shapes of a task's tensors: agreed before the first round, part of its hash."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from secagg.crypto.labels import enc, u64
from secagg.errors import InputError, MalformedMessage
from secagg.ring.native import KINDS

MAX_TENSORS: Final = 65_536
MAX_ELEMENTS: Final = 2**36


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor: its name and shape. Its dtype does not matter: the ring decides what travels."""

    name: str
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        # CHECK: schema-tensor-name
        if not 1 <= len(self.name.encode()) <= 1024 or len(self.shape) > 16:
            raise MalformedMessage("schema-tensor", "A tensor's name or rank is out of range.")
        if any(not 0 <= axis < 2**40 for axis in self.shape):  # CHECK: schema-tensor-axes
            raise MalformedMessage("schema-tensor", f"Tensor {self.name!r} has a negative axis.")

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class Part:
    """Neighbouring elements of one tensor.

    Args:
        tensor: its index.
        within: where in the tensor, flattened.
        whole: where among the elements of all tensors.
    """

    tensor: int
    within: slice
    whole: slice


@dataclass(frozen=True, slots=True)
class Schema:
    """The tensors of a task in the order in which they are flattened: by name."""

    tensors: tuple[TensorSpec, ...]

    def __post_init__(self) -> None:
        names = [tensor.name for tensor in self.tensors]
        # CHECK: schema-order
        if not names or names != sorted(set(names)) or len(names) > MAX_TENSORS:
            raise MalformedMessage("schema-order", "A schema lists 1 or more tensors, by name.")
        if not 0 < self.size <= MAX_ELEMENTS:  # CHECK: schema-size
            raise MalformedMessage("schema-size", f"A schema of {self.size} elements.")

    @classmethod
    def of(cls, tensors: Mapping[str, npt.NDArray[Any]]) -> Schema:
        """The schema of given arrays."""
        return cls(tuple(TensorSpec(name, tensors[name].shape) for name in sorted(tensors)))

    @property
    def size(self) -> int:
        """Number of elements of all tensors."""
        return sum(tensor.size for tensor in self.tensors)

    def parts(self, start: int, stop: int, grain: int) -> Iterator[Part]:
        """Cut a range of elements at the borders of tensors and at multiples of ``grain``."""
        starts = list(accumulate((tensor.size for tensor in self.tensors), initial=0))
        tensor = bisect_right(starts, start) - 1
        while start < stop:
            first, end = starts[tensor : tensor + 2]
            while start < (until := min(stop, end, start + grain - start % grain)):
                yield Part(tensor, slice(start - first, until - first), slice(start, until))
                start = until
            tensor += 1

    def encode(self) -> bytes:
        """The bytes that are hashed."""
        return enc(*(enc(t.name.encode(), *(u64(axis) for axis in t.shape)) for t in self.tensors))

    def check(self, tensors: Mapping[str, npt.NDArray[Any]]) -> None:
        """Return if the arrays are what the schema says.

        Raises:
            InputError: a tensor is missing, unknown, of another shape or no float; it is named.
        """
        expected = {tensor.name: tensor for tensor in self.tensors}
        for name in sorted(expected.keys() ^ tensors.keys()):
            state = "missing" if name in expected else "not part of this task"
            raise InputError("tensor-names", f"Tensor {name!r} is {state}.")
        for name, spec in expected.items():
            array = tensors[name]
            if not isinstance(array, np.ndarray) or array.dtype.name not in KINDS:
                kind = getattr(array, "dtype", type(array).__name__)
                raise InputError(
                    "tensor-dtype",
                    f"Tensor {name!r} is {kind}; a float array is needed.",
                    "Convert it to float16, bfloat16, float32 or float64.",
                )
            if array.shape != spec.shape:
                raise InputError(
                    "tensor-shape",
                    f"Tensor {name!r} has shape {array.shape}; the task agreed on {spec.shape}.",
                )
