"""The corpus through every decoder, without Atheris; and no decoder that has no target."""

from __future__ import annotations

import ast
import re
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pytest

import client_sdk
import secagg

from .decoders import BYTES, CORPUS, FILES, read
from .samples import samples
from .targets import TARGETS

MEMORY = 4 * 2**20
"""Bytes that decoding an input of at most ``BYTES`` may take."""
DECODER = re.compile(
    r"([a-z]\w+_)?from_wire|from_json|from_file|FromString|unpack(_\w+)?|parse(_\w+)?"
    r"|load_(authority|certificate|key|settings)|peer_identity|open_(once|long|blob)|manifest_of"
    r"|stored_of|released"
)
WITHOUT = {
    "secagg.config.ThresholdRule.parse": "part of a session: target session-file",
    "secagg.config.parse_table": "of a table that JSON or TOML gave: targets session, policy",
    "secagg.ring.vectors.Ring.unpack": "target vector",
    "secagg.cli.measured.Measured.from_json": "reads what secagg bench itself wrote",
    "secagg.demo.data.parse_site": "reads what the demo itself wrote",
    "secagg.coordinator.records.released": "writes a record",
    "secagg.coordinator.standing.Standing.released": "counts results",
    "client_sdk.keys.Keys.open_blob": "finds the key for secagg.ckks.keyring.open_blob",
    "client_sdk.tensors.from_file": "a safetensors file, which torch's loader reads",
}
"""Functions that look like decoders, and why they have no target of their own."""


def decoders() -> Iterator[str]:
    """Every function of the product that looks like a decoder, by its full name."""
    for package in (secagg, client_sdk):
        root = Path(package.__path__[0])
        for path in root.rglob("*.py"):
            if "_pb" not in path.parts:
                module = ".".join(path.relative_to(root.parent).with_suffix("").parts)
                yield from _functions(ast.parse(path.read_text()), module)


def _functions(node: ast.AST, place: str) -> Iterator[str]:
    for inner in ast.iter_child_nodes(node):
        if isinstance(inner, ast.ClassDef):
            yield from _functions(inner, f"{place}.{inner.name}")
        elif isinstance(inner, ast.FunctionDef) and DECODER.fullmatch(inner.name):
            yield f"{place}.{inner.name}"


def test_every_decoder_has_a_target() -> None:
    covered = {f"{f.__module__}.{f.__qualname__}" for t in TARGETS.values() for f in t.covers}
    found = set(decoders())
    assert len(found) > 30
    assert found - covered - WITHOUT.keys() == set()
    assert WITHOUT.keys() <= found, "a reason for a function that there is not"


def test_fresh_valid_encodings_are_accepted() -> None:
    seen = set()
    for name, data in samples():
        assert TARGETS[name].accepts(data), name
        seen.add(name)
    assert seen == TARGETS.keys()


@pytest.mark.parametrize("name", TARGETS)
def test_the_corpus_gives_values_and_documented_refusals(name: str) -> None:
    target, verdicts = TARGETS[name], set()
    found = read(CORPUS / name)
    assert 2 <= len(found) <= FILES
    for data in found:
        assert len(data) <= BYTES
        verdicts.add(target.accepts(data))
    assert verdicts == {True, False}


@pytest.mark.parametrize("name", TARGETS)
def test_decoding_takes_no_memory_beyond_its_input_s_order(name: str) -> None:
    target, found = TARGETS[name], read(CORPUS / name)
    target.accepts(found[0])  # what is made once, at the first use
    tracemalloc.start()
    try:
        for data in found:
            tracemalloc.reset_peak()
            target.accepts(data)
            assert tracemalloc.get_traced_memory()[1] < MEMORY, data
    finally:
        tracemalloc.stop()


def test_the_corpus_is_small_and_of_targets_alone() -> None:
    files = [path for path in CORPUS.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 2**20
    assert {path.name for path in CORPUS.iterdir()} == TARGETS.keys()
