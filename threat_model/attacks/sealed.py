"""A session whose updates are sealed, at the shipped coordinator.

To a coordinator a sealed vector is residues mod q and a seed, and a key is a name; so it is here.
"""

from __future__ import annotations

import os
from typing import Any

from secagg.ckks import custody
from secagg.config import Protection, SiloId, silo_id
from secagg.masking import client, transcript
from secagg.masking.messages import Dealt
from secagg.masking.server import ClientMessage
from secagg.ring.expand import masked
from secagg.suite import KeyName
from secagg.wire import attempt as wire
from secagg.wire import custody as wire_custody
from secagg.wire._pb import service_pb2 as api
from threat_model.attacks.attack import Scene
from threat_model.attacks.evil_coordinator import TASK, make_session
from threat_model.attacks.evil_silo import Study
from threat_model.attacks.stage import Serving


class SealedStudy(Study):
    """A session under ckks+masked; every silo's update is zero.

    Attributes:
        key: the announced one.
        seeds: what each silo's next vector has for its seed; fresh ones if none.
    """

    key: KeyName

    def __init__(self, scene: Scene, server: Serving) -> None:
        super().__init__(scene, server, make_session(protection=Protection.CKKS_MASKED))
        self.seeds: dict[SiloId, bytes] = {}

    @property
    def opening_transcript(self) -> bytes:
        """What silos sign requests and checkpoints over."""
        return transcript.opening_transcript(self.session_hash, self.session_id)

    def wish(self, silo: str, named: str = "", epoch: int = 1) -> api.KeyRequest:
        """A silo's request for the key, signed; in another's name, if one is given."""
        key = self.silos[silo_id(silo)].member.identity
        me = custody.Custodian(
            silo_id(named or silo), key, {}, self.session_id, self.opening_transcript
        )
        _, request = custody.ask(me, epoch, os.urandom)
        return wire_custody.request_to_wire(request)

    def announce(self, maker: str = "a") -> None:
        """Have a key be made."""
        wish = self.wish(maker)
        assert self.call(maker, "AskKey", api.AskKeyRequest, request=wish).make
        self.key = KeyName(1, os.urandom(32))
        fields = {"key": wire.key_to_wire(self.key), "members": self.session.silos}
        self.call(maker, "AnnounceKey", api.AnnounceKeyRequest, **fields)

    def await_wishes(self, silo: str) -> None:
        """Wait until somebody asks for the key or a checkpoint."""
        key = wire.key_to_wire(self.key)
        self.call(silo, "AwaitKeyRequests", api.AwaitKeyRequestsRequest, key=key)

    def begin(self) -> None:
        """Announce a key, open the task and say Ready for everybody."""
        self.announce()
        self.open_task()
        self.ready()

    def ready(self, *silos: str) -> None:
        """Have silos say that they have an update under the key."""
        fields = {"task": TASK, "base": self.base, "key": wire.key_to_wire(self.key)}
        for name in silos or self.session.silos:
            self.call(name, "Ready", api.ReadyRequest, **fields)

    def answer(self, silo: str, event: Any) -> ClientMessage:
        """What a silo answers; not sent yet."""
        colluder = self.silos[silo_id(silo)]
        if not isinstance(event, Dealt):
            expected = client.Expected(TASK, 1, self.base, key=self.key)
            other: ClientMessage = colluder.answer(event, expected)
            return other
        seed = self.seeds.get(silo_id(silo)) or os.urandom(32)
        zeros = masked(self.ring, self.ring.zeros(self.codec.length))
        colluder.state, commit, colluder.upload = client.mask_input(
            colluder.state, event, zeros, seed
        )
        return commit
