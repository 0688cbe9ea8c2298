"""Messages that cannot be right cannot be written down; bodies tell all else apart."""

from __future__ import annotations

from collections import Counter
from dataclasses import fields, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from secagg.config import MAX_COHORT
from secagg.crypto.secret import Secret
from secagg.crypto.shamir import SHARE_BYTES
from secagg.errors import MalformedMessage
from secagg.masking import messages
from secagg.masking.messages import (
    BOX_BYTES,
    AdvertiseKeys,
    Box,
    Commitment,
    Commitments,
    Consistency,
    Dealing,
    Dealt,
    Descriptor,
    MaskedInput,
    Result,
    RevealedShare,
    Roster,
    ShareKeys,
    ShareKind,
    Signatures,
    Survivors,
    Unmasking,
)
from secagg.suite import KeyName

from .harness import SIGNED_AS, A, B, C, Keyed

H, SIG = b"h" * 32, b"s" * 64
KEY, OTHER_KEY = b"\x09" + bytes(31), b"\x0a" + bytes(31)
SEED, MASK = ShareKind.SELF_SEED, ShareKind.MASK_KEY
NAME = KeyName(1, H)


def share(owner: Any = A, kind: ShareKind = SEED, byte: bytes = b"\x01") -> RevealedShare:
    return RevealedShare(owner, kind, Secret(byte * SHARE_BYTES), Secret(byte * 32))


ADVERT = AdvertiseKeys(A, KEY, OTHER_KEY, H, SIG)
COMMITMENT = Commitment(A, H, H)
BOX = Box(B, bytes(BOX_BYTES))
SHARED = ShareKeys(A, (COMMITMENT, Commitment(B, H, H)), (BOX,), SIG)
DEALING = Dealing(A, SHARED.commitments, H, BOX.sealed, SIG)
COMMIT = MaskedInput(A, H, (B,), SIG)
VOTE = Consistency(A, SIG)
REVEAL = Unmasking(A, (share(A), share(B, MASK)), SIG)
RESULT = Result("training", 1, H, (A, B, C), (A, B), H, H, SIG)
SEALED = MaskedInput(A, H, (B,), SIG, b"c" * 32)
SEALED_RESULT = replace(RESULT, key=NAME, seeds=(b"1" * 32, b"2" * 32))
DESCRIPTOR = Descriptor(H, H, 1, H, "training", 1, 1, H, (A, B, C), 3, H, SIG)
GOOD = {
    type(message).__name__: message
    for message in (
        ADVERT, COMMITMENT, BOX, SHARED, DEALING, COMMIT, VOTE, REVEAL, RESULT, DESCRIPTOR,
        share(), Roster((ADVERT,)), Dealt((DEALING,)), Survivors((COMMIT,)), Signatures((VOTE,)),
    )
}  # fmt: skip

SIZES = {
    "Descriptor": {
        "session_id": 32, "session_hash": 32, "manifest_digest": 32, "nonce": 32, "base": 32,
        "signature": 64,
    },
    "AdvertiseKeys": {"self_seed_hash": 32, "signature": 64},
    "Commitment": {"mask_key": 32, "self_seed": 32},
    "Box": {"sealed": BOX_BYTES},
    "ShareKeys": {"signature": 64},
    "Dealing": {"boxes_digest": 32, "sealed": BOX_BYTES, "signature": 64},
    "MaskedInput": {"vector_digest": 32, "signature": 64},
    "Consistency": {"signature": 64},
    "Unmasking": {"signature": 64},
    "Result": {"base": 32, "survivors_transcript": 32, "vector_digest": 32, "signature": 64},
}  # fmt: skip
NAMES = {
    "Descriptor": "task",
    "AdvertiseKeys": "sender",
    "Commitment": "holder",
    "Box": "recipient",
    "ShareKeys": "sender",
    "Dealing": "dealer",
    "MaskedInput": "sender",
    "Consistency": "sender",
    "RevealedShare": "owner",
    "Unmasking": "sender",
    "Result": "task",
}
LISTS: dict[tuple[str, str], tuple[Any, Any]] = {
    ("Descriptor", "cohort"): (A, B),
    ("Result", "cohort"): (A, B),
    ("Result", "survivors"): (A, B),
    ("MaskedInput", "bad_dealers"): (A, B),
    ("Roster", "adverts"): (ADVERT, replace(ADVERT, sender=B)),
    ("ShareKeys", "commitments"): (COMMITMENT, replace(COMMITMENT, holder=B)),
    ("ShareKeys", "boxes"): (replace(BOX, recipient=A), BOX),
    ("Dealing", "commitments"): (COMMITMENT, replace(COMMITMENT, holder=B)),
    ("Dealt", "dealings"): (DEALING, replace(DEALING, dealer=B)),
    ("Survivors", "commits"): (COMMIT, replace(COMMIT, sender=B)),
    ("Unmasking", "shares"): (share(A), share(B)),
}
NUMBERS = {
    "Descriptor": ("round", "attempt", "threshold", "manifest_version"),
    "Result": ("round",),
}


def check_refused(message: Any, code: str, **changes: Any) -> None:
    with pytest.raises(MalformedMessage) as caught:
        replace(message, **changes)
    assert caught.value.code == code


@pytest.mark.parametrize(
    ("kind", "name", "size"),
    [(kind, name, size) for kind, sizes in SIZES.items() for name, size in sizes.items()],
)
def test_size_of_bytes(kind: str, name: str, size: int) -> None:
    for wrong in (0, size - 1, size + 1):
        check_refused(GOOD[kind], "message-size", **{name: bytes(wrong)})
    replace(GOOD[kind], **{name: bytes(size)})


def test_size_of_a_revealed_share() -> None:
    for wrong in (0, SHARE_BYTES - 1, SHARE_BYTES + 1):
        check_refused(share(), "message-size", share=Secret(bytes(wrong)))
    for wrong in (0, 31, 33):
        check_refused(share(), "message-size", salt=Secret(bytes(wrong)))


@pytest.mark.parametrize(("kind", "name"), NAMES.items())
@pytest.mark.parametrize("bad", ["", "Silo-a", "silo a", "-a", "a-", "a" * 64, "silo-а", "a/b"])
def test_name_that_nobody_has(kind: str, name: str, bad: str) -> None:
    check_refused(GOOD[kind], "message-name", **{name: bad})


@pytest.mark.parametrize(("kind", "name"), LISTS.keys())
def test_list_is_sorted_and_distinct(kind: str, name: str) -> None:
    first, second = LISTS[kind, name]
    replace(GOOD[kind], **{name: (first, second)})
    check_refused(GOOD[kind], "message-order", **{name: (second, first)})
    check_refused(GOOD[kind], "message-order", **{name: (first, first)})
    check_refused(GOOD[kind], "message-order", **{name: (first, second, second)})


@pytest.mark.parametrize(
    ("kind", "name"), [("Descriptor", "cohort"), ("MaskedInput", "bad_dealers")]
)
def test_list_names_members_only(kind: str, name: str) -> None:
    check_refused(GOOD[kind], "message-name", **{name: ("Silo-A", A)})


def test_list_is_no_longer_than_a_cohort() -> None:
    many = tuple(f"s{i:04}" for i in range(MAX_COHORT + 1))
    replace(DESCRIPTOR, cohort=many[:-1])
    check_refused(DESCRIPTOR, "message-order", cohort=many)
    Signatures((VOTE,) * MAX_COHORT)
    check_refused(Signatures(()), "message-order", signed=(VOTE,) * (MAX_COHORT + 1))


@pytest.mark.parametrize(
    ("kind", "name"), [(kind, name) for kind, names in NUMBERS.items() for name in names]
)
def test_number_out_of_range(kind: str, name: str) -> None:
    for bad in (-1, 0, 2**32):
        check_refused(GOOD[kind], "message-number", **{name: bad})
    for good in (1, 2**32 - 1):
        replace(GOOD[kind], **{name: good})


@pytest.mark.parametrize("name", ["channel_key", "mask_key"])
def test_public_key_is_canonical(name: str) -> None:
    for bad in (KEY[:-1], KEY + b"\0", b"\xff" * 32, (2**255 - 19).to_bytes(32, "little")):
        check_refused(ADVERT, "public-key-encoding", **{name: bad})
    check_refused(ADVERT, "public-key-low-order", **{name: bytes(32)})


def test_no_box_may_be_relayed() -> None:
    assert replace(DEALING, sealed=None).sealed is None


@pytest.mark.parametrize("kinds", [(SEED, MASK), (MASK, SEED), (SEED, SEED), (MASK, MASK)])
def test_both_shares_of_one_silo_cannot_be_written_down(
    kinds: tuple[ShareKind, ShareKind],
) -> None:
    both = tuple(share(A, kind, bytes([1 + i])) for i, kind in enumerate(kinds))
    with pytest.raises(MalformedMessage) as caught:
        Unmasking(C, both, SIG)
    assert caught.value.code == "message-order"


# Bodies.

ALTERNATIVES: dict[str, dict[str, Any]] = {
    "AdvertiseKeys": {
        "sender": B,
        "channel_key": b"\x0b" + bytes(31),
        "mask_key": b"\x0b" + bytes(31),
        "self_seed_hash": bytes(32),
    },
    "ShareKeys": {
        "sender": B,
        "commitments": (COMMITMENT, Commitment(B, H, bytes(32))),
        "boxes": (Box(B, b"x" * BOX_BYTES),),
    },
    "Dealing": {
        "dealer": B,
        "commitments": (COMMITMENT, Commitment(B, bytes(32), H)),
        "boxes_digest": bytes(32),
    },
    "MaskedInput": {
        "sender": B,
        "vector_digest": bytes(32),
        "bad_dealers": (),
        "seed": b"d" * 32,
    },
    "Consistency": {"sender": B},
    "Unmasking": {"sender": B, "shares": (share(A), share(B, SEED))},
    "Result": {
        "task": "statistics",
        "round": 2,
        "base": bytes(32),
        "cohort": (A, B),
        "survivors": (A, B, C),
    },
}
RESULT_SEALED: dict[str, dict[str, Any]] = {
    "epoch": {"key": KeyName(2, H)},
    "key id": {"key": KeyName(1, bytes(32))},
    "first seed": {"seeds": (b"3" * 32, b"2" * 32)},
    "last seed": {"seeds": (b"1" * 32, b"3" * 32)},
    "order of seeds": {"seeds": (b"2" * 32, b"1" * 32)},
    "seeds and survivors": {"survivors": (A,), "seeds": (b"1" * 32,)},
    "survivor": {"survivors": (A, C)},
    "no key": {"key": None, "seeds": ()},
    "no survivors": {"survivors": (), "seeds": ()},
}
NOT_IN_BODIES = {"signature", "sealed", "survivors_transcript", "vector_digest"}


@pytest.mark.parametrize("kind", ALTERNATIVES)
def test_every_field_changes_the_body(kind: str) -> None:
    message, changes = GOOD[kind], ALTERNATIVES[kind]
    left_out = {field.name for field in fields(message)} - changes.keys()
    if kind == "Result":
        left_out -= {"key", "seeds"}  # they come together: see below
    assert left_out <= NOT_IN_BODIES
    bodies = {message.body()} | {
        replace(message, **{name: value}).body() for name, value in changes.items()
    }
    assert len(bodies) == len(changes) + 1
    assert replace(message, signature=bytes(64)).body() == message.body()


def test_key_and_every_seed_change_the_body_of_a_result() -> None:
    bodies = {replace(SEALED_RESULT, **changes).body() for changes in RESULT_SEALED.values()}
    assert len(bodies | {SEALED_RESULT.body()}) == len(RESULT_SEALED) + 1
    assert replace(SEALED_RESULT, signature=bytes(64)).body() == SEALED_RESULT.body()


def test_without_key_and_seed_a_body_is_what_it_was_before_there_were_any() -> None:
    """Signatures of masked sessions stay good: nothing is appended where there is nothing."""

    def enc(*items: bytes) -> bytes:
        parts = (len(item).to_bytes(8, "big") + item for item in items)
        return len(items).to_bytes(4, "big") + b"".join(parts)

    assert COMMIT.body() == enc(A.encode(), H, enc(B.encode()))
    assert SEALED.body() == enc(A.encode(), H, enc(B.encode()), b"c" * 32)
    listed = [enc(*(name.encode() for name in names)) for names in ((A, B, C), (A, B))]
    plain = [b"training", (1).to_bytes(8, "big"), H, *listed]
    assert RESULT.body() == enc(*plain)
    seeds = (b"1" * 32, b"2" * 32)
    assert SEALED_RESULT.body() == enc(*plain, (1).to_bytes(8, "big"), H, *seeds)


@pytest.mark.parametrize("seed", [b"x", bytes(31), bytes(33), bytes(64)])
def test_a_seed_has_32_bytes_or_is_none(seed: bytes) -> None:
    check_refused(SEALED, "message-size", seed=seed)
    check_refused(SEALED_RESULT, "message-size", seeds=(b"1" * 32, seed))
    assert replace(SEALED, seed=b"") == COMMIT


@pytest.mark.parametrize("seeds", [(), (H,), (H, H, H)])
def test_a_sealed_sum_has_a_seed_for_each_survivor(seeds: tuple[bytes, ...]) -> None:
    check_refused(SEALED_RESULT, "result-seeds", seeds=seeds)


def test_seeds_without_a_key_open_nothing() -> None:
    check_refused(SEALED_RESULT, "result-seeds", key=None)
    check_refused(RESULT, "result-seeds", seeds=(H, H))
    check_refused(RESULT, "result-seeds", key=NAME)
    assert replace(RESULT, survivors=(), key=NAME).seeds == ()


@pytest.mark.parametrize(
    ("epoch", "key_id"),
    [(0, H), (-1, H), (2**32, H), (1, b""), (1, H[:-1]), (1, H + b"x")],
)
def test_a_key_is_named_by_an_epoch_and_32_bytes(epoch: int, key_id: bytes) -> None:
    with pytest.raises(MalformedMessage) as caught:
        KeyName(epoch, key_id)
    assert caught.value.code == "key-name"


def test_keys_of_later_epochs_are_greater() -> None:
    assert KeyName(1, b"z" * 32) < KeyName(2, bytes(32)) < KeyName(2**32 - 1, bytes(32))


def test_dealing_has_the_body_of_what_was_shared() -> None:
    dealing = Dealing(A, SHARED.commitments, SHARED.boxes_digest(), None, SIG)
    assert dealing.body() == SHARED.body()


def test_commit_digest_follows_the_body_alone() -> None:
    assert replace(COMMIT, signature=bytes(64)).digest() == COMMIT.digest()
    changes = ALTERNATIVES["MaskedInput"]
    digests = {replace(COMMIT, **{name: value}).digest() for name, value in changes.items()}
    assert len(digests | {COMMIT.digest()}) == 5


def test_every_part_of_a_revealed_share_changes_the_body() -> None:
    alternatives = [
        (share(A), share(B, MASK)),
        (share(A), share(C, MASK)),
        (share(A, MASK), share(B, MASK)),
        (share(A), share(B, MASK, b"\x02")),
        (share(A), replace(share(B, MASK), salt=Secret(bytes(32)))),
        (share(A),),
        (),
    ]
    assert len({replace(REVEAL, shares=shares).body() for shares in alternatives}) == 7


few_names = st.sampled_from(["a", "b", "ab", "a-b", "aa", "b-a", "bb"])
name_lists = st.lists(few_names, unique=True, max_size=4).map(lambda names: tuple(sorted(names)))
digests = st.sampled_from([bytes(32), H])
seeds_ = st.sampled_from([b"", bytes(32), H])
commits = st.builds(MaskedInput, few_names, digests, name_lists, st.just(SIG), seeds_)
keys_ = st.none() | st.builds(KeyName, st.integers(1, 2), digests)


@st.composite
def sums(draw: st.DrawFn) -> Result:
    survivors, key = draw(name_lists), draw(keys_)
    count = 0 if key is None else len(survivors)
    seeds = draw(st.lists(digests, min_size=count, max_size=count).map(tuple))
    number, task = draw(st.integers(1, 3)), draw(few_names)
    base, cohort = draw(digests), draw(name_lists)
    return Result(task, number, base, cohort, survivors, H, H, SIG, key, seeds)


results = sums()
shares_ = st.builds(share, few_names, st.sampled_from(ShareKind), st.sampled_from([b"\0", b"\1"]))
reveals = st.builds(
    Unmasking,
    few_names,
    st.lists(shares_, max_size=3, unique_by=lambda s: s.owner).map(
        lambda found: tuple(sorted(found, key=lambda s: s.owner))
    ),
    st.just(SIG),
)


@pytest.mark.parametrize(
    "strategy", [commits, results, reveals], ids=["commit", "result", "reveal"]
)
def test_bodies_are_equal_only_if_messages_are(strategy: st.SearchStrategy[Any]) -> None:
    @given(strategy, strategy)
    def check(one: Any, other: Any) -> None:
        assert (one.body() == other.body()) == (one == other)

    check()


def test_no_two_types_are_signed_alike() -> None:
    kinds = {kind for cls, kind in SIGNED_AS.items() if cls is not Dealing}
    assert len(kinds) == len(SIGNED_AS) - 1
    assert Keyed("a")(8) != Keyed("b")(8)


def test_commitments_are_a_tuple_by_holder() -> None:
    both = (COMMITMENT, Commitment(B, SIG[:32], H))
    made = Commitments(both)
    assert made == both
    assert made == Commitments(iter(both))
    assert dict(made.of) == {A: both[0], B: both[1]}
    assert list(made.of) == [A, B]
    assert Commitments(()).of == {}
    for wrong in (both[::-1], (both[0], both[0]), [both[0]] * (MAX_COHORT + 1)):
        with pytest.raises(MalformedMessage, match="message-order"):
            Commitments(wrong)


def test_the_digest_of_commitments_tells_them_apart() -> None:
    """Each field of each of them, their number and whom they are for."""
    lists = [
        (),
        (COMMITMENT,),
        (COMMITMENT, Commitment(B, H, H)),
        (Commitment(B, H, H),),
        (Commitment(A, SIG[:32], H),),
        (Commitment(A, H, SIG[:32]),),
    ]
    digests = [Commitments(each).digest for each in lists]
    assert len(set(digests)) == len(lists)
    assert digests == [Commitments(list(each)).digest for each in lists]
    for each, one in zip(lists, digests, strict=True):
        assert replace(SHARED, commitments=each).commitments.digest == one


def test_commitments_are_checked_and_hashed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every holder is told every dealer's: a server would do it n² times for each of n."""
    done: Counter[str] = Counter()
    for name in ("_check_order", "digest"):
        monkeypatch.setattr(messages, name, counted(getattr(messages, name), done))
    shared = ShareKeys(A, (COMMITMENT, Commitment(B, H, H)), (BOX,), SIG)
    dealings = [Dealing(A, shared.commitments, H, BOX.sealed, SIG) for _ in range(50)]
    bodies = {dealing.body() for dealing in dealings}
    assert len(bodies) == 1
    assert {id(dealing.commitments) for dealing in dealings} == {id(shared.commitments)}
    assert {id(dealing.commitments.of) for dealing in dealings} == {id(shared.commitments.of)}
    assert done == {"_check_order": 2, "digest": 1}  # and the boxes' order


def counted(function: Any, done: Counter[str]) -> Any:
    def call(*args: Any) -> Any:
        done[function.__name__] += 1
        return function(*args)

    return call
