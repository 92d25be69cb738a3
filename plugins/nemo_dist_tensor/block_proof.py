"""Prove, before a weight is read, that a block computes with cut tokens between its regions what it does with all.

A model of the user's own code is proven as a whole, too: its code may do anything between the modules that are cut.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import attrs
from torch import nn
from torch.distributed.tensor import Placement

from nemo_dist.hf_model import class_name
from nemo_dist_tensor.block_structure import Blocks
from nemo_dist_tensor.collectives import Peers
from nemo_dist_tensor.install import Installer
from nemo_dist_tensor.probe import Recording, prove, whole_model
from nemo_dist_tensor.tp_plan import Rules, generic

_BLOCK = "block"


class Alone(nn.Module):
    """One block by itself, under a name, as blocks are found by name."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the block."""
        return self.block(*args, **kwargs)


def sequence_problems(model: Any, rules: Rules, recording: Recording, ranks: int) -> list[str]:
    """Return why tokens cannot be cut between the regions of *model*, one sentence for each kind of block."""
    blocks = Blocks.of(model, rules)
    if blocks.problems():
        return []  # they are told with the other reasons
    problems, known = [], set()
    for name in blocks.blocks:
        block, call = recording.modules[name], recording.calls.get(name)
        if call is None or id(block) in known:
            continue
        known.add(id(block))
        inside = _inside(rules, name)

        def cut(twin: nn.Module, peers: Peers, inside: Rules = inside) -> Mapping[str, Placement | None]:
            installer = Installer(twin, model.config, inside, peers)
            placements = installer.placements()
            alone = Blocks(twin, inside, {_BLOCK: twin.get_submodule(_BLOCK)})
            installer.install(alone.install(peers, sequence=True))
            return placements

        verdict = prove(Alone(block), call, 2 if ranks % 2 == 0 else ranks, cut)
        why = verdict.problem
        if verdict.summed:
            why = f"the gradient of {min(verdict.summed).removeprefix(_BLOCK + '.')} differs"
        if why:
            problems.append(
                f"sequence_parallel: {generic(name)} does not compute with cut tokens what it computes with all: "
                f"{why}; use sequence_parallel=False"
            )
    return list(dict.fromkeys(problems))


def model_problems(model: Any, rules: Rules, ranks: int, sequence: bool) -> list[str]:
    """Return why *model* does not compute by *rules* what it computes whole; it runs with random weights."""

    def cut(twin: nn.Module, peers: Peers) -> Mapping[str, Placement | None]:
        installer = Installer(twin, model.config, rules, peers)
        placements = installer.placements()
        installer.install(Blocks.of(twin, rules).install(peers, sequence))
        return placements

    verdict = prove(*whole_model(model), 2 if ranks % 2 == 0 else ranks, cut)
    why = verdict.problem or "".join(f"the gradient of {name} differs" for name in sorted(verdict.summed)[:1])
    found = (
        f"{class_name(model)} does not compute with its projections cut over ranks what it computes with whole ones, "
        f"though each module with projections does: {why}; use tp_size=1 and shard it with fsdp2"
    )
    return [found] if why else []


def _inside(rules: Rules, block: str) -> Rules:
    """Return those of *rules* that are for the *block*, by the names that they have in ``Alone``."""

    def renamed(given: Mapping[str, Any]) -> dict[str, Any]:
        return {
            _BLOCK + name[len(block) :]: value for name, value in given.items() if f"{name}.".startswith(f"{block}.")
        }

    returned = None
    if rules.returned is not None:
        returned = {name: _BLOCK + value[len(block) :] for name, value in renamed(rules.returned).items()}
    return attrs.evolve(
        rules,
        modules=renamed(rules.modules),
        parameters=renamed(rules.parameters),
        divided=renamed(rules.divided),
        joining=renamed(rules.joining),
        returned=returned,
    )
