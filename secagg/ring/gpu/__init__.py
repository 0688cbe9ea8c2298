"""Updates that already lie on a GPU: encoded and masked there, crossing to the host once, masked.

One pass over the device's memory for all keys: a program expands ChaCha20 (RFC 8439) for its tile
in registers, key after key, and adds it to words that it has loaded or just encoded. Bit-identical
with ``secagg.ring.expand`` and ``secagg.encoding.fixed`` for the same keys, so a cohort may mix
silos with and without a GPU; hence only where the session's ``mask_prg`` is ChaCha20, and in rings
Z_{2^w} (the prime ring redraws, which stays with the host). ``launch.obstacle`` says why not.

The one place of the core that imports torch and Triton, and only once it is asked for.
"""
