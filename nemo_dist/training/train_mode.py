"""Refuse what modules do in training and ranks cannot do apart: use statistics of a batch, leave out blocks at random.

Whether modules are in training is known when they run, as a user may call ``train()`` at any time. So it is judged when
a runtime is made, and again before every forward, on all ranks alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import nn

from nemo_dist.hf_model import class_name
from nemo_dist.mesh.mesh_context import MeshContext
from nemo_dist.planning.mesh_plan import Role
from nemo_dist.torch_private import BatchNorm
from nemo_dist.training.forward_code import Chance, chances


def refuse_in_training(models: Sequence[nn.Module], mesh: MeshContext, lockstep: bool) -> None:
    """Raise ValueError, now or before a forward, where *models* do in training what ranks or stages cannot do apart.

    ``lockstep``: ranks with other batches wait for each other, module by module.
    """
    stages = mesh.size(Role.LAYERS) > 1
    for model in models:
        if stages or mesh.size(Role.TOKENS) > 1:
            _before_forwards(model, _refuse_batch_statistics, list(_batch_norms(model)))
        if stages or lockstep:
            _before_forwards(model, _refuse_random_depth, list(chances(model)))


def _before_forwards(model: Any, judge: Callable[[Any, Any], None], found: Sequence[Any]) -> None:
    if found:
        judge(model, found)
        model.register_forward_pre_hook(lambda *_: judge(model, found), prepend=True)


def _batch_norms(model: nn.Module) -> Iterator[tuple[str, BatchNorm]]:
    return ((name, module) for name, module in model.named_modules() if isinstance(module, BatchNorm))


def _refuse_batch_statistics(model: nn.Module, norms: Sequence[tuple[str, BatchNorm]]) -> None:
    for name, norm in norms:
        if not norm.training and norm.running_mean is not None:
            continue
        freeze = "freeze its statistics, by .eval() of all such modules after model.train()"
        way = "put a norm of single rows in its place" if norm.running_mean is None else freeze
        raise ValueError(
            f"{class_name(model)} normalises a row by the rows beside it (in {name}, {class_name(norm)}), and these "
            f"are on other ranks or in other microbatches; {way}, or train on one process"
        )


def _refuse_random_depth(model: Any, found: Sequence[Chance]) -> None:
    for chance in found:
        if chance.acts:
            option = chance.path[-1]
            options = _options(model.config, option, chance.value) or [option]
            raise ValueError(
                f"{class_name(model)} leaves out blocks at random in training ({chance.name or 'it'}.{option}="
                f"{chance.value}), and ranks that gather blocks together, or stages, cannot leave out others; load it "
                f"with a config in which {' and '.join(options)} is 0.0, or with a strategy that has whole blocks on "
                "every rank"
            )


def _options(config: Any, name: str, value: Any, where: str = "") -> list[str]:
    """Return what *config* calls options that a module calls *name*: with the name of a tower in front, say."""
    found = [f"{where}{one}" for one, given in vars(config).items() if one.endswith(name) and given == value]
    towers = {tower: getattr(config, tower, None) for tower in config.sub_configs}
    inside = [_options(one, name, value, f"{where}{tower}.") for tower, one in towers.items() if one is not None]
    return sum(inside, found)
