"""``python -m tests.faults``: many seeds from the command line.

Exits 1 on a broken promise, on a replay that differs, or when too few runs go on after the faults.
"""

from __future__ import annotations

import argparse
import functools
import json
import multiprocessing
import os
import sys
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from .consortium import consortium
from .world import Report, simulate

LIVENESS = 0.999


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what the arguments ask for."""
    options = _parser().parse_args(arguments)
    if options.seed is not None:
        return _one(options.seed, trace=options.trace)
    began = time.monotonic()
    consortium()  # made once, and removed by this process alone
    seeds = range(options.first, options.first + options.seeds)
    if options.jobs == 1:
        summary = summarise(play(seed, replay=options.replay) for seed in seeds)
    else:
        with multiprocessing.get_context("fork").Pool(options.jobs) as pool:
            work = functools.partial(play, replay=options.replay)
            summary = summarise(pool.imap_unordered(work, seeds, chunksize=20))
    seconds = time.monotonic() - began
    summary |= {"seconds": round(seconds, 1), "seeds_a_second": round(len(seeds) / seconds, 2)}
    print(json.dumps(summary, indent=1) if options.json else _text(summary))
    return 0 if passed(summary) else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--seeds", type=int, default=1000, help="how many")
    parser.add_argument("--first", type=int, default=0, help="the first of them")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="worker processes")
    parser.add_argument("--replay", action="store_true", help="each twice, with the same hash")
    parser.add_argument("--json", action="store_true", help="the summary as JSON")
    parser.add_argument("--seed", type=int, help="this one alone")
    parser.add_argument("--trace", action="store_true", help="with --seed: all that happened")
    return parser


def play(seed: int, *, replay: bool) -> Report:
    """Run a seed, once or twice; a replay that differs is a broken promise."""
    report = simulate(seed)
    if replay:
        again = simulate(seed)
        if again.as_dict() != report.as_dict():
            report.violations.append(f"the replay differs: {report.hash} and {again.hash}")
    return report


def summarise(reports: Iterable[Report]) -> dict[str, Any]:
    """Add reports up."""
    total: Counter[str] = Counter()
    faults: Counter[str] = Counter()
    took: Counter[str] = Counter()
    failures: dict[int, list[str]] = {}
    slow = []
    for report in reports:
        total.update(
            runs=1,
            rounds=report.rounds,
            attempts=report.attempts,
            aborts=report.aborts,
            crashes=report.crashes,
            held_back=report.held_back,
            live=report.live,
        )
        faults.update(report.faults)
        took[str(report.finished_within)] += 1
        if report.violations:
            failures[report.seed] = report.violations
        if not report.live and not report.held_back:
            slow.append(report.seed)
    free = total["runs"] - total["held_back"]
    return {
        **total,
        "liveness": total["live"] / free if free else 1.0,
        "attempts_after_the_faults": dict(sorted(took.items())),
        "faults": dict(faults.most_common()),
        "not_live": sorted(slow),
        "violations": {str(seed): failures[seed] for seed in sorted(failures)},
    }


def passed(summary: dict[str, Any]) -> bool:
    """Whether nothing was violated, and enough runs went on."""
    return not summary["violations"] and summary["liveness"] >= LIVENESS


def _text(summary: dict[str, Any]) -> str:
    lines = [f"{name}: {value}" for name, value in summary.items() if name != "violations"]
    for seed, broken in summary["violations"].items():
        lines.append(f"FAILED  python -m tests.faults --seed {seed} --trace")
        lines += [f"        {what}" for what in broken]
    lines += [
        f"STUCK   python -m tests.faults --seed {seed} --trace" for seed in summary["not_live"]
    ]
    return "\n".join(lines)


def _one(seed: int, *, trace: bool) -> int:
    report = simulate(seed, trace=trace)
    print("\n".join(report.trace))
    table = report.as_dict()
    del table["trace"]
    print(json.dumps(table, indent=1))
    return 1 if report.violations or not (report.live or report.held_back) else 0


if __name__ == "__main__":
    sys.exit(main())
