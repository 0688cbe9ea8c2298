"""Sealed updates: the session's key on its way, its age, and what opened sums tell.

Under plain ``ckks`` whoever has the key reads each upload, so a key in the wrong hands shows at
once; sessions here are of that kind where it makes the attack plain. ``Holder`` is silo d, which
colludes and makes the key. Sources: Canetti and Krawczyk (ePrint 2001/040) for how the key goes
round; Li and Micciancio (ePrint 2020/1533) for what sums give away; own analysis of the design.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import replace
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from secagg.ckks import custody, slots
from secagg.ckks.codec import codec_of
from secagg.ckks.custody import Custodian, KeyBox, KeyRequest, ask, wrap
from secagg.ckks.kernel import Kernel
from secagg.ckks.keyring import HeldKey, Keyring, make_key, pack_keys, unpack_keys
from secagg.ckks.sealing import Sealer
from secagg.config import (
    Clip,
    Protection,
    SessionConfig,
    SiloId,
    TaskConfig,
    Weighting,
    silo_id,
)
from secagg.crypto.keys import KeyPair
from secagg.crypto.labels import enc
from secagg.crypto.secret import Secret
from secagg.encoding.schema import Schema
from secagg.errors import MalformedMessage
from secagg.masking import client, transcript
from secagg.masking.messages import AdvertiseKeys, Result
from secagg.pki.manifest import SignedManifest
from secagg.ring.vectors import Vector
from secagg.suite import SUMS_PER_KEY, KeyName, Suite
from secagg.wire import custody as wire_custody
from secagg.wire import session as wire_session
from secagg.wire._pb import service_pb2 as api
from secagg.wire.attempt import key_from_wire
from threat_model.attacks.attack import Refused, Scene, attack
from threat_model.attacks.attempt import Attempt
from threat_model.attacks.evil_coordinator import (
    BOUND,
    LENGTH,
    TASK,
    EvilCoordinator,
    make_session,
)
from threat_model.attacks.on_models import proposal
from threat_model.attacks.weak import Function, nothing, replaced, without

A, B, C, D = (silo_id(name) for name in "abcd")
HONEST: Final = (A, B, C)
SUITE: Final = Suite.CKKS_54
Q, N = SUITE.parameters.modulus, SUITE.parameters.degree
DRAWN_BEFORE: Final = 4 + 2 * len(HONEST)
"""Of 32 bytes, before a seed of c1: an ephemeral, keys, and two salts for each holder."""
Reals = npt.NDArray[np.float64]


# A silo in the adversary's hands that has the key, and what is done with a key.


def custodian(evil: EvilCoordinator, name: SiloId) -> Custodian:
    """A silo as others see it in the key's custody."""
    identity = evil.consortium.credentials(name).identity_key
    assert identity is not None
    bound = transcript.opening_transcript(evil.session_hash, evil.session_id)
    return Custodian(name, identity, members(evil), evil.session_id, bound)


def members(evil: EvilCoordinator) -> dict[SiloId, bytes]:
    """Identity keys of the session's silos that are in the manifest."""
    known = evil.manifest.manifest.silos
    return {name: known[name] for name in evil.session.silos if name in known}


class Holder:
    """d, which has made the session's keys and gives them to whoever asks.

    Args:
        evil: the coordinator; it relays.
        epochs: how many keys there are.
    """

    def __init__(self, evil: EvilCoordinator, epochs: int = 1) -> None:
        self._evil = evil
        self._me = custodian(evil, D)
        self.keys = tuple(
            make_key(evil.session_id, epoch + 1, members(evil), os.urandom)
            for epoch in range(epochs)
        )
        evil.lies["AskKey"] = self._give

    @property
    def name(self) -> KeyName:
        """The newest key's."""
        return self.keys[-1].name

    def _give(self, _silo: SiloId, request: Any) -> api.AskKeyReply:
        wish, newest = wire_custody.request_from_wire(request.request), self.keys[-1].epoch
        if wish.epoch < newest:
            return api.AskKeyReply(epoch=newest)
        if wish.epoch > newest:
            return nobody_answers(self._evil)
        ring = Keyring(self._evil.session_id, None, self.keys)
        return boxed(wrap(ring, wish, self._me, os.urandom))


def nobody_answers(evil: EvilCoordinator) -> api.AskKeyReply:
    """What is said to who has to wait for a key."""
    evil.linger()
    return api.AskKeyReply()


def boxed(box: KeyBox) -> api.AskKeyReply:
    """A box on its way."""
    return api.AskKeyReply(box=wire_custody.box_to_wire(box))


def read_box(pair: KeyPair, box: KeyBox, me: Custodian) -> tuple[HeldKey, ...]:
    """What a box holds, for who has the private half that it was sealed for."""
    bound = enc(me.transcript, box.head())
    key = custody._box_key(pair, box.sender_ephemeral, box, bound)
    return unpack_keys(me.session_id, custody.open_once(key, box.sealed, bound))


def opened(evil: EvilCoordinator, key: HeldKey, words: Vector, seeds: Iterable[bytes]) -> Reals:
    """What words open to under a key.

    Raises:
        MalformedMessage: nothing that silos have sealed.
    """
    codec: Any = evil.codec
    with closing(Sealer(SUITE, key.material, workers=1)) as sealer:
        found: Reals = codec.decode(words, sealer, list(seeds)).tensors["x"]
    return found


def sealed_session(protection: str = "ckks", **changes: Any) -> SessionConfig:
    """A session of four silos whose updates are sealed."""
    return make_session(protection=Protection(protection), **changes)


class Sealed(Attempt):
    """One attempt at a sum that is sealed and not masked."""

    def seal(self, *names: SiloId) -> None:
        """Phase 3: these (all) upload what they sealed."""
        self.commits = self._tell_all(names or self.adverts, lambda _: self.roster)

    def to_sealed(self) -> Sealed:
        """All phases until the vectors are there."""
        self.advertise()
        self.seal()
        return self

    def reads_alone(self, key: HeldKey, victim: SiloId) -> bool:
        """Whether one silo's upload opens to its update under a key."""
        found = opened(self.evil, key, self.uploads[victim], [self.commits[victim].seed])
        return bool(np.allclose(found, self.evil.values[victim], atol=1e-4))

    def release(self, total: Vector) -> None:
        """Phases 4 and 6: all sign, and have this sum for the result."""
        self.sign(*self.commits)
        result = self.result(total, *self.commits)
        for name in self.commits:
            self.evil.release(name, result, total)

    def sum(self) -> Vector:
        """All uploads' sum."""
        ring: Any = self.ring
        total = ring.zeros(self.evil.codec.length)
        for upload in self.uploads.values():
            ring.add(total, upload)
        ring.reduce(total)
        return total

    @property
    def tau2(self) -> bytes:
        """τ1: nothing is dealt."""
        return self.tau1


# The key on its way.


@attack(
    threat="swapped-ephemeral",
    reason="key-request-signature",
    weakening=replaced("secagg.ckks.custody:_check_signature", nothing),
)
def swapped_request(scene: Scene) -> bool:
    """The coordinator asks a for the key in b's name, with an ephemeral of its own."""
    with EvilCoordinator(scene, sealed_session("ckks+masked")) as evil:
        mine, boxes = KeyPair.generate(os.urandom), list[KeyBox]()
        wish = wire_custody.request_to_wire(KeyRequest(1, B, mine.public, bytes(64)))
        evil.lies |= {
            "AskKey": lambda *_: api.AskKeyReply(make=True),
            "AwaitKeyRequests": lambda *_: api.AwaitKeyRequestsReply(requests=[wish]),
            "SendKeyBox": lambda _, sent: boxes.append(wire_custody.box_from_wire(sent.box)),
        }
        evil.start("a")
        evil.until("a", "key-request-signature", lambda: boxes)
        return read_box(mine, boxes[0], custodian(evil, B))[-1].name == announced(evil)


def announced(evil: EvilCoordinator) -> KeyName | None:
    """The name of the key that a silo made."""
    sent = [request for _, method, request in list(evil.seen) if method == "AnnounceKey"]
    return key_from_wire(sent[-1])


@attack(
    threat="swapped-ephemeral",
    reason="key-box-signature",
    weakening=replaced("secagg.ckks.custody:_check_signature", nothing),
)
def planted_key(scene: Scene) -> bool:
    """The coordinator answers in d's name with its own key: all seal under it, and a is read."""
    with EvilCoordinator(scene, sealed_session(), colluders="d") as evil:
        key = make_key(evil.session_id, 1, members(evil), os.urandom)
        mine, bound = KeyPair.generate(os.urandom), custodian(evil, D).transcript

        def answer(silo: SiloId, request: Any) -> api.AskKeyReply:
            wish = wire_custody.request_from_wire(request.request)
            if wish.epoch > 1:
                return nobody_answers(evil)
            box = KeyBox(
                1, D, silo, mine.public, wish.ephemeral, key.name.key_id, bytes(16), bytes(64)
            )
            seal = enc(bound, box.head())
            under = custody._box_key(mine, wish.ephemeral, box, seal)
            return boxed(replace(box, sealed=custody.seal_once(under, pack_keys((key,)), seal)))

        evil.lies["AskKey"] = answer
        evil.start()
        evil.until("a", "key-box-signature", lambda: evil.readies("a"))
        return Sealed(evil, HONEST, key=key.name).to_sealed().reads_alone(key, A)


def given_to_all(_real: Function) -> Function:
    """``HeldKey.is_for`` that gives a key to who came after it was made."""
    return lambda *_: True


@attack(
    threat="newcomer-key",
    reason="key-request-newcomer",
    weakening=replaced("secagg.ckks.keyring:HeldKey.is_for", given_to_all),
)
def newcomer(scene: Scene) -> bool:
    """d is enrolled when the key is made, and asks for it: its leaving would end no epoch."""
    with EvilCoordinator(scene, sealed_session("ckks+masked")) as evil:
        everybody = evil.manifest
        evil.manifest = changed_manifest(evil, 1, without=D)
        boxes, wishes = list[KeyBox](), list[Any]()
        evil.lies |= {
            "AskKey": lambda *_: api.AskKeyReply(make=True),
            "AwaitKeyRequests": lambda *_: api.AwaitKeyRequestsReply(requests=wishes),
            "SendKeyBox": lambda _, sent: boxes.append(wire_custody.box_from_wire(sent.box)),
        }
        me = custodian(evil, D)
        pending, request = ask(me, 1, os.urandom)

        def enrol(*_: Any) -> None:
            evil.manifest = changed_manifest(evil, 2, silos=everybody.manifest.silos)
            wishes.append(wire_custody.request_to_wire(request))

        evil.lies["AnnounceKey"] = enrol
        evil.start("a")
        evil.until("a", "key-request-newcomer", lambda: boxes)
        return read_box(pending.ephemeral, boxes[0], me)[-1].name == announced(evil)


def changed_manifest(
    evil: EvilCoordinator,
    later: int,
    *,
    without: SiloId | None = None,
    silos: Mapping[SiloId, bytes] | None = None,
) -> SignedManifest:
    """What the authority signs as the membership changes."""
    real = evil.consortium.authority.signed_manifest.manifest
    left = {name: key for name, key in (silos or real.silos).items() if name != without}
    changed = replace(real, version=real.version + later, silos=left)
    return SignedManifest.sign(changed, evil.consortium.authority.key_pem)


def any_box(_real: Function) -> Function:
    """``client_sdk.keys.Keys._obtain`` that takes whatever box opens for the newest key."""

    def obtain(self: Any, epoch: int, *_: Any) -> HeldKey:
        pending, reply = self._ask(max(epoch, 1))
        while reply.WhichOneof("answer") != "box":
            pending, reply = self._ask(reply.epoch)
        box = wire_custody.box_from_wire(reply.box)
        keys = read_box(pending.ephemeral, box, self._custodian())
        self._ring = Keyring(self._session_id, None, keys)
        return keys[-1]

    return obtain


@attack(
    threat="replayed-key-box",
    reason="key-box-request",
    weakening=replaced("client_sdk.keys:Keys._obtain", any_box),
)
def replayed_box(scene: Scene) -> bool:
    """a's machine is set back and draws its ephemeral again; the coordinator has kept a's box of
    epoch 1, and gives it for the answer in epoch 2.
    """
    with EvilCoordinator(scene, sealed_session("ckks+masked"), colluders="bcd") as evil:
        drawn, boxes = os.urandom(32), list[api.AskKeyReply]()
        holder = Holder(evil)
        give = evil.lies["AskKey"]

        def keep(silo: SiloId, request: Any) -> Any:
            boxes.append(give(silo, request))
            return boxes[-1]

        def replay(_silo: SiloId, request: Any) -> api.AskKeyReply:
            epoch = request.request.epoch
            return api.AskKeyReply(epoch=2) if epoch < 2 else boxes[0]

        evil.lies["AskKey"] = keep
        evil.start_one(A, draws=[drawn])
        evil.await_ready(A)
        evil.end(A)
        evil.lies["AskKey"] = replay
        evil.start_one(A, again=True, draws=[drawn, drawn])
        before = len(evil.readies(A))
        evil.until("a", "key-box-request", lambda: evil.readies(A)[before:])
        return key_from_wire(evil.readies(A)[-1]) == holder.name


# Keys that should not be used, or not be two.


@attack(threat="two-makers", reason="descriptor-key", weakening=without("descriptor-key"))
def two_makers(scene: Scene) -> bool:
    """Each of three silos is told to make the key. Under three keys the sum opens for nobody, and
    the round is lost with what everybody put into it.
    """
    with EvilCoordinator(scene, sealed_session(), colluders="d") as evil:
        evil.lies["AskKey"] = lambda *_: api.AskKeyReply(make=True)
        evil.start()
        evil.await_ready(*HONEST)
        return spoiled(evil, key_from_wire(evil.readies(A)[0]))


def spoiled(evil: EvilCoordinator, key: KeyName | None) -> bool:
    """Whether honest silos all do their part under this name, and their sum is noise to a."""
    attempt = Sealed(evil, HONEST, key=key).to_sealed()
    attempt.release(attempt.sum())
    try:
        evil.answer(A)
    except Refused as noise:
        return noise.code == "reserved-slot"
    return False


@attack(threat="stale-key", reason="descriptor-key", weakening=without("descriptor-key"))
def stale_key(scene: Scene) -> bool:
    """The silos have moved on to the key of epoch 2; the round is one of epoch 1's, under which the
    sum of what they seal is noise.
    """
    with EvilCoordinator(scene, sealed_session(), colluders="d") as evil:
        holder = Holder(evil, epochs=2)
        evil.start()
        evil.await_ready(*HONEST)
        assert key_from_wire(evil.readies(A)[0]) == holder.name
        return spoiled(evil, holder.keys[0].name)


def newest_whatever(_real: Function) -> Function:
    """``Keyring.check`` that asks neither who has the key nor what it has opened."""
    return lambda self, *_: self.newest


@attack(
    threat="revoked-key",
    reason="descriptor-key-revoked",
    weakening=replaced("secagg.ckks.keyring:Keyring.check", newest_whatever),
)
def revoked_key(scene: Scene) -> bool:
    """d has left, with the key; the coordinator goes on under it, and with d's help reads a."""
    session = sealed_session(max_attempts=2)
    with EvilCoordinator(scene, session, colluders="d") as evil:
        holder = Holder(evil)
        evil.start()
        Sealed(evil, HONEST, key=holder.name).advertise()
        evil.manifest = changed_manifest(evil, 1, without=D)
        evil.abort(*HONEST)
        evil.until("a", "descriptor-key-revoked", lambda: evil.readies(A)[1:])
        attempt = Sealed(evil, HONEST, number=2, key=holder.name).to_sealed()
        return attempt.reads_alone(holder.keys[0], A)


@attack(
    threat="worn-key",
    reason="descriptor-key-worn",
    weakening=replaced("secagg.ckks.keyring:Keyring.check", newest_whatever),
)
def worn_key(scene: Scene) -> bool:
    """The key has opened a thousand sums of another task, and the coordinator goes on under it."""
    plain = sealed_session("ckks+masked")
    other = TaskConfig("other", Weighting.SUM, 2 * SUMS_PER_KEY, BOUND, Clip.NONE, 1.0, None)
    session = replace(plain, tasks=(other, *plain.tasks))
    with EvilCoordinator(scene, session, colluders="bcd") as evil:
        holder = Holder(evil)
        opening = proposal(evil, D, task=other.name)
        make_up(evil, wire_session.opening_from_wire(opening).opening, holder.name, SUMS_PER_KEY)
        reply = api.OpenTaskReply(opening=opening)
        evil.lies["OpenTask"] = lambda _, asked: reply if asked.task == other.name else None
        evil.start("a")
        evil.until("a", "descriptor-key-worn", lambda: evil.readies(A))
        attempt = Attempt(evil, key=holder.name)
        return isinstance(attempt.tell(A, attempt.descriptor), AdvertiseKeys)


def make_up(
    evil: EvilCoordinator, opening: transcript.TaskOpening, key: KeyName, sums: int
) -> None:
    """Make up results of a task, over silos in the adversary's hands."""
    silos, task = (B, C, D), opening.digest(evil.session_hash)
    for number in range(1, sums + 1):
        base = transcript.base_of(evil.history, task)
        drawn = [os.urandom(32) for _ in range(2 + len(silos))]
        names = (silos, silos, drawn[0], drawn[1], bytes(64), key, tuple(drawn[2:]))
        evil.move_on(evil.sign_result(Result(opening.task, number, base, *names)))


# What opens, and what may not.


@attack(
    threat="unmasked-by-consent",
    reason="policy-protection",
    weakening=replaced("secagg.config:Policy.check_session", nothing),
)
def unmasked_without_consent(scene: Scene) -> bool:
    """Plain ckks, which no operator has named: with d's key the coordinator reads a's upload."""
    with EvilCoordinator(scene, sealed_session(), colluders="d") as evil:
        evil.floors = {"protections": '["masked", "ckks+masked"]'}
        holder = Holder(evil)
        evil.start()
        evil.await_ready(*HONEST)
        attempt = Sealed(evil, HONEST, key=holder.name).to_sealed()
        return attempt.reads_alone(holder.keys[0], A)


def off_the_grid(_real: Function) -> Function:
    """``ckks.sealing.released`` that rounds whatever opens."""

    def released(rows: Reals, _silos: int, limit: int) -> Reals:
        grid = 2.0**24
        rounded: Reals = np.rint(rows[:, 1:] * grid).reshape(-1) / (grid * limit)
        return rounded

    return released


@attack(
    threat="shifted-sum",
    reason="off-grid",
    weakening=replaced("secagg.ckks.sealing:released", off_the_grid),
)
def shifted_sum(scene: Scene) -> bool:
    """Parameters that nobody trains open to zero and noise. The coordinator moves the sum by half a
    step of the grid: what silos apply tells the side of the border that each value's noise is on.
    Sixteen such openings give the key (tests/threats/test_ckks.py).
    """
    with EvilCoordinator(scene, sealed_session(), colluders="d") as evil:
        holder = Holder(evil)
        evil.values = dict.fromkeys(evil.values, np.zeros(LENGTH))
        evil.start()
        evil.await_ready(*HONEST)
        attempt = Sealed(evil, HONEST, key=holder.name).to_sealed()
        half_steps, words = np.zeros(N), attempt.sum()
        half_steps[1 : 1 + LENGTH] = 2.0**-25
        words[:N] = (words[:N] + residues(half_steps)) % np.uint64(Q)
        attempt.release(words)
        told = np.array(evil.answer(A)[0]) > 0
        seeds = [attempt.commits[name].seed for name in HONEST]
        there = slots_of(words, seeds, holder.keys[0])[1 : 1 + LENGTH]
        return bool(np.array_equal(told, there > 2.0**-25))


def residues(row: Reals) -> Vector:
    """A row of slots as a polynomial, without noise."""
    embedding = slots.Embedding(N, SUITE.parameters.scale)
    whole = embedding.coefficients(row.reshape(1, N)) % Q
    pair = np.concatenate([whole, whole]).astype(np.uint64)
    words: Vector = Kernel(SUITE, Secret(bytes(32)))._engine.transform(pair)[0].copy()
    return words


def slots_of(words: Vector, seeds: Iterable[bytes] = (), key: HeldKey | None = None) -> Reals:
    """The slots of a sum's first ciphertext, noise and all; of a polynomial without a key."""
    kernel = Kernel(SUITE, key.material if key else Secret(bytes(32)))
    first, row = words[:N].reshape(1, N).copy(), np.empty(N)
    if key is not None:
        kernel._product.add_to(first, kernel._c1(list(seeds), 0, (1, N)))
    kernel._engine.decode(first[0], row)
    return row


def unmasked(_real: Function) -> Function:
    """``masking.client._masks`` that puts none on."""
    return lambda *_: []


@contextmanager
def clones(scene: Scene) -> Iterator[tuple[EvilCoordinator, Attempt]]:
    """An attempt with all vectors, in which a and c drew one seed of c1."""
    with EvilCoordinator(scene, sealed_session("ckks+masked"), colluders="d") as evil:
        holder, seed = Holder(evil), os.urandom(32)
        for name in HONEST:
            evil.start_one(name, draws=[] if name == B else [*[None] * DRAWN_BEFORE, seed])
        attempt = Attempt(evil, HONEST, key=holder.name).to_masked()
        assert attempt.commits[A].seed == attempt.commits[C].seed
        yield evil, attempt


@attack(
    threat="seed-repeated",
    reason="masked",
    weakening=replaced("secagg.masking.client:_masks", unmasked),
)
def difference_of_clones(scene: Scene) -> bool:
    """a and c are clones, and draw one seed of c1: without any key the coordinator subtracts their
    uploads, and reads the difference of two updates. Masks stand before it.
    """
    with clones(scene) as (evil, attempt):
        apart = (attempt.uploads[A] + np.uint64(Q) - attempt.uploads[C]) % np.uint64(Q)
        codec: Any = evil.codec
        read = slots_of(apart)[1 : 1 + LENGTH] * BOUND / codec.limit
        if np.allclose(read, evil.values[A] - evil.values[C], atol=1e-4):
            return True
        raise scene.refuse("masked", A, "the difference of two uploads is noise")


@attack(
    threat="seed-repeated",
    reason="survivors-seeds",
    weakening=without("survivors-seeds"),
)
def clones_open_their_sum(scene: Scene) -> bool:
    """The round of two clones goes on: all reveal for a sum in which one c1 is twice."""
    with clones(scene) as (_, attempt):
        attempt.unmask(*HONEST)
        return len(attempt.reveals) >= len(HONEST)


@attack(
    threat="colluding-key-holder",
    reason="reserved-slot",
    weakening=replaced("secagg.masking.client:_masks", unmasked),
)
def upload_of_one(scene: Scene) -> bool:
    """d gives the coordinator the key, which opens a's upload alone. Under ckks+masked it opens to
    noise.
    """
    with EvilCoordinator(scene, sealed_session("ckks+masked"), colluders="d") as evil:
        holder = Holder(evil)
        evil.start()
        attempt = Attempt(evil, HONEST, key=holder.name).to_masked()
        try:
            read = opened(evil, holder.keys[0], attempt.uploads[A], [attempt.commits[A].seed])
        except MalformedMessage as error:
            raise scene.refuse(error.code, A, "its upload opens to noise") from None
        return bool(np.allclose(read, evil.values[A], atol=1e-4))


def one_row(evil: EvilCoordinator) -> None:
    """Have updates that fill the first ciphertext, so that weights are in the second one."""
    evil.codec = codec_of(evil.session, TASK, Schema.of({"x": np.zeros(N - 1)}))
    for name in evil.values:
        words = np.frombuffer(os.urandom(4 * (N - 1)), "<u4")
        evil.values[name] = words / 2**32 * 0.1 - 0.05


def unrounded(_real: Function) -> Function:
    """``ckks.sealing.released`` that lets values out as they are, noise and all."""

    def released(rows: Reals, _silos: int, limit: int) -> Reals:
        values: Reals = (rows[:, 1:] / limit).reshape(-1)
        return values

    return released


@attack(
    threat="two-released-sums",
    reason="rounded",
    weakening=replaced("secagg.ckks.sealing:released", unrounded),
)
def key_from_a_sum(scene: Scene) -> bool:
    """The consortium publishes the sum. Encoded again it is m + e, to the bit, and with what the
    coordinator holds anyway the secret key is (m + e − c0) / c1.
    """
    with EvilCoordinator(scene, sealed_session(), colluders="d") as evil:
        one_row(evil)
        holder = Holder(evil)
        evil.start()
        evil.await_ready(*HONEST)
        attempt = Sealed(evil, HONEST, key=holder.name).to_sealed()
        total, codec = attempt.sum(), evil.codec
        attempt.release(total)
        published = np.array(evil.answer(A)[0]) / BOUND * codec.limit
        message = residues(np.concatenate([[len(HONEST)], published]))
        seeds = [attempt.commits[name].seed for name in HONEST]
        c1 = Kernel(SUITE, Secret(bytes(32)))._c1(seeds, 0, (1, N))[0]
        key = Kernel(SUITE, holder.keys[0].material)._product._secret
        if np.array_equal(quotients(message, total[:N], c1), key):
            return True
        raise scene.refuse("rounded", A, "what is published says nothing of the noise")


def quotients(message: Vector, c0: Vector, c1: Vector) -> Vector:
    """(m − c0) / c1, word by word, mod q."""
    words = zip(message.tolist(), c0.tolist(), c1.tolist(), strict=True)
    return np.array([(m - a) * pow(b, -1, Q) % Q for m, a, b in words], np.uint64)


@attack(
    threat="foreign-key-upload",
    reason="reserved-slot",
    weakening=replaced("secagg.ckks.sealing:released", off_the_grid),
)
def foreign_upload(scene: Scene) -> bool:
    """d uploads what opens to nothing under the session's key, with a weight that is plausible: the
    others take noise for the sum.
    """
    with EvilCoordinator(scene, sealed_session(), colluders="d") as evil:
        one_row(evil)
        holder, seed = Holder(evil), os.urandom(32)
        evil.start()
        attempt = Sealed(evil, key=holder.name)
        attempt.advertise()
        attempt.seal(*HONEST)
        colluder, codec = attempt.colluders[D], evil.codec
        with closing(Sealer(SUITE, holder.keys[0].material, workers=1)) as sealer:
            vector = codec.encode(
                {"x": evil.values[D]}, weight=1.0, metrics={}, sealer=sealer, seed=seed
            )
        vector[:N] = np.frombuffer(os.urandom(8 * N), "<u8") % Q
        colluder.state, attempt.commits[D] = client.seal_input(
            colluder.state, attempt.roster, vector, seed
        )
        attempt.uploads[D] = vector
        attempt.release(attempt.sum())
        return bool(np.abs(evil.answer(A)[0]).max() > BOUND)


def as_it_is(_real: Function) -> Function:
    """``client_sdk.keys.Keys.seal_blob`` that seals nothing."""
    return lambda _self, _label, _parties, data: bytearray(data)


@attack(
    threat="sealed-weights",
    reason="sealed",
    weakening=replaced("client_sdk.keys:Keys.seal_blob", as_it_is),
)
def weights_read(scene: Scene) -> bool:
    """a proposes the initial weights of a session that seals, and the coordinator looks at them."""
    model = os.urandom(64)
    with EvilCoordinator(scene, sealed_session("ckks+masked"), colluders="d") as evil:
        Holder(evil)
        evil.start_one(A, model=model)
        evil.await_opening()
        found = bytes(evil.blobs[str(api.Blob(weights=TASK))])
        if model not in found:
            raise scene.refuse("sealed", A, "the weights are not in what it sent")
        return True
