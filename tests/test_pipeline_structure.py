"""A model is cut into stages by its structure, found in a run around its blocks, or refused before weights are read."""

import copy

import pytest
import torch
import transformers
from cases import cases, slow

from nemo_dist import DistributedSetup, FSDP2Config, NeMoAutoModelForCausalLM, ParallelismSizes, PipelineConfig
from nemo_dist.models.meta_model import meta_model
from nemo_dist.testing.equivalence import Task, assert_equivalent
from nemo_dist.testing.precision import FP32
from nemo_dist.testing.shrink import tiny
from nemo_dist.testing.tiny_models import SPECIMENS
from nemo_dist_pipeline.partition.model_structure import ModelStructure
from nemo_dist_pipeline.partition.proof import require_exact
from nemo_dist_pipeline.partition.stage_model import stages_of

TINY = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4}
TINY |= {"num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0}


def on_meta(config):
    """Return the causal language model of *config* without values, as a loader cuts it."""
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(copy.deepcopy(config))


def proven(model, stages=2):
    structure = ModelStructure.of(model)
    require_exact(model, structure, stages_of(structure, structure.divide(model, stages)))
    return structure


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_a_model_is_proven_in_the_dtype_of_its_checkpoint(dtype):
    assert len(proven(meta_model(SPECIMENS["llama"].config(), getattr(torch, dtype))).layers) == 3


def test_the_structure_of_a_model_without_a_plan_is_found():
    structure = proven(on_meta(SPECIMENS["gpt2"].config()))
    assert structure.before == ("transformer.wte", "transformer.wpe")
    assert structure.layers == tuple(f"transformer.h.{index}" for index in range(3))
    assert structure.after == ("transformer.ln_f", "lm_head")
    assert structure.tied == ("lm_head.weight", "transformer.wte.weight")
    assert structure.hidden == ("rows", "length", 32)


def test_a_large_model_is_proven_without_its_weights():
    """The weights alone would take 300 GB."""
    config = transformers.LlamaConfig(
        vocab_size=128256, hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64
    )
    assert len(proven(on_meta(config), stages=8).layers) == 80


class Skipping(transformers.LlamaForCausalLM):
    """Adds the embedding to the logits, so its head needs what the first stage has."""

    def forward(self, input_ids=None, **kwargs):
        output = super().forward(input_ids=input_ids, **kwargs)
        output["logits"] = output.logits + self.model.embed_tokens(input_ids).sum(-1, keepdim=True)
        return output


def refused(model):
    with pytest.raises(ValueError, match="use pp_size=1") as caught:
        proven(model)
    return str(caught.value)


def test_an_embedding_that_is_used_again_after_the_blocks_is_refused():
    with torch.device("meta"):
        model = Skipping(transformers.LlamaConfig(**TINY))
    assert "Skipping runs model.embed_tokens on several stages" in refused(model)


def test_blocks_that_get_what_comes_of_the_embedding_are_refused():
    kinds = ["sliding_attention", "full_attention"] * 2
    config = transformers.Gemma4TextConfig(
        **TINY, head_dim=8, layer_types=kinds, hidden_size_per_layer_input=8, vocab_size_per_layer_input=96
    )
    assert "as 'per_layer_input' what comes of weights of other stages" in refused(on_meta(config))


def test_blocks_that_pass_each_other_more_than_hidden_states_are_refused():
    latent = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
    sizes = {**TINY, "num_key_value_heads": 4, "moe_intermediate_size": 24, "n_routed_experts": 4, "n_group": 1}
    index = {"index_n_heads": 2, "index_head_dim": 16, "index_topk": 4, "topk_group": 1, "num_experts_per_tok": 2}
    config = transformers.GlmMoeDsaConfig(**sizes, **latent, **index)
    assert "its blocks pass each other more than hidden states" in refused(on_meta(config))


def test_a_model_that_initialises_its_blocks_from_outside_is_refused():
    assert "initialises its blocks from outside of them" in refused(on_meta(tiny("falcon_h1").config))


def test_weights_that_blocks_share_are_refused():
    class Sharing(transformers.LlamaForCausalLM):
        pass

    with torch.device("meta"):
        model = Sharing(transformers.LlamaConfig(**TINY))
    block = "model.layers.{}.mlp.up_proj.weight"
    model.all_tied_weights_keys = {block.format(3): block.format(0)}
    assert "a pipeline keeps only an output head tied to the embedding" in refused(model)


def on_rank_load(config):
    setup = DistributedSetup.build(parallelism_sizes=ParallelismSizes(pp_size=2))
    with pytest.raises(ValueError, match="pp_size=1") as caught:
        NeMoAutoModelForCausalLM.from_config(config, distributed_setup=setup)
    return str(caught.value)


def test_every_rank_is_told_why_a_model_is_no_pipeline(ranks):
    first, second = ranks(2).run(on_rank_load, transformers.RwkvConfig(**{**TINY, "num_attention_heads": None}))
    assert first == second
    assert "RwkvForCausalLM cannot be cut between its blocks" in first


def pipelined(pp=2, **options):
    return {
        "strategy": FSDP2Config(mp_policy=FP32),
        "parallelism_sizes": ParallelismSizes(pp_size=pp),
        "pipeline_config": PipelineConfig(**options),
    }


@cases(
    "specimen",
    [
        ("gpt2",),  # learned positions, tied, blocks under another name
        ("granite",),  # scales the embedding, the residuals and the logits
        ("lfm2",),  # convolutions and attention
        ("llava",),  # the tower is on the first stage
        ("bert-tokens",),
        slow("bert-sequences"),
        slow("gemma3"),
        slow("gemma2"),
        slow("neox"),
        slow("deepseek-v3"),
        slow("qwen3-moe-padded"),
    ],
)
def test_a_pipeline_of_any_structure_matches_one_process(ranks, specimen):
    assert_equivalent(ranks(2), Task(specimen=specimen), **pipelined())


@pytest.mark.slow
@pytest.mark.parametrize("specimen", ["gpt2", "granite", "bert-sequences", "llava"])
@pytest.mark.parametrize("schedule", ["Interleaved1F1B", "ZBVZeroBubble"])
def test_several_stages_of_any_structure_on_a_rank_match_one_process(ranks, specimen, schedule):
    options = pipelined(pp_schedule=schedule)
    if SPECIMENS[specimen].config().get_text_config().num_hidden_layers < 4:
        options["pipeline_config"] = PipelineConfig(pp_schedule="Interleaved1F1B", layers_per_stage=2)
    assert_equivalent(ranks(2), Task(specimen=specimen), **options)


def test_batches_of_one_microbatch_run_through_one_schedule(ranks):
    """One microbatch, of packed rows say, is fewer than 1F1B has stages; a list of such batches is enough."""
    task = Task(specimen="llama-packed", rows=2, accumulate=3)  # the labels of a first row are all masked
    assert_equivalent(ranks(2), task, **pipelined(pp_microbatch_size=2))
