"""The demo from curtain to curtain."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from rich.console import Console

from secagg.demo.data import load
from secagg.demo.play import Play
from secagg.demo.report import report, show
from secagg.demo.silo import Orders
from secagg.demo.stage import enrol, session_config

AFTER_KEYS: Final = (3, "mask_input")
"""Session round (training round 2) and step at which the first victim is killed: its keys are
shared, so its pair masks must be undone."""
BEFORE_KEYS: Final = (5, "share_keys")
"""Session round (training round 4) and step at which the second victim is killed: its keys were
advertised and never shared."""


def run(
    root: Path, data: str, data_dir: Path | None, protection: str, seed: int, console: Console
) -> dict[str, Any]:
    """Play the demo in ``root`` and return its JSON object.

    Raises:
        ConfigError: the data cannot be had.
        DemoFailed: a process failed.
    """
    dataset = load(data, seed=seed, data_dir=data_dir)
    tapped, first, second = dataset.names[0], dataset.names[1], dataset.names[2]
    holds = {first: AFTER_KEYS, second: BEFORE_KEYS}
    enrol(root, dataset.names)
    config = session_config(dataset.names, protection)
    orders = [
        Orders(
            str(root),
            name,
            data,
            str(data_dir.resolve()) if data_dir else "",
            seed,
            holds.get(name, (0, "")),
        )
        for name in dataset.names
    ]
    console.print(
        f"[bold]{len(orders)} silos[/] train on {data}; the coordinator adds what it cannot read "
        f"({protection}: any {config.threshold_for(len(orders))} of {len(orders)} can open a sum)"
    )
    Play(root, orders, tapped, config, console).run()
    measured = report(root, config, dataset, seed, tapped)
    show(console, measured, tapped)
    return measured
