"""A consortium on disk, a real ``secagg serve`` process, and clients of every kind."""

from __future__ import annotations

import os
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from secagg.config import SessionConfig, SiloId
from secagg.coordinator.limits import Limits
from secagg.coordinator.state import Event
from secagg.masking import client
from secagg.masking.transcript import base_of, first_history, session_hash
from secagg.pki.authority import Authority
from secagg.pki.credentials import Credentials, load_credentials
from secagg.pki.enrolment import create_request, install_bundle, renewal_request
from secagg.pki.names import Role, server_dns_name
from secagg.wire import attempt as wire
from secagg.wire import session as wire_session
from secagg.wire._pb import service_pb2 as api

from .play import CONSORTIUM, POLICY, TASK, Player, make_config, sign_opening

SILOS = "abcd"
CLIENT = (ExtendedKeyUsageOID.CLIENT_AUTH,)
SERVER = (ExtendedKeyUsageOID.SERVER_AUTH,)
START_SECONDS = 60.0
CALL_SECONDS = 30.0


def uri(text: str) -> x509.GeneralName:
    return x509.UniformResourceIdentifier(text)


@dataclass(frozen=True)
class Pair:
    """A TLS key and a certificate, PEM."""

    key: bytes
    certificate: bytes


class Consortium:
    """An authority and its members' directories."""

    def __init__(self, directory: Path, name: str = CONSORTIUM) -> None:
        self.directory, self.name = directory, name
        self.now = datetime.now(UTC)
        self.authority = Authority.create(directory / "authority", name, now=self.now)
        self.enrol(Role.COORDINATOR, "main")
        self.enrol(Role.ADMIN, "boss")
        for silo in SILOS:
            self.enrol(Role.SILO, silo)
        self.renew(Role.COORDINATOR, "main")  # its manifest lists the silos only now

    def path(self, role: Role, name: str) -> Path:
        return self.directory / f"{role}-{name}"

    def enrol(self, role: Role, name: str) -> None:
        path = self.path(role, name)
        request = create_request(path, role, name, self.name, os.urandom)
        bundle = self.authority.approve(request, now=self.now)
        install_bundle(path, bundle, fingerprint=self.authority.fingerprint, now=self.now)

    def renew(self, role: Role, name: str) -> None:
        """Install a new certificate for the same keys."""
        path = self.path(role, name)
        bundle = self.authority.approve(
            renewal_request(path, role, name, self.name), now=datetime.now(UTC)
        )
        install_bundle(path, bundle, fingerprint=None, now=datetime.now(UTC))

    def credentials(self, role: Role, name: str) -> Credentials:
        return load_credentials(self.path(role, name), now=datetime.now(UTC), role=role)

    def pair(self, role: Role, name: str) -> Pair:
        found = self.credentials(role, name)
        return Pair(found.tls_key_pem.reveal(), found.certificate_pem)

    def pair_as_it_lies(self, role: Role, name: str) -> Pair:
        """A member's key and certificate, unchecked."""
        path = self.path(role, name)
        return Pair((path / "tls.key").read_bytes(), (path / "certificate.pem").read_bytes())

    def odd(
        self,
        *names: x509.GeneralName,
        usages: Sequence[x509.ObjectIdentifier] = CLIENT,
        begin: timedelta = timedelta(minutes=-5),
        end: timedelta = timedelta(days=1),
        common_name: str = "secagg://hospitals/silo/d",
        self_signed: bool = False,
    ) -> Pair:
        """A certificate that the authority signed and never would."""
        now = datetime.now(UTC)
        key = ec.generate_private_key(ec.SECP256R1())
        issuer = x509.load_pem_x509_certificate(self.authority.certificate_pem)
        signer = serialization.load_pem_private_key(self.authority.key_pem.reveal(), None)
        assert isinstance(signer, ec.EllipticCurvePrivateKey)
        builder = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)]))
            .issuer_name(issuer.subject)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now + begin)
            .not_valid_after(now + end)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(
                x509.KeyUsage(True, False, False, False, False, False, False, False, False),
                critical=True,
            )
        )
        if usages:
            builder = builder.add_extension(x509.ExtendedKeyUsage(usages), critical=False)
        if names:
            builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        certificate = builder.sign(key if self_signed else signer, hashes.SHA256())
        return Pair(
            key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            ),
            certificate.public_bytes(serialization.Encoding.PEM),
        )


class Stub:
    """A connection of its own, for one certificate."""

    def __init__(self, address: str, consortium: str, root: bytes, pair: Pair | None) -> None:
        credentials = grpc.ssl_channel_credentials(
            root, pair.key if pair else None, pair.certificate if pair else None
        )
        self.channel = grpc.secure_channel(
            address,
            credentials,
            options=[
                ("grpc.ssl_target_name_override", server_dns_name(consortium)),
                ("grpc.use_local_subchannel_pool", 1),
                ("grpc.max_receive_message_length", -1),
                ("grpc.enable_retries", 0),
            ],
        )

    def method(self, name: str, service: str = "Aggregation") -> Any:
        """A call of the contract, as ``grpc`` has it."""
        descriptor = api.DESCRIPTOR.services_by_name[service]
        method = descriptor.methods_by_name[name]
        return self.channel.unary_unary(
            f"/{descriptor.full_name}/{name}",
            request_serializer=lambda m: m if isinstance(m, bytes) else m.SerializeToString(),
            response_deserializer=getattr(api, method.output_type.name).FromString,
        )

    def __call__(self, name: str, request: Any, service: str = "Aggregation", **more: Any) -> Any:
        return self.method(name, service)(request, timeout=CALL_SECONDS, **more)

    def admin(self, name: str, request: Any) -> Any:
        return self(name, request, "Admin")


@dataclass
class Server:
    """A running coordinator."""

    consortium: Consortium
    log_path: Path
    process: subprocess.Popen[bytes]
    port: int
    stubs: dict[tuple[Role, str], Stub] = field(default_factory=dict)
    opened: list[Stub] = field(default_factory=list)

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def log(self) -> bytes:
        return self.log_path.read_bytes()

    def connect(self, pair: Pair | None) -> Stub:
        """A new connection."""
        root = self.consortium.authority.certificate_pem
        stub = Stub(self.address, self.consortium.name, root, pair)
        self.opened.append(stub)
        return stub

    def member(self, role: Role, name: str) -> Stub:
        """A member's connection, kept."""
        if (role, name) not in self.stubs:
            self.stubs[role, name] = self.connect(self.consortium.pair(role, name))
        return self.stubs[role, name]

    def silo(self, name: str) -> Stub:
        return self.member(Role.SILO, name)

    @property
    def boss(self) -> Stub:
        return self.member(Role.ADMIN, "boss")

    def create(self, name: str, **changes: Any) -> Study:
        """A new session."""
        config = make_config(name=name, **changes)
        request = api.CreateSessionRequest(config=wire_session.config_to_wire(config))
        return Study(self, config, self.boss.admin("CreateSession", request).session_id)

    def handshake(self, pair: Pair, highest: ssl.TLSVersion) -> ssl.SSLSocket:
        """A TLS connection by OpenSSL instead of gRPC."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.maximum_version = highest
        context.load_verify_locations(cadata=self.consortium.authority.certificate_pem.decode())
        path = self.log_path.parent / f"pair-{os.urandom(4).hex()}.pem"
        path.write_bytes(pair.certificate + pair.key)
        context.load_cert_chain(path)
        context.set_alpn_protocols(["h2"])
        raw = socket.create_connection(("127.0.0.1", self.port), timeout=CALL_SECONDS)
        try:
            return context.wrap_socket(raw, server_hostname=server_dns_name(self.consortium.name))
        except BaseException:
            raw.close()
            raise

    def stop(self, number: int = signal.SIGTERM) -> int:
        """End the process and return its exit code."""
        for stub in self.opened:
            stub.channel.close()
        if self.process.poll() is None:
            self.process.send_signal(number)
        try:
            return self.process.wait(START_SECONDS)
        finally:
            if self.process.poll() is None:
                self.process.kill()
                self.process.wait()


def toml(values: dict[str, Any]) -> Iterator[str]:
    """Lines of a table."""
    for key, value in values.items():
        yield f"{key} = {value!r}" if isinstance(value, int | float) else f'{key} = "{value}"'


@contextmanager
def serving(
    consortium: Consortium, directory: Path, prelude: str = "", **settings: Any
) -> Iterator[Server]:
    """Run ``secagg serve`` on a free port of the loopback interface, after some Python first.

    Settings that are limits go where limits belong.
    """
    directory.mkdir(parents=True, exist_ok=True)
    values: dict[str, Any] = {
        "listen": "127.0.0.1:0",
        "credentials": str(consortium.path(Role.COORDINATOR, "main")),
        "state": str(directory / "state"),
        "log_level": "debug",
        "grace": 0.5,
    }
    limits: dict[str, Any] = {"max_weights_bytes": 1000}
    names = {limit.name for limit in fields(Limits)}
    for name, value in settings.items():
        (limits if name in names else values)[name] = value
    config, port_file, log_path = (directory / name for name in ("c.toml", "port", "log"))
    config.write_text("\n".join([*toml(values), "[limits]", *toml(limits)]))
    program = f"{prelude}\nfrom secagg.cli import main; main()"
    command = [sys.executable, "-c", program, "serve"]
    command += ["--config", str(config), "--port-file", str(port_file)]
    with log_path.open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
    give_up = time.monotonic() + START_SECONDS
    while not port_file.exists():
        if process.poll() is not None or time.monotonic() > give_up:
            process.kill()
            process.wait()
            pytest.fail(f"the server did not start: {log_path.read_text()}")
        time.sleep(0.02)
    server = Server(consortium, log_path, process, int(port_file.read_text()))
    try:
        yield server
    finally:
        server.stop()


@dataclass
class Study:
    """A session at a server, as its clients know it."""

    server: Server
    config: SessionConfig
    session_id: bytes

    @property
    def name(self) -> str:
        return self.config.name

    def show(self) -> api.ShowSessionReply:
        return self.server.boss.admin("ShowSession", api.ShowSessionRequest(name=self.name))

    def snapshot(self) -> bytes:
        """All that an admin can see, but for the time since the last calls."""
        shown = self.show()
        for silo in shown.silos:
            silo.last_call_age = float(silo.last_call_age >= 0)
        return bytes(shown.SerializeToString(deterministic=True))

    def call(self, silo: str, method: str, kind: Any, **fields: Any) -> Any:
        """A silo's call in this session."""
        return self.server.silo(silo)(method, kind(session_id=self.session_id, **fields))

    def opening(self, silo: str = "a", **changes: Any) -> api.TaskOpening:
        """A signed opening on the wire."""
        key = self.server.consortium.credentials(Role.SILO, silo).identity_key
        assert key is not None
        signed = sign_opening(self.config, self.session_id, silo, key, **changes)
        assert signed.signature
        return wire_session.opening_to_wire(signed)

    def open(self, task: str = TASK) -> None:
        reply = self.call("a", "OpenTask", api.OpenTaskRequest, task=task)
        assert reply.propose
        self.call("a", "ProposeTask", api.ProposeTaskRequest, opening=self.opening(task=task))

    def base(self, task: str = TASK) -> bytes:
        """The base of the first round."""
        key = self.server.consortium.credentials(Role.SILO, "a").identity_key
        assert key is not None
        signed = sign_opening(self.config, self.session_id, "a", key, task=task)
        agreed = session_hash(self.config)
        return base_of(first_history(agreed), signed.opening.digest(agreed))

    def ready(self, *silos: str, base: bytes | None = None) -> None:
        for silo in silos or self.config.silos:
            self.call(silo, "Ready", api.ReadyRequest, task=TASK, base=base or self.base())

    def player(self, silo: str) -> Player:
        """A silo that takes the protocol's real steps over its own connection."""
        credentials = self.server.consortium.credentials(Role.SILO, silo)
        assert credentials.identity_key is not None
        reply = self.server.silo(silo)("JoinSession", api.JoinSessionRequest(session=self.name))
        assert reply.session_id == self.session_id
        member = client.Member(
            SiloId(silo),
            credentials.identity_key,
            self.server.consortium.authority.manifest,
            POLICY,
            wire_session.config_from_wire(reply.config),
            reply.session_id,
        )
        player = Player(member, WirePort(self))
        player.expect(TASK, 1, self.base())
        return player

    def start(self) -> dict[str, Player]:
        """Open the task and an attempt of everybody."""
        players = {silo: self.player(silo) for silo in self.config.silos}
        self.open()
        self.ready()
        return players  # type: ignore[return-value]


@dataclass
class WirePort:
    """The server's stubs; keeps every message that went over the wire."""

    study: Study
    seen: list[Any] = field(default_factory=list)

    def _call(self, silo: str, method: str, kind: Any, **fields: Any) -> Any:
        request = kind(session_id=self.study.session_id, **fields)
        reply = self.study.server.silo(silo)(method, request)
        self.seen += [request, reply]
        return reply

    def next(self, silo: SiloId, round_number: int, attempt: int, seen: int) -> Event | None:
        reply = self._call(
            silo, "Next", api.NextRequest, round=round_number, attempt=attempt, seen=seen
        )
        name = reply.WhichOneof("event")
        if name == "aborted":
            return wire_session.aborted_from_wire(reply.aborted)
        if name in (None, "ended"):
            return None
        event: Event = getattr(wire, f"{name}_from_wire")(getattr(reply, name))
        return event

    def put(self, silo: SiloId, round_number: int, attempt: int, data: memoryview) -> None:
        chunk = self.study.config.chunk_bytes
        where = api.Blob(vector=api.Blob.Vector(round=round_number, attempt=attempt))
        for offset in range(0, len(data), chunk):
            self._call(
                silo,
                "PutChunk",
                api.PutChunkRequest,
                blob=where,
                offset=offset,
                total=len(data),
                data=bytes(data[offset : offset + chunk]),
            )

    def send(self, message: Any, round_number: int, attempt: int) -> None:
        request = wire.client_message_to_wire(
            message,
            session_id=self.study.session_id,
            round_number=round_number,
            attempt=attempt,
        )
        self.seen.append(request)
        self.study.server.silo(message.sender)("Send", request)

    def sum(self, silo: str, round_number: int, size: int) -> bytes:
        """Download a round's sum."""
        chunk = self.study.config.chunk_bytes
        return b"".join(
            self._call(
                silo, "GetChunk", api.GetChunkRequest, blob=api.Blob(sum=round_number), offset=at
            ).data
            for at in range(0, size, chunk)
        )


def code_of(error: grpc.RpcError) -> str | None:
    """The stable code of a refusal."""
    for entry in error.trailing_metadata() or ():
        if entry.key == "secagg-code":
            return str(entry.value)
    return None


@contextmanager
def refused(status: grpc.StatusCode, code: str | None) -> Iterator[None]:
    """Expect a refusal with this status and this stable code."""
    with pytest.raises(grpc.RpcError) as caught:
        yield
    assert (caught.value.code(), code_of(caught.value)) == (status, code), caught.value.details()
