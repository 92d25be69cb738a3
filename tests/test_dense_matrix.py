"""Every factorisation of the world into dp_replicate x dp_shard x cp x tp computes what one process computes.

With sequence parallelism on and off and the three modes of activation checkpointing. A sample runs by default,
``make matrix`` runs all of it.
"""

import random
from itertools import product

import pytest
from cases import case_id

from nemo_dist import FSDP2Config, ParallelismSizes
from nemo_dist.testing.equivalence import Task, assert_equivalent
from nemo_dist.testing.precision import FP32

SPECIMENS = ("llama", "llama-tied", "qwen3")
# 8 tensor-parallel ranks need 8 heads: Llama has 8 key heads then, the others fewer, which every rank keeps whole.
HEADS = {"llama": "llama-heads", "llama-tied": "llama-heads-tied", "qwen3": "qwen3-heads"}
MODES = (False, "full", "selective")


def factorisations(world):
    """Yield (dp_replicate, dp_shard, cp, tp) that multiply to *world*; replicas and nothing else are ddp's business."""
    sizes = [size for size in (1, 2, 4, 8) if size <= world]
    for replicate, shard, cp, tp in product(sizes, repeat=4):
        if replicate * shard * cp * tp == world and replicate != world:
            yield replicate, shard, cp, tp


MATRIX = [
    (world, sizes, sequence_parallel, mode, HEADS[specimen] if sizes[3] == 8 else specimen)
    for world in (2, 4)
    for sizes in factorisations(world)
    for sequence_parallel in ((False, True) if sizes[3] > 1 else (False,))
    for mode in MODES
    for specimen in SPECIMENS
]
# One of each factorisation, with the rest drawn, so that a run meets every pair of axes.
SAMPLE = [
    random.Random(f"{world}{sizes}").choice([cell for cell in MATRIX if cell[:2] == (world, sizes)])
    for world in (2, 4)
    for sizes in factorisations(world)
]


def prove(ranks, world, sizes, sequence_parallel, mode, specimen):
    replicate, _, cp, tp = sizes
    assert_equivalent(
        ranks(world),
        Task(specimen=specimen, length=13),  # a length that neither cp nor tp divides
        strategy=FSDP2Config(mp_policy=FP32, sequence_parallel=sequence_parallel),
        parallelism_sizes=ParallelismSizes(dp_replicate_size=replicate, cp_size=cp, tp_size=tp),
        activation_checkpointing=mode,
    )


def name_of(cell):
    world, sizes, sequence_parallel, mode, specimen = cell
    axes = dict(zip(("dp_replicate", "dp_shard", "cp", "tp"), sizes, strict=True))
    return case_id(specimen, world, axes, sequence_parallel and "sequence", mode)


@pytest.mark.parametrize("cell", SAMPLE, ids=name_of)
def test_a_sampled_composition_matches_one_process(ranks, cell):
    prove(ranks, *cell)


@pytest.mark.slow
@pytest.mark.parametrize("cell", [cell for cell in MATRIX if cell not in SAMPLE], ids=name_of)
def test_every_composition_matches_one_process(ranks, cell):
    prove(ranks, *cell)


# Beside another axis, the data-parallel ranks may all be replicas, of one shard each: with what else fsdp2 does.
REPLICAS = {
    "reduced after every batch": ({"defer_fsdp_grad_sync": False}, {"tp_size": 2}, 2),
    "offload": ({"offload_policy": "cpu"}, {"tp_size": 2}, 1),
    "resharded": ({"reshard_after_forward": True}, {"cp_size": 2}, 2),
    "compiled": ({"enable_compile": True}, {"cp_size": 2}, 1),
    "deferred": ({}, {"tp_size": 2}, 2),
    "stages": ({}, {"pp_size": 2}, 2),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", REPLICAS)
def test_replicas_of_one_shard_take_every_option(ranks, name):
    options, sizes, accumulate = REPLICAS[name]
    assert_equivalent(
        ranks(4),
        Task(specimen="llama-tied" if name == "deferred" else "llama", accumulate=accumulate),
        strategy=FSDP2Config(mp_policy=FP32, **options),
        parallelism_sizes=ParallelismSizes(dp_replicate_size=2, **sizes),
    )
