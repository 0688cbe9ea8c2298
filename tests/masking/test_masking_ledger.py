"""A silo's memory: what it refuses to store, and that one base is opened for one survivor set."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from secagg.errors import FaultyServer, PolicyRefused, SecaggError
from secagg.masking.ledger import (
    Joined,
    Keyed,
    MemoryLedger,
    Opened,
    Recorded,
    Revealed,
    check_differencing,
)
from secagg.suite import KeyName

from .harness import BASE, SESSION_ID, A, B, C, D, ledger_snapshot

JOINED = Joined("study", SESSION_ID, 3, 2, BASE, b"0" * 32)
REVEALED = Revealed(BASE, b"3" * 32, (A, B, C))
OPENED = Opened(SESSION_ID, "training", b"t" * 32)
KEYED = Keyed(SESSION_ID, 5, b"k" * 32)


@pytest.fixture
def memory() -> MemoryLedger:
    return MemoryLedger()


def check_refused(memory: MemoryLedger, entry: Any, code: str, error: type[SecaggError]) -> None:
    before = ledger_snapshot(memory)
    with pytest.raises(error) as caught:
        memory.record(entry)
    assert (type(caught.value), caught.value.code) == (error, code)
    assert ledger_snapshot(memory) == before


def test_an_empty_ledger(memory: MemoryLedger) -> None:
    assert memory.last_attempt(SESSION_ID) == (0, 0)
    assert memory.session_ids("study") == frozenset()
    assert memory.revealed(BASE) is None
    assert memory.newest_key(SESSION_ID) is None


def test_evidence_is_of_the_entry(memory: MemoryLedger) -> None:
    assert memory.record(JOINED) == Recorded(JOINED)
    assert memory.record(REVEALED) == Recorded(REVEALED)
    assert memory.record(OPENED) == Recorded(OPENED)
    assert memory.record(KEYED) == Recorded(KEYED)


@pytest.mark.parametrize(("round_", "attempt"), [(3, 2), (3, 1), (2, 9), (1, 1)])
def test_an_attempt_is_joined_once_and_forward(
    memory: MemoryLedger, round_: int, attempt: int
) -> None:
    memory.record(JOINED)
    older = replace(JOINED, round=round_, attempt=attempt)
    check_refused(memory, older, "descriptor-replay", FaultyServer)
    memory.record(replace(older, session_id=bytes(32)))
    assert memory.session_ids("study") == {SESSION_ID, bytes(32)}


def test_the_newest_attempt_is_remembered_by_session(memory: MemoryLedger) -> None:
    assert memory.last_joined(SESSION_ID) is None
    newer = replace(JOINED, round=4, attempt=1)
    memory.record(JOINED)
    assert memory.last_joined(SESSION_ID) == JOINED
    memory.record(newer)
    assert memory.last_joined(SESSION_ID) == newer
    assert memory.last_joined(bytes(32)) is None


@pytest.mark.parametrize(("round_", "attempt"), [(3, 3), (4, 1)])
def test_a_newer_attempt_is_joined(memory: MemoryLedger, round_: int, attempt: int) -> None:
    memory.record(JOINED)
    memory.record(replace(JOINED, round=round_, attempt=attempt))
    assert memory.last_attempt(SESSION_ID) == (round_, attempt)


def test_another_opening_of_a_task(memory: MemoryLedger) -> None:
    memory.record(OPENED)
    memory.record(OPENED)
    memory.record(replace(OPENED, task="statistics", task_hash=bytes(32)))
    memory.record(replace(OPENED, session_id=bytes(32), task_hash=bytes(32)))
    check_refused(memory, replace(OPENED, task_hash=bytes(32)), "task-replaced", FaultyServer)


@pytest.mark.parametrize("names", [(A, B), (A, B, D), (A, B, C, D), (D,)])
def test_other_survivors_on_a_revealed_base(memory: MemoryLedger, names: tuple[Any, ...]) -> None:
    memory.record(REVEALED)
    other = Revealed(BASE, b"4" * 32, names)
    check_refused(memory, other, "differencing", PolicyRefused)
    memory.record(replace(other, base=bytes(32)))
    assert memory.revealed(BASE) == REVEALED


def test_the_same_survivors_again(memory: MemoryLedger) -> None:
    memory.record(REVEALED)
    again = replace(REVEALED, transcript=b"4" * 32)
    memory.record(again)
    assert memory.revealed(BASE) == again


sets = st.sets(st.sampled_from([A, B, C, D])).map(lambda names: tuple(sorted(names)))


@given(sets, sets)
def test_differencing_allows_equal_sets_only(past: tuple[Any, ...], new: tuple[Any, ...]) -> None:
    check_differencing(None, new)
    reveal = Revealed(BASE, b"3" * 32, past)
    if past == new:
        check_differencing(reveal, new)
    else:
        with pytest.raises(PolicyRefused):
            check_differencing(reveal, new)


def test_another_update_on_an_opened_base_is_refused() -> None:
    """The same survivors with another update of this silo: the difference is what changed."""
    book = MemoryLedger()
    first = Revealed(BASE, b"3" * 32, (A, B, C), b"5" * 32)
    book.record(first)
    book.record(first)
    with pytest.raises(PolicyRefused) as caught:
        book.record(Revealed(BASE, b"4" * 32, (A, B, C), b"6" * 32))
    assert caught.value.code == "differencing-update"
    assert book.revealed(BASE) == first


def test_openings_are_remembered() -> None:
    book = MemoryLedger()
    assert not book.openings(b"1" * 32)
    book.record(Opened(b"1" * 32, "training", b"2" * 32))
    assert set(book.openings(b"1" * 32)) == {"training"}


def test_the_newest_key_is_remembered_by_session(memory: MemoryLedger) -> None:
    memory.record(KEYED)
    memory.record(replace(KEYED, session_id=bytes(32), epoch=1))
    assert memory.newest_key(SESSION_ID) == KeyName(5, b"k" * 32)
    assert memory.newest_key(bytes(32)) == KeyName(1, b"k" * 32)
    assert memory.newest_key(b"n" * 32) is None


def test_the_same_key_again_changes_nothing(memory: MemoryLedger) -> None:
    memory.record(KEYED)
    before = ledger_snapshot(memory)
    assert memory.record(KEYED) == Recorded(KEYED)
    assert ledger_snapshot(memory) == before


@pytest.mark.parametrize("epoch", [6, 7, 2**32 - 1])
@pytest.mark.parametrize("key_id", [b"k" * 32, b"l" * 32])
def test_a_key_of_a_later_epoch_replaces_it(
    memory: MemoryLedger, epoch: int, key_id: bytes
) -> None:
    memory.record(KEYED)
    memory.record(replace(KEYED, epoch=epoch, key_id=key_id))
    assert memory.newest_key(SESSION_ID) == KeyName(epoch, key_id)


@pytest.mark.parametrize(
    ("epoch", "key_id"),
    [(5, b"l" * 32), (5, bytes(32)), (4, b"k" * 32), (4, b"l" * 32), (1, b"k" * 32)],
)
def test_no_older_epoch_and_no_other_key_of_the_same(
    memory: MemoryLedger, epoch: int, key_id: bytes
) -> None:
    memory.record(KEYED)
    check_refused(memory, Keyed(SESSION_ID, epoch, key_id), "key-epoch", FaultyServer)
    memory.record(Keyed(bytes(32), epoch, key_id))  # another session has epochs of its own
    assert memory.newest_key(SESSION_ID) == KeyName(5, b"k" * 32)


@given(st.lists(st.tuples(st.integers(1, 4), st.sampled_from([b"k" * 32, b"l" * 32])), max_size=9))
def test_epochs_never_decrease_and_each_has_one_key(taken: list[tuple[int, bytes]]) -> None:
    book, seen = MemoryLedger(), [KeyName(1, b"0" * 32)]
    book.record(Keyed(SESSION_ID, seen[0].epoch, seen[0].key_id))
    for epoch, key_id in taken:
        allowed = epoch > seen[-1].epoch or (epoch, key_id) == (seen[-1].epoch, seen[-1].key_id)
        try:
            book.record(Keyed(SESSION_ID, epoch, key_id))
        except FaultyServer:
            assert not allowed
        else:
            assert allowed
            seen.append(KeyName(epoch, key_id))
        assert book.newest_key(SESSION_ID) == seen[-1]


def test_another_update_on_a_joined_base_is_refused(memory: MemoryLedger) -> None:
    """An attempt that was joined may have been opened without this silo's hearing of it."""
    first = replace(JOINED, update=b"5" * 32)
    memory.record(first)
    other = replace(first, attempt=first.attempt + 1, update=b"6" * 32)
    check_refused(memory, other, "differencing-update", PolicyRefused)
    memory.record(replace(other, update=first.update))
