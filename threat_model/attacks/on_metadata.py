"""What a silo's calls tell beside what they are for: sizes, numbers, fields, headers.

The coordinator is honest here and only looks. In a session of its own choice it may know what all
silos hold but one thing, so the silos differ in that one thing: silo c's update is empty, or far
smaller. Names are of one length, so that sizes can differ by nothing else. What was said again,
since nothing had come in time, is counted once.

Source: Rescorla (RFC 8446, section 5.4) on record sizes; Kelsey, Compression and Information
Leakage of Plaintext (FSE 2002); Cooper et al. (RFC 6973, section 6.1) on data minimisation.
"""

from __future__ import annotations

import re
import socket
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from typing import Any, Final

import numpy as np
from google.protobuf.message import Message
from google.protobuf.unknown_fields import UnknownFieldSet

from secagg.config import Protection, SiloId, silo_id
from secagg.ring.expand import apply_masks
from threat_model.attacks.attack import Scene, attack
from threat_model.attacks.attempt import Attempt
from threat_model.attacks.evil_coordinator import LENGTH, TASK, EvilCoordinator, make_session
from threat_model.attacks.weak import Function, replaced

EMPTY: Final = silo_id("c")
LIBRARY: Final = re.compile(r"grpc-python/[0-9.]+ grpc-c/[0-9.]+ \([a-z0-9_]+; chttp2\)")
"""How gRPC introduces itself."""
BY_TURNS: Final = frozenset({"ProposeTask"})
"""Asked of one silo by the coordinator, so that it tells nothing."""
POLLS: Final = frozenset({"Next", "Ready", "OpenTask", "AskKey", "AwaitKeyRequests"})
"""Said again where nothing had come in time, which only time can tell: counted once."""
LISTED: Final[Mapping[str, str]] = {
    "AdvertiseKeys": "sender channel_key mask_key self_seed_hash signature",
    "AnnounceKeyRequest": "session_id key members",
    "AskKeyRequest": "session_id request",
    "AwaitKeyRequestsRequest": "session_id key",
    "Blob": "vector sum",
    "Box": "recipient sealed",
    "Commitment": "holder mask_key self_seed",
    "Consistency": "sender signature",
    "GetChunkRequest": "session_id blob offset",
    "JoinSessionRequest": "session",
    "KeyBox": "epoch sender recipient sender_ephemeral recipient_ephemeral key_id sealed signature",
    "KeyName": "epoch key_id",
    "KeyRequest": "epoch silo ephemeral signature",
    "LeaveRequest": "session_id",
    "ListResultsRequest": "session_id after",
    "MaskedInput": "sender vector_digest seed signature",
    "NextRequest": "session_id round attempt seen key",
    "OpenTaskRequest": "session_id task",
    "ProposeTaskRequest": "session_id opening",
    "PutChunkRequest": "session_id blob offset total data",
    "ReadyRequest": "session_id task base key",
    "RevealedShare": "owner self_seed mask_key salt",
    "SendKeyBoxRequest": "session_id box",
    "SendRequest": "session_id round attempt advertise_keys share_keys masked_input consistency "
    "unmasking",
    "ShareKeys": "sender commitments boxes signature",
    "TaskOpening": "task tensors proposer signature weights_digest",
    "Tensor": "name shape",
    "Unmasking": "sender shares signature",
    "Vector": "round attempt",
}
"""All that a silo says in a round of sums, by message; nothing else may be set."""


def play_round(evil: EvilCoordinator) -> None:
    """One honest round to its end, with every silo's call answered."""
    evil.start()
    evil.await_ready(*evil.session.silos)
    Attempt(evil, key=None if evil.desk is None else evil.desk.key).to_masked().conclude(
        *evil.session.silos
    )
    for name in evil.session.silos:
        evil.answer(name)


Seen = dict[SiloId, Counter[Any]]


def compare(evil: EvilCoordinator, *methods: str) -> Seen:
    """How often each silo sent a request of each method and size; of these methods, or of all."""
    looks: Seen = defaultdict(Counter)
    polls = set()
    for silo, method, request in evil.seen:
        poll = (silo, method, request.SerializeToString())
        if method in BY_TURNS or poll in polls or (methods and method not in methods):
            continue
        if method in POLLS:
            polls.add(poll)
        looks[silo][method, request.ByteSize()] += 1
    return looks


def tells(scene: Scene, looks: Seen, nothing: str) -> bool:
    """Whether the empty silo, and it alone, looks different."""
    others = [seen for silo, seen in looks.items() if silo != EMPTY]
    assert others[1:]
    if all(seen == looks[EMPTY] for seen in others):
        scene.refuse(nothing, "silo", "all silos' calls look alike")
    return all(seen == others[0] != looks[EMPTY] for seen in others)


def without_zeros(real: Function) -> Function:
    """``masking.client.mask_input`` with the words that are zero left out before masking."""

    def mask_input(state: Any, dealt: Any, encoded: Any, seed: bytes = b"") -> Any:
        def compact(masks: Any, prg: Any) -> Any:
            words = encoded((), prg)
            kept = words[words != 0].copy()
            apply_masks(state.attempt.ring, kept, masks, prg)
            return kept

        return real(state, dealt, compact, seed)

    return mask_input


@attack(
    threat="message-sizes",
    reason="sizes-equal",
    weakening=replaced("secagg.masking.client:mask_input", without_zeros),
)
def sparse_update_by_size(scene: Scene) -> bool:
    """Reads off the size of the masked vectors which silo's update is empty."""
    with EvilCoordinator(scene) as evil:
        evil.values[EMPTY] = np.zeros(LENGTH)
        evil.start()
        Attempt(evil).to_masked()
        return tells(scene, compare(evil, "PutChunk", "Send"), "sizes-equal")


def halved(real: Function) -> Function:
    """``SealedCodec.encode`` that leaves half of the ciphertext out where all values are zero."""

    def encode(self: Any, tensors: Any, **more: Any) -> Any:
        words = real(self, tensors, **more)
        is_empty = not any(np.any(tensor) for tensor in tensors.values())
        return words[: len(words) // 2].copy() if is_empty else words

    return encode


@attack(
    threat="message-sizes",
    reason="sizes-equal",
    weakening=replaced("secagg.ckks.codec:SealedCodec.encode", halved),
)
def sparse_sealed_update_by_size(scene: Scene) -> bool:
    """The same where updates are sealed as well, with a key that the coordinator has not."""
    with EvilCoordinator(scene, make_session(protection=Protection.CKKS_MASKED)) as evil:
        evil.values[EMPTY] = np.zeros(LENGTH)
        evil.start()
        evil.await_ready(*evil.session.silos)
        assert evil.desk is not None
        Attempt(evil, key=evil.desk.key).to_masked()
        return tells(scene, compare(evil, "PutChunk", "Send"), "sizes-equal")


def eager(real: Function) -> Function:
    """``Session.aggregate`` that takes its Ready back where there is nothing to add."""

    def aggregate(self: Any, task: str, tensors: Any, **more: Any) -> Any:
        if not any(np.any(tensor) for tensor in tensors.values()):
            self._leave()
        return real(self, task, tensors, **more)

    return aggregate


@attack(
    threat="calls-counted",
    reason="calls-equal",
    weakening=replaced("client_sdk.session:Session.aggregate", eager),
)
def empty_update_by_calls(scene: Scene) -> bool:
    """Counts each silo's calls, a whole round long: which one has nothing to add?"""
    with EvilCoordinator(scene) as evil:
        evil.values[EMPTY] = np.zeros(LENGTH)
        play_round(evil)
        return tells(scene, compare(evil), "calls-equal")


def told(request: Message, names: frozenset[str]) -> Iterator[bytes]:
    """All in a request that is not listed: fields, unknown ones, and names of anything else."""
    listed = LISTED[request.DESCRIPTOR.name].split()
    for field in UnknownFieldSet(request):
        yield bytes(field.data) if isinstance(field.data, bytes) else str(field.data).encode()
    for field, value in request.ListFields():
        if field.name not in listed:
            yield f"{field.full_name}={value}".encode()
        for item in value if field.is_repeated else [value]:
            if isinstance(item, Message):
                yield from told(item, names)
            elif isinstance(item, str) and item not in names:
                yield item.encode()


def unlisted(evil: EvilCoordinator) -> list[bytes]:
    """What silos said that nobody needs."""
    names = frozenset({*evil.session.silos, evil.session.name, TASK, "x"})
    return [found for _, _, request in evil.seen for found in told(request, names)]


def telling_more(real: Function) -> Function:
    """``client_message_to_wire`` that adds the machine's name, for support."""

    def to_wire(*args: Any, **more: Any) -> Any:
        request = real(*args, **more)
        name = socket.gethostname().encode()
        request.MergeFromString(b"\xfa\x3f" + bytes([len(name)]) + name)  # field 1023
        return request

    return to_wire


def learns_machine(scene: Scene, found: list[bytes], nothing: str) -> bool:
    """Whether the machine's name is in what was found."""
    if not found:
        scene.refuse(nothing, "silo", "nothing but what is listed")
    return any(socket.gethostname().encode() in item for item in found)


TALKATIVE: Final = replaced("secagg.wire.attempt:client_message_to_wire", telling_more)


@attack(threat="unlisted-fields", reason="only-listed-fields", weakening=TALKATIVE)
def machine_name_in_a_field(scene: Scene) -> bool:
    """Looks through all fields of all requests of a masked round, known to protobuf or not."""
    with EvilCoordinator(scene) as evil:
        play_round(evil)
        return learns_machine(scene, unlisted(evil), "only-listed-fields")


@attack(threat="unlisted-fields", reason="only-listed-fields", weakening=TALKATIVE)
def machine_name_in_a_sealed_round(scene: Scene) -> bool:
    """The same where updates are sealed, with all that is said of the session's key."""
    with EvilCoordinator(scene, make_session(protection=Protection.CKKS_MASKED)) as evil:
        play_round(evil)
        return learns_machine(scene, unlisted(evil), "only-listed-fields")


def introducing(real: Function) -> Function:
    """``_dial`` whose connection says which machine it is of."""

    def dial(address: str, credentials: Any) -> Any:
        import grpc

        secure = grpc.secure_channel

        def named(target: str, keys: Any, options: Any) -> Any:
            agent = ("grpc.primary_user_agent", f"secagg/{socket.gethostname()}")
            return secure(target, keys, [*options, agent])

        grpc.secure_channel = named
        try:
            return real(address, credentials)
        finally:
            grpc.secure_channel = secure

    return dial


@attack(
    threat="telling-headers",
    reason="only-library-headers",
    weakening=replaced("client_sdk.channel:_dial", introducing),
)
def machine_name_in_a_header(scene: Scene) -> bool:
    """Reads the headers of every call: gRPC's own name and version, and nothing else."""
    with EvilCoordinator(scene) as evil:
        evil.start()
        evil.await_ready(*evil.session.silos)
        found = [
            f"{key}={value}".encode()
            for key, value in evil.headers
            if key != "user-agent" or not LIBRARY.fullmatch(str(value))
        ]
        return learns_machine(scene, found, "only-library-headers")
