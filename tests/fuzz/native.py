"""Random calls of the kernel in C, right and wrong, to be run under the sanitisers.

``make fuzz-native`` builds the kernel with AddressSanitizer and UndefinedBehaviorSanitizer into a
directory of its own and has it called from here; ``make test`` makes a few hundred calls of the
one that is installed. Every buffer is as long as it must be and no longer, so that a byte too far
is one that the sanitiser knows of; many begin at odd addresses. A call is right, then its words are
compared with the twins', or some of its arguments are wrong, then it is refused or does what it
does, within its buffers. A failure names its seed, and ``--seed N --calls 1`` repeats it.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path as PathOnDisk
from random import Random
from typing import Any

import numpy as np

STREAM, KINDS = 2**44, 4
REFUSALS = (ValueError, OverflowError, TypeError, BufferError)
WRONG_NUMBERS = (
    -1,
    0,
    1,
    2,
    3,
    4,
    5,
    8,
    16,
    2**20,
    2**31 - 1,
    2**31,
    2**42,
    2**44,
    2**63,
    2**64 - 1,
)
WRONG_FLOATS = (-1.0, -0.0, 5e-324, 2.0**31, 2.0**62, 1e308, math.inf, -math.inf, math.nan)


def use(kernel: PathOnDisk) -> None:
    """Have ``secagg.ring.native`` find this build instead of the one that is installed."""
    name = "secagg.ring._native.kernel"
    spec = importlib.util.spec_from_file_location(name, kernel)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules[name] = module


@dataclass
class Call:
    """A call that is right.

    Args:
        function: its name.
        arguments: in order.
        check: whether what it returned and wrote is right.
    """

    function: str
    arguments: dict[str, Any]
    check: Callable[[Any], None]


class Fuzzer:
    """Calls that a seed determines."""

    def __init__(self, seed: int) -> None:
        from secagg.ring import native

        self.native = native
        self.kernel = native.kernel
        self.random = Random(seed)
        self.bytes = np.random.default_rng(seed).bytes

    def buffer(self, data: bytes) -> np.ndarray:
        """Bytes in memory that ends where they do, and often begins at an odd address."""
        skip = self.random.choice((0, 0, 1, 2, 3, 8, 15))
        memory = np.empty(skip + len(data), np.uint8)
        memory[skip:] = np.frombuffer(data, np.uint8)
        return memory[skip:]

    def length(self) -> int:
        """Of a vector, in words: mostly about a border of the loops."""
        border = self.random.choice((0, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192))
        near = max(0, border + self.random.randint(-3, 3))
        return self.random.choice((near, near, self.random.randint(0, 40), 0))

    def start(self, length: int, word: int) -> int:
        """A coordinate: about the borders of counters, or the very last that there is."""
        last = STREAM // word - length
        border = self.random.choice((0, 512, 4096, 2**14, 16 * 2**32, 2**40, STREAM)) // word
        near = border + self.random.randint(-600, 600)
        return min(max(0, self.random.choice((near, 0, last, self.random.randint(0, last)))), last)

    def keys(self, count: int) -> tuple[list[Any], bytes]:
        """Keys, and what they are made ready."""
        from secagg.crypto.secret import Secret

        keys = [Secret(self.bytes(16)) for _ in range(count)]
        return keys, bytes(self.native.ReadyKeys(keys))

    def masks(self) -> tuple[list[Any], bytes, bytes]:
        """Masks as the twin takes them, and as the kernel does."""
        from secagg.ring.expand import Mask

        count = self.random.choice((0, 1, 1, 2, 3, 7))
        keys, ready = self.keys(count)
        signs = bytes(self.random.choice((0, 1, 1, 255)) for _ in keys)
        return [Mask(key, sign != 0) for key, sign in zip(keys, signs, strict=True)], ready, signs

    def ring(self) -> Any:
        from secagg.ring.vectors import PowerRing, PrimeRing

        excess = self.random.choice((172031, 1, 2**20 - 1))
        rings = (PowerRing(16), PowerRing(32), PowerRing(64), PrimeRing(2**54 - excess))
        return self.random.choice(rings)

    def path(self) -> int:
        return self.random.choice([self.native._INDEX[p] for p in self.native.available()[:-1]])

    def loops(self) -> int:
        return self.random.randrange(self.kernel.LOOPS)

    def words(self, ring: Any, length: int) -> np.ndarray:
        """Residues."""
        vector = ring.unpack(self.bytes(length * ring.word_bytes), length).copy()
        ring.reduce(vector)
        return vector

    # One for each function.

    def expand(self) -> Call:
        from secagg.config import MaskPrg
        from secagg.ring.expand import apply_masks
        from secagg.ring.native import Path

        ring, length = self.ring(), self.length()
        start, (masks, ready, signs) = self.start(length, ring.word_bytes), self.masks()
        words = self.words(ring, length)
        out = self.buffer(words.tobytes())

        def check(_: Any) -> None:
            prg = MaskPrg.AES_128_CTR
            apply_masks(ring, words, masks, prg, start=start, path=Path.OPENSSL, threads=1)
            assert out.tobytes() == words.tobytes()

        modulus = getattr(ring, "modulus", 0)
        arguments = {"path": self.path(), "out": out, "word_bytes": ring.word_bytes}
        arguments |= {"modulus": modulus, "start": start, "keys": self.buffer(ready)}
        return Call("expand", arguments | {"signs": self.buffer(signs)}, check)

    def fill(self) -> Call:
        from secagg.config import MaskPrg
        from secagg.crypto.prg import read

        size = self.length()
        start, (keys, ready) = self.start(size, 1), self.keys(1)
        out = self.buffer(self.bytes(size))

        def check(_: Any) -> None:
            assert out.tobytes() == read(MaskPrg.AES_128_CTR, keys[0], size, start)

        arguments = {"path": self.path(), "out": out, "start": start, "key": self.buffer(ready)}
        return Call("fill", arguments, check)

    def make_ready(self) -> Call:
        keys, ready = self.keys(self.random.choice((0, 1, 2, 5)))
        out = self.buffer(bytes(len(ready)))
        data = self.buffer(b"".join(key.reveal() for key in keys))

        def check(_: Any) -> None:
            assert out.tobytes() == ready

        return Call("make_ready", {"out": out, "keys": data}, check)

    def numbers(self, length: int) -> tuple[np.ndarray, int]:
        """Numbers of any format; mostly numbers, now and then any bits."""
        kind = self.random.randrange(KINDS)
        dtype = np.dtype(["float16", "float32", "float64", "float32"][kind])
        if self.random.random() < 0.2:
            values = np.frombuffer(self.bytes(length * dtype.itemsize), dtype)
        else:
            reach = self.random.choice((1.0, 3.0, 1e-30, 2.0**-20))
            spread = np.frombuffer(self.bytes(4 * length), np.int32) / 2.0**31
            values = (spread * reach).astype(dtype)
        if kind == KINDS - 1:  # the upper half of single precision
            return (values.view(np.uint32) >> 16).astype(np.uint16), kind
        return values, kind

    def plain(self, values: np.ndarray, kind: int) -> np.ndarray:
        """The same for the twin, which knows no bfloat16."""
        if kind == KINDS - 1:
            return (values.astype(np.uint32) << 16).view(np.float32)
        return values

    def scale(self, word: int) -> dict[str, Any]:
        limit = 2.0 ** self.random.choice((4, {2: 12, 4: 28, 8: 60}[word]))
        clip = self.random.choice((math.inf, 1.0, 0.25, 0.0))
        return {
            "clip": clip,
            "factor": limit / self.random.choice((4, 3, -4, 1e30)),
            "limit": limit,
        }

    def meaning(self, values: np.ndarray, kind: int, to: dict[str, Any]) -> bool:
        """Whether the words are determined: all products are within a word."""
        with np.errstate(all="ignore"):
            most = float(np.abs(self.plain(values, kind).astype(np.float64)).max(initial=0.0))
        return math.isfinite(most) and min(most, to["clip"]) * abs(to["factor"]) < 2.0**31

    def twin(
        self, values: np.ndarray, kind: int, word: int, uniform: bytes, to: dict[str, Any]
    ) -> tuple[np.ndarray, tuple[float, int]]:
        out = np.zeros(len(values), f"<u{word}")
        drawn = np.frombuffer(uniform, np.uint32)
        with np.errstate(all="ignore"):
            seen = self.native._to_words(
                self.plain(values, kind), out, drawn, to["clip"], to["factor"], int(to["limit"])
            )
        return out, seen

    def encode(self) -> Call:
        from secagg.config import MaskPrg
        from secagg.crypto.prg import read
        from secagg.ring.expand import apply_masks
        from secagg.ring.native import Path
        from secagg.ring.vectors import PowerRing

        word, length = self.random.choice((2, 4, 8)), self.length()
        start, (masks, ready, signs) = self.start(length, max(word, 4)), self.masks()
        own, rounding = self.keys(1)
        values, kind = self.numbers(length)
        to, out = self.scale(word), self.buffer(self.bytes(length * word))
        prg = MaskPrg.AES_128_CTR

        def check(seen: Any) -> None:
            uniform = read(prg, own[0], 4 * length, 4 * start)
            expected, report = self.twin(values, kind, word, uniform, to)
            if not self.meaning(values, kind, to):
                return
            assert (self.native._magnitude(seen[0], kind), seen[1]) == report
            ring = PowerRing(8 * word)  # type: ignore[arg-type]
            apply_masks(ring, expected, masks, prg, start=start, path=Path.OPENSSL, threads=1)
            assert out.tobytes() == expected.tobytes()

        arguments = {"path": self.path(), "loops": self.loops(), "out": out, "word_bytes": word}
        arguments |= {"start": start, "values": self.buffer(values.tobytes()), "kind": kind, **to}
        arguments |= {"rounding": self.buffer(rounding), "keys": self.buffer(ready)}
        return Call("encode", arguments | {"signs": self.buffer(signs)}, check)

    def to_words(self) -> Call:
        word, length = self.random.choice((2, 4, 8)), self.length()
        values, kind = self.numbers(length)
        uniform = self.bytes(4 * length)
        to, out = self.scale(word), self.buffer(self.bytes(length * word))

        def check(seen: Any) -> None:
            expected, report = self.twin(values, kind, word, uniform, to)
            if self.meaning(values, kind, to):
                assert (self.native._magnitude(seen[0], kind), seen[1]) == report
                assert out.tobytes() == expected.tobytes()

        arguments = {"loops": self.loops(), "out": out, "word_bytes": word}
        arguments |= {"values": self.buffer(values.tobytes()), "kind": kind, **to}
        return Call("to_words", arguments | {"rounding": self.buffer(uniform)}, check)

    def greatest(self) -> Call:
        values, kind = self.numbers(self.length())

        def check(found: int) -> None:
            with np.errstate(invalid="ignore"):
                most = np.abs(self.plain(values, kind).astype(np.float64)).max(initial=0.0)
            np.testing.assert_equal(self.native._magnitude(found, kind), float(most))

        arguments = {"loops": self.loops()}
        arguments |= {"values": self.buffer(values.tobytes()), "kind": kind}
        return Call("greatest", arguments, check)

    def faults(self) -> Call:
        def check(found: Any) -> None:
            assert found is arguments["on_purpose"]

        arguments = {"path": self.path(), "loops": self.loops()}
        arguments["on_purpose"] = self.random.random() < 0.5
        return Call("faults", arguments, check)

    def supported(self) -> Call:
        path = self.random.randint(-3, 5)

        def check(found: Any) -> None:
            assert found is (path in [self.native._INDEX[p] for p in self.native.available()[:-1]])

        return Call("supported", {"path": path}, check)

    def wrong(self, value: Any) -> Any:
        """Something else in an argument's place."""
        if isinstance(value, np.ndarray):
            data = value.tobytes()
            size = self.random.choice((0, 1, len(data) - 1, len(data) + 1, 2 * len(data), 4132))
            if self.random.random() < 0.2:
                return self.random.choice((data, None, 5, np.zeros(8, "<u4")[::2]))
            if self.random.random() < 0.3:  # as long, of any content
                return self.buffer(self.bytes(len(data)))
            return self.buffer((data + bytes(5000))[: max(size, 0)])
        if isinstance(value, float):
            return self.random.choice(WRONG_FLOATS)
        return self.random.choice(WRONG_NUMBERS)

    def one(self) -> str:
        """Make a call; returns what became of it."""
        names = ("expand", "expand", "encode", "encode", "to_words", "to_words", "fill", "greatest")
        name = self.random.choice((*names, "make_ready", "faults", "supported"))
        call: Call = getattr(self, name)()
        spoilt = self.random.random() < 0.4
        if spoilt:
            for place in self.random.choices(
                list(call.arguments), k=self.random.choice((1, 1, 2, 3))
            ):
                call.arguments[place] = self.wrong(call.arguments[place])
        try:
            result = getattr(self.kernel, call.function)(*call.arguments.values())
        except REFUSALS:
            assert spoilt, call
            return f"{call.function} refused"
        if not spoilt:
            call.check(result)
        return call.function if not spoilt else f"{call.function} spoilt, taken"


def large() -> None:
    """More elements than an int holds: lengths, products and borders near 2^31 and 2^32."""
    from secagg.config import MaskPrg
    from secagg.crypto.prg import read
    from secagg.crypto.secret import Secret
    from secagg.ring import native

    key, length, start = Secret(bytes(range(16))), 2**31 + 5, 3
    ready, out, path = native.ReadyKeys([key]), np.zeros(2**31 + 5, "<u2"), native._INDEX
    parts = [(at, min(at + 9000, length)) for at in (0, 2**30 - 4500, 2**31 - 4500, length - 9000)]

    def stream(first: int, stop: int) -> np.ndarray:
        data = read(MaskPrg.AES_128_CTR, key, 2 * (stop - first), 2 * (start + first))
        return np.frombuffer(data, "<u2")

    native.kernel.expand(path[native.chosen()], out, 2, 0, start, ready, b"\1")
    for first, stop in parts:
        np.testing.assert_array_equal(out[first:stop], stream(first, stop))
    native.kernel.expand(path[native.chosen()], out, 2, 0, start, ready, b"\0")
    assert native.kernel.greatest(0, out, 0) == 0
    out[-1] = 0x3C00  # one, in half precision
    assert native.kernel.greatest(0, out, 0) == 0x3C00
    values = np.zeros(length, np.uint16)
    values[[0, 2**31 - 1, 2**31, length - 1]] = 0x4000  # two
    arguments = (2, start, values, 0, 1.5, 8.0, 2.0**10, ready, ready, b"\1")
    seen = native.kernel.encode(path[native.chosen()], 0, out, *arguments)
    assert seen == (0x4000, 4)
    for first, stop in parts:
        expected = stream(first, stop) + np.where(values[first:stop], 12, 0).astype("<u2")
        np.testing.assert_array_equal(out[first:stop], expected)


def fuzz(seed: int, *, calls: int | None = None, seconds: float | None = None) -> Counter[str]:
    """Make calls with seeds from this one on, so many or for so long; tells what became of them."""
    outcomes: Counter[str] = Counter()
    until = None if seconds is None else time.monotonic() + seconds
    while calls is None or outcomes.total() < calls:
        if until is not None and time.monotonic() >= until:
            break
        number = seed + outcomes.total()
        try:
            outcomes[Fuzzer(number).one()] += 1
        except BaseException:
            print(f"seed {number}", file=sys.stderr)
            raise
    return outcomes


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.native")
    parser.add_argument("--kernel", type=PathOnDisk, help="build to call; else the installed one")
    parser.add_argument("--seed", type=int, default=time.time_ns() % 2**40)
    parser.add_argument("--seconds", type=float)
    parser.add_argument("--calls", type=int)
    parser.add_argument("--large", action="store_true", help="calls that take 9 GB of memory, too")
    arguments = parser.parse_args()
    if arguments.kernel is not None:
        use(arguments.kernel)
    print(f"from seed {arguments.seed} on", flush=True)
    if arguments.large:
        large()
        print("large: right", flush=True)
    outcomes = fuzz(arguments.seed, calls=arguments.calls, seconds=arguments.seconds)
    for outcome, count in sorted(outcomes.items()):
        print(f"{count:8d} {outcome}")


if __name__ == "__main__":
    main()
