"""Who is calling: from the peer certificate alone, on every call.

TLS has checked the chain and that the peer holds the key; here the certificate's one URI is read,
strictly, and held against the role that the service is for and against the newest manifest. So a
revocation, and a certificate's end, take effect on the next call over an open connection.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from typing import Any

import grpc

from secagg.errors import CredentialError, IdentityRefused, RoleRefused
from secagg.masking.manifest import Manifest
from secagg.pki.names import Identity, Role, peer_identity
from secagg.pki.renewal import utc_now


def caller(
    context: grpc.aio.ServicerContext[Any, Any],
    manifest: Callable[[], Manifest],
    *,
    now: Callable[[], datetime] = utc_now,
) -> Identity:
    """Return the caller's identity.

    Args:
        context: of the call.
        manifest: gives the membership in force.
        now: aware, UTC; a certificate that ends while its connection is open ends its calls.

    Raises:
        IdentityRefused: no certificate, or none of the one accepted form.
        RoleRefused: revoked, or of another consortium.
    """
    pems = tuple(context.auth_context().get("x509_pem_cert", ()))
    if len(pems) != 1:  # CHECK: caller-certificate
        raise IdentityRefused("identity-no-certificate", "The call came without a certificate.")
    current = manifest()
    try:
        identity = peer_identity(
            pems[0],
            consortium=current.consortium,
            revoked=current.revoked,
            now=now(),
        )
    except CredentialError as error:
        kind = RoleRefused if error.code in _KNOWN_BUT_REFUSED else IdentityRefused
        raise kind(error.code, error.observed, error.remedy) from None  # CHECK: caller-identity
    return identity


def check_role(identity: Identity, role: Role) -> None:
    """Return if a service is for this member.

    Raises:
        RoleRefused: it is for those of another role.
    """
    if identity.role is not role:  # CHECK: identity-role
        raise RoleRefused("identity-role", f"This service is for certificates of role {role}.")


_KNOWN_BUT_REFUSED = frozenset({"identity-revoked", "identity-consortium"})
