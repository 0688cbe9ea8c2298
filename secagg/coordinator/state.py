"""What a session is made of: its state in one word, its tasks, the attempt that runs."""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass, field
from enum import IntEnum, StrEnum
from typing import Final, TypeAlias, cast

from secagg.config import Phase, SiloId
from secagg.coordinator.spool import Stored, Upload
from secagg.errors import RoundAborted
from secagg.masking.messages import (
    Dealt,
    Descriptor,
    Result,
    Roster,
    Signatures,
    Survivors,
)
from secagg.masking.server import Broadcast, ServerRound
from secagg.wire.session import SignedOpening

PROPOSAL_SECONDS: Final = 120.0
"""How long a silo that was asked to propose a task may take before the next one is asked."""


class State(StrEnum):
    """Where a session stands."""

    ACTIVE = "active"
    DONE = "done"
    ABORTED = "aborted"


class Step(IntEnum):
    """The newest broadcast of an attempt that a silo has seen, as on the wire."""

    NOTHING = 0
    DESCRIPTOR = 1
    ROSTER = 2
    DEALT = 3
    SURVIVORS = 4
    SIGNATURES = 5
    LEFT = 6


STEPS: Final = frozenset(Step)


@dataclass(frozen=True, slots=True)
class Ended:
    """The session is over."""

    why: str


Event: TypeAlias = (
    Descriptor | Roster | Dealt | Survivors | Signatures | Result | RoundAborted | Ended
)


@dataclass
class Task:
    """A task once its opening is agreed.

    Args:
        signed: the proposer's opening.
        hash: the task's hash within the session.
        length: words of a vector.
        weights: the initial weights, if it has any.
    """

    signed: SignedOpening
    hash: bytes
    length: int
    weights: Stored | None


@dataclass
class Proposal:
    """A task that somebody was asked to propose."""

    proposer: SiloId
    deadline: float
    upload: Upload | None = None

    def discard(self) -> None:
        """Drop what was uploaded."""
        if self.upload is not None:
            self.upload.discard()
            self.upload = None


@dataclass
class Attempt:
    """One attempt: the core's round, and what the shell keeps beside it."""

    number: int
    server: ServerRound
    descriptor: Descriptor
    deadline: float
    broadcasts: list[Broadcast] = field(default_factory=list)
    members: list[tuple[SiloId, ...]] = field(default_factory=list)
    uploads: dict[SiloId, Upload] = field(default_factory=dict)
    left: set[SiloId] = field(default_factory=set)

    def complete(self, members: Set[SiloId]) -> bool:
        """Whether there is nobody left to wait for in the current phase.

        Args:
            members: who is in the newest manifest; nobody waits for the others.
        """
        return (set(self.server.expected) & members) <= self.server.arrived | self.left

    def event(self, silo: SiloId, seen: int) -> Event | None:
        """What this silo gets to see after it has seen a broadcast."""
        if seen == Step.NOTHING:
            return self.descriptor if silo in self.descriptor.cohort else None
        if seen == Step.SIGNATURES and self._unanswered(silo):
            seen = Step.SURVIVORS  # what it revealed was never written down: it is asked again
        for broadcast, members in zip(self.broadcasts, self.members, strict=True):
            if _step(broadcast) > seen:
                if silo not in members:
                    return None
                event = broadcast[silo] if isinstance(broadcast, Mapping) else broadcast
                return cast(Event, event)
        return None

    def _unanswered(self, silo: SiloId) -> bool:
        """Whether the coordinator lost what this silo revealed, in a restart."""
        server = self.server
        return (
            server.phase is Phase.UNMASKING
            and silo in server.expected
            and silo not in server.arrived | self.left
        )

    def close(self) -> None:
        """Receive no more chunks."""
        for upload in self.uploads.values():
            upload.close()
        self.uploads.clear()


def _step(broadcast: Broadcast) -> Step:
    match broadcast:
        case Roster():
            return Step.ROSTER
        case Survivors():
            return Step.SURVIVORS
        case Signatures():
            return Step.SIGNATURES
        case _:
            return Step.DEALT
