"""The conformance kit: the laws that every plugin keeps, ours and third-party ones alike.

Three lines in a test module run it; the ranks come from the ``ranks`` fixture of nemo_dist's pytest plugin::

    from nemo_dist.testing import PluginConformance

    class TestMine(PluginConformance):
        plugin = "mine"

Each test holds one law of ``nemo_dist.testing.laws``. A failure names the law, the numbers and where to look.
"""

from __future__ import annotations

import inspect
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import attrs
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_dist.errors import TopologyError
from nemo_dist.planning.mesh_plan import MeshPlan
from nemo_dist.planning.sizes import ParallelismSizes
from nemo_dist.plugin.hook_caller import PluginCalls
from nemo_dist.plugin.options import option_names
from nemo_dist.plugin.protocol import Plugin, Stage, declared
from nemo_dist.plugin.registry import Registry
from nemo_dist.setup.setup import DistributedSetup
from nemo_dist.testing import conformance_evaluation as evaluation
from nemo_dist.testing import conformance_runs as runs
from nemo_dist.testing import conformance_user as user
from nemo_dist.testing import laws, strategies
from nemo_dist.testing.conformance_cases import Case, Untried, composed_cases
from nemo_dist.testing.conformance_runs import Stretch
from nemo_dist.testing.diagnosis import hints
from nemo_dist.testing.equivalence import (
    TOLERANCE,
    Outcome,
    Task,
    checkpoint,
    differences,
    mean_of_replicas,
    merged,
    reference,
    tensor_differences,
    train_on_rank,
    trained,
)
from nemo_dist.testing.precision import in_float32
from nemo_dist.testing.selecting import MODEL_AXES, default_strategy, smallest
from nemo_dist.testing.temp_folders import scratch
from nemo_dist.testing.tensors import saved_weights
from nemo_dist.testing.tiny_models import SPECIMENS, first_modules, tied_twin

Ranks = Callable[[int], Any]
_DIFFER = "its replicas differ by design, so that there is nothing that they must be equal to"


class PluginConformance:
    """The conformance tests: subclass it in a test module and set ``plugin`` to the plugin's registered name.

    ``build`` are the keywords of ``DistributedSetup.build`` that select the plugin on ``world`` ranks, with all
    computation in float32; by default those of ``nemo_dist.testing.selecting.smallest``. ``specimen`` names the model
    of ``nemo_dist.testing.tiny_models`` to train. ``bound``: for a plugin with ``exact = False``, the relative error
    that it keeps; or ``alone = True`` for one that is compared with itself on one rank, and not with plain
    transformers. ``frozen``: prefixes of parameters that the plugin itself freezes.
    """

    plugin: ClassVar[str]
    build: ClassVar[Mapping[str, Any] | None] = None
    world: ClassVar[int] = 2
    specimen: ClassVar[str] = "llama"
    bound: ClassVar[float | None] = None
    alone: ClassVar[bool] = False
    frozen: ClassVar[tuple[str, ...]] = ()

    @property
    def plugin_type(self) -> Any:
        """The registered plugin class."""
        return Registry().load(self.plugin)

    def selecting(self) -> dict[str, Any]:
        """Return the keywords of ``build`` that select the plugin."""
        return dict(smallest(self.plugin) if self.build is None else self.build)

    def instance(self) -> Any:
        """Return the plugin with the options that ``selecting`` gives it."""
        setup = DistributedSetup.build(**self.selecting(), world_size=self.world)
        return next(plugin for plugin in setup.plugins if plugin.name == self.plugin)

    def task(self, **more: Any) -> Task:
        """Return what to train."""
        return Task(**{"specimen": self.specimen, "frozen": self.frozen, **more})

    # ---- without ranks ----

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

    # ---- on ranks ----

    def test_it_computes_what_one_process_computes(self, ranks: Ranks) -> None:
        """Losses, gradients, unclipped norms and the parameters after three AdamW steps equal those of one process."""
        self._compare(laws.PARITY, ranks, self.task())

    def test_it_accumulates_what_one_process_computes(self, ranks: Ranks) -> None:
        """Training with gradient accumulation over three batches per step equals training on one process."""
        self._compare(laws.ACCUMULATES, ranks, self.task(accumulate=3))

    def test_it_trains_beside_frozen_parameters(self, ranks: Ranks) -> None:
        """Parameters that are frozen after loading stay, and the others train as on one process."""
        frozen = first_modules(self.specimen)
        if not frozen:
            pytest.skip(f"{self.specimen!r} has neither repeated blocks nor an embedding to freeze")
        self._compare(laws.FROZEN, ranks, self.task(frozen=(*self.frozen, *frozen)))

    def test_it_trains_a_tied_weight_as_one(self, ranks: Ranks) -> None:
        """An output head that is tied to the embedding gets the gradients of both."""
        tied = tied_twin(self.specimen)
        if tied is None:
            pytest.skip(f"{self.specimen!r} has an output head of its own, and no twin whose head is tied")
        self._compare(laws.TIED, ranks, self.task(specimen=tied))

    def test_it_sums_gradients_in_the_loop_of_the_user(self, ranks: Ranks) -> None:
        """Backwards within ``no_sync`` and one after it give the sum of the gradients of all, averaged once."""
        if declared(self.instance(), "replicas_differ"):
            pytest.skip(_DIFFER)
        task = self.task()
        with laws.OWN_LOOP.judging(self.plugin):
            found = ranks(self.world).run(runs.on_rank_own_loop, task, checkpoint(task.specimen), self.selecting())
        loops = [one for one in found if one is not None]
        if not loops:
            pytest.skip("a plugin runs the batches by an engine, so the user has no loop of the model")
        lines = [line for one in loops for line in tensor_differences("gradients", one[0], one[1], self._error)]
        first = {name: gradient for together, _ in reversed(loops) for name, gradient in together.items()}
        lines += [
            f"the gradient of {name} differs between ranks"
            for together, _ in loops
            for name, gradient in together.items()
            if not torch.equal(gradient, first[name])
        ]
        laws.OWN_LOOP.hold(self.plugin, list(dict.fromkeys(lines)))

    def test_a_second_runtime_computes_the_same_again(self, ranks: Ranks) -> None:
        """Two runtimes of one model give equal numbers; an evaluation between them changes none."""
        self._hold_on_ranks(laws.AGAIN, ranks, user.on_rank_again)

    def test_it_leaves_what_is_the_users_alone(self, ranks: Ranks) -> None:
        """Loading, a step and an evaluation change no batch, no random generator and no mode, in either mode."""
        self._hold_on_ranks(laws.UNTOUCHED, ranks, user.on_rank_untouched)

    def test_it_steps_each_group_by_its_options(self, ranks: Ranks) -> None:
        """Groups keep their options, betas and momentum included, and a change of the learning rate is followed."""
        if declared(self.instance(), "replicas_differ"):
            pytest.skip(_DIFFER)
        task = self.task()
        weights = checkpoint(task.specimen)
        with laws.STEPS.judging(self.plugin):
            ranked = ranks(self.world).run(user.on_rank_groups, task, weights, self.selecting())
        if self.alone:
            (expected,) = ranks(1).run(user.on_rank_groups, task, weights, self._on_one_rank())
        else:
            expected = user.plain_groups(task, weights)
        lines, refused = [], []
        for name in user.OPTIMIZERS:
            said = [one[name] for one in ranked]
            if all(isinstance(one, str) for one in said):
                refused.append(f"{name}: {said[0]}")
                continue
            found = {key: value for one in said if not isinstance(one, str) for key, value in one.items()}
            lines += tensor_differences(f"parameters under {name}", found, expected[name], self._error)
        laws.STEPS.hold(self.plugin, refused if len(refused) == len(user.OPTIMIZERS) else lines)
        if refused:
            pytest.skip(f"it refuses {'; '.join(refused)}; what it takes steps as it should")

    def test_it_evaluates_as_one_process_does(self, ranks: Ranks) -> None:
        """``evaluate`` of uneven batches and ``forward`` give the loss and logits of one process, trained or not."""
        if declared(self.instance(), "replicas_differ"):
            pytest.skip(_DIFFER)
        task = self.task()
        weights = checkpoint(task.specimen)
        with laws.EVALUATES.judging(self.plugin):
            found = ranks(self.world).run(evaluation.on_rank_evaluated, task, weights, self.selecting())
        if self.alone:
            (expected,) = ranks(1).run(evaluation.on_rank_evaluated, task, weights, self._on_one_rank())
        else:
            expected = evaluation.plain_evaluated(task, weights)
        laws.EVALUATES.hold(self.plugin, evaluation.wrong(found, expected, self._error))

    def test_it_composes_with_what_it_says(self, ranks: Ranks) -> None:
        """Training equals that of one process on twice the ranks, and with every axis and strategy it composes with.

        A plugin beside a strategy is tried with every axis that ``build`` accepts: what is not exact it must refuse.
        """
        unable = [str(one) for one in self.untried()]
        for case in self.cases():
            task, pool = self.task(specimen=case.specimen, adapters=case.adapters), ranks(case.world)
            weights = checkpoint(task.specimen, task.seed)
            alone = {"strategy": in_float32(case.strategy or default_strategy())}
            with laws.COMPOSES.judging(self.plugin):
                if case.strategy and all(pool.run(runs.on_rank_refusal, task, weights, alone, (RuntimeError,))):
                    unable.append(f"{case.strategy!r} (this machine cannot run it)")
                elif case.named or not all(pool.run(runs.on_rank_refusal, task, weights, case.build)):
                    self._compare(laws.COMPOSES, ranks, task, case)
        if unable:
            pytest.skip(f"not tried: {', '.join(unable)}; what else it composes with is as it should be")

    def cases(self) -> Sequence[Case]:
        """Return the setups that ``test_it_composes_with_what_it_says`` trains in."""
        return [one for one in self._composed() if isinstance(one, Case)]

    def untried(self) -> Sequence[Untried]:
        """Return what the plugin says of itself that this test cannot try, each with the reason."""
        return [one for one in self._composed() if isinstance(one, Untried)]

    def _composed(self) -> Sequence[Case | Untried]:
        return composed_cases(self.plugin_type, self.selecting(), self.world, self.specimen)

    def test_it_resumes_twice_as_if_it_had_never_stopped(self, ranks: Ranks) -> None:
        """Save, load, train, save, load and train again: every number is that of a run without stops."""
        run = scratch("resumed")
        stretches = [
            Stretch(start=0, stop=2, save="first"),
            Stretch(start=0, stop=4),
            Stretch(start=2, stop=3, load="first", save="second"),
            Stretch(start=3, stop=4, load="second"),
        ]
        with laws.RESUMES.judging(self.plugin):
            found = self._run(ranks, run, [(self.selecting(), stretch) for stretch in stretches])
        lines = []
        for rank, (_, straight, once, twice) in enumerate(found):
            for number, steps in (("first", once.numbers), ("second", twice.numbers)):
                step = 2 if number == "first" else 3
                expected = straight.numbers[step : step + 1]
                lines += [
                    f"rank {rank}, step {step} after the {number} resume: loss and norm {steps}, expected {expected}"
                ] * (steps != expected)
            changed = [name for name, value in straight.after.items() if not torch.equal(value, twice.after[name])]
            if changed:
                lines.append(f"rank {rank}: {len(changed)} parameters differ in the end, such as {changed[0]}")
        laws.RESUMES.hold(self.plugin, lines)

    def test_its_checkpoints_go_to_and_from_another_strategy(self, ranks: Ranks) -> None:
        """Its checkpoint loads under the default strategy, and that one's under it: same weights, same numbers on."""
        if declared(self.instance(), "replicas_differ"):
            pytest.skip(_DIFFER)
        run, own = scratch("crossed"), self.selecting()
        other = {"strategy": in_float32(default_strategy())}
        stretches = [
            (own, Stretch(start=0, stop=2, save="own", export="exported")),
            (other, Stretch(start=2, stop=4, load="own")),
            (other, Stretch(start=0, stop=2, save="other")),
            (own, Stretch(start=2, stop=4, load="other")),
            (own, Stretch(start=0, stop=4)),
        ]
        with laws.CROSSES.judging(self.plugin):
            found = [_joined(ranked) for ranked in zip(*self._run(ranks, run, stretches), strict=True)]
        saved, there, others, back, straight = found
        lines = _unequal("the weights that it saved, under the default strategy", there.before, saved.after)
        lines += _unequal("the weights of the default strategy, under it", back.before, others.after)
        error = self._error
        both = [("its own checkpoint", there), ("the checkpoint of the default strategy", back)]
        for name, one in [] if self.alone else both:  # the default strategy computes otherwise than such a plugin
            pairs = zip(one.numbers, straight.numbers[2:], strict=True)
            lines += [f"{name}: {a}, expected {b}" for a, b in pairs if not _close(a, b, error)]
            lines += tensor_differences(f"{name}, parameters", one.after, straight.after, error)
        laws.CROSSES.hold(self.plugin, lines)
        with laws.EXPORTS.judging(self.plugin):
            lines = self._misread(Path(run) / "exported", saved.after)
        laws.EXPORTS.hold(self.plugin, lines)

    def test_it_leaves_nothing_behind(self, ranks: Ranks) -> None:
        """A closed runtime leaves no groups or threads, and plain models compute as before."""
        task = self.task()
        with laws.LEAVES_NOTHING.judging(self.plugin):
            found = ranks(self.world).run(runs.on_rank_repeat, task, checkpoint(task.specimen), self.selecting())
        plain = _plain_loss(task)
        lines = []
        for rank, left in enumerate(found):
            for what, (first, last) in (("process groups", left.groups), ("threads", left.threads)):
                lines += [f"rank {rank}: {first} {what} after the first runtime, {last} after the third"] * (
                    last > first
                )
            lines += [f"rank {rank}: a plain model's loss is {left.plain_loss}, expected {plain}"] * (
                not abs(left.plain_loss - plain) <= TOLERANCE * abs(plain)
            )
        laws.LEAVES_NOTHING.hold(self.plugin, lines)

    def test_two_setups_train_side_by_side(self, ranks: Ranks) -> None:
        """Two setups in one process, with other weights and batches, give the numbers of each alone."""
        tasks = [self.task(), self.task(seed=1)]
        folders = [checkpoint(task.specimen, task.seed) for task in tasks]
        both = list(zip(tasks, folders, strict=True))
        with laws.TWO_SETUPS.judging(self.plugin):
            found = ranks(self.world).run(runs.on_rank_two_setups, both, self.selecting())
        lines = []
        for index, task in enumerate(tasks):
            numbers = [one[index] for one in found]
            alone = self._run(ranks, scratch("alone"), [(self.selecting(), Stretch(start=0, stop=2))], task)
            lines += [
                f"rank {rank}, setup {index}: {own}, expected {list(alone[rank][0].numbers)}"
                for rank, own in enumerate(numbers)
                if own != list(alone[rank][0].numbers)
            ]
            # Of what lives on in the process, the run alone may be as wrong.
            if not declared(self.instance(), "replicas_differ"):
                expected = self._expected(ranks, task)
                pairs = list(zip(expected.losses, expected.norms, strict=True))[:2]
                lines += [
                    f"setup {index}, step {step}: {own}, expected {pair}"
                    for step, (own, pair) in enumerate(zip(numbers[0], pairs, strict=True))
                    if not _close(own, pair, self._error)
                ]
        laws.TWO_SETUPS.hold(self.plugin, lines)

    def test_ranks_that_select_otherwise_all_raise(self, ranks: Ranks) -> None:
        """Where one rank lacks the plugin, all raise an error that names what differs."""
        own = self.selecting()
        other = {"strategy": "ddp" if self.plugin == default_strategy() else in_float32(default_strategy())}
        with laws.DISAGREES.judging(self.plugin):
            said = ranks(self.world).run(runs.on_rank_disagree, [own, other])
        lines = [f"rank {rank} raised {text!r}" for rank, text in enumerate(said) if "plugins" not in text]
        laws.DISAGREES.hold(self.plugin, lines)

    # ---- what the tests share ----

    @property
    def _error(self) -> float:
        """The relative error that is allowed."""
        if declared(self.instance(), "exact") or self.alone:
            return TOLERANCE
        if self.bound is None:
            raise laws.BOUND.broken(
                self.plugin, ["exact is False, and the kit has no bound"], ["bound = ..., or alone = True, on the kit"]
            )
        return self.bound

    def _compare(self, law: laws.Law, ranks: Ranks, task: Task, case: Case | None = None) -> None:
        """Train *task* on ranks and on one process, and raise what *law* says where they differ."""
        build, world = (self.selecting(), self.world) if case is None else (case.build, case.world)
        where = f"{world} ranks, {build}"
        plugin = self.instance()
        with law.judging(self.plugin):
            outcomes = ranks(world).run(train_on_rank, task, checkpoint(task.specimen, task.seed), build)
            found = mean_of_replicas(outcomes) if declared(plugin, "replicas_differ") else merged(outcomes)
        expected = self._expected(ranks, task)
        lines = _different(found, expected, self._error, differ=declared(plugin, "replicas_differ"))
        told = hints(found, expected, build, world) if lines else []
        law.hold(self.plugin, [f"on {where}:", *lines] if lines else [], told)
        if law is laws.PARITY and not declared(plugin, "exact"):
            exact = not _different(found, reference(task), TOLERANCE, differ=declared(plugin, "replicas_differ"))
            laws.BOUND.hold(
                self.plugin, [f"every number is within {TOLERANCE} of that of one process"] if exact else []
            )

    def _expected(self, ranks: Ranks, task: Task) -> Outcome:
        """Return what *task* gives in one process, with the plugin where it is to be compared with itself alone."""
        return trained(ranks(1), task, **self._on_one_rank()) if self.alone else reference(task)

    def _on_one_rank(self) -> dict[str, Any]:
        return {name: value for name, value in self.selecting().items() if name != "parallelism_sizes"}

    def _misread(self, folder: Path, weights: Mapping[str, Any]) -> list[str]:
        """Return how the export in *folder* is not what plain transformers writes of a model with these *weights*."""
        task, plain = self.task(), checkpoint(self.specimen)
        wanted, found = (saved_weights(one).keys() for one in (plain, folder))
        lines = [
            f"the export: {name} is {'missing' if name in wanted else 'too much'}" for name in sorted(wanted ^ found)
        ]
        model = task.load(folder)
        lines += _unequal("the export, in transformers", dict(model.named_parameters()), weights)
        settings, expected = (_settings(one) for one in (model, task.load(plain)))
        changed = [name for name in {**settings, **expected} if settings.get(name) != expected.get(name)]
        return lines + [
            f"the exported configuration has {name} {settings.get(name)!r}, expected {expected.get(name)!r}"
            for name in changed
        ]

    def _hold_on_ranks(self, law: laws.Law, ranks: Ranks, function: Callable[..., list[str]]) -> None:
        """Raise what *law* says where *function* returns lines on a rank."""
        task = self.task()
        with law.judging(self.plugin):
            found = ranks(self.world).run(function, task, checkpoint(task.specimen), self.selecting())
        law.hold(self.plugin, [f"rank {rank}: {line}" for rank, lines in enumerate(found) for line in lines])

    def _run(
        self,
        ranks: Ranks,
        run: Path,
        stretches: Sequence[tuple[Mapping[str, Any], Stretch]],
        task: Task | None = None,
    ) -> Any:
        task = task or self.task()
        weights = checkpoint(task.specimen, task.seed)
        return ranks(self.world).run(runs.on_rank_stretches, task, weights, run, stretches)


def _judged(calls: PluginCalls, plugin: Any, sizes: ParallelismSizes, world_size: int) -> dict[str, Any]:
    """Return what the planning hooks say of *sizes* on *world_size* ranks."""
    views = [] if sizes.problems(world_size) else calls.views(sizes=sizes, world_size=world_size)
    try:
        plan = MeshPlan.resolve(sizes, world_size, tuple(view for found in views for view in found))
    except TopologyError:
        plan = MeshPlan.nearest(sizes, world_size)
    problems = calls.validate(plan=plan, sizes=sizes, plugins=(plugin,), device_type=None)
    return {"views": views, "validate": problems, "agree": calls.agree(plan=plan)}


def _different(found: Outcome, expected: Outcome, error: float, *, differ: bool) -> list[str]:
    """Return the differences above *error*; of replicas that differ only losses and parameters are compared."""
    if differ:
        found = attrs.evolve(found, norms=expected.norms, gradients=expected.gradients)
    return differences(found, expected, error)


def _joined(ranked: Sequence[Any]) -> Any:
    """Return what all ranks gave of one stretch as one: the numbers of the first, the parameters of all."""
    before = {name: value for one in ranked for name, value in one.before.items()}
    after = {name: value for one in ranked for name, value in one.after.items()}
    return attrs.evolve(ranked[0], before=before, after=after)


def _unequal(what: str, found: Mapping[str, Any], expected: Mapping[str, Any]) -> list[str]:
    """Return a line for each tensor of *expected* that *found* lacks or has otherwise."""
    lines = [f"{what}: {name} is missing" for name in expected if name not in found]
    lines += [f"{what}: {name} is not in the model" for name in found if name not in expected]
    both = [name for name in expected if name in found]
    return lines + [f"{what}: {name} differs" for name in both if not torch.equal(found[name], expected[name])]


def _settings(model: Any) -> dict[str, Any]:
    """Return the settings of *model* by name, but for where it was loaded from."""
    return {name: value for name, value in model.config.to_dict().items() if name != "_name_or_path"}


def _portrait(model: Any) -> dict[str, Any]:
    """Return what of a plain *model* can be compared by value: its settings, and of each tensor all but its storage."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    told = {name: (t.dtype, t.device, t.requires_grad, t.flatten().tolist()) for name, t in tensors.items()}
    return told | {f"setting {name!r}": value for name, value in _settings(model).items()}


def _close(one: tuple[float, float], other: tuple[float, float], error: float) -> bool:
    return all(abs(a - b) <= error * abs(b) for a, b in zip(one, other, strict=True))


def _plain_loss(task: Task) -> float:
    with torch.no_grad():
        return float(SPECIMENS[task.specimen].make(task.seed)(**task.batches(0)[0]).loss)
