"""Every plugin that ships passes the kit that a third party's has to pass."""

import os
import shutil
from pathlib import Path

import pytest

from nemo_dist import FSDP2Config, ParallelismSizes, Registry
from nemo_dist.testing import PluginConformance
from nemo_dist.testing.fake_cuda import WithCudaCalls
from nemo_dist.testing.precision import FP32

PLUGINS = Path(__file__).parents[1] / "plugins"


class BesideMegatron:
    """Tries a plugin beside Megatron-FSDP too, which needs CUDA's calls."""

    def test_it_composes_with_what_it_says(self, ranks):
        super().test_it_composes_with_what_it_says(lambda world_size: WithCudaCalls(ranks(world_size)))


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


class TestRecompute(BesideMegatron, PluginConformance):
    plugin = "recompute"
    build = {"strategy": FSDP2Config(mp_policy=FP32), "plugins": ("recompute",)}


class TestTensor(BesideMegatron, PluginConformance):
    plugin = "tensor"
    build = {
        "strategy": FSDP2Config(mp_policy=FP32, sequence_parallel=True),
        "parallelism_sizes": ParallelismSizes(tp_size=2),
    }


class TestContext(BesideMegatron, PluginConformance):
    plugin = "context"
    build = {"strategy": FSDP2Config(mp_policy=FP32), "parallelism_sizes": ParallelismSizes(cp_size=2)}


class TestMoE(PluginConformance):
    plugin = "moe"
    build = {"strategy": FSDP2Config(mp_policy=FP32), "parallelism_sizes": ParallelismSizes(ep_size=2)}
    specimen = "qwen3-moe"


@pytest.fixture(scope="module")
def mirrored(tmp_path_factory):
    """Install a copy of one of our plugins from elsewhere, under another name: it has no privilege that ours have."""
    folder = tmp_path_factory.mktemp("mirrored")
    package = shutil.copytree(PLUGINS / "nemo_dist_ddp", folder / "nemo_dist_mirror")
    for path in package.glob("*.py"):
        text = path.read_text().replace("nemo_dist_ddp", "nemo_dist_mirror").replace('"ddp"', '"mirror"')
        path.write_text(text.replace('f"ddp: ', 'f"mirror: ').replace("_nemo_dist_replicas", "_mirror_replicas"))
    info = folder / "nemo_dist_mirror-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: nemo-dist-mirror\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[nemo_dist]\nmirror = nemo_dist_mirror:DDP\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        patch.setenv("PYTHONPATH", str(folder), prepend=os.pathsep)
        yield


@pytest.mark.usefixtures("mirrored")
class TestOneOfOursFromOutside(PluginConformance):
    plugin = "mirror"


def test_every_plugin_that_ships_is_tested_here():
    tested = {kit.plugin for kit in PluginConformance.__subclasses__()}
    ours = {entry.name for entry in Registry().entries if entry.dist and entry.dist.name == "nemo-dist"}

    assert ours and ours <= tested
