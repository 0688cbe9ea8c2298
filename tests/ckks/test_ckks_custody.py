"""A key on its way from silo to silo, through a coordinator that tries everything."""

from __future__ import annotations

import copy
import hashlib
import pickle
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache
from itertools import count
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from secagg.ckks import custody
from secagg.ckks.custody import (
    MAX_SEALED_BYTES,
    Custodian,
    KeyBox,
    KeyRequest,
    Pending,
    ask,
    unwrap,
    wrap,
)
from secagg.ckks.keyring import HeldKey, Keyring, make_key, pack_keys
from secagg.config import SiloId
from secagg.crypto.aead import TAG_BYTES, open_once, seal_once
from secagg.crypto.keys import KeyPair
from secagg.crypto.labels import SIGN_KEY_BOX, SIGN_KEY_REQUEST, enc
from secagg.crypto.secret import Entropy
from secagg.crypto.sign import IdentityKey
from secagg.errors import (
    FaultyClient,
    FaultyClientOrServer,
    FaultyServer,
    MalformedMessage,
    OutOfOrder,
    SecaggError,
)

SESSION = bytes(range(32))
TRANSCRIPT = hashlib.sha256(b"transcript").digest()
A, B, C, D = (SiloId(name) for name in "abcd")


def keyed(seed: str) -> Entropy:
    calls = count()
    return lambda size: hashlib.shake_256(f"{seed}/{next(calls)}".encode()).digest(size)


@cache
def identity(name: str) -> IdentityKey:
    return IdentityKey.generate(keyed(f"identity of {name}"))


def listed(*names: SiloId) -> dict[SiloId, bytes]:
    return {name: identity(name).public for name in names}


MEMBERS = listed(A, B, C)


def silo(name: SiloId, members: Mapping[SiloId, bytes] = MEMBERS) -> Custodian:
    return Custodian(name, identity(name), members, SESSION, TRANSCRIPT)


def key(epoch: int, members: Mapping[SiloId, bytes] = MEMBERS) -> HeldKey:
    return make_key(SESSION, epoch, members, keyed(f"epoch {epoch}"))


RING = Keyring(SESSION, None, (key(1), key(2)))


def asked(name: SiloId = B, epoch: int = 2, seed: str = "") -> tuple[Pending, KeyRequest]:
    return ask(silo(name), epoch, keyed(f"request {name} {seed}"))


def answered(request: KeyRequest, ring: Keyring = RING, sender: SiloId = A) -> KeyBox:
    return wrap(ring, request, silo(sender), keyed("answer"))


def re_signed(box: KeyBox, **changes: Any) -> KeyBox:
    """What a silo that breaks the protocol can send: anything, signed by itself."""
    changed = replace(box, **changes)
    signature = identity(changed.sender).sign(SIGN_KEY_BOX, TRANSCRIPT, changed.body())
    return replace(changed, signature=signature)


def holding(plaintext: bytes, request: KeyRequest, **changes: Any) -> KeyBox:
    """A box that opens to any plaintext, signed by its sender."""
    pair = KeyPair.generate(keyed("liar"))
    box = replace(answered(request), sender_ephemeral=pair.public, **changes)
    bound = enc(TRANSCRIPT, box.head())
    sealed = seal_once(custody._box_key(pair, request.ephemeral, box, bound), plaintext, bound)
    return re_signed(box, sealed=sealed)


def refusal(
    error: type[SecaggError], call: Callable[..., object], *args: Any, **kwargs: Any
) -> tuple[str, str | None]:
    """The code of a refusal of exactly this class, and whom it names."""
    with pytest.raises(error) as caught:
        call(*args, **kwargs)
    assert type(caught.value) is error
    return caught.value.code, getattr(caught.value, "client", None)


def test_a_key_goes_from_silo_to_silo() -> None:
    pending, request = asked()
    box = answered(request)
    assert (box.epoch, box.key_id) == (2, key(2).name.key_id)
    keys = unwrap(pending, box, silo(B))
    assert keys == (key(1), key(2))
    assert Keyring(SESSION).add(keys, box.sender) == RING


@given(st.integers(1, 2**32 - 9), st.integers(1, 8), st.binary(min_size=32, max_size=32))
@settings(deadline=None, max_examples=30)
def test_any_keys_go_round(first: int, number: int, seed: bytes) -> None:
    keys = tuple(
        make_key(SESSION, epoch, MEMBERS, keyed(seed.hex()))
        for epoch in range(first, first + number)
    )
    pending, request = asked(epoch=keys[-1].epoch)
    assert unwrap(pending, answered(request, Keyring(SESSION, None, keys)), silo(B)) == keys


def test_every_box_has_a_key_of_its_own() -> None:
    _, request = asked()
    entropy = keyed("answers")
    first, second = (wrap(RING, request, silo(A), entropy) for _ in range(2))
    assert first.sender_ephemeral != second.sender_ephemeral
    assert first.sealed != second.sealed


def test_what_is_relayed_and_printed_does_not_hold_the_key() -> None:
    pending, request = asked()
    box = answered(request)
    secrets = [key(1).material, key(2).material, pending.ephemeral.private]
    for public in (request.body(), request.signature, box.body(), box.sealed, box.signature):
        assert not any(secret.reveal() in public for secret in secrets)
    for shown in (repr(pending), str(pending), repr(silo(B)), repr(request), repr(box)):
        assert not any(repr(secret.reveal())[2:-1] in shown for secret in secrets)
    for held in (pending, silo(B), RING):
        for copier in (pickle.dumps, copy.deepcopy):
            with pytest.raises(TypeError):
                copier(held)


class TestMessages:
    @pytest.mark.parametrize(
        ("change", "code"),
        [
            ({"epoch": 0}, "message-number"),
            ({"epoch": 2**32}, "message-number"),
            ({"silo": "B"}, "message-name"),
            ({"ephemeral": bytes(31)}, "public-key-encoding"),
            ({"ephemeral": (2**255 - 19 + 9).to_bytes(32, "little")}, "public-key-encoding"),
            ({"ephemeral": bytes(31) + b"\x80"}, "public-key-encoding"),
            ({"ephemeral": bytes(32)}, "public-key-low-order"),
            ({"ephemeral": (1).to_bytes(32, "little")}, "public-key-low-order"),
            ({"ephemeral": (2**255 - 20).to_bytes(32, "little")}, "public-key-low-order"),
            ({"signature": bytes(63)}, "message-size"),
            ({"signature": bytes(65)}, "message-size"),
        ],
    )
    def test_no_request(self, change: dict[str, Any], code: str) -> None:
        _, request = asked()
        assert refusal(MalformedMessage, replace, request, **change) == (code, None)

    @pytest.mark.parametrize(
        ("change", "code"),
        [
            ({"epoch": 0}, "message-number"),
            ({"epoch": 2**32}, "message-number"),
            ({"sender": ""}, "message-name"),
            ({"recipient": "b\n"}, "message-name"),
            ({"sender_ephemeral": bytes(32)}, "public-key-low-order"),
            ({"recipient_ephemeral": bytes(32)}, "public-key-low-order"),
            ({"sender_ephemeral": b"\xff" * 32}, "public-key-encoding"),
            ({"recipient_ephemeral": b"\xff" * 32}, "public-key-encoding"),
            ({"key_id": bytes(31)}, "message-size"),
            ({"sealed": bytes(TAG_BYTES - 1)}, "message-size"),
            ({"sealed": bytes(MAX_SEALED_BYTES + 1)}, "message-size"),
            ({"signature": bytes(63)}, "message-size"),
        ],
    )
    def test_no_box(self, change: dict[str, Any], code: str) -> None:
        box = answered(asked()[1])
        assert refusal(MalformedMessage, replace, box, **change) == (code, None)

    def test_a_signature_covers_every_field(self) -> None:
        pending, request = asked()
        other = asked(C, seed="other")[1]
        requests = [
            replace(request, epoch=3),
            replace(request, silo=C),
            replace(request, ephemeral=other.ephemeral),
        ]
        assert len({message.body() for message in [request, *requests]}) == 4
        box = answered(request)
        boxes = [
            replace(box, epoch=3),
            replace(box, sender=C),
            replace(box, recipient=C),
            replace(box, sender_ephemeral=other.ephemeral),
            replace(box, recipient_ephemeral=other.ephemeral),
            replace(box, key_id=bytes(32)),
            replace(box, sealed=box.sealed + b"\0"),
        ]
        assert len({message.body() for message in [box, *boxes]}) == 8
        for changed in boxes:
            with pytest.raises(FaultyClientOrServer):
                unwrap(pending, changed, silo(B))


class TestWrap:
    def test_a_silo_without_keys_answers_nobody(self) -> None:
        _, request = asked()
        stale = replace(RING, floor=key(3).name)
        for ring in (Keyring(SESSION), stale):
            assert refusal(OutOfOrder, answered, request, ring) == ("key-none", None)

    def test_its_own_request_comes_back(self) -> None:
        _, request = asked(A)
        assert refusal(FaultyServer, answered, request) == ("key-request-own", None)

    def test_the_coordinator_puts_in_an_ephemeral_of_its_own(self) -> None:
        mine = KeyPair.generate(keyed("coordinator")).public
        forged = replace(asked()[1], ephemeral=mine)
        code = ("key-request-signature", "b")
        assert refusal(FaultyClientOrServer, answered, forged) == code

    def test_the_coordinator_asks_for_another_silo(self) -> None:
        forged = replace(asked(B)[1], silo=C)
        code = ("key-request-signature", "c")
        assert refusal(FaultyClientOrServer, answered, forged) == code

    def test_a_request_of_another_session(self) -> None:
        elsewhere = replace(silo(B), transcript=bytes(32))
        _, request = ask(elsewhere, 2, keyed("elsewhere"))
        code = ("key-request-signature", "b")
        assert refusal(FaultyClientOrServer, answered, request) == code

    def test_a_signature_of_another_kind(self) -> None:
        _, request = asked()
        signature = identity(B).sign(SIGN_KEY_BOX, TRANSCRIPT, request.body())
        code = ("key-request-signature", "b")
        forged = replace(request, signature=signature)
        assert refusal(FaultyClientOrServer, answered, forged) == code

    def test_a_revoked_silo_asks(self) -> None:
        _, request = asked(B)
        me = silo(A, listed(A, C))
        code = ("key-request-silo", "b")
        assert refusal(FaultyClientOrServer, wrap, RING, request, me, keyed("")) == code

    def test_a_stranger_asks(self) -> None:
        _, request = asked(D)
        code = ("key-request-silo", "d")
        assert refusal(FaultyClientOrServer, answered, request) == code

    @pytest.mark.parametrize("epoch", [1, 3])
    def test_an_epoch_that_is_over_or_not_begun(self, epoch: int) -> None:
        _, request = asked(epoch=epoch)
        code = ("key-request-epoch", "b")
        assert refusal(FaultyClientOrServer, answered, request) == code

    def test_a_silo_that_was_enrolled_after_the_key_was_made(self) -> None:
        now = listed(A, B, C, D)
        _, request = ask(silo(D, now), 2, keyed("newcomer"))
        code = ("key-request-newcomer", "d")
        me = silo(A, now)
        assert refusal(FaultyClientOrServer, wrap, RING, request, me, keyed("")) == code
        # With the next epoch it gets all.
        keys = (*RING.keys, key(3, now))
        pending, request = ask(silo(D, now), 3, keyed("newcomer"))
        box = wrap(RING.add(keys, A), request, me, keyed(""))
        assert unwrap(pending, box, silo(D, now)) == keys

    def test_a_silo_that_came_back_with_another_identity(self) -> None:
        now = {**MEMBERS, B: identity("b, enrolled again").public}
        again = replace(silo(B, now), identity=identity("b, enrolled again"))
        _, request = ask(again, 2, keyed("again"))
        code = ("key-request-newcomer", "b")
        me = silo(A, now)
        assert refusal(FaultyClientOrServer, wrap, RING, request, me, keyed("")) == code


def test_a_box_holds_the_newest_keys_if_not_all(monkeypatch: pytest.MonkeyPatch) -> None:
    pending, request = asked()
    room = len(pack_keys(RING.keys[1:])) + TAG_BYTES
    monkeypatch.setattr(custody, "MAX_SEALED_BYTES", room)
    assert unwrap(pending, answered(request), silo(B)) == RING.keys[1:]


class TestUnwrap:
    def test_its_own_box_comes_back(self) -> None:
        pending, request = asked()
        box = re_signed(answered(request), sender=B)
        assert refusal(FaultyServer, unwrap, pending, box, silo(B)) == (
            "key-box-own",
            None,
        )

    def test_the_coordinator_puts_in_an_ephemeral_of_its_own(self) -> None:
        pending, request = asked()
        mine = KeyPair.generate(keyed("coordinator"))
        box = replace(answered(request), sender_ephemeral=mine.public)
        bound = enc(TRANSCRIPT, box.head())
        sealed = seal_once(
            custody._box_key(mine, request.ephemeral, box, bound), pack_keys(RING.keys), bound
        )
        forged = replace(box, sealed=sealed)
        code = ("key-box-signature", "a")
        assert refusal(FaultyClientOrServer, unwrap, pending, forged, silo(B)) == code

    def test_a_box_of_a_silo_that_is_no_member(self) -> None:
        pending, request = asked()
        forged = re_signed(answered(request), sender=D)
        code = ("key-box-silo", "d")
        assert refusal(FaultyClientOrServer, unwrap, pending, forged, silo(B)) == code
        genuine, me = answered(request), silo(B, listed(B, C))
        code = ("key-box-silo", "a")
        assert refusal(FaultyClientOrServer, unwrap, pending, genuine, me) == code

    def test_a_member_forges_another_ones_box(self) -> None:
        pending, request = asked()
        box = answered(request)
        forged = replace(box, signature=identity(C).sign(SIGN_KEY_BOX, TRANSCRIPT, box.body()))
        code = ("key-box-signature", "a")
        assert refusal(FaultyClientOrServer, unwrap, pending, forged, silo(B)) == code

    def test_a_box_of_another_session(self) -> None:
        pending, request = asked()
        elsewhere = replace(silo(B), transcript=bytes(32))
        box = answered(request)
        code = ("key-box-signature", "a")
        assert refusal(FaultyClientOrServer, unwrap, pending, box, elsewhere) == code

    def test_a_signature_of_another_kind(self) -> None:
        pending, request = asked()
        box = answered(request)
        signature = identity(A).sign(SIGN_KEY_REQUEST, TRANSCRIPT, box.body())
        forged = replace(box, signature=signature)
        code = ("key-box-signature", "a")
        assert refusal(FaultyClientOrServer, unwrap, pending, forged, silo(B)) == code

    def test_a_box_for_another_silo(self) -> None:
        pending, _ = asked(B)
        box = answered(asked(C)[1])
        code = ("key-box-request", "a")
        assert refusal(FaultyClientOrServer, unwrap, pending, box, silo(B)) == code

    def test_a_box_of_an_older_epoch(self) -> None:
        old = answered(asked(epoch=1)[1], Keyring(SESSION, None, (key(1),)))
        code = ("key-box-request", "a")
        for seed in ("", "fresh"):  # even with an ephemeral that comes twice
            pending, _ = asked(epoch=2, seed=seed)
            assert refusal(FaultyClientOrServer, unwrap, pending, old, silo(B)) == code

    def test_a_box_for_an_earlier_request(self) -> None:
        box = answered(asked(seed="earlier")[1])
        pending, _ = asked(seed="later")
        code = ("key-box-request", "a")
        assert refusal(FaultyClientOrServer, unwrap, pending, box, silo(B)) == code

    def test_a_sender_seals_what_does_not_open(self) -> None:
        pending, request = asked()
        box = answered(request)
        for bad in (
            re_signed(box, sealed=bytes(100)),
            re_signed(box, sealed=box.sealed[:-1]),
            re_signed(box, key_id=bytes(32)),
            re_signed(box, sender_ephemeral=asked(seed="x")[1].ephemeral),
            re_signed(box, sender=C),
        ):
            code = ("key-box-sealed", bad.sender)
            assert refusal(FaultyClient, unwrap, pending, bad, silo(B)) == code

    @pytest.mark.parametrize(
        "plaintext",
        [
            b"",
            bytes(4),
            key(2).material.reveal(),
            pack_keys((key(1), key(2))) + b"\0",
            pack_keys((key(2), key(1))),
            b"\x5e\xa1\x10\x04\x01\x00" + bytes(1000),  # the header of a serialised SEAL object
        ],
        ids=["nothing", "no-keys", "bare-key", "trailing", "order", "seal-object"],
    )
    def test_a_box_with_anything_but_keys(self, plaintext: bytes) -> None:
        pending, request = asked()
        box = holding(plaintext, request)
        code = ("key-format", "a")
        assert refusal(FaultyClient, unwrap, pending, box, silo(B)) == code

    @given(st.binary(max_size=300))
    @settings(deadline=None)
    def test_a_box_with_anything(self, plaintext: bytes) -> None:
        pending, request = asked()
        with pytest.raises(FaultyClient):
            unwrap(pending, holding(plaintext, request), silo(B))

    def test_a_box_whose_newest_key_is_not_the_one_it_names(self) -> None:
        pending, request = asked()
        code = ("key-box-key", "a")
        elsewhere = make_key(bytes(32), 2, MEMBERS, keyed("epoch 2"))
        for keys, changes in (
            ((key(1),), {}),
            ((key(1), key(2), key(3)), {}),
            ((key(2),), {"key_id": key(1).name.key_id}),
            ((key(1),), {"key_id": key(1).name.key_id}),
            ((elsewhere,), {"key_id": elsewhere.name.key_id}),
            ((key(2, listed(A, B)),), {}),
        ):
            box = holding(pack_keys(keys), request, **changes)
            assert refusal(FaultyClient, unwrap, pending, box, silo(B)) == code

    @pytest.mark.parametrize(
        "members",
        [
            listed(A, C),
            listed(B, C),
            {**MEMBERS, A: bytes(32)},
            {**MEMBERS, B: bytes(32)},
            {**MEMBERS, SiloId("zzz"): bytes(32)},
        ],
    )
    def test_a_key_that_was_not_made_for_the_silos_of_now(
        self, members: dict[SiloId, bytes]
    ) -> None:
        pending, request = asked()
        made = key(2, members)
        box = holding(pack_keys((made,)), request, key_id=made.name.key_id)
        code = ("key-box-members", "a")
        assert refusal(FaultyClientOrServer, unwrap, pending, box, silo(B)) == code

    def test_a_silo_that_was_revoked_itself(self) -> None:
        """No honest silo gives it anything; a key that another one gives is not for it."""
        pending, request = asked()
        me = silo(B, listed(A, C))
        code = ("key-box-members", "a")
        assert refusal(FaultyClientOrServer, unwrap, pending, answered(request), me) == code


def altered(message: Any, field: str, data: st.DataObject) -> Any:
    """The message with one byte of a field changed."""
    value = bytearray(getattr(message, field))
    value[data.draw(st.integers(0, len(value) - 1))] ^= data.draw(st.integers(1, 255))
    return replace(message, **{field: bytes(value)})


@given(st.sampled_from(["ephemeral", "signature"]), st.data())
@settings(deadline=None)
def test_an_altered_request_is_never_answered(field: str, data: st.DataObject) -> None:
    _, request = asked()
    with pytest.raises((MalformedMessage, FaultyClientOrServer)):
        answered(altered(request, field, data))


@given(
    st.sampled_from(
        ["sender_ephemeral", "recipient_ephemeral", "key_id", "sealed", "signature"],
    ),
    st.data(),
)
@settings(deadline=None)
def test_an_altered_box_is_never_taken(field: str, data: st.DataObject) -> None:
    pending, request = asked()
    box = answered(request)
    with pytest.raises((MalformedMessage, FaultyClientOrServer)):
        unwrap(pending, altered(box, field, data), silo(B))


def test_two_first_silos() -> None:
    """The coordinator tells two silos that they are the first; the third notices."""
    one = Keyring(SESSION, None, (make_key(SESSION, 1, MEMBERS, keyed("of a")),))
    two = Keyring(SESSION, None, (make_key(SESSION, 1, MEMBERS, keyed("of c")),))
    pending, request = asked(epoch=1)
    first, second = answered(request, one, A), answered(request, two, C)
    ring = Keyring(SESSION).add(unwrap(pending, first, silo(B)), first.sender)
    keys = unwrap(pending, second, silo(B))
    code = ("key-replaced", "c")
    assert refusal(FaultyClientOrServer, ring.add, keys, second.sender) == code


def test_a_box_is_bound_to_all_that_it_names() -> None:
    """Even with the box's key at hand, it opens under no other head."""
    pending, request = asked()
    box = answered(request)
    bound = enc(TRANSCRIPT, box.head())
    box_key = custody._box_key(pending.ephemeral, box.sender_ephemeral, box, bound)
    assert open_once(box_key, box.sealed, bound) == pack_keys(RING.keys)
    for other in (replace(box, epoch=1), replace(box, sender=C), replace(box, key_id=bytes(32))):
        with pytest.raises(MalformedMessage):
            open_once(box_key, box.sealed, enc(TRANSCRIPT, other.head()))
