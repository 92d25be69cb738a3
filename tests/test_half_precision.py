"""fsdp2 computes in bfloat16 what one process computes with the model in bfloat16, bit for bit.

Blocks get from each other what they do there, and what transformers keeps in float32 stays so.
"""

import pytest
import torch
import transformers
from cases import cases, slow
from own_models import SIZES, OwnConfig

from nemo_dist import DistributedSetup, FSDP2Config, NeMoAutoModelForCausalLM, ParallelismSizes
from nemo_dist.errors import TopologyError
from nemo_dist.testing.equivalence import whole_state
from nemo_dist.testing.family_names import families
from nemo_dist.testing.shrink import tiny
from nemo_dist.testing.temp_folders import scratch
from nemo_dist.testing.tensors import rows_of_rank

FEW = [
    "olmo2",  # rotary embeddings in float32
    "ernie4_5_moe",  # keeps its routers
    "flint",  # keeps its attention sinks, beside projections
]
MORE = [
    "mamba",  # a residual stream in float32
    "bailing_hybrid",  # keeps convolutions whose weights other modules read
]


def checkpoint_of(family):
    """Return a folder with a tiny model of *family*, whose head is not tied: a tied weight has two gradients to add."""
    config = tiny(family).config
    config.tie_word_embeddings = False
    torch.manual_seed(0)
    folder = scratch("half")
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    return folder


def batch(rows=2):
    tokens = torch.arange(24 * rows).view(rows, 24) * 7 % 80 + 10
    return {"input_ids": tokens, "labels": tokens}


def numbers(model):
    """Return the logits and gradients of *model*, as float32."""
    output = model(**batch())
    output.loss.backward()
    gradients = {name: one.grad for name, one in model.named_parameters() if one.grad is not None}
    whole = {name: one.full_tensor() if hasattr(one, "full_tensor") else one for name, one in gradients.items()}
    return {name: one.detach().float() for name, one in {"logits": output.logits, **whole}.items()}


def unlike(found, expected):
    return sorted(name for name in found.keys() | expected.keys() if not _equal(found.get(name), expected.get(name)))


def _equal(one, other):
    return one is not None and other is not None and torch.equal(one, other)


def plain(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)


def on_rank_unlike(folders):
    """Return what differs from one process, by family and the dtype that the model is stored in."""
    found = {}
    for family, folder in folders.items():
        expected = numbers(plain(folder))
        for stored in (torch.float32, torch.bfloat16):
            setup = DistributedSetup.build("fsdp2")
            model = NeMoAutoModelForCausalLM.from_pretrained(folder, distributed_setup=setup, dtype=stored)
            found[family, str(stored)] = unlike(numbers(model), expected)
    return found


@cases("chosen", [(FEW,), slow(MORE)], name=", ".join)
def test_half_precision_gives_the_numbers_of_one_process(ranks, chosen):
    found, _ = ranks(2).run(on_rank_unlike, {family: checkpoint_of(family) for family in chosen})

    assert len(found) == 2 * len(chosen)
    assert not {case: names for case, names in found.items() if names}


def on_rank_unlike_in_stages(folders):
    found = {}
    for family, folder in folders.items():
        setup = DistributedSetup.build("fsdp2", ParallelismSizes(pp_size=2))
        model = NeMoAutoModelForCausalLM.from_pretrained(folder, distributed_setup=setup, dtype=torch.float32)
        logits = setup.runtime(model).forward({"input_ids": batch()["input_ids"]}).logits
        with torch.no_grad():
            expected = plain(folder).eval()(batch()["input_ids"], use_cache=False).logits
        found[family] = torch.equal(logits.float(), expected.float())
    return found


def test_stages_hand_on_hidden_states_in_the_dtype_that_the_model_gives_them(ranks):
    few = ["olmo2", "mamba"]
    found, _ = ranks(2).run(on_rank_unlike_in_stages, {family: checkpoint_of(family) for family in few})

    assert found == dict.fromkeys(few, True)


def on_rank_rotary_dtype(folder, policy):
    setup = DistributedSetup.build(FSDP2Config(mp_policy=policy))
    model = NeMoAutoModelForCausalLM.from_pretrained(folder, distributed_setup=setup, dtype=torch.float32)
    seen = []
    model.model.layers[0].register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["position_embeddings"][0].dtype), with_kwargs=True
    )
    model(**batch())
    return seen


def test_a_policy_that_says_so_casts_what_blocks_get(ranks):
    folder = checkpoint_of("olmo2")
    half = {"param_dtype": "bfloat16"}

    assert ranks(2).run(on_rank_rotary_dtype, folder, half)[0] == [torch.float32]
    assert ranks(2).run(on_rank_rotary_dtype, folder, {**half, "cast_forward_inputs": True})[0] == [torch.bfloat16]


def on_rank_load_scaled(policy):
    setup = DistributedSetup.build(FSDP2Config(mp_policy=policy))
    config = OwnConfig(**SIZES, change="scaled")
    model = NeMoAutoModelForCausalLM.from_config(config, distributed_setup=setup, dtype=torch.float32)
    return model(**batch()).logits.dtype


def on_rank_refusal():
    with pytest.raises(TopologyError) as caught:
        on_rank_load_scaled(None)
    return str(caught.value)


def test_a_parameter_kept_in_float32_by_a_block_of_half_precision_is_refused(ranks):
    message, _ = ranks(2).run(on_rank_refusal)

    assert "Scaled 'model.layers.0' has parameters that transformers keeps in float32 beside others" in message
    assert "mp_policy={'param_dtype': 'float32'}" in message
    assert ranks(2).run(on_rank_load_scaled, {"param_dtype": "float32"}) == [torch.float32] * 2


PARTS = 4


@pytest.mark.slow
@pytest.mark.parametrize("part", range(PARTS))
def test_half_precision_gives_the_logits_of_one_process_in_every_family(ranks, part):
    """Gradients of what is used twice are added in another order, which rounds otherwise."""
    different = []
    for family in families("causal")[part::PARTS]:
        try:
            folder = checkpoint_of(family)
            plain(folder)(**batch()).loss.backward()
        except Exception:  # plain transformers cannot make it tiny, or train it in bfloat16
            continue
        found, _ = ranks(2).run(on_rank_unlike, {family: folder})
        different += [case for case, names in found.items() if "logits" in names]

    assert not different


def on_rank_train(folder, sizes):
    """Return the loss, and every gradient whole, of a batch whose rows ranks share."""
    setup = DistributedSetup.build("fsdp2", ParallelismSizes(**sizes))
    model = NeMoAutoModelForCausalLM.from_pretrained(folder, distributed_setup=setup, dtype=torch.float32)
    runtime = setup.runtime(model)
    loss = runtime.forward_backward(rows_of_rank(batch(4), runtime)).item()
    gradients = {name: one.grad for name, one in runtime.named_parameters() if one.grad is not None}
    return loss, whole_state(runtime, gradients)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["ernie4_5_moe", "flint"])
@pytest.mark.parametrize(
    ("world", "sizes"),
    [
        (4, {"dp_replicate_size": 2}),
        (2, {"tp_size": 2}),
        (2, {"cp_size": 2}),
        (2, {"pp_size": 2}),
        (2, {"ep_size": 2}),
    ],
    ids=str,
)
def test_what_is_kept_in_float32_trains_beside_every_axis(ranks, world, sizes, family):
    """Other axes round otherwise, so this is as near as bfloat16 is."""
    folder = checkpoint_of(family)
    model = plain(folder)
    output = model(**batch(4))
    output.loss.backward()
    expected = {name: one.grad.float() for name, one in model.named_parameters() if one.grad is not None}

    for loss, gradients in ranks(world).run(on_rank_train, folder, sizes):
        assert loss == pytest.approx(output.loss.item(), rel=1e-2)
        for name, one in gradients.items():
            assert (one.float() - expected[name]).norm() < 0.03 * expected[name].norm(), name
