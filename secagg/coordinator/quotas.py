"""What each member may still ask for now: rates as token buckets, and calls in flight as a count.

Pure: time is passed in, and nothing is known of a call but whose it is. Bytes are taken off when
they have come or gone, so a member that is owed none may still end what it has begun; it runs into
debt by at most what it has in flight, and begins nothing before the debt has passed.

Source: token bucket, as in RFC 2697; the sizes are ``Limits``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

from secagg.coordinator.limits import Limits
from secagg.errors import QuotaExceeded, SecaggError
from secagg.pki.names import Identity

AT_ONCE_SECONDS: Final = 0.5
"""When to try again where a call of one's own has to end first."""
TELL_SECONDS: Final = 1.0
"""How often the log tells of a member's refusals: they must not cost more than what they refuse."""


class TryLater(QuotaExceeded):
    """A quota that time heals.

    Args:
        code, observed, remedy: as in ``SecaggError``.
        seconds: after which the same call may be served.
    """

    def __init__(self, code: str, observed: str, remedy: str, seconds: float) -> None:
        super().__init__(code, observed, remedy)
        self.seconds = seconds

    @property
    def milliseconds(self) -> int:
        """The time to wait, rounded up; at least 1."""
        return max(1, math.ceil(1000 * self.seconds))


class TooSlow(SecaggError):
    """A request did not arrive in the time that it may take."""


@dataclass(slots=True)
class Bucket:
    """Tokens that come back with time.

    Args:
        rate: tokens a second.
        size: the most that it holds.
        level: what it holds; below zero is debt.
        at: when that was true.
    """

    rate: float
    size: float
    level: float
    at: float

    def lacking(self, need: float, now: float) -> float:
        """Seconds until it holds ``need``; 0 if it does."""
        self.level = min(self.size, self.level + self.rate * max(0.0, now - self.at))
        self.at = max(self.at, now)
        return max(0.0, (need - self.level) / self.rate)

    def take(self, count: float) -> None:
        """Take tokens out, whether there are so many or not."""
        self.level -= count


@dataclass(slots=True)
class _Account:
    """One member's quotas.

    Args:
        calls: that it may begin.
        traffic: bytes that it may send and be sent.
        flying: its calls in flight.
        refused: since the log was told.
        told: when that was.
    """

    calls: Bucket
    traffic: Bucket
    flying: int = 0
    refused: int = 0
    told: float = -math.inf


class Quotas:
    """All members' quotas. There are as many accounts as members that the authority certified."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._accounts: dict[Identity | None, _Account] = {}

    def enter(self, member: Identity, now: float) -> None:
        """Count a call that begins; whoever enters leaves.

        Raises:
            TryLater: ``quota-calls-at-once``, ``quota-calls`` or ``quota-bytes``; nothing changed.
        """
        account, limits = self._account(member, now), self._limits
        if account.flying >= limits.calls_at_once:  # CHECK: quota-calls-at-once
            raise TryLater(
                "quota-calls-at-once",
                f"{member.name} has {account.flying} calls in flight.",
                f"At most {limits.calls_at_once} are served at once (calls_at_once).",
                AT_ONCE_SECONDS,
            )
        wait = account.calls.lacking(1, now)
        if wait > 0:  # CHECK: quota-calls
            raise TryLater(
                "quota-calls",
                f"{member.name} calls too often.",
                f"{limits.calls_per_second:g} calls a second are served (calls_per_second).",
                wait,
            )
        wait = account.traffic.lacking(0, now)
        if wait > 0:  # CHECK: quota-bytes
            raise TryLater(
                "quota-bytes",
                f"{member.name} sends and fetches too much.",
                f"{limits.bytes_per_second:g} bytes a second are served (bytes_per_second).",
                wait,
            )
        account.calls.take(1)
        account.flying += 1

    def leave(self, member: Identity) -> None:
        """A call has ended, its reply read to the end or given up."""
        self._accounts[member].flying -= 1

    def charge(self, member: Identity, size: int) -> None:
        """Take a message's bytes off, received or sent, of a call that is in flight."""
        self._accounts[member].traffic.take(size)

    def refusals(self, member: Identity | None, now: float) -> int:
        """Note a refusal; return how many there were since the log was told, 0 if not yet again.

        Args:
            member: who; None for all of whom it is not known.
            now: as in ``enter``.
        """
        account = self._account(member, now)
        account.refused += 1
        if now < account.told + TELL_SECONDS:
            return 0
        count, account.refused, account.told = account.refused, 0, now
        return count

    def _account(self, member: Identity | None, now: float) -> _Account:
        if member not in self._accounts:
            limits = self._limits
            self._accounts[member] = _Account(
                Bucket(limits.calls_per_second, limits.calls_burst, limits.calls_burst, now),
                Bucket(limits.bytes_per_second, limits.bytes_burst, limits.bytes_burst, now),
            )
        return self._accounts[member]
