"""A silo's place in a session: what it joined, what was summed, and the secure all-reduce.

The k-th call of ``mean`` or ``sum`` for a task gives the k-th result of that task. A process that
starts again calls again from the top and gets the results that it missed or had, replayed from the
coordinator's signed sums, until it stands where the session stands; only then does it take part.
Every result moves the history on, and every round's keys depend on the history, so a coordinator
that replays other sums to different silos gets noise from the next round.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self, TypeVar

import numpy as np
import numpy.typing as npt

from client_sdk.attempt import Submission
from client_sdk.channel import POLL_SECONDS, Channel, chunks
from client_sdk.ledger import FileLedger
from client_sdk.profile import Profile, load_profile
from client_sdk.progress import Progress, log
from secagg.config import Policy, Weighting
from secagg.crypto.digest import vector_digest
from secagg.encoding.codec import Aggregate, Codec, Tensors
from secagg.encoding.schema import Schema
from secagg.errors import (
    ConfigError,
    FaultyServer,
    InputError,
    MalformedMessage,
    SessionEnded,
    StaleModel,
)
from secagg.masking import client, transcript
from secagg.masking.ledger import Opened
from secagg.masking.messages import Result
from secagg.pki.credentials import save_manifest
from secagg.pki.manifest import SignedManifest
from secagg.ring.vectors import Vector
from secagg.wire import attempt as wire
from secagg.wire import session as wire_session
from secagg.wire._pb import service_pb2 as api

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import torch

    from client_sdk.trainer import Round


P = TypeVar("P")


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a round gave.

    Args:
        round: its number in the session, from 1.
        tensors: float64 arrays by name: the mean by weight, or the sum of a sum task.
        weight: sum of the survivors' weights.
        metrics: mean by weight.
        clipped: elements that the survivors clipped.
        survivors: whose updates are in it, sorted.
        dropouts: silos of the cohort whose updates are not, sorted.
        included: whether this silo's update is in it.
    """

    round: int
    tensors: dict[str, npt.NDArray[np.float64]]
    weight: float
    metrics: dict[str, float]
    clipped: float
    survivors: tuple[str, ...]
    dropouts: tuple[str, ...]
    included: bool


@dataclass
class _Task:
    """A task that this silo has compared with its own."""

    codec: Codec
    opening: transcript.TaskOpening
    hash: bytes
    calls: int = 0


def join(name: str, *, profile: str | os.PathLike[str] | Profile | None = None) -> Session:
    """Join a session of the consortium.

    Args:
        name: the session's name, as its admin gave it.
        profile: the silo's profile or its directory; None looks in SECAGG_PROFILE, then in the
            default place.

    Raises:
        ConfigError, CredentialError: the profile cannot be used.
        CoordinatorUnreachable: nobody answers there.
        NotFound: there is no such session.
        PolicyRefused: the session is below this silo's floors.
        FaultyServer: what the coordinator says of the session cannot be.
    """
    loaded = profile if isinstance(profile, Profile) else load_profile(profile)
    return Session(name, loaded)


class Session:
    """A silo in a session; made by ``join``. Not for use by several threads at once."""

    def __init__(self, name: str, profile: Profile) -> None:
        credentials = profile.credentials
        if profile.policy is None or credentials.identity_key is None:
            raise ConfigError("profile-role", "This profile is not a silo's.")
        self.name = name
        self._profile = profile
        self._policy: Policy = profile.policy
        self._identity = credentials.identity_key
        self._tasks: dict[str, _Task] = {}
        self._signed: dict[str, wire_session.SignedOpening] = {}
        self._results: list[Result] = []
        self._export: Callable[[Path], None] | None = None
        self._open = True
        self._channel = Channel(profile)  # dials nobody yet; refused here, no ledger stays locked
        self._ledger = FileLedger(profile.state / "ledger.jsonl")
        try:
            self._member = self._join()
        except BaseException:
            self._release()
            raise
        self._history = transcript.first_history(self.session_hash)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Leave the session: no attempt waits for this silo any more. Twice is once."""
        if self._open:
            self._open = False
            self._leave()
            self._release()

    def _leave(self) -> None:
        leave = api.LeaveRequest(session_id=self._member.session_id)
        self._channel.once("Leave", leave, seconds=2.0)

    def _release(self) -> None:
        self._channel.close()
        self._ledger.close()

    @property
    def silo(self) -> str:
        """This silo's name."""
        return self._profile.credentials.identity.name

    @property
    def session_hash(self) -> bytes:
        """Hash of the session's parameters."""
        return transcript.session_hash(self._member.session)

    @property
    def _opening_transcript(self) -> bytes:
        return transcript.opening_transcript(self.session_hash, self._member.session_id)

    @property
    def rounds_done(self) -> int:
        """How many results of the session this silo knows."""
        return len(self._results)

    def mean(
        self,
        tensors: Tensors,
        weight: float = 1.0,
        *,
        metrics: Mapping[str, float] | None = None,
        task: str | None = None,
    ) -> dict[str, npt.NDArray[np.float64]]:
        """Return the mean by weight over the silos, this one's value in it unread by anybody.

        Args:
            tensors: float arrays by name; names and shapes alike at all silos.
            weight: 0 < weight ≤ the task's cap.
            metrics: the task's metrics.
            task: which task; needed where the session has several for means.

        Raises:
            InputError: what cannot be encoded, by name; nothing was sent.
            RoundAborted: as many attempts as the session allows failed; call again to go on.
            PolicyRefused, FaultyServer: this silo refused; nothing was revealed.
            SessionEnded: the session is over, or has released all rounds of the task.
        """
        name = self.only_task(Weighting.MEAN, task)
        return self.aggregate(name, tensors, weight=weight, metrics=metrics or {}).tensors

    def sum(
        self, tensors: Tensors, *, task: str | None = None
    ) -> dict[str, npt.NDArray[np.float64]]:
        """Return the sum over the silos.

        Args:
            tensors: float arrays by name; names and shapes alike at all silos.
            task: which task; needed where the session has several for sums.

        Raises:
            As ``mean``.
        """
        name = self.only_task(Weighting.SUM, task)
        return self.aggregate(name, tensors, weight=1.0, metrics={}).tensors

    def rounds(
        self,
        model: torch.nn.Module,
        *,
        task: str | None = None,
        optimizer: Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer] | None = None,
        shared: Callable[[str, torch.Tensor], bool] | None = None,
    ) -> Iterator[Round]:
        """Train a model together: yield each round with the agreed global weights in the model.

        Args:
            model: any torch module.
            task: which task; needed where the session has several for means.
            optimizer: makes the global step's optimiser from the shared parameters, alike at all
                silos; it is fed the mean delta as pseudo-gradient. The default, SGD with lr 1, is
                FedAvg; Adam is FedAdam.
            shared: which of the state's tensors are shared, by name and tensor; by default the
                parameters that require grad. Everything else stays home.

        Raises:
            As ``mean``; InputError ``task-schema`` or ``task-step`` where this silo's model or
            optimiser is not the session's.
        """
        from client_sdk.trainer import rounds  # torch is needed from here on

        return rounds(self, model, self.only_task(Weighting.MEAN, task), optimizer, shared)

    def export(self, path: str | os.PathLike[str]) -> None:
        """Write the model with the newest global weights as safetensors.

        Raises:
            ConfigError: no model is being trained in this session.
        """
        if self._export is None:
            raise ConfigError("export", "There is no model: call session.rounds(model) first.")
        self._export(Path(path))

    def task_rounds(self, task: str) -> int:
        """How many results of a task the session releases."""
        return self._member.session.task(task).rounds

    def on_export(self, write: Callable[[Path], None]) -> None:
        """Say how ``export`` writes the model."""
        self._export = write

    def only_task(self, weighting: Weighting, chosen: str | None = None) -> str:
        """Return the task that was chosen, or the session's one task of a weighting.

        Raises:
            ConfigError: the chosen one is of the other weighting; there is none, or several.
        """
        names = [t.name for t in self._member.session.tasks if t.weighting is weighting]
        if chosen in names:
            return chosen
        if chosen is not None:
            self._member.session.task(chosen)
        if chosen is not None or len(names) != 1:
            raise ConfigError(
                "task-choice",
                f"Session {self.name} has {len(names)} tasks of kind {weighting}: {names}.",
                "Name one with task=.",
            )
        return names[0]

    # The secure all-reduce.

    def aggregate(
        self, task: str, tensors: Tensors, *, weight: float, metrics: Mapping[str, float]
    ) -> Outcome:
        """Take part in the task's next round, or return the result that it has already.

        Raises:
            As ``mean``.
        """
        state = self.open_task(task, _schema_of(tensors))
        vector = state.codec.encode(tensors, weight=weight, metrics=metrics, entropy=os.urandom)
        missed = self.replay(task)
        if missed is not None:
            return missed

        first: list[Vector] = [vector]

        def encode() -> Vector:
            if first:
                return first.pop()
            return state.codec.encode(tensors, weight=weight, metrics=metrics, entropy=os.urandom)

        return self._submit(task, encode)

    def replay(self, task: str) -> Outcome | None:
        """Return the task's next result if the session has released it already."""
        self._sync()
        return self._next_outcome(task)

    def _next_outcome(self, task: str) -> Outcome | None:
        state = self._tasks[task]
        known = [result for result in self._results if result.task == task]
        if state.calls >= len(known):
            return None
        result = known[state.calls]
        outcome = self._outcome(state.codec, result)
        state.calls += 1
        return outcome

    def await_result(self, task: str) -> Outcome:
        """Sit a round out and return its result.

        Raises:
            SessionEnded: the session is over.
        """
        while (outcome := self.replay(task)) is None:
            request = api.NextRequest(
                session_id=self._member.session_id,
                round=len(self._results) + 1,
                attempt=2**32 - 1,
                seen=api.STEP_LEFT,
            )
            reply = self._channel.call("Next", request, api.NextReply, seconds=POLL_SECONDS)
            if reply.WhichOneof("event") == "ended":
                raise SessionEnded("session-over", reply.ended)
        return outcome

    def _submit(self, task: str, encode: Callable[[], Vector]) -> Outcome:
        state = self._tasks[task]
        if state.calls >= self.task_rounds(task):
            raise SessionEnded("task-done", f"Task {task} has released all its results.")
        with Progress(f"{self.name} {task} {state.calls + 1}") as progress:
            while (outcome := self._take_part(task, encode, progress)) is None:
                progress.say("another task's round came first")
        return outcome

    def _take_part(
        self, task: str, encode: Callable[[], Vector], progress: Progress
    ) -> Outcome | None:
        """Take part in the session's next round; None if its result was another task's."""
        stood = len(self._results)
        expected = client.Expected(task, stood + 1, self._base(self._tasks[task]))
        submission = Submission(
            self._channel,
            self._refresh,
            expected,
            self._ledger,
            encode,
            os.urandom,
            progress,
        )
        try:
            concluded = submission.run(self._member.session.max_attempts)
        except (StaleModel, SessionEnded):  # a round released meanwhile may be ours, too
            missed = self.replay(task)
            if missed is None and len(self._results) == stood:
                raise
            return missed
        except BaseException:  # Ctrl-C, too: no attempt is to wait for this silo
            self._leave()
            raise
        self._accept(concluded.result, concluded.state)
        return self._next_outcome(task)

    def _base(self, state: _Task) -> bytes:
        return transcript.base_of(self._history, state.hash)

    def _accept(self, result: Result, seen: client.Watched | None = None) -> None:
        """Check a signed result against this silo's history, and move the history on."""
        if result.task not in {task.name for task in self._member.session.tasks}:
            raise FaultyServer("result-task", "A result is of no task of the session.")
        if result.task not in self._tasks:
            self._adopt(result.task, self._fetch_opening(result.task))
        base = self._base(self._tasks[result.task])
        expected = client.Expected(result.task, len(self._results) + 1, base)
        tau4 = client.check_result(result, self._member, expected, seen)
        self._results.append(result)
        self._history = transcript.next_history(self._history, tau4)

    def _sync(self) -> None:
        while True:
            reply = self._channel.call(
                "ListResults",
                api.ListResultsRequest(
                    session_id=self._member.session_id, after=len(self._results)
                ),
                api.ListResultsReply,
            )
            for message in reply.results:
                self._accept(_parsed(functools.partial(wire.result_from_wire, message)))
            if not reply.results:
                return

    def _outcome(self, codec: Codec, result: Result) -> Outcome:
        data = self._download(
            api.Blob(sum=result.round), codec.length * codec.ring.word_bytes, result.vector_digest
        )
        total = codec.ring.unpack(data, codec.length)
        aggregate: Aggregate = _parsed(lambda: codec.decode(total))
        return Outcome(
            round=result.round,
            tensors=aggregate.tensors,
            weight=aggregate.weight,
            metrics=aggregate.metrics,
            clipped=aggregate.clipped,
            survivors=tuple(result.survivors),
            dropouts=tuple(sorted(set(result.cohort) - set(result.survivors))),
            included=self.silo in result.survivors,
        )

    def _download(self, blob: api.Blob, size: int, digest: bytes) -> bytearray:
        session = self._member.session
        data = bytearray(size)
        for offset in range(0, size, session.chunk_bytes):
            reply = self._channel.call(
                "GetChunk",
                api.GetChunkRequest(session_id=self._member.session_id, blob=blob, offset=offset),
                api.GetChunkReply,
            )
            if len(reply.data) != min(session.chunk_bytes, size - offset):
                raise FaultyServer("chunk-length", "The coordinator sent a chunk of a wrong size.")
            data[offset : offset + len(reply.data)] = reply.data
        if vector_digest(memoryview(data), session.chunk_bytes) != digest:
            raise FaultyServer(
                "result-digest",
                "The coordinator's data are not those that were signed.",
                "Nothing was applied.",
            )
        return data

    # Who we are, and what the session is.

    def _join(self) -> client.Member:
        reply = self._channel.call(
            "JoinSession", api.JoinSessionRequest(session=self.name), api.JoinSessionReply
        )
        credentials = self._profile.credentials
        offered = SignedManifest.from_json(reply.manifest)
        manifest = save_manifest(credentials.directory, offered).manifest
        config = _parsed(lambda: wire_session.config_from_wire(reply.config))
        if (config.name, config.consortium) != (self.name, credentials.identity.consortium):
            raise FaultyServer("session-name", "The coordinator answered with another session.")
        if self.silo not in config.silos:
            raise FaultyServer("session-member", "The session's list of silos is without this one.")
        self._policy.check_session(config)
        return client.Member(
            name=next(name for name in config.silos if name == self.silo),
            identity=self._identity,
            manifest=manifest,
            policy=self._policy,
            session=config,
            session_id=bytes(reply.session_id),
        )

    def _refresh(self) -> client.Member:
        """Take up a newer manifest; the session itself must be the one that was joined."""
        fresh, joined = self._join(), self._member
        if fresh.session_id != joined.session_id:
            raise FaultyServer(
                "session-replaced",
                f"Another session named {self.name} has taken this one's place.",
                "Join again if that is meant.",
            )
        if transcript.session_hash(fresh.session) != self.session_hash:
            raise FaultyServer("session-changed", "The session's parameters changed.")
        self._member = replace(joined, manifest=fresh.manifest)
        return self._member

    # Tasks.

    def open_task(
        self, name: str, schema: Schema, *, step: str | None = None, weights: bytes | None = None
    ) -> _Task:
        """Agree on a task: propose this silo's opening if asked, else compare with it.

        Args:
            name: the task.
            schema: this silo's tensors.
            step: how results change this silo's model, in words; None if it has no say.
            weights: this silo's initial weights, as a file.

        Raises:
            ConfigError: the session has no such task.
            InputError: this silo's tensors or step are not the session's.
        """
        session = self._member.session
        task = session.task(name)
        if name not in self._tasks:
            digest = transcript.NO_WEIGHTS
            if weights is not None:
                digest = vector_digest(weights, session.chunk_bytes)
            own = transcript.TaskOpening(name, schema, step or "", digest)
            Codec(task, schema, len(session.silos))
            self._adopt(name, self._agree(own, weights))
        known = self._tasks[name]
        _compare(known.opening, schema, step)
        return known

    def initial_weights(self, name: str) -> bytearray:
        """Download the agreed initial weights of an open task."""
        signed = self._signed[name]
        return self._download(
            api.Blob(weights=name), signed.weights_bytes, signed.opening.weights_digest
        )

    def _agree(
        self, own: transcript.TaskOpening, weights: bytes | None
    ) -> wire_session.SignedOpening:
        request = api.OpenTaskRequest(session_id=self._member.session_id, task=own.task)
        while True:
            reply = self._channel.call("OpenTask", request, api.OpenTaskReply, seconds=POLL_SECONDS)
            match reply.WhichOneof("answer"):
                case "opening":
                    return _opening(reply)
                case "propose":
                    self._propose(own, weights)

    def _propose(self, own: transcript.TaskOpening, weights: bytes | None) -> None:
        session_id = self._member.session_id
        data = memoryview(weights or b"")
        requests = (
            api.PutChunkRequest(
                session_id=session_id,
                blob=api.Blob(weights=own.task),
                offset=offset,
                total=len(data),
                data=chunk,
            )
            for offset, chunk in chunks(data, self._member.session.chunk_bytes)
        )
        self._channel.call_many("PutChunk", requests, api.Ack)
        signed = wire_session.SignedOpening.sign(
            own, len(data), self.silo, self._identity, self._opening_transcript
        )
        log.info("proposing task %s", own.task)
        proposal = api.ProposeTaskRequest(
            session_id=session_id, opening=wire_session.opening_to_wire(signed)
        )
        self._channel.call("ProposeTask", proposal, api.Ack)

    def _fetch_opening(self, name: str) -> wire_session.SignedOpening:
        request = api.OpenTaskRequest(session_id=self._member.session_id, task=name)
        reply = self._channel.call("OpenTask", request, api.OpenTaskReply, seconds=POLL_SECONDS)
        if reply.WhichOneof("answer") != "opening":
            raise FaultyServer("task-opening", "A task with results has no opening.")
        return _opening(reply)

    def _adopt(self, name: str, signed: wire_session.SignedOpening) -> None:
        """Check a proposer's signature under the manifest, and take the opening as the task's."""
        member, opening = self._member, signed.opening
        if opening.task != name:
            raise FaultyServer("task-opening", "The coordinator answered with another task.")
        key = next((k for n, k in member.manifest.silos.items() if n == signed.proposer), None)
        if key is None or signed.proposer not in member.session.silos:
            raise FaultyServer("task-proposer", "A task was opened by nobody of the session.")
        try:
            signed.verify(key, self._opening_transcript)
        except MalformedMessage:
            raise FaultyServer(
                "task-signature", f"The opening of task {opening.task} is not its proposer's."
            ) from None
        task = member.session.task(opening.task)
        codec = Codec(task, opening.schema, len(member.session.silos))
        task_hash = opening.digest(self.session_hash)
        self._ledger.record(Opened(member.session_id, opening.task, task_hash))
        self._tasks[opening.task] = _Task(codec, opening, task_hash)
        self._signed[opening.task] = signed


def _compare(agreed: transcript.TaskOpening, schema: Schema, step: str | None) -> None:
    ours, theirs = set(schema.tensors), set(agreed.schema.tensors)
    if ours != theirs:
        first = min(ours ^ theirs, key=lambda spec: spec.name)
        raise InputError(
            "task-schema",
            f"Tensor {first.name!r} of shape {first.shape} is not alike here and in task "
            f"{agreed.task} as it was opened.",
            "All silos train the same model; compare versions, or share fewer tensors.",
        )
    if step is not None and step != agreed.step:
        raise InputError(
            "task-step",
            f"This silo's global step is {step!r}; task {agreed.task} was opened with "
            f"{agreed.step!r}.",
            "Give all silos the same optimiser.",
        )


def _schema_of(tensors: Tensors) -> Schema:
    for name, array in tensors.items():
        if not isinstance(array, np.ndarray):
            raise InputError(
                "tensor-dtype",
                f"Tensor {name!r} is {type(array).__name__}; a NumPy array is needed.",
            )
    try:
        return Schema.of(tensors)
    except MalformedMessage as error:
        raise InputError(error.code, error.observed) from None


def _opening(reply: api.OpenTaskReply) -> wire_session.SignedOpening:
    return _parsed(lambda: wire_session.opening_from_wire(reply.opening))


def _parsed(parse: Callable[[], P]) -> P:
    try:
        return parse()
    except MalformedMessage as error:
        raise FaultyServer(error.code, error.observed, error.remedy) from None
