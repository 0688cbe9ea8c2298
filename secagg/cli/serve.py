"""``secagg serve``."""

from __future__ import annotations

from pathlib import Path

import click

from secagg.coordinator.launch import launch


@click.command()
@click.option(
    "--config",
    type=click.Path(path_type=Path, dir_okay=False),
    required=True,
    help="coordinator.toml: listen, credentials, state.",
)
@click.option(
    "--port-file",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Write the bound port here once calls are served.",
)
def serve(config: Path, port_file: Path | None) -> None:
    """Run the coordinator until SIGTERM."""
    launch(config, port_file)
