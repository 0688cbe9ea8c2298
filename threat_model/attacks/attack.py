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
import inspect
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Final

RUN_SECONDS: Final = 60.0
"""How long one of an attack's two runs may take."""


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


class Overdue(Exception):
    """A run took longer than it may."""


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
        real = inspect.getattr_static(owner, name)
        assert inspect.isfunction(real) or isinstance(real, str), self.target  # put back as it is
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
        part: who is weakened where that is not the process under attack: "authority".
    """

    name: str
    threat: str
    reason: str
    weakening: Weakening
    play: Play
    part: str = ""


ATTACKS: Final[dict[str, Attack]] = {}
"""All attacks, by name, in the order of the modules that hold them."""


def attack(
    *, threat: str, reason: str, weakening: Weakening, name: str = "", part: str = ""
) -> Callable[[Play], Play]:
    """Add a function to the attacks."""

    def register(play: Play) -> Play:
        title = name or play.__name__.replace("_", "-")
        assert title not in ATTACKS, title
        ATTACKS[title] = Attack(title, threat, reason, weakening, play, part)
        return play

    return register


_OPTIONAL: Final = ("part", "notes")


@dataclass(frozen=True)
class Verdict:
    """How an attack went.

    Args:
        name: the attack's.
        threat: the threat's.
        weakened: "succeeded"; or "failed": the attack is broken; or "refused": it succeeded, and
            was refused for the reason named all the same, which is then not what stops it on ours.
        ours: "refused" for the reason named; "succeeded", or "unexplained": refused otherwise.
        reason: the code that the product refused with.
        seconds: both runs.
        part: as in ``Attack``.
        notes: what went on where it is not as it should be.
    """

    name: str
    threat: str
    weakened: str
    ours: str
    reason: str
    seconds: float
    part: str = ""
    notes: tuple[str, ...] = ()

    @property
    def right(self) -> bool:
        """Whether it is as it should be."""
        return (self.weakened, self.ours) == ("succeeded", "refused")

    def to_json(self) -> dict[str, Any]:
        """For programs."""
        table = asdict(self)
        return {key: value for key, value in table.items() if value or key not in _OPTIONAL}


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


@contextmanager
def limited(stage: Any, seconds: float) -> Iterator[None]:
    """End the stage's processes, and what waits for them, if it takes longer; main thread only.

    Raises:
        Overdue: it does.
    """

    def ring(*_: object) -> None:
        stage.end()
        raise Overdue(f"not over after {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.01), 5.0)  # again, where a cleanup hangs
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def judge(attack: Attack, stage: Any, *, seconds: float = RUN_SECONDS) -> Verdict:
    """Run an attack on the weakened product, then on ours; ``seconds`` is each run's limit."""
    began, notes = time.monotonic(), []
    gained, ended = {}, {}
    for weakening in (attack.weakening, None):
        scene = Scene(stage, weakening)
        which = "weakened" if scene.weakened else "ours"
        gained[which], ended[which] = False, scene.refusals
        try:
            with limited(stage, seconds):
                gained[which] = attack.play(scene)
        except Refused as refusal:
            ended[which] = [refusal.code]  # whatever was refused on the way, this ended it
            notes.append(f"{which}: {refusal}")
        except Exception as error:  # noqa: BLE001 - a broken attack, and the next one goes on
            ended[which] = [f"broken: {type(error).__name__}"]
            notes.append(f"{which}: {type(error).__name__}: {error}")
    weakened = "succeeded" if gained["weakened"] else "failed"
    if gained["weakened"] and attack.reason in ended["weakened"]:
        weakened = "refused"
    as_named = attack.reason in ended["ours"]
    ours = "succeeded" if gained["ours"] else "refused" if as_named else "unexplained"
    verdict = Verdict(
        attack.name,
        attack.threat,
        weakened,
        ours,
        attack.reason if as_named else ", ".join(ended["ours"]),
        round(time.monotonic() - began, 3),
        attack.part,
    )
    return verdict if verdict.right else replace(verdict, notes=tuple(notes))
