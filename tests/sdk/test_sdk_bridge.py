"""Nobody has the key of past sums any more: who is behind goes on from what its peers agree on."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from safetensors.torch import load, save

from client_sdk import bridge as bridge_module
from client_sdk import keys
from client_sdk import tensors as tensors_module
from client_sdk.bridge import Bridge, Bridged, _unpacked
from client_sdk.channel import CoordinatorRefused
from client_sdk.checkpoint import Found
from client_sdk.session import Session
from client_sdk.tensors import GlobalWeights, Snapshot
from client_sdk.trainer import rounds
from secagg.config import Protection
from secagg.crypto.digest import vector_digest
from secagg.crypto.sign import IdentityKey
from secagg.errors import (
    ConfigError,
    FaultyClient,
    FaultyClientOrServer,
    FaultyServer,
    InputError,
    NotFound,
    TooLate,
)
from secagg.wire._pb import service_pb2 as api
from secagg.wire.custody import SignedCheckpoint, checkpoint_from_wire, checkpoint_to_wire

from .federation import SILOS, Federation, make_task, rank, refused

ROUNDS = 3


def trained(until: int) -> Callable[[Session], list[float]]:
    """Train until so many results are applied; returns the weights then."""

    def program(session: Session) -> list[float]:
        torch.manual_seed(0)
        model = torch.nn.Linear(2, 1)
        for current in session.rounds(model, optimizer=lambda p: torch.optim.Adam(p, lr=0.1)):
            if current.number > until:
                break
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(rank(session) / 8)
            current.submit(model, weight=1.0)
        return [float(x) for p in model.parameters() for x in p.detach().reshape(-1)]

    return program


def lost_keys(federation: Federation) -> str:
    """Two rounds, everybody's process ends after each, and keys with it; d loses the second's."""
    name = federation.create(
        make_task(rounds=ROUNDS), protection=Protection.CKKS_MASKED, phase_deadline=2.0
    )
    federation.play(name, trained(1))
    (place,) = federation.silo("d").rglob("global.safetensors")
    before = place.read_bytes()
    federation.play(name, trained(2))
    place.write_bytes(before)
    return name


@pytest.fixture(autouse=True)
def _brisk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keys, "_PAUSE_SECONDS", 0.05)
    monkeypatch.setattr(bridge_module, "ASKS", 5)


def test_a_silo_behind_the_gap_goes_on_from_what_its_peers_agree_on(
    federation: Federation, caplog: pytest.LogCaptureFixture
) -> None:
    """Over the wire, with a real coordinator."""
    name = lost_keys(federation)
    weights = federation.play(name, trained(ROUNDS))
    assert all(weights[silo] == pytest.approx(weights["a"], abs=1e-6) for silo in SILOS)
    assert re.search("goes on from the checkpoint after 2 results that ., . agree on", caplog.text)
    epochs = [result.key.epoch for result in federation.show(name).results]
    assert epochs == [1, 2, 3]  # whenever everybody had lost the key


def test_sums_without_a_model_cannot_be_bridged(federation: Federation) -> None:
    name = federation.create(
        make_task(rounds=ROUNDS), protection=Protection.CKKS_MASKED, phase_deadline=2.0
    )

    def once(session: Session) -> None:
        session.mean({"x": torch.ones(2).numpy() * rank(session)})

    federation.play(name, once)
    with refused(ConfigError, "key-gone"):
        federation.play(name, once)


# What is taken, of whom: a coordinator in memory that says what a test has it say.

TASK = "training"
NAMES = ("a", "b", "c", "d", "e")
IDENTITIES = {name: IdentityKey.generate(os.urandom) for name in (*NAMES, "z")}
HISTORIES = [bytes([number]) * 32 for number in range(4)]
TAU = bytes(32)
CHUNK = 4096
SEAL = b"sealed:"


class Sealing:
    """Keys as far as a bridge needs them."""

    def newest(self, opened: object) -> None: ...

    def seal_blob(self, label: str, parties: tuple[str, ...], data: bytes) -> bytearray:
        return bytearray(SEAL + data)

    def open_blob(self, label: str, parties: tuple[str, ...], data: bytearray) -> bytearray:
        if not data.startswith(SEAL):
            raise ConfigError("key-gone", "Nobody has it.")
        return data[len(SEAL) :]


class Desk:
    """The coordinator: keeps what it is given, and hands out what it likes."""

    def __init__(self) -> None:
        self.offers: dict[str, SignedCheckpoint] = {}
        self.blobs: dict[bytes, bytes] = {}
        self.asked: list[tuple[int, list[str]]] = []
        self.refusals: list[Exception] = []
        self.known = 2
        self.later: list[Callable[[], object]] = []
        self.fetched: list[str] = []

    def call(self, method: str, request: Any, kind: type, *, seconds: float = 0.0) -> Any:
        return getattr(self, f"_{method}")(request)

    def call_many(self, method: str, requests: Iterable[Any], kind: type) -> None:
        for request in requests:
            self.call(method, request, kind)

    def each(self, method: str, requests: Iterable[Any], kind: type) -> Iterator[Any]:
        for request in requests:
            yield self.call(method, request, kind)

    def _PutChunk(self, request: api.PutChunkRequest) -> api.Ack:
        if self.refusals:
            raise self.refusals.pop()
        digest = request.blob.checkpoint.digest
        self.blobs[digest] = self.blobs.get(digest, b"")[: request.offset] + request.data
        return api.Ack()

    def _OfferCheckpoint(self, request: api.OfferCheckpointRequest) -> api.Ack:
        signed = checkpoint_from_wire(request.checkpoint)
        self.offers[signed.sender] = signed
        return api.Ack()

    def _AskCheckpoint(self, request: api.AskCheckpointRequest) -> api.AskCheckpointReply:
        """As many as are there: a malicious one minds neither the wish nor who is refused."""
        self.asked.append((request.wish.need, list(request.refused)))
        if len(self.asked) > 1 and self.later:
            self.later.pop(0)()
        found = [checkpoint_to_wire(offer) for offer in self.offers.values()]
        return api.AskCheckpointReply(checkpoints=found)

    def _GetChunk(self, request: api.GetChunkRequest) -> api.GetChunkReply:
        where = request.blob.checkpoint
        self.fetched.append(where.sender)
        if where.digest not in self.blobs:
            raise NotFound("checkpoint-unknown", "It is gone.")
        data = self.blobs[where.digest]
        return api.GetChunkReply(data=data[request.offset : request.offset + CHUNK])


class Released:
    """The past: the desk knows of more results than a silo, until that lists them."""

    def __init__(self, desk: Desk, known: int = 2) -> None:
        self.desk = desk
        self.known = known
        self.histories = HISTORIES

    def sync(self) -> None:
        self.known = self.desk.known

    def of(self, task: str) -> list[Any]:
        return [SimpleNamespace(round=number) for number in range(1, self.known + 1)]


def end(desk: Desk, name: str = "d", kept: Found | None = None, **changes: Any) -> Bridge:
    """A silo's end."""
    values: dict[str, Any] = {
        "name": name,
        "identity": IDENTITIES[name],
        "session_id": bytes(32),
        "session": SimpleNamespace(silos=NAMES, colluders=1, chunk_bytes=CHUNK),
        "policy": SimpleNamespace(colluders=1),
        "manifest": SimpleNamespace(silos={n: IDENTITIES[n].public for n in NAMES}),
    }
    member = SimpleNamespace(**values | changes)
    here = SimpleNamespace(member=member, opening_transcript=TAU, refresh=lambda: member)
    own = SimpleNamespace(find_global=lambda _: kept)
    return Bridge(*cast(Any, (Sealing(), here, desk, own, Released(desk, 0))))


def adam(parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=0.1)


def model(steps: int, optimizer: Any = adam, shift: float = 0.0) -> GlobalWeights:
    """Global weights after so many results; with a shift, not those that the sums led to."""
    weights = GlobalWeights({"w": torch.arange(6.0) / 8, "x": torch.ones(2, 2)}, optimizer)
    for number in range(1, steps + 1):
        delta = {"w": np.arange(6.0) - 3, "x": np.full((2, 2), 1e-3 * number)}
        weights.step(delta)
    weights.set({n: t + shift for n, t in weights._parameters.items()})
    return weights


def kept(weights: GlobalWeights, results: int = 2, **about: Any) -> Found:
    """What a silo keeps of them."""
    optimizer, held = weights.optimizer_state()
    place = {"results": results, "round": results, "history": HISTORIES[results].hex()}
    return Found(
        {"optimizer": optimizer, "format": 1, "name": "global"} | place | about,
        weights.file(held, {}),
    )


def offer(desk: Desk, name: str, found: Found | None = None) -> None:
    """A silo offers its checkpoint; an honest one's if none is given."""
    assert end(desk, name, found or kept(model(2))).offer(TASK, 0, set())


def forge(desk: Desk, name: str, data: bytes, results: int = 2, **changes: Any) -> SignedCheckpoint:
    """A silo signs and seals whatever it likes."""
    values: dict[str, Any] = {
        "task": TASK,
        "results": results,
        "sender": name,
        "size": len(data),
        "digest": vector_digest(data, CHUNK),
        "identity": IDENTITIES[name],
        "transcript": TAU,
    }
    signed = desk.offers[name] = SignedCheckpoint.sign(**values | changes)
    desk.blobs[signed.digest] = data
    return signed


def taken(desk: Desk, results: int = 0, judge: GlobalWeights | None = None, **changes: Any) -> Any:
    """What d goes on from: the weights after it."""
    judge = judge or model(0)
    before = kept(judge, 0)
    bridge = end(desk, **changes)
    try:
        bridged = bridge.fetch(TASK, results, judge)
    finally:
        assert kept(judge, 0) == before  # whatever came, nothing is applied
    judge.adopt(bridged.model)
    return bridged.results, kept(judge, bridged.results).data


HONEST = (2, kept(model(2)).data)


def test_what_enough_peers_agree_on_is_taken() -> None:
    desk = Desk()
    for name in "abc":
        offer(desk, name)
    assert taken(desk) == HONEST
    assert set(desk.fetched) == {"a", "b"}  # no more than are needed


def test_a_colluding_peer_cannot_steer_one_silo(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its checkpoint alone, chosen by the coordinator, decided on one honest silo's model."""
    desk = Desk()
    steered = kept(model(2, shift=7.0))
    offer(desk, "c", steered)
    with monkeypatch.context() as weakened:
        weakened.setattr(Bridge, "enough", 1)
        assert taken(desk) == (2, steered.data)
    with refused(ConfigError, "key-gone"):
        taken(desk)
    desk.offers["b"] = replace(desk.offers["c"], sender="b")
    with refused(FaultyServer, "checkpoint-signature"):
        taken(desk)
    del desk.offers["b"]
    offer(desk, "a")
    with refused(FaultyClientOrServer, "checkpoint-disagrees") as caught:
        taken(desk)
    assert caught.value.client == "a, c"  # type: ignore[attr-defined]


def test_two_checkpoints_of_one_silo_do_not_count_twice() -> None:
    desk = Desk()
    offer(desk, "c", kept(model(2, shift=7.0)))
    desk.offers["again"] = desk.offers["c"]
    with refused(FaultyServer, "checkpoint-origin"):
        taken(desk)


def test_a_policy_that_assumes_more_colluders_needs_more_peers() -> None:
    desk = Desk()
    for name in "ab":
        offer(desk, name)
    with refused(ConfigError, "key-gone"):
        taken(desk, policy=SimpleNamespace(colluders=2))
    offer(desk, "c")
    assert taken(desk, policy=SimpleNamespace(colluders=2)) == HONEST
    assert desk.asked[-1] == (3, [])


@pytest.mark.parametrize("liar", ["a", "b", "c"])
def test_one_bad_of_three_is_left_out(liar: str, caplog: pytest.LogCaptureFixture) -> None:
    """Whoever of the first two lies, the third is waited for."""
    desk = Desk()
    for name in "abc":
        offer(desk, name, kept(model(2, shift=1e-3)) if name == liar else None)
    late = desk.offers.pop("c")
    desk.later = [lambda: desk.offers.update(c=late)]
    assert taken(desk) == HONEST
    assert (f"{liar} gave another one" in caplog.text) is (liar != "c")
    assert desk.asked == ([(2, []), (3, [])] if liar != "c" else [(2, [])])


def test_peers_that_all_disagree() -> None:
    desk = Desk()
    for number, name in enumerate("abce"):
        offer(desk, name, kept(model(2, shift=float(number))))
    before = len(desk.asked)
    with refused(FaultyClientOrServer, "checkpoint-disagrees") as caught:
        taken(desk)
    assert caught.value.client == "a, b, c, e"  # type: ignore[attr-defined]
    assert len(desk.asked) - before == 3  # of two, three and four; there are no five others


def test_the_newest_results_that_enough_agree_on() -> None:
    desk = Desk()
    desk.known = 3
    offer(desk, "a", kept(model(3), 3))
    for name in "bc":
        offer(desk, name)
    assert taken(desk) == HONEST
    assert set(desk.fetched) == {"a", "b", "c"}


def test_results_that_were_released_meanwhile() -> None:
    """Peers are ahead of what this silo has listed."""
    desk = Desk()
    for name in "ab":
        offer(desk, name, kept(model(3), 3))
    desk.offers, there = {}, desk.offers

    def release() -> None:
        desk.known, desk.offers = 3, there

    desk.later = [release]
    assert taken(desk) == (3, kept(model(3)).data)


def test_a_silo_that_left_the_consortium_does_not_count() -> None:
    desk = Desk()
    for name in "ab":
        offer(desk, name)
    left = {n: IDENTITIES[n].public for n in "bcde"}
    with refused(ConfigError, "key-gone"):
        taken(desk, manifest=SimpleNamespace(silos=left))
    with refused(ConfigError, "key-gone"):
        taken(desk, manifest=SimpleNamespace(silos={n: left[n] for n in "bd"}))
    assert len(desk.asked) == 5  # where two others cannot be, nobody is waited for


def test_where_nothing_was_released_no_checkpoint_can_help() -> None:
    with refused(ConfigError, "key-gone"):
        taken(desk := Desk(), results=2)
    assert desk.asked == []


ORIGINS: dict[str, tuple[str, dict[str, Any]]] = {
    "another task": ("checkpoint-origin", {"task": "statistics"}),
    "no further": ("checkpoint-origin", {"results": 1}),
    "nobody of the session": ("checkpoint-origin", {"sender": "z", "identity": IDENTITIES["z"]}),
    "this silo itself": ("checkpoint-origin", {"sender": "d", "identity": IDENTITIES["d"]}),
    "another silo's signature": ("checkpoint-signature", {"identity": IDENTITIES["c"]}),
    "another session's": ("checkpoint-signature", {"transcript": bytes(31) + b"1"}),
}


@pytest.mark.parametrize("case", ORIGINS)
def test_offers_that_are_not_what_was_asked_for(case: str) -> None:
    code, changes = ORIGINS[case]
    desk = Desk()
    forge(desk, "a", bytes(9), **changes)
    with refused(FaultyServer, code):
        taken(desk, 1)


def test_bytes_that_are_not_those_that_were_signed() -> None:
    desk = Desk()
    for name in "ab":
        offer(desk, name)
    signed = desk.offers["a"]
    desk.blobs[signed.digest] = bytes(signed.size)
    with refused(FaultyServer, "result-digest"):
        taken(desk)


def test_an_offer_that_goes_while_it_is_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    desk = Desk()
    for name in "abc":
        offer(desk, name)
    data = desk.blobs.pop(desk.offers["a"].digest)
    desk.later = [lambda: desk.blobs.update({desk.offers["a"].digest: data})]
    assert taken(desk) == HONEST
    assert desk.fetched[0] == "a"

    def forgotten(_: Any) -> None:
        raise NotFound("session-unknown", "Forgotten.")

    monkeypatch.setattr(desk, "_GetChunk", forgotten)
    with refused(NotFound, "session-unknown"):
        taken(desk)


# What a peer may have sealed.


def sealed(about: Any, data: bytes | None = None, length: int | None = None) -> bytes:
    text = about if isinstance(about, bytes) else json.dumps(about).encode()
    size = len(text) if length is None else length
    return (
        SEAL + size.to_bytes(8, "little") + text + (kept(model(2)).data if data is None else data)
    )


GOOD = {key: kept(model(2)).about[key] for key in ("results", "round", "history", "optimizer")}
OTHER_RATE = kept(model(2, lambda p: torch.optim.Adam(p, lr=0.2))).about["optimizer"]
INTEGER_RATE = json.loads(json.dumps(kept(model(2)).about["optimizer"]).replace("0.1", "1"))
TENSORS = load(kept(model(2)).data)
NAN = TENSORS | {"weight/w": torch.full((6,), float("nan"))}
NAN_MOMENT = TENSORS | {"optimizer/1": torch.full((6,), float("inf"))}
DEEP = "[" * 99 + "]" * 99
PAST, CONTENT = (FaultyClientOrServer, "checkpoint-past"), (FaultyClient, "checkpoint-content")
BAD: dict[str, tuple[tuple[type[Any], str], bytes]] = {
    "no seal": (CONTENT, b"unsealed" + sealed(GOOD)),
    "nothing": (CONTENT, SEAL),
    "a length beyond the end": (CONTENT, sealed(GOOD, b"", 2**40)),
    "a length of too much": (CONTENT, sealed(json.dumps(GOOD).encode().ljust(2**24 + 1))),
    "no JSON": (CONTENT, sealed(b"results")),
    "no text": (CONTENT, sealed(b"\xff\xfe[\x00")),
    "a list": (CONTENT, sealed([])),
    "deep JSON": (CONTENT, sealed(b"[" * 200_000)),
    "rather deep JSON": (
        CONTENT,
        sealed(json.dumps(GOOD | {"optimizer": 0}).replace(": 0", ": " + DEEP).encode()),
    ),
    "a long number": (CONTENT, sealed(b'{"results": ' + b"9" * 5000 + b"}")),
    "no optimiser": (CONTENT, sealed({k: v for k, v in GOOD.items() if k != "optimizer"})),
    "a field more": (CONTENT, sealed(GOOD | {"epoch": 1})),
    "more results": (PAST, sealed(GOOD | {"results": 3})),
    "no results": (PAST, sealed(GOOD | {"results": 0})),
    "results in floats": (PAST, sealed(GOOD | {"results": 2.0})),
    "a round in floats": (PAST, sealed(GOOD | {"round": 2.0})),
    "another round": (PAST, sealed(GOOD | {"round": 1})),
    "no round": (PAST, sealed(GOOD | {"round": None})),
    "another history": (PAST, sealed(GOOD | {"history": HISTORIES[1].hex()})),
    "no safetensors": (CONTENT, sealed(GOOD, b"tensors")),
    "no tensors": (CONTENT, sealed(GOOD, b"")),
    "other tensors": (CONTENT, sealed(GOOD, save({"weight/w": torch.ones(6)}))),
    "another shape": (CONTENT, sealed(GOOD, save(TENSORS | {"weight/w": torch.ones(7)}))),
    "another type": (CONTENT, sealed(GOOD, save(TENSORS | {"weight/w": torch.ones(6).double()}))),
    "a weight that is none": (CONTENT, sealed(GOOD, save(NAN))),
    "a moment that is none": (CONTENT, sealed(GOOD, save(NAN_MOMENT))),
    "no optimiser's state": (CONTENT, sealed(GOOD | {"optimizer": 5})),
    "no settings": (CONTENT, sealed(GOOD | {"optimizer": {"dict": []}})),
    "settings of its own": (CONTENT, sealed(GOOD | {"optimizer": OTHER_RATE})),
    "settings in integers": (CONTENT, sealed(GOOD | {"optimizer": INTEGER_RATE})),
}


@pytest.mark.parametrize("case", BAD)
def test_content_that_is_none_blames_its_sender(case: str) -> None:
    """And keeps nobody from going on with the others, in whose place it does not stand."""
    (kind, code), data = BAD[case]
    desk = Desk()
    forge(desk, "a", data)
    offer(desk, "b")
    with refused(kind, code) as caught:
        taken(desk)
    assert caught.value.client == "a"  # type: ignore[attr-defined]
    assert (desk.asked[0], desk.asked[-1]) == ((2, []), (2, ["a"]))
    offer(desk, "c")
    assert taken(desk) == HONEST


def test_what_is_nested_deep_is_no_checkpoint() -> None:
    about = json.dumps(GOOD | {"optimizer": 0}).replace(": 0", ": " + DEEP).encode()
    with pytest.raises(ValueError, match="nested too deep"):
        _unpacked(bytearray(len(about).to_bytes(8, "little") + about))


def test_the_same_bytes_after_other_results() -> None:
    """Who signs for more results than there are, or a size that no model has."""
    desk = Desk()
    forge(desk, "a", sealed(GOOD), 3)
    forge(desk, "b", sealed(GOOD), size=2**60)
    fetched = len(desk.fetched)
    with refused(FaultyClient, "checkpoint-content"):
        taken(desk)
    assert set(desk.fetched[fetched:]) == {"a"}  # not a byte of that size


# What agrees.


def snapshot(**changes: torch.Tensor) -> Snapshot:
    named = {name.replace("_", "/"): value for name, value in changes.items()}
    return model(0).read(save(TENSORS | named), GOOD["optimizer"])


def nudged(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Snapshot:
    return snapshot(**{name.replace("/", "_"): change(TENSORS[name].clone())})


def at(index: int, value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor.view(-1)[index] = value
        return tensor

    return change


def test_machines_that_round_otherwise_agree() -> None:
    judge = model(0)
    ulp = lambda t: torch.nextafter(t, t + 1)  # noqa: E731
    for name in ("weight/w", "weight/x", "optimizer/1", "optimizer/2"):
        assert judge.agree(snapshot(), nudged(name, lambda t: torch.where(t == 0, t, ulp(t))))
    assert judge.agree(snapshot(), nudged("weight/w", lambda t: t + 9e-6))
    assert not judge.agree(snapshot(), nudged("weight/w", lambda t: t + 1e-4))


def test_an_optimiser_s_small_numbers_are_held_close() -> None:
    """A step divides by the root of the second moment: 1e-5 more or less there is no rounding."""
    judge = model(0)
    moment, square = TENSORS["optimizer/1"], TENSORS["optimizer/2"]
    small = int(square.view(-1).argsort()[1])
    for change in (at(small, 0.0), at(small, 1e-5), at(small, -1e-9)):
        assert not judge.agree(snapshot(), nudged("optimizer/2", change))
        assert not judge.agree(nudged("optimizer/2", change), snapshot())
    zero = int((moment.view(-1) == 0).nonzero()[0])
    assert not judge.agree(snapshot(), nudged("optimizer/1", at(zero, 1e-9)))
    assert not judge.agree(snapshot(), nudged("optimizer/1", at(0, float(moment[0]) * 1.001)))


@pytest.mark.parametrize(
    ("a", "b", "same"),
    [
        (1.0, 1.0 + 1e-9, True),
        (1.0, 1.1, False),
        (float("inf"), float("inf"), True),
        (1, 1.0, False),
        (1, True, False),
        ([1, "x", None], [1, "x", None], True),
        ([1], [1, 2], False),
        ({"a": 1}, {"a": 2}, False),
        ({"a": 1}, {"b": 1}, False),
    ],
)
def test_what_an_optimiser_remembers_beside_tensors(a: Any, b: Any, same: bool) -> None:
    assert tensors_module._alike(a, b) is same


def test_counts_are_the_same_or_not() -> None:
    five, six = torch.tensor([5]), torch.tensor([6])
    assert [tensors_module._near(five, other) for other in (five, six)] == [True, False]


def test_a_checkpoint_that_this_optimiser_does_not_take(monkeypatch: pytest.MonkeyPatch) -> None:
    """All or nothing, though peers agree on it."""
    judge = model(1)
    before = kept(judge, 1)
    for broken in (None, ValueError("no such state")):

        def restore(self: GlobalWeights, kept: Snapshot, broken: Any = broken) -> bool:
            self.set(kept.weights)
            if broken is not None:
                raise broken
            return False

        with monkeypatch.context() as patch:
            patch.setattr(GlobalWeights, "_restore", restore)
            with refused(InputError, "checkpoint-model"):
                judge.adopt(snapshot())
        assert kept(judge, 1) == before
    judge.adopt(snapshot())
    assert kept(judge, 2) == kept(model(2))


# What a trainer does with it.


class Behind:
    """A session whose initial weights, or whose first sum, nobody can open."""

    def __init__(self, *, first_opens: bool) -> None:
        self.first_opens = first_opens
        self.state = SimpleNamespace(calls=0)
        self.kept: list[Found] = []

    def open_task(self, *_: Any, **__: Any) -> Any:
        return self.state

    def on_export(self, _: Any) -> None: ...

    def find_global(self, _: str) -> None: ...

    def task_rounds(self, _: str) -> int:
        return 2

    def initial_weights(self, _: str) -> bytes:
        if not self.first_opens:
            raise ConfigError("key-gone", "Nobody has it.")
        return save({"w": torch.zeros(6), "x": torch.zeros(2, 2)})

    def replay(self, _: str) -> None:
        if not self.kept:
            raise ConfigError("key-gone", "Nobody has it.")

    def bridge(self, _: str, judge: GlobalWeights) -> Bridged[Snapshot]:
        return Bridged(2, judge.read(kept(model(2)).data, GOOD["optimizer"]))

    def keep_global(self, _: str, about: Any, make: Callable[[dict[str, str]], bytes]) -> None:
        self.kept.append(Found(about | {"results": self.state.calls}, make({})))


def made() -> torch.nn.Module:
    """The silo's own model."""
    local = torch.nn.Module()
    local.w = torch.nn.Parameter(torch.ones(6))
    local.x = torch.nn.Parameter(torch.ones(2, 2))
    return local


@pytest.mark.parametrize("first_opens", [False, True])
def test_what_was_taken_over_is_kept(first_opens: bool) -> None:
    """A restart is not to ask again: the peers may be gone by then."""
    session = Behind(first_opens=first_opens)
    local = made()
    assert list(rounds(cast(Session, session), local, TASK, adam, None)) == []
    assert [(f.about["results"], f.data) for f in session.kept] == [HONEST]
    assert torch.equal(local.w, TENSORS["weight/w"])


@pytest.mark.parametrize("first_opens", [False, True])
def test_another_refusal_is_not_bridged(monkeypatch: pytest.MonkeyPatch, first_opens: bool) -> None:
    session = Behind(first_opens=first_opens)

    def other(_: str) -> bytes:
        raise ConfigError("ledger-rolled-back", "Lost.")

    monkeypatch.setattr(session, "replay" if first_opens else "initial_weights", other)
    with refused(ConfigError, "ledger-rolled-back"):
        list(rounds(cast(Session, session), made(), TASK, adam, None))


# What a silo offers.


def test_an_offer_counts_once_it_was_accepted() -> None:
    """One that was refused, or is not there any more, is made when it is asked for again."""
    desk, offered = Desk(), set[tuple[str, int]]()
    bridge = end(desk, "a", kept(model(2)))
    desk.refusals = [CoordinatorRefused("checkpoint-uploads", "Enough."), TooLate("x", "Over.")]
    assert [bridge.offer(TASK, 0, offered) for _ in range(2)] == [False, False]
    assert (offered, desk.offers) == (set(), {})
    assert bridge.offer(TASK, 0, offered)
    assert desk.offers.pop("a").results == 2
    assert not bridge.offer(TASK, 0, offered)  # made once more, and nothing to hurry for
    assert desk.offers["a"].results == 2
    assert not bridge.offer(TASK, 2, offered)
    assert not end(desk, "a").offer(TASK, 0, offered)
