"""A directory of this machine: what the shells' tests do not look at."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from secagg import disk as module
from secagg.disk import LocalDisk, let_go
from secagg.errors import StorageFailed

PAGE = mmap.ALLOCATIONGRANULARITY
EDGES = [0, 1, PAGE - 1, PAGE, PAGE + 1, 2 * PAGE, 3 * PAGE - 1, 3 * PAGE, 3 * PAGE + 5, 9 * PAGE]


@settings(max_examples=100, deadline=None)
@given(
    st.sampled_from(EDGES[:8]),
    st.sampled_from(EDGES) | st.integers(0, 4 * PAGE),
    st.none() | st.sampled_from(EDGES) | st.integers(0, 4 * PAGE),
)
def test_a_range_of_a_file(
    tmp_path_factory: pytest.TempPathFactory, length: int, start: int, size: int | None
) -> None:
    """Any range, on a page's edge or not, is what reading the file gives."""
    place, data = tmp_path_factory.mktemp("disk"), os.urandom(length)
    (place / "file").write_bytes(data)
    view = LocalDisk(place).view("file", start, size)
    assert view is not None
    assert view.readonly
    assert view == data[start : None if size is None else start + size]


def test_no_file(tmp_path: Path) -> None:
    assert LocalDisk(tmp_path).view("none", 5, 5) is None


@pytest.mark.parametrize("start", [0, 5, PAGE + 5])
def test_a_file_that_shrinks_as_it_is_mapped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, start: int
) -> None:
    """Between the look at its size and the map: nothing is there to be read, so nothing is."""
    (tmp_path / "file").write_bytes(bytes(3 * PAGE))
    fstat = os.fstat

    def then_shrinks(file: int) -> os.stat_result:
        found = fstat(file)
        os.truncate(tmp_path / "file", PAGE)
        return found

    monkeypatch.setattr(os, "fstat", then_shrinks)
    with pytest.raises(StorageFailed, match="lost its end"):
        LocalDisk(tmp_path).view("file", start)
    monkeypatch.undo()
    assert len(LocalDisk(tmp_path).view("file") or b"") == PAGE


@pytest.mark.parametrize("start", [0, 1, PAGE, PAGE + 7, 2 * PAGE + 100])
def test_what_was_let_go_is_read_again(tmp_path: Path, start: int) -> None:
    """Any range, on a page's edge or not, of a file and of what is none."""
    data = os.urandom(3 * PAGE)
    (tmp_path / "file").write_bytes(data)
    view = LocalDisk(tmp_path).view("file")
    assert view is not None
    for size in (1, 100, len(data) - start):
        assert view == data
        let_go(view, start, size)
        assert view == data
    let_go(memoryview(data), start, 1)


def test_a_page_that_was_let_go_is_in_no_memory_of_ours(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(os.urandom(64 * PAGE))
    view = LocalDisk(tmp_path).view("file")
    assert view is not None

    def resident() -> int:
        """KiB of the file that are mapped in."""
        lines = Path("/proc/self/smaps").read_text().splitlines()
        at = next(i for i, line in enumerate(lines) if line.endswith(str(tmp_path / "file")))
        return next(int(line.split()[1]) for line in lines[at:] if line.startswith("Rss:"))

    assert sum(view) >= 0
    before = resident()
    let_go(view, 0, 48 * PAGE)
    assert before == 64 * PAGE // 1024
    assert resident() <= 16 * PAGE // 1024


LARGE = 2**18


def said(number: int) -> Callable[..., int]:
    """A ``sync_file_range`` that fails in this way."""

    def begin(*_: object) -> int:
        ctypes.set_errno(number)
        return -1

    return begin


@pytest.mark.parametrize("has_it", [True, False])
def test_writing_begins_early_where_the_kernel_can(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_it: bool
) -> None:
    """What is written is what is read, whether it does or not; for little it is not worth it."""
    asked: list[tuple[int, int, int]] = []

    def begin(file: int, offset: Any, size: Any, flags: int) -> int:
        asked.append((offset.value, size.value, flags))
        return 0

    monkeypatch.setattr(module, "_sync_file_range", begin if has_it else None)
    disk, data = LocalDisk(tmp_path), os.urandom(LARGE)
    disk.allocate("file", 2 * LARGE)
    disk.write("file", 4, data)
    disk.write("file", LARGE + 4, data[:-5])
    disk.sync("file")
    assert (tmp_path / "file").read_bytes() == bytes(4) + data + data[:-5] + bytes(1)
    assert asked == ([(4, LARGE, 2)] if has_it else [])


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ESPIPE, errno.EINVAL, errno.EPERM])
def test_a_file_system_that_cannot_begin_early(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    monkeypatch.setattr(module, "_sync_file_range", said(number))
    disk, data = LocalDisk(tmp_path), os.urandom(LARGE)
    disk.allocate("file", LARGE)
    disk.write("file", 0, data)
    disk.sync("file")
    assert disk.read("file") == data


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EDQUOT])
def test_a_disk_that_refuses_early_is_heard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """The system may tell it once only: the sync that follows would say that all is well."""
    monkeypatch.setattr(module, "_sync_file_range", said(number))
    disk = LocalDisk(tmp_path)
    disk.allocate("file", LARGE)
    with pytest.raises(StorageFailed, match=os.strerror(number)):
        disk.write("file", 0, bytes(LARGE))


@pytest.mark.parametrize("parts", [[], [b""], [b"abc"], [b"abc", b"", memoryview(b"defgh")[1:]]])
def test_a_file_is_replaced_by_its_parts(tmp_path: Path, parts: list[bytes | memoryview]) -> None:
    disk = LocalDisk(tmp_path)
    disk.replace("a/file", b"the one before, which is longer")
    disk.replace("a/file", *parts, np.arange(3, dtype="<u4").data)
    assert disk.read("a/file") == b"".join(parts) + bytes([0, 0, 0, 0, 1, 0, 0, 0, 2, 0, 0, 0])
    assert disk.names() == ["a/file"]


def test_a_file_is_replaced_by_all_its_parts_or_by_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk, write, left = LocalDisk(tmp_path), os.write, [b"first"]
    disk.replace("file", b"before")

    def full(file: int, data: memoryview) -> int:
        if left and left.pop():
            return write(file, data)
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with pytest.raises(StorageFailed, match="No space"):
            disk.replace("file", b"first", b"second")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert disk.read("file") == b"before"


def test_a_sync_tells_what_went_wrong_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(file: int) -> None:
        raise OSError(5, "Input/output error")

    disk = LocalDisk(tmp_path)
    disk.allocate("file", 10)
    disk.write("file", 0, bytes(10))
    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(StorageFailed, match="Input/output"):
        disk.sync("file")
