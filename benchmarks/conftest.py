"""One core for all benchmarks, so that ratios to a floor mean something; --quick and --group."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest

ALLOWED = os.sched_getaffinity(0)
NO_GROUP = 64  # exit status, known to secagg/cli/bench.py
SKIPPED = pytest.StashKey[list[dict[str, str]]]()
FAILED = pytest.StashKey[set[str]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("secagg", "secagg's benchmarks")
    group.addoption("--quick", action="store_true", help="Leave out what is marked full.")
    group.addoption("--group", action="append", help="Only this group, or those that begin so.")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "full: takes long; --quick leaves it out")
    config.stash[SKIPPED] = []
    config.stash[FAILED] = set()


def group_of(item: pytest.Item) -> str:
    """A benchmark's group; its file's name where it names none."""
    marker = item.get_closest_marker("benchmark")
    return str(marker.kwargs.get("group", item.path.stem)) if marker else item.path.stem


def is_of(group: str, wanted: list[str]) -> bool:
    """Whether a group is one of those wanted: by its name, or the part before a hyphen."""
    return any(group == name or group.startswith(f"{name}-") for name in wanted)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    wanted = config.getoption("group")
    groups = {group_of(item) for item in items}
    for name in wanted or []:
        if not any(is_of(group, [name]) for group in groups):
            known = ", ".join(sorted(groups))
            pytest.exit(f"there is no group {name!r}; there are: {known}", NO_GROUP)
    keep = [
        item
        for item in items
        if not (config.getoption("quick") and item.get_closest_marker("full"))
        and (not wanted or is_of(group_of(item), wanted))
    ]
    config.hook.pytest_deselected(items=[item for item in items if item not in keep])
    items[:] = keep


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: Any) -> Any:
    report = yield
    _note_skip(item.config, report, group_of(item), item.name)
    if report.failed:
        item.config.stash[FAILED].add(item.nodeid)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Any:
    report = yield
    _note_skip(collector.config, report, "", collector.name)
    return report


def _note_skip(config: pytest.Config, report: Any, group: str, name: str) -> None:
    if report.skipped and isinstance(report.longrepr, tuple):
        reason = report.longrepr[2].removeprefix("Skipped: ")
        config.stash[SKIPPED].append({"group": group, "name": name, "reason": reason})


def pytest_benchmark_update_json(
    config: pytest.Config, benchmarks: list[Any], output_json: dict[str, Any]
) -> None:
    """Name what was skipped, and leave out what failed: a wrong sum has no figures."""
    failed = config.stash[FAILED]
    output_json["benchmarks"] = [
        one for one in output_json["benchmarks"] if one["fullname"] not in failed
    ]
    output_json["skipped"] = config.stash[SKIPPED]


@pytest.fixture(autouse=True, scope="session")
def _one_core() -> None:
    os.sched_setaffinity(0, {min(ALLOWED)})


@pytest.fixture
def all_cores() -> Iterator[int]:
    """All cores that this process had at first, for the length of a benchmark; how many."""
    if len(ALLOWED) < 2:
        pytest.skip("needs two cores")
    os.sched_setaffinity(0, ALLOWED)
    yield len(ALLOWED)
    os.sched_setaffinity(0, {min(ALLOWED)})
