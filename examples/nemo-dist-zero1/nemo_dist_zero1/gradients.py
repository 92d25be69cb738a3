"""Average each gradient as the backward makes it."""

from contextlib import contextmanager
from functools import partial

import attrs
import torch.distributed as dist


@attrs.define(eq=False)
class Averager:
    """Averages gradients over the ranks of *group*; None is this rank alone."""

    group: object
    on: bool = True
    waiting: set = attrs.field(factory=set)  # the parameters with gradients of this rank's rows alone

    @classmethod
    def of(cls, model, group):
        """Return one that averages the gradients of *model*, also of parameters that are thawed later."""
        averager = cls(group)
        for parameter in model.parameters() if group is not None else ():
            trained = parameter.requires_grad
            parameter.requires_grad_(True)  # torch takes no hook of a frozen one
            parameter.register_post_accumulate_grad_hook(averager)
            parameter.requires_grad_(trained)
        return averager

    def __call__(self, parameter):
        """Average the gradient of *parameter*; all ranks of the group take part, in the order of the backward."""
        if not self.on:
            self.waiting.add(parameter)
            return
        dist.all_reduce(parameter.grad, group=self.group)
        parameter.grad /= dist.get_world_size(self.group)
        self.waiting.discard(parameter)

    @contextmanager
    def paused(self):
        """Leave gradients unaveraged: they add up, and the next backward averages the sum."""
        self.on = False
        try:
            yield
        finally:
            self.on = True

    def unreduced(self):
        """Return the parameters with gradients that wait to be averaged, each with what forgets that."""
        found = [parameter for parameter in self.waiting if parameter.grad is not None]
        return {parameter: partial(self.waiting.discard, parameter) for parameter in found}
