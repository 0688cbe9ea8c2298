"""Blobs on disk: chunks in any order, by any thread, and what was sent is what is read."""

from __future__ import annotations

import errno
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from secagg.coordinator.spool import Blob, Stored, Upload
from secagg.disk import LocalDisk
from secagg.errors import (
    MalformedMessage,
    NotFound,
    StorageBusy,
    StorageDamaged,
    StorageFailed,
    TooLate,
)

CHUNK = 64


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
    with upload.frozen():
        thread.start()
        thread.join(0.05)
        assert upload.view().tobytes() == bytes(CHUNK)
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
    blob = Blob(LocalDisk(place), "blob", Stored.of(memoryview(data), CHUNK), CHUNK)
    if offset % CHUNK == 0 and offset < len(data):
        assert blob.chunk(offset) == data[offset : offset + CHUNK]
        return
    with pytest.raises(NotFound):
        blob.chunk(offset)


@pytest.mark.parametrize("offset", [2**63 - 64, 2**63, 2**64 - 64])
def test_offsets_beyond_any_file(tmp_path: Path, offset: int) -> None:
    (tmp_path / "blob").write_bytes(bytes(100))
    blob = Blob(LocalDisk(tmp_path), "blob", Stored.of(memoryview(bytes(100)), CHUNK), CHUNK)
    with pytest.raises(NotFound):
        blob.chunk(offset)


def test_a_changed_chunk_is_not_handed_out(tmp_path: Path) -> None:
    (tmp_path / "blob").write_bytes(bytes(100))
    blob = Blob(LocalDisk(tmp_path), "blob", Stored.of(memoryview(bytes(100)), CHUNK), CHUNK)
    (tmp_path / "blob").write_bytes(bytes(99) + b"\x01")
    assert blob.chunk(0) == bytes(CHUNK)
    with pytest.raises(StorageDamaged, match=f"chunk at {CHUNK * (99 // CHUNK)} of blob"):
        blob.chunk(CHUNK * (99 // CHUNK))
    (tmp_path / "blob").unlink()
    with pytest.raises(NotFound):
        blob.chunk(0)


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
