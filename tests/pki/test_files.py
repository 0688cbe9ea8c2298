from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from secagg.errors import CredentialError
from secagg.pki import files
from secagg.pki.files import (
    locked,
    make_private_dir,
    read_private,
    read_public,
    write_private,
    write_public,
)

from .builders import refused


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    make_private_dir(tmp_path / "private")
    path = tmp_path / "private" / "key"
    write_private(path, b"secret")
    return path


def test_round_trip_and_modes_under_any_umask(tmp_path: Path) -> None:
    for umask in (0o000, 0o277):
        before = os.umask(umask)
        try:
            directory = tmp_path / f"{umask:o}"
            make_private_dir(directory)
            write_private(directory / "key", b"k")
            write_public(directory / "pem", b"p")
        finally:
            os.umask(before)
        assert (mode(directory), mode(directory / "key"), mode(directory / "pem")) == (
            0o700,
            0o600,
            0o644,
        )
        assert read_private(directory / "key") == b"k"
        assert read_public(directory / "pem") == b"p"
        assert sorted(os.listdir(directory)) == ["key", "pem"]


def test_overwriting_a_wide_file_narrows_it(secret: Path) -> None:
    secret.chmod(0o666)
    write_private(secret, b"new")
    assert mode(secret) == 0o600
    assert read_private(secret) == b"new"


def test_writing_replaces_a_link_and_not_its_target(secret: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.write_bytes(b"other")
    secret.unlink()
    secret.symlink_to(target)
    write_private(secret, b"new")
    assert target.read_bytes() == b"other"
    assert read_private(secret) == b"new"


def test_failed_write_leaves_the_old_content(secret: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with refused("file-write"):
        write_private(secret, b"new")
    assert read_private(secret) == b"secret"
    assert os.listdir(secret.parent) == ["key"]


def test_writing_into_no_directory(tmp_path: Path) -> None:
    with refused("file-write"):
        write_public(tmp_path / "none" / "file", b"")


@pytest.mark.parametrize("bits", [0o640, 0o620, 0o604, 0o602, 0o666, 0o610])
def test_secret_open_to_others(secret: Path, bits: int) -> None:
    secret.chmod(bits)
    with refused("file-permissions"):
        read_private(secret)


def test_refusal_says_the_command(secret: Path) -> None:
    secret.chmod(0o644)
    with pytest.raises(files.CredentialError, match=f"chmod 600 {secret}"):
        read_private(secret)
    secret.chmod(0o600)
    secret.parent.chmod(0o750)
    with pytest.raises(files.CredentialError, match=f"chmod 700 {secret.parent}"):
        read_private(secret)


@pytest.mark.parametrize("bits", [0o750, 0o705, 0o770, 0o711, 0o777])
def test_directory_open_to_others(secret: Path, bits: int) -> None:
    secret.parent.chmod(bits)
    with refused("file-permissions"):
        read_private(secret)
    with refused("file-permissions"):
        make_private_dir(secret.parent)
    assert mode(secret.parent) == bits


def test_public_file_may_be_read_but_not_written_by_others(secret: Path) -> None:
    secret.chmod(0o644)
    assert read_public(secret) == b"secret"
    secret.chmod(0o664)
    with refused("file-permissions"):
        read_public(secret)


def test_symlink_to_a_good_file(secret: Path) -> None:
    link = secret.parent / "link"
    link.symlink_to(secret)
    for read in (read_private, read_public):
        # Not what the kernel says of it afterwards, which would send a user elsewhere.
        with pytest.raises(CredentialError, match="is a symbolic link"):
            read(link)


def test_link_swapped_in_after_the_look(secret: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    link = secret.parent / "link"
    link.symlink_to(secret)
    monkeypatch.setattr(Path, "is_symlink", lambda self: False)
    with refused("file-permissions"):
        read_private(link)


def test_someone_else_s_file(secret: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    with refused("file-permissions"):
        read_private(secret)
    with refused("file-permissions"):
        make_private_dir(secret.parent)


def test_someone_else_s_file_in_an_own_directory(
    secret: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fstat(descriptor: int) -> os.stat_result:
        status = list(os.stat(descriptor))
        status[stat.ST_UID] += 1
        return os.stat_result(status)

    monkeypatch.setattr(os, "fstat", fstat)
    for read in (read_private, read_public):
        with refused("file-permissions"):
            read(secret)


def test_no_file_fifo_directory_or_giant(secret: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with refused("file-missing"):
        read_private(secret.parent / "none")
    with refused("file-missing"):
        read_private(secret.parent / "none" / "key")
    os.mkfifo(secret.parent / "fifo", 0o600)
    with refused("file-permissions"):
        read_private(secret.parent / "fifo")
    make_private_dir(secret.parent / "sub")
    with refused("file-permissions"):
        read_private(secret.parent / "sub")
    monkeypatch.setattr(files, "MAX_FILE_BYTES", 5)
    with refused("file-size"):
        read_private(secret)


def test_private_dir_in_the_place_of_a_file(secret: Path) -> None:
    with refused("file-permissions"):
        make_private_dir(secret)
    with refused("file-permissions"):
        make_private_dir(secret / "sub")


def test_lock_is_released_after_a_failure(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), locked(tmp_path):
        raise RuntimeError
    with locked(tmp_path):
        pass
