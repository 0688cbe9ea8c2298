"""Primitives with their safety argument; no protocol words in here.

Everything wraps ``cryptography`` (OpenSSL), but for Shamir's scheme, which is ours. Randomness is
always an argument (``Entropy``), so that a simulation can replay and a shell passes ``os.urandom``.
"""
