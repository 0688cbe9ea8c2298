"""A silo's keys: one encoding, an epoch that never falls, and no round under an unfit key."""

from __future__ import annotations

import copy
import hashlib
import pickle
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from secagg.ckks import keyring
from secagg.ckks.keyring import (
    MAX_KEYS,
    MAX_PACKED_BYTES,
    HeldKey,
    Keyring,
    make_key,
    open_blob,
    pack_keys,
    seal_blob,
    unpack_keys,
)
from secagg.config import SiloId
from secagg.crypto.labels import CHECKPOINT, CKKS_KEY, WEIGHTS, digest, enc, u64
from secagg.crypto.secret import Entropy, Secret
from secagg.errors import (
    FaultyClientOrServer,
    FaultyServer,
    MalformedMessage,
    SecaggError,
)
from secagg.suite import SUMS_PER_KEY, KeyName

SESSION = bytes(range(32))
MEMBERS = {SiloId(name): hashlib.sha256(name.encode()).digest() for name in ("a", "b", "c")}
A, B = SiloId("a"), SiloId("b")


def keyed(seed: str) -> Entropy:
    return lambda size: hashlib.shake_256(seed.encode()).digest(size)


def key(epoch: int, seed: str = "") -> HeldKey:
    return make_key(SESSION, epoch, MEMBERS, keyed(seed or f"epoch {epoch}"))


def ring(*epochs: int, floor: KeyName | None = None) -> Keyring:
    return Keyring(SESSION, floor, tuple(key(epoch) for epoch in epochs))


def code_of(
    error: type[SecaggError], call: Callable[..., object], *args: Any, **kwargs: Any
) -> str:
    """The code of a refusal of exactly this class."""
    with pytest.raises(error) as refusal:
        call(*args, **kwargs)
    assert type(refusal.value) is error
    return refusal.value.code


class TestHeldKey:
    def test_its_id_commits_to_key_and_holders(self) -> None:
        made = key(7)
        members = enc(*(enc(name.encode(), identity) for name, identity in MEMBERS.items()))
        material = made.material.reveal()
        assert made.name == KeyName(7, digest(CKKS_KEY, SESSION, u64(7), members, material))
        others = [
            key(8, "epoch 7"),
            key(7, "another"),
            replace(made, session_id=bytes(32)),
            replace(made, members={A: MEMBERS[A], B: MEMBERS[B]}),
            replace(made, members={**MEMBERS, B: bytes(32)}),
        ]
        assert len({other.name for other in [made, *others]}) == 6

    def test_members_are_sorted_when_it_is_made(self) -> None:
        backwards = dict(reversed(MEMBERS.items()))
        assert make_key(SESSION, 1, backwards, keyed("epoch 1")) == key(1)
        assert list(make_key(SESSION, 1, backwards, keyed("")).members) == list(MEMBERS)

    @pytest.mark.parametrize(
        "change",
        [
            {"session_id": bytes(31)},
            {"epoch": 0},
            {"epoch": 2**32},
            {"material": Secret(bytes(31))},
            {"material": Secret(bytes(33))},
            {"members": {}},
            {"members": {f"s{number:03}": bytes(32) for number in range(257)}},
            {"members": {"b": bytes(32), "a": bytes(32)}},
            {"members": {"B": bytes(32)}},
            {"members": {"a" * 64: bytes(32)}},
            {"members": {"a": bytes(31)}},
        ],
    )
    def test_anything_else_is_no_key(self, change: dict[str, Any]) -> None:
        made = key(1)
        assert code_of(MalformedMessage, replace, made, **change) == "key-format"

    def test_a_member_is_a_name_with_its_identity(self) -> None:
        assert key(1).is_for(A, MEMBERS[A])
        assert not key(1).is_for(A, MEMBERS[B])
        assert not key(1).is_for(SiloId("d"), MEMBERS[A])

    def test_its_material_is_in_no_text_or_pickle(self) -> None:
        made = key(1)
        for secret in (made, ring(1), (made,)):
            for text in (repr(secret), str(secret), f"{secret}"):
                assert made.material.reveal().hex() not in text
                assert repr(made.material.reveal()) not in text
                assert "Secret(<32 bytes>)" in text
            for copier in (pickle.dumps, copy.deepcopy):
                with pytest.raises(TypeError):
                    copier(secret)


names = st.from_regex(r"[a-z0-9](?:[a-z0-9-]{0,6}[a-z0-9])?", fullmatch=True)
key_bytes = st.binary(min_size=32, max_size=32)


@st.composite
def key_lists(draw: st.DrawFn) -> tuple[HeldKey, ...]:
    epochs = draw(st.sets(st.integers(1, 2**32 - 1), min_size=1, max_size=4))
    members = st.dictionaries(names.map(SiloId), key_bytes, min_size=1, max_size=4)
    return tuple(
        HeldKey(SESSION, epoch, dict(sorted(draw(members).items())), Secret(draw(key_bytes)))
        for epoch in sorted(epochs)
    )


def repacked(data: bytes) -> bytes | None:
    """The keys in these bytes, encoded again; None where they are refused."""
    try:
        return pack_keys(unpack_keys(SESSION, data))
    except MalformedMessage:
        return None


class TestEncoding:
    @given(key_lists())
    @settings(deadline=None)
    def test_round_trip(self, keys: tuple[HeldKey, ...]) -> None:
        assert unpack_keys(SESSION, pack_keys(keys)) == keys

    @given(st.binary(max_size=300))
    @settings(deadline=None)
    def test_any_bytes_are_keys_or_refused(self, data: bytes) -> None:
        assert repacked(data) in (data, None)

    @given(key_lists(), st.data())
    @settings(deadline=None)
    def test_altered_bytes_are_other_keys_or_refused(
        self, keys: tuple[HeldKey, ...], data: st.DataObject
    ) -> None:
        altered = bytearray(pack_keys(keys))
        at = data.draw(st.integers(0, len(altered) - 1))
        match data.draw(st.sampled_from(["flip", "cut", "insert", "delete"])):
            case "flip":
                altered[at] ^= data.draw(st.integers(1, 255))
            case "cut":
                del altered[at:]
            case "insert":
                altered.insert(at, data.draw(st.integers(0, 255)))
            case _:
                del altered[at]
        # Other material, another name or identity: those are keys with other ids.
        assert repacked(bytes(altered)) in (altered, None)

    def test_strictly_one_encoding(self) -> None:
        one = pack_keys((key(1),))[4:]
        member = b"\x01a" + MEMBERS[A]
        lone = (1).to_bytes(4, "big") + bytes(32)
        for data in (
            b"",
            pack_keys(()),
            pack_keys((key(1),)) + b"\0",
            pack_keys((key(1), key(1))),
            pack_keys((key(2), key(1))),
            bytes(3) + b"\2" + one,
            pack_keys([key(epoch) for epoch in range(1, MAX_KEYS + 2)]),
            bytes(3) + b"\1" + lone + bytes(3) + b"\2" + member * 2,
            bytes(3) + b"\1" + lone + bytes(3) + b"\1" + b"\x00" + MEMBERS[A],
            bytes(3) + b"\1" + lone + bytes(3) + b"\1" + b"\x40" + b"a" * 64 + MEMBERS[A],
            bytes(3) + b"\1" + lone + bytes(3) + b"\1" + b"\x01\xe9" + MEMBERS[A],
            bytes(3) + b"\1" + lone + b"\x00\x00\x01\x01" + member,
            bytes(3) + b"\1" + bytes(4) + bytes(32) + bytes(3) + b"\1" + member,
        ):
            assert code_of(MalformedMessage, unpack_keys, SESSION, data) == "key-format"

    def test_the_largest(self) -> None:
        members = {SiloId(f"{number:063}"): bytes(32) for number in range(256)}
        one = HeldKey(SESSION, 1, members, Secret(bytes(32)))
        assert 4 + MAX_KEYS * (len(pack_keys((one,))) - 4) == MAX_PACKED_BYTES
        assert unpack_keys(SESSION, pack_keys((one,))) == (one,)


class TestKeyring:
    def test_an_empty_ring_has_to_ask(self) -> None:
        empty = Keyring(SESSION)
        assert empty.newest is None
        assert empty.epoch == 0
        assert empty.find(key(1).name) is None

    def test_past_keys_are_found_and_the_newest_is_used(self) -> None:
        held = ring(1, 3)
        assert held.newest == key(3)
        assert held.epoch == 3
        assert held.find(key(1).name) == key(1)
        assert held.find(key(2).name) is None
        assert held.find(KeyName(1, bytes(32))) is None

    def test_keys_are_added_and_past_ones_filled_in(self) -> None:
        grown = ring(2).add((key(1), key(2), key(5)), A)
        assert grown == ring(1, 2, 5)
        assert grown.add((key(5),), B) == grown
        assert ring().add((key(1),), A) == ring(1)

    def test_two_first_silos_made_a_key_of_one_epoch(self) -> None:
        mine = Keyring(SESSION).add((key(1, "mine"),), A)
        theirs = (key(1, "theirs"),)
        with pytest.raises(FaultyClientOrServer) as refusal:
            mine.add(theirs, B)
        assert (refusal.value.code, refusal.value.client) == ("key-replaced", "b")
        assert mine.newest == key(1, "mine")
        # With a later epoch everybody goes on, and past sums open under whichever key they name.
        both = mine.add((key(1, "theirs"), key(2)), B)
        for name in ("mine", "theirs"):
            assert both.find(key(1, name).name) == key(1, name)
        assert both.newest == key(2)
        assert mine.add((key(2),), B).keys == (key(1, "mine"), key(2))
        assert unpack_keys(SESSION, pack_keys(both.keys)) == both.keys

    def test_a_planted_past_key_displaces_none(self) -> None:
        planted = ring(2).add((key(1, "planted"), key(2)), B)
        assert planted.find(key(1).name) is None
        assert planted.add((key(1), key(2)), A).find(key(1).name) == key(1)
        assert ring(1, 2).add((key(1, "planted"), key(2)), B).find(key(1).name) == key(1)

    def test_a_flood_of_planted_keys_is_cut_short(self) -> None:
        flooded = ring(1, 2)
        for number in range(20):
            flooded = flooded.add((key(1, f"planted {number}"), key(2)), B)
        assert len(flooded.keys) == 5
        assert flooded.find(key(1).name) == key(1)

    def test_the_newest_is_alone(self) -> None:
        two = tuple(sorted((key(2), key(2, "other")), key=lambda k: k.name))
        assert code_of(MalformedMessage, Keyring, SESSION, None, two) == "keyring"
        assert code_of(MalformedMessage, unpack_keys, SESSION, pack_keys(two)) == "key-format"

    def test_the_epoch_never_falls(self) -> None:
        assert code_of(FaultyClientOrServer, ring(3).add, (key(2),), A) == "key-epoch"
        assert code_of(FaultyClientOrServer, ring(3).add, (), A) == "key-epoch"

    def test_nor_over_a_restart(self) -> None:
        restarted = ring(floor=key(3).name)
        assert restarted.epoch == 3
        assert code_of(FaultyClientOrServer, restarted.add, (key(2),), A) == "key-epoch"
        other = (key(3, "other"),)
        assert code_of(FaultyClientOrServer, restarted.add, other, A) == "key-replaced"
        assert restarted.add((key(1), key(3)), A).newest == key(3)
        assert restarted.add((key(4),), A).newest == key(4)

    def test_an_old_file_opens_past_sums_and_no_round(self) -> None:
        old = ring(1, 2, floor=key(3).name)
        assert old.find(key(2).name) == key(2)
        assert old.newest is None
        assert code_of(FaultyServer, old.check, key(2).name, MEMBERS, 0) == "descriptor-key"

    def test_keys_that_are_no_ring(self) -> None:
        elsewhere = make_key(bytes(32), 1, MEMBERS, keyed(""))
        for keys in ((key(2), key(1)), (key(1), key(1)), (elsewhere,)):
            assert code_of(MalformedMessage, Keyring, SESSION, None, keys) == "keyring"
        floor = key(1, "other").name
        assert code_of(MalformedMessage, ring, 1, floor=floor) == "key-replaced"

    def test_the_oldest_keys_go_first(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(keyring, "MAX_KEYS", 2)
        assert ring(1, 2).add((key(3),), A) == ring(2, 3)
        assert ring(2, 3).add((key(1), key(3)), A) == ring(2, 3)


class TestCheck:
    def test_the_newest_key_is_fit(self) -> None:
        joined = {**MEMBERS, SiloId("d"): bytes(32)}
        for members in (MEMBERS, joined):
            found = ring(1, 2).check(key(2).name, members, SUMS_PER_KEY - 1)
            assert found == key(2)

    @pytest.mark.parametrize(
        "name",
        [None, key(1).name, key(3).name, key(2, "other").name, KeyName(1, key(2).name.key_id)],
    )
    def test_another_key_than_the_newest(self, name: KeyName | None) -> None:
        assert code_of(FaultyServer, ring(1, 2).check, name, MEMBERS, 0) == "descriptor-key"

    def test_a_silo_without_keys(self) -> None:
        assert code_of(FaultyServer, ring().check, key(1).name, MEMBERS, 0) == "descriptor-key"

    @pytest.mark.parametrize("now", [None, bytes(32)], ids=["left", "other-identity"])
    def test_somebody_who_had_the_key_left(self, now: bytes | None) -> None:
        members = {name: identity for name, identity in MEMBERS.items() if name != B}
        members |= {} if now is None else {B: now}
        with pytest.raises(FaultyServer) as refusal:
            ring(1).check(key(1).name, members, 0)
        assert refusal.value.code == "descriptor-key-revoked"
        assert "that b had" in refusal.value.observed
        assert refusal.value.remedy

    def test_a_worn_key(self) -> None:
        for opened in (SUMS_PER_KEY, SUMS_PER_KEY + 1):
            refused = code_of(FaultyServer, ring(1).check, key(1).name, MEMBERS, opened)
            assert refused == "descriptor-key-worn"


class TestFile:
    @pytest.mark.parametrize("held", [ring(), ring(1), ring(1, 2, 7)])
    def test_round_trip(self, held: Keyring) -> None:
        assert Keyring.unpack(held.pack(), SESSION) == held

    def test_the_floor_is_the_ledgers(self) -> None:
        file = ring(1, floor=key(1).name).pack()
        assert Keyring.unpack(file, SESSION).floor is None
        assert Keyring.unpack(file, SESSION, key(2).name).newest is None
        other = key(1, "other").name
        assert code_of(MalformedMessage, Keyring.unpack, file, SESSION, other) == ("key-replaced")

    @given(st.data())
    @settings(deadline=None)
    def test_a_damaged_file_is_refused(self, data: st.DataObject) -> None:
        file = ring(1, 2).pack()
        altered = bytearray(file)
        altered[data.draw(st.integers(0, len(file) - 1))] ^= data.draw(st.integers(1, 255))
        cut = file[: data.draw(st.integers(0, len(file) - 1))]
        for damaged in (bytes(altered), cut, file + b"\0"):
            refused = code_of(MalformedMessage, Keyring.unpack, damaged, SESSION)
            assert refused == "keyring-file"

    @given(st.binary(max_size=200))
    @settings(deadline=None)
    def test_any_bytes_are_refused(self, data: bytes) -> None:
        for body in (data, data + digest(CKKS_KEY, data)):
            assert code_of(MalformedMessage, Keyring.unpack, body, SESSION) == ("keyring-file")

    def test_of_another_session_or_version(self) -> None:
        file = ring(1).pack()
        assert code_of(MalformedMessage, Keyring.unpack, file, bytes(32)) == "keyring-file"
        body = file[:-32].replace(b"secagg/1/", b"secagg/2/")
        newer = body + digest(CKKS_KEY, body)
        assert code_of(MalformedMessage, Keyring.unpack, newer, SESSION) == "keyring-file"

    @given(st.binary(max_size=100).filter(lambda data: data != b"\0"))
    @settings(deadline=None)
    def test_whole_but_no_keys(self, data: bytes) -> None:
        body = ring().pack()[:-36] + b"\0\0\0" + data
        file = body + digest(CKKS_KEY, body)
        assert code_of(MalformedMessage, Keyring.unpack, file, SESSION) == "key-format"


class TestBlob:
    @given(st.binary(max_size=300))
    @settings(deadline=None)
    def test_round_trip(self, data: bytes) -> None:
        blob = seal_blob(key(1), WEIGHTS, ("a", "task"), data, keyed("salt"))
        assert blob[:32] == keyed("salt")(32)
        assert len(blob) == 32 + len(data) + 16
        for given_as in (blob, bytes(blob), memoryview(blob)):
            assert open_blob(key(1), WEIGHTS, ("a", "task"), given_as) == data

    def test_every_blob_has_a_key_of_its_own(self) -> None:
        one = seal_blob(key(1), WEIGHTS, (), bytes(50), keyed("one"))
        two = seal_blob(key(1), WEIGHTS, (), bytes(50), keyed("two"))
        assert one[32:] != two[32:]

    def test_of_another_key_purpose_or_party(self) -> None:
        blob = seal_blob(key(1), WEIGHTS, ("a", "task"), b"data", keyed("salt"))
        for held, label, parties in (
            (key(2), WEIGHTS, ("a", "task")),
            (key(1), CHECKPOINT, ("a", "task")),
            (key(1), WEIGHTS, ("b", "task")),
            (key(1), WEIGHTS, ("atask",)),
        ):
            refused = code_of(MalformedMessage, open_blob, held, label, parties, blob)
            assert refused == "box-authentication"

    @given(st.data())
    @settings(deadline=None)
    def test_nothing_altered_opens(self, data: st.DataObject) -> None:
        blob = seal_blob(key(1), WEIGHTS, (), b"data", keyed("salt"))
        altered = bytearray(blob)
        altered[data.draw(st.integers(0, len(blob) - 1))] ^= data.draw(st.integers(1, 255))
        cut = blob[: data.draw(st.integers(0, len(blob) - 1))]
        for bad in (altered, cut, data.draw(st.binary(max_size=80))):
            refused = code_of(MalformedMessage, open_blob, key(1), WEIGHTS, (), bad)
            assert refused == "box-authentication"
