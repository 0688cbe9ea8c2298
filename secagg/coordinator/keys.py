"""The desk where a session's silos hand each other the key that the coordinator never has.

It knows which epoch it is, how that epoch's key is named and who may have it; it keeps who asks for
it, and the boxes that silos with the key leave for them. It opens nothing and believes nobody:
requests and boxes are signed by silos for silos. What it is for is liveness alone.

    asked, no key yet ─▶ the first who asks makes it ─▶ announced ─▶ boxes ─▶ everybody has it
           ▲                                                                     │
           └── next epoch: a member left or came, 1,000 sums opened, nobody ◀────┘
               left who answers a request, or two silos say that a sum did
               not open, or that they need a newer key than this one

Only epochs and announcements are written down (``Session`` does). Requests and boxes live in
memory: whoever waits for a box asks again.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Final

from secagg.ckks.custody import KeyBox, KeyRequest
from secagg.config import SiloId
from secagg.errors import Conflict, FaultyClient, QuotaExceeded, StaleKey
from secagg.suite import SUMS_PER_KEY, KeyName

MAKE_SECONDS: Final = 120.0
"""How long a silo that was asked to make the key may take before the next one is asked."""
MAX_REQUESTS: Final = 1000
"""How often a silo may ask for the key of one epoch."""
VOICES: Final = 2
"""Silos that must say so before an epoch ends on their word: one that lies is not enough, and two
honest ones are among the survivors of every sum."""
_MOST_EPOCHS: Final = 1000
"""How far silos that are ahead may pull the session at once: its coordinator was set back."""


@dataclass(frozen=True, slots=True)
class Wish:
    """A request that waits for a box, and since when."""

    request: KeyRequest
    since: float


@dataclass(slots=True)
class KeyDesk:
    """Who has a session's key, who asks for it, and the boxes in between.

    Args:
        patience: seconds after which a request that nobody answers ends the epoch.

    Attributes:
        epoch: the current one, from 1.
        key: what its key is called, once it is announced.
        members: identity keys, by name, of those who may have that key.
        opened: sums released under it.
    """

    patience: float
    epoch: int = 1
    key: KeyName | None = None
    members: Mapping[SiloId, bytes] = field(default_factory=dict)
    opened: int = 0
    _maker: SiloId | None = None
    _maker_due: float = math.inf
    _asked: dict[SiloId, set[bytes]] = field(default_factory=dict)
    _wishes: dict[SiloId, Wish] = field(default_factory=dict)
    _boxes: dict[SiloId, KeyBox] = field(default_factory=dict)
    _spare: dict[SiloId, KeyBox] = field(default_factory=dict)
    _given: dict[SiloId, set[SiloId]] = field(default_factory=dict)
    _late: set[SiloId] = field(default_factory=set)
    _mute: set[SiloId] = field(default_factory=set)
    _made_by: SiloId | None = None
    _idle_since: float = math.inf
    _anyone: bool = False
    _ahead: dict[SiloId, int] = field(default_factory=dict)
    _failed: set[SiloId] = field(default_factory=set)
    _pull_next: float = -math.inf
    _news: bool = False

    # What silos say.

    def ask(self, request: KeyRequest, now: float) -> KeyBox | int | bool:
        """Answer a silo that has not got the key, or wants past ones.

        Returns:
            A box for this very request; the current epoch where the request is of another; True if
            this silo is to make the key; False if it has to wait.

        Raises:
            QuotaExceeded: it has asked too often in this epoch.

        Who waits looks again and again; then, too, an older request does not take the place of the
        same silo's newer one, whose box would be lost.
        """
        silo = request.silo
        if request.epoch != self.epoch:
            if request.epoch > self.epoch and self._ahead.get(silo) != request.epoch:
                self._ahead[silo] = request.epoch
                self._news = True
            return self.epoch
        if self.key is None:
            return self._is_maker(silo, now)
        box = self._boxes.get(silo)
        if box is not None and box.recipient_ephemeral == request.ephemeral:
            return box
        asked = self._asked.setdefault(silo, set())
        if request.ephemeral not in asked:
            if len(asked) >= MAX_REQUESTS:  # CHECK: key-requests-bound
                raise QuotaExceeded("key-requests", f"{silo} asked for this key too often.")
            asked.add(request.ephemeral)
            self._boxes.pop(silo, None)
            self._spare.pop(silo, None)
            self._wishes[silo] = Wish(request, now)
            self._news = True
        return False

    def _is_maker(self, silo: SiloId, now: float) -> bool:
        """Whether it is this silo's turn to make the key; who was late before goes after others."""
        behind = silo in self._late and not self._anyone
        if self._maker is None and not behind:
            self._maker, self._maker_due, self._idle_since = silo, now + MAKE_SECONDS, math.inf
        elif self._maker is None:
            self._idle_since = min(self._idle_since, now)
        return self._maker == silo

    def knows(self, request: KeyRequest) -> bool:
        """Whether this very request waits or was answered: who waits looks again and again."""
        asked = self._asked.get(request.silo, ())
        return request.epoch == self.epoch and request.ephemeral in asked

    def heard(self) -> bool:
        """Whether somebody has asked, or lost its turn, since the last time: others look again."""
        news, self._news = self._news, False
        return news

    def check_announcement(
        self, silo: SiloId, key: KeyName, members: Collection[str], present: Collection[str]
    ) -> bool:
        """Return whether a maker's announcement is new.

        Args:
            silo: who says so.
            key: what it made.
            members: who may have it.
            present: the session's silos that are in the manifest.

        Raises:
            StaleKey: the epoch is over.
            Conflict: another key was announced.
            FaultyClient: another silo was asked, or the members are not the session's.
        """
        if key.epoch != self.epoch:  # CHECK: announced-epoch
            raise _stale(self.key, self.epoch)
        if self.key is not None:
            if key != self.key:  # CHECK: announced-once
                raise Conflict(silo, "key-announced", "Another key of this epoch was announced.")
            return False
        if self._maker != silo:  # CHECK: announced-maker
            raise FaultyClient(silo, "key-maker", f"{silo} was not asked to make the key.")
        if set(members) != set(present):  # CHECK: announced-members
            raise FaultyClient(
                silo, "key-members", "The key was made for others than the session's silos."
            )
        return True

    def requests(self, silo: SiloId, key: KeyName) -> list[KeyRequest]:
        """Who else waits for a box.

        Raises:
            StaleKey: what this silo has is not the current key.
        """
        self.check(key)  # CHECK: key-requests-current
        return [wish.request for name, wish in self._wishes.items() if name != silo]

    def put(self, box: KeyBox) -> None:
        """Leave a box for the silo that asked for it; the first one counts.

        Who asks again could not use its box, or has lost what was in it: next time, another silo's
        box counts, until all have had their turn. Where those who have not are away, a second box
        of the others does in the end: asking often is no way to end an epoch.

        Raises:
            StaleKey: it is of another key than the current one.
        """
        self.check(KeyName(box.epoch, box.key_id))  # CHECK: key-box-current
        wish = self._wishes.get(box.recipient)
        if wish is None or wish.request.ephemeral != box.recipient_ephemeral:
            return
        given = self._given.setdefault(box.recipient, set())
        if given >= set(self.members) - {box.recipient}:
            given.clear()
        if box.sender in given:
            self._spare.setdefault(box.recipient, box)
            return
        given.add(box.sender)
        self._answer(box)

    def _answer(self, box: KeyBox) -> None:
        del self._wishes[box.recipient]
        self._boxes[box.recipient] = box

    def fails(
        self, silo: SiloId, key: KeyName, round_number: int, results: Collection[int]
    ) -> bool:
        """Return whether a report that a sum did not open ends the epoch.

        Args:
            silo: who says so.
            key: what it was to open with.
            round_number: whose sum.
            results: rounds released under that key.
        """
        if key != self.key or round_number not in results:
            return False
        self._failed.add(silo)
        if len(self._failed) < VOICES:
            return False
        self._pass_over()
        return True

    def check(self, key: KeyName | None) -> None:
        """Return if this is the current key.

        Raises:
            StaleKey: it is not.
        """
        if key is None or key != self.key:  # CHECK: key-current
            raise _stale(self.key, self.epoch)

    # What time and membership do.

    def worn(self, present: Mapping[SiloId, bytes], now: float) -> bool:
        """Whether the epoch is over: other members, enough sums, or nobody who answers.

        Args:
            present: identity keys, by name, of the session's silos that are in the manifest.
            now: by the driver's clock.
        """
        if self._maker is not None and (now >= self._maker_due or self._maker not in present):
            self._late.add(self._maker)  # another one's turn
            self._maker, self._maker_due, self._anyone = None, math.inf, False
            self._news = True
        if self._late and self._late >= set(present):
            self._late.clear()
            self._mute.clear()
            self._news = True
        if now >= self._idle_since + self.patience:
            self._idle_since, self._anyone, self._news = math.inf, True, True
        if self._pulled > self.epoch and now >= self._pull_next:
            self._pull_next = now + self.patience
            self._pass_over()
            return True
        if self.key is None:
            return False
        for name in [name for name in self._wishes if name not in present]:
            del self._wishes[name]
        if self.members != present or self.opened >= SUMS_PER_KEY:
            return True
        self._use_spare(now)
        unanswered = now >= self._impatient()
        if unanswered:
            self._pass_over()
        return unanswered

    def _pass_over(self) -> None:
        """Have the others go first with the next key: perhaps this one was of use to nobody."""
        if self._made_by is not None:
            self._mute.add(self._made_by)

    @property
    def following(self) -> int:
        """The epoch after this one."""
        return min(max(self.epoch + 1, self._pulled), self.epoch + _MOST_EPOCHS, 2**32 - 1)

    @property
    def _pulled(self) -> int:
        """The epoch that enough silos are at, or have reason to go to."""
        return sorted((0,) * VOICES + tuple(self._ahead.values()))[-VOICES]

    def _use_spare(self, now: float) -> None:
        """Answer late requests by silos that have answered before."""
        for name, wish in list(self._wishes.items()):
            late = now >= wish.since + self.patience
            if late and name in self._spare:
                self._given[name].clear()
                self._answer(self._spare.pop(name))
                self._news = True

    def due(self) -> float:
        """When ``worn`` has something to say at the latest."""
        pull = self._pull_next if self._pulled > self.epoch else math.inf
        return min(self._maker_due, self._impatient(), self._idle_since + self.patience, pull)

    def _impatient(self) -> float:
        return min((wish.since for wish in self._wishes.values()), default=math.inf) + self.patience

    # Facts.

    def note(self, epoch: int, key: KeyName | None, members: Mapping[SiloId, bytes]) -> None:
        """An epoch has begun (no key yet), or its key was announced."""
        if key is None:
            for kept in (self._asked, self._boxes, self._spare, self._wishes, self._given):
                kept.clear()
            self._ahead.clear()
            self._failed.clear()
            self._late, self._anyone = set(self._mute), False
        self._made_by = self._maker
        self.epoch, self.key, self.members, self.opened = epoch, key, members, 0
        self._maker, self._maker_due, self._idle_since = None, math.inf, math.inf


def _stale(key: KeyName | None, epoch: int) -> StaleKey:
    what = "has no key yet" if key is None else "has another key"
    return StaleKey(
        "key-stale",
        f"The session is in epoch {epoch} of its keys, which {what}.",
        "Ask for the newest one.",
    )
