"""A silo's part in the custody of the key, beside a coordinator that lies about it."""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import client_sdk
from client_sdk import keys as keys_module
from client_sdk.channel import CoordinatorRefused, CoordinatorUnreachable
from client_sdk.keys import BOXES, WAITS, Keeper
from client_sdk.session import Session
from secagg.ckks import keyring
from secagg.ckks.custody import ask
from secagg.ckks.keyring import HeldKey, make_key, seal_blob
from secagg.config import Protection
from secagg.crypto.digest import vector_digest
from secagg.crypto.labels import WEIGHTS
from secagg.encoding.schema import Schema
from secagg.errors import (
    ConfigError,
    FaultyClientOrServer,
    FaultyServer,
    PoisonedResult,
    SecaggError,
    SessionEnded,
    StaleKey,
)
from secagg.masking import transcript
from secagg.pki.manifest import SignedManifest
from secagg.suite import SUMS_PER_KEY, KeyName
from secagg.wire import custody as wire_custody
from secagg.wire._pb import service_pb2 as api
from secagg.wire.attempt import key_from_wire, key_to_wire
from secagg.wire.session import SignedOpening, opening_to_wire

from .fakes import SESSION_ID, FakeChannel, MemoryDisk, join_fake
from .federation import Federation, make_session, make_sum, make_task, refused

X = {"x": np.ones(3)}
SCHEMA = Schema.of(X)
CHUNK = 2**15
NOTHING: Callable[..., bool] = lambda *_: False  # noqa: E731


@pytest.fixture(autouse=True)
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Pauses that would have been made."""
    made: list[float] = []
    still = SimpleNamespace(sleep=made.append, monotonic=lambda: 0.0)
    monkeypatch.setattr(keys_module, "time", still)
    return made


def make_fake(federation: Federation, **changes: Any) -> FakeChannel:
    values: dict[str, Any] = {"protection": Protection.CKKS_MASKED, "chunk_bytes": CHUNK}
    values |= changes
    return FakeChannel(federation, make_session(make_sum(), make_task(), **values))


@pytest.fixture
def fake(federation: Federation) -> FakeChannel:
    return make_fake(federation)


@pytest.fixture
def disk() -> MemoryDisk:
    return MemoryDisk()


def join(federation: Federation, fake: FakeChannel, disk: MemoryDisk) -> Session:
    """Join as silo a, without a thread that keeps the key."""
    profile = client_sdk.load_profile(federation.silo("a"))
    return Session(fake.config.name, profile, channel=fake, disk=disk)  # type: ignore[arg-type]


@pytest.fixture
def session(federation: Federation, fake: FakeChannel, disk: MemoryDisk) -> Iterator[Session]:
    with join(federation, fake, disk) as joined:
        yield joined


def newest(session: Session) -> HeldKey:
    assert session._keys is not None
    return session._keys.newest(session._past.opened)


def held(session: Session) -> HeldKey | None:
    assert session._keys is not None
    return session._keys.held


def add(session: Session) -> Any:
    return session.sum(X)["x"]


def raising(error: SecaggError) -> Callable[[Any], Any]:
    def lie(_: object) -> Any:
        raise error

    return lie


# Coming by a key.


def test_the_first_silo_makes_the_key(
    session: Session, fake: FakeChannel, disk: MemoryDisk
) -> None:
    """It tells its name and whom it is for, and leaves it nowhere."""
    key = newest(session)
    assert newest(session) is key
    assert (key.epoch, list(key.members)) == (1, ["a", "b", "c", "d"])
    (announced,) = [request for method, request in fake.calls if method == "AnnounceKey"]
    assert key_from_wire(announced) == key.name
    assert list(announced.members) == list(key.members)
    secret = key.material.reveal()
    said = [request.SerializeToString() for _, request in fake.calls]
    kept = [*disk.files.values(), repr(key).encode(), repr(session._keys).encode()]
    for text in (*said, *kept):
        assert secret not in text
        assert secret.hex().encode() not in text


def test_the_others_key_is_asked_for_and_taken(session: Session, fake: FakeChannel) -> None:
    key = fake.others_make(3)
    assert newest(session) == key
    epochs = [request.request.epoch for method, request in fake.calls if method == "AskKey"]
    assert epochs == [1, 3]
    assert "AnnounceKey" not in fake.methods


def test_a_silo_waits_for_whoever_has_the_key(session: Session, fake: FakeChannel) -> None:
    """Empty replies to long polls; the request stays the same."""
    key, empty = fake.others_make(), [api.AskKeyReply()] * 3
    fake.lies["AskKey"] = lambda request: empty.pop() if empty else fake._AskKey(request)
    assert newest(session) == key
    asked = {r.request.ephemeral for method, r in fake.calls if method == "AskKey"}
    assert (fake.methods.count("AskKey"), len(asked)) == (4, 1)


def test_a_maker_that_was_not_the_quickest_takes_the_others_key(
    session: Session, fake: FakeChannel
) -> None:
    def announced(_: object) -> api.Ack:
        fake.others_make()
        raise CoordinatorRefused("key-announced", "Another key of this epoch was announced.")

    fake.lies["AnnounceKey"] = announced
    assert newest(session) == fake.key


def test_the_manifest_may_change_while_a_key_is_made(session: Session, fake: FakeChannel) -> None:
    """The coordinator has a newer one than this silo had when it joined."""
    without(fake, "d")

    def announce(request: api.AnnounceKeyRequest) -> api.Ack:
        if list(request.members) != ["a", "b", "c"]:
            raise CoordinatorRefused("key-members", "Made for others than the session's silos.")
        return api.Ack()

    fake.lies["AnnounceKey"] = announce
    assert list(newest(session).members) == ["a", "b", "c"]


def without(fake: FakeChannel, silo: str) -> None:
    """Revoke a silo: the coordinator has the manifest that says so."""
    old = fake.manifest.manifest
    silos = {name: key for name, key in old.silos.items() if name != silo}
    newer = replace(old, version=old.version + 1, silos=silos)
    fake.manifest = SignedManifest.sign(newer, fake.authority_key)


# Lies about keys.


def test_two_makers_never_share_a_round(session: Session, fake: FakeChannel) -> None:
    """The coordinator has two silos make the key of one epoch: each side refuses the other's."""
    session.open_task("statistics", SCHEMA)
    ours, theirs = newest(session), fake.others_make()
    assert ours.epoch == theirs.epoch
    fake.events = [lambda: fake.descriptor("statistics", key=theirs.name)] * 3
    with refused(FaultyServer, "descriptor-key"):
        add(session)
    assert "Send" not in fake.methods
    stale = [StaleKey("key-stale", "There is another key.")]

    def ready(_: object) -> api.Ack:
        if stale:
            raise stale.pop()
        return api.Ack()

    fake.lies["Ready"] = ready
    fake.calls.clear()
    with refused(FaultyServer, "key-worn"):
        add(session)
    wanted = [request.request.epoch for method, request in fake.calls if method == "AskKey"]
    assert wanted == [2] * WAITS  # a key of its own epoch would end it; each side asks for one
    assert "Send" not in fake.methods


def test_a_second_key_of_an_epoch_is_not_made(session: Session, fake: FakeChannel) -> None:
    key = newest(session)
    assert session._keys is not None
    with pytest.raises((FaultyServer, FaultyClientOrServer)) as caught:
        session._keys.find(KeyName(1, bytes(32)))  # asks; the coordinator says "make" again
    assert caught.value.code == "key-epoch"
    assert held(session) == key


@pytest.mark.parametrize("epoch", [1, 2])
def test_an_epoch_never_decreases(
    federation: Federation, fake: FakeChannel, disk: MemoryDisk, epoch: int
) -> None:
    """Nor over a restart without the key: the ledger remembers."""
    with join(federation, fake, disk) as session:
        fake.others_make(3)
        newest(session)
        fake.others_make(epoch)
        assert session._keys is not None
        session._keys.outdated(newest(session).name)
        with refused(FaultyServer, "key-epoch"):
            newest(session)
    again = FakeChannel(federation, fake.config)
    again.others_make(epoch)
    with join(federation, again, disk) as session, refused(FaultyServer, "key-epoch"):
        newest(session)
    replaced = FakeChannel(federation, fake.config)
    replaced.others_make(3)  # the very epoch, another key
    with join(federation, replaced, disk) as session, refused(FaultyClientOrServer, "key-replaced"):
        newest(session)
    assert replaced.methods.count("AskKey") == WAITS
    right = FakeChannel(federation, fake.config)
    right.others_make(4)
    with join(federation, right, disk) as session:
        assert newest(session) == right.key


Box = Callable[[FakeChannel, api.AskKeyRequest], api.AskKeyReply]


def altered(**changes: Any) -> Box:
    """A box with fields changed after it was signed."""

    def make(fake: FakeChannel, request: api.AskKeyRequest) -> api.AskKeyReply:
        reply = fake.box(request)
        for field, value in changes.items():
            setattr(reply.box, field, value)
        return reply

    return make


def flipped(fake: FakeChannel, request: api.AskKeyRequest) -> api.AskKeyReply:
    reply = fake.box(request)
    sealed = bytearray(reply.box.sealed)
    sealed[0] ^= 1
    reply.box.sealed = bytes(sealed)
    return reply


def replayed(fake: FakeChannel, request: api.AskKeyRequest) -> api.AskKeyReply:
    """A good answer to an older request of this very silo."""
    _, older = ask(fake.custodian("a"), fake.epoch, os.urandom)
    return fake.box(api.AskKeyRequest(request=wire_custody.request_to_wire(older)))


def elsewhere(fake: FakeChannel, request: api.AskKeyRequest) -> api.AskKeyReply:
    """A good answer to another silo."""
    _, other = ask(fake.custodian("c"), fake.epoch, os.urandom)
    return fake.box(api.AskKeyRequest(request=wire_custody.request_to_wire(other)))


USELESS: list[tuple[str, type[SecaggError], Box]] = [
    ("key-box-signature", FaultyClientOrServer, flipped),
    ("key-box-signature", FaultyClientOrServer, altered(key_id=bytes(32))),
    ("key-box-signature", FaultyClientOrServer, altered(sender="c")),
    ("key-box-signature", FaultyClientOrServer, altered(recipient="c")),
    ("key-box-signature", FaultyClientOrServer, altered(signature=bytes(64))),
    ("key-box-silo", FaultyClientOrServer, altered(sender="nobody")),
    ("key-box-request", FaultyClientOrServer, replayed),
    ("key-box-request", FaultyClientOrServer, elsewhere),
]
CASES = pytest.mark.parametrize(
    ("code", "kind", "box"), USELESS, ids=[f"{c}-{i}" for i, (c, *_) in enumerate(USELESS)]
)


@CASES
def test_a_box_that_is_no_use_is_asked_for_again(
    session: Session,
    fake: FakeChannel,
    caplog: pytest.LogCaptureFixture,
    code: str,
    kind: type[SecaggError],
    box: Box,
) -> None:
    key, bad = fake.others_make(), [box] * (BOXES - 1)
    fake.lies["AskKey"] = lambda request: (bad.pop() if bad else FakeChannel.box)(fake, request)
    assert newest(session) == key
    asked = {r.request.ephemeral for method, r in fake.calls if method == "AskKey"}
    assert len(asked) == BOXES
    assert caplog.text.count(code) == BOXES - 1


@CASES
def test_boxes_that_are_no_use_are_given_up(
    session: Session, fake: FakeChannel, code: str, kind: type[SecaggError], box: Box
) -> None:
    fake.others_make()
    there = fake._AskKey

    def useless(request: api.AskKeyRequest) -> api.AskKeyReply:
        return box(fake, request) if request.request.epoch == fake.epoch else there(request)

    fake.lies["AskKey"] = useless
    with refused(kind, code):
        newest(session)
    wanted = [request.request.epoch for method, request in fake.calls if method == "AskKey"]
    assert wanted == [1] * BOXES + [2] * (WAITS - BOXES)  # then it asks for a newer key
    assert held(session) is None


CERTAIN: list[tuple[str, Box]] = [
    ("key-box-own", altered(sender="a")),
    ("message-size", altered(sealed=b"")),
    ("message-number", altered(epoch=0)),
    ("message-name", altered(sender="")),
]


@pytest.mark.parametrize(("code", "box"), CERTAIN, ids=[code for code, _ in CERTAIN])
def test_boxes_that_only_the_coordinator_can_have_made(
    session: Session, fake: FakeChannel, code: str, box: Box
) -> None:
    fake.others_make()
    fake.lies["AskKey"] = lambda request: box(fake, request)
    with refused(FaultyServer, code):
        newest(session)
    assert fake.methods.count("AskKey") == 1


ENDLESS: list[Callable[[FakeChannel], None]] = [
    lambda fake: fake.lies.update(AskKey=lambda r: api.AskKeyReply(epoch=r.request.epoch)),
    lambda fake: fake.lies.update(AskKey=lambda r: api.AskKeyReply(epoch=r.request.epoch + 1)),
    lambda fake: fake.lies.update(AnnounceKey=raising(StaleKey("key-stale", "It is over."))),
    lambda fake: fake.lies.update(AnnounceKey=raising(CoordinatorRefused("key-members", "No."))),
]


@pytest.mark.parametrize("lie", ENDLESS, ids=["same-epoch", "next-epoch", "stale", "refused"])
def test_a_coordinator_that_never_comes_to_a_key_is_given_up(
    session: Session, fake: FakeChannel, lie: Callable[[FakeChannel], None]
) -> None:
    lie(fake)
    with refused(FaultyServer, "key-worn"):
        newest(session)
    assert fake.methods.count("AskKey") == WAITS


def test_a_key_that_is_stale_and_never_replaced(session: Session, fake: FakeChannel) -> None:
    """Every Ready is refused for the key, and what is given out is that very key."""
    fake.others_make()
    session.open_task("statistics", SCHEMA)
    fake.lies["Ready"] = raising(StaleKey("key-stale", "There is another key."))
    with refused(FaultyServer, "key-worn"):
        add(session)
    assert fake.methods.count("AskKey") <= WAITS + 1


DESCRIBED = [
    ("none", lambda key: None),
    ("another", lambda key: KeyName(key.epoch, bytes(32))),
    ("older", lambda key: KeyName(1, key.key_id)),
    ("newer", lambda key: KeyName(key.epoch + 1, key.key_id)),
]


@pytest.mark.parametrize("change", [c for _, c in DESCRIBED], ids=[n for n, _ in DESCRIBED])
@pytest.mark.parametrize("protection", [Protection.CKKS_MASKED, Protection.CKKS])
def test_a_round_under_another_key(
    federation: Federation,
    disk: MemoryDisk,
    protection: Protection,
    change: Callable[[KeyName], KeyName | None],
) -> None:
    federation.allow(protection)
    fake = make_fake(federation, protection=protection)
    key = fake.others_make(2).name
    with join(federation, fake, disk) as session:
        fake.events = [lambda: fake.descriptor("statistics", key=change(key))] * 3
        with refused(FaultyServer, "descriptor-key"):
            add(session)
    assert "Send" not in fake.methods
    assert "PutChunk" not in fake.methods


def test_a_round_with_a_key_where_nothing_is_sealed(
    federation: Federation, disk: MemoryDisk
) -> None:
    fake = make_fake(federation, protection=Protection.MASKED)
    with join(federation, fake, disk) as session:
        name = KeyName(1, bytes(32))
        fake.events = [lambda: fake.descriptor("statistics", key=name)] * 3
        with refused(FaultyServer, "descriptor-key"):
            add(session)


def test_a_worn_key_in_use(
    session: Session, fake: FakeChannel, pauses: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keyring, "SUMS_PER_KEY", 1)
    fake.others_make()
    session.open_task("statistics", SCHEMA)
    fake.release("statistics", X)
    np.testing.assert_allclose(add(session), 3.0, rtol=0, atol=1e-6)
    with refused(FaultyServer, "key-worn"):
        add(session)
    assert len(pauses) == WAITS
    assert "Ready" not in fake.methods
    key = fake.others_make(2)
    assert newest(session) == key


def test_a_key_that_is_worn_when_it_comes(session: Session, fake: FakeChannel) -> None:
    """A silo that was away counts the sums that were opened meanwhile."""
    key = fake.others_make()
    assert session._keys is not None
    with refused(FaultyServer, "descriptor-key-worn"):
        session._keys.newest({key.name: SUMS_PER_KEY})


def test_a_key_that_a_revoked_silo_has(
    session: Session, fake: FakeChannel, pauses: list[float]
) -> None:
    session.open_task("statistics", SCHEMA)
    key = fake.others_make()
    assert newest(session) == key
    without(fake, "d")
    with refused(FaultyServer, "key-worn"):
        add(session)
    assert len(pauses) == WAITS
    assert "Ready" not in fake.methods


# Results.


POISONED: list[tuple[str, Callable[[FakeChannel], dict[str, Any]]]] = [
    ("reserved-slot", lambda fake: {"seeds": tuple(os.urandom(32) for _ in range(3))}),
    ("seed-duplicate", lambda fake: {"seeds": (bytes(32),) * 3}),
    ("reserved-slot", lambda fake: {"sealed_under": other_key(fake), "key": fake.key.name}),  # type: ignore[union-attr]
]


def other_key(fake: FakeChannel) -> HeldKey:
    return make_key(SESSION_ID, 1, fake.custodian("b").members, os.urandom)


@pytest.mark.parametrize(("code", "changes"), POISONED, ids=["seeds", "one-seed", "another-key"])
def test_sums_that_do_not_open(
    session: Session,
    fake: FakeChannel,
    code: str,
    changes: Callable[[FakeChannel], dict[str, Any]],
) -> None:
    """Nothing is applied, the epoch is ended, and the next round is under the next key."""
    key = fake.others_make()
    session.open_task("statistics", SCHEMA)
    fake.release("statistics", X, **changes(fake))
    with refused(PoisonedResult, code):
        add(session)
    ended = [(key_from_wire(r), r.round) for method, r in fake.calls if method == "EndKey"]
    assert ended == [(key.name, 1)]
    assert held(session) is None
    following = fake.others_make(2)
    fake.release("statistics", X)
    np.testing.assert_allclose(add(session), 3.0, rtol=0, atol=1e-6)
    assert newest(session) == following


def test_words_that_are_no_residues(session: Session, fake: FakeChannel) -> None:
    fake.others_make()
    session.open_task("statistics", SCHEMA)
    data = bytearray(b"\xff" * (8 * 4096))
    fake.release("statistics", X, vector_digest=vector_digest(memoryview(data), CHUNK))
    fake.blobs[str(api.Blob(sum=1))] = data
    with refused(PoisonedResult, "residue-range"):
        add(session)


@pytest.mark.parametrize("protection", [Protection.CKKS_MASKED, Protection.MASKED])
def test_a_result_that_names_a_key_where_none_is_and_none_where_one_is(
    federation: Federation, disk: MemoryDisk, protection: Protection
) -> None:
    fake = make_fake(federation, protection=protection)
    changes: dict[str, Any] = {"key": None, "seeds": ()}
    if protection.seals:
        fake.others_make()
    else:
        seeds = tuple(os.urandom(32) for _ in range(3))
        changes = {"key": KeyName(1, bytes(32)), "seeds": seeds}
    with join(federation, fake, disk) as session:
        session.open_task("statistics", SCHEMA)
        fake.release("statistics", X, **changes)
        with refused(FaultyServer, "result-key"):
            add(session)


def test_a_past_sum_whose_key_nobody_has(session: Session, fake: FakeChannel) -> None:
    fake.others_make()
    session.open_task("statistics", SCHEMA)
    fake.release("statistics", X)
    fake.others_make(2)
    with refused(ConfigError, "key-gone"):
        add(session)
    assert "EndKey" not in fake.methods
    assert session.rounds_done == 1  # and the call can be made again


# Initial weights.

WEIGHT = b"a file of initial weights"


def opening(fake: FakeChannel, **changes: Any) -> None:
    """Have silo b propose the training with initial weights, honestly but for the changes.

    Args:
        fake: where.
        changes: ``inside`` instead of the weights that are sealed; ``key`` that they are sealed
            under; ``sealed`` says whether they are.
    """
    b = fake.custodian("b")
    blob: bytes | bytearray = changes.get("inside", WEIGHT)
    key: Any = changes.get("key", fake.key)
    if changes.get("sealed", True):
        blob = seal_blob(key, WEIGHTS, ("training",), blob, os.urandom)
    digest = vector_digest(memoryview(WEIGHT), CHUNK)
    own = transcript.TaskOpening("training", SCHEMA, "step", digest)
    sealed_digest = vector_digest(memoryview(blob), CHUNK) if changes.get("sealed", True) else b""
    signed = SignedOpening.sign(own, len(blob), b.name, b.identity, b.transcript, sealed_digest)
    fake.openings["training"] = opening_to_wire(signed)
    fake.blobs[str(api.Blob(weights="training"))] = bytearray(blob)


def test_initial_weights_are_sealed_for_the_others(
    federation: Federation, session: Session, fake: FakeChannel, disk: MemoryDisk
) -> None:
    session.open_task("training", SCHEMA, step="step", weights=WEIGHT)
    assert all(WEIGHT not in blob for blob in fake.blobs.values())
    assert all(WEIGHT not in r.SerializeToString() for _, r in fake.calls)
    assert bytes(session.initial_weights("training")) == WEIGHT


def test_initial_weights_of_another_silo(session: Session, fake: FakeChannel) -> None:
    fake.others_make()
    opening(fake)
    session.open_task("training", SCHEMA, step="step", weights=b"mine")
    assert bytes(session.initial_weights("training")) == WEIGHT


def test_initial_weights_that_are_altered(session: Session, fake: FakeChannel) -> None:
    fake.others_make()
    opening(fake)
    fake.blobs[str(api.Blob(weights="training"))][40] ^= 1
    session.open_task("training", SCHEMA, step="step")
    with refused(FaultyServer, "result-digest"):
        session.initial_weights("training")


def test_initial_weights_that_their_proposer_did_not_sign(
    session: Session, fake: FakeChannel
) -> None:
    fake.others_make()
    opening(fake, inside=b"others, of the same size!")
    session.open_task("training", SCHEMA, step="step")
    with refused(FaultyClientOrServer, "weights-digest") as caught:
        session.initial_weights("training")
    assert isinstance(caught.value, FaultyClientOrServer)
    assert caught.value.client == "b"


def test_initial_weights_under_a_key_that_nobody_has(session: Session, fake: FakeChannel) -> None:
    fake.others_make()
    opening(fake, key=other_key(fake))
    session.open_task("training", SCHEMA, step="step")
    with refused(ConfigError, "key-gone"):
        session.initial_weights("training")


@pytest.mark.parametrize("protection", [Protection.CKKS_MASKED, Protection.MASKED])
def test_weights_are_sealed_where_the_session_seals_and_there_alone(
    federation: Federation, disk: MemoryDisk, protection: Protection
) -> None:
    fake = make_fake(federation, protection=protection)
    with join(federation, fake, disk) as session:
        key = fake.others_make()
        opening(fake, sealed=not protection.seals, key=key)
        with refused(FaultyServer, "task-sealed"):
            session.open_task("training", SCHEMA, step="step")


# What is there before any key moves.


@pytest.mark.parametrize("missing", ["tenseal.sealapi", "zstandard"])
def test_without_the_library(
    federation: Federation, disk: MemoryDisk, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    for protection in (Protection.CKKS_MASKED, Protection.CKKS):
        federation.allow(protection)
        fake = make_fake(federation, protection=protection)
        with refused(ConfigError, "extra-missing") as caught:
            join(federation, fake, disk)
        assert "pip install 'secagg[ckks]'" in str(caught.value)
        assert fake.methods == ["JoinSession"]
        assert fake.closed
        if protection is Protection.CKKS_MASKED:
            masked = make_fake(federation, protection=Protection.MASKED)
            with join(federation, masked, disk) as session:
                session.open_task("statistics", SCHEMA)


# The keeper.


class Pauses(threading.Event):
    """Takes the place of the keeper's pause: nobody waits, and after so many it is over."""

    def __init__(self, many: int) -> None:
        super().__init__()
        self.made: list[float | None] = []
        self.over = threading.Event()
        self.many = many
        self.last: Callable[[], None] = self.over.set

    def wait(self, timeout: float | None = None) -> bool:
        self.made.append(timeout)
        if len(self.made) >= self.many:
            self.last()
            self.over.set()
        return False


def keep(session: Session, many: int) -> Pauses:
    """Run a keeper until it has paused so many times; it has ended then."""
    assert session._keys is not None
    paused = Pauses(many)
    session._keys.arrived = paused
    begun = threading.Event()

    def last() -> None:
        begun.wait(30)
        keeper.close()

    paused.last = last
    keeper = Keeper(session._keys, NOTHING)
    begun.set()
    keeper._thread.join(30)
    assert not keeper._thread.is_alive()
    return paused


def wish(fake: FakeChannel, silo: str, signer: str, epoch: int = 1) -> api.KeyRequest:
    """A request that names one silo and is signed by another or the same."""
    as_signer = replace(fake.custodian(signer), name=fake.custodian(silo).name)
    _, request = ask(as_signer, epoch, os.urandom)
    return wire_custody.request_to_wire(request)


def test_the_keeper_answers_as_long_as_it_is_asked(session: Session, fake: FakeChannel) -> None:
    """A coordinator that was killed has lost the box, and lists the request again."""
    newest(session)
    fake.wishes = [wish(fake, "b", "b"), wish(fake, "c", "c")]
    keep(session, 4)
    boxes = [request.box for method, request in fake.calls if method == "SendKeyBox"]
    assert [(box.sender, box.recipient) for box in boxes[:2]] == [("a", "b"), ("a", "c")]
    assert len(boxes) % 2 == 0
    assert len(boxes) > 2


def stranger(fake: FakeChannel) -> api.KeyRequest:
    request = wish(fake, "b", "b")
    request.silo = "nobody"
    return request


def malformed(fake: FakeChannel) -> api.KeyRequest:
    request = wish(fake, "b", "b")
    request.ephemeral = bytes(31)
    return request


WISHES: list[tuple[str, Callable[[FakeChannel], api.KeyRequest]]] = [
    ("key-request-silo", stranger),
    ("key-request-signature", lambda fake: wish(fake, "b", "c")),
    ("key-request-own", lambda fake: wish(fake, "a", "a")),
    ("key-request-epoch", lambda fake: wish(fake, "b", "b", epoch=2)),
    ("public-key-encoding", malformed),
]


@pytest.mark.parametrize(("code", "make"), WISHES, ids=[code for code, _ in WISHES])
def test_the_keeper_gives_nothing_to_others_and_does_not_spin(
    session: Session,
    fake: FakeChannel,
    caplog: pytest.LogCaptureFixture,
    code: str,
    make: Callable[[FakeChannel], api.KeyRequest],
) -> None:
    """A coordinator that repeats the request is asked again after pauses that grow."""
    newest(session)
    fake.wishes = [make(fake)]
    paused = keep(session, 8)
    assert "SendKeyBox" not in fake.methods
    assert fake.methods.count("AwaitKeyRequests") <= 9
    assert paused.made == sorted(paused.made)  # type: ignore[type-var]
    assert paused.made[0] >= 1.0  # type: ignore[operator]
    assert caplog.text.count("is not answered") == 1
    assert code in caplog.text


def test_the_keeper_gives_nothing_to_who_has_left(session: Session, fake: FakeChannel) -> None:
    newest(session)
    fake.wishes = [wish(fake, "d", "d")]
    without(fake, "d")
    session._membership.refresh()
    keep(session, 2)
    assert "SendKeyBox" not in fake.methods


def test_the_keeper_without_a_key_asks_nothing(session: Session, fake: FakeChannel) -> None:
    keep(session, 3)
    assert "AwaitKeyRequests" not in fake.methods
    key = fake.others_make()
    assert newest(session) == key
    fake.lies["AwaitKeyRequests"] = raising(StaleKey("key-stale", "Another epoch has begun."))
    keep(session, 3)
    assert fake.methods.count("AwaitKeyRequests") == 1  # until there is another key
    assert held(session) is None


def test_the_keeper_survives_an_unreachable_coordinator(
    session: Session, fake: FakeChannel, caplog: pytest.LogCaptureFixture
) -> None:
    newest(session)
    fake.wishes = [wish(fake, "b", "b")]
    away = [CoordinatorUnreachable("coordinator-unreachable", "It did not answer.")] * 2

    def gone(request: Any) -> Any:
        if away:
            raise away.pop()
        return fake._AwaitKeyRequests(request)

    fake.lies["AwaitKeyRequests"] = gone
    keep(session, 4)
    assert caplog.text.count("coordinator-unreachable") == 2
    assert fake.methods.count("SendKeyBox") >= 1


def test_the_keeper_ends_with_the_session_it_serves(
    session: Session, fake: FakeChannel, caplog: pytest.LogCaptureFixture
) -> None:
    """That is how every session ends: nobody is warned."""
    newest(session)
    fake.lies["AwaitKeyRequests"] = raising(SessionEnded("session-over", "It is done."))
    assert session._keys is not None
    with caplog.at_level(logging.WARNING, "client_sdk"):
        keeper = Keeper(session._keys, NOTHING)
        keeper._thread.join(30)
    assert not keeper._thread.is_alive()
    assert caplog.text == ""
    assert fake.methods.count("AwaitKeyRequests") == 1


def test_closing_a_session_ends_keeper_and_workers(
    federation: Federation, fake: FakeChannel, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = set(threading.enumerate())
    session = join_fake(monkeypatch, federation, fake)
    assert session._keys is not None
    sealer = session._keys.sealer(newest(session))
    sealer._crew._size, sealer._crew._closed = 2, False  # also where there is one processor
    assert sealer._crew._started() is not None
    pids = [worker.pid for worker in sealer._crew._workers]
    assert len(pids) == 2
    session.close()
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    for thread in set(threading.enumerate()) - before:
        thread.join(30)
        assert not thread.is_alive()


def test_ending_an_epoch_is_a_courtesy(session: Session, fake: FakeChannel) -> None:
    """The last sum of a session may be the one that does not open: the session is over by then."""
    key = fake.others_make()
    fake.lies["EndKey"] = raising(SessionEnded("session-over", "It is done."))
    session.open_task("statistics", SCHEMA)
    fake.release("statistics", X, seeds=tuple(os.urandom(32) for _ in range(3)))
    with refused(PoisonedResult, "reserved-slot"):
        add(session)
    (ended,) = [request for method, request in fake.calls if method == "EndKey"]
    assert ended.key == key_to_wire(key.name)
