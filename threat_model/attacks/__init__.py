"""Every promise of the threat model as a program: attacks on the shipped SDK and coordinator.

    python -m threat_model.attacks --all --json

``attack`` says what an attack is and how it is judged; ``stage`` has the processes, ``player`` and
``server`` run in them; ``evil_coordinator`` and ``attempt`` play against the SDK, ``evil_silo`` and
``sealed`` against the coordinator; ``certificates`` makes odd ones. The modules named ``on_…`` hold
the attacks; ``every`` imports them all.

================== ================================= ==============================================
module             who is attacked, by whom          what with
================== ================================= ==============================================
on_descriptor      SDK, by the coordinator           sessions and attempts that no silo should join
on_keys            SDK, by the coordinator           keys and shares, phases 1 to 3
on_survivors       SDK, by the coordinator           survivor sets that differ, phases 3 to 5
on_differencing    SDK, by the coordinator           two sums whose difference says too much
on_models          SDK, by the coordinator           models that differ, results that are false
on_randomness      SDK, by the coordinator           small key spaces, masks used twice
on_sealing         SDK, by coordinator and silos     the session's key, and what opened sums tell
on_metadata        SDK, by a curious coordinator     sizes, counts, fields and headers of calls
on_secrets         SDK and coordinator, by readers   disks, logs, messages and key files
on_certificates    coordinator, by strangers, silos  odd certificates that pass for a silo's
on_identity        both, by outsiders and impostors  who calls, on every call; who is called
on_transport       both, from the network            no TLS, older TLS, no certificate
on_senders         coordinator, by a silo            another's name in a message
on_phases          coordinator, by a silo            messages at the wrong time, keys that are none
on_shares          coordinator, by a silo            shares that do not open, or not to the secret
on_vectors         coordinator, by a silo            vectors that are not what was signed
on_openings        coordinator, by a silo            tasks, initial weights, names that become files
on_desk            coordinator, by a silo            the desk where the session's key is handed on
on_resources       coordinator, by a member          calls, bytes, disk, sessions, connections
on_accidents       both, by nobody                   restarts, damaged files, disks set back
================== ================================= ==============================================
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
