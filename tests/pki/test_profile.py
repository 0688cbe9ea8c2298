from __future__ import annotations

import tomllib
from dataclasses import fields
from pathlib import Path

import pytest

from secagg.config import Clip, Policy, Protection, parse_toml
from secagg.pki.profile import check_address, write_policy, write_profile

from .builders import refused


def test_policy_is_complete_explained_and_strictly_parsed(tmp_path: Path) -> None:
    assert write_policy(tmp_path)
    text = (tmp_path / "policy.toml").read_text()
    assert parse_toml(Policy, text, "policy.toml") == Policy(
        colluders=1,
        min_cohort=3,
        min_threshold=3,
        protections=(Protection.MASKED, Protection.CKKS_MASKED),
        ring_bits=(16, 32, 64),
        clips=(Clip.NONE, Clip.ELEMENT, Clip.L2),
        max_weight_cap=1000.0,
        repeat_sessions=(),
    )
    optional = {"key_directory"}
    assert set(tomllib.loads(text)) == {field.name for field in fields(Policy)} - optional
    lines = text.splitlines()
    for number, line in enumerate(lines):
        if " = " in line and not line.startswith("#"):
            assert lines[number - 1].startswith("# ")


def test_keys_touch_the_disk_only_where_the_operator_says_so(tmp_path: Path) -> None:
    """The file shows how, and does not do it."""
    write_policy(tmp_path)
    text = (tmp_path / "policy.toml").read_text()
    assert parse_toml(Policy, text, "policy.toml").key_directory is None
    assert text.count('# key_directory = "keys"') == 1
    said = text.replace('# key_directory = "keys"', 'key_directory = "keys"')
    assert parse_toml(Policy, said, "policy.toml").key_directory == "keys"


def test_plain_ckks_is_allowed_by_name_alone(tmp_path: Path) -> None:
    write_policy(tmp_path)
    first = parse_toml(Policy, (tmp_path / "policy.toml").read_text(), "policy.toml")
    assert Protection.CKKS not in first.protections
    for names in (("ckks",), ("masked", "ckks"), ("masked", "ckks", "ckks+masked")):
        (tmp_path / "policy.toml").unlink()
        assert write_policy(tmp_path, names)
        text = (tmp_path / "policy.toml").read_text()
        assert parse_toml(Policy, text, "policy.toml").protections == names


def test_profile(tmp_path: Path) -> None:
    assert write_profile(tmp_path, "hub.example.org:8443")
    profile = tomllib.loads((tmp_path / "profile.toml").read_text())
    assert profile == {"coordinator": "hub.example.org:8443", "state": "state"}


def test_an_operator_s_files_are_kept(tmp_path: Path) -> None:
    (tmp_path / "policy.toml").write_text("mine")
    (tmp_path / "profile.toml").symlink_to(tmp_path / "nowhere")
    assert not write_policy(tmp_path)
    assert not write_profile(tmp_path, "hub:1")
    assert (tmp_path / "policy.toml").read_text() == "mine"
    assert (tmp_path / "profile.toml").is_symlink()


@pytest.mark.parametrize("text", ["hub:1", "127.0.0.1:65535", "[::1]:8443", "a-b.c:443", "h:80"])
def test_address(text: str) -> None:
    assert check_address(text) == text


@pytest.mark.parametrize(
    "text",
    [
        *("", "hub", "hub:", ":1", "hub:0", "hub:01", "hub:65536", "hub:99999", "hub:1\n"),
        *('hub"\nx = "1:1', "hub:1:1", "::1:8443", "https://hub:1", "-hub:1", "hüb:1", "hub:١"),
    ],
)
def test_bad_address(text: str) -> None:
    with refused("coordinator-address"):
        check_address(text)
