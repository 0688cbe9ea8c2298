"""Requests for a session's key, boxes with it, and checkpoints under it, to and from protobuf."""

from __future__ import annotations

from dataclasses import dataclass

from secagg.ckks.custody import KeyBox, KeyRequest
from secagg.config import SiloId
from secagg.crypto.digest import DIGEST_BYTES
from secagg.crypto.labels import SIGN_CHECKPOINT, enc, u32, u64
from secagg.crypto.sign import SIGNATURE_BYTES, IdentityKey, verify
from secagg.errors import MalformedMessage
from secagg.wire._pb import service_pb2 as api


def request_to_wire(value: KeyRequest) -> api.KeyRequest:
    """A silo's wish for the key."""
    return api.KeyRequest(
        epoch=value.epoch,
        silo=value.silo,
        ephemeral=value.ephemeral,
        signature=value.signature,
    )


def request_from_wire(value: api.KeyRequest) -> KeyRequest:
    """A silo's wish for the key.

    Raises:
        MalformedMessage: sizes, names or numbers are not right.
    """
    return KeyRequest(value.epoch, SiloId(value.silo), value.ephemeral, value.signature)


def box_to_wire(value: KeyBox) -> api.KeyBox:
    """The key, boxed for one silo."""
    return api.KeyBox(
        epoch=value.epoch,
        sender=value.sender,
        recipient=value.recipient,
        sender_ephemeral=value.sender_ephemeral,
        recipient_ephemeral=value.recipient_ephemeral,
        key_id=value.key_id,
        sealed=value.sealed,
        signature=value.signature,
    )


def box_from_wire(value: api.KeyBox) -> KeyBox:
    """The key, boxed for one silo.

    Raises:
        MalformedMessage: sizes, names or numbers are not right.
    """
    return KeyBox(
        epoch=value.epoch,
        sender=SiloId(value.sender),
        recipient=SiloId(value.recipient),
        sender_ephemeral=value.sender_ephemeral,
        recipient_ephemeral=value.recipient_ephemeral,
        key_id=value.key_id,
        sealed=value.sealed,
        signature=value.signature,
    )


@dataclass(frozen=True, slots=True)
class SignedCheckpoint:
    """A silo's checkpoint of a task, sealed for the session's silos.

    Args:
        task: of which task.
        results: how many of its results are in it, at least 1.
        sender: whose it is.
        size: bytes as they are uploaded, at least 1.
        digest: vector digest of these bytes.
        signature: the sender's, over all that and the session.
    """

    task: str
    results: int
    sender: str
    size: int
    digest: bytes
    signature: bytes

    def body(self) -> bytes:
        """What the signature covers, beside the session."""
        return enc(
            self.task.encode(),
            u32(self.results),
            self.sender.encode(),
            u64(self.size),
            self.digest,
        )

    @classmethod
    def sign(
        cls,
        task: str,
        results: int,
        sender: str,
        size: int,
        digest: bytes,
        identity: IdentityKey,
        transcript: bytes,
    ) -> SignedCheckpoint:
        """Offer a checkpoint, over ``opening_transcript`` of the session."""
        unsigned = cls(task, results, sender, size, digest, bytes(SIGNATURE_BYTES))
        signature = identity.sign(SIGN_CHECKPOINT, transcript, unsigned.body())
        return cls(task, results, sender, size, digest, signature)

    def verify(self, key: bytes, transcript: bytes) -> None:
        """Return if the sender signed this.

        Raises:
            MalformedMessage: it did not.
        """
        # CHECK: checkpoint-verified
        verify(key, SIGN_CHECKPOINT, transcript, self.body(), self.signature)


def checkpoint_to_wire(value: SignedCheckpoint) -> api.Checkpoint:
    """A checkpoint for others."""
    return api.Checkpoint(
        task=value.task,
        results=value.results,
        sender=value.sender,
        size=value.size,
        digest=value.digest,
        signature=value.signature,
    )


def checkpoint_from_wire(message: api.Checkpoint) -> SignedCheckpoint:
    """A checkpoint for others.

    Raises:
        MalformedMessage: sizes or numbers are not right.
    """
    if (  # CHECK: checkpoint-sizes
        len(message.digest) != DIGEST_BYTES
        or len(message.signature) != SIGNATURE_BYTES
        or not message.results
        or not message.size
    ):
        raise MalformedMessage("checkpoint-size", "A checkpoint has fields of the wrong size.")
    return SignedCheckpoint(
        message.task,
        message.results,
        message.sender,
        message.size,
        message.digest,
        message.signature,
    )
