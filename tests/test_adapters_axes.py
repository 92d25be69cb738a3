"""PEFT's adapters under each axis: they train as on one process, go on under another topology, and are exported."""

import peft
import pytest
import torch
import torch.distributed as dist
import transformers
from cases import cases, slow

from nemo_dist import (
    DistributedSetup,
    FSDP2Config,
    NeMoAutoModelForCausalLM,
    ParallelismSizes,
    initialize_distributed,
)
from nemo_dist.testing.equivalence import MAX_NORM, OPTIMIZER, Outcome, checkpoint, differences, merged
from nemo_dist.testing.precision import FP32
from nemo_dist.testing.tensors import rows_of_rank, whole
from nemo_dist.testing.tiny_models import SPECIMENS
from nemo_dist.training.peft_adapters import refuse_copies

EVERY = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
OF_ATTENTION = ["q_proj", "k_proj", "o_proj"]
KINDS = {
    "lora": peft.LoraConfig(r=4, lora_alpha=8, target_modules=OF_ATTENTION, task_type="CAUSAL_LM"),
    "rslora": peft.LoraConfig(r=4, use_rslora=True, target_modules=["v_proj"], task_type="CAUSAL_LM"),
    "embedding": peft.LoraConfig(r=4, target_modules=["embed_tokens", "v_proj"], task_type="CAUSAL_LM"),
    "every-lora": peft.LoraConfig(r=4, target_modules=[*EVERY, "embed_tokens", "lm_head"], task_type="CAUSAL_LM"),
    "columns": peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "gate_proj"], task_type="CAUSAL_LM"),
    "every-ia3": peft.IA3Config(target_modules=EVERY, feedforward_modules=["down_proj", "up_proj"]),
    "dora": peft.LoraConfig(r=4, use_dora=True, target_modules=OF_ATTENTION, task_type="CAUSAL_LM"),
    "ia3": peft.IA3Config(target_modules=["k_proj", "o_proj"], feedforward_modules=["o_proj"], task_type="CAUSAL_LM"),
}


def built(folder, kind, sizes=None):
    """Return the runtime of a model with adapters; those are drawn as on one process, from one seed."""
    initialize_distributed("gloo")
    sizes = dict(sizes or {})
    strategy = FSDP2Config(mp_policy=FP32, sequence_parallel=sizes.pop("sequence_parallel", False))
    setup = DistributedSetup.build(strategy=strategy, parallelism_sizes=ParallelismSizes(**sizes))
    model = NeMoAutoModelForCausalLM.from_pretrained(folder, distributed_setup=setup, dtype=torch.float32)
    whole_weights = kind == "dora" or {"dp_replicate_size", "tp_size"} & sizes.keys()
    return setup.runtime(adapted(model, kind, setup.add_adapters if whole_weights else peft.get_peft_model))


def adapted(model, kind, add=peft.get_peft_model):
    torch.manual_seed(1)
    model = add(model, KINDS[kind])
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:  # what begins as zeros or ones hides mistakes
                parameter.add_(torch.randn(parameter.shape), alpha=0.1)
    return model


def batch(step):
    return SPECIMENS["llama"].batch(8, 12, torch.Generator().manual_seed(step))


def steps(model, optimizer, forward_backward, clip, numbers):
    losses, norms, gradients = [], [], {}
    for step in numbers:
        losses.append(float(forward_backward(batch(step))))
        if step == 0:
            gradients = {n: whole(p.grad) for n, p in model.named_parameters() if p.grad is not None}
        norms.append(float(clip(MAX_NORM)))
        optimizer.step()
        optimizer.zero_grad()
    trained = {n: whole(p) for n, p in model.named_parameters() if p.requires_grad}
    return Outcome(losses=losses, norms=norms, gradients=gradients, parameters=trained)


def on_rank_train(folder, kind, sizes, out=None, resumed=None, numbers=(0, 1, 2)):
    runtime = built(folder, kind, sizes)
    optimizer = runtime.optimizer(torch.optim.AdamW, **OPTIMIZER)
    if resumed is not None:
        runtime.load(resumed, optimizer)
    found = steps(
        runtime.model,
        optimizer,
        lambda whole_batch: runtime.forward_backward(rows_of_rank(whole_batch, runtime)),
        runtime.clip_grad_norm_,
        numbers,
    )
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        runtime.save(out / "run", optimizer)
        runtime.export(out / "merged")
        if dist.get_rank() == 0:
            runtime.model.save_pretrained(out / "adapters", save_embedding_layers=False)
    return found


def one_process(folder, kind, dtype=torch.float32):
    model = adapted(plain(folder), kind).to(dtype)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], **OPTIMIZER)

    def forward_backward(whole_batch):
        loss = model(**whole_batch).loss
        loss.backward()
        return loss.detach()

    def clip(most):
        return torch.nn.utils.clip_grad_norm_(model.parameters(), most)

    return model, steps(model, optimizer, forward_backward, clip, (0, 1, 2))


def plain(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


AXES = [
    (2, "llama", "lora", {}),
    (2, "llama", "lora", {"cp_size": 2}),
    (2, "llama", "ia3", {}),
    (2, "llama", "dora", {}),
    (2, "llama", "dora", {"cp_size": 2}),
    (2, "llama", "rslora", {"cp_size": 2}),
    (2, "llama", "embedding", {}),
    (4, "qwen3-moe", "ia3", {"ep_size": 2, "cp_size": 2}),
    (2, "qwen3-moe", "lora", {"ep_size": 2}),
    (4, "llama", "lora", {"dp_replicate_size": 2}),
    (2, "llama", "every-lora", {"tp_size": 2}),
    (2, "llama", "every-ia3", {"tp_size": 2}),
    (2, "llama", "columns", {"tp_size": 2, "sequence_parallel": True}),
    (4, "llama", "every-lora", {"tp_size": 2}),
    (4, "llama", "lora", {"tp_size": 2, "cp_size": 2}),
    (4, "llama", "lora", {"tp_size": 4}),
    (4, "llama", "lora", {"tp_size": 2, "dp_replicate_size": 2}),
    (4, "qwen3-moe", "lora", {"tp_size": 2, "ep_size": 2}),
    (2, "llama-odd", "lora", {"tp_size": 2}),  # no two ranks hold equally many of its key heads
    (2, "llama-odd", "every-ia3", {"tp_size": 2}),
]


@cases(("count", "specimen", "kind", "sizes"), AXES)
def test_adapters_train_as_on_one_process_under_each_axis(on_ranks, count, specimen, kind, sizes):
    folder = checkpoint(specimen)
    found = merged(on_ranks(count, on_rank_train, folder, kind, sizes))

    exact = one_process(folder, kind, torch.float64)[1]  # says which differences are those of rounding
    assert differences(found, one_process(folder, kind)[1], other=exact) == []


@cases(
    ("kind", "sizes", "then"),
    [
        ("lora", {}, {"cp_size": 2}),
        slow("embedding", {"cp_size": 2}, {}),
        slow("lora", {"tp_size": 2}, {}),
        slow("every-lora", {}, {"tp_size": 2}),
    ],
)
def test_adapters_go_on_under_another_topology_and_are_exported(on_ranks, tmp_path, kind, sizes, then):
    folder = checkpoint("llama")
    on_ranks(2, on_rank_train, folder, kind, sizes, tmp_path, None, (0, 1))
    found = merged(on_ranks(2, on_rank_train, folder, kind, then, tmp_path / "end", tmp_path / "run", (2,)))
    model, expected = one_process(folder, kind)

    assert found.losses == pytest.approx(expected.losses[2:], rel=1e-5)
    assert found.norms == pytest.approx(expected.norms[2:], rel=1e-5)
    tokens = batch(9)["input_ids"]
    wanted = model(input_ids=tokens).logits
    loaded = peft.PeftModel.from_pretrained(plain(folder), tmp_path / "end" / "adapters")
    torch.testing.assert_close(loaded(input_ids=tokens).logits, wanted, rtol=1e-4, atol=1e-5)
    exported = plain(tmp_path / "end" / "merged")
    torch.testing.assert_close(exported(input_ids=tokens).logits, wanted, rtol=1e-4, atol=1e-5)
    once = model.merge_and_unload().state_dict()
    torch.testing.assert_close(exported.state_dict(), once, rtol=1e-4, atol=1e-5)


COPIES = {
    "modules_to_save": {"modules_to_save": ["lm_head"]},
    "trainable_token_indices": {"trainable_token_indices": [1, 2]},
    "init_lora_weights='pissa'": {"init_lora_weights": "pissa"},
}


@pytest.mark.parametrize("what", sorted(COPIES))
def test_adapters_that_copy_or_change_weights_are_refused(what):
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", **COPIES[what])
    with pytest.raises(ValueError, match=f"LoraConfig asks for {what}, which copies or changes weights of the model"):
        refuse_copies(config)


UNPROVEN = {
    "dora": ({"use_dora": True, "target_modules": ["q_proj"]}, "is of a kind (DoraLinearVariant)", False),
    "bias": ({"lora_bias": True, "target_modules": ["q_proj"]}, "has lora_bias", False),
    "dropout": ({"lora_dropout": 0.1, "target_modules": ["q_proj"]}, "has lora_dropout", False),
    "exit": ({"target_modules": ["o_proj"]}, "ends a region of sequence parallelism", True),
}


def on_rank_refuse(folder, unproven):
    initialize_distributed("gloo")
    found = {}
    for name, (given, _, sequence) in unproven.items():
        strategy = FSDP2Config(mp_policy=FP32, sequence_parallel=sequence)
        setup = DistributedSetup.build(strategy=strategy, parallelism_sizes=ParallelismSizes(tp_size=2))
        model = NeMoAutoModelForCausalLM.from_pretrained(folder, distributed_setup=setup)
        with pytest.raises(ValueError, match="adapters beside tensor-parallel layers") as caught:
            setup.runtime(setup.add_adapters(model, peft.LoraConfig(r=2, task_type="CAUSAL_LM", **given)))
        found[name] = str(caught.value)
    return found


def test_adapters_that_are_not_proven_with_tp_are_refused_before_a_step(on_ranks):
    for found in on_ranks(2, on_rank_refuse, checkpoint("llama"), UNPROVEN):
        assert all(words in found[name] for name, (_, words, _) in UNPROVEN.items()), found


def on_rank_add(folder, sizes):
    initialize_distributed("gloo")
    setup = DistributedSetup.build(parallelism_sizes=ParallelismSizes(**sizes))
    model = NeMoAutoModelForCausalLM.from_pretrained(folder, distributed_setup=setup)
    with pytest.raises(ValueError, match="not proven with") as caught:
        setup.add_adapters(model, KINDS["lora"])
    return str(caught.value)


@cases(("sizes",), [({"pp_size": 2},)])
def test_adapters_are_refused_where_ranks_have_no_whole_layers(on_ranks, sizes):
    (size,) = sizes
    for message in on_ranks(2, on_rank_add, checkpoint("llama"), sizes):
        assert f"not proven with {size[:2]} (got {size}=2), leave it at 1" in message


def on_rank_export_twice(folder, out):
    runtime = built(folder, "lora")
    before = {name: whole(parameter) for name, parameter in runtime.named_parameters()}
    runtime.export(out)
    after = {name: whole(parameter) for name, parameter in runtime.named_parameters()}
    return before, after


def test_an_export_leaves_the_model_as_it_was(on_ranks, tmp_path):
    for before, after in on_ranks(2, on_rank_export_twice, checkpoint("llama"), tmp_path):
        assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def on_rank_refused_export(folder, out):
    runtime = built(folder, "ia3")
    with pytest.raises(Exception, match="cannot be exported") as caught:
        runtime.export(out)
    return str(caught.value), out.exists()


def test_adapters_that_are_no_sum_are_not_exported(on_ranks, tmp_path):
    for message, exists in on_ranks(2, on_rank_refused_export, checkpoint("llama"), tmp_path / "out"):
        assert "peft.tuners.ia3" in message and "merge_and_unload()" in message and not exists
