"""The loaders: each rank reads its shard and nothing else, and every bad request or file ends in one clear error."""

import json
import os

import pytest
import safetensors
import torch
from cases import cases
from safetensors.torch import load_file, save_file
from setups import DATA_PARALLEL
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from nemo_dist import (
    CheckpointError,
    DistributedSetup,
    FSDP2Config,
    MeshContext,
    NeMoAutoModelForCausalLM,
)
from nemo_dist.mesh.dtensor import local
from nemo_dist.testing.equivalence import checkpoint
from nemo_dist.testing.io_counter import BytesRead
from nemo_dist.testing.tensors import whole
from nemo_dist.testing.tiny_models import SPECIMENS


def on_rank_count_bytes(folder, specimen, options):
    with BytesRead() as reading:
        model = SPECIMENS[specimen].load.from_pretrained(folder, distributed_setup=DistributedSetup.build(**options))
    held = sum(local(parameter).numel() * parameter.element_size() for parameter in model.parameters())
    return reading.bytes, held, sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


@pytest.mark.parametrize("specimen", ["llama", "llama-tied", "bert-tokens", "llava"])
@cases(("strategy", "world"), [("fsdp2", 2), ("fsdp2", 4), ("hsdp", 4), ("ddp", 2)])
def test_a_rank_reads_exactly_the_bytes_of_its_shard(ranks, specimen, strategy, world):
    answers = ranks(world).run(on_rank_count_bytes, checkpoint(specimen), specimen, DATA_PARALLEL[strategy])

    copies = {"fsdp2": 1, "hsdp": 2, "ddp": world}[strategy]
    print(f"{specimen} {strategy} on {world} ranks: bytes read {[read for read, _, _ in answers]} of {answers[0][2]}")
    assert all(read == held for read, held, _ in answers)
    assert sum(read for read, _, _ in answers) == copies * answers[0][2]


def test_the_byte_counter_counts_slices_and_whole_reads(tmp_path):
    save_file({"a": torch.zeros(10, 3), "b": torch.zeros(7)}, tmp_path / "model.safetensors")
    with BytesRead() as reading, safetensors.safe_open(tmp_path / "model.safetensors", "pt") as file:
        file.get_slice("a")[2:4]
        file.get_slice("b")[...]

    assert reading.bytes == 2 * 3 * 4 + 7 * 4


def on_rank_logits(folder, options, kwargs):
    torch.manual_seed(0)
    model = NeMoAutoModelForCausalLM.from_pretrained(
        folder, distributed_setup=DistributedSetup.build(**options), dtype=torch.float32, **kwargs
    )
    return model(input_ids=torch.arange(1, 9).unsqueeze(0)).logits.detach()


def test_a_bin_checkpoint_loads_through_weights_only(ranks, tmp_path):
    folder = checkpoint("llama")
    torch.save(load_file(folder / "model.safetensors"), tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    expected = NeMoAutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)

    for found in ranks(2).run(on_rank_logits, tmp_path, DATA_PARALLEL["fsdp2"], {}):
        torch.testing.assert_close(found, expected(input_ids=torch.arange(1, 9).unsqueeze(0)).logits)


def test_a_pickle_in_a_bin_checkpoint_is_refused(ranks, tmp_path):
    torch.save({"model.norm.weight": print}, tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text((checkpoint("llama") / "config.json").read_text())

    answers = ranks(2).run(on_rank_failure, tmp_path, {}, {})
    assert all("weights_only" in text or "Weights only" in text for _, text in answers), answers


def on_rank_failure(folder, options, kwargs, folder_of_rank=None):
    folder = (folder_of_rank or {}).get(torch.distributed.get_rank(), folder)
    try:
        NeMoAutoModelForCausalLM.from_pretrained(folder, distributed_setup=DistributedSetup.build(**options), **kwargs)
    except Exception as error:
        return type(error).__name__, str(error)
    return "nothing", ""


def truncate(folder, target):
    (target / "config.json").write_text((folder / "config.json").read_text())
    data = (folder / "model.safetensors").read_bytes()
    (target / "model.safetensors").write_bytes(data[: len(data) // 2])
    return target


def test_a_truncated_checkpoint_is_named_on_every_rank(ranks, tmp_path):
    answers = ranks(2).run(on_rank_failure, truncate(checkpoint("llama"), tmp_path), {}, {})

    assert [kind for kind, _ in answers] == ["CheckpointError"] * 2
    assert all(str(tmp_path) in text for _, text in answers), answers


def test_a_checkpoint_that_only_one_rank_cannot_read_ends_all_ranks(ranks, tmp_path):
    damaged = truncate(checkpoint("llama"), tmp_path)
    (damaged / "model.safetensors").unlink()
    answers = ranks(2).run(on_rank_failure, checkpoint("llama"), {}, {}, {1: damaged})

    assert [kind for kind, _ in answers] == ["RankError", "CheckpointError"]
    assert "rank 1" in answers[0][1] and str(damaged) in answers[0][1]


def test_a_checkpoint_that_is_shorter_on_one_rank_is_named_before_it_is_read(ranks, tmp_path):
    damaged = truncate(checkpoint("llama"), tmp_path)
    size = (damaged / "model.safetensors").stat().st_size
    for kind, text in ranks(2).run(on_rank_failure, checkpoint("llama"), {}, {}, {1: damaged}):
        assert kind == "RankError" and f"model.safetensors is {size} bytes" in text and "on rank 1, but" in text


def test_a_missing_checkpoint_says_where_it_looked(ranks, tmp_path):
    (tmp_path / "config.json").write_text((checkpoint("llama") / "config.json").read_text())
    answers = ranks(2).run(on_rank_failure, tmp_path, {}, {})

    assert all(kind == "CheckpointError" and str(tmp_path) in text for kind, text in answers), answers


@pytest.mark.slow
def test_a_wrong_shape_seen_by_one_rank_is_refused_on_every_rank(ranks, tmp_path):
    folder = checkpoint("bert-tokens")
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config))
    weights = load_file(folder / "model.safetensors")
    name = "bert.embeddings.position_embeddings.weight"
    weights[name] = torch.cat([weights[name], weights[name][:1]])[1:-1]  # 127 of 128 rows: three of four slices fit
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})

    answers = ranks(4).run(on_rank_failure_of_tokens, tmp_path)
    assert all(kind in ("CheckpointError", "RankError") and name in text for kind, text in answers), answers


def on_rank_failure_of_tokens(folder):
    try:
        SPECIMENS["bert-tokens"].load.from_pretrained(folder, distributed_setup=DistributedSetup.build())
    except Exception as error:
        return type(error).__name__, str(error)
    return "nothing", ""


@pytest.mark.parametrize(
    ("keyword", "home"),
    [
        ("distributed_config", "strategy="),
        ("moe_config", "moe_parallel_config="),
        ("moe_mesh", "ep_size="),
        ("pipeline_config", "pipeline_config="),
        ("tp_plan", "tp_plan="),
        ("activation_checkpointing", "activation_checkpointing="),
        ("tp_size", "ParallelismSizes(tp_size="),
        ("pp_size", "ParallelismSizes(pp_size="),
        ("cp_size", "ParallelismSizes(cp_size="),
        ("ep_size", "ParallelismSizes(ep_size="),
        ("dp_size", "ParallelismSizes(dp_size="),
        ("dp_replicate_size", "ParallelismSizes(dp_replicate_size="),
    ],
)
@pytest.mark.parametrize("method", ["from_pretrained", "from_config"])
def test_a_keyword_of_the_old_api_names_its_new_home(method, keyword, home):
    subject = checkpoint("llama") if method == "from_pretrained" else SPECIMENS["llama"].config()

    with pytest.raises(TypeError) as error:
        getattr(NeMoAutoModelForCausalLM, method)(subject, **{keyword: 2})
    assert keyword in str(error.value) and home in str(error.value)


def test_all_old_keywords_are_named_at_once():
    with pytest.raises(TypeError, match=r"tp_size.*pipeline_config"):
        NeMoAutoModelForCausalLM.from_pretrained("anything", tp_size=2, pipeline_config={})


def test_a_setup_and_a_mesh_together_are_refused():
    setup, mesh = DistributedSetup.build(world_size=1), object()
    with pytest.raises(ValueError, match="either distributed_setup or device_mesh, not both"):
        NeMoAutoModelForCausalLM.from_pretrained("anything", distributed_setup=setup, device_mesh=mesh)


def test_a_mesh_context_as_device_mesh_is_refused():
    with pytest.raises(TypeError, match="must be a torch DeviceMesh"):
        NeMoAutoModelForCausalLM.from_pretrained("anything", device_mesh=MeshContext())


def test_a_config_as_distributed_setup_is_refused():
    with pytest.raises(TypeError, match=r"must be a DistributedSetup .*DistributedSetup\.build"):
        NeMoAutoModelForCausalLM.from_pretrained("anything", distributed_setup=FSDP2Config())


@pytest.mark.parametrize("keyword", ["device_map", "max_memory", "offload_folder"])
def test_placement_options_of_transformers_are_refused(ranks, keyword):
    kind, text = ranks(1).run(on_rank_failure, checkpoint("llama"), {}, {keyword: "auto"})[0]
    assert kind == "TypeError" and keyword in text


def test_code_in_a_checkpoint_is_refused(ranks):
    kind, text = ranks(1).run(on_rank_failure, checkpoint("llama"), {}, {"weights_only": False})[0]
    assert kind == "TypeError" and "weights_only=False" in text


def test_without_a_setup_the_loader_is_transformers_own():
    model = NeMoAutoModelForCausalLM.from_pretrained(checkpoint("llama"))

    assert type(model).__name__ == "LlamaForCausalLM"
    assert not any(isinstance(parameter, DTensor) for parameter in model.parameters())


def test_a_loader_is_not_instantiated():
    with pytest.raises(TypeError, match=r"NeMoAutoModelForCausalLM\.from_pretrained"):
        NeMoAutoModelForCausalLM()


def on_rank_load_on_mesh(folder, shape, names):
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
    try:
        model = NeMoAutoModelForCausalLM.from_pretrained(folder, device_mesh=mesh, dtype=torch.float32)
    except Exception as error:
        return type(error).__name__, str(error)
    weight = model.model.layers[0].mlp.up_proj.weight
    return list(local(weight).shape), whole(weight)


@pytest.mark.parametrize(
    ("shape", "names", "rows"),
    [((4,), ("dp",), 14), ((4,), ("dp_shard",), 14), ((2, 2), ("dp_replicate", "dp_shard"), 28)],
)
def test_a_mesh_with_data_axes_shards_the_parameters_on_it(ranks, shape, names, rows):
    expected = NeMoAutoModelForCausalLM.from_pretrained(checkpoint("llama"), dtype=torch.float32)

    for found, full in ranks(4).run(on_rank_load_on_mesh, checkpoint("llama"), shape, names):
        assert found == [rows, 32]
        assert torch.equal(full, expected.model.layers[0].mlp.up_proj.weight)


def test_a_mesh_with_a_foreign_axis_is_refused(ranks):
    kind, text = ranks(2).run(on_rank_load_on_mesh, checkpoint("llama"), (2,), ("expert",))[0]
    assert kind == "ValueError" and "'expert'" in text and "dp_shard" in text


def on_rank_load_on_two_ranks(folder):
    setup = DistributedSetup.build(ranks=[0, 1])
    try:
        model = NeMoAutoModelForCausalLM.from_pretrained(folder, distributed_setup=setup)
    except Exception as error:
        return type(error).__name__, str(error)
    return "loaded", local(model.lm_head.weight).shape[0]


def test_a_mesh_over_some_of_the_ranks_loads_on_those(ranks):
    answers = ranks(4).run(on_rank_load_on_two_ranks, checkpoint("llama"))

    assert answers[:2] == [("loaded", 48), ("loaded", 48)]
    assert all(kind == "RankError" and "(0, 1)" in text for kind, text in answers[2:]), answers


def on_rank_make_mesh(fields_of_rank):
    rank = torch.distributed.get_rank()
    try:
        _ = DistributedSetup.build(**fields_of_rank[rank]).mesh_context
    except Exception as error:
        return type(error).__name__, str(error)
    return "nothing", ""


def test_setups_that_differ_between_ranks_are_named_on_every_rank(ranks):
    fields = [{}, {}, {"strategy": FSDP2Config(defer_fsdp_grad_sync=False)}, {}]

    for kind, text in ranks(4).run(on_rank_make_mesh, fields):
        assert kind == "RankError"
        assert "fsdp2 config" in text and "rank 2" in text and "defer_fsdp_grad_sync=False" in text


def test_a_setup_planned_for_other_ranks_than_there_are_is_refused(ranks):
    kind, text = ranks(2).run(on_rank_make_mesh, [{"world_size": 4}] * 2)[0]
    assert kind == "RankError" and "planned for 4 ranks" in text and "has 2" in text


def test_a_live_mesh_needs_a_process_group():
    assert "RANK" not in os.environ
    with pytest.raises(Exception, match="initialize_distributed"):
        _ = DistributedSetup.build(world_size=1).mesh_context


def test_a_checkpoint_error_is_a_runtime_error():
    assert issubclass(CheckpointError, RuntimeError)
