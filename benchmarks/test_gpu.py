"""Keystream on a GPU, added to a vector that lies there; for an H100 1,000 GB/s is the target.

The floor is a copy of the vector on the device: the least that one pass over its memory takes. The
first run, which compiles, does not count. Memory is the device's, above the vector.
"""

from __future__ import annotations

import os

import numpy as np
import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.measure import record, seconds_of
from secagg.config import MaskPrg
from secagg.crypto.secret import Secret
from secagg.ring.expand import Mask, apply_masks
from secagg.ring.vectors import PowerRing

torch = pytest.importorskip("torch")
pytest.importorskip("triton")
if not torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("needs a GPU", allow_module_level=True)

from secagg.ring.gpu.launch import apply_masks_on_device  # noqa: E402

MASKS, BYTES = 16, 2**30
CHECKED = 1000


def copy_seconds(words: torch.Tensor) -> float:
    """The least of several copies on the device."""
    other = torch.empty_like(words)

    def copy() -> None:
        other.copy_(words)
        torch.cuda.synchronize()

    copy()
    return min(seconds_of(copy) for _ in range(10))


@pytest.mark.benchmark(group="gpu keystream")
@pytest.mark.parametrize("bits", [16, 32, 64])
def test_apply_masks_on_device(benchmark: BenchmarkFixture, bits: int) -> None:
    ring, dtype = PowerRing(bits), {16: torch.int16, 32: torch.int32, 64: torch.int64}[bits]  # type: ignore[arg-type]
    length = BYTES // ring.word_bytes
    masks = [Mask(Secret(os.urandom(32)), add=i % 2 == 0) for i in range(MASKS)]
    words = torch.zeros(length, dtype=dtype, device="cuda")

    def mask() -> None:
        apply_masks_on_device(words, masks)
        torch.cuda.synchronize()

    floor = copy_seconds(words)
    mask()
    torch.cuda.reset_peak_memory_stats()
    benchmark.pedantic(mask, rounds=20)
    peak = torch.cuda.max_memory_allocated() - words.nbytes
    record(
        benchmark,
        floor="a copy on the device",
        floor_seconds=floor,
        elements=MASKS * length,
        peak_bytes=peak,
        device=torch.cuda.get_device_name(),
    )
    if benchmark.stats is not None:
        benchmark.extra_info["gigabytes_per_second"] = (
            MASKS * BYTES / benchmark.stats.stats.min / 1e9
        )
    words.zero_()
    mask()
    for start in (0, length // 2 + 1, length - CHECKED):  # a fast wrong mask fails
        expected = ring.zeros(CHECKED)
        apply_masks(ring, expected, masks, MaskPrg.CHACHA20, start=start)
        part = words[start : start + CHECKED].cpu().numpy().view(ring.dtype)
        assert np.array_equal(part, expected)
