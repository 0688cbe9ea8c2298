"""Starting the coordinator's process: the one place that must run before grpc is imported."""

from __future__ import annotations

import asyncio
import ctypes
import os
import resource
import sys
from pathlib import Path
from typing import Final

CIPHER_SUITES: Final = "ECDHE-RSA-AES128-GCM-SHA256"
"""The one suite of TLS 1.2 on offer needs an RSA key, which our certificates never have: what is
left is TLS 1.3."""
_PR_SET_DUMPABLE: Final = 4
_M_ARENA_MAX: Final = -8
_ARENAS: Final = 2
"""Heaps of the C library: by default there are eight a core, and what gRPC's and our threads free
in one is of no use to another, so that memory grows in steps for hours."""


def _harden() -> None:
    """Leave no core file, which would hold revealed shares; take all descriptors, and few heaps."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform == "linux":  # a core that is piped to a handler knows no limit
        libc = ctypes.CDLL(None)
        libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)
        if hasattr(libc, "mallopt"):  # glibc
            libc.mallopt(_M_ARENA_MAX, _ARENAS)
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def launch(config: Path, port_file: Path | None) -> None:
    """Serve until SIGTERM or SIGINT.

    Args:
        config: ``coordinator.toml``.
        port_file: where to write the bound port once calls are served.

    Raises:
        ConfigError, CredentialError, StorageInUse, StorageDamaged: it cannot start.
    """
    os.environ["GRPC_SSL_CIPHER_SUITES"] = CIPHER_SUITES  # read when grpc is first imported
    _harden()
    from secagg.coordinator.server import configure_logging, serve
    from secagg.coordinator.settings import load_settings

    settings = load_settings(config)
    configure_logging(settings)

    def announce(port: int) -> None:
        if port_file is not None:
            temporary = port_file.with_suffix(".tmp")
            temporary.write_text(f"{port}\n")
            temporary.replace(port_file)

    with asyncio.Runner() as runner:
        if not runner.run(serve(settings, announce)):
            os._exit(0)  # nothing is left to save; the runner would wait for what hangs
