"""``python -m tests.mutants``: is there a check that could go without any test's notice?

Exits 1 if there is one, or one whose mutant could not be judged; 2 if the suite does not pass.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

from tests.mutants.marks import Mark, find
from tests.mutants.runs import BaselineFailed, Fate, Suite, Verdict, judge, refusals, rush

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("secagg", "client_sdk")
TESTS = (
    *("tests/crypto", "tests/encoding", "tests/ring", "tests/masking", "tests/ckks", "tests/wire"),
    *("tests/pki", "tests/coordinator", "tests/sdk", "tests/threats", "tests/test_config.py"),
    *("tests/simulation", "tests/test_disk.py", "tests/test_suite.py"),
)
"""Those that look at a check from near by. What plays whole federations for minutes (crashes,
faults, the demo) could notice as well, but a check that only such a run holds is held by luck."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what the arguments ask for."""
    options = _parser().parse_args(arguments)
    suite = Suite(ROOT, PACKAGES, tuple(options.tests))
    marks = find(ROOT, PACKAGES)
    unknown = set(options.only or ()) - {mark.name for mark in marks}
    if unknown:
        print(f"No check is called {', '.join(sorted(unknown))}.", file=sys.stderr)
        return 2
    began = time.monotonic()
    try:
        known = refusals(suite, options.jobs)
    except BaselineFailed as error:
        print(f"The tests do not pass as they are:\n{error}", file=sys.stderr)
        return 2
    print(f"{len(marks)} checks; the suite passes in {time.monotonic() - began:.0f} s", flush=True)
    chosen = [mark for mark in marks if not options.only or mark.name in options.only]
    killers = rush(suite, {m.name: known[m.name] for m in chosen if m.name in known}, options.jobs)

    def verdict(mark: Mark) -> Verdict:
        if mark.name in killers:
            return Verdict.killed(mark, killers[mark.name])
        return judge(suite, mark, known.get(mark.name, ()))

    with ThreadPoolExecutor(options.jobs) as pool:
        verdicts = [_told(found) for found in pool.map(verdict, chosen)]
    if options.json:
        options.json.write_text(json.dumps([asdict(v) for v in verdicts], default=str, indent=1))
    return _summary(verdicts, time.monotonic() - began)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__)
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these checks alone")
    parser.add_argument("--tests", nargs="+", default=TESTS, help="with these tests alone")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the verdicts there")
    return parser


def _told(verdict: Verdict) -> Verdict:
    print(f"{verdict.fate:8} {verdict.mark.name}: {verdict.why}", flush=True)
    return verdict


def _summary(verdicts: Sequence[Verdict], seconds: float) -> int:
    """Print how many there are of each fate, and all that are no good; return the exit status."""
    left = [verdict for verdict in verdicts if not verdict.good]
    crashed = sum(verdict.fate is Fate.CRASHED for verdict in verdicts)
    killed = len(verdicts) - len(left) - crashed
    print(f"\n{len(verdicts)} mutants in {seconds:.0f} s: {killed} killed, {crashed} crashed")
    for verdict in left:
        print(f"{verdict.fate}: {verdict.mark}")
    print("Survivors: " + (str(len(left)) if left else "none"))
    return 1 if left else 0


if __name__ == "__main__":
    sys.exit(main())
