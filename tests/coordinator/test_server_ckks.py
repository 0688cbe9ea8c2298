"""A coordinator on a machine without a library for homomorphic encryption serves all protections.

The silos run in this process, which has one; the server's process cannot import TenSEAL, zstandard
or torch.
"""

from __future__ import annotations

import importlib.util
import os
import pkgutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import numpy as np
import pytest
from click.testing import CliRunner

import client_sdk
import secagg
from secagg.ckks import custody
from secagg.cli import commands
from secagg.config import Protection, SiloId
from secagg.masking.transcript import opening_transcript, session_hash
from secagg.pki.names import Role
from secagg.pki.profile import write_policy, write_profile
from secagg.wire import custody as wire
from secagg.wire._pb import service_pb2 as api
from secagg.wire._pb.masking_pb2 import KeyName

from .play import TASK
from .serving import CALL_SECONDS, SILOS, Consortium, Server, Study, refused, serving

Status = grpc.StatusCode
ABSENT = {"tenseal", "_tenseal_cpp", "zstandard", "torch"}
WITHOUT = f"""
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {sorted(ABSENT)}:
            raise ImportError(name + " is not installed here")

sys.meta_path.insert(0, Absent())
"""


def run(program: str, prelude: str = WITHOUT) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", prelude + program]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


# What is imported.


@pytest.mark.process
@pytest.mark.parametrize("name", ["tenseal", "zstandard", "torch"])
def test_the_hook_hides_what_is_installed(name: str) -> None:
    assert importlib.util.find_spec(name) is not None
    found = run(f"import {name}")
    assert (found.returncode, f"{name} is not installed here" in found.stderr) == (1, True)


def modules(*packages: str) -> list[str]:
    """A package's modules by name, all of them."""
    root = Path(secagg.__file__).parent
    found = [f"secagg.{package}" for package in packages]
    for package in packages:
        place = str(root / package)
        found += [m.name for m in pkgutil.walk_packages([place], f"secagg.{package}.")]
    return found


@pytest.mark.process
def test_the_coordinator_s_modules_need_none_of_them() -> None:
    """Nor load them where they are there."""
    names = modules("coordinator", "wire", "masking", "ring", "encoding", "crypto", "pki")
    assert {"secagg.coordinator.keys", "secagg.wire.custody", "secagg.masking.server"} <= set(names)
    # alembic runs its migrations; a silo with a GPU imports what masks there, and nobody else
    names = [name for name in names if ".migrations." not in name and ".ring.gpu." not in name]
    program = f"""
import importlib, sys
for name in {names}:
    importlib.import_module(name)
print(sorted({sorted(ABSENT)} & sys.modules.keys()))
"""
    for prelude in (WITHOUT, ""):
        found = run(program, prelude)
        assert (found.returncode, found.stdout) == (0, "[]\n"), found.stderr


@pytest.mark.process
def test_a_silo_without_the_extra_is_told_which(tmp_path: Path) -> None:
    program = """
from secagg.ckks.sealing import Sealer
from secagg.crypto.secret import Secret
from secagg.errors import ConfigError
from secagg.suite import Suite
try:
    Sealer(Suite.CKKS_54, Secret(bytes(32)), workers=1)
except ConfigError as error:
    print("ckks" in error.remedy)
"""
    assert run(program).stdout == "True\n"


# What is served.


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    root = tmp_path_factory.mktemp("bare")
    consortium = Consortium(root / "pki")
    with serving(consortium, root / "server", WITHOUT) as running:
        for silo in SILOS:
            place = consortium.path(Role.SILO, silo)
            write_profile(place, running.address)
            write_policy(place, [*Protection])
        write_profile(consortium.path(Role.ADMIN, "boss"), running.address)
        yield running


def at_all(study: Study, work: Callable[[str], object]) -> dict[str, object]:
    """Run a function for each silo at once; the first that fails ends the session."""
    with ThreadPoolExecutor(len(SILOS)) as pool:
        futures = {silo: pool.submit(work, silo) for silo in SILOS}
        try:
            return {silo: future.result(4 * CALL_SECONDS) for silo, future in futures.items()}
        except BaseException:
            study.server.boss.admin("AbortSession", api.AbortSessionRequest(name=study.name))
            raise


def name_of(protection: Protection) -> str:
    return str(protection).replace("+", "-")


@pytest.mark.process
@pytest.mark.parametrize("protection", Protection)
def test_a_round_of_each_protection(server: Server, protection: Protection) -> None:
    study = server.create(name_of(protection), protection=protection, chunk_bytes=2**16)

    def mean(silo: str) -> float:
        weight = float(1 + SILOS.index(silo))
        tensors = {"x": np.full(5000, weight, np.float32), "y": np.full((3, 2), -0.5)}
        place = server.consortium.path(Role.SILO, silo)
        with client_sdk.join(study.name, profile=place) as session:
            found = session.mean(tensors, weight, metrics={"loss": weight}, task=TASK)
        np.testing.assert_allclose(found["y"], -0.5, atol=1e-5)
        assert np.ptp(found["x"]) < 1e-5
        return float(found["x"][0])

    expected = sum(w * w for w in range(1, 5)) / sum(range(1, 5))
    assert list(at_all(study, mean).values()) == pytest.approx([expected] * 4, abs=1e-5)
    (result,) = study.show().results
    assert list(result.survivors) == list(SILOS)
    assert result.HasField("key") == protection.seals
    assert len(result.seeds) == (4 if protection.seals else 0)


@pytest.mark.process
def test_the_server_has_loaded_none_of_them(server: Server) -> None:
    """After whatever rounds it has served: no library of theirs is mapped, no error logged."""
    maps = Path(f"/proc/{server.process.pid}/maps").read_text()
    assert "cryptography" in maps
    assert not [line for line in maps.splitlines() if any(name in line for name in ABSENT)]
    assert b"not installed here" not in server.log
    assert b'"internal"' not in server.log


# What an admin is shown.


def shown(server: Server, study: Study, *more: str) -> str:
    """What ``secagg session show`` prints, without its line breaks."""
    place = str(server.consortium.path(Role.ADMIN, "boss"))
    done = CliRunner().invoke(
        commands, ["session", "show", study.name, "--profile", place, *more], catch_exceptions=False
    )
    assert done.exit_code == 0
    return " ".join(done.stdout.split())


WARNING = "any silo that works with the coordinator can read every update."


@pytest.mark.process
@pytest.mark.parametrize("protection", Protection)
def test_show_says_what_a_protection_is_worth(server: Server, protection: Protection) -> None:
    study = server.create(f"show-{name_of(protection)}", protection=protection)
    text = shown(server, study)
    assert f"protection {protection}," in text
    assert ("suite ckks-54" in text) == protection.seals
    assert ("masks aes-128-ctr" in text) == protection.masks
    assert (WARNING in text) == (protection is Protection.CKKS)
    assert f'"suite": "{"ckks-54" if protection.seals else ""}"' in shown(server, study, "--json")


# Refusals on the wire.


def asked(study: Study, silo: str, epoch: int = 1) -> api.KeyRequest:
    """A silo's signed wish for the session's key."""
    credentials = study.server.consortium.credentials(Role.SILO, silo)
    assert credentials.identity_key is not None
    transcript = opening_transcript(session_hash(study.config), study.session_id)
    me = custody.Custodian(SiloId(silo), credentials.identity_key, {}, study.session_id, transcript)
    return wire.request_to_wire(custody.ask(me, epoch, os.urandom)[1])


def boxed(sender: str, request: api.KeyRequest, key: api.KeyName) -> api.KeyBox:
    """Bytes from a silo for another."""
    return api.KeyBox(
        epoch=key.epoch,
        sender=sender,
        recipient=request.silo,
        sender_ephemeral=request.ephemeral,
        recipient_ephemeral=request.ephemeral,
        key_id=key.key_id,
        sealed=bytes(48),
        signature=bytes(64),
    )


@pytest.mark.process
def test_the_custody_of_a_key_over_the_wire(server: Server) -> None:
    """Whatever is refused is refused by name, and whoever is named in a message sends it."""
    study = server.create("custody", protection=Protection.CKKS_MASKED)
    key = KeyName(epoch=1, key_id=os.urandom(32))
    mine = asked(study, "a")
    with refused(Status.PERMISSION_DENIED, "sender-identity"):
        study.call("b", "AskKey", api.AskKeyRequest, request=mine)
    assert study.call("a", "AskKey", api.AskKeyRequest, request=mine).make
    assert study.call("a", "AskKey", api.AskKeyRequest, request=asked(study, "a", 7)).epoch == 1
    with refused(Status.FAILED_PRECONDITION, "key-maker"):
        study.call("b", "AnnounceKey", api.AnnounceKeyRequest, key=key, members=SILOS)
    with refused(Status.INVALID_ARGUMENT, "key-members"):
        study.call("a", "AnnounceKey", api.AnnounceKeyRequest, key=key, members="abc")
    with refused(Status.FAILED_PRECONDITION, "key-stale"):
        study.call("a", "AwaitKeyRequests", api.AwaitKeyRequestsRequest, key=key)
    with refused(Status.FAILED_PRECONDITION, "key-stale"):
        study.call("a", "Next", api.NextRequest, round=1, seen=api.STEP_LEFT, key=key)
    study.call("a", "AnnounceKey", api.AnnounceKeyRequest, key=key, members=SILOS)
    another = KeyName(epoch=1, key_id=bytes(32))
    with refused(Status.ALREADY_EXISTS, "key-announced"):
        study.call("a", "AnnounceKey", api.AnnounceKeyRequest, key=another, members=SILOS)
    theirs = asked(study, "b")
    forged = asked(study, "b")
    forged.signature = bytes(64)
    with refused(Status.INVALID_ARGUMENT, "message-signature"):
        study.call("b", "AskKey", api.AskKeyRequest, request=forged)
    waits = (
        server.silo("b")
        .method("AskKey")
        .future(
            api.AskKeyRequest(session_id=study.session_id, request=theirs), timeout=CALL_SECONDS
        )
    )
    told = study.call("a", "AwaitKeyRequests", api.AwaitKeyRequestsRequest, key=key)
    assert list(told.requests) == [theirs]
    box = boxed("a", theirs, key)
    with refused(Status.PERMISSION_DENIED, "sender-identity"):
        study.call("c", "SendKeyBox", api.SendKeyBoxRequest, box=box)
    study.call("a", "SendKeyBox", api.SendKeyBoxRequest, box=box)
    assert waits.result().box == box
    study.call("a", "EndKey", api.EndKeyRequest, key=key, round=1)  # no such sum: nothing ends
    study.open()
    with refused(Status.FAILED_PRECONDITION, "key-stale"):
        study.call("a", "Ready", api.ReadyRequest, task=TASK, base=study.base())
    study.call("a", "Ready", api.ReadyRequest, task=TASK, base=study.base(), key=key)


@pytest.mark.process
def test_a_masked_session_has_no_key(server: Server) -> None:
    study = server.create("keyless")
    key, request = KeyName(epoch=1, key_id=bytes(32)), asked(study, "a")
    for method, fields in {
        "AskKey": {"request": request},
        "AnnounceKey": {"key": key, "members": SILOS},
        "AwaitKeyRequests": {"key": key},
        "SendKeyBox": {"box": boxed("a", asked(study, "b"), key)},
        "EndKey": {"key": key, "round": 1},
    }.items():
        with refused(Status.INVALID_ARGUMENT, "key-unused"):
            study.call("a", method, getattr(api, f"{method}Request"), **fields)
