"""A process that makes, saves and drops many setups holds no more objects after many than after a few."""

import gc
import warnings
import weakref
from types import SimpleNamespace

import pytest
import torch
from cases import cases, slow
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from nemo_dist import DDPConfig, DistributedSetup, FSDP2Config, ParallelismSizes, RunFolder
from nemo_dist.testing.live_objects import grown, live_objects
from nemo_dist.testing.tiny_models import SPECIMENS
from nemo_dist_context.attention import SharedAttention
from nemo_dist_context.sequence_layout import SequenceLayout

SETUPS = {
    "fsdp2": {"strategy": FSDP2Config()},
    "ddp": {"strategy": DDPConfig()},
    "tp": {"strategy": FSDP2Config(sequence_parallel=True), "parallelism_sizes": ParallelismSizes(tp_size=2)},
    "cp": {"strategy": FSDP2Config(), "parallelism_sizes": ParallelismSizes(cp_size=2)},
    "pp": {"strategy": FSDP2Config(), "parallelism_sizes": ParallelismSizes(pp_size=2)},
    "ep": {"strategy": FSDP2Config(), "parallelism_sizes": ParallelismSizes(ep_size=2)},
    "recompute": {"strategy": FSDP2Config(), "activation_checkpointing": "selective"},
}
FIRST = 4  # which fill caches


def start(name):
    """Return the runtime and optimizer of a new model after a step."""
    setup = DistributedSetup.build(**SETUPS[name])
    specimen = SPECIMENS["qwen3-moe" if name == "ep" else "llama"]
    model = specimen.load.from_config(specimen.config(), distributed_setup=setup, dtype=torch.float32)
    runtime = setup.runtime(model)
    optimizer = runtime.optimizer(torch.optim.AdamW)
    runtime.forward_backward(specimen.batch(4, 16, torch.Generator().manual_seed(0)))
    runtime.clip_grad_norm_(1.0)
    optimizer.step()
    optimizer.zero_grad()
    return runtime, optimizer


def held_after(count, work):
    """Return which objects there are more of after *count* calls of *work* than after the first ones."""
    warnings.simplefilter("ignore")
    for index in range(FIRST):
        work(index)
    before = live_objects()
    for index in range(FIRST, FIRST + count):
        work(index)
    return grown(before, live_objects())


def on_rank_set_up(name, count):
    return held_after(count, lambda index: start(name))


@cases(
    ("name", "count"),
    [
        ("fsdp2", 4),
        ("cp", 2),
        *(slow(name, 8) for name in SETUPS),
        slow("fsdp2", 300),
        slow("tp", 300),
    ],
    lambda name, count: f"{name}, {count} setups",
)
@pytest.mark.timeout(1800)
def test_setups_that_are_dropped_leave_no_object(ranks, name, count):
    assert ranks(2).run(on_rank_set_up, name, count, timeout=1500.0) == [{}, {}]


def on_rank_save(path, name, count):
    runtime, optimizer = start(name)
    folder = RunFolder(path, keep_last=2)

    def save(index):
        folder.save(runtime, optimizer, step=index + 1, asynchronous=index % 2 == 0).wait()
        folder.resume(runtime, optimizer)

    return held_after(count, save)


@cases(
    ("name", "count"),
    [("fsdp2", 4), slow("pp", 8), slow("tp", 8), slow("fsdp2", 300)],
    lambda name, count: f"{name}, {count} saves",
)
@pytest.mark.timeout(1800)
def test_saves_and_loads_leave_no_object(ranks, tmp_path, name, count):
    assert ranks(2).run(on_rank_save, tmp_path, name, count, timeout=1500.0) == [{}, {}]


def test_an_attention_that_is_gone_leaves_its_base_and_gives_its_name_back():
    def made(base):
        attention = SharedAttention(
            layout=SequenceLayout(size=2, rank=0, balanced=True), group=None, method="all_gather", base=base
        )
        return attention, attention.register()

    first, name = made("sdpa")
    heads, module = torch.randn(1, 2, 4, 8), SimpleNamespace(num_key_value_groups=1, training=False, is_causal=True)
    expected = ALL_ATTENTION_FUNCTIONS["sdpa"](module, heads, heads, heads, None)[0]
    held = weakref.ref(first)
    del first
    gc.collect()
    assert held() is None
    assert torch.equal(ALL_ATTENTION_FUNCTIONS[name](module, heads, heads, heads, None)[0], expected)
    _other, other_name = made("eager")
    _again, name_again = made("sdpa")
    assert other_name != name == name_again
