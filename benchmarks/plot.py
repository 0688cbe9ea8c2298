"""Draw the cost of a round against d and against n from the JSON of ``secagg bench --output``.

    python -m benchmarks.plot results.json rounds.svg

Lines are rounds, dashes their floors: both axes are logarithmic, so a slope of one is linear cost.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from secagg.cli.measured import Measured


@dataclass(frozen=True)
class Round:
    """One measured round."""

    n: int
    d: int
    seconds: float
    floor_seconds: float


def rounds(now: Measured) -> list[Round]:
    """The rounds of a run.

    Raises:
        ValueError: there is none.
    """
    found = [
        Round(int(str(one.params["n"])), int(str(one.params["d"])), one.seconds, one.floor_seconds)
        for one in now.results
        if one.group == "round" and one.floor_seconds is not None
    ]
    if not found:
        raise ValueError("no round was measured")
    return found


def draw(now: Measured, file: Path) -> None:
    """Write the figure; its suffix says in which format."""
    found = rounds(now)
    figure, (by_d, by_n) = plt.subplots(1, 2, figsize=(10, 4.2), sharey=True, layout="constrained")
    _lines(by_d, found, lambda one: one.d, lambda one: one.n, "{:,} silos")
    _lines(by_n, found, lambda one: one.n, lambda one: one.d, "{:,} parameters")
    by_d.set(xlabel="parameters d", ylabel="seconds, all roles on one core")
    by_n.set(xlabel="silos n")
    by_n.set_xticks(
        sorted({one.n for one in found}), sorted({str(one.n) for one in found}, key=int)
    )
    by_n.minorticks_off()
    figure.suptitle(
        f"A round in memory (dashed: its keystreams and signatures alone) — {now.machine.path}"
    )
    figure.savefig(file, dpi=150)
    plt.close(figure)


def _lines(
    axes: Axes,
    found: Iterable[Round],
    along: Callable[[Round], int],
    by: Callable[[Round], int],
    words: str,
) -> None:
    axes.set(xscale="log", yscale="log")
    axes.grid(visible=True, alpha=0.3)
    for value in sorted({by(one) for one in found}):
        line = sorted((one for one in found if by(one) == value), key=along)
        at = [along(one) for one in line]
        drawn = axes.plot(at, [one.seconds for one in line], "o-", label=words.format(value))
        floor = [one.floor_seconds for one in line]
        axes.plot(at, floor, ".--", color=drawn[0].get_color(), alpha=0.7)
    axes.legend()


if __name__ == "__main__":
    source, target = sys.argv[1:]
    draw(Measured.from_json(Path(source).read_text(), source), Path(target))
