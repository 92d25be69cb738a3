"""The laws of the conformance kit that need no ranks: what a plugin says, takes, plans and refuses."""

from __future__ import annotations

import inspect
import subprocess
import sys
from typing import Any

import attrs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_dist.errors import TopologyError
from nemo_dist.planning.mesh_plan import MeshPlan
from nemo_dist.planning.sizes import ParallelismSizes
from nemo_dist.plugin.hook_caller import PluginCalls
from nemo_dist.plugin.options import option_names
from nemo_dist.plugin.protocol import Plugin, Stage, declared
from nemo_dist.setup.setup import DistributedSetup
from nemo_dist.testing import laws, strategies
from nemo_dist.testing.kit import Kit, settings_of
from nemo_dist.testing.selecting import MODEL_AXES
from nemo_dist.testing.tiny_models import SPECIMENS


class PlanningLaws(Kit):
    """The tests without ranks."""

    def test_the_catalogue_has_it_complete(self) -> None:
        """The class has the attributes of ``nemo_dist.Plugin``, a docstring, and a config that names the plugin."""
        with laws.CATALOGUE.judging(self.plugin):
            kind = self.plugin_type
            plugin = kind(kind.config_type())
        config = getattr(kind.config_type, "plugin", None)
        lacking = [
            (not isinstance(plugin, Plugin), "its class lacks 'config'"),
            (
                not inspect.cleandoc(kind.__doc__ or ""),
                "its class has no docstring; nemo-dist plugins shows the first line",
            ),
            (config != self.plugin, f"{kind.config_type.__name__}.plugin is {config!r}"),
        ]
        laws.CATALOGUE.hold(self.plugin, [line for lacks, line in lacking if lacks])

    def test_it_is_hashed_by_identity(self) -> None:
        """Two plugins with equal configs compare unequal, as pluggy hashes plugins and two setups may hold one each."""
        config = self.plugin_type.config_type()
        assert self.plugin_type(config) != self.plugin_type(config), "decorate it with @attrs.frozen(eq=False)"

    def test_its_config_is_an_unchanging_value(self) -> None:
        """The config is immutable, and equal ones have equal reprs without addresses, as ranks compare them as text."""
        one, other = self.plugin_type.config_type(), self.plugin_type.config_type()
        lines = [f"{one!r} and {other!r} are of equal options"] if one != other or repr(one) != repr(other) else []
        lines += [f"{one!r} has an address"] if " at 0x" in repr(one) else []
        for field in attrs.fields(type(one)) if attrs.has(type(one)) else ():
            try:
                setattr(one, field.name, None)
                lines.append(f"{field.name} can be set after it was made")
            except AttributeError:
                pass
        laws.VALUE.hold(self.plugin, lines)

    def test_a_section_of_a_configuration_gives_it_back(self) -> None:
        """``to_dict`` of a setup with the plugin gives plain values from which ``from_dict`` builds the same setup."""
        setup = DistributedSetup.build(**self.selecting(), world_size=self.world)
        with laws.ROUND_TRIP.judging(self.plugin):
            again = DistributedSetup.from_dict(setup.to_dict(), world_size=self.world).describe()
        lines = [f"{name}: {value}, and again {again.get(name)}" for name, value in setup.describe().items()]
        laws.ROUND_TRIP.hold(
            self.plugin,
            [
                line
                for line, (name, value) in zip(lines, setup.describe().items(), strict=True)
                if again.get(name) != value
            ],
        )

    def test_it_says_what_its_options_mean(self) -> None:
        """The docstring of the config class names every option."""
        config_type = self.plugin_type.config_type
        said = config_type.__doc__ or ""
        options = option_names(config_type) if attrs.has(config_type) else []
        lines = [f"{config_type.__name__} says nothing of {name!r}" for name in options if name not in said]
        laws.DOCUMENTED.hold(self.plugin, lines or ([] if said else [f"{config_type.__name__} has no docstring"]))

    def test_its_hooks_keep_the_contract(self) -> None:
        """The plugin has no misspelled hook, no default on a hook argument, and no order other than its stage."""
        PluginCalls([self.plugin_type(self.plugin_type.config_type())])

    def test_importing_it_does_not_import_torch(self) -> None:
        """Importing the plugin must not import torch, so that planning works in processes without it."""
        load = f"import sys; from nemo_dist import Registry; Registry().load({self.plugin!r})"
        code = f"{load}; sys.exit('torch' in sys.modules)"
        left = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
        lines = [left.stderr.strip().splitlines()[-1] if left.stderr else "torch is imported after it"]
        laws.LAZY.hold(self.plugin, lines if left.returncode else [])

    def test_it_judges_any_plan_without_raising(self) -> None:
        """Planning hooks return the same each time, on every rank, for any plan, and raise nothing."""
        plugin = self.instance()
        calls = PluginCalls([plugin])
        own = sorted(declared(plugin, "roles")) or sorted(plugin.axes - {*strategies.AXES, "ep"})

        @settings(deadline=None)  # a slow machine is no failure
        @given(topology=strategies.topologies(), size=st.integers(1, 3))
        def judged_alike_each_time(topology: tuple[ParallelismSizes, int], size: int) -> None:
            sizes, world_size = topology
            if own:
                sizes = attrs.evolve(sizes, extra={own[0]: size}).with_roles(declared(plugin, "roles"))
                world_size *= size if own[0] in sizes.roles else 1
            answers = []
            for rank in (0, 1):
                with laws.as_rank(rank), laws.PURE.judging(self.plugin):
                    answers.append(_judged(calls, plugin, sizes, world_size))
            lines = [f"{hook}() returned {answers[0][hook]!r}, and then {answers[1][hook]!r}" for hook in answers[0]]
            laws.PURE.hold(
                self.plugin,
                [line for line, hook in zip(lines, answers[0], strict=True) if answers[0][hook] != answers[1][hook]],
            )

        judged_alike_each_time()

    def test_it_says_what_it_does(self) -> None:
        """``explain`` starts with the plugin's name, so that a reader can tell which plugin does what."""
        setup = DistributedSetup.build(**self.selecting(), world_size=self.world)
        with laws.EXPLAINS.judging(self.plugin):
            lines = setup.calls.explain(plan=setup.plan, model=None)
        said = any(line.startswith(self.plugin) for line in lines)
        laws.EXPLAINS.hold(self.plugin, [] if said else [f"the setup says {line!r}" for line in lines] or ["nothing"])

    def test_it_leaves_a_model_that_it_explains_as_it_is(self) -> None:
        """``explain`` of a model changes no weight, flag or setting of it."""
        model = SPECIMENS[self.specimen].make(0)
        before = _portrait(model)
        with laws.UNCHANGED.judging(self.plugin):
            DistributedSetup.build(**self.selecting(), world_size=self.world).explain(model)
        after = _portrait(model)
        laws.UNCHANGED.hold(self.plugin, [f"{what} is another one" for what in before if before[what] != after[what]])

    def test_a_strategy_refuses_the_axes_it_does_not_compose_with(self) -> None:
        """``build`` rejects an axis that the strategy does not declare; the error names the axis and its size."""
        if self.plugin_type.stage != Stage.DATA:
            pytest.skip(f"{self.plugin!r} is no strategy")
        refused = [axis for axis in MODEL_AXES if axis not in self.plugin_type.composes_with | self.plugin_type.axes]
        if not refused:
            pytest.skip(f"{self.plugin!r} composes with every axis that has a size of its own")
        for axis in refused:
            options = self.selecting() | {"parallelism_sizes": ParallelismSizes(**{f"{axis}_size": 2})}
            with pytest.raises(TopologyError, match=f"axis '{axis}' has size 2, but strategy '{self.plugin}'"):
                DistributedSetup.build(**options, world_size=4)


def _judged(calls: PluginCalls, plugin: Any, sizes: ParallelismSizes, world_size: int) -> dict[str, Any]:
    """Return what the planning hooks say of *sizes* on *world_size* ranks."""
    views = [] if sizes.problems(world_size) else calls.views(sizes=sizes, world_size=world_size)
    try:
        plan = MeshPlan.resolve(sizes, world_size, tuple(view for found in views for view in found))
    except TopologyError:
        plan = MeshPlan.nearest(sizes, world_size)
    problems = calls.validate(plan=plan, sizes=sizes, plugins=(plugin,), device_type=None)
    return {"views": views, "validate": problems, "agree": calls.agree(plan=plan)}


def _portrait(model: Any) -> dict[str, Any]:
    """Return what of a plain *model* can be compared by value: its settings, and of each tensor all but its storage."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    told = {name: (t.dtype, t.device, t.requires_grad, t.flatten().tolist()) for name, t in tensors.items()}
    return told | {f"setting {name!r}": value for name, value in settings_of(model).items()}
