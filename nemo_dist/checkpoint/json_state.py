"""Convert nested state (of schedulers, data loaders, plugins, users) to JSON and back, without pickle."""

from __future__ import annotations

import base64
import json
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from nemo_dist.checkpoint.chunks import as_bytes
from nemo_dist.checkpoint.safetensors_writer import DTYPE_OF
from nemo_dist.plugin.mixed_precision import dtype_name

_KIND = "nemo_dist"  # the key that marks a JSON object as an encoded value of a type that JSON lacks
_DEPTH = 100  # levels of nesting; Python's own limit is near 1000 calls
_LARGEST = 1 << 4096
_APART = "rank/"  # before the names of tensors that are saved beside the JSON of a rank
_SEQUENCES: dict[str, Any] = {"tuple": tuple, "set": set, "deque": deque}
_MAPPINGS: dict[str, Any] = {"dict": dict, "Counter": Counter, "OrderedDict": OrderedDict}


def to_json(value: Any, where: str = "extra", depth: int = 0, apart: dict[str, Tensor] | None = None) -> Any:
    """Return *value* as JSON that ``from_json`` decodes; *where* names it in errors, *depth* is how deep it lies.

    Tensors are put into *apart* by name, for ``with_tensors``; without *apart* they are a part of the text.

    Takes None, bools, numbers, text, bytes, tensors, NumPy values, and dicts, lists, tuples, sets and deques of them.
    Raises TypeError for anything else, for integers beyond 4096 bits and for more than 100 levels, with the path to it.
    """
    if depth > _DEPTH:
        raise TypeError(f"{where[:60]}... is nested deeper than {_DEPTH} levels, or contains itself")
    if type(value) is int and abs(value) > _LARGEST:
        raise TypeError(f"{where} is an integer of {value.bit_length()} bits, which is too large for JSON")
    if value is None or type(value) in (bool, int, float, str):
        return value
    if type(value) is list:
        return [to_json(item, f"{where}[{index}]", depth + 1, apart) for index, item in enumerate(value)]
    if isinstance(value, Tensor) and not isinstance(value, DTensor):
        return _tensor(value, where, apart)
    if isinstance(value, bytes | bytearray):
        return {_KIND: "bytes", "value": _text(bytes(value))}
    kind = type(value).__name__
    if type(value) is _SEQUENCES.get(kind):
        items = to_json(list(value), where, depth, apart)
        if kind == "set":  # its order is another one in every process
            items.sort(key=lambda item: json.dumps(item, sort_keys=True))
        return {_KIND: kind, "value": items}
    if type(value) is _MAPPINGS.get(kind):
        return _mapping(value, kind, where, depth + 1, apart)
    if type(value).__module__ == "numpy":
        return _numpy(value, where)
    raise TypeError(
        f"{where} is a {kind}, which cannot be saved without pickle; save plain values, tensors, and containers of them"
    )


def _mapping(value: Mapping[Any, Any], kind: str, where: str, depth: int, apart: dict[str, Tensor] | None) -> Any:
    if kind == "dict" and all(type(key) is str and key != _KIND for key in value):
        return {key: to_json(item, f"{where}[{key!r}]", depth, apart) for key, item in value.items()}
    items = [
        [to_json(key, f"a key of {where}", depth), to_json(item, f"{where}[{key!r}]", depth, apart)]
        for key, item in value.items()
    ]
    return {_KIND: kind, "value": items}


def _tensor(value: Tensor, where: str, apart: dict[str, Tensor] | None) -> Any:
    name = dtype_name(value.dtype)
    if value.is_meta or value.layout is not torch.strided:
        raise TypeError(f"{where} is a {'meta' if value.is_meta else 'sparse'} tensor, which cannot be saved")
    if name not in DTYPE_OF:
        raise TypeError(f"{where} is a tensor of {value.dtype}, which cannot be saved")
    if apart is not None:
        apart[label := f"{_APART}{len(apart)}"] = value.detach()
        return {_KIND: _APART, "value": label}
    content = _text(as_bytes(value.detach().cpu()).numpy().tobytes())
    return {_KIND: "tensor", "dtype": name, "shape": list(value.shape), "value": content}


def _numpy(value: Any, where: str) -> Any:
    import numpy as np

    if not isinstance(value, np.generic | np.ndarray) or value.dtype.hasobject:
        raise TypeError(f"{where} is a NumPy {type(value).__name__}, which cannot be saved without pickle")
    kind = "ndarray" if isinstance(value, np.ndarray) else "scalar"
    return {_KIND: kind, "dtype": value.dtype.str, "shape": list(value.shape), "value": _text(value.tobytes())}


def from_json(value: Any) -> Any:
    """Decode what ``to_json`` returned; raise ValueError for an unknown kind of value. No code is run."""
    if isinstance(value, list):
        return [from_json(item) for item in value]
    if not isinstance(value, dict):
        return value
    kind = value.get(_KIND)
    if kind is None:
        return {key: from_json(item) for key, item in value.items()}
    content: Any = value.get("value")
    if kind in _SEQUENCES:
        return _SEQUENCES[kind](from_json(item) for item in content)
    if kind in _MAPPINGS:
        return _MAPPINGS[kind](dict(_pair(item) for item in content))  # a Counter made from pairs would count the pairs
    if not isinstance(content, str):
        raise ValueError(f"{kind!r} is no kind of saved value")
    return _raw(kind, base64.b64decode(content), value)


def with_tensors(text: bytes, read: Callable[[str], Tensor]) -> Any:
    """Return the JSON in *text* with the tensors that ``to_json`` put ``apart``, which *read* reads by their names."""
    return json.loads(text, object_hook=lambda found: read(found["value"]) if found.get(_KIND) == _APART else found)


def _pair(item: Any) -> Any:
    key, value = item
    return from_json(key), from_json(value)


def _raw(kind: Any, content: bytes, value: Mapping[str, Any]) -> Any:
    if kind == "bytes":
        return content
    if kind == "tensor":
        flat = torch.frombuffer(bytearray(content), dtype=torch.uint8) if content else torch.empty(0, dtype=torch.uint8)
        return flat.view(DTYPE_OF[value["dtype"]]).reshape(value["shape"])
    if kind in ("ndarray", "scalar"):
        import numpy as np

        array = np.frombuffer(bytearray(content), dtype=np.dtype(value["dtype"])).reshape(value["shape"])
        return array if kind == "ndarray" else array[()]
    raise ValueError(f"{kind!r} is no kind of saved value")


def _text(content: bytes) -> str:
    return base64.b64encode(content).decode()
