"""Names and shapes in a checkpoint mean for a part of a model, or for a slice, what they mean for the whole model."""

import json

import pytest
import torch
import transformers
from quantized_checkpoints import tensor_fp8
from safetensors.torch import load_file, save_file
from test_load_conversions import SHARDED, assert_loaded, config_of, tensors, write
from transformers import initialization

from nemo_dist import DistributedSetup, NeMoAutoModelForCausalLM
from nemo_dist.hf_model import inner_model
from nemo_dist.testing.tensors import whole


def on_rank_load(folder, options, kwargs):
    setup = DistributedSetup.build(**options)
    try:
        model = NeMoAutoModelForCausalLM.from_pretrained(folder, distributed_setup=setup, dtype=torch.float32, **kwargs)
    except Exception as error:
        return type(error).__name__, str(error)
    parts = [inner_model(part) for part in setup.runtime(model).parts]
    return {name: whole(tensor.detach()) for part in parts for name, tensor in tensors(part).items()}


def expected(folder, **kwargs):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **kwargs)
    return {name: tensor.detach() for name, tensor in tensors(model).items()}


def edited(folder, edit):
    saved = load_file(folder / "model.safetensors")
    edit(saved)
    save_file(saved, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_a_tied_weight_that_is_stored_as_the_head_only_is_the_embedding_of_the_first_stage(ranks, tmp_path):
    torch.manual_seed(3)
    config = config_of("llama", tie_word_embeddings=True)
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(tmp_path)
    edited(tmp_path, lambda saved: saved.update({"lm_head.weight": saved.pop("model.embed_tokens.weight")}))
    assert_loaded(ranks(2).run(on_rank_load, tmp_path, SHARDED["pp 2"], {}), expected(tmp_path))


def test_a_stage_takes_no_layer_that_is_renamed_into_one_of_another_stage(ranks, tmp_path):
    folder = write("llama", tmp_path)
    renamed = {"key_mapping": {r"layers\.1\.": "layers.0."}}  # both into the first, of which the later one is left

    def leave_one(saved):
        for name in [name for name in saved if "layers.0." in name]:
            del saved[name]

    edited(folder, leave_one)
    torch.manual_seed(7)
    wanted = expected(folder, **renamed)
    assert torch.equal(
        wanted["model.layers.0.mlp.up_proj.weight"],
        load_file(folder / "model.safetensors")["model.layers.1.mlp.up_proj.weight"],
    )
    answers = ranks(2).run(on_rank_load_seeded, folder, SHARDED["pp 2"], renamed)
    assert_loaded(answers, wanted)


def on_rank_load_seeded(folder, options, kwargs):
    torch.manual_seed(7)  # draws the layer that is not there
    return on_rank_load(folder, options, kwargs)


@pytest.mark.parametrize("setup", ["fsdp2", "pp 2"])
def test_a_weight_with_fewer_dims_than_the_model_wants_is_named_on_all_ranks(ranks, tmp_path, setup):
    name = "model.norm.weight"
    folder = edited(write("llama", tmp_path), lambda saved: saved.update({name: saved[name][0].clone()}))
    for kind, text in ranks(2).run(on_rank_load, folder, SHARDED[setup], {}):
        assert kind == "CheckpointError" and "ignore_mismatched_sizes=True" in text
        assert f"{name}: a slice of [] in the checkpoint" in text


def test_a_scale_for_a_whole_weight_is_read_by_a_stage(ranks, tmp_path):
    folder = tensor_fp8(write("llama", tmp_path))
    assert_loaded(ranks(2).run(on_rank_load, folder, SHARDED["pp 2"], {}), expected(folder))


class Scaled(transformers.LlamaForCausalLM):
    """Has a weight of its own, which only its __init__ fills, unless *filled*."""

    filled = False

    def __init__(self, config):
        super().__init__(config)
        self.scale = torch.nn.Parameter(torch.full((64,), 3.0))

    def _init_weights(self, module):
        super()._init_weights(module)
        if self.filled and module is self:
            initialization.constant_(self.scale, 3.0)


class ScaledConfig(transformers.LlamaConfig):
    model_type = "scaled-llama"


Scaled.config_class = ScaledConfig


def on_rank_load_scaled(folder, options, filled):
    transformers.AutoConfig.register("scaled-llama", ScaledConfig, exist_ok=True)
    transformers.AutoModelForCausalLM.register(ScaledConfig, Scaled, exist_ok=True)
    Scaled.filled = filled
    found = on_rank_load(folder, options, {})
    return found if isinstance(found, tuple) else found.get("scale")


@pytest.mark.parametrize("setup", ["fsdp2", "pp 2"])
def test_a_weight_that_neither_the_checkpoint_has_nor_the_class_fills_is_refused(ranks, tmp_path, setup):
    folder = write("llama", tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "scaled-llama"}))
    answers = ranks(2).run(on_rank_load_scaled, folder, SHARDED[setup], False)
    assert [kind for kind, _ in answers] == ["CheckpointError"] * 2
    assert all("lacks scale, and _init_weights of Scaled does not fill" in text for _, text in answers), answers
    found = ranks(2).run(on_rank_load_scaled, folder, SHARDED[setup], True)
    assert not any(isinstance(scale, tuple) for scale in found), found
    assert all(scale is None or torch.equal(scale, torch.full((64,), 3.0)) for scale in found)
