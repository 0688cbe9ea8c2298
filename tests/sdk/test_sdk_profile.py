"""Where a profile is found, what is said when it cannot be used, and what a terminal shows."""

from __future__ import annotations

import io
import logging
from pathlib import Path

import numpy as np
import platformdirs
import pytest
from click.testing import CliRunner
from rich.console import Console

import client_sdk
from client_sdk import profile as module
from client_sdk import progress
from client_sdk.session import Session
from secagg.cli.doctor import doctor
from secagg.errors import ConfigError, CredentialError, NotFound
from secagg.pki.names import Role

from .federation import Federation, make_sum, refused


def test_a_profile_is_found_by_argument_variable_or_default_place(
    federation: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b, c = (federation.silo(name) for name in "abc")
    monkeypatch.setattr(
        platformdirs, "user_config_path", lambda app: c if app == "secagg" else None
    )
    monkeypatch.setattr(module.platformdirs, "user_config_path", platformdirs.user_config_path)
    monkeypatch.delenv("SECAGG_PROFILE", raising=False)
    assert client_sdk.load_profile().credentials.identity.name == "c"
    monkeypatch.setenv("SECAGG_PROFILE", str(b))
    assert client_sdk.load_profile().credentials.identity.name == "b"
    assert client_sdk.load_profile(str(a)).credentials.identity.name == "a"
    name = federation.create(make_sum())
    with client_sdk.join(name) as session:
        assert session.silo == "b"
        assert (b / "state" / "lock").exists()
    with client_sdk.join(name, profile=client_sdk.load_profile(a)) as session:
        assert session.silo == "a"


@pytest.mark.parametrize("file", ["profile.toml", "policy.toml"])
def test_a_missing_file_is_named(federation: Federation, file: str) -> None:
    place = federation.silo("a")
    (place / file).unlink()
    with refused(ConfigError, "profile-file") as caught:
        client_sdk.join("study", profile=place)
    assert file in str(caught.value)
    (place / file).write_bytes(b"\xff")
    with refused(ConfigError, "profile-file") as caught:
        client_sdk.join("study", profile=place)
    assert "UTF-8" in str(caught.value)


@pytest.mark.parametrize(
    ("file", "old", "new", "code"),
    [
        ("profile.toml", "state =", "stat =", "config-file"),
        ("profile.toml", '"127.0.0.1', '"nobody at', "coordinator-address"),
        ("policy.toml", "colluders = 1", "", "config-file"),
        ("policy.toml", "colluders = 1", "colluders = 0", "policy"),
        ("policy.toml", "min_cohort = 3", "min_kohort = 3", "config-file"),
        ("policy.toml", "min_cohort = 3", "min_cohort = true", "config-file"),
    ],
)
def test_a_file_that_cannot_be_right_is_named(
    federation: Federation, file: str, old: str, new: str, code: str
) -> None:
    place = federation.silo("a")
    text = (place / file).read_text()
    assert old in text
    (place / file).write_text(text.replace(old, new))
    with refused(ConfigError, code):
        client_sdk.join("study", profile=place)


def test_an_admins_profile_is_no_silos(federation: Federation) -> None:
    with refused(CredentialError, "certificate-role"):
        client_sdk.join("study", profile=federation.consortium.root / "admin")
    admin = client_sdk.load_profile(federation.consortium.root / "admin", role=Role.ADMIN)
    with refused(ConfigError, "profile-role"):
        client_sdk.join("study", profile=admin)


def test_keys_that_others_may_read_are_refused(federation: Federation) -> None:
    place = federation.silo("a")
    (place / "identity.key").chmod(0o644)
    with refused(CredentialError, "file-permissions"):
        client_sdk.join("study", profile=place)


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_is_one_line_on_a_terminal_and_silence_elsewhere(
    federation: Federation,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    terminal: bool,
) -> None:
    written = io.StringIO()

    def console(*, stderr: bool) -> Console:
        assert stderr
        return Console(file=written, force_terminal=terminal, width=200)

    monkeypatch.setattr(progress, "Console", console)
    caplog.set_level(logging.INFO, "client_sdk")
    name = federation.create(make_sum(rounds=2))

    def program(session: Session) -> None:
        for _ in range(2):
            session.sum({"x": np.ones(1)})

    federation.play(name, program)
    text = written.getvalue()
    phases = ["ready", "advertise_keys", "share_keys", "masked_input", "consistency", "unmasking"]
    if terminal:
        assert f"{name} statistics 1" in text
        assert f"{name} statistics 2" in text
        assert "\x1b[2K" in text  # the line is taken back
        assert "\x1b[?25h" in text
    else:
        assert text == ""
        assert capfd.readouterr() == ("", "")
    said = [record.getMessage() for record in caplog.records if record.name == "client_sdk"]
    for number in (1, 2):
        for phase in phases:
            assert sum(f"{name} statistics {number}: {phase}" in line for line in said) == 4


def test_the_status_line_goes_with_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.StringIO()
    monkeypatch.setattr(
        progress, "Console", lambda **_: Console(file=written, force_terminal=True, width=80)
    )

    def interrupted() -> None:
        with progress.Progress("study") as line:
            line.say("unmasking")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    text = written.getvalue()
    assert "\x1b[?25l" in text  # the cursor was hidden
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")  # and is shown again


def test_a_profile_is_where_it_was_read(federation: Federation) -> None:
    place = federation.silo("a")
    profile = client_sdk.load_profile(place)
    assert profile.directory == place
    assert profile.state == place / "state"
    assert isinstance(profile.state, Path)


def test_the_doctor_checks_a_silo_and_its_way_to_the_session(federation: Federation) -> None:
    place, name = federation.silo("a"), federation.create(make_sum())
    alone = CliRunner().invoke(doctor, ["--profile", str(place)], catch_exceptions=False)
    assert alone.exit_code == 0
    assert "secagg://hospitals/silo/a" in alone.output
    assert not (place / "state").exists()
    command = ["--profile", str(place), "--session", name]
    asked = CliRunner().invoke(doctor, command, catch_exceptions=False)
    assert asked.exit_code == 0
    assert "within the policy" in asked.output
    client_sdk.join(name, profile=place).close()  # it holds no lock
    with refused(NotFound, "session-unknown"):
        CliRunner().invoke(
            doctor, ["--profile", str(place), "--session", "nowhere"], catch_exceptions=False
        )
