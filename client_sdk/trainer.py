"""Rounds of a model: agreed weights in, mean delta out, the same global step at every silo."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING

from client_sdk.progress import log
from secagg.encoding.schema import Schema
from secagg.errors import ConfigError, InputError, OutOfOrder, PoisonedResult

if TYPE_CHECKING:
    import torch

    from client_sdk.session import Outcome, Session
    from client_sdk.tensors import Shared


class Round:
    """One round of training. The model holds the agreed global weights when it is handed out.

    After a restart in the midst of it, the model is as the last ``checkpoint`` left it, so this
    resumes, and begins where nothing was kept:

        for epoch in range(round.epoch, EPOCHS):
            train_one_epoch(model)
            round.checkpoint(model, epoch + 1)

    Attributes:
        number: which round of the task this is, from 1.
        outcome: what it gave, once it is submitted.
        poisoned: whether its result was no sum of updates.
        epoch: what was kept with the model; 0 if nothing was.
        extra: the trainer's own tensors that were kept with it, on the CPU.
    """

    def __init__(self, number: int, training: _Training) -> None:
        self.number = number
        self.outcome: Outcome | None = None
        self.poisoned = False
        self.epoch = 0
        self.extra: dict[str, torch.Tensor] = {}
        self._training = training

    @property
    def settled(self) -> bool:
        """Whether its result is known."""
        return self.poisoned or self.outcome is not None

    def submit(
        self,
        model: torch.nn.Module,
        *,
        weight: float,
        metrics: Mapping[str, float] | None = None,
    ) -> Outcome:
        """Add this silo's update to the round and wait for the result.

        The model itself is not touched: the next round loads the new global weights into it. The
        update is kept for further attempts and never trained again.

        Args:
            model: the trained model.
            weight: 0 < weight ≤ the task's cap; usually the number of samples.
            metrics: exactly the task's metrics.

        Returns:
            What the round gave: metrics, survivors, and whether this silo's update is in it.

        Raises:
            OutOfOrder: this round was submitted before.
            InputError: the update, weight or metrics break the task's bounds; correct and submit
                again.
            PoisonedResult: somebody spoilt the sum; the model stays as it was, go on to the next
                round.
            RoundAborted: the session's attempts failed; submit again to go on.
        """
        from client_sdk import tensors

        self._check_open()
        training = self._training
        delta = training.agreed.delta(training.chosen(model))
        on_gpu = delta if any(tensor.is_cuda for tensor in delta.values()) else None
        try:
            outcome = training.session.aggregate(
                training.task,
                tensors.to_arrays(delta),
                weight=weight,
                metrics=metrics or {},
                on_gpu=on_gpu,
            )
        except PoisonedResult:
            self.poisoned = True
            training.settle(None)
            raise
        self.outcome = outcome
        training.settle(outcome)
        return outcome

    def checkpoint(
        self,
        model: torch.nn.Module,
        epoch: int,
        extra: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        """Keep the model, so that a restart goes on training this round from here.

        Args:
            model: the model in training; its whole state is kept, shared or not.
            epoch: how far it is, for ``epoch`` after a restart.
            extra: the trainer's own tensors, for ``extra`` after a restart.

        Raises:
            OutOfOrder: this round was submitted before.
            InputError: something of them is no tensor that a file can hold.
            StorageFailed: the disk refuses; what was kept before is still there.
        """
        from client_sdk import tensors

        self._check_open()
        self._training.session.keep_local(
            self._training.task,
            {"epoch": int(epoch)},
            lambda metadata: tensors.model_file(model, extra or {}, metadata),
        )

    def _check_open(self) -> None:
        if self.settled:
            raise OutOfOrder("round-submitted", f"Round {self.number} was submitted already.")
        self._training.check(self.number)


def rounds(
    session: Session,
    model: torch.nn.Module,
    task: str,
    optimizer: Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer] | None,
    shared: Shared | None,
) -> Iterator[Round]:
    """Open the task and yield its rounds (see ``Session.rounds``).

    A round that is not submitted is sat out: its result is waited for and applied all the same.
    """
    return _Training(session, model, task, optimizer, shared).rounds()


class _Training:
    """A model on its way through a task's rounds, from the agreed weights or a checkpoint on."""

    def __init__(
        self,
        session: Session,
        model: torch.nn.Module,
        task: str,
        optimizer: Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer] | None,
        shared: Shared | None,
    ) -> None:
        from client_sdk import tensors

        self.session = session
        self.task = task
        self._model = model
        self._shared = shared
        own = self.chosen(model)
        self.agreed = tensors.GlobalWeights(own, optimizer)
        schema = Schema.of(tensors.to_arrays(own))
        step, weights = self.agreed.step_name, tensors.to_file(own)
        self._state = session.open_task(task, schema, step=step, weights=weights)
        self._begin()
        self._applied = self._state.calls
        self._stepping = False
        self.agreed.load_into(own)
        session.on_export(lambda path: tensors.export_model(self._loaded(), path))

    def chosen(self, model: torch.nn.Module) -> dict[str, torch.Tensor]:
        """Return the model's shared tensors."""
        from client_sdk import tensors

        return tensors.shared_tensors(model, self._shared)

    def _begin(self) -> None:
        """Take up the newest global weights that were kept, else the agreed initial ones."""
        from client_sdk import tensors

        found = self.session.find_global(self.task)
        if found is not None:
            if self.agreed.restore(found.data, found.about["optimizer"]):
                self._state.calls = found.about["results"]
                return
            log.warning("the checkpoint of task %s cannot be taken up; replaying", self.task)
        self._state.calls = 0  # a second rounds() in one process begins anew, like a restart
        try:
            weights = self.session.initial_weights(self.task)
        except ConfigError as error:
            if error.code != "key-gone":
                raise
            log.warning("%s", error)
            self._take_over()
        else:
            self.agreed.set(tensors.from_file(bytes(weights)))

    def check(self, number: int) -> None:
        """Return if the model has exactly the results before this round in it.

        Raises:
            OutOfOrder: one was given out and not applied, was applied in part, or is applied by
                somebody else: a call that failed or was interrupted, ``mean`` on the same task, a
                later ``rounds``.
        """
        if self._stepping or not number - 1 == self._applied == self._state.calls:
            raise OutOfOrder(
                "round-lost",
                f"The model does not stand before round {number} of task {self.task} any more.",
                "Call session.rounds(model) again: it goes on from what is kept.",
            )

    def rounds(self) -> Iterator[Round]:
        """Yield the rounds that have no result yet; apply every result."""
        while self._applied < self.session.task_rounds(self.task):
            self.check(self._applied + 1)
            try:
                outcome = self._replayed()
                number = self._applied + 1  # gaps in the past are behind us now
                if outcome is None and number <= self.session.task_rounds(self.task):
                    current = self._round(number)
                    outcome = self.session.resubmit(self.task)
                    if outcome is None:
                        yield current
                        if not current.settled:
                            self.check(number)
                            outcome = self.session.await_result(self.task)
                if outcome is not None:
                    self.settle(outcome)
            except PoisonedResult as error:
                log.warning("nothing applied: %s", error)
                self.settle(None)
            self.agreed.load_into(self.chosen(self._model))

    def _replayed(self) -> Outcome | None:
        """Return the task's next result, if there is one; go over those that nobody can open."""
        while True:
            try:
                return self.session.replay(self.task)
            except ConfigError as error:
                if error.code != "key-gone":
                    raise
                log.warning("%s", error)
                self._take_over()

    def _take_over(self) -> None:
        """Go on from what enough peers agree on, and keep it: a restart is not to ask again.

        Raises:
            As ``Bridge.fetch``; InputError: this silo's optimiser does not take it.
        """
        bridged = self.session.bridge(self.task, self.agreed)
        self.agreed.adopt(bridged.model)
        self._state.calls = self._applied = bridged.results
        self.agreed.load_into(self.chosen(self._model))
        self._keep()

    def settle(self, outcome: Outcome | None) -> None:
        """Apply a round's result, and keep what it leads to; None steps nobody, at all silos."""
        self._stepping = True
        if outcome is not None:
            self.agreed.step(outcome.tensors)
        self._applied += 1
        self._stepping = False
        self._keep()

    def _keep(self) -> None:
        """Keep the weights of now; they are after all results that were given out."""
        try:
            optimizer, held = self.agreed.optimizer_state()
        except TypeError as error:
            log.warning("no checkpoint, a restart replays all rounds: %s", error)
            return
        about = {"optimizer": optimizer}
        self.session.keep_global(
            self.task, about, lambda metadata: self.agreed.file(held, metadata)
        )

    def _round(self, number: int) -> Round:
        """Hand a round out, its model in the state that was kept in the midst of it, if any."""
        from client_sdk import tensors

        current = Round(number, self)
        found = self.session.find_local(self.task)
        if found is not None:
            try:
                current.extra = tensors.load_model(self._model, found.data)
                current.epoch = found.about["epoch"]
            except InputError as error:
                log.warning("round %d is trained from its start: %s", number, error)
        return current

    def _loaded(self) -> torch.nn.Module:
        self.agreed.load_into(self.chosen(self._model))
        return self._model
