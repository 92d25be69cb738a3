"""The public names are there, under both paths, and listed."""

import subprocess
import sys

import pytest

import nemo_dist
import nemo_dist.distributed


@pytest.mark.parametrize("name", nemo_dist.__all__)
def test_a_public_name_imports_from_both_paths(name):
    assert getattr(nemo_dist, name) is getattr(nemo_dist.distributed, name)


def test_the_list_of_public_names_is_complete_and_sorted():
    assert set(nemo_dist._HOME_OF) == set(nemo_dist.__all__)
    assert set(nemo_dist.__all__) <= set(dir(nemo_dist))
    assert len(set(nemo_dist.__all__)) == len(nemo_dist.__all__)


def test_a_name_that_does_not_exist_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'DistributedSetpu'"):
        _ = nemo_dist.DistributedSetpu


def test_a_migration_is_a_search_and_replace():
    code = (
        "from nemo_dist import NeMoAutoModelForCausalLM\n"
        "from nemo_dist.distributed import DistributedSetup, FSDP2Config, ParallelismSizes, initialize_distributed\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
