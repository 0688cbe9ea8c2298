"""The coordinator and the silos as simulated processes: the product's logic, without its server.

``Coordinator`` does what ``servicer.py`` and ``driver.py`` do around ``calls.METHODS``: one call at
a time enters a session, waiting calls look again when something changed or give up after 25 s, time
does its work after every call and when something is due, and whoever cannot write dies.
"""

from __future__ import annotations

import math
import random
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from client_sdk.channel import CoordinatorUnreachable
from client_sdk.session import Outcome
from client_sdk.session import Session as SiloSession
from secagg.config import SiloId
from secagg.coordinator.calls import METHODS, How, find
from secagg.coordinator.driver import LONG_POLL_SECONDS
from secagg.coordinator.limits import Limits
from secagg.coordinator.session import Session
from secagg.coordinator.sessions import Sessions
from secagg.coordinator.standing import Means
from secagg.coordinator.state import State
from secagg.coordinator.status import status_of
from secagg.encoding.schema import Schema
from secagg.errors import (
    NotFound,
    PolicyRefused,
    RoleRefused,
    RoundAborted,
    SecaggError,
    StaleModel,
    StorageDamaged,
    StorageFailed,
    TooLate,
)

from .clock import Clock, Crashed, Process
from .consortium import Consortium, stream
from .disk import Platter, SimDisk, SimJournal
from .faults import Faults
from .network import TYPES, Call, Network, Reply, SimChannel, Status
from .witness import Trace, Witness

NAME = "study"
TASK = "task"


@dataclass
class Place:
    """What all nodes of a run share."""

    seed: int
    clock: Clock
    rng: random.Random
    faults: Faults
    trace: Trace
    witness: Witness
    members: Consortium


class Doors(Protocol):
    """What a silo's program asks the world."""

    has_weights: bool
    words: int

    def seconds_until(self, number: int) -> float: ...


class Coordinator:
    """Its machine, its process while there is one, and the calls in it."""

    def __init__(self, place: Place) -> None:
        self.full_until = 0.0
        self.platter = Platter(
            place.rng, lambda: place.clock.now < self.full_until, place.witness.written
        )
        self.process: Process | None = None
        self._place = place
        self._sessions: Sessions | None = None
        self._lives = 0
        self._inside: dict[Call, None] = {}
        self._waiting: list[tuple[Call, Callable[[], Any], Session]] = []
        self._drives: set[bytes] = set()
        self._due: dict[bytes, int] = {}
        self._pictures: dict[bytes, dict[str, Any]] = {}
        self._caller: str | None = None
        self._amid = False

    @property
    def session(self) -> Session | None:
        """The run's session, where there is one and somebody who holds it."""
        sessions = self._sessions.all() if self._sessions is not None else []
        return sessions[0] if sessions else None

    # Life and death.

    def start(self) -> None:
        """Start a process on what is on its machine."""
        place, faults = self._place, self._place.faults
        if self.process is not None:
            return
        self._lives += 1
        strikes = faults.draw_strikes(place.rng, faults.strikes)
        process = self.process = Process("coordinator", self._lives, strikes, self._died)
        place.trace.event(place.clock.now, "coordinator", f"starts for the {self._lives}. time")
        means = Means(
            manifest=lambda: place.members.manifest,
            signed_manifest=lambda: place.members.signed,
            identity=place.members.identity,
            disk=SimDisk(self.platter, process),
            journal=SimJournal(self.platter, process),
            entropy=stream(place.seed, "coordinator", self._lives),
            limits=Limits(max_weights_bytes=1000, max_sessions=4),
        )
        sessions = Sessions(means)
        rotten = self.platter.rot("spool") if place.rng.random() < faults.rot else None
        if not self._restore(sessions, process, rotten):
            return
        self._sessions = sessions
        self._compare(sessions)
        for session in sessions.all():
            self._wake(session)

    def _restore(
        self, sessions: Sessions, process: Process, rotten: tuple[str, bytes] | None
    ) -> bool:
        """Bring the sessions back; damage must be seen, and must not come from crashes alone."""
        place = self._place
        try:
            sessions.restore(place.clock.now)
        except (Crashed, StorageFailed, StorageDamaged) as error:
            if rotten is not None:
                self.platter.put(*rotten)  # its operator has a backup of this very moment
            elif isinstance(error, StorageDamaged):
                place.witness.fail(f"a crash left damage: {error}")
                place.clock.over = True
            if isinstance(error, StorageDamaged):
                place.faults.count("damage found")
            process.die(f"cannot start: {type(error).__name__}")
            return False
        if rotten is not None and self.platter.content(rotten[0]):
            place.witness.fail(f"damage was not seen: {rotten[0]}")
        return True

    def _compare(self, sessions: Sessions) -> None:
        amid = (self._caller or "") if self._amid else None
        found = {session.session_id: session for session in sessions.all()}
        for session_id, before in self._pictures.items():
            if session_id in found:
                self._place.witness.restarted(before, found[session_id], amid=amid)
            else:
                self._place.witness.fail("a restart lost a session")
        self._amid = False
        self._pictures = {i: self._place.witness.step(s) for i, s in found.items()}

    def kill(self, why: str) -> None:
        """Kill it between two calls."""
        if self.process is not None:
            self.process.die(why)

    def _died(self, why: str) -> None:
        place = self._place
        place.trace.event(place.clock.now, "coordinator", f"dies: {why}")
        place.faults.count("coordinator crash")
        self.process, self._sessions = None, None
        self.platter.crash()
        calls, self._inside = list(self._inside), {}
        self._waiting.clear()
        self._drives.clear()
        self._due.clear()
        for call in calls:
            call.answer(Reply(Status.UNAVAILABLE, text="Socket closed"))
        place.clock.after(place.rng.uniform(0.5, 40.0 if place.faults.on else 2.0), self.start)

    # Calls.

    def arrive(self, call: Call) -> None:
        """A request comes in."""
        place = self._place
        request = TYPES[call.method][0].FromString(call.data)
        place.trace.event(place.clock.now, call.silo, f"> {call.method}", call.data, request)
        if self._sessions is None:
            call.answer(Reply(Status.UNAVAILABLE, text="connection refused"))
            return
        place.witness.arrives(call.silo, call.method, request, call.data)
        self._inside[call] = None
        self._guarded(call, lambda: self._enter(call, request))

    def _guarded(self, call: Call, work: Callable[[], None]) -> None:
        """Run what serves a call; translate what it raises as the servicer does."""
        process = self.process
        assert process is not None
        try:
            work()
        except Crashed:
            pass
        except StorageFailed:
            process.die("its disk refused")
        except StorageDamaged as error:
            self._place.witness.fail(f"damage was met in {call.method}: {error}")
            process.die("it met damage")
        except SecaggError as error:
            text = " ".join(part for part in (error.observed, error.remedy) if part)
            self._reply(call, Reply(status_of(error), text=text[:500], code=error.code))
        except Exception:  # noqa: BLE001 - the border of the servicer
            self._place.witness.fail(f"internal error in {call.method}: {traceback.format_exc()}")
            self._reply(call, Reply(Status.INTERNAL, text="internal error"))

    def _enter(self, call: Call, request: Any) -> None:
        method, now, sessions = METHODS[call.method], self._place.clock.now, self._sessions
        assert sessions is not None
        if call.role is not method.role:
            raise RoleRefused("role", "This certificate is of another role.")
        caller = SiloId(call.silo)
        session = find(method, sessions, request, caller, now)
        if session is None:
            self._begin(call)
            reply = method.handle(sessions, request, caller, now)
            self._over(*sessions.all())
            for known in sessions.all():
                self._wake(known)
            self._finish(call, reply)
        elif method.how is How.WAITS:
            self._wait(call, session, lambda: method.handle(session, request, caller, self._now()))
        elif method.how is How.LOOKS:
            self._finish(call, method.handle(session, request, caller, now))
        else:
            self._work(call, session, lambda: method.handle(session, request, caller, now))

    def _now(self) -> float:
        return self._place.clock.now

    def _work(self, call: Call, session: Session, handle: Callable[[], Any]) -> None:
        self._begin(call)
        try:
            reply = handle()
        except StorageFailed:
            raise
        except SecaggError:
            self._over(session)
            self._wake(session)
            raise
        self._over(session)
        self._changed(session)
        self._wake(session)
        self._finish(call, reply)

    def _begin(self, call: Call | None) -> None:
        """Somebody enters: if the process dies now, the step may be on disk or not."""
        self._amid, self._caller = True, call.silo if call is not None else None

    def _over(self, *sessions: Session) -> None:
        """A step is over, and on disk."""
        self._amid = False
        for session in sessions:
            self._pictures[session.session_id] = self._place.witness.step(session)

    def _finish(self, call: Call, reply: Any) -> None:
        """Send a reply, or have it made by what needs the files alone, now or a little later."""
        faults, process = self._place.faults, self.process
        if not callable(reply):
            self._reply(call, self._ok(call, reply))
            return

        def make() -> None:
            if self.process is process and process is not None:
                self._guarded(call, lambda: self._reply(call, self._ok(call, reply())))

        if self._place.rng.random() < faults.late_work:
            faults.count("late work")
            self._place.clock.after(self._place.rng.uniform(0.0, 5.0), make)
        else:
            make()

    def _ok(self, call: Call, reply: Any) -> Reply:
        message = reply or TYPES[call.method][1]()
        return Reply(Status.OK, message.SerializeToString())

    def _reply(self, call: Call, reply: Reply) -> None:
        place = self._place
        self._inside.pop(call, None)
        signed_by_chance = call.method == "JoinSession"
        said = b"" if signed_by_chance else reply.data
        what = f"< {call.method} {reply.status.name} {reply.code}"
        note = TYPES[call.method][1].FromString(said) if place.trace.lines is not None else None
        place.trace.event(place.clock.now, call.silo, what, said, note)
        call.answer(reply)

    # Waiting.

    def _wait(self, call: Call, session: Session, look: Callable[[], Any]) -> None:
        self._wake(session)  # a first look may have set a new deadline
        found = look()
        if found is not None:
            self._finish(call, found)
            return
        self._waiting.append((call, look, session))
        self._place.clock.after(LONG_POLL_SECONDS, lambda: self._give_up(call))

    def _give_up(self, call: Call) -> None:
        for entry in self._waiting:
            if entry[0] is call:
                self._waiting.remove(entry)
                self._finish(call, None)
                return

    def _changed(self, session: Session) -> None:
        """Let everybody who waits look again."""
        waiting, self._waiting = self._waiting, []
        for entry in waiting:
            call, _, where = entry
            if call.hung_up:
                self._inside.pop(call, None)
            elif where is not session:
                self._waiting.append(entry)
            else:
                self._guarded(call, lambda: self._look_again(entry))  # noqa: B023 - run at once

    def _look_again(self, entry: tuple[Call, Callable[[], Any], Session]) -> None:
        found = entry[1]()
        if found is None:
            self._waiting.append(entry)
        else:
            self._finish(entry[0], found)

    # Time.

    def _wake(self, session: Session) -> None:
        """Have the driver look, in a moment."""
        if session.session_id not in self._drives and self.process is not None:
            process = self.process
            self._drives.add(session.session_id)
            delay = self._place.rng.uniform(0.0, 0.002)
            self._place.clock.after(delay, lambda: self._drive(session, process))

    def _drive(self, session: Session, process: Process) -> None:
        if self.process is not process:
            return
        self._drives.discard(session.session_id)
        try:
            while session.state is State.ACTIVE and self._tick(session):
                self._changed(session)
                if self.process is not process:
                    return
        except Crashed:
            return
        except StorageFailed:
            process.die("its disk refused")
            return
        except Exception:  # noqa: BLE001 - the driver ends the session, and the run has failed
            self._place.witness.fail(f"internal error in tick: {traceback.format_exc()}")
            self._place.clock.over = True
            return
        self._sleep(session, process)

    def _tick(self, session: Session) -> bool:
        self._begin(None)
        changed = session.tick(self._place.clock.now)
        self._over(session)
        return changed

    def _sleep(self, session: Session, process: Process) -> None:
        due = session.due()
        if math.isinf(due):
            return
        count = self._due[session.session_id] = self._due.get(session.session_id, 0) + 1

        def wake() -> None:
            if self.process is process and self._due.get(session.session_id) == count:
                self._drive(session, process)

        self._place.clock.after(max(due - self._place.clock.now, 0.0), wake)


class Silo:
    """A silo's machine, and its program while it runs."""

    TRIES = 6

    def __init__(self, name: str, place: Place, network: Network, doors: Doors) -> None:
        self.name = name
        self.full_until = 0.0
        self.platter = Platter(place.rng, lambda: place.clock.now < self.full_until)
        self.process: Process | None = None
        self.ended = False
        self.refused_at = -1.0
        self._place = place
        self._network = network
        self._doors = doors
        self._lives = 0

    def start(self) -> None:
        """Start its program again on what is on its machine."""
        place, faults = self._place, self._place.faults
        if self.process is not None or self.ended:
            return
        self._lives += 1
        strikes = faults.draw_strikes(place.rng, faults.silo_strikes)
        self.process = process = Process(self.name, self._lives, strikes, self._died)
        place.trace.event(place.clock.now, self.name, f"starts for the {self._lives}. time")
        place.clock.spawn(process, lambda: self._main(process))

    def kill(self, why: str) -> None:
        """Kill it wherever it waits."""
        process = self.process
        if process is not None:
            process.die(why)
            fiber = process.fiber
            assert fiber is not None
            self._place.clock.after(0.0, lambda: self._place.clock.resume(fiber))

    def _died(self, why: str) -> None:
        place = self._place
        place.trace.event(place.clock.now, self.name, f"dies: {why}")
        place.faults.count("silo crash")
        self.platter.crash()
        self._again()

    def _again(self) -> None:
        self.process = None
        wait = self._place.rng.uniform(0.5, 60.0 if self._place.faults.on else 2.0)
        self._place.clock.after(wait, self.start)

    # Its program.

    def _main(self, process: Process) -> None:
        try:
            self._play(process)
            self.ended = True
            self.process = None
        except SecaggError as error:
            if not process.dead:
                self._note(error)
                process.dead = True
                self._again()
        except Exception:  # noqa: BLE001 - no error but ours may come out of the SDK
            self._place.witness.fail(f"error at {self.name}: {traceback.format_exc()}")
            self._place.clock.over = True

    def _play(self, process: Process) -> None:
        place = self._place
        channel = SimChannel(
            process, place.members.profiles[self.name], self._network, place.witness
        )
        entropy = stream(place.seed, self.name, process.number)
        disk = SimDisk(self.platter, process)
        with SiloSession(
            NAME, place.members.profiles[self.name], channel=channel, disk=disk, entropy=entropy
        ) as session:
            if self._doors.has_weights:
                self._open(session)
            number = 1
            while number <= session.task_rounds(TASK):
                wait = self._doors.seconds_until(number)
                if wait > 0:
                    place.clock.sleep(process, wait)
                outcome = self._round(session, process, number)
                place.witness.outcome(self.name, number, outcome)
                place.trace.event(place.clock.now, self.name, f"has round {number}")
                number += 1

    def _open(self, session: SiloSession) -> None:
        """Agree on initial weights: each silo would propose its own."""
        schema = Schema.of({"x": np.zeros(self._doors.words)})
        own = stream(self._place.seed, "weights", self.name)(200)
        session.open_task(TASK, schema, step="step", weights=own)
        self._place.witness.weights(self.name, bytes(session.initial_weights(TASK)))

    def _round(self, session: SiloSession, process: Process, number: int) -> Outcome:
        """Train, and submit until there is a result; give the process up after some tries."""
        place = self._place
        place.clock.sleep(process, place.rng.expovariate(0.2))
        version = 1 + (process.number - 1) % 15 if place.faults.fickle else 1
        update = place.witness.update(self.name, number, version)
        for left in reversed(range(self.TRIES)):
            try:
                weight = place.witness.weight(self.name)
                return session.aggregate(TASK, {"x": update}, weight=weight, metrics={})
            except SecaggError as error:
                process.check()
                self._note(error)
                if not left:
                    raise
            place.clock.sleep(process, place.rng.uniform(0.1, 5.0))
        raise AssertionError

    def _note(self, error: SecaggError) -> None:
        """Write down why something failed; most reasons are nobody's promise to avoid."""
        place = self._place
        place.trace.event(place.clock.now, self.name, f"fails: {type(error).__name__} {error.code}")
        place.faults.count(f"error {type(error).__name__} {error.code}")
        if isinstance(error, PolicyRefused) and error.code.startswith("differencing"):
            self.refused_at = place.clock.now
            return
        usual = (RoundAborted, TooLate, StaleModel, StorageFailed, CoordinatorUnreachable)
        unborn = isinstance(error, NotFound) and error.code == "session-unknown"
        if not isinstance(error, usual) and not unborn:
            place.witness.fail(f"{self.name}: {type(error).__name__} {error}")
