"""The replica of one rank: its parameters, the outer parameters that all ranks share, and what a checkpoint has."""

import attrs
import torch
import torch.distributed as dist

from nemo_dist import PluginState


@attrs.define(eq=False, kw_only=True)
class Replica:
    """``parameters`` are this rank's; ``outer_parameters``, stepped by ``outer``, are equal on all ranks of ``group``.

    ``inner`` is the user's optimizer, ``done`` its steps since the last outer one, ``drift`` how far the replicas had
    come then.
    """

    parameters: dict
    outer_parameters: dict
    outer: object
    group: object
    rank: int
    inner_steps: int
    inner: object = None
    done: int = 0
    drift: float = 0.0

    @classmethod
    def of(cls, parameters, group, rank, config):
        """Return the replica with these *parameters*, which are those of all ranks."""
        shared = {name: parameter.detach().clone() for name, parameter in parameters.items()}
        momentum = {"momentum": config.outer_momentum, "nesterov": config.outer_momentum > 0}
        outer = torch.optim.SGD(shared.values(), lr=config.outer_lr, **momentum)
        return cls(
            parameters=parameters,
            outer_parameters=shared,
            outer=outer,
            group=group,
            rank=rank,
            inner_steps=config.inner_steps,
        )

    # ---- training ----

    def follow(self, optimizer):
        """Take an outer step after every so many steps of *optimizer*."""
        self.inner = optimizer
        optimizer.register_step_post_hook(self._after_inner_step)
        return optimizer

    def _after_inner_step(self, optimizer, args, kwargs):
        self.done += 1
        if self.done == self.inner_steps:
            self.done = 0
            self._outer_step()

    @torch.no_grad()
    def _outer_step(self):
        """Step the outer parameters by the mean way of all replicas, which all start from there again."""
        length = torch.zeros(())
        for name, shared in self.outer_parameters.items():
            way = self._mean(shared - self.parameters[name])
            length += way.norm().cpu() ** 2
            if self.parameters[name].requires_grad:
                shared.grad = way
            else:
                shared -= way  # frozen since the last outer step
        self.outer.step()
        self.outer.zero_grad()
        for name, shared in self.outer_parameters.items():
            self.parameters[name].copy_(shared)
        self.drift = length.sqrt().item()

    def _mean(self, tensor):
        """Return the mean of *tensor* over the ranks; all of them take part."""
        if self.group is None:
            return tensor.clone()
        total = tensor.clone()
        dist.all_reduce(total, group=self.group)
        return total / dist.get_world_size(self.group)

    def metrics(self):
        """Return how far the replicas had come, in the mean, at the last outer step."""
        return {"diloco/drift": self.drift}

    # ---- checkpoints ----

    def export(self, state):
        """Rewrite *state* to what all ranks have in common: outer parameters, and the mean of moments and gradients."""
        own = {parameter.data_ptr() for parameter in self.parameters.values()}
        differing = {tensor.data_ptr() for tensor in self._differing()}
        for name, tensor in state.items():
            if tensor.data_ptr() in own:
                state[name] = self.outer_parameters[name]
            elif tensor.data_ptr() in differing:
                state[name] = self._mean(tensor)

    def _differing(self):
        """Yield the gradients of this rank, and the moments of its optimizer."""
        yield from (parameter.grad for parameter in self.parameters.values() if parameter.grad is not None)
        for tensors in self._moments().values():
            yield from tensors.values()

    def _moments(self):
        """Return the tensors that the inner optimizer keeps, by kind and by the name of their parameter."""
        kinds = {}
        for name, parameter in self.parameters.items() if self.inner is not None else ():
            for kind, value in self.inner.state.get(parameter, {}).items():
                if isinstance(value, torch.Tensor) and value.shape == parameter.shape:
                    kinds.setdefault(kind, {})[name] = value
        return kinds

    def state(self):
        """Return what a checkpoint has beside the weights: the replica of each rank, under kinds of its own."""
        return PluginState(
            tensors=self._saved_tensors,
            shared=lambda: {"done": self.done, "replicas": self._replicas},
            own=lambda: {"replica": self.rank},
            accepts=lambda saved: None,  # any number of replicas can be taken over
            load=self._load,
        )

    @property
    def _replicas(self):
        return 1 if self.group is None else dist.get_world_size(self.group)

    def _saved_tensors(self):
        own = {"weight": self.parameters, **self._moments()}
        buffers = {name: self.outer.state[shared] for name, shared in self.outer_parameters.items()}
        momentum = {name: kept["momentum_buffer"] for name, kept in buffers.items() if "momentum_buffer" in kept}
        # Copies, as `export` knows the replica's own by their memory.
        kinds = {f"{kind}_of_{self.rank}": _copied(tensors) for kind, tensors in own.items()}
        return kinds | ({"outer_momentum": momentum} if momentum else {})

    @torch.no_grad()
    def _load(self, saved):
        """Take over the replica of this rank or, under another topology, start all from the mean of the saved ones."""
        self.done = saved.shared["done"]
        for name, buffer in saved.tensors.get("outer_momentum", {}).items():
            self.outer.state[self.outer_parameters[name]]["momentum_buffer"] = buffer
        same = saved.own is not None
        taken = [saved.own["replica"]] if same else range(saved.shared["replicas"])
        for name, parameter in self.parameters.items():
            parameter.copy_(sum(saved.tensors[f"weight_of_{rank}"][name] for rank in taken) / len(taken))
        for kind, tensors in self._moments().items() if same else ():
            for name, tensor in tensors.items():
                tensor.copy_(saved.tensors[f"{kind}_of_{taken[0]}"][name])


def _copied(tensors):
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}
