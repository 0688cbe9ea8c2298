from secagg.wire._pb import masking_pb2 as _masking_pb2
from secagg.wire._pb import service_pb2 as _service_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Stored(_message.Message):
    __slots__ = ("size", "chunk_digests")
    SIZE_FIELD_NUMBER: _ClassVar[int]
    CHUNK_DIGESTS_FIELD_NUMBER: _ClassVar[int]
    size: int
    chunk_digests: bytes
    def __init__(self, size: _Optional[int] = ..., chunk_digests: _Optional[bytes] = ...) -> None: ...

class Created(_message.Message):
    __slots__ = ("session_id", "config", "key", "creator")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    CONFIG_FIELD_NUMBER: _ClassVar[int]
    KEY_FIELD_NUMBER: _ClassVar[int]
    CREATOR_FIELD_NUMBER: _ClassVar[int]
    session_id: bytes
    config: _service_pb2.SessionConfig
    key: bytes
    creator: str
    def __init__(self, session_id: _Optional[bytes] = ..., config: _Optional[_Union[_service_pb2.SessionConfig, _Mapping]] = ..., key: _Optional[bytes] = ..., creator: _Optional[str] = ...) -> None: ...

class TaskOpened(_message.Message):
    __slots__ = ("opening", "weights")
    OPENING_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    opening: _service_pb2.TaskOpening
    weights: Stored
    def __init__(self, opening: _Optional[_Union[_service_pb2.TaskOpening, _Mapping]] = ..., weights: _Optional[_Union[Stored, _Mapping]] = ...) -> None: ...

class SaidReady(_message.Message):
    __slots__ = ("silo", "task")
    SILO_FIELD_NUMBER: _ClassVar[int]
    TASK_FIELD_NUMBER: _ClassVar[int]
    silo: str
    task: str
    def __init__(self, silo: _Optional[str] = ..., task: _Optional[str] = ...) -> None: ...

class TookBack(_message.Message):
    __slots__ = ("silo",)
    SILO_FIELD_NUMBER: _ClassVar[int]
    silo: str
    def __init__(self, silo: _Optional[str] = ...) -> None: ...

class Member(_message.Message):
    __slots__ = ("name", "key")
    NAME_FIELD_NUMBER: _ClassVar[int]
    KEY_FIELD_NUMBER: _ClassVar[int]
    name: str
    key: bytes
    def __init__(self, name: _Optional[str] = ..., key: _Optional[bytes] = ...) -> None: ...

class Members(_message.Message):
    __slots__ = ("consortium", "version", "silos", "coordinator", "revoked")
    CONSORTIUM_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    SILOS_FIELD_NUMBER: _ClassVar[int]
    COORDINATOR_FIELD_NUMBER: _ClassVar[int]
    REVOKED_FIELD_NUMBER: _ClassVar[int]
    consortium: str
    version: int
    silos: _containers.RepeatedCompositeFieldContainer[Member]
    coordinator: bytes
    revoked: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, consortium: _Optional[str] = ..., version: _Optional[int] = ..., silos: _Optional[_Iterable[_Union[Member, _Mapping]]] = ..., coordinator: _Optional[bytes] = ..., revoked: _Optional[_Iterable[str]] = ...) -> None: ...

class AttemptOpened(_message.Message):
    __slots__ = ("descriptor", "members")
    DESCRIPTOR_FIELD_NUMBER: _ClassVar[int]
    MEMBERS_FIELD_NUMBER: _ClassVar[int]
    descriptor: _masking_pb2.Descriptor
    members: Members
    def __init__(self, descriptor: _Optional[_Union[_masking_pb2.Descriptor, _Mapping]] = ..., members: _Optional[_Union[Members, _Mapping]] = ...) -> None: ...

class Accepted(_message.Message):
    __slots__ = ("message", "vector")
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    VECTOR_FIELD_NUMBER: _ClassVar[int]
    message: _service_pb2.SendRequest
    vector: Stored
    def __init__(self, message: _Optional[_Union[_service_pb2.SendRequest, _Mapping]] = ..., vector: _Optional[_Union[Stored, _Mapping]] = ...) -> None: ...

class PhaseClosed(_message.Message):
    __slots__ = ("phase",)
    PHASE_FIELD_NUMBER: _ClassVar[int]
    phase: str
    def __init__(self, phase: _Optional[str] = ...) -> None: ...

class AttemptAborted(_message.Message):
    __slots__ = ("aborted", "ready", "excluded")
    ABORTED_FIELD_NUMBER: _ClassVar[int]
    READY_FIELD_NUMBER: _ClassVar[int]
    EXCLUDED_FIELD_NUMBER: _ClassVar[int]
    aborted: _containers.RepeatedCompositeFieldContainer[_service_pb2.Aborted]
    ready: _containers.RepeatedCompositeFieldContainer[SaidReady]
    excluded: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, aborted: _Optional[_Iterable[_Union[_service_pb2.Aborted, _Mapping]]] = ..., ready: _Optional[_Iterable[_Union[SaidReady, _Mapping]]] = ..., excluded: _Optional[_Iterable[str]] = ...) -> None: ...

class Released(_message.Message):
    __slots__ = ("result", "sum")
    RESULT_FIELD_NUMBER: _ClassVar[int]
    SUM_FIELD_NUMBER: _ClassVar[int]
    result: _masking_pb2.Result
    sum: Stored
    def __init__(self, result: _Optional[_Union[_masking_pb2.Result, _Mapping]] = ..., sum: _Optional[_Union[Stored, _Mapping]] = ...) -> None: ...

class Keyed(_message.Message):
    __slots__ = ("epoch", "key_id", "members")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    KEY_ID_FIELD_NUMBER: _ClassVar[int]
    MEMBERS_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    key_id: bytes
    members: _containers.RepeatedCompositeFieldContainer[Member]
    def __init__(self, epoch: _Optional[int] = ..., key_id: _Optional[bytes] = ..., members: _Optional[_Iterable[_Union[Member, _Mapping]]] = ...) -> None: ...

class Ended(_message.Message):
    __slots__ = ("state",)
    STATE_FIELD_NUMBER: _ClassVar[int]
    state: str
    def __init__(self, state: _Optional[str] = ...) -> None: ...

class Record(_message.Message):
    __slots__ = ("created", "task_opened", "said_ready", "took_back", "attempt_opened", "accepted", "phase_closed", "attempt_aborted", "released", "ended", "keyed")
    CREATED_FIELD_NUMBER: _ClassVar[int]
    TASK_OPENED_FIELD_NUMBER: _ClassVar[int]
    SAID_READY_FIELD_NUMBER: _ClassVar[int]
    TOOK_BACK_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_OPENED_FIELD_NUMBER: _ClassVar[int]
    ACCEPTED_FIELD_NUMBER: _ClassVar[int]
    PHASE_CLOSED_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_ABORTED_FIELD_NUMBER: _ClassVar[int]
    RELEASED_FIELD_NUMBER: _ClassVar[int]
    ENDED_FIELD_NUMBER: _ClassVar[int]
    KEYED_FIELD_NUMBER: _ClassVar[int]
    created: Created
    task_opened: TaskOpened
    said_ready: SaidReady
    took_back: TookBack
    attempt_opened: AttemptOpened
    accepted: Accepted
    phase_closed: PhaseClosed
    attempt_aborted: AttemptAborted
    released: Released
    ended: Ended
    keyed: Keyed
    def __init__(self, created: _Optional[_Union[Created, _Mapping]] = ..., task_opened: _Optional[_Union[TaskOpened, _Mapping]] = ..., said_ready: _Optional[_Union[SaidReady, _Mapping]] = ..., took_back: _Optional[_Union[TookBack, _Mapping]] = ..., attempt_opened: _Optional[_Union[AttemptOpened, _Mapping]] = ..., accepted: _Optional[_Union[Accepted, _Mapping]] = ..., phase_closed: _Optional[_Union[PhaseClosed, _Mapping]] = ..., attempt_aborted: _Optional[_Union[AttemptAborted, _Mapping]] = ..., released: _Optional[_Union[Released, _Mapping]] = ..., ended: _Optional[_Union[Ended, _Mapping]] = ..., keyed: _Optional[_Union[Keyed, _Mapping]] = ...) -> None: ...
