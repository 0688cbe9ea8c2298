"""Vectors over Z_m with m = 2^16, 2^32 or 2^64, their running sum and their masks.

A ring vector is a one-dimensional NumPy array of little-endian words of w bits: the same bytes in
memory, on disk and on the wire. Addition wraps, which is the ring's own addition.
"""
