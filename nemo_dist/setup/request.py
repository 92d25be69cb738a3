"""Judge a request: select its plugins once, then plan sizes with them; ``build`` does so once, a search many times.

Which plugins a request selects, and how they compose, depends on the axes that are wide, not on how wide they are.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property
from typing import Any

import attrs

from nemo_dist.errors import TopologyError
from nemo_dist.planning.mesh_plan import MeshPlan, View
from nemo_dist.planning.sizes import ParallelismSizes
from nemo_dist.plugin.hook_caller import PluginCalls
from nemo_dist.plugin.protocol import Plugin
from nemo_dist.plugin.registry import Registry
from nemo_dist.setup.build_arguments import select_recompute
from nemo_dist.setup.composition import in_order
from nemo_dist.setup.selection import DEFAULT, Choice, Selection


@attrs.frozen(kw_only=True, eq=False, slots=False)
class Request:
    """The plugins selected for a request, in stage order, and what is wrong with them, whatever the sizes.

    ``recompute``: activation checkpointing as it was asked for. ``sizes``: those asked for, with the roles that plugins
    declare.
    """

    plugins: tuple[Plugin, ...]
    problems: tuple[str, ...]
    recompute: bool | str
    sizes: ParallelismSizes

    @classmethod
    def select(
        cls,
        sizes: ParallelismSizes,
        world_size: int,
        registry: Registry,
        *,
        strategy: Choice = DEFAULT,
        pipeline_config: Any = None,
        moe_parallel_config: Any = None,
        activation_checkpointing: bool | str = False,
        plugins: Iterable[Choice] = (),
        problems: Iterable[str] = (),
    ) -> Request:
        """Select the plugins for the keywords of ``build``; *problems* are those that were found before."""
        selection = Selection(registry, problems=list(problems))
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
        sizes = selection.own_axes(sizes)
        selection.axes(sizes, world_size)
        recompute = select_recompute(activation_checkpointing, chosen, selection)
        selection.judge_composition(chosen, sizes, world_size)
        return cls.of(selection, sizes, recompute)

    @classmethod
    def of(cls, selection: Selection, sizes: ParallelismSizes, recompute: bool | str = False) -> Request:
        """Return the request whose plugins *selection* has."""
        ordered = in_order(selection.plugins)
        return cls(
            plugins=ordered,
            problems=tuple(selection.problems),
            recompute=recompute,
            sizes=sizes,
        )

    @cached_property
    def calls(self) -> PluginCalls:
        """Calls the hooks of these plugins."""
        return PluginCalls(self.plugins)

    def plan(
        self, sizes: ParallelismSizes, world_size: int, device_type: str | None, problems: Iterable[str] = ()
    ) -> MeshPlan:
        """Return the plan of *sizes*; raise one TopologyError with every problem, *problems* included.

        The wide axes of *sizes* are those that the plugins were selected for.
        """
        found = [*self.problems, *problems]
        plan, more = self.judged(sizes, world_size, device_type)
        if found or more:
            raise TopologyError([*found, *more])
        return plan

    def judged(
        self,
        sizes: ParallelismSizes,
        world_size: int,
        device_type: str | None = None,
        known: dict[tuple[View, ...], MeshPlan] | None = None,
    ) -> tuple[MeshPlan, list[str]]:
        """Return the plan of *sizes* or the nearest one, and what is wrong with the sizes and with the plan.

        *known*: the plans of these sizes that were made before, by their additional views.
        """
        known = {} if known is None else known
        problems = [] if known else sizes.problems(world_size)
        plan = None
        if not problems:
            views = tuple(view for found in self.calls.views(sizes=sizes, world_size=world_size) for view in found)
            try:
                plan = known[views] if views in known else MeshPlan.resolve(sizes, world_size, views)
                known[views] = plan
            except TopologyError as error:
                problems = [*problems, *error.problems]
        plan = plan or MeshPlan.nearest(sizes, world_size)
        for found in self.calls.validate(plan=plan, sizes=sizes, plugins=self.plugins, device_type=device_type):
            problems = [*problems, *found]
        return plan, problems
