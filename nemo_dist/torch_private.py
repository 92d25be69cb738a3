"""The private names of torch that several modules need, gathered here so that a change in torch is fixed in one place.

``tests/test_imports.py`` holds the list. Plugins may import this module. A private name that only one module needs
stays in that module.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed._functional_collectives as _functional_collectives
from torch import Tensor
from torch.distributed import distributed_c10d
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta
from torch.distributed.tensor.placement_types import _StridedShard
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes, _get_current_dispatch_mode
from torch.utils._pytree import tree_flatten, tree_map_only

__all__ = [
    "FLASH_ATTENTION",
    "FLASH_ATTENTION_ON_CPU",
    "FUNCTIONAL_COLLECTIVES",
    "TIMEOUT",
    "BatchNorm",
    "StridedShard",
    "TorchDispatchMode",
    "accumulated_hooks",
    "all_gather_single",
    "assert_on_device",
    "changes_in_place",
    "collective_operators",
    "current_dispatch_mode",
    "disable_current_modes",
    "dtensor_of",
    "fake_tensors",
    "functional_collectives",
    "gradient_hooks",
    "group_named",
    "held_by",
    "hold_a_copy",
    "in_backward",
    "number_of_backward",
    "reduce_scatter_single",
    "run_after_backward",
    "run_gradient_hooks",
    "storage_id",
    "tensors_in",
    "tree_map_only",
    "without_gradient_hooks",
    "writes_to",
]

# The placement of a tensor dim that another mesh axis, or a packed projection, has sharded before; torch has no public
# name for it yet.
StridedShard = _StridedShard
BatchNorm = _BatchNorm  # the class of those of all dims, synchronised ones too
current_dispatch_mode = _get_current_dispatch_mode
disable_current_modes = _disable_current_modes

# The functional collectives, and the operators that they call: a dispatch mode sees the operators, and selective
# activation checkpointing can save their outputs.
functional_collectives: Any = _functional_collectives
collective_operators: Any = torch.ops._c10d_functional
# torch 2.12 renamed these two, and warns of the old names.
all_gather_single: Any = getattr(_functional_collectives, "all_gather_single", None) or (
    _functional_collectives.all_gather_tensor
)
reduce_scatter_single: Any = getattr(_functional_collectives, "reduce_scatter_single", None) or (
    _functional_collectives.reduce_scatter_tensor
)
FUNCTIONAL_COLLECTIVES = "_c10d_functional"  # the namespace of those operators
TIMEOUT = "_timeout"  # the attribute of the options of a backend of process groups
# Operators of aten: fused attention that also returns the log-sums of its weights, and its backward, which takes them.
FLASH_ATTENTION = ("_scaled_dot_product_flash_attention", "_scaled_dot_product_flash_attention_backward")
FLASH_ATTENTION_ON_CPU = (
    *("_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_flash_attention_for_cpu_backward"),
)


def tensors_in(tree: Any) -> list[Tensor]:
    """Return the tensors in nested containers, in pytree order."""
    return [leaf for leaf in tree_flatten(tree)[0] if isinstance(leaf, Tensor)]


def dtensor_of(part: Tensor, mesh: DeviceMesh, placements: Sequence[Any], like: Tensor) -> DTensor:
    """Return the DTensor of the shape of *like* with the local tensor *part* on any device; not differentiable."""
    make: Any = DTensor
    spec = DTensorSpec(mesh, tuple(placements), tensor_meta=TensorMeta(like.shape, like.stride(), part.dtype))
    found: DTensor = make(part, spec, requires_grad=part.requires_grad)
    return found


def spec_of(tensor: Tensor) -> DTensorSpec | None:
    """Return mesh, placements, global shape and dtype of a DTensor as one value to compare; None of a plain tensor."""
    return tensor._spec if isinstance(tensor, DTensor) else None


def storage_id(tensor: Tensor) -> int:
    """Return an id of the storage of *tensor*; works on the meta device too, where storages have no address."""
    return int(tensor.untyped_storage()._cdata)


def fake_tensors() -> Any:
    """Return a mode in which tensors have shapes and devices but no storage, so that a model of any size runs."""
    from torch._subclasses import FakeTensorMode

    return FakeTensorMode(allow_non_fake_inputs=True)


def group_named(name: str) -> Any:
    """Return the process group that the functional collectives know by *name*."""
    resolve: Any = distributed_c10d._resolve_process_group
    return resolve(name)


def run_after_backward(function: Callable[[], None]) -> None:
    """Run *function* when the current backward pass ends; call this from a gradient hook."""
    engine: Any = torch.autograd.Variable._execution_engine
    engine.queue_callback(function)


def in_backward() -> bool:
    """Whether this thread runs a backward pass now; a forward is then repeated by activation checkpointing."""
    return number_of_backward() != -1


def number_of_backward() -> int:
    """Return a number of the backward pass that this thread runs now, which no other has; -1 where it runs none."""
    return int(torch._C._current_graph_task_id())


def assert_on_device(condition: Tensor, message: str) -> None:
    """Have the device of *condition*, a 0-dim bool, stop with *message* where it is False; the host does not wait."""
    torch._assert_async(condition, message)


def gradient_hooks(parameter: Tensor) -> tuple[bool, bool]:
    """Whether *parameter* has hooks of ``register_hook``, and of ``register_post_accumulate_grad_hook``."""
    return bool(parameter._backward_hooks), bool(accumulated_hooks(parameter))


def accumulated_hooks(parameter: Tensor) -> list[Callable[[Tensor], None]]:
    """Return the hooks of ``register_post_accumulate_grad_hook`` of *parameter*."""
    return list((getattr(parameter, "_post_accumulate_grad_hooks", None) or {}).values())


@contextmanager
def without_gradient_hooks(parameters: Iterable[Tensor]) -> Iterator[None]:
    """Within the context no hook of ``register_post_accumulate_grad_hook`` of *parameters* is called."""
    found = (getattr(one, "_post_accumulate_grad_hooks", None) for one in parameters)
    held = [(hooks, dict(hooks)) for hooks in found if hooks]
    for hooks, _ in held:
        hooks.clear()
    try:
        yield
    finally:
        for hooks, before in held:
            hooks.update(before)


def run_gradient_hooks(parameter: Tensor) -> None:
    """Call the hooks of ``register_post_accumulate_grad_hook`` of *parameter*, without gradients, as autograd does."""
    with torch.no_grad():
        for hook in accumulated_hooks(parameter):
            hook(parameter)


def changes_in_place(tensor: Tensor) -> int:
    """Return how often *tensor* was changed in place since it was made; only for comparison with a later value."""
    return tensor._version


def held_by(tensor: Any) -> Tensor:
    """Return the local tensor of a DTensor itself, of which ``to_local`` makes a view, or a plain tensor itself."""
    found: Tensor = tensor._local_tensor if isinstance(tensor, DTensor) else tensor
    return found


def writes_to(tensor: Tensor) -> int:
    """Count the writes to a DTensor: to itself, and to its local tensor, which torch counts apart."""
    return changes_in_place(tensor) + changes_in_place(held_by(tensor))


def hold_a_copy(tensor: DTensor) -> None:
    """Let a DTensor hold a copy of its local tensor."""
    tensor._local_tensor = tensor._local_tensor.clone()
