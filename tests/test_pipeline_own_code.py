"""What own forwards and losses read under a pipeline is what they read in one process, or they are refused."""

from types import SimpleNamespace

import pytest
import torch
import transformers
from cases import cases, slow
from own_models import SIZES, OwnConfig, OwnModel, on_meta
from torch.nn.functional import cross_entropy
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.llama.modeling_llama import LlamaForCausalLM

from nemo_dist import (
    AutoPipeline,
    DistributedSetup,
    FSDP2Config,
    NeMoAutoModelForCausalLM,
    ParallelismSizes,
    PipelineConfig,
)
from nemo_dist.testing.equivalence import TOLERANCE, tensor_differences
from nemo_dist.testing.precision import FP32
from nemo_dist.testing.shrink import tiny
from nemo_dist.testing.tensors import whole
from nemo_dist.training.whole_rows import first_rows
from nemo_dist_pipeline.partition.layer_outputs import of_last_stage
from nemo_dist_pipeline.partition.model_structure import ModelStructure
from nemo_dist_pipeline.partition.proof import require_exact
from nemo_dist_pipeline.partition.skeleton import block_list
from nemo_dist_pipeline.partition.stage_model import stages_of
from nemo_dist_pipeline.partition.tower_inputs import note_tower_inputs, without_media


class ReadingConfig(OwnConfig):
    """``reads``: what the forward does with what a last stage does not have by itself."""

    model_type = "own_reading"
    reads = ""


class Reading(LlamaForCausalLM):
    """Tokens without a label see each other, ``shift`` is added before the head, and the loss may have a term more."""

    config_class = ReadingConfig

    def forward(self, input_ids=None, labels=None, attention_mask=None, shift=None, **kwargs):
        if labels is not None and self.config.reads == "labels":
            prefix = labels == -100
            causal = torch.ones(labels.shape[1], labels.shape[1], dtype=torch.bool, device=labels.device).tril()
            attention_mask = (causal | (prefix[:, None] & prefix[:, :, None]))[:, None]
        kwargs["output_hidden_states"] = self.config.reads in ("a block", "a block in training")
        found = self.model(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
        logits = self.lm_head(found.last_hidden_state if shift is None else found.last_hidden_state + shift)
        if self.config.reads == "the embedding in training" and self.training:
            logits = logits + self.model.embed_tokens.weight[0].sum()
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, self.config.vocab_size) + self._more(found)
        return CausalLMOutputWithPast(loss=loss, logits=logits, hidden_states=found.hidden_states)

    def _more(self, found):
        if self.config.reads == "weights":
            return 1e-3 * sum(parameter.pow(2).sum() for parameter in self.parameters())
        if self.config.reads == "a block" or (self.config.reads == "a block in training" and self.training):
            return found.hidden_states[1].pow(2).mean()
        return 0.0


transformers.AutoConfig.register("own_reading", ReadingConfig)
transformers.AutoModelForCausalLM.register(ReadingConfig, Reading)


def config_of(reads):
    return ReadingConfig(**SIZES, reads=reads)


def batch_of(rows=4, length=12):
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(3, 90, (rows, length), generator=generator)
    labels = tokens.clone()
    labels[:, :4], labels[1, 6:] = -100, -100
    return {"input_ids": tokens, "labels": labels, "shift": torch.randn(rows, length, 32, generator=generator)}


def pipeline_of(source, schedule="1f1b", loss=None):
    setup = DistributedSetup.build(
        FSDP2Config(mp_policy=FP32), ParallelismSizes(pp_size=2), PipelineConfig(pp_schedule=schedule)
    )
    options = {"distributed_setup": setup, "dtype": torch.float32}
    torch.manual_seed(0)
    if isinstance(source, transformers.PreTrainedConfig):
        model = NeMoAutoModelForCausalLM.from_config(source, **options)
    else:
        model = NeMoAutoModelForCausalLM.from_pretrained(source, **options)
    return model, setup.runtime(model, loss=loss)


def gradients(runtime):
    return {name: whole(parameter.grad) for name, parameter in runtime.named_parameters()}


def in_one_process(model, batch, loss=None):
    """Return the loss of *batch* and all gradients of *model*."""
    if loss is None:
        found = model(**batch).loss
    else:
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        losses, weights = loss(model(**inputs), batch)
        found = (losses * weights).sum() / weights.sum()
    found.backward()
    return found.item(), {name: parameter.grad for name, parameter in model.named_parameters()}


def compare(answers, expected):
    loss, of_model = expected
    assert [found[0] for found in answers] == pytest.approx([loss] * len(answers), rel=TOLERANCE)
    joined = {name: gradient for _, found, *_ in answers for name, gradient in found.items()}
    assert tensor_differences("gradients", joined, of_model, TOLERANCE) == []


def on_rank_step(source, schedule, batch):
    _, runtime = pipeline_of(source, schedule)
    loss = runtime.forward_backward(batch).item()
    return loss, gradients(runtime), runtime.evaluate([batch]).item()


@cases("schedule", [("1f1b",), slow("interleaved_1f1b"), slow("zbv")])
def test_a_forward_that_reads_labels_and_inputs_of_its_own_matches_one_process(ranks, schedule):
    torch.manual_seed(0)
    expected = in_one_process(Reading(config_of("labels")), batch_of())

    answers = ranks(2).run(on_rank_step, config_of("labels"), schedule, batch_of())

    compare(answers, expected)
    assert [evaluated for *_, evaluated in answers] == pytest.approx([expected[0]] * 2, rel=TOLERANCE)


# ---- what the last stage does not have ----


@pytest.mark.parametrize("reads", ["", "labels", "weights", "a block", "a block in training"])
def test_an_own_loss_that_needs_other_stages_is_found(reads):
    with torch.device("meta"):
        model = Reading(config_of(reads))
    structure = ModelStructure.of(model)

    found = require_exact(model, structure, stages_of(structure, structure.divide(model, 2)))

    if reads in ("", "labels"):
        assert found == ""
    else:
        assert found.startswith("Reading computes another loss where its blocks are on several stages (")
        assert "on stage 1); give a loss of your own, setup.runtime(model, loss=...)" in found


def test_a_forward_that_needs_other_stages_in_training_only_is_refused():
    with torch.device("meta"):
        model = Reading(config_of("the embedding in training"))
    structure = ModelStructure.of(model)

    with pytest.raises(ValueError, match=r"uses weights of other stages again after its blocks; it does not run as"):
        require_exact(model, structure, stages_of(structure, structure.divide(model, 2)))


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ("sharing", "model.layers.0.mlp.gate_proj.weight, model.layers.2.mlp.gate_proj.weight"),
        ("sharing norms", "model.layers.0.input_layernorm.weight, model.layers.1.input_layernorm.weight, .*"),
    ],
)
def test_modules_that_blocks_share_are_refused(change, names):
    with pytest.raises(ValueError, match=f"OwnModel uses one parameter as {names}, and stages would have one each; it"):
        ModelStructure.of(on_meta(change))


def of_last_layer(outputs, batch):
    labels = batch["labels"][:, 1:]
    losses = cross_entropy(outputs.logits[:, :-1].mT, labels, reduction="none")
    return losses + 0.1 * outputs.hidden_states[-1][:, :-1].pow(2).mean(-1), (labels != -100).float()


def on_rank_own_loss(batch):
    model, runtime = pipeline_of(config_of("a block"), loss=of_last_layer)
    with pytest.raises(ValueError, match="computes another loss") as caught:
        model.step(batch)
    loss = runtime.forward_backward(batch | {"output_hidden_states": True}).item()
    with pytest.raises(ValueError, match="computes another loss"):
        model.parts[0].distributed_setup.runtime(model)
    return loss, gradients(runtime), str(caught.value)


def test_such_a_model_trains_with_a_loss_of_ones_own(ranks):
    torch.manual_seed(0)
    expected = in_one_process(Reading(config_of("a block")), batch_of(), of_last_layer)
    compare(ranks(2).run(on_rank_own_loss, batch_of()), expected)


@pytest.mark.parametrize(("total", "count"), [(0.6, 0.3), (-4.0, -2.0), (0.0, 0.0), (6.0, 3.0)])
def test_an_evaluation_divides_by_what_counts_as_a_runtime_does(total, count):
    loss = SimpleNamespace(model_inputs=dict, reads=dict)
    counted = torch.tensor([total, count], dtype=torch.float64)
    pipeline = SimpleNamespace(_loss_of_config=loss, measure=lambda batches, loss: counted)

    assert AutoPipeline._mean(pipeline, {}).item() == pytest.approx(2.0 if count else 0.0)


def test_outputs_of_other_layers_are_refused_where_they_are_read():
    layers = (torch.zeros(3), torch.arange(3.0))
    given = CausalLMOutputWithPast(logits=torch.ones(3), hidden_states=layers, attentions=layers)

    outputs = of_last_stage(given)

    assert outputs.hidden_states[-1] is outputs["hidden_states"][-1] is layers[-1]
    assert first_rows(outputs, {}, rows=3, real=2)[0].hidden_states[-1].tolist() == [0.0, 1.0]
    for read in (lambda one: one[0], lambda one: one[-2:], len, list, lambda one: one.shape):
        with pytest.raises(ValueError, match=r"outputs\.attentions has values of all layers.*attentions\[-1\], or"):
            read(outputs.attentions)


class OwnLlava(transformers.LlavaForConditionalGeneration):
    """Its forward may do what it likes with any input."""


def test_only_inputs_that_towers_of_transformers_take_stay_on_the_first_stage():
    llava, inputs = tiny("llava").config, {"pixel_values": torch.ones(1), "shift": torch.ones(1), "input_ids": None}
    with torch.device("meta"):
        models = transformers.LlavaForConditionalGeneration(llava), OwnLlava(llava), Reading(config_of(""))
    given = []
    for model in models:
        note_tower_inputs(model, next(iter(block_list(model))))
        given.append(set(without_media(model, inputs)))

    assert given == [{"shift", "input_ids"}, inputs.keys(), inputs.keys()]


# ---- calls ----


def on_rank_call(batch):
    model, runtime = pipeline_of(config_of(""))
    given = {"position_ids": torch.arange(3, 15)[None], "input_ids": batch["input_ids"]}
    logits = runtime.forward(given).logits
    model.parts[0].eval()
    runtime.forward_backward(batch)
    with pytest.raises(ValueError, match=r"runtime\.clip_grad_norm_\(max_norm\), which clips by that of the whole"):
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    assert len(list(model.parameters())) == len(list(runtime.named_parameters()))
    return logits, runtime.clip_grad_norm_(1e9).item()


def test_one_row_of_positions_may_come_first_and_torch_does_not_clip_by_stage(ranks):
    torch.manual_seed(0)
    model = Reading(config_of(""))
    logits = model(input_ids=batch_of()["input_ids"], position_ids=torch.arange(3, 15)[None]).logits
    in_one_process(model, batch_of())
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1e9).item()

    for found, clipped in ranks(2).run(on_rank_call, batch_of()):
        torch.testing.assert_close(found, logits, rtol=TOLERANCE, atol=TOLERANCE)
        assert clipped == pytest.approx(norm, rel=TOLERANCE)


# ---- weights that modules compute ----


def on_rank_computed(folder, schedule, batch):
    _, runtime = pipeline_of(folder, schedule)
    return runtime.forward_backward(batch).item(), gradients(runtime)


@cases("schedule", [("1f1b",), slow("interleaved_1f1b")])
@pytest.mark.filterwarnings("ignore:.*weight_norm")
def test_weights_that_old_weight_norm_and_pruning_compute_match_one_process(ranks, tmp_path, schedule):
    torch.manual_seed(0)
    model = OwnModel(OwnConfig(**SIZES, change="computed"))
    for layer in model.model.layers:
        layer.mlp.up_proj.weight_mask[::2, 1::3] = 0
    model.save_pretrained(tmp_path)
    batch = {name: value for name, value in batch_of().items() if name != "shift"}

    compare(ranks(2).run(on_rank_computed, tmp_path, schedule, batch), in_one_process(model, batch))
