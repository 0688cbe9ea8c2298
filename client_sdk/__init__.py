"""secagg's client SDK: a secure all-reduce for silos, and five lines around a trainer.

    import client_sdk

    with client_sdk.join("heart-disease") as session:
        for round in session.rounds(model):
            metrics = train(model, loader)
            round.submit(model, weight=len(loader.dataset), metrics=metrics)

Under it are ``session.mean(tensors, weight)`` and ``session.sum(tensors)``, which take NumPy arrays
and need no torch. No update that leaves this process can be read by anybody but as part of a sum
over at least t silos (the initial weights, which the first silo proposes, can). What the
coordinator says about itself, the cohort or the parameters is checked against the silo's own
certificate, manifest, policy file and ledger before a key is sent.
"""

from client_sdk.profile import Profile, load_profile
from client_sdk.session import Outcome, Session, join
from client_sdk.trainer import Round

__all__ = ["Outcome", "Profile", "Round", "Session", "join", "load_profile"]
