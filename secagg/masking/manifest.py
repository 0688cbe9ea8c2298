"""Who is in the consortium: names and identity keys, as the authority signed them.

The core takes a ``Manifest`` as a value that ``secagg.pki`` has already verified. A silo checks
its peers and the coordinator against it, never against what the coordinator says.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from secagg.config import SiloId
from secagg.crypto.labels import MANIFEST, digest, enc, u64


@dataclass(frozen=True, slots=True)
class Manifest:
    """One version of the consortium's membership.

    Args:
        consortium: its name.
        version: rises by one with every change; a silo never goes back.
        silos: identity key (32-byte Ed25519) by name, in name order.
        coordinator: the coordinator's identity key, or None before it is enrolled.
        revoked: serial numbers (lower-case hex) of certificates that are no longer good, sorted.
    """

    consortium: str
    version: int
    silos: Mapping[SiloId, bytes]
    coordinator: bytes | None
    revoked: tuple[str, ...] = ()

    def encode(self) -> bytes:
        """The bytes that are signed and hashed."""
        return enc(
            self.consortium.encode(),
            u64(self.version),
            enc(*(enc(name.encode(), key) for name, key in sorted(self.silos.items()))),
            self.coordinator or b"",
            enc(*(serial.encode() for serial in self.revoked)),
        )

    def digest(self) -> bytes:
        """Hash of this version: part of every round's transcript."""
        return digest(MANIFEST, self.encode())
