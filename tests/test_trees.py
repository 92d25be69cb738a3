"""State comes back from JSON as it was; files written tensor by tensor are safetensors files."""

import json
import zlib
from collections import Counter, OrderedDict, deque

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

from nemo_dist.checkpoint.json_state import from_json, to_json
from nemo_dist.checkpoint.safetensors_writer import DTYPES, SafetensorsFile

PLAIN = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary()
KEYS = st.text() | st.integers() | st.booleans() | st.tuples(st.integers(), st.text())
TREES = st.recursive(
    PLAIN,
    lambda inner: (
        st.lists(inner)
        | st.lists(inner).map(tuple)
        | st.lists(inner).map(deque)
        | st.dictionaries(KEYS, inner)
        | st.dictionaries(KEYS, inner).map(OrderedDict)
        | st.dictionaries(KEYS, st.integers()).map(Counter)
        | st.sets(st.integers() | st.text())
    ),
    max_leaves=20,
)


def through_json(value):
    return from_json(json.loads(json.dumps(to_json(value))))


def assert_same(found, value):
    assert type(found) is type(value)
    assert found == value
    if isinstance(value, dict):
        for (found_key, found_item), (key, item) in zip(found.items(), value.items(), strict=True):
            assert_same(found_key, key)
            assert_same(found_item, item)
    elif isinstance(value, list | tuple | deque):
        for found_item, item in zip(found, value, strict=True):
            assert_same(found_item, item)


@given(TREES)
def test_a_tree_comes_back_with_its_types(value):
    assert_same(through_json(value), value)


def test_equal_sets_are_the_same_text():
    one, other = {0, 8}, {8, 0}  # which collide, so that each has the order in which it was filled
    assert list(one) != list(other)
    for nested in ((one, other), ({"seen": {(3, 0), (3, 8)}}, {"seen": {(3, 8), (3, 0)}})):
        assert len({json.dumps(to_json(value)) for value in nested}) == 1


def test_a_dict_that_looks_like_an_encoded_tensor_comes_back():
    value = {"nemo_dist": "tensor", "value": "AAAA"}
    assert through_json(value) == value


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (3,), (2, 0), (2, 3)])
def test_a_tensor_comes_back_bit_for_bit(dtype, shape):
    tensor = torch.arange(torch.Size(shape).numel()).reshape(shape).to(dtype)
    found = through_json({"t": tensor})["t"]
    assert (found.dtype, found.shape) == (dtype, tensor.shape)
    assert found.reshape(-1).view(torch.uint8).equal(tensor.reshape(-1).view(torch.uint8))


def test_numpy_values_come_back():
    value = {"array": np.arange(6.0).reshape(2, 3), "one": np.float32(0.1), "rng": np.random.get_state()}
    found = through_json(value)
    np.testing.assert_array_equal(found["array"], value["array"])
    assert type(found["one"]) is np.float32 and found["one"] == value["one"]
    np.testing.assert_array_equal(found["rng"][1], value["rng"][1])


class Count(int):
    """A subclass, which would come back as something else."""


@pytest.mark.parametrize("value", [object(), len, Count(1), {"a": [lambda: 0]}, np.array([object()]), torch.float32])
def test_values_that_json_cannot_restore_are_refused(value):
    with pytest.raises(TypeError, match=r"extra.* is a .*cannot be saved without pickle"):
        to_json(value)


def test_a_written_file_is_valid_safetensors_with_the_right_checksum(tmp_path):
    tensors = {
        str(dtype): (torch.arange(5) % 2).to(dtype) if dtype != torch.bool else torch.tensor([True, False, True])
        for dtype in DTYPES
    } | {"scalar": torch.tensor(2.5), "empty": torch.empty(0, 3), "turned": torch.arange(6.0).view(2, 3).T}
    path = tmp_path / "x.safetensors"
    with SafetensorsFile(path, {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()}) as file:
        for name in file.slots:
            file.write(name, tensors[name])
    content = path.read_bytes()
    assert (file.nbytes, file.checksum) == (len(content), zlib.crc32(content))
    with safe_open(path, framework="pt") as stored:
        assert set(stored.keys()) == set(tensors)
        for name, tensor in tensors.items():
            found = stored.get_tensor(name)
            assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape)
            assert (
                found.contiguous()
                .reshape(-1)
                .view(torch.uint8)
                .equal(tensor.contiguous().reshape(-1).view(torch.uint8))
            )
    assert all(slot.start % slot.dtype.itemsize == 0 for slot in file.slots.values())


def test_leaving_out_an_announced_tensor_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"\['b'\] were announced, but not written"):  # noqa: SIM117
        with SafetensorsFile(tmp_path / "x", {"a": ((1,), torch.float32), "b": ((1,), torch.float32)}) as file:
            file.write("a", torch.ones(1))


def test_writing_another_shape_than_announced_is_an_error(tmp_path):
    with SafetensorsFile(tmp_path / "x", {"a": ((1,), torch.float32)}) as file:
        with pytest.raises(ValueError, match=r"was announced as torch\.float32"):
            file.write("a", torch.ones(2))
        file.write("a", torch.ones(1))
