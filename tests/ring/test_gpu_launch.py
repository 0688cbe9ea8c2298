"""The GPU path against the host's, bit for bit, and against a slow twin of the encoding."""

from __future__ import annotations

import math
import os
import random
from collections.abc import Sequence
from fractions import Fraction
from typing import get_args

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from Crypto.Cipher import ChaCha20  # noqa: E402

from secagg.config import Clip, MaskPrg, RingBits, TaskConfig, Weighting  # noqa: E402
from secagg.crypto.secret import Secret  # noqa: E402
from secagg.encoding.codec import Codec  # noqa: E402
from secagg.encoding.schema import Schema  # noqa: E402
from secagg.ring.expand import Mask, apply_masks  # noqa: E402
from secagg.ring.gpu import launch  # noqa: E402
from secagg.ring.gpu.launch import (  # noqa: E402
    DeviceFailed,
    apply_masks_on_device,
    encode_and_mask,
    obstacle,
)
from secagg.ring.vectors import PowerRing, PrimeRing, Vector  # noqa: E402
from secagg.suite import Suite  # noqa: E402

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if not (INTERPRETED or torch.cuda.is_available()):
    pytest.skip("needs a GPU, or Triton's interpreter: make test-gpu", allow_module_level=True)

DEVICE = "cpu" if INTERPRETED else "cuda"
BITS = get_args(RingBits)
CHACHA = MaskPrg.CHACHA20
ROUNDING = Secret(bytes(range(32)))
BLOCKS = 16
"""Blocks to a tile, so that a few words have several tiles: the interpreter is slow."""


@pytest.fixture
def _small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "_BLOCKS", BLOCKS)


def masks_of(k: int) -> list[Mask]:
    return [Mask(Secret(random.Random(i).randbytes(32)), add=i % 3 != 1) for i in range(k)]


def random_words(ring: PowerRing, length: int) -> Vector:
    return np.frombuffer(np.random.default_rng(length).bytes(length * ring.word_bytes), ring.dtype)


def on_device(vector: Vector) -> torch.Tensor:
    return torch.from_numpy(vector.view(f"<i{vector.itemsize}").copy()).to(DEVICE)


def masked_on_device(
    ring: PowerRing, vector: Vector, masks: Sequence[Mask], start: int = 0
) -> Vector:
    words = on_device(vector)
    apply_masks_on_device(words, masks, start=start)
    return words.cpu().numpy().view(ring.dtype)


def masked_on_host(
    ring: PowerRing, vector: Vector, masks: Sequence[Mask], start: int = 0
) -> Vector:
    out = vector.copy()
    apply_masks(ring, out, masks, CHACHA, start=start)
    return out


@pytest.mark.usefixtures("_small_tiles")
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("k", [0, 1, 4, 16])
def test_masks_equal_the_host_s(bits: RingBits, k: int) -> None:
    """An odd start before a tile's border; with fewer keys a tile in the midst."""
    ring, masks = PowerRing(bits), masks_of(k)
    tile = BLOCKS * 64 // ring.word_bytes
    vector = random_words(ring, 10 if k == 16 else tile + 10)
    start = tile - 3
    expected = masked_on_host(ring, vector, masks, start)
    np.testing.assert_array_equal(masked_on_device(ring, vector, masks, start), expected)


@pytest.mark.usefixtures("_small_tiles")
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(
    ("start", "length"), [(0, 0), (0, 1), (1, 1), (5, 2), (15, 18), (31, 33), (512, 64), (7, 700)]
)
def test_borders(bits: RingBits, start: int, length: int) -> None:
    ring, masks = PowerRing(bits), masks_of(1)
    vector = random_words(ring, length)
    expected = masked_on_host(ring, vector, masks, start)
    np.testing.assert_array_equal(masked_on_device(ring, vector, masks, start), expected)


@pytest.mark.parametrize("bits", BITS)
def test_tiles_as_they_ship(bits: RingBits) -> None:
    ring, masks = PowerRing(bits), masks_of(2)
    tile = launch._BLOCKS * 64 // ring.word_bytes
    vector = random_words(ring, tile + 1)
    expected = masked_on_host(ring, vector, masks)
    np.testing.assert_array_equal(masked_on_device(ring, vector, masks), expected)


@pytest.mark.usefixtures("_small_tiles")
@pytest.mark.parametrize("bits", BITS)
def test_every_word_s_extremes_wrap(bits: RingBits) -> None:
    ring, masks = PowerRing(bits), masks_of(2)
    top = 2 ** (bits - 1)
    vector = np.array([0, 1, top - 1, top, top + 1, 2 * top - 1] * 6, ring.dtype)
    expected = masked_on_host(ring, vector, masks)
    np.testing.assert_array_equal(masked_on_device(ring, vector, masks), expected)


@pytest.mark.usefixtures("_small_tiles")
def test_sums_of_half_words_do_not_carry() -> None:
    """Masks of one sign, so that lower halves sum beyond 16 bits, both ways."""
    ring, vector = PowerRing(16), random_words(PowerRing(16), 100)
    for add in (True, False):
        masks = [Mask(mask.key, add) for mask in masks_of(5)]
        expected = masked_on_host(ring, vector, masks)
        np.testing.assert_array_equal(masked_on_device(ring, vector, masks), expected)


@pytest.mark.usefixtures("_small_tiles")
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("block", [2**27 - 1, 2**31 - 1, 2**32 - 3])
def test_far_ranges(bits: RingBits, block: int) -> None:
    """Coordinates and counters beyond 32 signed bits, up to the stream's end."""
    ring, masks = PowerRing(bits), masks_of(1)
    start = block * 64 // ring.word_bytes + 3
    vector = random_words(ring, 64 * 2 // ring.word_bytes)
    expected = masked_on_host(ring, vector, masks, start)
    np.testing.assert_array_equal(masked_on_device(ring, vector, masks, start), expected)


@pytest.mark.parametrize("bits", BITS)
def test_the_end_of_the_stream(bits: RingBits) -> None:
    vector = PowerRing(bits).zeros(2)
    with pytest.raises(OverflowError):
        masked_on_device(PowerRing(bits), vector, masks_of(1), 2**38 // vector.itemsize - 1)


@pytest.mark.parametrize(
    "words",
    [
        torch.zeros(8, dtype=torch.int32)[::2],
        torch.zeros(2, 2, dtype=torch.int32),
        torch.zeros(4, dtype=torch.float32),
        torch.zeros(4, dtype=torch.uint8),
    ],
    ids=["strided", "matrix", "float", "bytes"],
)
def test_refuses_what_is_no_vector(words: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="contiguous vector of signed words"):
        apply_masks_on_device(words.to(DEVICE), masks_of(1))


def test_refuses_keys_of_another_generator() -> None:
    with pytest.raises(ValueError, match="32 bytes"):
        apply_masks_on_device(on_device(PowerRing(32).zeros(4)), [Mask(Secret(bytes(16)), True)])


def twin(
    values: Sequence[float], factor: float, limit: int, clip: float, bits: int
) -> tuple[list[int], int]:
    """The encoding with Python's integers for the rounding."""
    stream = ChaCha20.new(key=ROUNDING.reveal(), nonce=bytes(12)).encrypt(bytes(4 * len(values)))
    words, clipped = [], 0
    for i, x in enumerate(values):
        if abs(x) > clip:
            clipped += 1
            x = math.copysign(clip, x)
        fine = math.floor(Fraction(x * (factor * 2**32)))
        uniform = int.from_bytes(stream[4 * i : 4 * i + 4], "little")
        rounded = (fine + uniform) // 2**32
        words.append(max(-limit, min(limit, rounded)) % 2**bits)
    return words, clipped


def reals(values: Sequence[float], dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype, device=DEVICE)


def encoded(
    pieces: Sequence[torch.Tensor],
    bits: RingBits,
    *,
    factor: float,
    limit: int,
    clip: float = math.inf,
    masks: Sequence[Mask] = (),
    tail: int = 0,
) -> tuple[Vector, int]:
    length = sum(piece.numel() for piece in pieces) + tail
    return encode_and_mask(
        pieces,
        ring=PowerRing(bits),
        factor=factor,
        limit=limit,
        clip=clip,
        rounding_key=ROUNDING,
        masks=masks,
        length=length,
    )


@pytest.mark.usefixtures("_small_tiles")
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("clip", [math.inf, 0.75])
def test_encodes_as_the_twin_and_masks_as_the_host(bits: RingBits, clip: float) -> None:
    """Tensors of every dtype and shape that begin in the midst of blocks and tiles; a tail."""
    ring, masks, limit = PowerRing(bits), masks_of(3), 2 ** (bits - 4)
    source = torch.Generator().manual_seed(bits)
    pieces = [
        torch.rand(7, generator=source, dtype=torch.float64) * 2 - 1,
        (torch.rand(30, 3, generator=source) * 2 - 1).requires_grad_(),
        torch.zeros(0),
        (torch.rand(5, 8, generator=source) * 2 - 1).to(torch.float16).T,
        torch.tensor(-0.5),
        (torch.rand(BLOCKS * 512 // bits + 1, generator=source) * 2 - 1).to(torch.bfloat16),
    ]
    numbers = [x for piece in pieces for x in piece.detach().double().reshape(-1).tolist()]
    words, clipped = twin(numbers, 0.9 * limit, limit, clip, bits)
    expected = np.array([*words, 0, 0, 0], ring.dtype)
    apply_masks(ring, expected[:-3], masks, CHACHA)
    vector, count = encoded(
        [piece.to(DEVICE) for piece in pieces],
        bits,
        factor=0.9 * limit,
        limit=limit,
        clip=clip,
        masks=masks,
        tail=3,
    )
    assert vector.dtype == ring.dtype
    assert vector.flags.writeable
    np.testing.assert_array_equal(vector, expected)
    assert count == clipped
    assert math.isinf(clip) == (clipped == 0)


@pytest.mark.usefixtures("_small_tiles")
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("clip", Clip)
def test_equals_the_host_s_encoder(bits: RingBits, clip: Clip) -> None:
    """What is not the scalars, of the update that a silo without a GPU would send."""
    task = TaskConfig("task", Weighting.MEAN, 1, 1.5, clip, 10.0, bits)
    numbers = np.random.default_rng(bits)
    tensors = {
        name: numbers.uniform(-1.5, 1.5, size).astype(dtype)
        for name, size, dtype in (("a", 21, "f4"), ("b", 50, "f8"), ("c", 9, "f2"))
    }
    if clip is not Clip.NONE:
        tensors["b"] *= 3
    codec, masks = Codec(task, Schema.of(tensors), silos=5), masks_of(2)
    expected = codec.encode(
        tensors,
        weight=7.0,
        metrics={},
        entropy=lambda size: ROUNDING.reveal()[:size],
        masks=masks,
        prg=CHACHA,
    )
    scaling = codec.scaling(tensors, weight=7.0, metrics={})
    limit = 2**codec.bits
    vector, _ = encoded(
        [torch.from_numpy(tensors[name]).to(DEVICE) for name in sorted(tensors)],
        bits,
        factor=scaling.factor * limit,
        limit=limit,
        clip=scaling.clip,
        masks=masks,
    )
    np.testing.assert_array_equal(vector, expected[: codec.schema.size])


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("clip", [math.inf, 1.0])
def test_values_at_the_edges(bits: RingBits, clip: float) -> None:
    """Bounds, zeros, subnormals, exact integers and halves, a last place beyond the limit."""
    limit = 2 ** (bits - 3)
    beyond = math.nextafter(1.0, 2.0)
    edges = [1.0, -1.0, 0.0, -0.0, 5e-324, -5e-324, 2.0**-1030, beyond, -beyond, 1 - 2**-53]
    edges += [3 / limit, -3 / limit, 0.5 / limit, -0.5 / limit, 2.5 / limit, -2.5 / limit]
    edges += [1 / limit - 2**-80, -(2**-60) / limit, 1.0 - 0.5 / limit, 0.1, -1 / 3]
    if clip == 1.0:
        edges += [1e300, -1e300]
    words, clipped = twin(edges, limit, limit, clip, bits)
    vector, count = encoded([reals(edges)], bits, factor=limit, limit=limit, clip=clip)
    assert vector.tolist() == words
    assert count == clipped == (4 if clip == 1.0 else 0)
    assert words[0] == limit
    assert words[1] == 2**bits - limit


@pytest.mark.parametrize("dtype", launch.FLOATS, ids=str)
def test_subnormals_and_extremes_of_a_dtype(dtype: torch.dtype) -> None:
    info = torch.finfo(dtype)
    each = reals([info.max, info.min, info.tiny, -info.tiny, info.smallest_normal / 4, 1.0], dtype)
    expected, clipped = twin(each.double().tolist(), 2.0**40, 2**40, 1.0, 64)
    vector, count = encoded([each], 64, factor=2.0**40, limit=2**40, clip=1.0)
    assert vector.tolist() == expected
    assert count == clipped == 2


def test_an_update_of_nothing() -> None:
    vector, count = encoded([reals([])], 32, factor=1.0, limit=1, tail=4, masks=masks_of(1))
    assert vector.tolist() == [0, 0, 0, 0]
    assert count == 0


def test_refuses_more_than_the_vector_or_integers() -> None:
    with pytest.raises(ValueError, match="an update is floats"):
        encoded([reals([1.0, 2.0])], 32, factor=1.0, limit=1, tail=-1)
    with pytest.raises(ValueError, match="an update is floats"):
        encoded([torch.zeros(3, dtype=torch.int32)], 32, factor=1.0, limit=1)


@pytest.mark.parametrize(
    ("kind", "code"), [(torch.cuda.OutOfMemoryError, "gpu-memory"), (RuntimeError, "gpu-failed")]
)
def test_a_device_that_fails_leaves_the_host_path(
    kind: type[Exception], code: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise kind("of the device")

    monkeypatch.setattr(launch, "_launch", fail)
    with pytest.raises(DeviceFailed) as failed:
        encoded([reals([0.5])], 32, factor=4.0, limit=4, masks=masks_of(1))
    assert failed.value.code == code
    assert "of the device" not in str(failed.value)


@pytest.mark.parametrize("fails", [False, True])
def test_keys_are_zeroed(fails: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.Tensor] = []

    def take(words: object, first: int, keys: torch.Tensor, *_: object) -> None:
        assert keys.any(dim=1).all()
        seen.append(keys)
        if fails:
            raise RuntimeError

    monkeypatch.setattr(launch, "_launch", take)
    words = on_device(PowerRing(32).zeros(4))
    if fails:
        with pytest.raises(DeviceFailed):
            apply_masks_on_device(words, masks_of(2))
    else:
        apply_masks_on_device(words, masks_of(2))
    assert [keys.any().item() for keys in seen] == [False]


def test_what_stands_against_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    class OnGpu:
        device = torch.device("cuda", 0)
        dtype = torch.float32
        layout = torch.strided

    pieces, ring = [OnGpu()], PowerRing(32)
    capability = (9, 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    assert obstacle(pieces, ring, CHACHA) is None
    assert obstacle(pieces, ring, MaskPrg.AES_128_CTR) == "masks are aes-128-ctr, not chacha20"
    prime = PrimeRing(Suite.CKKS_54.parameters.modulus)
    assert obstacle(pieces, prime, CHACHA) == "the ring is no power of two"
    nowhere = "the tensors do not all lie on one GPU"
    assert obstacle([], ring, CHACHA) == nowhere
    assert obstacle([torch.zeros(1)], ring, CHACHA) == nowhere
    assert obstacle([*pieces, torch.zeros(1)], ring, CHACHA) == nowhere
    capability = (7, 5)
    assert obstacle(pieces, ring, CHACHA) == "the GPU is older than Triton supports"
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    assert obstacle(pieces, ring, CHACHA) == "Triton is not installed"
    monkeypatch.setattr(OnGpu, "dtype", torch.int32)
    assert obstacle(pieces, ring, CHACHA) == "a tensor is no dense array of floats"


@pytest.mark.cuda
@pytest.mark.skipif(INTERPRETED, reason="needs a GPU")
@pytest.mark.parametrize("bits", BITS)
def test_a_large_vector_on_a_gpu(bits: RingBits) -> None:
    ring, masks = PowerRing(bits), masks_of(8)
    vector = random_words(ring, 2**24 + 5)
    expected = masked_on_host(ring, vector, masks, 3)
    np.testing.assert_array_equal(masked_on_device(ring, vector, masks, 3), expected)


@pytest.mark.cuda
@pytest.mark.skipif(INTERPRETED, reason="needs a GPU")
@pytest.mark.parametrize("bits", BITS)
def test_a_large_update_on_a_gpu(bits: RingBits) -> None:
    ring, masks, limit = PowerRing(bits), masks_of(4), 2 ** (bits - 6)
    pieces = [torch.randn(2**20 + i, device="cuda") for i in range(3)]
    numbers = torch.cat(pieces).double().tolist()
    words, clipped = twin(numbers, limit / 2.5, limit, 2.5, bits)
    expected = masked_on_host(ring, np.array(words, ring.dtype), masks)
    vector, count = encoded(pieces, bits, factor=limit / 2.5, limit=limit, clip=2.5, masks=masks)
    np.testing.assert_array_equal(vector, expected)
    assert count == clipped
