"""The catalogue of threats and the tests say the same, and every place it points at exists."""

from __future__ import annotations

import ast
import re
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from threat_model import catalogue
from threat_model.attacks import ATTACKS

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "threat_model"
TEXTS = ("id", "title", "adversary", "precondition", "defence", "source", "residual")
OF_TOOLS = {"test_attacks.py", "test_catalogue.py"}
ADVERSARIES = {"coordinator", "silo", "coordinator and silos", "network", "nobody (accident)"}


@cache
def threats() -> list[dict[str, Any]]:
    return tomllib.loads((MODEL / "threats.toml").read_text("utf-8"))["threat"]


@cache
def names_in(file: Path) -> frozenset[str]:
    """Every function, method and class of a file, dotted."""

    def walk(body: list[ast.stmt], prefix: str) -> Iterator[str]:
        for node in body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                yield prefix + node.name
            if isinstance(node, ast.ClassDef):
                yield from walk(node.body, f"{prefix}{node.name}.")

    return frozenset(walk(ast.parse(file.read_text("utf-8")).body, ""))


def exists(place: str) -> bool:
    file, _, name = place.partition("::")
    return (ROOT / file).is_file() and name in names_in(ROOT / file)


def test_every_entry_is_whole() -> None:
    for threat in threats():
        assert threat.keys() - {"no_program"} == {*TEXTS, "code", "test"}, threat["id"]
        texts = threat.keys() - {"code", "test"}
        assert all(threat[field].strip() for field in texts), threat["id"]
        assert threat["adversary"] in ADVERSARIES, threat["id"]
        assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", threat["id"])
        assert threat["code"], threat["id"]


def test_ids_are_unique() -> None:
    ids = [threat["id"] for threat in threats()]
    assert len(set(ids)) == len(ids)


def test_every_place_exists() -> None:
    places = [place for threat in threats() for place in (*threat["test"], *threat["code"])]
    assert [place for place in places if not exists(place)] == []


def test_every_code_is_raised() -> None:
    """Every stable code that a defence names stands in the code, or is its signature's kind."""
    files = [file for top in ("secagg", "client_sdk") for file in (ROOT / top).rglob("*.py")]
    text = "".join(file.read_text("utf-8") for file in files)
    ids = {threat["id"] for threat in threats()}
    for threat in threats():
        for code in re.findall(r"`([a-z-]+)`", threat["defence"]):
            kind = code.removesuffix("-signature").removeprefix("policy-")
            assert f'"{code}"' in text or f'"{kind}"' in text or code in ids, code


def test_every_test_is_of_a_threat() -> None:
    named = {place for threat in threats() for place in threat["test"]}
    here = Path(__file__).parent
    found = {
        f"tests/threats/{file.name}::{name}"
        for file in here.glob("test_*.py")
        if file.name not in OF_TOOLS
        for name in names_in(file)
        if name.startswith("test_")
    }
    assert found <= named


def test_no_test_is_parametrised() -> None:
    """One function is one attack, so that a name says all of it."""
    for file in Path(__file__).parent.glob("test_*.py"):
        assert "mark." + "parametrize" not in file.read_text("utf-8"), file.name


def test_threats_are_attacked_or_say_why_not() -> None:
    attacked = {attack.threat for attack in ATTACKS.values()}
    excused = {threat["id"] for threat in threats() if "no_program" in threat}
    ids = {threat["id"] for threat in threats()}
    assert len(ids) >= 55
    assert (ids - attacked - excused, attacked & excused, attacked - ids) == (set(), set(), set())


def test_page_is_up_to_date() -> None:
    """If not: ``make catalogue``."""
    assert (MODEL / "CATALOGUE.md").read_text("utf-8") == catalogue.page()


def test_page_has_every_threat_in_a_group() -> None:
    grouped = [threat["id"] for group in catalogue.load() for threat in group.threats]
    assert grouped == [threat["id"] for threat in threats()]
    rows = re.findall(r"^### ([a-z0-9-]+)$", catalogue.page(), re.MULTILINE)
    assert rows == grouped


def test_decisions_name_what_was_rejected() -> None:
    records = sorted((MODEL / "decisions").glob("*.md"))
    numbers = [record.name[:4] for record in records]
    assert numbers == [f"{i:04}" for i in range(1, len(records) + 1)]
    for record in records:
        assert "## Rejected" in record.read_text("utf-8"), record.name
