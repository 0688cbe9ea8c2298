"""Silos in the adversary's hands, with their real keys, against the shipped coordinator.

A ``Client`` is one TLS connection of whoever has a key and a certificate; it raises ``Refused``
with the stable code of a refusal, or with the name of gRPC's status where there is none. A
``Study`` is a session at a coordinator's process whose silos take the protocol's real steps here,
until the attack has one of them do something else.
"""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, Final, TypeVar

import grpc
import numpy as np

from secagg.ckks.codec import codec_of
from secagg.config import Policy, SessionConfig, SiloId, parse_toml, silo_id
from secagg.encoding.schema import Schema
from secagg.errors import MalformedMessage, RoundAborted
from secagg.masking import client, transcript
from secagg.masking.messages import (
    Dealt,
    Descriptor,
    MaskedInput,
    Result,
    Roster,
    Signatures,
    Survivors,
)
from secagg.masking.server import ClientMessage
from secagg.pki.manifest import SignedManifest
from secagg.pki.names import Role, server_dns_name
from secagg.ring.vectors import Vector, ring_of
from secagg.wire import attempt as wire
from secagg.wire import session as wire_session
from secagg.wire._pb import service_pb2 as api
from threat_model.attacks.attack import Scene
from threat_model.attacks.attempt import Colluder
from threat_model.attacks.evil_coordinator import LENGTH, TASK, make_session, secret_values
from threat_model.attacks.stage import ADMIN, CONSORTIUM, Serving

CALL_SECONDS: Final = 30.0
M = TypeVar("M", bound=Any)
_SEEN: Final[dict[type, int]] = {
    Descriptor: api.STEP_DESCRIPTOR,
    Roster: api.STEP_ROSTER,
    Dealt: api.STEP_DEALT,
    Survivors: api.STEP_SURVIVORS,
    Signatures: api.STEP_SIGNATURES,
}


@dataclass(frozen=True)
class Pair:
    """A TLS key and a certificate chain, PEM."""

    key: bytes
    certificate: bytes


class Client:
    """A connection to a coordinator.

    Args:
        scene: where refusals are noted.
        address: the coordinator's.
        pair: who it is; None for nobody.
        root: what it takes for the coordinator's authority, PEM.
    """

    def __init__(self, scene: Scene, address: str, pair: Pair | None, root: bytes) -> None:
        self._scene = scene
        credentials = grpc.ssl_channel_credentials(
            root, pair.key if pair else None, pair.certificate if pair else None
        )
        self._channel = grpc.secure_channel(
            address,
            credentials,
            options=[
                ("grpc.ssl_target_name_override", server_dns_name(CONSORTIUM)),
                ("grpc.use_local_subchannel_pool", 1),
                ("grpc.max_receive_message_length", -1),
                ("grpc.enable_retries", 0),
            ],
        )

    def __call__(
        self,
        method: str,
        request: Any,
        service: str = "Aggregation",
        *,
        seconds: float = CALL_SECONDS,
        metadata: Iterable[tuple[str, str | bytes]] = (),
    ) -> Any:
        """Call a method; ``request`` may be bytes.

        Raises:
            Refused: with the stable code, or else the status' name.
        """
        stub = self.stub(method, service)
        try:
            return stub(request, timeout=seconds, metadata=tuple(metadata) or None)
        except grpc.RpcError as error:
            raise self._scene.refuse(code_of(error), observed=error.details() or "") from None

    def stub(self, method: str, service: str = "Aggregation") -> Any:
        """A method as gRPC has it, to be called in any way."""
        descriptor = api.DESCRIPTOR.services_by_name[service]
        output = getattr(api, descriptor.methods_by_name[method].output_type.name)
        return self._channel.unary_unary(
            f"/{descriptor.full_name}/{method}",
            request_serializer=lambda m: m if isinstance(m, bytes) else m.SerializeToString(),
            response_deserializer=output.FromString,
        )

    def close(self) -> None:
        """Hang up."""
        self._channel.close()


def code_of(error: grpc.RpcError) -> str:
    """The stable code of a refusal, or else the status' name."""
    for entry in error.trailing_metadata() or ():
        if entry.key == "secagg-code":
            return str(entry.value)
    return str(error.code().name)


class Study:
    """A session at a coordinator's process; a context manager, which aborts it.

    Args:
        scene: where refusals are noted.
        server: the coordinator's process.
        session: its configuration.
        manifest: who is a member, where the coordinator has an authority of its own.

    Attributes:
        values: every silo's update.
        silos: the protocol's real steps, by silo (``attempt.Colluder``: ``state``, ``upload``).
    """

    def __init__(
        self,
        scene: Scene,
        server: Serving,
        session: SessionConfig | None = None,
        manifest: SignedManifest | None = None,
    ) -> None:
        self.scene, self.server = scene, server
        self.session = session or make_session()
        self.consortium = scene.stage.consortium
        self.manifest = manifest or self.consortium.authority.signed_manifest
        self.session_hash = transcript.session_hash(self.session)
        self.colluders = frozenset(self.session.silos)
        self.values = {name: secret_values() for name in self.session.silos}
        self.codec = codec_of(self.session, TASK, Schema.of({"x": np.zeros(LENGTH)}))
        self.ring = ring_of(self.session, TASK)
        self._attempts: dict[SiloId, int] = {}
        self._seen: dict[SiloId, int] = {}
        self._clients: dict[tuple[Role, str], Client] = {}

    def __enter__(self) -> Study:
        request = api.CreateSessionRequest(config=wire_session.config_to_wire(self.session))
        self.session_id = self.admin("CreateSession", request, "Admin").session_id
        self.admit(self.manifest)
        return self

    def __exit__(self, *_: object) -> None:
        if self.server.process.poll() is None:
            refusals = list(self.scene.refusals)
            try:
                request = api.AbortSessionRequest(name=self.session.name)
                self.admin("AbortSession", request, "Admin")
            finally:
                self.scene.refusals[:] = refusals
        for found in self._clients.values():
            found.close()

    def admit(self, manifest: SignedManifest) -> None:
        """Have silos begin anew, as members of this manifest."""
        self.manifest = manifest
        self.silos = {name: Colluder(self, name) for name in self.session.silos}

    def policy(self, silo: SiloId) -> Policy:
        """A silo's policy."""
        text = (self.consortium.root / silo / "policy.toml").read_text()
        return parse_toml(Policy, text, "policy.toml")

    @property
    def attempt(self) -> int:
        """The newest that a silo was told of."""
        return max(self._attempts.values(), default=0)

    # Connections.

    def pair(self, name: str, role: Role = Role.SILO) -> Pair:
        """A member's key and certificate."""
        own = self.consortium.credentials(name, role)
        return Pair(own.tls_key_pem.reveal(), own.certificate_pem)

    def connect(self, pair: Pair | None) -> Client:
        """A new connection; who asks closes it."""
        root = self.consortium.authority.certificate_pem
        return Client(self.scene, self.server.address, pair, root)

    def move(self, server: Serving) -> None:
        """Go on at another process of the same coordinator, after a restart."""
        self.server = server
        for found in self._clients.values():
            found.close()
        self._clients.clear()

    def member(self, name: str, role: Role = Role.SILO) -> Client:
        """A member's connection, kept."""
        if (role, name) not in self._clients:
            self._clients[role, name] = self.connect(self.pair(name, role))
        return self._clients[role, name]

    @property
    def admin(self) -> Client:
        """The admin's connection."""
        return self.member(ADMIN, Role.ADMIN)

    def call(self, silo: str, method: str, kind: Any, **fields: Any) -> Any:
        """A silo's call in this session."""
        return self.member(silo)(method, kind(session_id=self.session_id, **fields))

    def later(self, silo: str, method: str, kind: Any, **fields: Any) -> Future[Any]:
        """The same in a thread of its own."""
        pool = ThreadPoolExecutor(1)
        future = pool.submit(self.call, silo, method, kind, **fields)
        pool.shutdown(wait=False)
        return future

    # What honest silos do.

    def open_task(self, proposer: str = "a", task: str = TASK) -> None:
        """Have a task opened."""
        opening = self.opening(proposer, task)
        self.call(proposer, "OpenTask", api.OpenTaskRequest, task=task)
        self.call(proposer, "ProposeTask", api.ProposeTaskRequest, opening=opening)

    def opening(self, proposer: str, task: str = TASK) -> api.TaskOpening:
        """A task's opening, signed by a silo."""
        identity = self.silos[silo_id(proposer)].member.identity
        taken = transcript.TaskOpening(
            task, Schema.of({"x": np.zeros(LENGTH)}), "", transcript.NO_WEIGHTS
        )
        tau = transcript.opening_transcript(self.session_hash, self.session_id)
        signed = wire_session.SignedOpening.sign(taken, 0, proposer, identity, tau)
        self.task_hash = taken.digest(self.session_hash)
        return wire_session.opening_to_wire(signed)

    @property
    def base(self) -> bytes:
        """What the first round starts from."""
        return transcript.base_of(transcript.first_history(self.session_hash), self.task_hash)

    def ready(self, *silos: str) -> None:
        """Have silos say that they have an update."""
        for name in silos or self.session.silos:
            self.call(name, "Ready", api.ReadyRequest, task=TASK, base=self.base)

    def next(self, silo: str) -> Any:
        """What comes next for a silo; waits."""
        name = silo_id(silo)
        seen = self._seen.get(name, api.STEP_LEFT)
        fields = {"round": 1, "attempt": self._attempts.get(name, 0), "seen": seen}
        reply = self.call(name, "Next", api.NextRequest, **fields)
        kind = reply.WhichOneof("event")
        if kind == "aborted":
            self._seen[name] = api.STEP_LEFT
            return wire_session.aborted_from_wire(reply.aborted)
        if kind in (None, "ended"):
            return None
        event = getattr(wire, f"{kind}_from_wire")(getattr(reply, kind))
        if isinstance(event, Descriptor):
            self._attempts[name] = event.attempt
        if type(event) in _SEEN:
            self._seen[name] = _SEEN[type(event)]
        return event

    def restart(self, *silos: str) -> None:
        """Have silos forget what they were told of this attempt, and be told again."""
        for silo in silos:
            self._attempts.pop(silo_id(silo))
            self._seen.pop(silo_id(silo))

    def answer(self, silo: str, event: Any) -> ClientMessage:
        """What a silo answers; not sent yet."""
        expected = client.Expected(TASK, 1, self.base)
        message: ClientMessage = self.silos[silo_id(silo)].answer(event, expected)
        return message

    def send(self, silo: str, message: ClientMessage, vector: Vector | None = None) -> None:
        """Send a message over a silo's connection; a vector first, where it commits to one."""
        if isinstance(message, MaskedInput):
            found = self.silos[silo_id(silo)].upload if vector is None else vector
            assert found is not None
            self.put(silo, self.ring.pack(found))
        self.say(silo, message)

    def say(self, silo: str, message: ClientMessage) -> None:
        """Send a message alone."""
        request = wire.client_message_to_wire(
            message, session_id=self.session_id, round_number=1, attempt=self.attempt
        )
        self.member(silo)("Send", request)

    def sign(self, silo: str, kind: str, tau: bytes, unsigned: M) -> M:
        """A message with a silo's signature over a transcript."""
        key = self.silos[silo_id(silo)].member.identity
        return replace(unsigned, signature=key.sign(kind, tau, unsigned.body()))

    def put(self, silo: str, data: memoryview) -> None:
        """Upload a vector."""
        blob = api.Blob(vector=api.Blob.Vector(round=1, attempt=self.attempt))
        size = self.session.chunk_bytes
        for offset in range(0, len(data), size):
            self.call(
                silo,
                "PutChunk",
                api.PutChunkRequest,
                blob=blob,
                offset=offset,
                total=len(data),
                data=bytes(data[offset : offset + size]),
            )

    def step(self, *silos: str) -> dict[SiloId, Any]:
        """Have silos answer what comes next; returns what it was."""
        found = {}
        for silo in silos or self.session.silos:
            found[silo_id(silo)] = event = self.next(silo)
            if type(event) in _SEEN:
                self.send(silo, self.answer(silo, event))
        return found

    def to(self, kind: type, *silos: str) -> None:
        """Have silos answer all broadcasts that come before one of this kind."""
        for before in _SEEN:
            if before is kind:
                return
            self.step(*silos)

    def begin(self) -> None:
        """Open the task and say Ready for everybody."""
        self.open_task()
        self.ready()

    # What comes out.

    def result(self, silo: str) -> Result:
        """Wait for the round's result.

        Raises:
            Refused: the attempt was aborted; the code is "round-aborted".
        """
        event = self.next(silo)
        while event is None:
            event = self.next(silo)
        if not isinstance(event, Result):
            raise self.scene.refuse("round-aborted", observed=getattr(event, "because", ""))
        return event

    def outcome(self, *silos: str) -> Result | RoundAborted:
        """Have silos go on to the end of the attempt; how it ended for the first of them.

        An abort is noted as a refusal, "round-aborted".
        """
        for _ in range(len(_SEEN) + 1):
            found = self.step(*silos)
            event = found[silo_id(silos[0] if silos else self.session.silos[0])]
            if isinstance(event, RoundAborted):
                self.scene.refuse("round-aborted", observed=event.because)
            if isinstance(event, Result | RoundAborted):
                return event
        raise self.scene.refuse("no-outcome")

    def sum(self, silo: str = "a") -> Vector:
        """Download the round's sum."""
        data, size = bytearray(), self.codec.length * self.ring.word_bytes
        while len(data) < size:
            blob = api.Blob(sum=1)
            reply = self.call(silo, "GetChunk", api.GetChunkRequest, blob=blob, offset=len(data))
            data += reply.data
        return self.ring.unpack(data, self.codec.length)

    def is_sum_of(self, silos: Iterable[str]) -> bool:
        """Whether the round's sum is that of these silos' updates."""
        try:
            found = self.codec.decode(self.sum()).tensors["x"]
        except MalformedMessage:
            return False  # noise: not even the weights add up
        wanted = sum(self.values[silo_id(name)] for name in silos)
        return bool(np.allclose(found, wanted, atol=0.01))
