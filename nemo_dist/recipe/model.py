"""Load the model of a recipe, or make a new one, and add the adapters that it asks for."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import torch

from nemo_dist.errors import UnknownNameError
from nemo_dist.models.auto_model import NeMoAutoModelForCausalLM
from nemo_dist.models.meta_model import in_one_line, making_a_model, read_config
from nemo_dist.planning.validation import near, shown
from nemo_dist.recipe.config import ModelSection
from nemo_dist.setup.setup import DistributedSetup
from nemo_dist.training.peft_adapters import refuse_copies

_OF_POSITIONS = re.compile(r"pos|\bwpe\b")  # in names of parameters: wpe, embed_positions, position_embeddings
_BESIDE = 2  # rows of a table that some models keep for padding


def load_model(section: ModelSection, setup: DistributedSetup) -> Any:
    """Return the model, sharded as *setup* says, with its adapters; collective over all ranks."""
    options: dict[str, Any] = {"dtype": section.dtype, **section.options}
    if section.attn_implementation is not None:
        options["attn_implementation"] = section.attn_implementation
    if section.config is None:
        model = NeMoAutoModelForCausalLM.from_pretrained(section.path, distributed_setup=setup, **options)
    else:
        options["dtype"] = getattr(torch, section.dtype)
        model = NeMoAutoModelForCausalLM.from_config(config_of(section), distributed_setup=setup, **options)
    config = adapter_config(section)
    return model if config is None else setup.add_adapters(model, config)


def weightless(section: ModelSection) -> Any:
    """Return the model without weights and adapters; raise ValueError where transformers makes none of its config."""
    from transformers import AutoModelForCausalLM

    config = config_of(section)
    # In the dtype that is stored, as bytes are counted by it; "auto" is that of the files, which their config says.
    options = {} if section.dtype == "auto" else {"dtype": getattr(torch, section.dtype)}
    trusted = section.options.get("trust_remote_code")
    with making_a_model(config), torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=trusted, **options)


def config_of(section: ModelSection) -> Any:
    """Return the transformers config of the model, which takes the loader's options as the loader itself does."""
    from transformers import AutoConfig

    if section.config is None:
        return read_config(str(section.path), **section.options)
    fields = dict(section.config)
    try:
        return AutoConfig.for_model(fields.pop("model_type"), **fields)
    except Exception as error:  # a class checks its fields in its own way
        raise ValueError(f"model.config is refused by transformers: {in_one_line(error)}") from error


def positions_of(section: ModelSection, needed: int) -> int | None:
    """Return of how many positions the model has a table, learned or computed once, if fewer than *needed*.

    None otherwise, and for a model that takes any number, as with rotary positions.
    """
    longest = getattr(config_of(section).get_text_config(), "max_position_embeddings", None)
    if not isinstance(longest, int) or needed <= longest:
        return None  # and no model needs to be made
    model = weightless(section)
    tables = [tensor for name, tensor in model.named_parameters() if _OF_POSITIONS.search(name)]
    tables += [tensor for name, tensor in model.named_buffers() if name.endswith("embed_positions")]
    sizes = [len(tensor) for tensor in tables if tensor.ndim == 2]
    return longest if any(longest <= size <= longest + _BESIDE for size in sizes) else None


def adapter_config(section: ModelSection) -> Any:
    """Return the config of PEFT's adapters, None where the recipe has none.

    Raises ValueError without PEFT, and UnknownNameError for a kind or an option that it does not have.
    """
    if section.peft is None:
        return None
    try:
        from peft import PEFT_TYPE_TO_CONFIG_MAPPING
    except ImportError:
        raise ValueError("model.peft needs PEFT, which is not installed; pip install peft") from None
    known = {kind.value: made for kind, made in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    given = {name: value for name, value in section.peft.items() if name != "peft_type"}
    asked = section.peft.get("peft_type")
    name = str(asked).upper()
    if name not in known:
        raise UnknownNameError(f"model.peft.peft_type {shown(asked)} is no kind of adapters of PEFT{near(name, known)}")
    fields = [field.name for field in dataclasses.fields(known[name])]
    unknown = [f"model.peft has an unknown key {shown(key)}{near(key, fields)}" for key in given if key not in fields]
    if unknown:
        raise UnknownNameError("; ".join(unknown) + f"; valid keys: {', '.join(fields)}")
    try:
        config = known[name](**{"task_type": "CAUSAL_LM", **given})
    except Exception as error:  # as above
        raise ValueError(f"model.peft is refused by PEFT: {in_one_line(error)}") from error
    refuse_copies(config)
    return config
