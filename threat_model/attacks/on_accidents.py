"""What goes wrong without an adversary, or is done to a machine behind its back.

An accident counts as an attack that succeeds if a sum is wrong and nobody notices.

Source: Pillai et al., All File Systems Are Not Created Equal (OSDI 2014); Ristenpart and Yilek,
When Good Randomness Goes Bad (NDSS 2010).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from secagg.config import Phase, silo_id
from secagg.masking.messages import Dealt, Survivors
from secagg.wire._pb import service_pb2 as api
from threat_model.attacks.attack import Scene, attack
from threat_model.attacks.attempt import Attempt
from threat_model.attacks.evil_coordinator import BOUND, LENGTH, EvilCoordinator
from threat_model.attacks.evil_silo import Study
from threat_model.attacks.stage import Serving
from threat_model.attacks.weak import Function, nothing, replaced

UNCHECKED = replaced("secagg.encoding.layout:Layout.check_magnitude", nothing)


def sums_up(scene: Scene, broken: Any) -> bool:
    """Whether a sum comes out, with numbers in it, and is not the sum of what silos gave."""
    with EvilCoordinator(scene) as evil:
        evil.values[silo_id("a")] = broken
        evil.start()
        evil.await_ready(*evil.session.silos)
        total = Attempt(evil).to_masked().open(*evil.session.silos)
        found = evil.codec.decode(total).tensors["x"]
        wanted = sum(evil.values.values())
        return bool(np.isfinite(found).all()) and not np.allclose(found, wanted, atol=0.01)


@attack(threat="nonsense-input", reason="tensor-finite", weakening=UNCHECKED)
def numbers_that_are_none(scene: Scene) -> bool:
    """Silo a's training diverged: its update is NaN, and the sum of all silos is some number."""
    return sums_up(scene, np.full(LENGTH, np.nan))


@attack(threat="nonsense-input", reason="tensor-bound", weakening=UNCHECKED)
def numbers_beyond_the_bound(scene: Scene) -> bool:
    """Silo a's update is larger than the ring has room for: the sum wraps around."""
    return sums_up(scene, np.full(LENGTH, 1e6 * BOUND))


@attack(
    threat="damaged-state",
    reason="storage-damaged",
    weakening=replaced("secagg.coordinator.spool:Stored.check", nothing),
)
def bit_of_a_vector(scene: Scene) -> bool:
    """A bit flips in a vector on the coordinator's disk, while it is off for a moment."""
    with restarting(scene) as (study, restart):
        study.begin()
        study.to(Survivors)
        restart(flip)
        for _ in range(3):
            study.step()
        study.result("a")
        return not study.is_sum_of(study.session.silos)


Restart = Callable[..., None]


@contextmanager
def restarting(scene: Scene) -> Iterator[tuple[Study, Restart]]:
    """A study at a coordinator of its own, and a function that kills it and starts it again."""
    server = scene.stage.serve(scene.weakening)
    with ExitStack() as held, Study(scene, server) as study:
        held.callback(server.kill)

        def restart(meanwhile: Callable[[Path], None] = lambda _: None) -> None:
            study.server.kill()
            meanwhile(server.directory / "state" / "sessions")
            study.move(again(scene, server.directory))
            held.callback(study.server.kill)

        yield study, restart


def flip(directory: Path) -> None:
    """Change one bit of the greatest file, near the top of its second word."""
    file = max((f for f in directory.rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)
    data = bytearray(file.read_bytes())
    data[7] ^= 0x10
    file.write_bytes(data)


def again(scene: Scene, directory: Path) -> Serving:
    """Start the coordinator again.

    Raises:
        Refused: it does not start; with the code that it ends with.
    """
    try:
        return scene.stage.serve(scene.weakening, directory=directory)
    except RuntimeError as error:
        damaged = "storage-damaged" in str(error)
        raise scene.refuse("storage-damaged" if damaged else "no-start") from None


def writing_behind(real: Function) -> Function:
    """``Session._log`` that leaves commits to vectors for later."""

    def log(self: Any, make: Any, **more: Any) -> None:
        row = make()
        if not row.accepted.message.HasField("masked_input"):
            real(self, lambda: row, **more)

    return log


@attack(
    threat="acknowledged-and-lost",
    reason="found-again",
    weakening=replaced("secagg.coordinator.session:Session._log", writing_behind),
)
def killed_after_an_acknowledgement(scene: Scene) -> bool:
    """The coordinator says that it has a's vector, is killed at once, and has it no more."""
    with restarting(scene) as (study, restart):
        study.begin()
        study.to(Dealt)
        study.step("a")
        restart()
        shown = study.admin("ShowSession", api.ShowSessionRequest(name=study.session.name), "Admin")
        states = {silo.name: silo.state for silo in shown.silos}
        if states["a"] == f"{Phase.MASKED_INPUT} sent":
            raise scene.refuse("found-again", observed=str(states))
        return True


@attack(
    threat="rolled-back-ledger",
    reason="ledger-rolled-back",
    weakening=replaced("client_sdk.past:Past._check_memory", nothing),
)
def ledger_of_yesterday(scene: Scene) -> bool:
    """Silo a is set back to before a round that was opened with its update, and goes on."""
    with EvilCoordinator(scene, calls=2) as evil:
        evil.start()
        evil.await_ready("a")
        (ledger,) = evil.place("a").rglob("ledger.jsonl")
        yesterday = ledger.read_bytes()
        Attempt(evil).to_masked().conclude(*evil.session.silos)
        evil.await_ready("a")
        evil.end("a")
        assert len(ledger.read_bytes()) > len(yesterday)
        ledger.write_bytes(yesterday)
        evil.start_one(silo_id("a"), again=True)
        evil.await_ready("a")
        return ledger.read_bytes().startswith(yesterday)
