"""The demo's coordinator process: ``secagg serve``, with a wiretap on one silo.

The product drops a vector as soon as it is summed. To show what a curious coordinator could have
kept, this process copies every vector of one silo just before that, as it arrived.

    python -m secagg.demo.coordinator COORDINATOR.toml PORT_FILE TAP_DIRECTORY SILO
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from secagg.coordinator.launch import launch


def tap(directory: Path, silo: str) -> None:
    """Copy every complete vector of a silo before it is dropped: ``ROUND-ATTEMPT-SILO``."""
    from secagg.coordinator.spool import Upload

    discard = Upload.discard

    def copy_then_discard(upload: Upload) -> None:
        if upload.path.name.endswith(f"-{silo}") and upload.missing is None:
            shutil.copy(upload.path, directory / upload.path.name)
        discard(upload)

    Upload.discard = copy_then_discard  # type: ignore[method-assign,assignment]


def main() -> None:
    """Serve with the tap on."""
    config, port_file, directory, silo = sys.argv[1:]
    tap(Path(directory), silo)
    launch(Path(config), Path(port_file))


if __name__ == "__main__":
    main()
