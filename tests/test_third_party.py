"""A folder outside this repository adds a strategy: install it, list it, run the kit on it, train with it."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[1] / "examples" / "nemo-dist-averaging"
KIT = """
from nemo_dist.testing import PluginConformance

class TestAveraging(PluginConformance):
    plugin = "averaging"
"""
WAITS = """
from nemo_dist.testing.comm_recorder import assert_no_deadlock
from nemo_dist.testing.equivalence import Task


def test_no_rank_waits_for_ever_on_nccl(ranks):
    assert_no_deadlock(ranks(2), Task(), strategy="averaging")
"""
ORDERS = """
from hypothesis import given, settings
from nemo_dist.testing import strategies
from nemo_dist.testing.call_orders import assert_order_changes_nothing


@settings(max_examples=5, deadline=None)
@given(order=strategies.call_orders())
def test_the_order_of_calls_changes_nothing(ranks, order):
    assert_order_changes_nothing(ranks(2), order, strategy="averaging")
"""
TRAIN = """
import torch
from nemo_dist import DistributedSetup, NeMoAutoModelForCausalLM, initialize_distributed
from nemo_dist_averaging import AveragingConfig
from transformers import LlamaConfig

env = initialize_distributed("gloo")
setup = DistributedSetup.build(strategy=AveragingConfig())
torch.manual_seed(0)
config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                     num_key_value_heads=2)
model = NeMoAutoModelForCausalLM.from_config(config, distributed_setup=setup)
runtime = setup.runtime(model)
optimizer = runtime.optimizer(torch.optim.AdamW, lr=3e-3)
losses = []
for step in range(20):
    tokens = (torch.arange(16) * (1 + runtime.dp_rank) % 61).repeat(2, 1)
    losses.append(runtime.forward_backward({"input_ids": tokens, "labels": tokens}).item())
    optimizer.step()
    optimizer.zero_grad()
if env.is_main:
    print("LOSSES", losses[0], losses[-1], setup.strategy.name)
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """Return an environment in which the example, copied out of this repository, is installed with pip."""
    folder = tmp_path_factory.mktemp("outside")
    source = shutil.copytree(EXAMPLE, folder / "source")
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run(
        [*command, "--target", str(folder / "site"), str(source)], check=True, capture_output=True, timeout=120
    )
    temporary = folder / "temporary"  # torchrun leaves its logs there
    temporary.mkdir()
    return {**os.environ, "PYTHONPATH": str(folder / "site"), "OMP_NUM_THREADS": "1", "TMPDIR": str(temporary)}


def run(installed, *command, cwd=None):
    return subprocess.run(
        [sys.executable, *command], env=installed, cwd=cwd, capture_output=True, text=True, timeout=300, check=False
    )


def test_it_is_a_package_of_at_most_forty_lines():
    assert len((EXAMPLE / "nemo_dist_averaging.py").read_text().splitlines()) <= 40


def test_the_catalogue_lists_it(installed):
    listed = run(installed, "-m", "nemo_dist.cli", "plugins", "--json")
    assert listed.returncode == 0, listed.stderr
    names = {plugin["name"] for plugin in json.loads(listed.stdout)}
    assert "averaging" in names


def test_it_passes_the_conformance_kit_and_waits_for_nobody(installed, tmp_path):
    (tmp_path / "test_averaging.py").write_text(KIT)
    (tmp_path / "test_waits.py").write_text(WAITS)
    result = run(installed, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tmp_path), cwd=tmp_path)
    assert result.returncode == 0, result.stdout[-3000:]
    assert "passed" in result.stdout and "failed" not in result.stdout


@pytest.mark.slow
def test_any_order_of_calls_trains_alike(installed, tmp_path):
    (tmp_path / "test_orders.py").write_text(ORDERS)
    result = run(installed, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tmp_path), cwd=tmp_path)
    assert result.returncode == 0, result.stdout[-3000:]


@pytest.mark.slow
def test_it_trains_under_torchrun(installed, tmp_path):
    (tmp_path / "train.py").write_text(TRAIN)
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    result = run(installed, *launch, str(tmp_path / "train.py"), cwd=tmp_path)
    assert result.returncode == 0, result.stderr[-3000:]
    (line,) = [line for line in result.stdout.splitlines() if line.startswith("LOSSES")]
    _, first, last, strategy = line.split()
    assert strategy == "averaging" and float(last) < 0.7 * float(first)
