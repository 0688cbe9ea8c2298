"""The consortium's authority: an offline directory and the few acts that it can do.

    authority.key    ECDSA P-256, PKCS #8 PEM; never on the coordinator
    authority.pem    its self-signed certificate: the trust anchor
    manifest.json    the newest signed manifest
    issued.json      every certificate ever issued, with digests of its keys

An act holds the directory's lock, logs a serial number before the certificate exists, and writes
the manifest last. A crash in between therefore leaves at most a logged serial that nobody holds,
and doing the act again completes it.

A key belongs to one member for ever, and once one of its certificates is revoked it never comes
back: a captured old request cannot undo a renewal or a revocation.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Final

from cryptography.hazmat.primitives import serialization

from secagg.config import silo_id
from secagg.crypto.secret import Secret
from secagg.errors import ConfigError, CredentialError
from secagg.masking.manifest import Manifest
from secagg.pki.certificates import (
    authority_certificate,
    authority_key,
    certificate_fingerprint,
    check_authority_consortium,
    check_authority_validity,
    load_authority,
    member_certificate,
)
from secagg.pki.enrolment import Bundle, Request
from secagg.pki.files import (
    locked,
    make_private_dir,
    read_private,
    read_public,
    write_private,
    write_public,
)
from secagg.pki.issued import Issued, Log
from secagg.pki.keys import generate_key, load_key, public_der
from secagg.pki.manifest import SignedManifest
from secagg.pki.names import Identity, Role, check_name

LEAF_DAYS: Final = 397
_KEY: Final = "authority.key"
_CERTIFICATE: Final = "authority.pem"
_MANIFEST: Final = "manifest.json"
_LOG: Final = "issued.json"


@dataclass(frozen=True, slots=True)
class Authority:
    """A handle on the authority's directory; what it knows is on disk, not in here.

    Args:
        directory: 0700, of this user.
        consortium: whose authority it is.
        certificate_pem: the trust anchor.
        key_pem: its key.
    """

    directory: Path
    consortium: str
    certificate_pem: bytes
    key_pem: Secret

    @classmethod
    def create(cls, directory: Path, consortium: str, *, now: datetime) -> Authority:
        """Found a consortium: a new key, and version 1 of the manifest, with nobody in it.

        Args:
            directory: created 0700; it must hold no authority yet.
            consortium: a DNS label.
            now: aware, UTC.

        Raises:
            ConfigError: ``name``.
            CredentialError: ``authority-exists``; ``file-permissions``.
        """
        check_name("consortium", consortium)  # CHECK: authority-name
        make_private_dir(directory)
        with locked(directory):
            for file in (_KEY, _CERTIFICATE, _MANIFEST, _LOG):
                if os.path.lexists(directory / file):
                    raise CredentialError(  # CHECK: authority-exists
                        "authority-exists",
                        f"{directory / file} is already there and is never overwritten.",
                        "Name another --dir for a second consortium.",
                    )
            key = generate_key()
            certificate = authority_certificate(consortium, key, now=now)
            write_private(directory / _KEY, key.reveal())
            write_public(directory / _CERTIFICATE, certificate)
            write_private(directory / _LOG, Log(()).to_json())
            empty = Manifest(consortium, 1, {}, None)
            write_public(directory / _MANIFEST, SignedManifest.sign(empty, key).to_json())
        return cls(directory, consortium, certificate, key)

    @classmethod
    def load(cls, directory: Path) -> Authority:
        """Open an authority and check that its files fit together.

        Raises:
            CredentialError: ``file-missing``, ``file-permissions``, ``key-malformed``,
                ``authority-malformed``, ``authority-key``, ``authority-consortium`` or a code of
                the manifest's.
        """
        certificate = read_public(directory / _CERTIFICATE)
        key = Secret(read_private(directory / _KEY))
        # CHECK: authority-key
        if public_der(load_key(key).public_key()) != public_der(authority_key(certificate)):
            raise CredentialError(
                "authority-key",
                f"The key and the certificate in {directory} do not belong together.",
                "Restore the directory from its backup.",
            )
        manifest = _read_manifest(directory).verify(certificate)
        # CHECK: authority-own-consortium
        check_authority_consortium(certificate, manifest.consortium)
        return cls(directory, manifest.consortium, certificate, key)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the trust anchor, for members to compare, in groups of hex digits."""
        return certificate_fingerprint(self.certificate_pem)

    @property
    def signed_manifest(self) -> SignedManifest:
        """The newest manifest, for the coordinator and the members; verified."""
        signed = _read_manifest(self.directory)
        signed.verify(self.certificate_pem)  # CHECK: authority-manifest
        return signed

    @property
    def manifest(self) -> Manifest:
        """The newest manifest."""
        return self.signed_manifest.manifest

    @property
    def issued(self) -> tuple[Issued, ...]:
        """Every certificate ever issued, oldest first."""
        return self._log().entries

    def approve(self, request: Request, *, now: datetime, days: int = LEAF_DAYS) -> Bundle:
        """Certify a member, and list it in the manifest unless it is an admin.

        The same keys again give a later certificate, and the earlier one lives to its end. New
        keys for a name replace the old ones: all its earlier certificates are revoked.

        Args:
            request: its maker has confirmed ``request.fingerprint``.
            now: aware, UTC.
            days: validity, 1 up to the authority's own end.

        Raises:
            ConfigError: ``days``.
            CredentialError: ``request-consortium``, ``request-key`` (a key that is revoked, or
                that another member or half of this one has), ``coordinator-exists``,
                ``authority-expired`` or ``authority-not-yet-valid``.
        """
        identity = request.identity
        not_after = self._not_after(now, days)
        with locked(self.directory):
            log, manifest = self._log(), self.manifest
            self._check_request(request, log, manifest)
            certificate = member_certificate(
                identity,
                request.public_key,
                self.certificate_pem,
                self.key_pem,
                now=now,
                not_after=not_after,
            )
            entry = Issued.of(request, certificate)
            superseded = log.replaced_by(entry)
            write_private(self.directory / _LOG, log.with_entry(entry).to_json())
            listed = _listed(manifest, identity, request.identity_key)
            signed = self._publish(manifest, _revoking(listed, superseded))
        return Bundle(
            role=identity.role,
            name=identity.name,
            consortium=self.consortium,
            authority_pem=self.certificate_pem,
            certificate_pem=certificate.public_bytes(serialization.Encoding.PEM),
            manifest=signed,
        )

    def revoke(self, role: Role, name: str, *, now: datetime) -> Manifest:
        """Take a member out of the manifest and revoke all its certificates.

        Returns:
            The new manifest; ``signed_manifest`` is what the coordinator is to be given.

        Raises:
            CredentialError: ``member-unknown``: nothing of that name is left to revoke;
                ``authority-expired`` or ``authority-not-yet-valid``.
        """
        # CHECK: revoking-authority-validity
        check_authority_validity(load_authority(self.certificate_pem), now=now)
        with locked(self.directory):
            manifest = self.manifest
            serials = self._log().serials(role, name)
            if not set(serials) - set(manifest.revoked):  # CHECK: revoked-known
                raise CredentialError(
                    "member-unknown",
                    f"There is no {role} {name!r} with a certificate to revoke.",
                    "See `secagg pki show`; pass --role for a coordinator or an admin.",
                )
            removed = _listed(manifest, Identity(self.consortium, role, name), None)
            return self._publish(manifest, _revoking(removed, serials)).manifest

    def _not_after(self, now: datetime, days: int) -> datetime:
        authority = load_authority(self.certificate_pem)
        check_authority_validity(authority, now=now)  # CHECK: approving-authority-validity
        last = (authority.not_valid_after_utc - now).days
        if not 1 <= days <= last:  # CHECK: certificate-days
            raise ConfigError(
                "days",
                f"days = {days}; it is at least 1, and the authority itself ends in {last} days.",
                "Give fewer days, or found a new authority if its own end is near.",
            )
        return now + timedelta(days=days)

    def _check_request(self, request: Request, log: Log, manifest: Manifest) -> None:
        if request.consortium != self.consortium:  # CHECK: request-consortium
            raise CredentialError(
                "request-consortium",
                f"The request is for consortium {request.consortium}, not {self.consortium}.",
                "Have it made again with the right --consortium.",
            )
        log.check_keys(request, manifest.revoked)  # CHECK: request-keys-unused
        others = [
            entry.name
            for entry in log.entries
            if entry.role is request.role is Role.COORDINATOR
            and entry.name != request.name
            and entry.serial not in manifest.revoked
        ]
        if others:  # CHECK: coordinator-exists
            raise CredentialError(
                "coordinator-exists",
                f"The consortium's coordinator is {others[0]}; it has one only.",
                f"First run `secagg pki revoke {others[0]} --role coordinator`.",
            )

    def _publish(self, old: Manifest, new: Manifest) -> SignedManifest:
        if new == old:
            return self.signed_manifest
        signed = SignedManifest.sign(replace(new, version=old.version + 1), self.key_pem)
        write_public(self.directory / _MANIFEST, signed.to_json())
        return signed

    def _log(self) -> Log:
        return Log.from_json(read_private(self.directory / _LOG))


def _read_manifest(directory: Path) -> SignedManifest:
    return SignedManifest.from_json(read_public(directory / _MANIFEST))


def _listed(manifest: Manifest, identity: Identity, key: bytes | None) -> Manifest:
    """The manifest with a member's key, or without the member where ``key`` is None."""
    match identity.role:
        case Role.ADMIN:
            return manifest
        case Role.COORDINATOR:
            return replace(manifest, coordinator=key)
        case Role.SILO:
            silos = {name: k for name, k in manifest.silos.items() if name != identity.name}
            if key is not None:
                silos[silo_id(identity.name)] = key
            return replace(manifest, silos=dict(sorted(silos.items())))


def _revoking(manifest: Manifest, serials: tuple[str, ...]) -> Manifest:
    return replace(manifest, revoked=tuple(sorted({*manifest.revoked, *serials})))
