"""Every decoder of the product, and what it promises of any bytes.

A decoder gives a value or one of the errors that it documents, and nothing else. What it accepts
has one meaning: written again and read again, the value is equal and so are the bytes. ``make
fuzz`` looks for bytes that break this; ``make test`` replays those that were found interesting.
"""

from __future__ import annotations

from .file_targets import FILES
from .secret_targets import SECRETS
from .target import Target
from .wire_targets import WIRE

TARGETS: dict[str, Target] = WIRE | FILES | SECRETS
"""By name, which is a folder's in the corpus."""
