"""A proxy on the line between silos and coordinator, which keeps the bytes as they are sent."""

from __future__ import annotations

import socket
import threading
from contextlib import suppress
from pathlib import Path


class Line:
    """A TCP proxy that keeps what goes through it, in a file for each direction.

    Args:
        port: of the coordinator.
        directory: for the files.
    """

    def __init__(self, port: int, directory: Path) -> None:
        self._to, self._directory = port, directory
        directory.mkdir()
        self._server = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._server.getsockname()[1]
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    def _accept(self) -> None:
        with self._server, suppress(OSError):
            while True:
                near, _ = self._server.accept()
                path = self._directory / str(len(self._threads))
                thread = threading.Thread(target=self._carry, args=(near, path), daemon=True)
                self._threads.append(thread)
                thread.start()

    def _carry(self, near: socket.socket, path: Path) -> None:
        with near, suppress(OSError), socket.create_connection(("127.0.0.1", self._to)) as far:
            up = threading.Thread(target=_pump, args=(near, far, path.with_suffix(".up")))
            up.start()
            _pump(far, near, path.with_suffix(".down"))
            up.join()

    def close(self) -> None:
        """End, once both ends of every connection have."""
        self._server.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()


def _pump(source: socket.socket, sink: socket.socket, path: Path) -> None:
    with path.open("wb", buffering=0) as file, suppress(OSError):
        while data := source.recv(65536):
            file.write(data)
            sink.sendall(data)
    for end in (source, sink):
        with suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)
