"""A silo that says wrong things and signs them: what lies behind the signatures' checks.

A silo's own SDK takes part, and before each message that it sends in an attempt come others in its
name, signed over the very same transcript. First *lies*, each wrong in one way, with the code that
it is refused with; then, in some phases, mutants of the message, any of which may be taken for its
own. The silo is out of the attempt then, or blamed, and the others go on without it.

What no coordinator can tell from an honest input is never said: a well-formed vector, or a seed of
its c1, that is another than the silo's. It would be in the sum; that is poisoning, and no fault.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from random import Random
from typing import Any

import numpy as np

from client_sdk import attempt as sdk
from secagg.crypto.digest import vector_digest
from secagg.errors import MalformedMessage
from secagg.masking import client
from secagg.masking.messages import (
    HASH_BYTES,
    SEED_BYTES,
    AdvertiseKeys,
    MaskedInput,
    ShareKeys,
    Unmasking,
)
from secagg.masking.server import ClientMessage
from secagg.ring.vectors import Vector, ring_of
from secagg.wire import attempt as wire
from secagg.wire._pb import service_pb2 as api

from .mutations import Pool, edit
from .requests import Call

MUTANTS = 6
HOW_OFTEN = 0.2
"""Of messages that are followed by mutants: most attempts are to come to their end."""
CODES = frozenset(
    {
        *("advert-keys", "share-lists", "seed-missing", "bad-dealers", "vector-digest"),
        *("residue-range", "reveal-list"),
    }
)
"""What the lies are refused with, each from behind the check of its signature."""
Say = Callable[[Call], str]
Sign = Callable[[Any], Any]


class Insider:
    """Lies in a silo's name.

    Args:
        name: the silo's.
        seed: of the mutants.
        say: sends a call under the silo's certificate, and returns its code, or "OK".

    Attributes:
        codes: what signed messages ended with, and how often.
        believed: kinds of lies that were accepted.
    """

    def __init__(self, name: str, seed: int, say: Say) -> None:
        self._name, self._say, self._random = name, say, Random(seed)
        self._pool = Pool()
        self._signers: dict[bytes, Sign] = {}
        self.codes = Counter[str]()
        self.believed: list[str] = []

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """Lie whenever the silo's SDK sends a message."""
        sign, send = client._Attempt.sign, sdk._Attempt._send

        def signed(attempt: Any, kind: str, tau: bytes, unsigned: Any) -> Any:
            message = sign(attempt, kind, tau, unsigned)
            if attempt.me == self._name:
                self._signers[message.signature] = partial(sign, attempt, kind, tau)
            return message

        def sent(attempt: Any, message: Any, vector: Vector | None) -> None:
            if message.signature in self._signers:
                _Lies(self, attempt, message, self._signers.pop(message.signature)).tell(vector)
            send(attempt, message, vector)

        client._Attempt.sign, sdk._Attempt._send = signed, sent  # type: ignore[method-assign]
        try:
            yield
        finally:
            client._Attempt.sign, sdk._Attempt._send = sign, send  # type: ignore[method-assign]

    def put(self, chunk: api.PutChunkRequest) -> None:
        """Upload a chunk."""
        self._say(Call("PutChunk", chunk.SerializeToString()))

    def lie(self, request: api.SendRequest) -> None:
        """Send what must be refused."""
        code = self._say(Call("Send", request.SerializeToString()))
        self.codes[code] += 1
        if code == "OK":
            self.believed.append(str(request.WhichOneof("message")))

    def mutant(self, request: api.SendRequest) -> ClientMessage | None:
        """Change a message, if that gives one that can be said."""
        inner = getattr(request, str(request.WhichOneof("message")))
        self._pool.add(inner)
        edit(inner, self._pool, self._random)
        inner.sender = self._name
        try:
            return wire.client_message_from_wire(request)
        except MalformedMessage:
            return None

    def chance(self, request: api.SendRequest) -> None:
        """Send what may be taken."""
        self.codes[self._say(Call("Send", request.SerializeToString()))] += 1

    @property
    def mutates(self) -> bool:
        """Whether mutants are to follow: not before every lie was told once, then at once."""
        told, taken = self.codes.keys() >= CODES, self.codes["OK"] > 0
        return told and (not taken or self._random.random() < HOW_OFTEN)


class _Lies:
    """What is said instead of one message."""

    def __init__(self, insider: Insider, attempt: Any, message: ClientMessage, sign: Sign) -> None:
        self._insider, self._message, self._sign = insider, message, sign
        self._session, self._descriptor = attempt._member.session, attempt._descriptor
        self._ring = ring_of(self._session, self._descriptor.task)
        self._place = {
            "session_id": attempt._member.session_id,
            "round_number": self._descriptor.round,
            "attempt": self._descriptor.attempt,
        }

    def tell(self, vector: Vector | None) -> None:
        """Say it all."""
        if vector is not None:
            self._upload(vector)
        for lie in lies(self._message):
            self._insider.lie(self._signed(lie))
        if vector is not None and self._session.protection.seals:
            self._overflow(vector)
            self._upload(vector)
        if self._insider.mutates:
            for _ in range(MUTANTS):
                self._mutate()

    def _signed(self, message: Any) -> api.SendRequest:
        return wire.client_message_to_wire(self._sign(message), **self._place)

    def _mutate(self) -> None:
        mutant = self._insider.mutant(self._signed(self._message))
        if isinstance(mutant, MaskedInput) and isinstance(self._message, MaskedInput):
            mutant = replace(mutant, seed=self._message.seed)
        if mutant is not None:
            self._insider.chance(self._signed(mutant))

    def _overflow(self, vector: Vector) -> None:
        """Commit to a vector whose last word is no residue."""
        beyond = vector.copy()
        beyond[-1] = np.iinfo(beyond.dtype).max
        self._upload(beyond)
        digest = vector_digest(self._ring.pack(beyond), self._session.chunk_bytes)
        self._insider.lie(self._signed(replace(self._message, vector_digest=digest)))

    def _upload(self, vector: Vector) -> None:
        data, size = bytes(self._ring.pack(vector)), self._session.chunk_bytes
        vector_of = api.Blob.Vector(round=self._descriptor.round, attempt=self._descriptor.attempt)
        for at in range(0, len(data), size):
            chunk = api.PutChunkRequest(
                session_id=self._place["session_id"],
                blob=api.Blob(vector=vector_of),
                offset=at,
                total=len(data),
                data=data[at : at + size],
            )
            self._insider.put(chunk)


def lies(message: ClientMessage) -> Iterator[ClientMessage]:
    """Messages of the same phase that must be refused, each for one reason; not yet signed."""
    match message:
        case AdvertiseKeys():
            yield replace(message, mask_key=message.channel_key)
        case ShareKeys():
            yield replace(message, boxes=message.boxes[1:])
            yield replace(message, boxes=())
        case MaskedInput():
            yield replace(message, seed=b"" if message.seed else bytes(SEED_BYTES))
            yield replace(message, bad_dealers=(message.sender,))
            yield replace(message, vector_digest=bytes(HASH_BYTES))
        case Unmasking():
            yield replace(message, shares=message.shares[1:])
            yield replace(message, shares=())
        case _:
            return
