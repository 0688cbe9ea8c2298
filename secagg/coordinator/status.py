"""Errors to gRPC status codes. The only file of the coordinator that knows them.

A refused caller gets the status, the error's text and its stable code (trailing metadata
``secagg-code``); where the same call may be served later, also after how many milliseconds
(``secagg-retry-after-ms``). An error that is not ours is INTERNAL without a word of what it was.
"""

from __future__ import annotations

from typing import Final

import grpc

from secagg.coordinator.quotas import TooSlow
from secagg.errors import (
    Conflict,
    CredentialError,
    FaultyClient,
    IdentityRefused,
    MalformedMessage,
    NotFound,
    QuotaExceeded,
    RoleRefused,
    RoundAborted,
    SecaggError,
    SessionEnded,
    StaleKey,
    StaleModel,
    StorageBusy,
    TooLate,
)

CODE_KEY: Final = "secagg-code"
RETRY_KEY: Final = "secagg-retry-after-ms"
_WRONG_PHASE: Final = frozenset(
    {
        "phase-early",
        "chunk-gap",
        "attempt-unknown",
        "sender-unexpected",
        "task-proposer",
        "key-maker",
    }
)
_BY_CLASS: Final[tuple[tuple[type[SecaggError], grpc.StatusCode], ...]] = (
    (IdentityRefused, grpc.StatusCode.UNAUTHENTICATED),
    (CredentialError, grpc.StatusCode.UNAUTHENTICATED),
    (RoleRefused, grpc.StatusCode.PERMISSION_DENIED),
    (Conflict, grpc.StatusCode.ALREADY_EXISTS),
    (FaultyClient, grpc.StatusCode.INVALID_ARGUMENT),
    (MalformedMessage, grpc.StatusCode.INVALID_ARGUMENT),
    (TooLate, grpc.StatusCode.FAILED_PRECONDITION),
    (StaleModel, grpc.StatusCode.FAILED_PRECONDITION),
    (StaleKey, grpc.StatusCode.FAILED_PRECONDITION),
    (RoundAborted, grpc.StatusCode.ABORTED),
    (SessionEnded, grpc.StatusCode.ABORTED),
    (NotFound, grpc.StatusCode.NOT_FOUND),
    (QuotaExceeded, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (StorageBusy, grpc.StatusCode.UNAVAILABLE),
    (TooSlow, grpc.StatusCode.DEADLINE_EXCEEDED),
)


def status_of(error: SecaggError) -> grpc.StatusCode:
    """The status that tells a caller what kind of refusal this is."""
    if error.code in _WRONG_PHASE:
        return grpc.StatusCode.FAILED_PRECONDITION
    for kind, status in _BY_CLASS:
        if isinstance(error, kind):
            return status
    return grpc.StatusCode.INVALID_ARGUMENT
