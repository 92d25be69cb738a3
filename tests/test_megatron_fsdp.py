"""Training with Megatron-FSDP, the real package, is training on one process."""

import importlib.metadata
import re
import subprocess
import sys
from collections import Counter
from contextlib import contextmanager, nullcontext
from unittest.mock import patch

import pytest
import torch
from cases import case_id, cases, slow
from failing import Fail
from megatron_fsdp import fully_shard_model, fully_shard_optimizer
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from transformers.models.llama import modeling_llama

from nemo_dist import (
    DistributedSetup,
    MegatronFSDPConfig,
    NeMoAutoModelForCausalLM,
    ParallelismSizes,
    TopologyError,
)
from nemo_dist.mesh.dtensor import local
from nemo_dist.models.meta_model import meta_model
from nemo_dist.plugin.comm_estimate import ModelFacts
from nemo_dist.plugin.memory_estimate import RankShare
from nemo_dist.setup.rank_memory import divide
from nemo_dist.testing.equivalence import Task, assert_equivalent, checkpoint, reference
from nemo_dist.testing.fake_cuda import WithCudaCalls
from nemo_dist.testing.io_counter import BytesRead
from nemo_dist.testing.tensors import rows_of_rank
from nemo_dist.testing.tiny_models import SPECIMENS
from nemo_dist.torch_private import tensors_in
from nemo_dist_megatron_fsdp.engine import Engine
from nemo_dist_megatron_fsdp.sharding import dim_problem

ZERO = [1, 2, 3]
ENDS = [1, slow(2), 3]  # of the levels, where the one between adds little
SAMPLE = [(2, 1, "llava"), (2, 2, "bert-tokens"), (2, 3, "llama-tied"), (4, 3, "bert-sequences")]
REST = [
    (world, zero, specimen)
    for world in (2, 4)
    for zero in ZERO
    for specimen in ("llama", "llama-tied", "qwen3", "bert-sequences", "bert-tokens", "llava")
    if (world, zero, specimen) not in SAMPLE
]


@pytest.fixture
def ranks(ranks):
    """The pools of ranks, with a stand-in for the calls of torch.cuda that the package makes."""
    return lambda world_size: WithCudaCalls(ranks(world_size))


# ---- numbers ----


def name_of(world, zero, specimen):
    return case_id(specimen, world, f"zero {zero}")


def name_with_axes(world, cp, tp, sequence, zero, specimen):
    return case_id(specimen, world, {"cp": cp, "tp": tp}, sequence and "sequence", f"zero {zero}")


def name_with_options(zero, options):
    return case_id(f"zero {zero}", options)


@cases(("world", "zero", "specimen"), [*SAMPLE, *(slow(*one) for one in REST)], name_of)
def test_it_matches_one_process(ranks, world, zero, specimen):
    assert_equivalent(ranks(world), Task(specimen=specimen), strategy=MegatronFSDPConfig(zero_dp_strategy=zero))


@pytest.mark.parametrize("zero", ENDS, ids="zero {}".format)
def test_accumulated_batches_match_one_process(ranks, zero):
    assert_equivalent(ranks(2), Task(accumulate=3), strategy=MegatronFSDPConfig(zero_dp_strategy=zero))


# With an eps of 1e-5 one process in float32 is itself 1e-4 away from float64 after such steps.
LARGE_STEPS = Task(lr=0.1, weight_decay=0.5, eps=1e-2)


@pytest.mark.parametrize("zero", [1, slow(2), slow(3)], ids="zero {}".format)
def test_large_steps_with_weight_decay_match_one_process(ranks, zero):
    assert_equivalent(ranks(2), LARGE_STEPS, strategy=MegatronFSDPConfig(zero_dp_strategy=zero))


NO_OVERLAP = {"overlap_param_gather": False, "overlap_grad_reduce": False}


@cases(
    ("zero", "options"),
    [
        slow(1, {"average_in_collective": True}),
        (3, {"average_in_collective": True}),
        slow(1, {"disable_bucketing": True}),
        slow(2, {"grad_reduce_in_fp32": False, "preserve_fp32_weights": False}),
        slow(1, {"overlap_param_gather": False}),
        slow(1, {"overlap_grad_reduce": False}),
        (1, NO_OVERLAP),
        slow(1, {**NO_OVERLAP, "average_in_collective": True}),
        (2, {"overlap_param_gather": False}),
        slow(2, {"fsdp_double_buffer": True}),
        (3, {"fsdp_double_buffer": True}),
        slow(3, {"megatron_fsdp_unit_modules": ["LlamaMLP", f"{modeling_llama.__name__}.LlamaAttention"]}),
        slow(3, {"report_nan_in_param_grad": True}),
    ],
    name_with_options,
)
def test_an_option_does_not_change_the_numbers(ranks, zero, options):
    assert_equivalent(ranks(2), Task(), strategy=MegatronFSDPConfig(zero_dp_strategy=zero, **options))


@cases(("zero", "options"), [(1, NO_OVERLAP), slow(2, {"overlap_param_gather": False}), slow(1, {})], name_with_options)
def test_accumulated_batches_without_overlap_match_one_process(ranks, zero, options):
    assert_equivalent(ranks(2), Task(accumulate=3), strategy=MegatronFSDPConfig(zero_dp_strategy=zero, **options))


@pytest.mark.slow
@pytest.mark.parametrize("zero", ZERO, ids="zero {}".format)
@cases(
    ("world", "cp", "tp"),
    [(2, 2, 1), (2, 1, 2), (4, 1, 1), (4, 2, 1), (4, 1, 2), (4, 2, 2)],
    lambda world, cp, tp: case_id(world, {"cp": cp, "tp": tp}),
)
def test_large_steps_with_weight_decay_match_one_process_on_every_axis(ranks, world, cp, tp, zero):
    assert_equivalent(
        ranks(world),
        LARGE_STEPS,
        strategy=MegatronFSDPConfig(zero_dp_strategy=zero),
        parallelism_sizes=ParallelismSizes(cp_size=cp, tp_size=tp),
    )


@pytest.mark.parametrize("zero", [slow(1), slow(2), 3], ids="zero {}".format)
def test_recomputation_does_not_change_the_numbers(ranks, zero):
    strategy = MegatronFSDPConfig(zero_dp_strategy=zero)
    assert_equivalent(ranks(2), Task(), strategy=strategy, activation_checkpointing=True)


# World, then cp and tp, sequence parallelism, ZeRO, specimen; what is left of the world is data parallelism.
COMPOSED = [
    (world, cp, tp, sequence, zero, specimen)
    for world in (2, 4, 8)
    for cp in (1, 2, 4)
    for tp in (1, 2, 4)
    for sequence in ((False, True) if tp > 1 else (False,))
    for zero in ZERO
    for specimen in ("llama", "llama-tied", "qwen3")
    if 1 < cp * tp <= world
]
COMPOSED_SAMPLE = [
    (2, 2, 1, False, 3, "llama"),
    (4, 1, 2, True, 1, "llama-tied"),
    (4, 2, 2, True, 3, "llama"),
]


@pytest.mark.parametrize(
    "cell",
    [*COMPOSED_SAMPLE, *(slow(one) for one in COMPOSED if one not in COMPOSED_SAMPLE)],
    ids=lambda cell: name_with_axes(*cell),
)
def test_tensor_and_context_parallelism_match_one_process(ranks, cell):
    world, cp, tp, sequence, zero, specimen = cell
    assert_equivalent(
        ranks(world),
        Task(specimen=specimen, length=13),  # a length that neither cp nor tp divides
        strategy=MegatronFSDPConfig(zero_dp_strategy=zero, sequence_parallel=sequence),
        parallelism_sizes=ParallelismSizes(cp_size=cp, tp_size=tp),
        activation_checkpointing=zero == 3,
    )


# The package tells experts by their names, and reduces them by themselves: world, cp and tp, sequence parallelism,
# ZeRO, specimen; nobody says how the latent attention of DeepSeek-V3 is to take tokens that are cut.
EXPERTS = [
    (world, cp, tp, sequence, zero, specimen)
    for world, cp, tp, sequence in (
        *((2, 1, 1, False), (4, 1, 1, False), (4, 2, 1, False), (4, 1, 2, False), (4, 2, 2, False)),
        *((4, 1, 2, True), (4, 2, 2, True)),
    )
    for zero in ZERO
    for specimen in ("qwen3-moe", "mixtral", "qwen2-moe", "deepseek-v3")
    if not (sequence and specimen == "deepseek-v3")
]
EXPERTS_SAMPLE = (2, 1, 1, False, 3, "qwen3-moe")


@pytest.mark.parametrize(
    "cell",
    [EXPERTS_SAMPLE, *(slow(one) for one in EXPERTS if one != EXPERTS_SAMPLE)],
    ids=lambda cell: name_with_axes(*cell),
)
def test_models_with_experts_match_one_process(ranks, cell):
    world, cp, tp, sequence, zero, specimen = cell
    options = {1: {}, 2: {"average_in_collective": True}, 3: {"fsdp_double_buffer": specimen == "qwen3-moe"}}[zero]
    assert_equivalent(
        ranks(world),
        Task(specimen=specimen),
        strategy=MegatronFSDPConfig(zero_dp_strategy=zero, sequence_parallel=sequence, **options),
        parallelism_sizes=ParallelismSizes(cp_size=cp, tp_size=tp),
        activation_checkpointing=zero == 2,
    )


# ---- loading ----


def on_rank_start(zero=3, folder=None, dtype=torch.float32, **options):
    """Return a loaded model and its runtime, on one of the ranks."""
    setup = DistributedSetup.build(strategy=MegatronFSDPConfig(zero_dp_strategy=zero, **options))
    model = NeMoAutoModelForCausalLM.from_pretrained(folder, distributed_setup=setup, dtype=dtype)
    return model, setup.runtime(model)


def canonical(runtime, state):
    """Return the whole tensors of *state*."""
    runtime.sharded.calls.export_state(state=state, parts=list(runtime.parts), mesh=runtime.mesh)
    return {name: tensor.full_tensor().clone() for name, tensor in state.items()}


def on_rank_read(folder):
    with BytesRead() as read:
        model, runtime = on_rank_start(3, folder)
    held = sum(p.to_local().numel() * 4 for p in model.parameters())
    return read.bytes, held, canonical(runtime, dict(model.named_parameters()))


@pytest.mark.slow
def test_every_rank_reads_and_holds_its_shards_and_nothing_else(ranks):
    expected = dict(SPECIMENS["llama"].make().named_parameters())
    total = sum(p.numel() * 4 for p in expected.values())
    answers = ranks(4).run(on_rank_read, checkpoint("llama"))

    assert sum(read for read, _, _ in answers) == sum(held for _, held, _ in answers) == total
    assert max(read for read, _, _ in answers) < 0.3 * total
    for _, _, weights in answers:
        assert weights.keys() == expected.keys()
        assert all(torch.equal(weights[name], expected[name]) for name in weights)


def on_rank_from_config():
    torch.manual_seed(0)
    setup = DistributedSetup.build(strategy="megatron-fsdp")
    config = SPECIMENS["llama-tied"].config()
    model = NeMoAutoModelForCausalLM.from_config(config, distributed_setup=setup, dtype=torch.float32)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    return canonical(setup.runtime(model), dict(model.named_parameters()))


def test_new_weights_are_those_of_one_process(ranks):
    torch.manual_seed(0)
    config = SPECIMENS["llama-tied"].config()
    alone = dict(NeMoAutoModelForCausalLM.from_config(config, dtype=torch.float32).named_parameters())
    for weights in ranks(2).run(on_rank_from_config):
        assert weights.keys() == alone.keys()
        assert all(torch.equal(weights[name], alone[name]) for name in weights)


def on_rank_generate(folder):
    model, _ = on_rank_start(3, folder)
    prompt = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        logits = model(prompt).logits
    tokens = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=8, do_sample=False)
    return type(model).__name__, logits, tokens, all(isinstance(p, DTensor) for p in model.parameters())


def test_it_stays_a_transformers_model_with_sharded_parameters(ranks):
    alone = SPECIMENS["llama"].make().eval()
    prompt = torch.tensor([[5, 6, 7]])
    expected = alone.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=8, do_sample=False)
    for name, logits, tokens, sharded in ranks(2).run(on_rank_generate, checkpoint("llama")):
        assert (name, sharded) == ("LlamaForCausalLM", True)
        torch.testing.assert_close(logits, alone(prompt).logits, rtol=1e-5, atol=1e-6)
        assert torch.equal(tokens, expected)


def on_rank_train_in_bfloat16(folder, preserve, wide):
    options = {"preserve_fp32_weights": preserve, "grad_reduce_in_fp32": wide}
    model, runtime = on_rank_start(3, folder, torch.bfloat16, **options)
    dtype = model.model.norm.weight.dtype
    before = canonical(runtime, dict(model.named_parameters()))
    optimizer = runtime.optimizer(torch.optim.SGD, lr=1e-4)
    batch = Task(rows=4).batches(0)[0]
    loss = runtime.forward_backward(rows_of_rank(batch, runtime))
    grads = {p.grad.dtype for p in model.parameters() if p.grad is not None}
    optimizer.step()
    after = canonical(runtime, dict(model.named_parameters()))
    moved = sum(not torch.equal(before[name], after[name]) for name in before)
    return dtype, grads, loss.item(), moved / len(before)


@pytest.mark.parametrize("preserve", [True, False])
@pytest.mark.parametrize("wide", [True, False])
def test_bfloat16_parameters_keep_float32_copies_by_default(ranks, preserve, wide):
    dtype = torch.float32 if preserve else torch.bfloat16
    expected = reference(Task(rows=4, steps=1)).losses[0]
    for kept, grads, loss, moved in ranks(2).run(on_rank_train_in_bfloat16, checkpoint("llama"), preserve, wide):
        assert (kept, grads) == (dtype, {dtype})
        assert loss == pytest.approx(expected, rel=2e-2)
        assert moved == 1.0 if preserve else moved < 1.0


def on_rank_edit_in_bfloat16(zero, folder, kept):
    """Return the losses of weights that are halved after each, once after a step too."""
    model, runtime = on_rank_start(zero, folder, torch.bfloat16, preserve_fp32_weights=kept)
    optimizer = runtime.optimizer(torch.optim.SGD, lr=0.0)
    batch = rows_of_rank(Task(rows=4).batches(0)[0], runtime)
    losses = []
    for step in range(3):
        losses.append(runtime.forward_backward(batch).item())
        if step == 1:
            optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(0.5)
    return losses


@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize("zero", ENDS)
def test_weights_that_are_changed_between_steps_are_those_of_the_next_forward(ranks, zero, kept):
    folder, batch = checkpoint("llama"), Task(rows=4).batches(0)[0]
    model = NeMoAutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    expected = []
    for _ in range(3):
        expected.append(model(**batch).loss.item())
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(0.5)
    for losses in ranks(2).run(on_rank_edit_in_bfloat16, zero, folder, kept):
        assert losses == pytest.approx(expected, rel=5e-3)


def on_rank_resume_in_bfloat16(folder, other, path):
    """Return what a bfloat16 run computes when it is saved, and what a run that loads it computes."""
    task, answers = Task(rows=4), []
    for weights in (folder, other):
        model, runtime = on_rank_start(3, weights, torch.bfloat16)
        optimizer = runtime.optimizer(torch.optim.AdamW, lr=1e-3)
        if weights is other:
            runtime.load(path, optimizer)
        else:
            runtime.forward_backward(rows_of_rank(task.batches(0)[0], runtime))
            optimizer.step()
            optimizer.zero_grad()
            runtime.save(path, optimizer).wait()
        with torch.no_grad():
            logits = model(torch.tensor([[5, 6, 7]])).logits
        answers.append((logits, canonical(runtime, dict(model.named_parameters()))))
    return answers


def test_a_loaded_run_computes_with_the_loaded_weights(ranks, tmp_path):
    folders = checkpoint("llama"), checkpoint("llama", 1)
    for (logits, weights), (loaded_logits, loaded) in ranks(2).run(
        on_rank_resume_in_bfloat16, *folders, tmp_path / "run"
    ):
        assert torch.equal(loaded_logits, logits)
        assert all(torch.equal(loaded[name], weights[name]) for name in weights)


def on_rank_export(folder, path):
    _, runtime = on_rank_start(2, folder)
    runtime.export(path)


def test_the_exported_folder_is_what_was_loaded(ranks, tmp_path):
    ranks(2).run(on_rank_export, checkpoint("llama"), tmp_path / "out")
    exported = NeMoAutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    for name, parameter in SPECIMENS["llama"].make().named_parameters():
        assert torch.equal(exported.get_parameter(name), parameter)


# ---- the optimizer ----


class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        self.block = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))

    def forward(self, x):
        return self.block(x)


def on_rank_bare_package():
    torch.manual_seed(0)
    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("dp", "tp"))
    model = fully_shard_model(
        Tiny(),
        device_mesh=mesh,
        dp_shard_dim="dp",
        tp_dim="tp",
        fsdp_unit_modules=[nn.Sequential],
        device=torch.device("cpu"),
    )
    before = [p.to_local().clone() for p in model.parameters()]
    optimizer = fully_shard_optimizer(torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5))
    moved = [not torch.equal(a, p.to_local()) for a, p in zip(before, model.parameters(), strict=True) if a.numel()]
    return all(moved), {int(state["step"]) for state in optimizer.state.values()}


def test_the_bare_package_takes_a_step_when_given_an_optimizer(ranks):
    assert ranks(2).run(on_rank_bare_package) == [(True, {1})] * 2


def on_rank_adopt(folder, kind, options):
    model, runtime = on_rank_start(3, folder)
    optimizer = runtime.optimizer(getattr(torch.optim, kind), **options)
    weights = canonical(runtime, dict(model.named_parameters()))
    with torch.no_grad():
        logits = model(torch.tensor([[5, 6, 7]])).logits
    return weights, [int(state.get("step", 0)) for state in optimizer.state.values()], logits


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("AdamW", {"lr": 0.1, "weight_decay": 0.5}),
        ("SGD", {"lr": 0.1, "weight_decay": 0.5, "momentum": 0.9}),
        ("Adagrad", {"lr": 0.1, "weight_decay": 0.5}),
        ("RAdam", {"lr": 1.0, "weight_decay": 0.5, "decoupled_weight_decay": True}),
    ],
    ids=str,
)
def test_a_new_optimizer_has_taken_no_step(ranks, kind, options):
    alone = SPECIMENS["llama"].make().eval()
    for weights, steps, logits in ranks(2).run(on_rank_adopt, checkpoint("llama"), kind, options):
        assert all(torch.equal(weights[name], parameter) for name, parameter in alone.named_parameters())
        assert not any(steps)
        torch.testing.assert_close(logits, alone(torch.tensor([[5, 6, 7]])).logits, rtol=1e-5, atol=1e-6)


def on_rank_schedule(folder):
    _, runtime = on_rank_start(3, folder)
    optimizer = runtime.optimizer(torch.optim.SGD, lr=1.0)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.5)
    runtime.forward_backward(rows_of_rank(Task().batches(0)[0], runtime))
    optimizer.step()
    scheduler.step()
    return optimizer.param_groups[0]["lr"]


@pytest.mark.filterwarnings("error")
def test_a_scheduler_follows_the_optimizer(ranks):
    assert ranks(2).run(on_rank_schedule, checkpoint("llama")) == [0.5, 0.5]


# ---- whole tensors ----


def on_rank_full_tensors(folder, zero, tp):
    setup = DistributedSetup.build(
        strategy=MegatronFSDPConfig(zero_dp_strategy=zero), parallelism_sizes=ParallelismSizes(tp_size=tp)
    )
    model = NeMoAutoModelForCausalLM.from_pretrained(folder, distributed_setup=setup, dtype=torch.float32)
    runtime = setup.runtime(model)
    weights = {name: p.full_tensor().clone() for name, p in model.named_parameters()}
    runtime.forward_backward(rows_of_rank(Task().batches(0)[0], runtime))
    grads = {name: p.grad.full_tensor().clone() for name, p in model.named_parameters()}
    with pytest.raises(RuntimeError, match=r"cut at rows of Megatron-FSDP's choice.*full_tensor\(\)"):
        model.model.norm.weight.redistribute(placements=[])
    return weights, grads


@cases(
    ("world", "zero", "tp"),
    [(2, 3, 1), slow(2, 1, 1), slow(4, 2, 2), slow(4, 3, 2)],
    lambda world, zero, tp: case_id(world, {"tp": tp}, f"zero {zero}"),
)
def test_the_full_tensor_of_a_parameter_and_of_a_gradient_is_right(ranks, world, zero, tp):
    alone = dict(SPECIMENS["llama"].make().named_parameters())
    expected = gradients_alone(Task().batches(0))
    for weights, grads in ranks(world).run(on_rank_full_tensors, checkpoint("llama"), zero, tp):
        assert weights.keys() == alone.keys() and all(torch.equal(weights[name], alone[name]) for name in alone)
        for name, gradient in expected.items():
            torch.testing.assert_close(grads[name], gradient, rtol=1e-4, atol=1e-6)


# ---- gradients in a loop of one's own ----


def on_rank_backward_twice(folder, zero, between):
    model, runtime = on_rank_start(zero, folder)
    optimizer = runtime.optimizer(torch.optim.SGD, lr=0.1)
    first, second = Task(accumulate=2).batches(0)
    for step, batch in enumerate((first, second)):
        runtime.forward_backward(rows_of_rank(batch, runtime))
        if step == 0 and between == "optimizer.zero_grad":
            optimizer.zero_grad()
        if step == 0 and between == "model.zero_grad":
            model.zero_grad()
        if step == 0 and between == "evaluate, grad = None":
            model(first["input_ids"])
        if step == 0 and "grad = None" in between:
            for _, parameter in runtime.named_parameters():
                parameter.grad = None
    return canonical(runtime, {name: p.grad for name, p in runtime.named_parameters() if p.grad is not None})


def gradients_alone(batches):
    """Return the gradient of the sum of the batches' mean losses, on one process."""
    model = SPECIMENS["llama"].make().eval()
    for batch in batches:
        model(**batch).loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("zero", ENDS, ids="zero {}".format)
@pytest.mark.parametrize("between", ["optimizer.zero_grad", "model.zero_grad", "grad = None", "evaluate, grad = None"])
def test_dropped_gradients_do_not_come_back(ranks, zero, between):
    expected = gradients_alone(Task(accumulate=2).batches(0)[1:])
    for found in ranks(2).run(on_rank_backward_twice, checkpoint("llama"), zero, between):
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("zero", [2, 3], ids="zero {}".format)
def test_a_second_backward_adds_to_the_gradients(ranks, zero):
    expected = gradients_alone(Task(accumulate=2).batches(0))
    for found in ranks(2).run(on_rank_backward_twice, checkpoint("llama"), zero, "nothing"):
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6)


def test_a_second_backward_that_zero_1_would_get_wrong_is_refused(ranks):
    with pytest.raises(Exception, match=r"ZeRO 1 has reduced the gradients.*optimizer.zero_grad\(\).*no_sync"):
        ranks(2).run(on_rank_backward_twice, checkpoint("llama"), 1, "nothing")


def on_rank_edit(folder, edit):
    """Return what a forward, or its backward, says after *edit* of the model."""
    model, runtime = on_rank_start(3, folder)
    batch = rows_of_rank(Task(rows=4).batches(0)[0], runtime)
    try:
        edit(model, runtime, batch)
        runtime.forward_backward(batch)
    except RuntimeError as error:
        return str(error)
    return ""


def register_hook(model, runtime, batch):
    return model.model.norm.weight.register_hook(lambda gradient: gradient * 0)


def register_post_hook(model, runtime, batch):
    model.model.norm.weight.register_post_accumulate_grad_hook(lambda parameter: None)


def register_late_hook(model, runtime, batch):
    loss = model(**batch).loss
    handle = register_hook(model, runtime, batch)
    loss.backward()
    handle.remove()


def tie(model, runtime, batch):
    model.lm_head.weight = model.model.embed_tokens.weight


def differentiate_twice(model, runtime, batch):
    model(**batch).loss.backward(create_graph=True)


def change_weights_before_the_backward(model, runtime, batch):
    loss = model(**batch).loss
    with torch.no_grad():
        model.model.norm.weight.mul_(0.5)
    loss.backward()


def replace_data(model, runtime, batch):
    model.model.norm.weight.data = model.model.norm.weight.data * 0.5


def convert(model, runtime, batch):
    model.to(torch.bfloat16)


def convert_a_part(model, runtime, batch):
    model.model.norm.to(torch.bfloat16)


def call_a_part(model, runtime, batch):
    model.model(batch["input_ids"])


def begin_inside(model, runtime, batch):
    found = []
    model.model.layers[0].register_forward_hook(lambda *given: found.append(given[-1]))
    model(**batch)
    found[0].mean().backward()


def step_what_waits(model, runtime, batch):
    optimizer = runtime.optimizer(torch.optim.SGD, lr=0.1)
    with runtime.no_sync():
        model(**batch).loss.backward()
    optimizer.step()


def clip_what_waits(model, runtime, batch):
    with runtime.no_sync():
        model(**batch).loss.backward()
    runtime.clip_grad_norm_(1.0)


def replace_what_waits(model, runtime, batch):
    with runtime.no_sync():
        model(**batch).loss.backward()
    model.model.norm.weight.grad = torch.ones_like(model.model.norm.weight)


def go_on_after_a_failure(model, runtime, batch):
    fail_in_the_middle(model, lambda: model(**batch).loss)


def step_after_a_failure(model, runtime, batch):
    optimizer = runtime.optimizer(torch.optim.SGD, lr=0.1)
    go_on_after_a_failure(model, runtime, batch)
    optimizer.step()


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (register_hook, "model.norm.weight has a hook of its gradient, which megatron_fsdp never calls"),
        (register_post_hook, "model.norm.weight has a hook of its gradient, which megatron_fsdp never calls"),
        (register_late_hook, "model.norm.weight has a hook of its gradient, which megatron_fsdp never calls"),
        (tie, "lm_head.weight was replaced, or tied to another parameter, after megatron_fsdp took the model over"),
        (differentiate_twice, "a backward with create_graph=True is to be differentiated once more"),
        (change_weights_before_the_backward, "weights were changed between a forward and its backward"),
        (replace_data, "parameter.data = ... gives a parameter other storage"),
        (convert, "model.embed_tokens.weight would be converted or moved"),
        (convert_a_part, "model.norm.weight would be converted or moved"),
        (call_a_part, "a module of the model was called by itself"),
        (begin_inside, "a backward reached the model by another way than what its forward returned"),
        (step_what_waits, "optimizer.step() found gradients of one rank's rows alone, of "),
        (clip_what_waits, "clip_grad_norm_() found gradients of one rank's rows alone, of "),
        (replace_what_waits, "the gradient of model.norm.weight was set or changed while that of a backward under"),
        (go_on_after_a_failure, "a backward failed in the middle, with gradients of some parameters only; call"),
        (step_after_a_failure, "optimizer.step() found gradients of one rank's rows alone, of "),
    ],
)
def test_what_would_go_wrong_in_silence_is_refused(ranks, edit, message):
    for found in ranks(2).run(on_rank_edit, checkpoint("llama"), edit):
        assert found.startswith(message)


# ---- the order of calls in a loop of one's own ----


def failing_after_a_block(model):
    """Let the backward of forwards fail after the last block; return the handle of that."""
    return model.model.layers[-1].register_forward_pre_hook(lambda module, args: (Fail.apply(args[0]), *args[1:]))


def fail_in_the_middle(model, forward):
    """Run a backward that raises between two blocks."""
    handle = failing_after_a_block(model)
    with pytest.raises(ValueError, match="a backward that fails"):
        forward().backward()
    handle.remove()


def fail_in_the_forward(model, forward):
    def fail(*args):
        raise ValueError("the forward fails")

    handle = model.model.layers[-1].register_forward_pre_hook(fail)
    with pytest.raises(ValueError, match="the forward fails"):
        forward()
    handle.remove()


class Loop:
    """What a loop of one's own uses, on a rank or, without a runtime, on one process."""

    def __init__(self, model, runtime=None):
        self.model, self.runtime = model, runtime
        self.no_sync = runtime.no_sync if runtime else nullcontext

    def forward(self, seed):
        tokens = Task(rows=4).batches(seed)[0]["input_ids"]  # as many for every rank, so that a mean of means is one
        if self.runtime:
            tokens = tokens.chunk(2)[self.runtime.dp_rank]
        return self.model(tokens, labels=tokens).loss

    def backward(self, seed):
        self.forward(seed).backward()

    def optimizer(self, groups=None):
        if self.runtime:
            return self.runtime.optimizer(torch.optim.SGD, groups, lr=0.1)
        return torch.optim.SGD(groups or self.model.parameters(), lr=0.1)

    def gradients(self):
        return {name: p.grad for name, p in self.model.named_parameters() if p.grad is not None}


def drop_a_failed_backward(loop):
    optimizer = loop.optimizer()
    fail_in_the_middle(loop.model, lambda: loop.forward(0))
    optimizer.zero_grad()
    loop.backward(1)
    optimizer.step()
    optimizer.zero_grad()
    loop.backward(2)
    return loop.gradients()


def drop_a_failed_backward_of_two(loop):
    optimizer = loop.optimizer()
    handle = failing_after_a_block(loop.model)
    first = loop.forward(0)
    handle.remove()
    second = loop.forward(1)
    with pytest.raises(ValueError, match="a backward that fails"):
        first.backward()
    optimizer.zero_grad()
    second.backward()
    return loop.gradients()


def drop_a_failed_backward_that_waits(loop):
    with loop.no_sync():
        fail_in_the_middle(loop.model, lambda: loop.forward(0))
    loop.model.zero_grad()
    with loop.no_sync():
        loop.backward(1)
    loop.backward(2)
    return loop.gradients()


def step_after_a_failed_forward(loop):
    optimizer = loop.optimizer()
    loop.backward(0)
    fail_in_the_forward(loop.model, lambda: loop.forward(1))
    with torch.no_grad():
        for parameter in loop.model.parameters():
            parameter.grad.mul_(0.5)
    optimizer.step()
    optimizer.zero_grad()
    loop.backward(2)
    return loop.gradients()


def write_data_after_a_forward(loop):
    loop.forward(0)
    for parameter in loop.model.parameters():
        parameter.data.mul_(0.5)
    loop.backward(1)
    return loop.gradients()


def set_gradients_before_the_backward(loop):
    for parameter in loop.model.parameters():
        parameter.grad = parameter.detach() * 0.5
    with loop.no_sync():
        loop.backward(0)
    loop.backward(1)
    return loop.gradients()


def drop_what_waits(loop):
    with loop.no_sync():
        loop.backward(0)
    loop.model.zero_grad()
    with loop.no_sync():
        loop.backward(1)
    loop.model.model.layers[0].zero_grad()
    loop.backward(2)
    return loop.gradients()


def step_with_an_empty_group_first(loop):
    optimizer = loop.optimizer([{"params": []}, {"params": list(loop.model.parameters())}])
    loop.backward(0)
    optimizer.step()
    optimizer.zero_grad()
    loop.backward(1)
    return loop.gradients()


def nest_no_sync(loop):
    with loop.no_sync():
        with loop.no_sync():
            loop.backward(0)
        loop.backward(1)
    loop.backward(2)
    return loop.gradients()


def move_to_where_it_is(loop):
    loop.model.to("cpu").float()
    loop.model.model.to("cpu")
    loop.backward(0)
    return loop.gradients()


def hold_gradients(loop):
    optimizer = loop.optimizer()
    loop.backward(0)
    held = loop.gradients()
    optimizer.zero_grad()
    loop.backward(1)
    return held


def zero_between_forward_and_backward(loop):
    """Which is no change of weights."""
    optimizer = loop.optimizer()
    loop.backward(0)
    first, second = loop.forward(1), loop.forward(2)
    optimizer.zero_grad()
    with torch.no_grad():
        loop.forward(3)
    with loop.no_sync():
        first.backward()
    second.backward()
    return loop.gradients()


def on_rank_loop(folder, zero, options, loop):
    model, runtime = on_rank_start(zero, folder, **options)
    return canonical(runtime, loop(Loop(model, runtime)))


@cases(
    ("loop", "zero", "options"),
    [
        (drop_a_failed_backward, 3, {}),
        (drop_a_failed_backward, 1, {}),
        slow(drop_a_failed_backward, 1, NO_OVERLAP),
        (drop_a_failed_backward_of_two, 3, {}),
        slow(drop_a_failed_backward_that_waits, 3, {}),
        (drop_a_failed_backward_that_waits, 1, {}),
        (step_after_a_failed_forward, 3, {}),
        (write_data_after_a_forward, 3, {}),
        (write_data_after_a_forward, 1, NO_OVERLAP),
        (set_gradients_before_the_backward, 3, {}),
        (set_gradients_before_the_backward, 1, {}),
        slow(drop_what_waits, 3, {}),
        (drop_what_waits, 1, {}),
        (step_with_an_empty_group_first, 3, {}),
        (nest_no_sync, 1, {}),
        (move_to_where_it_is, 3, {}),
        (hold_gradients, 3, {}),
        slow(hold_gradients, 1, {}),
        (zero_between_forward_and_backward, 3, {}),
        slow(zero_between_forward_and_backward, 2, {}),
        (zero_between_forward_and_backward, 1, NO_OVERLAP),
    ],
    lambda loop, zero, options: case_id(loop.__name__, f"zero {zero}", options),
)
def test_the_gradients_of_a_loop_are_those_of_one_process(ranks, loop, zero, options):
    expected = loop(Loop(SPECIMENS["llama"].make().eval()))
    for found in ranks(2).run(on_rank_loop, checkpoint("llama"), zero, options, loop):
        assert found.keys() == expected.keys()
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6)


def on_rank_step_with_a_closure(folder):
    _, runtime = on_rank_start(3, folder)
    optimizer = runtime.optimizer(torch.optim.SGD, lr=0.1)
    batch = rows_of_rank(Task(rows=4).batches(0)[0], runtime)
    return optimizer.step(lambda: runtime.forward_backward(batch)).item()


def test_a_step_returns_what_its_closure_did(ranks):
    expected = SPECIMENS["llama"].make().eval()(**Task(rows=4).batches(0)[0]).loss.item()
    assert ranks(2).run(on_rank_step_with_a_closure, checkpoint("llama")) == pytest.approx([expected] * 2)


def test_a_parameter_without_elements_is_refused():
    assert dim_problem("none", (0, 8), None, 1) == [
        "none has no elements, (0, 8), and megatron_fsdp cannot shard it; use 'ddp' for this model"
    ]


def on_rank_from_logits(folder, zero):
    model, runtime = on_rank_start(zero, folder)
    tokens = Task().batches(0)[0]["input_ids"].chunk(2)[runtime.dp_rank]
    for _ in range(2):
        runtime.optimizer(torch.optim.SGD).zero_grad()
        model(tokens).logits.square().mean().backward()
    return canonical(runtime, {name: p.grad for name, p in runtime.named_parameters() if p.grad is not None})


@pytest.mark.parametrize("zero", ENDS, ids="zero {}".format)
def test_a_loss_of_ones_own_gets_the_mean_of_the_gradients(ranks, zero):
    model = SPECIMENS["llama"].make().eval()
    model(Task().batches(0)[0]["input_ids"]).logits.square().mean().backward()
    for found in ranks(2).run(on_rank_from_logits, checkpoint("llama"), zero):
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(found[name], parameter.grad, rtol=1e-4, atol=1e-6)


# ---- refusals ----


def refused(**options):
    """Return the message of the error that ``build`` raises."""
    with pytest.raises(TopologyError) as caught:
        DistributedSetup.build(**{"strategy": "megatron_fsdp", "world_size": 8, **options})
    return str(caught.value)


@pytest.mark.parametrize("name", ["megatron_fsdp", "megatron-fsdp", "Megatron_FSDP", "mfsdp"])
def test_every_spelling_of_its_name_selects_it(name):
    assert DistributedSetup.build(strategy=name, world_size=2).strategy_config == MegatronFSDPConfig()


@pytest.mark.parametrize("axis", ["pp", "ep"])
def test_an_axis_that_it_does_not_compose_with_is_refused(axis):
    message = refused(parallelism_sizes=ParallelismSizes(**{f"{axis}_size": 2}))
    assert f"axis {axis!r} has size 2" in message and "megatron_fsdp" in message


def test_replicas_of_shards_are_refused():
    message = refused(parallelism_sizes=ParallelismSizes(dp_replicate_size=2))
    assert "axis 'dp_replicate' has size 2" in message and "fsdp2" in message


def test_selective_recomputation_is_refused():
    message = refused(activation_checkpointing="selective")
    assert "'selective' was asked for" in message and "'megatron_fsdp' does not compose" in message
    assert "'ddp' or 'fsdp2'" in message


def test_a_missing_package_says_how_to_install_it(monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr("nemo_dist_megatron_fsdp.version_check.version", missing)
    message = refused()
    assert "needs the package megatron-fsdp 0.6.*" in message and "pip install 'nemo-dist[megatron-fsdp]'" in message


@pytest.mark.parametrize("version", ["0.5.2", "0.7.0", "1.6"])
def test_a_version_that_is_not_tested_is_named(monkeypatch, version):
    monkeypatch.setattr("nemo_dist_megatron_fsdp.version_check.version", lambda name: version)
    assert f"megatron-fsdp 0.6.* (got {version})" in refused()


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"zero_dp_strategy": 0}, ValueError),
        ({"zero_dp_strategy": "optim"}, ValueError),
        ({"megatron_fsdp_unit_modules": "LlamaDecoderLayer"}, TypeError),
        ({"megatron_fsdp_unit_modules": [3]}, TypeError),
        ({"megatron_fsdp_unit_modules": []}, ValueError),
        ({"fsdp_double_buffer": 1}, TypeError),
        ({"nccl_ub": True}, ValueError),
    ],
    ids=str,
)
def test_an_option_that_is_wrong_names_itself(options, error):
    with pytest.raises(error, match=next(iter(options))):
        MegatronFSDPConfig(**options)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"overlap_param_gather": False}, "overlap_param_gather=False needs whole parameters.*zero_dp_strategy=3"),
        ({"zero_dp_strategy": 3, "overlap_grad_reduce": False}, "needs whole gradients.*zero_dp_strategy=3"),
        ({"zero_dp_strategy": 2, "overlap_grad_reduce": False}, "needs whole gradients.*zero_dp_strategy=2"),
        (
            {"zero_dp_strategy": 1, "overlap_grad_reduce": False, "preserve_fp32_weights": False},
            "in the dtype that they are kept in.*grad_reduce_in_fp32=False",
        ),
        ({"zero_dp_strategy": 1, "fsdp_double_buffer": True}, "no buffers to reuse with zero_dp_strategy=1"),
    ],
    ids=str,
)
def test_options_that_the_package_would_silently_change_are_refused(options, reason):
    assert re.search(reason, refused(strategy=MegatronFSDPConfig(**options)))


def test_options_that_fit_together_build():
    for options in ({"zero_dp_strategy": 2, "overlap_param_gather": False}, {"zero_dp_strategy": 1, **NO_OVERLAP}):
        config = MegatronFSDPConfig(**options)
        assert DistributedSetup.build(strategy=config, world_size=2).strategy_config == config


def test_another_device_than_cuda_is_refused():
    assert "'megatron_fsdp' needs CUDA (got device_type 'cpu')" in refused(device_type="cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is CUDA here")
@pytest.mark.slow
def test_the_demo_says_in_one_line_what_it_needs(tmp_path):
    command = [sys.executable, "-m", "nemo_dist.cli", "demo", "--strategy", "megatron_fsdp", "--nproc", "2"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=240, check=False)
    assert result.returncode == 2
    assert "'megatron_fsdp' needs CUDA" in result.stderr and "Traceback" not in result.stderr
    assert "starting" not in result.stdout and not list(tmp_path.iterdir())


def on_rank_load_without_cuda(folder):
    setup = DistributedSetup.build(strategy="megatron_fsdp")
    NeMoAutoModelForCausalLM.from_pretrained(folder, distributed_setup=setup)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is CUDA here")
def test_without_cuda_it_says_what_it_needs(rank_pools):
    with pytest.raises(Exception, match=r"strategy 'megatron_fsdp' needs CUDA, and this process has none.*use 'fsdp2'"):
        rank_pools(2).run(on_rank_load_without_cuda, checkpoint("llama"))


def test_an_unknown_unit_module_is_refused_with_the_known_ones(ranks):
    units = {"megatron_fsdp_unit_modules": ["LlamaLayer"]}
    with pytest.raises(
        Exception, match=r"names \['LlamaLayer'\], which the model has not \(it has .*LlamaDecoderLayer"
    ):
        ranks(2).run(on_rank_start, folder=checkpoint("llama"), **units)


# ---- memory ----


@contextmanager
def counted(name, sent):
    """Add up in *sent* the bytes that this rank sends by a function of torch; a dispatch mode sees no coalesced one."""
    real = getattr(torch.distributed, name)

    def call(*args, **kwargs):
        sizes = [tensor.nbytes for tensor in tensors_in((args, kwargs))]
        sent[name] += max(sizes) - min(sizes)
        return real(*args, **kwargs)

    with patch.object(torch.distributed, name, call):
        yield


def on_rank_hold(zero, options, sizes):
    """Return the bytes of parameters, gradients and optimizer state, of the package's buffers, and those sent."""
    strategy = MegatronFSDPConfig(zero_dp_strategy=zero, **options)
    setup = DistributedSetup.build(strategy, sizes)
    model = NeMoAutoModelForCausalLM.from_config(SPECIMENS["llama"].config(), distributed_setup=setup)
    runtime = setup.runtime(model)
    optimizer = runtime.optimizer(torch.optim.AdamW, lr=1e-3)
    batch = SPECIMENS["llama"].batch(2, 16, torch.Generator().manual_seed(0))
    labelled = {"input_ids": batch["input_ids"], "labels": batch["input_ids"].clone()}
    runtime.forward_backward(labelled)  # in ZeRO 1 and 2 the package gathers blocks twice in the very first forward
    optimizer.step()
    optimizer.zero_grad()
    sent = Counter()
    with counted("all_gather_into_tensor", sent), counted("reduce_scatter_tensor", sent):
        runtime.forward_backward(labelled)
    parameters = [parameter for _, parameter in runtime.named_parameters()]
    gradients = sum(local(parameter.grad).nbytes for parameter in parameters)
    optimizer.step()
    state = [value for found in optimizer.state.values() for value in found.values() if isinstance(value, torch.Tensor)]
    groups = Engine.of(model).wrapper.param_and_grad_buffer.parameter_groups
    return (
        {
            "parameters": sum(local(parameter).nbytes for parameter in parameters),
            "gradients": gradients,
            "optimizer state": sum(local(value).nbytes for value in state),
        },
        {
            "weights": sum(group.model_weight_buffer.data.nbytes for group in groups),
            "gradients": sum(group.main_grad_buffer.data.nbytes for group in groups),
        },
        dict(sent),
    )


@cases(
    ("world", "zero", "options", "sizes"),
    [
        (2, 3, {}, {}),
        (2, 1, {}, {}),
        slow(2, 2, {}, {}),
        slow(2, 3, {}, {"tp_size": 2}),
        slow(4, 3, {}, {"tp_size": 2}),
        slow(4, 1, {}, {"cp_size": 2}),
        slow(2, 3, {"megatron_fsdp_unit_modules": ["LlamaMLP"]}, {}),
    ],
    lambda world, zero, options, sizes: case_id(world, f"zero {zero}", options, sizes),
)
def test_a_rank_holds_what_its_memory_hook_says(ranks, world, zero, options, sizes):
    sizes = ParallelismSizes(**sizes)
    measured = ranks(world).run(on_rank_hold, zero, options, sizes)
    setup = DistributedSetup.build(MegatronFSDPConfig(zero_dp_strategy=zero, **options), sizes, world_size=world)
    model = meta_model(SPECIMENS["llama"].config())
    facts = ModelFacts.of(model, 2, 16, None, False)
    (said,) = divide(RankShare.whole(model, 2, 16), setup.calls, setup.strategy, setup.plan, facts, model)

    assert {kind: max(states[kind] for states, _, _ in measured) for kind in said.states} == said.states
    for _, buffers, sent in measured:
        if sizes == ParallelismSizes() and not options:  # the count is of all axes together
            (lines,) = setup.calls.traffic(plan=setup.plan, facts=facts, model=model)
            said_sent = [line.sent for line in lines]
            print(f"ZeRO {zero}: sent {sent}, said {said_sent}")
            assert list(sent.values()) == pytest.approx(said_sent, rel=0.05)  # buckets are padded
        if zero == 1:  # nothing is gathered or waits but what the buffers hold
            assert buffers["weights"] == said.states["parameters"] + said.bytes["gathered parameters"]
            waiting = said.bytes["gradients before they are reduced"]
            assert buffers["gradients"] == said.states["gradients"] + waiting
