"""Planted faults: ``verify`` finds each, and names the module and the axis."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import attrs
import mutants
import pytest

import nemo_dist
from nemo_dist import ParallelismSizes
from nemo_dist.testing import verify
from nemo_dist.testing.tiny_models import SPECIMENS


@attrs.frozen(kw_only=True)
class Mutant:
    """A fault, the setup and model that it is planted in, and the module (a pattern) and axis to be named."""

    around: Callable[[], Any]
    module: str
    axis: str
    world: int = 2
    model: str = "llama"
    config: Mapping[str, Any] = {}
    sizes: Mapping[str, int] = {}
    build: Mapping[str, Any] = {}
    slow: bool = True

    def report(self, ranks):
        config = SPECIMENS[self.model].config()
        for name, value in self.config.items():
            setattr(config, name, value)
        sizes = ParallelismSizes(**{"dp_size": 1, **self.sizes})
        setup = {"parallelism_sizes": sizes, **self.build}
        return verify(setup, config, full=True, ranks=self.world, pool=ranks, around=self.around)

    @property
    def name(self):
        return f"{self.around.__name__}, {self.world} ranks"


TP, CP, PP, DP, EP = {"tp_size": 2}, {"cp_size": 2}, {"pp_size": 2}, {"dp_size": 2}, {"dp_size": 2, "ep_size": 2}
ATTENTION = r"model\.layers\.\d\.self_attn"
MUTANTS = [
    Mutant(
        around=mutants.row_output_not_summed,
        module=r"model\.layers\.1\.self_attn\.o_proj",
        axis="tp",
        sizes=TP,
        slow=False,
    ),
    Mutant(
        around=mutants.row_output_not_summed,
        module=r"model\.layers\.1\.self_attn\.o_proj",
        axis="tp",
        world=4,
        sizes={**TP, **DP},
    ),
    Mutant(
        around=mutants.bias_added_on_every_rank,
        module=r"model\.layers\.0\.self_attn\.o_proj",
        axis="tp",
        config={"attention_bias": True, "mlp_bias": True},
        sizes=TP,
    ),
    Mutant(around=mutants.region_gradient_not_summed, module=r"model\.layers\.2\.mlp", axis="tp", sizes=TP),
    Mutant(
        around=mutants.shared_norm_gradient_not_summed,
        module=rf"{ATTENTION}\.[qk]_norm",
        axis="tp",
        model="qwen3",
        sizes=TP,
    ),
    Mutant(
        around=mutants.shared_norm_gradient_not_summed,
        module=rf"{ATTENTION}\.[qk]_norm",
        axis="tp",
        model="qwen3",
        world=4,
        sizes={**TP, **DP},
    ),
    Mutant(
        around=mutants.sequence_norm_gradient_not_summed,
        module=r"model\.layers\.\d\.(input|post_attention)_layernorm",
        axis="tp",
        sizes=TP,
        build={"strategy": nemo_dist.FSDP2Config(sequence_parallel=True)},
    ),
    Mutant(
        around=mutants.sequence_scattered_to_the_wrong_rank,
        module=r"model",
        axis="tp",
        sizes=TP,
        build={"strategy": nemo_dist.FSDP2Config(sequence_parallel=True)},
    ),
    Mutant(around=mutants.embedding_mask_off_by_one, module=r"model\.embed_tokens", axis="tp", sizes=TP),
    Mutant(
        around=mutants.attention_scaled_twice_on_one_rank, module=r"model\.layers\.0\.self_attn", axis="tp", sizes=TP
    ),
    Mutant(
        around=mutants.packed_experts_cut_as_one_matrix,
        module=r"model\.layers\.0\.mlp(\.experts)?",
        axis="tp",
        model="qwen3-moe",
        sizes=TP,
    ),
    Mutant(around=mutants.norm_of_own_shards_only, module="", axis="tp", sizes=TP),
    Mutant(around=mutants.positions_of_every_rank_from_zero, module=r"model\.rotary_emb", axis="cp", sizes=CP),
    Mutant(around=mutants.labels_shifted_after_the_split, module="", axis="cp", sizes=CP),
    Mutant(around=mutants.mask_of_the_wrong_queries, module=r"model\.layers\.0\.self_attn", axis="cp", sizes=CP),
    Mutant(
        around=mutants.key_gradients_of_other_ranks_lost, module=r"model\.layers\.2\.self_attn", axis="cp", sizes=CP
    ),
    Mutant(
        around=mutants.key_gradients_of_other_ranks_lost,
        module=r"model\.layers\.2\.self_attn",
        axis="cp",
        world=4,
        sizes={**CP, **DP},
    ),
    Mutant(around=mutants.gradients_averaged_once_more, module="", axis="cp", sizes=CP),
    Mutant(around=mutants.gradients_averaged_once_more, module="", axis="dp_shard", sizes=DP),
    Mutant(around=mutants.loss_averaged_over_ranks, module="", axis="dp_shard", sizes=DP),
    Mutant(
        around=mutants.replicas_not_synchronised,
        module="",
        axis="dp_shard",
        sizes=DP,
        build={"strategy": "ddp"},
        slow=False,
    ),
    Mutant(
        around=mutants.replicas_of_shards_not_synchronised,
        module="",
        axis="dp_replicate",
        world=4,
        sizes={"dp_size": 4, "dp_replicate_size": 2},
    ),
    Mutant(around=mutants.one_parameter_not_updated, module="lm_head", axis="dp_shard", sizes=DP),
    Mutant(
        around=mutants.gradients_overwritten_by_the_next_batch,
        module="",
        axis="dp_shard",
        sizes=DP,
        build={"strategy": "ddp"},
    ),
    Mutant(
        around=mutants.recomputed_from_another_input,
        module=r"model\.layers\.0\.input_layernorm",
        axis="dp_shard",
        sizes=DP,
        build={"activation_checkpointing": True},
    ),
    Mutant(
        around=mutants.wrong_rows_loaded_on_one_rank, module=r"model\.layers\.1\.self_attn\.k_proj", axis="tp", sizes=TP
    ),
    Mutant(around=mutants.optimizer_state_not_loaded, module="", axis="dp_shard", sizes=DP),
    Mutant(
        around=mutants.export_of_transposed_weights, module=r"model\.layers\.0\.self_attn\.q_proj", axis="", sizes=DP
    ),
    Mutant(
        around=mutants.tied_gradients_not_summed,
        module=r"model\.embed_tokens|lm_head",
        axis="pp",
        model="llama-tied",
        sizes=PP,
        slow=False,
    ),
    Mutant(around=mutants.layer_left_out, module=r"model\.layers\.[12]", axis="pp", sizes=PP),
    Mutant(around=mutants.norm_of_own_stage_only, module="", axis="pp", sizes=PP),
    Mutant(
        around=mutants.expert_gradients_divided_too_little,
        module=r"model\.layers\.\d\.mlp\.experts",
        axis="ep",
        model="qwen3-moe",
        sizes=EP,
    ),
    Mutant(
        around=mutants.router_loss_scaled_twice, module=r"model\.layers\.2\.mlp", axis="ep", model="qwen3-moe", sizes=EP
    ),
    Mutant(around=mutants.router_counts_padding, module="", axis="dp_shard", model="qwen3-moe", sizes=EP),
]


@pytest.mark.parametrize(
    "mutant",
    [pytest.param(one, id=one.name, marks=[pytest.mark.slow] if one.slow else []) for one in MUTANTS],
)
def test_a_planted_fault_is_found_and_its_module_and_axis_are_named(mutant, ranks):
    report = mutant.report(ranks)
    assert not report.ok
    found = report.culprit
    assert found is not None, report
    assert re.fullmatch(mutant.module, found.module), f"named {found}"
    assert mutant.axis in (found.axis or "").split(" = "), f"named {found}"


def test_every_kind_on_the_page_is_planted():
    page = (Path(__file__).parents[1] / "docs" / "verify.md").read_text()
    table = page[page.index("| `row_output_not_summed` |") :]  # a table before it lists what is compared
    listed = re.findall(r"^\| `(\w+)` \|", table, re.M)
    assert sorted(listed) == sorted({one.around.__name__ for one in MUTANTS})
