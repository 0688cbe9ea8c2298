"""Checkpoints that silos hand each other where the key of past sums is gone.

A silo that cannot open past sums, since everybody who had their key has lost it, wishes for the
weights that they led to, of several silos after the same results, so that it need not believe one.
A silo that has them seals its checkpoint under the session's newest key and uploads it; here it is
bytes, read by nobody and believed by nobody, kept by task and sender under a name of its own.

    wish, polled ─▶ told to who can help ─▶ uploads ─▶ offers ─▶ enough of them: all are named
      └── not polled for a minute, and no chunk fetched: gone, and with the last of a task its files

None of it is written down: after a restart whoever waits asks again.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Final

from secagg.config import SiloId
from secagg.coordinator.spool import Holding, Stored, Upload
from secagg.crypto.secret import Entropy
from secagg.disk import Disk
from secagg.errors import FaultyClient, NotFound, QuotaExceeded, TooLate
from secagg.wire.custody import SignedCheckpoint

WISH_SECONDS: Final = 60.0
"""How long a wish lives after its silo was last heard of; it polls every 25 s."""
STALL_SECONDS: Final = 120.0
"""How long an upload may bring no chunk."""
SHOW_SECONDS: Final = 30.0
"""How soon a silo that did not help is told of the same wish again."""
_NAME_BYTES: Final = 16


@dataclass(frozen=True, slots=True)
class Wish:
    """What one silo wants of a task.

    Args:
        results: how many it can do without help.
        need: how many silos' checkpoints it wants, after the same results, which are more.
        refused: silos whose checkpoints are no use to it.
    """

    results: int
    need: int
    refused: frozenset[SiloId]

    def joined(self, other: Wish) -> Wish:
        """The greater one of both in every way."""
        results, need = max(self.results, other.results), max(self.need, other.need)
        return Wish(results, need, self.refused | other.refused)


@dataclass(slots=True)
class _Waiting:
    """A silo that waits.

    Args:
        wish: its newest one.
        most: all that it has wished for. Only what is beyond that is news, which is a bounded
            number of times, so that nobody is kept busy by one who goes back and forth.
        until: when it is forgotten.
        shown: when others were last told of it.
    """

    wish: Wish
    most: Wish
    until: float
    shown: dict[SiloId, float]


@dataclass(frozen=True, slots=True)
class Offer:
    """A checkpoint that is here."""

    checkpoint: SignedCheckpoint
    name: str
    stored: Stored


@dataclass(slots=True)
class _Incoming:
    """A checkpoint that is being uploaded, and when its silo has stalled."""

    digest: bytes
    upload: Upload
    due: float


class Bridges:
    """Who wants checkpoints, and those that were uploaded.

    Args:
        disk: the state directory.
        folder: of this session's checkpoints in it.
        chunk_bytes: the session's size of a chunk.
        entropy: for files' names, of which there are never two.
        erase: called before an upload takes its room on the disk.
    """

    def __init__(
        self,
        disk: Disk,
        folder: str,
        chunk_bytes: int,
        entropy: Entropy,
        erase: Callable[[], None],
    ) -> None:
        self._disk = disk
        self._folder = folder
        self._chunk_bytes = chunk_bytes
        self._entropy = entropy
        self._erase = erase
        self._waiting: dict[tuple[SiloId, str], _Waiting] = {}
        self._offers: dict[tuple[SiloId, str], Offer] = {}
        self._uploads: dict[tuple[SiloId, str], _Incoming] = {}
        self._news = False

    # Who wants what.

    def ask(self, silo: SiloId, task: str, wish: Wish, now: float) -> list[SignedCheckpoint]:
        """Return all checkpoints that go beyond a wish, or none while they are not enough."""
        before = self._waiting.get((silo, task))
        most = wish if before is None else wish.joined(before.most)
        shown = {} if before is None or most != before.most else before.shown
        self._waiting[silo, task] = _Waiting(wish, most, now + WISH_SECONDS, shown)
        if self._met(silo, task, wish):
            found = [offer.checkpoint for offer in self._answers(silo, task, wish)]
            return sorted(found, key=lambda checkpoint: (checkpoint.results, checkpoint.sender))
        self._news |= before is None or most != before.most
        return []

    def _answers(self, silo: SiloId, task: str, wish: Wish) -> list[Offer]:
        return [
            offer
            for (sender, of), offer in self._offers.items()
            if of == task
            and sender not in wish.refused | {silo}
            and offer.checkpoint.results > wish.results
        ]

    def _met(self, silo: SiloId, task: str, wish: Wish) -> bool:
        after = Counter(offer.checkpoint.results for offer in self._answers(silo, task, wish))
        return max(after.values(), default=0) >= wish.need

    def _open(self, helper: SiloId, task: str) -> list[tuple[_Waiting, int]]:
        """Wishes of others that a silo could still serve, and what it has to go beyond.

        It can if it has offered nothing that serves, or less than others have, who went on.
        """
        own = self._offers.get((helper, task))
        has = 0 if own is None else own.checkpoint.results
        found = []
        for (silo, of), waiting in self._waiting.items():
            wish = waiting.wish
            if of != task or helper in wish.refused | {silo} or self._met(silo, task, wish):
                continue
            answers = self._answers(silo, task, wish)
            newest = max((offer.checkpoint.results for offer in answers), default=math.inf)
            if has <= wish.results or has < newest:
                found.append((waiting, max(has, wish.results)))
        return found

    def wanted(self, silo: SiloId, now: float) -> list[tuple[str, int]]:
        """Tasks that others want checkpoints of, and the results that they have to go beyond.

        A wish is told once, and again after ``SHOW_SECONDS``: who cannot help is not kept from
        waiting by it, and whose upload failed, or who has got further meanwhile, hears of it.
        """
        found: dict[str, int] = {}
        for task in {task for _, task in self._waiting}:
            for waiting, beyond in self._open(silo, task):
                if now >= waiting.shown.get(silo, -math.inf) + SHOW_SECONDS:
                    waiting.shown[silo] = now
                    found[task] = min(found.get(task, beyond), beyond)
        return sorted(found.items())

    def heard(self) -> bool:
        """Whether somebody has asked for something new since the last look."""
        news, self._news = self._news, False
        return news

    # What comes.

    def upload(self, silo: SiloId, task: str, digest: bytes, total: int, now: float) -> Upload:
        """Return where a silo's checkpoint goes; another one of its own is given up.

        Raises:
            TooLate: nobody waits for it (any more).
            QuotaExceeded: enough others are on their way.
        """
        served = self._open(silo, task)
        if not served:  # CHECK: checkpoint-wanted
            raise TooLate("checkpoint-unwanted", f"Nobody waits for a checkpoint of task {task}.")
        if self.begins(silo, task, digest, total):
            others = sum(of == task and name != silo for name, of in self._uploads)
            # CHECK: checkpoint-uploads-bound
            if others >= 2 * max(waiting.wish.need for waiting, _ in served):
                raise QuotaExceeded("checkpoint-uploads", f"Enough bring one of task {task}.")
            self._drop_upload(silo, task)
            name = f"{self._folder}/{self._entropy(_NAME_BYTES).hex()}"
            upload = Upload(self._disk, name, total, self._chunk_bytes, before=self._erase)
            self._uploads[silo, task] = _Incoming(digest, upload, math.inf)
        incoming = self._uploads[silo, task]
        incoming.due = now + STALL_SECONDS
        return incoming.upload

    def begins(self, silo: SiloId, task: str, digest: bytes, total: int) -> bool:
        """Whether ``upload`` would begin another one, beside all that ``holdings`` tells of."""
        incoming = self._uploads.get((silo, task))
        return incoming is None or (incoming.digest, incoming.upload.total) != (digest, total)

    def holdings(self) -> Iterator[Holding]:
        """What is kept on disk; callable while another thread is in here."""
        for (silo, _), incoming in list(self._uploads.items()):
            yield Holding(silo, incoming.upload.total, True)
        for (silo, _), offer in list(self._offers.items()):
            yield Holding(silo, offer.stored.size)

    def put(self, silo: SiloId, checkpoint: SignedCheckpoint) -> None:
        """Take a complete upload as a silo's checkpoint of a task.

        Raises:
            TooLate: nobody waits for it (any more), or it goes no further than they can.
            FaultyClient: it is not complete, or not what was signed.
        """
        task = checkpoint.task
        # CHECK: checkpoint-still-wanted
        if not any(beyond < checkpoint.results for _, beyond in self._open(silo, task)):
            raise TooLate("checkpoint-unwanted", f"Nobody waits for this one of task {task}.")
        incoming = self._uploads.get((silo, task))
        # CHECK: checkpoint-uploaded
        if incoming is None or incoming.upload.total != checkpoint.size:
            raise FaultyClient(silo, "chunk-gap", "The checkpoint is not complete.")
        upload = incoming.upload
        with upload.committing() as stored:
            if stored is None:  # CHECK: checkpoint-complete
                raise FaultyClient(silo, "chunk-gap", "The checkpoint is not complete.")
            if stored.digest != checkpoint.digest:  # CHECK: checkpoint-upload-digest
                raise FaultyClient(silo, "checkpoint-digest", "The checkpoint is not as signed.")
        del self._uploads[silo, task]
        self._drop_offer(silo, task)
        self._offers[silo, task] = Offer(checkpoint, upload.name, stored)
        self._drop_losers()

    def fetch(self, silo: SiloId, task: str, sender: SiloId, digest: bytes, now: float) -> Offer:
        """A checkpoint that somebody wants to have; who fetches it still waits.

        Raises:
            NotFound: it is not there any more.
        """
        waiting = self._waiting.get((silo, task))
        if waiting is not None:
            waiting.until = now + WISH_SECONDS
        offer = self._offers.get((sender, task))
        if offer is None or offer.checkpoint.digest != digest:  # CHECK: checkpoint-known
            raise gone()
        return offer

    # What goes.

    def expire(self, now: float, present: Collection[SiloId]) -> None:
        """Forget who asks no more, who stalls, and who is not in the session any more."""
        for key in [k for k, w in self._waiting.items() if now >= w.until or k[0] not in present]:
            del self._waiting[key]
        for key in [k for k, u in self._uploads.items() if now >= u.due or k[0] not in present]:
            self._drop_upload(*key)
        wanted = {task for _, task in self._waiting}
        for silo, task in list(self._offers):
            if task not in wanted or silo not in present:
                self._drop_offer(silo, task)
        self._drop_losers()

    def due(self) -> float:
        """When ``expire`` has something to do at the latest."""
        wishes = min((waiting.until for waiting in self._waiting.values()), default=math.inf)
        return min(wishes, min((up.due for up in self._uploads.values()), default=math.inf))

    def clear(self) -> None:
        """Forget everything: the session is over."""
        self._waiting.clear()
        self.expire(math.inf, ())

    def _drop_losers(self) -> None:
        """Give up the uploads that serve nobody any more."""
        for silo, task in list(self._uploads):
            if not self._open(silo, task):
                self._drop_upload(silo, task)

    def _drop_upload(self, silo: SiloId, task: str) -> None:
        incoming = self._uploads.pop((silo, task), None)
        if incoming is not None:
            incoming.upload.discard()

    def _drop_offer(self, silo: SiloId, task: str) -> None:
        offer = self._offers.pop((silo, task), None)
        if offer is not None:
            self._disk.remove(offer.name)


def gone() -> NotFound:
    """A checkpoint is not there any more: replaced by its sender, or wanted by nobody."""
    return NotFound("checkpoint-unknown", "There is no such checkpoint (any more).", "Ask again.")
