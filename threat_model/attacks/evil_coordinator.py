"""A coordinator in the adversary's hands, with its real keys, against the shipped SDK.

It speaks the wire contract over mutual TLS. Every broadcast of an attempt is what the attack says,
silo by silo; everything else is honest unless ``lies`` has something else to say. Honest silos are
processes with the SDK, colluding ones are run here by the same functions, and both are told things
by ``tell``, which returns their answer, or raises ``Refused`` with the code of the error that ended
the SDK's call.
"""

from __future__ import annotations

import os
import re
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent import futures
from dataclasses import replace
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import grpc
import numpy as np
from google.protobuf.message import Message

from secagg.ckks.codec import codec_of
from secagg.config import (
    Clip,
    MaskPrg,
    Phase,
    Policy,
    Protection,
    SessionConfig,
    SiloId,
    TaskConfig,
    ThresholdRule,
    Weighting,
    parse_toml,
    silo_id,
)
from secagg.coordinator.keys import KeyDesk
from secagg.crypto.labels import SIGN_RESULT
from secagg.crypto.sign import IdentityKey
from secagg.encoding.schema import Schema
from secagg.errors import MalformedMessage
from secagg.masking import transcript
from secagg.masking.messages import (
    Dealt,
    Descriptor,
    Result,
    Roster,
    Signatures,
    Survivors,
)
from secagg.masking.server import ClientMessage
from secagg.pki.names import Role, peer_identity
from secagg.pki.profile import POLICY, PROFILE, write_profile
from secagg.ring.vectors import Vector
from secagg.suite import Suite
from secagg.wire import attempt as wire
from secagg.wire import custody as wire_custody
from secagg.wire import session as wire_session
from secagg.wire._pb import service_pb2 as api
from threat_model.attacks.attack import Scene
from threat_model.attacks.stage import ANSWER_SECONDS, CONSORTIUM, COORDINATOR, SILOS

TASK: Final = "sums"
LENGTH: Final = 16
BOUND: Final = 100.0
_POLL_SECONDS: Final = 5.0
_LOOK_SECONDS: Final = 0.02
Lie = Callable[[SiloId, Any], Message | None]
Values = np.ndarray[Any, np.dtype[np.float64]]
_FIELDS: Final[Mapping[type, str]] = {
    Descriptor: "descriptor",
    Roster: "roster",
    Dealt: "dealt",
    Survivors: "survivors",
    Signatures: "signatures",
    Result: "result",
}


def make_session(silos: Sequence[str] = "abcd", **changes: Any) -> SessionConfig:
    """A session for sums of ``LENGTH`` numbers; of four silos t = 3."""
    seals = Protection(changes.get("protection", Protection.MASKED)).seals
    task = TaskConfig(TASK, Weighting.SUM, 10, BOUND, Clip.NONE, 1.0, None if seals else 32)
    values: dict[str, Any] = {
        "name": f"study-{os.urandom(4).hex()}",
        "consortium": CONSORTIUM,
        "silos": tuple(silo_id(name) for name in silos),
        "protection": Protection.MASKED,
        "suite": Suite.CKKS_54 if seals else None,
        "colluders": 1,
        "threshold": ThresholdRule(2, 3),
        "min_cohort": 3,
        "mask_prg": MaskPrg.AES_128_CTR,
        "tasks": (task,),
        "train_deadline": 60.0,
        "phase_deadline": 60.0,
        "max_attempts": 1,
    }
    return SessionConfig(**values | changes)


def secret_values() -> Values:
    """An update: numbers within half of the bound, so that a sum of two is decoded as well."""
    words = np.frombuffer(os.urandom(4 * LENGTH), "<u4").astype(np.float64)
    return words / 2**32 * BOUND - BOUND / 2


class EvilCoordinator:
    """One session, served by the adversary; a context manager.

    Args:
        scene: whose processes play the honest silos.
        session: its configuration.
        colluders: silos in the adversary's hands.
        calls: how many results an honest silo asks for, one after another.
        after: a session before, in whose directories the silos go on, with the same updates.

    Attributes:
        values: every silo's secret update, by silo; the adversary knows its colluders' only.
        floors: what honest silos' operators wrote into policy.toml, as TOML, by key.
        uploads: vectors as they were uploaded last, by silo.
        lies: by method; None from one is the honest reply.
        seen: every request, with who sent it.
        headers: of all calls, each distinct one once.
    """

    def __init__(
        self,
        scene: Scene,
        session: SessionConfig | None = None,
        *,
        colluders: Iterable[str] = (),
        calls: int = 1,
        after: EvilCoordinator | None = None,
    ) -> None:
        self.scene = scene
        self.session = session or make_session()
        self.consortium = scene.stage.consortium
        self.manifest = self.consortium.authority.signed_manifest
        self.session_id = os.urandom(32)
        self.session_hash = transcript.session_hash(self.session)
        self.history = transcript.first_history(self.session_hash)
        self.colluders = frozenset(silo_id(name) for name in colluders)
        self.values = {name: secret_values() for name in self.session.silos}
        self.floors: dict[str, str] = {}
        self.codec = codec_of(self.session, TASK, Schema.of({"x": np.zeros(LENGTH)}))
        self.uploads: dict[SiloId, Vector] = {}
        self.lies: dict[str, Lie] = {}
        self.seen: list[tuple[SiloId, str, Message]] = []
        self.headers: set[tuple[str, str | bytes]] = set()
        self.results: list[Result] = []
        self.blobs: dict[str, bytearray] = {}
        self.desk = KeyDesk(60.0) if self.session.protection.seals else None
        self._calls = calls
        self._place = scene.stage.new_directory()
        if after is not None:
            self.values, self._place = after.values, after._place
        self._opening: api.TaskOpening | None = None
        self._proposer: SiloId | None = None
        self._events: dict[SiloId, deque[api.NextReply]] = defaultdict(deque)
        self._heard: dict[SiloId, deque[ClientMessage]] = defaultdict(deque)
        self._ready: dict[SiloId, int] = defaultdict(int)
        self._plays: dict[SiloId, futures.Future[dict[str, Any]]] = {}
        self._logged: dict[SiloId, int] = {}
        self._over = False
        self._changed = threading.Condition()

    @cached_property
    def identity(self) -> IdentityKey:
        """The coordinator's signing key."""
        key = self.consortium.credentials(COORDINATOR, Role.COORDINATOR).identity_key
        assert key is not None
        return key

    @property
    def tls_pair(self) -> tuple[bytes, bytes]:
        """The TLS key and certificate that it serves with, PEM; another one poses as it."""
        own = self.consortium.credentials(COORDINATOR, Role.COORDINATOR)
        return own.tls_key_pem.reveal(), own.certificate_pem

    # Its process, and the honest silos'.

    def __enter__(self) -> EvilCoordinator:
        self._server = grpc.server(futures.ThreadPoolExecutor(64))
        service = api.DESCRIPTOR.services_by_name["Aggregation"]
        handlers = {
            method.name: grpc.unary_unary_rpc_method_handler(
                lambda request, context, name=method.name: self._serve(name, request, context),
                request_deserializer=getattr(api, method.input_type.name).FromString,
                response_serializer=lambda reply: reply.SerializeToString(),
            )
            for method in service.methods
        }
        generic = grpc.method_handlers_generic_handler(service.full_name, handlers)
        self._server.add_generic_rpc_handlers((generic,))
        credentials = grpc.ssl_server_credentials(
            [self.tls_pair], self.consortium.authority.certificate_pem, require_client_auth=True
        )
        port = self._server.add_secure_port("127.0.0.1:0", credentials)
        self._server.start()
        self._address = f"127.0.0.1:{port}"
        return self

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._over = True
            self._changed.notify_all()
        for name, play in self._plays.items():
            try:
                play.result(ANSWER_SECONDS)
            except TimeoutError:
                self.scene.stage.drop_silo(name, weakened=self.scene.weakened)
        self._server.stop(None)

    def listen_at(self, port: int) -> None:
        """Have silos that start from now on look for the coordinator at another port."""
        self._address = f"127.0.0.1:{port}"

    def start(self, *silos: str, task: str = TASK) -> None:
        """Have honest silos join and submit their updates; all of them if none is named."""
        honest = [name for name in self.session.silos if name not in self.colluders]
        for name in silos or honest:
            self.scene.stage.silo(name, weakened=self.scene.weakened)  # they start side by side
        for name in silos or honest:
            self.start_one(silo_id(name), task=task)

    def start_one(
        self,
        name: SiloId,
        *,
        task: str = TASK,
        again: bool = False,
        values: Sequence[Values] | None = None,
        draws: Sequence[bytes | None] = (),
        model: bytes | None = None,
        weight: float = 1.0,
    ) -> None:
        """Have one silo's process join.

        Args:
            name: whose.
            task: which one it has updates for.
            again: with the directory that it had: it restarts.
            values: its updates; else the same one for every call.
            draws: what its generator gives whenever 32 bytes are asked for, in order; None is
                fresh, as is all that follows. A machine that was cloned or set back draws again.
            model: the weights that it would start from, as a file, if it trains a model.
            weight: of its updates.
        """
        stage, weakening = self.scene.stage, self.scene.weakening
        updates = [self.values[name]] * self._calls if values is None else values
        order = {
            "profile": str(self._profile(name, again=again)),
            "session": self.session.name,
            "task": task,
            "values": [update.tolist() for update in updates],
            "draws": [None if draw is None else draw.hex() for draw in draws],
            "model": None if model is None else model.hex(),
            "weight": weight,
            "weakening": None if weakening is None else weakening.to_json(),
        }
        self._ready[name] = 0
        self._logged[name] = len(stage.silo(name, weakened=self.scene.weakened).log)
        self._plays[name] = stage.silo(name, weakened=self.scene.weakened).play(order)
        self._plays[name].add_done_callback(lambda _: self._wake())

    def _profile(self, name: SiloId, *, again: bool) -> Path:
        """A silo's directory, with what its operator wrote there."""
        path = self._place / name
        if again:
            (path / PROFILE).unlink()
            write_profile(path, self._address)
        else:
            self.scene.stage.profile(name, self._address, self._place)
        policy = path / POLICY
        for key, value in self.floors.items():
            text = re.sub(f"^{key} = .*$", f"{key} = {value}", policy.read_text(), flags=re.M)
            policy.write_text(text)
        return path

    def end(self, *silos: str) -> list[dict[str, Any]]:
        """Have the calls of silos end, as when they restart; what ``player.play`` returned then."""
        for silo in silos:
            self._put(silo_id(silo), api.NextReply(ended="it is over"))
        return [self._plays[silo_id(silo)].result(ANSWER_SECONDS) for silo in silos]

    def abort(self, *silos: str) -> None:
        """Tell silos that the attempt failed; they go on to the next one."""
        for silo in silos:
            self._put(silo_id(silo), api.NextReply(aborted=api.Aborted(phase=Phase.UNMASKING)))

    def place(self, silo: str) -> Path:
        """A silo's directory, for who is at its machine."""
        return self._place / silo

    def log(self, silo: str) -> str:
        """What a silo's process has logged since it joined."""
        log = self.scene.stage.silo(silo, weakened=self.scene.weakened).log
        return str(log[self._logged[silo_id(silo)] :])

    def until(self, silo: str, code: str, happened: Callable[[], Any]) -> None:
        """Wait for what happens where a silo does not refuse.

        Raises:
            Refused: the silo has logged a refusal of this code, or its call has ended.
        """
        end = time.monotonic() + ANSWER_SECONDS
        while not happened():
            if f"[{code}]" in self.log(silo):
                raise self.scene.refuse(code, silo)
            if self._ended(silo_id(silo)):
                self.answer(silo)
            if time.monotonic() > end:
                raise self.scene.refuse("silent", silo)
            with self._changed:
                self._changed.wait(_LOOK_SECONDS)

    def readies(self, silo: str) -> list[api.ReadyRequest]:
        """Each time that a silo said that it has an update."""
        return [call for name, method, call in list(self.seen) if (name, method) == (silo, "Ready")]

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def answer(self, silo: str) -> list[list[float]]:
        """What a silo's calls returned.

        Raises:
            Refused: one of them raised.
        """
        name = silo_id(silo)
        found = self._plays[name].result(ANSWER_SECONDS)
        if found["error"] is not None:
            raise self.scene.refuse(found["error"], name, found.get("observed", ""))
        return list(found["results"])

    # What goes over the wire.

    def _serve(self, name: str, request: Any, context: grpc.ServicerContext) -> Message:
        pem = context.auth_context()["x509_pem_cert"][0]
        silo = silo_id(
            peer_identity(pem, consortium=CONSORTIUM, revoked=(), now=datetime.now(UTC)).name
        )
        with self._changed:
            if self._over and name not in ("Next", "Leave"):
                context.set_trailing_metadata((("secagg-code", "session-over"),))
                context.abort(grpc.StatusCode.FAILED_PRECONDITION, "the attack is over")
            self.seen.append((silo, name, request))
            self.headers.update((entry.key, entry.value) for entry in context.invocation_metadata())
            lie = self.lies.get(name)
            reply = lie(silo, request) if lie else None
            return getattr(self, f"_{name}")(silo, request) if reply is None else reply

    def _JoinSession(self, silo: SiloId, request: Any) -> Message:
        return api.JoinSessionReply(
            session_id=self.session_id,
            config=wire_session.config_to_wire(self.session),
            manifest=self.manifest.to_json(),
        )

    def _OpenTask(self, silo: SiloId, request: Any) -> Message:
        if self._proposer is None:
            self._proposer = silo
        if self._proposer == silo and self._opening is None:
            return api.OpenTaskReply(propose=True)
        self._wait(lambda: self._opening is not None)
        return api.OpenTaskReply(opening=self._opening)

    def _ProposeTask(self, silo: SiloId, request: Any) -> Message:
        self._opening = request.opening
        return self._ack()

    def _Ready(self, silo: SiloId, request: Any) -> Message:
        self._ready[silo] += 1
        return self._ack()

    def _Next(self, silo: SiloId, request: Any) -> Message:
        self._wait(lambda: self._events[silo] or self._over)
        if self._events[silo]:
            return self._events[silo].popleft()
        return api.NextReply(ended="the attack is over") if self._over else api.NextReply()

    def _PutChunk(self, silo: SiloId, request: Any) -> Message:
        blob = self.blobs.setdefault(f"{silo} {request.blob}", bytearray(request.total))
        blob[request.offset : request.offset + len(request.data)] = request.data
        if request.blob.WhichOneof("of") == "weights":
            self.blobs[str(request.blob)] = blob
        if request.blob.WhichOneof("of") == "vector":
            length = len(blob) // self.codec.ring.word_bytes
            self.uploads[silo] = self.codec.ring.unpack(bytearray(blob), length)
        return self._ack()

    def _GetChunk(self, silo: SiloId, request: Any) -> Message:
        data = self.blobs.get(f"{silo} {request.blob}") or self.blobs[str(request.blob)]
        end = request.offset + self.session.chunk_bytes
        return api.GetChunkReply(data=bytes(data[request.offset : end]))

    def _Send(self, silo: SiloId, request: Any) -> Message:
        self._heard[silo].append(wire.client_message_from_wire(request))
        return self._ack()

    def _ListResults(self, silo: SiloId, request: Any) -> Message:
        page = self.results[request.after :]
        return api.ListResultsReply(results=[wire.result_to_wire(result) for result in page])

    def _Leave(self, silo: SiloId, request: Any) -> Message:
        return self._ack()

    # The key's desk, where the session seals.

    def _AskKey(self, silo: SiloId, request: Any) -> Message:
        assert self.desk is not None
        answer = self.desk.ask(wire_custody.request_from_wire(request.request), 0.0)
        if answer is False:
            self.linger()
            return api.AskKeyReply()
        if answer is True:
            return api.AskKeyReply(make=True)
        if isinstance(answer, int):
            return api.AskKeyReply(epoch=answer)
        return api.AskKeyReply(box=wire_custody.box_to_wire(answer))

    def _AnnounceKey(self, silo: SiloId, request: Any) -> Message:
        assert self.desk is not None
        key = wire.key_from_wire(request)
        assert key is not None
        known = self.manifest.manifest.silos
        self.desk.note(key.epoch, key, {name: known[name] for name in self.session.silos})
        return self._ack()

    def _AwaitKeyRequests(self, silo: SiloId, request: Any) -> Message:
        assert self.desk is not None
        self.linger()
        key = wire.key_from_wire(request)
        assert key is not None
        waiting = self.desk.requests(silo, key) if key == self.desk.key else []
        return api.AwaitKeyRequestsReply(
            requests=[wire_custody.request_to_wire(wish) for wish in waiting]
        )

    def _SendKeyBox(self, silo: SiloId, request: Any) -> Message:
        assert self.desk is not None
        self.desk.put(wire_custody.box_from_wire(request.box))
        return self._ack()

    def _EndKey(self, silo: SiloId, request: Any) -> Message:
        return self._ack()

    def _ack(self) -> Message:
        self._changed.notify_all()
        return api.Ack()

    def linger(self) -> None:
        """Hold a call for a moment, as where there is nothing to say yet."""
        self._wait(lambda: self._over, _POLL_SECONDS / 50)

    def _wait(self, until: Callable[[], Any], seconds: float = _POLL_SECONDS) -> None:
        self._changed.wait_for(until, seconds)

    # What it says to whom.

    def put_event(self, silo: SiloId, event: Any) -> None:
        """Have this be a silo's next event."""
        field = _FIELDS[type(event)]
        self._put(silo, api.NextReply(**{field: getattr(wire, f"{field}_to_wire")(event)}))

    def _put(self, silo: SiloId, reply: api.NextReply) -> None:
        with self._changed:
            self._events[silo].append(reply)
            self._changed.notify_all()

    def hear(self, silo: SiloId) -> ClientMessage:
        """Wait for a silo's next message of the attempt.

        Raises:
            Refused: its call ended instead.
        """
        with self._changed:
            self._wait(lambda: self._heard[silo] or self._ended(silo), ANSWER_SECONDS)
            if self._heard[silo]:
                return self._heard[silo].popleft()
        if not self._ended(silo):
            raise self.scene.refuse("silent", silo)
        self.answer(silo)
        raise self.scene.refuse("call-ended", silo)

    def _ended(self, silo: SiloId) -> bool:
        return silo in self._plays and self._plays[silo].done()

    def await_ready(self, *silos: SiloId) -> None:
        """Wait until these silos are ready.

        Raises:
            Refused: the call of one of them ended instead.
        """
        for silo in silos:
            with self._changed:
                self._wait(lambda s=silo: self._ready[s] or self._ended(s), ANSWER_SECONDS)
            if not self._ready[silo]:
                self.answer(silo)
                raise self.scene.refuse("not-ready", silo)

    def await_opening(self) -> None:
        """Wait until the task is open."""
        with self._changed:
            self._wait(
                lambda: self._opening is not None or any(self._ended(s) for s in self._plays),
                ANSWER_SECONDS,
            )
        if self._opening is None:
            for name in self._plays:
                self.answer(name)

    @property
    def opening(self) -> api.TaskOpening | None:
        """What all silos are told of the task; None asks the next one for a proposal."""
        return self._opening

    @opening.setter
    def opening(self, opening: api.TaskOpening | None) -> None:
        self._opening, self._proposer = opening, None

    @property
    def base(self) -> bytes:
        """What the next round starts from."""
        self.await_opening()
        signed = wire_session.opening_from_wire(self._opening)
        return transcript.base_of(self.history, signed.opening.digest(self.session_hash))

    def release(self, silo: SiloId, result: Result, total: Vector) -> None:
        """Tell a silo a result, and have its sum there, for this silo alone."""
        self.keep(silo, result, total)
        self.put_event(silo, result)

    def keep(self, silo: SiloId, result: Result, total: Vector) -> None:
        """Have a result's sum there for a silo that comes for it."""
        self.blobs[f"{silo} {api.Blob(sum=result.round)}"] = bytearray(self.codec.ring.pack(total))

    def sign_result(self, result: Result, **changes: Any) -> Result:
        """A result with these changes, signed by the coordinator."""
        changed = replace(result, **changes)
        tau4 = transcript.result_transcript(changed.survivors_transcript, changed.vector_digest)
        signature = self.identity.sign(SIGN_RESULT, tau4, changed.body())
        return replace(changed, signature=signature)

    def move_on(self, result: Result) -> None:
        """Go on to the next round after a result."""
        tau4 = transcript.result_transcript(result.survivors_transcript, result.vector_digest)
        self.history = transcript.next_history(self.history, tau4)
        self.results.append(result)
        self._ready.clear()

    def policy(self, silo: SiloId) -> Policy:
        """What a colluder pretends to insist on: what anybody does."""
        del silo
        text = (self.consortium.root / SILOS[0] / POLICY).read_text()
        return parse_toml(Policy, text, POLICY)

    # What it reads.

    def reads(self, words: Vector, *silos: str) -> bool:
        """Whether these words are the sum of these silos' updates, and of nothing else."""
        try:
            found = self.codec.decode(words).tensors["x"]
        except MalformedMessage:
            return False
        wanted = sum(self.values[silo_id(name)] for name in silos)
        return bool(np.allclose(found, wanted, atol=0.01))
