"""Valid values of every message, made from small parts; keys are hashed to be canonical."""

from __future__ import annotations

import hashlib
from typing import Any

from hypothesis import strategies as st

from secagg.ckks.custody import KeyBox, KeyRequest
from secagg.config import (
    Clip,
    MaskPrg,
    Metric,
    Phase,
    Protection,
    SessionConfig,
    SiloId,
    TaskConfig,
    ThresholdRule,
    Weighting,
)
from secagg.crypto.keys import KeyPair
from secagg.crypto.secret import Secret
from secagg.encoding.schema import Schema, TensorSpec
from secagg.errors import RoundAborted
from secagg.masking import messages as core
from secagg.masking.transcript import NO_WEIGHTS, TaskOpening
from secagg.suite import KeyName, Suite
from secagg.wire.session import SignedOpening

names = st.from_regex(r"[a-z0-9]([a-z0-9-]{0,6}[a-z0-9])?", fullmatch=True).map(SiloId)
hashes = st.binary(min_size=32, max_size=32)
signatures = st.binary(min_size=64, max_size=64)
numbers = st.integers(1, 2**32 - 1)
positive = st.floats(1e-99, 1e99, allow_nan=False)


def sorted_names(least: int = 0, most: int = 5) -> st.SearchStrategy[tuple[SiloId, ...]]:
    return st.lists(names, min_size=least, max_size=most, unique=True).map(
        lambda found: tuple(sorted(found))
    )


def by_name(strategy: st.SearchStrategy[Any], key: str) -> st.SearchStrategy[tuple[Any, ...]]:
    """A list that is sorted by its members' names, which differ."""
    return st.lists(strategy, max_size=4, unique_by=lambda item: getattr(item, key)).map(
        lambda items: tuple(sorted(items, key=lambda item: getattr(item, key)))
    )


public_keys = st.binary(min_size=1, max_size=4).map(
    lambda seed: KeyPair.from_private(Secret(hashlib.sha256(seed).digest())).public
)
adverts = st.builds(core.AdvertiseKeys, names, public_keys, public_keys, hashes, signatures)
commitments = by_name(st.builds(core.Commitment, names, hashes, hashes), "holder")
sealed = st.binary(min_size=core.BOX_BYTES, max_size=core.BOX_BYTES)
boxes = by_name(st.builds(core.Box, names, sealed), "recipient")
share_keys = st.builds(core.ShareKeys, names, commitments, boxes, signatures)
dealings = st.builds(core.Dealing, names, commitments, hashes, st.none() | sealed, signatures)
key_names = st.builds(KeyName, numbers, hashes)
seeds = st.just(b"") | hashes
masked_inputs = st.builds(core.MaskedInput, names, hashes, sorted_names(), signatures, seeds)
consistencies = st.builds(core.Consistency, names, signatures)
revealed = st.builds(
    core.RevealedShare,
    names,
    st.sampled_from(core.ShareKind),
    st.binary(min_size=33, max_size=33).map(Secret),
    st.binary(min_size=32, max_size=32).map(Secret),
)
unmaskings = st.builds(core.Unmasking, names, by_name(revealed, "owner"), signatures)
client_messages = st.one_of(adverts, share_keys, masked_inputs, consistencies, unmaskings)
descriptors = st.builds(
    core.Descriptor,
    session_id=hashes,
    session_hash=hashes,
    manifest_version=numbers,
    manifest_digest=hashes,
    task=names,
    round=numbers,
    attempt=numbers,
    nonce=hashes,
    cohort=sorted_names(),
    threshold=numbers,
    base=hashes,
    signature=signatures,
    key=st.none() | key_names,
)
rosters = st.builds(core.Roster, by_name(adverts, "sender"))
dealts = st.builds(core.Dealt, by_name(dealings, "dealer"))
survivors = st.builds(core.Survivors, by_name(masked_inputs, "sender"))
signature_lists = st.builds(core.Signatures, st.lists(consistencies, max_size=4).map(tuple))


@st.composite
def sums(draw: st.DrawFn) -> core.Result:
    survivors, key = draw(sorted_names()), draw(st.none() | key_names)
    count = 0 if key is None else len(survivors)
    return core.Result(
        task=draw(names),
        round=draw(numbers),
        base=draw(hashes),
        cohort=draw(sorted_names()),
        survivors=survivors,
        survivors_transcript=draw(hashes),
        vector_digest=draw(hashes),
        signature=draw(signatures),
        key=key,
        seeds=tuple(draw(st.lists(hashes, min_size=count, max_size=count))),
    )


results = sums()
key_requests = st.builds(KeyRequest, numbers, names, public_keys, signatures)
key_boxes = st.builds(
    KeyBox,
    epoch=numbers,
    sender=names,
    recipient=names,
    sender_ephemeral=public_keys,
    recipient_ephemeral=public_keys,
    key_id=hashes,
    sealed=st.binary(min_size=16, max_size=200),
    signature=signatures,
)
aborts = st.builds(
    RoundAborted,
    st.sampled_from([str(phase) for phase in Phase]),
    st.integers(0, 2**32 - 1),
    st.integers(0, 2**32 - 1),
    blamed=sorted_names(),
    because=st.text(max_size=40),
)


@st.composite
def openings(draw: st.DrawFn) -> SignedOpening:
    shapes = st.lists(st.integers(1, 9), max_size=3).map(tuple)
    tensor_names = st.text(st.characters(codec="utf-8"), min_size=1, max_size=8)
    tensors = draw(st.dictionaries(tensor_names, shapes, min_size=1, max_size=4))
    schema = Schema(tuple(TensorSpec(name, tensors[name]) for name in sorted(tensors)))
    size = draw(st.just(0) | st.integers(1, 2**64 - 1))
    digest = draw(hashes.filter(any)) if size else NO_WEIGHTS
    step = draw(st.text(max_size=40))
    opening = TaskOpening(draw(names), schema, step, digest)
    sealed_digest = draw(st.just(b"") | hashes) if size else b""
    return SignedOpening(opening, size, draw(names), draw(signatures), sealed_digest)


@st.composite
def tasks(draw: st.DrawFn, name: str, protection: Protection) -> TaskConfig:
    weighting = draw(st.sampled_from(Weighting))
    metrics = draw(st.dictionaries(names, positive, max_size=3))
    return TaskConfig(
        name=name,
        weighting=weighting,
        rounds=draw(st.integers(1, 2**31 - 1)),
        ring_bits=None if protection.seals else draw(st.sampled_from([16, 32, 64])),
        bound=draw(positive),
        clip=draw(st.sampled_from(Clip)),
        weight_cap=1.0 if weighting is Weighting.SUM else draw(positive),
        metrics=tuple(Metric(metric, bound) for metric, bound in metrics.items()),
    )


@st.composite
def configs(draw: st.DrawFn) -> SessionConfig:
    silos = draw(sorted_names(3, 8))
    protection = draw(st.sampled_from(Protection))
    return SessionConfig(
        name=draw(names),
        consortium=draw(names),
        silos=silos,
        protection=protection,
        colluders=1,
        threshold=ThresholdRule(*draw(st.sampled_from([(1, 2), (2, 3), (3, 5)]))),
        min_cohort=draw(st.integers(3, len(silos))),
        mask_prg=draw(st.sampled_from(MaskPrg)),
        tasks=tuple(draw(tasks(name, protection)) for name in draw(sorted_names(1, 3))),
        chunk_bytes=64 * draw(st.integers(1, 2**16)),
        train_deadline=draw(positive),
        phase_deadline=draw(positive),
        max_attempts=draw(st.integers(1, 2**32 - 1)),
        suite=draw(st.sampled_from(Suite)) if protection.seals else None,
    )
