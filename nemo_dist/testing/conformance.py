"""The conformance kit: the tests that every plugin must pass, ours and third-party ones alike.

Three lines in a test module run it; the ranks come from the ``ranks`` fixture of nemo_dist's pytest plugin::

    from nemo_dist.testing import PluginConformance

    class TestMine(PluginConformance):
        plugin = "mine"
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import attrs
import pytest
from hypothesis import given, settings

from nemo_dist.errors import TopologyError
from nemo_dist.planning.mesh_plan import MeshPlan
from nemo_dist.planning.sizes import ParallelismSizes
from nemo_dist.plugin.hook_caller import PluginCalls
from nemo_dist.plugin.protocol import Plugin, Stage
from nemo_dist.plugin.registry import Registry
from nemo_dist.setup.setup import DistributedSetup
from nemo_dist.testing import strategies
from nemo_dist.testing.equivalence import Task, assert_equivalent

_MODEL_AXES = ("pp", "cp", "tp", "ep")


class PluginConformance:
    """The conformance tests: subclass it in a test module and set ``plugin`` to the plugin's registered name.

    ``build`` are the keywords of ``DistributedSetup.build`` that select the plugin on ``world`` ranks, with all
    computation in float32; by default ``strategy=plugin`` for a strategy and ``plugins=(plugin,)`` for another plugin.
    ``specimen`` names the model of ``nemo_dist.testing.tiny_models`` to train.
    """

    plugin: ClassVar[str]
    build: ClassVar[Mapping[str, Any] | None] = None
    world: ClassVar[int] = 2
    specimen: ClassVar[str] = "llama"

    @property
    def plugin_type(self) -> Any:
        """The registered plugin class."""
        return Registry().load(self.plugin)

    def selecting(self) -> dict[str, Any]:
        """Return the keywords of ``build`` that select the plugin."""
        if self.build is not None:
            return dict(self.build)
        is_strategy = self.plugin_type.stage == Stage.DATA
        return {"strategy": self.plugin} if is_strategy else {"plugins": (self.plugin,)}

    def test_the_catalogue_has_it_complete(self) -> None:
        """The class has the attributes of ``nemo_dist.Plugin``, a docstring, and a config that names the plugin."""
        plugin = self.plugin_type(self.plugin_type.config_type())

        assert isinstance(plugin, Plugin)
        assert self.plugin_type.__doc__, "nemo-dist plugins shows the first line of the docstring"
        assert self.plugin_type.config_type.plugin == self.plugin

    def test_it_is_hashed_by_identity(self) -> None:
        """Two plugins with equal configs compare unequal, as pluggy hashes plugins and two setups may hold one each."""
        config = self.plugin_type.config_type()
        assert self.plugin_type(config) != self.plugin_type(config), "decorate it with @attrs.frozen(eq=False)"

    def test_its_config_is_an_unchanging_value(self) -> None:
        """The config is immutable, and equal ones have equal reprs without addresses, as ranks compare them as text."""
        one, other = self.plugin_type.config_type(), self.plugin_type.config_type()

        assert one == other and repr(one) == repr(other)
        assert " at 0x" not in repr(one)
        for field in attrs.fields(type(one)) if attrs.has(type(one)) else ():
            with pytest.raises(AttributeError):
                setattr(one, field.name, None)

    def test_its_hooks_keep_the_contract(self) -> None:
        """The plugin has no misspelled hook, no default on a hook argument, and no order other than its stage."""
        PluginCalls([self.plugin_type(self.plugin_type.config_type())])

    def test_importing_it_does_not_import_torch(self) -> None:
        """Importing the plugin must not import torch, so that planning works in processes without it."""
        load = f"import sys; from nemo_dist import Registry; Registry().load({self.plugin!r})"
        code = f"{load}; sys.exit('torch' in sys.modules)"
        assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

    def test_it_judges_any_plan_without_raising(self) -> None:
        """``validate`` returns the same sentences each time, for any plan, and raises nothing."""
        plugin = self.plugin_type(self.plugin_type.config_type())
        calls = PluginCalls([plugin])

        @settings(deadline=None)  # a slow machine is no failure
        @given(topology=strategies.topologies())
        def judged_alike_each_time(topology: tuple[ParallelismSizes, int]) -> None:
            sizes, world_size = topology
            plan = MeshPlan.nearest(sizes, world_size)
            given: dict[str, Any] = {"plan": plan, "sizes": sizes, "plugins": (plugin,), "device_type": None}
            first = calls.validate(**given)
            assert first == calls.validate(**given)
            assert all(isinstance(sentence, str) and sentence for found in first for sentence in found)

        judged_alike_each_time()

    def test_it_says_what_it_does(self) -> None:
        """``explain`` starts with the plugin's name, so that a reader can tell which plugin does what."""
        setup = DistributedSetup.build(**self.selecting(), world_size=self.world)
        assert any(line.startswith(self.plugin) for line in setup.calls.explain(plan=setup.plan, model=None))

    def test_a_strategy_refuses_the_axes_it_does_not_compose_with(self) -> None:
        """``build`` rejects an axis that the strategy does not declare; the error names the axis and its size."""
        if self.plugin_type.stage != Stage.DATA:
            return
        for axis in _MODEL_AXES:
            if axis in self.plugin_type.composes_with | self.plugin_type.axes:
                continue
            options = self.selecting() | {"parallelism_sizes": ParallelismSizes(**{f"{axis}_size": 2})}
            with pytest.raises(TopologyError, match=f"axis '{axis}' has size 2, but strategy '{self.plugin}'"):
                DistributedSetup.build(**options, world_size=4)

    def test_it_computes_what_one_process_computes(self, ranks: Callable[[int], Any]) -> None:
        """Losses, gradients, unclipped norms and the parameters after three AdamW steps equal those of one process."""
        assert_equivalent(ranks(self.world), Task(specimen=self.specimen), **self.selecting())

    def test_it_accumulates_what_one_process_computes(self, ranks: Callable[[int], Any]) -> None:
        """Training with gradient accumulation over three batches per step equals training on one process."""
        assert_equivalent(ranks(self.world), Task(specimen=self.specimen, accumulate=3), **self.selecting())
