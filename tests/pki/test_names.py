from __future__ import annotations

import ssl
from datetime import timedelta

import pytest
from cryptography import x509
from cryptography.x509.oid import ObjectIdentifier

from secagg.pki.authority import Authority
from secagg.pki.names import Identity, Role, parse_uri, peer_identity, server_dns_name

from .builders import CLIENT, CONSORTIUM, NOW, SERVER, certificate, refused, uri

GOOD = f"secagg://{CONSORTIUM}/silo/north"
COORDINATOR = f"secagg://{CONSORTIUM}/coordinator/hub"
DNS = x509.DNSName(f"coordinator.{CONSORTIUM}.secagg.internal")

BAD_URIS = {
    "empty": "",
    "empty-name": f"secagg://{CONSORTIUM}/silo/",
    "empty-consortium": "secagg:///silo/north",
    "trailing-dot": GOOD + ".",
    "consortium-trailing-dot": f"secagg://{CONSORTIUM}./silo/north",
    "case-name": f"secagg://{CONSORTIUM}/silo/North",
    "case-scheme": f"SECAGG://{CONSORTIUM}/silo/north",
    "case-role": f"secagg://{CONSORTIUM}/Silo/north",
    "percent": f"secagg://{CONSORTIUM}/silo/n%6frth",
    "cyrillic-o": f"secagg://{CONSORTIUM}/silo/n\u043erth",
    "fullwidth": f"secagg://{CONSORTIUM}/silo/\uff4eorth",
    "arabic-digit": f"secagg://{CONSORTIUM}/silo/north\u0661",
    "dot-dot": f"secagg://{CONSORTIUM}/silo/../silo/north",
    "dot": f"secagg://{CONSORTIUM}/silo/./north",
    "double-slash": f"secagg://{CONSORTIUM}//silo/north",
    "trailing-slash": GOOD + "/",
    "more-path": GOOD + "/admin",
    "slash-encoded": f"secagg://{CONSORTIUM}/silo%2Fnorth",
    "overlong": f"secagg://{CONSORTIUM}/silo/" + "a" * 64,
    "user": f"secagg://admin@{CONSORTIUM}/silo/north",
    "port": f"secagg://{CONSORTIUM}:1/silo/north",
    "query": GOOD + "?role=admin",
    "fragment": GOOD + "#x",
    "nul": GOOD + "\x00",
    "newline": GOOD + "\n",
    "space": " " + GOOD,
    "unknown-role": f"secagg://{CONSORTIUM}/authority/north",
    "role-attribute": f"secagg://{CONSORTIUM}/SILO/north",
    "hyphen-first": f"secagg://{CONSORTIUM}/silo/-north",
    "scheme": f"https://{CONSORTIUM}/silo/north",
    "no-scheme": f"{CONSORTIUM}/silo/north",
}


def read(pem: bytes, revoked: tuple[str, ...] = ()) -> Identity:
    return peer_identity(pem, consortium=CONSORTIUM, revoked=revoked, now=NOW)


@pytest.mark.parametrize("role", list(Role))
def test_uri_round_trip(role: Role) -> None:
    identity = Identity("c" * 63, role, "n-0")
    assert identity.uri == f"secagg://{'c' * 63}/{role.value}/n-0"
    assert parse_uri(identity.uri) == identity


@pytest.mark.parametrize("text", BAD_URIS.values(), ids=BAD_URIS.keys())
def test_bad_uri(text: str) -> None:
    with refused("identity-uri"):
        parse_uri(text)
    with refused("identity-uri"):
        read(certificate(uri(text)))


@pytest.mark.parametrize("text", ["", "A", "a.b", "-a", "a" * 64, "å", "a\n"])
def test_identity_needs_names(text: str) -> None:
    for arguments in ((text, Role.SILO, "a"), ("a", Role.SILO, text)):
        with refused("name"):
            Identity(*arguments)
    with refused("name"):
        server_dns_name(text)


def test_good_certificates() -> None:
    assert read(certificate(uri(GOOD))) == Identity(CONSORTIUM, Role.SILO, "north")
    coordinator = read(certificate(uri(COORDINATOR), DNS, usages=(SERVER,)))
    assert coordinator == Identity(CONSORTIUM, Role.COORDINATOR, "hub")


def test_common_name_names_nobody() -> None:
    with refused("identity-no-san"):
        read(certificate(common_name=GOOD))


def test_san_without_uri() -> None:
    with refused("identity-no-san"):
        read(certificate(DNS, x509.DNSName("north"), x509.RFC822Name("a@b.c")))


@pytest.mark.parametrize(
    "names",
    [
        (uri(GOOD), uri(f"secagg://{CONSORTIUM}/silo/south")),
        (uri(GOOD), uri(GOOD)),
        (uri(COORDINATOR), uri(GOOD)),
        (uri(GOOD), uri("https://example.org")),
        (uri(GOOD), DNS),
        (uri(GOOD), x509.RFC822Name("a@b.c")),
        (uri(f"secagg://{CONSORTIUM}/admin/north"), x509.DNSName("localhost")),
        (uri(COORDINATOR), DNS, x509.DNSName("localhost")),
    ],
)
def test_two_names(names: tuple[x509.GeneralName, ...]) -> None:
    with refused("identity-two-sans"):
        read(certificate(*names, usages=(SERVER,) if len(names) == 3 else (CLIENT,)))


def test_other_consortium() -> None:
    with refused("identity-consortium"):
        read(certificate(uri("secagg://banks/silo/north")))


@pytest.mark.parametrize(
    ("names", "options"),
    [
        ((uri(GOOD),), {"usages": (SERVER,)}),
        ((uri(GOOD),), {"usages": (CLIENT, SERVER)}),
        ((uri(GOOD),), {"usages": (ObjectIdentifier("2.5.29.37.0"),)}),
        ((uri(GOOD),), {"usages": ()}),
        ((uri(GOOD),), {"ca": True}),
        ((uri(GOOD),), {"ca": None}),
        ((uri(GOOD),), {"key_cert_sign": True}),
        ((uri(GOOD),), {"digital_signature": False, "key_cert_sign": True}),
        ((uri(COORDINATOR), DNS), {"usages": (CLIENT,)}),
        ((uri(COORDINATOR),), {"usages": (SERVER,)}),
        ((uri(COORDINATOR), x509.DNSName("localhost")), {"usages": (SERVER,)}),
        ((DNS, uri(COORDINATOR)), {"usages": (SERVER,)}),
    ],
)
def test_wrong_usage(names: tuple[x509.GeneralName, ...], options: dict[str, object]) -> None:
    with refused("identity-usage"):
        read(certificate(*names, **options))  # type: ignore[arg-type]


def test_time() -> None:
    edge = certificate(uri(GOOD), begin=NOW, end=NOW)
    assert read(edge).name == "north"
    with refused("identity-expired"):
        read(certificate(uri(GOOD), end=NOW - timedelta(seconds=1)))
    with refused("identity-not-yet-valid"):
        read(certificate(uri(GOOD), begin=NOW + timedelta(seconds=1)))


def test_revoked() -> None:
    pem = certificate(uri(GOOD), serial=0x0ABCDEF)
    assert read(pem, revoked=("abcdee", "1abcdef")).name == "north"
    with refused("identity-revoked"):
        read(pem, revoked=("abcdef",))


def test_no_certificate_or_several() -> None:
    pem = certificate(uri(GOOD))
    for data in (b"", b"nonsense", pem + pem, pem[:200], pem.replace(b"M", b"!")):
        with refused("identity-certificate"):
            read(data)


def test_unreadable_names() -> None:
    oid = x509.SubjectAlternativeName.oid
    with refused("identity-uri"):
        read(certificate(extra=(x509.UnrecognizedExtension(oid, b"\x30\x03\x86\x05"),)))
    # A URI of bytes that aren't even UTF-8.
    with refused("identity-uri"):
        read(certificate(extra=(x509.UnrecognizedExtension(oid, b"\x30\x04\x86\x02\xff\xfe"),)))


def test_two_san_extensions() -> None:
    # The builder refuses to repeat an extension, so another one's OID is turned into the SAN's.
    other = x509.UnrecognizedExtension(ObjectIdentifier("2.5.29.99"), b"\x30\x00")
    pem = certificate(uri(GOOD), extra=(other,))
    der = ssl.PEM_cert_to_DER_cert(pem.decode()).replace(b"\x55\x1d\x63", b"\x55\x1d\x11")
    with refused("identity-two-sans"):
        read(ssl.DER_cert_to_PEM_cert(der).encode())


def test_authority_is_no_peer(authority: Authority) -> None:
    with refused("identity-no-san"):
        read(authority.certificate_pem)
