"""Certificates: who is taken for silo a without being it.

The coordinator takes a caller's name from its certificate alone. What is tried here is every other
way to read a name, a role or a time out of one, and every way to come by one that TLS accepts. The
adversary has got the consortium's authority to certify an odd name (its operator looks at requests,
not at how parsers read them), or a key of its own, or an old certificate of a's.

Source: Marlinspike, More Tricks For Defeating SSL In Practice (Black Hat 2009), for names that two
parsers read differently; RFC 5280, sections 4.2.1 and 6; RFC 9525. What BoringSSL refuses in the
handshake comes back to the caller as UNAVAILABLE, with nothing that tells why; the log of the
coordinator tells. In the same scene an honest silo is served by the same process.
"""

from __future__ import annotations

import posixpath
import re
import time
import unicodedata
from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any, Final
from urllib.parse import unquote

import grpc
from cryptography import x509
from cryptography.x509.oid import NameOID

from secagg.errors import CredentialError
from secagg.pki.authority import Authority
from secagg.pki.certificates import load_authority
from secagg.pki.names import Identity, Role, server_dns_name
from secagg.wire._pb import service_pb2 as api
from threat_model.attacks.attack import Refused, Scene, Weakening, attack
from threat_model.attacks.certificates import BOTH, Maker, issued, odd, reissued, under, uri
from threat_model.attacks.evil_coordinator import make_session
from threat_model.attacks.evil_silo import CALL_SECONDS, Pair, Study
from threat_model.attacks.stage import CONSORTIUM, COORDINATOR, Serving
from threat_model.attacks.weak import Function, believing, nothing, replaced

HANDSHAKE: Final = "UNAVAILABLE"
NO_ISSUER: Final = "unable-to-get-local-issuer-certificate"


def served_as_a(scene: Scene, pair: Pair, server: Serving) -> bool:
    """Whether the coordinator takes who has this key and certificate for silo a."""
    with Study(scene, server, make_session("abc")) as study:
        study.call("b", "ListResults", api.ListResultsRequest)
        impostor, begin = study.connect(pair), len(server.log)
        try:
            impostor("ListResults", api.ListResultsRequest(session_id=study.session_id))
        except Refused as refusal:
            if refusal.code == HANDSHAKE:
                raise scene.refuse(why_refused(server.log[begin:])) from None
            raise
        finally:
            impostor.close()
        return has_called(study, "a")


def why_refused(log: str) -> str:
    """What TLS found wrong with the last certificate, as gRPC logs it."""
    found = re.findall(r"CERTIFICATE_VERIFY_FAILED: ([a-zA-Z ]+)", log)
    return found[-1].lower().replace(" ", "-") if found else HANDSHAKE


def has_called(study: Study, silo: str) -> bool:
    """Whether the coordinator has heard of a silo in this session."""
    shown = study.admin("ShowSession", api.ShowSessionRequest(name=study.session.name), "Admin")
    return any(state.name == silo and state.last_call_age >= 0 for state in shown.silos)


def await_call(study: Study, silo: str) -> None:
    """Wait until the coordinator has heard of a silo, which calls in another thread."""
    end = time.monotonic() + CALL_SECONDS
    while not has_called(study, silo):
        if time.monotonic() > end:
            raise study.scene.refuse("silent", silo)
        time.sleep(0.005)


def misread(scene: Scene, *names: x509.GeneralName, **properties: Any) -> bool:
    """Whether a certificate of the authority with these names is read as silo a's."""
    pair = odd(Maker.authority(scene.stage.consortium), *names, **properties)
    with scene.stage.serving(scene.weakening) as server:
        return served_as_a(scene, pair, server)


# Names that two readers read differently.

SPELLINGS: Final[Mapping[str, Callable[[str], str]]] = {
    "trailing-dot": lambda text: text.rstrip("."),
    "case": str.lower,
    "percent": unquote,
    "look-alike": lambda text: unicodedata.normalize("NFKC", text),
    "path": lambda text: "secagg://" + posixpath.normpath(text.removeprefix("secagg://")),
    "column": lambda text: text[:80].rstrip(),
    "c-string": lambda text: text.split("\0")[0],
    "relative": lambda text: text.replace(":///", f"://{CONSORTIUM}/"),
    "default-role": lambda text: text.replace("/root/", "/silo/"),
    "default-name": lambda text: text if text.rpartition("/")[2] else text + "a",
    "default-uri": lambda text: text or f"secagg://{CONSORTIUM}/silo/a",
}


def respelt(real: Function, how: str) -> Function:
    """A reader of names that makes them regular first."""

    def names(extensions: x509.Extensions) -> list[x509.GeneralName]:
        return [
            x509.UniformResourceIdentifier(SPELLINGS[how](name.value))
            if isinstance(name, x509.UniformResourceIdentifier)
            else name
            for name in real(extensions)
        ]

    return names


def reading(how: str) -> Weakening:
    """A coordinator that makes names regular before it looks at them."""
    return replaced("secagg.pki.names:_alternative_names", respelt, how)


@attack(threat="misread-certificate", reason="identity-uri", weakening=reading("trailing-dot"))
def certificate_trailing_dot(scene: Scene) -> bool:
    """A name with DNS' dot at its end, which resolvers drop."""
    return misread(scene, uri("secagg://hospitals/silo/a."))


@attack(threat="misread-certificate", reason="identity-uri", weakening=reading("case"))
def certificate_case(scene: Scene) -> bool:
    """A name in capitals, which URIs and DNS compare without regard to case."""
    return misread(scene, uri("SECAGG://Hospitals/Silo/A"))


@attack(threat="misread-certificate", reason="identity-uri", weakening=reading("percent"))
def certificate_percent(scene: Scene) -> bool:
    """A name whose letter is written as a percent escape."""
    return misread(scene, uri("secagg://hospitals/silo/%61"))


@attack(threat="misread-certificate", reason="identity-uri", weakening=reading("look-alike"))
def certificate_unicode_look_alike(scene: Scene) -> bool:
    """A full-width letter, which Unicode's compatibility forms make an ordinary one."""
    return misread(scene, uri("secagg://hospitals/silo/\uff41"))


@attack(threat="misread-certificate", reason="identity-uri", weakening=reading("path"))
def certificate_path_tricks(scene: Scene) -> bool:
    """Silo d's name, from where the path goes up and down again to a's."""
    return misread(scene, uri("secagg://hospitals/silo/d/../a"))


@attack(threat="misread-certificate", reason="identity-uri", weakening=reading("column"))
def certificate_overlong(scene: Scene) -> bool:
    """A name longer than a reader's column: cut off there, and its padding removed, it is a's."""
    return misread(scene, uri("secagg://hospitals/silo/a" + " " * 100 + "d"))


@attack(threat="misread-certificate", reason="identity-uri", weakening=reading("c-string"))
def certificate_null_byte(scene: Scene) -> bool:
    """A zero byte in a name, at which readers in C stop."""
    return misread(scene, uri("secagg://hospitals/silo/a\0.d"))


@attack(threat="misread-certificate", reason="identity-uri", weakening=reading("relative"))
def certificate_empty(scene: Scene) -> bool:
    """No consortium at all, for which a reader puts its own."""
    return misread(scene, uri("secagg:///silo/a"))


@attack(threat="misread-certificate", reason="identity-uri", weakening=reading("default-name"))
def certificate_empty_name(scene: Scene) -> bool:
    """No name after the role, for which a reader puts the first that there is."""
    return misread(scene, uri("secagg://hospitals/silo/"))


@attack(threat="misread-certificate", reason="identity-uri", weakening=reading("default-uri"))
def certificate_empty_uri(scene: Scene) -> bool:
    """A URI of no letters."""
    return misread(scene, uri(""))


@attack(threat="misread-certificate", reason="identity-uri", weakening=reading("default-role"))
def certificate_unknown_role(scene: Scene) -> bool:
    """A role that there is not, for which a reader takes the least one."""
    return misread(scene, uri("secagg://hospitals/root/a"))


# Other places in a certificate where a name may stand.


def common_name(real: Function, *, first: bool) -> Function:
    """A reader that believes the subject's common name: first of all, or where it has no other."""

    def identity(certificate: x509.Certificate) -> Identity:
        names = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
        try:
            found = real(certificate)
        except CredentialError:
            return Identity(CONSORTIUM, Role.SILO, str(names[0].value))
        return replace(found, name=str(names[0].value)) if first else found

    return identity


def common_name_first(real: Function) -> Function:
    """The common name counts."""
    return common_name(real, first=True)


def common_name_else(real: Function) -> Function:
    """The common name counts where there is no other."""
    return common_name(real, first=False)


@attack(
    threat="misread-certificate",
    reason="identity-no-san",
    weakening=replaced("secagg.pki.names:certificate_identity", common_name_else),
)
def certificate_no_san(scene: Scene) -> bool:
    """No alternative name: the common name is a's."""
    return misread(scene, common_name="a")


@attack(
    threat="misread-certificate",
    reason="identity-no-san",
    weakening=replaced("secagg.pki.names:certificate_identity", common_name_else),
)
def certificate_empty_san(scene: Scene) -> bool:
    """Alternative names, but none of them: the common name is a's."""
    return misread(scene, common_name="a", empty_san=True)


@attack(
    threat="misread-certificate",
    reason="session-member",
    weakening=replaced("secagg.pki.names:certificate_identity", common_name_first),
)
def certificate_cn_against_san(scene: Scene) -> bool:
    """Silo d's URI, and a's name in the subject: ours takes it for d, who is in another session."""
    return misread(scene, uri("secagg://hospitals/silo/d"), common_name="a")


def first_alone(real: Function) -> Function:
    """A reader that takes the first name there is."""
    return lambda extensions: real(extensions)[:1]


@attack(
    threat="misread-certificate",
    reason="identity-two-sans",
    weakening=replaced("secagg.pki.names:_alternative_names", first_alone),
)
def certificate_two_sans(scene: Scene) -> bool:
    """Two URIs: one of a's for the coordinator, one of d's for whoever looks at the last."""
    names = uri("secagg://hospitals/silo/a"), uri("secagg://hospitals/silo/d")
    return misread(scene, *names)


def any_consortium(real: Function) -> Function:
    """A check that takes each certificate for one of the consortium that it names."""

    def identity(pem: bytes, *, consortium: str, **more: Any) -> Identity:
        try:
            found: Identity = real(pem, consortium=consortium, **more)
        except CredentialError as error:
            if error.code != "identity-consortium":
                raise
            found = real(pem, consortium="banks", **more)
        return found

    return identity


@attack(
    threat="misread-certificate",
    reason="identity-consortium",
    weakening=replaced("secagg.coordinator.identity:peer_identity", any_consortium),
)
def certificate_other_consortium(scene: Scene) -> bool:
    """Another consortium's silo a, certified by an authority that serves both."""
    return misread(scene, uri("secagg://banks/silo/a"))


ANY_ROLE: Final = replaced("secagg.coordinator.servicer:check_role", nothing)
"""A coordinator that serves every member alike."""


@attack(threat="wrong-role", reason="identity-role", weakening=ANY_ROLE)
def certificate_wrong_role(scene: Scene) -> bool:
    """An admin whose name is a calls what silos call."""
    return misread(scene, uri("secagg://hospitals/admin/a"))


@attack(
    threat="wrong-role",
    reason="identity-usage",
    weakening=replaced("secagg.pki.names:_is_leaf_for", believing),
)
def certificate_wrong_usage(scene: Scene) -> bool:
    """A certificate for both sides of TLS, which could serve as well as call."""
    return misread(scene, uri("secagg://hospitals/silo/a"), usages=BOTH)


@attack(
    threat="wrong-role",
    reason="identity-usage",
    weakening=replaced("secagg.pki.names:_is_leaf_for", believing),
)
def certificate_no_usage(scene: Scene) -> bool:
    """A certificate that does not say what it is for, which TLS takes for everything."""
    return misread(scene, uri("secagg://hospitals/silo/a"), usages=())


def last_part(_real: Function) -> Function:
    """A reader that looks for the name alone."""

    def identity(certificate: x509.Certificate) -> Identity:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        text = names.get_values_for_type(x509.UniformResourceIdentifier)[0]
        role = Role.ADMIN if "/admin/" in text else Role.SILO
        return Identity(CONSORTIUM, role, text.rsplit("/", 1)[1])

    return identity


@attack(
    threat="wrong-role",
    reason="identity-usage",
    weakening=replaced("secagg.pki.names:certificate_identity", last_part),
)
def certificate_of_the_coordinator(scene: Scene) -> bool:
    """A coordinator's certificate, usable on both sides, calls as the silo of its name."""
    names = uri("secagg://hospitals/coordinator/a"), x509.DNSName(server_dns_name(CONSORTIUM))
    return misread(scene, *names, usages=BOTH)


# Certificates that TLS itself refuses. Those that a proper authority never issues, or whose time
# is over, are as weak as the authority: it is weakened, in this process; the coordinator is ours.


def endless(_real: Function) -> Function:
    """Validity to the end of the authority's own."""
    return lambda self, now, days: load_authority(self.certificate_pem).not_valid_after_utc


@attack(
    threat="certificate-time",
    reason="certificate-has-expired",
    weakening=replaced("secagg.pki.authority:Authority._not_after", endless),
    part="authority",
)
def certificate_expired(scene: Scene) -> bool:
    """Last week's certificate of a's, with its key, out of a backup."""
    pair = issued(scene, "a", now=datetime.now(UTC) - timedelta(days=7), days=1)
    with scene.stage.serving(None) as server:
        return served_as_a(scene, pair, server)


def backdated(real: Function) -> Function:
    """Certificates that begin at once, whenever they should."""

    def builder(subject: Any, issuer: Any, public: Any, now: datetime, end: datetime) -> Any:
        return real(subject, issuer, public, min(now, datetime.now(UTC)), end)

    return builder


@attack(
    threat="certificate-time",
    reason="certificate-is-not-yet-valid",
    weakening=replaced("secagg.pki.certificates:_builder", backdated),
    part="authority",
)
def certificate_not_yet_valid(scene: Scene) -> bool:
    """Next week's certificate of a's, issued in advance and taken on its way."""
    pair = issued(scene, "a", now=datetime.now(UTC) + timedelta(days=7), days=1)
    with scene.stage.serving(None) as server:
        return served_as_a(scene, pair, server)


def able_to_sign(real: Function) -> Function:
    """Leaves with the authority's own constraints and usage."""

    def certify(identity: Any, public: Any, pem: bytes, key: Any, **times: Any) -> x509.Certificate:
        own = load_authority(pem).extensions
        kinds = (x509.BasicConstraints, x509.KeyUsage)
        instead = [own.get_extension_for_class(kind).value for kind in kinds]
        return reissued(real(identity, public, pem, key, **times), key, *instead)

    return certify


@attack(
    threat="leaf-as-authority",
    reason=NO_ISSUER,
    weakening=replaced("secagg.pki.authority:member_certificate", able_to_sign),
    part="authority",
)
def certificate_leaf_as_authority(scene: Scene) -> bool:
    """Silo d certifies a key of its own as a's, with the key that certifies d itself."""
    own = issued(scene, "d", now=datetime.now(UTC), days=30)
    pair = under(odd(Maker.of(own), uri("secagg://hospitals/silo/a")), own)
    with scene.stage.serving(None) as server:
        return served_as_a(scene, pair, server)


def one_profile(real: Function) -> Function:
    """An authority that certifies everybody as a silo, by one profile."""

    def certify(identity: Identity, *given: Any, **times: Any) -> x509.Certificate:
        made: x509.Certificate = real(replace(identity, role=Role.SILO, name="a"), *given, **times)
        return made

    return certify


@attack(
    threat="wrong-role",
    reason="unsupported-certificate-purpose",
    weakening=replaced("secagg.pki.authority:member_certificate", one_profile),
    part="authority",
)
def certificate_that_the_coordinator_has(scene: Scene) -> bool:
    """Whoever has the coordinator's own key and certificate calls a coordinator with them."""
    times = {"now": datetime.now(UTC), "days": 30}
    pair = issued(scene, COORDINATOR, role=Role.COORDINATOR, **times)
    with scene.stage.serving(None) as server:
        return served_as_a(scene, pair, server)


# Other makers of certificates. A coordinator trusts what it trusted when it was started, so the
# weakened one is a process of its own.


def also_trusting(_real: Function, pem: str) -> Function:
    """TLS that trusts a second root."""

    def configuration(credentials: Any) -> grpc.ServerCertificateConfiguration:
        pair = (credentials.tls_key_pem.reveal(), credentials.certificate_pem)
        roots = credentials.authority_pem + pem.encode()
        return grpc.ssl_server_certificate_configuration([pair], roots)

    return configuration


TRUSTING: Final = replaced("secagg.coordinator.tls:_configuration", also_trusting)


def served_under(scene: Scene, pair: Pair, root: bytes) -> bool:
    """Whether a certificate under another root, which the weakened one trusts, is taken for a's."""
    if scene.weakening is None:
        with scene.stage.serving(None) as server:
            return served_as_a(scene, pair, server)
    server = scene.stage.serve(replace(scene.weakening, parameters=(root.decode(),)))
    try:
        return served_as_a(scene, pair, server)
    finally:
        server.kill()


@attack(threat="foreign-authority", reason=NO_ISSUER, weakening=TRUSTING)
def certificate_self_signed(scene: Scene) -> bool:
    """A certificate of a's with everything right but its signature, which is its own."""
    pair = odd(None, uri("secagg://hospitals/silo/a"))
    return served_under(scene, pair, pair.certificate)


@attack(threat="foreign-authority", reason=NO_ISSUER, weakening=TRUSTING)
def certificate_of_another_authority(scene: Scene) -> bool:
    """A certificate of a's by an authority of the same name, in every field like ours."""
    place = scene.stage.new_directory() / "authority"
    made = Authority.create(place, CONSORTIUM, now=datetime.now(UTC))
    maker = Maker.of(Pair(made.key_pem.reveal(), made.certificate_pem))
    pair = odd(maker, uri("secagg://hospitals/silo/a"))
    return served_under(scene, pair, made.certificate_pem)
