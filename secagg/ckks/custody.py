"""How a session's key goes from silo to silo through a coordinator that must not learn it.

    ask → (request, relayed) → wrap → (box, relayed) → unwrap → Keyring.add

A silo without the key draws an ephemeral X25519 pair and signs its public half; a silo with the key
draws another, and seals its keys of the session, past epochs' included, under what the two agree
on. Both halves, both names, the epoch and the key's id are signed by the sender under the identity
keys of the manifest: the coordinator can drop and delay, and nothing else. An altered, replayed or
redirected message is refused, and one that was sealed to an ephemeral of the coordinator's does not
come about. The ephemerals are fresh on both sides, so identity keys that leak later open nothing.

A silo that came into the manifest after the key was made does not get it: its leaving would not be
noticed. It gets the next epoch's, and all older ones with it.

Source: the design's key custody. The box is the second message of protocol SIG-DH in Canetti and
Krawczyk, Analysis of Key-Exchange Protocols and Their Use for Building Secure Channels, EUROCRYPT
2001 (ePrint 2001/040): the sender signs both ephemerals and the names. The request names no sender,
since any silo that has the key may answer. That the recipient got the key is for its next message
to show.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Final

from secagg.ckks.keyring import HeldKey, Keyring, pack_keys, unpack_keys
from secagg.config import SiloId, is_name
from secagg.crypto.aead import KEY_BYTES, TAG_BYTES, open_once, seal_once
from secagg.crypto.kdf import derive
from secagg.crypto.keys import KeyPair, parse_public_key
from secagg.crypto.labels import KEY_BOX, SIGN_KEY_BOX, SIGN_KEY_REQUEST, digest, enc, u32
from secagg.crypto.secret import Entropy, Secret
from secagg.crypto.sign import SIGNATURE_BYTES, IdentityKey, verify
from secagg.errors import (
    FaultyClient,
    FaultyClientOrServer,
    FaultyServer,
    MalformedMessage,
    OutOfOrder,
)
from secagg.suite import KeyName

MAX_SEALED_BYTES: Final = 2**20
"""A box fits one message; 1,024 keys of ten silos do, or 38 of 256 with the longest names."""
_UNSIGNED: Final = bytes(SIGNATURE_BYTES)


@dataclass(frozen=True, slots=True)
class Custodian:
    """This silo in its session, as things stand now.

    Args:
        name: its name in the manifest.
        identity: its signing key.
        members: identity keys (32-byte Ed25519) of the session's silos that are in the manifest.
        session_id: which session, 32 bytes.
        transcript: of the session (``masking.transcript.opening_transcript``), 32 bytes.
    """

    name: SiloId
    identity: IdentityKey
    members: Mapping[SiloId, bytes]
    session_id: bytes
    transcript: bytes


@dataclass(frozen=True, slots=True)
class KeyRequest:
    """A silo asks for the key of an epoch. Parsed, not yet believed.

    Args:
        epoch: 1 to 2^32 − 1.
        silo: who asks.
        ephemeral: canonical X25519 public key.
        signature: over the session's transcript, 64 bytes.
    """

    epoch: int
    silo: SiloId
    ephemeral: bytes
    signature: bytes

    def __post_init__(self) -> None:
        _check_head(self.epoch, self.silo)  # CHECK: key-request-head
        parse_public_key(self.ephemeral)  # CHECK: key-request-ephemeral
        # CHECK: key-request-signature-size
        _check_size("signature", self.signature, SIGNATURE_BYTES, SIGNATURE_BYTES)

    def body(self) -> bytes:
        """What the signature covers."""
        return enc(u32(self.epoch), self.silo.encode(), self.ephemeral)


@dataclass(frozen=True, slots=True)
class KeyBox:
    """A silo's keys, sealed for another. Parsed, not yet believed.

    Args:
        epoch: of the newest key in it, 1 to 2^32 − 1.
        sender: who sealed it.
        recipient: who asked.
        sender_ephemeral: canonical X25519 public key.
        recipient_ephemeral: the request's.
        key_id: of the newest key, 32 bytes.
        sealed: 16 to ``MAX_SEALED_BYTES`` bytes.
        signature: the sender's, over the session's transcript, 64 bytes.
    """

    epoch: int
    sender: SiloId
    recipient: SiloId
    sender_ephemeral: bytes
    recipient_ephemeral: bytes
    key_id: bytes
    sealed: bytes
    signature: bytes

    def __post_init__(self) -> None:
        _check_head(self.epoch, self.sender, self.recipient)  # CHECK: key-box-head
        parse_public_key(self.sender_ephemeral)  # CHECK: key-box-sender-ephemeral
        parse_public_key(self.recipient_ephemeral)  # CHECK: key-box-recipient-ephemeral
        _check_size("key id", self.key_id, 32, 32)  # CHECK: key-box-key-id-size
        _check_size("key box", self.sealed, TAG_BYTES, MAX_SEALED_BYTES)  # CHECK: key-box-size
        # CHECK: key-box-signature-size
        _check_size("signature", self.signature, SIGNATURE_BYTES, SIGNATURE_BYTES)

    def head(self) -> bytes:
        """All but what is sealed: what the sealing is bound to."""
        return enc(
            u32(self.epoch),
            self.sender.encode(),
            self.recipient.encode(),
            self.sender_ephemeral,
            self.recipient_ephemeral,
            self.key_id,
        )

    def body(self) -> bytes:
        """What the signature covers."""
        return enc(self.head(), digest(KEY_BOX, self.sealed))


def _check_head(epoch: int, *names: str) -> None:
    if not 1 <= epoch < 2**32:  # CHECK: custody-epoch
        raise MalformedMessage("message-number", f"epoch = {epoch} is out of range.")
    if not all(is_name(name) for name in names):  # CHECK: custody-names
        raise MalformedMessage("message-name", "A message names nobody who could be a member.")


def _check_size(what: str, data: bytes, least: int, most: int) -> None:
    if not least <= len(data) <= most:  # CHECK: custody-size
        raise MalformedMessage("message-size", f"A {what} has {len(data)} bytes.")


@dataclass(frozen=True, slots=True)
class Pending:
    """What a silo keeps of a request until it takes a box; then it is dropped."""

    epoch: int
    ephemeral: KeyPair


def ask(me: Custodian, epoch: int, entropy: Entropy) -> tuple[Pending, KeyRequest]:
    """Ask the session's silos for their keys.

    Args:
        me: this silo.
        epoch: the session's current one.
        entropy: source of the ephemeral key.
    """
    pair = KeyPair.generate(entropy)
    unsigned = KeyRequest(epoch, me.name, pair.public, _UNSIGNED)
    signature = me.identity.sign(SIGN_KEY_REQUEST, me.transcript, unsigned.body())
    return Pending(epoch, pair), replace(unsigned, signature=signature)


def wrap(ring: Keyring, request: KeyRequest, me: Custodian, entropy: Entropy) -> KeyBox:
    """Answer a silo that asks for the keys.

    Args:
        ring: what this silo holds, with a newest key.
        request: as the coordinator relayed it.
        me: this silo.
        entropy: source of the ephemeral key.

    Raises:
        OutOfOrder: this silo has no newest key; its caller looks first.
        FaultyServer: the request carries this silo's own name.
        FaultyClientOrServer: the silo that is named is not of the session or left it, did not sign
            this, asks for another epoch than the current one, or came after the key was made. The
            coordinator can replay a request, or hold back newer keys or manifests, so the silo is
            not certain to be at fault.
    """
    newest = ring.newest
    if newest is None:  # CHECK: key-none
        raise OutOfOrder("key-none", "This silo has no key to give.", "Ask for it first.")
    _check_request(request, newest, me)
    pair = KeyPair.generate(entropy)
    draft = KeyBox(
        newest.epoch,
        me.name,
        request.silo,
        pair.public,
        request.ephemeral,
        newest.name.key_id,
        bytes(TAG_BYTES),
        _UNSIGNED,
    )
    bound = enc(me.transcript, draft.head())
    packed = _packed_newest(ring)
    sealed = seal_once(_box_key(pair, request.ephemeral, draft, bound), packed, bound)
    unsigned = replace(draft, sealed=sealed)
    signature = me.identity.sign(SIGN_KEY_BOX, me.transcript, unsigned.body())
    return replace(unsigned, signature=signature)


def _packed_newest(ring: Keyring) -> bytes:
    """The keys, as many of the newest as a box holds."""
    keys = ring.keys
    while len(packed := pack_keys(keys)) > MAX_SEALED_BYTES - TAG_BYTES:
        keys = keys[len(keys) // 2 :]
    return packed


def _check_request(request: KeyRequest, newest: HeldKey, me: Custodian) -> None:
    silo = request.silo
    _check_origin("key-request", silo, me)  # CHECK: key-request-origin
    # CHECK: key-request-signature
    _check_signature(SIGN_KEY_REQUEST, silo, me, request.body(), request.signature)
    if request.epoch != newest.epoch:  # CHECK: key-request-epoch
        raise FaultyClientOrServer(
            silo,
            "key-request-epoch",
            f"{silo} asks for the key of epoch {request.epoch}; the newest is {newest.epoch}.",
            "Nothing was given. It asks again for the session's current epoch.",
        )
    if not newest.is_for(silo, me.members[silo]):  # CHECK: key-request-newcomer
        raise FaultyClientOrServer(
            silo,
            "key-request-newcomer",
            f"{silo} asks for a key that was made before it, or its identity, was enrolled.",
            "Nothing was given. Start a new epoch: its key is for this silo, too.",
        )


def unwrap(pending: Pending, box: KeyBox, me: Custodian) -> tuple[HeldKey, ...]:
    """Open a box that answers this silo's request.

    Args:
        pending: from ``ask``.
        box: as the coordinator relayed it.
        me: this silo.

    Returns:
        The sender's keys, oldest first: at least one.

    Raises:
        FaultyServer: the box carries this silo's own name as its sender.
        FaultyClientOrServer: the sender is not of the session or left it, or did not sign this; or
            the box answers another silo's, an older or no request, or its key was not made for
            exactly the session's silos of now, which the sender or the coordinator can have caused.
        FaultyClient: the sender, certain, since it signed the box for this very request: it does
            not open, holds anything but keys, or the newest is not the one that the box names.
    """
    sender = box.sender
    _check_origin("key-box", sender, me)  # CHECK: key-box-origin
    # CHECK: key-box-signature
    _check_signature(SIGN_KEY_BOX, sender, me, box.body(), box.signature)
    answered = (pending.epoch, me.name, pending.ephemeral.public)
    if (box.epoch, box.recipient, box.recipient_ephemeral) != answered:  # CHECK: key-box-request
        raise FaultyClientOrServer(
            sender,
            "key-box-request",
            f"A key box of {sender} answers another request than this silo's last one.",
            "It was not opened. Ask again.",
        )
    keys = _open(pending, box, me)
    newest = keys[-1]
    if newest.name != KeyName(box.epoch, box.key_id):  # CHECK: key-box-key
        raise _bad_box(sender, "key-box-key", "has another newest key in it than it names")
    # CHECK: key-box-members
    if dict(newest.members) != dict(me.members):  # every round under it would be refused
        raise FaultyClientOrServer(
            sender,
            "key-box-members",
            f"The key in a box of {sender} was made for others than the session's silos of now.",
            "It was not taken. A new epoch's key is for all of them.",
        )
    return keys


def _open(pending: Pending, box: KeyBox, me: Custodian) -> tuple[HeldKey, ...]:
    bound = enc(me.transcript, box.head())
    key = _box_key(pending.ephemeral, box.sender_ephemeral, box, bound)
    try:
        plaintext = open_once(key, box.sealed, bound)
    except MalformedMessage:
        raise _bad_box(box.sender, "key-box-sealed", "does not open") from None
    try:
        return unpack_keys(me.session_id, plaintext)
    except MalformedMessage as error:
        raise _bad_box(box.sender, error.code, "holds something else than keys") from None


def _box_key(ours: KeyPair, theirs: bytes, box: KeyBox, bound: bytes) -> Secret:
    return derive(
        ours.agree(theirs),
        salt=digest(KEY_BOX, bound),
        label=KEY_BOX,
        parties=(box.sender, box.recipient),
        size=KEY_BYTES,
    )


def _check_origin(what: str, silo: SiloId, me: Custodian) -> None:
    if silo == me.name:  # CHECK: custody-own
        raise FaultyServer(f"{what}-own", f"A {what} comes back to the silo that it names.")
    if silo not in me.members:  # CHECK: custody-silo
        raise FaultyClientOrServer(
            silo,
            f"{what}-silo",
            f"A {what} is from {silo}, which is no silo of the session in this silo's manifest.",
            "Nothing was given or taken. If it was just enrolled, fetch the manifest.",
        )


def _check_signature(kind: str, silo: SiloId, me: Custodian, body: bytes, signature: bytes) -> None:
    try:
        verify(me.members[silo], kind, me.transcript, body, signature)  # CHECK: custody-signature
    except MalformedMessage:
        raise FaultyClientOrServer(
            silo,
            f"{kind}-signature",
            f"A {kind} is not signed by {silo}, which it names.",
            "Nothing was given or taken. Ask again.",
        ) from None


def _bad_box(sender: SiloId, code: str, observed: str) -> FaultyClient:
    return FaultyClient(
        sender, code, f"A key box of {sender} {observed}.", "Nothing was taken. Ask another silo."
    )
