"""Messages of an attempt, to and from protobuf.

``from_wire`` of a field that protobuf could not parse or that no message could hold raises
``MalformedMessage``; whoever knows the sender turns it into blame.
"""

from __future__ import annotations

from secagg.config import SiloId
from secagg.crypto.secret import Secret
from secagg.errors import MalformedMessage
from secagg.masking import messages as core
from secagg.masking.server import ClientMessage
from secagg.suite import KeyName
from secagg.wire._pb import masking_pb2 as pb
from secagg.wire._pb import service_pb2 as api


def _ids(names: object) -> tuple[SiloId, ...]:
    return tuple(SiloId(str(name)) for name in names)  # type: ignore[attr-defined]


def key_to_wire(value: KeyName | None) -> pb.KeyName | None:
    """Which key, if any."""
    return None if value is None else pb.KeyName(epoch=value.epoch, key_id=value.key_id)


def key_from_wire(message: object, field: str = "key") -> KeyName | None:
    """Which key a message's field names, if it is set."""
    if not message.HasField(field):  # type: ignore[attr-defined]
        return None
    value: pb.KeyName = getattr(message, field)
    return KeyName(value.epoch, value.key_id)


def descriptor_to_wire(value: core.Descriptor) -> pb.Descriptor:
    """Phase 0."""
    return pb.Descriptor(
        session_id=value.session_id,
        session_hash=value.session_hash,
        manifest_version=value.manifest_version,
        manifest_digest=value.manifest_digest,
        task=value.task,
        round=value.round,
        attempt=value.attempt,
        nonce=value.nonce,
        cohort=value.cohort,
        threshold=value.threshold,
        base=value.base,
        signature=value.signature,
        key=key_to_wire(value.key),
    )


def descriptor_from_wire(value: pb.Descriptor) -> core.Descriptor:
    """Phase 0."""
    return core.Descriptor(
        session_id=value.session_id,
        session_hash=value.session_hash,
        manifest_version=value.manifest_version,
        manifest_digest=value.manifest_digest,
        task=value.task,
        round=value.round,
        attempt=value.attempt,
        nonce=value.nonce,
        cohort=_ids(value.cohort),
        threshold=value.threshold,
        base=value.base,
        signature=value.signature,
        key=key_from_wire(value),
    )


def _advert_to_wire(value: core.AdvertiseKeys) -> pb.AdvertiseKeys:
    return pb.AdvertiseKeys(
        sender=value.sender,
        channel_key=value.channel_key,
        mask_key=value.mask_key,
        self_seed_hash=value.self_seed_hash,
        signature=value.signature,
    )


def _advert_from_wire(value: pb.AdvertiseKeys) -> core.AdvertiseKeys:
    return core.AdvertiseKeys(
        SiloId(value.sender),
        value.channel_key,
        value.mask_key,
        value.self_seed_hash,
        value.signature,
    )


def roster_to_wire(value: core.Roster) -> pb.Roster:
    """The broadcast after phase 1."""
    return pb.Roster(adverts=[_advert_to_wire(advert) for advert in value.adverts])


def roster_from_wire(value: pb.Roster) -> core.Roster:
    """The broadcast after phase 1."""
    return core.Roster(tuple(_advert_from_wire(advert) for advert in value.adverts))


def _commitments_to_wire(values: core.Commitments) -> list[pb.Commitment]:
    return [
        pb.Commitment(holder=c.holder, mask_key=c.mask_key, self_seed=c.self_seed) for c in values
    ]


def _commitments_from_wire(values: object) -> core.Commitments:
    return core.Commitments(
        core.Commitment(SiloId(c.holder), c.mask_key, c.self_seed)
        for c in values  # type: ignore[attr-defined]
    )


def _share_keys_to_wire(value: core.ShareKeys) -> pb.ShareKeys:
    return pb.ShareKeys(
        sender=value.sender,
        commitments=_commitments_to_wire(value.commitments),
        boxes=[pb.Box(recipient=box.recipient, sealed=box.sealed) for box in value.boxes],
        signature=value.signature,
    )


def _share_keys_from_wire(value: pb.ShareKeys) -> core.ShareKeys:
    return core.ShareKeys(
        SiloId(value.sender),
        _commitments_from_wire(value.commitments),
        tuple(core.Box(SiloId(box.recipient), box.sealed) for box in value.boxes),
        value.signature,
    )


def dealt_to_wire(value: core.Dealt) -> pb.Dealt:
    """The broadcast after phase 2, to one silo."""
    return pb.Dealt(
        dealings=[
            pb.Dealing(
                dealer=dealing.dealer,
                commitments=_commitments_to_wire(dealing.commitments),
                boxes_digest=dealing.boxes_digest,
                sealed=dealing.sealed,
                signature=dealing.signature,
            )
            for dealing in value.dealings
        ]
    )


def dealt_from_wire(value: pb.Dealt) -> core.Dealt:
    """The broadcast after phase 2, to one silo."""
    return core.Dealt(
        tuple(
            core.Dealing(
                SiloId(dealing.dealer),
                _commitments_from_wire(dealing.commitments),
                dealing.boxes_digest,
                dealing.sealed if dealing.HasField("sealed") else None,
                dealing.signature,
            )
            for dealing in value.dealings
        )
    )


def _masked_input_to_wire(value: core.MaskedInput) -> pb.MaskedInput:
    return pb.MaskedInput(
        sender=value.sender,
        vector_digest=value.vector_digest,
        bad_dealers=value.bad_dealers,
        signature=value.signature,
        seed=value.seed,
    )


def _masked_input_from_wire(value: pb.MaskedInput) -> core.MaskedInput:
    return core.MaskedInput(
        SiloId(value.sender),
        value.vector_digest,
        _ids(value.bad_dealers),
        value.signature,
        value.seed,
    )


def survivors_to_wire(value: core.Survivors) -> pb.Survivors:
    """The broadcast after phase 3."""
    return pb.Survivors(commits=[_masked_input_to_wire(commit) for commit in value.commits])


def survivors_from_wire(value: pb.Survivors) -> core.Survivors:
    """The broadcast after phase 3."""
    return core.Survivors(tuple(_masked_input_from_wire(commit) for commit in value.commits))


def _consistency_to_wire(value: core.Consistency) -> pb.Consistency:
    return pb.Consistency(sender=value.sender, signature=value.signature)


def _consistency_from_wire(value: pb.Consistency) -> core.Consistency:
    return core.Consistency(SiloId(value.sender), value.signature)


def signatures_to_wire(value: core.Signatures) -> pb.Signatures:
    """The broadcast after phase 4."""
    return pb.Signatures(signed=[_consistency_to_wire(signed) for signed in value.signed])


def signatures_from_wire(value: pb.Signatures) -> core.Signatures:
    """The broadcast after phase 4."""
    return core.Signatures(tuple(_consistency_from_wire(signed) for signed in value.signed))


def _share_to_wire(value: core.RevealedShare) -> pb.RevealedShare:
    field = "self_seed" if value.kind is core.ShareKind.SELF_SEED else "mask_key"
    message = pb.RevealedShare(owner=value.owner, salt=value.salt.reveal())
    setattr(message, field, value.share.reveal())
    return message


def _share_from_wire(value: pb.RevealedShare) -> core.RevealedShare:
    match value.WhichOneof("share"):
        case "self_seed":
            kind, share = core.ShareKind.SELF_SEED, value.self_seed
        case "mask_key":
            kind, share = core.ShareKind.MASK_KEY, value.mask_key
        case _:
            # CHECK: share-missing
            raise MalformedMessage("share-missing", "A revealed share is empty.")
    return core.RevealedShare(SiloId(value.owner), kind, Secret(share), Secret(value.salt))


def _unmasking_to_wire(value: core.Unmasking) -> pb.Unmasking:
    return pb.Unmasking(
        sender=value.sender,
        shares=[_share_to_wire(share) for share in value.shares],
        signature=value.signature,
    )


def _unmasking_from_wire(value: pb.Unmasking) -> core.Unmasking:
    return core.Unmasking(
        SiloId(value.sender),
        tuple(_share_from_wire(share) for share in value.shares),
        value.signature,
    )


def result_to_wire(value: core.Result) -> pb.Result:
    """Phase 6."""
    return pb.Result(
        task=value.task,
        round=value.round,
        base=value.base,
        cohort=value.cohort,
        survivors=value.survivors,
        survivors_transcript=value.survivors_transcript,
        vector_digest=value.vector_digest,
        signature=value.signature,
        key=key_to_wire(value.key),
        seeds=value.seeds,
    )


def result_from_wire(value: pb.Result) -> core.Result:
    """Phase 6."""
    return core.Result(
        task=value.task,
        round=value.round,
        base=value.base,
        cohort=_ids(value.cohort),
        survivors=_ids(value.survivors),
        survivors_transcript=value.survivors_transcript,
        vector_digest=value.vector_digest,
        signature=value.signature,
        key=key_from_wire(value),
        seeds=tuple(value.seeds),
    )


def client_message_to_wire(
    message: ClientMessage, *, session_id: bytes, round_number: int, attempt: int
) -> api.SendRequest:
    """One message of an attempt, addressed."""
    request = api.SendRequest(session_id=session_id, round=round_number, attempt=attempt)
    match message:
        case core.AdvertiseKeys():
            request.advertise_keys.CopyFrom(_advert_to_wire(message))
        case core.ShareKeys():
            request.share_keys.CopyFrom(_share_keys_to_wire(message))
        case core.MaskedInput():
            request.masked_input.CopyFrom(_masked_input_to_wire(message))
        case core.Consistency():
            request.consistency.CopyFrom(_consistency_to_wire(message))
        case core.Unmasking():
            request.unmasking.CopyFrom(_unmasking_to_wire(message))
    return request


def client_message_from_wire(request: api.SendRequest) -> ClientMessage:
    """The message that a request carries.

    Raises:
        MalformedMessage: none, or one that no client could send.
    """
    match request.WhichOneof("message"):
        case "advertise_keys":
            return _advert_from_wire(request.advertise_keys)
        case "share_keys":
            return _share_keys_from_wire(request.share_keys)
        case "masked_input":
            return _masked_input_from_wire(request.masked_input)
        case "consistency":
            return _consistency_from_wire(request.consistency)
        case "unmasking":
            return _unmasking_from_wire(request.unmasking)
        case _:
            # CHECK: message-missing
            raise MalformedMessage("message-missing", "A request carries no message.")
