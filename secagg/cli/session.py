"""``secagg session``: what an admin does at a running coordinator."""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from google.protobuf.json_format import MessageToDict
from rich.console import Console
from rich.table import Table

from secagg.config import MAX_COHORT, Protection, SessionConfig, parse_table
from secagg.errors import ConfigError
from secagg.pki.names import Role
from secagg.wire._pb import service_pb2 as api
from secagg.wire.session import config_to_wire

if TYPE_CHECKING:
    from client_sdk.channel import Channel

_profile = click.option(
    "--profile",
    type=click.Path(path_type=Path, file_okay=False),
    help="The admin's profile directory; else SECAGG_PROFILE, else the default place.",
)
_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


@contextmanager
def _admin(profile: Path | None) -> Iterator[tuple[Channel, str]]:
    from client_sdk.channel import Channel
    from client_sdk.profile import load_profile

    loaded = load_profile(profile, role=Role.ADMIN)
    channel = Channel(loaded, "Admin")
    try:
        yield channel, loaded.credentials.identity.consortium
    finally:
        channel.close()


@click.group()
def session() -> None:
    """Create, list, show and abort sessions (needs an admin's certificate)."""


@session.command()
@click.argument("file", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@_profile
def create(file: Path, profile: Path | None) -> None:
    """Create a session from a TOML FILE.

    ``consortium`` may be left out: it is the admin's. ``silos`` may be left out: all of the
    manifest then take part.
    """
    with _admin(profile) as (channel, consortium):
        config = read_session(file, consortium)
        request = api.CreateSessionRequest(config=config, key=secrets.token_bytes(16))
        reply = channel.call("CreateSession", request, api.CreateSessionReply)
    click.echo(f"created session {config.name} ({reply.session_id.hex()[:16]})")


def read_session(file: Path, consortium: str) -> api.SessionConfig:
    """Read a session's file, checked as far as it can be without the manifest.

    Raises:
        ConfigError: it cannot be right.
    """
    import tomllib

    try:
        table = tomllib.loads(file.read_text())
    except (OSError, ValueError, RecursionError) as error:  # no text, no TOML, endless nesting
        raise ConfigError("config-file", f"{file} cannot be read as TOML: {error}.") from None
    table.setdefault("consortium", consortium)
    everybody = "silos" not in table
    if everybody:  # enough stand-ins for the other checks; the coordinator fills in the manifest's
        count = table.get("min_cohort", 3)
        enough = min(count, MAX_COHORT) if isinstance(count, int) else 3
        table["silos"] = [f"s{i:04}" for i in range(enough)]
    message = config_to_wire(parse_table(SessionConfig, table, str(file)))
    if everybody:
        del message.silos[:]
    return message


@session.command("list")
@_profile
@_json
def list_sessions(profile: Path | None, as_json: bool) -> None:
    """List the coordinator's sessions."""
    with _admin(profile) as (channel, _):
        reply = channel.call("ListSessions", api.ListSessionsRequest(), api.ListSessionsReply)
    if as_json:
        click.echo(json.dumps([_plain(summary) for summary in reply.sessions], indent=2))
        return
    table = Table("session", "state", "protection", "silos", "results")
    for s in reply.sessions:
        table.add_row(s.name, s.state, s.protection, str(s.silos), str(s.results))
    Console().print(table)


@session.command()
@click.argument("name")
@_profile
@_json
def show(name: str, profile: Path | None, as_json: bool) -> None:
    """Show a session: parameters, silos, current round, results."""
    with _admin(profile) as (channel, _):
        reply = channel.call("ShowSession", api.ShowSessionRequest(name=name), api.ShowSessionReply)
    if as_json:
        click.echo(json.dumps(_plain(reply), indent=2))
        return
    config = reply.config
    console = Console()
    protection = Protection(config.protection)
    how = [f"suite {config.suite}"] if protection.seals else []
    how += [f"masks {config.mask_prg}"] if protection.masks else []
    console.print(
        f"[bold]{name}[/] is {reply.summary.state}: protection {protection}, "
        f"n_c = {config.colluders}, threshold {config.threshold}, "
        f"at least {config.min_cohort} of {len(config.silos)} silos, {', '.join(how)}"
    )
    if not protection.masks:
        console.print(
            "[bold]Updates are encrypted and not masked: any silo that works with the coordinator "
            "can read every update.[/] Under ckks+masked, the two together read the sums alone."
        )
    if reply.phase:
        console.print(f"round {reply.round}, attempt {reply.attempt}: {reply.phase}")
    if reply.HasField("last_abort"):
        last = reply.last_abort
        console.print(
            f"last abort: round {last.round}, attempt {last.attempt}, {last.phase}: "
            f"{last.have} of {last.need} needed. {last.because}"
        )
    silos = Table("silo", "state", "last call")
    for silo in reply.silos:
        age = "never" if silo.last_call_age < 0 else f"{silo.last_call_age:.0f} s ago"
        silos.add_row(silo.name, silo.state, age)
    console.print(silos)
    results = Table("round", "task", "survivors", "dropouts")
    for result in reply.results:
        dropouts = sorted(set(result.cohort) - set(result.survivors))
        results.add_row(
            str(result.round), result.task, " ".join(result.survivors), " ".join(dropouts)
        )
    console.print(results)


@session.command()
@click.argument("name")
@_profile
def abort(name: str, profile: Path | None) -> None:
    """End a session: its silos are told, and nothing more is summed."""
    with _admin(profile) as (channel, _):
        channel.call("AbortSession", api.AbortSessionRequest(name=name), api.Ack)
    click.echo(f"aborted session {name}")


def _plain(message: Any) -> dict[str, Any]:
    return MessageToDict(
        message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )
