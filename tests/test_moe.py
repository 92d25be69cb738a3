"""Expert parallelism computes what one process computes, and reads only its experts."""

import pytest
import torch
from cases import case_id, cases

from nemo_dist import DistributedSetup, FSDP2Config, MoEParallelizerConfig, ParallelismSizes, TopologyError
from nemo_dist.mesh.dtensor import local
from nemo_dist.testing.equivalence import Task, assert_equivalent, checkpoint
from nemo_dist.testing.io_counter import BytesRead
from nemo_dist.testing.precision import FP32
from nemo_dist.testing.tensors import rows_of_rank, whole
from nemo_dist.testing.tiny_models import SPECIMENS


def options(recompute=False, moe=None, pipeline=None, strategy=None, **sizes):
    return {
        "strategy": strategy or FSDP2Config(mp_policy=FP32),
        "parallelism_sizes": ParallelismSizes(**sizes),
        "activation_checkpointing": recompute,
        "moe_parallel_config": moe,
        "pipeline_config": pipeline,
    }


def load(specimen, folder, **more):
    setup = DistributedSetup.build(**options(**more))
    return SPECIMENS[specimen].load.from_pretrained(folder, distributed_setup=setup, dtype=torch.float32), setup


# ---- numbers ----


@cases(("specimen", "world", "sizes"), [("mixtral", 2, {"ep_size": 2}), ("deepseek-v3", 4, {"ep_size": 2})])
def test_experts_over_ranks_match_one_process(ranks, specimen, world, sizes):
    """The full matrix of models and topologies is in ``test_moe_matrix.py``."""
    assert_equivalent(ranks(world), Task(specimen=specimen), **options(**sizes))


@pytest.mark.slow
def test_experts_with_replicas_match_one_process(ranks):
    """The parameters of all replicas are compared bit for bit, those of the experts included."""
    assert_equivalent(ranks(4), Task(specimen="qwen2-moe"), **options(ep_size=2, dp_replicate_size=2))


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["full", "selective"])
def test_recomputed_experts_match_one_process(ranks, mode):
    assert_equivalent(ranks(4), Task(specimen="qwen3-moe"), **options(ep_size=2, recompute=mode))


@pytest.mark.slow
def test_accumulated_batches_have_one_router_loss(ranks):
    task = Task(specimen="qwen3-moe-padded", accumulate=3, rows=4)
    assert_equivalent(ranks(4), task, **options(ep_size=4, recompute="full"))


@pytest.mark.parametrize("mode", [False, "full", pytest.param("selective", marks=pytest.mark.slow)])
def test_all_tokens_may_go_to_the_experts_of_one_rank(ranks, mode):
    """The routers are tied, so two experts of eight get every token, and three ranks of four get none.

    One step: the second would find routers that are almost tied, which rounding decides.
    """
    assert_equivalent(ranks(4), Task(specimen="qwen3-moe-tied", steps=1), **options(ep_size=4, recompute=mode))


def test_a_rank_may_have_no_label_to_learn_from(ranks):
    assert_equivalent(ranks(4), Task(specimen="mixtral", rows=4), **options(ep_size=4))


@pytest.mark.slow
def test_experts_that_shards_do_not_divide_are_cut_along_the_hidden_size(ranks):
    """Three experts a rank on two ranks each."""
    assert_equivalent(ranks(4), Task(specimen="qwen3-moe-six"), **options(ep_size=2))


@cases(
    ("world", "sizes"),
    [(2, {"ep_size": 2}), (4, {"ep_size": 2}), (4, {"ep_size": 2, "dp_replicate_size": 2})],
)
def test_gradients_of_experts_that_are_reduced_in_float64_match_one_process(ranks, world, sizes):
    """In dtypes other than float32 and bfloat16 torch divides gradients before and after it sums them."""
    strategy = FSDP2Config(mp_policy={**FP32, "reduce_dtype": "float64"})
    assert_equivalent(ranks(world), Task(specimen="mixtral"), **options(strategy=strategy, **sizes))


@pytest.mark.slow
def test_experts_without_resharding_match_one_process(ranks):
    assert_equivalent(ranks(4), Task(specimen="qwen3-moe"), **options(ep_size=2, moe={"reshard_after_forward": False}))


@pytest.mark.slow
@cases(
    ("specimen", "sizes", "moe"),
    [
        ("qwen2-moe", {"tp_size": 2, "ep_size": 2}, None),
        ("qwen3-moe", {"tp_size": 2, "ep_size": 2}, {"dispatcher": "all_reduce"}),
    ],
)
def test_experts_beside_tensor_parallelism_match_one_process(ranks, specimen, sizes, moe):
    """A token is sent once, not once per tensor-parallel rank, or its experts' gradients would be twice as large."""
    assert_equivalent(ranks(4), Task(specimen=specimen), **options(moe=moe, **sizes))


@pytest.mark.slow
@cases(
    ("specimen", "length", "sizes"),
    [
        ("qwen3-moe-padded", 10, {"cp_size": 2, "ep_size": 4}),  # two tokens are appended, which no router may count
        ("qwen3-moe", 10, {"cp_size": 2}),
        ("qwen3-moe", 12, {"cp_size": 2, "tp_size": 2, "ep_size": 4}),
    ],
    lambda specimen, length, sizes: case_id(specimen, sizes, f"{length} tokens"),
)
def test_experts_beside_context_parallelism_match_one_process(ranks, specimen, length, sizes):
    assert_equivalent(ranks(4), Task(specimen=specimen, length=length), **options(**sizes))


@pytest.mark.slow
@cases(
    ("specimen", "sizes", "pipeline", "recompute"),
    [
        ("qwen3-moe-padded", {"pp_size": 2, "ep_size": 2}, {"pp_schedule": "gpipe"}, "full"),
        ("qwen3-moe-deep", {"pp_size": 2, "ep_size": 2}, {"pp_schedule": "zbv"}, False),
        ("qwen2-moe", {"pp_size": 2, "tp_size": 2, "ep_size": 2}, None, False),
        # Four rows are appended, which do not count.
        ("qwen3-moe-deep", {"pp_size": 4}, {"pp_batch_size": 12}, False),
    ],
)
def test_experts_in_a_pipeline_match_one_process(ranks, specimen, sizes, pipeline, recompute):
    assert_equivalent(ranks(4), Task(specimen=specimen), **options(pipeline=pipeline, recompute=recompute, **sizes))


# ---- loading ----


def on_rank_read(specimen, folder, sizes):
    with BytesRead() as reading:
        model, _ = load(specimen, folder, **sizes)
    own = {name: local(parameter) for name, parameter in model.named_parameters()}
    held = sum(p.numel() * p.element_size() for p in own.values())
    return reading.bytes, held, {name: p.detach().clone() for name, p in own.items()}


@cases(
    ("specimen", "sizes"),
    [
        ("qwen3-moe", {"ep_size": 2}),
        ("qwen3-moe-six", {"ep_size": 2, "dp_replicate_size": 2}),
        pytest.param("qwen3-moe-six", {"ep_size": 2}, marks=pytest.mark.slow),
        pytest.param("qwen3-moe", {"ep_size": 2, "dp_replicate_size": 2}, marks=pytest.mark.slow),
    ],
)
def test_fused_or_separate_experts_load_alike_and_only_own_ones_are_read(ranks, specimen, sizes, tmp_path):
    SPECIMENS[specimen].make().save_pretrained(tmp_path, save_original_format=False)
    sizes_of = {name: p.numel() * p.element_size() for name, p in SPECIMENS[specimen].make().named_parameters()}
    single, layer = sum(sizes_of.values()), sum(n for name, n in sizes_of.items() if "layers.0.mlp.experts" in name)

    one_by_one = ranks(4).run(on_rank_read, specimen, checkpoint(specimen), sizes)
    fused = ranks(4).run(on_rank_read, specimen, tmp_path, sizes)

    print(
        f"bytes read on 4 ranks: {[a for a, *_ in one_by_one]} one by one, {[a for a, *_ in fused]} fused of {single}"
    )
    for (bytes_one_by_one, held, first), (bytes_fused, _, second) in zip(one_by_one, fused, strict=True):
        assert bytes_fused == held
        assert bytes_one_by_one == held + layer  # one layer is read whole, which proves the conversion of slices
        assert all(torch.equal(first[name], second[name]) for name in first)
    assert sum(a for a, *_ in fused) == single * sizes.get("dp_replicate_size", 1)


def on_rank_from_config(specimen):
    torch.manual_seed(3)
    setup = DistributedSetup.build(**options(ep_size=2))
    model = SPECIMENS[specimen].load.from_config(SPECIMENS[specimen].config(), distributed_setup=setup)
    return {name: whole(parameter) for name, parameter in model.named_parameters()}


def test_a_new_model_has_the_experts_that_one_process_draws(ranks):
    torch.manual_seed(3)
    single = SPECIMENS["qwen3-moe"].load.from_config(SPECIMENS["qwen3-moe"].config())

    for drawn in ranks(4).run(on_rank_from_config, "qwen3-moe"):
        assert [name for name, p in single.named_parameters() if not torch.equal(p, drawn[name])] == []


def on_rank_save_after_a_step(folder, path):
    model, setup = load("qwen3-moe", folder, ep_size=2)
    runtime, optimizer = one_step(setup.runtime(model))
    runtime.save(path, optimizer)
    return whole_state(runtime, optimizer)


def on_rank_load_elsewhere(folder, path, sizes):
    model, setup = load("qwen3-moe", folder, **sizes)
    runtime, optimizer = one_step(setup.runtime(model))
    runtime.load(path, optimizer)
    return whole_state(runtime, optimizer)


def one_step(runtime):
    optimizer = runtime.optimizer(torch.optim.AdamW, lr=1e-2)
    runtime.forward_backward(rows_of_rank(Task(specimen="qwen3-moe").batches(0)[0], runtime))
    optimizer.step()
    optimizer.zero_grad()
    return runtime, optimizer


def whole_state(runtime, optimizer):
    found = {}
    for name, parameter in runtime.named_parameters():
        state = {kind: value for kind, value in optimizer.state[parameter].items() if value.ndim}
        for kind, tensor in {"parameter": parameter, **state}.items():
            found[f"{name} {kind}"] = whole(tensor)
    return found


@pytest.mark.parametrize(
    "sizes",
    [
        {},
        pytest.param({"ep_size": 4}, marks=pytest.mark.slow),
        pytest.param({"ep_size": 2, "dp_replicate_size": 2}, marks=pytest.mark.slow),
        pytest.param({"ep_size": 4, "tp_size": 2}, marks=pytest.mark.slow),
    ],
    ids=lambda sizes: case_id(sizes) or "ep 1",
)
def test_a_checkpoint_of_experts_loads_in_another_topology(ranks, sizes, tmp_path):
    folder = checkpoint("qwen3-moe")
    saved = ranks(4).run(on_rank_save_after_a_step, folder, tmp_path / "saved")[0]

    for found in ranks(4).run(on_rank_load_elsewhere, folder, tmp_path / "saved", sizes):
        assert found.keys() == saved.keys()
        assert [name for name in saved if not torch.equal(saved[name], found[name])] == []


# ---- options ----


def on_rank_dtypes(folder, moe):
    strategy = FSDP2Config(mp_policy={"param_dtype": "bfloat16"})
    model, _ = load("qwen3-moe", folder, ep_size=2, strategy=strategy, moe=moe)
    seen = set()
    model.model.layers[0].mlp.experts.act_fn.register_forward_hook(lambda m, args, output: seen.add(output.dtype))
    logits = model(torch.arange(1, 9).unsqueeze(0)).logits
    return seen, logits.dtype


def test_experts_and_head_may_compute_in_a_dtype_of_their_own(ranks):
    folder = checkpoint("qwen3-moe")
    exact = {"mp_policy": {"param_dtype": "float32"}, "lm_head_precision": "float32"}

    assert ranks(2).run(on_rank_dtypes, folder, None) == [({torch.bfloat16}, torch.bfloat16)] * 2
    assert ranks(2).run(on_rank_dtypes, folder, exact) == [({torch.float32}, torch.float32)] * 2


def on_rank_balance(folder):
    model, setup = load("qwen3-moe", folder, ep_size=2)
    runtime = setup.runtime(model)
    runtime.forward_backward(rows_of_rank(Task(specimen="qwen3-moe").batches(0)[0], runtime))
    return runtime.metrics()


def test_the_runtime_reports_how_evenly_experts_are_used(ranks):
    folder = checkpoint("qwen3-moe")
    model = SPECIMENS["qwen3-moe"].load.from_pretrained(folder, dtype=torch.float32)
    logits = model(Task(specimen="qwen3-moe").batches(0)[0]["input_ids"], output_router_logits=True).router_logits
    counts = [torch.bincount(layer.topk(2).indices.flatten(), minlength=8).float() for layer in logits]
    worst = max((count.max() / count.mean()).item() for count in counts)

    assert ranks(2).run(on_rank_balance, folder) == [{"expert_load_max_over_mean": pytest.approx(worst)}] * 2


def test_the_moe_mesh_has_the_axes_ep_shard_and_ep(ranks):
    for shape in ranks(4).run(on_rank_moe_shapes):
        assert shape == [(("ep_shard", "ep"), (2, 2)), (("ep_shard", "ep"), (2, 2)), None]


def on_rank_moe_shapes():
    meshes = [
        DistributedSetup.build(**options(**sizes)).mesh_context.moe_mesh
        for sizes in ({"ep_size": 2}, {"ep_size": 2, "dp_replicate_size": 2}, {})
    ]
    return [mesh and (mesh.mesh_dim_names, tuple(mesh.shape)) for mesh in meshes]


# ---- refusals ----


def refused(error=TopologyError, world_size=8, **more):
    with pytest.raises(error) as caught:
        DistributedSetup.build(world_size=world_size, **options(**more))
    return str(caught.value)


def test_an_ep_size_that_does_not_divide_the_ranks_is_refused():
    assert "ep_size=3 must divide the 8 ranks of dp*cp*tp = 8*1*1" in refused(ep_size=3)


def test_the_all_reduce_dispatcher_needs_ranks_with_the_same_tokens():
    assert "needs ranks that hold the same tokens" in refused(ep_size=4, moe={"dispatcher": "all_reduce"})


def test_sequence_parallelism_beside_experts_is_refused():
    strategy = FSDP2Config(sequence_parallel=True)
    assert "sequence_parallel=True cuts the tokens between layers, which routers" in refused(
        ep_size=2, tp_size=2, strategy=strategy
    )


def test_an_unknown_dispatcher_is_refused():
    with pytest.raises(ValueError, match="did you mean 'all_to_all'"):
        MoEParallelizerConfig(dispatcher="alltoall")


def test_ddp_refuses_expert_parallelism():
    assert "strategy 'ddp' does not compose with it; use 'fsdp2'" in refused(ep_size=2, strategy="ddp")


def on_rank_refusal(specimen, folder, more):
    with BytesRead() as reading, pytest.raises(TopologyError) as caught:
        load(specimen, folder, **more)
    return reading.bytes, str(caught.value)


@cases(
    ("specimen", "sizes", "moe", "message"),
    [
        ("llama", {"ep_size": 2}, None, "LlamaForCausalLM has no experts that transformers can dispatch to"),
        (
            "qwen3-moe-six",
            {"ep_size": 4},
            None,
            "ep_size=4 must divide the experts of a layer of Qwen3MoeForCausalLM (6)",
        ),
    ],
    lambda specimen, sizes, moe, message: case_id(specimen, sizes),
)
def test_experts_that_do_not_fit_are_refused_before_weights_are_read(ranks, specimen, sizes, moe, message):
    for read_bytes, text in ranks(4).run(on_rank_refusal, specimen, checkpoint(specimen), {**sizes, "moe": moe}):
        assert read_bytes == 0
        assert message in text
