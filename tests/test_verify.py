"""``verify``: a proof for a user's own model and setup, what it prints, and the parts that find where a run departs."""

import attrs
import mutants
import pytest
import torch
import transformers
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy
from typer.testing import CliRunner

from nemo_dist import DistributedSetup, FSDP2Config, ParallelismSizes, TopologyError
from nemo_dist.cli.main import app
from nemo_dist.planning.mesh_plan import MeshPlan
from nemo_dist.testing import verify
from nemo_dist.testing.axes import Held, blame
from nemo_dist.testing.comparison import Comparison
from nemo_dist.testing.layouts import Tokens, Verdict, match
from nemo_dist.testing.local_topology import LARGEST, as_asked, fit
from nemo_dist.testing.proof import _tried_as_it_is
from nemo_dist.testing.proof_run import STEPS, Result
from nemo_dist.testing.tiny_models import SPECIMENS
from nemo_dist.testing.tiny_work import loader_of
from nemo_dist.testing.trace import GRADIENT, INPUT, OUTPUT, Site, Trace

LLAMA = {"hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8}
TP = ParallelismSizes(tp_size=2, dp_size=1)


# ---- proofs ----


def test_a_setup_for_many_ranks_is_proven_on_two(ranks):
    setup = DistributedSetup.build(parallelism_sizes=ParallelismSizes(tp_size=8), world_size=64)
    report = verify(setup, transformers.LlamaConfig(**LLAMA), ranks=2, pool=ranks)
    assert report.ok and report.culprit is None and not report.refused, report
    assert [check.what for check in report.checks] == [
        *("load", "loss", "gradients", "norm", "parameters", "save and load", "export")
    ]
    text = str(report)
    assert text.startswith("2 ranks (tp 2), plugins: tensor, fsdp2, against one process")
    assert "changed: tp_size: 8 -> 2" in text and "num_hidden_layers: 2 layers (got 16)" in text
    assert "attention heads on a rank: 2 (of the whole model 4)" in text
    assert "equal to one process (" in text.splitlines()[-1]


FAMILIES = {
    "qwen3, cp": (transformers.Qwen3Config, {"cp_size": 2, "dp_size": 1}),
    "mixtral, ep": (transformers.MixtralConfig, {"ep_size": 2}),
    "glm4_moe, tp": (transformers.Glm4MoeConfig, {"tp_size": 2, "dp_size": 1}),
    "gemma3, pp": (transformers.Gemma3TextConfig, {"pp_size": 2, "dp_size": 1}),
}


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_families_are_proven_under_their_axes(family, ranks):
    config, sizes = FAMILIES[family]
    report = verify({"parallelism_sizes": ParallelismSizes(**sizes)}, config(), ranks=2, pool=ranks)
    assert report.ok, report


def test_a_model_that_the_setup_refuses_is_reported_with_the_reason(ranks):
    config = SPECIMENS["llama"].config()
    config.attention_dropout = 0.1
    report = verify({"parallelism_sizes": TP}, config, full=True, ranks=2, pool=ranks)
    assert not report.ok and not report.checks
    assert "set attention_dropout to 0 in the model" in report.refused[0]
    assert "refused: " in str(report)


def no_ranks(world_size):
    raise AssertionError("no ranks are needed")


def test_sizes_of_the_real_model_that_the_setup_refuses_are_refused_before_a_tiny_copy_is_proven():
    """A tiny copy has heads that divide."""
    config = transformers.LlamaConfig(**LLAMA | {"num_hidden_layers": 2})
    report = verify({"parallelism_sizes": ParallelismSizes(tp_size=3)}, config, ranks=3, pool=no_ranks)
    assert not report.ok and not report.checks
    assert report.refused == (
        "LlamaForCausalLM: 32 attention heads do not divide over 3 tensor-parallel ranks; use a tp_size of 2, 4, 8, "
        "16, 32",
    )
    assert str(report).startswith("6 ranks (dp_shard 2, tp 3), plugins: tensor, fsdp2, the model as it is\n")


@pytest.mark.parametrize(
    "options",
    [
        {"world_size": 64, "parallelism_sizes": ParallelismSizes(tp_size=8, pp_size=2)},
        {"parallelism_sizes": ParallelismSizes(ep_size=4)},
        {"world_size": 8, "ranks": [4, 5, 6, 7], "strategy": FSDP2Config(offload_policy=CPUOffloadPolicy())},
    ],
    ids=["tp and pp", "ep", "offload"],
)
def test_the_real_sizes_are_tried_on_as_many_ranks_as_were_asked_for(options):
    small = {"num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 8, "num_experts": 8}
    assert _tried_as_it_is(as_asked(options), transformers.Qwen3MoeConfig(**small)) == ((), ())


def test_a_setup_that_is_refused_starts_no_ranks():
    report = verify({"parallelism_sizes": TP, "strategy": "ddp"}, transformers.LlamaConfig(), pool=no_ranks)
    assert not report.ok and "strategy 'ddp' does not compose with it" in report.refused[0]


def test_the_command_exits_with_one_for_a_refusal(tmp_path):
    transformers.LlamaConfig(**LLAMA).save_pretrained(tmp_path)
    result = CliRunner().invoke(app, ["verify", str(tmp_path), "--strategy", "ddp", "--tp", "2"])
    assert result.exit_code == 1 and "does not compose with it" in result.stdout


@pytest.mark.slow
def test_the_command_proves_a_model_of_a_folder(tmp_path):
    transformers.LlamaConfig(**LLAMA, architectures=["LlamaForCausalLM"]).save_pretrained(tmp_path)
    result = CliRunner().invoke(app, ["verify", str(tmp_path), "--tp", "2", "--ranks", "2"])
    assert result.exit_code == 0, result.output
    assert "equal  gradients: 21 parameters, each step" in result.stdout


def result_of(weight, **changed):
    """What a run of a model with one *weight* gave, the same in each step."""
    each = {"losses": 1.0, "norms": 1.0, "gradients": {"w": weight}, "parameters": {"w": weight}, **changed}
    return Result(loaded={"w": weight}, **{name: [value] * (STEPS + 1) for name, value in each.items()})


NOT_A_NUMBER = torch.full((4,), float("nan"))
UNCERTAIN = {
    "a loss that is no number": {"losses": float("nan")},
    "a gradient that is no number": {"gradients": {"w": NOT_A_NUMBER}},
    "a weight that is no number": {"parameters": {"w": NOT_A_NUMBER}},
    "a gradient that rounding changes": {"gradients": {"w": torch.tensor([1.0, 1, 1, 1.2])}},
    "a loss that rounding changes": {"losses": 1.1},
}


@pytest.mark.parametrize("swapped", [False, True], ids=["rounded otherwise", "as it is"])
@pytest.mark.parametrize("values", UNCERTAIN.values(), ids=UNCERTAIN)
def test_what_one_process_does_not_tell_is_not_called_equal(values, swapped):
    sure, unsure = result_of(torch.ones(4)), result_of(torch.ones(4), **values)
    single, other = (unsure, sure) if swapped else (sure, unsure)
    for ranks in ([single, single], [result_of(100 * torch.ones(4))] * 2):
        found = Comparison(single=single, other=other, results=ranks, plan=MeshPlan.resolve(ParallelismSizes(), 2))
        check = found.checks()[0]
        assert check.what == "one process" and not check.ok and "it does not tell what is right" in check.found


def test_a_rank_without_numbers_is_wrong_and_rounding_in_place_of_zero_is_not():
    right = result_of(torch.ones(4), gradients={"w": torch.ones(4), "zero": torch.tensor([1e-9, 0])})
    other = result_of(torch.ones(4), gradients={"w": torch.ones(4), "zero": torch.tensor([0, 2e-9])})
    lost = result_of(torch.ones(4), gradients={"w": NOT_A_NUMBER, "zero": torch.tensor([0, 2e-9])})

    def wrong(*ranks):
        plan = MeshPlan.resolve(ParallelismSizes(), 2)
        found = Comparison(single=right, other=other, results=ranks, plan=plan)
        return [check.what for check in found.checks() if not check.ok]

    assert wrong(right, other) == []
    assert wrong(right, lost) == ["gradients", "save and load"]


def test_a_buffer_of_the_checkpoint_that_ranks_lack_is_found(ranks):
    config = transformers.AutoConfig.for_model("deepseek_v3")
    report = verify({}, config, ranks=2, pool=ranks, around=mutants.buffers_not_loaded)
    assert not report.checks[0].ok and "e_score_correction_bias" in report.checks[0].found


def test_what_was_compared_is_told_when_export_and_search_fail(ranks):
    sizes = ParallelismSizes(tp_size=2, dp_size=1)
    config = SPECIMENS["llama"].config()
    report = verify({"parallelism_sizes": sizes}, config, full=True, ranks=2, pool=ranks, around=mutants.nothing_works)
    checks = {check.what: check for check in report.checks}
    assert not checks["loss"].ok and not checks["export"].ok, report
    assert "plain transformers does not read it: RuntimeError: " in checks["export"].found
    assert report.culprit is not None and "no hooks today" in report.unsearched
    assert "the search for the first departure failed: RankFailure: " in str(report)


def test_a_refused_export_is_one_wrong_line_among_the_others():
    right = result_of(torch.ones(4))
    refused = attrs.evolve(result_of(torch.ones(4)), unexported="CheckpointError: quantized")
    plan = MeshPlan.resolve(ParallelismSizes(), 2)
    check, culprit = Comparison(single=right, other=right, results=[refused] * 2, plan=plan).exported(None, None)
    assert not check.ok and check.found == "it was not written: CheckpointError: quantized" and culprit is None


# ---- the topology ----

WIDE = {  # sizes, ranks of the user, ranks here: what is wide here, and what is said of it
    "tp and cp": ({"tp_size": 4, "cp_size": 2}, 64, 8, {"dp_shard": 2, "cp": 2, "tp": 2}, "dp_shard: 8 -> 2"),
    "replicas": (
        {"tp_size": 2, "dp_replicate_size": 4},
        *(64, 8, {"dp_replicate": 2, "dp_shard": 2, "tp": 2}, "dp_shard: 8 -> 2"),
    ),
    "experts": ({"ep_size": 8}, 64, 8, {"dp_shard": 8, "ep_shard": 2, "ep": 4}, "ep_shard: 8 -> 2"),
    "no room": ({"tp_size": 8}, 64, 2, {"tp": 2}, "dp_shard: 8 -> 1, not proven"),
    "no room for shards": (
        {"tp_size": 2, "dp_replicate_size": 4},
        *(64, 4, {"dp_replicate": 2, "tp": 2}, "dp_shard: 8 -> 1, not proven"),
    ),
}


@pytest.mark.parametrize("built", [False, True], ids=["keywords", "setup"])
@pytest.mark.parametrize(("sizes", "world", "most", "wide", "said"), WIDE.values(), ids=WIDE)
def test_data_parallelism_stays_wide_or_is_said_to_be_unproven(sizes, world, most, wide, said, built):
    keywords = {"parallelism_sizes": ParallelismSizes(**sizes)}
    plan = DistributedSetup.build(**keywords, world_size=world).plan if built else None
    topology = fit(keywords if built else keywords | {"world_size": world}, most, LARGEST, plan)
    assert {axis.name: axis.size for axis in topology.setup.plan.wide} == wide
    assert said in topology.changes


def test_sizes_stay_where_nothing_says_that_data_parallelism_is_wide():
    sizes = ParallelismSizes(pp_size=4)
    for world in (None, 4):
        topology = fit({"parallelism_sizes": sizes, "world_size": world}, 4, LARGEST)
        assert {axis.name: axis.size for axis in topology.setup.plan.wide} == {"pp": 4}
        assert [change.partition(":")[0] for change in topology.changes] == ["mp_policy"]


def test_sizes_stay_where_they_fit_and_there_are_two_data_parallel_ranks():
    topology = fit({"parallelism_sizes": ParallelismSizes(tp_size=2)}, 8, LARGEST)
    assert topology.setup.plan.world_size == 4 and topology.setup.plan.size("dp") == 2
    assert [change.partition(":")[0] for change in topology.changes] == ["mp_policy"]
    assert topology.setup.strategy_config.mp_policy is not None


def test_every_wide_axis_stays_wide_on_fewer_ranks():
    sizes = ParallelismSizes(tp_size=8, pp_size=4, cp_size=4)
    topology = fit({"parallelism_sizes": sizes}, 8, LARGEST)
    assert {axis.name: axis.size for axis in topology.setup.plan.wide} == {"pp": 2, "cp": 2, "tp": 2}
    with pytest.raises(TopologyError, match="more than 4 ranks; allow more"):
        fit({"parallelism_sizes": sizes}, 4, LARGEST)


def test_a_size_that_a_tiny_model_cannot_share_becomes_one_that_it_can():
    topology = fit({"parallelism_sizes": ParallelismSizes(tp_size=3)}, 8, LARGEST)
    assert topology.setup.plan.size("tp") == 2 and "tp_size: 3 -> 2" in topology.changes


def test_options_of_the_strategy_are_kept():
    given = {"parallelism_sizes": TP, "strategy": FSDP2Config(sequence_parallel=True)}
    assert fit(given, 2, LARGEST).setup.strategy_config.sequence_parallel


def test_the_loader_follows_the_architecture():
    assert loader_of(transformers.LlamaConfig()) == "NeMoAutoModelForCausalLM"
    assert loader_of(transformers.LlavaConfig()) == "NeMoAutoModelForImageTextToText"
    bert = transformers.BertConfig(architectures=["BertForTokenClassification"])
    assert loader_of(bert) == "NeMoAutoModelForTokenClassification"


# ---- layouts ----

WHOLE = torch.randn((4, 6, 8), generator=torch.Generator().manual_seed(0))
TOKENS = Tokens(own=torch.arange(24).reshape(4, 6)[2:, [0, 5, 2]], rows=4, length=6)  # rows of one rank, in an order
OWN = WHOLE[2:][:, [0, 5, 2]]


@pytest.mark.parametrize(
    "local",
    [
        pytest.param(OWN, id="the tokens of a rank"),
        pytest.param(OWN[..., [7, 0, 3]], id="some features, in any order"),
        pytest.param(OWN[..., :4], id="a slice of features"),
    ],
)
def test_a_layout_that_a_parallelism_gives_is_right(local):
    assert match(WHOLE, local, TOKENS, 1e-6).verdict is Verdict.RIGHT
    assert match(WHOLE, local + 0.1, TOKENS, 1e-6).verdict is Verdict.WRONG


def test_tokens_cut_again_and_tokens_in_one_dim_are_right():
    assert match(WHOLE, OWN[:, :2], TOKENS, 1e-6, peers=2, place=0).verdict is Verdict.RIGHT
    assert match(WHOLE, OWN[:, 2:], TOKENS, 1e-6, peers=2, place=1).verdict is Verdict.RIGHT
    assert match(WHOLE, OWN[:, 2:], TOKENS, 1e-6, peers=2, place=0).verdict is not Verdict.RIGHT
    assert match(WHOLE.flatten(0, 1), OWN.flatten(0, 1), TOKENS, 1e-6).verdict is Verdict.RIGHT
    assert match(WHOLE, OWN.flatten(0, 1)[:5], TOKENS, 1e-6).verdict is Verdict.OPEN


def test_tensors_without_a_batch_follow_their_positions():
    positions = torch.randn((1, 6, 8))
    assert match(positions, positions[:, [0, 5, 2]], TOKENS, 1e-6).verdict is Verdict.RIGHT
    assert match(positions, positions[:, [0, 1, 2]], TOKENS, 1e-6).verdict is Verdict.WRONG


# ---- axes ----

PLAN = MeshPlan.resolve(ParallelismSizes(tp_size=2, dp_size=2), 4)
RIGHT = torch.tensor([3.0, -1.0])


def held(*values, expected=RIGHT):
    return [
        Held(rank=rank, value=value, expected=expected, right=expected is not None and value.equal(expected))
        for rank, value in enumerate(values)
    ]


def test_the_axis_of_a_sum_that_was_left_out_is_named():
    parts = torch.tensor([1.0, 1.0]), torch.tensor([2.0, -2.0])
    found = blame(held(*parts, *parts), PLAN, 1e-6)
    assert found.axis == "tp" and "sum over the ranks of tp is right" in found.why


def test_the_axis_along_which_copies_differ_is_named():
    other = RIGHT + 1
    assert blame(held(RIGHT, RIGHT, other, other), PLAN, 1e-6).axis == "dp_shard"


def test_the_axis_of_the_ranks_that_are_wrong_is_named():
    wrong = attrs.evolve(held(RIGHT)[0], expected=None, right=False)
    right = attrs.evolve(wrong, right=True)
    found = [attrs.evolve(one, rank=rank) for rank, one in enumerate((right, wrong, right, wrong))]
    assert blame(found, PLAN, 1e-6).axis == "tp"


def test_a_factor_that_fits_several_axes_names_none():
    found = blame(held(*[2 * RIGHT] * 4), PLAN, 1e-6)
    assert found.axis is None and "2 times" in found.why


# ---- traces ----


def test_a_trace_has_outputs_gradients_and_who_reads_them():
    model = nn.Sequential(nn.Linear(2, 2), nn.Tanh())
    trace = Trace()
    with trace.watching(model):
        model(torch.ones(3, 2)).sum().backward()
    model(torch.ones(3, 2)).sum().backward()  # after the context nothing is recorded
    order = [(site.what, site.module) for site in trace.values if site.what != INPUT]
    assert order[:3] == [(OUTPUT, "0"), (OUTPUT, "1"), (OUTPUT, "")]
    assert sorted(order[3:5]) == [(GRADIENT, ""), (GRADIENT, "1")]  # one tensor
    assert order[5:] == [(GRADIENT, "0")]
    assert trace.readers["0", 0] == ["1"]
    assert trace.values[Site(GRADIENT, "1", 0)][0].equal(torch.ones(3, 2))


def test_calls_of_microbatches_are_joined():
    model = nn.Linear(2, 2)
    trace = Trace()
    with trace.watching(model):
        for rows in torch.arange(8.0).reshape(4, 2).split(2):
            model(rows)
    (whole,) = trace.calls(Site(OUTPUT, "", 0))
    assert whole.allclose(model(torch.arange(8.0).reshape(4, 2)))
    assert len(trace.calls(Site(OUTPUT, "", 0), 2)) == 2 and not trace.calls(Site(OUTPUT, "", 0), 3)
