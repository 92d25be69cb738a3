"""What makes rows depend on each other, in classes of the user's own above all, is refused before the first step."""

import random
from types import SimpleNamespace

import pytest
import torch
import transformers
from cases import case_id, cases, slow
from own_models import (
    SIZES,
    Around,
    LeavingOut,
    Masked,
    OwnConfig,
    OwnModel,
    Penalised,
    Relabelling,
    Sharing,
    Weighing,
    WeighingConfig,
    on_meta,
)
from torch.nn.functional import cross_entropy
from transformers.modeling_outputs import CausalLMOutputWithPast

from nemo_dist import DDPConfig, DistributedSetup, FSDP2Config, NeMoAutoModelForCausalLM, ParallelismSizes
from nemo_dist.errors import CheckpointError, TopologyError
from nemo_dist.hf_model import has_own_code
from nemo_dist.loading.hf_weight_loader import refuse_apart
from nemo_dist.testing.equivalence import TOLERANCE, tensor_differences, whole_state
from nemo_dist.testing.precision import FP32
from nemo_dist.testing.shrink import tiny
from nemo_dist.testing.tensors import rows_of_rank
from nemo_dist.training.batch_entries import BatchEntries
from nemo_dist.training.counted_calls import SecondForward
from nemo_dist.training.loss_weighting import judge_loss
from nemo_dist.training.neighbouring_rows import depends_on_padding, depends_on_rows
from nemo_dist.training.rehearsal import read_from_outside
from nemo_dist.training.step_loss import refuse_rows_that_meet
from nemo_dist_context.apply import require_fit
from nemo_dist_pipeline.partition.model_structure import ModelStructure
from nemo_dist_pipeline.partition.proof import require_exact
from nemo_dist_pipeline.partition.stage_model import stages_of
from nemo_dist_recompute import RecomputeConfig
from nemo_dist_recompute.apply import recompute
from nemo_dist_tensor.apply import Parallelizer
from nemo_dist_tensor.random_choices import random_problems
from nemo_dist_tensor.simulated_peers import SimulatedPeers
from nemo_dist_tensor.structure import completed
from nemo_dist_tensor.tp_plan import match


@pytest.mark.parametrize(
    ("change", "where"),
    [
        ("", None),
        ("counting", None),
        ("spectral", None),
        ("noting", None),
        ("noisy", None),
        ("twice", None),
        ("running", "buffer model.layers.0.mlp.mean"),
        ("remembering", "model.layers.0.mlp.gate_proj, Linear"),
        ("rows in training", "model.layers.0.mlp.down_proj, Linear"),
        ("mixing", "model.layers.0.mlp.gate_proj, Linear"),
        ("skipping", "model.layers.1, Skipping"),
    ],
)
def test_what_joins_the_rows_of_a_batch_is_found(change, where):
    model = on_meta(change)

    assert has_own_code(model)
    assert depends_on_rows(model) == where


@pytest.mark.parametrize(("option", "value"), [("max_norm", 0.5), ("scale_grad_by_freq", True), ("sparse", True)])
def test_an_embedding_that_goes_by_the_tokens_of_a_batch_is_refused(option, value):
    model = on_meta("")
    several, one = ({"dp_shard": 2}, 2), ({}, 1)
    meshes = [SimpleNamespace(wide=lambda w=wide: w, size=lambda _, n=size: n) for wide, size in (several, one)]
    refuse_rows_that_meet(model, meshes[0])
    setattr(model.model.embed_tokens, option, value)

    with pytest.raises(ValueError, match=f"model.embed_tokens has {option}={value}, .* set its {option} to"):
        refuse_rows_that_meet(model, meshes[0])
    refuse_rows_that_meet(model, meshes[1])


def test_rows_that_meet_by_their_padding_are_found():
    assert depends_on_rows(on_meta("", Masked)) == "lm_head, Linear"


@pytest.mark.parametrize(
    ("family", "attention", "found"),
    [("paligemma", "sdpa", True), ("paligemma", "eager", False), ("llava", "sdpa", False)],
)
def test_attention_that_is_causal_only_beside_padding_is_found(family, attention, found):
    with torch.device("meta"):
        model = transformers.AutoModelForImageTextToText.from_config(tiny(family).config, attn_implementation=attention)

    assert depends_on_padding(model) is found


def test_a_term_that_own_code_adds_to_the_loss_is_refused():
    judge_loss(on_meta("counting"), routers_known=False)
    with pytest.raises(ValueError, match=r"OwnModel makes a loss of its own \(from its own code\).*give a loss"):
        judge_loss(on_meta("routed"), routers_known=False)
    with pytest.raises(ValueError, match=r"Penalised makes a loss of its own \(from its own code\)"):
        judge_loss(on_meta("", Penalised), routers_known=False)


@pytest.mark.parametrize("kind", [Relabelling, LeavingOut])
def test_labels_that_own_code_makes_or_leaves_out_are_refused(kind):
    with pytest.raises(ValueError, match=r"makes a loss of its own \(from its own code\).*give a loss"):
        judge_loss(on_meta("", kind), routers_known=False)


TOKENS = torch.arange(48).view(4, 12) * 5 % 90 + 3
POSITIONS = torch.arange(12).expand(4, 12)


def judge_entries(kind, weighs, **entries):
    judge = BatchEntries(model=on_meta("", kind), apart=True, weighs=weighs)
    judge({"input_ids": TOKENS, "labels": TOKENS, "position_ids": POSITIONS} | entries)


def test_what_own_code_reads_of_a_batch_is_judged_with_the_loss():
    weights = torch.rand(4, 12)
    judge_entries(OwnModel, weighs=True, loss_weights=weights)  # which no code reads
    judge_entries(Weighing, weighs=False, loss_weights=weights)
    with pytest.raises(
        ValueError, match=r"Weighing reads 'loss_weights' of the batch.*not the mean over the labels.*loss="
    ):
        judge_entries(Weighing, weighs=True, loss_weights=weights)


def test_what_own_code_reads_of_a_batch_is_judged_with_the_rows():
    with pytest.raises(ValueError, match=r"Sharing computes a row by 'shares' of the rows beside it \(in its output\)"):
        judge_entries(Sharing, weighs=False, shares=torch.rand(4))


def on_rank_weighed():
    setup = DistributedSetup.build(FSDP2Config(mp_policy=FP32))
    config = WeighingConfig(**SIZES)
    model = NeMoAutoModelForCausalLM.from_config(config, distributed_setup=setup, dtype=torch.float32)
    runtime = setup.runtime(model)
    batch = rows_of_rank({"input_ids": TOKENS, "labels": TOKENS, "loss_weights": torch.ones(4, 12)}, runtime)
    with pytest.raises(ValueError, match="Weighing reads 'loss_weights' of the batch"):
        runtime.forward_backward(batch)
    del batch["loss_weights"]
    return runtime.forward_backward(batch).item()


def test_a_step_refuses_what_its_loss_was_not_tried_with(ranks):
    first, second = ranks(2).run(on_rank_weighed)
    assert first == second > 0


class Weighted(OwnModel):
    """Weighs the losses of labels by an input, and adds one to the hidden states."""

    def forward(self, input_ids=None, labels=None, label_weights=None, shift=0.0, **kwargs):
        logits = self.lm_head(self.model(input_ids=input_ids, **kwargs).last_hidden_state + shift)
        kept = labels[:, 1:] != -100
        losses = cross_entropy(logits[:, :-1].mT, labels[:, 1:], reduction="none")
        weights = kept.float() if label_weights is None else kept * label_weights[:, 1:]
        return CausalLMOutputWithPast(loss=(losses * weights).sum() / weights.sum(), logits=logits)


def test_an_input_that_weighs_the_labels_of_own_code_is_refused():
    with torch.device("meta"):
        model = Weighted(OwnConfig(**SIZES))
    judge_loss(model, routers_known=False)
    judge = BatchEntries(model=model, apart=False, weighs=True)
    tokens = torch.ones(3, 5, dtype=torch.long)
    batch = {"input_ids": tokens, "labels": tokens}

    judge(batch | {"shift": torch.zeros(3, 5, 32)})
    with pytest.raises(ValueError, match=r"Weighted reads 'label_weights' of the batch.*is not the mean.*give a loss"):
        judge(batch | {"label_weights": torch.ones(3, 5)})


def runtime_of(change, strategy):
    setup = DistributedSetup.build(strategy)
    config = OwnConfig(**SIZES, change=change)
    return setup.runtime(NeMoAutoModelForCausalLM.from_config(config, distributed_setup=setup, dtype=torch.float32))


def on_rank_refusal(change, strategy):
    with pytest.raises((ValueError, TopologyError)) as caught:
        runtime_of(change, strategy)
    return str(caught.value)


@pytest.mark.parametrize(
    ("change", "strategy", "message"),
    [
        ("running", DDPConfig(), "computes a row by the rows beside it (in buffer model.layers.0.mlp.mean)"),
        ("gated", FSDP2Config(mp_policy=FP32), "model.layers.0.mlp.gate is a single number, which fsdp2 cannot shard"),
    ],
    ids=["a running mean", "a single number"],
)
def test_what_ranks_cannot_share_is_refused_before_the_first_step(ranks, change, strategy, message):
    assert all(message in found for found in ranks(2).run(on_rank_refusal, change, strategy))


def test_code_around_a_cut_module_that_uses_what_is_cut_is_found():
    model = on_meta("calling")

    (problem,) = completed(model, match(model, {}), 2)[1]

    assert "OwnModel does not compute with its projections cut over ranks what it computes with whole ones" in problem
    assert "use tp_size=1" in problem


def test_a_projection_that_computes_its_weight_from_others_is_not_cut():
    model = on_meta("normed")

    (problem,) = Parallelizer(model, match(model, {}), SimulatedPeers.make(2)[0], sequence=False).problems()

    assert problem.startswith(
        "model.layers.*.self_attn.o_proj computes its weight from others (parametrizations.weight"
    )
    assert problem.endswith("leave that out, or use tp_size=1, and fsdp2")


def test_what_the_generator_of_python_draws_is_refused_under_tp():
    (problem,) = random_problems(on_meta("lucky"))
    assert problem.startswith("model.layers.*.mlp.rate is compared with a random number in training")


def test_what_blocks_leave_for_later_ones_is_found():
    with pytest.raises(ValueError, match=r"on stage 1: .* no attribute 'made'\), so its blocks leave each other"):
        require_two_stages(on_meta("following"))


def test_modules_that_are_read_from_outside_are_found():
    assert "model.layers.0" not in read_from_outside(on_meta("twice"))
    assert {"model.layers.0", "model.layers.3", "model.layers.0.self_attn"} <= read_from_outside(on_meta("reaching"))


def test_a_feed_forward_that_mixes_features_in_training_is_not_cut_inside():
    model = on_meta("features in training")

    rules, problems = completed(model, match(model, {}), 2)

    assert problems == []
    assert {rules.modules[f"model.layers.0.mlp.{name}_proj"] for name in ("gate", "up", "down")} == {
        "colwise_gather_output"
    }
    assert rules.modules["model.layers.0.self_attn.o_proj"] == "rowwise"


def test_tokens_that_depend_on_each_other_in_training_are_found():
    require_fit(on_meta("noting"), "all_gather", 2, 1)
    with pytest.raises(ValueError, match=r"in training, the queries of LlamaAttention depend on other tokens"):
        require_fit(on_meta("tokens in training"), "all_gather", 2, 1)


def require_two_stages(model):
    structure = ModelStructure.of(model)
    require_exact(model, structure, stages_of(structure, structure.divide(model, 2)))


def test_what_only_training_reads_after_the_blocks_is_found():
    with pytest.raises(ValueError, match="OwnModel uses weights of other stages again after its blocks"):
        require_two_stages(on_meta("returning"))


@pytest.mark.parametrize(
    ("change", "where"),
    [
        ("", None),
        ("noting", None),
        ("noisy", None),
        ("counting", "buffer model.layers.0.mlp.seen"),
        ("remembering", "attribute model.layers.0.mlp.mean"),
        ("spectral", "buffer model.layers.0.mlp.down_proj.parametrizations.weight.0._u"),
    ],
)
def test_what_a_second_forward_does_otherwise_is_found(change, where):
    assert SecondForward.of(on_meta(change)).where == where


def test_what_counts_its_forwards_is_neither_recomputed_nor_run_in_microbatches():
    with pytest.raises(ValueError, match=r"mlp\.seen\), and recomputation runs layers twice.*leave activation_check"):
        recompute(on_meta("counting"), RecomputeConfig())
    with pytest.raises(ValueError, match=r"mlp\.seen\), and a pipeline runs its blocks once for each microbatch"):
        require_two_stages(on_meta("counting"))


def test_what_the_generator_of_python_draws_is_not_recomputed():
    state = random.getstate()
    with pytest.raises(ValueError, match="draws by a generator of Python or numpy, which is not put back"):
        recompute(on_meta("noisy"), RecomputeConfig())
    assert random.getstate() == state


@pytest.mark.parametrize("change", ["remembering", "spectral", "lucky"])
def test_what_layers_keep_or_draw_is_still_refused_by_recomputation(change):
    with pytest.raises(ValueError, match="recomputation runs layers twice"):
        recompute(on_meta(change), RecomputeConfig())


def trained_around(recomputed):
    torch.manual_seed(0)
    model = Around(OwnConfig(**SIZES, attention_dropout=0.1)).train()
    if recomputed:
        recompute(model, RecomputeConfig())
    for seed in range(2):
        random.seed(seed)
        torch.manual_seed(seed)
        model(input_ids=torch.arange(24).view(2, 12)).logits.square().mean().backward()
    return model


def test_what_a_model_does_around_its_layers_is_done_once_under_recomputation():
    recomputed, plain = trained_around(True), trained_around(False)

    assert recomputed.forwards == plain.forwards == 2
    assert torch.equal(recomputed.norm.running_mean, plain.norm.running_mean)
    for name, parameter in plain.named_parameters():
        assert torch.equal(parameter.grad, recomputed.get_parameter(name).grad), name


def test_a_batch_norm_in_a_layer_of_own_code_recomputes_once_it_is_frozen():
    model = OwnModel(OwnConfig(**SIZES, change="normalising")).train()
    recompute(model, RecomputeConfig())
    tokens = torch.arange(24).view(2, 12)

    with pytest.raises(ValueError, match=r"running statistics of batches \(in .*BatchNorm1d\).*freeze them"):
        model(input_ids=tokens)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm1d):
            module.eval()
    model(input_ids=tokens).logits.sum().backward()


@pytest.mark.parametrize("change", ["noting", "drawing", "drawing integers", "drawing by Python"])
def test_proofs_of_a_pipeline_leave_draws_before_the_blocks_and_generators_alone(change):
    model = on_meta(change)
    of_torch, of_python = torch.get_rng_state(), random.getstate()

    require_two_stages(model)

    assert torch.equal(torch.get_rng_state(), of_torch)
    assert random.getstate() == of_python


def mean_of_tokens(outputs, batch):
    labels = batch["labels"][:, 1:]
    return torch.nn.functional.cross_entropy(outputs.logits[:, :-1].mT, labels, reduction="none"), labels != -100


def on_rank_counted(strategy):
    """Return how often a model counts itself to run in a step of two batches that is surveyed before."""
    setup = DistributedSetup.build(strategy)
    config = OwnConfig(**SIZES, change="counting")
    model = NeMoAutoModelForCausalLM.from_config(config, distributed_setup=setup, dtype=torch.float32).train()
    runtime = setup.runtime(model, loss=mean_of_tokens)
    buffer = model.model.layers[0].mlp.seen
    tokens = torch.arange(48).view(4, 12) * 5 % 90 + 3
    runtime.forward_backward([rows_of_rank({"input_ids": tokens, "labels": tokens}, runtime)] * 2)
    return model.model.layers[0].mlp.seen.item(), model.model.layers[0].mlp.seen is buffer


def test_a_survey_of_a_step_leaves_buffers_as_they_were(ranks):
    assert ranks(2).run(on_rank_counted, DDPConfig()) == [(2.0, True), (2.0, True)]


def on_rank_gradients(change, strategy):
    torch.manual_seed(0)
    runtime = runtime_of(change, strategy)
    tokens = (torch.arange(48).view(4, 12) * 5) % 90 + 3
    runtime.forward_backward(rows_of_rank({"input_ids": tokens, "labels": tokens}, runtime))
    return whole_state(runtime, {name: parameter.grad for name, parameter in runtime.named_parameters()})


@pytest.mark.parametrize("change", ["leaving", "reaching", "normed"])
def test_blocks_that_share_more_than_hidden_states_are_sharded_exactly(ranks, change):
    """Under ddp every module has whole weights, and what it is given is handed to it as it is."""
    sharded, _ = ranks(2).run(on_rank_gradients, change, FSDP2Config(mp_policy=FP32))
    whole, _ = ranks(2).run(on_rank_gradients, change, DDPConfig())

    assert tensor_differences("gradients", sharded, whole, TOLERANCE) == []


def on_rank_buffers(folder, sizes):
    setup = DistributedSetup.build(FSDP2Config(mp_policy=FP32), ParallelismSizes(**sizes))
    model = NeMoAutoModelForCausalLM.from_pretrained(folder, distributed_setup=setup)
    return [dict(part.named_buffers()) for part in setup.runtime(model).parts]


@cases(("sizes",), [({},), ({"pp_size": 2},), ({"tp_size": 2},)], lambda sizes: case_id(sizes) or "fsdp2")
def test_what_a_class_computes_when_it_is_made_is_there_after_a_load(ranks, tmp_path, sizes):
    """Transformers makes a model without memory, and leaves such buffers as it finds them."""
    whole = OwnModel(OwnConfig(**SIZES, change="sloped"))
    expected = dict(whole.named_buffers())
    assert {"model.layers.0.mlp.slopes", "model.layers.0.mlp.later", "model.rotary_emb.inv_freq"} <= expected.keys()
    older = {name: tensor for name, tensor in whole.state_dict().items() if not name.endswith("later")}
    whole.save_pretrained(tmp_path, state_dict=older)

    for parts in ranks(2).run(on_rank_buffers, tmp_path, sizes):
        for name, buffer in (item for part in parts for item in part.items()):
            assert torch.equal(buffer, expected[name]), name


def on_rank_trained(folder, strategy, sizes):
    setup = DistributedSetup.build(strategy, ParallelismSizes(**sizes))
    runtime = setup.runtime(NeMoAutoModelForCausalLM.from_pretrained(folder, distributed_setup=setup))
    return {name: parameter.requires_grad for name, parameter in runtime.named_parameters()}


@cases(
    ("strategy", "sizes"),
    [(FSDP2Config(mp_policy=FP32), {}), slow(FSDP2Config(mp_policy=FP32), {"pp_size": 2}), slow(DDPConfig(), {})],
    lambda strategy, sizes: case_id(type(strategy).__name__, sizes),
)
def test_what_a_class_freezes_is_trained_after_a_load_as_in_plain_transformers(ranks, tmp_path, strategy, sizes):
    OwnModel(OwnConfig(**SIZES, change="freezing")).save_pretrained(tmp_path)
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)

    found = {}
    for own in ranks(2).run(on_rank_trained, tmp_path, strategy, sizes):
        found |= own

    assert found == {name: parameter.requires_grad for name, parameter in plain.named_parameters()}


def test_a_parameter_that_transformers_would_load_as_several_is_refused():
    for change in ("", "sharing", "sharing norms"):
        refuse_apart(on_meta(change))
    with pytest.raises(CheckpointError, match=r"k_proj.weight and model.layers.0.self_attn.v_proj.weight one param"):
        refuse_apart(on_meta("sharing weights"))
