"""The two files beside a member's keys that its operator edits: profile and policy.

Both are written once, when a bundle is installed, and never overwritten: from then on they are the
operator's. The policy spells every floor out, since a floor that nobody sees is one nobody chose.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from secagg.errors import ConfigError
from secagg.pki.files import write_public

PROFILE: Final = "profile.toml"
POLICY: Final = "policy.toml"
_HOST: Final = r"(?:[A-Za-z0-9](?:[A-Za-z0-9.-]{0,251}[A-Za-z0-9])?|\[[0-9A-Fa-f:.]{2,45}\])"
_ADDRESS: Final = re.compile(rf"{_HOST}:([1-9][0-9]{{0,4}})", re.ASCII)

_PROTECTIONS: Final = ("masked", "ckks+masked")

_PROFILE_TEXT: Final = """\
# Where the coordinator listens.
coordinator = "{coordinator}"
# Where this process keeps its ledger, relative to this file.
state = "state"
"""

_POLICY_TEXT: Final = """\
# This silo's own floors. A session or round below one of them is refused before a key is sent,
# whatever the coordinator or an admin says. Every key is required.

# How many silos may work with a malicious coordinator without learning another silo's update.
colluders = 1
# Fewest silos in a round, and fewest whose updates are in a sum.
min_cohort = 3
# Fewest silos that must help to open a sum; at least colluders + 2.
min_threshold = 3
# What must stand between this silo's update and the coordinator: "masked", "ckks+masked" or "ckks".
# Under "ckks" alone, any silo that works with the coordinator reads every update.
protections = [{protections}]
# Word sizes of masked sums that this silo takes part in, in bits.
ring_bits = [16, 32, 64]
# What may happen to a value beyond a task's bound: an error, or clipping by element or L2 norm.
clips = ["none", "element", "l2"]
# Greatest weight that a session may give one silo, hence its greatest lead over another.
max_weight_cap = 1000.0
# Names of sessions that this silo joins a second time, or goes on with although its state directory
# is older than they are; differences of sums may tell more.
repeat_sessions = []
# Where the keys of "ckks" sessions may be kept, relative to this file, so that a restart needs no
# other silo. Without it they live in memory alone.
# key_directory = "keys"
"""


def check_address(text: str) -> str:
    """Return ``text`` if it is HOST:PORT.

    Raises:
        ConfigError: ``coordinator-address``.
    """
    match = _ADDRESS.fullmatch(text)
    if match is None or int(match[1]) > 65535:
        raise ConfigError(
            "coordinator-address",
            f"{text!r} is not HOST:PORT.",
            "For example coordinator.example.org:8443 or [2001:db8::1]:8443.",
        )
    return text


def write_profile(directory: Path, coordinator: str) -> bool:
    """Write ``profile.toml`` if there is none.

    Returns:
        Whether it was written.

    Raises:
        ConfigError: ``coordinator-address``.
    """
    text = _PROFILE_TEXT.format(coordinator=check_address(coordinator))
    return _write_once(directory / PROFILE, text)


def write_policy(directory: Path, protections: Sequence[str] = _PROTECTIONS) -> bool:
    """Write ``policy.toml`` if there is none.

    Args:
        directory: the member's.
        protections: what must stand between its updates and the coordinator.

    Returns:
        Whether it was written.
    """
    quoted = ", ".join(f'"{name}"' for name in protections)
    return _write_once(directory / POLICY, _POLICY_TEXT.format(protections=quoted))


def _write_once(path: Path, text: str) -> bool:
    if os.path.lexists(path):
        return False
    write_public(path, text.encode())
    return True
