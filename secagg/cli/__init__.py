"""The command line: thin commands over the packages.

Exit status 0 when done, 1 with ``[code] what was observed. what to do`` on standard error when not,
2 for a wrong call; 74 where the disk failed, 75 where another process holds the state directory, 76
where what lies there is damaged.
"""

from __future__ import annotations

import sys

import click

from secagg import __version__
from secagg.cli import bench, demo, doctor, pki, serve, session, silo
from secagg.errors import EXIT_CODES, SecaggError


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="secagg")
def commands() -> None:
    """Secure aggregation for federated learning: a coordinator sums what it cannot read."""


for _command in (
    bench.bench,
    demo.demo,
    doctor.doctor,
    pki.pki,
    serve.serve,
    session.session,
    silo.silo,
):
    commands.add_command(_command)


def main() -> None:
    """Run a command; turn a refusal into its message."""
    try:
        commands()
    except SecaggError as error:
        click.echo(str(error), err=True)
        sys.exit(EXIT_CODES.get(type(error), 1))
