"""What stands in the place of one of our functions in a weakened process.

Each takes ours and plain parameters, and gives the substitute.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from threat_model.attacks.attack import Weakening

Function = Callable[..., Any]


def forgiving(real: Function, *codes: str) -> Function:
    """``masking.client._refuse`` that lets these refusals pass."""

    def refuse(code: str, observed: str) -> None:
        if code not in codes:
            real(code, observed)

    return refuse


def nothing(_real: Function) -> Function:
    """A check that checks nothing."""
    return lambda *_, **__: None


def believing(_real: Function) -> Function:
    """A question that is always answered with yes."""
    return lambda *_, **__: True


def as_is(_real: Function) -> Function:
    """A parser that takes its argument as it is."""
    return lambda value, *_, **__: value


def usual_suites(_real: str) -> str:
    """The suites of TLS 1.2 that are good by themselves; here, where nothing imports gRPC."""
    return "ECDHE-ECDSA-AES128-GCM-SHA256:ECDHE-RSA-AES128-GCM-SHA256"


def without(*codes: str) -> Weakening:
    """A silo that does not refuse for these reasons."""
    return Weakening("secagg.masking.client:_refuse", "threat_model.attacks.weak:forgiving", codes)


def replaced(target: str, by: Function, *parameters: Any) -> Weakening:
    """One function replaced by what ``by`` makes of it."""
    return Weakening(target, f"{by.__module__}:{by.__qualname__}", parameters)
