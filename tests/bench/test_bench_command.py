"""``secagg bench``: what it prints, writes and refuses. What it measures is not tested by time."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

import secagg
from secagg.cli import bench
from secagg.cli.bench import BenchmarkFailed
from secagg.errors import ConfigError
from secagg.ring import native

from .conftest import ROOT, Fake, one, report


def run(*arguments: object) -> Result:
    return CliRunner().invoke(bench.bench, [str(argument) for argument in arguments])


def ok(*arguments: object) -> str:
    result = run(*arguments)
    assert result.exit_code == 0, (result.output, result.exception)
    return result.output


def refused(code: str, *arguments: object, kind: type[Exception] = ConfigError) -> Result:
    result = run(*arguments)
    assert type(result.exception) is kind, (result.output, result.exception)
    assert getattr(result.exception, "code", None) == code
    return result


def test_info_says_which_path_runs_and_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(secagg, "__file__", "/nowhere/secagg/__init__.py")  # it needs no suite
    shown = ok("--info")
    assert str(native.chosen()) in shown
    assert native.reason() in shown
    machine = json.loads(ok("--info", "--json"))["machine"]
    assert machine["path"] == native.chosen()
    assert machine["available"] == list(native.available())
    assert machine["reason"] == native.reason()
    assert {"secagg", "python", "numpy", "cryptography", "openssl"} <= machine["versions"].keys()
    assert machine["cpu"]
    assert machine["cores"] >= 1


def test_json_is_one_document(fake: Fake, tmp_path: Path) -> None:
    skipped = [{"group": "peers", "name": "test_x", "reason": "flwr is not installed"}]
    calls = fake(report(one("a[k=16]", 2.0, 1.0, spread=1.1), skipped=skipped))
    file = tmp_path / "out.json"
    shown = json.loads(
        ok("--json", "--quick", "--group", "masks", "--group", "x", "--output", file)
    )
    assert json.loads(file.read_text()) == shown
    assert shown["quick"] is True
    assert shown["skipped"] == skipped
    (result,) = shown["results"]
    assert (result["group"], result["name"]) == ("masks", "test_a[k=16]")
    assert result["params"] == {"k": 16}
    assert (result["seconds"], result["floor"], result["ratio_to_floor"]) == (2.0, "memcpy", 2.0)
    assert result["more"] == {"spread": 1.1}
    (command,) = calls
    assert command[3:9] == ["benchmarks", "--quick", "--group", "masks", "--group", "x"]


def test_the_table_shows_every_figure(fake: Fake) -> None:
    peer = {"peer": "TenSEAL", "peer_seconds": 6.0, "speedup": 3.0}
    fake(
        report(
            one("a[k=16]", 2e-3, 1e-3, **peer),
            one("b", 5.0),
            skipped=[{"group": "p", "name": "test_c", "reason": "not [here]"}],
        )
    )
    shown = ok()
    for text in ("masks", "a[k=16]", "2 ms", "2.00×", "memcpy", "5 MB", "3× faster than TenSEAL"):
        assert text in shown
    assert "skipped: p test_c: not [here]" in shown
    assert native.reason() in shown


def test_compare_is_by_ratio_and_not_by_time(fake: Fake, tmp_path: Path) -> None:
    before = tmp_path / "before.json"
    fake(report(one("a", 1.0, 1.0), one("b", 2.0, 1.0)))
    ok("--output", before)
    fake(report(one("a", 9.0, 9.0), one("b", 2.5, 1.0), one("new", 9.0, 1.0)))
    assert "+25 %" in ok("--compare", before)  # within the tolerance, to the last bit
    fake(report(one("a", 0.5, 0.1), one("b", 2.0, 1.0)))
    result = refused("bench-worse", "--compare", before, kind=BenchmarkFailed)
    assert "1 of 2" in str(result.exception)
    assert "worse" in result.output
    ok("--compare", before, "--tolerance", "4")
    shown = run("--compare", before, "--json")
    comparison = json.loads(shown.stdout)["comparison"]
    assert [(change["name"], change["worse"]) for change in comparison] == [
        ("test_a", True),
        ("test_b", False),
    ]
    assert isinstance(shown.exception, BenchmarkFailed)


def test_compare_refuses_what_it_cannot_compare(fake: Fake, tmp_path: Path) -> None:
    file = tmp_path / "before.json"
    calls = fake(report(one("a", 1.0, 1.0)))
    for text in ("", "[]", '{"results": []}', '{"results": 1}'):
        file.write_text(text)
        refused("bench-file", "--compare", file)
    assert not calls  # before anything is run
    ok("--output", file)
    fake(report(one("another", 1.0, 1.0), one("a", 1.0)))
    refused("bench-nothing-common", "--compare", file)
    moved = one("a", 1.0, 1.0)
    moved["extra_info"]["floor"] = "another floor"
    fake(report(moved))
    refused("bench-nothing-common", "--compare", file)


def test_a_failed_check_is_a_failure_whatever_was_measured(fake: Fake, tmp_path: Path) -> None:
    fake(report(one("a", 1.0, 1.0)), status=1)
    result = refused("bench-check", kind=BenchmarkFailed)
    assert "masks" in result.output
    refused("bench-check", "--plot", tmp_path / "plot.png", kind=BenchmarkFailed)


@pytest.mark.parametrize(
    ("code", "status", "text", "arguments"),
    [
        ("bench-group-unknown", 64, "", ["--group", "nope"]),
        ("bench-nothing", 4, "", ["--group", "x"]),
        ("bench-nothing", 5, "", ["--group", "ckks-huge", "--quick"]),
        ("bench-nothing", 1, "", []),
        ("bench-nothing", 0, "", []),
    ],
)
def test_when_nothing_ran(
    fake: Fake, code: str, status: int, text: str, arguments: list[str]
) -> None:
    fake(text, status)
    refused(code, *arguments)


def test_a_plot_needs_rounds(fake: Fake, tmp_path: Path) -> None:
    fake(report(one("a", 1.0, 1.0)))
    refused("bench-plot-empty", "--plot", tmp_path / "plot.png")


def test_without_the_suite(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks/conftest.py").touch()  # another package's, in site-packages
    monkeypatch.setattr(secagg, "__file__", str(tmp_path / "secagg/__init__.py"))
    refused("bench-suite-missing")


def test_without_the_extra(monkeypatch: pytest.MonkeyPatch, fake: Fake) -> None:
    calls = fake(report(one("a", 1.0)))
    missing = {"matplotlib"}

    def find_spec(name: str) -> object | None:
        return None if name in missing else object()

    monkeypatch.setattr(bench, "find_spec", find_spec)
    ok()
    result = refused("bench-extra-missing", "--plot", "x.png")
    assert "secagg[bench]" in str(result.exception)
    missing.add("pytest_benchmark")
    refused("bench-extra-missing")
    assert len(calls) == 1


def test_a_cheap_group_for_real() -> None:
    """The one run of the suite itself: as much of it as takes no time."""
    result = CliRunner().invoke(bench.bench, ["--json", "--quick", "--group", "shamir"])
    assert result.exit_code == 0, (result.output, result.exception)
    shown = json.loads(result.stdout)
    assert {one["group"] for one in shown["results"]} == {"shamir"}
    names = {one["name"] for one in shown["results"]}
    assert {"test_split[n=4]", "test_combine[n=64]", "test_basis[n=16]"} <= names
    assert "test_split[n=256]" not in names
    for result in shown["results"]:
        assert result["ratio_to_floor"] == result["seconds"] / result["floor_seconds"]
        assert result["ns_per_element"] > 0
        assert result["floor"]


SUITE = """
import pytest

from benchmarks.floors import Floor
from benchmarks.measure import measure

NOTHING = Floor("nothing", lambda: None)


@pytest.mark.benchmark(group="sums-right")
def test_right(benchmark):
    assert measure(benchmark, lambda: 1 + 1, NOTHING, elements=2, headline="a sum") == 2


@pytest.mark.benchmark(group="sums-wrong")
def test_wrong(benchmark):
    assert measure(benchmark, lambda: 1 + 2, NOTHING, elements=2) == 2


@pytest.mark.full
@pytest.mark.benchmark(group="sums-right")
def test_long(benchmark):
    raise AssertionError


@pytest.mark.benchmark(group="peers")
def test_peer(benchmark):
    pytest.skip("the peer is not installed")
"""


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout whose suite is a few sums, with the real one's machinery."""
    (tmp_path / "pyproject.toml").touch()
    (tmp_path / "benchmarks").mkdir()
    files = ("__init__.py", "conftest.py", "floors.py", "measure.py", "memory.py", "pytest.ini")
    for name in files:
        shutil.copy(ROOT / "benchmarks" / name, tmp_path / "benchmarks" / name)
    (tmp_path / "benchmarks/test_sums.py").write_text(SUITE)
    monkeypatch.setattr(bench, "suite", lambda: tmp_path)
    return tmp_path


def test_a_fast_wrong_sum_fails(small: Path) -> None:
    file = small / "out.json"
    refused("bench-check", "--quick", "--output", file, kind=BenchmarkFailed)
    shown: dict[str, Any] = json.loads(file.read_text())
    assert [one["name"] for one in shown["results"]] == ["test_right"]  # nor has it a figure
    assert shown["skipped"] == [
        {"group": "peers", "name": "test_peer", "reason": "the peer is not installed"}
    ]


def test_groups_by_name_and_by_family(small: Path) -> None:
    shown = json.loads(ok("--quick", "--json", "--group", "sums-right"))
    (result,) = shown["results"]
    assert (result["name"], result["headline"]) == ("test_right", "a sum")
    refused("bench-check", "--quick", "--group", "sums", kind=BenchmarkFailed)  # the wrong one, too
    refused("bench-group-unknown", "--quick", "--group", "sum")
    refused("bench-nothing", "--quick", "--group", "peers")  # all of it was skipped
