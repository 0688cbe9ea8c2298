"""A coordinator without a network: duck-typed in ``Channel``'s place, honest until told otherwise.

It holds the real coordinator's identity key, so a test can have it sign whatever it likes.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from google.protobuf.message import Message

import client_sdk
from client_sdk.session import Session
from secagg.ckks.codec import codec_of
from secagg.ckks.custody import Custodian, wrap
from secagg.ckks.keyring import HeldKey, Keyring, make_key
from secagg.ckks.sealing import Sealer
from secagg.config import SessionConfig, silo_id
from secagg.crypto.digest import vector_digest
from secagg.crypto.labels import SIGN_DESCRIPTOR, SIGN_RESULT
from secagg.crypto.sign import IdentityKey
from secagg.encoding.codec import Codec
from secagg.masking import transcript
from secagg.masking.messages import SEED_BYTES, Descriptor, Result
from secagg.pki.credentials import Keys, read_keys
from secagg.pki.names import Role
from secagg.ring.vectors import Vector
from secagg.suite import KeyName
from secagg.wire import attempt as wire
from secagg.wire import custody as wire_custody
from secagg.wire import session as wire_session
from secagg.wire._pb import service_pb2 as api

from .federation import Federation

SESSION_ID = b"\x51" * 32
Handler = Callable[[Any], Message]


class MemoryDisk:
    """A ``secagg.disk.Disk`` as far as silos use one, that outlives whoever writes to it."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}

    def read(self, name: str) -> bytes | None:
        return self.files.get(name)

    def append(self, name: str, data: bytes) -> None:
        self.files[name] = self.files.get(name, b"") + data

    def replace(self, name: str, *parts: bytes | memoryview) -> None:
        self.files[name] = b"".join(parts)

    def truncate(self, name: str, size: int) -> None:
        self.files[name] = self.files[name][:size]

    def remove(self, name: str) -> None:
        for found in [*self.names(name), name]:
            self.files.pop(found, None)

    def names(self, folder: str = "") -> list[str]:
        return sorted(name for name in self.files if name.startswith(f"{folder}/" * bool(folder)))


class FakeChannel:
    """What one silo hears.

    Args:
        federation: whose keys and manifest.
        config: the session.
    """

    def __init__(self, federation: Federation, config: SessionConfig) -> None:
        root = federation.consortium.root
        self.keys: Keys = read_keys(root / "coordinator", Role.COORDINATOR)
        self.manifest = federation.consortium.authority.signed_manifest
        self.config = config
        self.session_hash = transcript.session_hash(config)
        self.history = transcript.first_history(self.session_hash)
        self.calls: list[tuple[str, Any]] = []
        self.events: list[api.NextReply | Callable[[], api.NextReply]] = []
        self.openings: dict[str, api.TaskOpening] = {}
        self.blobs: dict[str, bytearray] = {}
        self.results: list[Result] = []
        self.closed = False
        self.lies: dict[str, Handler] = {}
        self.root = root
        self.authority_key = federation.consortium.authority.key_pem
        self.epoch = 1
        self.key: HeldKey | None = None
        self.wishes: list[api.KeyRequest] = []

    @property
    def methods(self) -> list[str]:
        """Names of the methods that were called."""
        return [method for method, _ in self.calls]

    def call(
        self, method: str, request: Message, kind: type[Message], *, seconds: float = 0.0
    ) -> Message:
        assert not self.closed
        self.calls.append((method, request))
        handler: Handler = self.lies.get(method) or getattr(self, f"_{method}")
        reply = handler(request)
        assert isinstance(reply, kind)
        return reply

    def call_many(self, method: str, requests: Iterable[Message], kind: type[Message]) -> None:
        for request in requests:
            self.call(method, request, kind)

    def each(self, method: str, requests: Iterable[Any], kind: type) -> Iterator[Any]:
        for request in requests:
            yield self.call(method, request, kind)

    def once(self, method: str, request: Message, *, seconds: float) -> None:
        self.call(method, request, api.Ack)

    def close(self) -> None:
        self.closed = True

    def _JoinSession(self, request: api.JoinSessionRequest) -> api.JoinSessionReply:
        return api.JoinSessionReply(
            session_id=SESSION_ID,
            config=wire_session.config_to_wire(self.config),
            manifest=self.manifest.to_json(),
        )

    def _OpenTask(self, request: api.OpenTaskRequest) -> api.OpenTaskReply:
        if request.task in self.openings:
            return api.OpenTaskReply(opening=self.openings[request.task])
        return api.OpenTaskReply(propose=True)

    def _ProposeTask(self, request: api.ProposeTaskRequest) -> api.Ack:
        self.openings[request.opening.task] = request.opening
        return api.Ack()

    def _PutChunk(self, request: api.PutChunkRequest) -> api.Ack:
        name = str(request.blob)
        self.blobs.setdefault(name, bytearray(request.total))[
            request.offset : request.offset + len(request.data)
        ] = request.data
        return api.Ack()

    def _GetChunk(self, request: api.GetChunkRequest) -> api.GetChunkReply:
        data = self.blobs[str(request.blob)]
        return api.GetChunkReply(
            data=bytes(data[request.offset : request.offset + self.config.chunk_bytes])
        )

    def _Ready(self, request: api.ReadyRequest) -> api.Ack:
        return api.Ack()

    def _Leave(self, request: api.LeaveRequest) -> api.Ack:
        return api.Ack()

    def _Send(self, request: api.SendRequest) -> api.Ack:
        return api.Ack()

    def _Next(self, request: api.NextRequest) -> api.NextReply:
        event = self.events.pop(0)
        return event if isinstance(event, api.NextReply) else event()

    def _ListResults(self, request: api.ListResultsRequest) -> api.ListResultsReply:
        page = self.results[request.after :]
        return api.ListResultsReply(results=[wire.result_to_wire(result) for result in page])

    # The key's desk, and the silos beyond it.

    def _AskKey(self, request: api.AskKeyRequest) -> api.AskKeyReply:
        if request.request.epoch != self.epoch:
            return api.AskKeyReply(epoch=self.epoch)
        if self.key is None:
            return api.AskKeyReply(make=True)
        return self.box(request)

    def _AnnounceKey(self, request: api.AnnounceKeyRequest) -> api.Ack:
        return api.Ack()

    def _AwaitKeyRequests(self, request: api.AwaitKeyRequestsRequest) -> api.AwaitKeyRequestsReply:
        return api.AwaitKeyRequestsReply(requests=self.wishes)

    def _SendKeyBox(self, request: api.SendKeyBoxRequest) -> api.Ack:
        return api.Ack()

    def _EndKey(self, request: api.EndKeyRequest) -> api.Ack:
        return api.Ack()

    def custodian(self, silo: str) -> Custodian:
        """Another silo, which is honest."""
        identity = read_keys(self.root / silo, Role.SILO).identity
        assert identity is not None
        known = self.manifest.manifest.silos
        return Custodian(
            silo_id(silo),
            identity,
            {name: known[name] for name in self.config.silos},
            SESSION_ID,
            transcript.opening_transcript(self.session_hash, SESSION_ID),
        )

    def others_make(self, epoch: int = 1) -> HeldKey:
        """Have the other silos hold a key of an epoch."""
        self.epoch = epoch
        me = self.custodian("b")
        self.key = make_key(SESSION_ID, epoch, me.members, os.urandom)
        return self.key

    def box(
        self, request: api.AskKeyRequest, sender: str = "b", key: HeldKey | None = None
    ) -> api.AskKeyReply:
        """What another silo answers, with the key that the others hold or with this one."""
        held = key or self.key
        assert held is not None
        asked = wire_custody.request_from_wire(request.request)
        ring = Keyring(SESSION_ID).add((held,), silo_id(sender))
        box = wrap(ring, asked, self.custodian(sender), os.urandom)
        return api.AskKeyReply(box=wire_custody.box_to_wire(box))

    # What a coordinator says, honestly but for the changes.

    @property
    def identity(self) -> IdentityKey:
        assert self.keys.identity is not None
        return self.keys.identity

    def base(self, task: str) -> bytes:
        """The base of the next round of an open task."""
        signed = wire_session.opening_from_wire(self.openings[task])
        return transcript.base_of(self.history, signed.opening.digest(self.session_hash))

    def descriptor(self, task: str, /, **changes: Any) -> api.NextReply:
        """The next round's descriptor."""
        cohort = tuple(self.config.silos)
        values: dict[str, Any] = {
            "session_id": SESSION_ID,
            "session_hash": self.session_hash,
            "manifest_version": self.manifest.manifest.version,
            "manifest_digest": self.manifest.manifest.digest(),
            "task": task,
            "round": len(self.results) + 1,
            "attempt": 1,
            "nonce": os.urandom(32),
            "cohort": cohort,
            "threshold": self.config.threshold_for(max(3, len(changes.get("cohort", cohort)))),
            "base": self.base(task),
            "signature": bytes(64),
            "key": None if self.key is None else self.key.name,
        }
        unsigned = Descriptor(**values | changes)
        tau0 = transcript.round_transcript(unsigned)
        signature = self.identity.sign(SIGN_DESCRIPTOR, tau0, b"")
        signed = replace(unsigned, signature=signature)
        return api.NextReply(descriptor=wire.descriptor_to_wire(signed))

    def release(
        self, task: str, values: dict[str, np.ndarray[Any, Any]], /, **changes: Any
    ) -> Result:
        """Publish a result over three silos that all hold these values."""
        data, sealed = self._total(task, values, changes.pop("sealed_under", self.key))
        number = len(self.results) + 1
        said: dict[str, Any] = {
            "task": task,
            "round": number,
            "base": self.base(task),
            "cohort": tuple(self.config.silos),
            "survivors": tuple(self.config.silos[1:]),
            "survivors_transcript": os.urandom(32),
            "vector_digest": vector_digest(data, self.config.chunk_bytes),
            "signature": bytes(64),
        }
        unsigned = Result(**said | sealed | changes)
        tau4 = transcript.result_transcript(unsigned.survivors_transcript, unsigned.vector_digest)
        result = replace(unsigned, signature=self.identity.sign(SIGN_RESULT, tau4, unsigned.body()))
        self.results.append(result)
        self.blobs[str(api.Blob(sum=number))] = bytearray(data)
        self.history = transcript.next_history(self.history, tau4)
        return result

    def _total(
        self, task: str, values: dict[str, np.ndarray[Any, Any]], key: HeldKey | None
    ) -> tuple[memoryview, dict[str, Any]]:
        """The sum of three silos' vectors; where they are sealed, what a result says of that."""
        signed = wire_session.opening_from_wire(self.openings[task])
        codec = codec_of(self.config, task, signed.opening.schema)
        vectors: list[Vector] = []
        seeds: list[bytes] = []
        name: KeyName | None = None
        for _ in range(3):
            if isinstance(codec, Codec):
                vectors.append(codec.encode(values, weight=1.0, metrics={}, entropy=os.urandom))
                continue
            assert key is not None
            name, seed = key.name, os.urandom(SEED_BYTES)
            sealer = Sealer(codec.suite, key.material, workers=1)
            seeds.append(seed)
            vectors.append(codec.encode(values, weight=1.0, metrics={}, sealer=sealer, seed=seed))
        total = codec.ring.zeros(codec.length)
        for vector in vectors:
            codec.ring.add(total, vector)
        codec.ring.reduce(total)
        return codec.ring.pack(total), {"key": name, "seeds": tuple(seeds)}


def join_fake(
    monkeypatch: pytest.MonkeyPatch, federation: Federation, fake: FakeChannel, silo: str = "a"
) -> Session:
    """Join a session over a fake channel."""
    monkeypatch.setattr("client_sdk.session.Channel", lambda _profile: fake)
    silo_id(silo)
    return client_sdk.join(fake.config.name, profile=federation.silo(silo))
