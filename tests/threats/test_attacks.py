"""The suite of attacks is sound, judges as it says, and a few of them run for real."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest
from click.testing import CliRunner

from secagg.config import silo_id
from secagg.errors import RoleRefused
from threat_model.attacks import ATTACKS, __main__, every
from threat_model.attacks.attack import Attack, Play, Scene, Weakening, _resolve, judge
from threat_model.attacks.reasons import OBSERVED
from threat_model.attacks.stage import Stage
from threat_model.attacks.weak import nothing, replaced

ROOT = Path(__file__).resolve().parents[2]
NAME = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")
BELIEVING = replaced("secagg.coordinator.calls:_check_sender", nothing)


class Nobody:
    """A stage without processes.

    Attributes:
        ends: how often they had to be ended.
    """

    ends = 0

    def end(self) -> None:
        self.ends += 1


NOBODY = Nobody()


# The registry.


def test_there_are_enough() -> None:
    assert len(ATTACKS) >= 180


def test_names_are_the_functions_own() -> None:
    for name, attack in ATTACKS.items():
        assert NAME.fullmatch(name)
        assert name == attack.name


def test_every_attack_says_what_it_does() -> None:
    assert [name for name, attack in ATTACKS.items() if not attack.play.__doc__] == []


def test_every_module_of_attacks_is_imported() -> None:
    modules = {file.stem for file in Path(every.__file__).parent.glob("on_*.py")}
    assert modules == {name for name in vars(every) if name.startswith("on_")}
    assert modules == {attack.play.__module__.rpartition(".")[2] for attack in ATTACKS.values()}


def test_weakenings_are_one_thing_of_ours_each() -> None:
    for name, attack in ATTACKS.items():
        weak = attack.weakening
        assert weak.target.startswith(("secagg.", "client_sdk.")), name
        assert weak.by.startswith("threat_model.attacks."), name
        assert _resolve(weak.target) is not None, name
        assert callable(_resolve(weak.by)), name
        assert Weakening.from_json(json.loads(json.dumps(weak.to_json()))) == weak, name


def test_a_weakening_ends() -> None:
    real = _resolve(BELIEVING.target)
    with pytest.raises(RoleRefused):
        real("a", silo_id("b"))
    with BELIEVING.applied():
        _resolve(BELIEVING.target)("a", silo_id("b"))
    assert _resolve(BELIEVING.target) is real


def test_reasons_are_codes_of_the_product_or_documented() -> None:
    files = [file for top in ("secagg", "client_sdk") for file in (ROOT / top).rglob("*.py")]
    text = "".join(file.read_text("utf-8") for file in files)
    statuses = {status.name for status in grpc.StatusCode}
    reasons = {attack.reason for attack in ATTACKS.values()}
    for reason in reasons - statuses - OBSERVED.keys():
        kind = reason.removesuffix("-signature").removeprefix("policy-")
        assert f'"{reason}"' in text or f'"{kind}"' in text, reason
    assert OBSERVED.keys() <= reasons


# The judge.


def fake(play: Play, reason: str = "no") -> Attack:
    return Attack("a-fake", "a-threat", reason, BELIEVING, play)


def refused(code: str) -> Callable[[Scene], bool]:
    """Succeeds on the weakened product; on ours it is refused with this code."""

    def play(scene: Scene) -> bool:
        if not scene.weakened:
            raise scene.refuse(code)
        return True

    return play


def test_refused_for_the_reason_named() -> None:
    verdict = judge(fake(refused("no")), NOBODY)
    assert (verdict.weakened, verdict.ours, verdict.reason) == ("succeeded", "refused", "no")
    assert verdict.right
    assert verdict.to_json().keys() == {
        "name", "threat", "weakened", "ours", "reason", "seconds"
    }  # fmt: skip


def test_refused_for_another_reason() -> None:
    verdict = judge(fake(refused("other")), NOBODY)
    assert (verdict.weakened, verdict.ours, verdict.reason) == ("succeeded", "unexplained", "other")
    assert not verdict.right
    assert verdict.notes == ("ours: coordinator: other",)


def test_nothing_gained_and_nothing_refused() -> None:
    verdict = judge(fake(lambda scene: scene.weakened), NOBODY)
    assert (verdict.weakened, verdict.ours) == ("succeeded", "unexplained")


def test_success_on_ours() -> None:
    def play(scene: Scene) -> bool:
        if not scene.weakened:
            scene.refuse("no")
        return True

    verdict = judge(fake(play), NOBODY)
    assert (verdict.weakened, verdict.ours) == ("succeeded", "succeeded")
    assert not verdict.right


def test_an_attack_that_is_broken_is_no_defence() -> None:
    def play(scene: Scene) -> bool:
        raise scene.refuse("no")

    verdict = judge(fake(play), NOBODY)
    assert (verdict.weakened, verdict.ours) == ("failed", "refused")
    assert not verdict.right


def test_a_reason_that_the_weakened_product_gives_as_well_is_none() -> None:
    def play(scene: Scene) -> bool:
        scene.refuse("no")
        return scene.weakened

    verdict = judge(fake(play), NOBODY)
    assert (verdict.weakened, verdict.ours) == ("refused", "refused")
    assert not verdict.right


def test_a_run_that_does_not_end_is_ended() -> None:
    def play(scene: Scene) -> bool:
        while True:
            pass

    stage = Nobody()
    verdict = judge(fake(play), stage, seconds=0.01)
    assert (verdict.weakened, verdict.ours) == ("failed", "unexplained")
    assert verdict.reason == "broken: Overdue"
    assert stage.ends == 2


def test_who_is_weakened_is_said_where_it_is_not_the_victim() -> None:
    attack = replace(fake(refused("no")), part="authority")
    assert judge(attack, NOBODY).to_json()["part"] == "authority"


# The program.


def invoke(*arguments: str) -> Any:
    return CliRunner().invoke(__main__.main, arguments)


def test_unknown_names() -> None:
    outcome = invoke("anothers-name", "no-such-attack")
    assert outcome.exit_code == 2
    assert "no-such-attack" in outcome.output


def test_nothing_named() -> None:
    outcome = invoke("--json")
    assert outcome.exit_code == 2
    assert "--all" in outcome.output


def test_list() -> None:
    assert invoke("--list").output.split() == list(ATTACKS)


@pytest.mark.usefixtures("_fakes")
def test_verdicts_as_json() -> None:
    outcome = invoke("good", "--json")
    assert outcome.exit_code == 0
    (verdict,) = json.loads(outcome.stdout)["attacks"]
    assert verdict.pop("seconds") >= 0
    assert verdict == {
        "name": "a-fake",
        "threat": "a-threat",
        "weakened": "succeeded",
        "ours": "refused",
        "reason": "no",
    }


@pytest.mark.usefixtures("_fakes")
def test_one_that_went_wrong() -> None:
    outcome = invoke("--all", "--json")
    assert outcome.exit_code == 1
    assert [v["ours"] for v in json.loads(outcome.stdout)["attacks"]] == ["refused", "unexplained"]
    assert "NOT AS IT SHOULD BE" in outcome.stderr


@pytest.fixture
def _fakes(monkeypatch: pytest.MonkeyPatch) -> None:
    fakes = {"good": fake(refused("no")), "bad": fake(refused("other"))}
    monkeypatch.setattr(__main__, "ATTACKS", fakes)


# For real.


def test_some_attacks() -> None:
    with Stage() as stage:
        for name in ("anothers-name", "keys-that-others-read", "shares-in-the-journal"):
            verdict = judge(ATTACKS[name], stage)
            assert verdict.right, verdict
