"""Match a tensor-parallel plan, transformers' rules and the user's over them, to modules and parameters of a model."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import attrs

from nemo_dist.hf_model import class_name
from nemo_dist.planning.validation import near
from nemo_dist_tensor.styles import PARAMETER, STYLES

_KEY_VALUE = ("k_proj", "v_proj")


@attrs.frozen(eq=False)
class Rules:
    """A plan matched to one model: the style of every module and bare parameter that it names.

    ``unused`` are the user's rules that match nothing here, each with the nearest name. ``given``: the modules and
    parameters that a rule of the user names. ``divided``: the attributes of modules, numbers of heads or features, of
    which a rank has its part. ``logits_stay_cut``: nothing between head and loss needs whole logits. ``returned``: the
    modules that return unchanged what a linear layer in them returns, with that layer; None where that is not known.
    ``joining``: the modules that are given hidden states twice, with the name of the second.
    """

    modules: Mapping[str, str]
    parameters: Mapping[str, str]
    unused: Mapping[str, str] = attrs.field(factory=dict)
    given: frozenset[str] = frozenset()
    divided: Mapping[str, tuple[str, ...]] = attrs.field(factory=dict)
    logits_stay_cut: bool = True
    returned: Mapping[str, str] | None = None
    joining: Mapping[str, str] = attrs.field(factory=dict)


def generic(name: str) -> str:
    """Return *name* with its layer numbers replaced by ``*``, as the rules of a plan are written."""
    return re.sub(r"\.\d+(?=\.|$)", ".*", name)


def is_key_value(name: str) -> bool:
    """Whether the module called *name* projects to keys or values."""
    return name.rpartition(".")[2] in _KEY_VALUE


def match(model: Any, override: Mapping[str, str], stage: bool = False, skip_experts: bool = False) -> Rules:
    """Match the plan of *model*, overridden by the rules in *override*, to its modules and parameters.

    A rule names a module or parameter as ``model.layers.*.mlp.up_proj``, with or without the prefix of the base model,
    or one layer with its number. ``stage``: *model* is a stage of a pipeline, in which modules without parameters
    replace those of other stages. ``skip_experts`` leaves out what belongs to experts, which another plugin shards.
    """
    modules = dict(model.named_modules())
    parameters = dict(model.named_parameters(remove_duplicate=False))
    names = dict.fromkeys((*modules, *parameters))
    known = names.keys() | {generic(name) for name in names}
    prefix = f"{model.base_model_prefix}."
    plan, unused = dict(model.tp_plan or {}), {}
    of_user = set()
    for rule, style in override.items():
        found = next((name for name in (rule, prefix + rule) if name in known), None)
        if found is None and generic(rule) not in plan and prefix + generic(rule) not in plan:
            unused[rule] = near(rule, {name.removeprefix(prefix) for name in map(generic, names)} | set(plan))
        else:
            plan[found or rule] = style
            of_user.add(found or rule)
    styles: dict[str, str] = {}
    for name in names:
        found = plan.get(name, plan.get(generic(name)))
        on_other_stage = stage and name in modules and not any(True for _ in modules[name].parameters())
        if found is not None and not on_other_stage:
            styles[name] = found
    experts = [name + "." for name, style in styles.items() if style == "moe_tp_experts"] if skip_experts else []
    kept = {n: s for n, s in styles.items() if not any(f"{n}.".startswith(expert) for expert in experts)}
    # A module without parameters has nothing to shard; it may replace one of another pipeline stage.
    held = {name for name, module in modules.items() if next(module.parameters(), None) is not None}
    return Rules(
        modules={name: style for name, style in kept.items() if name in held},
        parameters={name: style for name, style in kept.items() if name in parameters},
        unused=unused,
        given=frozenset(name for name in kept if name in of_user or generic(name) in of_user),
    )


def problems(model: Any, rules: Rules) -> list[str]:
    """Say why *rules* do not work in *model*, whatever the number of ranks, one sentence each."""
    kind = class_name(model)
    if not any("*" in generic(name) for name in (*rules.modules, *rules.parameters)):
        return [
            f"{kind} has no matrix in its blocks that is known to be cut right; use tp_size=1 and shard it with fsdp2, "
            f"or pass a tp_plan for its modules: {_examples(model)}"
        ]
    found = []
    for name, style in {**rules.modules, **rules.parameters}.items():
        if style not in STYLES:
            found.append(f"the plan of {kind} gives {generic(name)!r} the style {style!r}, {unknown_style(style)}")
        elif name in rules.modules and style in ("packed_colwise", "packed_rowwise"):
            found.append(
                f"the plan of {kind} gives the module {generic(name)!r} the style {style!r}, which fits experts' "
                "parameters only; use 'colwise_gather_output' and, for what reads its halves, 'rowwise_split_input'"
            )
        elif name in rules.parameters and style not in PARAMETER:
            valid = ", ".join(sorted(PARAMETER))
            found.append(f"the plan of {kind} gives the parameter {generic(name)!r} the style {style!r}; use {valid}")
    return list(dict.fromkeys(found))


def _examples(model: Any) -> str:
    """Return the names of some linear layers of *model*, as rules name them."""
    names = {generic(name): None for name, module in model.named_modules() if hasattr(module, "out_features")}
    return ", ".join(map(repr, list(names)[:6])) or "it has no linear layers"


def unknown_style(style: str) -> str:
    """Return the end of a sentence about a *style* that this plugin does not support."""
    return f"which is not supported{near(style, STYLES)}; valid styles: {', '.join(sorted(STYLES))}"


def described(rules: Rules) -> str:
    """Return the styles of *rules* as text, each with its modules and parameters."""
    found: dict[str, dict[str, None]] = {}
    for name, style in {**rules.modules, **rules.parameters}.items():
        found.setdefault(style, {})[generic(name)] = None
    return "; ".join(f"{style}: {', '.join(_joined(names))}" for style, names in found.items())


def _joined(names: Mapping[str, None]) -> Iterator[str]:
    """Yield the *names*, those of one parent together: ``mlp.{gate_proj, up_proj}``."""
    parents: dict[str, list[str]] = {}
    for name in names:
        parent, _, own = name.rpartition(".")
        parents.setdefault(parent, []).append(own)
    for parent, children in parents.items():
        dot = "." if parent else ""
        yield f"{parent}{dot}{children[0]}" if len(children) == 1 else f"{parent}{dot}{{{', '.join(children)}}}"
