"""Write the README's table from the JSON of ``secagg bench --output``, between two markers.

    python -m benchmarks.table results.json [README.md]

A row for every result with a headline, in the order in which they ran. Without a second argument
the table is printed.
"""

from __future__ import annotations

import sys
from pathlib import Path

from secagg.cli.measured import Measured, Result, bytes_text, describe, figures

START, END = "<!-- bench:start -->", "<!-- bench:end -->"
HEAD = "| what | time | per element | beside its floor | memory above its inputs |"


def markdown(now: Measured) -> str:
    """The table, and under it where it was measured.

    Raises:
        ValueError: no result has a headline.
    """
    rows = [row(one) for one in now.results if one.headline]
    if not rows:
        raise ValueError("no result has a headline: was a group left out?")
    facts = describe(now.machine)
    where = f"{facts['cpu']}, {facts['cores']} cores; path {now.machine.path}; {facts['versions']}."
    day = now.datetime[:10]
    return "\n".join([HEAD, "|---|---|---|---|---|", *rows, "", f"{day}, {where}"])


def row(one: Result) -> str:
    """A result's row."""
    time, element, ratio = figures(one)
    beside = f"{ratio} {one.floor}" if ratio else ""
    if one.peer and one.speedup:
        beside += f"{'; ' if beside else ''}{one.speedup:.3g}× faster than {one.peer}"
    return f"| {one.headline} | {time} | {element} | {beside} | {bytes_text(one.peak_bytes)} |"


def insert(text: str, made: str) -> str:
    """Put a table between the markers of a document.

    Raises:
        ValueError: it does not have each marker once, in order.
    """
    if text.count(START) != 1 or text.count(END) != 1 or text.index(START) > text.index(END):
        raise ValueError(f"the document needs one {START} and, after it, one {END}")
    before, rest = text.split(START)
    return f"{before}{START}\n{made}\n{END}{rest.split(END)[1]}"


def main(source: str, target: str | None = None) -> None:
    """Print the table, or write it into a document."""
    made = markdown(Measured.from_json(Path(source).read_text(), source))
    if target is None:
        print(made)
        return
    document = Path(target)
    document.write_text(insert(document.read_text(), made))


if __name__ == "__main__":
    main(*sys.argv[1:])
