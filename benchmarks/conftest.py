"""Shared by the benchmarks: one core, so that ratios to a floor mean something."""

from __future__ import annotations

import os

import pytest


@pytest.fixture(autouse=True, scope="session")
def _one_core() -> None:
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
