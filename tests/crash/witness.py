"""What each silo sent, written down outside every state directory before it went out.

A crash may lose what a process knew, never what it did: so the record that safety is judged by is
made by the test, around the SDK's one way out (``Channel.call``), and not read from the ledger.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from client_sdk.channel import Channel

Record = dict[str, Any]
_watched: dict[Path, tuple[str, int]] = {}
_lock = threading.Lock()
_installed = False


def watch(profile: Path, silo: str, path: Path) -> None:
    """Record what the silo of this profile directory sends from now on."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    with _lock:
        _watched[profile] = (silo, descriptor)
        _install()


def forget(profile: Path) -> None:
    """Stop recording; the descriptor is another file's soon."""
    with _lock:
        _, descriptor = _watched.pop(profile)
    os.close(descriptor)


def _install() -> None:
    global _installed  # noqa: PLW0603 - one class is wrapped once a process
    if _installed:
        return
    _installed = True
    begin: Callable[..., None] = Channel.__init__
    send: Callable[..., Any] = Channel.call

    def initialise(self: Channel, profile: Any, *args: Any, **kwargs: Any) -> None:
        self._witnessed = profile.directory  # type: ignore[attr-defined]
        begin(self, profile, *args, **kwargs)

    def call(self: Channel, method: str, request: Any, *args: Any, **kwargs: Any) -> Any:
        place = _watched.get(self._witnessed) if method == "Send" else None  # type: ignore[attr-defined]
        if place is not None:
            os.write(place[1], json.dumps(describe(place[0], request)).encode() + b"\n")
        return send(self, method, request, *args, **kwargs)

    Channel.__init__ = initialise  # type: ignore[method-assign,assignment]
    Channel.call = call  # type: ignore[method-assign,assignment]


def describe(silo: str, request: Any) -> Record:
    """The facts of one message that safety is judged by."""
    kind = request.WhichOneof("message")
    message = getattr(request, kind)
    record: Record = {
        "silo": silo,
        "session": request.session_id.hex(),
        "round": request.round,
        "attempt": request.attempt,
        "kind": kind,
        "digest": hashlib.sha256(message.SerializeToString(deterministic=True)).hexdigest(),
        "nanoseconds": time.monotonic_ns(),
    }
    if kind == "advertise_keys":
        keys = (message.channel_key, message.mask_key, message.self_seed_hash)
        record["keys"] = [key.hex() for key in keys]
    if kind == "unmasking":
        opened = {
            share.owner for share in message.shares if share.WhichOneof("share") == "self_seed"
        }
        record["survivors"] = sorted(opened | {message.sender})
        record["shares"] = [getattr(s, s.WhichOneof("share")).hex() for s in message.shares]
    return record


def read(path: Path) -> list[Record]:
    """The records of one silo; a line that a kill cut short was not sent."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1] if line]


def shares(records: Iterable[Record]) -> frozenset[bytes]:
    """All shares that were revealed."""
    return frozenset(bytes.fromhex(s) for r in records for s in r.get("shares", ()))


def faults(records: Iterable[Record]) -> list[str]:
    """Everything that a silo must never do, in words; empty where all is well."""
    records = list(records)
    return [*_reused_keys(records), *_second_messages(records), *_second_openings(records)]


def _reused_keys(records: list[Record]) -> list[str]:
    """A key pair is one silo's, for one attempt: with a second one its masks would repeat."""
    places: dict[str, set[tuple[Any, ...]]] = defaultdict(set)
    for record in records:
        for key in record.get("keys", ()):
            places[key].add(tuple(record[f] for f in ("session", "round", "attempt", "silo")))
    return [f"a key in several places: {sorted(p)}" for p in places.values() if len(p) > 1]


def _second_messages(records: list[Record]) -> list[str]:
    """One message a phase; another τ3 signed or another reveal would open a second sum."""
    digests: dict[tuple[Any, ...], set[str]] = defaultdict(set)
    for record in records:
        place = tuple(record[f] for f in ("session", "round", "attempt", "silo", "kind"))
        digests[place].add(record["digest"])
    return [f"{len(d)} different messages at {p[1:]}" for p, d in digests.items() if len(d) > 1]


def _second_openings(records: list[Record]) -> list[str]:
    """A silo opens one survivor set a round: the difference of two would show few updates."""
    opened: dict[tuple[Any, ...], set[tuple[str, ...]]] = defaultdict(set)
    for record in records:
        if "survivors" in record:
            place = (record["session"], record["round"], record["silo"])
            opened[place].add(tuple(record["survivors"]))
    return [f"{p[2]} opened {sorted(s)} in round {p[1]}" for p, s in opened.items() if len(s) > 1]
