"""The public names are there, under both paths, and listed."""

import subprocess
import sys

import pytest

import nemo_dist
import nemo_dist.distributed


def test_every_public_name_is_the_same_under_both_paths():
    lacking = [name for name in nemo_dist.__all__ if not hasattr(nemo_dist.distributed, name)]
    assert lacking == [], f"nemo_dist.distributed lacks {lacking}"
    others = [
        name for name in nemo_dist.__all__ if getattr(nemo_dist, name) is not getattr(nemo_dist.distributed, name)
    ]
    assert others == [], f"nemo_dist and nemo_dist.distributed give different objects for {others}"


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
