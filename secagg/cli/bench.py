"""``secagg bench``.

The suite lives in ``benchmarks/`` of a checkout, beside the package; pytest-benchmark measures, in
a process of its own, and this command reads what it wrote.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

import click
from rich.console import Console

import secagg
from secagg.cli.measured import (
    Change,
    Machine,
    Measured,
    change_table,
    changes,
    describe,
    measured,
    table,
)
from secagg.config import adapter
from secagg.errors import ConfigError, SecaggError

TOLERANCE = 0.25
_FAILED, _NO_GROUP = 1, 64  # exit statuses: pytest's; of benchmarks/conftest.py
_FILE = click.Path(path_type=Path, dir_okay=False)


class BenchmarkFailed(SecaggError):
    """A benchmark's result was wrong, or its ratio to the floor got worse."""


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object and nothing else.")
@click.option("--info", is_flag=True, help="Only say which path expands masks here, and why.")
@click.option("--group", "groups", multiple=True, help="Only this group, or those that begin so.")
@click.option("--quick", is_flag=True, help="Leave out what takes long.")
@click.option(
    "--compare",
    "earlier",
    type=click.Path(path_type=Path, dir_okay=False, exists=True),
    help="An earlier --output; exit 1 if a ratio to its floor got worse.",
)
@click.option(
    "--tolerance",
    type=click.FloatRange(min=0, min_open=True),
    default=TOLERANCE,
    show_default=True,
    help="By how much a ratio may grow before it counts as worse.",
)
@click.option("--output", type=_FILE, help="Also write the JSON object here.")
@click.option("--plot", type=_FILE, help="Draw the cost of a round here: .png, .svg or .pdf.")
def bench(
    as_json: bool,
    info: bool,
    groups: tuple[str, ...],
    quick: bool,
    earlier: Path | None,
    tolerance: float,
    output: Path | None,
    plot: Path | None,
) -> None:
    """Measure every part of a round beside the least that it could cost on this machine."""
    machine = Machine.this()
    if info:
        _print_info(machine, as_json=as_json)
        return
    before = None
    if earlier is not None:
        before = Measured.from_json(earlier.read_text(), str(earlier))
    root = suite()
    require(plot=plot is not None)
    now, failed = run(root, machine, groups, quick=quick)
    if output is not None:
        output.write_text(now.to_json() + "\n")
    paired = changes(before, now) if before is not None else ()
    _print(now, paired, tolerance, as_json=as_json)
    if failed:
        raise BenchmarkFailed("bench-check", "A benchmark failed: which and why stands above.")
    if plot is not None:
        draw(root, now, plot)
    _judge(paired, tolerance)


def suite() -> Path:
    """Where the checkout is that holds the suite beside this package.

    Raises:
        ConfigError: this is an installation without it.
    """
    root = Path(secagg.__file__).parents[1]
    if not (root / "pyproject.toml").is_file() or not (root / "benchmarks/conftest.py").is_file():
        raise ConfigError(
            "bench-suite-missing",
            "This installation has no benchmarks: they lie beside the package in a checkout.",
            "Run it from one: pip install -e '.[bench]'",
        )
    return root


def require(*, plot: bool) -> None:
    """Return if what the suite needs is installed.

    Raises:
        ConfigError: it is not.
    """
    needed = ["pytest", "pytest_benchmark"] + ["matplotlib"] * plot
    missing = [module for module in needed if find_spec(module) is None]
    if missing:
        raise ConfigError(
            "bench-extra-missing",
            f"The benchmarks need {', '.join(missing)}.",
            "pip install 'secagg[bench]'",
        )


def run(
    root: Path, machine: Machine, groups: tuple[str, ...], *, quick: bool
) -> tuple[Measured, bool]:
    """Run the suite; progress and failures go to standard error.

    Returns:
        What it measured, and whether a benchmark failed.

    Raises:
        ConfigError: there is no such group, or nothing of it ran.
    """
    with tempfile.TemporaryDirectory(prefix="secagg-bench-") as place:
        report = Path(place) / "report.json"
        options = ["--quick"] * quick + [part for name in groups for part in ("--group", name)]
        status = _pytest(root, report, options)
        text = report.read_text() if report.exists() else ""
    if status == _NO_GROUP:
        raise ConfigError(
            "bench-group-unknown", f"No such group among: {', '.join(groups)}; all are named above."
        )
    if status not in (0, _FAILED) or not text:
        raise ConfigError("bench-nothing", f"No benchmark ran (pytest ended with {status}).")
    return measured(text, machine, quick=quick), status == _FAILED


def _pytest(root: Path, report: Path, options: list[str]) -> int:
    command = [sys.executable, "-m", "pytest", "benchmarks", *options]
    command += ["--benchmark-only", "--benchmark-quiet", f"--benchmark-json={report}"]
    return _call(root, command)


def _call(root: Path, command: list[str]) -> int:
    """Run our own command from the checkout; what it prints goes to standard error."""
    return subprocess.run(command, cwd=root, stdout=2, check=False).returncode  # noqa: S603


def draw(root: Path, now: Measured, file: Path) -> None:
    """Plot the cost of a round against n and d.

    Raises:
        ConfigError: no round was measured.
        BenchmarkFailed: the plot could not be drawn.
    """
    if not any(one.group == "round" for one in now.results):
        raise ConfigError("bench-plot-empty", "No round was measured.", "Add: --group round")
    with tempfile.TemporaryDirectory(prefix="secagg-bench-") as place:
        source = Path(place) / "measured.json"
        source.write_text(now.to_json())
        command = [sys.executable, "-m", "benchmarks.plot", str(source), str(file.absolute())]
        status = _call(root, command)
    if status:
        raise BenchmarkFailed("bench-plot", f"{file} could not be drawn; the reason is above.")


def _print_info(machine: Machine, *, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps({"machine": adapter(Machine).dump_python(machine)}))
        return
    for what, words in describe(machine).items():
        click.echo(f"{what:9} {words}")


def _print(now: Measured, paired: tuple[Change, ...], tolerance: float, *, as_json: bool) -> None:
    if as_json:
        document = json.loads(now.to_json())
        if paired:
            document["comparison"] = [
                {**adapter(Change).dump_python(one), "worse": one.is_worse(tolerance)}
                for one in paired
            ]
        click.echo(json.dumps(document, indent=2))
        return
    console = Console()
    if not console.is_terminal:  # a file or a pipe has no width: nothing is folded
        console = Console(width=180)
    console.print(table(now.results))
    for one in now.skipped:
        console.print(f"skipped: {one.group} {one.name}: {one.reason}", markup=False)
    for what, words in describe(now.machine).items():
        console.print(f"{what:9} {words}", markup=False, highlight=False)
    if paired:
        console.print(change_table(paired, tolerance))


def _judge(paired: tuple[Change, ...], tolerance: float) -> None:
    worse = [one for one in paired if one.is_worse(tolerance)]
    if worse:
        raise BenchmarkFailed(
            "bench-worse",
            f"{len(worse)} of {len(paired)} ratios to their floors got worse by more than "
            f"{tolerance * 100:.0f} %.",
            "Run it again on a quiet machine before you believe it.",
        )
