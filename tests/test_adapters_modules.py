"""Modules that PEFT trains whole beside adapters (``modules_to_save``) are trained in place as PEFT trains a copy."""

from functools import partial
from zlib import crc32

import peft
import pytest
import torch
import torch.distributed as dist
import transformers
from cases import cases, slow

from nemo_dist import (
    DDPConfig,
    DistributedSetup,
    FSDP2Config,
    ParallelismSizes,
    PipelineConfig,
    initialize_distributed,
)
from nemo_dist.errors import CheckpointError, RankError
from nemo_dist.hf_model import compute_experts_one_by_one
from nemo_dist.testing.equivalence import MAX_NORM, OPTIMIZER, Outcome, checkpoint, differences, merged
from nemo_dist.testing.precision import FP32
from nemo_dist.testing.tensors import rows_of_rank, whole
from nemo_dist.testing.tiny_models import SPECIMENS

TARGETS = ["q_proj", "o_proj"]
LORA = partial(peft.LoraConfig, r=4, lora_alpha=8, target_modules=TARGETS)
KINDS = {
    "head": partial(LORA, modules_to_save=["lm_head"], task_type="CAUSAL_LM"),
    "embedding": partial(LORA, modules_to_save=["embed_tokens"], task_type="CAUSAL_LM"),
    # Of a block: a whole module with modules in it, and one that is a target, too, which PEFT leaves to the copy.
    "of blocks": partial(LORA, modules_to_save=["mlp", "q_proj", "input_layernorm"]),
    "dora": partial(LORA, modules_to_save=["lm_head"], use_dora=True),
    "ia3": partial(
        peft.IA3Config, target_modules=["k_proj", "o_proj"], feedforward_modules=["o_proj"], modules_to_save=["lm_head"]
    ),
    "router": partial(LORA, modules_to_save=["mlp.gate", "lm_head"]),
    "experts": partial(LORA, modules_to_save=["experts"]),
    "rows": partial(LORA, trainable_token_indices=[1, 3, 7, 20], task_type="CAUSAL_LM"),
    "rows alone": partial(peft.TrainableTokensConfig, token_indices=[5, 2, 40], target_modules=["embed_tokens"]),
    "sequences": partial(LORA, task_type="SEQ_CLS"),
    "tokens": partial(LORA, task_type="TOKEN_CLS"),
    "of bert": partial(peft.LoraConfig, r=4, target_modules=["query", "dense"], task_type="SEQ_CLS"),
    "biases": partial(peft.LoraConfig, r=4, target_modules=["query"], task_type="SEQ_CLS", bias="all"),
}


def setup_of(sizes):
    initialize_distributed("gloo")
    sizes = dict(sizes or {})
    strategy = FSDP2Config(mp_policy=FP32, enable_compile=sizes.pop("compile", False))
    if sizes.pop("ddp", False):
        strategy = DDPConfig()
    stages = PipelineConfig(pp_schedule=sizes.pop("schedule", "1F1B")) if "pp_size" in sizes else None
    return DistributedSetup.build(
        strategy=strategy, parallelism_sizes=ParallelismSizes(**sizes), pipeline_config=stages
    )


def adapted(model, kind, add=peft.get_peft_model):
    """Return *model* with the adapters of *kind*, drawn as on one process; what begins as zeros hides mistakes."""
    torch.manual_seed(1)
    model = add(model, KINDS[kind]())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(part in name for part in ("lora_", "ia3_", "tokens_delta")):
                generator = torch.Generator().manual_seed(crc32(name.encode()))
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    return model


def built(specimen, folder, kind, sizes=None):
    setup = setup_of(sizes)
    model = SPECIMENS[specimen].load.from_pretrained(folder, distributed_setup=setup, dtype=torch.float32)
    return setup.runtime(adapted(model, kind, setup.add_adapters))


def batch(specimen, step):
    return SPECIMENS[specimen].batch(8, 12, torch.Generator().manual_seed(step))


def steps(specimen, model, optimizer, forward_backward, clip, numbers):
    losses, norms, gradients = [], [], {}
    for step in numbers:
        losses.append(float(forward_backward(batch(specimen, step))))
        if step == 0:
            gradients = {n: whole(p.grad) for n, p in model.named_parameters() if p.grad is not None}
        norms.append(float(clip(MAX_NORM)))
        optimizer.step()
        optimizer.zero_grad()
    trained = {n: whole(p) for n, p in model.named_parameters() if p.requires_grad}
    return Outcome(losses=losses, norms=norms, gradients=gradients, parameters=trained)


def on_rank_train(specimen, folder, kind, sizes, out=None, resumed=None, numbers=(0, 1, 2)):
    runtime = built(specimen, folder, kind, sizes)
    optimizer = runtime.optimizer(torch.optim.AdamW, **OPTIMIZER)
    if resumed is not None:
        runtime.load(resumed, optimizer)
    found = steps(
        specimen,
        runtime.model,
        optimizer,
        lambda whole_batch: runtime.forward_backward(rows_of_rank(whole_batch, runtime)),
        runtime.clip_grad_norm_,
        numbers,
    )
    if out is not None:
        runtime.save(out / "run", optimizer)
        if "rows" not in kind:
            runtime.export(out / "merged")
        runtime.model.save_pretrained(out / "adapters", is_main_process=dist.get_rank() == 0)
    return found


def plain(specimen, folder):
    auto = getattr(transformers, SPECIMENS[specimen].loader.removeprefix("NeMo"))
    return auto.from_pretrained(folder, dtype=torch.float32)


def one_process(specimen, folder, kind, dtype=torch.float32):
    base = plain(specimen, folder)
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

    return model, steps(specimen, model, optimizer, forward_backward, clip, (0, 1, 2))


AXES = [
    (2, "llama", "head", {}),
    (2, "llama", "of blocks", {"tp_size": 2}),
    (2, "llama-sequences", "sequences", {"pp_size": 2}),
    (2, "bert-sequences", "of bert", {"ddp": True}),
    slow(2, "llama", "of blocks", {}),
    slow(2, "llama", "of blocks", {"compile": True}),
    slow(2, "llama", "embedding", {}),
    slow(2, "llama", "embedding", {"tp_size": 2}),
    slow(2, "llama", "head", {"cp_size": 2}),
    slow(2, "llama", "head", {"ddp": True}),
    slow(2, "llama", "head", {"tp_size": 2}),
    slow(2, "llama", "ia3", {"tp_size": 2}),
    slow(2, "llama", "dora", {}),
    slow(2, "llama-deep", "of blocks", {"pp_size": 2, "schedule": "Interleaved1F1B"}),
    slow(2, "llama-deep", "head", {"pp_size": 2, "schedule": "ZBVZeroBubble"}),
    slow(2, "llama-deep", "embedding", {"pp_size": 2}),
    slow(2, "llama-sequences", "sequences", {}),
    slow(2, "llama-sequences", "sequences", {"tp_size": 2}),
    slow(2, "llama-tokens", "tokens", {"tp_size": 2}),
    slow(2, "llama-tokens", "tokens", {"pp_size": 2}),
    slow(2, "bert-sequences", "of bert", {}),
    slow(2, "bert-sequences", "biases", {}),
    slow(2, "qwen3-moe", "router", {"ep_size": 2}),
    slow(2, "qwen3-moe", "experts", {"ep_size": 2}),
    slow(2, "qwen3-moe", "experts", {"tp_size": 2}),
    slow(4, "llama", "of blocks", {"dp_replicate_size": 2}),
    slow(4, "llama", "head", {"tp_size": 2}),
    slow(4, "llama-deep", "head", {"tp_size": 2, "pp_size": 2}),
    slow(4, "llama-sequences", "sequences", {"pp_size": 2}),
]


@cases(("count", "specimen", "kind", "sizes"), AXES)
def test_modules_to_save_train_as_the_copies_of_peft_on_one_process(on_ranks, count, specimen, kind, sizes):
    folder = checkpoint(specimen)
    found = merged(on_ranks(count, on_rank_train, specimen, folder, kind, sizes))

    exact = one_process(specimen, folder, kind, torch.float64)[1]  # says which differences are those of rounding
    expected = one_process(specimen, folder, kind)[1]
    assert any(".modules_to_save.default." in name for name in expected.gradients)
    assert differences(found, expected, other=exact) == []


@cases(
    ("specimen", "kind", "sizes", "then"),
    [
        ("llama", "head", {"tp_size": 2}, {}),
        slow("llama", "of blocks", {}, {"tp_size": 2}),
        slow("llama", "embedding", {}, {"tp_size": 2}),
        slow("llama", "head", {"pp_size": 2}, {"ddp": True}),
        slow("llama-deep", "head", {"ddp": True}, {"pp_size": 2}),
        slow("llama-sequences", "sequences", {}, {"pp_size": 2}),
        slow("llama-sequences", "sequences", {"pp_size": 2}, {"tp_size": 2}),
        slow("bert-sequences", "of bert", {}, {"ddp": True}),
        slow("bert-sequences", "biases", {"ddp": True}, {}),
    ],
)
def test_modules_to_save_go_on_under_another_topology_and_peft_loads_them(
    on_ranks, tmp_path, specimen, kind, sizes, then
):
    folder = checkpoint(specimen)
    on_ranks(2, on_rank_train, specimen, folder, kind, sizes, tmp_path, None, (0, 1))
    found = merged(on_ranks(2, on_rank_train, specimen, folder, kind, then, tmp_path / "end", tmp_path / "run", (2,)))
    model, expected = one_process(specimen, folder, kind)

    assert found.losses == pytest.approx(expected.losses[2:], rel=1e-5)
    assert found.norms == pytest.approx(expected.norms[2:], rel=1e-5)
    given = batch(specimen, 9)
    wanted = model.eval()(**given).logits
    saved = tmp_path / "end" / "adapters"
    model.save_pretrained(tmp_path / "peft")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (saved / name).exists()
    ours, theirs = (peft.PeftConfig.from_pretrained(path).to_dict() for path in (saved, tmp_path / "peft"))
    assert ours == theirs
    loaded = peft.PeftModel.from_pretrained(plain(specimen, folder), saved).eval()
    torch.testing.assert_close(loaded(**given).logits, wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(loaded.state_dict(), model.state_dict(), rtol=1e-4, atol=1e-5)
    exported = plain(specimen, tmp_path / "end" / "merged").eval()
    torch.testing.assert_close(exported(**given).logits, wanted, rtol=1e-4, atol=1e-5)


ROWS = [
    (2, "llama", "rows", {}),
    slow(2, "llama", "rows", {"cp_size": 2}),
    slow(2, "llama", "rows", {"ddp": True}),
    slow(2, "llama", "rows alone", {}),
    slow(2, "llama-tied", "rows", {}),  # those of the head, too
    slow(2, "llama-tied", "rows", {"ddp": True}),
    slow(2, "gemma3", "rows", {}),  # scales its embedding, and is tied
    slow(2, "qwen3-moe", "rows", {"ep_size": 2}),
    slow(4, "llama", "rows", {"dp_replicate_size": 2}),
]


@cases(("count", "specimen", "kind", "sizes"), ROWS)
def test_trainable_tokens_train_as_on_one_process(on_ranks, count, specimen, kind, sizes):
    folder = checkpoint(specimen)
    found = merged(on_ranks(count, on_rank_train, specimen, folder, kind, sizes))

    exact = one_process(specimen, folder, kind, torch.float64)[1]  # says which differences are those of rounding
    expected = one_process(specimen, folder, kind)[1]
    assert any("trainable_tokens_delta" in name for name in expected.gradients)
    assert differences(found, expected, other=exact) == []


@cases(("specimen", "sizes", "then"), [("llama-tied", {}, {"ddp": True}), slow("llama", {"ddp": True}, {"cp_size": 2})])
def test_trainable_tokens_go_on_under_another_topology_and_peft_loads_them(on_ranks, tmp_path, specimen, sizes, then):
    folder = checkpoint(specimen)
    on_ranks(2, on_rank_train, specimen, folder, "rows", sizes, tmp_path, None, (0, 1))
    found = merged(on_ranks(2, on_rank_train, specimen, folder, "rows", then, tmp_path / "end", tmp_path / "run", (2,)))
    model, expected = one_process(specimen, folder, "rows")

    assert found.losses == pytest.approx(expected.losses[2:], rel=1e-5)
    loaded = peft.PeftModel.from_pretrained(plain(specimen, folder), tmp_path / "end" / "adapters")
    given = batch(specimen, 9)
    torch.testing.assert_close(loaded(**given).logits, model(**given).logits, rtol=1e-4, atol=1e-5)


REFUSED = {
    "missing": ({"modules_to_save": ["lm_haed"]}, "llama", {}, "has 'lm_haed', which is the end of no module's name"),
    "tied": ({"modules_to_save": ["lm_head"]}, "llama-tied", {}, "names lm_head, whose weight another module uses too"),
    "nested": (
        {"modules_to_save": ["mlp", "up_proj"]},
        "llama",
        {},
        "layers.0.mlp and, within it, model.layers.0.mlp.up",
    ),
    "no head": ({"task_type": "SEQ_CLS"}, "llama", {}, "classifier or score), which has none of that name"),
    "missing in stages": ({"modules_to_save": ["x"]}, "llama-deep", {"pp_size": 2}, "has 'x', which is the end of no"),
    "rows in tp": ({"trainable_token_indices": [1]}, "llama", {"tp_size": 2}, "not proven with tp (got tp_size=2)"),
    "rows in pp": (
        {"trainable_token_indices": [1]},
        "llama-deep",
        {"pp_size": 2},
        "not proven with pp (got pp_size=2)",
    ),
}


def on_rank_refuse(folders, refused):
    said = {}
    for name, (given, specimen, sizes, _) in refused.items():
        setup = setup_of(sizes)
        model = SPECIMENS[specimen].load.from_pretrained(folders[specimen], distributed_setup=setup)
        before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
        with pytest.raises(ValueError) as caught:
            setup.add_adapters(model, LORA(**given))
        assert before == {name: parameter.requires_grad for name, parameter in model.named_parameters()}
        said[name] = str(caught.value)
    return said


@cases(("sizes",), [({},), slow({"tp_size": 2}), slow({"pp_size": 2})])
def test_modules_that_cannot_be_trained_in_place_are_refused_before_anything_changes(on_ranks, sizes):
    refused = {name: row for name, row in REFUSED.items() if row[2] == sizes}
    folders = {specimen: checkpoint(specimen) for _, specimen, _, _ in refused.values()}
    for said in on_ranks(2, on_rank_refuse, folders, refused):
        assert [name for name, (*_, words) in refused.items() if words not in said[name]] == [], said


def on_rank_use_without(folder, out):
    setup = setup_of({})
    model = adapted(
        SPECIMENS["llama"].load.from_pretrained(folder, distributed_setup=setup), "head", setup.add_adapters
    )
    with pytest.raises(ValueError) as second:
        model.add_adapter("again", KINDS["head"]())
    model.add_adapter("other", LORA())
    runtime = setup.runtime(model)
    head = model.get_base_model().lm_head
    given = rows_of_rank(batch("llama", 0), runtime)
    with pytest.raises(RuntimeError) as disabled, model.disable_adapter():
        runtime.forward(given)
    model.set_adapter("other")
    frozen = not any(parameter.requires_grad for parameter in head.parameters())
    with pytest.raises(RuntimeError) as inactive:
        runtime.forward_backward(given)
    with pytest.raises((CheckpointError, RankError)) as exported:
        runtime.export(out / "merged")
    model.set_adapter("default")
    runtime.forward_backward(given)
    assert frozen and all(parameter.grad is not None for parameter in head.parameters())
    with pytest.raises(ValueError) as embedding:
        model.save_pretrained(out, save_embedding_layers=True)
    return [str(caught.value) for caught in (second, disabled, inactive, exported, embedding)]


def test_a_model_without_the_adapter_that_trained_a_module_in_place_is_refused(on_ranks, tmp_path):
    for second, disabled, inactive, exported, embedding in on_ranks(
        2, on_rank_use_without, checkpoint("llama"), tmp_path
    ):
        assert "adapter 'again' has modules_to_save that adapter 'default' trains already" in second
        assert "a module of modules_to_save" in disabled and "as it was before is gone" in disabled
        assert "as it was before is gone" in inactive
        assert "lm_head was trained in place by an adapter that is not active" in exported
        assert "which runtime.export writes" in embedding
