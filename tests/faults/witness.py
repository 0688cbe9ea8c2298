"""Sees all that crosses the network and all that is written, and says what must not have been.

It trusts nobody: what a silo revealed is counted from the messages' contents, whose sum was given
out from numbers that only these silos could have added up to.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from client_sdk.session import Outcome
from secagg.config import Phase
from secagg.coordinator.session import Session
from secagg.masking.messages import Result

from .clock import Process

BASE = 32
"""Digits of a sum's first element tell who is in it, with which version of its update."""


class Trace:
    """The run's fingerprint, and the same in words where somebody wants to read it."""

    def __init__(self, lines: list[str] | None = None) -> None:
        self.lines = lines
        self._hasher = hashlib.sha256()

    def event(self, now: float, actor: str, what: str, data: bytes = b"", note: Any = None) -> None:
        """Add one event; the message in the note is for a reader alone."""
        self._hasher.update(b"%r|%b|%b|%d|" % (now, actor.encode(), what.encode(), len(data)))
        self._hasher.update(data)
        if self.lines is not None:
            short = hashlib.sha256(data).hexdigest()[:8] if data else ""
            text = "" if note is None else _in_words(note)
            self.lines.append(f"{now:10.3f}  {actor:12} {what} {text} {short}".rstrip())

    def digest(self) -> str:
        """The fingerprint."""
        return self._hasher.hexdigest()


def _in_words(message: Any) -> str:
    """What a message is about: its numbers, and which of its kinds it is."""
    words = []
    for field, value in message.ListFields():
        if field.cpp_type in (field.CPPTYPE_UINT32, field.CPPTYPE_UINT64, field.CPPTYPE_ENUM):
            words.append(f"{field.name}={value}")
        elif field.cpp_type == field.CPPTYPE_MESSAGE and not field.is_repeated:
            words.append(f"{field.name}({_in_words(value)})")
        elif field.name in ("cohort", "survivors", "blamed"):
            words.append(f"{field.name}={''.join(value)}")
    return " ".join(words)


class Witness:
    """Holds every run to the system's promises.

    Args:
        trace: violations are written there, too.
        updates: an update by (silo, round, version).
        weights: of the silos in a task of means; all 1 in one of sums.
        mean: which of the two.
    """

    def __init__(
        self,
        trace: Trace,
        updates: Callable[[str, int, int], np.ndarray[Any, Any]],
        weights: Mapping[str, float],
        *,
        mean: bool,
    ) -> None:
        self.violations: list[str] = []
        self.got: dict[str, set[int]] = defaultdict(set)
        self.attempts: set[tuple[int, int]] = set()
        self.aborts: set[tuple[int, int]] = set()
        self._trace = trace
        self._updates = updates
        self._weights = weights
        self._mean = mean
        self._messages: dict[tuple[Any, ...], bytes] = {}
        self._authors: dict[tuple[str, int, int], int] = {}
        self._drawn: dict[bytes, tuple[Any, ...]] = {}
        self._shares: dict[tuple[int, int, str, str], set[str]] = defaultdict(set)
        self._secrets: set[bytes] = set()
        self._written: list[bytes] = []
        self._events: dict[tuple[Any, ...], bytes] = {}
        self._thresholds: dict[tuple[int, int], int] = {}
        self._results: dict[int, bytes] = {}
        self._opened: dict[tuple[str, int], frozenset[str]] = {}
        self._out: set[tuple[str, int, int, int]] = set()
        self._outcomes: dict[int, tuple[Any, ...]] = {}
        self._begun: dict[str, bytes] = {}

    def update(self, silo: str, number: int, version: int) -> np.ndarray[Any, Any]:
        """A silo's update for a round, as it submits it."""
        return self._updates(silo, number, version).astype(np.float64)

    def weight(self, silo: str) -> float:
        """A silo's weight."""
        return self._weights[silo]

    def fail(self, what: str) -> None:
        """Note a broken promise."""
        if what not in self.violations:
            self.violations.append(what)
            self._trace.event(0.0, "witness", f"VIOLATION {what}")

    def same(self, table: dict[Any, bytes], key: Any, data: bytes, what: str) -> None:
        """What is said again must be the same."""
        if table.setdefault(key, data) != data:
            self.fail(f"{what} differs when repeated: {key}")

    # What a silo sends and hears.

    def sends(self, process: Process, method: str, request: Any) -> None:
        """A silo sends something new: not of an attempt that it left or saw aborted."""
        if method == "Send":
            where = (request.round, request.attempt)
        elif method == "PutChunk" and request.blob.HasField("vector"):
            where = (request.blob.vector.round, request.blob.vector.attempt)
        else:
            return
        if (process.actor, process.number, *where) in self._out:
            self.fail(f"{process.actor} goes on sending in attempt {where} that it is out of")

    def out(self, process: Process, round_number: int, attempt: int) -> None:
        """A silo refused an attempt, or was told that it is aborted."""
        self._out.add((process.actor, process.number, round_number, attempt))

    def told(self, process: Process, method: str, request: Any, reply: Any, data: bytes) -> None:
        """A silo hears something: everybody hears the same, before and after restarts."""
        if method == "ListResults":
            for result in reply.results:
                self.same(self._results, result.round, result.SerializeToString(), "result")
        elif method == "Next":
            self._told_event(process, request, reply, data)

    def _told_event(self, process: Process, request: Any, reply: Any, data: bytes) -> None:
        kind = reply.WhichOneof("event")
        place = (request.round, request.attempt)
        match kind:
            case None | "ended":
                return
            case "result":
                result = reply.result.SerializeToString()
                self.same(self._results, reply.result.round, result, "result")
            case "aborted":
                self.out(process, *place)
                self.same(self._events, (kind, *place), data, "abort")
            case "descriptor":
                found = reply.descriptor
                place = (found.round, found.attempt)
                self._thresholds[place] = found.threshold
                self.same(self._events, (kind, *place), data, "descriptor")
            case "dealt":
                self.same(self._events, (kind, *place, process.actor), data, "dealing")
            case _:
                self.same(self._events, (kind, *place), data, kind)

    def weights(self, silo: str, data: bytes) -> None:
        """A silo is given the task's initial weights."""
        if self._begun.setdefault("weights", data) != data:
            self.fail(f"{silo} starts from other initial weights")

    def outcome(self, silo: str, number: int, outcome: Outcome) -> None:
        """A silo is given a round's outcome: the exact sum over the survivors it names."""
        self.got[silo].add(number)
        if outcome.round != number:
            self.fail(f"{silo} got round {outcome.round} as its call {number}")
        total = np.round(outcome.tensors["x"] * self._total_weight(outcome)).astype(np.int64)
        if np.abs(total - outcome.tensors["x"] * self._total_weight(outcome)).max() > 1e-3:
            self.fail(f"round {number} at {silo} is no sum of integers")
        versions, rest = {}, int(total[0])
        for name in sorted(self._weights):
            rest, digit = divmod(rest, BASE)
            versions[name] = digit / self._weights[name]
        if rest or {name for name, v in versions.items() if v} != set(outcome.survivors):
            self.fail(f"round {number} at {silo} is not over its survivors: {versions}")
            return
        parts = [
            self._updates(name, number, int(versions[name])) * int(self._weights[name])
            for name in outcome.survivors
        ]
        if any(v != int(v) for v in versions.values()) or (sum(parts) != total).any():
            self.fail(f"round {number} at {silo} is not the exact sum of its survivors")
        if outcome.included != (silo in outcome.survivors):
            self.fail(f"{silo} is wrong about being in round {number}")
        seen = (total.tobytes(), outcome.survivors, outcome.dropouts)
        if self._outcomes.setdefault(number, seen) != seen:
            self.fail(f"round {number} differs between silos or calls")

    def _total_weight(self, outcome: Outcome) -> float:
        return outcome.weight if self._mean else 1.0

    # What arrives at the coordinator, in any of its lives, and what it writes.

    def arrives(self, silo: str, method: str, request: Any, data: bytes) -> None:
        """A request is delivered, for the first time or again."""
        if method == "PutChunk" and request.blob.HasField("vector"):
            place = (silo, request.blob.vector.round, request.blob.vector.attempt)
            self.same(self._messages, (*place, request.offset), data, "chunk")
        elif method == "Send":
            place = (silo, request.round, request.attempt)
            kind = request.WhichOneof("message")
            key = (*place, kind)
            new = key not in self._messages
            self.same(self._messages, key, data, "message")
            if new and kind == "advertise_keys":
                self._check_keys(place, request.advertise_keys)
            if kind == "unmasking":
                self._check_reveal(place, request.unmasking)

    def _check_keys(self, place: tuple[Any, ...], advert: Any) -> None:
        for use, value in (
            ("channel", advert.channel_key),
            ("mask", advert.mask_key),
            ("seed", advert.self_seed_hash),
        ):
            if self._drawn.setdefault(value, (*place, use)) != (*place, use):
                self.fail(f"a key of {place} was drawn before, for {self._drawn[value]}")

    def _check_reveal(self, place: tuple[str, int, int], unmasking: Any) -> None:
        holder, round_number, attempt = place
        survivors = frozenset(s.owner for s in unmasking.shares if s.WhichOneof("share")[0] == "s")
        before = self._opened.setdefault((holder, round_number), survivors)
        if before != survivors:
            self.fail(f"{holder} opened two survivor sets in round {round_number}")
        for share in unmasking.shares:
            kind = share.WhichOneof("share")
            self._secrets.add(getattr(share, kind))
            self._shares[round_number, attempt, share.owner, kind].add(holder)
            other = "mask_key" if kind == "self_seed" else "self_seed"
            both = self._shares.get((round_number, attempt, share.owner, other), set())
            mine = self._shares[round_number, attempt, share.owner, kind]
            if holder in both:
                self.fail(f"{holder} revealed both shares of {share.owner} in {place}")
            need = self._thresholds.get((round_number, attempt), 1)
            if min(len(both), len(mine)) >= need:
                self.fail(f"both secrets of {share.owner} are open in attempt {attempt}")

    def written(self, data: bytes) -> None:
        """The coordinator writes something down."""
        self._written.append(data)

    # The coordinator's picture.

    def step(self, session: Session) -> dict[str, Any]:
        """Note where a session stands after a step that is over; returns it for ``restarted``."""
        live, number = session.attempt, len(session.results) + 1
        if live is not None:
            self.attempts.add((live.descriptor.round, live.number))
        self.aborts.update((number, attempt) for attempt in session.aborts)
        return picture(session)

    def restarted(self, before: dict[str, Any], session: Session, *, amid: str | None) -> None:
        """Compare a session that was brought back with what it was.

        Args:
            before: after the last step that was over.
            session: as it is now.
            amid: who asked for the step in which it died; None if it died between two.
        """
        now = picture(session)
        if amid is None:
            for what, value in before.items():
                if now[what] != value:
                    self.fail(f"a restart changed {what}: {value} became {now[what]}")
            return
        results, shown = before["results"], now["results"]
        if shown[: len(results)] != results or len(shown) > len(results) + 1:
            self.fail("a restart lost or changed results")
        if not before["tasks"].items() <= now["tasks"].items():
            self.fail("a restart lost a task")
        if len(shown) == len(results):
            self._compare_round(before, now, amid)

    def _compare_round(self, before: dict[str, Any], now: dict[str, Any], amid: str | None) -> None:
        if not before["aborts"].items() <= now["aborts"].items():
            self.fail("a restart lost an abort")
        cohort = now["descriptor"].cohort if now["descriptor"] else ()
        for silo, task in before["ready"].items():
            if now["ready"].get(silo) != task and silo not in cohort and silo != amid:
                self.fail(f"a restart lost that {silo} is ready")
        if before["live"] is None:
            return
        if now["live"] != before["live"]:
            if before["live"] not in now["aborts"]:
                self.fail(f"a restart lost attempt {before['live']}")
            return
        if now["descriptor"] != before["descriptor"]:
            self.fail("a restart changed a descriptor")
        for phase, messages in before["accepted"].items():
            if not messages.items() <= now["accepted"][phase].items():
                self.fail(f"a restart lost accepted {phase} messages")

    # The end.

    def read_ledger(self, silo: str, data: bytes) -> None:
        """Hold a silo's ledger to its rules, whatever it says of itself."""
        joined: dict[str, tuple[int, int]] = {}
        revealed: dict[str, tuple[Any, ...]] = {}
        for line in data.split(b"\n"):
            if not line.endswith(b"}"):
                continue
            entry = json.loads(line)
            if entry["kind"] == "joined":
                place = (entry["round"], entry["attempt"])
                if place <= joined.get(entry["session_id"], (0, 0)):
                    self.fail(f"{silo} joined attempt {place} twice")
                joined[entry["session_id"]] = place
            elif entry["kind"] == "revealed":
                about = (tuple(entry["survivors"]), entry["update"])
                if revealed.setdefault(entry["base"], about) != about:
                    self.fail(f"{silo} recorded reveals of two survivor sets or updates")

    def finish(self) -> None:
        """Look for revealed shares in all that the coordinator ever wrote."""
        if not self._secrets:
            return
        everything = b"\0".join(self._written)
        if any(secret in everything for secret in self._secrets):
            self.fail("a revealed share was written to the coordinator's disk")


def picture(session: Session) -> dict[str, Any]:
    """What a session holds that must outlive its process."""
    live = session.attempt
    accepted: dict[str, Any] = {}
    if live is not None:
        accepted = {
            str(phase): dict(messages)
            for phase, messages in live.server._accepted.items()
            if phase is not Phase.UNMASKING
        }
    aborts = {n: (e.phase, e.have, e.need, e.blamed) for n, e in session.aborts.items()}
    results: list[Result] = list(session.results)
    return {
        "state": session.state,
        "results": results,
        "tasks": {name: task.hash for name, task in session.tasks.items()},
        "aborts": aborts,
        "excluded": set(session.excluded),
        "ready": dict(session.ready_for),
        "live": None if live is None else live.number,
        "descriptor": None if live is None else live.descriptor,
        "phase": None if live is None else live.server.phase,
        "left": set() if live is None else set(live.left),
        "accepted": accepted,
    }
