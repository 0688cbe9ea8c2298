"""Configurations that exist are valid: every refusal by its code, every derived number exactly."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from secagg.config import (
    COHORT_FLOOR,
    MAX_CHUNK_BYTES,
    MAX_COHORT,
    MIN_FRACTION_BITS,
    Clip,
    MaskPrg,
    Metric,
    Phase,
    Policy,
    Protection,
    RingBits,
    SessionConfig,
    SiloId,
    TaskConfig,
    ThresholdRule,
    Weighting,
    fraction_bits,
    is_name,
    parse_table,
    parse_toml,
    silo_id,
)
from secagg.errors import ConfigError, PolicyRefused
from secagg.suite import Suite

NOT_POSITIVE = [0.0, -0.0, -1.0, math.nan, math.inf, -math.inf]


def task(**changes: Any) -> TaskConfig:
    return TaskConfig(
        **{
            "name": "model",
            "weighting": Weighting.MEAN,
            "rounds": 10,
            "ring_bits": 32,
            "bound": 4.0,
            "clip": Clip.NONE,
            "weight_cap": 100.0,
        }
        | changes
    )


def silos(n: int) -> tuple[SiloId, ...]:
    return tuple(SiloId(f"silo-{i:04}") for i in range(n))


def session(**changes: Any) -> SessionConfig:
    return SessionConfig(
        **{
            "name": "trial",
            "consortium": "clinics",
            "silos": silos(5),
            "protection": Protection.MASKED,
            "colluders": 1,
            "threshold": ThresholdRule(2, 3),
            "min_cohort": 3,
            "mask_prg": MaskPrg.AES_128_CTR,
            "tasks": (task(),),
        }
        | changes
    )


def policy(**changes: Any) -> Policy:
    return Policy(
        **{
            "colluders": 1,
            "min_cohort": 3,
            "min_threshold": 3,
            "protections": (Protection.MASKED,),
            "ring_bits": (32, 64),
            "clips": (Clip.NONE, Clip.L2),
            "max_weight_cap": 100.0,
        }
        | changes
    )


def refused(code: str, make: Callable[[], object]) -> ConfigError:
    with pytest.raises(ConfigError) as error:
        make()
    assert error.value.code == code
    return error.value


# --- names ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a", "0", "a-b", "a--b", "clinic-1", "a" * 63])
def test_names(name: str) -> None:
    assert is_name(name)
    assert silo_id(name) == name


@pytest.mark.parametrize(
    "name",
    [
        *("", "-", "-a", "a-", "A", "a_b", "a.b", "a b", "a\n", "\na", "a\0"),
        *("é", "а", "１", "a/b", "..", "a" * 64),
    ],
)
def test_bad_names(name: str) -> None:
    assert not is_name(name)
    error = refused("name", lambda: silo_id(name))
    assert "silo" in error.observed
    assert error.remedy
    refused("name", lambda: Metric(name, 1.0))
    refused("name", lambda: task(name=name))
    refused("name", lambda: session(name=name))
    refused("name", lambda: session(consortium=name))
    refused("name", lambda: session(silos=(*silos(3), SiloId(name))))


@given(st.text(max_size=70))
@settings(deadline=None)
def test_any_name_is_a_dns_label_or_refused(name: str) -> None:
    allowed = set("abcdefghijklmnopqrstuvwxyz0123456789-")
    label = 1 <= len(name) <= 63 and set(name) <= allowed and "-" not in (name[0], name[-1])
    assert is_name(name) == label


# --- the threshold --------------------------------------------------------------------------------

RULES = [ThresholdRule(1, 2), ThresholdRule(2, 3), ThresholdRule(3, 4), ThresholdRule(99, 100)]


@pytest.mark.parametrize("colluders", range(1, 11))
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_the_threshold_holds_for_every_cohort(rule: ThresholdRule, colluders: int) -> None:
    """It is the least t that the rule and the colluders allow, or there is none."""
    for n in range(1, MAX_COHORT + 1):
        fits = (
            t
            for t in range(math.floor(Fraction(n * rule.numerator, rule.denominator)) + 1, n + 1)
            if 2 * t > n + colluders and t >= colluders + 2
        )
        expected = next(fits, None)
        if expected is None:
            refused("threshold", lambda n=n: rule.threshold(n, colluders))
        else:
            assert rule.threshold(n, colluders) == expected


def test_two_thirds_with_one_colluder_is_the_textbook_s() -> None:
    for n in range(COHORT_FLOOR, MAX_COHORT + 1):
        assert ThresholdRule.parse("2/3").threshold(n, 1) == 2 * n // 3 + 1


@given(st.integers(1, 9999), st.integers(1, 9999), st.integers(1, 1024), st.integers(1, 1024))
@settings(deadline=None)
def test_no_two_quorums_share_colluders_only(a: int, b: int, n: int, colluders: int) -> None:
    if not b <= 2 * a < 2 * b:
        refused("threshold", lambda: ThresholdRule(a, b))
        return
    try:
        t = ThresholdRule(a, b).threshold(n, colluders)
    except ConfigError:
        assert n <= colluders or n < colluders + 2
        return
    assert t <= n
    assert 2 * t - n > colluders, "two sets of t share at least 2t − n, one of them honest"
    assert t - colluders >= 2, "a sum holds two honest updates"
    assert t > Fraction(a, b) * n


@pytest.mark.parametrize(
    ("numerator", "denominator"),
    [(1, 3), (499, 1000), (1, 1), (3, 2), (0, 1), (0, 0), (1, 0), (-1, -2), (-2, 3), (2, -3)],
)
def test_bad_fractions(numerator: int, denominator: int) -> None:
    refused("threshold", lambda: ThresholdRule(numerator, denominator))


@pytest.mark.parametrize("text", ["1/2", "2/3", "3/4", "9998/9999"])
def test_a_rule_reads_and_prints(text: str) -> None:
    assert str(ThresholdRule.parse(text)) == text
    assert ThresholdRule.read(text) == ThresholdRule.parse(text)
    assert ThresholdRule.read(7) == 7


@pytest.mark.parametrize(
    "text",
    [
        *("", "2", "0.66", "2 / 3", "2/3 ", "2/3\n", "02/3", "2/03", "-2/-3", "2/0", "２/3"),
        *("10000/10001", "1/3", "2/2", "3/2"),
    ],
)
def test_bad_rules(text: str) -> None:
    refused("threshold", lambda: ThresholdRule.parse(text))


# --- the fixed point ------------------------------------------------------------------------------


@given(st.sampled_from([16, 32, 64]), st.one_of(st.integers(1, 1024), st.integers(1, 2**62)))
@settings(deadline=None)
def test_fraction_bits_are_maximal_and_never_wrap(ring_bits: int, cohort: int) -> None:
    largest = 2 ** (ring_bits - 1) - 1
    if cohort * 2**MIN_FRACTION_BITS > largest:
        assert (
            "ring_bits" in refused("ring-capacity", lambda: fraction_bits(ring_bits, cohort)).remedy
        )
        return
    f = fraction_bits(ring_bits, cohort)
    assert f >= MIN_FRACTION_BITS == 4
    assert cohort * 2**f <= largest < cohort * 2 ** (f + 1)
    worst = cohort * 2**f
    for total in (worst, -worst):  # back from the ring, as two's complement
        word = total % 2**ring_bits
        assert (word - 2**ring_bits if word >= 2 ** (ring_bits - 1) else word) == total


@pytest.mark.parametrize(
    ("ring_bits", "cohort", "f"),
    [(16, 3, 13), (16, 1, 14), (16, 2, 13), (16, 1024, 4), (16, 2047, 4), (32, 8, 27), (64, 8, 59)],
)
def test_fraction_bits_at_known_points(ring_bits: int, cohort: int, f: int) -> None:
    assert fraction_bits(ring_bits, cohort) == f


def test_too_many_silos_for_16_bits() -> None:
    refused("ring-capacity", lambda: fraction_bits(16, 2048))


def test_every_possible_cohort_fits_every_ring() -> None:
    assert all(fraction_bits(w, n) for w in (16, 32, 64) for n in range(1, MAX_COHORT + 1))


# --- tasks ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", NOT_POSITIVE)
def test_bad_numbers(number: float) -> None:
    refused("number", lambda: Metric("loss", number))
    refused("number", lambda: task(bound=number))
    refused("number", lambda: task(weight_cap=number))
    refused("number", lambda: session(train_deadline=number))
    refused("number", lambda: session(phase_deadline=number))
    refused("number", lambda: policy(max_weight_cap=number))


@pytest.mark.parametrize("ring_bits", [0, 8, 15, 31, 33, 128, -32])
def test_bad_rings(ring_bits: int) -> None:
    refused("ring", lambda: task(ring_bits=ring_bits))


@pytest.mark.parametrize("rounds", [0, -1, 2**31])
def test_bad_rounds(rounds: int) -> None:
    refused("rounds", lambda: task(rounds=rounds))


@pytest.mark.parametrize("rounds", [1, 2**31 - 1])
def test_rounds_at_their_ends(rounds: int) -> None:
    assert task(rounds=rounds).rounds == rounds


@pytest.mark.parametrize("weight_cap", [0.5, 1.5, 2.0])
def test_a_sum_has_no_weights(weight_cap: float) -> None:
    assert task(weighting=Weighting.SUM, weight_cap=1.0)
    assert task(weighting=Weighting.MEAN, weight_cap=weight_cap)
    refused("weight-cap", lambda: task(weighting=Weighting.SUM, weight_cap=weight_cap))


def test_metrics_have_their_own_names() -> None:
    loss, accuracy = Metric("loss", 100.0), Metric("accuracy", 1.0)
    assert task(metrics=(loss, accuracy)).metrics == (loss, accuracy)
    refused("metric", lambda: task(metrics=(loss, Metric("loss", 1.0))))


# --- sessions -------------------------------------------------------------------------------------


def test_a_session_and_its_numbers() -> None:
    made = session()
    assert [made.threshold_for(n) for n in (3, 4, 5)] == [3, 3, 4]
    assert made.task("model") is made.tasks[0]
    unknown = refused("task-unknown", lambda: made.task("other"))
    assert "'other'" in unknown.observed
    assert "model" in unknown.remedy


@pytest.mark.parametrize(
    "names", [("b", "a", "c"), ("a", "a", "b"), ("a", "b", "c", "c"), ("c", "b", "a")]
)
def test_bad_silo_lists(names: tuple[str, ...]) -> None:
    refused("silos", lambda: session(silos=names))


def test_the_largest_cohort() -> None:
    assert len(session(silos=silos(MAX_COHORT), min_cohort=200).silos) == MAX_COHORT
    refused("silos", lambda: session(silos=silos(MAX_COHORT + 1), min_cohort=200))


@pytest.mark.parametrize("colluders", [0, -1])
def test_somebody_is_always_assumed_to_collude(colluders: int) -> None:
    refused("colluders", lambda: session(colluders=colluders))


@pytest.mark.parametrize("min_cohort", [-1, 0, 2, 6])
def test_bad_minimum_cohorts(min_cohort: int) -> None:
    refused("min-cohort", lambda: session(min_cohort=min_cohort))


def test_no_silos_at_all() -> None:
    refused("min-cohort", lambda: session(silos=()))


@pytest.mark.parametrize(("min_cohort", "colluders"), [(3, 2), (4, 3), (5, 4), (5, 100)], ids=str)
def test_a_threshold_must_exist_for_every_possible_cohort(min_cohort: int, colluders: int) -> None:
    refused("threshold", lambda: session(min_cohort=min_cohort, colluders=colluders))


def test_the_least_cohort_for_its_colluders_is_enough() -> None:
    assert session(min_cohort=4, colluders=2).threshold_for(4) == 4
    assert session(min_cohort=5, colluders=3).threshold_for(5) == 5


@pytest.mark.parametrize("chunk_bytes", [-64, 0, 1, 63, 65, 100, MAX_CHUNK_BYTES + 64, 2**23])
def test_bad_chunks(chunk_bytes: int) -> None:
    refused("chunk-bytes", lambda: session(chunk_bytes=chunk_bytes))


@pytest.mark.parametrize("chunk_bytes", [64, 128, 2**20, MAX_CHUNK_BYTES])
def test_chunks_at_their_ends(chunk_bytes: int) -> None:
    assert session(chunk_bytes=chunk_bytes).chunk_bytes == chunk_bytes


@pytest.mark.parametrize("attempts", [0, -1])
def test_bad_attempts(attempts: int) -> None:
    refused("max-attempts", lambda: session(max_attempts=attempts))


def test_tasks_have_their_own_names_and_there_is_one() -> None:
    refused("tasks", lambda: session(tasks=()))
    refused("tasks", lambda: session(tasks=(task(), task(rounds=3))))
    assert len(session(tasks=(task(), task(name="count"))).tasks) == 2


def test_a_session_whose_sums_could_wrap_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """Unreachable while MAX_COHORT · 2^4 < 2^15; were the cap raised, this still stands."""
    monkeypatch.setattr("secagg.config.MAX_COHORT", 4096)
    refused(
        "ring-capacity",
        lambda: session(silos=silos(2048), min_cohort=2047, tasks=(task(ring_bits=16),)),
    )


@pytest.mark.parametrize("value", [session(), task(), policy(), Metric("a", 1.0), RULES[0]])
def test_configurations_are_frozen(value: Any) -> None:
    field = dataclasses.fields(value)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(value, field, getattr(value, field))
    with pytest.raises((AttributeError, TypeError)):
        value.something_else = 1


def test_no_security_parameter_has_a_default() -> None:
    def defaulted(kind: type) -> set[str]:
        return {
            field.name
            for field in dataclasses.fields(kind)
            if field.default is not dataclasses.MISSING
            or field.default_factory is not dataclasses.MISSING
        }

    assert defaulted(SessionConfig) == {
        "chunk_bytes",
        "train_deadline",
        "phase_deadline",
        "max_attempts",
        "suite",
    }
    assert defaulted(TaskConfig) == {"metrics", "ring_bits"}
    assert defaulted(Policy) == {"repeat_sessions", "key_directory"}
    assert defaulted(Metric) == defaulted(ThresholdRule) == set()


def test_a_suite_or_a_word_size_left_out_is_none_and_stands_for_nothing() -> None:
    """Both are None by default, and each is required where it counts: never filled in."""
    bare = {field.name: getattr(task(), field.name) for field in dataclasses.fields(TaskConfig)}
    del bare["ring_bits"]
    wordless = TaskConfig(**bare)
    assert wordless.ring_bits is None
    refused("ring", lambda: session(tasks=(wordless,)))
    refused("ring", lambda: session(tasks=(task(), replace(wordless, name="count"))))
    for protection in (Protection.CKKS, Protection.CKKS_MASKED):
        error = refused("suite", lambda p=protection: session(protection=p, tasks=(wordless,)))
        assert f"protection = {protection}" in error.observed
        assert "ckks-54" in error.remedy
    assert session().suite is None
    assert policy().key_directory is None


RING_BITS: tuple[RingBits | None, ...] = (None, 16, 32, 64)


@pytest.mark.parametrize("protection", Protection)
@pytest.mark.parametrize("suite", [None, *Suite])
@pytest.mark.parametrize("first", RING_BITS)
@pytest.mark.parametrize("second", RING_BITS)
def test_protection_suite_and_words_agree_or_there_is_no_session(
    protection: Protection, suite: Suite | None, first: RingBits | None, second: RingBits | None
) -> None:
    """Every combination, with two tasks: sealing needs the suite and no words, masking the words
    of every task and no suite."""
    tasks = (task(ring_bits=first), task(name="count", ring_bits=second))

    def make() -> SessionConfig:
        return session(protection=protection, suite=suite, tasks=tasks)

    seals = protection is not Protection.MASKED
    if (suite is not None) != seals:
        error = refused("suite", make)
        assert f"suite = {suite}" in error.observed
    elif [first is None, second is None] != [seals, seals]:
        error = refused("ring", make)
        wrong = first if (first is None) != seals else second
        assert f"ring_bits = {wrong}" in error.observed
        assert str(protection) in error.observed
    else:
        assert make().protection.seals is seals
        return
    assert error.remedy


def test_what_each_protection_is() -> None:
    assert {p.value: (p.masks, p.seals) for p in Protection} == {
        "masked": (True, False),
        "ckks": (False, True),
        "ckks+masked": (True, True),
    }


def sealed(**changes: Any) -> SessionConfig:
    values = {"protection": Protection.CKKS, "suite": Suite.CKKS_54}
    return session(**values | {"tasks": (task(ring_bits=None),)} | changes)


def test_capacity_is_proven_for_the_largest_possible_cohort(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Unreachable while the suite has room for MAX_COHORT; were the cap raised, it still stands."""
    assert len(sealed(silos=silos(MAX_COHORT), min_cohort=200).silos) == MAX_COHORT
    monkeypatch.setattr("secagg.config.MAX_COHORT", 4096)
    assert sealed(silos=silos(362), min_cohort=200).suite is Suite.CKKS_54
    error = refused("ckks-capacity", lambda: sealed(silos=silos(363), min_cohort=200))
    assert "363 silos" in error.observed


@pytest.mark.parametrize("protection", [Protection.CKKS, Protection.CKKS_MASKED])
def test_a_sealed_session_file(protection: Protection) -> None:
    text = SESSION_TOML.replace('"masked"', f'"{protection}"\nsuite = "ckks-54"')
    text = text.replace("ring_bits = 32\n", "")
    read = parse_toml(SessionConfig, text, "session.toml")
    assert read == sealed(protection=protection)
    table = json.loads(json.dumps(dataclasses.asdict(read)))
    assert parse_table(SessionConfig, table, "session") == read
    for wrong in ('"ckks-55"', '""', '"CKKS-54"', "54", "false", '["ckks-54"]'):
        bad = text.replace('"ckks-54"', wrong)
        refused("config-file", lambda bad=bad: parse_toml(SessionConfig, bad, "session.toml"))


def test_the_phases_in_order() -> None:
    assert [phase.value for phase in Phase] == [
        "advertise_keys",
        "share_keys",
        "masked_input",
        "consistency",
        "unmasking",
    ]


# --- policies -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {"colluders": 0},
        {"colluders": -1},
        {"min_cohort": 2},
        {"min_threshold": 2},
        {"min_threshold": 0},
        {"colluders": 2, "min_threshold": 3},
    ],
    ids=str,
)
def test_bad_policies(changes: dict[str, int]) -> None:
    refused("policy", lambda: policy(**changes))


@pytest.mark.parametrize(
    ("code", "floors", "changes"),
    [
        ("policy-protection", {"protections": ()}, {}),
        ("policy-protection", {"protections": (Protection.CKKS, Protection.CKKS_MASKED)}, {}),
        ("policy-colluders", {"colluders": 2, "min_threshold": 4}, {}),
        ("policy-min-cohort", {"min_cohort": 4}, {}),
        ("policy-ring", {}, {"ring_bits": 16}),
        ("policy-ring", {"ring_bits": ()}, {}),
        ("policy-clip", {}, {"clip": Clip.ELEMENT}),
        ("policy-weight-cap", {}, {"weight_cap": 100.5}),
        ("policy-weight-cap", {"max_weight_cap": 99.0}, {}),
    ],
    ids=str,
)
def test_each_floor_of_a_policy_against_a_session(
    code: str, floors: dict[str, Any], changes: dict[str, Any]
) -> None:
    policy().check_session(session())
    first_good = session(tasks=(task(name="good", weight_cap=1.0), task(**changes)))
    with pytest.raises(PolicyRefused) as error:
        policy(**floors).check_session(first_good)
    assert error.value.code == code
    assert error.value.remedy


@pytest.mark.parametrize("wanted", Protection)
@pytest.mark.parametrize(
    "allowed",
    [subset for size in range(4) for subset in itertools.combinations((*Protection,), size)],
    ids=lambda names: ",".join(names) or "none",
)
def test_a_silo_takes_part_in_the_protections_that_its_policy_names(
    wanted: Protection, allowed: tuple[Protection, ...]
) -> None:
    """Plain ckks above all: no other protection of the list stands for it."""
    asked = session() if wanted is Protection.MASKED else sealed(protection=wanted)
    mine = policy(protections=allowed)
    if wanted in allowed:
        mine.check_session(asked)
        return
    with pytest.raises(PolicyRefused) as error:
        mine.check_session(asked)
    assert error.value.code == "policy-protection"
    assert f"protection = {wanted}" in error.value.observed


def test_word_sizes_of_a_policy_are_of_masked_sums_alone() -> None:
    mine = policy(protections=tuple(Protection), ring_bits=())
    mine.check_session(sealed())
    mine.check_session(sealed(protection=Protection.CKKS_MASKED))
    with pytest.raises(PolicyRefused) as error:
        mine.check_session(session())
    assert error.value.code == "policy-ring"


@pytest.mark.parametrize(
    ("code", "changes"),
    [("policy-clip", {"clip": Clip.ELEMENT}), ("policy-weight-cap", {"weight_cap": 100.5})],
)
def test_other_floors_hold_for_sealed_tasks_too(code: str, changes: dict[str, Any]) -> None:
    tasks = (task(ring_bits=None), task(name="second", ring_bits=None, **changes))
    with pytest.raises(PolicyRefused) as error:
        policy(protections=(Protection.CKKS,)).check_session(sealed(tasks=tasks))
    assert error.value.code == code


def test_floors_at_their_ends_allow() -> None:
    policy(min_cohort=3, max_weight_cap=100.0).check_session(session(min_cohort=3))
    policy().check_session(session(colluders=2, min_cohort=4))
    policy().check_session(session(min_cohort=5))
    policy().check_session(session(tasks=(task(clip=Clip.L2, ring_bits=64, weight_cap=0.5),)))


@pytest.mark.parametrize(
    ("code", "floors", "n", "t"),
    [
        pytest.param("policy-cohort", {"min_cohort": 5}, 4, 4, id="cohort"),
        pytest.param("policy-cohort", {}, 2, 2, id="pair"),
        pytest.param("policy-threshold", {"min_threshold": 4}, 4, 3, id="own floor"),
        pytest.param("policy-threshold", {}, 5, 3, id="2t = n + n_c"),
        pytest.param("policy-threshold", {}, 9, 3, id="2t < n + n_c"),
        pytest.param("policy-threshold", {}, 3, 2, id="t < n_c + 2"),
        pytest.param("policy-threshold", {}, 3, 0, id="zero"),
        pytest.param("policy-threshold", {}, 3, -3, id="negative"),
    ],
)
def test_each_floor_of_a_policy_against_a_cohort(
    code: str, floors: dict[str, int], n: int, t: int
) -> None:
    with pytest.raises(PolicyRefused) as error:
        policy(**floors).check_cohort(n, t)
    assert error.value.code == code


@given(
    st.integers(1, 8),
    st.integers(3, 20),
    st.integers(0, 20),
    st.integers(0, 24),
    st.integers(0, 24),
)
@settings(deadline=None)
def test_a_policy_allows_exactly_the_cohorts_that_hold(
    colluders: int, min_cohort: int, above: int, n: int, t: int
) -> None:
    mine = policy(colluders=colluders, min_cohort=min_cohort, min_threshold=colluders + 2 + above)
    holds = (
        n >= min_cohort and t >= mine.min_threshold and 2 * t > n + colluders and t >= colluders + 2
    )
    try:
        mine.check_cohort(n, t)
        allowed = True
    except PolicyRefused:
        allowed = False
    assert allowed == holds


# --- files ----------------------------------------------------------------------------------------

SESSION_TOML = """
name = "trial"
consortium = "clinics"
silos = ["silo-0000", "silo-0001", "silo-0002", "silo-0003", "silo-0004"]
protection = "masked"
colluders = 1
threshold = "2/3"
min_cohort = 3
mask_prg = "aes-128-ctr"

[[tasks]]
name = "model"
weighting = "mean"
rounds = 10
ring_bits = 32
bound = 4
clip = "none"
weight_cap = 100.0
"""

POLICY_TOML = """
colluders = 1
min_cohort = 3
min_threshold = 3
protections = ["masked"]
ring_bits = [32, 64]
clips = ["none", "l2"]
max_weight_cap = 100
"""


def test_a_session_file() -> None:
    assert parse_toml(SessionConfig, SESSION_TOML, "session.toml") == session()
    metrics = '\nmetrics = [{name = "loss", bound = 2.5}]'
    read = parse_toml(SessionConfig, SESSION_TOML + metrics, "session.toml")
    assert read.tasks[0].metrics == (Metric("loss", 2.5),)
    assert isinstance(read.tasks[0].bound, float)


def test_a_policy_file() -> None:
    assert parse_toml(Policy, POLICY_TOML, "policy.toml") == policy()
    named = parse_toml(Policy, POLICY_TOML + 'repeat_sessions = ["trial"]', "policy.toml")
    assert named == policy(repeat_sessions=("trial",))
    kept = parse_toml(Policy, POLICY_TOML + 'key_directory = "keys"', "policy.toml")
    assert kept == policy(key_directory="keys")
    for bad in ('protections = ["ckks", "none"]', 'protections = "ckks"'):
        text = POLICY_TOML.replace('protections = ["masked"]', bad)
        refused("config-file", lambda text=text: parse_toml(Policy, text, "policy.toml"))


def test_a_table_that_came_as_json() -> None:
    table = dataclasses.asdict(session())
    assert parse_table(SessionConfig, json.loads(json.dumps(table)), "session") == session()


def change(old: str, new: str) -> str:
    assert SESSION_TOML.count(old) >= 1
    return SESSION_TOML.replace(old, new, 1)


@pytest.mark.parametrize(
    ("text", "place"),
    [
        pytest.param(change("colluders", "coluders = 1\ncolluders"), "coluders", id="unknown key"),
        pytest.param(SESSION_TOML + "\nweigth = 1", "tasks.0.weigth", id="unknown key in a task"),
        pytest.param(
            SESSION_TOML + '\nmetrics = [{name = "a", bound = 1, unit = "m"}]',
            "tasks.0.metrics.0.unit",
            id="unknown key in a metric",
        ),
        pytest.param(
            change('"2/3"', "{numerator = 2, denominator = 3, of = 4}"),
            "threshold.of",
            id="unknown key in a rule",
        ),
        pytest.param(change("colluders = 1", ""), "colluders", id="missing colluders"),
        pytest.param(change('threshold = "2/3"', ""), "threshold", id="missing threshold"),
        pytest.param(change("min_cohort = 3", ""), "min_cohort", id="missing min_cohort"),
        pytest.param(change('clip = "none"', ""), "tasks.0.clip", id="missing clip"),
        pytest.param(change("colluders = 1", 'colluders = "1"'), "colluders", id="text for int"),
        pytest.param(change("colluders = 1", "colluders = 1.0"), "colluders", id="float for int"),
        pytest.param(change("colluders = 1", "colluders = true"), "colluders", id="bool for int"),
        pytest.param(change("bound = 4", "bound = true"), "tasks.0.bound", id="bool for float"),
        pytest.param(change("bound = 4", 'bound = "4"'), "tasks.0.bound", id="text for float"),
        pytest.param(change('"trial"', "7"), "name", id="int for text"),
        pytest.param(change('"trial"', "['trial']"), "name", id="list for text"),
        pytest.param(change('"silo-0000"', "0"), "silos.0", id="int in a list of text"),
        pytest.param(change('"2/3"', "0.66"), "threshold", id="float for a rule"),
        pytest.param(
            change('"2/3"', "{numerator = true, denominator = 2}"),
            "threshold.numerator",
            id="bool in a rule",
        ),
        pytest.param(change('"masked"', '"none"'), "protection", id="bad protection"),
        pytest.param(change('"masked"', '"MASKED"'), "protection", id="enum's case"),
        pytest.param(change('"aes-128-ctr"', '"rc4"'), "mask_prg", id="bad generator"),
        pytest.param(change('"none"', '"clamp"'), "tasks.0.clip", id="bad clip"),
        pytest.param(change('"mean"', '"median"'), "tasks.0.weighting", id="bad weighting"),
        pytest.param(change("= 32", "= 24"), "tasks.0.ring_bits", id="bad ring"),
        pytest.param(change("= 32", '= "32"'), "tasks.0.ring_bits", id="text for ring"),
        pytest.param("", "name", id="empty"),
    ],
)
def test_bad_files(text: str, place: str) -> None:
    error = refused("config-file", lambda: parse_toml(SessionConfig, text, "session.toml"))
    assert error.observed.startswith(f"session.toml: {place}: ")


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("name = ", id="no value"),
        pytest.param("name", id="no equals"),
        pytest.param("[", id="bracket"),
        pytest.param("a = 1\na = 2", id="twice"),
        pytest.param('{"name": "trial"}', id="json"),
        pytest.param("a = 1979-13-45", id="no date"),
        pytest.param("a = " + "9" * 5000, id="5000 digits"),
        pytest.param("a = " + "[" * 100_000, id="nested"),
        pytest.param("\0", id="nul"),
    ],
)
def test_bad_toml(text: str) -> None:
    error = refused("config-file", lambda: parse_toml(SessionConfig, text, "session.toml"))
    assert error.observed.startswith("session.toml is not TOML: ")


@pytest.mark.parametrize("value", ["1979-05-27", "07:32:00", "1979-05-27T07:32:00Z"])
def test_a_date_is_no_name(value: str) -> None:
    """TOML has dates; 1979-05-27 without quotes would else pass for a well-formed name."""
    text = change('"trial"', value)
    error = refused("config-file", lambda: parse_toml(SessionConfig, text, "session.toml"))
    assert error.observed.startswith("session.toml")


def test_a_number_of_thousands_of_digits_is_refused() -> None:
    text = change("rounds = 10", "rounds = 0x" + "f" * 5000)
    refused("config-file", lambda: parse_toml(SessionConfig, text, "session.toml"))


@pytest.mark.parametrize("number", ["nan", "inf", "-inf", "-1.0", "0.0", "1e999", "1" + "0" * 400])
@pytest.mark.parametrize("key", ["bound = 4", "weight_cap = 100.0"])
def test_bad_numbers_in_a_file(key: str, number: str) -> None:
    text = change(key, f"{key.partition('=')[0]} = {number}")
    refused("number", lambda: parse_toml(SessionConfig, text, "session.toml"))


@pytest.mark.parametrize(
    ("code", "old", "new"),
    [
        ("threshold", '"2/3"', '"1/3"'),
        ("threshold", '"2/3"', '"two thirds"'),
        ("threshold", "colluders = 1", "colluders = 4"),
        ("colluders", "colluders = 1", "colluders = 0"),
        ("min-cohort", "min_cohort = 3", "min_cohort = 2"),
        ("name", '"trial"', '"Trial"'),
        ("rounds", "rounds = 10", "rounds = 0"),
        ("weight-cap", '"mean"', '"sum"'),
        ("silos", '"silo-0001"', '"silo-0000"'),
    ],
)
def test_what_cannot_be_right_keeps_its_own_code(code: str, old: str, new: str) -> None:
    refused(code, lambda: parse_toml(SessionConfig, change(old, new), "session.toml"))


@given(st.text(max_size=60))
@settings(deadline=None)
def test_any_text_is_a_configuration_or_refused(text: str) -> None:
    refused_or_read: object
    try:
        refused_or_read = parse_toml(Metric, text, "metric.toml")
    except ConfigError as error:
        refused_or_read = error
    assert isinstance(refused_or_read, Metric | ConfigError)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=6,
)


@given(st.sampled_from(["name", "bound"]), JSON)
@settings(deadline=None)
def test_any_value_of_a_key_is_right_or_refused(key: str, value: object) -> None:
    table = {"name": "loss", "bound": 1.5} | {key: value}
    try:
        made = parse_table(Metric, table, "metric")
    except ConfigError:
        return
    assert is_name(made.name)
    assert type(made.bound) is float
    assert 0 < made.bound < math.inf
    assert getattr(made, key) == (float(value) if key == "bound" else value)
