"""What the platform team configures: where to listen, where state lives, how much to take."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from pydantic import ConfigDict

from secagg.config import parse_toml
from secagg.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Settings:
    """``coordinator.toml``.

    Args:
        listen: host:port to bind; port 0 takes a free one.
        credentials: directory with the coordinator's keys, certificate and manifest.
        state: directory for the journal, uploads and signed sums; one coordinator each.
        max_concurrent_calls: calls served at once; more are refused with RESOURCE_EXHAUSTED.
        max_metadata_bytes: request headers larger than this are refused.
        max_weights_bytes: greatest size of a task's initial weights.
        max_sessions: sessions kept at once; the oldest that is over makes room for a new one.
        grace: seconds that calls in flight may take when the server stops.
        log_level: debug, info, warning or error.
        log_format: json or console.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", strict=True)

    listen: str
    credentials: Path
    state: Path
    max_concurrent_calls: int = 1024
    max_metadata_bytes: int = 16 * 1024
    max_weights_bytes: int = 16 * 2**30
    max_sessions: int = 64
    grace: float = 10.0
    log_level: str = "info"
    log_format: str = "json"

    def __post_init__(self) -> None:
        if self.log_level not in ("debug", "info", "warning", "error"):
            raise ConfigError("log-level", f"log_level = {self.log_level!r}.")
        if self.log_format not in ("json", "console"):
            raise ConfigError("log-format", f"log_format = {self.log_format!r}.")
        limits = (self.max_concurrent_calls, self.max_metadata_bytes, self.max_sessions)
        if min(*limits, self.max_weights_bytes) < 1 or not 0 <= self.grace < math.inf:
            raise ConfigError("limits", "A limit of the coordinator is not positive.")


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
