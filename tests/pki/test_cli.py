from __future__ import annotations

import json
import os
from datetime import UTC, datetime
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

import secagg.cli.pki
import secagg.cli.silo
from secagg.config import Policy, parse_toml
from secagg.errors import SecaggError
from secagg.pki.authority import Authority
from secagg.pki.enrolment import create_request
from secagg.pki.manifest import SignedManifest
from secagg.pki.names import Role

from .builders import CONSORTIUM

GROUPS = {"pki": secagg.cli.pki.pki, "silo": secagg.cli.silo.silo}
SILOS = ("north", "east", "south")
ROLES = {**dict.fromkeys(SILOS, "silo"), "hub": "coordinator", "ann": "admin"}


class Machine:
    """The commands as every member and the admin type them, in one temporary directory."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def run(self, *arguments: str | Path, answer: str | None = None) -> Result:
        group, *rest = (str(argument) for argument in arguments)
        return CliRunner().invoke(GROUPS[group], rest, input=answer)

    def ok(self, *arguments: str | Path, answer: str | None = None) -> str:
        result = self.run(*arguments, answer=answer)
        assert result.exit_code == 0, (result.output, result.exception)
        return result.output

    def refused(self, code: str, *arguments: str | Path) -> None:
        error = self.run(*arguments).exception
        assert isinstance(error, SecaggError)
        assert error.code == code

    def authority(self, *arguments: str | Path) -> tuple[str | Path, ...]:
        return ("pki", *arguments, "--dir", self.root / "authority")

    def request(self, name: str, *more: str) -> str:
        return self.ok(
            *("silo", "request", name, "--consortium", CONSORTIUM, "--role", ROLES[name]),
            *("--dir", self.root / name, "--out", self.root / f"{name}.request.json", *more),
        )

    def approve(self, name: str, *more: str) -> str:
        return self.ok(
            *self.authority("approve", self.root / f"{name}.request.json"),
            *("--out", self.root / f"{name}.bundle.json", *more),
        )

    def install(self, name: str, *more: str) -> str:
        bundle = self.root / f"{name}.bundle.json"
        return self.ok("silo", "install", bundle, "--dir", self.root / name, *more)

    def shown(self) -> dict[str, object]:
        value = json.loads(self.ok(*self.authority("show", "--json")))
        assert isinstance(value, dict)
        return value


def after(text: str, label: str) -> str:
    return next(line for line in text.splitlines() if line.startswith(label))[len(label) :].strip()


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    monkeypatch.chdir(tmp_path)
    machine = Machine(tmp_path)
    machine.ok(*machine.authority("init", "--consortium", CONSORTIUM))
    return machine


def enrol(machine: Machine, name: str) -> None:
    key = after(machine.request(name), "Key fingerprint:")
    approved = machine.approve(name, "--fingerprint", key)
    assert after(approved, "Key fingerprint:") == key
    address = () if ROLES[name] == "coordinator" else ("--coordinator", "hub.example.org:8443")
    anchor = after(approved, "Authority fingerprint:")
    assert after(machine.install(name, "--fingerprint", anchor, *address), "Auth")


def test_a_whole_consortium(machine: Machine) -> None:
    for name in ROLES:
        enrol(machine, name)
    shown = machine.shown()
    assert (shown["silos"], shown["has_coordinator"]) == (sorted(SILOS), True)
    assert shown["manifest_version"] == 5
    for name, role in ROLES.items():
        directory = machine.root / name
        own = json.loads(machine.ok("silo", "show", "--json", "--dir", directory))
        assert own["identity"] == f"secagg://{CONSORTIUM}/{role}/{name}"
        assert own["authority_fingerprint"] == shown["fingerprint"]
        assert (directory / "policy.toml").exists() == (role == "silo")
        assert (directory / "profile.toml").exists() == (role != "coordinator")
        text = machine.ok("silo", "show", "--dir", directory)
        assert "PRIVATE" not in text
        assert own["identity"] in text
    policy = (machine.root / "north" / "policy.toml").read_text()
    assert parse_toml(Policy, policy, "policy.toml").min_cohort == 3

    assert "Revoked silo south" in machine.ok(*machine.authority("revoke", "south"))
    shown = machine.shown()
    assert (shown["silos"], shown["manifest_version"]) == (["east", "north"], 6)
    text = machine.ok(*machine.authority("show"))
    assert text.count("revoked") == 1
    assert text.count("\nvalid") == 4

    manifest = machine.root / "authority" / "manifest.json"
    assert "version 6" in machine.ok("silo", "install", manifest, "--dir", machine.root / "hub")
    machine.ok("silo", "show", "--dir", machine.root / "hub")
    machine.ok("silo", "install", manifest, "--dir", machine.root / "south")
    machine.refused("manifest-not-member", "silo", "show", "--dir", machine.root / "south")


def test_expired_certificates_are_shown_as_such(tmp_path: Path) -> None:
    then = datetime(2020, 1, 1, tzinfo=UTC)
    authority = Authority.create(tmp_path / "authority", CONSORTIUM, now=then)
    made = create_request(tmp_path / "m", Role.SILO, "north", CONSORTIUM, os.urandom)
    authority.approve(made, now=then, days=1)
    machine = Machine(tmp_path)
    assert "\nexpired" in machine.ok(*machine.authority("show"))


def test_older_manifest_file(machine: Machine) -> None:
    enrol(machine, "north")
    manifest = machine.root / "authority" / "manifest.json"
    old = machine.root / "old.json"
    old.write_bytes(manifest.read_bytes())
    enrol(machine, "east")
    machine.ok("silo", "install", manifest, "--dir", machine.root / "north")
    machine.refused("manifest-older", "silo", "install", old, "--dir", machine.root / "north")


def test_renewal(machine: Machine) -> None:
    enrol(machine, "north")
    directory = machine.root / "north"
    (directory / "policy.toml").write_text("# mine\n")
    before = json.loads(machine.ok("silo", "show", "--json", "--dir", directory))
    machine.request("north", "--renew")
    machine.approve("north", "--days", "500")
    machine.install("north")
    own = json.loads(machine.ok("silo", "show", "--json", "--dir", directory))
    assert own["not_after"] > before["not_after"]
    assert own["manifest_version"] == before["manifest_version"]
    assert (directory / "policy.toml").read_text() == "# mine\n"


def test_default_names_of_files(machine: Machine) -> None:
    directory = machine.root / "m"
    machine.ok("silo", "request", "north", "--consortium", CONSORTIUM, "--dir", directory)
    machine.ok(*machine.authority("approve", "north.request.json"))
    output = machine.ok("silo", "install", "north.bundle.json", "--dir", directory)
    assert "No profile.toml yet" in output
    again = machine.ok(
        *("silo", "install", "north.bundle.json", "--dir", directory, "--coordinator", "hub:1")
    )
    assert "Wrote profile.toml" in again
    assert "No profile.toml" not in machine.ok(
        *("silo", "install", "north.bundle.json", "--dir", directory)
    )


def test_default_directories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(secagg.cli.pki, "user_data_path", lambda name: tmp_path / "data" / name)
    monkeypatch.setattr(secagg.cli.silo, "user_config_path", lambda name: tmp_path / "conf" / name)
    machine = Machine(tmp_path)
    machine.ok("pki", "init", "--consortium", CONSORTIUM)
    machine.ok("silo", "request", "north", "--consortium", CONSORTIUM)
    machine.ok("pki", "approve", "north.request.json")
    machine.ok("silo", "install", "north.bundle.json", "--coordinator", "hub:1")
    assert "silo/north" in machine.ok("silo", "show")
    assert "north" in machine.ok("pki", "show")
    assert (tmp_path / "data" / "secagg" / "authority" / "authority.key").exists()
    assert (tmp_path / "conf" / "secagg" / "profile.toml").exists()


def test_wrong_fingerprints(machine: Machine) -> None:
    machine.request("north")
    machine.refused(
        "request-fingerprint",
        *machine.authority("approve", "north.request.json", "--fingerprint", "00"),
    )
    assert machine.shown()["manifest_version"] == 1
    machine.approve("north")
    machine.refused(
        "authority-fingerprint",
        *("silo", "install", "north.bundle.json", "--dir", machine.root / "north"),
        *("--fingerprint", "00"),
    )


def test_a_person_is_asked(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    machine.request("north")
    monkeypatch.setattr(secagg.cli.pki, "is_terminal", lambda: True)
    approve = machine.authority("approve", "north.request.json")
    assert machine.run(*approve, answer="n\n").exit_code == 1
    assert not os.path.lexists("north.bundle.json")
    machine.ok(*approve, answer="y\n")
    install = ("silo", "install", "north.bundle.json", "--dir", machine.root / "north")
    assert machine.run(*install, answer="\n").exit_code == 1
    machine.ok(*install, answer="y\n")
    # The anchor is here now: nothing is left to compare.
    machine.ok(*install)


def test_refusals(machine: Machine) -> None:
    machine.refused("authority-exists", *machine.authority("init", "--consortium", CONSORTIUM))
    machine.refused("member-unknown", *machine.authority("revoke", "north"))
    machine.refused("member-unknown", *machine.authority("revoke", "ann", "--role", "admin"))
    machine.refused("name", "silo", "request", "No", "--consortium", "c", "--dir", "x")
    enrol(machine, "hub")
    install = ("silo", "install", "hub.bundle.json", "--dir", machine.root / "hub")
    assert machine.run(*install, "--coordinator", "hub:1").exit_code == 2
    machine.request("north")
    machine.approve("north")
    machine.refused(
        "coordinator-address",
        *("silo", "install", "north.bundle.json", "--dir", "north", "--coordinator", "hub"),
    )
    Path("x.json").write_text("{}")
    machine.refused("bundle-malformed", "silo", "install", "x.json", "--dir", "north")
    machine.refused("request-malformed", *machine.authority("approve", "x.json"))
    assert machine.run("silo", "request", "n", "--consortium", "c", "--role", "SILO").exit_code == 2


def test_manifest_of_the_authority_is_what_members_can_install(machine: Machine) -> None:
    data = (machine.root / "authority" / "manifest.json").read_bytes()
    signed = SignedManifest.from_json(data)
    assert signed.verify((machine.root / "authority" / "authority.pem").read_bytes())
