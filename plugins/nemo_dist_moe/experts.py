"""Shard the experts of transformers models, through transformers' own expert parallelism."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from transformers.distributed.expert_parallel import apply_expert_parallelism

from nemo_dist import Role, TopologyError
from nemo_dist.mesh.dtensor import local
from nemo_dist.plugin.forwards import wrap_forward
from nemo_dist.plugin.sharding_override import ShardingOverride, override_sharding

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from nemo_dist.mesh.mesh_context import MeshContext
    from nemo_dist_moe.config import MoEParallelizerConfig

_DISPATCH, _BY_EXPERT = "ep_dispatch_experts", "grouped_gemm"


def shard_experts(
    parts: list[nn.Module], mesh: MeshContext, config: MoEParallelizerConfig, experts_everywhere: bool
) -> None:
    """Shard the experts of *parts* over ``ep``, install the dispatch of tokens, and mark how to shard further.

    ``experts_everywhere``: every part must have experts, because the model was not split into stages. Raises
    TopologyError, before a weight is read, for a model without experts or with experts that do not fit the mesh.
    """
    ep = mesh.size("ep")
    for part in parts:
        plan, experts = expert_modules(part, ep, experts_everywhere)
        apply_expert_parallelism(part, mesh["ep"], mesh["tp"], plan, config.dispatcher)
        shard_mesh = _shard_mesh(mesh)
        for name, module in experts.items():
            wrap_forward(module, _not_a_view)
            dims = {
                key: shard_dim(f"{name}.{key}", tuple(local(p).shape), part, shard_mesh.size(-1))
                for key, p in module.named_parameters()
            }
            override_sharding(
                module,
                ShardingOverride(
                    mesh=shard_mesh,
                    # An expert sees the tokens of all ranks of dp and cp, also where tp ranks dispatch a part of them
                    # each, so its gradients sum over the same batches that dense parameters average over.
                    grad_divisor=mesh.size(Role.TOKENS),
                    dims=dims,
                    reshard_after_forward=config.reshard_after_forward,
                    mp_policy=config.mp_policy,
                ),
            )


def expert_modules(part: Any, ep: int, experts_everywhere: bool = True) -> tuple[dict[str, str], dict[str, nn.Module]]:
    """Return the style of everything that belongs to experts of *part*, and the modules that dispatch; see above."""
    plan = _plan(part, ep, experts_everywhere)
    experts = {name: part.get_submodule(name) for name, style in plan.items() if style == _DISPATCH}
    _refuse_misfits(part, experts, ep)
    return plan, experts


def shard_head(parts: list[nn.Module], precision: str) -> None:
    """Compute the output head in *precision*; raise TopologyError when it is tied to the embedding."""
    for part in parts:
        model: Any = part
        head = model.get_output_embeddings()
        if not isinstance(head, nn.Module) or not any(True for _ in head.parameters()):
            continue
        embedding = model.get_input_embeddings()
        if {id(p) for p in head.parameters()} & {id(p) for p in embedding.parameters()}:
            raise TopologyError(
                [
                    f"lm_head_precision={precision!r} needs a head of its own, but that of {type(part).__name__} is "
                    "tied to the embedding; leave lm_head_precision out"
                ]
            )
        # The backward starts with the head, so freeing it after the forward would only gather it twice.
        override_sharding(
            head,
            ShardingOverride(
                reshard_after_forward=False, mp_policy={"param_dtype": precision, "reduce_dtype": "float32"}
            ),
        )


def _plan(part: Any, ep: int, experts_everywhere: bool) -> dict[str, str]:
    """Return the style of every expert module and parameter of *part*, parameters before their module."""
    rules = part.ep_plan or {}
    plan: dict[str, str] = part._expand_parallel_plan(rules)
    name = type(part).__name__
    if not rules or (experts_everywhere and _DISPATCH not in plan.values()):
        raise TopologyError(
            [f"ep_size={ep}, but {name} has no experts that transformers can dispatch to; set ep_size=1"]
        )
    foreign = sorted(set(rules.values()) - {_DISPATCH, _BY_EXPERT})
    if foreign:
        raise TopologyError([f"ep_size={ep}, but the expert plan of {name} has the styles {foreign}; set ep_size=1"])
    return plan


def _refuse_misfits(part: nn.Module, experts: dict[str, nn.Module], ep: int) -> None:
    counts = {int(getattr(module, "num_experts", 0)) for module in experts.values()}
    wrong = sorted(count for count in counts if count % ep)
    if wrong:
        numbers = ", ".join(map(str, wrong))
        raise TopologyError(
            [f"ep_size={ep} must divide the experts of a layer of {type(part).__name__} ({numbers}); use a divisor"]
        )


def _not_a_view(forward: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
    """Run *forward* and copy an output that is a view: FSDP2 hooks it, and an in-place sum would lose the hook."""
    output = forward(*args, **kwargs)
    return output.clone() if output._is_view() else output


def _shard_mesh(mesh: MeshContext) -> DeviceMesh:
    """Return the mesh of the ranks with shards of the same experts; with replicas, these are its outer axis."""
    if mesh.size("ep_between_replicas") > 1:
        return mesh["ep_between_replicas", "ep_within_replica"]
    return mesh["ep_shard"]


def shard_dim(name: str, shape: tuple[int, ...], part: Any, shards: int) -> int:
    """Return the dim along which to shard this rank's experts, of *shape* [experts, ...], over *shards* ranks.

    This is dim 0, the experts, where they divide evenly; else the hidden size, as the intermediate size may be a
    concatenation of gate and up, which checkpoints may store as two tensors.
    """
    hidden = part.config.get_text_config().hidden_size
    even = [dim for dim, size in enumerate(shape) if size % shards == 0 and (dim == 0 or size == hidden)]
    if not even:
        raise TopologyError(
            [
                f"{shards} ranks share {name} of shape {shape}, but neither its experts nor the hidden "
                f"size {hidden} divide evenly; use a larger ep_size, which leaves fewer ranks to share them"
            ]
        )
    return even[0]
