"""Mixed-precision settings, as torch's policy or as dtype names, validated without importing torch."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from nemo_dist.errors import UnknownNameError
from nemo_dist.planning.validation import FrozenMapping, near, shown

if TYPE_CHECKING:
    from torch.distributed.fsdp import MixedPrecisionPolicy

_DTYPES = ("param_dtype", "reduce_dtype", "output_dtype")
_FIELDS = (*_DTYPES, "cast_forward_inputs")
_SHORT = {"bf16": "bfloat16", "fp32": "float32", "fp16": "float16"}
_NAMES = ("float32", "bfloat16", "float16", "float64")


def is_torch_policy(value: Any, name: str) -> bool:
    """Whether *value* is an instance of the class *name* in ``torch.distributed.fsdp``; does not import torch."""
    module = sys.modules.get("torch.distributed.fsdp")
    return module is not None and isinstance(value, getattr(module, name))


def mixed_precision_fields(value: Any) -> Any:
    """Return *value* in the form that configs store: None, torch's policy, or a frozen mapping of its fields.

    Raises TypeError for another type, UnknownNameError (a ValueError) for an unknown field or dtype name.
    """
    if value is None or is_torch_policy(value, "MixedPrecisionPolicy"):
        return value
    if not isinstance(value, Mapping):
        raise TypeError(f"mp_policy must be a MixedPrecisionPolicy or a dict of its fields (got {shown(value)})")
    value = without_target(value, "MixedPrecisionPolicy")
    for field, content in value.items():
        if field not in _FIELDS:
            raise UnknownNameError(
                f"mp_policy has no field {shown(field)}{near(field, _FIELDS)}; valid: {', '.join(_FIELDS)}"
            )
        if field in _DTYPES and content is not None and dtype_name(content) not in _NAMES:
            name = content if isinstance(content, str) else shown(content)
            hint = near(name, _NAMES)
            raise UnknownNameError(
                f"mp_policy.{field} must be a dtype name (got {shown(name)}){hint}; valid: {', '.join(_NAMES)}"
            )
        if field == "cast_forward_inputs" and not isinstance(content, bool):
            raise TypeError(f"mp_policy.cast_forward_inputs must be True or False (got {shown(content)})")
    return FrozenMapping(
        {field: dtype_name(content) if field in _DTYPES else content for field, content in value.items()}
    )


def dtype_name(value: Any) -> Any:
    """Return ``"bfloat16"`` for ``"bf16"``, ``"torch.bfloat16"`` and ``torch.bfloat16``; None for None."""
    name = (value if isinstance(value, str) else shown(value)).removeprefix("torch.")
    return None if value is None else _SHORT.get(name, name)


def storage_dtype(what: str, value: Any, known: Iterable[str] = _NAMES) -> str:
    """Return the name of the dtype *value*; raise UnknownNameError, which calls it *what*, for none of the *known*."""
    name = dtype_name(value)
    if name not in known:
        raise UnknownNameError(f"{what} must be one of {', '.join(known)} (got {shown(value)}){near(name, known)}")
    return str(name)


def without_target(value: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return *value* without a ``_target_`` key that names torch's class *name*; another ``_target_`` is kept."""
    fields = dict(value)
    target = fields.get("_target_")
    if target in (name, f"torch.distributed.fsdp.{name}"):
        del fields["_target_"]
    return fields


def mixed_precision(value: Any) -> MixedPrecisionPolicy:
    """Return torch's policy for the value in a config; None means bfloat16 compute with float32 reduction."""
    import torch
    from torch.distributed.fsdp import MixedPrecisionPolicy

    if isinstance(value, MixedPrecisionPolicy):
        return value
    if value is None:
        return MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    fields = {
        field: getattr(torch, content) if field in _DTYPES and content is not None else content
        for field, content in value.items()
    }
    return MixedPrecisionPolicy(**fields)
