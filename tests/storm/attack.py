"""The four attacks, each in a process of its own, all with the certificate of one enrolled silo."""

from __future__ import annotations

import threading
from typing import Any

from . import helper
from .connections import connections
from .half_open import half_open
from .line import Ready, Spec
from .resets import resets
from .slow import slow

PARTS = {"half-open": half_open, "resets": resets, "slow": slow, "connections": connections}


def work(spec: Spec, ready: Ready, stop: threading.Event) -> dict[str, Any]:
    """The part that the specification names."""
    return PARTS[spec["part"]](spec, ready, stop)


if __name__ == "__main__":
    helper.main(work)
