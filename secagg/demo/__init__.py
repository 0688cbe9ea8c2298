"""A federation on one machine: real silos in separate processes, public medical data.

``data`` loads two public data sets cut over four silos, and holds the arithmetic of their shared
standardisation; ``training`` holds the model, the local training and the baselines. Both are plain
machine learning: nothing in them knows of keys, masks or messages. They need the extra ``demo``.

Randomness here is statistical: it splits rows and orders batches by a public seed, so that a run
can be repeated. No key, mask or share is ever drawn from it.
"""
