"""The scan finds nothing in what we ship, and everything that is planted."""

from __future__ import annotations

import base64
import json
import os
from pathlib import Path

import numpy as np
import pytest

from secagg.config import Protection
from threat_model.scan.engine import forms, scan
from threat_model.scan.run import Run, Targets

SECRET = bytes(range(7, 250, 8)) + b"\\"
PLANTS = {
    "raw": SECRET,
    "reversed": SECRET[::-1],
    "hex": SECRET.hex().encode(),
    "HEX": SECRET.hex().upper().encode(),
    "hex reversed": f"{int.from_bytes(SECRET, 'little'):x}".encode(),
    "decimal": str(int.from_bytes(SECRET, "big")).encode(),
    "decimal reversed": str(int.from_bytes(SECRET, "little")).encode(),
    "base64+0": base64.b64encode(SECRET + b"!"),
    "base64+1": base64.b64encode(b"?" + SECRET + b"!!"),
    "base64+2": base64.b64encode(b"??" + SECRET),
    "base64url+0": base64.urlsafe_b64encode(SECRET),
    "list": str(list(SECRET)).encode(),
    "compact list": json.dumps(list(SECRET), separators=(",", ":")).encode(),
    "numpy": str(np.frombuffer(SECRET, np.uint8)).encode(),
    "Python": repr(SECRET).encode(),
    "Python in JSON": json.dumps({"event": f"got {SECRET!r}"}).encode(),
    "JSON": json.dumps(SECRET.decode("latin-1")).encode(),
}

KINDS = {
    "derived/channel",
    "derived/pair",
    "derived/self",
    "encoded-update",
    "salt",
    "secagg.crypto.keys:KeyPair.agree",
    "secagg.crypto.keys:KeyPair.generate",
    "secagg.crypto.shamir:Basis.combine",
    "secagg.masking.client:advertise_keys",
    "secagg.pki.credentials:read_keys",
    "shamir-coefficient",
    "share",
    "tensor",
    "weight",
    "metric",
    "model",
}
"""What the prelude has to see in a masked run; a function that moves would go unseen otherwise."""


@pytest.mark.parametrize("form", PLANTS)
@pytest.mark.parametrize("before", range(8))
def test_a_secret_is_found_in_every_form_and_place(form: str, before: int) -> None:
    text = os.urandom(before + 800) + PLANTS[form] + os.urandom(before)
    found = scan({"seed": [SECRET], "another": [os.urandom(32)]}, {"log": text})
    assert ("seed", form) in {(f.secret, f.form) for f in found}
    assert {f.secret for f in found} == {"seed"}


def test_what_is_not_there_is_not_found() -> None:
    texts = {name: os.urandom(100_000) for name in ("disk", "log")}
    assert scan({"seed": [SECRET], "key": [os.urandom(16)]}, texts) == []
    assert scan({"seed": [SECRET]}, {"log": SECRET[:-1], "empty": b""}) == []


def test_a_part_of_a_long_secret_is_found(tmp_path: Path) -> None:
    vector = os.urandom(4096)
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "spool").write_bytes(b"x" + vector[1000:1288])
    found = scan({"vector": [vector]}, {"disk": tmp_path})
    assert {(f.secret, f.place, f.form) for f in found} == {("vector", "disk/deep/spool", "raw")}


def test_a_secret_that_chance_would_find_is_refused() -> None:
    with pytest.raises(ValueError, match="too few"):
        scan({"pin": [b"1234567"]}, {})


def test_forms_tell_one_value() -> None:
    """No form is so short, or so common, that it would be found by chance."""
    assert all(len(pattern) >= 8 for _, pattern in forms(os.urandom(8)))


@pytest.mark.process
def test_nothing_is_found_in_a_run_and_every_plant_is(tmp_path: Path) -> None:
    run = Run(tmp_path, Protection.MASKED)
    run.play()
    clean = run.search()
    assert [str(finding) for finding in clean.findings] == []
    assert {kind for entry in run.drawn.entries.values() for kind in entry.kinds} >= KINDS
    revealed = 2 * (3 * 4 + 3 * 4 + 3 * 4)  # three holders at least, of four silos, with salts
    assert clean.allowed["wire/unmasking"] >= revealed
    assert all(any(path.stat().st_size for path in p.rglob("*")) for p in run.places.values())
    planted = _plant(run) | _plant_updates(run)
    assert {finding.place for finding in run.search().findings} == planted


def _plant(run: Run) -> set[str]:
    """Leave a secret of the run on each channel; where."""
    disk, logs, wire = (run.places[name] for name in ("disk", "logs", "wire"))
    unmasking = next(wire.glob("request.Send.unmasking.*-1-*.a"))
    plants = {
        disk / "coordinator-killed/state/journal.sqlite-wal": _of_kind(run, "derived/self"),
        disk / "end/b/state/ledger.jsonl": _share(run, "self-seed").hex().encode(),
        logs / "coordinator": repr(_of_kind(run, "derived/channel")).encode(),
        wire / "reply.Next": base64.b64encode(b"1" + _of_kind(run, "encoded-update")),
        unmasking: _share(run, "mask-key"),  # not what the survivors dictate
    }
    for path, text in plants.items():
        with path.open("ab") as file:
            file.write(text)
    return {
        f"{name}/{path.relative_to(place)}"
        for name, place in run.places.items()
        for path in plants
        if path.is_relative_to(place)
    }


def _plant_updates(run: Run) -> set[str]:
    """Leave updates where they lay once, for longer than they may, and in a file's name; where."""
    disk = run.places["disk"]
    first, name = _of_update(run, 1), f"{_of_kind(run, 'derived/self').hex()}.tmp"
    late = [
        f"{moment}/{silo}/state/sessions/0/update-0.safetensors"
        for moment in ("silo-killed", "coordinator-killed", "end")
        for silo in ("a", "b")
    ]
    for path in late:
        (disk / path).parent.mkdir(parents=True)
        (disk / path).write_bytes(first)
    (disk / "end" / name).touch()
    return {*(f"disk/{path}" for path in late), "disk (names)"}


def _of_update(run: Run, number: int) -> bytes:
    """A number of an update of silos a and b, as each would keep it."""
    found = [
        value
        for owner in ("a", "b")
        for value, entry in run.drawn.entries.items()
        if entry.update_of == {number} and {owner} == entry.owners and "weight" in entry.kinds
    ]
    return b" ".join(found)


def _of_kind(run: Run, kind: str) -> bytes:
    return next(value for value, entry in run.drawn.entries.items() if kind in entry.kinds)


def _share(run: Run, which: str) -> bytes:
    """A share that silo a holds of its own secrets, in round 1, which it survives."""
    wanted = {"round": 1, "owner": "a", "holder": "a", "share": which, "kind": "share"}
    entries = run.drawn.entries.items()
    return next(v for v, e in entries if e.share and wanted.items() <= e.share.items())


@pytest.mark.process
def test_weakened_processes_are_caught(tmp_path: Path) -> None:
    leaky = Targets("tests.scan.leaks:coordinator", "tests.scan.leaks:silo")
    run = Run(tmp_path, Protection.MASKED, leaky, rounds=1)
    run.play()
    places = {finding.place: finding.secret for finding in run.search().findings}
    assert "share" in places["disk/end/state/journal.sqlite-wal"]
    assert "derived/pair" in places["logs/a"]
    told = {place for place in places if place.startswith("wire/request.Send.consistency")}
    assert len(told) == 4
