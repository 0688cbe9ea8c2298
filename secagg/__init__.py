"""secagg: a coordinator that adds model updates which it cannot read.

The package is a pure core (``errors`` up to ``masking``) inside thin shells (``coordinator``, and
the sister package ``client_sdk``). Imports point one way; ``pyproject.toml`` holds the contract.
"""

__version__ = "0.1.0"
