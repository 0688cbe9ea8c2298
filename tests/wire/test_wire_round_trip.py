"""What is written is what is read, through real protobuf bytes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings

from secagg.errors import MalformedMessage
from secagg.masking import messages as core
from secagg.suite import KeyName
from secagg.wire import attempt, custody, session
from secagg.wire._pb import masking_pb2 as pb
from secagg.wire._pb import service_pb2 as api

from . import strategies as make


def again(message: Any) -> Any:
    """The message as the other end parses it."""
    return type(message).FromString(message.SerializeToString())


BROADCASTS: dict[str, tuple[Any, Callable[[Any], Any], Callable[[Any], Any]]] = {
    "descriptor": (make.descriptors, attempt.descriptor_to_wire, attempt.descriptor_from_wire),
    "roster": (make.rosters, attempt.roster_to_wire, attempt.roster_from_wire),
    "dealt": (make.dealts, attempt.dealt_to_wire, attempt.dealt_from_wire),
    "survivors": (make.survivors, attempt.survivors_to_wire, attempt.survivors_from_wire),
    "signatures": (make.signature_lists, attempt.signatures_to_wire, attempt.signatures_from_wire),
    "result": (make.results, attempt.result_to_wire, attempt.result_from_wire),
    "opening": (make.openings(), session.opening_to_wire, session.opening_from_wire),
    "config": (make.configs(), session.config_to_wire, session.config_from_wire),
    "key-request": (make.key_requests, custody.request_to_wire, custody.request_from_wire),
    "key-box": (make.key_boxes, custody.box_to_wire, custody.box_from_wire),
}


@pytest.mark.parametrize("name", BROADCASTS)
def test_round_trip(name: str) -> None:
    strategy, to_wire, from_wire = BROADCASTS[name]

    @settings(max_examples=60, deadline=None)
    @given(strategy)
    def check(value: Any) -> None:
        assert from_wire(again(to_wire(value))) == value

    check()


@settings(max_examples=150, deadline=None)
@given(make.client_messages, make.hashes, make.numbers, make.numbers)
def test_client_messages(message: Any, session_id: bytes, number: int, tried: int) -> None:
    request = again(
        attempt.client_message_to_wire(
            message, session_id=session_id, round_number=number, attempt=tried
        )
    )
    assert (request.session_id, request.round, request.attempt) == (session_id, number, tried)
    assert attempt.client_message_from_wire(request) == message


@settings(max_examples=60, deadline=None)
@given(make.aborts, make.numbers, make.numbers)
def test_aborts(error: Any, number: int, tried: int) -> None:
    message = again(session.aborted_to_wire(error, number, tried))
    read = session.aborted_from_wire(message)
    assert (message.round, message.attempt) == (number, tried)
    for field in ("phase", "have", "need", "blamed", "because", "observed", "code"):
        assert getattr(read, field) == getattr(error, field)


@pytest.mark.parametrize("sealed", [None, bytes(core.BOX_BYTES)])
def test_an_absent_box_is_not_an_empty_one(sealed: bytes | None) -> None:
    dealt = core.Dealt((core.Dealing(make.SiloId("a"), (), bytes(32), sealed, bytes(64)),))
    assert attempt.dealt_from_wire(again(attempt.dealt_to_wire(dealt))) == dealt


def test_the_two_kinds_of_share_have_no_common_spelling() -> None:
    request = api.SendRequest()
    share = request.unmasking.shares.add(owner="a", self_seed=bytes(33))
    share.mask_key = bytes(33)
    assert again(request).unmasking.shares[0].WhichOneof("share") == "mask_key"


def test_an_absent_key_is_not_an_empty_one() -> None:
    """An empty one is refused; where there is none, nothing is on the wire."""
    result = core.Result("a", 1, bytes(32), (), (), bytes(32), bytes(32), bytes(64))
    message = again(attempt.result_to_wire(result))
    assert not message.HasField("key")
    assert attempt.result_from_wire(message) == result
    message.key.SetInParent()
    with pytest.raises(MalformedMessage) as caught:
        attempt.result_from_wire(again(message))
    assert caught.value.code == "key-name"
    named = pb.Result(key=attempt.key_to_wire(KeyName(7, b"k" * 32)))
    assert attempt.key_from_wire(again(named)) == KeyName(7, b"k" * 32)
    assert attempt.key_to_wire(None) is None


def test_a_masked_commit_has_no_new_field_on_the_wire() -> None:
    """So older readers and journals agree."""
    commit = core.MaskedInput(make.SiloId("a"), bytes(32), (), bytes(64))
    request = attempt.client_message_to_wire(
        commit, session_id=bytes(32), round_number=1, attempt=1
    )
    fields = {field.name for field, _ in request.masked_input.ListFields()}
    assert fields == {"sender", "vector_digest", "signature"}
    roster = attempt.survivors_to_wire(core.Survivors((commit,)))
    assert {field.name for field, _ in roster.commits[0].ListFields()} == fields
