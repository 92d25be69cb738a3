"""Weights that transformers converts while it reads are the same on every rank as on one process, and written back."""

import json
from unittest import mock

import pytest
import torch
import transformers
from cases import cases, slow
from quantized_checkpoints import block_fp8, mxfp4
from safetensors.torch import load_file, save_file
from setups import DATA_PARALLEL

import nemo_dist.loading.hf_weight_loader as hf_weight_loader
import nemo_dist.loading.weight_conversion as weight_conversion
from nemo_dist import DistributedSetup, FSDP2Config, NeMoAutoModelForCausalLM, ParallelismSizes
from nemo_dist.hf_model import inner_model
from nemo_dist.testing.io_counter import BytesRead
from nemo_dist.testing.precision import FP32
from nemo_dist.testing.tensors import whole

SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "head_dim": 8,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "pad_token_id": 0,
    "initializer_range": 0.1,
}
LINEAR = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}


def config_of(family, **others):
    config = transformers.CONFIG_MAPPING[family]
    given = {**SIZES, **others}
    return config(**{name: value for name, value in given.items() if hasattr(config(), name)})


CONFIGS = {
    "olmo_hybrid": lambda: config_of(
        "olmo_hybrid", num_hidden_layers=4, **LINEAR
    ),  # three tensors, one after the other
    "qwen3_moe": lambda: config_of("qwen3_moe", **EXPERTS),  # experts one by one, gate and up packed
    "mixtral": lambda: config_of("mixtral", **EXPERTS),
    "uneven-mixtral": lambda: config_of("mixtral", **{**EXPERTS, "num_local_experts": 3}),
    "phimoe": lambda: config_of("phimoe", **EXPERTS),
    "falcon_h1": lambda: config_of("falcon_h1", mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_d_state=8),
    "llama": lambda: config_of("llama"),
    "wide-llama": lambda: config_of("llama", hidden_size=64, head_dim=32),  # a shard cuts blocks of 32 in the MLP only
    "qwen3": lambda: config_of("qwen3"),
    "gpt_oss": lambda: config_of("gpt_oss", **{**EXPERTS, "intermediate_size": 64}),
}
SHARDED = {"fsdp2": DATA_PARALLEL["fsdp2"], "hsdp": DATA_PARALLEL["hsdp"]} | {
    f"{axis} 2": {"parallelism_sizes": ParallelismSizes(**{f"{axis}_size": 2}), "strategy": FSDP2Config(mp_policy=FP32)}
    for axis in ("tp", "ep", "pp")
}


def write(family, folder):
    torch.manual_seed(3)
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[family](), dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(folder)
    return folder


def tensors(model):
    """The parameters and buffers of a model by name, those that no file holds included."""
    return dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))


def expected(folder):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return {name: tensor.detach() for name, tensor in tensors(model).items()}


def on_rank_load_and_export(folder, options, out=None):
    setup = DistributedSetup.build(**options)
    model = NeMoAutoModelForCausalLM.from_pretrained(folder, distributed_setup=setup, dtype=torch.float32)
    runtime = setup.runtime(model)
    found = {}
    for part in runtime.parts:
        found |= {name: whole(tensor.detach()) for name, tensor in tensors(inner_model(part)).items()}
    if out is not None:
        runtime.export(out)
    return found


def assert_loaded(answers, wanted):
    found = {}
    for answer in answers:
        found |= answer
        wrong = [name for name, tensor in answer.items() if not torch.equal(tensor, wanted[name])]
        assert wrong == []
    assert found.keys() == wanted.keys()


@cases(
    ("family", "setup", "world"),
    [
        *[("olmo_hybrid", "fsdp2", 2), ("qwen3_moe", "ep 2", 2), ("uneven-mixtral", "fsdp2", 2)],
        *[("falcon_h1", "fsdp2", 2), ("qwen3_moe", "tp 2", 2)],
        *[slow("mixtral", setup, 2) for setup in ("fsdp2", "tp 2", "pp 2", "ep 2")],
        *[slow("phimoe", setup, 2) for setup in ("fsdp2", "ep 2")],
        *[slow("olmo_hybrid", "fsdp2", 4), slow("mixtral", "hsdp", 4), slow("uneven-mixtral", "fsdp2", 4)],
    ],
)
def test_loaded_weights_and_buffers_are_those_of_transformers_and_export_writes_the_files_back(
    ranks, tmp_path, family, setup, world
):
    folder = write(family, tmp_path / "model")
    answers = ranks(world).run(on_rank_load_and_export, folder, SHARDED[setup], tmp_path / "out")
    assert_loaded(answers, expected(folder))
    saved, written = (load_file(tmp_path / name / "model.safetensors") for name in ("model", "out"))
    assert saved.keys() == written.keys()
    assert [name for name in saved if not torch.equal(saved[name], written[name])] == []


@cases(
    ("family", "quantize", "setup"),
    [
        *[("llama", block_fp8, "fsdp2"), ("llama", block_fp8, "tp 2"), ("gpt_oss", mxfp4, "fsdp2")],
        *[("qwen3_moe", block_fp8, "ep 2"), ("gpt_oss", mxfp4, "ep 2")],
        *[slow("qwen3_moe", block_fp8, "fsdp2"), slow("mixtral", block_fp8, "tp 2"), slow("qwen3", block_fp8, "pp 2")],
    ],
    name=lambda family, quantize, setup: f"{family} in {quantize.__name__}, {setup}",
)
def test_a_quantized_checkpoint_is_dequantized_as_by_transformers_and_exported_plain(
    ranks, tmp_path, family, quantize, setup
):
    folder = quantize(write(family, tmp_path / "model"))
    wanted = expected(folder)
    assert_loaded(ranks(2).run(on_rank_load_and_export, folder, SHARDED[setup], tmp_path / "out"), wanted)
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    again = expected(tmp_path / "out")
    assert [name for name, tensor in wanted.items() if not torch.equal(tensor, again[name])] == []


def on_rank_count_bytes(folder, options):
    with BytesRead() as reading:
        NeMoAutoModelForCausalLM.from_pretrained(folder, distributed_setup=DistributedSetup.build(**options))
    return reading.bytes


def test_experts_of_other_ranks_are_read_only_for_the_one_layer_that_proves_the_conversion(ranks, tmp_path):
    config = config_of("qwen3_moe", **EXPERTS, num_hidden_layers=6)
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    total = sum(tensor.nbytes for tensor in saved.values())
    layer = sum(tensor.nbytes for name, tensor in saved.items() if "layers.0." in name and ".experts." in name)
    assert ranks(2).run(on_rank_count_bytes, tmp_path, SHARDED["fsdp2"]) == [total // 2 + layer] * 2


def on_rank_load_with_every_conversion_in_slices(folder, options):
    decide = weight_conversion.keeps_slices
    weight_conversion.keeps_slices = lambda *_: True
    try:
        NeMoAutoModelForCausalLM.from_pretrained(folder, distributed_setup=DistributedSetup.build(**options))
    except Exception as error:
        return type(error).__name__, str(error)
    finally:
        weight_conversion.keeps_slices = decide
    return "nothing", ""


@cases(
    ("family", "quantize", "name"),
    [("olmo_hybrid", lambda folder: folder, "conv1d.weight"), ("wide-llama", block_fp8, "mlp.gate_proj.weight")],
    name=lambda family, quantize, name: family,
)
def test_the_proof_names_a_parameter_whose_slices_were_converted_wrongly(ranks, tmp_path, family, quantize, name):
    folder = quantize(write(family, tmp_path))
    answers = ranks(2).run(on_rank_load_with_every_conversion_in_slices, folder, SHARDED["fsdp2"])
    assert all(kind in ("CheckpointError", "RankError") for kind, _ in answers), answers
    assert all(name in text for _, text in answers), answers


def on_rank_failure(folder_of_rank, damage=None):
    from nemo_dist.loading.missing_weights import Draws

    rank = torch.distributed.get_rank()
    original = Draws.draw
    if damage == rank:
        Draws.draw = lambda self, part, initialise: (_ for _ in ()).throw(MemoryError("no room for the buffers"))
    try:
        setup = DistributedSetup.build(**SHARDED["fsdp2"])
        NeMoAutoModelForCausalLM.from_pretrained(folder_of_rank[rank], distributed_setup=setup, dtype=torch.float32)
    except Exception as error:
        return type(error).__name__, str(error)
    finally:
        Draws.draw = original
    return "nothing", ""


def on_rank_failure_unseen(folder_of_rank):
    with mock.patch.object(hf_weight_loader, "file_fields", return_value={}):
        return on_rank_failure(folder_of_rank)


@pytest.mark.parametrize("culprit", [0, 1])
def test_an_error_while_the_model_is_finished_on_one_rank_is_raised_on_all(ranks, tmp_path, culprit):
    folder = write("llama", tmp_path)
    answers = ranks(2).run(on_rank_failure, [folder] * 2, culprit)
    assert answers[culprit] == ("MemoryError", "no room for the buffers")
    assert answers[1 - culprit][0] == "RankError"
    assert f"rank {culprit}: MemoryError: no room for the buffers" in answers[1 - culprit][1]


def test_weights_that_cannot_be_converted_on_one_rank_are_named_on_all(ranks, tmp_path):
    good, bad = (block_fp8(write("llama", tmp_path / name)) for name in ("good", "bad"))
    saved = load_file(bad / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight_scale_inv"
    saved[name] = torch.ones(5, 1)  # 96 rows are no multiple of 5
    save_file(saved, bad / "model.safetensors", metadata={"format": "pt"})
    # Files that differ are told before they are read; here they seem alike, as when only their middle differs.
    answers = ranks(2).run(on_rank_failure_unseen, [good, bad])
    assert [kind for kind, _ in answers] == ["RankError", "CheckpointError"]
    assert all("layers.0.mlp.up_proj.weight" in text and "(96, 32)" in text for _, text in answers), answers


def on_rank_load_kept_quantized(folder):
    from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer

    original = FineGrainedFP8HfQuantizer.validate_environment  # which dequantizes where there is no GPU
    FineGrainedFP8HfQuantizer.validate_environment = lambda self, *args, **kwargs: None
    try:
        return on_rank_failure([folder] * 2)
    finally:
        FineGrainedFP8HfQuantizer.validate_environment = original


def test_shards_that_would_stay_quantized_are_refused(ranks, tmp_path):
    folder = block_fp8(write("llama", tmp_path))
    for kind, text in ranks(2).run(on_rank_load_kept_quantized, folder):
        assert kind == "CheckpointError"
        assert "would stay quantized" in text and "FineGrainedFP8Config(dequantize=True)" in text


def test_transformers_has_the_operations_whose_effect_on_slices_is_known():
    from transformers import core_model_loading

    assert core_model_loading.Concatenate(1).dim == core_model_loading.Chunk(1).dim == 1
    assert core_model_loading.Split(1).dim == core_model_loading.Interleave(1).dim == 1
    assert core_model_loading.MergeModulelist().dim == 0
    swap = core_model_loading.Transpose(1, 2)
    assert (swap.dim0, swap.dim1, swap.check_dims) == (1, 2, False)
