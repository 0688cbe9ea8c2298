"""Silos that would keep a session from its key, at the coordinator's desk."""

from __future__ import annotations

import math
import os
from typing import Any

from secagg.ckks.custody import KeyBox, KeyRequest
from secagg.config import SiloId
from secagg.coordinator import keys
from secagg.coordinator.keys import MAKE_SECONDS, KeyDesk
from secagg.crypto.keys import KeyPair
from secagg.errors import QuotaExceeded
from secagg.suite import KeyName

from .harness import FOUR, A, B, C, D, nothing, refused, weakened

PATIENCE = 20.0
MEMBERS = {name: bytes([index]) * 32 for index, name in enumerate(FOUR)}
EPOCHS = 5


class Session:
    """A session's desk, a clock, and silos that do as they should but for one."""

    def __init__(self) -> None:
        self.desk, self.now = KeyDesk(PATIENCE), 0.0

    def wish(self, name: SiloId) -> KeyRequest:
        public = KeyPair.generate(os.urandom).public
        return KeyRequest(self.desk.epoch, name, public, bytes(64))

    def ask(self, request: KeyRequest) -> KeyBox | int | bool:
        return self.desk.ask(request, self.now)

    def announce(self, maker: SiloId) -> None:
        """The silo that is to make the key makes it."""
        key = KeyName(self.desk.epoch, os.urandom(32))
        assert self.desk.check_announcement(maker, key, MEMBERS, MEMBERS)
        self.desk.note(key.epoch, key, MEMBERS)

    def give(self, *senders: SiloId) -> None:
        """These silos answer whoever waits."""
        assert self.desk.key is not None
        for sender in senders:
            for request in self.desk.requests(sender, self.desk.key):
                self.desk.put(
                    KeyBox(
                        self.desk.epoch,
                        sender,
                        request.silo,
                        KeyPair.generate(os.urandom).public,
                        request.ephemeral,
                        self.desk.key.key_id,
                        bytes(48),
                        bytes(64),
                    )
                )

    def wait(self, seconds: float) -> None:
        """Time passes; an epoch that is worn ends, as the session ends it."""
        self.now += seconds
        if self.desk.worn(MEMBERS, self.now):
            self.desk.note(self.desk.epoch + 1, None, {})


def test_maker_that_gives_its_key_to_nobody() -> None:
    """A is always the first to ask, and answers no request, or makes no key at all."""

    def attack(*, announces: bool) -> list[SiloId]:
        """Who was asked to make the keys, until all have one."""
        session, makers = Session(), []
        for _ in range(EPOCHS):
            asked = {name: session.wish(name) for name in FOUR}
            maker = next(name for name in FOUR if session.ask(asked[name]) is True)
            makers.append(maker)
            if maker != A:
                session.announce(maker)
                others = [name for name in FOUR if name != maker]
                assert not any(session.ask(asked[name]) for name in others)
                session.give(maker)
                assert all(isinstance(session.ask(asked[name]), KeyBox) for name in others)
                break
            if announces:
                session.announce(A)
                assert not any(session.ask(asked[name]) for name in (B, C, D))
            session.wait(PATIENCE if announces else MAKE_SECONDS)
        return makers

    real_note, real_worn = KeyDesk.note, KeyDesk.worn

    def forgetful_note(self: KeyDesk, *given: Any) -> None:
        self._mute.clear()
        real_note(self, *given)

    def forgetful_worn(self: KeyDesk, *given: Any) -> bool:
        over = real_worn(self, *given)
        self._late.clear()
        return over

    with weakened(KeyDesk, "note", forgetful_note):
        assert attack(announces=True) == [A] * EPOCHS
    with weakened(KeyDesk, "worn", forgetful_worn):
        assert attack(announces=False) == [A] * EPOCHS
    assert attack(announces=True) == attack(announces=False) == [A, B]


def test_silo_that_asks_again_and_again() -> None:
    """D is away, and B asks again for a key that it has, until no silo's box is fresh to it: its
    last request is never answered, and the epoch would end.
    """

    def attack() -> int:
        session = Session()
        assert session.ask(session.wish(A)) is True
        session.announce(A)
        for _ in range(12):
            request = session.wish(B)
            session.ask(request)
            session.give(A, C)
            if session.ask(request) is False:
                session.wait(PATIENCE)
            if session.desk.key is None:
                break
        return session.desk.epoch

    with weakened(KeyDesk, "_use_spare", nothing):
        assert attack() == 2
    assert attack() == 1


def test_silo_that_asks_without_end() -> None:
    """Each request is work for all others, which agree on a key and seal a box."""

    def attack(often: int) -> int:
        session = Session()
        assert session.ask(session.wish(A)) is True
        session.announce(A)
        work = 0
        for _ in range(often):
            session.ask(session.wish(B))
            assert session.desk.key is not None
            work += len(session.desk.requests(C, session.desk.key))
        return work

    with weakened(keys, "MAX_REQUESTS", math.inf):
        assert attack(1500) == 1500
    with refused("key-requests", QuotaExceeded):
        attack(1500)
