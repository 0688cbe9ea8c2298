"""Bytes that must not be printed, compared in variable time, copied into a pickle or a log."""

from __future__ import annotations

import hmac
from collections.abc import Callable
from typing import NoReturn, TypeAlias

Entropy: TypeAlias = Callable[[int], bytes]
"""A source of uniform bytes: ``os.urandom`` in the shells, a keyed stream in simulation."""


class Secret:
    """Secret bytes: redacted repr, constant-time equality, no hash, no pickling.

    ``reveal()`` is the one way to the bytes: search for it to see every use. Python cannot wipe
    memory, so a ``Secret`` limits accidents, not an attacker who reads this process.
    """

    __slots__ = ("_value",)

    def __init__(self, value: bytes) -> None:
        self._value = bytes(value)

    def reveal(self) -> bytes:
        """Return the bytes. Never log, send or store what this returns, but sealed."""
        return self._value

    def __len__(self) -> int:
        return len(self._value)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Secret):
            return NotImplemented
        return hmac.compare_digest(self._value, other._value)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"Secret(<{len(self._value)} bytes>)"

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise TypeError("a Secret is never pickled or copied")  # CHECK: secret-pickled
