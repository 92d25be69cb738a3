"""Facts about a transformers model, each in one place: its repeated blocks, unsharded class, towers and kind of loss.

Imports neither torch nor transformers, so planning code may use it too. Plugins may import it.
"""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

IGNORED = -100  # the label value that the losses of torch and transformers ignore
MASKED = "bbox_first_token_mask"  # in a forward: leaves labels out of the mean that are not -100
INITIALIZED = "_is_hf_initialized"  # marks tensors that transformers must not draw
# Floating-point inputs of the language model itself; any other one goes to a tower that runs only when it is given.
_OWN = frozenset({"attention_mask", "inputs_embeds", "labels", "shift_labels"})
_LIBRARIES = ("torch.", "transformers.", "peft.", "nemo_dist")
_OWN_DTYPE = re.compile(r"\bself\.dtype\b|\bself\.parameters\(\)\)\.dtype\b")
NEXT_TOKEN_LOSSES = ("ForCausalLM", "ForConditionalGeneration")  # values of ``model.loss_type``


def inner_model(part: nn.Module) -> nn.Module:
    """Return the transformers model in *part*: *part* itself, or the model inside a wrapper (a plugin's, PEFT's).

    Returns *part* unchanged when it holds no transformers model. Raises ValueError when it holds several side by side.
    """
    if _is_transformers_model(part):  # mostly; a step asks too
        return part
    outermost: dict[str, nn.Module] = {}
    for name, module in part.named_modules():
        inside = any(not outer or name.startswith(f"{outer}.") for outer in outermost)
        if not inside and _is_transformers_model(module):
            outermost[name] = module
    if len(outermost) > 1:
        raise ValueError(f"{type(part).__name__} holds several models ({', '.join(outermost)}); wrap one of them")
    return next(iter(outermost.values()), part)


def _is_transformers_model(module: nn.Module) -> bool:
    return any(kind.__name__ == "PreTrainedModel" for kind in type(module).__mro__)


def name_root(part: nn.Module) -> nn.Module:
    """Return the module of *part* whose ``named_parameters`` gives the checkpoint names: the transformers model in it.

    With PEFT adapters it is PEFT's wrapper, because adapter files use the names under that wrapper.
    """
    return part if hasattr(part, "get_base_model") else inner_model(part)


def plain_class(module: nn.Module) -> type[Any]:
    """Return the class of *module* without torch's sharding: ``LlamaForCausalLM`` for ``FSDPLlamaForCausalLM``.

    torch's ``fully_shard`` and ``replicate`` replace the class of a module by a subclass of it.
    """
    kind: Any = type(module)  # mypy takes no class for hashable
    return _unsharded(kind)


@lru_cache(maxsize=4096)
def _unsharded(kind: type[Any]) -> type[Any]:
    for base in kind.__mro__:
        if not any(other.__module__.startswith("torch.distributed") for other in base.__mro__):
            return base
    return kind


def class_name(module: nn.Module) -> str:
    """Return the name of the unsharded class of *module*, for error messages and manifests."""
    return plain_class(module).__name__


def block_names(model: nn.Module) -> frozenset[str]:
    """Return the class names of the repeated blocks of *model*, its ``_no_split_modules``; empty if it has none."""
    return frozenset(getattr(model, "_no_split_modules", None) or ())


def blocks(model: nn.Module) -> dict[str, nn.Module]:
    """Return the repeated blocks of *model* by module name, in module order, without blocks inside other blocks."""
    wanted = block_names(model)
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if class_name(module) in wanted and not any(name.startswith(f"{outer}.") for outer in found):
            found[name] = module
    return found


def input_embedding(model: Any) -> Any:
    """Return the embedding of the tokens of *model*; None where transformers knows of none, as in CANINE."""
    try:
        return model.get_input_embeddings()
    except NotImplementedError:
        return None


def detach_computed(model: nn.Module) -> None:
    """Let *model*, on meta, be copied: detach what a module keeps that is computed from its parameters.

    So are the weights of torch's old ``weight_norm`` and of pruning, computed anew before every forward.
    """
    for module in model.modules():
        for name, value in list(vars(module).items()):
            if getattr(value, "grad_fn", None) is not None:
                setattr(module, name, value.detach())


def has_towers(model: Any) -> bool:
    """Whether *model* has several towers (a vision and a language model, say), of which a forward may skip some."""
    return len(getattr(model.config, "sub_configs", ())) > 1


def towers(model: Any) -> Iterator[str]:
    """Yield the attribute names of the tower configs in the config of *model* (``text_config``, ``vision_config``)."""
    yield from model.config.sub_configs


def is_media(name: str, value: Any) -> bool:
    """Whether *value*, called *name* in a batch, is the input of a tower: pixels or sound, say."""
    return name not in _OWN and hasattr(value, "is_floating_point") and bool(value.is_floating_point())


def has_adapters(model: Any) -> bool:
    """Whether adapters were loaded into *model* with transformers' ``load_adapter``."""
    return bool(getattr(model, "_hf_peft_config_loaded", False))


@contextmanager
def without_adapters(model: Any) -> Iterator[tuple[Any, dict[str, Any]]]:
    """Within the context, modules that PEFT wraps are in the places of its wrappers; yield the transformers model.

    Also yields the parameters that PEFT added, by name. Where it trains a copy of a module, that is in its place. Of
    None, yields None.
    """
    added: dict[str, Any] = {}
    if model is None:
        yield None, added
        return
    inner: Any = inner_model(model)
    slots = []
    for outer, parent in inner.named_modules():
        for key, child in parent.named_children():
            if _is_wrapper(child) and not _is_wrapper(parent):
                slots.append((parent, key, child))
                known = {id(parameter) for parameter in _wrapped(child).parameters()}
                added |= {
                    f"{outer}.{key}.{name}".removeprefix("."): parameter
                    for name, parameter in child.named_parameters()
                    if id(parameter) not in known and not name.startswith("original_module.")
                }
    for parent, key, child in slots:
        parent._modules[key] = _wrapped(child)
    try:
        yield inner, added
    finally:
        for parent, key, child in slots:
            parent._modules[key] = child


def _is_wrapper(module: Any) -> bool:
    """Whether PEFT put *module* in the place of another one, which it holds."""
    of_peft = any(kind.__module__.startswith("peft.") for kind in type(module).__mro__)
    return of_peft and ("base_layer" in module._modules or "modules_to_save" in module._modules)


def _wrapped(module: Any) -> Any:
    """Return what PEFT wraps in *module*, or the copy of it that is trained."""
    while _is_wrapper(module):
        copies = module._modules.get("modules_to_save", {})
        module = next(iter(copies.values())) if copies else module.get_base_layer()
    return module


def predicts_next_token(model: Any) -> bool:
    """Whether the loss of *model* compares a token's output with the next label, as in decoder-only language models."""
    return loss_kind(model) in NEXT_TOKEN_LOSSES and not model.config.is_encoder_decoder


def has_own_code(model: nn.Module) -> bool:
    """Whether *model* has a module of the user's own class, from neither transformers, torch, PEFT nor a plugin."""
    return any(map(is_own_code, model.modules()))


def is_own_code(module: nn.Module) -> bool:
    """Whether *module* itself is of such a class."""
    return is_own_class(plain_class(module))


def is_own_class(kind: Any) -> bool:
    """Whether *kind* is such a class; or such a function."""
    return not f"{kind.__module__}.".startswith(_LIBRARIES)


def loss_kind(model: Any) -> str | None:
    """Return the key of transformers' loss functions that *model* trains with: its ``loss_type``, or the default.

    transformers finds the type in the name of the class, and many names have none (GPT2LMHeadModel); where such a
    forward calls ``self.loss_function``, that is the default one.
    """
    kind: str | None = getattr(model, "loss_type", None)
    return NEXT_TOKEN_LOSSES[0] if kind is None and "loss_function" in loss_names(model) else kind


def loss_names(model: Any) -> set[str]:
    """Return the names of losses and loss masks in the code of the first forward, in MRO order, that has any."""
    for kind in type(model).__mro__:
        forward = vars(kind).get("forward")
        code = getattr(inspect.unwrap(forward), "__code__", None) if forward else None
        names = {*code.co_names, *code.co_varnames} if code else set()
        found = {name for name in names if "loss" in name.lower() or name == MASKED}
        if found:
            return found
    return set()


def loss_function_of(model: Any) -> Any:
    """Return the function that was set as ``model.loss_function``; None where that is transformers' own choice."""
    return vars(model).get("_loss_function")


def accepts(module: nn.Module, argument: str) -> bool:
    """Whether the forward of *module* takes *argument*, by name or among the keywords that it hands on.

    It does not hand on what its code gives a constant to: that would be given twice.
    """
    parameters = inspect.signature(module.forward).parameters
    hands_on = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    forward: Any = inspect.unwrap(module.forward)
    return argument in parameters or (hands_on and argument not in _constants(getattr(forward, "__func__", forward)))


@lru_cache(maxsize=256)
def _constants(forward: Any) -> set[str]:
    """Return the names of the arguments that the code of *forward* gives a value of its own, as in ``f(a=False)``."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(forward)))
    except (OSError, TypeError, SyntaxError):
        return set()
    given = [node for node in ast.walk(tree) if isinstance(node, ast.keyword) and isinstance(node.value, ast.Constant)]
    return {node.arg for node in given if node.arg is not None}


def attention_of(model: Any) -> str:
    """Return the name of the attention that *model* was loaded with: "sdpa", "eager", "flash_attention_2", ..."""
    return str(getattr(getattr(model, "config", None), "_attn_implementation", None))


def set_attention(config: Any, name: str) -> None:
    """Let models that are made from *config* use the attention *name*."""
    config._attn_implementation = name


def dtype_plan(model: Any, dtype: Any) -> dict[str, Any]:
    """Return the dtypes of the tensors that transformers loads in another one than *dtype*, by a part of their names.

    The parts are regular expressions, in which a lone "*" stands for anything.
    """
    return dict(model._get_dtype_plan(dtype))


def compute_experts_one_by_one(model: Any) -> None:
    """Have the experts of *model* take their own tokens in turn: the faster ways need all experts, or float32."""
    if model._can_set_experts_implementation():
        model.set_experts_implementation("eager")


def reads_weight(model: Any, name: str) -> bool:
    """Whether code of *model* reads a parameter of the module *name* by itself, other than by calling the module."""
    return _reads(model, name, "")


def reads_values(model: Any, name: str) -> bool:
    """Whether code of *model* reads numbers of a parameter of the module *name* by itself, not only its dtype, say."""
    return _reads(model, name, r"(?!\.(dtype|device|shape)\b)")


def _reads(model: Any, name: str, after: str) -> bool:
    """Whether code of *model* names a parameter of the module *name*, followed by what matches *after*."""
    leaf = name.rpartition(".")[2]
    own = "|".join(one for one, _ in model.get_submodule(name).named_parameters(recurse=False))
    if not own or not leaf.isidentifier():  # one of a list, which code cannot name
        return False
    kinds: dict[Any, None] = dict.fromkeys(plain_class(module) for module in model.modules())
    # Not in a string, as names of ties are.
    read = re.compile(rf"^[^\"'#]*\.{leaf}\.({own})\b{after}", re.MULTILINE)
    sources = (source for source in map(forward_source, kinds) if f".{leaf}." in source)  # as most have none
    return any(map(read.search, sources))


def gives_dtype(model: Any, name: str) -> bool:
    """Whether code around the module *name* takes the dtype of its first parameter for that of the compute.

    Masks are cast so: ``mask.to(self.dtype)``, ``next(self.parameters()).dtype``.
    """
    parts = name.split(".")
    for outer in [".".join(parts[:depth]) for depth in range(len(parts))]:
        module = model.get_submodule(outer)
        kind: Any = plain_class(module)
        first = next((one for one, parameter in module.named_parameters(outer) if parameter.is_floating_point()), "")
        if first.startswith(f"{name}.") and _OWN_DTYPE.search(forward_source(kind)):
            return True
    return False


@lru_cache(maxsize=4096)
def forward_source(kind: type[Any]) -> str:
    """Return the source of *kind* and of the classes that it has its forward from, without those of torch."""
    if kind.__module__.startswith("torch."):
        return ""
    try:
        own = [base for base in kind.__mro__ if "forward" in vars(base) and not base.__module__.startswith("torch.")]
        return "\n".join(inspect.getsource(base) for base in own)
    except (OSError, TypeError):
        return ""
