"""FedML's LightSecAgg, from the functions that it installs as ``fedml.core.mpc.lightsecagg``.

FedML pins NumPy 1 and protobuf 3, so it cannot share an environment with its dependencies; the
module needs none of them but NumPy and torch, and is loaded by its path in the installed package.

A client, as FedML's client manager does it: draws its mask (``np.random.randint``), encodes it for
the n − 1 others (``mask_encoding``), quantises (``transform_tensor_to_finite``), masks
(``model_masking``) and, asked by the server, adds up what it was given
(``compute_aggregate_encoded_mask``). FedML can do the encoding while it trains: it is reported
apart as well. The server, as FedML's aggregator does it: adds the vectors up in place (which is
quicker than the module's ``aggregate_models_in_finite``), puts the sums of encoded masks into an
array, rebuilds the sum of masks (``LCC_decoding_with_points``), takes it off, and
``transform_finite_to_tensor``. What one function returns is what the next is given: arrays of
encoded masks for the clients, lists of their sums for the server. How long it would take from
arrays is reported apart.

U = survivors and T = ⌊n / 2⌋ as FedML's managers set it; p = 2^15 − 19 with 10 bits after the
point, which makes its products fit 64 bits and its messages small. Bytes are those of ``pickle``,
which FedML's transports send: the masked vector, the encoded masks as lists, and the sum of masks.
"""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.peers import timed

PRIME = 2**15 - 19
POINT = 10


def load() -> Any:
    """The module of the installed package, without the package's own imports.

    Raises:
        ModuleNotFoundError: FedML is not installed.
    """
    package = find_spec("fedml")
    if package is None or not package.submodule_search_locations:
        raise ModuleNotFoundError("fedml")
    path = Path(package.submodule_search_locations[0], "core/mpc/lightsecagg.py")
    spec = spec_from_file_location("fedml_lightsecagg", path)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def name() -> str:
    """Peer and version, as reported."""
    return f"fedml {version('fedml')} LightSecAgg"


@dataclass
class Played:
    """What a round of theirs took, and gave.

    Args:
        mean: the survivors'.
        client_seconds: best of the survivors.
        encoding_seconds: of these, in the mask and its encoding.
        server_seconds: from the masked vectors to the mean.
        from_arrays_seconds: of these, without the lists.
        bytes_up: of one survivor.
    """

    mean: np.ndarray
    client_seconds: float
    encoding_seconds: float
    server_seconds: float
    from_arrays_seconds: float
    bytes_up: int


class Round:
    """A round of n clients, of which those in ``dropped``, never the first, send no vector."""

    def __init__(self, updates: list[np.ndarray], dropped: set[int]) -> None:
        self._their = load()
        self._updates = updates
        self._n = len(updates)
        self._survivors = [i for i in range(self._n) if i not in dropped]
        self._u, self._t = len(self._survivors), self._n // 2
        parts = self._u - self._t
        self._size = -(-len(updates[0]) // parts) * parts  # as FedML rounds it up

    def play(self) -> Played:
        """Play it."""
        encoding, masking, adding, reading, opening = [], [], [], [], []
        masked, encoded, sums = [], {}, []
        for client in self._survivors:
            seconds, (mask, encoded[client]) = timed(self._encode)
            encoding.append(seconds)
            seconds, vector = timed(partial(self._mask, self._updates[client], mask))
            masking.append(seconds)
            masked.append(vector)
        for holder in self._survivors:
            held = {client: shares[holder] for client, shares in encoded.items()}
            seconds, total = timed(partial(self._add, held))
            adding.append(seconds)
            sums.append(total)
        shares_up = sum(len(pickle.dumps(share.tolist())) for share in encoded[0][1:])
        encoded.clear()
        for _ in range(3):
            seconds, rows = timed(partial(self._rows, sums))
            reading.append(seconds)
            seconds, mean = timed(partial(self._open, masked, rows))
            opening.append(seconds)
        return Played(
            mean=mean,
            client_seconds=min(encoding) + min(masking) + min(adding),
            encoding_seconds=min(encoding),
            server_seconds=min(reading) + min(opening),
            from_arrays_seconds=min(opening),
            bytes_up=shares_up + len(pickle.dumps(masked[0])) + len(pickle.dumps(sums[0])),
        )

    def _encode(self) -> tuple[np.ndarray, np.ndarray]:
        mask = np.random.randint(PRIME, size=(self._size, 1))
        return mask, self._their.mask_encoding(self._size, self._n, self._u, self._t, PRIME, mask)

    def _mask(self, update: np.ndarray, mask: np.ndarray) -> dict[str, np.ndarray]:
        weights = self._their.transform_tensor_to_finite({"w": update}, PRIME, POINT)
        masked: dict[str, np.ndarray] = self._their.model_masking(
            weights, [len(update)], mask, PRIME
        )
        return masked

    def _add(self, held: dict[int, np.ndarray]) -> Any:
        return self._their.compute_aggregate_encoded_mask(held, PRIME, self._survivors)

    def _rows(self, sums: list[Any]) -> np.ndarray:
        rows = np.zeros((self._u, self._size // (self._u - self._t)), dtype="int64")
        for row, one in zip(rows, sums, strict=True):
            row[:] = one
        return rows

    def _open(self, masked: list[dict[str, np.ndarray]], encoded: np.ndarray) -> np.ndarray:
        points = np.array(self._survivors) + 1
        targets = np.arange(self._u) + self._n + 1
        mask = self._their.LCC_decoding_with_points(encoded, points, targets, PRIME).reshape(-1)
        total = masked[0]["w"].copy()
        for one in masked[1:]:
            total += one["w"]
        total -= mask[: len(total)]
        np.mod(total, PRIME, out=total)
        opened = self._their.transform_finite_to_tensor({"w": total}, PRIME, POINT)["w"]
        mean: np.ndarray = (opened / len(masked)).numpy()
        return mean
