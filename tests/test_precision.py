"""FSDP2's policies do what they say: dtypes of compute and reduction, shards on the CPU, blocks compiled."""

import pytest
import torch
from cases import cases
from torch.distributed.fsdp import CPUOffloadPolicy
from torch.utils._python_dispatch import TorchDispatchMode

from nemo_dist import DistributedSetup, FSDP2Config, ParallelismSizes, initialize_distributed
from nemo_dist.testing.equivalence import Task, assert_equivalent, checkpoint, differences, reference, trained
from nemo_dist.testing.precision import FP32
from nemo_dist.testing.tiny_models import SPECIMENS

HALVES = {"param_dtype": "bfloat16", "reduce_dtype": "bfloat16"}


class Reductions(TorchDispatchMode):
    """Note the dtype of every tensor that is reduced over ranks."""

    def __init__(self):
        super().__init__()
        self.dtypes = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if "reduce_scatter" in str(function):
            self.dtypes.add(str(args[1].dtype))
        return function(*args, **(kwargs or {}))


def on_rank_dtypes(folder, policy):
    """Return the dtypes of: stored parameters, matmul inputs and weights, reductions, gradients, logits."""
    initialize_distributed("gloo")
    setup = DistributedSetup.build(strategy=FSDP2Config(mp_policy=policy))
    model = SPECIMENS["llama"].load.from_pretrained(folder, distributed_setup=setup, dtype=torch.float32)
    seen, logits = set(), set()
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(lambda m, args: seen.update({str(args[0].dtype), str(m.weight.dtype)}))
    model.register_forward_hook(lambda m, args, output: logits.add(str(output.logits.dtype)))
    with Reductions() as reductions:
        batch = SPECIMENS["llama"].batch(4, 8, torch.Generator().manual_seed(0))
        loss = setup.runtime(model).forward_backward(batch)
    assert torch.isfinite(loss)
    stored = {str(parameter.dtype) for parameter in model.parameters()}
    gradients = {str(parameter.grad.dtype) for parameter in model.parameters()}
    return stored, seen, reductions.dtypes, gradients, logits


@pytest.mark.parametrize(
    ("policy", "compute", "reduction", "output"),
    [
        (None, "torch.bfloat16", "torch.float32", "torch.bfloat16"),
        (HALVES, "torch.bfloat16", "torch.bfloat16", "torch.bfloat16"),
        ({"output_dtype": "float32", "param_dtype": "bfloat16"}, "torch.bfloat16", "torch.bfloat16", "torch.float32"),
        (FP32, "torch.float32", "torch.float32", "torch.float32"),
    ],
    ids=["default", "halves", "outputs", "full"],
)
def test_a_policy_sets_the_dtypes_of_compute_and_reduction(on_ranks, policy, compute, reduction, output):
    for stored, seen, reduced, gradients, logits in on_ranks(2, on_rank_dtypes, checkpoint("llama"), policy):
        assert stored == gradients == {"torch.float32"}
        assert seen == {compute}
        assert reduced == {reduction}
        assert logits == {output}


def test_the_default_trains_like_one_process_up_to_bfloat16(ranks):
    found = differences(trained(ranks(2), Task()), reference(Task()), tolerance=0.1)
    assert not [line for line in found if not line.startswith("gradients")], found
    assert differences(trained(ranks(2), Task()), reference(Task())), "bfloat16 cannot agree to 1e-5"


DEFAULT = {
    "hsdp": (4, "llama-tied", {"dp_replicate_size": 2}, {}),
    "tp": (4, "llama-tied", {"tp_size": 2}, {}),
    "cp": (2, "llama-tied", {"cp_size": 2}, {}),
    "cp-tp-recompute": (4, "qwen3", {"cp_size": 2, "tp_size": 2}, {"activation_checkpointing": "full"}),
    "ep": (2, "qwen3-moe", {"ep_size": 2}, {}),
    "images": (2, "llava", {}, {}),
    "five": (8, "qwen3-moe-deep", {"pp_size": 2, "cp_size": 2, "tp_size": 2, "ep_size": 4}, {}),
    **{
        f"{schedule}-{specimen}": (2, specimen, {"pp_size": 2}, {"pipeline_config": {"pp_schedule": schedule}})
        for schedule in ("gpipe", "1f1b", "looped_bfs", "interleaved_1f1b", "zero_bubble", "zbv", "dualpipev")
        for specimen in ("llama-deep", "llama-deep-tied")
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("case", DEFAULT)
def test_the_default_trains_under_every_axis_up_to_bfloat16(ranks, case):
    """Gradients are computed in another dtype than they are reduced in, and two batches have one reduction."""
    world, specimen, sizes, options = DEFAULT[case]
    task = Task(specimen=specimen, accumulate=2, lr=3e-3)
    found = trained(ranks(world), task, parallelism_sizes=ParallelismSizes(**sizes), **options)
    lines = differences(found, reference(task), tolerance=0.1)
    assert not [line for line in lines if not line.startswith("gradients")], lines


STORED = {
    "pp": ("llama-deep-tied", {"pp_size": 2}),
    "tp": ("llama-tied", {"tp_size": 2}),
    "cp": ("llama-tied", {"cp_size": 2}),
    "ep": ("qwen3-moe", {"ep_size": 2}),
    "fsdp2": ("llama-tied", {}),
}


@pytest.mark.filterwarnings("ignore:.*stored in bfloat16")
@pytest.mark.parametrize("axis", STORED)
def test_a_model_that_is_stored_in_bfloat16_trains_under_every_axis(ranks, axis):
    """Plans and stages are proven on models of the dtype of the checkpoint."""
    specimen, sizes = STORED[axis]
    task = Task(specimen=specimen, lr=3e-3, dtype="bfloat16")
    found = trained(ranks(2), task, parallelism_sizes=ParallelismSizes(**sizes))
    lines = differences(found, reference(task), tolerance=0.1)
    assert not [line for line in lines if not line.startswith("gradients")], lines


@pytest.mark.parametrize("policy", ["cpu", {"pin_memory": False}, CPUOffloadPolicy(pin_memory=False)], ids=repr)
def test_shards_on_the_cpu_train_like_one_process(ranks, policy):
    strategy = FSDP2Config(mp_policy=FP32, offload_policy=policy)
    assert_equivalent(ranks(2), Task(specimen="llama-tied"), strategy=strategy)


@cases(
    ("specimen", "sizes"),
    [
        ("llama-tied", {"tp_size": 2}),
        ("llama-tied", {"cp_size": 2}),
        ("llama-tied", {"dp_replicate_size": 2}),
        ("qwen3-moe", {"ep_size": 2}),
    ],
)
def test_shards_on_the_cpu_compose_with_every_axis(ranks, specimen, sizes):
    strategy = FSDP2Config(mp_policy=FP32, offload_policy="cpu")
    assert_equivalent(ranks(4), Task(specimen=specimen), strategy=strategy, parallelism_sizes=ParallelismSizes(**sizes))


@pytest.mark.parametrize("axis", ["pp", "ep"])
def test_compiled_blocks_are_refused_beside_pp_and_ep(axis):
    with pytest.raises(ValueError, match="enable_compile is not proven"):
        DistributedSetup.build(
            strategy=FSDP2Config(enable_compile=True),
            parallelism_sizes=ParallelismSizes(**{f"{axis}_size": 2}),
            world_size=4,
        )


COMPILED = {
    "plain": (2, {}, False, False),
    "recompute": (2, {}, False, "full"),
    "selective": (2, {}, False, "selective"),
    "context": (2, {"cp_size": 2}, False, False),
    "tensor": (2, {"tp_size": 2}, False, False),
    "sequence": (2, {"tp_size": 2}, True, "full"),
    "hsdp": (4, {"dp_replicate_size": 2}, False, False),
    "context-tensor": (4, {"cp_size": 2, "tp_size": 2}, True, "full"),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", COMPILED)
def test_compiled_blocks_train_like_one_process(ranks, case):
    world, sizes, sequence, mode = COMPILED[case]
    strategy = FSDP2Config(mp_policy=FP32, enable_compile=True, sequence_parallel=sequence)
    options = {"parallelism_sizes": ParallelismSizes(**sizes), "activation_checkpointing": mode}
    assert_equivalent(ranks(world), Task(length=16), strategy=strategy, **options)
