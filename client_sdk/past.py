"""What a session has released, as far as this silo knows, and whether it fits what it has lived.

Every result is signed by the coordinator and moves the history on, and every round's keys depend on
it. So every process lists the past from the first result on, computes it anew, and holds it against
what the silo itself remembers: its ledger and its checkpoints.
"""

from __future__ import annotations

import functools
from collections import Counter

from client_sdk.channel import Channel
from client_sdk.membership import Membership
from client_sdk.tasks import Tasks
from client_sdk.transfer import parsed
from secagg.errors import ConfigError, FaultyServer
from secagg.masking import client, transcript
from secagg.masking.ledger import Ledger
from secagg.masking.messages import Result
from secagg.suite import KeyName
from secagg.wire import attempt as wire
from secagg.wire._pb import service_pb2 as api


class Past:
    """The results of a session, in order.

    Attributes:
        results: by round, from 1.
        histories: hash of the history before the first result, and after each.
    """

    def __init__(
        self, membership: Membership, channel: Channel, tasks: Tasks, ledger: Ledger
    ) -> None:
        self.results: list[Result] = []
        self.histories = [transcript.first_history(membership.session_hash)]
        self._membership = membership
        self._channel = channel
        self._tasks = tasks
        self._ledger = ledger

    def of(self, task: str) -> list[Result]:
        """The results of one task."""
        return [result for result in self.results if result.task == task]

    @property
    def opened(self) -> Counter[KeyName]:
        """How many sums were released under each key, where the session seals."""
        return Counter(result.key for result in self.results if result.key is not None)

    def base(self, task: str) -> bytes:
        """What the next round of a known task starts from."""
        return transcript.base_of(self.histories[-1], self._tasks[task].hash)

    def position(self, task: str, results: int | None = None) -> bytes:
        """Which result of a known task comes after so many, or after all that there are."""
        state = self._tasks[task]
        return transcript.position_of(state.hash, state.released[:results])

    def check(self, number: int, history: str) -> None:
        """Return if the history after a round is this one (hex).

        Raises:
            FaultyServer: ``history-fork``.
        """
        # CHECK: history-checkpoint
        if [known.hex() for known in self.histories[number : number + 1]] != [history]:
            raise _forked(number)

    def accept(self, result: Result, seen: client.Watched | None = None) -> None:
        """Check a signed result against this silo's history, and move the history on."""
        # CHECK: past-task
        if result.task not in {task.name for task in self._membership.member.session.tasks}:
            raise FaultyServer("result-task", "A result is of no task of the session.")
        task = self._tasks.meet(result.task)
        # CHECK: past-rounds
        if len(task.released) >= self._membership.member.session.task(result.task).rounds:
            raise FaultyServer("result-rounds", "A task has more results than its session allows.")
        place = client.Expected(result.task, len(self.results) + 1, self.base(result.task))
        tau4 = client.check_result(result, self._membership.member, place, seen)
        self._check_memory(result)  # CHECK: past-memory
        self.results.append(result)
        task.released.append(tau4)
        self.histories.append(transcript.next_history(self.histories[-1], tau4))

    def _check_memory(self, result: Result) -> None:
        """Refuse to go on with a ledger that has not lived through this silo's own rounds."""
        member = self._membership.member
        joined, _ = self._ledger.last_attempt(member.session_id)
        if member.name not in result.survivors or joined >= result.round:
            return
        if member.session.name in member.policy.repeat_sessions:
            return
        raise ConfigError(  # CHECK: ledger-rolled-back
            "ledger-rolled-back",
            f"This silo's update is in round {result.round} of session {member.session.name}, and "
            "its ledger knows nothing of it: the state directory is older than the session, this "
            "identity is in use elsewhere, or the coordinator says so falsely.",
            "Run one trainer a silo, on its newest state directory. If that is lost for good, the "
            "operator consents by adding the session's name to repeat_sessions in policy.toml: "
            "a sum that was opened may then be opened again over other silos.",
        )

    def sync(self) -> None:
        """List the results that this silo does not know yet, and check them.

        Raises:
            FaultyServer: they are not of this session's past, or not of the one that was lived.
            ConfigError: ``ledger-rolled-back``.
        """
        while True:
            reply = self._channel.call(
                "ListResults",
                api.ListResultsRequest(
                    session_id=self._membership.member.session_id, after=len(self.results)
                ),
                api.ListResultsReply,
            )
            for message in reply.results:
                self.accept(parsed(functools.partial(wire.result_from_wire, message)))
            if not reply.results:
                break
        self._check_past()  # CHECK: past-lived

    def _check_past(self) -> None:
        """Refuse a past in which this silo's newest attempt could not have been joined.

        Else one that is made up gives a position that was opened before a fresh name.
        """
        session_id = self._membership.member.session_id
        joined = self._ledger.last_joined(session_id)
        if joined is None:
            return
        lived = self.histories[joined.round - 1 : joined.round]
        hashes = self._ledger.openings(session_id).values()
        # CHECK: history-fork
        if joined.base not in {transcript.base_of(h, task) for h in lived for task in hashes}:
            raise _forked(joined.round - 1)


def _forked(number: int) -> FaultyServer:
    return FaultyServer(
        "history-fork",
        f"The session's results up to round {number} are not those that this silo has lived.",
        "Nothing was sent. Compare with the other silos; the coordinator's operator restores its "
        "newest state.",
    )
