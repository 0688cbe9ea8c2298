"""What a running process loads from its private directory, with every check, or nothing.

    tls.key          ECDSA P-256, PKCS #8 PEM      made here, never leaves
    identity.key     Ed25519 seed, 32 bytes        made here, never leaves; not for an admin
    authority.pem    the trust anchor              from the bundle, never replaced
    certificate.pem  this member's certificate     from the bundle, replaced at renewal
    manifest.json    the newest membership seen    never replaced by an older one

``Credentials`` can only come out of ``assemble``: they fit together, at the given time. A renewal
on disk is taken up by ``secagg.pki.renewal``.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Final

from secagg.config import SiloId
from secagg.crypto.secret import Secret
from secagg.crypto.sign import KEY_BYTES, IdentityKey
from secagg.errors import CredentialError
from secagg.masking.manifest import Manifest
from secagg.pki.certificates import check_authority_consortium, check_issued
from secagg.pki.files import locked, read_private, read_public, write_public
from secagg.pki.keys import load_key, p256_public, public_der
from secagg.pki.manifest import SignedManifest, accept
from secagg.pki.names import (
    Identity,
    Role,
    certificate_identity,
    load_certificate,
    serial_hex,
)

TLS_KEY: Final = "tls.key"
IDENTITY_KEY: Final = "identity.key"
AUTHORITY: Final = "authority.pem"
CERTIFICATE: Final = "certificate.pem"
MANIFEST: Final = "manifest.json"

RENEW_DAYS: Final = 14
"""From so many days before a certificate's end on, its operator is told to renew it."""


@dataclass(frozen=True, slots=True)
class Keys:
    """The private keys in a member's directory.

    Args:
        tls: P-256, PKCS #8 PEM.
        identity: Ed25519; None for an admin, who signs no protocol message.
    """

    tls: Secret
    identity: IdentityKey | None


@dataclass(frozen=True, slots=True)
class Credentials:
    """A member's keys and certificate with the trust anchor and membership that they fit.

    Args:
        identity: who this process is.
        tls_key_pem: P-256, PKCS #8 PEM.
        certificate_pem: signed by the authority, for that key and identity.
        authority_pem: the one trust anchor.
        identity_key: the key that the manifest lists for this name; None for an admin.
        manifest: verified, the newest that this directory has seen.
        not_before: begin of the certificate's validity, aware, UTC.
        not_after: end of it.
        directory: where all this was read.
    """

    identity: Identity
    tls_key_pem: Secret
    certificate_pem: bytes
    authority_pem: bytes
    identity_key: IdentityKey | None
    manifest: SignedManifest
    not_before: datetime
    not_after: datetime
    directory: Path

    def check_validity(self, now: datetime) -> None:
        """Return if the certificate is valid at ``now`` (aware, UTC).

        Raises:
            CredentialError: ``certificate-expired`` or ``certificate-not-yet-valid``.
        """
        if now > self.not_after:  # CHECK: certificate-expired
            raise CredentialError(
                "certificate-expired",
                f"The certificate of {self.identity.uri} ended at {self.not_after:%F %T} UTC.",
                self.how_to_renew,
            )
        if now < self.not_before:  # CHECK: certificate-not-yet-valid
            raise CredentialError(
                "certificate-not-yet-valid",
                f"The certificate of {self.identity.uri} begins at {self.not_before:%F %T} UTC; "
                f"this machine's clock says {now:%F %T} UTC.",
                "One clock is wrong (clock skew): set this machine's, or the admin's and renew.",
            )

    def days_left(self, now: datetime) -> int:
        """Whole days from ``now`` (aware, UTC) to the certificate's end; negative after it."""
        return (self.not_after - now).days

    def ends_soon(self, now: datetime) -> bool:
        """Whether it is time to renew: ``RENEW_DAYS`` or less are left."""
        return self.not_after - now <= timedelta(days=RENEW_DAYS)

    @property
    def how_to_renew(self) -> str:
        """The commands that its operator and the admin run; nothing has to be stopped for them."""
        name, role, place = self.identity.name, self.identity.role, shlex.quote(str(self.directory))
        kind = "" if role is Role.SILO else f" --role {role}"
        return (
            f"Renew it: `secagg silo request {name} --consortium {self.identity.consortium}{kind} "
            f"--renew --dir {place}`, have the admin run `secagg pki approve {name}.request.json`, "
            f"then `secagg silo install {name}.bundle.json --dir {place}`."
        )

    def ending(self, now: datetime) -> str:
        """How long the certificate is good for, in words, and how to renew it."""
        days = self.days_left(now)
        left = f"in {days} days" if days > 1 else "in a day" if days == 1 else "within a day"
        return (
            f"The certificate of {self.identity.uri} ends {left}, at {self.not_after:%F %T} UTC. "
            f"{self.how_to_renew}"
        )


def load_credentials(directory: Path, *, now: datetime, role: Role) -> Credentials:
    """Read a member's directory and check everything in it.

    Args:
        directory: 0700, of this user.
        now: aware, UTC.
        role: what this process is going to be.

    Raises:
        CredentialError: ``file-missing``, ``file-permissions``, ``key-malformed``,
            ``certificate-role``, ``manifest-malformed``, or any code of ``assemble``.
    """
    found = installed_role(directory)
    if found is not role:  # CHECK: certificate-role
        raise CredentialError(
            "certificate-role",
            f"{directory} holds the credentials of a {found}; this command needs a {role}'s.",
            "Name the right directory with --dir.",
        )
    return assemble(
        directory,
        read_keys(directory, role),
        read_public(directory / CERTIFICATE),
        read_public(directory / AUTHORITY),
        SignedManifest.from_json(read_public(directory / MANIFEST)),
        now=now,
    )


def installed_role(directory: Path) -> Role:
    """Read what the certificate in a directory is for.

    Raises:
        CredentialError: ``file-missing``, ``file-permissions`` or a code of
            ``certificate_identity``.
    """
    certificate_pem = read_public(directory / CERTIFICATE)
    return certificate_identity(load_certificate(certificate_pem)).role


def assemble(
    directory: Path,
    keys: Keys,
    certificate_pem: bytes,
    authority_pem: bytes,
    signed: SignedManifest,
    *,
    now: datetime,
) -> Credentials:
    """Put credentials together if all parts fit; the one way to a ``Credentials``.

    Raises:
        CredentialError: ``certificate-key`` (of another key), ``certificate-chain``,
            ``certificate-expired``, ``certificate-not-yet-valid``, ``certificate-revoked``,
            ``authority-consortium``, ``authority-malformed``, ``authority-expired``,
            ``authority-not-yet-valid``, ``manifest-signature``, ``manifest-consortium``,
            ``manifest-not-member``, or a code of ``certificate_identity``.
    """
    certificate = load_certificate(certificate_pem)
    identity = certificate_identity(certificate)
    credentials = Credentials(
        identity=identity,
        tls_key_pem=keys.tls,
        certificate_pem=certificate_pem,
        authority_pem=authority_pem,
        identity_key=keys.identity,
        manifest=signed,
        not_before=certificate.not_valid_before_utc,
        not_after=certificate.not_valid_after_utc,
        directory=directory,
    )
    own = public_der(load_key(keys.tls).public_key())
    if public_der(p256_public(certificate)) != own:  # CHECK: certificate-key
        raise CredentialError(
            "certificate-key",
            f"The certificate of {identity.uri} is not for the TLS key in {directory}.",
            "Install the bundle where its request was made, or make a new request.",
        )
    credentials.check_validity(now)  # CHECK: assembled-validity
    check_authority_consortium(authority_pem, identity.consortium)  # CHECK: assembled-consortium
    check_issued(certificate, authority_pem, now=now)  # CHECK: assembled-chain
    manifest = signed.verify(authority_pem)
    _check_membership(manifest, identity, keys.identity)  # CHECK: assembled-membership
    if serial_hex(certificate) in manifest.revoked:  # CHECK: certificate-revoked
        raise CredentialError(
            "certificate-revoked",
            f"The authority has revoked this certificate of {identity.uri}.",
            "Install the newest bundle, or ask the admin why.",
        )
    return credentials


def read_keys(directory: Path, role: Role) -> Keys:
    """Read the private keys that a role has.

    Raises:
        CredentialError: ``file-missing``, ``file-permissions`` or ``key-malformed``.
    """
    tls = Secret(read_private(directory / TLS_KEY))
    if role is Role.ADMIN:
        return Keys(tls, None)
    seed = Secret(read_private(directory / IDENTITY_KEY))
    if len(seed) != KEY_BYTES:  # CHECK: identity-key-size
        raise CredentialError(
            "key-malformed",
            f"{directory / IDENTITY_KEY} holds {len(seed)} bytes, not {KEY_BYTES}.",
            "Restore it, or enrol again in a new directory.",
        )
    return Keys(tls, IdentityKey.from_private(seed))


def save_manifest(directory: Path, signed: SignedManifest) -> SignedManifest:
    """Keep a manifest that somebody offered, if it is the authority's and not older.

    Args:
        directory: a member's directory, with a bundle installed.
        signed: from anyone; nothing about it is trusted.

    Returns:
        The manifest that now stands on disk.

    Raises:
        CredentialError: as ``accept``; ``file-missing`` or ``file-permissions``.
    """
    authority_pem = read_public(directory / AUTHORITY)
    with locked(directory):
        current = SignedManifest.from_json(read_public(directory / MANIFEST))
        current.verify(authority_pem)  # CHECK: saved-manifest-signature
        newest = accept(current, signed, authority_pem)
        if newest is not current:
            write_public(directory / MANIFEST, newest.to_json())
    return newest


def _check_membership(manifest: Manifest, identity: Identity, key: IdentityKey | None) -> None:
    if manifest.consortium != identity.consortium:  # CHECK: member-consortium
        raise CredentialError(
            "manifest-consortium",
            f"The manifest is of consortium {manifest.consortium}, not {identity.consortium}.",
            "Use the manifest of this consortium.",
        )
    if identity.role is Role.ADMIN:
        return
    is_silo = identity.role is Role.SILO
    listed = manifest.silos.get(SiloId(identity.name)) if is_silo else manifest.coordinator
    if key is None or listed != key.public:  # CHECK: manifest-member
        raise CredentialError(
            "manifest-not-member",
            f"Version {manifest.version} of the manifest doesn't list {identity.uri} with the "
            "identity key in this directory.",
            "It was removed or enrolled anew elsewhere; ask the admin.",
        )
