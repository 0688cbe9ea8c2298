"""Beside Flower's SecAgg+ and FedML's LightSecAgg, in one run, on one core, results checked.

Which of their functions are called is said in ``benchmarks.peers.flower`` and ``…lightsecagg``; no
network on any side, and nothing of theirs is copied. Read the ratios, not the times. Two of 16
parties drop out after they shared their keys (six of 64), at the same threshold where the graph is
the same; updates are float32 in [−1, 1]. Each peer is run as often as it pays, and its best time
counts.

``make bench-peers`` installs the peers beside us and runs this; a peer that is missing is skipped.
"""

from __future__ import annotations

from functools import lru_cache
from importlib.metadata import version
from typing import Any

import numpy as np
import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.peers import check_mean, group, report, show, timed, updates
from benchmarks.peers.ours import Client, Recording, Wire
from secagg.simulation import Federation

TEN_MILLION = 10**7
DROPPED = {16: {3, 11}, 64: {3, 13, 24, 35, 46, 57}}
THRESHOLD = {16: 11, 64: 43}
pytestmark = pytest.mark.full


@pytest.fixture
def flower() -> Any:
    pytest.importorskip("flwr", reason="flwr is not installed: make bench-peers")
    from benchmarks.peers import flower

    return flower


def flower_name() -> str:
    return f"flwr {version('flwr')} SecAgg+"


@lru_cache(maxsize=1)
def flower_round(n: int, size: int, k: int, serialised: bool) -> tuple[Any, Any]:
    """A checked round of Flower's; kept for the next comparison of its size."""
    from benchmarks.peers import flower

    vectors = dict(enumerate(updates(names_of(n), size).values()))
    threshold = THRESHOLD[n] if k == n - 1 else (k + 1) * 2 // 3 + 1
    setting = flower.Setting(vectors, DROPPED[n], k + 1, threshold, serialised)
    played = flower.play(setting)
    check_mean(played.mean, [vectors[i] for i in vectors if i not in DROPPED[n]], 1e-6)
    return setting, played


def names_of(n: int) -> list[str]:
    return [f"silo-{i:02}" for i in range(n)]


def dropped_of(n: int) -> set[str]:
    return {f"silo-{i:02}" for i in DROPPED[n]}


# ---- Flower


@group(group="peers-client")
def test_client_beside_flower(benchmark: BenchmarkFixture, flower: Any) -> None:
    """Agree on 15 masks' keys, quantise 10^7 float32, put 16 masks on. Digests are beside it."""
    client, update = Client(16, TEN_MILLION), updates(["one"], TEN_MILLION)["one"]
    vector = benchmark.pedantic(client.send, (update,), rounds=5, warmup_rounds=1)
    digest = client.digest_seconds(vector)
    client.check(vector, update)
    _, theirs = flower_round(16, TEN_MILLION, 15, False)
    report(
        benchmark,
        flower_name(),
        min(theirs.client_seconds),
        TEN_MILLION,
        25,
        digest_seconds=round(digest, 4),
    )


@group(group="peers-round")
def test_round_beside_flower(benchmark: BenchmarkFixture, flower: Any) -> None:
    """All roles, to the decoded mean; nothing serialised on either side."""
    theirs = flower_round(16, TEN_MILLION, 15, False)[1].seconds
    whole_round(benchmark, theirs, 12)


class Served:
    """Our server's part, again and again, and what of it is told apart."""

    def __init__(self, recording: Recording) -> None:
        self._recording = recording
        self.seconds: list[float] = []
        self.digests: list[float] = []
        self.signatures: list[float] = []

    def __call__(self) -> np.ndarray:
        seconds, total = timed(self._recording.replay)
        self.digests.append(self._recording.digest_seconds)
        self.signatures.append(self._recording.signature_seconds)
        self.seconds.append(seconds - self.digests[-1] - self.signatures[-1])
        return total


@group(group="peers-server")
@pytest.mark.parametrize(
    ("n", "size", "k", "target"),
    [
        pytest.param(16, TEN_MILLION, 15, 25, id="n=16-d=1e7"),
        pytest.param(16, 10**6, 15, 50, id="n=16-d=1e6"),
        pytest.param(64, TEN_MILLION, 20, 15, id="n=64-d=1e7-k=20"),
    ],
)
def test_server_beside_flower(
    benchmark: BenchmarkFixture, flower: Any, n: int, size: int, k: int, target: float
) -> None:
    """Fold, Shamir, unmasking and all checks of shares, up to the sum. Digests and signatures,
    which Flower's functions have none of, are beside it; so is Flower's dequantising. Our graph is
    complete; with n = 64 Flower's has k = 20 neighbours, as SecAgg+ is meant to be used."""
    setting, played = flower_round(n, size, k, False)
    again = [flower.replay(setting, played) for _ in range(2)]
    assert all(np.array_equal(one.mean, played.mean) for one in again)
    their = min([played, *again], key=lambda one: one.server_seconds)
    del setting, played, again
    if n > 16:
        flower_round.cache_clear()  # gigabytes

    vectors = updates(names_of(n), size)
    recording = Recording(vectors, dropped_of(n))
    left = [vectors[name] for name in vectors if name not in dropped_of(n)]
    check_mean(recording.result.mean["w"], left, 1e-6)
    served = Served(recording)
    total = benchmark.pedantic(served, rounds=3, warmup_rounds=1)
    assert np.array_equal(total, recording.result.total)
    report(
        benchmark,
        flower_name(),
        their.server_seconds,
        size,
        target,
        seconds=min(served.seconds),
        signature_seconds=round(min(served.signatures), 4),
        digest_seconds=round(min(served.digests) + recording.arrival_seconds(), 4),
        peer_shamir_seconds=round(their.shamir_seconds, 4),
    )


@group(group="peers-round")
def test_serialised_round_beside_flower(benchmark: BenchmarkFixture, flower: Any) -> None:
    """The same, every message serialised and parsed: ours protobuf in chunks, theirs RecordDict."""
    theirs = flower_round(16, TEN_MILLION, 15, True)[1].seconds
    flower_round.cache_clear()
    whole_round(benchmark, theirs, 20, serialised=True)


def whole_round(
    benchmark: BenchmarkFixture, peer_seconds: float, target: float, *, serialised: bool = False
) -> None:
    vectors, dropped = updates(names_of(16), TEN_MILLION), dropped_of(16)
    federation = Federation(names_of(16))
    drops = dict.fromkeys(dropped, "masked_input")
    script = Wire(federation).script(names_of(16), drops) if serialised else None
    tensors = {name: {"w": vector} for name, vector in vectors.items()}
    result = benchmark.pedantic(
        federation.run_round, (tensors,), {"drops": drops, "script": script}, rounds=3
    )
    assert set(result.dropouts) == dropped
    assert len(federation.silo("silo-00").refusals) == 0
    left = [vectors[name] for name in result.survivors]
    check_mean(result.mean["w"], left, 1e-6)
    report(benchmark, flower_name(), peer_seconds, TEN_MILLION, target)


# ---- FedML's LightSecAgg


@lru_cache(maxsize=1)
def lightsecagg_round(size: int) -> tuple[str, Any]:
    """A checked round of FedML's; skipped where it is not installed."""
    from benchmarks.peers import lightsecagg

    vectors = list(updates(names_of(16), size).values())
    played = lightsecagg.Round(vectors, DROPPED[16]).play()
    left = [vector for i, vector in enumerate(vectors) if i not in DROPPED[16]]
    check_mean(played.mean, left, 2.0**-lightsecagg.POINT)
    return lightsecagg.name(), played


@pytest.fixture
def lightsecagg() -> tuple[str, Any]:
    pytest.importorskip("torch", reason="torch is not installed")
    try:
        return lightsecagg_round(TEN_MILLION)
    except ModuleNotFoundError:
        pytest.skip("fedml is not installed: make bench-peers")


@group(group="peers-client")
def test_client_beside_lightsecagg(
    benchmark: BenchmarkFixture, lightsecagg: tuple[str, Any]
) -> None:
    """As beside Flower; theirs encodes its mask for 15 others, which it may do while it trains."""
    name, theirs = lightsecagg
    client, update = Client(16, TEN_MILLION), updates(["one"], TEN_MILLION)["one"]
    vector = benchmark.pedantic(client.send, (update,), rounds=5, warmup_rounds=1)
    client.check(vector, update)
    report(
        benchmark,
        name,
        theirs.client_seconds,
        TEN_MILLION,
        10,
        peer_encoding_seconds=round(theirs.encoding_seconds, 4),
    )


@group(group="peers-server")
def test_server_beside_lightsecagg(
    benchmark: BenchmarkFixture, lightsecagg: tuple[str, Any]
) -> None:
    """As beside Flower; theirs to the mean, as its last function gives it."""
    name, theirs = lightsecagg
    recording = Recording(updates(names_of(16), TEN_MILLION), dropped_of(16))
    served = Served(recording)
    total = benchmark.pedantic(served, rounds=5, warmup_rounds=1)
    assert np.array_equal(total, recording.result.total)
    report(
        benchmark,
        name,
        theirs.server_seconds,
        TEN_MILLION,
        10,
        seconds=min(served.seconds),
        signature_seconds=round(min(served.signatures), 4),
        peer_from_arrays_seconds=round(theirs.from_arrays_seconds, 4),
    )


# ---- bytes up per parameter


@group(group="peers-bytes")
@pytest.mark.parametrize(("ring_bits", "most"), [(32, 4.01), (16, 2.01)], ids=["w=32", "w=16"])
def test_bytes_up(benchmark: BenchmarkFixture, ring_bits: Any, most: float) -> None:
    """Every serialised message of one silo of 16, its vector's chunks included."""
    federation = Federation(names_of(16), ring_bits=ring_bits)
    vectors = {name: {"w": v} for name, v in updates(names_of(16), 10**6).items()}
    wire = Wire(federation)
    script = wire.script(names_of(16), dict.fromkeys(dropped_of(16), "masked_input"))
    result = benchmark.pedantic(federation.run_round, (vectors,), {"script": script}, rounds=1)
    error = 1e-6 if ring_bits == 32 else 2e-3
    check_mean(result.mean["w"], [vectors[name]["w"] for name in result.survivors], error)
    benchmark.extra_info["bytes_per_parameter"] = round(max(wire.sent.values()) / 10**6, 3)
    show(benchmark)
    assert round(max(wire.sent.values()) / 10**6, 2) <= most


@group(group="peers-bytes")
def test_bytes_up_of_flower(benchmark: BenchmarkFixture, flower: Any) -> None:
    """One client's serialised messages."""
    _, played = benchmark.pedantic(flower_round, (16, 10**6, 15, True), rounds=1)
    benchmark.extra_info |= {
        "peer": flower_name(),
        "bytes_per_parameter": round(played.bytes_up / 10**6, 3),
    }
    show(benchmark)


@group(group="peers-bytes")
def test_bytes_up_of_lightsecagg(benchmark: BenchmarkFixture, lightsecagg: tuple[str, Any]) -> None:
    """The masked vector, the encoded masks for 15 others and the sum of masks, pickled."""
    name, played = lightsecagg
    benchmark.pedantic(lambda: None, rounds=1)
    benchmark.extra_info |= {
        "peer": name,
        "bytes_per_parameter": round(played.bytes_up / TEN_MILLION, 3),
    }
    show(benchmark)
