"""Every plugin that ships passes the kit that a third party's has to pass."""

import pytest

from nemo_dist import FSDP2Config, ParallelismSizes, Registry
from nemo_dist.testing import PluginConformance
from nemo_dist.testing.fake_cuda import WithCudaCalls
from nemo_dist.testing.precision import FP32


class TestFSDP2(PluginConformance):
    plugin = "fsdp2"
    build = {"strategy": FSDP2Config(mp_policy=FP32)}


class TestDDP(PluginConformance):
    plugin = "ddp"


class TestPipeline(PluginConformance):
    plugin = "pipeline"
    build = {"strategy": FSDP2Config(mp_policy=FP32), "parallelism_sizes": ParallelismSizes(pp_size=2)}


class TestMegatronFSDP(PluginConformance):
    plugin = "megatron_fsdp"

    @pytest.fixture
    def ranks(self, ranks):
        return lambda world_size: WithCudaCalls(ranks(world_size))


class TestRecompute(PluginConformance):
    plugin = "recompute"
    build = {"strategy": FSDP2Config(mp_policy=FP32), "plugins": ("recompute",)}


class TestTensor(PluginConformance):
    plugin = "tensor"
    build = {
        "strategy": FSDP2Config(mp_policy=FP32, sequence_parallel=True),
        "parallelism_sizes": ParallelismSizes(tp_size=2),
    }


class TestContext(PluginConformance):
    plugin = "context"
    build = {"strategy": FSDP2Config(mp_policy=FP32), "parallelism_sizes": ParallelismSizes(cp_size=2)}


class TestMoE(PluginConformance):
    plugin = "moe"
    build = {"strategy": FSDP2Config(mp_policy=FP32), "parallelism_sizes": ParallelismSizes(ep_size=2)}
    specimen = "qwen3-moe"


def test_every_plugin_that_ships_is_tested_here():
    tested = {kit.plugin for kit in PluginConformance.__subclasses__()}
    ours = {entry.name for entry in Registry().entries if entry.dist and entry.dist.name == "nemo-dist"}

    assert ours and ours <= tested
