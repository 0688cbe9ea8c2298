"""Valid encodings for every target to start from: what a round writes, and a consortium's files.

The round is played by real silos against a real session, in memory; the consortium is as old as
``fixed.NOW``, so that its certificates stay valid for who reads them from the corpus.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from client_sdk.bridge import _packed
from client_sdk.checkpoint import Checkpoints, Found, Update
from client_sdk.ledger import FileLedger
from secagg.ckks import custody, keyring
from secagg.ckks.keyring import Keyring, make_key, pack_keys
from secagg.config import Protection, SiloId
from secagg.crypto.aead import seal_long, seal_once
from secagg.crypto.keys import KeyPair
from secagg.crypto.labels import SIGN_TASK, WEIGHTS
from secagg.crypto.shamir import split
from secagg.crypto.sign import IdentityKey
from secagg.disk import LocalDisk
from secagg.masking import messages as core
from secagg.masking.ledger import Joined, Keyed, Opened, Revealed
from secagg.masking.shares import deal
from secagg.pki.authority import Authority
from secagg.pki.enrolment import create_request
from secagg.pki.names import Role
from secagg.pki.profile import write_policy, write_profile
from secagg.wire import attempt, session
from secagg.wire import custody as wire_custody
from secagg.wire._pb import journal_pb2 as journal
from secagg.wire._pb import masking_pb2 as pb
from secagg.wire._pb import service_pb2 as api
from tests.coordinator.play import World

from . import fixed
from .secret_targets import pair_bytes

Named = Iterator[tuple[str, bytes]]


def samples() -> Named:
    """Valid encodings, each with its target's name."""
    with tempfile.TemporaryDirectory(prefix="secagg-fuzz-") as folder:
        place = Path(folder)
        yield from _round(place / "masked", Protection.MASKED)
        yield from _round(place / "sealed", Protection.CKKS_MASKED)
        yield from _custody()
        yield from _files(place)
        yield from _kept(place)
        yield from _secrets()


# What goes over the wire and into the journal.


def _round(place: Path, protection: Protection) -> Named:
    place.mkdir()
    world = World(place, protection=protection)
    if protection.seals:
        world.make_key()
    world.start()
    for _ in protection.phases:
        for name in world.players:
            event = world.players[name].look()
            yield from _broadcast(event)
        world.phases(1)
    for player in world.players.values():
        yield from _broadcast(player.look())
        for message in player.sent:
            yield "client-message", _sent(message)
    for row in world.journal.load()[world.session_id]:
        yield "record", row
    yield "session", session.config_to_wire(world.config).SerializeToString()
    yield "opening", session.opening_to_wire(world.signed()).SerializeToString()
    yield "opening", session.opening_to_wire(world.signed(weights=b"x" * 70)).SerializeToString()
    ready = api.ReadyRequest(session_id=world.session_id, task="training", base=bytes(32))
    ready.key.CopyFrom(attempt.key_to_wire(world.key) or pb.KeyName(epoch=1, key_id=bytes(32)))
    yield "key-name", ready.SerializeToString()


BROADCASTS: dict[type, tuple[str, Any]] = {
    core.Descriptor: ("descriptor", attempt.descriptor_to_wire),
    core.Roster: ("roster", attempt.roster_to_wire),
    core.Dealt: ("dealt", attempt.dealt_to_wire),
    core.Survivors: ("survivors", attempt.survivors_to_wire),
    core.Signatures: ("signatures", attempt.signatures_to_wire),
    core.Result: ("result", attempt.result_to_wire),
}


def _broadcast(event: Any) -> Named:
    if type(event) in BROADCASTS:
        name, write = BROADCASTS[type(event)]
        yield name, write(event).SerializeToString()


def _sent(message: Any) -> bytes:
    request = attempt.client_message_to_wire(
        message, session_id=fixed.SESSION_ID, round_number=1, attempt=1
    )
    return request.SerializeToString()


def _custody() -> Named:
    """A silo asks another one for the key; blobs go up and down; an attempt ends."""
    identities = {SiloId(name): IdentityKey.generate(os.urandom) for name in "ab"}
    members = {name: key.public for name, key in identities.items()}
    a, b = (
        custody.Custodian(name, identities[name], members, fixed.SESSION_ID, bytes(32))
        for name in identities
    )
    ring = Keyring(fixed.SESSION_ID).add(
        [make_key(fixed.SESSION_ID, 1, members, os.urandom)], SiloId("a")
    )
    _, wish = custody.ask(b, 1, os.urandom)
    box = custody.wrap(ring, wish, a, os.urandom)
    offer = wire_custody.SignedCheckpoint.sign(
        "training", 2, "a", 70, bytes(32), identities[SiloId("a")], bytes(32)
    )
    yield "key-request", wire_custody.request_to_wire(wish).SerializeToString()
    yield "key-box", wire_custody.box_to_wire(box).SerializeToString()
    yield "checkpoint-offer", wire_custody.checkpoint_to_wire(offer).SerializeToString()
    vector = api.Blob(vector=api.Blob.Vector(round=1, attempt=2))
    chunk = api.PutChunkRequest(
        session_id=fixed.SESSION_ID, blob=vector, offset=64, total=128, data=bytes(64)
    )
    yield "put-chunk", chunk.SerializeToString()
    yield "got-chunk", api.GetChunkReply(data=bytes(64)).SerializeToString()
    aborted = api.Aborted(round=1, attempt=1, phase="share_keys", have=2, need=3, blamed=["a"])
    yield "aborted", aborted.SerializeToString()
    ended = journal.Record(attempt_aborted=journal.AttemptAborted(aborted=[aborted]))
    yield "record", ended.SerializeToString()
    yield "record", journal.Record(ended=journal.Ended(state="aborted")).SerializeToString()
    yield "keys", pack_keys(ring.keys)
    yield "keyring", ring.pack()[:-32]
    yield "keyring", Keyring(fixed.SESSION_ID).pack()[:-32]


# Files of an authority, of members, of a coordinator.

SETTINGS = b"""\
listen = "[::]:8443"
credentials = "keys"
state = "state"

[limits]
max_sessions = 9
calls_per_second = 50.5
"""
SESSION_FILE = b"""\
name = "study"
consortium = "hospitals"
silos = ["a", "b", "c"]
protection = "masked"
colluders = 1
threshold = "2/3"
min_cohort = 3
mask_prg = "aes-128-ctr"

[[tasks]]
name = "training"
weighting = "mean"
rounds = 3
ring_bits = 32
bound = 4.0
clip = "none"
weight_cap = 100.0
metrics = [{ name = "loss", bound = 8.0 }]
"""


def _files(place: Path) -> Named:
    authority = Authority.create(place / "authority", fixed.CONSORTIUM, now=fixed.NOW)
    for role, name in ((Role.COORDINATOR, "main"), (Role.ADMIN, "boss"), (Role.SILO, "a")):
        member = place / name
        request = create_request(member, role, name, fixed.CONSORTIUM, os.urandom)
        bundle = authority.approve(request, now=fixed.NOW)
        yield "request", request.to_json()
        yield "bundle", bundle.to_json()
        yield "certificate", bundle.certificate_pem
        yield "uri", f"secagg://{fixed.CONSORTIUM}/{role}/{name}".encode()
        yield "private-key", (member / "tls.key").read_bytes()
    yield "authority", authority.certificate_pem
    yield "manifest", authority.signed_manifest.to_json()
    yield "issued", (authority.directory / "issued.json").read_bytes()
    write_profile(place, "coordinator.example.org:8443")
    write_policy(place)
    yield "profile", (place / "profile.toml").read_bytes()
    yield "policy", (place / "policy.toml").read_bytes()
    yield "settings", SETTINGS
    yield "session-file", SESSION_FILE


def _kept(place: Path) -> Named:
    """What a silo writes for itself."""
    disk = LocalDisk(place / "state")
    kept = FileLedger(disk)
    joined = Joined("study", fixed.SESSION_ID, 1, 1, bytes(32), bytes(32))
    for entry in (
        Opened(fixed.SESSION_ID, "training", bytes(32)),
        Keyed(fixed.SESSION_ID, 1, bytes(32)),
        joined,
        replace(joined, attempt=2, position=b"p" * 32, update=b"u" * 32),
        Revealed(bytes(32), bytes(32), (SiloId("a"), SiloId("b"))),
    ):
        kept.record(entry)
    whole = disk.read("ledger.jsonl") or b""
    yield "ledger-file", whole
    yield "ledger-file", whole[:-20]
    yield (
        "ledger-entries",
        b"\n".join(
            json.dumps({k: v for k, v in json.loads(line).items() if k != "hash"}).encode()
            for line in whole.splitlines()
        ),
    )
    checkpoints = Checkpoints(disk, fixed.SESSION_ID, fixed.KEY)
    update = Update({"w": np.ones(3, "<f4")}, 2.0, {"loss": 0.5})
    checkpoints.keep_update("training", bytes(32), update)
    checkpoints.keep_global("training", {"results": 1}, _global_file)
    about = {"results": 1, "round": 1, "history": "00" * 32, "optimizer": {"0": [0.5]}}
    yield "peer-checkpoint", _packed(Found(about, b"safetensors"))
    for name in disk.names("sessions"):
        yield "checkpoint-file", disk.read(name) or b""


def _global_file(metadata: dict[str, str]) -> bytes:
    from safetensors.numpy import save

    return save({"w": np.ones(2, "<f8")}, metadata)


# Secrets and vectors.


def _secrets() -> Named:
    pair = KeyPair.generate(os.urandom)
    identity = IdentityKey.generate(os.urandom)
    holders = [SiloId("a"), SiloId("b"), SiloId("c")]
    dealt = deal(holders[0], pair.private, fixed.KEY, holders, threshold=2, entropy=os.urandom)
    yield "public-key", pair.public
    yield "signature", identity.public + identity.sign(SIGN_TASK, bytes(32), b"body")
    yield "share", split(fixed.KEY, threshold=2, holders=3, entropy=os.urandom)[0].reveal()
    yield "held-shares", dealt[holders[1]].pack()
    yield "box", seal_once(fixed.KEY, b"hello", b"for")
    yield "long-box", bytes(seal_long(fixed.KEY, b"hello", b"for"))
    yield "blob", bytes(keyring.seal_blob(fixed.HELD, WEIGHTS, ("training",), b"x", os.urandom))
    yield "seal-pair", pair_bytes(bytes(8 * 32))
    yield "seal-pair", _zipped(pair_bytes(bytes(8 * 32)))
    rows = np.zeros((2, 16))
    rows[:, 0], rows[:, 1:] = 3.0, 0.25
    yield "opened-rows", rows.tobytes()
    for number in range(4):
        yield "vector", bytes((number, 3)) + bytes(3 * (2, 4, 8, 8)[number])


def _zipped(file: bytes) -> bytes:
    """The same file as SEAL compresses it."""
    import zstandard

    frame = zstandard.ZstdCompressor().compress(file[16:])
    head = bytearray(file[:16])
    head[5] = 2
    head[8:] = (16 + len(frame)).to_bytes(8, "little")
    return bytes(head) + frame
