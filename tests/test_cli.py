"""The command line: what it prints, what it refuses, and the demo for real."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from types import NoneType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from nemo_dist import DistributedSetup, ParallelismSizes
from nemo_dist.cli.demo import verify
from nemo_dist.cli.demo_config import DemoOptions
from nemo_dist.cli.demo_dataset import Windows, collate, read
from nemo_dist.cli.main import app

run = CliRunner()


def refused(*arguments: str) -> str:
    """Run a command that must be refused, and return its message."""
    result = run.invoke(app, list(arguments))
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("error: ") and "Traceback" not in result.stderr
    assert result.stdout == ""
    return result.stderr


def test_files_that_cannot_be_read_or_written_are_named_in_words(tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text("model: {}")
    for command in (["train"], ["plan", "-n", "2", "--config"]):
        said = refused(*command, f"{tmp_path}/jobs.yaml")
        assert f"{tmp_path}/jobs.yaml cannot be read: No such file or directory; did you mean 'job.yaml'?" in said
    said = refused("explain", "-n", "2", "--html", f"{tmp_path}/gone/page.html")
    assert said == f"error: --html {tmp_path}/gone/page.html cannot be written: No such file or directory\n"


def test_planning_explaining_and_listing_plugins_import_no_torch() -> None:
    code = (
        "import sys; from typer.testing import CliRunner; from nemo_dist.cli.main import app\n"
        "for command in (['plan', '-n', '16384'], ['explain', '-n', '8'], ['plugins'], ['--help']):\n"
        "    assert CliRunner().invoke(app, command).exit_code == 0, command\n"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=240).returncode == 0


def test_plan_shows_the_axes_and_the_groups() -> None:
    result = run.invoke(app, ["plan", "--world-size", "8", "--dp-replicate", "2", "--rank", "5"])
    assert result.exit_code == 0
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in result.stdout.splitlines() if "│" in line]
    assert ["dense", "dp_replicate", "2", "fsdp2"] in rows and ["dense", "tp", "1", "-"] in rows
    assert ["dp_replicate", "4", "2", "[0 4]  [1 5]  [2 6]  [3 7]"] in rows
    assert "rank 5: pp 0, dp_replicate 1, dp_shard 1, cp 0, tp 0" in result.stdout


def test_plan_as_json_is_the_plan() -> None:
    result = run.invoke(app, ["plan", "--world-size", "8", "--dp-replicate", "2", "--rank", "6", "--json"])
    plan = DistributedSetup.build(parallelism_sizes=ParallelismSizes(dp_replicate_size=2), world_size=8).plan
    data = json.loads(result.stdout)
    assert data["world_size"] == 8 and data["plugins"] == ["fsdp2"]
    dense = data["views"][0]
    assert [(axis["name"], axis["size"]) for axis in dense["axes"]] == [(one.name, one.size) for one in plan.dense.axes]
    assert {axis["name"]: axis["plugin"] for axis in dense["axes"]}["dp_shard"] == "fsdp2"
    assert dense["flattened"]["dp"] == {"axes": ["dp_replicate", "dp_shard"], "size": 8}
    assert data["groups"] == {name: [list(group) for group in plan.groups(name)] for name in data["groups"]}
    assert {"dp_replicate", "dp_shard", "tp", "dp", "dp_cp"} <= set(data["groups"])
    assert data["rank"]["coordinates"] == plan.coordinates(6) and data["rank"]["batch_ranks"] == [6]


def test_wrong_sizes_print_one_error_on_stderr() -> None:
    assert "world_size 6 is not divisible by" in refused("plan", "-n", "6", "--dp", "4", "--tp", "4")
    assert "dp_size must be an int from 1 up (got 0)" in refused("plan", "-n", "4", "--dp", "0")
    assert "did you mean 'fsdp2'?" in refused("explain", "-n", "4", "--strategy", "fdsp2")
    assert "rank must be an int from 0 to 3 (got 4)" in refused("plan", "-n", "4", "--rank", "4", "--json")
    assert refused("plan", "-n", "6", "--dp", "4", "--dp-replicate", "3").count("\n- ") >= 2


def test_explain_prints_the_explanation_of_the_setup() -> None:
    result = run.invoke(app, ["explain", "--world-size", "4", "--strategy", "ddp"])
    assert result.stdout.strip() == DistributedSetup.build(strategy="ddp", world_size=4).explain()


def test_plugins_are_listed_with_where_they_come_from() -> None:
    rows = {row["name"]: row for row in json.loads(run.invoke(app, ["plugins", "--json"]).stdout)}
    fsdp2 = rows["fsdp2"]
    assert fsdp2["distribution"] == "nemo-dist" and fsdp2["version"] and fsdp2["error"] is None
    assert "dp_shard" in fsdp2["axes"] and fsdp2["doc"].endswith(".")
    shown = run.invoke(app, ["plugins"]).stdout
    assert all(name in shown for name in rows)


def test_a_plugin_that_does_not_import_is_listed_as_broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info = tmp_path / "half_made-2.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: half-made\nVersion: 2.0\n")
    (info / "entry_points.txt").write_text("[nemo_dist]\nhalf = half_made:Half\n")
    (tmp_path / "half_made.py").write_text("import a_module_that_is_not_there\n")
    monkeypatch.syspath_prepend(tmp_path)
    rows = {row["name"]: row for row in json.loads(run.invoke(app, ["plugins", "--json"]).stdout)}
    assert (rows["half"]["distribution"], rows["half"]["version"]) == ("half-made", "2.0")
    assert rows["half"]["order"] == {"number": None, "name": None} and rows["half"]["doc"] is None
    assert "No module named 'a_module_that_is_not_there'" in rows["half"]["error"]
    assert rows["fsdp2"]["error"] is None
    assert "BROKEN" in run.invoke(app, ["plugins"]).stdout


# Of each key, the types of its value; docs/tutorial.md documents them.
SCHEMA: dict[str, Any] = {
    "name": str,
    "distribution": (str, NoneType),
    "version": (str, NoneType),
    "entry_point": str,
    "default_for": list,
    "aliases": list,
    "order": dict,
    "axes": list,
    "roles": dict,
    "composes_with": list,
    "options": list,
    "doc": (str, NoneType),
    "error": (str, NoneType),
}


def test_plugins_as_json_have_the_documented_schema() -> None:
    found = json.loads(run.invoke(app, ["plugins", "--json"]).stdout)
    assert [row["name"] for row in found] == sorted(row["name"] for row in found)
    for row in found:
        assert list(row) == list(SCHEMA) and all(isinstance(row[key], kind) for key, kind in SCHEMA.items())
        assert list(row["order"]) == ["number", "name"]
        assert all(list(option) == ["name", "type", "default"] for option in row["options"])
        lists = (row["default_for"], row["aliases"], row["axes"], row["composes_with"])
        assert all(isinstance(text, str) for texts in lists for text in texts)
    page = (Path(__file__).parents[1] / "docs" / "tutorial.md").read_text().split("## For programs")[1]
    assert set(SCHEMA) <= set(re.findall(r"`(\w+)`", page))


def test_plugins_as_json_say_what_their_classes_say() -> None:
    rows = {row["name"]: row for row in json.loads(run.invoke(app, ["plugins", "--json"]).stdout)}
    assert rows["fsdp2"]["order"] == {"number": 70, "name": "DATA"} and "tp" in rows["fsdp2"]["composes_with"]
    assert rows["fsdp2"]["default_for"] == ["strategy"] and rows["megatron_fsdp"]["aliases"] == ["mfsdp"]
    assert rows["context"]["options"] == [
        {"name": "method", "type": "str", "default": "all_gather"},
        {"name": "balance", "type": "bool | None", "default": None},
    ]
    assert rows["recompute"]["options"][1]["default"] == ["all"]  # a tuple is a list


def test_a_new_plugin_is_refused_where_its_name_or_folder_is_taken(tmp_path: Path) -> None:
    into = ("--into", str(tmp_path))
    assert "must be a lower-case identifier, like token_meter (got 'Meter')" in refused("new-plugin", "Meter", *into)
    assert "must be a lower-case identifier" in refused("new-plugin", "class", *into)
    assert "plugin 'fsdp2' is installed already, from nemo-dist" in refused("new-plugin", "fsdp2", *into)
    assert "plugin 'mfsdp' is installed already" in refused("new-plugin", "mfsdp", *into)
    assert run.invoke(app, ["new-plugin", "token-meter", *into]).exit_code == 0
    assert "is there already; choose another name" in refused("new-plugin", "token_meter", *into)
    assert [path.name for path in tmp_path.iterdir()] == ["nemo-dist-token-meter"]


def test_a_check_of_a_plugin_that_is_not_there_starts_nothing() -> None:
    assert "no plugin 'fsdp3' is installed; did you mean 'fsdp2'?" in refused("plugins", "check", "fsdp3")
    assert "there is no tiny model 'lama'; did you mean 'llama'?" in refused(
        "plugins", "check", "ddp", "--model", "lama"
    )


def test_an_axis_of_a_plugin_is_asked_for_by_name_and_size() -> None:
    assert "--axis must be NAME=SIZE, as in --axis rows=2 (got 'rows')" in refused("plan", "-n", "4", "--axis", "rows")
    assert "axis 'rows' has size 2" in refused("plan", "-n", "4", "--axis", "rows=2")


@pytest.mark.parametrize("command", ["plan", "explain", "plugins", "plugins check", "new-plugin", "demo", "verify"])
def test_every_command_has_help_with_examples(command: str) -> None:
    result = run.invoke(app, [*command.split(), "--help"])
    assert result.exit_code == 0
    assert f"Examples:\n    nemo-dist {command}" in result.stdout


def test_the_demo_data_is_the_same_in_every_process(tmp_path: Path) -> None:
    code = (
        "from nemo_dist.cli.demo_dataset import Windows\n"
        "print([w['input_ids'].tolist() for w in map(Windows(4, 16, 3).__getitem__, range(4))])"
    )
    elsewhere = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240, cwd=tmp_path)
    windows = Windows(4, 16, 3)
    assert json.loads(elsewhere.stdout) == [windows[index]["input_ids"].tolist() for index in range(4)]
    assert collate([windows[0], windows[1]])["labels"].shape == (2, 16)
    assert len(read(held_out=False)) > 5 * len(read(held_out=True)) > 0


def test_the_demo_refuses_before_it_starts_a_rank(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "mine"
    out.mkdir()
    (out / "thesis.txt").write_text("do not overwrite")
    assert "holds files that the demo did not write" in refused("demo", "--out", str(out))
    assert "steps must be an int from 1 up" in refused("demo", "--steps", "0", "--out", str(tmp_path / "new"))
    assert "dp_replicate_size 3" in refused("demo", "--dp-replicate", "3", "--out", str(tmp_path / "new"))
    assert "add --moe" in refused("demo", "--ep", "2", "--out", str(tmp_path / "new"))
    assert not (tmp_path / "new").exists()


def test_the_batch_is_the_same_for_every_topology_that_divides_it() -> None:
    assert [DemoOptions(nproc=nproc).batch for nproc in (1, 2, 3, 4, 16, 24)] == [16, 16, 18, 16, 16, 24]
    assert DemoOptions(nproc=8, sizes={"tp_size": 2}).batch == 16


def test_the_demo_trains_exports_and_checks_the_export(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "model"
    result = run.invoke(app, ["demo", "--nproc", "2", "--steps", "6", "--out", str(out)])
    ranks = capfd.readouterr()
    assert result.exit_code == 0, result.output + ranks.err
    assert result.stdout.startswith("2 ranks, strategy fsdp2")
    assert ranks.out.count("step ") == 6 and "step    6/6  loss " in ranks.out
    assert "a sample of what it writes:\n  | def " in result.stdout
    losses = json.loads((out / "demo.json").read_text())["losses"]
    assert len(losses) == 6 and losses[-1] < losses[0] - 0.5
    assert verify(DemoOptions(nproc=2, out=out)).difference < 1e-5
    # The check is a check: one weight that is off makes it fail.
    weights = load_file(out / "model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"] + 0.5
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    assert not verify(DemoOptions(nproc=2, out=out)).equal


@pytest.mark.slow
def test_the_demo_trains_a_mixture_of_experts(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "model"
    arguments = ["demo", "--moe", "--ep", "2", "--tp", "2", "--nproc", "4", "--steps", "4", "--out", str(out)]
    result = run.invoke(app, arguments)
    assert result.exit_code == 0, result.output + capfd.readouterr().err
    assert "moe: 1/2 of the experts on each rank of ep, in 2 shards" in result.stdout
    assert verify(DemoOptions(nproc=4, moe=True, out=out)).difference < 1e-5


def test_a_demo_whose_export_is_wrong_exits_with_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from nemo_dist.cli import demo
    from nemo_dist.launcher import launch

    wrong = demo.Verdict(first_loss=5.0, last_loss=2.0, distributed=2.0, exported=2.001, sample="x")
    monkeypatch.setattr(launch, "launch", lambda *arguments: 0)
    monkeypatch.setattr(demo, "verify", lambda options: wrong)
    result = run.invoke(app, ["demo", "--out", str(tmp_path / "new")])
    assert result.exit_code == 1 and "does not compute the loss of the trained one" in result.stderr
    assert torch.tensor(wrong.difference).item() == pytest.approx(5e-4)


@pytest.mark.parametrize("bound", ["inf", "nan", "-1", "0"])
def test_a_bound_that_is_no_relative_error_is_refused(bound: str) -> None:
    assert "--bound must be a finite number above 0" in refused("plugins", "check", "ddp", "--bound", bound)


@pytest.mark.parametrize("law", ["resumes twice", "not", "resumess", "a or b"])
def test_a_law_that_no_test_has_in_its_name_is_refused_with_the_names(law: str) -> None:
    said = refused("plugins", "check", "ddp", "--law", law)
    assert f"no test of the kit has {law!r} in its name" in said and "it_computes_what_one_process_computes" in said


@pytest.mark.parametrize("name", ["none", "true", "_", "_1", "role", "stage"])
def test_a_plugin_whose_class_python_does_not_allow_is_refused(name: str, tmp_path: Path) -> None:
    assert "choose another name" in refused("new-plugin", name, "--into", str(tmp_path))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("size", ["²", "٣", "", "-1", "1e3", "9" * 5000])
def test_a_size_of_an_axis_is_a_number_of_ranks(size: str) -> None:
    said = refused("plan", "-n", "8", "--axis", f"rows={size}")
    assert "--axis must be NAME=SIZE" in said and len(said) < 400


@pytest.mark.parametrize("words", [("--rows", "0"), ("--rows", "-1"), ("--length", "0"), ("--per-node", "0")])
def test_a_batch_without_rows_or_tokens_is_refused(words: tuple[str, str]) -> None:
    name = words[0][2:].replace("-", "_")
    assert f"{name} must be an int from 1 up (got {words[1]})" in refused("explain", "-n", "2", *words)


def test_a_rank_in_the_environment_that_is_none_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "²")
    assert "RANK is '²' in the environment, which is no number from 0 up" in refused("explain", "-n", "2")


def test_a_seed_that_torch_does_not_take_is_refused_before_a_rank_starts() -> None:
    assert "seed must be an int from 0 to 9223372036854775807" in refused("demo", "--seed", str(2**63))
    assert "nproc must be at most 1048576 ranks" in refused("demo", "--nproc", str(10**30))


@pytest.mark.parametrize(
    "size", ["1.2.3GB", ".GB", f"{'9' * 400}GB", f"{'9' * 305}GB", "0GB", "0.0001KB", "-1GB", "²GB", "nan", ""]
)
def test_a_largest_file_of_no_size_is_refused(size: str, tmp_path: Path) -> None:
    said = refused("export", str(tmp_path), str(tmp_path / "out"), "--max-shard-size", size)
    assert "max_shard_size must be a positive number of bytes or text like '5GB'" in said and len(said) < 300
