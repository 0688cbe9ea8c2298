"""The keys of a session that a silo holds, and the rules for their use.

All silos of a session share one symmetric key, which the coordinator never has. Keys are counted by
epochs from 1; a sum is sealed under the newest, and older ones only open past sums. A key's id
commits to its material, its epoch and session, and to whom it was made for: the session's silos
that were in the manifest, with their identity keys. So when one of them leaves, or comes back with
another identity, everybody sees that the key must not be used again.

What is guaranteed, against a coordinator that lies and a peer that errs: a silo's current epoch
never decreases, also over a restart (the ledger remembers the newest key that was taken); the
current epoch never gets another key; and no round is joined under a key that is old, that somebody
who left may hold, or that opened too many sums. A silo that gives the key away is not guarded
against: masks then stand between updates and the coordinator.

Source: the design's key custody; Li and Micciancio, On the Security of Homomorphic Encryption on
Approximate Numbers, EUROCRYPT 2021 (ePrint 2020/1533), for why a key opens a bounded number of
sums.
"""

from __future__ import annotations

import hmac
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Final

from secagg.config import MAX_COHORT, SiloId, is_name
from secagg.crypto import sign
from secagg.crypto.aead import KEY_BYTES, Buffer, open_long, seal_long
from secagg.crypto.kdf import derive
from secagg.crypto.labels import CKKS_KEY, digest, enc, u32, u64
from secagg.crypto.secret import Entropy, Secret
from secagg.errors import FaultyClientOrServer, FaultyServer, MalformedMessage
from secagg.suite import SUMS_PER_KEY, KeyName

MATERIAL_BYTES: Final = 32
MAX_KEYS: Final = 1024
"""Keys that a silo keeps of a session; the oldest go first."""
_AN_EPOCH: Final = 4
"""Keys that a silo keeps of one past epoch: a peer can hand on a wrong one, and no name tells."""
_HASH_BYTES: Final = 32
_SALT_BYTES: Final = 32
_MAX_NAME_BYTES: Final = 63
_MEMBER_BYTES: Final = 1 + _MAX_NAME_BYTES + sign.KEY_BYTES
MAX_PACKED_BYTES: Final = 4 + MAX_KEYS * (4 + MATERIAL_BYTES + 4 + MAX_COHORT * _MEMBER_BYTES)
"""More than ``pack_keys`` ever returns."""
_FILE: Final = b"secagg/1/keyring\n"


@dataclass(frozen=True, slots=True)
class HeldKey:
    """One key of a session: what SEAL's secret key, and keys for sealed blobs, are derived from.

    Args:
        session_id: of which session, 32 bytes.
        epoch: 1 to 2^32 − 1.
        members: whom it was made for, 1 to 256: identity key (32 bytes) by name, in name order.
        material: 32 bytes.

    Raises:
        MalformedMessage: anything else.
    """

    session_id: bytes
    epoch: int
    members: Mapping[SiloId, bytes]
    material: Secret

    def __post_init__(self) -> None:
        names = list(self.members)
        if not (  # CHECK: held-key
            len(self.session_id) == _HASH_BYTES
            and 1 <= self.epoch < 2**32
            and len(self.material) == MATERIAL_BYTES
            and 1 <= len(names) <= MAX_COHORT
            and names == sorted(names)
            and all(is_name(name) for name in names)
            and all(len(key) == sign.KEY_BYTES for key in self.members.values())
        ):
            raise _bad_format()

    @property
    def name(self) -> KeyName:
        """What everybody may know of it: H("ckks-key", session, epoch, members, material)."""
        members = enc(*(enc(name.encode(), key) for name, key in self.members.items()))
        items = (self.session_id, u64(self.epoch), members, self.material.reveal())
        return KeyName(self.epoch, digest(CKKS_KEY, *items))

    def is_for(self, name: SiloId, identity: bytes) -> bool:
        """Whether it was made for this silo with this identity key."""
        return self.members.get(name) == identity


def make_key(
    session_id: bytes, epoch: int, members: Mapping[SiloId, bytes], entropy: Entropy
) -> HeldKey:
    """Draw the key of an epoch.

    Args:
        session_id: 32 bytes.
        epoch: one more than the last that the session had.
        members: identity keys of the session's silos that are in the manifest now.
        entropy: 32 bytes are drawn.
    """
    return HeldKey(
        session_id, epoch, dict(sorted(members.items())), Secret(entropy(MATERIAL_BYTES))
    )


def pack_keys(keys: Sequence[HeldKey]) -> bytes:
    """Encode keys of one session, oldest first; the bytes are secret.

    u32(keys), and for each u32(epoch) ‖ material ‖ u32(members), and for each
    u8(length of its name) ‖ name ‖ identity key.
    """
    return b"".join((u32(len(keys)), *(_pack_key(key) for key in keys)))


def _pack_key(key: HeldKey) -> bytes:
    parts = [u32(key.epoch), key.material.reveal(), u32(len(key.members))]
    for name, identity in key.members.items():
        parts += (bytes([len(name)]), name.encode(), identity)
    return b"".join(parts)


def unpack_keys(session_id: bytes, data: bytes) -> tuple[HeldKey, ...]:
    """Decode 1 to 1,024 keys of a session, in order.

    Raises:
        MalformedMessage: not what ``pack_keys`` gives, to the byte.
    """
    reader = _Reader(data)
    keys = tuple(_unpack_key(session_id, reader) for _ in range(reader.number(4, MAX_KEYS)))
    # Encoding again refuses, in one place, whatever has two spellings: a silo that stands twice,
    # bytes at the end.
    # CHECK: packed-keys
    if not keys or not _rises(keys) or not hmac.compare_digest(pack_keys(keys), data):
        raise _bad_format()
    return keys


def _unpack_key(session_id: bytes, reader: _Reader) -> HeldKey:
    epoch, material = reader.number(4, 2**32 - 1), Secret(reader.take(MATERIAL_BYTES))
    members = {}
    for _ in range(reader.number(4, MAX_COHORT)):
        name = reader.take(reader.number(1, _MAX_NAME_BYTES)).decode("latin-1")  # total; ASCII or
        members[SiloId(name)] = reader.take(sign.KEY_BYTES)  # no name at all, as HeldKey checks
    return HeldKey(session_id, epoch, members, material)


class _Reader:
    """Takes bytes from the front; past the end there are none, and encoding again tells."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def take(self, size: int) -> bytes:
        self._at += size
        return self._data[self._at - size : self._at]

    def number(self, size: int, most: int) -> int:
        value = int.from_bytes(self.take(size), "big")
        if value > most:  # CHECK: packed-number
            raise _bad_format()
        return value


def _rises(keys: Sequence[HeldKey]) -> bool:
    """Whether keys are distinct, in the order of their names, and the newest is alone."""
    names = [key.name for key in keys]
    alone = len(names) < 2 or names[-2].epoch < names[-1].epoch
    return alone and all(older < newer for older, newer in pairwise(names))


def _bad_format() -> MalformedMessage:
    return MalformedMessage("key-format", "What should be keys of a session has another shape.")


def _merged(
    held: Sequence[HeldKey], more: Sequence[HeldKey], wanted: KeyName | None
) -> tuple[HeldKey, ...]:
    """Return all of them in order; those that are held stay, a few of an epoch."""
    known = {key.name: key for key in held}
    of_epoch = Counter(name.epoch for name in known)
    for key in more:
        room = of_epoch[key.epoch] < _AN_EPOCH or key.name == wanted
        if key.name not in known and room:
            known[key.name] = key
            of_epoch[key.epoch] += 1
    return tuple(known[name] for name in sorted(known)[-MAX_KEYS:])


@dataclass(frozen=True, slots=True)
class Keyring:
    """A silo's keys of one session.

    Args:
        session_id: which session, 32 bytes.
        floor: the newest key that the silo's durable ledger remembers of it, if any.
        keys: in the order of their names, oldest epoch first.

    Raises:
        MalformedMessage: keys of another session, out of order, or another one than the ledger's
            in its epoch; whoever read them knows where they come from.
    """

    session_id: bytes
    floor: KeyName | None = None
    keys: tuple[HeldKey, ...] = ()

    def __post_init__(self) -> None:
        # CHECK: keyring-order
        if not _rises(self.keys) or any(key.session_id != self.session_id for key in self.keys):
            raise MalformedMessage("keyring", "Keys are of another session or out of order.")
        if any(self._conflicts(key) for key in self.keys):  # CHECK: keyring-floor
            raise MalformedMessage("key-replaced", "The ledger remembers another key of an epoch.")

    @property
    def newest(self) -> HeldKey | None:
        """The one key that a round may use or a peer may get; None where the silo has to ask."""
        if not self.keys or (self.floor and self.keys[-1].epoch < self.floor.epoch):
            return None
        return self.keys[-1]

    @property
    def epoch(self) -> int:
        """The current epoch: the highest that is held or remembered; 0 before the first."""
        held = self.keys[-1].epoch if self.keys else 0
        return max(held, self.floor.epoch if self.floor else 0)

    def find(self, name: KeyName) -> HeldKey | None:
        """Return the key of this name, of any epoch: for opening a past sum."""
        return next((k for k in self.keys if k.epoch == name.epoch and k.name == name), None)

    def add(
        self, keys: Sequence[HeldKey], sender: SiloId, wanted: KeyName | None = None
    ) -> Keyring:
        """Return this ring with more keys, of which the newest is of the current epoch or later.

        Keys of past epochs are kept beside others of the same epoch: which is the right one shows
        by its name, when a past sum is to be opened.

        Args:
            keys: from ``custody.unwrap``, or the one that this silo made.
            sender: whose they are.
            wanted: which past key a sum is to be opened with: kept however many there are.

        Raises:
            FaultyClientOrServer: ``key-replaced``, the current epoch would get another key (the
                sender gave out two, or the coordinator had two silos make one); ``key-epoch``, the
                newest is of an epoch that is over.
        """
        newest = max(keys, key=lambda key: key.epoch, default=None)
        if newest is None or newest.epoch < self.epoch:  # CHECK: added-key-epoch
            raise FaultyClientOrServer(
                sender,
                "key-epoch",
                f"The newest key from {sender} is older than epoch {self.epoch}, which began.",
                "It was not taken. Ask a silo that has the newest key.",
            )
        current = [key for key in self.keys if key.epoch == newest.epoch]
        # CHECK: added-key-replaced
        if self._conflicts(newest) or any(key.name != newest.name for key in current):
            raise FaultyClientOrServer(
                sender,
                "key-replaced",
                f"{sender} has another key for epoch {newest.epoch} than this silo knows.",
                "It was not taken. Start a new epoch, made by one silo.",
            )
        passed = self.floor is not None and self.floor.epoch < newest.epoch
        merged = _merged(self.keys, keys, wanted)
        return replace(self, floor=None if passed else self.floor, keys=merged)

    def check(self, name: KeyName | None, members: Mapping[SiloId, bytes], opened: int) -> HeldKey:
        """Return the key if a round may use it.

        Args:
            name: the key that the round's descriptor names.
            members: identity keys of the session's silos that are in the manifest now.
            opened: sums that this silo knows to be opened with the key, 0 or more.

        Raises:
            FaultyServer: ``descriptor-key``, it is not the newest that this silo holds;
                ``descriptor-key-revoked``, somebody it was made for has left since;
                ``descriptor-key-worn``, it opened as many sums as it may.
        """
        newest = self.newest
        if newest is None or newest.name != name:  # CHECK: round-key-newest
            raise FaultyServer(
                "descriptor-key",
                "The round uses another key than the newest one that this silo holds.",
                "Ask a silo of the session for its key, then join the next attempt.",
            )
        left = [silo for silo in newest.members if not newest.is_for(silo, members.get(silo, b""))]
        if left:  # CHECK: round-key-revoked
            raise FaultyServer(
                "descriptor-key-revoked",
                f"The round uses a key that {', '.join(left)} had, before leaving the consortium.",
                "Start a new epoch: the silos that are left make a key of their own.",
            )
        if opened >= SUMS_PER_KEY:  # CHECK: round-key-worn
            raise FaultyServer(
                "descriptor-key-worn",
                f"The round uses a key that opened {opened} sums; {SUMS_PER_KEY} are allowed.",
                "Start a new epoch.",
            )
        return newest

    def pack(self) -> bytes:
        """Encode the keys for a file that only this silo's user can read; the bytes are secret."""
        body = _FILE + self.session_id + pack_keys(self.keys)
        return body + digest(CKKS_KEY, body)

    @classmethod
    def unpack(cls, data: bytes, session_id: bytes, floor: KeyName | None = None) -> Keyring:
        """Decode what ``pack`` gave; the ledger, not the file, says what the floor is.

        Raises:
            MalformedMessage: ``keyring-file`` or ``key-format``, damaged, of another version or of
                another session; ``key-replaced``, the ledger remembers another key of an epoch.
        """
        body, check = data[:-_HASH_BYTES], data[-_HASH_BYTES:]
        start = _FILE + session_id
        intact = hmac.compare_digest(digest(CKKS_KEY, body), check)
        if not intact or not body.startswith(start):  # CHECK: keyring-file
            raise MalformedMessage("keyring-file", "A key file is damaged or of another session.")
        packed = body.removeprefix(start)
        keys = () if packed == pack_keys(()) else unpack_keys(session_id, packed)
        return cls(session_id, floor, keys)

    def _conflicts(self, key: HeldKey) -> bool:
        floor = self.floor
        return floor is not None and key.epoch == floor.epoch and key.name != floor


def seal_blob(
    key: HeldKey, label: str, parties: tuple[str, ...], data: Buffer, entropy: Entropy
) -> bytearray:
    """Seal data of any size to all that hold a key: initial weights, a checkpoint.

    Who sealed it is not shown: every silo of the session can. What the data must be is for the
    caller to know from elsewhere (a signed digest, a transcript).

    Args:
        key: whose holders can open it.
        label: the purpose, from ``secagg.crypto.labels``.
        parties: whatever else the blob belongs to, in the order that the purpose gives it.
        data: contiguous bytes.
        entropy: 32 bytes are drawn: no two blobs are under one key.

    Returns:
        The salt, 32 bytes, and the data in segments (``aead.seal_long``).
    """
    salt = entropy(_SALT_BYTES)
    blob = seal_long(_blob_key(key, salt, label, parties), data, b"")
    blob[:0] = salt  # in place: a blob can be larger than what memory is left
    return blob


def open_blob(key: HeldKey, label: str, parties: tuple[str, ...], blob: Buffer) -> bytearray:
    """Open what was sealed for this purpose and parties.

    Raises:
        MalformedMessage: another key, purpose or parties, or altered in any way.
    """
    view = memoryview(blob).cast("B")
    salt = bytes(view[:_SALT_BYTES])
    return open_long(_blob_key(key, salt, label, parties), view[_SALT_BYTES:], b"")


def _blob_key(key: HeldKey, salt: bytes, label: str, parties: tuple[str, ...]) -> Secret:
    return derive(key.material, salt=salt, label=label, parties=parties, size=KEY_BYTES)
