"""A dry run is of any rank of any world, in one process, and says what a real rank holds."""

import json

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from nemo_dist import DistributedSetup, FSDP2Config, NeMoAutoModelForCausalLM, ParallelismSizes
from nemo_dist.cli.main import app
from nemo_dist.dry_run.holdings import Holdings, stepped
from nemo_dist.dry_run.imagined_world import Chunks, imagined_world
from nemo_dist.dry_run.rehearsal import dry_run
from nemo_dist.errors import RankError
from nemo_dist.mesh.rank_group import RankGroup
from nemo_dist.models.meta_model import meta_model
from nemo_dist.plugin.comm_estimate import readable
from nemo_dist.testing.equivalence import checkpoint
from nemo_dist.testing.tiny_models import SPECIMENS

OPTIONS = {
    "fsdp2": {"strategy": FSDP2Config()},
    "tp": {"strategy": FSDP2Config(), "parallelism_sizes": ParallelismSizes(tp_size=2)},
    "pp": {"strategy": FSDP2Config(), "parallelism_sizes": ParallelismSizes(pp_size=2)},
}


def on_rank_hold(folder, options):
    """Load and step for real, and return the bytes that this rank holds."""
    setup = DistributedSetup.build(**options)
    model = NeMoAutoModelForCausalLM.from_pretrained(folder, distributed_setup=setup)
    parts = list(getattr(model, "parts", [model]))
    return Holdings.of(parts, stepped(parts, torch.optim.AdamW))


@pytest.mark.parametrize("layout", OPTIONS)
def test_a_dry_run_says_the_bytes_that_real_ranks_hold(ranks, layout):
    folder = checkpoint("llama")
    for rank, held in enumerate(ranks(2).run(on_rank_hold, folder, OPTIONS[layout])):
        found = dry_run(OPTIONS[layout], folder, 2, rank, checkpoint=False)
        assert found.holdings == held and held.parameter_bytes > 0
        assert held.optimizer_bytes > 2 * held.gradient_bytes == 2 * held.parameter_bytes
    assert not dist.is_initialized()


def test_any_rank_of_sixteen_thousand_can_be_rehearsed():
    options = {"parallelism_sizes": ParallelismSizes(cp_size=2, dp_replicate_size=4)}
    found = dry_run(options, checkpoint("llama"), 16384, 9001, checkpoint=False)
    plan = DistributedSetup.build(**options, world_size=16384).plan
    place = plan.coordinates(9001)
    assert found.coordinates == {axis: index for axis, index in place.items() if plan.size(axis) > 1}
    assert {"cp": 2, "dp_replicate": 4, "dp_shard": 2048, "dp": 8192}.items() <= found.groups.items()
    assert found.holdings.parameter_bytes < 1e6 and "rank 9001 of 16384" in str(found)
    assert all(phase.peak_rss_bytes > 0 and phase.cpu_s >= 0 for phase in found.phases)


def test_the_command_prints_the_report_and_the_same_as_json():
    words = ["dry-run", str(checkpoint("llama")), "-n", "1"]
    assert "read at load" in CliRunner().invoke(app, words).stdout
    found = json.loads(CliRunner().invoke(app, [*words, "--json"]).stdout)
    assert found["world_size"] == 1 and found["holdings"]["parameter_bytes"] == found["holdings"]["read_bytes"]
    assert {
        "save_planning_cpu_s",
        "repeated_planning_cpu_s",
        "exchanged_bytes",
        "manifest_bytes",
        "load_planning_cpu_s",
        "peak_rss_bytes",
    } <= found["checkpoint"].keys()
    assert found["checkpoint"]["manifest_bytes"] > 1000
    assert found["checkpoint"]["written_bytes"] == found["holdings"]["parameter_bytes"] * 3  # and both moments


def test_a_rank_outside_of_the_world_is_refused():
    result = CliRunner().invoke(app, ["dry-run", str(checkpoint("llama")), "-n", "4", "--rank", "4"])
    assert result.exit_code == 2 and "there is no rank 4 of 4" in result.stderr
    with (
        imagined_world(2, 0),
        pytest.raises(RankError, match="a dry run in a process of its own"),
        imagined_world(2, 0),
    ):
        pass


def test_imagined_ranks_say_what_this_one_says():
    with imagined_world(8, 3):
        ranks = RankGroup()
        assert (ranks.size, ranks.rank) == (8, 3)
        assert ranks.collect("a meeting", lambda: {"a": 1}) == [{"a": 1}] * 8
        assert ranks.distinct("a text", lambda: "a") == [([range(8)], "a")]
        assert ranks.total([1, 2]) == [8, 16]
    assert not dist.is_initialized()


@given(st.integers(1, 40), st.integers(1, 12), st.integers(0, 1))
def test_chunks_that_are_made_one_by_one_are_those_of_torch(size, count, dim):
    whole = torch.arange(size * 3).view((size, 3) if dim == 0 else (3, size))
    expected = list(torch.chunk(whole, count, dim))
    found = Chunks(whole, count, dim)
    assert all(torch.equal(found[index], chunk) for index, chunk in enumerate(expected))
    assert all(found[index].numel() == 0 for index in range(len(expected), count))


@pytest.fixture
def in_bfloat16(tmp_path):
    """The folder of a config whose files are in bfloat16, as those of most published models."""
    config = SPECIMENS["llama-deep"].config()
    config.dtype = torch.bfloat16
    config.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def rehearsed(*words):
    result = CliRunner().invoke(app, ["dry-run", *map(str, words), "--json"])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def write(path, text):
    path.write_text(text)
    return path


def test_bytes_are_those_of_the_dtype_that_is_stored(in_bfloat16, tmp_path):
    """A recipe stores parameters in float32 unless it says another; a load without one takes that of the files."""
    half = rehearsed(in_bfloat16, "-n", 2)
    single = rehearsed(in_bfloat16, "-n", 2, "--dtype", "fp32")
    section = "distributed: {strategy: fsdp2}\n"
    recipe = write(tmp_path / "recipe.yaml", f"model: {{path: {in_bfloat16}}}\ndata: {{date: 2024-01-01}}\n{section}")
    auto = write(tmp_path / "auto.yaml", f"model: {{path: {in_bfloat16}, dtype: auto}}\n{section}")
    alone = write(tmp_path / "alone.yaml", section)

    assert (half["dtype"], single["dtype"]) == ("bfloat16", "float32")
    for kind in ("parameter_bytes", "gradient_bytes", "read_bytes"):
        assert single["holdings"][kind] == 2 * half["holdings"][kind]
    of_files = [rehearsed(in_bfloat16, "-n", 2, "--config", path)["holdings"] for path in (recipe, auto, alone)]
    assert of_files == [single["holdings"], half["holdings"], half["holdings"]]
    assert rehearsed(in_bfloat16, "-n", 2, "--config", recipe, "--dtype", "bf16")["holdings"] == half["holdings"]
    assert "parameters in bfloat16, as rank 0 of 2" in str(dry_run({}, in_bfloat16, 2, checkpoint=False))
    text = CliRunner().invoke(app, ["dry-run", str(in_bfloat16), "-n", "2", "--dtype", "float8"])
    assert text.exit_code == 2 and "--dtype must be one of float32, bfloat16" in text.stderr


def test_the_plan_of_a_recipe_counts_bytes_in_its_dtype(in_bfloat16, tmp_path):
    """A gradient is reduced in the dtype of the parameters under ddp."""
    section = "distributed: {strategy: ddp}\n"
    path = write(tmp_path / "recipe.yaml", f"model: {{path: {in_bfloat16}}}\n{section}")
    words = ["explain", "-n", "2", "--model", str(in_bfloat16), "--config", str(path)]
    parameters = sum(p.numel() for p in meta_model(in_bfloat16).parameters())

    assert f"once: {readable(4 * parameters)}" in CliRunner().invoke(app, words).stdout
    assert f"once: {readable(2 * parameters)}" in CliRunner().invoke(app, [*words, "--dtype", "bfloat16"]).stdout


def test_what_plugins_do_is_said_of_the_whole_model():
    """Of the stage alone, fsdp2 would divide by the pipeline's ranks twice."""
    folder = checkpoint("llama")
    said = dry_run(OPTIONS["pp"], folder, 2, checkpoint=False).plugins
    setup = DistributedSetup.build(**OPTIONS["pp"], world_size=2)

    assert said == tuple(setup.calls.explain(plan=setup.plan, model=meta_model(folder)))
    assert any("holds whole gradients" in line for line in said)


def test_a_rank_of_a_setup_for_some_ranks_has_its_own_place(tmp_path):
    folder = checkpoint("llama")
    options = {"parallelism_sizes": ParallelismSizes(tp_size=2), "ranks": [4, 5, 6, 7]}
    found = dry_run(options, folder, 8, 5, checkpoint=True)
    assert (found.rank, found.world_size, found.coordinates) == (5, 8, {"dp_shard": 0, "tp": 1})
    assert found.checkpoint is not None and found.checkpoint.files == 4
    assert dry_run(options, folder, 8, checkpoint=False).rank == 4

    path = write(tmp_path / "section.yaml", "distributed: {strategy: fsdp2, ranks: [0, 1, 2, 3]}\n")
    words = ["dry-run", str(folder), "-n", "8", "--config", str(path), "--rank"]
    for rank, why in (
        ("5", "rank 5 is none of the ranks of this setup, [0, 1, 2, 3]"),
        ("8", "there is no rank 8 of 8"),
    ):
        result = CliRunner().invoke(app, [*words, rank])
        assert result.exit_code == 2 and why in result.stderr
