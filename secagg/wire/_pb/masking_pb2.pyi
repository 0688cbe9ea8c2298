from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class KeyName(_message.Message):
    __slots__ = ("epoch", "key_id")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    KEY_ID_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    key_id: bytes
    def __init__(self, epoch: _Optional[int] = ..., key_id: _Optional[bytes] = ...) -> None: ...

class Descriptor(_message.Message):
    __slots__ = ("session_id", "session_hash", "manifest_version", "manifest_digest", "task", "round", "attempt", "nonce", "cohort", "threshold", "base", "signature", "key")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    SESSION_HASH_FIELD_NUMBER: _ClassVar[int]
    MANIFEST_VERSION_FIELD_NUMBER: _ClassVar[int]
    MANIFEST_DIGEST_FIELD_NUMBER: _ClassVar[int]
    TASK_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    NONCE_FIELD_NUMBER: _ClassVar[int]
    COHORT_FIELD_NUMBER: _ClassVar[int]
    THRESHOLD_FIELD_NUMBER: _ClassVar[int]
    BASE_FIELD_NUMBER: _ClassVar[int]
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    KEY_FIELD_NUMBER: _ClassVar[int]
    session_id: bytes
    session_hash: bytes
    manifest_version: int
    manifest_digest: bytes
    task: str
    round: int
    attempt: int
    nonce: bytes
    cohort: _containers.RepeatedScalarFieldContainer[str]
    threshold: int
    base: bytes
    signature: bytes
    key: KeyName
    def __init__(self, session_id: _Optional[bytes] = ..., session_hash: _Optional[bytes] = ..., manifest_version: _Optional[int] = ..., manifest_digest: _Optional[bytes] = ..., task: _Optional[str] = ..., round: _Optional[int] = ..., attempt: _Optional[int] = ..., nonce: _Optional[bytes] = ..., cohort: _Optional[_Iterable[str]] = ..., threshold: _Optional[int] = ..., base: _Optional[bytes] = ..., signature: _Optional[bytes] = ..., key: _Optional[_Union[KeyName, _Mapping]] = ...) -> None: ...

class AdvertiseKeys(_message.Message):
    __slots__ = ("sender", "channel_key", "mask_key", "self_seed_hash", "signature")
    SENDER_FIELD_NUMBER: _ClassVar[int]
    CHANNEL_KEY_FIELD_NUMBER: _ClassVar[int]
    MASK_KEY_FIELD_NUMBER: _ClassVar[int]
    SELF_SEED_HASH_FIELD_NUMBER: _ClassVar[int]
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    sender: str
    channel_key: bytes
    mask_key: bytes
    self_seed_hash: bytes
    signature: bytes
    def __init__(self, sender: _Optional[str] = ..., channel_key: _Optional[bytes] = ..., mask_key: _Optional[bytes] = ..., self_seed_hash: _Optional[bytes] = ..., signature: _Optional[bytes] = ...) -> None: ...

class Roster(_message.Message):
    __slots__ = ("adverts",)
    ADVERTS_FIELD_NUMBER: _ClassVar[int]
    adverts: _containers.RepeatedCompositeFieldContainer[AdvertiseKeys]
    def __init__(self, adverts: _Optional[_Iterable[_Union[AdvertiseKeys, _Mapping]]] = ...) -> None: ...

class Commitment(_message.Message):
    __slots__ = ("holder", "mask_key", "self_seed")
    HOLDER_FIELD_NUMBER: _ClassVar[int]
    MASK_KEY_FIELD_NUMBER: _ClassVar[int]
    SELF_SEED_FIELD_NUMBER: _ClassVar[int]
    holder: str
    mask_key: bytes
    self_seed: bytes
    def __init__(self, holder: _Optional[str] = ..., mask_key: _Optional[bytes] = ..., self_seed: _Optional[bytes] = ...) -> None: ...

class Box(_message.Message):
    __slots__ = ("recipient", "sealed")
    RECIPIENT_FIELD_NUMBER: _ClassVar[int]
    SEALED_FIELD_NUMBER: _ClassVar[int]
    recipient: str
    sealed: bytes
    def __init__(self, recipient: _Optional[str] = ..., sealed: _Optional[bytes] = ...) -> None: ...

class ShareKeys(_message.Message):
    __slots__ = ("sender", "commitments", "boxes", "signature")
    SENDER_FIELD_NUMBER: _ClassVar[int]
    COMMITMENTS_FIELD_NUMBER: _ClassVar[int]
    BOXES_FIELD_NUMBER: _ClassVar[int]
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    sender: str
    commitments: _containers.RepeatedCompositeFieldContainer[Commitment]
    boxes: _containers.RepeatedCompositeFieldContainer[Box]
    signature: bytes
    def __init__(self, sender: _Optional[str] = ..., commitments: _Optional[_Iterable[_Union[Commitment, _Mapping]]] = ..., boxes: _Optional[_Iterable[_Union[Box, _Mapping]]] = ..., signature: _Optional[bytes] = ...) -> None: ...

class Dealing(_message.Message):
    __slots__ = ("dealer", "commitments", "boxes_digest", "sealed", "signature")
    DEALER_FIELD_NUMBER: _ClassVar[int]
    COMMITMENTS_FIELD_NUMBER: _ClassVar[int]
    BOXES_DIGEST_FIELD_NUMBER: _ClassVar[int]
    SEALED_FIELD_NUMBER: _ClassVar[int]
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    dealer: str
    commitments: _containers.RepeatedCompositeFieldContainer[Commitment]
    boxes_digest: bytes
    sealed: bytes
    signature: bytes
    def __init__(self, dealer: _Optional[str] = ..., commitments: _Optional[_Iterable[_Union[Commitment, _Mapping]]] = ..., boxes_digest: _Optional[bytes] = ..., sealed: _Optional[bytes] = ..., signature: _Optional[bytes] = ...) -> None: ...

class Dealt(_message.Message):
    __slots__ = ("dealings",)
    DEALINGS_FIELD_NUMBER: _ClassVar[int]
    dealings: _containers.RepeatedCompositeFieldContainer[Dealing]
    def __init__(self, dealings: _Optional[_Iterable[_Union[Dealing, _Mapping]]] = ...) -> None: ...

class MaskedInput(_message.Message):
    __slots__ = ("sender", "vector_digest", "bad_dealers", "signature", "seed")
    SENDER_FIELD_NUMBER: _ClassVar[int]
    VECTOR_DIGEST_FIELD_NUMBER: _ClassVar[int]
    BAD_DEALERS_FIELD_NUMBER: _ClassVar[int]
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    sender: str
    vector_digest: bytes
    bad_dealers: _containers.RepeatedScalarFieldContainer[str]
    signature: bytes
    seed: bytes
    def __init__(self, sender: _Optional[str] = ..., vector_digest: _Optional[bytes] = ..., bad_dealers: _Optional[_Iterable[str]] = ..., signature: _Optional[bytes] = ..., seed: _Optional[bytes] = ...) -> None: ...

class Survivors(_message.Message):
    __slots__ = ("commits",)
    COMMITS_FIELD_NUMBER: _ClassVar[int]
    commits: _containers.RepeatedCompositeFieldContainer[MaskedInput]
    def __init__(self, commits: _Optional[_Iterable[_Union[MaskedInput, _Mapping]]] = ...) -> None: ...

class Consistency(_message.Message):
    __slots__ = ("sender", "signature")
    SENDER_FIELD_NUMBER: _ClassVar[int]
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    sender: str
    signature: bytes
    def __init__(self, sender: _Optional[str] = ..., signature: _Optional[bytes] = ...) -> None: ...

class Signatures(_message.Message):
    __slots__ = ("signed",)
    SIGNED_FIELD_NUMBER: _ClassVar[int]
    signed: _containers.RepeatedCompositeFieldContainer[Consistency]
    def __init__(self, signed: _Optional[_Iterable[_Union[Consistency, _Mapping]]] = ...) -> None: ...

class RevealedShare(_message.Message):
    __slots__ = ("owner", "self_seed", "mask_key", "salt")
    OWNER_FIELD_NUMBER: _ClassVar[int]
    SELF_SEED_FIELD_NUMBER: _ClassVar[int]
    MASK_KEY_FIELD_NUMBER: _ClassVar[int]
    SALT_FIELD_NUMBER: _ClassVar[int]
    owner: str
    self_seed: bytes
    mask_key: bytes
    salt: bytes
    def __init__(self, owner: _Optional[str] = ..., self_seed: _Optional[bytes] = ..., mask_key: _Optional[bytes] = ..., salt: _Optional[bytes] = ...) -> None: ...

class Unmasking(_message.Message):
    __slots__ = ("sender", "shares", "signature")
    SENDER_FIELD_NUMBER: _ClassVar[int]
    SHARES_FIELD_NUMBER: _ClassVar[int]
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    sender: str
    shares: _containers.RepeatedCompositeFieldContainer[RevealedShare]
    signature: bytes
    def __init__(self, sender: _Optional[str] = ..., shares: _Optional[_Iterable[_Union[RevealedShare, _Mapping]]] = ..., signature: _Optional[bytes] = ...) -> None: ...

class Result(_message.Message):
    __slots__ = ("task", "round", "base", "cohort", "survivors", "survivors_transcript", "vector_digest", "signature", "key", "seeds")
    TASK_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    BASE_FIELD_NUMBER: _ClassVar[int]
    COHORT_FIELD_NUMBER: _ClassVar[int]
    SURVIVORS_FIELD_NUMBER: _ClassVar[int]
    SURVIVORS_TRANSCRIPT_FIELD_NUMBER: _ClassVar[int]
    VECTOR_DIGEST_FIELD_NUMBER: _ClassVar[int]
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    KEY_FIELD_NUMBER: _ClassVar[int]
    SEEDS_FIELD_NUMBER: _ClassVar[int]
    task: str
    round: int
    base: bytes
    cohort: _containers.RepeatedScalarFieldContainer[str]
    survivors: _containers.RepeatedScalarFieldContainer[str]
    survivors_transcript: bytes
    vector_digest: bytes
    signature: bytes
    key: KeyName
    seeds: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, task: _Optional[str] = ..., round: _Optional[int] = ..., base: _Optional[bytes] = ..., cohort: _Optional[_Iterable[str]] = ..., survivors: _Optional[_Iterable[str]] = ..., survivors_transcript: _Optional[bytes] = ..., vector_digest: _Optional[bytes] = ..., signature: _Optional[bytes] = ..., key: _Optional[_Union[KeyName, _Mapping]] = ..., seeds: _Optional[_Iterable[bytes]] = ...) -> None: ...
