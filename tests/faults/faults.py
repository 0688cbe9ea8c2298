"""What may go wrong in a run: each kind on or off and as bad as the seed has it (swarm testing)."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, field


@dataclass
class Faults:
    """Intensities; all zero once the run has become quiet.

    Args:
        loss: chance that a request or a reply is lost.
        duplicate: chance that a request arrives once more.
        slow: chance that a message takes seconds.
        late_work: chance that a slow handler runs only after its session was let go and went on.
        cuts: how often a silo is cut off.
        kills: how often the coordinator is killed between two calls; by silo likewise.
        strikes: mean number of disk calls until a coordinator or silo dies at one; 0 for never.
        full: how often a disk is full for a while.
        fickle: whether a silo that starts again has another update.
        rot: chance that a bit of a masked vector has flipped when the coordinator starts again.
    """

    loss: float = 0.0
    duplicate: float = 0.0
    slow: float = 0.0
    late_work: float = 0.0
    cuts: int = 0
    kills: int = 0
    silo_kills: int = 0
    strikes: float = 0.0
    silo_strikes: float = 0.0
    full: int = 0
    fickle: bool = False
    rot: float = 0.0
    on: bool = True
    counts: Counter[str] = field(default_factory=Counter)

    @classmethod
    def draw(cls, rng: random.Random) -> Faults:
        """Choose which kinds there are, and how much of them."""
        share = rng.choice((0.25, 0.5, 0.75))
        bad = rng.choice((0.2, 0.5, 1.0))

        def some(most: float) -> float:
            return rng.uniform(0.1, 1.0) * bad * most if rng.random() < share else 0.0

        return cls(
            loss=some(0.15),
            duplicate=some(0.3),
            slow=some(0.15),
            late_work=some(0.5),
            cuts=round(some(8)),
            kills=round(some(5)),
            silo_kills=round(some(8)),
            strikes=rng.choice((15.0, 50.0, 150.0)) if rng.random() < share else 0.0,
            silo_strikes=rng.choice((4.0, 12.0, 40.0)) if rng.random() < share else 0.0,
            full=round(some(4)),
            fickle=rng.random() < share,
            rot=some(2.0),
        )

    def stop(self) -> None:
        """From now on all is well."""
        self.on = False
        self.loss = self.duplicate = self.slow = self.late_work = 0.0
        self.strikes = self.silo_strikes = self.rot = 0.0

    def count(self, what: str) -> None:
        """Note that a fault has happened."""
        self.counts[what] += 1

    def draw_strikes(self, rng: random.Random, mean: float) -> int | None:
        """After how many disk calls a process dies."""
        if not mean or rng.random() < 0.3:
            return None
        return int(rng.expovariate(1.0 / mean))
