"""Homomorphic sealing of updates, and custody of the key that opens their sum."""
