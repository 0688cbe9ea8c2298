"""All modules that hold attacks, in alphabetical order; a new one is added here.

Not in the package's ``__init__``: the coordinator's process is to import as little before it starts
as ``secagg serve`` does, since gRPC reads its environment when it is first imported.
"""

# ruff: noqa: PLC0414 - imported for what they register

from threat_model.attacks import on_accidents as on_accidents
from threat_model.attacks import on_certificates as on_certificates
from threat_model.attacks import on_descriptor as on_descriptor
from threat_model.attacks import on_desk as on_desk
from threat_model.attacks import on_differencing as on_differencing
from threat_model.attacks import on_identity as on_identity
from threat_model.attacks import on_keys as on_keys
from threat_model.attacks import on_metadata as on_metadata
from threat_model.attacks import on_models as on_models
from threat_model.attacks import on_openings as on_openings
from threat_model.attacks import on_phases as on_phases
from threat_model.attacks import on_randomness as on_randomness
from threat_model.attacks import on_resources as on_resources
from threat_model.attacks import on_sealing as on_sealing
from threat_model.attacks import on_secrets as on_secrets
from threat_model.attacks import on_senders as on_senders
from threat_model.attacks import on_shares as on_shares
from threat_model.attacks import on_survivors as on_survivors
from threat_model.attacks import on_transport as on_transport
from threat_model.attacks import on_vectors as on_vectors
from threat_model.attacks.attack import ATTACKS

__all__ = ["ATTACKS"]
