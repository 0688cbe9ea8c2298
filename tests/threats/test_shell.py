"""The shells: what a silo says again, and who a certificate can speak for."""

from __future__ import annotations

import threading
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
import tenacity
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID

from client_sdk import attempt as sdk
from client_sdk import channel as sdk_channel
from client_sdk.channel import Channel
from secagg.coordinator.calls import METHODS
from secagg.errors import CredentialError, FaultyServer, RoleRefused
from secagg.masking import client
from secagg.masking.messages import Signatures, Unmasking
from secagg.pki import names as pki_names
from secagg.pki.names import Role, certificate_identity, server_dns_name
from secagg.simulation import TASK, Federation
from secagg.wire import attempt as wire
from secagg.wire._pb import service_pb2 as api

from .harness import FOUR, A, Attempt, B, C, nothing, refused, weakened, without_differencing


class Lost(grpc.RpcError):
    """The reply did not come."""

    def code(self) -> grpc.StatusCode:
        return grpc.StatusCode.UNAVAILABLE

    def details(self) -> str:
        return "the reply was lost"

    def trailing_metadata(self) -> tuple[()]:
        return ()


@pytest.fixture
def channel(monkeypatch: pytest.MonkeyPatch) -> tuple[Channel, list[bytes]]:
    """A channel whose first reply to Send is always lost, and what went over it."""
    sent: list[bytes] = []
    made = object.__new__(Channel)
    made._reached, made._closed, made._address = True, threading.Event(), "nowhere"

    def stub(method: str) -> Callable[..., Any]:
        def call(request: Any, timeout: float) -> Any:
            if method != "Send":
                return api.Ack()
            sent.append(request.SerializeToString(deterministic=True))
            if sent.count(sent[-1]) == 1:
                raise Lost
            return api.Ack()

        call.future = lambda request, timeout: SimpleNamespace(  # type: ignore[attr-defined]
            result=api.Ack, cancel=nothing
        )
        return call

    monkeypatch.setattr(made, "_pick_up", lambda method: (None, stub(method)))
    monkeypatch.setattr(made, "_put_down", nothing)
    monkeypatch.setattr(made, "_check_certificate", nothing)
    monkeypatch.setattr(sdk_channel, "_backoff", tenacity.wait_none())
    return made, sent


def shell_of(attempt: Attempt, name: client.SiloId, channel: Channel) -> sdk._Attempt:
    """The SDK's driver of one attempt, for one silo of a simulated one."""
    submission = sdk.Submission(
        channel,
        lambda: attempt.members[name],
        attempt.expected[name],
        attempt.ledgers[name],
        lambda: None,
        lambda key: (attempt.vectors[name].copy(), b""),
        attempt.entropy[name],
        SimpleNamespace(say=nothing),  # type: ignore[arg-type]
    )
    shell = sdk._Attempt(submission, attempt.members[name], None, attempt.descriptor)
    shell._state = attempt.states.get(name)
    return shell


def signed_by_all(attempt: Attempt) -> Signatures:
    survivors = attempt.survivors(*FOUR)
    return Signatures(tuple(attempt.tell(name, survivors) for name in FOUR))


def test_unmasking_asked_twice(channel: tuple[Channel, list[bytes]]) -> None:
    """The stored message goes out again, byte for byte; other survivors are never answered."""
    calls, sent = channel
    attempt = Attempt(Federation(FOUR)).to_masked()
    ready = attempt.states[A]
    signed = signed_by_all(attempt)
    shell = shell_of(attempt, A, calls)
    assert shell._take(signed)
    first, second = sent  # the first reply was lost
    assert first == second
    message = wire.client_message_from_wire(api.SendRequest.FromString(first))
    assert isinstance(message, Unmasking)
    others = attempt.survivors(A, B, C)

    def rewound(shell: sdk._Attempt, kind: object) -> object:
        """A shell that goes back to where it was, as one that recomputes would."""
        return ready

    with (
        weakened(sdk._Attempt, "_in", rewound),
        weakened(client._Once, "spend", nothing),
        without_differencing(),
    ):
        assert shell._take(others)  # a second τ3 is signed
    del sent[2:]
    with weakened(sdk._Attempt, "_in", rewound), weakened(client._Once, "spend", nothing):
        assert not shell._take(others)
        assert shell._submission.refusal is not None
        assert shell._submission.refusal.code == "differencing"
    shell = shell_of(attempt, A, calls)
    for event in (others, signed):
        shell._state = client.SharesRevealed(ready.attempt, bytes(32), FOUR, ())
        assert not shell._take(event)
        assert shell._submission.refusal is not None
        assert shell._submission.refusal.code == "event-order"
    assert len(sent) == 2


def test_broadcasts_out_of_turn(channel: tuple[Channel, list[bytes]]) -> None:
    """The coordinator skips phases or goes back: the state at hand is taken for another."""
    calls, sent = channel
    attempt = Attempt(Federation(FOUR)).to_masked()
    ready = attempt.states[A]
    for event in (attempt.roster, attempt.dealt(A), Signatures(())):
        attempt.states[A] = ready
        shell = shell_of(attempt, A, calls)
        assert not shell._take(event)
        assert isinstance(shell._submission.refusal, FaultyServer)
        assert shell._submission.refusal.code == "event-order"
    assert not sent
    with (
        weakened(sdk._Attempt, "_in", lambda self, kind: self._state),
        pytest.raises(AttributeError),
    ):
        shell_of(attempt, A, calls)._take(attempt.roster)


def certificate(uri: str, *dns: str, usage: x509.ObjectIdentifier) -> x509.Certificate:
    """A leaf as an authority could be talked into signing."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([])
    entries: list[x509.GeneralName] = [x509.UniformResourceIdentifier(uri)]
    entries += [x509.DNSName(entry) for entry in dns]
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now)
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName(entries), critical=True)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.KeyUsage(True, *(False,) * 8), critical=True)
        .add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
        .sign(key, hashes.SHA256())
    )


def test_silo_that_poses_as_the_coordinator() -> None:
    """A silo's certificate with the coordinator's name, or its usage, is nobody's certificate."""
    silo, host = "secagg://simulation/silo/a", server_dns_name("simulation")
    server, user = ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH
    assert certificate_identity(certificate(silo, usage=user)).role is Role.SILO
    for forged, code in (
        (certificate(silo, host, usage=server), "identity-two-sans"),
        (certificate(silo, usage=server), "identity-usage"),
        (certificate("secagg://simulation/coordinator/a", usage=server), "identity-usage"),
        (certificate("secagg://simulation/coordinator/a", host, usage=user), "identity-usage"),
    ):
        with pytest.MonkeyPatch.context() as patch:
            found = pki_names._alternative_names(forged.extensions)
            patch.setattr(pki_names, "_alternative_names", lambda _, n=found: n[:1])
            patch.setattr(pki_names, "expected_names", lambda _, n=found: n[:1])
            patch.setattr(pki_names, "_is_leaf_for", lambda *_: True)
            assert certificate_identity(forged).name == "a"
        with refused(code, CredentialError):
            certificate_identity(forged)


def test_message_under_anothers_name() -> None:
    """A silo sends a message that names another one: the certificate decides."""
    attempt = Attempt(Federation(FOUR))
    advert = attempt.tell(B, attempt.descriptor)
    session_id = attempt.descriptor.session_id
    request = wire.client_message_to_wire(advert, session_id=session_id, round_number=1, attempt=1)
    taken: list[object] = []

    def send(message: Any, *rest: Any) -> None:
        taken.append(message.sender)

    session = SimpleNamespace(send=send)
    handle = METHODS["Send"].handle
    with weakened(wire, "client_message_from_wire", lambda _: SimpleNamespace(sender=A)):
        handle(session, request, A, 0.0)  # who believed the message's own name
        assert taken == [A]
    with refused("sender-identity", RoleRefused):
        handle(session, request, A, 0.0)
    assert taken == [A]
    assert attempt.expected[A].task == TASK
