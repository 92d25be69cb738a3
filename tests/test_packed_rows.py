"""Sequences packed into one row train as each by itself, however a collator says where they start, or are refused."""

from itertools import accumulate, pairwise
from unittest import mock

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention

from nemo_dist import (
    ContextConfig,
    DistributedSetup,
    FSDP2Config,
    NeMoAutoModelForCausalLM,
    NeMoAutoModelForTokenClassification,
    ParallelismSizes,
    PipelineConfig,
    initialize_distributed,
)
from nemo_dist.testing.equivalence import Outcome, Task, checkpoint, differences, merged, reference, train, whole_state
from nemo_dist.testing.precision import FP32
from nemo_dist.testing.tiny_models import SPECIMENS
from nemo_dist.training.model_inputs import ModelInputs, restarts
from nemo_dist.training.rehearsal import mixes_packed_sequences
from nemo_dist_context import attention
from nemo_dist_context import packed as packed_attention

LENGTHS = (7, 13, 12)


def sequences(lengths=LENGTHS, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 95, (length,), generator=generator) for length in lengths]


def packed(rows, form="positions"):
    """Return one row of all *rows*: the first label of each does not count, as in transformers' collator."""
    lengths = torch.tensor([len(row) for row in rows])
    positions = torch.cat([torch.arange(length) for length in lengths])
    labels = torch.cat([torch.cat((torch.tensor([-100]), row[1:])) for row in rows])
    batch = {"input_ids": torch.cat(rows), "labels": labels, "position_ids": positions}
    batch = {name: value[None] for name, value in batch.items()}
    if form == "ones":
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    if form in ("right", "left", "between"):
        batch = padded(batch, form, len(rows[0]))
    if form == "boundaries":
        del batch["position_ids"]
        ends = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
        batch |= {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": 13, "max_length_k": 13}
    if form == "numbers":
        del batch["position_ids"]
        batch["seq_idx"] = torch.arange(len(rows)).repeat_interleave(lengths)[None].int()
    return batch


def padded(batch, side, first):
    """Return *batch* with three tokens of padding and a mask; ``between``: after the *first* tokens."""
    at = {"right": batch["input_ids"].shape[1], "left": 0, "between": first}[side]
    fills = {"input_ids": 0, "labels": -100, "position_ids": 0, "attention_mask": 0}
    batch = {**batch, "attention_mask": torch.ones_like(batch["input_ids"])}
    return {
        name: torch.cat((value[:, :at], torch.full((1, 3), fills[name]), value[:, at:]), dim=1)
        for name, value in batch.items()
    }


def by_themselves(model, rows):
    """Return the mean loss over the labels of *rows*, each a batch of its own."""
    count = sum(len(row) - 1 for row in rows)
    return sum(model(input_ids=row[None], labels=row[None]).loss * (len(row) - 1) for row in rows) / count


FORMS = ("positions", "ones", "right", "left", "between", "boundaries", "numbers")


@pytest.mark.parametrize("form", FORMS)
def test_every_way_to_say_where_sequences_start_keeps_them_apart(form):
    model, rows = SPECIMENS["llama"].make(), sequences()
    inputs = ModelInputs(model)(packed(rows, form))
    inputs.pop("counted_tokens", None)
    torch.testing.assert_close(model(**inputs).loss, by_themselves(model, rows))
    assert model.config.use_cache is True


@given(st.lists(st.lists(st.integers(1, 5), min_size=1, max_size=4), min_size=1, max_size=3), st.data())
def test_restarts_are_the_starts_of_all_sequences_but_the_first_of_a_row(rows, data):
    width = max(map(sum, rows)) + data.draw(st.integers(0, 3))
    mask, positions, wanted = (torch.zeros(len(rows), width, dtype=torch.long) for _ in range(3))
    for index, lengths in enumerate(rows):
        place = data.draw(st.integers(0, width - sum(lengths)))
        for number, length in enumerate(lengths):
            mask[index, place : place + length] = 1
            positions[index, place : place + length] = torch.arange(length)
            wanted[index, place] = number > 0
            place += length
    assert torch.equal(restarts(mask, positions), wanted.bool())


def test_positions_of_padding_are_no_packing():
    positions = torch.tensor([[1, 1, 0, 1, 2], [0, 1, 2, 1, 1]])
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 0, 0]])
    assert not restarts(mask, positions).any()
    batch = {"input_ids": positions, "attention_mask": mask, "position_ids": positions}
    assert ModelInputs(SPECIMENS["llama"].make())(batch)["attention_mask"] is mask


MIXING = {
    "state": ("mamba", "tokens see each other in "),
    "whole rows": ("bert-numbered", "tokens see each other in bert.encoder.layer.0"),
}


@pytest.mark.parametrize("kind", sorted(MIXING))
def test_packed_sequences_that_a_model_mixes_are_refused(kind):
    specimen, message = MIXING[kind]
    with pytest.raises(ValueError, match=f"does not keep packed sequences apart .*{message}.*a row of its own"):
        ModelInputs(SPECIMENS[specimen].make())(packed(sequences()))


def test_a_convolution_between_attentions_is_found_and_named():
    config = transformers.Lfm2Config(
        vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, layer_types=["full_attention", "conv"],
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config)
    assert "model.layers.1" in mixes_packed_sequences(model)
    assert mixes_packed_sequences(SPECIMENS["llama"].make()) is None


# ---- on ranks ----

# A balance of experts is one of all tokens of a step, which no sequence has by itself.
UNBALANCED = {"output_router_logits": False}
SETUPS = {
    "fsdp2": {},
    "recompute": {"activation_checkpointing": True},
    "tp": {"parallelism_sizes": ParallelismSizes(tp_size=2)},
    "cp": {"parallelism_sizes": ParallelismSizes(cp_size=2)},
    "pp": {"parallelism_sizes": ParallelismSizes(pp_size=2), "pipeline_config": PipelineConfig(pp_microbatch_size=1)},
}


def on_rank_train_on_packed_rows(folder, options, batches, config):
    """Return the loss, the norm and the gradients of one step, each data-parallel rank with a batch of its own form."""
    initialize_distributed("gloo")
    setup = DistributedSetup.build(strategy=FSDP2Config(mp_policy=FP32), **options)
    model = NeMoAutoModelForCausalLM.from_pretrained(folder, distributed_setup=setup, dtype=torch.float32, **config)
    runtime = setup.runtime(model)
    own = batches[runtime.dp_rank :: runtime.dp_size]
    if "pipeline_config" in options:  # of equal lengths: one batch, of a row for each microbatch
        own = [{name: torch.cat([batch[name] for batch in own]) for name in own[0]}]
    loss = runtime.forward_backward(own).item()
    gradients = whole_state(runtime, {n: p.grad for n, p in runtime.named_parameters() if p.grad is not None})
    norm = runtime.clip_grad_norm_(1e9).item()
    return Outcome(losses=[loss], norms=[norm], gradients=gradients, parameters={})


def expected(folder, rows, config):
    model = NeMoAutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **config)
    loss = by_themselves(model, rows)
    loss.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1e9).item()
    return Outcome(losses=[loss.item()], norms=[norm], gradients=gradients, parameters={})


@pytest.mark.parametrize("setup", [*SETUPS, "ep"])
def test_packed_rows_match_the_sequences_by_themselves(on_ranks, setup):
    first, second = sequences(), sequences((9, 20, 3), seed=1)
    forms = ("ones", "ones") if "pp" in setup else ("ones", "right")
    batches = [packed(first, forms[0]), packed(second, forms[1])]
    folder = checkpoint("qwen3-moe" if setup == "ep" else "llama")
    options = {"parallelism_sizes": ParallelismSizes(ep_size=2)} if setup == "ep" else SETUPS[setup]
    config = UNBALANCED if setup == "ep" else {}
    found = merged(on_ranks(2, on_rank_train_on_packed_rows, folder, options, batches, config))

    assert differences(found, expected(folder, first + second, config)) == []


def on_rank_evaluate_and_generate(folder):
    initialize_distributed("gloo")
    setup = DistributedSetup.build(strategy=FSDP2Config(mp_policy=FP32))
    model = NeMoAutoModelForCausalLM.from_pretrained(folder, distributed_setup=setup, dtype=torch.float32)
    runtime = setup.runtime(model)
    tokens = torch.tensor([[5, 7, 11, 13]])
    runtime.forward_backward({"input_ids": tokens, "labels": tokens})
    made = runtime.batch({"input_ids": tokens, "labels": tokens})["use_cache"]
    with torch.no_grad():
        return made, model(input_ids=tokens).past_key_values is not None, model.config.use_cache


def test_training_makes_no_cache_and_leaves_others_theirs(on_ranks):
    assert on_ranks(1, on_rank_evaluate_and_generate, checkpoint("llama")) == [(False, True, True)]


def test_a_classifier_of_tokens_that_attend_backwards_may_be_packed():
    model = NeMoAutoModelForTokenClassification.from_config(SPECIMENS["llama-tokens"].config(), dtype=torch.float32)
    assert mixes_packed_sequences(model) is None


# ---- context parallelism with a kernel for packed sequences ----


def attention_of_each_sequence(query, key, value, query_ends, key_ends, max_q, max_k, scale, window_size, enable_gqa):
    """Stand in for torch's ``varlen_attn``, which only a CUDA device has: attend to each sequence by itself."""
    bounds = [list(pairwise(ends.tolist())) for ends in (query_ends, key_ends)]
    assert window_size == (-1, 0) and (max_q, max_k) == tuple(max(b - a for a, b in each) for each in bounds)
    parts = []
    for queries, keys in zip(*bounds, strict=True):
        one, *pair = (x[slice(*b)].transpose(0, 1)[None] for x, b in ((query, queries), (key, keys), (value, keys)))
        seen = torch.ones(one.shape[2], pair[0].shape[2], dtype=torch.bool).tril(pair[0].shape[2] - one.shape[2])
        found = scaled_dot_product_attention(one, *pair, attn_mask=seen, scale=scale, enable_gqa=enable_gqa)
        parts.append(found[0].transpose(0, 1))
    assert sum(map(len, parts)) == len(query)
    return torch.cat(parts)


def on_rank_train_with_a_kernel(task, folder, options):
    initialize_distributed("gloo")
    setup = DistributedSetup.build(**options)
    model = NeMoAutoModelForCausalLM.from_pretrained(folder, distributed_setup=setup, dtype=torch.float32)
    kernel = mock.Mock(side_effect=attention_of_each_sequence)
    with (
        mock.patch.object(attention, "has_kernel", return_value=True),
        mock.patch.object(packed_attention, "kernel", return_value=kernel),
    ):
        outcome = train(task, setup, model)
    return outcome, kernel.call_count


@pytest.mark.parametrize("mode", [False, "selective"], ids=lambda mode: mode or "kept")
@pytest.mark.parametrize("method", ["all_gather", "ulysses"])
def test_a_kernel_that_knows_where_sequences_start_is_exact(on_ranks, method, mode):
    task = Task(specimen="llama-packed", length=13)
    options = {
        "strategy": FSDP2Config(mp_policy=FP32),
        "parallelism_sizes": ParallelismSizes(cp_size=2),
        "plugins": (ContextConfig(method=method),),
        "activation_checkpointing": mode,
    }
    outcomes, calls = zip(
        *on_ranks(2, on_rank_train_with_a_kernel, task, checkpoint(task.specimen), options), strict=True
    )
    assert differences(merged(outcomes), reference(task)) == []
    assert min(calls) >= task.steps


@given(st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=5), min_size=1, max_size=3), st.data())
def test_stretches_cover_the_sequences_of_their_queries(rows, data):
    length = max(map(sum, rows))
    rows = [[*row, length - sum(row)] if sum(row) < length else row for row in rows]
    ids = torch.stack([torch.arange(1, len(row) + 1).repeat_interleave(torch.tensor(row)) for row in rows])
    starts = packed_attention.sequence_starts(ids)
    assert starts == [[0, *accumulate(row[:-1])] for row in rows]
    first = data.draw(st.integers(0, length - 1))
    stop = data.draw(st.integers(first + 1, length))
    found = packed_attention.stretch(starts, first, stop, torch.device("cpu"))
    seen = []
    query_lengths, key_lengths = (found.query_ends.diff().tolist(), found.key_ends.diff().tolist())
    for row, (begin, end) in enumerate(found.keys):
        wanted = ids[row, first:stop].unique_consecutive(return_counts=True)
        assert (end, begin) == (stop, int((ids[row] == ids[row, first]).nonzero()[0]))
        seen += zip(
            wanted[1].tolist(), ids[row, begin:stop].unique_consecutive(return_counts=True)[1].tolist(), strict=True
        )
    assert list(zip(query_lengths, key_lengths, strict=True)) == seen
    assert found.longest == (max(query_lengths), max(key_lengths))


def test_rows_with_masked_tokens_have_no_stretches():
    assert packed_attention.sequence_starts(torch.tensor([[1, 1, 2], [1, 0, 0]])) is None


@pytest.mark.gpu
def test_torchs_kernel_for_packed_sequences_is_exact_on_a_device():
    ids = torch.tensor([[1, 1, 1, 2, 2, 3, 3, 3, 3, 3, 3, -1]])
    stretch = packed_attention.stretch(packed_attention.sequence_starts(ids), 4, 10, torch.device("cuda"))
    shapes = ((1, 4, 6, 32), (1, 2, 12, 32), (1, 2, 12, 32))
    given = [torch.randn(shape, device="cuda", dtype=torch.bfloat16, requires_grad=True) for shape in shapes]
    found = packed_attention.attend(stretch, *given, scale=None)
    seen = (ids[0, 4:10, None] == ids[0, None]) & (torch.arange(4, 10)[:, None] >= torch.arange(12))
    exact = [one.detach().float().requires_grad_() for one in given]
    wanted = scaled_dot_product_attention(*exact, attn_mask=seen.cuda(), enable_gqa=True).transpose(1, 2)
    torch.testing.assert_close(found.float(), wanted, atol=2e-2, rtol=2e-2)
    weights = torch.randn_like(wanted)
    gradients = torch.autograd.grad((found.float() * weights).sum(), given)
    for one, other in zip(gradients, torch.autograd.grad((wanted * weights).sum(), exact), strict=True):
        torch.testing.assert_close(one.float(), other, atol=5e-2, rtol=5e-2)
