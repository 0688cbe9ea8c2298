"""Below the calls: who gets to speak to the coordinator at all, and in what.

The contract is mutual TLS 1.3 and nothing else. grpcio has no switch for the version: the one
cipher suite of TLS 1.2 on offer needs a key that our certificates never have. The weakened
coordinators are processes of their own, since a port is opened once.

Source: RFC 8446, section 4.1.3 and appendix C; Bhargavan et al., Downgrade Resilience in
Key-Exchange Protocols (IEEE S&P 2016).
"""

from __future__ import annotations

import socket
import ssl
from pathlib import Path
from typing import Any, Final

import grpc
from grpc_health.v1 import health_pb2

from secagg.coordinator import tls
from secagg.pki.names import server_dns_name
from threat_model.attacks.attack import Scene, attack
from threat_model.attacks.evil_coordinator import EvilCoordinator
from threat_model.attacks.evil_silo import CALL_SECONDS, Pair, code_of
from threat_model.attacks.on_certificates import HANDSHAKE
from threat_model.attacks.stage import CONSORTIUM
from threat_model.attacks.weak import Function, replaced, usual_suites

ALERT: Final = "tls-handshake"
TLS_HANDSHAKE: Final = bytes.fromhex("160301")
"""How each record of a first flight begins: RFC 8446, section 5.1."""


def is_heard(scene: Scene, channel: grpc.Channel) -> bool:
    """Whether a call comes to a handler, whatever that says to it."""
    check = channel.unary_unary(
        "/grpc.health.v1.Health/Check",
        request_serializer=health_pb2.HealthCheckRequest.SerializeToString,
        response_deserializer=health_pb2.HealthCheckResponse.FromString,
    )
    try:
        check(health_pb2.HealthCheckRequest(), timeout=CALL_SECONDS)
    except grpc.RpcError as error:
        if code_of(error) in (HANDSHAKE, "DEADLINE_EXCEEDED"):  # nobody has said anything to it
            raise scene.refuse(code_of(error), observed=error.details() or "") from None
    finally:
        channel.close()
    return True


def secure(scene: Scene, address: str, pair: Pair | None) -> grpc.Channel:
    """A channel as the SDK has it."""
    credentials = grpc.ssl_channel_credentials(
        scene.stage.consortium.authority.certificate_pem,
        pair.key if pair else None,
        pair.certificate if pair else None,
    )
    options = [
        ("grpc.ssl_target_name_override", server_dns_name(CONSORTIUM)),
        ("grpc.use_local_subchannel_pool", 1),
    ]
    return grpc.secure_channel(address, credentials, options)


def own(scene: Scene) -> Pair:
    """Silo d's key and certificate."""
    found = scene.stage.consortium.credentials("d")
    return Pair(found.tls_key_pem.reveal(), found.certificate_pem)


def insecure(_real: Function) -> Function:
    """A port without TLS."""

    def bind(server: grpc.aio.Server, settings: Any, certificate: Any) -> int:
        return server.add_insecure_port(settings.listen)

    return bind


@attack(
    threat="plaintext",
    reason=HANDSHAKE,
    weakening=replaced("secagg.coordinator.server:_bind", insecure),
)
def plaintext(scene: Scene) -> bool:
    """A call without TLS, which everybody on the way could read and change."""
    with scene.stage.serving(None) as ours:
        assert is_heard(scene, secure(scene, ours.address, own(scene)))
    with scene.stage.serving(scene.weakening, from_start=True) as server:
        return is_heard(scene, grpc.insecure_channel(server.address))


def asking_nobody(_real: Function) -> Function:
    """TLS as the web has it: only the server says who it is."""

    def credentials(self: tls.ServerCertificate) -> grpc.ServerCredentials:
        return grpc.dynamic_ssl_server_credentials(
            tls._configuration(self._current),
            self._fetch,  # type: ignore[arg-type]
            require_client_authentication=False,
        )

    return credentials


@attack(
    threat="no-certificate",
    reason=HANDSHAKE,
    weakening=replaced("secagg.coordinator.tls:ServerCertificate.credentials", asking_nobody),
)
def no_certificate(scene: Scene) -> bool:
    """A stranger without a certificate has its calls read, which is work, and a way to bugs."""
    with scene.stage.serving(scene.weakening, from_start=True) as server:
        assert is_heard(scene, secure(scene, server.address, own(scene)))
        return is_heard(scene, secure(scene, server.address, None))


@attack(
    threat="tls-downgrade",
    reason=ALERT,
    weakening=replaced("secagg.coordinator.launch:CIPHER_SUITES", usual_suites),
)
def tls_1_2(scene: Scene) -> bool:
    """A handshake of TLS 1.2, which shows the client's certificate to everybody on the way."""
    path = scene.stage.new_directory() / "pair.pem"
    path.write_bytes(own(scene).certificate + own(scene).key)
    with scene.stage.serving(scene.weakening, from_start=True) as server:
        assert handshake(scene, server.port, path, ssl.TLSVersion.TLSv1_3) == "TLSv1.3"
        return handshake(scene, server.port, path, ssl.TLSVersion.TLSv1_2) == "TLSv1.2"


def in_the_clear(_real: Function) -> Function:
    """An SDK that does without TLS."""
    return lambda address, _credentials: grpc.insecure_channel(address)


@attack(
    threat="plaintext",
    reason="only-a-handshake",
    weakening=replaced("client_sdk.channel:_dial", in_the_clear),
)
def coordinator_without_tls(scene: Scene) -> bool:
    """Somebody answers in the coordinator's place without TLS, and reads what silo a says."""
    with EvilCoordinator(scene) as evil, socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(CALL_SECONDS)
        evil.listen_at(listener.getsockname()[1])
        evil.start("a")
        connection, _ = listener.accept()
        with connection:
            connection.settimeout(CALL_SECONDS)
            said = connection.recv(24)
        scene.stage.drop_silo("a", weakened=scene.weakened)  # it would try for a long time
        if said[:3] == TLS_HANDSHAKE:
            raise scene.refuse("only-a-handshake", "a", said.hex())
        return said.startswith(b"PRI * HTTP/2.0")


def handshake(scene: Scene, port: int, pair: Path, highest: ssl.TLSVersion) -> str | None:
    """What is spoken with a client that knows no higher version."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.maximum_version = highest
    context.load_verify_locations(cadata=scene.stage.consortium.authority.certificate_pem.decode())
    context.load_cert_chain(pair)
    context.set_alpn_protocols(["h2"])
    try:
        with (
            socket.create_connection(("127.0.0.1", port), CALL_SECONDS) as raw,
            context.wrap_socket(raw, server_hostname=server_dns_name(CONSORTIUM)) as spoken,
        ):
            return spoken.version()
    except (ssl.SSLError, ConnectionError) as error:
        raise scene.refuse(ALERT, observed=str(error)) from None
