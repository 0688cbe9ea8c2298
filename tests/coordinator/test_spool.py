"""Blobs on disk: chunks in any order, by any thread, and what was sent is what is read."""

from __future__ import annotations

import errno
import gc
import os
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from secagg.coordinator import spool
from secagg.coordinator.spool import Blob, Spooled, Stored, Upload
from secagg.crypto.digest import chunk_digests, vector_digest
from secagg.disk import LocalDisk, let_go
from secagg.errors import (
    MalformedMessage,
    NotFound,
    StorageBusy,
    StorageDamaged,
    StorageFailed,
    TooLate,
)
from secagg.ring.vectors import PowerRing, PrimeRing, Ring, RunningSum
from secagg.ring.words import fold
from secagg.suite import Suite

CHUNK = 64


def stored_of(data: bytes) -> Stored:
    return Stored(len(data), chunk_digests(data, CHUNK))


def chunks(data: bytes) -> list[tuple[int, bytes]]:
    return [(at, data[at : at + CHUNK]) for at in range(0, len(data), CHUNK)]


@st.composite
def arrivals(draw: st.DrawFn) -> tuple[bytes, list[tuple[int, bytes]], list[int]]:
    """A blob, its chunks in some order with repeats and damage before, and what is left out."""
    data = draw(st.binary(min_size=1, max_size=6 * CHUNK + 5))
    parts = chunks(data)
    left = draw(st.sets(st.sampled_from([at for at, _ in parts]), max_size=2))
    good = [part for part in parts if part[0] not in left]
    before = [(at, bytes(len(chunk))) for at, chunk in good]
    noise = draw(st.lists(st.sampled_from(before), max_size=5)) if before else []
    repeats = draw(st.lists(st.sampled_from(good), max_size=5)) if good else []
    return data, noise + draw(st.permutations(good + repeats)), sorted(left)


@settings(max_examples=80, deadline=None)
@given(arrivals())
def test_any_order(
    tmp_path_factory: pytest.TempPathFactory,
    case: tuple[bytes, list[tuple[int, bytes]], list[int]],
) -> None:
    data, arriving, left = case
    upload = Upload(LocalDisk(tmp_path_factory.mktemp("spool")), "blob", len(data), CHUNK)
    try:
        for at, chunk in arriving:
            upload.put(at, chunk)
        assert upload.missing == (left[0] if left else None)
        if not left:
            assert upload.view().tobytes() == data
    finally:
        upload.discard()


@settings(max_examples=80, deadline=None)
@given(
    st.integers(1, 300),
    st.integers(-(2**64), 2**64) | st.integers(-70, 400),
    st.integers(0, 130),
)
def test_what_is_no_chunk_changes_nothing(
    tmp_path_factory: pytest.TempPathFactory, total: int, offset: int, size: int
) -> None:
    upload = Upload(LocalDisk(tmp_path_factory.mktemp("spool")), "blob", total, CHUNK)
    right = 0 <= offset < total and offset % CHUNK == 0 and size == min(CHUNK, total - offset)
    try:
        if right:
            upload.put(offset, b"\xff" * size)
            return
        with pytest.raises(MalformedMessage):
            upload.put(offset, b"\xff" * size)
        assert upload.missing == 0
    finally:
        upload.discard()


def test_nobody_else_reads_it(tmp_path: Path) -> None:
    upload = Upload(LocalDisk(tmp_path), "a/b/blob", 10, CHUNK)
    upload.put(0, bytes(10))
    assert (tmp_path / "a/b/blob").stat().st_mode & 0o777 == 0o600
    upload.discard()


def test_a_new_upload_begins_empty(tmp_path: Path) -> None:
    first = Upload(LocalDisk(tmp_path), "blob", 100, CHUNK)
    first.put(0, b"\xff" * CHUNK)
    first.close()
    second = Upload(LocalDisk(tmp_path), "blob", 80, CHUNK)
    assert second.missing == 0
    second.put(64, bytes(16))
    assert second.view().tobytes() == bytes(80)
    second.discard()


def test_keeping_and_discarding(tmp_path: Path) -> None:
    data = os.urandom(100)
    upload = Upload(LocalDisk(tmp_path), "blob", 100, CHUNK)
    for at, chunk in chunks(data):
        upload.put(at, chunk)
    upload.close()
    upload.close()
    with pytest.raises(TooLate):
        upload.put(0, bytes(CHUNK))
    assert (tmp_path / "blob").read_bytes() == data
    upload.discard()
    upload.discard()
    assert not (tmp_path / "blob").exists()


def test_mapped_bytes_outlive_the_file(tmp_path: Path) -> None:
    upload = Upload(LocalDisk(tmp_path), "blob", 10, CHUNK)
    upload.put(0, b"0123456789")
    view = upload.view()
    upload.discard()
    assert view.tobytes() == b"0123456789"
    with pytest.raises(TypeError, match="read-only"):
        view[0] = 1


def test_chunks_wait_while_it_is_frozen(tmp_path: Path) -> None:
    upload = Upload(LocalDisk(tmp_path), "blob", 64, CHUNK)
    upload.put(0, bytes(CHUNK))
    thread = threading.Thread(target=upload.put, args=(0, b"\xff" * CHUNK))

    def refuse() -> None:
        with upload.committing():
            thread.start()
            thread.join(0.05)
            assert upload.view().tobytes() == bytes(CHUNK)
            raise LookupError

    with pytest.raises(LookupError):
        refuse()
    thread.join()
    assert upload.view().tobytes() == b"\xff" * CHUNK
    upload.discard()


def test_many_threads_put_while_one_closes(tmp_path: Path) -> None:
    """After the close nothing is written: not to this file, nor to one with its descriptor."""
    for turn in range(20):
        upload = Upload(LocalDisk(tmp_path), f"blob-{turn}", 40 * CHUNK, CHUNK)
        start = threading.Barrier(5)

        def put(
            first: int, upload: Upload = upload, start: threading.Barrier = start
        ) -> tuple[int, int]:
            start.wait(30)
            done = refused = 0
            for index in range(first, 40, 4):
                try:
                    upload.put(index * CHUNK, b"\xff" * CHUNK)
                    done += 1
                except TooLate:
                    refused += 1
            return done, refused

        with ThreadPoolExecutor(4) as pool:
            running = [pool.submit(put, first) for first in range(4)]
            start.wait(30)
            upload.close()
            others = [os.open(tmp_path / f"other-{n}", os.O_RDWR | os.O_CREAT) for n in range(4)]
            counts = [future.result(30) for future in running]
        for other in others:
            assert os.fstat(other).st_size == 0
            os.close(other)
        assert all(sum(count) == 10 for count in counts)
        path = tmp_path / upload.name
        written = path.read_bytes() if path.exists() else b""
        assert written.count(b"\xff") == CHUNK * sum(done for done, _ in counts)


def test_many_threads_put_everything(tmp_path: Path) -> None:
    data = os.urandom(50 * CHUNK + 7)
    upload = Upload(LocalDisk(tmp_path), "blob", len(data), CHUNK)
    with ThreadPoolExecutor(6) as pool:
        for future in [pool.submit(upload.put, *part) for part in chunks(data) * 3]:
            future.result(30)
    assert upload.missing is None
    assert upload.view().tobytes() == data
    upload.discard()


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=300), st.integers(0, 2**64 - 1) | st.integers(0, 400))
def test_reading_chunks(tmp_path_factory: pytest.TempPathFactory, data: bytes, offset: int) -> None:
    place = tmp_path_factory.mktemp("blob")
    (place / "blob").write_bytes(data)
    blob = Blob(LocalDisk(place), "blob", stored_of(data), CHUNK)
    if offset % CHUNK == 0 and offset < len(data):
        assert blob.chunk(offset) == data[offset : offset + CHUNK]
        return
    with pytest.raises(NotFound):
        blob.chunk(offset)


@pytest.mark.parametrize("offset", [2**63 - 64, 2**63, 2**64 - 64])
def test_offsets_beyond_any_file(tmp_path: Path, offset: int) -> None:
    (tmp_path / "blob").write_bytes(bytes(100))
    blob = Blob(LocalDisk(tmp_path), "blob", stored_of(bytes(100)), CHUNK)
    with pytest.raises(NotFound):
        blob.chunk(offset)


def test_a_changed_chunk_is_not_handed_out(tmp_path: Path) -> None:
    (tmp_path / "blob").write_bytes(bytes(100))
    blob = Blob(LocalDisk(tmp_path), "blob", stored_of(bytes(100)), CHUNK)
    (tmp_path / "blob").write_bytes(bytes(99) + b"\x01")
    assert blob.chunk(0) == bytes(CHUNK)
    with pytest.raises(StorageDamaged, match=f"chunk at {CHUNK * (99 // CHUNK)} of blob"):
        blob.chunk(CHUNK * (99 // CHUNK))
    (tmp_path / "blob").unlink()
    with pytest.raises(NotFound):
        blob.chunk(0)


# Vectors, as the sum takes them.


def spooled(place: Path, data: bytes, ring: Ring, stored: Stored | None = None) -> Spooled:
    """A vector on disk; what was stored may have been another."""
    (place / "blob").write_bytes(data)
    blob = Blob(LocalDisk(place), "blob", stored or stored_of(data), CHUNK)
    return Spooled.open(blob, ring.dtype)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=200),
    st.integers(1, 4),
    st.sampled_from([4, 40, 64, 10_000]),
)
def test_a_sum_from_the_spool_is_that_of_the_integers(
    tmp_path_factory: pytest.TempPathFactory, words: list[int], threads: int, piece: int
) -> None:
    """Whatever the pieces and the threads."""
    ring = PowerRing(32)
    data = np.array(words, ring.dtype).tobytes()
    vector = spooled(tmp_path_factory.mktemp("spool"), data, ring)
    assert vector.length == len(words)
    assert vector.digest() == vector_digest(data, CHUNK)
    total = np.arange(len(words), dtype=ring.dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(spool, "PIECE_BYTES", piece)
        for _ in range(3):
            fold(ring, total, vector, threads)
    assert total.tolist() == [(n + 3 * word) % 2**32 for n, word in enumerate(words)]


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_a_bad_word_far_inside_leaves_the_sum(
    tmp_path: Path, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    ring = PrimeRing(Suite.CKKS_54.parameters.modulus)
    words = np.arange(3 * CHUNK // 8, dtype=ring.dtype)
    words[-2] = ring.modulus
    vector, total = spooled(tmp_path, words.tobytes(), ring), words.copy()
    monkeypatch.setattr(spool, "PIECE_BYTES", 24)
    with pytest.raises(MalformedMessage, match="no residue"):
        fold(ring, total, vector, threads)
    assert total.tolist() == words.tolist()


@pytest.mark.parametrize("threads", [1, 2, 4])
@pytest.mark.parametrize("place", [0, 63, 64, 200, 4 * CHUNK - 1])
def test_a_changed_chunk_is_not_added(
    tmp_path: Path, place: int, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that were added already are off again, and none of its own words ever were."""
    ring, data = PowerRing(32), bytes(range(4 * CHUNK))
    changed = bytearray(data)
    changed[place] ^= 1
    vector, total = spooled(tmp_path, changed, ring, stored_of(data)), ring.zeros(CHUNK)
    monkeypatch.setattr(spool, "PIECE_BYTES", 16)
    seen: list[bytes] = []
    monkeypatch.setattr(
        PowerRing, "holds", lambda self, piece: seen.append(piece.tobytes()) or True
    )
    chunk = place // CHUNK * CHUNK
    with pytest.raises(StorageDamaged, match=f"the chunk at {chunk} of blob"):
        fold(ring, total, vector, threads)
    assert not total.any()
    assert not any(piece in changed[chunk : chunk + CHUNK] for piece in seen)


@pytest.mark.parametrize("left", [None, 0, 100, 255, 257])
def test_a_file_that_lost_its_end_is_not_opened(tmp_path: Path, left: int | None) -> None:
    ring, data = PowerRing(32), bytes(range(256))
    if left is not None:
        (tmp_path / "blob").write_bytes((data + data)[:left])
    blob = Blob(LocalDisk(tmp_path), "blob", stored_of(data), CHUNK)
    seen = "is gone" if left is None else f"has {left} bytes, not 256"
    with pytest.raises(StorageDamaged, match=f"blob {seen}"):
        Spooled.open(blob, ring.dtype)


def test_what_is_opened_is_what_lies_there(tmp_path: Path) -> None:
    """Opening looks at the size alone: a chunk is read when its words are added."""
    (tmp_path / "blob").write_bytes(bytes(100))
    opened = stored_of(b"\1" * 100).open(LocalDisk(tmp_path), "blob")
    assert opened == bytes(100)
    assert opened.readonly


def test_a_part_of_a_word_makes_another_length(tmp_path: Path) -> None:
    assert spooled(tmp_path, bytes(5), PowerRing(32)).length == 2


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("bad", [False, True])
def test_nothing_is_opened_once_the_sum_changes(
    tmp_path: Path, threads: int, bad: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No descriptor is wanted to add a vector, nor to take it off again."""
    ring, data = PowerRing(32), os.urandom(10 * CHUNK)
    changed = data[:-1] + bytes([data[-1] ^ 1])
    vector = spooled(tmp_path, changed if bad else data, ring, stored_of(data))

    def refuse(*_: Any) -> None:
        raise StorageBusy("storage-busy", "Too many open files.")

    monkeypatch.setattr(LocalDisk, "view", refuse)
    monkeypatch.setattr(os, "open", refuse)
    total = ring.zeros(vector.length)
    if not bad:
        fold(ring, total, vector, threads)
        assert total.tobytes() == data
        return
    with pytest.raises(StorageDamaged):
        fold(ring, total, vector, threads)
    assert not total.any()


def test_pages_go_when_their_chunk_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory does not grow with the vector."""
    gone: list[tuple[int, int]] = []

    def seen(data: memoryview, start: int, size: int) -> None:
        assert data.obj is vector.data.obj
        gone.append((start, size))
        let_go(data, start, size)

    monkeypatch.setattr(spool, "let_go", seen)
    ring, data = PowerRing(16), os.urandom(5 * CHUNK - 6)
    vector = spooled(tmp_path, data, ring)
    total = ring.zeros(vector.length)
    fold(ring, total, vector, 2)
    assert total.tobytes() == data
    assert sorted(gone) == [(at, len(chunk)) for at, chunk in chunks(data)]


def test_a_refused_vector_is_not_kept_mapped(tmp_path: Path) -> None:
    """Who sends bad ones would fill the memory else, until the garbage collector comes."""
    ring = PrimeRing(Suite.CKKS_54.parameters.modulus)
    words = np.full(100, ring.modulus, ring.dtype)

    def refused() -> weakref.ref[Any]:
        running, vector = RunningSum(ring, 100), spooled(tmp_path, words.tobytes(), ring)
        with pytest.raises(MalformedMessage):
            running.fold(vector)
        return weakref.ref(vector.data.obj)

    gc.disable()
    try:
        assert refused()() is None
    finally:
        gc.enable()


class FailingDisk(LocalDisk):
    """Refuses the next so many syncs."""

    failures = 0

    def sync(self, name: str) -> None:
        if self.failures:
            self.failures -= 1
            raise StorageFailed("storage-failed", "The disk is ill.")
        super().sync(name)


def test_a_sync_that_failed_once_is_not_asked_again(tmp_path: Path) -> None:
    """A second one would say that all is well, whatever the first one lost."""
    disk = FailingDisk(tmp_path)
    disk.failures = 1
    upload = Upload(disk, "blob", 10, CHUNK)
    with pytest.raises(StorageFailed):
        upload.put(0, bytes(10))
    with pytest.raises(TooLate):
        upload.put(0, bytes(10))


def test_another_upload_in_its_place(tmp_path: Path) -> None:
    disk = LocalDisk(tmp_path)
    first = Upload(disk, "blob", 100, CHUNK)
    first.put(0, b"\xff" * CHUNK)
    second = Upload(disk, "blob", 80, CHUNK, first)
    second.put(64, bytes(16))
    with pytest.raises(TooLate):
        first.put(64, bytes(36))
    first.discard()
    assert second.view().tobytes() == bytes(80)
    second.discard()
    assert disk.names() == []


def test_no_space_for_a_blob_is_told_before_it_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    upload = Upload(LocalDisk(tmp_path), "blob", 100, CHUNK)
    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full)
        with pytest.raises(StorageBusy, match="No space"):
            upload.put(0, bytes(CHUNK))
    upload.put(0, bytes(CHUNK))  # later there is
    upload.put(64, bytes(36))
    assert upload.missing is None
