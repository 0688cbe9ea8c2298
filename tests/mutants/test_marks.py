"""The product's marks are sound, and the tool tells a check that is tested from one that is not."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from tests.mutants.__main__ import PACKAGES, ROOT
from tests.mutants.marks import CHECKS, BadMark, Mark, find, marks_of, rewritten
from tests.mutants.runs import BaselineFailed, Fate, Suite, Verdict, judge, refusals, rush

HERE = Path("bank.py")
BANK = """\
def withdraw(balance, amount):
    if (
        amount > balance
    ):  # CHECK: covered-early
        raise ValueError(amount)
    if amount <= 0:  # CHECK: positive
        raise ValueError(amount)
    # CHECK: covered-late
    if balance - amount < 0:
        raise ValueError(amount)
    _check_whole(amount)  # CHECK: whole
    return balance - amount


def _check_whole(amount):
    if int(amount) != amount:
        raise ValueError(amount)
"""
TESTS = """\
import subprocess
import sys

import pytest

from bank.till import withdraw


def test_enough():
    assert withdraw(3, 2) == 1


@pytest.mark.parametrize("amount", [0, 4])
def test_refused(amount):
    with pytest.raises(ValueError):
        withdraw(3, amount)


def test_refused_elsewhere():
    program = "from bank.till import withdraw; withdraw(3, 1.5)"
    assert subprocess.run([sys.executable, "-c", program], stderr=subprocess.DEVNULL).returncode
"""

MOODY = """\
import pytest

from bank.till import withdraw

seen = []


def test_first():
    seen.append(1)


def test_second():
    with pytest.raises(ValueError):
        withdraw(3, 0)
    assert seen
"""


def test_the_product_has_marks_and_each_could_go() -> None:
    assert len(find(ROOT, PACKAGES)) >= 575


@pytest.mark.parametrize(
    "line",
    [
        "x = 1  # CHECK: assignment",
        "if x: y()  # CHECK no-colon",
        "if x: y()  # CHECK: Two Words",
        "if x: y()  # CHECK:",
        "'text'  # CHECK: text",
        "# CHECK: nothing-below\n\nif x: y()",
        "if x:  # CHECK: has-else\n    y()\nelse:\n    z()",
        "for x in y:  # CHECK: loop\n    z()",
    ],
)
def test_a_mark_that_marks_no_check_is_refused(line: str) -> None:
    with pytest.raises(BadMark):
        marks_of(line + "\n", HERE)


def test_a_name_is_given_once(tmp_path: Path) -> None:
    (tmp_path / "bank").mkdir()
    for file in ("one.py", "two.py"):
        (tmp_path / "bank" / file).write_text("check()  # CHECK: same\n")
    with pytest.raises(BadMark, match=r"two\.py:1: same is the name of .*one\.py:1"):
        find(tmp_path, ["bank"])


def test_a_raise_that_no_condition_leads_to_is_told_apart() -> None:
    source = "try:\n    x()\nexcept E:\n    raise F  # CHECK: alone\n"
    source += "if y:\n    raise G  # CHECK: guarded\nif z:  # CHECK: condition\n    raise H\n"
    fates = {mark.name: Verdict.killed(mark, "a test").fate for mark in marks_of(source, HERE)}
    assert fates == {"alone": Fate.CRASHED, "guarded": Fate.KILLED, "condition": Fate.KILLED}


class Checks:
    """What a rewritten module asks, with one check left out."""

    def __init__(self, without: str) -> None:
        self.without = without
        self.told: list[str] = []

    def stands(self, name: str) -> bool:
        return name != self.without

    def refused(self, name: str) -> None:
        self.told.append(name)


@pytest.mark.parametrize(
    ("without", "refusals"),
    [
        ("none", ["covered-early", "positive", "whole"]),
        ("covered-early", ["covered-late", "positive", "whole"]),
        ("positive", ["covered-early", "whole"]),
        ("whole", ["covered-early", "positive"]),
    ],
)
def test_exactly_one_statement_goes(without: str, refusals: list[str]) -> None:
    assert [mark.line for mark in marks_of(BANK, HERE)] == [4, 6, 9, 11]
    checks = Checks(without)
    module: dict[str, Any] = {CHECKS: checks}
    exec(compile(rewritten(BANK, HERE), HERE, "exec"), module)
    assert module["withdraw"](3, 2) == 1
    for amount in (4, 0, 1.5):
        with suppress(ValueError):
            module["withdraw"](3, amount)
    assert checks.told == refusals


@pytest.fixture(scope="module")
def bank(tmp_path_factory: pytest.TempPathFactory) -> Suite:
    root = tmp_path_factory.mktemp("mutants")
    (root / "bank").mkdir()
    (root / "bank" / "till.py").write_text(BANK)
    (root / "pyproject.toml").write_text("[tool.pytest.ini_options]\n")
    (root / "test_bank.py").write_text(TESTS)
    return Suite(root, ("bank",), ("test_bank.py",))


def test_a_survivor_is_told_from_a_check_that_tests_hold(bank: Suite) -> None:
    known = refusals(bank, jobs=1)
    first, *others = known.pop("whole")  # in a process that others might have used as well
    assert (first, len(others)) == ("test_bank.py::test_refused_elsewhere", 3)
    assert known == {
        "covered-early": ["test_bank.py::test_refused[4]"],
        "positive": ["test_bank.py::test_refused[0]"],
    }
    known["whole"] = [first]
    assert rush(bank, known, jobs=1) == {
        "positive": "test_bank.py::test_refused[0]",
        "whole": "test_bank.py::test_refused_elsewhere",
    }
    fates = [judge(bank, mark, known.get(mark.name, ())).fate for mark in find(bank.root, ["bank"])]
    assert fates == [Fate.SURVIVED, Fate.KILLED, Fate.SURVIVED, Fate.KILLED]


def test_a_test_that_fails_by_itself_kills_nobody(bank: Suite) -> None:
    (bank.root / "test_moody.py").write_text(MOODY)
    suite = Suite(bank.root, bank.packages, ("test_moody.py",))
    killer = "test_moody.py::test_second"
    assert refusals(suite, jobs=1) == {"positive": [killer]}
    assert rush(suite, {"positive": [killer]}, jobs=1) == {}
    assert judge(suite, Mark("positive", Path("bank/till.py"), 6), [killer]).fate is Fate.BROKEN


def test_what_cannot_be_run_is_not_called_killed(bank: Suite) -> None:
    mark = Mark("positive", Path("bank/till.py"), 4)
    assert judge(bank, mark, ["test_bank.py::test_gone"]).fate is Fate.BROKEN


def test_a_suite_that_fails_judges_nothing(bank: Suite) -> None:
    (bank.root / "test_bad.py").write_text("def test_bad():\n    assert False\n")
    with pytest.raises(BaselineFailed, match=r"test_bad\.py::test_bad"):
        refusals(Suite(bank.root, bank.packages, ("test_bad.py",)), jobs=1)
