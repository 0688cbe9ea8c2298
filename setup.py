"""The part of the build that pyproject.toml has no words for: one optional extension in C.

Where there is no compiler the package installs without it, and masks come from OpenSSL.
``SECAGG_CFLAGS`` adds flags (``make fuzz-native`` asks for AddressSanitizer);
``SECAGG_REQUIRE_KERNEL`` makes a build fail that cannot have it, for wheels that others install.
"""

import os
import sysconfig
from pathlib import Path

from setuptools import Extension, setup

NATIVE = Path("secagg/ring/_native")
STABLE = not sysconfig.get_config_var("Py_GIL_DISABLED")  # these have no stable ABI yet
FLAGS = [
    "-O3",
    "-std=gnu11",
    "-Wall",
    "-Wextra",
    "-fno-strict-aliasing",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=off",  # a fused operation rounds once where all other paths round twice
]

setup(
    ext_modules=[
        Extension(
            "secagg.ring._native.kernel",
            [str(NATIVE / name) for name in ("kernel.c", "cpu.c", "expand.c", "quantise.c")],
            depends=[str(path) for path in sorted(NATIVE.glob("*.h"))],
            extra_compile_args=[*FLAGS, *os.environ.get("SECAGG_CFLAGS", "").split()],
            extra_link_args=os.environ.get("SECAGG_CFLAGS", "").split(),
            define_macros=[("Py_LIMITED_API", "0x030B0000")] if STABLE else [],
            py_limited_api=STABLE,
            optional="SECAGG_REQUIRE_KERNEL" not in os.environ,
        )
    ],
    options={"bdist_wheel": {"py_limited_api": "cp311"}} if STABLE else {},
)
