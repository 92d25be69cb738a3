"""Average each gradient as the backward makes it."""

from contextlib import contextmanager

import attrs
import torch.distributed as dist


@attrs.define(eq=False)
class Averager:
    """Averages gradients over the ranks of *group*; None is this rank alone."""

    group: object
    on: bool = True

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
        if self.on:
            dist.all_reduce(parameter.grad, group=self.group)
            parameter.grad /= dist.get_world_size(self.group)

    @contextmanager
    def paused(self):
        """Leave gradients unaveraged: they add up, and the next backward averages the sum."""
        self.on = False
        try:
            yield
        finally:
            self.on = True
