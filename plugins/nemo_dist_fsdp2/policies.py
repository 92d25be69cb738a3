"""Check the offload policy of FSDP2 in a config, torch's object or plain fields, without importing torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from nemo_dist.errors import UnknownNameError
from nemo_dist.planning.validation import FrozenMapping, near, shown
from nemo_dist.plugin.mixed_precision import is_torch_policy, without_target

if TYPE_CHECKING:
    from torch.distributed.fsdp import OffloadPolicy


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
            raise UnknownNameError(f"offload_policy has no field {shown(field)}{near(str(field), ['pin_memory'])}")
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
