"""``python -m tests.storm``: the storm from the command line; exits 1 if what must hold did not."""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from .attack import PARTS
from .harness import Plan, run


def main(arguments: Sequence[str] | None = None) -> int:
    """Play what the arguments ask for."""
    options = _parser().parse_args(arguments)
    parts = tuple(PARTS) if options.part == "all" else (options.part,)
    plan = Plan(
        parts=parts, quiet=options.quiet, seconds=options.seconds, floor=not options.no_floor
    )
    with tempfile.TemporaryDirectory(prefix="secagg-storm-") as root:
        result = run(plan, Path(root))
    text = json.dumps(result, indent=1)
    if options.json:
        options.json.write_text(text)
    print(text)
    print(_caution(result["coordinator"]["machine"]), file=sys.stderr)
    return 0 if all(result["verdict"].values()) else 1


def _caution(machine: dict[str, float]) -> str:
    there = machine["seconds"] * (os.cpu_count() or 1)
    share = machine["others_cpu"] / there
    return (
        f"{share:.0%} of the machine's cores worked for others: latencies mean little above 10 %."
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.storm", description=__doc__)
    parser.add_argument("--part", choices=(*PARTS, "all"), default="all", help="which attack")
    parser.add_argument("--seconds", type=float, default=30.0, help="under attack")
    parser.add_argument("--quiet", type=float, default=20.0, help="seconds measured before it")
    parser.add_argument("--no-floor", action="store_true", help="leave out the bare server")
    parser.add_argument("--json", type=Path, help="where to write what was measured, too")
    return parser


if __name__ == "__main__":
    sys.exit(main())
