"""The kernel: ChaCha20 in registers, added to words or to what it has just encoded.

A program owns a tile of ``blocks`` blocks of keystream, one to a lane: the sixteen words of a
block's state are sixteen tensors over the lanes, so a round needs no word of another lane. So are
the sums of the keystreams, which stay where they are while key follows key and are brought into the
order of the stream once, at the end. Whether a mask is added or subtracted is a factor of ±1, so
that nothing branches on it.

A tile's place in the stream is absolute: what a vector does not reach of its first and its last
tile is neither read nor written.

Source: RFC 8439, sections 2.1, 2.3 and 2.4.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _rotate(x, places: tl.constexpr):
    return (x << places) | (x >> (32 - places))


@triton.jit
def _quarter_round(a, b, c, d):
    """RFC 8439 section 2.1."""
    a += b
    d = _rotate(d ^ a, 16)
    c += d
    b = _rotate(b ^ c, 12)
    a += b
    d = _rotate(d ^ a, 8)
    c += d
    b = _rotate(b ^ c, 7)
    return a, b, c, d


@triton.jit
def block(key, counter, n0, n1, n2):
    """RFC 8439 section 2.3, for many counters at once.

    Args:
        key: pointer to the key's eight words.
        counter: uint32 tensor of block numbers.
        n0: first word of the nonce; n1 and n2 follow.

    Returns:
        Sixteen tensors: the words of the blocks.
    """
    zero = tl.zeros_like(counter)
    k0, k1 = tl.load(key).to(tl.uint32) + zero, tl.load(key + 1).to(tl.uint32) + zero
    k2, k3 = tl.load(key + 2).to(tl.uint32) + zero, tl.load(key + 3).to(tl.uint32) + zero
    k4, k5 = tl.load(key + 4).to(tl.uint32) + zero, tl.load(key + 5).to(tl.uint32) + zero
    k6, k7 = tl.load(key + 6).to(tl.uint32) + zero, tl.load(key + 7).to(tl.uint32) + zero
    x0, x1, x2, x3 = zero + 0x61707865, zero + 0x3320646E, zero + 0x79622D32, zero + 0x6B206574
    x4, x5, x6, x7 = k0, k1, k2, k3
    x8, x9, x10, x11 = k4, k5, k6, k7
    x12, x13, x14, x15 = counter, zero + n0, zero + n1, zero + n2
    for _ in range(10):
        x0, x4, x8, x12 = _quarter_round(x0, x4, x8, x12)
        x1, x5, x9, x13 = _quarter_round(x1, x5, x9, x13)
        x2, x6, x10, x14 = _quarter_round(x2, x6, x10, x14)
        x3, x7, x11, x15 = _quarter_round(x3, x7, x11, x15)
        x0, x5, x10, x15 = _quarter_round(x0, x5, x10, x15)
        x1, x6, x11, x12 = _quarter_round(x1, x6, x11, x12)
        x2, x7, x8, x13 = _quarter_round(x2, x7, x8, x13)
        x3, x4, x9, x14 = _quarter_round(x3, x4, x9, x14)
    x0, x1, x2, x3 = x0 + 0x61707865, x1 + 0x3320646E, x2 + 0x79622D32, x3 + 0x6B206574
    x4, x5, x6, x7 = x4 + k0, x5 + k1, x6 + k2, x7 + k3
    x8, x9, x10, x11 = x8 + k4, x9 + k5, x10 + k6, x11 + k7
    x12, x13, x14, x15 = x12 + counter, x13 + n0, x14 + n1, x15 + n2
    return x0, x1, x2, x3, x4, x5, x6, x7, x8, x9, x10, x11, x12, x13, x14, x15


@triton.jit
def _add(a, b, x, y, sign, bits: tl.constexpr):
    """Add two words of a keystream, times ±1, to two of a sum: one word of 64 bits, or each alone.

    Words of 16 bits are added two at a time, without the carry between them; −x is added as the
    complement of what x makes of the complement.
    """
    if bits == 64:
        pair = a.to(tl.uint64) | (b.to(tl.uint64) << 32)
        pair += (x.to(tl.uint64) | (y.to(tl.uint64) << 32)) * sign.to(tl.uint64)
        a, b = pair.to(tl.uint32), (pair >> 32).to(tl.uint32)
    elif bits == 32:
        a, b = a + x * sign.to(tl.uint32), b + y * sign.to(tl.uint32)
    else:
        flip = (sign >> 31).to(tl.uint32)
        a, b = _add_halves(a ^ flip, x) ^ flip, _add_halves(b ^ flip, y) ^ flip
    return a, b


@triton.jit
def _add_halves(a, x):
    return ((a & 0x7FFF7FFF) + (x & 0x7FFF7FFF)) ^ ((a ^ x) & 0x80008000)


@triton.jit
def _line(x0, x1, x2, x3, x4, x5, x6, x7, x8, x9, x10, x11, x12, x13, x14, x15):
    """The words of blocks in the order of the stream, those at even and those at odd places."""
    even = tl.interleave(tl.interleave(x0, x8), tl.interleave(x4, x12))
    even = tl.interleave(even, tl.interleave(tl.interleave(x2, x10), tl.interleave(x6, x14)))
    odd = tl.interleave(tl.interleave(x1, x9), tl.interleave(x5, x13))
    odd = tl.interleave(odd, tl.interleave(tl.interleave(x3, x11), tl.interleave(x7, x15)))
    return even, odd


@triton.jit
def _sum(keys, signs, count, counter, bits: tl.constexpr):
    """Σ ± the keystreams of ``count`` keys, as words of ``bits`` bits of their first streams.

    Returns:
        uint64 for words of 64 bits, else uint32; above a word of 16 bits stands anything.
    """
    zero = tl.zeros_like(counter)
    s0, s1, s2, s3, s4, s5, s6, s7 = zero, zero, zero, zero, zero, zero, zero, zero
    s8, s9, s10, s11, s12, s13, s14, s15 = zero, zero, zero, zero, zero, zero, zero, zero
    for i in range(count):
        x0, x1, x2, x3, x4, x5, x6, x7, x8, x9, x10, x11, x12, x13, x14, x15 = block(
            keys + 8 * i, counter, 0, 0, 0
        )
        sign = tl.load(signs + i)
        s0, s1 = _add(s0, s1, x0, x1, sign, bits)
        s2, s3 = _add(s2, s3, x2, x3, sign, bits)
        s4, s5 = _add(s4, s5, x4, x5, sign, bits)
        s6, s7 = _add(s6, s7, x6, x7, sign, bits)
        s8, s9 = _add(s8, s9, x8, x9, sign, bits)
        s10, s11 = _add(s10, s11, x10, x11, sign, bits)
        s12, s13 = _add(s12, s13, x12, x13, sign, bits)
        s14, s15 = _add(s14, s15, x14, x15, sign, bits)
    even, odd = _line(s0, s1, s2, s3, s4, s5, s6, s7, s8, s9, s10, s11, s12, s13, s14, s15)
    if bits == 64:
        words = even.to(tl.uint64) | (odd.to(tl.uint64) << 32)
    elif bits == 32:
        words = tl.interleave(even, odd)
    else:
        pairs = tl.interleave(even, odd)
        words = tl.interleave(pairs, pairs >> 16)
    return words


@triton.jit
def _counters(tile, blocks: tl.constexpr):
    return (tile * blocks + tl.arange(0, blocks)).to(tl.uint32)


@triton.jit
def _encode(x, rounding, factor, limit, tile, size: tl.constexpr):
    """Stochastic rounding: ⌊x · factor + u⌋ in ±limit, u in [0, 1) of 32 bits, as int64.

    x · factor is cut to units of 2^-32 before anything is taken from it, so that its fraction and u
    are added without any rounding. No product may fuse with a subtraction that follows it.
    """
    x0, x1, x2, x3, x4, x5, x6, x7, x8, x9, x10, x11, x12, x13, x14, x15 = block(
        rounding, _counters(tile, size // 16), 0, 0, 0
    )
    even, odd = _line(x0, x1, x2, x3, x4, x5, x6, x7, x8, x9, x10, x11, x12, x13, x14, x15)
    uniform = tl.interleave(even, odd).to(tl.float64)
    fine = tl.floor(x * (factor * 4294967296.0))
    whole = tl.floor(fine * 2.3283064365386963e-10)
    fraction = fine - whole * 4294967296.0
    rounded = whole + tl.floor((fraction + uniform) * 2.3283064365386963e-10)
    return tl.minimum(tl.maximum(rounded, -limit), limit).to(tl.int64)


@triton.jit(do_not_specialize=["first", "length", "count"])
def mask_tiles(
    words,
    values,
    first,
    length,
    keys,
    signs,
    count,
    rounding,
    numbers,
    clipped,
    bits: tl.constexpr,
    encode: tl.constexpr,
    clip: tl.constexpr,
    blocks: tl.constexpr,
):
    """Mask a range of a vector's words, or encode it first.

    Args:
        words: the range's words, signed, of ``bits`` bits.
        values: the floats to be encoded into them; not read unless ``encode``.
        first: coordinate of the range's first word in the vector.
        length: words of the range.
        keys: (count, 8) int32.
        signs: (count,) int32, 1 or −1.
        count: masks.
        rounding: the eight words of the rounding bits' key.
        numbers: float64: factor, limit, bound of an element.
        clipped: int64, added to: how many elements were beyond the bound; only where ``clip``.
        bits: 16, 32 or 64.
        encode: whether to encode.
        clip: whether to clip elements.
        blocks: blocks of keystream to a program.
    """
    size: tl.constexpr = blocks * 512 // bits
    tile = first.to(tl.int64) // size + tl.program_id(0)
    start = tile * size - first
    offset = tl.arange(0, size)
    inside = (offset >= -start) & (offset < length - start)
    if encode:
        x = tl.load(values + start + offset, mask=inside, other=0).to(tl.float64)
        if clip:
            bound = tl.load(numbers + 2)
            tl.atomic_add(clipped, tl.sum((tl.abs(x) > bound).to(tl.int64)))
            x = tl.minimum(tl.maximum(x, -bound), bound)
        plain = _encode(x, rounding, tl.load(numbers), tl.load(numbers + 1), tile, size)
    mask = _sum(keys, signs, count, _counters(tile, blocks), bits)
    if not encode:
        plain = tl.load(words + start + offset, mask=inside, other=0)
    total = plain.to(mask.dtype) + mask
    tl.store(words + start + offset, total.to(words.dtype.element_ty), mask=inside)
