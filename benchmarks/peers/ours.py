"""Our side of the comparisons: the product's own functions, fed by its own simulation."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar
from unittest.mock import patch

import numpy as np

from benchmarks.peers import timed
from secagg.config import Clip, MaskPrg, Phase, RingBits, SiloId, TaskConfig, Weighting
from secagg.crypto.digest import vector_digest
from secagg.crypto.keys import KeyPair
from secagg.crypto.secret import Secret
from secagg.encoding.codec import Codec
from secagg.encoding.schema import Schema
from secagg.masking import server as core
from secagg.masking.masks import pair_mask, self_mask
from secagg.masking.messages import (
    Dealt,
    Descriptor,
    MaskedInput,
    Result,
    Roster,
    Signatures,
    Survivors,
)
from secagg.masking.server import ClientMessage, Opening, ServerRound
from secagg.ring.expand import Mask, apply_masks
from secagg.ring.vectors import Vector, ring_of
from secagg.ring.words import Held
from secagg.simulation import TASK, Federation, Lie, Script
from secagg.wire import attempt as wire
from secagg.wire._pb import service_pb2 as api
from secagg.wire.chunks import PutChunkRequest

M = TypeVar("M")
PRG = MaskPrg.AES_128_CTR
WEIGHT = 1000.0
TO_WIRE: dict[type, Any] = {
    Descriptor: (wire.descriptor_to_wire, wire.descriptor_from_wire),
    Roster: (wire.roster_to_wire, wire.roster_from_wire),
    Dealt: (wire.dealt_to_wire, wire.dealt_from_wire),
    Survivors: (wire.survivors_to_wire, wire.survivors_from_wire),
    Signatures: (wire.signatures_to_wire, wire.signatures_from_wire),
    Result: (wire.result_to_wire, wire.result_from_wire),
}


# ---- one client


class Client:
    """One of n clients, with everybody's keys: what it does to its vector."""

    def __init__(self, n: int, size: int, ring_bits: RingBits = 32) -> None:
        task = TaskConfig(TASK, Weighting.MEAN, 1, 1.0, Clip.NONE, WEIGHT, ring_bits)
        self._tau1 = os.urandom(32)
        self._key, self._seed = KeyPair.generate(os.urandom), Secret(os.urandom(32))
        self._peers = {
            SiloId(f"silo-{i:02}"): KeyPair.generate(os.urandom).public for i in range(1, n)
        }
        self._codec = Codec(task, Schema.of({"w": np.empty(size, np.float32)}), n)

    def send(self, update: np.ndarray) -> Vector:
        """Agree on the masks' keys, encode an update and mask it: what Flower times, too."""
        return self._codec.encode(
            {"w": update},
            weight=WEIGHT,
            metrics={},
            entropy=os.urandom,
            masks=self._masks(),
            threads=1,
        )

    def check(self, vector: Vector, update: np.ndarray) -> None:
        """Its masks taken off, it is the update."""
        inverse = [mask.inverse() for mask in self._masks()]
        apply_masks(self._codec.ring, vector, inverse, PRG, threads=1)
        opened = self._codec.decode(vector).tensors["w"]
        assert np.abs(opened - update).max() <= 2.0**-self._codec.bits

    def digest_seconds(self, vector: Vector) -> float:
        """What hashing the vector for its signature takes."""
        data = self._codec.ring.pack(vector)
        return min(timed(lambda: vector_digest(data, 2**20))[0] for _ in range(3))

    def _masks(self) -> list[Mask]:
        me = SiloId("silo-00")
        pairs = [
            pair_mask(self._key, me, peer, key, self._tau1, PRG)
            for peer, key in self._peers.items()
        ]
        return [self_mask(self._seed, me, self._tau1, PRG), *pairs]


# ---- the server alone


@dataclass(frozen=True, slots=True)
class Hashed(Held):
    """A vector that was hashed as it arrived."""

    known: bytes

    def digest(self) -> bytes:
        """What was found then."""
        return self.known


class Recording:
    """A simulated round's messages, to be given to a server again."""

    def __init__(self, updates: Mapping[str, np.ndarray], dropped: set[str]) -> None:
        self._federation = Federation(list(updates))
        self._sent: dict[Phase, list[tuple[ClientMessage, Vector | None]]] = {p: [] for p in Phase}
        self._descriptor: Descriptor | None = None
        phases: list[Phase] = list(Phase)
        script = Script(
            dict.fromkeys(dropped, Phase.MASKED_INPUT),
            lies={(name, p): partial(self._keep, p) for name in updates for p in phases},
            tamper=self._see,
        )
        tensors = {name: {"w": update} for name, update in updates.items()}
        self.result = self._federation.run_round(tensors, script=script)
        self.digest_seconds, self.signature_seconds = 0.0, 0.0

    def _keep(
        self, phase: Phase, message: ClientMessage, vector: Vector | None
    ) -> tuple[ClientMessage, Vector | None]:
        self._sent[phase].append((message, vector))
        return message, vector

    def _see(self, _: SiloId, told: M) -> M:
        if isinstance(told, Descriptor):
            self._descriptor = told
        return told

    def opening(self) -> Opening:
        """What the coordinator fixed when it opened the attempt."""
        federation, about = self._federation, self._descriptor
        assert about is not None
        return Opening(
            federation.session,
            about.session_id,
            federation.manifest,
            TASK,
            about.round,
            about.attempt,
            about.base,
            about.cohort,
            len(self.result.total),
        )

    def replay(self) -> Vector:
        """The server's part, all of it; its digests and its checks of signatures timed apart."""
        assert self._descriptor is not None
        server = ServerRound(self.opening(), self._descriptor, self._federation.identity)
        self.digest_seconds, self.signature_seconds = 0.0, 0.0
        with (
            patch.object(core, "chunk_digests", partial(self._hash, core.chunk_digests)),
            patch.object(core, "verify", partial(self._verify, core.verify)),
        ):
            for phase in Phase:
                for message, vector in self._sent[phase]:
                    server.accept(message, self._arrived(message, vector))
                server.close_phase()
        assert server.total is not None
        return server.total

    def _hash(self, digests: Any, data: memoryview, chunk_bytes: int) -> tuple[bytes, ...]:
        seconds, found = timed(partial(digests, data, chunk_bytes))
        self.digest_seconds += seconds
        made: tuple[bytes, ...] = found
        return made

    def _verify(self, verify: Any, *signed: Any) -> None:
        self.signature_seconds += timed(partial(verify, *signed))[0]

    def _arrived(self, message: ClientMessage, vector: Vector | None) -> Hashed | None:
        if vector is None or not isinstance(message, MaskedInput):
            return None
        return Hashed(vector, message.vector_digest)

    def arrival_seconds(self) -> float:
        """What hashing all vectors as they arrive takes: every one is what was signed."""
        session, seconds = self._federation.session, 0.0
        ring = ring_of(session, TASK)
        for message, vector in self._sent[Phase.MASKED_INPUT]:
            assert isinstance(message, MaskedInput)
            assert vector is not None
            took, found = timed(partial(vector_digest, ring.pack(vector), session.chunk_bytes))
            assert found == message.vector_digest
            seconds += took
        return seconds


# ---- a whole round whose messages cross as bytes


@dataclass
class Wire:
    """Has every message of a simulated round serialised and parsed as the shells do.

    Args:
        federation: whose round.
        sent: bytes up by silo; each chunk of a vector is a request of its own.
    """

    federation: Federation
    sent: dict[str, int] = field(default_factory=dict)

    def script(self, names: list[str], drops: Mapping[str, str]) -> Script:
        """A script in which nobody lies."""
        self.sent = dict.fromkeys(names, 0)
        up: Lie = self._up
        lies = {(name, phase): up for name in names for phase in Phase}
        return Script(drops, lies=lies, tamper=self._down)

    def _up(
        self, message: ClientMessage, vector: Vector | None
    ) -> tuple[ClientMessage, Vector | None]:
        session_id = self.federation.silo(message.sender).member.session_id
        if vector is not None:
            vector = self._upload(session_id, message.sender, vector)
        data = wire.client_message_to_wire(
            message, session_id=session_id, round_number=1, attempt=1
        ).SerializeToString()
        self.sent[message.sender] += len(data)
        return wire.client_message_from_wire(api.SendRequest.FromString(data)), vector

    def _upload(self, session_id: bytes, sender: str, vector: Vector) -> Vector:
        ring = ring_of(self.federation.session, TASK)
        packed, size = ring.pack(vector), self.federation.session.chunk_bytes
        blob = api.Blob(vector=api.Blob.Vector(round=1, attempt=1))
        arrived = bytearray(len(packed))
        for offset in range(0, len(packed), size):
            head = api.PutChunkRequest(
                session_id=session_id, blob=blob, offset=offset, total=len(packed)
            )
            data = PutChunkRequest(head, packed[offset : offset + size]).SerializeToString()
            self.sent[sender] += len(data)
            chunk = PutChunkRequest.FromString(data)
            arrived[chunk.offset : chunk.offset + len(chunk.data)] = chunk.data
        return ring.unpack(arrived, len(vector))

    def _down(self, _: SiloId, told: M) -> M:
        pack, parse = TO_WIRE[type(told)]
        message = pack(told)
        parsed: M = parse(type(message).FromString(message.SerializeToString()))
        return parsed
