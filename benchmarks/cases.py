"""Cases of a benchmark: sizes that always run, and those that --quick leaves out."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest


def sweep(name: str, quick: Sequence[object], full: Sequence[object] = ()) -> pytest.MarkDecorator:
    """Parametrise over values; the name of a case says which is which, as ``d=1e6``.

    Args:
        name: of the parameter.
        quick: values that always run.
        full: values that --quick leaves out.
    """
    always = [pytest.param(value, id=f"{name}={label(value)}") for value in quick]
    more = [
        pytest.param(value, id=f"{name}={label(value)}", marks=pytest.mark.full) for value in full
    ]
    return pytest.mark.parametrize(name, always + more)


def label(value: object) -> str:
    """Powers of ten from 10^4 on as 1e4; everything else as it prints."""
    if isinstance(value, int) and value >= 10**4:
        power = round(math.log10(value))
        if value == 10**power:
            return f"1e{power}"
    return str(value)
