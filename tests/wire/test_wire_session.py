"""A session's configuration and a task's opening on the wire: every bad field is refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from secagg.crypto.secret import Secret
from secagg.crypto.sign import IdentityKey
from secagg.encoding.schema import Schema, TensorSpec
from secagg.errors import MalformedMessage
from secagg.masking.transcript import NO_WEIGHTS, TaskOpening
from secagg.suite import Suite
from secagg.wire._pb import service_pb2 as api
from secagg.wire.session import (
    SignedOpening,
    config_from_wire,
    opening_from_wire,
    opening_to_wire,
)

from . import strategies as make

KEY = IdentityKey.from_private(Secret(bytes(range(32))))
OTHER = IdentityKey.from_private(Secret(bytes(32)))
TRANSCRIPT = b"\x17" * 32


def config() -> api.SessionConfig:
    return api.SessionConfig(
        name="study",
        consortium="hospitals",
        silos=["a", "b", "c", "d"],
        protection="masked",
        colluders=1,
        threshold="2/3",
        min_cohort=3,
        mask_prg="aes-128-ctr",
        tasks=[
            api.TaskConfig(
                name="training",
                weighting="mean",
                rounds=3,
                ring_bits=32,
                bound=4.0,
                clip="none",
                weight_cap=100.0,
                metrics=[api.Metric(name="loss", bound=8.0)],
            )
        ],
        chunk_bytes=1024,
        train_deadline=60.0,
        phase_deadline=5.0,
        max_attempts=3,
    )


def sealed(protection: str = "ckks+masked") -> api.SessionConfig:
    """The same for sealed updates."""
    message = config()
    message.protection, message.suite = protection, "ckks-54"
    message.tasks[0].ClearField("ring_bits")
    return message


def test_the_examples_are_good() -> None:
    read = config_from_wire(config())
    assert read.task("training").metrics[0].bound == 8.0
    assert (read.suite, read.task("training").ring_bits) == (None, 32)
    for protection in ("ckks", "ckks+masked"):
        read = config_from_wire(sealed(protection))
        assert (read.protection, read.suite) == (protection, Suite.CKKS_54)
        assert read.task("training").ring_bits is None


@pytest.mark.parametrize("protection", ["ckks", "ckks+masked"])
@pytest.mark.parametrize("suite", ["", "ckks-55", "CKKS-54", "ckks-54 ", "masked", "ckks"])
def test_no_suite_but_the_known_one_is_ever_taken(protection: str, suite: str) -> None:
    message = sealed(protection)
    message.suite = suite
    refuse(message)


def suited(message: api.SessionConfig) -> None:
    message.suite = "ckks-54"


MISMATCHES: dict[str, tuple[str, Callable[[], api.SessionConfig], Callable[[Any], Any]]] = {
    "suite without sealing": ("suite", config, suited),
    "words without a ring": ("ring", config, lambda m: m.tasks[0].ClearField("ring_bits")),
    "sealing without a suite": ("suite", sealed, lambda m: m.ClearField("suite")),
    "words beside the suite's": ("ring", sealed, lambda m: setattr(m.tasks[0], "ring_bits", 64)),
    "masked all the same": ("suite", sealed, lambda m: setattr(m, "protection", "masked")),
}


@pytest.mark.parametrize("case", MISMATCHES)
def test_protection_suite_and_words_agree(case: str) -> None:
    code, make_message, change = MISMATCHES[case]
    message = make_message()
    change(message)
    with pytest.raises(MalformedMessage) as caught:
        config_from_wire(message)
    assert caught.value.code == code


NOT_NAMES = ["", "Upper", "a_b", "-a", "a-", "x" * 64, "ä", "a/b", "a\n", "a\0"]
NOT_POSITIVE = [0.0, -1.0, math.inf, -math.inf, math.nan, 1e101, 1e-101]
BAD: dict[str, list[Any]] = {
    "name": NOT_NAMES,
    "consortium": NOT_NAMES,
    "protection": ["", "none", "MASKED", "masked "],
    "colluders": [0, 3, 2**32 - 1],
    "threshold": [
        "",
        "0.66",
        "2",
        "1/3",
        "1/1",
        "3/2",
        "0/1",
        "2/3 ",
        "-2/-3",
        "2/0",
        "10000/19999",
    ],
    "min_cohort": [0, 2, 5, 2**32 - 1],
    "mask_prg": ["", "random", "AES-128-CTR"],
    "chunk_bytes": [0, 1, 63, 65, 4 * 2**20 + 64, 2**32 - 1],
    "train_deadline": NOT_POSITIVE,
    "phase_deadline": NOT_POSITIVE,
    "max_attempts": [0],
}
BAD_TASK: dict[str, list[Any]] = {
    "name": NOT_NAMES,
    "weighting": ["", "median"],
    "rounds": [0, 2**31, 2**32 - 1],
    "ring_bits": [0, 8, 17, 54, 2**32 - 1],
    "bound": NOT_POSITIVE,
    "clip": ["", "l1"],
    "weight_cap": NOT_POSITIVE,
}


def cases(table: dict[str, list[Any]]) -> list[tuple[str, Any]]:
    return [(field, value) for field, values in table.items() for value in values]


def refuse(message: api.SessionConfig) -> None:
    with pytest.raises(MalformedMessage) as caught:
        config_from_wire(message)
    assert caught.value.code
    assert caught.value.observed


@pytest.mark.parametrize(("field", "value"), cases(BAD))
def test_bad_session(field: str, value: Any) -> None:
    message = config()
    setattr(message, field, value)
    refuse(message)


@pytest.mark.parametrize(("field", "value"), cases(BAD_TASK))
def test_bad_task(field: str, value: Any) -> None:
    message = config()
    setattr(message.tasks[0], field, value)
    refuse(message)


@pytest.mark.parametrize("value", NOT_NAMES)
def test_bad_metric_name(value: str) -> None:
    message = config()
    message.tasks[0].metrics[0].name = value
    refuse(message)


@pytest.mark.parametrize("value", NOT_POSITIVE)
def test_bad_metric_bound(value: float) -> None:
    message = config()
    message.tasks[0].metrics[0].bound = value
    refuse(message)


def _weighted_sum(message: api.SessionConfig) -> None:
    message.tasks[0].weighting = "sum"


LISTS: dict[str, Callable[[api.SessionConfig], Any]] = {
    "no silos": lambda m: m.ClearField("silos"),
    "two silos": lambda m: (m.ClearField("silos"), m.silos.extend(["a", "b"])),
    "a silo twice": lambda m: m.silos.append("d"),
    "unsorted": lambda m: m.silos.append("aa"),
    "no name": lambda m: m.silos.append("~"),
    "too many": lambda m: (m.ClearField("silos"), m.silos.extend(f"s{i:03}" for i in range(257))),
    "no tasks": lambda m: m.ClearField("tasks"),
    "a task twice": lambda m: m.tasks.append(m.tasks[0]),
    "a metric twice": lambda m: m.tasks[0].metrics.append(m.tasks[0].metrics[0]),
    "a sum with weights": _weighted_sum,
    "no word": lambda m: m.tasks[0].ClearField("ring_bits"),
}


@pytest.mark.parametrize("case", LISTS)
def test_bad_lists(case: str) -> None:
    message = config()
    LISTS[case](message)
    refuse(message)


def test_an_empty_message() -> None:
    refuse(api.SessionConfig())


@pytest.mark.parametrize("field", [f.name for f in api.SessionConfig.DESCRIPTOR.fields])
def test_no_field_has_a_silent_default(field: str) -> None:
    """Where a session seals, the suite is no exception; where not, it has no place at all."""
    message = sealed()
    message.ClearField(field)
    refuse(message)
    masked = config()
    masked.ClearField(field)
    if field == "suite":
        assert masked == config()
    else:
        refuse(masked)


@pytest.mark.parametrize("field", [f.name for f in api.TaskConfig.DESCRIPTOR.fields])
def test_no_field_of_a_task_has_a_silent_default(field: str) -> None:
    for message in (config(), sealed()):
        before = message.SerializeToString()
        message.tasks[0].ClearField(field)
        if field == "metrics":
            assert config_from_wire(message).tasks[0].metrics == ()
        elif message.SerializeToString() == before:
            assert (field, message.suite) == ("ring_bits", "ckks-54")
        else:
            refuse(message)


# Openings.


def opening(**changes: Any) -> SignedOpening:
    schema = Schema((TensorSpec("bias", (2,)), TensorSpec("weight", (3, 2))))
    value = TaskOpening("training", schema, "sgd", b"\x01" * 32)
    return replace(SignedOpening.sign(value, 512, "a", KEY, TRANSCRIPT), **changes)


def test_a_signed_opening_verifies() -> None:
    opening().verify(KEY.public, TRANSCRIPT)


@settings(max_examples=30, deadline=None)
@given(make.openings(), st.binary(min_size=32, max_size=32))
def test_signing_then_verifying(value: SignedOpening, transcript: bytes) -> None:
    signed = SignedOpening.sign(value.opening, value.weights_bytes, value.proposer, KEY, transcript)
    signed.verify(KEY.public, transcript)
    with pytest.raises(MalformedMessage):
        signed.verify(OTHER.public, transcript)


FORGERIES: dict[str, Callable[[SignedOpening], SignedOpening]] = {
    "task": lambda s: replace(s, opening=replace(s.opening, task="other")),
    "step": lambda s: replace(s, opening=replace(s.opening, step="adam")),
    "digest": lambda s: replace(s, opening=replace(s.opening, weights_digest=b"\x02" * 32)),
    "size": lambda s: replace(s, weights_bytes=513),
    "proposer": lambda s: replace(s, proposer="b"),
    "shape": lambda s: replace(
        s,
        opening=replace(
            s.opening, schema=Schema((TensorSpec("bias", (2,)), TensorSpec("weight", (2, 3))))
        ),
    ),
    "tensor": lambda s: replace(
        s,
        opening=replace(
            s.opening, schema=Schema((TensorSpec("bias", (2,)), TensorSpec("weights", (3, 2))))
        ),
    ),
    "signature": lambda s: replace(s, signature=bytes(64)),
    "first bit": lambda s: replace(s, signature=bytes([s.signature[0] ^ 1]) + s.signature[1:]),
}


@pytest.mark.parametrize("case", FORGERIES)
def test_forged_openings(case: str) -> None:
    forged = FORGERIES[case](opening())
    with pytest.raises(MalformedMessage) as caught:
        forged.verify(KEY.public, TRANSCRIPT)
    assert caught.value.code == "signature"


SEALED_DIGEST = b"\x05" * 32


def test_what_is_uploaded_in_the_place_of_the_weights_is_signed_too() -> None:
    plain = opening()
    assert plain.uploaded_digest == b"\x01" * 32
    boxed = SignedOpening.sign(plain.opening, 512, "a", KEY, TRANSCRIPT, SEALED_DIGEST)
    boxed.verify(KEY.public, TRANSCRIPT)
    assert boxed.uploaded_digest == SEALED_DIGEST
    forged = (
        replace(boxed, sealed_digest=b"\x06" * 32),
        replace(boxed, sealed_digest=b""),
        replace(plain, sealed_digest=SEALED_DIGEST),
    )
    for other in forged:
        with pytest.raises(MalformedMessage):
            other.verify(KEY.public, TRANSCRIPT)
    assert opening_from_wire(opening_to_wire(boxed)) == boxed


@pytest.mark.parametrize("size", [1, 31, 33, 64])
def test_a_sealed_digest_of_another_size(size: int) -> None:
    with pytest.raises(MalformedMessage) as caught:
        opening_from_wire(opening_to_wire(opening(sealed_digest=bytes(size))))
    assert caught.value.code == "opening-size"


def test_a_sealed_digest_of_no_weights() -> None:
    empty = replace(opening().opening, weights_digest=NO_WEIGHTS)
    for digest, good in ((b"", True), (SEALED_DIGEST, False)):
        message = opening_to_wire(SignedOpening(empty, 0, "a", bytes(64), digest))
        if good:
            assert opening_from_wire(message).sealed_digest == b""
            continue
        with pytest.raises(MalformedMessage):
            opening_from_wire(message)


def test_an_opening_of_another_session() -> None:
    with pytest.raises(MalformedMessage):
        opening().verify(KEY.public, b"\x18" * 32)


def _no_weights(message: api.TaskOpening) -> None:
    message.weights_digest = NO_WEIGHTS


BAD_OPENINGS: dict[str, Callable[[api.TaskOpening], Any]] = {
    "short digest": lambda m: setattr(m, "weights_digest", bytes(31)),
    "long digest": lambda m: setattr(m, "weights_digest", b"\x01" * 33),
    "short signature": lambda m: setattr(m, "signature", bytes(63)),
    "no signature": lambda m: m.ClearField("signature"),
    "weights without a digest": _no_weights,
    "digest without weights": lambda m: m.ClearField("weights_bytes"),
    "long step": lambda m: setattr(m, "step", "x" * 4097),
    "no tensors": lambda m: m.ClearField("tensors"),
    "unsorted": lambda m: m.tensors.add(name="a", shape=[1]),
    "twice": lambda m: m.tensors.add(name="weight", shape=[1]),
    "no name": lambda m: setattr(m.tensors[0], "name", ""),
    "long name": lambda m: setattr(m.tensors[1], "name", "w" * 1025),
    "rank": lambda m: m.tensors[0].shape.extend([1] * 16),
    "axis": lambda m: m.tensors[0].shape.append(2**40),
    "negative axis": lambda m: m.tensors[0].shape.append(2**64 - 1),
    "size": lambda m: m.tensors[0].shape.extend([2**39] * 10),
    "nothing": lambda m: (
        m.tensors[0].shape.append(0),
        m.tensors[1].shape.append(0),
    ),
}


@pytest.mark.parametrize("case", BAD_OPENINGS)
def test_bad_openings(case: str) -> None:
    message = opening_to_wire(opening())
    opening_from_wire(message)
    BAD_OPENINGS[case](message)
    with pytest.raises(MalformedMessage) as caught:
        opening_from_wire(message)
    assert caught.value.code
