"""Let PEFT's adapters on tensor-parallel layers compute this rank's features.

Every rank keeps the adapters whole, so they are saved, clipped and stepped as on one process. LoRA's second matrix
beside a layer whose output is cut, and its first one beside a layer whose input is cut, work like that layer, on a
piece that is taken in every forward; the backward gathers the gradients of all pieces. IA3's factors and DoRA's
magnitudes are cut alike.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any
from weakref import WeakSet

from torch import nn
from transformers.pytorch_utils import Conv1D

from nemo_dist.hf_model import inner_model
from nemo_dist.plugin.forwards import wrap_forward
from nemo_dist_tensor import layers
from nemo_dist_tensor.dora import dora
from nemo_dist_tensor.installed import Installed, installed_of
from nemo_dist_tensor.parallel_regions import Region
from nemo_dist_tensor.styles import COLUMN, EMBEDDING, GATHERED, ROW, WHOLE_INPUT

_ALIKE = EMBEDDING | {"replicate"}  # their inputs and outputs are whole, and used alike on all ranks


_adapted: WeakSet[nn.Module] = WeakSet()  # layers of PEFT


def install(parts: Sequence[nn.Module]) -> None:
    """Let the adapters in *parts* compute as the layers that they stand beside; raise ValueError where they cannot."""
    if "peft" not in sys.modules:
        return
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    for part in parts:
        model = inner_model(part)
        found: dict[str, Any] = {
            name: layer
            for name, layer in model.named_modules()
            if isinstance(layer, BaseTunerLayer | AuxiliaryTrainingWrapper)
            and layer not in _adapted
            and not getattr(type(layer), "in_place", False)  # a module of the model, whose forward is its own
        }
        problems = [f"{name} {problem}" for name, layer in found.items() if (problem := _problem(model, name, layer))]
        if problems:
            raise ValueError("adapters beside tensor-parallel layers: " + "; ".join(problems[:3]))
        for name, layer in found.items():
            _install(name, layer, installed_of(layer.get_base_layer()))
            _adapted.add(layer)


def _problem(model: nn.Module, name: str, layer: Any) -> str:
    """Say why the adapters of *layer* would not be exact, or return an empty string."""
    from peft.tuners.ia3 import IA3Layer
    from peft.tuners.lora import LoraLayer
    from peft.tuners.lora.variants import DoraLinearVariant

    variants = list(getattr(layer, "lora_variant", {}).values())
    if not isinstance(layer, LoraLayer | IA3Layer) or any(type(each) is not DoraLinearVariant for each in variants):
        kinds = ", ".join(type(variant).__name__ for variant in variants) or type(layer).__name__
        return f"is of a kind ({kinds}) that is not proven with tp; use LoRA, IA3, or DoRA beside linear layers"
    if any(getattr(layer, "lora_bias", {}).values()):
        return "has lora_bias, which is not proven with tp; leave it out"
    if any(isinstance(dropout, nn.Dropout) and dropout.p for dropout in getattr(layer, "lora_dropout", {}).values()):
        return "has lora_dropout, which tensor-parallel ranks would draw differently; set it to 0"
    outer = [model.get_submodule(".".join(name.split(".")[:end])) for end in range(1, name.count(".") + 1)]
    installed = installed_of(layer.get_base_layer())
    changed = [found.style for module in outer if (found := installed_of(module)) is not None]
    if installed and installed.style not in COLUMN | ROW | _ALIKE:
        changed.append(installed.style)
    if changed:
        return f"is within a module of the style {changed[0]!r}; target other modules"
    if installed is None or installed.style in _ALIKE:
        return ""
    if installed.style in ROW and installed.region.ends_in_tokens_of(name):
        return "ends a region of sequence parallelism; target other modules, or set sequence_parallel=False"
    if variants and isinstance(layer.get_base_layer(), Conv1D):
        return "has DoRA beside a weight that is transposed (Conv1D), which is not proven with tp; use LoRA"
    if installed.head is not None and (isinstance(layer, IA3Layer) or variants):
        return "gives logits that stay cut, which IA3 and DoRA cannot multiply; target other modules"
    return ""


def _install(name: str, layer: Any, installed: Installed | None) -> None:
    if installed is None or installed.style in _ALIKE:
        return
    rows, columns = installed.rows, installed.columns
    region = Region(name, installed.peers, None, None)
    if hasattr(layer, "ia3_l"):
        cut = installed.style in ROW - WHOLE_INPUT if layer.is_feedforward else installed.style in COLUMN - GATHERED
        if cut:
            wrap_forward(layer, partial(_with_factors, layer.ia3_l, columns if layer.is_feedforward else rows))
    elif installed.head is not None:
        for second in layer.lora_B.values():
            layers.head(second, region, installed.head, rows)
    elif installed.style in COLUMN:
        for second in layer.lora_B.values():
            layers.column(second, installed.style, region, rows)
    else:
        for first in layer.lora_A.values():
            layers.row(first, name, installed.style, region, columns)
    for magnitude in (getattr(layer, "lora_magnitude_vector", None) or {}).values():
        dora(magnitude, installed)


def _with_factors(
    factors: nn.Module, change: layers.Change, original: Callable[..., Any], *args: Any, **kwargs: Any
) -> Any:
    with layers.parameters_as(factors, change):
        return original(*args, **kwargs)
