"""What a run of the benchmarks gave: its JSON, its table, and how it compares with an earlier run.

Comparisons are of ratios to the floors, which were measured in the same minute as the work: times
of two runs differ by whatever else the machines did.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import ClassVar, Final

import numpy as np
from cryptography.hazmat.backends.openssl import backend
from pydantic import ConfigDict, ValidationError
from rich.markup import escape
from rich.table import Table

from secagg import __version__
from secagg.config import adapter
from secagg.errors import ConfigError
from secagg.ring import native

_LENIENT: Final = ConfigDict(extra="ignore")
_OWN: Final = (
    "seconds",
    "ns_per_element",
    "floor",
    "floor_seconds",
    "ratio_to_floor",
    "peak_bytes",
    "peer",
    "peer_seconds",
    "speedup",
    "headline",
)


@dataclass(frozen=True, slots=True)
class Machine:
    """Where it ran, and which kernel expanded the masks.

    Args:
        cpu: the processor's name.
        cores: how many this process may use.
        versions: of what the figures depend on, by name.
        path: of ``secagg.ring.native``, the one that runs.
        reason: why.
        available: all that could run, fastest first.
    """

    cpu: str
    cores: int
    versions: dict[str, str]
    path: str
    reason: str
    available: tuple[str, ...]

    @classmethod
    def this(cls) -> Machine:
        """The machine that this process runs on."""
        return cls(
            cpu=_cpu(),
            cores=len(os.sched_getaffinity(0)),
            versions={
                "secagg": __version__,
                "python": platform.python_version(),
                "numpy": np.__version__,
                "cryptography": version("cryptography"),
                "openssl": backend.openssl_version_text().split()[1],
                "kernel": platform.release(),
            },
            path=native.chosen(),
            reason=native.reason(),
            available=tuple(native.available()),
        )


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


@dataclass(frozen=True, slots=True)
class Result:
    """One benchmark.

    Args:
        group: what is measured.
        name: which case of it; stands for the same work in every run.
        params: the case's parameters.
        seconds: least time of a run.
        ns_per_element: that, by element.
        floor: the least that any implementation has to do, where one is named.
        floor_seconds: its least time, measured in turn with the work.
        ratio_to_floor: seconds / floor_seconds.
        peak_bytes: how far the resident memory rose.
        peer: another implementation that ran beside it.
        peer_seconds: its least time.
        speedup: peer_seconds / seconds.
        headline: what the README calls it, where it has a row there.
        more: whatever else the benchmark recorded.
    """

    __pydantic_config__: ClassVar[ConfigDict] = _LENIENT

    group: str
    name: str
    params: dict[str, object]
    seconds: float
    ns_per_element: float | None = None
    floor: str | None = None
    floor_seconds: float | None = None
    ratio_to_floor: float | None = None
    peak_bytes: int | None = None
    peer: str | None = None
    peer_seconds: float | None = None
    speedup: float | None = None
    headline: str | None = None
    more: dict[str, object] = field(default_factory=dict)

    @property
    def case(self) -> str:
        """The name without what all names begin with."""
        return self.name.removeprefix("test_")


@dataclass(frozen=True, slots=True)
class Skipped:
    """A benchmark that did not run, and the word why."""

    group: str
    name: str
    reason: str


@dataclass(frozen=True, slots=True)
class Measured:
    """One run of the suite: the JSON document of ``secagg bench --json``."""

    __pydantic_config__: ClassVar[ConfigDict] = _LENIENT

    machine: Machine
    datetime: str
    quick: bool
    results: tuple[Result, ...]
    skipped: tuple[Skipped, ...] = ()

    def to_json(self) -> str:
        """The document."""
        return adapter(Measured).dump_json(self, indent=2).decode()

    @classmethod
    def from_json(cls, text: str, source: str) -> Measured:
        """Read a document back.

        Raises:
            ConfigError: it is none; ``source`` names it.
        """
        try:
            return adapter(Measured).validate_json(text)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            place = ".".join(str(part) for part in first["loc"])
            raise ConfigError(
                "bench-file",
                f"{source} is no result of secagg bench: {place or 'it'}: {first['msg']}.",
                "Make one with: secagg bench --output FILE",
            ) from None


@dataclass(frozen=True, slots=True)
class _Stats:
    __pydantic_config__: ClassVar[ConfigDict] = _LENIENT

    min: float


@dataclass(frozen=True, slots=True)
class _Benchmark:
    __pydantic_config__: ClassVar[ConfigDict] = _LENIENT

    group: str | None
    name: str
    params: dict[str, object] | None
    extra_info: dict[str, object]
    stats: _Stats


@dataclass(frozen=True, slots=True)
class _Report:
    __pydantic_config__: ClassVar[ConfigDict] = _LENIENT

    datetime: str
    benchmarks: tuple[_Benchmark, ...]
    skipped: tuple[Skipped, ...] = ()


def measured(report: str, machine: Machine, *, quick: bool) -> Measured:
    """Make the document from what pytest-benchmark wrote."""
    parsed = adapter(_Report).validate_json(report)
    results = tuple(_result(one) for one in parsed.benchmarks)
    return Measured(machine, parsed.datetime, quick, results, parsed.skipped)


def _result(one: _Benchmark) -> Result:
    recorded: dict[str, object] = {"seconds": one.stats.min, **one.extra_info}
    own = {key: recorded.pop(key) for key in _OWN if key in recorded}
    if "floor_seconds" not in own and "ratio_to_floor" in own:  # of rates, perhaps
        recorded["ratio_to_floor"] = own.pop("ratio_to_floor")
    whole = {"group": one.group or "", "name": one.name, "params": one.params or {}}
    return adapter(Result).validate_python(whole | own | {"more": recorded})


def table(results: tuple[Result, ...]) -> Table:
    """The results for a terminal."""
    made = Table(box=None, header_style="bold")
    made.add_column("group", no_wrap=True)
    made.add_column("case", overflow="fold")
    for column in ("time", "per element", "ratio"):
        made.add_column(column, justify="right", no_wrap=True)
    made.add_column("floor", overflow="fold")
    made.add_column("peak memory", justify="right", no_wrap=True)
    before = None
    for one in results:
        group = one.group if one.group != before else ""
        before = one.group
        floor = one.floor or ""
        if one.peer and one.speedup:
            floor += f"{'; ' if floor else ''}{one.speedup:.3g}× faster than {one.peer}"
        cells = (group, one.case, *figures(one), floor, bytes_text(one.peak_bytes))
        made.add_row(*(escape(cell) for cell in cells))
    return made


def figures(one: Result) -> tuple[str, str, str]:
    """Time, time by element and ratio to the floor, as text; empty where there is none."""
    element = "" if one.ns_per_element is None else time_text(one.ns_per_element * 1e-9)
    ratio = "" if one.ratio_to_floor is None else ratio_text(one.ratio_to_floor)
    return time_text(one.seconds), element, ratio


def time_text(seconds: float) -> str:
    """Three digits and a unit."""
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= scale:
            return f"{seconds / scale:.3g} {unit}" if seconds < 1000 else f"{seconds:.0f} s"
    return f"{seconds * 1e9:.2g} ns" if seconds < 1e-8 else f"{seconds * 1e9:.3g} ns"


def ratio_text(ratio: float) -> str:
    """Three digits, as far as they are behind the point two."""
    digits = 2 if ratio < 10 else 1 if ratio < 100 else 0
    return f"{ratio:.{digits}f}×"


def bytes_text(size: int | None) -> str:
    """Megabytes, since pages and allocators blur what is less."""
    if size is None:
        return ""
    if size < 1e6:
        return "< 1 MB"
    return f"{size / 1e6:.0f} MB" if size < 1e9 else f"{size / 1e9:.2f} GB"


@dataclass(frozen=True, slots=True)
class Change:
    """A benchmark's ratio to its floor in two runs."""

    group: str
    name: str
    before: float
    now: float

    @property
    def case(self) -> str:
        """The name without what all names begin with."""
        return self.name.removeprefix("test_")

    def is_worse(self, tolerance: float) -> bool:
        """Whether the ratio grew by more than this part of what it was."""
        return self.now > self.before * (1 + tolerance)


def changes(before: Measured, now: Measured) -> tuple[Change, ...]:
    """Pair what both runs have, beside the same floor.

    Raises:
        ConfigError: they have no benchmark in common: nothing would have been compared.
    """
    earlier = {_work(one): ratio for one, ratio in _rated(before.results)}
    paired = tuple(
        Change(one.group, one.name, earlier[_work(one)], ratio)
        for one, ratio in _rated(now.results)
        if _work(one) in earlier
    )
    if not paired:
        raise ConfigError(
            "bench-nothing-common",
            "The two runs have no benchmark with a floor in common.",
            "Compare with a run of the same groups.",
        )
    return paired


def _rated(results: tuple[Result, ...]) -> Iterator[tuple[Result, float]]:
    return ((one, one.ratio_to_floor) for one in results if one.ratio_to_floor is not None)


def _work(one: Result) -> tuple[str, str, str | None]:
    return one.group, one.name, one.floor


def change_table(paired: tuple[Change, ...], tolerance: float) -> Table:
    """Both ratios side by side, and which got worse."""
    made = Table(box=None, header_style="bold")
    for column in ("group", "case"):
        made.add_column(column, overflow="fold")
    for column in ("ratio before", "now", "change"):
        made.add_column(column, justify="right", no_wrap=True)
    made.add_column("")
    for one in paired:
        change = f"{(one.now / one.before - 1) * 100:+.0f} %"
        verdict = "[red]worse[/red]" if one.is_worse(tolerance) else ""
        ratios = (ratio_text(one.before), ratio_text(one.now))
        made.add_row(escape(one.group), escape(one.case), *ratios, change, verdict)
    return made


def describe(machine: Machine) -> Mapping[str, str]:
    """The machine in words, by what they are about."""
    others = [path for path in machine.available if path != machine.path]
    return {
        "path": machine.path + (f" (also here: {', '.join(others)})" if others else ""),
        "why": machine.reason,
        "cpu": machine.cpu,
        "cores": str(machine.cores),
        "versions": ", ".join(f"{name} {number}" for name, number in machine.versions.items()),
    }
