"""A coordinator that lies: every lie has its code, and no lie gets a message of an attempt."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from client_sdk import tensors
from client_sdk.checkpoint import Update
from client_sdk.session import Session
from secagg.crypto.digest import vector_digest
from secagg.encoding.schema import Schema
from secagg.errors import (
    CredentialError,
    FaultyServer,
    InputError,
    PoisonedResult,
    PolicyRefused,
    RoundAborted,
    SecaggError,
    SessionEnded,
    StaleModel,
    TooLate,
)
from secagg.masking import transcript
from secagg.pki.manifest import SignedManifest
from secagg.wire import attempt as wire
from secagg.wire import session as wire_session
from secagg.wire._pb import masking_pb2 as pb
from secagg.wire._pb import service_pb2 as api

from .fakes import FakeChannel, join_fake
from .federation import Federation, make_session, make_sum, make_task, refused

X = {"x": np.ones(3)}
Lie = Callable[[FakeChannel], None]


@pytest.fixture
def fake(federation: Federation) -> FakeChannel:
    tasks = (make_sum(), make_sum(name="other"), make_task())
    return FakeChannel(federation, make_session(*tasks, chunk_bytes=64))


@pytest.fixture
def session(
    federation: Federation, fake: FakeChannel, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Session]:
    with join_fake(monkeypatch, federation, fake) as joined:
        yield joined


def add(session: Session, task: str = "statistics") -> Any:
    return session.sum(X, task=task)


# Joining.


def reply_with(**changes: Any) -> Callable[[FakeChannel], api.JoinSessionReply]:
    """JoinSession's reply with fields of the configuration changed."""

    def make(fake: FakeChannel) -> api.JoinSessionReply:
        reply = fake._JoinSession(api.JoinSessionRequest())
        for key, value in changes.items():
            where = reply if key in ("manifest", "session_id") else reply.config
            if isinstance(value, list):
                del getattr(where, key)[:]
                getattr(where, key).extend(value)
            else:
                setattr(where, key, value)
        return reply

    return make


JOINING = [
    (FaultyServer, "session-name", reply_with(name="another")),
    (FaultyServer, "session-name", reply_with(consortium="elsewhere")),
    (FaultyServer, "session-member", reply_with(silos=["b", "c", "d"])),
    (FaultyServer, "silos", reply_with(silos=["d", "c", "b", "a"])),
    (FaultyServer, "min-cohort", reply_with(min_cohort=2)),
    (FaultyServer, "colluders", reply_with(colluders=0)),
    (FaultyServer, "threshold", reply_with(colluders=3)),
    (FaultyServer, "config-file", reply_with(protection="none")),
    (FaultyServer, "threshold", reply_with(threshold="1/3")),
    (FaultyServer, "config-file", reply_with(mask_prg="rot13")),
    (FaultyServer, "chunk-bytes", reply_with(chunk_bytes=0)),
    (FaultyServer, "tasks", reply_with(tasks=[])),
    (CredentialError, "manifest-malformed", reply_with(manifest=b"{}")),
]


@pytest.mark.parametrize(
    ("kind", "code", "reply"), JOINING, ids=[f"{c}-{i}" for i, (_, c, _) in enumerate(JOINING)]
)
def test_what_is_said_at_joining(
    federation: Federation,
    fake: FakeChannel,
    monkeypatch: pytest.MonkeyPatch,
    kind: type[SecaggError],
    code: str,
    reply: Callable[[FakeChannel], api.JoinSessionReply],
) -> None:
    fake.lies["JoinSession"] = lambda _: reply(fake)
    with refused(kind, code):
        join_fake(monkeypatch, federation, fake)
    assert fake.closed
    assert fake.methods == ["JoinSession"]
    honest = FakeChannel(federation, fake.config)
    join_fake(monkeypatch, federation, honest).close()  # nothing is left locked


def test_an_older_manifest_is_refused(
    federation: Federation, fake: FakeChannel, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = federation.consortium.authority.key_pem
    held = fake.manifest.manifest
    newer = SignedManifest.sign(replace(held, version=held.version + 1), key)
    fake.manifest = newer
    with join_fake(monkeypatch, federation, fake):
        pass
    old = FakeChannel(federation, fake.config)
    with refused(CredentialError, "manifest-older"):
        join_fake(monkeypatch, federation, old)
    forged = FakeChannel(federation, fake.config)
    forged.manifest = replace(newer, manifest=replace(held, version=held.version + 2))
    with refused(CredentialError, "manifest-signature"):
        join_fake(monkeypatch, federation, forged)
    twin = FakeChannel(federation, fake.config)
    twin.manifest = SignedManifest.sign(replace(newer.manifest, revoked=("ab",)), key)
    with refused(CredentialError, "manifest-conflict"):
        join_fake(monkeypatch, federation, twin)


REPLACED = [
    ("session-replaced", reply_with(session_id=b"\x52" * 32)),
    ("session-changed", reply_with(min_cohort=4)),
    ("session-name", reply_with(name="another")),
]


@pytest.mark.parametrize(("code", "reply"), REPLACED, ids=[code for code, _ in REPLACED])
def test_the_session_changes_after_joining(
    session: Session,
    fake: FakeChannel,
    code: str,
    reply: Callable[[FakeChannel], api.JoinSessionReply],
) -> None:
    fake.lies["JoinSession"] = lambda _: reply(fake)
    with refused(FaultyServer, code):
        add(session)
    assert "Ready" not in fake.methods
    assert "Send" not in fake.methods


# Opening tasks.


def opening(fake: FakeChannel, **changes: Any) -> api.OpenTaskReply:
    message = fake.openings["statistics"]
    for key, value in changes.items():
        setattr(message, key, value)
    return api.OpenTaskReply(opening=message)


OPENINGS: list[tuple[str, dict[str, Any]]] = [
    ("task-signature", {"signature": bytes(64)}),
    ("task-signature", {"step": "torch.SGD(lr=100)"}),
    ("task-signature", {"weights_bytes": 8, "weights_digest": b"\x01" * 32}),
    ("task-signature", {"proposer": "b"}),
    ("task-proposer", {"proposer": "nobody"}),
    ("task-opening", {"task": "other"}),
    ("opening-size", {"weights_bytes": 8}),
    ("opening-size", {"weights_digest": b"short"}),
    ("opening-size", {"signature": b""}),
]


@pytest.mark.parametrize(("code", "changes"), OPENINGS)
def test_openings(session: Session, fake: FakeChannel, code: str, changes: dict[str, Any]) -> None:
    fake.lies["OpenTask"] = lambda request: (
        opening(fake, **changes) if fake.openings else fake._OpenTask(request)
    )
    with refused(FaultyServer, code):
        add(session)
    assert "Ready" not in fake.methods


def test_an_opening_of_malformed_tensors(session: Session, fake: FakeChannel) -> None:
    bad = api.TaskOpening(task="statistics", signature=bytes(64), weights_digest=bytes(32))
    bad.tensors.add(name="y")
    bad.tensors.add(name="x")
    fake.lies["OpenTask"] = lambda _: api.OpenTaskReply(opening=bad)
    with refused(FaultyServer, "schema-order"):
        add(session)


def test_a_replaced_opening_is_refused_after_a_restart(
    federation: Federation, fake: FakeChannel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another silo's good signature does not help: what was taken before stands in the ledger."""
    with join_fake(monkeypatch, federation, fake) as session:
        session.open_task("statistics", _schema(3))
    other = FakeChannel(federation, fake.config)
    with join_fake(monkeypatch, federation, other, "b") as session:
        session.open_task("statistics", _schema(3), step="another")
    again = FakeChannel(federation, fake.config)
    again.openings = other.openings
    with (
        join_fake(monkeypatch, federation, again) as session,
        refused(FaultyServer, "task-replaced"),
    ):
        session.open_task("statistics", _schema(3))
    again = FakeChannel(federation, fake.config)
    again.openings = fake.openings
    with join_fake(monkeypatch, federation, again) as session:
        session.open_task("statistics", _schema(3))


def _schema(size: int) -> Any:
    return Schema.of({"x": np.zeros(size)})


# Descriptors and the order of events.


def next_of(**fields: Any) -> Callable[[FakeChannel], api.NextReply]:
    return lambda _: api.NextReply(**fields)


def described(**changes: Any) -> Callable[[FakeChannel], api.NextReply]:
    return lambda fake: fake.descriptor("statistics", **changes)


def unsigned(fake: FakeChannel) -> api.NextReply:
    reply = fake.descriptor("statistics")
    reply.descriptor.signature = bytes(64)
    return reply


DESCRIPTORS: list[tuple[type[SecaggError], str, Callable[[FakeChannel], api.NextReply]]] = [
    (FaultyServer, "descriptor-signature", unsigned),
    (FaultyServer, "descriptor-session", described(session_id=b"\x52" * 32)),
    (FaultyServer, "descriptor-session", described(session_hash=b"\x52" * 32)),
    (FaultyServer, "descriptor-manifest", described(manifest_version=1)),
    (FaultyServer, "descriptor-round", described(round=2)),
    (FaultyServer, "descriptor-round", described(task="other")),
    (FaultyServer, "descriptor-base", described(base=b"\x52" * 32)),
    (FaultyServer, "descriptor-cohort", described(cohort=("a", "b", "x"))),
    (FaultyServer, "descriptor-cohort", described(cohort=("b", "c", "d"))),
    (FaultyServer, "descriptor-threshold", described(threshold=4)),
    (PolicyRefused, "policy-cohort", described(cohort=("a", "b"), threshold=2)),
    (PolicyRefused, "policy-threshold", described(threshold=2)),
]


@pytest.mark.parametrize(
    ("kind", "code", "event"),
    DESCRIPTORS,
    ids=[f"{c}-{i}" for i, (_, c, _) in enumerate(DESCRIPTORS)],
)
def test_descriptors_are_refused_before_a_key_is_sent(
    session: Session,
    fake: FakeChannel,
    kind: type[SecaggError],
    code: str,
    event: Callable[[FakeChannel], api.NextReply],
) -> None:
    fake.events = [lambda: event(fake)] * fake.config.max_attempts
    with refused(kind, code):
        add(session)
    assert "Send" not in fake.methods
    assert fake.methods[-1] == "Leave"


EARLY: list[tuple[str, api.NextReply]] = [
    ("event-order", api.NextReply(roster=pb.Roster())),
    ("event-order", api.NextReply(dealt=pb.Dealt())),
    ("event-order", api.NextReply(survivors=pb.Survivors())),
    ("event-order", api.NextReply(signatures=pb.Signatures())),
    ("event-order", api.NextReply(aborted=api.Aborted(phase="unmasking"))),
    ("message-size", api.NextReply(descriptor=pb.Descriptor())),
    ("message-name", api.NextReply(roster=pb.Roster(adverts=[pb.AdvertiseKeys()] * 2))),
    ("message-name", api.NextReply(survivors=pb.Survivors(commits=[pb.MaskedInput()]))),
    ("message-size", api.NextReply(result=pb.Result(task="statistics", round=1))),
]


def _early_id(value: object) -> str | None:
    return value.WhichOneof("event") if isinstance(value, api.NextReply) else None


@pytest.mark.parametrize(("code", "event"), EARLY, ids=_early_id)
def test_events_before_a_descriptor(
    session: Session, fake: FakeChannel, code: str, event: api.NextReply
) -> None:
    fake.events = [api.NextReply(), event]
    with pytest.raises(FaultyServer) as caught:
        add(session)
    assert caught.value.code == code
    assert "Send" not in fake.methods


@pytest.mark.parametrize("name", ["dealt", "survivors", "signatures"])
def test_events_out_of_turn(session: Session, fake: FakeChannel, name: str) -> None:
    kinds = {"dealt": pb.Dealt(), "survivors": pb.Survivors(), "signatures": pb.Signatures()}
    for attempt in range(1, 4):
        fake.events += [
            lambda attempt=attempt: fake.descriptor("statistics", attempt=attempt),  # type: ignore[misc]
            api.NextReply(**{name: kinds[name]}),
        ]
    with refused(FaultyServer, "event-order"):
        add(session)
    sent = [r.WhichOneof("message") for m, r in fake.calls if m == "Send"]
    assert sent == ["advertise_keys"] * 3


def test_an_attempt_is_joined_once(session: Session, fake: FakeChannel) -> None:
    fake.events = [lambda: fake.descriptor("statistics")] * 4  # the same number, other nonces
    with refused(FaultyServer, "descriptor-replay"):
        add(session)
    assert fake.methods.count("Send") == 1


def test_a_session_that_ends(session: Session, fake: FakeChannel) -> None:
    fake.events = [api.NextReply(), api.NextReply(ended="It is over.")]
    with refused(SessionEnded, "session-over"):
        add(session)


def test_a_stale_base_without_a_newer_result_is_not_retried_for_ever(
    session: Session, fake: FakeChannel
) -> None:
    def stale(_: object) -> api.Ack:
        raise StaleModel("base-stale", "The coordinator says so.")

    fake.lies["Ready"] = stale
    with refused(StaleModel, "base-stale"):
        add(session)
    assert fake.methods.count("Ready") == 1


# Results.


def test_results_are_replayed_and_the_kth_call_gets_the_kth(
    session: Session, fake: FakeChannel
) -> None:
    session.open_task("statistics", _schema(3))
    fake.release("statistics", {"x": np.full(3, 1.0)})
    fake.openings["other"] = _opened(fake, session)
    fake.release("other", {"x": np.full(3, 2.0)})
    fake.release("statistics", {"x": np.full(3, 3.0)})
    assert add(session)["x"] == pytest.approx(3.0)
    assert add(session, "other")["x"] == pytest.approx(6.0)
    assert add(session)["x"] == pytest.approx(9.0)
    assert session.rounds_done == 3
    assert "Ready" not in fake.methods


def _opened(fake: FakeChannel, session: Session) -> api.TaskOpening:
    signed = wire_session.opening_from_wire(fake.openings["statistics"])
    other = replace(signed.opening, task="other")
    made = wire_session.SignedOpening.sign(
        other, 0, "a", session._membership.member.identity, session._membership.opening_transcript
    )
    return wire_session.opening_to_wire(made)


RESULTS: list[tuple[str, dict[str, Any]]] = [
    ("result-round", {"round": 2}),
    ("result-base", {"base": b"\x52" * 32}),
    ("result-task", {"task": "fourth"}),
    ("task-opening", {"task": "other"}),
]


@pytest.mark.parametrize(("code", "changes"), RESULTS, ids=[code for code, _ in RESULTS])
def test_results(session: Session, fake: FakeChannel, code: str, changes: dict[str, Any]) -> None:
    session.open_task("statistics", _schema(3))
    fake.release("statistics", X, **changes)
    with refused(FaultyServer, code):
        add(session)
    assert session.rounds_done == 0


def test_a_result_that_is_not_signed(session: Session, fake: FakeChannel) -> None:
    session.open_task("statistics", _schema(3))
    fake.release("statistics", X)
    fake.results[0] = replace(fake.results[0], survivors=("a", "b", "c"))
    with refused(FaultyServer, "result-signature"):
        add(session)


def test_a_result_that_is_malformed(session: Session, fake: FakeChannel) -> None:
    session.open_task("statistics", _schema(3))
    result = wire.result_to_wire(fake.release("statistics", X))
    result.base = b"short"
    fake.lies["ListResults"] = lambda _: api.ListResultsReply(results=[result])
    with refused(FaultyServer, "message-size"):
        add(session)


def test_a_result_over_others_than_were_signed_for(session: Session, fake: FakeChannel) -> None:
    """Here: over an attempt in which this silo signed nothing; its own is not claimed."""
    fake.events = [
        lambda: fake.descriptor("statistics"),
        lambda: api.NextReply(result=wire.result_to_wire(fake.release("statistics", X))),
    ]
    outcome = session.aggregate("statistics", X, weight=1.0, metrics={})
    assert not outcome.included
    assert outcome.dropouts == ("a",)


CHUNKS: list[tuple[str, Callable[[bytes], bytes]]] = [
    ("chunk-length", lambda data: data[:-1]),
    ("chunk-length", lambda data: data + b"\0"),
    ("chunk-length", lambda _: b""),
    ("result-digest", lambda data: bytes([data[0] ^ 1]) + data[1:]),
]


@pytest.mark.parametrize(("code", "change"), CHUNKS)
def test_sums_that_are_not_those_signed(
    session: Session, fake: FakeChannel, code: str, change: Callable[[bytes], bytes]
) -> None:
    """And once the coordinator sends the right bytes, the very same call goes through."""
    session.open_task("statistics", _schema(30))
    fake.release("statistics", {"x": np.ones(30)})

    def lie(request: api.GetChunkRequest) -> api.GetChunkReply:
        return api.GetChunkReply(data=change(fake._GetChunk(request).data))

    fake.lies["GetChunk"] = lie
    with refused(FaultyServer, code):
        session.sum({"x": np.ones(30)}, task="statistics")
    del fake.lies["GetChunk"]
    assert session.sum({"x": np.ones(30)}, task="statistics")["x"] == pytest.approx(3.0)


def test_a_sum_of_impossible_weight(session: Session, fake: FakeChannel) -> None:
    session.open_task("statistics", _schema(3))
    data = bytearray(8 * 7)
    fake.release("statistics", X, vector_digest=vector_digest(memoryview(data), 64))
    fake.blobs[str(api.Blob(sum=1))] = data
    with refused(PoisonedResult, "result-weight"):
        add(session)
    fake.release("statistics", X)  # the task goes on with its next round
    assert add(session)["x"] == pytest.approx(3 * X["x"])


def test_initial_weights_that_are_not_those_signed(session: Session, fake: FakeChannel) -> None:
    fake.lies["GetChunk"] = lambda request: api.GetChunkReply(
        data=bytes(len(fake._GetChunk(request).data))
    )
    with refused(FaultyServer, "result-digest"):
        next(iter(session.rounds(nn.Linear(2, 2))))


def test_initial_weights_of_other_shapes(
    federation: Federation,
    fake: FakeChannel,
    monkeypatch: pytest.MonkeyPatch,
    session: Session,
) -> None:
    """A silo that signs a file of other tensors than its schema's is found out."""
    real = tensors.to_file
    monkeypatch.setattr(tensors, "to_file", lambda _: real({"weight": torch.zeros(1)}))
    with refused(InputError, "tensor-names"):
        next(iter(session.rounds(nn.Linear(2, 2))))
    monkeypatch.setattr(tensors, "to_file", lambda _: b"no safetensors")
    fake2 = FakeChannel(federation, fake.config)
    with (
        join_fake(monkeypatch, federation, fake2, "b") as other,
        refused(InputError, "weights-file"),
    ):
        next(iter(other.rounds(nn.Linear(2, 2))))


# The silo's own floors.

POLICIES = [
    ("policy-protection", 'protections = ["masked", ', "protections = ["),
    ("policy-colluders", "colluders = 1", "colluders = 2"),
    ("policy-min-cohort", "min_cohort = 3", "min_cohort = 4"),
    ("policy-ring", "ring_bits = [16, 32, 64]", "ring_bits = [16]"),
    ("policy-clip", 'clips = ["none", "element", "l2"]', 'clips = ["l2"]'),
    ("policy-weight-cap", "max_weight_cap = 1000.0", "max_weight_cap = 99.0"),
]


@pytest.mark.parametrize(("code", "old", "new"), POLICIES, ids=[code for code, *_ in POLICIES])
def test_floors(
    federation: Federation,
    fake: FakeChannel,
    monkeypatch: pytest.MonkeyPatch,
    code: str,
    old: str,
    new: str,
) -> None:
    policy = federation.silo("a") / "policy.toml"
    text = policy.read_text()
    assert old in text
    text = text.replace(old, new)
    if code == "policy-colluders":
        text = text.replace("min_threshold = 3", "min_threshold = 4")
    policy.write_text(text)
    with refused(PolicyRefused, code):
        join_fake(monkeypatch, federation, fake)
    assert fake.methods == ["JoinSession"]


def test_a_floor_of_the_threshold_is_held_at_every_round(
    federation: Federation, fake: FakeChannel, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = federation.silo("a") / "policy.toml"
    policy.write_text(policy.read_text().replace("min_threshold = 3", "min_threshold = 4"))
    with join_fake(monkeypatch, federation, fake) as session:
        fake.events = [lambda: fake.descriptor("statistics")] * 3
        with refused(PolicyRefused, "policy-threshold"):
            add(session)
    assert "Send" not in fake.methods


# What is nobody's fault.


def test_a_message_that_is_too_late_waits_for_what_comes(
    session: Session, fake: FakeChannel
) -> None:
    """The attempt goes on without this silo, and its result is its call's."""

    def late(_: object) -> api.Ack:
        raise TooLate("phase-closed", "The phase has closed.")

    fake.lies["Send"] = late
    fake.events = [
        lambda: fake.descriptor("statistics"),
        api.NextReply(),
        lambda: api.NextReply(result=wire.result_to_wire(fake.release("statistics", X))),
    ]
    assert add(session)["x"] == pytest.approx(3.0)
    seen = [request.seen for method, request in fake.calls if method == "Next"]
    assert seen == [api.STEP_LEFT, api.STEP_DESCRIPTOR, api.STEP_DESCRIPTOR]


def test_a_new_attempt_in_the_middle_of_one_is_met_with_a_new_ready(
    session: Session, fake: FakeChannel
) -> None:
    fake.events = [
        lambda: fake.descriptor("statistics"),
        lambda: fake.descriptor("statistics", attempt=2),
        lambda: fake.descriptor("statistics", attempt=3),
        lambda: api.NextReply(aborted=api.Aborted(phase="share_keys", have=2, need=3)),
        lambda: api.NextReply(result=wire.result_to_wire(fake.release("statistics", X))),
    ]
    assert add(session)["x"] == pytest.approx(3.0)
    assert fake.methods.count("Ready") == 3
    nexts = [(r.attempt, r.seen) for m, r in fake.calls if m == "Next"]
    assert nexts == [
        (0, api.STEP_LEFT),
        (1, api.STEP_DESCRIPTOR),
        (1, api.STEP_LEFT),
        (3, api.STEP_DESCRIPTOR),
        (3, api.STEP_LEFT),
    ]


def test_attempts_that_all_abort_say_why_the_last_one_did(
    session: Session, fake: FakeChannel
) -> None:
    for attempt in range(1, 4):
        fake.events += [
            lambda attempt=attempt: fake.descriptor("statistics", attempt=attempt),  # type: ignore[misc]
            api.NextReply(aborted=api.Aborted(phase="consistency", have=attempt, need=5)),
        ]
    with refused(RoundAborted, "round-aborted") as caught:
        add(session)
    assert "3 of 5" in str(caught.value)
    fake.events = [
        lambda: api.NextReply(result=wire.result_to_wire(fake.release("statistics", X))),
    ]
    assert add(session)["x"] == pytest.approx(3.0)


def test_a_last_message_whose_acknowledgement_was_lost(session: Session, fake: FakeChannel) -> None:
    """Sent again, it meets a session that is done: the result is there, and is checked as ever."""

    def over(_: object) -> api.Ack:
        raise SessionEnded("session-over", "The session is done.")

    fake.lies["Send"] = over
    fake.events = [
        lambda: fake.descriptor("statistics"),
        lambda: api.NextReply(result=wire.result_to_wire(fake.release("statistics", X))),
    ]
    assert add(session)["x"] == pytest.approx(3.0)
    assert fake.methods.count("Ready") == 1


def test_another_tasks_made_up_results_do_not_move_what_the_ledger_remembers(
    session: Session, fake: FakeChannel
) -> None:
    """A coordinator that opened a sum and denies it cannot have the update on a new base."""
    session.open_task("statistics", _schema(3))
    fake.openings["other"] = _opened(fake, session)
    state = session._tasks["statistics"]
    before = transcript.position_of(state.hash, state.released)
    base = session._past.base(state.signed.opening.task)
    fake.release("other", {"x": np.full(3, 2.0)})
    session._past.sync()
    assert session._past.base(state.signed.opening.task) != base
    assert transcript.position_of(state.hash, state.released) == before


def test_more_results_than_the_session_allows(session: Session, fake: FakeChannel) -> None:
    session.open_task("statistics", _schema(3))
    for _ in range(session.task_rounds("statistics") + 1):
        fake.release("statistics", X)
    with refused(FaultyServer, "result-rounds"):
        session._past.sync()


def test_initial_weights_are_proposed_once(session: Session, fake: FakeChannel) -> None:
    """What a silo holds after it took an opening is trained: it is never uploaded in the clear."""
    model = nn.Linear(2, 2)
    next(iter(session.rounds(model)))
    sent = len(fake.blobs)
    fake.openings.pop("training")
    session._tasks._known.clear()  # as after a restart
    with refused(FaultyServer, "task-propose-again"):
        next(iter(session.rounds(model)))
    assert len(fake.blobs) == sent


def test_proposals_that_are_forgotten_again_and_again(
    session: Session, fake: FakeChannel, monkeypatch: pytest.MonkeyPatch
) -> None:
    forgotten: list[api.ProposeTaskRequest] = []

    def forget(request: api.ProposeTaskRequest) -> api.Ack:
        forgotten.append(request)
        assert len(forgotten) < 20
        return api.Ack()

    monkeypatch.setattr(fake, "_ProposeTask", forget)
    with refused(FaultyServer, "task-propose-again"):
        next(iter(session.rounds(nn.Linear(2, 2))))


def test_one_position_opens_one_update(session: Session) -> None:
    """The ledger tells a changed update by its keyed digest, whatever the survivors are."""
    digests = {
        session._digest_of(Update({"x": np.array(value)}, weight, {}))
        for value, weight in (([1.0, 2.0], 1.0), ([1.0, 3.0], 1.0), ([1.0, 2.0], 2.0))
    }
    assert len(digests) == 3
    same = session._digest_of(Update({"x": np.array([1.0, 2.0])}, 1.0, {}))
    assert same in digests
    assert len(same) == 32
