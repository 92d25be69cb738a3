"""Every schedule beside every axis computes what one process computes: the whole matrix, which takes long.

Meshes, schedules with their numbers of stages on a rank, and recomputation are combined fully. Each combination trains
two of the four models, drawn in turn, so that every model meets every schedule, mesh and mode. All have 9 layers, which
no number of stages divides.
"""

import pytest

from nemo_dist import FSDP2Config, ParallelismSizes, PipelineConfig
from nemo_dist.testing.equivalence import Task, assert_equivalent

FP32 = {"param_dtype": "float32", "reduce_dtype": "float32", "output_dtype": "float32"}
SPECIMENS = ("llama-deep", "llama-deep-tied", "qwen3-deep", "llama-sequences")
MESHES = {
    "alone": (2, {}),
    "fsdp2": (4, {}),
    "tp": (4, {"tp_size": 2}),
    "cp": (4, {"cp_size": 2}),
    "hsdp": (8, {"dp_replicate_size": 2}),
    "fsdp2-tp": (8, {"tp_size": 2}),
    "fsdp2-cp": (8, {"cp_size": 2}),
    "cp-tp": (8, {"cp_size": 2, "tp_size": 2}),
    "pp4": (4, {"pp_size": 4}),
    "pp4-fsdp2": (8, {"pp_size": 4}),
    "pp4-tp": (8, {"pp_size": 4, "tp_size": 2}),
    "pp4-cp": (8, {"pp_size": 4, "cp_size": 2}),
}
SCHEDULES = (
    ("GPipe", 1),
    ("1F1B", 1),
    ("LoopedBFS", 1),
    ("LoopedBFS", 2),
    ("Interleaved1F1B", 1),
    ("Interleaved1F1B", 2),
    ("InterleavedZeroBubble", 1),
    ("InterleavedZeroBubble", 2),
    ("ZBVZeroBubble", 2),
    ("DualPipeV", 2),
)
MATRIX = [
    (mesh, schedule, per_rank, mode, SPECIMENS[(i + j + 2 * k + turn) % 4])
    for i, mesh in sorted(enumerate(MESHES), key=lambda pair: MESHES[pair[1]][0])  # the pools are made by world
    for j, (schedule, per_rank) in enumerate(SCHEDULES)
    for k, mode in enumerate((False, "full"))
    for turn in (0, 1)
]


def name_of(cell):
    mesh, schedule, per_rank, mode, specimen = cell
    return f"{mesh}-{schedule}-{per_rank}-{mode or 'none'}-{specimen}"


@pytest.mark.slow
@pytest.mark.parametrize("cell", MATRIX, ids=name_of)
def test_every_composition_of_a_pipeline_computes_what_one_process_computes(ranks, cell):
    mesh, schedule, per_rank, mode, specimen = cell
    world, given = MESHES[mesh]
    sizes = ParallelismSizes(**{"pp_size": 2, **given})
    options = {}
    if per_rank == 1 and schedule not in ("GPipe", "1F1B"):  # their default is 2
        options = {"layers_per_stage": {2: 5, 4: 3}[sizes.pp_size], "round_virtual_stages_to_pp_multiple": "up"}
    assert_equivalent(
        ranks(world),
        Task(specimen=specimen, rows=sizes.dp(world) * 2 * sizes.pp_size, length=13),
        strategy=FSDP2Config(mp_policy=FP32),
        parallelism_sizes=sizes,
        pipeline_config=PipelineConfig(pp_schedule=schedule, **options),
        activation_checkpointing=mode,
    )
