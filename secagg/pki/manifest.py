"""The membership as the authority signed it, which no one can wind back.

The signature is the authority's ECDSA P-256 key's over ``enc("secagg/1/sig/manifest", manifest)``,
so one trust anchor covers TLS and membership. A member keeps the newest version that it has seen
and refuses an older one; two different manifests of one version prove a fault and are refused too.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar, Final, Literal

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from pydantic import ConfigDict

from secagg.config import is_name, silo_id
from secagg.crypto.labels import PREFIX, enc
from secagg.crypto.secret import Secret
from secagg.crypto.sign import KEY_BYTES
from secagg.errors import CredentialError
from secagg.masking.manifest import Manifest
from secagg.pki.certificates import authority_key
from secagg.pki.documents import STRICT, decode, encode
from secagg.pki.keys import load_key

FORMAT: Final = "secagg/1/manifest"
_SERIAL: Final = re.compile(r"[1-9a-f][0-9a-f]{0,39}", re.ASCII)
_LABEL: Final = PREFIX + b"sig/manifest"


@dataclass(frozen=True, slots=True)
class ManifestFile:
    """A signed manifest as JSON."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    format: Literal["secagg/1/manifest"]
    consortium: str
    version: int
    silos: dict[str, bytes]
    coordinator: bytes | None
    revoked: tuple[str, ...]
    signature: bytes

    @classmethod
    def of(cls, signed: SignedManifest) -> ManifestFile:
        """The file that holds ``signed``."""
        manifest = signed.manifest
        return cls(
            format=FORMAT,
            consortium=manifest.consortium,
            version=manifest.version,
            silos={str(name): key for name, key in sorted(manifest.silos.items())},
            coordinator=manifest.coordinator,
            revoked=manifest.revoked,
            signature=signed.signature,
        )

    def value(self) -> SignedManifest:
        """The manifest in this file, well-formed but not yet verified.

        Raises:
            CredentialError: ``manifest-malformed``.
        """
        keys = [*self.silos.values(), *([] if self.coordinator is None else [self.coordinator])]
        sound = (
            is_name(self.consortium)
            and 1 <= self.version < 2**63
            and all(is_name(name) for name in self.silos)
            and all(len(key) == KEY_BYTES for key in keys)
            and len(set(keys)) == len(keys)
            and list(self.revoked) == sorted(set(self.revoked))
            and all(_SERIAL.fullmatch(serial) for serial in self.revoked)
        )
        if not sound:  # CHECK: manifest-malformed
            raise CredentialError(
                "manifest-malformed",
                "The manifest's names, keys or serial numbers cannot be right.",
                "Ask the admin for it again.",
            )
        silos = {silo_id(name): key for name, key in sorted(self.silos.items())}
        manifest = Manifest(self.consortium, self.version, silos, self.coordinator, self.revoked)
        return SignedManifest(manifest, self.signature)


@dataclass(frozen=True, slots=True)
class SignedManifest:
    """A manifest with the authority's signature (DER), which ``verify`` checks.

    Args:
        manifest: well-formed.
        signature: not trusted before ``verify`` returned.
    """

    manifest: Manifest
    signature: bytes

    @classmethod
    def sign(cls, manifest: Manifest, key_pem: Secret) -> SignedManifest:
        """Sign with the authority's key."""
        signature = load_key(key_pem).sign(_signed_bytes(manifest), ec.ECDSA(hashes.SHA256()))
        return cls(manifest, signature)

    def verify(self, authority_pem: bytes) -> Manifest:
        """Return the manifest, as evidence that the authority signed it.

        Raises:
            CredentialError: ``manifest-signature``; ``authority-malformed``.
        """
        key = authority_key(authority_pem)
        try:
            # CHECK: manifest-signature
            key.verify(self.signature, _signed_bytes(self.manifest), ec.ECDSA(hashes.SHA256()))
        except InvalidSignature:
            raise CredentialError(  # CHECK: manifest-signature-refused
                "manifest-signature",
                "The manifest is not signed by the consortium's authority.",
                "Whoever handed it over cannot change the membership; ask the admin for it.",
            ) from None
        return self.manifest

    def to_json(self) -> bytes:
        """The file's bytes."""
        return encode(ManifestFile.of(self))

    @classmethod
    def from_json(cls, data: bytes) -> SignedManifest:
        """Read a file; the signature is checked by ``verify``.

        Raises:
            CredentialError: ``manifest-malformed``.
        """
        return decode(ManifestFile, data, code="manifest-malformed", what="manifest").value()


def accept(
    current: SignedManifest, offered: SignedManifest, authority_pem: bytes
) -> SignedManifest:
    """Return the manifest to go on with: ``offered`` if it is newer, ``current`` if it is equal.

    Raises:
        CredentialError: ``manifest-signature``, ``manifest-consortium``, ``manifest-older`` (a
            rollback) or ``manifest-conflict`` (one version, two contents).
    """
    offered.verify(authority_pem)  # CHECK: offered-manifest-signature
    old, new = current.manifest, offered.manifest
    if new.consortium != old.consortium:  # CHECK: manifest-consortium
        raise CredentialError(
            "manifest-consortium",
            f"The manifest is of consortium {new.consortium}, not of {old.consortium}.",
            "Use the manifest of this consortium.",
        )
    if new.version < old.version:  # CHECK: manifest-older
        raise CredentialError(
            "manifest-older",
            f"Version {new.version} was offered after version {old.version} had been seen.",
            "Somebody holds back the newest manifest; ask the admin for it.",
        )
    if new.version > old.version:
        return offered
    if new.encode() != old.encode():  # CHECK: manifest-conflict
        raise CredentialError(
            "manifest-conflict",
            f"Two different manifests of version {new.version} are signed.",
            "Tell the admin: the authority's directory was copied, or its key is in other hands.",
        )
    return current


def _signed_bytes(manifest: Manifest) -> bytes:
    return enc(_LABEL, manifest.encode())
