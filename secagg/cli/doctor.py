"""``secagg doctor``: what a silo's operator runs before calling anybody."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import click


@click.command()
@click.option(
    "--profile",
    type=click.Path(path_type=Path, file_okay=False),
    help="The profile directory; else SECAGG_PROFILE, else the default place.",
)
@click.option("--session", help="Also check that this session can be joined.")
def doctor(profile: Path | None, session: str | None) -> None:
    """Check this silo's files, certificate and clock; with --session also its ledger and the
    way to the coordinator."""
    from client_sdk.profile import load_profile

    loaded = load_profile(profile)
    credentials = loaded.credentials
    now = datetime.now(UTC)
    days = credentials.days_left(now)
    click.echo(f"ok  {credentials.identity.uri}, certificate good for {days} days")
    if credentials.ends_soon(now):
        click.echo(f"!!  {credentials.ending(now)}")
    click.echo(f"ok  manifest version {credentials.manifest.manifest.version}, policy readable")
    if session is None:
        click.echo("--  coordinator not asked: name a session with --session")
        return
    from client_sdk.session import join

    with join(session, profile=loaded):
        click.echo(f"ok  {loaded.coordinator} answers; session {session} is within the policy")
        click.echo(f"ok  ledger in {loaded.state} is sound")
