"""Vectors over a ring, their running sum and their masks: Z_m with m = 2^16, 2^32 or 2^64, or Z_q.

A ring vector is a one-dimensional NumPy array of little-endian words: the same bytes in memory, on
disk and on the wire. In words of w bits addition wraps, which is the addition of Z_{2^w}. Residues
mod q, a prime just below 2^54, are added lazily in words of 64 bits and reduced once.
"""
