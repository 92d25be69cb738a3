"""Find the repeated blocks of a model and their regions, and check whether tokens can be sharded between regions."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from functools import cached_property
from typing import Any

import attrs
from torch import nn

from nemo_dist.hf_model import blocks
from nemo_dist_tensor.collectives import Peers
from nemo_dist_tensor.layers import summed
from nemo_dist_tensor.parallel_regions import Region, Stack
from nemo_dist_tensor.styles import ROW
from nemo_dist_tensor.tp_plan import Rules, generic


@attrs.frozen(eq=False, slots=False)
class Blocks:
    """The blocks of *model* that contain a rule, by name, in the order in which they run."""

    model: Any
    rules: Rules
    blocks: Mapping[str, nn.Module]

    @classmethod
    def of(cls, model: Any, rules: Rules) -> Blocks:
        """Find the outermost modules of the classes that *model* declares indivisible."""
        found = blocks(model)
        planned = [*rules.modules, *rules.parameters]
        used = {name: block for name, block in found.items() if any(rule.startswith(f"{name}.") for rule in planned)}
        return cls(model, rules, used)

    def ruled(self, name: str) -> list[str]:
        """Return the modules and parameters with a rule in the module *name*, itself included."""
        return [rule for rule in (*self.rules.modules, *self.rules.parameters) if f"{rule}.".startswith(f"{name}.")]

    def _regions(self) -> Iterator[tuple[str, nn.Module]]:
        for block in self.blocks:
            yield from self._regions_of(block)

    def _regions_of(self, block: str) -> Iterator[tuple[str, nn.Module]]:
        for child, inner in self.blocks[block].named_children():
            if self.ruled(f"{block}.{child}"):
                yield f"{block}.{child}", inner

    def between(self) -> Iterator[tuple[str, nn.Module]]:
        """Yield the modules of the blocks that have parameters and lie between the regions."""
        regions = dict(self._regions())
        for block, module in self.blocks.items():
            for name, inner in module.named_modules(prefix=block):
                inside = any(f"{name}.".startswith(f"{region}.") for region in regions)
                if not inside and any(True for _ in inner.parameters(recurse=False)):
                    yield name, inner

    def exits(self) -> dict[str, str | None]:
        """Return the regions by name, each with the projection whose output is the region's output, or None."""
        return {name: self._exit(name, module) for name, module in self._regions()}

    def styles_in(self, region: str) -> dict[str, str]:
        """Return the rules for modules in *region*, by name."""
        return {name: self.rules.modules[name] for name in self.ruled(region) if name in self.rules.modules}

    def reached(self, region: str, trained: Collection[str], first: int) -> tuple[bool, bool]:
        """Whether a backward needs the gradients of what *region* reads, and of what it gives.

        It does where something before is *trained* (names of parameters, adapters included), or something inside.
        *first*: the place of the first of them among the parameters of the model.
        """
        block = region.rpartition(".")[0]
        start, end = self._places[block]
        if not start <= first < end:
            return first < start, first < start
        before = [name for name, _ in self._regions_of(block)]
        later = tuple(f"{name}." for name in before[before.index(region) :])
        own = [name for name in trained if name.startswith(f"{block}.")]
        reads = not all(name.startswith(later) for name in own)
        return reads, reads or any(name.startswith(f"{region}.") for name in own)

    def follow(self, first: int) -> bool:
        """Whether all blocks come after the parameter at the place *first* of the model."""
        return first < min((start for start, _ in self._places.values()), default=0)

    def recomputed(self, region: str, first: int) -> bool:
        """Whether a backward comes to the block of *region*, where the first trained parameter is at *first*."""
        return first < self._places[region.rpartition(".")[0]][1]

    @cached_property
    def _places(self) -> dict[str, tuple[int, int]]:
        """The places of the first parameter of every block and of the first one after it, among all of the model."""
        places = {id(parameter): place for place, parameter in enumerate(self.model.parameters())}
        own = {name: [places[id(p)] for p in block.parameters()] for name, block in self.blocks.items()}
        return {name: (min(found), max(found) + 1) for name, found in own.items()}

    def ends_its_block(self, region: str) -> bool:
        """Whether nothing after *region* in its block needs its output in the backward."""
        block = region.rpartition(".")[0]
        *_, (last, _) = self._regions_of(block)
        normed = any(name.startswith("post_feedforward") for name, _ in self.blocks[block].named_children())
        return region == last and not normed

    def problems(self) -> list[str]:
        """Say why the tokens between the regions cannot be sharded, one sentence each."""
        kind = type(self.model).__name__
        if not self.blocks:
            return [f"sequence_parallel: {kind} declares no blocks; use sequence_parallel=False"]
        found = {
            f"sequence_parallel: {generic(name)} is planned but stands alone in its block, not in an attention or "
            "feed-forward module; use sequence_parallel=False"
            for name, _ in self._regions()
            if name in self.rules.modules and isinstance(self.model.get_submodule(name), nn.Linear)
        }
        found |= {
            f"sequence_parallel: {generic(name)} ({type(inner).__name__}) is neither in the plan nor a norm, so its "
            "tokens cannot be cut; give it a rule in tp_plan or use sequence_parallel=False"
            for name, inner in self.between()
            if any(parameter.ndim != 1 for parameter in inner.parameters(recurse=False)) or name in self.blocks
        }
        found |= {
            f"sequence_parallel: {generic(name)} is given hidden states twice ({self.rules.joining[name]} too), of "
            "which one would be cut and the other whole; use sequence_parallel=False"
            for name, _ in self._regions()
            if name in self.rules.joining
        }
        return sorted(found)

    def install(self, peers: Peers, sequence: bool) -> dict[str, Region]:
        """Install the regions, and with *sequence* shard the tokens between them; return the region of every rule."""
        stacks: dict[str, Stack] = {}
        regions: dict[str, Region] = {}
        if sequence:
            stacks = self._stacks(peers)
            for _, inner in self.between():
                summed(inner, peers)
        for name, module in self._regions():
            stack = stacks.get(name.rpartition(".")[0].rpartition(".")[0])
            region = Region(name, peers, stack, self._exit(name, module))
            region.install(module)
            regions |= dict.fromkeys(self.ruled(name), region)
        return regions

    def _stacks(self, peers: Peers) -> dict[str, Stack]:
        """Shard the tokens of every list of blocks, from the input of its first block to the output of its last."""
        lists: dict[str, list[nn.Module]] = {}
        for name, block in self.blocks.items():
            lists.setdefault(name.rpartition(".")[0], []).append(block)
        stacks = {}
        for name, members in lists.items():
            stacks[name] = Stack(peers)
            stacks[name].open(members[0])
            stacks[name].close(members[-1])
        return stacks

    def _exit(self, name: str, module: nn.Module) -> str | None:
        """Return the projection whose output is that of the region *name*: its only row-wise one, at the end."""
        rows = [rule for rule in self.ruled(name) if self.rules.modules.get(rule) in ROW]
        plain = not any(isinstance(inner, nn.Dropout) for inner in module.modules())
        direct = len(rows) == 1 and rows[0].rpartition(".")[0] == name and plain
        experts = any(self.rules.modules.get(rule) == "moe_tp_experts" for rule in self.ruled(name))
        changed = self.rules.returned is not None and self.rules.returned.get(name) not in rows
        return rows[0] if direct and not experts and not changed else None
