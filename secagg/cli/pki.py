"""``secagg pki``: what the admin does on the machine that keeps the authority's key."""

from __future__ import annotations

import json
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

import click
from platformdirs import user_data_path

from secagg.pki.authority import LEAF_DAYS, Authority
from secagg.pki.enrolment import Request
from secagg.pki.files import write_public
from secagg.pki.issued import Issued
from secagg.pki.keys import check_fingerprint
from secagg.pki.names import Role

# Plain strings: click spells an enum's members by their upper-case names.
ROLES: Final = click.Choice([role.value for role in Role])
_DIR: Final = click.option(
    "--dir",
    "directory",
    type=click.Path(path_type=Path),
    default=lambda: user_data_path("secagg") / "authority",
    help="The authority's directory.  [default: the user's data directory]",
)


@click.group()
def pki() -> None:
    """Found a consortium, admit its members and revoke them."""


@pki.command()
@click.option("--consortium", required=True, help="Its name: a DNS label.")
@_DIR
def init(consortium: str, directory: Path) -> None:
    """Make the consortium's authority. Keep its directory offline and backed up."""
    authority = Authority.create(directory, consortium, now=datetime.now(UTC))
    click.echo(f"Authority of {consortium} in {directory}")
    click.echo(f"Authority fingerprint: {authority.fingerprint}")


@pki.command()
@click.argument("request_file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="The bundle.")
@click.option("--days", type=int, default=LEAF_DAYS, show_default=True, help="Validity.")
@click.option("--fingerprint", help="The request's, as its maker read it out; must be equal.")
@_DIR
def approve(
    request_file: Path, out: Path | None, days: int, fingerprint: str | None, directory: Path
) -> None:
    """Certify the maker of a request, or renew its certificate, and write its bundle."""
    request = Request.from_json(request_file.read_bytes())
    click.echo(f"Request of {request.role} {request.name} for consortium {request.consortium}")
    click.echo(f"Key fingerprint: {request.fingerprint}")
    if fingerprint is None:
        confirm("Did its maker read out this fingerprint?")
    else:
        check_fingerprint(request.fingerprint, fingerprint, "request-fingerprint")
    authority = Authority.load(directory)
    bundle = authority.approve(request, now=datetime.now(UTC), days=days)
    path = out or Path(f"{request.name}.bundle.json")
    write_public(path, bundle.to_json())
    click.echo(f"Bundle: {path} (manifest version {bundle.manifest.manifest.version})")
    click.echo(f"Authority fingerprint: {authority.fingerprint}")


@pki.command()
@click.argument("name")
@click.option("--role", type=ROLES, default=Role.SILO.value, show_default=True)
@_DIR
def revoke(name: str, role: str, directory: Path) -> None:
    """Take a member out of the consortium and revoke all its certificates."""
    manifest = Authority.load(directory).revoke(Role(role), name, now=datetime.now(UTC))
    click.echo(f"Revoked {role} {name}; manifest version {manifest.version}")
    click.echo(
        "It takes effect where the new manifest is installed: copy "
        f"{directory / 'manifest.json'} to the coordinator and run `secagg silo install` on it."
    )


@pki.command()
@click.option("--json", "as_json", is_flag=True, help="For programs.")
@_DIR
def show(directory: Path, *, as_json: bool) -> None:
    """Show the authority, its manifest and every certificate."""
    authority, now = Authority.load(directory), datetime.now(UTC)
    manifest = authority.manifest
    certificates = [
        {
            "role": entry.role,
            "name": entry.name,
            "serial": entry.serial,
            "not_after": entry.not_after.isoformat(),
            "state": _state(entry, manifest.revoked, now),
        }
        for entry in authority.issued
    ]
    if as_json:
        value = {
            "consortium": authority.consortium,
            "fingerprint": authority.fingerprint,
            "manifest_version": manifest.version,
            "silos": sorted(manifest.silos),
            "has_coordinator": manifest.coordinator is not None,
            "certificates": certificates,
        }
        click.echo(json.dumps(value, indent=2))
        return
    click.echo(f"Consortium {authority.consortium}, manifest version {manifest.version}")
    click.echo(f"Authority fingerprint: {authority.fingerprint}")
    for row in certificates:
        click.echo(
            f"{row['state']:<13} {row['role']:<11} {row['name']}  "
            f"until {row['not_after']}  serial {row['serial']}"
        )


def confirm(question: str) -> None:
    """Ask a person to compare a fingerprint; a script passes --fingerprint instead.

    Raises:
        click.Abort: the person did not say yes.
    """
    if is_terminal():
        click.confirm(question, abort=True)


def is_terminal() -> bool:
    """Whether somebody can answer."""
    return sys.stdin.isatty()


def _state(entry: Issued, revoked: tuple[str, ...], now: datetime) -> str:
    if entry.serial in revoked:
        return "revoked"
    if now > entry.not_after:
        return "expired"
    return "not yet valid" if now < entry.not_before else "valid"
