"""What a pipeline refuses, at build or at load, and what it says."""

import os

import pytest
import torch
import transformers
from torch.distributed.device_mesh import init_device_mesh

from nemo_dist import (
    DDPConfig,
    DistributedSetup,
    FSDP2Config,
    NeMoAutoModelForCausalLM,
    ParallelismSizes,
    PipelineConfig,
    RankError,
    TopologyError,
)
from nemo_dist.testing.equivalence import checkpoint
from nemo_dist.testing.precision import FP32
from nemo_dist.testing.tiny_models import SPECIMENS


def refused(pp=2, strategy="fsdp2", world=4, **options):
    with pytest.raises(TopologyError) as caught:
        DistributedSetup.build(
            strategy, ParallelismSizes(pp_size=pp), pipeline_config=PipelineConfig(**options), world_size=world
        )
    return "\n".join(caught.value.problems)


def test_a_batch_that_does_not_divide_into_microbatches_is_refused():
    message = refused(pp_batch_size=10, pp_microbatch_size=4)
    assert "pp_batch_size 10 is not divisible by pp_microbatch_size 4; use 8 or 12" in message


@pytest.mark.parametrize(
    ("schedule", "rows", "says"),
    [
        ("1F1B", 3, "schedule '1F1B' needs at least as many microbatches as its 4 stages (got 3)"),
        ("DualPipeV", 4, "schedule 'DualPipeV' needs at least as many microbatches as its 8 stages (got 4)"),
        ("Interleaved1F1B", 11, "runs 11 microbatches in 2 rounds of 4 ranks, which does not divide; use 10 or 12"),
        ("zero_bubble", 9, "runs 9 microbatches in 2 rounds of 4 ranks, which does not divide; use 8 or 12"),
    ],
)
def test_microbatch_counts_that_a_schedule_cannot_run_are_refused(schedule, rows, says):
    assert says in refused(pp=4, pp_schedule=schedule, pp_batch_size=rows)


def test_stage_counts_that_a_schedule_cannot_run_are_refused():
    three = [["a"], ["b"], ["c"], ["d"]]
    assert "schedule '1F1B' takes exactly 1 stages on a rank (got 2)" in refused(module_fqns_per_model_part=three)
    v = refused(pp_schedule="zbv", module_fqns_per_model_part=[["a"], ["b"]])
    assert "schedule 'ZBVZeroBubble' takes exactly 2 stages on a rank (got 1)" in v
    odd = refused(module_fqns_per_model_part=[["a"], ["b"], ["c"]])
    assert "has 3 stages, which is no multiple of the 2 pipeline ranks" in odd


def test_a_module_named_twice_is_refused():
    message = refused(pp_schedule="looped_bfs", module_fqns_per_model_part=[["a", "b"], ["b"], ["c"], ["d"]])
    assert "module_fqns_per_model_part names 'b' more than once; a module belongs to one stage" in message


def test_options_that_contradict_each_other_are_refused_together():
    message = refused(pp_schedule="1f1b", layers_per_stage=2, module_fqns_per_model_part=[["a"], ["b"]])
    assert "layers_per_stage and module_fqns_per_model_part are both given" in message
    message = refused(round_virtual_stages_to_pp_multiple="up", pp_batch_size=3, pp_microbatch_size=2)
    assert "rounds what layers_per_stage makes" in message and "pp_batch_size 3 is not divisible" in message


def test_strategy_options_that_a_pipeline_cannot_keep_are_refused():
    split = refused(strategy=FSDP2Config(reshard_after_forward=True), pp_schedule="zbv")
    assert "reshard_after_forward loses gradients under schedule 'ZBVZeroBubble'" in split
    options = {"strategy": FSDP2Config(activation_checkpointing="selective"), "pp_schedule": "zero_bubble"}
    assert "activation_checkpointing='selective' does not run under schedule" in refused(**options)
    assert "enable_compile is not proven" in refused(strategy=FSDP2Config(enable_compile=True))
    assert "defer_fsdp_grad_sync=False asks" in refused(strategy=FSDP2Config(defer_fsdp_grad_sync=False))
    offload = FSDP2Config(offload_policy=torch.distributed.fsdp.CPUOffloadPolicy())
    assert "offload_policy is not proven" in refused(strategy=offload)


def test_ddp_does_not_compose_with_a_pipeline():
    assert "strategy 'ddp' does not compose with it; use 'fsdp2'" in refused(strategy=DDPConfig())


def test_a_pipeline_without_an_axis_is_refused():
    with pytest.raises(ValueError, match="plugin 'pipeline' was selected, but pp_size is 1"):
        DistributedSetup.build(plugins=("pipeline",), world_size=2)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"pp_microbatch_size": 0}, "PipelineConfig.pp_microbatch_size must be an int from 1 up"),
        ({"pp_batch_size": 2.0}, "PipelineConfig.pp_batch_size must be an int"),
        ({"round_virtual_stages_to_pp_multiple": "upp"}, "did you mean 'up'"),
        ({"dtype": "bfloat61"}, "did you mean 'bfloat16'"),
        ({"loss_fn": "mean"}, "must be a function of logits and labels"),
        ({"pp_schedule": 1}, "PipelineConfig.pp_schedule must be a string"),
        ({"module_fqns_per_model_part": ["model.norm"]}, "a list with a list of module names for every stage"),
        ({"scale_grads_in_schedule": "yes"}, "must be True or False"),
        ({"pp_shedule": "1f1b"}, "did you mean 'pp_schedule'"),
    ],
)
def test_a_wrong_option_is_refused_by_name(options, says):
    with pytest.raises((TypeError, ValueError), match=says):
        PipelineConfig(**options)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("0F0,0B0\n1F0,1B0\n1F1", "has 3 lines, but there are 2 pipeline ranks"),
        ("0F0,0B0\n1F0,1X0", "line 2, cell 2: '1X0' is no action"),
        ("0F0,0B0\n1RECV_F0,1F0,1B0", "line 2, cell 1: '1RECV_F0' is communication"),
        ("0F0,0B0\n1F0,1B0,0F1", "line 2: stage 0 is on line 1 already"),
        ("0F0,0B0\n2F0,2B0", "stage 1 is on no line"),
        ("0F0,0B0\n1B0,1F0", "line 2: 1B0 comes before 1F0"),
        ("0F0,0F1,0B0,0B1\n1F0,1B0", "line 2: 1F1 is missing"),
        ("0F0,0F0,0B0\n1F0,1B0", "line 1: 0F0 is there 2 times"),
        ("0F0,0I0\n1F0,1B0", "line 1: 0B0 is missing, and 0I0 with 0W0 do not stand for it"),
        ("0F0,0W0,0I0\n1F0,1B0", "line 1: 0W0 comes before 0I0"),
        ("0F0,0B0,0I0,0W0\n1F0,1B0", "line 1: 0B0 is there and so is one of 0I0 and 0W0"),
        ("0F0,0B0,0F1,0B1\n1F1,1F0,1B0,1B1", "ends in a deadlock: line 1 waits at 0B0; line 2 waits at 1F1"),
        ("", "has 0 lines"),
    ],
)
def test_a_broken_schedule_file_is_refused_with_the_line(tmp_path, text, says):
    path = tmp_path / "mine.csv"
    path.write_text(text)
    assert says in refused(pp_schedule_csv=path)


def test_a_schedule_file_that_is_not_there_is_refused(tmp_path):
    assert "cannot read pp_schedule_csv" in refused(pp_schedule_csv=tmp_path / "none.csv")


def test_a_schedule_name_and_a_schedule_file_together_are_refused(tmp_path):
    path = tmp_path / "mine.csv"
    path.write_text("0F0,0B0\n1F0,1B0")
    assert "pp_schedule and pp_schedule_csv are both given" in refused(pp_schedule="1f1b", pp_schedule_csv=path)


def on_rank_make_mesh(folders):
    os.chdir(folders[torch.distributed.get_rank()])  # the same name, and another file
    setup = DistributedSetup.build(
        parallelism_sizes=ParallelismSizes(pp_size=2), pipeline_config=PipelineConfig(pp_schedule_csv="mine.csv")
    )
    with pytest.raises(RankError) as caught:
        _ = setup.mesh_context
    os.chdir(os.path.sep)
    return str(caught.value)


def test_schedule_files_that_differ_are_an_error_that_names_the_rank(ranks, tmp_path):
    lines = ["0F0,0F1,0B0,0B1\n1F0,1B0,1F1,1B1", "0F0,0F1,0B0,0B1\n1F0,1F1,1B0,1B1"]
    folders = [tmp_path / str(rank) for rank in range(4)]
    for rank, folder in enumerate(folders):
        folder.mkdir()
        (folder / "mine.csv").write_text(lines[rank == 2])
    for message in ranks(4).run(on_rank_make_mesh, folders):
        assert "line 2 of pp_schedule_csv is 1F0,1F1,1B0,1B1 on rank 2, but 1F0,1B0,1F1,1B1 on the others" in message
        assert "line 1" not in message


# ---- what needs the model, at load ----


def on_rank_load(config, loader=NeMoAutoModelForCausalLM, pp=2, **options):
    setup = DistributedSetup.build(
        parallelism_sizes=ParallelismSizes(pp_size=pp), pipeline_config=PipelineConfig(**options)
    )
    try:
        loader.from_config(config, distributed_setup=setup)
    except ValueError as error:
        return str(error)
    return "accepted"


def loading(ranks, config, **options):
    """Return what every rank is told; all of them must be told the same, and none may hang."""
    answers = ranks(2).run(on_rank_load, config, **options)
    assert len(set(answers)) == 1
    return answers[0]


def tiny(kind, **more):
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 96}
    return kind(**sizes, intermediate_size=48, **more)


def test_fewer_layers_than_stages_are_refused(ranks):
    message = loading(ranks, tiny(transformers.LlamaConfig), pp_schedule="zbv")
    assert "has 3 layers, fewer than the 4 stages of the pipeline" in message


def test_an_invalid_division_into_stages_is_refused(ranks):
    def parts(*lists):
        return {"module_fqns_per_model_part": [list(part) for part in lists]}

    config = tiny(transformers.LlamaConfig)
    layers = [f"model.layers.{index}" for index in range(3)]
    first, last = ["model.embed_tokens"], ["model.norm", "lm_head"]
    assert "leaves out model.norm" in loading(ranks, config, **parts([*first, *layers], ["lm_head"]))
    swapped = parts([*first, layers[1]], [layers[0], layers[2], *last])
    assert "has 'model.layers.1' out of order" in loading(ranks, config, **swapped)
    unknown = parts([*first, *layers], ["model.nrom", *last])
    assert "names ['model.nrom']" in loading(ranks, config, **unknown)
    assert "gives stage 1 no layer" in loading(ranks, config, **parts([*first, *layers], last))
    twice = parts([*first, *layers], [layers[2], *last])
    assert "names model.layers.2 more than once" in loading(ranks, config, **twice)


def test_stages_that_the_ranks_do_not_divide_are_refused(ranks):
    message = loading(ranks, tiny(transformers.LlamaConfig), layers_per_stage=1)
    assert "makes 3 stages of 3 layers, which is no multiple of the 2 pipeline ranks" in message


# ---- batches ----


def on_rank_step(folder, batch, **options):
    setup = DistributedSetup.build(
        strategy=FSDP2Config(mp_policy=FP32),
        parallelism_sizes=ParallelismSizes(pp_size=2),
        pipeline_config=PipelineConfig(**options),
    )
    runtime = setup.runtime(NeMoAutoModelForCausalLM.from_pretrained(folder, distributed_setup=setup))
    try:
        runtime.forward_backward(batch)
    except ValueError as error:
        return str(error)
    return "accepted"


def stepping(ranks, rows=4, batch=None, **options):
    given = SPECIMENS["llama"].batch(rows, 12, torch.Generator()) | (batch or {})
    answers = ranks(2).run(on_rank_step, checkpoint("llama"), given, **options)
    assert len(set(answers)) == 1
    return answers[0]


def test_too_few_microbatches_say_what_to_do(ranks):
    message = stepping(ranks, rows=1)
    assert "needs at least as many microbatches as its 2 stages (got 1)" in message
    assert "Pass a list of batches of one shape, forward_backward([...])" in message
    assert "or set pp_batch_size: smaller ones are then filled up with rows that do not count" in message
    assert stepping(ranks, rows=1, pp_batch_size=4) == "accepted"


def test_a_batch_larger_than_planned_is_refused(ranks):
    message = stepping(ranks, rows=6, pp_batch_size=4)
    assert "the batch has 6 microbatches of 1 rows, but pp_batch_size is for 4 (4 rows)" in message


def test_another_sequence_length_than_planned_is_refused(ranks):
    assert "sequences of 12 tokens, but pp_seq_len is 16" in stepping(ranks, pp_seq_len=16)


def test_a_tensor_with_other_rows_is_refused(ranks):
    message = stepping(ranks, batch={"attention_mask": torch.ones(3, 12, dtype=torch.long)})
    assert "the batch's 'attention_mask' has 3 rows, but input_ids 4" in message


def test_one_row_of_position_ids_serves_every_row(ranks):
    assert stepping(ranks, batch={"position_ids": torch.arange(12).unsqueeze(0)}) == "accepted"


def test_a_mesh_of_the_users_own_makes_a_pipeline(ranks):
    kinds = ranks(2).run(on_rank_load_on_mesh, checkpoint("llama"))
    assert kinds == ["AutoPipeline", "AutoPipeline"]


def on_rank_load_on_mesh(folder):
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("pp",))
    return type(NeMoAutoModelForCausalLM.from_pretrained(folder, device_mesh=mesh)).__name__
