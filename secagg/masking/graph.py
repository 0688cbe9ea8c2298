"""Who shares masks and secrets with whom: the seam for sparse graphs.

Today the graph is complete. A sparse one (Bell et al. 2020, ePrint 2020/704, section 3) would draw
each silo's neighbours from τ1 and scale the threshold with the degree; nothing else would change,
since client and server ask only here.
"""

from __future__ import annotations

from collections.abc import Sequence

from secagg.config import SiloId


def neighbours(roster: Sequence[SiloId], of: SiloId) -> tuple[SiloId, ...]:
    """Return those in the sorted roster with whom ``of`` shares masks and secrets."""
    return tuple(name for name in roster if name != of)


def holders(roster: Sequence[SiloId], of: SiloId) -> tuple[SiloId, ...]:
    """Return who holds shares of ``of``'s secrets, in the order of their points: 1, 2, …

    The dealer holds one itself. Points come from the rank in the sorted roster, never the wire.
    """
    return tuple(sorted((*neighbours(roster, of), of)))
