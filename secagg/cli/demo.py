"""``secagg demo``."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import click
from rich.console import Console

from secagg.ckks.engine import require
from secagg.config import Protection
from secagg.errors import ConfigError


@click.command()
@click.option(
    "--data",
    type=click.Choice(["breast-cancer", "heart"]),
    default="breast-cancer",
    show_default=True,
    help="breast-cancer ships with scikit-learn; heart is UCI's, one real hospital a silo.",
)
@click.option(
    "--data-dir",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="Where processed.{cleveland,hungarian,switzerland,va}.data are; else fetched from UCI.",
)
@click.option(
    "--protection",
    type=click.Choice([str(protection) for protection in Protection]),
    default=str(Protection.MASKED),
    show_default=True,
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
@click.option(
    "--kill-coordinator",
    is_flag=True,
    help="Kill the coordinator, too, in the middle of a round, and start it again.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object and nothing else.")
def demo(
    data: str,
    data_dir: Path | None,
    protection: str,
    seed: int,
    kill_coordinator: bool,
    as_json: bool,
) -> None:
    """Four silos and a coordinator as processes of their own; two silos are killed on the way.

    One is killed after it shared its keys, one before, in different rounds; both come back. At the
    end: accuracy of federated, local-only and pooled training, and what the coordinator saw.
    """
    try:
        import torch

        from secagg.demo.run import run
    except ImportError:
        raise ConfigError(
            "extra-missing", "The demo needs torch and scikit-learn.", "pip install 'secagg[demo]'"
        ) from None

    torch.set_num_threads(1)
    if Protection(protection).seals:
        require()
    console = Console(stderr=as_json, quiet=as_json)
    with tempfile.TemporaryDirectory(prefix="secagg-demo-") as root:
        measured = run(
            Path(root), data, data_dir, protection, seed, console, kill_coordinator=kill_coordinator
        )
    if as_json:
        click.echo(json.dumps(measured))
