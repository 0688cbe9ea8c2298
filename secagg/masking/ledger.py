"""What a silo must remember, and the rules that its memory serves.

Two sums over one base whose survivors differ by a few silos give away those few silos' updates by
subtraction. So **a silo opens one survivor set a base**: after a reveal, another attempt or session
on that base is signed only if its survivors, and this silo's own update, are the very same. The
same sum again gives the coordinator nothing new, so repeats are allowed without limit.

The design allowed a second set that differs in at least n_c + 2 silos. That is not enough, since
the rule binds each silo alone: five honest silos and the cohorts {a, x1, x2}, {a, y1, y2} and
{x1, x2, y1, y2} differ pairwise by three or more, each silo opens two, and the first two sums minus
the third are 2·a. With one set a silo, any combination of opened sums still leaves at least two
honest silos' updates mixed (four from cohorts of five up). Why, the proof's limits and the price (a
base whose opening failed half-way waits for the same silos to come back) are in
threat_model/decisions/0001.

``record`` is where the rules hold, atomically with the write, and it returns the ``Recorded`` that
the guarded step demands; it is durable *before* the message that the entry guards.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Generic, Protocol, TypeAlias, TypeVar

from secagg.config import SiloId
from secagg.errors import FaultyServer, PolicyRefused
from secagg.suite import KeyName


@dataclass(frozen=True, slots=True)
class Joined:
    """The silo is about to advertise keys in this attempt; it joins no attempt twice.

    With its first attempt at a position it is bound to its update there, though it may never reveal
    itself: t others can open a sum that this silo's update is in.

    Args:
        session: its name.
        session_id: which session of that name.
        round: the session's round.
        attempt: of the round.
        base: what the round starts from: which past the silo had lived by then.
        transcript: τ0.
        position: of the task (``client.Expected.position``).
        update: keyed digest of this silo's own update.
    """

    session: str
    session_id: bytes
    round: int
    attempt: int
    base: bytes
    transcript: bytes
    position: bytes = b""
    update: bytes = b""


@dataclass(frozen=True, slots=True)
class Revealed:
    """The silo is about to reveal shares that open the sum of these survivors on this base.

    Args:
        base: the position of the task that the sum is for (``client.Expected.position``).
        transcript: τ3.
        survivors: U3.
        update: keyed digest of this silo's own update in the sum.
    """

    base: bytes
    transcript: bytes
    survivors: tuple[SiloId, ...]
    update: bytes = b""


@dataclass(frozen=True, slots=True)
class Opened:
    """The silo took this opening for a session's task: schema, step and weights are fixed."""

    session_id: bytes
    task: str
    task_hash: bytes


@dataclass(frozen=True, slots=True)
class Keyed:
    """The silo took this key as the session's newest: it goes back to no older one."""

    session_id: bytes
    epoch: int
    key_id: bytes


Entry: TypeAlias = Joined | Revealed | Opened | Keyed
E = TypeVar("E", Joined, Revealed, Opened, Keyed)


@dataclass(frozen=True, slots=True)
class Recorded(Generic[E]):
    """Evidence that an entry is durable. Only a ledger makes it."""

    entry: E


class Ledger(Protocol):
    """A silo's memory across attempts, sessions and restarts."""

    def record(self, entry: E) -> Recorded[E]:
        """Check an entry against what is there, store it durably, return the evidence.

        Raises:
            FaultyServer: an attempt that is not newer than one already joined, another opening of a
                task than was taken before, or a key of an older epoch, or another one of the same.
            PolicyRefused: a reveal of other survivors on a base than were revealed before, or
                another update than an attempt at the position was joined with.
        """
        ...

    def last_attempt(self, session_id: bytes) -> tuple[int, int]:
        """Return the highest (round, attempt) joined in a session; (0, 0) for none."""
        ...

    def last_joined(self, session_id: bytes) -> Joined | None:
        """Return the newest attempt joined in a session, if there was one."""
        ...

    def update_at(self, position: bytes) -> bytes | None:
        """Return the update that this silo is bound to at a position of a task, if it is."""
        ...

    def session_ids(self, name: str) -> frozenset[bytes]:
        """Return the sessions of this name in which an attempt was joined."""
        ...

    def revealed(self, base: bytes) -> Revealed | None:
        """Return the reveal on a base, if there was one."""
        ...

    def openings(self, session_id: bytes) -> Mapping[str, bytes]:
        """Return the hashes of the openings that were taken in a session, by task."""
        ...

    def newest_key(self, session_id: bytes) -> KeyName | None:
        """Return the newest key that was taken in a session, if there was one."""
        ...


class MemoryLedger:
    """A ledger that lasts as long as its process: for simulation, and under a durable one."""

    def __init__(self) -> None:
        self._joined: dict[bytes, Joined] = {}
        self._updates: dict[bytes, bytes] = {}
        self._sessions: dict[str, frozenset[bytes]] = {}
        self._revealed: dict[bytes, Revealed] = {}
        self._openings: dict[bytes, dict[str, bytes]] = {}
        self._keys: dict[bytes, KeyName] = {}

    def record(self, entry: E) -> Recorded[E]:
        """Check an entry against what is there, and store it."""
        self.check(entry)  # CHECK: ledger-entry
        match entry:
            case Joined():
                self._joined[entry.session_id] = entry
                self._updates.setdefault(entry.position or entry.base, entry.update)
                ids = self.session_ids(entry.session) | {entry.session_id}
                self._sessions[entry.session] = ids
            case Revealed():
                self._revealed[entry.base] = entry
            case Opened():
                self._openings.setdefault(entry.session_id, {})[entry.task] = entry.task_hash
            case _:
                self._keys[entry.session_id] = KeyName(entry.epoch, entry.key_id)
        return Recorded(entry)

    def check(self, entry: Entry) -> None:
        """Return if an entry may be stored (see ``Ledger.record``)."""
        match entry:
            case Joined():
                # CHECK: ledger-replay
                if (entry.round, entry.attempt) <= self.last_attempt(entry.session_id):
                    raise FaultyServer(
                        "descriptor-replay",
                        "The attempt is not newer than one already joined.",
                    )
                # CHECK: ledger-joined-update
                check_update(self.update_at(entry.position or entry.base), entry.update)
            case Revealed():
                past = self.revealed(entry.base)
                check_differencing(past, entry.survivors)  # CHECK: ledger-differencing
                # CHECK: ledger-revealed-update
                check_update(past.update if past else None, entry.update)
            case Keyed():
                newest = self.newest_key(entry.session_id)
                same = newest == KeyName(entry.epoch, entry.key_id)
                # CHECK: ledger-key-epoch
                if newest is not None and entry.epoch <= newest.epoch and not same:
                    raise FaultyServer(
                        "key-epoch",
                        f"A key of epoch {entry.epoch} would replace the one of {newest.epoch}.",
                        "It was not taken.",
                    )
            case _:
                known = self.openings(entry.session_id).get(entry.task, entry.task_hash)
                if known != entry.task_hash:  # CHECK: ledger-task
                    raise FaultyServer(
                        "task-replaced",
                        f"Task {entry.task} was opened with other tensors or weights before.",
                        "Nothing was sent. A new training needs a new session.",
                    )

    def last_attempt(self, session_id: bytes) -> tuple[int, int]:
        """Return the highest (round, attempt) joined in a session; (0, 0) for none."""
        newest = self._joined.get(session_id)
        return (newest.round, newest.attempt) if newest else (0, 0)

    def last_joined(self, session_id: bytes) -> Joined | None:
        """Return the newest attempt joined in a session, if there was one."""
        return self._joined.get(session_id)

    def update_at(self, position: bytes) -> bytes | None:
        """Return the update that this silo is bound to at a position of a task, if it is."""
        return self._updates.get(position)

    def session_ids(self, name: str) -> frozenset[bytes]:
        """Return the sessions of this name in which an attempt was joined."""
        return self._sessions.get(name, frozenset())

    def revealed(self, base: bytes) -> Revealed | None:
        """Return the reveal on a base, if there was one."""
        return self._revealed.get(base)

    def openings(self, session_id: bytes) -> Mapping[str, bytes]:
        """Return the hashes of the openings that were taken in a session, by task."""
        return self._openings.get(session_id, {})

    def newest_key(self, session_id: bytes) -> KeyName | None:
        """Return the newest key that was taken in a session, if there was one."""
        return self._keys.get(session_id)


def check_differencing(past: Revealed | None, survivors: tuple[SiloId, ...]) -> None:
    """Return if a sum over these survivors may be opened after that reveal on the same base.

    Raises:
        PolicyRefused: other survivors were opened: the difference of the two sums would show few
            silos' updates.
    """
    if past is not None and past.survivors != survivors:  # CHECK: differencing
        raise PolicyRefused(
            "differencing",
            "A sum on this base was already opened with other survivors; "
            "the difference of the two would show few silos' updates.",
            "Bring the same silos back, or train on a new base.",
        )


def check_update(bound: bytes | None, update: bytes) -> None:
    """Return if this update may be in a sum where this silo is bound to one.

    Raises:
        PolicyRefused: it is bound to another: the difference of two sums would show what changed.
    """
    if bound is not None and bound != update:  # CHECK: differencing-update
        raise PolicyRefused(
            "differencing-update",
            "Another update of this silo was submitted on this base before, and a sum with it may "
            "have been opened; the difference of the two would show what changed.",
            "Submit the very same update again, or use a session with other parameters.",
        )
