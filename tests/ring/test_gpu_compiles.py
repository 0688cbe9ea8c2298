"""The kernel compiles for an H100, which takes no GPU: Triton brings NVIDIA's assembler.

Compiled as ``launch`` launches it, with all its arguments and options, in a process of its own,
since Triton decides at import whether it interprets.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("triton")


def test_compiles_for_an_h100_and_fuses_no_product(tmp_path: Path) -> None:
    """A fused multiply-add rounds once instead of twice, so a GPU would encode other words."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env["TRITON_CACHE_DIR"] = str(tmp_path)
    out = subprocess.run([sys.executable, __file__], env=env, check=True, capture_output=True)
    found = json.loads(out.stdout)
    assert len(found) == 11
    assert sum(kernel["encodes"] for kernel in found) == 7
    for kernel in found:
        assert kernel["target"] == "sm_90a"
        assert not kernel["fused"]
        assert kernel["multiplies"] == kernel["encodes"]
        assert kernel["bytes"] > 0


def _main() -> None:
    import torch
    from triton.backends.compiler import GPUTarget
    from triton.runtime.driver import driver

    from secagg.crypto.secret import Secret
    from secagg.ring.expand import Mask
    from secagg.ring.gpu import kernels, launch
    from secagg.ring.vectors import PowerRing

    class H100:
        """As much of a driver as a compiler asks for."""

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", 90, 32)

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, _: int) -> int:
            return 0

    found: list[dict[str, Any]] = []
    kernel = kernels.mask_tiles

    class Compile:
        def __getitem__(self, grid: object) -> Any:
            return lambda *args, **options: note(kernel.warmup(*args, grid=grid, **options))

    def note(compiled: Any) -> None:
        ptx = compiled.asm["ptx"]
        found.append(
            {
                "target": ptx.split(".target ")[1].split()[0].rstrip(","),
                "fused": "fma.rn.f64" in ptx,
                "multiplies": "mul.rn.f64" in ptx,
                "encodes": "cvt.rmi.f64.f64" in ptx,
                "bytes": len(compiled.asm["cubin"]),
            }
        )

    driver.set_active(H100())
    kernels.mask_tiles = Compile()
    key, masks = Secret(bytes(32)), [Mask(Secret(bytes(32)), add=True)]
    words = {16: torch.int16, 32: torch.int32, 64: torch.int64}
    for bits, start in ((16, 0), (32, 0), (64, 0), (32, 2**33)):
        launch.apply_masks_on_device(torch.zeros(1, dtype=words[bits]), masks, start=start)
    float32 = (torch.float32,)
    updates = [
        (16, float32, 1.0),
        (32, launch.FLOATS, math.inf),
        (32, float32, 1.0),
        (64, float32, 1.0),
    ]
    for bits, dtypes, clip in updates:
        launch.encode_and_mask(
            [torch.zeros(1, dtype=dtype) for dtype in dtypes],
            ring=PowerRing(bits),
            factor=1.0,
            limit=1,
            clip=clip,
            rounding_key=key,
            masks=masks,
            length=4,
        )
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    _main()
