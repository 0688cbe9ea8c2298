"""How a member joins: a request made where the keys stay, a bundle that comes back.

The admin compares the request's fingerprint with its maker, and the maker compares the authority's
with the admin, once: from then on that anchor never changes. Renewal with the same keys needs no
second comparison; new keys are made in a new directory.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import ClassVar, Final, Literal

from pydantic import ConfigDict

from secagg.crypto.secret import Entropy
from secagg.crypto.sign import IdentityKey
from secagg.errors import CredentialError
from secagg.pki.certificates import certificate_fingerprint
from secagg.pki.credentials import (
    AUTHORITY,
    CERTIFICATE,
    IDENTITY_KEY,
    MANIFEST,
    TLS_KEY,
    Credentials,
    Keys,
    assemble,
    read_keys,
)
from secagg.pki.documents import STRICT, decode, encode
from secagg.pki.files import locked, make_private_dir, read_public, write_private, write_public
from secagg.pki.keys import check_fingerprint, generate_key
from secagg.pki.manifest import ManifestFile, SignedManifest, accept
from secagg.pki.names import Identity, Role
from secagg.pki.request import Request

__all__ = [
    "Bundle",
    "Request",
    "create_request",
    "install_bundle",
    "renewal_request",
]

BUNDLE_FORMAT: Final = "secagg/1/bundle"


def create_request(
    directory: Path, role: Role, name: str, consortium: str, entropy: Entropy
) -> Request:
    """Make a member's keys in a private directory, and the request for them.

    Args:
        directory: created 0700; it must hold no keys yet.
        role: what to become.
        name: what to be called in the consortium.
        consortium: which one.
        entropy: source of the identity key. The TLS key comes from OpenSSL's own generator.

    Raises:
        ConfigError: ``name``.
        CredentialError: ``keys-exist``; ``file-permissions``.
    """
    identity = Identity(consortium, role, name)
    make_private_dir(directory)
    with locked(directory):
        for file in (TLS_KEY, IDENTITY_KEY):
            if os.path.lexists(directory / file):
                raise CredentialError(  # CHECK: keys-exist
                    "keys-exist",
                    f"{directory / file} is already there and is never overwritten.",
                    "Use --renew to ask for a new certificate for these keys, or another --dir.",
                )
        key = None if role is Role.ADMIN else IdentityKey.generate(entropy)
        keys = Keys(generate_key(), key)
        write_private(directory / TLS_KEY, keys.tls.reveal())
        if key is not None:
            write_private(directory / IDENTITY_KEY, key.private.reveal())
    return Request.make(identity, keys)


def renewal_request(directory: Path, role: Role, name: str, consortium: str) -> Request:
    """Make a request for the keys that a directory already holds.

    Raises:
        ConfigError: ``name``.
        CredentialError: ``file-missing``, ``file-permissions`` or ``key-malformed``.
    """
    identity = Identity(consortium, role, name)
    return Request.make(identity, read_keys(directory, role))


@dataclass(frozen=True, slots=True)
class BundleFile:
    """A bundle as JSON."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    format: Literal["secagg/1/bundle"]
    consortium: str
    role: Role
    name: str
    authority: str
    certificate: str
    manifest: ManifestFile


@dataclass(frozen=True, slots=True)
class Bundle:
    """What the authority returns; all of it is public, none of it is trusted before installing.

    Args:
        role: what the member became.
        name: what it is called.
        consortium: where.
        authority_pem: the trust anchor.
        certificate_pem: for the request's TLS key.
        manifest: the membership when it was approved.
    """

    role: Role
    name: str
    consortium: str
    authority_pem: bytes
    certificate_pem: bytes
    manifest: SignedManifest

    def to_json(self) -> bytes:
        """The file's bytes."""
        return encode(
            BundleFile(
                format=BUNDLE_FORMAT,
                consortium=self.consortium,
                role=self.role,
                name=self.name,
                authority=self.authority_pem.decode(),
                certificate=self.certificate_pem.decode(),
                manifest=ManifestFile.of(self.manifest),
            )
        )

    @classmethod
    def from_json(cls, data: bytes) -> Bundle:
        """Read a file.

        Raises:
            CredentialError: ``bundle-malformed`` or ``manifest-malformed``.
        """
        file = decode(BundleFile, data, code="bundle-malformed", what="bundle")
        return cls(
            role=file.role,
            name=file.name,
            consortium=file.consortium,
            authority_pem=file.authority.encode(),
            certificate_pem=file.certificate.encode(),
            manifest=file.manifest.value(),
        )


def install_bundle(
    directory: Path, bundle: Bundle, *, fingerprint: str | None, now: datetime
) -> Credentials:
    """Check a bundle against the keys and the anchor that are here, then write it.

    A manifest on disk that is newer than the bundle's stays, and the bundle must fit that one.

    Args:
        directory: where the request was made.
        bundle: from the admin, over any channel.
        fingerprint: the authority's, as the admin read it out; None if the caller has shown
            ``certificate_fingerprint(bundle.authority_pem)`` to a person, or at renewal.
        now: aware, UTC.

    Raises:
        CredentialError: ``authority-fingerprint``, ``authority-changed``, ``bundle-name``,
            ``file-missing``, ``file-permissions``, ``manifest-conflict``, or a code of
            ``assemble``. Nothing was written.
    """
    if fingerprint is not None:
        actual = certificate_fingerprint(bundle.authority_pem)
        # CHECK: authority-fingerprint
        check_fingerprint(actual, fingerprint, "authority-fingerprint")
    keys = read_keys(directory, bundle.role)
    with locked(directory):
        manifest = _newest(directory, bundle)
        credentials = assemble(
            directory, keys, bundle.certificate_pem, bundle.authority_pem, manifest, now=now
        )
        # CHECK: bundle-name
        if credentials.identity != Identity(bundle.consortium, bundle.role, bundle.name):
            raise CredentialError(
                "bundle-name",
                f"The bundle says {bundle.role} {bundle.name} and its certificate "
                f"{credentials.identity.uri}.",
                "Ask the admin for the bundle again.",
            )
        # The certificate comes last: a crash before it leaves a directory that loads as before.
        write_public(directory / AUTHORITY, bundle.authority_pem)
        write_public(directory / MANIFEST, manifest.to_json())
        write_public(directory / CERTIFICATE, bundle.certificate_pem)
    return credentials


def _newest(directory: Path, bundle: Bundle) -> SignedManifest:
    if not os.path.lexists(directory / AUTHORITY):
        return bundle.manifest
    installed = read_public(directory / AUTHORITY)
    # CHECK: authority-changed
    if certificate_fingerprint(installed) != certificate_fingerprint(bundle.authority_pem):
        raise CredentialError(
            "authority-changed",
            "The bundle comes from another authority than the one installed here.",
            "Ask the admin. A new consortium or authority needs a new directory.",
        )
    # A crash during the first installation leaves an anchor without a manifest.
    if not os.path.lexists(directory / MANIFEST):
        return bundle.manifest
    current = SignedManifest.from_json(read_public(directory / MANIFEST))
    current.verify(installed)  # CHECK: installed-manifest-signature
    if bundle.manifest.manifest.version < current.manifest.version:
        return current
    return accept(current, bundle.manifest, installed)
