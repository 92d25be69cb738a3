"""What acts between cut projections is found by structure, and copies that drift apart are reported."""

import pytest
import torch
import transformers
from cases import cases

from nemo_dist import DistributedSetup, FSDP2Config, NeMoAutoModelForCausalLM, ParallelismSizes
from nemo_dist.errors import RankError, TopologyError
from nemo_dist.testing.equivalence import Task, assert_equivalent, checkpoint
from nemo_dist.testing.precision import FP32
from nemo_dist.testing.tiny_models import SPECIMENS
from nemo_dist.training.replica_check import ReplicaCheck
from nemo_dist_tensor.probe import Call, Recording, prove
from nemo_dist_tensor.structure import completed
from nemo_dist_tensor.tp_plan import match

SUMMED = "replicated_with_grad_allreduce"


def options(sequence=False, **sizes):
    strategy = FSDP2Config(mp_policy=FP32, sequence_parallel=sequence)
    return {"strategy": strategy, "parallelism_sizes": ParallelismSizes(**{"tp_size": 2, **sizes})}


@pytest.mark.slow
@cases(
    ("specimen", "world", "sequence"),
    [
        ("glm4-moe-norms", 2, False),
        ("glm4-moe-norms", 2, True),
        ("glm4-moe-norms", 4, False),
        ("glm4-moe-norms", 4, True),
        ("apertus", 2, False),
        ("apertus", 2, True),
        ("gpt-oss", 2, False),
        ("gpt-oss", 4, False),
        ("gptj", 2, False),
        ("gptj", 2, True),
        ("opt", 2, False),
        ("mamba", 2, False),
        ("bloom", 2, False),
        ("bloom", 4, False),
        ("bert-tokens", 2, False),
    ],
    lambda specimen, world, sequence: f"{specimen}, {world} ranks{', sequence' if sequence else ''}",
)
def test_parameters_inside_of_regions_match_one_process(ranks, specimen, world, sequence):
    assert_equivalent(ranks(world), Task(specimen=specimen, length=13), **options(sequence))


def on_rank_refusal(folder, choice):
    with pytest.raises((TopologyError, RankError)) as caught:
        NeMoAutoModelForCausalLM.from_pretrained(folder, distributed_setup=DistributedSetup.build(**choice))
    return str(caught.value)


@pytest.mark.slow
def test_tokens_are_not_cut_before_experts_without_a_rule(ranks):
    (message, _) = ranks(2).run(on_rank_refusal, checkpoint("gpt-oss"), options(sequence=True))

    assert "mlp.experts (GptOssExperts) is neither in the plan nor a norm, so its tokens cannot be cut" in message
    assert "use sequence_parallel=False" in message


def rules_of(specimen, ranks=2, plan=None, **changes):
    config = SPECIMENS[specimen].config()
    for name, value in changes.items():
        setattr(config, name, value)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    rules, problems = completed(model, match(model, plan or {}), ranks)
    return rules, problems


def test_norms_that_a_plan_forgets_sum_their_gradients():
    rules, problems = rules_of("glm4-moe-norms")

    assert problems == []
    summed = {name for name, style in rules.parameters.items() if style == SUMMED}
    assert summed == {f"model.layers.{i}.self_attn.{name}_norm.weight" for i in range(3) for name in "qk"}


def test_parameters_of_an_activation_sum_their_gradients():
    rules, _ = rules_of("apertus")

    assert rules.parameters["model.layers.0.mlp.act_fn.alpha_p"] == SUMMED
    assert rules.modules["model.layers.0.mlp.up_proj"] == "colwise"


def test_packed_experts_that_a_plan_calls_column_wise_are_cut_by_halves():
    rules, _ = rules_of("inkling2")

    packed = {name: style for name, style in rules.parameters.items() if name.endswith("experts.gate_up_proj")}
    assert packed and set(packed.values()) == {"packed_colwise"}


def test_sinks_are_cut_by_heads():
    rules, _ = rules_of("gpt-oss")

    assert rules.parameters["model.layers.0.self_attn.sinks"] == "colwise"
    assert rules.modules["model.layers.0.self_attn.o_proj"] == "rowwise"


def test_attention_that_counts_its_heads_computes_its_own():
    rules, _ = rules_of("gptj")

    assert "num_attention_heads" in rules.divided["transformer.h.0.attn"]
    assert rules.modules["transformer.h.0.attn.q_proj"] == "colwise"
    assert rules.modules["transformer.h.0.mlp.fc_out"] == "rowwise"


def test_a_right_plan_is_left_as_it_is():
    for specimen in ("llama", "qwen3", "mixtral", "phi3", "gemma2", "olmo2"):
        config = SPECIMENS[specimen].config()
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(config)
        before = match(model, {})
        rules, problems = completed(model, before, 2)
        assert (rules.modules, rules.parameters, problems) == (before.modules, before.parameters, []), specimen


def test_a_wrong_plan_of_the_user_is_refused_with_its_module():
    plan = {"layers.*.mlp.gate_up_proj": "colwise", "layers.*.mlp.down_proj": "rowwise"}
    _, (problem,) = rules_of("phi3", plan=plan)

    assert "model.layers.*.mlp (" in problem and "do not compute what the whole module computes" in problem


def on_rank_spoil(folder, which, step, check):
    """Train two steps; before step number *step*, rank 1 changes its copy of the parameter *which* a little."""
    setup = DistributedSetup.build(**options())
    model = SPECIMENS["llama"].load.from_pretrained(folder, distributed_setup=setup, dtype=torch.float32)
    runtime = setup.runtime(model, check_replicas=check)
    (batch,) = Task().batches(0)
    try:
        for now in range(4):
            if now == step and torch.distributed.get_rank() == 1:
                parameter = dict(runtime.named_parameters())[which]
                parameter.detach().to_local().flatten()[0].add_(1e-6)
            runtime.forward_backward(batch)
    except RankError as error:
        return now, str(error)
    return None


@pytest.mark.parametrize(
    ("step", "check", "seen"), [(0, None, 0), (1, None, 1), (2, None, None), (2, 4, 3), (0, 0, None)]
)
def test_replicas_that_drift_apart_are_reported_on_every_rank(ranks, step, check, seen):
    answers = ranks(2).run(on_rank_spoil, checkpoint("llama"), "model.norm.weight", step, check)

    if seen is None:
        assert answers == [None, None]
        return
    for now, message in answers:
        assert now == seen
        assert "model.norm.weight: ranks [1] differ from rank 0 along 'tp'" in message


def on_rank_equal(folder, choice):
    setup = DistributedSetup.build(**choice)
    model = SPECIMENS["llama"].load.from_pretrained(folder, distributed_setup=setup, dtype=torch.float32)
    runtime = setup.runtime(model)
    (batch,) = Task().batches(0)
    runtime.forward_backward(batch)
    runtime.check_replicas()
    return True


@pytest.mark.slow
@cases(("world", "sizes"), [(4, {"dp_replicate_size": 2, "tp_size": 1}), (8, {"dp_replicate_size": 2, "tp_size": 2})])
def test_replicas_along_every_axis_are_equal(ranks, world, sizes):
    assert all(ranks(world).run(on_rank_equal, checkpoint("llama"), options(**sizes)))


@pytest.mark.parametrize(("every", "error"), [("10", TypeError), (-1, ValueError), (True, TypeError)])
def test_how_often_to_compare_replicas_is_a_number_of_steps(every, error):
    with pytest.raises(error, match="check_replicas must be an int from 0 up"):
        ReplicaCheck(every=every)


class HandsOn(torch.nn.Module):
    """Puts tensors into a list that later modules read, and as many as ``count`` says."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(4))
        self.count = 1

    def forward(self, hidden, box):
        box.extend(hidden * place for place in range(self.count))
        return hidden * self.weight


@pytest.mark.parametrize(("count", "problem"), [(0, "differs"), (1, ""), (2, "differs")])
def test_parts_that_hand_on_another_number_of_tensors_are_found(count, problem):
    def cut(twin, peer):
        twin.count = count
        return {}

    found = prove(HandsOn(), Call((torch.ones(2, 6, 4, requires_grad=True), []), {}), 2, cut).problem

    assert found == (problem and f"what it hands on to other modules {problem}")


def test_blocks_that_are_alike_are_run_once_and_known_all():
    config = SPECIMENS["qwen3-moe"].config()
    config.num_hidden_layers, config.mlp_only_layers = 6, [0]
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)

    found = Recording.of(model)

    assert found.complete
    inside = [f"model.layers.{layer}.self_attn.o_proj" for layer in range(6)]
    assert inside == [name for name in inside if name in found.calls]
    held = {id(found.modules[name]) for name in inside}
    assert len(held) == 2  # one of a block with experts and one of a block without
    assert not any(found.modules[name].weight.is_meta for name in inside)
