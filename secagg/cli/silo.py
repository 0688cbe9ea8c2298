"""``secagg silo``: how a member makes its keys, installs its bundle and sees what it holds.

Silos, the coordinator and admins enrol alike, so they share these commands.
"""

from __future__ import annotations

import json
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

import click
from platformdirs import user_config_path

from secagg.cli.pki import ROLES, confirm
from secagg.pki.certificates import certificate_fingerprint
from secagg.pki.credentials import AUTHORITY, installed_role, load_credentials, save_manifest
from secagg.pki.documents import format_of
from secagg.pki.enrolment import Bundle, create_request, install_bundle, renewal_request
from secagg.pki.files import write_public
from secagg.pki.manifest import FORMAT as MANIFEST_FORMAT
from secagg.pki.manifest import SignedManifest
from secagg.pki.names import Role, load_certificate, serial_hex
from secagg.pki.profile import PROFILE, check_address, write_policy, write_profile

_DIR: Final = click.option(
    "--dir",
    "directory",
    type=click.Path(path_type=Path),
    default=lambda: user_config_path("secagg"),
    help="The member's private directory.  [default: the user's configuration directory]",
)


@click.group()
def silo() -> None:
    """Enrol this machine with a consortium and look at its credentials."""


@silo.command()
@click.argument("name")
@click.option("--consortium", required=True, help="As its admin spells it.")
@click.option("--role", type=ROLES, default=Role.SILO.value, show_default=True)
@click.option("--renew", is_flag=True, help="Keep the keys that are here; ask for a certificate.")
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="The request.")
@_DIR
def request(
    name: str, consortium: str, role: str, out: Path | None, directory: Path, *, renew: bool
) -> None:
    """Make this member's keys, and the request for the admin. The keys stay here."""
    if renew:
        made = renewal_request(directory, Role(role), name, consortium)
    else:
        made = create_request(directory, Role(role), name, consortium, os.urandom)
    path = out or Path(f"{name}.request.json")
    write_public(path, made.to_json())
    click.echo(f"Keys: {directory}")
    click.echo(f"Request: {path}")
    click.echo(f"Key fingerprint: {made.fingerprint}")
    click.echo("Send the request to the admin, who will ask you for this fingerprint.")


@silo.command()
@click.argument("bundle_file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--coordinator", metavar="HOST:PORT", help="Where it listens, for profile.toml.")
@click.option("--fingerprint", help="The authority's, as the admin read it out; must be equal.")
@_DIR
def install(
    bundle_file: Path, coordinator: str | None, fingerprint: str | None, directory: Path
) -> None:
    """Install the admin's bundle, or a newer manifest.json of the authority."""
    data = bundle_file.read_bytes()
    if format_of(data) == MANIFEST_FORMAT:
        newest = save_manifest(directory, SignedManifest.from_json(data))
        click.echo(f"Manifest version {newest.manifest.version} in {directory}")
        return
    bundle = Bundle.from_json(data)
    if coordinator is not None:
        if bundle.role is Role.COORDINATOR:
            raise click.UsageError("--coordinator is for silos and admins.")
        check_address(coordinator)
    click.echo(f"Bundle for {bundle.role} {bundle.name} of consortium {bundle.consortium}")
    click.echo(f"Authority fingerprint: {certificate_fingerprint(bundle.authority_pem)}")
    if fingerprint is None and not (directory / AUTHORITY).exists():
        confirm("Did the admin read out this fingerprint?")
    credentials = install_bundle(directory, bundle, fingerprint=fingerprint, now=datetime.now(UTC))
    click.echo(f"Installed in {directory}, valid until {credentials.not_after:%Y-%m-%d}")
    _write_settings(directory, bundle.role, coordinator)


@silo.command()
@click.option("--json", "as_json", is_flag=True, help="For programs.")
@_DIR
def show(directory: Path, *, as_json: bool) -> None:
    """Check everything in the directory and show it; no key is ever shown."""
    now = datetime.now(UTC)
    credentials = load_credentials(directory, now=now, role=installed_role(directory))
    manifest = credentials.manifest.manifest
    value = {
        "identity": credentials.identity.uri,
        "serial": serial_hex(load_certificate(credentials.certificate_pem)),
        "not_after": credentials.not_after.isoformat(),
        "days_left": credentials.days_left(now),
        "authority_fingerprint": certificate_fingerprint(credentials.authority_pem),
        "manifest_version": manifest.version,
        "silos": sorted(manifest.silos),
        "directory": str(directory),
    }
    if as_json:
        click.echo(json.dumps(value, indent=2))
        return
    for key, shown in value.items():
        text = ", ".join(shown) if isinstance(shown, list) else str(shown)
        click.echo(f"{key.replace('_', ' ')}: {text}")


def _write_settings(directory: Path, role: Role, coordinator: str | None) -> None:
    if role is Role.SILO and write_policy(directory):
        click.echo("Wrote policy.toml: read it, its numbers are this silo's own floors.")
    if role is Role.COORDINATOR or (directory / PROFILE).exists():
        return
    if coordinator is None:
        click.echo("No profile.toml yet: install again with --coordinator HOST:PORT.")
    else:
        write_profile(directory, coordinator)
        click.echo("Wrote profile.toml.")
