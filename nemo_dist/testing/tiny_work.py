"""Make the model and the batches that ``verify`` runs, from any transformers config."""

from __future__ import annotations

import copy
from typing import Any

import torch
import transformers
from torch import Tensor

import nemo_dist
from nemo_dist.hf_model import IGNORED
from nemo_dist.planning.mesh_plan import MeshPlan, Role
from nemo_dist.planning.sizes import ParallelismSizes
from nemo_dist.testing.proof_run import STEPS, Batch, Work
from nemo_dist.testing.shrink import shrink
from nemo_dist.testing.temp_folders import scratch

_LOADERS = {
    "ForSequenceClassification": "NeMoAutoModelForSequenceClassification",
    "ForTokenClassification": "NeMoAutoModelForTokenClassification",
    "ForConditionalGeneration": "NeMoAutoModelForImageTextToText",
}
LENGTH = 16  # tokens of a row


def make_work(config: Any, plan: MeshPlan, asked: ParallelismSizes, *, full: bool) -> tuple[Work, list[str]]:
    """Return what to run for a model of *config* on the ranks of *plan*, and in words what that leaves unproven.

    The model is made tiny, with layers enough for every stage, unless *full*. ``asked`` are the sizes of the user.
    """
    loader, changes = loader_of(config), []
    given = config
    if full:
        config = copy.deepcopy(config)
    else:
        stages = plan.splitting(Role.LAYERS)
        shrunk = shrink(config, layers=2 * stages if stages > 1 else 2)
        config, changes = shrunk.config, list(shrunk.changes)
        changes += _shares(given, config, plan, asked)
    config.use_cache = False  # which training has no use for
    folder = scratch("verify")
    _model(loader, config).save_pretrained(folder)
    rows = 4 * plan.size("dp")
    generator = torch.Generator().manual_seed(0)
    counts = [2 if step == 1 else 1 for step in range(STEPS + 1)]  # one step accumulates two batches
    batches = [[_batch(loader, config, rows, generator) for _ in range(count)] for count in counts]
    if len(getattr(config, "sub_configs", ())) > 1:
        changes.append("batches: text only, so towers for images or sound do not run")
    return Work(loader=loader, folder=folder, batches=batches), changes


def _shares(given: Any, tiny: Any, plan: MeshPlan, asked: ParallelismSizes) -> list[str]:
    """Say what a rank has of the *tiny* model, where it is not what it has of the *given* one on the ranks *asked*."""
    before, after = given.get_text_config(), tiny.get_text_config()
    experts = plan.size("ep") if asked.ep_size > 1 else 1
    shared = {
        "attention heads on a rank": ("num_attention_heads", plan.size("tp"), asked.tp_size),
        "layers in a stage": ("num_hidden_layers", plan.size("pp"), asked.pp_size),
        "experts on a rank": ("num_experts", experts, asked.ep_size),
    }
    return [
        f"{what}: {getattr(after, name) / here:g} (of the whole model {getattr(before, name) / there:g})"
        for what, (name, here, there) in shared.items()
        if here > 1 and hasattr(before, name) and getattr(before, name) / there != getattr(after, name) / here
    ]


def loader_of(config: Any) -> str:
    """Return the name of the loader class for the model that *config* describes.

    Where the config does not name its architecture, that is the one for causal models, or else for images and text.
    """
    names = getattr(config, "architectures", None) or [""]
    for ending, loader in _LOADERS.items():
        if names[0].endswith(ending):
            return loader
    causal = type(config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    images = type(config) in transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    return "NeMoAutoModelForImageTextToText" if images and not causal else "NeMoAutoModelForCausalLM"


def _model(loader: str, config: Any) -> Any:
    """Return a model with seeded weights, with noise on vectors (biases, norms): zeros and ones hide mistakes."""
    torch.manual_seed(0)
    model = getattr(nemo_dist, loader).from_config(config, dtype=torch.float32)
    with torch.no_grad():
        saved = {value.data_ptr(): value for value in model.state_dict().values()}  # a tied weight once
        for tensor in saved.values():
            if tensor.numel() == max(tensor.shape, default=0) and tensor.is_floating_point():
                tensor.add_(torch.randn_like(tensor), alpha=0.1)
    return model


def _batch(loader: str, config: Any, rows: int, generator: torch.Generator) -> Batch:
    """Return a global batch whose rows are padded differently and have labels for a different share of their tokens."""
    vocabulary = config.get_text_config().vocab_size
    lengths = torch.linspace(LENGTH, LENGTH // 2, rows).long().unsqueeze(1)
    mask = torch.arange(LENGTH) < lengths
    tokens = torch.randint(1, vocabulary - 1, (rows, LENGTH), generator=generator)
    shares = torch.linspace(1.0, 0.1, rows).unsqueeze(1)  # no label in the first row
    dropped = (torch.rand((rows, LENGTH), generator=generator) < shares) | ~mask
    batch: dict[str, Tensor] = {"input_ids": tokens, "attention_mask": mask.long()}
    if loader.endswith("SequenceClassification"):
        return {**batch, "labels": torch.randint(0, config.num_labels, (rows,), generator=generator)}
    if loader.endswith("TokenClassification"):
        tokens = torch.randint(0, config.num_labels, (rows, LENGTH), generator=generator)
    return {**batch, "labels": torch.where(dropped, IGNORED, tokens)}
