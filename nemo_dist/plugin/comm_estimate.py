"""Estimate what a training step sends: the collectives along each axis, and bytes per rank where the model is known.

Bytes are those that one rank sends in one optimizer step on one batch, with ring or pairwise algorithms: for N bytes
shared by ``size`` ranks, ``N * (size - 1) / size`` in an all-gather, a reduce-scatter or an all-to-all, and
twice that in an all-reduce.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any

import attrs

from nemo_dist.hf_model import blocks as hf_blocks
from nemo_dist.hf_model import input_embedding
from nemo_dist.plugin.mixed_precision import dtype_name

_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}


@attrs.frozen(kw_only=True)
class ModelFacts:
    """The numbers of a model and of a step that determine how much is sent.

    ``parameters``, ``block_parameters``: number of elements in the whole model and in its repeated blocks, without
    adapters. ``embedding_parameters``: in the input embedding; 0 where it is tied to the output head, and then
    ``tied_parameters`` has them. ``blocks``: the repeated blocks that hold attention. ``stored``, ``computed``: bytes
    per parameter element as stored and as used in a forward. ``rows``, ``length``: the batch of one data-parallel rank,
    in sequences and tokens per sequence. ``recomputes``: activation checkpointing runs the forward of every block
    twice. ``batches``: in how many forwards, one after the other, the rows are passed. ``experts``: in each of the
    ``expert_layers``; a token is routed to ``experts_per_token`` of them.

    ``trained``, ``trained_experts``: elements of the whole model, and of its experts, that get gradients. ``skipped``:
    those of the embedding and of each block that a backward does not come to, as nothing up to its end is trained, each
    beside those of its experts. ``adapter_bytes``: of trained adapters. ``trained_names``: of all that is trained, in
    adapters too; ``first_trained``: the place of the first, or of what it stands beside, among the parameters.
    """

    parameters: int
    block_parameters: int
    embedding_parameters: int
    tied_parameters: int
    blocks: int
    hidden: int
    heads: int
    key_heads: int
    head_width: int
    stored: int
    computed: int
    rows: int
    length: int
    recomputes: bool
    experts: int = 0
    expert_layers: int = 0
    expert_parameters: int = 0
    experts_per_token: int = 0
    batches: int = 1
    trained: int
    trained_experts: int = 0
    skipped: tuple[tuple[int, int], ...] = ()
    adapter_bytes: int = 0
    trained_names: frozenset[str] = frozenset()
    first_trained: int = 0

    @property
    def tokens(self) -> int:
        """The tokens in the batch of one data-parallel rank."""
        return self.rows * self.length

    @property
    def reached_blocks(self) -> int:
        """How many of the ``blocks`` a backward comes to; no other one is recomputed."""
        before = 1 if self.skipped and self.embedding_parameters else 0
        return max(0, self.blocks - len(self.skipped) + before)

    @classmethod
    def of(
        cls,
        model: Any,
        rows: int,
        length: int,
        compute_dtype: str | None,
        recomputes: bool,
        added: Mapping[str, Any] = MappingProxyType({}),
    ) -> ModelFacts:
        """Read the numbers of *model*, a transformers model on any device (the meta device will do).

        *added*: the parameters of its adapters by name, which are not in its modules (``hf_model.without_adapters``).
        """
        config = model.config.get_text_config()
        blocks = hf_blocks(model).values()
        layers = [block for block in blocks if any(hasattr(module, "is_causal") for module in block.modules())]
        inside = {id(parameter): parameter for block in blocks for parameter in block.parameters()}
        head = model.get_output_embeddings()
        weight = getattr(input_embedding(model), "weight", None)
        tied = weight is not None and head is not None and head.weight is weight
        embedded = 0 if weight is None else weight.numel()
        stored = _BYTES[dtype_name(next(model.parameters()).dtype)]
        heads = config.num_attention_heads
        fused = {module: found for module in model.modules() if (found := stacked_experts(module))}
        experts = _experts(model)
        # In the order of the forward, or nearly.
        places = {name: place for place, (name, _) in enumerate(model.named_parameters())}
        names = [name for name, p in (*model.named_parameters(), *added.items()) if p.requires_grad]
        first = min((_place(name, places) for name in names), default=len(places))
        passed = [*([] if tied or weight is None else [input_embedding(model)]), *blocks]
        return cls(
            parameters=_numbers(model.parameters()),
            block_parameters=_numbers(inside.values()),
            embedding_parameters=0 if tied else embedded,
            tied_parameters=embedded if tied else 0,
            blocks=len(layers),
            hidden=config.hidden_size,
            heads=heads,
            key_heads=getattr(config, "num_key_value_heads", None) or heads,
            head_width=getattr(config, "head_dim", None) or config.hidden_size // heads,
            stored=stored,
            computed=_BYTES[compute_dtype] if compute_dtype else stored,
            rows=rows,
            length=length,
            recomputes=recomputes,
            experts=max(fused.values(), default=0),
            expert_layers=len(fused),
            expert_parameters=_numbers(experts),
            experts_per_token=getattr(config, "num_experts_per_tok", None) or 0,
            trained=_numbers(p for p in model.parameters() if p.requires_grad),
            trained_experts=_numbers(p for p in experts if p.requires_grad),
            skipped=tuple(
                (_numbers(one.parameters()), _numbers(_experts(one))) for one in _before(model, passed, first)
            ),
            adapter_bytes=sum(p.numel() * p.itemsize for p in added.values() if p.requires_grad),
            trained_names=frozenset(names),
            first_trained=first,
        )


def _numbers(parameters: Iterable[Any]) -> int:
    return sum(parameter.numel() for parameter in parameters)


def _experts(module: Any) -> list[Any]:
    """Return the parameters of the stacked experts in *module*."""
    return [p for one in module.modules() if stacked_experts(one) for p in one.parameters(recurse=False)]


def _before(model: Any, modules: Iterable[Any], first: int) -> list[Any]:
    """Return those of *modules* of *model* whose parameters all have places before *first*."""
    known = {id(parameter): place for place, parameter in enumerate(model.parameters())}
    return [one for one in modules if max((known[id(p)] for p in one.parameters()), default=first) < first]


def _place(name: str, places: Mapping[str, int]) -> int:
    """Return the place of the parameter *name*, or of the first one in the innermost module around it."""
    if name in places:
        return places[name]
    while name:
        name = name.rpartition(".")[0]
        if inside := [place for other, place in places.items() if other.startswith(f"{name}.")]:
            return inside[0]
    return 0


def stacked_experts(module: Any) -> int:
    """Return how many experts *module* holds as stacked 3-D parameters [experts, ...], as in transformers; else 0."""
    stacks = [len(p) for p in module.parameters(recurse=False) if p.ndim == 3] if hasattr(module, "num_experts") else []
    return max(stacks, default=0)


@attrs.frozen(kw_only=True)
class Traffic:
    """One kind of collective in a step: its axis, what it moves, how often, and the bytes that one rank sends."""

    axis: str
    collective: str
    of: str
    often: str
    sent: int | None = None

    def __str__(self) -> str:
        amount = "" if self.sent is None else f": {readable(self.sent)}"
        return f"{self.axis:<12} {self.collective} of {self.of}, {self.often}{amount}"


def shared(size: int, total: float) -> int:
    """Return the bytes that a rank sends when *size* ranks gather, scatter or exchange *total* bytes."""
    return round(total * (size - 1) / size)


def bytes_of(dtype: str) -> int:
    """Return the bytes per element of a floating-point *dtype*, given by name."""
    return _BYTES[dtype]


def readable(count: int) -> str:
    """Format a number of bytes with a binary unit: ``1.5 MiB``."""
    amount, units = float(count), ["B", "KiB", "MiB", "GiB", "TiB"]
    while amount >= 1024 and len(units) > 1:
        amount /= 1024
        units.pop(0)
    return f"{amount:.4g} {units[0]}"
