"""Requests of honest members, as they were sent, and requests that are nearly right."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from random import Random
from typing import Any

import grpc
from google.protobuf.message import DecodeError, Message

from client_sdk import channel as sdk_channel
from secagg.coordinator.calls import METHODS
from secagg.pki.names import Role
from secagg.wire._pb import service_pb2 as api

from .mutations import Pool, filled, mutated

SENDERS = frozenset({"sender", "proposer", "silo"})
"""Fields that name who sends a message."""
NAMES = {api.JoinSessionRequest: "session", api.ShowSessionRequest: "name"}
"""Fields that name a session."""
FIRST = 400
"""Recorded requests of a method that are kept from the beginning."""


@dataclass(frozen=True, slots=True)
class Call:
    """A request as it was sent."""

    method: str
    data: bytes


class Recorder(grpc.UnaryUnaryClientInterceptor):  # type: ignore[misc]
    """Keeps the requests that go through channels: the first of each method, and the last."""

    def __init__(self) -> None:
        self.first: dict[str, list[bytes]] = defaultdict(list)
        self._last = {name: deque[bytes](maxlen=8) for name in METHODS}

    def intercept_unary_unary(self, continuation: Any, details: Any, request: Any) -> Any:
        """Keep a request, and let it go."""
        name, data = details.method.rpartition("/")[2], request.SerializeToString()
        self._last[name].append(data)
        if len(self.first[name]) < FIRST:
            self.first[name].append(data)
        return continuation(details, request)

    def choose(self, name: str, random: Random) -> bytes | None:
        """A request of a method, every other time one of the last."""
        last = list(self._last[name])
        if last and random.random() < 0.5:
            return random.choice(last)
        return random.choice(self.first[name]) if self.first[name] else None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Have all channels of the SDK that are opened meanwhile go through here."""
        dial = sdk_channel._dial
        sdk_channel._dial = lambda *to: grpc.intercept_channel(dial(*to), self)
        try:
            yield
        finally:
            sdk_channel._dial = dial


class Mutator:
    """Requests that are nearly right.

    Args:
        seed: of all choices; what there is to choose from depends on time, too.
        recorder: of honest requests.
        sender: whose certificate silos' calls are made under.
        honest: names of the sessions that no admin is to end.
        session_ids: of these sessions.
    """

    def __init__(
        self,
        seed: int,
        recorder: Recorder,
        sender: str,
        honest: set[str],
        session_ids: list[bytes],
    ) -> None:
        self._random = Random(seed)
        self._recorder, self._sender = recorder, sender
        self._honest, self._session_ids = honest, session_ids
        announced = recorder.first["AnnounceKey"]
        self._keys = [api.AnnounceKeyRequest.FromString(data).key for data in announced]
        self._pool = Pool()
        for name, calls in recorder.first.items():
            for data in calls:
                self._pool.add_bytes(request_type(name), data)

    def next(self) -> tuple[Role, Call]:
        """A call, and who makes it: mostly who may."""
        random = self._random
        while True:
            name = random.choice(list(METHODS))
            role = METHODS[name].role
            if random.random() < 0.04:
                role = Role.SILO if role is Role.ADMIN else Role.ADMIN
            call = Call(name, self._data(name))
            if not (name == "AbortSession" and self._names_honest(call.data)):
                return role, call

    def _data(self, name: str) -> bytes:
        random = self._random
        of = random.choice(list(METHODS)) if random.random() < 0.08 else name
        kind, data = request_type(of), self._recorder.choose(of, random)
        if data is None or random.random() < 0.1:
            return self._admitted(filled(kind(), self._pool, random).SerializeToString(), kind)
        if random.random() < 0.1:
            return data
        return self._admitted(mutated(kind, data, self._pool, random), kind)

    def _admitted(self, data: bytes, kind: type[Message]) -> bytes:
        """Mostly, have a request name a session that there is, its own sender, and a key.

        Else nearly all would be refused at the door.
        """
        random, fields = self._random, kind.DESCRIPTOR.fields_by_name
        try:
            message: Any = kind.FromString(data)
        except DecodeError:
            return data
        if random.random() < 0.2:
            return data
        if kind in NAMES:
            setattr(message, NAMES[kind], random.choice(sorted(self._honest)))
        if "session_id" not in fields:
            return bytes(message.SerializeToString())
        if message.session_id not in self._session_ids:
            message.session_id = random.choice(self._session_ids)
        if "key" in fields and self._keys and random.random() < 0.5:
            message.key.CopyFrom(random.choice(self._keys))
        for held, inner in message.ListFields():
            if held.message_type is not None and not held.is_repeated:
                for name in SENDERS & set(held.message_type.fields_by_name.keys()):
                    setattr(inner, name, self._sender)
        return bytes(message.SerializeToString())

    def _names_honest(self, data: bytes) -> bool:
        try:
            return api.AbortSessionRequest.FromString(data).name in self._honest
        except DecodeError:
            return False


def request_type(method: str) -> type[Message]:
    for service in api.DESCRIPTOR.services_by_name.values():
        if method in service.methods_by_name:
            kind: type[Message] = getattr(api, service.methods_by_name[method].input_type.name)
            return kind
    raise LookupError(method)
