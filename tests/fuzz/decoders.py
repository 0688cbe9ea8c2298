"""Fuzz every decoder with Atheris: ``python -m tests.fuzz.decoders --seconds 60``.

The product is instrumented as it is imported, once; every target then runs libFuzzer in a process
forked off, for its part of the time. It starts from the corpus in the tree, from fresh valid
encodings, and from what earlier runs found (in the scratch folder, as is what broke a target). With
``--keep``, inputs that reach lines which no smaller one reaches go into the tree's corpus.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import logging
import multiprocessing
import os
import re
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from contextlib import redirect_stderr
from pathlib import Path
from random import Random
from types import FrameType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .target import Target

CORPUS = Path(__file__).parent / "corpus"
FILES, BYTES = 30, 4096
"""Most files of a target in the corpus, and most bytes of one."""
RSS_MEBIBYTES = 1536
SLOWEST_SECONDS = 10


def read(folder: Path) -> list[bytes]:
    """The inputs in a folder, smallest first."""
    found = (path.read_bytes() for path in sorted(folder.glob("*")) if path.is_file())
    return sorted(set(found), key=lambda data: (len(data), data))


def write(folder: Path, data: bytes) -> None:
    """Put an input into a folder, under its digest."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / hashlib.sha256(data).hexdigest()[:16]).write_bytes(data)


def fuzz(name: str, scratch: Path, seconds: int) -> None:
    """Run one target, in a process of its own: libFuzzer ends it."""
    import atheris

    from .targets import TARGETS

    tempfile.tempdir = str(scratch)  # nothing is tidied up where libFuzzer ends the process
    target, found, broken = TARGETS[name], scratch / name, scratch / f"{name}.broken"
    arguments = [f"-max_total_time={seconds}", f"-timeout={SLOWEST_SECONDS}", "-len_control=0"]
    arguments += [f"-rss_limit_mb={RSS_MEBIBYTES}", f"-artifact_prefix={broken}-"]
    arguments += [f"-max_len={BYTES}", "-print_final_stats=1", str(found), str(CORPUS / name)]
    with (scratch / f"{name}.log").open("w") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    more = {} if target.message is None else {"custom_mutator": _mutator(target, atheris, found)}
    atheris.Setup([sys.argv[0], *arguments], lambda data: _run(target, data, broken), **more)
    atheris.Fuzz()


def _run(target: Target, data: bytes, broken: Path) -> None:
    try:
        target.accepts(data)
    except BaseException:
        write(broken, data)
        raise


def _mutator(target: Target, atheris: Any, found: Path) -> Any:
    """Edits of fields in turn with libFuzzer's of bytes."""
    from .mutations import Pool, mutated

    pool, kind = Pool(), target.message
    assert kind is not None
    for data in read(found):
        pool.add_bytes(kind, data)

    def mutate(data: bytes, most: int, seed: int) -> bytes:
        random = Random(seed)
        if random.random() < 0.5:
            return atheris.Mutate(data, most)
        return mutated(kind, data, pool, random)[:most]

    return mutate


Line = tuple[str, int, int]
ACCEPTED: Line = ("accepted", 0, 0)
REFUSED: Line = ("refused", 0, 0)


class Lines:
    """The pairs of lines of the product that run one after the other."""

    def __init__(self) -> None:
        self.seen: set[Line] = set()

    def of(self, target: Target, data: bytes) -> set[Line]:
        """Those that an input reaches, and what became of it."""
        self.seen = set()
        sys.settrace(self._enter)
        try:
            accepted = target.accepts(data)
        finally:
            sys.settrace(None)
        return self.seen | {ACCEPTED if accepted else REFUSED}

    def _enter(self, frame: FrameType, event: str, arg: object) -> Any:
        file = frame.f_code.co_filename
        if "/secagg/" not in file and "/client_sdk/" not in file:
            return None
        last = 0

        def step(frame: FrameType, event: str, arg: object) -> Any:
            nonlocal last
            self.seen.add((file, last, frame.f_lineno))
            last = frame.f_lineno
            return step

        return step


def keep(name: str, target: Target, scratch: Path) -> int:
    """Choose the corpus of a target anew: the smallest inputs for all that any of them reaches.

    What is accepted comes first, so that there is room for it.
    """
    lines, reached, chosen = Lines(), set[Line](), list[bytes]()
    candidates = {data for folder in (CORPUS, scratch) for data in read(folder / name)}
    reach = {data: lines.of(target, data) for data in candidates if len(data) <= BYTES}
    for data in sorted(reach, key=lambda data: (ACCEPTED not in reach[data], len(data), data)):
        if len(chosen) < FILES and reach[data] - reached:
            chosen.append(data)
            reached |= reach[data]
    for path in (CORPUS / name).glob("*"):
        path.unlink()
    for data in chosen:
        write(CORPUS / name, data)
    return len(chosen)


def _outcome(name: str, scratch: Path, code: int | None) -> str:
    log = (scratch / f"{name}.log").read_text(errors="replace")
    runs = re.search(r"number_of_executed_units: (\d+)", log)
    peak = re.search(r"peak_rss_mb: +(\d+)", log)
    numbers = f"{runs[1] if runs else '?':>10} runs {peak[1] if peak else '?':>6} MiB"
    return f"{name:18} {numbers}  {'sound' if code == 0 else f'BROKEN ({code}), see {scratch}'}"


def _scratch(folder: Path, chosen: list[str]) -> None:
    from .samples import samples

    by_target: dict[str, list[bytes]] = defaultdict(list)
    for name, data in samples():
        by_target[name].append(data)
    for name in chosen:
        (folder / name).mkdir(parents=True, exist_ok=True)
        (CORPUS / name).mkdir(parents=True, exist_ok=True)
        for data in (*by_target[name], b"\xff"):  # and what is nothing to most
            write(folder / name, data)


def _instrumented() -> dict[str, Target]:
    try:
        import atheris
    except ImportError:
        sys.exit("Atheris is missing: pip install -c constraints.txt -e '.[fuzz]'")
    quiet = redirect_stderr(io.StringIO())  # it names every module
    with quiet, atheris.instrument_imports(include=["secagg", "client_sdk"]):
        from .targets import TARGETS
    return TARGETS


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.decoders")
    parser.add_argument("--seconds", type=int, default=60, help="for all targets together")
    parser.add_argument("--target", nargs="+", default=[], help="these alone")
    parser.add_argument("--scratch", type=Path, default=Path("build/fuzz"))
    parser.add_argument("--keep", action="store_true", help="choose the tree's corpus anew")
    parser.add_argument("--list", action="store_true", help="name the targets")
    return parser.parse_args()


def broken(chosen: list[str], scratch: Path, seconds: int) -> Iterator[str]:
    """Run targets one after the other; yields those that broke their promise."""
    for name in chosen:
        share = max(1, seconds // len(chosen))
        process = multiprocessing.get_context("fork").Process(
            target=fuzz, args=(name, scratch, share)
        )
        process.start()
        process.join()
        print(_outcome(name, scratch, process.exitcode), flush=True)
        if process.exitcode:
            yield name


def main() -> int:
    """Run what the arguments ask for; 1 if a target broke its promise."""
    arguments = _arguments()
    logging.disable()
    targets = _instrumented()
    if arguments.list:
        print("\n".join(targets))
        return 0
    chosen = arguments.target or list(targets)
    scratch = arguments.scratch.resolve()
    _scratch(scratch, chosen)
    failed = list(broken(chosen, scratch, arguments.seconds)) if arguments.seconds else []
    if arguments.keep and not failed:
        for name in chosen:
            print(f"{name:18} {keep(name, targets[name], scratch):4} files", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
