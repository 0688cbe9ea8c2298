"""``python -m tests.soak``: the soak from the command line; exits 1 on any failure."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # read when grpc is first imported

from .soak import Plan, Soak


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--silos", type=int, default=Plan.silos)
    parser.add_argument("--drop", type=float, default=Plan.drop, help="chance a silo and attempt")
    parser.add_argument("--kill-seconds", type=float, default=Plan.kill_seconds)
    parser.add_argument("--stretch", type=float, default=Plan.stretch, help="without its kills")
    parser.add_argument("--rounds", type=int, default=Plan.rounds, help="of each session")
    parser.add_argument("--sealed-every", type=int, default=Plan.sealed_every, help="sessions")
    parser.add_argument("--seed", type=int, default=Plan.seed)
    parser.add_argument("--json", type=Path, help="write the report here, too")
    options = vars(parser.parse_args(arguments))
    file = options.pop("json")
    root = Path(tempfile.mkdtemp(prefix="secagg-soak-")).resolve()
    report = Soak(root, Plan(**options), lambda line: print(line, flush=True)).run()
    text = json.dumps(report, indent=2)
    print(text)
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text + "\n")
    if report["failures"]:
        print(f"its files are in {root}")
        return 1
    shutil.rmtree(root)
    return 0


if __name__ == "__main__":
    sys.exit(main())
