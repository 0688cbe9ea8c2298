"""What a silo keeps of its training, so that a restart costs time and nothing else.

Three kinds of safetensors files, under ``sessions/<session id>/<task>/`` of the silo's state:

- ``global``: the agreed weights and the global step's optimiser after a result;
- ``local-<position>``: the model in the midst of a round's local training;
- ``update-<position>``: the update that was submitted, before the coordinator hears of it.

The latter two belong to one position of the task (``transcript.position_of``) and are removed when
it is passed. Each file is replaced whole, says in its header what it is of, and carries a BLAKE3
digest keyed by this silo's identity: one that is damaged, another's or misplaced is no checkpoint.
It is named in the log and left alone, and everything replays from the agreed initial weights.

**These files hold in the clear what the silo trains**, its own update included. They stay in the
silo's own state directory, readable by its user alone (``LocalDisk``), and want the protection that
its training data have.
"""

from __future__ import annotations

import hmac
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt
from blake3 import blake3
from safetensors.numpy import load

from client_sdk.progress import log
from secagg.crypto.secret import Secret
from secagg.disk import Disk
from secagg.encoding.layout import Tensors
from secagg.errors import StorageBusy, StorageFailed

if TYPE_CHECKING:
    import torch

_FORMAT: Final = 1
_KEY: Final = "secagg"
_MARK: Final = f'"{_KEY}":"'.encode()
_BLANK: Final = "0" * 64
_LENGTH_BYTES: Final = 8

Save: TypeAlias = Callable[[dict[str, str]], bytes]
"""Makes a safetensors file with the given metadata."""
_SaveParts: TypeAlias = Callable[[dict[str, str]], Sequence[bytes | memoryview]]
"""The same in parts; the first one holds the header."""


class Kind(StrEnum):
    """What a checkpoint is of."""

    GLOBAL = "global"
    LOCAL = "local"
    UPDATE = "update"


@dataclass(frozen=True, slots=True)
class Found:
    """A checkpoint that is whole and this silo's.

    Args:
        about: what was noted with it.
        data: the safetensors file.
    """

    about: Mapping[str, Any]
    data: bytes


@dataclass(frozen=True, slots=True)
class Update:
    """What a silo submits.

    Args:
        tensors: float arrays by name.
        weight: its weight.
        metrics: its metrics.
        on_gpu: the same tensors where they lie, if some lie on a GPU. They are not kept.
    """

    tensors: Tensors
    weight: float
    metrics: Mapping[str, float]
    on_gpu: Mapping[str, torch.Tensor] | None = None


class Checkpoints:
    """The checkpoints of one session.

    Args:
        disk: the silo's state.
        session_id: which session.
        key: of the digests; this silo's own.
    """

    def __init__(self, disk: Disk, session_id: bytes, key: Secret) -> None:
        self._disk = disk
        self._root = f"sessions/{session_id.hex()}"
        self._key = key

    def keep_global(self, task: str, about: Mapping[str, Any], make: Save) -> None:
        """Keep the agreed weights; a disk that refuses costs a later restart time, and no more."""
        with _optional("kept"):
            self._write(self._name(task, Kind.GLOBAL), about, lambda metadata: [make(metadata)])

    def find_global(self, task: str) -> Found | None:
        """Return the newest agreed weights."""
        return self._read(self._name(task, Kind.GLOBAL))

    def keep_local(self, task: str, position: bytes, about: Mapping[str, Any], make: Save) -> None:
        """Keep a model in training.

        Raises:
            StorageFailed: the disk refuses.
        """
        name = self._name(task, Kind.LOCAL, position)
        self._write(name, about, lambda metadata: [make(metadata)])

    def find_local(self, task: str, position: bytes) -> Found | None:
        """Return the model in training at a position."""
        return self._read(self._name(task, Kind.LOCAL, position))

    def keep_update(self, task: str, position: bytes, update: Update) -> None:
        """Keep an update, to the bit.

        Raises:
            StorageFailed: the disk refuses.
        """
        arrays = {name: np.asarray(array) for name, array in update.tensors.items()}
        about = {
            "dtypes": {name: array.dtype.str for name, array in arrays.items()},
            "weight": float(update.weight).hex(),
            "metrics": {name: float(value).hex() for name, value in update.metrics.items()},
        }
        plain = {
            f"update/{name}": np.asarray(array, array.dtype.newbyteorder("<"), order="C")
            for name, array in arrays.items()
        }
        name = self._name(task, Kind.UPDATE, position)
        self._write(name, about, lambda metadata: _safetensors(plain, metadata))

    def find_update(self, task: str, position: bytes) -> Update | None:
        """Return the update that was kept for a position.

        Raises:
            StorageFailed, StorageBusy: the disk refuses; it may be there.
        """
        name = self._name(task, Kind.UPDATE, position)
        found = self._parsed(name, self._disk.read(name))
        if found is None:
            return None
        plain = load(found.data)
        return Update(
            {
                name: plain[f"update/{name}"].astype(dtype)
                for name, dtype in found.about["dtypes"].items()
            },
            float.fromhex(found.about["weight"]),
            {name: float.fromhex(value) for name, value in found.about["metrics"].items()},
        )

    def move_on(self, task: str, position: bytes) -> None:
        """Remove what was kept for other positions of a task than this one."""
        folder = f"{self._root}/{task}"
        stay = {
            self._name(task, Kind.GLOBAL),
            *(self._name(task, kind, position) for kind in (Kind.LOCAL, Kind.UPDATE)),
        }
        with _optional("removed"):
            for name in self._disk.names(folder):
                if name not in stay:
                    self._disk.remove(name)

    def _name(self, task: str, kind: Kind, position: bytes | None = None) -> str:
        of = "" if position is None else f"-{position.hex()}"
        return f"{self._root}/{task}/{kind}{of}.safetensors"

    def _write(self, name: str, about: Mapping[str, Any], make: _SaveParts) -> None:
        note = json.dumps({**about, "format": _FORMAT, "name": name}, sort_keys=True)
        head, *rest = [memoryview(part) for part in make({_KEY: _BLANK + note})]
        at = _digest_place(head)
        before, after = head[:at], [head[at + len(_BLANK) :], *rest]
        self._disk.replace(name, before, self._digest(before, *after).encode(), *after)

    def _read(self, name: str) -> Found | None:
        data = None
        with _optional("read"):
            data = self._disk.read(name)
        return self._parsed(name, data)

    def _parsed(self, name: str, data: bytes | None) -> Found | None:
        if data is None:
            return None
        try:
            return self._checked(name, data)
        except ValueError as error:
            log.warning("%s is no checkpoint of this silo and is not used: %s", name, error)
            return None

    def _checked(self, name: str, data: bytes) -> Found:
        view = memoryview(data)
        at = _digest_place(view)
        digest = self._digest(view[:at], view[at + len(_BLANK) :]).encode()
        if not hmac.compare_digest(data[at : at + len(_BLANK)], digest):  # CHECK: checkpoint-digest
            raise ValueError("it is damaged, or another silo's")
        header = json.loads(data[_LENGTH_BYTES : _header_end(data)])
        about = json.loads(header["__metadata__"][_KEY][len(_BLANK) :])
        if (about["format"], about["name"]) != (_FORMAT, name):  # CHECK: checkpoint-name
            raise ValueError("it is of another place or version")
        return Found(about, data)

    def _digest(self, *around: memoryview) -> str:
        """Digest of a file from what stands around its own, which is left blank."""
        hasher = blake3(key=self._key.reveal())
        before, *after = around
        for part in (before, memoryview(_BLANK.encode()), *after):
            hasher.update(part)
        return hasher.hexdigest()


def _safetensors(
    arrays: Mapping[str, npt.NDArray[Any]], metadata: Mapping[str, str]
) -> list[bytes | memoryview]:
    """A safetensors file in parts: what ``save`` gives, without its copies of every array.

    Source: https://github.com/huggingface/safetensors, section "Format".
    """
    entries: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name, array in arrays.items():
        begin, end = end, end + array.nbytes
        entries[name] = {
            "dtype": f"F{8 * array.itemsize}",
            "shape": list(array.shape),
            "data_offsets": [begin, end],
        }
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % _LENGTH_BYTES)
    length = len(header).to_bytes(_LENGTH_BYTES, "little")
    flat = (array.reshape(-1) for array in arrays.values() if array.size)
    return [length + header, *(array.view(np.uint8).data for array in flat)]


def _header_end(data: bytes | memoryview) -> int:
    """Where a safetensors file's header ends: after a length of 8 bytes and as many of JSON."""
    return _LENGTH_BYTES + int.from_bytes(data[:_LENGTH_BYTES], "little")


def _digest_place(data: memoryview) -> int:
    """Where in a file its digest stands: first in our metadata, which tensors' names cannot fake.

    Raises:
        ValueError: nowhere.
    """
    return bytes(data[: _header_end(data)]).index(_MARK, _LENGTH_BYTES) + len(_MARK)


@contextmanager
def _optional(what: str) -> Iterator[None]:
    """What a restart can do without: a disk that refuses is logged."""
    try:
        yield
    except (StorageBusy, StorageFailed) as error:
        log.warning("a checkpoint could not be %s: %s", what, error)
