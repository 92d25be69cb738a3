"""The matrix of families: the page is what the stored results say, and a sample of cells gives them again."""

import json
import random

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, Qwen3MoeConfig, Qwen3NextConfig

from nemo_dist.testing.families import PAGE, Results, missing, run_family
from nemo_dist.testing.family_cells import CELLS, LOADERS, Verdict, _digest, _lost, merged
from nemo_dist.testing.family_names import families
from nemo_dist.testing.family_page import FAILED, page
from nemo_dist.testing.shrink import shrink, tiny


def test_the_results_name_every_family_that_transformers_has():
    stored = Results.read().families.keys()

    assert stored == {f"{kind} {family}" for kind in LOADERS for family in families(kind)}


def test_the_page_is_what_the_stored_results_say():
    assert PAGE.read_text() == page(Results.read().families), "run: make models"


# What is not mended yet; the page shows it in bold. A line goes when its cell is equal, or refused at load.
KNOWN: set[str] = set()


def test_no_stored_cell_is_a_fault_that_is_not_known():
    faults = {
        f"{name}, {cell}: {found['status']}"
        for name, entry in Results.read().families.items()
        for cell, found in entry["cells"].items()
        if found["status"] in FAILED
    }

    assert faults == KNOWN


SAMPLE = [
    ("causal", "llama", "fsdp2"),
    ("causal", "llama", "bfloat16"),
    ("causal", "zamba2", "fsdp2"),  # runs modules of one group in several places
    ("causal", "bert", "pp"),
    ("causal", "gpt2", "ddp"),
    ("causal", "minimax", "bfloat16"),
    ("causal", "qwen3_moe", "ep"),
    ("causal", "big_bird", "ddp"),
    ("causal", "falcon_h1", "tp + sp"),  # its feed-forward scales what the last projection returns
    ("sequence", "bert", "recompute"),
    ("causal", "openai-gpt", "fsdp2"),  # fills a buffer again
    ("causal", "openai-gpt", "bfloat16"),  # its mask has the dtype of its first parameter
    pytest.param("sequence", "t5gemma2", "ddp", marks=pytest.mark.slow),  # says itself that it wants no cache
    ("sequence", "canine", "fsdp2"),  # has no embedding of tokens that transformers knows
    ("causal", "gemma4", "fsdp2"),  # reads the embedding of padding by itself
    pytest.param("image-text", "florence2", "tp", marks=pytest.mark.slow),  # its head is tied when it is loaded
    pytest.param("causal", "gemma3n_text", "tp", marks=pytest.mark.slow),  # layers hand keys to later ones
]


@pytest.mark.parametrize(("kind", "family", "cell"), SAMPLE)
def test_a_family_trains_as_on_one_process(ranks, kind, family, cell):
    why, verdicts = run_family(ranks(2), kind, family, [cell])

    assert why == ""
    assert [(name, verdict.status, verdict.reason) for name, verdict in verdicts] == [(cell, "equal", "")]


@pytest.mark.parametrize(
    "family",
    [
        "llama4_text",  # flattens the tokens of all rows
        pytest.param("gpt_neox_japanese", marks=pytest.mark.slow),  # adds a bias of the attention after it
        pytest.param("qwen4_exp_text", marks=pytest.mark.slow),  # has no plan for what mixes tokens
    ],
)
def test_blocks_that_do_more_between_regions_are_refused_with_cut_tokens(ranks, family):
    _, verdicts = run_family(ranks(2), "causal", family, ["tp + sp"])

    ((_, verdict),) = verdicts
    assert verdict.status == "refused"
    assert "does not compute with cut tokens what it computes with all" in verdict.reason
    assert "use sequence_parallel=False" in verdict.reason


def test_a_family_without_experts_is_refused_under_expert_parallelism(ranks):
    _, verdicts = run_family(ranks(2), "causal", "llama", ["ep"])

    ((_, verdict),) = verdicts
    assert verdict.status == "refused"
    assert "expert" in verdict.reason


@pytest.mark.slow
def test_a_random_sample_of_cells_gives_the_stored_results(ranks):
    stored = [
        (name, cell, found["status"])
        for name, entry in Results.read().families.items()
        for cell, found in entry["cells"].items()
    ]
    for name, cell, status in random.sample(stored, min(20, len(stored))):
        _, verdicts = run_family(ranks(2), *name.split(" "), [cell])
        assert [verdict.status for _, verdict in verdicts] == [status], (name, cell)


def test_ranks_are_judged_together():
    one = Verdict(status="equal", digests={"a": "1", "b": "2"}, expected=frozenset("abc"))
    two = Verdict(status="equal", digests={"b": "2", "c": "3"}, expected=frozenset("abc"))

    assert merged([one, two]).status == "equal"
    assert merged([one, one]).reason == "no rank has c"
    assert merged([one, Verdict(status="equal", digests={"b": "9", "c": "3"})]).reason == "differs between ranks: b"
    assert merged([one, Verdict(status="refused", reason="why")]).reason == "why"
    assert merged([Verdict(status="refused", reason="why"), Verdict(status="crash", reason="hm")]).status == "crash"


def test_a_single_number_has_a_digest():
    assert _digest(torch.tensor(0.5)) == _digest(torch.tensor([0.5])) != _digest(torch.tensor(0.25))


def test_what_a_load_draws_anew_is_found():
    saved, loaded = nn.Linear(2, 2, bias=False), nn.Linear(2, 2)
    loaded.weight.data.copy_(saved.weight)

    assert _lost(saved, loaded) == ["bias"]
    assert _lost(loaded, saved) == ["bias"]
    assert _lost(saved, nn.Linear(2, 2, bias=False)) == ["weight"]


def test_a_sweep_runs_what_has_no_result_and_what_is_asked_for():
    cells = {"fsdp2": {"status": "equal", "digest": "1"}, "tp": {"status": "wrong", "digest": "2"}}
    entry = {"made": "", "cells": cells}

    assert missing(entry, ["fsdp2", "tp", "cp"], "never", "2") == ["cp"]
    assert missing(entry, ["fsdp2", "tp", "cp"], "failed", "2") == ["tp", "cp"]
    assert missing(entry, ["fsdp2", "tp", "cp"], "stale", "2") == ["fsdp2", "cp"]
    assert missing(entry, ["fsdp2", "tp", "cp"], "all", "2") == ["fsdp2", "tp", "cp"]
    assert missing({"made": "no", "cells": {}}, list(CELLS), "never", "2") == []


def test_results_are_read_as_they_were_written(tmp_path):
    results = Results(tmp_path / "models.json")
    results.of("causal", "llama")["cells"]["tp"] = {"status": "equal", "digest": "1"}
    results.write()

    assert Results.read(results.path).families == results.families
    assert json.loads(results.path.read_text())["transformers"]


def test_a_tiny_config_keeps_the_structure():
    config = LlamaConfig(num_attention_heads=64, num_key_value_heads=8, hidden_size=8192, attention_bias=True)
    small = shrink(config).config

    assert small.num_attention_heads // small.num_key_value_heads > 1
    assert small.head_dim * small.num_attention_heads == small.hidden_size == 64
    assert small.attention_bias
    assert config.hidden_size == 8192


def test_a_tiny_config_has_every_kind_of_layer():
    config = Qwen3NextConfig()
    small = shrink(config).config

    assert set(small.layer_types) == set(config.layer_types)
    assert small.num_hidden_layers == len(small.layer_types) < config.num_hidden_layers


@pytest.mark.parametrize(("value", "small"), [(50257, 121), (32000, 128), (50265, 121), (30522, 122), (96, 96)])
def test_a_tiny_vocabulary_divides_over_as_many_ranks(value, small):
    assert shrink(LlamaConfig(vocab_size=value)).config.vocab_size == small
    assert (small % 2, small % 4, small % 8) == (value % 2, value % 4, value % 8)


def test_what_a_tiny_config_changes_is_said():
    changes = shrink(Qwen3MoeConfig(num_experts=128, num_experts_per_tok=8)).changes

    assert "num_experts: 4 (got 128)" in changes
    assert "num_experts_per_tok: 2 (got 8)" in changes


@pytest.mark.parametrize("family", ["llama", "gemma3n_text", "deepseek_v3", "zamba2", "gpt_neo", "qwen2_vl"])
def test_a_tiny_config_is_the_same_every_time(family):
    assert tiny(family).config.to_dict() == tiny(family).config.to_dict()
