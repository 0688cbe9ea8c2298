"""Every domain-separation label of the product, in one place, versioned.

``enc`` is injective on lists of byte strings, so two different lists never hash alike; the label
comes first, so two different uses never do either. All of it is ours and none of it protobuf's,
since protobuf does not promise one encoding per message.

    enc(x1 … xn) = u32be(n) ‖ Σ u64be(len xi) ‖ xi
    H(label, x…) = SHA-256(enc("secagg/1/" + label, x…))
"""

from __future__ import annotations

import hashlib
from typing import Final

PREFIX: Final = b"secagg/1/"

# Hashes of the transcript.
SESSION: Final = "session"
TASK: Final = "task"
HISTORY: Final = "history"
BASE: Final = "base"
MANIFEST: Final = "manifest"
BODY: Final = "body"
ROUND: Final = "round"
ROSTER: Final = "roster"
DEALT: Final = "dealt"
SURVIVORS: Final = "survivors"
RESULT: Final = "result"
COMMITMENTS: Final = "commitments"
BOXES: Final = "boxes"
COMMIT: Final = "commit"
LEDGER: Final = "ledger"
CKKS_KEY: Final = "ckks-key"

# Hashes of the coordinator's journal.
JOURNAL_GENESIS: Final = "journal/genesis"
JOURNAL_ROW: Final = "journal/row"
JOURNAL_HEAD: Final = "journal/head"
JOURNAL_SEAL: Final = "journal/seal"
JOURNAL_ANCHOR: Final = "journal/anchor"

# Commitments.
SELF_SEED: Final = "self-seed"
SHARE: Final = "share"

# Derived keys (HKDF info).
CHANNEL_KEY: Final = "channel"
PAIR_STREAM: Final = "pair"
SELF_STREAM: Final = "self"
UPDATE: Final = "update"
CHECKPOINT: Final = "checkpoint"
CKKS_SECRET: Final = "ckks-secret"  # noqa: S105 - a label
CKKS_C1: Final = "ckks-c1"
KEY_BOX: Final = "key-box"
WEIGHTS: Final = "weights"
BRIDGE: Final = "bridge"

# Vector digests (BLAKE3 derive-key context).
VECTOR: Final = "secagg/1/vector"

# Signature types.
SIGN_DESCRIPTOR: Final = "descriptor"
SIGN_ADVERTISE_KEYS: Final = "advertise-keys"
SIGN_SHARE_KEYS: Final = "share-keys"
SIGN_MASKED_INPUT: Final = "masked-input"
SIGN_CONSISTENCY: Final = "consistency"
SIGN_UNMASKING: Final = "unmasking"
SIGN_RESULT: Final = "result"
SIGN_TASK: Final = "task"
SIGN_KEY_REQUEST: Final = "key-request"
SIGN_KEY_BOX: Final = "key-box"
SIGN_CHECKPOINT: Final = "checkpoint"
SIGN_ENROLMENT: Final = "enrolment"


_LENGTHS: Final = tuple(size.to_bytes(8, "big") for size in range(512))
"""Of what is encoded thousands of times a round."""


def enc(*items: bytes) -> bytes:
    """Encode a list of byte strings injectively."""
    parts = [len(items).to_bytes(4, "big")]
    for item in items:
        size = len(item)
        parts.append(_LENGTHS[size] if size < len(_LENGTHS) else u64(size))
        parts.append(item)
    return b"".join(parts)


def digest(label: str, *items: bytes) -> bytes:
    """H(label, items…): 32 bytes."""
    return hashlib.sha256(enc(PREFIX + label.encode(), *items)).digest()


def u32(value: int) -> bytes:
    """A number as it stands in a transcript: 4 bytes, big-endian."""
    return value.to_bytes(4, "big")


def u64(value: int) -> bytes:
    """A number as it stands in a transcript: 8 bytes, big-endian."""
    return value.to_bytes(8, "big")
