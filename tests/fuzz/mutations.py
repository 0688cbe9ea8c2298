"""Messages that are nearly right: one edit of a protobuf message's fields, or of its bytes.

Fields are found by reflection, so a new message or field is mutated from the day it is there. Odd
values come from two places: from a list for each type, and from a ``Pool`` of what other messages
hold, so that a name, an id or a signature is one that means something, in a place where it does
not.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import suppress
from random import Random
from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import DecodeError, Message

UINT32 = (0, 1, 2, 7, 255, 2**16, 2**31 - 1, 2**31, 2**32 - 2, 2**32 - 1)
UINT64 = (*UINT32, 2**32, 2**40, 2**53, 2**63 - 1, 2**63, 2**64 - 1)
ODD: dict[int, tuple[Any, ...]] = {
    FieldDescriptor.TYPE_STRING: (
        *("", "a", "A", "é", "a/b", "..", "\0", "a" * 63, "a" * 64, "x" * 65_536),
        *("masked", "ckks", "chacha20", "1/2", "9999/9999", "training", "statistics"),
    ),
    FieldDescriptor.TYPE_BYTES: tuple(
        fill * size for size in (0, 1, 31, 32, 33, 64, 65_536) for fill in (b"\0", b"\xff")
    ),
    FieldDescriptor.TYPE_DOUBLE: (
        *(0.0, -0.0, 1.0, -1.0, 0.5, 5e-324, 1e-99, 1e99, 1e308),
        *(math.inf, -math.inf, math.nan),
    ),
    FieldDescriptor.TYPE_UINT32: UINT32,
    FieldDescriptor.TYPE_UINT64: UINT64,
    FieldDescriptor.TYPE_ENUM: (0, 1, 2, 3, 4, 5, 6, 7, 99, 2**31 - 1, -1, -(2**31)),
    FieldDescriptor.TYPE_BOOL: (False, True),
}
REPEATS = 1000
Place = tuple[Message, FieldDescriptor]


class Pool:
    """Values that messages hold, by type."""

    def __init__(self) -> None:
        self._values: dict[int, list[Any]] = defaultdict(list)

    def add(self, message: Message) -> None:
        """Take up all values of a message."""
        for owner, field in places(message):
            held = getattr(owner, field.name)
            for value in held if field.is_repeated else [held]:
                if value not in self._values[field.type]:
                    self._values[field.type].append(value)

    def add_bytes(self, kind: type[Message], data: bytes) -> None:
        """Take up all values of an encoded message, if it is one."""
        with suppress(DecodeError):
            self.add(kind.FromString(data))

    def value(self, field: FieldDescriptor, random: Random) -> Any:
        """A value for a field: one of another message's, or an odd one."""
        known = self._values[field.type]
        return random.choice(known if known and random.random() < 0.6 else ODD[field.type])


def places(message: Message, *, unset: bool = False) -> Iterator[Place]:
    """All fields of simple types in a message and what it holds; by default, those that are set."""
    for field in message.DESCRIPTOR.fields:
        if field.type == FieldDescriptor.TYPE_MESSAGE:
            for inner in _inner(message, field):
                yield from places(inner, unset=unset)
        elif unset or getattr(message, field.name):
            yield message, field


def _inner(message: Message, field: FieldDescriptor) -> list[Message]:
    held = getattr(message, field.name)
    if field.is_repeated:
        return list(held)
    return [held] if message.HasField(field.name) else []


def _owners(message: Message) -> Iterator[Message]:
    yield message
    for field in message.DESCRIPTOR.fields:
        if field.type == FieldDescriptor.TYPE_MESSAGE:
            for inner in _inner(message, field):
                yield from _owners(inner)


def filled(message: Message, pool: Pool, random: Random, depth: int = 0) -> Message:
    """Fill a message with values of the pool, as its types allow."""
    for field in message.DESCRIPTOR.fields:
        if random.random() < 0.15:
            continue
        if field.type != FieldDescriptor.TYPE_MESSAGE:
            value = pool.value(field, random)
            _put(message, field, [value] if field.is_repeated else value)
        elif depth < 4:
            held = getattr(message, field.name)
            inner = held.add() if field.is_repeated else held
            inner.SetInParent()
            filled(inner, pool, random, depth + 1)
    return message


def _put(owner: Message, field: FieldDescriptor, value: Any) -> None:
    if field.is_repeated:
        owner.ClearField(field.name)
        getattr(owner, field.name).extend(value)
    else:
        setattr(owner, field.name, value)


# Edits of fields: each changes a message in place, or leaves it if there is nothing to change.


def _replace(message: Message, pool: Pool, random: Random) -> None:
    found = list(places(message, unset=True))
    if found:
        owner, field = random.choice(found)
        value = pool.value(field, random)
        _put(owner, field, [value] if field.is_repeated else value)


def _resize(message: Message, pool: Pool, random: Random) -> None:
    owner, field = _chosen(message, random, FieldDescriptor.TYPE_BYTES, FieldDescriptor.TYPE_STRING)
    if owner is not None:
        value = getattr(owner, field.name)
        grown = value + value[:1]
        _put(owner, field, random.choice((value[:-1], value[1:], grown, value * 2, value[:0])))


def _flip(message: Message, pool: Pool, random: Random) -> None:
    owner, field = _chosen(message, random, FieldDescriptor.TYPE_BYTES)
    if owner is not None:
        value = bytearray(getattr(owner, field.name))
        value[random.randrange(len(value))] ^= 1 << random.randrange(8)
        _put(owner, field, bytes(value))


def _count(message: Message, pool: Pool, random: Random) -> None:
    kinds = FieldDescriptor.TYPE_UINT32, FieldDescriptor.TYPE_UINT64
    owner, field = _chosen(message, random, *kinds)
    if owner is not None:
        bits = 32 if field.type == FieldDescriptor.TYPE_UINT32 else 64
        value = getattr(owner, field.name) + random.choice((-1, 1, 64, 2 ** (bits - 1)))
        _put(owner, field, value % 2**bits)


def _chosen(message: Message, random: Random, *kinds: int) -> tuple[Any, Any]:
    found = [(o, f) for o, f in places(message) if f.type in kinds and not f.is_repeated]
    return random.choice(found) if found else (None, None)


def _swap(message: Message, pool: Pool, random: Random) -> None:
    found = [(o, f) for o, f in places(message, unset=True) if not f.is_repeated]
    if not found:
        return
    owner, field = random.choice(found)
    alike = [(o, f) for o, f in found if f.type == field.type and f.containing_oneof is None]
    if alike and field.containing_oneof is None:
        other, its = random.choice(alike)
        held, others = getattr(owner, field.name), getattr(other, its.name)
        _put(owner, field, others)
        _put(other, its, held)


def _clear(message: Message, pool: Pool, random: Random) -> None:
    owner = random.choice(list(_owners(message)))
    if owner.DESCRIPTOR.fields:
        owner.ClearField(random.choice(owner.DESCRIPTOR.fields).name)


def _repeat(message: Message, pool: Pool, random: Random) -> None:
    repeated = [
        getattr(owner, field.name)
        for owner in _owners(message)
        for field in owner.DESCRIPTOR.fields
        if field.is_repeated and getattr(owner, field.name)
    ]
    if repeated:
        held = random.choice(repeated)
        how = random.choice((_again, _thousandfold, _reversed))
        how(held)


def _again(held: Any) -> None:
    held.extend(held[-1:])


def _thousandfold(held: Any) -> None:
    held.extend([held[0]] * (REPEATS - len(held)))


def _reversed(held: Any) -> None:
    items = list(held)[::-1]
    copies = [type(i).FromString(i.SerializeToString()) for i in items if isinstance(i, Message)]
    del held[:]
    held.extend(copies or items)


def _present(message: Message, pool: Pool, random: Random) -> None:
    """Another member of a oneof, or a message where there was none."""
    owner = random.choice(list(_owners(message)))
    inner = [f for f in owner.DESCRIPTOR.fields if f.type == FieldDescriptor.TYPE_MESSAGE]
    if inner:
        field = random.choice(inner)
        held = getattr(owner, field.name)
        chosen = held.add() if field.is_repeated else held
        chosen.SetInParent()
        if random.random() < 0.7:
            filled(chosen, pool, random, depth=2)


EDITS: tuple[Callable[[Message, Pool, Random], None], ...] = (
    *(_replace, _replace, _replace),
    *(_resize, _flip, _count, _swap, _clear, _repeat, _present),
)


def edit(message: Message, pool: Pool, random: Random) -> None:
    """Change one to three things in a message."""
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        random.choice(EDITS)(message, pool, random)


def damage(data: bytes, random: Random) -> bytes:
    """Change bytes without a look at what they mean."""
    at = random.randrange(len(data) + 1)
    match random.randrange(7):
        case 0:
            return data[:at]
        case 1:
            return data + unknown_field(random)
        case 2:
            return data[:at] + random.randbytes(random.randrange(1, 40)) + data[at:]
        case 3:
            return data[:at] + data[at + random.randrange(1, 40) :]
        case 4:
            return random.randbytes(random.choice((1, 10, 100, 1000)))
        case 5:
            return b"" if random.random() < 0.2 else data + data[at:]
        case _:
            flipped = bytearray(data or b"\0")
            for _ in range(random.choice((1, 1, 2, 8))):
                flipped[random.randrange(len(flipped))] ^= 1 << random.randrange(8)
            return bytes(flipped)


def unknown_field(random: Random) -> bytes:
    """A field that no message of ours has: number 1900, of any wire type."""
    number = 1900 << 3
    kind, value = random.choice(
        ((0, b"\x7f"), (1, bytes(8)), (2, b"\x03abc"), (5, bytes(4)), (3, b""), (7, b""))
    )
    tag = number | kind
    return bytes((tag & 0x7F | 0x80, tag >> 7)) + value


def mutated(kind: type[Message], data: bytes, pool: Pool, random: Random) -> bytes:
    """A message with one edit of its fields or bytes; of bytes alone, where they are no message."""
    if random.random() < 0.75:
        try:
            message = kind.FromString(data)
        except DecodeError:
            return damage(data, random)
        edit(message, pool, random)
        return message.SerializeToString()
    return damage(data, random)
