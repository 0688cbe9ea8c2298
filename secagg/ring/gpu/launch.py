"""Runs the kernel: masks words on a GPU, or encodes and masks an update and brings it to the host.

The device holds keys of masks and rounding bits while the kernel runs; the tensors they were in are
zeroed. Words of an update reach its memory only masked.

What a device cannot do raises ``DeviceFailed``, and nothing has left it then. The host path gives
the same words from the same keys, so the caller goes on there with keys meant for one use.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Final

import torch

from secagg.config import MaskPrg
from secagg.crypto.prg import block_bytes, key_bytes
from secagg.crypto.secret import Secret
from secagg.errors import SecaggError
from secagg.ring.expand import Mask
from secagg.ring.vectors import PowerRing, Ring, Vector

FLOATS: Final = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_WORDS: Final = {2: torch.int16, 4: torch.int32, 8: torch.int64}
_PRG: Final = MaskPrg.CHACHA20
_STREAM_BYTES: Final = 2**32 * block_bytes(_PRG)
_ROUNDING_BYTES: Final = 4
_BLOCKS: Final = 128
_WARPS: Final = 4  # one block of keystream to a thread
_OLDEST: Final = (8, 0)


class DeviceFailed(SecaggError):
    """The device could not do it, and nothing has left it: the host path can."""


def obstacle(pieces: Sequence[torch.Tensor], ring: Ring, prg: MaskPrg) -> str | None:
    """Say why an update is left to the host; None where the device can take it.

    Args:
        pieces: the update's tensors.
        ring: the ring of the task's vectors.
        prg: the session's generator of masks.
    """
    devices = {piece.device for piece in pieces}
    alike = len(devices) == 1 and all(device.type == "cuda" for device in devices)
    floats = all(piece.dtype in FLOATS and piece.layout is torch.strided for piece in pieces)
    reasons = {
        f"masks are {prg}, not {_PRG}": prg is not _PRG,
        "the ring is no power of two": not isinstance(ring, PowerRing),
        "the tensors do not all lie on one GPU": not alike,
        "a tensor is no dense array of floats": not floats,
        "Triton is not installed": importlib.util.find_spec("triton") is None,
        "the GPU is older than Triton supports": alike and _is_old(*devices),
    }
    return next((reason for reason, applies in reasons.items() if applies), None)


def _is_old(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) < _OLDEST


def encode_and_mask(
    pieces: Sequence[torch.Tensor],
    *,
    ring: PowerRing,
    factor: float,
    limit: int,
    clip: float,
    rounding_key: Secret,
    masks: Sequence[Mask],
    length: int,
) -> tuple[Vector, int]:
    """Encode an update as ``secagg.encoding.fixed`` does, mask it, and bring it to the host.

    Args:
        pieces: the update's tensors in the layout's order, floats of any size on one device,
            finite, and within the bound where nothing clips.
        ring: the task's ring.
        factor: what makes a word of a value, before it is rounded.
        limit: 2^f; no word is beyond it.
        clip: magnitude that elements are cut to before; infinity for none.
        rounding_key: 32 fresh bytes for the rounding bits' own ChaCha20 stream.
        masks: 32-byte keys, each for one stream.
        length: words of the vector, at least as many as the pieces have elements.

    Returns:
        The vector, whose words after the pieces' are zero, neither encoded nor masked; and how many
        elements were clipped. Rounding word i belongs to element i.

    Raises:
        DeviceFailed: see above.
        OverflowError: ChaCha20's counter ends before the vector does.
    """
    size = sum(piece.numel() for piece in pieces)
    if size > length or any(piece.dtype not in FLOATS for piece in pieces):
        raise ValueError("an update is floats, no more than the vector has words")
    if size == 0:
        return ring.zeros(length), 0
    _check_end(size * max(ring.word_bytes, _ROUNDING_BYTES))
    device = pieces[0].device
    with _on(pieces[0]), _words_of([*(mask.key for mask in masks), rounding_key], device) as keys:
        words = torch.empty(size, dtype=_WORDS[ring.word_bytes], device=device)
        reals = torch.tensor([factor, limit, clip], dtype=torch.float64, device=device)
        clipped = torch.zeros(1, dtype=torch.int64, device=device)
        signs, first = _signs(masks, device), 0
        for piece in pieces:
            values = piece.detach().reshape(-1)
            update = (values, keys[-1], reals, clipped)
            part = words[first : first + len(values)]
            _launch(part, first, keys, signs, update, clips=math.isfinite(clip))
            first += len(values)
        return _to_host(words, ring, length), int(clipped)


def apply_masks_on_device(words: torch.Tensor, masks: Sequence[Mask], *, start: int = 0) -> None:
    """Add the masks to words of a ring Z_{2^w} in place, as ``expand.apply_masks`` does.

    Args:
        words: int16, int32 or int64, one-dimensional and contiguous; coordinates
            start … start + len − 1 of a longer vector.
        masks: 32-byte keys, each for one stream.
        start: the first coordinate.

    Raises:
        DeviceFailed: see above.
        OverflowError: ChaCha20's counter ends before the words do.
    """
    if words.dtype not in _WORDS.values() or words.dim() != 1 or not words.is_contiguous():
        raise ValueError("masks go onto a contiguous vector of signed words")
    _check_end((start + len(words)) * words.element_size())
    if not masks or not len(words):
        return
    with _on(words), _words_of([mask.key for mask in masks], words.device) as keys:
        _launch(words, start, keys, _signs(masks, words.device))


def _launch(
    words: torch.Tensor,
    first: int,
    keys: torch.Tensor,
    signs: torch.Tensor,
    update: tuple[torch.Tensor, ...] | None = None,
    *,
    clips: bool = False,
) -> None:
    from secagg.ring.gpu.kernels import mask_tiles

    tile = _BLOCKS * block_bytes(_PRG) // words.element_size()
    if not len(words):
        return
    values, rounding, reals, clipped = update or (None, None, None, None)
    mask_tiles[((first + len(words) - 1) // tile - first // tile + 1,)](
        words,
        values,
        first,
        len(words),
        keys,
        signs,
        len(signs),
        rounding,
        reals,
        clipped,
        bits=8 * words.element_size(),
        encode=update is not None,
        clip=clips,
        blocks=_BLOCKS,
        num_warps=_WARPS,
        enable_fp_fusion=False,
    )


def _check_end(size: int) -> None:
    if size > _STREAM_BYTES:
        raise OverflowError("a ChaCha20 stream ends after 2^32 blocks")


def _signs(masks: Sequence[Mask], device: torch.device) -> torch.Tensor:
    signs = [1 if mask.add else -1 for mask in masks]
    return torch.tensor(signs, dtype=torch.int32, device=device)


@contextmanager
def _words_of(keys: Sequence[Secret], device: torch.device) -> Iterator[torch.Tensor]:
    """Lay keys on the device, (keys, 8) int32, and zero them afterwards."""
    if any(len(key) != key_bytes(_PRG) for key in keys):
        raise ValueError("a key of ChaCha20 has 32 bytes")
    host = bytearray(b"".join(key.reveal() for key in keys))
    words = torch.frombuffer(host, dtype=torch.int32).reshape(len(keys), -1)
    rows = torch.empty_like(words, device=device)
    try:
        rows.copy_(words)
        yield rows
    finally:
        words.zero_()
        rows.zero_()


def _to_host(words: torch.Tensor, ring: PowerRing, length: int) -> Vector:
    host = torch.empty(length, dtype=words.dtype, pin_memory=words.is_cuda)
    host[: len(words)].copy_(words)
    host[len(words) :].zero_()
    vector: Vector = host.numpy().view(ring.dtype)
    return vector


@contextmanager
def _on(tensor: torch.Tensor) -> Iterator[None]:
    """Run on a tensor's device; what the device cannot do is ``DeviceFailed``.

    Torch, Triton, its compiler and its driver fail in ways of their own, a bare ``assert`` among
    them. Whatever it was, the host can do the work.
    """
    try:
        with torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext():
            yield
    except torch.cuda.OutOfMemoryError as error:
        raise DeviceFailed("gpu-memory", "The GPU has no memory left for the update.") from error
    except (ValueError, OverflowError):  # the caller's
        raise
    except Exception as error:
        raise DeviceFailed(
            "gpu-failed", f"The GPU did not take the update: {type(error).__name__}."
        ) from error
