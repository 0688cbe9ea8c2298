"""Every error of ours has one status, which says what kind of refusal it is."""

from __future__ import annotations

import grpc
import pytest

from secagg.coordinator.status import status_of
from secagg.errors import (
    ConfigError,
    Conflict,
    CredentialError,
    FaultyClient,
    IdentityRefused,
    InputError,
    MalformedMessage,
    NotFound,
    QuotaExceeded,
    RoleRefused,
    RoundAborted,
    SecaggError,
    SessionEnded,
    StaleKey,
    StaleModel,
    TooLate,
)

Status = grpc.StatusCode
TABLE = [
    (MalformedMessage("message-size", "x"), Status.INVALID_ARGUMENT),
    (FaultyClient("a", "message-signature", "x"), Status.INVALID_ARGUMENT),
    (FaultyClient("a", "vector-digest", "x"), Status.INVALID_ARGUMENT),
    (ConfigError("name", "x"), Status.INVALID_ARGUMENT),
    (InputError("tensor-shape", "x"), Status.INVALID_ARGUMENT),
    (FaultyClient("a", "phase-early", "x"), Status.FAILED_PRECONDITION),
    (FaultyClient("a", "chunk-gap", "x"), Status.FAILED_PRECONDITION),
    (FaultyClient("a", "attempt-unknown", "x"), Status.FAILED_PRECONDITION),
    (FaultyClient("a", "sender-unexpected", "x"), Status.FAILED_PRECONDITION),
    (FaultyClient("a", "task-proposer", "x"), Status.FAILED_PRECONDITION),
    (FaultyClient("a", "key-maker", "x"), Status.FAILED_PRECONDITION),
    (FaultyClient("a", "key-unused", "x"), Status.INVALID_ARGUMENT),
    (FaultyClient("a", "residue-range", "x"), Status.INVALID_ARGUMENT),
    (TooLate("phase-closed", "x"), Status.FAILED_PRECONDITION),
    (StaleModel("base-stale", "x"), Status.FAILED_PRECONDITION),
    (StaleKey("key-stale", "x"), Status.FAILED_PRECONDITION),
    (Conflict("a", "message-conflict", "x"), Status.ALREADY_EXISTS),
    (IdentityRefused("identity-no-san", "x"), Status.UNAUTHENTICATED),
    (CredentialError("identity-uri", "x"), Status.UNAUTHENTICATED),
    (RoleRefused("identity-role", "x"), Status.PERMISSION_DENIED),
    (RoundAborted("masked_input", 1, 2), Status.ABORTED),
    (SessionEnded("session-over", "x"), Status.ABORTED),
    (NotFound("session-unknown", "x"), Status.NOT_FOUND),
    (QuotaExceeded("weights-size", "x"), Status.RESOURCE_EXHAUSTED),
]


@pytest.mark.parametrize(("error", "status"), TABLE, ids=lambda item: str(item)[:40])
def test_status(error: SecaggError, status: grpc.StatusCode) -> None:
    assert status_of(error) is status
