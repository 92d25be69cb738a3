"""PEFT's adapters on a sharded model train like on one process."""

import shutil
from contextlib import nullcontext
from unittest.mock import patch

import peft
import pytest
import torch
import torch.distributed as dist
import transformers
from failing import Fail

from nemo_dist import (
    CheckpointError,
    DDPConfig,
    DistributedSetup,
    FSDP2Config,
    MegatronFSDPConfig,
    NeMoAutoModelForCausalLM,
    ParallelismSizes,
    export_checkpoint,
)
from nemo_dist.models import auto_model
from nemo_dist.testing.equivalence import checkpoint
from nemo_dist.testing.fake_cuda import WithCudaCalls
from nemo_dist.testing.io_counter import BytesRead
from nemo_dist.testing.precision import FP32
from nemo_dist.training.gradient_average import GradientAverage

LORA = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM")


def batches(step):
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(1, 90, (4, 12), generator=generator)
    labels = tokens.masked_fill(torch.rand(tokens.shape, generator=generator) < 0.3, -100)
    return tokens, labels


def trainable(model):
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def adapted(folder, strategy, sizes=None, config=LORA):
    setup = DistributedSetup.build(strategy=strategy, parallelism_sizes=sizes)
    torch.manual_seed(dist.get_rank())  # adapters are drawn differently, until the runtime makes them equal
    model = peft.get_peft_model(NeMoAutoModelForCausalLM.from_pretrained(folder, distributed_setup=setup), config)
    return setup.runtime(model)


def on_rank_train(folder, strategy, out):
    runtime = adapted(folder, strategy)
    own = trainable(runtime.model)
    start = {name: parameter.detach().clone() for name, parameter in own.items()}
    optimizer = runtime.optimizer(torch.optim.AdamW, lr=1e-2)
    seen = []
    for step in range(3):
        tokens, labels = batches(step)
        mine = [slice(row, row + 1) for row in (2 * runtime.dp_rank, 2 * runtime.dp_rank + 1)]
        loss = runtime.forward_backward([{"input_ids": tokens[rows], "labels": labels[rows]} for rows in mine])
        grads = {name: parameter.grad.clone() for name, parameter in own.items()}
        seen.append((loss, grads, runtime.clip_grad_norm_(0.01)))
        optimizer.step()
        optimizer.zero_grad()
    if dist.get_rank() == 0:
        runtime.model.save_pretrained(out)
    return start, seen, {name: parameter.detach() for name, parameter in own.items()}


STRATEGIES = {
    "fsdp2": FSDP2Config(mp_policy=FP32),
    "fsdp2-full": FSDP2Config(mp_policy=FP32, activation_checkpointing="full"),
    "fsdp2-selective": FSDP2Config(mp_policy=FP32, activation_checkpointing="selective"),
    "fsdp2-compiled": FSDP2Config(mp_policy=FP32, enable_compile=True),
    "fsdp2-offload": FSDP2Config(mp_policy=FP32, offload_policy="cpu"),
    "ddp": DDPConfig(),
    "ddp-views": DDPConfig(gradient_as_bucket_view=True),
    "ddp-full": DDPConfig(activation_checkpointing="full"),
}


@pytest.mark.parametrize(
    "strategy",
    [
        pytest.param(config, id=name, marks=[pytest.mark.slow] * ("compiled" in name))
        for name, config in STRATEGIES.items()
    ],
)
def test_adapters_train_like_on_one_process(ranks, strategy, tmp_path):
    folder = checkpoint("llama")
    first, *others = ranks(2).run(on_rank_train, folder, strategy, tmp_path)
    start, seen, end = first
    for other in others:
        torch.testing.assert_close(other, first, rtol=0, atol=0)

    model = peft.get_peft_model(transformers.AutoModelForCausalLM.from_pretrained(folder), LORA)
    own = trainable(model)
    assert own.keys() == start.keys()
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(start[name])
    optimizer = torch.optim.AdamW(own.values(), lr=1e-2)
    for step, (loss, grads, norm) in enumerate(seen):
        tokens, labels = batches(step)
        expected = model(input_ids=tokens, labels=labels).loss
        expected.backward()
        torch.testing.assert_close(loss, expected.detach())
        torch.testing.assert_close(grads, {name: parameter.grad for name, parameter in own.items()})
        torch.testing.assert_close(norm, torch.nn.utils.clip_grad_norm_(own.values(), 0.01))
        optimizer.step()
        optimizer.zero_grad()
    torch.testing.assert_close(end, {name: parameter.detach() for name, parameter in own.items()})

    saved = peft.PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained(folder), tmp_path)
    torch.testing.assert_close(saved(input_ids=tokens).logits, model(input_ids=tokens).logits)


def on_rank_refusal(folder, sizes, config, strategy=None):
    with pytest.raises(ValueError) as caught:
        adapted(folder, strategy or FSDP2Config(), sizes, config)
    return str(caught.value)


def test_adapters_of_the_shape_of_a_shard_are_refused_beside_tensor_parallelism(ranks):
    for message in ranks(2).run(on_rank_refusal, checkpoint("llama"), ParallelismSizes(tp_size=2), LORA):
        assert "trainable parameters were added after loading" in message
        assert "with tp (got 2) PEFT takes the shape of a shard for that of a weight" in message
        assert "setup.add_adapters(model, config)" in message


def test_adapters_are_refused_by_a_strategy_not_proven_with_them(ranks):
    strategy = MegatronFSDPConfig()
    for message in WithCudaCalls(ranks(2)).run(on_rank_refusal, checkpoint("llama"), None, LORA, strategy):
        assert "not proven with 'megatron_fsdp', use 'ddp' or 'fsdp2'" in message


def test_adapters_that_lengthen_the_sequence_are_refused(ranks):
    config = peft.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
    for message in ranks(2).run(on_rank_refusal, checkpoint("llama"), None, config):
        assert "PromptTuningConfig adds tokens of its own to every sequence" in message


OTHER = peft.LoraConfig(r=2, target_modules=["k_proj", "o_proj"], task_type="CAUSAL_LM")


def with_two(model):
    model = peft.get_peft_model(model, LORA)
    model.add_adapter("second", OTHER)
    return model


def of_lora(model):
    return {name: parameter for name, parameter in model.named_parameters() if "lora_" in name}


def switch(model, step):
    """Train the first adapter, the second, and the first again; then leave one trainable that no loss reaches."""
    model.set_adapter("second" if step % 2 else "default")
    for name, parameter in of_lora(model).items():
        if step == 3 and ".default." in name:
            parameter.requires_grad_(True)


def on_rank_switch(folder, strategy):
    setup = DistributedSetup.build(strategy=strategy)
    torch.manual_seed(dist.get_rank())
    model = with_two(NeMoAutoModelForCausalLM.from_pretrained(folder, distributed_setup=setup))
    runtime = setup.runtime(model)
    own = of_lora(model)
    start = {name: parameter.detach().clone() for name, parameter in own.items()}
    optimizer = runtime.optimizer(torch.optim.AdamW, own.values(), lr=1e-2)
    for step in range(4):
        switch(model, step)
        tokens, labels = batches(step)
        rows = slice(2 * runtime.dp_rank, 2 * runtime.dp_rank + 2)
        runtime.forward_backward({"input_ids": tokens[rows], "labels": labels[rows]})
        optimizer.step()
        optimizer.zero_grad()
    return start, {name: parameter.detach() for name, parameter in own.items()}


@pytest.mark.parametrize("strategy", [FSDP2Config(mp_policy=FP32), DDPConfig()], ids=["fsdp2", "ddp"])
def test_adapters_that_are_thawed_and_frozen_between_steps_train_like_on_one_process(ranks, strategy):
    folder = checkpoint("llama")
    (start, end), *others = ranks(2).run(on_rank_switch, folder, strategy)
    for other in others:
        torch.testing.assert_close(other, (start, end), rtol=0, atol=0)

    model = with_two(transformers.AutoModelForCausalLM.from_pretrained(folder))
    own = of_lora(model)
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(start[name])
    optimizer = torch.optim.AdamW(own.values(), lr=1e-2)
    for step in range(4):
        switch(model, step)
        tokens, labels = batches(step)
        model(input_ids=tokens, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    torch.testing.assert_close(end, {name: parameter.detach() for name, parameter in own.items()})


def on_rank_make_two(folder):
    """Return how many gradients of adapters were averaged in a backward without synchronisation, and in one with it."""
    model = adapted(folder, FSDP2Config(mp_policy=FP32)).model
    runtime = model.get_base_model().distributed_setup.runtime(model)
    tokens, labels = batches(0)
    counts = []
    with patch.object(GradientAverage, "run", autospec=True, side_effect=GradientAverage.run) as averaged:
        for context in (runtime.no_sync(), nullcontext()):
            with context:
                model(input_ids=tokens, labels=labels).loss.backward()
            counts.append(averaged.call_count)
    return counts


def test_the_last_runtime_says_whether_a_backward_averages_gradients_of_adapters(ranks):
    assert ranks(2).run(on_rank_make_two, checkpoint("llama")) == [[0, 1], [0, 1]]


def on_rank_fail_once(folder, strategy):
    """Return the gradients of adapters after a backward that failed, and without one."""
    runtime = adapted(folder, strategy)
    model, found = runtime.model, []
    tokens, labels = batches(0)
    mine = slice(runtime.dp_rank, None, runtime.dp_size)
    for fails in (True, False):
        if fails:
            hook = (
                model.get_base_model()
                .model.layers[1]
                .register_forward_pre_hook(lambda _, args: (Fail.apply(args[0]), *args[1:]))
            )
            with pytest.raises(ValueError, match="a backward that fails"):
                model(input_ids=tokens[mine], labels=labels[mine]).loss.backward()
            hook.remove()
        model.zero_grad()
        model(input_ids=tokens[mine], labels=labels[mine]).loss.backward()
        found.append({name: one.grad.clone() for name, one in trainable(model).items()})
    return found


@pytest.mark.parametrize("name", ["fsdp2", "ddp", "ddp-views"])
def test_adapters_train_on_after_a_backward_that_failed(ranks, name):
    first, *others = ranks(2).run(on_rank_fail_once, checkpoint("llama"), STRATEGIES[name])
    for after, without in (first, *others):
        torch.testing.assert_close(after, without)
        torch.testing.assert_close(after, first[0], rtol=0, atol=0)


def on_rank_add_late(folder):
    runtime = adapted(folder, FSDP2Config())
    runtime.model.add_adapter("second", OTHER)
    runtime.model.set_adapter("second")
    with pytest.raises(ValueError) as caught:
        runtime.optimizer(torch.optim.AdamW)
    return str(caught.value)


def test_adapters_that_are_added_after_the_runtime_are_refused_by_its_optimizer(ranks):
    for message in ranks(2).run(on_rank_add_late, checkpoint("llama")):
        assert ".second." in message
        assert "call setup.runtime(model) after" in message


def on_rank_save(folder, path):
    adapted(folder, FSDP2Config()).save(path)


def test_a_checkpoint_with_adapters_is_not_exported_without_the_model(ranks, tmp_path):
    ranks(2).run(on_rank_save, checkpoint("llama"), tmp_path / "saved")
    with pytest.raises(CheckpointError, match=r"has not the weights of a plain LlamaForCausalLM .*runtime\.export"):
        export_checkpoint(tmp_path / "saved", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def on_rank_export_tied(folder, out):
    messages = []
    for target in ("embed_tokens", "lm_head"):
        config = peft.LoraConfig(r=4, target_modules=["q_proj", target], task_type="CAUSAL_LM")
        with pytest.raises(CheckpointError) as caught:
            adapted(folder, FSDP2Config(), config=config).export(out)
        messages.append(str(caught.value))
    return messages


def test_adapters_of_a_tied_weight_are_not_merged_into_it(ranks, tmp_path):
    for of_embedding, of_head in ranks(2).run(on_rank_export_tied, checkpoint("llama-tied"), tmp_path / "out"):
        assert "model.embed_tokens is an adapter of a weight that other modules use too (it is tied)" in of_embedding
        assert "lm_head is an adapter of a weight that other modules use too (it is tied)" in of_head
    assert not (tmp_path / "out").exists()


def on_rank_load(sources):
    """Return what is said of each source, and the bytes of weights that were read."""
    setup, said = DistributedSetup.build(strategy="fsdp2"), []
    for folder, place in sources:
        with BytesRead() as reading, pytest.raises(CheckpointError) as caught:
            NeMoAutoModelForCausalLM.from_pretrained(folder, distributed_setup=setup, **place)
        said.append((str(caught.value), reading.bytes))
    return said


def test_a_folder_of_adapters_is_refused_before_the_model_is_read(ranks, tmp_path):
    base = transformers.AutoModelForCausalLM.from_pretrained(checkpoint("llama"))
    peft.get_peft_model(base, LORA).save_pretrained(tmp_path / "adapters")
    shutil.copytree(tmp_path / "adapters", tmp_path / "whole")
    shutil.copytree(checkpoint("llama"), tmp_path / "whole", dirs_exist_ok=True)
    inner = {"subfolder": "adapters"}
    shutil.copytree(checkpoint("llama"), tmp_path, dirs_exist_ok=True)
    sources = [
        (tmp_path / "adapters", {}),
        (tmp_path / "whole", {}),
        (tmp_path, inner),
        (tmp_path, {"adapter_kwargs": inner}),
    ]
    for said in ranks(2).run(on_rank_load, sources):
        for message, read in said:
            assert "has adapters of PEFT" in message and "merge_and_unload" in message
            assert not read


def on_rank_load_unchecked(sources):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(auto_model, "_refuse_files", lambda *given: None)
        return on_rank_load(sources)


def test_adapters_that_only_transformers_finds_are_refused_where_it_would_read_them(ranks, tmp_path):
    base = transformers.AutoModelForCausalLM.from_pretrained(checkpoint("llama"))
    peft.get_peft_model(base, LORA).save_pretrained(tmp_path / "adapters")
    for ((message, _),) in ranks(2).run(on_rank_load_unchecked, [(tmp_path / "adapters", {})]):
        assert "would load more than one model" in message and "load it from a folder without adapters" in message
