"""What the platform team configures: where to listen, where state lives, how much to take."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from pydantic import ConfigDict

from secagg.config import parse_toml
from secagg.coordinator.limits import Limits
from secagg.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Settings:
    """``coordinator.toml``.

    Args:
        listen: host:port to bind; port 0 takes a free one.
        credentials: directory with the coordinator's keys, certificate and manifest.
        state: directory for the journal, uploads and signed sums; one coordinator each.
        grace: seconds that calls in flight may take when the server stops.
        log_level: debug, info, warning or error.
        log_format: json or console.
        limits: how much to give, and to whom.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", strict=True)

    listen: str
    credentials: Path
    state: Path
    grace: float = 10.0
    log_level: str = "info"
    log_format: str = "json"
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        if self.log_level not in ("debug", "info", "warning", "error"):  # CHECK: settings-log-level
            raise ConfigError("log-level", f"log_level = {self.log_level!r}.")
        if self.log_format not in ("json", "console"):  # CHECK: settings-log-format
            raise ConfigError("log-format", f"log_format = {self.log_format!r}.")
        if not 0 <= self.grace < math.inf:  # CHECK: settings-grace
            raise ConfigError("limits", f"grace = {self.grace} is no number of seconds.")


def load_settings(path: Path) -> Settings:
    """Read ``coordinator.toml``; relative paths are relative to it.

    Raises:
        ConfigError: no such file, or it cannot be right.
    """
    try:
        text = path.read_text()
    except OSError as error:
        raise ConfigError("config-file", f"{path} cannot be read: {error.strerror}.") from None
    except UnicodeDecodeError:
        raise ConfigError("config-file", f"{path} is not UTF-8 text.") from None
    settings = parse_toml(Settings, text, str(path))
    object.__setattr__(settings, "credentials", path.parent / settings.credentials)
    object.__setattr__(settings, "state", path.parent / settings.state)
    return settings
