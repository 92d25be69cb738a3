"""PEFT's adapters under each axis: they train as on one process, go on under another topology, and are exported."""

from types import SimpleNamespace
from zlib import crc32

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
    PipelineConfig,
    initialize_distributed,
)
from nemo_dist.errors import RankError
from nemo_dist.hf_model import compute_experts_one_by_one
from nemo_dist.planning.mesh_plan import Role
from nemo_dist.testing.equivalence import MAX_NORM, OPTIMIZER, Outcome, checkpoint, differences, merged
from nemo_dist.testing.precision import FP32
from nemo_dist.testing.tensors import rows_of_rank, whole
from nemo_dist.testing.tiny_models import SPECIMENS
from nemo_dist.training.peft_adapters import refuse_copies, refuse_own_forward

EVERY = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
OF_ATTENTION = ["q_proj", "k_proj", "o_proj"]
KINDS = {
    "lora": peft.LoraConfig(r=4, lora_alpha=8, target_modules=OF_ATTENTION, task_type="CAUSAL_LM"),
    "rslora": peft.LoraConfig(r=4, use_rslora=True, target_modules=["v_proj"], task_type="CAUSAL_LM"),
    "embedding": peft.LoraConfig(r=4, target_modules=["embed_tokens", "v_proj"], task_type="CAUSAL_LM"),
    "every-lora": peft.LoraConfig(r=4, target_modules=[*EVERY, "embed_tokens", "lm_head"], task_type="CAUSAL_LM"),
    "columns": peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "gate_proj"], task_type="CAUSAL_LM"),
    "every-ia3": peft.IA3Config(target_modules=EVERY, feedforward_modules=["down_proj", "up_proj"]),
    "lora and head": peft.LoraConfig(r=4, target_modules=OF_ATTENTION),  # which PEFT does not know of
    "dora": peft.LoraConfig(r=4, use_dora=True, target_modules=OF_ATTENTION, task_type="CAUSAL_LM"),
    "every-dora": peft.LoraConfig(r=4, use_dora=True, target_modules=EVERY, task_type="CAUSAL_LM"),
    "dora-columns": peft.LoraConfig(r=4, use_dora=True, target_modules=["q_proj", "gate_proj"], task_type="CAUSAL_LM"),
    "dora-packed": peft.LoraConfig(
        r=4, use_dora=True, target_modules=["qkv_proj", "o_proj", "gate_up_proj", "down_proj"], task_type="CAUSAL_LM"
    ),
    "dora of embedding": peft.LoraConfig(r=4, use_dora=True, target_modules=["embed_tokens"], task_type="CAUSAL_LM"),
    "dora-drawn": peft.LoraConfig(
        r=4, use_dora=True, init_lora_weights=False, target_modules=OF_ATTENTION, task_type="CAUSAL_LM"
    ),
    "ia3": peft.IA3Config(target_modules=["k_proj", "o_proj"], feedforward_modules=["o_proj"], task_type="CAUSAL_LM"),
}


def built(folder, kind, sizes=None):
    """Return the runtime of a model with adapters; those are drawn as on one process, from one seed."""
    initialize_distributed("gloo")
    sizes = dict(sizes or {})
    strategy = FSDP2Config(mp_policy=FP32, sequence_parallel=sizes.pop("sequence_parallel", False))
    stages = PipelineConfig(pp_schedule=sizes.pop("schedule", "1F1B")) if "pp_size" in sizes else None
    setup = DistributedSetup.build(
        strategy=strategy, parallelism_sizes=ParallelismSizes(**sizes), pipeline_config=stages
    )
    model = NeMoAutoModelForCausalLM.from_pretrained(folder, distributed_setup=setup, dtype=torch.float32)
    whole_weights = "dora" in kind or {"dp_replicate_size", "tp_size", "pp_size"} & sizes.keys()
    return setup.runtime(adapted(model, kind, setup.add_adapters if whole_weights else peft.get_peft_model))


def adapted(model, kind, add=peft.get_peft_model):
    torch.manual_seed(1)
    model = add(model, KINDS[kind])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:  # what begins as zeros or ones hides mistakes
                generator = torch.Generator().manual_seed(crc32(name.encode()))
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    for name, parameter in model.named_parameters():
        if kind == "lora and head" and "lm_head" in name:
            parameter.requires_grad_(True)
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
        # Those of stages are gathered; else every rank has them.
        runtime.model.save_pretrained(
            out / "adapters", is_main_process=dist.get_rank() == 0, save_embedding_layers=False
        )
    return found


def one_process(folder, kind, dtype=torch.float32):
    base = plain(folder)
    if dtype is torch.float64:
        compute_experts_one_by_one(base)  # the faster ways need float32
    model = adapted(base, kind).to(dtype)
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
    (2, "llama", "every-dora", {"tp_size": 2}),
    slow(2, "llama", "dora-drawn", {"tp_size": 2}),
    slow(2, "llama", "dora-columns", {"tp_size": 2, "sequence_parallel": True}),
    slow(2, "llama-odd", "every-dora", {"tp_size": 2}),  # every rank has its key projections whole
    slow(2, "phi3", "dora-packed", {"tp_size": 2}),  # outputs are gathered, inputs are split
    slow(2, "qwen2-moe", "dora", {"tp_size": 2}),  # has biases
    slow(4, "llama", "every-dora", {"tp_size": 2}),
    slow(4, "llama", "dora", {"tp_size": 2, "dp_replicate_size": 2}),
    slow(4, "llama-deep", "dora", {"tp_size": 2, "pp_size": 2}),
    (4, "llama", "every-lora", {"tp_size": 2}),
    (4, "llama", "lora", {"tp_size": 2, "cp_size": 2}),
    (4, "llama", "lora", {"tp_size": 4}),
    (4, "llama", "lora", {"tp_size": 2, "dp_replicate_size": 2}),
    (4, "qwen3-moe", "lora", {"tp_size": 2, "ep_size": 2}),
    (2, "llama-odd", "lora", {"tp_size": 2}),  # no two ranks hold equally many of its key heads
    (2, "llama-odd", "every-ia3", {"tp_size": 2}),
    (2, "llama", "lora and head", {}),
    (2, "llama", "lora and head", {"tp_size": 2}),
    (2, "llama-deep", "lora and head", {"pp_size": 2}),
    (2, "llama-deep", "every-lora", {"pp_size": 2}),
    (2, "llama-deep", "every-ia3", {"pp_size": 2, "schedule": "Interleaved1F1B"}),
    (2, "llama-deep-tied", "lora", {"pp_size": 2, "schedule": "ZBVZeroBubble"}),
    (2, "qwen3-moe-deep", "lora", {"pp_size": 2}),
    (4, "llama-deep", "every-lora", {"pp_size": 2}),
    (4, "llama-deep", "lora", {"pp_size": 2, "schedule": "InterleavedZeroBubble"}),
    (4, "llama-deep", "dora", {"pp_size": 2}),
    (4, "llama-deep", "every-lora", {"pp_size": 2, "tp_size": 2}),
    (4, "llama-deep", "lora", {"pp_size": 2, "cp_size": 2}),
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
        slow("every-lora", {"pp_size": 2}, {}),
        slow("every-lora", {"tp_size": 2}, {"pp_size": 2}),
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
    "target_parameters": {"target_parameters": ["experts.gate_up_proj"]},
    "init_lora_weights='pissa'": {"init_lora_weights": "pissa"},
}


@pytest.mark.parametrize("what", sorted(COPIES))
def test_adapters_that_copy_or_change_weights_are_refused(what):
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], **COPIES[what])
    with pytest.raises(ValueError, match=f"LoraConfig asks for {what}, which copies or changes weights of the model"):
        refuse_copies(config)


def test_adapters_that_change_the_forward_of_the_model_are_refused_where_ranks_hold_parts():
    adalora = peft.AdaLoraConfig(init_r=4, target_r=2, total_step=10, target_modules=["q_proj"])
    for axis, role in (("cp", Role.SEQUENCE), ("pp", Role.LAYERS), ("tp", Role.PARAMETERS)):
        mesh = SimpleNamespace(wide=lambda axis=axis: {axis: 2}, roles={axis: role}, size=lambda _: 2)
        refuse_own_forward(KINDS["lora"], mesh)
        with pytest.raises(ValueError, match=f"AdaLoraConfig changes the forward .*{axis}_size=2.*use LoraConfig"):
            refuse_own_forward(adalora, mesh)
    mesh = SimpleNamespace(wide=lambda: {"dp_shard": 2}, roles={"dp_shard": Role.BATCH})
    refuse_own_forward(adalora, mesh)


def on_rank_dora_of_embedding(folder):
    with pytest.raises(ValueError, match=r"DoRA of \S+embed_tokens reads the whole embedding.*leave it out of target"):
        built(folder, "dora of embedding")


def test_dora_of_a_sharded_embedding_is_refused(on_ranks):
    on_ranks(2, on_rank_dora_of_embedding, checkpoint("llama"))


UNPROVEN = {
    "dora of the embedding": (
        {"use_dora": True, "target_modules": ["embed_tokens"]},
        "is of a kind (DoraEmbeddingVariant)",
        False,
    ),
    "dora of the head": ({"use_dora": True, "target_modules": ["lm_head"]}, "gives logits that stay cut", False),
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
        with pytest.raises(
            ValueError, match=r"adapters beside tensor-parallel layers|where ranks hold parts"
        ) as caught:
            setup.runtime(setup.add_adapters(model, peft.LoraConfig(r=2, task_type="CAUSAL_LM", **given)))
        found[name] = str(caught.value)
    return found


def test_adapters_that_are_not_proven_with_tp_are_refused_before_a_step(on_ranks):
    for found in on_ranks(2, on_rank_refuse, checkpoint("llama"), UNPROVEN):
        assert all(words in found[name] for name, (_, words, _) in UNPROVEN.items()), found


def staged(folder):
    initialize_distributed("gloo")
    setup = DistributedSetup.build(parallelism_sizes=ParallelismSizes(pp_size=2))
    return setup, NeMoAutoModelForCausalLM.from_pretrained(folder, distributed_setup=setup)


def on_rank_refuse_stages(tied, untied):
    said = []
    for folder, target in ((tied, "lm_head"), (untied, "embed_tokens")):
        setup, model = staged(folder)
        with pytest.raises((ValueError, RankError)) as caught:
            setup.add_adapters(model, peft.LoraConfig(r=2, target_modules=[target]))
        said.append(str(caught.value))
    setup, model = staged(tied)
    model.parts[0] = peft.get_peft_model(model.parts[0], KINDS["lora"])
    with pytest.raises(ValueError) as caught:
        setup.runtime(model)
    said.append(str(caught.value))
    return said


def test_adapters_that_stages_cannot_hold_are_refused(on_ranks):
    folders = checkpoint("llama-deep-tied"), checkpoint("llama-deep")
    for found in on_ranks(2, on_rank_refuse_stages, *folders):
        assert "target those of blocks, beside others" in found[0] + found[1]
        assert "Target modules {'embed_tokens'} not found" in found[1]
        assert "with pp (got 2) PEFT finds modules of other stages, too" in found[2]
        assert "setup.add_adapters(model, config)" in found[2]


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
