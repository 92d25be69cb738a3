"""Keep the two replicas of a tied weight, on the first and on the last stage, equal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import attrs
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from nemo_dist.mesh.dtensor import from_local, local


@attrs.frozen(kw_only=True, eq=False)
class TiedWeight:
    """This rank's replicas of the tied weight, and the rank with the other one.

    ``replicas``: the first stage's before the last stage's. ``peer``: the global rank of the other replica; None when
    both are here (V schedules). ``counted``: whether ``replicas[0]`` is the first stage's, which a global norm counts.
    """

    replicas: tuple[nn.Parameter, ...]
    counted: bool
    peer: int | None
    group: dist.ProcessGroup | None

    @property
    def counted_elsewhere(self) -> tuple[nn.Parameter, ...]:
        """The replicas that a global norm must not count: all but the first stage's."""
        return self.replicas[1 if self.counted else 0 :]

    def freeze_together(self) -> None:
        """Freeze both replicas where one is frozen, since they are one weight; the ranks of both stages take part."""
        frozen = torch.tensor(float(not self._trained), device=local(self.replicas[0]).device)
        if self.peer is not None:
            frozen += self._exchanged(frozen, self.peer)
        if frozen > 0:
            for replica in self.replicas:
                replica.requires_grad_(False)

    @property
    def _trained(self) -> bool:
        return all(replica.requires_grad for replica in self.replicas)

    def sum_gradients(self) -> None:
        """Give both replicas the same sum of their gradients, bit for bit; the ranks of both stages take part."""
        grads = [None if replica.grad is None else local(replica.grad) for replica in self.replicas]
        if self.peer is None:
            total = sum((grad for grad in grads if grad is not None), torch.zeros(()))
            parts = [total] * len(grads)
        else:
            mine = grads[0] if grads[0] is not None else torch.zeros_like(local(self.replicas[0]))
            parts = [mine + self._exchanged(mine, self.peer)]
        for replica, part in zip(self.replicas, parts, strict=True):
            if self._trained:
                _set_gradient(replica, part)
            else:
                replica.grad = None  # with zeros an optimizer would still apply weight decay

    def _exchanged(self, mine: Tensor, peer: int) -> Tensor:
        """Swap *mine* for the other replica's tensor; the ranks of the first and the last stage take part.

        The lower rank sends first and then receives, the other way round on the higher one. A batch of both would be
        quicker, but if it is the first operation of the group, NCCL needs all its ranks in it, and those between have
        nothing to send; single messages go over a communicator of these two.
        """
        mine, other = mine.contiguous(), torch.empty_like(mine, memory_format=torch.contiguous_format)
        swap = ((dist.send, mine), (dist.recv, other))
        for transfer, tensor in swap if dist.get_rank() < peer else reversed(swap):
            transfer(tensor, peer, self.group)
        return other


@contextmanager
def gradients_set_aside(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Within the context gradients of *parameters* start from None; the earlier ones are added back afterwards.

    After an error they are what they were.
    """
    earlier = [parameter.grad for parameter in parameters]
    for parameter in parameters:
        parameter.grad = None
    try:
        yield
    except BaseException:
        for parameter, old in zip(parameters, earlier, strict=True):
            parameter.grad = old
        raise
    for parameter, old in zip(parameters, earlier, strict=True):
        if old is not None:
            parameter.grad = old if parameter.grad is None else parameter.grad + old


def _set_gradient(replica: nn.Parameter, value: Tensor) -> None:
    if replica.grad is not None:
        local(replica.grad).copy_(value)
    elif isinstance(replica, DTensor):
        replica.grad = from_local(value, replica.device_mesh, replica.placements, like=replica)
    else:
        replica.grad = value.clone()
