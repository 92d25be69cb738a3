"""Complete a plan by the structure of the model, so that what acts inside of attention and feed-forward is right too.

A unit is a module in a repeated block that has linear layers, or bare matrices with a rule. A plan for a unit counts
only when ``probe.prove`` has shown it to be right; the first one of these does:

1. the rules that the user or transformers gives, as they are, with per-head parameters cut, with packed matrices cut
   by halves;
2. where the model has no plan for its blocks: the last linear layer row-wise, those before it column-wise, with the
   numbers of heads that the module keeps divided;
3. every large linear layer by itself, its output gathered: right for whatever surrounds it, with more to send.

A proven plan also says which whole parameters ranks use on heads or features of their own: their gradients are summed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Any

import attrs
from torch import nn
from torch.distributed.tensor import Placement
from transformers.pytorch_utils import Conv1D

from nemo_dist.hf_model import forward_source, has_own_code, input_embedding, plain_class, reads_weight
from nemo_dist.training.rehearsal import read_from_outside
from nemo_dist_tensor import parameter_sharding
from nemo_dist_tensor.attention_heads import AttentionHeads
from nemo_dist_tensor.block_proof import model_problems, sequence_problems
from nemo_dist_tensor.collectives import Peers
from nemo_dist_tensor.install import Installer
from nemo_dist_tensor.parallel_regions import Region
from nemo_dist_tensor.probe import Call, Recording, Verdict, is_projection, prove, signature
from nemo_dist_tensor.styles import COLUMN, ROW, STYLES, SUMMED
from nemo_dist_tensor.tp_plan import Rules, generic

_SUM = next(iter(SUMMED))
_SMALL = 4  # a matrix of fewer than hidden x hidden / 4 numbers stays whole, such as that of a router
_PACKED = {"colwise": "packed_colwise", "rowwise": "packed_rowwise"}


def completed(
    model: Any, rules: Rules, ranks: int, experts: bool = True, sequence: bool = False
) -> tuple[Rules, list[str]]:
    """Return *rules* with what the structure of *model* adds or corrects, and the user's rules that are not right.

    ``experts``: those are cut here; another plugin shards them otherwise. ``sequence``: say, too, why the tokens
    between the regions cannot be cut.
    """
    in_blocks = any("*" in generic(name) for name in (*rules.modules, *rules.parameters))
    known = _without_read(model, rules if in_blocks else _with_ends(model, rules))
    completion = Completion(model, known, ranks, experts, not in_blocks)
    found, problems = completion.run()
    if sequence and not problems and completion.recording is not None:
        problems = sequence_problems(model, found, completion.recording, ranks)
    if not problems and completion.is_recorded and has_own_code(model):
        problems = model_problems(model, found, ranks, sequence)
    return found, problems


def _with_ends(model: Any, rules: Rules) -> Rules:
    """Return *rules* with the embedding and the head of *model* cut along the vocabulary, where it has no plan."""
    found, head = _ends(model)
    styles = {}
    if head and is_projection(model.get_submodule(head)) and _owns_bias(model, head):
        styles[head] = "colwise_gather_output"
    if found and _is_plain(model, found):
        styles[found] = "embedding_rowwise"
    if len(styles) == 1 and _tied(model):
        styles = {}
    return attrs.evolve(rules, modules={**styles, **rules.modules})


def _without_read(model: Any, rules: Rules) -> Rules:
    """Return *rules* without those for modules whose weight does more than a rule knows.

    Code elsewhere reads the weight by itself; or an embedding has a norm of its own, which each rank would use for its
    own words only; or embedding or head are tied to what has no rule, which loading would put in the place of a shard.
    """
    ends = [name for name in _ends(model) if name]
    ruled = [name for name in ends if name in rules.modules and name not in rules.given]
    outside = read_from_outside(model)
    read = [name for name in ruled if _has_a_norm(model, name) or reads_weight(model, name) or name in outside]
    half = any(mate not in rules.modules for name in ruled for mate in _mates(model, name))
    dropped = list(ends if half or (read and _tied(model)) else read)  # a tied weight cannot be cut for one use only
    dropped += [name for name in rules.modules if name in outside and name not in rules.given]
    return attrs.evolve(rules, modules={name: s for name, s in rules.modules.items() if name not in dropped})


def _has_a_norm(model: Any, name: str) -> bool:
    return any(True for child in model.get_submodule(name).children() for _ in child.parameters())


def _ends(model: Any) -> tuple[str, str]:
    """Return the names of the embedding and of the head of *model*, "" for one that it does not have."""
    names = {id(module): name for name, module in model.named_modules()}
    return names.get(id(input_embedding(model)), ""), names.get(id(model.get_output_embeddings()), "")


def _mates(model: Any, name: str) -> set[str]:
    """Return the other modules that share the weight of the module *name*, or will when the model is loaded."""
    ties = dict(getattr(model, "all_tied_weights_keys", None) or {})
    source = ties.get(f"{name}.weight", f"{name}.weight")
    shared = {source, *(one for one, other in ties.items() if other == source)} if ties else set()
    return {one.rpartition(".")[0] for one in shared} - {name}


def _tied(model: Any) -> bool:
    """Whether embedding and head of *model* share their weight, or will when it is loaded."""
    configs = (model.config, model.config.get_text_config())
    first, last = (getattr(end, "weight", None) for end in (input_embedding(model), model.get_output_embeddings()))
    return any(getattr(config, "tie_word_embeddings", False) for config in configs) or (first is last is not None)


def _is_plain(model: Any, name: str) -> bool:
    """Whether *name* is an embedding whose weight only the head shares, and whose rows nothing limits."""
    found = model.get_submodule(name)
    if not isinstance(found, nn.Embedding) or found.max_norm or found.scale_grad_by_freq or found.sparse:
        return False
    head = model.get_output_embeddings()
    return [m for m in model.modules() if m._parameters.get("weight") is found.weight and m is not head] == [found]


def _owns_bias(model: Any, name: str) -> bool:
    """Whether no other module uses the bias of the head *name*, which would be cut for it too."""
    head = model.get_submodule(name)
    tied = "".join(map(str, getattr(model, "_tied_weights_keys", None) or ()))
    shared = any(p is head.bias for m in model.modules() if m is not head for p in m._parameters.values())
    return head.bias is None or not (shared or f"{name}.bias" in tied)


@attrs.frozen(eq=False, slots=False)
class Completion:
    """The work on one model; with ``derive`` the model has no plan for its blocks, and one is derived."""

    model: Any
    rules: Rules
    ranks: int
    experts: bool
    derive: bool

    @cached_property
    def recording(self) -> Recording | None:
        """What a run of the model with random weights calls its modules with."""
        return Recording.of(self.model)

    @property
    def is_recorded(self) -> bool:
        """Whether that run went through, so that a module that it did not call is for other inputs."""
        return self.recording is not None and self.recording.complete

    def run(self) -> tuple[Rules, list[str]]:
        """Return the completed rules, and what is wrong with the user's."""
        modules, parameters = dict(self.rules.modules), dict(self.rules.parameters)
        divided, problems, known = dict(self.rules.divided), [], {}
        calls = self._calls()
        for name, unit in self._units():
            own = self._own_rules(name)
            if not own and not self.derive:
                continue
            key = signature(unit), tuple(sorted(own.items()))
            if key not in known:
                known[key] = Unit(name, unit, own, calls.get(key), self).plan()
            found: Plan = known[key]
            if found.problem:
                problems.append(found.problem)
                continue
            for rule in own:
                modules.pop(_join(name, rule), None)
                parameters.pop(_join(name, rule), None)
            modules |= {_join(name, rule): style for rule, style in found.modules.items()}
            parameters |= {_join(name, rule): style for rule, style in found.parameters.items()}
            if found.divided:
                divided[name] = found.divided
        recording = self.recording
        rules = attrs.evolve(
            self.rules,
            modules=modules,
            parameters=parameters,
            divided=divided,
            logits_stay_cut=recording is not None and recording.head_is_scaled_only,
            returned={} if recording is None else recording.returned,
            joining={n: call.second for n, call in recording.calls.items() if call.second} if recording else {},
        )
        return rules, list(dict.fromkeys(problems))

    def _units(self) -> Iterator[tuple[str, nn.Module]]:
        for name, module in self.model.named_modules():
            if "*" not in generic(name):
                continue
            stacked = any(parameter.ndim == 3 for parameter in module.parameters(recurse=False))
            if stacked and not self.experts:
                continue
            ruled = any(f"{name}.{own}" in self.rules.parameters for own, _ in module.named_parameters(recurse=False))
            if ruled or any(is_projection(child) for child in module.children()):
                yield name, module

    @cached_property
    def _unit_of(self) -> Mapping[str, str]:
        """The unit of every rule: the innermost one around it."""
        units = [name for name, _ in self._units()]
        found = {}
        for rule in (*self.rules.modules, *self.rules.parameters):
            around = [unit for unit in units if rule == unit or rule.startswith(f"{unit}.")]
            if around:
                found[rule] = max(around, key=len)
        return found

    def _own_rules(self, unit: str) -> dict[str, str]:
        both = {**self.rules.modules, **self.rules.parameters}
        return {rule[len(unit) + 1 :]: both[rule] for rule, owner in self._unit_of.items() if owner == unit}

    def _calls(self) -> dict[Any, tuple[nn.Module, Call, list[str]]]:
        """Return a recorded call for every kind of unit, with the unit and the order of calls."""
        recording = self.recording
        found: dict[Any, tuple[nn.Module, Call, list[str]]] = {}
        if recording is None:
            return {}
        order = list(recording.calls)
        for name, unit in self._units():
            if name in recording.calls:
                inside = [call[len(name) + 1 :] for call in order if call.startswith(f"{name}.")]
                key = signature(unit), tuple(sorted(self._own_rules(name).items()))
                found.setdefault(key, (recording.modules[name], recording.calls[name], inside))
        return found


def _join(unit: str, rule: str) -> str:
    return f"{unit}.{rule}" if rule else unit


def _mentions(parent: nn.Module, leaf: str) -> bool:
    kind: Any = plain_class(parent)
    return re.search(rf"self\.{re.escape(leaf)}\.(weight|bias)\b", forward_source(kind)) is not None


@attrs.frozen(eq=False)
class Plan:
    """The rules of one unit by names within it, or the ``problem`` with those of the user."""

    modules: Mapping[str, str] = attrs.field(factory=dict)
    parameters: Mapping[str, str] = attrs.field(factory=dict)
    divided: tuple[str, ...] = ()
    problem: str = ""

    def rules(self) -> Rules:
        """Return this plan as rules of the unit itself."""
        return Rules(
            modules=self.modules, parameters=self.parameters, divided={"": self.divided} if self.divided else {}
        )


@attrs.frozen(eq=False, slots=False)
class Unit:
    """One unit; ``seen`` is its twin with random weights, its recorded call, and the modules in it that were called."""

    name: str
    module: nn.Module
    own: Mapping[str, str]
    seen: tuple[nn.Module, Call, list[str]] | None
    completion: Completion

    def plan(self) -> Plan:
        """Return the first plan that is proven, or the one that needs no proof."""
        given = self._given()
        if self._is_refused_anyway(given):
            return given
        by_user = any(_join(self.name, rule) in self.completion.rules.given for rule in self.own)
        first = ""
        for plan in (given,) if by_user else self._candidates(given):
            verdict = self._verdict(plan)
            if not verdict.problem:
                return self._with_sums(plan, verdict)
            first = first or verdict.problem
        if by_user and self.seen is not None:
            rules = ", ".join(f"{name or 'itself'}: {style}" for name, style in self.own.items())
            return Plan(
                problem=f"the rules of {generic(self.name)} ({rules}) do not compute what the whole module computes: "
                f"{first}; leave its rules out of tp_plan, or use 'colwise_gather_output' for its linear layers"
            )
        return given if by_user else self._gathered()

    def _given(self) -> Plan:
        parameters = {name for name, _ in self.module.named_parameters()}
        return Plan(
            modules={rule: style for rule, style in self.own.items() if rule not in parameters},
            parameters={rule: style for rule, style in self.own.items() if rule in parameters},
        )

    def _is_refused_anyway(self, given: Plan) -> bool:
        """Whether what reads the plan afterwards refuses these rules, for their numbers or styles, with its reason."""
        ranks = self.completion.ranks
        heads = AttentionHeads.of(self.module, ranks)
        if "colwise" in given.modules.values() and heads is not None and heads.problem:
            return True
        return any(
            parameter_sharding.packed_problem(rule, tensor, placement, ranks)
            for rule, style in given.parameters.items()
            if (placement := parameter_sharding.of_parameter(style, tensor := self.module.get_parameter(rule)))
        )

    def _verdict(self, plan: Plan) -> Verdict:
        if self.seen is None:
            return Verdict(problem="a run of the model with random weights did not call it")
        if not set(plan.modules.values()) | set(plan.parameters.values()) <= STYLES:
            return Verdict(problem="it has a style that is not supported")
        twin, call, _ = self.seen
        config = self.completion.model.config

        def cut(module: nn.Module, peers: Peers) -> Mapping[str, Placement | None]:
            installer = Installer(module, config, plan.rules(), peers)
            placements = installer.placements()
            region = Region(self.name, peers, None, None)
            region.install(module)
            installer.install(dict.fromkeys(plan.modules, region))
            return placements

        return prove(twin, call, self.completion.ranks, cut)

    def _with_sums(self, plan: Plan, verdict: Verdict) -> Plan:
        names = {re.sub(r"(^|\.)into$", r"\1weight", name) for name in verdict.summed}
        return attrs.evolve(plan, parameters={**plan.parameters, **dict.fromkeys(sorted(names), _SUM)})

    def _candidates(self, given: Plan) -> Iterator[Plan]:
        if self.own:
            yield given
            yield from self._with_heads_cut(given)
            yield from self._packed(given)
        if self.completion.derive:
            for plan in self._derived():
                yield plan
                yield from self._with_heads_cut(plan)

    def _packed(self, given: Plan) -> Iterator[Plan]:
        """Yield *given* with its column-wise matrices of experts cut by halves."""
        for style in ("colwise", "rowwise"):
            stacked = {
                rule: _PACKED[found] if found == style and self.module.get_parameter(rule).ndim == 3 else found
                for rule, found in given.parameters.items()
            }
            if stacked != given.parameters:
                yield attrs.evolve(given, parameters=stacked)

    @cached_property
    def _heads(self) -> dict[str, int]:
        """The attributes of the unit that are numbers of heads."""
        return {
            name: value
            for name, value in vars(self.module).items()
            if type(value) is int and value > 1 and "head" in name and not re.search("dim|size|group", name)
        }

    def _with_heads_cut(self, plan: Plan) -> Iterator[Plan]:
        """Yield *plan* with the unit's own parameters of one number or row per head cut by heads."""
        config = self.completion.model.config.get_text_config()
        counts = {*self._heads.values(), getattr(config, "num_attention_heads", None)}
        own = {
            name: "colwise"
            for name, parameter in self.module.named_parameters(recurse=False)
            if parameter.ndim == 1 and parameter.shape[0] in counts and name not in plan.parameters
        }
        if own:
            modules = {**plan.modules, "": "local_params"}
            yield attrs.evolve(plan, modules=modules, parameters={**plan.parameters, **own})

    @cached_property
    def _projections(self) -> dict[str, Any]:
        """The linear layers of the unit that its code calls and does nothing else with, in the order of calls."""
        found = {
            name: module
            for name, module in self.module.named_children()
            if is_projection(module) and not _mentions(self.module, name)
        }
        called = self.seen[2] if self.seen is not None else []
        return dict(sorted(found.items(), key=lambda item: called.index(item[0]) if item[0] in called else len(called)))

    def _derived(self) -> Iterator[Plan]:
        """Yield the column- and row-wise plans for the unit, with none, some or all of its counts divided."""
        if len(self._projections) < 2:
            return
        *before, last = self._projections
        modules = {**dict.fromkeys(before, "colwise"), last: "rowwise"}
        widths = {_width(self._projections[name]) for name in before}
        divisible = {n for n, v in self._heads.items() if v % self.completion.ranks == 0}
        wide = {n for n, v in vars(self.module).items() if type(v) is int and v in widths} - divisible
        for divided in ((), tuple(sorted(divisible)), tuple(sorted(divisible | wide))):
            yield Plan(modules=modules, divided=divided)

    def _gathered(self) -> Plan:
        hidden = getattr(self.completion.model.config.get_text_config(), "hidden_size", 0)
        large = [
            name for name, module in self._projections.items() if module.weight.numel() * _SMALL >= hidden * hidden
        ]
        kept = {
            rule: style for rule, style in self.own.items() if style in ("colwise_gather_output", "rowwise_split_input")
        }
        if self.own:  # cut no more than the plan did
            large = [name for name in large if self.own.get(name) in COLUMN | ROW]
        called = self.seen is not None or bool(self.own) or not self.completion.is_recorded
        return Plan(modules={**dict.fromkeys(large if called else (), "colwise_gather_output"), **kept})


def _width(module: nn.Linear | Conv1D) -> int:
    return int(module.nf) if isinstance(module, Conv1D) else module.out_features
