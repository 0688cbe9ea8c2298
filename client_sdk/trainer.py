"""Rounds of a model: agreed weights in, mean delta out, the same global step at every silo."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING

from client_sdk.progress import log
from secagg.encoding.schema import Schema
from secagg.errors import OutOfOrder, PoisonedResult

if TYPE_CHECKING:
    import torch

    from client_sdk.session import Outcome, Session
    from client_sdk.tensors import GlobalWeights, Shared


class Round:
    """One round of training. The model holds the agreed global weights when it is handed out.

    Args:
        number: which round of the task this is, from 1.
    """

    def __init__(
        self,
        number: int,
        session: Session,
        task: str,
        agreed: GlobalWeights,
        chosen: Callable[[torch.nn.Module], Mapping[str, torch.Tensor]],
    ) -> None:
        self.number = number
        self.outcome: Outcome | None = None
        self.poisoned = False
        self._session = session
        self._task = task
        self._agreed = agreed
        self._chosen = chosen

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
        if self.outcome is not None or self.poisoned:
            raise OutOfOrder("round-submitted", f"Round {self.number} was submitted already.")
        delta = self._agreed.delta(self._chosen(model))
        try:
            self.outcome = self._session.aggregate(
                self._task, delta, weight=weight, metrics=metrics or {}
            )
        except PoisonedResult:
            self.poisoned = True
            raise
        self._agreed.step(self.outcome.tensors)
        return self.outcome


def rounds(
    session: Session,
    model: torch.nn.Module,
    task: str,
    optimizer: Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer] | None,
    shared: Shared | None,
) -> Iterator[Round]:
    """Yield the task's rounds (see ``Session.rounds``).

    A round that is not submitted is sat out: its result is waited for and applied all the same.
    """
    from client_sdk import tensors

    def chosen(trained: torch.nn.Module) -> Mapping[str, torch.Tensor]:
        return tensors.shared_tensors(trained, shared)

    own = chosen(model)
    agreed = tensors.GlobalWeights(own, optimizer)
    schema = Schema.of(tensors.to_arrays(own))
    state = session.open_task(task, schema, step=agreed.step_name, weights=tensors.to_file(own))
    state.calls = 0  # a second rounds() in one process replays from the top, like a restart
    agreed.set(tensors.from_file(bytes(session.initial_weights(task))))
    agreed.load_into(own)
    session.on_export(lambda path: tensors.export_model(_loaded(model, agreed, chosen), path))
    for number in range(1, session.task_rounds(task) + 1):
        try:
            outcome = session.replay(task)
            if outcome is None:
                current = Round(number, session, task, agreed, chosen)
                yield current
                if current.outcome is None and not current.poisoned:
                    outcome = session.await_result(task)
            if outcome is not None:
                agreed.step(outcome.tensors)
        except PoisonedResult as error:  # alike at all silos: nobody steps
            log.warning("nothing applied: %s", error)
        agreed.load_into(chosen(model))


def _loaded(
    model: torch.nn.Module,
    agreed: GlobalWeights,
    chosen: Callable[[torch.nn.Module], Mapping[str, torch.Tensor]],
) -> torch.nn.Module:
    agreed.load_into(chosen(model))
    return model
