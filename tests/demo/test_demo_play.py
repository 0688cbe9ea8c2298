"""The whole demo as a person runs it, and the table that they look at meanwhile."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from client_sdk.profile import load_profile
from secagg.config import Protection
from secagg.demo.play import phase_table
from secagg.demo.stage import enrol, point_to, session_config
from secagg.errors import PolicyRefused
from secagg.wire._pb import service_pb2 as api

SILOS = ["silo-1", "silo-2", "silo-3", "silo-4"]


PLAYS = {
    "masked": [],
    "ckks+masked": ["--protection", "ckks+masked", "--kill-coordinator"],
}
"""Both kill two silos; the second kills the coordinator as well, which has to keep the key's name
over it. What they measure is the same."""
ERRORS = {"masked": 1e-6, "ckks+masked": 1e-5}


@pytest.fixture(scope="module", params=PLAYS)
def measured(request: pytest.FixtureRequest) -> dict[str, Any]:
    command = [sys.executable, "-c", "from secagg.cli import main; main()", "demo", "--json"]
    command += PLAYS[request.param]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)  # one object and nothing else
    killed = "--kill-coordinator" in command
    assert [r["round"] for r in found["coordinator_restarts"]] == ([3] if killed else [])
    assert found["protection"] == request.param
    return found


def test_what_the_demo_measures(measured: dict[str, Any]) -> None:
    assert measured["silos"] == SILOS
    assert measured["max_abs_error"] <= ERRORS[measured["protection"]]
    accuracy = measured["accuracy"]
    assert accuracy["federated"] > accuracy["local_mean"]
    assert accuracy["pooled"] - accuracy["federated"] <= 0.05
    view = measured["coordinator_view"]
    assert view["words"] > 200
    assert abs(view["correlation"]) <= 4.5 / view["words"] ** 0.5


def test_rounds_complete_and_dropouts_are_recovered(measured: dict[str, Any]) -> None:
    rounds = measured["rounds"]
    assert [r["round"] for r in rounds] == [0, 1, 2, 3, 4, 5]
    for r in rounds:
        assert sorted(r["survivors"] + r["dropouts"]) == SILOS
        assert len(r["survivors"]) >= 3
        assert r["bytes_up_per_silo"] > 0
        assert r["seconds"] > 0
    assert "silo-2" in rounds[2]["dropouts"]  # killed after it shared its keys
    assert "silo-3" in rounds[4]["dropouts"]  # killed before
    assert "silo-2" in rounds[3]["survivors"]  # and back
    assert "silo-3" in rounds[5]["survivors"]
    assert set(rounds[1]["metrics"]) == {"train-loss", "train-accuracy"}


@pytest.mark.parametrize("protection", Protection)
def test_every_protection_has_its_session_and_its_silos_allow_it_alone(
    tmp_path: Path, protection: Protection
) -> None:
    enrol(tmp_path, SILOS, protection)
    point_to(tmp_path, SILOS, 1)
    sessions = {how: session_config(SILOS, how) for how in Protection}
    policy = load_profile(tmp_path / SILOS[0]).policy
    assert policy is not None
    for how, session in sessions.items():
        assert session.protection is how
        if how is protection:
            policy.check_session(session)
        else:
            with pytest.raises(PolicyRefused):
                policy.check_session(session)


def test_phase_table() -> None:
    shown = api.ShowSessionReply(
        round=3,
        phase="masked_input",
        silos=[
            api.SiloState(name="silo-1", state="masked_input sent"),
            api.SiloState(name="silo-2", state="masked_input"),
            api.SiloState(name="silo-3", state="dropped"),
            api.SiloState(name="silo-4", state="training"),
        ],
    )
    console = Console(width=140, record=True, file=io.StringIO())
    console.print(phase_table(shown, {"silo-3": 2}))
    lines = {
        line.split()[1]: line for line in console.export_text().splitlines() if "silo-" in line
    }
    assert lines["silo-1"].count("✓") == 3
    assert lines["silo-2"].count("✓") == 2
    assert lines["silo-3"].count("✓") == 0
    assert "dropped (killed in round 2)" in lines["silo-3"]
    assert "training" in lines["silo-4"]
