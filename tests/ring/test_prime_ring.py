"""The ring Z_q against Python's integers: lazy words, one reduction, exactly uniform masks.

The oracle for masks is PyCryptodome's keystreams, cut into words and rejected by hand; a modulus
that is far below 2^54 makes the rejection, a chance of 2^-37 in the ring that ships, an everyday
event.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import pytest
from Crypto.Cipher import AES, ChaCha20
from hypothesis import given, settings
from hypothesis import strategies as st

from secagg.config import (
    Clip,
    MaskPrg,
    Protection,
    SessionConfig,
    SiloId,
    TaskConfig,
    ThresholdRule,
    Weighting,
)
from secagg.crypto.prg import key_bytes
from secagg.crypto.secret import Secret
from secagg.errors import ConfigError
from secagg.ring import expand, native, vectors
from secagg.ring.expand import Mask, apply_masks
from secagg.ring.native import Path
from secagg.ring.vectors import PowerRing, PrimeRing, Ring, RunningSum, Vector, ring_of
from secagg.suite import Suite

AES_CTR, CHACHA = MaskPrg.AES_128_CTR, MaskPrg.CHACHA20
Q = Suite.CKKS_54.parameters.modulus
LEAST = 2**54 - 2**20 + 1
MODULI = (Q, LEAST, 2**54 - 1)
TOP = 2**64 - 1
SMALL_TILE = 64
PATHS = native.available()
paths = pytest.mark.parametrize("path", PATHS)


class SmallRing(PrimeRing):
    """Z_m for any m ≤ 2^54, reduced by division: the kernel's own code around another modulus."""

    __slots__ = ()

    def __post_init__(self) -> None:
        """Anything goes."""

    def reduce(self, vector: Vector) -> None:
        """By division."""
        np.remainder(vector, np.uint64(self.modulus), out=vector)


@contextmanager
def tiles_of(size: int) -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(expand, "TILE_BYTES", size)
        patch.setattr(expand, "_ZEROS", bytes(size))
        yield patch


# The modulus and the words.


@pytest.mark.parametrize("modulus", [0, -1, 2**53, 2**54 - 2**20, 2**54, 2**54 + 1, 2**55 - 1, TOP])
def test_a_modulus_is_just_below_2_54(modulus: int) -> None:
    with pytest.raises(ConfigError) as caught:
        PrimeRing(modulus)
    assert caught.value.code == "ring"
    assert str(modulus) in caught.value.observed


@pytest.mark.parametrize("modulus", MODULI)
def test_words_and_terms(modulus: int) -> None:
    ring = PrimeRing(modulus)
    assert (ring.word_bytes, ring.terms, ring.dtype.str) == (8, 1024, "<u8")
    assert ring.terms * (modulus - 1) <= TOP
    assert ring.terms * modulus <= TOP, "a subtrahend may count as q"
    assert ring.zeros(3).tolist() == [0, 0, 0]
    assert ring.unpack(bytes(ring.pack(np.array([1, modulus - 1], "<u8"))), 2).tolist() == [
        1,
        modulus - 1,
    ]


def test_the_other_rings_words_never_fill_up() -> None:
    for bits in (16, 32, 64):
        ring = PowerRing(bits)  # type: ignore[arg-type]
        words = np.arange(4, dtype=ring.dtype) - ring.dtype.type(2)
        kept = words.copy()
        assert ring.terms > 2**60
        assert ring.holds(words)
        assert ring.uniform(words) is None
        ring.reduce(words)
        np.testing.assert_array_equal(words, kept)


def edges(modulus: int) -> list[int]:
    """Words at which a reduction could go wrong by one."""
    multiples = {k * modulus for k in (0, 1, 2, 511, 1022, 1023, 1024)}
    powers = {k * 2**54 for k in (1, 2, 511, 1023)}
    near = {word + d for word in multiples | powers | {2**53, 2**63} for d in (-2, -1, 0, 1, 2)}
    return sorted(word for word in near | {TOP, TOP - 1} if 0 <= word <= TOP)


@pytest.mark.parametrize("modulus", MODULI)
def test_reduction_is_exact_at_every_edge(modulus: int) -> None:
    words = edges(modulus)
    vector = np.array(words, "<u8")
    PrimeRing(modulus).reduce(vector)
    assert vector.tolist() == [word % modulus for word in words]


@settings(deadline=None)
@given(
    modulus=st.sampled_from(MODULI) | st.integers(LEAST, 2**54 - 1),
    words=st.lists(st.integers(0, TOP), max_size=50),
)
def test_reduction_is_exact_for_every_word(modulus: int, words: list[int]) -> None:
    vector = np.array(words, "<u8")
    PrimeRing(modulus).reduce(vector)
    assert vector.tolist() == [word % modulus for word in words]
    assert PrimeRing(modulus).holds(vector)


@pytest.mark.parametrize("length", [0, 1, 7, 8, 9, 16, 31])
def test_reduction_goes_through_all_pieces(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vectors, "_PIECE", 8)
    words = [TOP - 3 * i for i in range(length)]
    vector = np.array(words, "<u8")
    PrimeRing(Q).reduce(vector)
    assert vector.tolist() == [word % Q for word in words]


def test_reduction_of_real_pieces_and_of_a_strided_view() -> None:
    rng = np.random.default_rng(1)
    words = rng.integers(0, TOP, 2 * vectors._PIECE + 5, np.uint64, endpoint=True)
    expected = words % np.uint64(Q)
    whole, view = words.copy(), np.repeat(words, 2)[::2]
    PrimeRing(Q).reduce(whole)
    PrimeRing(Q).reduce(view)
    np.testing.assert_array_equal(whole, expected)
    np.testing.assert_array_equal(view, expected)


@pytest.mark.parametrize("modulus", MODULI)
@pytest.mark.parametrize("at", [0, 1, 4])
def test_holds_says_whether_every_word_is_below_q(modulus: int, at: int) -> None:
    ring, vector = PrimeRing(modulus), np.zeros(5, "<u8")
    assert ring.holds(vector)
    for word, residue in (
        *((modulus - 1, True), (modulus, False), (modulus + 1, False)),
        *((2**54, False), (2**63, False), (TOP, False)),
    ):
        vector[at] = word
        assert ring.holds(vector) is residue
    assert ring.holds(vector[:0])


@settings(deadline=None)
@given(
    modulus=st.sampled_from(MODULI),
    start=st.integers(0, 2**60),
    signs=st.lists(st.booleans(), max_size=40),
    data=st.data(),
)
def test_residues_pile_up_lazily(
    modulus: int, start: int, signs: list[bool], data: st.DataObject
) -> None:
    residues = st.integers(0, modulus - 1) | st.sampled_from((0, 1, modulus - 1))
    ring, total = PrimeRing(modulus), start % modulus
    vector = np.array([total], "<u8")
    for add in signs:
        residue = data.draw(residues)
        (ring.add if add else ring.subtract)(vector, np.array([residue], "<u8"))
        total += residue if add else -residue
    ring.reduce(vector)
    assert vector.tolist() == [total % modulus]


@pytest.mark.parametrize("modulus", MODULI)
@pytest.mark.parametrize(("add", "residue"), [(True, -1), (False, 0), (False, -1), (True, 0)])
def test_as_many_terms_as_a_word_holds(modulus: int, add: bool, residue: int) -> None:
    """1,024 of the greatest: no word wraps, and Python agrees."""
    ring, residue = PrimeRing(modulus), residue % modulus
    vector, other = np.array([modulus - 1], "<u8"), np.array([residue], "<u8")
    exact = modulus - 1
    for _ in range(ring.terms - 1):
        (ring.add if add else ring.subtract)(vector, other)
        exact += residue if add else modulus - residue
        assert vector.tolist() == [exact]
    assert exact <= TOP
    ring.reduce(vector)
    assert vector.tolist() == [exact % modulus]


# The running sum.


@pytest.mark.parametrize("count", [0, 1, 1022, 1023, 1024, 1025, 2049])
@pytest.mark.parametrize("modulus", MODULI)
def test_a_running_sum_goes_past_what_a_word_holds(count: int, modulus: int) -> None:
    ring = PrimeRing(modulus)
    running, vector = RunningSum(ring, 2), np.array([modulus - 1, 12345], "<u8")
    for _ in range(count):
        running.add(vector)
    assert running.total.tolist() == [count * (modulus - 1) % modulus, count * 12345 % modulus]
    assert vector.tolist() == [modulus - 1, 12345]


def test_a_total_in_between_changes_nothing() -> None:
    ring = PrimeRing(Q)
    running, exact = RunningSum(ring, 1), 0
    for i in range(3000):
        running.add(np.array([Q - 1 - i], "<u8"))
        exact += Q - 1 - i
        if i % 700 == 3:
            assert running.total.tolist() == running.total.tolist() == [exact % Q]
    assert running.total.tolist() == [exact % Q]
    running.total[0] = 5
    running.add(np.array([Q - 1], "<u8"))
    assert running.total.tolist() == [4], "the very array that later vectors are added to"


# The ring of a session.


def session(protection: Protection, suite: Suite | None, bits: int | None) -> SessionConfig:
    task = TaskConfig(
        name="training",
        weighting=Weighting.MEAN,
        rounds=1,
        bound=1.0,
        clip=Clip.NONE,
        weight_cap=1.0,
        ring_bits=bits,  # type: ignore[arg-type]
    )
    return SessionConfig(
        name="study",
        consortium="hospitals",
        silos=tuple(SiloId(name) for name in "abc"),
        protection=protection,
        colluders=1,
        threshold=ThresholdRule(2, 3),
        min_cohort=3,
        mask_prg=AES_CTR,
        tasks=(task,),
        suite=suite,
    )


def test_the_ring_of_a_task() -> None:
    for bits in (16, 32, 64):
        assert ring_of(session(Protection.MASKED, None, bits), "training") == PowerRing(
            bits  # type: ignore[arg-type]
        )
    for protection in (Protection.CKKS, Protection.CKKS_MASKED):
        assert ring_of(session(protection, Suite.CKKS_54, None), "training") == PrimeRing(Q)
    with pytest.raises(ConfigError):
        ring_of(session(Protection.MASKED, None, 32), "statistics")


# Uniform residues.


def stream(prg: MaskPrg, key: bytes, number: int, size: int) -> bytes:
    """The first bytes of one of a key's streams, from PyCryptodome, which never seeks here."""
    if prg is AES_CTR:
        first = number.to_bytes(8, "big") + bytes(8)
        cipher = AES.new(key, AES.MODE_CTR, nonce=b"", initial_value=first)
        return cipher.encrypt(bytes(size))
    return ChaCha20.new(key=key, nonce=number.to_bytes(12, "little")).encrypt(bytes(size))


def residues(modulus: int, prg: MaskPrg, key: bytes, length: int) -> tuple[list[int], Counter[int]]:
    """Uniform residues by hand, and how often which stream was used."""
    used: Counter[int] = Counter()
    streams: list[bytes] = []
    out = []
    for at in range(length):
        number = 0
        while True:
            if number == len(streams):
                streams.append(stream(prg, key, number, 8 * length))
            word = int.from_bytes(streams[number][8 * at : 8 * at + 8], "little") >> 10
            if word < modulus:
                break
            number += 1
        used[number] += 1
        out.append(word)
    return out, used


def test_uniform_takes_the_upper_54_bits_and_names_what_is_none() -> None:
    ring = PrimeRing(Q)
    words = np.array([0, 1023, 1024, (Q - 1) << 10, ((Q - 1) << 10) + 1023], "<u8")
    assert ring.uniform(words) is None
    assert words.tolist() == [0, 0, 1, Q - 1, Q - 1]
    words = np.array([Q << 10, 5 << 10, TOP, ((Q - 1) << 10) + 1, (2**54 - 1) << 10], "<u8")
    again = ring.uniform(words)
    assert again is not None
    assert again.tolist() == [0, 2, 4]
    assert words[[1, 3]].tolist() == [5, Q - 1]
    assert ring.uniform(words[:0]) is None


@pytest.mark.parametrize("modulus", [Q, LEAST, 2**53])
def test_every_residue_has_as_many_words(modulus: int) -> None:
    """2^10 of the 2^64 words lead to each residue, and none of them to anything else."""
    ring = SmallRing(modulus)
    for residue in (0, 1, modulus // 2, modulus - 1):
        words = np.arange(residue << 10, (residue + 1) << 10, dtype=np.uint64)
        assert ring.uniform(words) is None
        assert set(words.tolist()) == {residue}
    words = np.arange(modulus << 10, (modulus << 10) + 5000, dtype=np.uint64)
    again = ring.uniform(words)
    assert again is not None
    assert len(again) == 5000


def paths_for(often: bool) -> tuple[Path, ...]:
    """The kernel has no modulus that rejects words often."""
    return (Path.OPENSSL,) if often else PATHS


@st.composite
def cases(draw: st.DrawFn) -> tuple[MaskPrg, list[int], list[Mask], int]:
    prg = draw(st.sampled_from(MaskPrg))
    border = st.builds(lambda k, d: max(0, k * 8 + d), st.integers(0, 6), st.integers(-1, 1))
    source = draw(st.randoms(use_true_random=False))
    length = draw(border | st.integers(0, 60))
    values = [source.choice((0, 1, 2**53 - 1, source.getrandbits(53))) for _ in range(length)]
    key = st.binary(min_size=key_bytes(prg), max_size=key_bytes(prg)).map(Secret)
    masks = draw(st.lists(st.builds(Mask, key, st.booleans()), max_size=4))
    return prg, values, masks, draw(border | st.integers(0, 300))


def twin(
    modulus: int, words: Sequence[int], masks: Sequence[Mask], prg: MaskPrg, start: int
) -> list[int]:
    out = list(words)
    for mask in masks:
        drawn, _ = residues(modulus, prg, mask.key.reveal(), start + len(words))
        for index, residue in enumerate(drawn[start:]):
            out[index] = (out[index] + (residue if mask.add else -residue)) % modulus
    return out


@settings(deadline=None, max_examples=80)
@given(case=cases(), often=st.booleans(), threads=st.sampled_from((1, 2, 3, 50)))
def test_masks_of_every_path_equal_the_twin(
    case: tuple[MaskPrg, list[int], list[Mask], int], often: bool, threads: int
) -> None:
    """Both with moduli that the kernel takes and with one that rejects every second word."""
    prg, words, masks, start = case
    for modulus in (2**53,) if often else MODULI:
        ring: Ring = SmallRing(modulus) if often else PrimeRing(modulus)
        expected = twin(modulus, words, masks, prg, start)
        for path in paths_for(often):
            vector = np.array(words, "<u8")
            with tiles_of(SMALL_TILE):
                apply_masks(ring, vector, masks, prg, start=start, threads=threads, path=path)
            assert vector.tolist() == expected, path
            assert not len(vector) or int(vector.max()) < modulus


@settings(deadline=None, max_examples=40)
@given(case=cases(), often=st.booleans(), data=st.data())
def test_range_by_range_equals_the_whole_and_the_inverse_takes_it_off(
    case: tuple[MaskPrg, list[int], list[Mask], int], often: bool, data: st.DataObject
) -> None:
    """A redrawn residue depends on its coordinate, not on where a range began."""
    prg, words, masks, start = case
    ring: Ring = SmallRing(2**53) if often else PrimeRing(Q)
    whole, parts = np.array(words, "<u8"), np.array(words, "<u8")
    cuts = data.draw(st.lists(st.integers(0, len(words)), max_size=4).map(sorted))
    with tiles_of(SMALL_TILE):
        path = data.draw(st.sampled_from(paths_for(often)))
        apply_masks(ring, whole, masks, prg, start=start, threads=1, path=path)
        for low, high in zip([0, *cuts], [*cuts, len(words)], strict=True):
            part = parts[low:high]
            apply_masks(ring, part, masks, prg, start=start + low, threads=2, path=path)
        assert parts.tolist() == whole.tolist()
        inverse = [mask.inverse() for mask in masks]
        path = data.draw(st.sampled_from(paths_for(often)))
        apply_masks(ring, parts, inverse, prg, start=start, threads=3, path=path)
    assert parts.tolist() == words


@pytest.mark.parametrize("prg", MaskPrg)
def test_a_rejected_word_is_drawn_again_from_the_next_streams_until_one_fits(prg: MaskPrg) -> None:
    """A quarter of 2^54: three words of four are no residue, and some coordinates need ten."""
    key, length, modulus = bytes(range(key_bytes(prg))), 400, 2**52
    expected, used = residues(modulus, prg, key, length)
    assert max(used) >= 8
    assert 250 < sum(used[number] for number in used if number) < 350
    vector = np.zeros(length, "<u8")
    ring, mask = SmallRing(modulus), Mask(Secret(key), add=True)
    apply_masks(ring, vector, [mask], prg, threads=1, path=Path.OPENSSL)
    assert vector.tolist() == expected


@pytest.mark.parametrize("prg", MaskPrg)
@pytest.mark.parametrize("threads", [1, 2, None])
@paths
def test_real_tiles(prg: MaskPrg, threads: int | None, path: Path) -> None:
    """Three tiles and a word of the size that ships, the modulus that ships, NumPy's own sums."""
    ring = PrimeRing(Q)
    length, start = 3 * expand.TILE_BYTES // 8 + 1, 5
    masks = [Mask(Secret(bytes([i]) * key_bytes(prg)), add=i != 1) for i in range(3)]
    expected = np.zeros(length, np.uint64)
    for mask in masks:
        data = stream(prg, mask.key.reveal(), 0, 8 * (start + length))
        words = np.frombuffer(data, "<u8")[start:] >> np.uint64(10)
        assert int(words.max()) < Q, "a chance of 2^-20"
        expected = (expected + (words if mask.add else np.uint64(Q) - words)) % np.uint64(Q)
    vector = ring.zeros(length)
    apply_masks(ring, vector, masks, prg, start=start, threads=threads, path=path)
    np.testing.assert_array_equal(vector, expected)


@pytest.mark.parametrize("count", [1022, 1023, 1024, 1025, 2050])
@pytest.mark.parametrize("add", [True, False])
@paths
def test_more_masks_than_a_word_holds_terms(count: int, add: bool, path: Path) -> None:
    """One key a thousand times: the sum is that many times its residues, reduced on the way."""
    key, length = b"k" * 16, 9
    drawn, _ = residues(Q, AES_CTR, key, length)
    vector = np.full(length, Q - 1, "<u8")
    masks = [Mask(Secret(key), add=add)] * count
    apply_masks(PrimeRing(Q), vector, masks, AES_CTR, threads=1, path=path)
    sign = count if add else -count
    assert vector.tolist() == [(Q - 1 + sign * residue) % Q for residue in drawn]


class Fake:
    """A keystream of one byte, which may be none that a residue can be made of."""

    def __init__(self, byte: int) -> None:
        self.byte = bytes([byte])

    def update_into(self, zeros: memoryview, out: memoryview, /) -> int:
        out[: len(zeros)] = self.byte * len(zeros)
        return len(zeros)


@pytest.mark.parametrize("rejected", [0, 1, 2, 7])
def test_the_greatest_words_are_rejected_as_often_as_they_come(
    rejected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the ring that ships: streams of ones, then one of words that are residues."""
    opened: list[int] = []

    def fake(prg: MaskPrg, key: Secret, block: int, stream: int) -> Fake:
        opened.append(stream)
        return Fake(0xFF if stream < rejected else 0x40)

    monkeypatch.setattr(expand, "open_stream", fake)
    vector, mask = np.zeros(3, "<u8"), Mask(Secret(bytes(16)), add=True)
    apply_masks(PrimeRing(Q), vector, [mask], AES_CTR, threads=1, path=Path.OPENSSL)
    assert vector.tolist() == [0x4040404040404040 >> 10] * 3
    assert opened == [0, *(list(range(1, rejected + 1)) * 3)]


def test_a_mask_that_adds_up_to_words_at_their_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """1,023 masks of q − 1 on q − 1: exactly as many terms as a word holds, none more."""
    word = ((Q - 1) << 10).to_bytes(8, "little")

    class Greatest:
        def update_into(self, zeros: memoryview, out: memoryview, /) -> int:
            out[: len(zeros)] = (word * (len(zeros) // 8 + 1))[: len(zeros)]
            return len(zeros)

    monkeypatch.setattr(expand, "open_stream", lambda *_: Greatest())
    for add, count in ((True, 1023), (True, 1024), (False, 1023), (False, 3000)):
        vector = np.full(4, Q - 1, "<u8")
        mask = Mask(Secret(bytes(16)), add=add)
        masks = [mask] * count
        apply_masks(PrimeRing(Q), vector, masks, AES_CTR, threads=1, path=Path.OPENSSL)
        assert vector.tolist() == [(Q - 1) * (1 + (count if add else -count)) % Q] * 4


def test_masked_residues_are_uniform_in_every_sixteenth() -> None:
    """χ² over 16 parts of [0, q) for a constant under 64 keys: what a coordinator sees."""
    counts = np.zeros(16)
    for number in range(64):
        vector = np.full(4096, 7, "<u8")
        key = Secret(number.to_bytes(16, "big"))
        apply_masks(PrimeRing(Q), vector, [Mask(key, add=True)], AES_CTR, threads=1)
        counts += np.bincount((vector * 16.0 / Q).astype(int), minlength=16)
    expected = 64 * 4096 / 16
    assert float(((counts - expected) ** 2).sum() / expected) < 45  # 15 degrees: p ≈ 10^-4


@pytest.mark.parametrize("bad", [np.zeros(4, "<u4"), np.zeros(4, "<i8"), np.zeros((2, 2), "<u8")])
def test_refuses_what_is_no_vector_of_the_ring(bad: Vector) -> None:
    with pytest.raises(ValueError, match="contiguous, writable vector of the ring"):
        apply_masks(PrimeRing(Q), bad, [], AES_CTR)
    with pytest.raises(ValueError, match="another ring or length"):
        RunningSum(PrimeRing(Q), 4).add(bad)
