"""Switch on transformers' own activation checkpointing, in every mode of the model and in the scope asked for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import Cache, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from nemo_dist.hf_model import accepts, class_name, towers
from nemo_dist.plugin.forwards import wrap_forward
from nemo_dist.torch_private import BatchNorm
from nemo_dist.training.counted_calls import SecondForward
from nemo_dist_recompute.policy import selective_contexts

if TYPE_CHECKING:
    from nemo_dist_recompute.config import RecomputeConfig


def recompute(model: Any, config: RecomputeConfig) -> None:
    """Make the layers of *model* recompute during the backward.

    transformers recomputes only in training mode, and what ``from_pretrained`` returns is in evaluation mode; here a
    layer recomputes whenever gradients are recorded, so that saving memory does not depend on dropout being on.

    Raises ValueError for a model without such layers, for a scope that it does not have, and for one whose second
    forward is another one.
    """
    layers = recomputable(model)
    chosen = _in_scope(model, layers, config.scope)
    _refuse_other_second_forwards(model, config.scope)
    routed = any("expert" in name for name in model.config.get_text_config().to_dict())
    context = {"context_fn": partial(selective_contexts, routed)} if config.mode == "selective" else {}
    model.activation_checkpointing_enable({"use_reentrant": False, **context})
    model.disable_input_require_grads()  # only reentrant checkpointing needs inputs that require gradients
    model.register_forward_pre_hook(_without_cache, with_kwargs=True)
    norms = [(n, m) for n, m in model.named_modules() if isinstance(m, BatchNorm) and _is_inside(n, chosen, model)]
    if norms:
        model.register_forward_pre_hook(partial(_refuse_running_statistics, norms))
    layer: Any
    for layer in layers:
        layer.gradient_checkpointing = False  # transformers' own, which only knows the forward of the class
        if layer in chosen:
            wrap_forward(layer, partial(_recomputed, layer))


def recomputable(model: Any) -> list[nn.Module]:
    """Return the layers of *model* that can recompute; raise ValueError for a model without any."""
    layers: list[nn.Module] = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not model.supports_gradient_checkpointing or not layers:
        raise ValueError(
            f"{type(model).__name__} has no layers that transformers can recompute; "
            "leave activation_checkpointing out for this model"
        )
    return layers


def _refuse_other_second_forwards(model: Any, scope: tuple[str, ...]) -> None:
    """Raise ValueError where layers of *model*, of the user's own code, do not compute the same when run once more."""
    second = SecondForward.of_layers(model, lambda copy: _in_scope(copy, recomputable(copy), scope))
    where = second.where
    if where is None and second.drew:
        where = "it draws by a generator of Python or numpy, which is not put back"
    if where is not None:
        raise ValueError(
            f"{class_name(model)} computes or keeps something else in a second forward in training ({where}), and "
            "recomputation runs layers twice; keep nothing in layers from one forward for the next and draw by torch's "
            "generators, or leave activation_checkpointing out for this model"
        )


def _is_inside(name: str, layers: Iterable[nn.Module], model: nn.Module) -> bool:
    wanted = set(layers)
    return any(model.get_submodule(".".join(name.split(".")[:end])) in wanted for end in range(name.count(".") + 1))


def _refuse_running_statistics(norms: Sequence[tuple[str, Any]], model: nn.Module, _: Any) -> None:
    """Raise ValueError where a norm in a layer that recomputes would count a batch twice in its running statistics."""
    for name, norm in norms:
        if torch.is_grad_enabled() and norm.training and norm.track_running_stats:
            raise ValueError(
                f"{class_name(model)} keeps running statistics of batches (in {name}, {class_name(norm)}), and "
                "recomputation runs layers twice; freeze them, by .eval() of all such modules after model.train(), or "
                "leave activation_checkpointing out for this model"
            )


def kinds(model: nn.Module) -> str:
    """Return the classes of the layers of *model* that can recompute, and how many of each there are."""
    names = Counter(class_name(module) for module in model.modules() if isinstance(module, GradientCheckpointingLayer))
    return ", ".join(f"{count} {name}" for name, count in names.items())


def _without_cache(model: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
    """Let a forward that records gradients make no cache: a layer that ran twice would write its tokens twice."""
    if not torch.is_grad_enabled() or any(isinstance(value, Cache) for value in kwargs.values()):
        return None
    return args, {**kwargs, "use_cache": False} if accepts(model, "use_cache") else kwargs


def _recomputed(layer: Any, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Run *forward* of *layer*, to be run again in the backward if gradients are recorded and it fills no cache."""
    caches = any(isinstance(value, Cache) for value in (*args, *kwargs.values()))
    if not torch.is_grad_enabled() or (caches and not layer._can_checkpoint_with_cache):
        return forward(*args, **kwargs)
    names, places = tuple(kwargs), len(args)

    def run(*given: Any) -> Any:
        return forward(*given[:places], **dict(zip(names, given[places:], strict=True)))

    # torch keeps the random state of the devices of what it is given by place, and of no others.
    return layer._gradient_checkpointing_func(run, *args, *kwargs.values())


def _in_scope(model: Any, layers: Iterable[nn.Module], scope: tuple[str, ...]) -> set[nn.Module]:
    if scope == ("all",):
        return set(layers)
    towers = list(_towers(model))
    kinds = {kind for kind, _ in towers} | ({"multimodal"} if any(kind != "language" for kind, _ in towers) else set())
    missing = [name for name in scope if name not in kinds]
    if missing:
        raise ValueError(
            f"activation_checkpointing_scope names {', '.join(map(repr, missing))}, but {type(model).__name__} has no "
            f"such part; it has {', '.join(sorted(kinds))}"
        )
    wanted = {kind for kind, _ in towers if kind in scope or (kind != "language" and "multimodal" in scope)}
    tower_of: dict[nn.Module, str] = {}
    for module in model.modules():  # outer modules come first, so the innermost tower of a layer wins
        for kind, config in towers:
            if isinstance(module, PreTrainedModel) and module.config is config:
                tower_of.update(dict.fromkeys(module.modules(), kind))
    return {layer for layer in layers if tower_of.get(layer) in wanted}


def _towers(model: Any) -> Iterator[tuple[str, Any]]:
    """Yield the kind and the config of every tower of *model*; a model of one tower is a language model."""
    language = model.config.get_text_config()
    yield "language", language
    for name in towers(model):
        config = getattr(model.config, name)
        if config is not None and config is not language:
            kind = next((kind for kind in ("vision", "audio") if kind in name), name)
            yield kind, config
