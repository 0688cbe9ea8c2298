"""What the coordinator follows on disk: manifest, certificate, settings."""

from __future__ import annotations

import json
import os
import tomllib
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import structlog
from structlog.testing import capture_logs

from secagg.coordinator.limits import Limits
from secagg.coordinator.manifests import Manifests
from secagg.coordinator.settings import Settings, load_settings
from secagg.coordinator.tls import ServerCertificate
from secagg.errors import ConfigError
from secagg.pki.names import Role

from .serving import Consortium


@pytest.fixture(autouse=True)
def _plain_logs() -> Iterator[None]:
    structlog.reset_defaults()
    yield
    structlog.reset_defaults()


@pytest.fixture
def consortium(tmp_path: Path) -> Consortium:
    return Consortium(tmp_path)


@pytest.fixture
def home(consortium: Consortium) -> Path:
    return consortium.path(Role.COORDINATOR, "main")


def manifests(consortium: Consortium) -> Manifests:
    return Manifests(consortium.credentials(Role.COORDINATOR, "main"))


def events(logs: list[Any]) -> list[tuple[str, Any]]:
    return [(log["event"], log.get("reason", log.get("code"))) for log in logs]


# Manifests.


def test_a_newer_manifest_is_taken_up(consortium: Consortium, home: Path) -> None:
    follow = manifests(consortium)
    assert set(follow().silos) == set("abcd")
    version = follow().version
    consortium.authority.revoke(Role.SILO, "d", now=consortium.now)
    assert follow().version == version
    (home / "manifest.json").write_bytes(consortium.authority.signed_manifest.to_json())
    assert set(follow().silos) == set("abc")
    assert follow().version == version + 1
    assert follow.signed == consortium.authority.signed_manifest


def test_an_unchanged_file_is_read_once(
    consortium: Consortium, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    follow = manifests(consortium)
    reads: list[Path] = []
    read = Path.read_bytes

    def counted(path: Path) -> bytes:
        reads.append(path)
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", counted)
    for _ in range(5):
        follow()
    assert reads == []
    os.utime(home / "manifest.json", ns=(1, 1))
    for _ in range(5):
        follow()
    assert reads == [home / "manifest.json"]


def forged(good: bytes) -> bytes:
    table = json.loads(good)
    table["version"] += 1
    table["silos"].pop("a", None)
    return json.dumps(table).encode()


def test_refused_manifests(consortium: Consortium, home: Path, tmp_path: Path) -> None:
    file = home / "manifest.json"
    old = file.read_bytes()
    consortium.authority.revoke(Role.SILO, "d", now=consortium.now)
    new = consortium.authority.signed_manifest.to_json()
    others = Consortium(tmp_path / "others", "banks").authority.signed_manifest.to_json()
    file.write_bytes(new)
    follow = manifests_of(consortium, old, file, new)
    bad = {
        "manifest-older": old,
        "manifest-signature": forged(new),
        "manifest-malformed": b"{}",
    }
    for reason, data in bad.items():
        file.write_bytes(data)
        with capture_logs() as logs:
            assert set(follow().silos) == set("abc")
            assert set(follow().silos) == set("abc")
        assert events(logs) == [("manifest-refused", reason)]
    file.write_bytes(others)
    with capture_logs() as logs:
        assert follow().consortium == "hospitals"
    assert [name for name, _ in events(logs)] == ["manifest-refused"]
    file.unlink()
    with capture_logs() as logs:
        assert set(follow().silos) == set("abc")
    assert events(logs) == [("manifest-refused", "file")]
    file.write_bytes(new)
    with capture_logs() as logs:
        assert follow.signed.to_json() == new
        follow()
    assert [name for name, _ in events(logs)] == ["manifest-loaded"]


def manifests_of(consortium: Consortium, old: bytes, file: Path, new: bytes) -> Manifests:
    """A follower that began with the old one and saw the new one."""
    file.write_bytes(old)
    follow = manifests(consortium)
    file.write_bytes(new)
    assert set(follow().silos) == set("abc")
    return follow


# The server's certificate.


def test_the_fetcher_says_nothing_unless_the_file_changed(
    consortium: Consortium, home: Path
) -> None:
    """New objects on every handshake make grpcio crash under load (grpc/grpc#36693)."""
    certificate = ServerCertificate(consortium.credentials(Role.COORDINATOR, "main"))
    assert [certificate._fetch() for _ in range(5)] == [None] * 5
    consortium.renew(Role.COORDINATOR, "main")
    with capture_logs() as logs:
        assert certificate._fetch() is not None
        assert [certificate._fetch() for _ in range(5)] == [None] * 5
    assert events(logs) == [("certificate-reloaded", None)]


def test_a_certificate_that_cannot_be_used_is_left(consortium: Consortium, home: Path) -> None:
    certificate = ServerCertificate(consortium.credentials(Role.COORDINATOR, "main"))
    file = home / "certificate.pem"
    good = file.read_bytes()
    other = consortium.path(Role.SILO, "a") / "certificate.pem"
    for data, code in (
        (b"", "identity-certificate"),
        (good + good, "identity-certificate"),
        (other.read_bytes(), "certificate-role"),
    ):
        file.unlink()
        file.write_bytes(data)
        with capture_logs() as logs:
            assert [certificate._fetch() for _ in range(3)] == [None] * 3
        assert events(logs) == [("certificate-refused", code)]
    file.unlink()
    with capture_logs() as logs:
        assert certificate._fetch() is None
    assert events(logs) == [("certificate-refused", "file-missing")]
    file.write_bytes(good)
    with capture_logs() as logs:
        assert certificate._fetch() is not None
    assert events(logs) == [("certificate-reloaded", None)]


def test_credentials_for_a_port(consortium: Consortium) -> None:
    made = ServerCertificate(consortium.credentials(Role.COORDINATOR, "main")).credentials()
    assert made is not None


# Settings.

GOOD = 'listen = "127.0.0.1:0"\ncredentials = "keys"\nstate = "/var/state"\n'
LIMITED = GOOD + "[limits]\n"


def load(tmp_path: Path, text: str) -> Settings:
    path = tmp_path / "coordinator.toml"
    path.write_text(text)
    return load_settings(path)


def test_good_settings(tmp_path: Path) -> None:
    settings = load(tmp_path, GOOD + 'grace = 0\nlog_level = "debug"\n')
    assert settings.credentials == tmp_path / "keys"
    assert settings.state == Path("/var/state")
    assert (settings.grace, settings.limits.max_sessions) == (0, 64)


def test_the_example_tells_all_limits_as_they_are() -> None:
    example = Path(__file__).parents[2] / "examples" / "coordinator.toml"
    assert load_settings(example).limits == Limits()
    listed = tomllib.loads(example.read_text())["limits"]
    assert list(listed) == [limit.name for limit in fields(Limits)]


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("", "config-file"),
        ("listen = 1", "config-file"),
        (GOOD + "secret = 1", "config-file"),
        (GOOD + "listen = ''", "config-file"),
        ("[", "config-file"),
        (LIMITED + "max_sessions = '3'", "config-file"),
        (LIMITED + "max_sessions = 1.5", "config-file"),
        (LIMITED + "max_sessions = true", "config-file"),
        (LIMITED + "max_sessions = 1979-05-27", "config-file"),
        (GOOD.replace("state", "stat"), "config-file"),
        (GOOD + "log_level = 'trace'", "log-level"),
        (GOOD + "log_level = 'DEBUG'", "log-level"),
        (GOOD + "log_format = 'xml'", "log-format"),
        (LIMITED + "max_sessions = 0", "limits"),
        (LIMITED + "max_concurrent_calls = -1", "limits"),
        (LIMITED + "max_metadata_bytes = 0", "limits"),
        (LIMITED + "max_weights_bytes = 0", "limits"),
        (GOOD + "grace = -0.1", "limits"),
        (GOOD + "grace = nan", "limits"),
        (GOOD + "grace = inf", "limits"),
    ],
)
def test_bad_settings(tmp_path: Path, text: str, code: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text)
    assert caught.value.code == code
    assert caught.value.observed


def test_settings_that_cannot_be_read(tmp_path: Path) -> None:
    binary = tmp_path / "coordinator.toml"
    binary.write_bytes(b"\xff\xfe\x00")
    for path in (tmp_path / "none.toml", tmp_path, binary):
        with pytest.raises(ConfigError) as caught:
            load_settings(path)
        assert caught.value.code == "config-file"
