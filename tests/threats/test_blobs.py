"""What silos hand each other as sealed bytes: initial weights.

The silos are the SDK's own functions; the coordinator is a ``Desk``, which keeps whatever it is
given and says what a test has it say. ``own`` makes a silo's end of the session, with the key or,
as in a session that does not seal, without one.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from safetensors import SafetensorError
from safetensors.numpy import load, save

from client_sdk import keys as sdk_keys
from client_sdk import tasks as sdk_tasks
from client_sdk.channel import Channel
from client_sdk.keys import Keys
from client_sdk.membership import Membership
from client_sdk.tasks import Tasks, own_opening
from secagg.ckks.keyring import make_key, seal_blob
from secagg.config import SiloId
from secagg.crypto.digest import vector_digest
from secagg.crypto.labels import WEIGHTS
from secagg.disk import Disk
from secagg.encoding.schema import Schema
from secagg.errors import ConfigError, FaultyClientOrServer
from secagg.masking import transcript
from secagg.simulation import TASK, Federation
from secagg.suite import Suite
from secagg.wire._pb import service_pb2 as api
from secagg.wire.session import SignedOpening, opening_from_wire, opening_to_wire

from .harness import FOUR, A, B, nothing, refused, weakened

MODEL = {"x": np.arange(6, dtype=np.float32)}
WEIGHTS_FILE = save(MODEL)
OTHERS_FILE = save({"x": np.full(6, 9, np.float32)})
PLACE = api.Blob(weights=TASK)


@pytest.fixture(autouse=True)
def _brisk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sdk_keys, "_PAUSE_SECONDS", 0.0)


class Desk:
    """The coordinator, as far as blobs go."""

    def __init__(self, federation: Federation) -> None:
        self.chunk = federation.session.chunk_bytes
        self.blobs: dict[str, bytearray] = {}
        self.opening: api.TaskOpening | None = None

    def call(self, method: str, request: Any, kind: type, *, seconds: float = 0.0) -> Any:
        return getattr(self, f"_{method}")(request)

    def call_many(self, method: str, requests: Iterable[Any], kind: type) -> None:
        for request in requests:
            self.call(method, request, kind)

    def each(self, method: str, requests: Iterable[Any], kind: type) -> Iterator[Any]:
        for request in requests:
            yield self.call(method, request, kind)

    def put(self, blob: api.Blob, data: bytes | bytearray) -> bytes:
        """Put bytes in a blob's place; returns their digest."""
        self.blobs[str(blob)] = bytearray(data)
        return vector_digest(bytes(data), self.chunk)

    def _PutChunk(self, request: api.PutChunkRequest) -> api.Ack:
        data = self.blobs.setdefault(str(request.blob), bytearray())
        data[request.offset :] = request.data
        return api.Ack()

    def _GetChunk(self, request: api.GetChunkRequest) -> api.GetChunkReply:
        data = self.blobs[str(request.blob)]
        return api.GetChunkReply(data=bytes(data[request.offset : request.offset + self.chunk]))

    def _OpenTask(self, request: api.OpenTaskRequest) -> api.OpenTaskReply:
        if self.opening is None:
            return api.OpenTaskReply(propose=True)
        return api.OpenTaskReply(opening=self.opening)

    def _ProposeTask(self, request: api.ProposeTaskRequest) -> api.Ack:
        self.opening = request.opening
        return api.Ack()

    def _AskKey(self, request: api.AskKeyRequest) -> api.AskKeyReply:
        return api.AskKeyReply(epoch=request.request.epoch)  # nobody has another key


@dataclass
class End:
    """One silo's end of the session."""

    membership: Membership
    channel: Channel
    keys: Keys
    tasks: Tasks


def own(desk: Desk, federation: Federation, name: SiloId, *, sealing: bool = True) -> End:
    silo, channel = federation.silo(name), cast(Channel, desk)
    member = silo.member
    session_hash = transcript.session_hash(member.session)
    bound = transcript.opening_transcript(session_hash, member.session_id)
    membership = cast(
        Membership,
        SimpleNamespace(
            member=member,
            session_hash=session_hash,
            opening_transcript=bound,
            refresh=lambda: member,
        ),
    )
    keys = Keys(Suite.CKKS_54, membership, channel, silo.ledger, None, os.urandom)
    assert federation.key is not None
    keys._take((federation.key,), A)
    held = keys if sealing else None
    nowhere = cast(Disk, SimpleNamespace(read=nothing, replace=nothing))
    return End(membership, channel, keys, Tasks(membership, channel, silo.ledger, held, nowhere))


def consortium() -> Federation:
    return Federation(FOUR, "ckks+masked")


# Initial weights.


def proposing(
    desk: Desk, federation: Federation, *, sealing: bool = True, sealed: bytes = b""
) -> None:
    """A proposes its weights; with ``sealed``, it signs them and seals these."""
    opening = own_opening(TASK, Schema.of(MODEL), "", WEIGHTS_FILE, desk.chunk)
    end = own(desk, federation, A, sealing=sealing)
    with pytest.MonkeyPatch.context() as patch:
        if sealed:
            real = end.keys.seal_blob
            patch.setattr(
                end.keys, "seal_blob", lambda label, parties, _: real(label, parties, sealed)
            )
        end.tasks.open(opening, WEIGHTS_FILE, judge_step=False)


def adopted(desk: Desk, federation: Federation, *, sealing: bool = True) -> bytes:
    """What B starts from."""
    end = own(desk, federation, B, sealing=sealing)
    end.tasks.meet(TASK)
    return bytes(end.tasks.initial_weights(TASK))


def test_weights_read_by_the_coordinator() -> None:
    """Unsealed, the bytes at the coordinator are a model's file; sealed, they are none."""

    def attack(*, sealing: bool) -> dict[str, Any]:
        federation = consortium()
        desk = Desk(federation)
        proposing(desk, federation, sealing=sealing)
        assert adopted(desk, federation, sealing=sealing) == WEIGHTS_FILE
        return load(bytes(desk.blobs[str(PLACE)]))

    assert np.array_equal(attack(sealing=False)["x"], MODEL["x"])
    with pytest.raises(SafetensorError):
        attack(sealing=True)


def test_weights_that_go_unsealed() -> None:
    """A proposer that does not seal, by its own will or its coordinator's: the others see it."""
    federation = consortium()
    desk = Desk(federation)
    proposing(desk, federation, sealing=False)
    assert adopted(desk, federation, sealing=False) == WEIGHTS_FILE
    with refused("task-sealed"):
        adopted(desk, federation)


def test_weights_changed_by_the_coordinator() -> None:
    """Its own weights in the place of A's: where nothing is sealed or signed, B starts from them;
    where blobs are sealed, it has no key to make one; and both are signed.
    """

    def attack(*, sealing: bool) -> bytes:
        federation = consortium()
        desk = Desk(federation)
        proposing(desk, federation, sealing=sealing)
        assert desk.opening is not None
        signed = opening_from_wire(desk.opening)
        guess = make_key(bytes(32), 1, federation.manifest.silos, os.urandom)
        data = seal_blob(guess, WEIGHTS, (TASK,), OTHERS_FILE, os.urandom)
        digest = desk.put(PLACE, data if sealing else OTHERS_FILE)
        planted = replace(
            signed,
            opening=replace(signed.opening, weights_digest=vector_digest(OTHERS_FILE, desk.chunk)),
            weights_bytes=len(desk.blobs[str(PLACE)]),
            sealed_digest=digest if sealing else b"",
        )
        desk.opening = opening_to_wire(planted)
        return adopted(desk, federation, sealing=sealing)

    with weakened(SignedOpening, "verify", nothing):
        assert attack(sealing=False) == OTHERS_FILE
        with refused("key-gone", ConfigError):
            attack(sealing=True)
    with refused("task-signature"):
        attack(sealing=True)


def test_weights_altered_on_their_way() -> None:
    """One bit of the blob: without digests it is the seal that does not open."""
    federation = consortium()
    desk = Desk(federation)
    proposing(desk, federation)
    desk.blobs[str(PLACE)][-1] ^= 1

    def undigested(channel: Any, member: Any, blob: api.Blob, *_: Any) -> bytearray:
        return bytearray(desk.blobs[str(blob)])

    def unsealed(*_: Any) -> bytearray:
        return bytearray(OTHERS_FILE)

    def digested(*_: Any) -> bytes:
        assert desk.opening is not None
        return desk.opening.weights_digest

    with weakened(sdk_tasks, "download", undigested):
        with refused("key-gone", ConfigError):
            adopted(desk, federation)
        with weakened(Keys, "open_blob", unsealed), weakened(sdk_tasks, "vector_digest", digested):
            assert adopted(desk, federation) == OTHERS_FILE
    with refused("result-digest"):
        adopted(desk, federation)


def test_weights_sealed_other_than_signed() -> None:
    """The proposer signs one file and seals another, so that tasks' hashes say nothing of it."""

    def attack() -> bytes:
        federation = consortium()
        desk = Desk(federation)
        proposing(desk, federation, sealed=OTHERS_FILE)
        return adopted(desk, federation)

    agreed = own_opening(TASK, Schema.of(MODEL), "", WEIGHTS_FILE, 2**20).weights_digest
    real = sdk_tasks.vector_digest

    def believing(data: Any, chunk: int) -> bytes:
        return agreed if bytes(data) == OTHERS_FILE else real(data, chunk)

    with weakened(sdk_tasks, "vector_digest", believing):
        assert attack() == OTHERS_FILE
    with refused("weights-digest", FaultyClientOrServer):
        attack()
