"""A plugin of pytest: hypothesis has no deadline, and stops at its first counterexample.

On a busy machine a deadline would kill mutants that nothing has noticed; and nobody reads the
smallest counterexample.
"""

from __future__ import annotations

from hypothesis import Phase, settings


def pytest_configure() -> None:
    """Before any test is collected, so that each inherits this."""
    phases = [Phase.explicit, Phase.generate]
    settings.register_profile("mutants", phases=phases, database=None, deadline=None)
    settings.load_profile("mutants")
