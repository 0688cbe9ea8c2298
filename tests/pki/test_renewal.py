"""Renewal on disk: what a running process takes up, what it refuses, and when it asks for one."""

from __future__ import annotations

import os
import shlex
import shutil
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from click.testing import CliRunner

import secagg.cli.pki
import secagg.cli.silo
from secagg.errors import CredentialError
from secagg.pki.authority import LEAF_DAYS, Authority
from secagg.pki.credentials import RENEW_DAYS, Credentials, load_credentials
from secagg.pki.enrolment import create_request, install_bundle, renewal_request
from secagg.pki.names import Role
from secagg.pki.renewal import RETRY_SECONDS, FileWatch, Reminder, RenewalWatch

from .builders import CONSORTIUM, NOW, enrol, refused, request

MONTH = NOW + timedelta(days=30)


class Clock:
    """A monotonic clock and a calendar that tests move."""

    def __init__(self) -> None:
        self.seconds, self.date = 0.0, MONTH

    def monotonic(self) -> float:
        return self.seconds

    def now(self) -> datetime:
        return self.date


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def north(authority: Authority, tmp_path: Path) -> Credentials:
    return enrol(authority, tmp_path / "north", "north")[1]


@pytest.fixture
def watch(north: Credentials, clock: Clock) -> RenewalWatch:
    return RenewalWatch(north, now=clock.now, monotonic=clock.monotonic)


def renewed(
    authority: Authority, directory: Path, *, role: Role = Role.SILO, name: str = "north"
) -> Credentials:
    """As the operator and the admin renew."""
    bundle = authority.approve(renewal_request(directory, role, name, CONSORTIUM), now=MONTH)
    return install_bundle(directory, bundle, fingerprint=None, now=MONTH)


def code(found: object) -> str:
    assert isinstance(found, CredentialError)
    return found.code


# One file.


def test_a_file_is_due_once_for_each_stamp(tmp_path: Path) -> None:
    file = tmp_path / "f"
    file.write_bytes(b"one")
    watch = FileWatch(file, b"one")
    assert not watch.due()
    os.utime(file, ns=(1, 1))
    assert watch.due()
    watch.taken()
    assert not watch.due()
    file.write_bytes(b"two")
    os.utime(file, ns=(1, 1))
    assert not watch.due()  # of the same size, time and inode: nothing to see
    (tmp_path / "g").write_bytes(b"two")
    os.utime(tmp_path / "g", ns=(1, 1))
    (tmp_path / "g").replace(file)
    assert watch.due()  # another inode


@pytest.mark.parametrize("there", [True, False])
def test_a_file_that_is_not_what_its_reader_has_is_due_at_once(tmp_path: Path, there: bool) -> None:
    """It changed between the reading and the watching."""
    if there:
        (tmp_path / "f").write_bytes(b"two")
    assert FileWatch(tmp_path / "f", b"one").due()


def test_what_was_refused_is_due_again_after_a_while(tmp_path: Path, clock: Clock) -> None:
    file = tmp_path / "f"
    watch = FileWatch(file, b"", monotonic=clock.monotonic)
    assert watch.due()
    assert watch.refused()
    for _ in range(3):
        clock.seconds += RETRY_SECONDS - 0.01
        assert not watch.due()
        clock.seconds += 0.01
        assert watch.due()
        assert not watch.refused()
    file.write_bytes(b"other")
    assert watch.due()  # a change is looked at without waiting
    assert watch.refused()
    clock.seconds += RETRY_SECONDS
    assert watch.due()
    watch.taken()
    clock.seconds += 10 * RETRY_SECONDS
    assert not watch.due()


# A member's certificate.


def test_a_renewal_is_taken_up_once(
    authority: Authority, north: Credentials, watch: RenewalWatch
) -> None:
    assert [watch.poll() for _ in range(3)] == [None] * 3
    new = renewed(authority, north.directory)
    found = watch.poll()
    assert isinstance(found, Credentials)
    assert found.certificate_pem == new.certificate_pem != north.certificate_pem
    assert found.not_after == MONTH + timedelta(days=LEAF_DAYS)
    assert [watch.poll() for _ in range(3)] == [None] * 3


def test_a_profile_older_than_its_directory(
    authority: Authority, north: Credentials, clock: Clock
) -> None:
    new = renewed(authority, north.directory)
    found = RenewalWatch(north, now=clock.now).poll()
    assert isinstance(found, Credentials)
    assert found.certificate_pem == new.certificate_pem


def test_a_bad_file_is_told_once_and_a_good_one_taken_up(
    authority: Authority, north: Credentials, watch: RenewalWatch, clock: Clock
) -> None:
    file = north.directory / "certificate.pem"
    for data in (b"", b"rubbish"):
        file.write_bytes(data)
        assert code(watch.poll()) == "identity-certificate"
        for _ in range(3):
            clock.seconds += RETRY_SECONDS
            assert watch.poll() is None
    file.unlink()
    assert code(watch.poll()) == "file-missing"
    shutil.copy(north.directory / "manifest.json", file)
    assert code(watch.poll()) == "identity-certificate"
    file.unlink()
    renewed(authority, north.directory)
    assert isinstance(watch.poll(), Credentials)


def test_half_of_a_renewal_is_taken_up_when_the_rest_is_there(
    authority: Authority, north: Credentials, watch: RenewalWatch, clock: Clock
) -> None:
    """A copying operator: the certificate lies there, the manifest or a mode comes later."""
    manifest = north.directory / "manifest.json"
    whole = manifest.read_bytes()
    renewed(authority, north.directory)
    manifest.write_bytes(whole[:100])
    assert code(watch.poll()) == "manifest-malformed"
    manifest.write_bytes(whole)
    (north.directory / "tls.key").chmod(0o644)
    clock.seconds += RETRY_SECONDS
    assert watch.poll() is None  # told already
    (north.directory / "tls.key").chmod(0o600)
    assert watch.poll() is None  # not yet
    clock.seconds += RETRY_SECONDS
    assert isinstance(watch.poll(), Credentials)


def test_a_certificate_that_is_not_valid_yet_is_waited_for(
    authority: Authority, north: Credentials, watch: RenewalWatch, clock: Clock
) -> None:
    renewed(authority, north.directory)
    clock.date = MONTH - timedelta(hours=1)
    assert code(watch.poll()) == "certificate-not-yet-valid"
    clock.date, clock.seconds = MONTH, RETRY_SECONDS
    assert isinstance(watch.poll(), Credentials)


def replace_by(directory: Path, other: Path) -> None:
    for file in other.iterdir():
        shutil.copy(file, directory / file.name)


def test_another_member_is_refused(
    authority: Authority, north: Credentials, watch: RenewalWatch, tmp_path: Path
) -> None:
    enrol(authority, tmp_path / "south", "south")
    replace_by(north.directory, tmp_path / "south")
    found = watch.poll()
    assert code(found) == "renewal-identity"
    assert "silo/south" in str(found)
    assert "silo/north" in str(found)


def test_another_role_is_refused(
    authority: Authority, north: Credentials, watch: RenewalWatch, tmp_path: Path
) -> None:
    enrol(authority, tmp_path / "hub", "north", Role.COORDINATOR)
    replace_by(north.directory, tmp_path / "hub")
    assert code(watch.poll()) == "certificate-role"


def test_new_keys_are_no_renewal(
    authority: Authority, north: Credentials, watch: RenewalWatch, tmp_path: Path
) -> None:
    """The session's signatures are made with the old one, which the manifest lists no more."""
    enrol(authority, tmp_path / "anew", "north")
    replace_by(north.directory, tmp_path / "anew")
    assert code(watch.poll()) == "renewal-key"


@pytest.mark.parametrize(
    ("consortium", "expected"), [(CONSORTIUM, "renewal-authority"), ("banks", "renewal-identity")]
)
def test_another_authority_is_refused(
    north: Credentials, watch: RenewalWatch, tmp_path: Path, consortium: str, expected: str
) -> None:
    """Whoever can write the files cannot turn a running training to another anchor."""
    other = Authority.create(tmp_path / "other", consortium, now=NOW)
    made = renewal_request(north.directory, Role.SILO, "north", consortium)
    bundle = other.approve(made, now=NOW)
    (north.directory / "authority.pem").write_bytes(bundle.authority_pem)
    (north.directory / "manifest.json").write_bytes(bundle.manifest.to_json())
    (north.directory / "certificate.pem").write_bytes(bundle.certificate_pem)
    assert code(watch.poll()) == expected


def test_a_failing_disk_is_a_refusal(
    north: Credentials, watch: RenewalWatch, monkeypatch: pytest.MonkeyPatch, clock: Clock
) -> None:
    def fail(*_: object, **__: object) -> Credentials:
        raise OSError(5, "Input/output error")

    os.utime(north.directory / "certificate.pem", ns=(1, 1))
    with monkeypatch.context() as patch:
        patch.setattr("secagg.pki.renewal.load_credentials", fail)
        found = watch.poll()
    assert code(found) == "file-read"
    assert "Input/output error" in str(found)
    clock.seconds += RETRY_SECONDS
    assert isinstance(watch.poll(), Credentials)


# Days left.


@pytest.mark.parametrize(
    ("left", "days", "soon"),
    [
        (timedelta(days=20), 20, False),
        (timedelta(days=RENEW_DAYS, seconds=1), RENEW_DAYS, False),
        (timedelta(days=RENEW_DAYS), RENEW_DAYS, True),
        (timedelta(hours=47), 1, True),
        (timedelta(hours=1), 0, True),
        (timedelta(seconds=-1), -1, True),
    ],
)
def test_days_left(north: Credentials, left: timedelta, days: int, soon: bool) -> None:
    now = north.not_after - left
    assert (north.days_left(now), north.ends_soon(now)) == (days, soon)


@pytest.mark.parametrize(
    ("left", "words"),
    [
        (timedelta(days=13, hours=1), "in 13 days,"),
        (timedelta(hours=30), "in a day,"),
        (timedelta(hours=1), "within a day,"),
    ],
)
def test_the_text_says_how_long(north: Credentials, left: timedelta, words: str) -> None:
    assert words in north.ending(north.not_after - left)


def test_a_reminder_comes_once_a_day(north: Credentials) -> None:
    reminder = Reminder()
    early = north.not_after - timedelta(days=RENEW_DAYS, seconds=1)
    assert not reminder.due(north, early)
    begin = north.not_after - timedelta(days=RENEW_DAYS)
    told = [hour for hour in range(72) if reminder.due(north, begin + timedelta(hours=hour))]
    assert told == [0, 24, 48]
    assert reminder.due(north, begin)  # a clock that was set back far is no reason for silence


def commands(text: str) -> Iterator[list[str]]:
    """What stands between backquotes."""
    for line in text.split("`")[1::2]:
        _, group, *rest = shlex.split(line)
        yield [group, *rest]


@pytest.mark.parametrize("role", list(Role))
def test_the_commands_that_the_text_names_renew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, role: Role
) -> None:
    """Word for word, run in one place; the directory's name has a blank in it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(secagg.cli.pki, "user_data_path", lambda _: tmp_path)
    then = datetime.now(UTC) - timedelta(days=20)
    authority = Authority.create(tmp_path / "authority", CONSORTIUM, now=then)
    place = tmp_path / "its place"
    made = create_request(place, role, "x", CONSORTIUM, os.urandom)
    bundle = authority.approve(made, now=then, days=30)
    old = install_bundle(place, bundle, fingerprint=None, now=then)
    groups = {"pki": secagg.cli.pki.pki, "silo": secagg.cli.silo.silo}
    run = list(commands(old.how_to_renew))
    assert [command[:2] for command in run] == [
        ["silo", "request"],
        ["pki", "approve"],
        ["silo", "install"],
    ]
    for group, *rest in run:
        done = CliRunner().invoke(groups[group], rest)
        assert done.exit_code == 0, (rest, done.output, done.exception)
    new = load_credentials(place, now=datetime.now(UTC), role=role)
    assert new.not_after > old.not_after
    assert new.manifest == old.manifest


def test_an_ended_certificate_names_the_commands(north: Credentials) -> None:
    with refused("certificate-expired"):
        north.check_validity(north.not_after + timedelta(seconds=1))
    with pytest.raises(CredentialError) as caught:
        north.check_validity(north.not_after + timedelta(seconds=1))
    assert caught.value.remedy == north.how_to_renew


# What a renewal costs the others: nothing.


def contents(root: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}


@pytest.mark.parametrize(("role", "name"), [(Role.SILO, "north"), (Role.COORDINATOR, "hub")])
def test_a_renewal_changes_no_other_file(
    authority: Authority, tmp_path: Path, role: Role, name: str
) -> None:
    for silo in ("north", "south", "east"):
        enrol(authority, tmp_path / silo, silo)
    enrol(authority, tmp_path / "hub", "hub", Role.COORDINATOR)
    install_bundle(  # everybody holds the newest manifest, as after a first session
        tmp_path / name,
        authority.approve(renewal_request(tmp_path / name, role, name, CONSORTIUM), now=NOW),
        fingerprint=None,
        now=NOW,
    )
    before, manifest = contents(tmp_path), authority.signed_manifest
    renewed(authority, tmp_path / name, role=role, name=name)
    after = contents(tmp_path)
    changed = {path for path in before.keys() | after.keys() if before.get(path) != after.get(path)}
    assert changed == {
        tmp_path / name / "certificate.pem",
        tmp_path / "authority" / "issued.json",
    }
    assert authority.signed_manifest == manifest
    assert authority.manifest.digest() == manifest.manifest.digest()
    assert authority.manifest.revoked == ()


def test_new_keys_do_change_the_manifest(authority: Authority, tmp_path: Path) -> None:
    """They must: the old certificate is revoked, and everybody has to learn the new key."""
    enrol(authority, tmp_path / "old", "north")
    version = authority.manifest.version
    authority.approve(request(tmp_path / "new", "north"), now=NOW)
    assert authority.manifest.version == version + 1
    assert len(authority.manifest.revoked) == 1
