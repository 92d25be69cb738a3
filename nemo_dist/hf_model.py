"""What is known of a transformers model, once: its blocks, its plain class, its towers, its kind of loss.

Imports neither torch nor transformers, so that planning code may ask too. Plugins may import it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

IGNORED = -100  # torch's and transformers' mark of a label that does not count
NEXT_TOKEN_LOSSES = ("ForCausalLM", "ForConditionalGeneration")  # values of ``model.loss_type``


def inner_model(part: nn.Module) -> nn.Module:
    """Return the transformers model in *part*: itself, or the one that a wrapper (a plugin's, PEFT's) holds.

    Raises ValueError when *part* holds several side by side.
    """
    outermost: dict[str, nn.Module] = {}
    for name, module in part.named_modules():
        inside = any(not outer or name.startswith(f"{outer}.") for outer in outermost)
        if not inside and any(kind.__name__ == "PreTrainedModel" for kind in type(module).__mro__):
            outermost[name] = module
    if len(outermost) > 1:
        raise ValueError(f"{type(part).__name__} holds several models ({', '.join(outermost)}); wrap one of them")
    return next(iter(outermost.values()), part)


def name_root(part: nn.Module) -> nn.Module:
    """Return the module relative to which the parameters of *part* are named: the transformers model in it.

    With adapters it is PEFT's wrapper, under whose names their files are known.
    """
    return part if hasattr(part, "get_base_model") else inner_model(part)


def plain_class(module: nn.Module) -> type[Any]:
    """Return the class of *module* below what sharding made of it: ``LlamaForCausalLM`` of ``FSDPLlamaForCausalLM``.

    torch's ``fully_shard`` and ``replicate`` give a module a class of their own that is derived from the one it had.
    """
    for kind in type(module).__mro__:
        if not any(base.__module__.startswith("torch.distributed") for base in kind.__mro__):
            return kind
    return type(module)


def class_name(module: nn.Module) -> str:
    """Return the name of the plain class of *module*, for messages and manifests."""
    return plain_class(module).__name__


def block_names(model: nn.Module) -> frozenset[str]:
    """Return the names of the classes that *model* declares indivisible: its repeated blocks; empty where none are."""
    return frozenset(getattr(model, "_no_split_modules", None) or ())


def blocks(model: nn.Module) -> dict[str, nn.Module]:
    """Return the repeated blocks of *model* by name, in the order in which it lists them: the outermost ones."""
    wanted = block_names(model)
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if class_name(module) in wanted and not any(name.startswith(f"{outer}.") for outer in found):
            found[name] = module
    return found


def has_towers(model: Any) -> bool:
    """Whether *model* has several towers (text and images, say), of which a forward may leave some out."""
    return len(getattr(model.config, "sub_configs", ())) > 1


def towers(model: Any) -> Iterator[str]:
    """Yield the names under which the config of *model* has the configs of its towers."""
    yield from model.config.sub_configs


def has_adapters(model: Any) -> bool:
    """Whether *model* holds adapters that it loaded by itself, with ``load_adapter``."""
    return bool(getattr(model, "_hf_peft_config_loaded", False))


def predicts_next_token(model: Any) -> bool:
    """Whether the loss of *model* compares a token's output with the *next* label: a decoder's, not of its own."""
    return getattr(model, "loss_type", None) in NEXT_TOKEN_LOSSES and not model.config.is_encoder_decoder
