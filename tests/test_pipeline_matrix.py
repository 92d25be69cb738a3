"""Every schedule beside every axis computes what one process computes: the whole matrix, which takes hours.

It goes in rounds. In the first every schedule, with every number of stages on a rank, meets every mesh once, with or
without recomputation and with one of four models, such that all pairs of schedule, mesh, mode and model come about; the
rounds after it go through the other modes and models. All models have 9 layers, which no number of stages
divides.
"""

from itertools import combinations

import pytest
from cases import case_id

from nemo_dist import FSDP2Config, ParallelismSizes, PipelineConfig
from nemo_dist.testing.equivalence import Task, assert_equivalent
from nemo_dist.testing.precision import FP32

SPECIMENS = ("llama-deep", "llama-deep-tied", "qwen3-deep", "classifier")
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
    "sequence-tp": (4, {"tp_size": 2}),
    "replicas": (4, {"dp_replicate_size": 2}),
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
OPTIONS = [(mode, specimen) for specimen in SPECIMENS for mode in (False, "full")]
ROUNDS = [
    [
        (mesh, schedule, per_rank, *OPTIONS[(3 * i + j + turn) % len(OPTIONS)])
        for i, mesh in enumerate(MESHES)
        for j, (schedule, per_rank) in enumerate(SCHEDULES)
    ]
    for turn in range(len(OPTIONS))
]


def name_of(cell):
    mesh, schedule, per_rank, mode, specimen = cell
    return case_id(specimen, mesh, f"{schedule} with {per_rank} a rank", mode)


def test_the_first_round_meets_every_pair():
    everything = [cell for cells in ROUNDS for cell in cells]
    assert len(set(everything)) == len(MESHES) * len(SCHEDULES) * len(OPTIONS)
    for a, b in combinations((slice(0, 1), slice(1, 3), slice(3, 4), slice(4, 5)), 2):
        assert {(cell[a], cell[b]) for cell in ROUNDS[0]} == {(cell[a], cell[b]) for cell in everything}


@pytest.mark.slow
@pytest.mark.parametrize("cell", [cell for cells in ROUNDS for cell in cells], ids=name_of)
def test_every_composition_of_a_pipeline_matches_one_process(ranks, cell):
    mesh, schedule, per_rank, mode, specimen = cell
    world, given = MESHES[mesh]
    sizes = ParallelismSizes(**{"pp_size": 2, **given})
    options = {}
    if per_rank == 1 and schedule not in ("GPipe", "1F1B"):  # their default is 2
        options = {"layers_per_stage": {2: 5, 4: 3}[sizes.pp_size], "round_virtual_stages_to_pp_multiple": "up"}
    lr = 1e-2
    if specimen == "classifier":
        # cp has no tokens to share out of a loss with one label for a sequence: such a model is refused there.
        specimen = "llama-tokens" if sizes.cp_size > 1 else "llama-sequences"
        lr = 3e-3  # with 1e-2 the third norm of one process is itself 1.2e-5 away from float64
    assert_equivalent(
        ranks(world),
        Task(specimen=specimen, rows=sizes.dp(world) * 2 * sizes.pp_size, length=13, lr=lr),
        strategy=FSDP2Config(mp_policy=FP32, sequence_parallel=mesh.startswith("sequence")),
        parallelism_sizes=sizes,
        pipeline_config=PipelineConfig(pp_schedule=schedule, **options),
        activation_checkpointing=mode,
    )
