"""Packages outside this repository add plugins: install them with pip, list them, run their tests, train with them."""

import json
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from cases import cases, slow

EXAMPLES = sorted(path.parent for path in (Path(__file__).parents[1] / "examples").glob("*/pyproject.toml"))
NAMES = [example.name.removeprefix("nemo-dist-") for example in EXAMPLES]
# How the demo takes each: of the two axes of cp and rows, each rank of two has a part.
DEMO = {
    "averaging": ("--strategy", "averaging"),
    "diloco": ("--strategy", "diloco"),
    "fake-quant": ("--plugin", "fake_quant"),
    "rows": ("--plugin", "rows", "--axis", "rows=2"),
    "ulysses": ("--plugin", "ulysses", "--cp", "2"),
    "zero1": ("--strategy", "zero1"),
}


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """Return an environment in which the examples, copied out of this repository, are installed with pip."""
    folder = tmp_path_factory.mktemp("outside")
    sources = [str(shutil.copytree(example, folder / "source" / example.name)) for example in EXAMPLES]
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*command, "--target", str(folder / "site"), *sources], check=True, capture_output=True, timeout=240)
    temporary = folder / "temporary"  # torchrun leaves its logs there
    temporary.mkdir()
    path = os.pathsep.join([str(folder / "site"), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "TMPDIR": str(temporary), "CI": "1"}


def run(installed, *command, cwd=None, timeout=300):
    return subprocess.run(
        [sys.executable, *command], env=installed, cwd=cwd, capture_output=True, text=True, timeout=timeout, check=False
    )


def declared(example):
    return tomllib.loads((example / "pyproject.toml").read_text())["project"]


def test_the_first_example_is_a_package_of_at_most_forty_lines():
    assert len((EXAMPLES[0] / "nemo_dist_averaging.py").read_text().splitlines()) <= 40


@pytest.mark.parametrize("example", EXAMPLES, ids=NAMES)
def test_an_example_is_a_whole_package(example):
    project = declared(example)
    assert project["name"] == example.name and project["description"] and project["requires-python"]
    assert project["dependencies"] == ["nemo-dist>=0.1"]
    assert (example / project["readme"]).read_text().startswith(f"# {example.name}\n")
    assert list((example / "tests").glob("test_*.py"))


def test_the_catalogue_lists_the_examples(installed):
    listed = run(installed, "-m", "nemo_dist.cli", "plugins", "--json")
    assert listed.returncode == 0, listed.stderr
    rows = {plugin["name"]: plugin for plugin in json.loads(listed.stdout)}
    for example in EXAMPLES:
        (name,) = declared(example)["entry-points"]["nemo_dist"]
        assert (rows[name]["distribution"], rows[name]["error"]) == (example.name, None)
    assert rows["rows"]["roles"] == {"rows": "SEQUENCE"} and rows["rows"]["composes_with"] == ["ddp", "fsdp2"]
    assert rows["fake_quant"]["order"] == {"number": 25, "name": None}
    assert rows["diloco"]["options"][0] == {"name": "inner_steps", "type": "int", "default": 8}


@cases(("example", "word"), [("averaging", "computes_what"), *(slow(name, "") for name in NAMES)])
def test_the_tests_of_the_examples_pass(installed, example, word, tmp_path):
    tests = Path(installed["TMPDIR"]).parent / "source" / f"nemo-dist-{example}" / "tests"
    command = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", word, str(tests))
    result = run(installed, *command, cwd=tmp_path, timeout=900)
    assert result.returncode == 0, result.stdout[-5000:]
    assert "passed" in result.stdout and "failed" not in result.stdout


def test_every_example_is_tried_in_the_demo():
    assert sorted(DEMO) == NAMES


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_an_example_trains_in_the_demo(installed, name, tmp_path):
    options = ("--nproc", "2", "--steps", "8", "--out", str(tmp_path / "model"))
    result = run(installed, "-m", "nemo_dist.cli", "demo", *DEMO[name], *options, cwd=tmp_path)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-3000:]
    assert name.replace("-", "_") in result.stdout
    losses = json.loads((tmp_path / "model" / "demo.json").read_text())["losses"]
    assert losses[-1] < losses[0] - 0.2


@pytest.mark.slow
def test_the_kit_runs_on_an_installed_plugin(installed, tmp_path):
    for law, passed in (("one_process", 3), ("resumes", 1)):
        result = run(installed, "-m", "nemo_dist.cli", "plugins", "check", "rows", "--law", law, cwd=tmp_path)
        assert result.returncode == 0, result.stdout[-5000:]
        assert result.stdout.count(" PASSED") == passed
