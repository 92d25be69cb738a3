"""The command ``nemo-dist search`` prints what fits, and says what would where nothing does."""

import pytest
from typer.testing import CliRunner

from nemo_dist.cli.main import app


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    from nemo_dist.testing.tiny_models import SPECIMENS

    folder = tmp_path_factory.mktemp("tiny") / "tiny"
    SPECIMENS["llama"].config().save_pretrained(folder)
    return folder


def searched(*arguments):
    return CliRunner().invoke(app, ["search", *map(str, arguments)])


ASKED = ("--gpus", 2, "--seq", 16, "--batch", 8, "--strategy", "fsdp2")


def test_the_command_prints_a_table_and_what_to_paste(config):
    result = searched("--model", config, *ASKED, "--hardware", "cpu", "--cp", 1, "--tp", 1)

    assert result.exit_code == 0, result.output
    for words in (
        "DistributedSetup.build(",
        "distributed:",
        "strategy: fsdp2",
        "optimizer state",
        "not counted:",
        "to the byte",
        "parameters are stored in float32",
        "activations",
    ):
        assert words in result.output


def test_a_model_that_fits_nowhere_is_told_what_would_be_enough(config):
    result = searched("--model", config, *ASKED, "--memory", "100KiB", "--cp", 1, "--tp", 1)

    assert result.exit_code == 2
    assert "no topology on 2 ranks fits into 100 KiB" in result.stderr
    assert "the smallest needs" in result.stderr


def test_a_unit_and_a_model_that_do_not_exist_are_named(config):
    unit = searched("--model", config, *ASKED, "--memory", "80GiBB")
    model = searched("--model", config.parent / "tinyy", *ASKED)

    assert unit.exit_code == model.exit_code == 2
    assert "--memory must be a number with a unit, as 80GiB" in unit.stderr
    assert "did you mean 'GiB'?" in unit.stderr
    assert "no model config at" in model.stderr
    assert "did you mean 'tiny'?" in model.stderr


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (("--gpus", 8, "--tp", 3), "no topology on 8 ranks is accepted by build: world_size 8 is not divisible by"),
        (("--gpus", 8, "--dp", 3), "no topology on 8 ranks is accepted by build: "),
        (("--gpus", 2, "--strategy", "tensor"), "plugin 'tensor' is no strategy"),
        (("--gpus", 2, "--strategy", "fsdp2", "--strategy", "tensor"), "plugin 'tensor' is no strategy"),
        (("--gpus", 2, "--strategy", "ddp", "--tp", 2), "strategy 'ddp' does not compose with"),
    ],
)
def test_what_build_has_against_every_topology_is_said(config, words, why):
    result = searched("--model", config, "--seq", 16, "--batch", 8, *words)

    assert result.exit_code == 2
    assert why in result.stderr
    assert "0 topologies" not in result.stderr
