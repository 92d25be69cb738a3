"""What the documentation shows runs as it is shown."""

import contextlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from nemo_dist import Registry, Stage
from nemo_dist.testing.equivalence import checkpoint

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")])
BLOCK = re.compile(r"(?:<!-- (?P<how>[^\n]*?) -->\n)?^(?P<indent> *)```python\n(?P<code>.*?)^ *```", re.M | re.S)
# The page is written for a GPU and the hub; the machine that tests it has neither.
HERE = {'"nccl"': '"gloo"', '"cuda"': '"cpu"'}


def blocks(how):
    """Return the python blocks of all pages whose marker starts with *how*."""
    for page in PAGES:
        for number, match in enumerate(BLOCK.finditer(page.read_text()), 1):
            if (match["how"] or "").split(":")[0] == how:
                yield pytest.param(match, id=f"{page.name}-{number}")


def code_of(match):
    lines = [line.removeprefix(match["indent"]) for line in match["code"].splitlines()]
    code = "\n".join(lines) + "\n"
    for there, here in HERE.items():
        code = code.replace(there, here)
    return code.replace('"meta-llama/Llama-3.2-1B"', repr(str(checkpoint("llama"))))


def run(command, folder):
    # torchrun leaves its logs in TMPDIR; with CI, Hypothesis has no limits of time
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(folder), "CI": "1"}
    result = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    assert result.returncode == 0, result.stderr[-3000:]


@pytest.mark.parametrize("match", list(blocks("alone")))
def test_a_block_for_one_process_runs(match, tmp_path):
    (tmp_path / "block.py").write_text(code_of(match))
    run([sys.executable, "block.py"], tmp_path)


def on_rank_run(code, folder):
    with contextlib.chdir(folder):
        exec(compile(code, "block.py", "exec"), {"__name__": "__main__"})


@pytest.mark.parametrize("match", list(blocks("ranks")))
def test_a_block_for_several_ranks_runs(ranks, match, tmp_path):
    ranks(int(match["how"].split(":")[1])).run(on_rank_run, code_of(match), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("match", list(blocks("ranks")))
def test_a_block_for_several_ranks_runs_under_torchrun(match, tmp_path):
    (tmp_path / "block.py").write_text(code_of(match))
    count = match["how"].split(":")[1].strip()
    run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", count, "block.py"], tmp_path
    )


def test_a_fragment_is_what_the_tests_of_an_example_run():
    third_party = "\n".join(path.read_text() for path in sorted(ROOT.glob("examples/*/tests/*.py")))
    fragments = list(blocks("fragment"))
    assert fragments
    for parameters in fragments:
        (match,) = parameters.values
        shown = [line for line in code_of(match).splitlines() if line]
        assert shown and all(line in third_party for line in shown)


def test_every_block_says_how_it_runs():
    known = {"alone", "ranks", "fragment", "file"}  # files: tests/test_tutorial.py
    for page in PAGES:
        for match in BLOCK.finditer(page.read_text()):
            how = (match["how"] or "").split(":")[0]
            assert how in known or "PluginConformance" in match["code"], (
                f"{page.name}: {match['code'][:60]!r} has no marker"
            )


def test_every_command_that_is_shown_exists():
    shown = {words for page in PAGES for words in re.findall(r"^nemo-dist (\w+)", page.read_text(), re.M)}
    listed = subprocess.run(
        [sys.executable, "-m", "nemo_dist.cli", "--help"], capture_output=True, text=True, check=True
    )
    assert shown and all(command in listed.stdout for command in shown)


def test_every_link_to_a_file_leads_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\((?!http)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


COLUMNS = {
    "`dp_replicate`": "dp_replicate",
    "`tp`": "tp",
    "`cp`": "cp",
    "`pp`": "pp",
    "`ep`": "ep",
    "recompute `full`": "activation_checkpointing",
    "recompute `selective`": "activation_checkpointing:selective",
}


def test_the_table_of_what_composes_is_what_the_strategies_declare():
    text = (ROOT / "README.md").read_text().split("## What composes")[1]
    head, _, *rows = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("|")]
    features = [COLUMNS[cell.strip()] for cell in head[1:]]
    shown = {
        row[0].strip().strip("`"): {feature for feature, cell in zip(features, row[1:], strict=True) if "yes" in cell}
        for row in rows
    }
    registry = Registry()
    strategies = {name: registry.load(name) for name in registry if registry.stage(name) == Stage.DATA}

    assert shown == {
        name: (plugin.composes_with | plugin.axes) & set(features)
        for name, plugin in strategies.items()
        if registry.entry(name).dist.name == "nemo-dist"
    }
