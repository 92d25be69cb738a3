"""Parameters that are not trained stay as they are, and all others get what one process gives them."""

import checkpoint_runs as runs
import pytest
import torch
from cases import cases, slow
from transformers.models.llama import modeling_llama

from nemo_dist import (
    DistributedSetup,
    FSDP2Config,
    MegatronFSDPConfig,
    NeMoAutoModelForCausalLM,
    ParallelismSizes,
)
from nemo_dist.testing.equivalence import Task, assert_equivalent, checkpoint, reference
from nemo_dist.testing.fake_cuda import WithCudaCalls
from nemo_dist.testing.precision import FP32
from nemo_dist.testing.tiny_models import SPECIMENS

FSDP2 = FSDP2Config(mp_policy=FP32)
# The beginning of the model, a whole block in its middle, the end of it, and matrices within the blocks.
FROZEN = {
    "beginning": ("model.embed_tokens", "model.layers.0."),
    "middle": ("model.layers.1.",),
    "end": ("lm_head", "model.norm"),
    "within": tuple(f"model.layers.{layer}.{name}" for layer in range(9) for name in ("self_attn", "post")),
}
SETUPS = {
    "fsdp2": (2, "llama", {"strategy": FSDP2}),
    "ddp": (2, "llama", {"strategy": "ddp"}),
    "hsdp": (4, "llama", {"strategy": FSDP2, "parallelism_sizes": ParallelismSizes(dp_replicate_size=2)}),
    "tp": (4, "llama", {"strategy": FSDP2, "parallelism_sizes": ParallelismSizes(tp_size=2)}),
    "cp": (2, "llama", {"strategy": FSDP2, "parallelism_sizes": ParallelismSizes(cp_size=2)}),
    "recompute": (2, "llama", {"strategy": FSDP2, "activation_checkpointing": "full"}),
    "ep": (4, "qwen3-moe", {"strategy": FSDP2, "parallelism_sizes": ParallelismSizes(ep_size=2)}),
    **{
        schedule + tied: (
            2,
            "llama-deep" + tied,
            {
                "strategy": FSDP2,
                "parallelism_sizes": ParallelismSizes(pp_size=2),
                "pipeline_config": {"pp_schedule": schedule},
            },
        )
        for tied in ("", "-tied")
        for schedule in ("1f1b", "interleaved_1f1b", "zero_bubble", "zbv")
    },
    "tied": (2, "llama-tied", {"strategy": FSDP2}),
    "pp-cp-tp": (
        8,
        "llama-deep-tied",
        {"strategy": FSDP2, "parallelism_sizes": ParallelismSizes(pp_size=2, cp_size=2, tp_size=2)},
    ),
    **{f"megatron-{zero}": (2, "llama", {"strategy": MegatronFSDPConfig(zero_dp_strategy=zero)}) for zero in (1, 2, 3)},
}

PARTLY = Task(specimen="llama-deep", frozen=FROZEN["within"], steps=4)
SAMPLE = list(zip(SETUPS, list(FROZEN) * len(SETUPS), strict=False))  # every setup once; the rest is for the matrix
CELLS = [(name, frozen) if (name, frozen) in SAMPLE else slow(name, frozen) for name in SETUPS for frozen in FROZEN]


@cases(("name", "frozen"), CELLS, lambda name, frozen: f"{name}, {frozen} frozen")
def test_frozen_parameters_stay_and_the_others_train(ranks, name, frozen):
    world, specimen, options = SETUPS[name]
    pool = WithCudaCalls(ranks(world)) if name.startswith("megatron") else ranks(world)
    # With steps of 1e-2 the norms of deep models on one process are themselves 3e-5 away from float64.
    assert_equivalent(pool, Task(specimen=specimen, frozen=FROZEN[frozen], lr=3e-3), **options)


def on_rank_freeze_embedding(folder):
    """Freeze the embedding of the first stage only; say whether it has no gradient on this rank after a step."""
    setup = DistributedSetup.build(parallelism_sizes=ParallelismSizes(pp_size=2))
    model = NeMoAutoModelForCausalLM.from_pretrained(folder, distributed_setup=setup, dtype=torch.float32)
    if model.info.has_first_stage:
        model.parts[0].get_input_embeddings().requires_grad_(False)
    setup.runtime(model).forward_backward(PARTLY.batches(0)[0])
    return {name: parameter.grad is None for name, parameter in model.named_parameters() if "embed" in name}


def test_a_tied_weight_that_one_stage_froze_is_frozen_on_the_other(ranks):
    for answer in ranks(2).run(on_rank_freeze_embedding, checkpoint("llama-deep-tied")):
        assert answer == {"model.embed_tokens.weight": True}


def on_rank_thaw():
    """Train, on one of the ranks, what the model itself froze as it was made; return the answer."""
    made = modeling_llama.LlamaRMSNorm.__init__

    def frozen(self, *args, **options):
        made(self, *args, **options)
        self.weight.requires_grad_(False)

    modeling_llama.LlamaRMSNorm.__init__ = frozen
    try:
        setup = DistributedSetup.build(strategy="megatron_fsdp")
        config = SPECIMENS["llama"].config()
        model = NeMoAutoModelForCausalLM.from_config(config, distributed_setup=setup, dtype=torch.float32)
    finally:
        modeling_llama.LlamaRMSNorm.__init__ = made
    runtime = setup.runtime(model)
    runtime.forward_backward(Task().batches(0)[0])
    model.model.norm.weight.requires_grad_(True)
    try:
        runtime.forward_backward(Task().batches(0)[0])
    except RuntimeError as error:
        return str(error)
    return "trained"


def test_unfreezing_under_megatron_fsdp_is_refused(ranks):
    for answer in WithCudaCalls(ranks(2)).run(on_rank_thaw):
        assert "model.norm.weight: frozen when megatron_fsdp took the model over" in answer


def on_rank_two_steps(name, folder, path, resume):
    """Train the first two steps on one of the ranks and save, or load those and train the next two; return losses."""
    setup = DistributedSetup.build(**SETUPS[name][2])
    model = NeMoAutoModelForCausalLM.from_pretrained(folder, distributed_setup=setup, dtype=torch.float32)
    PARTLY.freeze(model)
    runtime = setup.runtime(model)
    optimizer = runtime.optimizer(torch.optim.AdamW, **PARTLY.optimizer)
    first = runtime.load(path, optimizer)["step"] if resume else 0
    losses = runs.steps(runtime, optimizer, PARTLY, (first, first + 1))
    if not resume:
        runtime.save(path, optimizer, extra={"step": 2})
    return losses


@pytest.mark.parametrize(
    ("saved", "loaded"),
    [("fsdp2", "ddp"), ("ddp", "zbv"), ("zbv", "megatron-3"), ("megatron-3", "tp"), ("tp", "fsdp2")],
)
def test_a_partly_frozen_run_resumes_under_another_strategy(ranks, tmp_path, saved, loaded):
    found = []
    for name in (saved, loaded):
        world = SETUPS[name][0]
        pool = WithCudaCalls(ranks(world)) if name.startswith("megatron") else ranks(world)
        found += pool.run(on_rank_two_steps, name, checkpoint(PARTLY.specimen), tmp_path / "saved", name == loaded)[0]
    assert found == pytest.approx(reference(PARTLY).losses, rel=1e-5)
