"""Statistical generators are banned below ``simulation.py``: read from the syntax trees."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import secagg

ROOT = Path(secagg.__file__).parent
PACKAGES = ("ring", "encoding", "crypto", "masking")
FILES = sorted(file for package in PACKAGES for file in (ROOT / package).rglob("*.py"))
BANNED = ("random", "numpy.random")


def is_banned(module: str) -> bool:
    return any(module == name or module.startswith(name + ".") for name in BANNED)


def uses(source: str) -> Iterator[int]:
    """Lines that import or reach ``random`` or ``numpy.random``, also by name at run time."""
    for node in ast.walk(ast.parse(source)):
        found = False
        if isinstance(node, ast.Import):
            found = any(is_banned(alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            module = node.module or ""
            found = any(is_banned(x) for x in (module, *(f"{module}.{a.name}" for a in node.names)))
        elif isinstance(node, ast.Attribute):
            found = node.attr == "random"
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found = is_banned(node.value)
        if found:
            yield node.lineno


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_no_statistical_generator(file: Path) -> None:
    assert list(uses(file.read_text())) == []


def test_all_packages_are_scanned() -> None:
    assert {file.relative_to(ROOT).parts[0] for file in FILES} == set(PACKAGES)


@pytest.mark.parametrize(
    "source",
    [
        "import random",
        "import os, random as r",
        "from random import choice",
        "import numpy.random",
        "import numpy.random.mtrand as m",
        "from numpy import random",
        "from numpy import zeros, random as r",
        "from numpy.random import default_rng",
        "import numpy as np\nx = np.random.default_rng()",
        "import numpy\ndef f():\n    return numpy.random.normal(0, 1)",
        "import numpy as n\ng = n.random",
        "__import__('random')",
        "importlib.import_module('numpy.random')",
        "getattr(np, 'random')",
    ],
)
def test_the_scan_finds(source: str) -> None:
    assert list(uses(source))


@pytest.mark.parametrize(
    "source", ["import os\nos.urandom(3)", "from .random import x", "'at random'", "randomly = 1"]
)
def test_the_scan_does_not_find(source: str) -> None:
    assert not list(uses(source))
