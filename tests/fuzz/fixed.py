"""What targets are given besides bytes: the same in every process, since a corpus outlives them."""

from __future__ import annotations

from datetime import UTC, datetime

from secagg.ckks.keyring import HeldKey
from secagg.config import SiloId
from secagg.crypto.secret import Secret

CONSORTIUM = "hospitals"
NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)
SESSION_ID = bytes(range(32))
KEY = Secret(bytes(range(32, 64)))
HELD = HeldKey(SESSION_ID, 1, {SiloId("a"): bytes(32), SiloId("b"): b"\1" * 32}, KEY)
