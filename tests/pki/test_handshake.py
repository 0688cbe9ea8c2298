"""The certificates in OpenSSL's hands: real handshakes over memory, without a socket.

OpenSSL reads the machine's clock, so these certificates are made for now.
"""

from __future__ import annotations

import os
import ssl
from datetime import UTC, datetime
from pathlib import Path

import pytest

from secagg.pki.authority import Authority
from secagg.pki.enrolment import create_request, install_bundle
from secagg.pki.names import Role, peer_identity, server_dns_name

from .builders import CONSORTIUM


@pytest.fixture
def members(tmp_path: Path) -> Path:
    now = datetime.now(UTC)
    authority = Authority.create(tmp_path / "authority", CONSORTIUM, now=now)
    for role in Role:
        made = create_request(tmp_path / role, role, "x", CONSORTIUM, os.urandom)
        install_bundle(tmp_path / role, authority.approve(made, now=now), fingerprint=None, now=now)
    return tmp_path


def context(protocol: int, directory: Path) -> ssl.SSLContext:
    result = ssl.SSLContext(protocol)
    result.minimum_version = ssl.TLSVersion.TLSv1_3
    result.verify_mode = ssl.CERT_REQUIRED
    result.load_verify_locations(directory / "authority.pem")
    result.load_cert_chain(directory / "certificate.pem", directory / "tls.key")
    return result


def handshake(server: Path, client: Path, name: str) -> bytes:
    """Shake hands and return the client's certificate as the server saw it; PEM."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = [
        context(ssl.PROTOCOL_TLS_CLIENT, client).wrap_bio(
            to_client, to_server, server_hostname=name
        ),
        context(ssl.PROTOCOL_TLS_SERVER, server).wrap_bio(to_server, to_client, server_side=True),
    ]
    waiting = list(ends)
    while waiting:
        for end in tuple(waiting):
            try:
                end.do_handshake()
                waiting.remove(end)
            except ssl.SSLWantReadError:
                pass
    der = ends[1].getpeercert(binary_form=True)
    assert der is not None
    return ssl.DER_cert_to_PEM_cert(der).encode()


@pytest.mark.parametrize("role", [Role.SILO, Role.ADMIN])
def test_silo_and_admin_meet_the_coordinator(members: Path, role: Role) -> None:
    pem = handshake(members / "coordinator", members / role, server_dns_name(CONSORTIUM))
    peer = peer_identity(pem, consortium=CONSORTIUM, revoked=(), now=datetime.now(UTC))
    assert (peer.role, peer.name) == (role, "x")


@pytest.mark.parametrize("role", [Role.SILO, Role.ADMIN])
def test_nobody_else_can_pose_as_the_coordinator(members: Path, role: Role) -> None:
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(members / role, members / "silo", server_dns_name(CONSORTIUM))


def test_another_consortium_s_coordinator(members: Path) -> None:
    with pytest.raises(ssl.SSLCertVerificationError, match="Hostname mismatch"):
        handshake(members / "coordinator", members / "silo", server_dns_name("banks"))


def test_coordinator_is_no_client(members: Path) -> None:
    with pytest.raises(ssl.SSLError):
        handshake(members / "coordinator", members / "coordinator", server_dns_name(CONSORTIUM))
