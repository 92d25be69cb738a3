"""Replace the forward of a module as its style asks: plain tensors in and out, and this rank's share of the work."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import attrs
import torch
from torch import Tensor, nn
from torch.distributed.tensor import Shard
from transformers.pytorch_utils import Conv1D

from nemo_dist.mesh.dtensor import from_local, local
from nemo_dist.plugin.forwards import wrap_forward
from nemo_dist.torch_private import assert_on_device
from nemo_dist_tensor.attention_heads import AttentionHeads, pick
from nemo_dist_tensor.collectives import Peers, enter, gather, reduce, split
from nemo_dist_tensor.parallel_regions import Region
from nemo_dist_tensor.styles import GATHERED, WHOLE_INPUT

Change = Callable[[Tensor], Tensor | None]


@contextmanager
def parameters_as(
    module: nn.Module, change: Change = local, special: Mapping[str, Change] | None = None
) -> Iterator[None]:
    """Within the context, replace the own parameters of *module* by ``change(it)`` or ``special[name](it)``.

    They are looked up on entry, so that the parameters that a strategy has gathered for this forward are used.
    """
    changes = special or {}
    originals = {name: parameter for name, parameter in module._parameters.items() if parameter is not None}
    registered: Any = module._parameters  # typed to hold Parameters, but here tensors computed from them
    registered.update({name: changes.get(name, change)(parameter) for name, parameter in originals.items()})
    try:
        yield
    finally:
        registered.update(originals)


@attrs.define(eq=False)
class LMHead:
    """The state of the output projection of a language model: with ``stays_cut`` its logits are not gathered."""

    stays_cut: bool = False


def _width(module: nn.Linear | Conv1D) -> int:
    return int(module.nf) if isinstance(module, Conv1D) else module.out_features


def _product(module: nn.Linear | Conv1D, original: Callable[..., Any], value: Tensor) -> Tensor:
    """Return the product of *value* with the current weight; ``Conv1D`` itself knows only one width and a bias."""
    if not isinstance(module, Conv1D):
        output: Tensor = original(value)
        return output
    product = value @ module.weight
    return product if module.bias is None else product + module.bias


def of_heads(heads: AttentionHeads, peers: Peers) -> Callable[[Tensor], Tensor]:
    """Return what takes, of a whole projection to keys or values, the rows of the heads that this rank needs."""
    return lambda whole: pick(enter(whole, peers), heads, peers.rank)


def column(module: nn.Linear | Conv1D, style: str, region: Region, change: Change = local) -> None:
    """Compute this rank's output features, whose rows of the parameters *change* returns."""
    peers, width = region.peers, _width(module)

    def forward(original: Callable[..., Any], value: Tensor) -> Tensor:
        with parameters_as(module, special={"weight": change, "bias": change}):
            output = _product(module, original, region.entered(value))
        return gather(output, -1, width, peers) if style in GATHERED else output

    wrap_forward(module, forward)


def head(module: nn.Linear, region: Region, state: LMHead, change: Change = local) -> None:
    """Compute the logits of this rank's part of the vocabulary; gather them unless the loss takes them sharded."""
    peers, width = region.peers, module.out_features

    def forward(original: Callable[..., Any], value: Tensor) -> Tensor:
        with parameters_as(module, special={"weight": change, "bias": change}):
            output: Tensor = original(region.entered(value))
        if not state.stays_cut:
            return gather(output, -1, width, peers)
        whole = torch.empty((*output.shape[:-1], width), device="meta")
        return from_local(output, peers.mesh, [Shard(-1)], like=whole)

    wrap_forward(module, forward)


def row(module: nn.Linear | Conv1D, name: str, style: str, region: Region, change: Change = local) -> None:
    """Multiply this rank's input features, and sum the products over the ranks; the bias is added once, to the sum."""
    peers = region.peers

    def forward(original: Callable[..., Any], value: Tensor) -> Tensor:
        if style in WHOLE_INPUT:
            value = split(value, -1, peers)
        with parameters_as(module, special={"weight": change, "bias": lambda _: None}):
            partial = _product(module, original, value)
        return region.leave(partial, name, None if module.bias is None else local(module.bias))

    wrap_forward(module, forward)


def _refuse_ids_outside(ids: Tensor, vocabulary_size: int) -> None:
    """Raise for an id that no rank has a row for; on CUDA by an assertion there, as reading the answer would wait."""
    outside = ((ids < 0) | (ids >= vocabulary_size)).any()
    if ids.device.type != "cpu":
        assert_on_device(~outside, f"a token id lies outside of the vocabulary of {vocabulary_size}")
    elif outside:
        raise IndexError(f"a token id lies outside of the vocabulary of {vocabulary_size}")


def vocabulary(module: nn.Embedding, peers: Peers) -> None:
    """Look up the tokens whose rows this rank holds, and sum over the ranks."""
    vocabulary_size, padding = module.num_embeddings, module.padding_idx
    start, length = peers.bounds(vocabulary_size)
    own_padding = padding - start if padding is not None and start <= padding < start + length else None

    def forward(original: Callable[..., Any], ids: Tensor) -> Tensor:
        _refuse_ids_outside(ids, vocabulary_size)
        elsewhere = (ids < start) | (ids >= start + length)
        module.padding_idx = own_padding  # its row gets no gradient
        try:
            with parameters_as(module, special={"weight": _at_least_one_row}):
                found = original((ids - start).masked_fill(elsewhere, 0))
        finally:
            module.padding_idx = padding
        return reduce(found.masked_fill(elsewhere.unsqueeze(-1), 0), peers)

    wrap_forward(module, forward)


def _at_least_one_row(weight: Tensor) -> Tensor:
    """Return a rank's rows; a rank without any looks up a row of zeros, which is masked."""
    rows = local(weight)
    return rows if len(rows) else torch.nn.functional.pad(rows, (0, 0, 0, 1))


def features(module: nn.Embedding, peers: Peers) -> None:
    """Look up this rank's features of every token, and gather those of the other ranks."""
    width = module.embedding_dim

    def forward(original: Callable[..., Any], ids: Tensor) -> Tensor:
        with parameters_as(module):
            return gather(original(ids), -1, width, peers)

    wrap_forward(module, forward)


def summed(module: nn.Module, peers: Peers, only: Collection[str] | None = None) -> None:
    """Sum the gradients of the own parameters of *module*, or *only* of some: ranks use them on parts of their own."""
    names = [name for name in module._parameters if only is None or name in only]

    def change(parameter: Tensor) -> Tensor:
        return enter(local(parameter), peers)

    def forward(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with parameters_as(module, special=dict.fromkeys(names, change)):
            return original(*args, **kwargs)

    wrap_forward(module, forward)


def local_only(module: nn.Module) -> None:
    """Run the forward of *module* on its own parameters as plain local tensors."""

    def forward(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with parameters_as(module):
            return original(*args, **kwargs)

    wrap_forward(module, forward)


def experts(module: nn.Module, peers: Peers) -> None:
    """Run every expert on this rank's part of its features, and sum; inputs get partial gradients, which are summed."""

    def partial(value: Any) -> Any:
        return enter(value, peers) if isinstance(value, Tensor) and value.is_floating_point() else value

    def forward(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Tensor:
        with parameters_as(module):
            output = original(*map(partial, args), **{name: partial(value) for name, value in kwargs.items()})
        return reduce(output, peers)

    wrap_forward(module, forward)


def latent(module: nn.Linear, rotary: int, peers: Peers) -> None:
    """Sum the gradient of the last *rotary* outputs, which every rank uses for heads of its own."""

    def forward(original: Callable[..., Any], value: Tensor) -> Tensor:
        output = original(value)
        compressed, rotated = output.split([output.shape[-1] - rotary, rotary], dim=-1)
        return torch.cat([compressed, enter(rotated, peers)], dim=-1)

    wrap_forward(module, forward)
