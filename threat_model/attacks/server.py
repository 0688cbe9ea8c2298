"""A coordinator's process: ``secagg serve``, which an attack can weaken while it runs.

Reads weakenings from standard input, one a line, each in force until the next line; "null" ends
one. Nobody writes there where the process plays ours.

    python -m threat_model.attacks.server COORDINATOR.toml PORT_FILE [WEAKENING]
"""

from __future__ import annotations

import json
import os
import sys
import threading
from contextlib import ExitStack
from pathlib import Path

from secagg.coordinator.launch import launch
from threat_model.attacks.attack import Weakening


def follow() -> None:
    """Apply what standard input says; end the process with it."""
    held = ExitStack()
    for line in sys.stdin:
        held.close()
        word = json.loads(line)
        if word is not None:
            held.enter_context(Weakening.from_json(word).applied())
        print("done", flush=True)
    os._exit(0)


def main() -> None:
    """Serve."""
    config, port_file, *words = sys.argv[1:]
    with ExitStack() as held:
        for word in words:
            held.enter_context(Weakening.from_json(json.loads(word)).applied())
        threading.Thread(target=follow, daemon=True).start()
        launch(Path(config), Path(port_file))


if __name__ == "__main__":
    main()
