"""Training a pipeline is training on one process: loss, every gradient, clipped norm, three AdamW steps."""

import pytest

from nemo_dist import FSDP2Config, ParallelismSizes, PipelineConfig
from nemo_dist.testing.equivalence import Task, assert_equivalent

FP32 = {"param_dtype": "float32", "reduce_dtype": "float32", "output_dtype": "float32"}


def pipelined(pp=2, schedule="1f1b", dp_replicate=None, reshard=None, **options):
    return {
        "strategy": FSDP2Config(mp_policy=FP32, reshard_after_forward=reshard),
        "parallelism_sizes": ParallelismSizes(pp_size=pp, dp_replicate_size=dp_replicate),
        "pipeline_config": PipelineConfig(pp_schedule=schedule, **options),
    }


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
def test_a_schedule_computes_what_one_process_computes(ranks, schedule):
    assert_equivalent(ranks(2), Task(specimen="llama"), **pipelined(2, schedule))
