"""The catalogue of threats as a page, made from what is in the repository.

    python -m threat_model.catalogue    writes threat_model/CATALOGUE.md

``threats.toml`` says what is known of a threat; which programs attack it, what they do and what
they weaken is read off the attacks themselves, so that the page cannot promise what does not run.
"""

from __future__ import annotations

import re
import textwrap
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from inspect import getdoc
from pathlib import Path
from typing import Any, Final

from threat_model.attacks import ATTACKS
from threat_model.attacks.attack import Attack

HERE: Final = Path(__file__).parent
SOURCE: Final = HERE / "threats.toml"
PAGE: Final = HERE / "CATALOGUE.md"
WIDTH: Final = 110
Threat = dict[str, Any]
_GROUP: Final = re.compile(r"^# (.+)\n\n(?=\[\[threat\]\])", re.MULTILINE)
_HEAD: Final = (
    "Made by `make catalogue` from [threats.toml](threats.toml) and the programs in "
    "[attacks](attacks); not to be edited. [README.md](README.md) says what is protected, against "
    "whom, and what is not.",
    "Each **program** is run twice by `make attacks`: on the shipped SDK or coordinator, in a "
    "process of its own, which has to refuse it with the code that is named here; and on one in "
    "which one function of ours was replaced by the program's, where it has to succeed, and not be "
    "refused with that code. A program that is broken cannot pass for a defence. `_refuse` is one "
    "function that many checks call: where it is replaced, its parameters name those that are off, "
    "and their number is given. Where TLS itself refuses, it is the *authority* that is weakened, "
    "and SDK and coordinator are as shipped.",
)


@dataclass(frozen=True)
class Group:
    """Threats of one kind.

    Args:
        title: of the group.
        threats: as in ``threats.toml``.
    """

    title: str
    threats: Sequence[Threat]

    @property
    def anchor(self) -> str:
        """What its heading is linked by."""
        return re.sub(r"[^\w -]", "", self.title.lower()).replace(" ", "-")


def load() -> list[Group]:
    """Read the threats, in groups."""
    _, *rest = _GROUP.split(SOURCE.read_text("utf-8"))
    titles, bodies = rest[::2], rest[1::2]
    return [
        Group(title, tomllib.loads(body)["threat"])
        for title, body in zip(titles, bodies, strict=True)
    ]


def attacks_on(threat: str) -> list[Attack]:
    """The programs that attack it."""
    return [attack for attack in ATTACKS.values() if attack.threat == threat]


def page() -> str:
    """The whole page."""
    groups = load()
    parts = ["# Catalogue of threats"]
    for text in _HEAD:
        parts += ["", *_prose(text)]
    parts += ["", *_index(groups)]
    for group in groups:
        parts += ["", f"## {group.title}"]
        for threat in group.threats:
            parts += ["", *_entry(threat)]
    return "\n".join(parts) + "\n"


def _index(groups: Sequence[Group]) -> Iterator[str]:
    threats = [threat for group in groups for threat in group.threats]
    tried = {attack.threat for attack in ATTACKS.values()}
    yield from _prose(
        f"**{len(threats)} threats, {len(ATTACKS)} programs.** {len(threats) - len(tried)} threats "
        "have no program and say why."
    )
    yield from ["", "| group | threats | programs |", "|---|---|---|"]
    for group in groups:
        names = ", ".join(f"[{threat['id']}](#{threat['id']})" for threat in group.threats)
        count = sum(len(attacks_on(threat["id"])) for threat in group.threats)
        yield f"| [{group.title}](#{group.anchor}) | {names} | {count} |"


def _entry(threat: Threat) -> Iterator[str]:
    yield from [f"### {threat['id']}", ""]
    yield from _prose(f"*{threat['title']}.*")
    yield ""
    yield from _item("Adversary", threat["adversary"])
    yield from _item("Works where", threat["precondition"])
    yield from _item("Defence", threat["defence"])
    yield from _item("In", _places(threat["code"]))
    yield from _item("Source", threat["source"])
    if programs := attacks_on(threat["id"]):
        yield "- **Programs:**"
        for attack in programs:
            yield from _program(attack)
    if "no_program" in threat:
        yield from _item("No program", threat["no_program"])
    if threat["test"]:
        yield from _item("Tests", _places(threat["test"]))
    yield from _item("Residual risk", threat["residual"])


def _program(attack: Attack) -> Iterator[str]:
    weak = attack.weakening
    instead = weak.by.rpartition(":")[2]
    values = ", ".join(str(value) for value in weak.parameters)
    off = len(weak.parameters) if weak.target.endswith(":_refuse") else 0
    also = f", {off} checks in all" if off > 1 else f", at the {attack.part}" if attack.part else ""
    yield from _prose(
        f"- `{attack.name}`: {_gist(attack)} Refused: `{attack.reason}`. It succeeds with "
        f"`{instead}{f'({values})' if values else ''}` for `{weak.target}`{also}.",
        level=1,
    )


def _gist(attack: Attack) -> str:
    """The first paragraph of a program's own words."""
    return " ".join((getdoc(attack.play) or "").partition("\n\n")[0].split())


def _places(places: Sequence[str]) -> str:
    by_file: dict[str, list[str]] = {}
    for place in places:
        file, _, name = place.partition("::")
        by_file.setdefault(file, []).append(f"`{name}`")
    return "; ".join(f"[{file}](../{file}): {', '.join(names)}" for file, names in by_file.items())


def _item(name: str, text: str) -> Iterator[str]:
    return _prose(f"- **{name}:** {text}")


def _prose(text: str, *, level: int = 0) -> Iterator[str]:
    indent = "  " * level
    yield from textwrap.wrap(
        text,
        WIDTH,
        initial_indent=indent,
        subsequent_indent=indent + ("  " if text.startswith("- ") else ""),
        break_long_words=False,
        break_on_hyphens=False,
    )


def main() -> None:
    """Write the page."""
    PAGE.write_text(page(), "utf-8")


if __name__ == "__main__":
    main()
