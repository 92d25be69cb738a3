"""Find where a transformers model can be cut: the modules before its layers, the layers, and the modules after."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import attrs
from torch import nn

from nemo_dist.hf_model import detach_computed, has_towers
from nemo_dist_pipeline.partition.balance import balanced
from nemo_dist_pipeline.partition.skeleton import NO_PIPELINE, block_list, observe


@attrs.frozen(kw_only=True)
class ModelStructure:
    """The modules of a model that belong to one stage each, by full name, in the order of the forward.

    ``hidden``: the shape of the hidden states, in which "rows" and "length" stand for those of the batch. ``places``:
    how long the tuple is that a block returns with hidden states first; 0 where it returns them alone. ``tied``: the
    full names of the head's weight and of the embedding's, where the two are one parameter.
    """

    before: tuple[str, ...]
    layers: tuple[str, ...]
    after: tuple[str, ...]
    hidden: tuple[int | str, ...]
    places: int
    tied: tuple[str, str] | None = None

    @property
    def units(self) -> tuple[str, ...]:
        """All of these modules."""
        return (*self.before, *self.layers, *self.after)

    @classmethod
    def of(cls, model: Any) -> ModelStructure:
        """Find the structure of *model* by running its forward around its blocks; raise ValueError if it has none."""
        kind = type(model).__name__
        detach_computed(model)
        blocks = block_list(model)
        if given := sorted(_from_towers(model)):
            raise ValueError(
                f"the towers of {kind} give its blocks {', '.join(given)} besides the embedding, which stays on the "
                f"first stage; {NO_PIPELINE}"
            )
        seen = observe(model, blocks)
        units = tuple(_units(model, blocks))
        if loose := [name for name, _ in model.named_parameters() if not _inside(name, (*units, *blocks))]:
            raise ValueError(
                f"{kind}: {', '.join(loose[:5])} belong to no module that one stage could own; {NO_PIPELINE}"
            )
        when = {unit: seen.when(unit) for unit in units}
        if between := [unit for unit, times in when.items() if "between" in times or len(times) > 1]:
            raise ValueError(
                f"{kind} runs {', '.join(between[:5])} on several stages, between its blocks; {NO_PIPELINE}"
            )
        after = sorted((unit for unit in units if "after" in when[unit]), key=seen.first_call)
        before = sorted((unit for unit in units if unit not in after), key=seen.first_call)
        structure = cls(
            before=tuple(before), layers=tuple(blocks), after=tuple(after), hidden=seen.hidden, places=seen.places
        )
        structure._refuse_shared(model)
        return attrs.evolve(structure, tied=structure._tie(model))

    def _refuse_shared(self, model: Any) -> None:
        """Raise ValueError for a parameter of several units that the model does not declare as tied weights.

        It is in a checkpoint once, so a stage without the module of that name would draw its own.
        """
        declared = dict(getattr(model, "all_tied_weights_keys", None) or {})
        names: dict[nn.Parameter, list[str]] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            names.setdefault(parameter, []).append(name)
        for shared in names.values():
            own = [name for name in shared if name not in declared]
            if len({self._region(name) for name in own}) > 1:
                raise ValueError(
                    f"{type(model).__name__} uses one parameter as {', '.join(own[:5])}, and stages would have one "
                    f"each; {NO_PIPELINE}"
                )

    def _tie(self, model: Any) -> tuple[str, str] | None:
        """Return the tied weight's name in the head and its own name (in the embedding); refuse any other tie.

        Weights that are tied on one stage need nothing.
        """
        ties = dict(getattr(model, "all_tied_weights_keys", None) or {})
        across = {target: source for target, source in ties.items() if self._region(target) != self._region(source)}
        if not across:
            return None
        if len(across) == 1:
            target, source = next(iter(across.items()))
            if (self._region(target), self._region(source)) == ("after", "before"):
                return target, source
            if (self._region(target), self._region(source)) == ("before", "after"):
                return source, target
        raise ValueError(
            f"{type(model).__name__} ties {across}; a pipeline keeps only an output head tied to the embedding, and "
            "never unties silently: set tie_word_embeddings=False in the config, or use pp_size=1"
        )

    def _region(self, name: str) -> str | None:
        """Return "before" or "after" for what is around the blocks, and the block of a name that is in one."""
        unit = self.owner(name)
        return "before" if unit in self.before else "after" if unit in self.after else unit

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


def _units(module: nn.Module, blocks: Mapping[str, nn.Module], prefix: str = "") -> Iterator[str]:
    """Yield the names of the modules with parameters around *blocks*: the largest ones without a block in them."""
    for name, child in module.named_children():
        path = f"{prefix}{name}"
        if any(block.startswith(f"{path}.") for block in blocks):
            yield from _units(child, blocks, f"{path}.")
        elif path not in blocks and next(child.parameters(), None) is not None:
            yield path


def _from_towers(model: Any) -> set[str]:
    """Return what the language model of *model* takes that a batch does not have, so that towers must make it."""
    decoder = model.get_decoder()
    if decoder is model or not has_towers(model):
        return set()
    taken, given = (inspect.signature(type(module).forward).parameters for module in (decoder, model))
    tensors = {name for name, parameter in taken.items() if "Tensor" in str(parameter.annotation)}
    return {name for name in tensors - given.keys() if name != "cache_position"}


def _inside(name: str, units: Iterable[str]) -> bool:
    return name.startswith(tuple(f"{unit}." for unit in units))


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
