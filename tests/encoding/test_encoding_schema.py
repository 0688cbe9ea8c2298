"""Names and shapes: order, limits, an injective encoding, errors that name the tensor."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from secagg.encoding import schema as module
from secagg.encoding.schema import MAX_ELEMENTS, MAX_TENSORS, Schema, TensorSpec
from secagg.errors import InputError, MalformedMessage

names = st.text(st.characters(codec="utf-8"), min_size=1, max_size=6)
shapes = st.lists(st.integers(0, 5), max_size=4).map(tuple)


@st.composite
def schemas(draw: st.DrawFn) -> Schema:
    table = draw(st.dictionaries(names, shapes, min_size=1, max_size=4))
    name = draw(names)
    table[name] = tuple(axis + 1 for axis in table.get(name, ()))
    return Schema(tuple(TensorSpec(name, table[name]) for name in sorted(table)))


def items(data: bytes) -> list[bytes]:
    """Read u32be(n) ‖ n × (u64be(length) ‖ bytes), to the end."""
    count, at, out = int.from_bytes(data[:4], "big"), 4, []
    for _ in range(count):
        assert at + 8 <= len(data)
        size = int.from_bytes(data[at : at + 8], "big")
        out.append(data[at + 8 : at + 8 + size])
        at += 8 + size
    assert at == len(data)
    return out


@given(schema=schemas())
def test_what_is_hashed_says_every_name_and_shape(schema: Schema) -> None:
    """A decoder of it exists, so the encoding is injective."""
    back = []
    for tensor in items(schema.encode()):
        name, *axes = items(tensor)
        assert all(len(axis) == 8 for axis in axes)
        back.append((name.decode(), tuple(int.from_bytes(axis, "big") for axis in axes)))
    assert back == [(tensor.name, tensor.shape) for tensor in schema.tensors]


@given(one=schemas(), other=schemas())
def test_injective(one: Schema, other: Schema) -> None:
    assert (one.encode() == other.encode()) == (one == other)


def test_shapes_of_one_size_are_told_apart() -> None:
    shapes_of_six = [(6,), (2, 3), (3, 2), (1, 6), (6, 1), (1, 2, 3)]
    encoded = {Schema((TensorSpec("a", shape),)).encode() for shape in shapes_of_six}
    assert len(encoded) == len(shapes_of_six)


def test_sizes() -> None:
    schema = Schema.of({"b": np.zeros((2, 3)), "a": np.zeros(()), "c": np.zeros((4, 0, 2))})
    assert [(t.name, t.shape, t.size) for t in schema.tensors] == [
        ("a", (), 1),
        ("b", (2, 3), 6),
        ("c", (4, 0, 2), 0),
    ]
    assert schema.size == 7


@given(table=st.dictionaries(names, st.just(np.zeros(1)), min_size=1))
def test_the_order_of_the_caller_does_not_matter(table: dict[str, np.ndarray]) -> None:
    backwards = dict(reversed(table.items()))
    assert Schema.of(table) == Schema.of(backwards)
    encoded = [tensor.name.encode() for tensor in Schema.of(table).tensors]
    assert encoded == sorted(encoded)


@pytest.mark.parametrize("name", ["", "x" * 1025, "é" * 513])
def test_a_name_has_1_to_1024_bytes(name: str) -> None:
    with pytest.raises(MalformedMessage) as error:
        TensorSpec(name, ())
    assert error.value.code == "schema-tensor"
    assert TensorSpec("é" * 512, ()).size == TensorSpec("x", ()).size == 1


@pytest.mark.parametrize("shape", [(1,) * 17, (-1,), (3, -2), (2**40,), (0, 2**40)])
def test_a_shape_has_limits(shape: tuple[int, ...]) -> None:
    with pytest.raises(MalformedMessage) as error:
        TensorSpec("a", shape)
    assert error.value.code == "schema-tensor"
    assert TensorSpec("a", (1,) * 16).size == 1
    assert TensorSpec("a", (2**40 - 1, 0)).size == 0


@pytest.mark.parametrize(
    "order", [[], ["b", "a"], ["a", "a"], ["a", "c", "b"]], ids=["none", "falls", "twice", "late"]
)
def test_tensors_are_sorted_and_distinct(order: list[str]) -> None:
    with pytest.raises(MalformedMessage) as error:
        Schema(tuple(TensorSpec(name, (1,)) for name in order))
    assert error.value.code == "schema-order"


def test_the_number_of_tensors_has_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    assert MAX_TENSORS == 2**16
    monkeypatch.setattr(module, "MAX_TENSORS", 3)
    tensors = tuple(TensorSpec(name, (1,)) for name in "abcd")
    assert Schema(tensors[:3]).size == 3
    with pytest.raises(MalformedMessage) as error:
        Schema(tensors)
    assert error.value.code == "schema-order"


@pytest.mark.parametrize(
    "shapes_",
    [[(0,)], [(0,), (4, 0)], [(MAX_ELEMENTS + 1,)], [(2**20, 2**16), (1,)], [(2**39, 2**39)]],
)
def test_the_number_of_elements_has_limits(shapes_: list[tuple[int, ...]]) -> None:
    specs = tuple(TensorSpec(name, shape) for name, shape in zip("ab", shapes_, strict=False))
    with pytest.raises(MalformedMessage) as error:
        Schema(specs)
    assert error.value.code == "schema-size"
    assert Schema((TensorSpec("a", (2**20, 2**16)),)).size == MAX_ELEMENTS


EXPECTED = Schema.of({"bias": np.zeros(()), "weight": np.zeros((2, 3))})


def good() -> dict[str, np.ndarray]:
    return {"bias": np.zeros((), np.float16), "weight": np.zeros((2, 3), np.float32)}


def test_arrays_of_the_schema_pass() -> None:
    EXPECTED.check(good())
    EXPECTED.check({name: array.astype(np.float64) for name, array in good().items()})


@pytest.mark.parametrize(
    ("code", "name", "changes"),
    [
        ("tensor-names", "bias", {"bias": None}),
        ("tensor-names", "extra", {"extra": np.zeros(1)}),
        ("tensor-dtype", "weight", {"weight": np.zeros((2, 3), np.int32)}),
        ("tensor-dtype", "weight", {"weight": np.zeros((2, 3), np.complex128)}),
        ("tensor-dtype", "weight", {"weight": np.zeros((2, 3), bool)}),
        ("tensor-dtype", "weight", {"weight": np.zeros((2, 3), object)}),
        ("tensor-dtype", "weight", {"weight": [[0.0] * 3] * 2}),
        ("tensor-dtype", "bias", {"bias": 0.5}),
        ("tensor-dtype", "bias", {"bias": np.float32(0.5)}),
        ("tensor-shape", "weight", {"weight": np.zeros((3, 2))}),
        ("tensor-shape", "weight", {"weight": np.zeros(6)}),
        ("tensor-shape", "bias", {"bias": np.zeros(1)}),
    ],
)
def test_errors_name_the_tensor(code: str, name: str, changes: dict[str, object]) -> None:
    arrays = {key: value for key, value in (good() | changes).items() if value is not None}
    with pytest.raises(InputError) as error:
        EXPECTED.check(arrays)
    assert error.value.code == code
    assert repr(name) in str(error.value)


def test_the_words_of_names_and_dtypes_errors() -> None:
    with pytest.raises(InputError, match="'bias' is missing"):
        EXPECTED.check({"weight": np.zeros((2, 3))})
    with pytest.raises(InputError, match="'z' is not part of this task"):
        EXPECTED.check({**good(), "z": np.zeros(1)})
    with pytest.raises(InputError, match="'weight' is list; a float array is needed"):
        EXPECTED.check({**good(), "weight": [1.0]})
    with pytest.raises(InputError, match="'weight' is int64; a float array"):
        EXPECTED.check({**good(), "weight": np.zeros((2, 3), np.int64)})
