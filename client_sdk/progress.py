"""One line a phase on a terminal; quiet elsewhere, where the log tells the same."""

from __future__ import annotations

import logging
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.status import Status

log = logging.getLogger("client_sdk")


class Progress:
    """A status line that is there while a round runs and only on a terminal."""

    def __init__(self, label: str) -> None:
        self._label = label
        console = Console(stderr=True)
        self._status: Status | None = None
        if console.is_terminal:
            self._status = console.status(label)

    def __enter__(self) -> Self:
        if self._status is not None:
            self._status.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._status is not None:
            self._status.stop()

    def say(self, what: str) -> None:
        """Say what happens now."""
        log.info("%s: %s", self._label, what)
        if self._status is not None:
            self._status.update(f"{self._label}: {what}")
