"""Every promise of the threat model as a program: attacks on the shipped SDK and coordinator.

    python -m threat_model.attacks --all --json

``attack`` says what an attack is and how it is judged; ``stage`` has the processes, ``player`` and
``server`` run in them; ``evil_coordinator`` and ``attempt`` play against the SDK, ``evil_silo`` and
``sealed`` against the coordinator; ``certificates`` makes odd ones. The modules named ``on_…`` hold
the attacks; ``every`` imports them all.
"""

from __future__ import annotations

from typing import Any

__all__ = ["ATTACKS"]


def __getattr__(name: str) -> Any:
    """All attacks, imported when they are asked for: ``every`` says why."""
    if name == "ATTACKS":
        from threat_model.attacks.every import ATTACKS

        return ATTACKS
    raise AttributeError(name)
