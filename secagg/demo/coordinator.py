"""The demo's coordinator process: ``secagg serve``, with a wiretap on one silo.

The product drops the vectors when the round has ended. To show what a curious coordinator could
have kept, this process copies every vector of one silo when it is complete, as it arrived.

    python -m secagg.demo.coordinator COORDINATOR.toml PORT_FILE TAP_DIRECTORY SILO
"""

from __future__ import annotations

import sys
from pathlib import Path

from secagg.coordinator.launch import launch


def tap(directory: Path, silo: str) -> None:
    """Copy every complete vector of a silo: ``ROUND-ATTEMPT-SILO``."""
    from secagg.coordinator.spool import Stored, Upload

    stored = Upload.stored

    def copy_then_store(upload: Upload) -> Stored:
        name = Path(upload.name).name
        if name.endswith(f"-{silo}"):
            (directory / name).write_bytes(upload.view())
        return stored(upload)

    Upload.stored = copy_then_store  # type: ignore[method-assign,assignment]


def main() -> None:
    """Serve with the tap on."""
    config, port_file, directory, silo = sys.argv[1:]
    tap(Path(directory), silo)
    launch(Path(config), Path(port_file))


if __name__ == "__main__":
    main()
