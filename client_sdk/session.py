"""A silo's place in a session: what it joined, what was summed, and the secure all-reduce.

The k-th call of ``mean`` or ``sum`` for a task gives the k-th result of that task. A process that
starts again calls again from the top and gets the results that it missed or had, replayed from the
coordinator's signed sums, until it stands where the session stands; only then does it take part.
Models go on from a checkpoint instead (``client_sdk.checkpoint``), and an update that was submitted
is submitted again as it was.
Every result moves the history on, and every round's keys depend on the history, so a coordinator
that replays other sums to different silos gets noise from the next round.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import numpy.typing as npt
from blake3 import blake3

from client_sdk.attempt import Submission
from client_sdk.bridge import Bridge, Bridged, Judge, M
from client_sdk.channel import POLL_SECONDS, Channel
from client_sdk.checkpoint import Checkpoints, Found, Save, Update
from client_sdk.keys import Keeper, Keys
from client_sdk.ledger import FileLedger
from client_sdk.membership import Membership
from client_sdk.past import Past
from client_sdk.profile import Profile, load_profile
from client_sdk.progress import Progress, log
from client_sdk.tasks import Task, Tasks, own_opening
from client_sdk.transfer import download
from secagg.ckks.codec import SealedCodec
from secagg.ckks.engine import require
from secagg.ckks.keyring import HeldKey
from secagg.config import Weighting
from secagg.crypto.kdf import derive
from secagg.crypto.labels import CHECKPOINT, UPDATE, enc, u64
from secagg.crypto.secret import Entropy, Secret
from secagg.disk import Disk, LocalDisk
from secagg.encoding.codec import Codec
from secagg.encoding.layout import Aggregate, Tensors
from secagg.encoding.schema import Schema
from secagg.errors import (
    ConfigError,
    InputError,
    MalformedMessage,
    PoisonedResult,
    SessionEnded,
    StaleKey,
    StaleModel,
    StorageInUse,
)
from secagg.masking import client
from secagg.masking.ledger import check_update
from secagg.masking.messages import SEED_BYTES, Result
from secagg.ring.expand import Encoded, masked
from secagg.ring.vectors import Vector
from secagg.wire._pb import service_pb2 as api

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import torch

    from client_sdk.trainer import Round


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


def join(name: str, *, profile: str | os.PathLike[str] | Profile | None = None) -> Session:
    """Join a session of the consortium.

    Args:
        name: the session's name, as its admin gave it.
        profile: the silo's profile or its directory; None looks in SECAGG_PROFILE, then in the
            default place.

    Raises:
        ConfigError, CredentialError: the profile cannot be used, or another process uses it.
        StorageFailed: the state directory cannot be read or written.
        CoordinatorUnreachable: nobody answers there.
        NotFound: there is no such session.
        PolicyRefused: the session is below this silo's floors.
        FaultyServer: what the coordinator says of the session cannot be.
    """
    loaded = profile if isinstance(profile, Profile) else load_profile(profile)
    return Session(name, loaded)


class Session:
    """A silo in a session; made by ``join``. Not for use by several threads at once.

    Args:
        name: the session's name.
        profile: the silo's.
        channel: to the coordinator, closed with the session; None makes one from the profile.
        disk: the silo's state; None locks and uses the profile's.
        entropy: source of keys, seeds and rounding.

    Raises:
        As ``join``.
    """

    def __init__(
        self,
        name: str,
        profile: Profile,
        *,
        channel: Channel | None = None,
        disk: Disk | None = None,
        entropy: Entropy = os.urandom,
    ) -> None:
        self.name = name
        self._profile = profile
        self._entropy = entropy
        self._export: Callable[[Path], None] | None = None
        self._open = True
        self._keeper: Keeper | None = None
        self._channel = Channel(profile) if channel is None else channel  # dials nobody yet
        with ExitStack() as held:
            held.callback(self._channel.close)  # here, too: the state may be somebody else's
            kept = _own_disk(profile.state, held) if disk is None else disk
            held.callback(self._join_keeper)
            held.callback(self._channel.close)  # ends what the keeper waits for
            self._ledger = FileLedger(kept)
            self._membership = Membership(name, profile, self._channel, self._ledger)
            self._keys = self._open_keys(held)
            self._tasks = Tasks(self._membership, self._channel, self._ledger, self._keys, kept)
            self._past = Past(self._membership, self._channel, self._tasks, self._ledger)
            session_id = self._membership.member.session_id
            self._checkpoints = Checkpoints(kept, session_id, self._derive(CHECKPOINT))
            self._bridge = self._open_bridge(held, guard=channel is None)
            self._held = held.pop_all()

    def _open_bridge(self, held: ExitStack, *, guard: bool) -> Bridge | None:
        """Help others to the key and over gaps, in a thread, unless who gave the channel does."""
        if self._keys is None:
            return None
        bridge = Bridge(self._keys, self._membership, self._channel, self._checkpoints, self._past)
        if guard:
            self._keeper = Keeper(self._keys, bridge.offer)
            held.callback(self._keeper.close)
        return bridge

    def _join_keeper(self) -> None:
        if self._keeper is not None:
            self._keeper.join()

    def _open_keys(self, held: ExitStack) -> Keys | None:
        """This silo's part in the custody of the session's key, if the session seals."""
        member = self._membership.member
        suite, directory = member.session.suite, member.policy.key_directory
        log.info("%s: updates are protected by %s", self.name, member.session.protection)
        if suite is None:
            return None
        require()
        if not member.session.protection.masks:
            log.warning(
                "%s: updates are encrypted and not masked: any silo that works with the "
                "coordinator reads every update. This silo's policy allows it.",
                self.name,
            )
        disk = None if directory is None else LocalDisk(self._profile.directory / directory)
        keys = Keys(suite, self._membership, self._channel, self._ledger, disk, self._entropy)
        held.callback(keys.close)
        return keys

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
            with self._held:
                self._leave()

    def _leave(self) -> None:
        leave = api.LeaveRequest(session_id=self._membership.member.session_id)
        self._channel.once("Leave", leave, seconds=2.0)

    @property
    def silo(self) -> str:
        """This silo's name."""
        return self._profile.credentials.identity.name

    @property
    def rounds_done(self) -> int:
        """How many results of the session this silo knows."""
        return len(self._past.results)

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
            tensors: float arrays by name; names and shapes alike at all silos. They are read until
                this returns: nobody may change them meanwhile.
            weight: 0 < weight ≤ the task's cap.
            metrics: the task's metrics.
            task: which task; needed where the session has several for means.

        Raises:
            InputError: what cannot be encoded, by name; nothing was sent.
            PoisonedResult: the sum is of something else than updates; the next call goes on.
            RoundAborted: as many attempts as the session allows failed; call again to go on.
            PolicyRefused, FaultyServer: this silo refused; nothing was revealed.
            ConfigError: ``ledger-rolled-back``: the silo's state is older than the session;
                ``key-gone``: where the session seals, nobody has the key of a past result that
                this call is to give; only ``rounds`` can go on without it.
            FaultyClient, FaultyClientOrServer: where the session seals, nobody gave its key who
                could be believed; nothing was sent.
            StorageFailed: the silo's disk refuses; nothing was sent that it guards.
            SessionEnded: the session is over, or has released all rounds of the task.
        """
        name = self.only_task(Weighting.MEAN, task)
        return self.aggregate(name, tensors, weight=weight, metrics=metrics or {}).tensors

    def sum(
        self, tensors: Tensors, *, task: str | None = None
    ) -> dict[str, npt.NDArray[np.float64]]:
        """Return the sum over the silos.

        Args:
            tensors: as for ``mean``.
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

        After a restart it goes on where it was: from the newest global weights, with the update
        that was submitted, or in the midst of local training (``Round.checkpoint``). Tensors that
        are not shared are kept by ``Round.checkpoint`` alone, and for its round.

        Args:
            model: any torch module.
            task: which task; needed where the session has several for means.
            optimizer: makes the global step's optimiser from the shared parameters, alike at all
                silos; it is fed the mean delta as pseudo-gradient. The default, SGD with lr 1, is
                FedAvg; Adam is FedAdam.
            shared: which of the state's tensors are shared, by name and tensor; by default the
                parameters that require grad. Everything else stays home.

        Raises:
            As ``mean``, but for ``key-gone``: this silo then goes on from a checkpoint that n_c + 1
                others agree on, and fails with ``key-gone`` only where so many offer none within
                some ten minutes.
            InputError: ``task-schema``, ``task-step``: this silo's model or optimiser is not the
                session's; ``checkpoint-model``: nor is it the other silos'.
            FaultyClient: ``checkpoint-content``: too few are left without this one, whose
                checkpoint is none.
            FaultyClientOrServer: ``checkpoint-disagrees``: too few of those that are named agree;
                ``checkpoint-past``: this one's is of another past.
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
        return self._membership.member.session.task(task).rounds

    def on_export(self, write: Callable[[Path], None]) -> None:
        """Say how ``export`` writes the model."""
        self._export = write

    def only_task(self, weighting: Weighting, chosen: str | None = None) -> str:
        """Return the task that was chosen, or the session's one task of a weighting.

        Raises:
            ConfigError: the chosen one is of the other weighting; there is none, or several.
        """
        names = [t.name for t in self._membership.member.session.tasks if t.weighting is weighting]
        if chosen in names:
            return chosen
        if chosen is not None:
            self._membership.member.session.task(chosen)
        if chosen is not None or len(names) != 1:
            raise ConfigError(
                "task-choice",
                f"Session {self.name} has {len(names)} tasks of kind {weighting}: {names}.",
                "Name one with task=.",
            )
        return names[0]

    # The secure all-reduce.

    def aggregate(
        self,
        task: str,
        tensors: Tensors,
        *,
        weight: float,
        metrics: Mapping[str, float],
        on_gpu: Mapping[str, torch.Tensor] | None = None,
    ) -> Outcome:
        """Take part in the task's next round, or return the result that it has already.

        Args:
            task: which.
            tensors: float arrays by name.
            weight: 0 < weight ≤ the task's cap.
            metrics: the task's metrics.
            on_gpu: the same tensors where they lie, if some lie on a GPU: they are masked there.

        Raises:
            As ``mean``.
        """
        state = self.open_task(task, _schema_of(tensors))
        own = Update(_storable(tensors), weight, metrics, on_gpu)
        state.codec.check(tensors, weight=weight, metrics=metrics)
        missed = self.replay(task)
        if missed is not None:
            return missed
        self._check_unfinished(task)  # CHECK: task-unfinished
        update = self._sealed_update(task, own)
        if update is not own:
            return self._submit(task, update)
        self._checkpoints.keep_update(task, self._past.position(task), own)
        return self._submit(task, own)

    def resubmit(self, task: str) -> Outcome | None:
        """Submit what was kept for the task's next round, if it was submitted before a restart.

        Raises:
            As ``mean``.
        """
        kept = self._checkpoints.find_update(task, self._past.position(task))
        if kept is None:
            return None
        log.info("%s %s: the update from before the restart is submitted again", self.name, task)
        return self._submit(task, kept)

    def _sealed_update(self, task: str, own: Update) -> Update:
        """Return the update to submit: the kept one where this silo is bound to it.

        Raises:
            PolicyRefused: it is bound to an update that it has lost.
        """
        position = self._past.position(task)
        bound = self._ledger.update_at(position)
        if bound is None or bound == self._digest_of(own):
            return own
        kept = self._checkpoints.find_update(task, position)
        # CHECK: resubmitted-update
        check_update(bound, b"" if kept is None else self._digest_of(kept))
        log.warning(
            "%s %s: another update of this silo was submitted before, and a sum with it may have "
            "been opened; that one is submitted again, and the tensors given now are not used",
            self.name,
            task,
        )
        return kept or own

    def _encode(
        self, codec: Codec | SealedCodec, update: Update, key: HeldKey | None
    ) -> tuple[Encoded, bytes]:
        """Encode an update afresh; sealed, with the seed of its c1, where the session seals."""
        tensors, weight, metrics = update.tensors, update.weight, update.metrics
        if isinstance(codec, Codec) and update.on_gpu is not None:
            from client_sdk import device  # torch is there, as the tensors are

            return device.encoded(codec, update, update.on_gpu, self._entropy), b""
        if isinstance(codec, Codec):
            encoded = codec.encoded(tensors, weight=weight, metrics=metrics, entropy=self._entropy)
            return encoded, b""
        assert self._keys is not None and key is not None  # noqa: PT018 - for the types: it seals
        seed, sealer = self._entropy(SEED_BYTES), self._keys.sealer(key)
        sealed = codec.encode(tensors, weight=weight, metrics=metrics, sealer=sealer, seed=seed)
        return masked(codec.ring, sealed), seed

    def _derive(self, label: str) -> Secret:
        """A key of this silo's own, for one purpose."""
        identity = self._membership.member.identity.private
        return derive(identity, salt=b"", label=label, parties=(self.silo,), size=32)

    def _digest_of(self, update: Update) -> bytes:
        """Recognise an update without telling it: keyed by this silo's identity key."""
        hasher = blake3(key=self._derive(UPDATE).reveal())
        for name in sorted(update.tensors):
            array = np.ascontiguousarray(update.tensors[name])
            hasher.update(enc(name.encode(), array.dtype.str.encode(), u64(array.nbytes)))
            hasher.update(array.reshape(-1).view(np.uint8).data)
        numbers = [update.weight, *(update.metrics[name] for name in sorted(update.metrics))]
        hasher.update(enc(*(float(number).hex().encode() for number in numbers)))
        return hasher.digest()

    def replay(self, task: str) -> Outcome | None:
        """Return the task's next result if the session has released it already."""
        self._past.sync()
        return self._next_outcome(task)

    def _next_outcome(self, task: str) -> Outcome | None:
        state = self._tasks[task]
        known = self._past.of(task)
        if state.calls >= len(known):
            return None
        result = known[state.calls]
        total = self._fetch_sum(state.codec, result)
        try:
            outcome = self._outcome(state.codec, result, total)
        except PoisonedResult:  # this call's result all the same
            self._give_out(task)
            raise
        self._give_out(task)
        return outcome

    def _give_out(self, task: str) -> None:
        """Count a result as given out: last, so that what fails before it fails once more."""
        self._checkpoints.move_on(task, self._past.position(task))
        self._tasks[task].calls += 1

    def await_result(self, task: str) -> Outcome:
        """Sit a round out and return its result.

        Raises:
            SessionEnded: the session is over.
        """
        while (outcome := self.replay(task)) is None:
            request = api.NextRequest(
                session_id=self._membership.member.session_id,
                round=len(self._past.results) + 1,
                attempt=2**32 - 1,
                seen=api.STEP_LEFT,
            )
            reply = self._channel.call("Next", request, api.NextReply, seconds=POLL_SECONDS)
            if reply.WhichOneof("event") == "ended":
                raise SessionEnded("session-over", reply.ended)
        return outcome

    def _check_unfinished(self, task: str) -> None:
        if self._tasks[task].calls >= self.task_rounds(task):
            raise SessionEnded("task-done", f"Task {task} has released all its results.")

    def _submit(self, task: str, update: Update) -> Outcome:
        """Take part with an update until its round has a result."""
        digest = self._digest_of(update)
        with Progress(f"{self.name} {task} {self._tasks[task].calls + 1}") as progress:
            while (outcome := self._take_part(task, update, digest, progress)) is None:
                progress.say("going on")
        return outcome

    def _take_part(
        self, task: str, update: Update, digest: bytes, progress: Progress
    ) -> Outcome | None:
        """Take part in the session's next round.

        Returns:
            None if its result was another task's, or the session has a newer key.
        """
        stood = len(self._past.results)
        codec, base = self._tasks[task].codec, self._past.base(task)
        expected = client.Expected(task, stood + 1, base, self._past.position(task), digest)
        submission = Submission(
            self._channel,
            self._membership.refresh,
            expected,
            self._ledger,
            self._newest_key,
            lambda key: self._encode(codec, update, key),
            self._entropy,
            progress,
        )
        try:
            concluded = submission.run(self._membership.member.session.max_attempts)
        except (StaleModel, SessionEnded):  # a round released meanwhile may be ours, too
            missed = self.replay(task)
            if missed is None and len(self._past.results) == stood:
                raise
            return missed
        except StaleKey:
            if self._keys is not None and submission.expected.key is not None:
                self._keys.outdated(submission.expected.key)
            return self.replay(task)
        except BaseException:  # Ctrl-C, too: no attempt is to wait for this silo
            self._leave()
            raise
        self._past.accept(concluded.result, concluded.state)
        return self._next_outcome(task)

    def _newest_key(self) -> HeldKey | None:
        return None if self._keys is None else self._keys.newest(self._past.opened)

    def _fetch_sum(self, codec: Codec | SealedCodec, result: Result) -> Vector:
        data = download(
            self._channel,
            self._membership.member,
            api.Blob(sum=result.round),
            codec.length * codec.ring.word_bytes,
            result.vector_digest,
        )
        return codec.ring.unpack(data, codec.length)

    def _opened(self, codec: Codec | SealedCodec, result: Result, total: Vector) -> Aggregate:
        """Decode a sum; open it first, where the session seals."""
        if isinstance(codec, Codec):
            return codec.decode(total)
        assert self._keys is not None and result.key is not None  # noqa: PT018 - check_result has seen to it
        sealer = self._keys.sealer(self._keys.find(result.key))
        try:
            return codec.decode(total, sealer, result.seeds)
        except MalformedMessage as error:
            log.warning("%s, round %d does not open: %s", self.name, result.round, error)
            self._keys.report(result.key, result.round)
            raise

    def _outcome(self, codec: Codec | SealedCodec, result: Result, total: Vector) -> Outcome:
        try:
            aggregate = self._opened(codec, result, total)
        except MalformedMessage as error:
            raise PoisonedResult(
                error.code, f"Round {result.round}: {error.observed}", "Nothing is applied; go on."
            ) from None
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

    # Checkpoints.

    def keep_global(self, task: str, about: Mapping[str, Any], make: Save) -> None:
        """Keep what all results of a task that were given out so far have led to."""
        given = self._tasks[task].calls
        number = self._past.of(task)[given - 1].round
        place = {"results": given, "round": number, "history": self._past.histories[number].hex()}
        self._checkpoints.keep_global(task, {**about, **place}, make)

    def find_global(self, task: str) -> Found | None:
        """Return what was kept of an open task, if the session's past is the one of that time.

        Raises:
            FaultyServer: the coordinator shows another past than this silo has lived.
        """
        self._past.sync()
        self._checkpoints.move_on(task, self._past.position(task))
        found = self._checkpoints.find_global(task)
        if found is None:
            return None
        self._past.check(found.about["round"], found.about["history"])  # CHECK: kept-history
        return found

    def bridge(self, task: str, judge: Judge[M]) -> Bridged[M]:
        """Return what enough peers agree on, since a task's next result cannot be opened here.

        Raises:
            As ``Bridge.fetch``.
        """
        if self._bridge is None:
            raise ConfigError("bridge", "Past sums of this session open without a key.")
        return self._bridge.fetch(task, self._tasks[task].calls, judge)

    def keep_local(self, task: str, about: Mapping[str, Any], make: Save) -> None:
        """Keep a model in training for the round that was given out last."""
        self._checkpoints.keep_local(task, self._training(task), about, make)

    def find_local(self, task: str) -> Found | None:
        """Return the model in training for the round that is next."""
        return self._checkpoints.find_local(task, self._training(task))

    def _training(self, task: str) -> bytes:
        """The position that is trained for: other calls may have seen its result by now."""
        return self._past.position(task, self._tasks[task].calls)

    # Tasks.

    def open_task(
        self, name: str, schema: Schema, *, step: str | None = None, weights: bytes | None = None
    ) -> Task:
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
        session = self._membership.member.session
        session.task(name)
        own = own_opening(name, schema, step or "", weights, session.chunk_bytes)
        return self._tasks.open(own, weights, judge_step=step is not None)

    def initial_weights(self, name: str) -> bytearray:
        """Download the agreed initial weights of an open task."""
        return self._tasks.initial_weights(name)


def _own_disk(state: Path, held: ExitStack) -> LocalDisk:
    """Open a silo's state directory, for this process alone as long as ``held`` is."""
    disk = LocalDisk(state)
    try:
        held.enter_context(disk.lock())
    except StorageInUse:
        raise ConfigError(
            "ledger-locked",
            f"{state} is in use by another process of this silo.",
            "Run one trainer a silo; stop the other one first.",
        ) from None
    return disk


def _storable(tensors: Tensors) -> Tensors:
    """The same numbers in formats that files and digests can tell; NumPy has no bfloat16."""
    return {
        name: array.astype(np.float32) if array.dtype.name == "bfloat16" else array
        for name, array in tensors.items()
    }


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
