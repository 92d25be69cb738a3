"""Average the gradients of whole parameters over ranks at the end of every backward, whatever it began with."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import attrs
import torch
import torch.distributed as dist
from torch import Tensor, nn

from nemo_dist.torch_private import accumulated_hooks, number_of_backward, run_after_backward

_BUCKET = 1 << 24  # elements of a flat vector, so that no copy of all gradients is made
_WATCHED = "_nemo_dist_averaged"  # attribute of a parameter whose gradients an average hears of
_WHOLE = "_nemo_dist_averaged_whole"  # in the __dict__ of a model that leaves no parameter to another average


def take_whole(model: nn.Module) -> None:
    """Say that a strategy averages the gradients of all that *model* trains, adapters that are added later included."""
    model.__dict__[_WHOLE] = True


def is_whole(model: nn.Module) -> bool:
    """Whether a strategy averages the gradients of all that *model* trains."""
    return _WHOLE in model.__dict__


def has_hook_beside(parameter: nn.Parameter) -> bool:
    """Whether *parameter* has hooks of ``register_post_accumulate_grad_hook`` beside those of averages."""
    return any(
        not isinstance(getattr(hook, "__self__", None), GradientAverage) for hook in accumulated_hooks(parameter)
    )


@attrs.define(eq=False)
class GradientAverage:
    """Averages the gradients of *parameters* over the ranks of *group*, which hold each of them whole.

    ``otherwise`` is asked at the first gradient of a backward whether something else averages those of this one.
    """

    parameters: Sequence[nn.Parameter]
    group: dist.ProcessGroup
    otherwise: Callable[[], bool] = lambda: False
    synchronised: bool = True
    _heard_of: int = -1  # the last backward
    _local: set[nn.Parameter] = attrs.field(factory=set)  # those with a gradient that is not averaged yet

    def __deepcopy__(self, memo: object) -> GradientAverage:
        """Return an average for a copy of the model, which hears of no parameter yet."""
        return GradientAverage((), self.group)

    def start(self) -> None:
        """Hear of the gradients of the parameters from now on, frozen ones included; a second call adds new ones."""
        for parameter in self.parameters:
            if hasattr(parameter, _WATCHED):
                continue
            trained = parameter.requires_grad
            parameter.requires_grad_(True).register_post_accumulate_grad_hook(self._arrived)
            parameter.requires_grad_(trained)
            setattr(parameter, _WATCHED, True)

    @contextmanager
    def unsynchronised(self) -> Iterator[None]:
        """Within the context, a backward leaves gradients as they are."""
        self.synchronised = False
        try:
            yield
        finally:
            self.synchronised = True

    def unreduced(self) -> dict[nn.Parameter, Callable[[], None]]:
        """Return the parameters whose gradients are not averaged yet, each with what forgets that."""
        waiting = [parameter for parameter in self._local if parameter.grad is not None]
        return {parameter: partial(self._local.discard, parameter) for parameter in waiting}

    def settle(self) -> None:
        """Take the gradients of what is trained now as averaged."""
        self._local = {parameter for parameter in self._local if not parameter.requires_grad}

    def _arrived(self, parameter: Any) -> None:
        current = number_of_backward()  # and no flag, which a backward that fails would leave set
        if current != self._heard_of:
            self._heard_of = current
            if not self.otherwise() and self.synchronised:
                run_after_backward(self.run)
        self._local.add(parameter)

    def run(self) -> None:
        """All-reduce the accumulated gradients to their mean; what an earlier call averaged stays the same.

        A parameter without a gradient on all ranks stays without, so that optimizers pass it by.
        """
        trained = [parameter for parameter in self.parameters if parameter.requires_grad]
        without = [index for index, parameter in enumerate(trained) if parameter.grad is None]
        reached = torch.ones(len(trained), device=self.parameters[0].device)
        for index in without:
            trained[index].grad = torch.zeros_like(trained[index])
            reached[index] = 0
        gradients = [parameter.grad for parameter in trained if parameter.grad is not None]
        together(
            [*gradients, reached], lambda values: dist.all_reduce(values.div_(self.group.size()), group=self.group)
        )
        for index in without:
            if not reached[index]:
                trained[index].grad = None
        self.settle()


@torch.no_grad()
def together(tensors: Sequence[Tensor], collective: Callable[[Tensor], object]) -> None:
    """Run *collective* in place on flat vectors of *tensors*, many in one."""
    for bucket in _buckets(tensors):
        vector = torch.cat([tensor.reshape(-1) for tensor in bucket])
        collective(vector)
        for tensor, values in zip(bucket, vector.split([tensor.numel() for tensor in bucket]), strict=True):
            tensor.copy_(values.view_as(tensor))


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    bucket: list[Tensor] = []
    for tensor in tensors:
        if bucket and sum(one.numel() for one in bucket) + tensor.numel() > _BUCKET:
            yield bucket
            bucket = []
        bucket.append(tensor)
    if bucket:
        yield bucket
