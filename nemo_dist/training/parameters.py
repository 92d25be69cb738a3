"""The parameters of all parts of a model on this rank, by their names in the whole model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import nn

from nemo_dist.hf_model import name_root
from nemo_dist.plugin.resharding import reshard


def named_shards(parts: Sequence[nn.Module]) -> Iterator[tuple[str, nn.Parameter]]:
    """Iterate over the parameters of *parts*, each once, after those that a forward left gathered are shards again."""
    reshard(parts)
    return named_as_they_are(parts)


def named_as_they_are(parts: Sequence[nn.Module]) -> Iterator[tuple[str, nn.Parameter]]:
    """Iterate over the parameters of *parts*, each once; a forward may have left some of them gathered."""
    seen: set[int] = set()
    for part in parts:
        for name, parameter in name_root(part).named_parameters():
            if id(parameter) not in seen:
                seen.add(id(parameter))
                yield name, parameter
