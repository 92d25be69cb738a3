"""``DistributedSetup``: the object that users build, load models with, and get a runtime from."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import attrs

from nemo_dist.hf_model import inner_model
from nemo_dist.planning.mesh_plan import Role
from nemo_dist.planning.sizes import ParallelismSizes
from nemo_dist.planning.validation import shown
from nemo_dist.plugin.hookspecs import RuntimePart
from nemo_dist.plugin.parts import judge_parts
from nemo_dist.plugin.protocol import declared
from nemo_dist.plugin.registry import Registry
from nemo_dist.setup.build_arguments import judge_runtime_options, launched_ranks, mesh_ranks
from nemo_dist.setup.composition import Composition
from nemo_dist.setup.request import Request
from nemo_dist.setup.selection import DEFAULT, Choice, Selection

if TYPE_CHECKING:
    from torch import nn
    from torch.distributed.device_mesh import DeviceMesh

    from nemo_dist.checkpoint.sharded_model import ShardedModel
    from nemo_dist.mesh.mesh_context import MeshContext
    from nemo_dist.training.runtime import Runtime


@attrs.frozen(kw_only=True, eq=False, slots=False)
class DistributedSetup(Composition):
    """The typed description of a distributed run: a mesh plan and the plugins selected for it, in stage order.

    Make one with :meth:`build`, which validates everything and needs neither torch nor a process group. The live mesh,
    :attr:`mesh_context`, is created on first use, on every rank.
    """

    _live_mesh: DeviceMesh | None = attrs.field(default=None, alias="live_mesh")

    @classmethod
    def build(
        cls,
        strategy: Choice = DEFAULT,
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

        ``strategy``: a plugin name, a config object or a plugin instance; "default" is the plugin that fills the role
        "strategy", FSDP2 in nemo_dist itself. ``pipeline_config`` and ``moe_parallel_config``: a config object or a
        dict. ``activation_checkpointing``: False, True or "full", or "selective". ``world_size``: the number of ranks;
        by default that of the process group, else ``WORLD_SIZE`` of the environment, else 1. ``plugins``: further
        plugins, each given like ``strategy``. ``device_type``: "cpu", "cuda", or None for what the process group can
        use. ``ranks``: use only these ranks for the mesh. ``timeout_minutes``: the timeout of every collective on the
        mesh.

        Raises TopologyError (a ValueError) that lists *every* problem, TypeError for a value of the wrong type, and
        PluginError for a plugin that is missing or broken.
        """
        sizes = ParallelismSizes() if parallelism_sizes is None else parallelism_sizes
        if not isinstance(sizes, ParallelismSizes):
            raise TypeError(
                f"parallelism_sizes must be a ParallelismSizes (got {shown(sizes)}); write ParallelismSizes(tp_size=2)"
            )
        total = launched_ranks() if world_size is None else world_size
        problems: list[str] = []
        members, total = mesh_ranks(ranks, total, problems)
        request = Request.select(
            sizes,
            total,
            registry or Registry(),
            strategy=strategy,
            pipeline_config=pipeline_config,
            moe_parallel_config=moe_parallel_config,
            activation_checkpointing=activation_checkpointing,
            plugins=plugins,
            problems=problems,
        )
        late: list[str] = []
        judge_runtime_options(device_type, timeout_minutes, late)
        return cls(
            plan=request.plan(request.sizes, total, device_type, late),
            plugins=request.plugins,
            parallelism_sizes=request.sizes,
            activation_checkpointing=request.recompute,
            device_type=device_type,
            timeout_minutes=timeout_minutes,
            ranks=members,
        )

    @classmethod
    def from_mesh(cls, device_mesh: DeviceMesh) -> DistributedSetup:
        """Wrap the user's own DeviceMesh in a setup with default policies, as ``device_mesh=`` of the loaders does.

        The axes may be ``pp``, ``dp_replicate``, ``dp_shard`` (or ``dp``), ``cp`` and ``tp``, in any order; collective
        when they are not in that order, because a new mesh is then created.
        """
        from nemo_dist.mesh.mesh_context import MeshContext, in_order

        MeshContext.from_meshes(device_mesh)  # raises for an invalid mesh
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
        strategy = selection.strategy() if context.size(Role.TOKENS) > 1 else None
        selection.axes(sizes, device_mesh.size())
        if strategy is not None:
            selection.judge_composition(strategy, sizes, device_mesh.size())
        plan = Request.of(selection, sizes).plan(sizes, device_mesh.size(), device_mesh.device_type)
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

        Raises ValueError for a key that appears twice, and OSError for a file that cannot be read.
        """
        from nemo_dist.setup.yaml_section import read_yaml

        return cls.from_dict(read_yaml(path), world_size)

    def to_dict(self) -> dict[str, Any]:
        """Return the section that ``from_dict`` builds this setup from: plain values without defaults.

        Raises ValueError for a setup with a plugin that is not installed, or an option that YAML cannot express.
        """
        from nemo_dist.setup.config_section import section_of

        return section_of(self, Registry())

    def __deepcopy__(self, memo: object) -> DistributedSetup:
        """Return this object: a copy of a model was loaded with the same setup."""
        return self

    @cached_property
    def mesh_context(self) -> MeshContext:
        """The live mesh of this setup; the first use is collective over all ranks of the process group.

        Raises RankError without a process group, and one that names the ranks and fields when ranks built different
        setups.
        """
        from nemo_dist.mesh.mesh_context import MeshContext
        from nemo_dist.mesh.process_group import require_process_group
        from nemo_dist.mesh.store_consensus import compare

        if self._live_mesh is not None:
            return MeshContext.from_meshes(self._live_mesh)
        require_process_group()
        compare("the setup", self.describe())
        return MeshContext.realise(self.plan, self.ranks, self.device_type, self.timeout_minutes)

    def add_adapters(self, model: Any, config: Any) -> Any:
        """Return *model*, loaded for this setup, with the adapters of *config* of PEFT; call it before ``runtime``.

        Like ``peft.get_peft_model``, but the weights are there whole while the adapters are made, as DoRA needs them,
        and what is in ``modules_to_save`` is trained itself, where PEFT would train a copy; ``save_pretrained`` of the
        result, which all ranks call then, writes it as PEFT does. Of a pipeline the stages are wrapped, and it is
        returned itself. Collective. Raises ValueError for axes that adapters are not proven with, for adapters that
        copy weights otherwise, and for ``modules_to_save`` that share weights with others or are not there.
        """
        from nemo_dist.training.peft_adapters import add_adapters

        return add_adapters(model, config, self.mesh_context, self.plugins, self.sharded)

    def seed(self, seed: int) -> None:
        """Seed the generators of torch, Python and NumPy on this rank, for dropout and whatever else is drawn.

        Ranks that read different batches get different seeds, and ranks that share a batch the same one, whatever the
        topology; those of the first batch get *seed* itself, as one process does. Before ``from_config`` it fixes the
        weights too. Call it on every rank. Raises RankError when ranks give other seeds.
        """
        from nemo_dist.mesh.rank_group import RankGroup
        from nemo_dist.mesh.store_consensus import compare
        from nemo_dist.training.seed import seed_rank

        mesh = self.mesh_context
        compare("the seed", {"seed": shown(seed)}, RankGroup.of(mesh).ranks)
        seed_rank(mesh, seed)

    @property
    def own_mesh(self) -> DeviceMesh | None:
        """The mesh that the user passed to a loader, with its axes in order; None for a mesh made from the plan."""
        return self._live_mesh

    def shard(self, model: nn.Module) -> list[nn.Module]:
        """Split and shard *model*, whose parameters are on the meta device; return its parts on this rank.

        Raises TopologyError for parameters that the axes cannot shard evenly, PluginError when a plugin replaced the
        model.
        """
        from nemo_dist.loading.hf_weight_loader import refuse_uneven

        parts = [model]
        for plugin, _ in self.calls.each("shard", parts=parts, mesh=self.mesh_context, plan=self.plan):
            judge_parts(plugin, "shard", parts, [model])
        refuse_uneven(parts)
        return parts

    def wrap(self, parts: list[nn.Module]) -> object:
        """Run the ``wrap`` hooks on *parts*, whose weights are loaded, and return what the loader gives to the user."""
        from nemo_dist.training.step_loss import refuse_in_losses

        models = [inner_model(part) for part in parts]
        for plugin, _ in self.calls.each("wrap", parts=parts, mesh=self.mesh_context, plan=self.plan):
            judge_parts(plugin, "wrap", parts, models)
        for model in models:
            refuse_in_losses(model, self.mesh_context)
        for part in parts:
            part.distributed_setup = self  # type: ignore[assignment]  # a plain attribute that runtime() compares
        presented = self.calls.only("present", parts=parts, mesh=self.mesh_context, plan=self.plan)
        return parts[0] if presented is None else presented

    def runtime(
        self,
        model: object,
        check_replicas: int | None = None,
        *,
        loss: Callable[[Any, Mapping[str, Any]], tuple[Any, Any]] | None = None,
    ) -> Runtime:
        """Return the runtime for a training loop; *model* is what the loader returned for this setup.

        ``check_replicas``: compare what ranks hold whole, parameters and gradients, in every that many steps, beside
        the first two; 0 compares nothing. ``loss``: a function of the model's outputs and the batch, in place of the
        model's own loss; it returns losses and their weights, tensors of one shape, or a sum and a count. It sees whole
        rows and whole logits under every topology; docs/losses.md says what else it may say of itself.

        Raises ValueError for a model that was loaded with another setup, and without ``loss`` for one whose own loss is
        not known to be a mean over labels.
        """
        from torch import nn

        from nemo_dist.mesh.process_group import made_on_cpu
        from nemo_dist.training.runtime import Runtime

        parts = [model] if isinstance(model, nn.Module) else list(getattr(model, "parts", ()))
        for part in parts or [None]:
            owner = getattr(part, "distributed_setup", None)
            if owner is not self:
                made = "another setup" if owner is not None else "no setup"
                raise ValueError(f"the model was loaded with {made}; load it with distributed_setup=<this setup> first")
        with made_on_cpu():  # what models are tried out with
            return Runtime.assemble(model, self.sharded(parts), self.runtime_parts, self.plugins, check_replicas, loss)

    def sharded(self, parts: Sequence[nn.Module]) -> ShardedModel:
        """Return *parts* with what saving, loading and exporting need to know about them."""
        from nemo_dist.checkpoint.sharded_model import ShardedModel

        return ShardedModel(
            parts=tuple(parts),
            mesh=self.mesh_context,
            calls=self.calls,
            strategy=self.strategy.name if self.strategy else None,
            plugins={plugin.name: type(plugin).__module__.partition(".")[0] for plugin in self.plugins},
            differing=tuple(plugin.name for plugin in self.plugins if declared(plugin, "replicas_differ")),
        )

    def runtime_parts(self, parts: list[nn.Module], model: object) -> dict[str, RuntimePart]:
        """Return the runtime part of each plugin that has one, by plugin name, in stage order."""
        answers = self.calls.each("runtime", parts=parts, mesh=self.mesh_context, plan=self.plan, model=model)
        return {name: part for name, part in answers if part is not None}

    def explain(self, model: Any = None, rows: int = 1, length: int | None = None) -> str:
        """Return a text with the axes, the plugins that claim them, what plugins and a step do, and this rank's place.

        ``model``: a transformers model, for example on the meta device; with it, collectives are listed with the bytes
        that one rank sends. ``rows`` and ``length``: the batch of one data-parallel rank, by default one sequence of
        the model's maximum length.
        """
        from nemo_dist.setup.explain import explanation

        return explanation(self, self.own_mesh, model, rows, length)

    def explain_page(self, model: Any = None, rows: int = 1, length: int | None = None, ranks_per_node: int = 8) -> str:
        """Return one HTML page with pictures of the mesh, of memory by stage, of the schedule and of the collectives.

        The page needs no network and no other file. ``model``, ``rows`` and ``length``: as for ``explain``; without a
        model there are no bytes. ``ranks_per_node``: how many consecutive ranks share a machine.
        """
        from nemo_dist.setup.explain_page import page

        return page(self, model, rows, length, ranks_per_node)
