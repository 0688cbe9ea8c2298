"""The three protections side by side: the mean of the survivors, and who is caught at what."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from secagg.config import Phase, Protection, SiloId
from secagg.crypto.digest import vector_digest
from secagg.crypto.labels import SIGN_DESCRIPTOR, SIGN_MASKED_INPUT, SIGN_RESULT
from secagg.errors import (
    ConfigError,
    FaultyClient,
    FaultyServer,
    InputError,
    MalformedMessage,
    RoundAborted,
    SecaggError,
    TooLate,
)
from secagg.masking import transcript
from secagg.masking.messages import Descriptor, MaskedInput, Result, Survivors
from secagg.simulation import Arrival, Federation, Lie, RoundResult, Script
from secagg.suite import KeyName, Suite

pytestmark = pytest.mark.usefixtures("signatures_once")

NAMES = ("a", "b", "c", "d", "e")
"""n = 5, so t = 4: one may fall out."""
LIAR = "b"
HONEST = [name for name in NAMES if name != LIAR]
SEALED = ["ckks", "ckks+masked"]
ALL = ["masked", *SEALED]
EXACT = 1e-6
Q = Suite.CKKS_54.parameters.modulus
PHASES = {how: [phase.value for phase in Protection(how).phases] for how in ALL}
GRID = [(how, phase) for how in ALL for phase in (*PHASES[how], None)]


def held(names: tuple[str, ...] = NAMES, size: int = 6, seed: int = 0) -> dict[str, Any]:
    """Two tensors for each silo, within ±1."""
    rng = np.random.default_rng(seed)
    return {
        name: {"w": rng.uniform(-1, 1, (size // 2, 2)), "b": rng.uniform(-1, 1, ())}
        for name in names
    }


def assert_mean(
    result: RoundResult, updates: dict[str, Any], weights: dict[str, float], names: list[str]
) -> None:
    """NumPy's mean of these silos' arrays, and nothing else's."""
    assert result.survivors == names
    assert result.dropouts == sorted(set(updates) - set(names))
    total = sum(weights[name] for name in names)
    assert result.weight == pytest.approx(total, abs=1e-4)
    for tensor in ("b", "w"):
        arrays = [updates[name][tensor] for name in names]
        mean = np.average(arrays, axis=0, weights=[weights[name] for name in names])
        assert result.mean[tensor].shape == mean.shape
        np.testing.assert_allclose(result.mean[tensor], mean, rtol=0, atol=EXACT)


def equal(weight: float = 1000.0) -> dict[str, float]:
    return dict.fromkeys(NAMES, weight)


def refusals(federation: Federation, name: str) -> list[tuple[type[SecaggError], str]]:
    return [(type(error), error.code) for error in federation.silo(name).refusals]


def assert_nobody_else_complains(federation: Federation, *but: str) -> None:
    found = {name: refusals(federation, name) for name in NAMES if name not in but}
    assert not any(found.values()), found


# The mean.


@pytest.mark.parametrize("prg", ["aes-128-ctr", "chacha20"])
@pytest.mark.parametrize(("protection", "phase"), GRID)
def test_one_dropout_in_any_phase_leaves_the_mean_of_the_rest(
    protection: str, phase: str | None, prg: str
) -> None:
    federation = Federation(NAMES, protection, mask_prg=prg)
    updates = held()
    result = federation.run_round(updates, drops={} if phase is None else {LIAR: phase})
    late = phase in (None, "consistency", "unmasking")
    assert_mean(result, updates, equal(), list(NAMES) if late else HONEST)
    assert_nobody_else_complains(federation)
    updates = held(seed=1)
    assert_mean(federation.run_round(updates), updates, equal(), list(NAMES))


@pytest.mark.parametrize(
    ("protection", "phase"), [(how, phase) for how, phase in GRID if phase is not None]
)
def test_two_dropouts_are_too_many_and_the_next_round_is_clean(protection: str, phase: str) -> None:
    federation = Federation(NAMES, protection)
    updates = held()
    with pytest.raises(RoundAborted) as abort:
        federation.run_round(updates, drops={"a": phase, "d": phase})
    assert (abort.value.phase, abort.value.have, abort.value.need) == (phase, 3, 4)
    assert_mean(federation.run_round(updates), updates, equal(), list(NAMES))
    with pytest.raises(RoundAborted):
        federation.run_round(updates, drops={"a": phase, "d": phase})
    again = federation.run_round(updates, same_base=True)
    assert_mean(again, updates, equal(), list(NAMES))


@pytest.mark.parametrize("protection", ALL)
def test_any_pattern_of_dropouts_ends_in_the_oracle_s_mean_or_abort(protection: str) -> None:
    """It knows nothing of the code: only t = 4 and who was still there."""
    federation, source = Federation(NAMES, protection), random.Random(3)
    phases, sums, aborts = PHASES[protection], 0, 0
    for number in range(24):
        silent = {name: source.randrange(len(phases)) for name in NAMES if source.random() < 0.25}
        updates = held(seed=number)
        left = [sum(silent.get(name, 9) > at for name in NAMES) for at in range(len(phases))]
        short = next((at for at, have in enumerate(left) if have < 4), None)
        drops = {name: phases[at] for name, at in silent.items()}
        if short is not None:
            with pytest.raises(RoundAborted) as abort:
                federation.run_round(updates, drops=drops)
            assert (abort.value.phase, abort.value.have) == (phases[short], left[short]), silent
            aborts += 1
        else:
            result = federation.run_round(updates, drops=drops)
            upload = phases.index("masked_input")
            names = [name for name in NAMES if silent.get(name, 9) > upload]
            assert_mean(result, updates, equal(), names)
            sums += 1
        assert_nobody_else_complains(federation)
    assert sums >= 5
    assert aborts >= 5


@pytest.mark.parametrize("protection", ALL)
def test_weights_metrics_and_clipping(protection: str) -> None:
    federation = Federation(
        NAMES,
        protection,
        bound=0.5,
        clip="element",
        weight_cap=40,
        metrics={"loss": 5.0, "acc": 1.0},
    )
    updates = held()
    weights = {name: 8.0 * (i + 1) for i, name in enumerate(NAMES)}
    metrics = {name: {"loss": 1.0 + i, "acc": i / 8} for i, name in enumerate(NAMES)}
    result = federation.run_round(updates, weights, {"d": "masked_input"}, metrics=metrics)
    clipped = {
        name: {tensor: np.clip(array, -0.5, 0.5) for tensor, array in tensors.items()}
        for name, tensors in updates.items()
    }
    left = ["a", "b", "c", "e"]
    assert_mean(result, clipped, weights, left)
    total = sum(weights[name] for name in left)
    for metric, found in result.metrics.items():
        mean = sum(weights[name] * metrics[name][metric] for name in left) / total
        assert found == pytest.approx(mean, abs=EXACT)


@pytest.mark.parametrize("protection", SEALED)
@pytest.mark.parametrize("size", [4090, 4092, 4094, 9000])
def test_updates_that_end_at_a_ciphertext_s_border(protection: str, size: int) -> None:
    """size + 1 elements and two scalars in 4,095 values each; 8 bytes a word and little more."""
    federation = Federation(3, protection)
    names = tuple(federation.silos)
    updates = held(names, size)
    result = federation.run_round(updates)
    assert_mean(result, updates, dict.fromkeys(names, 1000.0), list(names))
    ciphertexts = -(-(size + 3) // 4095)
    assert len(result.total) == 4096 * ciphertexts
    assert result.total.dtype == np.dtype("<u8")
    assert int(result.total.max()) < Q
    for sent in result.bytes_up.values():
        assert 8 * len(result.total) < sent < 8 * len(result.total) + 3000


@pytest.mark.parametrize("protection", SEALED)
def test_every_silo_at_the_bound(protection: str) -> None:
    """The greatest sum there is, of either sign: no coefficient wraps."""
    federation = Federation(NAMES, protection, bound=300.0)
    for sign in (1.0, -1.0):
        updates = {name: {"x": np.full(4092, sign * 300.0)} for name in NAMES}
        result = federation.run_round(updates)
        np.testing.assert_allclose(result.mean["x"], sign * 300.0, rtol=0, atol=300 * EXACT)


@pytest.mark.parametrize("protection", SEALED)
def test_the_sum_opens_with_the_silos_key_and_the_survivors_seeds_alone(protection: str) -> None:
    """The coordinator holds residues that tell it nothing: other seeds or keys open to noise."""
    federation, other = Federation(NAMES, protection), Federation(NAMES, protection)
    updates = held()
    result = federation.run_round(updates, drops={"d": "masked_input"})
    seeds = [federation.silo(name).seed for name in ("a", "b", "c", "e")]
    list(federation.sealer.open(result.total, seeds, 9, 1024))
    for sealer, wrong in (
        (other.sealer, seeds),
        (federation.sealer, [*seeds[1:], federation.silo("d").seed]),
        (federation.sealer, seeds[1:]),
    ):
        with pytest.raises(MalformedMessage) as caught:
            list(sealer.open(result.total, wrong, 9, 1024))
        assert caught.value.code == "reserved-slot"


@pytest.mark.parametrize("protection", SEALED)
def test_a_contribution_under_another_key_spoils_the_round_visibly(protection: str) -> None:
    federation, other = Federation(NAMES, protection), Federation(NAMES, protection)
    honest = federation.sealer

    class Mixed:
        """The second silo that seals has another key than the others."""

        count = 0

        def seal(self, *arguments: Any) -> Any:
            self.count += 1
            return (other.sealer if self.count == 2 else honest).seal(*arguments)

        def open(self, *arguments: Any) -> Any:
            return honest.open(*arguments)

    federation.sealer = Mixed()  # type: ignore[assignment]
    with pytest.raises(MalformedMessage) as caught:
        federation.run_round(held())
    assert caught.value.code == "reserved-slot"
    federation.sealer = honest
    updates = held(seed=2)
    assert_mean(federation.run_round(updates), updates, equal(), list(NAMES))


# Options.


def test_only_silos_have_a_key_and_only_where_updates_are_sealed() -> None:
    assert Federation(NAMES).key is None
    for protection in SEALED:
        key = Federation(NAMES, protection).key
        assert key is not None
        assert key.name.epoch == 1
        assert sorted(key.members) == list(NAMES)


@pytest.mark.parametrize("protection", SEALED)
@pytest.mark.parametrize("bits", [16, 32, 64])
def test_a_suite_brings_its_own_ring(protection: str, bits: int) -> None:
    with pytest.raises(ConfigError) as error:
        Federation(NAMES, protection, ring_bits=bits)  # type: ignore[arg-type]
    assert error.value.code == "ring"


@pytest.mark.parametrize("phase", ["share_keys", "unmasking"])
@pytest.mark.parametrize(
    "fault",
    [
        lambda phase: {"drops": {"a": phase}},
        lambda phase: {"script": Script(arrivals={("a", phase): Arrival.DELAYED})},
        lambda phase: {"script": Script(lies={("a", phase): lambda m, v: (m, v)})},
    ],
    ids=["drop", "arrival", "lie"],
)
def test_a_fault_in_a_phase_that_never_comes_would_be_none(
    phase: str, fault: Callable[[str], dict[str, Any]]
) -> None:
    federation = Federation(NAMES, "ckks")
    with pytest.raises(ConfigError, match=f"no {phase} under ckks") as error:
        federation.run_round(held(), **fault(phase))
    assert error.value.code == "option"
    Federation(NAMES, "ckks+masked").run_round(held(), **fault(phase))


@pytest.mark.parametrize("protection", SEALED)
def test_an_update_that_cannot_be_encoded(protection: str) -> None:
    federation = Federation(NAMES, protection)
    for bad in (1.5, float("nan")):
        updates = held()
        updates["c"]["b"] = np.array(bad)
        with pytest.raises(InputError):
            federation.run_round(updates)
    updates = held()
    assert_mean(federation.run_round(updates), updates, equal(), list(NAMES))


# Arrivals and liars.


@pytest.mark.parametrize(
    ("protection", "phase"), [(how, phase) for how in SEALED for phase in PHASES[how]]
)
def test_a_late_message_is_nobody_s_fault_and_never_added(protection: str, phase: str) -> None:
    federation = Federation(NAMES, protection)
    updates = held()
    script = Script(arrivals={(LIAR, phase): Arrival.DELAYED})
    result = federation.run_round(updates, script=script)
    late = phase in ("consistency", "unmasking")
    assert_mean(result, updates, equal(), list(NAMES) if late else HONEST)
    assert refusals(federation, LIAR) == [(TooLate, "phase-closed")]
    assert_nobody_else_complains(federation, LIAR)


@pytest.mark.parametrize("protection", SEALED)
def test_every_message_twice_counts_once(protection: str) -> None:
    federation = Federation(NAMES, protection)
    updates = held()
    twice = {(n, phase): Arrival.DUPLICATED for n in NAMES for phase in PHASES[protection]}
    result = federation.run_round(updates, script=Script(arrivals=twice))
    assert_mean(result, updates, equal(), list(NAMES))
    assert_nobody_else_complains(federation)


def resigned(federation: Federation, **changes: Any) -> Callable[[Any, Any], Any]:
    """Sign a changed commit over the attempt's own transcript."""
    silo = federation.silo(LIAR)

    def sign(message: MaskedInput, vector: Any) -> Any:
        words = vector_digest(vector.tobytes(), federation.session.chunk_bytes)
        lied = replace(message, vector_digest=words, **changes)
        tau2 = silo.state.tau2
        signature = silo.member.identity.sign(SIGN_MASKED_INPUT, tau2, lied.body())
        return replace(lied, signature=signature), vector

    return sign


def overflowing(word: int) -> Callable[[Federation], Lie]:
    def spoil(federation: Federation) -> Lie:
        def lie(message: Any, vector: Any) -> Any:
            changed = vector.copy()
            changed[7] = word
            return resigned(federation)(message, changed)

        return lie

    return spoil


def copying_seed(federation: Federation) -> Lie:
    """Seeds are drawn when the round begins."""

    def lie(message: Any, vector: Any) -> Any:
        return resigned(federation, seed=federation.silo("a").seed)(message, vector)

    return lie


LIES: dict[str, tuple[str, Callable[[Federation], Lie]]] = {
    "q": ("residue-range", overflowing(Q)),
    "2^54": ("residue-range", overflowing(2**54)),
    "2^64 - 1": ("residue-range", overflowing(2**64 - 1)),
    "no seed": ("seed-missing", lambda f: resigned(f, seed=b"")),
    "another's seed": (
        "seed-repeated",
        copying_seed,
    ),
    "unsigned seed": ("message-signature", lambda f: lambda m, v: (replace(m, seed=bytes(32)), v)),
}


@pytest.mark.parametrize("protection", SEALED)
@pytest.mark.parametrize(("code", "lie"), LIES.values(), ids=LIES.keys())
def test_a_liar_is_named_and_the_mean_is_the_others(
    protection: str, code: str, lie: Callable[[Federation], Lie]
) -> None:
    federation = Federation(NAMES, protection)
    updates = held()
    script = Script(lies={(LIAR, "masked_input"): lie(federation)})
    result = federation.run_round(updates, script=script)
    assert_mean(result, updates, equal(), HONEST)
    assert refusals(federation, LIAR)[0] == (FaultyClient, code)
    assert_nobody_else_complains(federation, LIAR)


# A coordinator that tampers, with its own signature where it has one to give.


def tell(kind: type, change: Callable[[Any], Any]) -> Script:
    def tamper(silo: SiloId, message: Any) -> Any:
        return change(message) if silo == "a" and isinstance(message, kind) else message

    return Script(tamper=tamper)


def other_key(message: Any) -> KeyName:
    return KeyName(message.key.epoch + 1, message.key.key_id)


def signing_descriptor(federation: Federation, change: Callable[[Any], Any]) -> Script:
    def again(message: Descriptor) -> Descriptor:
        changed = replace(message, key=change(message))
        tau0 = transcript.round_transcript(changed)
        return replace(changed, signature=federation.identity.sign(SIGN_DESCRIPTOR, tau0, b""))

    return tell(Descriptor, again)


def signing_result(federation: Federation, **changes: Callable[[Any], Any]) -> Script:
    def again(message: Result) -> Result:
        changed = replace(message, **{name: of(message) for name, of in changes.items()})
        tau4 = transcript.result_transcript(changed.survivors_transcript, changed.vector_digest)
        body = changed.body()
        return replace(changed, signature=federation.identity.sign(SIGN_RESULT, tau4, body))

    return tell(Result, again)


def other_seeds(result: Result) -> tuple[bytes, ...]:
    return tuple(bytes([i]) * 32 for i in range(len(result.seeds)))


TAMPERINGS: dict[str, tuple[str, Callable[[Federation], Script]]] = {
    "key of the descriptor": (
        "descriptor-signature",
        lambda f: tell(Descriptor, lambda m: replace(m, key=other_key(m))),
    ),
    "signed descriptor with another key": (
        "descriptor-key",
        lambda f: signing_descriptor(f, other_key),
    ),
    "signed descriptor without a key": (
        "descriptor-key",
        lambda f: signing_descriptor(f, lambda m: None),
    ),
    "own seed": (
        "survivors-own",
        lambda f: tell(
            Survivors,
            lambda m: Survivors((replace(m.commits[0], seed=bytes(32)), *m.commits[1:])),
        ),
    ),
    "another silo's seed": (
        "masked-input-signature",
        lambda f: tell(
            Survivors,
            lambda m: Survivors((*m.commits[:-1], replace(m.commits[-1], seed=bytes(32)))),
        ),
    ),
    "seeds of the result": (
        "result-signature",
        lambda f: tell(Result, lambda m: replace(m, seeds=other_seeds(m))),
    ),
    "signed result with other seeds": (
        "result-survivors",
        lambda f: signing_result(f, seeds=other_seeds),
    ),
    "signed result with seeds in another order": (
        "result-survivors",
        lambda f: signing_result(f, seeds=lambda m: m.seeds[::-1]),
    ),
    "signed result with another key": (
        "result-survivors",
        lambda f: signing_result(f, key=other_key),
    ),
    "signed result without a key": (
        "result-key",
        lambda f: signing_result(f, key=lambda m: None, seeds=lambda m: ()),
    ),
}


@pytest.mark.parametrize("protection", SEALED)
@pytest.mark.parametrize(("code", "script"), TAMPERINGS.values(), ids=TAMPERINGS.keys())
def test_a_silo_that_is_told_other_keys_or_seeds_says_so(
    protection: str, code: str, script: Callable[[Federation], Script]
) -> None:
    """It falls silent, nobody else notices, and the others' mean is right."""
    federation = Federation(NAMES, protection)
    updates = held()
    result = federation.run_round(updates, script=script(federation))
    early = code.startswith("descriptor")
    assert_mean(result, updates, equal(), list(NAMES[1:] if early else NAMES))
    assert refusals(federation, "a")[0] == (FaultyServer, code)
    assert_nobody_else_complains(federation, "a")


def test_no_phase_is_played_twice_or_out_of_order() -> None:
    """What each protection's silos send, in order."""
    for protection in ALL:
        sent: list[tuple[str, str]] = []
        federation = Federation(3, protection)

        def record(phase: str, sent: list[tuple[str, str]] = sent) -> Lie:
            def keep(message: Any, vector: Any) -> Any:
                sent.append((message.sender, phase))
                return message, vector

            return keep

        names = tuple(federation.silos)
        lies = {(n, p): record(p) for n in names for p in PHASES[protection]}
        federation.run_round(held(names), script=Script(lies=lies))
        assert sent == [(name, phase) for phase in PHASES[protection] for name in names]
    assert [len(PHASES[how]) for how in ALL] == [len(Phase), 3, len(Phase)]
