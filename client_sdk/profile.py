"""Where a silo keeps what it needs: found once, checked on load.

A profile is a directory with ``profile.toml``, ``policy.toml``, the keys and the certificate, as
``secagg silo install`` leaves it.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import ClassVar, Final

import platformdirs
from pydantic import ConfigDict

from secagg.config import Policy, parse_toml
from secagg.errors import ConfigError
from secagg.pki.credentials import Credentials, load_credentials
from secagg.pki.names import Role
from secagg.pki.profile import POLICY, PROFILE, check_address

ENVIRONMENT: Final = "SECAGG_PROFILE"


@dataclass(frozen=True, slots=True)
class _ProfileFile:
    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", strict=True)

    coordinator: str
    state: str


@dataclass(frozen=True, slots=True)
class Profile:
    """A member's place: who it is, where the coordinator is, what its floors are.

    Args:
        directory: where all this was read.
        coordinator: host:port.
        state: directory of the ledger.
        credentials: checked keys, certificate and manifest.
        policy: the silo's floors; None for an admin.
    """

    directory: Path
    coordinator: str
    state: Path
    credentials: Credentials
    policy: Policy | None


def find_profile(given: str | os.PathLike[str] | None = None) -> Path:
    """Return the profile's directory: the one given, SECAGG_PROFILE's, or the default place."""
    if given is not None:
        return Path(given)
    if ENVIRONMENT in os.environ:
        return Path(os.environ[ENVIRONMENT])
    return platformdirs.user_config_path("secagg")


def load_profile(given: str | os.PathLike[str] | None = None, *, role: Role = Role.SILO) -> Profile:
    """Load and check a profile.

    Args:
        given: its directory; None to look in SECAGG_PROFILE, then in the default place.
        role: what this process is going to be.

    Raises:
        ConfigError: a file is missing or cannot be right.
        CredentialError: keys, certificate or manifest cannot be used: permissions, another CA,
            expired, not yet valid (clock skew), revoked.
    """
    directory = find_profile(given)
    table = parse_toml(_ProfileFile, _read(directory / PROFILE), str(directory / PROFILE))
    credentials = load_credentials(directory, now=datetime.now(UTC), role=role)
    policy = None
    if role is Role.SILO:
        policy = parse_toml(Policy, _read(directory / POLICY), str(directory / POLICY))
    return Profile(
        directory,
        check_address(table.coordinator),
        directory / table.state,
        credentials,
        policy,
    )


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError as error:
        raise ConfigError(
            "profile-file",
            f"{path} cannot be read: {error.strerror}.",
            "Install a bundle with `secagg silo install`, or name its directory with "
            f"profile=, --profile or {ENVIRONMENT}.",
        ) from None
    except UnicodeDecodeError:
        raise ConfigError("profile-file", f"{path} is not UTF-8 text.") from None
