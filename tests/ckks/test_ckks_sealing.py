"""Sealing against SEAL's own decryption, plain sums, Python's integers and every wrong key."""

from __future__ import annotations

import importlib
import math
import os
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tenseal.sealapi as seal
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from secagg.ckks import engine as engine_module
from secagg.ckks import formats
from secagg.ckks import kernel as kernel_module
from secagg.ckks.engine import require
from secagg.ckks.kernel import Job, Kernel, Work, _Product, centred_binomial, ternary
from secagg.ckks.sealing import Sealer
from secagg.ckks.workers import CHUNK
from secagg.crypto.kdf import derive
from secagg.crypto.secret import Secret
from secagg.errors import ConfigError, MalformedMessage, OutOfOrder
from secagg.ring.vectors import PrimeRing, RunningSum, Vector
from secagg.suite import Suite

from .twins import c1_of, keystream

SUITE = Suite.CKKS_54
Q, N = SUITE.parameters.modulus, SUITE.parameters.degree
RING = PrimeRing(Q)
KEY = Secret(bytes(range(32)))
LIMIT = 1024
STEP = 2.0**-24
RESIDUES = st.sampled_from([0, 1, 2, Q - 2, Q - 1, Q // 2, 2**53]) | st.integers(0, Q - 1)


@pytest.fixture(scope="module")
def sealer() -> Iterator[Sealer]:
    made = Sealer(SUITE, KEY, workers=1)
    yield made
    made.close()


@pytest.fixture(scope="module")
def kernel() -> Kernel:
    return Kernel(SUITE, KEY)


def added(vectors: list[Vector]) -> Vector:
    total = RunningSum(RING, len(vectors[0]))
    for vector in vectors:
        total.add(vector)
    return total.total


def seeds_of(count: int) -> list[bytes]:
    return [bytes([i]) * 32 for i in range(count)]


def steps_of(values: np.ndarray, limit: int) -> np.ndarray:
    """Which multiples of 2^-24 the values become in slots: the nearest, as Python's integers."""
    steps: np.ndarray = np.rint(values * limit / STEP).astype(np.int64)
    return steps


# ---- the key


def test_the_key_is_ternary_and_uniform() -> None:
    counts = np.zeros(3)
    for number in range(8):
        key = ternary(SUITE, Secret(bytes([number]) * 32))
        assert (key.shape, key.dtype) == ((N,), np.int8)
        counts += np.bincount(key + 1, minlength=3)
    expected = 8 * N / 3
    assert ((counts - expected) ** 2 / expected).sum() < 20  # chi-square, 2 degrees: 5e-5


def test_the_key_is_what_its_bytes_say() -> None:
    key = derive(KEY, salt=b"", label="ckks-secret", parties=("ckks-54",), size=16).reveal()
    stream = keystream(key, 2 * N)
    expected = [byte % 3 - 1 for byte in stream if byte != 255][:N]
    assert 255 in stream[:N]  # one was thrown away
    assert ternary(SUITE, KEY).tolist() == expected


def test_the_key_s_residues_are_its_values_at_roots_of_minus_one(kernel: Kernel) -> None:
    """Whatever SEAL's order: each residue is s at a primitive 2N-th root of unity, by Horner."""
    coefficients = ternary(SUITE, KEY).tolist()
    residues = set(kernel._product._secret.tolist())
    root = next(r for g in range(2, 50) if pow(r := pow(g, (Q - 1) // (2 * N), Q), N, Q) == Q - 1)
    for power in range(1, 2 * N, 2 * 511):
        at, value = pow(root, power, Q), 0
        for coefficient in reversed(coefficients):
            value = (value * at + coefficient) % Q
        assert value in residues


# ---- the product


@settings(deadline=None)
@given(
    secret=st.lists(RESIDUES, min_size=4, max_size=4),
    rows=st.lists(st.tuples(RESIDUES, RESIDUES), min_size=4, max_size=40),
)
def test_products_equal_python_s(secret: list[int], rows: list[tuple[int, int]]) -> None:
    rows = rows[: len(rows) // 4 * 4]
    total = np.array([row[0] for row in rows], "<u8").reshape(-1, 4)
    factor = np.array([row[1] for row in rows], "<u8").reshape(-1, 4)
    product = _Product(RING, np.array(secret, "<u8"))
    plus, minus = total.copy(), total.copy()
    product.add_to(plus, factor)
    product.subtract_from(minus, factor)
    for i, (word, c) in enumerate(rows):
        assert plus.flat[i] == (word + c * secret[i % 4]) % Q
        assert minus.flat[i] == (word - c * secret[i % 4]) % Q


# ---- SEAL as the oracle


class Oracle:
    """SEAL with the same key: a context of its own, and its own encryptor and decryptor."""

    def __init__(self, secret: Vector) -> None:
        parameters = seal.EncryptionParameters(seal.SCHEME_TYPE.CKKS)
        parameters.set_poly_modulus_degree(N)
        parameters.set_coeff_modulus(seal.CoeffModulus.Create(N, [54]))
        self.context = seal.SEALContext(parameters, True, seal.SEC_LEVEL_TYPE.TC128)
        self.parms_id = tuple(self.context.first_parms_id())
        self.encoder = seal.CKKSEncoder(self.context)
        before = formats.before_plaintext(N, self.parms_id, 1.0)
        key = self.load(seal.SecretKey(), before + secret.tobytes())
        self.encryptor = seal.Encryptor(self.context, key)
        self.decryptor = seal.Decryptor(self.context, key)

    def load(self, item: Any, data: bytes) -> Any:
        handle = os.memfd_create("loaded")
        try:
            os.pwrite(handle, data, 0)
            item.load(self.context, f"/proc/self/fd/{handle}")
        finally:
            os.close(handle)
        return item

    def encode(self, row: np.ndarray) -> Any:
        plaintext = seal.Plaintext()
        self.encoder.encode(row.view(np.complex128).tolist(), 2.0**40, plaintext)
        return plaintext

    def decrypt(self, loaded: Any) -> np.ndarray:
        plaintext = seal.Plaintext()
        self.decryptor.decrypt(loaded, plaintext)
        return np.array(self.encoder.decode_complex(plaintext)).view(np.float64)

    def ciphertext(self, c0: Vector, c1: Vector) -> Any:
        pair = formats.PairFormat(N, Q, self.parms_id, 2.0**40)
        data = bytearray(pair.before_words() + c0.tobytes() + c1.tobytes())
        data[16 + 32] = 1  # in the NTT domain
        return self.load(seal.Ciphertext(), bytes(data))

    def coefficients(self, residues: Vector) -> np.ndarray:
        """SEAL's inverse transform of a polynomial, its coefficients between −q/2 and q/2."""
        pair = self.ciphertext(residues, residues)
        seal.Evaluator(self.context).transform_from_ntt_inplace(pair)
        handle = os.memfd_create("saved")
        try:
            pair.save(f"/proc/self/fd/{handle}")
            body = zstandard.ZstdDecompressor().decompress(os.pread(handle, 2**20, 16))
        finally:
            os.close(handle)
        found = np.frombuffer(body[-8 * N :], "<u8")
        centred: np.ndarray = np.where(found > Q // 2, found.astype(np.int64) - Q, found)
        return centred.astype(np.int64)


@pytest.fixture(scope="module")
def oracle(kernel: Kernel) -> Oracle:
    return Oracle(kernel._product._secret)


def test_seal_decrypts_what_was_sealed(sealer: Sealer, oracle: Oracle) -> None:
    """(c0', c1') loaded as SEAL's own ciphertext: its decryptor and decoder give the values."""
    values = np.random.default_rng(2).uniform(-1, 1, N + 5)
    words = sealer.seal([values], len(values), LIMIT, bytes(32)).reshape(2, N)
    pairs = zip(words, c1_of(bytes(32), 2), strict=True)
    opened = np.array([oracle.decrypt(oracle.ciphertext(c0, mask)) for c0, mask in pairs])
    assert np.abs(opened[:, 0] - 1).max() < 2e-9
    flat = opened[:, 1:].reshape(-1)
    assert np.abs(flat[: len(values)] - steps_of(values, LIMIT) * STEP).max() < 2e-9
    assert np.abs(flat[len(values) :]).max() < 2e-9


def test_seal_s_own_ciphertexts_decrypt_under_the_key(oracle: Oracle) -> None:
    """The loaded key is a key: what SEAL encrypts under it, SEAL decrypts."""
    row, ciphertext = np.random.default_rng(4).uniform(-9, 9, N), seal.Ciphertext()
    oracle.encryptor.encrypt_symmetric(oracle.encode(row), ciphertext)
    assert np.abs(oracle.decrypt(ciphertext) - row).max() < 2e-9


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_an_encoding_is_seal_s_but_for_the_noise(
    kernel: Kernel, oracle: Oracle, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without noise, slot for slot what SEAL's encoder gives: a coefficient may round otherwise."""
    monkeypatch.setattr(
        kernel_module, "centred_binomial", lambda count, _: np.zeros(count, np.int8)
    )
    given_rows = np.random.default_rng(rows).uniform(-1024, 1024, (rows, N))
    out = np.empty((rows, N), "<u8")
    kernel._encode(given_rows, out)
    for row, residues in zip(given_rows, out, strict=True):
        decoded = np.empty(N)
        kernel._engine.decode(residues, decoded)
        theirs = np.array(oracle.encoder.decode_complex(oracle.encode(row))).view(np.float64)
        assert np.abs(decoded - theirs).max() < 1e-9
        assert np.abs(decoded - row).max() < 1e-9


def test_noise_is_a_centred_binomial() -> None:
    """Chi-square against the exact binomial of 42 coins, tails joined; and fresh every time."""
    count = 2**18
    drawn = centred_binomial(count, os.urandom)
    assert (drawn.dtype, drawn.shape) == (np.int8, (count,))
    assert np.abs(drawn).max() <= 21
    edge = 11
    seen = np.bincount(drawn.clip(-edge, edge).astype(int) + edge, minlength=2 * edge + 1)
    chances = [math.comb(42, 21 + e) / 2**42 for e in range(-21, 22)]
    joined = [sum(chances[: 22 - edge]), *chances[22 - edge : 21 + edge], sum(chances[21 + edge :])]
    expected = np.array(joined) * count
    assert ((seen - expected) ** 2 / expected).sum() < 70  # 22 degrees of freedom: 7e-7
    assert not np.array_equal(drawn, centred_binomial(count, os.urandom))


def test_noise_is_what_its_stream_says() -> None:
    key = bytes(range(16))
    stream = keystream(key, 8 * 500)
    expected = [
        (word & 0x1FFFFF).bit_count() - (word >> 21 & 0x1FFFFF).bit_count()
        for (word,) in struct.iter_unpack("<Q", stream)
    ]
    assert centred_binomial(500, lambda size: key[:size]).tolist() == expected


def test_every_row_has_its_place_in_c1_and_noise_of_its_own(
    sealer: Sealer, kernel: Kernel, oracle: Oracle
) -> None:
    """c0 + c1·s − m, with c1 from PyCryptodome and SEAL's inverse transform, is e: three jobs, the
    last of an odd row, under two seeds that differ in their last byte.
    """
    rows, generator = 2 * CHUNK + 1, np.random.default_rng(8)
    seeds = [bytes(range(100, 131)) + end for end in (b"\x83", b"\x84")]
    secret, noise = kernel._product._secret.astype(object), []
    for seed in seeds:
        values = generator.integers(-(2**34), 2**34, rows * (N - 1)) / 2**34  # on the grid
        words = sealer.seal([values], len(values), LIMIT, seed).reshape(rows, N)
        slots = np.ones((rows, N))
        slots[:, 1:] = LIMIT * values.reshape(rows, N - 1)
        opened = (words + c1_of(seed, rows).astype(object) * secret) % Q
        for row, message in zip(opened, kernel._embedding.coefficients(slots), strict=True):
            noise.append(oracle.coefficients(row.astype("<u8")) - message)
    found = np.array(noise)
    assert np.abs(found).max() <= 21
    assert len(set(map(bytes, found))) == 2 * rows
    assert np.abs(np.corrcoef(found) - np.eye(2 * rows)).max() < 0.1  # 6.4 standard deviations
    assert np.abs(found.var(axis=1) - 10.5).max() < 1.5  # of 0.23 each: 6.4 as well
    assert np.abs(found.mean(axis=1)).max() < 0.33


def test_sixteen_uploads_open_to_their_sum_but_for_noise(kernel: Kernel) -> None:
    """Before rounding, the noise is there, and nothing else is.

    Its coefficients have variance 10.5 (a centred binomial of 42 bits), so a slot's part has
    √(16 · 10.5 · N / 2) / 2^40 = 5.3e-10 for 16 uploads.
    """
    generator = np.random.default_rng(3)
    rows = generator.uniform(-8, 8, (16, 1, N))
    rows[:, :, 0] = 1.0
    vectors = []
    for seed, row in zip(seeds_of(16), rows, strict=True):
        out = np.empty((1, N), "<u8")
        kernel.do(Job(Work.SEAL, (seed,), 5, row, out))
        vectors.append(out.reshape(-1))
    opened = np.empty((1, N))
    total = added(vectors).reshape(1, N)
    kernel.do(Job(Work.OPEN, tuple(seeds_of(16)), 5, total, opened))
    error = opened - rows.sum(axis=0)
    assert 4.6e-10 < error.std() < 6e-10
    assert np.abs(error).max() < 4e-9
    assert abs(opened[0, 0] - 16) < 4e-9


@settings(deadline=None, max_examples=12)
@given(
    silos=st.integers(1, 4),
    count=st.integers(1, 3 * N),
    seed=st.integers(0, 2**32),
    extreme=st.booleans(),
)
def test_opens_to_the_sum(sealer: Sealer, silos: int, count: int, seed: int, extreme: bool) -> None:
    """Exactly: the integer sum of what each silo rounds its values to."""
    generator = np.random.default_rng(seed)
    updates = generator.uniform(-1, 1, (silos, count))
    if extreme:  # all at the same end: what would wrap if anything did
        updates = np.full((silos, count), generator.choice([-1.0, 1.0]))
    limit = SUITE.parameters.slot_limit(4)
    seeds = seeds_of(silos)
    vectors = [
        sealer.seal(np.array_split(update, 3), count, limit, seed)
        for update, seed in zip(updates, seeds, strict=True)
    ]
    assert all(vector.dtype == RING.dtype and RING.holds(vector) for vector in vectors)
    assert {len(vector) for vector in vectors} == {N * -(-count // (N - 1))}
    opened = np.concatenate(list(sealer.open(added(vectors), seeds[::-1], count, limit)))
    assert opened.shape == (count,)
    total = sum(steps_of(update, limit) for update in updates)
    assert np.array_equal(opened * limit / STEP, total)
    assert np.abs(opened - updates.sum(axis=0)).max() <= silos * STEP / limit / 2


def test_a_sum_is_the_same_whatever_the_noise(sealer: Sealer) -> None:
    """To the bit, for other seeds and other noise: what is opened tells nothing of either."""
    updates = np.random.default_rng(6).uniform(-1, 1, (3, N + 7))

    def opened(first: int) -> tuple[Vector, np.ndarray]:
        seeds = [bytes([first + i]) * 32 for i in range(len(updates))]
        total = added(
            [sealer.seal([u], len(u), LIMIT, s) for u, s in zip(updates, seeds, strict=True)]
        )
        return total, np.concatenate(list(sealer.open(total, seeds, N + 7, LIMIT)))

    (total, one), (other_total, other) = opened(0), opened(0)
    assert (total != other_total).mean() > 0.99  # the noise alone is another
    assert one.tobytes() == other.tobytes() == opened(100)[1].tobytes()


def test_an_honest_sum_of_256_silos_is_within_three_eighths_of_a_step(
    kernel: Kernel, sealer: Sealer
) -> None:
    """All of it real: 256 uploads; what is refused is 10.4 standard deviations of noise away."""
    silos, generator = 256, np.random.default_rng(7)
    limit = SUITE.parameters.slot_limit(silos)
    updates = generator.choice([-1.0, 1.0], N - 1) * generator.uniform(0.9, 1, (silos, N - 1))
    seeds = [i.to_bytes(32, "little") for i in range(silos)]
    total = added([sealer.seal([u], N - 1, limit, s) for u, s in zip(updates, seeds, strict=True)])
    steps = sum(steps_of(update, limit) for update in updates)
    raw = np.empty((1, N))
    kernel.do(Job(Work.OPEN, tuple(seeds), 0, total.reshape(1, N), raw))
    error = raw[0] - np.concatenate([[silos], steps * STEP])
    # A coefficient's variance is 10.5, and 1/12 of rounding; a slot's part sums N/2 of them.
    deviation = math.sqrt(silos * (10.5 + 1 / 12) * N / 2) / 2**40
    assert abs(error.std() / deviation - 1) < 0.06  # 4096 values: five times 1.1 %
    assert 10.4 * deviation < 3 * STEP / 8 < 10.5 * deviation
    assert np.abs(error).max() < 3 * STEP / 8
    opened = np.concatenate(list(sealer.open(total, seeds, N - 1, limit)))
    assert np.array_equal(opened * limit / STEP, steps)


@pytest.mark.parametrize(("shift", "refused"), [(0.36, False), (0.39, True), (0.5, True)])
def test_a_shifted_sum_is_no_sum(
    kernel: Kernel, sealer: Sealer, shift: float, refused: bool
) -> None:
    """Whoever adds to c0: one value of many, moved by this part of a step. One upload's noise has
    a standard deviation of 0.002 steps.
    """
    words = sealer.seal([np.full(9, 0.5)], 9, LIMIT, bytes(32))
    row = np.zeros((1, N))
    row[0, 5] = shift * STEP
    moved = kernel._embedding.coefficients(row) % Q
    pair = kernel._engine.transform(np.concatenate([moved, moved]).astype(np.uint64))
    sums = sealer.open((words + pair[0]) % np.uint64(Q), [bytes(32)], 9, LIMIT)
    if refused:
        with pytest.raises(MalformedMessage, match=r"\[off-grid\]"):
            list(sums)
    else:
        assert np.concatenate(list(sums)).tolist() == [0.5] * 9


def test_two_sealings_differ_and_their_masks_are_the_seed_s(sealer: Sealer) -> None:
    """Noise is fresh, so one seed's two vectors differ by noise alone: why none is used twice."""
    one, two = (sealer.seal([np.zeros(3)], 3, LIMIT, bytes(32)) for _ in range(2))
    assert (one != two).mean() > 0.99
    with pytest.raises(MalformedMessage, match="reserved-slot"):
        list(sealer.open((one + (Q - two)) % Q, [bytes(32)], 3, LIMIT))


# ---- what does not open


def test_another_key_or_another_seed_does_not_open(sealer: Sealer) -> None:
    words = sealer.seal([np.ones(9)], 9, LIMIT, bytes(32))
    other = Sealer(SUITE, Secret(bytes(32)), workers=1)
    for opener, seeds in (
        (other, [bytes(32)]),
        (sealer, [b"\1" * 32]),
        (sealer, [bytes(32), b"\1" * 32]),
    ):
        with pytest.raises(MalformedMessage) as caught:
            list(opener.open(words, seeds, 9, LIMIT))
        assert caught.value.code == "reserved-slot"


def test_every_ciphertext_has_its_place(sealer: Sealer) -> None:
    count = 2 * (N - 1)
    words = sealer.seal([np.ones(count)], count, LIMIT, bytes(32))
    swapped = np.roll(words, N)
    with pytest.raises(MalformedMessage, match="reserved-slot"):
        list(sealer.open(swapped, [bytes(32)], count, LIMIT))


@pytest.mark.parametrize(
    ("words", "seeds", "code"),
    [
        (np.zeros(N - 1, "<u8"), seeds_of(1), "vector-length"),
        (np.zeros((1, N), "<u8"), seeds_of(1), "vector-length"),
        (np.zeros(N, "<u4"), seeds_of(1), "vector-length"),
        (np.full(N, Q, "<u8"), seeds_of(1), "residue-range"),
        (np.full(N, 2**64 - 1, "<u8"), seeds_of(1), "residue-range"),
        (np.zeros(N, "<u8"), [], "seed-size"),
        (np.zeros(N, "<u8"), [bytes(31)], "seed-size"),
        (np.zeros(N, "<u8"), [bytes(32), bytes(33)], "seed-size"),
        (np.zeros(N, "<u8"), [bytes(32), b"\1" * 32, bytes(32)], "seed-duplicate"),
    ],
)
def test_open_refuses_at_once(sealer: Sealer, words: Vector, seeds: list[bytes], code: str) -> None:
    with pytest.raises(MalformedMessage) as caught:
        sealer.open(words, seeds, 5, LIMIT)
    assert caught.value.code == code


@pytest.mark.parametrize(
    ("size", "limit", "seed"), [(0, LIMIT, bytes(32)), (3, LIMIT, bytes(31)), (3, 8192, bytes(32))]
)
def test_seal_refuses_at_once(sealer: Sealer, size: int, limit: int, seed: bytes) -> None:
    with pytest.raises(ValueError, match="a seed has 32 bytes"):
        sealer.seal([np.zeros(size)], size, limit, seed)


def test_nothing_prints_the_key(sealer: Sealer) -> None:
    said = repr(sealer) + repr(vars(sealer)) + repr(vars(sealer._kernel)) + repr(vars(sealer._crew))
    assert KEY.reveal().hex() not in said
    assert repr(KEY.reveal())[2:20] not in said


# ---- the library


def test_missing_libraries_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        if name == "tenseal.sealapi":
            raise ModuleNotFoundError("No module named 'tenseal'", name="tenseal")
        return None

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(ConfigError, match=r"needs tenseal.*pip install 'secagg\[ckks\]'") as caught:
        Sealer(SUITE, KEY)
    assert caught.value.code == "extra-missing"


def test_only_the_engine_imports_it() -> None:
    """A coordinator has no TenSEAL: all modules but for an engine's making work without it."""
    script = (
        "import sys; sys.modules['tenseal'] = None; sys.modules['zstandard'] = None;"
        "import secagg.ckks.codec, secagg.ckks.sealing, secagg.ckks.formats, secagg.ckks.worker;"
        "from secagg.ckks.engine import require; from secagg.errors import ConfigError\n"
        "try: require()\n"
        "except ConfigError as error: print(error.code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, check=True, text=True
    )
    assert done.stdout == "extra-missing\n"


def test_require_returns_seal() -> None:
    assert require() is seal


@pytest.mark.parametrize("loads", [True, False])
def test_a_library_with_other_files_is_refused(
    monkeypatch: pytest.MonkeyPatch, loads: bool
) -> None:
    """SEAL refuses ours, or ours loads and what it saves is refused here."""
    if loads:
        monkeypatch.setattr(formats, "_MAGIC", 0)
        monkeypatch.setattr(formats, "_header", _header_of_seal)
    else:
        monkeypatch.setattr(formats, "VERSION", (4, 9))
    with pytest.raises(ConfigError) as caught:
        Kernel(SUITE, KEY)
    assert caught.value.code == "ckks-library"


def _header_of_seal(size: int) -> bytes:
    return struct.pack("<HBBBBHQ", 0xA15E, 16, 4, 3, 0, 0, size)


@pytest.mark.parametrize(("prime", "accepted"), [(Q - 2, True), (Q, False)])
def test_parameters_that_seal_refuses(prime: int, accepted: bool) -> None:
    asked: list[Any] = []

    class Context:
        def __init__(self, *given: Any) -> None:
            asked.extend(given[1:])

        parameters_set = staticmethod(lambda: accepted)
        parameters_error_name = staticmethod(lambda: "name")

    stub = SimpleNamespace(
        CoeffModulus=SimpleNamespace(Create=lambda *_: [SimpleNamespace(value=lambda: prime)]),
        EncryptionParameters=lambda _: SimpleNamespace(
            set_poly_modulus_degree=lambda _: None, set_coeff_modulus=lambda _: None
        ),
        SCHEME_TYPE=seal.SCHEME_TYPE,
        SEC_LEVEL_TYPE=seal.SEC_LEVEL_TYPE,
        SEALContext=Context,
    )
    with pytest.raises(ConfigError) as caught:
        engine_module._context(stub, SUITE.parameters)
    assert caught.value.code == "ckks-parameters"
    assert asked == [True, seal.SEC_LEVEL_TYPE.TC128]


def test_seal_itself_refuses_a_modulus_beyond_128_bits() -> None:
    """The check that the context is built with has teeth."""
    parameters = seal.EncryptionParameters(seal.SCHEME_TYPE.CKKS)
    parameters.set_poly_modulus_degree(N)
    parameters.set_coeff_modulus(seal.CoeffModulus.Create(N, [55, 55]))
    context = seal.SEALContext(parameters, True, seal.SEC_LEVEL_TYPE.TC128)
    assert not context.parameters_set()


# ---- one process, one thread at a time, and nothing left in memory that others can open


def test_an_engine_closes_its_file() -> None:
    kernel = Kernel(SUITE, KEY)
    file = kernel._engine._file
    assert "secagg-ckks" in os.readlink(f"/proc/self/fd/{file}")
    del kernel
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(file)


def test_nothing_stays_in_the_file() -> None:
    """Neither the key nor a message, whether or not SEAL takes what is loaded."""
    kernel = Kernel(SUITE, KEY)
    file = kernel._engine._file
    assert os.fstat(file).st_size == 0
    out, opened = np.empty((3, N), "<u8"), np.empty((3, N))
    kernel.do(Job(Work.SEAL, (bytes(32),), 0, np.zeros((3, N)), out))
    assert os.fstat(file).st_size == 0
    kernel.do(Job(Work.OPEN, (bytes(32),), 0, out, opened))
    assert os.fstat(file).st_size == 0
    with pytest.raises(RuntimeError, match="invalid"):
        kernel._engine.transform(np.full((2, N), Q, "<u8"))
    assert os.fstat(file).st_size == 0
    with pytest.raises(RuntimeError, match="invalid"):
        kernel._engine.decode(np.full(N, Q, "<u8"), opened[0])
    assert os.fstat(file).st_size == 0


def test_a_kernel_does_one_job_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two threads: while one is inside, the other never comes, so they do not meet."""
    kernel, both, alone = Kernel(SUITE, KEY), threading.Barrier(2), []

    def inside(_: Job) -> None:
        try:
            both.wait(0.2)
        except threading.BrokenBarrierError:
            alone.append(True)

    monkeypatch.setattr(kernel, "_do", inside)
    job = Job(Work.OPEN, (bytes(32),), 0, np.zeros((1, N), "<u8"), np.empty((1, N)))
    threads = [threading.Thread(target=kernel.do, args=(job,)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert alone == [True, True]


def test_a_fork_is_refused_before_anything_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """Test twin of the real fork in test_ckks_workers: here, what the process thinks of its id."""
    kernel, written = Kernel(SUITE, KEY), []
    monkeypatch.setattr(os, "pwritev", lambda *_: written.append(True))
    real = os.getpid()
    monkeypatch.setattr(os, "getpid", lambda: real + 1)
    rows, words = np.zeros((2, N)), np.zeros((2, N), "<u8")
    monkeypatch.setattr(kernel, "_lock", None)  # a thread may hold it that the fork has not got
    for use in (
        lambda: kernel.do(Job(Work.SEAL, (bytes(32),), 0, rows, words)),
        lambda: kernel._engine.transform(words),
        lambda: kernel._engine.decode(words[0], rows[0]),
    ):
        with pytest.raises(OutOfOrder) as caught:
            use()
        assert caught.value.code == "forked"
    assert not written
