"""Strict JSON for the files that travel between an admin and a member.

Every file names its format and version. An unknown, missing or mistyped key is an error, and byte
strings are hex. What is signed is never this JSON but the protocol's own encoding of its values.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, TypeVar

from pydantic import ConfigDict, ValidationError

from secagg.config import adapter
from secagg.errors import CredentialError
from secagg.pki.files import MAX_FILE_BYTES

STRICT: Final = ConfigDict(extra="forbid", strict=True, val_json_bytes="hex", ser_json_bytes="hex")
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class _Header:
    format: str


def decode(kind: type[_T], data: bytes, *, code: str, what: str) -> _T:
    """Read a file.

    Args:
        kind: dataclass that gives the file's keys and types, with ``STRICT`` as its configuration.
        data: the file's bytes.
        code: slug of the error.
        what: the file in words, for the error.

    Raises:
        CredentialError: under ``code``.
    """
    if len(data) > MAX_FILE_BYTES:  # CHECK: document-size
        raise CredentialError(code, f"This is larger than any {what}.")
    try:
        return adapter(kind).validate_json(data)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        place = ".".join(str(part) for part in first["loc"]) or "the file"
        raise CredentialError(
            code, f"This is no {what}: {place}: {first['msg']}.", "Ask its sender for it again."
        ) from None


def format_of(data: bytes) -> str:
    """What a file says it is; empty if it says nothing. Its reader checks the rest."""
    try:
        return adapter(_Header).validate_json(data).format
    except ValidationError:
        return ""


def encode(value: Any) -> bytes:
    """Write a file: indented, with a final newline."""
    return adapter(type(value)).dump_json(value, indent=2) + b"\n"
