"""An export is a folder that plain transformers loads, with the very weights that the ranks hold."""

import contextlib
import json
from pathlib import Path

import pytest
import torch
import transformers
from cases import case_id, cases, crossed
from safetensors.torch import load_file
from setups import DATA_PARALLEL

from nemo_dist import DistributedSetup, FSDP2Config, MegatronFSDPConfig, ParallelismSizes
from nemo_dist.testing.equivalence import Task, checkpoint
from nemo_dist.testing.fake_cuda import WithCudaCalls
from nemo_dist.testing.precision import FP32
from nemo_dist.testing.tensors import saved_weights
from nemo_dist.testing.tiny_models import SPECIMENS

KINDS = ["llama", "llama-tied", "bert-sequences", "llava"]


def loaded(specimen, folder, options):
    setup = DistributedSetup.build(**options)
    model = SPECIMENS[specimen].load.from_pretrained(folder, distributed_setup=setup, dtype=torch.float32)
    return setup.runtime(model)


def on_rank_export(specimen, folder, out, options, evaluate=False, **keywords):
    runtime = loaded(specimen, folder, options)
    if evaluate:
        with torch.no_grad():
            runtime.model(**Task(specimen=specimen, rows=2).batches(0)[0])
    runtime.export(out, **keywords)


def files(folder):
    return sorted(entry.name for entry in Path(folder).iterdir())


def assert_same_weights(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


@cases(
    ("specimen", "strategy", "world"),
    crossed(KINDS, [("fsdp2", 2), ("fsdp2", 4), ("hsdp", 4), ("ddp", 2), ("fsdp2", 1)]),
)
def test_an_export_has_the_files_and_weights_that_one_process_saves(ranks, tmp_path, specimen, strategy, world):
    source = checkpoint(specimen)
    ranks(world).run(on_rank_export, specimen, source, tmp_path / "out", DATA_PARALLEL[strategy], max_shard_size="30KB")
    assert_same_weights(saved_weights(tmp_path / "out"), saved_weights(source))
    plain = SPECIMENS[specimen].load.from_pretrained(source, dtype=torch.float32)
    plain.save_pretrained(tmp_path / "plain")
    for name in ("config.json", "generation_config.json"):
        if (tmp_path / "plain" / name).exists():
            assert json.loads((tmp_path / "out" / name).read_text()) == json.loads(
                (tmp_path / "plain" / name).read_text()
            )
    exported = SPECIMENS[specimen].load.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert type(exported) is type(plain)
    assert_same_weights(exported.state_dict(), plain.state_dict())
    assert files(tmp_path) == ["out", "plain"]


OTHERS = {
    "tp": ("llama", {"strategy": FSDP2Config(mp_policy=FP32), "parallelism_sizes": ParallelismSizes(tp_size=2)}),
    "tp, packed": ("phi3", {"strategy": FSDP2Config(mp_policy=FP32), "parallelism_sizes": ParallelismSizes(tp_size=2)}),
    "cp": ("llama-tied", {"strategy": FSDP2Config(mp_policy=FP32), "parallelism_sizes": ParallelismSizes(cp_size=2)}),
    "pp": (
        "llama-deep-tied",
        {
            "strategy": FSDP2Config(mp_policy=FP32),
            "parallelism_sizes": ParallelismSizes(pp_size=2),
            "pipeline_config": {"pp_schedule": "Interleaved1F1B"},
        },
    ),
    "ep": ("mixtral", {"strategy": FSDP2Config(mp_policy=FP32), "parallelism_sizes": ParallelismSizes(ep_size=2)}),
    "megatron": ("llava", {"strategy": MegatronFSDPConfig()}),
}


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("world", [2, 4], ids=case_id)
def test_plain_transformers_and_other_topologies_load_every_export(ranks, tmp_path, name, world):
    specimen, options = OTHERS[name]
    pool = WithCudaCalls(ranks(world)) if name == "megatron" else ranks(world)
    pool.run(on_rank_export, specimen, checkpoint(specimen), tmp_path / "out", options, max_shard_size="30KB")
    assert_same_weights(saved_weights(tmp_path / "out"), saved_weights(checkpoint(specimen)))
    batch = Task(specimen=specimen).batches(0)[0]
    exported, original = (
        SPECIMENS[specimen].load.from_pretrained(folder, dtype=torch.float32).eval()(**batch).logits
        for folder in (tmp_path / "out", checkpoint(specimen))
    )
    assert torch.equal(exported, original)
    ranks(world).run(on_rank_export, specimen, tmp_path / "out", tmp_path / "again", DATA_PARALLEL["fsdp2"])
    assert_same_weights(saved_weights(tmp_path / "again"), saved_weights(checkpoint(specimen)))


def test_an_export_after_an_evaluation_has_the_weights_of_the_shards(ranks, tmp_path):
    source = checkpoint("llama")
    ranks(2).run(on_rank_export, "llama", source, tmp_path / "out", DATA_PARALLEL["fsdp2"], evaluate=True)
    assert_same_weights(saved_weights(tmp_path / "out"), saved_weights(source))


def test_an_export_dtype_casts_the_weights_and_is_in_the_config(ranks, tmp_path):
    source = checkpoint("llama")
    ranks(2).run(on_rank_export, "llama", source, tmp_path / "out", DATA_PARALLEL["fsdp2"], dtype="bfloat16")
    assert files(tmp_path / "out") == ["config.json", "generation_config.json", "model.safetensors"]
    assert_same_weights(saved_weights(tmp_path / "out"), {n: w.bfloat16() for n, w in saved_weights(source).items()})
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


def test_exported_files_respect_the_shard_size_and_are_indexed(ranks, tmp_path):
    ranks(2).run(
        on_rank_export, "llama", checkpoint("llama"), tmp_path / "out", DATA_PARALLEL["fsdp2"], max_shard_size="20KB"
    )
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    shards = {path.name: load_file(path) for path in (tmp_path / "out").glob("*.safetensors")}
    assert len(shards) > 2
    assert index["weight_map"] == {name: file for file, found in shards.items() for name in found}
    sizes = [sum(tensor.nbytes for tensor in found.values()) for found in shards.values()]
    assert max(sizes) <= 20_000
    assert index["metadata"]["total_size"] == sum(sizes)


def test_an_export_over_the_source_folder_keeps_its_other_files(ranks, tmp_path):
    source = tmp_path / "model"
    plain = SPECIMENS["llama"].make(3)
    plain.save_pretrained(source, max_shard_size="30KB")
    (source / "notes.txt").write_text("mine")
    (source / "tokenizer.json").write_text("{}")
    before = saved_weights(source)
    ranks(2).run(on_rank_export, "llama", source, source, DATA_PARALLEL["fsdp2"])
    assert_same_weights(saved_weights(source), before)
    assert files(source) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "notes.txt",
        "tokenizer.json",
    ]
    assert files(tmp_path) == ["model"]


def test_tokenizer_and_processor_files_come_along(ranks, tmp_path):
    source = tmp_path / "model"
    SPECIMENS["llama"].make(3).save_pretrained(source)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (source / name).write_text(f'"{name}"')
    ranks(2).run(on_rank_export, "llama", source, tmp_path / "out", DATA_PARALLEL["ddp"])
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (tmp_path / "out" / name).read_text() == f'"{name}"'


def on_rank_export_from_elsewhere(folder, out):
    setup = DistributedSetup.build(strategy="ddp")
    with contextlib.chdir(folder.parent):
        model = SPECIMENS["llama"].load.from_pretrained(folder.name, distributed_setup=setup)
    setup.runtime(model).export(out)


def test_tokenizer_files_come_along_after_a_change_of_the_working_folder(ranks, tmp_path):
    source = tmp_path / "model"
    SPECIMENS["llama"].make(3).save_pretrained(source)
    (source / "tokenizer.json").write_text("{}")
    ranks(2).run(on_rank_export_from_elsewhere, source, tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"


def moe_config():
    return transformers.MixtralConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        num_experts_per_tok=2,
    )


def test_experts_are_exported_one_by_one_as_transformers_does(ranks, tmp_path):
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(moe_config(), dtype=torch.float32).save_pretrained(tmp_path / "plain")
    ranks(2).run(
        on_rank_export, "llama", tmp_path / "plain", tmp_path / "out", DATA_PARALLEL["fsdp2"], max_shard_size="10KB"
    )
    assert any("experts.0." in name for name in saved_weights(tmp_path / "plain"))
    assert_same_weights(saved_weights(tmp_path / "out"), saved_weights(tmp_path / "plain"))
    assert max(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors")) < 20_000


def on_rank_export_to_a_full_disk(specimen, folder, out, options):
    import resource
    import signal

    runtime = loaded(specimen, folder, options)
    if runtime.dp_rank == 1:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
    try:
        runtime.export(out, max_shard_size="20KB")
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    finally:
        if runtime.dp_rank == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    return "no error"


def test_a_disk_error_on_one_rank_is_raised_on_all_and_changes_nothing(ranks, tmp_path):
    out = tmp_path / "out"
    ranks(2).run(on_rank_export, "llama", checkpoint("llama"), out, DATA_PARALLEL["fsdp2"])
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    messages = ranks(2).run(on_rank_export_to_a_full_disk, "llama", checkpoint("llama", 5), out, DATA_PARALLEL["fsdp2"])
    assert messages[1].startswith("CheckpointError: writing the export to")
    assert "File too large" in messages[1]
    assert messages[0].startswith("RankError: writing the export to")
    assert "rank 1" in messages[0] and "File too large" in messages[0]
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"dtype": "int8"}, "dtype must be a floating-point dtype"),
        ({"dtype": "float33"}, "dtype must be a floating-point dtype"),
        ({"max_shard_size": "huge"}, "max_shard_size must be a positive number of bytes"),
        ({"max_shard_size": 0}, "max_shard_size must be a positive number of bytes"),
    ],
)
def test_a_wrong_export_option_is_refused(ranks, tmp_path, keywords, message):
    with pytest.raises(Exception, match=message):
        ranks(1).run(on_rank_export, "llama", checkpoint("llama"), tmp_path / "out", DATA_PARALLEL["ddp"], **keywords)
    assert files(tmp_path) == []
