"""Shamir sharing of 32-byte secrets over the prime p = 2^256 + 297.

p is the least prime above 2^256, so every 32-byte string is a field element and its own secret;
shares need 257 bits and travel as 33 bytes, big-endian. Coefficients are exactly uniform, the top
one included (a non-zero top coefficient would leak). Points are 1 … n by position: never from the
wire, so two holders can never be given one point, and nobody the point 0.

Source: Shamir, How to share a secret, CACM 22(11), 1979.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

from secagg.crypto.secret import Entropy, Secret
from secagg.errors import MalformedMessage

PRIME: Final = 2**256 + 297
SECRET_BYTES: Final = 32
SHARE_BYTES: Final = 33


def _uniform(entropy: Entropy) -> int:
    while True:
        value = int.from_bytes(entropy(SHARE_BYTES), "big") >> 7  # 257 bits
        if value < PRIME:
            return value


def split(secret: Secret, *, threshold: int, holders: int, entropy: Entropy) -> list[Secret]:
    """Share a secret so that any ``threshold`` of ``holders`` rebuild it and fewer learn nothing.

    Args:
        secret: 32 bytes.
        threshold: 1 ≤ threshold ≤ holders.
        holders: number of shares; the one at position i belongs to point i + 1.
        entropy: source of the polynomial's coefficients.

    Returns:
        33-byte shares in order of position.
    """
    if not 1 <= threshold <= holders or len(secret) != SECRET_BYTES:  # CHECK: split-threshold
        raise ValueError("need 1 ≤ threshold ≤ holders and a 32-byte secret")
    coefficients = [_uniform(entropy) for _ in range(threshold - 1)]
    constant = int.from_bytes(secret.reveal(), "big")
    shares = []
    for point in range(1, holders + 1):
        value = 0
        for coefficient in coefficients:
            value = (value + coefficient) * point % PRIME
        shares.append(Secret(((value + constant) % PRIME).to_bytes(SHARE_BYTES, "big")))
    return shares


def parse_share(data: bytes) -> Secret:
    """Return a share from the wire.

    Raises:
        MalformedMessage: not 33 bytes, or no field element.
    """
    if len(data) != SHARE_BYTES or int.from_bytes(data, "big") >= PRIME:  # CHECK: share-range
        raise MalformedMessage("share-encoding", "A secret share is no element of the field.")
    return Secret(data)


@dataclass(frozen=True, slots=True)
class Basis:
    """Lagrange coefficients at zero for one set of points; computed once, used for every secret."""

    points: tuple[int, ...]
    coefficients: tuple[int, ...]

    def combine(self, shares: Mapping[int, Secret]) -> Secret:
        """Rebuild a secret from the shares at this basis' points.

        Raises:
            MalformedMessage: the value is no 32-byte string, so the shares are of no one secret.
        """
        total = sum(
            coefficient * int.from_bytes(shares[point].reveal(), "big")
            for point, coefficient in zip(self.points, self.coefficients, strict=True)
        )
        try:
            return Secret((total % PRIME).to_bytes(SECRET_BYTES, "big"))
        except OverflowError:
            # CHECK: share-combination
            raise MalformedMessage("share-combination", "Shares rebuild no secret.") from None


@lru_cache(maxsize=64)
def basis(points: tuple[int, ...]) -> Basis:
    """Return the basis for distinct points in 1 … p − 1.

    Raises:
        ValueError: a point stands twice or is zero.
    """
    # CHECK: points-distinct
    if len(set(points)) != len(points) or any(not 0 < point < PRIME for point in points):
        raise ValueError("points must be distinct and non-zero")
    coefficients = []
    for i in points:
        numerator, denominator = 1, 1
        for j in points:
            if j != i:
                numerator = numerator * j % PRIME
                denominator = denominator * (j - i) % PRIME
        coefficients.append(numerator * pow(denominator, -1, PRIME) % PRIME)
    return Basis(points, tuple(coefficients))
