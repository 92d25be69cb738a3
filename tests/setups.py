"""Setups that several test files train, load or export under."""

from nemo_dist import DDPConfig, FSDP2Config, ParallelismSizes
from nemo_dist.testing.precision import FP32

# Keywords of ``DistributedSetup.build``, in float32: shards, replicas of shards (on 4 ranks), replicas.
DATA_PARALLEL = {
    "fsdp2": {"strategy": FSDP2Config(mp_policy=FP32)},
    "hsdp": {"strategy": FSDP2Config(mp_policy=FP32), "parallelism_sizes": ParallelismSizes(dp_replicate_size=2)},
    "ddp": {"strategy": DDPConfig()},
}
