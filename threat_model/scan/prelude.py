"""Run first in a process: writes down every secret that it draws, derives or reads.

    python -P prelude.py DIRECTORY WHO MODULE:FUNCTION [ARGUMENTS…]

It stands outside the product and changes nothing that the product does. It imports nothing of ours
before ``os.urandom`` is wrapped, since the product binds it when it is imported: hence a script,
and not a module of the package.

Each value goes with its *kind*: the function of the product that drew or made it. ``run`` says
of each kind whether it is public, and why; a kind that nobody has thought of is a secret.
"""

from __future__ import annotations

import functools
import importlib
import json
import os
import random
import struct
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

OURS = ("secagg.", "client_sdk.")
AROUND = ("random", "secrets", "secagg.crypto.secret", __name__)
DIGITS = 12


class Recorder:
    """Writes records, one JSON object a line, each in one write: a kill loses none that counts.

    Args:
        directory: where; never one that is searched.
        who: the process.
    """

    def __init__(self, directory: Path, who: str) -> None:
        self.who = who
        self._wire = directory / "wire"
        self._wire.mkdir(exist_ok=True)
        path = directory / f"{who}-{os.getpid()}.jsonl"
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        self._local = threading.local()

    def secret(self, kind: str, value: bytes, **about: Any) -> None:
        """Note a value."""
        self.note(kind=kind, value=bytes(value).hex(), **about)

    def note(self, **record: Any) -> None:
        """Note a fact."""
        os.write(self._file, json.dumps({"who": self.who, **record}).encode() + b"\n")

    def message(self, place: str, data: bytes) -> None:
        """Keep a message that went over the wire, in the clear."""
        with (self._wire / place).open("ab") as file:
            file.write(data)

    @property
    def place(self) -> dict[str, Any]:
        """The attempt that this thread works in."""
        found: dict[str, Any] = getattr(self._local, "place", {})
        return found

    @contextmanager
    def within(self, descriptor: Any) -> Iterator[None]:
        """Work in an attempt."""
        self._local.place = {
            "session": descriptor.session_id.hex(),
            "round": descriptor.round,
            "attempt": descriptor.attempt,
        }
        try:
            yield
        finally:
            self._local.place = {}


def _caller() -> FrameType | None:
    """The frame of the product that a value is made in; None if it is somebody else's."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_globals.get("__name__") in AROUND:
        frame = frame.f_back
    name = "" if frame is None else str(frame.f_globals.get("__name__"))
    return frame if name.startswith(OURS) else None


def kind_of(frame: FrameType) -> str:
    """Which function made a value; for a derived key, its label."""
    module, code = str(frame.f_globals["__name__"]), frame.f_code
    if module == "secagg.crypto.kdf":
        return f"derived/{frame.f_locals['label']}"
    return f"{module}:{code.co_qualname.split('.<locals>')[0]}"


def wrap(owner: Any, name: str) -> Callable[[Callable[..., Any]], None]:
    """Replace a function by one that is given it first."""

    def put(around: Callable[..., Any]) -> None:
        inner = getattr(owner, name)

        @functools.wraps(inner)
        def outer(*args: Any, **kwargs: Any) -> Any:
            return around(inner, *args, **kwargs)

        setattr(owner, name, outer)

    return put


def install(recorder: Recorder) -> None:
    """Watch everything; to be called before the product is imported."""
    _watch_entropy(recorder)
    _watch_secrets(recorder)
    _watch_sharing(recorder)
    _watch_updates(recorder)
    _watch_ckks(recorder)
    if recorder.who == "coordinator":
        _watch_wire(recorder)


def _watch_entropy(recorder: Recorder) -> None:
    draw = os.urandom

    def urandom(size: int, /) -> bytes:
        value = draw(size)
        frame = _caller()
        if frame is not None and size >= 16:  # less names temporary files, and is found by chance
            recorder.secret(kind_of(frame), value)
        return value

    os.urandom = urandom
    random._urandom = urandom  # type: ignore[attr-defined]


def _watch_secrets(recorder: Recorder) -> None:
    from secagg.crypto.secret import Secret

    begin = Secret.__init__

    def watched(self: Secret, value: bytes) -> None:
        begin(self, value)
        frame = _caller()
        kind = "elsewhere" if frame is None else kind_of(frame)
        for part in _parts(bytes(value)):
            recorder.secret(kind, part)

    Secret.__init__ = watched  # type: ignore[method-assign]


def _parts(value: bytes) -> list[bytes]:
    """What of a value is secret: of a PEM file the key alone, not its public half or its labels."""
    if not value.startswith(b"-----BEGIN"):
        return [value]
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    key: Any = load_pem_private_key(value, None)
    lines = value.split(b"\n")
    # PKCS 8: the scalar is bytes 36 to 67, so its base64 is 43 characters from the 48th.
    return [key.private_numbers().private_value.to_bytes(32, "big"), lines[1][48:], lines[2][:26]]


def _watch_sharing(recorder: Recorder) -> None:
    from secagg.crypto import shamir
    from secagg.masking import client
    from secagg.masking.messages import ShareKind

    @wrap(shamir, "_uniform")
    def _(draw: Callable[..., int], *args: Any) -> int:
        value = draw(*args)
        recorder.secret("shamir-coefficient", value.to_bytes(shamir.SHARE_BYTES, "big"))
        return value

    @wrap(client, "share_keys")
    def _(take: Callable[..., Any], state: Any, *args: Any, **kwargs: Any) -> Any:
        with recorder.within(state.attempt.descriptor):
            return take(state, *args, **kwargs)

    @wrap(client, "deal")
    def _(deal: Callable[..., Any], owner: str, *args: Any, **kwargs: Any) -> Any:
        dealt = deal(owner, *args, **kwargs)
        for holder, shares in dealt.items():
            for kind in ShareKind:
                share = shares.reveal(kind)
                about = {"owner": owner, "holder": holder, "share": str(kind), **recorder.place}
                recorder.secret("share", share.share.reveal(), **about)
                recorder.secret("salt", share.salt.reveal(), **about)
        return dealt

    @wrap(client, "check_survivors")
    def _(take: Callable[..., Any], state: Any, *args: Any) -> Any:
        signed, message = take(state, *args)
        with recorder.within(state.attempt.descriptor):
            recorder.note(
                survivors=list(signed.survivors), dealers=list(signed.dealers), **recorder.place
            )
        return signed, message


def _watch_updates(recorder: Recorder) -> None:
    from safetensors.numpy import load

    from client_sdk.session import Session
    from secagg.encoding.codec import Codec
    from secagg.ring.expand import apply_masks

    @wrap(Session, "aggregate")
    def _(aggregate: Callable[..., Any], self: Any, task: str, tensors: Any, **more: Any) -> Any:
        about = {"update_of": self.rounds_done + 1}
        for tensor in tensors.values():
            for kind in ("f8", "f4"):
                recorder.secret("tensor", tensor.astype(f"<{kind}").tobytes(), **about)
            for number in tensor.reshape(-1)[:32].tolist():
                _number(recorder, "tensor", number, **about)
        _number(recorder, "weight", more["weight"], **about)
        for value in more["metrics"].values():
            _number(recorder, "metric", value, **about)
        return aggregate(self, task, tensors, **more)

    @wrap(Session, "keep_local")
    def _(keep: Callable[..., Any], self: Any, task: str, about: Any, make: Any) -> Any:
        def made(metadata: Any) -> Any:
            data = make(metadata)
            for tensor in load(data).values():
                recorder.secret("model", tensor.tobytes(), update_of=self.rounds_done + 1)
            return data

        return keep(self, task, about, made)

    @wrap(Codec, "encode")
    def _(encode: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
        vector = encode(self, *args, **kwargs)
        bare = vector.copy()  # it is made with the masks on: taken off again, it is the secret
        off = [mask.inverse() for mask in kwargs["masks"]]
        apply_masks(self.ring, bare, off, kwargs["prg"])
        recorder.secret("encoded-update", bare.tobytes())
        return vector


def _number(recorder: Recorder, kind: str, number: float, **about: Any) -> None:
    """Note a number as it is stored, and as Python and numpy print it."""
    recorder.secret(kind, struct.pack("<d", number), **about)
    for text in (repr(number)[:DIGITS], f"{number:.8f}", number.hex()):
        recorder.secret(kind, text.encode(), **about)


def _watch_ckks(recorder: Recorder) -> None:
    from secagg.ckks.codec import SealedCodec
    from secagg.ckks.engine import Engine

    @wrap(Engine, "encoded_secret")
    def _(transform: Callable[..., Any], self: Any, secret: Any) -> Any:
        residues = transform(self, secret)
        recorder.secret("ckks-secret", secret.tobytes())
        recorder.secret("ckks-secret", residues.tobytes())
        return residues

    @wrap(SealedCodec, "encode")
    def _(encode: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
        vector = encode(self, *args, **kwargs)
        recorder.secret("sealed-update", vector.tobytes())
        return vector

    @wrap(SealedCodec, "fractions")
    def _(fractions: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
        pieces = [piece.copy() for piece in fractions(self, *args, **kwargs)]
        for piece in pieces:
            recorder.secret("fractions", piece.tobytes())
        return iter(pieces)


def _watch_wire(recorder: Recorder) -> None:
    """See every request and reply in the clear, as the handler does."""
    import grpc

    for factory in ("unary_unary_rpc_method_handler", "stream_unary_rpc_method_handler"):
        wrap(grpc, factory)(functools.partial(_taped, recorder))


def _taped(
    recorder: Recorder,
    make: Callable[..., Any],
    behaviour: Any,
    request_deserializer: Callable[[bytes], Any] = bytes,
    response_serializer: Callable[[Any], bytes] = bytes,
) -> Any:
    """Make a handler whose messages are kept."""
    name = behaviour.args[0] if isinstance(behaviour, functools.partial) else "others"

    def parsed(data: bytes) -> Any:
        recorder.message(_place(name, data), data)
        return request_deserializer(data)

    def serialised(reply: Any) -> bytes:
        data = response_serializer(reply)
        recorder.message(f"reply.{name}", data)
        return data

    async def served(request: Any, context: Any) -> Any:
        return await behaviour(request, _Context(context, recorder, name))

    return make(served, parsed, serialised)


def _place(method: str, data: bytes) -> str:
    """Where a request is kept: messages of an attempt by kind, sender and attempt."""
    from google.protobuf.message import DecodeError

    from secagg.wire._pb import service_pb2 as api

    if method != "Send":
        return f"request.{method}"
    try:
        request = api.SendRequest.FromString(data)
    except DecodeError:
        return f"request.{method}"
    kind = request.WhichOneof("message") or "nothing"
    sender = getattr(getattr(request, kind, None), "sender", "")
    attempt = f"{request.session_id.hex()}-{request.round}-{request.attempt}"
    return f"request.Send.{kind}.{attempt}.{sender}"


class _Context:
    """A call's context whose refusals are kept, too."""

    def __init__(self, context: Any, recorder: Recorder, method: str) -> None:
        self._context, self._recorder, self._method = context, recorder, method

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)

    async def abort(self, code: Any, details: str = "", trailing_metadata: Any = ()) -> None:
        """Refuse."""
        self._recorder.message(f"reply.{self._method}", details.encode())
        await self._context.abort(code, details, trailing_metadata)


def main() -> None:
    """Install, then become what the arguments name."""
    directory, who, target, *arguments = sys.argv[1:]
    install(Recorder(Path(directory), who))
    module, _, function = target.partition(":")
    sys.argv = [module, *arguments]
    getattr(importlib.import_module(module), function)()


if __name__ == "__main__":
    main()
