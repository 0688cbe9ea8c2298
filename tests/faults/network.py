"""Messages between silos and the coordinator: lost, doubled, late, and cut off for a while.

``SimChannel`` is the SDK's own ``Channel`` with its gRPC stubs replaced, so retries, limits and the
translation of refusals are the product's.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import grpc
import tenacity
from google.protobuf.message import Message

from client_sdk.channel import Channel
from client_sdk.profile import Profile
from secagg.coordinator.status import CODE_KEY
from secagg.pki.names import Role
from secagg.wire._pb import service_pb2 as api

from .clock import Clock, Process
from .faults import Faults
from .witness import Trace, Witness

Status = grpc.StatusCode
SERVICES = api.DESCRIPTOR.services_by_name
TYPES: dict[str, tuple[Any, Any]] = {
    method.name: (getattr(api, method.input_type.name), getattr(api, method.output_type.name))
    for service in SERVICES.values()
    for method in service.methods
}
"""Classes of a method's request and reply, by its name."""


class Reply(NamedTuple):
    """What comes back: a message, or a status with its text and our own code."""

    status: Status
    data: bytes = b""
    text: str = ""
    code: str = ""


class SimError(grpc.RpcError):
    """What a stub raises."""

    def __init__(self, reply: Reply) -> None:
        super().__init__(reply.status)
        self._reply = reply

    def code(self) -> Status:
        return self._reply.status

    def details(self) -> str:
        return self._reply.text

    def trailing_metadata(self) -> list[_Entry]:
        return [_Entry(CODE_KEY, self._reply.code)] if self._reply.code else []


class _Entry(NamedTuple):
    key: str
    value: str


class Call:
    """One delivery of a request; a duplicate is another one, whose reply nobody hears.

    Args:
        silo: who calls, by its certificate.
        role: of that certificate.
        method: the contract's.
        data: the request.
        answer: takes the reply on its way.
    """

    def __init__(
        self, silo: str, role: Role, method: str, data: bytes, answer: Callable[[Reply], None]
    ) -> None:
        self.silo = silo
        self.role = role
        self.method = method
        self.data = data
        self.answer = answer
        self.hung_up = False


class Pending:
    """A call as its caller sees it."""

    def __init__(self, clock: Clock, process: Process) -> None:
        self.reply: Reply | None = None
        self.waited_for = False
        self.call: Call | None = None
        self._clock = clock
        self._process = process

    def settle(self, reply: Reply) -> None:
        """The first reply counts."""
        if self.reply is not None or self._process.dead:
            return
        self.reply = reply
        if self.waited_for:
            assert self._process.fiber is not None
            self._clock.resume(self._process.fiber)

    def wait(self) -> Reply:
        """Let time pass until there is a reply."""
        while self.reply is None:
            self.waited_for = True
            self._clock.wait(self._process)
        self.waited_for = False
        return self.reply


class Network:
    """All lines between silos and the coordinator.

    Args:
        clock: of the run.
        rng: draws latencies and faults.
        faults: what may happen.
        trace: told of what happens.
    """

    def __init__(self, clock: Clock, rng: random.Random, faults: Faults, trace: Trace) -> None:
        self.arrive: Callable[[Call], None] = lambda call: None
        self.cut_until: dict[str, float] = {}
        self._clock = clock
        self._rng = rng
        self._faults = faults
        self._trace = trace

    def send(self, process: Process, method: str, data: bytes, seconds: float) -> Pending:
        """Put a request on its way."""
        process.check()
        pending = Pending(self._clock, process)

        def answer(reply: Reply) -> None:
            self._back(process, pending, reply)

        call = pending.call = Call(process.actor, Role.SILO, method, data, answer)
        self._clock.after(seconds, lambda: self._time_out(pending))
        if self._lost(process.actor, method):
            self._break(pending)
        else:
            self._deliver(call)
        if self._rng.random() < self._faults.duplicate:
            self._double(process.actor, method, data)
        return pending

    def _deliver(self, call: Call) -> None:
        self._clock.after(self._latency(), lambda: self.arrive(call))

    def _double(self, silo: str, method: str, data: bytes) -> None:
        """The same request once more, perhaps much later; in quiet times nothing old arrives."""
        rng = self._rng
        delay = rng.uniform(0.0, 120.0) if rng.random() < 0.3 else rng.uniform(0.0, 2.0)
        again = Call(silo, Role.SILO, method, data, lambda reply: None)

        def come() -> None:
            if self._faults.on:
                self._trace.event(self._clock.now, silo, f"duplicate {method}")
                self._faults.count("duplicate")
                self.arrive(again)

        self._clock.after(delay, come)

    def _back(self, process: Process, pending: Pending, reply: Reply) -> None:
        if self._lost(process.actor, "a reply"):
            self._break(pending)
        else:
            self._clock.after(self._latency(), lambda: pending.settle(reply))

    def _lost(self, silo: str, what: str) -> bool:
        if self.cut_until.get(silo, 0.0) > self._clock.now:
            lost = "cut off"
        elif self._rng.random() < self._faults.loss:
            lost = "lost"
        else:
            return False
        self._faults.count(lost)
        self._trace.event(self._clock.now, silo, f"{lost}: {what}")
        return True

    def _break(self, pending: Pending) -> None:
        """What is lost is noticed at once by a reset, or by nothing but the caller's patience."""
        if self._rng.random() < 0.5:
            reset = Reply(Status.UNAVAILABLE, text="connection reset")
            self._clock.after(self._latency(), lambda: pending.settle(reset))

    def _time_out(self, pending: Pending) -> None:
        if pending.reply is None:
            assert pending.call is not None
            pending.call.hung_up = self._rng.random() < 0.9  # else a dead line, still half open
            pending.settle(Reply(Status.DEADLINE_EXCEEDED, text="Deadline Exceeded"))

    def _latency(self) -> float:
        rng = self._rng
        if rng.random() < self._faults.slow:
            self._faults.count("slow")
            return rng.uniform(0.1, 30.0)
        return rng.uniform(0.001, 0.05)


class _Stub:
    """Stands in for gRPC's callable of one method."""

    def __init__(self, channel: SimChannel, method: str) -> None:
        self._channel = channel
        self._method = method

    def __call__(self, request: Message, timeout: float) -> Message:
        return self.future(request, timeout).result()

    def future(self, request: Message, timeout: float) -> _Future:
        return _Future(self._channel, self._method, request, timeout)


class _Future:
    def __init__(self, channel: SimChannel, method: str, request: Message, timeout: float) -> None:
        self._channel = channel
        self._method = method
        self._request = request
        channel.process.check()
        channel.witness.sends(channel.process, method, request)
        data = request.SerializeToString()
        self._pending = channel.network.send(channel.process, method, data, timeout)

    def result(self) -> Message:
        channel = self._channel
        reply = self._pending.wait()
        if reply.status is not Status.OK:
            raise SimError(reply)
        message: Message = TYPES[self._method][1].FromString(reply.data)
        channel.witness.told(channel.process, self._method, self._request, message, reply.data)
        return message

    def cancel(self) -> None:
        if self._pending.call is not None:
            self._pending.call.hung_up = True


class _Closed(threading.Event):
    """Waits as tenacity sleeps: in the run's time."""

    def wait(self, timeout: float | None = None) -> bool:
        assert timeout is not None
        tenacity.nap.sleep(timeout)
        return self.is_set()


class SimChannel(Channel):
    """The SDK's channel over the simulated network."""

    def __init__(
        self, process: Process, profile: Profile, network: Network, witness: Witness
    ) -> None:
        self.process = process
        self.network = network
        self.witness = witness
        self._address = profile.coordinator
        self._reached = False
        self._closed = _Closed()

    def close(self) -> None:
        self._closed.set()

    def _check_certificate(self) -> None:
        assert not self._closed.is_set()

    def _take_up_renewal(self) -> None:
        assert not self._closed.is_set()

    def _pick_up(self, method: str) -> tuple[Any, Any]:
        return None, _Stub(self, method)

    def _put_down(self, line: Any) -> None:
        pass
