"""Training a pipeline is training on one process: loss, every gradient, clipped norm, three AdamW steps."""

import pytest

from nemo_dist import FSDP2Config, ParallelismSizes, PipelineConfig
from nemo_dist.testing.equivalence import Task, assert_equivalent
from nemo_dist.testing.precision import FP32

SINGLE = ["GPipe", "1F1B"]
LOOPED = ["LoopedBFS", "Interleaved1F1B", "InterleavedZeroBubble"]
V = ["ZBVZeroBubble", "DualPipeV"]


def pipelined(pp=2, schedule="1F1B", dp_replicate=None, reshard=None, sizes=None, sequence=False, **options):
    return {
        "strategy": FSDP2Config(mp_policy=FP32, reshard_after_forward=reshard, sequence_parallel=sequence),
        "parallelism_sizes": ParallelismSizes(pp_size=pp, dp_replicate_size=dp_replicate, **(sizes or {})),
        "pipeline_config": PipelineConfig(pp_schedule=schedule, **options),
    }


@pytest.mark.parametrize("schedule", SINGLE + LOOPED + V)
def test_every_schedule_matches_one_process(ranks, schedule):
    assert_equivalent(ranks(2), Task(specimen="llama-deep"), **pipelined(2, schedule))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("specimen", "schedule"),
    [
        ("llama-deep-tied", "1F1B"),
        ("llama-deep-tied", "InterleavedZeroBubble"),
        ("llama-deep-tied", "ZBVZeroBubble"),
        ("qwen3-deep", "Interleaved1F1B"),
        ("llama-sequences", "DualPipeV"),
        ("llama-tokens", "1F1B"),
    ],
)
def test_stages_shard_their_parameters_and_stay_exact(ranks, specimen, schedule):
    assert_equivalent(ranks(4), Task(specimen=specimen), **pipelined(2, schedule))


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["1F1B", "Interleaved1F1B", "ZBVZeroBubble"])
def test_four_stages_of_uneven_layers_are_exact(ranks, schedule):
    assert_equivalent(ranks(4), Task(specimen="llama-deep-tied"), **pipelined(4, schedule))


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["1F1B", "Interleaved1F1B"])
def test_resharding_after_every_forward_does_not_change_the_numbers(ranks, schedule):
    assert_equivalent(ranks(4), Task(specimen="llama-deep"), **pipelined(2, schedule, reshard=True))


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["full", "selective"])
@pytest.mark.parametrize("schedule", SINGLE + LOOPED + V)
def test_recomputed_activations_do_not_change_the_numbers(ranks, schedule, mode):
    if mode == "selective" and schedule not in (*SINGLE, "LoopedBFS", "Interleaved1F1B"):
        pytest.skip("refused at build")
    options = pipelined(2, schedule) | {"activation_checkpointing": mode}
    assert_equivalent(ranks(2), Task(specimen="llama-deep"), **options)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("specimen", "schedule", "options"),
    [
        ("llama-tied", "1F1B", {"sizes": {"tp_size": 2}}),
        ("llama-deep", "ZBVZeroBubble", {"sizes": {"tp_size": 2}}),
        ("llama-tied", "1F1B", {"sizes": {"tp_size": 2}, "sequence": True}),
        ("qwen3-deep", "InterleavedZeroBubble", {"sizes": {"tp_size": 2}, "sequence": True}),
        ("llama-tied", "1F1B", {"sizes": {"cp_size": 2}}),
        ("llama-deep", "InterleavedZeroBubble", {"sizes": {"cp_size": 2}}),
    ],
    ids=str,
)
def test_stages_cut_along_other_axes_are_exact(ranks, specimen, schedule, options):
    assert_equivalent(ranks(4), Task(specimen=specimen), **pipelined(2, schedule, **options))


@pytest.mark.parametrize("schedule", ["GPipe", "1F1B", "Interleaved1F1B", "ZBVZeroBubble"])
def test_a_list_of_batches_accumulates(ranks, schedule):
    assert_equivalent(ranks(2), Task(specimen="llama-deep-tied", accumulate=3), **pipelined(2, schedule))


@pytest.mark.parametrize(
    "options",
    [
        {"pp_microbatch_size": 2},
        {"pp_microbatch_size": 3},  # 8 rows do not divide: filled up with rows that do not count
        {"pp_batch_size": 12},
        {"pp_microbatch_size": 2, "pp_batch_size": 8, "pp_seq_len": 12, "dtype": "float32"},
        {"scale_grads_in_schedule": True},
        {"layers_per_stage": 5},
        {"schedule": "Interleaved1F1B", "layers_per_stage": 3, "round_virtual_stages_to_pp_multiple": "up"},
        {"schedule": "Interleaved1F1B", "layers_per_stage": 5},  # one stage on a rank
        {"schedule": "LoopedBFS", "layers_per_stage": 2, "round_virtual_stages_to_pp_multiple": "up"},  # three
        {"schedule": "InterleavedZeroBubble", "layers_per_stage": 2, "round_virtual_stages_to_pp_multiple": "up"},
    ],
    ids=str,
)
def test_an_option_does_not_change_the_numbers(ranks, options):
    assert_equivalent(ranks(2), Task(specimen="llama-deep-tied", accumulate=2), **pipelined(**options))


def test_the_users_own_division_is_exact(ranks):
    prefix = "model.layers."
    parts = [
        ["model.embed_tokens", "model.rotary_emb", f"{prefix}0"],
        ["model.rotary_emb", *(f"{prefix}{index}" for index in range(1, 9)), "model.norm", "lm_head"],
    ]
    assert_equivalent(ranks(2), Task(specimen="llama-deep"), **pipelined(module_fqns_per_model_part=parts))


def test_the_users_own_loss_is_exact(ranks):
    assert_equivalent(ranks(2), Task(specimen="llama-deep"), **pipelined(loss_fn=next_token_loss))


def next_token_loss(logits, labels):
    from torch.nn.functional import cross_entropy

    return cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def test_a_schedule_from_a_file_is_exact(ranks, tmp_path):
    path = tmp_path / "mine.csv"
    # Two ranks with stages 0, 2 and 1, 3; four microbatches, all forward, then back, the last of each stage in two.
    forward = [[f"{stage}F{i}" for stage in (rank, rank + 2) for i in range(4)] for rank in (0, 1)]
    back = [[cell for stage in (rank + 2, rank) for cell in backwards(stage)] for rank in (0, 1)]
    path.write_text("\n".join(",".join([*f, "", *b]) for f, b in zip(forward, back, strict=True)))
    options = pipelined(schedule=None, pp_schedule_csv=str(path), pp_microbatch_size=2)
    assert_equivalent(ranks(2), Task(specimen="llama-deep", accumulate=2), **options)


def backwards(stage):
    return [*(f"{stage}B{index}" for index in range(3)), f"{stage}I3", f"{stage}W3"]
