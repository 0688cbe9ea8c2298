"""The desk for keys: who makes one, who gets it, and when another is due; a box is just bytes."""

from __future__ import annotations

import asyncio
import math
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractContextManager, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from secagg.ckks.custody import KeyBox, KeyRequest
from secagg.config import Phase, Protection, SiloId
from secagg.coordinator import driver as driver_module
from secagg.coordinator import keys as desk_module
from secagg.coordinator.driver import Driver
from secagg.coordinator.keys import MAKE_SECONDS, MAX_REQUESTS, KeyDesk, Wish
from secagg.coordinator.state import State, Step
from secagg.crypto.keys import KeyPair
from secagg.crypto.sign import IdentityKey
from secagg.errors import (
    Conflict,
    FaultyClient,
    QuotaExceeded,
    RoleRefused,
    SecaggError,
    SessionEnded,
    StaleKey,
)
from secagg.masking.messages import Result
from secagg.suite import SUMS_PER_KEY, KeyName

from .play import TASK, World

A, B, C, D = (SiloId(name) for name in "abcd")


@pytest.fixture
def world(tmp_path: Path) -> World:
    """A session of four silos under ckks+masked, without a key yet."""
    return World(tmp_path / "session", protection=Protection.CKKS_MASKED)


@pytest.fixture
def keyed(world: World) -> World:
    """The same, with a's key announced."""
    world.make_key()
    return world


def refused(kind: type[SecaggError], code: str) -> AbstractContextManager[Any]:
    return pytest.raises(kind, check=lambda e: type(e) is kind and e.code == code)


def box(sender: str, request: KeyRequest, key: KeyName, sealed: bytes = bytes(48)) -> KeyBox:
    """What a silo leaves for another; the coordinator cannot tell what is in it."""
    public = KeyPair.generate(os.urandom).public
    return KeyBox(
        key.epoch,
        SiloId(sender),
        request.silo,
        public,
        request.ephemeral,
        key.key_id,
        sealed,
        bytes(64),
    )


def give(world: World, sender: str, request: KeyRequest, sealed: bytes = bytes(48)) -> KeyBox:
    """Leave a box of the current key."""
    assert world.key is not None
    made = box(sender, request, world.key, sealed)
    world.session.send_key_box(SiloId(sender), made)
    return made


def waiting(world: World, silo: str = "a") -> list[KeyRequest]:
    assert world.key is not None
    return world.session.key_requests(SiloId(silo), world.key)


def epoch(world: World) -> int:
    assert world.session.keys is not None
    return world.session.keys.epoch


def enrol(world: World, name: str) -> None:
    """The authority certifies a silo, or an old one's new identity."""
    world.keys[name] = IdentityKey.generate(os.urandom)
    silos = dict(sorted({**world.manifest.silos, SiloId(name): world.keys[name].public}.items()))
    world.manifest = replace(world.manifest, version=world.manifest.version + 1, silos=silos)


# Who makes the key.


def test_the_first_to_ask_makes_the_key(world: World) -> None:
    assert world.ask("b") is True
    assert world.ask("a") is False
    assert world.ask("b") is True  # asked again: the answer was lost
    assert world.ask("c") is False


def test_a_late_maker_loses_its_turn(world: World) -> None:
    world.ask("b")
    assert world.session.due() == world.now + MAKE_SECONDS
    world.now += MAKE_SECONDS - 1
    assert world.tick() == 0
    assert world.ask("a") is False
    world.now += 1
    assert world.tick() == 1  # those who wait are woken: one of them makes it now
    assert world.ask("b") is False
    assert world.ask("a") is True
    with refused(FaultyClient, "key-maker"):
        world.session.announce_key(B, KeyName(1, bytes(32)), (A, B, C, D))
    assert epoch(world) == 1


def test_when_all_were_late_all_may_again(world: World) -> None:
    for name in "abcd":
        assert world.ask(name) is True
        world.now += MAKE_SECONDS
        world.tick()
        assert world.ask(name) is (name == "d")
    world.make_key("d")


def test_a_maker_that_is_revoked_is_not_waited_for(world: World) -> None:
    assert world.ask("b") is True
    world.without("b")
    assert world.tick() == 1
    assert world.ask("a") is True


def test_when_those_are_left_that_were_late_all_may_again(world: World) -> None:
    for name in "abc":
        world.ask(name)
        world.now += MAKE_SECONDS
        world.tick()
    assert world.ask("a") is False
    world.without("d")
    assert world.tick() == 1
    assert world.ask("a") is True


def test_a_maker_that_gives_its_key_to_nobody_is_the_last_to_make_the_next(world: World) -> None:
    """However quick it is to ask: one silo cannot hold up a session for ever."""
    for maker in "abcd":
        for name in "abcd"[: "abcd".index(maker)]:
            assert world.ask(name) is False
        world.make_key(maker)
        world.ask("d" if maker != "d" else "a")
        world.now += world.config.phase_deadline
        assert world.tick()
        assert world.key is None
    assert world.tick() == 0  # all have been mute: all may again
    world.make_key("a")


def test_a_maker_whose_epoch_ended_otherwise_may_make_the_next(world: World) -> None:
    world.make_key("a")
    world.without("d")
    world.tick()
    world.make_key("a")


def test_a_maker_whose_key_two_silos_had_no_use_for_goes_last(world: World) -> None:
    """It could make a key for others than the session's silos again and again."""
    world.make_key("a")
    for name in "bc":
        world.ask(name, world.wish(name, 2))
    assert world.tick()
    assert world.ask("a") is False
    assert world.ask("b") is True


def test_who_was_late_twice_waits_twice(world: World) -> None:
    """One silo that is alone for a while is not first for ever."""
    for _ in range(2):
        world.ask("b")
        world.now += world.config.phase_deadline
        world.tick()
        assert world.ask("b") is True
        world.now += MAKE_SECONDS
        world.tick()
        assert world.ask("b") is False
    assert world.ask("a") is True


def test_a_late_maker_may_make_the_next_epoch_s_key(world: World) -> None:
    world.ask("b")
    world.now += MAKE_SECONDS
    world.tick()
    world.make_key("a")
    world.without("d")
    world.tick()
    assert world.ask("b") is True


# Announcements.


def test_an_announcement_stands(world: World) -> None:
    key = world.make_key("c")
    rows = len(world.journal.load()[world.session_id])
    for silo in (C, A):  # again, or by somebody who says the same: acknowledged
        world.session.announce_key(silo, key, (A, B, C, D))
    for silo in (C, A):
        with refused(Conflict, "key-announced"):
            world.session.announce_key(silo, KeyName(1, bytes(32)), (A, B, C, D))
    assert world.key == key
    assert len(world.journal.load()[world.session_id]) == rows
    assert world.session.keys.members == dict(world.manifest.silos)


def test_nobody_was_asked(world: World) -> None:
    with refused(FaultyClient, "key-maker"):
        world.session.announce_key(A, KeyName(1, bytes(32)), (A, B, C, D))
    world.ask("a")
    with refused(FaultyClient, "key-maker"):
        world.session.announce_key(B, KeyName(1, bytes(32)), (A, B, C, D))
    assert world.key is None


@pytest.mark.parametrize("members", ["", "abc", "abcde", "bcd", "abce"])
def test_the_key_is_for_the_session_s_silos(world: World, members: str) -> None:
    world.ask("a")
    with refused(FaultyClient, "key-members"):
        world.session.announce_key(A, KeyName(1, bytes(32)), tuple(map(SiloId, members)))
    assert world.key is None
    world.make_key("a")


def test_the_key_is_for_those_of_the_manifest(world: World) -> None:
    world.without("d")
    world.ask("a")
    with refused(FaultyClient, "key-members"):
        world.session.announce_key(A, KeyName(1, bytes(32)), (A, B, C, D))
    world.session.announce_key(A, KeyName(1, bytes(32)), (A, B, C))
    assert set(world.session.keys.members) == {A, B, C}
    assert world.tick() == 0


@pytest.mark.parametrize("number", [2, 2**32 - 1])
def test_an_announcement_of_another_epoch(world: World, number: int) -> None:
    world.ask("a")
    with refused(StaleKey, "key-stale"):
        world.session.announce_key(A, KeyName(number, bytes(32)), (A, B, C, D))
    world.make_key("a")
    with refused(StaleKey, "key-stale"):
        world.session.announce_key(A, KeyName(number, bytes(32)), (A, B, C, D))


def test_an_announcement_of_an_epoch_that_is_over(keyed: World) -> None:
    old = keyed.key
    keyed.without("d")
    keyed.tick()
    keyed.ask("a")
    with refused(StaleKey, "key-stale"):
        keyed.session.announce_key(A, old, (A, B, C))


# Requests and boxes.


def test_a_request_waits_for_those_who_have_the_key(keyed: World) -> None:
    request = keyed.wish("b")
    assert keyed.ask("b", request) is False
    assert keyed.ask("b", request) is False  # one long poll after the other
    assert waiting(keyed) == waiting(keyed, "c") == [request]
    assert waiting(keyed, "b") == []  # not for itself
    made = give(keyed, "a", request)
    assert waiting(keyed) == []
    for _ in range(2):  # also where the answer was lost
        assert keyed.ask("b", request) == made


def test_the_first_box_counts(keyed: World) -> None:
    request = keyed.wish("b")
    keyed.ask("b", request)
    first = give(keyed, "c", request)
    give(keyed, "a", request)
    give(keyed, "c", request, bytes(64))
    assert keyed.ask("b", request) == first


def test_boxes_that_nobody_asked_for(keyed: World) -> None:
    old, new = keyed.wish("b"), keyed.wish("b")
    give(keyed, "a", old)
    keyed.ask("b", old)
    keyed.ask("b", new)
    give(keyed, "a", old)  # for a request that a newer one has replaced
    give(keyed, "a", replace(new, silo=C))
    assert waiting(keyed) == [new]
    assert keyed.ask("b", new) is False
    assert keyed.ask("c") is False
    assert keyed.session.keys._boxes == {}


def test_boxes_of_another_key(keyed: World) -> None:
    request = keyed.wish("b")
    keyed.ask("b", request)
    for key in (KeyName(1, bytes(32)), replace(keyed.key, epoch=2)):
        with refused(StaleKey, "key-stale"):
            keyed.session.send_key_box(A, box("a", request, key))
        with refused(StaleKey, "key-stale"):
            keyed.session.key_requests(A, key)
    assert keyed.ask("b", request) is False


def test_who_asks_again_gets_another_s_box(keyed: World) -> None:
    """The first was no use, or what was in it is lost."""
    for turn in range(2):  # when all others have had their turn, it begins anew
        for left in ("acd", "cd", "d"):
            request = keyed.wish("b")
            assert keyed.ask("b", request) is False  # the older box is not for this request
            for name in sorted(set("acd") - set(left)):
                give(keyed, name, request)
                assert keyed.ask("b", request) is False
                assert waiting(keyed, "d") == [request]
            made = give(keyed, left[0], request, bytes([turn]) * 48)
            assert keyed.ask("b", request) == made


def test_asking_often_is_no_way_to_end_an_epoch(keyed: World) -> None:
    """d is away, and a and c have had their turns."""
    for turn in range(3):
        for sender in "ac":
            request = keyed.wish("b")
            keyed.ask("b", request)
            made = give(keyed, sender, request)
            assert keyed.ask("b", request) == made
        request = keyed.wish("b")
        keyed.ask("b", request)
        again = give(keyed, "c", request, bytes([turn]) * 48)
        give(keyed, "a", request)
        keyed.tick()
        keyed.now += keyed.config.phase_deadline - 1
        assert (keyed.tick(), keyed.ask("b", request)) == (0, False)
        keyed.now += 1
        assert keyed.tick() == 1  # b is woken
        assert keyed.ask("b", request) == again
        assert (epoch(keyed), keyed.session.due()) == (1, math.inf)


def test_one_silo_s_boxes_keep_an_epoch(keyed: World) -> None:
    """Who has lost the key again and again costs no epoch, though one silo alone has it."""
    for _ in range(2):
        request = keyed.wish("b")
        keyed.ask("b", request)
        give(keyed, "a", request)
    assert keyed.ask("b", request) is False
    keyed.now += keyed.config.phase_deadline
    assert keyed.tick()
    assert epoch(keyed) == 1
    assert keyed.ask("b", request).sender == "a"


def test_two_silos_that_need_a_newer_key_have_one(keyed: World) -> None:
    """What they were given is no use to them, or they have lived through more than the session."""
    assert keyed.ask("b", keyed.wish("b", 2)) == 1
    assert keyed.ask("b", keyed.wish("b", 9)) == 1
    assert keyed.tick() == 1  # whoever looks sees no change: one silo is not enough
    assert epoch(keyed) == 1
    assert keyed.ask("c", keyed.wish("c", 4)) == 1
    assert keyed.tick()
    assert (epoch(keyed), keyed.key) == (4, None)  # both are at 4 at least
    keyed.restart()
    assert epoch(keyed) == 4
    keyed.make_key("b")


def test_silos_that_are_ahead_pull_so_far_and_no_farther(keyed: World) -> None:
    for name in "bc":
        keyed.ask(name, keyed.wish(name, 2**32 - 1))
    keyed.tick()
    assert 1 < epoch(keyed) <= 2**12


def test_who_was_late_makes_the_key_if_nobody_else_comes(world: World) -> None:
    world.ask("b")
    world.now += MAKE_SECONDS
    world.tick()
    assert world.ask("b") is False
    assert world.session.due() == world.now + world.config.phase_deadline
    world.now += world.config.phase_deadline
    assert world.tick() == 1
    assert world.ask("b") is True


def test_a_spare_box_is_for_one_request(keyed: World) -> None:
    for sender in "ac":
        request = keyed.wish("b")
        keyed.ask("b", request)
        give(keyed, sender, request)
    old, new = keyed.wish("b"), keyed.wish("b")
    keyed.ask("b", old)
    give(keyed, "a", old)
    keyed.ask("b", new)
    keyed.now += keyed.config.phase_deadline
    assert keyed.tick()
    assert epoch(keyed) == 2


def test_two_silos_at_once(keyed: World) -> None:
    requests = {name: keyed.wish(name) for name in "bc"}
    for name, request in requests.items():
        assert keyed.ask(name, request) is False
    assert waiting(keyed) == list(requests.values())
    made = {name: give(keyed, "a", request) for name, request in requests.items()}
    assert {name: keyed.ask(name, requests[name]) for name in "bc"} == made


def test_an_older_call_does_not_take_a_newer_one_s_place(keyed: World) -> None:
    """Both wait at the coordinator, and look again whenever anything changes."""
    old, new = keyed.wish("b"), keyed.wish("b")
    for request in (old, new):
        keyed.ask("b", request)
    assert keyed.tick() == 1
    for request in (old, new) * 3:
        assert keyed.ask("b", request) is False
    assert keyed.tick() == 0  # nothing new has been said
    assert waiting(keyed) == [new]
    made = give(keyed, "a", new)
    assert keyed.ask("b", old) is False
    assert keyed.ask("b", new) == made


def test_one_silo_cannot_ask_without_end(keyed: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(desk_module, "MAX_REQUESTS", 3)
    assert MAX_REQUESTS == 1000
    for _ in range(3):
        last = keyed.wish("b")
        keyed.ask("b", last)
    with refused(QuotaExceeded, "key-requests"):
        keyed.ask("b")
    assert keyed.ask("b", last) is False
    assert keyed.ask("c") is False  # the others may
    keyed.without("d")
    keyed.tick()
    keyed.make_key()
    assert keyed.ask("b") is False


def test_the_request_of_a_silo_that_left_vanishes(keyed: World) -> None:
    desk = keyed.session.keys
    request = keyed.wish("b")
    desk._wishes[SiloId("e")] = Wish(replace(request, silo=SiloId("e")), keyed.now)
    keyed.ask("b", request)
    keyed.tick()  # e was in the manifest for a moment, and asked in it
    assert waiting(keyed) == [request]
    assert epoch(keyed) == 1


def test_a_request_of_another_epoch_is_told_the_current_one(keyed: World) -> None:
    assert keyed.ask("b", keyed.wish("b", 2)) == 1
    assert keyed.ask("b", keyed.wish("b", 2**32 - 1)) == 1
    old = keyed.wish("b")
    keyed.without("d")
    keyed.tick()
    answer = keyed.ask("b", old)
    assert (answer, answer is True) == (2, False)
    assert keyed.session.keys._wishes == {}


def test_a_request_is_its_silo_s_own(keyed: World, tmp_path: Path) -> None:
    request = keyed.wish("b")
    other = World(tmp_path / "other", protection=Protection.CKKS_MASKED)
    other.keys, other.manifest = keyed.keys, keyed.manifest
    forged = [
        replace(request, signature=bytes(64)),
        replace(request, silo=C),
        replace(request, epoch=2),
        replace(request, ephemeral=keyed.wish("b").ephemeral),
        other.wish("b"),  # of another session of the same silos
    ]
    for bad in forged:
        with refused(FaultyClient, "message-signature"):
            keyed.session.ask_key(bad.silo, bad, keyed.now)
    assert keyed.session.keys._wishes == {}
    keyed.without("b")
    with refused(RoleRefused, "session-member"):
        keyed.ask("b", request)


# When an epoch ends.


def test_a_request_that_nobody_answers_ends_the_epoch(keyed: World) -> None:
    """All that had the key have lost it: whoever asks next makes another."""
    request = keyed.wish("b")
    keyed.ask("b", request)
    keyed.tick()
    due = keyed.now + keyed.config.phase_deadline
    assert keyed.session.due() == due
    keyed.now = due - 1
    keyed.ask("b", request)  # the same request: it waits since then
    keyed.ask("c")
    assert keyed.tick() == 1  # c's request is news; the epoch goes on
    assert (epoch(keyed), keyed.session.due()) == (1, due)
    keyed.now = due
    assert keyed.tick() == 1
    assert (epoch(keyed), keyed.key, keyed.session.due()) == (2, None, math.inf)
    assert keyed.ask("b", request) == 2
    assert keyed.ask("c") is True


def test_an_answered_request_ends_nothing(keyed: World) -> None:
    request = keyed.wish("b")
    keyed.ask("b", request)
    give(keyed, "a", request)
    keyed.tick()
    keyed.now += 100 * keyed.config.phase_deadline
    assert keyed.tick() == 0
    assert epoch(keyed) == 1


def revoked(world: World) -> None:
    world.without("d")


def renewed(world: World) -> None:
    enrol(world, "d")


@pytest.mark.parametrize("change", [revoked, renewed])
def test_another_membership_ends_the_epoch(keyed: World, change: Callable[[World], None]) -> None:
    keyed.open()
    keyed.ready("a", "b")
    request = keyed.wish("b")
    keyed.ask("b", request)
    old = keyed.key
    change(keyed)
    assert keyed.tick()
    assert (epoch(keyed), keyed.key, keyed.session.ready_for) == (2, None, {})
    assert keyed.ask("b", request) == 2
    for call in (
        lambda: keyed.session.ready(A, TASK, keyed.session.base(TASK), keyed.now, old),
        lambda: keyed.session.ready(A, TASK, keyed.session.base(TASK), keyed.now),
        lambda: keyed.session.next(A, 1, 0, Step.LEFT, old),
        lambda: keyed.session.key_requests(A, old),
        lambda: keyed.session.send_key_box(A, box("a", request, old)),
    ):
        with refused(StaleKey, "key-stale"):
            call()
    assert keyed.make_key("b").epoch == 2
    with refused(StaleKey, "key-stale"):
        keyed.session.ready(A, TASK, keyed.session.base(TASK), keyed.now, old)
    keyed.ready("a")
    assert set(keyed.session.ready_for) == {A}


def test_a_silo_of_the_session_that_is_enrolled_late_ends_the_epoch(tmp_path: Path) -> None:
    world = World(tmp_path / "late", protection=Protection.CKKS_MASKED)
    world.without("d")
    world.make_key()
    assert world.tick() == 0
    enrol(world, "d")
    assert world.tick() == 1
    assert epoch(world) == 2
    world.make_key("d")
    assert set(world.session.keys.members) == {A, B, C, D}


def test_who_is_no_silo_of_the_session_changes_nothing(keyed: World) -> None:
    enrol(keyed, "e")
    assert keyed.tick() == 0
    keyed.without("e")
    assert keyed.tick() == 0
    assert epoch(keyed) == 1


def test_a_thousand_sums_end_the_epoch(keyed: World) -> None:
    desk = keyed.session.keys
    desk.opened = SUMS_PER_KEY - 1
    assert keyed.tick() == 0
    keyed.release()
    assert desk.opened == SUMS_PER_KEY
    assert keyed.session.results[0].key is not None
    assert keyed.tick() == 1
    assert (epoch(keyed), keyed.key, desk.opened) == (2, None, 0)


def test_sums_count_for_the_key_that_they_are_under(keyed: World) -> None:
    keyed.release()
    assert keyed.session.keys.opened == 1
    keyed.ready()
    keyed.tick()
    keyed.session.end_key(A, keyed.key, 1)
    keyed.session.end_key(B, keyed.key, 1)
    keyed.make_key("b")
    keyed.phases(5)
    assert [result.key.epoch for result in keyed.session.results] == [1, 1]
    assert keyed.session.keys.opened == 0


def test_a_sum_that_does_not_open_ends_the_epoch_once(keyed: World) -> None:
    key = keyed.key
    for number in (0, 1, 2**31):  # there is no such sum yet
        keyed.session.end_key(A, key, number)
    keyed.release()
    keyed.session.end_key(A, KeyName(1, bytes(32)), 1)
    keyed.session.end_key(A, replace(key, epoch=2), 1)
    keyed.session.end_key(A, key, 2)
    assert epoch(keyed) == 1
    for _ in range(2):  # one silo's word is not enough
        keyed.session.end_key(B, key, 1)
        assert (epoch(keyed), keyed.key) == (1, key)
    keyed.session.end_key(C, key, 1)
    assert (epoch(keyed), keyed.key) == (2, None)
    for silo in (A, B, C, D):  # the others have seen it, too
        keyed.session.end_key(silo, key, 1)
    keyed.make_key("b")
    for silo in (A, B, C, D):
        keyed.session.end_key(silo, key, 1)
        keyed.session.end_key(silo, keyed.key, 1)  # that sum is not under this key
    assert (epoch(keyed), keyed.key.epoch) == (2, 2)


def test_an_attempt_that_runs_goes_on_under_its_key(keyed: World) -> None:
    keyed.release()
    old = keyed.key
    keyed.ready()
    keyed.tick()
    keyed.phases(2)
    keyed.session.end_key(A, old, 1)
    keyed.session.end_key(B, old, 1)
    assert keyed.session.next(A, 2, 1, Step.ROSTER, old) is not None  # of the attempt
    with refused(StaleKey, "key-stale"):
        keyed.session.next(A, 2, 1, Step.LEFT, old)
    keyed.phases(3)
    result = keyed.session.results[-1]
    assert (result.round, result.key) == (2, old)
    assert isinstance(keyed.session.next(B, 2, 1, Step.SIGNATURES, old), Result)
    keyed.make_key("c")
    keyed.release()
    assert keyed.session.results[-1].key == keyed.key != old


def test_an_attempt_that_fails_begins_again_under_the_new_key(keyed: World) -> None:
    old = keyed.key
    keyed.start()
    keyed.phases(1)
    enrol(keyed, "d")
    keyed.tick()
    assert keyed.session.attempt is not None
    keyed.now += keyed.config.phase_deadline
    keyed.tick()
    assert keyed.session.last_abort[2].phase == Phase.SHARE_KEYS
    with refused(StaleKey, "key-stale"):
        keyed.ready_with(old)
    new = keyed.make_key("b")
    for player in keyed.players.values():
        player.member = replace(
            player.member, manifest=keyed.manifest, identity=keyed.keys[player.name]
        )
    keyed.ready()
    keyed.tick()
    assert keyed.session.attempt.descriptor.key == new
    assert keyed.session.attempt.number == 2
    keyed.phases(5)
    assert keyed.session.results[-1].key == new


def test_next_with_the_newest_key_waits(keyed: World) -> None:
    keyed.open()
    keyed.ready("a")
    assert keyed.session.next(A, 1, 0, Step.LEFT, keyed.key) is None
    assert keyed.session.next(A, 1, 0, Step.LEFT) is None  # only looks on
    keyed.without("d")
    keyed.tick()
    assert keyed.session.next(A, 1, 0, Step.LEFT) is None


# Where there is no key to speak of.


def calls(world: World, key: KeyName) -> dict[str, Callable[[], object]]:
    """Every method about keys."""
    session = world.session
    request = world.wish("a", 1)
    return {
        "AskKey": lambda: session.ask_key(A, request, world.now),
        "AnnounceKey": lambda: session.announce_key(A, key, (A, B, C, D)),
        "AwaitKeyRequests": lambda: session.key_requests(A, key),
        "SendKeyBox": lambda: session.send_key_box(A, box("a", replace(request, silo=B), key)),
        "EndKey": lambda: session.end_key(A, key, 1),
    }


@pytest.mark.parametrize(
    "method", ["AskKey", "AnnounceKey", "AwaitKeyRequests", "SendKeyBox", "EndKey"]
)
def test_a_masked_session_has_no_key(tmp_path: Path, method: str) -> None:
    world = World(tmp_path / "masked")
    with refused(FaultyClient, "key-unused"):
        calls(world, KeyName(1, bytes(32)))[method]()
    assert world.session.keys is None
    world.open()
    world.session.ready(A, TASK, world.session.base(TASK), world.now, KeyName(1, bytes(32)))
    assert world.session.next(A, 1, 0, Step.LEFT, KeyName(1, bytes(32))) is None


@pytest.mark.parametrize("over", [State.ABORTED, State.DONE])
def test_a_session_that_is_over_has_no_key_to_give(keyed: World, over: State) -> None:
    world, key = keyed, keyed.key
    if over is State.DONE:
        for _ in range(3):
            world.release()
        for _ in range(2):
            world.release(task="statistics")
    else:
        world.session.abort()
    assert world.session.state is over
    rows = world.journal.load()[world.session_id]
    for call in calls(world, key).values():
        with refused(SessionEnded, "session-over"):
            call()
    world.without("d")
    world.now += 1e6
    assert (world.tick(), world.session.due()) == (0, math.inf)
    assert world.journal.load()[world.session_id] == rows


# Through the driver: who waits is woken.


@asynccontextmanager
async def driving(world: World) -> AsyncIterator[Driver]:
    driver = Driver(world.session, pytest.fail)
    try:
        yield driver
    finally:
        await driver.stop()


class Clock:
    """Monotonic time that a test moves by hand."""

    def __init__(self, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
        self.world = world
        monkeypatch.setattr(driver_module, "time", SimpleNamespace(monotonic=lambda: world.now))

    async def advance(self, driver: Driver, seconds: float) -> None:
        self.world.now += seconds
        driver.wake()


@pytest.fixture
def clock(world: World, monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Nobody asks again by itself: whoever is not woken waits for ever, and the test fails."""
    monkeypatch.setattr(driver_module, "LONG_POLL_SECONDS", 1e6)
    return Clock(world, monkeypatch)


async def soon(awaitable: Awaitable[Any]) -> Any:
    return await asyncio.wait_for(awaitable, 30)


def asking(world: World, name: str, request: KeyRequest | None = None) -> Callable[[], Any]:
    """AskKey's look: False is nothing yet."""
    request = request or world.wish(name)
    return lambda: world.ask(name, request) or None


def answering(world: World, name: str) -> Callable[[], Any]:
    """AwaitKeyRequests' look, with the key that the silo has now."""
    key = world.key
    assert key is not None
    return lambda: world.session.key_requests(SiloId(name), key) or None


async def settled(driver: Driver, *polls: asyncio.Task[Any]) -> None:
    """Everybody has looked, and nobody has found anything."""
    for _ in range(3):
        await soon(driver.call(lambda: None))
    assert not any(poll.done() for poll in polls)


async def test_a_request_wakes_those_who_have_the_key(world: World, clock: Clock) -> None:
    world.make_key()
    request = world.wish("b")
    async with driving(world) as driver:
        keepers = [asyncio.create_task(driver.wait(answering(world, name))) for name in "acd"]
        await settled(driver, *keepers)
        asks = asyncio.create_task(driver.wait(asking(world, "b", request)))
        for keeper in keepers:
            assert await soon(keeper) == [request]
        assert not asks.done()
        made = await soon(driver.call(give, world, "c", request))
        assert await soon(asks) == made


async def test_a_key_reaches_everybody_who_has_waited_for_it(world: World, clock: Clock) -> None:
    """Their requests are told of as soon as there is a key, though nobody calls again."""
    async with driving(world) as driver:
        assert await soon(driver.wait(asking(world, "a"))) is True
        polls = {n: asyncio.create_task(driver.wait(asking(world, n))) for n in "bcd"}
        await settled(driver, *polls.values())
        await soon(driver.call(world.make_key))
        told: set[str] = set()
        while len(told) < 3:
            for request in await soon(driver.wait(answering(world, "a"))):
                await soon(driver.call(give, world, "a", request))
                told.add(request.silo)
        for name, poll in polls.items():
            assert (await soon(poll)).recipient == name


async def test_a_keeper_is_woken_by_a_request_that_was_told_before_the_key(
    world: World, clock: Clock
) -> None:
    async with driving(world) as driver:
        asks = asyncio.create_task(driver.wait(asking(world, "b")))
        assert await soon(asks) is True
        waits = asyncio.create_task(driver.wait(asking(world, "c")))
        await settled(driver, waits)
        await soon(driver.call(world.make_key, "b"))
        keeper = asyncio.create_task(driver.wait(answering(world, "b")))
        assert [request.silo for request in await soon(keeper)] == [C]
        await soon(driver.call(world.session.abort))
        with refused(SessionEnded, "session-over"):
            await soon(waits)


async def test_a_late_maker_s_turn_goes_to_one_who_waits(world: World, clock: Clock) -> None:
    async with driving(world) as driver:
        assert await soon(driver.wait(asking(world, "a"))) is True
        polls = [asyncio.create_task(driver.wait(asking(world, name))) for name in "bc"]
        await settled(driver, *polls)
        await clock.advance(driver, MAKE_SECONDS)
        done, left = await asyncio.wait(polls, timeout=30, return_when=asyncio.FIRST_COMPLETED)
        assert [task.result() for task in done] == [True]
        await settled(driver, *left)
        await clock.advance(driver, MAKE_SECONDS)
        assert await soon(left.pop()) is True


async def test_an_unanswered_request_wakes_who_asked_and_who_is_ready(
    world: World, clock: Clock
) -> None:
    world.make_key()
    world.open()
    world.ready("a", "c")
    key = world.key
    async with driving(world) as driver:
        asks = asyncio.create_task(driver.wait(asking(world, "b")))
        ready = asyncio.create_task(
            driver.wait(lambda: world.session.next(A, 1, 0, Step.LEFT, key))
        )
        await settled(driver, asks, ready)
        await clock.advance(driver, world.config.phase_deadline)
        assert await soon(asks) == 2
        with refused(StaleKey, "key-stale"):
            await soon(ready)


async def test_a_new_manifest_wakes_keepers(world: World, clock: Clock) -> None:
    world.make_key()
    async with driving(world) as driver:
        keepers = [asyncio.create_task(driver.wait(answering(world, name))) for name in "ab"]
        await settled(driver, *keepers)
        world.without("d")
        driver.wake()
        for keeper in keepers:
            with refused(StaleKey, "key-stale"):
                await soon(keeper)


@pytest.mark.parametrize("weakened", [False, True])
async def test_a_call_that_was_given_up_does_not_cost_the_next_one_its_box(
    world: World, clock: Clock, monkeypatch: pytest.MonkeyPatch, weakened: bool
) -> None:
    """The coordinator may hear late of a silo's hanging up: both calls wait and look on."""
    world.make_key()
    old, new = world.wish("b"), world.wish("b")
    real = KeyDesk.ask

    def forgetful(self: KeyDesk, request: KeyRequest, now: float) -> Any:
        wish = self._wishes.get(request.silo)
        self._asked[request.silo] = {wish.request.ephemeral} if wish else set()
        return real(self, request, now)

    if weakened:
        monkeypatch.setattr(KeyDesk, "ask", forgetful)
    async with driving(world) as driver:
        polls = [asyncio.create_task(driver.wait(asking(world, "b", r))) for r in (old, new)]
        await settled(driver, *polls)
        await soon(driver.call(give, world, "a", new))
        await soon(driver.call(lambda: None))
        assert [poll.done() for poll in polls] == [False, not weakened]
        if not weakened:
            assert (await polls[1]).recipient_ephemeral == new.ephemeral
        for poll in polls:
            poll.cancel()


async def test_a_whole_session_s_round_after_the_key_went_round(world: World, clock: Clock) -> None:
    """Four silos in tasks of their own: ask, make or wait, give, be ready, take part."""
    world.open()
    holders: dict[str, KeyName] = {}

    async def obtain(driver: Driver, name: str) -> None:
        request = world.wish(name)
        found = await soon(driver.wait(asking(world, name, request)))
        if found is True:
            key = KeyName(1, os.urandom(32))
            await soon(driver.call(world.session.announce_key, SiloId(name), key, (A, B, C, D)))
            holders[name] = key
        else:
            holders[name] = KeyName(found.epoch, found.key_id)

    async def keep(driver: Driver, name: str) -> None:
        while True:
            for request in await driver.wait(answering(world, name)) or ():
                await driver.call(give, world, name, request)

    async def play(driver: Driver, name: str) -> Any:
        await obtain(driver, name)
        keeper = asyncio.create_task(keep(driver, name))
        player = world.players[name]
        try:
            await driver.call(world.ready, name)
            while not isinstance(event := await soon(driver.wait(player.look)), Result):
                message = player.answer(event)
                await driver.call(player.send, message)
            return event
        finally:
            keeper.cancel()

    async with driving(world) as driver:
        results = await asyncio.gather(*(play(driver, name) for name in world.players))
    assert set(holders.values()) == {world.key}
    assert results == world.session.results * 4
