"""The policies of FSDP2: of offload, torch's object or plain fields in a config, and of dtypes, group by group.

Imports torch only where it makes one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from nemo_dist.errors import UnknownNameError
from nemo_dist.planning.validation import FrozenMapping, near, shown
from nemo_dist.plugin.mixed_precision import is_torch_policy, without_target

if TYPE_CHECKING:
    from torch.distributed.fsdp import MixedPrecisionPolicy, OffloadPolicy


def offload_fields(value: Any) -> Any:
    """Return *value* as a config holds it: None, torch's policy, or a frozen mapping of its fields."""
    if value is None or is_torch_policy(value, "CPUOffloadPolicy"):
        return value
    if is_torch_policy(value, "OffloadPolicy"):  # torch's base class offloads nothing
        return None
    fields = {} if isinstance(value, str) and value in ("cpu", "CPUOffloadPolicy") else value
    if not isinstance(fields, Mapping):
        raise TypeError(
            f"offload_policy must be 'cpu', a dict with pin_memory, or torch's CPUOffloadPolicy() (got {shown(value)})"
        )
    fields = without_target(fields, "CPUOffloadPolicy")
    for field, content in fields.items():
        if field != "pin_memory":
            raise UnknownNameError(f"offload_policy has no field {shown(field)}{near(field, ['pin_memory'])}")
        if not isinstance(content, bool):
            raise TypeError(f"offload_policy.pin_memory must be True or False (got {shown(content)})")
    return FrozenMapping(fields)


def offload(value: Any) -> OffloadPolicy:
    """Return torch's policy for the value in a config; memory is pinned by default where there is a CUDA device."""
    import torch
    from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy

    if value is None or isinstance(value, OffloadPolicy):
        return value or OffloadPolicy()
    return CPUOffloadPolicy(**{"pin_memory": torch.cuda.is_available(), **value})


def inside(policy: MixedPrecisionPolicy, given: Any) -> MixedPrecisionPolicy:
    """Return the policy of the groups inside of a model that has *policy*, made of *given* in a config.

    Modules then get from each other what they do on one process; torch would cast what every group gets, float32
    rotary embeddings and residuals too, and so it is where the user asked for that.
    """
    return policy if casts_all(given) else replace(policy, cast_forward_inputs=False, output_dtype=None)


def casts_all(given: Any) -> bool:
    """Whether *given*, ``mp_policy`` in a config, asks for torch's cast of all that a module gets."""
    return bool(given.get("cast_forward_inputs", False)) if isinstance(given, Mapping) else given is not None


def in_float32(policy: MixedPrecisionPolicy) -> MixedPrecisionPolicy:
    """Return the policy of a group that is computed in float32, whatever *policy* the others have."""
    import torch

    return replace(policy, param_dtype=torch.float32, cast_forward_inputs=False, output_dtype=None)
