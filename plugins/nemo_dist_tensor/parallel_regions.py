"""Run the collectives at the ends of regions: attention and feed-forward, where tensor-parallel ranks work apart.

Between regions the ranks hold equal activations or, with sequence parallelism, each its own tokens. A region starts
and ends with one collective, however many projections in it read its input: they share one copy of the input, whose
partial gradients are summed once. Any other use of the input, by a router or a gate, reads a second copy whose gradient
is whole on every rank, so that gradients are exact whatever a region does inside.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from nemo_dist.plugin.forwards import wrap_forward
from nemo_dist_tensor.collectives import (
    Peers,
    enter,
    fork,
    gather,
    gather_fork,
    reduce,
    reduce_scatter,
    split,
)

SEQUENCE = 1  # hidden states are (batch, sequence, features)


@attrs.define(eq=False)
class Stack:
    """Blocks between whose regions each rank holds only its own tokens; ``length`` is that of the whole sequence."""

    peers: Peers
    length: int = 0

    def open(self, first: nn.Module) -> None:
        """Keep only this rank's tokens of the input of the block *first*."""

        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            hidden = _hidden(args, kwargs)
            self.length = hidden.shape[SEQUENCE]
            return _with_hidden(args, kwargs, split(hidden, SEQUENCE, self.peers))

        first.register_forward_pre_hook(hook, with_kwargs=True)

    def close(self, last: nn.Module) -> None:
        """Gather the tokens of all ranks in the output of the block *last*."""

        def hook(_: nn.Module, args: Any, output: Any) -> Any:
            hidden = output[0] if isinstance(output, tuple) else output
            whole = gather(hidden, SEQUENCE, self.length, self.peers)
            return (whole, *output[1:]) if isinstance(output, tuple) else whole

        last.register_forward_hook(hook)

    def check(self, hidden: Tensor, name: str) -> None:
        """Raise RuntimeError when *hidden* does not have the shape of this rank's tokens of the current batch."""
        expected = self.peers.bounds(self.length)[1]
        if hidden.dim() != 3 or hidden.shape[SEQUENCE] != expected:
            raise RuntimeError(
                f"sequence_parallel: {name} got hidden states of shape {tuple(hidden.shape)}, but this rank has "
                f"{expected} of the {self.length} tokens; this model does something else between its blocks, so train "
                "it with sequence_parallel=False"
            )


@attrs.define(eq=False)
class Region:
    """One region. ``exit`` is the projection whose output is the region's output, if there is one."""

    name: str
    peers: Peers
    stack: Stack | None
    exit: str | None
    _alike: Tensor | None = None
    _differing: Tensor | None = None
    _left: Tensor | None = None

    def install(self, module: nn.Module) -> None:
        """Run the forward of *module* between the collectives of this region."""

        def forward(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            hidden = _hidden(args, kwargs)
            args, kwargs = _with_hidden(args, kwargs, self._open(hidden))
            try:
                output = original(*args, **kwargs)
                return output if self.stack is None else self._close(output)
            finally:
                self._alike = self._differing = self._left = None

        wrap_forward(module, forward)

    def _open(self, hidden: Tensor) -> Tensor:
        if self.stack is not None:
            self.stack.check(hidden, self.name)
            self._alike, self._differing = gather_fork(hidden, SEQUENCE, self.stack.length, self.peers)
        elif torch.is_grad_enabled() and hidden.requires_grad:
            self._alike, self._differing = fork(hidden, self.peers)
        else:
            self._alike = self._differing = hidden
        return self._alike

    def entered(self, value: Tensor) -> Tensor:
        """Return *value* for a use that differs between ranks; the region's input needs no further collective."""
        if value is self._alike and self._differing is not None:
            return self._differing
        return enter(value, self.peers)

    def ends_in_tokens_of(self, projection: str) -> bool:
        """Whether the output of *projection* is the region's, of which each rank keeps only its own tokens."""
        return self.stack is not None and projection == self.exit

    def leave(self, partial: Tensor, projection: str, bias: Tensor | None) -> Tensor:
        """Return the sum of the ranks' *partial* outputs plus *bias*; at the exit, only this rank's tokens of it."""
        if not self.ends_in_tokens_of(projection):
            whole = reduce(partial, self.peers)
            return whole if bias is None else whole + bias
        mine = reduce_scatter(partial, SEQUENCE, self.peers)
        self._left = mine if bias is None else mine + enter(bias, self.peers)
        return self._left

    def _close(self, output: Any) -> Any:
        hidden = output[0] if isinstance(output, tuple) else output
        if self.exit is None:
            if self.stack is not None and (hidden.dim() != 3 or hidden.shape[SEQUENCE] != self.stack.length):
                raise RuntimeError(
                    f"sequence_parallel: {self.name} returns hidden states of shape {tuple(hidden.shape)}, not of all "
                    f"{self.stack.length} tokens in dim 1; train this model with sequence_parallel=False"
                )
            mine = split(hidden, SEQUENCE, self.peers)
            return (mine, *output[1:]) if isinstance(output, tuple) else mine
        if hidden is not self._left:
            raise RuntimeError(
                f"sequence_parallel: {self.name} changes what {self.exit} returns before it hands it on, so its tokens "
                "cannot stay cut; train this model with sequence_parallel=False"
            )
        return output


def _hidden(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """Return the hidden states that a block or region is called with: its first argument, by whatever name."""
    first: Tensor = args[0] if args else kwargs[_hidden_name(kwargs)]
    return first


def _hidden_name(kwargs: Mapping[str, Any]) -> str:
    return "hidden_states" if "hidden_states" in kwargs else next(iter(kwargs))


def _with_hidden(
    args: tuple[Any, ...], kwargs: dict[str, Any], hidden: Tensor
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if args:
        return (hidden, *args[1:]), kwargs
    return args, {**kwargs, _hidden_name(kwargs): hidden}
