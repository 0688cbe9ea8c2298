"""The session's key on its way from silo to silo, and everywhere else that it must not be.

The silos are the product's functions, what is relayed is in the coordinator's hands. The last tests
run the SDK against a coordinator's process and search what reached it.
"""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import client_sdk
from client_sdk import channel as sdk_channel
from client_sdk import keys as sdk_keys
from secagg.ckks import custody, kernel
from secagg.ckks.custody import Custodian, KeyBox, Pending, ask, unwrap, wrap
from secagg.ckks.engine import Engine
from secagg.ckks.keyring import HeldKey, Keyring, make_key, pack_keys, unpack_keys
from secagg.config import Protection, SiloId
from secagg.crypto.keys import KeyPair
from secagg.crypto.labels import enc
from secagg.crypto.secret import Secret
from secagg.crypto.sign import IdentityKey
from secagg.errors import FaultyClientOrServer, PolicyRefused
from secagg.suite import Suite

from .harness import A, B, C, D, nothing, refused, weakened

SESSION, TRANSCRIPT = bytes(range(32)), bytes(range(32, 64))
ROOT = Path(__file__).resolve().parents[2]


class Session:
    """Silos of one session, and keys that they made."""

    def __init__(self, *names: SiloId) -> None:
        self.identities = {name: IdentityKey.generate(os.urandom) for name in names}
        self.members = {name: key.public for name, key in self.identities.items()}

    def silo(self, name: SiloId) -> Custodian:
        return Custodian(name, self.identities[name], self.members, SESSION, TRANSCRIPT)

    def key(self, epoch: int) -> HeldKey:
        return make_key(SESSION, epoch, self.members, os.urandom)


def ring(*keys: HeldKey) -> Keyring:
    return Keyring(SESSION, None, keys)


def read_box(pair: KeyPair, box: KeyBox) -> tuple[HeldKey, ...]:
    """What a box holds, for who has the private half that it was sealed for."""
    bound = enc(TRANSCRIPT, box.head())
    key = custody._box_key(pair, box.sender_ephemeral, box, bound)
    return unpack_keys(SESSION, custody.open_once(key, box.sealed, bound))


def test_ephemeral_of_a_request_swapped() -> None:
    """The coordinator puts its own ephemeral into B's request, and opens the box on its way."""
    session, mine = Session(A, B, C), KeyPair.generate(os.urandom)
    key = session.key(1)

    def attack() -> tuple[HeldKey, ...]:
        _, request = ask(session.silo(B), 1, os.urandom)
        swapped = replace(request, ephemeral=mine.public)
        return read_box(mine, wrap(ring(key), swapped, session.silo(A), os.urandom))

    with weakened(custody, "_check_signature", nothing):
        assert attack()[0].material == key.material
    with refused("key-request-signature", FaultyClientOrServer):
        attack()


def test_ephemeral_of_a_box_swapped() -> None:
    """The coordinator answers in A's name with a key of its own, which B would seal under."""
    session, mine = Session(A, B, C), KeyPair.generate(os.urandom)
    planted = session.key(1)

    def attack() -> tuple[HeldKey, ...]:
        pending, request = ask(session.silo(B), 1, os.urandom)
        box = wrap(ring(session.key(1)), request, session.silo(A), os.urandom)
        forged = replace(box, sender_ephemeral=mine.public, key_id=planted.name.key_id)
        bound = enc(TRANSCRIPT, forged.head())
        key = custody._box_key(mine, request.ephemeral, forged, bound)
        sealed = custody.seal_once(key, pack_keys((planted,)), bound)
        return unwrap(pending, replace(forged, sealed=sealed), session.silo(B))

    with weakened(custody, "_check_signature", nothing):
        assert attack() == (planted,)
    with refused("key-box-signature", FaultyClientOrServer):
        attack()


def test_box_of_an_older_epoch() -> None:
    """D left with the key of epoch 1. B comes back, and is led to that key by its old box."""
    session = Session(A, B, C)
    first, second = session.key(1), session.key(2)
    pair = KeyPair.generate(os.urandom)  # drawn again: B's machine was set back
    old = ask(session.silo(B), 1, lambda _: pair.private.reveal())
    box = wrap(ring(first), old[1], session.silo(A), os.urandom)

    def attack(remembered: Keyring) -> HeldKey | None:
        pending, _ = ask(session.silo(B), 2, lambda _: pair.private.reveal())
        keys = custody.unwrap(pending, box, session.silo(B))
        return remembered.add(keys, box.sender).newest

    def believing(pending: Pending, box: KeyBox, me: Custodian) -> tuple[HeldKey, ...]:
        """A silo that takes a box for the answer to whatever it asked."""
        return unwrap(Pending(box.epoch, pending.ephemeral), box, me)

    ledger = Keyring(SESSION, second.name)  # its keys are gone, its ledger is not
    with refused("key-box-request", FaultyClientOrServer):
        attack(ledger)
    with weakened(custody, "unwrap", believing):
        assert attack(Keyring(SESSION)) == first  # a silo without memory goes back
        with refused("key-epoch", FaultyClientOrServer):
            attack(ledger)


def test_two_silos_make_a_key() -> None:
    """Told to be the first, A and B both make epoch 1's key: C would change from one to another."""
    session = Session(A, B, C)
    keys = {A: session.key(1), B: session.key(1)}

    def given(sender: SiloId) -> tuple[HeldKey, ...]:
        pending, request = ask(session.silo(C), 1, os.urandom)
        box = wrap(ring(keys[sender]), request, session.silo(sender), os.urandom)
        return unwrap(pending, box, session.silo(C))

    def attack() -> list[HeldKey | None]:
        held = ring().add(given(A), A)
        return [held.newest, held.add(given(B), B).newest]

    def changing(held: Keyring, taken: Sequence[HeldKey], sender: SiloId) -> Keyring:
        return replace(held, keys=tuple(taken))

    with weakened(Keyring, "add", changing):
        assert attack() == [keys[A], keys[B]]  # uploads under two keys, and a sum that never opens
    with refused("key-replaced", FaultyClientOrServer):
        attack()
    after_a_restart = Keyring(SESSION, keys[A].name)
    with refused("key-replaced", FaultyClientOrServer):
        after_a_restart.add(given(B), B)
    # Silos that were kept apart from the start meet in no round: test_round_under_another_key.


def test_key_for_a_newcomer() -> None:
    """D was enrolled after the key was made. With the key, its leaving would end no epoch."""
    early, session = Session(A, B, C), Session(A, B, C, D)
    session.identities |= early.identities
    session.members = {**session.members, **early.members}
    key = early.key(1)

    def attack() -> HeldKey:
        pending, request = ask(session.silo(D), 1, os.urandom)
        box = wrap(ring(key), request, session.silo(A), os.urandom)
        return read_box(pending.ephemeral, box)[0]

    with weakened(HeldKey, "is_for", lambda *_: True):
        assert attack() == key
    without_d = {name: session.members[name] for name in (A, B, C)}
    ring(key).check(key.name, without_d, 0)  # D leaves, and the round goes on under its key
    with refused("key-request-newcomer", FaultyClientOrServer):
        attack()


# A whole session, and all that reaches the coordinator.


@pytest.fixture(scope="module")
def sdk() -> Iterator[Any]:
    """``tests.sdk.federation``, however pytest was started."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT))
        yield importlib.import_module("tests.sdk.federation")


@pytest.fixture
def federation(sdk: Any, tmp_path: Path) -> Iterator[Any]:
    consortium = sdk.Consortium(tmp_path / "consortium")
    yield sdk.Federation(consortium, tmp_path)
    consortium.close()


class Witness:
    """Notes every secret that custody and sealing draw, and every byte that leaves a silo."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.secrets: dict[str, bytes] = {}
        self.sent = bytearray()
        self.methods: set[str] = set()
        make, pair, ternary = make_key, KeyPair.generate, kernel.ternary
        call, call_many = sdk_channel.Channel.call, sdk_channel.Channel.call_many

        def making(*given: Any) -> HeldKey:
            key = make(*given)
            self.secrets[f"key {key.epoch}"] = key.material.reveal()
            return key

        def drawing(entropy: Any) -> KeyPair:
            drawn = pair(entropy)
            self.secrets[f"private {len(self.secrets)}"] = drawn.private.reveal()
            return drawn

        def deriving(suite: Suite, material: Secret) -> Any:
            secret = ternary(suite, material)
            self.secrets["s"] = secret.tobytes()[:64]
            self.secrets["s residues"] = Engine(suite).encoded_secret(secret)[:8].tobytes()
            return secret

        def calling(channel: Any, method: str, request: Any, *rest: Any, **options: Any) -> Any:
            self.methods.add(method)
            self.sent += request.SerializeToString()
            return call(channel, method, request, *rest, **options)

        def calling_many(channel: Any, method: str, requests: Any, *rest: Any) -> Any:
            def noted() -> Iterator[Any]:
                for request in requests:
                    self.methods.add(method)
                    self.sent += request.SerializeToString()
                    yield request

            return call_many(channel, method, noted(), *rest)

        patch.setattr(sdk_keys, "make_key", making)
        patch.setattr(KeyPair, "generate", drawing)
        patch.setattr(kernel, "ternary", deriving)
        patch.setattr(sdk_channel.Channel, "call", calling)
        patch.setattr(sdk_channel.Channel, "call_many", calling_many)

    def found(self, *places: bytes) -> set[str]:
        """Which secrets stand anywhere, as bytes, in hexadecimal or as Python shows them."""
        text = b"\n".join((bytes(self.sent), *places))
        return {
            name.split()[0]
            for name, secret in self.secrets.items()
            if any(
                form in text
                for form in (secret, secret.hex().encode(), repr(secret)[2:-1].encode())
            )
        }


def seen_of(federation: Any, log: pytest.LogCaptureFixture) -> list[bytes]:
    """The coordinator's state and log, the silos' logs and their state."""
    served = federation.consortium.root / "serve"
    files = [place for place in served.rglob("*") if place.is_file()]
    silos = [federation.silo(name) for name in "abcd"]
    kept = [place for silo in silos for place in (silo / "state").rglob("*") if place.is_file()]
    assert files
    assert kept
    files += kept
    return [log.text.encode(), *(place.read_bytes() for place in files)]


def test_key_is_nowhere(federation: Any, caplog: pytest.LogCaptureFixture) -> None:
    """A session's bytes hold no key; were boxes not sealed, the same search would find it."""
    caplog.set_level(logging.DEBUG)

    def session_seen(patch: pytest.MonkeyPatch) -> set[str]:
        witness = Witness(patch)
        name = federation.create(protection=Protection.CKKS_MASKED)

        def program(session: Any) -> Any:
            return session.aggregate("training", {"x": np.full(8, 0.5)}, weight=1.0, metrics={})

        outcomes = federation.play(name, program)
        assert all(np.allclose(out.tensors["x"], 0.5, atol=1e-6) for out in outcomes.values())
        assert {"AskKey", "AnnounceKey", "SendKeyBox", "PutChunk"} <= witness.methods
        assert {"key", "private", "s"} == {name.split()[0] for name in witness.secrets}
        return witness.found(*seen_of(federation, caplog))

    def open_box(key: Secret, box: bytes, associated: bytes) -> bytes:
        return box[:-16]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(custody, "seal_once", lambda key, plaintext, bound: plaintext + bytes(16))
        patch.setattr(custody, "open_once", open_box)
        assert session_seen(patch) == {"key"}
    with pytest.MonkeyPatch.context() as patch:
        assert session_seen(patch) == set()


def test_plain_ckks_moves_no_key_without_the_operator(federation: Any) -> None:
    """A silo leaves before it asks for a key, or shows one, where its policy does not name ckks."""
    name = federation.create(protection=Protection.CKKS)
    with pytest.MonkeyPatch.context() as patch:
        witness = Witness(patch)
        with refused("policy-protection", PolicyRefused):
            client_sdk.join(name, profile=federation.silo("a"))
    assert witness.methods == {"JoinSession"}
    assert witness.secrets == {}
