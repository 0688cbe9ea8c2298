"""A helping process: gets a specification, says when it is ready, works from "go" to the end.

Every part of a storm runs in a process of its own, so that what it costs can be told apart from
what it does to the coordinator: each one reports the CPU seconds that it used after "go".
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any, Self

END_SECONDS = 60.0


class Helper:
    """The parent's side of a helping process.

    Args:
        module: what it runs.
        spec: what it gets, as JSON.
    """

    def __init__(self, module: str, **spec: Any) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", f"tests.storm.{module}", json.dumps(spec)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._name, self.pid = module, self._process.pid

    def ready(self) -> None:
        """Wait until it is prepared."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line == "ready\n", f"{self._name} did not get ready: {line!r}"

    def go(self) -> None:
        """Let it work."""
        assert self._process.stdin is not None
        self._process.stdin.write("go\n")
        self._process.stdin.flush()

    def wait(self) -> dict[str, Any]:
        """What it reports once it has ended of its own accord."""
        out, _ = self._process.communicate(timeout=END_SECONDS)
        assert self._process.returncode == 0, f"{self._name} ended with {self._process.returncode}"
        report: dict[str, Any] = json.loads(out.splitlines()[-1])
        return report

    def finish(self) -> dict[str, Any]:
        """Tell it to end; what it reports."""
        return self.wait()  # which closes its standard input

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            self._process.kill()
        self._process.communicate()


def started(*helpers: Helper) -> None:
    """Let helpers work, at the same moment, once all are prepared."""
    for helper in helpers:
        helper.ready()
    for helper in helpers:
        helper.go()


def cpu_seconds() -> float:
    """What this process has used so far."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def main(work: Callable[[dict[str, Any], Callable[[], None], threading.Event], Any]) -> None:
    """The child's side: run ``work(spec, ready, stop)`` and report what it returns.

    ``ready`` returns when the parent says "go"; ``stop`` is set when it wants the report.
    """
    stop, prepared = threading.Event(), 0.0

    def wait_for_end() -> None:
        sys.stdin.read()
        stop.set()

    def ready() -> None:
        nonlocal prepared
        print("ready", flush=True)
        sys.stdin.readline()
        threading.Thread(target=wait_for_end, daemon=True).start()
        prepared = cpu_seconds()

    report = work(json.loads(sys.argv[1]), ready, stop)
    print(json.dumps({"cpu_seconds": round(cpu_seconds() - prepared, 2)} | report), flush=True)
