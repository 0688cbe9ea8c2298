"""Where a session stands, and how each fact changes it.

A fact is what a record of the journal says: it is noted here when it happens (``session``) and when
it is read back (``retrace``), by the same code, so that both lead to the same standing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Final

from secagg.ckks.codec import codec_of
from secagg.config import SessionConfig, SiloId
from secagg.coordinator.journal import Journal
from secagg.coordinator.keys import KeyDesk
from secagg.coordinator.limits import Limits
from secagg.coordinator.spool import Blob, Holding, Stored, nothing_goes
from secagg.coordinator.state import Attempt, State, Task
from secagg.crypto.secret import Entropy
from secagg.crypto.sign import IdentityKey
from secagg.disk import Disk
from secagg.errors import RoundAborted
from secagg.masking import transcript
from secagg.masking.manifest import Manifest
from secagg.masking.messages import Descriptor, Result
from secagg.masking.server import Broadcast, Opening, ServerRound
from secagg.ring.vectors import Ring, ring_of
from secagg.suite import KeyName
from secagg.wire.session import SignedOpening

_NOBODY: Final[Mapping[SiloId, bytes]] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Means:
    """What every session of a coordinator works with.

    Args:
        manifest: gives the newest verified manifest.
        signed_manifest: the same as the authority signed it, for silos.
        identity: the coordinator's signing key.
        disk: the state directory.
        journal: of the same directory.
        entropy: source of nonces.
        limits: how much sessions may take.
        holdings: gives what all sessions keep on disk.
        free: forgets sessions that are over to free so many bytes; False if that is not enough.
        erase: removes the files of those that were forgotten, and waits until they are gone.
    """

    manifest: Callable[[], Manifest]
    signed_manifest: Callable[[], bytes]
    identity: IdentityKey
    disk: Disk
    journal: Journal
    entropy: Entropy
    limits: Limits = field(default_factory=Limits)
    holdings: Callable[[], Iterable[Holding]] = tuple
    free: Callable[[int], bool] = nothing_goes
    erase: Callable[[], None] = lambda: None


class Standing:
    """Where one session stands.

    Args:
        config: as the admin created it.
        session_id: 32 fresh bytes.
        means: what it works with.
        key: of the call that created it.
        creator: the admin who called; empty if nobody noted it.

    Attributes:
        results: signed results, by round; ``sums`` says what their blobs are, ``sum_bytes`` how
            large all of them are together.
        attempt: the one that runs.
        attempts: how many the round has had, the one that runs included.
        aborts: why those before it ended, by number.
        excluded: silos that are left out of the round's next attempts.
        ready_for: the task that a silo has an update for, by silo; the first since ``ready_since``.
        keys: where silos hand each other the key, if the session seals.
    """

    def __init__(
        self,
        config: SessionConfig,
        session_id: bytes,
        means: Means,
        key: bytes = b"",
        creator: str = "",
    ) -> None:
        self.config = config
        self.session_id = session_id
        self.session_hash = transcript.session_hash(config)
        self.key = key
        self.creator = creator
        self.means = means
        self.folder = f"sessions/{session_id.hex()}"
        self.state = State.ACTIVE
        self.history = transcript.first_history(self.session_hash)
        self.tasks: dict[str, Task] = {}
        self.results: list[Result] = []
        self.sums: list[Stored] = []
        self.sum_bytes = 0
        self.attempt: Attempt | None = None
        self.attempts = 0
        self.aborts: dict[int, RoundAborted] = {}
        self.last_abort: tuple[int, int, RoundAborted] | None = None
        self.excluded: set[SiloId] = set()
        self.ready_for: dict[SiloId, str] = {}
        self.ready_since = math.inf
        self.keys = KeyDesk(config.phase_deadline) if config.protection.seals else None

    @property
    def round(self) -> int:
        """Number of the current round."""
        return len(self.results) + 1

    @property
    def kept_bytes(self) -> int:
        """Of the sums and the tasks' initial weights, which stay until the session is forgotten."""
        tasks = list(self.tasks.values())
        return self.sum_bytes + sum(task.weights.size for task in tasks if task.weights)

    def vector_length(self, signed: SignedOpening) -> int:
        """Words of a task's vectors.

        Raises:
            ConfigError: the session has no such task.
        """
        opening = signed.opening
        return codec_of(self.config, opening.task, opening.schema).length

    def base(self, task: str) -> bytes:
        """What the next round of an open task starts from."""
        return transcript.base_of(self.history, self.tasks[task].hash)

    def opening(
        self,
        task: str,
        attempt: int,
        cohort: tuple[SiloId, ...],
        manifest: Manifest,
        key: KeyName | None,
    ) -> Opening:
        """What an attempt at the current round is opened with."""
        return Opening(
            session=self.config,
            session_id=self.session_id,
            manifest=manifest,
            task=task,
            round=self.round,
            attempt=attempt,
            base=self.base(task),
            cohort=cohort,
            length=self.tasks[task].length,
            key=key,
        )

    def released(self, task: str) -> int:
        """How many results a task has."""
        return sum(result.task == task for result in self.results)

    def ring(self, live: Attempt) -> Ring:
        """The ring of an attempt's vectors."""
        return ring_of(self.config, live.server.opening.task)

    def blob(self, name: str, stored: Stored) -> Blob:
        """A blob of this session's."""
        return Blob(self.means.disk, name, stored, self.config.chunk_bytes)

    def weights_name(self, task: str) -> str:
        """File of a task's initial weights."""
        return f"{self.folder}/weights/{task}.safetensors"

    def vector_name(self, live: Attempt, silo: SiloId) -> str:
        """File of a silo's vector in an attempt."""
        return f"{self.folder}/spool/{live.descriptor.round}-{live.number}-{silo}"

    def sum_name(self, round_number: int) -> str:
        """File of a round's sum."""
        return f"{self.folder}/sums/{round_number}"

    # Facts.

    def note_task(self, signed: SignedOpening, weights: Stored | None) -> None:
        """A task's opening is agreed."""
        opening, length = signed.opening, self.vector_length(signed)
        self.tasks[opening.task] = Task(signed, opening.digest(self.session_hash), length, weights)

    def note_key(
        self, epoch: int, key: KeyName | None, members: Mapping[SiloId, bytes] = _NOBODY
    ) -> None:
        """An epoch of keys has begun, or its key was announced; nobody is ready under another."""
        assert self.keys is not None
        self.keys.note(epoch, key, members)
        self.ready_for.clear()
        self.ready_since = math.inf

    def note_ready(self, silo: SiloId, task: str, now: float) -> None:
        """A silo has an update."""
        if not self.ready_for:
            self.ready_since = now
        self.ready_for[silo] = task

    def note_left(self, silo: SiloId) -> None:
        """A silo has none any more, and is out of the attempt."""
        self.ready_for.pop(silo, None)
        if self.attempt is not None:
            self.attempt.left.add(silo)

    def note_attempt(self, opening: Opening, descriptor: Descriptor, now: float) -> None:
        """An attempt is described."""
        server = ServerRound(opening, descriptor, self.means.identity)
        self.attempts = opening.attempt
        self.attempt = Attempt(opening.attempt, server, descriptor, self._phase_end(now))
        for silo in opening.cohort:
            self.ready_for.pop(silo, None)
        self.ready_since = now if self.ready_for else math.inf

    def _phase_end(self, now: float) -> float:
        return now + self.config.phase_deadline

    def note_broadcast(self, live: Attempt, broadcast: Broadcast, now: float) -> None:
        """A phase is closed with this broadcast."""
        live.broadcasts.append(broadcast)
        live.members.append(live.server.expected)
        live.deadline = self._phase_end(now)

    def note_result(self, result: Result, total: Stored) -> None:
        """A round has its result; the next one begins."""
        self.results.append(result)
        self.sums.append(total)
        self.sum_bytes += total.size
        tau4 = transcript.result_transcript(result.survivors_transcript, result.vector_digest)
        self.history = transcript.next_history(self.history, tau4)
        self.ready_for.clear()
        self.ready_since = math.inf
        self.attempts, self.aborts, self.excluded = 0, {}, set()
        if self.keys is not None and result.key == self.keys.key:
            self.keys.opened += 1

    def end_if_done(self) -> None:
        """End the session with its last result; from then on it may be forgotten at any time."""
        if all(self.released(task.name) >= task.rounds for task in self.config.tasks):
            self.state = State.DONE
