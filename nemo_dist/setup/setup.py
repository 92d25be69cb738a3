"""A setup is the plan of a mesh and the plugins that act on it, in stage order."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import attrs

from nemo_dist.errors import TopologyError
from nemo_dist.planning.mesh_plan import MeshPlan, View
from nemo_dist.planning.sizes import ParallelismSizes
from nemo_dist.plugin.hook_caller import PluginCalls
from nemo_dist.plugin.hookspecs import RuntimePart
from nemo_dist.plugin.registry import Plugin, Registry, Stage
from nemo_dist.setup.build_arguments import judge_runtime_options, launched_ranks, mesh_ranks, select_recompute
from nemo_dist.setup.selection import Choice, Selection

if TYPE_CHECKING:
    from torch import nn
    from torch.distributed.device_mesh import DeviceMesh

    from nemo_dist.mesh.mesh_context import MeshContext
    from nemo_dist.training.runtime import Runtime


def _in_stage_order(plugins: Iterable[Plugin]) -> tuple[Plugin, ...]:
    return tuple(sorted(plugins, key=lambda plugin: (plugin.stage, plugin.name)))


@attrs.frozen(kw_only=True, eq=False)
class DistributedSetup:
    """The typed description of a distributed run: a mesh plan and the plugins selected for it, in stage order.

    Make one with :meth:`build`; it is complete and valid, and neither torch nor a process group was needed. The live
    mesh is :attr:`mesh_context`, made on first use, on every rank.
    """

    plan: MeshPlan
    plugins: tuple[Plugin, ...] = attrs.field(converter=_in_stage_order)
    parallelism_sizes: ParallelismSizes
    activation_checkpointing: str | bool = False
    device_type: str | None = None
    timeout_minutes: float | None = None
    ranks: tuple[int, ...] | None = None
    _live_mesh: DeviceMesh | None = attrs.field(default=None, alias="live_mesh")

    @classmethod
    def build(
        cls,
        strategy: Choice = "fsdp2",
        parallelism_sizes: ParallelismSizes | None = None,
        pipeline_config: Any = None,
        moe_parallel_config: Any = None,
        activation_checkpointing: bool | str = False,
        world_size: int | None = None,
        *,
        plugins: Iterable[Choice] = (),
        device_type: str | None = None,
        timeout_minutes: float | None = None,
        ranks: Sequence[int] | None = None,
        registry: Registry | None = None,
    ) -> DistributedSetup:
        """Select the plugins, plan the mesh and validate everything, without torch and without a process group.

        ``strategy``: a plugin name, a config object or a plugin instance. ``pipeline_config`` and
        ``moe_parallel_config``: a config object or a dict. ``activation_checkpointing``: False, True or "full", or
        "selective". ``world_size``: the number of ranks; by default that of the process group, else of the launcher's
        environment, else 1. ``ranks``: lay the mesh over these ranks only. ``timeout_minutes``: limit of every
        collective on the mesh.

        Raises TopologyError (a ValueError) that lists *every* problem, TypeError for a value of the wrong type, and
        PluginError for a plugin that is missing or broken.
        """
        sizes = ParallelismSizes() if parallelism_sizes is None else parallelism_sizes
        if not isinstance(sizes, ParallelismSizes):
            raise TypeError(
                f"parallelism_sizes must be a ParallelismSizes (got {sizes!r}); write ParallelismSizes(tp_size=2)"
            )
        total = launched_ranks() if world_size is None else world_size
        selection = Selection(registry or Registry())
        members, total = mesh_ranks(ranks, total, selection.problems)
        chosen = selection.strategy(strategy)
        selection.extras(plugins)
        for role, keyword, value, size in (
            ("pp", "pipeline_config", pipeline_config, sizes.pp_size),
            ("ep", "moe_parallel_config", moe_parallel_config, sizes.ep_size),
        ):
            if value is not None and size == 1:
                selection.problems.append(
                    f"{keyword} was given, but {role}_size is 1; set {role}_size > 1 or leave it out"
                )
            elif value is not None:
                selection.option(role, keyword, value)
        selection.axes(sizes, total)
        mode = select_recompute(activation_checkpointing, chosen, selection)
        selection.judge_composition(chosen, sizes, total)
        judge_runtime_options(device_type, timeout_minutes, selection.problems)
        return cls(
            plan=_plan(sizes, total, selection, device_type),
            plugins=selection.plugins,
            parallelism_sizes=sizes,
            activation_checkpointing=mode or False,
            device_type=device_type,
            timeout_minutes=timeout_minutes,
            ranks=members,
        )

    @classmethod
    def from_mesh(cls, device_mesh: DeviceMesh) -> DistributedSetup:
        """Wrap the user's own DeviceMesh in a setup with default policies, as ``device_mesh=`` of the loaders does.

        The axes may be ``pp``, ``dp_replicate``, ``dp_shard`` (or ``dp``), ``cp`` and ``tp``, in any order.
        """
        from nemo_dist.mesh.mesh_context import MeshContext, in_order

        MeshContext.from_meshes(device_mesh)  # judges it
        device_mesh = in_order(device_mesh)
        context = MeshContext.from_meshes(device_mesh)
        sizes = ParallelismSizes(
            tp_size=context.tp_size,
            pp_size=context.pp_size,
            cp_size=context.cp_size,
            dp_size=context.dp_size,
            dp_replicate_size=context.dp_replicate_size,
        )
        selection = Selection(Registry())
        if context.dp_size * context.cp_size > 1:
            strategy = selection.strategy("fsdp2")
            selection.axes(sizes, device_mesh.size())
            selection.judge_composition(strategy, sizes, device_mesh.size())
        else:
            selection.axes(sizes, device_mesh.size())
        plan = _plan(sizes, device_mesh.size(), selection, device_mesh.device_type)
        return cls(plan=plan, plugins=selection.plugins, parallelism_sizes=sizes, live_mesh=device_mesh)

    @classmethod
    def from_dict(cls, section: Mapping[str, Any], world_size: int | None = None) -> DistributedSetup:
        """Build from the ``distributed:`` section of a configuration: a flat mapping of plain values.

        Keys: ``strategy``, the sizes of ParallelismSizes, the options of the strategy (dtypes by name),
        ``activation_checkpointing``, ``pipeline``, ``moe``, ``plugins`` (a mapping from names to options),
        ``device_type``, ``timeout_minutes`` and ``ranks``. Raises UnknownNameError (a ValueError) that names every
        unknown key, and what ``build`` raises.
        """
        from nemo_dist.setup.config_section import build_keywords

        return cls.build(**build_keywords(section, Registry()), world_size=world_size)

    @classmethod
    def from_yaml(cls, path: str | os.PathLike[str], world_size: int | None = None) -> DistributedSetup:
        """Build from the ``distributed:`` section of the YAML file at *path*; see ``from_dict``.

        Raises ValueError for a key that stands twice, and OSError for a file that cannot be read.
        """
        from nemo_dist.setup.config_section import read_yaml

        return cls.from_dict(read_yaml(path), world_size)

    def to_dict(self) -> dict[str, Any]:
        """Return the section that ``from_dict`` builds this setup from: plain values without defaults.

        Raises ValueError for a setup with a plugin that is not installed, or an option that has no plain form.
        """
        from nemo_dist.setup.config_section import section_of

        return section_of(self, Registry())

    @cached_property
    def calls(self) -> PluginCalls:
        """The hooks of the selected plugins, and of nothing else."""
        return PluginCalls(self.plugins)

    @cached_property
    def mesh_context(self) -> MeshContext:
        """The live mesh of this setup; the first use is collective over all ranks of the process group.

        Raises RankError that names the ranks and fields when the ranks built different setups.
        """
        from nemo_dist.mesh.mesh_context import MeshContext

        if self._live_mesh is not None:
            return MeshContext.from_meshes(self._live_mesh)
        return MeshContext.realise(self)

    @property
    def own_mesh(self) -> DeviceMesh | None:
        """The mesh that the user passed to a loader, its axes in order; None for one that is laid by the plan."""
        return self._live_mesh

    @property
    def strategy(self) -> Plugin | None:
        """The selected strategy; None only for a topology wrapped from a mesh without a data axis."""
        return next((plugin for plugin in self.plugins if plugin.stage == Stage.DATA), None)

    @property
    def strategy_config(self) -> Any:
        """The config of the selected strategy."""
        return self.strategy.config if self.strategy else None

    @property
    def pipeline_config(self) -> Any:
        """The config of the plugin that claims ``pp``; None when pp is 1."""
        return self._config_of("pp", self.parallelism_sizes.pp_size)

    @property
    def moe_parallel_config(self) -> Any:
        """The config of the plugin that claims ``ep``; None when ep is 1."""
        return self._config_of("ep", self.parallelism_sizes.ep_size)

    def _config_of(self, axis: str, size: int) -> Any:
        return next((plugin.config for plugin in self.plugins if axis in plugin.axes), None) if size > 1 else None

    def shard(self, model: nn.Module) -> list[nn.Module]:
        """Split and shard *model*, whose parameters are on the meta device; return its local parts.

        Raises TopologyError for parameters that the axes cannot cut.
        """
        from nemo_dist.loading.hf_weight_loader import refuse_uneven

        parts = [model]
        self.calls.shard(parts=parts, mesh=self.mesh_context, plan=self.plan)
        refuse_uneven(parts)
        return parts

    def wrap(self, parts: list[nn.Module]) -> object:
        """Finish *parts*, whose weights are loaded, and return what the user gets."""
        self.calls.wrap(parts=parts, mesh=self.mesh_context, plan=self.plan)
        presented: object | None = self.calls.present(parts=parts, mesh=self.mesh_context, plan=self.plan)
        return parts[0] if presented is None else presented

    def runtime(self, model: object) -> Runtime:
        """Return what a training loop holds; *model* is what the loader returned for this setup."""
        from nemo_dist.training.runtime import Runtime

        return Runtime.assemble(self, model)

    def runtime_parts(self, parts: list[nn.Module], model: object) -> list[RuntimePart]:
        """Return what a step needs of each plugin, in stage order."""
        answers: list[RuntimePart] = self.calls.runtime(
            parts=parts, mesh=self.mesh_context, plan=self.plan, model=model
        )
        return answers

    def explain(self, model: Any = None, rows: int = 1, length: int | None = None) -> str:
        """Say which axes there are, who claims each, what every plugin and every step will do, and this rank's place.

        ``model``: a transformers model, on the meta device for one; with it, the collectives of a step come with the
        bytes that one rank sends. ``rows`` and ``length``: the batch of one data-parallel rank, by default one sequence
        of the greatest length that the model takes.
        """
        from nemo_dist.setup.explain import explanation

        return explanation(self, model, rows, length)

    def describe(self) -> Mapping[str, str]:
        """Return the fields that must be the same on every rank, each as text."""
        fields = {
            "parallelism_sizes": repr(self.parallelism_sizes),
            "plan": repr(self.plan),
            "plugins": ", ".join(plugin.name for plugin in self.plugins),
            "activation_checkpointing": repr(self.activation_checkpointing),
            "device_type": repr(self.device_type),
            "timeout_minutes": repr(self.timeout_minutes),
            "ranks": repr(self.ranks),
        }
        fields |= {f"{plugin.name} config": repr(plugin.config) for plugin in self.plugins}
        for found in self.calls.agree(plan=self.plan):
            fields |= found
        return fields


def _plan(sizes: ParallelismSizes, world_size: int, selection: Selection, device_type: str | None) -> MeshPlan:
    """Return the plan, or raise every problem of the selection, the arithmetic and the plugins at once."""
    plugins = _in_stage_order(selection.plugins)
    calls = PluginCalls(plugins)
    problems = [*selection.problems, *sizes.problems(world_size)]
    nearest = MeshPlan.nearest(sizes, world_size)
    plan = nearest
    if not sizes.problems(world_size):
        views: list[View] = [view for found in calls.views(sizes=sizes, world_size=world_size) for view in found]
        try:
            plan = MeshPlan.resolve(sizes, world_size, tuple(views))
        except TopologyError as error:
            problems += error.problems
    for found in calls.validate(plan=plan, sizes=sizes, plugins=plugins, device_type=device_type):
        problems += found
    if problems:
        raise TopologyError(problems)
    return plan
