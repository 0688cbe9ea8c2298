"""Files of the authority, of members and of the coordinator.

Text reaches some of these decoders; bytes that are no UTF-8 are refused by who reads the file.
Where a hash without a key guards the content, the target puts the right one there, so that what is
behind it is decoded; where a key guards it, only its holder could write another content.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from client_sdk import bridge, checkpoint, ledger
from client_sdk import profile as silo_profile
from secagg.config import Policy, SessionConfig, parse_toml
from secagg.coordinator import settings
from secagg.crypto.labels import LEDGER, digest
from secagg.crypto.secret import Secret
from secagg.errors import ConfigError, CredentialError, SecaggError
from secagg.pki import certificates, names, profile
from secagg.pki.enrolment import Bundle
from secagg.pki.issued import Log
from secagg.pki.keys import load_key, public_der
from secagg.pki.manifest import SignedManifest
from secagg.pki.request import Request

from . import fixed
from .target import Decoder, Target


def _json(kind: type[Any]) -> Target:
    covers = (kind.from_json,)
    return Target(kind.from_json, lambda value: value.to_json(), (CredentialError,), covers)


def _text(read: Callable[[str], Any], refusal: type[SecaggError], *covers: Decoder) -> Target:
    return Target(lambda data: read(data.decode()), None, (UnicodeDecodeError, refusal), covers)


def _peer(data: bytes) -> names.Identity:
    return names.peer_identity(
        data, consortium=fixed.CONSORTIUM, revoked=frozenset({"ab12"}), now=fixed.NOW
    )


def _authority(data: bytes) -> str:
    certificates.load_authority(data)
    return certificates.certificate_fingerprint(data)


def _private_key(data: bytes) -> bytes:
    return public_der(load_key(Secret(data)).public_key())


@functools.cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="secagg-fuzz-")


def _settings(data: bytes) -> settings.Settings:
    path = Path(_folder().name) / "coordinator.toml"
    path.write_bytes(data)
    return settings.load_settings(path)


def _profile(text: str) -> object:
    table = parse_toml(silo_profile._ProfileFile, text, "profile.toml")
    return profile.check_address(table.coordinator)


class _OneFile:
    """A disk with one file, in memory."""

    def __init__(self, data: bytes) -> None:
        self.data = data

    def read(self, name: str) -> bytes:
        return self.data

    def append(self, name: str, data: bytes) -> None:
        self.data += data

    def truncate(self, name: str, size: int) -> None:
        self.data = self.data[:size]


def _ledger_file(data: bytes) -> bytes:
    """The file as it stands after it was loaded: an end that was cut short is off."""
    disk: Any = _OneFile(data)
    ledger.FileLedger(disk)
    return disk.data


def chained(texts: bytes) -> bytes:
    """A ledger's file of these entries, one JSON object a line, each with its right hash."""
    chain, lines = bytes(32), b""
    for text in texts.split(b"\n"):
        entry = text.removesuffix(b"}")
        chain = digest(LEDGER, chain, entry)
        lines += b'%b, "hash": "%b"}\n' % (entry, chain.hex().encode())
    return lines


class _NoCheckpoint(Exception):
    """Nothing of this silo's is there."""


def _checkpoint(data: bytes) -> object:
    disk: Any = _OneFile(data)
    held = checkpoint.Checkpoints(disk, fixed.SESSION_ID, fixed.KEY)
    kept = held.find_global("training"), held.find_update("training", bytes(32))
    if kept == (None, None):
        raise _NoCheckpoint
    return kept


FILES = {
    "manifest": _json(SignedManifest),
    "bundle": _json(Bundle),
    "request": _json(Request),
    "issued": _json(Log),
    "certificate": Target(
        _peer, None, (CredentialError,), (names.peer_identity, names.load_certificate)
    ),
    "authority": Target(_authority, None, (CredentialError,), (certificates.load_authority,)),
    "private-key": Target(_private_key, None, (CredentialError,), (load_key,)),
    "uri": _text(names.parse_uri, CredentialError, names.parse_uri),
    "settings": Target(_settings, None, (ConfigError,), (settings.load_settings,)),
    "policy": _text(lambda t: parse_toml(Policy, t, "policy.toml"), ConfigError, parse_toml),
    "session-file": _text(lambda t: parse_toml(SessionConfig, t, "x"), ConfigError, parse_toml),
    "profile": _text(_profile, ConfigError, parse_toml),
    "ledger-file": Target(_ledger_file, bytes, (ConfigError,), ()),
    "ledger-entries": Target(lambda data: _ledger_file(chained(data)), None, (ConfigError,), ()),
    "checkpoint-file": Target(_checkpoint, None, (_NoCheckpoint,), ()),
    "peer-checkpoint": Target(
        lambda data: bridge._unpacked(bytearray(data)), None, (ValueError, RecursionError), ()
    ),
}
