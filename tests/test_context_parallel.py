"""Sharing sequences between ranks is computing them on one process: loss, gradients, norm, three AdamW steps."""

import itertools
import re

import pytest
import torch
import transformers
from cases import case_id, cases, slow
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.functional import scaled_dot_product_attention

import nemo_dist
from nemo_dist import (
    ContextConfig,
    DDPConfig,
    DistributedSetup,
    FSDP2Config,
    NeMoAutoModelForCausalLM,
    NeMoAutoModelForSequenceClassification,
    ParallelismSizes,
    TopologyError,
    initialize_distributed,
)
from nemo_dist.testing.equivalence import Task, assert_equivalent, checkpoint
from nemo_dist.testing.precision import FP32
from nemo_dist.testing.tiny_models import SPECIMENS
from nemo_dist_context import ring
from nemo_dist_context.batch import NUMBERINGS, SequenceSplitter, sequence_ids
from nemo_dist_context.ring import Ring
from nemo_dist_context.sequence_layout import SequenceLayout

METHODS = ("all_gather", "ulysses")


def options(world, cp, replicate=None, method="all_gather", balance=None, mode=False):
    return {
        "strategy": FSDP2Config(mp_policy=FP32),
        "parallelism_sizes": ParallelismSizes(cp_size=cp, dp_replicate_size=replicate),
        "plugins": (ContextConfig(method=method, balance=balance),),
        "activation_checkpointing": mode,
    }


# ---- which tokens a rank holds ----

layouts = st.builds(SequenceLayout, size=st.integers(1, 9), rank=st.just(0), balanced=st.booleans())


@given(layouts, st.integers(1, 200))
def test_the_parts_of_all_ranks_make_up_the_sequence(layout, length):
    whole = layout.padded(length)
    assert length <= whole < length + layout.chunks
    parts = [layout.indices(whole, rank) for rank in range(layout.size)]
    assert {len(part) for part in parts} == {whole // layout.size}
    assert sorted(index for part in parts for index in part) == list(range(whole))
    gathered = [index for part in parts for index in part]
    assert [gathered[place] for place in layout.restoring(whole)] == list(range(whole))


@given(st.integers(2, 9), st.integers(1, 20))
def test_balanced_ranks_attend_to_equally_many_keys(size, step):
    layout = SequenceLayout(size=size, rank=0, balanced=True)
    length = layout.chunks * step
    seen = [sum(index + 1 for index in layout.indices(length, rank)) for rank in range(size)]
    assert len(set(seen)) == 1


# ---- what is in a part of a batch ----


def splitters(size, balanced=True, **facts):
    facts = {"shifts": True, "numbering": "places", "causal": True, **facts}
    return [
        SequenceSplitter(layout=SequenceLayout(size=size, rank=rank, balanced=balanced), **facts)
        for rank in range(size)
    ]


def test_labels_are_shifted_before_the_split():
    batch = {"input_ids": torch.arange(8).unsqueeze(0), "labels": torch.arange(10, 18).unsqueeze(0)}
    first, second = (split(batch) for split in splitters(2))
    assert first["input_ids"].tolist() == [[0, 1, 6, 7]]
    assert first["shift_labels"].tolist() == [[11, 12, 17, -100]]
    assert second["shift_labels"].tolist() == [[13, 14, 15, 16]]
    assert second["position_ids"].tolist() == [[2, 3, 4, 5]]


def test_a_length_that_does_not_divide_is_padded_and_masked():
    batch = {"input_ids": torch.arange(1, 6).unsqueeze(0), "labels": torch.arange(1, 6).unsqueeze(0)}
    first, second = (split(batch) for split in splitters(2))
    assert first["input_ids"].tolist() == [[1, 2, 0, 0]]
    assert first["shift_labels"].tolist() == [[2, 3, -100, -100]]
    assert first["sequence_ids"].tolist() == second["sequence_ids"].tolist() == [[1, 1, 1, 1, 1, -1, -1, -1]]


def test_sequences_are_numbered_as_transformers_numbers_packed_ones():
    positions = torch.tensor([[0, 1, 2, 0, 1, 0], [3, 4, 5, 6, 0, 1]])
    assert sequence_ids(None, positions, packs=True).tolist() == [[1, 1, 1, 2, 2, 3], [1, 1, 1, 1, 2, 2]]
    assert sequence_ids(None, positions, packs=False).unique().tolist() == [1]
    assert sequence_ids(torch.tensor([[1, 1, 0]]), positions[:1, :3], packs=True).tolist() == [[1, 1, 0]]


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"pixel_values": torch.zeros(2, 3)}, r"pixel_values \(2, 3\) cannot be split along the sequence"),
        ({"attention_mask": torch.zeros(2, 1, 6, 6)}, r"attention_mask must have shape \(2, 6\)"),
        ({"labels": torch.zeros(2)}, r"labels must have shape \(2, 6\)"),
        ({"position_ids": torch.zeros(3, 2, 6)}, r"position_ids must have shape \(2, 6\)"),
    ],
)
def test_a_tensor_that_cannot_be_split_is_refused(extra, message):
    with pytest.raises(ValueError, match=message):
        splitters(2)[0]({"input_ids": torch.zeros(2, 6), **extra})


def test_tokens_are_numbered_as_the_model_numbers_them():
    batch = {"input_ids": torch.tensor([[1, 1, 7, 8]]), "attention_mask": torch.tensor([[0, 0, 1, 1]])}
    numbers = {}
    for kind in NUMBERINGS:
        first, second = (split(batch)["position_ids"] for split in splitters(2, False, numbering=kind, pad_token=1))
        numbers[kind] = torch.cat((first, second), dim=1).tolist()
    assert numbers == {"places": [[0, 1, 2, 3]], "mask": [[-1, -1, 0, 1]], "tokens": [[1, 1, 2, 3]]}


def test_tokens_that_a_model_numbers_anew_after_padding_are_one_sequence():
    batch = {"input_ids": torch.tensor([[5, 6, 1, 7]])}
    first, second = splitters(2, False, numbering="tokens", pad_token=1)
    assert torch.cat((first(batch)["position_ids"], second(batch)["position_ids"]), 1).tolist() == [[2, 3, 1, 4]]
    assert first(batch)["sequence_ids"].tolist() == [[1, 1, 1, 1]]


def test_padding_that_embeddings_do_not_show_needs_positions():
    with pytest.raises(ValueError, match="add position_ids"):
        splitters(2, numbering="tokens")[0]({"inputs_embeds": torch.zeros(2, 6, 4)})


# ---- equal to one process ----


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("specimen", ["llama", "llama-tied", "qwen3"])
@cases(
    ("world", "cp", "replicate"),
    [(2, 2, None), (4, 2, None), slow(8, 2, 2)],
    lambda world, cp, replicate: case_id(world, {"cp": cp, "dp_replicate": replicate}),
)
def test_context_parallelism_matches_one_process(ranks, world, cp, replicate, specimen, method):
    assert_equivalent(ranks(world), Task(specimen=specimen), **options(world, cp, replicate, method))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("length", [13, 15], ids="{} tokens".format)
@pytest.mark.parametrize("specimen", ["llama", "llama-packed", "llama-padded", "llama-left-padded", "bert-numbered"])
def test_any_length_padding_and_packing_are_exact(ranks, specimen, length, method):
    assert_equivalent(ranks(2), Task(specimen=specimen, length=length), **options(2, 2, method=method))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("specimen", ["mistral", "mistral-packed"])
def test_sliding_windows_are_exact(ranks, specimen, method):
    assert_equivalent(ranks(2), Task(specimen=specimen, length=14), **options(2, 2, method=method))


@pytest.mark.parametrize("length", [13, 16], ids="{} tokens".format)
@pytest.mark.parametrize("specimen", ["gpt-oss", "opt", "roberta-decoder", "llama4-packed", "gemma2-left-padded"])
def test_sinks_soft_caps_chunks_and_own_numbering_are_exact(ranks, specimen, length):
    assert_equivalent(ranks(2), Task(specimen=specimen, length=length), **options(2, 2))


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_more_ranks_than_key_heads_are_exact(ranks, method):
    assert_equivalent(ranks(4), Task(specimen="llama", length=11), **options(4, 4, method=method))


@cases(
    ("world", "specimen", "length", "balance", "mode"),
    [
        (2, "llama", 13, None, False),
        (2, "qwen3", 16, None, "selective"),
        (2, "llama-packed", 13, None, False),  # gathered, as a mask needs
        slow(2, "llama", 13, False, "full"),
        slow(2, "llama-padded", 13, None, False),
        slow(2, "bert-numbered", 13, True, False),
        slow(2, "gpt-oss", 13, None, False),
        slow(4, "llama", 19, None, False),
        slow(4, "llama", 16, False, "selective"),
    ],
    lambda world, specimen, length, balance, mode: case_id(
        specimen, world, f"{length} tokens", balance is not None and f"balance {balance}", mode and f"recompute {mode}"
    ),
)
def test_ring_attention_matches_one_process(ranks, world, specimen, length, balance, mode):
    task = Task(specimen=specimen, length=length)
    assert_equivalent(ranks(world), task, **options(world, world, method="ring", balance=balance, mode=mode))


@pytest.mark.slow
@cases(
    ("world", "specimen", "sizes"),
    [
        (4, "llama-odd", {"tp_size": 2}),
        (4, "llama-deep-tied", {"pp_size": 2}),
        (2, "qwen3-moe", {"ep_size": 2}),
        (4, "llama", {"dp_replicate_size": 2}),
        (4, "llama", {}),
    ],
)
def test_ring_attention_beside_other_axes_matches_one_process(ranks, world, specimen, sizes):
    setup = options(world, 2, method="ring") | {"parallelism_sizes": ParallelismSizes(cp_size=2, **sizes)}
    assert_equivalent(ranks(world), Task(specimen=specimen, length=16), **setup)


@given(st.integers(1, 6), st.booleans(), st.booleans())
def test_in_a_ring_every_query_sees_every_key_up_to_its_own_once(size, balanced, causal):
    layouts = [SequenceLayout(size=size, rank=rank, balanced=balanced) for rank in range(size)]
    length = layouts[0].chunks
    for layout in layouts:
        seen = []
        for turn in range(size):
            source = layouts[(layout.rank - turn) % size]
            for one, other, same in Ring(layout=layout, group=None, causal=causal, scale=1.0).blocks(turn):
                pair = layout.indices(length)[one], source.indices(length)[other]
                assert same == (causal and pair[0] == pair[1])
                seen.append(pair)
        wanted = [(q, k) for q in layout.indices(length) for k in range(length) if k <= q or not causal]
        assert sorted(seen) == sorted(wanted)


@pytest.mark.parametrize(
    ("device", "dtype"), [("cpu", torch.float32), pytest.param("cuda", torch.bfloat16, marks=pytest.mark.gpu)]
)
def test_parts_of_the_keys_merge_to_attention_over_all_and_give_its_gradients(device, dtype):
    inputs = [torch.randn(1, 2, 16, 32, device=device, dtype=dtype, requires_grad=True) for _ in range(3)]
    wanted = scaled_dot_product_attention(*inputs, scale=0.3)
    grad = torch.randn_like(wanted)
    gradients = torch.autograd.grad(wanted, inputs, grad)
    query, key, value = (one.detach() for one in inputs)
    halves = list(zip(key.chunk(2, dim=2), value.chunk(2, dim=2), strict=True))
    out = None
    for half in halves:
        out = ring._merged(out, ring._forward(query, *half, False, 0.3))
    whole = out[0].to(dtype), out[1]
    parts = [ring._backward(grad, query, *half, *whole, False, 0.3) for half in halves]
    found = parts[0][0] + parts[1][0], *(torch.cat([part[at] for part in parts], dim=2) for at in (1, 2))
    limits = {} if dtype is torch.float32 else {"atol": 3e-2, "rtol": 3e-2}
    torch.testing.assert_close((whole[0], *found), (wanted, *gradients), **limits)


@pytest.mark.parametrize(("specimen", "balance"), [("llama", False), ("bert-numbered", True)])
def test_either_layout_is_exact_for_either_attention(ranks, specimen, balance):
    assert_equivalent(ranks(2), Task(specimen=specimen, length=13), **options(2, 2, balance=balance))


@pytest.mark.parametrize("mode", ["full", "selective"])
@pytest.mark.parametrize("method", METHODS)
def test_recomputed_layers_are_exact(ranks, method, mode):
    assert_equivalent(ranks(2), Task(specimen="llama-packed"), **options(2, 2, method=method, mode=mode))


def test_accumulated_batches_are_exact(ranks):
    assert_equivalent(ranks(4), Task(specimen="llama-packed", accumulate=2), **options(4, 2))


# All-gather is in the matrix of the dense axes; of 4 query heads no 8 ranks can have a share.
EXCHANGES = [
    (world, replicate, cp, tp)
    for world in (2, 4, 8)
    for replicate, shard, cp, tp in itertools.product((1, 2, 4), (1, 2, 4), (2, 4), (1, 2))
    if replicate * shard * cp * tp == world and not (replicate > 1 and shard == 1) and cp * tp <= 4
]


@pytest.mark.slow
@pytest.mark.parametrize("mode", [False, "full", "selective"], ids=lambda mode: mode or "kept")
@pytest.mark.parametrize("specimen", ["llama", "llama-tied", "qwen3"])
@cases(
    ("world", "replicate", "cp", "tp"),
    EXCHANGES,
    lambda world, replicate, cp, tp: case_id(world, {"dp_replicate": replicate, "cp": cp, "tp": tp}),
)
def test_every_factorisation_with_exchanged_heads_is_exact(ranks, world, replicate, cp, tp, specimen, mode):
    choice = options(world, cp, method="ulysses", mode=mode)
    sizes = ParallelismSizes(cp_size=cp, tp_size=tp, dp_replicate_size=replicate if replicate > 1 else None)
    assert_equivalent(ranks(world), Task(specimen=specimen, length=19), **{**choice, "parallelism_sizes": sizes})


def on_rank_load_on_a_cp_mesh(folder):
    initialize_distributed("gloo")
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("cp",))
    model = NeMoAutoModelForCausalLM.from_pretrained(folder, device_mesh=mesh, dtype=torch.float32)
    return [plugin.name for plugin in model.distributed_setup.plugins]


def test_a_users_own_cp_mesh_is_honoured(on_ranks):
    assert on_ranks(2, on_rank_load_on_a_cp_mesh, checkpoint("llama")) == [["context", "fsdp2"]] * 2


def on_rank_use_whole_sequences(folder, setup_options):
    initialize_distributed("gloo")
    plain = NeMoAutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    setup = DistributedSetup.build(**setup_options)
    model = NeMoAutoModelForCausalLM.from_pretrained(folder, distributed_setup=setup, dtype=torch.float32)
    tokens = torch.tensor([[5, 7, 11, 13]])
    runtime = setup.runtime(model)
    runtime.forward_backward({"input_ids": tokens, "labels": tokens})
    logits = [loaded(input_ids=tokens).logits.detach() for loaded in (model, plain)]
    texts = [loaded.generate(tokens, max_new_tokens=6, do_sample=False).tolist() for loaded in (model, plain)]
    return logits, texts


def test_whole_sequences_and_generation_still_work(on_ranks):
    for (found, expected), (text, reference) in on_ranks(
        2, on_rank_use_whole_sequences, checkpoint("llama"), options(2, 2)
    ):
        torch.testing.assert_close(found, expected)
        assert text == reference


# ---- what is refused ----


def test_ddp_with_cp_is_refused():
    with pytest.raises(TopologyError, match="axis 'cp' has size 2, but strategy 'ddp' does not compose with it; use '"):
        DistributedSetup.build(strategy=DDPConfig(), parallelism_sizes=ParallelismSizes(cp_size=2), world_size=2)


def test_an_unknown_method_is_refused_with_the_near_match():
    with pytest.raises(ValueError, match="got 'ulyses'\\); did you mean 'ulysses'"):
        ContextConfig(method="ulyses")


CONFIGS = {
    "encoder-decoder": (
        lambda: transformers.BartConfig(
            vocab_size=32,
            d_model=16,
            encoder_layers=1,
            decoder_layers=1,
            encoder_ffn_dim=16,
            decoder_ffn_dim=16,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
        ),
        "has an encoder and a decoder",
    ),
    "heads": (
        lambda: transformers.LlamaConfig(
            vocab_size=32, hidden_size=24, intermediate_size=16, num_hidden_layers=1, num_attention_heads=3
        ),
        "3 query heads do not divide by 2",
    ),
    "rope": (
        lambda: transformers.LlamaConfig(
            vocab_size=32,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0},
        ),
        "rotary embedding \\(dynamic\\) depends on the length",
    ),
    "mamba": (
        lambda: transformers.JambaConfig(
            vocab_size=32,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            attn_layer_period=2,
            attn_layer_offset=1,
            expert_layer_period=2,
            num_experts=2,
            mamba_d_state=4,
            mamba_expand=2,
            use_mamba_kernels=False,
            pad_token_id=0,
        ),
        "JambaAttention depend on other tokens|outside of attention, in model.layers.*; use cp_size=1",
    ),
    "alibi": (
        lambda: transformers.BloomConfig(vocab_size=32, hidden_size=16, n_layer=1, n_head=2),
        "BloomAttention does not run on a part of a sequence.*; use cp_size=1",
    ),
    "attention of its own": (
        lambda: transformers.FalconConfig(vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2),
        "FalconAttention does not run on a part of a sequence.*; use cp_size=1",
    ),
    "pooled tokens": (
        lambda: transformers.Lfm2Config(
            vocab_size=32,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            layer_types=["conv", "full_attention"],
        ),
        "depend on .*; use cp_size=1",
    ),
    "llava": (SPECIMENS["llava"].config, "several towers \\(vision_config, text_config\\)"),
}


def on_rank_refusal(name, loader):
    initialize_distributed("gloo")
    setup = DistributedSetup.build(**options(2, 2, method="ulysses"))
    with pytest.raises(ValueError, match="cp_size=2 does not fit") as caught:
        getattr(nemo_dist, loader).from_config(CONFIGS[name][0](), distributed_setup=setup)
    return str(caught.value)


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_a_model_that_cannot_be_split_exactly_is_refused(on_ranks, name):
    loader = "NeMoAutoModelForImageTextToText" if name == "llava" else "NeMoAutoModelForCausalLM"
    if name == "encoder-decoder":
        loader = "NeMoAutoModelForSequenceClassification"
    for message in on_ranks(2, on_rank_refusal, name, loader):
        assert re.search(CONFIGS[name][1], message), message


def on_rank_refuse_losses_and_attention(folder):
    initialize_distributed("gloo")
    setup = DistributedSetup.build(**options(2, 2))
    with pytest.raises(ValueError, match="its outputs are not one for each token"):
        NeMoAutoModelForSequenceClassification.from_pretrained(folder, distributed_setup=setup)
    config = SPECIMENS["llama"].config()
    exchanging = DistributedSetup.build(**options(2, 2, method="ulysses"))
    with pytest.raises(ValueError, match=r"'ulysses' needs 'sdpa'.*; use method='all_gather'"):
        NeMoAutoModelForCausalLM.from_config(config, distributed_setup=exchanging, attn_implementation="eager")
    return True


def test_sequence_losses_and_exchanged_heads_of_eager_attention_are_refused(on_ranks):
    assert all(on_ranks(2, on_rank_refuse_losses_and_attention, checkpoint("bert-sequences")))


def on_rank_replace_the_loss_function(folder):
    initialize_distributed("gloo")
    setup = DistributedSetup.build(**options(2, 2))
    model = NeMoAutoModelForCausalLM.from_pretrained(folder, distributed_setup=setup, dtype=torch.float32)
    shifting = model.loss_function
    model.loss_function = lambda logits, labels, vocab_size, **_: shifting(logits, labels, vocab_size)
    tokens = torch.arange(1, 9).unsqueeze(0)
    with pytest.raises(
        ValueError, match=r"loss_function of LlamaForCausalLM was replaced .*setup.runtime\(model, loss"
    ):
        setup.runtime(model)
    model.loss_function = shifting
    runtime = setup.runtime(model)
    model.loss_function = print
    with pytest.raises(ValueError, match=r"loss_function of LlamaForCausalLM was replaced"):
        runtime.forward_backward({"input_ids": tokens, "labels": tokens})
    return True


def test_a_loss_function_that_was_replaced_is_refused(on_ranks):
    assert all(on_ranks(2, on_rank_replace_the_loss_function, checkpoint("llama")))
