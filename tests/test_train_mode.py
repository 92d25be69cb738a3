"""What modules do in training only, and ranks cannot do apart, is refused before a forward; the ways out are exact."""

from types import SimpleNamespace

import pytest
import torch
import transformers
from torch import nn

from nemo_dist import (
    DDPConfig,
    DistributedSetup,
    FSDP2Config,
    NeMoAutoModelForCausalLM,
    NeMoAutoModelForImageClassification,
    ParallelismSizes,
)
from nemo_dist.testing.equivalence import TOLERANCE, tensor_differences, whole_state
from nemo_dist.testing.precision import FP32
from nemo_dist.testing.shrink import tiny
from nemo_dist.testing.temp_folders import scratch
from nemo_dist.testing.tensors import rows_of_rank
from nemo_dist.training.forward_code import chances
from nemo_dist.training.train_mode import refuse_in_training
from nemo_dist_pipeline.partition.model_structure import ModelStructure
from nemo_dist_pipeline.partition.stage_model import keep_stage, open_stage, run_stage, stages_of


def made(auto, family, **options):
    config = tiny(family).config
    config.update(options)
    torch.manual_seed(0)
    return getattr(transformers, auto).from_config(config)


@pytest.mark.parametrize(
    ("auto", "family", "option", "found"),
    [
        ("AutoModelForCausalLM", "opt", "layerdrop", ["model.decoder.layerdrop"]),
        ("AutoModel", "bart", "decoder_layerdrop", ["decoder.layerdrop"]),
        ("AutoModel", "whisper", "encoder_layerdrop", ["encoder.layerdrop"]),
        ("AutoModel", "wav2vec2", "layerdrop", ["encoder.config.layerdrop"]),
        ("AutoModelForCausalLM", "llama", "attention_dropout", []),
    ],
)
def test_options_by_which_blocks_are_left_out_at_random_are_found(auto, family, option, found):
    with torch.device("meta"):
        model = made(auto, family, **{option: 0.25})

    acting = [chance for chance in chances(model) if chance.acts]

    assert [".".join((chance.name, *chance.path)) for chance in acting] == found
    assert {chance.value for chance in acting} <= {0.25}
    assert not any(chance.acts for chance in chances(model.eval()))


def test_the_options_of_towers_are_named():
    config = tiny("kosmos-2").config
    config.text_config.layerdrop = 0.25
    with torch.device("meta"):
        model = transformers.AutoModelForImageTextToText.from_config(config)
    mesh = SimpleNamespace(size=lambda role: 2)

    with pytest.raises(ValueError, match=r"load it with a config in which text_config\.layerdrop is 0\.0"):
        refuse_in_training([model], mesh, lockstep=True)


TOKENS = torch.arange(48).view(4, 12) * 5 % 90 + 10
PP = ParallelismSizes(pp_size=2)


def on_rank_random_depth(folder):
    """Return the message of a runtime in training, that of a step after ``train()``, and the loss by the way out."""
    setup = DistributedSetup.build(FSDP2Config(mp_policy=FP32))
    model = NeMoAutoModelForCausalLM.from_pretrained(folder, distributed_setup=setup, dtype=torch.float32)
    runtime = setup.runtime(model)  # in evaluation mode, as it is loaded
    batch = rows_of_rank({"input_ids": TOKENS, "labels": TOKENS}, runtime)
    runtime.evaluate([batch])
    model.train()
    messages = []
    for refused in (lambda: setup.runtime(model), lambda: runtime.forward_backward(batch)):
        with pytest.raises(ValueError, match="leaves out blocks at random") as caught:
            refused()
        messages.append(str(caught.value))
    model = NeMoAutoModelForCausalLM.from_pretrained(
        folder, distributed_setup=setup, dtype=torch.float32, layerdrop=0.0
    )
    return messages, setup.runtime(model.train()).forward_backward(batch).item()


def on_rank_random_depth_in_stages(folder):
    setup = DistributedSetup.build(FSDP2Config(mp_policy=FP32), PP)
    model = NeMoAutoModelForCausalLM.from_pretrained(folder, distributed_setup=setup, dtype=torch.float32)
    with pytest.raises(ValueError, match=r"layerdrop=0\.5"):
        setup.runtime(model.train())


def test_blocks_left_out_at_random_are_refused_where_ranks_wait_for_each_other(ranks):
    folder = scratch("layerdrop")
    made("AutoModelForCausalLM", "opt", layerdrop=0.5).save_pretrained(folder)

    (messages, loss), (_, other) = ranks(2).run(on_rank_random_depth, folder)
    ranks(2).run(on_rank_random_depth_in_stages, folder)

    assert len(set(messages)) == 1
    assert "(model.decoder.layerdrop=0.5)" in messages[0]
    assert "load it with a config in which layerdrop is 0.0, or with a strategy that" in messages[0]
    with torch.no_grad():
        plain = transformers.AutoModelForCausalLM.from_pretrained(folder, layerdrop=0.0, dtype=torch.float32)
        expected = plain.train()(TOKENS, labels=TOKENS).loss.item()
    assert loss == other == pytest.approx(expected, rel=TOLERANCE)


def test_a_stage_whose_first_block_did_not_run_is_an_error():
    model = made("AutoModelForCausalLM", "opt", layerdrop=1.0).train()
    structure = ModelStructure.of(model)
    stage = stages_of(structure, structure.divide(model, 2))[1]
    keep_stage(model, stage, structure, torch.device("cpu"))
    open_stage(model)

    with pytest.raises(RuntimeError, match=rf"left out its first block, {stage.own_blocks[0]}"):
        run_stage(model, torch.zeros(4, 12, model.config.hidden_size), {"input_ids": TOKENS})


PICTURES = {
    "pixel_values": torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0)),
    "labels": torch.tensor([0, 1, 1, 0]),
}


def freeze(model):
    for module in model.train().modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()


def on_rank_batch_statistics(folder, strategy):
    setup = DistributedSetup.build(strategy)
    model = NeMoAutoModelForImageClassification.from_pretrained(folder, distributed_setup=setup, dtype=torch.float32)
    runtime = setup.runtime(model)
    batch = rows_of_rank(PICTURES, runtime)
    model.train()
    with pytest.raises(ValueError, match="normalises a row by the rows beside it") as caught:
        runtime.forward_backward(batch)
    freeze(model)
    runtime.forward_backward(batch)
    return str(caught.value), whole_state(runtime, {name: one.grad for name, one in runtime.named_parameters()})


@pytest.mark.parametrize("strategy", [FSDP2Config(mp_policy=FP32), DDPConfig()], ids=["fsdp2", "ddp"])
def test_statistics_of_a_batch_are_refused_and_frozen_ones_are_exact(ranks, strategy):
    folder = scratch("resnet")
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], num_labels=2)
    torch.manual_seed(0)
    model = transformers.ResNetForImageClassification(config)
    model.save_pretrained(folder)
    freeze(model)
    model(**PICTURES).loss.backward()

    (message, found), _ = ranks(2).run(on_rank_batch_statistics, folder, strategy)

    assert "(in resnet.embedder.embedder.normalization, BatchNorm2d)" in message
    assert (
        "freeze its statistics, by .eval() of all such modules after model.train(), or train on one process" in message
    )
    assert not tensor_differences("gradients", found, {n: p.grad for n, p in model.named_parameters()}, TOLERANCE)


def detached(model):
    return {name: one.detach() for name, one in model.named_parameters()}


def on_rank_clipped(folder, strategy):
    """Train one step of a model that clips weights in its forward; return its loss and weights, or the error."""
    setup = DistributedSetup.build(strategy)
    model = NeMoAutoModelForCausalLM.from_pretrained(
        folder, distributed_setup=setup, dtype=torch.float32, altup_coef_clip=0.01
    )
    runtime = setup.runtime(model.train())
    batch = rows_of_rank({"input_ids": TOKENS, "labels": TOKENS}, runtime)
    try:
        loss = runtime.forward_backward(batch).item()
    except RuntimeError as error:
        return str(error), {}
    return loss, whole_state(runtime, dict(runtime.named_parameters()))


def test_a_forward_that_changes_a_weight_keeps_the_change_or_is_an_error(ranks):
    folder = scratch("clipped")
    made("AutoModelForCausalLM", "gemma3n_text").save_pretrained(folder)
    loads = {"dtype": torch.float32, "altup_coef_clip": 0.01}
    plain = transformers.AutoModelForCausalLM.from_pretrained(folder, **loads).train()
    expected = plain(TOKENS, labels=TOKENS).loss.item()

    kept, _ = ranks(2).run(on_rank_clipped, folder, DDPConfig())
    lost = ranks(2).run(on_rank_clipped, folder, FSDP2Config(mp_policy=FP32))

    assert kept[0] == pytest.approx(expected, rel=TOLERANCE)
    assert not tensor_differences("weights", kept[1], detached(plain), TOLERANCE)
    assert all("changes prediction_coefs.weight in its forward, which is lost" in message for message, _ in lost)
