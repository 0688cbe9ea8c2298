"""A federation in memory: what it takes, what a round gives, and that it can be replayed."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from secagg.config import RingBits
from secagg.crypto.secret import Entropy
from secagg.errors import ConfigError, InputError, MalformedMessage, RoundAborted
from secagg.masking.server import ClientMessage
from secagg.ring.vectors import Vector
from secagg.simulation import Arrival, Federation, RoundResult, Script

Keyed = Callable[[int], Entropy]
PHASES = ("advertise_keys", "share_keys", "masked_input", "consistency", "unmasking")
ABC = ("a", "b", "c", "d")


def updates(names: tuple[str, ...] | list[str], *values: float) -> dict[str, dict[str, np.ndarray]]:
    """One element per silo; 1/8, 2/8, … where no values are given."""
    numbers = values or [(i + 1) / 8 for i in range(len(names))]
    return {n: {"x": np.array([v])} for n, v in zip(names, numbers, strict=True)}


def mean(result: RoundResult) -> float:
    return result.mean["x"].item()


def test_names_are_sorted_and_padded() -> None:
    assert Federation(3).silos == ["silo-0", "silo-1", "silo-2"]
    assert Federation(11).silos[:2] + Federation(11).silos[-1:] == ["silo-00", "silo-01", "silo-10"]
    assert Federation(10).silos[-1] == "silo-9"
    assert Federation(["zug", "bern", "aarau"]).silos == ["aarau", "bern", "zug"]


@pytest.mark.parametrize(
    ("code", "silos"),
    [
        ("name", ["a", "b", "C"]),
        ("name", ["a", "b", ""]),
        ("name", ["a", "b", "c_d"]),
        ("silos", ["a", "b", "b", "c"]),
        ("min-cohort", 2),
        ("min-cohort", 0),
        ("min-cohort", -1),
        ("min-cohort", ["a", "b"]),
        ("min-cohort", []),
    ],
)
def test_refuses_silos(code: str, silos: Any) -> None:
    with pytest.raises(ConfigError) as error:
        Federation(silos)
    assert error.value.code == code


@pytest.mark.parametrize(
    ("code", "options"),
    [
        ("option", {"protection": "plain"}),
        ("option", {"clip": "l1"}),
        ("option", {"mask_prg": "rc4"}),
        ("ring", {"ring_bits": 24}),
        ("number", {"bound": 0.0}),
        ("number", {"weight_cap": -1.0}),
        ("number", {"metrics": {"loss": float("inf")}}),
        ("name", {"metrics": {"Loss!": 1.0}}),
        ("threshold", {"threshold": "two thirds"}),
        ("threshold", {"threshold": "1/3"}),
        ("colluders", {"colluders": 0}),
        ("min-cohort", {"colluders": 3}),
    ],
)
def test_refuses_options(code: str, options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as error:
        Federation(4, **options)
    assert error.value.code == code


@pytest.mark.parametrize("protection", ["none", "plain", "CKKS", "ckks-54", "masked+ckks", ""])
def test_an_unknown_option_is_told_what_is_known(protection: str) -> None:
    known = re.escape(f"{protection!r} is none of: masked, ckks, ckks+masked.")
    with pytest.raises(ConfigError, match=known):
        Federation(4, protection)


@pytest.mark.parametrize(
    "arguments",
    [
        {"drops": {"nobody": "masked_input"}},
        {"weights": {"nobody": 1.0}},
        {"metrics": {"nobody": {}}},
        {"script": Script(drops={"nobody": "masked_input"})},
        {"script": Script(arrivals={("nobody", "masked_input"): Arrival.DELAYED})},
        {"script": Script(lies={("nobody", "masked_input"): lambda m, v: (m, v)})},
    ],
)
def test_an_unknown_silo_is_named(arguments: dict[str, Any]) -> None:
    """A misspelt fault or weight would be none."""
    federation = Federation(ABC)
    with pytest.raises(ConfigError, match="nobody") as error:
        federation.run_round(updates(ABC), **arguments)
    assert error.value.code == "silo-unknown"
    assert mean(federation.run_round(updates(ABC))) == 0.3125


def test_updates_of_unknown_silos_or_nobody() -> None:
    federation = Federation(ABC)
    for cohort in ((*ABC, "e"), ()):
        with pytest.raises(ConfigError) as error:
            federation.run_round(updates(cohort))
        assert error.value.code == "silo-unknown"


@pytest.mark.parametrize(
    "arguments",
    [
        {"drops": {"a": "masking"}},
        {"script": Script(arrivals={("a", "MASKED_INPUT"): Arrival.DELAYED})},
        {"script": Script(lies={("a", ""): lambda m, v: (m, v)})},
    ],
)
def test_an_unknown_phase(arguments: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as error:
        Federation(ABC).run_round(updates(ABC), **arguments)
    assert error.value.code == "option"
    assert "masked_input" in str(error.value)


def test_a_cohort_may_be_less_than_the_session() -> None:
    federation = Federation(5)
    result = federation.run_round(updates(federation.silos[1:4], 0.25, 0.5, 0.75))
    assert (mean(result), result.survivors) == (0.5, ["silo-1", "silo-2", "silo-3"])
    assert (result.dropouts, sorted(result.bytes_up)) == ([], result.survivors)


def test_a_cohort_of_two_is_refused_and_the_next_round_is_clean() -> None:
    federation = Federation(ABC)
    with pytest.raises(ConfigError) as error:
        federation.run_round(updates(("a", "b")))
    assert error.value.code == "threshold"
    assert mean(federation.run_round(updates(ABC))) == 0.3125


def test_default_weights_are_equal_and_at_the_cap() -> None:
    result = Federation(ABC, weight_cap=50).run_round(updates(ABC))
    assert (mean(result), result.weight) == (0.3125, 200)


def test_weights() -> None:
    federation = Federation(ABC, weight_cap=8)
    result = federation.run_round(updates(ABC), {"a": 1, "b": 2, "c": 4, "d": 1})
    assert mean(result) == pytest.approx((1 + 4 + 12 + 4) / 8 / 8, abs=2.0**-25)
    assert result.weight == pytest.approx(8, abs=1e-12)


def test_the_weight_of_a_dropout_does_not_count() -> None:
    federation = Federation(ABC, weight_cap=8)
    weights = {"a": 1, "b": 2, "c": 8, "d": 1}
    result = federation.run_round(updates(ABC), weights, {"c": "masked_input"})
    assert mean(result) == pytest.approx((1 + 4 + 4) / 8 / 4, abs=2.0**-25)
    assert (result.dropouts, result.weight) == (["c"], pytest.approx(4, abs=1e-12))


def test_metrics_are_means_by_weight_of_the_survivors() -> None:
    federation = Federation(ABC, weight_cap=4, metrics={"loss": 5.0, "acc": 1.0})
    metrics = {n: {"loss": float(i + 1), "acc": i / 4} for i, n in enumerate(ABC)}
    result = federation.run_round(
        updates(ABC), {"a": 1, "b": 2, "c": 4, "d": 1}, {"d": "share_keys"}, metrics=metrics
    )
    assert result.metrics == pytest.approx({"loss": 17 / 7, "acc": 2.5 / 7}, abs=1e-9)


@pytest.mark.parametrize(
    ("code", "arguments"),
    [
        ("weight", {"weights": {"c": 1001}}),
        ("weight", {"weights": {"c": 0}}),
        ("metric-names", {"metrics": {"a": {"loss": 1.0}}}),
        ("tensor-bound", {"updates": updates(ABC, 0.5, 0.5, 1.5, 0.5)}),
        ("tensor-finite", {"updates": updates(ABC, 0.5, 0.5, 0.5, float("nan"))}),
        ("tensor-shape", {"updates": {**updates(ABC), "d": {"x": np.zeros(2)}}}),
        ("tensor-names", {"updates": {**updates(ABC), "d": {"y": np.zeros(1)}}}),
    ],
)
def test_an_update_that_cannot_be_encoded(code: str, arguments: dict[str, Any]) -> None:
    federation = Federation(ABC)
    with pytest.raises(InputError) as error:
        federation.run_round(**({"updates": updates(ABC)} | arguments))
    assert error.value.code == code
    assert mean(federation.run_round(updates(ABC))) == 0.3125


def test_an_update_without_tensors() -> None:
    with pytest.raises(MalformedMessage):
        Federation(ABC).run_round({name: {} for name in ABC})


def test_shapes_may_change_between_rounds_and_updates_stay() -> None:
    federation = Federation(ABC)
    for shape in ((3,), (2, 2), ()):
        arrays = {n: {"x": np.full(shape, 0.5), "y": np.zeros((0, 2))} for n in ABC}
        result = federation.run_round(arrays)
        assert result.mean["x"].shape == shape
        assert result.mean["y"].shape == (0, 2)
        assert all((held["x"] == 0.5).all() for held in arrays.values())


@pytest.mark.parametrize("ring_bits", [16, 32, 64])
@pytest.mark.parametrize("mask_prg", ["aes-128-ctr", "chacha20"])
@pytest.mark.parametrize("drop", [None, "masked_input", "unmasking"])
def test_rings_and_generators(ring_bits: RingBits, mask_prg: str, drop: str | None) -> None:
    federation = Federation(ABC, ring_bits=ring_bits, mask_prg=mask_prg)
    result = federation.run_round(updates(ABC), drops={"b": drop} if drop else None)
    left = [i for i, name in enumerate(ABC) if drop != "masked_input" or name != "b"]
    assert result.total.dtype == np.dtype(f"<u{ring_bits // 8}")
    assert mean(result) == pytest.approx(sum((i + 1) / 8 for i in left) / len(left), abs=1e-15)


@pytest.mark.parametrize(("clip", "expected"), [("element", 0.75), ("l2", 0.75)])
def test_clipping(clip: str, expected: float) -> None:
    result = Federation(ABC, clip=clip).run_round(updates(ABC, 0.5, 3.0, 0.5, 1.0))
    assert mean(result) == pytest.approx(expected, abs=1e-8)


@pytest.mark.parametrize("threshold", ["1/2", "2/3", "3/4"])
def test_the_threshold_s_rule(threshold: str) -> None:
    """n = 8: the rules give t = 5, 6 and 7."""
    need = {"1/2": 5, "2/3": 6, "3/4": 7}[threshold]
    federation = Federation(8, threshold=threshold)
    names = federation.silos
    drops = dict.fromkeys(names[: 8 - need], "unmasking")
    assert len(federation.run_round(updates(names), drops=drops).survivors) == 8
    with pytest.raises(RoundAborted) as abort:
        federation.run_round(updates(names), drops=drops | {names[-1]: "unmasking"})
    assert (abort.value.phase, abort.value.have, abort.value.need) == ("unmasking", need - 1, need)


def test_more_colluders_raise_the_threshold() -> None:
    """2t > 6 + 3: t = 5 even where half would do for n_c = 1."""
    federation = Federation(6, threshold="1/2", colluders=3)
    drops = dict.fromkeys(federation.silos[:2], "consistency")
    with pytest.raises(RoundAborted) as abort:
        federation.run_round(updates(federation.silos), drops=drops)
    assert (abort.value.have, abort.value.need) == (4, 5)


@pytest.mark.parametrize(("ring_bits", "word"), [(16, 2), (32, 4), (64, 8)])
def test_bytes_up_are_the_words_and_little_more(ring_bits: RingBits, word: int) -> None:
    words = 200_000
    federation = Federation(ABC, ring_bits=ring_bits)
    result = federation.run_round({n: {"x": np.zeros(words)} for n in ABC})
    for sent in result.bytes_up.values():
        assert word * words < sent < word * words * 1.02


def test_bytes_up_stop_where_a_silo_fell_silent() -> None:
    federation = Federation(5)
    names = federation.silos
    sent = []
    for phase in (*PHASES, None):
        drops = {names[0]: phase} if phase else {}
        result = federation.run_round(updates(names), drops=drops)
        sent.append(result.bytes_up[names[0]])
    assert sent[0] == 0
    assert sent == sorted(set(sent))


def recorded(federation: Federation) -> tuple[str, list[RoundResult]]:
    """Everything that any silo sends in two rounds, as one digest, and what came of it."""
    seen = hashlib.sha256()

    def record(message: ClientMessage, vector: Vector | None) -> tuple[Any, Any]:
        seen.update(message.body() + message.signature)
        seen.update(b"" if vector is None else vector.tobytes())
        return message, vector

    names = federation.silos
    held = {n: {"x": np.linspace(-1, 1, 50) / (i + 3)} for i, n in enumerate(names)}
    script = Script(
        {names[1]: "masked_input"}, lies={(name, p): record for name in names for p in PHASES}
    )
    results = [federation.run_round(held, {names[0]: 0.3}, script=script) for _ in range(2)]
    return seen.hexdigest(), results


def test_a_run_replays(keyed: Keyed) -> None:
    """One seed gives every byte again; another gives other keys and other rounding."""
    one, again, other = (recorded(Federation(5, entropy=keyed(seed))) for seed in (1, 1, 2))
    assert one[0] == again[0] != other[0]
    for first, second, third in zip(one[1], again[1], other[1], strict=True):
        assert first.total.tolist() == second.total.tolist() != third.total.tolist()
        assert first.bytes_up == second.bytes_up == third.bytes_up
        assert first.mean["x"].tolist() == second.mean["x"].tolist()
        assert first.survivors == second.survivors == third.survivors


def test_rounds_share_no_randomness(keyed: Keyed) -> None:
    """The same updates twice: other rounding, other masks."""
    first, second = recorded(Federation(5, entropy=keyed(1)))[1]
    assert first.total.tolist() != second.total.tolist()


def test_all_randomness_is_the_entropy_s(keyed: Keyed) -> None:
    """Nothing else than the argument is drawn from: a source that ends, ends the run."""
    left = 10_000
    source = keyed(0)

    def entropy(size: int) -> bytes:
        nonlocal left
        left -= size
        if left < 0:
            raise EOFError
        return source(size)

    federation = Federation(3, entropy=entropy)
    assert 10_000 - left == 32 * (1 + 1 + 3)  # the coordinator, the session, three silos
    left = 100
    with pytest.raises(EOFError):
        federation.run_round(updates(federation.silos))
