"""Let an optimizer step this rank's share of the parameters, and exchange the results."""

import attrs
import torch
import torch.distributed as dist


def share_state(optimizer, group):
    """Make *optimizer* step and keep the state of this rank's share only; return it.

    It stays the optimizer that the user chose, so that learning-rate schedulers and checkpoints see nothing new. It
    must step each parameter by its own gradient, as all but a few do.
    """
    shares = Shares(group)
    optimizer.register_step_pre_hook(shares.before)
    optimizer.register_step_post_hook(shares.after)
    return optimizer


@attrs.define(eq=False)
class Shares:
    """Which rank of *group* steps which parameter; the same on every rank, as it follows from their sizes.

    ``owners`` has, for every parameter, its rank in the group; ``hidden`` the gradients of others during a step.
    """

    group: object
    owners: dict = attrs.field(factory=dict)
    hidden: dict = attrs.field(factory=dict)

    def before(self, optimizer, args, kwargs):
        """Hide the parameters of others from the step, and drop their state, which a checkpoint may have brought."""
        if any(callable(given) for given in (*args, *kwargs.values())):
            raise ValueError("zero1 cannot run a closure in step(), which would compute gradients anew; leave it out")
        parameters = [parameter for options in optimizer.param_groups for parameter in options["params"]]
        self._assign(parameters)
        own = dist.get_rank(self.group)
        for parameter in parameters:
            if self.owners[parameter] != own:
                self.hidden[parameter], parameter.grad = parameter.grad, None
                optimizer.state.pop(parameter, None)

    @torch.no_grad()
    def after(self, optimizer, args, kwargs):
        """Give every rank the parameters that others stepped; all ranks of the group take part."""
        for parameter, gradient in self.hidden.items():
            parameter.grad = gradient
        self.hidden.clear()
        ranks = dist.get_process_group_ranks(self.group)
        work = [
            dist.broadcast(parameter.data, src=ranks[owner], group=self.group, async_op=True)
            for parameter, owner in self.owners.items()
            if parameter.grad is not None
        ]
        for one in work:
            one.wait()

    def _assign(self, parameters):
        """Give each new parameter, the largest first, to the rank that has the fewest elements so far."""
        loads = [0] * dist.get_world_size(self.group)
        for parameter, owner in self.owners.items():
            loads[owner] += parameter.numel()
        new = [parameter for parameter in parameters if parameter not in self.owners]
        for parameter in sorted(new, key=lambda one: one.numel(), reverse=True):
            self.owners[parameter] = loads.index(min(loads))
            loads[self.owners[parameter]] += parameter.numel()
