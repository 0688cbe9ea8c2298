"""``python -m tests.crash``: the crash matrix from the command line; exits 1 on any failure."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .harness import Plan, Template, Verdict
from .matrix import TARGETS, Pool, choose, plans_at, random_plans, serve


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what the arguments ask for."""
    options = _parser().parse_args(arguments)
    if options.worker:
        serve(*map(Path, options.worker))
        return 0
    root = Path(tempfile.mkdtemp(prefix="secagg-crash-")).resolve()
    began = time.monotonic()
    pool = Pool(Template.make(root / "template"), root / "runs", options.jobs)
    plans, counts = _plans(pool, options)
    verdicts = pool.run(plans, lambda verdict: _tell(verdict, options))
    summary = _summary(plans, verdicts, counts, time.monotonic() - began)
    if not summary["failures"]:
        shutil.rmtree(root, ignore_errors=True)
    print(json.dumps(summary, indent=1) if options.json else _text(summary))
    return 1 if summary["failures"] else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.crash", description=__doc__)
    parser.add_argument("--coordinator", type=int, default=0, help="kill points of the coordinator")
    parser.add_argument("--silo", type=int, default=0, help="kill points of a silo")
    parser.add_argument("--recovery", type=int, default=0, help="second kills, as it recovers")
    parser.add_argument("--random", type=int, default=0, help="kills at random moments")
    parser.add_argument("--seed", type=int, default=0, help="of the random moments")
    parser.add_argument("--only", action="append", default=[], help="exactly this plan")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="worker processes")
    parser.add_argument("--json", action="store_true", help="the summary as JSON")
    parser.add_argument("--verbose", action="store_true", help="a line a run, on standard error")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    return parser


def _plans(pool: Pool, options: argparse.Namespace) -> tuple[list[Plan], dict[str, int]]:
    """All plans, and how many calls each target's undisturbed run had."""
    plans = [Plan.parse(text) for text in options.only]
    asked = {target: getattr(options, target) for target in TARGETS}
    targets = [t for t in TARGETS if asked[t] or (options.random and t != "recovery")]
    counted = pool.count(targets) if targets else {}
    for target in targets:
        plans += plans_at(target, choose(counted[target].calls, asked[target]))
    if options.random:
        spans = {target: verdict.play_ms for target, verdict in counted.items()}
        plans += random_plans(options.random, options.seed, spans)
    return plans, {target: len(verdict.calls) for target, verdict in counted.items()}


def _tell(verdict: Verdict, options: argparse.Namespace) -> None:
    if options.verbose or verdict.failures:
        state = "FAILED" if verdict.failures else "aborted" if verdict.aborts else "ok"
        died = verdict.death if verdict.died else "nobody died"
        print(f"{state:8}{verdict.plan:24}{verdict.seconds:5.1f} s  {died}", file=sys.stderr)
        for text in (*verdict.failures, *verdict.aborts):
            print(f"        {text}", file=sys.stderr)
        sys.stderr.flush()


def _summary(
    plans: list[Plan], verdicts: list[Verdict], counts: dict[str, int], seconds: float
) -> dict[str, Any]:
    kinds = Counter((p.target, p.side) for p in plans)
    times = [restart for verdict in verdicts for restart in verdict.restarts]
    return {
        "calls_in_an_undisturbed_run": counts,
        "runs": len(verdicts),
        "runs_by_kind": {f"{target}:{side}": n for (target, side), n in sorted(kinds.items())},
        "points": {t: len({p.number for p in plans if p.target == t}) for t in TARGETS},
        "killed": sum(verdict.died for verdict in verdicts),
        "exact_sum_everywhere": sum(not v.failures and not v.aborts for v in verdicts),
        "clean_aborts": {v.plan: v.aborts for v in verdicts if v.aborts and not v.failures},
        "failures": [
            {"rerun": f"--only {v.plan}", "death": v.death, "what": v.failures}
            for v in verdicts
            if v.failures
        ],
        "restart_seconds_max": round(max(times, default=0.0), 2),
        "run_seconds_max": round(max((v.seconds for v in verdicts), default=0.0), 1),
        "run_seconds_mean": round(sum(v.seconds for v in verdicts) / max(len(verdicts), 1), 2),
        "seconds": round(seconds, 1),
    }


def _text(summary: dict[str, Any]) -> str:
    lines = [f"{k}: {v}" for k, v in summary.items() if k not in ("failures", "clean_aborts")]
    lines += [f"clean abort {plan}: {why}" for plan, why in summary["clean_aborts"].items()]
    for failure in summary["failures"]:
        lines += [
            f"FAILED {failure['rerun']}  at {failure['death']}",
            *map(_indent, failure["what"]),
        ]
    return "\n".join(lines)


def _indent(text: str) -> str:
    return "    " + text.replace("\n", "\n    ")


if __name__ == "__main__":
    sys.exit(main())
