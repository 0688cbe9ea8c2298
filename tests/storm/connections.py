"""New connections at a steady rate, all of one identity."""

from __future__ import annotations

import hashlib
import itertools
import socket
import ssl
import struct
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from hyperframe.frame import GoAwayFrame, HeadersFrame

from secagg.wire._pb import service_pb2 as api

from . import frames
from .line import AGGREGATION, HEALTH, Ready, Spec, tls

HANDS = 24
"""Connections that are being made at one time."""
CALL_EVERY = 10
"""Of so many connections, one makes a call."""
PATIENCE_SECONDS = 20.0


def connections(spec: Spec, ready: Ready, stop: threading.Event) -> dict[str, Any]:
    """Make new connections at a steady rate; each is closed once the server has let it in."""
    flood = Flood(spec, stop)
    ready()
    return flood.run()


class Flood:
    """New connections, from several hands at once: a handshake takes longer than its turn."""

    def __init__(self, spec: Spec, stop: threading.Event) -> None:
        self._spec, self._stop, self._context = spec, stop, tls(spec)
        listing = api.ListResultsRequest(session_id=bytes.fromhex(spec["session"]))
        self._calls = [
            frames.request(1, frames.headers(HEALTH), b""),
            frames.request(
                1, frames.headers(f"{AGGREGATION}ListResults"), listing.SerializeToString()
            ),
        ]
        self._lock = threading.Lock()
        self._turns = itertools.count()
        self._seen, self._certificates = Counter[str](), dict[str, float]()

    def run(self) -> dict[str, Any]:
        """Until told; how many were made, and when which certificate was first seen."""
        self._began = time.monotonic()
        with ThreadPoolExecutor(HANDS) as pool:
            for hand in [pool.submit(self._hand) for _ in range(HANDS)]:
                hand.result()
        rate = self._seen["begun"] / (time.monotonic() - self._began)
        return {
            "seen": self._seen,
            "per_second": round(rate, 1),
            "certificates": self._certificates,
        }

    def _hand(self) -> None:
        while not self._stop.is_set():
            turn = next(self._turns)
            due = self._began + turn / self._spec["connections"]
            self._stop.wait(max(0.0, due - time.monotonic()))
            try:
                self._count(self._connection(turn))
            except OSError as error:
                self._count(f"refused: {type(error).__name__}")

    def _count(self, what: str) -> None:
        with self._lock:
            self._seen[what] += 1

    def _connection(self, turn: int) -> str:
        address = "127.0.0.1", self._spec["port"]
        with socket.create_connection(address, PATIENCE_SECONDS) as raw:
            self._count("begun")
            # An end without ceremony, or the machine would run out of ports before the server did.
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            name = self._spec["server_name"]
            with self._context.wrap_socket(raw, server_hostname=name) as line:
                line.sendall(frames.PREFACE)
                let_in = line.recv(65536)  # the server's settings: it has seen our certificate
                if not let_in:
                    return "refused: closed"
                self._note(line.getpeercert(binary_form=True) or b"")
                if turn % CALL_EVERY == 0:
                    line.sendall(frames.SETTINGS_ACK)
                    line.sendall(self._calls[turn // CALL_EVERY % len(self._calls)])
                    self._count(f"status {status(line, let_in)}")
        return "made"

    def _note(self, certificate: bytes) -> None:
        found = hashlib.sha256(certificate).hexdigest()
        with self._lock:
            self._certificates.setdefault(found, time.monotonic() - self._began)


def status(line: ssl.SSLSocket, received: bytes) -> str:
    """How a connection's one call ended."""
    incoming = frames.Incoming()
    while received:
        for frame in incoming.feed(received):
            if isinstance(frame, HeadersFrame) and (found := incoming.status(frame)):
                return found
            if isinstance(frame, GoAwayFrame):
                return "goaway"
        received = line.recv(65536)
    return "closed"
