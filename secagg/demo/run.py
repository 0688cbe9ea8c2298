"""The demo from curtain to curtain."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from rich.console import Console

from secagg.config import Protection, SessionConfig
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
UNMASKED: Final = "seal_input"
"""Where both are killed if nothing is masked: there are no keys to share."""
MID_ROUND: Final = (4, "check_survivors")
"""Session round (training round 3) and step of the last silo at which the coordinator is killed:
all vectors are on its disk, nothing is summed up yet."""


def run(
    root: Path,
    data: str,
    data_dir: Path | None,
    protection: str,
    seed: int,
    console: Console,
    *,
    kill_coordinator: bool = False,
) -> dict[str, Any]:
    """Play the demo in ``root`` and return its JSON object.

    Args:
        root: an empty directory.
        data: data set.
        data_dir: where its files are; None to fetch them.
        protection: of the session.
        seed: of splits and training.
        console: where to say what happens.
        kill_coordinator: kill it in the middle of a round and start it again.

    Raises:
        ConfigError: the data cannot be had.
        DemoFailed: a process failed.
    """
    dataset = load(data, seed=seed, data_dir=data_dir)
    tapped, first, second = dataset.names[0], dataset.names[1], dataset.names[2]
    holds = {first: AFTER_KEYS, second: BEFORE_KEYS}
    if not Protection(protection).masks:
        holds = {silo: (number, UNMASKED) for silo, (number, _) in holds.items()}
    if kill_coordinator:
        holds[dataset.names[3]] = MID_ROUND
    enrol(root, dataset.names, protection)
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
        f"({protection}: {_opened_by(config, len(orders))})"
    )
    restarts = dataset.names[3] if kill_coordinator else ""
    play = Play(root, orders, tapped, config, console, restarts)
    play.run()
    measured = report(root, config, dataset, seed, tapped)
    measured["coordinator_restarts"] = play.restarts
    show(console, measured, tapped)
    return measured


def _opened_by(config: SessionConfig, silos: int) -> str:
    if config.protection.masks:
        return f"any {config.threshold_for(silos)} of {silos} can open a sum"
    return "every silo has the key"
