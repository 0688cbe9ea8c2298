"""What the README says runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from click.testing import CliRunner

from secagg.cli import commands
from secagg.cli.session import read_session
from secagg.errors import ConfigError

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)
    return [text for kind, text in fenced if kind == language]


def test_the_simulation_example() -> None:
    example = next(block for block in blocks("python") if "Federation" in block)
    space: dict[str, object] = {}
    exec(compile(example, "README.md", "exec"), space)
    assert space["result"].dropouts == ["silo-2"]  # type: ignore[attr-defined]


def test_every_command_named_exists_with_its_options() -> None:
    lines = re.findall(r"^secagg [a-z].*$", "\n".join(blocks("")), re.MULTILINE)
    assert len(lines) >= 7
    for line in lines:
        words = line.split("#")[0].split()[1:]
        names = [word for word in words[:2] if re.fullmatch(r"[a-z]+", word)]
        command = [name for i, name in enumerate(names) if i == 0 or names[0] != "serve"]
        shown = CliRunner().invoke(commands, [*command, "--help"])
        assert shown.exit_code == 0, line
        for option in (word for word in words if word.startswith("--")):
            assert option in shown.output, line


def test_every_make_target_named_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"make ([a-z-]+)\b(?=[` ])", README)) <= targets


def test_the_example_session_parses() -> None:
    assert read_session(ROOT / "examples" / "heart.toml", "heart").name == "heart-disease"


@pytest.mark.parametrize("text", [b"\xff", b"x = " + b"[" * 5000, b"min_cohort = 999999999"])
def test_a_session_file_that_cannot_be_read(tmp_path: Path, text: bytes) -> None:
    file = tmp_path / "study.toml"
    file.write_bytes(text)
    with pytest.raises(ConfigError):
        read_session(file, "heart")


def test_the_example_session_with_what_the_readme_says_of_ckks(tmp_path: Path) -> None:
    two = next(block for block in blocks("toml") if "suite" in block)
    text = (ROOT / "examples" / "heart.toml").read_text()
    text = re.sub(r"^(protection|ring_bits) = .*\n", "", text, flags=re.MULTILINE)
    file = tmp_path / "heart.toml"
    file.write_text(two + text)
    config = read_session(file, "heart")
    assert (config.protection, config.suite) == ("ckks+masked", "ckks-54")
