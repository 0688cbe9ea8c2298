"""A report as pytest-benchmark writes it, and the command with pytest left out."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from secagg.cli import bench
from secagg.cli.measured import Machine, Measured, measured

ROOT = Path(__file__).parents[2]
MACHINE = Machine("a cpu", 2, {"numpy": "2"}, "openssl", "No compiler.", ("openssl",))


@pytest.fixture(autouse=True)
def _suite_importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)  # pytest-benchmark would not measure


def one(name: str, least: float, floor: float | None = None, /, **extra: Any) -> dict[str, Any]:
    """A benchmark of a report; beside a floor, as ``record`` leaves it."""
    group = extra.pop("group", "masks")
    if floor is not None:
        extra |= {
            "floor": "memcpy",
            "floor_seconds": floor,
            "ratio_to_floor": least / floor,
            "ns_per_element": least * 1e3,
            "peak_bytes": 5_000_000,
        }
    return {
        "group": group,
        "name": f"test_{name}",
        "fullname": f"benchmarks/test_masks.py::test_{name}",
        "params": extra.pop("params", {"k": 16}),
        "extra_info": extra,
        "stats": {"min": least, "max": 2 * least, "rounds": 5},
    }


def report(*benchmarks: dict[str, Any], **more: Any) -> str:
    """The file of ``--benchmark-json``."""
    whole = {"datetime": "2026-01-02T03:04:05+00:00", "version": "5.1.0", "machine_info": {}}
    return json.dumps({**whole, "benchmarks": benchmarks, **more})


def document(*benchmarks: dict[str, Any]) -> Measured:
    """What becomes of it."""
    return measured(report(*benchmarks), MACHINE, quick=True)


Fake = Callable[..., list[list[str]]]


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Fake:
    """Have the command run nothing; it finds a given report and exit status."""

    def install(text: str, status: int = 0) -> list[list[str]]:
        calls: list[list[str]] = []

        def call(root: Path, command: list[str]) -> int:
            assert (root / "benchmarks").is_dir()
            calls.append(command)
            for part in command:
                if part.startswith("--benchmark-json="):
                    Path(part.partition("=")[2]).write_text(text)
            return status

        monkeypatch.setattr(bench, "_call", call)
        return calls

    return install
