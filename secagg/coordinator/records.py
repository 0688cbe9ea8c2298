"""The journal's records: what a session writes down, and what it reads back.

One function makes each kind; ``Session`` says when. Shape: ``proto/secagg/v1/journal.proto``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from google.protobuf.message import DecodeError

from secagg.config import SessionConfig, SiloId
from secagg.coordinator.spool import Stored, damaged
from secagg.crypto.digest import DIGEST_BYTES
from secagg.errors import RoundAborted
from secagg.masking.manifest import Manifest
from secagg.masking.messages import Descriptor, Result
from secagg.masking.server import ClientMessage
from secagg.suite import KeyName
from secagg.wire import attempt as wire
from secagg.wire import session as wire_session
from secagg.wire._pb import journal_pb2 as pb
from secagg.wire.session import SignedOpening


def created(session_id: bytes, config: SessionConfig, key: bytes, creator: str) -> pb.Record:
    """A session was created by an admin, by the call with this key."""
    configured = wire_session.config_to_wire(config)
    made = pb.Created(session_id=session_id, config=configured, key=key, creator=creator)
    return pb.Record(created=made)


def task_opened(signed: SignedOpening, weights: Stored | None) -> pb.Record:
    """A task's opening was agreed."""
    opening = wire_session.opening_to_wire(signed)
    stored = None if weights is None else stored_to_wire(weights)
    return pb.Record(task_opened=pb.TaskOpened(opening=opening, weights=stored))


def epoch_begun(epoch: int) -> pb.Record:
    """An epoch of keys has begun."""
    return pb.Record(keyed=pb.Keyed(epoch=epoch))


def key_announced(key: KeyName, members: Mapping[SiloId, bytes]) -> pb.Record:
    """The key of an epoch is made."""
    who = [pb.Member(name=name, key=identity) for name, identity in members.items()]
    return pb.Record(keyed=pb.Keyed(epoch=key.epoch, key_id=key.key_id, members=who))


def said_ready(silo: SiloId, task: str) -> pb.Record:
    """A silo has an update."""
    return pb.Record(said_ready=pb.SaidReady(silo=silo, task=task))


def took_back(silo: SiloId) -> pb.Record:
    """A silo has none any more, and is out of the attempt."""
    return pb.Record(took_back=pb.TookBack(silo=silo))


def attempt_opened(descriptor: Descriptor, manifest: Manifest) -> pb.Record:
    """An attempt was described."""
    members = pb.Members(
        consortium=manifest.consortium,
        version=manifest.version,
        silos=[pb.Member(name=name, key=key) for name, key in manifest.silos.items()],
        coordinator=manifest.coordinator or b"",
        revoked=manifest.revoked,
    )
    opened = pb.AttemptOpened(descriptor=wire.descriptor_to_wire(descriptor), members=members)
    return pb.Record(attempt_opened=opened)


def accepted(
    message: ClientMessage, session_id: bytes, descriptor: Descriptor, vector: Stored | None
) -> pb.Record:
    """A message was accepted."""
    request = wire.client_message_to_wire(
        message,
        session_id=session_id,
        round_number=descriptor.round,
        attempt=descriptor.attempt,
    )
    stored = None if vector is None else stored_to_wire(vector)
    return pb.Record(accepted=pb.Accepted(message=request, vector=stored))


def phase_closed(phase: str) -> pb.Record:
    """A phase was closed, and its broadcast may be seen from now on."""
    return pb.Record(phase_closed=pb.PhaseClosed(phase=phase))


def attempt_aborted(
    round_number: int,
    aborts: Mapping[int, RoundAborted],
    ready: Mapping[SiloId, str],
    excluded: Iterable[SiloId],
) -> pb.Record:
    """An attempt ended without a result; where that leaves the round."""
    return pb.Record(
        attempt_aborted=pb.AttemptAborted(
            aborted=[
                wire_session.aborted_to_wire(error, round_number, number)
                for number, error in aborts.items()
            ],
            ready=[pb.SaidReady(silo=silo, task=task) for silo, task in ready.items()],
            excluded=sorted(excluded),
        )
    )


def released(result: Result, total: Stored) -> pb.Record:
    """A round has its result."""
    stored = stored_to_wire(total)
    return pb.Record(released=pb.Released(result=wire.result_to_wire(result), sum=stored))


def ended(state: str) -> pb.Record:
    """The session is over, by its admin's word."""
    return pb.Record(ended=pb.Ended(state=state))


def parse(data: bytes) -> pb.Record:
    """Read a record back.

    Raises:
        StorageDamaged: it is none.
    """
    try:
        record = pb.Record.FromString(data)
    except DecodeError:
        raise damaged("a row of the journal is no record") from None
    if record.WhichOneof("record") is None:  # CHECK: record-kind
        raise damaged("a row of the journal is of no kind that this version knows")
    return record


def manifest_of(members: pb.Members) -> Manifest:
    """The manifest under which an attempt opened."""
    return Manifest(
        consortium=members.consortium,
        version=members.version,
        silos={SiloId(member.name): member.key for member in members.silos},
        coordinator=members.coordinator or None,
        revoked=tuple(members.revoked),
    )


def stored_to_wire(value: Stored) -> pb.Stored:
    """What is known of a blob."""
    return pb.Stored(size=value.size, chunk_digests=b"".join(value.chunk_digests))


def stored_of(message: pb.Stored) -> Stored:
    """What is known of a blob."""
    joined = message.chunk_digests
    starts = range(0, len(joined), DIGEST_BYTES)
    return Stored(message.size, tuple(joined[at : at + DIGEST_BYTES] for at in starts))
