from secagg.wire._pb import masking_pb2 as _masking_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Step(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    STEP_UNSPECIFIED: _ClassVar[Step]
    STEP_DESCRIPTOR: _ClassVar[Step]
    STEP_ROSTER: _ClassVar[Step]
    STEP_DEALT: _ClassVar[Step]
    STEP_SURVIVORS: _ClassVar[Step]
    STEP_SIGNATURES: _ClassVar[Step]
    STEP_LEFT: _ClassVar[Step]
STEP_UNSPECIFIED: Step
STEP_DESCRIPTOR: Step
STEP_ROSTER: Step
STEP_DEALT: Step
STEP_SURVIVORS: Step
STEP_SIGNATURES: Step
STEP_LEFT: Step

class Ack(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Metric(_message.Message):
    __slots__ = ("name", "bound")
    NAME_FIELD_NUMBER: _ClassVar[int]
    BOUND_FIELD_NUMBER: _ClassVar[int]
    name: str
    bound: float
    def __init__(self, name: _Optional[str] = ..., bound: _Optional[float] = ...) -> None: ...

class TaskConfig(_message.Message):
    __slots__ = ("name", "weighting", "rounds", "ring_bits", "bound", "clip", "weight_cap", "metrics")
    NAME_FIELD_NUMBER: _ClassVar[int]
    WEIGHTING_FIELD_NUMBER: _ClassVar[int]
    ROUNDS_FIELD_NUMBER: _ClassVar[int]
    RING_BITS_FIELD_NUMBER: _ClassVar[int]
    BOUND_FIELD_NUMBER: _ClassVar[int]
    CLIP_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_CAP_FIELD_NUMBER: _ClassVar[int]
    METRICS_FIELD_NUMBER: _ClassVar[int]
    name: str
    weighting: str
    rounds: int
    ring_bits: int
    bound: float
    clip: str
    weight_cap: float
    metrics: _containers.RepeatedCompositeFieldContainer[Metric]
    def __init__(self, name: _Optional[str] = ..., weighting: _Optional[str] = ..., rounds: _Optional[int] = ..., ring_bits: _Optional[int] = ..., bound: _Optional[float] = ..., clip: _Optional[str] = ..., weight_cap: _Optional[float] = ..., metrics: _Optional[_Iterable[_Union[Metric, _Mapping]]] = ...) -> None: ...

class SessionConfig(_message.Message):
    __slots__ = ("name", "consortium", "silos", "protection", "colluders", "threshold", "min_cohort", "mask_prg", "tasks", "chunk_bytes", "train_deadline", "phase_deadline", "max_attempts", "suite")
    NAME_FIELD_NUMBER: _ClassVar[int]
    CONSORTIUM_FIELD_NUMBER: _ClassVar[int]
    SILOS_FIELD_NUMBER: _ClassVar[int]
    PROTECTION_FIELD_NUMBER: _ClassVar[int]
    COLLUDERS_FIELD_NUMBER: _ClassVar[int]
    THRESHOLD_FIELD_NUMBER: _ClassVar[int]
    MIN_COHORT_FIELD_NUMBER: _ClassVar[int]
    MASK_PRG_FIELD_NUMBER: _ClassVar[int]
    TASKS_FIELD_NUMBER: _ClassVar[int]
    CHUNK_BYTES_FIELD_NUMBER: _ClassVar[int]
    TRAIN_DEADLINE_FIELD_NUMBER: _ClassVar[int]
    PHASE_DEADLINE_FIELD_NUMBER: _ClassVar[int]
    MAX_ATTEMPTS_FIELD_NUMBER: _ClassVar[int]
    SUITE_FIELD_NUMBER: _ClassVar[int]
    name: str
    consortium: str
    silos: _containers.RepeatedScalarFieldContainer[str]
    protection: str
    colluders: int
    threshold: str
    min_cohort: int
    mask_prg: str
    tasks: _containers.RepeatedCompositeFieldContainer[TaskConfig]
    chunk_bytes: int
    train_deadline: float
    phase_deadline: float
    max_attempts: int
    suite: str
    def __init__(self, name: _Optional[str] = ..., consortium: _Optional[str] = ..., silos: _Optional[_Iterable[str]] = ..., protection: _Optional[str] = ..., colluders: _Optional[int] = ..., threshold: _Optional[str] = ..., min_cohort: _Optional[int] = ..., mask_prg: _Optional[str] = ..., tasks: _Optional[_Iterable[_Union[TaskConfig, _Mapping]]] = ..., chunk_bytes: _Optional[int] = ..., train_deadline: _Optional[float] = ..., phase_deadline: _Optional[float] = ..., max_attempts: _Optional[int] = ..., suite: _Optional[str] = ...) -> None: ...

class JoinSessionRequest(_message.Message):
    __slots__ = ("session",)
    SESSION_FIELD_NUMBER: _ClassVar[int]
    session: str
    def __init__(self, session: _Optional[str] = ...) -> None: ...

class JoinSessionReply(_message.Message):
    __slots__ = ("session_id", "config", "manifest")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    CONFIG_FIELD_NUMBER: _ClassVar[int]
    MANIFEST_FIELD_NUMBER: _ClassVar[int]
    session_id: bytes
    config: SessionConfig
    manifest: bytes
    def __init__(self, session_id: _Optional[bytes] = ..., config: _Optional[_Union[SessionConfig, _Mapping]] = ..., manifest: _Optional[bytes] = ...) -> None: ...

class Tensor(_message.Message):
    __slots__ = ("name", "shape")
    NAME_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    name: str
    shape: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, name: _Optional[str] = ..., shape: _Optional[_Iterable[int]] = ...) -> None: ...

class TaskOpening(_message.Message):
    __slots__ = ("task", "tensors", "step", "weights_digest", "weights_bytes", "proposer", "signature", "sealed_digest")
    TASK_FIELD_NUMBER: _ClassVar[int]
    TENSORS_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_DIGEST_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_BYTES_FIELD_NUMBER: _ClassVar[int]
    PROPOSER_FIELD_NUMBER: _ClassVar[int]
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    SEALED_DIGEST_FIELD_NUMBER: _ClassVar[int]
    task: str
    tensors: _containers.RepeatedCompositeFieldContainer[Tensor]
    step: str
    weights_digest: bytes
    weights_bytes: int
    proposer: str
    signature: bytes
    sealed_digest: bytes
    def __init__(self, task: _Optional[str] = ..., tensors: _Optional[_Iterable[_Union[Tensor, _Mapping]]] = ..., step: _Optional[str] = ..., weights_digest: _Optional[bytes] = ..., weights_bytes: _Optional[int] = ..., proposer: _Optional[str] = ..., signature: _Optional[bytes] = ..., sealed_digest: _Optional[bytes] = ...) -> None: ...

class OpenTaskRequest(_message.Message):
    __slots__ = ("session_id", "task")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    TASK_FIELD_NUMBER: _ClassVar[int]
    session_id: bytes
    task: str
    def __init__(self, session_id: _Optional[bytes] = ..., task: _Optional[str] = ...) -> None: ...

class OpenTaskReply(_message.Message):
    __slots__ = ("opening", "propose")
    OPENING_FIELD_NUMBER: _ClassVar[int]
    PROPOSE_FIELD_NUMBER: _ClassVar[int]
    opening: TaskOpening
    propose: bool
    def __init__(self, opening: _Optional[_Union[TaskOpening, _Mapping]] = ..., propose: bool = ...) -> None: ...

class ProposeTaskRequest(_message.Message):
    __slots__ = ("session_id", "opening")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    OPENING_FIELD_NUMBER: _ClassVar[int]
    session_id: bytes
    opening: TaskOpening
    def __init__(self, session_id: _Optional[bytes] = ..., opening: _Optional[_Union[TaskOpening, _Mapping]] = ...) -> None: ...

class ReadyRequest(_message.Message):
    __slots__ = ("session_id", "task", "base", "key")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    TASK_FIELD_NUMBER: _ClassVar[int]
    BASE_FIELD_NUMBER: _ClassVar[int]
    KEY_FIELD_NUMBER: _ClassVar[int]
    session_id: bytes
    task: str
    base: bytes
    key: _masking_pb2.KeyName
    def __init__(self, session_id: _Optional[bytes] = ..., task: _Optional[str] = ..., base: _Optional[bytes] = ..., key: _Optional[_Union[_masking_pb2.KeyName, _Mapping]] = ...) -> None: ...

class KeyRequest(_message.Message):
    __slots__ = ("epoch", "silo", "ephemeral", "signature")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    SILO_FIELD_NUMBER: _ClassVar[int]
    EPHEMERAL_FIELD_NUMBER: _ClassVar[int]
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    silo: str
    ephemeral: bytes
    signature: bytes
    def __init__(self, epoch: _Optional[int] = ..., silo: _Optional[str] = ..., ephemeral: _Optional[bytes] = ..., signature: _Optional[bytes] = ...) -> None: ...

class KeyBox(_message.Message):
    __slots__ = ("epoch", "sender", "recipient", "sender_ephemeral", "recipient_ephemeral", "key_id", "sealed", "signature")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    SENDER_FIELD_NUMBER: _ClassVar[int]
    RECIPIENT_FIELD_NUMBER: _ClassVar[int]
    SENDER_EPHEMERAL_FIELD_NUMBER: _ClassVar[int]
    RECIPIENT_EPHEMERAL_FIELD_NUMBER: _ClassVar[int]
    KEY_ID_FIELD_NUMBER: _ClassVar[int]
    SEALED_FIELD_NUMBER: _ClassVar[int]
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    sender: str
    recipient: str
    sender_ephemeral: bytes
    recipient_ephemeral: bytes
    key_id: bytes
    sealed: bytes
    signature: bytes
    def __init__(self, epoch: _Optional[int] = ..., sender: _Optional[str] = ..., recipient: _Optional[str] = ..., sender_ephemeral: _Optional[bytes] = ..., recipient_ephemeral: _Optional[bytes] = ..., key_id: _Optional[bytes] = ..., sealed: _Optional[bytes] = ..., signature: _Optional[bytes] = ...) -> None: ...

class AskKeyRequest(_message.Message):
    __slots__ = ("session_id", "request")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    session_id: bytes
    request: KeyRequest
    def __init__(self, session_id: _Optional[bytes] = ..., request: _Optional[_Union[KeyRequest, _Mapping]] = ...) -> None: ...

class AskKeyReply(_message.Message):
    __slots__ = ("epoch", "make", "box")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    MAKE_FIELD_NUMBER: _ClassVar[int]
    BOX_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    make: bool
    box: KeyBox
    def __init__(self, epoch: _Optional[int] = ..., make: bool = ..., box: _Optional[_Union[KeyBox, _Mapping]] = ...) -> None: ...

class AnnounceKeyRequest(_message.Message):
    __slots__ = ("session_id", "key", "members")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    KEY_FIELD_NUMBER: _ClassVar[int]
    MEMBERS_FIELD_NUMBER: _ClassVar[int]
    session_id: bytes
    key: _masking_pb2.KeyName
    members: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, session_id: _Optional[bytes] = ..., key: _Optional[_Union[_masking_pb2.KeyName, _Mapping]] = ..., members: _Optional[_Iterable[str]] = ...) -> None: ...

class AwaitKeyRequestsRequest(_message.Message):
    __slots__ = ("session_id", "key")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    KEY_FIELD_NUMBER: _ClassVar[int]
    session_id: bytes
    key: _masking_pb2.KeyName
    def __init__(self, session_id: _Optional[bytes] = ..., key: _Optional[_Union[_masking_pb2.KeyName, _Mapping]] = ...) -> None: ...

class AwaitKeyRequestsReply(_message.Message):
    __slots__ = ("requests", "checkpoints")
    REQUESTS_FIELD_NUMBER: _ClassVar[int]
    CHECKPOINTS_FIELD_NUMBER: _ClassVar[int]
    requests: _containers.RepeatedCompositeFieldContainer[KeyRequest]
    checkpoints: _containers.RepeatedCompositeFieldContainer[CheckpointWish]
    def __init__(self, requests: _Optional[_Iterable[_Union[KeyRequest, _Mapping]]] = ..., checkpoints: _Optional[_Iterable[_Union[CheckpointWish, _Mapping]]] = ...) -> None: ...

class CheckpointWish(_message.Message):
    __slots__ = ("task", "results", "need")
    TASK_FIELD_NUMBER: _ClassVar[int]
    RESULTS_FIELD_NUMBER: _ClassVar[int]
    NEED_FIELD_NUMBER: _ClassVar[int]
    task: str
    results: int
    need: int
    def __init__(self, task: _Optional[str] = ..., results: _Optional[int] = ..., need: _Optional[int] = ...) -> None: ...

class Checkpoint(_message.Message):
    __slots__ = ("task", "results", "sender", "size", "digest", "signature")
    TASK_FIELD_NUMBER: _ClassVar[int]
    RESULTS_FIELD_NUMBER: _ClassVar[int]
    SENDER_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    task: str
    results: int
    sender: str
    size: int
    digest: bytes
    signature: bytes
    def __init__(self, task: _Optional[str] = ..., results: _Optional[int] = ..., sender: _Optional[str] = ..., size: _Optional[int] = ..., digest: _Optional[bytes] = ..., signature: _Optional[bytes] = ...) -> None: ...

class AskCheckpointRequest(_message.Message):
    __slots__ = ("session_id", "wish", "refused")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    WISH_FIELD_NUMBER: _ClassVar[int]
    REFUSED_FIELD_NUMBER: _ClassVar[int]
    session_id: bytes
    wish: CheckpointWish
    refused: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, session_id: _Optional[bytes] = ..., wish: _Optional[_Union[CheckpointWish, _Mapping]] = ..., refused: _Optional[_Iterable[str]] = ...) -> None: ...

class AskCheckpointReply(_message.Message):
    __slots__ = ("checkpoints",)
    CHECKPOINTS_FIELD_NUMBER: _ClassVar[int]
    checkpoints: _containers.RepeatedCompositeFieldContainer[Checkpoint]
    def __init__(self, checkpoints: _Optional[_Iterable[_Union[Checkpoint, _Mapping]]] = ...) -> None: ...

class OfferCheckpointRequest(_message.Message):
    __slots__ = ("session_id", "checkpoint")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    CHECKPOINT_FIELD_NUMBER: _ClassVar[int]
    session_id: bytes
    checkpoint: Checkpoint
    def __init__(self, session_id: _Optional[bytes] = ..., checkpoint: _Optional[_Union[Checkpoint, _Mapping]] = ...) -> None: ...

class SendKeyBoxRequest(_message.Message):
    __slots__ = ("session_id", "box")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    BOX_FIELD_NUMBER: _ClassVar[int]
    session_id: bytes
    box: KeyBox
    def __init__(self, session_id: _Optional[bytes] = ..., box: _Optional[_Union[KeyBox, _Mapping]] = ...) -> None: ...

class EndKeyRequest(_message.Message):
    __slots__ = ("session_id", "key", "round")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    KEY_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    session_id: bytes
    key: _masking_pb2.KeyName
    round: int
    def __init__(self, session_id: _Optional[bytes] = ..., key: _Optional[_Union[_masking_pb2.KeyName, _Mapping]] = ..., round: _Optional[int] = ...) -> None: ...

class NextRequest(_message.Message):
    __slots__ = ("session_id", "round", "attempt", "seen", "key")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    SEEN_FIELD_NUMBER: _ClassVar[int]
    KEY_FIELD_NUMBER: _ClassVar[int]
    session_id: bytes
    round: int
    attempt: int
    seen: Step
    key: _masking_pb2.KeyName
    def __init__(self, session_id: _Optional[bytes] = ..., round: _Optional[int] = ..., attempt: _Optional[int] = ..., seen: _Optional[_Union[Step, str]] = ..., key: _Optional[_Union[_masking_pb2.KeyName, _Mapping]] = ...) -> None: ...

class Aborted(_message.Message):
    __slots__ = ("round", "attempt", "phase", "have", "need", "blamed", "because")
    ROUND_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    PHASE_FIELD_NUMBER: _ClassVar[int]
    HAVE_FIELD_NUMBER: _ClassVar[int]
    NEED_FIELD_NUMBER: _ClassVar[int]
    BLAMED_FIELD_NUMBER: _ClassVar[int]
    BECAUSE_FIELD_NUMBER: _ClassVar[int]
    round: int
    attempt: int
    phase: str
    have: int
    need: int
    blamed: _containers.RepeatedScalarFieldContainer[str]
    because: str
    def __init__(self, round: _Optional[int] = ..., attempt: _Optional[int] = ..., phase: _Optional[str] = ..., have: _Optional[int] = ..., need: _Optional[int] = ..., blamed: _Optional[_Iterable[str]] = ..., because: _Optional[str] = ...) -> None: ...

class NextReply(_message.Message):
    __slots__ = ("descriptor", "roster", "dealt", "survivors", "signatures", "result", "aborted", "ended")
    DESCRIPTOR_FIELD_NUMBER: _ClassVar[int]
    ROSTER_FIELD_NUMBER: _ClassVar[int]
    DEALT_FIELD_NUMBER: _ClassVar[int]
    SURVIVORS_FIELD_NUMBER: _ClassVar[int]
    SIGNATURES_FIELD_NUMBER: _ClassVar[int]
    RESULT_FIELD_NUMBER: _ClassVar[int]
    ABORTED_FIELD_NUMBER: _ClassVar[int]
    ENDED_FIELD_NUMBER: _ClassVar[int]
    descriptor: _masking_pb2.Descriptor
    roster: _masking_pb2.Roster
    dealt: _masking_pb2.Dealt
    survivors: _masking_pb2.Survivors
    signatures: _masking_pb2.Signatures
    result: _masking_pb2.Result
    aborted: Aborted
    ended: str
    def __init__(self, descriptor: _Optional[_Union[_masking_pb2.Descriptor, _Mapping]] = ..., roster: _Optional[_Union[_masking_pb2.Roster, _Mapping]] = ..., dealt: _Optional[_Union[_masking_pb2.Dealt, _Mapping]] = ..., survivors: _Optional[_Union[_masking_pb2.Survivors, _Mapping]] = ..., signatures: _Optional[_Union[_masking_pb2.Signatures, _Mapping]] = ..., result: _Optional[_Union[_masking_pb2.Result, _Mapping]] = ..., aborted: _Optional[_Union[Aborted, _Mapping]] = ..., ended: _Optional[str] = ...) -> None: ...

class SendRequest(_message.Message):
    __slots__ = ("session_id", "round", "attempt", "advertise_keys", "share_keys", "masked_input", "consistency", "unmasking")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    ADVERTISE_KEYS_FIELD_NUMBER: _ClassVar[int]
    SHARE_KEYS_FIELD_NUMBER: _ClassVar[int]
    MASKED_INPUT_FIELD_NUMBER: _ClassVar[int]
    CONSISTENCY_FIELD_NUMBER: _ClassVar[int]
    UNMASKING_FIELD_NUMBER: _ClassVar[int]
    session_id: bytes
    round: int
    attempt: int
    advertise_keys: _masking_pb2.AdvertiseKeys
    share_keys: _masking_pb2.ShareKeys
    masked_input: _masking_pb2.MaskedInput
    consistency: _masking_pb2.Consistency
    unmasking: _masking_pb2.Unmasking
    def __init__(self, session_id: _Optional[bytes] = ..., round: _Optional[int] = ..., attempt: _Optional[int] = ..., advertise_keys: _Optional[_Union[_masking_pb2.AdvertiseKeys, _Mapping]] = ..., share_keys: _Optional[_Union[_masking_pb2.ShareKeys, _Mapping]] = ..., masked_input: _Optional[_Union[_masking_pb2.MaskedInput, _Mapping]] = ..., consistency: _Optional[_Union[_masking_pb2.Consistency, _Mapping]] = ..., unmasking: _Optional[_Union[_masking_pb2.Unmasking, _Mapping]] = ...) -> None: ...

class Blob(_message.Message):
    __slots__ = ("vector", "sum", "weights", "checkpoint")
    class Vector(_message.Message):
        __slots__ = ("round", "attempt")
        ROUND_FIELD_NUMBER: _ClassVar[int]
        ATTEMPT_FIELD_NUMBER: _ClassVar[int]
        round: int
        attempt: int
        def __init__(self, round: _Optional[int] = ..., attempt: _Optional[int] = ...) -> None: ...
    class Checkpoint(_message.Message):
        __slots__ = ("task", "sender", "digest")
        TASK_FIELD_NUMBER: _ClassVar[int]
        SENDER_FIELD_NUMBER: _ClassVar[int]
        DIGEST_FIELD_NUMBER: _ClassVar[int]
        task: str
        sender: str
        digest: bytes
        def __init__(self, task: _Optional[str] = ..., sender: _Optional[str] = ..., digest: _Optional[bytes] = ...) -> None: ...
    VECTOR_FIELD_NUMBER: _ClassVar[int]
    SUM_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    CHECKPOINT_FIELD_NUMBER: _ClassVar[int]
    vector: Blob.Vector
    sum: int
    weights: str
    checkpoint: Blob.Checkpoint
    def __init__(self, vector: _Optional[_Union[Blob.Vector, _Mapping]] = ..., sum: _Optional[int] = ..., weights: _Optional[str] = ..., checkpoint: _Optional[_Union[Blob.Checkpoint, _Mapping]] = ...) -> None: ...

class PutChunkRequest(_message.Message):
    __slots__ = ("session_id", "blob", "offset", "total", "data")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    BLOB_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    TOTAL_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    session_id: bytes
    blob: Blob
    offset: int
    total: int
    data: bytes
    def __init__(self, session_id: _Optional[bytes] = ..., blob: _Optional[_Union[Blob, _Mapping]] = ..., offset: _Optional[int] = ..., total: _Optional[int] = ..., data: _Optional[bytes] = ...) -> None: ...

class GetChunkRequest(_message.Message):
    __slots__ = ("session_id", "blob", "offset")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    BLOB_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    session_id: bytes
    blob: Blob
    offset: int
    def __init__(self, session_id: _Optional[bytes] = ..., blob: _Optional[_Union[Blob, _Mapping]] = ..., offset: _Optional[int] = ...) -> None: ...

class GetChunkReply(_message.Message):
    __slots__ = ("data",)
    DATA_FIELD_NUMBER: _ClassVar[int]
    data: bytes
    def __init__(self, data: _Optional[bytes] = ...) -> None: ...

class ListResultsRequest(_message.Message):
    __slots__ = ("session_id", "after")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    AFTER_FIELD_NUMBER: _ClassVar[int]
    session_id: bytes
    after: int
    def __init__(self, session_id: _Optional[bytes] = ..., after: _Optional[int] = ...) -> None: ...

class ListResultsReply(_message.Message):
    __slots__ = ("results",)
    RESULTS_FIELD_NUMBER: _ClassVar[int]
    results: _containers.RepeatedCompositeFieldContainer[_masking_pb2.Result]
    def __init__(self, results: _Optional[_Iterable[_Union[_masking_pb2.Result, _Mapping]]] = ...) -> None: ...

class LeaveRequest(_message.Message):
    __slots__ = ("session_id",)
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    session_id: bytes
    def __init__(self, session_id: _Optional[bytes] = ...) -> None: ...

class CreateSessionRequest(_message.Message):
    __slots__ = ("config", "key")
    CONFIG_FIELD_NUMBER: _ClassVar[int]
    KEY_FIELD_NUMBER: _ClassVar[int]
    config: SessionConfig
    key: bytes
    def __init__(self, config: _Optional[_Union[SessionConfig, _Mapping]] = ..., key: _Optional[bytes] = ...) -> None: ...

class CreateSessionReply(_message.Message):
    __slots__ = ("session_id",)
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    session_id: bytes
    def __init__(self, session_id: _Optional[bytes] = ...) -> None: ...

class ListSessionsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class SessionSummary(_message.Message):
    __slots__ = ("name", "state", "protection", "silos", "results")
    NAME_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    PROTECTION_FIELD_NUMBER: _ClassVar[int]
    SILOS_FIELD_NUMBER: _ClassVar[int]
    RESULTS_FIELD_NUMBER: _ClassVar[int]
    name: str
    state: str
    protection: str
    silos: int
    results: int
    def __init__(self, name: _Optional[str] = ..., state: _Optional[str] = ..., protection: _Optional[str] = ..., silos: _Optional[int] = ..., results: _Optional[int] = ...) -> None: ...

class ListSessionsReply(_message.Message):
    __slots__ = ("sessions",)
    SESSIONS_FIELD_NUMBER: _ClassVar[int]
    sessions: _containers.RepeatedCompositeFieldContainer[SessionSummary]
    def __init__(self, sessions: _Optional[_Iterable[_Union[SessionSummary, _Mapping]]] = ...) -> None: ...

class ShowSessionRequest(_message.Message):
    __slots__ = ("name",)
    NAME_FIELD_NUMBER: _ClassVar[int]
    name: str
    def __init__(self, name: _Optional[str] = ...) -> None: ...

class SiloState(_message.Message):
    __slots__ = ("name", "state", "last_call_age")
    NAME_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    LAST_CALL_AGE_FIELD_NUMBER: _ClassVar[int]
    name: str
    state: str
    last_call_age: float
    def __init__(self, name: _Optional[str] = ..., state: _Optional[str] = ..., last_call_age: _Optional[float] = ...) -> None: ...

class ShowSessionReply(_message.Message):
    __slots__ = ("summary", "config", "session_id", "round", "attempt", "phase", "silos", "last_abort", "results")
    SUMMARY_FIELD_NUMBER: _ClassVar[int]
    CONFIG_FIELD_NUMBER: _ClassVar[int]
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    PHASE_FIELD_NUMBER: _ClassVar[int]
    SILOS_FIELD_NUMBER: _ClassVar[int]
    LAST_ABORT_FIELD_NUMBER: _ClassVar[int]
    RESULTS_FIELD_NUMBER: _ClassVar[int]
    summary: SessionSummary
    config: SessionConfig
    session_id: bytes
    round: int
    attempt: int
    phase: str
    silos: _containers.RepeatedCompositeFieldContainer[SiloState]
    last_abort: Aborted
    results: _containers.RepeatedCompositeFieldContainer[_masking_pb2.Result]
    def __init__(self, summary: _Optional[_Union[SessionSummary, _Mapping]] = ..., config: _Optional[_Union[SessionConfig, _Mapping]] = ..., session_id: _Optional[bytes] = ..., round: _Optional[int] = ..., attempt: _Optional[int] = ..., phase: _Optional[str] = ..., silos: _Optional[_Iterable[_Union[SiloState, _Mapping]]] = ..., last_abort: _Optional[_Union[Aborted, _Mapping]] = ..., results: _Optional[_Iterable[_Union[_masking_pb2.Result, _Mapping]]] = ...) -> None: ...

class AbortSessionRequest(_message.Message):
    __slots__ = ("name",)
    NAME_FIELD_NUMBER: _ClassVar[int]
    name: str
    def __init__(self, name: _Optional[str] = ...) -> None: ...
