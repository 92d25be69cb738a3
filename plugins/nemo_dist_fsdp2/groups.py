"""The groups of parameters that FSDP2 gathers and reduces together; torch has no public name for them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from nemo_dist.torch_private import held_by, writes_to


def groups_of(model: nn.Module) -> list[Any]:
    """Return the groups of *model*, in the order of its modules."""
    return [group for state in _states(model) for group in _groups(state)]


def share_padding(groups: Iterable[Any]) -> None:
    """Let all parameters of *groups* that loading tied gather from one padded shard.

    FSDP2 pads a shard that has fewer rows than others in the first forward, for each module that has it, and each time
    into other memory: an optimizer would step the last of them, and the other modules would gather what was.
    """
    every = list(_all(groups))
    for one in every:
        one.reset_sharded_param = partial(_take_padding, one, every, one.reset_sharded_param)


def initialise(model: Any) -> None:
    """Make *model* the root of its groups, as its first forward does; no-op where it was that."""
    model._get_fsdp_state()._lazy_init()


def around_reductions(group: Any, around: Callable[[Callable[..., None]], None]) -> None:
    """Call ``around(reduce)`` in place of *reduce*, in which *group* takes the gradients of a backward and sums them.

    FSDP2 does it once in every backward, and more often where a forward runs a module of the group several times.
    """
    found = group.post_backward
    group.post_backward = lambda *_: around(found)


def around_backwards(model: nn.Module, first: Callable[[], None], last: Callable[[], None]) -> None:
    """Call *first* before a group is gathered in a backward, and *last* when all groups are done with one."""
    for state in _states(model):
        state._pre_backward = partial(_after, first, state._pre_backward)
        state._root_post_backward_final_callback = partial(_before, last, state._root_post_backward_final_callback)


def compare_weights(model: nn.Module, refuse: Callable[[Any], None]) -> None:
    """Call *refuse* with a state of FSDP2 in a backward for which its weights are not those of the forward."""
    for state in _states(model):
        state._register_pre_backward_hook = partial(_remember, state, refuse, state._register_pre_backward_hook)


def gather_before_each_backward(model: nn.Module) -> None:
    """Gather a group of several modules of *model* before the backward of each, as one of them may run by itself.

    FSDP2 does so before that of the last, and frees the group after that of any that was called alone.
    """
    for state in _states(model):
        for group in _groups(state):
            for module in group.modules if len(group.modules) > 1 else ():
                module.register_forward_hook(
                    lambda _, args, output, state=state: state._register_pre_backward_hook(output)
                )


def reset(model: Any) -> None:
    """Put the groups of *model* into the state before a forward or backward that failed; no communication."""
    if getattr(model, "reset_iter_state", None) is None:
        raise RuntimeError(
            "an earlier backward failed, after which fsdp2 goes on only with torch 2.13; load the model anew"
        )
    model.reset_iter_state()


def name_of(state: Any) -> str:
    """Return the name of the module that *state* is of."""
    return next((group._module_fqn for group in _groups(state) if group._module_fqn), "the model")


def unreduced(groups: Iterable[Any]) -> dict[nn.Parameter, Callable[[], None]]:
    """Return the shards of *groups* with gradients that are not reduced yet, each with what drops those."""
    found: dict[nn.Parameter, list[Any]] = {}
    for one in _all(groups):
        if hasattr(one, "_unsharded_param") and has_gradient(one):
            found.setdefault(one.sharded_param, []).append(one)
    return {shard: partial(_drop, several) for shard, several in found.items()}


def agree_before_collectives(group: Any, agree: Callable[[str], None]) -> None:
    """Call *agree* with what comes before *group* is gathered or reduced."""
    for name, what in (("_all_gather_comm", "gathers"), ("_reduce_scatter_comm", "reduces")):
        setattr(group, name, _Agreed(getattr(group, name), partial(_tell, agree, group, what)))


def trained(group: Any) -> list[Any]:
    """Return the parameters of *group* that were gathered at least once and require gradients."""
    return [one for one in group.fsdp_params if hasattr(one, "_unsharded_param") and one.sharded_param.requires_grad]


def has_gradient(parameter: Any) -> bool:
    """Whether this rank has a gradient of *parameter*, one of a group, that is not reduced yet."""
    return parameter.unsharded_accumulated_grad is not None or parameter._unsharded_param.grad is not None


def give_zeros(parameter: Any) -> None:
    """Give *parameter*, one of a group, a gradient of zeros to reduce."""
    parameter._unsharded_param.grad = torch.zeros_like(parameter._unsharded_param)


def align_dtypes(parameters: list[Any]) -> None:
    """Give the gradients of *parameters*, of one group, one dtype, as FSDP2 wants.

    Those that wait for a later batch are kept in the dtype of the reduction, and those of this one are not.
    """
    if any(one.unsharded_accumulated_grad is not None for one in parameters):
        for one in parameters:
            if one.unsharded_accumulated_grad is None:
                one.to_accumulated_grad_if_needed()


Place = tuple[nn.Module, str]  # a module and the name of a parameter of it


def strangers(groups: Iterable[Any]) -> list[Place]:
    """Return where the modules of *groups*, none of them gathered now, have another parameter than FSDP2 took over."""
    return [_place(one) for one in _all(groups) if _current(one) is not one.sharded_param]


def cast(groups: Iterable[Any]) -> list[Place]:
    """Return where the parameters of *groups* have another dtype than in the first forward."""
    return [_place(one) for one in _all(groups) if one.sharded_param.dtype != one.orig_dtype]


def _all(groups: Iterable[Any]) -> Iterator[Any]:
    return (one for group in groups for one in group.fsdp_params)


def _place(parameter: Any) -> Place:
    return parameter._module_info.module, parameter._module_info.param_name


def _current(parameter: Any) -> Any:
    module, name = _place(parameter)
    return module._parameters.get(name)


def _take_padding(parameter: Any, every: Iterable[Any], reset: Callable[[], None]) -> None:
    """Take the memory of another one of *every* that has the shard of *parameter* already, then *reset*."""
    shard = _current(parameter)
    own = held_by(shard)
    if not own.is_meta and own.size() != parameter.padded_sharded_param_size:
        place = own.untyped_storage().data_ptr()
        for other in every:
            if other.sharded_param is shard and other._sharded_param_data.untyped_storage().data_ptr() == place:
                parameter._sharded_param_data = other._sharded_param_data
    reset()


def _drop(parameters: Iterable[Any]) -> None:
    for one in parameters:
        one.unsharded_accumulated_grad = one._unsharded_param.grad = None


def _remember(state: Any, refuse: Callable[[Any], None], register: Callable[[Any], Any], output: Any) -> Any:
    """Let FSDP2 *register* what it does before the backward of *output*, with the weights of now to compare."""
    if not torch.is_grad_enabled():
        return register(output)
    found, before = state._pre_backward, _changes(state)

    def compare() -> None:
        if _changes(state) != before:
            refuse(state)

    state._pre_backward = partial(_after, compare, found)
    try:
        return register(output)
    finally:
        state._pre_backward = found


def _changes(state: Any) -> int:
    """Count the writes to the shards of *state*."""
    return sum(writes_to(one.sharded_param) for one in _all(_groups(state)))


def _groups(state: Any) -> list[Any]:
    several = getattr(state, "_fsdp_param_groups", None)  # torch 2.13 has one for each mesh, and before there was one
    return [one for one in (several if several is not None else [state._fsdp_param_group]) if one is not None]


def _states(model: nn.Module) -> list[Any]:
    modules: list[Any] = [module for module in model.modules() if isinstance(module, FSDPModule)]
    return list({id(state): state for state in (module._get_fsdp_state() for module in modules)}.values())


def _after(first: Callable[[], None], then: Callable[[Tensor], Tensor], gradient: Tensor) -> Tensor:
    first()
    return then(gradient)


def _before(last: Callable[[], None], found: Callable[[], None]) -> None:
    found()
    last()


def _tell(agree: Callable[[str], None], group: Any, what: str) -> None:
    agree(f"{what} {group._module_fqn or 'the whole model'}")


class _Agreed:
    """A collective of FSDP2 with something that comes before it."""

    def __init__(self, found: Any, before: Callable[[], None]) -> None:
        self.found, self.before = found, before
        self.allocate = found.allocate

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.before()
        return self.found(*args, **kwargs)
