"""Find where a transformers model can be cut: the modules before its layers, the layers, and the modules after."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import attrs
from torch import nn

from nemo_dist_pipeline.partition.balance import balanced


@attrs.frozen(kw_only=True)
class ModelStructure:
    """The modules of a model that belong to one stage each, by full name, in the order of the forward.

    ``tied``: the full names of the head's weight and of the embedding's, where the two are one parameter.
    """

    before: tuple[str, ...]
    layers: tuple[str, ...]
    after: tuple[str, ...]
    tied: tuple[str, str] | None = None

    @property
    def units(self) -> tuple[str, ...]:
        """All of these modules."""
        return (*self.before, *self.layers, *self.after)

    @classmethod
    def of(cls, model: Any) -> ModelStructure:
        """Read the structure from ``base_model_pp_plan``; raise ValueError for a model that cannot be cut."""
        kind, base = type(model).__name__, model.base_model
        plan = getattr(base.config, "base_model_pp_plan", None)
        if not plan or base is model:
            raise ValueError(f"{kind} has no base_model_pp_plan in its config, so it is not known how to cut it")
        prefix = next(name for name, module in model.named_modules() if module is base)
        missing = [name for name in plan if not isinstance(getattr(base, name, None), nn.Module)]
        if missing:
            raise ValueError(f"{kind}: the base_model_pp_plan names {missing}, which {prefix!r} does not have")
        lists = [name for name in plan if isinstance(getattr(base, name), nn.ModuleList)]
        if len(lists) != 1:
            raise ValueError(f"{kind}: a pipeline cuts one list of layers, but the base_model_pp_plan names {lists}")
        names = list(plan)
        at = names.index(lists[0])
        heads = [name for name, child in model.named_children() if child is not base]
        structure = cls(
            before=tuple(f"{prefix}.{name}" for name in names[:at]),
            layers=tuple(f"{prefix}.{lists[0]}.{index}" for index in range(len(getattr(base, lists[0])))),
            after=(*(f"{prefix}.{name}" for name in names[at + 1 :]), *heads),
        )
        structure._require_all_owned(model)
        return attrs.evolve(structure, tied=structure._tie(model))

    def _require_all_owned(self, model: nn.Module) -> None:
        """Raise ValueError for parameters outside of the units, which no stage would own."""
        inside = tuple(f"{unit}." for unit in self.units)
        rest = [name for name, _ in model.named_parameters() if not name.startswith(inside)]
        if rest:
            raise ValueError(
                f"{type(model).__name__}: {', '.join(rest[:5])} belong to no module of the base_model_pp_plan, so no "
                "stage would own them; this model does not run as a pipeline"
            )

    def _tie(self, model: Any) -> tuple[str, str] | None:
        """Return the tied weight's name in the head and its own name (in the embedding); refuse any other tie."""
        ties = dict(getattr(model, "all_tied_weights_keys", None) or {})
        if not ties:
            return None
        if len(ties) == 1:
            target, source = next(iter(ties.items()))
            if self.owner(target) in self.after and self.owner(source) in self.before:
                return target, source
        raise ValueError(
            f"{type(model).__name__} ties {ties}; a pipeline keeps only an output head tied to the embedding, and "
            "never unties silently: set tie_word_embeddings=False in the config"
        )

    def owner(self, name: str) -> str | None:
        """Return the unit that the parameter or module called *name* is in."""
        return next((unit for unit in self.units if name == unit or name.startswith(f"{unit}.")), None)

    def divide(self, model: nn.Module, stages: int, by_count: bool = False) -> tuple[tuple[str, ...], ...]:
        """Return the units of each of *stages* stages, balanced over bytes and FLOPs, or over layers *by_count*."""
        if len(self.layers) < stages:
            raise ValueError(
                f"{type(model).__name__} has {len(self.layers)} layers, fewer than the {stages} stages of the "
                "pipeline; use fewer pipeline ranks, or a schedule with fewer stages on a rank"
            )
        costs = dict.fromkeys(self.units, 1.0) if by_count else _costs(model, self.units)
        extra = [0.0, 0.0] if by_count else [sum(costs[unit] for unit in ends) for ends in (self.before, self.after)]
        sizes = balanced([costs[layer] for layer in self.layers], stages, *extra)
        return self.assign(sizes)

    def assign(self, sizes: Sequence[int]) -> tuple[tuple[str, ...], ...]:
        """Return the units of each stage, where *sizes* says how many layers each takes."""
        layers = iter(self.layers)
        parts = [tuple(next(layers) for _ in range(size)) for size in sizes]
        parts[0] = (*self.before, *parts[0])
        parts[-1] = (*parts[-1], *self.after)
        return tuple(parts)

    def checked(self, model: nn.Module, given: Iterable[Iterable[str]]) -> tuple[tuple[str, ...], ...]:
        """Return the user's division *given* if every unit is in it once and in order; raise ValueError otherwise.

        Modules without parameters that every stage keeps (``model.rotary_emb``) may be named, and change nothing.
        """
        parts = [[name for name in part if not self._on_every_stage(model, name)] for part in given]
        flat = [name for part in parts for name in part]
        unknown = [name for name in flat if name not in self.units]
        missing = [unit for unit in self.units if unit not in flat]
        where = "module_fqns_per_model_part"
        if unknown:
            raise ValueError(f"{where} names {unknown}; {type(model).__name__} is cut into {', '.join(self.units)}")
        if missing:
            raise ValueError(f"{where} leaves out {', '.join(missing)}; every module belongs to one stage")
        if twice := [name for name in self.units if flat.count(name) > 1]:
            raise ValueError(f"{where} names {', '.join(twice)} more than once; a module belongs to one stage")
        if flat != list(self.units):
            wrong = next(name for name, unit in zip(flat, self.units, strict=True) if name != unit)
            raise ValueError(f"{where} has {wrong!r} out of order; the forward goes {', '.join(self.units)}")
        if empty := [index for index, part in enumerate(parts) if not set(part) & set(self.layers)]:
            raise ValueError(f"{where} gives stage {empty[0]} no layer; every stage takes at least one")
        return tuple(map(tuple, parts))

    def _on_every_stage(self, model: nn.Module, name: str) -> bool:
        """Whether *name* is a module without parameters outside of the units, which every stage keeps."""
        modules = dict(model.named_modules())
        return name in modules and self.owner(name) is None and not any(True for _ in modules[name].parameters())


def _costs(model: Any, units: Iterable[str]) -> dict[str, float]:
    """Return for each unit its share of the bytes plus its share of the FLOPs of a token."""
    modules = dict(model.named_modules())
    sizes = {unit: sum(p.numel() for p in modules[unit].parameters()) for unit in units}
    flops = {unit: _flops(modules[unit], model.config) for unit in units}
    return {
        unit: sizes[unit] / max(1, sum(sizes.values())) + flops[unit] / max(1.0, sum(flops.values())) for unit in units
    }


def _flops(unit: nn.Module, config: Any) -> float:
    """Return the multiply-adds of a token in *unit*: embeddings cost none, and only the chosen experts count."""
    total = 0.0
    for module in unit.modules():
        if isinstance(module, nn.Embedding):
            continue
        for parameter in module.parameters(recurse=False):
            if parameter.ndim == 2:
                total += parameter.numel()
            elif parameter.ndim == 3:  # experts, stacked
                chosen = getattr(config, "num_experts_per_tok", None) or parameter.shape[0]
                total += parameter.numel() * min(1.0, chosen / parameter.shape[0])
    return total
