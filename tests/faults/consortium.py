"""One consortium on disk for a whole process: its members' keys are the same in every run.

Certificates are not used over the simulated network, but a silo needs a verified manifest and a
place to keep it. Identity keys come from fixed bytes, so the manifest's content, and with it every
transcript, is the same in every process; the authority's signature over it is not, and no trace
holds it.
"""

from __future__ import annotations

import atexit
import functools
import shutil
import tempfile
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from blake3 import blake3

from client_sdk.profile import Profile, load_profile
from secagg.crypto.secret import Entropy
from secagg.crypto.sign import IdentityKey
from secagg.masking.manifest import Manifest
from secagg.pki.authority import Authority
from secagg.pki.credentials import read_keys, save_manifest
from secagg.pki.enrolment import create_request, install_bundle
from secagg.pki.names import Role
from secagg.pki.profile import write_policy, write_profile

CONSORTIUM = "simulated"
SILOS = ("a", "b", "c", "d", "e")


def stream(*names: object) -> Entropy:
    """Deterministic bytes of one process incarnation, never the same for two of them."""
    hasher = blake3("/".join(map(str, names)).encode())
    place = 0

    def draw(size: int) -> bytes:
        nonlocal place
        place += size
        return hasher.digest(length=size, seek=place - size)

    return draw


@dataclass(frozen=True)
class Consortium:
    """Who takes part in every run.

    Args:
        profiles: of the silos, by name.
        identity: the coordinator's.
        manifest: verified.
        signed: the same, as the authority signed it.
    """

    profiles: dict[str, Profile]
    identity: IdentityKey
    manifest: Manifest
    signed: bytes


@functools.cache
def consortium() -> Consortium:
    """Make it, once a process."""
    root = Path(tempfile.mkdtemp(prefix="secagg-faults-"))
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    now = datetime.now(UTC)
    authority = Authority.create(root / "authority", CONSORTIUM, now=now)
    members = [(Role.COORDINATOR, "coordinator"), *((Role.SILO, name) for name in SILOS)]
    for role, name in members:
        entropy = stream("identity", name)
        request = create_request(root / name, role, name, CONSORTIUM, entropy)
        bundle = authority.approve(request, now=now)
        install_bundle(root / name, bundle, fingerprint=authority.fingerprint, now=now)
    for name in SILOS:
        save_manifest(root / name, authority.signed_manifest)
        write_profile(root / name, "coordinator:1")
        write_policy(root / name)
    identity = read_keys(root / "coordinator", Role.COORDINATOR).identity
    assert identity is not None
    signed = authority.signed_manifest
    profiles = {name: load_profile(root / name) for name in SILOS}
    return Consortium(profiles, identity, signed.manifest, signed.to_json())
