"""Shamir's scheme against a slow twin that shares no code or method with it."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from secagg.crypto import shamir
from secagg.crypto.secret import Secret
from secagg.crypto.shamir import PRIME, SHARE_BYTES, basis, parse_share, split
from secagg.errors import MalformedMessage

P = 2**256 + 297
SECRET = st.binary(min_size=32, max_size=32)
ELEMENT = st.one_of(st.integers(0, P - 1), st.sampled_from([0, 1, P - 1, 2**256]))


def evaluate(polynomial: list[int], x: int) -> int:
    """Value at x of a polynomial with the constant first, term by term."""
    return sum(coefficient * x**power for power, coefficient in enumerate(polynomial)) % P


def polynomial_through(points: list[tuple[int, int]]) -> list[int]:
    """The polynomial through points, by Gaussian elimination of the Vandermonde system."""
    rows = [[x**power % P for power in range(len(points))] + [y] for x, y in points]
    for i in range(len(rows)):
        pivot = next(r for r in range(i, len(rows)) if rows[r][i])
        rows[i], rows[pivot] = rows[pivot], rows[i]
        inverse = pow(rows[i][i], P - 2, P)
        rows[i] = [value * inverse % P for value in rows[i]]
        for r in range(len(rows)):
            if r != i and rows[r][i]:
                factor = rows[r][i]
                rows[r] = [(a - factor * b) % P for a, b in zip(rows[r], rows[i], strict=True)]
    return [row[-1] for row in rows]


def draws(values: Iterable[int]) -> Callable[[int], bytes]:
    """Entropy whose 257-bit draws are these; the 7 bits below are noise, to be thrown away."""
    left = iter(values)

    def entropy(size: int) -> bytes:
        assert size == 33
        return (next(left) << 7 | 0x55).to_bytes(33, "big")

    return entropy


def spent() -> Callable[[int], bytes]:
    return draws([])


def value(share: Secret) -> int:
    return int.from_bytes(share.reveal(), "big")


@st.composite
def sharings(draw: st.DrawFn, least: int = 1) -> tuple[bytes, list[int], int]:
    """A secret, t − 1 coefficients in the order drawn, and n."""
    threshold = draw(st.integers(least, 7))
    coefficients = draw(st.lists(ELEMENT, min_size=threshold - 1, max_size=threshold - 1))
    return draw(SECRET), coefficients, draw(st.integers(threshold, 9))


def share_out(secret: bytes, coefficients: list[int], holders: int) -> list[Secret]:
    return split(
        Secret(secret),
        threshold=len(coefficients) + 1,
        holders=holders,
        entropy=draws(coefficients),
    )


# --- the field -----------------------------------------------------------------------------------


def composite(n: int) -> bool:
    """Miller–Rabin: True is a proof, False is wrong with probability under 4^-64."""
    if n % 2 == 0:
        return True
    odd, twos = n - 1, 0
    while odd % 2 == 0:
        odd, twos = odd // 2, twos + 1
    source = random.Random(n)

    def witness(a: int) -> bool:
        x = pow(a, odd, n)
        return x not in (1, n - 1) and all(pow(x, 2**i, n) != n - 1 for i in range(1, twos))

    return any(witness(source.randrange(2, n - 1)) for _ in range(64))


def test_the_modulus_is_the_least_prime_above_2_to_the_256() -> None:
    assert PRIME == P == 2**256 + 297
    assert not composite(PRIME)
    assert all(composite(n) for n in range(2**256 + 1, PRIME))
    assert not composite(2**255 - 19)  # the test itself tells primes
    assert composite((2**61 - 1) * (2**89 - 1))


# --- sharing and rebuilding -----------------------------------------------------------------------


@given(sharings())
@settings(deadline=None)
def test_shares_are_the_polynomial_s_values(sharing: tuple[bytes, list[int], int]) -> None:
    secret, coefficients, holders = sharing
    polynomial = [int.from_bytes(secret, "big"), *reversed(coefficients)]
    shares = share_out(secret, coefficients, holders)
    assert [value(share) for share in shares] == [
        evaluate(polynomial, point) for point in range(1, holders + 1)
    ]
    assert all(len(share) == SHARE_BYTES == 33 for share in shares)
    assert all(parse_share(share.reveal()) == share for share in shares)


@given(sharings(), st.data())
@settings(deadline=None)
def test_any_t_or_more_rebuild_the_secret(
    sharing: tuple[bytes, list[int], int], data: st.DataObject
) -> None:
    secret, coefficients, holders = sharing
    shares = dict(enumerate(share_out(secret, coefficients, holders), start=1))
    order = data.draw(st.permutations(list(shares)))
    points = tuple(order[: data.draw(st.integers(len(coefficients) + 1, holders))])
    assert basis(points).combine(shares) == Secret(secret)
    assert basis(points).combine({point: shares[point] for point in points}) == Secret(secret)
    slow = polynomial_through([(point, value(shares[point])) for point in points])
    assert slow[0] == int.from_bytes(secret, "big")


@pytest.mark.parametrize(("threshold", "holders"), [(1, 1), (1, 3), (2, 3), (3, 5), (5, 5)])
def test_every_subset_of_t(threshold: int, holders: int) -> None:
    secret = Secret(bytes(range(32)))
    entropy = random.Random(1).randbytes
    shares = split(secret, threshold=threshold, holders=holders, entropy=entropy)
    at = dict(enumerate(shares, start=1))
    for points in itertools.combinations(at, threshold):
        assert basis(points).combine(at) == secret


@given(
    st.lists(st.integers(1, P - 1), min_size=1, max_size=6, unique=True),
    st.lists(ELEMENT, min_size=6, max_size=6),
)
@settings(deadline=None)
def test_combination_equals_interpolation_by_elimination(xs: list[int], ys: list[int]) -> None:
    shares = {x: Secret(y.to_bytes(33, "big")) for x, y in zip(xs, ys, strict=False)}
    at_zero = polynomial_through(list(zip(xs, ys, strict=False)))[0]
    if at_zero < 2**256:
        assert value(basis(tuple(xs)).combine(shares)) == at_zero
    else:
        with pytest.raises(MalformedMessage):
            basis(tuple(xs)).combine(shares)


@pytest.mark.parametrize("constant", [2**256, 2**256 + 5, P - 1])
def test_bad_shares_that_are_of_no_32_byte_secret(constant: int) -> None:
    shares = {x: Secret(evaluate([constant, 7, 11], x).to_bytes(33, "big")) for x in (1, 2, 5)}
    with pytest.raises(MalformedMessage) as refused:
        basis((1, 2, 5)).combine(shares)
    assert refused.value.code == "share-combination"


@pytest.mark.parametrize("secret", [bytes(32), b"\xff" * 32, bytes(31) + b"\1", b"\1" + bytes(31)])
def test_extreme_secrets(secret: bytes) -> None:
    shares = dict(enumerate(share_out(secret, [P - 1, P - 1], 4), start=1))
    assert basis((2, 3, 4)).combine(shares) == Secret(secret)


def test_an_altered_share_gives_another_secret() -> None:
    shares = dict(enumerate(share_out(bytes(32), [5, 6], 3), start=1))
    shares[1] = Secret((value(shares[1]) + 1).to_bytes(33, "big"))
    assert value(basis((1, 2, 3)).combine(shares)) == 3


# --- secrecy --------------------------------------------------------------------------------------


@given(sharings(least=2), SECRET, st.data())
@settings(deadline=None)
def test_t_minus_1_shares_fit_every_secret(
    sharing: tuple[bytes, list[int], int], other: bytes, data: st.DataObject
) -> None:
    """Any other secret has a polynomial that deals the same t − 1 shares.

    And exactly one, which the entropy yields with the same probability as the true one: so the
    shares say nothing.
    """
    secret, coefficients, holders = sharing
    shares = share_out(secret, coefficients, holders)
    seen = data.draw(st.permutations(range(1, holders + 1)))[: len(coefficients)]
    other_polynomial = polynomial_through(
        [(0, int.from_bytes(other, "big")), *((point, value(shares[point - 1])) for point in seen)]
    )
    others = share_out(other, other_polynomial[:0:-1], holders)
    assert [others[point - 1] for point in seen] == [shares[point - 1] for point in seen]


def test_the_top_coefficient_may_be_zero() -> None:
    """Were it never zero, t − 1 shares would rule out the secret that they interpolate to."""
    shares = share_out(b"\7" * 32, [0, 0], 4)
    assert [share.reveal() for share in shares] == [b"\0" + b"\7" * 32] * 4
    straight = share_out(bytes(32), [0, 1], 4)
    assert [value(share) for share in straight] == [1, 2, 3, 4]


# --- uniform coefficients -------------------------------------------------------------------------


def one_coefficient(*drawn: int) -> int:
    """The coefficient that a line through the zero secret gets from these draws."""
    source = iter(drawn)
    (share,) = split(Secret(bytes(32)), threshold=1, holders=1, entropy=spent())
    assert value(share) == 0
    first, second = split(Secret(bytes(32)), threshold=2, holders=2, entropy=draws(source))
    assert value(second) == 2 * value(first) % P
    assert next(source, None) is None, "not all entropy was consumed"
    return value(first)


@pytest.mark.parametrize("refused", [P, P + 1, 2**257 - 1])
def test_a_draw_at_or_above_the_prime_is_drawn_again(refused: int) -> None:
    assert one_coefficient(refused, 5) == 5
    assert one_coefficient(refused, refused, P - 1) == P - 1


@given(st.lists(st.integers(0, 2**257 - 1), max_size=20), ELEMENT)
@settings(deadline=None)
def test_a_draw_below_the_prime_is_the_coefficient(before: list[int], last: int) -> None:
    """Each element comes from exactly one 257-bit draw: uniform."""
    sequence = [draw for draw in before if draw >= P] + [last]
    assert one_coefficient(*sequence) == last


@pytest.mark.parametrize("edge", [0, 1, 2**256 - 1, 2**256, P - 1])
def test_the_edges_of_the_field_are_reached(edge: int) -> None:
    assert one_coefficient(edge) == edge


@given(st.binary(min_size=33, max_size=33))
@settings(deadline=None)
def test_the_draw_is_the_top_257_bits(raw: bytes) -> None:
    feed = iter([raw, bytes(33)])
    got = shamir._uniform(lambda size: next(feed)[:size])
    top = int.from_bytes(raw, "big") // 128
    assert got == (top if top < P else 0)


@pytest.mark.parametrize("threshold", [1, 2, 5])
def test_entropy_is_33_bytes_per_coefficient_and_none_for_the_secret(threshold: int) -> None:
    asked: list[int] = []

    def entropy(size: int) -> bytes:
        asked.append(size)
        return bytes(size)

    split(Secret(bytes(32)), threshold=threshold, holders=7, entropy=entropy)
    assert asked == [33] * (threshold - 1)


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "threshold", "holders"),
    [(32, 0, 3), (32, -1, 3), (32, 4, 3), (32, 1, 0), (31, 2, 3), (33, 2, 3), (0, 2, 3)],
)
def test_bad_splits(size: int, threshold: int, holders: int) -> None:
    with pytest.raises(ValueError, match="threshold"):
        split(Secret(bytes(size)), threshold=threshold, holders=holders, entropy=spent())


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"", id="empty"),
        pytest.param(bytes(32), id="short"),
        pytest.param(bytes(34), id="long"),
        pytest.param(P.to_bytes(33, "big"), id="p"),
        pytest.param((P + 1).to_bytes(33, "big"), id="alias of 1"),
        pytest.param(b"\xff" * 33, id="all ones"),
    ],
)
def test_bad_shares(data: bytes) -> None:
    with pytest.raises(MalformedMessage) as refused:
        parse_share(data)
    assert refused.value.code == "share-encoding"


@given(
    st.one_of(
        st.binary(max_size=40), st.integers(P - 9, P + 9).map(lambda v: v.to_bytes(33, "big"))
    )
)
@settings(deadline=None)
def test_any_bytes_are_a_share_or_malformed(data: bytes) -> None:
    if len(data) == 33 and int.from_bytes(data, "big") < P:
        assert parse_share(data).reveal() == data
    else:
        with pytest.raises(MalformedMessage):
            parse_share(data)


@pytest.mark.parametrize(
    "points", [(1, 1), (1, 2, 1), (0,), (0, 1), (1, -1), (P,), (1, P + 1)], ids=str
)
def test_bad_points(points: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="points"):
        basis(points)


def test_a_missing_share_is_no_zero() -> None:
    with pytest.raises(KeyError):
        basis((1, 2)).combine({1: Secret(bytes(33))})
