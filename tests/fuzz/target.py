"""What any decoder promises of any bytes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from google.protobuf.message import Message

from secagg.errors import SecaggError

Decoder = Callable[..., Any]


@dataclass(frozen=True, slots=True)
class Target:
    """One decoder.

    Args:
        decode: bytes to a value.
        encode: a value to its bytes; None where the product writes none.
        refusals: the errors that it documents.
        covers: the product's functions that decode here.
        message: what the bytes are, where they are protobuf's.
    """

    decode: Callable[[bytes], Any]
    encode: Callable[[Any], bytes] | None
    refusals: tuple[type[Exception], ...]
    covers: tuple[Decoder, ...]
    message: type[Message] | None = None

    def accepts(self, data: bytes) -> bool:
        """Whether the decoder takes these bytes.

        Raises:
            AssertionError: it takes them, and what it makes of them has two spellings.
            Exception: what no decoder may raise.
        """
        try:
            value = self.decode(data)
        except self.refusals as error:
            _check_told(error)
            return False
        if self.encode is not None:
            written = self.encode(value)
            again = self.decode(written)
            assert again == value, (value, again)
            assert self.encode(again) == written
        return True


def _check_told(error: Exception) -> None:
    """Our own errors have a code and say what was observed."""
    assert not isinstance(error, SecaggError) or (error.code and error.observed)
