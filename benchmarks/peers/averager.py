"""A coordinator that is trusted with every update: what a masked round is held against.

It takes float32 vectors in chunks, adds each up when it is complete, and serves the mean to all,
over the product's own TLS, contract and chunks. A benchmark's harness: the product has no such
mode. It writes nothing down.

    python -m benchmarks.peers.averager CREDENTIALS SILOS PORT_FILE
"""

from __future__ import annotations

import asyncio
import os
import sys
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from secagg.coordinator.launch import CIPHER_SUITES

os.environ["GRPC_SSL_CIPHER_SUITES"] = CIPHER_SUITES  # read when grpc is first imported

import grpc
import numpy as np

from benchmarks.peers.silo import CHUNK_BYTES
from secagg.coordinator.tls import ServerCertificate
from secagg.pki.credentials import load_credentials
from secagg.pki.names import Role
from secagg.wire._pb import service_pb2 as api
from secagg.wire.chunks import GetChunkReply, PutChunkRequest


@dataclass
class Round:
    """One round's vectors while they come in, and their mean."""

    silos: int
    incoming: dict[bytes, bytearray] = field(default_factory=dict)
    missing: dict[bytes, int] = field(default_factory=dict)
    total: np.ndarray | None = None
    added: int = 0
    mean: memoryview | None = None
    ready: asyncio.Event = field(default_factory=asyncio.Event)

    def put(self, request: PutChunkRequest) -> None:
        """Take a chunk; with a vector's last, add it up."""
        silo = request.session_id
        if silo not in self.missing:
            self.incoming[silo], self.missing[silo] = bytearray(request.total), request.total
        at, data = request.offset, request.data
        self.incoming[silo][at : at + len(data)] = data
        self.missing[silo] -= len(data)
        if not self.missing[silo]:
            self._add(np.frombuffer(self.incoming.pop(silo), np.float32))

    def _add(self, vector: np.ndarray) -> None:
        self.added += 1
        if self.total is None:
            self.total = vector.copy()
        else:
            self.total += vector
        if self.added == self.silos:
            self.total /= self.silos
            self.mean = memoryview(self.total).cast("B")
            self.ready.set()


class Averager:
    """The two methods of the contract that it takes."""

    def __init__(self, silos: int) -> None:
        self._silos = silos
        self._rounds: dict[int, Round] = {}

    def _round(self, number: int) -> Round:
        if number not in self._rounds:
            self._rounds = {n: r for n, r in self._rounds.items() if n >= number - 1}
            self._rounds[number] = Round(self._silos)
        return self._rounds[number]

    async def put(self, request: PutChunkRequest, _: Any) -> api.Ack:
        """PutChunk."""
        self._round(request.blob.vector.round).put(request)
        return api.Ack()

    async def get(self, request: api.GetChunkRequest, _: Any) -> GetChunkReply:
        """GetChunk; waits for the mean."""
        found = self._round(request.blob.sum)
        await found.ready.wait()
        assert found.mean is not None
        return GetChunkReply(found.mean[request.offset : request.offset + CHUNK_BYTES])

    def handler(self) -> grpc.GenericRpcHandler:
        """Both, for a server."""
        methods = {
            "PutChunk": (self.put, PutChunkRequest),
            "GetChunk": (self.get, api.GetChunkRequest),
        }
        return grpc.method_handlers_generic_handler(
            api.DESCRIPTOR.services_by_name["Aggregation"].full_name,
            {
                name: grpc.unary_unary_rpc_method_handler(
                    method,
                    request_deserializer=kind.FromString,
                    response_serializer=lambda reply: reply.SerializeToString(),
                )
                for name, (method, kind) in methods.items()
            },
        )


async def serve(credentials: Path, silos: int, port_file: Path) -> None:
    """Serve until killed."""
    loaded = load_credentials(credentials, now=datetime.now(UTC), role=Role.COORDINATOR)
    server = grpc.aio.server(options=[("grpc.max_receive_message_length", 2 * CHUNK_BYTES)])
    server.add_generic_rpc_handlers((Averager(silos).handler(),))
    port = server.add_secure_port("127.0.0.1:0", ServerCertificate(loaded).credentials())
    await server.start()
    temporary = port_file.with_suffix(".tmp")
    temporary.write_text(str(port))
    temporary.replace(port_file)
    await server.wait_for_termination()


if __name__ == "__main__":
    asyncio.run(serve(Path(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])))
