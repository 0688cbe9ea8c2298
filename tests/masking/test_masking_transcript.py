"""The transcript, computed again with hashlib: what it covers, and what it leaves out."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from secagg.config import (
    Clip,
    MaskPrg,
    Metric,
    Phase,
    Protection,
    SessionConfig,
    ThresholdRule,
    Weighting,
)
from secagg.encoding.schema import Schema
from secagg.masking import transcript
from secagg.masking.manifest import Manifest
from secagg.suite import KeyName

from .harness import (
    BASE,
    KEY,
    SESSION_ID,
    A,
    B,
    C,
    D,
    Play,
    identity,
    make_manifest,
    make_sealed_session,
    make_session,
    make_task,
    silos,
)


def enc(*items: bytes) -> bytes:
    """u32be(n) ‖ Σ u64be(len xi) ‖ xi."""
    out = len(items).to_bytes(4, "big")
    for item in items:
        out += len(item).to_bytes(8, "big") + item
    return out


def h(label: str, *items: bytes) -> bytes:
    """SHA-256(enc("secagg/1/" + label, x…))."""
    return hashlib.sha256(enc(b"secagg/1/" + label.encode(), *items)).digest()


def u(value: int, size: int = 8) -> bytes:
    """A big-endian number."""
    return value.to_bytes(size, "big")


def names(members: tuple[str, ...]) -> bytes:
    """A list of names."""
    return enc(*(name.encode() for name in members))


def number(value: float) -> bytes:
    """A float, exactly."""
    return value.hex().encode()


def session_again(s: SessionConfig) -> bytes:
    """The session hash, written again."""
    tasks = [
        enc(
            t.name.encode(),
            t.weighting.value.encode(),
            u(t.rounds),
            u(t.ring_bits or 0),
            number(t.bound),
            t.clip.value.encode(),
            number(t.weight_cap),
            enc(*(enc(m.name.encode(), number(m.bound)) for m in t.metrics)),
        )
        for t in s.tasks
    ]
    return h(
        "session",
        s.consortium.encode(),
        names(s.silos),
        s.protection.value.encode(),
        u(s.colluders),
        u(s.threshold.numerator),
        u(s.threshold.denominator),
        u(s.min_cohort),
        s.mask_prg.value.encode(),
        u(s.chunk_bytes),
        enc(*tasks),
        *([] if s.suite is None else [s.suite.value.encode()]),
    )


SESSION = make_session(5, tasks=(make_task(), make_task(name="statistics")))


SEALED = {how: make_sealed_session(5, how) for how in (Protection.CKKS, Protection.CKKS_MASKED)}


def test_session_hash_again() -> None:
    for session in (SESSION, make_session(), *SEALED.values()):
        assert transcript.session_hash(session) == session_again(session)


def test_masked_sessions_are_as_they_were_before_there_were_suites() -> None:
    """Pinned from version d5843ef: sessions, silos' memories and journals of then go on."""
    two = (
        make_task(),
        make_task(
            name="statistics",
            weighting=Weighting.SUM,
            weight_cap=1.0,
            ring_bits=64,
            metrics=(),
        ),
    )
    session = make_session(
        5,
        tasks=two,
        mask_prg=MaskPrg.CHACHA20,
        colluders=2,
        min_cohort=4,
        chunk_bytes=4096,
    )
    assert transcript.session_hash(session).hex() == (
        "f8f286dcecd006bfca30e66a4e4fc5f69cbdfb876366ebef0cb164e3854401da"
    )
    assert transcript.session_hash(make_session()).hex() == (
        "707ffecde51ec6eaebaf6eac152d7858048df60bba55811a7fc53c8857c48b1b"
    )


def test_a_masked_attempt_is_byte_for_byte_what_it_was() -> None:
    """Pinned from version d5843ef: every transcript, and the signed result, under keyed entropy."""
    play = Play().advance(None)
    assert [tau.hex() for tau in play.taus] == [
        "2f4d960b0bd1b4e6aea87918f6b8eebb9f0605a58b60b0546153195d5589a762",
        "3d5a6ba0134d41408a00b90f6cdba91bc734970f049a81605836a027cd646502",
        "91609fe2cb401c4773d18839ebbbafbb809da99294c7fd7151026d6a176dafb2",
        "4976775711737fc997f8fc302d770191a72d0791a333bfc400ae3d429e146f5d",
    ]
    assert play.broadcast.signature.hex() == (
        "9340997b6f01888e4c4c5fc62d10beada70b9c3a338b8d4441ba9836695ef78f"
        "ef54aaa15f4cfed20074aaca7abbefd3ecd941420f72fb94f7ee903367efb503"
    )


def test_protections_are_other_sessions() -> None:
    """Alike in all but the protection, its suite and its ring."""
    sessions = (make_session(5), *SEALED.values())
    assert len({transcript.session_hash(session) for session in sessions}) == 3


def test_another_suite_is_another_session() -> None:
    session = make_sealed_session(5)
    object.__setattr__(session, "suite", SimpleNamespace(encode=lambda: b"ckks-55"))
    assert transcript.session_hash(session) != transcript.session_hash(make_sealed_session(5))


def task_changed(**changes: Any) -> dict[str, Any]:
    """A session's second task with these changes."""
    return {"tasks": (SESSION.tasks[0], dataclasses.replace(SESSION.tasks[1], **changes))}


COVERED: dict[str, dict[str, Any]] = {
    "consortium": {"consortium": "insurers"},
    "silos": {"silos": silos(6)},
    "colluders": {"colluders": 2, "min_cohort": 5, "threshold": ThresholdRule(3, 4)},
    "numerator": {"threshold": ThresholdRule(3, 4)},
    "denominator": {"threshold": ThresholdRule(2, 4)},
    "min_cohort": {"min_cohort": 4},
    "mask_prg": {"mask_prg": MaskPrg.CHACHA20},
    "chunk_bytes": {"chunk_bytes": 64},
    "one task": {"tasks": SESSION.tasks[:1]},
    "task order": {"tasks": SESSION.tasks[::-1]},
    "task name": task_changed(name="means"),
    "weighting": task_changed(weighting=Weighting.SUM, weight_cap=1.0),
    "rounds": task_changed(rounds=99),
    "ring_bits": task_changed(ring_bits=64),
    "bound": task_changed(bound=4.000000000000001),
    "clip": task_changed(clip=Clip.NONE),
    "weight_cap": task_changed(weight_cap=99.0),
    "no metrics": task_changed(metrics=()),
    "metric name": task_changed(metrics=(Metric("auc", 8.0), Metric("accuracy", 1.0))),
    "metric bound": task_changed(metrics=(Metric("loss", 9.0), Metric("accuracy", 1.0))),
    "metric order": task_changed(metrics=SESSION.tasks[1].metrics[::-1]),
}
LEFT_OUT: dict[str, dict[str, Any]] = {
    "name": {"name": "another"},
    "train_deadline": {"train_deadline": 1.0},
    "phase_deadline": {"phase_deadline": 1.0},
    "max_attempts": {"max_attempts": 9},
}


def test_everything_that_matters_changes_the_session_hash() -> None:
    hashes = [transcript.session_hash(dataclasses.replace(SESSION, **c)) for c in COVERED.values()]
    hashes.append(transcript.session_hash(SESSION))
    assert len(set(hashes)) == len(hashes)


@pytest.mark.parametrize("changes", LEFT_OUT.values(), ids=LEFT_OUT.keys())
def test_names_and_deadlines_do_not(changes: dict[str, Any]) -> None:
    changed = dataclasses.replace(SESSION, **changes)
    assert changed != SESSION
    assert transcript.session_hash(changed) == transcript.session_hash(SESSION)


# Tasks, history, base.


def schema(**shapes: tuple[int, ...]) -> Schema:
    """A schema of these tensors."""
    return Schema.of({name: np.zeros(shape, np.float32) for name, shape in shapes.items()})


OPENING = transcript.TaskOpening("training", schema(w=(2, 3), b=(3,)), "sgd 0.1", b"w" * 32)


def test_task_history_and_base_again() -> None:
    session = transcript.session_hash(SESSION)
    task = h(
        "task", session, b"training", OPENING.schema.encode(), b"sgd 0.1", OPENING.weights_digest
    )
    assert OPENING.digest(session) == task
    history = h("history", session)
    assert transcript.first_history(session) == history
    later = h("history", history, b"4" * 32)
    assert transcript.next_history(history, b"4" * 32) == later
    assert transcript.base_of(later, task) == h("base", later, task)


def test_the_position_of_a_task_again() -> None:
    """Its own results move it, in their order, and nothing else does."""
    task, results = b"t" * 32, [b"1" * 32, b"2" * 32]
    position = h("history", task)
    assert transcript.position_of(task, []) == position
    for result in results:
        position = h("history", position, result)
    assert transcript.position_of(task, results) == position
    others = ([], results[:1], results[::-1], [*results, bytes(32)])
    assert len({transcript.position_of(task, other) for other in others} | {position}) == 5


def test_every_field_of_an_opening_changes_its_hash() -> None:
    session = transcript.session_hash(SESSION)
    openings = [
        OPENING,
        dataclasses.replace(OPENING, task="statistics"),
        dataclasses.replace(OPENING, schema=schema(w=(3, 2), b=(3,))),
        dataclasses.replace(OPENING, schema=schema(w=(6,), b=(3,))),
        dataclasses.replace(OPENING, schema=schema(w=(2, 3), c=(3,))),
        dataclasses.replace(OPENING, schema=schema(w=(2, 3))),
        dataclasses.replace(OPENING, step="sgd 0.2"),
        dataclasses.replace(OPENING, weights_digest=transcript.NO_WEIGHTS),
    ]
    hashes = {opening.digest(session) for opening in openings}
    hashes |= {OPENING.digest(transcript.session_hash(make_session()))}
    assert len(hashes) == len(openings) + 1


@given(st.lists(st.binary(min_size=32, max_size=32), min_size=1, max_size=4), st.data())
def test_histories_are_equal_only_if_all_results_were(results: list[bytes], data: Any) -> None:
    def of(taus: list[bytes]) -> bytes:
        history = transcript.first_history(bytes(32))
        for tau4 in taus:
            history = transcript.next_history(history, tau4)
        return history

    other = data.draw(st.lists(st.sampled_from([*results, bytes(32)]), max_size=4))
    assert (of(results) == of(other)) == (results == other)


def test_an_opening_is_signed_for_one_session() -> None:
    session = transcript.session_hash(SESSION)
    assert transcript.opening_transcript(session, SESSION_ID) == h("session", session, SESSION_ID)
    two = (SESSION_ID, bytes(32))
    found = {transcript.opening_transcript(a, b) for a in (session, bytes(32)) for b in two}
    assert len(found) == 4


# The attempt's own.


def test_all_transcripts_of_an_attempt_again(play: Play) -> None:
    d = play.descriptor
    tau0 = h(
        "round",
        SESSION_ID,
        session_again(play.session),
        u(7),
        h("manifest", play.manifest.encode()),
        b"training",
        u(1),
        u(1),
        d.nonce,
        names((A, B, C, D)),
        u(3, 4),
        BASE,
    )
    assert transcript.round_transcript(d) == play.taus[0] == tau0

    roster = play.advance(Phase.SHARE_KEYS).broadcast
    adverts = [
        enc(enc(a.sender.encode(), a.channel_key, a.mask_key, a.self_seed_hash), a.signature)
        for a in roster.adverts
    ]
    tau1 = h("roster", tau0, *adverts)
    assert play.taus[1] == tau1

    play.advance(Phase.MASKED_INPUT)
    bodies = []
    for name in silos(4):
        m = play.sent[name, Phase.SHARE_KEYS]
        commitments = h(
            "commitments",
            *(enc(c.holder.encode(), c.mask_key, c.self_seed) for c in m.commitments),
        )
        boxes = h("boxes", *(enc(b.recipient.encode(), b.sealed) for b in m.boxes))
        bodies.append(enc(name.encode(), commitments, boxes))
    tau2 = h("dealt", tau1, *bodies)
    assert play.taus[2] == tau2

    survivors = play.advance(Phase.CONSISTENCY, silent={Phase.MASKED_INPUT: [D]}).broadcast
    commits = [
        enc(
            c.sender.encode(),
            h("commit", enc(c.sender.encode(), c.vector_digest, enc())),
        )
        for c in survivors.commits
    ]
    tau3 = h("survivors", tau2, *commits)
    assert play.taus[3] == tau3
    assert transcript.result_transcript(tau3, b"v" * 32) == h("result", tau3, b"v" * 32)


def test_transcripts_of_a_sealed_attempt_again() -> None:
    """τ0 names the key, τ3 the seeds; where nothing is shared, τ3 follows τ1 at once."""
    play = Play(make_sealed_session()).advance(Phase.MASKED_INPUT)
    d = play.descriptor
    place = (b"training", u(1), u(1), d.nonce, names((A, B, C, D)), u(3, 4), BASE)
    head = (SESSION_ID, session_again(play.session), u(7), h("manifest", play.manifest.encode()))
    tau0 = h("round", *head, *place, u(KEY.epoch), KEY.key_id)
    adverts = [enc(a.body(), a.signature) for a in play.broadcast.adverts]
    tau1 = h("roster", tau0, *adverts)
    assert play.taus == [tau0, tau1]

    survivors = play.advance(Phase.CONSISTENCY, silent={Phase.MASKED_INPUT: [D]}).broadcast
    commits = []
    for name, commit in zip((A, B, C), survivors.commits, strict=True):
        assert commit.seed == play.seeds[name]
        body = enc(name.encode(), commit.vector_digest, enc(), play.seeds[name])
        commits.append(enc(name.encode(), h("commit", body)))
    assert play.taus[2:] == [h("survivors", tau1, *commits)]


def test_another_epoch_or_key_is_another_attempt() -> None:
    descriptor = Play(make_sealed_session()).descriptor
    keys = [None, KEY, KeyName(2, KEY.key_id), KeyName(1, bytes(32))]
    changed = [dataclasses.replace(descriptor, key=key) for key in keys]
    assert len({transcript.round_transcript(other) for other in changed}) == len(keys)


def test_shares_are_committed_to_under_the_roster(play: Play) -> None:
    play.advance(Phase.UNMASKING)
    reveal = play.step(A)
    for share in reveal.shares:
        listed = {c.holder: c for c in play.sent[share.owner, Phase.SHARE_KEYS].commitments}
        assert listed[A].self_seed == h(
            "share",
            play.taus[1],
            share.owner.encode(),
            b"silo-a",
            b"self-seed",
            share.salt.reveal(),
            share.share.reveal(),
        )


@pytest.mark.parametrize(
    "changes",
    [
        {"session_id": bytes(32)},
        {"session_hash": bytes(32)},
        {"manifest_version": 8},
        {"manifest_digest": bytes(32)},
        {"task": "statistics"},
        {"round": 2},
        {"attempt": 2},
        {"nonce": bytes(32)},
        {"cohort": (A, B, C)},
        {"threshold": 4},
        {"base": bytes(32)},
        {"key": KEY},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_every_field_of_a_descriptor_changes_tau0(play: Play, changes: dict[str, Any]) -> None:
    changed = dataclasses.replace(play.descriptor, **changes)
    assert transcript.round_transcript(changed) != play.taus[0]
    unsigned = dataclasses.replace(play.descriptor, signature=bytes(64))
    assert transcript.round_transcript(unsigned) == play.taus[0]


def one(**changes: Any) -> Callable[[tuple[Any, ...]], tuple[Any, ...]]:
    """Change the first message of a list."""
    return lambda messages: (dataclasses.replace(messages[0], **changes), *messages[1:])


@pytest.mark.parametrize(
    "change",
    [
        one(sender="silo-0"),
        one(channel_key=b"\x09" + bytes(31)),
        one(mask_key=b"\x09" + bytes(31)),
        one(self_seed_hash=bytes(32)),
        one(signature=bytes(64)),
        lambda adverts: adverts[1:],
        lambda adverts: adverts[::-1],
        lambda adverts: (*adverts, adverts[0]),
    ],
)
def test_every_field_of_a_roster_changes_tau1(play: Play, change: Callable[..., Any]) -> None:
    adverts = play.advance(Phase.SHARE_KEYS).broadcast.adverts
    tau1 = transcript.roster_transcript(play.taus[0], adverts)
    assert transcript.roster_transcript(play.taus[0], change(adverts)) != tau1
    assert transcript.roster_transcript(bytes(32), adverts) != tau1


def test_every_dealing_changes_tau2_and_their_order_does_not(play: Play) -> None:
    play.advance(Phase.MASKED_INPUT)
    dealt = {name: play.sent[name, Phase.SHARE_KEYS].body() for name in silos(4)}
    tau2 = transcript.dealt_transcript(play.taus[1], dealt)
    backwards = dict(reversed(dealt.items()))
    assert transcript.dealt_transcript(play.taus[1], backwards) == tau2
    for name, body_ in dealt.items():
        less = {other: body for other, body in dealt.items() if other != name}
        assert transcript.dealt_transcript(play.taus[1], less) != tau2
        changed = dealt | {name: body_ + b"x"}
        assert transcript.dealt_transcript(play.taus[1], changed) != tau2
    assert transcript.dealt_transcript(bytes(32), dealt) != tau2


@pytest.mark.parametrize(
    "change",
    [
        one(sender="silo-0"),
        one(vector_digest=bytes(32)),
        one(bad_dealers=(D,)),
        one(seed=bytes(32)),
        lambda commits: commits[1:],
        lambda commits: commits[::-1],
    ],
)
def test_every_field_of_a_commit_changes_tau3(play: Play, change: Callable[..., Any]) -> None:
    commits = play.advance(Phase.CONSISTENCY).broadcast.commits
    tau3 = transcript.survivors_transcript(play.taus[2], commits)
    assert transcript.survivors_transcript(play.taus[2], change(commits)) != tau3
    assert transcript.survivors_transcript(bytes(32), commits) != tau3


def test_result_transcript_covers_both() -> None:
    taus = {
        transcript.result_transcript(a, b) for a in (BASE, bytes(32)) for b in (BASE, bytes(32))
    }
    assert len(taus) == 4


# The manifest.


def test_manifest_digest_again() -> None:
    manifest = make_manifest((B, A), revoked=("0a", "ff"))
    silos_ = enc(*(enc(n.encode(), identity(n).public) for n in (A, B)))
    encoded = enc(b"hospitals", u(7), silos_, identity("coordinator").public, enc(b"0a", b"ff"))
    assert manifest.encode() == encoded
    assert manifest.digest() == h("manifest", encoded)


def test_every_field_of_a_manifest_changes_its_digest() -> None:
    manifests: list[Manifest] = [
        make_manifest((A, B)),
        make_manifest((A, B), consortium="insurers"),
        make_manifest((A, B), version=8),
        make_manifest((A,)),
        make_manifest((A, B), silos={A: identity(B).public, B: identity(A).public}),
        make_manifest((A, B), coordinator=None),
        make_manifest((A, B), coordinator=identity(A).public),
        make_manifest((A, B), revoked=("0a",)),
        make_manifest((A, B), revoked=("0a", "0b")),
    ]
    assert len({manifest.digest() for manifest in manifests}) == len(manifests)
    assert make_manifest((B, A)).digest() == manifests[0].digest()
