"""``secagg serve``."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import click

CIPHER_SUITES = "ECDHE-RSA-AES128-GCM-SHA256"
"""The one suite of TLS 1.2 on offer needs an RSA key, which our certificates never have: what is
left is TLS 1.3."""


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
    os.environ["GRPC_SSL_CIPHER_SUITES"] = CIPHER_SUITES  # read when grpc is first imported
    from secagg.coordinator.server import configure_logging
    from secagg.coordinator.server import serve as run
    from secagg.coordinator.settings import load_settings

    settings = load_settings(config)
    configure_logging(settings)

    def announce(port: int) -> None:
        click.echo(f"serving on port {port}")
        if port_file is not None:
            temporary = port_file.with_suffix(".tmp")
            temporary.write_text(f"{port}\n")
            temporary.replace(port_file)

    asyncio.run(run(settings, announce))
