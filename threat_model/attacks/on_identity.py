"""Who calls, on every call: members of no session, other roles, members that are none any more.

TLS says who is at the other end when a connection begins. A certificate ends, is revoked, or is
its silo's while the session is others'; and what a connection says of itself in a header is its
sender's word. On the silo's side: who poses as the coordinator.

Source: RFC 9525; Envoy's documentation of x-forwarded-client-cert, which a proxy has to sanitise;
CWE-290 (spoofing), CWE-613 (sessions that do not end).
"""

from __future__ import annotations

import os
import time
from collections.abc import Collection, Iterable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any, Final

from cryptography import x509

from client_sdk.channel import Channel
from secagg.masking.messages import Dealt, Descriptor, Result, Roster, Signatures, Survivors
from secagg.pki.authority import Authority
from secagg.pki.credentials import Credentials
from secagg.pki.enrolment import create_request
from secagg.pki.names import Identity, Role, load_certificate, parse_uri, server_dns_name
from secagg.wire._pb import service_pb2 as api
from secagg.wire.session import config_to_wire
from threat_model.attacks.attack import Refused, Scene, attack
from threat_model.attacks.certificates import BOTH, Maker, issued, odd, reissued, uri
from threat_model.attacks.evil_coordinator import EvilCoordinator, make_session
from threat_model.attacks.evil_silo import Pair, Study
from threat_model.attacks.on_certificates import ANY_ROLE, await_call, has_called
from threat_model.attacks.stage import CONSORTIUM
from threat_model.attacks.weak import Function, nothing, replaced

AGGREGATION: Final = api.DESCRIPTOR.services_by_name["Aggregation"].methods_by_name
WAITS: Final = 5.0
"""Longer than any refusal takes; a call that waits is served."""
PHASES: Final = (Descriptor, Roster, Dealt, Survivors, Signatures)


def requests(study: Study) -> dict[str, Any]:
    """A request of every method that is for silos, about this session."""
    found: dict[str, Any] = {
        "JoinSession": api.JoinSessionRequest(session=study.session.name),
        "GetChunk": api.GetChunkRequest(session_id=study.session_id, blob=api.Blob(sum=1)),
    }
    for name, method in AGGREGATION.items():
        kind = getattr(api, method.input_type.name)
        if name not in found:
            found[name] = kind(session_id=study.session_id)
    return found


def is_served(study: Study, outsider: str) -> bool:
    """Whether any call of this silo's about the session is answered but as a stranger's.

    Any other refusal comes from behind the check of members, but for that of too many calls.
    """
    for method, request in requests(study).items():
        try:
            study.member(outsider)(method, request, seconds=WAITS)
        except Refused as refusal:
            if refusal.code == "session-member" or refusal.code.startswith("quota-"):
                continue
        return True
    return False


@attack(
    threat="outsider",
    reason="session-member",
    weakening=replaced("secagg.coordinator.session:Session.check_member", nothing),
)
def outsider_in_every_phase(scene: Scene) -> bool:
    """Silo e of the consortium, which is not in the session, tries all calls in all phases."""
    with scene.stage.serving(scene.weakening) as server, Study(scene, server) as study:
        served = [is_served(study, "e")]
        study.begin()
        for _ in PHASES:
            study.step()
            served.append(is_served(study, "e"))
        study.result("a")
        served.append(is_served(study, "e"))
        return all(served) if scene.weakened else any(served)


@attack(
    threat="outsider",
    reason="session-member",
    weakening=replaced("secagg.coordinator.session:Session.check_member", nothing),
)
def outsider_reads_the_sum(scene: Scene) -> bool:
    """Silo f, which has no part in the round, downloads its sum."""
    with scene.stage.serving(scene.weakening) as server, Study(scene, server) as study:
        study.begin()
        study.to(Result)
        study.result("a")
        return bool((study.sum("f") == study.sum("a")).all())


@attack(threat="wrong-role", reason="identity-role", weakening=ANY_ROLE)
def silo_as_admin(scene: Scene) -> bool:
    """A silo creates a session of its own, and ends one that is not to its liking."""
    with scene.stage.serving(scene.weakening) as server, Study(scene, server) as study:
        name, own = study.session.name, make_session()
        for method, request in (
            ("ListSessions", api.ListSessionsRequest()),
            ("ShowSession", api.ShowSessionRequest(name=name)),
            ("AbortSession", api.AbortSessionRequest(name=name)),
            ("CreateSession", api.CreateSessionRequest(config=config_to_wire(own))),
        ):
            try:
                study.member("d")(method, request, "Admin")
            except Refused:
                continue
        listed = study.admin("ListSessions", api.ListSessionsRequest(), "Admin").sessions
        gained = [study_state(listed, name) == "aborted", bool(study_state(listed, own.name))]
        return all(gained) if scene.weakened else any(gained)


def study_state(listed: Iterable[Any], name: str) -> str:
    """A session's state, or nothing if there is none of this name."""
    return next((str(session.state) for session in listed if session.name == name), "")


# What was true when the connection began.


def blind_to(real: Function, what: str) -> Function:
    """A check of certificates that sees no revocation, or no time."""

    def identity(pem: bytes, *, now: datetime, revoked: Collection[str], **more: Any) -> Identity:
        if what == "time":
            now = load_certificate(pem).not_valid_before_utc
        else:
            revoked = ()
        found: Identity = real(pem, now=now, revoked=revoked, **more)
        return found

    return identity


@attack(
    threat="open-connection",
    reason="identity-revoked",
    weakening=replaced("secagg.coordinator.identity:peer_identity", blind_to, "revocation"),
)
def revoked_on_an_open_connection(scene: Scene) -> bool:
    """A thief of d's key is connected; d is enrolled anew, and the thief goes on as d."""
    with (
        scene.stage.serving(scene.weakening, own=True) as server,
        Study(scene, server, make_session("abd")) as study,
    ):
        study.call("d", "ListResults", api.ListResultsRequest)
        place = scene.stage.new_directory() / "anew"
        request = create_request(place, Role.SILO, "d", CONSORTIUM, os.urandom)
        server.authority.approve(request, now=datetime.now(UTC))
        server.publish()
        study.call("d", "ListResults", api.ListResultsRequest)
        return True


def as_it_began(_real: Function) -> Function:
    """A look at the session for one who waits, who was somebody when its call began."""

    def look(self: Any, method: Any, request: Any, peer: Any) -> Any:
        return method.handle(
            method.session(self._sessions, request), request, peer, time.monotonic()
        )

    return look


@attack(
    threat="open-connection",
    reason="session-member",
    weakening=replaced("secagg.coordinator.servicer:Servicer._look", as_it_began),
)
def revoked_while_it_waits(scene: Scene) -> bool:
    """Silo c waits in Next when it is expelled, and is told of the round's result all the same."""
    with (
        scene.stage.serving(scene.weakening, own=True) as server,
        Study(scene, server, make_session("abce"), manifest=server.publish()) as study,
    ):
        waiting = study.later("c", "Next", api.NextRequest, round=1, seen=api.STEP_LEFT)
        await_call(study, "c")
        server.authority.revoke(Role.SILO, "c", now=datetime.now(UTC))
        study.admit(server.publish())
        study.open_task()
        study.ready("a", "b", "e")
        study.to(Result, "a", "b", "e")
        return bool(waiting.result().HasField("result"))


@attack(
    threat="open-connection",
    reason="identity-expired",
    weakening=replaced("secagg.coordinator.identity:peer_identity", blind_to, "time"),
)
def expired_on_an_open_connection(scene: Scene) -> bool:
    """A certificate ends while its connection is open."""
    maker = Maker.authority(scene.stage.consortium)
    with scene.stage.serving(scene.weakening) as server, Study(scene, server) as study:
        pair = odd(maker, uri("secagg://hospitals/silo/d"), lasts=timedelta(seconds=4))
        silo = study.connect(pair)
        request = api.ListResultsRequest(session_id=study.session_id)
        try:
            silo("ListResults", request)
            end = load_certificate(pair.certificate).not_valid_after_utc
            time.sleep((end - datetime.now(UTC)).total_seconds() + 0.01)
            silo("ListResults", request)
        finally:
            silo.close()
        return True


def by_header(real: Function) -> Function:
    """Who calls, as a gateway in front of the coordinator would say."""

    def caller(context: Any, *more: Any) -> Identity:
        found: Identity = real(context, *more)
        headers = {str(key): str(value) for key, value in context.invocation_metadata() or ()}
        text = headers.get("x-forwarded-client-cert")
        return parse_uri(text.removeprefix("URI=")) if text else found

    return caller


@attack(
    threat="anothers-name",
    reason="session-member",
    weakening=replaced("secagg.coordinator.servicer:caller", by_header),
)
def identity_from_a_header(scene: Scene) -> bool:
    """Silo d says in a header, as gateways do, that it is a."""
    with (
        scene.stage.serving(scene.weakening) as server,
        Study(scene, server, make_session("abc")) as study,
    ):
        name = "secagg://hospitals/silo/a"
        headers = [("x-forwarded-client-cert", f"URI={name}"), ("x-secagg-silo", "a")]
        request = api.ListResultsRequest(session_id=study.session_id)
        study.member("d")("ListResults", request, metadata=headers)
        return has_called(study, "a")


# Who poses as the coordinator.


class Impostor(EvilCoordinator):
    """A coordinator with a certificate of somebody's.

    Args:
        pair: what it serves with.
    """

    def __init__(self, scene: Scene, pair: Pair) -> None:
        super().__init__(scene, make_session("abc"))
        self._pair = pair

    @property
    def tls_pair(self) -> tuple[bytes, bytes]:
        """What it serves with."""
        return self._pair.key, self._pair.certificate

    def is_joined(self) -> bool:
        """Whether a silo's SDK speaks to it."""
        self.start("a")
        self.await_opening()
        return any(method == "JoinSession" for _, method, _ in self.seen)


def able_to_serve(real: Function) -> Function:
    """One profile for everybody: the coordinator's name, and both sides of TLS."""

    def certify(identity: Any, public: Any, pem: bytes, key: Any, **times: Any) -> x509.Certificate:
        names = [uri(identity.uri), x509.DNSName(server_dns_name(identity.consortium))]
        instead = x509.SubjectAlternativeName(names), x509.ExtendedKeyUsage(BOTH)
        return reissued(real(identity, public, pem, key, **times), key, *instead)

    return certify


@attack(
    threat="silo-as-coordinator",
    reason="coordinator-certificate",
    weakening=replaced("secagg.pki.authority:member_certificate", able_to_serve),
    part="authority",
)
def silo_as_coordinator(scene: Scene) -> bool:
    """Silo d serves where the SDK expects the coordinator, with the certificate that it has."""
    pair = issued(scene, "d", now=datetime.now(UTC), days=30)
    with Impostor(scene, pair) as evil:
        return evil.is_joined()


def trusting_two(real: Function, pem: str) -> Function:
    """An SDK that trusts a second root."""

    def dial(address: str, credentials: Credentials) -> Channel:
        roots = credentials.authority_pem + pem.encode()
        found: Channel = real(address, replace(credentials, authority_pem=roots))
        return found

    return dial


@attack(
    threat="stranger-as-coordinator",
    reason="coordinator-certificate",
    weakening=replaced("client_sdk.channel:_dial", trusting_two),
)
def another_authoritys_coordinator(scene: Scene) -> bool:
    """Somebody on the network answers with a coordinator's certificate of its own authority."""
    place = scene.stage.new_directory()
    made = Authority.create(place / "authority", CONSORTIUM, now=datetime.now(UTC))
    request = create_request(place / "main", Role.COORDINATOR, "main", CONSORTIUM, os.urandom)
    bundle = made.approve(request, now=datetime.now(UTC))
    pair = Pair((place / "main" / "tls.key").read_bytes(), bundle.certificate_pem)
    if scene.weakening is not None:
        scene.weakening = replace(scene.weakening, parameters=(made.certificate_pem.decode(),))
    with Impostor(scene, pair) as evil:
        return evil.is_joined()
