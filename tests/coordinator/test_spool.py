"""Blobs on disk: chunks in any order, by any thread, and what was sent is what is read."""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from secagg.coordinator.spool import Upload, read_chunk
from secagg.disk import LocalDisk
from secagg.errors import MalformedMessage, NotFound, TooLate

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
        assert len(upload.view()) == len(data)
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
        assert upload.view().tobytes() == bytes(total)
    finally:
        upload.discard()


def test_nobody_else_reads_it(tmp_path: Path) -> None:
    upload = Upload(LocalDisk(tmp_path), "a/b/blob", 10, CHUNK)
    assert (tmp_path / "a/b/blob").stat().st_mode & 0o777 == 0o600
    upload.discard()


def test_a_new_upload_begins_empty(tmp_path: Path) -> None:
    first = Upload(LocalDisk(tmp_path), "blob", 100, CHUNK)
    first.put(0, b"\xff" * CHUNK)
    first.close()
    second = Upload(LocalDisk(tmp_path), "blob", 80, CHUNK)
    assert second.missing == 0
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
        written = (tmp_path / upload.name).read_bytes()
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
    disk = LocalDisk(place)
    if offset % CHUNK == 0 and offset < len(data):
        assert read_chunk(disk, "blob", offset, CHUNK) == data[offset : offset + CHUNK]
        return
    with pytest.raises(NotFound):
        read_chunk(disk, "blob", offset, CHUNK)


@pytest.mark.parametrize("offset", [2**63 - 64, 2**63, 2**64 - 64])
def test_offsets_beyond_any_file(tmp_path: Path, offset: int) -> None:
    (tmp_path / "blob").write_bytes(bytes(100))
    with pytest.raises(NotFound):
        read_chunk(LocalDisk(tmp_path), "blob", offset, CHUNK)
