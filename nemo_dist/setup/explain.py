"""Explain a setup as text: its axes, which plugin claims each, what every plugin does, and the place of this rank."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from nemo_dist.hf_model import without_adapters
from nemo_dist.mesh.launch_env import launched_rank
from nemo_dist.planning.mesh_plan import FLATTENED, Role
from nemo_dist.planning.validation import integer
from nemo_dist.plugin.comm_estimate import ModelFacts, Traffic, shared
from nemo_dist.plugin.protocol import Plugin, claimants, declared
from nemo_dist.setup.composition import Composition

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def explanation(setup: Composition, own_mesh: DeviceMesh | None, model: Any, rows: int, length: int | None) -> str:
    """Return the text: a line per axis, per plugin and per kind of collective in a step.

    ``own_mesh``: the user's own mesh, if the setup wraps one. Other arguments as for ``DistributedSetup.explain``.
    """
    plan = setup.plan
    lines = [f"{plan.world_size} ranks, strategy {setup.strategy.name if setup.strategy else 'none'}"]
    for view in (plan.dense, *plan.views):
        lines.append(f"mesh {view.name!r}, outermost axis first:")
        for axis in view.axes:
            lines.append(
                f"  {axis.name:<12} {axis.size:>6}  {_claimants(setup.plugins, axis.name) if axis.size > 1 else '-'}"
            )
    lines.append("plugins, in the order they act on the model:")
    with without_adapters(model) as (plain, added):
        lines += [f"  {line}" for line in setup.calls.explain(plan=plan, model=plain)]
        sent = traffic(setup, facts_of(setup, plain, rows, length, added), plain)
    lines += [
        f"  {plugin.name}: does not compute what one process computes, by design"
        for plugin in setup.plugins
        if not declared(plugin, "exact")
    ]
    if sent:
        lines.append("collectives of a step" + (", with the bytes that one rank sends:" if model is not None else ":"))
        lines += [f"  {line}" for line in sent]
    lines += _place(setup, own_mesh)
    return "\n".join(lines)


def _place(setup: Composition, own_mesh: DeviceMesh | None) -> list[str]:
    """Return a line with the coordinates of this rank, in the user's own mesh or (by ``RANK``) in the plan."""
    if own_mesh is not None:
        rank, place, together = _in_own_mesh(own_mesh)
    else:
        rank = launched_rank()
        if rank >= setup.plan.world_size or setup.ranks is not None:
            return []
        place, together = setup.plan.coordinates(rank), list(setup.plan.batch_ranks(rank))
        place = {name: index for name, index in place.items() if setup.plan.size(name) > 1}
    where = ", ".join(f"{name} {index}" for name, index in place.items())
    return [f"rank {rank}: {where or 'alone'}; reads the same batch as ranks {together}"]


def _in_own_mesh(mesh: DeviceMesh) -> tuple[int, dict[str, int], list[int]]:
    """Return this rank, its coordinates in *mesh*, and the ranks with the same data-parallel coordinates."""
    place = dict(zip(mesh.mesh_dim_names or (), mesh.get_coordinate() or (), strict=False))
    batch = {*FLATTENED["dp"], "dp"}
    here = tuple(index if name in batch else slice(None) for name, index in place.items())
    return mesh.get_rank(), place, sorted(mesh.mesh[here].flatten().tolist())


def _claimants(plugins: Iterable[Plugin], axis: str) -> str:
    return ", ".join(plugin.name for plugin in claimants(plugins, axis))


def traffic(setup: Composition, facts: ModelFacts | None, model: Any) -> list[Traffic]:
    """Return the collectives of a step: those of plugins, and that of adapters, which every rank has whole."""
    plan = setup.plan
    found = [line for lines in setup.calls.traffic(plan=plan, facts=facts, model=model) for line in lines]
    ranks = plan.splitting(Role.TOKENS)
    if facts is not None and facts.adapter_bytes and ranks > 1:
        sent = 2 * shared(ranks, facts.adapter_bytes / plan.splitting(Role.LAYERS))
        axis = "dp" if plan.size("dp") == ranks else "dp_cp"
        found.append(Traffic(axis=axis, collective="all-reduce", of="gradients of adapters", often="once", sent=sent))
    return found


def facts_of(
    setup: Composition, model: Any, rows: int, length: int | None, added: Mapping[str, Any] = MappingProxyType({})
) -> ModelFacts | None:
    """Return the numbers of *model* and of a batch of *rows* sequences of *length* tokens; None without a model.

    *added*: the parameters of its adapters. Raises TypeError or ValueError for other rows and lengths than ints from 1
    up.
    """
    integer("rows", rows)
    if length is not None:
        integer("length", length)
    if model is None:
        return None
    return ModelFacts.of(
        model,
        rows,
        length or model.config.get_text_config().max_position_embeddings,
        declared(setup.strategy, "compute_dtype"),
        setup.recompute_mode == "full",
        added,
    )
