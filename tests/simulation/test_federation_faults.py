"""Late and doubled messages, liars, tampering, further attempts: the sum stays the survivors'."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from secagg.config import SiloId
from secagg.crypto.labels import (
    SIGN_ADVERTISE_KEYS,
    SIGN_CONSISTENCY,
    SIGN_MASKED_INPUT,
    SIGN_SHARE_KEYS,
    SIGN_UNMASKING,
)
from secagg.crypto.secret import Secret
from secagg.errors import (
    FaultyClient,
    FaultyServer,
    PolicyRefused,
    RoundAborted,
    SecaggError,
    TooLate,
)
from secagg.masking.messages import (
    AdvertiseKeys,
    Consistency,
    Descriptor,
    MaskedInput,
    Result,
    ShareKeys,
    ShareKind,
    Survivors,
    Unmasking,
)
from secagg.simulation import Arrival, Federation, Lie, RoundResult, Script

PHASES = ("advertise_keys", "share_keys", "masked_input", "consistency", "unmasking")
NAMES = ("a", "b", "c", "d", "e", "f", "g")
"""n = 7, so t = 5: two may fall out."""
LIAR = "b"
HELD = {name: np.array([2.0**i, -(2.0**i), 0.0]) / 64 for i, name in enumerate(NAMES)}
"""Each silo's values are a bit of their own, so a sum says who is in it."""
HONEST = [name for name in NAMES if name != LIAR]
ONE = 2**28


@pytest.fixture
def federation() -> Federation:
    return Federation(NAMES)


def play(federation: Federation, script: Script | None = None, **options: Any) -> RoundResult:
    return federation.run_round({n: {"x": v} for n, v in HELD.items()}, script=script, **options)


def assert_exact(result: RoundResult, survivors: list[str]) -> None:
    """The total is the survivors' integer sum, and says so."""
    assert result.survivors == survivors
    assert result.dropouts == sorted(set(NAMES) - set(survivors))
    words = [sum(int(HELD[name][i] * ONE) for name in survivors) for i in range(3)]
    words += [len(survivors) * ONE, 0, 0, 0]
    assert result.total.tolist() == [word % 2**32 for word in words]


def refusals(federation: Federation, name: str) -> list[tuple[type[SecaggError], str]]:
    return [(type(error), error.code) for error in federation.silo(name).refusals]


def assert_nobody_else_complains(federation: Federation, *but: str) -> None:
    assert {
        n: refusals(federation, n) for n in NAMES if n not in but and refusals(federation, n)
    } == {}


def lie(phase: str, what: Lie, liar: str = LIAR) -> Script:
    return Script(lies={(liar, phase): what})


# Arrivals


@pytest.mark.parametrize("phase", PHASES)
def test_a_late_message_is_nobody_s_fault_and_never_added(
    phase: str, federation: Federation
) -> None:
    result = play(federation, Script(arrivals={(LIAR, phase): Arrival.DELAYED}))
    late_vector = PHASES.index(phase) <= 2
    assert_exact(result, HONEST if late_vector else list(NAMES))
    assert refusals(federation, LIAR) == [(TooLate, "phase-closed")]
    assert_nobody_else_complains(federation, LIAR)
    assert_exact(play(federation), list(NAMES))


@pytest.mark.parametrize("phase", PHASES)
def test_three_late_messages_end_the_attempt_and_the_next_is_clean(
    phase: str, federation: Federation
) -> None:
    late = {(name, phase): Arrival.DELAYED for name in "abc"}
    with pytest.raises(RoundAborted) as abort:
        play(federation, Script(arrivals=late))
    assert (abort.value.phase, abort.value.have, abort.value.need) == (phase, 4, 5)
    assert_exact(play(federation), list(NAMES))


def test_every_message_twice_counts_once(federation: Federation) -> None:
    twice = {(name, phase): Arrival.DUPLICATED for name in NAMES for phase in PHASES}
    once = play(federation)
    result = play(federation, Script(arrivals=twice))
    assert_exact(result, list(NAMES))
    assert_nobody_else_complains(federation)
    assert result.bytes_up == once.bytes_up


def test_doubled_and_late_and_dropped_at_once(federation: Federation) -> None:
    script = Script(
        drops={"e": "unmasking", "f": "unmasking"},
        arrivals={
            ("a", "masked_input"): Arrival.DELAYED,
            ("c", "masked_input"): Arrival.DUPLICATED,
        },
    )
    with pytest.raises(RoundAborted) as abort:
        play(federation, script)
    assert (abort.value.phase, abort.value.have) == ("unmasking", 4)
    script.drops = {}
    assert_exact(play(federation, script), list("bcdefg"))


def test_drops_overrule_the_script_s(federation: Federation) -> None:
    script = Script(
        drops=dict.fromkeys("acd", "share_keys"),
        arrivals={("d", "masked_input"): Arrival.DUPLICATED},
    )
    assert_exact(play(federation, script, drops={LIAR: "masked_input"}), HONEST)


# Lies that are refused on arrival: the liar is a dropout from then on


def other_signature(message: Any, vector: Any) -> tuple[Any, Any]:
    return replace(message, signature=bytes(64)), vector


def other_sender(message: Any, vector: Any) -> tuple[Any, Any]:
    return replace(message, sender=SiloId("c")), vector


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("forged", [other_signature, other_sender])
def test_a_forged_message_is_refused(phase: str, forged: Lie, federation: Federation) -> None:
    result = play(federation, lie(phase, forged))
    assert_exact(result, HONEST if PHASES.index(phase) <= 2 else list(NAMES))
    kind, code = refusals(federation, LIAR)[0]
    assert issubclass(kind, FaultyClient)
    assert code == "message-signature"
    assert_nobody_else_complains(federation, LIAR)
    assert result.liars == []


@pytest.mark.parametrize(
    ("code", "spoil"),
    [
        ("vector-digest", lambda v: v + v.dtype.type(1)),
        ("vector-digest", lambda v: np.roll(v, 1)),
        ("vector-digest", np.zeros_like),
        ("vector-length", lambda v: v[:-1]),
        ("vector-length", lambda v: np.append(v, v[:1])),
        ("vector-length", lambda v: None),
    ],
    ids=["word", "order", "zeros", "short", "long", "none"],
)
def test_a_vector_other_than_committed_is_refused(
    code: str, spoil: Callable[[Any], Any], federation: Federation
) -> None:
    result = play(federation, lie("masked_input", lambda m, v: (m, spoil(v))))
    assert_exact(result, HONEST)
    assert refusals(federation, LIAR)[0] == (FaultyClient, code)
    assert_nobody_else_complains(federation, LIAR)


class Resigned:
    """A liar that signs its lies, and stands by them."""

    def __init__(self, federation: Federation, name: str = LIAR) -> None:
        self.silo = federation.silo(name)

    def _sign(self, kind: str, tau: bytes, message: Any) -> Any:
        signature = self.silo.member.identity.sign(kind, tau, message.body())
        return replace(message, signature=signature)

    def advert(self, message: AdvertiseKeys, **changes: Any) -> AdvertiseKeys:
        state = self.silo.state
        lied = self._sign(SIGN_ADVERTISE_KEYS, state.attempt.tau0, replace(message, **changes))
        self.silo.state = replace(state, advert=lied)
        return lied

    def shares(self, message: ShareKeys, **changes: Any) -> ShareKeys:
        state = self.silo.state
        lied = self._sign(SIGN_SHARE_KEYS, state.tau1, replace(message, **changes))
        self.silo.state = replace(state, sent=lied)
        return lied

    def commit(self, message: MaskedInput, **changes: Any) -> MaskedInput:
        state = self.silo.state
        lied = self._sign(SIGN_MASKED_INPUT, state.tau2, replace(message, **changes))
        held = {k: v for k, v in state.held.items() if k not in lied.bad_dealers}
        self.silo.state = replace(state, commit=lied, held=held)
        return lied

    def consistency(self, message: Consistency, tau: bytes) -> Consistency:
        return self._sign(SIGN_CONSISTENCY, tau, message)

    def unmasking(self, message: Unmasking, **changes: Any) -> Unmasking:
        return self._sign(SIGN_UNMASKING, self.silo.state.tau3, replace(message, **changes))


def test_one_key_for_both_purposes(federation: Federation) -> None:
    liar = Resigned(federation)
    script = lie("advertise_keys", lambda m, v: (liar.advert(m, channel_key=m.mask_key), v))
    assert_exact(play(federation, script), HONEST)
    assert refusals(federation, LIAR)[0] == (FaultyClient, "advert-keys")


def test_another_silo_s_key(federation: Federation) -> None:
    taken: list[bytes] = []
    liar = Resigned(federation)

    def watch(message: Any, vector: Any) -> tuple[Any, Any]:
        taken.append(message.mask_key)
        return message, vector

    script = Script(
        lies={
            ("a", "advertise_keys"): watch,
            (LIAR, "advertise_keys"): lambda m, v: (liar.advert(m, channel_key=taken[0]), v),
        }
    )
    assert_exact(play(federation, script), HONEST)
    assert refusals(federation, LIAR)[0] == (FaultyClient, "advert-keys")


@pytest.mark.parametrize("part", ["boxes", "commitments"])
def test_a_share_too_few(part: str, federation: Federation) -> None:
    liar = Resigned(federation)
    script = lie("share_keys", lambda m, v: (liar.shares(m, **{part: getattr(m, part)[1:]}), v))
    assert_exact(play(federation, script), HONEST)
    assert refusals(federation, LIAR)[0] == (FaultyClient, "share-lists")


def test_a_signature_over_another_transcript(federation: Federation) -> None:
    liar = Resigned(federation)
    script = lie("consistency", lambda m, v: (liar.consistency(m, bytes(32)), v))
    assert_exact(play(federation, script), list(NAMES))
    assert refusals(federation, LIAR)[0] == (FaultyClient, "message-signature")
    assert_nobody_else_complains(federation, LIAR)


# Lies that are signed, and are found by opening commitments


def bad_share(message: Unmasking, share: Callable[[bytes], bytes]) -> tuple[Any, ...]:
    return tuple(replace(part, share=Secret(share(part.share.reveal()))) for part in message.shares)


SPOILS = {
    "one bit": lambda share: share[:-1] + bytes([share[-1] ^ 1]),
    "zero": lambda share: bytes(33),
    "no field element": lambda share: b"\xff" * 33,
}


@pytest.mark.parametrize("spoil", SPOILS.values(), ids=list(SPOILS))
@pytest.mark.parametrize("orphan", [False, True])
def test_a_bad_share_names_its_holder_while_the_sum_stays_exact(
    spoil: Callable[[bytes], bytes], orphan: bool, federation: Federation
) -> None:
    """With an orphan its mask key's shares are lied about too."""
    liar = Resigned(federation)
    script = lie("unmasking", lambda m, v: (liar.unmasking(m, shares=bad_share(m, spoil)), v))
    script.drops = {"g": "masked_input"} if orphan else {}
    result = play(federation, script)
    assert_exact(result, list(NAMES[:6] if orphan else NAMES))
    assert result.liars == [LIAR]
    assert_nobody_else_complains(federation)


def test_a_bad_salt_is_a_bad_share(federation: Federation) -> None:
    liar = Resigned(federation)

    def spoil(message: Any, vector: Any) -> tuple[Any, Any]:
        shares = tuple(replace(part, salt=Secret(bytes(32))) for part in message.shares)
        return liar.unmasking(message, shares=shares), vector

    result = play(federation, lie("unmasking", spoil))
    assert_exact(result, list(NAMES))
    assert result.liars == [LIAR]


def test_one_bad_share_of_many_is_enough_to_be_named(federation: Federation) -> None:
    liar = Resigned(federation)

    def spoil(message: Any, vector: Any) -> tuple[Any, Any]:
        first = bad_share(message, SPOILS["one bit"])[0]
        return liar.unmasking(message, shares=(first, *message.shares[1:])), vector

    result = play(federation, lie("unmasking", spoil))
    assert_exact(result, list(NAMES))
    assert result.liars == [LIAR]


def test_too_many_bad_shares_end_the_attempt(federation: Federation) -> None:
    lies: dict[tuple[str, str], Lie] = {}
    for name in "bcd":
        liar = Resigned(federation, name)
        lies[name, "unmasking"] = lambda m, v, liar=liar: (
            liar.unmasking(m, shares=bad_share(m, SPOILS["zero"])),
            v,
        )
    with pytest.raises(RoundAborted) as abort:
        play(federation, Script(lies=lies))
    assert (abort.value.phase, abort.value.have, abort.value.need) == ("unmasking", 4, 5)
    assert_exact(play(federation), list(NAMES))


def test_a_share_of_the_kind_that_was_not_asked_for(federation: Federation) -> None:
    liar = Resigned(federation)

    def wrong_kind(message: Any, vector: Any) -> tuple[Any, Any]:
        first = replace(message.shares[0], kind=ShareKind.MASK_KEY)
        return liar.unmasking(message, shares=(first, *message.shares[1:])), vector

    assert_exact(play(federation, lie("unmasking", wrong_kind)), list(NAMES))
    assert refusals(federation, LIAR) == [(FaultyClient, "reveal-list")]


def complain(federation: Federation, name: str, about: str) -> Lie:
    liar = Resigned(federation, name)
    return lambda m, v: (liar.commit(m, bad_dealers=(SiloId(about),)), v)


def test_a_complaint_about_an_honest_dealer_is_survived(federation: Federation) -> None:
    """Five of seven hold the dealer's shares, beside itself."""
    result = play(federation, lie("masked_input", complain(federation, LIAR, "d")))
    assert_exact(result, list(NAMES))
    assert_nobody_else_complains(federation)


def test_three_complaints_end_the_attempt_and_name_the_dealer(federation: Federation) -> None:
    lies = {(name, "masked_input"): complain(federation, name, "d") for name in "abc"}
    with pytest.raises(RoundAborted) as abort:
        play(federation, Script(lies=lies))
    assert (abort.value.phase, abort.value.need, abort.value.blamed) == ("masked_input", 5, ("d",))
    assert abort.value.have < 5
    assert_exact(play(federation), list(NAMES))


@pytest.mark.parametrize("about", [LIAR, "nobody"])
def test_a_complaint_about_oneself_or_nobody(about: str, federation: Federation) -> None:
    result = play(federation, lie("masked_input", complain(federation, LIAR, about)))
    assert_exact(result, HONEST)
    assert refusals(federation, LIAR)[0] == (FaultyClient, "bad-dealers")


def spoilt_boxes(federation: Federation, holders: str) -> Lie:
    liar = Resigned(federation)

    def spoil(message: Any, vector: Any) -> tuple[Any, Any]:
        boxes = tuple(
            replace(box, sealed=bytes(len(box.sealed))) if box.recipient in holders else box
            for box in message.boxes
        )
        return liar.shares(message, boxes=boxes), vector

    return spoil


def test_a_box_that_does_not_open_is_complained_about_and_survived(
    federation: Federation,
) -> None:
    commits: list[MaskedInput] = []

    def watch(message: Any, vector: Any) -> tuple[Any, Any]:
        commits.append(message)
        return message, vector

    script = lie("share_keys", spoilt_boxes(federation, "d"))
    script.lies = {**script.lies, ("d", "masked_input"): watch}
    assert_exact(play(federation, script), list(NAMES))
    assert commits[0].bad_dealers == (LIAR,)


def test_boxes_that_do_not_open_convict_their_dealer(federation: Federation) -> None:
    with pytest.raises(RoundAborted) as abort:
        play(federation, lie("share_keys", spoilt_boxes(federation, "def")))
    assert abort.value.phase == "masked_input"
    assert abort.value.blamed == (LIAR,)


@pytest.mark.parametrize("silent", [False, True])
def test_shares_of_another_secret_convict_their_dealer(
    silent: bool, federation: Federation
) -> None:
    """The advert pins the self seed and the mask key; every share matches its commitment."""
    liar = Resigned(federation)

    def other_secrets(message: Any, vector: Any) -> tuple[Any, Any]:
        secrets = (
            {"mask_key": liar.silo.state.channel} if silent else {"self_seed": Secret(bytes(32))}
        )
        liar.silo.state = replace(liar.silo.state, **secrets)
        return message, vector

    script = lie("advertise_keys", other_secrets)
    script.drops = {LIAR: "masked_input"} if silent else {}
    with pytest.raises(RoundAborted) as abort:
        play(federation, script)
    assert (abort.value.phase, abort.value.blamed) == ("unmasking", (LIAR,))
    assert_exact(play(federation), list(NAMES))


# A coordinator that tampers


def tell(name: str, kind: type, change: Callable[[Any], Any]) -> Script:
    def tamper(silo: SiloId, message: Any) -> Any:
        return change(message) if silo == name and isinstance(message, kind) else message

    return Script(tamper=tamper)


@pytest.mark.parametrize(
    ("kind", "change", "code"),
    [
        (Descriptor, lambda m: replace(m, round=m.round + 1), "descriptor-signature"),
        (Survivors, lambda m: Survivors(m.commits[:6]), "consistency-signer"),
        (Survivors, lambda m: Survivors(m.commits[:4]), "survivors-threshold"),
        (Result, lambda m: replace(m, survivors=m.survivors[1:]), "result-signature"),
    ],
    ids=["descriptor", "other survivors", "too few survivors", "result"],
)
def test_a_silo_that_is_lied_to_says_so(
    kind: type, change: Callable[[Any], Any], code: str, federation: Federation
) -> None:
    result = play(federation, tell("a", kind, change))
    assert (FaultyServer, code) in refusals(federation, "a")
    assert_nobody_else_complains(federation, "a")
    assert_exact(result, list(NAMES[1:]) if kind is Descriptor else list(NAMES))


# Further attempts


def test_another_attempt_on_one_base_after_nothing_was_revealed(federation: Federation) -> None:
    for phase in PHASES[:4]:
        with pytest.raises(RoundAborted):
            play(federation, drops=dict.fromkeys("abc", phase), same_base=True)
        assert_nobody_else_complains(federation)
    assert_exact(play(federation, same_base=True), list(NAMES))
    assert_nobody_else_complains(federation)


def test_a_revealed_set_may_be_opened_again(federation: Federation) -> None:
    with pytest.raises(RoundAborted):
        play(federation, drops=dict.fromkeys("abc", "unmasking"))
    assert_exact(play(federation, same_base=True), list(NAMES))
    assert_nobody_else_complains(federation)


def test_a_set_close_to_a_revealed_one_is_not_opened(federation: Federation) -> None:
    """The difference of the two sums would be one silo's update."""
    with pytest.raises(RoundAborted):
        play(federation, drops=dict.fromkeys("abc", "unmasking"))
    with pytest.raises(RoundAborted) as abort:
        play(federation, drops={"g": "masked_input"}, same_base=True)
    assert (abort.value.phase, abort.value.have) == ("consistency", 3)
    for name in "def":
        assert refusals(federation, name) == [(PolicyRefused, "differencing")]
    assert_exact(play(federation, drops={"g": "masked_input"}), list("abcdef"))
    assert_nobody_else_complains(federation)


def test_after_a_result_there_is_a_new_round(federation: Federation) -> None:
    """The history moves with each result and each abandoned base, never otherwise."""
    seen = {federation.history}
    for number in (1, 2, 3):
        assert federation.round == number
        play(federation)
        seen.add(federation.history)
    assert len(seen) == 4
    with pytest.raises(RoundAborted):
        play(federation, drops=dict.fromkeys("abc", "share_keys"))
    assert (federation.round, federation.history in seen) == (4, True)
    play(federation)
    assert (federation.round, federation.history in seen) == (5, False)
