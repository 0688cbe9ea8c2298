"""Rewrites the product as it is imported, as the environment says: in tests and what they start.

``site/sitecustomize.py`` installs it at the start of every Python process; what goes wrong here
is printed and leaves the product whole, so it can make a check survive, never die.
"""

from __future__ import annotations

import builtins
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from pathlib import Path
from types import CodeType, ModuleType

from tests.mutants import marks

_VARIABLE = "SECAGG_MUTANTS"
_HERE = Path(__file__).resolve().parent


@dataclass(frozen=True, slots=True)
class Order:
    """What to do with the marks in some packages.

    Args:
        packages: their names.
        without: the check to leave out.
        log: where a check writes its name, the test in which it refused something, and whether
            that was in the test's process, ``here``. ``elsewhere`` it is the test that started the
            process, which may serve others of its module, too.
    """

    packages: tuple[str, ...]
    without: str | None = None
    log: str = os.devnull

    def environment(self) -> dict[str, str]:
        """Return the environment of a Python process in which this holds, and in its children."""
        path = os.pathsep.join([str(_HERE / "site"), str(_HERE.parent.parent)])
        return {**os.environ, "PYTHONPATH": path, _VARIABLE: json.dumps(asdict(self))}


def install() -> None:
    """Obey the order in the environment, if there is one."""
    if _VARIABLE in os.environ:
        order = Order(**json.loads(os.environ[_VARIABLE]))
        setattr(builtins, marks.CHECKS, _Checks(order))
        sys.meta_path.insert(0, _Finder(order.packages))


def leave_out(name: str) -> None:
    """Leave a check out from now on, in this process and in what it starts."""
    order = replace(Order(**json.loads(os.environ[_VARIABLE])), without=name)
    os.environ[_VARIABLE] = json.dumps(asdict(order))
    setattr(builtins, marks.CHECKS, _Checks(order))


class _Checks:
    """What a rewritten module asks and tells."""

    def __init__(self, order: Order) -> None:
        self._order = order
        self._known: set[str] = set()

    def stands(self, name: str) -> bool:
        return name != self._order.without

    def refused(self, name: str) -> None:
        test = os.environ.get("PYTEST_CURRENT_TEST", "").rpartition(" (")[0]
        line = f"{name}\t{test}\t{'here' if '_pytest' in sys.modules else 'elsewhere'}\n"
        if line not in self._known:
            self._known.add(line)
            with open(self._order.log, "a") as log:
                log.write(line)


class _Finder(MetaPathFinder):
    def __init__(self, packages: Sequence[str]) -> None:
        self._packages = packages

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname.partition(".")[0] not in self._packages:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is None or not isinstance(spec.loader, SourceFileLoader):
            return None
        spec.loader = _Loader(fullname, spec.loader.path)
        return spec


class _Loader(SourceFileLoader):
    """Loads a module with its checks watched, past the cache of compiled ones."""

    def get_code(self, fullname: str) -> CodeType | None:
        path = Path(self.path)
        source = path.read_text()
        if not marks.marks_of(source, path):
            return super().get_code(fullname)
        return compile(marks.rewritten(source, path), self.path, "exec", dont_inherit=True)
