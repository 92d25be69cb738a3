"""What makes rows depend on each other, in classes of the user's own above all, is refused before the first step."""

import pytest
import torch
import transformers
from cases import case_id, cases
from own_models import SIZES, OwnConfig, OwnModel, on_meta
from torch.nn.functional import cross_entropy
from transformers.modeling_outputs import CausalLMOutputWithPast

from nemo_dist import DDPConfig, DistributedSetup, FSDP2Config, NeMoAutoModelForCausalLM, ParallelismSizes
from nemo_dist.errors import TopologyError
from nemo_dist.hf_model import has_own_code
from nemo_dist.testing.equivalence import TOLERANCE, tensor_differences, whole_state
from nemo_dist.testing.precision import FP32
from nemo_dist.testing.shrink import tiny
from nemo_dist.testing.tensors import rows_of_rank
from nemo_dist.training.loss_weighting import judge_loss
from nemo_dist.training.rehearsal import depends_on_padding, depends_on_rows, read_from_outside
from nemo_dist.training.step_loss import ModelLoss
from nemo_dist_pipeline.partition.model_structure import ModelStructure
from nemo_dist_pipeline.partition.proof import require_exact
from nemo_dist_pipeline.partition.stage_model import stages_of
from nemo_dist_tensor.apply import Parallelizer
from nemo_dist_tensor.probe import SimulatedPeers
from nemo_dist_tensor.random_choices import random_problems
from nemo_dist_tensor.structure import completed
from nemo_dist_tensor.tp_plan import match


@pytest.mark.parametrize(
    ("change", "where"),
    [
        ("", None),
        ("counting", None),
        ("twice", None),
        ("running", "buffer model.layers.0.mlp.mean"),
        ("mixing", "model.layers.0.mlp.gate_proj, Linear"),
        ("skipping", "model.layers.1, Skipping"),
    ],
)
def test_what_joins_the_rows_of_a_batch_is_found(change, where):
    model = on_meta(change)

    assert has_own_code(model)
    assert depends_on_rows(model) == where


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
    loss = ModelLoss(model)
    tokens = torch.ones(3, 5, dtype=torch.long)
    batch = {"input_ids": tokens, "labels": tokens}

    assert loss.count(batch) == loss.count(batch | {"shift": torch.zeros(3, 5, 32)}) == 12
    with pytest.raises(ValueError, match=r"makes with label_weights of the batch is not the mean.*give a loss"):
        loss.count(batch | {"label_weights": torch.ones(3, 5)})


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
    model = on_meta("following")
    structure = ModelStructure.of(model)

    with pytest.raises(ValueError, match=r"on stage 1: .* no attribute 'made'\), so its blocks leave each other"):
        require_exact(model, structure, stages_of(structure, structure.divide(model, 2)))


def test_modules_that_are_read_from_outside_are_found():
    assert "model.layers.0" not in read_from_outside(on_meta("twice"))
    assert {"model.layers.0", "model.layers.3", "model.layers.0.self_attn"} <= read_from_outside(on_meta("reaching"))


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
