"""Tensor and sequence parallelism compute what one process computes, and hold no more than they should."""

from collections import Counter

import pytest
import torch
import transformers
from cases import case_id, cases, slow
from torch.distributed.tensor import DTensor, Shard
from torch.utils._python_dispatch import TorchDispatchMode

from nemo_dist import DistributedSetup, FSDP2Config, ParallelismSizes
from nemo_dist.errors import RankError
from nemo_dist.mesh.dtensor import local
from nemo_dist.testing.equivalence import Task, assert_equivalent, checkpoint
from nemo_dist.testing.io_counter import BytesRead
from nemo_dist.testing.precision import FP32
from nemo_dist.testing.tensors import whole
from nemo_dist.testing.tiny_models import SPECIMENS

UNEVEN = 13  # tokens: no number of ranks here divides it


def options(sequence=False, mode=False, plan=None, **sizes):
    return {
        "strategy": FSDP2Config(mp_policy=FP32, sequence_parallel=sequence, tp_plan=plan),
        "parallelism_sizes": ParallelismSizes(**sizes),
        "activation_checkpointing": mode,
    }


@pytest.mark.parametrize("sequence", [False, True], ids=["plain", "sequence"])
@cases(
    ("specimen", "world", "sizes"),
    [
        ("llama", 2, {"tp_size": 2}),
        ("llama", 4, {"tp_size": 4}),  # 2 key heads on 4 ranks
        slow("llama", 8, {"tp_size": 2, "dp_replicate_size": 2}),
        ("llama-tied", 4, {"tp_size": 2}),
        slow("qwen3", 4, {"tp_size": 4}),
        ("phi3", 2, {"tp_size": 2}),
        ("llama-odd", 4, {"tp_size": 2}),
        ("llama-odd", 3, {"tp_size": 3}),
        ("mixtral", 4, {"tp_size": 2}),
        ("llava", 2, {"tp_size": 2}),
    ],
)
def test_tensor_parallelism_matches_one_process(ranks, specimen, world, sizes, sequence):
    assert_equivalent(ranks(world), Task(specimen=specimen, length=UNEVEN), **options(sequence, **sizes))


@pytest.mark.parametrize("specimen", ["gemma2", "gemma3", "olmo2", "neox", "qwen3-moe", "deepseek"])
def test_the_plan_of_every_kind_of_model_matches_one_process(ranks, specimen):
    assert_equivalent(ranks(2), Task(specimen=specimen, length=UNEVEN), **options(True, tp_size=2))


@pytest.mark.slow
@pytest.mark.parametrize("sequence", [False, True], ids=["plain", "sequence"])
def test_accumulated_batches_weigh_by_their_labels(ranks, sequence):
    assert_equivalent(ranks(4), Task(specimen="llama-tied", accumulate=3), **options(sequence, tp_size=2))


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["full", "selective"])
@pytest.mark.parametrize("sequence", [False, True], ids=["plain", "sequence"])
def test_recomputation_matches_one_process(ranks, mode, sequence):
    assert_equivalent(ranks(4), Task(specimen="qwen3", length=UNEVEN), **options(sequence, mode, tp_size=2))


@pytest.mark.slow
@pytest.mark.parametrize("sequence", [False, True], ids=["plain", "sequence"])
@cases(("world", "sizes"), [(4, {"cp_size": 2}), (8, {"cp_size": 2}), (4, {"pp_size": 2})])
def test_tensor_parallelism_beside_cp_and_pp_matches_one_process(ranks, world, sizes, sequence):
    choice = options(sequence, tp_size=2, **sizes)
    if "pp_size" in sizes:
        choice["pipeline_config"] = {"pp_schedule": "1f1b"}
    assert_equivalent(ranks(world), Task(specimen="llama", length=16), **choice)


@pytest.mark.slow
def test_more_ranks_than_tokens_match_one_process(ranks):
    assert_equivalent(ranks(4), Task(specimen="llama", length=3), **options(True, tp_size=4))


def test_a_rule_of_the_user_replaces_that_of_the_model(ranks):
    plan = {
        "layers.*.mlp.gate_proj": "replicate",
        "model.layers.*.mlp.up_proj": "replicate",
        "layers.*.mlp.down_proj": "replicate",
        "layers.1.self_attn.o_proj": "rowwise",
        "lm_head": "replicate",
    }
    assert_equivalent(ranks(2), Task(specimen="llama"), **options(True, plan=plan, tp_size=2))
    assert_equivalent(
        ranks(2), Task(specimen="llama"), **options(plan={"embed_tokens": "embedding_colwise"}, tp_size=2)
    )


class Seen(TorchDispatchMode):
    """Record the shapes of all plain tensors that operations make, and count the collectives among them."""

    def __init__(self):
        super().__init__()
        self.shapes, self.collectives = set(), Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor) and not isinstance(tensor, DTensor) and not tensor.is_meta:
                self.shapes.add(tuple(tensor.shape))
        name = function._schema.name.removeprefix("_c10d_functional::")
        if name in ("all_reduce", "all_gather_into_tensor", "reduce_scatter_tensor"):
            self.collectives[name] += 1
        return result


def load(folder, choice):
    setup = DistributedSetup.build(**choice)
    model = SPECIMENS["llama-odd"].load.from_pretrained(folder, distributed_setup=setup, dtype=torch.float32)
    return setup.runtime(model)


def on_rank_shapes(folder, choice, batch):
    runtime = load(folder, choice)
    with Seen() as seen:
        runtime.forward_backward(batch)
    with Seen() as without_labels, torch.no_grad():
        runtime.model(input_ids=batch["input_ids"])
    return seen.shapes, without_labels.shapes


@pytest.mark.parametrize("sequence", [False, True], ids=["plain", "sequence"])
def test_no_rank_ever_holds_whole_logits_when_labels_are_given(ranks, sequence):
    words = 101  # of "llama-odd": no other dim has this size
    (batch,) = Task(specimen="llama-odd", rows=2, length=UNEVEN).batches(0)

    for shapes, without_labels in ranks(2).run(
        on_rank_shapes, checkpoint("llama-odd"), options(sequence, tp_size=2), batch
    ):
        assert [shape for shape in shapes if words in shape and shape != (words, 36)] == []
        assert (2, UNEVEN, words) in without_labels


def on_rank_logits(folder, choice, batch):
    runtime = load(folder, choice)
    cut = runtime.model(**batch)
    plain = runtime.model(input_ids=batch["input_ids"])
    assert isinstance(cut.logits, DTensor) and cut.logits.placements == (Shard(2),)
    return cut.logits.full_tensor().detach(), plain.logits.detach(), cut.loss.detach()


@pytest.mark.parametrize("sequence", [False, True], ids=["plain", "sequence"])
def test_logits_with_labels_are_a_sharded_dtensor(ranks, sequence):
    (batch,) = Task(specimen="llama-odd", rows=2, length=UNEVEN).batches(0)
    single = SPECIMENS["llama-odd"].load.from_pretrained(checkpoint("llama-odd"), dtype=torch.float32)(**batch)

    for joined, plain, loss in ranks(2).run(
        on_rank_logits, checkpoint("llama-odd"), options(sequence, tp_size=2), batch
    ):
        torch.testing.assert_close(joined, single.logits, rtol=1e-5, atol=1e-5)
        assert torch.equal(joined, plain)
        torch.testing.assert_close(loss, single.loss, rtol=1e-5, atol=0)


def on_rank_collectives(folder, choice, batch):
    runtime = load(folder, choice)
    with Seen() as seen:
        loss = runtime.model(**batch).loss
    forward = Counter(seen.collectives)
    with Seen() as seen:
        loss.backward()
    return forward, Counter(seen.collectives)


def test_a_step_runs_the_collectives_that_explain_names(ranks):
    """3 blocks; besides them the embedding and the loss sum, and the backward of the head does."""
    (batch,) = Task(specimen="llama-odd", rows=2, length=UNEVEN).batches(0)
    folder, blocks = checkpoint("llama-odd"), 3

    for forward, backward in ranks(2).run(on_rank_collectives, folder, options(tp_size=2), batch):
        assert forward == {"all_reduce": 2 * blocks + 1 + 2}
        # Of the 3 key heads no 2 ranks hold equally many, so those projections are whole: their gradients are summed.
        assert backward == {"all_reduce": 2 * blocks + 1 + 4 * blocks}
    for forward, _ in ranks(2).run(on_rank_collectives, folder, options(True, tp_size=2), batch):
        # The last block's tokens are joined once more.
        assert forward == {
            "all_reduce": 3,
            "all_gather_into_tensor": 2 * blocks + 1,
            "reduce_scatter_tensor": 2 * blocks,
        }


def on_rank_saved_bytes(folder, choice, batch):
    runtime = load(folder, choice)
    saved = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = runtime.model(**batch).loss
    loss.backward()
    return sum(saved.values())


def test_sequence_parallelism_keeps_fewer_activations(ranks):
    (batch,) = Task(specimen="llama-odd", rows=4, length=64).batches(0)

    plain = ranks(2).run(on_rank_saved_bytes, checkpoint("llama-odd"), options(tp_size=2), batch)
    cut = ranks(2).run(on_rank_saved_bytes, checkpoint("llama-odd"), options(True, tp_size=2), batch)

    print(f"bytes saved for the backward per rank: {plain} without, {cut} with sequence parallelism")
    assert all(b < a for a, b in zip(plain, cut, strict=True))


def on_rank_count_bytes(folder, specimen, choice):
    with BytesRead() as reading:
        model = SPECIMENS[specimen].load.from_pretrained(folder, distributed_setup=DistributedSetup.build(**choice))
    own = {local(p) for p in model.parameters()}
    full = sum(p.numel() * p.element_size() for p in model.parameters())
    experts = [p.numel() * p.element_size() for name, p in model.named_parameters() if "layers.0.mlp.experts" in name]
    return reading.bytes, sum(p.numel() * p.element_size() for p in own), full, sum(experts)


@pytest.mark.parametrize("specimen", ["llama-tied", "llama-odd", "phi3", "mixtral"])
@cases(
    ("world", "sizes", "copies"),
    [
        (2, {"tp_size": 2}, 1),
        (2, {"cp_size": 2}, 1),
        (4, {"tp_size": 2}, 1),
        (4, {"tp_size": 2, "cp_size": 2}, 1),
        pytest.param(4, {"tp_size": 2, "sequence": True}, 1, marks=pytest.mark.slow),
        pytest.param(8, {"tp_size": 2, "dp_replicate_size": 2, "sequence": True}, 2, marks=pytest.mark.slow),
        pytest.param(8, {"cp_size": 2, "dp_replicate_size": 2}, 2, marks=pytest.mark.slow),
        pytest.param(8, {"tp_size": 2, "cp_size": 2, "sequence": True, "mode": "full"}, 1, marks=pytest.mark.slow),
    ],
    lambda world, sizes, copies: case_id(world, sizes),
)
def test_a_rank_reads_exactly_the_bytes_of_its_shard(ranks, specimen, world, sizes, copies):
    if (specimen, world, sizes.get("cp_size")) == ("llama-odd", 8, 2) and "tp_size" in sizes:
        pytest.skip("57 rows over 2 x 4 ranks are refused, as the test below says")
    answers = ranks(world).run(on_rank_count_bytes, checkpoint(specimen), specimen, options(**sizes))

    print(f"{specimen} on {world} ranks: bytes read {[read for read, *_ in answers]} of {answers[0][2]}")
    # The experts of one layer are read whole as well, which proves that their conversion may run on slices.
    assert all(read == held + experts for read, held, _, experts in answers)
    # Norms, and keys that do not divide, are on every tensor-parallel rank.
    assert sum(held for _, held, *_ in answers) < 1.2 * copies * answers[0][2]


def on_rank_from_config(specimen, choice):
    torch.manual_seed(7)
    config = SPECIMENS[specimen].config()
    setup = DistributedSetup.build(**choice)
    model = SPECIMENS[specimen].load.from_config(config, distributed_setup=setup, dtype=torch.float32)
    return {name: whole(parameter) for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("specimen", ["llama-tied", "llama-odd", "mixtral"])
@pytest.mark.parametrize("world", [2, 4], ids=case_id)
def test_from_config_draws_what_one_process_draws(ranks, specimen, world):
    torch.manual_seed(7)
    config = SPECIMENS[specimen].config()
    single = dict(SPECIMENS[specimen].load.from_config(config, dtype=torch.float32).named_parameters())

    for tensors in ranks(world).run(on_rank_from_config, specimen, options(tp_size=2)):
        assert [name for name in single if not torch.equal(single[name], tensors[name])] == []


def on_rank_generate(folder, choice, prompt):
    return load(folder, choice).model.generate(prompt, max_new_tokens=5, do_sample=False)


@pytest.mark.parametrize("sequence", [False, True], ids=["plain", "sequence"])
def test_generation_with_a_cache_gives_the_tokens_of_one_process(ranks, sequence):
    prompt = torch.arange(1, 8).unsqueeze(0)
    single = SPECIMENS["llama-odd"].load.from_pretrained(checkpoint("llama-odd"), dtype=torch.float32)
    expected = single.generate(prompt, max_new_tokens=5, do_sample=False)

    for tokens in ranks(2).run(on_rank_generate, checkpoint("llama-odd"), options(sequence, tp_size=2), prompt):
        assert torch.equal(tokens, expected)


def on_rank_refusal(folder, choice, loader, what):
    with pytest.raises((ValueError, RankError)) as caught:
        getattr(loader, what)(folder, distributed_setup=DistributedSetup.build(**choice))
    return str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize("what", ["from_pretrained", "from_config"])
def test_a_dim_that_two_axes_cannot_both_shard_is_refused(ranks, what):
    loader, choice = SPECIMENS["llama-odd"].load, options(tp_size=2, cp_size=2)
    source = checkpoint("llama-odd")
    given = source if what == "from_pretrained" else transformers.AutoConfig.from_pretrained(source)

    messages = ranks(8).run(on_rank_refusal, given, choice, loader, what)

    assert any("up_proj.weight of shape (57, 36) cannot be cut along one dim by axes of sizes" in m for m in messages)
    assert all("cannot be cut" in message or "rank" in message for message in messages)
