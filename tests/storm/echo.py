"""The floor: a server of gRPC that does nothing but mutual TLS and returning what it got."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from secagg.coordinator.launch import CIPHER_SUITES

os.environ["GRPC_SSL_CIPHER_SUITES"] = CIPHER_SUITES  # read when grpc is first imported

import grpc

from benchmarks.memory import resident

from . import helper


class Echo(grpc.GenericRpcHandler):
    """Serves every path."""

    def service(self, _: grpc.HandlerCallDetails) -> Any:
        return grpc.unary_unary_rpc_method_handler(self._echo)

    async def _echo(self, request: bytes, _: Any) -> bytes:
        return request


async def serve(spec: dict[str, Any], ready: Callable[[], None], stop: threading.Event) -> Any:
    """Serve until told."""
    key, certificate, root = (Path(spec[name]).read_bytes() for name in ("key", "pem", "root"))
    server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
    server.add_generic_rpc_handlers((Echo(),))
    port = server.add_secure_port(
        "127.0.0.1:0", grpc.ssl_server_credentials([(key, certificate)], root, True)
    )
    await server.start()
    Path(spec["port_file"]).write_text(str(port))
    ready()
    await asyncio.to_thread(stop.wait)
    await server.stop(0.1)
    return {"peak_bytes": resident("VmHWM")}


if __name__ == "__main__":
    helper.main(lambda spec, ready, stop: asyncio.run(serve(spec, ready, stop)))
