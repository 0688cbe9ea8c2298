"""What a run in this process changes in the SDK is undone: other tests share the process."""

from __future__ import annotations

import grpc
import pytest

from client_sdk import channel
from client_sdk.channel import Channel

from . import silo, witness


@pytest.fixture(autouse=True)
def _untouched_sdk(monkeypatch: pytest.MonkeyPatch) -> None:
    for owner, name in (
        (Channel, "__init__"),
        (Channel, "call"),
        (grpc, "secure_channel"),
        (channel, "_backoff"),
        (witness, "_installed"),
        (silo, "_hurried"),
    ):
        monkeypatch.setattr(owner, name, getattr(owner, name))  # what it is now comes back
