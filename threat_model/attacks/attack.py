"""What an attack is, how one is judged, and the list of all.

An attack is a function that plays the adversary and returns whether it got what it was after: an
update that nobody may read, a call under another's name, a sum that is wrong. It is run twice: on
a *weakened* product, in whose process the attack has put one function of its own in the place of
one of ours, where it must succeed; and on the product as it is shipped, where it must not, and
where the product must have refused for the reason that is named here. So an attack that is broken
cannot pass for a defence, nor a refusal of something else.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Final


class Refused(Exception):
    """The product refused.

    Args:
        code: its stable code, or what can be seen of a refusal that has none.
        who: the silo that refused, or "coordinator".
    """

    def __init__(self, code: str, who: str = "coordinator", observed: str = "") -> None:
        super().__init__(f"{who}: {code} {observed}".strip())
        self.code = code
        self.who = who


@dataclass(frozen=True)
class Weakening:
    """One function of ours, and what stands in its place in a weakened process.

    Args:
        target: "module:name" or "module:Class.name" of the function.
        by: "module:name" of what makes its substitute from ours and ``parameters``.
        parameters: plain values.
    """

    target: str
    by: str
    parameters: tuple[Any, ...] = ()

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Weaken this process."""
        owner, name = _owner(self.target)
        real = getattr(owner, name)
        setattr(owner, name, _resolve(self.by)(real, *self.parameters))
        try:
            yield
        finally:
            setattr(owner, name, real)

    def to_json(self) -> dict[str, Any]:
        """For the process that is to be weakened."""
        return asdict(self)

    @classmethod
    def from_json(cls, table: dict[str, Any]) -> Weakening:
        """As ``to_json`` gave it."""
        return cls(table["target"], table["by"], tuple(table["parameters"]))


def _owner(target: str) -> tuple[Any, str]:
    module, _, path = target.partition(":")
    owner: Any = importlib.import_module(module)
    *outer, name = path.split(".")
    for part in outer:
        owner = getattr(owner, part)
    return owner, name


def _resolve(target: str) -> Any:
    owner, name = _owner(target)
    return getattr(owner, name)


Play = Callable[[Any], bool]


@dataclass(frozen=True)
class Attack:
    """One attack.

    Args:
        name: as the function's, with hyphens.
        threat: the threat's id in ``threats.toml``.
        reason: the stable code with which the product refuses it.
        weakening: without what it succeeds.
        play: takes the stage, and returns whether the adversary got what it was after.
    """

    name: str
    threat: str
    reason: str
    weakening: Weakening
    play: Play


ATTACKS: Final[dict[str, Attack]] = {}
"""All attacks, by name, in the order of the modules that hold them."""


def attack(
    *, threat: str, reason: str, weakening: Weakening, name: str = ""
) -> Callable[[Play], Play]:
    """Add a function to the attacks."""

    def register(play: Play) -> Play:
        title = name or play.__name__.replace("_", "-")
        assert title not in ATTACKS, title
        ATTACKS[title] = Attack(title, threat, reason, weakening, play)
        return play

    return register


@dataclass(frozen=True)
class Verdict:
    """How an attack went.

    Args:
        name: the attack's.
        threat: the threat's.
        weakened: "succeeded", or "failed": the attack is broken.
        ours: "refused" for the reason named; "succeeded", or "unexplained": refused otherwise.
        reason: the code that the product refused with.
        seconds: both runs.
        notes: what went on where it is not as it should be.
    """

    name: str
    threat: str
    weakened: str
    ours: str
    reason: str
    seconds: float
    notes: tuple[str, ...] = ()

    @property
    def right(self) -> bool:
        """Whether it is as it should be."""
        return (self.weakened, self.ours) == ("succeeded", "refused")

    def to_json(self) -> dict[str, Any]:
        """For programs."""
        table = asdict(self)
        if not self.notes:
            del table["notes"]
        return table


@dataclass
class Scene:
    """What a play is given.

    Args:
        stage: the consortium and its processes.
        weakening: in force in this scene's processes; None where the product is as shipped.

    Attributes:
        refusals: codes of all refusals that were seen, in order.
    """

    stage: Any
    weakening: Weakening | None
    refusals: list[str] = field(default_factory=list)

    @property
    def weakened(self) -> bool:
        """Whether this is the weakened product."""
        return self.weakening is not None

    def alike(self) -> AbstractContextManager[None]:
        """Weaken this process as well: colluders run the product, and the adversary knows it."""
        return nullcontext() if self.weakening is None else self.weakening.applied()

    def refuse(self, code: str, who: str = "coordinator", observed: str = "") -> Refused:
        """Note a refusal that was seen; it can be raised."""
        self.refusals.append(code)
        return Refused(code, who, observed)


def judge(attack: Attack, stage: Any) -> Verdict:
    """Run an attack on the weakened product, then on ours."""
    began, notes = time.monotonic(), []
    gained, ended = {}, {}
    for weakening in (attack.weakening, None):
        scene = Scene(stage, weakening)
        which = "weakened" if scene.weakened else "ours"
        gained[which], ended[which] = False, scene.refusals
        try:
            gained[which] = attack.play(scene)
        except Refused as refusal:
            ended[which] = [refusal.code]  # whatever was refused on the way, this ended it
            notes.append(f"{which}: {refusal}")
        except Exception as error:  # noqa: BLE001 - a broken attack, and the next one goes on
            ended[which] = [f"broken: {type(error).__name__}"]
            notes.append(f"{which}: {type(error).__name__}: {error}")
    as_named = attack.reason in ended["ours"]
    ours = "succeeded" if gained["ours"] else "refused" if as_named else "unexplained"
    verdict = Verdict(
        attack.name,
        attack.threat,
        "succeeded" if gained["weakened"] else "failed",
        ours,
        attack.reason if as_named else ", ".join(ended["ours"]),
        round(time.monotonic() - began, 3),
    )
    return verdict if verdict.right else replace(verdict, notes=tuple(notes))
